//! Proves by counting that batches cost no heap allocation once buffers have grown: not to decide on, not to pack, not
//! to run and mail, not to answer.
#![allow(unsafe_code)] // GlobalAlloc can only be implemented with it; nothing but the counter is added to the system's

use std::alloc::{GlobalAlloc, System};
use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use ferry::batcher::{Batcher, ExecutorLink, ThreadOutlet};
use ferry::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
use ferry::executor::batch::{AlignedBytes, BatchOutput, BatchView};
use ferry::executor::pack::{Pads, Row, pack};
use ferry::executor::sim::{Faults, SimExecutor};
use ferry::executor::slot::VacantSlot;
use ferry::executor::worker::{Answers, Worker};
use ferry::mail::{Burst, Request, ToBatcher, ToShard};
use ferry::mailbox::{Receiver, mailbox};
use ferry::models::repository::{self, LoadOptions, Loaded};
use ferry::scatter::{Details, append_result};
use ferry::scheduler::{
    Arrival, Buckets, Class, Group, Policy, PolicyKind, QueueLimits, Scheduler, SealedBatch, SeatSpec, TenantId,
};
use ferry::telemetry::{ModelLabels, Telemetry};
use ferry::vocab::{DType, Layout, ModelHandle, Moment, SealReason, TicketKey};

struct Counting;

thread_local! {
    // Const and without a destructor: reading it allocates nothing.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    ALLOCATIONS.with(|count| count.set(count.get() + 1));
}

// SAFETY: every call is handed on unchanged to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: std::alloc::Layout) -> *mut u8 {
        count();
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: std::alloc::Layout) -> *mut u8 {
        count();
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: std::alloc::Layout, size: usize) -> *mut u8 {
        count();
        unsafe { System.realloc(place, layout, size) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: std::alloc::Layout) {
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations that `work` makes on this thread.
fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

const ROWS: u32 = 16;
const MODEL: ModelHandle = ModelHandle(0);

fn contract() -> Arc<Contract> {
    let tokens = TensorSpec {
        name: "ids".into(),
        dtype: DType::U32,
        shape: vec![Dim::Named("tokens".into())],
        pad: 1.0,
        range: None,
        nonfinite: NonFinite::Refuse,
    };
    let contract = Contract {
        name: "echo".into(),
        version: "1".into(),
        architecture: "echo".into(),
        outputs: vec![TensorSpec { name: "out".into(), ..tokens.clone() }],
        inputs: vec![tokens],
        length: Some(Length { name: "tokens".into(), min: 1, max: 64 }),
        text: None,
        rows_max: ROWS,
    };
    Arc::new(contract.checked().expect("a contract"))
}

fn requests(len: u32) -> Vec<Request> {
    (0..ROWS)
        .map(|slot| Request {
            key: TicketKey { shard: 0, slot, generation: 0 },
            model: MODEL,
            rows: 1,
            len,
            part: ferry::mail::Part::whole(1),
            payload: vec![slot as u8; len as usize * 4].into(),
            received_at: Moment(1),
            deadline: Some(Moment::FAR),
            compose: None,
            class: Default::default(),
            tenant: Default::default(),
            truncated: false,
        })
        .collect()
}

fn batch(id: u64, rows: u32, padded_len: u32) -> SealedBatch {
    SealedBatch {
        id,
        model: MODEL,
        executor: 0,
        rows,
        rows_possible: ROWS,
        layout: Layout::Padded,
        squares_real: 0,
        padded_len,
        cells_real: u64::from(rows),
        reason: SealReason::Full,
        sealed_at: Moment(2),
        generation: 1,
        predicted: 0,
        objective: Duration::ZERO,
    }
}

fn worker(contract: &Arc<Contract>) -> (Worker, Receiver<ToShard>) {
    let labels = [ModelLabels { name: "echo".into(), version: "1".into() }];
    let (shard, inbox) = mailbox(64);
    let device = Box::new(SimExecutor::new(Arc::new(Faults::default())));
    (
        Worker::new(
            Answers {
                index: 0,
                contracts: vec![Arc::clone(contract)],
                shards: vec![shard],
                telemetry: Telemetry::new(&labels, 1, 1),
            },
            device,
        ),
        inbox,
    )
}

/// Answers everything in the mailbox and says how many answers there were.
fn answer(inbox: &Receiver<ToShard>, out: &mut Vec<u8>) -> usize {
    let mut answers = 0;
    while let Some(message) = inbox.try_recv() {
        let ToShard::Batch(finished) = message else { panic!("a batch was run") };
        for member in &finished.members {
            out.clear();
            append_result(
                out,
                &finished,
                member,
                1,
                Details { timings: true, ..Details::default() },
                finished.finished_at,
            );
            answers += 1;
        }
    }
    answers
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1);
    assert_eq!(allocations(|| ()), 0);
}

#[test]
fn packing_running_and_answering_a_batch_allocates_nothing_once_buffers_have_grown() {
    let contract = contract();
    let pads = Pads::of(&contract);
    let (mut worker, inbox) = worker(&contract);
    let requests = requests(40);
    let mut slot = Some(VacantSlot::default());
    let mut out = Vec::new();
    let mut one = |id: u64, rows: u32, padded_len: u32| {
        let batch = batch(id, rows, padded_len);
        let mut vacant = slot.take().expect("it came back");
        let row = |request| Row { request, admitted_at: Moment(1), waited: Default::default() };
        let packing = allocations(|| {
            pack(&mut vacant, &contract, &pads, &batch, requests.iter().take(rows as usize).map(row));
        });
        let running = allocations(|| slot = Some(worker.run(vacant.fill(batch, Moment(3))).slot));
        let answering = allocations(|| assert_eq!(answer(&inbox, &mut out), rows as usize));
        (packing, running, answering)
    };
    for id in 0..4 {
        one(id, ROWS, 64);
    }
    for id in 4..200 {
        let rows = 1 + (id as u32 * 7) % ROWS;
        assert_eq!(one(id, rows, 40 + id as u32 % 25), (0, 0, 0), "packing, running, answering batch {id}");
    }
}

fn policy(group: Group, kind: PolicyKind) -> Policy {
    Policy {
        kind,
        queue_delay_max: Some(Duration::ZERO),
        group,
        ..Policy::new(ROWS, 64 * u64::from(ROWS), Buckets::geometric(64))
    }
}

/// Every size of batch up to the largest, after none but what instantiating reserves.
#[test]
fn an_encoders_batch_allocates_nothing_at_all() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let loaded = repository::load(&directory, "tiny_bert", &LoadOptions::default()).expect("loads");
    let Loaded::Model(entry) = loaded else { panic!("its weights are committed") };
    let contract = entry.model.contract();
    let mut model = entry.model.instantiate().expect("makes an instance");
    for layout in [Layout::Packed, Layout::Padded] {
        for (rows, padded_len) in [(16, 64), (1, 1), (3, 17), (16, 8)] {
            let lens: Vec<u32> = (0..rows).map(|row| padded_len - row * 5 % padded_len).collect();
            let places = match layout {
                Layout::Packed => lens.iter().sum(),
                Layout::Padded => rows * padded_len,
            };
            let mut input = AlignedBytes::default();
            input.set_len(places as usize * 4);
            input.as_mut_slice::<u32>().fill(7);
            let inputs = [input];
            let mut out = BatchOutput::default();
            out.prepare(contract, layout, &lens, padded_len);
            let view = BatchView { contract, layout, rows, padded_len, lens: &lens, inputs: &inputs };
            let made = allocations(|| model.run(view, &mut out).expect("runs"));
            assert_eq!(made, 0, "{layout:?} {rows} rows of {padded_len}");
        }
    }
}

