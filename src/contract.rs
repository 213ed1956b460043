//! What a model promises and asks for: names, dtypes, shapes with a named length, limits, pad values.
//!
//! The same contract is checked by the client before sending, by the server before queueing, and on the model's
//! outputs. On the wire every tensor has the number of rows as its first dimension; in the contract it is left out.
//!
//! Always true
//! - A [`Contract`] has passed [`Contract::checked`]: at most one named dimension, and where a tensor has it, first.
//!   So the bytes of a shorter row are a prefix of the bytes of the same row padded.
//! - [`Checked`] means that every size, range and count of a request was verified against its payload.
//!
//! Elsewhere: how a manifest is written (models/manifest.rs), how rows are padded (executor/pack.rs).

use serde::{Deserialize, Serialize};
use sha2::Digest;

use crate::vocab::{DType, Refusal};
use crate::wire::encoder::align8;
use crate::wire::message::{INFER_FLAGS_KNOWN, Infer, RANK_MAX, TENSORS_MAX, TensorMeta};

impl Serialize for DType {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for DType {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        DType::from_name(&name).ok_or_else(|| {
            let known: Vec<&str> = DType::ALL.iter().map(|dtype| dtype.name()).collect();
            serde::de::Error::custom(format!("dtype {name:?} is unknown; known are {}", known.join(", ")))
        })
    }
}

/// One dimension behind the rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Dim {
    Fixed(u32),
    /// The model's one variable dimension, by its name in [`Contract::length`].
    Named(String),
}

/// The variable dimension: how long a row may be. Its unit is what a "token" is for this model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Length {
    pub name: String,
    pub min: u32,
    pub max: u32,
}

/// What happens to a NaN or an infinity in a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    #[default]
    Refuse,
    Allow,
}

/// One input or output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<Dim>,
    /// Value of padding elements; inputs only.
    #[serde(default)]
    pub pad: f64,
    /// Smallest and largest allowed value of an integer input, both included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<[i64; 2]>,
    #[serde(default)]
    pub nonfinite: NonFinite,
}

impl TensorSpec {
    pub fn has_length(&self) -> bool {
        matches!(self.shape.first(), Some(Dim::Named(_)))
    }

    /// Elements of one row of length `len`.
    pub fn row_elements(&self, len: u32) -> usize {
        self.shape
            .iter()
            .map(|dim| match dim {
                Dim::Fixed(n) => *n as usize,
                Dim::Named(_) => len as usize,
            })
            .product()
    }

    /// Bytes of one row of length `len`.
    pub fn row_bytes(&self, len: u32) -> usize {
        self.row_elements(len) * self.dtype.size()
    }

    /// The bytes of one padding element.
    pub fn pad_bytes(&self) -> Vec<u8> {
        macro_rules! int {
            ($ty:ty) => {
                (self.pad as $ty).to_le_bytes().to_vec()
            };
        }
        match self.dtype {
            DType::U8 | DType::Text => int!(u8),
            DType::I8 => int!(i8),
            DType::U16 => int!(u16),
            DType::I16 => int!(i16),
            DType::U32 => int!(u32),
            DType::I32 => int!(i32),
            DType::U64 => int!(u64),
            DType::I64 => int!(i64),
            DType::F32 => (self.pad as f32).to_le_bytes().to_vec(),
            DType::F64 => self.pad.to_le_bytes().to_vec(),
            // Only zero has the same bytes in both half formats; `Contract::checked` allows no other.
            DType::F16 | DType::BF16 => vec![0, 0],
        }
    }

    /// The shape as it stands in messages: `[rows, tokens, 384]`.
    fn shape_text(&self) -> String {
        let mut text = String::from("[rows");
        for dim in &self.shape {
            match dim {
                Dim::Fixed(n) => text += &format!(", {n}"),
                Dim::Named(name) => text += &format!(", {name}"),
            }
        }
        text + "]"
    }
}

/// Text accepted in place of an input: the server tokenizes it into that input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextSpec {
    pub name: String,
    /// Index of the input that the token ids become.
    pub into: usize,
    /// Longest text in bytes, checked before tokenization.
    pub bytes_max: u32,
}

/// A model's contract. Serialized as the JSON document of a description.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Contract {
    pub name: String,
    pub version: String,
    pub architecture: String,
    pub inputs: Vec<TensorSpec>,
    pub outputs: Vec<TensorSpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<Length>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextSpec>,
    /// Most rows in one request.
    pub rows_max: u32,
}

