//! What those who wait wait for: an account for each model of the time during which none of its rows could have run.
//!
//! A request's wait is the difference of its model's account between admission and seal; what is left of its time in the queue
//! the policy held it for others to join. Two numbers are kept for a waiting request, and nothing is counted while it waits.
//!
//! Always true
//! - An account never runs ahead of the clock, so what a request waited for is at most its time in the queue.

use crate::mail::Waited;
use crate::scheduler::{Group, Scheduler};
use crate::vocab::{ModelHandle, Moment};

/// Whether a model's rows could run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Standing {
    /// An executor is idle that they may use: who waits, waits because of the policy.
    #[default]
    Free,
    /// Every executor that could run them runs something.
    Behind,
    /// One is idle, and the model has its share of them.
    AtShare,
}

#[derive(Clone, Copy, Debug, Default)]
struct Account {
    standing: Standing,
    since: Moment,
    until_then: Waited,
}

impl Account {
    fn at(&self, now: Moment) -> Waited {
        let open = now.since(self.since).as_nanos() as u64;
        let Waited { behind, other } = self.until_then;
        match self.standing {
            Standing::Free => self.until_then,
            Standing::Behind => Waited { behind: behind + open, other },
            Standing::AtShare => Waited { behind, other: other + open },
        }
    }

    fn set(&mut self, now: Moment, standing: Standing) {
        if self.standing != standing {
            (self.until_then, self.since, self.standing) = (self.at(now), now, standing);
        }
    }
}

/// The accounts of all models.
#[derive(Debug)]
pub struct Waits(Vec<Account>);

impl Waits {
    pub fn new(models: usize) -> Waits {
        Waits(vec![Account::default(); models])
    }

    /// What a model's account says at this time.
    pub fn of(&self, model: ModelHandle, now: Moment) -> Waited {
        self.0[model.index()].at(now)
    }

    /// What a request waited for that was admitted when the account said `then`.
    pub fn since(&self, model: ModelHandle, now: Moment, then: Waited) -> Waited {
        let at = self.of(model, now);
        Waited { behind: at.behind - then.behind, other: at.other - then.other }
    }

    /// Looks how models stand, after batches were given out or came back. Nothing changes until the next time.
    pub fn settle(&mut self, now: Moment, scheduler: &Scheduler) {
        let idle = |group: Group| scheduler.seats().iter().any(|seat| seat.group == group && seat.is_idle());
        let idle = [Group::Executors, Group::Inline].map(|group| (group, idle(group)));
        for (index, account) in self.0.iter_mut().enumerate() {
            let model = ModelHandle(index as u16);
            let group = scheduler.policy(model).group;
            let is_idle = idle.iter().any(|(of, idle)| *of == group && *idle);
            account.set(
                now,
                match is_idle {
                    false => Standing::Behind,
                    true if scheduler.waiting(model).0 > 0 && scheduler.is_at_its_share(model, now) => {
                        Standing::AtShare
                    }
                    true => Standing::Free,
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{Arrival, Buckets, Policy, PolicyKind, QueueLimits, SeatSpec};
    use std::time::Duration;

    const MODEL: ModelHandle = ModelHandle(0);

    fn micros(count: u64) -> Moment {
        Moment(count * 1000)
    }

    fn arrival() -> Arrival {
        let (class, tenant) = Default::default();
        Arrival { model: MODEL, rows: 1, len: 1, bytes: 4, deadline: None, compose: None, class, tenant }
    }

    fn scheduler(delay: Duration) -> Scheduler {
        let policy = Policy {
            kind: PolicyKind::Window,
            queue_delay_max: Some(delay),
            ..Policy::new(8, 8, Buckets::new(&[1]).expect("one"))
        };
        Scheduler::new(QueueLimits::NONE, vec![policy], &SeatSpec::separate(Group::Executors, 1, 1))
    }

    #[test]
    fn who_is_held_by_the_window_did_not_wait_behind_a_batch() {
        let (mut scheduler, mut waits) = (scheduler(Duration::from_micros(100)), Waits::new(1));
        scheduler.handle_arrival(micros(10), arrival()).expect("room");
        let then = waits.of(MODEL, micros(10));
        waits.settle(micros(10), &scheduler);
        assert_eq!(waits.since(MODEL, micros(110), then), Waited::default());
    }

    #[test]
    fn who_came_while_a_batch_ran_waited_behind_it_until_it_was_done() {
        let (mut scheduler, mut waits) = (scheduler(Duration::from_micros(100)), Waits::new(1));
        let mut members = Vec::new();
        scheduler.handle_arrival(micros(0), arrival()).expect("room");
        waits.settle(micros(0), &scheduler);
        let batch = scheduler.poll_batch(micros(100), &mut members).expect("the window is over");
        waits.settle(micros(100), &scheduler);
        scheduler.handle_arrival(micros(150), arrival()).expect("room");
        let then = waits.of(MODEL, micros(150));
        waits.settle(micros(150), &scheduler);
        scheduler.handle_finished(micros(180), &batch, Duration::from_micros(80));
        waits.settle(micros(180), &scheduler);
        // The rest of its window.
        let batch = scheduler.poll_batch(micros(250), &mut members).expect("the window is over");
        assert_eq!(batch.sealed_at, micros(250));
        assert_eq!(waits.since(MODEL, micros(250), then), Waited { behind: 30_000, other: 0 });
    }

    #[test]
    fn a_slow_model_that_has_its_share_of_the_executors_waits_for_another_reason() {
        let policies = vec![Policy::new(1, 1, Buckets::new(&[1]).expect("one")); 2];
        let seats = SeatSpec::separate(Group::Executors, 2, 1);
        let mut scheduler = Scheduler::new(QueueLimits::NONE, policies, &seats);
        let (slow, fast) = (ModelHandle(0), ModelHandle(1));
        let mut members = Vec::new();
        let mut run = |scheduler: &mut Scheduler, model, at, took| {
            scheduler.handle_arrival(at, Arrival { model, ..arrival() }).expect("room");
            let batch = scheduler.poll_batch(at, &mut members).expect("an executor is idle");
            scheduler.handle_finished(at + took, &batch, took);
        };
        run(&mut scheduler, slow, micros(0), Duration::from_millis(10));
        run(&mut scheduler, fast, micros(10_000), Duration::from_micros(10));
        let now = micros(20_000);
        let mut waits = Waits::new(2);
        (0..2).for_each(|_| drop(scheduler.handle_arrival(now, Arrival { model: slow, ..arrival() })));
        let then = waits.of(slow, now);
        let mut members = Vec::new();
        assert!(scheduler.poll_batch(now, &mut members).is_some(), "one executor is its share");
        assert_eq!(scheduler.poll_batch(now, &mut members), None);
        waits.settle(now, &scheduler);
        assert_eq!(waits.since(slow, micros(20_070), then), Waited { behind: 0, other: 70_000 });
    }
}
