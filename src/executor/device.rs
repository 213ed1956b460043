//! An executor on a device: asks for batch after batch, and leaves the waiting to a thread that has nothing else to do.
//!
//! ```text
//! batcher ──FilledSlot──> asks (upload · compute · readback) ──InFlight──> waits, answers ──vacant──> batcher
//!                         ^──────────────── slot, readback memory ───────────────┘
//! ```
//!
//! Always true
//! - Rows are packed where the device reads them, and answers are cut from where it wrote them: no copy between.
//! - What the device works on is in nobody's hands (gpu/slot.rs). Slots and readback memory are counted: when all are out, the
//!   executor waits and counts that too; nothing falls back to memory that a device copies slowly.
//! - A batch that is larger than the memory made for it, or that lies padded, runs in pieces, one after the other. Where one fails
//!   of which the device says so at once, its members run again in parts, as on the processor.
//! - When the device is lost, the alarm is raised, and then every batch that it had and all that follow are answered
//!   `executor_failed`.
//!
//! Elsewhere: what is computed (gpu/encoder.rs), on what (device), models without a program for a device (cpu.rs).

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::batch::{AlignedBytes, BatchOutput, BatchView};
use super::canary::{self, Canary};
use super::isolation::{Isolated, Isolation};
use super::slot::{FilledSlot, VacantSlot};
use super::worker::{Answers, Worker, padding, view_of};
use super::{Blame, Failure, slot::Staging, warm};
use crate::clock;
use crate::gpu::driver::{Driver, Fault, HostMemory, HostUse};
use crate::gpu::encoder::{self, Encoder, Form, Parameters};
use crate::gpu::launch::Float;
use crate::gpu::ops::Bounds;
use crate::gpu::slot::{Capacity, Complete, Failed, Held, HostBatch, InFlight, Vacant};
use crate::mail::{DeviceTimes, Finished, FinishedBatch, ToBatcher};
use crate::mailbox::{Received, Receiver, Sender};
use crate::scheduler::SealedBatch;
use crate::timeline::Ran;
use crate::vocab::{Code, Layout, ModelHandle, Moment, Refusal, Run, SealReason};

/// What a model computes on a device, and how large its batches may be.
#[derive(Debug)]
pub struct Program<M> {
    pub form: Form,
    /// Of all executors of the device.
    pub parameters: Arc<Parameters<M>>,
    /// Largest batch that memory is made for; larger ones run in pieces.
    pub bounds: Bounds,
    pub inputs: usize,
}

impl<M> Clone for Program<M> {
    fn clone(&self) -> Program<M> {
        let Program { form, parameters, bounds, inputs } = self;
        Program { form: form.clone(), parameters: Arc::clone(parameters), bounds: *bounds, inputs: *inputs }
    }
}

/// Puts on a device what its executors share, and says which models it has a program for.
pub fn put<D: Driver>(
    driver: &mut D,
    host: &[Option<Program<Vec<f32>>>],
) -> Result<Vec<Option<Program<D::Memory>>>, Fault> {
    let put = |program: &Option<Program<Vec<f32>>>| {
        program.as_ref().map(|Program { form, parameters, bounds, inputs }| {
            let parameters = Arc::new(encoder::put(driver, form, parameters)?);
            Ok(Program { form: form.clone(), parameters, bounds: *bounds, inputs: *inputs })
        })
    };
    host.iter().map(put).map(Option::transpose).collect()
}

/// How an executor is made.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Batches that can be on their way at once.
    pub slots: usize,
    /// Device memory that captured graphs may take; 0: none are captured.
    pub graph_bytes_max: usize,
}

/// Finished batches beside those in flight whose answers shards are still cutting out.
const SPARE_READBACKS: usize = 4;

/// What readback memory holds before its first batch.
const NO_BATCH: SealedBatch = SealedBatch {
    id: 0,
    model: ModelHandle(0),
    executor: 0,
    rows: 0,
    rows_possible: 0,
    layout: Layout::Packed,
    padded_len: 0,
    cells_real: 0,
    squares_real: 0,
    reason: SealReason::Idle,
    sealed_at: Moment::ZERO,
    generation: 0,
    predicted: 0,
    objective: Duration::ZERO,
};

/// Raises the alarm that the device is lost. Each half of each executor that notices calls it, once.
pub type Alarm = Arc<dyn Fn(&Fault) + Send + Sync>;

