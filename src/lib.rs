//! ferry: a dynamic batching inference runtime with its own scheduler.
#![deny(unsafe_code)]

pub mod clock;
pub mod contract;
pub mod executor;
pub mod scheduler;
pub mod vocab;
pub mod wire;
