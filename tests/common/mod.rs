//! What tests of the whole server share: a server on free ports, a connection that speaks frames, a patient look.
//!
//! Always true
//! - Nothing sleeps for luck: [`wait_until`] looks at a condition until it holds or a generous deadline is over.

#![allow(dead_code)] // each test file uses its own part

pub mod process;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use ferry::clock;
use ferry::config::Config;
use ferry::server::{self, Ending, Stopper, TestHooks};
use ferry::telemetry::Telemetry;
use ferry::vocab::{Code, DType, ModelHandle, Refusal};
use ferry::wire::decoder::Step;
use ferry::wire::encoder::{Head, append_bare, append_frame};
use ferry::wire::message::{
    Credit, Describe, Description, ErrorMessage, Goaway, Hello, HelloAck, INFER_TIMINGS, Infer, InferResult, Item,
    List, TensorMeta, decode_exact,
};
use ferry::wire::{Decoder, Header, Kind, Limits};

/// How long a test waits for what must happen. Only a broken server needs it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Looks until `holds`; panics with `what` when it does not come true.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = clock::now();
    while !holds() {
        assert!(clock::now().since(start) < PATIENCE, "waited {PATIENCE:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

const FAULTY: &str = r#"
architecture = "faulty"
version = "1"
[[input]]
name = "behaviour"
dtype = "u32"
shape = [1]
range = [0, 60000]
[[output]]
name = "value"
dtype = "f32"
shape = [1]
nonfinite = "refuse"
[batching]
rows_max = 8
queue_delay_max_us = 0
"#;

/// A tokenizer that knows the words w1 to w98; another word is 0.
fn tokenizer_json() -> String {
    let mut vocab: serde_json::Map<String, serde_json::Value> =
        (1..99).map(|id| (format!("w{id}"), id.into())).collect();
    vocab.insert("[UNK]".into(), 0.into());
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]" },
    })
    .to_string()
}

/// What makes tiny_bert take text.
const TEXT: &str = r#"
[text]
input = "text"
tokenizer = "tokenizer.json"
bytes_max = 512
truncate = true
"#;

/// A models directory with all that can be served without fetching: digits, echo (inline), queued (echo on an executor),
/// faulty, sleep, tiny_bert and the same with text.
pub fn models_directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for model in ["models/digits", "models/echo", "models/sleep", "tests/fixtures/tiny_bert"] {
        let from = root.join(model);
        copy_tree(&from, &directory.path().join(from.file_name().expect("a model has a name")));
    }
    let path = |name: &str| directory.path().join(name);
    let edit = |name: &str, change: &dyn Fn(String) -> String| {
        let text = std::fs::read_to_string(path(name)).expect("reads the manifest");
        std::fs::write(path(name), change(text)).expect("writes the manifest");
    };
    copy_tree(&path("echo"), &path("queued"));
    edit("queued/model.toml", &|text| text.replace("placement = \"inline\"", "placement = \"executor\""));
    copy_tree(&path("tiny_bert"), &path("tiny_text"));
    edit("tiny_text/model.toml", &|text| text + TEXT);
    std::fs::write(path("tiny_text/1/tokenizer.json"), tokenizer_json()).expect("writes the tokenizer");
    std::fs::create_dir(directory.path().join("faulty")).expect("makes the folder");
    std::fs::write(directory.path().join("faulty/model.toml"), FAULTY).expect("writes the manifest");
    directory
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("makes the folder");
    for entry in std::fs::read_dir(from).expect("lists the folder") {
        let path = entry.expect("lists the folder").path();
        let target = to.join(path.file_name().expect("an entry has a name"));
        match path.is_dir() {
            true => copy_tree(&path, &target),
            false => drop(std::fs::copy(&path, &target).expect("copies the file")),
        }
    }
}

/// Settings of every server of these tests: free ports, one thread of each kind, not pinned because cores are shared.
pub fn settings(models: &Path, sets: &[&str]) -> Vec<String> {
    let mut all: Vec<String> = [
        "listen=\"127.0.0.1:0\"",
        "control=\"127.0.0.1:0\"",
        "threads.pin=false",
        "threads.shards=1",
        "threads.executors=1",
    ]
    .map(String::from)
    .to_vec();
    all.push(format!("models={}", toml::Value::String(models.display().to_string())));
    all.extend(sets.iter().map(|set| (*set).to_owned()));
    all
}

/// A server in this process. Dropping it ends it.
pub struct Server {
    pub data: SocketAddr,
    pub control: SocketAddr,
    pub telemetry: Arc<Telemetry>,
    stopper: Stopper,
    thread: Option<JoinHandle<Ending>>,
    _models: tempfile::TempDir,
}

