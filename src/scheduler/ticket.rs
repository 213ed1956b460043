//! The admitted requests, and what deciding needs of each.
//!
//! Always true
//! - A ticket's number is reused only after it left. Nothing is allocated until more wait than ever before, and never
//!   beyond the bound given at construction.
//! - 48 bytes a ticket, and 12 more for its deadline (due.rs).

use std::ops::{Index, IndexMut};

use super::backlog::Rank;
use super::{Arrival, Class, TicketId};
use crate::vocab::{ModelHandle, Moment};

pub const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq, bincode::Decode, bincode::Encode)]
pub enum Place {
    Free,
    Lane,
    Composition,
    /// Off its list, about to leave in the batch being sealed.
    Taken,
    /// The same, from a composition.
    TakenComposed,
    /// Off its list: it cannot be served by its deadline. Leaves with the next `poll_expired`.
    Shed,
}

#[derive(Clone, Debug, bincode::Decode, bincode::Encode)]
pub struct Ticket {
    pub admitted_at: Moment,
    /// Order of admission among tickets of one moment.
    pub sequence: u32,
    /// Payload bytes.
    pub bytes: u32,
    pub rows: u32,
    pub len: u32,
    pub next: u32,
    pub prev: u32,
    /// Where its deadline is in the heap of its model; NONE without one.
    pub due_at: u32,
    /// 1 / slack, in 1/ns: how fast it becomes urgent.
    pub urgency: f32,
    pub model: ModelHandle,
    pub bucket: u16,
    /// Its tenant's place in the model's table.
    pub tenant: u16,
    pub class: Class,
    pub place: Place,
}

const _: () = assert!(size_of::<Ticket>() <= 48);

impl Ticket {
    /// Its deadline is among those of compositions.
    pub fn is_composed(&self) -> bool {
        matches!(self.place, Place::Composition | Place::TakenComposed)
    }

    /// Who goes before it.
    pub fn rank(&self) -> Rank {
        Rank::of(self.class, self.urgency)
    }

    /// Before another in order of admission.
    pub fn came_before(&self, other: &Ticket) -> bool {
        let wrapped = self.sequence.wrapping_sub(other.sequence) as i32;
        self.admitted_at < other.admitted_at || (self.admitted_at == other.admitted_at && wrapped < 0)
    }
}

/// All tickets of a server.
#[derive(Debug, bincode::Decode, bincode::Encode)]
pub struct Tickets {
    entries: Vec<Ticket>,
    /// First of the list of free entries, linked by `next`.
    free: u32,
    sequence: u32,
}

/// Tickets that memory is reserved for at most, whatever the bound; untouched memory costs nothing.
pub const RESERVE_MAX: u64 = 1 << 20;

impl Tickets {
    /// `bound` is the bound on waiting rows, and each ticket has a row at least.
    pub fn new(bound: u64) -> Tickets {
        Tickets { entries: Vec::with_capacity(bound.min(RESERVE_MAX) as usize), free: NONE, sequence: 0 }
    }

    pub fn insert(&mut self, arrival: &Arrival, bucket: u16, tenant: u16, urgency: f32, now: Moment) -> TicketId {
        let ticket = Ticket {
            admitted_at: now,
            sequence: self.sequence,
            bytes: u32::try_from(arrival.bytes).expect("a frame's payload length has 32 bits"),
            rows: arrival.rows,
            len: arrival.len,
            next: NONE,
            prev: NONE,
            due_at: NONE,
            urgency,
            model: arrival.model,
            bucket,
            tenant,
            class: arrival.class,
            place: Place::Taken,
        };
        self.sequence = self.sequence.wrapping_add(1);
        if self.free == NONE {
            self.entries.push(ticket);
            return TicketId(u32::try_from(self.entries.len() - 1).expect("rows waiting are bounded below 2^32"));
        }
        let id = self.free;
        let entry = &mut self.entries[id as usize];
        self.free = entry.next;
        *entry = ticket;
        TicketId(id)
    }

    pub fn remove(&mut self, id: TicketId) {
        let free = self.free;
        let ticket = &mut self[id];
        assert!(ticket.place != Place::Free, "a ticket leaves exactly once");
        ticket.place = Place::Free;
        ticket.next = free;
        self.free = id.0;
    }

    /// All tickets of a model that are not gone, in no order. Walks everything: for changes of policy.
    pub fn of(&self, model: ModelHandle) -> impl Iterator<Item = TicketId> {
        let here = move |(_, ticket): &(usize, &Ticket)| ticket.model == model && ticket.place != Place::Free;
        self.entries.iter().enumerate().filter(here).map(|(at, _)| TicketId(at as u32))
    }

    /// Places that were ever used.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn all(&self) -> impl Iterator<Item = &Ticket> {
        self.entries.iter()
    }

    /// First of the free places, or [`NONE`].
    pub fn free(&self) -> u32 {
        self.free
    }

    pub fn is_waiting(&self, id: TicketId) -> bool {
        self.entries.get(id.index()).is_some_and(|ticket| matches!(ticket.place, Place::Lane | Place::Composition))
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
