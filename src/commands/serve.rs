//! `ferry serve`: starts the server, says when it is ready, and turns signals into a drain.
//!
//! Always true
//! - Standard output gets exactly one line, `ready data=ADDR control=ADDR models=a,b`, once every model is warm.
//! - SIGTERM or SIGINT starts a drain; a second one ends at once; before the server is ready the first one ends it,
//!   because nothing has been accepted. SIGHUP has certificates and tenants read again.
//! - What is said on standard error goes the way of the log: who does not read it holds nobody up.

use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use ferry::config::limits::recorder_bytes;
use ferry::config::{Config, LogFormat, Place};
use ferry::server::{self, Ending, StartError, Stopper};
use ferry::telemetry::log;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{ConfigArgs, EXIT_AGAIN, EXIT_CONFIG, EXIT_FAILED, run_each_model_on_one_thread};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Address of the data port; port 0 picks a free one [default: 127.0.0.1:7600].
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Address of the control port [default: 127.0.0.1:7601].
    #[arg(long, value_name = "ADDR")]
    control: Option<String>,
    /// Directory where what was learned about batch times is kept [default: nowhere].
    #[arg(long, value_name = "DIR")]
    state: Option<String>,
    /// Where batches run: cpu, cuda, cuda:0,1, or auto: on all GPUs, on the CPU where there is none [default: cpu].
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Print which threads would run, and end.
    #[arg(long)]
    threads: bool,
}

