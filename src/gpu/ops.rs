//! Each kernel's launch: what it is given, checked against the shapes it is used under.
//!
//! Always true
//! - Every span holds what the kernel may touch for any batch within the bounds, and lies on 16 bytes, which kernels rely on.
//! - A grid covers the bounds. Kernels take counts from the table, so a smaller batch under the same launch is right too.
//! - No block asks for more than 48 KiB of shared memory: more needs a device's leave.
//!
//! Elsewhere: what each computes (reference.rs), how (the folder kernels/, where each file states its shapes).

use super::launch::{Arg, Float, Launch, Memory, Span, Table};
use super::reference::{Activation, Pool};

/// Every exported kernel, under the file of kernels/ that holds it.
pub const FUNCTIONS: &[(&str, &[&str])] = &[
    ("unpack.cu", &UNPACK),
    ("gather.cu", &GATHER),
    ("embed_norm.cu", &EMBED_NORM),
    ("add_norm.cu", &ADD_NORM),
    ("bias_act.cu", &BIAS_ACT),
    ("softmax.cu", &MASKED_SOFTMAX),
    (
        "attention.cu",
        &[
            "attention_f32_32",
            "attention_f32_64",
            "attention_f32_128",
            "attention_f16_32",
            "attention_f16_64",
            "attention_f16_128",
            "attention_bf16_32",
            "attention_bf16_64",
            "attention_bf16_128",
        ],
    ),
    ("pool.cu", &POOL),
    ("dense.cu", &["dense_f32"]),
];

const UNPACK: [&str; 4] = ["unpack_u8", "unpack_u16", "unpack_u32", "unpack_u64"];
const GATHER: [&str; 4] = ["gather_u8", "gather_u16", "gather_u32", "gather_u64"];
// In the order of Float.
const EMBED_NORM: [&str; 3] = ["embed_norm_f32", "embed_norm_f16", "embed_norm_bf16"];
const ADD_NORM: [&str; 3] = ["add_norm_f32", "add_norm_f16", "add_norm_bf16"];
const BIAS_ACT: [&str; 3] = ["bias_act_f32", "bias_act_f16", "bias_act_bf16"];
const MASKED_SOFTMAX: [&str; 3] = ["masked_softmax_f32", "masked_softmax_f16", "masked_softmax_bf16"];
const POOL: [&str; 3] = ["pool_f32", "pool_f16", "pool_bf16"];

/// The largest batch that a launch is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub rows: usize,
    pub tokens: usize,
    /// Tokens of a row.
    pub longest: usize,
}

impl Bounds {
    /// Of a batch of rows of these lengths, exactly.
    pub fn of(lens: &[u32]) -> Bounds {
        Bounds {
            rows: lens.len(),
            tokens: lens.iter().map(|len| *len as usize).sum(),
            longest: lens.iter().copied().max().unwrap_or(0) as usize,
        }
    }
}

/// Threads of a block, where nothing else decides. As `__launch_bounds__` of the kernels has it.
const BLOCK: u32 = 128;
/// Threads that move in step.
const WARP: usize = 32;
/// Most of a grid along y and z.
const GRID_MAX: usize = 65_535;
/// Hidden values that the kernels were written and tested for.
const HIDDEN_MAX: usize = 4096;

/// Blocks that give each of `items` its place. One at least: an empty grid is refused by devices.
fn blocks(items: usize, per_block: usize) -> u32 {
    u32::try_from(items.div_ceil(per_block).max(1)).expect("fewer than 2^32 blocks")
}

/// Along y or z. A kernel steps by its grid, so less than there are items is right too.
fn lines(items: usize) -> u32 {
    items.clamp(1, GRID_MAX) as u32
}

/// A span as an argument, once it is known to hold `bytes`.
fn memory<'a, M: Memory>(what: &str, span: Span<'a, M>, bytes: usize) -> Arg<'a, M> {
    assert!(span.bytes >= bytes, "{what} of {} bytes where the bounds need {bytes}", span.bytes);
    assert!(span.at.is_multiple_of(16), "{what} starts at byte {}, and kernels load 16 at a time", span.at);
    Arg::Memory(span)
}

