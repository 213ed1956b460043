//! The policies `window` and `greedy_tokens`: rows in the order they came, closed by the first that does not fit.
//!
//! What fixed-window and token-budget batchers do, with two kindnesses that they do not all have: a batch is bound when an
//! executor is free and not before, and its length is that of its rows. Where rows lie end to end the budget is of their own
//! cells.

use super::cost::Work;
use super::lane::Lanes;
use super::lengths::Choice;
use super::ticket::{Place, Tickets};
use super::{Policy, TicketId};
use crate::vocab::{Layout, Moment, SealReason};

/// The next batch would be these rows: how many tickets from the front, and whether another would not have fitted.
struct Prefix {
    full: bool,
}

/// Walks the queue from its oldest row, calling `take` for each that fits.
fn walk(lanes: &mut Lanes, tickets: &mut Tickets, policy: &Policy, mut take: impl FnMut(TicketId)) -> Prefix {
    let mut cursors: Vec<Option<TicketId>> =
        (0..lanes.buckets()).map(|bucket| lanes.lane(0, super::Class::ALL[0], bucket).oldest()).collect();
    let (mut work, mut longest) = (Work::default(), 0u32);
    loop {
        let next = cursors
            .iter()
            .enumerate()
            .filter_map(|(bucket, id)| Some((bucket, (*id)?)))
            .reduce(|a, b| if tickets[b.1].came_before(&tickets[a.1]) { b } else { a });
        let Some((bucket, id)) = next else { return Prefix { full: is_full(policy, work, longest) } };
        let ticket = &tickets[id];
        let with = longest.max(policy.padded_len(ticket.len));
        let mut grown = work;
        grown.add(ticket.rows, ticket.len);
        if !policy.fits(grown, with) {
            return Prefix { full: true };
        }
        (work, longest) = (grown, with);
        cursors[bucket] = lanes.after(tickets, id);
        take(id);
    }
}

/// Not another row fits.
fn is_full(policy: &Policy, work: Work, longest: u32) -> bool {
    match policy.layout {
        Layout::Padded => work.rows >= policy.rows_at(longest.max(1)),
        Layout::Packed => work.rows >= policy.rows_max || work.cells >= policy.cells_max,
    }
}

pub fn choose(
    lanes: &mut Lanes,
    tickets: &mut Tickets,
    policy: &Policy,
    idle: bool,
    draining: bool,
    now: Moment,
) -> Option<Choice> {
    let mut oldest = None;
    let prefix = walk(lanes, tickets, policy, |id| {
        oldest.get_or_insert(id);
    });
    let oldest = tickets[oldest?].admitted_at;
    let reason = match () {
        () if prefix.full => SealReason::Full,
        () if !idle => return None,
        () if draining => SealReason::Drain,
        () if policy.window().is_zero() => SealReason::Idle,
        () if oldest + policy.window() <= now => SealReason::QueueDelay,
        () => return None,
    };
    Some(Choice { bucket: 0, reason, oldest })
}

pub fn take(lanes: &mut Lanes, tickets: &mut Tickets, policy: &Policy, members: &mut Vec<TicketId>) {
    walk(lanes, tickets, policy, |id| members.push(id));
    for id in members.iter() {
        debug_assert!(tickets[*id].place == Place::Lane);
    }
}
