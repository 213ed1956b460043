//! Runs filled slots on an executor: on its own thread, or inline on the batcher's.
//!
//! Always true
//! - Each filled slot ends in one finished batch, mailed to the shards of its members, and one vacant slot.
//! - Members of a batch that failed run again in parts, until whose fault it was stands alone; the others are answered.
//! - Outputs are checked before they leave: a row with NaN or infinity ends alone, its mates are answered.

use std::sync::Arc;
use std::time::Duration;

use crate::clock;
use crate::contract::{Contract, NonFinite, TensorSpec, first_non_finite};
use crate::mail::{Blamed, Finished, FinishedBatch, Member, ToBatcher, ToShard};
use crate::mailbox::{Received, Receiver, Sender};
use crate::scatter;
use crate::scheduler::SealedBatch;
use crate::telemetry::{Alarm, Telemetry};
use crate::timeline::{self, Ran};
use crate::vocab::{Code, Layout, ModelHandle, Moment, Refusal, Run};

use super::batch::{AlignedBytes, BatchOutput, BatchView, RowError};
use super::canary::{Canary, Outcome};
use super::fence::Pass;
use super::isolation::{self, Isolated, Isolation};
use super::slot::{FilledSlot, Staging};
use super::{Blame, Executor, Failure, warm};

/// What answering a batch takes.
#[derive(Clone)]
pub struct Answers {
    /// Of the executor.
    pub index: usize,
    pub contracts: Vec<Arc<Contract>>,
    pub shards: Vec<Sender<ToShard>>,
    pub telemetry: Arc<Telemetry>,
}

/// An executor with what it needs to answer.
pub struct Worker {
    answers: Answers,
    executor: Box<dyn Executor>,
    pool: Vec<Arc<FinishedBatch>>,
    canary: Canary,
    isolation: Isolation,
    /// Members of a failed batch run again for this long at most. Zero: for as long as it takes.
    isolation_max: Duration,
    /// By model: rows of it may be run again.
    repeatable: Vec<bool>,
    pass: Option<Pass>,
}

/// Why an executor's thread ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The batcher is gone.
    Closed,
    /// It hung, and another one has its seat.
    Replaced,
}

/// Finished batches kept for reuse. Shards let go within microseconds, so a few suffice; beyond them one is allocated.
const POOL_MAX: usize = 8;

impl Worker {
    pub fn new(answers: Answers, executor: Box<dyn Executor>) -> Worker {
        let (pool, canary) = (Vec::with_capacity(POOL_MAX), Canary::default());
        Worker {
            answers,
            executor,
            pool,
            canary,
            isolation: Isolation::default(),
            isolation_max: Duration::ZERO,
            repeatable: Vec::new(),
            pass: None,
        }
    }

    /// No part of a failed batch begins to run again after so long. Zero: whenever.
    pub fn isolate_for(&mut self, time: Duration) {
        self.isolation_max = time;
    }

    /// Runs one row in so many once more, alone, and compares; of the models that are `repeatable`. 0: none.
    pub fn watch(&mut self, every: u32, repeatable: Vec<bool>) {
        (self.canary, self.repeatable) = (Canary::new(every), repeatable);
    }

    /// Runs one batch and answers its members.
    ///
    /// Hot: once per batch; allocates nothing in steady state. Guarded by benches/scatter.rs.
    pub fn run(&mut self, slot: FilledSlot) -> Finished {
        self.try_run(slot).expect("only an executor with a thread of its own loses its seat")
    }

