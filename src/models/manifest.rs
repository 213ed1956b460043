//! `model.toml`: what a model is, what it accepts and how it is batched. Text in, checked values out.
//!
//! Always true
//! - An unknown key, a wrong type or a value outside its set is an error with file and line; an unknown key's error names
//!   the nearest known one.
//! - A [`Manifest`] holds no contradiction: every length has a bucket, every limit can be reached, every queue holds at
//!   least one full batch. What is contradictory is refused with what was expected and what came.
//! - Nothing is read but the text given: weights and tokenizer are the repository's.
//!
//! Elsewhere: which architectures there are, and what each asks of a contract (repository.rs, and the model's own file).

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};

use super::weights::WeightNames;
use crate::contract::{Contract, Dim, Length, NonFinite, TensorSpec, TextSpec};
use crate::kernels::int8;
use crate::scheduler::edges::{self, SHAPES, SHAPES_MAX};
use crate::scheduler::{Buckets, Edges, PadTo, Policy, PolicyKind};
use crate::vocab::{DType, Layout};

/// Rows of a curve are at most so long: about the mean of what encoders are asked.
const CURVE_LEN: u32 = 32;

/// A manifest that was not taken: where, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    pub file: PathBuf,
    pub line: Option<usize>,
    pub message: String,
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file.display(), self.message),
            None => write!(f, "{}: {}", self.file.display(), self.message),
        }
    }
}

impl std::error::Error for ManifestError {}

/// A checked manifest.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    pub contract: Contract,
    pub batching: Batching,
    pub queue: QueueBounds,
    pub warmup: Warmup,
    pub weights: Option<WeightsSpec>,
    pub text: Option<TextFile>,
    /// The `[model]` table, where there is one. Only `bert` has parameters so far.
    pub bert: Option<BertParams>,
    pub placement: Placement,
}

/// How rows become batches. Starting values: all of them can be changed while the server runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Batching {
    pub rows_max: u32,
    pub padded_cells_max: u64,
    /// `padded_cells_max` is only the most that is looked at: the budget is what the warm-up finds
    /// ([`crate::scheduler::cost::budget`]).
    pub cells_auto: bool,
    /// None: as long as it pays.
    pub queue_delay_max: Option<Duration>,
    pub policy: PolicyKind,
    /// Share of the executors beside other models.
    pub weight: f64,
    /// Slack of requests without a deadline, and the unit in which waiting is weighed.
    pub slo: Duration,
    pub pad_to: PadTo,
    /// None: end to end where the model can.
    pub layout: Option<Layout>,
    /// Ascending, never empty; `[1]` for a model without a length, steps of an eighth where the manifest has none. Where
    /// they are automatic: those to begin with.
    pub buckets: Vec<u32>,
    /// Who chooses the buckets while the server runs.
    pub edges: Edges,
    /// Most buckets, where they are automatic.
    pub shapes_max: u16,
    /// Share of padding at which a shorter row no longer joins a longer batch; the server's default where none.
    pub fill_waste_max: Option<f64>,
}

impl Batching {
    pub fn bucket_longest(&self) -> u32 {
        *self.buckets.last().expect("a manifest without buckets is refused")
    }

    /// Shapes (rows, length) of growing size by which an automatic budget is found: of one length, so that nothing else
    /// differs. Those of fewer cells than the longest row has could be no budget.
    pub fn curve(&self) -> Vec<(u32, u32)> {
        let len = self.bucket_longest().min(CURVE_LEN);
        let most = self.rows_at(len);
        let sizes = (0..10).flat_map(|octave| [64u64 << octave, 96 << octave]);
        let rows = std::iter::once(32).chain(sizes);
        let rows = rows.map(|cells: u64| (cells / u64::from(len)).clamp(1, u64::from(most)) as u32);
        let mut rows: Vec<u32> =
            rows.filter(|rows| u64::from(*rows) * u64::from(len) >= u64::from(self.bucket_longest())).collect();
        rows.push(most);
        rows.dedup();
        rows.into_iter().map(|rows| (rows, len)).collect()
    }

    /// Rows that fit a batch padded to `len`.
    pub fn rows_at(&self, len: u32) -> u32 {
        let by_cells = self.padded_cells_max / u64::from(len.max(1));
        self.rows_max.min(u32::try_from(by_cells).unwrap_or(u32::MAX))
    }
}

/// Bounds on what may wait for this model; the server's own apply where none is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueBounds {
    pub rows_max: Option<u64>,
    pub cells_max: Option<u64>,
    pub bytes_max: Option<u64>,
}

/// Shapes to run before the model counts as ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warmup {
    /// (rows, padded length), each within the batch budgets, smallest first.
    pub shapes: Vec<(u32, u32)>,
}

/// Where the parameters come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightsSpec {
    pub sha256: Option<String>,
    pub names: WeightNames,
    /// A model whose weights are not delivered with the server: without them it is skipped, not an error.
    pub optional: bool,
    /// The command that fetches them, for the sentence that says so.
    pub fetch: Option<String>,
}

/// How text becomes ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextFile {
    /// A file name inside the version's folder.
    pub tokenizer: String,
    pub sha256: Option<String>,
    pub truncate: bool,
}

/// Where the model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// On an executor's thread.
    #[default]
    Executor,
    /// On the batcher's own thread: for a model that takes less time than waking another thread does.
    Inline,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    GeluErf,
    /// By the tanh formula; not the same function.
    GeluTanh,
    Relu,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    Mean,
    /// The first token.
    Cls,
    Max,
}

