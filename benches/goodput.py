#!/usr/bin/env python3
"""How much load minilm carries over TCP while 99 % of the requests are answered within their deadline, policy by policy.

    python3 tools/fetch_minilm.py && cargo build --release && python3 benches/goodput.py [ROUNDS] [SECONDS] [SLO_MS] [LENGTHS]

Rows lie end to end under `cost`, and are padded under the others, as the servers do that those stand for, and under `cost_padded`.
For each policy and round the highest such rate is searched by halving. Rounds of the policies alternate, so that a noisy
machine disturbs all of them. Requests are sent with the objective as their deadline. The load generator shares the machine.
"""

import json
import statistics
import subprocess
import sys
import pathlib

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
from server import FERRY, Server, machine  # noqa: E402

POLICIES = {
    "cost": {"policy": '"cost"'},
    "cost_padded": {"policy": '"cost"', "layout": '"padded"'},
    "window": {"policy": '"window"', "queue_delay_max_us": 5000, "layout": '"padded"'},
    "greedy_tokens": {"policy": '"greedy_tokens"', "layout": '"padded"'},
}
STEPS = 5
HIGHEST = 260.0


def share_on_time(server, rate, seconds, slo_ms, lengths, seed):
    done = subprocess.run(
        [FERRY, "load", "--addr", server.data, "--model", "minilm", "--rate", f"{rate:.2f}", "--connections", "4",
         "--lengths", lengths, "--duration", f"{seconds}s", "--warmup", "2s", "--slo", f"{slo_ms}ms",
         "--deadline", f"{slo_ms}ms", "--seed", str(seed), "--json"], capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)
    report = json.loads(done.stdout)
    return report["goodput_rps"] / report["offered_rps"], report


def goodput(policy, seconds, slo_ms, lengths, seed):
    with Server(["minilm"], edits={"minilm": {"batching": POLICIES[policy]}}) as server:
        # What the policy learns of batch times it has learned before the search.
        share_on_time(server, 30.0, 6, slo_ms, lengths, seed)
        low, high = 0.0, HIGHEST
        for _ in range(STEPS):
            rate = (low + high) / 2
            share, report = share_on_time(server, rate, seconds, slo_ms, lengths, seed)
            print(f"  {policy:<14} {rate:6.1f}/s: {share:.4f} on time, p99 {report['latency_us']['p99'] / 1000:.0f} ms, "
                  f"{report['errors']}", file=sys.stderr)
            if share >= 0.99:
                low = rate
            else:
                high = rate
        # At one and a half times what it carries: how much of it is left.
        over, _ = share_on_time(server, 1.5 * max(low, 1.0), seconds, slo_ms, lengths, seed + 1)
        return low, 1.5 * over


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seconds = int(sys.argv[2]) if len(sys.argv) > 2 else 15
    slo_ms = int(sys.argv[3]) if len(sys.argv) > 3 else 500
    lengths = sys.argv[4] if len(sys.argv) > 4 else "lognormal:40,0.8,256"
    found = {policy: [] for policy in POLICIES}
    overload = {policy: [] for policy in POLICIES}
    for seed in range(1, rounds + 1):
        for policy in POLICIES:
            rate, over = goodput(policy, seconds, slo_ms, lengths, seed)
            found[policy].append(rate)
            overload[policy].append(round(over, 2))
            print(f"{policy:<14} carries {rate:.1f}/s, at 1.5 times that {over:.2f} of it on time", file=sys.stderr)
    medians = {policy: statistics.median(rates) for policy, rates in found.items()}
    print(json.dumps({
        "machine": machine(), "slo_ms": slo_ms, "on_time": 0.99, "lengths": lengths, "seconds_a_step": seconds,
        "goodput_rps": found, "medians": medians,
        "cost_to_window": round(medians["cost"] / max(medians["window"], 1e-9), 2),
        "cost_to_greedy_tokens": round(medians["cost"] / max(medians["greedy_tokens"], 1e-9), 2),
        "packed_to_padded": round(medians["cost"] / max(medians["cost_padded"], 1e-9), 2),
        "at_1.5_times_as_share_of_goodput": overload,
    }, indent=2))


if __name__ == "__main__":
    main()
