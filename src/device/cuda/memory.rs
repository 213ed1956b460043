//! Device memory, pinned host memory and events.
//!
//! Always true
//! - Host memory is reached by its address while no copy is under way: who may reach it then is for the types of gpu/slot.rs.

#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{self, CudaContext, CudaSlice, CudaStream, DevicePtr, PinnedHostSlice};
use cudarc::driver::{result, sys};

use super::fault;
use crate::gpu::driver::{Event, Fault, HostMemory, HostUse};
use crate::gpu::launch::Memory;
use crate::live::{Kind, Live};

/// Memory of a GPU.
pub struct CudaMemory {
    /// Freed with this.
    _slice: CudaSlice<u8>,
    pub(super) address: sys::CUdeviceptr,
    bytes: usize,
    _live: Live,
}

impl CudaMemory {
    /// With arbitrary content. Returns when every stream may use it.
    pub(super) fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<CudaMemory, Fault> {
        let with_size = |error| match fault(error) {
            Fault::OutOfMemory { .. } => Fault::OutOfMemory { bytes },
            other => other,
        };
        // SAFETY: bytes of any value are bytes. That they are written before they are read is the kernels' affair, and a wrong
        // answer at worst.
        let slice = unsafe { stream.alloc::<u8>(bytes) }.map_err(with_size)?;
        // Memory is allocated in the order of its stream; others know nothing of it yet.
        stream.synchronize().map_err(fault)?;
        let address = slice.device_ptr(stream).0;
        Ok(CudaMemory { _slice: slice, address, bytes, _live: Live::of_bytes(Kind::DeviceBuffer, bytes) })
    }
}

impl fmt::Debug for CudaMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaMemory({:#x}, {} bytes)", self.address, self.bytes)
    }
}

impl Memory for CudaMemory {
    fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Host memory that a GPU copies by itself.
pub(super) struct CudaHost {
    /// Freed with this.
    _slice: PinnedHostSlice<u64>,
    words: *mut u64,
    len: usize,
    _live: Live,
}

// SAFETY: the memory belongs to this value alone and is reachable from every thread of the process.
unsafe impl Send for CudaHost {}
// SAFETY: shared references only read.
unsafe impl Sync for CudaHost {}

impl CudaHost {
    pub(super) fn new(context: &Arc<CudaContext>, bytes: usize, usage: HostUse) -> Result<CudaHost, Fault> {
        let flags = match usage {
            HostUse::Upload => sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_WRITECOMBINED,
            // Written by the GPU, read by us: write-combined memory would be read without a cache.
            HostUse::Readback => sys::CU_MEMHOSTALLOC_PORTABLE,
        };
        let len = bytes.div_ceil(8).max(1);
        // SAFETY: the memory is written below, before anybody reads it.
        let mut slice = unsafe { context.alloc_pinned_with_flags::<u64>(len, flags) }.map_err(fault)?;
        let words = slice.as_mut_ptr().map_err(fault)?;
        // SAFETY: `len` words were just allocated there.
        unsafe { words.write_bytes(0, len) };
        Ok(CudaHost { _slice: slice, words, len, _live: Live::of_bytes(Kind::PinnedBuffer, len * 8) })
    }

    /// Bytes from `at`, as a copy needs them. Panics beyond the end: a bug of ours.
    pub(super) fn part(&self, at: usize, bytes: usize) -> *mut u8 {
        assert!(at + bytes <= self.len * 8, "{at} + {bytes} bytes of {}", self.len * 8);
        // SAFETY: within the memory, as just compared.
        unsafe { self.words.cast::<u8>().add(at) }
    }
}

impl fmt::Debug for CudaHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaHost({} words)", self.len)
    }
}

impl HostMemory for CudaHost {
    fn len_words(&self) -> usize {
        self.len
    }

    fn words(&self) -> &[u64] {
        // SAFETY: `len` words, zeroed when they were allocated, freed with this value. No copy writes them now: a copy back is under
        // way only while gpu/slot.rs keeps this value.
        unsafe { std::slice::from_raw_parts(self.words, self.len) }
    }

    fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as above, borrowed mutably; no copy reads them now for the same reason.
        unsafe { std::slice::from_raw_parts_mut(self.words, self.len) }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// A point in a stream.
pub struct CudaEvent(
    pub(super) driver::CudaEvent,
    #[allow(dead_code)] // it counts by being there
    Live,
);

impl CudaEvent {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<CudaEvent, Fault> {
        // With timing; who waits sleeps in the kernel instead of spinning.
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC;
        let event = context.new_event(Some(flags)).map_err(fault)?;
        Ok(CudaEvent(event, Live::new(Kind::DeviceEvent)))
    }
}

impl Event for CudaEvent {
    fn wait(&self) -> Result<(), Fault> {
        self.0.synchronize().map_err(fault)
    }

    fn since(&self, earlier: &CudaEvent) -> Result<Duration, Fault> {
        // cudarc's `elapsed_ms` synchronises both once more; they are complete, so the driver's own call does.
        // SAFETY: both events exist as long as these references, and were made with timing.
        let milliseconds = unsafe { result::event::elapsed(earlier.0.cu_event(), self.0.cu_event()) }.map_err(fault)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}
