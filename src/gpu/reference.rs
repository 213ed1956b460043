//! What each kernel computes, plainly: the references that kernels are compared with, and a dispatcher for simulated devices.
//!
//! Always true
//! - Arithmetic is f64, rounded to f32 once per result, so that a kernel's error is measured and not this file's.
//! - Only places of the batch that the table describes are written. The rest of a buffer keeps what it holds.
//!
//! Elsewhere: how the kernels are launched (ops.rs), the kernels (the folder kernels/), fast CPU kernels (src/kernels).

use std::ops::Range;

use half::{bf16, f16};

use super::launch::{Float, Table};

/// The rows of a batch, read from a table as [`Table::write`] makes it.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    table: &'a [i32],
}

impl<'a> Rows<'a> {
    /// `table` may be longer than its rows need: buffers are made for the largest batch.
    pub fn new(table: &'a [i32]) -> Rows<'a> {
        assert!(table.len() >= Table::len(table[0] as usize), "a start for each row");
        Rows { table }
    }

    pub fn count(&self) -> usize {
        self.table[0] as usize
    }

    pub fn tokens(&self) -> usize {
        self.table[1] as usize
    }

    /// Where the tokens of a row lie.
    pub fn range(&self, row: usize) -> Range<usize> {
        self.table[Table::HEAD + row] as usize..self.table[Table::HEAD + row + 1] as usize
    }

    fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.count()).map(move |row| self.range(row))
    }
}

/// A padded batch: places of a row, and elements of a place.
#[derive(Clone, Copy, Debug)]
pub struct Padded {
    pub len: usize,
    pub per_place: usize,
}

/// Rows that lie end to end, each to its place of `shape.len`; the rest of a place is `pad`. `mask` and `positions` are
/// `[rows, len]`.
pub fn unpack<E: Copy>(
    rows: Rows,
    shape: Padded,
    ragged: &[E],
    padded: &mut [E],
    mask: Option<&mut [f32]>,
    positions: Option<&mut [u32]>,
    pad: E,
) {
    let Padded { len, per_place } = shape;
    for (row, range) in rows.ranges().enumerate() {
        let place = &mut padded[row * len * per_place..(row + 1) * len * per_place];
        place.fill(pad);
        place[..range.len() * per_place].copy_from_slice(&ragged[range.start * per_place..range.end * per_place]);
    }
    if let Some(mask) = mask {
        for (row, range) in rows.ranges().enumerate() {
            for place in 0..len {
                mask[row * len + place] = if place < range.len() { 1.0 } else { 0.0 };
            }
        }
    }
    if let Some(positions) = positions {
        for row in 0..rows.count() {
            for place in 0..len {
                positions[row * len + place] = place as u32;
            }
        }
    }
}

/// The way back: the real places of each row, end to end.
pub fn gather<E: Copy>(rows: Rows, shape: Padded, padded: &[E], ragged: &mut [E]) {
    let Padded { len, per_place } = shape;
    for (row, range) in rows.ranges().enumerate() {
        let from = row * len * per_place;
        ragged[range.start * per_place..range.end * per_place]
            .copy_from_slice(&padded[from..from + range.len() * per_place]);
    }
}

/// Weight and shift of a layer norm, and what is added to the variance.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    pub weight: &'a [f32],
    pub shift: &'a [f32],
    pub eps: f32,
}

impl Norm<'_> {
    /// Writes the layer norm of `values` to `out`.
    fn write(&self, values: &[f64], out: &mut [f32]) {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / count;
        let factor = 1.0 / (variance + f64::from(self.eps)).sqrt();
        for (i, x) in values.iter().enumerate() {
            out[i] = ((x - mean) * factor * f64::from(self.weight[i]) + f64::from(self.shift[i])) as f32;
        }
    }
}

