//! Policies that change while the batcher runs, what became of them, and answers to those who ask.
//!
//! Always true
//! - A change is made whole or not at all, between two turns: no batch is decided by half of it.
//! - Batches never grow beyond what the server was started with: memory was planned for that.
//! - Each model's last [`HISTORY`] changes are kept, those of automatic buckets among them.
//! - An answer is a copy of bounded size, and giving it waits for nobody.
//!
//! Elsewhere: what a knob takes (scheduler/knobs.rs), whether what waits fits (scheduler), HTTP (control/policy.rs).

use std::collections::VecDeque;

use super::trial::Running;
use super::{Batcher, Outlet};
use crate::mail::{ChangedBy, KnobChange, PolicyChange, Prediction, Question, SetPolicy, SetPolicyError};
use crate::scheduler::knobs::KNOBS;
use crate::scheduler::{Buckets, Policy, Scheduler};
use crate::trial;
use crate::vocab::{ModelHandle, Moment, Refusal};

/// Changes remembered for each model.
pub const HISTORY: usize = 64;

/// The largest batch that a model may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ceiling {
    rows: u32,
    cells: u64,
}

impl Ceiling {
    fn of(policy: &Policy) -> Ceiling {
        Ceiling { rows: policy.rows_max, cells: cells_possible(policy) }
    }

    pub(super) fn check(&self, policy: &Policy) -> Result<(), String> {
        let started = "what the server was started with and has memory for";
        if policy.rows_max > self.rows {
            return Err(format!("rows_max: expected at most {}, {started}; got {}", self.rows, policy.rows_max));
        }
        let cells = cells_possible(policy);
        if cells > self.cells {
            return Err(format!("cells_max: expected at most {}, {started}; got {cells}", self.cells));
        }
        Ok(())
    }
}

fn cells_possible(policy: &Policy) -> u64 {
    policy.cells_max.min(u64::from(policy.rows_max) * u64::from(policy.buckets.longest()))
}

/// What is kept for each model.
#[derive(Debug)]
pub(super) struct Live {
    models: Vec<(Ceiling, VecDeque<PolicyChange>)>,
    /// The trial that is on.
    pub(super) trial: Option<Box<Running>>,
    /// By model: how its last one ended.
    pub(super) trials: Vec<Option<trial::Report>>,
}

impl Live {
    pub(super) fn new(scheduler: &Scheduler, models: usize) -> Live {
        let of = |index: usize| {
            let policy = scheduler.policy(ModelHandle(index as u16));
            (Ceiling::of(policy), VecDeque::new())
        };
        Live { models: (0..models).map(of).collect(), trial: None, trials: vec![None; models] }
    }

    pub(super) fn ceiling(&self, model: ModelHandle) -> Ceiling {
        self.models[model.index()].0
    }

    pub(super) fn remember(&mut self, model: ModelHandle, change: PolicyChange) {
        let (_, history) = &mut self.models[model.index()];
        if history.len() == HISTORY {
            history.pop_front();
        }
        history.push_back(change);
    }
}

impl<O: Outlet> Batcher<O> {
    pub(super) fn set_policy(&mut self, now: Moment, wish: SetPolicy) {
        let changed = self.try_set_policy(now, wish.model, &wish.set);
        match &changed {
            Ok(change) if !change.knobs.is_empty() => {
                tracing::info!(
                    model = self.forms[wish.model.index()].contract.name,
                    generation = change.generation,
                    knobs = describe(&change.knobs),
                    "the policy was changed"
                );
            }
            _ => {}
        }
        wish.reply.give(changed);
    }

    fn try_set_policy(
        &mut self,
        now: Moment,
        model: ModelHandle,
        set: &[(String, String)],
    ) -> Result<PolicyChange, SetPolicyError> {
        // Whoever sets a knob means the policy that they know, not one that is being tried.
        let tried = self.live.trial.as_deref().filter(|running| running.model == model);
        let before = tried.map_or(self.scheduler.policy(model), Running::baseline).clone();
        let policy = self.policy_with(model, &before, set)?;
        let is_tried = tried.is_some();
        let (by, note) = (ChangedBy::Operator, None);
        if policy == before && !is_tried {
            let generation = self.scheduler.generation(model);
            return Ok(PolicyChange { at: now, by, knobs: Vec::new(), generation, note, prediction: None });
        }
        let knobs = differences(&before, &policy);
        let generation = self.replace_policy(model, policy).map_err(SetPolicyError::Stranded)?;
        if is_tried {
            self.supersede_trial(now, &before);
        }
        let change = PolicyChange { at: now, by, knobs, generation, note, prediction: None };
        if !change.knobs.is_empty() {
            self.live.remember(model, change.clone());
        }
        Ok(change)
    }