/// What the products of the layers are computed with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// As the weights are stored.
    #[default]
    F32,
    /// 16 bits with 5 of exponent: on a GPU.
    F16,
    /// 16 bits with the range of f32: on a GPU, where its products run at the tensor cores' full rate. Sums are f32.
    #[serde(rename = "bf16")]
    BF16,
    /// Weights of 8 bits with a scale for each output, and activations of 8 bits with a range for each token: a quarter of the
    /// layers' memory, two to three times as fast where the processor multiplies bytes (AVX-512 VNNI), half as fast again on
    /// AVX2, and answers that are near but not the same. Compare them on texts of your own before you choose it.
    Int8,
}

impl Precision {
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::F16 => "f16",
            Precision::BF16 => "bf16",
            Precision::Int8 => "int8",
        }
    }
}

/// Which names a checkpoint's parameters have, and where its positions begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    #[default]
    Bert,
    /// And XLM-R.
    Roberta,
    Distilbert,
}

impl Family {
    /// Row of the position table that a row's first token has: RoBERTa's begins behind that of its padding id, 1.
    pub fn first_position(self) -> usize {
        match self {
            Family::Roberta => 2,
            Family::Bert | Family::Distilbert => 0,
        }
    }
}

/// What the encoder's output goes through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Head {
    /// Nothing: the pooled vector is the answer.
    #[default]
    Embedding,
    /// The family's classification head; the answer is its logits.
    Classify,
}

/// `[model]` of the architecture `bert`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BertParams {
    #[serde(default)]
    pub family: Family,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub intermediate: usize,
    pub vocab: usize,
    pub positions: usize,
    #[serde(default = "two")]
    pub segments: usize,
    pub layer_norm_eps: f64,
    pub activation: Activation,
    pub pooling: Pooling,
    pub normalize: bool,
    #[serde(default)]
    pub precision: Precision,
    #[serde(default)]
    pub head: Head,
    /// Logits of the classification head.
    #[serde(default)]
    pub labels: Option<usize>,
}

impl BertParams {
    /// Longest row that the position table has places for.
    pub fn longest(&self) -> usize {
        self.positions - self.family.first_position()
    }

    /// Values of an answer.
    pub fn outputs(&self) -> usize {
        match self.head {
            Head::Embedding => self.hidden,
            Head::Classify => self.labels.unwrap_or(1),
        }
    }
}

fn two() -> usize {
    2
}

// The manifest as written. Field names are the keys; unknown ones are refused at every level.

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    architecture: String,
    version: String,
    #[serde(default)]
    placement: Placement,
    #[serde(default)]
    dims: BTreeMap<String, WrittenDim>,
    #[serde(default)]
    input: Vec<WrittenInput>,
    #[serde(default)]
    output: Vec<WrittenOutput>,
    batching: WrittenBatching,
    #[serde(default)]
    queue: WrittenQueue,
    #[serde(default)]
    warmup: WrittenWarmup,
    #[serde(default)]
    weights: Option<WrittenWeights>,
    #[serde(default)]
    text: Option<WrittenText>,
    #[serde(default)]
    model: Option<BertParams>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenDim {
    min: u32,
    max: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenInput {
    name: String,
    dtype: DType,
    shape: Vec<WrittenSize>,
    #[serde(default)]
    pad: f64,
    #[serde(default)]
    range: Option<[i64; 2]>,
    #[serde(default)]
    nonfinite: NonFinite,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenOutput {
    name: String,
    dtype: DType,
    shape: Vec<WrittenSize>,
    #[serde(default)]
    nonfinite: NonFinite,
}

/// One entry of a shape. Not an untagged enum, whose errors only say that no variant matched.
struct WrittenSize(Dim);

impl<'de> Deserialize<'de> for WrittenSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Size;
        impl Visitor<'_> for Size {
            type Value = WrittenSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size from 1 to 4294967295, or the name of a dimension under [dims]")
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<WrittenSize, E> {
                match u32::try_from(value) {
                    Ok(size) if size > 0 => Ok(WrittenSize(Dim::Fixed(size))),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Signed(value), &self)),
                }
            }

            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<WrittenSize, E> {
                Ok(WrittenSize(Dim::Named(value.to_owned())))
            }
        }
        deserializer.deserialize_any(Size)
    }
}

/// Most cells of a batch, or "auto".
enum WrittenCells {
    Given(u64),
    Auto,
}

impl<'de> Deserialize<'de> for WrittenCells {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Cells;
        impl Visitor<'_> for Cells {
            type Value = WrittenCells;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of cells, or \"auto\"")
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<WrittenCells, E> {
                let cells = u64::try_from(value).ok().filter(|cells| *cells > 0);
                cells
                    .map(WrittenCells::Given)
                    .ok_or_else(|| E::invalid_value(serde::de::Unexpected::Signed(value), &self))
            }

            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<WrittenCells, E> {
                match value {
                    "auto" => Ok(WrittenCells::Auto),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(value), &self)),
                }
            }
        }
        deserializer.deserialize_any(Cells)
    }
}

/// The most cells that an automatic budget can come to, if the longest row has not more. Nothing that was measured on a CPU
/// gains by more, and all sizes up to there are run twice at each start.
const CELLS_AUTO_MAX: u64 = 512;

