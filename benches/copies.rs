//! How many bytes the server copies for each byte of payload: counted, not timed.
//!
//! `ferry serve` runs behind benches/support/count_copies.c, which counts what each thread copies through memcpy and
//! memmove, [`COPY_MIN`] bytes or more at once, and the blocks that realloc moved. The kernel's copies, from and to the
//! socket, are not ours and not in it.
//!
//! | role | what it copies on purpose |
//! | --- | --- |
//! | batcher | the way in: from the read buffer into the staging buffer |
//! | executor | nothing; but the model that is measured, echo, copies its input to its output |
//! | shard | the way back: from the batch's output into the connection's |
//!
//! A request that is read whole and refused shows what the shard copies on the way in: nothing, if one read brought it.
//! If not, its beginning, less than one read, is copied once more: aside, and back in front of the next read.
//!
//!     cargo bench --bench copies [-- --tiny]
//!
//! FERRY_BIN names the server's binary, otherwise target/release/ferry is used; needs `cc` and a dynamic C library. Fails
//! when a payload that came in one read is copied more than once in a direction.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use ferry::vocab::{DType, ModelHandle};
use ferry::wire::decoder::Step;
use ferry::wire::encoder::{Head, append_frame};
use ferry::wire::message::{Hello, Infer, List, TensorMeta};
use ferry::wire::{Decoder, Kind, Limits};

/// Shorter copies are not counted: glommio moves descriptions of its tasks and timers, up to some 400 bytes each. No
/// payload here is copied in pieces that small.
const COPY_MIN: u32 = 512;

/// The one model that is served: its handle is the first.
const ECHO: ModelHandle = ModelHandle(0);
const UNKNOWN: ModelHandle = ModelHandle(999);

/// What is asked: rows of so many values of 4 bytes, so many requests in one write.
struct Case {
    model: ModelHandle,
    rows: u32,
    len: u32,
    depth: u32,
}

impl Case {
    fn payload_bytes(&self) -> u32 {
        self.rows * self.len * 4
    }
}

/// Lengths are those of buckets, so that nothing is padded.
const CASES: [Case; 9] = [
    Case { model: ECHO, rows: 1, len: 512, depth: 1 },
    Case { model: ECHO, rows: 1, len: 1024, depth: 1 },
    Case { model: UNKNOWN, rows: 1, len: 512, depth: 1 },
    Case { model: UNKNOWN, rows: 1, len: 1024, depth: 1 },
    Case { model: ECHO, rows: 1, len: 512, depth: 64 },
    Case { model: ECHO, rows: 1, len: 1024, depth: 64 },
    // Two frames that have a buffer of their own from their first read on.
    Case { model: ECHO, rows: 12, len: 1024, depth: 1 },
    Case { model: ECHO, rows: 16, len: 1024, depth: 1 },
    Case { model: UNKNOWN, rows: 16, len: 1024, depth: 1 },
];

/// Copied, and moved by realloc: in bytes, by role of the thread.
type Counts = BTreeMap<String, (u64, u64)>;

struct Server {
    process: Child,
    stream: TcpStream,
    input: Vec<u8>,
    next_id: u64,
    counts: PathBuf,
    _folder: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let tiny = args.iter().any(|arg| arg == "--tiny") || !args.iter().any(|arg| arg == "--bench");
    let Some(binary) = ferry_binary(tiny) else {
        eprintln!("copies: nothing was measured: FERRY_BIN is not set and there is no release build");
        return ExitCode::SUCCESS;
    };
    match measure(&binary, if tiny { 256 } else { 16_384 }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("copies: {message}");
            ExitCode::FAILURE
        }
    }
}

fn ferry_binary(tiny: bool) -> Option<PathBuf> {
    if let Some(binary) = std::env::var_os("FERRY_BIN") {
        return Some(binary.into());
    }
    let beside = std::env::current_exe().ok()?.parent()?.parent()?.join("ferry");
    (!tiny && beside.is_file()).then_some(beside)
}

