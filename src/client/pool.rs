//! Several connections to several replicas, used as one: any number of threads, handles to wait on, and futures.
//!
//! A call is sent by the thread that makes it, when a replica can take it at once. Otherwise it waits in a bounded queue,
//! oldest first, for the pool's own thread, which also makes every retry. Connections are opened from the start and
//! reopened in the background, each by a thread of its own that ends with the attempt, so nobody waits for a connect.
//!
//! Always true
//! - A call ends exactly once, and not later than its deadline and a grace: whoever takes it out of the table of calls
//!   fills its slot.
//! - A call is at one connection at a time, and at none while it waits. So two attempts of it never overlap.
//! - Nothing is sent, filled or spawned while the pool's lock is held; a connection's lock is never taken under it.
//! - Connections' readers only note what happened and ring; they never write and never wait.
//!
//! Elsewhere: which replica, whether again, when to reconnect (route.rs), one connection (connection.rs).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

use super::ClientError;
use super::connection::{Answer, Asked, ClientOptions, Connection, Observer, Outcome, Started};
use super::request::{Request, Response};
use super::route::{Ended, LinkId, Next, Pick, ReplicaState, Route, RouteCounts, RouteOptions, Router, Stop};
use super::slot::{Slot, lock};
use crate::clock;
use crate::vocab::{Code, Executed, Moment, Refusal, Stage};

/// How a pool connects, waits and retries.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    /// Of every connection.
    pub client: ClientOptions,
    /// Connections per replica. More than one spreads the work over the shards of a server and over our reading threads.
    pub connections: usize,
    /// Attempts of one call, the first included.
    pub attempts_max: u32,
    /// Retries allowed per hundred requests of the last ten seconds. Higher rides out more, and makes an overload worse.
    pub retry_percent: u32,
    /// Retries allowed in ten seconds beside those, for callers with few requests.
    pub retry_reserve: u32,
    /// Also retry what a model may have run: lost connections, failed executors. A model has no state, so this changes no
    /// answer; it does cost the work twice, and carries a request that ends servers from one to the next.
    pub retry_maybe_executed: bool,
    /// Longest wait of a call for a replica that takes it, where its deadline is later or absent.
    pub replica_timeout: Duration,
    /// Calls that may wait for a replica at once. Further ones end with [`Stop::Full`].
    pub waiting_max: usize,
    /// First and longest wait before a replica that was lost is tried again.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
}

impl Default for PoolOptions {
    fn default() -> PoolOptions {
        PoolOptions {
            client: ClientOptions::default(),
            connections: 2,
            attempts_max: 4,
            retry_percent: 10,
            retry_reserve: 20,
            retry_maybe_executed: false,
            replica_timeout: Duration::from_secs(10),
            waiting_max: 4096,
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
        }
    }
}

/// Why a call has no response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolError {
    /// How the last attempt ended, or why there was none.
    pub last: ClientError,
    /// Times that the request was given to a connection.
    pub attempts: u32,
    /// Whether a model may have run it in any of these.
    pub executed: Executed,
    /// Why there was no further attempt.
    pub stop: Stop,
}

impl PoolError {
    /// The last outcome's place in the closed table, where it has one.
    pub fn code(&self) -> Option<Code> {
        self.last.code()
    }
}

impl std::fmt::Display for PoolError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let why = match self.stop {
            Stop::Final => "not retried",
            Stop::Attempts => "as often as it may be",
            Stop::Budget => "the retry budget is used up",
            Stop::Deadline => "no time for another attempt",
            Stop::NoReplica => "no replica took it in time",
            Stop::Full => "too many calls wait for a replica",
            Stop::Cancelled => "cancelled",
            Stop::Closed => "the pool was dropped",
        };
        write!(f, "{} (attempts: {}; {why})", self.last, self.attempts)
    }
}

impl std::error::Error for PoolError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.last)
    }
}

