//! Returns its input: the null model, by which the path itself is measured and tested.
//!
//! Always true
//! - Output i is input i, byte for byte, padding included; so a mistake of packing or scattering cannot hide.

use crate::contract::Contract;
use crate::executor::batch::{BatchOutput, BatchView};
use crate::executor::model::{LoadedModel, Model, ModelError};
use crate::vocab::Layout;

pub struct Echo {
    contract: Contract,
}

impl Echo {
    pub fn new(contract: Contract) -> Echo {
        Echo { contract }
    }
}

/// What the architecture asks of a contract: as many outputs as inputs, each of the same dtype and shape.
pub fn check(contract: &Contract) -> Result<(), String> {
    if contract.inputs.len() != contract.outputs.len() {
        return Err(format!(
            "expected as many outputs as inputs, got {} and {}",
            contract.outputs.len(),
            contract.inputs.len()
        ));
    }
    match contract.inputs.iter().zip(&contract.outputs).find(|(i, o)| i.dtype != o.dtype || i.shape != o.shape) {
        None => Ok(()),
        Some((input, output)) => Err(format!(
            "expected output {} to have the dtype and shape of input {}, for it is returned as it came",
            output.name, input.name
        )),
    }
}

impl LoadedModel for Echo {
    fn contract(&self) -> &Contract {
        &self.contract
    }

    fn layouts(&self) -> &'static [Layout] {
        &[Layout::Padded, Layout::Packed]
    }

    fn instantiate(&self) -> Result<Box<dyn Model>, ModelError> {
        Ok(Box::new(Instance))
    }
}

struct Instance;

impl Model for Instance {
    fn run(&mut self, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), ModelError> {
        for (input, output) in batch.inputs.iter().zip(&mut out.outputs) {
            output.bytes_mut().copy_from_slice(input.bytes());
        }
        Ok(())
    }
}
