// The charts over time and over sizes: uPlot's, in the page's colours, with one cursor for all that have a time axis.

import { clock, count, el, time } from "./format.js";

/** Seconds that a chart over time shows. */
const SHOWN = 120;
const HEIGHT = 148;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const ratio = () => window.devicePixelRatio || 1;
const font = () => `11px ${css("--font")}`;

function axis(options) {
  return {
    stroke: () => css("--muted"),
    font: font(),
    grid: { stroke: () => css("--grid"), width: 1 },
    ticks: { stroke: () => css("--grid"), width: 1, size: 4 },
    gap: 3,
    ...options,
    ...(options.grid && { grid: { stroke: () => css("--grid"), width: 1, ...options.grid } }),
    ...(options.ticks && { ticks: { stroke: () => css("--grid"), width: 1, size: 4, ...options.ticks } }),
  };
}

const timeAxis = () =>
  axis({ size: 22, space: 70, values: (_, splits) => splits.map((at) => clock(at)) });

/** Vertical lines where the policy changed, each with its generation. */
function marks(chart, changes) {
  const { ctx, bbox } = chart;
  ctx.save();
  ctx.strokeStyle = css("--text");
  ctx.fillStyle = css("--text");
  ctx.font = `${10 * ratio()}px ${css("--font")}`;
  ctx.textBaseline = "top";
  ctx.lineWidth = ratio();
  ctx.setLineDash([3 * ratio(), 3 * ratio()]);
  let free = -Infinity; // a trial changes often: labels that would cover another are left out
  for (const { at, generation } of changes) {
    const x = Math.round(chart.valToPos(at, "x", true));
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    const label = `gen ${generation}`;
    if (x < free) continue;
    const wide = ctx.measureText(label).width;
    free = x + wide + 8 * ratio();
    const fits = x + 3 * ratio() + wide < bbox.left + bbox.width;
    ctx.textAlign = fits ? "left" : "right";
    ctx.fillText(label, x + (fits ? 3 : -3) * ratio(), bbox.top + ratio());
  }
  ctx.restore();
}

/** A chart that fills its place, and is as wide as that. */
function mount(place, make) {
  const canvas = place.querySelector(".chart");
  let chart = null;
  new ResizeObserver(() => {
    const width = Math.floor(canvas.clientWidth);
    if (width < 50) return;
    if (chart === null) chart = make(width, canvas);
    else if (chart.width !== width) chart.setSize({ width, height: HEIGHT });
  }).observe(canvas);
  return () => chart;
}

const base = (width) => ({
  width,
  height: HEIGHT,
  legend: { show: false },
  padding: [6, null, 0, 0], // as wide as the last label on the right needs
});

const timed = () => ({
  x: { time: true, range: (_, low, high) => [(high ?? 0) - SHOWN, high ?? 0] },
});

const cursor = { sync: { key: "time" }, drag: { x: false, y: false }, points: { size: 5 } };

/** Lines over time. `series`: {label, color, dash, scale, text(value)}. */
export function lines(place, { series, axes, scales }) {
  let changes = [];
  const readout = place.querySelector(".readout");
  const keys = series.map(({ label, color, dash }) => {
    const value = el("b", {}, "–");
    const swatch = el("span", { class: `swatch ${dash ? "dashed" : ""}` });
    swatch.style.borderTopColor = `var(${color})`;
    readout.append(el("span", { class: "key" }, swatch, `${label} `, value));
    return value;
  });
  let rows = [];
  const show = (at) => keys.forEach((key, place) => {
    const values = rows[place + 1] ?? [];
    key.textContent = series[place].text(values[at ?? values.length - 1] ?? null);
  });
  const chart = mount(place, (width, canvas) =>
    new uPlot(
      {
        ...base(width),
        cursor,
        scales: { ...timed(), ...scales },
        axes: [timeAxis(), ...axes.map(axis)],
        series: [
          {},
          ...series.map(({ label, color, dash, scale }) => ({
            label,
            scale,
            stroke: () => css(color),
            width: 1.5,
            dash: dash ? [5, 4] : undefined,
            points: { show: false },
            spanGaps: true,
          })),
        ],
        hooks: {
          draw: [(chart) => marks(chart, changes)],
          setCursor: [(chart) => show(chart.cursor.idx)],
        },
      },
      rows.length ? rows : [[], ...series.map(() => [])],
      canvas,
    ),
  );
  return (data, newChanges) => {
    rows = data;
    changes = newChanges;
    chart()?.setData(data);
    show(chart()?.cursor.idx);
    place.querySelector(".chart").setAttribute(
      "aria-label",
      `${place.querySelector("h3").textContent}: ${series.map(({ label }, at) => `${label} ${keys[at].textContent}`).join(", ")}`,
    );
  };
}