/// What a pool has done so far, and how its replicas are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolStats {
    pub requests: u64,
    pub responses: u64,
    pub errors: u64,
    /// Requests given to a connection, first times and retries.
    pub attempts: u64,
    pub retries: u64,
    /// Retries that only the budget forbade.
    pub retries_denied: u64,
    pub connects: u64,
    pub connects_failed: u64,
    /// Connections that ended without a goaway. What was reopened is in `connects`.
    pub connections_lost: u64,
    /// Connections that were asked whether they live, because a call's time ran out there without a word or because an answer
    /// was owed for long.
    pub probes: u64,
    /// Calls that wait for a replica now.
    pub waiting: usize,
    pub replicas: Vec<ReplicaStats>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaStats {
    pub addr: String,
    pub state: ReplicaState,
    /// Open connections that take requests.
    pub connections: usize,
    pub outstanding: usize,
}

type CallResult = Result<Response, PoolError>;

enum Place {
    /// Until this moment at most.
    Waiting(Moment),
    /// A thread is about to send it.
    Starting,
    /// Its connection asks for the model's contract first; until this moment at most.
    Describing(Pick, Moment),
    InFlight(LinkId, u64),
}

struct Call {
    request: Arc<Request>,
    slot: Arc<Slot<CallResult>>,
    route: Route,
    place: Place,
    last: Option<ClientError>,
    cancelled: bool,
}

/// A contract that a connection was asked for, and the calls that need it.
struct Described {
    link: LinkId,
    model: String,
    version: String,
    calls: Vec<u64>,
}

/// An attempt that was decided on and is yet to be made, without the lock.
struct Start {
    call: u64,
    attempt: u32,
    pick: Pick,
    connection: Arc<Connection>,
    request: Arc<Request>,
    deadline: Moment,
}

struct State {
    router: Router,
    random: SmallRng,
    connections: HashMap<LinkId, Arc<Connection>>,
    /// Calls, questions for contracts and pings are told apart by their table: their numbers are from the same counter.
    calls: HashMap<u64, Call>,
    describes: HashMap<u64, Described>,
    pings: HashSet<u64>,
    last_token: u64,
    /// Oldest first: numbers rise.
    waiting: BTreeSet<u64>,
    /// Of calls that are waiting or describing.
    timeouts: BTreeSet<(Moment, u64)>,
    /// Their contract came: to be sent by the pool's thread.
    ready: Vec<Start>,
    /// Slots to fill once the lock is released.
    ended: Vec<(Arc<Slot<CallResult>>, CallResult)>,
    /// The pool's thread has something to look at.
    ring: bool,
    responses: u64,
    errors: u64,
    closed: bool,
}

struct Inner {
    state: Mutex<State>,
    bell: Condvar,
    addrs: Vec<String>,
    options: PoolOptions,
}

/// Replicas of one service. Share it by reference or in an `Arc`; dropping it ends what is still pending.
///
/// ```no_run
/// use std::time::Duration;
/// use ferry::client::{Pool, PoolOptions, Request};
///
/// let pool = Pool::new(&["10.0.0.1:7600", "10.0.0.2:7600"], PoolOptions::default())?;
/// let request = Request::new("echo").input("data", &[1, 3], &[1.0f32, 2.0, 3.0]).deadline(Duration::from_millis(200));
/// match pool.infer(request) {
///     Ok(response) => println!("{:?}", response.output::<f32>("data")?),
///     Err(error) => println!("{error}; may have run: {:?}", error.executed),
/// }
/// println!("{:?}", pool.stats());
/// # Ok::<(), ferry::client::ClientError>(())
/// ```
pub struct Pool {
    inner: Arc<Inner>,
    driver: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("replicas", &self.inner.addrs).finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts to connect and returns. Names are resolved anew for every connection.
    pub fn new(replicas: &[impl ToString], options: PoolOptions) -> Result<Pool, ClientError> {
        if replicas.is_empty() || options.connections == 0 || options.attempts_max == 0 {
            return Err(ClientError::Usage("a pool needs a replica, a connection and an attempt".into()));
        }
        let route = RouteOptions {
            connections: options.connections,
            attempts_max: options.attempts_max,
            retry_percent: options.retry_percent,
            retry_reserve: options.retry_reserve,
            retry_maybe_executed: options.retry_maybe_executed,
            backoff_min: options.backoff_min,
            backoff_max: options.backoff_max,
            silence_max: options.client.control_timeout,
        };
        let inner = Arc::new(Inner {
            state: Mutex::new(State {
                router: Router::new(replicas.len(), route),
                random: SmallRng::from_os_rng(),
                connections: HashMap::new(),
                calls: HashMap::new(),
                describes: HashMap::new(),
                pings: HashSet::new(),
                last_token: 0,
                waiting: BTreeSet::new(),
                timeouts: BTreeSet::new(),
                ready: Vec::new(),
                ended: Vec::new(),
                ring: false,
                responses: 0,
                errors: 0,
                closed: false,
            }),
            bell: Condvar::new(),
            addrs: replicas.iter().map(ToString::to_string).collect(),
            options,
        });
        let driver = {
            let inner = inner.clone();
            std::thread::Builder::new()
                .name("ferry-pool".into())
                .spawn(move || inner.drive())
                .map_err(|error| ClientError::Usage(format!("no thread for the pool: {error}")))?
        };
        Ok(Pool { inner, driver: Some(driver) })
    }

