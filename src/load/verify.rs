//! What answers must be: an echo's input, or what the same input gave when it ran alone.
//!
//! Always true
//! - The reference of a model that computes is its own answer to a batch of one: batching, padding and scattering are
//!   what is checked, not the model's arithmetic.
//! - Integers must be equal. Floats may differ by 1e-4, or point in the same direction (cosine at least 0.9999).

use std::collections::VecDeque;

use super::payload::Inputs;
use super::{LoadError, Rng};
use crate::client::request::{tensor_bytes, to_f64};
use crate::client::session::ModelInfo;
use crate::client::{Client, Pending, Request, Response};
use crate::contract::Contract;
use crate::vocab::DType;
use crate::wire::encoder::align8;
use crate::wire::message::{InferResult, TensorMeta};

pub const TOLERANCE_ABS: f64 = 1e-4;
pub const COSINE_MIN: f64 = 0.9999;
/// Mismatches that are kept word by word.
const EXAMPLES_MAX: usize = 8;
/// References asked for at once.
const DEPTH: usize = 8;
/// Different inputs of a run whose references have to be computed first.
pub const REFERENCES_MAX: usize = 512;

/// Whether the answer must be the input itself.
pub fn is_echo(contract: &Contract) -> bool {
    contract.architecture == "echo"
}

struct Reference {
    outputs: Vec<TensorMeta>,
    payload: Vec<u8>,
}

/// Compares answers as they come.
pub struct Verifier {
    /// By entry.
    references: Vec<Reference>,
    share: f64,
    rng: Rng,
    pub verified: u64,
    pub mismatches: u64,
    pub examples: Vec<String>,
}

impl Verifier {
    /// The reference of an echo is what is sent.
    pub fn of_echo(inputs: &Inputs, share: f64, seed: u64) -> Verifier {
        let reference = |index| Reference {
            outputs: inputs.metadata(index).inputs.to_vec(),
            payload: inputs.payload(index).to_vec(),
        };
        Verifier::new((0..inputs.len() as u32).map(reference).collect(), share, seed)
    }

    /// Runs every input alone and keeps the answers.
    pub fn of_model(
        client: &Client,
        model: &ModelInfo,
        inputs: &Inputs,
        share: f64,
        seed: u64,
    ) -> Result<Verifier, LoadError> {
        let mut references = Vec::with_capacity(inputs.len());
        let mut pending: VecDeque<Pending> = VecDeque::new();
        let mut keep = |pending: Pending| -> Result<(), LoadError> {
            let response = pending.wait()?;
            if response.batch_rows() != 1 {
                return Err(LoadError::Usage(format!(
                    "a reference was to run alone, its batch had {} rows: the server does not compose batches",
                    response.batch_rows()
                )));
            }
            references.push(Reference::of(&response));
            Ok(())
        };
        for index in 0..inputs.len() as u32 {
            if pending.len() == DEPTH
                && let Some(first) = pending.pop_front()
            {
                keep(first)?;
            }
            pending.push_back(client.submit(&alone(&model.contract, inputs, index, seed))?);
        }
        pending.into_iter().try_for_each(keep)?;
        Ok(Verifier::new(references, share, seed))
    }

    fn new(references: Vec<Reference>, share: f64, seed: u64) -> Verifier {
        Verifier {
            references,
            share,
            rng: Rng::new(seed, 3),
            verified: 0,
            mismatches: 0,
            examples: Vec::with_capacity(EXAMPLES_MAX),
        }
    }

    /// Compares one answer. Allocates only for a mismatch, or for floats that are not equal to the bit.
    pub fn check(&mut self, number: u64, entry: u32, result: &InferResult, payload: &[u8]) {
        if self.share < 1.0 && self.rng.unit() >= self.share {
            return;
        }
        self.verified += 1;
        let reference = &self.references[entry as usize];
        if let Err(why) = compare(&reference.outputs, &reference.payload, &result.outputs, payload) {
            self.mismatches += 1;
            if self.examples.len() < EXAMPLES_MAX {
                self.examples.push(format!(
                    "request {number}, batch {} of {} rows padded to {}: {why}",
                    result.batch, result.batch_rows, result.padded_len
                ));
            }
        }
    }
}

impl Reference {
    fn of(response: &Response) -> Reference {
        Reference { outputs: response.outputs().to_vec(), payload: response.payload().to_vec() }
    }
}

