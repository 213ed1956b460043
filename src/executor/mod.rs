//! Runs sealed batches in order: packs rows into staging buffers, runs the model, gives the output to scatter.
//!
//! Always true
//! - Staging buffers move `VacantSlot → FilledSlot → VacantSlot`; there is no way to fill a slot that is in flight.
//! - A panic or an error in a model costs the request that caused it: its mates run again without it.
//!
//! Elsewhere: which rows share a batch (scheduler), who gets which answer (scatter.rs).

pub mod batch;
pub mod bisect;
pub mod canary;
pub mod cpu;
pub mod device;
pub mod fence;
pub mod isolation;
pub mod model;
pub mod pack;
pub mod sim;
pub mod slot;
pub mod warm;
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
    pub blame: Blame,
}

/// Whose fault a failure may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// A member's: the others may run without it.
    Member,
    /// The executor's: it would fail on any batch.
    Executor,
}

impl Failure {
    pub fn of_member(code: Code, message: &str) -> Failure {
        Failure { refusal: Refusal::new(code, message), panicked: false, blame: Blame::Member }
    }

    /// The model returned an error.
    pub fn from_model(error: ModelError) -> Failure {
        tracing::error!(%error, "a batch failed");
        // The library's words may hold addresses and paths; they are for the log.
        Failure::of_member(Code::ExecutorFailed, "the model failed on this batch")
    }

    /// The model could not be built again.
    pub fn from_building(error: ModelError) -> Failure {
        tracing::error!(%error, "a model cannot be built again after its panic");
        let refusal = Refusal::new(Code::ExecutorFailed, "the model could not be built again after its panic");
        Failure { refusal, panicked: false, blame: Blame::Executor }
    }
}

/// Runs packed batches, one at a time, on whatever it stands for: a core, a CUDA stream, a simulated device.
pub trait Executor: Send {
    /// Computes `batch` into `out`, which is prepared for it. On `Err` the content of `out` is ignored.
    fn run(&mut self, model: ModelHandle, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), Failure>;

    /// Models that were built again after a panic, since it was last asked.
    fn take_rebuilt(&mut self) -> u32 {
        0
    }
}

#[cfg(test)]
mod tests;