    /// Runs a request and waits for its end. Give an `Arc` to send the same request again without a copy.
    pub fn infer(&self, request: impl Into<Arc<Request>>) -> Result<Response, PoolError> {
        self.submit(request).wait()
    }

    /// Sends a request, or queues it for the first replica that takes it. Returns at once: whatever becomes of the
    /// request, also that it could not be queued, is told by the handle.
    pub fn submit(&self, request: impl Into<Arc<Request>>) -> PoolPending {
        let request = request.into();
        let now = clock::now();
        let deadline = request.time_allowed().map_or(Moment::FAR, |allowed| now + allowed);
        let slot = Arc::new(Slot::default());
        let mut state = lock(&self.inner.state);
        let id = state.new_call(request, slot.clone(), deadline, now);
        let start = if state.waiting.is_empty() { state.pick(id, now) } else { None };
        if start.is_none() {
            if state.waiting.len() < self.inner.options.waiting_max {
                state.wait(id, now, self.inner.options.replica_timeout);
            } else {
                state.finish(id, ClientError::NoCredit, Stop::Full);
            }
        }
        self.inner.release(state);
        if let Some(start) = start {
            self.inner.start(start);
        }
        PoolPending { id, slot, inner: self.inner.clone() }
    }

    pub fn stats(&self) -> PoolStats {
        let now = clock::now();
        let state = lock(&self.inner.state);
        let counts: RouteCounts = state.router.counts();
        let replicas = self.inner.addrs.iter().enumerate().map(|(index, addr)| ReplicaStats {
            addr: addr.clone(),
            state: state.router.state(index, now),
            connections: state.router.open_links(index),
            outstanding: state.router.outstanding(index),
        });
        PoolStats {
            requests: counts.requests,
            responses: state.responses,
            errors: state.errors,
            attempts: counts.attempts,
            retries: counts.retries,
            retries_denied: counts.retries_denied,
            connects: counts.connects,
            connects_failed: counts.connects_failed,
            connections_lost: counts.connections_lost,
            probes: counts.probes,
            waiting: state.waiting.len(),
            replicas: replicas.collect(),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let connections: Vec<Arc<Connection>> = {
            let mut state = lock(&self.inner.state);
            state.closed = true;
            state.ring = true;
            state.end_unsent();
            let connections = state.connections.drain().map(|(_, connection)| connection).collect();
            self.inner.release(state);
            connections
        };
        for connection in connections {
            connection.end("the pool was dropped");
        }
        // A waker may drop the pool on the pool's own thread, which cannot wait for itself.
        if let Some(driver) = self.driver.take().filter(|driver| driver.thread().id() != std::thread::current().id()) {
            let _ = driver.join();
        }
    }
}

impl State {
    fn new_token(&mut self) -> u64 {
        self.last_token += 1;
        self.last_token
    }

