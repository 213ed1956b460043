//! "Can this window ever fill?": what a policy can reach with what comes, and which of its knobs contradict each other or it.
//!
//! Pure, and about averages: arrivals are taken as independent of each other, a batch's time as the learned coefficients say.
//! "Never" means: not with three standard deviations more rows than are expected.
//!
//! Always true
//! - A finding names a knob and gives the numbers that it follows from. Its code stays what it is.
//! - Too little seen is no finding: rates and shares need [`BATCHES_MIN`] or more batches of the present policy, lengths
//!   [`ROWS_MIN`] rows.
//!
//! Elsewhere: what the knobs do (policy.rs), who shows this (control/insight.rs, `ferry set`).

use std::time::Duration;

use super::cost::Coefficients;
use super::decision::{Decision, Verdict};
use super::edges::LengthHistogram;
use super::policy::{Edges, PadTo, Policy, PolicyKind};
use super::{ModelQueue, Scheduler};
use crate::vocab::{Layout, ModelHandle, Moment, SealReason};

/// Decisions that count are not older.
const RECENT: Duration = Duration::from_secs(30);
/// Recent batches before a rate is believed.
pub const BATCHES_MIN: u64 = 20;
/// Recent batches before a share of them is believed.
const SHARE_BATCHES_MIN: u64 = 50;
/// Rows, faded, before a length is missed.
pub const ROWS_MIN: f64 = 100.0;
/// Faded rows of a length that occurs: one, five minutes ago.
const OCCURS_MIN: f64 = 0.5;
/// Shares of full batches at which something is said about them.
const FULL_LOW: f64 = 0.01;
const FULL_HIGH: f64 = 0.9;
const DEVIATIONS: f64 = 3.0;
/// Rows of a mean batch, as a share of the most that ever waited, above which nobody else was to come. Callers that do not wait
/// for answers bring, in some batch of fifty, twice as many as in the mean, or the mean is far above what fills a batch.
const ALL_THERE: f64 = 0.85;
/// Share of the cells in rows that no other fits beside, above which the budget is called small.
const ALONE_HIGH: f64 = 0.2;

/// What recently came of one model's requests, under its present policy.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Observed {
    /// How long was looked at.
    pub span: Duration,
    /// Rows that went into batches or were given up.
    pub rows: u64,
    /// Those that went into batches.
    pub batched: u64,
    /// Batches by reason, in the order of [`SealReason::ALL`].
    pub closed: [u64; SealReason::ALL.len()],
    /// Most rows that waited at once when something was decided.
    pub waiting_peak: u32,
}

impl Observed {
    /// Sums the recent decisions of a log, oldest first.
    pub fn of<'a>(
        log: impl Iterator<Item = &'a Decision>,
        model: ModelHandle,
        generation: u32,
        now: Moment,
    ) -> Observed {
        let mut observed = Observed::default();
        for decision in log.filter(|decision| decision.model == model && decision.generation == generation) {
            // Since the first one, or for as long as decisions count.
            observed.span = observed.span.max(now.since(decision.at)).min(RECENT);
            if now.since(decision.at) > RECENT {
                continue;
            }
            observed.waiting_peak = observed.waiting_peak.max(decision.waiting);
            match decision.verdict {
                Verdict::Sealed(reason) => {
                    let place = SealReason::ALL.iter().position(|known| *known == reason);
                    observed.closed[place.expect("ALL has every reason")] += 1;
                    observed.rows += u64::from(decision.rows);
                    observed.batched += u64::from(decision.rows);
                }
                Verdict::Shed => observed.rows += u64::from(decision.rows),
                Verdict::Held | Verdict::Refused => {}
            }
        }
        observed
    }

    pub fn batches(&self) -> u64 {
        self.closed.iter().sum()
    }

    /// Rows per second; 0 where too little was seen.
    pub fn rate(&self) -> f64 {
        let seconds = self.span.as_secs_f64();
        if self.batches() < BATCHES_MIN || seconds <= 0.0 { 0.0 } else { self.rows as f64 / seconds }
    }

    /// Share of the batches that were closed for this reason.
    fn share(&self, reason: SealReason) -> f64 {
        let place = SealReason::ALL.iter().position(|known| *known == reason).expect("ALL has every reason");
        self.closed[place] as f64 / self.batches().max(1) as f64
    }

    /// The reason that closed the most batches, and its share.
    pub fn mostly(&self) -> Option<(SealReason, f64)> {
        let reason = SealReason::ALL.into_iter().max_by(|a, b| self.share(*a).total_cmp(&self.share(*b)))?;
        (self.batches() > 0).then(|| (reason, self.share(reason)))
    }
}