    /// The same; `None` when another thread has the seat by then: nobody is answered, and the slot is gone.
    pub fn try_run(&mut self, mut slot: FilledSlot) -> Option<Finished> {
        if let Some(pass) = &self.pass {
            pass.begin(slot.batch.id);
        }
        let started_at = clock::now();
        let batch = slot.batch;
        let mut shared = self.take_finished(&slot);
        let finished = Arc::get_mut(&mut shared).expect("the pool gives only what nobody else holds");
        self.answers.prepare(finished, &slot);
        let view = view_of(slot.staging(), &finished.contract, &batch);
        let mut ran = Ran::new(started_at, started_at, None, Duration::ZERO);
        let mut blamed = Vec::new();
        let (answers, executor) = (&self.answers, &mut *self.executor);
        let mut run = |model, view: BatchView<'_>, out: &mut BatchOutput| {
            executor.run(model, view, out).and_then(|()| answers.check(view, out))
        };
        let mut result = run(batch.model, view, &mut finished.output);
        if let Err(failure) = result {
            let give_up_at = if self.isolation_max.is_zero() { Moment::FAR } else { started_at + self.isolation_max };
            let (of, members) = ((batch.model, view), &slot.staging().members[..]);
            let in_time = || clock::now() < give_up_at;
            let isolated = self.isolation.isolate(of, members, failure, &mut finished.output, run, in_time);
            result = self.answers.isolated(isolated, &slot, &mut ran, &mut blamed);
            self.answers.rebuilt(self.executor.take_rebuilt());
        }
        let finished_at = clock::now();
        let service = finished_at.since(started_at);
        let cells = finished.output.cells_computed;
        (ran.finished_at, ran.service) = (finished_at, service);
        if self.pass.as_ref().is_some_and(|pass| !pass.is_valid()) {
            return self.too_late(&slot);
        }
        self.answers.send(&mut shared, &mut slot, result, &mut ran);
        if ran.outcome == timeline::Outcome::Ok && self.repeatable.get(batch.model.index()) == Some(&true) {
            self.look_again(&slot, &shared);
        }
        self.keep(shared);
        // Also where the row that was looked at again hung.
        if self.pass.as_ref().is_some_and(|pass| !pass.end()) {
            return self.too_late(&slot);
        }
        let run = Run {
            packed_at: slot.packed_at,
            taken_at: started_at,
            asked_at: started_at,
            began_at: started_at,
            ended_at: finished_at,
            copied_at: finished_at,
            answered_at: clock::now(),
            computed_in: service,
            uploaded_in: Duration::ZERO,
            cells,
        };
        Some(Finished { executor: self.answers.index, slot: slot.vacate(), batch, service, ran, run, blamed })
    }

    fn too_late(&self, slot: &FilledSlot) -> Option<Finished> {
        self.answers.telemetry.executor(self.answers.index).came_late();
        tracing::warn!(
            executor = self.answers.index,
            batch = slot.batch.id,
            "a batch that hung came to its end; dropped"
        );
        None
    }

    /// The thread that runs it may lose its seat, by this pass.
    pub fn hold(&mut self, pass: Pass) {
        self.pass = Some(pass);
    }

    /// After the answers are on their way.
    fn look_again(&mut self, slot: &FilledSlot, finished: &FinishedBatch) {
        let batch = &finished.batch;
        let view = view_of(slot.staging(), &finished.contract, batch);
        let outcome = self.canary.look(&mut *self.executor, batch.model, view, &finished.output);
        self.answers.looked(finished, outcome);
    }

    /// Runs what arrives until the batcher is gone, or until another thread has the seat.
    pub fn run_thread(mut self, slots: &Receiver<FilledSlot>, batcher: &Sender<ToBatcher>, spin: Duration) -> Left {
        while let Received::Message(slot) = slots.recv_until(None, spin) {
            let Some(finished) = self.try_run(slot) else { return Left::Replaced };
            // If the batcher is gone, so is everybody who could care.
            let _ = batcher.send_or_wait(ToBatcher::Finished(finished));
        }
        Left::Closed
    }

    /// Runs a model on padding alone, so that the first request meets warm caches and grown buffers. Returns how long each shape
    /// takes ([`warm::fastest`]).
    pub fn warm(
        &mut self,
        model: ModelHandle,
        layout: Layout,
        shapes: &[(u32, u32)],
    ) -> Result<Vec<Duration>, Refusal> {
        let mut times = Vec::with_capacity(shapes.len());
        let contract = Arc::clone(&self.answers.contracts[model.index()]);
        for (rows, len) in shapes.iter().copied() {
            let inputs = padding(&contract, rows, len);
            let lens = vec![len; rows as usize];
            let mut output = BatchOutput::default();
            output.prepare(&contract, layout, &lens, len);
            let view = BatchView { contract: &contract, layout, rows, padded_len: len, lens: &lens, inputs: &inputs };
            times.push(warm::fastest(|| {
                let start = clock::now();
                self.executor.run(model, view, &mut output).map_err(|failure| failure.refusal)?;
                Ok::<_, Refusal>(clock::now().since(start))
            })?);
        }
        Ok(times)
    }

    fn take_finished(&mut self, slot: &FilledSlot) -> Arc<FinishedBatch> {
        match self.pool.iter().position(|shared| Arc::strong_count(shared) == 1) {
            Some(at) => self.pool.swap_remove(at),
            None => Arc::new(self.answers.empty(slot.batch, BatchOutput::default())),
        }
    }

    /// Finished batches that are kept for reuse.
    #[cfg(test)]
    pub(super) fn pooled(&self) -> usize {
        self.pool.len()
    }

    fn keep(&mut self, shared: Arc<FinishedBatch>) {
        if self.pool.len() < POOL_MAX {
            self.pool.push(shared);
        }
    }
}

