//! Tickets in their places: one first-in first-out list per bucket, linked through the tickets themselves.
//!
//! Always true
//! - Entering, leaving from anywhere and looking at the oldest are O(1); nothing is allocated after construction until
//!   the queue is longer than ever before.
//! - `rows` of a lane is the sum over its tickets; no deadline of a ticket in it is before `soonest`.

use std::ops::{Index, IndexMut};

use super::{Arrival, TicketId};
use crate::vocab::{ModelHandle, Moment};

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Free,
    Lane,
    /// In the composition with this tag.
    Composition(u64),
    /// Off its list, about to leave in the batch being sealed.
    Taken,
}

#[derive(Clone, Debug)]
pub struct Ticket {
    pub model: ModelHandle,
    pub place: Place,
    pub rows: u32,
    pub len: u32,
    pub bucket: u16,
    pub bytes: u64,
    pub deadline: Option<Moment>,
    pub admitted_at: Moment,
    generation: u32,
    next: u32,
    prev: u32,
}

/// All tickets; places are reused, generations tell the users apart.
#[derive(Debug)]
pub struct Tickets {
    entries: Vec<Ticket>,
    free: Vec<u32>,
}

impl Tickets {
    /// `expected` is the bound on waiting rows; memory is taken as the queue grows, at most for that many.
    pub fn new(expected: u64) -> Tickets {
        let start = expected.min(1024) as usize;
        Tickets { entries: Vec::with_capacity(start), free: Vec::with_capacity(start) }
    }

    pub fn insert(&mut self, arrival: &Arrival, bucket: u16, deadline: Option<Moment>, now: Moment) -> TicketId {
        let generation = |old: u32| old.wrapping_add(1);
        let ticket = Ticket {
            model: arrival.model,
            place: Place::Taken,
            rows: arrival.rows,
            len: arrival.len,
            bucket,
            bytes: arrival.bytes,
            deadline,
            admitted_at: now,
            generation: 0,
            next: NONE,
            prev: NONE,
        };
        match self.free.pop() {
            Some(at) => {
                let entry = &mut self.entries[at as usize];
                *entry = Ticket { generation: generation(entry.generation), ..ticket };
                TicketId(at)
            }
            None => {
                self.entries.push(ticket);
                TicketId(u32::try_from(self.entries.len() - 1).expect("rows waiting are bounded below 2^32"))
            }
        }
    }

    pub fn remove(&mut self, id: TicketId) {
        let ticket = &mut self[id];
        assert!(ticket.place != Place::Free, "a ticket leaves exactly once");
        ticket.place = Place::Free;
        self.free.push(id.0);
    }

    pub fn is_waiting(&self, id: TicketId) -> bool {
        self.entries.get(id.index()).is_some_and(|ticket| matches!(ticket.place, Place::Lane | Place::Composition(_)))
    }

    pub fn generation(&self, id: TicketId) -> u32 {
        self[id].generation
    }

    /// Whether the ticket that had this generation still waits.
    pub fn still_waits(&self, id: TicketId, generation: u32) -> bool {
        self.is_waiting(id) && self[id].generation == generation
    }

    pub fn admitted_at(&self, id: TicketId) -> Moment {
        self[id].admitted_at
    }
}

impl Index<TicketId> for Tickets {
    type Output = Ticket;

    fn index(&self, id: TicketId) -> &Ticket {
        &self.entries[id.index()]
    }
}

impl IndexMut<TicketId> for Tickets {
    fn index_mut(&mut self, id: TicketId) -> &mut Ticket {
        &mut self.entries[id.index()]
    }
}

/// One bucket's waiters, oldest first.
#[derive(Clone, Copy, Debug)]
pub struct Lane {
    head: u32,
    tail: u32,
    pub rows: u64,
    /// No deadline in this lane is before this moment. May be too early once the ticket it came from has left:
    /// [`Lanes::look_for_soonest`] finds out.
    pub soonest: Moment,
}

impl Lane {
    pub fn oldest(&self) -> Option<TicketId> {
        (self.head != NONE).then_some(TicketId(self.head))
    }
}

/// The lanes of one model, by bucket.
#[derive(Debug)]
pub struct Lanes {
    lanes: Vec<Lane>,
}

impl Lanes {
    pub fn new(buckets: usize) -> Lanes {
        Lanes { lanes: vec![Lane { head: NONE, tail: NONE, rows: 0, soonest: Moment::FAR }; buckets] }
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (u16, &Lane)> {
        self.lanes.iter().enumerate().map(|(bucket, lane)| (bucket as u16, lane))
    }

    pub fn len(&self) -> u16 {
        self.lanes.len() as u16
    }

    pub fn lane(&self, bucket: u16) -> &Lane {
        &self.lanes[usize::from(bucket)]
    }

    /// The ticket behind `id` in its lane.
    pub fn after(&self, tickets: &Tickets, id: TicketId) -> Option<TicketId> {
        let next = tickets[id].next;
        (next != NONE).then_some(TicketId(next))
    }

    pub fn push_back(&mut self, tickets: &mut Tickets, id: TicketId) {
        let lane = &mut self.lanes[usize::from(tickets[id].bucket)];
        let tail = lane.tail;
        lane.tail = id.0;
        if tail == NONE {
            lane.head = id.0;
        } else {
            tickets[TicketId(tail)].next = id.0;
        }
        let ticket = &mut tickets[id];
        ticket.place = Place::Lane;
        ticket.prev = tail;
        ticket.next = NONE;
        lane.rows += u64::from(ticket.rows);
        if let Some(deadline) = ticket.deadline {
            lane.soonest = lane.soonest.min(deadline);
        }
    }

    /// The soonest deadline in a lane, [`Moment::FAR`] when there is none. Walks the lane: asked only when the bound
    /// presses and the lane is not full, so it is shorter than a batch.
    pub fn look_for_soonest(&mut self, tickets: &Tickets, bucket: u16) -> Moment {
        let mut soonest = Moment::FAR;
        let mut next = self.lane(bucket).oldest();
        while let Some(id) = next {
            soonest = soonest.min(tickets[id].deadline.unwrap_or(Moment::FAR));
            next = self.after(tickets, id);
        }
        self.lanes[usize::from(bucket)].soonest = soonest;
        soonest
    }

    /// Takes a ticket out of its lane; the caller sends it on its way.
    pub fn unlink(&mut self, tickets: &mut Tickets, id: TicketId) {
        let ticket = &mut tickets[id];
        assert!(ticket.place == Place::Lane, "only a ticket in a lane is unlinked");
        ticket.place = Place::Taken;
        let (prev, next, bucket, rows) = (ticket.prev, ticket.next, ticket.bucket, ticket.rows);
        let lane = &mut self.lanes[usize::from(bucket)];
        lane.rows -= u64::from(rows);
        if lane.rows == 0 {
            lane.soonest = Moment::FAR;
        }
        match prev {
            NONE => lane.head = next,
            prev => tickets[TicketId(prev)].next = next,
        }
        match next {
            NONE => self.lanes[usize::from(bucket)].tail = prev,
            next => tickets[TicketId(next)].prev = prev,
        }
    }
}
