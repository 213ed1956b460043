//! A slot of an executor, as types: vacant, filled, in flight, complete. Copies between host and device run by themselves; what
//! they touch cannot be reached from the time they are asked for until an event says that they are done.
//!
//! ```text
//! Vacant ──fill──> Filled ──submit──> InFlight ──wait──> Complete ──vacate──> Vacant
//!                         upload · compute · readback
//! ```
//!
//! Always true
//! - Host memory of a batch is given to the slot with it and comes back with its completion, or with the fault that ended it.
//! - Of three slots of an executor, one can be uploaded while the second is computed and the third read back: the queues wait
//!   for each other's events of one slot only.
//! - A slot whose completion could not be waited for is never vacant again, and its fault says that the device is lost.

use std::ops::Range;
use std::time::Duration;

use super::driver::{Driver, Event, Fault, HostMemory, HostUse, Queue};
use super::launch::{Span, Table};
use super::ops::Bounds;

/// What a batch brings in host memory, and where it wants its answers.
pub trait Held: Send {
    /// Real lengths of its rows.
    fn lens(&self) -> &[u32];

    /// Rows end to end, by input of the model: memory, and which bytes of it.
    fn input(&self, index: usize) -> Option<(&dyn HostMemory, Range<usize>)>;

    /// Memory for the answers, and which bytes of it they take.
    fn output(&mut self, index: usize) -> Option<(&mut dyn HostMemory, Range<usize>)>;
}

/// Sizes of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Most rows of a batch.
    pub rows: usize,
    /// Bytes of each input, of each output, at most.
    pub inputs: Vec<usize>,
    pub outputs: Vec<usize>,
}

/// A batch in host memory of its own, for whoever has no other that a device can reach. One output.
#[derive(Debug)]
pub struct HostBatch {
    lens: Vec<u32>,
    inputs: Vec<Box<dyn HostMemory>>,
    /// Bytes of each input.
    used: Vec<usize>,
    output: Box<dyn HostMemory>,
    answer_bytes: usize,
}

impl HostBatch {
    pub fn new<D: Driver>(driver: &D, capacity: &Capacity) -> Result<HostBatch, Fault> {
        let input = |bytes: &usize| driver.host_memory(*bytes, HostUse::Upload);
        Ok(HostBatch {
            lens: Vec::with_capacity(capacity.rows),
            inputs: capacity.inputs.iter().map(input).collect::<Result<_, _>>()?,
            used: vec![0; capacity.inputs.len()],
            output: driver.host_memory(capacity.outputs[0], HostUse::Readback)?,
            answer_bytes: 0,
        })
    }

    /// Begins anew: rows of these lengths, with answers of `row_bytes` each. Inputs are empty until they are written.
    pub fn begin(&mut self, lens: impl IntoIterator<Item = u32>, row_bytes: usize) {
        self.lens.clear();
        self.lens.extend(lens);
        self.used.fill(0);
        self.answer_bytes = self.lens.len() * row_bytes;
    }

    /// The first bytes of an input, to be written.
    pub fn input_mut(&mut self, index: usize, bytes: usize) -> &mut [u8] {
        self.used[index] = bytes;
        &mut bytemuck::cast_slice_mut(self.inputs[index].words_mut())[..bytes]
    }

    pub fn bounds(&self) -> Bounds {
        Bounds::of(&self.lens)
    }

    pub fn answers(&self) -> &[u8] {
        &bytemuck::cast_slice(self.output.words())[..self.answer_bytes]
    }
}

impl Held for HostBatch {
    fn lens(&self) -> &[u32] {
        &self.lens
    }

    fn input(&self, index: usize) -> Option<(&dyn HostMemory, Range<usize>)> {
        Some((&**self.inputs.get(index)?, 0..self.used[index]))
    }

    fn output(&mut self, index: usize) -> Option<(&mut dyn HostMemory, Range<usize>)> {
        (index == 0).then_some((&mut *self.output, 0..self.answer_bytes))
    }
}

/// The memory of one slot on the device, with its events.
pub struct Buffers<D: Driver> {
    /// Which of its executor's slots.
    pub index: usize,
    pub table: D::Memory,
    pub inputs: Vec<D::Memory>,
    pub outputs: Vec<D::Memory>,
    table_host: Box<dyn HostMemory>,
    begun: D::Event,
    uploaded: D::Event,
    started: D::Event,
    computed: D::Event,
    done: D::Event,
    capacity: Capacity,
}

/// A slot that no queue knows of.
pub struct Vacant<D: Driver>(Box<Buffers<D>>);

/// A slot with a batch.
pub struct Filled<D: Driver, T> {
    buffers: Box<Buffers<D>>,
    held: T,
}

/// A slot that the device works on.
pub struct InFlight<D: Driver, T> {
    /// Empty once it has been waited for.
    state: Option<(Box<Buffers<D>>, T)>,
}

/// A slot whose answers are in host memory.
pub struct Complete<D: Driver, T> {
    buffers: Box<Buffers<D>>,
    held: T,
}

/// A batch that did not run.
pub struct Failed<D: Driver, T> {
    pub fault: Fault,
    pub held: T,
    /// The slot, where the device could be waited for.
    pub vacant: Option<Vacant<D>>,
}

