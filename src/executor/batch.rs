//! What a model sees of a batch, and where it puts its output.
//!
//! Always true
//! - Buffers are made of 64-bit words, so a cast to any dtype is aligned; they grow to their largest use and are reused.
//! - Row `r` of a padded tensor starts at `r * row_bytes(padded_len)`; its first `row_bytes(lens[r])` bytes are real. Rows of a
//!   packed one follow one another, and all bytes are.

use std::ops::Range;

use crate::contract::{Contract, TensorSpec};
use crate::gpu::driver::HostMemory;
use crate::live::{Kind, Live};
use crate::vocab::{Code, Layout};

/// Bytes that can be viewed as any dtype. Grows when asked for more than ever before, never shrinks.
///
/// Where a device copies them, as much as it was made for lies in memory that it can reach; what is larger lies in ordinary memory.
#[derive(Debug, Default)]
pub struct AlignedBytes {
    words: Vec<u64>,
    device: Option<Box<dyn HostMemory>>,
    len: usize,
}

impl AlignedBytes {
    /// Bytes that a device copies, up to the size of `memory`.
    pub fn for_device(memory: Box<dyn HostMemory>) -> AlignedBytes {
        AlignedBytes { device: Some(memory), ..AlignedBytes::default() }
    }

    /// Makes room for at least `bytes`, so that later use up to there does not allocate.
    pub fn reserve(&mut self, bytes: usize) {
        let words = bytes.div_ceil(8);
        if self.words.len() < words && self.device_words() < words {
            self.words.resize(words, 0);
        }
    }

    /// Sets the length. The content is whatever was there before: the user overwrites all of it.
    pub fn set_len(&mut self, bytes: usize) {
        self.reserve(bytes);
        self.len = bytes;
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes held, used or not.
    pub fn capacity_bytes(&self) -> usize {
        (self.words.len() + self.device_words()) * 8
    }

    pub fn bytes(&self) -> &[u8] {
        let words = match self.device() {
            Some(memory) => memory.words(),
            None => &self.words,
        };
        &bytemuck::cast_slice(words)[..self.len]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        let words = match self.is_in_device() {
            true => self.device.as_mut().expect("just asked").words_mut(),
            false => &mut self.words,
        };
        &mut bytemuck::cast_slice_mut(words)[..len]
    }

    /// The memory that a device copies, if the bytes lie there.
    pub fn device(&self) -> Option<&dyn HostMemory> {
        self.device.as_deref().filter(|_| self.is_in_device())
    }

    pub fn device_mut(&mut self) -> Option<&mut dyn HostMemory> {
        match self.is_in_device() {
            true => self.device.as_deref_mut().map(|memory| memory as &mut dyn HostMemory),
            false => None,
        }
    }

    fn is_in_device(&self) -> bool {
        self.device.is_some() && self.len.div_ceil(8) <= self.device_words()
    }

    fn device_words(&self) -> usize {
        self.device.as_ref().map_or(0, |memory| memory.len_words())
    }

    /// Viewed as elements of `T`. Panics when the length is no multiple of `T`'s size: a bug of ours.
    pub fn as_slice<T: bytemuck::AnyBitPattern>(&self) -> &[T] {
        bytemuck::cast_slice(self.bytes())
    }

    pub fn as_mut_slice<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.bytes_mut())
    }
}

/// A batch as the model sees it.
#[derive(Clone, Copy, Debug)]
pub struct BatchView<'a> {
    pub contract: &'a Contract,
    pub layout: Layout,
    pub rows: u32,
    /// Length that every row is padded to, or of the longest where none is; 1 where the model has no length.
    pub padded_len: u32,
    /// Real length of each row: the mask, in its shortest form.
    pub lens: &'a [u32],
    /// One per input of the contract, in its order: `[rows, padded_len, …]`, or `[sum of lens, …]`.
    pub inputs: &'a [AlignedBytes],
}

impl<'a> BatchView<'a> {
    /// All elements of input `index`, row after row, padding included.
    pub fn input<T: bytemuck::AnyBitPattern>(&self, index: usize) -> &'a [T] {
        self.inputs[index].as_slice()
    }

    /// The real elements of one row.
    pub fn row<T: bytemuck::AnyBitPattern>(&self, index: usize, row: usize) -> &'a [T] {
        let spec = &self.contract.inputs[index];
        let start = self.start(index, row);
        bytemuck::cast_slice(&self.inputs[index].bytes()[start..start + spec.row_bytes(self.lens[row])])
    }

    /// Where the places of some rows lie in an input, in bytes.
    pub fn places(&self, index: usize, rows: Range<u32>) -> Range<usize> {
        self.start(index, rows.start as usize)..self.start(index, rows.end as usize)
    }

    fn start(&self, index: usize, row: usize) -> usize {
        let spec = &self.contract.inputs[index];
        match self.layout {
            Layout::Padded => row * spec.row_bytes(self.padded_len),
            Layout::Packed => self.lens[..row].iter().map(|len| spec.row_bytes(*len)).sum(),
        }
    }
}

