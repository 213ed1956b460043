//! `ferry load`: offers a load to a server and reports what came of it.
//!
//! Elsewhere: the load generator itself (load/).

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ferry::load::{self, Arrival, Lengths, LoadError, LoadOptions, Mode, Trace};
use indicatif::{ProgressBar, ProgressStyle};

/// Connections when none are asked for.
const CONNECTIONS: usize = 4;

#[derive(clap::Args, Clone, Debug)]
#[command(group(clap::ArgGroup::new("mode").required(true).args(["rate", "concurrency", "trace"])))]
pub struct Args {
    /// The server's data address.
    #[arg(long)]
    addr: String,
    #[arg(long)]
    model: String,
    /// Open loop: requests per second, sent at their time whatever the server does.
    #[arg(long, value_name = "R")]
    rate: Option<f64>,
    /// Shape of open-loop arrivals: poisson, constant or burst.
    #[arg(long, default_value = "poisson", conflicts_with_all = ["concurrency", "trace"])]
    arrival: Arrival,
    /// Closed loop: callers, each of which sends its next request when it has its answer.
    #[arg(long, value_name = "N")]
    concurrency: Option<u32>,
    /// Closed loop: callers who are refused come back at once, whatever `retry_after_ms` says.
    #[arg(long, requires = "concurrency")]
    impatient: bool,
    /// Open loop from a file: lines of microseconds,length.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Lengths of rows: fixed:64, uniform:8..128, lognormal:MEAN,SIGMA,MAX or file:F.
    #[arg(long, default_value = "fixed:64", value_parser = Lengths::parse)]
    lengths: Lengths,
    /// Measured time, behind the warm-up. A trace is measured to its end unless this says otherwise.
    #[arg(long, value_parser = duration)]
    duration: Option<Duration>,
    #[arg(long, default_value = "2s", value_parser = duration)]
    warmup: Duration,
    #[arg(long, value_name = "C")]
    connections: Option<usize>,
    /// Answers within this time count as goodput.
    #[arg(long, value_parser = duration)]
    slo: Option<Duration>,
    /// Time each request has, from its intended moment.
    #[arg(long, value_name = "D", value_parser = duration)]
    deadline: Option<Duration>,
    /// 0 is the highest.
    #[arg(long, value_name = "P", default_value_t = 0)]
    priority: u8,
    #[arg(long, value_name = "T", default_value = "")]
    tenant: String,
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Compares answers with what they must be: all of them, or a share such as --verify=0.1.
    #[arg(long, value_name = "SHARE", num_args = 0..=1, require_equals = true, default_missing_value = "1")]
    verify: Option<f64>,
    /// Prints one JSON document.
    #[arg(long)]
    json: bool,
    /// Writes the latency distribution as HdrHistogram percentile text.
    #[arg(long, value_name = "FILE")]
    hgrm: Option<PathBuf>,
}

pub fn run(args: Args) -> ExitCode {
    let options = match options(&args) {
        Ok(options) => options,
        Err(message) => return wrong_use(&message),
    };
    // Drawn on standard error, and only on a terminal.
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {msg}").expect("the template is valid");
    bar.set_style(style);
    let result = load::run(&options, |progress| {
        bar.set_length(progress.total.as_millis() as u64);
        bar.set_position(progress.elapsed.min(progress.total).as_millis() as u64);
        bar.set_message(format!(
            "{} answered, {} in flight, {} waiting",
            progress.answered, progress.in_flight, progress.backlog
        ));
    });
    bar.finish_and_clear();
    let report = match result {
        Ok(report) => report,
        Err(LoadError::Usage(message)) => return wrong_use(&message),
        Err(error) => return failed(&error.to_string()),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).expect("a report is plain data"));
    } else {
        print!("{}", report.human());
    }
    if let Some(path) = &args.hgrm
        && let Err(error) = std::fs::write(path, report.hgrm())
    {
        return failed(&format!("{}: {error}", path.display()));
    }
    match report.failed() {
        true => failed("answers are wrong, lost or missing: see the report"),
        false => ExitCode::SUCCESS,
    }
}

