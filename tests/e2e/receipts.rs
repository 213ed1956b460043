//! What a reply says about its own making: receipts, and the generation of the policy behind them.

use serde_json::json;

use ferry::client::{Client, ClientOptions, Request};
use ferry::vocab::{DType, Layout, SealReason};
use ferry::wire::message::{INFER_ITEMS, INFER_RECEIPT, InferResult, Receipt};

use crate::common::{Ask, Event, Server, control, models_directory, wait_until};

fn with_receipt(mut ask: Ask) -> Ask {
    ask.infer.flags |= INFER_RECEIPT;
    ask
}

/// The receipt of a result, whose parts add up.
fn receipt_of(result: &InferResult) -> Receipt {
    let receipt = **result.receipt.as_ref().expect("asked for");
    let timings = result.timings.expect("it comes with the receipt");
    assert_eq!(receipt.held_ns + receipt.behind_ns + receipt.other_ns, timings.queue_ns, "{receipt:?}");
    assert!(receipt.upload_ns <= timings.wait_ns && receipt.readback_ns <= timings.run_ns, "{receipt:?}");
    assert!(receipt.cells_own_padding <= receipt.cells_padded - receipt.cells_real, "{receipt:?}");
    receipt
}

#[test]
fn a_receipt_says_who_shared_the_batch_and_what_was_padding() {
    let models = models_directory();
    let manifest = models.path().join("queued/model.toml");
    let text = std::fs::read_to_string(&manifest).expect("reads the manifest");
    let padded = text.replace("[batching]\n", "[batching]\nlayout = \"padded\"\npad_to = \"bucket\"\n");
    std::fs::write(&manifest, padded).expect("writes the manifest");
    let server = Server::start_in(models, &[], Default::default());
    let mut raw = server.connect();
    let queued = raw.handle("queued");
    let (result, _) = raw.round(&Ask::floats(queued, &[1.0]).timings()).expect_result();
    assert_eq!(result.receipt, None, "nobody asked for it");
    let mut late = with_receipt(Ask::floats(queued, &[1.0]));
    late.infer.late_us = 1234;
    assert_eq!(receipt_of(&raw.round(&late).expect_result().0).late_us, 1234);
    let lens = [10u32, 1, 4];
    let ask = |len: u32| with_receipt(Ask::floats(queued, &vec![0.5; len as usize])).compose(8101, 3);
    let ids: Vec<u64> = lens.iter().map(|len| raw.ask(&ask(*len))).collect();
    let mut paddings = 0;
    for _ in &ids {
        let event = raw.recv();
        let at = ids.iter().position(|id| event.ends() == Some(*id)).expect("one of these");
        let (result, _) = event.expect_result();
        let receipt = receipt_of(&result);
        let others: Vec<u32> = (0..3).filter(|other| *other != at).map(|other| lens[other]).collect();
        assert_eq!((receipt.co_members, &receipt.co_lens[..]), (2, &others[..]));
        assert_eq!((receipt.rows, receipt.len, result.batch_rows), (1, lens[at], 3));
        assert_eq!((receipt.layout, receipt.cells_real), (Layout::Padded as u8, 15));
        assert_eq!(receipt.cells_padded, 3 * u64::from(result.padded_len));
        assert_eq!(receipt.cells_own_padding, u64::from(result.padded_len - lens[at]));
        assert_eq!(result.seal_reason, SealReason::Composed as u8);
        // It waited for the others, not for the policy.
        assert_eq!(receipt.held_ns, 0, "{receipt:?}");
        paddings += receipt.cells_own_padding;
    }
    assert_eq!(paddings, 3 * 16 - 15, "each padding cell is behind somebody's rows");
}

#[test]
fn who_came_while_the_executor_ran_something_else_is_told_so() {
    let server = Server::start(&["executor.slots=1"]);
    let mut raw = server.connect();
    let sleep = raw.handle("sleep");
    let before = server.metric("ferry_batches_total", &["model=\"sleep\""]);
    let first = raw.ask(&with_receipt(Ask::word(sleep, 60_000)));
    wait_until("it runs", || server.metric("ferry_batches_total", &["model=\"sleep\""]) == before + 1.0);
    let second = raw.ask(&with_receipt(Ask::word(sleep, 0)));
    let mut receipts = Vec::new();
    for id in [first, second] {
        let event = raw.recv();
        assert_eq!(event.ends(), Some(id));
        receipts.push(receipt_of(&event.expect_result().0));
    }
    assert_eq!(receipts[0].behind_ns, 0, "nothing ran before it");
    assert!(receipts[1].behind_ns > 0 && receipts[1].other_ns == 0, "{:?}", receipts[1]);
}

