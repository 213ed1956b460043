//! Pack, run, scatter: whose bytes come back to whom, and what a failure costs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use proptest::prelude::*;

use super::batch::{BatchOutput, BatchView, RowError};
use super::cpu::CpuExecutor;
use super::model::{LoadedModel, Model, ModelError};
use super::pack::{Pads, Row, pack};
use super::sim::{Faults, POISONED, SimExecutor};
use super::slot::VacantSlot;
use super::worker::{Answers, Worker};
use super::{Executor, Failure, warm};
use crate::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
use crate::mail::{FinishedBatch, Request, ToShard};
use crate::mailbox::{Receiver, mailbox};
use crate::scatter::{Details, append_result, failure_of};
use crate::scheduler::SealedBatch;
use crate::telemetry::{Alarm, ModelLabels, Telemetry};
use crate::vocab::{Code, DType, Executed, Layout, ModelHandle, Moment, SealReason, TicketKey};

const SHARDS: u16 = 3;

fn spec(name: &str, dtype: DType, shape: Vec<Dim>, pad: f64) -> TensorSpec {
    TensorSpec { name: name.into(), dtype, shape, pad, range: None, nonfinite: NonFinite::Refuse }
}

/// A contract whose outputs are like its inputs.
fn contract(specs: Vec<TensorSpec>) -> Arc<Contract> {
    let has_length = specs.iter().any(TensorSpec::has_length);
    let contract = Contract {
        name: "test".into(),
        version: "1".into(),
        architecture: "identity".into(),
        outputs: specs.clone(),
        inputs: specs,
        length: has_length.then(|| Length { name: "tokens".into(), min: 1, max: 64 }),
        text: None,
        rows_max: 8,
    };
    Arc::new(contract.checked().expect("a contract"))
}

fn contracts() -> Vec<Arc<Contract>> {
    let tokens = || Dim::Named("tokens".into());
    vec![
        contract(vec![spec("a", DType::U32, vec![tokens()], 5.0)]),
        contract(vec![spec("b", DType::F32, vec![Dim::Fixed(3)], 0.0)]),
        contract(vec![
            spec("c", DType::U8, vec![tokens()], 9.0),
            spec("d", DType::U16, vec![tokens(), Dim::Fixed(3)], 3.0),
            spec("e", DType::I64, vec![Dim::Fixed(1)], -1.0),
        ]),
    ]
}

/// A worker, its shards' mailboxes, and one slot that goes round.
struct Rig {
    contracts: Vec<Arc<Contract>>,
    worker: Worker,
    telemetry: Arc<Telemetry>,
    inboxes: Vec<Receiver<ToShard>>,
    slot: Option<VacantSlot>,
    batches: u64,
}

impl Rig {
    fn new(contracts: Vec<Arc<Contract>>, executor: Box<dyn Executor>) -> Rig {
        let (senders, inboxes) = (0..SHARDS).map(|_| mailbox(8)).unzip();
        let labels: Vec<ModelLabels> =
            contracts.iter().map(|_| ModelLabels { name: "test".into(), version: "1".into() }).collect();
        let telemetry = Telemetry::new(&labels, SHARDS.into(), 1);
        let worker = Worker::new(
            Answers { index: 0, contracts: contracts.clone(), shards: senders, telemetry: Arc::clone(&telemetry) },
            executor,
        );
        Rig { contracts, worker, telemetry, inboxes, slot: Some(VacantSlot::default()), batches: 0 }
    }

    fn simulated() -> (Rig, Arc<Faults>) {
        let faults = Arc::new(Faults::default());
        (Rig::new(contracts(), Box::new(SimExecutor::new(Arc::clone(&faults)))), faults)
    }

    /// Runs the requests as one batch. Each shard that has a member gets the batch once; it is returned.
    fn run(&mut self, model: ModelHandle, requests: &[Request], padded_len: u32) -> Arc<FinishedBatch> {
        self.run_laid(model, requests, padded_len, Layout::Padded)
    }