    fn new_call(&mut self, request: Arc<Request>, slot: Arc<Slot<CallResult>>, deadline: Moment, now: Moment) -> u64 {
        let id = self.new_token();
        let (route, place) = (Route::new(deadline), Place::Waiting(now));
        self.calls.insert(id, Call { request, slot, route, place, last: None, cancelled: false });
        self.router.handle_request(now);
        id
    }

    fn call(&mut self, id: u64) -> &mut Call {
        self.calls.get_mut(&id).expect("only who ends a call takes it out of the table")
    }

    /// Finds a place for a call's next attempt, if there is one now.
    fn pick(&mut self, id: u64, now: Moment) -> Option<Start> {
        let random = self.random.next_u64();
        let call = self.calls.get_mut(&id).expect("it was just found");
        let pick = self.router.pick(&mut call.route, now, random)?;
        self.unwait(id);
        Some(self.start_at(id, pick))
    }

    fn start_at(&mut self, id: u64, pick: Pick) -> Start {
        let connection = self.connections[&pick.link].clone();
        let call = self.call(id);
        call.place = Place::Starting;
        Start {
            call: id,
            attempt: call.route.attempts(),
            pick,
            connection,
            request: call.request.clone(),
            deadline: call.route.deadline(),
        }
    }

    /// Queues a call that is at no connection.
    fn wait(&mut self, id: u64, now: Moment, at_most: Duration) {
        let call = self.call(id);
        let until = call.route.deadline().min(now + at_most);
        call.place = Place::Waiting(until);
        self.waiting.insert(id);
        self.timeouts.insert((until, id));
        self.ring = true;
    }

    /// Takes a call out of what it waits in.
    fn unwait(&mut self, id: u64) {
        if let Place::Waiting(until) | Place::Describing(_, until) = self.call(id).place {
            self.waiting.remove(&id);
            self.timeouts.remove(&(until, id));
        }
    }

    /// Ends a call without a response. It is at no connection.
    fn finish(&mut self, id: u64, last: ClientError, stop: Stop) {
        self.unwait(id);
        let call = self.calls.remove(&id).expect("only who ends a call takes it out of the table");
        let executed = call.route.executed();
        self.errors += 1;
        self.ended.push((call.slot, Err(PoolError { last, attempts: call.route.attempts(), executed, stop })));
    }

    /// Ends a call for which nothing was found in time, or that nobody wants any more. What is most telling is told.
    fn finish_unsent(&mut self, id: u64, stop: Stop) {
        let earlier = self.call(id).last.take();
        let last = earlier.or_else(|| match stop {
            Stop::Cancelled => {
                let message = "cancelled before it was sent";
                Some(ClientError::Refused(Refusal::at_stage(Code::Cancelled, Stage::Arrival, message)))
            }
            _ => self.router.down_because().cloned(),
        });
        self.finish(id, last.unwrap_or(ClientError::DeadlineExceeded { executed: Executed::Never }), stop);
    }

    /// Gives a call back from its connection, where nothing was sent.
    fn leave_link(&mut self, id: u64, ended: Ended, now: Moment) {
        if let Place::Describing(pick, _) = self.call(id).place {
            self.ring |= self.router.handle_end(pick.link, ended, now);
        }
    }

    /// Ends what was at no server when the pool was dropped.
    fn end_unsent(&mut self) {
        for start in std::mem::take(&mut self.ready) {
            self.router.handle_end(start.pick.link, Ended::Here, clock::now());
            self.finish_unsent(start.call, Stop::Closed);
        }
        let unsent = |call: &Call| matches!(call.place, Place::Waiting(_) | Place::Describing(..));
        let ids: Vec<u64> = self.calls.iter().filter(|(_, call)| unsent(call)).map(|(id, _)| *id).collect();
        for id in ids {
            self.leave_link(id, Ended::Here, clock::now());
            self.finish_unsent(id, Stop::Closed);
        }
    }

