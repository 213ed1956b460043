//! A shard's thread and its tasks: accept, one per connection, housekeeping, and the main one that answers.
//!
//! Always true
//! - A connection's task that has had the shard for [`TURN_MAX`] waits on a timer: a wait that only the next poll of the ring can
//!   end. Otherwise it waits for a read that is not ready. What it does at one go, between two looks at the clock, is bounded in bytes.
//! - After each burst the task that had it drains the shard's mailbox, so a busy shard never depends on being woken.
//! - However the thread ends, the server is told and no connection is left open: glommio forgets its tasks when it ends,
//!   with all that they hold.
//! - A timer ends every park after [`TICK_BUSY`] while requests are in flight, [`TICK_IDLE`] otherwise: glommio can park
//!   with runnable tasks when its thread was stopped at the wrong instant, and then only a completion wakes it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_lite::{AsyncRead, AsyncWrite, FutureExt};
use glommio::net::{TcpListener, TcpStream};
use glommio::timer::sleep;
use glommio::{ExecutorJoinHandle, LocalExecutorBuilder, Placement};
use nix::sys::pthread::{Pthread, pthread_self};
use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::AsRawFd;

use super::abuse::Points;
use super::answering::Budget;
use super::connection::{Connection, Phase, WRITE_MAX};
use super::session::append_goaway;
use super::state::{Mode, ReadEnd, State};
use super::task::{Turns, spawn};
use super::{Catalog, Options};
use crate::clock;
use crate::mail::{Request, ToBatcher, ToShard};
use crate::mailbox::{Receiver, Sender};
use crate::telemetry::Telemetry;
use crate::telemetry::Turn as Whose;
use crate::vocab::{Code, Moment};

/// From then on a connection lets others run.
const TURN_MAX: Duration = Duration::from_micros(250);
/// A wait that truly pends: it ends in the poll after next at the latest.
const BREATH: Duration = Duration::from_micros(20);
const TICK_BUSY: Duration = Duration::from_millis(20);
const TICK_IDLE: Duration = Duration::from_millis(200);
const HOUSEKEEP_EVERY: Duration = Duration::from_millis(250);
/// Longer between two rounds of housekeeping, and this thread did not run.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// After a failed accept (no descriptors left, say): long enough not to spin, short enough to resume within a second.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// All that a shard's thread is given.
pub struct Setup {
    pub index: u16,
    pub listen: std::net::SocketAddr,
    /// The core it is bound to.
    pub cpu: Option<usize>,
    pub options: Options,
    pub catalog: Arc<Catalog>,
    pub telemetry: Arc<Telemetry>,
    pub mailbox: Receiver<ToShard>,
    pub batcher: Sender<ToBatcher>,
    pub tokenizer: Option<Sender<Request>>,
    /// Told once: listening, or why not.
    pub ready: flume::Sender<Result<Pthread, String>>,
    /// Counts turns, for the watchdog.
    pub turns: Arc<AtomicU64>,
}

/// Starts the thread. `at_end` is called when it ends, in whatever way, with whether that was its turn; or it is dropped,
/// if the thread did not come as far as being started.
pub fn start(setup: Setup, at_end: impl FnOnce(bool) + Send + 'static) -> Result<ExecutorJoinHandle<()>, String> {
    let placement = setup.cpu.map_or(Placement::Unbound, Placement::Fixed);
    LocalExecutorBuilder::new(placement)
        .name(&format!("ferry-shard-{}", setup.index))
        // Registered buffers are for files; a shard has none.
        .io_memory(64 << 10)
        .spin_before_park(setup.options.spin)
        .spawn(move || {
            AT_END.set(Some(AtEnd { shard: Weak::new(), in_turn: false, tell: Some(Box::new(at_end)) }));
            run(setup)
        })
        .map_err(|error| format!("cannot start shard: {error}"))
}

thread_local! {
    /// Dropped with the thread, not with a task: a panic that is not the main task's leaves that one behind for ever.
    static AT_END: RefCell<Option<AtEnd>> = const { RefCell::new(None) };
}

