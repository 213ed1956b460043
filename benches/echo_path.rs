//! What a request costs besides the model: echo of 256 bytes through `ferry serve`, and through a bare epoll server
//! that speaks the same wire, round by round in alternation.
//!
//! One connection, closed loop. Depth 256 shows requests per second, depth 1 the time there and back. Server CPU is
//! read from /proc, so it holds even where client and server share cores. Latency at a chosen load is `ferry load`.
//!
//!     cargo bench --bench echo_path [-- --json | --tiny | --bare-only | --rounds N | --seconds S]
//!
//! FERRY_BIN names the server's binary, otherwise target/release/ferry beside this one is used. Without either, the
//! bare side runs alone and the page says so.

#[path = "support/bare_server.rs"]
mod bare_server;

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use ferry::client::{Client, ClientOptions};
use ferry::load::{Lengths, LoadOptions, Mode, Report, run};
use serde::Serialize;

const PAYLOAD_BYTES: u32 = 256;
const DEPTHS: [u32; 2] = [256, 1];

struct Settings {
    rounds: usize,
    seconds: f64,
    json: bool,
    bare_only: bool,
}

/// A server in a process of its own.
struct Server {
    name: &'static str,
    child: Child,
    addr: SocketAddr,
    model: String,
    length: u32,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone afterwards.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Measured {
    requests_per_s: f64,
    p50_us: f64,
    p99_us: f64,
    server_cpu_us_per_request: f64,
    client_busy: f64,
}

#[derive(Debug, Serialize)]
struct Row {
    server: &'static str,
    depth: u32,
    /// Medians over the rounds, each figure by itself.
    median: Measured,
    rounds: Vec<Measured>,
}

#[derive(Debug, Serialize)]
struct Document {
    bench: &'static str,
    payload_bytes: u32,
    seconds_per_round: f64,
    cores: usize,
    rows: Vec<Row>,
    /// `ferry` over `bare`; absent where ferry did not run.
    requests_ratio_at_depth_256: Option<f64>,
    p50_ratio_at_depth_1: Option<f64>,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "--serve-bare") {
        serve_bare();
    }
    let has = |flag: &str| args.iter().any(|arg| arg == flag);
    let value =
        |flag: &str| args.iter().position(|arg| arg == flag).and_then(|at| args.get(at + 1)?.parse::<f64>().ok());
    // cargo test runs benches without --bench: then a short run shows that it still works.
    // Of the server only one that was asked for by name: a debug build takes longer to warm up than the whole run.
    let tiny = has("--tiny") || !has("--bench");
    let settings = Settings {
        rounds: value("--rounds").map_or(if tiny { 1 } else { 5 }, |rounds| rounds as usize).max(1),
        seconds: value("--seconds").unwrap_or(if tiny { 0.15 } else { 2.0 }),
        json: has("--json"),
        bare_only: has("--bare-only") || (tiny && std::env::var_os("FERRY_BIN").is_none()),
    };
    match measure(&settings) {
        Ok(document) if settings.json => {
            println!("{}", serde_json::to_string_pretty(&document).expect("plain data"));
            ExitCode::SUCCESS
        }
        Ok(document) => {
            print_table(&document);
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("echo_path: {message}");
            ExitCode::FAILURE
        }
    }
}

fn serve_bare() -> ! {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    println!("ready data={}", listener.local_addr().expect("bound"));
    std::io::stdout().flush().expect("the parent reads");
    bare_server::serve(listener, bare_server::BareOptions::default());
    unreachable!("the bare server serves for ever")
}

fn measure(settings: &Settings) -> Result<Document, String> {
    let this = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut servers = vec![start("bare", Command::new(&this).arg("--serve-bare"))?];
    match ferry_binary(&this).filter(|_| !settings.bare_only) {
        Some(binary) => {
            let mut command = Command::new(binary);
            command.args(["serve", "--listen", "127.0.0.1:0", "--control", "127.0.0.1:0"]);
            match start("ferry", &mut command) {
                Ok(server) => servers.push(server),
                Err(message) => eprintln!("echo_path: the bare server runs alone: {message}"),
            }
        }
        None if settings.bare_only => {}
        None => eprintln!("echo_path: the bare server runs alone: FERRY_BIN is not set and there is no release build"),
    }
    let mut rows: Vec<Row> = Vec::new();
    for depth in DEPTHS {
        for round in 0..settings.rounds {
            // Each round starts with the other server, so that a drift of the machine falls on both.
            for turn in 0..servers.len() {
                let server = &servers[(turn + round) % servers.len()];
                let measured = one_round(server, depth, settings.seconds)?;
                match rows.iter_mut().find(|row| row.server == server.name && row.depth == depth) {
                    Some(row) => row.rounds.push(measured),
                    None => rows.push(Row {
                        server: server.name,
                        depth,
                        median: Measured::default(),
                        rounds: vec![measured],
                    }),
                }
            }
        }
    }
    for row in &mut rows {
        let median = |figure: fn(&Measured) -> f64| {
            let mut figures: Vec<f64> = row.rounds.iter().map(figure).collect();
            figures.sort_by(f64::total_cmp);
            figures[figures.len() / 2]
        };
        row.median = Measured {
            requests_per_s: median(|m| m.requests_per_s),
            p50_us: median(|m| m.p50_us),
            p99_us: median(|m| m.p99_us),
            server_cpu_us_per_request: median(|m| m.server_cpu_us_per_request),
            client_busy: median(|m| m.client_busy),
        };
    }
    let ratio = |depth: u32, figure: fn(&Measured) -> f64| {
        let of = |name: &str| rows.iter().find(|row| row.server == name && row.depth == depth);
        Some(figure(&of("ferry")?.median) / figure(&of("bare")?.median))
    };
    Ok(Document {
        bench: "echo_path",
        payload_bytes: PAYLOAD_BYTES,
        seconds_per_round: settings.seconds,
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        requests_ratio_at_depth_256: ratio(256, |m| m.requests_per_s),
        p50_ratio_at_depth_1: ratio(1, |m| m.p50_us),
        rows,
    })
}

