//! The whole server on a simulated device: batches are packed where it reads, computed late and in random order, and it can be lost.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;

use candle_core::{Device, Tensor};
use ferry::device::sim::{Faults, SimDevice};
use ferry::gpu::driver::Fault;
use ferry::server::{Ending, TestHooks};
use ferry::vocab::{Code, DType, ModelHandle};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::common::process::Child;
use crate::common::{Ask, Event, Numbers, Server, control, floats_of, models_directory, wait_until};

const HIDDEN: usize = 64;
const INNER: usize = 96;

/// An encoder with heads of 32, which the kernels of devices have, and random weights.
pub fn write_small(directory: &Path) {
    write_encoder(directory, "small", "");
}

/// With more lines before its tables.
fn write_encoder(directory: &Path, name: &str, more: &str) {
    let tiny = std::fs::read_to_string(directory.join("tiny_bert/model.toml")).expect("is there");
    let manifest = tiny
        .replace("shape = [32]", "shape = [64]")
        .replace("hidden = 32", "hidden = 64")
        .replace("heads = 4", "heads = 2")
        .replace("intermediate = 64", "intermediate = 96")
        .replace("version = \"1\"", &format!("version = \"1\"\n{more}"));
    let folder = directory.join(name);
    std::fs::create_dir_all(folder.join("1")).expect("makes the folder");
    std::fs::write(folder.join("model.toml"), manifest).expect("writes the manifest");
    let mut random = StdRng::seed_from_u64(5);
    let mut tensors = HashMap::new();
    let mut put = |name: String, shape: &[usize], near: f32| {
        let scale = if shape.len() == 2 { 1.5 / (shape[1] as f32).sqrt() } else { 0.3 };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| near + random.random_range(-scale..scale)).collect();
        tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu).expect("fits its shape"));
    };
    for (table, rows) in [("word_embeddings", 100), ("position_embeddings", 64), ("token_type_embeddings", 2)] {
        put(format!("embeddings.{table}.weight"), &[rows, HIDDEN], 0.0);
    }
    let mut norms = vec!["embeddings.LayerNorm".to_owned()];
    for n in 0..2 {
        let at = format!("encoder.layer.{n}");
        for (name, inputs, outputs) in [
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", HIDDEN, INNER),
            ("output.dense", INNER, HIDDEN),
        ] {
            put(format!("{at}.{name}.weight"), &[outputs, inputs], 0.0);
            put(format!("{at}.{name}.bias"), &[outputs], 0.0);
        }
        norms.extend(["attention.output.LayerNorm", "output.LayerNorm"].map(|name| format!("{at}.{name}")));
    }
    for name in norms {
        put(format!("{name}.weight"), &[HIDDEN], 1.0);
        put(format!("{name}.bias"), &[HIDDEN], 0.0);
    }
    let file = folder.join("1/weights.safetensors");
    candle_core::safetensors::save(&tensors, file).expect("writes the weights");
}

fn server(device: &SimDevice, sets: &[&str]) -> Server {
    let models = models_directory();
    write_small(models.path());
    let sets: Vec<&str> = ["executor.device=\"sim:1\"", "executor.slots=3"].iter().chain(sets).copied().collect();
    Server::start_in(models, &sets, TestHooks { sim: Some(device.clone()), ..TestHooks::default() })
}

fn on_cpu() -> Server {
    let models = models_directory();
    write_small(models.path());
    Server::start_in(models, &[], TestHooks::default())
}

fn texts(seed: u64, count: usize) -> Vec<Vec<u32>> {
    let mut numbers = Numbers(seed);
    (0..count).map(|_| (0..=numbers.below(64).min(63)).map(|_| numbers.below(100) as u32).collect()).collect()
}

/// A request of one row.
fn row(model: ModelHandle, ids: &[u32]) -> Ask {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    Ask::new(model, DType::U32, &[1, ids.len() as u32], &bytes)
}

/// Asks for all at once; answers in the order of the texts.
fn answers(server: &Server, model: &str, texts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let mut raw = server.connect();
    let handle = raw.handle(model);
    let mut answers = vec![Vec::new(); texts.len()];
    for (chunk_at, chunk) in texts.chunks(100).enumerate() {
        let ids: HashMap<u64, usize> =
            (chunk.iter().enumerate()).map(|(at, text)| (raw.ask(&row(handle, text)), chunk_at * 100 + at)).collect();
        for _ in 0..ids.len() {
            match raw.recv() {
                Event::Result { id, payload, .. } => answers[ids[&id]] = floats_of(&payload),
                other => panic!("expected a result, got {other:?}"),
            }
        }
    }
    answers
}

