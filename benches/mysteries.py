#!/usr/bin/env python3
"""Five servers with one bad setting each, and what the server itself says is wrong: the waterfall of executor time, `explain`, the
linter and, where a knob is to blame, `tune` over a captured trace.

    python3 tools/fetch_minilm.py && cargo build --release && python3 benches/mysteries.py [SECONDS] [FACTOR]

FACTOR multiplies the rates, for a machine on which nothing waits at these: a budget is too small where work waits.

Nothing is judged here: the sentences and figures are to be read. The load generator shares the machine.
"""

import json
import pathlib
import subprocess
import sys
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
from server import FERRY, Server, machine  # noqa: E402

LENGTHS = "lognormal:40,0.8,256"
MYSTERIES = {
    "a window that is too long": {
        "edits": {"minilm": {"batching": {"policy": '"window"', "queue_delay_max_us": 300000}}},
        "loads": [["--rate", "20"]],
    },
    "a budget that is too small for the lengths": {
        "edits": {"minilm": {"batching": {"padded_cells_max": 256, "rows_max": 64, "layout": '"padded"'}}},
        "loads": [["--rate", "200"]],
    },
    "callers with too few requests in flight": {
        "edits": {"minilm": {"batching": {"policy": '"window"', "queue_delay_max_us": 50000}}},
        "loads": [["--concurrency", "4"]],
    },
    "a noisy tenant": {
        "edits": {},
        "loads": [["--rate", "10", "--tenant", "quiet", "--deadline", "500ms"],
                  ["--rate", "300", "--tenant", "noisy", "--deadline", "500ms"]],
    },
    "answers that keep executors from their next batch": {
        "sets": ["executor.canary_every=1"],
        "edits": {},
        "loads": [["--rate", "60"]],
    },
}


def get(server, path):
    with urllib.request.urlopen(f"http://{server.control}{path}", timeout=10) as answer:
        return answer.read().decode()


def waterfall(report):
    parts = sorted(report["server"]["waterfall"].items(), key=lambda part: -part[1])
    return ", ".join(f"{part} {100 * share:.1f} %" for part, share in parts if share >= 0.02)


def tenants(server):
    metrics = get(server, "/metrics").splitlines()
    lines = [line.split('"') for line in metrics if line.startswith("ferry_tenant_executor_seconds_total{")]
    return ", ".join(f"{name} {float(rest.split()[-1]):.2f} s" for _, name, rest in lines)


def tuned(trace):
    done = subprocess.run([FERRY, "tune", trace, "--model", "minilm", "--slo", "500ms", "--budget", "20s", "--json"],
                          capture_output=True, text=True)
    if done.returncode != 0:
        return done.stderr.strip().splitlines()[-1]
    document = json.loads(done.stdout)
    point = next(point for point in document["points"] if point["id"] == document["chosen"])
    present = next(point for point in document["points"] if point["id"] == document["present"])
    changes = [text.strip() for mark, text in point["diff"] if mark == "+"] or ["what is there"]
    p99 = [candidate["predicted"]["p99_ms"] for candidate in (present, point)]
    return f"{', '.join(changes)}; p99 {p99[0]:.0f} ms now, {p99[1]:.0f} ms predicted"


def main():
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    factor = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    print(machine())
    for name, mystery in MYSTERIES.items():
        with Server(["minilm"], mystery.get("sets", ()), mystery["edits"]) as server:
            trace = str(pathlib.Path(server.folder.name) / "trace")
            capture = subprocess.Popen([FERRY, "capture", "--control", server.control, "--seconds", f"{seconds}", "-o", trace],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            asked = [[f"{factor * float(word):g}" if before == "--rate" else word for before, word in zip(["", *load], load)]
                     for load in mystery["loads"]]
            loads = [subprocess.Popen([FERRY, "load", "--addr", server.data, "--model", "minilm", "--lengths", LENGTHS,
                                       "--duration", f"{seconds}s", "--warmup", "0s", "--slo", "500ms", "--json", *load],
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for load in asked]
            reports = [json.loads(load.communicate()[0]) for load in loads]
            capture.wait()
            print(f"\n== {name}")
            for load, report in zip(asked, reports):
                latency, server_side = report["latency_us"], report["server"]
                print(f"load       {' '.join(load)}: ok {report['ok']}, errors {report['errors']}, goodput "
                      f"{report['goodput_rps']:.1f}/s, p50 {latency['p50'] / 1000:.1f} ms, p99 {latency['p99'] / 1000:.1f} ms, fill "
                      f"{100 * server_side['fill_ratio']:.1f} %, {server_side['batch_rows_mean']:.1f} rows a batch")
            print(f"waterfall  {waterfall(reports[-1])}")
            print(f"tenants    {tenants(server)}")
            story = subprocess.run([FERRY, "explain", "--control", server.control, "--slowest", "1"], capture_output=True, text=True)
            print("explain    " + story.stdout.strip().replace("\n", "\n           "))
            findings = json.loads(get(server, "/v1/models/minilm/findings"))["findings"]
            for finding in findings or [{"code": "none", "message": ""}]:
                print(f"linter     {finding['code']}: {finding['message']}")
            print(f"tune       {tuned(trace)}", flush=True)


if __name__ == "__main__":
    main()
