//! A connection that any number of threads share: blocking calls, handles to wait on, and futures.
//!
//! One thread reads. Whoever has something to send writes it at once, together with what others left meanwhile, so
//! there is no writer thread to wake and a burst from many threads leaves in few writes. The reader never writes:
//! a server that waits for us to read can not be waiting for ever.
//!
//! Always true
//! - Bytes reach the socket in the order of their ids: both are given out under one lock.
//! - A waiter is completed by whoever took it out of the table, and after the lock was released: a waker may do anything.
//! - When the connection ends, every waiter is completed; nothing is added to the table afterwards.
//!
//! Elsewhere: the protocol (session.rs).

use std::collections::HashMap;
use std::future::Future;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::Duration;

use super::ClientError;
use super::request::{Request, Response};
use super::session::{Event, ModelEntry, ModelInfo, SendError, ServerStats, Session, SessionOptions, Window};
use crate::clock;
use crate::vocab::{Code, Executed, Moment};
use crate::wire::Limits;
use crate::wire::message::{Goaway, HelloAck};

/// How to connect, and how long to wait for what.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Whose quota the connection counts against; empty for the default tenant.
    pub tenant: String,
    /// Empty where the server uses no authentication.
    pub token: Vec<u8>,
    /// Longest wait for a connection, and again for the server's hello.
    pub connect_timeout: Duration,
    /// Longest time a write may make no progress; then the connection counts as lost.
    pub write_timeout: Duration,
    /// Longest wait for what answers at once: contracts, counters, pings.
    pub control_timeout: Duration,
    /// The server ends a request at its deadline and says where it was. This much later the client gives up by itself.
    pub deadline_grace: Duration,
    /// Largest payload of one answer.
    pub payload_bytes_max: u32,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            tenant: String::new(),
            token: Vec::new(),
            connect_timeout: Duration::from_secs(5),
            write_timeout: Duration::from_secs(10),
            control_timeout: Duration::from_secs(10),
            deadline_grace: Duration::from_millis(200),
            payload_bytes_max: Limits::PAYLOAD_CEILING,
        }
    }
}

/// How often an idle reader looks for waiters whose deadline passed. A bound on how late they are told, no more.
const EXPIRY_TICK: Duration = Duration::from_millis(50);

/// What a waiter may be told.
enum Answer {
    /// Boxed: a slot lives as long as its request, and most of that time it is empty.
    Response(Box<Response>),
    Model(Arc<ModelInfo>),
    Models(Vec<ModelEntry>),
    Stats(ServerStats),
    Pong,
}

type Outcome = Result<Answer, ClientError>;

/// Where one outcome is put and picked up.
#[derive(Default)]
struct Slot {
    state: Mutex<SlotState>,
    filled: Condvar,
}

#[derive(Default)]
enum SlotState {
    #[default]
    Empty,
    Watched(Waker),
    Filled(Outcome),
    Taken,
}

impl Slot {
    fn fill(&self, outcome: Outcome) {
        let before = {
            let mut state = lock(&self.state);
            debug_assert!(
                matches!(*state, SlotState::Empty | SlotState::Watched(_)),
                "whoever takes a waiter out of the table is the only one to fill it"
            );
            std::mem::replace(&mut *state, SlotState::Filled(outcome))
        };
        self.filled.notify_all();
        if let SlotState::Watched(waker) = before {
            waker.wake();
        }
    }

    fn take(state: &mut SlotState) -> Option<Outcome> {
        match std::mem::replace(state, SlotState::Taken) {
            SlotState::Filled(outcome) => Some(outcome),
            other => {
                *state = other;
                None
            }
        }
    }

