//! A proxy between client and server that damages the stream by a schedule: delays, stalls, cuts, half closes, resets, flipped
//! bits, other pieces, throttled. Frame by frame, it may also drop, double and swap whole answers.
//!
//! Always true
//! - What happens at a byte is a pure function of connection, direction and offset (and the seed in the schedule): a failing
//!   run repeats with its seed, however the kernel cuts the stream.
//! - Nothing outlives the proxy: dropping it closes every socket and joins every thread.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use ferry::wire::decoder::Step as Decoded;
use ferry::wire::{Decoder, Kind, Limits};
use socket2::SockRef;

use crate::common::Numbers;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    ToServer,
    ToClient,
}

/// Where in which stream.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Connections are counted from 0 in the order in which they were taken.
    pub connection: u64,
    pub direction: Direction,
    /// Bytes that have passed already.
    pub offset: u64,
}

/// What happens at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Act {
    pub delay: Duration,
    /// Of the byte at this place.
    pub flip: Option<u8>,
    pub then: Then,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Passes what has come, at most so much, in one write.
    Forward(usize),
    /// Waits for so much (or the end) and passes it in one write.
    Gather(usize),
    /// Passes nothing more this way, and says nothing.
    Stall,
    /// Closes both sides as if the proxy's process had ended.
    Cut,
    /// Ends this way alone.
    HalfClose,
    /// Closes both sides with a reset.
    Reset,
}

impl Act {
    pub const PASS: Act = Act::of(Then::Forward(64 << 10));

    pub const fn of(then: Then) -> Act {
        Act { delay: Duration::ZERO, flip: None, then }
    }

    pub fn after(self, delay: Duration) -> Act {
        Act { delay, ..self }
    }
}

type Schedule = dyn Fn(Place) -> Act + Send + Sync;

/// What is done with each frame on its way to the client, given its number on its connection and its kind: the frames that go on
/// instead.
type Frames = dyn Fn(Place, Kind, &[u8], &mut Vec<Vec<u8>>) + Send + Sync;

enum Damage {
    Bytes(Box<Schedule>),
    Answers(Box<Frames>),
}

/// How often each thing was done.
#[derive(Debug, Default)]
pub struct Done {
    pub connections: AtomicU64,
    pub delays: AtomicU64,
    pub flips: AtomicU64,
    pub stalls: AtomicU64,
    pub cuts: AtomicU64,
    pub half_closes: AtomicU64,
    pub resets: AtomicU64,
}

struct Shared {
    target: Mutex<SocketAddr>,
    damage: Damage,
    over: AtomicBool,
    /// Nothing passes either way, and nothing is said: a cable that was pulled.
    dark: AtomicBool,
    /// Bytes that a socket of the proxy holds at most, so that peers' writes are partial; 0 leaves it to the kernel.
    socket_bytes: usize,
    done: Done,
}

pub struct Proxy {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// How often a thread that waits looks whether it is over.
const TICK: Duration = Duration::from_millis(20);

impl Proxy {
    /// Passes everything on unchanged.
    pub fn plain(target: SocketAddr) -> Proxy {
        Proxy::start(target, |_| Act::PASS)
    }

    pub fn start(target: SocketAddr, schedule: impl Fn(Place) -> Act + Send + Sync + 'static) -> Proxy {
        Proxy::new(target, Damage::Bytes(Box::new(schedule)), 0)
    }

    /// The same, with sockets so small that who writes to it is left with partial writes.
    pub fn narrow(
        target: SocketAddr,
        socket_bytes: usize,
        schedule: impl Fn(Place) -> Act + Send + Sync + 'static,
    ) -> Proxy {
        Proxy::new(target, Damage::Bytes(Box::new(schedule)), socket_bytes)
    }

    /// Changes whole frames on their way to the client. The offset of a place counts frames.
    pub fn of_answers(
        target: SocketAddr,
        frames: impl Fn(Place, Kind, &[u8], &mut Vec<Vec<u8>>) + Send + Sync + 'static,
    ) -> Proxy {
        Proxy::new(target, Damage::Answers(Box::new(frames)), 0)
    }

    fn new(target: SocketAddr, damage: Damage, socket_bytes: usize) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let addr = listener.local_addr().expect("bound");
        let shared = Arc::new(Shared {
            target: Mutex::new(target),
            damage,
            over: AtomicBool::new(false),
            dark: AtomicBool::new(false),
            socket_bytes,
            done: Done::default(),
        });
        let thread = {
            let shared = shared.clone();
            std::thread::spawn(move || accept(&listener, &shared))
        };
        Proxy { addr, shared, thread: Some(thread) }
    }

    pub fn done(&self) -> &Done {
        &self.shared.done
    }

    /// Connections from now on go there.
    pub fn set_target(&self, target: SocketAddr) {
        *self.shared.target.lock().expect("not poisoned") = target;
    }

