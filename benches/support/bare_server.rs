//! The least a server of this wire can be: one thread, epoll, echo. What it costs is what sockets and frames cost, so
//! the difference to `ferry serve` is what scheduling costs. Also the server that tests of the client talk to.
//!
//! Always true
//! - Everything one read brought is answered in one write.
//! - Requests are decoded and their checksums verified as by any server; nothing is queued, batched or limited.
//!
//! Not a part of the user's binary: included by path in benches and tests.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use ferry::contract::{Contract, Dim, Length, NonFinite, TensorSpec};
use ferry::vocab::{Code, DType, ModelHandle, Refusal};
use ferry::wire::decoder::Step;
use ferry::wire::encoder::{Head, append_bare, append_frame};
use ferry::wire::message::{Describe, Description, ErrorMessage, Goaway, HelloAck, Infer, InferResult, decode_exact};
use ferry::wire::{Decoder, Frame, Kind, Limits};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

const READ_SIZE: usize = 512 << 10;
const LISTENER: u64 = u64::MAX;

/// What the server grants, and how it misbehaves on request.
#[derive(Clone, Copy, Debug)]
pub struct BareOptions {
    pub credit_requests: u32,
    pub credit_bytes: u64,
    /// Changes one byte of every n-th result's payload, with a matching checksum: what only a comparison can find.
    pub corrupt_every: Option<u64>,
    /// Does not answer every n-th request.
    pub drop_every: Option<u64>,
    /// With the n-th request says goaway: it is the last one that is taken.
    pub goaway_at: Option<u64>,
    /// Refuses every request for so many milliseconds.
    pub refuse_for_ms: Option<u64>,
    /// What the contract says. Anything but `echo` makes the load generator compute references.
    pub architecture: &'static str,
}

impl Default for BareOptions {
    fn default() -> BareOptions {
        BareOptions {
            credit_requests: 4096,
            credit_bytes: 64 << 20,
            corrupt_every: None,
            drop_every: None,
            goaway_at: None,
            refuse_for_ms: None,
            architecture: "echo",
        }
    }
}

/// The one model: `echo` of any number of bytes.
pub fn echo_contract() -> Contract {
    let tensor = |name: &str| TensorSpec {
        name: name.into(),
        dtype: DType::U8,
        shape: vec![Dim::Named("bytes".into())],
        pad: 0.0,
        range: None,
        nonfinite: NonFinite::Refuse,
    };
    Contract {
        name: "echo".into(),
        version: "1".into(),
        architecture: "echo".into(),
        inputs: vec![tensor("data")],
        outputs: vec![tensor("data")],
        length: Some(Length { name: "bytes".into(), min: 1, max: 1 << 20 }),
        text: None,
        rows_max: 64,
    }
    .checked()
    .expect("a valid contract")
}

/// Binds to a free port and serves on its own thread until the process ends.
// Tests use it; the bench, which includes this file too, serves in a process of its own.
#[allow(dead_code)]
pub fn spawn(options: BareOptions) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("the loopback address has a free port");
    let addr = listener.local_addr().expect("a bound listener has an address");
    std::thread::Builder::new()
        .name("bare-server".into())
        .spawn(move || serve(listener, options))
        .expect("a thread for the server");
    addr
}

struct Peer {
    stream: TcpStream,
    rest: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    wants_write: bool,
}

/// Serves for ever.
pub fn serve(listener: TcpListener, options: BareOptions) {
    listener.set_nonblocking(true).expect("a listener can be non-blocking");
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll");
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER)).expect("room for the listener");
    let contract = Contract { architecture: options.architecture.into(), ..echo_contract() };
    let mut server = Server { options, contract, requests: 0 };
    let mut peers: Vec<Option<Peer>> = Vec::new();
    let mut events = vec![EpollEvent::empty(); 256];
    let mut scratch = vec![0; READ_SIZE];
    loop {
        let count = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(count) => count,
            Err(nix::Error::EINTR) => continue,
            Err(error) => panic!("epoll: {error}"),
        };
        for event in &events[..count] {
            if event.data() == LISTENER {
                while let Ok((stream, _)) = listener.accept() {
                    if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_err() {
                        continue; // already gone
                    }
                    let event = EpollEvent::new(EpollFlags::EPOLLIN, peers.len() as u64);
                    epoll.add(&stream, event).expect("room for a peer");
                    let (rest, output) = (Vec::new(), Vec::new());
                    peers.push(Some(Peer { stream, rest, output, written: 0, wants_write: false }));
                }
                continue;
            }
            let index = event.data() as usize;
            let Some(peer) = &mut peers[index] else { continue };
            let alive = server.turn(peer, &mut scratch).is_some() && flush(peer, &epoll, index as u64).is_some();
            if !alive {
                // Closing the socket also takes it out of the epoll.
                peers[index] = None;
            }
        }
    }
}

fn flush(peer: &mut Peer, epoll: &Epoll, index: u64) -> Option<()> {
    while peer.written < peer.output.len() {
        match peer.stream.write(&peer.output[peer.written..]) {
            Ok(0) => return None,
            Ok(count) => peer.written += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => return None,
        }
    }
    let is_blocked = peer.written < peer.output.len();
    if !is_blocked {
        peer.output.clear();
        peer.written = 0;
    }
    if is_blocked != peer.wants_write {
        peer.wants_write = is_blocked;
        let flags = match is_blocked {
            true => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
            false => EpollFlags::EPOLLIN,
        };
        epoll.modify(&peer.stream, &mut EpollEvent::new(flags, index)).ok()?;
    }
    Some(())
}