impl Server {
    pub fn start(sets: &[&str]) -> Server {
        Server::start_with(sets, TestHooks::default())
    }

    pub fn start_with(sets: &[&str], hooks: TestHooks) -> Server {
        Server::start_in(models_directory(), sets, hooks)
    }

    pub fn start_in(models: tempfile::TempDir, sets: &[&str], hooks: TestHooks) -> Server {
        let config = Config::load(None, &settings(models.path(), sets)).expect("a good configuration");
        let handle = server::start_with(&config, hooks).expect("the server starts");
        Server {
            data: handle.data_addr,
            control: handle.control_addr,
            telemetry: Arc::clone(&handle.telemetry),
            stopper: handle.stopper(),
            thread: Some(std::thread::spawn(move || handle.wait())),
            _models: models,
        }
    }

    /// One server for all tests that leave it as they found it; it ends with the last of them.
    pub fn shared() -> Arc<Server> {
        static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        shared.upgrade().unwrap_or_else(|| {
            let server = Arc::new(Server::start(&["threads.shards=2"]));
            *shared = Arc::downgrade(&server);
            server
        })
    }

    pub fn drain(&self) {
        self.stopper.drain();
    }

    pub fn abort(&self) {
        self.stopper.abort();
    }

    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the end, which something else must have begun.
    pub fn ending(mut self) -> Ending {
        wait_until("the server ends", || self.has_ended());
        self.thread.take().expect("taken only here").join().expect("the watching thread does not panic")
    }

    /// Nothing is in flight and the books agree.
    pub fn wait_until_at_rest(&self) {
        wait_until("nothing is in flight and the books agree", || {
            self.telemetry.in_flight() == 0 && self.telemetry.audit().is_ok()
        });
    }

    /// One number of the metrics page: the sum over all lines with this name and these labels.
    pub fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        metric(&self.telemetry.encode(), name, labels)
    }

    pub fn connect(&self) -> Raw {
        Raw::open(self.data)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stopper.abort();
            let _ = thread.join();
        }
    }
}

/// The sum of the samples in a metrics page with this name whose labels contain all of `labels`.
pub fn metric(page: &str, name: &str, labels: &[&str]) -> f64 {
    page.lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (head, value) = rest.rsplit_once(' ')?;
            let named = head.is_empty() || head.starts_with('{');
            (named && labels.iter().all(|label| head.contains(label))).then(|| value.parse::<f64>().expect("a number"))
        })
        .sum()
}

