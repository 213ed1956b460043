//! The client library: pipelined, multiplexed, typed.
//!
//! [`Client`] is one connection, for any number of threads. [`Pool`] is several connections to several replicas, with
//! retries where they are safe. [`session`] is the same protocol without a socket, for those who bring their own.
//!
//! Always true
//! - A request that was submitted ends exactly once: with a response or with one [`ClientError`] or [`PoolError`].
//! - An error says whether a model may have run, so that a caller knows when a retry is safe.
//!
//! Elsewhere: bytes (wire), what a request may look like (contract.rs), making many of them (load).

pub mod blocking;
pub(crate) mod connection;
pub mod pool;
pub mod request;
mod route;
pub mod session;
mod slot;
pub(crate) mod stream;

use crate::vocab::{Code, Executed, Refusal};

pub use blocking::{Client, Items, Pending};
pub use connection::ClientOptions;
pub use pool::{Pool, PoolError, PoolOptions, PoolPending, PoolStats, ReplicaStats};
pub use request::{Element, Request, Response, Rows};
pub use route::{ReplicaState, Stop};
pub use session::{ModelEntry, ModelInfo, ServerStats};
pub use stream::ClientTls;

/// Why there is no response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientError {
    /// No connection came about. Nothing was sent.
    Connect(String),
    /// The server's typed no.
    Refused(Refusal),
    /// The request does not fit its model's contract or the server's limits. It was not sent.
    Contract(Refusal),
    /// The server said goaway before it took this request: it never ran, another replica may take it.
    Goaway { code: Option<Code>, message: String },
    /// The connection ended first.
    ConnectionLost { executed: Executed, reason: String },
    /// The deadline passed here: before anything was sent (`Never`), or without any answer from the server (`Maybe`).
    DeadlineExceeded { executed: Executed },
    /// The server allows no more in flight just now. Only from `try_submit`.
    NoCredit,
    /// The server broke the protocol.
    Protocol(String),
    /// The caller asked a response for something that it is not.
    Usage(String),
}

impl ClientError {
    /// Whether a model may have run.
    pub fn executed(&self) -> Executed {
        match self {
            ClientError::Refused(refusal) => refusal.executed,
            ClientError::ConnectionLost { executed, .. } | ClientError::DeadlineExceeded { executed } => *executed,
            ClientError::Connect(_) | ClientError::Contract(_) | ClientError::Goaway { .. } | ClientError::NoCredit => {
                Executed::Never
            }
            ClientError::Protocol(_) => Executed::Maybe,
            ClientError::Usage(_) => Executed::Yes,
        }
    }

    /// The outcome's place in the closed table, where it has one.
    pub fn code(&self) -> Option<Code> {
        match self {
            ClientError::Refused(refusal) | ClientError::Contract(refusal) => Some(refusal.code),
            ClientError::Goaway { code, .. } => *code,
            ClientError::DeadlineExceeded { .. } => Some(Code::DeadlineExceeded),
            ClientError::Protocol(_) => Some(Code::ProtocolError),
            _ => None,
        }
    }
}

impl std::fmt::Display for ClientError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ClientError::Connect(reason) => write!(f, "cannot connect: {reason}"),
            ClientError::Refused(refusal) => refusal.fmt(f),
            ClientError::Contract(refusal) => write!(f, "not sent: {}", refusal.message),
            ClientError::Goaway { code, message } => {
                let name = code.map_or("unknown code", Code::name);
                write!(f, "the server takes no more requests ({name}): {message}")
            }
            ClientError::ConnectionLost { executed, reason } => {
                let ran = match executed {
                    Executed::Never => "the request was not sent",
                    Executed::Maybe | Executed::Yes => "the request may have run",
                };
                write!(f, "connection lost, {ran}: {reason}")
            }
            ClientError::DeadlineExceeded { executed: Executed::Never } => {
                f.write_str("the deadline passed before the request was sent")
            }
            ClientError::DeadlineExceeded { .. } => f.write_str("the deadline passed without an answer"),
            ClientError::NoCredit => f.write_str("the server allows no more requests in flight at the moment"),
            ClientError::Protocol(reason) => write!(f, "the server broke the protocol: {reason}"),
            ClientError::Usage(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for ClientError {}
