//! Makes the changes of a trial, and tells it what became of the requests.
//!
//! Always true
//! - One trial at a time in a server: models share executors, and two would measure each other.
//! - Policies change between two turns, whole; nothing that waits is lost. A change under which something that waits would fit
//!   no batch is tried again until that has gone.
//! - The history has two entries for a trial: when its policy was first put in force, and how it ended. Turns in between are in
//!   its report, with their generations.
//!
//! Elsewhere: when and why (trial), HTTP (control/trial.rs).

use super::live::{describe, differences};
use super::{Batcher, Outlet};
use crate::mail::{ChangedBy, KnobChange, PolicyChange, SetPolicyError, StartTrial};
use crate::scheduler::{Edges, EdgesChange, Policy, SealedBatch, TicketId};
use crate::trial::{Arm, Ended, Outcome, Plan, Report, Step, Trial};
use crate::vocab::{ModelHandle, Moment};

/// The trial that is on.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) model: ModelHandle,
    pub(super) trial: Trial,
    set: Vec<(String, String)>,
    /// By [`Arm`].
    policies: [Policy; 2],
    /// The changed policy was in force.
    applied: bool,
}

impl Running {
    pub(super) fn baseline(&self) -> &Policy {
        &self.policies[Arm::Baseline as usize]
    }

    /// The scheduler chose other buckets for the policy in force: going back to it later must not undo that.
    pub(super) fn follow_edges(&mut self, change: &EdgesChange) {
        if change.model == self.model {
            let automatic = self.policies.iter_mut().filter(|policy| policy.edges == Edges::Auto);
            automatic.for_each(|policy| policy.buckets = change.to.clone());
        }
    }

    pub(super) fn arrived(
        &mut self,
        now: Moment,
        model: ModelHandle,
        deadline: Option<Moment>,
        admitted: Option<TicketId>,
    ) {
        if model == self.model {
            let arm = self.trial.arm();
            self.trial.meter.arrived(now, arm, deadline, admitted);
        }
    }

    pub(super) fn sealed(&mut self, batch: &SealedBatch, members: &[TicketId]) {
        if batch.model == self.model {
            let arm = self.trial.arm();
            self.trial.meter.sealed(arm, batch, members);
        }
    }
}

impl<O: Outlet> Batcher<O> {
    pub(super) fn start_trial(&mut self, now: Moment, wish: StartTrial) {
        let started = self.try_start_trial(now, &wish);
        wish.reply.give(started);
    }

    fn try_start_trial(&mut self, now: Moment, wish: &StartTrial) -> Result<Report, SetPolicyError> {
        let model = wish.model;
        if let Some(running) = &self.live.trial {
            let name = &self.forms[running.model.index()].contract.name;
            return Err(SetPolicyError::Busy(format!("a trial of {name} is on; end it first, or wait")));
        }
        let before = self.scheduler.policy(model).clone();
        let policy = self.policy_with(model, &before, &wish.set)?;
        if policy == before {
            return Err(SetPolicyError::Invalid("set: expected knobs that change something".into()));
        }
        let usual = Plan::new(wish.time, wish.plan.slo.unwrap_or(before.slo));
        let plan = Plan {
            share: wish.plan.share.unwrap_or(usual.share),
            on_time_min: wish.plan.on_time_min.unwrap_or(usual.on_time_min),
            keep: wish.plan.keep.unwrap_or(usual.keep),
            margin: wish.plan.margin.unwrap_or(usual.margin),
            ..usual
        };
        plan.check().map_err(SetPolicyError::Invalid)?;
        let trial = Trial::new(plan, now, self.scheduler.generation(model));
        let report = trial.report(&wish.set, None);
        let set = wish.set.clone();
        self.live.trial = Some(Box::new(Running { model, trial, set, policies: [before, policy], applied: false }));
        Ok(report)
    }

    /// The model's trial: the one that is on, or the last that was.
    pub(super) fn trial_of(&self, model: ModelHandle) -> Option<Report> {
        match &self.live.trial {
            Some(running) if running.model == model => Some(running.trial.report(&running.set, None)),
            _ => self.live.trials[model.index()].clone(),
        }
    }

