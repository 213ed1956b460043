//! Any request against three contracts: token ids or text, an image, several inputs.
//!
//! Fails on a panic, on a refusal that is not the sender's fault, and on an accepted request whose payload is not as
//! long as its shapes say. Input: one byte for the contract, then the metadata's own encoding with, behind it, the
//! payload; where that does not decode, a nearly right request is made of the same bytes.
#![no_main]

use std::sync::LazyLock;

use ferry::contract::{Contract, Dim};
use ferry::vocab::{Code, Executed};
use ferry::wire::message::{Infer, List, TensorMeta, decode_exact};
use libfuzzer_sys::fuzz_target;

static CONTRACTS: LazyLock<Vec<Contract>> = LazyLock::new(|| {
    let output = r#""outputs":[{"name":"out","dtype":"f32","shape":[2]}]"#;
    [
        r#"{"name":"ids","version":"1","architecture":"a","rows_max":4,"length":{"name":"n","min":1,"max":16},
            "text":{"name":"text","into":0,"bytes_max":20},
            "inputs":[{"name":"ids","dtype":"u32","shape":["n"],"range":[0,30521]}],"#,
        r#"{"name":"image","version":"1","architecture":"a","rows_max":3,
            "inputs":[{"name":"image","dtype":"f32","shape":[4,2]}],"#,
        r#"{"name":"many","version":"1","architecture":"a","rows_max":3,"length":{"name":"n","min":1,"max":9},
            "inputs":[{"name":"ids","dtype":"u32","shape":["n"],"range":[1,1000],"pad":1},
                      {"name":"mask","dtype":"u8","shape":["n"],"range":[0,1]},
                      {"name":"bias","dtype":"i64","shape":[1],"range":[-5,1099511627776]},
                      {"name":"half","dtype":"f16","shape":["n",3],"nonfinite":"allow"},
                      {"name":"scale","dtype":"f64","shape":[]}],"#,
    ]
    .into_iter()
    .map(|json| {
        let contract: Contract = serde_json::from_str(&format!("{json}{output}}}")).expect("it is written above");
        contract.checked().expect("sound")
    })
    .collect()
});

fuzz_target!(|input: &[u8]| {
    let Some((choice, rest)) = input.split_first() else { return };
    let contract = &CONTRACTS[usize::from(*choice) % 3];
    // As on the wire: a length, the metadata, the payload.
    if let Some((len, rest)) = rest.split_first()
        && let Some((metadata, payload)) = rest.split_at_checked(usize::from(*len))
        && let Ok(infer) = decode_exact::<Infer>(metadata)
    {
        check(contract, &infer, payload);
    }
    let (infer, payload) = nearly_right(contract, rest);
    check(contract, &infer, &payload);
});

fn check(contract: &Contract, infer: &Infer, payload: &[u8]) {
    match contract.check(infer, payload) {
        Ok(checked) if checked.text => assert!(payload.len() >= 4 + checked.len as usize),
        Ok(checked) => {
            assert!((1..=contract.rows_max).contains(&checked.rows));
            let mut end: u128 = 0;
            for (spec, tensor) in contract.inputs.iter().zip(infer.inputs.iter()) {
                let elements: u128 = tensor.dims.iter().map(|dim| u128::from(*dim)).product();
                end = end.next_multiple_of(8) + elements * spec.dtype.size() as u128;
            }
            let len = payload.len() as u128;
            assert!(len == end || len == end.next_multiple_of(8), "{len} bytes for shapes of {end}");
        }
        Err(refusal) => {
            assert!(matches!(refusal.code, Code::InvalidArgument | Code::TooLarge), "{refusal}");
            assert_eq!(refusal.executed, Executed::Never);
            assert!(!refusal.message.is_empty());
        }
    }
}

/// A request of the contract's form. The first bytes bend it: each below 0x80 leaves its field as it should be.
fn nearly_right(contract: &Contract, bytes: &[u8]) -> (Infer, Vec<u8>) {
    let mut bytes = bytes.iter().copied();
    let mut bend = |right: u32| match bytes.next() {
        None | Some(0..0x80) => right,
        Some(0x80..0xF0) if right > 0 => right - 1,
        Some(0xF0..0xF8) => right.saturating_add(1),
        Some(0xF8..0xFC) => 1 << 31,
        Some(_) => u32::MAX,
    };
    let (rows, len) = (bend(2), bend(3));
    let mut infer = Infer::default();
    let mut payload_len = 0usize;
    for (index, spec) in contract.inputs.iter().enumerate() {
        let mut dims: List<u32, 8> = List::new();
        let shape = spec.shape.iter().map(|dim| match dim {
            Dim::Fixed(n) => *n,
            Dim::Named(_) => len,
        });
        for dim in std::iter::once(rows).chain(shape) {
            let _ = dims.push(bend(dim));
        }
        payload_len = payload_len.next_multiple_of(8)
            + (rows.min(8) as usize * spec.row_elements(len.min(32))).min(4096) * spec.dtype.size();
        let tensor = TensorMeta { index: bend(index as u32) as u8, dtype: bend(spec.dtype as u32) as u8, dims };
        let _ = infer.inputs.push(tensor);
    }
    let payload_len = bend(payload_len as u32).min(1 << 16) as usize;
    let mut payload: Vec<u8> = bytes.take(payload_len).collect();
    payload.resize(payload_len, 0);
    (infer, payload)
}
