// Numbers as text, each with its unit, and the few helpers for elements. Always three significant digits, so that columns align.

const digits = (value) => (value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2);

/** A count or rate: 0, 3.25, 41.2, 812, 4.10 k, 1.25 M. */
export function count(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e9) return `${(value / 1e9).toFixed(digits(size / 1e9))} G`;
  if (size >= 1e6) return `${(value / 1e6).toFixed(digits(size / 1e6))} M`;
  if (size >= 9999.5) return `${(value / 1e3).toFixed(digits(size / 1e3))} k`;
  return Number.isInteger(value) ? String(value) : value.toFixed(digits(size));
}

/** Seconds as µs, ms or s. */
export function time(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const size = Math.abs(seconds);
  if (size === 0) return "0 µs";
  if (size < 0.9995e-3) return `${(seconds * 1e6).toFixed(digits(size * 1e6))} µs`;
  if (size < 0.9995) return `${(seconds * 1e3).toFixed(digits(size * 1e3))} ms`;
  return `${seconds.toFixed(digits(size))} s`;
}

/** A share of 1 in percent. */
export function percent(share) {
  return share === null || share === undefined || !Number.isFinite(share) ? "–" : `${(share * 100).toFixed(1)} %`;
}

/** How long something runs: 3 min 20 s, 4 h 5 min. */
export function span(seconds) {
  const whole = Math.floor(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

const two = (value) => String(value).padStart(2, "0");

/** Wall time of a moment in seconds since 1970. */
export function clock(seconds) {
  const at = new Date(seconds * 1000);
  return `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}

/** The value of a key such as `p99_us` or `padding_ratio`, by the unit that its name ends with. */
export function byKey(key, value) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  if (/_us\b/.test(key)) return time(value / 1e6);
  if (/_ms\b/.test(key)) return time(value / 1e3);
  if (/_(s|seconds)$/.test(key)) return time(value);
  if (/(ratio|share|waste|fill|on_time)$/.test(key)) return percent(value);
  return count(value);
}

/** Words of an identifier. */
export const words = (name) => name.replaceAll("_", " ");

/** An element with properties and children; properties that are functions are listeners. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (name === "class") made.className = value;
    else if (name in made && !name.startsWith("aria")) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Writes a text where it changed: what did not change is not selected away, nor read out again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Fills a table's body. A cell is a text, or {text, title, bar: 0…1, kind}; rows and cells are kept from one second to the next.
 */
export function fill(body, rows) {
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, at) => {
    const row = body.rows[at] ?? body.insertRow();
    cells.forEach((cell, place) => {
      const slot = row.cells[place] ?? row.insertCell();
      const { text, title = "", bar = null, kind = "" } = typeof cell === "object" ? cell : { text: cell };
      if (bar === null) {
        say(slot, text);
      } else {
        let meter = slot.querySelector(".meter");
        if (!meter) {
          slot.replaceChildren((meter = el("span", { class: "meter" }, el("span", { class: "meter-fill" }))), el("span"));
        }
        meter.firstChild.style.width = `${Math.min(Math.max(bar, 0), 1) * 100}%`;
        say(slot.lastChild, text);
      }
      if (slot.title !== title) slot.title = title;
      if (slot.className !== kind) slot.className = kind;
    });
  });
}
