//! ferry: a dynamic batching inference runtime with its own scheduler.
//!
//! The rooms, in the order data visits them:
//!
//! ```text
//!     client ══▶ frontend ──▶ scheduler ──▶ executor ──▶ scatter ──▶ frontend ══▶ client
//!           wire         admit, wait, seal   pack, run     slice              wire
//! ```
//!
//! 1. A shard ([`frontend`]) reads bytes; [`wire`] turns them into messages, [`contract`] checks them against the model.
//! 2. The request crosses a [`mailbox`] to the [`batcher`] (text goes through [`tokenizers`] first). The [`scheduler`]
//!    admits it or refuses it.
//! 3. It waits in the lane of its bucket until the batch is sealed: full, idle executor, out of time, or draining.
//! 4. The batcher packs the rows into a batch, and an [`executor`] runs the model ([`models`]; encoders by [`kernels`], or on a [`device`]
//!    as [`gpu`] says) on it.
//! 5. [`scatter`] mails the finished batch to the shards that asked; each cuts its rows out and writes them.
//!
//! Beside the path: [`config`], [`import`] (settings of other servers), [`telemetry`], [`timeline`], [`otel`], [`control`], [`learned`],
//! [`trial`], [`shadow`], [`live`], [`clock`], [`vocab`], [`mail`]. [`server`] builds and joins all of it. [`capture`], [`replay`] and
//! [`tune`] run the scheduler again in virtual time. [`client`] and [`load`] are the other end of the wire; the commands are in the binary.
#![deny(unsafe_code)]

pub mod batcher;
pub mod capture;
pub mod client;
pub mod clock;
pub mod config;
pub mod contract;
pub mod control;
pub mod device;
pub mod executor;
pub mod frontend;
pub mod gpu;
pub mod import;
pub mod kernels;
pub mod learned;
pub mod live;
pub mod load;
pub mod mail;
pub mod mailbox;
pub mod models;
pub mod otel;
pub mod replay;
pub mod scatter;
pub mod scheduler;
pub mod server;
pub mod shadow;
pub mod telemetry;
pub mod timeline;
pub mod tokenize;
pub mod tokenizers;
pub mod trial;
pub mod tune;
pub mod vocab;
pub mod wire;
