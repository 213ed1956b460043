//! Sends requests over many connections from one thread, and counts what comes back.
//!
//! One loop: what is due joins the backlog; the backlog is sent as far as credit allows; sockets that have answers are
//! read; each connection's output leaves in one write. A closed loop is the same with arrivals made by answers.
//!
//! Always true
//! - Nothing is allocated and no lock is taken per request: requests live in a table of slots, and an id is
//!   `sequence << SLOT_BITS | slot`, so that ids increase and an answer finds its slot without a search.
//! - Latency runs from the intended moment, through the backlog, to the read that brought the answer.
//! - An answer to an id that is not in flight on its connection ends that connection and is reported.
//!
//! Elsewhere: when (arrivals.rs), what (payload.rs), whether answers are right (verify.rs).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::time::Duration;

use hdrhistogram::Histogram;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;

use super::arrivals::Schedule;
use super::payload::{Common, Inputs};
use super::report::{LatencyReport, Report, ServerReport};
use super::verify::{REFERENCES_MAX, Verifier, is_echo};
use super::{LoadError, LoadOptions, Mode};
use crate::client::connection::{open, send_error};
use crate::client::request::late_us;
use crate::client::session::{Event, ModelInfo, ServerStats, Window};
use crate::client::stream::Stream;
use crate::client::{Client, ClientError, ClientOptions};
use crate::clock;
use crate::vocab::{Code, Moment};
use crate::wire::decoder::Step;
use crate::wire::encoder::{Head, append_bare};
use crate::wire::message::{Credit, ErrorMessage, Goaway, InferResult, decode_exact};
use crate::wire::{Decoder, Frame, Kind, Limits};

const SLOT_BITS: u32 = 20;
const SLOT_MASK: u64 = (1 << SLOT_BITS) - 1;
/// The last index is never a slot: ids of questions about the connection itself carry it.
const SLOTS_MAX: usize = SLOT_MASK as usize;

/// Output is written when it has grown to this, even if there is more to send: the server can start on it.
const WRITE_AT: usize = 64 << 10;
/// A connection with more unwritten output than this gets no further requests: they would only look sent.
const OUTPUT_MAX: usize = 256 << 10;
const READ_SIZE: usize = 512 << 10;
/// Inputs are as many as asked for, or as fit into this, but never fewer than `INPUTS_MIN`.
const INPUTS_BYTES_MAX: usize = 64 << 20;
const INPUTS_MIN: usize = 16;
const LATE: u64 = 1_000_000;
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// How far a run is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Warm-up included.
    pub elapsed: Duration,
    pub total: Duration,
    pub answered: u64,
    pub in_flight: usize,
    pub backlog: usize,
}

struct Connection {
    stream: Stream,
    decoder: Decoder,
    window: Window,
    handle: u16,
    sequence: u64,
    /// Bytes of a frame that has not arrived in full.
    rest: Vec<u8>,
    output: Vec<u8>,
    written: usize,
    wants_write: bool,
    in_room: bool,
    in_dirty: bool,
    /// Takes no more requests: the server said goaway.
    leaving: bool,
    dead: bool,
}

impl Connection {
    fn takes(&self, bytes: u64) -> bool {
        !self.dead && !self.leaving && self.window.fits(bytes) && self.output.len() - self.written < OUTPUT_MAX
    }
}

#[derive(Clone, Copy, Default)]
struct Slot {
    /// 0 when the slot is free.
    id: u64,
    intended: u64,
    sent: u64,
    number: u64,
    entry: u32,
    connection: u32,
}

#[derive(Clone, Copy)]
struct Waiting {
    intended: u64,
    number: u64,
}

struct Tally {
    offered: u64,
    sent: u64,
    ok: u64,
    errors: [u64; Code::ALL.len()],
    lost: u64,
    unsent: u64,
    expired: u64,
    late: u64,
    /// Answers of any request, in the measured time.
    answered_in_time: u64,
    good_in_time: u64,
    tokens_in_time: u64,
    answered: u64,
    latency: Histogram<u64>,
    /// Sent to refused, of what the server had no room for.
    refusals: Histogram<u64>,
}

enum Source {
    Open {
        schedule: Schedule,
        next: u64,
    },
    Trace {
        at: usize,
    },
    /// When callers come back who were asked to rest; no more than there are callers.
    Closed {
        resting: BinaryHeap<Reverse<u64>>,
    },
}

