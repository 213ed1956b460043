// The panels that are tables: models, where executor time goes, what waits, the last batches, tenants.

import { count, el, fill, percent, say, time, words } from "./format.js";
import { between } from "./history.js";

const one = (selector) => document.querySelector(selector);
const note = (panel, text) => say(one(`${panel} .note`), text);

/** Why a batch was closed. */
const REASONS = {
  full: "no further row fits",
  idle: "an executor was idle, and nothing said to hold",
  queue_delay: "the oldest row has waited its promised time",
  deadline: "a deadline leaves no more time to wait",
  drain: "the server is draining",
  composed: "a test asked for exactly these rows",
  urgent: "a deadline in danger, or a row that waited too long, went first",
  economic: "the next row is not expected soon enough to pay for the wait",
};

/** Parts of executor time, in the order of the server's own list: label, kind (also its pattern), meaning. */
const PARTS = {
  useful: ["Useful work", "useful", "cells that callers sent"],
  padding_longest_row: ["Padding to the longest row", "padding", "rows shorter than the longest of their batch"],
  padding_bucket: ["Padding to the bucket", "padding", "from the longest row to its bucket's length"],
  padding_rounding: ["Rounding", "padding", "rows and cells added for the shape alone"],
  overhead_launch: ["Launch", "overhead", "a batch's fixed cost"],
  overhead_copy: ["Copies", "overhead", "uploads and read-backs that nothing overlaps"],
  idle_hold: ["Idle: rows were held", "waiting", "rows waited, and the policy held them for others"],
  idle_packing: ["Idle: packing", "waiting", "the next batch was being packed"],
  idle_mailbox: ["Idle: hand-over", "waiting", "the batch was on its way between threads"],
  idle_copy: ["Idle: copy", "waiting", "the batch was being uploaded"],
  idle_scatter: ["Idle: answers", "waiting", "answers were being handed out"],
  idle_empty: ["Idle: nothing waited", "empty", "no request waited: more load would fit"],
  busy: ["Busy", "useful", "running batches, their padding included"],
  idle: ["Idle", "empty", "running no batch"],
};

const KINDS = { useful: "work", padding: "padding", overhead: "overhead", waiting: "idle while work waited", empty: "idle" };

/** The table of models. Rows are chosen by their button. */
export class ModelsTable {
  constructor(models, choose) {
    this.body = one("#models tbody");
    this.body.replaceChildren(
      ...models.map(({ name, version }, place) => {
        const button = el("button", { type: "button", click: () => choose(place) }, name);
        button.title = `${name}, version ${version}`;
        const row = el("tr", {}, el("th", { scope: "row" }, button));
        row.append(...Array.from({ length: 12 }, () => el("td", { class: "n" })));
        row.addEventListener("click", () => choose(place));
        return row;
      }),
    );
  }

  choose(place) {
    [...this.body.rows].forEach((row, at) => {
      row.classList.toggle("is-chosen", at === place);
      row.querySelector("button").setAttribute("aria-pressed", String(at === place));
    });
  }

  show(window, models, findings, bounds) {
    [...this.body.rows].forEach((row, place) => {
      const now = models[place];
      if (!now) return;
      const then = window && between(window.from, window.to, place, bounds);
      const rate = (total) => (then ? count(total / then.seconds) : "–");
      const texts = [
        rate(then?.ok),
        rate(then?.failed),
        rate(then?.rows),
        count(then?.rowsPerBatch),
        percent(then?.fill),
        percent(then?.padding),
        count(now.queue.rows),
        time(then?.queueP50),
        time(then?.queueP99),
        time(then?.runP99),
        String(now.generation || "–"),
        findings[place] === undefined ? "–" : findings[place] === 0 ? "none" : `▲ ${findings[place]}`,
      ];
      texts.forEach((text, at) => say(row.cells[at + 1], text));
      row.cells[2].classList.toggle("is-bad", (then?.failed ?? 0) > 0);
    });
  }
}