    fn run_laid(
        &mut self,
        model: ModelHandle,
        requests: &[Request],
        padded_len: u32,
        layout: Layout,
    ) -> Arc<FinishedBatch> {
        self.batches += 1;
        let rows = requests.iter().map(|request| request.rows).sum();
        let batch = SealedBatch {
            id: self.batches,
            model,
            executor: 0,
            rows,
            rows_possible: rows,
            layout,
            squares_real: 0,
            padded_len,
            cells_real: 1,
            reason: SealReason::Full,
            sealed_at: Moment(1),
            generation: 1,
            predicted: 0,
            objective: Default::default(),
        };
        let contract = Arc::clone(&self.contracts[model.index()]);
        let mut slot = self.slot.take().expect("it came back");
        let rows = requests.iter().map(|request| Row { request, admitted_at: Moment(0), waited: Default::default() });
        pack(&mut slot, &contract, &Pads::of(&contract), &batch, rows);
        if layout == Layout::Padded {
            check_staging(&mut slot, &contract, requests, padded_len);
        }
        let finished = self.worker.run(slot.fill(batch, Moment(2)));
        assert_eq!(finished.batch, batch);
        self.slot = Some(finished.slot);
        let mut one = None;
        for (shard, inbox) in (0..).zip(&self.inboxes) {
            let has_member = requests.iter().any(|request| request.key.shard == shard);
            let message = inbox.try_recv();
            assert_eq!(message.is_some(), has_member, "shard {shard}");
            assert!(inbox.is_empty(), "one message per batch");
            if let Some(ToShard::Batch(batch)) = message {
                one = Some(batch);
            }
        }
        one.expect("somebody asked")
    }
}

/// Every byte of every place is the request's or the contract's padding, whatever the slot held before.
fn check_staging(slot: &mut VacantSlot, contract: &Contract, requests: &[Request], padded_len: u32) {
    let staging = slot.staging_mut();
    for (index, spec) in contract.inputs.iter().enumerate() {
        let mut expected = Vec::new();
        for request in requests {
            let offset = contract.input_offset(index, request.rows, request.len);
            let row_bytes = spec.row_bytes(request.len);
            for row in 0..request.rows as usize {
                let place = expected.len() + spec.row_bytes(padded_len);
                expected.extend_from_slice(&request.payload[offset + row * row_bytes..][..row_bytes]);
                while expected.len() < place {
                    expected.extend_from_slice(&spec.pad_bytes());
                }
            }
        }
        assert_eq!(staging.inputs[index].bytes(), expected, "input {}", spec.name);
    }
}

fn request(contract: &Contract, model: ModelHandle, slot: u32, rows: u32, len: u32, fill: u8) -> Request {
    let mut payload = Vec::new();
    for spec in &contract.inputs {
        payload.resize(payload.len().next_multiple_of(8), 0);
        // Small floats and distinct bytes: finite in every dtype.
        payload.extend((0..rows as usize * spec.row_bytes(len)).map(|at| fill.wrapping_add(at as u8) & 0x3f));
    }
    let key = TicketKey { shard: slot as u16 % SHARDS, slot, generation: 7 };
    Request {
        key,
        model,
        rows,
        len,
        part: crate::mail::Part::whole(rows),
        payload: Bytes::from(payload),
        received_at: Moment(0),
        deadline: None,
        compose: None,
        class: Default::default(),
        tenant: Default::default(),
        truncated: false,
    }
}

