//! What users compare: queue bounds, scatter by id, drain, timings, errors of one row, several rows, composed batches.

use std::collections::HashMap;

use ferry::client::{Client, ClientOptions, Request};
use ferry::server::Ending;
use ferry::vocab::{Code, DType, Executed, Retry, SealReason};
use ferry::wire::message::INFER_ITEMS;

use crate::common::{Ask, Event, Numbers, Raw, Server, floats_of, wait_until};

#[test]
fn a_full_queue_refuses_with_the_time_to_come_back_and_serves_what_it_took() {
    let server = Server::start(&["queue.rows_max=10"]);
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    // Learns how fast the queue drains, so that the hint is more than a default.
    raw.round(&Ask::word(faulty, 4)).expect_result();
    let running = raw.ask(&Ask::word(faulty, 500));
    wait_until("the executor is busy", || server.metric("ferry_batches_total", &["model=\"faulty\""]) == 2.0);
    // One batch of 8 may go to the executor's spare slot; then 10 wait; the rest is refused.
    let ids: Vec<u64> = (0..40).map(|_| raw.ask(&Ask::word(faulty, 4))).collect();
    let mut ok = Vec::new();
    let mut refused = Vec::new();
    for _ in 0..=ids.len() {
        let event = raw.recv();
        let id = event.ends().expect("an end");
        match event {
            Event::Result { .. } => ok.push(id),
            other => {
                let refusal = other.expect_error(Code::Overloaded);
                assert_eq!((refusal.executed, refusal.retry), (Executed::Never, Retry::After));
                assert!(refusal.retry_after_ms > 0 && refusal.retry_after_ms <= 10_000, "{refusal:?}");
                assert!(refusal.message.contains("rows"), "{}", refusal.message);
                assert!(ok.is_empty(), "a refusal does not wait for the model");
                refused.push(id);
            }
        }
    }
    assert!(ok.contains(&running));
    assert!(refused.len() >= 40 - 18 && refused.len() <= 30, "{} of 40 were refused", refused.len());
    assert_eq!(ok.len() + refused.len(), 41);
    server.wait_until_at_rest();
    raw.round(&Ask::word(faulty, 0)).expect_result();
}

#[test]
fn cells_and_bytes_bound_the_queue_as_rows_do() {
    for (set, what) in [("queue.cells_max=65536", "padded cells"), ("queue.bytes_max=65536", "payload bytes")] {
        let server =
            Server::start(&[set, "frontend.payload_bytes_max=16384", "queue.rows_max=60000", "executor.slots=1"]);
        let mut raw = server.connect();
        let (faulty, queued) = (raw.handle("faulty"), raw.handle("queued"));
        raw.ask(&Ask::word(faulty, 300));
        wait_until("the executor is busy", || server.metric("ferry_batches_total", &["model=\"faulty\""]) == 1.0);
        let values = [0.5f32; 1024];
        for _ in 0..100 {
            raw.ask(&Ask::floats(queued, &values));
        }
        let mut refused = 0;
        for _ in 0..101 {
            if let Event::Error { refusal, .. } = raw.recv() {
                assert_eq!(refusal.code, Code::Overloaded);
                assert!(refusal.message.contains(what), "{}", refusal.message);
                refused += 1;
            }
        }
        let fits = if what == "padded cells" { 64 } else { 16 };
        assert!((100 - fits - 1..=100 - fits).contains(&refused), "{set}: {refused} were refused");
    }
}