    fn wait(&self, until: Moment) -> Option<Outcome> {
        let mut state = lock(&self.state);
        loop {
            if let Some(outcome) = Slot::take(&mut state) {
                return Some(outcome);
            }
            if until == Moment::FAR {
                state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let left = until.since(clock::now());
            if left.is_zero() {
                return None;
            }
            state = self.filled.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn is_done(&self) -> bool {
        matches!(*lock(&self.state), SlotState::Filled(_) | SlotState::Taken)
    }
}

struct Waiter {
    slot: Arc<Slot>,
    /// Of an infer: what its response will be read by.
    model: Option<Arc<ModelInfo>>,
    expires: Moment,
}

struct State {
    session: Session,
    out: Vec<u8>,
    /// The buffer that is not being filled, kept for its capacity.
    spare: Vec<u8>,
    writing: bool,
    /// Ids up to here may have left this process.
    written_to: u64,
    waiters: HashMap<u64, Waiter>,
    credit_waiters: usize,
    /// Why the connection ended.
    ended: Option<String>,
}

struct Shared {
    state: Mutex<State>,
    /// Credit came back, or the connection ended.
    changed: Condvar,
    stream: TcpStream,
    options: ClientOptions,
}

/// Locks of this file guard plain data that is consistent between statements, so a panic of another holder is no reason
/// to fail every thread.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection to a server. Share it by reference or in an `Arc`; dropping it ends what is still pending.
pub struct Client {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client {
    /// Connects and greets. Tries each address that `addr` resolves to.
    pub fn connect(addr: impl ToSocketAddrs, options: ClientOptions) -> Result<Client, ClientError> {
        let (stream, session, rest) = open(addr, &options)?;
        let io = |error: std::io::Error| ClientError::Connect(error.to_string());
        stream.set_read_timeout(Some(EXPIRY_TICK)).map_err(io)?;
        stream.set_write_timeout(Some(options.write_timeout)).map_err(io)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                session,
                out: Vec::new(),
                spare: Vec::new(),
                writing: false,
                written_to: 0,
                waiters: HashMap::new(),
                credit_waiters: 0,
                ended: None,
            }),
            changed: Condvar::new(),
            stream,
            options,
        });
        let reader = {
            let shared = shared.clone();
            std::thread::Builder::new().name("ferry-client".into()).spawn(move || shared.read_all(rest)).map_err(io)?
        };
        Ok(Client { shared, reader: Some(reader) })
    }

    /// What the server said about itself.
    pub fn server(&self) -> HelloAck {
        lock(&self.shared.state).session.server().cloned().expect("connect returns after the hello was answered")
    }

    /// What may be in flight, and what is.
    pub fn window(&self) -> Window {
        lock(&self.shared.state).session.window()
    }

    /// Runs a request and waits for its end.
    pub fn infer(&self, request: &Request) -> Result<Response, ClientError> {
        self.submit(request)?.wait()
    }

    /// Sends a request. Waits while the server allows no more in flight, at most until the request's deadline.
    pub fn submit(&self, request: &Request) -> Result<Pending, ClientError> {
        self.start(request, true)
    }

    /// Sends a request, or says `NoCredit` at once. May still ask for the contract of a model that was not used before.
    pub fn try_submit(&self, request: &Request) -> Result<Pending, ClientError> {
        self.start(request, false)
    }

    /// A model's handle and contract. Asked once per model and connection.
    pub fn model(&self, name: &str) -> Result<Arc<ModelInfo>, ClientError> {
        self.model_version(name, "")
    }

    pub fn model_version(&self, name: &str, version: &str) -> Result<Arc<ModelInfo>, ClientError> {
        if name.is_empty() {
            return Err(ClientError::Usage("a model has a name".into()));
        }
        if let Some(model) = lock(&self.shared.state).session.known_model(name, version) {
            return Ok(model);
        }
        match self.ask(|session, out| session.describe(name, version, out))? {
            Answer::Model(model) => Ok(model),
            _ => unreachable!("the session answers a describe with a description"),
        }
    }

    /// All models of the server.
    pub fn models(&self) -> Result<Vec<ModelEntry>, ClientError> {
        match self.ask(|session, out| session.describe("", "", out))? {
            Answer::Models(models) => Ok(models),
            _ => unreachable!("the session answers a list with a list"),
        }
    }

    /// The server's counters.
    pub fn stats(&self) -> Result<ServerStats, ClientError> {
        match self.ask(Session::stats)? {
            Answer::Stats(stats) => Ok(stats),
            _ => unreachable!("the session answers stats with stats"),
        }
    }

    /// Time there and back.
    pub fn ping(&self) -> Result<Duration, ClientError> {
        let before = clock::now();
        self.ask(Session::ping).map(|_| clock::now().since(before))
    }

