//! Runs one answered row in a thousand once more, alone, and compares. A mask or an offset that lets one caller's tokens into
//! another's answer gives answers that look right; this notices.
//!
//! Always true
//! - Answers are on their way before a row is run again: nobody waits for it but the next batch.
//! - Allocates nothing once its buffers have grown. A row that failed, or that was alone already, is not looked at.

use super::Executor;
use super::batch::{AlignedBytes, BatchOutput, BatchView};
use crate::contract::Contract;
use crate::vocab::{DType, Layout, ModelHandle};

/// Largest difference between two f32 results of one row, as a share of the larger of them and 1: sums are rounded in another
/// order in another batch, a leak is a thousand times that.
pub const APART: f64 = 1e-3;

/// What came of looking at a batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// No row's turn, or none that can be compared.
    NotLooked,
    Equal,
    /// One element of one output of this row.
    Apart {
        row: u32,
        output: usize,
        element: usize,
        together: f64,
        alone: f64,
    },
}

/// One executor's.
#[derive(Debug, Default)]
pub struct Canary {
    every: u64,
    /// Rows that ran since the last one that was looked at.
    passed: u64,
    turns: u64,
    inputs: Vec<AlignedBytes>,
    output: BatchOutput,
}

impl Canary {
    /// Looks at one row in so many; 0: at none.
    pub fn new(every: u32) -> Canary {
        Canary { every: every.into(), ..Canary::default() }
    }

    /// Looks at a batch that ran. At most one row of it.
    pub fn look(
        &mut self,
        executor: &mut dyn Executor,
        model: ModelHandle,
        batch: BatchView<'_>,
        out: &BatchOutput,
    ) -> Outcome {
        let Some(row) = self.choose(batch) else { return Outcome::NotLooked };
        if out.row_errors.iter().any(|error| error.row == row) {
            return Outcome::NotLooked;
        }
        let len = self.keep(batch, row);
        let ran = self.alone(batch.contract, len, |view, out| executor.run(model, view, out).is_ok());
        if ran { self.compare(batch.contract, out, row, len, APART) } else { Outcome::NotLooked }
    }

    /// Whose turn it is in this batch, if anybody's.
    pub fn choose(&mut self, batch: BatchView<'_>) -> Option<u32> {
        self.passed += u64::from(batch.rows);
        if self.every == 0 || self.passed < self.every {
            return None;
        }
        // More than one can be due where batches are larger than that; one a batch is enough.
        self.passed %= self.every;
        self.turns += 1;
        // A row that nobody can foresee from its place.
        let row = (self.turns.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) % u64::from(batch.rows);
        let len = batch.lens[row as usize];
        let alone = batch.rows == 1 && (batch.layout == Layout::Packed || len == batch.padded_len);
        (!alone).then_some(row as u32)
    }

    /// Copies what the row was made of. Says its length.
    pub fn keep(&mut self, batch: BatchView<'_>, row: u32) -> u32 {
        // Kept for a model with more inputs, when this one has fewer.
        let count = batch.inputs.len();
        if self.inputs.len() < count {
            self.inputs.resize_with(count, AlignedBytes::default);
        }
        for (index, input) in self.inputs[..count].iter_mut().enumerate() {
            let bytes = batch.row::<u8>(index, row as usize);
            input.set_len(bytes.len());
            input.bytes_mut().copy_from_slice(bytes);
        }
        batch.lens[row as usize]
    }

    /// Runs the row that was kept, alone. Says whether it got an answer.
    pub fn alone(
        &mut self,
        contract: &Contract,
        len: u32,
        run: impl FnOnce(BatchView<'_>, &mut BatchOutput) -> bool,
    ) -> bool {
        let lens = [len];
        self.output.prepare(contract, Layout::Padded, &lens, len);
        let view = BatchView {
            contract,
            layout: Layout::Padded,
            rows: 1,
            padded_len: len,
            lens: &lens,
            inputs: &self.inputs[..contract.inputs.len()],
        };
        run(view, &mut self.output) && self.output.row_errors.is_empty()
    }

    /// With what the row was answered in its batch. `allowed`: largest difference, as a share of the larger value and 1.
    pub fn compare(&self, contract: &Contract, out: &BatchOutput, row: u32, len: u32, allowed: f64) -> Outcome {
        for (index, spec) in contract.outputs.iter().enumerate() {
            let together = out.row_bytes(spec, index, row, len);
            let alone = self.output.row_bytes(spec, index, 0, len);
            let size = spec.dtype.size();
            let elements = together.chunks_exact(size).zip(alone.chunks_exact(size));
            for (element, (together, alone)) in elements.enumerate() {
                if let Some((together, alone)) = apart(spec.dtype, together, alone, allowed) {
                    return Outcome::Apart { row, output: index, element, together, alone };
                }
            }
        }
        Outcome::Equal
    }
}

/// Both values of an element, if they are further apart than another order of sums explains. Half precision is not compared.
fn apart(dtype: DType, together: &[u8], alone: &[u8], allowed: f64) -> Option<(f64, f64)> {
    let (together, alone) = match dtype {
        DType::F16 | DType::BF16 => return None,
        DType::F32 => (f64::from(float(together)), f64::from(float(alone))),
        DType::F64 => (double(together), double(alone)),
        _ if together == alone => return None,
        _ => (f64::from(together[0]), f64::from(alone[0])),
    };
    let near = (together - alone).abs() <= allowed * together.abs().max(alone.abs()).max(1.0);
    let exact = !matches!(dtype, DType::F32 | DType::F64);
    let same = near || together == alone || (together.is_nan() && alone.is_nan());
    (exact || !same).then_some((together, alone))
}

fn float(bytes: &[u8]) -> f32 {
    f32::from_le_bytes(bytes.try_into().expect("the dtype's size"))
}

fn double(bytes: &[u8]) -> f64 {
    f64::from_le_bytes(bytes.try_into().expect("the dtype's size"))
}