/// Inputs of so many rows of this length that are nothing but padding.
pub(super) fn padding(contract: &Contract, rows: u32, len: u32) -> Vec<AlignedBytes> {
    let input = |spec: &TensorSpec| {
        let (pad, mut input) = (spec.pad_bytes(), AlignedBytes::default());
        input.set_len(rows as usize * spec.row_bytes(len));
        input.bytes_mut().chunks_exact_mut(pad.len()).for_each(|element| element.copy_from_slice(&pad));
        input
    };
    contract.inputs.iter().map(input).collect()
}

impl Answers {
    /// A finished batch to be reused for others.
    pub fn empty(&self, batch: SealedBatch, output: BatchOutput) -> FinishedBatch {
        FinishedBatch {
            contract: Arc::clone(&self.contracts[batch.model.index()]),
            batch,
            members: Vec::new(),
            output,
            failure: None,
            packed_at: Moment::ZERO,
            started_at: Moment::ZERO,
            finished_at: Moment::ZERO,
            device: None,
        }
    }

    /// Sizes the outputs for the batch of a slot.
    pub fn prepare(&self, finished: &mut FinishedBatch, slot: &FilledSlot) {
        let batch = slot.batch;
        finished.contract = Arc::clone(&self.contracts[batch.model.index()]);
        finished.output.prepare(&finished.contract, batch.layout, &slot.staging().lens, batch.padded_len);
    }

    /// Refuses outputs that are not what the contract says: nobody is answered from them.
    pub fn check(&self, batch: BatchView<'_>, out: &BatchOutput) -> Result<(), Failure> {
        out.check(batch.contract, (batch.layout, batch.lens, batch.padded_len)).map_err(|message| {
            tracing::error!(model = batch.contract.name, message, "a model gave other outputs than its contract says");
            self.telemetry.alarm(Alarm::WrongOutput);
            let refusal = Refusal::new(Code::Internal, "the model gave other outputs than its contract says");
            Failure { refusal, panicked: false, blame: Blame::Executor }
        })
    }

    /// Counts what came of a failed batch whose members ran again, and says it in `ran`. Who is to blame goes into `blamed`.
    pub fn isolated(
        &self,
        isolated: Result<Isolated, Failure>,
        slot: &FilledSlot,
        ran: &mut Ran,
        blamed: &mut Vec<Blamed>,
    ) -> Result<(), Failure> {
        let isolated = match isolated {
            Ok(isolated) => isolated,
            Err(failure) => {
                blamed.extend(isolation::blamed_alone(&slot.staging().members, &failure));
                return Err(failure);
            }
        };
        let Isolated { panicked, saved, culprits, given_up, runs, blamed: by_isolation } = isolated;
        *blamed = by_isolation;
        let metrics = self.telemetry.executor(self.index);
        match panicked {
            true => metrics.panicked(),
            false => metrics.failed(),
        }
        metrics.bisected(runs, [saved, culprits, given_up]);
        ran.outcome = timeline::Outcome::Bisected { panicked };
        tracing::warn!(executor = self.index, runs, saved, culprits, given_up, "a failed batch ran again in parts");
        Ok(())
    }