/// What a token's embedding is summed from. Tables are `[…][hidden]`; `words` gives the row of an id.
pub struct Embedding<'a> {
    pub ids: &'a [u32],
    pub words: &'a dyn Fn(u32) -> Vec<f32>,
    pub places: &'a [f32],
    /// Of each token, and the rows they choose.
    pub segments: Option<(&'a [u32], &'a [f32])>,
}

/// `out[token] = layer_norm(words[id] + places[place in its row] + segment_rows[segment])`.
pub fn embed_norm(rows: Rows, from: &Embedding, norm: Norm, out: &mut [f32]) {
    let hidden = norm.weight.len();
    for range in rows.ranges() {
        for token in range.clone() {
            let place = token - range.start;
            let mut sum: Vec<f64> = (from.words)(from.ids[token]).into_iter().map(f64::from).collect();
            add(&mut sum, &from.places[place * hidden..][..hidden]);
            if let Some((segments, segment_rows)) = from.segments {
                add(&mut sum, &segment_rows[segments[token] as usize * hidden..][..hidden]);
            }
            norm.write(&sum, &mut out[token * hidden..][..hidden]);
        }
    }
}

fn add(sum: &mut [f64], more: &[f32]) {
    for (sum, x) in sum.iter_mut().zip(more) {
        *sum += f64::from(*x);
    }
}

/// `x[token] = layer_norm(x + y + bias)`.
pub fn add_norm(rows: Rows, x: &mut [f32], y: &[f32], bias: Option<&[f32]>, norm: Norm) {
    let hidden = norm.weight.len();
    for token in 0..rows.tokens() {
        let x = &mut x[token * hidden..][..hidden];
        let mut sum: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        add(&mut sum, &y[token * hidden..][..hidden]);
        if let Some(bias) = bias {
            add(&mut sum, bias);
        }
        norm.write(&sum, x);
    }
}

/// As kernels number them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    None = 0,
    GeluErf = 1,
    GeluTanh = 2,
    Relu = 3,
    Tanh = 4,
}

impl Activation {
    pub const ALL: [Activation; 5] =
        [Activation::None, Activation::GeluErf, Activation::GeluTanh, Activation::Relu, Activation::Tanh];

    fn of(number: i32) -> Result<Activation, String> {
        Activation::ALL.into_iter().find(|a| *a as i32 == number).ok_or_else(|| format!("no activation {number}"))
    }

    fn apply(self, x: f64) -> f64 {
        match self {
            Activation::None => x,
            Activation::GeluErf => 0.5 * x * (1.0 + erf(x / 2.0f64.sqrt())),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
            }
            Activation::Relu => x.max(0.0),
            Activation::Tanh => x.tanh(),
        }
    }
}

/// erf by the series whose terms are all positive (Abramowitz and Stegun 7.1.6), so that nothing cancels.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum(); // 1 - erf(6) is 2e-17
    }
    let mut term = x;
    let mut sum = x;
    let mut n = 0.0;
    while term.abs() > sum.abs() * 1e-17 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
}

/// `x[token] = activation(x + bias)`, `width` values per token.
pub fn bias_act(rows: Rows, x: &mut [f32], bias: Option<&[f32]>, width: usize, activation: Activation) {
    for (i, x) in x[..rows.tokens() * width].iter_mut().enumerate() {
        let bias = bias.map_or(0.0, |bias| bias[i % width]);
        *x = activation.apply(f64::from(*x) + f64::from(bias)) as f32;
    }
}

/// The shares of some scores: non-negative, and 1 together. None of none.
fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

/// Shares of `scores * scale`, in place. `scores` is `[rows, heads, len, len]`: a share beyond a row's length is 0, and so is
/// every share of a query beyond it.
pub fn masked_softmax(rows: Rows, scores: &mut [f32], heads: usize, len: usize, scale: f32) {
    for (row, range) in rows.ranges().enumerate() {
        for line in 0..heads * len {
            let scores = &mut scores[(row * heads * len + line) * len..][..len];
            let real = if line % len < range.len() { range.len() } else { 0 };
            let scaled: Vec<f64> = scores[..real].iter().map(|x| f64::from(*x) * f64::from(scale)).collect();
            scores.fill(0.0);
            for (score, share) in scores.iter_mut().zip(softmax(&scaled)) {
                *score = share as f32;
            }
        }
    }
}

