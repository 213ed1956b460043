//! The bound: executors alone, all requests there at once. What a server reaches of it is what batching, queueing and the
//! wire leave over.
//!
//! Always true
//! - Every request runs exactly once a round; batches respect the limits given.
//! - Threads take batches from one list, the most work first, so that they end together.
//! - The clock runs while all threads have work and their memory is there: warming up is not in it.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use serde::Serialize;

use super::on_device::DeviceReport;
use super::payload::Inputs;
use crate::clock;
use crate::contract::Contract;
use crate::executor::batch::{AlignedBytes, BatchOutput, BatchView};
use crate::executor::model::{LoadedModel, ModelError};
use crate::executor::pack::pack_rows;
use crate::kernels::{
    self,
    linear::{Packed, Then},
};
use crate::vocab::Layout;

/// In which order requests are put into batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// As they come.
    Arrival,
    /// By length, the longest first: the least padding.
    Sorted,
}

/// 10^9 floating point operations per second of CPU time that one thread reaches in a product of the size that encoders have:
/// 256 tokens, 384 inputs, 1,536 outputs. The best of some hundredths of a second.
pub fn gemm_gflops_peak() -> f64 {
    const SHAPE: (usize, usize, usize) = (384, 1536, 256);
    let (inputs, outputs, tokens) = SHAPE;
    let packed = Packed::new(&vec![0.01; inputs * outputs], &vec![0.0; outputs], inputs);
    let (x, mut y) = (vec![0.5; inputs * tokens], vec![0.0; outputs * tokens]);
    let mut best = f64::MAX;
    for _ in 0..30 {
        let before = clock::thread_cpu();
        packed.run(kernels::arch(), &x, &mut y, tokens, Then::Nothing);
        best = best.min((clock::thread_cpu() - before).as_secs_f64());
    }
    2.0 * (inputs * outputs * tokens) as f64 / best / 1e9
}

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub requests: usize,
    pub threads: usize,
    pub layout: Layout,
    pub order: Order,
    pub rows_max: u32,
    /// Most cells of a batch, padding included where there is any.
    pub cells_max: u64,
    /// Times that all of it is run.
    pub rounds: usize,
}

/// What came of it. Rates are those of the median round.
#[derive(Clone, Debug, Serialize)]
pub struct OfflineReport {
    pub model: String,
    pub layout: String,
    pub order: Order,
    pub threads: usize,
    pub requests: usize,
    pub batches: usize,
    pub rounds: usize,
    pub duration_s: f64,
    /// Of the fastest round.
    pub duration_best_s: f64,
    /// CPU time of all threads.
    pub cpu_s: f64,
    pub rows_per_s: f64,
    pub tokens_per_s: f64,
    /// Per second of CPU time: what a core does that nobody else uses.
    pub tokens_per_cpu_s: f64,
    pub padding_waste: f64,
    pub batch_rows_mean: f64,
    /// Pages that were touched for the first time, per batch, in all rounds together.
    pub page_faults_per_batch: f64,
    /// 10^9 floating point operations that real tokens need, per second of CPU time. None where the model does not say.
    pub gflops: Option<f64>,
    /// The same of one product of the size that encoders have, in the same kernels.
    pub gemm_gflops_peak: Option<f64>,
    /// Where it ran on one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceReport>,
}

/// Requests of one batch, by their number, and the length of the longest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    pub requests: Vec<u32>,
    pub padded_len: u32,
    /// With padding, where there is any.
    pub cells: u64,
}

/// Cut where a budget is full. Sorted, some best partition of a fixed set is contiguous in length (SCHEDULER's exchange
/// argument); cutting greedily from the longest differs from it by less than a batch.
pub fn plan(lens: &[u32], options: &Options) -> Vec<Planned> {
    let mut order: Vec<u32> = (0..lens.len() as u32).collect();
    if options.order == Order::Sorted {
        order.sort_by_key(|request| std::cmp::Reverse(lens[*request as usize]));
    }
    let cells_with = |batch: &Planned, len: u32| match options.layout {
        Layout::Packed => batch.cells + u64::from(len),
        Layout::Padded => (batch.requests.len() as u64 + 1) * u64::from(batch.padded_len.max(len)),
    };
    let mut batches: Vec<Planned> = Vec::new();
    for request in order {
        let len = lens[request as usize];
        match batches.last_mut() {
            Some(batch)
                if (batch.requests.len() as u32) < options.rows_max && cells_with(batch, len) <= options.cells_max =>
            {
                batch.cells = cells_with(batch, len);
                batch.padded_len = batch.padded_len.max(len);
                batch.requests.push(request);
            }
            _ => batches.push(Planned { requests: vec![request], padded_len: len, cells: len.into() }),
        }
    }
    if options.threads > 1 {
        batches.sort_by_key(|batch| std::cmp::Reverse(batch.cells));
    }
    batches
}