fn options(args: &Args) -> Result<LoadOptions, String> {
    let mode = match (args.rate, args.concurrency, &args.trace) {
        (Some(rate), _, _) => Mode::Open { rate, arrival: args.arrival },
        (_, Some(callers), _) => Mode::Closed { callers },
        (_, _, Some(path)) => {
            let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
            Mode::Trace(Trace::parse(&text).map_err(|error| format!("{}: {error}", path.display()))?)
        }
        _ => return Err("one of --rate, --concurrency and --trace is needed".into()),
    };
    // All of a trace is measured: cutting a warm-up off it would change what it is.
    let (warmup, duration) = match &mode {
        Mode::Trace(trace) => {
            let last = trace.arrivals.last().map_or(0, |(at, _)| *at);
            (Duration::ZERO, Duration::from_nanos(last + 1).max(Duration::from_millis(1)))
        }
        _ => (args.warmup, Duration::from_secs(10)),
    };
    let connections = args.connections.unwrap_or(match mode {
        Mode::Closed { callers } => CONNECTIONS.min(callers as usize).max(1),
        _ => CONNECTIONS,
    });
    Ok(LoadOptions {
        lengths: args.lengths.clone(),
        duration: args.duration.unwrap_or(duration),
        warmup,
        connections,
        slo: args.slo,
        deadline: args.deadline,
        priority: args.priority,
        tenant: args.tenant.clone(),
        token: super::connection::token(),
        tls: super::connection::tls(),
        seed: args.seed,
        verify: args.verify,
        impatient: args.impatient,
        ..LoadOptions::new(resolve(&args.addr)?, args.model.as_str(), mode)
    })
}

pub(super) fn resolve(addr: &str) -> Result<SocketAddr, String> {
    addr.to_socket_addrs()
        .map_err(|error| format!("--addr {addr}: {error}"))?
        .next()
        .ok_or_else(|| format!("--addr {addr} resolves to nothing"))
}

/// Reads `20ms`, `1.5s`, `500us` or `2m`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("expected a time such as 500us, 20ms, 1.5s or 2m, got {text:?}");
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic() || c == 'µ').ok_or_else(wrong)?;
    let (number, unit) = text.split_at(unit_at);
    let scale = match unit {
        "us" | "µs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(number * scale).map_err(|_| wrong())
}

pub(super) fn failed(message: &str) -> ExitCode {
    eprintln!("ferry: {message}");
    ExitCode::from(1)
}

pub(super) fn wrong_use(message: &str) -> ExitCode {
    eprintln!("ferry: {message}");
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(flags: &str) -> Result<Args, clap::Error> {
        Cli::try_parse_from(format!("load --addr 127.0.0.1:1 --model m {flags}").split_whitespace()).map(|cli| cli.args)
    }

    #[test]
    fn exactly_one_mode_is_needed() {
        assert!(parse("").is_err());
        assert!(parse("--rate 5 --concurrency 5").is_err());
        assert!(parse("--concurrency 5 --arrival burst").is_err(), "a shape belongs to a rate");
        assert_eq!(
            options(&parse("--rate 5 --arrival burst").expect("valid")).expect("valid").mode,
            Mode::Open { rate: 5.0, arrival: Arrival::Burst }
        );
        let closed = options(&parse("--concurrency 2").expect("valid")).expect("valid");
        assert_eq!((closed.mode, closed.connections), (Mode::Closed { callers: 2 }, 2));
    }

    #[test]
    fn verify_stands_alone_or_with_a_share() {
        assert_eq!(parse("--rate 1").expect("valid").verify, None);
        assert_eq!(parse("--rate 1 --verify --json").expect("valid").verify, Some(1.0));
        assert_eq!(parse("--rate 1 --verify=0.25").expect("valid").verify, Some(0.25));
    }

    #[test]
    fn times_have_units() {
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("500us"), Ok(Duration::from_micros(500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "5", "s", "5x", "-1s", "1e40s"] {
            assert!(duration(wrong).is_err(), "{wrong:?}");
        }
    }
}
