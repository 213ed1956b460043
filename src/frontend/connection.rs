//! One connection's state: what it may send, what it waits for, what still has to be written to it.
//!
//! Always true
//! - Nothing is accepted before the hello, after a goaway, or beyond the credit.
//! - Request ids rise, so that no two requests in flight share one.
//!
//! Pure but for [`Connection::try_flush`], which writes what the socket takes and never waits.

use std::net::IpAddr;
use std::os::fd::RawFd;
use std::task::Waker;

use bytes::BytesMut;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

use super::abuse::{Points, Rules};
use super::inflight::Owned;
use super::output::Output;
use super::throttle::Throttle;
use super::tls::Tls;
use crate::quota::Seat;
use crate::scheduler::TenantId;
use crate::tenants::{Identity, Roles};
use crate::vocab::Moment;
use crate::wire::{Decoder, Limits};

/// Most bytes written at one go.
pub const WRITE_MAX: usize = 512 << 10;

/// How far a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing but a hello is understood.
    Greeting,
    Open,
    /// A goaway was sent: what was accepted is still answered, frames that come are read and thrown away.
    Leaving,
    /// All is answered and the sending side is shut; waiting for the peer's end.
    Lingering,
    /// To be dropped as soon as its task runs.
    Closed,
}

/// Whether all output has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    All,
    /// The socket takes no more for now.
    Blocked,
    /// The peer is gone.
    Broken,
}

#[derive(Debug)]
pub struct Connection {
    pub fd: RawFd,
    pub phase: Phase,
    pub decoder: Decoder,
    /// The start of a frame whose end has not come yet.
    pub partial: BytesMut,
    /// Bytes that the partial frame needs in all.
    pub needed: usize,
    /// When the first byte of the partial frame came.
    pub frame_since: Moment,
    pub out: Output,
    /// The socket took not all of `out`: the task waits until it takes more.
    pub blocked: bool,
    /// Unsent bytes that the shard's sum has of this connection.
    pub counted: usize,
    /// The task's waker, to be used when something changed for it.
    pub waker: Option<Waker>,
    /// The stream can no longer be read as frames: what comes is thrown away while answers go out.
    pub deaf: bool,
    /// Listed among those to flush at the end of this burst.
    pub dirty: bool,
    pub owned: Owned,
    /// Where it is encrypted.
    pub tls: Option<Box<Tls>>,
    /// Names in its certificate.
    pub uris: Vec<String>,
    /// What it proved to be, where it has to.
    pub identity: Option<Identity>,
    pub roles: Roles,
    /// Counted among those that have not said hello.
    pub is_stranger: bool,
    pub tenant: TenantId,
    /// Its place among its tenant's connections, from the hello on.
    pub seat: Option<Seat>,
    pub requests_in_flight: u32,
    pub bytes_in_flight: u64,
    /// Payload bytes that it may have in flight at present.
    pub window_bytes: u64,
    pub last_id: u64,
    pub points: Points,
    /// What of it was refused for now, from its first refusal on.
    pub throttle: Option<Box<Throttle>>,
    /// Where it comes from, if that is known.
    pub addr: Option<IpAddr>,
    pub since: Moment,
    /// Last time bytes came.
    pub read_at: Moment,
    /// Last time bytes went, or the first time they had to wait.
    pub wrote_at: Moment,
}

impl Connection {
    pub fn new(fd: RawFd, now: Moment) -> Connection {
        Connection {
            fd,
            phase: Phase::Greeting,
            decoder: Decoder::new(Limits::BEFORE_HELLO),
            partial: BytesMut::new(),
            needed: 0,
            frame_since: now,
            out: Output::default(),
            blocked: false,
            counted: 0,
            waker: None,
            deaf: false,
            dirty: false,
            owned: Owned::default(),
            tls: None,
            uris: Vec::new(),
            identity: None,
            roles: Roles::ALL,
            is_stranger: false,
            requests_in_flight: 0,
            tenant: TenantId::default(),
            seat: None,
            bytes_in_flight: 0,
            window_bytes: 0,
            last_id: 0,
            points: Points::full(&Rules::NONE, now),
            throttle: None,
            addr: None,
            since: now,
            read_at: now,
            wrote_at: now,
        }
    }

    /// Bytes waiting to be written.
    pub fn unsent(&self) -> usize {
        self.out.len() + self.tls.as_ref().map_or(0, |tls| tls.unsent())
    }

    /// The next bytes for the socket: of the output, or records that are made of it now. Empty also where a handshake has to end first.
    pub fn next_bytes(&mut self) -> &[u8] {
        let Some(tls) = &mut self.tls else { return self.out.front() };
        let taken = tls.encrypt(self.out.front());
        self.out.advance(taken);
        self.tls.as_ref().expect("just used").unsent_bytes()
    }

    /// `count` more bytes went out.
    pub fn advance(&mut self, count: usize, now: Moment) {
        self.wrote_at = now;
        match &mut self.tls {
            Some(tls) => tls.advance(count),
            None => self.out.advance(count),
        }
        self.blocked &= self.unsent() > 0;
    }

    /// Writes what the socket takes, but no more than is written at one go: the rest is left to the connection's task, as if the
    /// socket had not taken it.
    pub fn try_flush(&mut self, now: Moment) -> Flushed {
        let mut room = WRITE_MAX;
        while self.unsent() > 0 {
            let fd = self.fd;
            let bytes = self.next_bytes();
            if bytes.is_empty() {
                break;
            }
            if room == 0 {
                self.blocked = true;
                return Flushed::Blocked;
            }
            let part = &bytes[..bytes.len().min(room)];
            match send(fd, part, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
                Ok(count) => {
                    room -= count;
                    self.advance(count, now);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if !self.blocked {
                        self.blocked = true;
                        self.wrote_at = now;
                    }
                    return Flushed::Blocked;
                }
                Err(_) => return Flushed::Broken,
            }
        }
        Flushed::All
    }

    /// Ends here: what waits is thrown away, and nothing more is written.
    pub fn close(&mut self) {
        self.phase = Phase::Closed;
        self.out.clear();
        self.tls = None;
        self.wake();
    }

    /// Wakes the connection's task, which looks at what changed.
    pub fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Gives back buffers that only bursts need.
    pub fn trim(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.trim();
        }
        self.out.trim();
        if self.partial.is_empty() && self.partial.capacity() > 0 {
            self.partial = BytesMut::new();
        }
    }
}