/// The asking half.
pub struct DeviceWorker<D: Driver> {
    driver: D,
    answers: Answers,
    alarm: Alarm,
    /// By model; None: it runs on the processor, here.
    encoders: Vec<Option<Encoder<D>>>,
    others: Worker,
    vacant: Vec<Vacant<D>>,
    readbacks: Vec<Arc<FinishedBatch>>,
    /// For pieces.
    piece: Option<HostBatch>,
    canary: Canary,
    isolation: Isolation,
    /// A row that the canary has kept is in flight.
    watching: bool,
    repeatable: Vec<bool>,
    flights: flume::Sender<Flight<D>>,
    landed: flume::Receiver<Landed<D>>,
    lost: Option<Fault>,
}

/// The waiting half.
pub struct Completion<D: Driver> {
    answers: Answers,
    alarm: Alarm,
    flights: flume::Receiver<Flight<D>>,
    landed: flume::Sender<Landed<D>>,
    batcher: Sender<ToBatcher>,
    lost: Option<Fault>,
}

struct Flight<D: Driver> {
    batch: InFlight<D, Whole>,
    taken_at: Moment,
    asked_at: Moment,
    /// Cells that the device computes.
    cells: u64,
    watched: Option<Watched>,
}

/// A row that is run again when its batch has landed.
#[derive(Clone, Copy)]
struct Watched {
    row: u32,
    len: u32,
}

struct Landed<D: Driver> {
    vacant: Option<Vacant<D>>,
    readback: Arc<FinishedBatch>,
    watched: Option<Watched>,
    lost: Option<Fault>,
}

/// A batch whose rows and answers lie in memory that the device copies.
struct Whole {
    slot: FilledSlot,
    finished: Arc<FinishedBatch>,
}

impl Held for Whole {
    fn lens(&self) -> &[u32] {
        &self.slot.staging().lens
    }

    fn input(&self, index: usize) -> Option<(&dyn HostMemory, Range<usize>)> {
        let input = self.slot.staging().inputs.get(index)?;
        Some((input.device()?, 0..input.len()))
    }

    fn output(&mut self, index: usize) -> Option<(&mut dyn HostMemory, Range<usize>)> {
        let finished = Arc::get_mut(&mut self.finished).expect("held alone while in flight");
        let output = finished.output.outputs.get_mut(index)?;
        let len = output.len();
        Some((output.device_mut()?, 0..len))
    }
}

/// An executor, made: both halves, and the slots for the batcher to fill.
pub struct Made<D: Driver> {
    pub worker: DeviceWorker<D>,
    pub completion: Completion<D>,
    pub slots: Vec<VacantSlot>,
}

/// Makes an executor: all the memory that it will ever use. A device that has not enough gets smaller bounds, by halves, down to
/// the longest row.
pub fn make<D: Driver>(
    mut driver: D,
    programs: Vec<Option<Program<D::Memory>>>,
    others: Worker,
    answers: Answers,
    options: Options,
    batcher: Sender<ToBatcher>,
    alarm: Alarm,
) -> Result<Made<D>, Fault> {
    let mut programs = programs;
    let (encoders, vacant, capacity) = loop {
        match allocate(&mut driver, &programs, options) {
            Ok(made) => break made,
            Err(Fault::OutOfMemory { bytes }) if halve(&mut programs) => {
                tracing::warn!(bytes, "the device has not enough memory for its batches; making them half as large");
            }
            Err(fault) => return Err(fault),
        }
    };
    let (flight_sender, flights) = flume::bounded(options.slots);
    // Each brings readback memory along, so there are never more on their way.
    let (landed_sender, landed) = flume::bounded(options.slots + SPARE_READBACKS);
    let mut readbacks = Vec::new();
    let mut slots = Vec::new();
    for at in 0..options.slots + SPARE_READBACKS {
        let mut outputs = Vec::new();
        for bytes in &capacity.outputs {
            outputs.push(AlignedBytes::for_device(driver.host_memory(*bytes, HostUse::Readback)?));
        }
        readbacks.push(Arc::new(answers.empty(NO_BATCH, BatchOutput::in_buffers(outputs))));
        if at < options.slots {
            let mut inputs = Vec::new();
            for bytes in &capacity.inputs {
                inputs.push(AlignedBytes::for_device(driver.host_memory(*bytes, HostUse::Upload)?));
            }
            slots.push(VacantSlot::new(Staging::of(inputs)));
        }
    }
    let piece = HostBatch::new(&driver, &capacity)?;
    let completion = Completion {
        answers: answers.clone(),
        alarm: Arc::clone(&alarm),
        flights,
        landed: landed_sender,
        batcher,
        lost: None,
    };
    let worker = DeviceWorker {
        driver,
        answers,
        alarm,
        encoders,
        others,
        vacant,
        readbacks,
        piece: Some(piece),
        canary: Canary::default(),
        isolation: Isolation::default(),
        watching: false,
        repeatable: Vec::new(),
        flights: flight_sender,
        landed,
        lost: None,
    };
    let mut made = Made { worker, completion, slots };
    made.worker.capture(options.graph_bytes_max)?;
    made.worker.count_memory(&capacity, options);
    Ok(made)
}