    /// A connection that is to be asked whether it lives, and the number of the question.
    fn poll_probe(&mut self, now: Moment) -> Option<(Arc<Connection>, LinkId, u64)> {
        let link = self.router.poll_probe(now)?;
        let connection = self.connections.get(&link)?.clone();
        let token = self.new_token();
        self.pings.insert(token);
        Some((connection, link, token))
    }

    fn expire(&mut self, now: Moment) {
        while let Some((until, id)) = self.timeouts.first().copied().filter(|(until, _)| *until <= now) {
            // Where it asked for a contract, the server was silent.
            self.leave_link(id, Ended::Silent, now);
            let at_deadline = until == self.call(id).route.deadline();
            self.finish_unsent(id, if at_deadline { Stop::Deadline } else { Stop::NoReplica });
        }
    }

    /// The end of an attempt at `link`.
    fn end_attempt(&mut self, id: u64, link: LinkId, outcome: CallOutcome, options: &PoolOptions) {
        let ended = match &outcome {
            Ok(_) | Err(ClientError::Refused(_)) => Ended::Replied,
            // A server says that itself, and this one had the grace to do so.
            Err(ClientError::DeadlineExceeded { executed: Executed::Maybe }) => Ended::Silent,
            Err(_) => Ended::Here,
        };
        let now = clock::now();
        self.ring |= self.router.handle_end(link, ended, now);
        self.unwait(id);
        let error = match outcome {
            Ok(response) => {
                let call = self.calls.remove(&id).expect("only who ends a call takes it out of the table");
                self.responses += 1;
                self.ended.push((call.slot, Ok(response)));
                self.ring |= !self.waiting.is_empty();
                return;
            }
            Err(error) => error,
        };
        let random = self.random.next_u64();
        let call = self.calls.get_mut(&id).expect("an attempt ends before its call");
        let next = self.router.judge(&mut call.route, link.replica, &error, now, random);
        // The judge is asked first: it learns of the replica, and an outcome that is final anyway is told as such.
        match (next, call.cancelled) {
            _ if self.closed => self.finish(id, error, Stop::Closed),
            (Next::End(stop), _) => self.finish(id, error, stop),
            (Next::Retry, true) => self.finish(id, error, Stop::Cancelled),
            (Next::Retry, false) => {
                call.last = Some(error);
                self.wait(id, now, options.replica_timeout);
            }
        }
        self.ring |= !self.waiting.is_empty();
    }

    /// A connection of the router's choice says that it ended or takes nothing more. Learnt from a failed attempt when
    /// the reader has not told it yet: the next attempt is not to try it again.
    fn note_link(&mut self, link: LinkId, error: &ClientError) {
        let (now, random) = (clock::now(), self.random.next_u64());
        match error {
            ClientError::ConnectionLost { .. } => {
                self.router.handle_lost(link, now, random);
                self.connections.remove(&link);
            }
            ClientError::Goaway { code, .. } => self.router.handle_leaving(link, *code, now, random),
            _ => return,
        }
        self.ring = true;
    }
}

type CallOutcome = Result<Response, ClientError>;

impl Inner {
    /// Lets go of the lock, then does what must not be done under it.
    fn release(&self, mut state: MutexGuard<'_, State>) {
        let ended = std::mem::take(&mut state.ended);
        let ring = state.ring;
        drop(state);
        if ring {
            self.bell.notify_one();
        }
        for (slot, result) in ended {
            slot.fill(result);
        }
    }