/// Bucket lengths, or "auto".
enum WrittenBuckets {
    Given(Vec<u32>),
    Auto,
}

impl<'de> Deserialize<'de> for WrittenBuckets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Lens;
        impl<'de> Visitor<'de> for Lens {
            type Value = WrittenBuckets;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of lengths such as [16, 32, 128], or \"auto\"")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<WrittenBuckets, A::Error> {
                let mut lens = Vec::new();
                while let Some(len) = list.next_element()? {
                    lens.push(len);
                }
                Ok(WrittenBuckets::Given(lens))
            }

            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<WrittenBuckets, E> {
                match value {
                    "auto" => Ok(WrittenBuckets::Auto),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(value), &self)),
                }
            }
        }
        deserializer.deserialize_any(Lens)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenBatching {
    rows_max: u32,
    #[serde(default)]
    request_rows_max: Option<u32>,
    #[serde(default)]
    padded_cells_max: Option<WrittenCells>,
    #[serde(default)]
    policy: Option<String>,
    #[serde(default)]
    queue_delay_max_us: Option<u64>,
    #[serde(default)]
    weight: Option<f64>,
    #[serde(default)]
    slo_ms: Option<f64>,
    #[serde(default)]
    pad_to: Option<String>,
    #[serde(default)]
    layout: Option<String>,
    #[serde(default)]
    buckets: Option<WrittenBuckets>,
    #[serde(default)]
    shapes_max: Option<u16>,
    #[serde(default)]
    fill_waste_max: Option<f64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenQueue {
    #[serde(default)]
    rows_max: Option<u64>,
    #[serde(default)]
    cells_max: Option<u64>,
    #[serde(default)]
    bytes_max: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenWarmup {
    #[serde(default)]
    rows: Option<Vec<u32>>,
    #[serde(default)]
    lengths: Option<Vec<u32>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenWeights {
    #[serde(default)]
    sha256: Option<String>,
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    map: BTreeMap<String, String>,
    #[serde(default)]
    ignore: Vec<String>,
    #[serde(default)]
    optional: bool,
    #[serde(default)]
    fetch: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenText {
    input: String,
    #[serde(default = "tokenizer_json")]
    tokenizer: String,
    bytes_max: u32,
    #[serde(default)]
    truncate: bool,
    #[serde(default)]
    sha256: Option<String>,
}

fn tokenizer_json() -> String {
    "tokenizer.json".to_owned()
}

impl Manifest {
    /// What a device changes: an automatic budget is looked for among batches as large as the manifest's rows make them, because
    /// a device runs at full speed only from thousands of cells on.
    pub fn for_device(&mut self) {
        let batching = &mut self.batching;
        if batching.cells_auto {
            batching.padded_cells_max = u64::from(batching.rows_max) * u64::from(batching.bucket_longest());
            let shapes = &mut self.warmup.shapes;
            shapes.extend(batching.curve());
            shapes.sort_unstable_by_key(|(rows, len)| (u64::from(*rows) * u64::from(*len), *len));
            shapes.dedup();
        }
    }

    /// Reads the manifest of the model called `name`. `file` is only for messages.
    pub fn parse(name: &str, file: &Path, text: &str) -> Result<Manifest, ManifestError> {
        let written: Written = toml::from_str(text).map_err(|error| ManifestError {
            file: file.to_path_buf(),
            line: error.span().map(|span| line_of(text, span.start)),
            message: explain(error.message()),
        })?;
        check(name, written).map_err(|message| ManifestError { file: file.to_path_buf(), line: None, message })
    }
}

/// Lines are counted from 1.
fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}

/// Adds the nearest known key or value to serde's own sentence, which lists them all:
/// "unknown field `a`, expected one of `b`, `c`". A sentence of another form passes unchanged.
fn explain(message: &str) -> String {
    let message = message.trim();
    let what = if message.starts_with("unknown field `") {
        "key"
    } else if message.starts_with("unknown variant `") {
        "value"
    } else {
        return message.to_owned();
    };
    // Every second piece stands between backticks; the first of them is the unknown one.
    let mut quoted = message.split('`').skip(1).step_by(2);
    let Some(unknown) = quoted.next() else { return message.to_owned() };
    let known: Vec<&str> = quoted.collect();
    let nearest = (known.iter())
        .map(|key| (strsim::normalized_damerau_levenshtein(unknown, key), key))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((likeness, key)) if likeness >= 0.4 => {
            format!("unknown {what} `{unknown}`; did you mean `{key}`? Known here: {}", known.join(", "))
        }
        _ => format!("unknown {what} `{unknown}`; known here: {}", known.join(", ")),
    }
}

/// From what was written to what holds together.
fn check(name: &str, written: Written) -> Result<Manifest, String> {
    let length = check_length(written.dims)?;
    let contract = Contract {
        name: name.to_owned(),
        version: written.version,
        architecture: written.architecture,
        inputs: written.input.into_iter().map(input_spec).collect(),
        outputs: written.output.into_iter().map(output_spec).collect(),
        length,
        text: written.text.as_ref().map(|text| TextSpec {
            name: text.input.clone(),
            into: 0,
            bytes_max: text.bytes_max,
        }),
        rows_max: written.batching.request_rows_max.unwrap_or(written.batching.rows_max),
    }
    .checked()?;
    for input in &contract.inputs {
        check_pad(input)?;
    }
    let batching = check_batching(&contract, written.batching)?;
    let queue = check_queue(&contract, &batching, written.queue)?;
    let warmup = check_warmup(&contract, &batching, written.warmup)?;
    let weights = written.weights.map(check_weights).transpose()?;
    let text = written.text.map(check_text).transpose()?;
    if let Some(params) = &written.model {
        check_bert(&contract, params)?;
    }
    Ok(Manifest { contract, batching, queue, warmup, weights, text, bert: written.model, placement: written.placement })
}

fn check_length(dims: BTreeMap<String, WrittenDim>) -> Result<Option<Length>, String> {
    if dims.len() > 1 {
        let names: Vec<&str> = dims.keys().map(String::as_str).collect();
        return Err(format!(
            "[dims]: expected at most one named dimension, got {} ({})",
            names.len(),
            names.join(", ")
        ));
    }
    Ok(dims.into_iter().next().map(|(name, dim)| Length { name, min: dim.min, max: dim.max }))
}

fn input_spec(written: WrittenInput) -> TensorSpec {
    TensorSpec {
        name: written.name,
        dtype: written.dtype,
        shape: written.shape.into_iter().map(|size| size.0).collect(),
        pad: written.pad,
        range: written.range,
        nonfinite: written.nonfinite,
    }
}

fn output_spec(written: WrittenOutput) -> TensorSpec {
    TensorSpec {
        name: written.name,
        dtype: written.dtype,
        shape: written.shape.into_iter().map(|size| size.0).collect(),
        pad: 0.0,
        range: None,
        nonfinite: written.nonfinite,
    }
}

/// A pad value that its dtype cannot hold would silently become another one.
fn check_pad(input: &TensorSpec) -> Result<(), String> {
    let (low, high) = match input.dtype {
        DType::U8 => (0.0, f64::from(u8::MAX)),
        DType::I8 => (f64::from(i8::MIN), f64::from(i8::MAX)),
        DType::U16 => (0.0, f64::from(u16::MAX)),
        DType::I16 => (f64::from(i16::MIN), f64::from(i16::MAX)),
        DType::U32 => (0.0, f64::from(u32::MAX)),
        DType::I32 => (f64::from(i32::MIN), f64::from(i32::MAX)),
        // Whole numbers above 2^53 cannot be written as a pad value anyway.
        DType::U64 => (0.0, (1u64 << 53) as f64),
        DType::I64 => (-((1u64 << 53) as f64), (1u64 << 53) as f64),
        DType::F32 | DType::F64 | DType::F16 | DType::BF16 | DType::Text => {
            return if input.pad.is_finite() {
                Ok(())
            } else {
                Err(format!("input {}: expected a finite pad, got {}", input.name, input.pad))
            };
        }
    };
    if input.pad.fract() != 0.0 || input.pad < low || input.pad > high {
        return Err(format!(
            "input {}: expected a whole pad from {low} to {high} for dtype {}, got {}",
            input.name, input.dtype, input.pad
        ));
    }
    Ok(())
}

fn check_batching(contract: &Contract, written: WrittenBatching) -> Result<Batching, String> {
    let written_buckets = written.buckets.is_some();
    let edges = match written.buckets {
        Some(WrittenBuckets::Auto) => Edges::Auto,
        _ => Edges::Given,
    };
    let shapes_max = check_shapes_max(written.shapes_max, edges)?;
    let buckets = check_buckets(contract, written.buckets, shapes_max)?;
    // Which the shortest will be is not known where they are automatic.
    let shortest = if edges == Edges::Auto { 1 } else { buckets[0] };
    let longest = buckets[buckets.len() - 1];
    let rows_max = written.rows_max;
    let all = u64::from(rows_max) * u64::from(longest);
    let (padded_cells_max, cells_auto) = match written.padded_cells_max {
        None => (all, false),
        Some(WrittenCells::Given(cells)) => (cells, false),
        Some(WrittenCells::Auto) => (all.min(CELLS_AUTO_MAX.max(longest.into())), true),
    };
    if padded_cells_max < u64::from(longest) {
        return Err(format!(
            "[batching] padded_cells_max: expected at least {longest}, the largest bucket, or its rows could never run; got {padded_cells_max}"
        ));
    }
    if padded_cells_max > all {
        return Err(format!(
            "[batching] padded_cells_max: expected at most rows_max × the largest bucket = {rows_max} × {longest} = {all}, \
             more can never be reached; got {padded_cells_max}"
        ));
    }
    if u64::from(rows_max) * u64::from(shortest) > padded_cells_max {
        return Err(format!(
            "[batching] rows_max: {rows_max} rows can never be reached, even in the smallest bucket ({shortest}) they are {} \
             padded cells; expected at most padded_cells_max {padded_cells_max} / {shortest} = {}",
            u64::from(rows_max) * u64::from(shortest),
            padded_cells_max / u64::from(shortest)
        ));
    }
    if let Some(waste) = written.fill_waste_max
        && !(0.0..1.0).contains(&waste)
    {
        return Err(format!("[batching] fill_waste_max: expected a share from 0 to below 1, got {waste}"));
    }
    let policy = match written.policy.as_deref() {
        None => PolicyKind::default(),
        Some(name) => PolicyKind::from_name(name).ok_or_else(|| {
            let known = PolicyKind::ALL.map(PolicyKind::name).join(", ");
            format!("[batching] policy: expected one of {known}; got {name:?}")
        })?,
    };
    let weight = written.weight.unwrap_or(1.0);
    if !(0.001..=1000.0).contains(&weight) {
        return Err(format!("[batching] weight: expected 0.001 to 1000, got {weight}"));
    }
    let slo_ms = written.slo_ms.unwrap_or(Policy::SLO.as_secs_f64() * 1e3);
    if !(0.01..=600_000.0).contains(&slo_ms) {
        return Err(format!("[batching] slo_ms: expected 0.01 to 600000, got {slo_ms}"));
    }
    let pad_to = match (written.pad_to.as_deref(), written_buckets) {
        (Some("bucket"), _) | (None, true) => PadTo::Bucket,
        (Some("longest"), _) | (None, false) => PadTo::Longest,
        (Some(other), _) => {
            return Err(format!("[batching] pad_to: expected \"bucket\" or \"longest\", got {other:?}"));
        }
    };
    let layout = match written.layout.as_deref() {
        None | Some("auto") => None,
        Some("padded") => Some(Layout::Padded),
        Some("packed") => Some(Layout::Packed),
        Some(other) => {
            return Err(format!("[batching] layout: expected \"padded\", \"packed\" or \"auto\", got {other:?}"));
        }
    };
    Ok(Batching {
        rows_max,
        padded_cells_max,
        cells_auto,
        queue_delay_max: written.queue_delay_max_us.map(Duration::from_micros),
        policy,
        weight,
        slo: Duration::from_secs_f64(slo_ms / 1e3),
        pad_to,
        layout,
        buckets,
        edges,
        shapes_max,
        fill_waste_max: written.fill_waste_max,
    })
}

fn check_shapes_max(written: Option<u16>, edges: Edges) -> Result<u16, String> {
    match (written, edges) {
        (None, _) => Ok(SHAPES),
        (Some(_), Edges::Given) => Err("[batching] shapes_max: expected none without buckets = \"auto\"".into()),
        (Some(shapes), Edges::Auto) if (1..=SHAPES_MAX).contains(&shapes) => Ok(shapes),
        (Some(shapes), Edges::Auto) => Err(format!("[batching] shapes_max: expected 1 to {SHAPES_MAX}, got {shapes}")),
    }
}

fn check_buckets(contract: &Contract, written: Option<WrittenBuckets>, shapes_max: u16) -> Result<Vec<u32>, String> {
    let Some(length) = &contract.length else {
        let other = match written {
            None => return Ok(vec![1]),
            Some(WrittenBuckets::Given(lens)) if lens == [1] => return Ok(vec![1]),
            Some(WrittenBuckets::Given(lens)) => format!("{lens:?}"),
            Some(WrittenBuckets::Auto) => "\"auto\"".to_owned(),
        };
        return Err(format!("[batching] buckets: expected none, for the model has no named dimension; got {other}"));
    };
    let max = length.max;
    let buckets = match written {
        Some(WrittenBuckets::Given(lens)) => {
            Buckets::new(&lens).map_err(|error| format!("[batching] buckets: {error}"))?
        }
        Some(WrittenBuckets::Auto) => edges::prior_edges(max, shapes_max),
        None => Buckets::geometric(max),
    };
    let longest = buckets.longest();
    let buckets = buckets.lens().to_vec();
    if longest < max {
        return Err(format!(
            "[batching] buckets: a row may have {max} {}, expected a bucket at least as large; the largest is {longest}",
            length.name
        ));
    }
    if buckets.len() > 1 && buckets[buckets.len() - 2] >= max {
        return Err(format!(
            "[batching] buckets: no row is longer than {max} {}, so bucket {longest} would never be used; expected only one \
             bucket of {max} or above",
            length.name
        ));
    }
    Ok(buckets)
}

fn check_queue(contract: &Contract, batching: &Batching, written: WrittenQueue) -> Result<QueueBounds, String> {
    let bucket = batching.bucket_longest();
    // The largest request is a batch of its own: a bound below it would refuse for ever what the contract allows.
    let request_bytes =
        contract.input_offset(contract.inputs.len(), batching.rows_at(bucket), contract.len_max()) as u64;
    for (key, given, least, what) in [
        ("rows_max", written.rows_max, u64::from(batching.rows_max), "rows of one full batch"),
        ("cells_max", written.cells_max, batching.padded_cells_max, "padded cells of one full batch"),
        ("bytes_max", written.bytes_max, request_bytes, "bytes of the largest request"),
    ] {
        if let Some(given) = given
            && given < least
        {
            return Err(format!("[queue] {key}: expected at least {least}, the {what}; got {given}"));
        }
    }
    Ok(QueueBounds { rows_max: written.rows_max, cells_max: written.cells_max, bytes_max: written.bytes_max })
}

fn check_warmup(contract: &Contract, batching: &Batching, written: WrittenWarmup) -> Result<Warmup, String> {
    if written.lengths.is_some() && contract.length.is_none() {
        return Err("[warmup] lengths: expected none, for the model has no named dimension".into());
    }
    let lengths = written.lengths.unwrap_or_else(|| batching.buckets.clone());
    let rows =
        written.rows.unwrap_or_else(|| if batching.rows_max == 1 { vec![1] } else { vec![1, batching.rows_max] });
    let may_be_bucket = |len: &u32| match batching.edges {
        Edges::Given => batching.buckets.contains(len),
        Edges::Auto => (1..=batching.bucket_longest()).contains(len),
    };
    if let Some(len) = lengths.iter().find(|len| !may_be_bucket(len)) {
        return Err(format!("[warmup] lengths: expected only buckets ({:?}), got {len}", batching.buckets));
    }
    if let Some(count) = rows.iter().find(|count| **count == 0 || **count > batching.rows_max) {
        return Err(format!("[warmup] rows: expected 1 to rows_max {}, got {count}", batching.rows_max));
    }
    // A row count that this length's budget does not allow becomes the largest that it does: that batch will occur.
    let mut shapes: Vec<(u32, u32)> =
        (lengths.iter()).flat_map(|len| rows.iter().map(|rows| ((*rows).min(batching.rows_at(*len)), *len))).collect();
    if batching.cells_auto {
        shapes.extend(batching.curve());
    }
    shapes.sort_unstable_by_key(|(rows, len)| (u64::from(*rows) * u64::from(*len), *len));
    shapes.dedup();
    Ok(Warmup { shapes })
}

fn check_weights(written: WrittenWeights) -> Result<WeightsSpec, String> {
    check_sha256("[weights]", written.sha256.as_deref())?;
    Ok(WeightsSpec {
        sha256: written.sha256,
        names: WeightNames { prefix: written.prefix, map: written.map, ignore: written.ignore },
        optional: written.optional,
        fetch: written.fetch,
    })
}

fn check_text(written: WrittenText) -> Result<TextFile, String> {
    check_sha256("[text]", written.sha256.as_deref())?;
    let name = &written.tokenizer;
    // It is joined to the version's folder: no separator, so it cannot lead out of it.
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
        return Err(format!("[text] tokenizer: expected a file name in the version's folder, got {name:?}"));
    }
    if written.bytes_max == 0 {
        return Err("[text] bytes_max: expected at least 1, got 0".into());
    }
    Ok(TextFile { tokenizer: written.tokenizer, sha256: written.sha256, truncate: written.truncate })
}

fn check_sha256(table: &str, given: Option<&str>) -> Result<(), String> {
    match given {
        Some(hash) if hash.len() != 64 || !hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
            Err(format!("{table} sha256: expected 64 hexadecimal digits, got {hash:?}"))
        }
        _ => Ok(()),
    }
}

