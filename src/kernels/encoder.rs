//! A forward pass of an encoder of the BERT family on one thread, over tokens that lie end to end.
//!
//! Always true
//! - Nothing is allocated and no page is touched for the first time in a batch of at most the tokens reserved for.
//! - What a sequence is answered depends on its own real tokens only; in which batch it lay, and whether padded, changes the
//!   last bits of a mean at most.

use pulp::{Arch, Simd, WithSimd};

use super::attention::{self, Attend, Sequence};
use super::buffer::Floats;
use super::linear::{Packed, Then, linear};
use super::math;
use super::product::{self, Product, product};
use super::rows::{self, AddNorm, Norm};

/// Tokens that go through the products of a layer together: their activations stay in a core's second-level cache (1 MiB, at
/// 384 features: 0.9), while each panel of weights is used for all of them.
const GROUP: usize = 96;

/// What becomes of a sequence's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    Mean,
    /// The first token.
    Cls,
    Max,
}

/// The parameters of one layer.
#[derive(Debug)]
pub struct Layer {
    /// Query, key and value in one product, the queries' weights divided by the root of the head size.
    pub qkv: Product,
    pub attention_out: Product,
    pub attention_norm: Norm,
    pub inner: Product,
    pub out: Product,
    pub norm: Norm,
}

/// The parameters of an encoder, packed for this machine. Read-only: all instances share them.
#[derive(Debug)]
pub struct Encoder {
    pub hidden: usize,
    pub heads: usize,
    /// `[vocab][hidden]`
    pub words: Vec<f32>,
    /// `[positions][hidden]`, with the embedding of segment 0 added.
    pub places: Vec<f32>,
    /// `[segments][hidden]`, less that of segment 0. Empty where all tokens are of segment 0.
    pub segments: Vec<f32>,
    pub norm: Norm,
    pub layers: Vec<Layer>,
    pub activation: Then,
    pub pooling: Pooling,
    /// To length 1.
    pub normalize: bool,
    /// Products on what was pooled: a classifier has one or two.
    pub head: Vec<(Packed, Then)>,
}

/// What is to be computed.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Token ids of all sequences end to end, those of padding included.
    pub ids: &'a [u32],
    /// As long as `ids`, where the encoder has segments and the caller says them.
    pub segments: Option<&'a [u32]>,
    /// Real tokens of each sequence.
    pub lens: &'a [u32],
    /// Places of each sequence; without it as many as it has tokens.
    pub padded_len: Option<u32>,
}

impl Batch<'_> {
    /// Where sequence `at` lies, after one that ends at `start`.
    fn sequence(&self, at: usize, start: usize) -> Sequence {
        let real = self.lens[at] as usize;
        Sequence { start, span: self.padded_len.map_or(real, |len| len as usize), real }
    }
}

/// Memory of one thread. Grows to the largest batch and stays.
#[derive(Debug, Default)]
pub struct Scratch {
    x: Floats,
    qkv: Floats,
    context: Floats,
    y: Floats,
    inner: Floats,
    attention: Floats,
    product: product::Scratch,
    row: Vec<f32>,
    pooled: Floats,
    headed: Floats,
}

impl Encoder {
    /// Values in an answer.
    pub fn outputs(&self) -> usize {
        self.head.last().map_or(self.hidden, |(product, _)| product.outputs())
    }

    pub fn bytes(&self) -> usize {
        let floats = |values: &[f32]| size_of_val(values);
        let layers: usize = (self.layers.iter())
            .map(|l| [&l.qkv, &l.attention_out, &l.inner, &l.out].iter().map(|p| p.bytes()).sum::<usize>())
            .sum();
        let head: usize = self.head.iter().map(|(product, _)| product.bytes()).sum();
        floats(&self.words) + floats(&self.places) + floats(&self.segments) + layers + head
    }