fn measure(binary: &Path, requests: u32) -> Result<(), String> {
    let mut server = Server::start(binary).map_err(|error| format!("the server does not start: {error}"))?;
    println!("bytes copied by the server per request, {requests} requests each; moved: by realloc, all threads");
    println!(
        "{:<8} {:>13} {:>6} {:>10} {:>10} {:>10} {:>8}",
        "model", "payload bytes", "depth", "shard", "batcher", "executor", "moved"
    );
    let mut measured = Vec::new();
    for case in &CASES {
        let copied = server.copied_per_request(case, requests).map_err(|error| error.to_string())?;
        let [shard, batcher, executor, moved] = copied;
        println!(
            "{:<8} {:>13} {:>6} {shard:>10.1} {batcher:>10.1} {executor:>10.1} {moved:>8.1}",
            if case.model == ECHO { "echo" } else { "refused" },
            case.payload_bytes(),
            case.depth,
        );
        measured.push((case, copied));
    }
    let of = |model: ModelHandle, depth: u32| {
        let one_row = measured.iter().filter(move |(case, _)| (case.model, case.depth, case.rows) == (model, depth, 1));
        one_row.map(|(case, copied)| copied.map(|bytes| bytes / f64::from(case.payload_bytes())))
    };
    let once = |ratio: f64| (ratio - 1.0).abs() < 0.01;
    let in_one_read = of(ECHO, 1).all(|[shard, batcher, ..]| once(shard) && once(batcher))
        && of(UNKNOWN, 1).all(|[shard, batcher, ..]| shard < 0.01 && batcher == 0.0);
    let cut_by_reads = of(ECHO, 64).all(|[shard, batcher, ..]| shard < 1.3 && once(batcher));
    match in_one_read && cut_by_reads {
        true => Ok(()),
        false => Err("expected one copy in, by the batcher, and one back, by the shard".into()),
    }
}

