//! One connection that many threads write to and one thread reads.
//!
//! Whoever has something to send writes it at once, together with what others left meanwhile, so there is no writer
//! thread to wake and a burst from many threads leaves in few writes. Where the kernel takes no more, a thread made for
//! it writes the rest: nobody who submits waits for a server that does not read. The reader never writes: a server that
//! waits for us to read can not be waiting for ever.
//!
//! Always true
//! - Bytes reach the socket in the order of their ids: both are given out under one lock.
//! - A waiter is told by whoever took it out of the table, and after the lock was released: a waker may do anything.
//! - When the connection ends, every waiter is told; nothing is added to the table afterwards.
//! - The observer hears that the connection ends or leaves before it hears what that did to its requests.
//!
//! Elsewhere: the protocol (session.rs), calls that wait (blocking.rs), which connection to use (pool.rs).

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use super::ClientError;
use super::request::{Request, Response, Rows};
use super::session::{Event, ModelEntry, ModelInfo, SendError, ServerStats, Session, SessionOptions};
use super::slot::{Slot, lock};
use super::stream::{ClientTls, Stream};
use crate::clock;
use crate::vocab::{Code, Executed, Moment};
use crate::wire::Limits;
use crate::wire::message::Goaway;

/// How to connect, and how long to wait for what.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Whose quota the connection counts against; empty for the default tenant.
    pub tenant: String,
    /// Empty where the server uses no authentication.
    pub token: Vec<u8>,
    /// None: nothing is encrypted.
    pub tls: Option<ClientTls>,
    /// Longest wait for a connection, and again for the server's hello.
    pub connect_timeout: Duration,
    /// Longest time a write may make no progress; then the connection counts as lost.
    pub write_timeout: Duration,
    /// Longest wait for what answers at once: contracts, counters, pings. A pool also asks a connection by a ping whether it
    /// lives when it has said nothing for so long and owes an answer.
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
            tls: None,
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
pub(super) enum Answer {
    /// Boxed: a place for an answer lives as long as its request, and most of that time it is empty.
    Response(Box<Response>),
    Model(Arc<ModelInfo>),
    Models(Vec<ModelEntry>),
    Stats(ServerStats),
    Pong,
}

pub(super) type Outcome = Result<Answer, ClientError>;

/// Who is told an answer.
pub(super) enum Told {
    Slot(Arc<Slot<Outcome>>),
    /// Rows as they come; closed after the last, or after an error.
    Items(flume::Sender<Result<Rows, ClientError>>),
    /// The connection's observer, under this token.
    Observer(u64),
}

/// Hears what happens to a connection that nobody waits on. Called by whichever thread finds out, without a lock held;
/// must not wait and must not write to the connection, because the caller may be its only reader.
pub(super) trait Observer: Send + Sync {
    /// The one outcome of what was sent under `token`.
    fn answered(&self, token: u64, outcome: Outcome);
    /// There may be credit again, after [`Started::NoCredit`].
    fn credit_returned(&self);
    /// The server takes nothing more on this connection.
    fn leaving(&self, code: Option<Code>);
    fn ended(&self);
}

/// What became of an attempt to send a request without waiting.
pub(super) enum Started {
    Sent(u64),
    /// Its contract has to be asked for first.
    ModelUnknown,
    NoCredit,
    /// Nothing was sent and the observer hears nothing.
    Failed(ClientError),
}

/// What became of a question for a contract.
pub(super) enum Asked {
    Sent,
    /// Another's question was answered in the meantime.
    Known,
}

pub(super) struct Waiter {
    told: Told,
    /// Of an infer: what its response will be read by.
    model: Option<Arc<ModelInfo>>,
    expires: Moment,
}

pub(super) struct State {
    pub(super) session: Session,
    pub(super) out: Vec<u8>,
    /// The buffer that is not being filled, kept for its capacity.
    spare: Vec<u8>,
    writing: bool,
    /// Ids up to here may have left this process.
    written_to: u64,
    waiters: HashMap<u64, Waiter>,
    pub(super) credit_waiters: usize,
    /// The observer was refused for want of credit and wants to hear when there may be some.
    starved: bool,
    /// The peer has closed. Nothing more is written, but the reader may still find answers that came before.
    unwritable: Option<String>,
    /// Why the connection ended.
    ended: Option<String>,
}

