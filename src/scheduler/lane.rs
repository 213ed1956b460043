//! One model's waiting tickets: a first-in first-out list for each tenant, class and bucket, linked through the tickets.
//!
//! Always true
//! - Entering, leaving from anywhere and looking at a head are O(1).
//! - `rows` of a lane is the sum over its tickets. A class's sums over a bucket are those of its tenants' lanes.

use super::due::Due;
use super::ticket::{NONE, Place, Ticket, Tickets};
use super::{Class, TicketId};
use crate::vocab::Moment;

/// A list, oldest first.
#[derive(Clone, Copy, Debug, bincode::Decode, bincode::Encode)]
pub struct Lane {
    head: u32,
    tail: u32,
    pub rows: u32,
    /// The head's deadline.
    pub head_due: Moment,
}

impl Lane {
    const EMPTY: Lane = Lane { head: NONE, tail: NONE, rows: 0, head_due: Moment::FAR };

    pub fn oldest(&self) -> Option<TicketId> {
        (self.head != NONE).then_some(TicketId(self.head))
    }
}

/// What waits in one bucket and class, over all tenants.
#[derive(Clone, Copy, Debug, Default, bincode::Decode, bincode::Encode)]
pub struct Sums {
    pub rows: u32,
    pub tickets: u32,
    /// Σ rows/slack, in 1/ns.
    pub urgency: f64,
    /// Σ rows·arrival/slack: with `urgency`, the summed age of all rows in units of their slack, at any moment.
    pub arrival: f64,
}

impl Sums {
    /// Σ age/slack of the rows. `now` in ns.
    pub fn age(&self, now: f64) -> f64 {
        let age = now * self.urgency - self.arrival;
        if age > 0.0 { age } else { 0.0 }
    }
}

#[derive(Debug, bincode::Decode, bincode::Encode)]
pub struct Lanes {
    buckets: u16,
    /// Classes and tenants have lists of their own; otherwise all share those of the first.
    fair: bool,
    /// By tenant, class and bucket. Grows by a block for each tenant that ever waited here at the same time.
    lanes: Vec<Lane>,
    /// By class and bucket.
    sums: Vec<Sums>,
    /// Tenants with a block.
    pub tenants: u16,
}

impl Lanes {
    pub fn new(buckets: usize, fair: bool) -> Lanes {
        let block = buckets * Class::COUNT;
        Lanes {
            buckets: buckets as u16,
            fair,
            lanes: vec![Lane::EMPTY; block],
            sums: vec![Sums::default(); block],
            tenants: 1,
        }
    }

    pub fn buckets(&self) -> u16 {
        self.buckets
    }

    /// Every lane and sum is there, and no head or tail points nowhere.
    pub fn is_whole(&self, is_link: impl Fn(u32) -> bool) -> bool {
        let block = usize::from(self.buckets) * Class::COUNT;
        self.sums.len() == block
            && self.lanes.len() == block * usize::from(self.tenants)
            && self.lanes.iter().all(|lane| is_link(lane.head) && is_link(lane.tail))
    }

    fn at(&self, tenant: u16, class: Class, bucket: u16) -> usize {
        (usize::from(tenant) * Class::COUNT + class.index()) * usize::from(self.buckets) + usize::from(bucket)
    }

    /// The list of a ticket: its tenant and class.
    fn key(&self, ticket: &Ticket) -> (u16, Class) {
        if self.fair { (ticket.tenant, ticket.class) } else { (0, Class::ALL[0]) }
    }

    fn sums_of(&mut self, class: Class, bucket: u16) -> &mut Sums {
        &mut self.sums[class.index() * usize::from(self.buckets) + usize::from(bucket)]
    }

    /// Makes room for a tenant.
    fn reach(&mut self, tenant: u16) {
        if tenant >= self.tenants {
            self.tenants = tenant + 1;
            let block = usize::from(self.buckets) * Class::COUNT;
            self.lanes.resize(block * usize::from(self.tenants), Lane::EMPTY);
        }
    }

    pub fn lane(&self, tenant: u16, class: Class, bucket: u16) -> &Lane {
        &self.lanes[self.at(tenant, class, bucket)]
    }

    pub fn sums(&self, class: Class, bucket: u16) -> &Sums {
        &self.sums[class.index() * usize::from(self.buckets) + usize::from(bucket)]
    }

    /// Rows of a bucket, of all classes.
    pub fn rows(&self, bucket: u16) -> u32 {
        Class::ALL.iter().map(|class| self.sums(*class, bucket).rows).sum()
    }

    /// The soonest deadline among the heads of a bucket's lanes of one class.
    pub fn head_due(&self, class: Class, bucket: u16) -> Moment {
        let first = self.lane(0, class, bucket).head_due;
        (1..self.tenants).fold(first, |due, tenant| due.min(self.lane(tenant, class, bucket).head_due))
    }

