//! A connected socket, encrypted or not: one thread reads, one at a time writes.
//!
//! Always true
//! - Reading never writes, and neither holds a lock while the socket makes it wait: a server that waits for us to read is not waited for.
//! - Records leave in the order in which they were made; those that the socket did not take go before any other.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::MsgFlags;
use rustls::{ClientConfig, ClientConnection};
use rustls_pki_types::ServerName;

use super::slot::lock;
use crate::tls::ALPN;

/// How to encrypt: see [`crate::tls::client_config`].
#[derive(Clone, Debug)]
pub struct ClientTls {
    pub config: Arc<ClientConfig>,
    /// The name that the server's certificate is to have; empty: the address that was connected to.
    pub name: String,
}

impl ClientTls {
    fn session(&self, socket: &TcpStream) -> std::io::Result<ClientConnection> {
        let name = match self.name.as_str() {
            "" => ServerName::IpAddress(socket.peer_addr()?.ip().into()),
            name => ServerName::try_from(name.to_owned()).map_err(|_| {
                std::io::Error::new(ErrorKind::InvalidInput, format!("{name:?} is not a name of a server"))
            })?,
        };
        ClientConnection::new(Arc::clone(&self.config), name).map_err(broken)
    }

    /// Encrypts a socket that blocks, for whatever is spoken on it. The handshake is made with the first byte.
    pub fn open(&self, socket: TcpStream) -> std::io::Result<impl Read + Write + use<>> {
        Ok(rustls::StreamOwned::new(self.session(&socket)?, socket))
    }
}

/// Bytes that are encrypted at a time, and records that are read at a time.
const PART: usize = 16 << 10;

#[derive(Debug)]
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<Tls>),
}

#[derive(Debug)]
pub(crate) struct Tls {
    socket: TcpStream,
    session: Mutex<Session>,
    /// Records on their way to the socket. Held by whoever writes.
    wire: Mutex<Wire>,
}

#[derive(Debug)]
struct Session {
    tls: ClientConnection,
    /// Decrypted and not yet read, from `read` on.
    plain: Vec<u8>,
    read: usize,
    /// The server said that it ends.
    ended: bool,
}

#[derive(Debug, Default)]
struct Wire {
    bytes: Vec<u8>,
    sent: usize,
}

fn broken(error: rustls::Error) -> std::io::Error {
    std::io::Error::new(ErrorKind::InvalidData, format!("TLS: {error}"))
}

impl Session {
    /// Takes decrypted bytes.
    fn take(&mut self, buffer: &mut [u8]) -> usize {
        let count = buffer.len().min(self.plain.len() - self.read);
        buffer[..count].copy_from_slice(&self.plain[self.read..self.read + count]);
        self.read += count;
        if self.read == self.plain.len() {
            self.plain.clear();
            self.read = 0;
        }
        count
    }

