// The page: takes a snapshot each second from /v1/live and shows it. All panels of a model follow the one that is chosen.

import { ask } from "./ask.js";
import { bars, heatmap, lines, timeline } from "./charts.js";
import { count, el, say, span, time } from "./format.js";
import { History, between, seconds } from "./history.js";
import { ModelsTable, batches, batchesOf, lanes, tenants, waterfall } from "./panels.js";
import { Side, lengths } from "./policy.js";

const one = (selector) => document.querySelector(selector);
/** Seconds of the executors' timeline. */
const TIMELINE = 4;
/** Snapshots between two questions about the chosen model's findings and lengths, and about another model's findings. */
const [EVERY, EVERY_OTHER] = [5, 2];

/** What one `hello` began. What was seen before goes on if it was the same server. */
class Page {
  constructor(hello, before) {
    this.hello = hello;
    this.bounds = hello.bounds;
    this.history = before?.history ?? new History();
    this.findings = [];
    this.drawn = before?.drawn ?? new Map();
    this.count = 0;
    this.other = 0;
    say(one("#version"), hello.version);
    this.side = (Page.side ??= new Side(hello.endpoints));
    this.side.endpoints = hello.endpoints;
    this.table = new ModelsTable(hello.models, (place) => this.choose(place));
    const wanted = decodeURIComponent(location.hash.slice(1)) || Page.chosen;
    const place = hello.models.findIndex(({ name }) => name === wanted);
    if (hello.models.length) this.choose(Math.max(place, 0));
  }

  get model() {
    return this.hello.models[this.place].name;
  }

  choose(place) {
    if (this.place === place) return;
    this.place = place;
    Page.chosen = this.model;
    history.replaceState(null, "", `#${encodeURIComponent(this.model)}`);
    document.querySelectorAll(".chosen").forEach((element) => say(element, this.model));
    this.table.choose(place);
    this.asked = -EVERY;
    if (this.side.model === this.model) {
      this.side.refresh(); // the stream was lost and came back; edits stay
    } else {
      say(one("#tab-findings"), "Findings");
      charts().lengths([], []);
      this.side.choose(this.model);
    }
    if (this.snapshot) this.show();
  }

  take(snapshot) {
    this.snapshot = snapshot;
    this.count++;
    if (this.history.push(snapshot)) this.drawn.clear();
    this.collect();
    this.ask();
    if (!paused) this.show();
  }

  /** What was measured of the last batches, where the server keeps it: when each really ran. */
  async measure() {
    if (!this.hello.endpoints.includes("/v1/batches") || this.snapshot.batcher.error) return;
    const at = this.snapshot.at_unix_ms / 1000;
    const { batches } = await ask("/v1/batches?last=300").catch(() => ({ batches: [] }));
    for (const { batch, sealed_at_us, started_at_us, finished_at_us } of batches) {
      const drawn = this.drawn.get(batch);
      if (!drawn || typeof started_at_us !== "number" || typeof finished_at_us !== "number") continue;
      drawn.ran = (finished_at_us - started_at_us) / 1e6;
      drawn.start = drawn.sealed + (started_at_us - sealed_at_us) / 1e6;
    }
  }

  /** Batches of some seconds, each once: a snapshot names the newest, also those that the one before named. */
  collect() {
    const { batcher, at_unix_ms } = this.snapshot;
    const now = at_unix_ms / 1000;
    const told = batchesOf(batcher, this.hello.batch_fields);
    const newest = Math.max(0, ...this.drawn.keys());
    this.missed = told.length && newest > 0 ? Math.max(0, told[0].batch - newest - 1) : 0;
    for (const batch of told) {
      const sealed = now - batch.age_us / 1e6;
      if (!this.drawn.has(batch.batch)) this.drawn.set(batch.batch, { ...batch, sealed, start: sealed, ran: null });
    }
    for (const [number, batch] of this.drawn) {
      if (batch.sealed > now - 90 && this.drawn.size <= 4000) break; // in order of their numbers
      this.drawn.delete(number);
    }
  }

