//! A request as a caller writes it down, and a response as a caller reads it: both by name, both typed.
//!
//! Always true
//! - A [`Response`] has verified that each of its tensors lies inside its payload; access cannot go out of bounds.
//! - Its bytes start at a multiple of 8 and so does every tensor: a view as `&[f32]` needs no copy.
//!
//! Elsewhere: whether a request fits its contract (contract.rs), ids and credit (session.rs).

use std::sync::Arc;
use std::time::Duration;

use super::ClientError;
use super::session::ModelInfo;
use crate::clock;
use crate::contract::Contract;
use crate::vocab::{DType, Moment, Refusal, Retry, SealReason, TraceContext, TraceParentError};
use crate::wire::encoder::align8;
use crate::wire::message::{
    INFER_ITEMS, INFER_RECEIPT, INFER_TIMINGS, INFER_TRUNCATE, Infer, InferResult, List, RANK_MAX, RESULT_TRUNCATED,
    Receipt, TensorMeta, Timings,
};

/// Rust types that are elements of tensors. Half floats have none here: read them with [`Response::output_f64`].
pub trait Element: bytemuck::AnyBitPattern + bytemuck::NoUninit {
    const DTYPE: DType;
}

macro_rules! elements {
    ($($ty:ty => $dtype:ident),*) => {$(
        impl Element for $ty {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}

elements!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64, f32 => F32, f64 => F64);

#[derive(Clone, Debug)]
struct Input {
    /// Ignored for text, of which there is one.
    name: String,
    dtype: DType,
    dims: Vec<u32>,
    bytes: Vec<u8>,
}

/// What to run: a model's name, its inputs by name, and how much time there is.
#[derive(Clone, Debug)]
pub struct Request {
    model: String,
    version: String,
    inputs: Vec<Input>,
    deadline: Option<Duration>,
    priority: u8,
    flags: u8,
    compose_tag: u64,
    compose_rows: u32,
    /// How late it was, and when that was said.
    late: Option<(Duration, Moment)>,
    trace: Option<TraceContext>,
    built_for: Option<u64>,
}

impl Request {
    pub fn new(model: impl Into<String>) -> Request {
        Request {
            model: model.into(),
            version: String::new(),
            inputs: Vec::new(),
            deadline: None,
            priority: 0,
            flags: 0,
            compose_tag: 0,
            compose_rows: 0,
            late: None,
            trace: None,
            built_for: None,
        }
    }

    /// A request whose input is one text, tokenized by the server.
    pub fn text(model: impl Into<String>, text: &str) -> Request {
        let mut request = Request::new(model);
        let mut bytes = (text.len() as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        request.inputs.push(Input { name: String::new(), dtype: DType::Text, dims: vec![1], bytes });
        request
    }

    /// A version other than the one that serves by default.
    pub fn version(mut self, version: impl Into<String>) -> Request {
        self.version = version.into();
        self
    }

    /// The contract that the caller was written for, by its hash (`ferry models`, [`ModelInfo::contract_hash`]). Where the
    /// server has another one the request is not sent, and the error names both: a model that was changed under the same
    /// name and version is noticed before its numbers are believed. A pool asks its other replicas, which may not have
    /// been changed yet.
    pub fn built_for(mut self, contract_hash: u64) -> Request {
        self.built_for = Some(contract_hash);
        self
    }

    /// Whether this may be asked of a model with this contract.
    pub(super) fn check_built_for(&self, contract_hash: u64) -> Result<(), Refusal> {
        match self.built_for {
            Some(expected) if expected != contract_hash => {
                let name = &self.model;
                let message = format!(
                    "built for contract {expected:016x} of {name}, and the server has contract {contract_hash:016x}"
                );
                Err(Refusal { retry: Retry::Elsewhere, ..Refusal::invalid(message) })
            }
            _ => Ok(()),
        }
    }

    /// Adds an input; `dims[0]` is the number of rows.
    pub fn input<T: Element>(self, name: impl Into<String>, dims: &[u32], values: &[T]) -> Request {
        self.input_bytes(name, T::DTYPE, dims, bytemuck::cast_slice(values).to_vec())
    }

    /// Adds an input whose elements are already little-endian bytes.
    pub fn input_bytes(mut self, name: impl Into<String>, dtype: DType, dims: &[u32], bytes: Vec<u8>) -> Request {
        self.inputs.push(Input { name: name.into(), dtype, dims: dims.to_vec(), bytes });
        self
    }

    /// Time from now until the answer is worth nothing. Counted from the call that sends the request.
    pub fn deadline(mut self, deadline: Duration) -> Request {
        self.deadline = Some(deadline);
        self
    }

    /// 0 is the highest.
    pub fn priority(mut self, priority: u8) -> Request {
        self.priority = priority;
        self
    }

    /// Asks for the server's timeline in the response.
    pub fn timings(mut self) -> Request {
        self.flags |= INFER_TIMINGS;
        self
    }

    /// Asks for the receipt in the response: its batch, and what it waited for. The timeline comes with it.
    pub fn receipt(mut self) -> Request {
        self.flags |= INFER_RECEIPT;
        self
    }

    /// Asks for rows as they are done.
    pub(super) fn by_items(mut self) -> Request {
        self.flags |= INFER_ITEMS;
        self
    }

    /// Allows a text that is too long to be cut.
    pub fn truncate(mut self) -> Request {
        self.flags |= INFER_TRUNCATE;
        self
    }

    /// For tests: all requests with this tag form exactly one batch of `rows` rows.
    pub fn compose(mut self, tag: u64, rows: u32) -> Request {
        self.compose_tag = tag;
        self.compose_rows = rows;
        self
    }

    /// It was meant to be sent this long ago: the server counts its latency from then too. What it still waits in this client
    /// is added. For callers that send on a schedule, in every request, with zero where it is on time.
    pub fn late(mut self, late: Duration) -> Request {
        self.late = Some((late, clock::now()));
        self
    }

    /// The caller's span, as a `traceparent` of W3C Trace Context: the parent of what the server records.
    pub fn trace_parent(mut self, text: &str) -> Result<Request, TraceParentError> {
        self.trace = Some(TraceContext::parse(text)?);
        Ok(self)
    }

    pub fn model_name(&self) -> &str {
        &self.model
    }

    pub fn version_name(&self) -> &str {
        &self.version
    }

    pub fn time_allowed(&self) -> Option<Duration> {
        self.deadline
    }

    /// Finds each input's place in the contract's order. Sizes are left to `Contract::check`.
    pub(super) fn place<'a>(&'a self, contract: &Contract) -> Result<Placed<'a>, Refusal> {
        let mut places: Vec<(u8, &Input)> = Vec::with_capacity(self.inputs.len());
        for input in &self.inputs {
            let index = match input.dtype {
                DType::Text => contract.text_index().ok_or_else(|| {
                    Refusal::invalid(format!("model {} takes no text: it has no tokenizer", contract.name))
                })?,
                _ => contract.inputs.iter().position(|spec| spec.name == input.name).ok_or_else(|| {
                    let names: Vec<&str> = contract.inputs.iter().map(|spec| spec.name.as_str()).collect();
                    Refusal::invalid(format!(
                        "model {} has no input {:?}; it has {}",
                        contract.name,
                        input.name,
                        names.join(", ")
                    ))
                })?,
            };
            places.push((index as u8, input));
        }
        places.sort_by_key(|(index, _)| *index);
        let mut metas = List::new();
        for (index, input) in &places {
            let dims = List::from_slice(&input.dims).ok_or_else(|| {
                Refusal::invalid(format!(
                    "input {}: expected at most {RANK_MAX} dimensions, got {}",
                    input.name,
                    input.dims.len()
                ))
            })?;
            let meta = TensorMeta { index: *index, dtype: input.dtype as u8, dims };
            // Checked here and not by the contract alone: there, padding behind a short tensor would pass for values.
            if input.dtype != DType::Text && tensor_bytes(&meta, input.dtype) != Some(input.bytes.len()) {
                return Err(Refusal::invalid(format!(
                    "input {}: expected {:?} elements of {}, got {} bytes",
                    input.name,
                    input.dims,
                    input.dtype,
                    input.bytes.len()
                )));
            }
            metas.push(meta).map_err(|_| Refusal::invalid(format!("{} inputs are too many", places.len())))?;
        }
        Ok(Placed { metas, parts: places.into_iter().map(|(_, input)| input.bytes.as_slice()).collect() })
    }

    pub(super) fn metadata(&self, placed: &Placed<'_>, remaining: Option<Duration>) -> Infer {
        Infer {
            // 0 means no deadline, so the last moment before it is sent as 1.
            deadline_us: remaining.map_or(0, |left| u64::try_from(left.as_micros()).unwrap_or(u64::MAX).max(1)),
            priority: self.priority,
            flags: self.flags,
            compose_tag: self.compose_tag,
            compose_rows: self.compose_rows,
            late_us: self.late.map_or(0, |(late, said_at)| late_us(late + clock::now().since(said_at))),
            trace: self.trace,
            inputs: placed.metas,
        }
    }
}

/// As a request states it: 0 would say nothing, so what is on time is 1.
pub fn late_us(late: Duration) -> u64 {
    u64::try_from(late.as_micros()).unwrap_or(u64::MAX).max(1)
}

/// A request's tensors in the contract's order.
pub(super) struct Placed<'a> {
    metas: List<TensorMeta, { crate::wire::message::TENSORS_MAX }>,
    parts: Vec<&'a [u8]>,
}

