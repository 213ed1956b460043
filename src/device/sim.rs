//! A simulated device: the same queues, events, copies and kernels, carried out late, in order within a queue, in an order
//! between queues that a seed decides.
//!
//! What a real device would do wrong silently, this one notices:
//! - each access of a queue to device memory must be ordered after those of other queues by events (vector clocks, as race
//!   detectors for threads keep them: Mattern, "Virtual time and global states of distributed systems", 1988);
//! - host memory must not be touched, or freed, while a copy is under way;
//! - what is freed is filled with [`POISON`] and read as that.
//!
//! Any call, and any operation while it runs, can be made to fail.
//!
//! Always true
//! - The same seed and calls give the same order. Kernels compute what their references compute.

#![allow(unsafe_code)]

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::gpu::driver::{Driver, Event, Fault, HostMemory, HostUse, Product, Queue};
use crate::gpu::launch::{Arg, Float, Launch, Memory, Span};
use crate::gpu::reference::{self, Value};
use crate::live::{Kind, Live};

/// What freed memory, and memory that was never written, is filled with.
pub const POISON: u8 = 0xDB;
const POISON_WORD: u64 = u64::from_ne_bytes([POISON; 8]);

/// A device that several executors can share.
#[derive(Clone)]
pub struct SimDevice(Arc<Mutex<World>>);

/// What goes wrong, and when.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// So many calls from now, one fails so.
    pub call: Option<(u64, Fault)>,
    /// So many operations from now, the device is lost while it carries one out.
    pub operation: Option<u64>,
    /// The device does nothing, and says nothing.
    pub stalled: bool,
    /// Bytes of device memory there are; 0: any number.
    pub memory_max: usize,
    /// Each operation takes this long in real time too.
    pub sleep: Duration,
    /// A planted defect: events say that they are complete when they are not.
    pub early_events: bool,
    /// A planted defect: kernels and products spoil eight bytes in the middle of what they write.
    pub spoils: bool,
    /// A planted defect: queues do not wait for each other.
    pub ignored_waits: bool,
}

struct World {
    random: u64,
    buffers: Vec<Buffer>,
    queues: Vec<QueueState>,
    events: Vec<EventState>,
    /// What the host has seen of each queue.
    host: Clock,
    /// Nanoseconds of the device's clock that the host has waited for.
    host_time: u64,
    faults: Faults,
    lost: Option<String>,
    violations: Vec<String>,
    allocated: usize,
    /// Freed host memory: late copies still read and write it, and see poison.
    graveyard: Vec<Box<[u64]>>,
}

/// By queue, the number of its operations that are known to be done.
type Clock = Vec<u64>;

#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    freed: bool,
    /// Queue and number of the operation that wrote last.
    written: Option<(usize, u64)>,
    /// By queue, the number of the operation that read last.
    read: Clock,
}

#[derive(Default)]
struct QueueState {
    operations: VecDeque<Asked>,
    clock: Clock,
    done: u64,
    time: u64,
    busy: u64,
}

#[derive(Clone)]
struct Asked {
    operation: Operation,
    /// What the host had seen when it asked.
    host: Clock,
    host_time: u64,
}

#[derive(Clone)]
enum Operation {
    Upload { from: Copied, to: Place },
    Readback { from: Place, to: Copied },
    Launch { function: &'static str, args: Vec<Value> },
    Product { x: Place, weights: Place, bias: Option<Place>, y: Place, sizes: [usize; 3], float: Float },
    Record { event: usize, turn: u64 },
    Wait { event: usize, turn: u64 },
}

#[derive(Clone, Copy)]
struct Place {
    id: usize,
    at: usize,
    bytes: usize,
}

#[derive(Default)]
struct EventState {
    /// How often it was recorded, and how often the queue has passed it.
    asked: u64,
    passed: u64,
    clock: Clock,
    time: u64,
}

/// Host memory in a copy.
#[derive(Clone)]
struct Copied {
    /// Its first byte.
    bytes: *mut u8,
    pending: Arc<Pending>,
}

// SAFETY: the pointer is to memory that lives as long as the world (dropped memory goes to its graveyard), and is used under
// the world's lock only.
unsafe impl Send for Copied {}

#[derive(Debug, Default)]
struct Pending {
    reads: AtomicU32,
    writes: AtomicU32,
}

impl fmt::Debug for SimDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimDevice")
    }
}

