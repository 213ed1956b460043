//! A server that is scripted frame by frame: a thread with a blocking socket that says what it expects next, so the order
//! of events is fixed without a pause anywhere.

#![allow(dead_code)] // each test file uses its own part

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;

use ferry::vocab::{Code, ModelHandle, Refusal};
use ferry::wire::decoder::Step;
use ferry::wire::encoder::{Head, append_frame};
use ferry::wire::message::{
    Description, ErrorMessage, Goaway, Hello, HelloAck, Infer, InferResult, Timings, decode_exact,
};
use ferry::wire::{Decoder, Kind, Limits};

#[path = "../../benches/support/bare_server.rs"]
pub mod bare_server;

use bare_server::echo_contract;

/// One frame as the scripted server saw it.
pub struct Seen {
    pub kind: Kind,
    pub id: u64,
    pub metadata: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Seen {
    pub fn infer(&self) -> Infer {
        decode_exact(&self.metadata).expect("an infer's metadata")
    }
}

/// The server's end of a connection.
pub struct Peer {
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

impl Peer {
    pub fn new(stream: TcpStream) -> Peer {
        Peer { stream, buffer: Vec::new() }
    }

    /// The next frame; `None` when the client closed the connection.
    pub fn next(&mut self) -> Option<Seen> {
        loop {
            let decoder = Decoder::new(Limits::DEFAULT);
            if let Step::Frame(frame) = decoder.next(&self.buffer).expect("clients send valid frames") {
                assert!(frame.payload_is_intact(&self.buffer));
                let seen = Seen {
                    kind: frame.kind,
                    id: frame.header.request_id,
                    metadata: frame.metadata(&self.buffer).to_vec(),
                    payload: frame.payload(&self.buffer).to_vec(),
                };
                self.buffer.drain(..frame.len);
                return Some(seen);
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(count) if count > 0 => self.buffer.extend_from_slice(&chunk[..count]),
                _ => return None,
            }
        }
    }

    pub fn expect(&mut self, kind: Kind) -> Seen {
        let seen = self.next().unwrap_or_else(|| panic!("expected {kind:?}, the client closed"));
        assert_eq!(seen.kind, kind);
        seen
    }

    pub fn send(&mut self, kind: Kind, id: u64, metadata: &impl bincode::Encode, payload: &[u8]) {
        let mut out = Vec::new();
        let head = Head { kind, model: ModelHandle(0), request_id: id };
        append_frame(&mut out, head, metadata, payload).expect("small");
        self.stream.write_all(&out).expect("the client reads");
    }

    pub fn greet(&mut self, credit_requests: u32) {
        let hello = self.expect(Kind::Hello);
        let hello: Hello = decode_exact(&hello.metadata).expect("a hello");
        assert_eq!((hello.version_min, hello.version_max), (1, 1));
        let ack = HelloAck {
            version: 1,
            features: 0,
            server: "scripted".into(),
            metadata_bytes_max: 4096,
            payload_bytes_max: 2 << 20,
            credit_requests,
            credit_bytes: 64 << 20,
        };
        self.send(Kind::HelloAck, 0, &ack, &[]);
    }

    /// Greets and answers the describe that comes before the first request.
    pub fn open(&mut self, credit_requests: u32) {
        self.greet(credit_requests);
        self.describe();
    }

    pub fn describe(&mut self) {
        let describe = self.expect(Kind::Describe);
        let contract = echo_contract();
        let description = Description { handle: 0, contract_hash: contract.hash() };
        let json = serde_json::to_vec(&contract).expect("plain data");
        self.send(Kind::Description, describe.id, &description, &json);
    }

    pub fn answer(&mut self, seen: &Seen) {
        let result = InferResult {
            batch: 7,
            batch_rows: 3,
            outputs: seen.infer().inputs,
            timings: Some(Timings { run_ns: 5, ..Timings::default() }),
            ..InferResult::default()
        };
        self.send(Kind::Result, seen.id, &result, &seen.payload);
    }

    pub fn refuse(&mut self, id: u64, refusal: &Refusal) {
        self.send(Kind::Error, id, &ErrorMessage::from_refusal(refusal), &[]);
    }

    pub fn goaway(&mut self, code: Code, last_accepted_id: u64) {
        let goaway =
            Goaway { code: code as u16, last_accepted_id, version_min: 1, version_max: 1, message: "bye".into() };
        self.send(Kind::Goaway, 0, &goaway, &[]);
    }
}

/// Runs `script` for the first connection. Join the handle to see its assertions.
pub fn scripted(script: impl FnOnce(Peer) + Send + 'static) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = listener.local_addr().expect("bound");
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a client comes");
        script(Peer::new(stream));
    });
    (addr, thread)
}
