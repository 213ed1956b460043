//! A load that was described and not recorded, for the same what-ifs as a trace: when requests come and how long they are,
//! who would run them, and what batches take.
//!
//! Always true
//! - Equal descriptions give equal recordings. The scheduler begins empty, with what it would have learned from warming up.

use std::time::Duration;

use super::services::{Measured, Services};
use super::whatif::Recording;
use crate::capture::{Header, ModelHeader, SeatHeader, knobs_of};
use crate::scheduler::{Group, Policy, QueueLimits};
use crate::vocab::Moment;

/// What is to come. Requests have one row each.
#[derive(Clone, Debug)]
pub struct Described {
    pub model: String,
    pub policy: Policy,
    /// Executors, unless the model runs on the batcher's own thread.
    pub executors: usize,
    /// Batches that an executor holds.
    pub slots: u32,
    /// Bounds on what waits in the whole server.
    pub limits: QueueLimits,
    /// ns since the start, and length; in order.
    pub arrivals: Vec<(u64, u32)>,
    /// Time that each request has.
    pub deadline: Option<Duration>,
    pub span: Duration,
    /// Batches that were measured, and how far off they are where they are predictions.
    pub measured: Vec<Measured>,
    pub error: f64,
    pub seed: u64,
}

impl Described {
    pub fn recording(self) -> Recording {
        let begin = Moment(1_000_000);
        let services = Services::measured(&self.measured, self.error, begin, self.span, self.seed);
        let fit = services.fit(0);
        let seat = |at: usize| SeatHeader { group: Group::Executors, slots: self.slots, device: at as u16 };
        let seats = match self.policy.group {
            Group::Inline => vec![SeatHeader { group: Group::Inline, slots: 1, device: 0 }],
            Group::Executors => (0..self.executors.max(1)).map(seat).collect(),
        };
        let longest = self.policy.buckets.longest();
        let header = Header {
            ferry: env!("CARGO_PKG_VERSION").to_owned(),
            layout: 0,
            at: begin,
            decisions: 0,
            hash: 0,
            limits: self.limits,
            seats,
            models: vec![ModelHeader {
                name: self.model,
                group: self.policy.group,
                buckets: self.policy.buckets.lens().to_vec(),
                knobs: knobs_of(&self.policy),
                cost: [fit.batch, fit.cell, fit.square],
                error: self.error,
                observations: self.measured.len() as u64,
            }],
        };
        let (deadline, arrivals) = (self.deadline, self.arrivals);
        let calls = arrivals.into_iter().map(|(nanos, len)| {
            let at = begin + Duration::from_nanos(nanos);
            (at, deadline.map(|deadline| at + deadline), len.clamp(1, longest))
        });
        Recording::described(header, self.policy, calls, self.span, services)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::whatif::{Conditions, Setting};
    use crate::scheduler::Buckets;
    use crate::scheduler::cost::Work;
    use crate::vocab::{Layout, ModelHandle};

    const M: ModelHandle = ModelHandle(0);

    /// Batches of 10 ms and 1 ms a row; requests each 5 ms.
    fn described(layout: Layout) -> Described {
        let policy = Policy {
            layout,
            can_pack: true,
            slo: Duration::from_millis(200),
            ..Policy::new(16, 512, Buckets::new(&[8, 32]).expect("ascending"))
        };
        let took = |rows: u32| Duration::from_millis(10 + u64::from(rows));
        let measured = (1..=16).map(|rows| Measured { work: Work::padded(rows, 8), took: took(rows) });
        Described {
            model: "m".into(),
            policy,
            executors: 1,
            slots: 1,
            limits: QueueLimits::NONE,
            arrivals: (0..2000).map(|at| (at * 5_000_000, 8)).collect(),
            deadline: None,
            span: Duration::from_secs(10),
            measured: measured.cycle().take(160).collect(),
            error: 0.0,
            seed: 1,
        }
    }

    #[test]
    fn a_described_load_is_answered_by_the_scheduler_that_serves() {
        for layout in [Layout::Padded, Layout::Packed] {
            let recording = described(layout).recording();
            assert_eq!(recording.policy(M).expect("a policy").layout, layout);
            let report = recording.what_if(&[], 1).expect("it can be");
            let model = &report.models[0];
            assert_eq!(model.offered, 2000);
            assert!(model.answered > 1980 && model.batches > 100, "{model:?}");
            assert!(model.percentile(0.5) > Duration::from_millis(11), "a batch takes that long");
            let again = recording.what_if(&[], 1).expect("it can be");
            assert_eq!((model.batches, &model.latency), (again.models[0].batches, &again.models[0].latency));
        }
    }

    #[test]
    fn more_executors_share_the_work_and_fewer_wait_longer() {
        let recording = described(Layout::Padded).recording();
        let with = |executors: usize| {
            let conditions = Conditions { executors: Some(executors), ..Conditions::default() };
            let report = recording.what_if_under(&conditions, &[], 1).expect("it can be");
            assert_eq!(report.busy.len(), executors);
            report.models[0].percentile(0.5)
        };
        let (one, three) = (with(1), with(3));
        assert!(three < one, "{three:?} of three, {one:?} of one");
        assert_eq!(recording.executors(), 1);
    }

    #[test]
    fn settings_change_it_and_an_objective_judges_it() {
        let recording = described(Layout::Padded).recording();
        let set = |text: &str| Setting::parse(text).expect("a setting");
        let held = [set("m.policy=window"), set("m.queue_delay_max_us=60000")];
        let conditions = Conditions { objective: Some((M, Duration::from_millis(40))), ..Conditions::default() };
        let short = recording.what_if_under(&conditions, &[], 1).expect("it can be");
        let long = recording.what_if_under(&conditions, &held, 1).expect("it can be");
        assert!(long.models[0].batches < short.models[0].batches);
        assert!(
            long.models[0].on_time < short.models[0].on_time,
            "{} {}",
            long.models[0].on_time,
            short.models[0].on_time
        );
    }

    #[test]
    fn a_shortened_load_ends_with_its_last_request() {
        let mut recording = described(Layout::Padded).recording();
        recording.shorten(100);
        assert_eq!((recording.calls(), recording.calls_of(M).count()), (100, 100));
        assert_eq!(recording.span(), Duration::from_millis(99 * 5));
        assert_eq!(recording.what_if(&[], 1).expect("it can be").models[0].offered, 100);
        recording.shorten(1000);
        assert_eq!(recording.calls(), 100);
    }
}