/// Scaled dot-product attention of rows that lie end to end. `qkv` is `[tokens][3 * heads * size]`: of each token the queries
/// of all heads, then the keys, then the values. `context` is `[tokens][heads * size]`.
pub fn attention(rows: Rows, qkv: &[f32], context: &mut [f32], heads: usize, size: usize, scale: f32) {
    let width = heads * size;
    let part =
        |token: usize, which: usize, head: usize| &qkv[token * 3 * width + which * width + head * size..][..size];
    for range in rows.ranges() {
        for head in 0..heads {
            for query in range.clone() {
                let q = part(query, 0, head);
                let scores: Vec<f64> = range.clone().map(|key| dot(q, part(key, 1, head)) * f64::from(scale)).collect();
                let mut sum = vec![0.0; size];
                for (key, share) in range.clone().zip(softmax(&scores)) {
                    for (sum, value) in sum.iter_mut().zip(part(key, 2, head)) {
                        *sum += share * f64::from(*value);
                    }
                }
                for (out, sum) in context[query * width + head * size..].iter_mut().zip(sum) {
                    *out = sum as f32;
                }
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// As kernels number them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    Mean = 0,
    First = 1,
    Max = 2,
}

impl Pool {
    pub const ALL: [Pool; 3] = [Pool::Mean, Pool::First, Pool::Max];

    fn of(number: i32) -> Result<Pool, String> {
        Pool::ALL.into_iter().find(|pool| *pool as i32 == number).ok_or_else(|| format!("no pooling {number}"))
    }
}

/// Keeps the division by a row's length finite for a row of length zero.
const NORM_MIN: f64 = 1e-12;

/// One vector per row, of L2 length 1 if `normalize`. `out` is `[rows][hidden]`; a row of no tokens gives zeros.
pub fn pool(rows: Rows, x: &[f32], out: &mut [f32], hidden: usize, mode: Pool, normalize: bool) {
    for (row, range) in rows.ranges().enumerate() {
        let column = |i: usize| range.clone().map(move |token| f64::from(x[token * hidden + i]));
        let mut pooled: Vec<f64> = (0..hidden)
            .map(|i| match mode {
                _ if range.is_empty() => 0.0,
                Pool::Mean => column(i).sum::<f64>() / range.len() as f64,
                Pool::First => column(i).next().expect("a token: the row is not empty"),
                Pool::Max => column(i).fold(f64::NEG_INFINITY, f64::max),
            })
            .collect();
        if normalize {
            let norm = pooled.iter().map(|x| x * x).sum::<f64>().sqrt().max(NORM_MIN);
            pooled.iter_mut().for_each(|x| *x /= norm);
        }
        for (out, x) in out[row * hidden..].iter_mut().zip(pooled) {
            *out = x as f32;
        }
    }
}

/// `y = activation(x · wᵀ + bias)` for `y` of `[rows][outputs]`; `x` is `[rows][inputs]`, `w` is `[outputs][inputs]`.
pub fn dense(rows: Rows, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32], outputs: usize, then: Activation) {
    let count = rows.count();
    let inputs = w.len() / outputs;
    gemm(count, inputs, outputs, x, w, bias, y);
    y[..count * outputs].iter_mut().for_each(|y| *y = then.apply(f64::from(*y)) as f32);
}

/// `y = x · wᵀ + bias`: `x` is `[tokens][inputs]`, `w` is `[outputs][inputs]`, `y` is `[tokens][outputs]`.
pub fn gemm(tokens: usize, inputs: usize, outputs: usize, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    for token in 0..tokens {
        let x = &x[token * inputs..][..inputs];
        for output in 0..outputs {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[output]));
            y[token * outputs + output] = (dot(x, &w[output * inputs..][..inputs]) + bias) as f32;
        }
    }
}

