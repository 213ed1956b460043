//! The policy `cost`: which rows share a batch, and when it goes.
//!
//! A decision sees the whole queue as one histogram over length buckets with, for each bucket, its rows, their summed age
//! and its soonest deadline. For a fixed set of rows some cheapest partition into batches is contiguous in length (give the
//! batch with the longest row the longest others: no batch grows), so candidates are ranges of buckets.
//!
//! 1. Give up rows that cannot be done by their deadline even alone and at once. Where batches end later than promised (overrun.rs), those
//!    who would most likely be late in the batch chosen, too, while others fill one for each executor.
//! 2. Of all ranges, take the one with the most worth per time of the executor. A row's worth is its work plus a share of a
//!    batch's fixed cost, times its age in units of its slack (the largest-weighted-delay-first rule of Stolyar and Ramanan,
//!    2001, times the rate).
//! 3. If, behind that batch, the rest of the queue in its cheapest partition would miss a deadline that it could still make
//!    alone, take the most urgent part instead, unless that is much less efficient.
//! 4. If the batch would miss a deadline of its own, shrink it, unless that is much less efficient; otherwise give up those
//!    who cannot make it.
//! 5. Hold it only while the next row is expected sooner than it is worth, or for the explicit window.
//!
//! Where rows lie end to end no row makes another dearer: 2 and 3 are then the soonest deadlines of the highest class, as many
//! as the budget holds, and 4 and 5 are the same.
//!
//! Always true
//! - A decision is O(K²) in the buckets that hold rows, whatever the length of the queue, and allocates nothing.
//! - Urgency never chooses a batch below [`super::Tuning::efficiency_floor`] of the best one's efficiency: that is what keeps
//!   overload from feeding itself.

use std::time::Duration;

use super::TicketId;
use super::cost::{OnExecutor, Work};
use super::due::Due;
use super::lane::Lanes;
use super::lengths::{LOOK_AHEAD, WAKE_MARGIN};
use super::policy::{Class, Policy};
use super::tenants::Tenants;
use super::ticket::{Place, Tickets};
use crate::vocab::{Layout, Moment, SealReason};

/// Where and when the batch would run.
#[derive(Clone, Copy, Debug)]
pub struct Outlook {
    pub now: Moment,
    /// When its executor begins with it.
    pub start: Moment,
    /// When the device can begin to compute: later than `start` when executors share it.
    pub device_free: Moment,
    /// Executors that take batches of this model, as a divisor of the time that the rest of the queue needs.
    pub executors: f64,
    /// Executors that share the device.
    pub sharing: f64,
    /// Holding rows back leaves another executor idle, too.
    pub others_idle: bool,
    /// How much longer than expected it takes until a batch is done: [`super::overrun`].
    pub overrun: f64,
    pub draining: bool,
}

/// A batch to form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    pub reason: SealReason,
    /// Its buckets, both included.
    pub shortest: u16,
    pub longest: u16,
    pub rows: u32,
    /// Most cells of its rows, where they lie end to end.
    pub cells: u64,
    /// No further row fits.
    pub full: bool,
    /// In it whatever else is.
    pub anchor: Option<TicketId>,
    /// Classes up to this one only.
    pub lowest_class: usize,
    pub predicted: f64,
    pub efficiency: f64,
    pub best_efficiency: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// Nothing waits that may go.
    Nothing,
    /// Ask again at this moment.
    Hold(Moment),
    Seal(Plan),
}

/// A bucket that holds rows.
#[derive(Clone, Copy, Debug, bincode::Decode, bincode::Encode)]
struct Cell {
    bucket: u16,
    rows: f64,
    /// w(L): time that one row of this length adds.
    row: f64,
    /// What a row counts as: w(L) and a share of a batch's fixed cost.
    credit: f64,
    /// Σ over its rows of worth by class and age.
    worth: f64,
    /// The most worth per row of this and all shorter buckets.
    densest: f64,
    /// Most rows of a batch with this as its longest bucket.
    room: f64,
    due: Moment,
}

/// A range of buckets that hold rows, by their places in the list.
#[derive(Clone, Copy, Debug, Default, bincode::Decode, bincode::Encode)]
struct Range {
    first: usize,
    last: usize,
    rows: f64,
    /// Σ of its rows' credits.
    work: f64,
    /// Time of the executor that it takes.
    occupancy: f64,
}

impl Range {
    fn efficiency(&self) -> f64 {
        if self.occupancy > 0.0 { self.work / self.occupancy } else { 0.0 }
    }
}

/// What is known of a bucket before anything waits in it.
#[derive(Clone, Copy, Debug, Default, bincode::Decode, bincode::Encode)]
struct BucketCost {
    /// w(L).
    row: f64,
    /// Expected time of a batch of one row, in ns.
    alone: f64,
    /// Most rows of a batch.
    budget: f64,
}

/// What one model's policy remembers between decisions, and the memory that decisions are made in.
#[derive(Debug, Default, bincode::Decode, bincode::Encode)]
pub struct Packer {
    buckets: Vec<BucketCost>,
    /// Observations of the cost model when `buckets` was computed.
    buckets_at: Option<(u64, u64)>,
    cells: Vec<Cell>,
    /// Buckets that rows are being taken from, with their soonest deadlines.
    heads: Vec<(Moment, u16)>,
    /// Cheapest time of the cells before each place, and where its last range begins.
    cheapest: Vec<(f64, usize)>,
    /// The cheapest partition: ranges with their soonest deadline.
    parts: Vec<(Moment, Range)>,
    /// Mean slack of what waits, in ns.
    slack: f64,
    /// Mean rows of a batch.
    batch_rows: f64,
    /// Mean time between arrivals, in ns.
    gap: f64,
    last_arrival: Moment,
    /// Until then only classes up to `strict_class` go: one of their deadlines was in danger.
    strict_until: Moment,
    strict_class: usize,
    /// When lane heads are looked at for their age next.
    ages_at: Moment,
}

