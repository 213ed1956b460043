use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::scheduler::{
    Arrival, Buckets, Class, Compose, Group, Policy, QueueLimits, Scheduler, SeatSpec, TenantId, TicketId, state,
};
use crate::vocab::{ModelHandle, Moment};

fn scheduler() -> Scheduler {
    let policy = Policy::new(8, 512, Buckets::new(&[16, 64]).expect("ascending"));
    Scheduler::new(QueueLimits::NONE, vec![policy.clone(), policy], &SeatSpec::separate(Group::Executors, 2, 2))
}

fn header() -> Header {
    Header::of(&scheduler(), &["a".into(), "b".into()], Moment(5_000_000_000))
}

fn moment() -> impl Strategy<Value = Moment> {
    prop_oneof![3 => (4_999_000_000..5_001_000_000u64).prop_map(Moment), 1 => any::<u64>().prop_map(Moment)]
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let compose = proptest::option::weighted(0.2, (any::<u64>(), any::<u32>()));
    let deadline = proptest::option::weighted(0.5, moment());
    (any::<u16>(), 0..9u32, any::<u32>(), any::<u32>(), deadline, compose, 0..3u8, any::<u16>()).prop_map(
        |(model, rows, len, bytes, deadline, compose, class, tenant)| Arrival {
            model: ModelHandle(model % 3),
            rows,
            len,
            bytes: bytes.into(),
            deadline,
            compose: compose.map(|(tag, rows)| Compose { tag, rows }),
            class: Class::from_priority(class),
            tenant: TenantId(tenant),
        },
    )
}

fn done() -> impl Strategy<Value = Done> {
    let packed = proptest::option::of((1..u64::MAX, any::<u64>()));
    (any::<u64>(), 0..4u16, 0..3u16, any::<u32>(), any::<u32>(), packed, any::<u64>(), any::<bool>()).prop_map(
        |(id, executor, model, rows, padded_len, packed, service, inline)| Done {
            id,
            executor,
            model: ModelHandle(model),
            rows,
            padded_len,
            packed,
            service: Duration::from_nanos(service),
            inline,
        },
    )
}

fn event() -> impl Strategy<Value = Event> {
    let knobs = proptest::collection::vec(("[a-z_]{0,9}", ".{0,20}"), 0..4);
    let exact = proptest::collection::vec(any::<u8>(), 0..50);
    prop_oneof![
        4 => moment().prop_map(|at| Event::Turn { at }),
        8 => (moment(), arrival()).prop_map(|(at, arrival)| Event::Arrival { at, arrival }),
        2 => (moment(), any::<u32>()).prop_map(|(at, id)| Event::Cancel { at, of: Cancelled::Ticket(TicketId(id)) }),
        1 => (moment(), any::<u32>(), any::<u32>()).prop_map(|(at, id, with)| Event::Cancel {
            at,
            of: Cancelled::Within { id: TicketId(id), with: TicketId(with) }
        }),
        // Which arrival is filled in where it is known how many there were.
        2 => (moment(), any::<u64>(), any::<bool>()).prop_map(|(at, of, left)| Event::Cancel {
            at,
            of: if left { Cancelled::Left(of) } else { Cancelled::Waiting(of) }
        }),
        4 => (moment(), done()).prop_map(|(at, batch)| Event::Finished { at, batch }),
        1 => (any::<u16>(), knobs, exact).prop_map(|(model, knobs, exact)| Event::Policy(PolicyChange {
            model: ModelHandle(model),
            knobs,
            exact
        })),
        1 => Just(Event::Drain),
    ]
}

/// Makes a list possible: cancels are of arrivals before them.
fn possible(events: Vec<Event>) -> Vec<Event> {
    let mut arrivals = 0u64;
    let mut kept = Vec::new();
    for event in events {
        match event {
            Event::Arrival { .. } => {
                arrivals += 1;
                kept.push(event);
            }
            Event::Cancel { of: Cancelled::Left(_) | Cancelled::Waiting(_), .. } if arrivals == 0 => {}
            Event::Cancel { at, of: Cancelled::Left(of) } => {
                kept.push(Event::Cancel { at, of: Cancelled::Left(of % arrivals) });
            }
            Event::Cancel { at, of: Cancelled::Waiting(of) } => {
                kept.push(Event::Cancel { at, of: Cancelled::Waiting(of % arrivals) });
            }
            other => kept.push(other),
        }
    }
    kept
}