#[test]
fn requests_beyond_the_credit_are_refused_and_credit_comes_back_with_the_answers() {
    let server = Server::start(&[
        "frontend.credit_requests=4",
        "frontend.credit_bytes=16384",
        "frontend.payload_bytes_max=8192",
    ]);
    let mut raw = server.connect();
    let (faulty, queued) = (raw.handle("faulty"), raw.handle("queued"));
    for _ in 0..3 {
        let ids: Vec<u64> = (0..4).map(|_| raw.ask(&Ask::word(faulty, 100))).collect();
        let beyond = raw.ask(&Ask::word(faulty, 0));
        let event = raw.recv();
        assert_eq!(event.ends(), Some(beyond), "the refusal does not wait for the others");
        let refusal = event.expect_error(Code::Overloaded);
        assert_eq!((refusal.executed, refusal.retry), (Executed::Never, Retry::After));
        let mut ended: Vec<u64> = ids
            .iter()
            .map(|_| raw.recv())
            .map(|event| {
                let id = event.ends().expect("an end");
                event.expect_result();
                id
            })
            .collect();
        ended.sort_unstable();
        assert_eq!(ended, ids);
    }
    // Bytes: two payloads of 4 KiB + two more fill 16 KiB exactly while a batch runs.
    let slow = raw.ask(&Ask::word(faulty, 1500));
    let values = vec![1.0f32; 1024];
    let two = Ask::new(queued, DType::F32, &[2, 1024], bytemuck::cast_slice(&[&values[..], &values[..]].concat()));
    let first = raw.ask(&two);
    let second = raw.ask(&two);
    let event = raw.recv();
    assert_eq!(event.ends(), Some(second), "4 + 8192 + 8192 bytes are over 16384");
    let refusal = event.expect_error(Code::Overloaded);
    assert!(refusal.message.contains("bytes"), "{}", refusal.message);
    let mut ends = [raw.recv().ends(), raw.recv().ends()];
    ends.sort();
    assert_eq!(ends, [Some(slow), Some(first)]);
    server.wait_until_at_rest();
}

#[test]
fn twenty_thousand_pipelined_answers_each_carry_the_bytes_of_their_own_request() {
    const CONNECTIONS: u64 = 8;
    const REQUESTS: u64 = 20_000 / CONNECTIONS;
    let server = Server::start(&["threads.shards=2", "threads.executors=2"]);
    let workers: Vec<_> = (0..CONNECTIONS)
        .map(|connection| {
            let mut raw = server.connect();
            std::thread::spawn(move || {
                let (echo, queued, sleep) = (raw.handle("echo"), raw.handle("queued"), raw.handle("sleep"));
                let mut numbers = Numbers(connection);
                let mut waiting: HashMap<u64, Vec<u8>> = HashMap::new();
                let (mut last, mut overtaken) = (0, 0u64);
                let mut take = |raw: &mut Raw, waiting: &mut HashMap<u64, Vec<u8>>| {
                    let event = raw.recv();
                    let id = event.ends().expect("an end");
                    let expected = waiting.remove(&id).expect("an answer to something asked, once");
                    assert!(event.expect_result().1 == expected, "request {id} of connection {connection}");
                    overtaken += u64::from(id < last);
                    last = last.max(id);
                };
                for count in 0..REQUESTS {
                    // Each value says whose it is: connection, request, place.
                    let ask = if numbers.below(50) == 0 {
                        Ask::word(sleep, numbers.below(2000) as u32)
                    } else {
                        let len = match numbers.below(10) {
                            0 => 1 + numbers.below(1024),
                            _ => 1 + numbers.below(40),
                        };
                        let stamp = |place: u64| (connection * 1_000_003 + count * 1031 + place) as f32;
                        Ask::floats(
                            if count % 2 == 0 { echo } else { queued },
                            &(0..len).map(stamp).collect::<Vec<f32>>(),
                        )
                    };
                    let id = raw.ask(&ask);
                    waiting.insert(id, ask.payload);
                    while waiting.len() as u64 > numbers.below(200) {
                        take(&mut raw, &mut waiting);
                    }
                }
                while !waiting.is_empty() {
                    take(&mut raw, &mut waiting);
                }
                overtaken
            })
        })
        .collect();
    let overtaken: u64 = workers.into_iter().map(|worker| worker.join().expect("no assertion failed")).sum();
    assert!(overtaken > 0, "answers came in another order than their requests");
    server.wait_until_at_rest();
    assert_eq!(server.metric("ferry_requests_finished_total", &["code=\"ok\""]), 20_000.0);
}