impl Server {
    fn start(binary: &Path) -> std::io::Result<Server> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = tempfile::tempdir()?;
        let shim = folder.path().join("count_copies.so");
        let built = Command::new("cc")
            // Else the compiler finds that the loop that copies is a call of memcpy, which it is in.
            .args(["-O2", "-shared", "-fPIC", "-fno-builtin", "-fno-tree-loop-distribute-patterns", "-o"])
            .arg(&shim)
            .arg(root.join("benches/support/count_copies.c"))
            .status()?;
        if !built.success() {
            return Err(std::io::Error::other("cc did not build benches/support/count_copies.c"));
        }
        // On an executor's own thread, so that the batcher's copies are the batcher's.
        let manifest = std::fs::read_to_string(root.join("models/echo/model.toml"))?;
        std::fs::create_dir_all(folder.path().join("models/echo"))?;
        std::fs::write(
            folder.path().join("models/echo/model.toml"),
            manifest.replace("placement = \"inline\"", "placement = \"executor\""),
        )?;
        let counts = folder.path().join("counts");
        let mut process = Command::new(binary)
            .args(["serve", "--listen", "127.0.0.1:0", "--control", "127.0.0.1:0", "--set", "threads.shards=1"])
            // Refusals are what some requests are for.
            .args(["--set", "abuse.points=0"])
            .arg("--models")
            .arg(folder.path().join("models"))
            .env("LD_PRELOAD", &shim)
            .env("COPIES_FILE", &counts)
            .env("COPIES_MIN", COPY_MIN.to_string())
            // As ferry would set it, by starting itself a second time.
            .env("RAYON_NUM_THREADS", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("stdout is piped")).read_line(&mut line)?;
        let addr = line.split_whitespace().find_map(|word| word.strip_prefix("data="));
        let stream = match addr.map(TcpStream::connect) {
            Some(Ok(stream)) => stream,
            _ => {
                let _ = process.kill();
                let _ = process.wait();
                return Err(std::io::Error::other(format!("expected a line `ready data=ADDR`, got {line:?}")));
            }
        };
        stream.set_nodelay(true)?;
        let mut server = Server { process, stream, input: Vec::new(), next_id: 1, counts, _folder: folder };
        let hello = Hello {
            version_min: 1,
            version_max: 1,
            features: 0,
            client: "copies".into(),
            tenant: String::new(),
            token: Vec::new(),
        };
        let mut bytes = Vec::new();
        append_frame(&mut bytes, Head::control(Kind::Hello), &hello, &[]).expect("short strings");
        server.stream.write_all(&bytes)?;
        server.take_frames(1, Kind::HelloAck)?;
        Ok(server)
    }

    /// Bytes that shard, batcher and executors copied, and that all of them moved, per request of a case.
    fn copied_per_request(&mut self, case: &Case, requests: u32) -> std::io::Result<[f64; 4]> {
        // Once before it counts: buffers grow to the case's size, and whoever was not counted yet gets a row.
        self.ask(case, requests / 4)?;
        let before = self.counts()?;
        self.ask(case, requests)?;
        let after = self.counts()?;
        let of = |role: &str| {
            let at = |counts: &Counts| counts.get(role).copied().unwrap_or_default();
            let ((copied, moved), (copied_before, moved_before)) = (at(&after), at(&before));
            let each = |bytes: u64| bytes as f64 / f64::from(requests);
            (each(copied - copied_before), each(moved - moved_before))
        };
        let (shard, batcher, executor) = (of("ferry-shard"), of("ferry-batcher"), of("ferry-exec"));
        Ok([shard.0, batcher.0, executor.0, shard.1 + batcher.1 + executor.1])
    }

    fn ask(&mut self, case: &Case, requests: u32) -> std::io::Result<()> {
        let payload: Vec<u8> = (0..case.payload_bytes()).map(|at| at as u8).collect();
        let dims = List::from_slice(&[case.rows, case.len]).expect("two dimensions");
        let mut infer = Infer::default();
        infer.inputs.push(TensorMeta { index: 0, dtype: DType::F32 as u8, dims }).expect("the first");
        let answer = if case.model == ECHO { Kind::Result } else { Kind::Error };
        let mut bytes = Vec::new();
        for _ in 0..requests / case.depth {
            bytes.clear();
            for _ in 0..case.depth {
                let head = Head { kind: Kind::Infer, model: case.model, request_id: self.next_id };
                append_frame(&mut bytes, head, &infer, &payload).expect("small metadata");
                self.next_id += 1;
            }
            self.stream.write_all(&bytes)?;
            self.take_frames(case.depth, answer)?;
        }
        Ok(())
    }

    fn take_frames(&mut self, count: u32, kind: Kind) -> std::io::Result<()> {
        let decoder = Decoder::new(Limits::DEFAULT);
        let mut chunk = vec![0; 256 << 10];
        let mut taken = 0;
        while taken < count {
            match decoder.next(&self.input).map_err(|error| std::io::Error::other(error.to_string()))? {
                Step::Frame(frame) if frame.kind == kind => {
                    self.input.drain(..frame.len);
                    taken += 1;
                }
                Step::Frame(frame) => {
                    return Err(std::io::Error::other(format!("expected {kind:?}, got {:?}", frame.kind)));
                }
                Step::Skip { len } => drop(self.input.drain(..len)),
                Step::Incomplete { .. } => match self.stream.read(&mut chunk)? {
                    0 => return Err(std::io::Error::other("the server closed the connection")),
                    read => self.input.extend_from_slice(&chunk[..read]),
                },
            }
        }
        Ok(())
    }

    /// All counts so far, by role.
    fn counts(&self) -> std::io::Result<Counts> {
        let mut counts = Counts::new();
        for row in std::fs::read(&self.counts)?.chunks_exact(24) {
            let number = |at: usize| u64::from_le_bytes(*row[at..].first_chunk().expect("three numbers of 8 bytes"));
            if number(0) == 0 {
                continue;
            }
            let name = format!("/proc/{}/task/{}/comm", self.process.id(), number(0));
            // A thread that has ended copies nothing more.
            let name = std::fs::read_to_string(name).unwrap_or_default();
            let role = name.trim().trim_end_matches(|c: char| c.is_ascii_digit() || c == '-');
            let sum = counts.entry(role.to_owned()).or_default();
            *sum = (sum.0 + number(8), sum.1 + number(16));
        }
        Ok(counts)
    }
}
