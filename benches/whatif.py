#!/usr/bin/env python3
"""What `ferry replay TRACE --set` predicts for minilm, and what comes when the settings are really switched.

    python3 tools/fetch_minilm.py && cargo build --release && python3 benches/whatif.py [ROUNDS] [SECONDS] [RATE] [LENGTHS]

In each round the same requests (same seed, open loop) are sent under the settings A, under each of the settings B, and under
A again, each run captured. The trace of the first A predicts the others. All times are queue and run, from the scheduler's
books; what a client sees on top of them is printed beside it. Three things tell what an error is made of:

    A again        A's own prediction for "no change", against a second run of A: how far two equal runs are apart
    own trace      a run simulated from its own trace: what the simulation gets wrong when the machine is the same
    slower         executor time measured ÷ predicted: above 1, the machine was slower than when A ran

The load generator shares the machine.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
from server import FERRY, Server, machine  # noqa: E402

A = {"policy": "cost", "queue_delay_max_us": "auto", "rows_max": "64", "cells_max": "256"}
SETTINGS = {
    "A": {},
    "window of 20 ms": {"policy": "window", "queue_delay_max_us": "20000"},
    "greedy_tokens": {"policy": "greedy_tokens"},
    "cost, 4 rows": {"rows_max": "4"},
    "A again": {},
}
FIGURES = ["p50", "p99", "fill", "waste"]
TARGET = 0.15


def knobs(name):
    return {**A, **SETTINGS[name]}


def ferry(*arguments):
    done = subprocess.run([FERRY, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ferry {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def load(server, rate, lengths, seconds, seed):
    return json.loads(ferry("load", "--addr", server.data, "--model", "minilm", "--rate", f"{rate}", "--connections", "4",
                            "--lengths", lengths, "--duration", f"{seconds}s", "--warmup", "0s", "--seed", f"{seed}", "--json"))


def measured(server, name, trace, rate, lengths, seconds, seed):
    """Switches to the settings and captures a run under them; returns what the client saw."""
    ferry("set", "--control", server.control, "minilm", *[f"{key}={value}" for key, value in knobs(name).items()])
    # The policy's first batches, and what it learns from them, are not measured.
    load(server, rate, lengths, 3, seed + 1000)
    load_before = os.getloadavg()[0]
    capture = subprocess.Popen([FERRY, "capture", "--control", server.control, "--seconds", f"{seconds + 3}", "-o", trace],
                               stdout=subprocess.DEVNULL)
    report = load(server, rate, lengths, seconds, seed)
    if capture.wait() != 0:
        raise RuntimeError("the capture failed")
    latency = report["latency_us"]
    return {"p50": latency["p50"] / 1000, "p99": latency["p99"] / 1000, "load_average": load_before, "errors": report["errors"]}


def essence(run):
    model = run["models"]["minilm"]
    times = model["queue_and_run_ms"]
    return {"requests": model["requests"], "answered": model["answered"], "p50": times["p50"], "p99": times["p99"],
            "fill": model["fill_ratio"], "waste": model["padding_waste"], "busy_s": sum(run["executors_busy_seconds"]),
            "guessed": run["batches_of_a_guessed_time"]}


def replayed(trace, name):
    """The runs of a what-if replay with the settings of that name: recorded, simulated as recorded, changed."""
    sets = [f"--set=minilm.{key}={value}" for key, value in knobs(name).items()]
    runs = json.loads(ferry("replay", trace, "--json", *sets))["runs"]
    return {kind: essence(run) for kind, run in runs.items()}


def off(predicted, real):
    return predicted / real - 1 if real else 0.0


def one_round(folder, rate, lengths, seconds, seed):
    traces, clients = {}, {}
    with Server(["minilm"]) as server:
        load(server, rate, lengths, 6, seed + 2000)
        for at, name in enumerate(SETTINGS):
            traces[name] = str(pathlib.Path(folder) / f"{seed}-{at}.trace")
            clients[name] = measured(server, name, traces[name], rate, lengths, seconds, seed)
    for name in SETTINGS:
        # Whatever is predicted from a trace, it must be one that is decided again hash for hash.
        assert json.loads(ferry("replay", traces[name], "--json"))["equal"], name
    found = {}
    for name in list(SETTINGS)[1:]:
        own = replayed(traces[name], name)
        real, predicted = own["recorded"], replayed(traces["A"], name)["changed"]
        found[name] = {
            "measured": real, "predicted": predicted,
            "error": {figure: round(off(predicted[figure], real[figure]), 4) for figure in FIGURES},
            "own_trace_error": {figure: round(off(own["simulated"][figure], real[figure]), 4) for figure in FIGURES},
            "slower": round(real["busy_s"] / predicted["busy_s"], 3),
            "client": clients[name],
        }
        one = found[name]
        print(f"  {seed} {name:<16} " + "  ".join(
            f"{figure} {predicted[figure]:.3f} for {real[figure]:.3f} ({one['error'][figure]:+.1%}, own {one['own_trace_error'][figure]:+.1%})"
            for figure in FIGURES) + f"  slower {one['slower']:.2f}  load {clients[name]['load_average']:.1f}", file=sys.stderr)
    # Every trace predicts every other run: more pairs, from the same runs.
    pairs = []
    for source in SETTINGS:
        for target in SETTINGS:
            if source != target:
                predicted, real = replayed(traces[source], target)["changed"], found.get(target, {}).get("measured")
                real = real or replayed(traces[target], target)["recorded"]
                pairs.append({figure: off(predicted[figure], real[figure]) for figure in FIGURES})
    return found, pairs


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seconds = int(sys.argv[2]) if len(sys.argv) > 2 else 35
    rate = float(sys.argv[3]) if len(sys.argv) > 3 else 60
    lengths = sys.argv[4] if len(sys.argv) > 4 else "lognormal:12,0.8,96"
    found, pairs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, rounds + 1):
            one, more = one_round(folder, rate, lengths, seconds, seed)
            found.append(one)
            pairs += more
    summary = {}
    for name in list(SETTINGS)[1:]:
        errors = {figure: [one[name]["error"][figure] for one in found] for figure in FIGURES}
        medians = {figure: statistics.median(errors[figure]) for figure in FIGURES}
        summary[name] = {
            "median_error": {figure: round(median, 4) for figure, median in medians.items()},
            "errors": errors,
            "median_own_trace_error": {
                figure: round(statistics.median(one[name]["own_trace_error"][figure] for one in found), 4) for figure in FIGURES},
            "p99_ms": {"predicted": [round(one[name]["predicted"]["p99"], 1) for one in found],
                       "measured": [round(one[name]["measured"]["p99"], 1) for one in found]},
            "slower": [one[name]["slower"] for one in found],
            "client_p99_minus_server_ms": [round(one[name]["client"]["p99"] - one[name]["measured"]["p99"], 2) for one in found],
            "p99_within_target": abs(medians["p99"]) <= TARGET,
        }
    print(json.dumps({
        "machine": machine(), "rate": rate, "lengths": lengths, "seconds_a_run": seconds, "rounds": rounds, "A": A,
        "settings": SETTINGS, "target_p99": TARGET, "settings_B": summary,
        "all_pairs_median_of_absolute_errors": {
            figure: round(statistics.median(abs(pair[figure]) for pair in pairs), 4) for figure in FIGURES},
        "pairs": len(pairs), "runs": found,
    }, indent=2))


if __name__ == "__main__":
    main()
