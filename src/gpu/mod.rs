//! Our kernels as a host sees them: what each is given, how it is launched, and a plain reference for each.
//!
//! Always true
//! - A launch is made by a constructor that has compared every buffer with the shapes it is used under.
//! - Nothing here talks to a device: a launch is data, and who carries it out (CUDA, a simulated device, an emulation of the
//!   kernels' own source) is the driver's affair.
//!
//! Elsewhere: drivers (device), the kernels themselves (the folder kernels/), the CPU's kernels (src/kernels).

pub mod launch;
pub mod ops;
pub mod reference;
