//! Takes as long as it is told: for tests and demonstrations of batching, queues, deadlines and drain.
//!
//! Always true
//! - A batch takes the longest time among its rows, as a device that runs rows side by side would.
//! - A row's output is its input.
//!
//! Elsewhere: the longest time a caller may ask for (the range in models/sleep/model.toml).

use std::time::Duration;

use crate::contract::{Contract, Dim};
use crate::executor::batch::{BatchOutput, BatchView};
use crate::executor::model::{LoadedModel, Model, ModelError};
use crate::vocab::DType;

pub struct Sleep {
    contract: Contract,
}

impl Sleep {
    pub fn new(contract: Contract) -> Sleep {
        Sleep { contract }
    }
}

/// Longest sleep a manifest may allow. An executor that sleeps is an executor lost.
const MICROS_MAX: i64 = 60_000_000;

/// What the architecture asks of a contract: one u32 per row in and out, and a bound on it.
pub fn check(contract: &Contract) -> Result<(), String> {
    let one = [Dim::Fixed(1)];
    match (&contract.inputs[..], &contract.outputs[..]) {
        ([input], [output])
            if input.dtype == DType::U32 && output.dtype == DType::U32 && input.shape == one && output.shape == one =>
        {
            match input.range {
                Some([_, high]) if high <= MICROS_MAX => Ok(()),
                other => {
                    Err(format!("input {}: expected a range up to at most {MICROS_MAX} µs, got {other:?}", input.name))
                }
            }
        }
        _ => Err("expected one input and one output, both of dtype u32 and shape [1]".into()),
    }
}

impl LoadedModel for Sleep {
    fn contract(&self) -> &Contract {
        &self.contract
    }

    /// Waiting once more would tell nothing.
    fn can_repeat(&self) -> bool {
        false
    }

    fn instantiate(&self) -> Result<Box<dyn Model>, ModelError> {
        Ok(Box::new(Instance))
    }
}

struct Instance;

impl Model for Instance {
    fn run(&mut self, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), ModelError> {
        let micros = batch.input::<u32>(0);
        if let Some(longest) = micros.iter().max() {
            std::thread::sleep(Duration::from_micros(u64::from(*longest)));
        }
        out.output_mut::<u32>(0).copy_from_slice(micros);
        Ok(())
    }
}
