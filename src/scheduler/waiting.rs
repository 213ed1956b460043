//! What waits, by model and length, for those who look: a copy, which decides nothing.
//!
//! Always true
//! - Only lanes in which something waits are named. Finding the oldest of one looks at the heads of its tenants and classes,
//!   at most [`super::tenants::PLACES`] × [`Class::COUNT`].
//!
//! Elsewhere: the lanes themselves (lane.rs).

use std::time::Duration;

use super::{Class, Scheduler};
use crate::vocab::{ModelHandle, Moment};

/// The waiting rows of one length bucket, of all classes and tenants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitingLane {
    pub model: ModelHandle,
    /// Longest rows of the bucket, in cells.
    pub len_max: u32,
    pub rows: u32,
    /// Requests, or parts of large ones.
    pub tickets: u32,
    /// Since the first of them was admitted.
    pub oldest: Duration,
}

impl Scheduler {
    /// Lanes in which something waits: by model, then the shorter first. Rows that a test composes are in no lane.
    pub fn waiting_lanes(&self, now: Moment) -> impl Iterator<Item = WaitingLane> {
        self.models.iter().enumerate().flat_map(move |(index, queue)| {
            (0..queue.lanes.buckets()).filter_map(move |bucket| {
                let tickets = Class::ALL.iter().map(|class| queue.lanes.sums(*class, bucket).tickets).sum();
                let oldest = queue.lanes.oldest(&self.tickets, bucket)?;
                Some(WaitingLane {
                    model: ModelHandle(index as u16),
                    len_max: queue.policy.buckets.len_at(bucket),
                    rows: queue.lanes.rows(bucket),
                    tickets,
                    oldest: now.since(self.tickets[oldest].admitted_at),
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{Arrival, Buckets, Policy, QueueLimits, TenantId};

    fn at(ms: u64) -> Moment {
        Moment::ZERO + Duration::from_millis(ms)
    }

    #[test]
    fn lanes_say_what_waits_in_each_length_and_since_when() {
        let policy = || Policy::new(32, 32 * 512, Buckets::new(&[64, 512]).expect("ascending"));
        let mut scheduler = Scheduler::new(QueueLimits::NONE, vec![policy(), policy()], &[]);
        assert_eq!(scheduler.waiting_lanes(at(0)).count(), 0, "nothing waits");
        let mut arrive = |ms: u64, model: u16, rows: u32, len: u32, tenant: u16, class: Class| {
            let arrival = Arrival {
                model: ModelHandle(model),
                rows,
                len,
                bytes: 0,
                deadline: None,
                compose: None,
                class,
                tenant: TenantId(tenant),
            };
            scheduler.handle_arrival(at(ms), arrival).expect("room");
        };
        arrive(1, 1, 2, 300, 0, Class::ALL[0]);
        arrive(3, 1, 1, 65, 7, Class::ALL[2]);
        arrive(2, 1, 4, 64, 7, Class::ALL[1]);
        let lanes: Vec<WaitingLane> = scheduler.waiting_lanes(at(10)).collect();
        let lane = |len_max, rows, tickets, ms| WaitingLane {
            model: ModelHandle(1),
            len_max,
            rows,
            tickets,
            oldest: Duration::from_millis(ms),
        };
        assert_eq!(lanes, [lane(64, 4, 1, 8), lane(512, 3, 2, 9)]);
    }
}
