//! The production scheduler in virtual time: what a policy would have done with a load.
//!
//! The scheduler is the one that serves; only the clock and the executors are simulated. What comes out is therefore about
//! the decisions, and as good as the service times that it is given.
//!
//! Always true
//! - Equal calls, policy, hardware and seed give equal outcomes. Nothing here reads a clock.
//!
//! Elsewhere: making the load (load/arrivals.rs, load/lengths.rs), deciding (scheduler).

pub mod bound;
pub mod compare;
pub mod described;
pub mod exact;
pub mod gate;
pub mod ledger;
pub mod regret;
pub mod services;
pub mod tail;
pub mod whatif;
pub mod world;

pub use world::{Call, Hardware, Outcome, simulate};
