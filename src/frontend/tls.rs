//! A connection's TLS session: records in, bytes out, and back. No socket: the connection reads and writes.
//!
//! Not the asynchronous wrapper around rustls: a shard writes all answers of a batch itself, without waking the connections' tasks, and
//! its state is borrowed for one step at a time. A session that is a plain state fits that; one that owns a stream does not.
//!
//! Always true
//! - Answers are encrypted when the socket can take records: at most [`RECORDS_MAX`] of them are held beside the connection's output.
//! - Before the handshake has ended nothing of the connection's output is taken.

use std::io::{Read, Write};
use std::sync::Arc;

use rustls::{ServerConfig, ServerConnection};

use crate::tls::{ALPN, uris_of};

/// Bytes of output that are encrypted at a time. With what records add this is also how much is held.
const RECORDS_MAX: usize = 32 << 10;

/// Why a session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFault(pub String);

#[derive(Debug)]
pub struct Tls {
    session: ServerConnection,
    /// Records that the socket has not taken yet.
    wire: Vec<u8>,
    sent: usize,
    established: bool,
}

impl Tls {
    pub fn new(config: Arc<ServerConfig>) -> Result<Tls, TlsFault> {
        let mut session = ServerConnection::new(config).map_err(|error| TlsFault(error.to_string()))?;
        session.set_buffer_limit(Some(RECORDS_MAX));
        Ok(Tls { session, wire: Vec::new(), sent: 0, established: false })
    }

    pub fn is_established(&self) -> bool {
        self.established
    }

    /// Takes records from the front of `bytes`, as many as fit. True when the handshake ended with them.
    pub fn feed(&mut self, bytes: &mut &[u8]) -> Result<bool, TlsFault> {
        self.session.read_tls(bytes).map_err(|error| TlsFault(error.to_string()))?;
        // What the peer is to know of a failure, an alert, lies among the records then.
        let outcome = self.session.process_new_packets();
        self.collect();
        outcome.map_err(|error| TlsFault(error.to_string()))?;
        if self.established || self.session.is_handshaking() {
            return Ok(false);
        }
        if self.session.alpn_protocol() != Some(ALPN) {
            return Err(TlsFault("the client did not offer the protocol ferry/1 (ALPN)".into()));
        }
        self.established = true;
        Ok(true)
    }

    /// Decrypted bytes. `WouldBlock`: none are there; 0: the peer said that it ends; `UnexpectedEof` cannot be, for ends of the socket
    /// are not told here.
    pub fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.session.reader().read(buffer)
    }

    /// Encrypts from the front of `output` if all records before have gone, and says how much.
    pub fn encrypt(&mut self, output: &[u8]) -> usize {
        if !self.established || self.unsent() > 0 {
            return 0;
        }
        let part = &output[..output.len().min(RECORDS_MAX)];
        // The limit is that of the session, so it takes all; what it did not take would stay in the output.
        let taken = self.session.writer().write(part).unwrap_or(0);
        self.collect();
        taken
    }

    fn collect(&mut self) {
        while self.session.wants_write() {
            // Into memory: it does not fail.
            if self.session.write_tls(&mut self.wire).unwrap_or(0) == 0 {
                break;
            }
        }
    }

    /// Says the peer that nothing more comes.
    pub fn say_goodbye(&mut self) {
        self.session.send_close_notify();
        self.collect();
    }

    pub fn unsent(&self) -> usize {
        self.wire.len() - self.sent
    }

    pub fn unsent_bytes(&self) -> &[u8] {
        &self.wire[self.sent..]
    }

    /// `count` more bytes of records went out.
    pub fn advance(&mut self, count: usize) {
        self.sent += count;
        if self.sent == self.wire.len() {
            self.wire.clear();
            self.sent = 0;
        }
    }

    /// The URIs in the client's certificate, which was verified; none where it showed none.
    pub fn client_uris(&self) -> Vec<String> {
        let certificates = self.session.peer_certificates().unwrap_or_default();
        certificates.first().map_or_else(Vec::new, uris_of)
    }

    /// Gives back a buffer that only bursts need.
    pub fn trim(&mut self) {
        if self.wire.is_empty() && self.wire.capacity() > 0 {
            self.wire = Vec::new();
        }
    }
}