impl SimDevice {
    pub fn new(seed: u64) -> SimDevice {
        SimDevice(Arc::new(Mutex::new(World {
            random: seed,
            buffers: Vec::new(),
            queues: Vec::new(),
            events: Vec::new(),
            host: Clock::new(),
            host_time: 0,
            faults: Faults::default(),
            lost: None,
            violations: Vec::new(),
            allocated: 0,
            graveyard: Vec::new(),
        })))
    }

    /// Queues for one more executor.
    pub fn driver(&self) -> SimDriver {
        let mut world = self.lock();
        let first = world.queues.len();
        world.queues.resize_with(first + Queue::ALL.len(), QueueState::default);
        drop(world);
        let _live = Queue::ALL.map(|_| Live::new(Kind::DeviceStream));
        SimDriver { device: self.clone(), first, capturing: None, _live }
    }

    pub fn set_faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// What was done that a real device would have done wrong. Empty: nothing.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// Bytes of device memory that are not freed.
    pub fn allocated(&self) -> usize {
        self.lock().allocated
    }

    /// Nanoseconds of its clock until now, and those that its queues were busy, added up: more than the first where they overlap.
    pub fn times(&self) -> (u64, u64) {
        let world = self.lock();
        (world.queues.iter().map(|queue| queue.time).max().unwrap_or(0), world.queues.iter().map(|q| q.busy).sum())
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        // A panic under the lock is a failed test already.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl World {
    /// splitmix64 (Steele, Lea, Flood 2014).
    fn random(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below.max(1)
    }

    /// Every call comes through here: it may fail, and the device goes on a little or not.
    fn call(&mut self) -> Result<(), Fault> {
        for _ in 0..self.random(4) {
            self.step();
        }
        if let Some((left, fault)) = self.faults.call.take() {
            if left > 0 {
                self.faults.call = Some((left - 1, fault));
            } else {
                if let Fault::Lost(message) = &fault {
                    self.lose(message.clone());
                }
                return Err(fault);
            }
        }
        self.alive()
    }

    fn alive(&self) -> Result<(), Fault> {
        self.lost.as_ref().map_or(Ok(()), |message| Err(Fault::Lost(message.clone())))
    }

    /// Nothing that was asked for is done any more, and all copies have ended.
    fn lose(&mut self, message: String) {
        self.lost = Some(message);
        for queue in &mut self.queues {
            for asked in queue.operations.drain(..) {
                match asked.operation {
                    Operation::Upload { from, .. } => drop(from.pending.reads.fetch_sub(1, Ordering::AcqRel)),
                    Operation::Readback { to, .. } => drop(to.pending.writes.fetch_sub(1, Ordering::AcqRel)),
                    _ => {}
                }
            }
        }
    }

    fn ask(&mut self, queue: usize, operation: Operation) {
        let asked = Asked { operation, host: self.host.clone(), host_time: self.host_time };
        self.queues[queue].operations.push_back(asked);
    }

    /// Carries out the next operation of some queue that has one and need not wait. False when there is none.
    fn step(&mut self) -> bool {
        if self.faults.stalled || self.lost.is_some() {
            return false;
        }
        let ready = |queue: &QueueState| match queue.operations.front() {
            Some(Asked { operation: Operation::Wait { event, turn }, .. }) => self.events[*event].passed >= *turn,
            Some(_) => true,
            None => false,
        };
        let runnable: Vec<usize> = (0..self.queues.len()).filter(|at| ready(&self.queues[*at])).collect();
        if runnable.is_empty() {
            return false;
        }
        let queue = runnable[self.random(runnable.len() as u64) as usize];
        let asked = self.queues[queue].operations.pop_front().expect("it has one");
        self.carry_out(queue, asked);
        true
    }

    fn carry_out(&mut self, queue: usize, asked: Asked) {
        if let Some(left) = &mut self.faults.operation {
            if *left == 0 {
                self.faults.operation = None;
                self.queues[queue].operations.push_front(asked);
                return self.lose("an illegal address was encountered (simulated)".into());
            }
            *left -= 1;
        }
        merge(&mut self.queues[queue].clock, &asked.host);
        let number = self.queues[queue].done + 1;
        self.queues[queue].done = number;
        set(&mut self.queues[queue].clock, queue, number);
        let free = matches!(asked.operation, Operation::Record { .. } | Operation::Wait { .. });
        let takes = if free { 0 } else { 100 + self.random(900) };
        let state = &mut self.queues[queue];
        state.time = state.time.max(asked.host_time) + takes;
        state.busy += takes;
        match asked.operation {
            Operation::Upload { from, to } => {
                self.written(queue, to.id);
                let target = &mut self.buffers[to.id].bytes[to.at..to.at + to.bytes];
                // SAFETY: see Copied; from there on it has at least as many bytes, which `upload` compared.
                unsafe { std::ptr::copy_nonoverlapping(from.bytes, target.as_mut_ptr(), target.len()) };
                from.pending.reads.fetch_sub(1, Ordering::AcqRel);
            }
            Operation::Readback { from, to } => {
                self.read(queue, from.id);
                let source = &self.buffers[from.id].bytes[from.at..from.at + from.bytes];
                // SAFETY: see Copied; from there on it has at least as many bytes, which `readback` compared.
                unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), to.bytes, source.len()) };
                to.pending.writes.fetch_sub(1, Ordering::AcqRel);
            }
            Operation::Launch { function, args } => {
                let used = args.iter().filter_map(|arg| match arg {
                    Value::Memory { id, .. } => Some(*id),
                    _ => None,
                });
                used.for_each(|id| self.read(queue, id));
                let mut memory = Used { buffers: &mut self.buffers, written: Vec::new() };
                let result = reference::execute(function, &args, &mut memory);
                let written = memory.written;
                for id in written {
                    self.written(queue, id);
                    self.spoil(id);
                }
                if let Err(message) = result {
                    self.violations.push(format!("{function}: {message}"));
                }
            }
            Operation::Product { x, weights, bias, y, sizes, float } => {
                [Some(x), Some(weights), bias].into_iter().flatten().for_each(|place| self.read(queue, place.id));
                self.written(queue, y.id);
                self.multiply(x, weights, bias, y, sizes, float);
                self.spoil(y.id);
            }
            Operation::Record { event, turn } => {
                let (clock, time) = (self.queues[queue].clock.clone(), self.queues[queue].time);
                let state = &mut self.events[event];
                (state.passed, state.clock, state.time) = (turn, clock, time);
            }
            Operation::Wait { event, .. } => {
                let (clock, time) = (self.events[event].clock.clone(), self.events[event].time);
                let state = &mut self.queues[queue];
                merge(&mut state.clock, &clock);
                state.time = state.time.max(time);
            }
        }
    }

    fn multiply(&mut self, x: Place, w: Place, bias: Option<Place>, y: Place, sizes: [usize; 3], float: Float) {
        let [tokens, inputs, outputs] = sizes;
        let floats = |place: Place, count: usize| {
            reference::decode(float, &self.buffers[place.id].bytes[place.at..place.at + count * float.bytes()])
        };
        let (x, w) = (floats(x, tokens * inputs), floats(w, inputs * outputs));
        let bias = bias.map(|bias| floats(bias, outputs));
        let mut product = vec![0.0; tokens * outputs];
        reference::gemm(tokens, inputs, outputs, &x, &w, bias.as_deref(), &mut product);
        let bytes = reference::encode(float, &product);
        self.buffers[y.id].bytes[y.at..y.at + bytes.len()].copy_from_slice(&bytes);
    }

    fn spoil(&mut self, id: usize) {
        let bytes = &mut self.buffers[id].bytes;
        if self.faults.spoils && bytes.len() >= 16 {
            let middle = bytes.len() / 16 * 8;
            bytes[middle..middle + 8].fill(POISON);
        }
    }

    fn read(&mut self, queue: usize, id: usize) {
        let clock = &self.queues[queue].clock;
        let buffer = &mut self.buffers[id];
        if buffer.freed {
            self.violations.push(format!("memory {id} is used by queue {queue} after it was freed"));
        }
        if let Some((by, number)) = buffer.written
            && by != queue
            && get(clock, by) < number
        {
            self.violations.push(format!("memory {id}: queue {queue} reads what queue {by} may not have written yet"));
        }
        set(&mut buffer.read, queue, get(clock, queue));
    }

    fn written(&mut self, queue: usize, id: usize) {
        self.read(queue, id);
        let clock = &self.queues[queue].clock;
        let buffer = &mut self.buffers[id];
        for (by, number) in buffer.read.iter().enumerate() {
            if by != queue && get(clock, by) < *number {
                self.violations
                    .push(format!("memory {id}: queue {queue} writes what queue {by} may not have read yet"));
            }
        }
        buffer.written = Some((queue, get(clock, queue)));
    }
}

