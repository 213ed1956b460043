#!/usr/bin/env python3
"""Writes the Grafana dashboard and the alert rules from the table of metrics in src/telemetry/mod.rs. Standard library only.

    python3 tools/grafana/generate.py            # writes ferry.json and alerts.yml beside this file
    python3 tools/grafana/generate.py --check    # writes nothing; fails where they are not what it would write

A query names its metrics and labels through the functions below, which know the table: a name or a label that is not in it ends
this program, and a panel whose metric does not exist (yet) can be left out on purpose (`optional`). tests/grafana.rs compares
what is written with what the server really exports.
"""
import json, pathlib, re, sys

HERE = pathlib.Path(__file__).resolve().parent
TABLE = (HERE / "../../src/telemetry/mod.rs").resolve()

# Name: (type, labels, what it says).
METRICS = {}
for line in TABLE.read_text().splitlines():
    found = re.match(r"//! \| `(ferry_\w+)` \| (counter|gauge|histogram) \| ([\w, ]*)\| (.*) \|$", line)
    if found:
        name, kind, labels, says = found.groups()
        METRICS[name] = (kind, {label.strip() for label in labels.split(",") if label.strip()}, says)
assert len(METRICS) > 40, f"the table in {TABLE} was not understood: {len(METRICS)} metrics"
TARGET_LABELS = {"instance", "le"}  # a scrape's own, and a bucket's


def use(name, kinds, labels):
    """The metric is in the table, of one of these kinds, and has these labels."""
    if name not in METRICS:
        sys.exit(f"{name} is not in the table of {TABLE.name}")
    kind, known, _ = METRICS[name]
    if kind not in kinds:
        sys.exit(f"{name} is a {kind}, used as {' or '.join(kinds)}")
    if unknown := set(labels) - known - TARGET_LABELS:
        sys.exit(f"{name} has no label {', '.join(sorted(unknown))}; it has {', '.join(sorted(known)) or 'none'}")
    return known


def matchers(name, kinds, by, **only):
    known = use(name, kinds, list(by) + list(only))
    parts = ['instance=~"$instance"']
    if "model" in known and "model" not in only:
        parts.append('model=~"$model"')
    parts += [f'{label}="{value}"' for label, value in only.items()]
    return "{" + ",".join(parts) + "}"


def over(by):
    return f"sum by ({', '.join(by)}) " if by else "sum"


def rate(name, *by, **only):
    """Per second, of a counter."""
    return f"{over(by)}(rate({name}{matchers(name, ['counter'], by, **only)}[$__rate_interval]))"


def now(name, *by, **only):
    """A gauge as it stands."""
    return f"{over(by)}({name}{matchers(name, ['gauge'], by, **only)})"


def rise(name, *by, **only):
    """What a counter rose by in the time of the panel's step."""
    return f"{over(by)}(increase({name}{matchers(name, ['counter'], by, **only)}[$__rate_interval]))"


def quantile(share, name, *by):
    where = matchers(name, ["histogram"], by)
    return f"histogram_quantile({share}, {over(['le', *by])}(rate({name}_bucket{where}[$__rate_interval])))"


def mean(name, *by):
    where = matchers(name, ["histogram"], by)
    part = lambda what: f"{over(by)}(rate({name}_{what}{where}[$__rate_interval]))"
    return f"{part('sum')} / {part('count')}"


def per_second(name, *by):
    """Observations of a histogram per second."""
    return f"{over(by)}(rate({name}_count{matchers(name, ['histogram'], by)}[$__rate_interval]))"


def buckets(name):
    return f"sum by (le) (increase({name}_bucket{matchers(name, ['histogram'], [])}[$__rate_interval]))"


def share(part, whole):
    return f"{part} / {whole}"


SOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Board:
    def __init__(self):
        self.panels, self.x, self.y, self.line = [], 0, 0, 0

    def place(self, width, height):
        if self.x + width > 24:
            self.x, self.y = 0, self.y + self.line
            self.line = 0
        at = {"x": self.x, "y": self.y, "w": width, "h": height}
        self.x, self.line = self.x + width, max(self.line, height)
        return at

    def row(self, title):
        self.x, self.y, self.line = 0, self.y + self.line, 0
        self.panels.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": self.place(24, 1)})
        self.x, self.y, self.line = 0, self.y + 1, 0

    def add(self, kind, title, says, queries, width, height, field, options):
        targets = [
            {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for at, (legend, expr) in enumerate(queries)
        ]
        self.panels.append({
            "type": kind, "title": title, "description": says, "datasource": SOURCE, "targets": targets,
            "gridPos": self.place(width, height), "fieldConfig": {"defaults": field, "overrides": []}, "options": options,
        })
        return targets

    def graph(self, title, says, unit, *queries, stacked=False, width=8, top=None):
        custom = {"lineWidth": 1, "fillOpacity": 60 if stacked else 8, "showPoints": "never",
                  "stacking": {"mode": "normal" if stacked else "none", "group": "A"}}
        field = {"unit": unit, "min": 0, "custom": custom} | ({"max": top} if top else {})
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
        self.add("timeseries", title, says, queries, width, 8, field, options)

    def heatmap(self, title, says, unit, name, width=8):
        options = {"calculate": False, "yAxis": {"unit": unit}, "color": {"mode": "scheme", "scheme": "Turbo", "steps": 64},
                   "cellGap": 1, "tooltip": {"mode": "single", "yHistogram": True}, "legend": {"show": False}}
        for target in self.add("heatmap", title, says, [("{{le}}", buckets(name))], width, 8, {}, options):
            target["format"] = "heatmap"

    def number(self, title, says, unit, query, width=4):
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "none"}
        self.add("stat", title, says, [("", query)], width, 4, {"unit": unit}, options)


