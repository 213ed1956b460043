#!/usr/bin/env python3
"""What shadow schedulers cost, and how far their predictions are off after a live switch.

    python3 tools/fetch_minilm.py && cargo build --release && python3 benches/shadow.py [COST_SECONDS] [STRETCHES] [MODEL] [COST_MODELS]

Cost: for each model (or those of COST_MODELS, as in digits,echo) and rate (open loop, Poisson) no shadow, then four, for COST_SECONDS each. CPU time of the threads is the kernel's
(/proc/PID/task/TID/schedstat), as a share of one core. `covered`: share of the time that stretches cover.

Switches: MODEL (minilm, or another of those under LOADS) under a load of constant rate. Three settings are looked at; each is put in force after STRETCHES stretches, and what then comes
over as long a time is compared with what was predicted; then the settings of before are put back. `as is`: how far the simulation with
nothing set was from what really came, before the switch.

The load generator shares the machine.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))
from server import FERRY, Server, machine  # noqa: E402

FOUR = [
    {"policy": "window", "queue_delay_max_us": "5000"},
    {"policy": "greedy_tokens"},
    {"policy": "buckets", "queue_delay_max_us": "2000"},
    {"rows_max": "4"},
]
BASE = {"policy": "cost", "queue_delay_max_us": "auto", "rows_max": "32"}
SWITCHES = [
    {"policy": "window", "queue_delay_max_us": "20000"},
    {"policy": "greedy_tokens"},
    {"rows_max": "4"},
]
LOADS = [("minilm", 40, "lognormal:40,0.8,256"), ("digits", 300, None), ("digits", 1000, None), ("echo", 5000, "fixed:64")]


def ask(server, method, path, body=None):
    request = urllib.request.Request(f"http://{server.control}{path}", method=method,
                                     data=None if body is None else json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def threads(server):
    """CPU seconds by thread name."""
    total = {}
    for task in pathlib.Path(f"/proc/{server.process.pid}/task").iterdir():
        name = (task / "comm").read_text().strip()
        total[name] = total.get(name, 0.0) + int((task / "schedstat").read_text().split()[0]) / 1e9
    return total


def start_load(server, model, rate, lengths, seconds, seed=1):
    command = [FERRY, "load", "--addr", server.data, "--model", model, "--rate", str(rate), "--duration", f"{seconds}s",
               "--warmup", "1s", "--connections", "4", "--seed", str(seed), "--json"]
    if lengths:
        command += ["--lengths", lengths]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def metric(server, name):
    with urllib.request.urlopen(f"http://{server.control}/metrics", timeout=20) as page:
        return sum(float(line.rsplit(" ", 1)[1]) for line in page.read().decode().splitlines() if line.startswith(name))


def cost(model, rate, lengths, seconds):
    row = {"model": model, "rate": rate}
    with Server([model]) as server:
        for shadows in ([], FOUR):
            load = start_load(server, model, rate, lengths, seconds + 2)
            time.sleep(2)
            ask(server, "PUT", f"/v1/models/{model}/shadow", {"settings": shadows})
            before, begin, covered = threads(server), time.monotonic(), metric(server, "ferry_shadow_covered_seconds_total")
            time.sleep(seconds)
            after, end = threads(server), time.monotonic()
            covered = metric(server, "ferry_shadow_covered_seconds_total") - covered
            report = json.loads(load.communicate()[0])
            share = {name: (after[name] - before.get(name, 0.0)) / (end - begin) for name in after}
            row[f"k{len(shadows)}"] = {
                "shadow_core_share": round(share["ferry-shadow"], 5),
                "batcher_core_share": round(share["ferry-batcher"], 5),
                "covered": round(covered / (end - begin), 3),
                "ok_rps": round(report["ok"] / report.get("seconds", seconds + 2), 1),
                "p50_us": report["latency_us"]["p50"],
                "p99_us": report["latency_us"]["p99"],
                "late_sends": report["late_sends"],
            }
        shown = ask(server, "GET", f"/v1/models/{model}/shadow")
        row["stretches"] = {key: metric(server, f'ferry_shadow_stretches_total{{outcome="{key}"}}')
                            for key in ("used", "lost", "mixed", "differs")}
        row["trouble"] = shown["trouble"]
        row["load_average"] = os.getloadavg()[0]
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def wait(server, model, what, holds, patience=600):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        shown = ask(server, "GET", f"/v1/models/{model}/shadow")
        if holds(shown):
            return shown
        time.sleep(1)
    raise RuntimeError(f"{what} did not happen: {shown}")


def figures(run):
    times = run["queue_and_run_us"]
    return {"p50_ms": times["p50"] / 1e3, "p99_ms": times["p99"] / 1e3, "fill": run["fill"], "waste": run["waste"],
            "on_time": run["on_time"], "answered": run["answered"]}


def off(a, b):
    return {key: abs(a[key] / b[key] - 1) if b[key] and key != "waste" else abs((a[key] or 0) - (b[key] or 0))
            for key in ("p50_ms", "p99_ms", "fill", "waste")}


def switches(stretches, model, rate, lengths):
    rows = []
    with Server([model]) as server:
        stop = threading.Event()

        def offer():
            seed = 0
            while not stop.is_set():
                seed += 1
                start_load(server, model, rate, lengths, 30, seed).wait()

        loading = threading.Thread(target=offer)
        loading.start()
        try:
            ask(server, "PATCH", f"/v1/models/{model}/policy", {"set": BASE})
            time.sleep(5)
            for setting in SWITCHES:
                # Anew, so that last_switch and the window are this one's.
                ask(server, "PUT", f"/v1/models/{model}/shadow", {"settings": SWITCHES})
                before = wait(server, model, "the prediction", lambda shown: (shown["window"] or {}).get("stretches", 0) >= stretches)
                ask(server, "PATCH", f"/v1/models/{model}/policy", {"set": setting})
                after = wait(server, model, "the comparison", lambda shown: (shown["last_switch"] or {}).get("set") == setting)
                switch = after["last_switch"]
                row = {"setting": setting, "covered_s": switch["covered_seconds"],
                       "before": figures(before["real"]), "as_is_error": off(figures(before["simulated_as_is"]), figures(before["real"])),
                       "predicted": figures(switch["predicted"]), "happened": figures(switch["happened"]),
                       "error": switch["errors"], "load_average": os.getloadavg()[0]}
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
                ask(server, "PATCH", f"/v1/models/{model}/policy", {"set": BASE})
                time.sleep(2)
            history = ask(server, "GET", f"/v1/models/{model}/policy/history")
            told = sum(1 for change in history["changes"] if "prediction" in change)
        finally:
            stop.set()
            loading.join()
    return {"model": model, "rate": rate, "lengths": lengths, "switches": rows, "in_the_history": told}


def main():
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    stretches = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    name = sys.argv[3] if len(sys.argv) > 3 else "minilm"
    load = next(load for load in LOADS if load[0] == name)
    wanted = sys.argv[4].split(",") if len(sys.argv) > 4 else [load[0] for load in LOADS]
    result = {"machine": machine(), "cost": [cost(*one, seconds) for one in LOADS if one[0] in wanted] if seconds else [],
              "switches": switches(stretches, *load) if stretches else None}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