/// One model's queue, as this policy works on it.
pub struct Queue<'a> {
    pub packer: &'a mut Packer,
    pub lanes: &'a mut Lanes,
    pub tickets: &'a mut Tickets,
    pub due: &'a Due,
    pub policy: &'a Policy,
    /// Of the executor that is decided about.
    pub cost: OnExecutor<'a>,
    pub shed: &'a mut Vec<TicketId>,
}

impl Packer {
    pub fn new(buckets: usize) -> Packer {
        let mut packer = Packer { batch_rows: 1.0, ..Packer::default() };
        packer.resize(buckets);
        packer
    }

    /// What it keeps of buckets is of so many.
    pub fn is_whole(&self, buckets: usize) -> bool {
        self.buckets_at.is_none() || self.buckets.len() == buckets
    }

    /// The policy has other buckets or budgets now.
    pub fn resize(&mut self, buckets: usize) {
        self.buckets = Vec::with_capacity(buckets);
        self.buckets_at = None;
        self.cells = Vec::with_capacity(buckets);
        self.heads = Vec::with_capacity(buckets);
        self.cheapest = Vec::with_capacity(buckets + 1);
        self.parts = Vec::with_capacity(buckets);
    }

    pub fn arrived(&mut self, now: Moment) {
        if self.last_arrival > Moment::ZERO {
            let gap = now.since(self.last_arrival).as_nanos() as f64;
            self.gap += if self.gap == 0.0 { gap } else { 0.05 * (gap - self.gap) };
        }
        self.last_arrival = now;
    }

    pub fn sealed(&mut self, rows: u32) {
        self.batch_rows += 0.1 * (f64::from(rows) - self.batch_rows);
    }
}