    /// Makes an attempt. Where there is no credit, looks for another place at once.
    fn start(&self, first: Start) {
        let mut next = Some(first);
        while let Some(start) = next.take() {
            let link = start.pick.link;
            let started = start.connection.try_infer(&start.request, start.deadline, start.call);
            let mut question = None;
            let mut state = lock(&self.state);
            match started {
                Started::Sent(wire_id) => {
                    // It may have ended already, and even be on its next attempt.
                    let call = state
                        .calls
                        .get_mut(&start.call)
                        .filter(|call| call.route.attempts() == start.attempt && matches!(call.place, Place::Starting));
                    if let Some(call) = call {
                        call.place = Place::InFlight(link, wire_id);
                        if call.cancelled {
                            drop(state);
                            start.connection.cancel(wire_id);
                            return;
                        }
                    }
                }
                Started::NoCredit => {
                    let State { router, calls, .. } = &mut *state;
                    let call = calls.get_mut(&start.call).expect("it was not sent, so it did not end");
                    router.handle_no_credit(start.pick, &mut call.route);
                    next = self.again(&mut state, start.call);
                }
                Started::ModelUnknown => question = self.describe(&mut state, &start),
                // Its time ran out on the way here: no fault of the connection, and no attempt.
                Started::Failed(ClientError::DeadlineExceeded { .. }) => {
                    let State { router, calls, .. } = &mut *state;
                    let call = calls.get_mut(&start.call).expect("it was not sent, so it did not end");
                    router.handle_not_sent(start.pick, &mut call.route);
                    state.finish_unsent(start.call, Stop::Deadline);
                }
                Started::Failed(error) => {
                    state.note_link(link, &error);
                    state.end_attempt(start.call, link, Err(error), &self.options);
                }
            }
            self.release(state);
            if let Some(token) = question {
                let (model, version) = (start.request.model_name(), start.request.version_name());
                match start.connection.try_describe(model, version, token) {
                    Ok(Asked::Sent) => {}
                    Ok(Asked::Known) => self.described(token, Ok(())),
                    Err(error) => self.described(token, Err(error)),
                }
            }
        }
    }

    /// For a call that found no credit: another place, or the queue.
    fn again(&self, state: &mut State, id: u64) -> Option<Start> {
        let now = clock::now();
        if state.call(id).cancelled {
            state.finish_unsent(id, Stop::Cancelled);
        } else if state.closed {
            state.finish_unsent(id, Stop::Closed);
        } else {
            let start = state.pick(id, now);
            if start.is_none() {
                state.wait(id, now, self.options.replica_timeout);
            }
            return start;
        }
        None
    }

    /// Parks a call until its connection knows the model. The token of the question, if it is to be asked now.
    fn describe(&self, state: &mut State, start: &Start) -> Option<u64> {
        let now = clock::now();
        let link = start.pick.link;
        let call = state.call(start.call);
        let until = call.route.deadline().min(now + self.options.replica_timeout);
        call.place = Place::Describing(start.pick, until);
        if call.cancelled || state.closed {
            let stop = if state.closed { Stop::Closed } else { Stop::Cancelled };
            state.leave_link(start.call, Ended::Here, now);
            state.finish_unsent(start.call, stop);
            return None;
        }
        state.timeouts.insert((until, start.call));
        state.ring = true;
        let (model, version) = (start.request.model_name(), start.request.version_name());
        let asked = |described: &&mut Described| {
            described.link == link && described.model == model && described.version == version
        };
        if let Some(described) = state.describes.values_mut().find(asked) {
            described.calls.push(start.call);
            return None;
        }
        let token = state.new_token();
        let (model, version) = (model.to_owned(), version.to_owned());
        state.describes.insert(token, Described { link, model, version, calls: vec![start.call] });
        Some(token)
    }

    /// A contract came, or did not: the calls that waited for it go on, or have had their attempt.
    fn described(&self, token: u64, outcome: Result<(), ClientError>) {
        let mut state = lock(&self.state);
        let Some(described) = state.describes.remove(&token) else { return };
        let link = described.link;
        let connection = state.connections.get(&link).cloned();
        let lost = |reason: String| ClientError::ConnectionLost { executed: Executed::Never, reason };
        // Whatever became of the question: the calls themselves were not sent.
        let outcome = match outcome {
            Ok(()) if connection.is_none() => Err(lost("it ended before the request was sent".into())),
            Err(ClientError::ConnectionLost { reason, .. }) => Err(lost(reason)),
            Err(ClientError::DeadlineExceeded { .. }) => Err(lost("the server does not answer".into())),
            other => other,
        };
        if let Err(error) = &outcome {
            state.note_link(link, error);
        }
        for id in described.calls {
            let pick = match state.calls.get(&id).map(|call| &call.place) {
                Some(Place::Describing(pick, _)) if pick.link == link => *pick,
                _ => continue, // it did not wait that long
            };
            match &outcome {
                Ok(()) => {
                    state.unwait(id);
                    let start = state.start_at(id, pick);
                    state.ready.push(start);
                    state.ring = true;
                }
                Err(error) => state.end_attempt(id, link, Err(error.clone()), &self.options),
            }
        }
        self.release(state);
        // A server that leaves a question open is of no use for requests.
        if let (Err(ClientError::ConnectionLost { reason, .. }), Some(connection)) = (outcome, connection) {
            connection.end(&reason);
        }
    }

