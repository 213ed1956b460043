//! A message from thread to thread and back: what handing a batch to an executor costs, and the answer.
//!
//! `spin` is how long the receiver looks before it sleeps; at 0 every hop pays for waking a sleeping core.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ferry::mailbox::{Received, mailbox};

fn there_and_back(c: &mut Criterion) {
    let mut group = c.benchmark_group("mailbox");
    group.sample_size(30).measurement_time(Duration::from_secs(3));
    for (name, spin) in [("spin_50us", Duration::from_micros(50)), ("sleep", Duration::ZERO)] {
        let (there, inbox) = mailbox::<u64>(64);
        let (back, answers) = mailbox::<u64>(64);
        let echo = std::thread::spawn(move || {
            while let Received::Message(n) = inbox.recv_until(None, spin) {
                if !back.send_or_wait(n + 1) {
                    break;
                }
            }
        });
        group.bench_function(format!("there_and_back/{name}"), |b| {
            b.iter(|| {
                assert!(there.send_or_wait(1), "the echo thread lives");
                answers.recv_until(None, spin)
            });
        });
        drop(there);
        echo.join().expect("the echo thread only echoes");
    }
    let (sender, receiver) = mailbox::<u64>(64);
    group.throughput(Throughput::Elements(1));
    group.bench_function("same_thread", |b| {
        b.iter(|| {
            sender.send(1).expect("it was just emptied");
            receiver.try_recv()
        });
    });
    group.finish();
}

criterion_group!(benches, there_and_back);
criterion_main!(benches);