#[test]
fn a_request_in_parts_has_the_receipt_of_its_last_and_items_have_none() {
    let server = Server::shared();
    let client = Client::connect(server.data, ClientOptions::default()).expect("connects");
    let (rows, len) = (60, 1000);
    let sent = vec![0.25f32; (rows * len) as usize];
    let request = Request::new("queued").input("values", &[rows, len], &sent).receipt();
    let response = client.infer(&request).expect("is answered");
    let receipt = response.receipt().expect("asked for");
    assert!(receipt.rows > 0 && receipt.rows < rows, "one of its parts: {receipt:?}");
    assert_eq!((receipt.len, response.rows()), (len, rows));
    assert_eq!(receipt.held_ns + receipt.behind_ns + receipt.other_ns, response.timings().expect("too").queue_ns);
    let mut raw = server.connect();
    let queued = raw.handle("queued");
    let bytes: &[u8] = bytemuck::cast_slice(&sent);
    let mut ask = with_receipt(Ask::new(queued, DType::F32, &[rows, len], bytes));
    ask.infer.flags |= INFER_ITEMS;
    let id = raw.ask(&ask);
    let mut items = 0;
    let (end, _) = loop {
        match raw.recv() {
            Event::Item { id: of, item, .. } => {
                assert_eq!((of, item.result.receipt, item.result.timings), (id, None, None));
                items += 1;
            }
            other => break other.expect_result(),
        }
    };
    assert!(items > 1);
    assert!(receipt_of(&end).rows < rows);
}

/// What a receipt does not have is the way there and back: sockets, and the wake-ups of both ends. How long that is, is printed and
/// not asserted: `cargo nextest run --no-capture -E 'test(way_there)'`.
#[test]
fn what_a_caller_sees_is_its_receipt_and_the_way_there_and_back() {
    let server = Server::shared();
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    let ask = with_receipt(Ask::floats(echo, &[1.0; 64]));
    let mut ways: Vec<u64> = (0..500)
        .map(|_| {
            let sent_at = ferry::clock::now();
            let (result, _) = raw.round(&ask).expect_result();
            let seen = ferry::clock::now().since(sent_at).as_nanos() as u64;
            receipt_of(&result);
            let inside = result.timings.expect("it comes with the receipt").total_ns();
            assert!(inside <= seen, "{inside} ns in the server, {seen} ns as seen from here");
            seen - inside
        })
        .collect();
    ways.sort_unstable();
    println!("seen minus receipt: least {} ns, median {} ns, 90 % {} ns", ways[0], ways[250], ways[450]);
}

#[test]
fn every_reply_names_the_generation_of_the_policy_that_decided_its_batch() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let (queued, echo) = (raw.handle("queued"), raw.handle("echo"));
    let generation = |raw: &mut crate::common::Raw, model| {
        let (result, _) = raw.round(&Ask::floats(model, &[1.0])).expect_result();
        result.generation
    };
    assert_eq!((generation(&mut raw, queued), generation(&mut raw, echo)), (1, 1));
    for (rows_max, expected) in [(16, 2), (8, 3)] {
        let body = json!({ "set": { "rows_max": rows_max } }).to_string();
        let (status, changed) = control(server.control, "PATCH", "/v1/models/queued/policy", "", &body);
        assert_eq!((status, &changed["generation"]), (200, &json!(expected)), "{changed}");
        assert_eq!(generation(&mut raw, queued), expected);
    }
    assert_eq!(generation(&mut raw, echo), 1, "another model's policy is as it was");
    let client = Client::connect(server.data, ClientOptions::default()).expect("connects");
    let request = Request::new("queued").input("values", &[1, 1], &[2.0f32]);
    assert_eq!(client.infer(&request).expect("is answered").generation(), 3);
}
