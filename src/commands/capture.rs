//! `ferry capture`: records what a server's scheduler is told into a file, for `ferry replay`.
//!
//! Always true
//! - FILE is a whole trace when it is there: what is being received has another name until its last chunk came.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use ferry::capture::{CaptureEnd, SECONDS_MAX, TraceReader};

use super::load::{failed, resolve, wrong_use};

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The server's control address.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7601")]
    control: String,
    /// Length of the capture.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    seconds: u64,
    /// Where the trace goes.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Longest wait for the server's next bytes: it sends some each second.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Longest head of an answer.
const HEAD_MAX: usize = 16 * 1024;

pub fn run(args: Args) -> ExitCode {
    let control = match resolve(&args.control) {
        Ok(control) => control,
        Err(message) => return wrong_use(&message.replace("--addr", "--control")),
    };
    let mut part = args.output.clone().into_os_string();
    part.push(".part");
    let part = PathBuf::from(part);
    let outcome = receive(control, args.seconds, &part).and_then(|()| summary(&part));
    match outcome {
        Ok((text, end)) => match std::fs::rename(&part, &args.output) {
            Ok(()) => {
                println!("{}: {text}", args.output.display());
                match end {
                    CaptureEnd::Complete | CaptureEnd::Stopped => ExitCode::SUCCESS,
                    _ => ExitCode::from(super::EXIT_FAILED),
                }
            }
            Err(error) => failed(&format!("{}: {error}", args.output.display())),
        },
        Err(message) => {
            let _ = std::fs::remove_file(&part);
            failed(&message)
        }
    }
}

/// Streams a capture into a file.
fn receive(control: SocketAddr, seconds: u64, part: &Path) -> Result<(), String> {
    let file = File::create(part).map_err(|error| format!("{}: {error}", part.display()))?;
    let ask = || -> io::Result<Result<BufReader<TcpStream>, String>> {
        let mut stream = TcpStream::connect_timeout(&control, SILENCE_MAX)?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        // HTTP/1.0: the answer is what comes until the connection ends.
        write!(stream, "GET /v1/capture?seconds={seconds} HTTP/1.0\r\nHost: {control}\r\n\r\n")?;
        let mut answer = BufReader::new(stream);
        let head = head(&mut answer)?;
        if head.split(' ').nth(1) == Some("200") {
            return Ok(Ok(answer));
        }
        let mut body = String::new();
        answer.take(HEAD_MAX as u64).read_to_string(&mut body)?;
        let json = serde_json::from_str::<serde_json::Value>(&body);
        let sentence = json.ok().and_then(|json| Some(json["error"].as_str()?.to_owned()));
        Ok(Err(sentence.unwrap_or_else(|| body.trim().to_owned())))
    };
    let mut answer = match ask() {
        Ok(Ok(answer)) => answer,
        Ok(Err(refusal)) => return Err(format!("the server at {control} refused: {refusal}")),
        Err(error) => return Err(format!("cannot ask {control}: {error}")),
    };
    let mut file = BufWriter::new(file);
    io::copy(&mut answer, &mut file)
        .and_then(|_| file.flush())
        .map_err(|error| format!("the capture from {control} broke off: {error}"))
}

/// The head of an answer, as text.
fn head(answer: &mut impl Read) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if head.len() == HEAD_MAX || answer.read(&mut byte)? == 0 {
            return Err(io::Error::new(ErrorKind::InvalidData, "no HTTP answer"));
        }
        head.extend(byte);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Reads the trace whole: what is in it, and why it ended.
fn summary(part: &Path) -> Result<(String, CaptureEnd), String> {
    let read = || {
        let file = File::open(part).map_err(|error| ferry::capture::TraceError::Io(error.to_string()))?;
        let mut reader = TraceReader::open(BufReader::new(file))?;
        while reader.next_event()?.is_some() {}
        Ok::<_, ferry::capture::TraceError>(reader)
    };
    let reader = read().map_err(|error| error.to_string())?;
    let end = reader.end().expect("it was read to its end");
    let why = match end {
        CaptureEnd::Complete => "complete",
        CaptureEnd::Stopped => "cut short: the server ended",
        CaptureEnd::ReaderSlow => "cut short: this end was too slow for the server",
        CaptureEnd::ReaderGone => "cut short: another capture took its place",
        CaptureEnd::TooLarge => "empty: the scheduler's state is too large for a trace",
    };
    let requests = reader.arrivals();
    let mean = (reader.bytes() - reader.state().len() as u64) as f64 / requests.max(1) as f64;
    Ok((format!("{requests} requests in {} bytes ({mean:.1} each beside the start); {why}", reader.bytes()), end))
}