/// A request whose every size was verified: `rows` rows, each `len` long (1 where the model has no length).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked {
    pub rows: u32,
    pub len: u32,
    /// The payload is one text that has to be tokenized first; `len` is its bytes then.
    pub text: bool,
}

/// Model and version names: what can be part of a file name and of a metric's label.
pub fn name_is_valid(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= crate::wire::message::NAME_MAX
        && !name.starts_with('.')
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
}

impl Contract {
    /// Checks what the fields alone cannot say. The error says what was expected and what came.
    pub fn checked(self) -> Result<Contract, String> {
        for (what, name) in [("model name", &self.name), ("version", &self.version)] {
            if !name_is_valid(name) {
                return Err(format!(
                    "{what} {name:?} is not 1 to 128 characters of a-z 0-9 . _ - that do not start with a dot"
                ));
            }
        }
        if self.inputs.is_empty() || self.outputs.is_empty() {
            return Err("a model has at least one input and one output".into());
        }
        // One index is left for the text that may stand in for an input.
        if self.inputs.len() >= TENSORS_MAX || self.outputs.len() > TENSORS_MAX {
            return Err(format!("at most {} inputs and {TENSORS_MAX} outputs are allowed", TENSORS_MAX - 1));
        }
        if self.rows_max == 0 {
            return Err("rows_max is at least 1".into());
        }
        if let Some(length) = &self.length
            && (length.min == 0 || length.min > length.max)
        {
            return Err(format!(
                "{} has min {} and max {}; expected 1 <= min <= max",
                length.name, length.min, length.max
            ));
        }
        let mut names = std::collections::BTreeSet::new();
        let text_name = self.text.iter().map(|text| text.name.as_str());
        for name in self.inputs.iter().map(|spec| spec.name.as_str()).chain(text_name) {
            if !names.insert(name) {
                return Err(format!("two inputs are called {name:?}"));
            }
        }
        names.clear();
        for spec in &self.outputs {
            if !names.insert(spec.name.as_str()) {
                return Err(format!("two outputs are called {:?}", spec.name));
            }
        }
        for spec in self.inputs.iter().chain(&self.outputs) {
            self.check_spec(spec)?;
        }
        if self.length.is_some() && !self.inputs.iter().any(TensorSpec::has_length) {
            return Err("a length is declared, but no input has it".into());
        }
        if let Some(text) = &self.text {
            let input = self
                .inputs
                .get(text.into)
                .ok_or_else(|| format!("text becomes input {}, which does not exist", text.into))?;
            if input.dtype != DType::U32 || input.shape.len() != 1 || !input.has_length() || self.inputs.len() != 1 {
                return Err("text can only stand for the one input of a model, of dtype u32 and shape [length]".into());
            }
        }
        Ok(self)
    }

    fn check_spec(&self, spec: &TensorSpec) -> Result<(), String> {
        let name = &spec.name;
        if spec.shape.len() + 1 > RANK_MAX {
            return Err(format!(
                "{name} has rank {}, at most {} are allowed beside the rows",
                spec.shape.len(),
                RANK_MAX - 1
            ));
        }
        if spec.dtype == DType::Text {
            return Err(format!("{name}: dtype text is declared under [text], not as a tensor"));
        }
        for (at, dim) in spec.shape.iter().enumerate() {
            match dim {
                Dim::Fixed(0) => return Err(format!("{name} has a dimension of 0")),
                Dim::Fixed(_) => {}
                Dim::Named(dim) => match &self.length {
                    Some(length) if length.name == *dim && at == 0 => {}
                    Some(length) if length.name == *dim => {
                        return Err(format!(
                            "{name}: {dim} must be the first dimension of its shape, it is number {at}"
                        ));
                    }
                    _ => return Err(format!("{name}: dimension {dim:?} is not declared under [dims]")),
                },
            }
        }
        let longest = self.length.as_ref().map_or(1, |length| length.max);
        let elements = spec.shape.iter().try_fold(u64::from(self.rows_max), |product, dim| {
            product.checked_mul(match dim {
                Dim::Fixed(n) => u64::from(*n),
                Dim::Named(_) => u64::from(longest),
            })
        });
        match elements.and_then(|elements| elements.checked_mul(spec.dtype.size() as u64)) {
            Some(bytes) if bytes <= u64::from(crate::wire::Limits::PAYLOAD_CEILING) => {}
            _ => {
                return Err(format!(
                    "{name}: rows_max rows of the largest shape are more than {} bytes",
                    crate::wire::Limits::PAYLOAD_CEILING
                ));
            }
        }
        if spec.pad != 0.0 && matches!(spec.dtype, DType::F16 | DType::BF16) {
            return Err(format!("{name}: pad must be 0 for {}", spec.dtype));
        }
        if !spec.pad.is_finite() {
            return Err(format!("{name}: pad {} is not a number that JSON can carry", spec.pad));
        }
        let Some((least, most)) = integer_bounds(spec.dtype) else {
            return match spec.range {
                Some(_) => Err(format!("{name}: a range is for integers, its dtype is {}", spec.dtype)),
                None => Ok(()),
            };
        };
        // Compared as integers: an f64 next to 2^63 would call a pad inside that is one outside.
        let pad = spec.pad as i128;
        if pad as f64 != spec.pad || pad < least || pad > most {
            return Err(format!(
                "{name}: expected a whole pad from {least} to {most} for dtype {}, got {}",
                spec.dtype, spec.pad
            ));
        }
        match spec.range {
            Some([low, high]) if low > high => Err(format!("{name}: range [{low}, {high}] is empty")),
            Some([low, high]) if pad < i128::from(low) || pad > i128::from(high) => {
                Err(format!("{name}: pad {} is outside its range [{low}, {high}]", spec.pad))
            }
            _ => Ok(()),
        }
    }

