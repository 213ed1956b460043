//! A shard's connections and in-flight requests, and what happens to them. Synchronous: it is borrowed for one step at a
//! time and never across a wait.
//!
//! Always true
//! - Every live slot of the in-flight table belongs to a connection that exists.
//! - Output that could not be written yet is bounded: beyond `output_bytes_max` the connection is not read any more, and
//!   without progress for `stall_timeout` it is closed. Of all connections together no more than `output_bytes_total_max`
//!   is left at the end of a step: those with the most are closed.
//! - `unsent` is the sum of all connections' `counted`; a step that changes an output counts it again before it ends.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use slab::Slab;

use super::abuse::Act;
use super::answering::Answering;
use super::bucket::Bucket;
use super::connection::{Connection, Flushed, Phase};
use super::inflight::{InFlight, Waiting};
use super::pressure::Pressure;
use super::room::{growth, try_reserve};
use super::session::{Fatal, append_goaway, handle_frame};
use super::traces::Traces;
use super::{Catalog, Options, access};
use crate::clock;
use crate::mail::{self, FinishedBatch, Member, Request, ToBatcher, ToShard};
use crate::mailbox::{SendError, Sender};
use crate::scatter::{Assemblies, append_error};
use crate::telemetry::{ShardMetrics, Telemetry};
use crate::tenants::Day;
use crate::vocab::{Code, Moment, Refusal, TicketKey};
use crate::wire::decoder::{DecodeError, Step};

/// A fresh read buffer. Frames of many requests, also of several connections, share one.
const CHUNK: usize = 64 << 10;
/// A chunk with less room than this is given up for a fresh one.
const READ_MIN: usize = 8 << 10;
/// Most bytes of a long frame taken in one read.
const READ_MAX: usize = 256 << 10;
/// A frame longer than this gets a buffer of its own.
const OWN_BUFFER_MIN: usize = 32 << 10;
/// How long an answered, leaving connection may take to close its side.
const LINGER: Duration = Duration::from_secs(2);

/// What one read brought, on its way to the batcher and the tokenizers.
#[derive(Debug, Default)]
pub struct Burst {
    pub arrivals: Vec<Request>,
    pub texts: Vec<Request>,
    pub cancelled: Vec<TicketKey>,
}

/// How a shard stands towards new work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Serving,
    Draining,
}

pub struct State {
    pub index: u16,
    pub options: Options,
    pub catalog: Arc<Catalog>,
    pub telemetry: Arc<Telemetry>,
    pub connections: Slab<Connection>,
    pub in_flight: InFlight,
    /// Answers of requests that are run in parts.
    pub(super) assemblies: Assemblies,
    /// A batch that is being answered.
    pub(super) answering: Option<Answering>,
    pub traces: Traces,
    pub(super) handshakes: Bucket,
    /// What may be said in the log about peers that cannot connect: they could fill it.
    pub(super) complaints: Bucket,
    /// Connections that have not said hello, where they may be only so many (access.rs).
    pub(super) strangers: Vec<u32>,
    /// Generation and day that connections' identities were last compared with.
    pub(super) access_seen: (u64, Day),
    /// Records that were just read.
    pub(super) records: Vec<u8>,
    pub mode: Mode,
    /// Test hook: the shard's main task is to panic.
    pub broken: bool,
    batcher: Sender<ToBatcher>,
    tokenizer: Option<Sender<Request>>,
    chunk: BytesMut,
    /// Bytes of frames that have begun and not ended, of all connections.
    pub(super) receiving: u64,
    /// Bytes that could not be written yet, of all connections.
    pub(super) unsent: u64,
    /// Payload bytes of accepted requests, of all connections.
    pub(super) admitted: u64,
    pub(super) pressure: Pressure,
    /// When the books are recomputed next.
    pub(super) audit_at: Moment,
    dirty: Vec<u32>,
    burst: Burst,
    /// Cancels that found the batcher's mailbox full; they travel with the next message.
    pub(super) cancels_left: Vec<TicketKey>,
    main: Option<Waker>,
}

