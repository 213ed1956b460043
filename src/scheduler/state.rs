//! The scheduler's whole state as bytes, so that a replay starts where a capture did.
//!
//! Always true
//! - A scheduler that was restored decides as the one that was saved: all that decisions depend on is in the bytes, and of
//!   the decision log its count and hash.
//! - Bytes of another [`LAYOUT`], cut ones and ones whose parts do not fit each other are refused with a [`StateError`];
//!   what is restored holds no index that points nowhere. At most [`STATE_BYTES_MAX`] are taken for a state.
//!
//! Elsewhere: the file it is kept in (capture), the part of it that any version can read (capture/header.rs).

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bincode::de::Decoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode};

use super::decision::DecisionLog;
use super::policy::Class;
use super::ticket::{NONE, Place, Ticket};
use super::{Buckets, ModelQueue, Policy, Scheduler, TicketId};
use crate::vocab::ModelHandle;

/// Raised with every change of what is saved: a field, its type, its order, or what it means.
pub const LAYOUT: u32 = 7;

/// Most bytes of a saved state, and most memory that restoring one may ask for.
pub const STATE_BYTES_MAX: usize = 256 << 20;

type Config = Configuration<LittleEndian, Varint, Limit<STATE_BYTES_MAX>>;

const CONFIG: Config = bincode::config::standard().with_limit::<STATE_BYTES_MAX>();

/// Why bytes are no state of this version's scheduler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateError {
    Layout {
        found: u32,
    },
    /// They end too early, go on too long, or hold a value that cannot be.
    Malformed(String),
    /// Parts that do not fit each other.
    Unsound(&'static str),
}

impl std::fmt::Display for StateError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StateError::Layout { found } => {
                write!(f, "the scheduler's state has layout {found}; this version reads layout {LAYOUT}")
            }
            StateError::Malformed(what) => write!(f, "the scheduler's state is malformed: {what}"),
            StateError::Unsound(what) => write!(f, "the scheduler's state contradicts itself: {what}"),
        }
    }
}

impl std::error::Error for StateError {}

impl Scheduler {
    /// All of it, as bytes of layout [`LAYOUT`]. Some ten bytes for each ticket that ever waited at the same time, and
    /// some thousand for each model. `None`: more than [`STATE_BYTES_MAX`].
    pub fn save(&self) -> Option<Vec<u8>> {
        let bytes = bincode::encode_to_vec(self, CONFIG).expect("only writing to a full buffer fails, and a Vec grows");
        (bytes.len() <= STATE_BYTES_MAX).then_some(bytes)
    }

    /// The scheduler that was saved as these bytes, of layout `layout`.
    pub fn restore(layout: u32, bytes: &[u8]) -> Result<Scheduler, StateError> {
        if layout != LAYOUT {
            return Err(StateError::Layout { found: layout });
        }
        let (scheduler, used) = bincode::decode_from_slice::<Scheduler, Config>(bytes, CONFIG)
            .map_err(|error| StateError::Malformed(error.to_string()))?;
        if used != bytes.len() {
            return Err(StateError::Malformed(format!("{} bytes, of which it uses {used}", bytes.len())));
        }
        scheduler.check().map_err(StateError::Unsound)?;
        Ok(scheduler)
    }

    /// Whether every index points somewhere. Not whether the state can come to be: only a saved one is known to.
    fn check(&self) -> Result<(), &'static str> {
        let holds = |holds: bool, what: &'static str| if holds { Ok(()) } else { Err(what) };
        let tickets = self.tickets.len();
        let is_link = |link: u32| link == NONE || (link as usize) < tickets;
        holds(is_link(self.tickets.free()), "the free list")?;
        for ticket in self.tickets.all().filter(|ticket| ticket.place != Place::Free) {
            let queue = self.models.get(ticket.model.index()).ok_or("a ticket's model")?;
            holds(queue.takes(ticket), "a ticket's bucket, tenant or deadline")?;
        }
        holds(self.tickets.all().all(|ticket| is_link(ticket.next) && is_link(ticket.prev)), "a ticket's list")?;
        holds(self.shed.iter().all(|id| id.index() < tickets), "a ticket that was given up")?;
        for queue in &self.models {
            holds(queue.policy.buckets.len() == usize::from(queue.lanes.buckets()), "a model's buckets")?;
            holds(queue.seen.is_whole(), "a model's lengths")?;
            holds(queue.lanes.is_whole(is_link), "a model's lanes")?;
            for due in [&queue.due, &queue.due_composed] {
                holds(due.is_whole(|id| id.index() < tickets), "a model's deadlines")?;
            }
            holds(
                queue.cost.is_whole(self.seats.seats.len())
                    && queue.overrun.is_whole()
                    && queue.packer.is_whole(queue.policy.buckets.len()),
                "a model's cost",
            )?;
        }
        holds(self.compositions.is_whole(|id: TicketId| id.index() < tickets), "a composition")?;
        holds(self.seats.is_whole(|model: ModelHandle| model.index() < self.models.len()), "an executor")
    }
}

