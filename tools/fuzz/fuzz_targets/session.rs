//! Any frames, in any order and in any pieces, with time, of several connections, against a shard's real state, the real batcher and
//! a real worker whose model fails, panics and gives NaN as told. Sockets are pairs in this process.
//!
//! Fails on a panic, on a stream of answers that is not well-formed, on a second end of a request, on an end of one that was never
//! sent, and, when all has come to rest, on bytes, requests or batches that are still held.
#![no_main]

use std::collections::{BTreeMap, VecDeque};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use ferry::batcher::{Batcher, Outlet};
use ferry::executor::batch::{BatchOutput, BatchView};
use ferry::executor::slot::FilledSlot;
use ferry::executor::worker::{Answers, Worker};
use ferry::executor::{Blame, Executor, Failure};
use ferry::frontend::abuse::Rules;
use ferry::frontend::answering::Budget;
use ferry::frontend::connection::{Connection, Phase};
use ferry::frontend::state::State;
use ferry::frontend::{Catalog, Options};
use ferry::mail::{Finished, ToBatcher, ToShard};
use ferry::mailbox::{Receiver, Sender, mailbox};
use ferry::scheduler::{Buckets, Group, Policy, PolicyKind, QueueLimits, Scheduler, SeatSpec};
use ferry::telemetry::{ModelLabels, Telemetry};
use ferry::vocab::{Code, DType, ModelHandle, Moment, Refusal, TicketKey};
use ferry::wire::decoder::Step;
use ferry::wire::encoder::{Head, append_bare, append_frame};
use ferry::wire::message::{Describe, Goaway, Hello, Infer, List, TensorMeta};
use ferry::wire::{Decoder, Kind, Limits};
use ferry_fuzz::{Source, echo};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut source = Source(input);
    let mut world = World::new();
    while !source.is_empty() {
        world.step(&mut source);
    }
    world.finish();
});

/// Output is input, unless the row begins with 0xBAD, which is an error, or 0xDEAD, which is a panic.
struct Model;

impl Executor for Model {
    fn run(&mut self, _: ModelHandle, batch: BatchView<'_>, out: &mut BatchOutput) -> Result<(), Failure> {
        for row in 0..batch.rows as usize {
            match batch.row::<u32>(0, row).first() {
                Some(0xBAD) => {
                    let refusal = Refusal::new(Code::ExecutorFailed, "the model failed on this batch");
                    return Err(Failure { refusal, panicked: false, blame: Blame::Member });
                }
                Some(0xDEAD) => {
                    let refusal = Refusal::new(Code::ExecutorFailed, "the model panicked on this batch");
                    return Err(Failure { refusal, panicked: true, blame: Blame::Member });
                }
                _ => {}
            }
        }
        out.outputs[0].bytes_mut().copy_from_slice(batch.inputs[0].bytes());
        Ok(())
    }
}

#[derive(Default)]
struct Queue {
    filled: VecDeque<(usize, FilledSlot)>,
    ended: Vec<Vec<(TicketKey, Refusal)>>,
}

impl Outlet for Queue {
    fn submit(&mut self, executor: usize, slot: FilledSlot) -> Option<Finished> {
        self.filled.push_back((executor, slot));
        None
    }

    fn end(&mut self, _: u16, ended: Vec<(TicketKey, Refusal)>) {
        self.ended.push(ended);
    }
}

/// The other side of a connection.
struct Peer {
    /// Of the shard's table; None when the shard has forgotten it.
    at: Option<u32>,
    _ours: UnixStream,
    theirs: UnixStream,
    received: Vec<u8>,
    next_id: u64,
    /// Requests that were sent, and whether an end came.
    sent: BTreeMap<u64, bool>,
    /// It sends bytes that nobody made, or damaged ones: what is answered need not be of requests that are known.
    wild: bool,
}

struct World {
    state: State,
    batcher: Batcher<Queue>,
    to_batcher: Receiver<ToBatcher>,
    to_shard: Receiver<ToShard>,
    workers: Vec<Worker>,
    telemetry: Arc<Telemetry>,
    peers: Vec<Peer>,
    now: Moment,
    draining: bool,
}