impl Placed<'_> {
    pub(super) fn payload_len(&self) -> usize {
        self.parts.iter().map(|part| align8(part.len())).sum()
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        for part in &self.parts {
            out.extend_from_slice(part);
            crate::wire::encoder::pad_to_8(out, start);
        }
    }
}

/// Some rows of a request that were answered before the others.
#[derive(Clone, Debug)]
pub struct Rows {
    /// The first of them among the request's.
    pub at_row: u32,
    /// Their answer, read as that of a request of these rows.
    pub response: Response,
}

/// An answered request.
#[derive(Clone)]
pub struct Response {
    model: Arc<ModelInfo>,
    result: InferResult,
    words: Vec<u64>,
    payload_len: usize,
}

impl std::fmt::Debug for Response {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Response")
            .field("model", &self.model.contract.name)
            .field("result", &self.result)
            .field("payload_len", &self.payload_len)
            .finish()
    }
}

impl Response {
    /// Copies the payload, so that a small response does not keep a large read buffer alive. Refuses tensors that are
    /// not what the contract says or that lie outside the payload.
    pub(super) fn new(model: Arc<ModelInfo>, result: InferResult, payload: &[u8]) -> Result<Response, ClientError> {
        let mut at = 0;
        for meta in result.outputs.iter() {
            let wrong = |why: &str| {
                ClientError::Protocol(format!("output {} of model {}: {why}", meta.index, model.contract.name))
            };
            let spec =
                model.contract.outputs.get(usize::from(meta.index)).ok_or_else(|| wrong("is not in its contract"))?;
            if meta.dtype != spec.dtype as u8 {
                return Err(wrong("has another dtype than its contract says"));
            }
            let bytes = tensor_bytes(meta, spec.dtype).ok_or_else(|| wrong("is larger than any payload"))?;
            if at + bytes > payload.len() {
                return Err(wrong("ends behind its payload"));
            }
            at += align8(bytes);
        }
        let mut words = vec![0u64; payload.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..payload.len()].copy_from_slice(payload);
        Ok(Response { model, result, words, payload_len: payload.len() })
    }