/// A policy as bytes of layout [`LAYOUT`].
pub fn save_policy(policy: &Policy) -> Vec<u8> {
    bincode::encode_to_vec(policy, CONFIG).expect("a Vec takes everything")
}

/// The policy that was saved as these bytes, of layout `layout`.
pub fn restore_policy(layout: u32, bytes: &[u8]) -> Result<Policy, StateError> {
    if layout != LAYOUT {
        return Err(StateError::Layout { found: layout });
    }
    match bincode::decode_from_slice::<Policy, Config>(bytes, CONFIG) {
        Ok((policy, used)) if used == bytes.len() => Ok(policy),
        Ok(_) => Err(StateError::Malformed("bytes behind a policy".into())),
        Err(error) => Err(StateError::Malformed(error.to_string())),
    }
}

impl ModelQueue {
    fn takes(&self, ticket: &Ticket) -> bool {
        let due = if ticket.is_composed() { &self.due_composed } else { &self.due };
        usize::from(ticket.bucket) < self.policy.buckets.len()
            && self.tenants.is_place(ticket.tenant)
            && (ticket.due_at == NONE || (ticket.due_at as usize) < due.len())
    }
}

impl Encode for Class {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        (self.index() as u8).encode(encoder)
    }
}

impl<Context> Decode<Context> for Class {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<Class, DecodeError> {
        let class = u8::decode(decoder)?;
        match usize::from(class) < Class::COUNT {
            true => Ok(Class::from_priority(class)),
            false => Err(DecodeError::OtherString(format!("class {class}"))),
        }
    }
}

impl Encode for Buckets {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        self.lens().encode(encoder)
    }
}

impl<Context> Decode<Context> for Buckets {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<Buckets, DecodeError> {
        let lens = Vec::<u32>::decode(decoder)?;
        Buckets::new(&lens).map_err(|error| DecodeError::OtherString(error.to_string()))
    }
}

/// The last decisions themselves are not state: nothing depends on them.
impl Encode for DecisionLog {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        (self.count(), self.hash()).encode(encoder)
    }
}

impl<Context> Decode<Context> for DecisionLog {
    fn decode<D: Decoder<Context = Context>>(decoder: &mut D) -> Result<DecisionLog, DecodeError> {
        let (count, hash) = Decode::decode(decoder)?;
        Ok(DecisionLog::resume(count, hash))
    }
}

