//! The executor that needs no device: model instances on the thread that calls it.
//!
//! Always true
//! - A panic inside a model ends in an error for its batch; the instance that panicked is thrown away.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::vocab::{Code, ModelHandle, Refusal};

use super::batch::{BatchOutput, BatchView};
use super::model::{LoadedModel, Model, ModelError};
use super::{Executor, Failure};

/// One executor's instances of all models.
pub struct CpuExecutor {
    loaded: Vec<Arc<dyn LoadedModel>>,
    instances: Vec<Option<Box<dyn Model>>>,
}

impl CpuExecutor {
    /// Makes one instance of each model that is `mine`.
    pub fn new(loaded: Vec<Arc<dyn LoadedModel>>, mine: &[bool]) -> Result<CpuExecutor, ModelError> {
        let instances = loaded
            .iter()
            .zip(mine)
            .map(|(model, mine)| mine.then(|| model.instantiate()).transpose())
            .collect::<Result<_, _>>()?;
        Ok(CpuExecutor { loaded, instances })
    }
}

impl Executor for CpuExecutor {
    fn run(&mut self, model: ModelHandle, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), Failure> {
        let at = model.index();
        let instance = match &mut self.instances[at] {
            Some(instance) => instance,
            // Thrown away after a panic: build it again before the next batch needs it.
            empty => empty.insert(self.loaded[at].instantiate().map_err(Failure::from_model)?),
        };
        match catch_unwind(AssertUnwindSafe(|| instance.run(batch, out))) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Failure::from_model(error)),
            Err(panic) => {
                self.instances[at] = None;
                tracing::error!(model = batch.contract.name, panic = panic_text(&panic), "a model panicked");
                Err(Failure {
                    refusal: Refusal::new(Code::ExecutorFailed, "the model panicked on this batch"),
                    panicked: true,
                })
            }
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