#[test]
fn deciding_allocates_nothing_once_the_queue_has_grown() {
    for kind in [PolicyKind::Buckets, PolicyKind::Cost] {
        let seats = SeatSpec::separate(Group::Executors, 1, 1);
        let limits = QueueLimits { rows_max: 1000, ..QueueLimits::NONE };
        let mut scheduler = Scheduler::new(limits, vec![policy(Group::Executors, kind)], &seats);
        let mut members = Vec::with_capacity(ROWS as usize);
        let mut round = |now: u64| {
            let now = Moment(now * 1_000_000);
            for n in 0..200u32 {
                // Some cannot wait for the others.
                let wait = if n % 7 == 0 { 1000 } else { 50_000 };
                let arrival = Arrival {
                    model: MODEL,
                    rows: 1,
                    len: 1 + n % 64,
                    bytes: 1,
                    deadline: Some(now + Duration::from_micros(wait)),
                    compose: None,
                    class: Class::from_priority((n % 3) as u8),
                    tenant: TenantId((n % 5) as u16),
                };
                let Ok(id) = scheduler.handle_arrival(now, arrival) else { continue };
                if n % 10 == 0 {
                    scheduler.handle_cancel(id);
                }
            }
            let mut at = now;
            while let Some(batch) = scheduler.poll_batch(at, &mut members) {
                at = at + Duration::from_micros(30);
                scheduler.handle_finished(at, &batch, Duration::from_micros(30));
                while scheduler.poll_expired(at).is_some() {}
            }
            scheduler.poll_timeout(at);
        };
        // Each tenant's lists are made when it first comes, and nothing after.
        (0..20).for_each(&mut round);
        assert_eq!(allocations(|| (20..100).for_each(&mut round)), 0, "{kind}");
    }
}

#[test]
fn a_turn_of_the_batcher_allocates_nothing_once_everything_has_grown() {
    let contract = contract();
    let (worker, inbox) = worker(&contract);
    let labels = [ModelLabels { name: "echo".into(), version: "1".into() }];
    let outlet = ThreadOutlet { executors: vec![ExecutorLink::Inline(Box::new(worker))], shards: Vec::new() };
    let seats = SeatSpec::separate(Group::Inline, 1, 1);
    let scheduler = Scheduler::new(QueueLimits::NONE, vec![policy(Group::Inline, PolicyKind::Cost)], &seats);
    let telemetry = Telemetry::new(&labels, 1, 1);
    let mut batcher = Batcher::new(scheduler, outlet, &[contract], 1, telemetry);
    // The flight recorder too: it is on by default.
    batcher.keep_batches(64);
    let requests = requests(40);
    let mut out = Vec::new();
    for turn in 0..100 {
        let now = Moment(1000 + turn);
        // The burst is the shard's; what the batcher makes of it is counted.
        let burst = Burst { arrivals: requests.clone(), cancelled: Vec::new() };
        let made = allocations(|| {
            batcher.take(now, ToBatcher::Burst(burst));
            batcher.turn(now);
        });
        assert_eq!(answer(&inbox, &mut out), ROWS as usize);
        assert!(made == 0 || turn < 10, "{made} allocations in turn {turn}");
    }
}