pub(super) struct Connection {
    pub(super) state: Mutex<State>,
    /// Credit came back, or the connection ended.
    pub(super) changed: Condvar,
    pub(super) options: ClientOptions,
    stream: Stream,
    observer: Option<Arc<dyn Observer>>,
}

/// Connecting anew after a signal, at most so often.
const INTERRUPTED_MAX: u32 = 8;

/// Connects. A signal that is handled interrupts that, and is no reason to give up.
fn connect(addr: &SocketAddr, timeout: Duration) -> std::io::Result<TcpStream> {
    let mut interrupted = 0;
    loop {
        match TcpStream::connect_timeout(addr, timeout) {
            Err(error) if error.kind() == ErrorKind::Interrupted && interrupted < INTERRUPTED_MAX => interrupted += 1,
            outcome => return outcome,
        }
    }
}

/// Connects, sends the hello and waits for its answer. What arrived behind that is given back too. The stream blocks.
pub(crate) fn open(
    addr: impl ToSocketAddrs,
    options: &ClientOptions,
) -> Result<(Stream, Session, Vec<u8>), ClientError> {
    let io = |error: std::io::Error| ClientError::Connect(error.to_string());
    let mut last = None;
    let mut stream = None;
    for addr in addr.to_socket_addrs().map_err(io)? {
        match connect(&addr, options.connect_timeout) {
            Ok(connected) => {
                stream = Some(connected);
                break;
            }
            Err(error) => last = Some(error),
        }
    }
    let stream = stream.ok_or_else(|| {
        ClientError::Connect(last.map_or("the address resolves to nothing".into(), |error| error.to_string()))
    })?;
    stream.set_nodelay(true).map_err(io)?;
    stream.set_read_timeout(Some(options.connect_timeout)).map_err(io)?;
    stream.set_write_timeout(Some(options.write_timeout)).map_err(io)?;
    let stream = Stream::open(stream, options.tls.as_ref()).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            ClientError::Connect(format!("no end of the TLS handshake within {:?}", options.connect_timeout))
        }
        _ => io(error),
    })?;

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
    pub(super) fn check_alive(&self) -> Result<(), ClientError> {
        match self.ended.as_ref().or(self.unwritable.as_ref()) {
            None => Ok(()),
            Some(reason) => Err(ClientError::ConnectionLost { executed: Executed::Never, reason: reason.clone() }),
        }
    }

    pub(super) fn add_waiter(&mut self, id: u64, told: Told, model: Option<Arc<ModelInfo>>, expires: Moment) {
        self.waiters.insert(id, Waiter { told, model, expires });
    }

    pub(super) fn remove_waiter(&mut self, id: u64) {
        self.waiters.remove(&id);
    }
}

/// Time left until a deadline; `None` in it where there is no deadline.
pub(super) fn remaining(deadline: Moment) -> Result<Option<Duration>, ClientError> {
    if deadline == Moment::FAR {
        return Ok(None);
    }
    match deadline.since(clock::now()) {
        Duration::ZERO => Err(ClientError::DeadlineExceeded { executed: Executed::Never }),
        left => Ok(Some(left)),
    }
}