#[test]
fn a_drain_answers_what_was_accepted_and_says_what_was_not() {
    for round in 0..5 {
        let server = Server::start(&["threads.shards=2"]);
        let mut connections: Vec<Raw> = (0..6).map(|_| server.connect()).collect();
        let (echo, faulty) = (connections[0].handle("echo"), connections[0].handle("faulty"));
        for raw in &mut connections {
            for n in 0..50 {
                raw.ask(&if n % 10 == 0 { Ask::word(faulty, 5) } else { Ask::floats(echo, &[n as f32]) });
            }
        }
        server.drain();
        let mut numbers = Numbers(round);
        for (at, mut raw) in connections.into_iter().enumerate() {
            // Some go on sending for a while, as a client does that has not read the goaway yet.
            for _ in 0..numbers.below(3) {
                use std::io::Write;
                let id = raw.take_id();
                let _ = raw.stream.write_all(&Ask::floats(echo, &[0.0]).frame(id));
            }
            let sent = raw.take_id() - 1;
            let mut last_accepted = None;
            let mut ended = Vec::new();
            for event in raw.recv_all() {
                match event {
                    Event::Goaway { code, goaway } => {
                        assert_eq!(code, Code::Draining);
                        assert!(last_accepted.replace(goaway.last_accepted_id).is_none(), "one goaway");
                    }
                    event => ended.push(event.ends().expect("an end")),
                }
            }
            ended.sort_unstable();
            let last_accepted = last_accepted.expect("a goaway says what was accepted");
            let first = if at == 0 { 3 } else { 1 };
            assert!(last_accepted <= sent);
            assert_eq!(ended, (first..=last_accepted).collect::<Vec<u64>>(), "all that was accepted and nothing else");
        }
        assert!(Raw::connect_or_none(server.data).is_none(), "the port is closed");
        assert_eq!(server.ending(), Ending::Drained);
    }
}

#[test]
fn timings_are_given_when_asked_for_and_their_parts_are_the_whole() {
    let server = Server::shared();
    let mut raw = server.connect();
    let (echo, sleep) = (raw.handle("echo"), raw.handle("sleep"));
    let (result, _) = raw.round(&Ask::floats(echo, &[1.0])).expect_result();
    assert_eq!(result.timings, None);
    for micros in [0, 3_000, 20_000] {
        let sent_at = ferry::clock::now();
        let (result, _) = raw.round(&Ask::word(sleep, micros).timings()).expect_result();
        let seen_here = ferry::clock::now().since(sent_at).as_nanos() as u64;
        let timings = result.timings.expect("asked for");
        let parts =
            [timings.admit_ns, timings.queue_ns, timings.pack_ns, timings.wait_ns, timings.run_ns, timings.scatter_ns];
        assert_eq!(parts.iter().sum::<u64>(), timings.total_ns());
        assert!(timings.run_ns >= u64::from(micros) * 1000, "{timings:?}");
        assert!(timings.total_ns() <= seen_here, "{timings:?} took {seen_here} ns as seen from here");
    }
}

#[test]
fn a_row_that_is_not_a_number_fails_alone_in_its_batch() {
    let server = Server::shared();
    let mut raw = server.connect();
    let faulty = raw.handle("faulty");
    for bad in 0..8 {
        let tag = 2900 + bad;
        let ids: Vec<u64> = (0..8)
            .map(|row| raw.ask(&Ask::word(faulty, if row == bad { 3 } else { 10 + row as u32 }).compose(tag, 8)))
            .collect();
        let mut batches = Vec::new();
        for _ in &ids {
            let event = raw.recv();
            let row = ids.iter().position(|id| event.ends() == Some(*id)).expect("one of these") as u64;
            if row == bad {
                let refusal = event.expect_error(Code::NonFiniteOutput);
                assert_eq!(refusal.executed, Executed::Yes);
            } else {
                let (result, payload) = event.expect_result();
                assert_eq!(payload, (10.0 + row as f32).to_le_bytes());
                assert_eq!(result.batch_rows, 8);
                batches.push(result.batch);
            }
        }
        assert!(batches.iter().all(|batch| *batch == batches[0]), "one batch carried all: {batches:?}");
    }
}