/** Counts by time and bucket of a latency histogram, with median and 99th percentile drawn over them. */
export function heatmap(place, { what, bounds }) {
  const readout = place.querySelector(".readout");
  let steps = [];
  let changes = [];
  let range = [6, 18];
  const label = (at) => (at <= 0 ? "0" : at > bounds.length ? "∞" : time(bounds[at - 1]));
  /** Where a time is among the buckets. */
  const position = (seconds) => {
    if (seconds === null) return null;
    const at = bounds.findIndex((bound) => seconds <= bound);
    if (at < 0) return bounds.length;
    const low = at === 0 ? 0 : bounds[at - 1];
    return at + (seconds - low) / (bounds[at] - low);
  };
  const cells = (chart) => {
    const { ctx, bbox } = chart;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.fillStyle = css("--heat");
    for (const { at, step, counts } of steps) {
      const all = counts.reduce((sum, one) => sum + one, 0);
      if (all === 0) continue;
      // Whole pixels, or neighbours overlap and look like more.
      const left = Math.round(chart.valToPos(at - step.seconds, "x", true));
      const right = Math.round(chart.valToPos(at, "x", true));
      counts.forEach((one, bucket) => {
        if (one === 0) return;
        const low = Math.round(chart.valToPos(bucket, "y", true));
        const high = Math.round(chart.valToPos(bucket + 1, "y", true));
        ctx.globalAlpha = 0.12 + 0.88 * Math.sqrt(one / all);
        ctx.fillRect(left, high, right - left, low - high);
      });
    }
    ctx.restore();
  };
  const show = (chart) => {
    const last = steps.at(-1);
    const { idx, left, top } = chart?.cursor ?? {};
    if (chart && idx !== null && idx !== undefined && left >= 0 && steps[idx]) {
      const { at, counts, step } = steps[idx];
      const bucket = Math.floor(chart.posToVal(top, "y"));
      const all = counts.reduce((sum, one) => sum + one, 0);
      const share = all > 0 ? ` (${(((counts[bucket] ?? 0) / all) * 100).toFixed(0)} %)` : "";
      readout.textContent =
        `${clock(at)}, ${label(bucket)} to ${label(bucket + 1)}: ${count(counts[bucket] ?? 0)} of ${count(all)} ${what}` +
        `${share} in ${step.seconds.toFixed(1)} s`;
    } else if (last?.p50 !== undefined && last.p50 !== null) {
      readout.textContent = `line: median ${time(last.p50)}; dashed: p99 ${time(last.p99)}; darker: more ${what}`;
    } else {
      readout.textContent = `no ${what} in the last seconds`;
    }
  };
  const chart = mount(place, (width, canvas) =>
    new uPlot(
      {
        ...base(width),
        cursor: { ...cursor, points: { show: false } },
        scales: { ...timed(), y: { range: () => range } },
        axes: [
          timeAxis(),
          axis({
            size: 52,
            grid: { show: false },
            splits: () => {
              const every = Math.max(1, Math.ceil((range[1] - range[0]) / 7));
              const all = [];
              for (let at = range[0]; at <= range[1]; at += every) all.push(at);
              return all;
            },
            values: (_, splits) => splits.map(label),
          }),
        ],
        series: [
          {},
          { stroke: () => css("--text"), width: 1.25, points: { show: false }, spanGaps: false },
          { stroke: () => css("--text"), width: 1.25, dash: [4, 3], points: { show: false }, spanGaps: false },
        ],
        hooks: {
          drawClear: [cells],
          draw: [(chart) => marks(chart, changes)],
          setCursor: [show],
        },
      },
      [[], [], []],
      canvas,
    ),
  );
  return (data, newChanges) => {
    steps = data;
    changes = newChanges;
    let low = Infinity;
    let high = -Infinity;
    for (const { counts } of steps) {
      counts.forEach((one, bucket) => {
        if (one > 0) {
          low = Math.min(low, bucket);
          high = Math.max(high, bucket + 1);
        }
      });
    }
    range = low < high ? [Math.max(0, low - 1), Math.max(high + 1, low + 5)] : [6, 18];
    chart()?.setData([
      steps.map(({ at }) => at),
      steps.map(({ p50 }) => position(p50)),
      steps.map(({ p99 }) => position(p99)),
    ]);
    show(chart());
    place.querySelector(".chart").setAttribute("aria-label", `${place.querySelector("h3").textContent}: ${readout.textContent}`);
  };
}

