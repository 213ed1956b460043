//! The bound on a device: its executor alone, all requests there at once, as many slots in flight as a server has.
//!
//! Always true
//! - Rows are packed where the device reads them and answers written where a server would cut them out: what a server adds is
//!   batching, queueing and the wire.
//! - The clock runs from the first batch to the last answer; memory, graphs and plans of products are made before.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use super::offline::{self, OfflineReport, Options, Planned};
use super::payload::Inputs;
use crate::clock;
use crate::contract::Contract;
use crate::executor::model::LoadedModel;
use crate::gpu::driver::{Driver, Event, Fault, HostUse, Product, Queue};
use crate::gpu::encoder::{self, Encoder};
use crate::gpu::launch::{Float, Span};
use crate::gpu::ops::Bounds;
use crate::gpu::reference;
use crate::gpu::slot::{Capacity, HostBatch, InFlight, Vacant};
use crate::vocab::Layout;

/// What a device did, beside what every run reports.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceReport {
    pub name: String,
    pub float: String,
    pub slots: usize,
    pub graphs: usize,
    /// Seconds that the device computed, of the median round.
    pub computed_s: f64,
    /// Wall time as a multiple of that: what copies, launches and packing could not hide.
    pub wall_over_computed: f64,
    /// 10^9 floating point operations that real tokens need, per second of wall time. None where the model does not say.
    pub gflops: Option<f64>,
    /// The same of one large product in the same type: 8,192 × 4,096 × 4,096.
    pub gemm_gflops_peak: f64,
    /// Of a lone request of the first length, one after the other: from the start of packing to the answer in host memory.
    pub lone_p50_us: f64,
}

/// Packs the rows of a planned batch end to end.
fn pack(to: &mut HostBatch, contract: &Contract, inputs: &Inputs, lens: &[u32], batch: &Planned) {
    let lens = || batch.requests.iter().map(|request| lens[*request as usize]);
    to.begin(lens(), contract.outputs[0].row_bytes(1));
    for (index, spec) in contract.inputs.iter().enumerate() {
        let mut place = to.input_mut(index, lens().map(|len| spec.row_bytes(len)).sum());
        for (request, len) in batch.requests.iter().zip(lens()) {
            let payload = inputs.payload(inputs.of_request(u64::from(*request)));
            let (offset, bytes) = (contract.input_offset(index, 1, len), spec.row_bytes(len));
            let (row, rest) = place.split_at_mut(bytes);
            row.copy_from_slice(&payload[offset..offset + bytes]);
            place = rest;
        }
    }
}

/// One executor with its slots.
struct Runner<'a, D: Driver> {
    driver: &'a mut D,
    encoder: Encoder<D>,
    vacant: Vec<Vacant<D>>,
    memory: Vec<HostBatch>,
    contract: &'a Contract,
    inputs: &'a Inputs,
    lens: &'a [u32],
}

impl<D: Driver> Runner<'_, D> {
    /// Runs batches, as many at once as there are slots. Says how long the device computed.
    fn run(&mut self, batches: &[Planned], done: &dyn Fn(usize)) -> Result<Duration, Fault> {
        let mut flights: VecDeque<InFlight<D, HostBatch>> = VecDeque::new();
        let mut computed = Duration::ZERO;
        let mut landed = 0;
        let mut batches = batches.iter();
        loop {
            let next = if self.vacant.is_empty() { None } else { batches.next() };
            let Some(batch) = next else {
                let Some(flight) = flights.pop_front() else { return Ok(computed) };
                let complete = flight.wait().map_err(|failed| failed.fault)?;
                computed += complete.computed_in()?;
                let (vacant, memory) = complete.vacate();
                self.vacant.push(vacant);
                self.memory.push(memory);
                landed += 1;
                done(landed);
                continue;
            };
            let (vacant, mut memory) =
                (self.vacant.pop().expect("just looked"), self.memory.pop().expect("one for each slot"));
            pack(&mut memory, self.contract, self.inputs, self.lens, batch);
            let (bounds, encoder) = (memory.bounds(), &self.encoder);
            let asked =
                vacant.fill(memory).submit(self.driver, |driver, buffers| encoder.compute(driver, buffers, bounds));
            flights.push_back(asked.map_err(|failed| failed.fault)?);
        }
    }
}

