//! What a device must be able to do, and how it says that it could not.
//!
//! A driver stands for one executor's share of a device: three queues that run side by side, each in order. What one queue
//! writes and another reads is ordered by events, and by nothing else.
//!
//! Elsewhere: those who drive it (slot.rs, encoder.rs), CUDA and the simulated device (device).

use std::any::Any;
use std::fmt;
use std::time::Duration;

use super::launch::{Float, Launch, Memory, Span};

/// The queues of an executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Host to device.
    Upload,
    Compute,
    /// Device to host.
    Readback,
}

impl Queue {
    pub const ALL: [Queue; 3] = [Queue::Upload, Queue::Compute, Queue::Readback];
}

/// Why a device did not do something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Not this much memory. The device is as it was.
    OutOfMemory { bytes: usize },
    /// This was not done, the device is as it was.
    Refused(String),
    /// The device does nothing any more for this process, whatever it is asked: an illegal address, a failed assertion, a
    /// device that fell off its bus. CUDA calls such errors sticky.
    Lost(String),
}

impl Fault {
    pub fn is_lost(&self) -> bool {
        matches!(self, Fault::Lost(_))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::OutOfMemory { bytes } => write!(f, "the device has no {bytes} bytes of memory left"),
            Fault::Refused(message) => f.write_str(message),
            Fault::Lost(message) => write!(f, "the device is lost: {message}"),
        }
    }
}

impl std::error::Error for Fault {}

/// What a host buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostUse {
    /// Written by the host in order, read by the device: write-combined, slow to read.
    Upload,
    /// Written by the device, read by the host.
    Readback,
}

/// Memory of the host that a device copies from or to without help of a processor: pinned, where the device is one.
///
/// Who holds it alone may touch it; while a copy is under way nobody does: slot.rs keeps it then.
pub trait HostMemory: fmt::Debug + Send + Sync {
    fn len_words(&self) -> usize;
    fn words(&self) -> &[u64];
    fn words_mut(&mut self) -> &mut [u64];
    /// For the driver that made it.
    fn as_any(&self) -> &dyn Any;
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

/// A point in a queue.
pub trait Event: Send + 'static {
    /// Returns when the queue has passed it. The thread sleeps meanwhile.
    fn wait(&self) -> Result<(), Fault>;

    /// Time between two points that have been passed, on the device's clock.
    fn since(&self, earlier: &Self) -> Result<Duration, Fault>;
}

/// A product with weights: `y[tokens][outputs] = x[tokens][inputs] · wᵀ + bias`.
#[derive(Debug)]
pub struct Product<'a, M> {
    pub x: Span<'a, M>,
    /// `[outputs][inputs]`
    pub weights: Span<'a, M>,
    /// `[outputs]`
    pub bias: Option<Span<'a, M>>,
    pub y: Span<'a, M>,
    pub tokens: usize,
    pub inputs: usize,
    pub outputs: usize,
    /// Of all of them; sums are f32.
    pub float: Float,
}

impl<M: Memory> Product<'_, M> {
    /// Every span holds what it is used for. Panics: a bug of ours.
    pub fn check(&self) {
        let size = self.float.bytes();
        assert!(self.x.bytes >= self.tokens * self.inputs * size, "x: {} bytes", self.x.bytes);
        assert!(self.weights.bytes >= self.outputs * self.inputs * size, "weights: {} bytes", self.weights.bytes);
        assert!(self.bias.is_none_or(|bias| bias.bytes >= self.outputs * size), "a bias for each output");
        assert!(self.y.bytes >= self.tokens * self.outputs * size, "y: {} bytes", self.y.bytes);
    }
}

/// One executor's queues on a device.
pub trait Driver: Send + Sized + 'static {
    type Memory: Memory + fmt::Debug + Send + Sync + 'static;
    type Event: Event;
    /// A recorded sequence of launches.
    type Graph;

    /// The device, in words.
    fn name(&self) -> String;

    /// It only pretends: nobody should ask it for much.
    fn is_simulated(&self) -> bool {
        false
    }

    /// Device memory with arbitrary content.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory, Fault>;

    /// Host memory of at least this size, zeroed.
    fn host_memory(&self, bytes: usize, usage: HostUse) -> Result<Box<dyn HostMemory>, Fault>;

    fn event(&self) -> Result<Self::Event, Fault>;

    /// Fills `to` from the bytes of `from` that begin at `at`, on the upload queue. Returns at once: `from` must stay as it is
    /// until the queue has passed.
    fn upload(&mut self, from: &dyn HostMemory, at: usize, to: Span<'_, Self::Memory>) -> Result<(), Fault>;

    /// Copies `from` to the bytes of `to` that begin at `at`, on the readback queue. Returns at once: nobody may touch `to`
    /// until the queue has passed.
    fn readback(&mut self, from: Span<'_, Self::Memory>, to: &mut dyn HostMemory, at: usize) -> Result<(), Fault>;

    /// Runs a kernel on the compute queue.
    fn launch(&mut self, launch: &Launch<'_, Self::Memory>) -> Result<(), Fault>;

    /// Runs a product on the compute queue.
    fn product(&mut self, product: &Product<'_, Self::Memory>) -> Result<(), Fault>;

    fn record(&mut self, queue: Queue, event: &Self::Event) -> Result<(), Fault>;

    /// What is asked of `queue` after this waits for `event`, which has been recorded.
    fn wait(&mut self, queue: Queue, event: &Self::Event) -> Result<(), Fault>;

    /// Records what `body` asks of the compute queue instead of doing it. None where the device cannot.
    fn capture(&mut self, body: &mut dyn FnMut(&mut Self) -> Result<(), Fault>) -> Result<Option<Self::Graph>, Fault>;

    /// Does on the compute queue what was recorded.
    fn replay(&mut self, graph: &Self::Graph) -> Result<(), Fault>;

    /// Returns when all three queues are empty.
    fn synchronize(&mut self) -> Result<(), Fault>;

    /// Bytes free, and bytes in all.
    fn memory_info(&self) -> Result<(usize, usize), Fault>;
}