impl Queue<'_> {
    /// What to do with an executor that can take a batch.
    ///
    /// Hot: once per batch and per held turn. Guarded by benches/scheduler.rs.
    pub fn decide(&mut self, outlook: &Outlook) -> Outcome {
        let packed = self.policy.layout == Layout::Packed;
        // Giving rows up changes what is best, so look again; a third time would gain nothing.
        for _ in 0..2 {
            let look = if packed { self.look_packed(outlook) } else { self.look(outlook) };
            let Some(plan) = look else { return Outcome::Nothing };
            if self.doubts(outlook) && self.give_up_doubtful(outlook, &plan) {
                continue;
            }
            let fitted =
                if packed { self.fit_deadlines_packed(outlook, plan) } else { self.fit_deadlines(outlook, plan) };
            if let Some(plan) = fitted {
                return self.when(outlook, plan);
            }
        }
        match if packed { self.look_packed(outlook) } else { self.look(outlook) } {
            Some(plan) => self.when(outlook, plan),
            None => Outcome::Nothing,
        }
    }

    /// Step 1, and the classes that may go.
    fn fill(&mut self, outlook: &Outlook) -> Option<usize> {
        let strict = outlook.now < self.packer.strict_until;
        let mut lowest_class = if strict { self.packer.strict_class } else { Class::COUNT - 1 };
        self.fill_cells(outlook, lowest_class);
        if self.packer.cells.is_empty() && strict {
            lowest_class = Class::COUNT - 1;
            self.fill_cells(outlook, lowest_class);
        }
        (!self.packer.cells.is_empty()).then_some(lowest_class)
    }

    /// Steps 1 to 3 where rows lie end to end. Which rows share a batch costs nothing then, so they go by class and deadline,
    /// as many as the budget holds.
    fn look_packed(&mut self, outlook: &Outlook) -> Option<Plan> {
        let lowest_class = self.fill(outlook)?;
        let overdue = self.overdue(outlook.now);
        let (rows, cells, time) = self.waiting();
        let cells_max = self.policy.cells_max as f64;
        let full = rows >= f64::from(self.policy.rows_max) || cells >= cells_max;
        let fixed = self.cost.coefficients().batch;
        let mut share = (cells_max / cells).min(f64::from(self.policy.rows_max) / rows).min(1.0);
        let mut most = self.policy.cells_max;
        let mut correction = 1.0;
        if self.doubts(outlook) {
            correction = self.correction(share * rows, (cells / rows) as u32);
            let slack = self.packer.slack * self.slack_share(outlook) / correction;
            let by_slack = larger(slack - fixed, 0.0) / larger(time, 1e-9);
            if by_slack < share {
                share = larger(by_slack, 1.0 / rows);
                most = larger(share * cells, 1.0) as u64;
            }
        }
        let efficiency = share * time / larger(fixed + share * time, 1e-9);
        let all = &self.packer.cells;
        let (shortest, longest) = (all[0].bucket, all[all.len() - 1].bucket);
        let anchor = overdue.or_else(|| self.soonest_in(outlook, shortest, longest, lowest_class));
        Some(Plan {
            reason: if overdue.is_some() { SealReason::Urgent } else { SealReason::Idle },
            shortest,
            longest,
            rows: self.policy.rows_max,
            cells: most,
            full,
            anchor,
            lowest_class,
            predicted: correction * (fixed + share * time),
            efficiency,
            best_efficiency: efficiency,
        })
    }

    /// Rows that wait, their cells and their time without a batch's fixed cost; each counted as its bucket's longest.
    fn waiting(&self) -> (f64, f64, f64) {
        let mut sums = (0.0, 0.0, 0.0);
        for cell in &self.packer.cells {
            sums.0 += cell.rows;
            sums.1 += cell.rows * f64::from(self.policy.buckets.len_at(cell.bucket));
            sums.2 += cell.rows * cell.row;
        }
        sums
    }

    /// Step 4 where rows lie end to end.
    fn fit_deadlines_packed(&mut self, outlook: &Outlook, plan: Plan) -> Option<Plan> {
        if !self.cost.is_known() {
            return Some(plan);
        }
        let due = self.packer.cells.iter().map(|cell| cell.due).min().unwrap_or(Moment::FAR);
        let fixed = self.cost.coefficients().batch;
        let begin = after(outlook.start, fixed).max(outlook.device_free).since(outlook.start).as_nanos() as f64;
        let run = plan.predicted - fixed;
        let inflate = self.inflate(outlook);
        if due == Moment::FAR || after(outlook.start, (begin + run) * inflate) <= due {
            return Some(plan);
        }
        let fits = larger(due.since(outlook.start).as_nanos() as f64 / inflate - begin, 0.0);
        let efficiency = fits / larger(fixed + fits, 1e-9);
        if fits > 0.0 && efficiency >= self.policy.tuning.efficiency_floor * plan.efficiency {
            let (_, cells, time) = self.waiting();
            let cells = (cells * fits / larger(time, 1e-9)) as u64;
            return Some(Plan {
                reason: SealReason::Urgent,
                cells: cells.clamp(1, plan.cells),
                full: false,
                efficiency,
                predicted: fixed + fits,
                ..plan
            });
        }
        let done = self.at_best(outlook, after(outlook.start, begin + run));
        let before = self.shed.len();
        for bucket in plan.shortest..=plan.longest {
            for class in &Class::ALL[..=plan.lowest_class] {
                if self.lanes.sums(*class, bucket).tickets > 0 {
                    self.give_up_before(*class, bucket, done);
                }
            }
        }
        if self.shed.len() == before { Some(plan) } else { None }
    }

    /// Steps 1 to 3.
    fn look(&mut self, outlook: &Outlook) -> Option<Plan> {
        let lowest_class = self.fill(outlook)?;
        let overdue = self.overdue(outlook.now);
        let best = match overdue {
            Some(id) => self.best_around(outlook, id),
            None => self.best(outlook),
        };
        let mut chosen = best;
        let mut reason = if overdue.is_some() { SealReason::Urgent } else { SealReason::Idle };
        if overdue.is_none()
            && let Some(urgent) = self.urgent(outlook, &best)
        {
            chosen = urgent;
            reason = SealReason::Urgent;
        }
        let cells = &self.packer.cells;
        let (shortest, longest) = (cells[chosen.first].bucket, cells[chosen.last].bucket);
        let len = self.policy.buckets.len_at(longest);
        let anchor = overdue.or_else(|| self.soonest_in(outlook, shortest, longest, lowest_class));
        Some(Plan {
            reason,
            shortest,
            longest,
            rows: chosen.rows as u32,
            cells: u64::MAX,
            full: chosen.rows as u32 >= self.policy.rows_at(len),
            anchor,
            lowest_class,
            predicted: self.cost.predict(chosen.rows as u32, len),
            efficiency: chosen.efficiency(),
            best_efficiency: best.efficiency(),
        })
    }

    /// The ticket with the soonest deadline of all, if these buckets hold it and it can still make it. It may be behind the
    /// head of its lane.
    fn soonest_in(&self, outlook: &Outlook, shortest: u16, longest: u16, lowest_class: usize) -> Option<TicketId> {
        let (due, id) = self.due.first()?;
        let ticket = &self.tickets[id];
        let here = ticket.place == Place::Lane && (shortest..=longest).contains(&ticket.bucket);
        let len = self.policy.buckets.len_at(longest);
        let fits = ticket.rows <= self.policy.rows_at(len) && ticket.class.index() <= lowest_class;
        let hopeless = after(outlook.start, self.cost.alone_at_best(ticket.len)) > due;
        (here && fits && !hopeless).then_some(id)
    }

    /// Computes what follows from the cost model alone, once for each of its observations.
    fn know_buckets(&mut self) {
        if self.packer.buckets_at == Some(self.cost.version()) {
            return;
        }
        let fit = self.cost.coefficients();
        self.packer.buckets.clear();
        self.packer.buckets.extend(self.policy.buckets.lens().iter().map(|len| BucketCost {
            row: fit.row(*len),
            alone: self.cost.alone_at_best(*len),
            budget: f64::from(self.policy.rows_at(*len)),
        }));
        self.packer.buckets_at = Some(self.cost.version());
    }

    /// Gives up the hopeless and lists the buckets that hold rows.
    fn fill_cells(&mut self, outlook: &Outlook, lowest_class: usize) {
        self.know_buckets();
        self.packer.cells.clear();
        let tuning = self.policy.tuning;
        let fixed = self.cost.coefficients().batch;
        let extra = tuning.overhead_worth * fixed / self.packer.batch_rows;
        let (doubts, slack_share) = (self.doubts(outlook), self.slack_share(outlook));
        let (mut all_rows, mut all_urgency) = (0.0, 0.0);
        let now = outlook.now.nanos() as f64;
        let mut densest = 0.0;
        for bucket in 0..self.lanes.buckets() {
            if self.lanes.rows(bucket) == 0 {
                continue;
            }
            let BucketCost { row, alone, budget } = self.packer.buckets[usize::from(bucket)];
            let alone = after(outlook.start, alone);
            let (mut rows, mut worth, mut urgency, mut due) = (0.0, 0.0, 0.0, Moment::FAR);
            for class in &Class::ALL[..=lowest_class] {
                if self.lanes.sums(*class, bucket).tickets == 0 {
                    continue;
                }
                let soonest = self.give_up_before(*class, bucket, alone);
                let sums = self.lanes.sums(*class, bucket);
                if sums.tickets == 0 {
                    continue;
                }
                let of_class = f64::from(sums.rows);
                rows += of_class;
                urgency += sums.urgency;
                worth += tuning.class_worth[class.index()] * (tuning.base_worth * of_class + sums.age(now));
                due = due.min(soonest);
            }
            if rows > 0.0 {
                all_rows += rows;
                all_urgency += urgency;
                // A batch that takes no longer than its rows' mean slack; where not even one row fits that, no batch does.
                let slack = rows * slack_share / larger(urgency, 1e-18);
                let mut by_slack = (slack - fixed) / larger(row, 1e-9);
                if doubts {
                    let correction = self.correction(by_slack.clamp(1.0, budget), self.policy.buckets.len_at(bucket));
                    by_slack = ((slack / correction - fixed) / larger(row, 1e-9)).max(1.0);
                }
                let room = if (1.0..budget).contains(&by_slack) { by_slack as u32 as f64 } else { budget };
                let credit = row + extra;
                let worth = worth * credit;
                densest = larger(densest, worth / rows);
                self.packer.cells.push(Cell { bucket, rows, row, credit, worth, densest, room, due });
            }
        }
        self.packer.slack = all_rows / larger(all_urgency, 1e-18);
        // The heads are the soonest of their lanes where all have the same slack; this one is the soonest in any case.
        if let Some((due, id)) = self.due.first()
            && self.tickets[id].place == Place::Lane
            && let Some(cell) = self.packer.cells.iter_mut().find(|cell| cell.bucket == self.tickets[id].bucket)
            && after(outlook.start, self.cost.alone_at_best(self.tickets[id].len)) <= due
        {
            cell.due = cell.due.min(due);
        }
    }

    /// Gives up the heads of a bucket's lanes that are due before `moment`. Returns the soonest deadline left.
    fn give_up_before(&mut self, class: Class, bucket: u16, moment: Moment) -> Moment {
        let soonest = self.lanes.head_due(class, bucket);
        if soonest >= moment || !self.cost.is_trusted() {
            return soonest;
        }
        for tenant in 0..self.lanes.tenants {
            while self.lanes.lane(tenant, class, bucket).head_due < moment {
                // A prediction that is wrong must not starve the model of the batches that would correct it: the last
                // waiting row goes, hopeless or not.
                if self.due.len() <= self.shed.len() + 1 {
                    return self.lanes.head_due(class, bucket);
                }
                let id = self.lanes.lane(tenant, class, bucket).oldest().expect("it has a deadline");
                self.give_up(id);
            }
        }
        self.lanes.head_due(class, bucket)
    }

    /// Whether experience says that batches end later than the cost model and its margin allow for, and anybody has a deadline.
    fn doubts(&self, outlook: &Outlook) -> bool {
        self.due.len() > 0
            && self.cost.is_known()
            && (!self.cost.is_trusted() || outlook.overrun > 1.0 + 2.0 * self.cost.margin())
    }

    /// What a prediction is multiplied by before a deadline is staked on it.
    fn inflate(&self, outlook: &Outlook) -> f64 {
        let margin = 1.0 + self.cost.margin();
        if self.doubts(outlook) { larger(margin, outlook.overrun) } else { margin }
    }

    /// What such a batch takes beside what the fit says alone: where times scatter, a fit to relative errors is too low.
    fn correction(&self, rows: f64, len: u32) -> f64 {
        let fit = self.cost.coefficients();
        larger(self.cost.predict(rows as u32, len) / larger(fit.batch + rows * fit.row(len), 1.0), 1.0)
    }

    /// Longest batch, as a share of its rows' slack. Where nobody knows how long it takes, half of the slack is for waiting: who
    /// is given up before a batch is one that could not have been in the last one.
    fn slack_share(&self, outlook: &Outlook) -> f64 {
        let share = self.policy.tuning.slack_share;
        if self.doubts(outlook) { 0.5 * share / outlook.overrun } else { share }
    }

    /// Gives up who would most likely be late in this batch, as long as others fill one for each executor: then it costs nothing,
    /// and to compute what is late helps nobody. The lowest class first. Whether any was.
    fn give_up_doubtful(&mut self, outlook: &Outlook, plan: &Plan) -> bool {
        let (rows, cells) = self.packer.cells.iter().fold((0.0, 0.0), |(rows, cells), cell| {
            (rows + cell.rows, cells + cell.rows * f64::from(self.policy.buckets.len_at(cell.bucket)))
        });
        let batch = match self.policy.layout {
            Layout::Padded => f64::from(plan.rows),
            // As many rows as long as these in the mean.
            Layout::Packed => (plan.cells as f64 * rows / cells).min(f64::from(plan.rows)),
        };
        let mut spare = rows - batch * larger(outlook.executors, 1.0);
        let wait = outlook.start.since(outlook.now).as_nanos() as f64;
        let done = after(outlook.now, (wait + plan.predicted) * outlook.overrun);
        let before = self.shed.len();
        for class in Class::ALL[..=plan.lowest_class].iter().rev() {
            for bucket in plan.shortest..=plan.longest {
                for tenant in 0..self.lanes.tenants {
                    while self.lanes.lane(tenant, *class, bucket).head_due < done {
                        let id = self.lanes.lane(tenant, *class, bucket).oldest().expect("it has a deadline");
                        spare -= f64::from(self.tickets[id].rows);
                        if spare < 0.0 {
                            return self.shed.len() > before;
                        }
                        self.give_up(id);
                    }
                }
            }
        }
        self.shed.len() > before
    }

    fn give_up(&mut self, id: TicketId) {
        self.lanes.unlink(self.tickets, self.due, id);
        self.tickets[id].place = Place::Shed;
        self.shed.push(id);
    }

    /// A row that has waited too long for anything else to go first. Looked for now and then: an age of ten slacks need
    /// not be noticed to the microsecond.
    fn overdue(&mut self, now: Moment) -> Option<TicketId> {
        if now < self.packer.ages_at {
            return None;
        }
        let mut oldest: Option<TicketId> = None;
        for cell in 0..self.packer.cells.len() {
            let id = self.lanes.oldest(self.tickets, self.packer.cells[cell].bucket);
            if let Some(id) = id
                && oldest.is_none_or(|oldest| self.tickets[id].came_before(&self.tickets[oldest]))
            {
                oldest = Some(id);
            }
        }
        let ticket = &self.tickets[oldest?];
        let age = now.since(ticket.admitted_at).as_nanos() as f64 * f64::from(ticket.urgency);
        if age >= self.policy.tuning.age_max {
            return oldest;
        }
        self.packer.ages_at = now + self.policy.slo / 4;
        None
    }

    /// Time of the executor that a batch takes. On a device that several share, the fixed part overlaps with others' runs.
    fn occupancy(&self, outlook: &Outlook, rows: f64, row: f64) -> f64 {
        let run = rows * row;
        larger(run, (self.cost.coefficients().batch + run) / outlook.sharing)
    }

    /// The range with the most worth per time.
    fn best(&self, outlook: &Outlook) -> Range {
        let cells = &self.packer.cells;
        let fixed = self.cost.coefficients().batch;
        let sharing = 1.0 / outlook.sharing;
        let (mut best, mut best_worth) = (Range { occupancy: 1.0, ..Range::default() }, -1.0);
        for last in 0..cells.len() {
            let Cell { row: longest, room, .. } = cells[last];
            let (mut rows, mut worth, mut work) = (0.0, 0.0, 0.0);
            for first in (0..=last).rev() {
                let cell = &cells[first];
                let left = room - rows;
                let full = cell.rows >= left;
                if full {
                    rows = room;
                    worth += cell.worth * (left / cell.rows);
                    work += left * cell.credit;
                } else {
                    rows += cell.rows;
                    worth += cell.worth;
                    work += cell.rows * cell.credit;
                }
                let run = rows * longest;
                let occupancy = larger(run, (fixed + run) * sharing);
                if worth * best.occupancy > best_worth * occupancy {
                    best = Range { first, last, rows, work, occupancy };
                    best_worth = worth;
                }
                // A further row adds at most `densest` worth, and at least its run's share of time: where that is less
                // than the best has per time, no longer range is better.
                if full || cell.densest * best.occupancy <= best_worth * longest * sharing {
                    break;
                }
            }
        }
        best
    }

    /// The range with the most worth per time among those that this ticket fits in.
    fn best_around(&self, outlook: &Outlook, id: TicketId) -> Range {
        let cells = &self.packer.cells;
        let ticket = &self.tickets[id];
        let with = cells.iter().position(|cell| cell.bucket == ticket.bucket).expect("it waits in a listed bucket");
        let (mut best, mut best_worth) = (Range { occupancy: 1.0, ..Range::default() }, -1.0);
        for last in with..cells.len() {
            let budget = self.policy.rows_at(self.policy.buckets.len_at(cells[last].bucket));
            if ticket.rows > budget {
                break;
            }
            let room = cells[last].room.max(f64::from(ticket.rows));
            let (mut rows, mut worth, mut work) = (0.0, 0.0, 0.0);
            for first in (0..=last).rev() {
                rows += cells[first].rows;
                worth += cells[first].worth;
                work += cells[first].rows * cells[first].credit;
                if first > with {
                    continue;
                }
                let share = (room / rows).min(1.0);
                let occupancy = self.occupancy(outlook, rows * share, cells[last].row);
                if worth * share * best.occupancy > best_worth * occupancy {
                    best = Range { first, last, rows: rows * share, work: work * share, occupancy };
                    best_worth = worth * share;
                }
                if rows >= room {
                    break;
                }
            }
        }
        best.rows = best.rows.max(f64::from(ticket.rows));
        best
    }

    /// The most urgent part of the rest, if some part of the rest would miss behind `best` a deadline that it could make
    /// alone, and the most urgent is efficient enough.
    fn urgent(&mut self, outlook: &Outlook, best: &Range) -> Option<Range> {
        if !self.cost.is_known() {
            return None;
        }
        let margin = 1.0 + self.cost.margin();
        let fixed = self.cost.coefficients().batch;
        let cells = &self.packer.cells;
        let soonest = cells.iter().map(|cell| cell.due).min()?;
        if soonest == Moment::FAR {
            return None;
        }
        let behind_best = best.occupancy / outlook.executors * margin;
        let everything: f64 =
            cells.iter().map(|cell| cell.rows * cell.row + fixed * (cell.rows / cell.room + 1.0)).sum();
        let horizon = after(outlook.start, behind_best + everything * margin);
        if soonest > horizon {
            return None;
        }
        self.partition(outlook);
        let Packer { parts, cells, .. } = &mut *self.packer;
        parts.retain(|(due, part)| (part.last < best.first || part.first > best.last) && *due <= horizon);
        parts.sort_unstable_by_key(|(due, part)| (*due, part.first));
        let mut time = behind_best;
        // By how much the batch in front has to be shorter, and the first part that is in danger.
        let (mut excess, mut missed) = (0.0f64, None);
        for (at, (due, part)) in parts.iter().enumerate() {
            time += part.occupancy / outlook.executors * margin;
            let alone = (fixed + part.rows.min(cells[part.last].room) * cells[part.last].row) * margin;
            let left = due.since(outlook.start).as_nanos() as f64;
            if time > left && alone <= left {
                excess = excess.max(time - left);
                missed.get_or_insert(at);
            }
        }
        let (due, urgent) = *parts.first()?;
        let danger = parts[missed?].1;
        if self.class_at_risk(&danger) == 0 {
            self.packer.strict_class = 0;
            self.packer.strict_until = outlook.now + due.since(outlook.now) / 2;
        }
        let floor = self.policy.tuning.efficiency_floor * best.efficiency();
        let urgent = self.part_as_batch(outlook, urgent);
        let shorter = self.shortened(outlook, best, excess / margin * outlook.executors);
        let better = |range: &Range| range.efficiency() >= floor;
        if better(&urgent) { Some(urgent) } else { shorter.filter(better) }
    }

    /// The batch with fewer rows, so that it takes this much less time.
    fn shortened(&self, outlook: &Outlook, best: &Range, by: f64) -> Option<Range> {
        let row = self.packer.cells[best.last].row;
        let rows = ((best.rows * row - by) / row).floor();
        (rows >= 1.0).then(|| Range {
            rows,
            work: best.work * rows / best.rows,
            occupancy: self.occupancy(outlook, rows, row),
            ..*best
        })
    }

    /// The highest class with rows in a range.
    fn class_at_risk(&self, range: &Range) -> usize {
        let cells = &self.packer.cells[range.first..=range.last];
        let holds = |class: &&Class| cells.iter().any(|cell| self.lanes.sums(**class, cell.bucket).tickets > 0);
        Class::ALL.iter().find(holds).map_or(0, |class| class.index())
    }

    /// The first batch of a part.
    fn part_as_batch(&self, outlook: &Outlook, part: Range) -> Range {
        let cells = &self.packer.cells;
        let rows = part.rows.min(cells[part.last].room);
        let work = part.work * (rows / part.rows);
        Range { rows, work, occupancy: self.occupancy(outlook, rows, cells[part.last].row), ..part }
    }

    /// The cheapest partition of all rows into contiguous ranges, by dynamic programming over the buckets that hold rows.
    fn partition(&mut self, outlook: &Outlook) {
        let fixed = self.cost.coefficients().batch;
        let sharing = 1.0 / outlook.sharing;
        let Packer { cells, cheapest, parts, .. } = &mut *self.packer;
        cheapest.clear();
        cheapest.push((0.0, 0));
        for last in 0..cells.len() {
            let Cell { row, room, .. } = cells[last];
            let per_room = 1.0 / room;
            let (mut rows, mut best) = (0.0, (f64::INFINITY, last));
            // A bucket half way down in cost, and the rows above it.
            let (mut middle, mut above) = (last, 0.0);
            for first in (0..=last).rev() {
                let cell = &cells[first];
                rows += cell.rows;
                let run = rows * row;
                let time = larger(run, (fixed * whole(rows * per_room) + run) * sharing);
                let total = cheapest[first].0 + time;
                if total < best.0 {
                    best = (total, first);
                }
                while 2.0 * cells[middle].row > row + cell.row {
                    above += cells[middle].rows;
                    middle -= 1;
                }
                // Two ranges that part at the middle take one batch more at most. If the rows up to there are padded by
                // more than that, this range is not the cheapest, and no longer one is.
                if (rows - above) * (row - cells[middle].row) > fixed {
                    break;
                }
            }
            cheapest.push(best);
        }
        parts.clear();
        let mut end = cells.len();
        while end > 0 {
            let first = cheapest[end].1;
            let of = &cells[first..end];
            let range = Range {
                first,
                last: end - 1,
                rows: of.iter().map(|cell| cell.rows).sum(),
                work: of.iter().map(|cell| cell.rows * cell.credit).sum(),
                occupancy: cheapest[end].0 - cheapest[first].0,
            };
            let due = of.iter().map(|cell| cell.due).min().unwrap_or(Moment::FAR);
            parts.push((due, range));
            end = first;
        }
    }

    /// When a batch of this size is expected to be done.
    fn done_at(&self, outlook: &Outlook, rows: f64, longest: u16, inflate: f64) -> Moment {
        let time = self.cost.predict(rows as u32, self.policy.buckets.len_at(longest)) * inflate;
        if outlook.sharing <= 1.0 {
            return after(outlook.start, time);
        }
        let fixed = (self.cost.coefficients().batch * inflate).min(time);
        after(after(outlook.start, fixed).max(outlook.device_free), time - fixed)
    }

    /// Step 4. `None` when rows were given up, so that the queue has to be looked at again.
    fn fit_deadlines(&mut self, outlook: &Outlook, plan: Plan) -> Option<Plan> {
        if !self.cost.is_known() {
            return Some(plan);
        }
        let cells = &self.packer.cells;
        let inside = |cell: &&Cell| cell.bucket >= plan.shortest && cell.bucket <= plan.longest;
        let due = cells.iter().filter(inside).map(|cell| cell.due).min().unwrap_or(Moment::FAR);
        let rows = f64::from(plan.rows);
        let inflate = self.inflate(outlook);
        if due == Moment::FAR || self.done_at(outlook, rows, plan.longest, inflate) <= due {
            return Some(plan);
        }
        let last = cells.iter().find(|cell| cell.bucket == plan.longest).expect("planned from it");
        let fixed = self.cost.coefficients().batch;
        let begin = after(outlook.start, fixed).max(outlook.device_free).since(outlook.start).as_nanos() as f64;
        let time = due.since(outlook.start).as_nanos() as f64 / inflate;
        let fits = if last.row > 0.0 { ((time - begin) / last.row).floor().min(rows) } else { rows };
        if fits >= 1.0 {
            let per_row = plan.efficiency * self.occupancy(outlook, rows, last.row) / rows;
            let efficiency = fits * per_row / self.occupancy(outlook, fits, last.row);
            if efficiency >= self.policy.tuning.efficiency_floor * plan.efficiency {
                let predicted = self.cost.predict(fits as u32, self.policy.buckets.len_at(plan.longest));
                let rows = fits as u32;
                return Some(Plan { rows, full: false, reason: SealReason::Urgent, efficiency, predicted, ..plan });
            }
        }
        let done = self.at_best(outlook, self.done_at(outlook, rows, plan.longest, 1.0));
        let before = self.shed.len();
        for bucket in plan.shortest..=plan.longest {
            for class in &Class::ALL[..=plan.lowest_class] {
                if self.lanes.sums(*class, bucket).tickets > 0 {
                    self.give_up_before(*class, bucket, done);
                }
            }
        }
        if self.shed.len() == before { Some(plan) } else { None }
    }

    /// When the fastest executor would be done with what this one ends at `done`. Nothing is given up that another could do.
    fn at_best(&self, outlook: &Outlook, done: Moment) -> Moment {
        match self.cost.best_share() {
            share if share < 1.0 => outlook.start + done.since(outlook.start).mul_f64(share),
            _ => done,
        }
    }

    /// Step 5.
    fn when(&mut self, outlook: &Outlook, plan: Plan) -> Outcome {
        let len = self.policy.buckets.len_at(plan.longest);
        let seal = |reason| Outcome::Seal(Plan { reason, ..plan });
        if plan.full {
            return seal(SealReason::Full);
        }
        if outlook.draining {
            return seal(SealReason::Drain);
        }
        if plan.reason == SealReason::Urgent {
            return seal(SealReason::Urgent);
        }
        let due = self.due.first().map_or(Moment::FAR, |(due, _)| due);
        let grown = match self.policy.layout {
            Layout::Padded => self.cost.predict(plan.rows + 1, len),
            Layout::Packed => plan.predicted + self.cost.coefficients().row(len),
        };
        let grown = grown * self.inflate(outlook);
        let latest = if due == Moment::FAR { due } else { due - Duration::from_nanos(grown as u64) - WAKE_MARGIN };
        match self.policy.queue_delay_max {
            Some(Duration::ZERO) => seal(SealReason::Idle),
            Some(window) => {
                let oldest = (0..self.packer.cells.len())
                    .filter_map(|at| self.lanes.oldest(self.tickets, self.packer.cells[at].bucket))
                    .map(|id| self.tickets[id].admitted_at)
                    .min()
                    .unwrap_or(outlook.now);
                if oldest + window <= outlook.now {
                    seal(SealReason::QueueDelay)
                } else if latest <= outlook.now {
                    seal(SealReason::Deadline)
                } else {
                    Outcome::Hold((oldest + window).min(latest))
                }
            }
            None => {
                // Until the next row is expected to come, those who wait lose that time each; it saves a batch's fixed
                // cost once.
                let waiting: f64 = self.packer.cells.iter().map(|cell| cell.rows).sum();
                let gain = self.policy.tuning.hold * self.cost.coefficients().batch;
                let quiet = outlook.now.since(self.packer.last_arrival).as_nanos() as f64;
                let gap = self.packer.gap.max(quiet);
                let pays = self.cost.is_known() && self.packer.gap > 0.0 && (waiting + 1.0) * gap < gain;
                let latest = latest - Duration::from_nanos((gap as u64).saturating_mul(2));
                if outlook.others_idle {
                    seal(SealReason::Idle)
                } else if !pays {
                    seal(SealReason::Economic)
                } else if latest <= outlook.now {
                    seal(SealReason::Deadline)
                } else {
                    // Rounded down, it could be a nanosecond before the inequality turns; then there is nothing to wait for.
                    let until = after(self.packer.last_arrival, gain / (waiting + 1.0)).min(latest);
                    if until > outlook.now { Outcome::Hold(until) } else { seal(SealReason::Economic) }
                }
            }
        }
    }

    /// Takes the planned rows: the highest class first, in it the soonest deadline, and in a bucket the tenant that is
    /// furthest behind.
    pub fn take(&mut self, plan: &Plan, tenants: &mut Tenants, members: &mut Vec<TicketId>) {
        let padded_len = match self.policy.layout {
            Layout::Padded => Some(self.policy.buckets.len_at(plan.longest)),
            Layout::Packed => None,
        };
        let mut room = Room { rows: plan.rows, cells: plan.cells, padded_len };
        if let Some(id) = plan.anchor {
            self.take_one(id, &mut room, tenants, members);
        }
        for class in &Class::ALL[..=plan.lowest_class] {
            let mut work = Work::default();
            for bucket in plan.shortest..=plan.longest {
                work.add(self.lanes.sums(*class, bucket).rows, self.policy.buckets.len_at(bucket));
            }
            if work.rows == 0 || room.is_used_up() {
                continue;
            }
            if room.holds(work.rows, work.cells) {
                for bucket in (plan.shortest..=plan.longest).rev() {
                    while self.lanes.sums(*class, bucket).tickets > 0 {
                        self.take_next(*class, bucket, &mut room, tenants, members);
                    }
                }
                continue;
            }
            let mut heads = std::mem::take(&mut self.packer.heads);
            heads.clear();
            let holding = (plan.shortest..=plan.longest).filter(|bucket| self.lanes.sums(*class, *bucket).tickets > 0);
            heads.extend(holding.map(|bucket| (self.turn_of(*class, bucket), bucket)));
            while !room.is_used_up() {
                let soonest = (0..heads.len()).reduce(|a, b| if heads[b].0 <= heads[a].0 { b } else { a });
                let Some(at) = soonest else { break };
                let bucket = heads[at].1;
                let taken = self.take_next(*class, bucket, &mut room, tenants, members);
                if !taken || self.lanes.sums(*class, bucket).tickets == 0 {
                    heads.swap_remove(at);
                } else {
                    heads[at].0 = self.turn_of(*class, bucket);
                }
            }
            self.packer.heads = heads;
        }
        if members.is_empty() {
            // A head of more rows than the plan has: it fits a batch of its own, so it gets one.
            let bucket = (plan.shortest..=plan.longest).rev().find(|bucket| self.lanes.rows(*bucket) > 0);
            let bucket = bucket.expect("a plan is made of buckets that hold rows");
            let id = self.lanes.oldest(self.tickets, bucket).expect("it holds rows");
            self.take_one(id, &mut room, tenants, members);
        }
    }

    /// When the first of a bucket's rows is due, those without a deadline at the end of their slack: among them it is age that
    /// counts, not the bucket.
    fn turn_of(&self, class: Class, bucket: u16) -> Moment {
        let heads = (0..self.lanes.tenants).filter_map(|tenant| {
            let lane = self.lanes.lane(tenant, class, bucket);
            let head = &self.tickets[lane.oldest()?];
            let patience = || after(head.admitted_at, 1.0 / f64::from(head.urgency));
            Some(if lane.head_due == Moment::FAR { patience() } else { lane.head_due })
        });
        heads.min().unwrap_or(Moment::FAR)
    }

    /// Takes one ticket of a bucket that fits. False when none does.
    fn take_next(
        &mut self,
        class: Class,
        bucket: u16,
        room: &mut Room,
        tenants: &mut Tenants,
        members: &mut Vec<TicketId>,
    ) -> bool {
        let mut best: Option<(f64, TicketId)> = None;
        for tenant in 0..self.lanes.tenants {
            let Some(head) = self.lanes.lane(tenant, class, bucket).oldest() else { continue };
            let time = if self.lanes.tenants == 1 { 0.0 } else { tenants.time(tenant) };
            if best.is_none_or(|(least, _)| time < least)
                && let Some(id) = self.fitting(head, &*room)
            {
                best = Some((time, id));
            }
        }
        let Some((_, id)) = best else { return false };
        self.take_one(id, room, tenants, members);
        true
    }

    /// The first of a lane, from `head`, that there is room for.
    fn fitting(&self, head: TicketId, room: &Room) -> Option<TicketId> {
        let mut next = Some(head);
        for _ in 0..LOOK_AHEAD {
            let id = next?;
            let ticket = &self.tickets[id];
            if room.holds(ticket.rows, u64::from(ticket.rows) * u64::from(ticket.len)) {
                return Some(id);
            }
            next = self.lanes.after(self.tickets, id);
        }
        None
    }

    fn take_one(&mut self, id: TicketId, room: &mut Room, tenants: &mut Tenants, members: &mut Vec<TicketId>) {
        self.lanes.unlink(self.tickets, self.due, id);
        let ticket = &self.tickets[id];
        let (rows, len) = (ticket.rows, room.padded_len.unwrap_or(ticket.len));
        tenants.charge(ticket.tenant, u64::from(rows) * u64::from(len));
        room.use_up(rows, u64::from(rows) * u64::from(len));
        members.push(id);
    }
}

