//! Requests that are well framed and ask for something that is not there or does not fit (F18 to F26).

use ferry::vocab::{Code, DType, Executed, ModelHandle, Retry};
use ferry::wire::message::{List, TensorMeta};

use crate::common::{Ask, Event, Raw, Server, describe_frame, floats_of};

#[test]
fn an_unknown_model_is_not_found_under_any_spelling_and_no_file_is_named() {
    let server = Server::shared();
    let mut raw = server.connect();
    let long = "x".repeat(3000);
    for name in
        ["nobody", "..", "../echo", "echo/../echo", "/etc/passwd", "echo\0", "Echo", "é", "\u{1b}[31m", "a\nb", &long]
    {
        let id = raw.take_id();
        raw.send(&describe_frame(id, name, ""));
        let event = raw.recv();
        assert_eq!(event.ends(), Some(id));
        let refusal = event.expect_error(Code::NotFound);
        assert!(refusal.message.len() < 400, "a name is cut before it is repeated: {}", refusal.message.len());
        assert!(!refusal.message.chars().any(char::is_control), "a name is escaped: {:?}", refusal.message);
        assert!(!refusal.message.contains("model.toml"), "{}", refusal.message);
    }
    let id = raw.take_id();
    raw.send(&describe_frame(id, "echo", "77"));
    raw.recv().expect_error(Code::NotFound);
    for handle in [200, u16::MAX] {
        raw.round(&Ask::floats(ModelHandle(handle), &[1.0])).expect_error(Code::NotFound);
    }
    raw.ping();
}

#[test]
fn the_list_of_models_has_every_model_with_the_handle_that_describes_it() {
    let server = Server::shared();
    let mut raw = server.connect();
    let id = raw.take_id();
    raw.send(&describe_frame(id, "", ""));
    let Event::Description { json, .. } = raw.recv() else { panic!("expected the list") };
    let models = json["models"].as_array().expect("a list").clone();
    let names: Vec<&str> = models.iter().map(|model| model["name"].as_str().expect("a name")).collect();
    assert_eq!(names, ["digits", "echo", "faulty", "queued", "sleep", "tiny_bert", "tiny_text"]);
    for model in &models {
        let handle = raw.handle(model["name"].as_str().expect("a name"));
        assert_eq!(model["handle"], handle.0);
    }
}

/// Each ask is refused with `code`, never executed, and what follows on the connection is answered.
#[track_caller]
fn refused(raw: &mut Raw, ask: &Ask, code: Code, part: &str) {
    let refusal = raw.round(ask).expect_error(code);
    assert_eq!((refusal.executed, refusal.retry), (Executed::Never, Retry::No), "{}", refusal.message);
    assert!(refusal.message.contains(part), "expected {part:?} in {:?}", refusal.message);
}

#[test]
fn a_dtype_that_the_contract_does_not_have_is_refused_naming_both() {
    let server = Server::shared();
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    for dtype in DType::ALL.into_iter().filter(|dtype| *dtype != DType::F32) {
        refused(&mut raw, &Ask::new(echo, dtype, &[1, 1], &[0; 4]), Code::InvalidArgument, "expected dtype f32, got");
    }
    let mut ask = Ask::floats(echo, &[0.0]);
    ask.infer.inputs = List::from_slice(&[TensorMeta { dtype: 77, ..ask.infer.inputs[0] }]).expect("one");
    refused(&mut raw, &ask, Code::InvalidArgument, "unknown dtype 77");
}

#[test]
fn shapes_that_do_not_fit_are_refused_also_where_their_product_wraps() {
    let server = Server::shared();
    let mut raw = server.connect();
    let (echo, digits) = (raw.handle("echo"), raw.handle("digits"));
    let floats = |model, dims: &[u32]| Ask::new(model, DType::F32, dims, &[0; 16]);
    use Code::{InvalidArgument, TooLarge};
    refused(&mut raw, &floats(echo, &[]), InvalidArgument, "expected shape");
    refused(&mut raw, &floats(echo, &[1]), InvalidArgument, "expected shape");
    refused(&mut raw, &floats(echo, &[1, 2, 2]), InvalidArgument, "expected shape");
    refused(&mut raw, &floats(echo, &[1; 8]), InvalidArgument, "expected shape");
    refused(&mut raw, &floats(echo, &[0, 4]), InvalidArgument, "rows, got 0");
    refused(&mut raw, &floats(echo, &[65, 4]), TooLarge, "rows, got 65");
    refused(&mut raw, &floats(echo, &[1, 0]), InvalidArgument, "got 0");
    refused(&mut raw, &floats(echo, &[1, 1025]), TooLarge, "got 1025");
    refused(&mut raw, &floats(echo, &[1, u32::MAX]), TooLarge, "got 4294967295");
    refused(&mut raw, &floats(echo, &[u32::MAX, u32::MAX]), TooLarge, "rows, got 4294967295");
    // 2^16 × 2^16 × 4 bytes is 0 in 32 bits, 2^31 × 2^31 × 4 is 0 in 64.
    refused(&mut raw, &floats(echo, &[1 << 16, 1 << 16]), TooLarge, "rows, got 65536");
    refused(&mut raw, &floats(echo, &[1 << 31, 1 << 31]), TooLarge, "rows, got 2147483648");
    refused(&mut raw, &floats(digits, &[1, 8, 1 << 31]), InvalidArgument, "expected shape");
    refused(&mut raw, &floats(digits, &[1, 1 << 16, 1 << 16]), InvalidArgument, "expected shape");
    // Rows and length are each allowed here, together they are more than a batch.
    let big = vec![0; 64 * 1024 * 4];
    // More cells than a batch holds: run in parts, answered as one.
    let (result, payload) = raw.round(&Ask::new(echo, DType::F32, &[64, 1024], &big)).expect_result();
    assert_eq!(result.outputs[0].dims[..], [64, 1024]);
    assert!(payload == big, "the rows come back in their order");
    raw.ping();
}