/// Device memory in a kernel, and what the kernel wrote.
struct Used<'a> {
    buffers: &'a mut Vec<Buffer>,
    written: Vec<usize>,
}

impl reference::HostMemory for Used<'_> {
    fn bytes(&self, id: usize) -> &[u8] {
        &self.buffers[id].bytes
    }

    fn bytes_mut(&mut self, id: usize) -> &mut [u8] {
        self.written.push(id);
        &mut self.buffers[id].bytes
    }
}

fn get(clock: &Clock, queue: usize) -> u64 {
    clock.get(queue).copied().unwrap_or(0)
}

fn set(clock: &mut Clock, queue: usize, number: u64) {
    if clock.len() <= queue {
        clock.resize(queue + 1, 0);
    }
    clock[queue] = number;
}

fn merge(clock: &mut Clock, other: &Clock) {
    if clock.len() < other.len() {
        clock.resize(other.len(), 0);
    }
    clock.iter_mut().zip(other).for_each(|(mine, other)| *mine = (*mine).max(*other));
}

/// Memory of the simulated device.
pub struct SimMemory {
    device: SimDevice,
    id: usize,
    bytes: usize,
    _live: Live,
}

impl fmt::Debug for SimMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimMemory({}, {} bytes)", self.id, self.bytes)
    }
}