type Allocated<D> = (Vec<Option<Encoder<D>>>, Vec<Vacant<D>>, Capacity);

fn allocate<D: Driver>(
    driver: &mut D,
    programs: &[Option<Program<D::Memory>>],
    options: Options,
) -> Result<Allocated<D>, Fault> {
    let mut capacity = Capacity { rows: 1, inputs: Vec::new(), outputs: vec![1] };
    let mut encoders = Vec::with_capacity(programs.len());
    for program in programs {
        let Some(Program { form, parameters, bounds, inputs }) = program else {
            encoders.push(None);
            continue;
        };
        capacity.rows = capacity.rows.max(bounds.rows);
        // A graph that is larger than its batch reads ids to the end of its bucket.
        let id_bytes = encoder::bucket(bounds.tokens) * size_of::<u32>();
        if capacity.inputs.len() < *inputs {
            capacity.inputs.resize(*inputs, 0);
        }
        capacity.inputs[..*inputs].iter_mut().for_each(|bytes| *bytes = id_bytes.max(*bytes));
        capacity.outputs[0] = capacity.outputs[0].max(bounds.rows * form.outputs() * size_of::<f32>());
        encoders.push(Some(Encoder::new(driver, form.clone(), Arc::clone(parameters), *bounds)?));
    }
    let vacant = (0..options.slots).map(|at| Vacant::new(driver, at, &capacity)).collect::<Result<_, _>>()?;
    Ok((encoders, vacant, capacity))
}

/// Halves what every program is made for. False when nothing can be smaller.
fn halve<M>(programs: &mut [Option<Program<M>>]) -> bool {
    let mut any = false;
    for Program { bounds, .. } in programs.iter_mut().flatten() {
        let smaller =
            Bounds { rows: bounds.rows.div_ceil(2), tokens: (bounds.tokens / 2).max(bounds.longest), ..*bounds };
        any |= smaller != *bounds;
        *bounds = smaller;
    }
    any
}

impl<D: Driver> DeviceWorker<D> {
    /// Runs what arrives until the batcher is gone.
    pub fn run_thread(mut self, slots: Receiver<FilledSlot>, batcher: Sender<ToBatcher>, spin: Duration) {
        while let Received::Message(slot) = slots.recv_until(None, spin) {
            if let Some(finished) = self.take(slot) {
                // If the batcher is gone, so is everybody who could care.
                let _ = batcher.send_or_wait(ToBatcher::Finished(finished));
            }
        }
        // Those in flight are waited for by the other half, which ends when this is dropped.
    }

