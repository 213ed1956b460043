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
use std::task::{Context, Poll, Waker};

use rustls::{ServerConfig, ServerConnection};

use super::connection::Phase;
use super::state::{ReadEnd, State};
use crate::telemetry::TurnedAway;
use crate::tls::{ALPN, uris_of};
use crate::vocab::Moment;

/// Records taken in one read of an encrypted connection.
const RECORDS: usize = 32 << 10;

/// Bytes of output that are encrypted at a time. With what records add this is also how much is held.
const RECORDS_MAX: usize = 32 << 10;
/// Bytes of a handshake. A chain of certificates has a few thousand; rustls alone would gather a message of 64 KiB of anybody.
const HANDSHAKE_BYTES_MAX: usize = 32 << 10;

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
    /// Of the handshake, as long as it lasts.
    received: usize,
    /// Decrypted bytes that wait to be read.
    readable: usize,
    /// The peer said that nothing more comes.
    ended: bool,
}

impl Tls {
    pub fn new(config: Arc<ServerConfig>) -> Result<Tls, TlsFault> {
        let mut session = ServerConnection::new(config).map_err(|error| TlsFault(error.to_string()))?;
        session.set_buffer_limit(Some(RECORDS_MAX));
        Ok(Tls { session, wire: Vec::new(), sent: 0, established: false, received: 0, readable: 0, ended: false })
    }

    pub fn is_established(&self) -> bool {
        self.established
    }

    /// Whether anything has come.
    fn has_begun(&self) -> bool {
        self.established || self.received > 0
    }

    /// Takes records from the front of `bytes`, as many as fit. True when the handshake ended with them.
    pub fn feed(&mut self, bytes: &mut &[u8]) -> Result<bool, TlsFault> {
        let count = self.session.read_tls(bytes).map_err(|error| TlsFault(error.to_string()))?;
        if !self.established {
            self.received += count;
            if self.received > HANDSHAKE_BYTES_MAX {
                return Err(TlsFault(format!("a handshake of more than {HANDSHAKE_BYTES_MAX} bytes")));
            }
        }
        // What the peer is to know of a failure, an alert, lies among the records then.
        let outcome = self.session.process_new_packets();
        self.collect();
        let state = outcome.map_err(explained)?;
        self.readable = state.plaintext_bytes_to_read();
        self.ended = state.peer_has_closed();
        if self.established || self.session.is_handshaking() {
            return Ok(false);
        }
        if self.session.alpn_protocol() != Some(ALPN) {
            return Err(TlsFault("the client did not offer the protocol ferry/1 (ALPN)".into()));
        }
        self.established = true;
        Ok(true)
    }

    /// Decrypted bytes that wait to be read.
    pub fn readable(&self) -> usize {
        self.readable
    }