    /// Ends the trial for a reason from outside, if one is on of this model, or of any.
    pub(super) fn end_trial(&mut self, now: Moment, model: Option<ModelHandle>, outcome: Outcome) {
        if let Some(running) = &mut self.live.trial
            && model.is_none_or(|model| model == running.model)
        {
            running.trial.end_with(outcome);
            self.conduct_trial(now);
        }
    }

    /// Makes the trial's next step, if one is due.
    pub(super) fn conduct_trial(&mut self, now: Moment) {
        let Some(running) = &mut self.live.trial else { return };
        let Some(step) = running.trial.poll(now) else { return };
        let (model, in_force) = (running.model, running.trial.arm());
        let to = match &step {
            Step::Switch(arm) => *arm,
            Step::End(outcome) if outcome.why.keeps() => Arm::Changed,
            Step::End(_) => Arm::Baseline,
        };
        let [from, policy] = [in_force, to].map(|arm| running.policies[arm as usize].clone());
        let knobs = differences(&from, &policy);
        let replaced = self.replace_policy(model, policy);
        let running = self.live.trial.as_mut().expect("it was there above");
        let Ok(generation) = replaced else { return running.trial.refused(now) };
        match step {
            Step::Switch(arm) => {
                running.trial.switched(now, arm, generation);
                if arm == Arm::Changed && !std::mem::replace(&mut running.applied, true) {
                    let seconds = running.trial.plan().time.as_secs_f64();
                    let note = format!("trial: for {seconds} s, in turns with the policy before");
                    self.note_trial(now, model, knobs, generation, note);
                }
            }
            Step::End(outcome) => self.close_trial(now, knobs, generation, outcome),
        }
    }

    /// Somebody set the policy by hand: it is theirs, and the trial is over.
    pub(super) fn supersede_trial(&mut self, now: Moment, baseline: &Policy) {
        let Some(running) = &self.live.trial else { return };
        let knobs = differences(&running.policies[running.trial.arm() as usize], baseline);
        let generation = self.scheduler.generation(running.model);
        self.close_trial(now, knobs, generation, Outcome::superseded());
    }

    fn close_trial(&mut self, now: Moment, knobs: Vec<KnobChange>, generation: u32, outcome: Outcome) {
        let Some(running) = self.live.trial.take() else { return };
        let note = format!("trial {}: {}", outcome.word(), outcome.message);
        let ended = Ended { at: now, outcome, generation };
        self.live.trials[running.model.index()] = Some(running.trial.report(&running.set, Some(ended)));
        self.note_trial(now, running.model, knobs, generation, note);
    }