impl World {
    fn new() -> World {
        let contract = echo();
        let contracts = vec![Arc::clone(&contract)];
        let labels = [ModelLabels { name: contract.name.clone(), version: contract.version.clone() }];
        let telemetry = Telemetry::new(&labels, 1, 2);
        let (batcher_mail, to_batcher): (Sender<ToBatcher>, _) = mailbox(64);
        let (shard_mail, to_shard) = mailbox(1024);
        let long = Duration::from_secs(5);
        let options = Options {
            connections_max: 8,
            credit_requests: 6,
            credit_bytes: 600,
            payload_bytes_max: 4096,
            output_bytes_max: 4096,
            output_bytes_total_max: 1 << 20,
            receiving_bytes_max: 1 << 20,
            admitted_bytes_max: 4000,
            in_flight_max: 16,
            hello_timeout: long,
            frame_timeout: long,
            stall_timeout: long,
            idle_timeout: long,
            // Waste is forgiven: the fuzzer is nothing but that.
            rules: Rules::NONE,
            bans: Arc::default(),
            quotas: Arc::default(),
            spin: Duration::ZERO,
            access: None,
            tracing: None,
            panic_on_request_id: None,
            panic_shard_on_request_id: None,
        };
        let catalog = Arc::new(Catalog::new(&contracts));
        let state = State::new(0, options, catalog, Arc::clone(&telemetry), batcher_mail, None);
        let policy = Policy {
            kind: PolicyKind::GreedyTokens,
            ..Policy::new(4, 64, Buckets::new(&[4, 16]).expect("ascending"))
        };
        let limits = QueueLimits { rows_max: 12, cells_max: 400, bytes_max: 4000 };
        let scheduler = Scheduler::new(limits, vec![policy], &SeatSpec::separate(Group::Executors, 2, 2));
        let batcher = Batcher::new(scheduler, Queue::default(), &contracts, 1, Arc::clone(&telemetry));
        let worker = |index| {
            let (contracts, shards) = (contracts.clone(), vec![shard_mail.clone()]);
            Worker::new(Answers { index, contracts, shards, telemetry: Arc::clone(&telemetry) }, Box::new(Model))
        };
        let workers = vec![worker(0), worker(1)];
        World {
            state,
            batcher,
            to_batcher,
            to_shard,
            workers,
            telemetry,
            peers: Vec::new(),
            now: ferry::clock::now(),
            draining: false,
        }
    }

    fn step(&mut self, source: &mut Source) {
        let choice = source.byte();
        let who = usize::from(source.byte()) % self.peers.len().max(1);
        match choice % 16 {
            0 if self.peers.len() < 6 && !self.draining => self.connect(),
            1 => self.say(who, |peer, out| {
                peer.wild = true;
                out.extend_from_slice(source.take(64));
            }),
            2 => self.now = self.now + Duration::from_millis(u64::from(source.short())),
            3 => self.state.housekeep(self.now),
            4 => self.hang_up(who),
            5 => {
                self.turn();
            }
            6 | 7 => self.run(source),
            8 => self.deliver(),
            9 if source.byte() == 0 => {
                self.draining = true;
                self.state.take_mail(ToShard::Drain, self.now);
                self.state.flush(self.now);
            }
            10 => self.hear(who),
            11..14 => self.say(who, |peer, out| infer(peer, source, out)),
            _ => self.say(who, |peer, out| other(peer, source, out)),
        }
    }

    fn connect(&mut self) {
        let (ours, theirs) = UnixStream::pair().expect("two sockets");
        ours.set_nonblocking(true).expect("a socket option");
        theirs.set_nonblocking(true).expect("a socket option");
        let at = self.state.connections.insert(Connection::new(ours.as_raw_fd(), self.now)) as u32;
        let received = Vec::new();
        self.peers.push(Peer { at: Some(at), _ours: ours, theirs, received, next_id: 1, sent: BTreeMap::new(), wild: false });
    }

