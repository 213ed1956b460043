//! The proof that nothing is lost: the real binary behind a proxy that damages the stream, killed, stopped and drained under
//! load, while callers write down what they were told and a model writes down what it was given (RELIABILITY: "History checker").
//!
//! Every test is short as it stands. `FERRY_LONG=1` makes the same tests long, and `tools/faults` runs them so and prints what
//! came of each case; `tests/faults.toml` says which case is whose.
//!
//! Always true
//! - Whatever is random comes from a seed, which a failure names.
//! - What is promised is compared, not how fast: figures are printed.

mod common;

#[path = "chaos/caller.rs"]
mod caller;
#[path = "chaos/controls.rs"]
mod controls;
#[path = "chaos/first.rs"]
mod first;
#[path = "chaos/history.rs"]
mod history;
#[path = "chaos/map.rs"]
mod map;
#[path = "chaos/proxy.rs"]
mod proxy;
#[path = "chaos/replicas.rs"]
mod replicas;
#[path = "chaos/signals.rs"]
mod signals;
#[path = "chaos/slope.rs"]
mod slope;
#[path = "chaos/streams.rs"]
mod streams;
