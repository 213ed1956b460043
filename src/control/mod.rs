//! The other port: what state the server is in, and what operators ask of it.
//!
//! Always true
//! - Nothing here is on the way of a request. A caller of the control port costs the control thread's time, in
//!   bounded amounts, and reads atomics; no lock is shared with the data path. Only what policies and decisions are is
//!   asked of the batcher: bounded copies, a bounded number of times per second, through its mailbox.

pub mod admin;
pub mod auth;
mod capture;
pub mod dashboard;
mod insight;
pub mod lifecycle;
mod listener;
mod origin;
mod policy;
mod recorder;
mod shadow;
mod trial;
