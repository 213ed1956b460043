//! A model, as executors see it.

use super::batch::{BatchOutput, BatchView};
use super::device::Program;
use crate::contract::Contract;
use crate::vocab::Layout;

/// A batch that could not be run. Its members run again in parts, until the one stands alone that cannot be run: that one is answered
/// `executor_failed`. The sentence is for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelError(pub String);

impl std::fmt::Display for ModelError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ModelError {}

impl From<candle_core::Error> for ModelError {
    fn from(error: candle_core::Error) -> ModelError {
        ModelError(error.to_string())
    }
}

/// One instance of a model: what it computes on a batch. Owned by one executor, so `run` may keep scratch buffers.
pub trait Model: Send {
    /// Computes the batch. `out` has been prepared for it: every output is `[rows, …]`, at the padded length or end to end
    /// as the inputs are, with arbitrary content that `run` must overwrite. A row that fails alone goes into `out.row_errors`.
    ///
    /// May panic: the executor catches it and builds a new instance before the next run. As after an error, the members of the batch
    /// run again in parts.
    fn run(&mut self, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), ModelError>;
}

/// A loaded model: its contract, and how to make an instance. Weights are shared by all instances.
pub trait LoadedModel: Send + Sync {
    fn contract(&self) -> &Contract;

    /// Makes an instance. Called once per executor at start, and again after a panic.
    fn instantiate(&self) -> Result<Box<dyn Model>, ModelError>;

    /// The same row always gets the same answer, at a cost that may be spent once more to check it.
    fn can_repeat(&self) -> bool {
        true
    }

    /// How the rows of a batch may lie.
    fn layouts(&self) -> &'static [Layout] {
        &[Layout::Padded]
    }

    /// What it computes on a device, where it was loaded for one.
    fn program(&self) -> Option<Program<Vec<f32>>> {
        None
    }

    /// Floating point operations that one row of this length needs, a multiplication and an addition counting as two. None
    /// where the model does not say.
    fn operations(&self, _len: u32) -> Option<f64> {
        None
    }

    /// Bytes of shared weights held in memory.
    fn weight_bytes(&self) -> u64 {
        0
    }
}
