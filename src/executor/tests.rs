//! Pack, run, scatter: whose bytes come back to whom, and what a failure costs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use proptest::prelude::*;

use super::batch::{BatchOutput, BatchView};
use super::cpu::CpuExecutor;
use super::model::{LoadedModel, Model, ModelError};
use super::pack::{Pads, Row, pack};
use super::sim::{Faults, SimExecutor};
use super::slot::VacantSlot;
use super::worker::{Answers, Worker};
use super::{Executor, Failure};
use crate::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
use crate::mail::{FinishedBatch, Request, ToShard};
use crate::mailbox::{Receiver, mailbox};
use crate::scatter::{Details, append_result, failure_of};
use crate::scheduler::SealedBatch;
use crate::telemetry::{ModelLabels, Telemetry};
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
        self.batches += 1;
        let rows = requests.iter().map(|request| request.rows).sum();
        let batch = SealedBatch {
            id: self.batches,
            model,
            executor: 0,
            rows,
            rows_possible: rows,
            layout: Layout::Padded,
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
        check_staging(&mut slot, &contract, requests, padded_len);
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
    let (mut out, details) = (Vec::new(), Details { timings: true, receipt: false });
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

#[test]
fn a_batch_that_fails_fails_for_all_its_members_and_for_no_other_batch() {
    let (mut rig, faults) = Rig::simulated();
    let contract = Arc::clone(&rig.contracts[0]);
    let requests: Vec<Request> = (0..4).map(|slot| request(&contract, ModelHandle(0), slot, 1, 3, 1)).collect();
    faults.failures.store(1, Ordering::Relaxed);
    let failed = rig.run(ModelHandle(0), &requests, 4);
    for member in &failed.members {
        assert_eq!(failure_of(&failed, member).expect("it failed").code, Code::ExecutorFailed);
    }
    let fine = rig.run(ModelHandle(0), &requests, 4);
    assert!(fine.members.iter().all(|member| failure_of(&fine, member).is_none()));
    assert_eq!(faults.batches.load(Ordering::Relaxed), 2);
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
    contract: Arc<Contract>,
}

struct MoodyInstance {
    /// Left behind by a panic in the middle of a batch.
    broken: bool,
}

const PANIC: u8 = 61;
const ERROR: u8 = 62;

impl LoadedModel for Moody {
    fn contract(&self) -> &Contract {
        &self.contract
    }

    fn instantiate(&self) -> Result<Box<dyn Model>, ModelError> {
        // The second instance cannot be built, the third can.
        match self.instances.fetch_add(1, Ordering::Relaxed) {
            1 => Err(ModelError("no memory just now".into())),
            _ => Ok(Box::new(MoodyInstance { broken: false })),
        }
    }
}

impl Model for MoodyInstance {
    fn run(&mut self, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), ModelError> {
        assert!(!self.broken, "an instance that panicked is not used again");
        match batch.inputs[0].bytes()[0] {
            PANIC => {
                self.broken = true;
                panic!("asked to");
            }
            ERROR => Err(ModelError("asked to".into())),
            _ => {
                out.outputs[0].bytes_mut().copy_from_slice(batch.inputs[0].bytes());
                Ok(())
            }
        }
    }
}

#[test]
fn a_panic_or_error_in_a_model_costs_its_batch_and_the_instance_is_built_again() {
    let contract = contracts().swap_remove(0);
    let instances = Arc::new(AtomicU32::new(0));
    let moody = Arc::new(Moody { instances: Arc::clone(&instances), contract: Arc::clone(&contract) });
    let executor = CpuExecutor::new(vec![moody], &[true]).expect("the first instance");
    let mut rig = Rig::new(vec![Arc::clone(&contract)], Box::new(executor));
    let mut outcome = |fill: u8| {
        let requests: Vec<Request> = (0..3).map(|slot| request(&contract, ModelHandle(0), slot, 1, 3, fill)).collect();
        let finished = rig.run(ModelHandle(0), &requests, 4);
        let codes: Vec<Code> = finished
            .members
            .iter()
            .map(|member| failure_of(&finished, member).map_or(Code::Ok, |refusal| refusal.code))
            .collect();
        assert!(codes.iter().all(|code| *code == codes[0]), "all members alike");
        codes[0]
    };
    assert_eq!(outcome(1), Code::Ok);
    assert_eq!(outcome(ERROR), Code::ExecutorFailed);
    assert_eq!(outcome(1), Code::Ok);
    assert_eq!(instances.load(Ordering::Relaxed), 1, "an error is no reason to build it again");
    assert_eq!(outcome(PANIC), Code::ExecutorFailed);
    assert_eq!(outcome(1), Code::ExecutorFailed, "it could not be built");
    assert_eq!(outcome(1), Code::Ok);
    assert_eq!(instances.load(Ordering::Relaxed), 3);
}

#[test]
fn warming_up_runs_every_shape_twice_on_padding_and_mails_nobody() {
    let (mut rig, faults) = Rig::simulated();
    let times = rig.worker.warm(ModelHandle(2), Layout::Padded, &[(1, 8), (8, 64)]).expect("the identity");
    assert_eq!(times.len(), 2, "one time a shape");
    assert_eq!(faults.batches.load(Ordering::Relaxed), 4, "the second run of each is the one that is timed");
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