/// What is known of one model and its policy.
#[derive(Clone, Debug)]
pub struct Facts {
    pub policy: Policy,
    pub generation: u32,
    pub lengths: LengthHistogram,
    /// Of its batches' times.
    pub fit: Coefficients,
    /// That run it.
    pub executors: usize,
    pub observed: Observed,
    /// Most rows that its callers can have in flight. `None`: nobody knows, or nobody is connected.
    pub in_flight_max: Option<u64>,
}

impl Scheduler {
    /// What there is to say about a model, but for its callers.
    pub fn facts(&self, model: ModelHandle, now: Moment) -> Facts {
        let ModelQueue { policy, generation, seen, cost, .. } = &self.models[model.index()];
        Facts {
            policy: policy.clone(),
            generation: *generation,
            lengths: seen.clone(),
            fit: cost.coefficients(),
            executors: self.seats.count(policy.group),
            observed: Observed::of(self.log.last(usize::MAX), model, *generation, now),
            in_flight_max: None,
        }
    }
}

/// Kinds of findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    WindowNeverFills,
    RowsMaxAboveInFlight,
    RowsMaxAboveQueue,
    CellsMaxNeverReached,
    RowsMaxNeverReached,
    BucketsUnused,
    LongestRowsRunAlone,
    HeldInVain,
    DelayAboveSlo,
    HardlyEverFull,
    NearlyAlwaysFull,
}

impl Kind {
    /// Stable: others may look for it.
    pub fn code(self) -> &'static str {
        match self {
            Kind::WindowNeverFills => "window_never_fills",
            Kind::RowsMaxAboveInFlight => "rows_max_above_in_flight",
            Kind::RowsMaxAboveQueue => "rows_max_above_queue",
            Kind::CellsMaxNeverReached => "cells_max_never_reached",
            Kind::RowsMaxNeverReached => "rows_max_never_reached",
            Kind::BucketsUnused => "buckets_unused",
            Kind::LongestRowsRunAlone => "longest_rows_run_alone",
            Kind::HeldInVain => "held_in_vain",
            Kind::DelayAboveSlo => "delay_above_slo",
            Kind::HardlyEverFull => "hardly_ever_full",
            Kind::NearlyAlwaysFull => "nearly_always_full",
        }
    }
}

/// Something to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub kind: Kind,
    /// A sentence with the numbers.
    pub message: String,
    /// The knob to change, as [`Policy::set`] takes it.
    pub knob: &'static str,
}

/// What batches can reach with what comes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attainable {
    /// Expected rows of a batch when it is closed.
    pub rows: f64,
    /// Rows that would fit, in the mean over the lengths that come.
    pub rows_possible: f64,
}

