//! Fails in the way it is told: the model by which faults are tested. No manifest in models/ names it.
//!
//! Each row says what happens, and the worst of the batch happens to the batch:
//! - 1 panics;
//! - 2 returns an error;
//! - 3 answers NaN for that row alone;
//! - 0 answers 0, and n from 4 up answers n after sleeping n milliseconds (the longest of its mates, once).

use std::time::Duration;

use crate::contract::{Contract, Dim};
use crate::executor::batch::{BatchOutput, BatchView};
use crate::executor::model::{LoadedModel, Model, ModelError};
use crate::vocab::DType;

const PANIC: u32 = 1;
const ERROR: u32 = 2;
const NAN: u32 = 3;

pub struct Faulty {
    contract: Contract,
}

impl Faulty {
    pub fn new(contract: Contract) -> Faulty {
        Faulty { contract }
    }
}

/// What the architecture asks of a contract: one u32 per row in, one f32 out (an integer could not be NaN).
pub fn check(contract: &Contract) -> Result<(), String> {
    let one = [Dim::Fixed(1)];
    match (&contract.inputs[..], &contract.outputs[..]) {
        ([input], [output])
            if input.dtype == DType::U32 && output.dtype == DType::F32 && input.shape == one && output.shape == one =>
        {
            Ok(())
        }
        _ => Err("expected one input of dtype u32 and one output of dtype f32, both of shape [1]".into()),
    }
}

impl LoadedModel for Faulty {
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
        let behaviours = batch.input::<u32>(0);
        if let Some(row) = behaviours.iter().position(|behaviour| *behaviour == PANIC) {
            panic!("row {row} asked for a panic");
        }
        if let Some(row) = behaviours.iter().position(|behaviour| *behaviour == ERROR) {
            return Err(ModelError(format!("row {row} asked for an error")));
        }
        let longest = behaviours.iter().copied().filter(|behaviour| *behaviour > NAN).max().unwrap_or(0);
        std::thread::sleep(Duration::from_millis(u64::from(longest)));
        for (behaviour, answer) in behaviours.iter().zip(out.output_mut::<f32>(0)) {
            *answer = if *behaviour == NAN { f32::NAN } else { *behaviour as f32 };
        }
        Ok(())
    }
}
