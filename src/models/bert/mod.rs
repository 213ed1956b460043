//! The encoders of the BERT family: token ids to one answer per row, an embedding or the logits of a classifier.
//!
//! On a CPU the arithmetic is that of the room kernels, over rows that lie end to end or padded; on another device, and as the
//! reference in tests, candle's own operations (reference.rs), padded.
//!
//! Always true
//! - A row's answer depends on its own real tokens only: padding takes no part in attention or pooling, whatever ids stand there.
//! - Every value stays finite for a row without any real token.
//!
//! Elsewhere: tensor names of a family (checkpoint.rs), of a file (weights.rs), sizes as the manifest gives them (manifest.rs).

mod checkpoint;
mod reference;

use std::sync::Arc;

use candle_core::Tensor;

use self::checkpoint::{Between, Checkpoint, Dense, Norm};
use self::reference::Reference;
use super::manifest::{Activation, BertParams, Head, Manifest, Pooling, Precision};
use super::repository::LoadOptions;
use super::weights::{Weights, WeightsError};
use crate::contract::{Contract, Dim, TensorSpec};
use crate::executor::batch::{BatchOutput, BatchView};
use crate::executor::device::Program;
use crate::executor::model::{LoadedModel, Model, ModelError};
use crate::gpu::encoder as gpu;
use crate::gpu::launch::Float;
use crate::gpu::ops::Bounds;
use crate::kernels::encoder::{self, Encoder, Scratch};
use crate::kernels::linear::{Packed, Then};
use crate::kernels::product::Product;
use crate::kernels::{self, int8, rows};
use crate::vocab::{DType, Layout};

/// Places of a batch that an instance has memory for from the start. A manifest that sets no budget allows batches that no CPU
/// should run, of hundreds of megabytes; who runs them pays for the memory with the first one.
const RESERVED_MAX: usize = 2048;

enum Network {
    Kernels(Encoder),
    Candle(Reference),
    /// For executors of a device, which compute it without this room.
    Device(Program<Vec<f32>>),
}

/// An encoder under its contract.
pub struct Bert {
    contract: Contract,
    params: BertParams,
    network: Arc<Network>,
    weight_bytes: u64,
    /// What memory is reserved for: places, rows, and longest row.
    largest: (usize, usize, usize),
    threads: usize,
}

impl Bert {
    /// Takes the encoder's parameters out of `weights`. The manifest must describe an encoder: [`check`] says so.
    pub fn load(
        manifest: &Manifest,
        params: &BertParams,
        weights: &mut Weights,
        options: &LoadOptions,
    ) -> Result<Bert, WeightsError> {
        let device = &options.device;
        let contract = manifest.contract.clone();
        let checkpoint = Checkpoint::take(params, contract.inputs.len() == 2, weights)?;
        let batching = &manifest.batching;
        let longest = batching.bucket_longest() as usize;
        let places = usize::try_from(batching.padded_cells_max).unwrap_or(usize::MAX);
        let places = places.min(batching.rows_max as usize * longest);
        let network = if options.for_device {
            let form = device_form(params);
            let form = form.map_err(|reason| weights.device_error("encoder", candle_core::Error::Msg(reason)))?;
            let bounds = Bounds { rows: batching.rows_max as usize, tokens: places.max(longest), longest };
            let inputs = contract.inputs.len();
            let program = program(form, checkpoint, bounds, inputs);
            Network::Device(program.map_err(|error| weights.device_error("encoder", error))?)
        } else if matches!(params.precision, Precision::F16 | Precision::BF16) {
            let error = candle_core::Error::Msg("f16 and bf16 are computed on a GPU only".to_owned());
            return Err(weights.device_error("[model] precision", error));
        } else if device.is_cpu() {
            let encoder = pack(params, checkpoint).map_err(|error| weights.device_error("encoder", error))?;
            Network::Kernels(encoder)
        } else if params.precision == Precision::Int8 {
            let error = candle_core::Error::Msg("int8 is computed on a CPU only".to_owned());
            return Err(weights.device_error("[model] precision", error));
        } else {
            Network::Candle(Reference::new(params.clone(), checkpoint, device.clone()))
        };
        let places = places.min(RESERVED_MAX.max(longest));
        let weight_bytes = match &network {
            Network::Kernels(encoder) if params.precision == Precision::Int8 => encoder.bytes() as u64,
            _ => weights.taken_bytes(),
        };
        Ok(Bert {
            contract,
            params: params.clone(),
            network: Arc::new(network),
            weight_bytes,
            threads: options.threads.max(1),
            largest: (places, batching.rows_max as usize, longest),
        })
    }
}

