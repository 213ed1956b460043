//! One connection's protocol, without the connection: requests to bytes, bytes to events.
//!
//! Sans-IO: the caller owns the socket, hands in what it received and writes what was put into its output buffer. So
//! the same rules serve the blocking client, the load generator's handshake and tests that script every byte.
//!
//! Always true
//! - Ids strictly increase, and every id that was given out ends with exactly one event, or is still in flight.
//! - What is in flight never exceeds the server's credit. A terminal answer gives its request's credit back.
//! - A request that does not fit its contract is refused here: nothing of it is sent, no id and no credit is used.
//!
//! Elsewhere: threads, waiting and deadlines (blocking.rs), how a request is written down (request.rs).

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::request::Request;
use crate::contract::Contract;
use crate::vocab::{Code, Executed, ModelHandle, Refusal};
use crate::wire::decoder::Step;
use crate::wire::encoder::{Head, append_bare, append_frame, append_frame_with};
use crate::wire::message::{
    Credit, Describe, Description, ErrorMessage, Goaway, Hello, HelloAck, InferResult, Item, decode_exact,
};
use crate::wire::{Decoder, Frame, Kind, Limits, PROTOCOL_MAJOR};

/// A model as this connection knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    pub handle: ModelHandle,
    pub contract_hash: u64,
    pub contract: Contract,
}

/// One line of the server's list of models.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelEntry {
    pub name: String,
    pub version: String,
    pub handle: u16,
    /// On the wire 16 hexadecimal digits: a number of 64 bits is rounded by most readers of JSON.
    #[serde(default, with = "hex")]
    pub contract_hash: u64,
    #[serde(default)]
    pub ready: bool,
}

mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{value:016x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map_err(|_| D::Error::custom(format!("{text:?} is not 16 hexadecimal digits")))
    }
}

#[derive(Deserialize)]
struct ModelList {
    models: Vec<ModelEntry>,
}

/// The server's counters since its start. What happened in a while is the difference of two of these.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServerStats {
    pub uptime_us: u64,
    pub accepted: u64,
    pub in_flight: u64,
    /// By the name of the code.
    pub outcomes: std::collections::BTreeMap<String, u64>,
    pub models: std::collections::BTreeMap<String, ModelStats>,
    pub executors: Vec<ExecutorStats>,
    pub waterfall: WaterfallStats,
}

/// Where the executors' time went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WaterfallStats {
    pub executors: Vec<ExecutorTime>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecutorTime {
    /// It is the batcher's own thread.
    pub inline: bool,
    /// By part. They add up to the executor's time.
    pub seconds: std::collections::BTreeMap<String, f64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelStats {
    pub batches: u64,
    pub rows: u64,
    pub rows_possible: u64,
    pub cells_real: u64,
    pub cells_padded: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecutorStats {
    pub busy_us: u64,
    /// Its batches run on the batcher's own thread.
    pub inline: bool,
}

/// What may be in flight, and what is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    pub requests_max: u32,
    pub bytes_max: u64,
    pub requests: u32,
    pub bytes: u64,
}

impl Window {
    pub fn fits(&self, bytes: u64) -> bool {
        self.requests < self.requests_max && self.bytes + bytes <= self.bytes_max
    }

    pub fn take(&mut self, bytes: u64) {
        self.requests += 1;
        self.bytes += bytes;
    }

    pub fn give_back(&mut self, bytes: u64) {
        self.requests = self.requests.checked_sub(1).expect("credit is given back once per request");
        self.bytes = self.bytes.checked_sub(bytes).expect("credit is given back as it was taken");
    }

    /// A credit frame states new totals. They may be below what is in flight: then nothing fits until enough ended.
    pub fn replace(&mut self, credit: Credit) {
        self.requests_max = credit.requests;
        self.bytes_max = credit.bytes;
    }
}

/// Who the client is, and how much it is willing to receive in one frame.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    pub client: String,
    pub tenant: String,
    pub token: Vec<u8>,
    pub payload_bytes_max: u32,
}

