//! A bounded trial of a policy: when which of two policies is in force, what came of both, and whether the new one stays.
//!
//! Pure: time comes as an argument, and the policies themselves are somebody else's. Both policies take turns, so that a load
//! that changes meanwhile changes for both; the first turn is the old one's.
//!
//! Always true
//! - A trial ends at its time at the latest, and at once when its guard says so: while the changed policy is in force, a larger
//!   share of its requests is late than is allowed, or than twice the baseline's. A request is late as soon as its time is over,
//!   so that a policy that holds everybody back does not have to be waited for.
//! - It ends one way: kept, or reverted for a reason. Kept needs enough answers of both, a better figure, and no worse share on time.
//! - At most [`SLICES_MAX`] turns, and [`meter::OPEN_MAX`] requests followed at once.
//!
//! Elsewhere: making the changes (batcher/trial.rs), asking for one (control/trial.rs).

pub mod meter;

use std::time::Duration;

use crate::vocab::Moment;
pub use meter::{Measured, Meter};

/// Turns of both policies together.
pub const SLICES_MAX: u32 = 20;
/// A turn of both takes about so long, where the trial is that long.
const CYCLE: Duration = Duration::from_secs(4);
/// Shortest and longest trial.
pub const SECONDS: std::ops::RangeInclusive<u64> = 1..=3600;
/// Fewer late requests than this are chance.
const LATE_MIN: u64 = 5;
/// Answers of each policy before figures are compared.
pub const ANSWERS_MIN: u64 = 50;
/// A share on time that is lower by more than this is worse.
const ON_TIME_SLACK: f64 = 0.01;
/// A change that was refused, because a request waits that would fit no batch, is tried again after this.
const RETRY: Duration = Duration::from_millis(10);
/// Requests are looked at for being late no more often than this.
const LOOK: Duration = Duration::from_millis(5);

/// Which of two policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arm {
    /// The one before the trial.
    Baseline = 0,
    Changed = 1,
}

impl Arm {
    pub fn name(self) -> &'static str {
        match self {
            Arm::Baseline => "baseline",
            Arm::Changed => "changed",
        }
    }
}

/// What has to be better for the new policy to stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    P50,
    P99,
    OnTime,
    Fill,
    Waste,
    /// Nothing: it stays unless the guard ends the trial.
    Unbroken,
    /// It does not stay: the trial only measures.
    Never,
}

impl Keep {
    pub const ALL: [Keep; 7] =
        [Keep::P50, Keep::P99, Keep::OnTime, Keep::Fill, Keep::Waste, Keep::Unbroken, Keep::Never];

    pub fn name(self) -> &'static str {
        match self {
            Keep::P50 => "p50",
            Keep::P99 => "p99",
            Keep::OnTime => "on_time",
            Keep::Fill => "fill",
            Keep::Waste => "waste",
            Keep::Unbroken => "unbroken",
            Keep::Never => "never",
        }
    }

    pub fn from_name(name: &str) -> Option<Keep> {
        Keep::ALL.into_iter().find(|keep| keep.name() == name)
    }
}

/// What a trial is asked to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    pub time: Duration,
    /// Share of the time that the changed policy is in force. 1: there is no baseline beside it, only the guard.
    pub share: f64,
    /// A request is late after this, or at its own deadline.
    pub slo: Duration,
    /// Least share on time: the guard ends the trial below it.
    pub on_time_min: f64,
    pub keep: Keep,
    /// By so much, as a share, must the figure be better.
    pub margin: f64,
}

impl Plan {
    pub fn new(time: Duration, slo: Duration) -> Plan {
        Plan { time, share: 0.5, slo, on_time_min: 0.99, keep: Keep::P99, margin: 0.02 }
    }

    /// What was expected, where a number cannot be.
    pub fn check(&self) -> Result<(), String> {
        let within = |key: &str, value: f64, low: f64, high: f64| match value >= low && value <= high {
            true => Ok(()),
            false => Err(format!("{key}: expected {low} to {high}, got {value}")),
        };
        within("seconds", self.time.as_secs_f64(), *SECONDS.start() as f64, *SECONDS.end() as f64)?;
        within("share", self.share, 0.05, 1.0)?;
        within("slo_ms", self.slo.as_secs_f64() * 1e3, 0.01, 600_000.0)?;
        within("on_time_min", self.on_time_min, 0.0, 1.0)?;
        within("margin", self.margin, 0.0, 1.0)
    }

    fn cycle(&self) -> Duration {
        let cycles = (self.time.as_nanos() / CYCLE.as_nanos()).clamp(1, u128::from(SLICES_MAX / 2));
        self.time / cycles as u32
    }