#[test]
fn as_many_inputs_as_the_contract_has_are_expected_in_its_order() {
    let server = Server::shared();
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    let one = Ask::floats(echo, &[1.0]);
    let tensor = one.infer.inputs[0];
    for inputs in [&[][..], &[tensor, tensor], &[tensor; 8]] {
        let mut ask = one.clone();
        ask.infer.inputs = List::from_slice(inputs).expect("at most 8");
        refused(&mut raw, &ask, Code::InvalidArgument, "expected 1 input");
    }
    let mut ask = one.clone();
    ask.infer.inputs = List::from_slice(&[TensorMeta { index: 1, ..tensor }]).expect("one");
    refused(&mut raw, &ask, Code::InvalidArgument, "");
    let mut ask = one.clone();
    ask.infer.flags = 0x80;
    refused(&mut raw, &ask, Code::InvalidArgument, "request flags");
    raw.round(&one).expect_result();
}

#[test]
fn a_payload_of_another_size_than_its_shape_says_is_refused() {
    let server = Server::shared();
    let mut raw = server.connect();
    let echo = raw.handle("echo");
    // One row of 3 values is 12 bytes, or 16 with the padding behind it.
    for len in (0..40).filter(|len| ![12, 16].contains(len)) {
        let ask = Ask::new(echo, DType::F32, &[1, 3], &vec![0; len]);
        refused(
            &mut raw,
            &ask,
            Code::InvalidArgument,
            &format!("expected 12 payload bytes for 1 row(s) of length 3, got {len}"),
        );
    }
    for len in [12, 16] {
        let (_, payload) = raw.round(&Ask::new(echo, DType::F32, &[1, 3], &vec![1; len])).expect_result();
        assert_eq!(payload, [1; 12]);
    }
}

#[test]
fn a_token_id_beyond_the_vocabulary_is_refused_before_it_reaches_the_model() {
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let bert = raw.handle("tiny_bert");
    let ids = |ids: &[u32]| Ask::new(bert, DType::U32, &[1, ids.len() as u32], bytemuck::cast_slice(ids));
    for id in [100, 1 << 31, u32::MAX] {
        for at in 0..3 {
            let mut row = [5, 6, 7];
            row[at] = id;
            refused(&mut raw, &ids(&row), Code::InvalidArgument, &id.to_string());
        }
    }
    assert_eq!(server.metric("ferry_batches_total", &["model=\"tiny_bert\""]), 0.0);
    let (_, payload) = raw.round(&ids(&[99])).expect_result();
    assert_eq!(payload.len(), 32 * 4);
}

#[test]
fn a_row_of_length_0_is_refused_and_the_shortest_is_answered_like_among_long_mates() {
    // A row is masked by its length alone, and length 0 is refused: no request can be a fully masked row.
    let server = Server::start(&[]);
    let mut raw = server.connect();
    let bert = raw.handle("tiny_bert");
    let ids = |ids: &[u32]| Ask::new(bert, DType::U32, &[1, ids.len() as u32], bytemuck::cast_slice(ids));
    refused(&mut raw, &ids(&[]), Code::InvalidArgument, "got 0");
    let (_, alone) = raw.round(&ids(&[42])).expect_result();
    let short = raw.ask(&ids(&[42]).compose(5, 2));
    let long = raw.ask(&ids(&[7; 64]).compose(5, 2));
    let mut among = None;
    for _ in [short, long] {
        let event = raw.recv();
        let id = event.ends();
        let (result, payload) = event.expect_result();
        assert_eq!((result.batch_rows, result.padded_len), (2, 64));
        assert!(floats_of(&payload).iter().all(|value| value.is_finite()));
        if id == Some(short) {
            among = Some(payload);
        }
    }
    let among = among.expect("both were answered");
    for (a, b) in floats_of(&alone).iter().zip(floats_of(&among)) {
        assert!((a - b).abs() < 1e-5, "{a} alone, {b} among longer rows");
    }
}

#[test]
fn any_bits_pass_through_a_contract_that_allows_them_and_none_through_one_that_does_not() {
    let server = Server::shared();
    let mut raw = server.connect();
    let (echo, digits) = (raw.handle("echo"), raw.handle("digits"));
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE / 2.0, -0.0, f32::from_bits(0x7FA0_0001)];
    let ask = Ask::floats(echo, &odd);
    assert_eq!(raw.round(&ask).expect_result().1, ask.payload);
    let mut image = [1.0f32; 64];
    image[63] = f32::NAN;
    let event = raw.round(&Ask::new(digits, DType::F32, &[1, 8, 8], bytemuck::cast_slice(&image)));
    // Refused at the door where the contract says so, else found in the output: never a number made of nothing.
    match event {
        Event::Error { refusal, .. } => {
            assert!(matches!(refusal.code, Code::InvalidArgument | Code::NonFiniteOutput), "{refusal}");
        }
        other => panic!("{other:?}"),
    }
}