impl Memory for SimMemory {
    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for SimMemory {
    fn drop(&mut self) {
        let mut world = self.device.lock();
        world.allocated -= self.bytes;
        let buffer = &mut world.buffers[self.id];
        buffer.bytes.fill(POISON);
        buffer.freed = true;
    }
}

fn place(span: Span<'_, SimMemory>) -> Place {
    Place { id: span.memory.id, at: span.at, bytes: span.bytes }
}

/// An event of the simulated device.
pub struct SimEvent {
    device: SimDevice,
    id: usize,
    _live: Live,
}

impl fmt::Debug for SimEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimEvent({})", self.id)
    }
}

impl Event for SimEvent {
    fn wait(&self) -> Result<(), Fault> {
        loop {
            let mut world = self.device.lock();
            let event = &world.events[self.id];
            if event.passed == event.asked || world.faults.early_events {
                let (clock, time) = (event.clock.clone(), event.time);
                merge(&mut world.host, &clock);
                world.host_time = world.host_time.max(time);
                return Ok(());
            }
            world.alive()?;
            let (sleep, stalled) = (world.faults.sleep, world.faults.stalled);
            let moved = world.step();
            drop(world);
            match (moved, stalled) {
                (true, _) if sleep.is_zero() => {}
                (true, _) => std::thread::sleep(sleep),
                (false, true) => std::thread::sleep(Duration::from_millis(1)),
                (false, false) => self
                    .device
                    .lock()
                    .alive()
                    .and(Err(Fault::Refused("an event is waited for that no queue can reach".into())))?,
            }
        }
    }

    fn since(&self, earlier: &SimEvent) -> Result<Duration, Fault> {
        let world = self.device.lock();
        Ok(Duration::from_nanos(world.events[self.id].time.saturating_sub(world.events[earlier.id].time)))
    }
}