/// From a checkpoint to the layout that this machine multiplies fastest. The checkpoint's own copy is gone afterwards.
fn pack(params: &BertParams, checkpoint: Checkpoint) -> candle_core::Result<Encoder> {
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let norm = |norm: &Norm| {
        let eps = params.layer_norm_eps as f32;
        Ok::<_, candle_core::Error>(rows::Norm { weight: values(&norm.weight)?, shift: values(&norm.bias)?, eps })
    };
    let packed = |dense: &Dense| {
        let inputs = dense.weight.dim(1)?;
        Ok::<_, candle_core::Error>(Packed::new(&values(&dense.weight)?, &values(&dense.bias)?, inputs))
    };
    let product = |dense: &Dense| {
        Ok::<_, candle_core::Error>(match params.precision {
            // Half precision was refused: no CPU multiplies it faster.
            Precision::F32 | Precision::F16 | Precision::BF16 => Product::F32(packed(dense)?),
            Precision::Int8 => {
                let inputs = dense.weight.dim(1)?;
                Product::Int8(int8::Packed::new(&values(&dense.weight)?, &values(&dense.bias)?, inputs))
            }
        })
    };
    let scale = 1.0 / ((params.hidden / params.heads) as f64).sqrt();
    let mut layers = Vec::with_capacity(params.layers);
    // One after the other, so that no more than one layer is in memory twice.
    for layer in checkpoint.layers {
        let query = Dense { weight: (&layer.query.weight * scale)?, bias: (&layer.query.bias * scale)? };
        let qkv = together([&query, &layer.key, &layer.value])?;
        layers.push(encoder::Layer {
            qkv: product(&qkv)?,
            attention_out: product(&layer.attention_out)?,
            attention_norm: norm(&layer.attention_norm)?,
            inner: product(&layer.inner)?,
            out: product(&layer.out)?,
            norm: norm(&layer.norm)?,
        });
    }
    let head = (checkpoint.head.iter()).map(|(dense, between)| {
        let then = match between {
            Between::Tanh => Then::Tanh,
            Between::Relu => Then::Relu,
            Between::Nothing => Then::Nothing,
        };
        Ok::<_, candle_core::Error>((packed(dense)?, then))
    });
    Ok(Encoder {
        hidden: params.hidden,
        heads: params.heads,
        words: values(&checkpoint.words)?,
        places: values(&checkpoint.places)?,
        segments: checkpoint.segments.as_ref().map_or(Ok(Vec::new()), values)?,
        norm: norm(&checkpoint.norm)?,
        layers,
        activation: match params.activation {
            Activation::GeluErf => Then::GeluErf,
            Activation::GeluTanh => Then::GeluTanh,
            Activation::Relu => Then::Relu,
        },
        pooling: match params.pooling {
            Pooling::Mean => encoder::Pooling::Mean,
            Pooling::Cls => encoder::Pooling::Cls,
            Pooling::Max => encoder::Pooling::Max,
        },
        normalize: params.normalize,
        head: head.collect::<Result<_, _>>()?,
    })
}

/// Whether the kernels of devices compute this encoder; otherwise why not.
pub fn has_program(params: &BertParams) -> Result<(), String> {
    device_form(params).map(drop)
}