    pub fn model(&self) -> &ModelInfo {
        &self.model
    }

    /// All tensors as they came.
    pub fn payload(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.payload_len]
    }

    pub fn outputs(&self) -> &[TensorMeta] {
        &self.result.outputs
    }

    pub fn rows(&self) -> u32 {
        self.result.outputs.first().and_then(|meta| meta.dims.first().copied()).unwrap_or(0)
    }

    /// The batch that carried the request, counted from the server's start.
    pub fn batch(&self) -> u64 {
        self.result.batch
    }

    pub fn batch_rows(&self) -> u32 {
        self.result.batch_rows
    }

    pub fn padded_len(&self) -> u32 {
        self.result.padded_len
    }

    pub fn seal_reason(&self) -> Option<SealReason> {
        SealReason::from_number(self.result.seal_reason)
    }

    pub fn truncated(&self) -> bool {
        self.result.flags & RESULT_TRUNCATED != 0
    }

    /// Where the server's time went, when the request asked for it.
    pub fn timings(&self) -> Option<Timings> {
        self.result.timings
    }

    /// Generation of the policy that decided its batch.
    pub fn generation(&self) -> u32 {
        self.result.generation
    }

    /// Its batch, and what it waited for, when the request asked for it.
    pub fn receipt(&self) -> Option<&Receipt> {
        self.result.receipt.as_deref()
    }

    fn find(&self, name: &str) -> Result<(TensorMeta, DType, &[u8]), ClientError> {
        let mut at = 0;
        for meta in self.result.outputs.iter() {
            let spec = &self.model.contract.outputs[usize::from(meta.index)];
            let bytes = tensor_bytes(meta, spec.dtype).expect("Response::new verified it");
            if spec.name == name {
                return Ok((*meta, spec.dtype, &self.payload()[at..at + bytes]));
            }
            at += align8(bytes);
        }
        let names: Vec<&str> = self.model.contract.outputs.iter().map(|spec| spec.name.as_str()).collect();
        Err(ClientError::Usage(format!("there is no output {name:?}; there is {}", names.join(", "))))
    }

    /// An output's elements, row after row.
    pub fn output<T: Element>(&self, name: &str) -> Result<&[T], ClientError> {
        let (_, dtype, bytes) = self.find(name)?;
        if dtype != T::DTYPE {
            return Err(ClientError::Usage(format!("output {name} is of dtype {dtype}, not {}", T::DTYPE)));
        }
        Ok(bytemuck::cast_slice(bytes))
    }

    pub fn output_bytes(&self, name: &str) -> Result<&[u8], ClientError> {
        self.find(name).map(|(_, _, bytes)| bytes)
    }

    /// An output's elements as numbers, whatever their dtype; 64-bit integers may be rounded.
    pub fn output_f64(&self, name: &str) -> Result<Vec<f64>, ClientError> {
        let (_, dtype, bytes) = self.find(name)?;
        Ok(to_f64(dtype, bytes))
    }

    /// Rows first.
    pub fn dims(&self, name: &str) -> Result<Vec<u32>, ClientError> {
        self.find(name).map(|(meta, _, _)| meta.dims.to_vec())
    }
}

