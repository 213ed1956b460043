//! Batches composed by a test: requests with one tag share exactly one batch, and nobody else joins.
//!
//! Always true
//! - A composition is sealed when its rows are complete, or its members expire after [`WAIT_MAX`] at the latest.

use std::collections::BTreeMap;
use std::time::Duration;

use super::ticket::{Place, Tickets};
use super::{Arrival, Compose, Policy, TicketId};
use crate::vocab::{ModelHandle, Refusal};

/// Longest wait for the missing members of a composition.
pub const WAIT_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, Default, bincode::Decode, bincode::Encode)]
struct Group {
    members: Vec<TicketId>,
    rows: u32,
    rows_wanted: u32,
}

/// All incomplete or unsealed compositions. Ordered maps, so that replays decide alike.
#[derive(Debug, Default, bincode::Decode, bincode::Encode)]
pub struct Compositions {
    groups: BTreeMap<(ModelHandle, u64), Group>,
    /// Complete groups, in the order they became so.
    complete: std::collections::VecDeque<(ModelHandle, u64)>,
    /// Which composition a ticket is in.
    tags: BTreeMap<TicketId, u64>,
}

impl Compositions {
    pub fn check(&self, policy: &Policy, arrival: &Arrival, compose: Compose) -> Result<(), Refusal> {
        let possible = policy.rows_at(policy.buckets.longest()).min(policy.rows_max);
        if compose.rows == 0 || compose.rows > possible {
            return Err(Refusal::invalid(format!(
                "compose_rows: expected 1 to {possible} rows for this model, got {}",
                compose.rows
            )));
        }
        let (rows, wanted) = match self.groups.get(&(arrival.model, compose.tag)) {
            Some(group) => (group.rows, group.rows_wanted),
            None => (0, compose.rows),
        };
        if wanted != compose.rows {
            return Err(Refusal::invalid(format!(
                "compose_rows: expected {wanted} as in the requests before with this tag, got {}",
                compose.rows
            )));
        }
        if rows + arrival.rows > wanted {
            return Err(Refusal::invalid(format!(
                "compose_rows: {rows} of {wanted} rows are there, {} more do not fit",
                arrival.rows
            )));
        }
        Ok(())
    }

    pub fn join(&mut self, tickets: &mut Tickets, id: TicketId, model: ModelHandle, compose: Compose) {
        let ticket = &mut tickets[id];
        ticket.place = Place::Composition;
        self.tags.insert(id, compose.tag);
        let key = (model, compose.tag);
        let group = self.groups.entry(key).or_default();
        group.rows_wanted = compose.rows;
        group.rows += ticket.rows;
        group.members.push(id);
        if group.rows == group.rows_wanted {
            self.complete.push_back(key);
        }
    }

    pub fn unlink(&mut self, tickets: &Tickets, id: TicketId) {
        let tag = self.tags.remove(&id).expect("a ticket in a composition has its tag");
        let key = (tickets[id].model, tag);
        let group = self.groups.get_mut(&key).expect("a ticket in a composition is in its group");
        if group.rows == group.rows_wanted {
            self.complete.retain(|complete| *complete != key);
        }
        group.rows -= tickets[id].rows;
        group.members.retain(|member| *member != id);
        if group.members.is_empty() {
            self.groups.remove(&key);
        }
    }

    /// Rows of the largest composition of a model.
    pub fn rows_max(&self, model: ModelHandle) -> u32 {
        let of_model = self.groups.range((model, 0)..=(model, u64::MAX));
        of_model.map(|(_, group)| group.rows_wanted).max().unwrap_or(0)
    }

    /// Every member and every complete composition is there.
    pub fn is_whole(&self, is_ticket: impl Fn(TicketId) -> bool) -> bool {
        let whole = |group: &Group| group.members.iter().all(|id| is_ticket(*id) && self.tags.contains_key(id));
        self.groups.values().all(whole) && self.complete.iter().all(|key| self.groups.contains_key(key))
    }

    /// Whether a complete composition that runs here waits.
    pub fn has_complete(&self, runs_here: impl Fn(ModelHandle) -> bool) -> bool {
        self.complete.iter().any(|(model, _)| runs_here(*model))
    }

    /// Moves the members of the next complete composition that runs here to `members`.
    pub fn take_complete(
        &mut self,
        tickets: &mut Tickets,
        runs_here: impl Fn(ModelHandle) -> bool,
        members: &mut Vec<TicketId>,
    ) -> Option<ModelHandle> {
        let at = self.complete.iter().position(|(model, _)| runs_here(*model))?;
        let key = self.complete.remove(at).expect("just found");
        let group = self.groups.remove(&key).expect("a complete composition has its group");
        for id in &group.members {
            tickets[*id].place = Place::TakenComposed;
            self.tags.remove(id);
        }
        members.extend_from_slice(&group.members);
        Some(key.0)
    }
}