/// Packs and runs everything; `progress` is told of each finished batch. `peak`: 10^9 operations a second of a product, where
/// somebody measured it.
pub fn run(
    model: &Arc<dyn LoadedModel>,
    inputs: &Inputs,
    options: &Options,
    peak: Option<f64>,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<OfflineReport, ModelError> {
    let contract = model.contract();
    let lens: Vec<u32> =
        (0..options.requests).map(|request| inputs.entry(inputs.of_request(request as u64)).len).collect();
    let batches = plan(&lens, options);
    let mut times: Vec<(Duration, Duration)> = Vec::with_capacity(options.rounds);
    let mut faults = 0;
    for round in 0..options.rounds {
        let done = |at: usize| progress(round * batches.len() + at, options.rounds * batches.len());
        let round = run_round(model, inputs, options, &lens, &batches, &done)?;
        times.push((round.wall, round.cpu));
        faults += round.faults;
    }
    times.sort();
    let (duration, cpu) = times[times.len() / 2];
    let operations: Option<f64> = lens.iter().map(|len| model.operations(*len)).sum();
    Ok(OfflineReport {
        page_faults_per_batch: faults as f64 / (options.rounds * batches.len()).max(1) as f64,
        gflops: operations.map(|operations| operations / cpu.as_secs_f64() / 1e9),
        gemm_gflops_peak: peak,
        ..OfflineReport::of(contract, options, &lens, &batches, [duration, times[0].0, cpu])
    })
}

impl OfflineReport {
    /// What is said of every run. Of the median round its wall time, of the fastest round that, of the median one CPU time.
    pub(super) fn of(
        contract: &Contract,
        options: &Options,
        lens: &[u32],
        batches: &[Planned],
        [wall, best, cpu]: [Duration; 3],
    ) -> OfflineReport {
        let tokens: u64 = lens.iter().map(|len| u64::from(*len)).sum();
        let cells: u64 = batches.iter().map(|batch| batch.cells).sum();
        let (seconds, cpu_s) = (wall.as_secs_f64(), cpu.as_secs_f64());
        OfflineReport {
            model: contract.name.clone(),
            layout: options.layout.name().into(),
            order: options.order,
            threads: options.threads,
            requests: options.requests,
            batches: batches.len(),
            rounds: options.rounds,
            duration_s: seconds,
            duration_best_s: best.as_secs_f64(),
            cpu_s,
            rows_per_s: options.requests as f64 / seconds,
            tokens_per_s: tokens as f64 / seconds,
            tokens_per_cpu_s: tokens as f64 / cpu_s,
            padding_waste: 1.0 - tokens as f64 / cells.max(1) as f64,
            batch_rows_mean: options.requests as f64 / batches.len().max(1) as f64,
            page_faults_per_batch: 0.0,
            gflops: None,
            gemm_gflops_peak: None,
            device: None,
        }
    }
}

/// What running all batches once took: wall time, and the CPU time and minor page faults of all threads.
#[derive(Default)]
struct Round {
    wall: Duration,
    cpu: Duration,
    faults: i64,
}

/// Minor page faults of the calling thread so far.
fn thread_faults() -> i64 {
    getrusage(UsageWho::RUSAGE_THREAD).map_or(0, |usage| usage.minor_page_faults())
}

/// Runs all batches once.
fn run_round(
    model: &Arc<dyn LoadedModel>,
    inputs: &Inputs,
    options: &Options,
    lens: &[u32],
    batches: &[Planned],
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Round, ModelError> {
    let contract = model.contract();
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<ModelError>> = Mutex::new(None);
    let used: Mutex<Round> = Mutex::default();
    // Each thread makes and warms its instance before the clock starts.
    let barrier = std::sync::Barrier::new(options.threads + 1);
    let mut duration = Duration::ZERO;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..options.threads)
            .map(|_| {
                scope.spawn(|| {
                    let instance = model.instantiate();
                    let layout = options.layout;
                    let mut runner =
                        Runner { contract, layout, inputs, lens, staged: Vec::new(), row_lens: Vec::new() };
                    let mut output = BatchOutput::default();
                    let mut work = instance.map_err(Some).and_then(|mut instance| {
                        let largest = batches.iter().max_by_key(|batch| batch.cells);
                        for batch in largest.into_iter().chain(batches.first()).chain(batches.last()) {
                            runner.run(&mut *instance, batch, &mut output).map_err(Some)?;
                        }
                        Ok(instance)
                    });
                    barrier.wait();
                    let before = (clock::thread_cpu(), thread_faults());
                    while let Ok(instance) = &mut work {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(batch) = batches.get(at) else { break };
                        match runner.run(&mut **instance, batch, &mut output) {
                            Ok(()) => progress(at + 1),
                            Err(error) => work = Err(Some(error)),
                        }
                    }
                    let after = (clock::thread_cpu(), thread_faults());
                    let mut used = used.lock().expect("nothing panics while it holds this");
                    used.cpu += after.0 - before.0;
                    used.faults += after.1 - before.1;
                    drop(used);
                    if let Err(Some(error)) = work {
                        *failed.lock().expect("nothing panics while it holds this") = Some(error);
                    }
                })
            })
            .collect();
        barrier.wait();
        let started = clock::now();
        for thread in threads {
            let _ = thread.join();
        }
        duration = clock::now().since(started);
    });
    match failed.into_inner().expect("nothing panics while it holds this") {
        Some(error) => Err(error),
        None => Ok(Round { wall: duration, ..used.into_inner().expect("nothing panics while it holds this") }),
    }
}

