// The side panel: a model's knobs, who changed them, what the linter says of them, and what other settings would have done.

import { ask, path } from "./ask.js";
import { clock, el, percent, say, words } from "./format.js";
import { Shadow, Trial } from "./shadow.js";

const one = (selector) => document.querySelector(selector);

/** Words of a range such as "window, greedy_tokens, buckets or cost"; null where it is more than words. */
function choices(range) {
  const parts = range.split(/, | or /);
  return parts.length > 1 && parts.every((part) => /^[a-z_]+$/.test(part)) ? parts : null;
}

/** Tabs that arrow keys move between. */
function tabs() {
  const all = [...document.querySelectorAll("[role=tab]")];
  const show = (chosen, focus = true) => {
    for (const tab of all) {
      const is = tab === chosen;
      tab.setAttribute("aria-selected", String(is));
      tab.tabIndex = is ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !is;
    }
    if (focus) chosen.focus();
  };
  all.forEach((tab, at) => {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(all[(to + all.length) % all.length]);
    });
  });
  return (id) => show(document.getElementById(id), false);
}

export class Side {
  constructor(endpoints) {
    this.endpoints = endpoints;
    this.model = null;
    /** Values in force by knob; null until they are known. */
    this.knobs = null;
    this.generation = 0;
    this.form = one("#knobs");
    this.show = tabs();
    this.beside = new Shadow();
    this.trial = new Trial(
      () => Object.fromEntries(this.pending().map((field) => [field.name, field.value.trim()])),
      (kind, text) => this.tell(kind, text),
    );
    this.form.addEventListener("input", () => this.mark());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.apply();
    });
    this.form.addEventListener("reset", (event) => {
      event.preventDefault();
      for (const field of this.fields()) field.value = this.knobs[field.name];
      this.mark();
      this.tell("", "");
    });
  }

  /** The server has this of each model. */
  has(endpoint) {
    return this.endpoints.includes(`/v1/models/{model}/${endpoint}`);
  }

  /** What changes without a change of the policy. Returns the number of findings, where it is known. */
  look(model) {
    this.beside.refresh(model, this.has("shadow"));
    if (this.has("trial")) this.trial.refresh(model);
    return this.findings(model);
  }

  fields() {
    return [...this.form.querySelectorAll("[name]")];
  }

  /** Shows another model: all of it is asked anew. */
  choose(model) {
    this.model = model;
    this.knobs = null;
    this.generation = 0;
    this.tell("", "");
    one("#knobs .fields").replaceChildren(el("p", { class: "note" }, "Asking for the policy…"));
    this.mark();
    for (const panel of ["audit", "findings"]) one(`#panel-${panel}`).replaceChildren();
    this.beside.choose(model);
    this.trial.choose(model);
    say(one("#generation"), "");
    this.refresh();
  }

  /** The policy and its history, which change together. */
  async refresh() {
    const model = this.model;
    try {
      const [policy, history] = await Promise.all([ask(path(model, "policy")), ask(path(model, "policy/history"))]);
      if (model !== this.model) return;
      this.take(policy);
      this.audit(history.changes);
    } catch (error) {
      if (model !== this.model) return;
      this.generation = 0; // asked again with the next snapshot
      this.tell("error", error.message);
    }
  }

  /** A snapshot says which generation is in force; where it is not the shown one, the policy is asked for. */
  follow(generation) {
    if (this.knobs && generation > this.generation) this.refresh();
    else if (!this.knobs && this.generation === 0) this.refresh();
  }

  take(policy) {
    const others = this.knobs && policy.generation !== this.generation && this.pending().length > 0;
    const first = this.knobs === null;
    const before = this.knobs;
    this.generation = policy.generation;
    this.knobs = Object.fromEntries(policy.knobs.map(({ name, value }) => [name, value]));
    say(one("#generation"), `generation ${policy.generation}`);
    if (first) {
      one("#knobs .fields").replaceChildren(...policy.knobs.map((knob) => this.field(knob)));
      this.tell("", "");
    } else {
      // What somebody is typing stays; the rest follows the server.
      for (const field of this.fields()) if (field.value === before[field.name]) field.value = this.knobs[field.name];
    }
    this.mark();
    if (others) this.tell("note", `The policy changed meanwhile: generation ${policy.generation}. Your edits are kept.`);
  }

  field({ name, value, unit, range, meaning }) {
    const id = `knob-${name}`;
    const about = `${id}-about`;
    const words = choices(range);
    const input = words
      ? el("select", { id, name, "aria-describedby": about }, ...words.map((word) => el("option", { value: word }, word)))
      : el("input", { id, name, type: "text", spellcheck: false, "aria-describedby": about });
    input.value = value;
    return el(
      "div",
      { class: "knob" },
      el("label", { htmlFor: id }, name),
      el("span", { class: "value" }, input, el("span", { class: "unit" }, unit)),
      el("p", { id: about }, el("span", { class: "was" }), `${meaning}; ${range}`),
    );
  }

  pending() {
    if (!this.knobs) return [];
    return this.fields().filter((field) => field.value.trim() !== this.knobs[field.name]);
  }

  /** Marks what would change, in words too. */
  mark() {
    const pending = this.pending();
    for (const field of this.fields()) {
      const changed = pending.includes(field);
      const knob = field.closest(".knob");
      knob.classList.toggle("is-changed", changed);
      say(knob.querySelector(".was"), changed ? `now ${this.knobs[field.name]}. ` : "");
      if (!changed) field.removeAttribute("aria-invalid");
    }
    const [apply, discard] = [one("#apply"), one("#discard")];
    apply.disabled = discard.disabled = pending.length === 0;
    this.trial.mark(this.has("trial"), pending.length);
    say(apply, pending.length > 1 ? `Apply ${pending.length} changes` : "Apply");
  }

  tell(kind, text) {
    const outcome = one("#outcome");
    outcome.className = kind;
    say(outcome, kind === "error" ? `Not changed: ${text}` : text);
  }

  async apply() {
    const pending = this.pending();
    if (!pending.length) return;
    const model = this.model;
    const set = Object.fromEntries(pending.map((field) => [field.name, field.value.trim()]));
    for (const field of this.fields()) field.removeAttribute("aria-invalid");
    one("#apply").disabled = true;
    this.tell("", "Applying…");
    try {
      const changed = await ask(path(model, "policy"), {
        method: "PATCH",
        body: JSON.stringify({ set }),
      });
      if (model !== this.model) return;
      this.tell("done", `Generation ${changed.generation} is in force.`);
      for (const field of pending) this.knobs[field.name] = field.value.trim();
      await this.refresh();
    } catch (error) {
      if (model !== this.model) return;
      this.tell("error", error.message);
      // "rows_max: expected …" names the knob.
      const field = this.fields().find(({ name }) => error.message.startsWith(`${name}:`));
      field?.setAttribute("aria-invalid", "true");
      field?.focus();
      this.mark();
      field?.setAttribute("aria-invalid", "true");
    }
  }

  /** The changes so far, newest first; each can be put back into the form. */
  audit(changes) {
    const list = changes.toReversed().map(({ at_unix_ms, by, generation, changes, note, prediction }) => {
      const lines = changes.map(({ knob, from, to }) =>
        el("li", {}, el("b", {}, knob), ` ${from} `, el("span", { "aria-label": "to" }, "→"), ` ${to}`),
      );
      const back = el(
        "button",
        {
          type: "button",
          click: () => {
            for (const { knob, from } of changes) {
              const field = this.form.elements.namedItem(knob);
              if (field) field.value = from;
            }
            this.mark();
            this.show("tab-knobs");
            this.tell("note", "The values from before are in the form: apply them to put them in force.");
            one("#apply").focus();
          },
        },
        "Put back",
      );
      return el(
        "li",
        { class: "entry" },
        el("p", {}, el("b", {}, `Generation ${generation}`), ` at ${clock(at_unix_ms / 1000)} by ${by === "auto" ? "the scheduler" : by}`, back),
        el("ul", {}, ...lines),
        note ? el("p", { class: "note" }, note) : "",
        prediction
          ? el("p", { class: "note" }, `Predicted beforehand, off by: ${Object.entries(prediction.figures).map(([what, { error }]) => `${words(what)} ${percent(error)}`).join(", ")}.`)
          : "",
      );
    });
    one("#panel-audit").replaceChildren(
      list.length
        ? el("ul", { class: "entries" }, ...list)
        : el("p", { class: "note" }, "Nothing has been changed since the server started. Change a knob, and it is written down here, with a way back."),
    );
    say(one("#tab-audit"), list.length ? `Audit (${list.length})` : "Audit");
  }

  /** What the linter says. Returns how much it is. */
  async findings(model) {
    let told;
    try {
      told = await ask(path(model, "findings"));
    } catch (error) {
      if (model === this.model) one("#panel-findings").replaceChildren(el("p", { class: "note" }, `Not known now: ${error.message}.`));
      return undefined;
    }
    if (model === this.model) {
      const { attainable, closed_mostly: mostly, observed, findings } = told;
      const fact = (text) => el("p", { class: "note" }, text);
      one("#panel-findings").replaceChildren(
        attainable
          ? fact(
              `With what came in the last ${Math.round(observed.seconds)} s (${attainable.rows_per_second.toFixed(1)} rows/s), batches of ` +
                `${attainable.rows.toFixed(1)} of ${attainable.rows_possible.toFixed(1)} rows are attainable: ${(attainable.fill_ratio * 100).toFixed(0)} % fill.`,
            )
          : fact("Too little has come to say how full batches could be. Send requests, and look again in a few seconds."),
        ...(mostly ? [fact(`${(mostly.share * 100).toFixed(0)} % of batches were closed as ${words(mostly.reason)}.`)] : []),
        findings.length
          ? el(
              "ul",
              { class: "entries" },
              ...findings.map(({ code, message, knob }) =>
                el(
                  "li",
                  { class: "entry" },
                  el("p", {}, el("b", {}, `▲ ${words(code)}`), knob && this.knobs && knob in this.knobs ? this.toKnob(knob) : ""),
                  el("p", {}, message),
                ),
              ),
            )
          : fact("No knob contradicts another, or what comes."),
      );
      say(one("#tab-findings"), findings.length ? `Findings (${findings.length})` : "Findings");
    }
    return told.findings.length;
  }

  toKnob(knob) {
    const go = () => {
      this.show("tab-knobs");
      const field = this.form.elements.namedItem(knob);
      field.focus();
      field.scrollIntoView({ block: "center" });
    };
    return el("button", { type: "button", click: go }, `Go to ${knob}`);
  }
}

/** How long admitted rows were: labels and counts of at most 24 classes. */
export async function lengths(model) {
  const { bins } = await ask(path(model, "lengths"));
  const each = Math.max(1, Math.ceil(bins.length / 24));
  const [labels, values] = [[], []];
  for (let at = 0; at < bins.length; at += each) {
    const group = bins.slice(at, at + each);
    labels.push(String(group.at(-1).len_max));
    values.push(group.reduce((sum, { rows }) => sum + rows, 0));
  }
  return [labels, values];
}