    /// The ticket of a bucket that was admitted first.
    pub fn oldest(&self, tickets: &Tickets, bucket: u16) -> Option<TicketId> {
        let mut oldest: Option<TicketId> = None;
        for class in Class::ALL {
            if self.sums(class, bucket).tickets == 0 {
                continue;
            }
            for tenant in 0..self.tenants {
                if let Some(id) = self.lane(tenant, class, bucket).oldest()
                    && oldest.is_none_or(|oldest| tickets[id].came_before(&tickets[oldest]))
                {
                    oldest = Some(id);
                }
            }
        }
        oldest
    }

    /// The ticket behind `id` in its lane.
    pub fn after(&self, tickets: &Tickets, id: TicketId) -> Option<TicketId> {
        let next = tickets[id].next;
        (next != NONE).then_some(TicketId(next))
    }

    /// Walks every list, and says how many rows are in them all, or what is wrong.
    pub fn counted(&self, tickets: &Tickets) -> Result<u64, String> {
        let mut all = 0;
        for class in Class::ALL {
            for bucket in 0..self.buckets {
                let (mut rows, mut count) = (0u64, 0u32);
                for tenant in 0..self.tenants {
                    let lane = self.lane(tenant, class, bucket);
                    let (mut in_lane, mut next) = (0u64, lane.oldest());
                    while let Some(id) = next {
                        in_lane += u64::from(tickets[id].rows);
                        count += 1;
                        next = self.after(tickets, id);
                    }
                    if in_lane != u64::from(lane.rows) {
                        return Err(format!("a lane says {} rows, counted {in_lane}", lane.rows));
                    }
                    rows += in_lane;
                }
                let sums = self.sums(class, bucket);
                if (u64::from(sums.rows), sums.tickets) != (rows, count) {
                    return Err(format!(
                        "bucket {bucket} says {} rows in {} tickets, counted {rows} in {count}",
                        sums.rows, sums.tickets
                    ));
                }
                all += rows;
            }
        }
        Ok(all)
    }

    pub fn push_back(&mut self, tickets: &mut Tickets, due: &Due, id: TicketId) {
        let ticket = &tickets[id];
        let (tenant, class) = self.key(ticket);
        self.reach(tenant);
        let (rows, bucket, came) = (ticket.rows, ticket.bucket, ticket.admitted_at.nanos() as f64);
        let weight = f64::from(ticket.urgency) * f64::from(rows);
        let at = self.at(tenant, class, bucket);
        let sums = self.sums_of(class, bucket);
        sums.rows += rows;
        sums.tickets += 1;
        sums.urgency += weight;
        sums.arrival += weight * came;
        let deadline = due.of(tickets, id);
        let lane = &mut self.lanes[at];
        lane.rows += rows;
        let tail = std::mem::replace(&mut lane.tail, id.0);
        if tail == NONE {
            lane.head = id.0;
            lane.head_due = deadline;
        } else {
            tickets[TicketId(tail)].next = id.0;
        }
        let ticket = &mut tickets[id];
        ticket.place = Place::Lane;
        ticket.prev = tail;
        ticket.next = NONE;
    }

    /// Takes a ticket out of its lane; the caller sends it on its way. `due` still holds its deadline.
    pub fn unlink(&mut self, tickets: &mut Tickets, due: &Due, id: TicketId) {
        let (tenant, class) = self.key(&tickets[id]);
        let ticket = &mut tickets[id];
        assert!(ticket.place == Place::Lane, "only a ticket in a lane is unlinked");
        ticket.place = Place::Taken;
        let (prev, next, rows, bucket) = (ticket.prev, ticket.next, ticket.rows, ticket.bucket);
        let weight = f64::from(ticket.urgency) * f64::from(rows);
        let came = ticket.admitted_at.nanos() as f64;
        let at = self.at(tenant, class, bucket);
        let sums = self.sums_of(class, bucket);
        sums.rows -= rows;
        sums.tickets -= 1;
        if sums.tickets == 0 {
            // Rounding must not outlive the tickets it came from.
            *sums = Sums::default();
        } else {
            sums.urgency -= weight;
            sums.arrival -= weight * came;
        }
        if next != NONE {
            tickets[TicketId(next)].prev = prev;
        }
        let head_due = if prev == NONE && next != NONE { due.of(tickets, TicketId(next)) } else { Moment::FAR };
        let lane = &mut self.lanes[at];
        lane.rows -= rows;
        if next == NONE {
            lane.tail = prev;
        }
        if prev == NONE {
            lane.head = next;
            lane.head_due = head_due;
        } else {
            tickets[TicketId(prev)].next = next;
        }
    }
}