fn memory_or_null<'a, M: Memory>(what: &str, span: Option<Span<'a, M>>, bytes: usize) -> Arg<'a, M> {
    span.map_or(Arg::Null, |span| memory(what, span, bytes))
}

fn table<'a, M: Memory>(span: Span<'a, M>, bounds: &Bounds) -> Arg<'a, M> {
    memory("the table", span, 4 * Table::len(bounds.rows))
}

/// A count as kernels take it.
fn int<'a, M>(count: usize) -> Arg<'a, M> {
    Arg::I32(i32::try_from(count).expect("counts of one launch fit 31 bits"))
}

fn check_hidden(hidden: usize) {
    assert!(
        hidden > 0 && hidden.is_multiple_of(4) && hidden <= HIDDEN_MAX,
        "hidden is a multiple of 4 up to {HIDDEN_MAX}, not {hidden}"
    );
}

/// Which of a kernel's functions moves elements of so many bytes.
fn by_size(functions: [&'static str; 4], bytes: usize) -> &'static str {
    assert!(matches!(bytes, 1 | 2 | 4 | 8), "elements of {bytes} bytes");
    functions[bytes.ilog2() as usize]
}

/// Rows that lie end to end, to a padded batch.
pub struct Unpack<'a, M> {
    pub table: Span<'a, M>,
    pub ragged: Span<'a, M>,
    pub padded: Span<'a, M>,
    /// `[rows, padded_len]` of f32.
    pub mask: Option<Span<'a, M>>,
    /// `[rows, padded_len]` of u32.
    pub positions: Option<Span<'a, M>>,
    pub padded_len: usize,
    /// Elements of a place.
    pub per_place: usize,
    /// Its low bytes fill an element of padding.
    pub pad: u64,
}

impl<'a, M: Memory> Unpack<'a, M> {
    /// For elements of `element_bytes`.
    pub fn launch(self, bounds: &Bounds, element_bytes: usize) -> Launch<'a, M> {
        assert!(bounds.longest <= self.padded_len, "the longest row fits its place");
        let places = bounds.rows * self.padded_len;
        let of_row = self.padded_len * self.per_place;
        Launch::new(
            by_size(UNPACK, element_bytes),
            row_grid(bounds, of_row, element_bytes),
            BLOCK,
            0,
            &[
                table(self.table, bounds),
                memory("ragged", self.ragged, bounds.tokens * self.per_place * element_bytes),
                memory("padded", self.padded, places * self.per_place * element_bytes),
                memory_or_null("mask", self.mask, 4 * places),
                memory_or_null("positions", self.positions, 4 * places),
                int(self.padded_len),
                int(self.per_place),
                Arg::Bits(self.pad),
            ],
        )
    }
}

/// Blocks for rows of `elements` each: a thread moves 16 bytes where it can.
fn row_grid(bounds: &Bounds, elements: usize, element_bytes: usize) -> [u32; 3] {
    int::<()>(elements); // kernels index a row's elements with 32 bits
    [blocks(elements * element_bytes, 16 * BLOCK as usize), lines(bounds.rows), 1]
}

/// The real places of a padded batch, end to end.
pub struct Gather<'a, M> {
    pub table: Span<'a, M>,
    pub padded: Span<'a, M>,
    pub ragged: Span<'a, M>,
    pub padded_len: usize,
    pub per_place: usize,
}

impl<'a, M: Memory> Gather<'a, M> {
    pub fn launch(self, bounds: &Bounds, element_bytes: usize) -> Launch<'a, M> {
        assert!(bounds.longest <= self.padded_len, "the longest row fits its place");
        let of_row = self.padded_len * self.per_place;
        Launch::new(
            by_size(GATHER, element_bytes),
            row_grid(bounds, of_row, element_bytes),
            BLOCK,
            0,
            &[
                table(self.table, bounds),
                memory("padded", self.padded, bounds.rows * of_row * element_bytes),
                memory("ragged", self.ragged, bounds.tokens * self.per_place * element_bytes),
                int(self.padded_len),
                int(self.per_place),
            ],
        )
    }
}

