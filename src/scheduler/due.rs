//! Deadlines of one model's waiting tickets, soonest first: a 4-ary heap that knows where each ticket is.
//!
//! Always true
//! - A ticket enters and leaves in O(log n), from anywhere, so nothing stale is ever kept. Twelve bytes an entry.

use super::TicketId;
use super::ticket::{NONE, Tickets};
use crate::vocab::Moment;

/// Children of a node lie in one cache line.
const ARITY: usize = 4;

#[derive(Debug, Default, bincode::Decode, bincode::Encode)]
pub struct Due {
    moments: Vec<Moment>,
    ids: Vec<TicketId>,
}

impl Due {
    pub fn with_capacity(bound: usize) -> Due {
        Due { moments: Vec::with_capacity(bound), ids: Vec::with_capacity(bound) }
    }

    /// The soonest deadline, and whose it is.
    pub fn first(&self) -> Option<(Moment, TicketId)> {
        Some((*self.moments.first()?, self.ids[0]))
    }

    /// A ticket's deadline; [`Moment::FAR`] without one.
    pub fn of(&self, tickets: &Tickets, id: TicketId) -> Moment {
        match tickets[id].due_at {
            NONE => Moment::FAR,
            at => self.moments[at as usize],
        }
    }

    pub fn insert(&mut self, tickets: &mut Tickets, id: TicketId, deadline: Moment) {
        self.moments.push(deadline);
        self.ids.push(id);
        let at = self.ids.len() - 1;
        tickets[id].due_at = at as u32;
        self.rise(tickets, at);
    }

    /// Takes a ticket's deadline out, if it has one.
    pub fn remove(&mut self, tickets: &mut Tickets, id: TicketId) {
        let at = tickets[id].due_at;
        if at == NONE {
            return;
        }
        let at = at as usize;
        tickets[id].due_at = NONE;
        self.moments.swap_remove(at);
        self.ids.swap_remove(at);
        if at < self.ids.len() {
            tickets[self.ids[at]].due_at = at as u32;
            let at = self.rise(tickets, at);
            self.sink(tickets, at);
        }
    }

    /// A moment for each ticket, and no ticket that is none.
    pub fn is_whole(&self, is_ticket: impl Fn(TicketId) -> bool) -> bool {
        self.moments.len() == self.ids.len() && self.ids.iter().all(|id| is_ticket(*id))
    }

    pub fn len(&self) -> usize {
        self.ids.len()
    }

    fn rise(&mut self, tickets: &mut Tickets, mut at: usize) -> usize {
        while at > 0 {
            let parent = (at - 1) / ARITY;
            if self.moments[parent] <= self.moments[at] {
                break;
            }
            self.swap(tickets, parent, at);
            at = parent;
        }
        at
    }

    fn sink(&mut self, tickets: &mut Tickets, mut at: usize) {
        loop {
            let first = at * ARITY + 1;
            let last = (first + ARITY).min(self.ids.len());
            let Some(child) = (first..last).min_by_key(|child| self.moments[*child]) else { return };
            if self.moments[at] <= self.moments[child] {
                return;
            }
            self.swap(tickets, at, child);
            at = child;
        }
    }

    fn swap(&mut self, tickets: &mut Tickets, a: usize, b: usize) {
        self.moments.swap(a, b);
        self.ids.swap(a, b);
        tickets[self.ids[a]].due_at = a as u32;
        tickets[self.ids[b]].due_at = b as u32;
    }
}