/// A trace of these events with a chunk for each `per_chunk` of them, and the events as they are read: with the
/// checkpoints that end chunks.
fn written(events: &[Event], per_chunk: usize, state: &[u8], end: CaptureEnd) -> (Vec<u8>, Vec<Event>) {
    let (mut writer, mut bytes) = Writer::start(&header(), state);
    let mut expected = Vec::new();
    for (index, part) in events.chunks(per_chunk).enumerate() {
        for event in part {
            writer.event(event);
            expected.push(event.clone());
        }
        let (decisions, hash) = (3 * index as u64, 0xfeed_0000 + index as u64);
        bytes.extend(writer.close(decisions, hash));
        expected.push(Event::Checkpoint { decisions, hash });
    }
    bytes.extend(end_chunk(Ended { end, chunks: writer.chunks() }));
    (bytes, expected)
}

fn read(bytes: &[u8]) -> Result<(Vec<Event>, Vec<u8>, CaptureEnd), TraceError> {
    let mut reader = TraceReader::open(bytes)?;
    let mut events = Vec::new();
    while let Some(event) = reader.next_event()? {
        events.push(event);
    }
    assert_eq!(reader.bytes(), bytes.len() as u64);
    assert_eq!(reader.header(), &header());
    Ok((events, reader.state().to_vec(), reader.end().expect("it was read to its end")))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_is_written_is_read(events in proptest::collection::vec(event(), 0..60), per_chunk in 1..20usize, state in 0..5000usize, end in 0..5u8) {
        let events = possible(events);
        let state: Vec<u8> = (0..state).map(|at| at as u8).collect();
        let end = CaptureEnd::from_number(end).expect("a number of an end");
        let (bytes, expected) = written(&events, per_chunk, &state, end);
        prop_assert_eq!(read(&bytes), Ok((expected, state, end)));
    }

    #[test]
    fn a_changed_byte_is_an_error_wherever_it_is(events in proptest::collection::vec(event(), 1..20), at in any::<prop::sample::Index>(), bit in 0..8u32) {
        let (mut bytes, _) = written(&possible(events), 7, &[1, 2, 3], CaptureEnd::Complete);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(read(&bytes).is_err(), "byte {} of {} was changed unnoticed", at, bytes.len());
    }

    #[test]
    fn bytes_that_pass_the_checksum_and_mean_nothing_are_an_error_or_events_but_no_panic(garbage in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut memory = events::Memory::new(Moment(9), 0);
        let mut rest = &garbage[..];
        while !rest.is_empty() && memory.read(&mut rest).is_ok() {}
    }
}

#[test]
fn a_trace_that_is_cut_off_anywhere_is_an_error() {
    let events = [Event::Turn { at: Moment(7) }, Event::Drain];
    let (bytes, _) = written(&events, 1, &[9; 100], CaptureEnd::Complete);
    for len in 0..bytes.len() {
        let expected_foreign = len < 12;
        match read(&bytes[..len]) {
            Err(TraceError::Foreign) => assert!(expected_foreign, "{len} bytes"),
            Err(TraceError::Truncated { .. }) => assert!(!expected_foreign, "{len} bytes"),
            other => panic!("{len} of {} bytes gave {other:?}", bytes.len()),
        }
    }
    assert!(read(&bytes).is_ok());
}