/// What is left to do when a shard's thread has ended.
struct AtEnd {
    // Whoever still holds the shard then is a task that will never run again. Letting go of the last such hold would end
    // tasks without an executor, so this is none.
    shard: Weak<Shard>,
    in_turn: bool,
    tell: Option<Box<dyn FnOnce(bool)>>,
}

impl Drop for AtEnd {
    fn drop(&mut self) {
        if !self.in_turn
            && let Some(shard) = self.shard.upgrade()
        {
            shard.hang_up();
        }
        if let Some(tell) = self.tell.take() {
            tell(self.in_turn);
        }
    }
}

fn edit_end(edit: impl FnOnce(&mut AtEnd)) {
    AT_END.with_borrow_mut(|end| edit(end.as_mut().expect("set before the shard began")));
}

/// What the tasks of a shard share.
struct Shard {
    state: RefCell<State>,
    mailbox: Receiver<ToShard>,
    turns: Arc<AtomicU64>,
    times: Turns,
    /// Wakes the accept task when it has to end.
    accept_waker: Cell<Option<Waker>>,
    done: Cell<bool>,
}

impl Shard {
    /// Answers what came in the mailbox and writes it: as much as is done at one go. False when more is left, for the main task.
    fn drain_mailbox(&self) -> bool {
        self.turns.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state.borrow_mut();
        let mut budget = Budget::of_answers();
        let mut now = None;
        let is_empty = loop {
            if state.is_answering() && !state.answer_some(&mut budget, *now.get_or_insert_with(clock::now)) {
                break false;
            }
            let Some(message) = self.mailbox.try_recv() else { break true };
            let drains = matches!(message, ToShard::Drain | ToShard::Abort);
            state.take_mail(message, *now.get_or_insert_with(clock::now));
            if drains && let Some(waker) = self.accept_waker.take() {
                waker.wake();
            }
        };
        state.flush(now.unwrap_or_else(clock::now));
        state.publish();
        if !is_empty {
            state.wake_main();
        }
        is_empty
    }

    /// Ends every connection, so that no peer waits for a shard that is dead. The listener cannot be reached: who
    /// connects from now on waits for the end of the process, which the drain that has begun bounds.
    fn hang_up(&self) {
        // A panic here would end the process, and the other shards with what they owe.
        let Ok(state) = self.state.try_borrow() else { return };
        for (_, connection) in &state.connections {
            let _ = shutdown(connection.fd, Shutdown::Both);
        }
    }

    fn is_draining(&self) -> bool {
        self.state.borrow().mode == Mode::Draining
    }
}

async fn run(setup: Setup) {
    let listener = match TcpListener::bind(setup.listen) {
        Ok(listener) => listener,
        Err(error) => {
            let _ = setup.ready.send(Err(format!("cannot listen on {}: {error}", setup.listen)));
            return;
        }
    };
    let times = Turns { telemetry: Arc::clone(&setup.telemetry), shard: setup.index.into() };
    let state = State::new(setup.index, setup.options, setup.catalog, setup.telemetry, setup.batcher, setup.tokenizer);
    let shard = Rc::new(Shard {
        state: RefCell::new(state),
        mailbox: setup.mailbox,
        turns: setup.turns,
        times,
        accept_waker: Cell::new(None),
        done: Cell::new(false),
    });
    edit_end(|end| end.shard = Rc::downgrade(&shard));
    spawn(Whose::Accept, &shard.times, accept(Rc::clone(&shard), listener));
    spawn(Whose::Housekeeping, &shard.times, housekeep(Rc::clone(&shard)));
    let _ = setup.ready.send(Ok(pthread_self()));
    drop(setup.ready);
    loop {
        poll_fn(|cx| {
            let mut state = shard.state.borrow_mut();
            assert!(!state.broken, "test hook: this shard is to end");
            if state.is_done() {
                return Poll::Ready(());
            }
            state.set_main(cx.waker());
            if state.is_answering() { Poll::Ready(()) } else { shard.mailbox.poll_ready(cx) }
        })
        .await;
        while !shard.times.time(Whose::Mailbox, || shard.drain_mailbox()) {
            sleep(BREATH).await;
        }
        if shard.state.borrow().is_done() {
            shard.done.set(true);
            shard.state.borrow_mut().close();
            edit_end(|end| end.in_turn = true);
            return;
        }
    }
}