/// An encoder's sizes as the kernels of devices are given them, or why there are none for it.
fn device_form(params: &BertParams) -> Result<gpu::Form, String> {
    let form = gpu::Form {
        hidden: params.hidden,
        heads: params.heads,
        intermediate: params.intermediate,
        activation: match params.activation {
            Activation::GeluErf => gpu::Activation::GeluErf,
            Activation::GeluTanh => gpu::Activation::GeluTanh,
            Activation::Relu => gpu::Activation::Relu,
        },
        pooling: match params.pooling {
            Pooling::Mean => gpu::Pool::Mean,
            Pooling::Cls => gpu::Pool::First,
            Pooling::Max => gpu::Pool::Max,
        },
        normalize: params.normalize,
        eps: params.layer_norm_eps as f32,
        float: match params.precision {
            Precision::F32 => Float::F32,
            Precision::F16 => Float::F16,
            Precision::BF16 => Float::BF16,
            Precision::Int8 => return Err("int8 is computed on a CPU only".to_owned()),
        },
        head: match params.head {
            Head::Embedding => Vec::new(),
            Head::Classify => vec![params.hidden, params.outputs()],
        },
    };
    form.check().map(|()| form)
}

/// From a checkpoint to what executors of a device are given.
fn program(
    form: gpu::Form,
    checkpoint: Checkpoint,
    bounds: Bounds,
    inputs: usize,
) -> candle_core::Result<Program<Vec<f32>>> {
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let norm = |norm: &Norm| {
        Ok::<_, candle_core::Error>(gpu::Norm { weight: values(&norm.weight)?, shift: values(&norm.bias)? })
    };
    let dense = |dense: &Dense| {
        Ok::<_, candle_core::Error>(gpu::Dense { weight: values(&dense.weight)?, bias: values(&dense.bias)? })
    };
    let mut layers = Vec::with_capacity(checkpoint.layers.len());
    for layer in checkpoint.layers {
        let qkv = together([&layer.query, &layer.key, &layer.value])?;
        layers.push(gpu::Layer {
            qkv: dense(&qkv)?,
            attention_out: dense(&layer.attention_out)?,
            attention_norm: norm(&layer.attention_norm)?,
            inner: dense(&layer.inner)?,
            out: dense(&layer.out)?,
            norm: norm(&layer.norm)?,
        });
    }
    let head = checkpoint.head.iter().map(|(product, between)| {
        let then = match between {
            Between::Tanh => gpu::Activation::Tanh,
            Between::Relu => gpu::Activation::Relu,
            Between::Nothing => gpu::Activation::None,
        };
        Ok::<_, candle_core::Error>((dense(product)?, then))
    });
    let parameters = gpu::Parameters {
        words: values(&checkpoint.words)?,
        places: values(&checkpoint.places)?,
        segments: checkpoint.segments.as_ref().map(values).transpose()?,
        norm: norm(&checkpoint.norm)?,
        layers,
        head: head.collect::<Result<_, _>>()?,
    };
    Ok(Program { form, parameters: Arc::new(parameters), bounds, inputs })
}

/// Query, key and value in one product.
fn together(parts: [&Dense; 3]) -> candle_core::Result<Dense> {
    Ok(Dense {
        weight: Tensor::cat(&parts.map(|part| &part.weight), 0)?,
        bias: Tensor::cat(&parts.map(|part| &part.bias), 0)?,
    })
}

/// What the architecture asks of a manifest; the parameters when it has it.
pub fn check(manifest: &Manifest) -> Result<&BertParams, String> {
    let params =
        manifest.bert.as_ref().ok_or("expected a [model] table with layers, hidden, heads …; there is none")?;
    let contract = &manifest.contract;
    match &contract.inputs[..] {
        [ids] => check_ids(ids, "token ids", params.vocab)?,
        [ids, segments] => {
            check_ids(ids, "token ids", params.vocab)?;
            check_ids(segments, "segments", params.segments)?;
        }
        _ => {
            return Err(format!("expected one input (token ids) or two (and segments), got {}", contract.inputs.len()));
        }
    }
    let longest = manifest.batching.bucket_longest() as usize;
    if longest > params.longest() {
        return Err(format!("expected buckets up to {} positions, the largest is {longest}", params.longest()));
    }
    match &contract.outputs[..] {
        [output] if output.dtype == DType::F32 && output.shape == [Dim::Fixed(params.outputs() as u32)] => Ok(params),
        _ => Err(format!("expected one output of dtype f32 and shape [{}]", params.outputs())),
    }
}

