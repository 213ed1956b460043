#!/usr/bin/env python3
"""SIGTERM under load, many times: what was sent, what was answered, what was lost.

    cargo build --release && python3 benches/drain.py [ROUNDS]

Each round starts a server, loads it with pipelined requests, and terminates it in the middle. Every request must end in an
answer, in a refusal, or above the last accepted id of the server's goaway, which says that it was never executed.
"""

import json
import pathlib
import random
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
from server import FERRY, Server, machine  # noqa: E402


def round_of(seed):
    random.seed(seed)
    with Server(["echo", "digits"]) as server:
        load = subprocess.Popen(
            [FERRY, "load", "--addr", server.data, "--model", random.choice(["echo", "digits"]), "--concurrency", "512",
             "--connections", "8", "--duration", "5s", "--warmup", "0s", "--seed", str(seed), "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(0.7 + random.random())
        started = time.monotonic()
        status = server.terminate()
        took = time.monotonic() - started
        out, err = load.communicate(timeout=60)
        report = json.loads(out) if out.strip() else {"stderr": err}
    keys = ("sent", "ok", "errors", "lost", "unsent")
    return {"exit": status, "drain_ms": round(took * 1000), **{key: report.get(key) for key in keys}}


def main():
    rounds = [round_of(seed) for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 20)]
    for line in rounds:
        print(json.dumps(line))
    total = {key: sum(line[key] or 0 for line in rounds) for key in ("sent", "ok", "lost")}
    refused = sum(sum((line["errors"] or {}).values()) for line in rounds)
    clean = sum(line["exit"] == 0 for line in rounds)
    print(json.dumps({"machine": machine(), "rounds": len(rounds), "exit_0": clean, **total, "refused": refused,
                      "drain_ms_max": max(line["drain_ms"] for line in rounds)}))
    sys.exit(0 if total["lost"] == 0 and clean == len(rounds) else 1)


if __name__ == "__main__":
    main()
