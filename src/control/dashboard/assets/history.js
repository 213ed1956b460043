// The last snapshots, and what happened between two of them. Counts are cumulative, so a missed snapshot loses nothing.

/** Snapshots kept: five minutes of them. */
const KEPT = 301;

export class History {
  entries = [];

  /** Takes a snapshot. One of another process, whose counts began again, ends the history: then this is true. */
  push(snapshot) {
    const { stats } = snapshot;
    const entry = {
      at: snapshot.at_unix_ms / 1000,
      uptime: stats.uptime_us / 1e6,
      models: snapshot.models,
      executors: stats.executors,
      waterfall: stats.waterfall,
      tenants: snapshot.tenants ?? stats.tenants,
    };
    const started = ({ at, uptime }) => at - uptime;
    const isNew = this.entries.length > 0 && Math.abs(started(this.last) - started(entry)) > 1.5;
    if (isNew) this.entries = [];
    this.entries.push(entry);
    if (this.entries.length > KEPT) this.entries.shift();
    return isNew;
  }

  get last() {
    return this.entries.at(-1);
  }

  /** The two ends of the last `seconds`, or of what there is. Null before the second snapshot. */
  window(seconds) {
    if (this.entries.length < 2) return null;
    const to = this.last;
    const from = this.entries.find((entry) => entry.at >= to.at - seconds - 0.5) ?? this.entries[0];
    return from === to ? null : { from, to, seconds: to.uptime - from.uptime };
  }
}

const sum = (counts) => Object.values(counts).reduce((all, one) => all + one, 0);

/** Counts of a sparse histogram at bucket `at`: [first bucket, count, count…]. */
const bucket = (sparse, at) => sparse[at - sparse[0] + 1] ?? 0;

/** What a histogram of `buckets` buckets counted from one reading to the next. */
export function histogram(from, to, buckets) {
  const counts = new Array(buckets).fill(0);
  if (!to.length) return counts;
  for (let at = to[0]; at < to[0] + to.length - 1; at++) {
    counts[at] = bucket(to, at) - (from.length && at >= from[0] ? bucket(from, at) : 0);
  }
  return counts;
}

/** The quantile of counts within bounds, interpolated within its bucket. Null where nothing was counted. */
export function quantile(counts, bounds, q) {
  const all = counts.reduce((sum, one) => sum + one, 0);
  if (all === 0) return null;
  let left = q * all;
  for (let at = 0; at < counts.length; at++) {
    if (counts[at] > 0 && left <= counts[at]) {
      const low = at === 0 ? 0 : bounds[at - 1];
      return at >= bounds.length ? low : low + (bounds[at] - low) * (left / counts[at]);
    }
    left -= counts[at];
  }
  return bounds.at(-1);
}

/** What happened to one model between two entries. Null where it is in one of them only. */
export function between(from, to, place, bounds) {
  const [a, b] = [from.models[place], to.models[place]];
  if (!a || !b) return null;
  const seconds = to.uptime - from.uptime;
  const of = (key) => b[key] - a[key];
  const batches = sum(b.batches) - sum(a.batches);
  const ok = (b.finished.ok ?? 0) - (a.finished.ok ?? 0);
  const ended = sum(b.finished) - sum(a.finished) + sum(b.refused) - sum(a.refused);
  const times = bounds.seconds;
  const queue = histogram(a.queue_delay, b.queue_delay, times.length + 1);
  const run = histogram(a.service_time, b.service_time, times.length + 1);
  const reasons = Object.fromEntries(
    Object.entries(b.batches)
      .map(([reason, total]) => [reason, total - (a.batches[reason] ?? 0)])
      .filter(([, total]) => total > 0),
  );
  return {
    seconds,
    batches,
    reasons,
    queue,
    run,
    rows: of("rows"),
    ok,
    failed: ended - ok,
    rowsPerBatch: batches > 0 ? of("rows") / batches : null,
    fill: of("rows_possible") > 0 ? of("rows") / of("rows_possible") : null,
    padding: of("cells_padded") > 0 ? 1 - of("cells_real") / of("cells_padded") : null,
    queueP50: quantile(queue, times, 0.5),
    queueP99: quantile(queue, times, 0.99),
    runP50: quantile(run, times, 0.5),
    runP99: quantile(run, times, 0.99),
    sizes: histogram(a.batch_rows, b.batch_rows, bounds.count.length + 1),
  };
}

/** What happened to one model second by second, and when its policy changed. */
export function seconds(entries, place, bounds) {
  const steps = [];
  for (let at = 1; at < entries.length; at++) {
    const step = between(entries[at - 1], entries[at], place, bounds);
    // Percentiles over five seconds: of one there is often too little to have any.
    const wide = between(entries[Math.max(at - 5, 0)], entries[at], place, bounds);
    if (!step || !wide) continue;
    const [before, after] = [entries[at - 1].models[place].generation, entries[at].models[place].generation];
    steps.push({ at: entries[at].at, step, wide, generation: before !== after && before > 0 ? after : null });
  }
  return steps;
}