/// A row that ended without a result although its batch ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowError {
    pub row: u32,
    pub code: Code,
    pub message: String,
}

/// Where a model puts its results. Reused from batch to batch.
#[derive(Debug)]
pub struct BatchOutput {
    pub outputs: Vec<AlignedBytes>,
    /// Rows that failed alone. Their mates are answered all the same.
    pub row_errors: Vec<RowError>,
    /// Cells that were computed, where the model computes more than the batch has; 0: no more than that.
    pub cells_computed: u64,
    pub layout: Layout,
    pub rows: u32,
    pub padded_len: u32,
    /// Sum of the lengths before each row, where rows lie end to end.
    starts: Vec<u32>,
    _live: Live,
}

impl Default for BatchOutput {
    fn default() -> BatchOutput {
        BatchOutput {
            outputs: Vec::new(),
            row_errors: Vec::new(),
            cells_computed: 0,
            layout: Layout::default(),
            rows: 0,
            padded_len: 0,
            starts: Vec::new(),
            _live: Live::new(Kind::Output),
        }
    }
}

impl BatchOutput {
    /// With buffers of its own, instead of those that it would grow.
    pub fn in_buffers(outputs: Vec<AlignedBytes>) -> BatchOutput {
        BatchOutput { outputs, ..BatchOutput::default() }
    }

    /// Sizes every output for rows of these lengths. Contents are left as they were: the model writes all.
    pub fn prepare(&mut self, contract: &Contract, layout: Layout, lens: &[u32], padded_len: u32) {
        let rows = lens.len();
        self.layout = layout;
        self.rows = rows as u32;
        self.padded_len = padded_len;
        self.starts.clear();
        let mut total = 0;
        if layout == Layout::Packed {
            for len in lens {
                self.starts.push(total);
                total += len;
            }
        }
        self.row_errors.clear();
        self.cells_computed = 0;
        if self.outputs.len() < contract.outputs.len() {
            self.outputs.resize_with(contract.outputs.len(), AlignedBytes::default);
        }
        // Buffers of a model with more outputs are kept, empty, for when it runs here again.
        self.outputs[contract.outputs.len()..].iter_mut().for_each(|unused| unused.set_len(0));
        for (spec, output) in contract.outputs.iter().zip(&mut self.outputs) {
            // A length is the first dimension or none (contract.rs), so rows of different lengths add up.
            output.set_len(match layout {
                Layout::Packed if spec.has_length() => spec.row_bytes(total),
                _ => rows * spec.row_bytes(padded_len),
            });
        }
    }

    /// All elements of output `index`, row after row.
    pub fn output_mut<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(&mut self, index: usize) -> &mut [T] {
        self.outputs[index].as_mut_slice()
    }

    /// The real bytes of one row whose length is `len`.
    pub fn row_bytes(&self, spec: &TensorSpec, index: usize, row: u32, len: u32) -> &[u8] {
        let start = self.start(spec, row);
        &self.outputs[index].bytes()[start..start + spec.row_bytes(len)]
    }

    fn start(&self, spec: &TensorSpec, row: u32) -> usize {
        match self.layout {
            Layout::Packed if spec.has_length() => spec.row_bytes(self.starts[row as usize]),
            _ => row as usize * spec.row_bytes(self.padded_len),
        }
    }

    /// Takes the answers over that some of its rows got when they ran by themselves, and their errors.
    pub fn take_rows(&mut self, contract: &Contract, rows: Range<u32>, from: &mut BatchOutput) {
        for (index, spec) in contract.outputs.iter().enumerate() {
            let (start, bytes) = (self.start(spec, rows.start), from.outputs[index].bytes());
            self.outputs[index].bytes_mut()[start..start + bytes.len()].copy_from_slice(bytes);
        }
        let moved = |error: RowError| RowError { row: rows.start + error.row, ..error };
        self.row_errors.extend(from.row_errors.drain(..).map(moved));
    }

    /// Says what a model made of its outputs that it should not have: they have their sizes before it runs, and a row that fails
    /// is one of the batch.
    pub fn check(&self, contract: &Contract, batch: (Layout, &[u32], u32)) -> Result<(), String> {
        let (layout, lens, padded_len) = batch;
        let (rows, found) = (lens.len() as u32, (self.layout, self.rows, self.padded_len));
        if found != (layout, rows, padded_len) {
            return Err(format!("expected {:?}, got {found:?}", (layout, rows, padded_len)));
        }
        let total = lens.iter().sum();
        for (index, spec) in contract.outputs.iter().enumerate() {
            let expected = match layout {
                Layout::Packed if spec.has_length() => spec.row_bytes(total),
                _ => rows as usize * spec.row_bytes(padded_len),
            };
            let found = self.outputs.get(index).map(AlignedBytes::len);
            if found != Some(expected) {
                return Err(format!("output {}: expected {expected} bytes, got {found:?}", spec.name));
            }
        }
        match self.row_errors.iter().find(|error| error.row >= rows) {
            Some(error) => Err(format!("expected errors of {rows} rows, got one of row {}", error.row)),
            None => Ok(()),
        }
    }
}