    /// Sends a question that needs no credit and waits for its answer.
    fn ask(
        &self,
        send: impl FnOnce(&mut Session, &mut Vec<u8>) -> Result<u64, SendError>,
    ) -> Result<Answer, ClientError> {
        let until = clock::now() + self.shared.options.control_timeout;
        let slot = Arc::new(Slot::default());
        let mut state = lock(&self.shared.state);
        state.check_alive()?;
        let State { session, out, .. } = &mut *state;
        let id = send(session, out).map_err(send_error)?;
        state.waiters.insert(id, Waiter { slot: slot.clone(), model: None, expires: Moment::FAR });
        self.shared.flush(state);
        slot.wait(until).unwrap_or_else(|| {
            lock(&self.shared.state).waiters.remove(&id);
            Err(ClientError::DeadlineExceeded { executed: Executed::Maybe })
        })
    }

    fn start(&self, request: &Request, wait: bool) -> Result<Pending, ClientError> {
        let deadline = request.time_allowed().map_or(Moment::FAR, |allowed| clock::now() + allowed);
        let model = self.model_version(request.model_name(), request.version_name())?;
        let slot = Arc::new(Slot::default());
        let mut state = lock(&self.shared.state);
        loop {
            state.check_alive()?;
            let remaining = match deadline {
                Moment::FAR => None,
                deadline => match deadline.since(clock::now()) {
                    Duration::ZERO => return Err(ClientError::DeadlineExceeded { executed: Executed::Never }),
                    left => Some(left),
                },
            };
            let State { session, out, .. } = &mut *state;
            match session.infer(&model, request, remaining, out) {
                Ok(id) => {
                    let expires = match deadline {
                        Moment::FAR => Moment::FAR,
                        deadline => deadline + self.shared.options.deadline_grace,
                    };
                    state.waiters.insert(id, Waiter { slot: slot.clone(), model: Some(model), expires });
                    self.shared.flush(state);
                    return Ok(Pending { id, slot, shared: self.shared.clone() });
                }
                Err(SendError::NoCredit) if wait => {
                    state.credit_waiters += 1;
                    state = match remaining {
                        None => self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                        Some(left) => {
                            let waited = self.shared.changed.wait_timeout(state, left);
                            waited.unwrap_or_else(PoisonError::into_inner).0
                        }
                    };
                    state.credit_waiters -= 1;
                }
                Err(error) => return Err(send_error(error)),
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.end("the client was dropped");
        if let Some(reader) = self.reader.take() {
            // A panic of the reader was a bug and has already ended all waiters' hopes; there is nothing to add here.
            let _ = reader.join();
        }
    }
}

/// Connects, sends the hello and waits for its answer. What arrived behind that is given back too. The stream blocks.
pub(crate) fn open(
    addr: impl ToSocketAddrs,
    options: &ClientOptions,
) -> Result<(TcpStream, Session, Vec<u8>), ClientError> {
    let io = |error: std::io::Error| ClientError::Connect(error.to_string());
    let mut last = None;
    let mut stream = None;
    for addr in addr.to_socket_addrs().map_err(io)? {
        match TcpStream::connect_timeout(&addr, options.connect_timeout) {
            Ok(connected) => {
                stream = Some(connected);
                break;
            }
            Err(error) => last = Some(error),
        }
    }
    let mut stream = stream.ok_or_else(|| {
        ClientError::Connect(last.map_or("the address resolves to nothing".into(), |error| error.to_string()))
    })?;
    stream.set_nodelay(true).map_err(io)?;
    stream.set_read_timeout(Some(options.connect_timeout)).map_err(io)?;
    stream.set_write_timeout(Some(options.write_timeout)).map_err(io)?;

    let mut out = Vec::new();
    let session_options = SessionOptions {
        tenant: options.tenant.clone(),
        token: options.token.clone(),
        payload_bytes_max: options.payload_bytes_max,
        ..SessionOptions::default()
    };
    let mut session = Session::new(&session_options, &mut out).map_err(send_error)?;
    stream.write_all(&out).map_err(io)?;

    let mut rest = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let used = session.receive(&rest, |_| ()).map_err(|error| ClientError::Protocol(error.0))?;
        rest.drain(..used);
        if let Some(goaway) = session.goaway() {
            return Err(goaway_error(goaway));
        }
        if session.server().is_some() {
            return Ok((stream, session, rest));
        }
        match stream.read(&mut chunk) {
            Ok(0) => return Err(ClientError::Connect("the server closed the connection during the hello".into())),
            Ok(count) => rest.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(ClientError::Connect(format!(
                    "no hello from the server within {:?}",
                    options.connect_timeout
                )));
            }
            Err(error) => return Err(io(error)),
        }
    }
}