struct Engine<'a> {
    options: &'a LoadOptions,
    inputs: &'a Inputs,
    verifier: Option<Verifier>,
    source: Source,
    connections: Vec<Connection>,
    /// Connections that may ever take a request again.
    usable: usize,
    /// Connections that may take a request, in turn.
    room: VecDeque<u32>,
    /// Connections with output that was not offered to the socket yet.
    dirty: Vec<u32>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    backlog: VecDeque<Waiting>,
    next_number: u64,
    epoll: Epoll,
    scratch: Vec<u8>,
    start: u64,
    warm_at: u64,
    end_at: u64,
    slo: u64,
    deadline: Option<u64>,
    tally: Tally,
    stats: Vec<ServerStats>,
    stats_asked: usize,
    stats_refused: usize,
    connections_lost: usize,
    connection_errors: Vec<String>,
}

/// Runs a load and reports on it. `progress` is called a few times per second.
pub fn run(options: &LoadOptions, mut progress: impl FnMut(&Progress)) -> Result<Report, LoadError> {
    check(options)?;
    let client_options = ClientOptions {
        tenant: options.tenant.clone(),
        token: options.token.clone(),
        tls: options.tls.clone(),
        ..ClientOptions::default()
    };
    let client = Client::connect(options.addr, client_options.clone())?;
    let model = client.model(&options.model)?;
    let inputs = make_inputs(options, &model)?;
    let verifier = match options.verify {
        None => None,
        Some(share) if is_echo(&model.contract) => Some(Verifier::of_echo(&inputs, share, options.seed)),
        Some(share) => Some(Verifier::of_model(&client, &model, &inputs, share, options.seed)?),
    };
    drop(client);

    let connections = (0..options.connections)
        .map(|_| connect(options, &client_options, &model, &inputs))
        .collect::<Result<Vec<_>, _>>()?;
    let mut engine = Engine::new(options, &inputs, verifier, connections)?;
    // The default lets the kernel wake us 50 µs late, which would be counted as the server's latency.
    let slack = nix::sys::prctl::get_timerslack().unwrap_or(50_000);
    let _ = nix::sys::prctl::set_timerslack(1);
    let result = engine.run(&mut progress);
    let _ = nix::sys::prctl::set_timerslack(slack as u64);
    let client_busy = result?;
    Ok(engine.report(&model, client_busy))
}

fn check(options: &LoadOptions) -> Result<(), LoadError> {
    let usage = |message: &str| Err(LoadError::Usage(message.into()));
    match &options.mode {
        Mode::Open { rate, .. } if !(*rate > 0.0 && rate.is_finite()) => return usage("the rate must be above 0"),
        Mode::Closed { callers: 0 } => return usage("the concurrency must be at least 1"),
        Mode::Closed { callers } if *callers as usize > SLOTS_MAX => {
            return usage("the concurrency must be below 1048576");
        }
        _ => {}
    }
    if options.connections == 0 {
        return usage("at least 1 connection is needed");
    }
    if options.duration.is_zero() {
        return usage("the duration must be above 0");
    }
    if options.verify.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
        return usage("the share to verify must be above 0 and at most 1");
    }
    Ok(())
}

fn make_inputs(options: &LoadOptions, model: &ModelInfo) -> Result<Inputs, LoadError> {
    let common =
        Common { handle: model.handle.0, priority: options.priority, has_deadline: options.deadline.is_some() };
    // References cost a run each, so there are fewer of them.
    let inputs_max = match options.verify {
        Some(_) if !is_echo(&model.contract) => options.inputs_max.min(REFERENCES_MAX),
        _ => options.inputs_max,
    }
    .max(1);
    let lens: Vec<u32> = match (&options.mode, &options.lengths) {
        (Mode::Trace(trace), _) => trace.arrivals.iter().map(|(_, len)| *len).collect(),
        (_, super::Lengths::List(lens)) => lens.clone(),
        (_, lengths) => {
            // Long rows fill memory before they fill the table.
            let mut bytes = 0;
            let row = |len| model.contract.inputs.iter().map(|spec| spec.row_bytes(len)).sum::<usize>();
            let drawn = lengths.sampler(options.seed).take(inputs_max).enumerate();
            let fitting = drawn.take_while(|(at, len)| {
                bytes += row((*len).min(model.contract.len_max()));
                *at < INPUTS_MIN || bytes <= INPUTS_BYTES_MAX
            });
            fitting.map(|(_, len)| len).collect()
        }
    };
    Inputs::new(&model.contract, lens, inputs_max, options.seed, common).map_err(LoadError::Usage)
}

