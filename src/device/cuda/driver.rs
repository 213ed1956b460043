//! A GPU with its kernels, and one executor's streams on it.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaGraph, CudaStream, result, sys};
use cudarc::nvrtc::Ptx;

use super::memory::{CudaEvent, CudaHost, CudaMemory};
use super::products::Products;
use super::{fault, modules, probe};
use crate::gpu::driver::{Driver, Fault, HostMemory, HostUse, Product, Queue};
use crate::gpu::launch::{ARGS_MAX, Arg, Launch, Span};
use crate::gpu::ops;
use crate::live::{Kind, Live};

/// A GPU that was opened, with all kernels loaded. Its executors share it.
#[derive(Clone)]
pub struct Gpu(Arc<Opened>);

struct Opened {
    name: String,
    context: Arc<CudaContext>,
    functions: HashMap<&'static str, CudaFunction>,
}

impl Gpu {
    /// Opens the GPU of this number and loads the kernels: machine code where this build has it for the GPU, otherwise the driver
    /// compiles their text, once.
    pub fn open(number: u16) -> Result<Gpu, Fault> {
        let gpus = probe::probe().map_err(Fault::Refused)?;
        let Some(info) = gpus.iter().find(|info| info.ordinal == usize::from(number)) else {
            return Err(Fault::Refused(format!("there is no GPU {number}; there are {} (ferry devices)", gpus.len())));
        };
        if modules::KERNELS_MISSING {
            return Err(Fault::Refused("this binary was built without kernels (FERRY_KERNELS=skip), for lints".into()));
        }
        if !probe::products_are_there() {
            return Err(Fault::Refused(
                "cuBLASLt of CUDA 13 (libcublasLt.so.13) was not found; name its folder in LD_LIBRARY_PATH".into(),
            ));
        }
        if info.capability < (8, 0) {
            let (major, minor) = info.capability;
            return Err(Fault::Refused(format!(
                "GPU {number} has compute capability {major}.{minor}; the kernels need 8.0 or more"
            )));
        }
        let context = CudaContext::new(number.into()).map_err(fault)?;
        // SAFETY: nothing has been allocated in this context yet, and the streams are ordered by the events of gpu/slot.rs alone.
        // cudarc's tracking would cost two driver calls for each argument of each kernel.
        unsafe { context.disable_event_tracking() };
        keep_freed_memory(&context)?;
        let mut functions = HashMap::new();
        for (file, image) in modules::MODULES {
            let module = context.load_module(Ptx::from_binary(image.to_vec())).map_err(|error| {
                Fault::Refused(format!("the kernels of {file}.cu do not load on {}: {:?}", info.name, error.0))
            })?;
            let names = ops::FUNCTIONS.iter().find(|(source, _)| source.strip_suffix(".cu") == Some(*file));
            for name in names.map_or(&[][..], |(_, names)| names) {
                let function = module
                    .load_function(name)
                    .map_err(|error| Fault::Refused(format!("{file}.cu has no kernel {name}: {:?}", error.0)))?;
                functions.insert(*name, function);
            }
        }
        Ok(Gpu(Arc::new(Opened { name: format!("GPU {number}, {}", info.name), context, functions })))
    }
}

/// Freed memory stays with the process: giving it back at each synchronisation would stall all streams.
fn keep_freed_memory(context: &Arc<CudaContext>) -> Result<(), Fault> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut threshold = u64::MAX;
    // SAFETY: the device is that of a live context; the attribute is a 64-bit integer, which `threshold` is.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device()).map_err(fault)?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast::<c_void>()).map_err(fault)
    }
}

/// One executor's streams.
pub struct CudaDriver {
    gpu: Gpu,
    /// By [`Queue`].
    streams: [Arc<CudaStream>; 3],
    products: Products,
    _live: [Live; 3],
}

impl CudaDriver {
    pub fn new(gpu: &Gpu) -> Result<CudaDriver, Fault> {
        let context = &gpu.0.context;
        let stream = || context.new_stream().map_err(fault);
        let streams = [stream()?, stream()?, stream()?];
        let products = Products::new(&streams[Queue::Compute as usize])?;
        let _live = Queue::ALL.map(|_| Live::new(Kind::DeviceStream));
        Ok(CudaDriver { gpu: gpu.clone(), streams, products, _live })
    }

    fn stream(&self, queue: Queue) -> &Arc<CudaStream> {
        &self.streams[queue as usize]
    }

    /// Every call into the driver needs the context on its thread.
    fn bind(&self) -> Result<(), Fault> {
        self.gpu.0.context.bind_to_thread().map_err(fault)
    }
}

fn pinned(memory: &dyn HostMemory) -> Result<&CudaHost, Fault> {
    memory.as_any().downcast_ref().ok_or_else(|| Fault::Refused("host memory of another device".into()))
}

fn address(span: &Span<'_, CudaMemory>) -> sys::CUdeviceptr {
    span.memory.address + span.at as u64
}