/// What a batch still has room for.
struct Room {
    rows: u32,
    /// Of the rows' own cells. Where they are padded it is the rows that say how much fits.
    cells: u64,
    padded_len: Option<u32>,
}

impl Room {
    fn holds(&self, rows: u32, cells: u64) -> bool {
        rows <= self.rows && (self.padded_len.is_some() || cells <= self.cells)
    }

    fn is_used_up(&self) -> bool {
        self.rows == 0 || self.cells == 0
    }

    fn use_up(&mut self, rows: u32, cells: u64) {
        self.rows = self.rows.saturating_sub(rows);
        if self.padded_len.is_none() {
            self.cells = self.cells.saturating_sub(cells);
        }
    }
}

/// The larger of two numbers that are not NaN; `f64::max` is a call where the processor's rules for NaN differ.
fn larger(a: f64, b: f64) -> f64 {
    if a > b { a } else { b }
}

/// The next whole number of a small positive one; `f64::ceil` is a call on processors of the baseline.
fn whole(x: f64) -> f64 {
    let below = x as u32 as f64;
    if below < x { below + 1.0 } else { below }
}

fn after(moment: Moment, nanos: f64) -> Moment {
    Moment(moment.nanos().saturating_add(nanos.max(0.0) as u64))
}

#[cfg(test)]
#[path = "packing_tests.rs"]
mod tests;
