//! One answer: a member's rows out of a finished batch, framed with its checksums into the connection's output.

use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ferry::contract::{Contract, Dim, NonFinite, TensorSpec};
use ferry::executor::batch::BatchOutput;
use ferry::mail::{FinishedBatch, Member};
use ferry::scatter::{Details, append_result};
use ferry::scheduler::SealedBatch;
use ferry::vocab::{DType, Layout, ModelHandle, Moment, SealReason, TicketKey};

const ROWS: u32 = 32;

fn finished(dtype: DType, elements: u32) -> FinishedBatch {
    let tensor = TensorSpec {
        name: "y".into(),
        dtype,
        shape: vec![Dim::Fixed(elements)],
        pad: 0.0,
        range: None,
        nonfinite: NonFinite::Refuse,
    };
    let contract = Contract {
        name: "bench".into(),
        version: "1".into(),
        architecture: "bench".into(),
        inputs: vec![tensor.clone()],
        outputs: vec![tensor],
        length: None,
        text: None,
        rows_max: 1,
    };
    let contract = contract.checked().expect("a contract");
    let mut output = BatchOutput::default();
    output.prepare(&contract, Layout::Padded, &[1; ROWS as usize], 1);
    let members = (0..ROWS)
        .map(|row| Member {
            key: TicketKey { shard: 0, slot: row, generation: 0 },
            first_row: row,
            rows: 1,
            len: 1,
            part: ferry::mail::Part::whole(1),
            received_at: Moment(0),
            admitted_at: Moment(1),
            waited: Default::default(),
            truncated: false,
        })
        .collect();
    let batch = SealedBatch {
        id: 1,
        model: ModelHandle(0),
        executor: 0,
        rows: ROWS,
        rows_possible: ROWS,
        layout: Layout::Padded,
        squares_real: u64::from(ROWS),
        padded_len: 1,
        cells_real: u64::from(ROWS),
        reason: SealReason::Full,
        sealed_at: Moment(2),
        generation: 1,
        predicted: 0,
        objective: Default::default(),
    };
    FinishedBatch {
        contract: Arc::new(contract),
        batch,
        members,
        output,
        failure: None,
        packed_at: Moment(3),
        started_at: Moment(4),
        finished_at: Moment(5),
        device: None,
    }
}

fn answer(c: &mut Criterion) {
    let mut group = c.benchmark_group("scatter");
    group.throughput(Throughput::Elements(1));
    for (name, dtype, elements) in [("echo_256_bytes", DType::U8, 256), ("embedding_384_floats", DType::F32, 384)] {
        let finished = finished(dtype, elements);
        for (what, timings, receipt) in
            [("plain", false, false), ("with_timings", true, false), ("with_receipt", true, true)]
        {
            let details = Details { timings, receipt, late_us: 0 };
            let id = BenchmarkId::new(name, what);
            let mut out = Vec::new();
            let mut members = finished.members.iter().cycle();
            group.bench_function(id, |b| {
                b.iter(|| {
                    out.clear();
                    let member = members.next().expect("a cycle");
                    append_result(&mut out, &finished, member, 7, details, Moment(6));
                    out.len()
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, answer);
criterion_main!(benches);
