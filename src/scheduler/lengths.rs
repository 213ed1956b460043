//! The policy `buckets`: a queue for each length bucket, each with the window.
//!
//! A bucket's turn is decided by its oldest ticket, or by the nearest deadline. The bucket whose oldest ticket has waited
//! longest goes first. What it leaves free is filled from shorter buckets, nearest first, as long as they waste little at
//! this length; a batch counts as full when they fill it.

use std::time::Duration;

use super::TicketId;
use super::due::Due;
use super::lane::Lanes;
use super::policy::{Class, Policy};
use super::ticket::Tickets;
use crate::vocab::{Moment, SealReason};

/// The bucket to seal next, and why.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    pub bucket: u16,
    pub reason: SealReason,
    pub oldest: Moment,
}

/// Mean batch time, so that a deadline is met and not just noticed.
#[derive(Clone, Copy, Debug, Default, bincode::Decode, bincode::Encode)]
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

/// How far behind the front a lane is searched for rows that still fit, per lane. Bounds a decision's cost.
pub const LOOK_AHEAD: usize = 64;

/// Kept between a batch's latest start and the deadline it is for: a thread is woken late by up to this much, and
/// whoever starts later has expired.
pub const WAKE_MARGIN: Duration = Duration::from_micros(500);

/// One model's queue, as this policy reads it.
pub struct View<'a> {
    pub lanes: &'a Lanes,
    pub tickets: &'a Tickets,
    pub due: &'a Due,
    pub policy: &'a Policy,
    pub service: ServiceTime,
}

impl View<'_> {
    /// The bucket that may be sealed and whose oldest ticket has waited longest.
    pub fn choose(&self, idle: bool, draining: bool, now: Moment) -> Option<Choice> {
        let mut best: Option<Choice> = None;
        let mut fill = Fill::default();
        for bucket in 0..self.lanes.buckets() {
            let rows = fill.rows_for(self.lanes, self.policy, bucket);
            let Some(id) = self.lanes.oldest(self.tickets, bucket) else { continue };
            let oldest = self.tickets[id].admitted_at;
            if best.is_some_and(|best| best.oldest <= oldest) {
                continue;
            }
            let full = rows >= u64::from(self.policy.rows_at(self.policy.buckets.len_at(bucket)));
            let reason = match idle {
                _ if full => Some(SealReason::Full),
                false => None,
                true if draining => Some(SealReason::Drain),
                true => self.seal_reason(bucket, oldest, now),
            };
            if let Some(reason) = reason {
                best = Some(Choice { bucket, reason, oldest });
            }
        }
        best
    }

    /// Seal a batch that is not full when waiting can no longer help: its oldest ticket has waited its promised time, or
    /// the soonest deadline of all is one of its tickets' and leaves no more of it.
    fn seal_reason(&self, bucket: u16, oldest: Moment, now: Moment) -> Option<SealReason> {
        let presses = || {
            let (deadline, id) = self.due.first()?;
            (self.tickets[id].bucket == bucket && self.latest_start(deadline) <= now).then_some(())
        };
        if self.policy.window().is_zero() {
            Some(SealReason::Idle)
        } else if oldest + self.policy.window() <= now {
            Some(SealReason::QueueDelay)
        } else if presses().is_some() {
            Some(SealReason::Deadline)
        } else {
            None
        }
    }

    /// When a batch must start so that this deadline is met, as far as is known. A quarter is kept for noise.
    fn latest_start(&self, deadline: Moment) -> Moment {
        deadline - self.service.mean().mul_f64(1.25) - WAKE_MARGIN
    }

    /// When the oldest row has waited for its window.
    pub fn window_end(&self) -> Option<Moment> {
        let oldest = (0..self.lanes.buckets())
            .filter_map(|bucket| Some(self.tickets[self.lanes.oldest(self.tickets, bucket)?].admitted_at))
            .min()?;
        Some(oldest + self.policy.window())
    }

    /// When the first held bucket must be sealed.
    pub fn next_window_end(&self) -> Option<Moment> {
        let window = self.window_end()?;
        Some(self.due.first().map_or(window, |(deadline, _)| window.min(self.latest_start(deadline))))
    }

    /// Whether a bucket is overdue by more than a batch's time, and would be overtaken by a batch whose oldest ticket came
    /// at `by`. Its rows are too few for a spare slot; they get the executor's next idle moment, which must come then.
    pub fn is_overtaken(&self, by: Moment, now: Moment) -> bool {
        let patience = self.policy.window() + self.service.mean();
        (0..self.lanes.buckets()).filter_map(|bucket| self.lanes.oldest(self.tickets, bucket)).any(|id| {
            let oldest = self.tickets[id].admitted_at;
            oldest < by && oldest + patience <= now
        })
    }
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
        self.rows += u64::from(lanes.rows(bucket));
        while !may_fill(policy, self.shortest, bucket) {
            self.rows -= u64::from(lanes.rows(self.shortest));
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

/// Takes rows for one batch: the chosen bucket first, then shorter ones, nearest first.
pub fn take(
    lanes: &mut Lanes,
    tickets: &mut Tickets,
    due: &Due,
    policy: &Policy,
    bucket: u16,
    members: &mut Vec<TicketId>,
) {
    let mut room = policy.rows_at(policy.buckets.len_at(bucket));
    for from in (0..=bucket).rev() {
        if room == 0 || !may_fill(policy, from, bucket) {
            break;
        }
        room = take_from_lane(lanes, tickets, due, from, room, members);
    }
}

/// Takes what fits from one lane, oldest first, looking past rows that do not fit. Returns the room left.
fn take_from_lane(
    lanes: &mut Lanes,
    tickets: &mut Tickets,
    due: &Due,
    bucket: u16,
    mut room: u32,
    members: &mut Vec<TicketId>,
) -> u32 {
    let mut next = lanes.lane(0, Class::ALL[0], bucket).oldest();
    let mut passed_over = 0;
    while let Some(id) = next {
        if room == 0 || passed_over == LOOK_AHEAD {
            break;
        }
        next = lanes.after(tickets, id);
        let rows = tickets[id].rows;
        if rows <= room {
            lanes.unlink(tickets, due, id);
            members.push(id);
            room -= rows;
        } else {
            passed_over += 1;
        }
    }
    room
}