impl<D: Driver> Vacant<D> {
    pub fn new(driver: &D, index: usize, capacity: &Capacity) -> Result<Vacant<D>, Fault> {
        let table_bytes = Table::len(capacity.rows) * size_of::<i32>();
        let all = |sizes: &[usize]| -> Result<Vec<D::Memory>, Fault> {
            sizes.iter().map(|bytes| driver.allocate((*bytes).max(1))).collect()
        };
        Ok(Vacant(Box::new(Buffers {
            index,
            table: driver.allocate(table_bytes)?,
            inputs: all(&capacity.inputs)?,
            outputs: all(&capacity.outputs)?,
            table_host: driver.host_memory(table_bytes, HostUse::Upload)?,
            begun: driver.event()?,
            uploaded: driver.event()?,
            started: driver.event()?,
            computed: driver.event()?,
            done: driver.event()?,
            capacity: capacity.clone(),
        })))
    }

    pub fn buffers(&self) -> &Buffers<D> {
        &self.0
    }

    /// Takes a batch in. Panics when it is larger than the slot: a bug of ours.
    pub fn fill<T: Held>(self, held: T) -> Filled<D, T> {
        let mut buffers = self.0;
        let lens = held.lens();
        assert!(lens.len() <= buffers.capacity.rows, "{} rows in a slot of {}", lens.len(), buffers.capacity.rows);
        let places: &mut [i32] = bytemuck::cast_slice_mut(buffers.table_host.words_mut());
        Table::write(lens, &mut places[..Table::len(lens.len())]);
        Filled { buffers, held }
    }
}

impl<D: Driver, T: Held> Filled<D, T> {
    /// Asks the device for all of it: the copy up, what `compute` asks for, the copy back. Returns before any of it is done.
    pub fn submit(
        mut self,
        driver: &mut D,
        compute: impl FnOnce(&mut D, &Buffers<D>) -> Result<(), Fault>,
    ) -> Result<InFlight<D, T>, Failed<D, T>> {
        match self.ask(driver, compute) {
            Ok(()) => Ok(InFlight { state: Some((self.buffers, self.held)) }),
            // Some of it may be under way.
            Err(fault) => Err(match driver.synchronize() {
                Ok(()) => Failed { fault, held: self.held, vacant: Some(Vacant(self.buffers)) },
                Err(worse) => {
                    leak(self.buffers);
                    Failed { fault: lost(if fault.is_lost() { fault } else { worse }), held: self.held, vacant: None }
                }
            }),
        }
    }

    fn ask(
        &mut self,
        driver: &mut D,
        compute: impl FnOnce(&mut D, &Buffers<D>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let Filled { buffers, held } = self;
        let table_bytes = Table::len(held.lens().len()) * size_of::<i32>();
        driver.record(Queue::Upload, &buffers.begun)?;
        driver.upload(&*buffers.table_host, 0, Span::of(&buffers.table).part(0, table_bytes))?;
        for (index, memory) in buffers.inputs.iter().enumerate() {
            if let Some((from, bytes)) = held.input(index) {
                driver.upload(from, bytes.start, Span::of(memory).part(0, bytes.len()))?;
            }
        }
        driver.record(Queue::Upload, &buffers.uploaded)?;
        driver.wait(Queue::Compute, &buffers.uploaded)?;
        driver.record(Queue::Compute, &buffers.started)?;
        compute(driver, buffers)?;
        driver.record(Queue::Compute, &buffers.computed)?;
        driver.wait(Queue::Readback, &buffers.computed)?;
        for (index, memory) in buffers.outputs.iter().enumerate() {
            if let Some((to, bytes)) = held.output(index) {
                driver.readback(Span::of(memory).part(0, bytes.len()), to, bytes.start)?;
            }
        }
        driver.record(Queue::Readback, &buffers.done)
    }
}

impl<D: Driver, T> InFlight<D, T> {
    /// Returns when the answers are there. The thread sleeps meanwhile.
    pub fn wait(mut self) -> Result<Complete<D, T>, Failed<D, T>> {
        let (buffers, held) = self.state.take().expect("taken here and in drop only");
        match buffers.done.wait() {
            Ok(()) => Ok(Complete { buffers, held }),
            // It copies nothing any more; its memory is not given back to it.
            Err(fault) => {
                leak(buffers);
                Err(Failed { fault: lost(fault), held, vacant: None })
            }
        }
    }
}

impl<D: Driver, T> Drop for InFlight<D, T> {
    /// Waits: host memory must not be freed under a copy.
    fn drop(&mut self) {
        if let Some((buffers, held)) = self.state.take()
            && buffers.done.wait().is_err()
        {
            leak(buffers);
            std::mem::forget(held);
        }
    }
}

/// A device that cannot be waited for is lost, whatever it calls it: its slots do not come back, and nobody must wait for them.
fn lost(fault: Fault) -> Fault {
    if fault.is_lost() { fault } else { Fault::Lost(fault.to_string()) }
}

/// Freeing what a lost device may know of is worse than losing it: the process ends soon.
fn leak<D: Driver>(buffers: Box<Buffers<D>>) {
    std::mem::forget(buffers);
}

impl<D: Driver, T> Complete<D, T> {
    /// How long the device computed, on its own clock: without waiting for the queue, without copies.
    pub fn computed_in(&self) -> Result<Duration, Fault> {
        self.buffers.computed.since(&self.buffers.started)
    }

    /// How long before the end the rows were there, and how long before it the answers were: on the device's own clock.
    pub fn before_done(&self) -> Result<(Duration, Duration), Fault> {
        let Buffers { uploaded, computed, done, .. } = &*self.buffers;
        Ok((done.since(uploaded)?, done.since(computed)?))
    }

    /// How long its copies took, up and back. Known where the device's clock can say it.
    pub fn copied_in(&self) -> [Duration; 2] {
        let buffers = &self.buffers;
        [buffers.uploaded.since(&buffers.begun), buffers.done.since(&buffers.computed)].map(Result::unwrap_or_default)
    }

    pub fn vacate(self) -> (Vacant<D>, T) {
        (Vacant(self.buffers), self.held)
    }
}