/** Where executor time went: each part begins where the one before ends. */
export function waterfall(window, executors) {
  const body = one("#waterfall tbody");
  if (!window) {
    note("#waterfall", "After the next second there is something to compare.");
    return fill(body, []);
  }
  let parts;
  const measured = window.to.waterfall && window.from.waterfall;
  if (measured) {
    const [before, after] = [window.from.waterfall.seconds, window.to.waterfall.seconds];
    // In the order of the table above; JSON has none.
    const known = Object.keys(PARTS).filter((part) => part in after);
    const names = [...known, ...Object.keys(after).filter((part) => !known.includes(part))];
    parts = names.map((part) => [part, Math.max(after[part] - (before[part] ?? 0), 0)]);
  } else {
    // An executor of the batcher's thread is idle when the batcher works: only threads of their own have an idle time.
    const own = executors.map((executor, at) => at).filter((at) => !executors[at].inline);
    const busy = own.reduce((all, at) => all + window.to.executors[at].busy_us - window.from.executors[at].busy_us, 0);
    const all = own.length * window.seconds;
    const share = Math.min(busy / 1e6, all);
    parts = all > 0 ? [["busy", share], ["idle", all - share]] : [];
  }
  const all = parts.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (all === 0) {
    note("#waterfall", "All models run on the batcher's thread: there is no executor whose time could be divided.");
    return fill(body, []);
  }
  const useful = parts.find(([part]) => part === "useful" || part === "busy")?.[1] ?? 0;
  note(
    "#waterfall",
    `${time(all)} of executor time in ${time(window.seconds)}, ${percent(useful / all)} of it ${measured ? "useful" : "busy"}` +
      (measured ? "." : ". This server tells busy from idle only."),
  );
  if (body.rows.length !== parts.length) {
    body.replaceChildren(
      ...parts.map(([part]) => {
        const [label, kind, meaning] = PARTS[part] ?? [words(part), "overhead", ""];
        const share = el("span", { class: `part ${kind}` });
        const row = el("tr", {}, el("th", { scope: "row" }, label), el("td", { class: "track" }, share), el("td", { class: "n" }));
        row.title = `${KINDS[kind]}: ${meaning}`;
        return row;
      }),
    );
  }
  let before = 0;
  parts.forEach(([, seconds], at) => {
    const bar = body.rows[at].querySelector(".part");
    bar.style.left = `${(before / all) * 100}%`;
    bar.style.width = `${(seconds / all) * 100}%`;
    bar.hidden = seconds === 0; // else it is a pixel wide at least
    say(body.rows[at].cells[2], percent(seconds / all));
    before += seconds;
  });
}

/** What waits for one model. `knobs`: its policy, where it is known. */
export function lanes(batcher, place, knobs, queue) {
  const body = one("#lanes tbody");
  if (batcher.error) {
    note("#lanes", `Not known now: ${batcher.error}.`);
    return fill(body, []);
  }
  const mine = batcher.lanes.filter(([model]) => model === place);
  const fits = (length) => {
    if (!knobs) return null;
    const rows = Number(knobs.rows_max);
    return Math.max(1, Math.min(rows, Math.floor(Number(knobs.cells_max) / Math.max(length, 1))));
  };
  note(
    "#lanes",
    mine.length
      ? `${count(queue.rows)} rows and ${count(queue.cells)} cells wait.`
      : "Nothing waits at this instant: batches go as soon as their rows come.",
  );
  fill(
    body,
    mine.map(([, length, rows, tickets, oldest]) => {
      const most = fits(length);
      return [
        { text: count(length), kind: "n" },
        {
          text: most ? `${count(rows)} of ${count(most)} rows${rows > most ? `, ${count(rows / most)} batches` : ""}` : `${count(rows)} rows`,
          bar: most ? rows / most : 0,
          kind: "metered",
        },
        { text: count(tickets), kind: "n" },
        { text: time(oldest / 1e6), kind: "n" },
      ];
    }),
  );
}

/** Batches of a snapshot as objects, by the fields that the server names. */
export function batchesOf(batcher, fields) {
  return (batcher.batches ?? []).map((values) => Object.fromEntries(fields.map((field, at) => [field, values[at]])));
}