  /** Asks for what is not in snapshots, seldom, and only while the batcher answers. */
  async ask() {
    const { snapshot, side, model, count: now } = this;
    side.follow(snapshot.models[this.place]?.generation ?? 0);
    if (snapshot.batcher.error) return;
    if (now - this.asked >= EVERY) {
      this.asked = now;
      const place = this.place;
      side.look(model).then((findings) => (this.findings[place] = findings ?? this.findings[place]));
      lengths(model).then(
        ([labels, values]) => model === this.model && charts().lengths(labels, values),
        () => {}, // the next time
      );
    } else if (now % EVERY_OTHER === 0) {
      this.measure();
    }
    if (now % EVERY_OTHER === 1 && this.hello.models.length > 1) {
      this.other = (this.other + 1) % this.hello.models.length;
      const place = this.other;
      if (place === this.place) return;
      const findings = await side.findings(this.hello.models[place].name);
      this.findings[place] = findings ?? this.findings[place];
    }
  }

  show() {
    const { snapshot, history, bounds, place } = this;
    const window = history.window(Number(one("#window").value));
    const now = snapshot.models[place];
    this.head(window);
    this.table.show(window, snapshot.models, this.findings, bounds);
    waterfall(window, snapshot.stats.executors);
    this.executors(history.window(TIMELINE));
    if (!now) return;
    lanes(snapshot.batcher, place, this.side.knobs, now.queue);
    const then = window && between(window.from, window.to, place, bounds);
    const recent = [...this.drawn.values()].filter(({ model }) => model === place);
    const at = snapshot.at_unix_ms / 1000;
    batches(recent.map((batch) => ({ ...batch, age_us: (at - batch.sealed) * 1e6 })), then);
    tenants(window);
    const steps = seconds(history.entries, place, bounds).filter((step) => step.at > at - 125);
    const changes = steps.filter(({ generation }) => generation !== null);
    const times = steps.map((step) => step.at);
    const column = (of) => steps.map(of);
    charts().rates(
      [times, column(({ step }) => step.rowsPerBatch), column(({ step }) => step.ok / step.seconds)],
      changes,
    );
    charts().percentiles(
      [times, ...["queueP50", "queueP99", "runP50", "runP99"].map((key) => column(({ wide }) => wide[key]))],
      changes,
    );
    const heat = (key, p50, p99) =>
      steps.map(({ at, step, wide }) => ({ at, step, counts: step[key], p50: wide[p50], p99: wide[p99] }));
    charts().queue(heat("queue", "queueP50", "queueP99"), changes);
    charts().run(heat("run", "runP50", "runP99"), changes);
    const sizes = then?.sizes ?? [];
    const most = sizes.findLastIndex((total) => total > 0);
    const label = (at) => {
      const high = bounds.count[at] ?? Infinity;
      const low = at === 0 ? 1 : bounds.count[at - 1] + 1;
      return low === high ? String(high) : high === Infinity ? `${low}+` : `${low}–${high}`;
    };
    charts().sizes(sizes.slice(0, most + 1).map((_, at) => label(at)), sizes.slice(0, most + 1));
  }

  head(window) {
    const { snapshot } = this;
    const state = one("#state");
    say(state, snapshot.not_ready ?? snapshot.state);
    state.dataset.state = snapshot.not_ready ? "not-ready" : snapshot.state;
    const all = (entry) => entry.models.reduce((sum, { finished }) => sum + (finished.ok ?? 0), 0);
    const rate = window ? (all(window.to) - all(window.from)) / window.seconds : null;
    const totals = [
      ["ok/s", count(rate)],
      ["in flight", count(snapshot.stats.in_flight)],
      ["connections", count(snapshot.connections)],
      ["up", span(snapshot.stats.uptime_us / 1e6)],
    ];
    const list = one("#totals");
    if (!list.children.length) list.append(...totals.map(([name]) => el("div", {}, el("dt", {}, name), el("dd"))));
    totals.forEach(([, value], at) => say(list.children[at].querySelector("dd"), value));
  }

  executors(window) {
    const { snapshot } = this;
    const until = snapshot.at_unix_ms / 1000;
    const drawn = [...this.drawn.values()];
    const rows = snapshot.stats.executors.map((executor, at) => {
      const busy = window ? (window.to.executors[at].busy_us - window.from.executors[at].busy_us) / 1e6 / window.seconds : null;
      return {
        label: `${at}${executor.inline ? " batcher" : ""}`,
        detail: busy === null ? "–" : `${(Math.min(busy, 1) * 100).toFixed(0)} % busy`,
        batches: drawn
          .filter((batch) => batch.executor === at && batch.start > until - TIMELINE - 60)
          .map(({ start, ran, predicted_us, model, rows }) => ({ start, time: ran ?? predicted_us / 1e6, model, rows })),
      };
    });
    charts().executors(rows, { span: TIMELINE, until });
    const told = (snapshot.batcher.batches ?? []).length;
    say(
      one("#executors .note"),
      snapshot.batcher.error
        ? `Batches are not known now: ${snapshot.batcher.error}.`
        : this.missed
          ? `The newest ${told} batches of each second; ${count(this.missed)} more went in the last.`
          : this.hello.endpoints.includes("/v1/batches")
            ? "Each batch while it ran; the newest as long as expected."
            : "Each batch from its seal on, as long as the cost model expected it to take.",
    );
    const busy = rows.map(({ label, detail }) => `executor ${label}: ${detail}`).join(", ");
    one("#executors canvas").setAttribute("aria-label", `Batches by executor. ${busy}`);
  }
}