    /// Whether the peer said that nothing more comes, behind what is readable.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Decrypted bytes, of which there are some.
    pub fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.session.reader().read(buffer)?;
        self.readable -= count;
        Ok(count)
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

/// What rustls says, or what that mostly means.
fn explained(error: rustls::Error) -> TlsFault {
    TlsFault(match error {
        rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => {
            "the peer does not speak TLS, and this port nothing else".into()
        }
        error => error.to_string(),
    })
}

impl State {
    /// The same for an encrypted connection: `read` brings records.
    pub fn read_records(
        &mut self,
        at: u32,
        cx: &mut Context<'_>,
        now: impl Fn() -> Moment,
        read: impl FnOnce(&mut Context<'_>, &mut [u8]) -> Poll<std::io::Result<usize>>,
    ) -> Poll<ReadEnd> {
        let mut records = std::mem::take(&mut self.records);
        records.resize(RECORDS, 0);
        let end = read(cx, &mut records).map(|outcome| match outcome {
            Ok(count) if count > 0 => self.take_records(at, &records[..count], now()),
            end => ReadEnd::of(end),
        });
        self.records = records;
        end
    }

    /// Decrypts and takes what it gives, as if that had been read.
    fn take_records(&mut self, at: u32, mut records: &[u8], now: Moment) -> ReadEnd {
        let mut tls = self.connections[at as usize].tls.take().expect("the caller asked");
        let mut end = ReadEnd::Burst;
        // Here and not when it came: who says nothing costs others no handshake.
        if !tls.has_begun() && !self.handshakes.take(1.0, now) {
            self.metrics().turned_away(TurnedAway::Handshakes);
            end = ReadEnd::Gone;
        }
        'records: while !records.is_empty() && end == ReadEnd::Burst {
            match tls.feed(&mut records) {
                Ok(false) => {}
                Ok(true) => {
                    self.connections[at as usize].uris = tls.client_uris();
                    self.metrics().handshake(true);
                }
                Err(fault) => {
                    if !tls.is_established() {
                        self.metrics().handshake(false);
                        if self.complaints.take(1.0, now) {
                            tracing::warn!(reason = fault.0, "a TLS handshake failed");
                        }
                    } else {
                        tracing::debug!(reason = fault.0, "a TLS session ended");
                    }
                    end = ReadEnd::Gone;
                    break;
                }
            }
            // No more than is there: room for a whole frame would be cleared for each record of it.
            while tls.readable() > 0 {
                let most = tls.readable();
                let decrypted = |_: &mut Context<'_>, buffer: &mut [u8]| Poll::Ready(tls.read(buffer));
                match self.read_at_most(most, at, &mut Context::from_waker(Waker::noop()), || now, decrypted) {
                    Poll::Ready(ReadEnd::Burst) => {}
                    Poll::Ready(ReadEnd::Gone) | Poll::Pending => unreachable!("what is readable is read"),
                }
                if self.connections[at as usize].phase == Phase::Closed {
                    break 'records;
                }
            }
            if tls.has_ended() {
                end = ReadEnd::Gone;
            }
        }
        let connection = &mut self.connections[at as usize];
        if connection.phase != Phase::Closed {
            connection.tls = Some(tls);
            connection.read_at = now;
            if end == ReadEnd::Gone {
                // The peer is told why, if its socket takes that at once.
                let _ = connection.try_flush(now);
            }
            self.output(at);
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use rustls::ClientConnection;

    use super::*;
    use crate::tls::{ClientAuth, ServerFiles, client_config, server_config};

    /// Both ends of a session that has not begun.
    fn ends() -> (Tls, ClientConnection) {
        let folder = tempfile::tempdir().expect("a folder");
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(["server".to_owned()]).expect("a certificate");
        let (certificate, key) = (folder.path().join("server.pem"), folder.path().join("server.key"));
        std::fs::write(&certificate, cert.pem()).expect("written");
        std::fs::write(&key, signing_key.serialize_pem()).expect("written");
        let ours = client_config(&certificate, None).expect("a good file");
        let files = ServerFiles { certificate, key, client_ca: None, client_auth: ClientAuth::None };
        let client = ClientConnection::new(ours, "server".try_into().expect("a name")).expect("a session");
        (Tls::new(server_config(&files).expect("good files")).expect("a session"), client)
    }

    /// Carries all that waits from the client to the server, `at_once` bytes at a time, and gives what the server reads.
    fn carry_up(client: &mut ClientConnection, server: &mut Tls, at_once: usize) -> Result<Vec<u8>, TlsFault> {
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        while client.wants_write() {
            client.write_tls(&mut wire).expect("into memory");
        }
        for mut part in wire.chunks(at_once) {
            while !part.is_empty() {
                server.feed(&mut part)?;
                while server.readable() > 0 {
                    let from = plain.len();
                    // A part of it at a time, as where a frame is to end.
                    plain.resize(from + server.readable().min(1000), 0);
                    let count = server.read(&mut plain[from..]).expect("it is readable");
                    plain.truncate(from + count);
                }
            }
        }
        Ok(plain)
    }

    /// The same the other way: of `output` as much as is encrypted, in pieces that a socket might take.
    fn carry_down(server: &mut Tls, output: &[u8], client: &mut ClientConnection) -> Vec<u8> {
        let (mut taken, mut plain) = (0, Vec::new());
        loop {
            taken += server.encrypt(&output[taken..]);
            if server.unsent() == 0 {
                break;
            }
            assert!(server.unsent() <= RECORDS_MAX + 4096, "{} bytes of records are held", server.unsent());
            let count = server.unsent().min(777);
            let mut piece = &server.unsent_bytes()[..count];
            while !piece.is_empty() {
                client.read_tls(&mut piece).expect("from memory");
                client.process_new_packets().expect("sound records");
                let mut part = [0; 20_000];
                while let Ok(read @ 1..) = client.reader().read(&mut part) {
                    plain.extend_from_slice(&part[..read]);
                }
            }
            server.advance(count);
        }
        assert!(!server.is_established() || taken == output.len());
        plain
    }

    fn shake_hands(server: &mut Tls, client: &mut ClientConnection, at_once: usize) {
        for _ in 0..3 {
            assert_eq!(carry_up(client, server, at_once), Ok(Vec::new()));
            assert!(carry_down(server, &[], client).is_empty());
        }
        assert!(server.is_established() && !client.is_handshaking());
    }

    #[test]
    fn bytes_of_every_size_cross_in_both_directions_however_they_are_cut() {
        for at_once in [1, 5, 4096, 1 << 20] {
            let (mut server, mut client) = ends();
            assert_eq!(server.encrypt(b"too early"), 0, "nothing is taken before the handshake has ended");
            shake_hands(&mut server, &mut client, at_once);
            for size in [1, 100, 16_383, 16_384, 16_385, 60_000, 200_000] {
                if at_once == 1 && size > 20_000 {
                    continue;
                }
                let bytes: Vec<u8> = (0..size).map(|at| (at * 7 + size) as u8).collect();
                assert!(carry_down(&mut server, &bytes, &mut client) == bytes, "{size} bytes down");
                let mut up = Vec::new();
                for part in bytes.chunks(30_000) {
                    client.writer().write_all(part).expect("into memory");
                    up.extend(carry_up(&mut client, &mut server, at_once).expect("sound records"));
                }
                assert!(up == bytes, "{size} bytes up");
            }
            client.send_close_notify();
            assert!(!server.has_ended());
            assert_eq!(carry_up(&mut client, &mut server, at_once), Ok(Vec::new()));
            assert!(server.has_ended());
        }
    }

    #[test]
    fn a_handshake_is_bounded_whatever_it_claims_to_be() {
        let (mut server, _) = ends();
        // A client hello of 60,000 bytes, record by record.
        let mut wire = vec![1, 0, 60_000u16.to_be_bytes()[0], 60_000u16.to_be_bytes()[1]];
        wire.resize(60_000, 0);
        let mut taken = 0;
        let fault = wire.chunks(1000).find_map(|part| {
            let length = (part.len() as u16).to_be_bytes();
            let record = [&[0x16, 3, 1, length[0], length[1]], part].concat();
            let mut bytes = record.as_slice();
            while !bytes.is_empty() {
                if let Err(fault) = server.feed(&mut bytes) {
                    return Some(fault);
                }
            }
            taken += record.len();
            None
        });
        let fault = fault.expect("it does not take all of it");
        assert!(fault.0.contains("more than 32768 bytes"), "{fault:?}");
        assert!(taken <= HANDSHAKE_BYTES_MAX);
    }

    #[test]
    fn who_does_not_speak_tls_is_called_that_and_a_goodbye_in_the_handshake_ends_it() {
        for noise in [&b"FRY\x01\x01\x00\x00\x00"[..], b"GET / HTTP/1.1\r\n\r\n"] {
            let (mut server, _) = ends();
            let mut bytes = noise;
            let fault = server.feed(&mut bytes).expect_err("it is no record");
            assert!(fault.0.contains("does not speak TLS"), "{fault:?}");
        }
        let (mut server, _) = ends();
        // Before a version is agreed on rustls forgives a few; each is used up, and more of them are no way to stay.
        let over = (0..8).find(|_| {
            let mut bytes = &[0x15, 3, 3, 0, 2, 1, 0][..];
            let over = server.feed(&mut bytes).is_err() || server.has_ended();
            assert!(bytes.is_empty(), "it is used up");
            over
        });
        assert!(over.is_some() && !server.is_established());
    }
}