/// A token to each warp.
fn token_grid(bounds: &Bounds) -> [u32; 3] {
    [blocks(bounds.tokens, BLOCK as usize / WARP), 1, 1]
}

/// The embeddings of tokens, summed and normed.
pub struct EmbedNorm<'a, M> {
    pub table: Span<'a, M>,
    /// `[tokens]` of u32, each less than the rows of `words`: the caller has checked them.
    pub ids: Span<'a, M>,
    /// `[tokens]` of u32, each less than the rows of `segment_rows`.
    pub segments: Option<Span<'a, M>>,
    pub words: Span<'a, M>,
    /// A row per place, with segment 0 added.
    pub places: Span<'a, M>,
    /// What a segment differs by from segment 0.
    pub segment_rows: Option<Span<'a, M>>,
    pub weight: Span<'a, M>,
    pub shift: Span<'a, M>,
    pub out: Span<'a, M>,
    pub hidden: usize,
    pub eps: f32,
}

impl<'a, M: Memory> EmbedNorm<'a, M> {
    pub fn launch(self, bounds: &Bounds, float: Float) -> Launch<'a, M> {
        check_hidden(self.hidden);
        assert_eq!(self.segments.is_some(), self.segment_rows.is_some(), "segments choose among rows");
        let row = self.hidden * float.bytes();
        Launch::new(
            EMBED_NORM[float as usize],
            token_grid(bounds),
            BLOCK,
            0,
            &[
                table(self.table, bounds),
                memory("ids", self.ids, 4 * bounds.tokens),
                memory_or_null("segments", self.segments, 4 * bounds.tokens),
                memory("words", self.words, row),
                memory("places", self.places, bounds.longest * row),
                memory_or_null("segment rows", self.segment_rows, row),
                memory("weight", self.weight, 4 * self.hidden),
                memory("shift", self.shift, 4 * self.hidden),
                memory("out", self.out, bounds.tokens * row),
                int(self.hidden),
                Arg::F32(self.eps),
            ],
        )
    }
}

/// `x = layer_norm(x + y + bias)`, in place.
pub struct AddNorm<'a, M> {
    pub table: Span<'a, M>,
    pub x: Span<'a, M>,
    pub y: Span<'a, M>,
    pub bias: Option<Span<'a, M>>,
    pub weight: Span<'a, M>,
    pub shift: Span<'a, M>,
    pub hidden: usize,
    pub eps: f32,
}

impl<'a, M: Memory> AddNorm<'a, M> {
    pub fn launch(self, bounds: &Bounds, float: Float) -> Launch<'a, M> {
        check_hidden(self.hidden);
        let row = self.hidden * float.bytes();
        Launch::new(
            ADD_NORM[float as usize],
            token_grid(bounds),
            BLOCK,
            0,
            &[
                table(self.table, bounds),
                memory("x", self.x, bounds.tokens * row),
                memory("y", self.y, bounds.tokens * row),
                memory_or_null("bias", self.bias, row),
                memory("weight", self.weight, 4 * self.hidden),
                memory("shift", self.shift, 4 * self.hidden),
                int(self.hidden),
                Arg::F32(self.eps),
            ],
        )
    }
}

/// `x = activation(x + bias)`, in place.
pub struct BiasAct<'a, M> {
    pub table: Span<'a, M>,
    pub x: Span<'a, M>,
    pub bias: Option<Span<'a, M>>,
    /// Values of a token.
    pub width: usize,
    pub activation: Activation,
}

impl<'a, M: Memory> BiasAct<'a, M> {
    pub fn launch(self, bounds: &Bounds, float: Float) -> Launch<'a, M> {
        assert!(self.width.is_multiple_of(4), "a width is a multiple of 4, not {}", self.width);
        let values = bounds.tokens * self.width;
        int::<()>(values); // the kernel indexes them with 32 bits
        Launch::new(
            BIAS_ACT[float as usize],
            [blocks(values, 8 * BLOCK as usize), 1, 1],
            BLOCK,
            0,
            &[
                table(self.table, bounds),
                memory("x", self.x, values * float.bytes()),
                memory_or_null("bias", self.bias, self.width * float.bytes()),
                int(self.width),
                Arg::I32(self.activation as i32),
            ],
        )
    }
}

