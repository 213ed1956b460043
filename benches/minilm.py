#!/usr/bin/env python3
"""minilm over the wire against the bound: closed loop of 64 callers, and `ferry offline` with the same lengths and threads.

    python3 tools/fetch_minilm.py && cargo build --release && python3 benches/minilm.py [ROUNDS] [SECONDS]

The two alternate, so that a noisy machine disturbs both. The ratio is of tokens per second. The load generator shares the
machine with the server, as it would not in production; its share is in the ratio.
"""

import json
import pathlib
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
from server import FERRY, ROOT, Server, machine  # noqa: E402

LENGTHS = "lognormal:40,0.8,256"


def ferry(*arguments):
    done = subprocess.run([FERRY, *arguments, "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ferry {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout)


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seconds = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    sets = sys.argv[3:]
    offline, online, servers = [], [], []
    with Server(["minilm"], sets) as server:
        for _ in range(rounds):
            bound = ferry("offline", "--model", "minilm", "--models", str(ROOT / "models"), "--lengths", LENGTHS,
                          "--requests", str(50 * seconds))
            report = ferry("load", "--addr", server.data, "--model", "minilm", "--concurrency", "64", "--connections", "4",
                           "--lengths", LENGTHS, "--duration", f"{seconds}s", "--warmup", "2s")
            offline.append(bound["tokens_per_s"])
            online.append(report["tokens_per_s"])
            servers.append(report["server"])
            print(f"offline {bound['tokens_per_s']:.0f} tokens/s (waste {bound['padding_waste']:.3f}), "
                  f"online {report['tokens_per_s']:.0f} tokens/s {report['server']} "
                  f"p99 {report['latency_us']['p99'] / 1000:.0f} ms", file=sys.stderr)
    print(json.dumps({
        "machine": machine(),
        "lengths": LENGTHS,
        "threads": bound["threads"],
        "offline_tokens_per_s": round(statistics.median(offline)),
        "online_tokens_per_s": round(statistics.median(online)),
        "ratio_of_medians": round(statistics.median(online) / statistics.median(offline), 3),
        "ratios": [round(a / b, 3) for a, b in zip(online, offline)],
        "server": servers[-1],
    }, indent=2))


if __name__ == "__main__":
    main()