/// A GET on the control port.
pub fn get(control: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(control).expect("the control port listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("sends");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text
}

/// A request on the control port: status and JSON.
pub fn control(addr: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> (u16, serde_json::Value) {
    let mut stream = TcpStream::connect(addr).expect("the control port listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).expect("sends");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    let (head, body) = text.split_once("\r\n\r\n").expect("an answer has a head");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, serde_json::from_str(body).unwrap_or(serde_json::Value::String(body.into())))
}

/// What a server says.
#[derive(Debug)]
pub enum Event {
    HelloAck(HelloAck),
    Description {
        id: u64,
        model: ModelHandle,
        json: serde_json::Value,
    },
    Result {
        id: u64,
        result: Box<InferResult>,
        payload: Vec<u8>,
    },
    /// Rows of a request that goes on.
    Item {
        id: u64,
        item: Box<Item>,
        payload: Vec<u8>,
    },
    Error {
        id: u64,
        refusal: Refusal,
    },
    Pong(u64),
    Stats(serde_json::Value),
    Credit(Credit),
    Goaway {
        code: Code,
        goaway: Goaway,
    },
    /// The server closed, or the connection was reset.
    End,
}

impl Event {
    /// The request it ends, if it ends one.
    pub fn ends(&self) -> Option<u64> {
        match self {
            Event::Result { id, .. } | Event::Error { id, .. } => Some(*id),
            _ => None,
        }
    }

    #[track_caller]
    pub fn expect_result(self) -> (InferResult, Vec<u8>) {
        match self {
            Event::Result { result, payload, .. } => (*result, payload),
            other => panic!("expected a result, got {other:?}"),
        }
    }

    #[track_caller]
    pub fn expect_error(self, code: Code) -> Refusal {
        match self {
            Event::Error { refusal, .. } if refusal.code == code => refusal,
            other => panic!("expected {code}, got {other:?}"),
        }
    }

    #[track_caller]
    pub fn expect_goaway(self, expected: Code) -> Goaway {
        match self {
            Event::Goaway { code, goaway } if code == expected => goaway,
            other => panic!("expected a goaway {expected}, got {other:?}"),
        }
    }
}

/// A request before it has an id.
#[derive(Clone, Debug)]
pub struct Ask {
    pub model: ModelHandle,
    pub infer: Infer,
    pub payload: Vec<u8>,
}

impl Ask {
    pub fn new(model: ModelHandle, dtype: DType, dims: &[u32], payload: &[u8]) -> Ask {
        let mut infer = Infer::default();
        let dims = List::from_slice(dims).expect("few dimensions");
        infer.inputs.push(TensorMeta { index: 0, dtype: dtype as u8, dims }).expect("room");
        Ask { model, infer, payload: payload.to_vec() }
    }

    /// One row of values for echo or digits-like models.
    pub fn floats(model: ModelHandle, values: &[f32]) -> Ask {
        Ask::new(model, DType::F32, &[1, values.len() as u32], bytemuck::cast_slice(values))
    }

    /// One row of one number: how long `sleep` sleeps in µs, or how `faulty` behaves.
    pub fn word(model: ModelHandle, word: u32) -> Ask {
        Ask::words(model, &[word])
    }

    /// Several rows of one number each.
    pub fn words(model: ModelHandle, words: &[u32]) -> Ask {
        Ask::new(model, DType::U32, &[words.len() as u32, 1], bytemuck::cast_slice(words))
    }

    pub fn text(model: ModelHandle, index: u8, text: &[u8]) -> Ask {
        let payload = [&(text.len() as u32).to_le_bytes(), text].concat();
        let mut ask = Ask::new(model, DType::Text, &[1], &payload);
        let tensor = TensorMeta { index, ..ask.infer.inputs[0] };
        ask.infer.inputs = List::from_slice(&[tensor]).expect("one");
        ask
    }

    pub fn deadline_us(mut self, micros: u64) -> Ask {
        self.infer.deadline_us = micros;
        self
    }

    pub fn timings(mut self) -> Ask {
        self.infer.flags |= INFER_TIMINGS;
        self
    }

    pub fn compose(mut self, tag: u64, rows: u32) -> Ask {
        self.infer.compose_tag = tag;
        self.infer.compose_rows = rows;
        self
    }

    pub fn frame(&self, id: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let head = Head { kind: Kind::Infer, model: self.model, request_id: id };
        append_frame(&mut out, head, &self.infer, &self.payload).expect("small metadata");
        out
    }
}

pub fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        features: 0,
        client: "tests".into(),
        tenant: String::new(),
        token: Vec::new(),
    }
}

pub fn hello_frame() -> Vec<u8> {
    let mut out = Vec::new();
    append_frame(&mut out, Head::control(Kind::Hello), &hello(), &[]).expect("small metadata");
    out
}

/// A header that asks for these lengths, sealed as if it had no metadata.
pub fn header(kind: u8, flags: u8, metadata_len: u32, payload_len: u32) -> Vec<u8> {
    let header = Header {
        kind,
        flags,
        model: ModelHandle(0),
        request_id: 1,
        metadata_len,
        payload_len,
        payload_crc: 0,
        head_crc: 0,
    };
    header.encode(&[]).to_vec()
}

pub fn bare_frame(kind: Kind, id: u64) -> Vec<u8> {
    let mut out = Vec::new();
    append_bare(&mut out, Head { kind, model: ModelHandle(0), request_id: id });
    out
}

pub fn describe_frame(id: u64, model: &str, version: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let head = Head { kind: Kind::Describe, model: ModelHandle(0), request_id: id };
    let describe = Describe { model: model.into(), version: version.into() };
    append_frame(&mut out, head, &describe, &[]).expect("small metadata");
    out
}

/// A connection that speaks frames, right and wrong ones.
pub struct Raw {
    pub stream: TcpStream,
    buffer: Vec<u8>,
    next_id: u64,
}

impl Raw {
    /// Connects and says nothing.
    pub fn connect(addr: SocketAddr) -> Raw {
        let stream = TcpStream::connect(addr).expect("the data port listens");
        stream.set_nodelay(true).expect("a socket option");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        Raw { stream, buffer: Vec::new(), next_id: 1 }
    }

    /// Connects if anybody listens.
    pub fn connect_or_none(addr: SocketAddr) -> Option<TcpStream> {
        TcpStream::connect(addr).ok()
    }

    /// Connects and has its hello answered.
    pub fn open(addr: SocketAddr) -> Raw {
        let mut raw = Raw::connect(addr);
        raw.send(&hello_frame());
        match raw.recv() {
            Event::HelloAck(_) => raw,
            other => panic!("expected a hello-ack, got {other:?}"),
        }
    }

    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server reads");
    }

    /// An id that was not used on this connection.
    pub fn take_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Sends a request under the next id, which it returns.
    #[track_caller]
    pub fn ask(&mut self, ask: &Ask) -> u64 {
        let id = self.take_id();
        self.send(&ask.frame(id));
        id
    }

    /// Sends a request and takes the next event, which must be about it.
    #[track_caller]
    pub fn round(&mut self, ask: &Ask) -> Event {
        let id = self.ask(ask);
        let event = self.recv();
        assert_eq!(event.ends(), Some(id), "{event:?}");
        event
    }

    pub fn handle(&mut self, model: &str) -> ModelHandle {
        let id = self.take_id();
        self.send(&describe_frame(id, model, ""));
        match self.recv() {
            Event::Description { model, .. } => model,
            other => panic!("expected a description of {model}, got {other:?}"),
        }
    }

    /// Whether the connection still works both ways.
    #[track_caller]
    pub fn ping(&mut self) {
        let id = self.take_id();
        self.send(&bare_frame(Kind::Ping, id));
        match self.recv() {
            Event::Pong(pong) => assert_eq!(pong, id),
            other => panic!("expected a pong, got {other:?}"),
        }
    }

    /// The next event; [`Event::End`] when the server has closed.
    #[track_caller]
    pub fn recv(&mut self) -> Event {
        let decoder = Decoder::new(Limits { metadata_bytes: 4096, payload_bytes: Limits::PAYLOAD_CEILING });
        let mut chunk = vec![0; 64 << 10];
        loop {
            match decoder.next(&self.buffer).expect("the server's stream is right") {
                Step::Frame(frame) => {
                    assert!(frame.payload_is_intact(&self.buffer), "the server's payloads are intact");
                    let event = event_of(&frame, &self.buffer);
                    self.buffer.drain(..frame.len);
                    return event;
                }
                Step::Skip { len } => drop(self.buffer.drain(..len)),
                Step::Incomplete { .. } => match self.stream.read(&mut chunk) {
                    Ok(0) => return Event::End,
                    Ok(count) => self.buffer.extend_from_slice(&chunk[..count]),
                    Err(error) if error.kind() == ErrorKind::ConnectionReset => return Event::End,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => panic!("no event within {PATIENCE:?}: {error}"),
                },
            }
        }
    }

    /// All events until the server closes.
    pub fn recv_all(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            match self.recv() {
                Event::End => return events,
                event => events.push(event),
            }
        }
    }

    /// Bytes that were read and not yet taken as events.
    pub fn rest(&self) -> &[u8] {
        &self.buffer
    }
}

