//! The BERT encoder: token ids to one embedding per row, pooled over the real tokens.
//!
//! The arithmetic is candle's (between the matmuls, on a CPU, fused.rs's); what this file adds is how it is arranged:
//! - query, key and value are one matmul, with 1/sqrt(head size) folded into the query's weights when they are loaded;
//! - weights are stored transposed and contiguous, so that no forward pass transposes them again;
//! - segment embeddings (always segment 0) are folded into the position embeddings;
//! - a batch without padding makes no mask.
//!
//! Always true
//! - A row's embedding depends on its own real tokens only: padding takes no part in attention or pooling, whatever ids
//!   stand there.
//! - Every value stays finite for a row without any real token: masked scores are a finite floor, not -inf (fused: no share
//!   at all), and a norm of 0 divides by a small constant. Such a row's embedding is all zeros.
//!
//! Elsewhere: bias, GELU, norm and softmax in one pass each (fused.rs), tensor names of a file (weights.rs), sizes as the manifest gives them (manifest.rs).

use std::sync::Arc;

use candle_core::{D, Device, Tensor};
use candle_nn::ops::{layer_norm, softmax_last_dim};

use super::fused::{AddBias, AddNorm, BiasGelu, MaskedSoftmax};
use super::manifest::{Activation, BertParams, Manifest, Pooling};
use super::weights::{Weights, WeightsError};
use crate::contract::{Contract, Dim};
use crate::executor::batch::{BatchOutput, BatchView};
use crate::executor::model::{LoadedModel, Model, ModelError};
use crate::vocab::DType;

/// Added to the score of a padding token. Far below any real score, so that its share is exactly 0 in f32, and finite, so
/// that a row of padding alone gives equal shares instead of NaN.
const MASKED: f32 = -1e30;

/// Keeps the division by a row's length finite for a row of length zero.
const NORM_MIN: f64 = 1e-12;

/// A matmul with the weights already as `[in, out]`, contiguous.
struct Linear {
    weight: Tensor,
    bias: Tensor,
    /// The bias again, on the host, for the fused operations.
    bias_host: Vec<f32>,
}

struct Norm {
    weight: Tensor,
    bias: Tensor,
    weight_host: Vec<f32>,
    bias_host: Vec<f32>,
}

struct Layer {
    qkv: Linear,
    attention_out: Linear,
    attention_norm: Norm,
    inner: Linear,
    out: Linear,
    norm: Norm,
}

/// The network with its parameters. Shared by all instances.
pub struct Encoder {
    params: BertParams,
    words: Tensor,
    /// Position embeddings with the embedding of segment 0 added.
    places: Tensor,
    norm: Norm,
    layers: Vec<Layer>,
    device: Device,
    /// Takes the operations of fused.rs between the matmuls instead of candle's own, which are the reference.
    fused: bool,
}

impl Encoder {
    /// Takes every parameter out of `weights` by its usual name.
    pub fn load(params: BertParams, weights: &mut Weights, device: &Device) -> Result<Encoder, WeightsError> {
        // The only ones there are; a new one has to be written before a manifest can name it.
        let (Activation::GeluErf, Pooling::Mean) = (params.activation, params.pooling);
        let h = params.hidden;
        let words = weights.take("embeddings.word_embeddings.weight", &[params.vocab, h])?;
        let positions = weights.take("embeddings.position_embeddings.weight", &[params.positions, h])?;
        let segments = weights.take("embeddings.token_type_embeddings.weight", &[params.segments, h])?;
        let places = (segments.narrow(0, 0, 1).and_then(|first| positions.broadcast_add(&first)))
            .map_err(|e| weights.device_error("embeddings.position_embeddings.weight", e))?;
        let norm = load_norm(weights, "embeddings.LayerNorm", h)?;
        let layers =
            (0..params.layers).map(|n| load_layer(&params, weights, n)).collect::<Result<Vec<_>, WeightsError>>()?;
        Ok(Encoder { params, words, places, norm, layers, device: device.clone(), fused: device.is_cpu() })
    }

    pub fn params(&self) -> &BertParams {
        &self.params
    }