    /// Makes room for batches of `tokens` places and `rows` sequences of up to `longest`.
    pub fn reserve(&self, scratch: &mut Scratch, tokens: usize, rows: usize, longest: usize) {
        // Blocks of the widest vectors.
        let places = tokens.next_multiple_of(32);
        let group = places.min(GROUP);
        let inner = self.layers.iter().map(|layer| layer.inner.outputs()).max().unwrap_or(0);
        scratch.x.reserve(places * self.hidden);
        scratch.qkv.reserve(places * 3 * self.hidden);
        scratch.context.reserve(places * self.hidden);
        scratch.y.reserve(group * self.hidden);
        scratch.inner.reserve(group * inner);
        for layer in &self.layers {
            for product in [&layer.qkv, &layer.attention_out, &layer.inner, &layer.out] {
                scratch.product.reserve(product, group);
            }
        }
        scratch.attention.reserve(self.shape(longest).scratch());
        if scratch.row.len() < self.hidden {
            scratch.row.resize(self.hidden, 0.0);
        }
        let widest = self.head.iter().map(|(product, _)| product.outputs()).max().unwrap_or(0).max(self.hidden);
        scratch.pooled.reserve(rows.next_multiple_of(32) * widest);
        scratch.headed.reserve(rows.next_multiple_of(32) * widest);
    }

    fn shape(&self, longest: usize) -> attention::Shape {
        attention::Shape { size: self.hidden / self.heads, heads: self.heads, longest }
    }

    /// Answers each sequence: `out` is `[sequences][outputs]`.
    ///
    /// Ids are below the vocabulary and sequences no longer than the positions: the contract sees to both.
    pub fn forward(&self, arch: Arch, scratch: &mut Scratch, batch: Batch<'_>, out: &mut [f32]) {
        let spans = (0..batch.lens.len()).map(|at| batch.sequence(at, 0).span);
        let longest = spans.clone().max().unwrap_or(0);
        assert_eq!(batch.ids.len(), spans.sum::<usize>(), "an id for each place");
        assert_eq!(out.len(), batch.lens.len() * self.outputs(), "an answer for each sequence");
        self.reserve(scratch, batch.ids.len(), batch.lens.len(), longest);
        arch.dispatch(Forward { encoder: self, scratch, batch, out });
    }
}

struct Forward<'a> {
    encoder: &'a Encoder,
    scratch: &'a mut Scratch,
    batch: Batch<'a>,
    out: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { encoder, scratch, batch, out } = self;
        let tokens = batch.ids.len();
        embed::<S>(encoder, scratch, batch);
        let places = tokens.next_multiple_of(math::width::<S>());
        let x = &mut scratch.x.as_mut_slice()[..places * encoder.hidden];
        simd.vectorize(AddNorm { norm: &encoder.norm, x, y: None });
        for layer in &encoder.layers {
            project::<S>(simd, encoder, layer, scratch, tokens);
            attend::<S>(simd, encoder, scratch, batch);
            finish::<S>(simd, encoder, layer, scratch, tokens);
        }
        answer::<S>(simd, encoder, scratch, batch, out);
    }
}

/// First token and number of tokens of each group.
#[inline(always)]
fn groups<S: Simd>(tokens: usize) -> impl Iterator<Item = (usize, usize)> {
    let width = math::width::<S>();
    // Groups of one size: a small one at the end would use each weight only a few times.
    let count = tokens.div_ceil(GROUP.next_multiple_of(width));
    let size = tokens.div_ceil(count.max(1)).next_multiple_of(width);
    (0..tokens).step_by(size.max(1)).map(move |at| (at, size.min(tokens - at)))
}

#[inline(always)]
fn embed<S: Simd>(encoder: &Encoder, scratch: &mut Scratch, batch: Batch<'_>) {
    let h = encoder.hidden;
    let x = scratch.x.as_mut_slice();
    let row = &mut scratch.row[..h];
    let mut token = 0;
    for at in 0..batch.lens.len() {
        let span = batch.sequence(at, token).span;
        for place in encoder.places.chunks_exact(h).take(span) {
            let word = &encoder.words[batch.ids[token] as usize * h..][..h];
            for ((sum, word), place) in row.iter_mut().zip(word).zip(place) {
                *sum = word + place;
            }
            if let Some(segments) = batch.segments {
                let segment = &encoder.segments[segments[token] as usize * h..][..h];
                for (sum, segment) in row.iter_mut().zip(segment) {
                    *sum += segment;
                }
            }
            rows::put_column::<S>(row, x, token);
            token += 1;
        }
    }
}

