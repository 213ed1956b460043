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
// `device` alone may allow it, file by file. The others cannot, whatever they write: a lint that is forbidden is not allowed again.
#![deny(unsafe_code)]

#[forbid(unsafe_code)]
pub mod access;
#[forbid(unsafe_code)]
pub mod batcher;
#[forbid(unsafe_code)]
pub mod capture;
#[forbid(unsafe_code)]
pub mod client;
#[forbid(unsafe_code)]
pub mod clock;
#[forbid(unsafe_code)]
pub mod config;
#[forbid(unsafe_code)]
pub mod contract;
#[forbid(unsafe_code)]
pub mod control;
pub mod device;
#[forbid(unsafe_code)]
pub mod executor;
#[forbid(unsafe_code)]
pub mod frontend;
#[forbid(unsafe_code)]
pub mod gpu;
#[forbid(unsafe_code)]
pub mod import;
#[forbid(unsafe_code)]
pub mod kernels;
#[forbid(unsafe_code)]
pub mod learned;
#[forbid(unsafe_code)]
pub mod live;
#[forbid(unsafe_code)]
pub mod load;
#[forbid(unsafe_code)]
pub mod mail;
#[forbid(unsafe_code)]
pub mod mailbox;
#[forbid(unsafe_code)]
pub mod models;
#[forbid(unsafe_code)]
pub mod otel;
#[forbid(unsafe_code)]
pub mod quota;
#[forbid(unsafe_code)]
pub mod replay;
#[forbid(unsafe_code)]
pub mod scatter;
#[forbid(unsafe_code)]
pub mod scheduler;
#[forbid(unsafe_code)]
pub mod server;
#[forbid(unsafe_code)]
pub mod shadow;
#[forbid(unsafe_code)]
pub mod telemetry;
#[forbid(unsafe_code)]
pub mod tenants;
#[forbid(unsafe_code)]
pub mod timeline;
#[forbid(unsafe_code)]
pub mod tls;
#[forbid(unsafe_code)]
pub mod tokenize;
#[forbid(unsafe_code)]
pub mod tokenizers;
#[forbid(unsafe_code)]
pub mod trial;
#[forbid(unsafe_code)]
pub mod tune;
#[forbid(unsafe_code)]
pub mod vocab;
#[forbid(unsafe_code)]
pub mod wire;