fn goaway_error(goaway: &Goaway) -> ClientError {
    ClientError::Goaway { code: Code::from_number(goaway.code), message: goaway.message.clone() }
}

pub(crate) fn send_error(error: SendError) -> ClientError {
    match error {
        SendError::NotReady => ClientError::Protocol("a request before the hello".into()),
        SendError::Leaving(goaway) => goaway_error(&goaway),
        SendError::NoCredit => ClientError::NoCredit,
        SendError::Refused(refusal) => ClientError::Contract(refusal),
    }
}

impl State {
    fn check_alive(&self) -> Result<(), ClientError> {
        match &self.ended {
            None => Ok(()),
            Some(reason) => Err(ClientError::ConnectionLost { executed: Executed::Never, reason: reason.clone() }),
        }
    }
}

impl Shared {
    /// Writes what is in the output buffer, unless another thread is at it: that one will write this too.
    fn flush<'a>(&'a self, mut state: MutexGuard<'a, State>) {
        if state.writing {
            return;
        }
        state.writing = true;
        while !state.out.is_empty() && state.ended.is_none() {
            let mut bytes = std::mem::take(&mut state.spare);
            std::mem::swap(&mut bytes, &mut state.out);
            // Set before the write: a write that fails may have sent any part of it.
            state.written_to = state.session.last_id();
            drop(state);
            let written = (&self.stream).write_all(&bytes);
            bytes.clear();
            if let Err(error) = written {
                self.end(&format!("writing failed: {error}"));
            }
            state = lock(&self.state);
            state.spare = bytes;
        }
        state.writing = false;
    }

    /// The reader thread: until the connection ends, and then everything that waits on it.
    fn read_all(&self, mut rest: Vec<u8>) {
        let reason = self.read_until_end(&mut rest);
        self.end(&reason);
    }

    fn read_until_end(&self, rest: &mut Vec<u8>) -> String {
        // Bytes 0..len are received and not yet understood.
        let mut len = rest.len();
        let mut buffer = std::mem::take(rest);
        let mut done = Vec::new();
        let mut expire_at = clock::now() + EXPIRY_TICK;
        loop {
            if let Err(reason) = self.take_frames(&mut buffer, &mut len, &mut done) {
                return reason;
            }
            let now = clock::now();
            if now >= expire_at {
                self.expire(now);
                expire_at = now + EXPIRY_TICK;
            }
            if buffer.len() - len < 32 << 10 {
                buffer.resize((len * 2).max(64 << 10), 0);
            }
            match (&self.stream).read(&mut buffer[len..]) {
                Ok(0) => return "the server closed the connection".into(),
                Ok(count) => len += count,
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                }
                Err(error) => return format!("reading failed: {error}"),
            }
        }
    }

    fn take_frames(
        &self,
        buffer: &mut [u8],
        len: &mut usize,
        done: &mut Vec<(Arc<Slot>, Outcome)>,
    ) -> Result<(), String> {
        if *len == 0 {
            return Ok(());
        }
        let mut state = lock(&self.state);
        let State { session, waiters, .. } = &mut *state;
        let mut goaway = None;
        let received = session.receive(&buffer[..*len], |event| {
            let (id, outcome) = match event {
                Event::Result { id, result, payload } => {
                    // Waiters that gave up at their deadline are no longer in the table; their results end here.
                    let Some(model) = waiters.get(&id).and_then(|waiter| waiter.model.clone()) else { return };
                    (id, Response::new(model, result, payload).map(|response| Answer::Response(Box::new(response))))
                }
                Event::Refused { id, refusal } => (id, Err(ClientError::Refused(refusal))),
                Event::Described { id, model } => (id, Ok(Answer::Model(model))),
                Event::Models { id, models } => (id, Ok(Answer::Models(models))),
                Event::Stats { id, stats } => (id, Ok(Answer::Stats(stats))),
                Event::Pong { id } => (id, Ok(Answer::Pong)),
                Event::NeverExecuted { id } => {
                    (id, Err(goaway.clone().expect("the session tells the goaway before its consequences")))
                }
                Event::Goaway(message) => {
                    goaway = Some(goaway_error(message));
                    return;
                }
                Event::Ready(_) | Event::Credit => return,
            };
            if let Some(waiter) = waiters.remove(&id) {
                done.push((waiter.slot, outcome));
            }
        });
        let anyone_waits_for_credit = state.credit_waiters > 0;
        drop(state);
        if anyone_waits_for_credit {
            self.changed.notify_all();
        }
        for (slot, outcome) in done.drain(..) {
            slot.fill(outcome);
        }
        let used = received.map_err(|error| format!("the server broke the protocol: {error}"))?;
        buffer.copy_within(used..*len, 0);
        *len -= used;
        Ok(())
    }

    /// Ends waiters whose deadline and grace passed. Their ids stay with the session until the server answers.
    fn expire(&self, now: Moment) {
        let mut late = Vec::new();
        lock(&self.state).waiters.retain(|_, waiter| {
            let stays = waiter.expires > now;
            if !stays {
                late.push(waiter.slot.clone());
            }
            stays
        });
        for slot in late {
            slot.fill(Err(ClientError::DeadlineExceeded { executed: Executed::Maybe }));
        }
    }

    /// Ends the connection and everything that waits on it. The first reason is kept.
    fn end(&self, reason: &str) {
        let (waiters, written_to, reason) = {
            let mut state = lock(&self.state);
            let reason = state.ended.get_or_insert_with(|| reason.to_owned()).clone();
            (std::mem::take(&mut state.waiters), state.written_to, reason)
        };
        // An error here means that the socket is already down, which is what we want.
        let _ = self.stream.shutdown(Shutdown::Both);
        self.changed.notify_all();
        for (id, waiter) in waiters {
            let executed = if id <= written_to { Executed::Maybe } else { Executed::Never };
            waiter.slot.fill(Err(ClientError::ConnectionLost { executed, reason: reason.clone() }));
        }
    }
}

