//! What a shard does with the bytes of a request: find the frame, verify its checksums, decode its metadata, check it
//! against the contract.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ferry::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
use ferry::vocab::{DType, ModelHandle};
use ferry::wire::decoder::Step;
use ferry::wire::encoder::{Head, append_frame};
use ferry::wire::message::{Infer, List, TensorMeta, decode_exact};
use ferry::wire::{Decoder, Kind, Limits};

fn contract(input: TensorSpec, length: Option<Length>) -> Contract {
    let contract = Contract {
        name: "bench".into(),
        version: "1".into(),
        architecture: "bench".into(),
        outputs: vec![TensorSpec { range: None, ..input.clone() }],
        inputs: vec![input],
        length,
        text: None,
        rows_max: 16,
    };
    contract.checked().expect("a contract")
}

fn input(dtype: DType, shape: Vec<Dim>, range: Option<[i64; 2]>) -> TensorSpec {
    TensorSpec { name: "x".into(), dtype, shape, pad: 0.0, range, nonfinite: NonFinite::Refuse }
}

fn request(dtype: DType, dims: &[u32], payload: &[u8]) -> Vec<u8> {
    let mut infer = Infer { deadline_us: 50_000, ..Infer::default() };
    let dims = List::from_slice(dims).expect("few dimensions");
    infer.inputs.push(TensorMeta { index: 0, dtype: dtype as u8, dims }).expect("the first");
    let mut bytes = Vec::new();
    let head = Head { kind: Kind::Infer, model: ModelHandle(0), request_id: 1 };
    append_frame(&mut bytes, head, &infer, payload).expect("small metadata");
    bytes
}

fn ids_of(tokens: u32) -> Vec<u8> {
    (0..tokens).flat_map(|n| (n * 700).to_le_bytes()).collect()
}

fn decode_and_check(c: &mut Criterion) {
    let echo = contract(input(DType::U8, vec![Dim::Fixed(256)], None), None);
    let tokens = Length { name: "tokens".into(), min: 1, max: 512 };
    let ids = input(DType::U32, vec![Dim::Named("tokens".into())], Some([0, 30_521]));
    let minilm = contract(ids, Some(tokens));
    let cases = [
        ("echo_256_bytes", &echo, request(DType::U8, &[1, 256], &[7; 256])),
        ("minilm_40_tokens", &minilm, request(DType::U32, &[1, 40], &ids_of(40))),
    ];
    let decoder = Decoder::new(Limits::DEFAULT);
    let mut group = c.benchmark_group("decoder");
    group.throughput(Throughput::Elements(1));
    for (name, contract, bytes) in &cases {
        group.bench_with_input(BenchmarkId::new("decode_and_check", name), bytes, |b, bytes| {
            b.iter(|| {
                let Ok(Step::Frame(frame)) = decoder.next(bytes) else { panic!("a whole frame") };
                assert!(frame.payload_is_intact(bytes));
                let infer: Infer = decode_exact(frame.metadata(bytes)).expect("an infer");
                contract.check(&infer, frame.payload(bytes)).expect("it keeps the contract")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, decode_and_check);
criterion_main!(benches);
