//! `ferry infer`: a few requests by hand.
//!
//! Each text is a request of its own, all sent at once. For texts to a model that embeds, the cosines between them are
//! shown too: that is what embeddings are for.

use std::process::ExitCode;

use ferry::client::{Client, ClientError, Request, Response};
use ferry::contract::{Contract, TensorSpec};
use ferry::vocab::DType;
use serde_json::json;

use super::load::{failed, resolve, wrong_use};

/// Values of one output that are shown to people; JSON has all.
const VALUES_SHOWN: usize = 8;
/// An output of at least so many floats per row is taken for an embedding.
const EMBEDDING_MIN: usize = 16;

#[derive(clap::Args, Clone, Debug)]
#[command(group(clap::ArgGroup::new("content").required(true).args(["text", "input"])))]
pub struct Args {
    /// The server's data address.
    #[arg(long)]
    addr: String,
    #[arg(long)]
    model: String,
    /// A text, tokenized by the server; can be repeated.
    #[arg(long, value_name = "STR")]
    text: Vec<String>,
    /// An input from a file of NumPy's format; repeated for models of several inputs.
    #[arg(long, value_name = "NAME=FILE.npy")]
    input: Vec<String>,
    /// Prints one JSON document.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> ExitCode {
    let addr = match resolve(&args.addr) {
        Ok(addr) => addr,
        Err(message) => return wrong_use(&message),
    };
    let mut arrays = Vec::new();
    for input in &args.input {
        match read_input(input) {
            Ok(array) => arrays.push(array),
            Err(message) => return wrong_use(&message),
        }
    }
    let result = Client::connect(addr, super::connection::options()).and_then(|client| {
        let model = client.model(&args.model)?;
        let requests = match args.text.is_empty() {
            true => vec![array_request(&model.contract, arrays)],
            false => args.text.iter().map(|text| Request::text(args.model.as_str(), text).timings()).collect(),
        };
        let pending = requests.iter().map(|request| client.submit(request)).collect::<Result<Vec<_>, _>>()?;
        pending.into_iter().map(|pending| pending.wait()).collect::<Result<Vec<_>, _>>()
    });
    let responses = match result {
        Ok(responses) => responses,
        Err(ClientError::Contract(refusal)) => return wrong_use(&refusal.message),
        Err(error) => return failed(&error.to_string()),
    };
    let cosines = cosines(&responses);
    let shown = match args.json {
        true => json_document(&args, &responses, &cosines),
        false => page(&args, &responses, &cosines),
    };
    match shown {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => failed(&error.to_string()),
    }
}

pub(super) fn array_request(contract: &Contract, arrays: Vec<(String, Array)>) -> Request {
    let mut request = Request::new(contract.name.as_str()).timings();
    for (name, array) in arrays {
        let mut dims = array.dims;
        // A file of exactly one row may leave the rows out.
        if contract.inputs.iter().any(|spec| spec.name == name && spec.shape.len() == dims.len()) {
            dims.insert(0, 1);
        }
        request = request.input_bytes(name, array.dtype, &dims, array.bytes);
    }
    request
}

fn json_document(args: &Args, responses: &[Response], cosines: &Option<Vec<Vec<f64>>>) -> Result<String, ClientError> {
    let mut results = Vec::new();
    for (at, response) in responses.iter().enumerate() {
        let mut outputs = serde_json::Map::new();
        for spec in &response.model().contract.outputs {
            let values: Vec<serde_json::Value> =
                response.output_f64(&spec.name)?.into_iter().map(|value| json_value(spec, value)).collect();
            let dims = response.dims(&spec.name)?;
            outputs.insert(spec.name.clone(), json!({ "dtype": spec.dtype, "dims": dims, "values": values }));
        }
        let timings = response.timings().map(|t| {
            json!({
                "admit": t.admit_ns as f64 / 1e3,
                "queue": t.queue_ns as f64 / 1e3,
                "pack": t.pack_ns as f64 / 1e3,
                "wait": t.wait_ns as f64 / 1e3,
                "run": t.run_ns as f64 / 1e3,
                "scatter": t.scatter_ns as f64 / 1e3,
                "total": t.total_ns() as f64 / 1e3,
            })
        });
        results.push(json!({
            "text": args.text.get(at),
            "outputs": outputs,
            "batch": response.batch(),
            "batch_rows": response.batch_rows(),
            "padded_len": response.padded_len(),
            "seal_reason": response.seal_reason().map(|reason| reason.name()),
            "truncated": response.truncated(),
            "timings_us": timings,
        }));
    }
    let document = json!({ "model": args.model, "results": results, "cosines": cosines });
    Ok(serde_json::to_string_pretty(&document).expect("plain data") + "\n")
}