async fn housekeep(shard: Rc<Shard>) {
    let mut last = clock::now();
    let mut excused = false;
    while !shard.done.get() {
        let busy = !shard.state.borrow().in_flight.is_empty();
        sleep(if busy || shard.is_draining() { TICK_BUSY } else { TICK_IDLE }).await;
        shard.drain_mailbox();
        let now = clock::now();
        if now.since(last) >= HOUSEKEEP_EVERY {
            // After a pause of our own (a stopped process, a suspended machine) nobody is late before we have read what
            // came meanwhile.
            excused = !excused && now.since(last) > PAUSE_MIN;
            last = now;
            if !excused {
                shard.state.borrow_mut().housekeep(now);
            }
        }
    }
}

async fn accept(shard: Rc<Shard>, listener: TcpListener) {
    while !shard.is_draining() {
        let has_room = shard.state.borrow_mut().has_room();
        if !has_room {
            // Who connects meanwhile waits in the listener's backlog.
            shard.state.borrow().metrics().accept_paused();
            sleep(ACCEPT_PAUSE).await;
            continue;
        }
        let stream = async { Some(listener.accept().await) };
        let drain = poll_fn(|cx| {
            if shard.is_draining() {
                return Poll::Ready(None);
            }
            shard.accept_waker.set(Some(cx.waker().clone()));
            Poll::Pending
        });
        match stream.or(drain).await {
            None => return,
            Some(Ok(stream)) => admit(&shard, stream),
            Some(Err(error)) => {
                tracing::warn!(%error, "accept failed; trying again");
                shard.state.borrow().metrics().accept_error();
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn admit(shard: &Rc<Shard>, stream: TcpStream) {
    // Answers leave when they are ready; the batch has gathered them already.
    let _ = stream.set_nodelay(true);
    let now = clock::now();
    let addr = stream.peer_addr().ok().map(|addr| addr.ip());
    let mut state = shard.state.borrow_mut();
    if addr.is_some_and(|addr| !state.options.bans.admits(addr, now)) {
        // Without a word: that would be work again.
        return state.metrics().banned();
    }
    let mut connection = Connection::new(stream.as_raw_fd(), now);
    connection.addr = addr;
    connection.points = Points::full(&state.options.rules, now);
    if !state.welcome(&mut connection, now) {
        // The stream ends with this function, before anything was read.
        return;
    }
    state.metrics().connection_opened();
    let full = state.connections.len() >= state.options.connections_max as usize;
    if full && connection.tls.is_some() {
        // It would not understand a word before the handshake, which costs more than the word is worth.
        state.metrics().connection_closed();
        return;
    }
    if full {
        append_goaway(&mut connection, Code::Overloaded, "this shard has as many connections as it may");
        connection.phase = Phase::Leaving;
    }
    let at = state.connections.insert(connection) as u32;
    if full {
        state.output(at);
        state.flush(now);
    } else {
        state.meet(at);
    }
    drop(state);
    spawn(Whose::Connection, &shard.times, serve(Rc::clone(shard), at, stream));
}

/// A connection's task: reads bursts and writes what had to wait, until it is closed.
async fn serve(shard: Rc<Shard>, at: u32, mut stream: TcpStream) {
    // Also when a panic unwinds through here.
    let _guard = RemoveOnDrop { shard: Rc::clone(&shard), at };
    // Since when it has had the shard. It has not while it waits.
    let mut since = None;
    let is_over = |since: Option<Moment>| since.is_some_and(|since| clock::now().since(since) >= TURN_MAX);
    loop {
        let polled = poll_fn(|cx| {
            since.get_or_insert_with(clock::now);
            let polled = turn(&shard, at, &mut stream, cx);
            if polled.is_pending() {
                since = None;
            }
            polled
        });
        match polled.await {
            Turn::Closed => return,
            Turn::Burst => {}
            Turn::Hasty(rest) => {
                // It does not wait by itself, so it is waited for: answers to it go out meanwhile, in the turns of others.
                shard.drain_mailbox();
                since = None;
                sleep(rest).await;
            }
        }
        // Also before it answers others: what was read and what is answered may each take long.
        if is_over(since) {
            since = None;
            sleep(BREATH).await;
        }
        shard.drain_mailbox();
        if is_over(since) {
            since = None;
            sleep(BREATH).await;
        }
    }
}

struct RemoveOnDrop {
    shard: Rc<Shard>,
    at: u32,
}

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        // A panic may have unwound out of a borrow, never with one still held: `RefMut` gives it back.
        self.shard.state.borrow_mut().remove(self.at);
    }
}

enum Turn {
    /// Something was read or written, and there may be more.
    Burst,
    /// It asks again and again: not to be read for so long.
    Hasty(Duration),
    Closed,
}

/// One look at the connection: write what had to wait, read if there is room for answers.
fn turn(shard: &Shard, at: u32, stream: &mut TcpStream, cx: &mut Context<'_>) -> Poll<Turn> {
    let mut state = shard.state.borrow_mut();
    {
        let connection = &mut state.connections[at as usize];
        if connection.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
            connection.waker = Some(cx.waker().clone());
        }
        if connection.phase == Phase::Closed {
            return Poll::Ready(Turn::Closed);
        }
    }
    let mut may_write = false;
    if state.connections[at as usize].blocked {
        match write_waiting(&mut state, at, stream, cx) {
            Poll::Ready(Ok(Written::All)) => state.after_flush(at, clock::now()),
            Poll::Ready(Ok(Written::Enough)) => may_write = true,
            Poll::Ready(Err(_)) => return Poll::Ready(Turn::Closed),
            Poll::Pending => {}
        }
        state.recount(at);
    }
    let unready = || if may_write { Poll::Ready(Turn::Burst) } else { Poll::Pending };
    if state.is_choked(at) {
        return unready();
    }
    let read = |cx: &mut Context<'_>, buffer: &mut [u8]| Pin::new(stream).poll_read(cx, buffer);
    let end = match state.connections[at as usize].tls {
        None => state.read(at, cx, clock::now, read),
        Some(_) => state.read_records(at, cx, clock::now, read),
    };
    let hasty = state.connections[at as usize].throttle.as_mut().and_then(|throttle| throttle.take_pause());
    match (end, hasty) {
        (Poll::Pending, _) => unready(),
        (Poll::Ready(ReadEnd::Gone), _) => Poll::Ready(Turn::Closed),
        (Poll::Ready(ReadEnd::Burst), Some(rest)) => Poll::Ready(Turn::Hasty(rest)),
        (Poll::Ready(ReadEnd::Burst), None) => Poll::Ready(Turn::Burst),
    }
}

/// How far the writing of what had to wait came.
enum Written {
    All,
    /// As much as is written at one go; the socket may take more.
    Enough,
}

fn write_waiting(
    state: &mut State,
    at: u32,
    stream: &mut TcpStream,
    cx: &mut Context<'_>,
) -> Poll<std::io::Result<Written>> {
    let mut written = 0;
    while written < WRITE_MAX {
        let connection = &mut state.connections[at as usize];
        let bytes = connection.next_bytes();
        if bytes.is_empty() {
            connection.blocked = false;
            return Poll::Ready(Ok(Written::All));
        }
        let part = &bytes[..bytes.len().min(WRITE_MAX - written)];
        match Pin::new(&mut *stream).poll_write(cx, part) {
            Poll::Ready(Ok(0)) => return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into())),
            Poll::Ready(Ok(count)) => {
                connection.advance(count, clock::now());
                state.metrics().bytes_written(count as u64);
                written += count;
            }
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        }
    }
    Poll::Ready(Ok(Written::Enough))
}