struct Server {
    options: BareOptions,
    contract: Contract,
    requests: u64,
}

impl Server {
    /// Reads once and answers all of it into the peer's output. `None` when the peer is gone.
    fn turn(&mut self, peer: &mut Peer, scratch: &mut Vec<u8>) -> Option<()> {
        let held = peer.rest.len();
        if scratch.len() < held + READ_SIZE / 2 {
            scratch.resize(held + READ_SIZE, 0);
        }
        scratch[..held].copy_from_slice(&peer.rest);
        let len = match peer.stream.read(&mut scratch[held..]) {
            Ok(0) => return None,
            Ok(count) => held + count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Some(()),
            Err(_) => return None,
        };
        let decoder = Decoder::new(Limits::DEFAULT);
        let mut at = 0;
        loop {
            match decoder.next(&scratch[at..len]).ok()? {
                Step::Frame(frame) => {
                    self.frame(&frame, &scratch[at..at + frame.len], &mut peer.output)?;
                    at += frame.len;
                }
                Step::Skip { len } => at += len,
                Step::Incomplete { .. } => break,
            }
        }
        peer.rest.clear();
        peer.rest.extend_from_slice(&scratch[at..len]);
        Some(())
    }

    fn frame(&mut self, frame: &Frame, bytes: &[u8], out: &mut Vec<u8>) -> Option<()> {
        let id = frame.header.request_id;
        let head = |kind| Head { kind, model: frame.header.model, request_id: id };
        match frame.kind {
            Kind::Infer => self.infer(frame, bytes, out)?,
            Kind::Hello => {
                let ack = HelloAck {
                    version: 1,
                    features: 0,
                    server: "bare".into(),
                    metadata_bytes_max: Limits::DEFAULT.metadata_bytes,
                    payload_bytes_max: Limits::DEFAULT.payload_bytes,
                    credit_requests: self.options.credit_requests,
                    credit_bytes: self.options.credit_bytes,
                };
                append_frame(out, head(Kind::HelloAck), &ack, &[]).ok()?;
            }
            Kind::Describe => {
                let describe: Describe = decode_exact(frame.metadata(bytes)).ok()?;
                let contract_hash = self.contract.hash();
                if describe.model.is_empty() {
                    let list = serde_json::json!({"models": [{
                        "name": "echo", "version": "1", "handle": 0, "ready": true,
                        "contract_hash": format!("{contract_hash:016x}"),
                    }]});
                    let description = Description { handle: 0, contract_hash: 0 };
                    append_frame(out, head(Kind::Description), &description, list.to_string().as_bytes()).ok()?;
                } else if describe.model == self.contract.name {
                    let json = serde_json::to_vec(&self.contract).ok()?;
                    let description = Description { handle: 0, contract_hash };
                    append_frame(out, head(Kind::Description), &description, &json).ok()?;
                } else {
                    let refusal = Refusal::new(Code::NotFound, format!("there is no model {}", describe.model));
                    append_frame(out, head(Kind::Error), &ErrorMessage::from_refusal(&refusal), &[]).ok()?;
                }
            }
            Kind::Stats => {
                let zeros = br#"{"uptime_us":0,"accepted":0,"in_flight":0,"outcomes":{},"models":{},"executors":[]}"#;
                append_frame(out, head(Kind::StatsReply), &(), zeros).ok()?;
            }
            Kind::Ping => append_bare(out, Head { kind: Kind::Pong, model: ModelHandle(0), request_id: id }),
            // A cancel comes too late: whatever was read has been answered.
            Kind::Cancel | Kind::Goaway => {}
            _ => return None,
        }
        Some(())
    }

    fn infer(&mut self, frame: &Frame, bytes: &[u8], out: &mut Vec<u8>) -> Option<()> {
        let id = frame.header.request_id;
        self.requests += 1;
        if self.options.drop_every.is_some_and(|every| self.requests.is_multiple_of(every)) {
            return Some(());
        }
        match self.options.goaway_at {
            Some(last) if self.requests > last => return Some(()),
            Some(last) if self.requests == last => {
                let goaway = Goaway {
                    code: Code::Draining as u16,
                    last_accepted_id: id,
                    version_min: 1,
                    version_max: 1,
                    message: "draining".into(),
                };
                append_frame(out, Head::control(Kind::Goaway), &goaway, &[]).ok()?;
            }
            _ => {}
        }
        let head = |kind| Head { kind, model: frame.header.model, request_id: id };
        if let Some(rest) = self.options.refuse_for_ms {
            let refusal = Refusal::overloaded("come back later", std::time::Duration::from_millis(rest));
            return append_frame(out, head(Kind::Error), &ErrorMessage::from_refusal(&refusal), &[]).ok();
        }
        if !frame.payload_is_intact(bytes) {
            let refusal = Refusal::new(Code::ChecksumMismatch, "the payload's checksum does not match");
            return append_frame(out, head(Kind::Error), &ErrorMessage::from_refusal(&refusal), &[]).ok();
        }
        let infer: Infer = decode_exact(frame.metadata(bytes)).ok()?;
        let result = InferResult {
            batch: self.requests,
            batch_rows: 1,
            padded_len: 1,
            seal_reason: 2,
            outputs: infer.inputs,
            ..InferResult::default()
        };
        let payload = frame.payload(bytes);
        if self.options.corrupt_every.is_some_and(|every| self.requests.is_multiple_of(every)) {
            let mut wrong = payload.to_vec();
            wrong[0] ^= 1;
            return append_frame(out, head(Kind::Result), &result, &wrong).ok();
        }
        append_frame(out, head(Kind::Result), &result, payload).ok()
    }
}