fn check_bert(contract: &Contract, params: &BertParams) -> Result<(), String> {
    if contract.architecture != "bert" {
        return Err(format!(
            "[model]: architecture {} has no parameters, expected no such table",
            contract.architecture
        ));
    }
    for (key, value) in [
        ("layers", params.layers),
        ("hidden", params.hidden),
        ("heads", params.heads),
        ("intermediate", params.intermediate),
        ("vocab", params.vocab),
        ("positions", params.positions),
        ("labels", params.labels.unwrap_or(1)),
    ] {
        // A million of anything is beyond every BERT; a slip of the finger should not ask for terabytes.
        if !(1..=1 << 20).contains(&value) {
            return Err(format!("[model] {key}: expected 1 to {}, got {value}", 1 << 20));
        }
    }
    // DistilBERT has none.
    let least = usize::from(params.family != Family::Distilbert);
    if !(least..=1 << 20).contains(&params.segments) {
        return Err(format!("[model] segments: expected {least} to {}, got {}", 1 << 20, params.segments));
    }
    if !params.hidden.is_multiple_of(params.heads) {
        return Err(format!("[model] heads: expected a divisor of hidden {}, got {}", params.hidden, params.heads));
    }
    if params.positions <= params.family.first_position() {
        let least = params.family.first_position() + 1;
        return Err(format!("[model] positions: expected at least {least} for this family, got {}", params.positions));
    }
    let widest = params.hidden.max(params.intermediate);
    if params.precision == Precision::Int8 && widest > int8::INPUTS_MAX {
        let most = int8::INPUTS_MAX;
        return Err(format!("[model] precision: expected sizes up to {most} with precision = \"int8\", got {widest}"));
    }
    match (params.head, params.labels) {
        (Head::Embedding, Some(labels)) => {
            return Err(format!("[model] labels: expected none with head = \"embedding\", got {labels}"));
        }
        (Head::Classify, None) => {
            return Err("[model] labels: expected how many with head = \"classify\", there is none".to_owned());
        }
        (Head::Classify, Some(_)) if params.pooling != Pooling::Cls || params.normalize => {
            return Err(
                "[model] head: expected pooling = \"cls\" and normalize = false with head = \"classify\"".to_owned()
            );
        }
        _ => {}
    }
    if !(params.layer_norm_eps > 0.0 && params.layer_norm_eps < 1.0) {
        return Err(format!("[model] layer_norm_eps: expected above 0 and below 1, got {}", params.layer_norm_eps));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"architecture = "bert"
version = "1"
# Where it runs.
placement = "executor"

[dims.tokens]
min = 1
max = 100

[[input]]
name = "ids"
dtype = "u32"
shape = ["tokens"]
pad = 0
range = [0, 99]

[[output]]
name = "embedding"
dtype = "f32"
shape = [32]
nonfinite = "refuse"

[batching]
rows_max = 8
padded_cells_max = 512
queue_delay_max_us = 1500
buckets = [16, 64, 128]
fill_waste_max = 0.25

[queue]
rows_max = 100
cells_max = 10000
bytes_max = 1000000

[warmup]
rows = [1, 8]
lengths = [16, 128]

[weights]
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
prefix = "bert."
map = { "a.b" = "c" }
ignore = ["pooler."]
optional = true
fetch = "fetch it"

[text]
input = "text"
tokenizer = "tokenizer.json"
bytes_max = 1000
truncate = true

[model]
layers = 2
hidden = 32
heads = 4
intermediate = 64
vocab = 100
positions = 128
layer_norm_eps = 1e-12
activation = "gelu_erf"
pooling = "mean"
normalize = true
"#;

    fn parse(text: &str) -> Result<Manifest, ManifestError> {
        Manifest::parse("m", Path::new("models/m/model.toml"), text)
    }

    /// The error after one replacement in the whole manifest.
    fn error(from: &str, to: &str) -> String {
        assert_eq!(WHOLE.matches(from).count(), 1, "{from:?} stands in the manifest once");
        parse(&WHOLE.replace(from, to)).expect_err("is refused").to_string()
    }

    #[test]
    fn every_key_arrives_where_it_belongs() {
        let manifest = parse(WHOLE).expect("is right");
        assert_eq!(manifest.contract.length, Some(Length { name: "tokens".into(), min: 1, max: 100 }));
        assert_eq!(manifest.contract.inputs[0].range, Some([0, 99]));
        assert_eq!(manifest.contract.text, Some(TextSpec { name: "text".into(), into: 0, bytes_max: 1000 }));
        assert_eq!(manifest.contract.rows_max, 8);
        assert_eq!(manifest.batching.queue_delay_max, Some(Duration::from_micros(1500)));
        assert_eq!((manifest.batching.policy, manifest.batching.pad_to), (PolicyKind::Cost, PadTo::Bucket));
        assert_eq!(manifest.batching.fill_waste_max, Some(0.25));
        assert_eq!(manifest.queue.bytes_max, Some(1_000_000));
        assert_eq!(manifest.bert.as_ref().expect("has [model]").segments, 2);
        let weights = manifest.weights.expect("has [weights]");
        assert_eq!((weights.names.prefix.as_str(), weights.optional), ("bert.", true));
        assert!(manifest.text.expect("has [text]").truncate);
        // 8 rows of 128 would be 1024 cells; the budget has room for 4, and that is the batch that will occur.
        assert_eq!(manifest.warmup.shapes, [(1, 16), (8, 16), (1, 128), (4, 128)]);
    }

    #[test]
    fn a_model_without_a_length_has_one_bucket_and_needs_no_budget() {
        let text = "architecture = \"sleep\"\nversion = \"1\"\n[[input]]\nname = \"x\"\ndtype = \"u32\"\nshape = [1]\n\
                    [[output]]\nname = \"x\"\ndtype = \"u32\"\nshape = [1]\n[batching]\nrows_max = 4\n";
        let manifest = parse(text).expect("is right");
        assert_eq!(manifest.batching.buckets, [1]);
        assert_eq!(manifest.batching.padded_cells_max, 4);
        assert_eq!(manifest.warmup.shapes, [(1, 1), (4, 1)]);
        let error = parse(&text.replace("rows_max = 4", "rows_max = 4\nbuckets = [8]")).expect_err("has no length");
        assert!(error.message.contains("expected none, for the model has no named dimension; got [8]"), "{error}");
    }

    #[test]
    fn without_buckets_the_steps_are_an_eighth() {
        let text = WHOLE.replace("buckets = [16, 64, 128]\n", "").replace("lengths = [16, 128]", "lengths = [16, 100]");
        let manifest = parse(&text.replace("rows = [1, 8]", "rows = [1]")).expect("is right");
        assert_eq!(manifest.batching.buckets, Buckets::geometric(100).lens());
        assert_eq!(manifest.batching.bucket_longest(), 100);
    }

    #[test]
    fn automatic_buckets_begin_spread_and_end_with_the_longest() {
        let text = WHOLE.replace("buckets = [16, 64, 128]", "buckets = \"auto\"\nshapes_max = 4");
        let manifest = parse(&text.replace("lengths = [16, 128]", "lengths = [7, 100]")).expect("is right");
        let batching = &manifest.batching;
        assert_eq!((batching.edges, batching.shapes_max, batching.pad_to), (Edges::Auto, 4, PadTo::Bucket));
        assert_eq!((batching.buckets.len(), batching.bucket_longest()), (4, 100));
        assert_eq!(manifest.warmup.shapes, [(1, 7), (8, 7), (1, 100), (5, 100)]);
        for (with, expected) in [
            ("buckets = \"auto\"\nshapes_max = 0", "[batching] shapes_max: expected 1 to 64, got 0"),
            ("buckets = [16, 128]\nshapes_max = 4", "shapes_max: expected none without buckets = \"auto\""),
            ("buckets = \"automatic\"", "expected a list of lengths such as [16, 32, 128], or \"auto\""),
        ] {
            let error = parse(&WHOLE.replace("buckets = [16, 64, 128]", with)).expect_err("is wrong").to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_the_nearest_known_one_the_file_and_the_line() {
        for (from, to, expected) in [
            (
                "placement = \"executor\"",
                "placment = \"executor\"",
                "models/m/model.toml:4: unknown key `placment`; did you mean `placement`?",
            ),
            (
                "queue_delay_max_us = 1500",
                "queue_delay_us = 1500",
                "models/m/model.toml:26: unknown key `queue_delay_us`; did you mean `queue_delay_max_us`?",
            ),
            ("pad = 0", "padding = 0", "models/m/model.toml:14: unknown key `padding`; did you mean `pad`?"),
            ("\nmin = 1", "\nminimum = 1", "models/m/model.toml:7: unknown key `minimum`; did you mean `min`?"),
            ("layers = 2", "layer = 2", "unknown key `layer`; did you mean `layers`?"),
            ("[warmup]", "[warm_up]", "unknown key `warm_up`; did you mean `warmup`?"),
            ("\"gelu_erf\"", "\"gelu_err\"", "unknown value `gelu_err`; did you mean `gelu_erf`?"),
            ("\"executor\"", "\"gpu\"", "unknown value `gpu`; known here: executor, inline"),
        ] {
            let error = error(from, to);
            assert!(error.contains(expected), "{error}\nexpected: {expected}");
        }
    }

    #[test]
    fn a_wrong_type_or_value_is_named_with_its_line() {
        for (from, to, expected) in [
            ("rows_max = 8", "rows_max = -8", "model.toml:24: invalid value: integer `-8`, expected u32"),
            ("rows_max = 8", "rows_max = \"8\"", "model.toml:24: invalid type: string \"8\", expected u32"),
            ("[\"tokens\"]", "[0]", "expected a size from 1 to 4294967295, or the name of a dimension"),
            ("dtype = \"u32\"", "dtype = \"u33\"", "dtype \"u33\" is unknown; known are u8"),
            ("[batching]", "[batching", "model.toml:23: "),
            ("version = \"1\"\n", "", "missing field `version`"),
        ] {
            let error = error(from, to);
            assert!(error.contains(expected), "{error}\nexpected: {expected}");
        }
    }

    #[test]
    fn contradictions_are_refused_with_what_was_expected_and_what_came() {
        for (from, to, expected) in [
            (
                "[16, 64, 128]",
                "[16, 64]",
                "a row may have 100 tokens, expected a bucket at least as large; the largest is 64",
            ),
            ("[16, 64, 128]", "[16, 128, 64]", "[batching] buckets: expected ascending buckets, got [16, 128, 64]"),
            ("[16, 64, 128]", "[0, 128]", "[batching] buckets: a bucket of length 0 holds nothing"),
            ("[16, 64, 128]", "[16, 100, 128]", "no row is longer than 100 tokens, so bucket 128 would never be used"),
            ("padded_cells_max = 512", "padded_cells_max = 127", "expected at least 128, the largest bucket"),
            ("padded_cells_max = 512", "padded_cells_max = 1025", "rows_max × the largest bucket = 8 × 128 = 1024"),
            (
                "rows_max = 8",
                "rows_max = 33",
                "33 rows can never be reached, even in the smallest bucket (16) they are 528",
            ),
            ("rows_max = 8", "rows_max = 0", "rows_max is at least 1"),
            ("fill_waste_max = 0.25", "fill_waste_max = 1.0", "expected a share from 0 to below 1, got 1"),
            (
                "rows_max = 100",
                "rows_max = 7",
                "[queue] rows_max: expected at least 8, the rows of one full batch; got 7",
            ),
            ("cells_max = 10000", "cells_max = 511", "[queue] cells_max: expected at least 512"),
            ("bytes_max = 1000000", "bytes_max = 1599", "[queue] bytes_max: expected at least 1600"),
            (
                "lengths = [16, 128]",
                "lengths = [16, 100]",
                "[warmup] lengths: expected only buckets ([16, 64, 128]), got 100",
            ),
            ("rows = [1, 8]", "rows = [1, 9]", "[warmup] rows: expected 1 to rows_max 8, got 9"),
            ("pad = 0", "pad = 0.5", "expected a whole pad from 0 to 4294967295 for dtype u32, got 0.5"),
            ("pad = 0", "pad = 100", "pad 100 is outside its range [0, 99]"),
            ("\nmin = 1", "\nmin = 101", "tokens has min 101 and max 100"),
            ("[\"tokens\"]", "[\"token\"]", "dimension \"token\" is not declared under [dims]"),
            (
                "[dims.tokens]",
                "[dims.a]\nmin = 1\nmax = 2\n[dims.tokens]",
                "expected at most one named dimension, got 2 (a, tokens)",
            ),
            ("\"tokenizer.json\"", "\"../tokenizer.json\"", "expected a file name in the version's folder"),
            ("\"0000", "\"000", "[weights] sha256: expected 64 hexadecimal digits"),
            ("heads = 4", "heads = 5", "[model] heads: expected a divisor of hidden 32, got 5"),
            ("layers = 2", "layers = 0", "[model] layers: expected 1 to 1048576, got 0"),
            (
                "hidden = 32",
                "precision = \"int8\"\nhidden = 66400",
                "[model] precision: expected sizes up to 66311 with precision = \"int8\", got 66400",
            ),
            ("1e-12", "0.0", "[model] layer_norm_eps: expected above 0 and below 1, got 0"),
            ("version = \"1\"", "version = \"../1\"", "version \"../1\" is not 1 to 128 characters"),
            ("\"bert\"", "\"echo\"", "[model]: architecture echo has no parameters"),
        ] {
            let error = error(from, to);
            assert!(error.starts_with("models/m/model.toml: "), "{error}");
            assert!(error.contains(expected), "{error}\nexpected: {expected}");
        }
    }
}