/// Shares of padded attention scores, in place.
pub struct MaskedSoftmax<'a, M> {
    pub table: Span<'a, M>,
    /// `[rows, heads, padded_len, padded_len]`.
    pub scores: Span<'a, M>,
    pub heads: usize,
    pub padded_len: usize,
    pub scale: f32,
}

impl<'a, M: Memory> MaskedSoftmax<'a, M> {
    pub fn launch(self, bounds: &Bounds, float: Float) -> Launch<'a, M> {
        assert!(bounds.longest <= self.padded_len, "the longest row fits its place");
        let queries = bounds.rows * self.heads * self.padded_len;
        int::<()>(queries); // the kernel counts them with 32 bits
        Launch::new(
            MASKED_SOFTMAX[float as usize],
            [blocks(queries, BLOCK as usize / WARP), 1, 1],
            BLOCK,
            0,
            &[
                table(self.table, bounds),
                memory("scores", self.scores, queries * self.padded_len * float.bytes()),
                int(self.heads),
                int(self.padded_len),
                Arg::F32(self.scale),
            ],
        )
    }
}

/// Attention of rows that lie end to end.
pub struct Attention<'a, M> {
    pub table: Span<'a, M>,
    /// `[tokens][3 * heads * size]`.
    pub qkv: Span<'a, M>,
    /// `[tokens][heads * size]`.
    pub context: Span<'a, M>,
    pub heads: usize,
    /// Of a head: 32, 64 or 128.
    pub size: usize,
    pub scale: f32,
}

impl<'a, M: Memory> Attention<'a, M> {
    pub fn launch(self, bounds: &Bounds, float: Float) -> Launch<'a, M> {
        let tile = Tile::of(float, self.size);
        let width = self.heads * self.size * float.bytes();
        Launch::new(
            tile.function,
            [blocks(bounds.longest, tile.queries), lines(self.heads), lines(bounds.rows)],
            BLOCK,
            tile.shared_bytes as u32,
            &[
                table(self.table, bounds),
                memory("qkv", self.qkv, bounds.tokens * 3 * width),
                memory("context", self.context, bounds.tokens * width),
                int(self.heads),
                Arg::F32(self.scale),
            ],
        )
    }
}

/// What one block of the attention kernel works on. As attention.cu has it.
struct Tile {
    function: &'static str,
    /// Queries of a block.
    queries: usize,
    shared_bytes: usize,
}

impl Tile {
    fn of(float: Float, size: usize) -> Tile {
        let functions = FUNCTIONS.iter().find(|(file, _)| *file == "attention.cu").expect("it is in the list").1;
        let at = match size {
            32 => 0,
            64 => 1,
            128 => 2,
            _ => panic!("heads of 32, 64 or 128 values, not {size}"),
        };
        let function = functions[3 * float as usize + at];
        if float == Float::F32 {
            // Queries, keys and values of a tile, each row 4 wider than its values, and the scores.
            let (queries, keys) = if size == 128 { (32, 16) } else { (64, 32) };
            let floats = (queries + 2 * keys) * (size + 4) + queries * (keys + 4);
            Tile { function, queries, shared_bytes: 4 * floats }
        } else {
            // Keys and values, each row 8 wider than its values, and the f32 scores of 64 queries.
            let keys = if size == 128 { 32 } else { 64 };
            Tile { function, queries: 64, shared_bytes: 2 * 2 * keys * (size + 8) + 4 * 64 * (keys + 8) }
        }
    }
}

/// One vector per row.
pub struct PoolRows<'a, M> {
    pub table: Span<'a, M>,
    pub x: Span<'a, M>,
    /// `[rows][hidden]` of f32.
    pub out: Span<'a, M>,
    pub hidden: usize,
    pub mode: Pool,
    /// To L2 length 1.
    pub normalize: bool,
}

/// Threads of a pooling block: the widest row has eight values for each.
const POOL_BLOCK: u32 = 512;

