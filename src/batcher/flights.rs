//! Requests that are in a running batch, and their deadlines.
//!
//! A deadline holds in every stage, also while an executor is stuck: the caller is answered on time, and the late result
//! is dropped by the shard, whose slot has moved on to another generation.

use crate::vocab::{Moment, TicketKey};

/// One batch in flight: its members that have no answer from here yet, by their deadlines, latest first, so that the next one is
/// at the end. [`Moment::FAR`]: it has none.
#[derive(Debug, Default)]
struct Flight {
    batch: u64,
    deadlines: Vec<(Moment, TicketKey)>,
}

/// All batches in flight: at most slots × executors.
#[derive(Debug, Default)]
pub struct Flights {
    flights: Vec<Flight>,
    /// Emptied lists, kept for their memory.
    spare: Vec<Flight>,
}

impl Flights {
    /// `deadlines`: of all members.
    pub fn start(&mut self, batch: u64, deadlines: impl Iterator<Item = (Moment, TicketKey)>) {
        let mut flight = self.spare.pop().unwrap_or_default();
        flight.batch = batch;
        flight.deadlines.extend(deadlines);
        // Most have none, and then there is no order.
        if flight.deadlines.iter().any(|(at, _)| *at != Moment::FAR) {
            flight.deadlines.sort_unstable_by(|a, b| b.cmp(a));
        }
        self.flights.push(flight);
    }

    pub fn finish(&mut self, batch: u64) {
        if let Some(at) = self.flights.iter().position(|flight| flight.batch == batch) {
            let mut flight = self.flights.swap_remove(at);
            flight.deadlines.clear();
            self.spare.push(flight);
        }
    }

    /// A batch will not come back: the members that nobody has answered.
    pub fn lose(&mut self, batch: u64) -> impl Iterator<Item = TicketKey> {
        let flight = self.flights.iter_mut().find(|flight| flight.batch == batch);
        flight.into_iter().flat_map(|flight| flight.deadlines.drain(..)).map(|(_, key)| key)
    }

    /// The next request whose deadline has come while its batch runs. Call until `None`.
    pub fn poll_expired(&mut self, now: Moment) -> Option<TicketKey> {
        let flight = self
            .flights
            .iter_mut()
            .find(|flight| flight.deadlines.last().is_some_and(|(at, _)| *at <= now && *at != Moment::FAR))?;
        flight.deadlines.pop().map(|(_, key)| key)
    }

    pub fn next(&self) -> Option<Moment> {
        let next = self.flights.iter().filter_map(|flight| flight.deadlines.last()).map(|(at, _)| *at).min();
        next.filter(|at| *at != Moment::FAR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(slot: u32) -> TicketKey {
        TicketKey { shard: 0, slot, generation: 0 }
    }

    #[test]
    fn deadlines_of_running_batches_come_due_in_order_and_end_with_their_batch() {
        let mut flights = Flights::default();
        flights.start(1, [(Moment(30), key(3)), (Moment(10), key(1))].into_iter());
        flights.start(2, [(Moment::FAR, key(4)), (Moment(20), key(2))].into_iter());
        assert_eq!(flights.next(), Some(Moment(10)));
        assert_eq!(flights.poll_expired(Moment(9)), None);
        assert_eq!(flights.poll_expired(Moment(20)), Some(key(1)));
        assert_eq!(flights.poll_expired(Moment(20)), Some(key(2)));
        assert_eq!(flights.poll_expired(Moment(20)), None);
        assert_eq!(flights.next(), Some(Moment(30)));
        flights.finish(1);
        assert_eq!(flights.next(), None, "who has no deadline is not woken for");
        assert_eq!(flights.poll_expired(Moment::FAR), None);
        assert_eq!(flights.lose(2).collect::<Vec<_>>(), [key(4)], "the other was answered when it expired");
        assert_eq!(flights.lose(1).count(), 0);
    }
}
