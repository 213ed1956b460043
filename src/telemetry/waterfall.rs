//! Where the executors' time goes: each nanosecond of each executor is in exactly one of [`Part::ALL`].
//!
//! Pure: moments come in as arguments, so that a server, a simulation and a replay of a trace tell alike.
//!
//! | part | the executor |
//! | --- | --- |
//! | `useful` | computed cells that callers sent |
//! | `padding_longest_row` | computed cells between a row's end and the longest row of its batch |
//! | `padding_bucket` | computed cells between the longest row and the bucket |
//! | `padding_rounding` | computed cells that the device adds: it computes in whole tiles, a processor in whole vectors |
//! | `overhead_launch` | had a batch's fixed cost: asking a device, and what the cost model says every batch takes |
//! | `overhead_copy` | waited for this batch's own copies, with nothing to compute meanwhile |
//! | `idle_hold` | was idle: rows waited, and the scheduler held them back, for others to join or for another model's share |
//! | `idle_packing` | was idle: its batch was being packed |
//! | `idle_mailbox` | was idle: a message was on its way, and whoever had to act did not know yet |
//! | `idle_copy` | was idle: its batch was there, and all memory for copies was in use |
//! | `idle_scatter` | was busy with the answers of its last batch while others waited |
//! | `idle_empty` | was idle, and nothing waited that it could have run |
//!
//! A batch's run is split by cells, after the share of it that is fixed cost. Rows that lie end to end have no padding. What
//! waits is of no executor until a batch is sealed: every idle executor of a group is idle while work waits.
//!
//! Always true
//! - The parts of an executor add up to the time since it began, to the nanosecond, in whatever order moments come: time only
//!   goes forward, what is said about the past of an account changes nothing, and no part ever shrinks.
//! - Parts other than the idle ones grow in [`Waterfall::finished`] only, by what it returns.
//!
//! Elsewhere: who tells it (batcher/times.rs, replay/ledger.rs), how others read it while it is written (times.rs).

use crate::vocab::{Moment, Run};

/// What an executor did with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Useful,
    PaddingLongestRow,
    PaddingBucket,
    PaddingRounding,
    OverheadLaunch,
    OverheadCopy,
    IdleHold,
    IdlePacking,
    IdleMailbox,
    IdleCopy,
    IdleScatter,
    IdleEmpty,
}

/// Names of the parts, in their order.
pub const PARTS: [&str; 12] = [
    "useful",
    "padding_longest_row",
    "padding_bucket",
    "padding_rounding",
    "overhead_launch",
    "overhead_copy",
    "idle_hold",
    "idle_packing",
    "idle_mailbox",
    "idle_copy",
    "idle_scatter",
    "idle_empty",
];

impl Part {
    pub const ALL: [Part; PARTS.len()] = [
        Part::Useful,
        Part::PaddingLongestRow,
        Part::PaddingBucket,
        Part::PaddingRounding,
        Part::OverheadLaunch,
        Part::OverheadCopy,
        Part::IdleHold,
        Part::IdlePacking,
        Part::IdleMailbox,
        Part::IdleCopy,
        Part::IdleScatter,
        Part::IdleEmpty,
    ];

    pub fn name(self) -> &'static str {
        PARTS[self as usize]
    }

    /// It is a batch's: its run, or what only its run makes necessary.
    pub fn is_of_a_batch(self) -> bool {
        (self as usize) < Part::IdleHold as usize
    }
}

/// Nanoseconds by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts(pub [u64; PARTS.len()]);

impl Parts {
    pub fn get(&self, part: Part) -> u64 {
        self.0[part as usize]
    }

    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Of batches, all but the idle parts.
    pub fn of_batches(&self) -> u64 {
        Part::ALL.into_iter().filter(|part| part.is_of_a_batch()).map(|part| self.get(part)).sum()
    }

    pub fn add(&mut self, other: &Parts) {
        self.0.iter_mut().zip(other.0).for_each(|(mine, theirs)| *mine += theirs);
    }
}

/// What a batch computes: cells by cause. Their sum is all of it, but for a device's rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cells {
    /// That callers sent.
    pub real: u64,
    /// From the rows' ends to the longest of them.
    pub longest_row: u64,
    /// From there to the bucket.
    pub bucket: u64,
}

impl Cells {
    /// Of so many rows, the longest of which has `longest` cells. `padded`: all that is computed, `real` the part of it that
    /// callers sent. Rows end to end are padded to nothing.
    pub fn of(rows: u32, longest: u32, real: u64, padded: u64) -> Cells {
        let real = real.min(padded);
        let to_longest = (u64::from(rows) * u64::from(longest)).clamp(real, padded);
        Cells { real, longest_row: to_longest - real, bucket: padded - to_longest }
    }

