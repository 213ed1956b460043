//! Floats that begin at a cache line.

/// Floats of the widest vector: 64 bytes, which is also a cache line.
const LINE: usize = 16;

/// A buffer whose first element starts a cache line, so that no vector in it crosses one. Never shrinks.
#[derive(Debug, Default)]
pub struct Floats {
    memory: Vec<f32>,
    start: usize,
    len: usize,
}

impl Floats {
    pub fn with_len(len: usize) -> Floats {
        let mut floats = Floats::default();
        floats.reserve(len);
        floats
    }

    /// Makes room for `len` values, zero where they are new. Up to there nothing allocates later, and every page is there.
    pub fn reserve(&mut self, len: usize) {
        if len <= self.len {
            return;
        }
        let mut memory = Vec::with_capacity(len + LINE);
        // Written, not asked for as zeros: pages that the system promises come one fault at a time, in the first batch.
        memory.resize(len + LINE, 0.0f32);
        self.start = memory.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        self.memory = memory;
        self.len = len;
    }

    pub fn as_slice(&self) -> &[f32] {
        &self.memory[self.start..self.start + self.len]
    }

    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
