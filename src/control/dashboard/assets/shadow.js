// What other settings would have done (shadow schedulers), and what they do for a while (trials). Both only where the server has them.

import { ask, path } from "./ask.js";
import { byKey, clock, el, percent, say, words } from "./format.js";

const one = (selector) => document.querySelector(selector);
/** How long a trial from the form lasts. */
const TRIAL_SECONDS = 60;

const COLUMNS = [
  ["On time", "on_time"],
  ["Rows", "batch_rows"],
  ["Fill", "fill"],
  ["Padding", "waste"],
  ["p50", "queue_and_run_us p50"],
  ["p99", "queue_and_run_us p99"],
];

/** An object's plain values, by their path. */
function flatten(value, before = "") {
  const all = {};
  for (const [key, inner] of Object.entries(value ?? {})) {
    const name = before ? `${before} ${key}` : key;
    if (inner !== null && typeof inner === "object") Object.assign(all, flatten(inner, name));
    else all[name] = inner;
  }
  return all;
}

const settingOf = (set) => Object.entries(set ?? {}).map(([knob, value]) => `${knob}=${value}`).join(" ");

/** Lines of `knob=value knob=value` as the server takes them. */
function settingsOf(text) {
  const lines = text.split("\n").map((line) => line.trim()).filter(Boolean);
  return lines.map((line) =>
    Object.fromEntries(
      line.split(/\s+/).map((pair) => {
        const [knob, ...value] = pair.split("=");
        if (!knob || !value.length) throw new Error(`expected knob=value, got ${pair}`);
        return [knob, value.join("=")];
      }),
    ),
  );
}

/** Settings that see the same requests in virtual time. */
export class Shadow {
  constructor() {
    this.table = el("div", { class: "scroll" });
    this.text = el("textarea", { id: "settings", rows: 3, spellcheck: false, placeholder: "rows_max=16\npolicy=window queue_delay_max_us=5000" });
    this.outcome = el("p", { role: "status", class: "note" });
    this.form = el(
      "form",
      { class: "beside", submit: (event) => (event.preventDefault(), this.set()) },
      el("label", { htmlFor: "settings" }, "Run beside this policy, a setting in each line:"),
      this.text,
      el("button", { type: "submit" }, "Run beside"),
      this.outcome,
    );
  }

  choose(model) {
    this.model = model;
    this.filled = false;
    this.text.value = "";
    say(this.outcome, "");
    this.table.replaceChildren();
  }

  async refresh(model, isThere) {
    const panel = one("#panel-shadow");
    if (!isThere) {
      panel.replaceChildren(
        el("p", { class: "note" }, "This server has no shadow schedulers. ferry replay TRACE --set … says what other settings would have done with a capture."),
      );
      return;
    }
    if (!this.form.isConnected) panel.replaceChildren(this.table, this.form);
    try {
      const told = await ask(path(model, "shadow"));
      if (model === this.model) this.show(told);
    } catch (error) {
      if (model === this.model) this.table.replaceChildren(el("p", { class: "note" }, `Not known now: ${error.message}.`));
    }
  }

  async set() {
    const model = this.model;
    try {
      const settings = settingsOf(this.text.value);
      const told = await ask(path(model, "shadow"), { method: "PUT", body: JSON.stringify({ settings }) });
      if (model !== this.model) return;
      say(this.outcome, settings.length ? `${settings.length} running. Figures come with the next stretch of traffic.` : "None runs any more.");
      this.show(told);
    } catch (error) {
      if (model === this.model) say(this.outcome, `Not set: ${error.message}`);
    }
  }

  /** A setting's name above its figures; all that is known of it is in its tip. */
  group(name, figures) {
    const all = Object.entries(figures).map(([key, value]) => `${words(key.replace(/_us\b/, ""))} ${byKey(key, value)}`);
    return el(
      "tbody",
      { title: all.join("\n") },
      el("tr", {}, el("th", { scope: "rowgroup", colSpan: COLUMNS.length }, name)),
      el("tr", {}, ...COLUMNS.map(([, key]) => el("td", { class: "n" }, figures.error && key === "on_time" ? figures.error : byKey(key, figures[key])))),
    );
  }