    /// Bytes to the shard, as its task reads them, in pieces.
    fn say(&mut self, who: usize, write: impl FnOnce(&mut Peer, &mut Vec<u8>)) {
        let Some(peer) = self.peers.get_mut(who) else { return };
        let mut bytes = Vec::new();
        write(peer, &mut bytes);
        let Some(at) = peer.at else { return };
        let mut left = bytes.as_slice();
        while !left.is_empty() && self.state.connections[at as usize].phase != Phase::Closed {
            if self.state.is_choked(at) {
                // Its task would not read before its peer does.
                self.hear(who);
                if self.state.is_choked(at) {
                    break;
                }
            }
            let now = self.now;
            let _ = self.state.read(at, &mut Context::from_waker(Waker::noop()), || now, |_, buffer| {
                let count = left.len().min(buffer.len());
                buffer[..count].copy_from_slice(&left[..count]);
                left = &left[count..];
                Poll::Ready(Ok(count))
            });
            self.state.flush(now);
        }
        self.forget_closed();
    }

    fn hang_up(&mut self, who: usize) {
        let Some(peer) = self.peers.get_mut(who) else { return };
        if let Some(at) = peer.at.take() {
            self.state.remove(at);
        }
    }

    /// What the tasks of closed connections do.
    fn forget_closed(&mut self) {
        for who in 0..self.peers.len() {
            let closed = |at: u32| self.state.connections[at as usize].phase == Phase::Closed;
            if self.peers[who].at.is_some_and(closed) {
                self.hang_up(who);
            }
        }
    }

    fn turn(&mut self) {
        while let Some(message) = self.to_batcher.try_recv() {
            self.batcher.take(self.now, message);
        }
        self.batcher.turn(self.now);
        for ended in std::mem::take(&mut self.batcher.outlet_mut().ended) {
            self.state.take_mail(ToShard::Ended(ended), self.now);
        }
        self.state.flush(self.now);
        self.forget_closed();
    }

    /// An executor runs a batch.
    fn run(&mut self, source: &mut Source) {
        let filled = &mut self.batcher.outlet_mut().filled;
        if filled.is_empty() {
            return;
        }
        let at = usize::from(source.byte()) % filled.len();
        let (executor, slot) = filled.remove(at).expect("within");
        let finished = self.workers[executor].run(slot);
        self.batcher.take(self.now, ToBatcher::Finished(finished));
    }

    fn deliver(&mut self) {
        while let Some(message) = self.to_shard.try_recv() {
            self.state.take_mail(message, self.now);
            while !self.state.answer_some(&mut Budget::of_answers(), self.now) {}
        }
        self.state.flush(self.now);
        self.forget_closed();
    }

    /// Takes what was written to a peer, and checks it.
    fn hear(&mut self, who: usize) {
        let Some(peer) = self.peers.get_mut(who) else { return };
        let mut buffer = [0; 4096];
        while let Ok(count) = peer.theirs.read(&mut buffer) {
            if count == 0 {
                break;
            }
            peer.received.extend_from_slice(&buffer[..count]);
        }
        if let Some(at) = peer.at {
            let _ = self.state.connections[at as usize].try_flush(self.now);
            self.state.connections[at as usize].blocked = false;
            self.state.after_flush(at, self.now);
            self.state.recount(at);
        }
        let decoder = Decoder::new(Limits::DEFAULT);
        let mut used = 0;
        loop {
            let rest = &peer.received[used..];
            match decoder.next(rest).expect("the server's own frames") {
                Step::Frame(frame) => {
                    assert!(frame.payload_is_intact(rest));
                    let id = frame.header.request_id;
                    match frame.kind {
                        Kind::Result | Kind::Error => match peer.sent.get_mut(&id) {
                            Some(ended) => assert!(!std::mem::replace(ended, true) || peer.wild, "request {id} ends twice"),
                            None => assert!(peer.wild || frame.kind == Kind::Error, "request {id} was never sent"),
                        },
                        kind => assert!(!kind.from_client() || kind == Kind::Goaway, "{kind:?} from a server"),
                    }
                    used += frame.len;
                }
                Step::Skip { .. } => panic!("the server sends no optional frames"),
                Step::Incomplete { .. } => break,
            }
        }
        peer.received.drain(..used);
    }