pub fn run(args: Args) -> ExitCode {
    // Before anything is said, or it would be said twice.
    if !args.threads
        && let Err(error) = run_each_model_on_one_thread()
    {
        log::say(format!("cannot start again with RAYON_NUM_THREADS=1: {error}\n"));
        return ExitCode::from(EXIT_FAILED);
    }
    let device = args.device.map(|device| if device == "auto" { find_device() } else { device });
    let more = [("listen", args.listen), ("control", args.control), ("state", args.state), ("executor.device", device)];
    let config = match args.config.load(&more) {
        Ok(config) => config,
        Err(errors) => {
            log::say(format!("{errors}\n"));
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    if args.threads {
        log::say(thread_plan(&config));
        return ExitCode::SUCCESS;
    }
    // Dropped last: what was said at the end is written before it.
    let _log = match log::init(config.log.format == LogFormat::Json, &config.log.level) {
        Ok(guard) => guard,
        Err(error) => {
            log::say(format!("{error}\n"));
            log::flush();
            return ExitCode::from(match error {
                log::InitError::Filter(_) => EXIT_CONFIG,
                log::InitError::Failed(_) => EXIT_FAILED,
            });
        }
    };
    let stopper = match watch_signals() {
        Ok(stopper) => stopper,
        Err(error) => {
            log::say(format!("cannot watch signals: {error}\n"));
            return ExitCode::from(EXIT_FAILED);
        }
    };
    let server = match server::start(&config) {
        Ok(server) => server,
        Err(error) => {
            log::say(format!("{error}\n"));
            return ExitCode::from(status_of(&error));
        }
    };
    log::say(thread_plan(&config) + &recorder_line(&config));
    for skipped in &server.skipped {
        log::say(format!("{}\n", skipped.reason));
    }
    *stopper.lock().expect("the signal thread does not panic") = Some(server.stopper());
    let ready =
        format!("ready data={} control={} models={}\n", server.data_addr, server.control_addr, server.models.join(","));
    let mut out = std::io::stdout().lock();
    // Whoever started us may have closed the pipe; that is no reason to stop serving.
    let _ = out.write_all(ready.as_bytes()).and_then(|()| out.flush());
    drop(out);
    log::say(how_to_try(&server, &config));
    match server.wait() {
        Ending::Drained => ExitCode::SUCCESS,
        Ending::Aborted => ExitCode::from(EXIT_FAILED),
        Ending::Fault(what) => {
            log::say(format!("{what}\n"));
            ExitCode::from(EXIT_FAILED)
        }
        Ending::DeviceLost(what) => {
            log::say(format!("{what}; start again\n"));
            ExitCode::from(EXIT_AGAIN)
        }
    }
}

/// All GPUs, or the CPU and why.
fn find_device() -> String {
    match gpus() {
        Ok(numbers) => format!("cuda:{}", numbers.join(",")),
        Err(problem) => {
            log::say(format!("{problem}; batches run on the CPU\n"));
            "cpu".to_owned()
        }
    }
}

#[cfg(feature = "cuda")]
fn gpus() -> Result<Vec<String>, String> {
    Ok(ferry::device::cuda::probe::probe()?.iter().map(|gpu| gpu.ordinal.to_string()).collect())
}

#[cfg(not(feature = "cuda"))]
fn gpus() -> Result<Vec<String>, String> {
    Err("this binary was built without CUDA".to_owned())
}

/// A first request for what is served.
fn how_to_try(server: &server::ServerHandle, config: &Config) -> String {
    let encrypted = config.tls.certificate.is_some();
    // With what this server asks of them.
    let proof = [(encrypted, " --tls-ca CA.pem"), (config.tenants.is_some(), " --token-file FILE")];
    let proof: String = proof.iter().filter(|(asked, _)| *asked).map(|(_, flag)| *flag).collect();
    let data = format!("{}{proof}", server.data_addr);
    let mut text = String::from("try it, in another terminal:\n");
    let mut line = |command: String| text.push_str(&format!("  {command}\n"));
    if server.models.iter().any(|name| name == "minilm") {
        line(format!(
            "ferry infer --addr {data} --model minilm --text \"a cat sat on the mat\" --text \"a kitten on a rug\""
        ));
    }
    if let Some(name) = server.models.iter().find(|name| *name == "echo").or(server.models.first()) {
        line(format!("ferry load --addr {data} --model {name} --rate 1000"));
    }
    line(match (config.control_auth, encrypted) {
        (false, _) => format!("curl http://{}/metrics", server.control_addr),
        (true, false) => format!("curl -u :TOKEN http://{}/metrics", server.control_addr),
        (true, true) => format!("curl --cacert CA.pem -u :TOKEN https://{}/metrics", server.control_addr),
    });
    text
}

fn status_of(error: &StartError) -> u8 {
    match error {
        StartError::Preflight(_)
        | StartError::Models(_)
        | StartError::NoModels(_)
        | StartError::Access(_)
        | StartError::Device(_) => EXIT_CONFIG,
        StartError::WarmUp { .. } | StartError::Thread(_) => EXIT_FAILED,
    }
}

/// Which threads will run, one line each kind.
fn thread_plan(config: &Config) -> String {
    let threads = &config.threads;
    let pinned = if threads.pin { ", pinned" } else { "" };
    let keeper = usize::from(config.state.is_some());
    // Each executor of a device has a second thread, which waits for it.
    let waiting = if config.executor.device == Place::Cpu { 0 } else { threads.executors };
    let recorder = usize::from(config.recorder_directory().is_some());
    let total = threads.shards + 1 + threads.executors + waiting + threads.tokenizers + 5 + keeper + recorder;
    let waiting =
        if waiting > 0 { format!(" and as many that wait for {}", config.executor.device) } else { String::new() };
    let keeper = if keeper > 0 { ", 1 for --state" } else { "" };
    let recorder = if recorder > 0 { ", 1 for the flight recorder's files" } else { "" };
    format!(
        "threads: {} shard(s){pinned}, 1 batcher, {} executor(s){waiting}, up to {} tokenizer(s), 1 control, 1 shadow, 1 signals, 1 log, 1 main\
         {keeper}{recorder}; {total} at most, on {} core(s)\n",
        threads.shards,
        threads.executors,
        threads.tokenizers,
        ferry::config::Machine::here().cores,
    )
}

/// What is kept of the last batches, and where.
fn recorder_line(config: &Config) -> String {
    let batches = config.recorder.batches;
    let kept = match config.recorder_directory() {
        Some(directory) => format!("kept in {} on a breach of slo_ms or a panic", directory.display()),
        None => "kept when asked for (ferry timeline)".to_owned(),
    };
    match batches {
        0 => String::new(),
        _ => format!("flight recorder: the last {batches} batches, {} KiB; {kept}\n", recorder_bytes(config) >> 10),
    }
}

/// Watches for signals from now on. The stopper is filled in once there is something to stop.
fn watch_signals() -> std::io::Result<Arc<Mutex<Option<Stopper>>>> {
    let stopper = Arc::new(Mutex::new(None::<Stopper>));
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let shared = Arc::clone(&stopper);
    std::thread::Builder::new().name("ferry-signals".into()).spawn(move || {
        let mut count = 0;
        for signal in signals.forever() {
            let stopper = shared.lock().expect("nobody panics while holding the stopper").clone();
            if signal == SIGHUP {
                // Before the server is ready it reads everything anyway.
                stopper.inspect(Stopper::reload);
                continue;
            }
            match (count, stopper) {
                (_, None) => {
                    log::flush();
                    std::process::exit(0)
                }
                (0, Some(stopper)) => stopper.drain(),
                (1, Some(stopper)) => stopper.abort(),
                // Not even the abort came to an end.
                _ => {
                    log::flush();
                    std::process::exit(EXIT_FAILED.into())
                }
            }
            count += 1;
        }
    })?;
    Ok(stopper)
}