    /// Embeds `lengths.len()` rows of `len` ids each, row after row in `ids`; row i has `lengths[i]` real tokens.
    ///
    /// Ids are below the vocabulary, and `len` within the positions: the contract's range and the buckets see to both.
    ///
    /// Hot: once per batch.
    pub fn forward(&self, ids: &[u32], len: usize, lengths: &[u32]) -> candle_core::Result<Tensor> {
        let rows = lengths.len();
        assert_eq!(ids.len(), rows * len, "ids hold one place of `len` per row");
        assert!(len <= self.params.positions, "the manifest keeps buckets within the positions");
        let h = self.params.hidden;
        let padding = Padding::new(len, lengths, &self.device)?;

        let ids = Tensor::from_slice(ids, rows * len, &self.device)?;
        let words = self.words.index_select(&ids, 0)?.reshape((rows, len, h))?;
        let mut x = words.broadcast_add(&self.places.narrow(0, 0, len)?)?.reshape((rows * len, h))?;
        x = layer_norm(&x, &self.norm.weight, &self.norm.bias, self.eps())?;
        for layer in &self.layers {
            let context = self.attend(&self.project(&x, &layer.qkv)?, len, &padding)?;
            x = self.project_and_norm(&context, &layer.attention_out, &x, &layer.attention_norm)?;
            let inner = self.project_and_gelu(&x, &layer.inner)?;
            x = self.project_and_norm(&inner, &layer.out, &x, &layer.norm)?;
        }

        // The mean as a matmul with 1/length on real tokens and 0 on padding: one pass, no copy of the masked states.
        let pooled = padding.shares.matmul(&x.reshape((rows, len, h))?)?.reshape((rows, h))?;
        if !self.params.normalize {
            return Ok(pooled);
        }
        let norm = pooled.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(NORM_MIN)?;
        pooled.broadcast_div(&norm)
    }

    /// Scaled dot-product attention of all rows and heads; `[rows * len, 3 * hidden]` to `[rows * len, hidden]`.
    fn attend(&self, qkv: &Tensor, len: usize, padding: &Padding<'_>) -> candle_core::Result<Tensor> {
        let rows = padding.lengths.len();
        let heads = self.params.heads;
        let size = self.params.hidden / heads;
        let parts = qkv.reshape((rows, len, 3, heads, size))?;
        let part = |n: usize| parts.narrow(2, n, 1)?.squeeze(2)?.transpose(1, 2);
        let q = part(0)?.contiguous()?;
        // Laid out as the matmul reads it, in the one copy that is needed anyway.
        let k = part(1)?.transpose(2, 3)?.contiguous()?;
        let v = part(2)?.contiguous()?;

        let shares = self.softmax(q.matmul(&k)?, len, padding)?;
        shares.matmul(&v)?.transpose(1, 2)?.reshape((rows * len, self.params.hidden))
    }

    fn softmax(&self, scores: Tensor, len: usize, padding: &Padding<'_>) -> candle_core::Result<Tensor> {
        if self.fused {
            let scores_per_row = self.params.heads * len;
            scores.inplace_op1(&MaskedSoftmax { len, scores_per_row, lengths: padding.lengths })?;
            return Ok(scores);
        }
        match &padding.floor {
            Some(floor) => softmax_last_dim(&scores.broadcast_add(floor)?),
            None => softmax_last_dim(&scores),
        }
    }

    fn project(&self, x: &Tensor, linear: &Linear) -> candle_core::Result<Tensor> {
        let y = x.matmul(&linear.weight)?;
        if self.fused {
            y.inplace_op1(&AddBias(&linear.bias_host))?;
            return Ok(y);
        }
        y.broadcast_add(&linear.bias)
    }

    fn project_and_gelu(&self, x: &Tensor, linear: &Linear) -> candle_core::Result<Tensor> {
        let y = x.matmul(&linear.weight)?;
        if self.fused {
            y.inplace_op1(&BiasGelu(&linear.bias_host))?;
            return Ok(y);
        }
        y.broadcast_add(&linear.bias)?.gelu_erf()
    }

    fn project_and_norm(
        &self,
        x: &Tensor,
        linear: &Linear,
        residual: &Tensor,
        norm: &Norm,
    ) -> candle_core::Result<Tensor> {
        let y = x.matmul(&linear.weight)?;
        if self.fused {
            let (weight, shift) = (&norm.weight_host[..], &norm.bias_host[..]);
            y.inplace_op2(residual, &AddNorm { bias: &linear.bias_host, weight, shift, eps: self.eps() })?;
            return Ok(y);
        }
        layer_norm(&(y.broadcast_add(&linear.bias)? + residual)?, &norm.weight, &norm.bias, self.eps())
    }

    fn eps(&self) -> f32 {
        self.params.layer_norm_eps as f32
    }
}

/// What of a batch is padding, in the two forms the encoder needs it.
struct Padding<'a> {
    lengths: &'a [u32],
    /// `[rows, 1, 1, len]`, 0 on real tokens and [`MASKED`] elsewhere. None when no row is shorter than `len`: most of
    /// the batches of a well-chosen bucket are like that, or have one row.
    floor: Option<Tensor>,
    /// `[rows, 1, len]`, 1/length on real tokens and 0 elsewhere.
    shares: Tensor,
}

