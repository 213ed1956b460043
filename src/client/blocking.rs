//! A connection that any number of threads share: blocking calls, handles to wait on, and futures.
//!
//! Always true
//! - A call with a deadline returns by then, and a little later where the server has to be given up on.
//!
//! Elsewhere: what is read and written (connection.rs), the protocol (session.rs), several servers (pool.rs).

use std::future::Future;
use std::net::ToSocketAddrs;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Duration;

use super::ClientError;
use super::connection::{Answer, ClientOptions, Connection, Outcome, State, Told, remaining, send_error};
use super::request::{Request, Response, Rows};
use super::session::{ModelEntry, ModelInfo, SendError, ServerStats, Session, Window};
use super::slot::{Slot, lock};
use crate::clock;
use crate::vocab::{Executed, Moment};
use crate::wire::message::HelloAck;

/// A connection to a server. Share it by reference or in an `Arc`; dropping it ends what is still pending.
pub struct Client {
    connection: Arc<Connection>,
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
        let (connection, reader) = Connection::connect(addr, options, None)?;
        Ok(Client { connection, reader: Some(reader) })
    }

    /// What the server said about itself.
    pub fn server(&self) -> HelloAck {
        lock(&self.connection.state).session.server().cloned().expect("connect returns after the hello was answered")
    }

    /// What may be in flight, and what is.
    pub fn window(&self) -> Window {
        lock(&self.connection.state).session.window()
    }

    /// Runs a request and waits for its end.
    pub fn infer(&self, request: &Request) -> Result<Response, ClientError> {
        self.submit(request)?.wait()
    }

    /// Sends a request. Waits while the server allows no more in flight, at most until the request's deadline.
    pub fn submit(&self, request: &Request) -> Result<Pending, ClientError> {
        self.start(request, true)
    }

    /// Sends a request of many rows, and gives each as soon as the batch that carries it has run. The time that it may take is
    /// that of the whole.
    pub fn infer_items(&self, request: &Request) -> Result<Items, ClientError> {
        let (sender, rows) = flume::unbounded();
        let id = self.send(&request.clone().by_items(), true, Told::Items(sender))?;
        Ok(Items { id, rows, connection: self.connection.clone(), ended: false })
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
        self.model_by(Moment::FAR, name, version)
    }

    fn model_by(&self, deadline: Moment, name: &str, version: &str) -> Result<Arc<ModelInfo>, ClientError> {
        if name.is_empty() {
            return Err(ClientError::Usage("a model has a name".into()));
        }
        if let Some(model) = lock(&self.connection.state).session.known_model(name, version) {
            return Ok(model);
        }
        match self.ask_by(deadline, |session, out| session.describe(name, version, out))? {
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
        self.ask_by(Moment::FAR, send)
    }

    fn ask_by(
        &self,
        deadline: Moment,
        send: impl FnOnce(&mut Session, &mut Vec<u8>) -> Result<u64, SendError>,
    ) -> Result<Answer, ClientError> {
        let until = deadline.min(clock::now() + self.connection.options.control_timeout);
        let slot = Arc::new(Slot::default());
        let mut state = lock(&self.connection.state);
        state.check_alive()?;
        let State { session, out, .. } = &mut *state;
        let id = send(session, out).map_err(send_error)?;
        state.add_waiter(id, Told::Slot(slot.clone()), None, Moment::FAR);
        self.connection.flush(state);
        slot.wait(until).unwrap_or_else(|| {
            lock(&self.connection.state).remove_waiter(id);
            // No model runs for a question.
            Err(ClientError::DeadlineExceeded { executed: Executed::Never })
        })
    }

    fn start(&self, request: &Request, wait: bool) -> Result<Pending, ClientError> {
        let slot = Arc::new(Slot::default());
        let id = self.send(request, wait, Told::Slot(slot.clone()))?;
        Ok(Pending { id, slot, connection: self.connection.clone() })
    }

    fn send(&self, request: &Request, wait: bool, told: Told) -> Result<u64, ClientError> {
        let deadline = request.time_allowed().map_or(Moment::FAR, |allowed| clock::now() + allowed);
        let model = self.model_by(deadline, request.model_name(), request.version_name())?;
        let mut state = lock(&self.connection.state);
        loop {
            state.check_alive()?;
            let remaining = remaining(deadline)?;
            let State { session, out, .. } = &mut *state;
            match session.infer(&model, request, remaining, out) {
                Ok(id) => {
                    let expires = self.connection.expiry(deadline);
                    state.add_waiter(id, told, Some(model), expires);
                    self.connection.flush(state);
                    return Ok(id);
                }
                Err(SendError::NoCredit) if wait => {
                    state.credit_waiters += 1;
                    state = match remaining {
                        None => self.connection.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                        Some(left) => {
                            let waited = self.connection.changed.wait_timeout(state, left);
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
        self.connection.end("the client was dropped");
        // A waker may drop the client on the reader's own thread, which cannot wait for itself.
        if let Some(reader) = self.reader.take().filter(|reader| reader.thread().id() != std::thread::current().id()) {
            // A panic of the reader was a bug and has already ended all waiters' hopes; there is nothing to add here.
            let _ = reader.join();
        }
    }
}

/// Rows of a request as they are done: an iterator that ends after the last, or after an error. Dropping it cancels what is left.
pub struct Items {
    id: u64,
    rows: flume::Receiver<Result<Rows, ClientError>>,
    connection: Arc<Connection>,
    ended: bool,
}

impl std::fmt::Debug for Items {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Items").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Iterator for Items {
    type Item = Result<Rows, ClientError>;

    /// Waits for the next rows.
    fn next(&mut self) -> Option<Result<Rows, ClientError>> {
        let next = self.rows.recv().ok().filter(|_| !self.ended);
        self.ended |= !matches!(next, Some(Ok(_)));
        next
    }
}

impl Drop for Items {
    fn drop(&mut self) {
        if !self.ended {
            self.connection.cancel(self.id);
        }
    }
}

/// A request on its way. Wait for it, or await it on any runtime. Dropping it cancels the request.
pub struct Pending {
    id: u64,
    slot: Arc<Slot<Outcome>>,
    connection: Arc<Connection>,
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
        self.connection.cancel(self.id);
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
        self.slot.poll(context).map(response)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.slot.is_done() {
            self.cancel();
        }
    }
}