    pub fn all(&self) -> u64 {
        self.real + self.longest_row + self.bucket
    }
}

/// A batch that an executor holds.
#[derive(Clone, Copy, Debug)]
struct Pending {
    batch: u64,
    sealed_at: Moment,
    /// Since when something waited that the executor could have run.
    waited_from: Moment,
    cells: Cells,
    /// Share of its run that every batch takes, whatever is in it.
    fixed: f64,
}

/// What the executor still did for the last batch, after computing it.
#[derive(Clone, Copy, Debug, Default)]
struct Tail {
    copied_at: Moment,
    answered_at: Moment,
}

/// One executor's books.
#[derive(Clone, Debug)]
struct Account {
    begin: Moment,
    /// Everything before is in `parts`.
    until: Moment,
    parts: Parts,
    /// What goes on from `until` until more is known: one of the idle parts. `None`: that comes out when the next batch is
    /// finished or sealed.
    state: Option<Part>,
    tail: Tail,
    pending: Vec<Pending>,
}

/// What others may know of an account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    pub begin: Moment,
    pub until: Moment,
    pub parts: Parts,
    pub state: Option<Part>,
}

impl View {
    /// As it is at `now`, if nothing has happened since.
    pub fn extended(mut self, now: Moment) -> View {
        if let Some(part) = self.state
            && now > self.until
        {
            self.parts.0[part as usize] += now.nanos() - self.until.nanos();
            self.until = now;
        }
        self
    }

    /// The time that the parts must add up to.
    pub fn elapsed(&self) -> u64 {
        self.until.nanos() - self.begin.nanos()
    }
}

impl Account {
    fn new(begin: Moment) -> Account {
        Account {
            begin,
            until: begin,
            parts: Parts::default(),
            state: Some(Part::IdleEmpty),
            tail: Tail::default(),
            // As many as it has slots; more only grow the list.
            pending: Vec::with_capacity(4),
        }
    }

    fn view(&self) -> View {
        View { begin: self.begin, until: self.until, parts: self.parts, state: self.state }
    }

    /// Everything up to `to` that is not accounted for was this.
    fn advance(&mut self, to: Moment, part: Part) {
        if to > self.until {
            self.parts.0[part as usize] += to.nanos() - self.until.nanos();
            self.until = to;
        }
    }

    /// The same of an idle executor for which something has waited since `waited_from`.
    fn idle(&mut self, to: Moment, part: Part, waited_from: Moment) {
        self.advance(to.min(waited_from), Part::IdleEmpty);
        self.advance(to, part);
    }

    /// Somebody was shown that what goes on went on until then: it cannot become anything else.
    fn shown(&mut self, until: Moment) {
        if let Some(part) = self.state {
            self.advance(until, part);
        }
    }

    /// An executor that holds no batch, up to `now`: what it was kept idle by.
    fn settle(&mut self, now: Moment, held_until: Moment, waited_from: Moment) {
        match self.state {
            Some(Part::IdleHold) => {
                self.advance(now.min(held_until), Part::IdleHold);
                // The scheduler wanted to decide then, and was not asked.
                self.advance(now, Part::IdleMailbox);
            }
            Some(_) => self.idle(now, Part::IdleMailbox, waited_from),
            None => {
                self.idle(self.tail.answered_at.min(now), Part::IdleScatter, waited_from);
                self.idle(now, Part::IdleMailbox, waited_from);
            }
        }
    }

    /// A batch was sealed for it.
    fn sealed(&mut self, now: Moment, held_until: Moment, waited_from: Moment, batch: u64, cells: Cells, fixed: f64) {
        let waited_from = waited_from.min(now);
        if self.pending.is_empty() {
            self.settle(now, held_until, waited_from);
        }
        self.state = None;
        let fixed = if fixed.is_finite() { fixed.clamp(0.0, 1.0) } else { 0.0 };
        self.pending.push(Pending { batch, sealed_at: now, waited_from, cells, fixed });
    }