    /// Longest row.
    pub fn len_max(&self) -> u32 {
        self.length.as_ref().map_or(1, |length| length.max)
    }

    /// The index that a text tensor has on the wire.
    pub fn text_index(&self) -> Option<usize> {
        self.text.as_ref().map(|_| self.inputs.len())
    }

    /// First 8 bytes of the SHA-256 of the JSON document: changes whenever anything a caller depends on changes.
    pub fn hash(&self) -> u64 {
        let json = serde_json::to_vec(self).expect("a contract is plain data");
        let digest = sha2::Sha256::digest(&json);
        u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"))
    }

    /// Where input `index` starts in a request's payload of `rows` rows of `len`.
    pub fn input_offset(&self, index: usize, rows: u32, len: u32) -> usize {
        self.inputs[..index].iter().map(|spec| align8(rows as usize * spec.row_bytes(len))).sum()
    }

    /// Verifies a request against its payload. Nothing is allocated unless it is refused.
    ///
    /// Hot: once per request, on the shard. Guarded by benches/decoder.rs.
    pub fn check(&self, infer: &Infer, payload: &[u8]) -> Result<Checked, Refusal> {
        if infer.flags & !INFER_FLAGS_KNOWN != 0 {
            return Err(Refusal::invalid(format!(
                "expected request flags within {INFER_FLAGS_KNOWN:#04x}, got {:#04x}",
                infer.flags
            )));
        }
        if infer.trace.is_some_and(|trace| !trace.is_valid()) {
            return Err(Refusal::invalid("expected a trace with a trace id and a span id, got one of zeros"));
        }
        if let Some(text) = &self.text
            && infer.inputs.len() == 1
            && usize::from(infer.inputs[0].index) == self.inputs.len()
        {
            return check_text(text, &infer.inputs[0], payload);
        }
        if infer.inputs.len() != self.inputs.len() {
            let names: Vec<&str> = self.inputs.iter().map(|spec| spec.name.as_str()).collect();
            return Err(Refusal::invalid(format!(
                "expected {} input(s) ({}), got {}",
                self.inputs.len(),
                names.join(", "),
                infer.inputs.len()
            )));
        }
        let mut shape = Shape { rows: None, len: None };
        for (index, (spec, tensor)) in self.inputs.iter().zip(infer.inputs.iter()).enumerate() {
            if usize::from(tensor.index) != index {
                return Err(Refusal::invalid(format!(
                    "input {} must have index {index}, got {}: inputs come in the contract's order, each once",
                    spec.name, tensor.index
                )));
            }
            self.check_tensor(spec, tensor, &mut shape)?;
        }
        let rows = shape.rows.expect("a contract has at least one input");
        let len = shape.len.unwrap_or(1);
        self.check_bytes(rows, len, payload)?;
        Ok(Checked { rows, len, text: false })
    }