  show(told) {
    if (!this.filled) {
      this.filled = true;
      this.text.value = (told.settings ?? []).map(settingOf).join("\n");
    }
    const columns = [
      ["really", told.real],
      ["simulated as is", told.simulated_as_is],
      ...(told.shadows ?? []).map(({ set, figures, error }) => [settingOf(set), figures ?? (error ? { error } : null)]),
    ].filter(([, figures]) => figures);
    if (!columns.length) {
      const waits = (told.settings ?? []).length;
      this.table.replaceChildren(
        el("p", { class: "note" }, told.trouble ?? (waits ? "Running; no figures yet." : "No setting runs beside this one: write one below, and see what it would have done.")),
      );
      return;
    }
    if ((told.shadows ?? []).length) say(this.outcome, "");
    const note = told.window ? `Of the last ${Math.round(told.window.seconds)} s.` : "";
    const off = Object.entries(told.last_switch?.errors ?? {}).map(([what, error]) => `${words(what)} ${percent(error)}`);
    this.table.replaceChildren(
      el("p", { class: "note" }, `What other settings would have done with the requests that came. ${note}`),
      el(
        "table",
        { class: "beside-table" },
        el("thead", {}, el("tr", {}, ...COLUMNS.map(([title]) => el("th", { scope: "col", class: "n" }, title)))),
        ...columns.map(([name, figures]) => this.group(name, flatten(figures))),
      ),
      off.length ? el("p", { class: "note" }, `When ${settingOf(told.last_switch.set)} was put in force, its prediction was off by: ${off.join(", ")}.`) : "",
    );
  }
}

/** Knobs that are in force for a while, in turns with those that serve, and undone by themselves. */
export class Trial {
  /** `pending` gives the changes in the form, `tell` says what became of them. */
  constructor(pending, tell) {
    this.pending = pending;
    this.tell = tell;
    this.button = one("#try");
    this.button.addEventListener("click", () => (this.running ? this.end() : this.start()));
    say(this.button, `Try ${TRIAL_SECONDS} s`);
  }

  choose(model) {
    this.model = model;
    this.running = false;
    say(one("#trial"), "");
  }

  mark(isThere, changes) {
    this.button.hidden = !isThere;
    this.button.disabled = !this.running && changes === 0;
    say(this.button, this.running ? "End the trial" : `Try ${TRIAL_SECONDS} s`);
  }

  async start() {
    const model = this.model;
    try {
      const body = JSON.stringify({ set: this.pending(), seconds: TRIAL_SECONDS });
      const { trial } = await ask(path(model, "trial"), { method: "PUT", body });
      if (model !== this.model) return;
      this.tell("", "");
      this.show(trial);
    } catch (error) {
      if (model === this.model) this.tell("error", error.message);
    }
  }

  async end() {
    const model = this.model;
    try {
      const { trial } = await ask(path(model, "trial"), { method: "DELETE" });
      if (model === this.model) this.show(trial);
    } catch (error) {
      if (model === this.model) this.tell("error", error.message);
    }
  }

  async refresh(model) {
    try {
      const { trial } = await ask(path(model, "trial"));
      if (model === this.model) this.show(trial);
    } catch {
      // the next time
    }
  }

  show(trial) {
    this.running = Boolean(trial) && !trial.ended;
    const text = !trial
      ? ""
      : trial.ended
        ? `Last trial, ${settingOf(trial.set)}: ${trial.ended.outcome}. ${trial.ended.message ?? ""}`
        : `Trial of ${settingOf(trial.set)} since ${clock(trial.started_at_unix_ms / 1000)}, for ${trial.seconds} s; in force now: ${trial.in_force ?? "–"}.`;
    say(one("#trial"), text);
    this.mark(true, Object.keys(this.pending()).length);
  }
}
