//! Callers that write down what they asked and what they were told, against servers whose model writes down what it was given.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ferry::client::{Client, ClientError, ClientOptions, Pending, Pool, PoolError, Request, Response};
use ferry::clock;
use ferry::models::witness::{WORDS, proof};
use ferry::vocab::{self, DType, ModelHandle, Moment};

use super::history::{Entry, Executed, Rules, Summary, check, executed, text};
use crate::common::{Ask, Event, Numbers};

/// `usual`, or `long` in the long run that `tools/faults` makes.
pub fn rounds(usual: u64, long: u64) -> u64 {
    if std::env::var_os("FERRY_LONG").is_some() { long } else { usual }
}

const WITNESS: &str = r#"
architecture = "witness"
version = "1"
[[input]]
name = "call"
dtype = "u32"
shape = [4]
[[output]]
name = "proof"
dtype = "u32"
shape = [4]
[batching]
rows_max = 64
queue_delay_max_us = 0
"#;

/// A models directory with a witness and an echo: a server of it starts at once.
pub fn models() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let write = |name: &str, text: &str| {
        std::fs::create_dir(directory.path().join(name)).expect("makes the folder");
        std::fs::write(directory.path().join(name).join("model.toml"), text).expect("writes the manifest");
    };
    write("witness", WITNESS);
    let echo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/echo/model.toml");
    write("echo", &std::fs::read_to_string(echo).expect("reads the manifest"));
    directory
}

/// Where the witness of a models directory writes.
pub fn log_of(models: &Path) -> PathBuf {
    models.join("witness/executed.log")
}

/// A call before it is made: its number, and the row that carries it.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub id: u64,
    pub row: [u32; WORDS],
}

impl Call {
    pub fn new(id: u64, micros: u32) -> Call {
        Call { id, row: [id as u32, (id >> 32) as u32, micros, (id as u32).wrapping_mul(0x9E37_79B9)] }
    }

    pub fn request(&self) -> Request {
        Request::new("witness").input("call", &[1, WORDS as u32], &self.row)
    }

    pub fn ask(&self, model: ModelHandle) -> Ask {
        Ask::new(model, DType::U32, &[1, WORDS as u32], bytemuck::cast_slice(&self.row))
    }

    fn reference(&self) -> u64 {
        hash_of(bytemuck::cast_slice(&proof(self.row)))
    }
}

/// FNV-1a.
pub fn hash_of(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The history of a test, written by all of its callers.
pub struct Ledger {
    origin: Moment,
    next: AtomicU64,
    entries: Mutex<Vec<Entry>>,
}

impl Ledger {
    pub fn new() -> Ledger {
        Ledger { origin: clock::now(), next: AtomicU64::new(1), entries: Mutex::default() }
    }

    pub fn now_us(&self) -> u64 {
        clock::now().since(self.origin).as_micros() as u64
    }

    /// A call that takes so long to run, made now.
    pub fn call(&self, micros: u32) -> Call {
        self.call_by(micros, None)
    }

    pub fn call_by(&self, micros: u32, allowed: Option<Duration>) -> Call {
        let call = Call::new(self.next.fetch_add(1, Ordering::Relaxed), micros);
        let now = self.now_us();
        self.note(Entry::Invoke {
            id: call.id,
            intended_us: now,
            deadline_us: allowed.map(|allowed| now + allowed.as_micros() as u64),
            reference: call.reference(),
        });
        call
    }

    pub fn note(&self, entry: Entry) {
        self.entries.lock().expect("not poisoned").push(entry);
    }

    /// Ends of calls so far.
    pub fn ends(&self) -> usize {
        let is_end = |entry: &&Entry| !matches!(entry, Entry::Invoke { .. } | Entry::Window { .. });
        self.entries.lock().expect("not poisoned").iter().filter(is_end).count()
    }

    /// Something is broken on purpose from `from_us` until now.
    pub fn window(&self, from_us: u64, why: &str) {
        self.note(Entry::Window { from_us, to_us: self.now_us(), why: why.into() });
    }

    pub fn told(&self, call: Call, outcome: Result<Response, ClientError>) {
        let at_us = self.now_us();
        self.note(match outcome {
            Ok(response) => Entry::Ok { id: call.id, at_us, hash: hash_of(response.payload()) },
            Err(error) => failure(call.id, at_us, &error, error.executed()),
        });
    }

    pub fn told_by_pool(&self, call: Call, outcome: Result<Response, PoolError>) {
        let at_us = self.now_us();
        self.note(match outcome {
            Ok(response) => Entry::Ok { id: call.id, at_us, hash: hash_of(response.payload()) },
            Err(error) => failure(call.id, at_us, &error.last, error.executed),
        });
    }

    /// An event of a raw connection. True where it ended a call, whose number is `id`.
    pub fn told_raw(&self, id: u64, event: &Event) {
        let at_us = self.now_us();
        self.note(match event {
            Event::Result { payload, .. } => Entry::Ok { id, at_us, hash: hash_of(payload) },
            Event::Error { refusal, .. } => {
                let executed = in_history(refusal.executed);
                Entry::Fail { id, at_us, code: refusal.code.name().into(), executed }
            }
            other => panic!("this ends no call: {other:?}"),
        });
    }

    /// The whole history, executors' logs included.
    pub fn history(&self, logs: &[PathBuf]) -> Vec<Entry> {
        let mut entries = self.entries.lock().expect("not poisoned").clone();
        for log in logs {
            // A witness that was given nothing wrote nothing.
            entries.extend(executed(&std::fs::read_to_string(log).unwrap_or_default()));
        }
        entries
    }

    /// Panics with the first violations, and leaves the history where `tools/history-check` can read it.
    #[track_caller]
    pub fn check(&self, logs: &[PathBuf], rules: &Rules) -> Summary {
        let history = self.history(logs);
        match check(&history, rules) {
            Ok(summary) => summary,
            Err(wrong) => {
                let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("history-{}.jsonl", std::process::id()));
                std::fs::write(&file, text(&history)).expect("a file among the build's");
                let first: Vec<_> = wrong.iter().take(10).collect();
                panic!("{} violations, the first: {first:#?}\nhistory: {}", wrong.len(), file.display());
            }
        }
    }
}