impl Driver for CudaDriver {
    type Memory = CudaMemory;
    type Event = CudaEvent;
    type Graph = CudaGraph;

    fn name(&self) -> String {
        self.gpu.0.name.clone()
    }

    fn allocate(&self, bytes: usize) -> Result<CudaMemory, Fault> {
        CudaMemory::new(self.stream(Queue::Compute), bytes)
    }

    fn host_memory(&self, bytes: usize, usage: HostUse) -> Result<Box<dyn HostMemory>, Fault> {
        Ok(Box::new(CudaHost::new(&self.gpu.0.context, bytes, usage)?))
    }

    fn event(&self) -> Result<CudaEvent, Fault> {
        CudaEvent::new(&self.gpu.0.context)
    }

    fn upload(&mut self, from: &dyn HostMemory, at: usize, to: Span<'_, CudaMemory>) -> Result<(), Fault> {
        if to.bytes == 0 {
            return Ok(());
        }
        let from = pinned(from)?.part(at, to.bytes);
        self.bind()?;
        // SAFETY: `part` compared the length. The memory outlives the copy and is not written meanwhile, because gpu/slot.rs keeps
        // its owner until an event says that the copy is done.
        unsafe {
            let source = std::slice::from_raw_parts(from, to.bytes);
            result::memcpy_htod_async(address(&to), source, self.stream(Queue::Upload).cu_stream()).map_err(fault)
        }
    }

    fn readback(&mut self, from: Span<'_, CudaMemory>, to: &mut dyn HostMemory, at: usize) -> Result<(), Fault> {
        if from.bytes == 0 {
            return Ok(());
        }
        let to = pinned(to)?.part(at, from.bytes);
        self.bind()?;
        // SAFETY: as in `upload`; nobody reads or writes the memory until the copy is done.
        unsafe {
            let target = std::slice::from_raw_parts_mut(to, from.bytes);
            result::memcpy_dtoh_async(target, address(&from), self.stream(Queue::Readback).cu_stream()).map_err(fault)
        }
    }

    fn launch(&mut self, launch: &Launch<'_, CudaMemory>) -> Result<(), Fault> {
        let Some(function) = self.gpu.0.functions.get(launch.function) else {
            return Err(Fault::Refused(format!("this binary has no kernel {}", launch.function)));
        };
        // Eight bytes each, the low ones first on every host that CUDA runs on: a kernel reads as many as its parameter has.
        let mut values = [0_u64; ARGS_MAX];
        for (value, arg) in values.iter_mut().zip(launch.args()) {
            *value = match arg {
                Arg::Memory(span) => address(span),
                Arg::Null => 0,
                Arg::I32(value) => u64::from(*value as u32),
                Arg::F32(value) => u64::from(value.to_bits()),
                Arg::Bits(value) => *value,
            };
        }
        let mut pointers = [std::ptr::null_mut::<c_void>(); ARGS_MAX];
        for (pointer, value) in pointers.iter_mut().zip(&mut values) {
            *pointer = std::ptr::from_mut(value).cast();
        }
        self.bind()?;
        let [x, y, z] = launch.grid;
        // SAFETY: the launch was made by gpu/ops.rs, which knows the kernel's parameters and has compared every buffer with what
        // the kernel may touch; the driver copies the arguments before it returns.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (launch.block, 1, 1),
                launch.shared_bytes,
                self.stream(Queue::Compute).cu_stream(),
                &mut pointers[..launch.args().len()],
            )
            .map_err(fault)
        }
    }

    fn product(&mut self, product: &Product<'_, CudaMemory>) -> Result<(), Fault> {
        product.check();
        self.bind()?;
        self.products.ask(product)
    }

    fn record(&mut self, queue: Queue, event: &CudaEvent) -> Result<(), Fault> {
        event.0.record(self.stream(queue)).map_err(fault)
    }

    fn wait(&mut self, queue: Queue, event: &CudaEvent) -> Result<(), Fault> {
        self.stream(queue).wait(&event.0).map_err(fault)
    }

    fn capture(&mut self, body: &mut dyn FnMut(&mut Self) -> Result<(), Fault>) -> Result<Option<CudaGraph>, Fault> {
        let stream = Arc::clone(self.stream(Queue::Compute));
        // Of this thread: other executors may allocate meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(fault)?;
        let asked = body(self);
        // Also after a fault: a stream that is left capturing does nothing else.
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(fault);
        asked?;
        let graph = graph?;
        if let Some(graph) = &graph {
            graph.upload().map_err(fault)?;
        }
        Ok(graph)
    }

    fn replay(&mut self, graph: &CudaGraph) -> Result<(), Fault> {
        graph.launch().map_err(fault)
    }

    fn synchronize(&mut self) -> Result<(), Fault> {
        self.streams.iter().try_for_each(|stream| stream.synchronize().map_err(fault))
    }

    fn memory_info(&self) -> Result<(usize, usize), Fault> {
        self.gpu.0.context.mem_get_info().map_err(fault)
    }
}