/// An input of indices into a table of so many rows.
fn check_ids(input: &TensorSpec, what: &str, table: usize) -> Result<(), String> {
    if input.dtype != DType::U32 || input.shape.len() != 1 || !input.has_length() {
        return Err(format!("input {} ({what}): expected dtype u32 and the shape [a named dimension]", input.name));
    }
    let last_id = table as i64 - 1;
    // An id beyond the table would be an error deep in the batch, and cost the row's mates their answers.
    match input.range {
        Some([low, high]) if low >= 0 && high <= last_id => Ok(()),
        Some([low, high]) => {
            Err(format!("input {}: expected a range within [0, {last_id}], got [{low}, {high}]", input.name))
        }
        None => Err(format!("input {}: expected range = [0, {last_id}], there is none", input.name)),
    }
}

impl LoadedModel for Bert {
    fn contract(&self) -> &Contract {
        &self.contract
    }

    fn instantiate(&self) -> Result<Box<dyn Model>, ModelError> {
        let mut scratches = Vec::new();
        scratches.resize_with(self.threads, Scratch::default);
        if let Network::Kernels(encoder) = &*self.network {
            let (places, rows, longest) = self.largest;
            // A share can be longer than its part of the batch by not much less than a row.
            let share = (places / self.threads + longest).min(places);
            scratches.iter_mut().for_each(|scratch| encoder.reserve(scratch, share, rows, longest));
        }
        Ok(Box::new(Instance { network: self.network.clone(), scratches }))
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    fn operations(&self, len: u32) -> Option<f64> {
        let (len, BertParams { hidden, intermediate, layers, .. }) = (f64::from(len), &self.params);
        let (h, i) = (*hidden as f64, *intermediate as f64);
        // Products with weights, and the two of attention. What is neither does not matter for a rate.
        Some(*layers as f64 * len * (2.0 * (4.0 * h * h + 2.0 * h * i) + 4.0 * len * h))
    }

    fn layouts(&self) -> &'static [Layout] {
        match &*self.network {
            Network::Kernels(_) => &[Layout::Padded, Layout::Packed],
            Network::Candle(_) => &[Layout::Padded],
            Network::Device(_) => &[Layout::Packed, Layout::Padded],
        }
    }

    fn program(&self) -> Option<Program<Vec<f32>>> {
        match &*self.network {
            Network::Device(program) => Some(program.clone()),
            Network::Kernels(_) | Network::Candle(_) => None,
        }
    }
}

struct Instance {
    network: Arc<Network>,
    /// One for each thread that shares a batch.
    scratches: Vec<Scratch>,
}

/// Computes one batch on as many threads as there are scratches: rows do not need each other, so each takes a share of about
/// the same places. Returns how many places were computed.
fn share_out(encoder: &Encoder, scratches: &mut [Scratch], batch: encoder::Batch<'_>, out: &mut [f32]) -> usize {
    let run = |scratch: &mut Scratch, batch: encoder::Batch<'_>, out: &mut [f32]| {
        let places = kernels::places(kernels::arch(), batch.ids.len());
        encoder.forward(kernels::arch(), scratch, batch, out);
        places
    };
    let (first, others) = scratches.split_first_mut().expect("an instance has at least one thread");
    if others.is_empty() || batch.lens.len() == 1 {
        return run(first, batch, out);
    }
    let span = |row: usize| batch.padded_len.unwrap_or(batch.lens[row]) as usize;
    let (mut rows, mut places) = (0, 0);
    while rows < batch.lens.len() && (rows == 0 || (places + span(rows)) * (others.len() + 1) <= batch.ids.len()) {
        places += span(rows);
        rows += 1;
    }
    let (lens, lens_rest) = batch.lens.split_at(rows);
    let (ids, ids_rest) = batch.ids.split_at(places);
    let segments = batch.segments.map(|segments| segments.split_at(places));
    let (out, out_rest) = out.split_at_mut(rows * encoder.outputs());
    let mine = encoder::Batch { ids, lens, segments: segments.map(|(mine, _)| mine), ..batch };
    let rest = encoder::Batch { ids: ids_rest, lens: lens_rest, segments: segments.map(|(_, rest)| rest), ..batch };
    if lens_rest.is_empty() {
        return run(first, mine, out);
    }
    std::thread::scope(|scope| {
        let mine = scope.spawn(move || run(first, mine, out));
        let rest = share_out(encoder, others, rest, out_rest);
        mine.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)) + rest
    })
}