#[test]
fn a_request_of_several_rows_is_answered_row_by_row_and_fails_as_a_whole() {
    let server = Server::shared();
    let mut raw = server.connect();
    let (echo, faulty) = (raw.handle("echo"), raw.handle("faulty"));
    for (rows, len) in [(1u32, 1u32), (2, 3), (7, 5), (64, 256), (16, 1024), (3, 1024)] {
        let values: Vec<f32> = (0..rows * len).map(|n| n as f32).collect();
        let ask = Ask::new(echo, DType::F32, &[rows, len], bytemuck::cast_slice(&values));
        let (result, payload) = raw.round(&ask).expect_result();
        assert_eq!(payload, ask.payload, "{rows} rows of {len}");
        assert_eq!(result.outputs[0].dims[..], [rows, len]);
        assert!(result.batch_rows >= rows);
    }
    let (_, payload) = raw.round(&Ask::words(faulty, &[4, 0, 6])).expect_result();
    assert_eq!(floats_of(&payload), [4.0, 0.0, 6.0]);
    raw.round(&Ask::words(faulty, &[4, 3, 6])).expect_error(Code::NonFiniteOutput);
}

#[test]
fn requests_with_one_tag_are_exactly_one_batch_and_nobody_else_joins() {
    let server = Server::start(&[]);
    let mut one = server.connect();
    let mut two = server.connect();
    let echo = one.handle("echo");
    for tag in 1..=50u64 {
        let rows = 1 + (tag % 7) as u32;
        // Members come from two connections, with others in between that may not join.
        let mut members = Vec::new();
        let mut others = Vec::new();
        for row in 0..rows {
            let ask = Ask::floats(echo, &vec![row as f32; 1 + row as usize * 3]);
            let raw = if row % 2 == 0 { &mut one } else { &mut two };
            others.push((row % 2, raw.ask(&ask)));
            members.push((row % 2, raw.ask(&ask.compose(tag, rows))));
        }
        let mut batch = None;
        for (at, raw) in [(0, &mut one), (1, &mut two)] {
            let expected = members.iter().chain(&others).filter(|(whose, _)| *whose == at).count();
            for _ in 0..expected {
                let event = raw.recv();
                let key = (at, event.ends().expect("an end"));
                let (result, _) = event.expect_result();
                if members.contains(&key) {
                    assert_eq!(SealReason::from_number(result.seal_reason), Some(SealReason::Composed));
                    assert_eq!(result.batch_rows, rows, "tag {tag}");
                    assert_eq!(*batch.get_or_insert(result.batch), result.batch, "tag {tag}");
                } else {
                    assert_ne!(SealReason::from_number(result.seal_reason), Some(SealReason::Composed));
                }
            }
        }
    }
    let ask = Ask::floats(echo, &[1.0]);
    one.round(&ask.clone().compose(99, 65)).expect_error(Code::InvalidArgument);
    one.round(&ask.compose(99, 0)).expect_error(Code::InvalidArgument);
    server.wait_until_at_rest();
}

#[test]
fn statistics_over_the_wire_and_on_the_control_port_tell_the_same() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    for _ in 0..10 {
        raw.round(&Ask::floats(echo, &[1.0])).expect_result();
    }
    let id = raw.take_id();
    raw.send(&crate::common::bare_frame(ferry::wire::Kind::Stats, id));
    let Event::Stats(stats) = raw.recv() else { panic!("expected statistics") };
    assert_eq!(stats["accepted"], 10);
    assert_eq!(stats["outcomes"]["ok"], 10);
    let page = crate::common::get(server.control, "/metrics");
    assert_eq!(crate::common::metric(&page, "ferry_requests_finished_total", &["code=\"ok\"", "model=\"echo\""]), 10.0);
    assert_eq!(crate::common::metric(&page, "ferry_batches_total", &["model=\"echo\""]), 10.0);
}

