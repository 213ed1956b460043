//! What only the hardware's own instructions can do: every `unsafe` block of the program is in this room, each with its reason.
//!
//! Elsewhere: everything that gets by with safe wrappers of others (kernels), what is asked of a device (gpu).

pub mod check;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod sim;
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
pub mod vnni;