#[inline(always)]
fn project<S: Simd>(simd: S, encoder: &Encoder, layer: &Layer, scratch: &mut Scratch, tokens: usize) {
    let (h, n) = (encoder.hidden, layer.qkv.outputs());
    let (x, qkv) = (scratch.x.as_slice(), scratch.qkv.as_mut_slice());
    for (at, count) in groups::<S>(tokens) {
        product(simd, &layer.qkv, &mut scratch.product, &x[at * h..], &mut qkv[at * n..], count, Then::Nothing);
    }
}

#[inline(always)]
fn attend<S: Simd>(simd: S, encoder: &Encoder, scratch: &mut Scratch, batch: Batch<'_>) {
    let shape = encoder.shape(0);
    let (qkv, context) = (scratch.qkv.as_slice(), scratch.context.as_mut_slice());
    let mut start = 0;
    for at in 0..batch.lens.len() {
        let sequence = batch.sequence(at, start);
        let scratch = scratch.attention.as_mut_slice();
        simd.vectorize(Attend { shape, sequence, qkv, context: &mut *context, scratch });
        start += sequence.span;
    }
}

#[inline(always)]
fn finish<S: Simd>(simd: S, encoder: &Encoder, layer: &Layer, scratch: &mut Scratch, tokens: usize) {
    let h = encoder.hidden;
    let (context, x) = (scratch.context.as_slice(), scratch.x.as_mut_slice());
    let (y, inner) = (scratch.y.as_mut_slice(), scratch.inner.as_mut_slice());
    let memory = &mut scratch.product;
    for (at, count) in groups::<S>(tokens) {
        let places = count.next_multiple_of(math::width::<S>());
        let (context, x) = (&context[at * h..(at + places) * h], &mut x[at * h..(at + places) * h]);
        product(simd, &layer.attention_out, memory, context, y, count, Then::Nothing);
        simd.vectorize(AddNorm { norm: &layer.attention_norm, x, y: Some(y) });
        product(simd, &layer.inner, memory, x, inner, count, encoder.activation);
        product(simd, &layer.out, memory, inner, y, count, Then::Nothing);
        simd.vectorize(AddNorm { norm: &layer.norm, x, y: Some(y) });
    }
}

#[inline(always)]
fn answer<S: Simd>(simd: S, encoder: &Encoder, scratch: &mut Scratch, batch: Batch<'_>, out: &mut [f32]) {
    let (h, width) = (encoder.hidden, math::width::<S>());
    let x = scratch.x.as_slice();
    let sequences = batch.lens.len();
    let mut start = 0;
    for at in 0..sequences {
        let sequence = batch.sequence(at, start);
        start += sequence.span;
        let row = &mut scratch.row[..h];
        match encoder.pooling {
            Pooling::Mean => {
                rows::sum_columns::<S>(x, sequence.start, sequence.real, row);
                let share = 1.0 / sequence.real.max(1) as f32;
                row.iter_mut().for_each(|value| *value *= share);
            }
            Pooling::Cls => rows::sum_columns::<S>(x, sequence.start, sequence.real.min(1), row),
            Pooling::Max => rows::max_columns::<S>(x, sequence.start, sequence.real, row),
        }
        if encoder.normalize {
            rows::normalize(row);
        }
        if encoder.head.is_empty() {
            out[at * h..][..h].copy_from_slice(row);
        } else {
            rows::put_column::<S>(row, scratch.pooled.as_mut_slice(), at);
        }
    }
    let (pooled, headed) = (&mut scratch.pooled, &mut scratch.headed);
    for (product, then) in &encoder.head {
        linear(simd, product, pooled.as_slice(), headed.as_mut_slice(), sequences, *then);
        std::mem::swap(pooled, headed);
    }
    if let Some((last, _)) = encoder.head.last() {
        let n = last.outputs();
        let values = pooled.as_slice();
        for (at, out) in out.chunks_exact_mut(n).enumerate() {
            let block = &values[at / width * n * width..][..n * width];
            for (value, row) in out.iter_mut().zip(block.chunks_exact(width)) {
                *value = row[at % width];
            }
        }
    }
}