def dashboard():
    board = Board()
    board.row("At a glance")
    answered = rate("ferry_requests_finished_total", code="ok")
    board.number("Answered", "Requests with a result.", "reqps", answered)
    board.number("Not answered", "Accepted and ended without a result, and refused.", "reqps",
                 f"{rate('ferry_requests_finished_total')} - {answered} + ({rate('ferry_requests_refused_total')} or vector(0))")
    board.number("Latency p99", "Received to answered.", "s", quantile(0.99, "ferry_request_latency_seconds"))
    board.number("In flight", "Accepted and not finished.", "short", now("ferry_requests_in_flight"))
    board.number("Rows per batch", "Mean.", "short", mean("ferry_batch_rows"))
    rows_used = f"sum(rate(ferry_batch_rows_sum{matchers('ferry_batch_rows', ['histogram'], [])}[$__rate_interval]))"
    board.number("Fill", "Rows used of those that batches had place for.", "percentunit",
                 share(rows_used, rate("ferry_batch_rows_possible_total")))

    board.row("Where executor time goes")
    if "ferry_executor_time_seconds_total" in METRICS:
        board.graph("Waterfall", "All of the executors' time, by what it went to: useful work, padding by cause, overhead, and idle "
                    "with work waiting (by cause) or without any. Parts add up to 100 %.", "percentunit",
                    ("{{part}}", share(rate("ferry_executor_time_seconds_total", "part"),
                                       f"on() group_left() {rate('ferry_executor_time_seconds_total')}")),
                    stacked=True, width=16, top=1)
    busy = f"rate(ferry_executor_busy_seconds_total{matchers('ferry_executor_busy_seconds_total', ['counter'], ['executor'])}[$__rate_interval])"
    use("ferry_executor_info", ["gauge"], ["executor", "device"])
    board.graph("Executors busy", "Share of its time that each executor spent on batches; inline ones run on the batcher's thread.",
                "percentunit", ("{{executor}} on {{device}}", f"{busy} * on (instance, executor) group_left (device) ferry_executor_info"))
    board.graph("Time of a batch", "Submitted to read back.", "s",
                *[(f"{model_legend} p{at}", quantile(at / 100, "ferry_service_time_seconds", "model"))
                  for at in (50, 99) for model_legend in ["{{model}}"]])
    board.graph("Failures of executors", "Batches that ended with an error or a panic of the model.", "ops",
                ("errors {{executor}}", rate("ferry_executor_failures_total", "executor")),
                ("panics {{executor}}", rate("ferry_executor_panics_total", "executor")),
                ("hangs {{executor}}", rate("ferry_executor_hangs_total", "executor")),
                ("rebuilt models {{executor}}", rate("ferry_executor_rebuilds_total", "executor")))
    board.graph("Requests behind failures", "Rows of failed batches that were answered all the same, and those that were not.", "ops",
                ("{{outcome}}", rate("ferry_bisected_rows_total", "outcome")),
                ("refused unrun", rate("ferry_quarantined_total")))
    board.graph("Batches run again in parts", "And the parts.", "ops", ("batches", rate("ferry_bisections_total")),
                ("parts", rate("ferry_bisection_runs_total")))

    board.row("Batches")
    board.heatmap("Rows of a batch", "How large batches are.", "short", "ferry_batch_rows")
    board.heatmap("Fill of a batch", "Rows used of those possible.", "percentunit", "ferry_batch_fill_ratio")
    board.heatmap("Length of a batch", "The bucket that rows were padded to; of the longest row where they lie end to end.", "short",
                  "ferry_batch_length")
    board.graph("Why batches close", "Sealed batches by the reason.", "ops", ("{{reason}}", rate("ferry_batches_total", "reason")), stacked=True)
    cells = f"sum(rate(ferry_batch_cells_sum{matchers('ferry_batch_cells', ['histogram'], [])}[$__rate_interval]))"
    padding = rate("ferry_batch_cells_padding_total", "cause")
    board.graph("Padding by cause", "Share of all cells that were computed for nobody.", "percentunit",
                ("{{cause}}", share(padding, f"on() group_left() {cells}")), stacked=True)
    board.graph("Batches", "Sealed per second.", "ops", ("{{model}}", rate("ferry_batches_total", "model")))
    board.graph("Rows per batch", "Mean and upper end.", "short", ("{{model}} mean", mean("ferry_batch_rows", "model")),
                ("{{model}} p99", quantile(0.99, "ferry_batch_rows", "model")))
    board.graph("Cells", "Launched, and those of them that callers sent.", "short", ("launched", cells), ("real", rate("ferry_batch_cells_real_total")))
    board.graph("Rows run once more", "The canary: `apart` is an alarm.", "ops", ("{{outcome}}", rate("ferry_canary_rows_total", "outcome")))

    board.row("Queue")
    board.graph("Rows waiting", "For a batch.", "short", ("{{model}}", now("ferry_queue_rows", "model")))
    board.graph("Queue delay", "Admitted to sealed, per request.", "s",
                *[(f"{{{{model}}}} p{at}", quantile(at / 100, "ferry_queue_delay_seconds", "model")) for at in (50, 99)])
    board.graph("What the scheduler decided", "Rows held back, requests given up, requests refused.", "ops",
                ("{{verdict}} {{model}}", rate("ferry_decisions_total", "verdict", "model")))
    board.graph("Cells waiting", "Rows times length.", "short", ("{{model}}", now("ferry_queue_cells", "model")))
    board.graph("Bytes waiting", "Payloads.", "bytes", ("{{model}}", now("ferry_queue_bytes", "model")))

    board.row("Latency")
    board.graph("In the server", "Received to answered, of requests with a result.", "s",
                *[(f"{{{{model}}}} {text}", quantile(at, "ferry_request_latency_seconds", "model"))
                  for at, text in ((0.5, "p50"), (0.99, "p99"), (0.999, "p99.9"))])
    board.graph("From the intended moment", "Of requests that say how late they were sent: what callers felt, what their senders added "
                "themselves, and what the server's own latency alone would claim. The gap is coordinated omission.", "s",
                ("from intention p99", quantile(0.99, "ferry_intended_latency_seconds")),
                ("sender's lag p99", quantile(0.99, "ferry_send_lag_seconds")),
                ("in the server p99", quantile(0.99, "ferry_request_latency_seconds")))
    whole, queue = mean("ferry_request_latency_seconds", "model"), mean("ferry_queue_delay_seconds", "model")
    run = mean("ferry_service_time_seconds", "model")
    board.graph("By stage", "Means: waiting for a batch, the batch, and all else (reading, packing, waiting for the executor, answering).", "s",
                ("{{model}} queue", queue), ("{{model}} batch", run), ("{{model}} else", f"clamp_min({whole} - {queue} - {run}, 0)"), stacked=True)
    board.heatmap("In the server", "All of it.", "s", "ferry_request_latency_seconds")
    board.heatmap("Queue delay", "All of it.", "s", "ferry_queue_delay_seconds")
    board.graph("Requests that state their lateness", "Share of those answered.", "percentunit",
                ("share", share(per_second("ferry_send_lag_seconds"), per_second("ferry_request_latency_seconds"))), top=1)

    board.row("Outcomes")
    board.graph("Ended", "Accepted requests by outcome.", "reqps", ("{{code}}", rate("ferry_requests_finished_total", "code")), stacked=True)
    board.graph("Refused", "Never accepted, and why.", "reqps", ("{{code}}", rate("ferry_requests_refused_total", "code")), stacked=True)
    board.graph("Asked beside infer", "Describe, list, stats.", "reqps", ("{{operation}} {{code}}", rate("ferry_operations_total", "operation", "code")))
    board.graph("Goodbyes", "Connections told to go, by reason.", "ops", ("{{code}}", rate("ferry_goaways_total", "code")))
    board.graph("Late answers", "Results whose request had already ended.", "ops", ("shard {{shard}}", rate("ferry_late_answers_total", "shard")))
    if {"ferry_tenant_cells_total", "ferry_tenant_executor_seconds_total"} <= set(METRICS):
        board.row("Tenants")
        board.graph("Share of the cells", "Of batches, by whose rows they were.", "percentunit",
                    ("{{tenant}}", share(rate("ferry_tenant_cells_total", "tenant"), f"on() group_left() {rate('ferry_tenant_cells_total')}")),
                    stacked=True, top=1, width=12)
        board.graph("Executor time", "By whose rows they ran it for.", "s", ("{{tenant}}", rate("ferry_tenant_executor_seconds_total", "tenant")),
                    stacked=True, width=12)

    board.row("Policy")
    board.graph("Error of predicted batch times", "Mean, relative. Above 0.2 the scheduler decides by numbers that are not so.", "percentunit",
                ("{{model}}", now("ferry_cost_model_error_ratio", "model")))
    board.graph("Batches beyond their promise", "Time from sealing to the end that nine of ten batches keep, beside what was promised. Well above 1: other work "
                "shares the cores or the device, or the time depends on what is in a row.", "short",
                ("{{model}}", now("ferry_batch_overrun_ratio", "model")))
    board.graph("Generation of the policy", "Rises with each change.", "short", ("{{model}}", now("ferry_policy_generation", "model")))
    if "ferry_shadow_error_ratio" in METRICS:
        board.graph("Error of shadows", "How far the last prediction of a policy that was then put in force was off.", "percentunit",
                    ("{{model}} {{what}}", now("ferry_shadow_error_ratio", "model", "what")))
    board.graph("Captures", "That ended, by how.", "short", ("{{end}}", rise("ferry_captures_total", "end")))

    board.row("Who comes")
    board.graph("Credentials and handshakes", "Hellos whose credentials were looked at, TLS handshakes that ended.", "ops",
                ("credentials {{outcome}}", rate("ferry_authentications_total", "outcome")),
                ("handshakes {{outcome}}", rate("ferry_tls_handshakes_total", "outcome")))
    board.graph("Turned away", "Connections that were closed before they said hello, and addresses that were kept out.", "ops",
                ("{{why}}", rate("ferry_turned_away_total", "why")), ("banned", rate("ferry_banned_connections_total")),
                ("pauses of accept", rate("ferry_accept_pauses_total")))
    board.graph("Waste and windows", "Points for acts that brought nobody an answer; credit frames near the budget of payloads.", "short",
                ("points", rate("ferry_wasted_points_total")), ("windows changed", rate("ferry_window_changes_total")))
    board.graph("Files read again", "Certificates and tenants; a failure leaves the old ones in force.", "short",
                ("{{what}} {{outcome}}", rise("ferry_reloads_total", "what", "outcome")))

    board.row("Process")
    board.graph("Memory", "Resident.", "bytes", ("{{instance}}", now("ferry_process_resident_bytes", "instance")))
    board.graph("What could leak", "What exists now: flat under a steady load, or something is kept.", "short",
                ("{{kind}}", now("ferry_live_objects", "kind")))
    board.graph("Bytes held", "Unfinished frames, unsent answers, buffers of devices.", "bytes", ("{{kind}}", now("ferry_live_bytes", "kind")))
    board.graph("Connections", "Opened and closed.", "ops", ("opened", rate("ferry_connections_opened_total")), ("closed", rate("ferry_connections_closed_total")),
                ("closed because they do not read", rate("ferry_slow_readers_total")))
    board.graph("Data port", "Bytes.", "Bps", ("read", rate("ferry_read_bytes_total")), ("written", rate("ferry_written_bytes_total")))
    board.graph("Threads and open files", "", "short", ("threads", now("ferry_process_threads")), ("open files", now("ferry_process_open_fds")))
    board.graph("Should stay 0", "Shards that had to be nudged, books that do not add up, connections that could not be taken.", "short",
                ("stalls", rise("ferry_shard_stalls_total")), ("drift", rise("ferry_audits_total", outcome="drift")),
                ("{{what}}", rise("ferry_alarms_total", "what")), ("late results", rise("ferry_executor_late_results_total")),
                ("accept errors", rise("ferry_accept_errors_total")))
    board.graph("Turns of shards", "How long a task has its shard to itself: 999 of 1000 turns.", "s",
                ("{{task}}", quantile(0.999, "ferry_shard_turn_seconds", "task")))
    board.graph("OpenTelemetry", "Messages to the receiver, and what was lost on the way.", "short",
                ("{{signal}} {{outcome}}", rise("ferry_otel_exports_total", "signal", "outcome")),
                ("lost {{what}}", rise("ferry_otel_dropped_total", "what")))
    board.graph("Missing in the log", "Lines that nobody took in time, or that could not be written.", "short",
                ("{{why}}", rise("ferry_log_lines_dropped_total", "why")))

    board.row("Devices")
    board.graph("Memory", "Of executors that run on a device.", "bytes", ("{{executor}} device", now("ferry_device_bytes", "executor")),
                ("{{executor}} pinned", now("ferry_pinned_bytes", "executor")))
    board.graph("Executors that waited", "For a slot, or for memory of answers.", "ops", ("{{executor}} {{for}}", rate("ferry_device_waits_total", "executor", "for")))
    board.graph("Pieces", "Parts of batches that memory was not made for.", "ops", ("{{executor}}", rate("ferry_device_pieces_total", "executor")))

    for number, panel in enumerate(board.panels, 1):
        panel["id"] = number
    variable = lambda name, metric: {
        "type": "query", "name": name, "label": name, "datasource": SOURCE, "query": {"query": f"label_values({metric}, {name})", "refId": name},
        "refresh": 2, "includeAll": True, "allValue": ".*", "multi": True, "current": {"text": "All", "value": "$__all"}, "sort": 1,
    }
    use("ferry_build_info", ["gauge"], [])
    use("ferry_model_info", ["gauge"], ["model"])
    source = {"type": "datasource", "name": "datasource", "label": "datasource", "query": "prometheus"}
    return {
        "uid": "ferry", "title": "ferry", "tags": ["ferry"], "schemaVersion": 39, "timezone": "browser", "editable": True,
        "graphTooltip": 1, "refresh": "10s", "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [source, variable("instance", "ferry_build_info"), variable("model", "ferry_model_info")]},
        "panels": board.panels,
    }


