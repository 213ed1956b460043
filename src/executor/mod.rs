//! Runs sealed batches in order: packs rows into staging buffers, runs the model, gives the output to scatter.
//!
//! Always true
//! - Staging buffers move `VacantSlot → FilledSlot → VacantSlot`; there is no way to fill a slot that is in flight.
//! - A panic or an error in a model costs its batch and nothing else.
//!
//! Elsewhere: which rows share a batch (scheduler), who gets which answer (scatter.rs).

pub mod batch;
pub mod canary;
pub mod cpu;
pub mod device;
pub mod model;
pub mod pack;
pub mod sim;
pub mod slot;
pub mod worker;

use crate::vocab::{Code, ModelHandle, Refusal};
use batch::{BatchOutput, BatchView};
use model::ModelError;

/// Why a whole batch has no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What each member is answered.
    pub refusal: Refusal,
    pub panicked: bool,
}

impl Failure {
    pub fn from_model(error: ModelError) -> Failure {
        tracing::error!(%error, "a batch failed");
        // The library's words may hold addresses and paths; they are for the log.
        Failure { refusal: Refusal::new(Code::ExecutorFailed, "the model failed on this batch"), panicked: false }
    }
}

/// Runs packed batches, one at a time, on whatever it stands for: a core, a CUDA stream, a simulated device.
pub trait Executor: Send {
    /// Computes `batch` into `out`, which is prepared for it. On `Err` the content of `out` is ignored.
    fn run(&mut self, model: ModelHandle, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), Failure>;
}

#[cfg(test)]
mod tests;