impl Default for SessionOptions {
    fn default() -> SessionOptions {
        SessionOptions {
            client: format!("ferry {}", env!("CARGO_PKG_VERSION")),
            tenant: String::new(),
            token: Vec::new(),
            payload_bytes_max: Limits::PAYLOAD_CEILING,
        }
    }
}

/// The peer broke the protocol; the connection cannot be used any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtocolError(pub String);

impl std::fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ProtocolError {}

/// Why a request was not sent. None of these has used an id or credit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SendError {
    /// The server has not answered the hello yet.
    NotReady,
    /// The server said goaway.
    Leaving(Goaway),
    /// As much is in flight as the server allows. Try again after an answer.
    NoCredit,
    /// It does not fit the contract or the server's limits, so the server would have said no.
    Refused(Refusal),
}

/// What received bytes meant. One exists at a time, on the stack: its size costs nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub enum Event<'a> {
    Ready(&'a HelloAck),
    Result {
        id: u64,
        result: InferResult,
        payload: &'a [u8],
    },
    /// Some rows of a request that goes on.
    Item {
        id: u64,
        item: Item,
        payload: &'a [u8],
    },
    Refused {
        id: u64,
        refusal: Refusal,
    },
    Described {
        id: u64,
        model: Arc<ModelInfo>,
    },
    Models {
        id: u64,
        models: Vec<ModelEntry>,
    },
    Stats {
        id: u64,
        stats: ServerStats,
    },
    Pong {
        id: u64,
    },
    /// The window changed without an answer.
    Credit,
    /// The server takes nothing more. Followed by a `NeverExecuted` for each request it did not take.
    Goaway(&'a Goaway),
    NeverExecuted {
        id: u64,
    },
}

/// What an id was used for.
#[derive(Debug)]
enum Asked {
    Infer {
        bytes: u64,
        /// Some of its rows arrived damaged: it has failed, whatever its end says.
        damaged: bool,
    },
    Describe {
        model: String,
        version: String,
    },
    Models,
    Stats,
    Ping,
}

/// Ids are consecutive numbers: one multiplication spreads them well, and nobody outside chooses them.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = (self.0 ^ id).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[derive(Debug)]
enum State {
    Greeting,
    Open,
    Leaving(Goaway),
}

/// One connection's state.
pub struct Session {
    state: State,
    decoder: Decoder,
    last_id: u64,
    window: Window,
    server: Option<HelloAck>,
    in_flight: HashMap<u64, Asked, BuildHasherDefault<IdHasher>>,
    contracts: HashMap<(String, String), Arc<ModelInfo>>,
    payload_bytes_max: u32,
}

impl Session {
    /// Starts a session: its hello is in `out`.
    pub fn new(options: &SessionOptions, out: &mut Vec<u8>) -> Result<Session, SendError> {
        let hello = Hello {
            version_min: PROTOCOL_MAJOR,
            version_max: PROTOCOL_MAJOR,
            features: 0,
            client: options.client.clone(),
            tenant: options.tenant.clone(),
            token: options.token.clone(),
        };
        append_frame(out, Head::control(Kind::Hello), &hello, &[])
            .map_err(|error| SendError::Refused(Refusal::too_large(error.message)))?;
        Ok(Session {
            state: State::Greeting,
            decoder: Decoder::new(Limits {
                metadata_bytes: Limits::METADATA_CEILING,
                payload_bytes: options.payload_bytes_max.min(Limits::PAYLOAD_CEILING),
            }),
            last_id: 0,
            window: Window::default(),
            server: None,
            in_flight: HashMap::default(),
            contracts: HashMap::new(),
            payload_bytes_max: 0,
        })
    }

    /// What the server said in its hello; `None` before.
    pub fn server(&self) -> Option<&HelloAck> {
        self.server.as_ref()
    }

    pub fn window(&self) -> Window {
        self.window
    }

    /// The highest id given out so far.
    pub fn last_id(&self) -> u64 {
        self.last_id
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The goaway, once it came.
    pub fn goaway(&self) -> Option<&Goaway> {
        match &self.state {
            State::Leaving(goaway) => Some(goaway),
            State::Greeting | State::Open => None,
        }
    }

    /// A contract that was described before on this connection.
    pub fn known_model(&self, model: &str, version: &str) -> Option<Arc<ModelInfo>> {
        self.contracts.get(&(model.to_owned(), version.to_owned())).cloned()
    }

    /// Appends a request. `remaining` is the time left until its deadline.
    pub fn infer(
        &mut self,
        model: &ModelInfo,
        request: &Request,
        remaining: Option<Duration>,
        out: &mut Vec<u8>,
    ) -> Result<u64, SendError> {
        self.check_open()?;
        request.check_built_for(model.contract_hash).map_err(SendError::Refused)?;
        let placed = request.place(&model.contract).map_err(SendError::Refused)?;
        let bytes = placed.payload_len() as u64;
        if bytes > u64::from(self.payload_bytes_max) || bytes > self.window.bytes_max {
            return Err(SendError::Refused(Refusal::too_large(format!(
                "expected at most {} payload bytes, got {bytes}",
                self.window.bytes_max.min(self.payload_bytes_max.into())
            ))));
        }
        if !self.window.fits(bytes) {
            return Err(SendError::NoCredit);
        }
        let infer = request.metadata(&placed, remaining);
        let start = out.len();
        let mut payload_at = start;
        let id = self.last_id + 1;
        let head = Head { kind: Kind::Infer, model: model.handle, request_id: id };
        append_frame_with(out, head, &infer, |out| {
            payload_at = out.len();
            placed.write(out);
        })
        .map_err(|error| SendError::Refused(Refusal::too_large(error.message)))?;
        if let Err(refusal) = model.contract.check(&infer, &out[payload_at..]) {
            out.truncate(start);
            return Err(SendError::Refused(refusal));
        }
        self.last_id = id;
        self.window.take(bytes);
        self.in_flight.insert(id, Asked::Infer { bytes, damaged: false });
        Ok(id)
    }

    /// Asks for a model's handle and contract; an empty version means the one that serves by default.
    pub fn describe(&mut self, model: &str, version: &str, out: &mut Vec<u8>) -> Result<u64, SendError> {
        self.check_open()?;
        let message = Describe { model: model.to_owned(), version: version.to_owned() };
        let asked = if model.is_empty() {
            Asked::Models
        } else {
            Asked::Describe { model: model.to_owned(), version: version.to_owned() }
        };
        let id = self.last_id + 1;
        let head = Head { kind: Kind::Describe, model: ModelHandle(0), request_id: id };
        append_frame(out, head, &message, &[])
            .map_err(|error| SendError::Refused(Refusal::too_large(error.message)))?;
        self.last_id = id;
        self.in_flight.insert(id, asked);
        Ok(id)
    }

    /// Asks for the server's counters.
    pub fn stats(&mut self, out: &mut Vec<u8>) -> Result<u64, SendError> {
        self.bare(Kind::Stats, Asked::Stats, out)
    }

    pub fn ping(&mut self, out: &mut Vec<u8>) -> Result<u64, SendError> {
        self.bare(Kind::Ping, Asked::Ping, out)
    }

    fn bare(&mut self, kind: Kind, asked: Asked, out: &mut Vec<u8>) -> Result<u64, SendError> {
        self.check_open()?;
        self.last_id += 1;
        append_bare(out, Head { kind, model: ModelHandle(0), request_id: self.last_id });
        self.in_flight.insert(self.last_id, asked);
        Ok(self.last_id)
    }

    /// Asks the server to drop a request. It is still answered: with `cancelled`, or with what was faster. Does nothing
    /// for a request that has ended.
    pub fn cancel(&mut self, id: u64, out: &mut Vec<u8>) -> bool {
        let is_infer = matches!(self.in_flight.get(&id), Some(Asked::Infer { .. }));
        if is_infer {
            append_bare(out, Head { kind: Kind::Cancel, model: ModelHandle(0), request_id: id });
        }
        is_infer
    }

    fn check_open(&self) -> Result<(), SendError> {
        match &self.state {
            State::Greeting => Err(SendError::NotReady),
            State::Open => Ok(()),
            State::Leaving(goaway) => Err(SendError::Leaving(goaway.clone())),
        }
    }

    /// Takes whole frames from the front of `buffer` and says how many bytes they were. After an error the connection
    /// is to be closed: events shown before it still count.
    pub fn receive(&mut self, buffer: &[u8], mut on_event: impl FnMut(Event<'_>)) -> Result<usize, ProtocolError> {
        let mut at = 0;
        loop {
            match self.decoder.next(&buffer[at..]).map_err(|error| ProtocolError(error.to_string()))? {
                Step::Frame(frame) => {
                    self.frame(&frame, &buffer[at..], &mut on_event)?;
                    at += frame.len;
                }
                Step::Skip { len } => at += len,
                Step::Incomplete { .. } => return Ok(at),
            }
        }
    }

    fn frame(
        &mut self,
        frame: &Frame,
        bytes: &[u8],
        on_event: &mut impl FnMut(Event<'_>),
    ) -> Result<(), ProtocolError> {
        let id = frame.header.request_id;
        let metadata = frame.metadata(bytes);
        match (frame.kind, &self.state) {
            (Kind::HelloAck, State::Greeting) => {
                let ack: HelloAck = decode(metadata)?;
                if ack.version != PROTOCOL_MAJOR {
                    return Err(ProtocolError(format!(
                        "expected protocol version {PROTOCOL_MAJOR}, the server chose {}",
                        ack.version
                    )));
                }
                self.window.replace(Credit { requests: ack.credit_requests, bytes: ack.credit_bytes });
                self.payload_bytes_max = ack.payload_bytes_max;
                self.state = State::Open;
                on_event(Event::Ready(self.server.insert(ack)));
            }
            (Kind::Goaway, _) => {
                let goaway: Goaway = decode(metadata)?;
                self.leave(goaway, on_event);
            }
            (kind, State::Greeting) => {
                return Err(ProtocolError(format!("expected a hello_ack or a goaway, got a frame of kind {kind:?}")));
            }
            (Kind::Result, _) => {
                let damaged = self.end_infer(id)?;
                if !damaged && frame.payload_is_intact(bytes) {
                    on_event(Event::Result { id, result: decode(metadata)?, payload: frame.payload(bytes) });
                } else {
                    on_event(Event::Refused { id, refusal: damaged_result() });
                }
            }
            (Kind::Item, _) => {
                let Some(Asked::Infer { damaged, .. }) = self.in_flight.get_mut(&id) else {
                    return Err(stray("item", id));
                };
                if frame.payload_is_intact(bytes) {
                    on_event(Event::Item { id, item: decode(metadata)?, payload: frame.payload(bytes) });
                } else {
                    *damaged = true;
                }
            }
            (Kind::Error, _) => {
                let message: ErrorMessage = decode(metadata)?;
                let refusal = message.to_refusal().map_err(|error| ProtocolError(error.message))?;
                match self.in_flight.remove(&id) {
                    Some(Asked::Infer { bytes, .. }) => self.window.give_back(bytes),
                    Some(_) => {}
                    None => return Err(stray("error", id)),
                }
                on_event(Event::Refused { id, refusal });
            }
            (Kind::Description, _) => self.description(frame, bytes, on_event)?,
            (Kind::StatsReply, _) => {
                // Counters belong to no request: a reply without its id answers the question that waits longest.
                let asked = self.in_flight.iter().filter(|(_, asked)| matches!(asked, Asked::Stats)).map(|(id, _)| *id);
                let id = match self.in_flight.get(&id) {
                    Some(Asked::Stats) => id,
                    _ => asked.min().ok_or_else(|| stray("stats_reply", id))?,
                };
                self.in_flight.remove(&id);
                let stats = json(frame, bytes, "stats_reply")?;
                on_event(Event::Stats { id, stats });
            }
            (Kind::Pong, _) => match self.in_flight.remove(&id) {
                Some(Asked::Ping) => on_event(Event::Pong { id }),
                _ => return Err(stray("pong", id)),
            },
            (Kind::Credit, _) => {
                self.window.replace(decode(metadata)?);
                on_event(Event::Credit);
            }
            (kind, _) => {
                return Err(ProtocolError(format!("a frame of kind {kind:?} is never sent to a client here")));
            }
        }
        Ok(())
    }

    /// Gives a request's credit back, and says whether rows of it were lost before.
    fn end_infer(&mut self, id: u64) -> Result<bool, ProtocolError> {
        match self.in_flight.remove(&id) {
            Some(Asked::Infer { bytes, damaged }) => {
                self.window.give_back(bytes);
                Ok(damaged)
            }
            _ => Err(stray("result", id)),
        }
    }

    fn description(
        &mut self,
        frame: &Frame,
        bytes: &[u8],
        on_event: &mut impl FnMut(Event<'_>),
    ) -> Result<(), ProtocolError> {
        let id = frame.header.request_id;
        match self.in_flight.remove(&id) {
            Some(Asked::Models) => {
                let list: ModelList = json(frame, bytes, "list of models")?;
                on_event(Event::Models { id, models: list.models });
            }
            Some(Asked::Describe { model, version }) => {
                let description: Description = decode(frame.metadata(bytes))?;
                let contract: Contract = json(frame, bytes, "contract")?;
                let contract = contract
                    .checked()
                    .map_err(|error| ProtocolError(format!("the contract of {model} is not valid: {error}")))?;
                let info = Arc::new(ModelInfo {
                    handle: ModelHandle(description.handle),
                    contract_hash: description.contract_hash,
                    contract,
                });
                self.contracts.insert((model, version), info.clone());
                on_event(Event::Described { id, model: info });
            }
            _ => return Err(stray("description", id)),
        }
        Ok(())
    }

    fn leave(&mut self, goaway: Goaway, on_event: &mut impl FnMut(Event<'_>)) {
        on_event(Event::Goaway(&goaway));
        let mut above: Vec<u64> = self.in_flight.keys().copied().filter(|id| *id > goaway.last_accepted_id).collect();
        above.sort_unstable();
        for id in above {
            if let Some(Asked::Infer { bytes, .. }) = self.in_flight.remove(&id) {
                self.window.give_back(bytes);
            }
            on_event(Event::NeverExecuted { id });
        }
        self.state = State::Leaving(goaway);
    }
}

fn decode<T: bincode::Decode<()>>(metadata: &[u8]) -> Result<T, ProtocolError> {
    decode_exact(metadata).map_err(|error| ProtocolError(error.message))
}

fn json<T: for<'de> Deserialize<'de>>(frame: &Frame, bytes: &[u8], what: &str) -> Result<T, ProtocolError> {
    if !frame.payload_is_intact(bytes) {
        return Err(ProtocolError(format!("the {what} arrived damaged: its checksum does not match")));
    }
    serde_json::from_slice(frame.payload(bytes))
        .map_err(|error| ProtocolError(format!("the {what} is not the JSON expected: {error}")))
}

fn stray(what: &str, id: u64) -> ProtocolError {
    ProtocolError(format!("a {what} for request {id}, which is not waiting for one"))
}

/// A result whose bytes changed on the way is lost, but only that one. The model did run.
pub fn damaged_result() -> Refusal {
    let mut refusal =
        Refusal::new(Code::ChecksumMismatch, "the result arrived damaged: its checksum does not match its payload");
    refusal.executed = Executed::Yes;
    refusal
}