/// An argument of a launch, for a device whose memory a host reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// `bytes` of memory `id` from byte `at`.
    Memory {
        id: usize,
        at: usize,
        bytes: usize,
    },
    Null,
    I32(i32),
    F32(f32),
    Bits(u64),
}

/// A simulated device's memory.
pub trait HostMemory {
    fn bytes(&self, id: usize) -> &[u8];
    fn bytes_mut(&mut self, id: usize) -> &mut [u8];
}

/// Carries out a launch of this kernel by its reference. An error names what does not fit: an unknown kernel, an argument
/// of another kind, a span that is too short for the batch.
pub fn execute(function: &str, args: &[Value], memory: &mut dyn HostMemory) -> Result<(), String> {
    let mut call = Call { function, args, memory };
    let mut parts = function.rsplitn(2, '_');
    let last = parts.next().unwrap_or_default();
    let operation = parts.next().unwrap_or_default();
    if let (Some(float), Some(size)) = (operation.strip_prefix("attention_").and_then(float_named), last.parse().ok()) {
        return call.attention(float, size);
    }
    match (operation, last, float_named(last)) {
        ("unpack", "u8", _) => call.unpack::<1>(),
        ("unpack", "u16", _) => call.unpack::<2>(),
        ("unpack", "u32", _) => call.unpack::<4>(),
        ("unpack", "u64", _) => call.unpack::<8>(),
        ("gather", "u8", _) => call.gather::<1>(),
        ("gather", "u16", _) => call.gather::<2>(),
        ("gather", "u32", _) => call.gather::<4>(),
        ("gather", "u64", _) => call.gather::<8>(),
        ("embed_norm", _, Some(float)) => call.embed_norm(float),
        ("add_norm", _, Some(float)) => call.add_norm(float),
        ("bias_act", _, Some(float)) => call.bias_act(float),
        ("masked_softmax", _, Some(float)) => call.masked_softmax(float),
        ("pool", _, Some(float)) => call.pool(float),
        ("dense", "f32", _) => call.dense(),
        _ => Err(format!("no kernel {function}")),
    }
}

fn float_named(name: &str) -> Option<Float> {
    [Float::F32, Float::F16, Float::BF16].into_iter().find(|float| float.dtype().name() == name)
}

/// The first values of `bytes`, as f32.
pub fn decode(float: Float, bytes: &[u8]) -> Vec<f32> {
    let pairs = |bytes: &[u8]| bytes.as_chunks::<2>().0.to_vec();
    match float {
        Float::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Float::F16 => pairs(bytes).into_iter().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Float::BF16 => pairs(bytes).into_iter().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
    }
}

/// The way back, rounding to the nearest.
pub fn encode(float: Float, values: &[f32]) -> Vec<u8> {
    match float {
        Float::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Float::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Float::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
    }
}

struct Call<'a> {
    function: &'a str,
    args: &'a [Value],
    memory: &'a mut dyn HostMemory,
}