let made = null;
/** The charts, made when the first `hello` has said the bounds. */
function charts() {
  if (made) return made;
  const { bounds } = page ?? opening;
  const name = (place) => (page ?? opening).hello.models[place]?.name ?? "other";
  /** Of a logarithmic axis, the decades. */
  const decades = (_, splits) => splits.map((value) => (value > 0 && Number.isInteger(Math.round(Math.log10(value) * 1e6) / 1e6) ? value : null));
  const tick = (_, splits) => splits.map((value) => (value === null ? "" : time(value)));
  const every = (_, splits) => splits.map((value) => count(value));
  const stage = (label, color, dash) => ({ label, color, dash, scale: "s", text: time });
  made = {
    rates: lines(one("#rates"), {
      series: [
        { label: "rows/batch", color: "--c0", dash: false, scale: "rows", text: count },
        { label: "ok requests/s", color: "--c1", dash: true, scale: "rate", text: count },
      ],
      scales: {
        rows: { range: (_, low, high) => [0, Math.max(high ?? 0, 1) * 1.1] },
        rate: { range: (_, low, high) => [0, Math.max(high ?? 0, 1) * 1.1] },
      },
      axes: [
        { scale: "rows", size: 40, values: every },
        { scale: "rate", side: 1, size: 46, values: every, grid: { show: false } },
      ],
    }),
    percentiles: lines(one("#percentiles"), {
      series: [
        stage("queue p50", "--c0", false),
        stage("p99", "--c0", true),
        stage("run p50", "--c1", false),
        stage("p99", "--c1", true),
      ],
      scales: {
        s: {
          distr: 3,
          range: (_, low, high) => [10 ** Math.floor(Math.log10(low || 1e-5)), 10 ** Math.ceil(Math.log10(high || 1e-3) + 1e-9)],
        },
      },
      axes: [{ scale: "s", size: 52, values: tick, filter: decades, grid: { filter: decades }, ticks: { filter: decades } }],
    }),
    queue: heatmap(one("#queue-heat"), { what: "requests", bounds: bounds.seconds }),
    run: heatmap(one("#run-heat"), { what: "batches", bounds: bounds.seconds }),
    sizes: bars(one("#sizes"), { unit: "rows", empty: "No batch in the window." }),
    lengths: bars(one("#lengths"), { unit: "cells at most", empty: "No row has been admitted yet." }),
    executors: timeline(one("#executors .timeline"), name),
  };
  return made;
}

let page = null;
let opening = null;
let paused = false;

function connect() {
  const stream = one("#stream");
  const source = new EventSource("/v1/live");
  source.addEventListener("hello", (event) => {
    const hello = JSON.parse(event.data);
    opening = { hello, bounds: hello.bounds };
    page = new Page(hello, page);
    say(stream, "live");
    stream.dataset.state = "live";
  });
  source.addEventListener("snapshot", (event) => page?.take(JSON.parse(event.data)));
  source.addEventListener("error", () => {
    stream.dataset.state = "lost";
    say(stream, "no connection; trying again");
    if (source.readyState !== EventSource.CLOSED) return; // it tries by itself
    say(stream, "refused, perhaps too many viewers; trying again");
    source.close();
    setTimeout(connect, 5000);
  });
}

one("#pause").addEventListener("click", (event) => {
  paused = !paused;
  event.target.setAttribute("aria-pressed", String(paused));
  say(event.target, paused ? "Go on" : "Pause");
  if (!paused && page?.snapshot) page.show();
});

const themeButton = one("#theme");
const nameTheme = () => say(themeButton, `Theme: ${window.ferryTheme.get()}`);
themeButton.addEventListener("click", () => {
  window.ferryTheme.next();
  nameTheme();
  if (page?.snapshot) page.show();
});
nameTheme();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => page?.snapshot && page.show());
one("#window").addEventListener("change", () => page?.snapshot && page.show());

connect();