/// Greets, learns the model's handle on this connection, and leaves the socket ready for the loop.
fn connect(
    options: &LoadOptions,
    client_options: &ClientOptions,
    model: &ModelInfo,
    inputs: &Inputs,
) -> Result<Connection, LoadError> {
    let (stream, mut session, mut rest) = open(options.addr, client_options)?;
    let io = |error: std::io::Error| LoadError::Client(ClientError::Connect(error.to_string()));
    let mut out = Vec::new();
    session.describe(&options.model, "", &mut out).map_err(send_error)?;
    stream.write_all(&out).map_err(io)?;
    let mut chunk = vec![0; 64 << 10];
    let mut described: Option<Result<u16, ClientError>> = None;
    let described = loop {
        let used = session
            .receive(&rest, |event| match event {
                Event::Described { model: found, .. } if found.contract_hash == model.contract_hash => {
                    described = Some(Ok(found.handle.0));
                }
                Event::Described { .. } => {
                    described =
                        Some(Err(ClientError::Protocol("the model's contract changed between connections".into())));
                }
                Event::Refused { refusal, .. } => described = Some(Err(ClientError::Refused(refusal))),
                Event::Goaway(goaway) => {
                    described = Some(Err(ClientError::Goaway {
                        code: Code::from_number(goaway.code),
                        message: goaway.message.clone(),
                    }));
                }
                _ => {}
            })
            .map_err(|error| ClientError::Protocol(error.0))?;
        rest.drain(..used);
        if let Some(described) = described.take() {
            break described;
        }
        match stream.read(&mut chunk).map_err(io)? {
            0 => {
                return Err(LoadError::Client(ClientError::Connect("the server closed the connection at once".into())));
            }
            count => rest.extend_from_slice(&chunk[..count]),
        }
    };
    let handle = described?;
    let window = session.window();
    let server = session.server().expect("open returns after the hello was answered");
    let payload_max = u64::from(server.payload_bytes_max).min(window.bytes_max);
    if inputs.payload_bytes_max() > payload_max || window.requests_max == 0 {
        return Err(LoadError::Usage(format!(
            "requests of {} payload bytes do not fit: the server grants {} requests and {payload_max} bytes",
            inputs.payload_bytes_max(),
            window.requests_max
        )));
    }
    stream.socket().set_nonblocking(true).map_err(io)?;
    Ok(Connection {
        stream,
        decoder: Decoder::new(Limits {
            metadata_bytes: Limits::METADATA_CEILING,
            payload_bytes: Limits::PAYLOAD_CEILING,
        }),
        window,
        handle,
        sequence: (session.last_id() >> SLOT_BITS) + 1,
        rest,
        output: Vec::with_capacity(OUTPUT_MAX),
        written: 0,
        wants_write: false,
        in_room: true,
        in_dirty: false,
        leaving: false,
        dead: false,
    })
}