impl Attainable {
    pub fn fill(&self) -> f64 {
        (self.rows / self.rows_possible).min(1.0)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Lint {
    /// `None`: too little was seen.
    pub attainable: Option<Attainable>,
    pub findings: Vec<Finding>,
}

/// Looks at a model.
pub fn lint(facts: &Facts) -> Lint {
    let shapes = shapes(&facts.policy, &facts.lengths);
    let rules = [window, in_flight, queue, cells_max, rows_max, buckets, alone, held_in_vain, slo, full]
        as [fn(&Facts, &[Shape]) -> Option<Finding>; 10];
    Lint {
        attainable: attainable(facts, &shapes),
        findings: rules.iter().filter_map(|rule| rule(facts, &shapes)).collect(),
    }
}

/// Rows of one length as batches take it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Shape {
    /// Cells that a row takes.
    len: u32,
    /// Share of the rows.
    share: f64,
    /// Rows of this length that fill a batch.
    room: u32,
}

/// The lengths that occur, ascending.
fn shapes(policy: &Policy, lengths: &LengthHistogram) -> Vec<Shape> {
    let mut shapes: Vec<Shape> = Vec::new();
    for bin in lengths.bins().iter().filter(|bin| bin.rows >= OCCURS_MIN) {
        let mean = ((bin.cells / bin.rows).round() as u32).clamp(1, policy.buckets.longest());
        let len = policy.padded_len(mean);
        let share = bin.rows / lengths.rows().max(bin.rows);
        match shapes.last_mut() {
            Some(last) if last.len == len => last.share += share,
            // Rows of one length that lie end to end fill a batch like padded ones.
            _ => shapes.push(Shape { len, share, room: policy.rows_at(len).max(1) }),
        }
    }
    shapes
}

/// Rows that are expected in a batch when it is closed, of `rate` rows per second: those that come while it is held, or while
/// its executor is busy with the one before, if callers do not wait for answers first.
fn expected_rows(facts: &Facts, rate: f64, row: f64, room: f64) -> f64 {
    let policy = &facts.policy;
    let held = match policy.queue_delay_max {
        Some(window) => window.as_secs_f64(),
        None if policy.kind == PolicyKind::Cost => policy.tuning.hold * facts.fit.batch / 1e9,
        None => 0.0,
    };
    let executors = facts.executors.max(1) as f64;
    let load = rate * row / 1e9;
    // b = rate × (batch + b × row) ÷ executors.
    let busy = if load < executors { rate * facts.fit.batch / 1e9 / (executors - load) } else { f64::INFINITY };
    (1.0 + rate * held).max(busy).min(room).max(1.0)
}

/// Mean time that a row adds to its batch, in ns.
fn mean_row(facts: &Facts, shapes: &[Shape]) -> f64 {
    shapes.iter().map(|shape| shape.share * facts.fit.row(shape.len)).sum()
}

/// Rows that fill a batch, in the mean over the lengths that come. `None`: none came.
fn mean_room(shapes: &[Shape]) -> Option<f64> {
    let shares: f64 = shapes.iter().map(|shape| shape.share).sum();
    (shares > 0.0).then(|| shapes.iter().map(|shape| shape.share * f64::from(shape.room)).sum::<f64>() / shares)
}

fn attainable(facts: &Facts, shapes: &[Shape]) -> Option<Attainable> {
    let rate = facts.observed.rate();
    if rate == 0.0 {
        return None;
    }
    let room = mean_room(shapes)?;
    let in_flight = facts.in_flight_max.map_or(f64::INFINITY, |rows| rows as f64);
    Some(Attainable {
        rows: expected_rows(facts, rate, mean_row(facts, shapes), room).min(in_flight),
        rows_possible: room,
    })
}

/// The lane of the policy `buckets`, or the whole queue, that fills the soonest: its rate, and the rows that fill it.
fn fullest(facts: &Facts, shapes: &[Shape]) -> Option<(f64, u32)> {
    let rate = facts.observed.rate();
    let policy = &facts.policy;
    if policy.kind != PolicyKind::Buckets {
        // The longest length that comes makes a batch full with the fewest rows.
        return Some((rate, shapes.iter().map(|shape| shape.room).min()?));
    }
    let joins = |from: &Shape, to: &Shape| {
        from.len <= to.len && 1.0 - f64::from(from.len) / f64::from(to.len) <= policy.fill_waste_max
    };
    let lane = |to: &Shape| {
        let share: f64 = shapes.iter().filter(|from| joins(from, to)).map(|from| from.share).sum();
        (rate * share, to.room)
    };
    let fill = |(rate, room): &(f64, u32)| rate / f64::from(*room);
    shapes.iter().map(lane).max_by(|a, b| fill(a).total_cmp(&fill(b)))
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn found(kind: Kind, knob: &'static str, message: String) -> Option<Finding> {
    Some(Finding { kind, message, knob })
}

fn window(facts: &Facts, shapes: &[Shape]) -> Option<Finding> {
    let window = facts.policy.queue_delay_max.filter(|window| !window.is_zero())?;
    let (rate, room) = fullest(facts, shapes)?;
    let rows = expected_rows(facts, rate, mean_row(facts, shapes), f64::INFINITY);
    if rate == 0.0 || rows + DEVIATIONS * rows.sqrt() >= f64::from(room) {
        return None;
    }
    let needed = f64::from(room - 1) / rate * 1e3;
    let message = format!(
        "at {rate:.1} rows a second a window of {:.3} ms gathers about {rows:.1} rows of the {room} that fill a batch, which \
         take {needed:.1} ms to come: no batch is ever full",
        millis(window)
    );
    found(Kind::WindowNeverFills, "queue_delay_max_us", message)
}

fn in_flight(facts: &Facts, shapes: &[Shape]) -> Option<Finding> {
    let in_flight = facts.in_flight_max?;
    let rows_max = facts.policy.rows_max;
    // Where cells bound a batch before that, it is not the rows that contradict.
    let room = shapes.iter().map(|shape| shape.room).max().unwrap_or(rows_max);
    if in_flight >= u64::from(room) {
        return None;
    }
    let message = format!("rows_max is {rows_max}, but callers can have at most {in_flight} rows in flight");
    found(Kind::RowsMaxAboveInFlight, "rows_max", message)
}

fn queue(facts: &Facts, _: &[Shape]) -> Option<Finding> {
    let Policy { rows_max, queue, .. } = &facts.policy;
    if queue.rows_max >= u64::from(*rows_max) {
        return None;
    }
    let message = format!("rows_max is {rows_max}, but at most {} rows of this model may wait", queue.rows_max);
    found(Kind::RowsMaxAboveQueue, "queue_rows_max", message)
}

fn cells_max(facts: &Facts, shapes: &[Shape]) -> Option<Finding> {
    let Policy { rows_max, cells_max, .. } = &facts.policy;
    let longest = shapes.last().filter(|_| facts.lengths.rows() >= ROWS_MIN)?.len;
    let most = u64::from(*rows_max) * u64::from(longest);
    if most >= *cells_max {
        return None;
    }
    let message = format!(
        "cells_max is {cells_max}, but no batch has more than {most} cells: rows_max is {rows_max}, and the longest row that \
         comes takes {longest}"
    );
    found(Kind::CellsMaxNeverReached, "cells_max", message)
}

fn rows_max(facts: &Facts, shapes: &[Shape]) -> Option<Finding> {
    let Policy { rows_max, cells_max, .. } = &facts.policy;
    let shortest = shapes.first().filter(|_| facts.lengths.rows() >= ROWS_MIN)?;
    if shortest.room >= *rows_max {
        return None;
    }
    let message = format!(
        "rows_max is {rows_max}, but no batch has more than {} rows: cells_max is {cells_max}, and the shortest row that comes \
         takes {}",
        shortest.room, shortest.len
    );
    found(Kind::RowsMaxNeverReached, "rows_max", message)
}

/// Buckets that nothing is padded to. The longest has to be there, whatever comes.
fn buckets(facts: &Facts, shapes: &[Shape]) -> Option<Finding> {
    let policy = &facts.policy;
    if policy.layout == Layout::Packed || policy.pad_to != PadTo::Bucket || facts.lengths.rows() < ROWS_MIN {
        return None;
    }
    let (_, lens) = policy.buckets.lens().split_last()?;
    let unused: Vec<u32> = lens.iter().copied().filter(|len| shapes.iter().all(|shape| shape.len != *len)).collect();
    if unused.is_empty() {
        return None;
    }
    let list: Vec<String> = unused.iter().take(8).map(u32::to_string).collect();
    let more = if unused.len() > 8 { ", …" } else { "" };
    let message = format!(
        "{} of {} buckets are never used: nothing that comes is padded to {}{more}",
        unused.len(),
        policy.buckets.len(),
        list.join(", ")
    );
    let knob = if policy.edges == Edges::Auto { "shapes_max" } else { "buckets" };
    found(Kind::BucketsUnused, knob, message)
}

/// A padded batch of one row pays all that a batch costs for itself. End to end, short rows fill it up.
fn alone(facts: &Facts, shapes: &[Shape]) -> Option<Finding> {
    let Policy { rows_max, cells_max, layout, .. } = &facts.policy;
    if *layout == Layout::Packed || *rows_max < 2 || facts.lengths.rows() < ROWS_MIN {
        return None;
    }
    let cells = |shape: &Shape| shape.share * f64::from(shape.len);
    let all: f64 = shapes.iter().map(cells).sum();
    let longest = shapes.last()?.len;
    let (rows, of_them) = shapes
        .iter()
        .filter(|shape| shape.room == 1)
        .fold((0.0, 0.0), |(rows, sum), shape| (rows + shape.share, sum + cells(shape)));
    if all == 0.0 || of_them / all < ALONE_HIGH {
        return None;
    }
    let message = format!(
        "cells_max is {cells_max}: no other row fits beside one that is longer than {}. That is so for {:.0} % of the rows, which \
         bring {:.0} % of the cells; {} would hold two of the longest that comes",
        cells_max / 2,
        100.0 * rows,
        100.0 * of_them / all,
        2 * u64::from(longest),
    );
    found(Kind::LongestRowsRunAlone, "cells_max", message)
}

/// Callers that wait for answers before they send more: what is held is all there is, and its wait keeps the rest from coming.
fn held_in_vain(facts: &Facts, shapes: &[Shape]) -> Option<Finding> {
    let Facts { policy, observed, .. } = facts;
    let window = policy.queue_delay_max.filter(|window| !window.is_zero())?;
    let (share, batches) = (observed.share(SealReason::QueueDelay), observed.batches());
    let mean = observed.batched as f64 / batches.max(1) as f64;
    let peak = observed.waiting_peak;
    let room = mean_room(shapes)?;
    // One row at a time is what few requests look like, whoever sends them.
    let all_there = peak >= 2 && mean >= ALL_THERE * f64::from(peak) && f64::from(peak) < room;
    if batches < SHARE_BATCHES_MIN || share < FULL_HIGH || !all_there {
        return None;
    }
    let message = format!(
        "{:.1} % of the last {batches} batches were held for all of {:.3} ms and had {mean:.1} rows in the mean, and never more than \
         {peak} were there: callers wait for these answers before they send more",
        100.0 * share,
        millis(window),
    );
    found(Kind::HeldInVain, "queue_delay_max_us", message)
}

fn slo(facts: &Facts, _: &[Shape]) -> Option<Finding> {
    let window = facts.policy.queue_delay_max.filter(|window| *window > facts.policy.slo)?;
    let message = format!(
        "rows may be held for {:.3} ms, but slo_ms is {:.3}: one without a deadline can be late before it runs",
        millis(window),
        millis(facts.policy.slo)
    );
    found(Kind::DelayAboveSlo, "queue_delay_max_us", message)
}

/// What share of the batches was closed full.
fn full(facts: &Facts, shapes: &[Shape]) -> Option<Finding> {
    let Facts { policy, observed, .. } = facts;
    let batches = observed.batches();
    let share = observed.share(SealReason::Full);
    let percent = 100.0 * share;
    if batches < SHARE_BATCHES_MIN {
        return None;
    }
    if share >= FULL_HIGH {
        let by_cells = shapes.iter().any(|shape| shape.room < policy.rows_max);
        let knob = if by_cells { "cells_max" } else { "rows_max" };
        let message = format!(
            "{percent:.1} % of the last {batches} batches were closed full: {knob} bounds them, and no wait is ever used up"
        );
        return found(Kind::NearlyAlwaysFull, knob, message);
    }
    let (mostly, most) = observed.mostly()?;
    let waits = policy.queue_delay_max.is_some_and(|window| !window.is_zero());
    if !waits || share > FULL_LOW {
        return None;
    }
    let message = format!(
        "{percent:.1} % of the last {batches} batches were closed full, {:.1} % by {}; at most {} rows waited at once",
        100.0 * most,
        mostly.name(),
        observed.waiting_peak
    );
    found(Kind::HardlyEverFull, "queue_delay_max_us", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{Buckets, QueueLimits};

    /// Nothing to complain about: rows of length 10 and 60 at 10,000 a second, a window of 2 ms, batches of at most 8 rows or
    /// 512 cells, of which half are closed full.
    fn quiet() -> Facts {
        let mut lengths = LengthHistogram::new(64);
        lengths.observe(Moment::ZERO, 10, 500);
        lengths.observe(Moment::ZERO, 60, 500);
        let policy = Policy {
            kind: PolicyKind::Window,
            queue_delay_max: Some(Duration::from_millis(2)),
            ..Policy::new(8, 512, Buckets::new(&[16, 64]).expect("ascending"))
        };
        let observed = closed(&[(SealReason::Full, 500), (SealReason::QueueDelay, 500)], 10_000.0);
        let fit = Coefficients { batch: 100_000.0, cell: 10.0, square: 0.0 };
        Facts { policy, generation: 1, lengths, fit, executors: 1, observed, in_flight_max: Some(1000) }
    }

    /// A second of batches that were closed for these reasons, at this rate.
    fn closed(reasons: &[(SealReason, u64)], rate: f64) -> Observed {
        let mut observed =
            Observed { span: Duration::from_secs(1), rows: rate as u64, waiting_peak: 5, ..Observed::default() };
        for (reason, batches) in reasons {
            let place = SealReason::ALL.iter().position(|known| known == reason).expect("ALL has every reason");
            observed.closed[place] = *batches;
        }
        observed
    }

    fn delayed_only(batches: u64) -> [(SealReason, u64); 1] {
        [(SealReason::QueueDelay, batches)]
    }

    fn lengths(lens: &[(u32, u32)]) -> LengthHistogram {
        let mut lengths = LengthHistogram::new(64);
        lens.iter().for_each(|(len, rows)| lengths.observe(Moment::ZERO, *len, *rows));
        lengths
    }

    #[test]
    fn the_lane_that_fills_first_is_the_one_with_the_most_rows_a_second_for_its_room() {
        let shape = |len: u32, share: f64, room: u32| Shape { len, share, room };
        let facts = |kind: PolicyKind| {
            let mut facts = quiet();
            facts.policy.kind = kind;
            facts
        };
        // 5,000 a second fill 64 rows in 13 ms and 7 rows in 1.4.
        let shapes = [shape(8, 0.5, 64), shape(64, 0.5, 7)];
        assert_eq!(fullest(&facts(PolicyKind::Buckets), &shapes), Some((5_000.0, 7)));
        assert_eq!(fullest(&facts(PolicyKind::Window), &shapes), Some((10_000.0, 7)));
        assert_eq!(fullest(&facts(PolicyKind::Buckets), &[]), None);
        // Rows of 60 join those of 64: little is padding.
        let shapes = [shape(60, 0.3, 8), shape(64, 0.2, 8), shape(8, 0.4, 64)];
        assert_eq!(fullest(&facts(PolicyKind::Buckets), &shapes), Some((5_000.0, 8)));
    }

    #[test]
    fn each_situation_has_its_findings_and_no_others() {
        let half = [(SealReason::Full, 500), (SealReason::QueueDelay, 500)];
        let delayed = [(SealReason::Full, 5), (SealReason::QueueDelay, 995)];
        let us = Duration::from_micros;
        type Situation<'a> = (&'a str, &'a dyn Fn(&mut Facts), &'a [(Kind, &'a str)]);
        let table: &[Situation] = &[
            ("nothing to say", &|_| {}, &[]),
            (
                "100 rows a second in 2 ms",
                &|facts| facts.observed = closed(&half, 100.0),
                &[(Kind::WindowNeverFills, "queue_delay_max_us")],
            ),
            (
                "100 rows a second, with a window for them",
                &|facts| {
                    facts.observed = closed(&half, 100.0);
                    facts.policy.queue_delay_max = Some(us(80_000));
                },
                &[],
            ),
            (
                "100 rows a second, and an executor that is busy for longer than that takes",
                &|facts| {
                    facts.observed = closed(&half, 100.0);
                    facts.fit.batch = 80_000_000.0;
                },
                &[],
            ),
            (
                "no window",
                &|facts| {
                    facts.observed = closed(&delayed, 100.0);
                    facts.policy.queue_delay_max = Some(Duration::ZERO);
                },
                &[],
            ),
            (
                "a window that pays, whatever it is",
                &|facts| {
                    facts.observed = closed(&delayed, 100.0);
                    facts.policy.kind = PolicyKind::Cost;
                    facts.policy.queue_delay_max = None;
                },
                &[],
            ),
            ("too little seen for a rate", &|facts| facts.observed = closed(&[(SealReason::Idle, 19)], 10.0), &[]),
            ("2000 rows a second in one queue", &|facts| facts.observed = closed(&half, 2000.0), &[]),
            (
                "the same, spread over lanes that do not fill each other",
                &|facts| {
                    facts.observed = closed(&half, 2000.0);
                    facts.policy.kind = PolicyKind::Buckets;
                    facts.policy.queue_delay_max = Some(us(500));
                    facts.lengths = lengths(&[(10, 500), (60, 500)]);
                },
                &[(Kind::WindowNeverFills, "queue_delay_max_us")],
            ),
            (
                "callers with 20 in flight",
                &|facts| {
                    facts.in_flight_max = Some(20);
                    facts.policy.rows_max = 64;
                    facts.policy.cells_max = 64 * 64;
                    facts.observed = closed(&half, 100_000.0);
                },
                &[(Kind::RowsMaxAboveInFlight, "rows_max")],
            ),
            (
                "callers with as many in flight as cells let into a batch",
                &|facts| {
                    facts.in_flight_max = Some(32);
                    facts.policy.rows_max = 64;
                },
                &[(Kind::RowsMaxNeverReached, "rows_max")],
            ),
            ("nobody is connected", &|facts| facts.in_flight_max = None, &[]),
            (
                "a queue shorter than a batch",
                &|facts| facts.policy.queue = QueueLimits { rows_max: 7, ..QueueLimits::NONE },
                &[(Kind::RowsMaxAboveQueue, "queue_rows_max")],
            ),
            ("rows before cells", &|facts| facts.policy.cells_max = 513, &[(Kind::CellsMaxNeverReached, "cells_max")]),
            (
                "cells before rows",
                &|facts| {
                    facts.lengths = lengths(&[(10, 1000), (60, 50)]);
                    facts.policy.cells_max = 127;
                },
                &[(Kind::RowsMaxNeverReached, "rows_max")],
            ),
            (
                "short rows only",
                &|facts| facts.lengths = lengths(&[(10, 1000)]),
                &[(Kind::CellsMaxNeverReached, "cells_max")],
            ),
            ("long rows only", &|facts| facts.lengths = lengths(&[(60, 1000)]), &[(Kind::BucketsUnused, "buckets")]),
            (
                "long rows only, in buckets that the scheduler chose",
                &|facts| {
                    facts.lengths = lengths(&[(60, 1000)]);
                    facts.policy.edges = Edges::Auto;
                },
                &[(Kind::BucketsUnused, "shapes_max")],
            ),
            (
                "long rows only, padded to the longest of them",
                &|facts| {
                    facts.lengths = lengths(&[(64, 1000)]);
                    facts.policy.pad_to = PadTo::Longest;
                },
                &[],
            ),
            (
                "long rows only, end to end",
                &|facts| {
                    facts.lengths = lengths(&[(64, 1000)]);
                    facts.policy.layout = Layout::Packed;
                },
                &[],
            ),
            ("too little seen for lengths", &|facts| facts.lengths = lengths(&[(60, 99)]), &[]),
            (
                "callers that wait for answers: what is held is all there is",
                &|facts| {
                    facts.observed = Observed { batched: 450, waiting_peak: 5, ..closed(&delayed_only(100), 10_000.0) };
                },
                &[(Kind::HeldInVain, "queue_delay_max_us"), (Kind::HardlyEverFull, "queue_delay_max_us")],
            ),
            (
                "callers that do not: in some batch were twice as many as in the mean",
                &|facts| {
                    facts.observed = Observed { batched: 250, waiting_peak: 5, ..closed(&delayed_only(100), 10_000.0) };
                },
                &[(Kind::HardlyEverFull, "queue_delay_max_us")],
            ),
            (
                "callers that wait for answers, one at a time",
                &|facts| {
                    facts.observed = Observed { batched: 100, waiting_peak: 1, ..closed(&delayed_only(100), 10_000.0) };
                },
                &[(Kind::HardlyEverFull, "queue_delay_max_us")],
            ),
            (
                "padded rows that no other fits beside",
                &|facts| facts.policy.cells_max = 100,
                &[(Kind::RowsMaxNeverReached, "rows_max"), (Kind::LongestRowsRunAlone, "cells_max")],
            ),
            (
                "the same of batches of two",
                &|facts| (facts.policy.cells_max, facts.policy.rows_max) = (100, 2),
                &[(Kind::LongestRowsRunAlone, "cells_max")],
            ),
            (
                "no other fits beside any row",
                &|facts| (facts.policy.cells_max, facts.policy.rows_max) = (100, 1),
                &[(Kind::CellsMaxNeverReached, "cells_max")],
            ),
            (
                "the same end to end",
                &|facts| {
                    facts.policy.cells_max = 100;
                    facts.policy.layout = Layout::Packed;
                },
                &[],
            ),
            (
                "held for longer than a request may take",
                &|facts| facts.policy.slo = us(1999),
                &[(Kind::DelayAboveSlo, "queue_delay_max_us")],
            ),
            ("held for as long as a request may take", &|facts| facts.policy.slo = us(2000), &[]),
            (
                "nearly all closed full, by rows",
                &|facts| facts.observed = closed(&[(SealReason::Full, 90), (SealReason::Idle, 10)], 10_000.0),
                &[(Kind::NearlyAlwaysFull, "rows_max")],
            ),
            (
                "nearly all closed full, some of them by cells",
                &|facts| {
                    facts.policy.cells_max = 256;
                    facts.observed = closed(&[(SealReason::Full, 90), (SealReason::Idle, 10)], 10_000.0);
                },
                &[(Kind::NearlyAlwaysFull, "cells_max")],
            ),
            (
                "hardly any closed full, though they could be",
                &|facts| facts.observed = closed(&delayed, 10_000.0),
                &[(Kind::HardlyEverFull, "queue_delay_max_us")],
            ),
            (
                "too few batches for a share",
                &|facts| facts.observed = closed(&[(SealReason::QueueDelay, 49)], 10_000.0),
                &[],
            ),
        ];
        for (situation, change, expected) in table {
            let mut facts = quiet();
            change(&mut facts);
            let found: Vec<(Kind, &str)> =
                lint(&facts).findings.iter().map(|finding| (finding.kind, finding.knob)).collect();
            assert_eq!(found, *expected, "{situation}: {:#?}", lint(&facts));
            let knobs = crate::scheduler::knobs::KNOBS;
            assert!(found.iter().all(|(_, knob)| knobs.iter().any(|known| known.name == *knob)), "{situation}");
        }
    }

    #[test]
    fn a_finding_says_the_numbers_that_it_follows_from() {
        let mut facts = quiet();
        facts.in_flight_max = Some(20);
        (facts.policy.rows_max, facts.policy.cells_max) = (64, 4096);
        facts.observed = closed(&[(SealReason::QueueDelay, 500)], 500.0);
        let said: Vec<String> = lint(&facts).findings.into_iter().map(|finding| finding.message).collect();
        assert_eq!(
            said,
            [
                "at 500.0 rows a second a window of 2.000 ms gathers about 2.0 rows of the 64 that fill a batch, which take \
                 126.0 ms to come: no batch is ever full",
                "rows_max is 64, but callers can have at most 20 rows in flight",
                "0.0 % of the last 500 batches were closed full, 100.0 % by queue_delay; at most 5 rows waited at once",
            ]
        );
    }

    #[test]
    fn what_is_attainable_is_what_comes_while_a_batch_is_held_or_the_one_before_runs() {
        let attained = |facts: &Facts| {
            let Attainable { rows, rows_possible } = lint(facts).attainable.expect("enough was seen");
            (rows, rows_possible)
        };
        let mut facts = quiet();
        facts.observed = closed(&[(SealReason::Full, 100)], 1000.0);
        assert_eq!(attained(&facts), (3.0, 8.0), "the one that begins, and two in 2 ms");
        facts.policy.queue_delay_max = Some(Duration::ZERO);
        assert_eq!(attained(&facts).0, 1.0);
        // 1000 rows a second × 3 ms, of rows that take next to nothing themselves.
        facts.fit = Coefficients { batch: 3e6, cell: 1e-6, square: 0.0 };
        assert!((attained(&facts).0 - 3.0).abs() < 1e-6);
        facts.executors = 3;
        assert!((attained(&facts).0 - 1.0).abs() < 1e-6, "each gets a third");
        // Held for a share of what a batch costs: of 3 ms.
        let mut held = facts.clone();
        (held.policy.kind, held.policy.queue_delay_max, held.policy.tuning.hold) = (PolicyKind::Cost, None, 0.5);
        assert!((attained(&held).0 - 2.5).abs() < 1e-6);
        // More than there is time for.
        facts.fit.cell = 1e6;
        assert_eq!(attained(&facts), (8.0, 8.0));
        facts.in_flight_max = Some(5);
        assert_eq!(attained(&facts).0, 5.0);
        assert_eq!(lint(&facts).attainable.map(|attainable| attainable.fill()), Some(5.0 / 8.0));
        facts.observed = Observed::default();
        assert_eq!(lint(&facts).attainable, None);
    }

    #[test]
    fn what_was_decided_recently_under_this_policy_is_summed() {
        let second = |at: f64| Moment::ZERO + Duration::from_secs_f64(at);
        let decision = |at: f64, verdict: Verdict, rows: u32| Decision {
            at: second(at),
            verdict,
            model: ModelHandle(1),
            executor: 0,
            batch: 0,
            rows,
            padded_len: 8,
            rows_possible: 8,
            padding: 0.0,
            shortest: 8,
            waiting: rows + 1,
            predicted: 0,
            efficiency: 0.0,
            best_efficiency: 0.0,
            generation: 2,
        };
        let sealed = Verdict::Sealed(SealReason::Idle);
        let log = [
            Decision { generation: 1, ..decision(1.0, sealed, 100) },
            decision(69.0, sealed, 100),
            decision(71.0, sealed, 3),
            Decision { model: ModelHandle(0), ..decision(72.0, sealed, 100) },
            decision(73.0, Verdict::Held, 0),
            decision(74.0, Verdict::Shed, 2),
            decision(75.0, Verdict::Refused, 9),
        ];
        let observed = Observed::of(log.iter(), ModelHandle(1), 2, second(100.0));
        assert_eq!((observed.rows, observed.batched), (5, 3));
        assert_eq!((observed.batches(), observed.waiting_peak), (1, 10));
        assert_eq!(observed.span, RECENT, "the first was longer ago");
        assert_eq!(observed.mostly(), Some((SealReason::Idle, 1.0)));
        let observed = Observed::of(log[2..].iter(), ModelHandle(1), 2, second(81.0));
        assert_eq!(observed.span, Duration::from_secs(10), "since the first");
        assert_eq!(Observed::of([].iter(), ModelHandle(1), 2, second(1.0)).mostly(), None);
    }

    #[test]
    fn lengths_that_hardly_ever_come_do_not_count_in_the_mean_of_the_others() {
        let shape = |share: f64, room: u32| Shape { len: 10, share, room };
        assert_eq!(mean_room(&[shape(0.5, 8)]), Some(8.0));
        assert_eq!(mean_room(&[shape(0.2, 8), shape(0.6, 4)]), Some(5.0));
        assert_eq!(mean_room(&[]), None);
    }

    #[test]
    fn a_rate_is_believed_from_twenty_batches_on() {
        assert_eq!(closed(&[(SealReason::Idle, BATCHES_MIN - 1)], 10.0).rate(), 0.0);
        assert_eq!(closed(&[(SealReason::Idle, BATCHES_MIN)], 10.0).rate(), 10.0);
    }
}