    fn check_tensor(&self, spec: &TensorSpec, tensor: &TensorMeta, shape: &mut Shape) -> Result<(), Refusal> {
        let name = &spec.name;
        match DType::from_number(tensor.dtype) {
            Some(dtype) if dtype == spec.dtype => {}
            Some(dtype) => {
                return Err(Refusal::invalid(format!("input {name}: expected dtype {}, got {dtype}", spec.dtype)));
            }
            None => {
                return Err(Refusal::invalid(format!(
                    "input {name}: expected dtype {}, got unknown dtype {}",
                    spec.dtype, tensor.dtype
                )));
            }
        }
        let wrong_shape = || {
            Refusal::invalid(format!("input {name}: expected shape {}, got {:?}", spec.shape_text(), &tensor.dims[..]))
        };
        let [rows, dims @ ..] = &tensor.dims[..] else {
            return Err(wrong_shape());
        };
        if dims.len() != spec.shape.len() {
            return Err(wrong_shape());
        }
        if *rows == 0 || *rows > self.rows_max {
            let message = format!("input {name}: expected 1 to {} rows, got {rows}", self.rows_max);
            return Err(if *rows == 0 { Refusal::invalid(message) } else { Refusal::too_large(message) });
        }
        if *shape.rows.get_or_insert(*rows) != *rows {
            return Err(Refusal::invalid(format!(
                "input {name}: expected {} rows as in the inputs before it, got {rows}",
                shape.rows.unwrap_or(0)
            )));
        }
        for (dim, got) in spec.shape.iter().zip(dims) {
            match dim {
                Dim::Fixed(expected) if expected == got => {}
                Dim::Fixed(_) => return Err(wrong_shape()),
                Dim::Named(dim) => {
                    let length = self.length.as_ref().expect("Contract::checked refuses an undeclared dimension");
                    if *got < length.min || *got > length.max {
                        let message =
                            format!("input {name}: expected {} to {} {dim}, got {got}", length.min, length.max);
                        return Err(if *got > length.max {
                            Refusal::too_large(message)
                        } else {
                            Refusal::invalid(message)
                        });
                    }
                    if *shape.len.get_or_insert(*got) != *got {
                        return Err(Refusal::invalid(format!(
                            "input {name}: expected {} {dim} as in the inputs before it, got {got}",
                            shape.len.unwrap_or(0)
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// Payload length and value ranges. The sizes cannot overflow: rows and length are within the contract's limits,
    /// whose product was checked when it was made.
    fn check_bytes(&self, rows: u32, len: u32, payload: &[u8]) -> Result<(), Refusal> {
        let expected = self.input_offset(self.inputs.len(), rows, len);
        // The padding behind the last tensor may be left out.
        let least = self.inputs.last().map_or(0, |last| {
            let before = self.input_offset(self.inputs.len() - 1, rows, len);
            before + rows as usize * last.row_bytes(len)
        });
        if payload.len() != expected && payload.len() != least {
            return Err(Refusal::invalid(format!(
                "expected {least} payload bytes for {rows} row(s) of length {len}, got {}",
                payload.len()
            )));
        }
        for (index, spec) in self.inputs.iter().enumerate() {
            let at = self.input_offset(index, rows, len);
            let bytes = &payload[at..at + rows as usize * spec.row_bytes(len)];
            if let Some([low, high]) = spec.range {
                check_range(spec, bytes, low, high)?;
            }
            if spec.nonfinite == NonFinite::Refuse {
                check_finite(spec, bytes)?;
            }
        }
        Ok(())
    }
}

/// Smallest and largest value of an integer dtype; `None` for the others.
fn integer_bounds(dtype: DType) -> Option<(i128, i128)> {
    Some(match dtype {
        DType::U8 => (u8::MIN.into(), u8::MAX.into()),
        DType::I8 => (i8::MIN.into(), i8::MAX.into()),
        DType::U16 => (u16::MIN.into(), u16::MAX.into()),
        DType::I16 => (i16::MIN.into(), i16::MAX.into()),
        DType::U32 => (u32::MIN.into(), u32::MAX.into()),
        DType::I32 => (i32::MIN.into(), i32::MAX.into()),
        DType::U64 => (u64::MIN.into(), u64::MAX.into()),
        DType::I64 => (i64::MIN.into(), i64::MAX.into()),
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 | DType::Text => return None,
    })
}

/// Rows and length as the inputs so far agree on them.
struct Shape {
    rows: Option<u32>,
    len: Option<u32>,
}

fn check_text(text: &TextSpec, tensor: &TensorMeta, payload: &[u8]) -> Result<Checked, Refusal> {
    let name = &text.name;
    if tensor.dtype != DType::Text as u8 {
        return Err(Refusal::invalid(format!("input {name}: expected dtype text, got dtype number {}", tensor.dtype)));
    }
    if tensor.dims[..] != [1] {
        return Err(Refusal::invalid(format!(
            "input {name}: expected shape [1] (one text per request), got {:?}",
            &tensor.dims[..]
        )));
    }
    let Some((len, bytes)) = payload.split_first_chunk::<4>() else {
        return Err(Refusal::invalid(format!(
            "input {name}: expected a length of 4 bytes and the text, got {} bytes",
            payload.len()
        )));
    };
    let len = u32::from_le_bytes(*len);
    if len > text.bytes_max {
        return Err(Refusal::too_large(format!(
            "input {name}: expected at most {} bytes of text, got {len}",
            text.bytes_max
        )));
    }
    let used = 4 + len as usize;
    if payload.len() != used && payload.len() != align8(used) {
        return Err(Refusal::invalid(format!(
            "input {name}: a text of {len} bytes makes a payload of {used}, got {}",
            payload.len()
        )));
    }
    if let Err(error) = std::str::from_utf8(&bytes[..len as usize]) {
        return Err(Refusal::invalid(format!("input {name}: expected UTF-8, byte {} is not", error.valid_up_to())));
    }
    Ok(Checked { rows: 1, len, text: true })
}

fn check_range(spec: &TensorSpec, bytes: &[u8], low: i64, high: i64) -> Result<(), Refusal> {
    macro_rules! scan {
        ($ty:ty) => {{
            let value =
                |chunk: &[u8]| <$ty>::from_le_bytes(chunk.try_into().expect("chunks_exact gives whole elements"));
            let inside = |value: $ty| i128::from(value) >= i128::from(low) && i128::from(value) <= i128::from(high);
            bytes.chunks_exact(size_of::<$ty>()).position(|chunk| !inside(value(chunk))).map(|at| {
                let start = at * size_of::<$ty>();
                (at, i128::from(value(&bytes[start..start + size_of::<$ty>()])))
            })
        }};
    }
    let outside = match spec.dtype {
        DType::U8 | DType::Text => scan!(u8),
        DType::I8 => scan!(i8),
        DType::U16 => scan!(u16),
        DType::I16 => scan!(i16),
        DType::U32 => scan_u32(bytes, low, high),
        DType::I32 => scan!(i32),
        DType::U64 => scan!(u64),
        DType::I64 => scan!(i64),
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => None,
    };
    match outside {
        None => Ok(()),
        Some((at, value)) => Err(Refusal::invalid(format!(
            "input {}: expected values {low} to {high}, got {value} at element {at}",
            spec.name
        ))),
    }
}

/// Token ids are nearly always u32 from 0: compare in 32 bits, without an early exit, so that it vectorises.
fn scan_u32(bytes: &[u8], low: i64, high: i64) -> Option<(usize, i128)> {
    // Cut to what a u32 can be. A range wholly outside of that has no value inside, not its nearest one.
    let none_fits = high < 0 || low > i64::from(u32::MAX);
    let low = u32::try_from(low.max(0)).unwrap_or(u32::MAX);
    let high = u32::try_from(high).unwrap_or(u32::MAX);
    let value = |chunk: &[u8]| u32::from_le_bytes(chunk.try_into().expect("chunks_exact gives whole elements"));
    let bad = bytes.chunks_exact(4).fold(none_fits, |bad, chunk| bad | (value(chunk) < low) | (value(chunk) > high));
    if !bad {
        return None;
    }
    bytes
        .chunks_exact(4)
        .position(|chunk| none_fits || value(chunk) < low || value(chunk) > high)
        .map(|at| (at, i128::from(value(&bytes[at * 4..at * 4 + 4]))))
}

fn check_finite(spec: &TensorSpec, bytes: &[u8]) -> Result<(), Refusal> {
    match first_non_finite(spec.dtype, bytes) {
        None => Ok(()),
        Some(at) => Err(Refusal::invalid(format!("input {}: expected finite values, element {at} is not", spec.name))),
    }
}

/// Index of the first NaN or infinity among the elements in `bytes`.
pub fn first_non_finite(dtype: DType, bytes: &[u8]) -> Option<usize> {
    // An element is not finite when all bits of its exponent are set.
    macro_rules! scan {
        ($ty:ty, $exponent:expr) => {{
            let bad = |chunk: &[u8]| {
                let bits = <$ty>::from_le_bytes(chunk.try_into().expect("chunks_exact gives whole elements"));
                bits & $exponent == $exponent
            };
            let chunks = bytes.chunks_exact(size_of::<$ty>());
            match chunks.clone().fold(false, |any, chunk| any | bad(chunk)) {
                false => None,
                true => chunks.clone().position(bad),
            }
        }};
    }
    match dtype {
        DType::F16 => scan!(u16, 0x7C00),
        DType::BF16 => scan!(u16, 0x7F80),
        DType::F32 => scan!(u32, 0x7F80_0000),
        DType::F64 => scan!(u64, 0x7FF0_0000_0000_0000),
        _ => None,
    }
}