/// Host memory that the simulated device copies.
struct SimHost {
    device: SimDevice,
    words: *mut u64,
    len: usize,
    pending: Arc<Pending>,
    _live: Live,
}

// SAFETY: the memory belongs to this value alone; the device reads and writes it through Copied, under its lock.
unsafe impl Send for SimHost {}
// SAFETY: shared references only read.
unsafe impl Sync for SimHost {}

impl fmt::Debug for SimHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimHost({} words)", self.len)
    }
}

impl SimHost {
    /// For a copy of `bytes` from `at`. Panics beyond the end: a bug of ours.
    fn part(&self, at: usize, bytes: usize) -> Copied {
        assert!(at + bytes <= self.len * 8, "{at} + {bytes} bytes of {}", self.len * 8);
        // SAFETY: within the memory, as just compared.
        let first = unsafe { self.words.cast::<u8>().add(at) };
        Copied { bytes: first, pending: Arc::clone(&self.pending) }
    }

    /// Notes that the host touches it.
    fn touched(&self, writes: bool) {
        let copies_in = self.pending.writes.load(Ordering::Acquire) > 0;
        let copies_out = self.pending.reads.load(Ordering::Acquire) > 0;
        if copies_in || (writes && copies_out) {
            self.device.lock().violations.push("host memory is touched while a copy is under way".into());
        }
    }
}

impl HostMemory for SimHost {
    fn len_words(&self) -> usize {
        self.len
    }

    fn words(&self) -> &[u64] {
        self.touched(false);
        // SAFETY: made from a boxed slice of this length, freed in drop only.
        unsafe { std::slice::from_raw_parts(self.words, self.len) }
    }

    fn words_mut(&mut self) -> &mut [u64] {
        self.touched(true);
        // SAFETY: made from a boxed slice of this length, freed in drop only, and borrowed mutably here.
        unsafe { std::slice::from_raw_parts_mut(self.words, self.len) }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl Drop for SimHost {
    fn drop(&mut self) {
        self.touched(true);
        // SAFETY: the pointer and length of the boxed slice that it was made from; this value is gone after this.
        let mut words = unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.words, self.len)) };
        words.fill(POISON_WORD);
        let mut world = self.device.lock();
        if self.pending.reads.load(Ordering::Acquire) + self.pending.writes.load(Ordering::Acquire) > 0 {
            world.graveyard.push(words);
        }
    }
}

/// One executor's queues on the simulated device.
pub struct SimDriver {
    device: SimDevice,
    first: usize,
    capturing: Option<Vec<Operation>>,
    _live: [Live; 3],
}

impl SimDriver {
    fn queue(&self, queue: Queue) -> usize {
        self.first + queue as usize
    }

    fn compute(&mut self, operation: Operation) -> Result<(), Fault> {
        let queue = self.queue(Queue::Compute);
        let mut world = self.device.lock();
        world.call()?;
        match &mut self.capturing {
            Some(recorded) => recorded.push(operation),
            None => world.ask(queue, operation),
        }
        Ok(())
    }
}

fn sim_host(memory: &dyn HostMemory) -> Result<&SimHost, Fault> {
    memory.as_any().downcast_ref().ok_or_else(|| Fault::Refused("host memory of another device".into()))
}

impl Driver for SimDriver {
    type Memory = SimMemory;
    type Event = SimEvent;
    type Graph = SimGraph;

    fn name(&self) -> String {
        "a simulated device".into()
    }

    fn is_simulated(&self) -> bool {
        true
    }

    fn allocate(&self, bytes: usize) -> Result<SimMemory, Fault> {
        let mut world = self.device.lock();
        world.call()?;
        if world.faults.memory_max > 0 && world.allocated + bytes > world.faults.memory_max {
            return Err(Fault::OutOfMemory { bytes });
        }
        world.allocated += bytes;
        let id = world.buffers.len();
        world.buffers.push(Buffer { bytes: vec![POISON; bytes], ..Buffer::default() });
        let _live = Live::of_bytes(Kind::DeviceBuffer, bytes);
        Ok(SimMemory { device: self.device.clone(), id, bytes, _live })
    }

