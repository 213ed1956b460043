//! ferry: a dynamic batching inference runtime with its own scheduler.
#![deny(unsafe_code)]

pub mod clock;
pub mod config;
pub mod contract;
pub mod executor;
pub mod telemetry;
pub mod vocab;
pub mod wire;
