//! Which GPUs there are, asked without making a context on any.
//!
//! Always true
//! - Where there is no GPU, no driver or no library the answer is a sentence. Nothing panics.

#![allow(unsafe_code)]

use cudarc::driver::result::{self, DriverError, device};
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

/// A GPU as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// As in `cuda:0`: among those that CUDA_VISIBLE_DEVICES leaves.
    pub ordinal: usize,
    pub name: String,
    pub memory_bytes: u64,
    /// Compute capability: major and minor.
    pub capability: (u32, u32),
    pub multiprocessors: u32,
    /// The newest CUDA that the driver speaks: major and minor.
    pub driver_version: (u32, u32),
}

/// All GPUs that this process may use: at least one, or why there is none.
pub fn probe() -> Result<Vec<GpuInfo>, String> {
    // cudarc panics where it calls what it cannot load.
    if !driver_is_there() {
        return Err("no GPU: the CUDA driver library libcuda.so.1 was not found".to_owned());
    }
    result::init().map_err(no_gpu)?;
    let driver_version = driver_version().map_err(no_gpu)?;
    let count = device::get_count().map_err(no_gpu)?;
    if count <= 0 {
        return Err(no_gpu(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)));
    }
    let describe = |ordinal| describe(ordinal, driver_version);
    (0..count).map(|ordinal| describe(ordinal).map_err(|error| format!("GPU {ordinal}: {}", named(error)))).collect()
}

fn describe(ordinal: i32, driver_version: (u32, u32)) -> Result<GpuInfo, DriverError> {
    let gpu = device::get(ordinal)?;
    let attribute = |which| {
        // SAFETY: `gpu` is a device that `device::get` returned above, which is all that is asked for.
        unsafe { device::get_attribute(gpu, which) }.map(|value| value.max(0) as u32)
    };
    Ok(GpuInfo {
        ordinal: ordinal as usize,
        name: device::get_name(gpu)?,
        // SAFETY: as above.
        memory_bytes: unsafe { device::total_mem(gpu) }? as u64,
        capability: (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        driver_version,
    })
}

fn driver_version() -> Result<(u32, u32), DriverError> {
    let mut version = 0;
    // SAFETY: writes one integer to where it is told, and `version` is one.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    let version = version.max(0) as u32;
    Ok((version / 1000, version % 1000 / 10))
}

/// The sentence for a driver that does not start.
fn no_gpu(error: DriverError) -> String {
    let hidden = match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(value) => format!(" (CUDA_VISIBLE_DEVICES is \"{value}\")"),
        Err(_) => String::new(),
    };
    match error.0 {
        CUresult::CUDA_ERROR_STUB_LIBRARY => "no GPU: libcuda.so.1 is a stub that NVIDIA has for linking".to_owned(),
        CUresult::CUDA_ERROR_NO_DEVICE => format!("no GPU: the CUDA driver finds no device{hidden}"),
        CUresult::CUDA_ERROR_INVALID_DEVICE => format!("no GPU: the CUDA driver refuses the devices asked for{hidden}"),
        _ => format!("no GPU: the CUDA driver does not start: {}{hidden}", named(error)),
    }
}

/// An error's name and what the driver says of it.
fn named(error: DriverError) -> String {
    let text = |text: Result<&std::ffi::CStr, DriverError>| {
        text.map_or(String::new(), |text| text.to_string_lossy().into_owned())
    };
    match (text(error.error_name()), text(error.error_string())) {
        (name, _) if name.is_empty() => format!("{:?}", error.0),
        (name, meaning) => format!("{name}, {meaning}"),
    }
}

/// The CUDA driver can be loaded.
fn driver_is_there() -> bool {
    // SAFETY: loading a library runs its initialisers; NVIDIA's may be run by any thread at any time.
    unsafe { sys::is_culib_present() }
}

/// cuBLASLt can be loaded.
pub fn products_are_there() -> bool {
    // SAFETY: as above.
    unsafe { cudarc::cublaslt::sys::is_culib_present() }
}

/// A shared library of CUDA that this program loads, and whether it can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    pub name: &'static str,
    pub found: bool,
}

/// Looked for now, as the loader does: LD_LIBRARY_PATH and the system's folders.
pub fn libraries() -> [Library; 2] {
    [
        Library { name: "libcuda.so.1", found: driver_is_there() },
        Library { name: "libcublasLt.so.13", found: products_are_there() },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_there_is_a_sentence_and_with_one_a_gpu() {
        match probe() {
            Ok(gpus) => assert!(gpus.iter().all(|gpu| gpu.memory_bytes > 0 && !gpu.name.is_empty()), "{gpus:?}"),
            Err(sentence) => assert!(sentence.starts_with("no GPU: "), "{sentence}"),
        }
    }

    #[test]
    fn a_driver_that_is_none_is_told() {
        let sentence = no_gpu(DriverError(CUresult::CUDA_ERROR_STUB_LIBRARY));
        assert_eq!(sentence, "no GPU: libcuda.so.1 is a stub that NVIDIA has for linking");
    }
}