struct Runner<'a> {
    contract: &'a Contract,
    layout: Layout,
    inputs: &'a Inputs,
    lens: &'a [u32],
    staged: Vec<AlignedBytes>,
    row_lens: Vec<u32>,
}

impl Runner<'_> {
    fn run(
        &mut self,
        model: &mut dyn crate::executor::model::Model,
        batch: &Planned,
        output: &mut BatchOutput,
    ) -> Result<(), ModelError> {
        let rows = batch.requests.len() as u32;
        self.row_lens.clear();
        self.row_lens.extend(batch.requests.iter().map(|request| self.lens[*request as usize]));
        self.staged.resize_with(self.contract.inputs.len(), AlignedBytes::default);
        for (index, spec) in self.contract.inputs.iter().enumerate() {
            let stride = |len: u32| match self.layout {
                Layout::Padded => spec.row_bytes(batch.padded_len),
                Layout::Packed => spec.row_bytes(len),
            };
            let pad = spec.pad_bytes();
            let staged = &mut self.staged[index];
            staged.set_len(self.row_lens.iter().map(|len| stride(*len)).sum());
            let mut places = staged.bytes_mut();
            for request in &batch.requests {
                let len = self.lens[*request as usize];
                let (place, rest) = places.split_at_mut(stride(len));
                places = rest;
                let payload = self.inputs.payload(self.inputs.of_request(u64::from(*request)));
                let offset = self.contract.input_offset(index, 1, len);
                let row_bytes = spec.row_bytes(len);
                pack_rows(&payload[offset..offset + row_bytes], row_bytes, stride(len), &pad, place);
            }
        }
        output.prepare(self.contract, self.layout, &self.row_lens, batch.padded_len);
        let view = BatchView {
            contract: self.contract,
            layout: self.layout,
            rows,
            padded_len: batch.padded_len,
            lens: &self.row_lens,
            inputs: &self.staged,
        };
        model.run(view, output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_runs_every_request_once_within_its_budgets_and_without_needless_padding() {
        let lens: Vec<u32> = (0..500u32).map(|n| n * 7919 % 250 + 1).collect();
        let tokens = u64::from(lens.iter().sum::<u32>());
        for (layout, order, threads) in [
            (Layout::Padded, Order::Sorted, 2),
            (Layout::Padded, Order::Arrival, 1),
            (Layout::Packed, Order::Sorted, 1),
            (Layout::Packed, Order::Arrival, 2),
        ] {
            let options = Options { requests: 500, threads, layout, order, rows_max: 16, cells_max: 512, rounds: 1 };
            let batches = plan(&lens, &options);
            let mut seen = vec![false; lens.len()];
            for batch in &batches {
                assert!(batch.requests.len() <= 16);
                let longest = batch.requests.iter().map(|request| lens[*request as usize]).max();
                assert_eq!(longest, Some(batch.padded_len));
                let cells = match layout {
                    Layout::Padded => batch.requests.len() as u64 * u64::from(batch.padded_len),
                    Layout::Packed => batch.requests.iter().map(|request| u64::from(lens[*request as usize])).sum(),
                };
                assert_eq!(batch.cells, cells);
                assert!(batch.requests.len() == 1 || cells <= 512);
                for request in &batch.requests {
                    assert!(!std::mem::replace(&mut seen[*request as usize], true));
                }
                if order == Order::Arrival {
                    assert!(batch.requests.is_sorted());
                }
            }
            assert!(seen.into_iter().all(|seen| seen));
            let cells: u64 = batches.iter().map(|batch| batch.cells).sum();
            match (layout, order) {
                (Layout::Packed, _) => assert_eq!(cells, tokens),
                (Layout::Padded, Order::Sorted) => assert!(cells * 10 < tokens * 11, "{cells} for {tokens}"),
                (Layout::Padded, Order::Arrival) => assert!(cells * 10 > tokens * 13, "{cells} for {tokens}"),
            }
        }
    }
}