    fn feed(&mut self, mut records: &[u8]) -> std::io::Result<()> {
        while !records.is_empty() {
            self.tls.read_tls(&mut records)?;
            self.tls.process_new_packets().map_err(broken)?;
            let mut part = [0; PART];
            loop {
                match self.tls.reader().read(&mut part) {
                    Ok(0) => {
                        self.ended = true;
                        return Ok(());
                    }
                    Ok(count) => self.plain.extend_from_slice(&part[..count]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

impl Stream {
    /// Encrypts a socket that blocks: the handshake is over when this returns.
    pub(crate) fn open(mut socket: TcpStream, tls: Option<&ClientTls>) -> std::io::Result<Stream> {
        let Some(tls) = tls else { return Ok(Stream::Plain(socket)) };
        let mut session = tls.session(&socket)?;
        while session.is_handshaking() {
            session.complete_io(&mut socket)?;
        }
        if session.alpn_protocol() != Some(ALPN) {
            return Err(std::io::Error::new(ErrorKind::InvalidData, "TLS: the server does not speak ferry/1"));
        }
        let session = Session { tls: session, plain: Vec::new(), read: 0, ended: false };
        Ok(Stream::Tls(Box::new(Tls { socket, session: Mutex::new(session), wire: Mutex::default() })))
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        match self {
            Stream::Plain(socket) => socket,
            Stream::Tls(tls) => &tls.socket,
        }
    }

    pub(crate) fn set_timeouts(&self, read: Duration, write: Duration) -> std::io::Result<()> {
        self.socket().set_read_timeout(Some(read))?;
        self.socket().set_write_timeout(Some(write))
    }

    pub(crate) fn shutdown(&self) {
        // An error here means that the socket is already down, which is what is wanted.
        let _ = self.socket().shutdown(Shutdown::Both);
    }

    /// As of a socket: 0 is the end. One thread at a time.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let tls = match self {
            Stream::Plain(socket) => {
                let mut socket: &TcpStream = socket;
                return socket.read(buffer);
            }
            Stream::Tls(tls) => tls,
        };
        let mut records = [0; PART];
        loop {
            {
                let mut session = lock(&tls.session);
                let count = session.take(buffer);
                if count > 0 || session.ended {
                    return Ok(count);
                }
            }
            let count = (&tls.socket).read(&mut records)?;
            if count == 0 {
                // Without a goodbye: cut off, perhaps by somebody else.
                return Ok(0);
            }
            lock(&tls.session).feed(&records[..count])?;
        }
    }

    /// Decrypted bytes wait to be read, whatever the socket says.
    pub(crate) fn has_more(&self) -> bool {
        match self {
            Stream::Plain(_) => false,
            Stream::Tls(tls) => !lock(&tls.session).plain.is_empty(),
        }
    }

    /// Records wait for the socket.
    pub(crate) fn has_pending(&self) -> bool {
        match self {
            Stream::Plain(_) => false,
            Stream::Tls(tls) => {
                let wire = lock(&tls.wire);
                wire.sent < wire.bytes.len()
            }
        }
    }

    /// Writes what the socket takes at once, and says how much of `bytes` needs not be written again. Some of that may wait as records:
    /// see [`Stream::has_pending`].
    pub(crate) fn write_at_once(&self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Stream::Plain(socket) => send_at_once(socket, bytes),
            Stream::Tls(tls) => tls.write(bytes, send_at_once),
        }
    }

    /// Writes all of it, and what waits before it.
    pub(crate) fn write_all(&self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Stream::Plain(socket) => {
                let mut socket: &TcpStream = socket;
                socket.write_all(bytes)
            }
            Stream::Tls(tls) => {
                tls.write(bytes, |mut socket, bytes| socket.write_all(bytes).map(|()| bytes.len())).map(drop)
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

impl Tls {
    fn write(
        &self,
        bytes: &[u8],
        send: impl Fn(&TcpStream, &[u8]) -> std::io::Result<usize>,
    ) -> std::io::Result<usize> {
        let mut wire = lock(&self.wire);
        let mut taken = 0;
        loop {
            let Wire { bytes: records, sent } = &mut *wire;
            *sent += send(&self.socket, &records[*sent..])?;
            if *sent < records.len() {
                return Ok(taken);
            }
            records.clear();
            *sent = 0;
            if taken == bytes.len() {
                return Ok(taken);
            }
            let mut session = lock(&self.session);
            taken += session.tls.writer().write(&bytes[taken..bytes.len().min(taken + PART)])?;
            while session.tls.wants_write() {
                session.tls.write_tls(records)?;
            }
        }
    }
}

/// Writes what the kernel takes without waiting, and says how much that was.
fn send_at_once(stream: &TcpStream, bytes: &[u8]) -> std::io::Result<usize> {
    let mut at = 0;
    while at < bytes.len() {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match nix::sys::socket::send(stream.as_raw_fd(), &bytes[at..], flags) {
            Ok(count) => at += count,
            Err(nix::Error::EINTR) => {}
            Err(nix::Error::EAGAIN) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(at)
}