    /// Whose turn it is so long after the start, and when that ends.
    fn turn(&self, since: Duration) -> (Arm, Duration) {
        let cycle = self.cycle();
        let done = cycle * (since.as_nanos() / cycle.as_nanos().max(1)).min(u128::from(SLICES_MAX)) as u32;
        let change = done + cycle.mul_f64(1.0 - self.share);
        if since < change { (Arm::Baseline, change) } else { (Arm::Changed, done + cycle) }
    }
}

/// How a trial ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Kept: the figure is better.
    Better,
    /// Kept: nothing was asked for but that the guard is silent.
    Unbroken,
    /// Reverted, as asked for.
    Measured,
    NotBetter,
    TooFew,
    /// Reverted by the guard.
    Breach,
    /// Somebody asked for the end.
    Aborted,
    /// Somebody changed the policy by hand.
    Superseded,
    /// The server drains.
    Draining,
}

impl Why {
    pub fn code(self) -> &'static str {
        match self {
            Why::Better => "better",
            Why::Unbroken => "unbroken",
            Why::Measured => "measured",
            Why::NotBetter => "not_better",
            Why::TooFew => "too_few",
            Why::Breach => "breach",
            Why::Aborted => "aborted",
            Why::Superseded => "superseded",
            Why::Draining => "draining",
        }
    }

    pub fn keeps(self) -> bool {
        matches!(self, Why::Better | Why::Unbroken)
    }
}

/// An end, with the numbers behind it as a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub why: Why,
    pub message: String,
}

impl Outcome {
    fn new(why: Why, message: impl Into<String>) -> Outcome {
        Outcome { why, message: message.into() }
    }

    pub fn aborted() -> Outcome {
        Outcome::new(Why::Aborted, "somebody asked for its end")
    }

    pub fn superseded() -> Outcome {
        Outcome::new(Why::Superseded, "somebody changed the policy by hand")
    }

    pub fn draining() -> Outcome {
        Outcome::new(Why::Draining, "the server drains")
    }

    pub fn word(&self) -> &'static str {
        if self.why.keeps() { "kept" } else { "reverted" }
    }
}

/// What is to be done now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Put this policy in force.
    Switch(Arm),
    /// Put that policy in force which the outcome says, for good.
    End(Outcome),
}

/// A turn of a policy, with the generation that its batches carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    pub arm: Arm,
    pub at: Moment,
    pub generation: u32,
}

/// A trial that is on.
#[derive(Debug)]
pub struct Trial {
    plan: Plan,
    started_at: Moment,
    slices: Vec<Slice>,
    pub meter: Meter,
    ending: Option<Outcome>,
    retry_at: Moment,
    looked_at: Moment,
}

/// How a trial stands, or how it ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    pub plan: Plan,
    /// What the changed policy sets.
    pub set: Vec<(String, String)>,
    pub started_at: Moment,
    pub slices: Vec<Slice>,
    pub baseline: Measured,
    pub changed: Measured,
    pub unfollowed: u64,
    pub ended: Option<Ended>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    pub at: Moment,
    pub outcome: Outcome,
    /// Of the policy from then on.
    pub generation: u32,
}

impl Report {
    /// From when the changed policy was last put in force to the end.
    pub fn exposed(&self) -> Option<Duration> {
        let ended = self.ended.as_ref()?;
        let last = self.slices.last().filter(|slice| slice.arm == Arm::Changed)?;
        Some(ended.at.since(last.at))
    }
}