fn ferry_binary(this: &std::path::Path) -> Option<PathBuf> {
    if let Some(binary) = std::env::var_os("FERRY_BIN") {
        return Some(binary.into());
    }
    // A bench lies in target/release/deps.
    let beside = this.parent()?.parent()?.join("ferry");
    beside.is_file().then_some(beside)
}

/// Starts a server and reads its address from the line it prints when it is ready.
fn start(name: &'static str, command: &mut Command) -> Result<Server, String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{name} does not start: {error}"))?;
    let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    let ready = lines.by_ref().map_while(Result::ok).find(|line| line.starts_with("ready "));
    let addr = ready
        .as_deref()
        .and_then(|line| line.split(' ').find_map(|word| word.strip_prefix("data=")))
        .and_then(|addr| addr.parse::<SocketAddr>().ok());
    let Some(addr) = addr else {
        let _ = child.kill();
        let _ = child.wait();
        return Err(format!("{name} printed no line `ready data=ADDR` but {ready:?}"));
    };
    // Whatever it prints later must not fill the pipe.
    std::thread::spawn(move || lines.for_each(drop));
    let mut server = Server { name, child, addr, model: "echo".into(), length: PAYLOAD_BYTES };
    let client = Client::connect(addr, ClientOptions::default()).map_err(|error| format!("{name}: {error}"))?;
    let model = client.model(&server.model).map_err(|error| format!("{name}: {error}"))?;
    let row_bytes: usize = model.contract.inputs.iter().map(|spec| spec.row_bytes(1)).sum();
    server.length = PAYLOAD_BYTES / row_bytes as u32;
    Ok(server)
}

fn one_round(server: &Server, depth: u32, seconds: f64) -> Result<Measured, String> {
    let options = LoadOptions {
        lengths: Lengths::Fixed(server.length),
        duration: Duration::from_secs_f64(seconds),
        warmup: Duration::from_secs_f64(seconds / 10.0),
        inputs_max: 512,
        ..LoadOptions::new(server.addr, server.model.as_str(), Mode::Closed { callers: depth })
    };
    let cpu_before = cpu_us(&server.child)?;
    let mut answered = 0;
    let report: Report =
        run(&options, |progress| answered = progress.answered).map_err(|error| format!("{}: {error}", server.name))?;
    let cpu = cpu_us(&server.child)? - cpu_before;
    if report.failed() || !report.errors.is_empty() {
        return Err(format!("{}: the run failed\n{}", server.name, report.human()));
    }
    // The warm-up's requests cost as well; the closed loop runs at one rate throughout.
    let requests = report.throughput_rps * (seconds * 1.1);
    Ok(Measured {
        requests_per_s: report.throughput_rps,
        p50_us: report.latency_us.p50,
        p99_us: report.latency_us.p99,
        server_cpu_us_per_request: cpu / requests.max(1.0),
        client_busy: report.client_busy,
    })
}

/// Processor time of a process so far, user and system, in microseconds.
fn cpu_us(child: &Child) -> Result<f64, String> {
    let path = format!("/proc/{}/stat", child.id());
    let stat = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    // The name, in brackets, may contain spaces; behind it come fields 3 and on.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    Ok((ticks(14) + ticks(15)) * 10_000.0) // Linux reports hundredths of a second
}

fn print_table(document: &Document) {
    println!(
        "echo of {} bytes, 1 connection, {} cores, medians of {} round(s) of {} s",
        document.payload_bytes,
        document.cores,
        document.rows.first().map_or(0, |row| row.rounds.len()),
        document.seconds_per_round
    );
    println!(
        "{:<7} {:>5} {:>12} {:>10} {:>10} {:>16} {:>12}",
        "server", "depth", "requests/s", "p50 µs", "p99 µs", "server CPU µs/rq", "client busy"
    );
    for row in &document.rows {
        let m = &row.median;
        println!(
            "{:<7} {:>5} {:>12.0} {:>10.1} {:>10.1} {:>16.2} {:>11.0}%",
            row.server,
            row.depth,
            m.requests_per_s,
            m.p50_us,
            m.p99_us,
            m.server_cpu_us_per_request,
            m.client_busy * 100.0
        );
    }
    if let Some(ratio) = document.requests_ratio_at_depth_256 {
        println!("ferry / bare: {ratio:.3} of the requests/s at depth 256");
    }
    if let Some(ratio) = document.p50_ratio_at_depth_1 {
        println!("ferry / bare: {ratio:.3} times the p50 at depth 1");
    }
}