    /// Takes a batch on. `Some` when it ended here: it ran on the processor, in pieces, or not at all.
    pub fn take(&mut self, slot: FilledSlot) -> Option<Finished> {
        let taken_at = clock::now();
        while let Ok(landed) = self.landed.try_recv() {
            self.land(landed);
        }
        let model = slot.batch.model;
        let Some(encoder) = &self.encoders[model.index()] else { return Some(self.others.run(slot)) };
        let bounds = encoder.bounds();
        let mut readback = self.take_readback();
        let finished = Arc::get_mut(&mut readback).expect("taken because nobody else holds it");
        self.answers.prepare(finished, &slot);
        if let Some(fault) = self.lost.clone() {
            return Some(self.end(slot, readback, Err(refuse(&fault)), [taken_at, clock::now()], Duration::ZERO));
        }
        let staging = slot.staging();
        let batch = Bounds::of(&staging.lens);
        let fits = batch.rows <= bounds.rows && batch.tokens <= bounds.tokens;
        let inputs = finished.contract.inputs.len();
        let in_place = slot.batch.layout == Layout::Packed
            && staging.inputs[..inputs].iter().all(|input| input.device().is_some())
            && finished.output.outputs.first().is_some_and(|output| output.device().is_some());
        if !(fits && in_place) {
            return Some(self.run_in_pieces(slot, readback, taken_at));
        }
        let vacant = match self.take_vacant() {
            Ok(vacant) => vacant,
            Err(fault) => {
                let times = [taken_at, clock::now()];
                return Some(self.end(slot, readback, Err(refuse(&fault)), times, Duration::ZERO));
            }
        };
        let asked_at = clock::now();
        let watched = self.watch_row(&slot, &readback);
        let held = Whole { slot, finished: readback };
        let encoder = self.encoders[model.index()].as_ref().expect("looked at above");
        match vacant.fill(held).submit(&mut self.driver, |driver, buffers| encoder.compute(driver, buffers, batch)) {
            Ok(in_flight) => {
                let cells = encoder::bucket(batch.tokens) as u64;
                let sent = self.flights.send(Flight { batch: in_flight, taken_at, asked_at, cells, watched });
                assert!(sent.is_ok(), "the waiting half outlives the asking one");
                None
            }
            Err(Failed { fault, held: Whole { slot, finished }, vacant }) => {
                self.vacant.extend(vacant);
                self.watching &= watched.is_none();
                match fault {
                    // The device is as it was; less at a time may do.
                    Fault::OutOfMemory { .. } => Some(self.run_in_pieces(slot, finished, taken_at)),
                    fault => {
                        self.note(&fault);
                        Some(self.end(slot, finished, Err(refuse(&fault)), [taken_at, asked_at], Duration::ZERO))
                    }
                }
            }
        }
    }

    /// Runs one row in so many once more, alone, and compares; of the models that are `repeatable`. 0: none.
    pub fn watch(&mut self, every: u32, repeatable: Vec<bool>) {
        (self.canary, self.repeatable) = (Canary::new(every), repeatable);
    }

    /// Keeps a row of the batch, where it is one's turn and none is being watched.
    fn watch_row(&mut self, slot: &FilledSlot, finished: &FinishedBatch) -> Option<Watched> {
        if self.watching || self.repeatable.get(slot.batch.model.index()) != Some(&true) {
            return None;
        }
        let view = view_of(slot.staging(), &finished.contract, &slot.batch);
        let row = self.canary.choose(view)?;
        self.watching = true;
        Some(Watched { row, len: self.canary.keep(view, row) })
    }

    fn land(&mut self, landed: Landed<D>) {
        self.vacant.extend(landed.vacant);
        if self.lost.is_none() {
            self.lost = landed.lost;
        }
        if let Some(watched) = landed.watched {
            self.watching = false;
            self.look_again(watched, &landed.readback);
        }
        self.readbacks.push(landed.readback);
    }

    /// After the answers are on their way.
    fn look_again(&mut self, Watched { row, len }: Watched, finished: &FinishedBatch) {
        let failed = finished.failure.is_some() || finished.output.row_errors.iter().any(|error| error.row == row);
        if failed || self.lost.is_some() || self.vacant.is_empty() {
            return;
        }
        let model = finished.batch.model;
        let Some(encoder) = &self.encoders[model.index()] else { return };
        let allowed = match encoder.form().float {
            Float::F32 => canary::APART,
            // Products of another size round otherwise; what leaks is further away.
            Float::F16 | Float::BF16 => 20.0 * canary::APART,
        };
        let mut canary = std::mem::take(&mut self.canary);
        let ran = canary.alone(&finished.contract, len, |view, out| self.compute_in_pieces(model, view, out).is_ok());
        if ran {
            self.answers.looked(finished, canary.compare(&finished.contract, &finished.output, row, len, allowed));
        }
        self.canary = canary;
    }

    fn note(&mut self, fault: &Fault) {
        if fault.is_lost() && self.lost.is_none() {
            self.lost = Some(fault.clone());
            (self.alarm)(fault);
        }
    }