/// The payload of a member's result: the end of its frame, `len` bytes long.
fn result_payload(finished: &FinishedBatch, at: usize, len: usize) -> Vec<u8> {
    let (mut out, details) = (Vec::new(), Details { timings: true, ..Details::default() });
    append_result(&mut out, finished, &finished.members[at], 1, details, Moment(9));
    out.split_off(out.len() - len)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Batches of random shapes of three models go through one slot, so that what an earlier one left behind would be
    /// seen in a later one.
    #[test]
    fn results_come_back_to_their_tickets_byte_for_byte(
        batches in prop::collection::vec(
            (0..3usize, 0..20u32, prop::collection::vec((1..5u32, 1..30u32, any::<u8>()), 1..8)),
            1..8,
        ),
    ) {
        let (mut rig, _) = Rig::simulated();
        for (model, extra, members) in batches {
            let contract = Arc::clone(&rig.contracts[model]);
            let model = ModelHandle(model as u16);
            let fixed = contract.length.is_none();
            let requests: Vec<Request> = (0..)
                .zip(&members)
                .map(|(slot, (rows, len, fill))| {
                    request(&contract, model, slot, *rows, if fixed { 1 } else { *len }, *fill)
                })
                .collect();
            let longest = requests.iter().map(|request| request.len).max().expect("there is one");
            let finished = rig.run(model, &requests, if fixed { 1 } else { longest + extra });
            prop_assert_eq!(finished.members.len(), requests.len());
            for (at, request) in requests.iter().enumerate() {
                prop_assert_eq!(finished.members[at].key, request.key);
                prop_assert!(failure_of(&finished, &finished.members[at]).is_none());
                let result = result_payload(&finished, at, request.payload.len());
                prop_assert_eq!(&result[..], &request.payload[..]);
            }
        }
    }
}

/// The code that each member was answered.
fn codes(finished: &FinishedBatch) -> Vec<Code> {
    let code = |member| failure_of(finished, member).map_or(Code::Ok, |refusal| refusal.code);
    finished.members.iter().map(code).collect()
}

/// Makes a row of a request one at which the simulated device fails.
fn poison(contract: &Contract, request: &mut Request, row: u32, how: usize) {
    let mut payload = request.payload.to_vec();
    let at = row as usize * contract.inputs[0].row_bytes(request.len);
    payload[at..at + 4].copy_from_slice(&POISONED[how]);
    request.payload = payload.into();
}

#[test]
fn a_batch_that_fails_once_is_answered_by_its_second_run() {
    let (mut rig, faults) = Rig::simulated();
    let contract = Arc::clone(&rig.contracts[0]);
    let requests: Vec<Request> = (0..4).map(|slot| request(&contract, ModelHandle(0), slot, 1, 3, 1)).collect();
    faults.failures.store(1, Ordering::Relaxed);
    let failed = rig.run(ModelHandle(0), &requests, 4);
    assert_eq!(codes(&failed), [Code::Ok; 4]);
    assert_eq!(rig.telemetry.executor(0).bisections(), (1, [4, 0, 0]));
    let fine = rig.run(ModelHandle(0), &requests, 4);
    assert_eq!(codes(&fine), [Code::Ok; 4]);
    assert_eq!(rig.telemetry.executor(0).bisections().0, 1, "and no other batch");
    // A request alone in its batch has nobody to be told apart from.
    faults.failures.store(1, Ordering::Relaxed);
    let alone = rig.run(ModelHandle(0), &requests[..1], 4);
    assert_eq!(codes(&alone), [Code::ExecutorFailed]);
    assert_eq!(rig.telemetry.executor(0).bisections().0, 1);
}