impl<'a, M: Memory> PoolRows<'a, M> {
    pub fn launch(self, bounds: &Bounds, float: Float) -> Launch<'a, M> {
        check_hidden(self.hidden);
        Launch::new(
            POOL[float as usize],
            [blocks(bounds.rows, 1), 1, 1],
            POOL_BLOCK,
            // A partial of eight values of each thread.
            POOL_BLOCK * 8 * 4,
            &[
                table(self.table, bounds),
                memory("x", self.x, bounds.tokens * self.hidden * float.bytes()),
                memory("out", self.out, bounds.rows * self.hidden * 4),
                int(self.hidden),
                Arg::I32(self.mode as i32),
                Arg::I32(i32::from(self.normalize)),
            ],
        )
    }
}

/// `y = activation(x · wᵀ + bias)` in f32: the small products of a head.
pub struct DenseRows<'a, M> {
    pub table: Span<'a, M>,
    /// `[rows][inputs]`.
    pub x: Span<'a, M>,
    /// `[outputs][inputs]`.
    pub w: Span<'a, M>,
    pub bias: Option<Span<'a, M>>,
    /// `[rows][outputs]`.
    pub y: Span<'a, M>,
    pub inputs: usize,
    pub outputs: usize,
    pub activation: Activation,
}

impl<'a, M: Memory> DenseRows<'a, M> {
    pub fn launch(self, bounds: &Bounds) -> Launch<'a, M> {
        let results = bounds.rows * self.outputs;
        int::<()>(results); // the kernel counts them with 32 bits
        Launch::new(
            "dense_f32",
            [blocks(results, BLOCK as usize / WARP), 1, 1],
            BLOCK,
            0,
            &[
                table(self.table, bounds),
                memory("x", self.x, 4 * bounds.rows * self.inputs),
                memory("w", self.w, 4 * self.outputs * self.inputs),
                memory_or_null("bias", self.bias, 4 * self.outputs),
                memory("y", self.y, 4 * results),
                int(self.inputs),
                int(self.outputs),
                Arg::I32(self.activation as i32),
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes(usize);

    impl Memory for Bytes {
        fn bytes(&self) -> usize {
            self.0
        }
    }

    const BOUNDS: Bounds = Bounds { rows: 4, tokens: 40, longest: 20 };

    fn bias_act<'a>(table: &'a Bytes, x: Span<'a, Bytes>) -> Launch<'a, Bytes> {
        BiasAct { table: Span::of(table), x, bias: None, width: 64, activation: Activation::GeluErf }
            .launch(&BOUNDS, Float::F16)
    }

    #[test]
    fn a_grid_covers_the_bounds() {
        let (table, x) = (Bytes(4 * Table::len(4)), Bytes(40 * 64 * 2));
        let launch = bias_act(&table, Span::of(&x));
        assert_eq!((launch.function, launch.grid, launch.block), ("bias_act_f16", [3, 1, 1], 128));
        assert!(matches!(launch.args(), [Arg::Memory(_), Arg::Memory(_), Arg::Null, Arg::I32(64), Arg::I32(1)]));
    }

    #[test]
    #[should_panic(expected = "x of 5118 bytes where the bounds need 5120")]
    fn a_buffer_that_the_bounds_outgrow_is_refused() {
        bias_act(&Bytes(4 * Table::len(4)), Span::of(&Bytes(40 * 64 * 2 - 2)));
    }

    #[test]
    #[should_panic(expected = "x starts at byte 8")]
    fn a_buffer_between_vectors_is_refused() {
        bias_act(&Bytes(4 * Table::len(4)), Span::of(&Bytes(9000)).part(8, 5120));
    }

    #[test]
    fn no_attention_block_needs_more_than_48_kib() {
        for float in [Float::F32, Float::F16, Float::BF16] {
            for size in [32, 64, 128] {
                let tile = Tile::of(float, size);
                assert!(tile.shared_bytes <= 48 << 10, "{} takes {}", tile.function, tile.shared_bytes);
                assert_eq!(tile.function, format!("attention_{}_{size}", float.dtype().name()));
            }
        }
    }
}