/** The last batches of one model, newest first, and why they were closed in the window. */
export function batches(recent, then) {
  const body = one("#batches tbody");
  const all = Object.values(then?.reasons ?? {}).reduce((sum, total) => sum + total, 0);
  const closed = Object.entries(then?.reasons ?? {}).sort(([, a], [, b]) => b - a);
  note(
    "#batches",
    all
      ? `${count(all / then.seconds)} batches/s, closed: ${closed.map(([reason, total]) => `${words(reason)} ${Math.round((total / all) * 100)} %`).join(", ")}.`
      : "No batch in the window. Send requests: ferry load --addr … --model … --rate 50",
  );
  fill(
    body,
    recent
      .slice(-40)
      .reverse()
      .map((batch) => [
        { text: time(batch.age_us / 1e6), kind: "n", title: `batch ${batch.batch}` },
        { text: words(batch.reason), title: REASONS[batch.reason] ?? "" },
        {
          text: `${count(batch.rows)} of ${count(batch.rows_possible)}`,
          bar: batch.rows / Math.max(batch.rows_possible, 1),
          kind: "metered",
        },
        { text: count(batch.padded_len), kind: "n" },
        { text: percent(batch.padding_ratio), kind: "n" },
        { text: batch.ran === null ? `≈ ${time(batch.predicted_us / 1e6)}` : time(batch.ran), kind: "n" },
        { text: String(batch.executor), kind: "n", title: `policy generation ${batch.generation}; ${batch.waiting_rows} rows waited before` },
      ]),
  );
}

/** Tenants as name → cumulative numbers, in whatever form the server tells them; null where it does not. */
function tenantsOf(told) {
  if (!told) return null;
  const list = Array.isArray(told) ? told : Object.entries(told).map(([tenant, numbers]) => ({ tenant, ...numbers }));
  return new Map(list.map((entry) => [String(entry.tenant ?? entry.name ?? entry.id), entry]));
}

/** Whose work was done in the window. */
export function tenants(window) {
  const [head, body] = [one("#tenants thead"), one("#tenants tbody")];
  const after = tenantsOf(window?.to.tenants);
  const before = tenantsOf(window?.from.tenants) ?? new Map();
  const clear = (text) => {
    note("#tenants", text);
    head.replaceChildren();
    fill(body, []);
  };
  if (!window) return clear("After the next second there is something to compare.");
  if (!after) return clear("This server does not count by tenant.");
  if (!after.size) return clear("No tenant yet: requests name theirs (ferry load --tenant 7).");
  const numbers = [...after.values()].flatMap((entry) => Object.keys(entry).filter((key) => typeof entry[key] === "number"));
  const told = [...new Set(numbers)].filter((key) => !["tenant", "id"].includes(key));
  const weigh = ["executor_seconds", "cells_real", "cells", "rows"].find((key) => told.includes(key)) ?? told[0];
  const columns = told.filter((key) => key !== weigh).sort((a, b) => b.includes("real") - a.includes("real")).slice(0, 2);
  const rows = [...after].map(([name, entry]) => {
    const done = Object.fromEntries([weigh, ...columns].map((key) => [key, entry[key] - (before.get(name)?.[key] ?? 0)]));
    return { name, done };
  });
  const all = rows.reduce((sum, { done }) => sum + done[weigh], 0);
  rows.sort((a, b) => b.done[weigh] - a.done[weigh]);
  note("#tenants", all ? `Shares of ${weigh === "executor_seconds" ? "executor time" : words(weigh)} in ${time(window.seconds)}.` : "Nothing was done for anybody in the window.");
  const titles = ["Tenant", "Share", ...columns.map((key) => `${words(key)}/s`)];
  if (head.textContent !== titles.join("")) {
    head.replaceChildren(el("tr", {}, ...titles.map((title, at) => el("th", { scope: "col", class: at > 1 ? "n" : "" }, title))));
  }
  fill(
    body,
    rows.slice(0, 64).map(({ name, done }) => [
      name,
      { text: percent(all ? done[weigh] / all : null), bar: all ? done[weigh] / all : 0, kind: "metered" },
      ...columns.map((key) => ({ text: count(done[key] / window.seconds), kind: "n" })),
    ]),
  );
}
