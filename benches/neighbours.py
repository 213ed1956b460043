#!/usr/bin/env python3
"""What neighbours do to each other: a model that sleeps 800 ms beside echo, a tenant at ten times its quota beside another, and
one at ten times another's load where nobody has a quota.

    python3 tools/fetch_minilm.py && cargo build --release && python3 benches/neighbours.py [SECONDS]
"""

import json
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
from server import FERRY, Server, machine  # noqa: E402


def load(server, seconds, *arguments):
    return subprocess.Popen([FERRY, "load", "--addr", server.data, "--duration", f"{seconds}s", "--warmup", "2s", "--json",
                             *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def report(process):
    out, err = process.communicate()
    if process.returncode not in (0, 1):
        raise RuntimeError(err)
    return json.loads(out)


def essence(report):
    return {"offered_rps": round(report["offered_rps"], 1), "goodput_rps": round(report["goodput_rps"], 1),
            "p50_ms": round(report["latency_us"]["p50"] / 1000, 2), "p99_ms": round(report["latency_us"]["p99"] / 1000, 2),
            "errors": report["errors"]}


def sleeper(seconds, placement):
    """echo at 2,000 requests per second, alone and beside four callers of a model that sleeps 800 ms."""
    edits = {"echo": {"": {"placement": f'"{placement}"'}}, "sleep": {"input": {"range": "[800000, 800000]", "pad": 800000}}}
    echo = ["--model", "echo", "--rate", "2000", "--lengths", "fixed:64", "--slo", "20ms"]
    found = {}
    with Server(["echo", "sleep"], ["threads.executors=2"], edits) as server:
        found["alone"] = essence(report(load(server, seconds, *echo)))
        sleeping = load(server, seconds + 2, "--model", "sleep", "--concurrency", "4")
        found["beside sleep"] = essence(report(load(server, seconds, *echo)))
        found["sleep"] = essence(report(sleeping))
    return found


def tenants(seconds):
    """minilm: a tenant at 12 requests per second, alone and beside another that offers ten times as much. A deadline of 500 ms."""
    lengths = ["--model", "minilm", "--lengths", "lognormal:40,0.8,256", "--slo", "500ms", "--deadline", "500ms"]
    small = [*lengths, "--rate", "12", "--tenant", "small"]
    noisy = [*lengths, "--rate", "120", "--tenant", "noisy", "--seed", "2"]
    found = {}
    for policy in ["cost", "window"]:
        with Server(["minilm"], edits={"minilm": {"batching": {"policy": f'"{policy}"'}}}) as server:
            report(load(server, 5, *lengths, "--rate", "30"))
            alone = essence(report(load(server, seconds, *small)))
            other = load(server, seconds + 2, *noisy)
            beside = essence(report(load(server, seconds, *small)))
            found[policy] = {"alone": alone, "beside the noisy one": beside, "the noisy one": essence(report(other))}
    return found


def quotas(seconds):
    """minilm, with a quota for each tenant of a quarter of what the server can do: a tenant somewhat below it beside another,
    which is within its own or at ten times that."""
    lengths = ["--model", "minilm", "--lengths", "lognormal:40,0.8,256"]
    with Server(["minilm"]) as server:
        capacity = essence(report(load(server, 8, *lengths, "--concurrency", "64")))["goodput_rps"]
    quota = round(capacity / 4)
    lengths += ["--slo", "500ms", "--deadline", "500ms"]
    small = [*lengths, "--rate", str(round(0.8 * quota)), "--tenant", "small"]
    found = {"capacity_rps": capacity, "quota_rps": quota}
    # In turns, so that what the machine does meanwhile hits both.
    with Server(["minilm"], [f"quota.requests_per_second={quota}"]) as server:
        for turn in range(3):
            for name, share in [("alone", 0), ("beside one within its quota", 0.8), ("beside one at ten times its quota", 10)]:
                noisy = ["--rate", str(round(share * quota)), "--tenant", "noisy", "--seed", str(turn + 2)]
                other = load(server, seconds + 2, *lengths, *noisy) if share else None
                beside = essence(report(load(server, seconds, *small)))
                turns = found.setdefault(name, {"small": []})
                turns["small"].append(beside)
                if other:
                    turns.setdefault("noisy", []).append(essence(report(other)))
    return found


def main():
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    print(json.dumps({
        "machine": machine(),
        "echo inline": sleeper(seconds, "inline"),
        "echo on the executors": sleeper(seconds, "executor"),
        "quotas": quotas(seconds),
        "tenants": tenants(seconds),
    }, indent=2))


if __name__ == "__main__":
    main()
