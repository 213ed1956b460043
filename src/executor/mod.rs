//! Runs sealed batches in order: packs rows into staging buffers, runs the model, gives the output to scatter.
//!
//! Always true
//! - Staging buffers move `VacantSlot → FilledSlot → VacantSlot`; there is no way to fill a slot that is in flight.
//! - A panic or an error in a model costs its batch and nothing else.
//!
//! Elsewhere: which rows share a batch (scheduler), who gets which answer (scatter.rs).

pub mod batch;
pub mod model;