    pub fn set_dark(&self, dark: bool) {
        self.shared.dark.store(dark, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        // Whoever waits in accept is let go by one more connection.
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            assert!(joined.is_ok() || std::thread::panicking(), "the proxy does not panic");
        }
    }
}

/// Both sockets of a connection. Who ends it lets go of it, and so does the other direction's thread; the last closes both.
struct Link {
    client: TcpStream,
    server: TcpStream,
    over: AtomicBool,
}

impl Link {
    /// Ends both directions: in order, or with a reset, which throws away what was written and not yet read.
    fn end(&self, reset: bool) {
        for socket in [&self.client, &self.server] {
            if reset {
                // The reset itself is sent when the socket is closed.
                let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
            } else {
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
        self.over.store(true, Ordering::SeqCst);
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut pumps: Vec<JoinHandle<()>> = Vec::new();
    let mut connection = 0;
    for client in listener.incoming() {
        if shared.over.load(Ordering::SeqCst) {
            break;
        }
        let Ok(client) = client else { continue };
        let target = *shared.target.lock().expect("not poisoned");
        // Nobody there: the client sees what it would see without us.
        let Ok(server) = TcpStream::connect_timeout(&target, Duration::from_secs(5)) else { continue };
        for socket in [&client, &server] {
            socket.set_nodelay(true).expect("a socket option");
            socket.set_read_timeout(Some(TICK)).expect("a socket option");
            socket.set_write_timeout(Some(TICK)).expect("a socket option");
            if shared.socket_bytes > 0 {
                let socket = SockRef::from(socket);
                socket.set_recv_buffer_size(shared.socket_bytes).expect("a socket option");
                socket.set_send_buffer_size(shared.socket_bytes).expect("a socket option");
            }
        }
        let link = Arc::new(Link { client, server, over: AtomicBool::new(false) });
        for direction in [Direction::ToServer, Direction::ToClient] {
            let (shared, link) = (shared.clone(), link.clone());
            let at = Place { connection, direction, offset: 0 };
            pumps.push(std::thread::spawn(move || Pump { shared, link, at, held: Vec::new(), ended: false }.run()));
        }
        connection += 1;
        shared.done.connections.store(connection, Ordering::Relaxed);
        pumps.retain(|pump| !pump.is_finished());
    }
    for pump in pumps {
        let joined = pump.join();
        assert!(joined.is_ok(), "a pump does not panic");
    }
}

/// One direction of one connection.
struct Pump {
    shared: Arc<Shared>,
    link: Arc<Link>,
    at: Place,
    /// Read and not yet passed on.
    held: Vec<u8>,
    ended: bool,
}

impl Pump {
    fn run(self) {
        let shared = self.shared.clone();
        match &shared.damage {
            Damage::Bytes(schedule) => self.pass_bytes(schedule),
            Damage::Answers(frames) if self.at.direction == Direction::ToClient => self.pass_frames(frames),
            Damage::Answers(_) => self.pass_bytes(&|_| Act::PASS),
        }
    }

    fn from(&self) -> &TcpStream {
        match self.at.direction {
            Direction::ToServer => &self.link.client,
            Direction::ToClient => &self.link.server,
        }
    }

    fn to(&self) -> &TcpStream {
        match self.at.direction {
            Direction::ToServer => &self.link.server,
            Direction::ToClient => &self.link.client,
        }
    }

    fn is_over(&self) -> bool {
        self.shared.over.load(Ordering::Relaxed) || self.link.over.load(Ordering::Relaxed)
    }

    /// Takes more of the stream into `held`. False when the peer has gone or the proxy ends.
    fn read(&mut self) -> bool {
        let mut chunk = [0; 16 << 10];
        loop {
            if self.is_over() {
                return false;
            }
            match self.from().read(&mut chunk) {
                Ok(0) => {
                    self.ended = true;
                    return true;
                }
                Ok(count) => {
                    self.held.extend_from_slice(&chunk[..count]);
                    return true;
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                }
                Err(error) => {
                    // A reset is passed on as one.
                    self.link.end(error.kind() == ErrorKind::ConnectionReset);
                    return false;
                }
            }
        }
    }

    fn wait(&self, time: Duration) {
        let mut left = time;
        while left > Duration::ZERO && !self.is_over() {
            let step = left.min(TICK);
            std::thread::sleep(step);
            left -= step;
        }
    }

    /// Writes all of it, or says that nobody reads any more.
    fn write(&mut self, bytes: &[u8]) -> bool {
        while self.shared.dark.load(Ordering::SeqCst) && !self.is_over() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut rest = bytes;
        while !rest.is_empty() && !self.is_over() {
            match self.to().write(rest) {
                Ok(0) => return false,
                Ok(count) => rest = &rest[count..],
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                }
                Err(_) => return false,
            }
        }
        rest.is_empty()
    }

    fn pass_bytes(mut self, schedule: &(impl Fn(Place) -> Act + ?Sized)) {
        let done = &self.shared.clone().done;
        let count = |what: &AtomicU64| {
            what.fetch_add(1, Ordering::Relaxed);
        };
        loop {
            let act = schedule(self.at);
            let enough = match act.then {
                Then::Gather(bytes) => bytes.max(1),
                Then::Forward(_) => 1,
                _ => 0,
            };
            while self.held.len() < enough && !self.ended {
                if !self.read() {
                    return self.link.end(false);
                }
            }
            if enough > 0 && self.held.is_empty() {
                let _ = self.to().shutdown(Shutdown::Write);
                return;
            }
            if act.delay > Duration::ZERO {
                count(&done.delays);
                self.wait(act.delay);
            }
            match act.then {
                Then::Forward(bytes) | Then::Gather(bytes) => {
                    let len = bytes.clamp(1, self.held.len());
                    let mut piece: Vec<u8> = self.held.drain(..len).collect();
                    if let Some(bit) = act.flip {
                        piece[0] ^= 1 << (bit % 8);
                        count(&done.flips);
                    }
                    if !self.write(&piece) {
                        return self.link.end(false);
                    }
                    self.at.offset += len as u64;
                }
                Then::Stall => {
                    count(&done.stalls);
                    // Unread, so that the sender feels it; until who is written to has closed.
                    while !self.is_over() && !matches!(self.to().peek(&mut [0]), Ok(0)) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    return self.link.end(false);
                }
                Then::Cut => {
                    count(&done.cuts);
                    return self.link.end(false);
                }
                Then::HalfClose => {
                    count(&done.half_closes);
                    let _ = self.to().shutdown(Shutdown::Write);
                    // What still comes goes nowhere.
                    while !self.ended && self.read() {
                        self.held.clear();
                    }
                    return;
                }
                Then::Reset => {
                    count(&done.resets);
                    return self.link.end(true);
                }
            }
        }
    }

    fn pass_frames(mut self, change: &Frames) {
        let decoder = Decoder::new(Limits { metadata_bytes: 4096, payload_bytes: Limits::PAYLOAD_CEILING });
        let mut out = Vec::new();
        loop {
            match decoder.next(&self.held).expect("a server's stream is right") {
                Decoded::Frame(frame) => {
                    let bytes: Vec<u8> = self.held.drain(..frame.len).collect();
                    out.clear();
                    change(self.at, frame.kind, &bytes, &mut out);
                    self.at.offset += 1;
                    for frame in &out {
                        if !self.write(frame) {
                            return self.link.end(false);
                        }
                    }
                }
                Decoded::Skip { len } => drop(self.held.drain(..len)),
                Decoded::Incomplete { .. } if self.ended => {
                    let _ = self.to().shutdown(Shutdown::Write);
                    return;
                }
                Decoded::Incomplete { .. } => {
                    if !self.read() {
                        return self.link.end(false);
                    }
                }
            }
        }
    }
}

/// Which faults a schedule mixes, each as a share of blocks in 1000.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    pub seed: u64,
    /// One fault at most in so many bytes.
    pub block: u64,
    /// Longest piece that is passed on at once.
    pub piece: usize,
    pub delay: u64,
    pub flip: u64,
    pub stall: u64,
    pub cut: u64,
    pub half_close: u64,
    pub reset: u64,
}

impl Mix {
    pub const NONE: Mix =
        Mix { seed: 0, block: 4096, piece: 64 << 10, delay: 0, flip: 0, stall: 0, cut: 0, half_close: 0, reset: 0 };