    /// What became of a ping.
    fn ponged(&self, link: LinkId, token: u64, outcome: Result<(), ClientError>) {
        let mut state = lock(&self.state);
        state.pings.remove(&token);
        let mut dead = None;
        match &outcome {
            Ok(()) => {
                state.router.handle_alive(link, clock::now());
                state.ring = true;
            }
            // It may have answered something else meanwhile, and have much to send before the pong.
            Err(ClientError::DeadlineExceeded { .. }) if state.router.is_suspect(link) => {
                dead = state.connections.get(&link).cloned();
            }
            Err(error) => state.note_link(link, error),
        }
        self.release(state);
        if let Some(connection) = dead {
            connection.end("the server does not answer");
        }
    }

    fn cancel(&self, id: u64) {
        let mut state = lock(&self.state);
        let Some(call) = state.calls.get_mut(&id) else { return };
        call.cancelled = true;
        let sent = match call.place {
            Place::Starting => None, // whoever starts it will see
            Place::InFlight(link, wire_id) => state.connections.get(&link).cloned().map(|at| (at, wire_id)),
            Place::Waiting(_) | Place::Describing(..) => {
                state.leave_link(id, Ended::Here, clock::now());
                state.finish_unsent(id, Stop::Cancelled);
                None
            }
        };
        self.release(state);
        if let Some((connection, wire_id)) = sent {
            connection.cancel(wire_id);
        }
    }