#[test]
fn chunks_that_are_lost_doubled_or_behind_the_end_are_errors() {
    let (mut writer, start) = Writer::start(&header(), &[]);
    let first = writer.close(1, 1);
    let second = writer.close(2, 2);
    let end = end_chunk(Ended { end: CaptureEnd::Complete, chunks: writer.chunks() });
    assert!(read(&[&start[..], &first, &second, &end].concat()).is_ok());
    for wrong in [
        [&start[..], &second, &end].concat(),
        [&start[..], &first, &first, &second, &end].concat(),
        [&start[..], &second, &first, &end].concat(),
        [&start[..], &first, &end].concat(),
        [&start[..], &first, &second, &start[12..], &end].concat(),
    ] {
        assert!(matches!(read(&wrong), Err(TraceError::Malformed { .. })), "{:?}", read(&wrong));
    }
    assert_eq!(read(&[&start[..], &first, &second, &end, &end].concat()), Err(TraceError::Trailing));
}

#[test]
fn files_of_others_and_of_other_versions_say_so() {
    assert_eq!(read(b"PK\x03\x04 something else entirely"), Err(TraceError::Foreign));
    assert_eq!(read(b""), Err(TraceError::Foreign));
    let (mut bytes, _) = written(&[], 1, &[], CaptureEnd::Complete);
    bytes[8] = 2;
    assert_eq!(read(&bytes), Err(TraceError::Version { found: 2 }));
}

#[test]
fn a_chunk_that_claims_to_be_huge_is_refused_before_it_is_read() {
    let (bytes, _) = written(&[], 1, &[], CaptureEnd::Complete);
    let mut huge = bytes[..12].to_vec();
    huge.extend([HEADER, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    assert!(matches!(read(&huge), Err(TraceError::Malformed { chunk: 0, .. })));
}

#[test]
fn a_policy_comes_back_from_the_header() {
    let scheduler = scheduler();
    for model in header().models {
        let (policy, unknown) = model.policy().expect("its own knobs");
        assert_eq!(&policy, scheduler.policy(ModelHandle(0)));
        assert!(unknown.is_empty());
    }
    let mut later = header().models.remove(0);
    later.knobs.push(("a_knob_of_tomorrow".into(), "9".into()));
    assert_eq!(later.policy().expect("the others are known").1, ["a_knob_of_tomorrow"]);
}

#[test]
fn a_state_is_no_trace_and_a_trace_keeps_it_whole() {
    let saved = scheduler().save().expect("it is small");
    let (bytes, _) = written(&[], 1, &saved, CaptureEnd::Stopped);
    let (_, state, end) = read(&bytes).expect("a trace");
    assert_eq!(end, CaptureEnd::Stopped);
    assert!(state::LAYOUT == header().layout && Scheduler::restore(state::LAYOUT, &state).is_ok());
}

/// What a request costs in the file, in the shape that costs most: each alone in its batch, with a deadline.
#[test]
fn a_lone_request_takes_at_most_32_bytes_and_one_of_a_batch_of_four_at_most_20() {
    for (batch, most) in [(1, 32), (4, 20)] {
        let (mut writer, start) = Writer::start(&header(), &[]);
        let mut at = header().at;
        let mut bytes = 0;
        for id in 0..1000u64 {
            for row in 0..batch {
                at = at + Duration::from_micros(137 + row);
                let arrival = Arrival {
                    model: ModelHandle(0),
                    rows: 1,
                    len: 200,
                    bytes: 800,
                    deadline: Some(at + Duration::from_micros(49_931)),
                    compose: None,
                    class: Class::default(),
                    tenant: TenantId::default(),
                };
                writer.event(&Event::Arrival { at, arrival });
                writer.event(&Event::Turn { at });
            }
            at = at + Duration::from_micros(731);
            let (executor, model, service) = ((id % 2) as u16, ModelHandle(0), Duration::from_nanos(701_234));
            let batch =
                Done { id, executor, model, rows: batch as u32, padded_len: 208, packed: None, service, inline: false };
            writer.event(&Event::Finished { at, batch });
            writer.event(&Event::Turn { at });
            if writer.is_full() {
                bytes += writer.close(id, id).len();
            }
        }
        bytes += writer.close(1000, 0).len();
        let each = bytes as f64 / (1000 * batch) as f64;
        assert!(each <= f64::from(most), "{each:.1} bytes a request in batches of {batch}; {} to begin", start.len());
        println!("{each:.1} bytes a request in batches of {batch}; {} to begin", start.len());
    }
}
