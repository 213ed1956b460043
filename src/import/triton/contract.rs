//! Inputs and outputs: a contract, where ours can say it.
//!
//! Always true
//! - Either the whole contract is written or nothing of it: half of one would be refused.

use toml::Value as Toml;

use super::super::fields::{At, Fields};
use super::super::textproto::Message;
use super::super::{Fault, ImportError, Imported, Options, Verdict};
use super::note_rest;
use crate::vocab::DType;
use crate::wire::Limits;
use crate::wire::message::{RANK_MAX, TENSORS_MAX};

/// Beside the dimension of rows.
const DIMS_MAX: usize = RANK_MAX - 1;
/// Bytes of the largest tensor that a request may have.
const TENSOR_BYTES_MAX: u64 = Limits::PAYLOAD_CEILING as u64;
/// What a varying dimension is called.
const LENGTH: &str = "length";

struct Tensor {
    name: String,
    dtype: DType,
    /// -1: it varies.
    shape: Vec<i64>,
}

/// Reads inputs and outputs. Gives the longest row, where a dimension varies.
pub fn read(
    fields: &mut Fields<'_>,
    rows_max: i64,
    options: &Options,
    out: &mut Imported,
) -> Result<Option<u32>, ImportError> {
    let (inputs, outputs) = (fields.messages("input")?, fields.messages("output")?);
    let Some(first) = inputs.first().or(outputs.first()).map(|tensor| tensor.at) else {
        let why = "Triton completes it from the model; here it must be in the manifest: [[input]] and [[output]].";
        out.note(Verdict::Absent, ("input, output", None), "none", &[], why);
        return Ok(None);
    };
    let mut whys = Vec::new();
    let mut ragged = false;
    let mut read = |tensors: &[At<&Message>], kind: &str, out: &mut Imported| -> Result<Vec<Tensor>, ImportError> {
        let mut read = Vec::new();
        for tensor in tensors {
            read.extend(one(tensor, kind, &mut ragged, &mut whys, out)?);
        }
        Ok(read)
    };
    let inputs = read(&inputs, "input", out)?;
    let outputs = read(&outputs, "output", out)?;
    let varies = |tensors: &[Tensor]| tensors.iter().any(|tensor| tensor.shape.contains(&-1));
    if inputs.is_empty() || outputs.is_empty() {
        whys.push("there must be at least one input and one output".to_owned());
    } else if inputs.len() >= TENSORS_MAX || outputs.len() > TENSORS_MAX {
        whys.push(format!("at most {} inputs and {TENSORS_MAX} outputs are allowed", TENSORS_MAX - 1));
    } else if varies(&outputs) && !varies(&inputs) {
        whys.push("the length of an output is that of an input, and no input's varies".to_owned());
    }
    if !whys.is_empty() {
        whys.dedup();
        let why = format!(
            "No contract is written, for {}. Write [dims], [[input]] and [[output]] as the model has them.",
            whys.join("; ")
        );
        out.note(Verdict::Absent, ("input, output", Some(first)), "dims", &[], why);
        return Ok(None);
    }
    let longest = varies(&inputs).then_some(options.longest);
    let cells = |tensor: &Tensor| -> u64 {
        let size = |dim: &i64| if *dim == -1 { u64::from(options.longest) } else { *dim as u64 };
        tensor.shape.iter().fold(tensor.dtype.size() as u64, |product, dim| product.saturating_mul(size(dim)))
    };
    let row_bytes = inputs.iter().chain(&outputs).map(cells).max().unwrap_or(1).max(1);
    if row_bytes > TENSOR_BYTES_MAX {
        let why = format!(
            "A row of {row_bytes} bytes is more than a request may have, {TENSOR_BYTES_MAX}. No contract is written."
        );
        out.note(Verdict::Absent, ("input, output", Some(first)), "dims", &[], why);
        return Ok(None);
    }
    let rows_most = (TENSOR_BYTES_MAX / row_bytes) as i64;
    if rows_most < rows_max {
        out.manifest.set("batching", "request_rows_max", rows_most);
        let why = format!(
            "A tensor of a request may have {TENSOR_BYTES_MAX} bytes, so no request has {rows_max} rows; batches may."
        );
        out.note(Verdict::Changed, ("input, output", Some(first)), rows_most, &["batching.request_rows_max"], why);
    }
    if let Some(longest) = longest {
        out.manifest.set("dims.length", "min", 1);
        out.manifest.set("dims.length", "max", i64::from(longest));
        let shapes = if ragged {
            "Requests of different lengths share batches, as with allow_ragged_batch."
        } else {
            "Triton batches requests of one shape only; here different lengths share a batch, padded (`pad` of the input) or end to end. \
             The model must not let padding change a row's answer."
        };
        out.note(
            Verdict::Assumed,
            ("input.dims", Some(first)),
            "-1",
            &["dims.length.max"],
            format!("A varying dimension has bounds here; {longest} is taken for the longest (--longest). All that vary are one. {shapes}"),
        );
    }
    for (table, tensors) in [("input", &inputs), ("output", &outputs)] {
        for tensor in tensors {
            let shape = tensor.shape.iter().map(|dim| match dim {
                -1 => Toml::from(LENGTH),
                size => Toml::from(*size),
            });
            out.manifest.append(
                table,
                vec![
                    ("name", tensor.name.as_str().into()),
                    ("dtype", tensor.dtype.name().into()),
                    ("shape", Toml::Array(shape.collect())),
                ],
            );
        }
    }
    let keys = &["input", "output"];
    let why = "Names, types and shapes without the dimension of rows.";
    out.note(Verdict::Taken, ("input, output", Some(first)), inputs.len() + outputs.len(), keys, why);
    Ok(longest)
}