fn event_of(frame: &ferry::wire::Frame, buffer: &[u8]) -> Event {
    let metadata = frame.metadata(buffer);
    let payload = frame.payload(buffer);
    let id = frame.header.request_id;
    match frame.kind {
        Kind::HelloAck => Event::HelloAck(decode_exact(metadata).expect("a hello-ack")),
        Kind::Description => {
            let description: Description = decode_exact(metadata).expect("a description");
            let json = serde_json::from_slice(payload).expect("JSON");
            Event::Description { id, model: ModelHandle(description.handle), json }
        }
        Kind::Result => {
            Event::Result { id, result: Box::new(decode_exact(metadata).expect("a result")), payload: payload.to_vec() }
        }
        Kind::Item => {
            Event::Item { id, item: Box::new(decode_exact(metadata).expect("an item")), payload: payload.to_vec() }
        }
        Kind::Error => {
            let error: ErrorMessage = decode_exact(metadata).expect("an error");
            Event::Error { id, refusal: error.to_refusal().expect("numbers of this version") }
        }
        Kind::Pong => Event::Pong(id),
        Kind::StatsReply => Event::Stats(serde_json::from_slice(payload).expect("JSON")),
        Kind::Credit => Event::Credit(decode_exact(metadata).expect("a credit")),
        Kind::Goaway => {
            let goaway: Goaway = decode_exact(metadata).expect("a goaway");
            Event::Goaway { code: Code::from_number(goaway.code).expect("a known code"), goaway }
        }
        other => panic!("servers do not send {other:?}"),
    }
}

/// The values of a payload.
pub fn floats_of(payload: &[u8]) -> Vec<f32> {
    payload.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}

/// A small generator of numbers that are the same in every run (SplitMix64).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