impl Connection {
    /// Connects, greets and starts the reader, which ends by itself when the connection does.
    pub(super) fn connect(
        addr: impl ToSocketAddrs,
        options: ClientOptions,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<(Arc<Connection>, JoinHandle<()>), ClientError> {
        let (stream, session, rest) = open(addr, &options)?;
        let io = |error: std::io::Error| ClientError::Connect(error.to_string());
        stream.set_timeouts(EXPIRY_TICK, options.write_timeout).map_err(io)?;
        let connection = Arc::new(Connection {
            state: Mutex::new(State {
                session,
                out: Vec::new(),
                spare: Vec::new(),
                writing: false,
                written_to: 0,
                waiters: HashMap::new(),
                credit_waiters: 0,
                starved: false,
                unwritable: None,
                ended: None,
            }),
            changed: Condvar::new(),
            options,
            stream,
            observer,
        });
        let reader = {
            let connection = connection.clone();
            std::thread::Builder::new()
                .name("ferry-client".into())
                .spawn(move || connection.read_all(rest))
                .map_err(io)?
        };
        Ok((connection, reader))
    }

    /// When a request with this deadline is given up here: the server is to say it first.
    pub(super) fn expiry(&self, deadline: Moment) -> Moment {
        if deadline == Moment::FAR { Moment::FAR } else { deadline + self.options.deadline_grace }
    }

    /// Sends a request for the observer. Waits for nothing.
    pub(super) fn try_infer(self: &Arc<Self>, request: &Request, deadline: Moment, token: u64) -> Started {
        let mut state = lock(&self.state);
        let remaining = match state.check_alive().and_then(|()| remaining(deadline)) {
            Ok(remaining) => remaining,
            Err(error) => return Started::Failed(error),
        };
        let State { session, out, .. } = &mut *state;
        let Some(model) = session.known_model(request.model_name(), request.version_name()) else {
            return Started::ModelUnknown;
        };
        match session.infer(&model, request, remaining, out) {
            Ok(id) => {
                state.add_waiter(id, Told::Observer(token), Some(model), self.expiry(deadline));
                self.flush(state);
                Started::Sent(id)
            }
            Err(SendError::NoCredit) => {
                state.starved = true;
                Started::NoCredit
            }
            Err(error) => Started::Failed(send_error(error)),
        }
    }

    /// Asks for a contract on the observer's behalf, who hears of it only if the question was sent.
    pub(super) fn try_describe(self: &Arc<Self>, model: &str, version: &str, token: u64) -> Result<Asked, ClientError> {
        if model.is_empty() {
            return Err(ClientError::Usage("a model has a name".into()));
        }
        let expires = clock::now() + self.options.control_timeout;
        let mut state = lock(&self.state);
        state.check_alive()?;
        let State { session, out, .. } = &mut *state;
        if session.known_model(model, version).is_some() {
            return Ok(Asked::Known);
        }
        let id = session.describe(model, version, out).map_err(send_error)?;
        state.add_waiter(id, Told::Observer(token), None, expires);
        self.flush(state);
        Ok(Asked::Sent)
    }

    /// Asks on the observer's behalf whether the server is there. Waits for nothing.
    pub(super) fn try_ping(self: &Arc<Self>, token: u64) -> Result<(), ClientError> {
        let expires = clock::now() + self.options.control_timeout;
        let mut state = lock(&self.state);
        state.check_alive()?;
        let State { session, out, .. } = &mut *state;
        let id = session.ping(out).map_err(send_error)?;
        state.add_waiter(id, Told::Observer(token), None, expires);
        self.flush(state);
        Ok(())
    }

    /// Asks the server to drop a request that somebody here still waits for.
    pub(super) fn cancel(self: &Arc<Self>, id: u64) {
        let mut state = lock(&self.state);
        if state.ended.is_some() || !state.waiters.contains_key(&id) {
            return;
        }
        let State { session, out, .. } = &mut *state;
        if session.cancel(id, out) {
            self.flush(state);
        }
    }

    /// Writes what is in the output buffer, unless another thread is at it: that one will write this too. Never waits:
    /// what the kernel does not take at once is left to a thread that may.
    pub(super) fn flush(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        if state.writing {
            return;
        }
        state.writing = true;
        let Some(rest) = self.write_queued(state, Stream::write_at_once) else { return };
        let connection = self.clone();
        let writer = std::thread::Builder::new().name("ferry-client-write".into());
        if let Err(error) = writer.spawn(move || connection.write_rest(&rest)) {
            self.end(&format!("no thread to write with: {error}"));
        }
    }

    /// Takes over from [`Connection::flush`] with bytes that did not fit.
    fn write_rest(&self, rest: &[u8]) {
        if let Err(error) = self.stream.write_all(rest) {
            self.write_failed(&error);
        }
        let rest = self.write_queued(lock(&self.state), |stream, bytes| stream.write_all(bytes).map(|()| bytes.len()));
        debug_assert!(rest.is_none(), "write_all writes all");
    }

    /// Writes until the output buffer is empty, then gives the right to write back. Where `write` wrote less than all,
    /// gives the rest to the caller, who keeps that right.
    fn write_queued<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        write: impl Fn(&Stream, &[u8]) -> std::io::Result<usize>,
    ) -> Option<Vec<u8>> {
        while !state.out.is_empty() && state.check_alive().is_ok() {
            let mut bytes = std::mem::take(&mut state.spare);
            std::mem::swap(&mut bytes, &mut state.out);
            // Set before the write: a write that fails may have sent any part of it.
            state.written_to = state.session.last_id();
            drop(state);
            match write(&self.stream, &bytes) {
                // Records that the socket did not take are a rest, too.
                Ok(count) if count < bytes.len() || self.stream.has_pending() => {
                    bytes.drain(..count);
                    return Some(bytes);
                }
                Ok(_) => {}
                Err(error) => self.write_failed(&error),
            }
            bytes.clear();
            state = lock(&self.state);
            state.spare = bytes;
        }
        state.writing = false;
        None
    }

