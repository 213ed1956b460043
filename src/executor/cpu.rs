//! The executor that needs no device: model instances on the thread that calls it.
//!
//! Always true
//! - A panic inside a model ends in an error for its batch; the instance that panicked is thrown away.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::vocab::{Code, ModelHandle};

use super::batch::{BatchOutput, BatchView};
use super::model::{LoadedModel, Model, ModelError};
use super::{Executor, Failure};

/// One executor's instances of all models.
pub struct CpuExecutor {
    loaded: Vec<Arc<dyn LoadedModel>>,
    instances: Vec<Option<Box<dyn Model>>>,
    rebuilt: u32,
}

impl CpuExecutor {
    /// Makes one instance of each model that is `mine`.
    pub fn new(loaded: Vec<Arc<dyn LoadedModel>>, mine: &[bool]) -> Result<CpuExecutor, ModelError> {
        let instances = loaded
            .iter()
            .zip(mine)
            .map(|(model, mine)| mine.then(|| model.instantiate()).transpose())
            .collect::<Result<_, _>>()?;
        Ok(CpuExecutor { loaded, instances, rebuilt: 0 })
    }
}

impl Executor for CpuExecutor {
    fn run(&mut self, model: ModelHandle, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), Failure> {
        let at = model.index();
        let instance = match &mut self.instances[at] {
            Some(instance) => instance,
            // Thrown away after a panic, with all that it kept: built again before the next run.
            empty => {
                let instance = build(&*self.loaded[at])?;
                self.rebuilt += 1;
                empty.insert(instance)
            }
        };
        match catch_unwind(AssertUnwindSafe(|| instance.run(batch, out))) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Failure::from_model(error)),
            Err(panic) => {
                tracing::error!(model = batch.contract.name, panic = panic_text(&panic), "a model panicked");
                let instance = self.instances[at].take();
                // What a panic left half done may panic once more when it is dropped.
                if catch_unwind(AssertUnwindSafe(|| drop((instance, panic)))).is_err() {
                    tracing::error!(model = batch.contract.name, "what the panic left behind panicked as well");
                }
                Err(Failure {
                    panicked: true,
                    ..Failure::of_member(Code::ExecutorFailed, "the model panicked on this batch")
                })
            }
        }
    }

    fn take_rebuilt(&mut self) -> u32 {
        std::mem::take(&mut self.rebuilt)
    }
}

/// A panic while a model is built is one more way in which it cannot be.
fn build(model: &dyn LoadedModel) -> Result<Box<dyn Model>, Failure> {
    catch_unwind(AssertUnwindSafe(|| model.instantiate()))
        .unwrap_or_else(|panic| Err(ModelError(format!("panicked: {}", panic_text(&panic)))))
        .map_err(Failure::from_building)
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