fn assert_near(got: &[Vec<f32>], expected: &[Vec<f32>]) {
    for (row, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.len(), expected.len(), "row {row}");
        for (a, b) in got.iter().zip(expected) {
            assert!((a - b).abs() <= 3e-5, "row {row}: {a} and {b}");
        }
    }
}

#[test]
fn answers_are_those_of_a_cpu_and_no_byte_is_touched_under_a_copy() {
    let texts = texts(11, 400);
    let expected = answers(&on_cpu(), "small", &texts);
    let device = SimDevice::new(3);
    let server = server(&device, &["threads.executors=2"]);
    assert_near(&answers(&server, "small", &texts), &expected);
    // Heads of 8 have no kernel: that model is on the processor, beside the other.
    assert_eq!(answers(&server, "tiny_bert", &texts[..20])[0].len(), 32);
    assert!(server.metric("ferry_pinned_bytes", &[]) > 0.0 && server.metric("ferry_device_bytes", &[]) > 0.0);
    assert!(server.metric("ferry_device_graphs", &["executor=\"0\""]) > 0.0);
    // Warm-up runs in pieces; nothing since.
    let pieces = server.metric("ferry_device_pieces_total", &[]);
    assert_near(&answers(&server, "small", &texts[..100]), &expected[..100]);
    assert_eq!(server.metric("ferry_device_pieces_total", &[]), pieces);
    server.wait_until_at_rest();
    for part in ["useful", "padding_rounding", "overhead_launch", "overhead_copy"] {
        let seconds = server.metric("ferry_executor_time_seconds_total", &[&format!("part=\"{part}\"")]);
        assert!(seconds > 0.0, "the device's own times are in the waterfall: {part}");
    }
    server.drain();
    assert_eq!(server.ending(), Ending::Drained);
    assert_eq!(device.violations(), [""; 0]);
    assert_eq!(device.allocated(), 0);
}

/// What the batcher runs itself is not for a device, and neither is what its kernels do not have, or 8 bits.
#[test]
fn models_that_a_device_does_not_run_are_on_the_processor_beside_it() {
    let texts = texts(16, 30);
    let expected = answers(&on_cpu(), "small", &texts);
    let models = models_directory();
    write_encoder(models.path(), "inline", "placement = \"inline\"");
    write_encoder(models.path(), "small", "");
    write_encoder(models.path(), "bytes", "");
    let manifest = models.path().join("bytes/model.toml");
    let text = std::fs::read_to_string(&manifest).expect("was written");
    std::fs::write(manifest, text + "precision = \"int8\"\n").expect("is ours");
    let device = SimDevice::new(10);
    let hooks = TestHooks { sim: Some(device), ..TestHooks::default() };
    let server = Server::start_in(models, &["executor.device=\"sim:1\""], hooks);
    assert_near(&answers(&server, "inline", &texts), &expected);
    assert_near(&answers(&server, "small", &texts), &expected);
    assert_eq!(answers(&server, "bytes", &texts)[0].len(), HIDDEN);
}

#[test]
fn a_batch_that_memory_was_not_made_for_runs_in_pieces() {
    let texts = texts(12, 200);
    let expected = answers(&on_cpu(), "small", &texts);
    let device = SimDevice::new(4);
    // Weights take about 0.4 MiB; activations of 1,024 tokens would take 2 MiB.
    device.set_faults(Faults { memory_max: 3 << 19, ..Faults::default() });
    let server = server(&device, &["executor.graph_bytes_max=0"]);
    let warm = server.metric("ferry_device_pieces_total", &[]);
    assert_near(&answers(&server, "small", &texts), &expected);
    let halved = server.metric("ferry_device_pieces_total", &[]) - warm;
    assert!(halved > 0.0, "batches are larger than what there is memory for");
    server.drain();
    assert_eq!(server.ending(), Ending::Drained);
    assert_eq!(device.violations(), [""; 0]);
}