    /// Readback memory that nobody holds: waits for a shard or a batch to let go of some.
    fn take_readback(&mut self) -> Arc<FinishedBatch> {
        let mut waited = false;
        loop {
            if let Some(at) = self.readbacks.iter().position(|shared| Arc::strong_count(shared) == 1) {
                return self.readbacks.swap_remove(at);
            }
            if !std::mem::replace(&mut waited, true) {
                self.answers.telemetry.executor(self.answers.index).waited_for_readback();
            }
            // Shards say nothing when they let go: within microseconds, as a rule.
            match self.landed.recv_timeout(READBACK_LOOK) {
                Ok(landed) => self.land(landed),
                Err(flume::RecvTimeoutError::Timeout) => {}
                Err(flume::RecvTimeoutError::Disconnected) => std::thread::sleep(READBACK_LOOK),
            }
        }
    }

    /// A slot that the device is done with: waits for one. Slots of a lost device do not come back.
    fn take_vacant(&mut self) -> Result<Vacant<D>, Fault> {
        if self.vacant.is_empty() {
            self.answers.telemetry.executor(self.answers.index).waited_for_slot();
        }
        loop {
            if let Some(fault) = &self.lost {
                return Err(fault.clone());
            }
            if let Some(vacant) = self.vacant.pop() {
                return Ok(vacant);
            }
            match self.landed.recv() {
                Ok(landed) => self.land(landed),
                Err(_) => panic!("the waiting half ended before its turn"),
            }
        }
    }

    /// Answers a batch that ended on this thread.
    fn end(
        &mut self,
        mut slot: FilledSlot,
        mut readback: Arc<FinishedBatch>,
        result: Result<Option<Isolated>, Failure>,
        [taken_at, started_at]: [Moment; 2],
        service: Duration,
    ) -> Finished {
        let batch = slot.batch;
        let ended_at = clock::now();
        let mut ran = Ran::new(started_at, ended_at, None, service);
        let mut blamed = Vec::new();
        let result = match result {
            Ok(None) => Ok(()),
            Ok(Some(isolated)) => self.answers.isolated(Ok(isolated), &slot, &mut ran, &mut blamed),
            Err(failure) => self.answers.isolated(Err(failure), &slot, &mut ran, &mut blamed),
        };
        self.answers.send(&mut readback, &mut slot, result, &mut ran);
        self.readbacks.push(readback);
        let run = Run {
            packed_at: slot.packed_at,
            taken_at,
            asked_at: started_at,
            began_at: started_at,
            ended_at,
            copied_at: ended_at,
            answered_at: clock::now(),
            computed_in: service,
            ..Run::default()
        };
        Finished { executor: self.answers.index, slot: slot.vacate(), batch, service, ran, run, blamed }
    }

