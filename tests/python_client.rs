//! tools/python_client.py against a server of a few lines, made of the wire alone.
//!
//! Goal: the written specification is enough for a client. Method: the Python file knows WIRE.md and nothing of this
//! crate; the server here checks every frame it sends and answers with fixed scores. Where there is no python3 the test
//! says so and passes. The last test asks the real server.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};

use ferry::contract::{Contract, Dim, NonFinite, TensorSpec};
use ferry::vocab::{Code, DType, ModelHandle, Refusal};
use ferry::wire::decoder::Step;
use ferry::wire::encoder::{Head, append_bare, append_frame};
use ferry::wire::message::{
    Credit, Describe, Description, ErrorMessage, Goaway, Hello, HelloAck, Infer, InferResult, List, TensorMeta,
    decode_exact,
};
use ferry::wire::{Decoder, Kind, Limits};

const HANDLE: u16 = 3;

fn digits(shape: &[u32]) -> Contract {
    let tensor = |name: &str, shape: &[u32]| TensorSpec {
        name: name.into(),
        dtype: DType::F32,
        shape: shape.iter().map(|dim| Dim::Fixed(*dim)).collect(),
        pad: 0.0,
        range: None,
        nonfinite: NonFinite::Refuse,
    };
    Contract {
        name: "digits".into(),
        version: "1".into(),
        architecture: "digits".into(),
        inputs: vec![tensor("image", shape)],
        outputs: vec![tensor("logits", &[10])],
        length: None,
        text: None,
        rows_max: 4,
    }
    .checked()
    .expect("a sound contract")
}

/// What the server does with the infer.
#[derive(Clone, Copy)]
enum Answer {
    Scores([f32; 10]),
    Refuse,
    Leave,
}

/// Serves one connection to its end. Returns the pixels that came, if any.
fn serve(mut stream: TcpStream, contract: &Contract, answer: Answer) -> Vec<f32> {
    let (mut buffer, mut pixels) = (Vec::new(), Vec::new());
    loop {
        let frame = match Decoder::new(Limits::DEFAULT).next(&buffer).expect("the client keeps to the page") {
            Step::Frame(frame) => frame,
            step => {
                let mut piece = [0; 7]; // small, so that frames come in pieces
                let count = stream.read(&mut piece).expect("the client is there");
                assert!(count > 0 || buffer.is_empty(), "the client left in the middle of a frame: {step:?}");
                buffer.extend_from_slice(&piece[..count]);
                if count == 0 {
                    return pixels;
                }
                continue;
            }
        };
        assert!(frame.payload_is_intact(&buffer));
        let (metadata, payload) = (frame.metadata(&buffer), frame.payload(&buffer));
        let head = |kind| Head { kind, model: frame.header.model, request_id: frame.header.request_id };
        let mut out = Vec::new();
        match frame.kind {
            Kind::Hello => {
                let hello: Hello = decode_exact(metadata).expect("a hello");
                assert_eq!((hello.version_min, hello.version_max, hello.features), (1, 1, 0));
                let server = "größer/0".to_owned();
                let ack = HelloAck {
                    version: 1,
                    features: 0,
                    server,
                    metadata_bytes_max: 4096,
                    payload_bytes_max: 1 << 24,
                    credit_requests: 1,
                    credit_bytes: 1 << 20,
                };
                append_frame(&mut out, Head::control(Kind::HelloAck), &ack, &[])
            }
            Kind::Describe => {
                let asked: Describe = decode_exact(metadata).expect("a describe");
                assert_eq!((asked.model.as_str(), asked.version.as_str()), ("digits", ""));
                let description = Description { handle: HANDLE, contract_hash: contract.hash() };
                append_frame(
                    &mut out,
                    head(Kind::Description),
                    &description,
                    &serde_json::to_vec(contract).expect("data"),
                )
            }
            Kind::Infer => {
                assert_eq!(frame.header.model, ModelHandle(HANDLE));
                let infer: Infer = decode_exact(metadata).expect("an infer");
                let checked = contract.check(&infer, payload).expect("the client keeps to the contract");
                assert_eq!(checked.rows, 1);
                pixels = payload.chunks(4).map(|four| f32::from_le_bytes(four.try_into().expect("4"))).collect();
                // A frame that the client did not ask for, to be passed over.
                append_frame(&mut out, Head::control(Kind::Credit), &Credit { requests: 2, bytes: 1 << 20 }, &[])
                    .expect("small");
                match answer {
                    Answer::Scores(scores) => {
                        let dims = List::from_slice(&[1, 10]).expect("two");
                        let tensor = TensorMeta { index: 0, dtype: DType::F32 as u8, dims };
                        let outputs = List::from_slice(&[tensor]).expect("one");
                        let result = InferResult { outputs, ..InferResult::default() };
                        let bytes: Vec<u8> = scores.iter().flat_map(|score| score.to_le_bytes()).collect();
                        append_frame(&mut out, head(Kind::Result), &result, &bytes)
                    }
                    Answer::Refuse => {
                        let refusal = ErrorMessage::from_refusal(&Refusal::new(Code::Overloaded, "the queue is full"));
                        append_frame(&mut out, head(Kind::Error), &refusal, &[])
                    }
                    Answer::Leave => {
                        let message = "the server is shutting down".to_owned();
                        let code = Code::Draining as u16;
                        let goaway = Goaway { code, last_accepted_id: 0, version_min: 1, version_max: 1, message };
                        append_frame(&mut out, Head::control(Kind::Goaway), &goaway, &[])
                    }
                }
            }
            other => panic!("the client sent {other:?}"),
        }
        .expect("small messages");
        append_bare(&mut out, Head::control(Kind::Pong)); // nor for this one
        stream.write_all(&out).expect("the client is there");
        buffer.drain(..frame.len);
    }
}