    /// A peer that closed may have answered before: the reader comes to its end and ends the connection. Otherwise there
    /// is no telling when the reader would.
    fn write_failed(&self, error: &std::io::Error) {
        let reason = format!("writing failed: {error}");
        match error.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => lock(&self.state).unwritable = Some(reason),
            _ => self.end(&reason),
        }
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
            match self.stream.read(&mut buffer[len..]) {
                Ok(0) => return "the server closed the connection".into(),
                Ok(count) => len += count,
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                }
                Err(error) => return format!("reading failed: {error}"),
            }
        }
    }

    fn take_frames(&self, buffer: &mut [u8], len: &mut usize, done: &mut Vec<(Told, Outcome)>) -> Result<(), String> {
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
                Event::Item { id, item, payload } => {
                    let Some(waiter) = waiters.get(&id) else { return };
                    let (Told::Items(rows), Some(model)) = (&waiter.told, waiter.model.clone()) else { return };
                    let response = Response::new(model, item.result, payload);
                    // Whoever asked may not listen any more.
                    let _ = rows.send(response.map(|response| Rows { at_row: item.at_row, response }));
                    return;
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
                done.push((waiter.told, outcome));
            }
        });
        let anyone_waits_for_credit = state.credit_waiters > 0;
        let starved = std::mem::take(&mut state.starved);
        drop(state);
        if anyone_waits_for_credit {
            self.changed.notify_all();
        }
        if let Some(observer) = &self.observer {
            if let Some(error) = &goaway {
                observer.leaving(error.code());
            }
            if starved {
                observer.credit_returned();
            }
        }
        for (told, outcome) in done.drain(..) {
            self.tell(told, outcome);
        }
        let used = received.map_err(|error| format!("the server broke the protocol: {error}"))?;
        buffer.copy_within(used..*len, 0);
        *len -= used;
        Ok(())
    }

    /// Ends waiters whose deadline and grace passed. Their ids stay with the session until the server answers.
    fn expire(&self, now: Moment) {
        let late: Vec<Waiter> =
            lock(&self.state).waiters.extract_if(|_, waiter| waiter.expires <= now).map(|(_, waiter)| waiter).collect();
        for waiter in late {
            self.tell(waiter.told, Err(ClientError::DeadlineExceeded { executed: Executed::Maybe }));
        }
    }

    /// Ends the connection and everything that waits on it. The first reason is kept.
    pub(super) fn end(&self, reason: &str) {
        let (waiters, written_to, reason) = {
            let mut state = lock(&self.state);
            let reason = state.ended.get_or_insert_with(|| reason.to_owned()).clone();
            (std::mem::take(&mut state.waiters), state.written_to, reason)
        };
        self.stream.shutdown();
        self.changed.notify_all();
        if let Some(observer) = &self.observer {
            observer.ended();
        }
        for (id, waiter) in waiters {
            let executed = if id <= written_to { Executed::Maybe } else { Executed::Never };
            self.tell(waiter.told, Err(ClientError::ConnectionLost { executed, reason: reason.clone() }));
        }
    }

    fn tell(&self, told: Told, outcome: Outcome) {
        match (told, &self.observer) {
            (Told::Slot(slot), _) => slot.fill(outcome),
            (Told::Items(rows), _) => {
                // The end is that nobody sends any more.
                if let Err(error) = outcome {
                    let _ = rows.send(Err(error));
                }
            }
            (Told::Observer(token), Some(observer)) => observer.answered(token, outcome),
            (Told::Observer(_), None) => unreachable!("tokens are given out by the observer"),
        }
    }
}