/// One tensor. `None`, and a reason in `whys`: ours cannot say it.
fn one(
    found: &At<&Message>,
    kind: &str,
    ragged: &mut bool,
    whys: &mut Vec<String>,
    out: &mut Imported,
) -> Result<Option<Tensor>, ImportError> {
    let mut fields = Fields::new(kind, found.value);
    let name = fields.text("name")?.map_or_else(String::new, |name| name.value.to_owned());
    let written = fields.word("data_type")?;
    let mut shape = fields.integers("dims", -1, u32::MAX.into())?;
    if let Some(reshape) = fields.message("reshape")? {
        shape = Fields::new(&fields.path("reshape"), reshape.value).integers("shape", -1, u32::MAX.into())?;
        let why = "The shape is the model's own, as `reshape` has it: callers send that.";
        out.note(Verdict::Changed, (fields.path("reshape"), Some(reshape.at)), &name, &["shape"], why);
    }
    if let Some(allows) = fields.boolean("allow_ragged_batch")? {
        *ragged |= allows.value;
        let why = "Rows of different lengths share a batch always, padded or end to end.";
        let verdict = if allows.value { Verdict::Taken } else { Verdict::Changed };
        out.note(verdict, (fields.path("allow_ragged_batch"), Some(allows.at)), allows.value, &[], why);
    }
    let known = [
        ("format", "A layout of images is part of the architecture."),
        ("is_shape_tensor", "Shapes are no inputs."),
        ("optional", "Each request has all inputs."),
        ("is_non_linear_format_io", "Tensors are row by row."),
        ("label_filename", "Answers are numbers; labels are the caller's."),
    ];
    note_rest(&fields, &known, out);
    let dtype = match written.map_or("", |written| written.value) {
        "TYPE_BOOL" | "TYPE_UINT8" => DType::U8,
        "TYPE_UINT16" => DType::U16,
        "TYPE_UINT32" => DType::U32,
        "TYPE_UINT64" => DType::U64,
        "TYPE_INT8" => DType::I8,
        "TYPE_INT16" => DType::I16,
        "TYPE_INT32" => DType::I32,
        "TYPE_INT64" => DType::I64,
        "TYPE_FP16" => DType::F16,
        "TYPE_BF16" => DType::BF16,
        "TYPE_FP32" => DType::F32,
        "TYPE_FP64" => DType::F64,
        "TYPE_STRING" => {
            whys.push(format!("{kind} {name} is TYPE_STRING: text goes in by [text] and comes out as numbers only"));
            return Ok(None);
        }
        other => {
            let expected = "a type such as TYPE_FP32".to_owned();
            let fault = Fault::Value { field: fields.path("data_type"), expected, got: format!("{other:?}") };
            return Err(ImportError { at: Some(written.map_or(found.at, |written| written.at)), fault });
        }
    };
    let shape: Vec<i64> = shape.iter().map(|dim| dim.value).collect();
    if shape.contains(&0) {
        whys.push(format!("{kind} {name} has a dimension of 0"));
    } else if shape.iter().skip(1).any(|dim| *dim == -1) {
        whys.push(format!("only the first dimension may vary, and {kind} {name} is {shape:?}"));
    } else if shape.len() > DIMS_MAX {
        whys.push(format!("{kind} {name} has {} dimensions, and at most {DIMS_MAX} are allowed", shape.len()));
    } else {
        return Ok(Some(Tensor { name, dtype, shape }));
    }
    Ok(None)
}
