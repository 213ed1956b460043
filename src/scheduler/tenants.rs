//! Whose turn it is among the tenants of one model: start-time fair queueing over padded cells.
//!
//! Each tenant has a virtual time that advances by the padded cells of its rows that ran, divided by its weight. Among
//! tenants whose rows could join a batch, the one that is furthest behind goes first. A tenant that comes back from rest
//! starts at the virtual time of the present: rest earns nothing. (Goyal, Vin, Cheng: Start-time Fair Queuing, 1996.)
//! Deficit round robin gives the same shares; here a batch takes rows from several lengths at once, and "who is
//! furthest behind" needs no round.
//!
//! Always true
//! - At most [`PLACES`] tenants are told apart at a time; further ones share the last place until one is free.

use std::time::Duration;

use super::TenantId;
use crate::vocab::Moment;

pub const PLACES: usize = 64;

#[derive(Clone, Copy, Debug, bincode::Decode, bincode::Encode)]
struct Entry {
    tenant: TenantId,
    /// Padded cells that ran, by weight.
    time: f64,
    /// Padded cells that wait.
    waiting: u64,
    /// Padded cells offered lately, admitted or not; halved each [`HALF_LIFE`].
    offered: f64,
    offered_at: Moment,
}

impl Entry {
    fn offered(&self, now: Moment) -> f64 {
        let halves = now.since(self.offered_at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        self.offered * (-halves).exp2()
    }
}

/// What a tenant offered counts half after this time, when it is asked who fills the queue.
const HALF_LIFE: Duration = Duration::from_secs(1);

#[derive(Debug, bincode::Decode, bincode::Encode)]
pub struct Tenants {
    entries: Vec<Entry>,
    /// The largest virtual time at which a row was taken.
    now: f64,
}

impl Tenants {
    pub fn new() -> Tenants {
        Tenants { entries: Vec::with_capacity(PLACES), now: 0.0 }
    }

    pub fn is_place(&self, place: u16) -> bool {
        usize::from(place) < self.entries.len()
    }

    /// The place of a tenant that adds `cells`.
    pub fn arrive(&mut self, tenant: TenantId, cells: u64) -> u16 {
        let at = self.place(tenant);
        let entry = &mut self.entries[usize::from(at)];
        if entry.waiting == 0 {
            entry.time = entry.time.max(self.now);
        }
        entry.waiting += cells;
        at
    }

    fn place(&mut self, tenant: TenantId) -> u16 {
        if let Some(at) = self.entries.iter().position(|entry| entry.tenant == tenant) {
            return at as u16;
        }
        let entry = Entry { tenant, time: self.now, waiting: 0, offered: 0.0, offered_at: Moment::ZERO };
        if self.entries.len() < PLACES {
            self.entries.push(entry);
            return (self.entries.len() - 1) as u16;
        }
        match self.entries.iter().position(|entry| entry.waiting == 0) {
            Some(at) => {
                self.entries[at] = entry;
                at as u16
            }
            None => (PLACES - 1) as u16,
        }
    }

    /// Cells left the queue.
    pub fn leave(&mut self, place: u16, cells: u64) {
        self.entries[usize::from(place)].waiting -= cells;
    }

    /// What waits is counted in other cells from now on.
    pub fn resize(&mut self, place: u16, before: u64, after: u64) {
        let entry = &mut self.entries[usize::from(place)];
        entry.waiting = entry.waiting - before + after;
    }

    /// A row of this many padded cells was taken for a batch.
    pub fn charge(&mut self, place: u16, cells: u64) {
        let entry = &mut self.entries[usize::from(place)];
        self.now = self.now.max(entry.time);
        entry.time += cells as f64;
    }

    pub fn time(&self, place: u16) -> f64 {
        self.entries[usize::from(place)].time
    }

    /// Tenants with something waiting.
    #[cfg(test)]
    pub fn active(&self) -> usize {
        self.entries.iter().filter(|entry| entry.waiting > 0).count()
    }

    /// Padded cells that wait, of all tenants.
    pub fn waiting_in_all(&self) -> u64 {
        self.entries.iter().map(|entry| entry.waiting).sum()
    }

    /// Padded cells that wait in a tenant's place, and how many places have some waiting or are it.
    pub fn waiting_of(&mut self, tenant: TenantId) -> (u64, usize) {
        let place = usize::from(self.place(tenant));
        let others = self.entries.iter().enumerate().filter(|(at, entry)| *at != place && entry.waiting > 0).count();
        (self.entries[place].waiting, others + 1)
    }

    /// Padded cells of a tenant that wait.
    #[cfg(test)]
    pub fn waiting(&self, tenant: TenantId) -> u64 {
        self.entries.iter().find(|entry| entry.tenant == tenant).map_or(0, |entry| entry.waiting)
    }

    /// A tenant asks for this much, whatever comes of it.
    pub fn offer(&mut self, now: Moment, tenant: TenantId, cells: u64) {
        let at = self.place(tenant);
        let entry = &mut self.entries[usize::from(at)];
        entry.offered = entry.offered(now) + cells as f64;
        entry.offered_at = now;
    }

    /// Whether no other tenant offers more than this one lately, and another is here at all. By what is offered and not by
    /// what waits: who is refused all the time has little waiting.
    pub fn is_heaviest(&self, now: Moment, tenant: TenantId) -> bool {
        let mine = self.entries.iter().find(|entry| entry.tenant == tenant).map_or(0.0, |entry| entry.offered(now));
        let mut another = false;
        for entry in self.entries.iter().filter(|entry| entry.tenant != tenant) {
            let theirs = entry.offered(now);
            if theirs > mine {
                return false;
            }
            another |= entry.waiting > 0 || theirs > 0.01 * mine;
        }
        another
    }
}
