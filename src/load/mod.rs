//! The load generator as a library: what to send when, sending it, and what came of it.
//!
//! Always true
//! - Open loop measures from the moment a request was meant to be sent. A slow server can not slow the arrivals down.
//! - No arrival is forgotten: each one is answered, lost, expired before it was sent, or counted as `unsent`.
//! - Equal seeds give equal arrivals, lengths and inputs, on every machine and in every version.
//!
//! Elsewhere: the protocol (wire, client/session.rs), flags (commands/load.rs).

pub mod arrivals;
pub mod engine;
pub mod lengths;
pub mod offline;
pub mod on_device;
pub mod payload;
pub mod report;
pub mod verify;

use std::net::SocketAddr;
use std::time::Duration;

pub use arrivals::{Arrival, Trace};
pub use engine::run;
pub use lengths::Lengths;
pub use report::Report;

use crate::client::ClientError;

/// What decides when a request is sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Mode {
    /// `rate` requests per second, whatever the server does.
    Open { rate: f64, arrival: Arrival },
    /// So many callers, each of which sends its next request when it has its answer, and not before the time that a refusal
    /// names.
    Closed { callers: u32 },
    /// Open loop with the arrivals and lengths of a file.
    Trace(Trace),
}

/// One run.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    pub addr: SocketAddr,
    pub model: String,
    pub mode: Mode,
    pub lengths: Lengths,
    /// Measured time, behind the warm-up.
    pub duration: Duration,
    pub warmup: Duration,
    pub connections: usize,
    /// Answers within this count as goodput; without it, all that arrive in time for their deadline.
    pub slo: Option<Duration>,
    pub deadline: Option<Duration>,
    pub priority: u8,
    pub tenant: String,
    pub token: Vec<u8>,
    /// How connections are encrypted; None: not at all.
    pub tls: Option<crate::client::ClientTls>,
    pub seed: u64,
    /// Share of answers that are compared with what they must be, 0 to 1.
    pub verify: Option<f64>,
    /// Callers of a closed loop who are refused come back at once, whatever they were told.
    pub impatient: bool,
    /// Longest wait for answers behind the measured time. What is still missing then is lost.
    pub drain_max: Duration,
    /// Requests that may wait in the client for credit. Arrivals beyond it are counted as `unsent`.
    pub backlog_max: usize,
    /// Different inputs that are sent in turn; fewer when they are large.
    pub inputs_max: usize,
}

impl LoadOptions {
    pub fn new(addr: SocketAddr, model: impl Into<String>, mode: Mode) -> LoadOptions {
        LoadOptions {
            addr,
            model: model.into(),
            mode,
            lengths: Lengths::Fixed(64),
            duration: Duration::from_secs(10),
            warmup: Duration::from_secs(2),
            connections: 1,
            slo: None,
            deadline: None,
            priority: 0,
            tenant: String::new(),
            token: Vec::new(),
            tls: None,
            seed: 1,
            verify: None,
            impatient: false,
            drain_max: Duration::from_secs(5),
            backlog_max: 1 << 20,
            inputs_max: 4096,
        }
    }
}

/// Why there is no report.
#[derive(Clone, Debug, PartialEq)]
pub enum LoadError {
    /// The options contradict each other or the model.
    Usage(String),
    /// The server could not be reached, or does not have the model.
    Client(ClientError),
    Io(String),
}

impl std::fmt::Display for LoadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LoadError::Usage(message) | LoadError::Io(message) => f.write_str(message),
            LoadError::Client(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for LoadError {}

impl From<ClientError> for LoadError {
    fn from(error: ClientError) -> LoadError {
        LoadError::Client(error)
    }
}

/// SplitMix64: small, fast, and written here so that a seed means the same in every version of every dependency.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Streams of one seed are independent: arrivals do not change when lengths are drawn differently.
    pub fn new(seed: u64, stream: u64) -> Rng {
        let mut rng = Rng(seed ^ stream.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        // Seeds are small numbers that differ in few bits: two steps spread them before the first use.
        rng.next_u64();
        rng.0 ^= rng.next_u64();
        rng
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform from `low` to `high`, both included.
    pub fn between(&mut self, low: i128, high: i128) -> i128 {
        let span = (high - low + 1) as u128;
        low + ((u128::from(self.next_u64()) * span) >> 64) as i128
    }

    /// Standard normal, by Box and Muller.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }
}