    fn host_memory(&self, bytes: usize, _usage: HostUse) -> Result<Box<dyn HostMemory>, Fault> {
        self.device.lock().call()?;
        let words: Box<[u64]> = vec![0; bytes.div_ceil(8)].into();
        let len = words.len();
        let words = Box::into_raw(words).cast::<u64>();
        let _live = Live::of_bytes(Kind::PinnedBuffer, len * 8);
        Ok(Box::new(SimHost { device: self.device.clone(), words, len, pending: Arc::default(), _live }))
    }

    fn event(&self) -> Result<SimEvent, Fault> {
        let mut world = self.device.lock();
        world.call()?;
        world.events.push(EventState::default());
        let id = world.events.len() - 1;
        Ok(SimEvent { device: self.device.clone(), id, _live: Live::new(Kind::DeviceEvent) })
    }

    fn upload(&mut self, from: &dyn HostMemory, at: usize, to: Span<'_, SimMemory>) -> Result<(), Fault> {
        let from = sim_host(from)?.part(at, to.bytes);
        let mut world = self.device.lock();
        world.call()?;
        from.pending.reads.fetch_add(1, Ordering::AcqRel);
        world.ask(self.queue(Queue::Upload), Operation::Upload { from, to: place(to) });
        Ok(())
    }

    fn readback(&mut self, from: Span<'_, SimMemory>, to: &mut dyn HostMemory, at: usize) -> Result<(), Fault> {
        let to = sim_host(to)?.part(at, from.bytes);
        let mut world = self.device.lock();
        world.call()?;
        to.pending.writes.fetch_add(1, Ordering::AcqRel);
        world.ask(self.queue(Queue::Readback), Operation::Readback { from: place(from), to });
        Ok(())
    }

    fn launch(&mut self, launch: &Launch<'_, SimMemory>) -> Result<(), Fault> {
        let value = |arg: &Arg<'_, SimMemory>| match *arg {
            Arg::Memory(span) => Value::Memory { id: span.memory.id, at: span.at, bytes: span.bytes },
            Arg::Null => Value::Null,
            Arg::I32(value) => Value::I32(value),
            Arg::F32(value) => Value::F32(value),
            Arg::Bits(value) => Value::Bits(value),
        };
        let args = launch.args().iter().map(value).collect();
        self.compute(Operation::Launch { function: launch.function, args })
    }

    fn product(&mut self, product: &Product<'_, SimMemory>) -> Result<(), Fault> {
        product.check();
        self.compute(Operation::Product {
            x: place(product.x),
            weights: place(product.weights),
            bias: product.bias.map(place),
            y: place(product.y),
            sizes: [product.tokens, product.inputs, product.outputs],
            float: product.float,
        })
    }

    fn record(&mut self, queue: Queue, event: &SimEvent) -> Result<(), Fault> {
        let mut world = self.device.lock();
        world.call()?;
        let state = &mut world.events[event.id];
        state.asked += 1;
        let turn = state.asked;
        world.ask(self.queue(queue), Operation::Record { event: event.id, turn });
        Ok(())
    }

    fn wait(&mut self, queue: Queue, event: &SimEvent) -> Result<(), Fault> {
        let mut world = self.device.lock();
        world.call()?;
        let turn = world.events[event.id].asked;
        if !world.faults.ignored_waits {
            world.ask(self.queue(queue), Operation::Wait { event: event.id, turn });
        }
        Ok(())
    }

    fn capture(&mut self, body: &mut dyn FnMut(&mut Self) -> Result<(), Fault>) -> Result<Option<SimGraph>, Fault> {
        self.capturing = Some(Vec::new());
        let result = body(self);
        let operations = self.capturing.take().expect("begun above");
        result.map(|()| Some(SimGraph(operations)))
    }

    fn replay(&mut self, graph: &SimGraph) -> Result<(), Fault> {
        let queue = self.queue(Queue::Compute);
        let mut world = self.device.lock();
        world.call()?;
        graph.0.iter().for_each(|operation| world.ask(queue, operation.clone()));
        Ok(())
    }

    fn synchronize(&mut self) -> Result<(), Fault> {
        for queue in Queue::ALL {
            let event = self.event()?;
            self.record(queue, &event)?;
            event.wait()?;
        }
        Ok(())
    }

    fn memory_info(&self) -> Result<(usize, usize), Fault> {
        let world = self.device.lock();
        world.alive()?;
        let all = if world.faults.memory_max > 0 { world.faults.memory_max } else { 1 << 40 };
        Ok((all - world.allocated.min(all), all))
    }
}