    /// Runs a batch that memory was not made for: as many rows at a time as it was made for, copied once more.
    fn run_in_pieces(&mut self, slot: FilledSlot, mut readback: Arc<FinishedBatch>, taken_at: Moment) -> Finished {
        let started_at = clock::now();
        let finished = Arc::get_mut(&mut readback).expect("taken because nobody else holds it");
        let view = view_of(slot.staging(), &finished.contract, &slot.batch);
        let (model, mut service) = (slot.batch.model, Duration::ZERO);
        let mut isolation = std::mem::take(&mut self.isolation);
        let mut run = |model, view: BatchView<'_>, out: &mut BatchOutput| {
            let computed = self.compute_in_pieces(model, view, out).map_err(|fault| refuse(&fault))?;
            service += computed;
            Ok(())
        };
        let result = match run(model, view, &mut finished.output) {
            Ok(()) => Ok(None),
            Err(failure) => {
                let members = &slot.staging().members;
                isolation.isolate((model, view), members, failure, &mut finished.output, run, || true).map(Some)
            }
        };
        self.isolation = isolation;
        self.end(slot, readback, result, [taken_at, started_at], service)
    }

    /// Says how long the device computed.
    fn compute_in_pieces(
        &mut self,
        model: ModelHandle,
        view: BatchView<'_>,
        out: &mut BatchOutput,
    ) -> Result<Duration, Fault> {
        let mut took = Duration::ZERO;
        let mut row = 0;
        // Halved when the device says that it has no memory for more.
        let mut share = 1;
        while row < view.lens.len() {
            let bounds = self.encoders[model.index()].as_ref().expect("it has a program").bounds();
            let most = Bounds { rows: (bounds.rows / share).max(1), tokens: bounds.tokens / share, ..bounds };
            let rows = rows_that_fit(&view.lens[row..], most);
            match self.compute_rows(model, view, row..row + rows, out) {
                Ok(time) => {
                    took += time;
                    row += rows;
                }
                Err(Fault::OutOfMemory { .. }) if rows > 1 => share *= 2,
                Err(fault) => {
                    self.note(&fault);
                    return Err(fault);
                }
            }
        }
        Ok(took)
    }

    fn compute_rows(
        &mut self,
        model: ModelHandle,
        view: BatchView<'_>,
        rows: Range<usize>,
        out: &mut BatchOutput,
    ) -> Result<Duration, Fault> {
        self.answers.telemetry.executor(self.answers.index).ran_piece();
        // All slots are free or will be: those in flight do not wait for this one.
        let vacant = self.take_vacant()?;
        let mut piece = self.piece.take().expect("put back below");
        let row_bytes = view.contract.outputs[0].row_bytes(1);
        piece.begin(view.lens[rows.clone()].iter().copied(), row_bytes);
        for (index, spec) in view.contract.inputs.iter().enumerate() {
            let bytes = view.lens[rows.clone()].iter().map(|len| spec.row_bytes(*len)).sum();
            let mut to = piece.input_mut(index, bytes);
            for row in rows.clone() {
                let bytes = view.row::<u8>(index, row);
                let (place, rest) = to.split_at_mut(bytes.len());
                place.copy_from_slice(bytes);
                to = rest;
            }
        }
        let batch = piece.bounds();
        let encoder = self.encoders[model.index()].as_ref().expect("it has a program");
        let compute = |driver: &mut D, buffers: &_| encoder.compute(driver, buffers, batch);
        let landed = vacant.fill(piece).submit(&mut self.driver, compute).and_then(InFlight::wait);
        match landed {
            Ok(complete) => {
                let took = complete.computed_in();
                let (vacant, piece) = complete.vacate();
                let (at, answers) = (rows.start * row_bytes, piece.answers());
                out.outputs[0].bytes_mut()[at..at + answers.len()].copy_from_slice(answers);
                self.vacant.push(vacant);
                self.piece = Some(piece);
                took
            }
            Err(Failed { fault, held, vacant }) => {
                self.vacant.extend(vacant);
                self.piece = Some(held);
                Err(fault)
            }
        }
    }

    /// Captures graphs of every program for every slot.
    fn capture(&mut self, budget_bytes: usize) -> Result<(), Fault> {
        if budget_bytes == 0 {
            return Ok(());
        }
        let programs = self.encoders.iter().flatten().count().max(1);
        let share = budget_bytes / programs / self.vacant.len().max(1);
        for encoder in self.encoders.iter_mut().flatten() {
            for vacant in &self.vacant {
                encoder.capture(&mut self.driver, vacant.buffers(), encoder::GRAPH_TOKENS_MAX, share)?;
            }
        }
        self.driver.synchronize()
    }

    fn count_memory(&self, capacity: &Capacity, options: Options) {
        let bytes = |sizes: &[usize]| sizes.iter().sum::<usize>();
        let (inputs, outputs) = (bytes(&capacity.inputs), bytes(&capacity.outputs));
        let arena = |encoder: &Encoder<D>| encoder.arena_bytes();
        let device = (inputs + outputs) * options.slots + self.encoders.iter().flatten().map(arena).sum::<usize>();
        // Slots, the memory of pieces, and readbacks.
        let pinned = inputs * (options.slots + 1) + outputs * (options.slots + SPARE_READBACKS + 1);
        let graphs = self.encoders.iter().flatten().map(Encoder::graphs).sum();
        self.answers.telemetry.executor(self.answers.index).on_device(device as u64, pinned as u64, graphs);
    }

    /// Runs padding as a batch, and says how long the device computed at best ([`warm::fastest`]).
    pub fn warm(
        &mut self,
        model: ModelHandle,
        layout: Layout,
        shapes: &[(u32, u32)],
    ) -> Result<Vec<Duration>, Refusal> {
        if self.encoders[model.index()].is_none() {
            return self.others.warm(model, layout, shapes);
        }
        let contract = Arc::clone(&self.answers.contracts[model.index()]);
        let mut times = Vec::with_capacity(shapes.len());
        for (rows, len) in shapes.iter().copied() {
            let lens = vec![len; rows as usize];
            let inputs = padding(&contract, rows, len);
            let mut output = BatchOutput::default();
            output.prepare(&contract, Layout::Packed, &lens, len);
            let view = BatchView {
                contract: &contract,
                layout: Layout::Packed,
                rows,
                padded_len: len,
                lens: &lens,
                inputs: &inputs,
            };
            times.push(warm::fastest(|| {
                self.compute_in_pieces(model, view, &mut output).map_err(|fault| refuse(&fault).refusal)
            })?);
        }
        Ok(times)
    }
}

