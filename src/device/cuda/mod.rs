//! NVIDIA GPUs, through CUDA's driver. Only with the feature `cuda`.
//!
//! Elsewhere: what a kernel is given and its plain reference (gpu), the kernels' source (the folder kernels/), how they are compiled
//! (build.rs).

pub mod probe;

/// The kernels of this build.
pub mod modules {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}