    /// A policy with these knobs set, that the server has memory for.
    pub(super) fn policy_with(
        &self,
        model: ModelHandle,
        before: &Policy,
        set: &[(String, String)],
    ) -> Result<Policy, SetPolicyError> {
        let pairs = set.iter().map(|(knob, value)| (knob.as_str(), value.as_str()));
        let policy = before.with(pairs).map_err(SetPolicyError::Invalid)?;
        self.live.ceiling(model).check(&policy).map_err(SetPolicyError::Invalid)?;
        Ok(policy)
    }

    /// Puts a policy in force, unless it is. Returns its generation.
    pub(super) fn replace_policy(&mut self, model: ModelHandle, policy: Policy) -> Result<u32, Refusal> {
        if policy == *self.scheduler.policy(model) {
            return Ok(self.scheduler.generation(model));
        }
        let generation = self.scheduler.set_policy(model, policy)?;
        for recorder in self.recorders.each() {
            recorder.policy(model, &self.scheduler);
        }
        Ok(generation)
    }

    /// Lets the scheduler choose the buckets that are left to it.
    pub(super) fn choose_edges(&mut self, now: Moment) {
        while let Some(change) = self.scheduler.poll_edges(now) {
            let text = |buckets: &Buckets| format!("{:?}", buckets.lens()).replace(['[', ']', ' '], "");
            let knobs = vec![KnobChange { knob: "buckets", from: text(&change.from), to: text(&change.to) }];
            tracing::info!(
                model = self.forms[change.model.index()].contract.name,
                generation = change.generation,
                knobs = describe(&knobs),
                "buckets follow the lengths that come"
            );
            let (by, generation) = (ChangedBy::Auto, change.generation);
            let change_made = PolicyChange { at: now, by, knobs, generation, note: None, prediction: None };
            self.live.remember(change.model, change_made);
            if let Some(running) = &mut self.live.trial {
                running.follow_edges(&change);
            }
        }
    }

    /// What was predicted of a change is known beside what came of it. A change that has been forgotten takes it along.
    pub(super) fn judge(&mut self, model: ModelHandle, generation: u32, prediction: Prediction) {
        let (_, history) = &mut self.live.models[model.index()];
        if let Some(change) = history.iter_mut().rev().find(|change| change.generation == generation) {
            change.prediction = Some(prediction);
        }
    }

    pub(super) fn answer(&self, now: Moment, question: Question) {
        let scheduler = &self.scheduler;
        match question {
            Question::Policy { model, reply } => {
                reply.give((scheduler.policy(model).clone(), scheduler.generation(model)));
            }
            Question::History { model, reply } => {
                reply.give(self.live.models[model.index()].1.iter().cloned().collect());
            }
            Question::Trial { model, reply } => reply.give(self.trial_of(model)),
            Question::Lengths { model, reply } => reply.give(scheduler.lengths(model).clone()),
            Question::Cost { model, reply } => reply.give(scheduler.cost(model).clone()),
            Question::Facts { model, reply } => reply.give(scheduler.facts(model, now)),
            Question::Decisions { last, reply } => {
                reply.give(scheduler.log().last(last.min(Question::DECISIONS_MAX)).copied().collect());
            }
            Question::Batches { last, since, reply } => reply.give(self.batches(last, since)),
            Question::Lanes { reply } => reply.give(scheduler.waiting_lanes(now).take(Question::LANES_MAX).collect()),
        }
    }
}

pub(super) fn differences(before: &Policy, after: &Policy) -> Vec<KnobChange> {
    let change = |knob: &'static str| {
        let (from, to) = (before.get(knob)?, after.get(knob)?);
        (from != to).then_some(KnobChange { knob, from, to })
    };
    KNOBS.iter().filter_map(|knob| change(knob.name)).collect()
}