/// Goal: T8, T9, F56, F59. Method: a poisoned request at every place of batches of three models, padded and end to end, with one or
/// several rows each, failing in each way.
#[test]
fn a_failing_batch_is_bisected_until_the_culprit_stands_alone() {
    for (model, layout) in [(0, Layout::Padded), (0, Layout::Packed), (1, Layout::Padded), (1, Layout::Packed)] {
        let (mut rig, faults) = Rig::simulated();
        let contract = Arc::clone(&rig.contracts[model]);
        let len = |slot: u32| if contract.length.is_some() { 1 + slot % 5 } else { 1 };
        let mut culprits = 0;
        for members in [2, 3, 7, 8] {
            for (at, how) in (0..members).flat_map(|at| [(at, 0), (at, 1), (at, 2)]) {
                let make = |slot: u32| {
                    request(&contract, ModelHandle(model as u16), slot, 1 + slot % 3, len(slot), slot as u8)
                };
                let mut requests: Vec<Request> = (0..members).map(make).collect();
                let rows = requests[at as usize].rows;
                poison(&contract, &mut requests[at as usize], rows - 1, how);
                let before = faults.batches.load(Ordering::Relaxed);
                let finished = rig.run_laid(ModelHandle(model as u16), &requests, 5, layout);
                let runs = faults.batches.load(Ordering::Relaxed) - before;
                let rounds = u64::from(members.next_power_of_two().trailing_zeros());
                // Where memory is short, what is larger than something that failed is not tried.
                let runs_max = if how == 2 { u64::from(2 * members) } else { 1 + 2 * rounds };
                assert!(runs <= runs_max, "{members} members took {runs} runs");
                let code = if how == 2 { Code::OutOfMemory } else { Code::ExecutorFailed };
                for (slot, request) in (0..members).zip(&requests) {
                    let member = finished.members[slot as usize];
                    let expected = if slot == at { code } else { Code::Ok };
                    assert_eq!(codes(&finished)[slot as usize], expected, "{members} members, {at} poisoned by {how}");
                    if slot != at {
                        let result = result_payload(&finished, slot as usize, request.payload.len());
                        assert_eq!(result, request.payload, "member {slot} of {members}");
                    } else {
                        for row in member.first_row..member.first_row + member.rows {
                            let len = member.len;
                            let bytes = finished.output.row_bytes(&contract.outputs[0], 0, row, len);
                            assert!(bytes.iter().all(|byte| *byte == 0), "nothing is left where nothing was answered");
                        }
                    }
                }
                culprits += u64::from(rows);
            }
        }
        let (batches, [_, blamed, given_up]) = rig.telemetry.executor(0).bisections();
        assert_eq!((batches, blamed, given_up), (60, culprits, 0));
    }
}

#[test]
fn several_poisoned_requests_are_all_found_and_a_batch_of_nothing_else_is_answered_all_the_same() {
    let (mut rig, _) = Rig::simulated();
    let contract = Arc::clone(&rig.contracts[0]);
    for poisoned in [vec![0, 7], vec![2, 3, 4], (0..8).collect::<Vec<usize>>()] {
        let mut requests: Vec<Request> = (0..8).map(|slot| request(&contract, ModelHandle(0), slot, 1, 3, 1)).collect();
        poisoned.iter().for_each(|at| poison(&contract, &mut requests[*at], 0, at % 3));
        let finished = rig.run(ModelHandle(0), &requests, 4);
        for (at, code) in codes(&finished).into_iter().enumerate() {
            assert_eq!(code == Code::Ok, !poisoned.contains(&at), "{poisoned:?}: {at} was answered {code:?}");
        }
    }
    let requests: Vec<Request> = (0..8).map(|slot| request(&contract, ModelHandle(0), slot, 1, 3, 1)).collect();
    assert_eq!(codes(&rig.run(ModelHandle(0), &requests, 4)), [Code::Ok; 8]);
}