    /// The pool's thread: what became due, what can be sent, what is to be connected; then sleep.
    fn drive(self: Arc<Inner>) {
        let mut state = lock(&self.state);
        while !state.closed {
            state.ring = false;
            let now = clock::now();
            state.expire(now);
            if state.router.refused_everywhere().is_some() {
                while let Some(id) = state.waiting.first().copied() {
                    state.finish_unsent(id, Stop::Final);
                }
            }
            let connect = state.router.poll_connect(now);
            let close = state.router.poll_close().and_then(|link| state.connections.remove(&link));
            let probe = state.poll_probe(now);
            let start = state.ready.pop().or_else(|| {
                let oldest = state.waiting.first().copied()?;
                state.pick(oldest, now)
            });
            let anything = connect.is_some() || close.is_some() || probe.is_some() || start.is_some();
            if anything || !state.ended.is_empty() {
                self.release(state);
                if let Some(link) = connect {
                    self.spawn_connect(link);
                }
                if let Some(connection) = close {
                    connection.end("the server takes nothing more here");
                }
                if let Some((connection, link, token)) = probe
                    && let Err(error) = connection.try_ping(token)
                {
                    self.ponged(link, token, Err(error));
                }
                if let Some(start) = start {
                    self.start(start);
                }
                state = lock(&self.state);
                continue;
            }
            let until = state.timeouts.first().map_or(Moment::FAR, |(until, _)| *until);
            let until = until.min(state.router.poll_timeout(now));
            // A ring before this was for what this turn has looked at: the lock was held since.
            state = match until {
                Moment::FAR => self.bell.wait(state).unwrap_or_else(PoisonError::into_inner),
                until => self.bell.wait_timeout(state, until.since(now)).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }

    fn spawn_connect(self: &Arc<Self>, link: LinkId) {
        let inner = self.clone();
        let thread = std::thread::Builder::new().name("ferry-pool-connect".into());
        if let Err(error) = thread.spawn(move || inner.connect(link)) {
            self.connect_failed(link, ClientError::Connect(format!("no thread to connect with: {error}")));
        }
    }

    fn connect(self: Arc<Inner>, link: LinkId) {
        let observer = Arc::new(LinkObserver { inner: self.clone(), link });
        match Connection::connect(self.addrs[link.replica].as_str(), self.options.client.clone(), Some(observer)) {
            Ok((connection, _)) => {
                let mut state = lock(&self.state);
                let wanted = !state.closed && state.router.handle_connected(link, clock::now());
                if wanted {
                    state.connections.insert(link, connection.clone());
                    state.ring = true;
                }
                self.release(state);
                if !wanted {
                    connection.end("nobody wants it any more");
                }
            }
            Err(error) => self.connect_failed(link, error),
        }
    }

    fn connect_failed(&self, link: LinkId, error: ClientError) {
        let mut state = lock(&self.state);
        let random = state.random.next_u64();
        state.router.handle_connect_failed(link, error, clock::now(), random);
        state.ring = true;
        self.release(state);
    }
}

/// Tells the pool what happens to one of its connections.
struct LinkObserver {
    inner: Arc<Inner>,
    link: LinkId,
}

impl Observer for LinkObserver {
    fn answered(&self, token: u64, outcome: Outcome) {
        let outcome = match outcome {
            Ok(Answer::Response(response)) => Ok(*response),
            Ok(Answer::Pong) => return self.inner.ponged(self.link, token, Ok(())),
            Ok(_) => return self.inner.described(token, Ok(())),
            Err(error) => Err(error),
        };
        let mut state = lock(&self.inner.state);
        match (outcome, state.describes.contains_key(&token), state.pings.contains(&token)) {
            (Err(error), true, _) => {
                drop(state);
                self.inner.described(token, Err(error));
            }
            (Err(error), _, true) => {
                drop(state);
                self.inner.ponged(self.link, token, Err(error));
            }
            (outcome, ..) => {
                state.end_attempt(token, self.link, outcome, &self.inner.options);
                self.inner.release(state);
            }
        }
    }

    fn credit_returned(&self) {
        let mut state = lock(&self.inner.state);
        state.router.handle_credit(self.link);
        state.ring = true;
        self.inner.release(state);
    }

    fn leaving(&self, code: Option<Code>) {
        let mut state = lock(&self.inner.state);
        let random = state.random.next_u64();
        state.router.handle_leaving(self.link, code, clock::now(), random);
        state.ring = true;
        self.inner.release(state);
    }

    fn ended(&self) {
        let mut state = lock(&self.inner.state);
        let random = state.random.next_u64();
        state.router.handle_lost(self.link, clock::now(), random);
        state.connections.remove(&self.link);
        state.ring = true;
        self.inner.release(state);
    }
}

/// A call on its way. Wait for it, or await it on any runtime. Dropping it cancels the call.
pub struct PoolPending {
    id: u64,
    slot: Arc<Slot<CallResult>>,
    inner: Arc<Inner>,
}

impl std::fmt::Debug for PoolPending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolPending").field("id", &self.id).finish_non_exhaustive()
    }
}

impl PoolPending {
    pub fn is_done(&self) -> bool {
        self.slot.is_done()
    }

    /// Waits for the end.
    pub fn wait(self) -> Result<Response, PoolError> {
        self.slot.wait(Moment::FAR).expect("an endless wait ends with an outcome")
    }

    /// Waits for the end, but not longer than `timeout`: then the call goes on and is given back.
    pub fn wait_timeout(self, timeout: Duration) -> Result<Result<Response, PoolError>, PoolPending> {
        self.slot.wait(clock::now() + timeout).ok_or(self)
    }

    /// Gives the call up: it is not retried, and its server is asked to drop it. It still ends as any other.
    pub fn cancel(&self) {
        self.inner.cancel(self.id);
    }
}

impl Future for PoolPending {
    type Output = Result<Response, PoolError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.slot.poll(context)
    }
}

impl Drop for PoolPending {
    fn drop(&mut self) {
        if !self.slot.is_done() {
            self.cancel();
        }
    }
}