/// Runs everything on a device; `progress` is told of each finished batch. The model was loaded for one.
pub fn run<D: Driver>(
    mut driver: D,
    model: &Arc<dyn LoadedModel>,
    inputs: &Inputs,
    options: &Options,
    slots: usize,
    graph_bytes_max: usize,
    progress: &dyn Fn(usize, usize),
) -> Result<OfflineReport, String> {
    let contract = model.contract();
    let Some(program) = model.program() else {
        return Err(format!("model {} has no program for a device", contract.name));
    };
    let lens: Vec<u32> =
        (0..options.requests).map(|request| inputs.entry(inputs.of_request(request as u64)).len).collect();
    let options = Options { layout: Layout::Packed, threads: 1, ..*options };
    let batches = offline::plan(&lens, &options);
    let largest = |of: fn(&Planned) -> u64| batches.iter().map(of).max().unwrap_or(1) as usize;
    let bounds = Bounds {
        rows: largest(|batch| batch.requests.len() as u64),
        tokens: largest(|batch| batch.cells),
        longest: largest(|batch| batch.padded_len.into()),
    };
    let failed = |fault: Fault| fault.to_string();
    let float = program.form.float;
    let peak = matrix_rate(&mut driver, float).map_err(failed)?;
    let parameters = Arc::new(encoder::put(&mut driver, &program.form, &program.parameters).map_err(failed)?);
    let capacity = Capacity {
        rows: bounds.rows,
        inputs: vec![encoder::bucket(bounds.tokens) * 4; program.inputs],
        outputs: vec![bounds.rows * program.form.outputs() * 4],
    };
    let mut encoder = Encoder::new(&driver, program.form.clone(), parameters, bounds).map_err(failed)?;
    let (mut vacant, mut memory) = (Vec::new(), Vec::new());
    for at in 0..slots {
        let slot = Vacant::new(&driver, at, &capacity).map_err(failed)?;
        if graph_bytes_max > 0 {
            let share = graph_bytes_max / slots;
            encoder.capture(&mut driver, slot.buffers(), encoder::GRAPH_TOKENS_MAX, share).map_err(failed)?;
        }
        vacant.push(slot);
        memory.push(HostBatch::new(&driver, &capacity).map_err(failed)?);
    }
    let (name, graphs) = (driver.name(), encoder.graphs());
    let mut runner = Runner { driver: &mut driver, encoder, vacant, memory, contract, inputs, lens: &lens };
    // Sizes are planned and memory is touched before the clock starts.
    runner.run(&batches, &|_| {}).map_err(failed)?;
    let mut rounds = Vec::with_capacity(options.rounds);
    for round in 0..options.rounds {
        let (start, cpu) = (clock::now(), clock::thread_cpu());
        let done = |at: usize| progress(round * batches.len() + at, options.rounds * batches.len());
        let computed = runner.run(&batches, &done).map_err(failed)?;
        rounds.push((clock::now().since(start), computed, clock::thread_cpu() - cpu));
    }
    rounds.sort();
    let (wall, computed, cpu) = rounds[rounds.len() / 2];
    let alone = [Planned { requests: vec![0], padded_len: lens[0], cells: lens[0].into() }];
    let mut lone = Vec::new();
    for _ in 0..200 {
        let start = clock::now();
        runner.run(&alone, &|_| {}).map_err(failed)?;
        lone.push(clock::now().since(start));
    }
    lone.sort();
    let operations: Option<f64> = lens.iter().map(|len| model.operations(*len)).sum();
    let seconds = wall.as_secs_f64();
    Ok(OfflineReport {
        device: Some(DeviceReport {
            name,
            float: float.dtype().name().into(),
            slots,
            graphs,
            computed_s: computed.as_secs_f64(),
            wall_over_computed: seconds / computed.as_secs_f64(),
            gflops: operations.map(|operations| operations / seconds / 1e9),
            gemm_gflops_peak: peak,
            lone_p50_us: lone[lone.len() / 2].as_secs_f64() * 1e6,
        }),
        ..OfflineReport::of(contract, &options, &lens, &batches, [wall, rounds[0].0, cpu])
    })
}

/// 10^9 floating point operations per second of one large product: the best of some rounds, each after the last.
fn matrix_rate<D: Driver>(driver: &mut D, float: Float) -> Result<f64, Fault> {
    // A simulated device computes on one thread of the host.
    let scale = if driver.is_simulated() { 128 } else { 1 };
    let (tokens, inputs, outputs) = (8192 / scale, 4096 / scale, 4096 / scale);
    // Not zeros: multiplying those takes less power, and a card that is limited by it runs faster.
    let mut random = StdRng::seed_from_u64(1);
    let block: Vec<f32> = (0..1 << 14).map(|_| random.random_range(-1.0..1.0)).collect();
    let block = reference::encode(float, &block);
    let fill = |driver: &mut D, values: usize| {
        let memory = driver.allocate(values * float.bytes())?;
        let mut host = driver.host_memory(values * float.bytes(), HostUse::Upload)?;
        let bytes = &mut bytemuck::cast_slice_mut::<u64, u8>(host.words_mut())[..values * float.bytes()];
        bytes.chunks_mut(block.len()).for_each(|part| part.copy_from_slice(&block[..part.len()]));
        driver.upload(&*host, 0, Span::of(&memory))?;
        driver.synchronize()?;
        Ok(memory)
    };
    let (x, weights) = (fill(driver, tokens * inputs)?, fill(driver, outputs * inputs)?);
    let y = fill(driver, tokens * outputs)?;
    let (before, after) = (driver.event()?, driver.event()?);
    let mut best = Duration::MAX;
    for _ in 0..20 {
        driver.record(Queue::Compute, &before)?;
        let (x, weights, y) = (Span::of(&x), Span::of(&weights), Span::of(&y));
        driver.product(&Product { x, weights, bias: None, y, tokens, inputs, outputs, float })?;
        driver.record(Queue::Compute, &after)?;
        after.wait()?;
        best = best.min(after.since(&before)?);
    }
    driver.synchronize()?;
    Ok(2.0 * (tokens * inputs * outputs) as f64 / best.as_secs_f64().max(1e-9) / 1e9)
}