impl<'a> Engine<'a> {
    fn new(
        options: &'a LoadOptions,
        inputs: &'a Inputs,
        verifier: Option<Verifier>,
        connections: Vec<Connection>,
    ) -> Result<Engine<'a>, LoadError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|error| LoadError::Io(error.to_string()))?;
        for (index, connection) in connections.iter().enumerate() {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
            epoll.add(&connection.stream, event).map_err(|error| LoadError::Io(error.to_string()))?;
        }
        let granted: usize = connections.iter().map(|connection| connection.window.requests_max as usize).sum();
        let slots = match options.mode {
            Mode::Closed { callers } => callers as usize,
            // Some more, because a server may raise its credit while the run goes on.
            _ => granted.saturating_mul(2),
        }
        .min(SLOTS_MAX);
        let start = clock::now().nanos();
        let warm_at = start + nanos(options.warmup);
        let deadline = options.deadline.map(nanos);
        let source = match &options.mode {
            Mode::Open { rate, arrival } => {
                let mut schedule = Schedule::new(*arrival, *rate, options.seed);
                let next = start + schedule.next().expect("a schedule is endless");
                Source::Open { schedule, next }
            }
            Mode::Trace(_) => Source::Trace { at: 0 },
            Mode::Closed { callers } => Source::Closed { resting: BinaryHeap::with_capacity(*callers as usize) },
        };
        let backlog_max = match options.mode {
            Mode::Closed { callers } => callers as usize,
            _ => options.backlog_max,
        };
        Ok(Engine {
            options,
            inputs,
            verifier,
            source,
            usable: connections.len(),
            room: (0..connections.len() as u32).collect(),
            dirty: Vec::with_capacity(connections.len()),
            connections,
            slots: vec![Slot::default(); slots],
            free: (0..slots as u32).rev().collect(),
            backlog: VecDeque::with_capacity(backlog_max),
            next_number: 0,
            epoll,
            scratch: vec![0; READ_SIZE],
            start,
            warm_at,
            end_at: warm_at.saturating_add(nanos(options.duration)),
            slo: options.slo.map(nanos).or(deadline).unwrap_or(u64::MAX),
            deadline,
            tally: Tally {
                offered: 0,
                sent: 0,
                ok: 0,
                errors: [0; Code::ALL.len()],
                lost: 0,
                unsent: 0,
                expired: 0,
                late: 0,
                answered_in_time: 0,
                good_in_time: 0,
                tokens_in_time: 0,
                answered: 0,
                // One second of memory is 270 kB; ten minutes are the longest latency that is told apart.
                latency: Histogram::new_with_bounds(1, 600_000_000_000, 3).expect("the bounds are valid"),
                refusals: Histogram::new_with_bounds(1, 600_000_000_000, 3).expect("the bounds are valid"),
            },
            stats: Vec::new(),
            stats_asked: 0,
            stats_refused: 0,
            connections_lost: 0,
            connection_errors: Vec::new(),
        })
    }

    /// The whole run. Returns the share of a core that it used.
    fn run(&mut self, progress: &mut dyn FnMut(&Progress)) -> Result<f64, LoadError> {
        let cpu_before = thread_cpu();
        let mut events = vec![EpollEvent::empty(); self.connections.len().clamp(1, 256)];
        let mut now = self.start;
        let mut progress_at = now;
        let drain_until = self.end_at.saturating_add(nanos(self.options.drain_max));
        if let Mode::Closed { callers } = self.options.mode {
            (0..callers).for_each(|_| self.arrive(now));
        }
        loop {
            if self.stats_asked == 0 && now >= self.warm_at {
                self.ask_stats();
            }
            let ended = now >= self.end_at;
            self.take_due(now.min(self.end_at - 1));
            if ended && self.stats_asked == 1 {
                self.ask_stats();
                if matches!(self.source, Source::Closed { .. }) {
                    self.backlog.clear(); // their callers have gone home
                }
            }
            self.expire(now);
            self.dispatch(now);
            self.flush_dirty();
            if now >= progress_at {
                progress_at = now + nanos(PROGRESS_EVERY);
                progress(&self.progress(now));
            }
            let in_flight = self.slots.len() - self.free.len();
            let done = ended
                && in_flight == 0
                && self.backlog.is_empty()
                && self.stats.len() + self.stats_refused == self.stats_asked;
            let is_alone = self.usable == 0 && in_flight == 0;
            if done || is_alone || now >= drain_until {
                break;
            }
            let wake_at = self.wake_at(now, ended, drain_until).min(progress_at.max(now + 1));
            self.wait(&mut events, now, wake_at)?;
            now = clock::now().nanos();
        }
        self.close(now);
        let elapsed = (now - self.start) as f64 / 1e9;
        Ok((thread_cpu() - cpu_before) / elapsed.max(1e-9))
    }

    fn progress(&self, now: u64) -> Progress {
        Progress {
            elapsed: Duration::from_nanos(now - self.start),
            total: Duration::from_nanos(self.end_at - self.start),
            answered: self.tally.answered,
            in_flight: self.slots.len() - self.free.len(),
            backlog: self.backlog.len(),
        }
    }

    fn is_measured(&self, intended: u64) -> bool {
        intended >= self.warm_at && intended < self.end_at
    }

    /// Puts everything that is due by `until` into the backlog.
    fn take_due(&mut self, until: u64) {
        loop {
            let due = match &mut self.source {
                Source::Open { schedule, next } if *next <= until => {
                    let due = *next;
                    *next = self.start + schedule.next().expect("a schedule is endless");
                    due
                }
                Source::Trace { at } => {
                    let Mode::Trace(trace) = &self.options.mode else { unreachable!("the source follows the mode") };
                    match trace.arrivals.get(*at) {
                        Some((offset, _)) if self.start + offset <= until => {
                            *at += 1;
                            self.start + offset
                        }
                        _ => return,
                    }
                }
                Source::Closed { resting } => match resting.peek() {
                    Some(Reverse(at)) if *at <= until => resting.pop().expect("there is one").0,
                    _ => return,
                },
                Source::Open { .. } => return,
            };
            self.arrive(due);
        }
    }

    fn arrive(&mut self, intended: u64) {
        let number = self.next_number;
        self.next_number += 1;
        let is_measured = self.is_measured(intended);
        self.tally.offered += u64::from(is_measured);
        if self.backlog.len() < self.backlog.capacity() {
            self.backlog.push_back(Waiting { intended, number });
        } else {
            self.tally.unsent += u64::from(is_measured);
        }
    }

    /// Sends from the backlog as far as credit, slots and sockets allow.
    ///
    /// Hot: once per request. Guarded by benches/echo_path.rs.
    fn dispatch(&mut self, mut now: u64) {
        let mut turns = 0u32;
        while let Some(waiting) = self.backlog.front().copied() {
            let (Some(index), Some(slot)) = (self.room.front().copied(), self.free.last().copied()) else { return };
            let entry = self.inputs.of_request(waiting.number);
            let bytes = self.inputs.payload_bytes(entry);
            let connection = &mut self.connections[index as usize];
            if !connection.takes(bytes) {
                connection.in_room = false;
                self.room.pop_front();
                continue;
            }
            self.backlog.pop_front();
            // At least 1, because 0 stands for no deadline.
            let deadline_us = match self.deadline {
                None => 0,
                Some(deadline) => ((waiting.intended + deadline).saturating_sub(now) / 1000).max(1),
            };
            // A caller that waits for answers has no moment at which it meant to send.
            let late_us = match self.source {
                Source::Closed { .. } => 0,
                _ => late_us(Duration::from_nanos(now.saturating_sub(waiting.intended))),
            };
            self.free.pop();
            let id = connection.sequence << SLOT_BITS | u64::from(slot);
            connection.sequence += 1;
            connection.window.take(bytes);
            self.inputs.append(entry, id, connection.handle, [deadline_us, late_us], &mut connection.output);
            self.slots[slot as usize] =
                Slot { id, intended: waiting.intended, sent: now, number: waiting.number, entry, connection: index };
            if !connection.in_dirty {
                connection.in_dirty = true;
                self.dirty.push(index);
            }
            let flush_now = connection.output.len() - connection.written >= WRITE_AT;
            if self.is_measured(waiting.intended) {
                self.tally.sent += 1;
                self.tally.late += u64::from(now.saturating_sub(waiting.intended) > LATE);
            }
            if flush_now {
                self.flush(index);
            }
            if self.room.len() > 1 {
                self.room.rotate_left(1);
            }
            turns += 1;
            if turns.is_multiple_of(256) {
                now = clock::now().nanos();
            }
        }
    }

    /// Ends requests whose deadline passed in the backlog: their callers gave up before anything was sent.
    fn expire(&mut self, now: u64) {
        let Some(deadline) = self.deadline else { return };
        // Oldest first, and all have the same time: the first that lives is followed by others that do.
        while let Some(waiting) = self.backlog.front().copied().filter(|waiting| waiting.intended + deadline <= now) {
            self.backlog.pop_front();
            if self.is_measured(waiting.intended) {
                self.tally.expired += 1;
                self.tally.errors[Code::DeadlineExceeded as usize] += 1;
            }
            self.next_of_caller(0, now);
        }
    }

    /// Whoever's request has ended sends its next one, behind a rest of so many ns.
    fn next_of_caller(&mut self, rest: u64, now: u64) {
        let Source::Closed { resting } = &mut self.source else { return };
        let next = now.saturating_add(rest);
        if next < self.end_at && rest > 0 {
            resting.push(Reverse(next));
        } else if next < self.end_at {
            self.arrive(now);
        }
    }

    fn flush_dirty(&mut self) {
        while let Some(index) = self.dirty.pop() {
            self.connections[index as usize].in_dirty = false;
            self.flush(index);
        }
    }

    fn flush(&mut self, index: u32) {
        let connection = &mut self.connections[index as usize];
        if connection.dead {
            return;
        }
        let mut failed = None;
        while connection.written < connection.output.len() {
            match connection.stream.write_at_once(&connection.output[connection.written..]) {
                Ok(0) => {}
                Ok(count) => {
                    connection.written += count;
                    continue;
                }
                Err(error) => failed = Some(format!("writing failed: {error}")),
            }
            break;
        }
        let pending = connection.stream.has_pending();
        if pending && connection.written == connection.output.len() && failed.is_none() {
            failed = connection.stream.write_at_once(&[]).err().map(|error| format!("writing failed: {error}"));
        }
        let is_blocked = connection.written < connection.output.len() || pending && connection.stream.has_pending();
        if connection.written == connection.output.len() {
            connection.output.clear();
            connection.written = 0;
        } else if connection.written > OUTPUT_MAX {
            connection.output.drain(..connection.written);
            connection.written = 0;
        }
        if is_blocked != connection.wants_write && failed.is_none() {
            connection.wants_write = is_blocked;
            let flags = match is_blocked {
                true => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
                false => EpollFlags::EPOLLIN,
            };
            let mut event = EpollEvent::new(flags, u64::from(index));
            if let Err(error) = self.epoll.modify(&connection.stream, &mut event) {
                failed = Some(format!("waiting for the socket failed: {error}"));
            }
        }
        match failed {
            Some(reason) => self.lose(index, reason),
            None => self.make_room(index),
        }
    }

    /// Puts a connection back in turn. Whether it really takes something is asked when it is its turn.
    fn make_room(&mut self, index: u32) {
        let connection = &mut self.connections[index as usize];
        if !connection.in_room && connection.takes(0) {
            connection.in_room = true;
            self.room.push_back(index);
        }
    }

    fn wake_at(&self, now: u64, ended: bool, drain_until: u64) -> u64 {
        if ended {
            return drain_until;
        }
        let phase = if now < self.warm_at { self.warm_at } else { self.end_at };
        let arrival = match &self.source {
            Source::Open { next, .. } => *next,
            Source::Trace { at } => match &self.options.mode {
                Mode::Trace(trace) => trace.arrivals.get(*at).map_or(u64::MAX, |(offset, _)| self.start + offset),
                _ => u64::MAX,
            },
            Source::Closed { resting } => resting.peek().map_or(u64::MAX, |Reverse(at)| *at),
        };
        phase.min(arrival)
    }

    /// Waits until a socket is ready or the moment has come, and handles what is ready.
    fn wait(&mut self, events: &mut [EpollEvent], now: u64, wake_at: u64) -> Result<(), LoadError> {
        let io = |error: nix::Error| LoadError::Io(format!("waiting for sockets failed: {error}"));
        let left = wake_at.saturating_sub(now);
        // epoll waits in milliseconds, arrivals come in between: those waits go through ppoll on the epoll itself.
        let is_precise = !matches!(self.source, Source::Closed { .. }) && left > 0;
        let timeout = match is_precise || left == 0 {
            true => EpollTimeout::ZERO,
            false => EpollTimeout::from(left.div_ceil(1_000_000).min(60_000) as u16),
        };
        if is_precise {
            let mut fds = [PollFd::new(self.epoll.0.as_fd(), PollFlags::POLLIN)];
            match ppoll(&mut fds, Some(TimeSpec::from_duration(Duration::from_nanos(left))), None) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(nix::Error::EINTR) => return Ok(()),
                Err(error) => return Err(io(error)),
            }
        }
        let count = match self.epoll.wait(events, timeout) {
            Ok(count) => count,
            Err(nix::Error::EINTR) => 0,
            Err(error) => return Err(io(error)),
        };
        for event in &events[..count] {
            let index = event.data() as u32;
            if event.events().contains(EpollFlags::EPOLLOUT) {
                self.flush(index);
            }
            if event.events().intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
                self.receive(index);
                // What was decrypted already makes no socket readable.
                while !self.connections[index as usize].dead && self.connections[index as usize].stream.has_more() {
                    self.receive(index);
                }
            }
        }
        Ok(())
    }

    fn receive(&mut self, index: u32) {
        let mut scratch = std::mem::take(&mut self.scratch);
        let connection = &mut self.connections[index as usize];
        if connection.dead {
            self.scratch = scratch;
            return;
        }
        let held = connection.rest.len();
        if scratch.len() < held + READ_SIZE / 2 {
            scratch.resize(held + READ_SIZE, 0);
        }
        scratch[..held].copy_from_slice(&connection.rest);
        let read = connection.stream.read(&mut scratch[held..]);
        let (len, mut failed) = match read {
            Ok(0) => (held, Some("the server closed the connection".to_owned())),
            Ok(count) => (held + count, None),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => (held, None),
            Err(error) => (held, Some(format!("reading failed: {error}"))),
        };
        let now = clock::now().nanos();
        let mut at = 0;
        while at < len && failed.is_none() {
            match self.connections[index as usize].decoder.next(&scratch[at..len]) {
                Ok(Step::Frame(frame)) => {
                    failed = self.frame(index, &frame, &scratch[at..at + frame.len], now).err();
                    at += frame.len;
                }
                Ok(Step::Skip { len }) => at += len,
                Ok(Step::Incomplete { .. }) => break,
                Err(error) => failed = Some(format!("the server broke the protocol: {error}")),
            }
        }
        let connection = &mut self.connections[index as usize];
        connection.rest.clear();
        connection.rest.extend_from_slice(&scratch[at..len]);
        self.scratch = scratch;
        match failed {
            Some(reason) => self.lose(index, reason),
            None => self.make_room(index),
        }
    }

    /// Handles one frame. Hot: once per answer. Guarded by benches/echo_path.rs.
    fn frame(&mut self, index: u32, frame: &Frame, bytes: &[u8], now: u64) -> Result<(), String> {
        let id = frame.header.request_id;
        match frame.kind {
            Kind::Result => {
                let slot = self.free_slot(index, id)?;
                let mut code = Code::Ok;
                if !frame.payload_is_intact(bytes) {
                    code = Code::ChecksumMismatch;
                } else if let Some(verifier) = &mut self.verifier {
                    let result: InferResult = decode_exact(frame.metadata(bytes)).map_err(|error| error.message)?;
                    verifier.check(slot.number, slot.entry, &result, frame.payload(bytes));
                }
                self.finish(&slot, code, 0, now);
            }
            // Whoever may only ask does without the server's counters.
            Kind::Error if id & SLOT_MASK == SLOT_MASK => self.stats_refused += 1,
            Kind::Error => {
                let slot = self.free_slot(index, id)?;
                let error: ErrorMessage = decode_exact(frame.metadata(bytes)).map_err(|error| error.message)?;
                let code =
                    Code::from_number(error.code).ok_or_else(|| format!("an error of unknown code {}", error.code))?;
                self.finish(&slot, code, u64::from(error.retry_after_ms) * 1_000_000, now);
            }
            Kind::Credit => {
                let credit: Credit = decode_exact(frame.metadata(bytes)).map_err(|error| error.message)?;
                self.connections[index as usize].window.replace(credit);
            }
            Kind::StatsReply => {
                let stats = serde_json::from_slice(frame.payload(bytes));
                self.stats.push(stats.map_err(|error| format!("the server's counters are not as expected: {error}"))?);
            }
            Kind::Goaway => {
                let goaway: Goaway = decode_exact(frame.metadata(bytes)).map_err(|error| error.message)?;
                self.leave(index, &goaway, now);
            }
            kind => return Err(format!("the server sent a frame of kind {kind:?} that nobody asked for")),
        }
        Ok(())
    }

    /// Takes the request that `id` names out of its slot and gives its credit back.
    fn free_slot(&mut self, index: u32, id: u64) -> Result<Slot, String> {
        let at = (id & SLOT_MASK) as usize;
        match self.slots.get(at) {
            Some(slot) if slot.id == id && slot.connection == index && id != 0 => {
                let slot = *slot;
                self.slots[at].id = 0;
                self.free.push(at as u32);
                let bytes = self.inputs.payload_bytes(slot.entry);
                self.connections[index as usize].window.give_back(bytes);
                Ok(slot)
            }
            _ => Err(format!("the server answered request {id}, which was not waiting for an answer")),
        }
    }

    /// A request has its answer, which asks the caller to rest for so many ns.
    fn finish(&mut self, slot: &Slot, code: Code, rest: u64, now: u64) {
        let latency = now.saturating_sub(slot.intended);
        self.tally.answered += 1;
        if code == Code::Ok && now >= self.warm_at && now < self.end_at {
            self.tally.answered_in_time += 1;
            self.tally.good_in_time += u64::from(latency <= self.slo);
            self.tally.tokens_in_time += u64::from(self.inputs.entry(slot.entry).len);
        }
        if self.is_measured(slot.intended) {
            match code {
                Code::Ok => {
                    self.tally.ok += 1;
                    self.tally.latency.saturating_record(latency);
                }
                code => {
                    self.tally.errors[code as usize] += 1;
                    if matches!(code, Code::Overloaded | Code::QuotaExceeded) {
                        self.tally.refusals.saturating_record(now.saturating_sub(slot.sent));
                    }
                }
            }
        }
        self.next_of_caller(if self.options.impatient { 0 } else { rest }, now);
    }

    /// The server takes nothing more on this connection: requests it did not take have ended, the others go on.
    fn leave(&mut self, index: u32, goaway: &Goaway, now: u64) {
        let code = Code::from_number(goaway.code).unwrap_or(Code::Draining);
        let was_leaving = std::mem::replace(&mut self.connections[index as usize].leaving, true);
        self.usable -= usize::from(!was_leaving);
        self.note(format!("the server said goaway ({code}): {}", goaway.message));
        for at in 0..self.slots.len() {
            let slot = self.slots[at];
            if slot.id > goaway.last_accepted_id && slot.connection == index {
                let slot = self.free_slot(index, slot.id).expect("it was just found");
                self.finish(&slot, code, 0, now);
            }
        }
    }

    /// Ends a connection. What was in flight on it is lost.
    fn lose(&mut self, index: u32, reason: String) {
        let connection = &mut self.connections[index as usize];
        if std::mem::replace(&mut connection.dead, true) {
            return;
        }
        self.usable -= usize::from(!connection.leaving);
        // Fails only for a socket that is no longer watched, which is what we want.
        let _ = self.epoll.delete(&connection.stream);
        connection.stream.shutdown();
        // A connection that ends behind its goaway, with everything answered, ended as announced.
        let was_announced = connection.leaving && connection.window.requests == 0;
        if !was_announced {
            self.connections_lost += 1;
            self.note(reason);
        }
        let now = clock::now().nanos();
        for at in 0..self.slots.len() {
            let slot = self.slots[at];
            if slot.id != 0 && slot.connection == index {
                self.free_slot(index, slot.id).expect("it was just found");
                self.tally.lost += u64::from(self.is_measured(slot.intended));
                self.next_of_caller(0, now);
            }
        }
    }

    fn note(&mut self, reason: String) {
        if self.connection_errors.len() < 4 {
            self.connection_errors.push(reason);
        }
    }

    fn ask_stats(&mut self) {
        let Some(index) = self.connections.iter().position(|connection| !connection.dead && !connection.leaving) else {
            return;
        };
        let connection = &mut self.connections[index];
        let id = connection.sequence << SLOT_BITS | SLOT_MASK;
        connection.sequence += 1;
        let head = Head { kind: Kind::Stats, model: crate::vocab::ModelHandle(0), request_id: id };
        append_bare(&mut connection.output, head);
        self.stats_asked += 1;
        self.flush(index as u32);
    }

    /// Counts what is still missing when the run is over.
    fn close(&mut self, now: u64) {
        for slot in &self.slots {
            if slot.id != 0 && self.is_measured(slot.intended) {
                self.tally.lost += 1;
            }
        }
        if !matches!(self.source, Source::Closed { .. }) {
            let unsent = self.backlog.iter().filter(|waiting| self.is_measured(waiting.intended)).count();
            self.tally.unsent += unsent as u64;
        }
        self.end_at = self.end_at.min(now.max(self.warm_at + 1));
    }

    fn report(self, model: &ModelInfo, client_busy: f64) -> Report {
        let duration_s = (self.end_at - self.warm_at) as f64 / 1e9;
        let tally = self.tally;
        let errors = Code::ALL
            .iter()
            .filter(|code| tally.errors[**code as usize] > 0)
            .map(|code| (code.name().to_owned(), tally.errors[*code as usize]))
            .collect();
        let server = match &self.stats[..] {
            [before, after] => Some(ServerReport::between(before, after, &model.contract.name)),
            _ => None,
        };
        let (verified, mismatches, mismatch_examples) = self
            .verifier
            .map_or((0, 0, Vec::new()), |verifier| (verifier.verified, verifier.mismatches, verifier.examples));
        Report {
            model: model.contract.name.clone(),
            mode: match &self.options.mode {
                Mode::Open { arrival, .. } => format!("open {}", arrival.name()),
                Mode::Closed { .. } => "closed".into(),
                Mode::Trace(_) => "trace".into(),
            },
            connections: self.connections.len(),
            concurrency: match self.options.mode {
                Mode::Closed { callers } => Some(callers),
                _ => None,
            },
            seed: self.options.seed,
            duration_s,
            offered_rps: tally.offered as f64 / duration_s,
            sent: tally.sent,
            ok: tally.ok,
            errors,
            lost: tally.lost,
            unsent: tally.unsent,
            expired_before_send: tally.expired,
            late_sends: tally.late,
            goodput_rps: tally.good_in_time as f64 / duration_s,
            throughput_rps: tally.answered_in_time as f64 / duration_s,
            tokens_per_s: tally.tokens_in_time as f64 / duration_s,
            latency_us: LatencyReport::of(&tally.latency),
            refusal_us: LatencyReport::of(&tally.refusals),
            slo_ms: self.options.slo.map(|slo| slo.as_secs_f64() * 1e3),
            server,
            verified,
            mismatches,
            mismatch_examples,
            inputs_distinct: self.inputs.len(),
            lengths_clipped: self.inputs.clipped,
            connections_lost: self.connections_lost,
            connection_errors: self.connection_errors,
            client_busy,
            histogram: tally.latency,
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    (Moment::ZERO + duration).nanos()
}

/// Processor time of this thread in seconds.
fn thread_cpu() -> f64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID);
    time.map_or(0.0, |time| Duration::from(time).as_secs_f64())
}
