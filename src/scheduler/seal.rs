//! The policy: when a batch is sealed, which lane goes first, and who fills it up.
//!
//! A lane's turn is decided by its oldest ticket, or by the nearest deadline among its tickets. The lane whose oldest
//! ticket has waited longest goes first. What its bucket leaves free is filled from shorter lanes, nearest first, as
//! long as they waste little at this length; a batch counts as full when they fill it.

use std::time::Duration;

use super::lane::{Lanes, Tickets};
use super::{Buckets, Group, QueueLimits, TicketId, Vacancy};
use crate::vocab::{Moment, SealReason};

/// How one model is batched.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Most rows in a batch.
    pub rows_max: u32,
    /// Most padded cells (rows × padded length) in a batch. At least the longest bucket.
    pub cells_max: u64,
    /// How long the oldest row may be held for others while an executor is idle. 0: never.
    pub queue_delay_max: Duration,
    pub buckets: Buckets,
    /// A shorter lane joins a batch when at most this share of its rows would be padding.
    pub fill_waste_max: f64,
    /// Which executors run it.
    pub group: Group,
    /// Bounds on what may wait for this model.
    pub queue: QueueLimits,
    /// Learned: how long a batch takes.
    pub service: ServiceTime,
}

impl Policy {
    /// Rows that fit a batch at this padded length.
    pub fn rows_at(&self, padded_len: u32) -> u32 {
        let by_cells = self.cells_max / u64::from(padded_len.max(1));
        self.rows_max.min(u32::try_from(by_cells).unwrap_or(u32::MAX))
    }
}

/// Mean batch time, so that a deadline is met and not just noticed.
#[derive(Clone, Copy, Debug, Default)]
pub struct ServiceTime {
    nanos: f64,
}

impl ServiceTime {
    pub fn observe(&mut self, service: Duration) {
        let sample = service.as_nanos() as f64;
        self.nanos = if self.nanos == 0.0 { sample } else { 0.8 * self.nanos + 0.2 * sample };
    }

    /// Zero until something was observed.
    pub fn mean(&self) -> Duration {
        Duration::from_nanos(self.nanos as u64)
    }
}

/// The lane to seal next, and why.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    pub bucket: u16,
    pub reason: SealReason,
    pub oldest: Moment,
}

/// How far behind the front a lane is searched for rows that still fit, per lane. Bounds a decision's cost.
const LOOK_AHEAD: usize = 64;

/// Kept between a batch's latest start and the deadline it is for: a thread is woken late by up to this much, and
/// whoever starts later has expired.
const WAKE_MARGIN: Duration = Duration::from_micros(500);

/// The lane that may be sealed and whose oldest ticket has waited longest.
pub fn choose(
    lanes: &mut Lanes,
    tickets: &Tickets,
    policy: &Policy,
    vacancy: Vacancy,
    draining: bool,
    now: Moment,
) -> Option<Choice> {
    let mut best: Option<Choice> = None;
    let mut fill = Fill::default();
    for bucket in 0..lanes.len() {
        let rows = fill.rows_for(lanes, policy, bucket);
        let Some(id) = lanes.lane(bucket).oldest() else { continue };
        let oldest = tickets[id].admitted_at;
        if best.is_some_and(|best| best.oldest <= oldest) {
            continue;
        }
        let full = rows >= u64::from(policy.rows_at(policy.buckets.len_at(bucket)));
        let reason = match vacancy {
            _ if full => Some(SealReason::Full),
            Vacancy::Spare => None,
            Vacancy::Idle if draining => Some(SealReason::Drain),
            Vacancy::Idle => seal_reason(lanes, tickets, policy, bucket, oldest, now),
        };
        if let Some(reason) = reason {
            best = Some(Choice { bucket, reason, oldest });
        }
    }
    best
}

/// Rows that a batch of each bucket could take: its own lane's and those of the shorter lanes that may fill it up.
/// Buckets are asked in ascending order, so each lane enters and leaves the sum once.
#[derive(Default)]
struct Fill {
    rows: u64,
    shortest: u16,
}

