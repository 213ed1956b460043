//! Accepted requests of one shard: which connection waits for which.
//!
//! Always true
//! - A slot is live from acceptance to the first terminal outcome; then its generation rises, so a second outcome for the
//!   same request finds nothing. This is where "exactly once" is kept.
//! - Each live slot is on the list of its connection, so that a dying connection ends all of its requests.

use std::time::Duration;

use crate::scatter::Details;
use crate::scheduler::Class;
use crate::vocab::{ModelHandle, TicketKey};

const NONE: u32 = u32::MAX;

/// What the shard must know to answer a request.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    pub connection: u32,
    pub request_id: u64,
    pub model: ModelHandle,
    pub class: Class,
    pub payload_bytes: u32,
    /// What the reply carries beside the answer.
    pub details: Details,
    /// Rows are answered as they are done.
    pub items: bool,
    /// Its tenant's quota counts it.
    pub in_quota: bool,
    /// What traces.rs keeps of it; 0: nothing.
    pub trace: u32,
}

impl Waiting {
    /// Of the first model, with nothing special.
    #[cfg(test)]
    pub fn plain(connection: u32, request_id: u64) -> Waiting {
        Waiting {
            connection,
            request_id,
            model: ModelHandle(0),
            class: Class::default(),
            payload_bytes: 0,
            details: Details::default(),
            items: false,
            in_quota: false,
            trace: 0,
        }
    }

    pub fn send_lag(&self) -> Option<Duration> {
        (self.details.late_us != 0).then(|| Duration::from_micros(self.details.late_us.into()))
    }
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    generation: u32,
    waiting: Option<Waiting>,
    next: u32,
    prev: u32,
}

/// The head of a connection's list of live slots.
#[derive(Clone, Copy, Debug)]
pub struct Owned {
    head: u32,
}

impl Default for Owned {
    fn default() -> Self {
        Owned { head: NONE }
    }
}

/// The table. Grows to its bound and stays.
#[derive(Debug)]
pub struct InFlight {
    shard: u16,
    slots: Vec<Slot>,
    free: Vec<u32>,
    max: u32,
}

impl InFlight {
    pub fn new(shard: u16, max: u32) -> InFlight {
        InFlight { shard, slots: Vec::new(), free: Vec::new(), max }
    }

    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `None` when the table is full.
    pub fn insert(&mut self, waiting: Waiting, owner: &mut Owned) -> Option<TicketKey> {
        let at = match self.free.pop() {
            Some(at) => at,
            None if self.slots.len() as u64 >= u64::from(self.max) => return None,
            None => {
                self.slots.push(Slot { generation: 0, waiting: None, next: NONE, prev: NONE });
                (self.slots.len() - 1) as u32
            }
        };
        if owner.head != NONE {
            self.slots[owner.head as usize].prev = at;
        }
        let slot = &mut self.slots[at as usize];
        slot.waiting = Some(waiting);
        slot.prev = NONE;
        slot.next = owner.head;
        owner.head = at;
        Some(TicketKey { shard: self.shard, slot: at, generation: slot.generation })
    }

    /// Who waits for this ticket; `None` when it has ended.
    pub fn get(&self, key: TicketKey) -> Option<&Waiting> {
        let slot = self.slots.get(key.slot as usize)?;
        (slot.generation == key.generation).then_some(slot.waiting.as_ref()?)
    }

    /// A live ticket is recorded for a trace.
    pub fn set_trace(&mut self, key: TicketKey, trace: u32) {
        let slot = &mut self.slots[key.slot as usize];
        assert_eq!(slot.generation, key.generation, "it was just inserted");
        slot.waiting.as_mut().expect("it was just inserted").trace = trace;
    }

    /// Ends a ticket: at most once per ticket.
    pub fn remove(&mut self, key: TicketKey, owner: &mut Owned) -> Option<Waiting> {
        let slot = self.slots.get_mut(key.slot as usize)?;
        if slot.generation != key.generation {
            return None;
        }
        let waiting = slot.waiting.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        let (prev, next) = (slot.prev, slot.next);
        match prev {
            NONE => owner.head = next,
            prev => self.slots[prev as usize].next = next,
        }
        if next != NONE {
            self.slots[next as usize].prev = prev;
        }
        self.free.push(key.slot);
        Some(waiting)
    }

    /// The connection's live ticket with this request id. Walks its list, which credit bounds.
    pub fn find(&self, owner: &Owned, request_id: u64) -> Option<TicketKey> {
        self.iter(owner).find(|(_, waiting)| waiting.request_id == request_id).map(|(key, _)| key)
    }

    /// The connection's newest live ticket.
    pub fn first(&self, owner: &Owned) -> Option<TicketKey> {
        self.iter(owner).next().map(|(key, _)| key)
    }

    /// Every live ticket, by slots and not by lists.
    pub fn live(&self) -> impl Iterator<Item = &Waiting> {
        self.slots.iter().filter_map(|slot| slot.waiting.as_ref())
    }

    /// The connection's live tickets, the newest first.
    pub fn iter<'a>(&'a self, owner: &Owned) -> impl Iterator<Item = (TicketKey, &'a Waiting)> {
        let mut at = owner.head;
        std::iter::from_fn(move || {
            let slot = self.slots.get(at as usize)?;
            let key = TicketKey { shard: self.shard, slot: at, generation: slot.generation };
            at = slot.next;
            Some((key, slot.waiting.as_ref().expect("slots on a list are live")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(request_id: u64) -> Waiting {
        Waiting::plain(0, request_id)
    }

    #[test]
    fn a_ticket_ends_once_and_its_slot_gets_another_generation() {
        let mut table = InFlight::new(3, 8);
        let mut owner = Owned::default();
        let key = table.insert(waiting(1), &mut owner).expect("room");
        assert!(table.remove(key, &mut owner).is_some());
        assert!(table.remove(key, &mut owner).is_none(), "a second outcome finds nothing");
        let again = table.insert(waiting(2), &mut owner).expect("room");
        assert_eq!(again.slot, key.slot);
        assert!(table.remove(key, &mut owner).is_none(), "nor does it end the slot's next user");
        assert_eq!(table.get(again).expect("live").request_id, 2);
    }

    #[test]
    fn the_table_has_a_bound() {
        let mut table = InFlight::new(0, 2);
        let mut owner = Owned::default();
        assert!(table.insert(waiting(1), &mut owner).is_some());
        assert!(table.insert(waiting(2), &mut owner).is_some());
        assert!(table.insert(waiting(3), &mut owner).is_none());
        assert_eq!(table.len(), 2);
    }

    #[test]
    fn a_connection_finds_its_own_in_any_order_of_leaving() {
        let mut table = InFlight::new(0, 16);
        let (mut one, mut two) = (Owned::default(), Owned::default());
        let keys: Vec<_> = (0..6).map(|id| table.insert(waiting(id), &mut one).expect("room")).collect();
        let other = table.insert(waiting(3), &mut two).expect("room");
        for at in [2, 0, 5] {
            assert!(table.remove(keys[at], &mut one).is_some());
        }
        assert_eq!(table.find(&one, 3), Some(keys[3]));
        assert_eq!(table.find(&two, 3), Some(other));
        assert_eq!(table.find(&one, 5), None);
        while let Some(key) = table.first(&one) {
            table.remove(key, &mut one);
        }
        assert_eq!(table.len(), 1);
    }
}