    fn note_trial(&mut self, now: Moment, model: ModelHandle, knobs: Vec<KnobChange>, generation: u32, note: String) {
        let name = &self.forms[model.index()].contract.name;
        tracing::info!(model = name, generation, knobs = describe(&knobs), "{note}");
        let (by, note) = (ChangedBy::Trial, Some(note));
        self.live.remember(model, PolicyChange { at: now, by, knobs, generation, note, prediction: None });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::live::tests::{MODEL, Nowhere, batcher, request};
    use super::*;
    use crate::mail::{Burst, PlanOf, Question, SetPolicy, ToBatcher};
    use crate::mailbox::reply;
    use crate::scheduler::Buckets;
    use crate::trial::Why;

    fn policy() -> Policy {
        Policy::new(32, 32 * 512, Buckets::new(&[64, 512]).expect("ascending"))
    }

    fn ms(ms: u64) -> Moment {
        Moment::ZERO + Duration::from_millis(ms)
    }

    fn start(batcher: &mut Batcher<Nowhere>, set: &[(&str, &str)], seconds: u64) -> Result<Report, SetPolicyError> {
        let (reply, awaited) = reply();
        let set = set.iter().map(|(knob, value)| ((*knob).to_owned(), (*value).to_owned())).collect();
        let plan = PlanOf { slo: Some(Duration::from_millis(50)), ..PlanOf::default() };
        let wish = StartTrial { model: MODEL, set, time: Duration::from_secs(seconds), plan, reply };
        batcher.take(ms(0), ToBatcher::Trial(wish));
        awaited.wait(Duration::ZERO).expect("answered at once")
    }

    fn set(batcher: &mut Batcher<Nowhere>, now: Moment, knob: &str, value: &str) -> Result<u32, SetPolicyError> {
        let (reply, awaited) = reply();
        let set = vec![(knob.to_owned(), value.to_owned())];
        batcher.take(now, ToBatcher::SetPolicy(SetPolicy { model: MODEL, set, reply }));
        awaited.wait(Duration::ZERO).expect("answered at once").map(|change| change.generation)
    }

    fn status(batcher: &mut Batcher<Nowhere>) -> Report {
        let (reply, awaited) = reply();
        batcher.take(ms(0), ToBatcher::Ask(Question::Trial { model: MODEL, reply }));
        awaited.wait(Duration::ZERO).expect("answered at once").expect("there was a trial")
    }

    fn history(batcher: &mut Batcher<Nowhere>) -> Vec<(ChangedBy, u32, String)> {
        let (reply, awaited) = reply();
        batcher.take(ms(0), ToBatcher::Ask(Question::History { model: MODEL, reply }));
        let changes = awaited.wait(Duration::ZERO).expect("answered at once");
        let line = |change: PolicyChange| {
            (change.by, change.generation, format!("{} {}", describe(&change.knobs), change.note.unwrap_or_default()))
        };
        changes.into_iter().map(line).collect()
    }

    /// Rows of the policy in force at each moment that the batcher asks for, until it asks for none.
    fn live(batcher: &mut Batcher<Nowhere>, until: Moment) -> Vec<(u128, u32)> {
        let mut seen = vec![(0, batcher.scheduler().policy(MODEL).rows_max)];
        let mut now = ms(0);
        while let Some(next) = batcher.turn(now).filter(|next| *next <= until) {
            now = next;
            batcher.turn(now);
            let rows = batcher.scheduler().policy(MODEL).rows_max;
            if seen.last().is_some_and(|(_, before)| *before != rows) {
                seen.push((now.since(Moment::ZERO).as_millis(), rows));
            }
        }
        seen
    }

    #[test]
    fn a_trial_without_requests_takes_its_turns_and_reverts_for_want_of_answers() {
        let mut batcher = batcher(policy());
        start(&mut batcher, &[("rows_max", "4")], 8).expect("it begins");
        let turns = live(&mut batcher, ms(60_000));
        assert_eq!(turns, [(0, 32), (2000, 4), (4000, 32), (6000, 4), (8000, 32)]);
        let report = status(&mut batcher);
        let ended = report.ended.expect("it ended");
        assert_eq!((ended.outcome.why, ended.at, ended.generation), (Why::TooFew, ms(8000), 5));
        let history = history(&mut batcher);
        assert_eq!(history.len(), 2, "{history:?}");
        assert!(history[0].2.starts_with("rows_max: 32 to 4 trial: for 8 s"), "{history:?}");
        assert!(history[1].2.starts_with("rows_max: 4 to 32 trial reverted: 0 answers"), "{history:?}");
        assert!(history.iter().all(|(by, ..)| *by == ChangedBy::Trial));
    }

    /// Goal: a policy that holds requests back is undone by itself while they wait, and none of them is lost.
    #[test]
    fn requests_that_wait_too_long_end_the_trial_and_wait_on_under_the_old_policy() {
        let mut batcher = batcher(policy());
        start(&mut batcher, &[("policy", "window"), ("queue_delay_max_us", "2000000")], 60).expect("it begins");
        // Turns of three seconds.
        let changed_at = ms(33_000);
        batcher.turn(changed_at);
        assert_eq!(status(&mut batcher).slices.len(), 2, "its turn");
        let arrivals = (0..8).map(|slot| request(slot, 1)).collect();
        batcher.take(changed_at, ToBatcher::Burst(Burst { arrivals, cancelled: Vec::new() }));
        let mut now = changed_at;
        while let Some(next) = batcher.turn(now) {
            now = next;
        }
        let report = status(&mut batcher);
        assert_eq!(report.ended.as_ref().map(|ended| ended.outcome.why), Some(Why::Breach));
        let exposed = report.exposed().expect("in its turn").as_millis();
        assert!((50..=60).contains(&exposed), "{exposed} ms");
        assert_eq!((batcher.scheduler().waiting(MODEL).0, batcher.scheduler().policy(MODEL)), (8, &policy()));
    }

    #[test]
    fn whoever_sets_a_knob_by_hand_ends_the_trial_and_changes_the_policy_they_know() {
        let mut batcher = batcher(policy());
        start(&mut batcher, &[("rows_max", "4")], 8).expect("it begins");
        batcher.turn(ms(2000));
        assert_eq!(batcher.scheduler().policy(MODEL).rows_max, 4);
        assert!(matches!(set(&mut batcher, ms(2100), "rows_max", "0"), Err(SetPolicyError::Invalid(_))));
        assert!(status(&mut batcher).ended.is_none(), "what cannot be changes nothing");
        assert_eq!(set(&mut batcher, ms(2200), "hold", "0.5"), Ok(3));
        let after = batcher.scheduler().policy(MODEL);
        assert_eq!((after.rows_max, after.tuning.hold), (32, 0.5));
        let ended = status(&mut batcher).ended.expect("it ended");
        assert_eq!((ended.outcome.why, ended.at, ended.generation), (Why::Superseded, ms(2200), 3));
        let history = history(&mut batcher);
        assert_eq!(history[1].2, "rows_max: 4 to 32 trial reverted: somebody changed the policy by hand");
        assert_eq!((history[2].0, history[2].2.as_str()), (ChangedBy::Operator, "hold: 1 to 0.5 "));
        assert_eq!(batcher.turn(ms(3000)), None, "nothing is left to be done");
    }

    #[test]
    fn one_trial_at_a_time_and_none_that_changes_nothing() {
        let mut batcher = batcher(policy());
        assert!(matches!(start(&mut batcher, &[("rows_max", "32")], 8), Err(SetPolicyError::Invalid(_))));
        assert!(matches!(start(&mut batcher, &[("rows_max", "33")], 8), Err(SetPolicyError::Invalid(_))));
        assert!(matches!(start(&mut batcher, &[("rows_max", "4")], 0), Err(SetPolicyError::Invalid(_))));
        start(&mut batcher, &[("rows_max", "4")], 8).expect("it begins");
        let busy = start(&mut batcher, &[("rows_max", "8")], 8).expect_err("one is on");
        assert_eq!(busy, SetPolicyError::Busy("a trial of m is on; end it first, or wait".into()));
        let (reply, awaited) = reply();
        batcher.take(ms(100), ToBatcher::EndTrial { model: MODEL, reply });
        let report = awaited.wait(Duration::ZERO).expect("answered").expect("there was one");
        assert_eq!(report.ended.map(|ended| ended.outcome.why), Some(Why::Aborted));
        assert_eq!(batcher.scheduler().generation(MODEL), 1, "it had not begun to change anything");
        start(&mut batcher, &[("rows_max", "8")], 8).expect("the next begins");
        batcher.take(ms(200), ToBatcher::Drain);
        assert_eq!(status(&mut batcher).ended.map(|ended| ended.outcome.why), Some(Why::Draining));
    }

    /// Goal: going back is not given up because a request waits that would not fit. Method: rows that only fit batches of the
    /// changed policy wait when it is to end.
    #[test]
    fn a_policy_that_cannot_be_put_back_yet_is_put_back_when_it_can() {
        let mut batcher = batcher(policy());
        assert_eq!(set(&mut batcher, ms(0), "rows_max", "4"), Ok(2));
        start(&mut batcher, &[("rows_max", "32")], 8).expect("it begins");
        batcher.turn(ms(2000));
        let arrivals = vec![request(0, 32)];
        batcher.take(ms(2000), ToBatcher::Burst(Burst { arrivals, cancelled: Vec::new() }));
        batcher.turn(ms(4000));
        assert_eq!(batcher.scheduler().policy(MODEL).rows_max, 32, "32 rows wait");
        let cancelled = vec![request(0, 32).key];
        batcher.take(ms(4005), ToBatcher::Burst(Burst { arrivals: Vec::new(), cancelled }));
        batcher.turn(ms(4010));
        assert_eq!(batcher.scheduler().policy(MODEL).rows_max, 4);
    }
}