/// Input `index` as a request that forms a batch of its own.
fn alone(contract: &Contract, inputs: &Inputs, index: u32, seed: u64) -> Request {
    let payload = inputs.payload(index);
    // Unlikely to be in use by anybody else who composes batches at the same time, and never 0.
    let tag = Rng::new(seed, 0x2000_0000 + u64::from(index)).next_u64() | 1;
    let mut request = Request::new(contract.name.as_str()).version(contract.version.as_str()).compose(tag, 1);
    let mut at = 0;
    for (spec, meta) in contract.inputs.iter().zip(inputs.metadata(index).inputs.iter()) {
        let bytes = tensor_bytes(meta, spec.dtype).expect("the contract's check passed");
        request = request.input_bytes(spec.name.as_str(), spec.dtype, &meta.dims, payload[at..at + bytes].to_vec());
        at += align8(bytes);
    }
    request
}

/// Whether two results are the same, tensor by tensor. The padding between tensors carries no meaning.
pub fn compare(
    expected_outputs: &[TensorMeta],
    expected: &[u8],
    outputs: &[TensorMeta],
    payload: &[u8],
) -> Result<(), String> {
    if outputs != expected_outputs {
        return Err(format!("expected tensors {expected_outputs:?}, got {outputs:?}"));
    }
    let mut at = 0;
    for meta in outputs {
        let dtype = DType::from_number(meta.dtype).ok_or_else(|| format!("dtype number {} is unknown", meta.dtype))?;
        let bytes = tensor_bytes(meta, dtype).ok_or("a tensor is larger than any payload")?;
        let (Some(left), Some(right)) = (expected.get(at..at + bytes), payload.get(at..at + bytes)) else {
            return Err(format!("expected {} payload bytes, got {}", expected.len(), payload.len()));
        };
        if left != right {
            compare_tensor(meta.index, dtype, left, right)?;
        }
        at += align8(bytes);
    }
    Ok(())
}

fn compare_tensor(index: u8, dtype: DType, expected: &[u8], got: &[u8]) -> Result<(), String> {
    let is_float = matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64);
    if !is_float {
        let at = expected.iter().zip(got).position(|(left, right)| left != right).expect("they were found to differ");
        return Err(format!(
            "output {index} differs at element {}: byte {at} is {:#04x}, expected {:#04x}",
            at / dtype.size(),
            got[at],
            expected[at]
        ));
    }
    let (expected, got) = (to_f64(dtype, expected), to_f64(dtype, got));
    let mut worst = (0, 0.0);
    let (mut dot, mut norm_left, mut norm_right) = (0.0, 0.0, 0.0);
    for (at, (left, right)) in expected.iter().zip(&got).enumerate() {
        // Equal infinities have no difference that is a number.
        let apart = if left == right { 0.0 } else { (left - right).abs() };
        if apart.is_nan() || apart > worst.1 {
            worst = (at, if apart.is_nan() { f64::INFINITY } else { apart });
        }
        dot += left * right;
        norm_left += left * left;
        norm_right += right * right;
    }
    let cosine = dot / (norm_left * norm_right).sqrt();
    if worst.1 <= TOLERANCE_ABS || cosine >= COSINE_MIN {
        return Ok(());
    }
    Err(format!(
        "output {index} differs: element {} is {}, expected {}; cosine {cosine:.6}",
        worst.0, got[worst.0], expected[worst.0]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::message::List;

    fn meta(dtype: DType, elements: u32) -> Vec<TensorMeta> {
        vec![TensorMeta { index: 0, dtype: dtype as u8, dims: List::from_slice(&[1, elements]).expect("two dims") }]
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn floats_may_differ_a_little_and_integers_not_at_all() {
        let left = floats(&[1.0, 0.5]);
        assert_eq!(compare(&meta(DType::F32, 2), &left, &meta(DType::F32, 2), &floats(&[1.00005, 0.5])), Ok(()));
        assert!(compare(&meta(DType::F32, 2), &left, &meta(DType::F32, 2), &floats(&[0.5, 1.0])).is_err());
        assert!(compare(&meta(DType::U8, 4), &[1, 2, 3, 4], &meta(DType::U8, 4), &[1, 2, 3, 5]).is_err());
    }

    #[test]
    fn a_nan_equals_nothing() {
        let left = floats(&[1.0, 0.5]);
        assert!(compare(&meta(DType::F32, 2), &left, &meta(DType::F32, 2), &floats(&[1.0, f32::NAN])).is_err());
    }

    #[test]
    fn another_shape_is_a_mismatch_even_if_the_bytes_agree() {
        let bytes = [0; 8];
        assert!(compare(&meta(DType::U8, 8), &bytes, &meta(DType::U8, 4), &bytes).is_err());
        assert!(compare(&meta(DType::U8, 8), &bytes, &meta(DType::U8, 8), &bytes[..4]).is_err());
    }
}