/// Bytes of a tensor; `None` when it could be in no payload.
pub fn tensor_bytes(meta: &TensorMeta, dtype: DType) -> Option<usize> {
    let elements = meta.dims.iter().try_fold(1u64, |product, dim| product.checked_mul(u64::from(*dim)))?;
    let bytes = elements.checked_mul(dtype.size() as u64)?;
    (bytes <= u64::from(crate::wire::Limits::PAYLOAD_CEILING)).then_some(bytes as usize)
}

/// Little-endian elements of any dtype as numbers.
pub fn to_f64(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    macro_rules! each {
        ($ty:ty) => {
            each!($ty, |value| value as f64)
        };
        ($ty:ty, $to:expr) => {
            bytes
                .chunks_exact(size_of::<$ty>())
                .map(|chunk| <$ty>::from_le_bytes(chunk.try_into().expect("chunks_exact gives whole elements")))
                .map($to)
                .collect()
        };
    }
    match dtype {
        DType::U8 | DType::Text => each!(u8),
        DType::I8 => each!(i8),
        DType::U16 => each!(u16),
        DType::I16 => each!(i16),
        DType::U32 => each!(u32),
        DType::I32 => each!(i32),
        DType::U64 => each!(u64),
        DType::I64 => each!(i64),
        DType::F16 => each!(u16, f16_to_f64),
        DType::BF16 => each!(u16, |bits| f64::from(f32::from_bits(u32::from(bits) << 16))),
        DType::F32 => each!(f32),
        DType::F64 => each!(f64),
    }
}

fn f16_to_f64(bits: u16) -> f64 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((bits >> 10) & 0x1F);
    let fraction = f64::from(bits & 0x03FF);
    sign * match exponent {
        0 => fraction * 2f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + fraction / 1024.0) * 2f64.powi(exponent - 15),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_floats_become_the_numbers_they_stand_for() {
        let bytes: Vec<u8> =
            [0x3C00u16, 0xC000, 0x3555, 0x0001, 0x7C00].iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let values = to_f64(DType::F16, &bytes);
        assert_eq!(values[0], 1.0);
        assert_eq!(values[1], -2.0);
        assert!((values[2] - 1.0 / 3.0).abs() < 1e-3);
        assert!(values[3] > 0.0 && values[3] < 1e-7);
        assert_eq!(values[4], f64::INFINITY);
        assert_eq!(to_f64(DType::BF16, &0x3F80u16.to_le_bytes()), [1.0]);
    }
}