bincode::impl_borrow_decode!(Class);
bincode::impl_borrow_decode!(Buckets);
bincode::impl_borrow_decode!(DecisionLog);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::{
        Arrival, Compose, Edges, Group, PolicyKind, QueueLimits, SealedBatch, SeatSpec, TenantId, Tuning,
    };
    use crate::vocab::Moment;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::time::Duration;

    fn fresh(seed: u64) -> Scheduler {
        let mut rng = StdRng::seed_from_u64(seed);
        let policies = (0..3)
            .map(|at| {
                let buckets = if at == 0 { Buckets::new(&[1]).expect("one") } else { Buckets::geometric(64) };
                Policy {
                    kind: PolicyKind::ALL[rng.random_range(0..4)],
                    queue_delay_max: rng.random_bool(0.7).then_some(Duration::from_micros(rng.random_range(0..900))),
                    edges: if rng.random_bool(0.5) { Edges::Auto } else { Edges::Given },
                    group: if at == 0 { Group::Inline } else { Group::Executors },
                    ..Policy::new(8, 256, buckets)
                }
            })
            .collect();
        let mut seats = SeatSpec::separate(Group::Executors, 2, 2);
        seats.push(SeatSpec { group: Group::Inline, slots: 1, device: 0 });
        if seed % 2 == 1 {
            // Two streams of one device.
            seats[1].device = 0;
        }
        Scheduler::new(QueueLimits { rows_max: 60, ..QueueLimits::NONE }, policies, &seats)
    }

    /// One random step of a life; equal rngs take equal steps.
    fn step(scheduler: &mut Scheduler, running: &mut Vec<SealedBatch>, rng: &mut StdRng, now: Moment) {
        for _ in 0..rng.random_range(0..4) {
            let model = rng.random_range(0..3u16);
            let arrival = Arrival {
                model: ModelHandle(model),
                rows: rng.random_range(1..4),
                len: if model == 0 { 1 } else { rng.random_range(1..65) },
                bytes: rng.random_range(0..999),
                deadline: rng.random_bool(0.5).then(|| now + Duration::from_micros(rng.random_range(1..5000))),
                compose: rng.random_bool(0.1).then(|| Compose { tag: rng.random_range(0..3), rows: 3 }),
                class: Class::from_priority(rng.random_range(0..3)),
                tenant: TenantId(rng.random_range(0..4)),
            };
            let _ = scheduler.handle_arrival(now, arrival);
        }
        scheduler.handle_cancel(TicketId(rng.random_range(0..60)));
        if !running.is_empty() && rng.random_bool(0.7) {
            let batch = running.swap_remove(rng.random_range(0..running.len()));
            scheduler.handle_finished(now, &batch, Duration::from_micros(rng.random_range(10..2000)));
        }
        let mut members = Vec::new();
        while scheduler.poll_edges(now).is_some() {}
        while scheduler.poll_expired(now).is_some() {}
        while let Some(batch) = scheduler.poll_batch(now, &mut members) {
            running.push(batch);
        }
        while scheduler.poll_expired(now).is_some() {}
    }

    fn live(seed: u64, steps: u64) -> (Scheduler, Vec<SealedBatch>, StdRng) {
        let (mut scheduler, mut running, mut rng) = (fresh(seed), Vec::new(), StdRng::seed_from_u64(seed));
        for at in 0..steps {
            step(&mut scheduler, &mut running, &mut rng, Moment(1_000_000 + 130_000 * at));
        }
        (scheduler, running, rng)
    }

    #[test]
    fn a_restored_scheduler_lives_on_as_the_saved_one() {
        for seed in 0..200 {
            let (mut scheduler, mut running, mut rng) = live(seed, 1 + seed);
            let saved = scheduler.save().expect("it is small");
            let mut restored =
                Scheduler::restore(LAYOUT, &saved).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert_eq!(restored.save().expect("as before"), saved, "seed {seed}");
            let (mut running_too, mut rng_too) = (running.clone(), rng.clone());
            for at in 0..300 {
                // Now and then half a minute passes: automatic buckets are looked at.
                let now = Moment(200_000_000 + 130_000 * at + 31_000_000_000 * (at / 100));
                step(&mut scheduler, &mut running, &mut rng, now);
                step(&mut restored, &mut running_too, &mut rng_too, now);
                assert_eq!(scheduler.poll_timeout(now), restored.poll_timeout(now), "seed {seed}, step {at}");
            }
            let hashes = [&scheduler, &restored].map(|scheduler| (scheduler.log().count(), scheduler.log().hash()));
            assert_eq!(hashes[0], hashes[1], "seed {seed}");
            assert!(hashes[0].0 > 100, "seed {seed}: hardly anything was decided");
            assert_eq!(scheduler.save(), restored.save(), "seed {seed}");
        }
    }

    #[test]
    fn a_state_that_is_cut_off_too_long_or_of_another_layout_is_refused() {
        let saved = live(1, 50).0.save().expect("it is small");
        for len in 0..saved.len() {
            assert!(Scheduler::restore(LAYOUT, &saved[..len]).is_err(), "{len} of {} bytes", saved.len());
        }
        let longer = [&saved[..], &[0]].concat();
        assert!(matches!(Scheduler::restore(LAYOUT, &longer), Err(StateError::Malformed(_))));
        let error = Scheduler::restore(LAYOUT + 1, &saved).expect_err("another layout");
        assert_eq!(error, StateError::Layout { found: LAYOUT + 1 });
    }

    #[test]
    fn a_damaged_state_is_refused_or_a_state_but_no_panic() {
        let mut refused = 0;
        let saved = live(2, 60).0.save().expect("it is small");
        for at in 0..saved.len().min(4000) {
            let mut damaged = saved.clone();
            damaged[at] ^= 0x55;
            refused += u64::from(Scheduler::restore(LAYOUT, &damaged).is_err());
        }
        assert!(refused > 50, "{refused} were refused");
    }

    /// A short life without anything learned, so that its bytes change with the layout and not with the policies.
    #[test]
    fn a_changed_layout_has_another_number() {
        // Spelled out: a default that changes is no other layout.
        let tuning = Tuning {
            efficiency_floor: 0.5,
            base_worth: 0.5,
            overhead_worth: 0.5,
            slack_share: 1.0,
            class_worth: [1.0, 0.5, 0.25],
            hold: 1.0,
            fair_admission: 0.5,
            overload_admission: Some(0.5),
            age_max: 10.0,
        };
        let slo = Duration::from_millis(100);
        let buckets = Buckets::new(&[8, 64]).expect("ascending");
        let policies = vec![Policy { tuning, slo, ..Policy::new(8, 256, buckets) }; 2];
        let seats = SeatSpec::separate(Group::Executors, 1, 2);
        let mut scheduler = Scheduler::new(QueueLimits::NONE, policies, &seats);
        let mut arrive = |len: u32, deadline: Option<Moment>, compose: Option<Compose>| {
            let (class, tenant) = (Class::default(), TenantId(7));
            let arrival = Arrival { model: ModelHandle(1), rows: 1, len, bytes: 9, deadline, compose, class, tenant };
            scheduler.handle_arrival(Moment(1000), arrival).expect("there is room");
        };
        arrive(5, None, None);
        arrive(60, Some(Moment(5_000_000)), None);
        arrive(7, None, Some(Compose { tag: 3, rows: 2 }));
        let saved = scheduler.save().expect("it is small");
        let is = (LAYOUT, saved.len(), crc32c::crc32c(&saved));
        assert_eq!(
            is, GOLDEN,
            "what is saved has changed: raise LAYOUT if a field, its type, order or meaning did, and write the new numbers"
        );
    }

    /// Layout, bytes and CRC of the life above.
    const GOLDEN: (u32, usize, u32) = (7, 7029, 3_412_147_643);
}
