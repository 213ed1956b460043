//! The other port: what state the server is in, and what operators ask of it.
//!
//! Always true
//! - Nothing here is on the way of a request. A caller of the control port costs the control thread's time, in
//!   bounded amounts, and reads atomics; no lock is shared with the data path.

pub mod admin;
pub mod lifecycle;