    /// It has run a batch. Returns what the batch took of its time, in ns.
    fn finished(&mut self, batch: u64, run: &Run) -> u64 {
        let before = self.parts.of_batches();
        let place = self.pending.iter().position(|pending| pending.batch == batch);
        let unknown =
            Pending { batch, sealed_at: Moment::ZERO, waited_from: Moment::ZERO, cells: Cells::default(), fixed: 0.0 };
        let pending = place.map_or(unknown, |place| self.pending.remove(place));
        // Why it had not begun before. What is over already, or is said to be later than the run, takes no time.
        let (began, waited) = (run.began_at, pending.waited_from);
        self.advance(self.tail.copied_at.min(began), Part::OverheadCopy);
        self.idle(self.tail.answered_at.min(began), Part::IdleScatter, waited);
        self.idle(pending.sealed_at.min(began), Part::IdleMailbox, waited);
        self.idle(run.packed_at.min(began), Part::IdlePacking, waited);
        self.idle(run.taken_at.min(began), Part::IdleMailbox, waited);
        self.idle(run.asked_at.min(began), Part::IdleCopy, waited);
        self.advance(began - run.uploaded_in, Part::OverheadLaunch);
        self.advance(began, Part::OverheadCopy);
        if run.ended_at > self.until {
            let nanos = run.ended_at.nanos() - self.until.nanos();
            self.split(nanos, run, &pending);
            self.until = run.ended_at;
        }
        self.tail = Tail { copied_at: run.copied_at, answered_at: run.answered_at };
        if self.pending.is_empty() {
            // Nothing was there to be computed meanwhile.
            self.advance(run.copied_at, Part::OverheadCopy);
        }
        self.parts.of_batches() - before
    }

    /// Splits the time between a batch's beginning and its end.
    fn split(&mut self, nanos: u64, run: &Run, pending: &Pending) {
        let computed = u64::try_from(run.computed_in.as_nanos()).unwrap_or(u64::MAX).min(nanos);
        let fixed = ((computed as f64 * pending.fixed) as u64).min(computed);
        let cells = &pending.cells;
        let rounding = run.cells.saturating_sub(cells.all());
        let by_cells = [
            (Part::Useful, cells.real),
            (Part::PaddingLongestRow, cells.longest_row),
            (Part::PaddingBucket, cells.bucket),
            (Part::PaddingRounding, rounding),
        ];
        let mut add = |part: Part, nanos: u64| self.parts.0[part as usize] += nanos;
        add(Part::OverheadCopy, nanos - computed);
        add(Part::OverheadLaunch, fixed);
        let shares = by_cells.map(|(_, cells)| cells);
        divide(computed - fixed, shares, |at, nanos| add(by_cells[at].0, nanos));
    }

    /// A turn is over, and it holds no batch.
    fn rest(&mut self, now: Moment, held_until: Moment, waits_since: Option<Moment>) {
        self.settle(now, held_until, waits_since.unwrap_or(Moment::FAR));
        self.state = Some(if waits_since.is_some() { Part::IdleHold } else { Part::IdleEmpty });
    }
}

/// Divides a whole in proportion to shares, without losing any of it: all of it to the first where no share is more than 0.
/// The sum of the shares must fit 64 bits.
pub fn divide(whole: u64, shares: impl IntoIterator<Item = u64> + Clone, mut each: impl FnMut(usize, u64)) {
    let all: u128 = shares.clone().into_iter().map(u128::from).sum();
    if all == 0 {
        return each(0, whole);
    }
    let (mut up_to, mut given) = (0u128, 0u64);
    for (at, share) in shares.into_iter().enumerate() {
        up_to += u128::from(share);
        let due = (u128::from(whole) * up_to / all) as u64;
        each(at, due - given);
        given = due;
    }
}

/// Groups of executors: each runs models of its own.
pub const GROUPS: usize = 2;

/// The books of all executors of a server, or of a replay.
#[derive(Clone, Debug)]
pub struct Waterfall {
    /// With its group.
    accounts: Vec<(usize, Account)>,
    /// By group: since when something waits, as the last turn left it.
    since: [Option<Moment>; GROUPS],
    /// By group: when the first came that came after.
    came: [Option<Moment>; GROUPS],
    /// When the scheduler wants to be asked again, as the last turn left it.
    held_until: Moment,
}

impl Waterfall {
    /// Executors, each of a group, whose books begin now.
    pub fn new(begin: Moment, groups: impl IntoIterator<Item = usize>) -> Waterfall {
        let account = |group: usize| {
            assert!(group < GROUPS, "there are {GROUPS} groups");
            (group, Account::new(begin))
        };
        Waterfall {
            accounts: groups.into_iter().map(account).collect(),
            since: [None; GROUPS],
            came: [None; GROUPS],
            held_until: Moment::FAR,
        }
    }

    pub fn executors(&self) -> usize {
        self.accounts.len()
    }

    pub fn view(&self, executor: usize) -> View {
        self.accounts[executor].1.view()
    }