impl<'a> Padding<'a> {
    fn new(len: usize, lengths: &'a [u32], device: &Device) -> candle_core::Result<Padding<'a>> {
        let rows = lengths.len();
        let mut shares = vec![0.0f32; rows * len];
        for (row, place) in lengths.iter().zip(shares.chunks_exact_mut(len)) {
            let real = *row as usize;
            assert!(real <= len, "a row fits its place");
            place[..real].fill(1.0 / real.max(1) as f32);
        }
        let floor = if lengths.iter().all(|row| *row as usize == len) {
            None
        } else {
            let floor: Vec<f32> = shares.iter().map(|share| if *share > 0.0 { 0.0 } else { MASKED }).collect();
            Some(Tensor::from_vec(floor, (rows, 1, 1, len), device)?)
        };
        Ok(Padding { lengths, floor, shares: Tensor::from_vec(shares, (rows, 1, len), device)? })
    }
}

/// An encoder under its contract.
pub struct Bert {
    contract: Contract,
    encoder: Arc<Encoder>,
    weight_bytes: u64,
}

impl Bert {
    /// Takes the encoder's parameters out of `weights`. The manifest must describe an encoder: [`check`] says so.
    pub fn load(
        manifest: &Manifest,
        params: &BertParams,
        weights: &mut Weights,
        device: &Device,
    ) -> Result<Bert, WeightsError> {
        let encoder = Arc::new(Encoder::load(params.clone(), weights, device)?);
        Ok(Bert { contract: manifest.contract.clone(), encoder, weight_bytes: weights.taken_bytes() })
    }

    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }
}

/// What the architecture asks of a manifest; the parameters when it has it.
pub fn check(manifest: &Manifest) -> Result<&BertParams, String> {
    let params =
        manifest.bert.as_ref().ok_or("expected a [model] table with layers, hidden, heads …; there is none")?;
    let contract = &manifest.contract;
    let [input] = &contract.inputs[..] else {
        return Err(format!("expected one input (token ids), got {}", contract.inputs.len()));
    };
    if input.dtype != DType::U32 || input.shape.len() != 1 || !input.has_length() {
        return Err(format!("input {}: expected dtype u32 and the shape [a named dimension]", input.name));
    }
    let last_id = params.vocab as i64 - 1;
    // An id beyond the table would be an error deep in the batch, and cost the row's mates their answers.
    match input.range {
        Some([low, high]) if low >= 0 && high <= last_id => {}
        Some([low, high]) => {
            return Err(format!("input {}: expected a range within [0, {last_id}], got [{low}, {high}]", input.name));
        }
        None => return Err(format!("input {}: expected range = [0, {last_id}], there is none", input.name)),
    }
    let longest = manifest.batching.bucket_longest() as usize;
    if longest > params.positions {
        return Err(format!("expected buckets up to {} positions, the largest is {longest}", params.positions));
    }
    match &contract.outputs[..] {
        [output] if output.dtype == DType::F32 && output.shape == [Dim::Fixed(params.hidden as u32)] => Ok(params),
        _ => Err(format!("expected one output of dtype f32 and shape [{}]", params.hidden)),
    }
}

impl LoadedModel for Bert {
    fn contract(&self) -> &Contract {
        &self.contract
    }

    fn instantiate(&self) -> Result<Box<dyn Model>, ModelError> {
        Ok(Box::new(Instance(self.encoder.clone())))
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }
}

struct Instance(Arc<Encoder>);

impl Model for Instance {
    fn run(&mut self, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), ModelError> {
        let embeddings = self.0.forward(batch.input::<u32>(0), batch.padded_len as usize, batch.lens)?;
        super::write_f32(&embeddings, out.output_mut(0))
    }
}

fn load_norm(weights: &mut Weights, name: &str, size: usize) -> Result<Norm, WeightsError> {
    let weight = weights.take(&format!("{name}.weight"), &[size])?;
    let bias = weights.take(&format!("{name}.bias"), &[size])?;
    let host = |tensor: &Tensor| tensor.to_vec1().map_err(|error| weights.device_error(name, error));
    Ok(Norm { weight_host: host(&weight)?, bias_host: host(&bias)?, weight, bias })
}