#[test]
fn a_text_gets_the_answer_of_its_ids() {
    let server = Server::shared();
    let mut raw = server.connect();
    let (text, ids) = (raw.handle("tiny_text"), raw.handle("tiny_bert"));
    let as_ids = |ids_of: &[u32]| Ask::new(ids, DType::U32, &[1, ids_of.len() as u32], bytemuck::cast_slice(ids_of));
    for (words, expected) in [("w5", &[5][..]), ("w1 w2 w98", &[1, 2, 98]), ("w7  unheard\tw7", &[7, 0, 7])] {
        let (_, from_text) = raw.round(&Ask::text(text, 1, words.as_bytes())).expect_result();
        let (_, from_ids) = raw.round(&as_ids(expected)).expect_result();
        for (a, b) in floats_of(&from_text).iter().zip(floats_of(&from_ids)) {
            assert!((a - b).abs() < 1e-5, "{words}: {a} from text, {b} from ids");
        }
    }
    // The same model takes ids too.
    raw.round(&Ask { model: text, ..as_ids(&[1, 2]) }).expect_result();
}

#[test]
fn a_text_that_does_not_fit_is_refused_or_cut_as_the_caller_says() {
    use ferry::wire::message::{INFER_TRUNCATE, RESULT_TRUNCATED};
    let server = Server::shared();
    let mut raw = server.connect();
    let text = raw.handle("tiny_text");
    let ask = |bytes: &[u8]| Ask::text(text, 1, bytes);
    raw.round(&ask(b"")).expect_error(Code::InvalidArgument);
    raw.round(&ask(b"  \n ")).expect_error(Code::InvalidArgument);
    raw.round(&ask(b"w1 \xff\xfe")).expect_error(Code::InvalidArgument);
    raw.round(&ask(&[b'a'; 513])).expect_error(Code::TooLarge);
    raw.round(&Ask::text(text, 0, b"w1")).expect_error(Code::InvalidArgument);
    let mut lying = ask(b"w1 w2");
    lying.payload[0] = 200;
    raw.round(&lying).expect_error(Code::InvalidArgument);
    let long = "w3 ".repeat(65);
    let refusal = raw.round(&ask(long.as_bytes())).expect_error(Code::TooLarge);
    assert!(refusal.message.contains("64") && refusal.message.contains("65"), "{}", refusal.message);
    let mut cut = ask(long.as_bytes());
    cut.infer.flags |= INFER_TRUNCATE;
    let (result, of_cut) = raw.round(&cut).expect_result();
    assert_eq!(result.flags & RESULT_TRUNCATED, RESULT_TRUNCATED);
    let (result, of_64) = raw.round(&ask("w3 ".repeat(64).as_bytes())).expect_result();
    assert_eq!(result.flags & RESULT_TRUNCATED, 0);
    for (a, b) in floats_of(&of_cut).iter().zip(floats_of(&of_64)) {
        assert!((a - b).abs() < 1e-5);
    }
}

#[test]
fn more_connections_than_allowed_are_told_so_and_places_become_free() {
    let server = Server::start(&["frontend.connections_max=3"]);
    let mut held: Vec<Raw> = (0..3).map(|_| server.connect()).collect();
    let mut beyond = Raw::connect(server.data);
    beyond.recv().expect_goaway(Code::Overloaded);
    assert!(matches!(beyond.recv(), Event::End));
    held.iter_mut().for_each(Raw::ping);
    held.pop();
    wait_until("a place is free", || {
        let mut raw = Raw::connect(server.data);
        let _ = std::io::Write::write_all(&mut raw.stream, &crate::common::hello_frame());
        matches!(raw.recv(), Event::HelloAck(_))
    });
}

#[test]
fn a_silent_connection_is_closed_and_one_that_waits_for_its_answer_is_not() {
    let server = Server::start(&["frontend.hello_timeout_ms=100", "frontend.idle_timeout_ms=100"]);
    let mut silent = server.connect();
    let mut waiting = server.connect();
    let faulty = waiting.handle("faulty");
    let id = waiting.ask(&Ask::word(faulty, 1500));
    silent.recv().expect_goaway(Code::ProtocolError);
    assert!(matches!(silent.recv(), Event::End));
    let event = waiting.recv();
    assert_eq!(event.ends(), Some(id), "it was silent for longer than is allowed, but it waited");
    event.expect_result();
}