impl State {
    pub fn new(
        index: u16,
        options: Options,
        catalog: Arc<Catalog>,
        telemetry: Arc<Telemetry>,
        batcher: Sender<ToBatcher>,
        tokenizer: Option<Sender<Request>>,
    ) -> State {
        let in_flight = InFlight::new(index, options.in_flight_max);
        let traces = Traces::new(options.tracing.clone());
        let pressure = Pressure::new(options.admitted_bytes_max);
        State {
            index,
            options,
            catalog,
            telemetry,
            connections: Slab::new(),
            in_flight,
            assemblies: Assemblies::default(),
            answering: None,
            traces,
            handshakes: access::handshakes(),
            complaints: access::complaints(),
            strangers: Vec::new(),
            access_seen: (0, Day(0)),
            records: Vec::new(),
            mode: Mode::Serving,
            broken: false,
            batcher,
            tokenizer,
            chunk: BytesMut::new(),
            receiving: 0,
            unsent: 0,
            admitted: 0,
            pressure,
            audit_at: Moment::ZERO,
            dirty: Vec::new(),
            burst: Burst::default(),
            cancels_left: Vec::new(),
            main: None,
        }
    }

    pub fn metrics(&self) -> &ShardMetrics {
        self.telemetry.shard(usize::from(self.index))
    }

    /// Says how things stand, once for all that a burst changed.
    pub fn publish(&self) {
        let metrics = self.metrics();
        metrics.table_entries(self.in_flight.len() as u64);
        metrics.held_bytes(self.receiving, self.unsent, self.admitted);
    }

    /// Registers the shard's main task, to be woken when the last connection of a draining shard has gone.
    pub fn set_main(&mut self, waker: &Waker) {
        if self.main.as_ref().is_none_or(|main| !main.will_wake(waker)) {
            self.main = Some(waker.clone());
        }
    }

    /// Lets go of the other rooms. A glommio executor that ends may leak tasks that still hold this state, and a
    /// tokenizer ends only when all senders to it are gone.
    pub fn close(&mut self) {
        self.tokenizer = None;
    }

    pub fn is_done(&self) -> bool {
        self.mode == Mode::Draining && self.connections.is_empty()
    }

    /// The connection, listed for flushing at the end of this step.
    pub fn output(&mut self, at: u32) -> &mut Connection {
        let connection = &mut self.connections[at as usize];
        if !connection.dirty {
            connection.dirty = true;
            self.dirty.push(at);
        }
        connection
    }

