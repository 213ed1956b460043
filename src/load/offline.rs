//! The bound: executors alone, all requests there at once, the best packing that is known. What a server reaches of it is
//! what batching, queueing and the wire leave over.
//!
//! Always true
//! - Every request runs exactly once; batches respect the model's row and cell limits.
//! - Threads take batches from one list, longest first, so that they end together.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::Serialize;

use super::payload::Inputs;
use crate::clock;
use crate::contract::Contract;
use crate::executor::batch::{AlignedBytes, BatchOutput, BatchView};
use crate::executor::model::{LoadedModel, ModelError};
use crate::executor::pack::pack_rows;
use crate::vocab::Layout;

/// What to run.
pub struct Options {
    pub requests: usize,
    pub threads: usize,
    pub rows_max: u32,
    pub cells_max: u64,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct OfflineReport {
    pub model: String,
    pub layout: String,
    pub threads: usize,
    pub requests: usize,
    pub batches: usize,
    pub duration_s: f64,
    pub rows_per_s: f64,
    pub tokens_per_s: f64,
    pub padding_waste: f64,
    pub batch_rows_mean: f64,
}

/// Requests of one batch, by their number, and the length they are padded to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    pub requests: Vec<u32>,
    pub padded_len: u32,
}

/// Sorted by length and cut where a budget is full. Some best partition of a fixed set is contiguous in length
/// (SCHEDULER's exchange argument); cutting greedily from the longest differs from it by less than a batch.
pub fn plan(lens: &[u32], rows_max: u32, cells_max: u64) -> Vec<Planned> {
    let mut order: Vec<u32> = (0..lens.len() as u32).collect();
    order.sort_by_key(|request| std::cmp::Reverse(lens[*request as usize]));
    let mut batches: Vec<Planned> = Vec::new();
    for request in order {
        let len = lens[request as usize];
        match batches.last_mut() {
            Some(batch)
                if (batch.requests.len() as u32) < rows_max
                    && (batch.requests.len() as u64 + 1) * u64::from(batch.padded_len) <= cells_max =>
            {
                batch.requests.push(request);
            }
            _ => batches.push(Planned { requests: vec![request], padded_len: len }),
        }
    }
    batches
}

/// Packs and runs everything; `progress` is told of each finished batch.
pub fn run(
    model: &Arc<dyn LoadedModel>,
    inputs: &Inputs,
    options: &Options,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<OfflineReport, ModelError> {
    let contract = model.contract();
    let lens: Vec<u32> =
        (0..options.requests).map(|request| inputs.entry(inputs.of_request(request as u64)).len).collect();
    let batches = plan(&lens, options.rows_max, options.cells_max);
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<ModelError>> = Mutex::new(None);
    // Each thread makes and warms its instance before the clock starts.
    let barrier = std::sync::Barrier::new(options.threads + 1);
    let mut duration = Duration::ZERO;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..options.threads)
            .map(|_| {
                scope.spawn(|| {
                    let instance = model.instantiate();
                    let mut runner = Runner { contract, inputs, lens: &lens, staged: Vec::new(), row_lens: Vec::new() };
                    let mut output = BatchOutput::default();
                    let mut work = instance.map_err(Some).and_then(|mut instance| {
                        let warm = batches.iter().take(1).chain(batches.iter().rev().take(1));
                        for batch in warm {
                            runner.run(&mut *instance, batch, &mut output).map_err(Some)?;
                        }
                        Ok(instance)
                    });
                    barrier.wait();
                    while let Ok(instance) = &mut work {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(batch) = batches.get(at) else { break };
                        match runner.run(&mut **instance, batch, &mut output) {
                            Ok(()) => progress(at + 1, batches.len()),
                            Err(error) => work = Err(Some(error)),
                        }
                    }
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
    if let Some(error) = failed.into_inner().expect("nothing panics while it holds this") {
        return Err(error);
    }
    let tokens: u64 = lens.iter().map(|len| u64::from(*len)).sum();
    let cells: u64 = batches.iter().map(|batch| batch.requests.len() as u64 * u64::from(batch.padded_len)).sum();
    let seconds = duration.as_secs_f64();
    Ok(OfflineReport {
        model: contract.name.clone(),
        layout: "padded".into(),
        threads: options.threads,
        requests: options.requests,
        batches: batches.len(),
        duration_s: seconds,
        rows_per_s: options.requests as f64 / seconds,
        tokens_per_s: tokens as f64 / seconds,
        padding_waste: 1.0 - tokens as f64 / cells.max(1) as f64,
        batch_rows_mean: options.requests as f64 / batches.len().max(1) as f64,
    })
}

struct Runner<'a> {
    contract: &'a Contract,
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
            let stride = spec.row_bytes(batch.padded_len);
            let pad = spec.pad_bytes();
            let staged = &mut self.staged[index];
            staged.set_len(rows as usize * stride);
            for (request, place) in batch.requests.iter().zip(staged.bytes_mut().chunks_exact_mut(stride)) {
                let len = self.lens[*request as usize];
                let payload = self.inputs.payload(self.inputs.of_request(u64::from(*request)));
                let offset = self.contract.input_offset(index, 1, len);
                let row_bytes = spec.row_bytes(len);
                pack_rows(&payload[offset..offset + row_bytes], row_bytes, stride, &pad, place);
            }
        }
        output.prepare(self.contract, Layout::Padded, &self.row_lens, batch.padded_len);
        let view = BatchView {
            contract: self.contract,
            layout: Layout::Padded,
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
        let batches = plan(&lens, 16, 512);
        let mut seen = vec![false; lens.len()];
        for batch in &batches {
            assert!(batch.requests.len() <= 16);
            assert!(batch.requests.len() == 1 || batch.requests.len() as u64 * u64::from(batch.padded_len) <= 512);
            for request in &batch.requests {
                assert!(!std::mem::replace(&mut seen[*request as usize], true));
                assert!(lens[*request as usize] <= batch.padded_len);
            }
            assert_eq!(batch.requests.iter().map(|r| lens[*r as usize]).max(), Some(batch.padded_len));
        }
        assert!(seen.into_iter().all(|seen| seen));
    }
}