pub(super) fn describe(knobs: &[KnobChange]) -> String {
    let one = |change: &KnobChange| format!("{}: {} to {}", change.knob, change.from, change.to);
    knobs.iter().map(one).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
    use crate::executor::slot::FilledSlot;
    use crate::mail::{Burst, Finished, Part, Request, ToBatcher};
    use crate::mailbox::reply;
    use crate::scheduler::{Edges, QueueLimits};
    use crate::telemetry::{ModelLabels, Telemetry};
    use crate::vocab::{DType, TicketKey};

    pub(in crate::batcher) const MODEL: ModelHandle = ModelHandle(0);

    pub(in crate::batcher) struct Nowhere;

    /// Rows of length 20.
    pub(in crate::batcher) fn request(slot: u32, rows: u32) -> Request {
        Request {
            key: TicketKey { shard: 0, slot, generation: 0 },
            model: MODEL,
            rows,
            len: 20,
            payload: vec![0; rows as usize * 20 * 4].into(),
            received_at: Moment::ZERO,
            deadline: None,
            compose: None,
            class: Default::default(),
            tenant: Default::default(),
            truncated: false,
            part: Part { at_row: 0, of_rows: rows },
        }
    }

    impl Outlet for Nowhere {
        fn submit(&mut self, _: usize, _: FilledSlot) -> Option<Finished> {
            unreachable!("there is no executor")
        }

        fn end(&mut self, _: u16, _: Vec<(TicketKey, Refusal)>) {}
    }

    pub(in crate::batcher) fn batcher(policy: Policy) -> Batcher<Nowhere> {
        let tensor = TensorSpec {
            name: "ids".into(),
            dtype: DType::U32,
            shape: vec![Dim::Named("tokens".into())],
            pad: 0.0,
            range: None,
            nonfinite: NonFinite::Allow,
        };
        let contract = Contract {
            name: "m".into(),
            version: "1".into(),
            architecture: "echo".into(),
            outputs: vec![TensorSpec { name: "out".into(), ..tensor.clone() }],
            inputs: vec![tensor],
            length: Some(Length { name: "tokens".into(), min: 1, max: 512 }),
            text: None,
            rows_max: 32,
        };
        let telemetry = Telemetry::new(&[ModelLabels { name: "m".into(), version: "1".into() }], 1, 0);
        let scheduler = Scheduler::new(QueueLimits::NONE, vec![policy], &[]);
        Batcher::new(scheduler, Nowhere, &[Arc::new(contract.checked().expect("a contract"))], 1, telemetry)
    }

    fn history(batcher: &mut Batcher<Nowhere>, now: Moment) -> Vec<PolicyChange> {
        let (reply, awaited) = reply();
        batcher.take(now, ToBatcher::Ask(Question::History { model: MODEL, reply }));
        awaited.wait(Duration::ZERO).expect("answered at once")
    }

    #[test]
    fn buckets_that_follow_the_lengths_are_in_the_history() {
        let buckets = Buckets::new(&[512]).expect("ascending");
        let automatic = Policy { edges: Edges::Auto, shapes_max: 2, ..Policy::new(32, 32 * 512, buckets) };
        let mut batcher = batcher(automatic);
        let now = Moment::ZERO + Duration::from_secs(31);
        batcher.take(
            now,
            ToBatcher::Burst(Burst {
                arrivals: (0..40).map(|slot| request(slot, 32)).collect(),
                cancelled: Vec::new(),
            }),
        );
        batcher.turn(now);
        let changes = history(&mut batcher, now);
        let knobs = vec![KnobChange { knob: "buckets", from: "512".into(), to: "20,512".into() }];
        let (by, generation) = (ChangedBy::Auto, 2);
        assert_eq!(changes, [PolicyChange { at: now, by, knobs, generation, note: None, prediction: None }]);
        assert_eq!(batcher.scheduler().waiting(MODEL).1, 40 * 32 * 20, "what waits is in the new buckets");
    }

    #[test]
    fn batches_do_not_grow_beyond_what_was_started_with() {
        let mut batcher = batcher(Policy::new(32, 8 * 512, Buckets::new(&[64, 512]).expect("ascending")));
        let mut set = |knob: &str, value: &str| {
            let (reply, awaited) = reply();
            let set = vec![(knob.to_owned(), value.to_owned())];
            batcher.take(Moment::ZERO, ToBatcher::SetPolicy(SetPolicy { model: MODEL, set, reply }));
            awaited.wait(Duration::ZERO).expect("answered at once")
        };
        assert!(matches!(set("rows_max", "33"), Err(SetPolicyError::Invalid(_))));
        assert!(matches!(set("cells_max", "4097"), Err(SetPolicyError::Invalid(_))));
        assert_eq!(set("rows_max", "4").expect("fewer").generation, 2);
        // 4 rows of 512 are fewer cells than before, whatever the budget says.
        assert_eq!(set("cells_max", "100000").expect("never reached").generation, 3);
        assert!(matches!(set("rows_max", "32"), Err(SetPolicyError::Invalid(_))), "now it would be");
    }
}