/// How often a thread that waits for shards to let go of readback memory looks again.
const READBACK_LOOK: Duration = Duration::from_micros(50);

/// The most rows from the first on within these bounds; at least one.
fn rows_that_fit(lens: &[u32], most: Bounds) -> usize {
    let mut tokens = 0;
    let fits = |len: &&u32| {
        tokens += **len as usize;
        tokens <= most.tokens
    };
    lens.iter().take(most.rows).take_while(fits).count().max(1)
}

fn refuse(fault: &Fault) -> Failure {
    tracing::error!(%fault, "a batch failed on the device");
    // The device's words are for the log.
    match fault {
        Fault::OutOfMemory { .. } => Failure::of_member(Code::OutOfMemory, "the device has no memory for this row"),
        Fault::Refused(_) => Failure::of_member(Code::ExecutorFailed, "the device refused this batch"),
        Fault::Lost(_) => {
            let refusal = Refusal::new(Code::ExecutorFailed, "the device was lost");
            Failure { refusal, panicked: false, blame: Blame::Executor }
        }
    }
}

impl<D: Driver> Completion<D> {
    /// Waits for batches in the order in which they were asked for and answers them, until the asking half is gone.
    pub fn run_thread(mut self) {
        while let Ok(flight) = self.flights.recv() {
            self.complete(flight);
        }
    }

    fn complete(&mut self, flight: Flight<D>) {
        let waited = flight.batch.wait();
        let finished_at = clock::now();
        let (result, service, before_done, [uploaded_in, read_in], vacant, held) = match waited {
            Ok(complete) => {
                let (service, before_done) = (complete.computed_in(), complete.before_done());
                let copied_in = complete.copied_in();
                let (vacant, held) = Complete::vacate(complete);
                let result = service.as_ref().map(drop).map_err(Fault::clone);
                (result, service.unwrap_or_default(), before_done.ok(), copied_in, Some(vacant), held)
            }
            Err(Failed { fault, held, vacant }) => {
                (Err(fault), Duration::ZERO, None, [Duration::ZERO; 2], vacant, held)
            }
        };
        let lost = result.as_ref().err().filter(|fault| fault.is_lost()).cloned();
        if let Some(fault) = &lost
            && self.lost.is_none()
        {
            // Before anybody is answered: whoever retries must not come back here.
            (self.alarm)(fault);
            self.lost = Some(fault.clone());
        }
        let Whole { mut slot, mut finished } = held;
        let batch: SealedBatch = slot.batch;
        // Its events are seen from its end, which is when this thread woke; it waited for the queue before it began.
        let device = before_done.map(|(uploaded, computed)| DeviceTimes {
            asked_at: flight.asked_at,
            uploaded_at: flight.asked_at.max(finished_at - uploaded),
            computed_at: flight.asked_at.max(finished_at - computed),
        });
        let computed_at = device.map_or(finished_at, |device| device.computed_at);
        let started_at = flight.asked_at.max(computed_at - service);
        let result = result.map_err(|fault| refuse(&fault));
        let mut ran = Ran::new(started_at, finished_at, device, service);
        self.answers.send(&mut finished, &mut slot, result, &mut ran);
        // The device's clock has no moments in common with the host's, but for this one: all was done when it was heard of.
        let ended_at = (finished_at - read_in).max(flight.asked_at);
        let run = Run {
            packed_at: slot.packed_at,
            taken_at: flight.taken_at,
            asked_at: flight.asked_at,
            began_at: (ended_at - service).max(flight.asked_at),
            ended_at,
            copied_at: finished_at,
            answered_at: clock::now(),
            uploaded_in,
            computed_in: service,
            cells: flight.cells,
        };
        // The slot first: the batcher may have filled another meanwhile, which needs it.
        let _ = self.landed.send(Landed { vacant, readback: finished, watched: flight.watched, lost });
        let slot = slot.vacate();
        let done = Finished { executor: self.answers.index, slot, batch, service, ran, run, blamed: Vec::new() };
        let _ = self.batcher.send_or_wait(ToBatcher::Finished(done));
    }
}