impl Fill {
    fn rows_for(&mut self, lanes: &Lanes, policy: &Policy, bucket: u16) -> u64 {
        self.rows += lanes.lane(bucket).rows;
        while !may_fill(policy, self.shortest, bucket) {
            self.rows -= lanes.lane(self.shortest).rows;
            self.shortest += 1;
        }
        self.rows
    }
}

/// Whether rows of bucket `from` waste little enough at the length of `bucket`.
fn may_fill(policy: &Policy, from: u16, bucket: u16) -> bool {
    let waste = 1.0 - f64::from(policy.buckets.len_at(from)) / f64::from(policy.buckets.len_at(bucket));
    from == bucket || waste <= policy.fill_waste_max
}

/// Seal a batch that is not full when waiting can no longer help: its oldest ticket has waited its promised time, or
/// one of its tickets has a deadline that leaves no more of it.
fn seal_reason(
    lanes: &mut Lanes,
    tickets: &Tickets,
    policy: &Policy,
    bucket: u16,
    oldest: Moment,
    now: Moment,
) -> Option<SealReason> {
    let presses = |deadline: Moment| deadline != Moment::FAR && latest_start(deadline, policy) <= now;
    if policy.queue_delay_max.is_zero() {
        Some(SealReason::Idle)
    } else if oldest + policy.queue_delay_max <= now {
        Some(SealReason::QueueDelay)
    } else if presses(lanes.lane(bucket).soonest) && presses(lanes.look_for_soonest(tickets, bucket)) {
        Some(SealReason::Deadline)
    } else {
        None
    }
}

/// When a batch must start so that this deadline is met, as far as is known. A quarter is kept for noise.
fn latest_start(deadline: Moment, policy: &Policy) -> Moment {
    deadline - policy.service.mean().mul_f64(1.25) - WAKE_MARGIN
}

/// When the first held lane must be sealed.
pub fn next_window_end(lanes: &Lanes, tickets: &Tickets, policy: &Policy) -> Option<Moment> {
    lanes
        .iter()
        .filter_map(|(_, lane)| {
            let window = tickets[lane.oldest()?].admitted_at + policy.queue_delay_max;
            let deadline = if lane.soonest == Moment::FAR { Moment::FAR } else { latest_start(lane.soonest, policy) };
            Some(window.min(deadline))
        })
        .min()
}

/// Whether a lane is overdue by more than a batch's time, and would be overtaken by a batch whose oldest ticket came at
/// `by`. Its rows are too few for a spare slot; they get the executor's next idle moment, which must come then.
pub fn is_overtaken(lanes: &Lanes, tickets: &Tickets, policy: &Policy, by: Moment, now: Moment) -> bool {
    let patience = policy.queue_delay_max + policy.service.mean();
    lanes.iter().filter_map(|(_, lane)| lane.oldest()).any(|id| {
        let oldest = tickets[id].admitted_at;
        oldest < by && oldest + patience <= now
    })
}

/// Takes rows for one batch: the chosen lane first, then shorter lanes, nearest first.
pub fn take_rows(lanes: &mut Lanes, tickets: &mut Tickets, policy: &Policy, bucket: u16, members: &mut Vec<TicketId>) {
    let padded_len = policy.buckets.len_at(bucket);
    let mut room = policy.rows_at(padded_len);
    for from in (0..=bucket).rev() {
        if room == 0 || !may_fill(policy, from, bucket) {
            break;
        }
        room = take_from_lane(lanes, tickets, from, room, members);
    }
}

/// Takes what fits from one lane, oldest first, looking past rows that do not fit. Returns the room left.
fn take_from_lane(
    lanes: &mut Lanes,
    tickets: &mut Tickets,
    bucket: u16,
    mut room: u32,
    members: &mut Vec<TicketId>,
) -> u32 {
    let mut next = lanes.lane(bucket).oldest();
    let mut passed_over = 0;
    while let Some(id) = next {
        if room == 0 || passed_over == LOOK_AHEAD {
            break;
        }
        next = lanes.after(tickets, id);
        let rows = tickets[id].rows;
        if rows <= room {
            lanes.unlink(tickets, id);
            members.push(id);
            room -= rows;
        } else {
            passed_over += 1;
        }
    }
    room
}