    /// What happens at a place. Pure.
    pub fn act(&self, at: Place) -> Act {
        let block = at.offset / self.block;
        let salt = [at.connection, at.direction as u64, block];
        let mut numbers = Numbers(salt.iter().fold(self.seed, |state, word| Numbers(state ^ word).next()));
        let fault_at = block * self.block + numbers.below(self.block);
        let (chance, millis, bit) = (numbers.below(1000), numbers.below(30), numbers.below(8) as u8);
        let to_fault = if at.offset < fault_at { fault_at - at.offset } else { (block + 1) * self.block - at.offset };
        // Pieces depend on the place as well, so that runs differ in them and repeat with their seed.
        let piece = 1 + Numbers(self.seed ^ at.offset ^ numbers.next()).below(self.piece as u64);
        let pass = Act::of(Then::Forward(piece.min(to_fault) as usize));
        if at.offset != fault_at {
            return pass;
        }
        let kinds = [
            (self.delay, pass.after(Duration::from_millis(millis))),
            (self.flip, Act { flip: Some(bit), ..pass }),
            (self.stall, Act::of(Then::Stall)),
            (self.cut, Act::of(Then::Cut)),
            (self.half_close, Act::of(Then::HalfClose)),
            (self.reset, Act::of(Then::Reset)),
        ];
        let mut below = 0;
        let mut chosen = kinds.into_iter().filter(|(share, _)| {
            below += share;
            chance < below
        });
        chosen.next().map_or(pass, |(_, act)| act)
    }
}