impl Trial {
    /// Begins with the baseline's turn, whose policy has this generation.
    pub fn new(plan: Plan, now: Moment, generation: u32) -> Trial {
        Trial {
            meter: Meter::new(plan.slo),
            plan,
            started_at: now,
            slices: vec![Slice { arm: Arm::Baseline, at: now, generation }],
            ending: None,
            retry_at: now,
            looked_at: now,
        }
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Ends it for a reason from outside, unless it ends already.
    pub fn end_with(&mut self, outcome: Outcome) {
        self.ending.get_or_insert(outcome);
    }

    /// The policy in force.
    pub fn arm(&self) -> Arm {
        self.slices.last().expect("it begins with one").arm
    }

    /// What is to be done now, if anything. Until that was done ([`Trial::switched`]) it is said again; after a refusal
    /// ([`Trial::refused`]), a little later.
    pub fn poll(&mut self, now: Moment) -> Option<Step> {
        if now >= self.looked_at + LOOK {
            self.looked_at = now;
            self.meter.look(now);
        }
        if self.ending.is_none() {
            self.ending = self.breach().or_else(|| {
                let is_over = now >= self.started_at + self.plan.time;
                is_over.then(|| self.verdict())
            });
        }
        if now < self.retry_at {
            return None;
        }
        if let Some(outcome) = &self.ending {
            return Some(Step::End(outcome.clone()));
        }
        let (turn, _) = self.plan.turn(now.since(self.started_at));
        (turn != self.arm()).then_some(Step::Switch(turn))
    }

    /// When to poll next, after a poll at `now`.
    pub fn next(&self, now: Moment) -> Moment {
        if self.ending.is_some() {
            return self.retry_at;
        }
        let (turn, until) = self.plan.turn(now.max(self.retry_at).since(self.started_at));
        let change = if turn == self.arm() { self.started_at + until } else { self.retry_at };
        let end = (self.started_at + self.plan.time).min(change);
        match self.meter.next() {
            Some(overdue) => end.min(overdue.max(self.looked_at + LOOK)),
            None => end,
        }
    }

    /// The step was made: this policy is in force.
    pub fn switched(&mut self, now: Moment, arm: Arm, generation: u32) {
        self.slices.push(Slice { arm, at: now, generation });
        self.meter.begin_slice();
    }

    /// The step could not be made.
    pub fn refused(&mut self, now: Moment) {
        self.retry_at = now + RETRY;
    }

    /// The guard: too many of the changed policy's requests are late.
    fn breach(&self) -> Option<Outcome> {
        let (judged, late) = self.meter.slice();
        let baseline = self.meter.arm(Arm::Baseline);
        let usual = 1.0 - baseline.on_time();
        let allowed = (1.0 - self.plan.on_time_min).max(2.0 * usual);
        if late < LATE_MIN || late as f64 <= allowed * judged as f64 {
            return None;
        }
        let ms = self.plan.slo.as_secs_f64() * 1e3;
        Some(Outcome::new(
            Why::Breach,
            format!(
                "{late} of {judged} requests were late (slo {ms} ms, refused and given up ones among them); allowed are {:.1} %, \
                 and {:.1} % of the baseline's were",
                100.0 * allowed,
                100.0 * usual
            ),
        ))
    }

    /// By the criterion, when the time is over.
    fn verdict(&self) -> Outcome {
        let (baseline, changed) = (self.meter.arm(Arm::Baseline), self.meter.arm(Arm::Changed));
        let keep = self.plan.keep;
        if keep == Keep::Never {
            return Outcome::new(Why::Measured, "as asked for: it only measured");
        }
        for (arm, measured) in [(Arm::Baseline, baseline), (Arm::Changed, changed)] {
            // What nobody looks at needs no comparison.
            if measured.answered < ANSWERS_MIN && (keep != Keep::Unbroken || arm == Arm::Changed) {
                let answered = measured.answered;
                let message = format!("{answered} answers under the {} policy; {ANSWERS_MIN} are needed", arm.name());
                return Outcome::new(Why::TooFew, message);
            }
        }
        if keep == Keep::Unbroken {
            return Outcome::new(Why::Unbroken, format!("{:.2} % were on time", 100.0 * changed.on_time()));
        }
        let (was, is) = (100.0 * baseline.on_time(), 100.0 * changed.on_time());
        if changed.on_time() < baseline.on_time() - ON_TIME_SLACK {
            return Outcome::new(Why::NotBetter, format!("on time were {is:.2} %, and {was:.2} % of the baseline's"));
        }
        let ms = |measured: &Measured, share: f64| measured.percentile(share).as_secs_f64() * 1e3;
        let lower = |was: f64, is: f64| (is <= was * (1.0 - self.plan.margin) && is < was, was, is);
        let (better, was, is) = match keep {
            Keep::P50 => lower(ms(baseline, 0.5), ms(changed, 0.5)),
            Keep::P99 => lower(ms(baseline, 0.99), ms(changed, 0.99)),
            Keep::Waste => lower(baseline.waste(), changed.waste()),
            Keep::OnTime => lower(1.0 - baseline.on_time(), 1.0 - changed.on_time()),
            Keep::Fill => {
                let (was, is) = (baseline.fill(), changed.fill());
                (is >= was * (1.0 + self.plan.margin) && is > was, was, is)
            }
            Keep::Unbroken | Keep::Never => unreachable!("handled above"),
        };
        let what = match keep {
            Keep::P50 | Keep::P99 => format!("{} in ms", keep.name()),
            Keep::OnTime => "share late".to_owned(),
            _ => keep.name().to_owned(),
        };
        let margin = 100.0 * self.plan.margin;
        let message = format!("{what}: {was:.3} before, {is:.3} with the change; asked for: better by {margin} %");
        Outcome::new(if better { Why::Better } else { Why::NotBetter }, message)
    }

    pub fn report(&self, set: &[(String, String)], ended: Option<Ended>) -> Report {
        Report {
            plan: self.plan,
            set: set.to_vec(),
            started_at: self.started_at,
            slices: self.slices.clone(),
            baseline: self.meter.arm(Arm::Baseline).clone(),
            changed: self.meter.arm(Arm::Changed).clone(),
            unfollowed: self.meter.unfollowed,
            ended,
        }
    }
}

#[cfg(test)]
mod tests;
