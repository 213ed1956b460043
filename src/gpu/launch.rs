//! A kernel launch as data.
//!
//! Always true
//! - A span lies within its memory.

use crate::vocab::DType;

/// Memory of a device, as a driver hands it out.
pub trait Memory {
    fn bytes(&self) -> usize;
}

/// A part of a device's memory.
#[derive(Debug)]
pub struct Span<'a, M> {
    pub memory: &'a M,
    /// First byte.
    pub at: usize,
    pub bytes: usize,
}

impl<M> Clone for Span<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Span<'_, M> {}

impl<'a, M: Memory> Span<'a, M> {
    /// All of it.
    pub fn of(memory: &'a M) -> Span<'a, M> {
        Span { memory, at: 0, bytes: memory.bytes() }
    }

    /// `bytes` from `at`. Panics beyond the end: a bug of ours.
    pub fn part(&self, at: usize, bytes: usize) -> Span<'a, M> {
        assert!(at + bytes <= self.bytes, "{at} + {bytes} bytes of {}", self.bytes);
        Span { memory: self.memory, at: self.at + at, bytes }
    }
}

/// One argument of a kernel, in the order of its parameters.
#[derive(Debug)]
pub enum Arg<'a, M> {
    Memory(Span<'a, M>),
    /// A pointer parameter that the kernel may do without.
    Null,
    I32(i32),
    F32(f32),
    /// Eight bytes as they are: an element of any type.
    Bits(u64),
}

impl<M> Clone for Arg<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for Arg<'_, M> {}

/// Most arguments of a kernel.
pub const ARGS_MAX: usize = 12;

/// A kernel, its grid and what it is given.
#[derive(Debug)]
pub struct Launch<'a, M> {
    /// As the kernel is exported: `add_norm_bf16`.
    pub function: &'static str,
    pub grid: [u32; 3],
    /// Threads of a block, along x.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    args: [Arg<'a, M>; ARGS_MAX],
    count: usize,
}

impl<'a, M> Launch<'a, M> {
    pub fn new(function: &'static str, grid: [u32; 3], block: u32, shared_bytes: u32, args: &[Arg<'a, M>]) -> Self {
        let mut all = [Arg::Null; ARGS_MAX];
        all[..args.len()].copy_from_slice(args);
        Launch { function, grid, block, shared_bytes, args: all, count: args.len() }
    }

    pub fn args(&self) -> &[Arg<'a, M>] {
        &self.args[..self.count]
    }
}

/// What activations are kept in. Sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    F32,
    F16,
    BF16,
}

impl Float {
    pub fn bytes(self) -> usize {
        self.dtype().size()
    }

    pub fn dtype(self) -> DType {
        match self {
            Float::F32 => DType::F32,
            Float::F16 => DType::F16,
            Float::BF16 => DType::BF16,
        }
    }
}

/// The table that says how rows lie end to end: 32-bit integers, `[rows, tokens, longest, 0]`, then where each row starts, and
/// where the last one ends. Kernels take counts from it and not from their arguments, so that one captured graph serves every
/// batch of at most its size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table;

impl Table {
    /// Integers before the starts.
    pub const HEAD: usize = 4;

    /// Integers of a table of `rows`.
    pub const fn len(rows: usize) -> usize {
        Table::HEAD + rows + 1
    }

    /// Writes the table of rows of these lengths. `out` has [`Table::len`] places.
    pub fn write(lens: &[u32], out: &mut [i32]) {
        assert_eq!(out.len(), Table::len(lens.len()), "a place for each start");
        let mut start = 0;
        for (len, place) in lens.iter().zip(&mut out[Table::HEAD..]) {
            *place = start;
            start += *len as i32;
        }
        out[Table::HEAD + lens.len()] = start;
        let longest = lens.iter().copied().max().unwrap_or(0) as i32;
        out[..Table::HEAD].copy_from_slice(&[lens.len() as i32, start, longest, 0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_where_rows_start() {
        let mut table = [0; Table::len(3)];
        Table::write(&[2, 1, 4], &mut table);
        assert_eq!(table, [3, 7, 4, 0, 0, 2, 3, 7]);
    }
}