    /// Takes one read's bytes through `read`, which fills a part of the buffer it is given.
    pub fn read(
        &mut self,
        at: u32,
        cx: &mut Context<'_>,
        now: impl Fn() -> Moment,
        read: impl FnOnce(&mut Context<'_>, &mut [u8]) -> Poll<std::io::Result<usize>>,
    ) -> Poll<ReadEnd> {
        self.read_at_most(READ_MAX, at, cx, now, read)
    }

    /// The same, where `read` has no more than `most` bytes for a long frame.
    pub(super) fn read_at_most(
        &mut self,
        most: usize,
        at: u32,
        cx: &mut Context<'_>,
        now: impl Fn() -> Moment,
        read: impl FnOnce(&mut Context<'_>, &mut [u8]) -> Poll<std::io::Result<usize>>,
    ) -> Poll<ReadEnd> {
        let connection = &mut self.connections[at as usize];
        let mut partial = std::mem::take(&mut connection.partial);
        let needed = connection.needed;
        self.receiving -= partial.len() as u64;
        if needed > OWN_BUFFER_MIN {
            return self.read_long(at, partial, most, cx, now, read);
        }
        if self.chunk.len() < partial.len() + READ_MIN {
            self.chunk = BytesMut::zeroed(CHUNK);
        }
        let have = partial.len();
        let count = match read(cx, &mut self.chunk[have..]) {
            Poll::Ready(Ok(count)) if count > 0 => count,
            Poll::Ready(end) => return Poll::Ready(ReadEnd::of(end)),
            Poll::Pending => {
                self.keep_partial(at, partial);
                return Poll::Pending;
            }
        };
        self.chunk[..have].copy_from_slice(&partial);
        partial.clear();
        let data = self.chunk.split_to(have + count).freeze();
        self.connections[at as usize].partial = partial;
        self.take_bytes(at, data, count, now());
        Poll::Ready(ReadEnd::Burst)
    }

    /// The same for a frame with a buffer of its own, which grows to exactly its length: with what arrives, so that a
    /// length in a header alone takes no memory.
    fn read_long(
        &mut self,
        at: u32,
        mut partial: BytesMut,
        most: usize,
        cx: &mut Context<'_>,
        now: impl Fn() -> Moment,
        read: impl FnOnce(&mut Context<'_>, &mut [u8]) -> Poll<std::io::Result<usize>>,
    ) -> Poll<ReadEnd> {
        let (have, needed) = (partial.len(), self.connections[at as usize].needed);
        let room = (needed - have).min(most);
        let is_over = self.receiving + (have + room) as u64 > self.options.receiving_bytes_max;
        if is_over || try_reserve(&mut partial, room, growth(have, needed, room)).is_err() {
            let message = match is_over {
                true => "too many bytes of unfinished frames are held for all connections".to_owned(),
                false => format!("the system gives no memory for the rest of a frame of {needed} bytes"),
            };
            self.fail(at, &Fatal { code: Code::Overloaded, message }, now());
            // Deaf from here on: what comes is thrown away through the shared buffer.
            self.connections[at as usize].needed = 0;
            return Poll::Ready(ReadEnd::Burst);
        }
        partial.resize(have + room, 0);
        let result = read(cx, &mut partial[have..]);
        let count = match &result {
            Poll::Ready(Ok(count)) => *count,
            _ => 0,
        };
        partial.truncate(have + count);
        match result {
            Poll::Ready(Ok(count)) if count > 0 => {
                if partial.len() == needed {
                    self.take_bytes(at, partial.freeze(), count, now());
                } else {
                    self.metrics().bytes_read(count as u64);
                    self.connections[at as usize].read_at = now();
                    self.keep_partial(at, partial);
                }
                Poll::Ready(ReadEnd::Burst)
            }
            Poll::Ready(end) => Poll::Ready(ReadEnd::of(end)),
            Poll::Pending => {
                self.keep_partial(at, partial);
                Poll::Pending
            }
        }
    }

    fn keep_partial(&mut self, at: u32, partial: BytesMut) {
        self.receiving += partial.len() as u64;
        self.connections[at as usize].partial = partial;
    }

    /// Acts on every whole frame in `data` and keeps the rest; hands the burst on.
    fn take_bytes(&mut self, at: u32, mut data: Bytes, count: usize, now: Moment) {
        self.metrics().bytes_read(count as u64);
        if self.connections[at as usize].deaf {
            self.connections[at as usize].needed = 0;
            return;
        }
        let mut burst = std::mem::take(&mut self.burst);
        let received = data.len();
        let mut needed = 0;
        while !data.is_empty() && self.connections[at as usize].phase != Phase::Closed {
            match self.connections[at as usize].decoder.next(&data) {
                Ok(Step::Frame(frame)) => {
                    if let Err(fatal) = handle_frame(self, at, &frame, &data, now, &mut burst) {
                        self.send_away(at, &fatal, now);
                        break;
                    }
                    let _ = data.split_to(frame.len);
                }
                Ok(Step::Skip { len }) => {
                    if let Err(fatal) = self.charge(at, Act::Unknown, now) {
                        self.send_away(at, &fatal, now);
                        break;
                    }
                    let _ = data.split_to(len);
                }
                Ok(Step::Incomplete { needed: more }) => {
                    needed = more;
                    break;
                }
                Err(error) => {
                    let fatal = self.undecodable(at, error, now);
                    self.send_away(at, &fatal, now);
                    break;
                }
            }
        }
        let connection = &mut self.connections[at as usize];
        connection.read_at = now;
        // A frame's time runs from its first byte: one that drips in has no more than one that stops.
        if connection.needed == 0 || data.len() < received {
            connection.frame_since = now;
        }
        connection.needed = needed;
        if needed > 0 {
            // A copy, so that the start of a slow frame does not keep a whole chunk alive.
            let mut partial = std::mem::take(&mut connection.partial);
            partial.clear();
            if needed > OWN_BUFFER_MIN {
                // What the next read makes room for: it finds it here and need not move what has come. If there is none, it is told then.
                let room = data.len() + growth(data.len(), needed, READ_MAX);
                let _ = try_reserve(&mut partial, room, room);
            }
            partial.extend_from_slice(&data);
            self.keep_partial(at, partial);
        }
        self.hand_on(&mut burst);
        self.burst = burst;
    }

    /// What a stream that is no frames costs its connection. Of a stranger who had to prove who it is, it is a failure to do so.
    #[cold]
    fn undecodable(&mut self, at: u32, error: DecodeError, now: Moment) -> Fatal {
        // The head of a TLS record that begins a handshake.
        if matches!(error, DecodeError::Magic([0x16, 3, _])) && self.complaints.take(1.0, now) {
            tracing::warn!("a peer speaks TLS, but tls.certificate is not set: this port does not");
        }
        let is_large = matches!(error, DecodeError::PayloadTooLong { .. } | DecodeError::MetadataTooLong { .. });
        if is_large && self.connections[at as usize].phase == Phase::Greeting && self.wants_proof() {
            self.proof_failed(at, now);
            return Fatal { code: Code::Unauthenticated, message: "a hello with credentials comes first".into() };
        }
        Fatal { code: error.code(), message: error.to_string() }
    }

    /// Mails a burst to the batcher and its texts to the tokenizers.
    fn hand_on(&mut self, burst: &mut Burst) {
        if !burst.texts.is_empty() {
            for request in std::mem::take(&mut burst.texts) {
                self.send_text(request);
            }
        }
        if burst.arrivals.is_empty() && burst.cancelled.is_empty() && self.cancels_left.is_empty() {
            return;
        }
        let mut cancelled = std::mem::take(&mut self.cancels_left);
        cancelled.append(&mut burst.cancelled);
        let next = Vec::with_capacity(burst.arrivals.len());
        let arrivals = std::mem::replace(&mut burst.arrivals, next);
        match self.batcher.send(ToBatcher::Burst(mail::Burst { arrivals, cancelled })) {
            Ok(()) => {}
            Err(SendError::Full(ToBatcher::Burst(back)) | SendError::Closed(ToBatcher::Burst(back))) => {
                let refusal = Refusal::overloaded("the batcher's mailbox is full", Duration::from_millis(5));
                for request in back.arrivals {
                    self.end(request.key, &refusal);
                }
                // A cancel that is lost costs a result that nobody reads; keep a bounded number.
                self.cancels_left = back.cancelled;
                self.cancels_left.truncate(self.options.in_flight_max as usize);
            }
            Err(_) => unreachable!("a burst was sent, a burst came back"),
        }
    }

    fn send_text(&mut self, request: Request) {
        let Some(tokenizer) = &self.tokenizer else {
            let refusal = Refusal::new(Code::Internal, "no tokenizer is running");
            return self.end(request.key, &refusal);
        };
        match tokenizer.send(request) {
            Ok(()) => {}
            Err(SendError::Full(request) | SendError::Closed(request)) => {
                let refusal = Refusal::overloaded("the tokenizers' mailbox is full", Duration::from_millis(5));
                self.end(request.key, &refusal);
            }
        }
    }

    /// Acts on a message of the batcher, an executor or the server. Of a batch, [`State::answer_some`] answers the members;
    /// until it has, nothing else may be taken.
    pub fn take_mail(&mut self, message: ToShard, now: Moment) {
        debug_assert!(self.answering.is_none(), "messages are acted on in their order");
        match message {
            ToShard::Batch(finished) => self.answering = Some(Answering::of(finished)),
            ToShard::Ended(ended) => {
                for (key, refusal) in ended {
                    self.end(key, &refusal);
                }
            }
            ToShard::Drain => self.drain(now),
            ToShard::Abort => self.abort(now),
        }
    }

    /// A request has ended; if it is one of those that are recorded, so is that.
    pub(super) fn record(
        &mut self,
        waiting: &Waiting,
        outcome: (Code, &str),
        batch: Option<(&FinishedBatch, &Member)>,
        now: impl FnOnce() -> Moment,
    ) {
        if waiting.trace != 0 {
            self.traces.end(self.index, waiting, outcome, batch, now(), &self.telemetry);
        }
    }

    /// Ends a request without a result. The first outcome counts; a later one is dropped.
    pub fn end(&mut self, key: TicketKey, refusal: &Refusal) {
        self.end_in(key, refusal, None);
    }

    /// The same, of a member of a batch that ran.
    pub(super) fn end_in(&mut self, key: TicketKey, refusal: &Refusal, batch: Option<(&FinishedBatch, &Member)>) {
        let Some(waiting) = self.release(key) else {
            return self.metrics().late_answer();
        };
        if refusal.code == Code::Overloaded {
            self.count_refusal(&waiting, refusal);
        }
        self.metrics().finished(waiting.model, refusal.code, 1);
        self.record(&waiting, (refusal.code, &refusal.message), batch, clock::now);
        append_error(self.output(waiting.connection).out.end(), waiting.model, waiting.request_id, refusal);
    }

    /// A request was refused for now: it counts against those of its connection that come back too soon.
    #[cold]
    fn count_refusal(&mut self, waiting: &Waiting, refusal: &Refusal) {
        let throttle = self.connections[waiting.connection as usize].throttle.get_or_insert_default();
        let rest = Duration::from_millis(refusal.retry_after_ms.into());
        throttle.refused(clock::now(), waiting.model, waiting.class, rest);
    }

    /// Frees a request's slot and gives its credit back.
    pub(super) fn release(&mut self, key: TicketKey) -> Option<Waiting> {
        let at = self.in_flight.get(key)?.connection;
        let connection = &mut self.connections[at as usize];
        let waiting = self.in_flight.remove(key, &mut connection.owned)?;
        self.assemblies.drop_entry(key.slot);
        connection.requests_in_flight -= 1;
        connection.bytes_in_flight -= u64::from(waiting.payload_bytes);
        self.admitted -= u64::from(waiting.payload_bytes);
        if let Some(seat) = connection.seat.as_ref().filter(|_| waiting.in_quota) {
            seat.quota().finished();
        }
        Some(waiting)
    }

    /// Writes what the sockets of this step's answers take.
    pub fn flush(&mut self, now: Moment) {
        while let Some(at) = self.dirty.pop() {
            let Some(connection) = self.connections.get_mut(at as usize) else { continue };
            connection.dirty = false;
            if connection.phase == Phase::Closed {
                // An answer that came after it was closed.
                connection.close();
                self.recount(at);
                continue;
            }
            let before = connection.unsent();
            let flushed = if connection.blocked { Flushed::Blocked } else { connection.try_flush(now) };
            let written = before.saturating_sub(connection.unsent());
            match flushed {
                Flushed::All => self.after_flush(at, now),
                // Its task waits for room; wake it so that it starts to.
                Flushed::Blocked => connection.wake(),
                Flushed::Broken => connection.close(),
            }
            self.recount(at);
            self.metrics().bytes_written(written as u64);
        }
        while self.unsent > self.options.output_bytes_total_max {
            let slowest = self.connections.iter().max_by_key(|(_, connection)| connection.unsent());
            let (at, _) = slowest.expect("the sum is of connections");
            self.close_slow_reader(at as u32);
        }
    }

    /// Counts what a connection has to send, after it changed.
    pub fn recount(&mut self, at: u32) {
        let connection = &mut self.connections[at as usize];
        let now = connection.unsent();
        let before = std::mem::replace(&mut connection.counted, now);
        self.unsent = self.unsent + now as u64 - before as u64;
    }

    /// Closes a connection whose peer does not read. What was accepted of it ends as cancelled, with its task.
    fn close_slow_reader(&mut self, at: u32) {
        let connection = &mut self.connections[at as usize];
        tracing::debug!(unsent = connection.unsent(), "closing a reader that does not read");
        connection.close();
        self.recount(at);
        self.metrics().slow_reader();
    }

    /// A leaving connection whose answers have all gone shuts its sending side.
    pub fn after_flush(&mut self, at: u32, now: Moment) {
        let connection = &mut self.connections[at as usize];
        if connection.phase == Phase::Leaving
            && connection.requests_in_flight == 0
            && connection.unsent() == 0
            && let Some(tls) = &mut connection.tls
        {
            // A few bytes into a socket that took all before; if not these, the peer sees the end without them.
            tls.say_goodbye();
            let _ = connection.try_flush(now);
            let left = connection.tls.as_ref().map_or(0, |tls| tls.unsent());
            connection.advance(left, now);
        }
        if connection.phase == Phase::Leaving && connection.requests_in_flight == 0 && connection.unsent() == 0 {
            // The peer reads our last bytes and then the end; closing at once could destroy what it has not read yet.
            let _ = nix::sys::socket::shutdown(connection.fd, nix::sys::socket::Shutdown::Write);
            connection.phase = Phase::Lingering;
            connection.wrote_at = now;
        }
    }

    /// Takes what a wasteful act costs this connection, or says that it has to go.
    pub fn charge(&mut self, at: u32, act: Act, now: Moment) -> Result<(), Fatal> {
        self.metrics().wasted(act.points());
        if self.connections[at as usize].points.pay(act, &self.options.rules, now) {
            return Ok(());
        }
        let message = format!("too many {}: enhance your calm", act.plural());
        if let Some(addr) = self.connections[at as usize].addr {
            self.options.bans.ban(addr, now);
        }
        Err(Fatal { code: Code::QuotaExceeded, message })
    }

    /// [`State::fail`] for what the peer itself did, which its address pays for.
    fn send_away(&mut self, at: u32, fatal: &Fatal, now: Moment) {
        if let Some(addr) = self.connections[at as usize].addr
            && fatal.code != Code::QuotaExceeded
        {
            self.options.bans.strike(addr, now);
        }
        self.fail(at, fatal, now);
    }

    /// Sends a goaway and stops accepting on this connection.
    pub fn fail(&mut self, at: u32, fatal: &Fatal, now: Moment) {
        let connection = &mut self.connections[at as usize];
        connection.deaf = true;
        if !matches!(connection.phase, Phase::Greeting | Phase::Open) {
            // It has had its goaway; what was accepted is still answered.
            return;
        }
        self.metrics().goaway(fatal.code);
        tracing::debug!(code = fatal.code.name(), reason = fatal.message, "goaway");
        if connection_is_shaking_hands(&self.connections[at as usize]) {
            // It would not understand a word.
            self.connections[at as usize].close();
            return self.recount(at);
        }
        append_goaway(self.output(at), fatal.code, &fatal.message);
        self.leave(at, now);
    }

    /// From now on nothing is accepted here; what was accepted is answered, then the connection ends.
    pub fn leave(&mut self, at: u32, now: Moment) {
        self.greeted(at);
        let connection = self.output(at);
        connection.phase = Phase::Leaving;
        connection.since = now;
        connection.wake();
    }

    fn drain(&mut self, now: Moment) {
        self.mode = Mode::Draining;
        let open: Vec<u32> = self
            .connections
            .iter()
            .filter(|(_, connection)| matches!(connection.phase, Phase::Greeting | Phase::Open))
            .map(|(at, _)| at as u32)
            .collect();
        for at in open {
            self.metrics().goaway(Code::Draining);
            if connection_is_shaking_hands(&self.connections[at as usize]) {
                self.connections[at as usize].close();
                self.recount(at);
                continue;
            }
            append_goaway(self.output(at), Code::Draining, "the server is shutting down");
            self.leave(at, now);
        }
        self.wake_main();
    }

    fn abort(&mut self, now: Moment) {
        self.mode = Mode::Draining;
        let refusal = Refusal::new(Code::ExecutorFailed, "the server ends before this request could be finished");
        let all: Vec<u32> = self.connections.iter().map(|(at, _)| at as u32).collect();
        for at in &all {
            while let Some(key) = self.in_flight.first(&self.connections[*at as usize].owned) {
                self.end(key, &refusal);
            }
        }
        self.flush(now);
        for at in all {
            let connection = &mut self.connections[at as usize];
            connection.phase = Phase::Closed;
            connection.wake();
        }
        self.wake_main();
    }

    pub fn wake_main(&mut self) {
        if let Some(main) = &self.main {
            main.wake_by_ref();
        }
    }

    /// Forgets a connection: its requests end as cancelled, and the batcher is told.
    pub fn remove(&mut self, at: u32) {
        let mut cancelled = std::mem::take(&mut self.cancels_left);
        while let Some(key) = self.in_flight.first(&self.connections[at as usize].owned) {
            let waiting = self.release(key).expect("it was on the connection's list");
            self.metrics().finished(waiting.model, Code::Cancelled, 1);
            self.record(&waiting, (Code::Cancelled, "its connection ended"), None, clock::now);
            cancelled.push(key);
        }
        self.greeted(at);
        let connection = self.connections.remove(at as usize);
        self.receiving -= connection.partial.len() as u64;
        self.unsent -= connection.counted as u64;
        self.metrics().connection_closed();
        self.cancels_left = cancelled;
        let mut burst = std::mem::take(&mut self.burst);
        self.hand_on(&mut burst);
        self.burst = burst;
        // No burst may follow: what the connection held would be shown for as long as nobody sends.
        self.publish();
        if self.is_done() {
            self.wake_main();
        }
    }

    /// Whether accepted payloads leave room for more connections.
    pub fn has_room(&mut self) -> bool {
        self.pressure.look(self.telemetry.admitted_bytes());
        !self.pressure.is_closed()
    }

    /// Ends what has taken too long. Runs a few times a second.
    pub fn housekeep(&mut self, now: Moment) {
        self.audit_when_due(now);
        self.recheck_identities(now);
        self.adjust_windows();
        let options = &self.options;
        let late = |since: Moment, timeout: Duration| now.since(since) > timeout;
        let mut failed: Vec<(u32, Fatal)> = Vec::new();
        let mut stalled: Vec<u32> = Vec::new();
        for (at, connection) in &mut self.connections {
            let mut fail = |message: &str| failed.push((at as u32, Fatal::protocol(message)));
            if connection.unsent() > options.output_bytes_max as usize {
                // Not read at the moment: the rest of the frame may have come long ago.
                connection.frame_since = now;
            }
            match connection.phase {
                Phase::Greeting if late(connection.since, options.hello_timeout) => fail("no hello came in time"),
                Phase::Open
                    if connection.needed > 0
                        && late(connection.frame_since, options.frame_timeout + at_slowest(connection.needed)) =>
                {
                    fail("a frame was begun and not finished in time");
                }
                Phase::Open
                    if connection.requests_in_flight == 0
                        && connection.unsent() == 0
                        && late(connection.read_at.max(connection.wrote_at), options.idle_timeout) =>
                {
                    fail("the connection was idle for too long");
                }
                Phase::Lingering if late(connection.wrote_at, LINGER) => {
                    connection.phase = Phase::Closed;
                    connection.wake();
                }
                _ => {}
            }
            if connection.unsent() > 0 && late(connection.wrote_at, options.stall_timeout) {
                stalled.push(at as u32);
            }
            if late(connection.read_at, Duration::from_secs(1)) {
                connection.trim();
            }
        }
        for at in stalled {
            self.close_slow_reader(at);
        }
        for (at, fatal) in failed {
            self.fail(at, &fatal, now);
        }
        self.flush(now);
    }

    /// Whether the connection's output is so long that its requests must wait.
    pub fn is_choked(&self, at: u32) -> bool {
        self.connections[at as usize].unsent() > self.options.output_bytes_max as usize
    }
}

/// Encrypted, and not yet so far that anything could be said.
fn connection_is_shaking_hands(connection: &Connection) -> bool {
    connection.tls.as_ref().is_some_and(|tls| !tls.is_established())
}

/// How long a frame of this size may take beyond the frame timeout: 16 KiB a second, or its sender is no caller.
fn at_slowest(bytes: usize) -> Duration {
    Duration::from_micros(bytes as u64 * 1_000_000 / (16 << 10))
}

/// What a read came to.
#[derive(Debug, PartialEq, Eq)]
pub enum ReadEnd {
    /// Bytes were taken; more may be there.
    Burst,
    /// The peer closed or the connection broke.
    Gone,
}

impl ReadEnd {
    pub(super) fn of(_end: std::io::Result<usize>) -> ReadEnd {
        ReadEnd::Gone
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::mailbox::mailbox;

    const MIB: usize = 1 << 20;

    fn state(output_bytes_total_max: u64) -> State {
        let options = Options { output_bytes_total_max, ..Options::unbounded() };
        State::new(0, options, Arc::new(Catalog::new(&[])), Telemetry::new(&[], 1, 1), mailbox(1).0, None)
    }

    /// A connection whose peer does not read, with something to say to it.
    fn lazy(state: &mut State, bytes: usize) -> (u32, [UnixStream; 2]) {
        let (ours, peer) = UnixStream::pair().expect("sockets");
        ours.set_nonblocking(true).expect("a socket option");
        let at = state.connections.insert(Connection::new(ours.as_raw_fd(), Moment(1))) as u32;
        state.output(at).out.end().resize(bytes, 7);
        state.flush(Moment(1));
        (at, [ours, peer])
    }

    fn slow_readers(state: &State) -> bool {
        state.telemetry.encode().contains("ferry_slow_readers_total{shard=\"0\"} 1\n")
    }

    #[test]
    fn when_unsent_answers_are_too_many_the_connection_with_the_most_is_closed() {
        let mut state = state(8 * MIB as u64);
        let (small, _small) = lazy(&mut state, 2 * MIB);
        let (large, _large) = lazy(&mut state, 5 * MIB);
        let (medium, _medium) = lazy(&mut state, 3 * MIB);
        let (prompt, _prompt) = lazy(&mut state, 100);
        let phase = |state: &State, at: u32| state.connections[at as usize].phase;
        assert_eq!(phase(&state, large), Phase::Closed);
        assert!(slow_readers(&state), "it is counted");
        assert!([small, medium, prompt].iter().all(|at| phase(&state, *at) != Phase::Closed));
        let left: usize = state.connections.iter().map(|(_, connection)| connection.unsent()).sum();
        assert_eq!(state.unsent, left as u64);
        assert!(left > 4 * MIB && left <= 5 * MIB, "what two of them have, less what their sockets took: {left}");
        // What is still answered to the one that is closed is written nowhere: its stream ends in the middle of a frame.
        state.output(large).out.end().resize(100, 7);
        state.flush(Moment(2));
        assert_eq!((state.connections[large as usize].unsent(), state.unsent), (0, left as u64));
        for at in [large, small, medium, prompt] {
            state.remove(at);
        }
        assert_eq!(state.unsent, 0);
    }

    /// Every time limit of a connection, a nanosecond before it, at it and behind it.
    #[test]
    fn each_time_limit_of_a_connection_holds_to_the_nanosecond() {
        let second = Duration::from_secs(1);
        let options = Options {
            hello_timeout: 3 * second,
            frame_timeout: 5 * second,
            idle_timeout: 300 * second,
            ..Options::unbounded()
        };
        type Prepare = fn(&mut Connection);
        let cases: [(&str, Duration, Prepare); 5] = [
            ("hello", 3 * second, |_| {}),
            ("header", 5 * second + at_slowest(32), |connection| {
                connection.phase = Phase::Open;
                connection.needed = 32;
            }),
            ("16 KiB a second", 6 * second, |connection| {
                connection.phase = Phase::Open;
                connection.needed = 16 << 10;
            }),
            ("16 MiB, of which the last read was just now", 1029 * second, |connection| {
                connection.phase = Phase::Open;
                connection.needed = 16 << 20;
                connection.read_at = Moment(1) + Duration::from_secs(1029);
            }),
            ("idle", 300 * second, |connection| connection.phase = Phase::Open),
        ];
        for (what, limit, prepare) in cases {
            let nano = Duration::from_nanos(1);
            for (after, closed) in [(limit - nano, false), (limit, false), (limit + nano, true)] {
                let catalog = Arc::new(Catalog::new(&[]));
                let telemetry = Telemetry::new(&[], 1, 1);
                let mut state = State::new(0, options.clone(), catalog, telemetry, mailbox(1).0, None);
                let (ours, _peer) = UnixStream::pair().expect("sockets");
                let at = state.connections.insert(Connection::new(ours.as_raw_fd(), Moment(1))) as u32;
                let before = {
                    let connection = &mut state.connections[at as usize];
                    prepare(connection);
                    // As granted by a hello: a smaller one would be raised, which is no silence.
                    connection.window_bytes = state.options.credit_bytes;
                    connection.phase
                };
                state.housekeep(Moment(1) + after);
                let phase = state.connections[at as usize].phase;
                assert_eq!(phase != before, closed, "{what}: {phase:?} after {after:?}");
            }
        }
    }

    #[test]
    fn a_reader_that_reads_on_makes_room_for_others() {
        let mut state = state(4 * MIB as u64);
        let (first, [_ours, mut peer]) = lazy(&mut state, 3 * MIB);
        peer.set_nonblocking(true).expect("a socket option");
        while state.connections[first as usize].unsent() > 0 {
            let _ = std::io::copy(&mut peer, &mut std::io::sink());
            assert_ne!(state.connections[first as usize].try_flush(Moment(2)), Flushed::Broken);
            state.recount(first);
        }
        let (second, _second) = lazy(&mut state, 3 * MIB);
        assert!([first, second].iter().all(|at| state.connections[*at as usize].phase != Phase::Closed));
        assert!(!slow_readers(&state));
    }
}
