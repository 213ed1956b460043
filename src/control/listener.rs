//! The control port's connections: how many, encrypted or not, and for how long and how much each may ask.
//!
//! Always true
//! - At most [`CONNECTIONS_MAX`] are open, and each ends when a request takes too long or is too long.
//! - A handshake is made by whoever reads or writes first: one that dawdles holds up its own connection.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_rustls::server::TlsStream;
use tokio_rustls::{Accept, TlsAcceptor};

use super::admin::{CONNECTIONS_MAX, REQUEST_BYTES_MAX, REQUEST_TIMEOUT};
use super::auth::Gate;
use crate::clock;

/// Accepts at most [`CONNECTIONS_MAX`] connections at once.
pub(super) struct Bounded {
    listener: TcpListener,
    seats: Arc<Semaphore>,
    gate: Option<Arc<Gate>>,
}

impl Bounded {
    pub(super) fn new(listener: TcpListener, gate: Option<Arc<Gate>>) -> Bounded {
        Bounded { listener, seats: Arc::new(Semaphore::new(CONNECTIONS_MAX)), gate }
    }
}

/// A socket, encrypted or not. The handshake is made by whoever reads or writes first, so that one that dawdles holds up nobody.
enum Wire {
    Plain(TcpStream),
    Shaking(Box<Accept<TcpStream>>),
    Tls(Box<TlsStream<TcpStream>>),
}

trait Duplex: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Duplex for T {}

impl Wire {
    fn new(stream: TcpStream, tls: Option<Arc<rustls::ServerConfig>>) -> Wire {
        match tls {
            None => Wire::Plain(stream),
            Some(config) => Wire::Shaking(Box::new(TlsAcceptor::from(config).accept(stream))),
        }
    }

    /// What bytes go through, once the handshake is over.
    fn poll_open(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Pin<&mut dyn Duplex>>> {
        if let Wire::Shaking(accept) = self {
            let stream = std::task::ready!(Pin::new(&mut **accept).poll(context))?;
            *self = Wire::Tls(Box::new(stream));
        }
        Poll::Ready(Ok(match self {
            Wire::Plain(stream) => Pin::new(stream),
            Wire::Tls(stream) => Pin::new(&mut **stream),
            Wire::Shaking(_) => unreachable!("replaced above"),
        }))
    }
}

impl axum::serve::Listener for Bounded {
    type Io = Guarded;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Guarded, SocketAddr) {
        let seat = Arc::clone(&self.seats).acquire_owned().await.expect("the seats are never closed");
        loop {
            match self.listener.accept().await {
                Ok((stream, addr)) => {
                    let tls = self.gate.as_ref().and_then(|gate| (gate.tls)());
                    return (Guarded::new(Wire::new(stream, tls), seat), addr);
                }
                // Out of files, or the peer went away: neither gets better by asking again at once.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends when a request takes too long or is too long.
pub(super) struct Guarded {
    stream: Wire,
    /// Bytes read since the last were written.
    request_bytes: usize,
    deadline: Pin<Box<Sleep>>,
    _seat: OwnedSemaphorePermit,
}

impl Guarded {
    fn new(stream: Wire, seat: OwnedSemaphorePermit) -> Guarded {
        Guarded { stream, request_bytes: 0, deadline: Box::pin(tokio::time::sleep(REQUEST_TIMEOUT)), _seat: seat }
    }

    fn overdue(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.deadline.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::TimedOut, "the request took too long")),
            Poll::Pending => Ok(()),
        }
    }

    /// Something was written: the request has been read, and the time for the next begins.
    fn progressed(&mut self) {
        self.request_bytes = 0;
        let until = tokio::time::Instant::from_std(clock::instant_of(clock::now() + REQUEST_TIMEOUT));
        self.deadline.as_mut().reset(until);
    }
}

impl AsyncRead for Guarded {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.overdue(context)?;
        let before = buffer.filled().len();
        let read = std::task::ready!(this.stream.poll_open(context))?.poll_read(context, buffer);
        this.request_bytes += buffer.filled().len() - before;
        if this.request_bytes > REQUEST_BYTES_MAX {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "the request is too long")));
        }
        read
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.overdue(context)?;
        let written = std::task::ready!(this.stream.poll_open(context))?.poll_write(context, bytes);
        if let Poll::Ready(Ok(1..)) = written {
            this.progressed();
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.get_mut().stream.poll_open(context))?.poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            // There is no session to end.
            Wire::Shaking(_) => Poll::Ready(Ok(())),
            Wire::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Wire::Tls(stream) => Pin::new(&mut **stream).poll_shutdown(context),
        }
    }
}