/// A request on its way. Wait for it, or await it on any runtime. Dropping it cancels the request.
pub struct Pending {
    id: u64,
    slot: Arc<Slot>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Pending {
    /// The request's id on its connection.
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn is_done(&self) -> bool {
        self.slot.is_done()
    }

    /// Waits for the end.
    pub fn wait(self) -> Result<Response, ClientError> {
        response(self.slot.wait(Moment::FAR).expect("an endless wait ends with an outcome"))
    }

    /// Waits for the end, but not longer than `timeout`: then the request goes on and is given back.
    pub fn wait_timeout(self, timeout: Duration) -> Result<Result<Response, ClientError>, Pending> {
        match self.slot.wait(clock::now() + timeout) {
            Some(outcome) => Ok(response(outcome)),
            None => Err(self),
        }
    }

    /// Asks the server to drop the request. It still ends as any other: with `cancelled`, or with what was faster.
    pub fn cancel(&self) {
        let mut state = lock(&self.shared.state);
        if state.ended.is_some() || !state.waiters.contains_key(&self.id) {
            return;
        }
        let State { session, out, .. } = &mut *state;
        if session.cancel(self.id, out) {
            self.shared.flush(state);
        }
    }
}

fn response(outcome: Outcome) -> Result<Response, ClientError> {
    match outcome? {
        Answer::Response(response) => Ok(*response),
        _ => unreachable!("the session answers an infer with a result or an error"),
    }
}

impl Future for Pending {
    type Output = Result<Response, ClientError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = lock(&self.slot.state);
        match Slot::take(&mut state) {
            Some(outcome) => Poll::Ready(response(outcome)),
            None => {
                assert!(!matches!(*state, SlotState::Taken), "a future is not polled after it was ready");
                *state = SlotState::Watched(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.slot.is_done() {
            self.cancel();
        }
    }
}