/// Runs the client against a server that does `answer`. `None` without a python3.
fn run(shape: &[u32], answer: Answer, args: &[&str]) -> Option<(Output, Vec<f32>)> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = listener.local_addr().expect("it is bound").to_string();
    let contract = digits(shape);
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("the client connects");
        serve(stream, &contract, answer)
    });
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/python_client.py");
    match Command::new("python3").arg(script).args(["--addr", &addr]).args(args).output() {
        Ok(output) => Some((output, server.join().expect("the server found nothing wrong"))),
        Err(error) => {
            println!("not tested, python3 does not start: {error}");
            None
        }
    }
}

fn scores_for(digit: usize) -> [f32; 10] {
    let mut scores = [-1.5; 10];
    scores[digit] = 4.25;
    scores
}

#[test]
fn a_client_written_from_the_page_alone_gets_its_digit() {
    for shape in [&[8, 8][..], &[64], &[1, 8, 8]] {
        let Some((output, pixels)) = run(shape, Answer::Scores(scores_for(7)), &[]) else { return };
        assert_eq!(String::from_utf8_lossy(&output.stdout), "7\n", "{output:?}");
        assert!(output.status.success());
        assert_eq!(pixels.len(), 64);
        assert_eq!(pixels[..8], [0.0, 0.0, 7.0, 8.0, 13.0, 16.0, 15.0, 1.0]);
    }
}

#[test]
fn it_sends_the_image_of_a_file() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let rows: Vec<String> =
        (0..8).map(|row| (0..8).map(|at| format!("{}", row + at)).collect::<Vec<_>>().join(",")).collect();
    std::fs::write(file.path(), rows.join("\n") + "\n").expect("it can be written");
    let path = file.path().to_str().expect("a plain path");
    let Some((output, pixels)) = run(&[8, 8], Answer::Scores(scores_for(0)), &[path]) else { return };
    assert_eq!(String::from_utf8_lossy(&output.stdout), "0\n", "{output:?}");
    assert_eq!((pixels[0], pixels[1], pixels[63]), (0.0, 1.0, 14.0));
}

#[test]
fn it_says_what_the_server_said_when_it_is_refused() {
    for (answer, said) in [
        (Answer::Refuse, "refused with code 8: the queue is full\n"),
        (Answer::Leave, "refused with code 9: the server is shutting down\n"),
    ] {
        let Some((output, _)) = run(&[8, 8], answer, &[]) else { return };
        assert_eq!(String::from_utf8_lossy(&output.stderr), said);
        assert!(!output.status.success());
    }
}

#[test]
fn the_real_server_answers_it_with_the_digit_of_its_built_in_image() {
    let server = common::Server::start(&[]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/python_client.py");
    let output = match Command::new("python3").arg(script).args(["--addr", &server.data.to_string()]).output() {
        Ok(output) => output,
        Err(error) => return println!("not tested, python3 does not start: {error}"),
    };
    assert_eq!(String::from_utf8_lossy(&output.stdout), "7\n", "{output:?}");
    assert!(output.status.success());
    server.wait_until_at_rest();
}