def alerts():
    """Rules for Prometheus: what is never right, and what seldom is."""
    plain = lambda text: text.replace('instance=~"$instance",', "").replace('instance=~"$instance"', "").replace(
        'model=~"$model",', "").replace(',model=~"$model"', "").replace('model=~"$model"', "").replace("{}", "").replace("$__rate_interval", "5m")
    rules = [
        ("FerryRowsAnsweredApart", "critical", "0m", rise("ferry_canary_rows_total", "instance", "model", outcome="apart") + " > 0",
         "A row was answered otherwise in its batch than alone: one caller's data may be in another's answer."),
        ("FerryBooksDrift", "critical", "0m", rise("ferry_audits_total", "instance", outcome="drift") + " > 0",
         "The scheduler's books do not add up: requests may be refused for ever, or none any more."),
        ("FerryReloadFailed", "warning", "0m", rise("ferry_reloads_total", "instance", "what", outcome="failed") + " > 0",
         "Certificates or tenants were changed and cannot be used: the old ones are still in force."),
        ("FerryAlarms", "critical", "0m", rise("ferry_alarms_total", "instance", "what") + " > 0",
         "Something that cannot be: a model gave other outputs than its contract says, or a batch came back twice."),
        ("FerryExecutorHangs", "critical", "0m", rise("ferry_executor_hangs_total", "instance", "executor") + " > 0",
         "A batch did not come back; another thread took the executor's seat."),
        ("FerryExecutorPanics", "critical", "0m", rise("ferry_executor_panics_total", "instance", "executor") + " > 0", "A model panicked."),
        ("FerryShardStalls", "warning", "0m", rise("ferry_shard_stalls_total", "instance") + " > 0", "A shard with work did not move until it was nudged."),
        ("FerryRefusals", "warning", "5m",
         share(rate("ferry_requests_refused_total", "instance"), f"({rate('ferry_requests_accepted_total', 'instance')} + {rate('ferry_requests_refused_total', 'instance')})") + " > 0.05",
         "More than a twentieth of the requests is refused."),
        ("FerryUnanswered", "warning", "5m",
         "1 - " + share(rate("ferry_requests_finished_total", "instance", "model", code="ok"), rate("ferry_requests_finished_total", "instance", "model")) + " > 0.01",
         "More than a hundredth of the accepted requests ends without a result."),
        ("FerrySaturated", "warning", "10m",
         share(f"avg by (instance) (rate(ferry_executor_busy_seconds_total{matchers('ferry_executor_busy_seconds_total', ['counter'], ['instance'])}[$__rate_interval]))", "1") + " > 0.95 and "
         + now("ferry_queue_rows", "instance") + " > 0", "The executors have no time left, and rows wait."),
        ("FerrySendersLag", "warning", "5m", quantile(0.99, "ferry_send_lag_seconds", "instance") + " > 0.01",
         "Callers send later than they mean to: what they measure is not this server alone."),
        ("FerryPredictionsWrong", "warning", "15m", now("ferry_cost_model_error_ratio", "instance", "model") + " > 0.5",
         "Batches do not take what the scheduler expects."),
        ("FerryBatchesOverrun", "warning", "15m", now("ferry_batch_overrun_ratio", "instance", "model") + " > 3",
         "Batches take far longer than promised: does something else use the cores or the device?"),
        ("FerryTelemetryLost", "warning", "5m", rise("ferry_otel_dropped_total", "instance") + " > 0", "Traces are lost on the way to their receiver."),
    ]
    out = ["# Written by tools/grafana/generate.py from the table in src/telemetry/mod.rs: change it there.", "groups:", "  - name: ferry", "    rules:"]
    for name, severity, wait, expr, says in rules:
        out += [f"      - alert: {name}", f"        expr: {json.dumps(plain(expr))}", f"        for: {wait}",
                "        labels:", f"          severity: {severity}", "        annotations:", f"          summary: {json.dumps(says)}"]
    return "\n".join(out) + "\n"


written = {"ferry.json": json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n", "alerts.yml": alerts()}
if "--check" in sys.argv[1:]:
    for name, text in written.items():
        path = HERE / name
        if not path.exists() or path.read_text() != text:
            sys.exit(f"tools/grafana/{name} is not what the table gives: run python3 tools/grafana/generate.py")
else:
    for name, text in written.items():
        (HERE / name).write_text(text)