/// Goal: each row once, as its batch is done, and one end. Method: rows that fit four batches beside small requests, by the client
/// and by frames; some are given up half way.
#[test]
fn a_request_can_be_answered_item_by_item() {
    let server = Server::start(&[]);
    let client = Client::connect(server.data, ClientOptions::default()).expect("connects");
    let values = |seed: u32, count: u32| -> Vec<f32> { (0..count).map(|at| (seed * 100_000 + at) as f32).collect() };
    for seed in 0..6 {
        let (rows, len) = if seed % 2 == 0 { (60, 1000) } else { (1 + seed, 900) };
        let sent = values(seed, rows * len);
        let request = Request::new("queued").input("values", &[rows, len], &sent).timings();
        let mut got = vec![None; rows as usize];
        let mut items = 0;
        for item in client.infer_items(&request).expect("is sent") {
            let item = item.expect("no row fails");
            let rows = item.response.output::<f32>("values").expect("the contract's output");
            for (at, row) in rows.chunks(len as usize).enumerate() {
                let place = &mut got[item.at_row as usize + at];
                assert!(place.replace(row.to_vec()).is_none(), "a row comes once");
            }
            items += 1;
        }
        assert_eq!(items, if rows == 60 { 4 } else { 1 });
        let got: Vec<f32> = got.into_iter().flat_map(|row| row.expect("every row came")).collect();
        assert!(got == sent, "rows of others");
    }
    // Frames: items, then a result that has nothing but what is said about the whole.
    let mut raw = server.connect();
    let queued = raw.handle("queued");
    let bytes: Vec<u8> = values(9, 60_000).iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut ask = Ask::new(queued, DType::F32, &[60, 1000], &bytes).timings();
    ask.infer.flags |= INFER_ITEMS;
    let id = raw.ask(&ask);
    let mut rows = 0;
    let result = loop {
        match raw.recv() {
            Event::Item { id: of, item, payload } => {
                assert_eq!((of, item.result.timings), (id, None));
                let dims = &item.result.outputs[0].dims;
                rows += dims[0];
                let at = item.at_row as usize * 4000;
                assert!(payload == bytes[at..at + dims[0] as usize * 4000], "rows {} on", item.at_row);
            }
            other => break other.expect_result(),
        }
    };
    assert_eq!((rows, result.0.outputs.len(), result.1.len()), (60, 0, 0));
    assert!(result.0.timings.is_some());
    // Whoever has enough leaves: what is left is cancelled, and nobody is owed anything.
    let request = Request::new("queued").input("values", &[60, 1000], &values(3, 60_000));
    let mut some = client.infer_items(&request).expect("is sent");
    some.next().expect("a first item").expect("no row fails");
    drop(some);
    let request = Request::new("nobody").input("values", &[1, 1], &[0.0_f32]);
    assert!(client.infer_items(&request).is_err(), "no such model");
    server.wait_until_at_rest();
}

#[test]
fn a_request_of_more_rows_than_fit_a_batch_is_run_in_parts_and_answered_whole() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let queued = raw.handle("queued");
    // 16 rows of 1,000 fit a batch; these need four, and share them with others.
    let values = |seed: u32, count: u32| -> Vec<u8> {
        (0..count).flat_map(|at| (seed * 1_000_000 + at).to_le_bytes()).collect()
    };
    let mut sent = Vec::new();
    for seed in 0..20 {
        let (rows, len) = if seed % 4 == 0 { (60, 1000) } else { (1 + seed % 5, 700 + seed) };
        let payload = values(seed, rows * len);
        let id = raw.ask(&Ask::new(queued, DType::F32, &[rows, len], &payload));
        sent.push((id, [rows, len], payload));
    }
    for _ in 0..sent.len() {
        let event = raw.recv();
        let id = event.ends().expect("an end");
        let (_, dims, payload) = sent.iter().find(|(sent, ..)| *sent == id).expect("it was asked");
        let (result, answer) = event.expect_result();
        assert_eq!(result.outputs[0].dims[..], dims[..]);
        assert!(answer == *payload, "request {id} got other rows than it sent");
    }
    server.wait_until_at_rest();
    assert_eq!(server.metric("ferry_late_answers_total", &[]), 0.0);
    assert!(server.metric("ferry_batches_total", &["model=\"queued\""]) >= 5.0 * 4.0);
}