/// F59: out of memory in the middle of traffic costs nobody an answer: less at a time is tried.
#[test]
fn out_of_memory_in_the_middle_costs_no_answer() {
    let texts = texts(14, 60);
    let expected = answers(&on_cpu(), "small", &texts);
    let device = SimDevice::new(8);
    let server = server(&device, &["executor.graph_bytes_max=0"]);
    let warm = server.metric("ferry_device_pieces_total", &[]);
    for round in 0..40 {
        let fault = Fault::OutOfMemory { bytes: 1 };
        device.set_faults(Faults { call: Some((3 + round * 2, fault)), ..Faults::default() });
        assert_near(&answers(&server, "small", &texts), &expected);
    }
    assert!(server.metric("ferry_device_pieces_total", &[]) > warm, "some of the faults hit a batch");
    server.drain();
    assert_eq!(server.ending(), Ending::Drained);
    assert_eq!(device.violations(), [""; 0]);
}

/// F60, in the small: not ready within a batch, every request is answered, no result afterwards, another process is asked for.
#[test]
fn a_lost_device_fails_closed() {
    lose(5, &[]);
    // Batches of one row: all slots are in flight, and more wait for one, when it happens.
    lose(6, &["rows_max"]);
    lose(7, &["rows_max"]);
}

fn lose(seed: u64, one: &[&str]) {
    let device = SimDevice::new(seed);
    let server = server(&device, &[]);
    for knob in one {
        let body = format!(r#"{{"set":{{"{knob}":1}}}}"#);
        let (status, said) = control(server.control, "PATCH", "/v1/models/small/policy", "", &body);
        assert_eq!(status, 200, "{said}");
    }
    let mut raw = server.connect();
    let handle = raw.handle("small");
    raw.round(&row(handle, &[1, 2, 3])).expect_result();
    assert!(is_ready(&server));
    device.set_faults(Faults { operation: Some(400), ..Faults::default() });
    let mut asked = 0;
    let (mut ok, mut failed) = (0, 0);
    let mut first_failed = u64::MAX;
    let mut closed = false;
    while failed == 0 && !closed {
        assert!(asked < 100_000, "the fault was never met");
        for _ in 0..20 {
            raw.ask(&row(handle, &[1, 2, 3, 4]));
            asked += 1;
        }
        while ok + failed < asked && !closed {
            match raw.recv() {
                Event::Result { id, .. } => {
                    // What was computed before may be heard of after: one half of the executor asks, the other waits.
                    assert!(id < first_failed, "no result of what came after the loss");
                    ok += 1;
                }
                Event::Error { id, refusal } => {
                    assert!(matches!(refusal.code, Code::ExecutorFailed | Code::Draining), "{refusal:?}");
                    first_failed = first_failed.min(id);
                    failed += 1;
                }
                Event::Goaway { .. } => {}
                Event::End => closed = true,
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(ok + failed, asked, "each is answered once");
    assert!(!is_ready(&server), "whoever balances load is told before whoever asked");
    assert!(matches!(server.ending(), Ending::DeviceLost(message) if message.contains("illegal address")));
    assert_eq!(device.violations(), [""; 0]);
}

/// As a load balancer asks: a port that is closed, or closes, is not ready.
fn is_ready(server: &Server) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(server.control)?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    ask().is_ok_and(|text| text.starts_with("HTTP/1.1 200"))
}

/// F57, F68: a device that says nothing holds nobody's deadline; who leaves meanwhile takes no memory from under a copy.
#[test]
fn a_stalled_device_holds_neither_deadlines_nor_memory() {
    let device = SimDevice::new(6);
    let server = server(&device, &[]);
    let mut raw = server.connect();
    let handle = raw.handle("small");
    raw.round(&row(handle, &[1, 2, 3])).expect_result();
    device.set_faults(Faults { stalled: true, ..Faults::default() });
    {
        let mut leaver = server.connect();
        for _ in 0..40 {
            leaver.ask(&row(handle, &[9; 30]));
        }
        leaver.ping();
    }
    let id = raw.ask(&row(handle, &[4; 20]).deadline_us(50_000));
    match raw.recv() {
        Event::Error { id: answered, refusal } => {
            assert_eq!((answered, refusal.code), (id, Code::DeadlineExceeded));
        }
        other => panic!("expected an end by deadline, got {other:?}"),
    }
    device.set_faults(Faults::default());
    let (_, payload) = raw.round(&row(handle, &[4; 20])).expect_result();
    assert_near(&[floats_of(&payload)], &answers(&on_cpu(), "small", &[vec![4; 20]]));
    server.wait_until_at_rest();
    server.drain();
    assert_eq!(server.ending(), Ending::Drained);
    assert_eq!(device.violations(), [""; 0]);
}

/// F57 on a device: it cannot be taken from whoever hangs on it, so another process has to.
#[test]
fn a_device_that_hangs_for_too_long_is_given_up_with_the_process() {
    let device = SimDevice::new(9);
    let server = server(&device, &["executor.hang_timeout_ms=300"]);
    let mut raw = server.connect();
    let handle = raw.handle("small");
    raw.round(&row(handle, &[1, 2, 3])).expect_result();
    device.set_faults(Faults { stalled: true, ..Faults::default() });
    let asked = [raw.ask(&row(handle, &[4; 20])), raw.ask(&row(handle, &[5; 20]))];
    let mut failed = Vec::new();
    for event in raw.recv_all() {
        if let Event::Error { id, refusal } = event {
            assert_eq!(refusal.code, Code::ExecutorFailed);
            failed.push(id);
        }
    }
    failed.sort_unstable();
    assert_eq!(failed, asked);
    assert!(!is_ready(&server));
    assert!(matches!(server.ending(), Ending::DeviceLost(message) if message.contains("on its device")));
    assert_eq!(device.violations(), [""; 0]);
}

#[test]
fn a_padded_policy_is_obeyed_by_rows_and_ignored_by_the_device() {
    let texts = texts(13, 60);
    let expected = answers(&on_cpu(), "small", &texts);
    let device = SimDevice::new(7);
    let server = server(&device, &[]);
    let body = r#"{"set":{"layout":"padded"}}"#;
    let (status, body) = control(server.control, "PATCH", "/v1/models/small/policy", "", body);
    assert_eq!(status, 200, "{body}");
    assert_near(&answers(&server, "small", &texts), &expected);
    assert_eq!(device.violations(), [""; 0]);
}

/// N12 on a device: rows are run again alone; a device that computes wrongly is noticed.
#[test]
fn the_canary_looks_at_rows_of_a_device() {
    let texts = texts(15, 300);
    let device = SimDevice::new(9);
    let server = server(&device, &["executor.canary_every=10"]);
    let looked = |outcome: &str| server.metric("ferry_canary_rows_total", &["model=\"small\"", outcome]);
    answers(&server, "small", &texts);
    wait_until("some rows were looked at", || {
        answers(&server, "small", &texts[..20]);
        looked("outcome=\"equal\"") > 5.0
    });
    assert_eq!(looked("outcome=\"apart\""), 0.0);
    device.set_faults(Faults { spoils: true, ..Faults::default() });
    wait_until("a wrong row is noticed", || {
        answers(&server, "small", &texts[..50]);
        looked("outcome=\"apart\"") > 0.0
    });
    assert_eq!(device.violations(), [""; 0]);
}

/// One binary for machines with and without a GPU.
#[test]
fn without_a_gpu_auto_says_so_and_serves_on_the_cpu() {
    let models = models_directory();
    let mut process = std::process::Command::new(env!("CARGO_BIN_EXE_ferry"))
        .args(["serve", "--device", "auto", "--listen", "127.0.0.1:0", "--control", "127.0.0.1:0", "--models"])
        .arg(models.path())
        .env("CUDA_VISIBLE_DEVICES", "")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("starts");
    let mut ready = String::new();
    BufReader::new(process.stdout.as_mut().expect("piped")).read_line(&mut ready).expect("a line");
    assert!(ready.starts_with("ready "), "{ready}");
    let pid = nix::unistd::Pid::from_raw(process.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("the process is ours");
    let output = process.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text.matches("batches run on the CPU").count(), 1, "{text}");
}

/// The real binary: its exit status tells the supervisor to start another.
#[test]
fn a_process_whose_device_is_lost_ends_with_75() {
    let models = models_directory();
    write_small(models.path());
    let mut process = Child::start_in(models, &["executor.device=\"sim:1:60000\""]);
    let mut raw = process.connect();
    let handle = raw.handle("small");
    for _ in 0..100_000 {
        raw.ask(&row(handle, &[1, 2, 3, 4]));
        if matches!(raw.recv(), Event::Error { .. } | Event::Goaway { .. } | Event::End) {
            break;
        }
    }
    assert_eq!(process.status(), Some(75));
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_binary_without_cuda_says_how_to_get_one() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_ferry"))
        .args(["serve", "--device", "cuda", "--listen", "127.0.0.1:0", "--control", "127.0.0.1:0"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("runs");
    assert_eq!(output.status.code(), Some(78));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("built without CUDA") && text.contains("--features cuda"), "{text}");
}
