//! A simulated device for tests: delays on request, fails on demand, and poisons what has been freed.
//!
//! Always true
//! - It computes the identity: output `i` is input `i`. So a row that reaches a wrong caller, a byte that was padding,
//!   or memory that was reused too early is seen in the answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::vocab::{Code, ModelHandle};

use super::batch::{BatchOutput, BatchView};
use super::{Executor, Failure};

/// What the next batches meet. Shared with the test that turns the knobs.
#[derive(Debug, Default)]
pub struct Faults {
    /// Microseconds each batch takes.
    pub delay_us: AtomicU64,
    /// This many batches fail from now on.
    pub failures: AtomicU64,
    /// Batches seen.
    pub batches: AtomicU64,
}

/// Rows whose first four bytes are one of these fail, with whatever runs beside them: as an error, a panic, or for memory.
pub const POISONED: [[u8; 4]; 3] = [*b"\x21err", *b"\x21pan", *b"\x21mem"];

/// How a poisoned row fails, by its place in [`POISONED`].
fn poison_of(batch: &BatchView<'_>) -> Option<Failure> {
    let place = |row| {
        let first = batch.row::<u8>(0, row).first_chunk::<4>()?;
        POISONED.iter().position(|poison| poison == first)
    };
    let place = (0..batch.lens.len()).find_map(place)?;
    let code = if place == 2 { Code::OutOfMemory } else { Code::ExecutorFailed };
    Some(Failure { panicked: place == 1, ..Failure::of_member(code, "a row is poisoned") })
}

/// The byte that a freed device buffer is filled with.
pub const POISON: u8 = 0xDB;

pub struct SimExecutor {
    faults: Arc<Faults>,
    /// "Device memory": inputs are uploaded here, read back from here, then poisoned.
    device: Vec<Vec<u8>>,
}

impl SimExecutor {
    pub fn new(faults: Arc<Faults>) -> SimExecutor {
        SimExecutor { faults, device: Vec::new() }
    }
}

impl Executor for SimExecutor {
    fn run(&mut self, _model: ModelHandle, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), Failure> {
        self.faults.batches.fetch_add(1, Ordering::Relaxed);
        self.device.resize_with(batch.inputs.len(), Vec::new);
        for (buffer, input) in self.device.iter_mut().zip(batch.inputs) {
            buffer.clear();
            buffer.extend_from_slice(input.bytes());
        }
        let delay = self.faults.delay_us.load(Ordering::Relaxed);
        if delay > 0 {
            std::thread::sleep(Duration::from_micros(delay));
        }
        let fails =
            self.faults.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok();
        let poison = poison_of(&batch);
        if !fails && poison.is_none() {
            for (output, buffer) in out.outputs.iter_mut().zip(&self.device) {
                output.bytes_mut().copy_from_slice(buffer);
            }
        }
        self.device.iter_mut().for_each(|buffer| buffer.fill(POISON));
        match fails {
            true => Err(Failure::of_member(Code::ExecutorFailed, "failed on demand")),
            false => poison.map_or(Ok(()), Err),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{Contract, Dim, NonFinite, TensorSpec};
    use crate::executor::batch::AlignedBytes;
    use crate::vocab::{DType, Layout};

    #[test]
    fn what_a_batch_leaves_on_the_device_is_poisoned() {
        let spec = TensorSpec {
            name: "x".into(),
            dtype: DType::U8,
            shape: vec![Dim::Fixed(4)],
            pad: 0.0,
            range: None,
            nonfinite: NonFinite::Refuse,
        };
        let contract = Contract {
            name: "x".into(),
            version: "1".into(),
            architecture: "identity".into(),
            inputs: vec![spec.clone()],
            outputs: vec![spec],
            length: None,
            text: None,
            rows_max: 1,
        };
        let mut input = AlignedBytes::default();
        input.set_len(4);
        input.bytes_mut().copy_from_slice(b"mine");
        let mut output = BatchOutput::default();
        output.prepare(&contract, Layout::Padded, &[1], 1);
        let mut device = SimExecutor::new(Arc::default());
        let view = BatchView {
            contract: &contract,
            layout: Layout::Padded,
            rows: 1,
            padded_len: 1,
            lens: &[1],
            inputs: &[input],
        };
        device.run(ModelHandle(0), view, &mut output).expect("no fault was ordered");
        assert_eq!(output.outputs[0].bytes(), b"mine");
        assert_eq!(device.device, [vec![POISON; 4]]);
    }
}