fn page(args: &Args, responses: &[Response], cosines: &Option<Vec<Vec<f64>>>) -> Result<String, ClientError> {
    let mut page = String::new();
    for (at, response) in responses.iter().enumerate() {
        if let Some(text) = args.text.get(at) {
            page += &format!("{}. {text:?}\n", at + 1);
        }
        for spec in &response.model().contract.outputs {
            let (values, dims) = (response.output_f64(&spec.name)?, response.dims(&spec.name)?);
            let row = values.len() / response.rows().max(1) as usize;
            for (number, values) in values.chunks(row.max(1)).enumerate() {
                let shown: Vec<String> =
                    values.iter().take(VALUES_SHOWN).map(|value| value_text(spec, *value)).collect();
                let more = if values.len() > VALUES_SHOWN { ", …" } else { "" };
                page += &format!("   {} {} {dims:?} row {number}: {}{more}\n", spec.name, spec.dtype, shown.join(", "));
            }
        }
        page += &format!("   batch {} of {} row(s)", response.batch(), response.batch_rows());
        if let Some(timings) = response.timings() {
            let ms = |ns: u64| ns as f64 / 1e6;
            page += &format!(
                ", {:.2} ms in the server: queue {:.2}, model {:.2}",
                ms(timings.total_ns()),
                ms(timings.queue_ns),
                ms(timings.run_ns)
            );
        }
        page += "\n";
    }
    if let Some(cosines) = cosines {
        page += "\ncosine";
        (1..=cosines.len()).for_each(|at| page += &format!(" {at:>7}"));
        page += "\n";
        for (at, row) in cosines.iter().enumerate() {
            page += &format!("{:>6}", at + 1);
            row.iter().for_each(|cosine| page += &format!(" {cosine:>7.4}"));
            page += "\n";
        }
    }
    Ok(page)
}

fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
}

fn value_text(spec: &TensorSpec, value: f64) -> String {
    match is_float(spec.dtype) {
        true => format!("{value:.5}"),
        false => format!("{value}"),
    }
}

/// Integers stay integers: `3` and not `3.0`.
fn json_value(spec: &TensorSpec, value: f64) -> serde_json::Value {
    match (is_float(spec.dtype), value < 0.0) {
        (true, _) => json!(value),
        (false, true) => json!(value as i64),
        (false, false) => json!(value as u64),
    }
}

/// Between the embeddings of several texts; `None` where there is nothing to compare.
fn cosines(responses: &[Response]) -> Option<Vec<Vec<f64>>> {
    let contract = &responses.first()?.model().contract;
    let spec = contract.outputs.first()?;
    let is_embedding =
        contract.text.is_some() && !spec.has_length() && spec.row_elements(1) >= EMBEDDING_MIN && is_float(spec.dtype);
    if !is_embedding || responses.len() < 2 {
        return None;
    }
    let vectors: Vec<Vec<f64>> =
        responses.iter().map(|response| response.output_f64(&spec.name)).collect::<Result<_, _>>().ok()?;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = |a: &[f64], b: &[f64]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    Some(vectors.iter().map(|a| vectors.iter().map(|b| cosine(a, b)).collect()).collect())
}

/// An array as a file holds it.
#[derive(Debug, PartialEq)]
pub(super) struct Array {
    dtype: DType,
    dims: Vec<u32>,
    bytes: Vec<u8>,
}

pub(super) fn read_input(input: &str) -> Result<(String, Array), String> {
    let (name, path) =
        input.split_once('=').ok_or_else(|| format!("--input {input}: expected NAME=FILE.npy, there is no ="))?;
    let content = std::fs::read(path).map_err(|error| format!("{path}: {error}"))?;
    let array = parse_npy(&content).map_err(|error| format!("{path}: {error}"))?;
    Ok((name.to_owned(), array))
}

