//! Deadlines of waiting tickets, soonest first.
//!
//! Always true
//! - A ticket that left for another reason leaves its entry behind; stale entries are skipped by generation and swept
//!   out when they outnumber the live ones, so a storm of cancels costs O(1) each.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::TicketId;
use super::lane::Tickets;
use crate::vocab::Moment;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    deadline: Moment,
    id: TicketId,
    generation: u32,
}

#[derive(Debug)]
pub struct Expiry {
    heap: BinaryHeap<Reverse<Entry>>,
    /// Sweep when the heap reaches this many.
    sweep_at: usize,
}

const SWEEP_MIN: usize = 1024;

impl Expiry {
    pub fn new(expected: u64) -> Expiry {
        Expiry { heap: BinaryHeap::with_capacity(expected.min(1024) as usize), sweep_at: SWEEP_MIN }
    }

    pub fn push(&mut self, deadline: Moment, id: TicketId, generation: u32) {
        self.heap.push(Reverse(Entry { deadline, id, generation }));
    }

    /// Takes the next waiting ticket whose deadline is `now` or earlier.
    pub fn pop_due(&mut self, now: Moment, tickets: &Tickets) -> Option<TicketId> {
        while let Some(Reverse(entry)) = self.heap.peek().copied() {
            let live = tickets.still_waits(entry.id, entry.generation);
            if live && entry.deadline > now {
                return None;
            }
            self.heap.pop();
            if live {
                return Some(entry.id);
            }
        }
        None
    }

    /// The soonest deadline of a waiting ticket.
    pub fn next(&mut self, tickets: &Tickets) -> Option<Moment> {
        if self.heap.len() >= self.sweep_at {
            self.heap.retain(|Reverse(entry)| tickets.still_waits(entry.id, entry.generation));
            self.sweep_at = (self.heap.len() * 2).max(SWEEP_MIN);
        }
        while let Some(Reverse(entry)) = self.heap.peek() {
            if tickets.still_waits(entry.id, entry.generation) {
                return Some(entry.deadline);
            }
            self.heap.pop();
        }
        None
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.heap.len()
    }
}