    pub fn rebuilt(&self, models: u32) {
        if models > 0 {
            self.telemetry.executor(self.index).rebuilt(models);
        }
    }

    /// Counts what came of looking at a row again, and says it where it is an alarm.
    pub fn looked(&self, finished: &FinishedBatch, outcome: Outcome) {
        if outcome == Outcome::NotLooked {
            return;
        }
        let batch = &finished.batch;
        self.telemetry.model(batch.model).looked_again(outcome == Outcome::Equal);
        if let Outcome::Apart { row, output, element, together, alone } = outcome {
            let (model, id) = (&finished.contract.name, batch.id);
            let output = &finished.contract.outputs[output].name;
            let (rows, cells) = (batch.rows, batch.cells_real);
            tracing::error!(
                %model, batch = id, row, %output, element, together, alone, layout = batch.layout.name(), rows, cells,
                "a row was answered otherwise in its batch than alone: one caller's data may be in another's answer"
            );
        }
    }

    /// Sends a batch that has run to the shards of its members, and says in `ran` what came of it, if it failed. Nobody else may hold `shared`.
    pub fn send(
        &self,
        shared: &mut Arc<FinishedBatch>,
        slot: &mut FilledSlot,
        result: Result<(), Failure>,
        ran: &mut Ran,
    ) {
        let finished = Arc::get_mut(shared).expect("whoever ran the batch holds it alone");
        let metrics = self.telemetry.executor(self.index);
        finished.failure = match result {
            Ok(()) => {
                mark_non_finite_rows(&finished.contract, &slot.staging().lens, &mut finished.output);
                None
            }
            Err(failure) => {
                match failure.panicked {
                    true => metrics.panicked(),
                    false => metrics.failed(),
                }
                ran.outcome = if failure.panicked { timeline::Outcome::Panicked } else { timeline::Outcome::Failed };
                Some(failure.refusal)
            }
        };
        finished.batch = slot.batch;
        finished.packed_at = slot.packed_at;
        finished.started_at = ran.started_at;
        finished.finished_at = ran.finished_at;
        finished.device = ran.device;
        std::mem::swap(&mut finished.members, &mut slot.staging_mut().members);
        let is_late = |member: &&Member| ran.finished_at.since(member.received_at) > slot.batch.objective;
        ran.late = finished.members.iter().filter(is_late).count() as u32;
        // Counted before the send: a client that has its answer may ask for the count.
        metrics.busy(ran.service);
        self.telemetry.model(slot.batch.model).service_time(ran.service);
        scatter::send(shared, &self.shards);
    }
}

pub fn view_of<'a>(staging: &'a Staging, contract: &'a Contract, batch: &SealedBatch) -> BatchView<'a> {
    BatchView {
        contract,
        layout: batch.layout,
        rows: batch.rows,
        padded_len: batch.padded_len,
        lens: &staging.lens,
        inputs: &staging.inputs[..contract.inputs.len()],
    }
}

fn mark_non_finite_rows(contract: &Contract, lens: &[u32], output: &mut BatchOutput) {
    for (index, spec) in contract.outputs.iter().enumerate() {
        if spec.nonfinite == NonFinite::Allow || output.outputs[index].is_empty() {
            continue;
        }
        for (row, len) in (0..output.rows).zip(lens) {
            if let Some(at) = first_non_finite(spec.dtype, output.row_bytes(spec, index, row, *len)) {
                output.row_errors.push(RowError {
                    row,
                    code: Code::NonFiniteOutput,
                    message: format!("output {}: expected finite values, element {at} is not", spec.name),
                });
            }
        }
    }
}