fn in_history(executed: vocab::Executed) -> Executed {
    match executed {
        vocab::Executed::Never => Executed::Never,
        vocab::Executed::Maybe => Executed::Maybe,
        vocab::Executed::Yes => Executed::Yes,
    }
}

/// A server's word is a failure; so is what a client says that it never sent. What is left is that nobody knows.
fn failure(id: u64, at_us: u64, error: &ClientError, executed: vocab::Executed) -> Entry {
    let code = error.code().map_or_else(|| "unsent".to_owned(), |code| code.name().to_owned());
    match (error, executed) {
        (ClientError::Refused(_), _) | (_, vocab::Executed::Never) => {
            Entry::Fail { id, at_us, code, executed: in_history(executed) }
        }
        _ => Entry::Info { id, at_us, why: error.to_string() },
    }
}

/// How a crowd calls.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Calls that a caller has under way.
    pub depth: usize,
    /// Longest time that a call asks its model to take.
    pub micros: u32,
    pub allowed: Option<Duration>,
    pub seed: u64,
}

impl Manner {
    fn next(&self, numbers: &mut Numbers, ledger: &Ledger) -> (Call, Request) {
        let micros = if numbers.below(8) == 0 { numbers.below(u64::from(self.micros) + 1) as u32 } else { 0 };
        let call = ledger.call_by(micros, self.allowed);
        let request = call.request();
        (
            call,
            match self.allowed {
                Some(allowed) => request.deadline(allowed),
                None => request,
            },
        )
    }
}

/// Calls over one connection until it ends, or until told to stop; then waits for what is under way. True when it was stopped.
pub fn call_on(client: &Client, ledger: &Ledger, manner: Manner, stop: &AtomicBool) -> bool {
    let mut numbers = Numbers(manner.seed);
    let mut open: VecDeque<(Call, Pending)> = VecDeque::new();
    let mut ended = false;
    while !ended && !stop.load(Ordering::Relaxed) {
        if open.len() >= manner.depth {
            let (call, pending) = open.pop_front().expect("it is full");
            ledger.told(call, pending.wait());
        }
        let (call, request) = manner.next(&mut numbers, ledger);
        match client.submit(&request) {
            Ok(pending) => open.push_back((call, pending)),
            Err(error) => {
                ended = !matches!(error, ClientError::DeadlineExceeded { .. } | ClientError::NoCredit);
                ledger.told(call, Err(error));
            }
        }
    }
    for (call, pending) in open {
        ledger.told(call, pending.wait());
    }
    !ended
}

/// Connects again and again, and calls until told to stop.
pub fn call_through(addr: std::net::SocketAddr, ledger: &Ledger, manner: Manner, stop: &AtomicBool) {
    let options = ClientOptions { connect_timeout: Duration::from_secs(2), ..ClientOptions::default() };
    let mut again = 0;
    while !stop.load(Ordering::Relaxed) {
        again += 1;
        match Client::connect(addr, options.clone()) {
            Ok(client) => drop(call_on(&client, ledger, Manner { seed: manner.seed ^ again << 32, ..manner }, stop)),
            // Nothing was asked; the next try may have better luck.
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Calls a pool until told to stop.
pub fn call_pool(pool: &Pool, ledger: &Ledger, manner: Manner, stop: &AtomicBool) {
    let mut numbers = Numbers(manner.seed);
    let mut open = VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        if open.len() >= manner.depth {
            let (call, pending): (Call, ferry::client::PoolPending) = open.pop_front().expect("it is full");
            ledger.told_by_pool(call, pending.wait());
        }
        let (call, request) = manner.next(&mut numbers, ledger);
        open.push_back((call, pool.submit(request)));
    }
    for (call, pending) in open {
        ledger.told_by_pool(call, pending.wait());
    }
}

/// The value below which a share of ascending values lie.
pub fn percentile(ascending: &[u64], share: f64) -> u64 {
    match ascending.len() {
        0 => 0,
        len => ascending[((len as f64 * share) as usize).min(len - 1)],
    }
}