#[test]
fn a_row_that_is_not_finite_fails_alone_in_a_batch_that_is_bisected_too() {
    let (mut rig, _) = Rig::simulated();
    let contract = Arc::clone(&rig.contracts[1]);
    let mut requests: Vec<Request> = (0..6).map(|slot| request(&contract, ModelHandle(1), slot, 1, 1, 1)).collect();
    poison(&contract, &mut requests[1], 0, 1);
    let mut payload = requests[4].payload.to_vec();
    payload[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
    requests[4].payload = payload.into();
    let expected = [Code::Ok, Code::ExecutorFailed, Code::Ok, Code::Ok, Code::NonFiniteOutput, Code::Ok];
    assert_eq!(codes(&rig.run(ModelHandle(1), &requests, 1)), expected);
}

/// Members stop being run again when the time for it is over.
#[test]
fn a_bisection_ends_with_its_time_and_who_was_not_run_is_told_so() {
    let (mut rig, faults) = Rig::simulated();
    rig.worker.isolate_for(std::time::Duration::from_nanos(1));
    let contract = Arc::clone(&rig.contracts[0]);
    let mut requests: Vec<Request> = (0..8).map(|slot| request(&contract, ModelHandle(0), slot, 1, 3, 1)).collect();
    poison(&contract, &mut requests[0], 0, 0);
    let finished = rig.run(ModelHandle(0), &requests, 4);
    assert_eq!(codes(&finished), [Code::ExecutorFailed; 8]);
    assert_eq!(faults.batches.load(Ordering::Relaxed), 1);
    assert_eq!(rig.telemetry.executor(0).bisections(), (1, [0, 0, 8]));
}

#[test]
fn a_row_with_a_nan_fails_alone() {
    let (mut rig, _) = Rig::simulated();
    let model = ModelHandle(1);
    let contract = Arc::clone(&rig.contracts[1]);
    let mut requests: Vec<Request> = (0..3).map(|slot| request(&contract, model, slot, 2, 1, 1)).collect();
    let mut poisoned = requests[1].payload.to_vec();
    // The second row of the second request.
    poisoned[16..20].copy_from_slice(&f32::NAN.to_le_bytes());
    requests[1].payload = poisoned.into();
    let finished = rig.run(model, &requests, 1);
    let failure = failure_of(&finished, &finished.members[1]).expect("NaN");
    assert_eq!((failure.code, failure.executed), (Code::NonFiniteOutput, Executed::Yes));
    for mate in [0, 2] {
        assert_eq!(failure_of(&finished, &finished.members[mate]), None);
        assert_eq!(result_payload(&finished, mate, requests[mate].payload.len()), requests[mate].payload);
    }
    requests[1].payload = requests[0].payload.clone();
    let next = rig.run(model, &requests, 1);
    assert_eq!(failure_of(&next, &next.members[1]), None, "an error does not outlive its batch");
}

#[test]
fn what_a_shard_still_holds_is_not_overwritten_by_the_next_batch() {
    let (mut rig, _) = Rig::simulated();
    let contract = Arc::clone(&rig.contracts[0]);
    let first = [request(&contract, ModelHandle(0), 0, 1, 3, 1)];
    let second = [request(&contract, ModelHandle(0), 1, 1, 3, 40)];
    let held = rig.run(ModelHandle(0), &first, 4);
    for _ in 0..20 {
        rig.run(ModelHandle(0), &second, 4);
    }
    assert_eq!(result_payload(&held, 0, first[0].payload.len()), first[0].payload);
}

/// The identity, unless the first byte of its input asks for something else.
struct Moody {
    instances: Arc<AtomicU32>,
    fails_second: bool,
    /// Held by every instance that exists.
    live: Arc<()>,
    contract: Arc<Contract>,
}

struct MoodyInstance {
    /// Left behind by a panic in the middle of a batch.
    broken: bool,
    _live: Arc<()>,
}

const PANIC: u8 = 61;
const ERROR: u8 = 62;
const TOO_FEW: u8 = 58;
const TOO_SHORT: u8 = 59;
const FOREIGN_ROW: u8 = 60;

impl LoadedModel for Moody {
    fn contract(&self) -> &Contract {
        &self.contract
    }

    fn instantiate(&self) -> Result<Box<dyn Model>, ModelError> {
        // The second instance cannot be built, the third can.
        match self.instances.fetch_add(1, Ordering::Relaxed) {
            1 if self.fails_second => Err(ModelError("no memory just now".into())),
            _ => Ok(Box::new(MoodyInstance { broken: false, _live: Arc::clone(&self.live) })),
        }
    }
}

impl Model for MoodyInstance {
    fn run(&mut self, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), ModelError> {
        assert!(!self.broken, "an instance that panicked is not used again");
        let asks = |what| (0..batch.lens.len()).any(|row| batch.row::<u8>(0, row)[0] == what);
        if asks(PANIC) {
            self.broken = true;
            // As much of the answer as a panic leaves.
            out.outputs.clear();
            panic!("asked to");
        }
        if asks(ERROR) {
            return Err(ModelError("asked to".into()));
        }
        out.outputs[0].bytes_mut().copy_from_slice(batch.inputs[0].bytes());
        match asks(TOO_FEW) {
            true => drop(out.outputs.pop()),
            false if asks(TOO_SHORT) => {
                let len = out.outputs[0].len();
                out.outputs[0].set_len(len - 1);
            }
            false if asks(FOREIGN_ROW) => {
                let row = batch.rows;
                out.row_errors.push(RowError { row, code: Code::ExecutorFailed, message: "nobody's".into() });
            }
            false => {}
        }
        Ok(())
    }
}

/// A rig around a moody model, with what its instances hold.
fn moody(fails_second: bool) -> (Rig, Arc<AtomicU32>, Arc<()>) {
    let contract = contracts().swap_remove(0);
    let (instances, live) = (Arc::new(AtomicU32::new(0)), Arc::new(()));
    let moody = Arc::new(Moody {
        instances: Arc::clone(&instances),
        fails_second,
        live: Arc::clone(&live),
        contract: Arc::clone(&contract),
    });
    let executor = CpuExecutor::new(vec![moody], &[true]).expect("the first instance");
    (Rig::new(vec![contract], Box::new(executor)), instances, live)
}

/// Requests of one row of which each asks for what its byte says.
fn asking(contract: &Contract, bytes: &[u8]) -> Vec<Request> {
    (0..).zip(bytes).map(|(slot, byte)| request(contract, ModelHandle(0), slot, 1, 3, *byte)).collect()
}

#[test]
fn a_panic_costs_who_caused_it_and_the_instance_is_built_again_before_the_next_run() {
    let (mut rig, instances, live) = moody(false);
    let contract = Arc::clone(&rig.contracts[0]);
    let mut run = |bytes: &[u8]| codes(&rig.run(ModelHandle(0), &asking(&contract, bytes), 4));
    let failed = Code::ExecutorFailed;
    assert_eq!(run(&[1, 2, 3, 4]), [Code::Ok; 4]);
    assert_eq!(run(&[1, ERROR, 3, 4]), [Code::Ok, failed, Code::Ok, Code::Ok]);
    assert_eq!(instances.load(Ordering::Relaxed), 1, "an error is no reason to build it again");
    assert_eq!(run(&[1, 2, PANIC, 4]), [Code::Ok, Code::Ok, failed, Code::Ok]);
    assert_eq!(run(&[1, ERROR, PANIC, 4]), [Code::Ok, failed, failed, Code::Ok]);
    assert_eq!(run(&[1, 2, 3, 4]), [Code::Ok; 4]);
    let (panics, rebuilt) = rig.telemetry.executor(0).panics();
    assert_eq!(panics, 2, "batches that panicked, however often");
    assert_eq!(u64::from(instances.load(Ordering::Relaxed)), 1 + rebuilt);
    assert_eq!(Arc::strong_count(&live), 3, "ours, the model's, and that of one instance");
}

#[test]
fn a_model_that_cannot_be_built_again_is_nobodys_fault_and_the_next_batch_tries_once_more() {
    let (mut rig, instances, _live) = moody(true);
    let contract = Arc::clone(&rig.contracts[0]);
    let failed = rig.run(ModelHandle(0), &asking(&contract, &[1, PANIC, 3]), 4);
    for member in &failed.members {
        let refusal = failure_of(&failed, member).expect("nothing ran");
        assert_eq!(refusal.code, Code::ExecutorFailed);
        assert!(refusal.message.contains("built again"), "{refusal}");
    }
    assert_eq!(rig.telemetry.executor(0).bisections(), (1, [0, 0, 3]));
    assert_eq!(codes(&rig.run(ModelHandle(0), &asking(&contract, &[1, 2, 3]), 4)), [Code::Ok; 3]);
    assert_eq!(instances.load(Ordering::Relaxed), 3);
}

/// Goal: F55, T8: a thousand panics leak nothing. Method: instances and buffers are counted.
#[test]
fn a_thousand_panics_leave_one_instance_and_no_buffer_more() {
    let (mut rig, instances, live) = moody(false);
    let contract = Arc::clone(&rig.contracts[0]);
    for round in 0..1000u32 {
        let mut bytes = [1, 2, 3, 4];
        bytes[round as usize % 4] = PANIC;
        let codes = codes(&rig.run(ModelHandle(0), &asking(&contract, &bytes), 4));
        assert_eq!(codes.iter().filter(|code| **code == Code::Ok).count(), 3, "round {round}");
        assert_eq!(codes[round as usize % 4], Code::ExecutorFailed);
        // The last run of a batch may have been the one that panicked.
        assert!(Arc::strong_count(&live) <= 3, "round {round}");
        assert!(rig.worker.pooled() <= 1, "no finished batch is left behind");
    }
    let (panics, rebuilt) = rig.telemetry.executor(0).panics();
    assert_eq!((panics, u64::from(instances.load(Ordering::Relaxed))), (1000, 1 + rebuilt));
}

/// Goal: F61. Method: a model that gives one output too few, a short one, or an error of a row that is none.
#[test]
fn outputs_of_another_count_or_shape_are_an_alarm_and_nobody_is_answered_from_them() {
    let (mut rig, ..) = moody(false);
    let contract = Arc::clone(&rig.contracts[0]);
    for (alarms, lie) in (1..).zip([TOO_FEW, TOO_SHORT, FOREIGN_ROW]) {
        let finished = rig.run(ModelHandle(0), &asking(&contract, &[1, lie, 3]), 4);
        assert_eq!(codes(&finished), [Code::Internal; 3]);
        assert_eq!(rig.telemetry.alarms(Alarm::WrongOutput), alarms);
        assert_eq!(codes(&rig.run(ModelHandle(0), &asking(&contract, &[1, 2, 3]), 4)), [Code::Ok; 3]);
    }
    // Seen in a part of a bisected batch too: what was answered before was right.
    let finished = rig.run(ModelHandle(0), &asking(&contract, &[1, 2, PANIC, TOO_FEW]), 4);
    assert_eq!(codes(&finished), [Code::Ok, Code::Ok, Code::ExecutorFailed, Code::Internal]);
}

#[test]
fn warming_up_runs_every_shape_on_padding_and_mails_nobody() {
    let (mut rig, faults) = Rig::simulated();
    let times = rig.worker.warm(ModelHandle(2), Layout::Padded, &[(1, 8), (8, 64)]).expect("the identity");
    assert_eq!(times.len(), 2, "one time a shape");
    assert_eq!(faults.batches.load(Ordering::Relaxed), 2 * (1 + warm::RUNS_MAX as u64), "each is soon done");
    assert!(rig.inboxes.iter().all(Receiver::is_empty));
    faults.failures.store(1, Ordering::Relaxed);
    assert_eq!(
        rig.worker.warm(ModelHandle(0), Layout::Padded, &[(1, 8)]).expect_err("it fails").code,
        Code::ExecutorFailed
    );
}

/// The identity, but for a mask that leaks: the first byte of each row also has what stands in the row before.
struct Leaky;

impl Executor for Leaky {
    fn run(&mut self, _: ModelHandle, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), Failure> {
        let mut before = 0;
        for (row, place) in out.output_mut::<u8>(0).chunks_exact_mut(batch.padded_len as usize).enumerate() {
            let real = batch.row::<u8>(0, row);
            place[..real.len()].copy_from_slice(real);
            place[0] ^= before;
            before = real[0];
        }
        Ok(())
    }
}

/// Goal: a planted leak is found, and nothing else is (N12). Method: batches of four through both executors, every row due.
#[test]
fn the_canary_finds_a_row_that_its_mates_leak_into() {
    let contract = contract(vec![spec("bytes", DType::U8, vec![Dim::Named("tokens".into())], 0.0)]);
    let looks = |executor: Box<dyn Executor>, every: u32| {
        let mut rig = Rig::new(vec![Arc::clone(&contract)], executor);
        rig.worker.watch(every, vec![true]);
        for round in 0..40u8 {
            let one = |n: u8| request(&contract, ModelHandle(0), n.into(), 1, n.into(), n * 5 + round % 7);
            let requests: Vec<Request> = (1..5).map(one).collect();
            rig.run(ModelHandle(0), &requests, 8);
        }
        rig.telemetry.model(ModelHandle(0)).looks()
    };
    let (equal, apart) = looks(Box::new(Leaky), 4);
    // The first row of a batch has nobody before it.
    assert!(apart >= 20 && equal + apart == 40, "{equal} equal, {apart} apart");
    assert_eq!(looks(Box::new(Leaky), 0), (0, 0));
    assert_eq!(looks(Box::new(SimExecutor::new(Arc::default())), 4), (40, 0));
    assert_eq!(looks(Box::new(SimExecutor::new(Arc::default())), 40), (4, 0));
}