impl Call<'_> {
    fn fault<T>(&self, n: usize, what: &str) -> Result<T, String> {
        Err(format!("argument {n} of {}: {what}", self.function))
    }

    fn value(&self, n: usize) -> Result<Value, String> {
        self.args.get(n).copied().map_or_else(|| self.fault(n, "missing"), Ok)
    }

    fn count(&self, n: usize) -> Result<usize, String> {
        match self.value(n)? {
            Value::I32(x) if x >= 0 => Ok(x as usize),
            _ => self.fault(n, "no count"),
        }
    }

    fn f32(&self, n: usize) -> Result<f32, String> {
        match self.value(n)? {
            Value::F32(x) => Ok(x),
            _ => self.fault(n, "no f32"),
        }
    }

    fn is_null(&self, n: usize) -> Result<bool, String> {
        Ok(self.value(n)? == Value::Null)
    }

    /// Where `bytes` of a memory argument lie, `skip` bytes into it.
    fn place(&self, n: usize, skip: usize, bytes: usize) -> Result<(usize, Range<usize>), String> {
        match self.value(n)? {
            Value::Memory { id, at, bytes: whole } if skip + bytes <= whole => Ok((id, at + skip..at + skip + bytes)),
            Value::Memory { bytes: whole, .. } => {
                self.fault(n, &format!("{whole} bytes where the batch needs {}", skip + bytes))
            }
            _ => self.fault(n, "no memory"),
        }
    }

    fn raw(&self, n: usize, skip: usize, bytes: usize) -> Result<&[u8], String> {
        let (id, range) = self.place(n, skip, bytes)?;
        self.memory.bytes(id).get(range).map_or_else(|| self.fault(n, "beyond its memory"), Ok)
    }

    fn elements<const N: usize>(&self, n: usize, count: usize) -> Result<Vec<[u8; N]>, String> {
        Ok(self.raw(n, 0, count * N)?.as_chunks().0.to_vec())
    }

    fn u32s(&self, n: usize, count: usize) -> Result<Vec<u32>, String> {
        Ok(self.elements(n, count)?.into_iter().map(u32::from_le_bytes).collect())
    }

    fn floats(&self, n: usize, float: Float, count: usize) -> Result<Vec<f32>, String> {
        Ok(decode(float, self.raw(n, 0, count * float.bytes())?))
    }

    fn floats_or_null(&self, n: usize, float: Float, count: usize) -> Result<Option<Vec<f32>>, String> {
        Ok(if self.is_null(n)? { None } else { Some(self.floats(n, float, count)?) })
    }

    fn table(&self) -> Result<Vec<i32>, String> {
        let rows = i32::from_le_bytes(self.elements(0, 1)?[0]);
        if rows < 0 {
            return self.fault(0, "a negative count of rows");
        }
        Ok(self.elements(0, Table::len(rows as usize))?.into_iter().map(i32::from_le_bytes).collect())
    }

    fn put(&mut self, n: usize, bytes: &[u8]) -> Result<(), String> {
        let (id, range) = self.place(n, 0, bytes.len())?;
        let function = self.function;
        self.memory
            .bytes_mut(id)
            .get_mut(range)
            .ok_or_else(|| format!("argument {n} of {function}: beyond its memory"))?
            .copy_from_slice(bytes);
        Ok(())
    }

    fn put_floats(&mut self, n: usize, float: Float, values: &[f32]) -> Result<(), String> {
        self.put(n, &encode(float, values))
    }

    fn norm(&self, weight: usize, hidden: usize) -> Result<(Vec<f32>, Vec<f32>), String> {
        Ok((self.floats(weight, Float::F32, hidden)?, self.floats(weight + 1, Float::F32, hidden)?))
    }

    fn unpack<const N: usize>(&mut self) -> Result<(), String> {
        let table = self.table()?;
        let rows = Rows::new(&table);
        let shape = Padded { len: self.count(5)?, per_place: self.count(6)? };
        let Value::Bits(pad) = self.value(7)? else { return self.fault(7, "no bits") };
        let pad = *pad.to_le_bytes().first_chunk::<N>().expect("at most eight bytes");
        let places = rows.count() * shape.len;
        let ragged = self.elements::<N>(1, rows.tokens() * shape.per_place)?;
        let mut padded = vec![[0; N]; places * shape.per_place];
        let mut mask = (!self.is_null(3)?).then(|| vec![0.0; places]);
        let mut positions = (!self.is_null(4)?).then(|| vec![0; places]);
        unpack(rows, shape, &ragged, &mut padded, mask.as_deref_mut(), positions.as_deref_mut(), pad);
        self.put(2, padded.as_flattened())?;
        if let Some(mask) = mask {
            self.put_floats(3, Float::F32, &mask)?;
        }
        if let Some(positions) = positions {
            self.put(4, &positions.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
        }
        Ok(())
    }

    fn gather<const N: usize>(&mut self) -> Result<(), String> {
        let table = self.table()?;
        let rows = Rows::new(&table);
        let shape = Padded { len: self.count(3)?, per_place: self.count(4)? };
        let padded = self.elements::<N>(1, rows.count() * shape.len * shape.per_place)?;
        let mut ragged = vec![[0; N]; rows.tokens() * shape.per_place];
        gather(rows, shape, &padded, &mut ragged);
        self.put(2, ragged.as_flattened())
    }

    fn embed_norm(&mut self, float: Float) -> Result<(), String> {
        let table = self.table()?;
        let rows = Rows::new(&table);
        let hidden = self.count(9)?;
        let row_bytes = hidden * float.bytes();
        let longest = rows.ranges().map(|range| range.len()).max().unwrap_or(0);
        let ids = self.u32s(1, rows.tokens())?;
        let segments = if self.is_null(2)? { None } else { Some(self.u32s(2, rows.tokens())?) };
        let places = self.floats(4, float, longest * hidden)?;
        let segment_count = segments.iter().flatten().max().map_or(0, |most| *most as usize + 1);
        let segment_rows = self.floats_or_null(5, float, segment_count * hidden)?;
        let (weight, shift) = self.norm(6, hidden)?;
        let eps = self.f32(10)?;
        // Of a vocabulary's rows only those that are used are read; here, so that a bad id is an error.
        for id in &ids {
            self.raw(3, *id as usize * row_bytes, row_bytes)?;
        }
        let words = |id: u32| {
            decode(float, self.raw(3, id as usize * row_bytes, row_bytes).expect("every id was looked up above"))
        };
        let segments = segments.as_deref().zip(segment_rows.as_deref());
        let mut out = vec![0.0; rows.tokens() * hidden];
        let from = Embedding { ids: &ids, words: &words, places: &places, segments };
        embed_norm(rows, &from, Norm { weight: &weight, shift: &shift, eps }, &mut out);
        self.put_floats(8, float, &out)
    }

    fn add_norm(&mut self, float: Float) -> Result<(), String> {
        let table = self.table()?;
        let rows = Rows::new(&table);
        let hidden = self.count(6)?;
        let mut x = self.floats(1, float, rows.tokens() * hidden)?;
        let y = self.floats(2, float, rows.tokens() * hidden)?;
        let bias = self.floats_or_null(3, float, hidden)?;
        let (weight, shift) = self.norm(4, hidden)?;
        add_norm(rows, &mut x, &y, bias.as_deref(), Norm { weight: &weight, shift: &shift, eps: self.f32(7)? });
        self.put_floats(1, float, &x)
    }

    fn bias_act(&mut self, float: Float) -> Result<(), String> {
        let table = self.table()?;
        let rows = Rows::new(&table);
        let width = self.count(3)?;
        let mut x = self.floats(1, float, rows.tokens() * width)?;
        let bias = self.floats_or_null(2, float, width)?;
        bias_act(rows, &mut x, bias.as_deref(), width, Activation::of(self.count(4)? as i32)?);
        self.put_floats(1, float, &x)
    }

    fn masked_softmax(&mut self, float: Float) -> Result<(), String> {
        let table = self.table()?;
        let rows = Rows::new(&table);
        let (heads, len) = (self.count(2)?, self.count(3)?);
        let mut scores = self.floats(1, float, rows.count() * heads * len * len)?;
        masked_softmax(rows, &mut scores, heads, len, self.f32(4)?);
        self.put_floats(1, float, &scores)
    }

    fn attention(&mut self, float: Float, size: usize) -> Result<(), String> {
        let table = self.table()?;
        let rows = Rows::new(&table);
        let heads = self.count(3)?;
        let qkv = self.floats(1, float, rows.tokens() * 3 * heads * size)?;
        let mut context = vec![0.0; rows.tokens() * heads * size];
        attention(rows, &qkv, &mut context, heads, size, self.f32(4)?);
        self.put_floats(2, float, &context)
    }

    fn pool(&mut self, float: Float) -> Result<(), String> {
        let table = self.table()?;
        let rows = Rows::new(&table);
        let hidden = self.count(3)?;
        let x = self.floats(1, float, rows.tokens() * hidden)?;
        let mut out = vec![0.0; rows.count() * hidden];
        pool(rows, &x, &mut out, hidden, Pool::of(self.count(4)? as i32)?, self.count(5)? != 0);
        self.put_floats(2, Float::F32, &out)
    }

    fn dense(&mut self) -> Result<(), String> {
        let table = self.table()?;
        let rows = Rows::new(&table);
        let (inputs, outputs) = (self.count(5)?, self.count(6)?);
        let x = self.floats(1, Float::F32, rows.count() * inputs)?;
        let w = self.floats(2, Float::F32, outputs * inputs)?;
        let bias = self.floats_or_null(3, Float::F32, outputs)?;
        let mut y = vec![0.0; rows.count() * outputs];
        dense(rows, &x, &w, bias.as_deref(), &mut y, outputs, Activation::of(self.count(7)? as i32)?);
        self.put_floats(4, Float::F32, &y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row of two tokens and one of one.
    const TABLE: [i32; 7] = [2, 3, 2, 0, 0, 2, 3];

    #[track_caller]
    fn assert_near(got: &[f32], expected: &[f32]) {
        assert_eq!(got.len(), expected.len());
        for (i, (a, b)) in got.iter().zip(expected).enumerate() {
            assert!((a - b).abs() <= 1e-6, "{a} for {b} at {i}");
        }
    }

    #[test]
    fn rows_go_to_their_places_and_back() {
        let rows = Rows::new(&TABLE);
        let shape = Padded { len: 3, per_place: 2 };
        let ragged = [1u8, 2, 3, 4, 5, 6];
        let mut padded = [7u8; 13];
        let (mut mask, mut positions) = ([9.0; 6], [9; 6]);
        unpack(rows, shape, &ragged, &mut padded, Some(&mut mask), Some(&mut positions), 0);
        assert_eq!(padded, [1, 2, 3, 4, 0, 0, 5, 6, 0, 0, 0, 0, 7]);
        assert_eq!(mask, [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]);
        assert_eq!(positions, [0, 1, 2, 0, 1, 2]);
        let mut back = [0u8; 6];
        gather(rows, shape, &padded, &mut back);
        assert_eq!(back, ragged);
    }

    #[test]
    fn a_norm_has_mean_zero_and_variance_one_before_weight_and_shift() {
        let rows = Rows::new(&[1, 1, 1, 0, 0, 1]);
        let norm = Norm { weight: &[1.0, 1.0, 2.0, 1.0], shift: &[0.0, 0.0, 0.0, 10.0], eps: 0.0 };
        let mut x = [0.0, 1.0, 1.0, 2.0];
        // The sum is 1, -1, 1, -1.
        add_norm(rows, &mut x, &[1.0, -1.0, 0.0, -2.0], Some(&[0.0, -1.0, 0.0, -1.0]), norm);
        assert_near(&x, &[1.0, -1.0, 2.0, 9.0]);
        let words = |id: u32| if id == 5 { vec![0.0, 0.0, 2.0, 0.0] } else { vec![0.0; 4] };
        let from = Embedding {
            ids: &[5],
            words: &words,
            places: &[1.0, 0.0, -1.0, 0.0],
            segments: Some((&[1], &[9.0, 9.0, 9.0, 9.0, 0.0, -1.0, 0.0, -1.0])),
        };
        embed_norm(rows, &from, norm, &mut x);
        assert_near(&x, &[1.0, -1.0, 2.0, 9.0]);
    }

    #[test]
    fn activations_agree_with_tables() {
        // The normal distribution function at 1 is 0.8413447461.
        let expected = [1.0, 0.841_344_7, 0.841_192, 1.0, 0.761_594_2];
        for (activation, expected) in Activation::ALL.into_iter().zip(expected) {
            let mut x = [0.5];
            bias_act(Rows::new(&[1, 1, 1, 0, 0, 1]), &mut x, Some(&[0.5]), 1, activation);
            assert_near(&x, &[expected]);
        }
        assert!((erf(0.5) - 0.520_499_877_813_046_5).abs() < 1e-15 && erf(-9.0) == -1.0);
    }

    #[test]
    fn shares_are_one_together_and_none_is_beyond_the_row() {
        let mut scores = [0.0, 2f32.ln(), 5.0, 5.0, 1.0, 9.0, 9.0, 9.0];
        masked_softmax(Rows::new(&TABLE), &mut scores, 1, 2, 1.0);
        assert_near(&scores, &[1.0 / 3.0, 2.0 / 3.0, 0.5, 0.5, 1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn attention_stays_within_a_row() {
        // One head of size 1. Queries 1, keys 0 and ln 3: shares 1/4 and 3/4.
        let qkv = [1.0, 0.0, 4.0, 1.0, 3f32.ln(), 8.0, 1.0, 5.0, 6.0];
        let mut context = [0.0; 3];
        attention(Rows::new(&TABLE), &qkv, &mut context, 1, 1, 1.0);
        assert_near(&context, &[7.0, 7.0, 6.0]);
    }

    #[test]
    fn pooling_takes_the_mean_the_first_or_the_largest() {
        let x = [3.0, 0.0, -3.0, 8.0, 1.0, 1.0];
        let rows = [3, 3, 2, 0, 0, 2, 3, 3];
        let pooled = |mode, normalize| {
            let mut out = [9.0; 6];
            pool(Rows::new(&rows), &x, &mut out, 2, mode, normalize);
            out
        };
        assert_near(&pooled(Pool::Mean, false), &[0.0, 4.0, 1.0, 1.0, 0.0, 0.0]);
        assert_near(&pooled(Pool::Max, false), &[3.0, 8.0, 1.0, 1.0, 0.0, 0.0]);
        let half = 0.5f32.sqrt();
        assert_near(&pooled(Pool::First, true), &[1.0, 0.0, half, half, 0.0, 0.0]);
    }

    #[test]
    fn a_product_is_rows_times_rows() {
        let mut y = [0.0; 4];
        dense(
            Rows::new(&TABLE),
            &[1.0, 2.0, 3.0, 4.0],
            &[1.0, 1.0, 1.0, -1.0],
            Some(&[0.0, 0.5]),
            &mut y,
            2,
            Activation::Relu,
        );
        assert_near(&y, &[3.0, 0.0, 7.0, 0.0]);
    }

    struct Memories(Vec<Vec<u8>>);

    impl HostMemory for Memories {
        fn bytes(&self, id: usize) -> &[u8] {
            &self.0[id]
        }

        fn bytes_mut(&mut self, id: usize) -> &mut [u8] {
            &mut self.0[id]
        }
    }

    #[test]
    fn a_launch_is_carried_out_on_bytes() {
        let table = TABLE.iter().flat_map(|x| x.to_le_bytes()).collect();
        let x = encode(Float::F16, &[-1.0, 2.0, -3.0, 4.0]);
        let mut memories = Memories(vec![table, x]);
        let all = |id: usize, bytes| Value::Memory { id, at: 0, bytes };
        let args = |bytes| [all(0, 28), all(1, bytes), Value::Null, Value::I32(1), Value::I32(3)];
        execute("bias_act_f16", &args(8), &mut memories).expect("a known kernel");
        assert_eq!(decode(Float::F16, &memories.0[1]), [0.0, 2.0, 0.0, 4.0]);
        let error = execute("bias_act_f16", &args(4), &mut memories).expect_err("two of three tokens fit");
        assert_eq!(error, "argument 1 of bias_act_f16: 4 bytes where the batch needs 6");
        assert!(execute("bias_act_f64", &args(8), &mut memories).is_err());
    }
}