/// Reads NumPy's format, versions 1 and 2, for the dtypes of the wire: little-endian, rows first.
fn parse_npy(content: &[u8]) -> Result<Array, String> {
    let cut_off = || "the file ends inside its header".to_owned();
    let rest = content.strip_prefix(b"\x93NUMPY").ok_or("not a file of NumPy's .npy format")?;
    let (version, rest) = rest.split_first_chunk::<2>().ok_or_else(cut_off)?;
    let (header_len, rest) = match version[0] {
        1 => {
            let (len, rest) = rest.split_first_chunk::<2>().ok_or_else(cut_off)?;
            (usize::from(u16::from_le_bytes(*len)), rest)
        }
        2 | 3 => {
            let (len, rest) = rest.split_first_chunk::<4>().ok_or_else(cut_off)?;
            (u32::from_le_bytes(*len) as usize, rest)
        }
        other => return Err(format!("expected format version 1 or 2, got {other}")),
    };
    let header = rest.get(..header_len).ok_or_else(cut_off)?;
    let header = std::str::from_utf8(header).map_err(|_| "the header is not text")?;
    let value = |key: &str| {
        let quoted = format!("'{key}':");
        header.split_once(&quoted).map(|(_, rest)| rest.trim_start()).ok_or(format!("the header has no {key}"))
    };
    if !value("fortran_order")?.starts_with("False") {
        return Err("expected the last dimension to vary fastest (C order), got Fortran order".into());
    }
    let descr = value("descr")?.strip_prefix('\'').and_then(|rest| rest.split('\'').next()).unwrap_or("a record");
    let dtype = match descr {
        "|u1" | "|b1" => DType::U8,
        "|i1" => DType::I8,
        "<u2" => DType::U16,
        "<i2" => DType::I16,
        "<u4" => DType::U32,
        "<i4" => DType::I32,
        "<u8" => DType::U64,
        "<i8" => DType::I64,
        "<f2" => DType::F16,
        "<f4" => DType::F32,
        "<f8" => DType::F64,
        other => return Err(format!("elements of type {other} have no place on the wire")),
    };
    let shape = value("shape")?.strip_prefix('(').and_then(|rest| rest.split(')').next()).ok_or("no shape")?;
    let dims = shape
        .split(',')
        .map(str::trim)
        .filter(|dim| !dim.is_empty())
        .map(|dim| dim.parse::<u32>().map_err(|_| format!("{dim} is not a dimension")))
        .collect::<Result<Vec<u32>, _>>()?;
    let bytes = &rest[header_len..];
    let expected = dims
        .iter()
        .try_fold(dtype.size() as u64, |product, dim| product.checked_mul(u64::from(*dim)))
        .ok_or("the shape is larger than any file")?;
    if bytes.len() as u64 != expected {
        return Err(format!("expected {expected} bytes for {dims:?} of {dtype}, got {}", bytes.len()));
    }
    Ok(Array { dtype, dims, bytes: bytes.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut file = b"\x93NUMPY".to_vec();
        file.extend_from_slice(&[version, 0]);
        match version {
            1 => file.extend_from_slice(&(header.len() as u16).to_le_bytes()),
            _ => file.extend_from_slice(&(header.len() as u32).to_le_bytes()),
        }
        file.extend_from_slice(header.as_bytes());
        file.extend_from_slice(data);
        file
    }

    #[test]
    fn arrays_of_both_versions_are_read() {
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }     \n";
        for version in [1, 2] {
            let array = parse_npy(&npy(version, header, &[0; 8])).expect("well formed");
            assert_eq!(array, Array { dtype: DType::F32, dims: vec![1, 2], bytes: vec![0; 8] });
        }
        let vector = "{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }\n";
        assert_eq!(parse_npy(&npy(1, vector, &[1, 2, 3])).expect("well formed").dims, [3]);
    }

    #[test]
    fn what_is_not_such_an_array_is_refused_with_the_reason() {
        let refused = |header: &str, data: &[u8]| parse_npy(&npy(1, header, data)).expect_err("refused");
        assert!(refused("{'descr': '<f4', 'fortran_order': True, 'shape': (1,), }", &[0; 4]).contains("Fortran"));
        assert!(refused("{'descr': '>f4', 'fortran_order': False, 'shape': (1,), }", &[0; 4]).contains(">f4"));
        assert!(refused("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", &[0; 4]).contains("8 bytes"));
        assert!(
            refused("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", &[0; 4]).contains("record")
        );
        for broken in [&b""[..], b"PK\x03\x04", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{"] {
            assert!(parse_npy(broken).is_err());
        }
    }
}