    /// Everybody goes; then nothing is held.
    fn finish(&mut self) {
        let mut nothing = Source(&[]);
        for _ in 0..64 {
            self.turn();
            while !self.batcher.outlet_mut().filled.is_empty() {
                self.run(&mut nothing);
            }
            self.deliver();
            (0..self.peers.len()).for_each(|who| self.hear(who));
            self.now = self.now + Duration::from_millis(100);
        }
        assert_eq!(self.state.in_flight.len(), 0, "all that was accepted has ended");
        for peer in &self.peers {
            let open = peer.at.is_some_and(|at| self.state.connections[at as usize].phase == Phase::Open);
            let waits = peer.sent.values().any(|ended| !ended);
            assert!(!(open && waits) || peer.wild, "an open connection is owed an answer");
        }
        (0..self.peers.len()).for_each(|who| self.hang_up(who));
        self.turn();
        self.state.publish();
        assert!(self.batcher.is_idle(), "nothing waits or runs");
        let page = self.telemetry.encode();
        for kind in ["receiving", "unsent"] {
            let start = format!("ferry_live_bytes{{kind=\"{kind}\"}}");
            let held = page.lines().find(|line| line.starts_with(&start)).expect("a gauge");
            assert!(held.ends_with(" 0"), "{held}");
        }
    }
}

/// A request, nearly right.
fn infer(peer: &mut Peer, source: &mut Source, out: &mut Vec<u8>) {
    let (bits, rows, len) = (source.byte(), u32::from(source.byte() % 6), u32::from(source.byte() % 18));
    let mut dims = List::new();
    let _ = dims.push(rows);
    let _ = dims.push(len);
    let mut infer = Infer {
        deadline_us: if bits & 1 == 1 { u64::from(source.short()) * 16 } else { 0 },
        priority: bits >> 6,
        flags: source.byte() & 0x0D,
        ..Infer::default()
    };
    if bits & 2 == 2 {
        (infer.compose_tag, infer.compose_rows) = (1 + u64::from(source.byte() % 2), u32::from(source.byte() % 5));
    }
    let dtype = if bits & 0x3C == 0x3C { source.byte() } else { DType::U32 as u8 };
    let _ = infer.inputs.push(TensorMeta { index: 0, dtype, dims });
    let first: u32 = match source.byte() {
        0xF0..0xF8 => 0xBAD,
        0xF8..=0xFF => 0xDEAD,
        byte => byte.into(),
    };
    let elements = rows * len + u32::from(bits & 0x3C == 0x34);
    let payload: Vec<u8> = (0..elements).flat_map(|_| first.to_le_bytes()).collect();
    // Mostly rising.
    let id = if bits & 0x3C == 0x2C { u64::from(source.byte()) } else { peer.next_id };
    let fresh = id >= peer.next_id;
    peer.next_id = peer.next_id.max(id + 1);
    let before = out.len();
    let head = Head { kind: Kind::Infer, model: ModelHandle(u16::from(bits & 0x3C == 0x24)), request_id: id };
    append_frame(out, head, &infer, &payload).expect("small");
    if bits & 0x3C == 0x1C && out.len() > before + 40 {
        // Damaged behind the head.
        let last = out.len() - 1;
        out[last] ^= 1;
    }
    if fresh {
        peer.sent.insert(id, false);
    } else {
        // Refused under a number that is another's.
        peer.wild = true;
    }
}

/// Any other frame.
fn other(peer: &mut Peer, source: &mut Source, out: &mut Vec<u8>) {
    let id = u64::from(source.byte());
    let bare = |out: &mut Vec<u8>, kind: Kind| append_bare(out, Head { kind, model: ModelHandle(0), request_id: id });
    match source.byte() % 10 {
        0..4 => {
            let hello = Hello {
                version_min: 1,
                version_max: 1,
                features: 0,
                client: "fuzz".into(),
                tenant: if id % 3 == 0 { String::new() } else { format!("t{}", id % 3) },
                token: Vec::new(),
            };
            append_frame(out, Head::control(Kind::Hello), &hello, &[]).expect("small");
        }
        4 | 5 => bare(out, Kind::Cancel),
        6 => bare(out, Kind::Ping),
        7 => bare(out, Kind::Stats),
        8 => {
            let model = if id % 2 == 0 { String::new() } else { "echo".into() };
            let head = Head { kind: Kind::Describe, model: ModelHandle(0), request_id: id };
            // Answered under a number that may be a request's.
            peer.wild = true;
            append_frame(out, head, &Describe { model, version: String::new() }, &[]).expect("small");
        }
        _ => {
            let goaway = Goaway { code: 0, last_accepted_id: 0, version_min: 1, version_max: 1, message: String::new() };
            append_frame(out, Head::control(Kind::Goaway), &goaway, &[]).expect("small");
        }
    }
}