/** Bars, one for each class, with its label below and its share above it in the readout. */
export function bars(place, { unit, empty }) {
  const readout = place.querySelector(".readout");
  let labels = [];
  let values = [];
  const show = (at) => {
    const all = values.reduce((sum, one) => sum + one, 0);
    const most = values.indexOf(Math.max(...values));
    const shown = at ?? most;
    if (all === 0 || shown < 0 || values[shown] === undefined) {
      readout.textContent = empty;
      return;
    }
    const share = ((values[shown] / all) * 100).toFixed(1);
    readout.textContent = `${at === null || at === undefined ? "most" : "here"}: ${labels[shown]} ${unit}, ${share} %`;
  };
  const chart = mount(place, (width, canvas) =>
    new uPlot(
      {
        ...base(width),
        cursor: { drag: { x: false, y: false }, points: { show: false }, y: false },
        scales: {
          x: { time: false, range: () => [-0.5, Math.max(labels.length, 1) - 0.5] },
          y: { range: (_, low, high) => [0, Math.max(high ?? 0, 0.01) * 1.05] },
        },
        axes: [
          axis({
            size: 22,
            grid: { show: false },
            splits: (chart) => {
              const every = Math.max(1, Math.ceil((labels.length * 42) / chart.width));
              return labels.map((_, at) => at).filter((at) => at % every === 0);
            },
            values: (_, splits) => splits.map((at) => labels[at] ?? ""),
          }),
          axis({ size: 42, space: 28, values: (_, splits) => splits.map((value) => `${Math.round(value * 100)} %`) }),
        ],
        series: [
          {},
          {
            stroke: () => css("--useful"),
            fill: () => css("--useful-soft"),
            width: 1,
            points: { show: false },
            paths: uPlot.paths.bars({ size: [0.8, 48], align: 0 }),
          },
        ],
        hooks: { setCursor: [(chart) => show(chart.cursor.idx)] },
      },
      [[], []],
      canvas,
    ),
  );
  return (newLabels, newValues) => {
    labels = newLabels;
    values = newValues;
    const all = values.reduce((sum, one) => sum + one, 0) || 1;
    chart()?.setData([labels.map((_, at) => at), values.map((one) => one / all)]);
    show(chart()?.cursor.idx);
    place.querySelector(".chart").setAttribute("aria-label", `${place.querySelector("h3").textContent}: ${readout.textContent}`);
  };
}

/** Batches by executor over the last seconds, as bars from their seal on. */
export function timeline(place, nameOf) {
  const canvas = place.querySelector("canvas");
  const LANE = 30;
  const LEFT = 96;
  return (lanes, { span, until }) => {
    const width = canvas.parentElement.clientWidth;
    const height = lanes.length * LANE + 20;
    const scale = ratio();
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    const ctx = canvas.getContext("2d");
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    ctx.clearRect(0, 0, width, height);
    ctx.font = font();
    ctx.textBaseline = "middle";
    const x = (at) => LEFT + ((at - (until - span)) / span) * (width - LEFT);
    lanes.forEach(({ label, detail, batches }, lane) => {
      const top = lane * LANE;
      ctx.globalAlpha = 1;
      ctx.fillStyle = css("--text");
      ctx.fillText(label, 0, top + 9);
      ctx.fillStyle = css("--muted");
      ctx.fillText(detail, 0, top + 21);
      ctx.fillStyle = css("--track");
      ctx.fillRect(LEFT, top + 4, width - LEFT, LANE - 8);
      let end = -Infinity;
      for (const { start, time, model, rows } of batches) {
        // Behind a batch that runs, the next one is sealed before its turn comes.
        const from = Math.max(start, end);
        end = from + time;
        const [left, right] = [Math.max(x(from), LEFT), x(end)];
        if (right <= LEFT) continue;
        ctx.fillStyle = css(`--c${model % 8}`);
        ctx.fillRect(left, top + 4, Math.max(right - left - 0.5, 0.75), LANE - 8);
        const text = `${nameOf(model)} ×${rows}`;
        if (right - left > ctx.measureText(text).width + 6) {
          ctx.fillStyle = css("--on-bar");
          ctx.fillText(text, left + 3, top + LANE / 2);
        }
      }
    });
    ctx.fillStyle = css("--muted");
    for (let back = 0; back <= span; back += span / 4) {
      ctx.textAlign = back === 0 ? "right" : back === span ? "left" : "center";
      ctx.fillText(back === 0 ? "now" : `−${back} s`, x(until - back), height - 8);
    }
    ctx.textAlign = "left";
  };
}