    /// Somebody was shown that what an executor does went on until then.
    pub fn shown(&mut self, executor: usize, until: Moment) {
        self.accounts[executor].1.shown(until);
    }

    /// Work of a group came to the server then. It is in the scheduler's hands when the turn begins.
    pub fn came(&mut self, group: usize, at: Moment) {
        let came = &mut self.came[group];
        *came = Some(came.map_or(at, |first| first.min(at)));
    }

    /// A batch was sealed for an executor. `fixed`: the share of its run that every batch takes, as far as known.
    pub fn sealed(&mut self, now: Moment, executor: usize, batch: u64, cells: Cells, fixed: f64) {
        let (group, account) = &mut self.accounts[executor];
        let came = self.came[*group];
        let waited_from = self.since[*group].or(came).unwrap_or(now);
        // What came last ended the hold, if the window's end did not.
        let held_until = self.held_until.min(came.unwrap_or(Moment::FAR));
        account.sealed(now, held_until, waited_from, batch, cells, fixed);
    }

    /// An executor has run a batch. Returns what that took of its time, in ns.
    pub fn finished(&mut self, executor: usize, batch: u64, run: &Run) -> u64 {
        self.accounts[executor].1.finished(batch, run)
    }

    /// A turn is over: `waits` says by group whether something waits. Call [`Waterfall::rest`] for each executor that
    /// [`Waterfall::is_to_rest`], and then [`Waterfall::turned`].
    pub fn turning(&mut self, now: Moment, waits: [bool; GROUPS]) {
        for (group, waits) in waits.into_iter().enumerate() {
            let since = self.since[group].or(self.came[group]).unwrap_or(now);
            self.since[group] = waits.then_some(since);
        }
    }

    /// Whether the end of a turn says something new about an executor.
    pub fn is_to_rest(&self, executor: usize, now: Moment) -> bool {
        let (group, account) = &self.accounts[executor];
        account.pending.is_empty()
            && match (account.state, self.since[*group]) {
                (Some(Part::IdleHold), Some(_)) => now > self.held_until,
                (Some(Part::IdleEmpty), None) => false,
                _ => true,
            }
    }

    pub fn rest(&mut self, executor: usize, now: Moment) {
        let (group, account) = &mut self.accounts[executor];
        account.rest(now, self.held_until, self.since[*group]);
    }

    /// The turn's last word: when the scheduler wants to be asked again.
    pub fn turned(&mut self, wake: Option<Moment>) {
        self.came = [None; GROUPS];
        self.held_until = wake.unwrap_or(Moment::FAR);
    }

    /// All of a turn's end at once.
    pub fn turn(&mut self, now: Moment, waits: [bool; GROUPS], wake: Option<Moment>) {
        self.turning(now, waits);
        for executor in 0..self.executors() {
            if self.is_to_rest(executor, now) {
                self.rest(executor, now);
            }
        }
        self.turned(wake);
    }
}

/// The parts of executors, and whether each is the batcher's own thread, in seconds: of each, and summed over those that are
/// threads of their own.
pub fn json(executors: impl IntoIterator<Item = (bool, Parts)>) -> serde_json::Value {
    let seconds = |parts: &Parts| -> serde_json::Map<String, serde_json::Value> {
        PARTS.iter().zip(parts.0).map(|(name, nanos)| ((*name).to_owned(), (nanos as f64 / 1e9).into())).collect()
    };
    let mut sum = Parts::default();
    let mut each = Vec::new();
    for (executor, (inline, parts)) in executors.into_iter().enumerate() {
        if !inline {
            sum.add(&parts);
        }
        each.push(serde_json::json!({ "executor": executor, "inline": inline, "seconds": seconds(&parts) }));
    }
    serde_json::json!({ "executors": each, "seconds": seconds(&sum) })
}

/// The parts as a bar each, of the width of what is 100 %; those of less than 0.05 % are left out. `share` in the order of
/// [`PARTS`].
pub fn bars(share: &[f64; PARTS.len()]) -> Vec<String> {
    const WIDTH: f64 = 40.0;
    let shown = PARTS.iter().zip(share).filter(|(_, share)| **share >= 0.0005);
    shown
        .map(|(name, share)| {
            let eighths = (share * WIDTH * 8.0).round() as usize;
            let rest = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8];
            let bar = format!("{name:<20} {:>5.1} %  {}{rest}", share * 100.0, "█".repeat(eighths / 8));
            bar.trim_end().to_owned()
        })
        .collect()
}

#[cfg(test)]
#[path = "waterfall_tests.rs"]
mod tests;
