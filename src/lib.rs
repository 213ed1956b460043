//! ferry: a dynamic batching inference runtime with its own scheduler.
#![deny(unsafe_code)]

pub mod batcher;
pub mod client;
pub mod clock;
pub mod config;
pub mod contract;
pub mod control;
pub mod executor;
pub mod frontend;
pub mod load;
pub mod mail;
pub mod mailbox;
pub mod models;
pub mod scatter;
pub mod scheduler;
pub mod telemetry;
pub mod tokenize;
pub mod vocab;
pub mod wire;