/// Checkpoints store `[out, in]`; matmul wants `[in, out]`.
fn load_linear(weights: &mut Weights, name: &str, input: usize, output: usize) -> Result<Linear, WeightsError> {
    let weight = weights.take(&format!("{name}.weight"), &[output, input])?;
    let bias = weights.take(&format!("{name}.bias"), &[output])?;
    let finish = || Ok(Linear { weight: weight.t()?.contiguous()?, bias_host: bias.to_vec1()?, bias: bias.clone() });
    finish().map_err(|error| weights.device_error(name, error))
}

fn load_layer(params: &BertParams, weights: &mut Weights, n: usize) -> Result<Layer, WeightsError> {
    let at = format!("encoder.layer.{n}");
    let (h, i) = (params.hidden, params.intermediate);
    let mut qkv = Vec::with_capacity(3);
    for part in ["query", "key", "value"] {
        qkv.push(load_linear(weights, &format!("{at}.attention.self.{part}"), h, h)?);
    }
    let scale = 1.0 / ((h / params.heads) as f64).sqrt();
    Ok(Layer {
        qkv: fold_qkv(&qkv, scale).map_err(|e| weights.device_error(&format!("{at}.attention.self"), e))?,
        attention_out: load_linear(weights, &format!("{at}.attention.output.dense"), h, h)?,
        attention_norm: load_norm(weights, &format!("{at}.attention.output.LayerNorm"), h)?,
        inner: load_linear(weights, &format!("{at}.intermediate.dense"), h, i)?,
        out: load_linear(weights, &format!("{at}.output.dense"), i, h)?,
        norm: load_norm(weights, &format!("{at}.output.LayerNorm"), h)?,
    })
}

fn fold_qkv(qkv: &[Linear], scale: f64) -> candle_core::Result<Linear> {
    let [q, k, v] = qkv else { unreachable!("load_layer brings three") };
    let weight = Tensor::cat(&[&(&q.weight * scale)?, &k.weight, &v.weight], 1)?.contiguous()?;
    let bias = Tensor::cat(&[&(&q.bias * scale)?, &k.bias, &v.bias], 0)?;
    Ok(Linear { weight, bias_host: bias.to_vec1()?, bias })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::models::weights::WeightNames;

    const TINY: &str = include_str!("../../tests/fixtures/tiny_bert/model.toml");

    #[test]
    fn a_manifest_that_is_no_encoders_is_refused() {
        for (from, to, expected) in [
            ("range = [0, 99]", "range = [0, 100]", "expected a range within [0, 99], got [0, 100]"),
            ("range = [0, 99]", "", "expected range = [0, 99], there is none"),
            ("positions = 64", "positions = 63", "expected buckets up to 63 positions, the largest is 64"),
            ("shape = [32]", "shape = [33]", "expected one output of dtype f32 and shape [32]"),
            ("dtype = \"u32\"", "dtype = \"i32\"", "expected dtype u32"),
        ] {
            assert_eq!(TINY.matches(from).count(), 1, "{from:?} stands in the manifest once");
            let manifest =
                Manifest::parse("tiny_bert", Path::new("model.toml"), &TINY.replace(from, to)).expect("parses");
            let error = check(&manifest).expect_err("is refused");
            assert!(error.contains(expected), "{error}\nexpected: {expected}");
        }
    }

    /// Goal: the fused operations are the reference's. Method: the same batch both ways, in every mix of real and padding.
    #[test]
    fn the_fused_path_equals_candles_own_operations() {
        let manifest = Manifest::parse("tiny_bert", Path::new("model.toml"), TINY).expect("parses");
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny_bert/1/weights.safetensors");
        let load = |fused: bool| {
            let mut weights =
                Weights::open(&file, u64::MAX, None, WeightNames::default(), &Device::Cpu).expect("is there");
            let params = check(&manifest).expect("is an encoder's").clone();
            let mut encoder = Encoder::load(params, &mut weights, &Device::Cpu).expect("loads");
            encoder.fused = fused;
            encoder
        };
        let (fused, reference) = (load(true), load(false));
        for (len, lengths) in [(1, &[1, 1][..]), (7, &[7, 1, 0, 3]), (16, &[16]), (33, &[33, 32, 5]), (64, &[9, 64])] {
            let ids: Vec<u32> = (0..len * lengths.len()).map(|n| (n * 37 % 100) as u32).collect();
            let answer = |encoder: &Encoder| {
                let embeddings = encoder.forward(&ids, len, lengths).expect("computes");
                embeddings.flatten_all().and_then(|all| all.to_vec1::<f32>()).expect("is f32")
            };
            for (got, want) in answer(&fused).iter().zip(answer(&reference)) {
                assert!((got - want).abs() <= 1e-5, "padded to {len}: expected {want}, got {got}");
            }
        }
    }
}
