//! NVIDIA GPUs, through CUDA's driver. Only with the feature `cuda`.
//!
//! Always true
//! - One context for each GPU, three streams for each executor. cudarc's own event tracking is off: what orders the streams are the
//!   events of gpu/slot.rs, and the simulated device proves that they suffice.
//! - A fault says whether the device can still be used. One that cannot is never asked again (executor/device.rs).
//!
//! Elsewhere: what a kernel is given and its plain reference (gpu), the kernels' source (the folder kernels/), how they are compiled
//! (build.rs).

mod driver;
mod memory;
pub mod probe;
mod products;

pub use driver::{CudaDriver, Gpu};
pub use memory::{CudaEvent, CudaMemory};

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::gpu::driver::Fault;

/// The kernels of this build.
pub mod modules {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// What the driver's error means for what comes after it.
///
/// The list is that of the driver's own documentation: errors after which "the process must be terminated and relaunched" or that
/// say the same in other words (CUDA driver API, CUresult).
fn fault(error: DriverError) -> Fault {
    use CUresult::*;
    let text = format!("{:?}", error.0);
    match error.0 {
        CUDA_ERROR_OUT_OF_MEMORY => Fault::OutOfMemory { bytes: 0 },
        CUDA_ERROR_ILLEGAL_ADDRESS
        | CUDA_ERROR_LAUNCH_TIMEOUT
        | CUDA_ERROR_ASSERT
        | CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUDA_ERROR_MISALIGNED_ADDRESS
        | CUDA_ERROR_INVALID_ADDRESS_SPACE
        | CUDA_ERROR_INVALID_PC
        | CUDA_ERROR_LAUNCH_FAILED
        | CUDA_ERROR_CONTEXT_IS_DESTROYED
        | CUDA_ERROR_DEINITIALIZED
        | CUDA_ERROR_ECC_UNCORRECTABLE
        | CUDA_ERROR_NVLINK_UNCORRECTABLE
        | CUDA_ERROR_DEVICE_UNAVAILABLE
        | CUDA_ERROR_EXTERNAL_DEVICE
        | CUDA_ERROR_MPS_CLIENT_TERMINATED
        | CUDA_ERROR_UNKNOWN => Fault::Lost(text),
        _ => Fault::Refused(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_the_context_is_told_from_what_does_not() {
        let of = |result| fault(DriverError(result));
        assert!(of(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS).is_lost());
        assert!(of(CUresult::CUDA_ERROR_ASSERT).is_lost());
        assert!(!of(CUresult::CUDA_ERROR_INVALID_VALUE).is_lost());
        assert_eq!(of(CUresult::CUDA_ERROR_OUT_OF_MEMORY), Fault::OutOfMemory { bytes: 0 });
    }
}
