#!/usr/bin/env python3
"""What one binary costs a request more than another, side by side: two builds, or one build with two settings.

    python3 benches/overhead.py A B [--rounds 8] [--seconds 4] [--model echo] [--depth 256] [--set-a KEY=VALUE]… [--set-b KEY=VALUE]…

A and B are `ferry` binaries. In each round both serve, in turns (which goes first changes), and each one's own load generator (they may speak different protocols) asks
with as many requests in flight as --depth, on one connection. The load generator shares the machine: the server's CPU time a request is the
figure to trust; requests per second say how much of it comes through. Ratios are of the medians, and of each round's pair.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
import server as support  # noqa: E402


def measure(binary, given, sets):
    support.FERRY = binary
    with support.Server([given.model], sets) as server:
        warm = 1
        command = [binary, "load", "--addr", server.data, "--model", given.model, "--concurrency", str(given.depth), "--connections",
                   "1", "--lengths", given.lengths, "--warmup", f"{warm}s", "--duration", f"{given.seconds}s", "--json"]
        before = server.cpu_seconds()
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        used = server.cpu_seconds() - before
        # The warm-up asks at the same rate.
        requests = report["throughput_rps"] * (given.seconds + warm)
        return {"rps": report["throughput_rps"], "cpu_us": used / requests * 1e6, "p50_us": report["latency_us"]["p50"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binaries", nargs=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--model", default="echo")
    parser.add_argument("--depth", type=int, default=256)
    parser.add_argument("--lengths", default="fixed:64")
    parser.add_argument("--set-a", action="append", default=[])
    parser.add_argument("--set-b", action="append", default=[])
    given = parser.parse_args()
    print(support.machine())
    rounds = []
    for at in range(given.rounds):
        pair = {}
        for side in ("ab", "ba")[at % 2]:
            place = "ab".index(side)
            pair[side] = measure(given.binaries[place], given, [given.set_a, given.set_b][place])
        rounds.append(pair)
        print(f"round {at + 1}: " + ", ".join(
            f"{side.upper()} {pair[side]['rps']:,.0f}/s {pair[side]['cpu_us']:.3f} us CPU p50 {pair[side]['p50_us']} us" for side in "ab"), flush=True)
    for figure, name in (("cpu_us", "CPU time a request"), ("rps", "requests/s")):
        medians = [statistics.median(pair[side][figure] for pair in rounds) for side in "ab"]
        ratios = sorted(pair["b"][figure] / pair["a"][figure] for pair in rounds)
        print(f"{name}: A {medians[0]:,.3f}, B {medians[1]:,.3f}, B/A {medians[1] / medians[0]:.4f}; by round "
              f"median {statistics.median(ratios):.4f}, {ratios[0]:.4f} to {ratios[-1]:.4f}")


if __name__ == "__main__":
    main()
