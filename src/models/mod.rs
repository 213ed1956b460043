//! The architectures, one file each, and the repository of manifests and weights they are loaded from.
//!
//! Always true
//! - A model that was loaded fits its manifest: tensors matched by name and shape, contract fit for the architecture.
//! - Instances share their weights and nothing else.
//!
//! Elsewhere: what a model is to an executor (executor/model.rs), what a caller may send (contract.rs).

pub mod bert;
pub mod digits;
pub mod echo;
pub mod faulty;
pub mod manifest;
pub mod repository;
pub mod sleep;
pub mod weights;
pub mod witness;

use candle_core::{Storage, Tensor};

use crate::executor::model::ModelError;

/// Copies a result to where the executor wants it.
///
/// Straight from the tensor's memory where that is on the host and contiguous: `to_vec1` would copy once more.
fn write_f32(result: &Tensor, out: &mut [f32]) -> Result<(), ModelError> {
    let (storage, layout) = result.storage_and_layout();
    if let (Storage::Cpu(host), Some((start, end))) = (&*storage, layout.contiguous_offsets()) {
        return copy_all(&host.as_slice::<f32>()?[start..end], out);
    }
    drop(storage);
    copy_all(&result.flatten_all()?.to_vec1()?, out)
}

fn copy_all(values: &[f32], out: &mut [f32]) -> Result<(), ModelError> {
    if values.len() != out.len() {
        return Err(ModelError(format!("expected {} output elements, the model made {}", out.len(), values.len())));
    }
    out.copy_from_slice(values);
    Ok(())
}