/// What was recorded.
pub struct SimGraph(Vec<Operation>);

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::gpu::ops::{Bounds, Unpack};
    use crate::gpu::slot::{Capacity, Held, InFlight, Vacant};

    const LEN: usize = 4;

    /// One row of four words, and room for the same.
    struct Row {
        input: Box<dyn HostMemory>,
        output: Box<dyn HostMemory>,
    }

    impl Held for Row {
        fn lens(&self) -> &[u32] {
            &[LEN as u32]
        }

        fn input(&self, index: usize) -> Option<(&dyn HostMemory, Range<usize>)> {
            (index == 0).then_some((&*self.input, 0..4 * LEN))
        }

        fn output(&mut self, index: usize) -> Option<(&mut dyn HostMemory, Range<usize>)> {
            (index == 0).then_some((&mut *self.output, 0..4 * LEN))
        }
    }

    /// Goal: memory is handed from the thread that asks to the one that waits and back without a race, whoever runs when. Method:
    /// rows that come back as they went; under Miri, which follows each address (tools/miri).
    #[test]
    fn memory_goes_round_between_two_threads() {
        let rounds = if cfg!(miri) { 12 } else { 2000 };
        let device = SimDevice::new(1);
        let mut driver = device.driver();
        let bytes = 4 * LEN;
        let capacity = Capacity { rows: 1, inputs: vec![bytes], outputs: vec![bytes] };
        let (asked, to_wait) = std::sync::mpsc::sync_channel::<InFlight<SimDriver, Row>>(3);
        let (done, landed) = std::sync::mpsc::channel();
        for index in 0..3 {
            let vacant = Vacant::new(&driver, index, &capacity).expect("no fault was ordered");
            let host = |usage| driver.host_memory(bytes, usage).expect("no fault was ordered");
            let row = Row { input: host(HostUse::Upload), output: host(HostUse::Readback) };
            done.send((vacant, row)).expect("it is held below");
        }
        let waiting = std::thread::spawn(move || {
            let mut sum = 0_u64;
            for flight in to_wait {
                let (vacant, row) = flight.wait().map_err(|failed| failed.fault).expect("no fault").vacate();
                assert_eq!(row.output.words(), row.input.words());
                sum += row.output.words()[0];
                // The asking thread may have enough.
                let _ = done.send((vacant, row));
            }
            sum
        });
        for round in 0..rounds {
            let (vacant, mut row): (Vacant<SimDriver>, Row) = landed.recv().expect("as many as there are slots");
            row.input.words_mut().fill(round);
            row.output.words_mut().fill(u64::MAX);
            let flight = vacant.fill(row).submit(&mut driver, |driver, buffers| {
                let copy = Unpack {
                    table: Span::of(&buffers.table),
                    ragged: Span::of(&buffers.inputs[0]),
                    padded: Span::of(&buffers.outputs[0]),
                    mask: None,
                    positions: None,
                    padded_len: LEN,
                    per_place: 1,
                    pad: 0,
                };
                driver.launch(&copy.launch(&Bounds { rows: 1, tokens: LEN, longest: LEN }, 4))
            });
            asked.send(flight.map_err(|failed| failed.fault).expect("no fault")).expect("the other thread waits");
        }
        drop(asked);
        assert_eq!(waiting.join().expect("it does not panic"), rounds * (rounds - 1) / 2);
        drop(landed);
        assert_eq!(device.violations(), [""; 0]);
        assert_eq!(device.allocated(), 0);
    }
}
