//! Any order of arrivals, cancels, batches, results, changes of policy and time, against the real scheduler; results may be late,
//! come twice, or be of batches that never were.
//!
//! Fails on a panic, on a ticket that leaves twice or never, on a batch beyond its budget, and on books that do not add up.
#![no_main]

use std::collections::BTreeSet;
use std::time::Duration;

use ferry::scheduler::{
    Arrival, Buckets, Class, Compose, Group, Policy, PolicyKind, QueueLimits, Scheduler, SealedBatch, SeatSpec, TenantId,
    TicketId,
};
use ferry::vocab::{ModelHandle, Moment};
use ferry_fuzz::Source;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut source = Source(input);
    let mut world = World::new(&mut source);
    while !source.is_empty() {
        world.step(&mut source);
    }
    world.finish();
});

struct World {
    scheduler: Scheduler,
    now: Moment,
    waiting: BTreeSet<TicketId>,
    running: Vec<SealedBatch>,
    members: Vec<TicketId>,
}

impl World {
    fn new(source: &mut Source) -> World {
        let policy = |source: &mut Source, lens: &[u32], group| Policy {
            kind: PolicyKind::ALL[usize::from(source.byte()) % PolicyKind::ALL.len()],
            queue_delay_max: Some(Duration::from_micros(u64::from(source.short()))),
            group,
            weight: 1.0 + f64::from(source.byte() % 4),
            ..Policy::new(1 + u32::from(source.byte() % 8), 16 + u64::from(source.byte()), Buckets::new(lens).expect("ascending"))
        };
        let policies = vec![
            policy(source, &[2, 4, 8, 16], Group::Executors),
            policy(source, &[16], Group::Executors),
            policy(source, &[1], Group::Inline),
        ];
        let mut seats = SeatSpec::separate(Group::Executors, 1 + usize::from(source.byte() % 3), 1 + u32::from(source.byte() % 3));
        seats.extend(SeatSpec::separate(Group::Inline, 1, 1));
        let limits = QueueLimits { rows_max: 100, cells_max: 2_000, bytes_max: 20_000 };
        World {
            scheduler: Scheduler::new(limits, policies, &seats),
            now: Moment(1_000_000),
            waiting: BTreeSet::new(),
            running: Vec::new(),
            members: Vec::new(),
        }
    }

    fn step(&mut self, source: &mut Source) {
        match source.byte() % 12 {
            0..4 => self.arrive(source),
            4 => {
                let at = usize::from(source.byte());
                if let Some(id) = self.waiting.iter().nth(at % self.waiting.len().max(1)).copied() {
                    assert!(self.scheduler.handle_cancel(id), "it waits");
                    self.waiting.remove(&id);
                }
                // One that does not wait is nobody's.
                let id = TicketId(u32::from(source.byte()));
                assert_eq!(self.scheduler.handle_cancel(id), self.waiting.remove(&id));
            }
            5..8 => self.batch(),
            8 | 9 => {
                if !self.running.is_empty() {
                    let batch = self.running.swap_remove(usize::from(source.byte()) % self.running.len());
                    let service = Duration::from_nanos(u64::from(source.short()) * 1000);
                    self.scheduler.handle_finished(self.now, &batch, service);
                }
            }
            10 => self.now = self.now + Duration::from_micros(u64::from(source.short()) * 4),
            _ => {
                let model = ModelHandle(u16::from(source.byte() % 3));
                let kind = PolicyKind::ALL[usize::from(source.byte()) % PolicyKind::ALL.len()];
                let policy = self.scheduler.policy(model).clone();
                let policy = Policy { kind, rows_max: 1 + u32::from(source.byte() % 8), ..policy };
                // A policy that would strand somebody is refused.
                let _ = self.scheduler.set_policy(model, policy);
            }
        }
        while let Some(expired) = self.scheduler.poll_expired(self.now) {
            assert!(self.waiting.remove(&expired.id()), "it waited");
        }
        if let Err(message) = self.scheduler.audit() {
            panic!("{message}");
        }
    }

    fn arrive(&mut self, source: &mut Source) {
        let (bits, deadline) = (source.byte(), source.short());
        let arrival = Arrival {
            model: ModelHandle(u16::from(bits & 3) % 3),
            rows: u32::from(source.byte() % 9),
            len: u32::from(source.byte() % 18),
            bytes: u64::from(source.short()),
            deadline: (bits & 4 != 0).then(|| self.now + Duration::from_micros(u64::from(deadline))),
            compose: (bits & 0x78 == 0x78).then(|| Compose { tag: u64::from(source.byte() % 4), rows: u32::from(source.byte() % 9) }),
            class: Class::from_priority(source.byte() % 4),
            tenant: TenantId(u16::from(source.byte() % 5)),
        };
        // The front end's contract keeps rows and lengths of nothing away.
        if arrival.rows == 0 || arrival.len == 0 {
            return;
        }
        match self.scheduler.handle_arrival(self.now, arrival) {
            Ok(id) => assert!(self.waiting.insert(id), "a number that is free"),
            Err(refusal) => assert!(!refusal.message.is_empty()),
        }
    }

    fn batch(&mut self) {
        let mut members = std::mem::take(&mut self.members);
        // At most one batch for each slot.
        for _ in 0..16 {
            let Some(batch) = self.scheduler.poll_batch(self.now, &mut members) else { break };
            let policy = self.scheduler.policy(batch.model);
            assert!(batch.rows <= policy.rows_max && batch.cells_padded() <= policy.cells_max, "{batch:?}");
            assert!(members.iter().all(|id| self.waiting.remove(id)), "each waited, once");
            let slots = self.scheduler.seats()[usize::from(batch.executor)].slots as usize;
            self.running.push(batch);
            let given = self.running.iter().filter(|other| other.executor == batch.executor).count();
            assert!(given <= slots, "{given} batches in {slots} slots");
        }
        self.members = members;
    }

    /// All that waits leaves.
    fn finish(&mut self) {
        self.scheduler.drain();
        for _ in 0..1000 {
            self.batch();
            while let Some(batch) = self.running.pop() {
                self.scheduler.handle_finished(self.now, &batch, Duration::from_micros(50));
            }
            while let Some(expired) = self.scheduler.poll_expired(self.now) {
                assert!(self.waiting.remove(&expired.id()), "it waited");
            }
            if self.waiting.is_empty() {
                assert!(self.scheduler.is_empty());
                return;
            }
            // Compositions that are not complete wait for their time.
            self.now = self.now + Duration::from_secs(1);
        }
        panic!("{} tickets never leave", self.waiting.len());
    }
}