impl Model for Instance {
    fn run(&mut self, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), ModelError> {
        let ids = batch.input::<u32>(0);
        let segments = (batch.inputs.len() == 2).then(|| batch.input::<u32>(1));
        match &*self.network {
            Network::Kernels(encoder) => {
                let padded_len = (batch.layout == Layout::Padded).then_some(batch.padded_len);
                let batch = encoder::Batch { ids, segments, lens: batch.lens, padded_len };
                out.cells_computed = share_out(encoder, &mut self.scratches, batch, out.output_mut(0)) as u64;
                Ok(())
            }
            Network::Candle(reference) => {
                let answers = reference.forward(ids, segments, batch.padded_len as usize, batch.lens)?;
                super::write_f32(&answers, out.output_mut(0))
            }
            Network::Device(_) => Err(ModelError("this model was loaded for a device, which runs it itself".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;

    use super::*;

    const TINY: &str = include_str!("../../../tests/fixtures/tiny_bert/model.toml");

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

    /// Goal: the kernels are the reference's equal, in both layouts, for every head, pooling, activation and family. Method: the
    /// same rows through each.
    #[test]
    fn the_kernels_equal_candles_own_operations() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let family = std::fs::read_dir(fixtures.join("family")).expect("is there");
        let family = family.map(|entry| entry.expect("can be read").path());
        let folders: Vec<_> = family.chain([fixtures.join("tiny_bert")]).collect();
        assert!(folders.len() > 10, "{folders:?}");
        for folder in folders {
            let text = std::fs::read_to_string(folder.join("model.toml")).expect("has a manifest");
            let manifest = Manifest::parse("fixture", Path::new("model.toml"), &text).expect("parses");
            equal_to_reference(&manifest, &folder.join("1/weights.safetensors"));
        }
    }

    fn equal_to_reference(manifest: &Manifest, file: &Path) {
        let params = check(manifest).expect("is an encoder's");
        let segmented = manifest.contract.inputs.len() == 2;
        let take = || {
            let names = manifest.weights.clone().unwrap_or_default().names;
            let mut weights = Weights::open(file, u64::MAX, None, names, &Device::Cpu).expect("is there");
            Checkpoint::take(params, segmented, &mut weights).expect("loads")
        };
        let reference = Reference::new(params.clone(), take(), Device::Cpu);
        let encoder = pack(params, take()).expect("packs");
        let mut scratch = Scratch::default();
        // Of no tokens only a mean is agreed on: zeros.
        let shortest = if params.pooling == Pooling::Mean { 0 } else { 2 };
        for (len, lens) in
            [(1, &[1, 1][..]), (7, &[7, 1, shortest, 3]), (16, &[16]), (33, &[33, 32, 5]), (64, &[9, 64, 2])]
        {
            let places: Vec<u32> = (0..(len * lens.len()) as u32).collect();
            let ids: Vec<u32> = places.iter().map(|n| n * 37 % 100).collect();
            let segments: Vec<u32> = places.iter().map(|n| n / 3 % 2).collect();
            let some = |segments| segmented.then_some(segments);
            let want = reference.forward(&ids, some(&segments[..]), len, lens);
            let want = want.and_then(|all| all.flatten_all()?.to_vec1::<f32>()).expect("computes");
            let real = |all: &[u32]| -> Vec<u32> {
                all.chunks_exact(len).zip(lens).flat_map(|(row, len)| &row[..*len as usize]).copied().collect()
            };
            let packed = (real(&ids), real(&segments));
            for arch in kernels::archs() {
                for (ids, segments, padded_len) in [(&ids, &segments, Some(len as u32)), (&packed.0, &packed.1, None)] {
                    let mut got = vec![f32::NAN; want.len()];
                    let batch = encoder::Batch { ids, segments: some(&segments[..]), lens, padded_len };
                    encoder.forward(arch, &mut scratch, batch, &mut got);
                    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
                        let near = (got - want).abs() <= 1e-5 * want.abs().max(1.0);
                        assert!(near, "{params:?} {arch:?} value {at} of {len}: expected {want}, got {got}");
                    }
                }
            }
        }
    }
}
