//! Rows to a padded batch, from the bytes that were received. Throughput counts the bytes written, padding included.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ferry::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
use ferry::executor::pack::{Pads, Row, pack};
use ferry::executor::slot::VacantSlot;
use ferry::mail::Request;
use ferry::scheduler::SealedBatch;
use ferry::vocab::{DType, ModelHandle, Moment, SealReason, TicketKey};

fn contract(dtype: DType, shape: Vec<Dim>, pad: f64) -> Contract {
    let input = TensorSpec { name: "x".into(), dtype, shape, pad, range: None, nonfinite: NonFinite::Refuse };
    let length = input.has_length().then(|| Length { name: "tokens".into(), min: 1, max: 512 });
    let contract = Contract {
        name: "bench".into(),
        version: "1".into(),
        architecture: "bench".into(),
        outputs: vec![input.clone()],
        inputs: vec![input],
        length,
        text: None,
        rows_max: 1,
    };
    contract.checked().expect("a contract")
}

fn pack_batch(c: &mut Criterion) {
    let tokens = || vec![Dim::Named("tokens".into())];
    let cases = [
        ("echo_256_bytes", contract(DType::U8, vec![Dim::Fixed(256)], 0.0), 1),
        ("tokens_to_64_pad_0", contract(DType::U32, tokens(), 0.0), 64),
        ("tokens_to_64_pad_1", contract(DType::U32, tokens(), 1.0), 64),
    ];
    let mut group = c.benchmark_group("pack");
    for (name, contract, padded_len) in &cases {
        for rows in [1u32, 32] {
            let requests: Vec<Request> = (0..rows)
                .map(|slot| {
                    // Rows of three quarters to all of the padded length.
                    let len = if *padded_len == 1 { 1 } else { padded_len - slot % (padded_len / 4) };
                    Request {
                        key: TicketKey { shard: 0, slot, generation: 0 },
                        model: ModelHandle(0),
                        rows: 1,
                        len,
                        part: ferry::mail::Part::whole(1),
                        payload: vec![1; contract.inputs[0].row_bytes(len)].into(),
                        received_at: Moment(0),
                        deadline: None,
                        compose: None,
                        class: Default::default(),
                        tenant: Default::default(),
                        truncated: false,
                    }
                })
                .collect();
            let batch = SealedBatch {
                id: 1,
                model: ModelHandle(0),
                executor: 0,
                rows,
                rows_possible: rows,
                layout: ferry::vocab::Layout::Padded,
                squares_real: 0,
                padded_len: *padded_len,
                cells_real: 0,
                reason: SealReason::Full,
                sealed_at: Moment(0),
                generation: 1,
                predicted: 0,
                objective: Default::default(),
            };
            let pads = Pads::of(contract);
            let mut slot = VacantSlot::default();
            let bytes = rows as usize * contract.inputs[0].row_bytes(*padded_len);
            group.throughput(Throughput::Bytes(bytes as u64));
            group.bench_function(BenchmarkId::new(*name, format!("{rows}_rows")), |b| {
                b.iter(|| {
                    let rows = requests.iter().map(|request| Row {
                        request,
                        admitted_at: Moment(0),
                        waited: Default::default(),
                    });
                    pack(&mut slot, contract, &pads, &batch, rows);
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, pack_batch);
criterion_main!(benches);
