//! The log: structured lines on standard error, as text or JSON.
//!
//! Always true
//! - One event is one line: control characters of any field or message are escaped, so no caller can write a line
//!   of its own or colour a terminal.
//! - A line is at most [`LINE_BYTES_MAX`] long.
//! - The log is for starts, stops and faults. A refusal is an ordinary answer and is counted, not logged.
//! - Nobody who logs waits for who reads: a thread of its own writes (handover.rs). What it has no room for is dropped, counted,
//!   and said in the log.
//! - A panic is an event of the log, whatever the filter.

mod handover;

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::PanicHookInfo;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use tracing::Dispatch;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use handover::Handover;
pub use handover::{BYTES_MAX, LINES_MAX};

/// Longest line; the rest of a longer one is cut.
pub const LINE_BYTES_MAX: usize = 8192;

/// The thread that writes.
const THREAD: &str = "ferry-log";
/// How long the end of the process waits for one line to be written, and for all of them.
const PATIENCE: Duration = Duration::from_secs(1);
const PATIENCE_MAX: Duration = Duration::from_secs(5);
/// How long a panic waits for its line, in case the process ends by it.
const PANIC_PATIENCE: Duration = Duration::from_millis(100);

/// The log of the process, once it is set up.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    handover: Arc<Handover>,
    lines: Lines,
}

/// Why there is no log.
#[derive(Debug)]
pub enum InitError {
    /// The filter is none.
    Filter(String),
    /// The machine or the process does not allow it.
    Failed(String),
}

impl std::fmt::Display for InitError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            InitError::Filter(message) => f.write_str(message),
            InitError::Failed(message) => write!(f, "no log: {message}"),
        }
    }
}

/// Held while the process has something to say: dropped at the end of it, it waits for what is not written yet.
#[must_use]
#[derive(Debug)]
pub struct Guard(());

impl Drop for Guard {
    fn drop(&mut self) {
        flush();
    }
}

/// Sets up the log of the process. `filter` is a level or directives; the environment's `RUST_LOG` comes before it.
/// Fails where a log is already set up or the filter is not one.
pub fn init(json: bool, filter: &str) -> Result<Guard, InitError> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(from_environment) if !from_environment.is_empty() => from_environment,
        _ => filter.to_owned(),
    };
    let failed = |error: &dyn std::fmt::Display| InitError::Failed(error.to_string());
    if LOG.get().is_some() {
        return Err(failed(&"there is one"));
    }
    let handover = Arc::new(Handover::default());
    let sink = Sink(handover.clone());
    let subscriber = subscriber(json, &filter, move || sink.clone()).map_err(InitError::Filter)?;
    let lines = Lines::new(json);
    // Not through `io::stderr`, whose lock a blocked write would hold from everybody.
    let to = io::stderr().as_fd().try_clone_to_owned().map_err(|error| failed(&error))?;
    let (from, notices) = (handover.clone(), lines.clone());
    let write = move || {
        from.write_to(Blocking(File::from(to)), |lost| notices.of(|| missing(lost)));
    };
    std::thread::Builder::new().name(THREAD.into()).spawn(write).map_err(|error| failed(&error))?;
    // Only now: what is handed in is written.
    LOG.set(Log { handover, lines }).map_err(|_| failed(&"there is one"))?;
    tracing::subscriber::set_global_default(subscriber).map_err(|error| failed(&error))?;
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| log_panic(panic, &report)));
    Ok(Guard(()))
}

/// Prints what is for people and no event, in its place among the lines of the log. Like them it is never waited for.
pub fn say(text: impl Into<String>) {
    let text = text.into();
    match LOG.get() {
        Some(log) => log.handover.push(text.into_bytes()),
        // Who does not read this does not end the process.
        None => drop(io::stderr().write_all(text.as_bytes())),
    }
}

/// Waits until all is written, for as long as somebody reads. For whoever ends the process.
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.handover.flush(PATIENCE, PATIENCE_MAX);
    }
}

/// Lines that were dropped, and why: there was no room for them, or they could not be written.
pub fn dropped() -> [(&'static str, u64); 2] {
    let log = LOG.get();
    let count = |of: fn(&Handover) -> u64| log.map_or(0, |log| of(&log.handover));
    [("full", count(Handover::dropped)), ("failed", count(Handover::failed))]
}

/// The event in the place of lines that are missing.
fn missing(lines: u64) {
    tracing::warn!(lines, "lines of the log are missing here: there was no room for them");
}

/// A panic is told by the log, and not past it: a thread that panics would wait for who reads.
fn log_panic(panic: &PanicHookInfo<'_>, report: &(dyn Fn(&PanicHookInfo<'_>) + Send + Sync)) {
    let thread = std::thread::current();
    let log = match LOG.get() {
        Some(log) if thread.name() != Some(THREAD) => log,
        _ => return report(panic),
    };
    let name = thread.name().unwrap_or("?");
    let message = panic.payload_as_str().unwrap_or("?");
    let at = panic.location().map(ToString::to_string).unwrap_or_default();
    let backtrace = std::backtrace::Backtrace::capture();
    let line = log.lines.of(|| match backtrace.status() {
        std::backtrace::BacktraceStatus::Captured => {
            tracing::error!(thread = name, at, panic = message, %backtrace, "a thread panicked");
        }
        _ => tracing::error!(thread = name, at, panic = message, "a thread panicked"),
    });
    log.handover.push(line);
    // The process may be about to end, and the line would be lost.
    log.handover.flush_unless_stuck(PANIC_PATIENCE);
}

/// A file that is waited for, also where who shares it has made it one that is not.
struct Blocking(File);

impl Write for Blocking {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    nix::poll::poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE)?;
                }
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands over what it is given. One event arrives as one buffer.
#[derive(Clone)]
struct Sink(Arc<Handover>);

impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes lines as the log has them, whatever its filter, of warnings and errors.
#[derive(Clone)]
struct Lines(Dispatch);

impl Lines {
    fn new(json: bool) -> Lines {
        // No wider than it is used: what some subscriber may want costs all who log a question.
        Lines(Dispatch::new(subscriber(json, "warn", || Made).expect("warn is a level")))
    }

    /// The lines of what `event` logs.
    fn of(&self, event: impl FnOnce()) -> Vec<u8> {
        tracing::dispatcher::with_default(&self.0, event);
        MADE.take()
    }
}

thread_local! {
    /// Lines that this thread has made and not taken yet.
    static MADE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

struct Made;

impl Write for Made {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        MADE.with_borrow_mut(|made| made.extend_from_slice(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn subscriber<W>(json: bool, filter: &str, writer: W) -> Result<Box<dyn tracing::Subscriber + Send + Sync>, String>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("log filter {filter:?}: {error}"))?;
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(Escaped { to: writer });
    Ok(if json { Box::new(builder.json().finish()) } else { Box::new(builder.finish()) })
}

/// Gives writers whose lines are escaped.
struct Escaped<W> {
    to: W,
}

impl<'w, W: MakeWriter<'w>> MakeWriter<'w> for Escaped<W> {
    type Writer = EscapedWriter<W::Writer>;

    fn make_writer(&'w self) -> Self::Writer {
        EscapedWriter { to: self.to.make_writer() }
    }
}

/// One event arrives as one buffer that ends with a line feed.
struct EscapedWriter<W> {
    to: W,
}

impl<W: Write> Write for EscapedWriter<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.to.write_all(&escape_line(buffer))?;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// The line with its control characters escaped, cut to its longest, with the one line feed that ends it.
fn escape_line(line: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(line));
    let mut escaped = String::with_capacity(text.len() + 1);
    for character in text.chars() {
        // Also the separators and direction marks that terminals and viewers act on.
        let acts = character.is_control()
            || matches!(character, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if acts {
            escaped.extend(character.escape_unicode());
        } else {
            escaped.push(character);
        }
        if escaped.len() > LINE_BYTES_MAX {
            let mut end = LINE_BYTES_MAX - 4;
            while !escaped.is_char_boundary(end) {
                end -= 1;
            }
            escaped.truncate(end);
            escaped.push('…');
            break;
        }
    }
    escaped.push('\n');
    escaped.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(json: bool, event: impl FnOnce()) -> String {
        let subscriber = subscriber(json, "info", || Made).expect("info is a level");
        tracing::subscriber::with_default(subscriber, event);
        String::from_utf8(MADE.take()).expect("lines are UTF-8")
    }

    #[test]
    fn a_field_cannot_start_a_line_of_its_own() {
        for json in [false, true] {
            let text = logged(json, || {
                let name = "echo\n2026-01-01 INFO all is well\r\u{1b}[31m";
                tracing::info!(model = %name, "refused {name}");
            });
            assert_eq!(text.matches('\n').count(), 1, "{text}");
            assert!(text.ends_with('\n'));
            assert!(!text.trim_end().chars().any(char::is_control), "{text:?}");
        }
    }

    #[test]
    fn a_json_line_is_json_even_with_control_characters() {
        let text = logged(true, || tracing::info!(name = "a\u{7}b\nc", "hello"));
        let value: serde_json::Value = serde_json::from_str(&text).expect("one JSON document per line");
        assert_eq!(value["fields"]["message"], "hello");
        assert_eq!(value["fields"]["name"], "a\u{7}b\nc");
    }

    #[test]
    fn a_line_is_never_longer_than_allowed() {
        let text = logged(false, || tracing::info!("{}", "é".repeat(LINE_BYTES_MAX)));
        assert!(text.len() <= LINE_BYTES_MAX + 1, "{}", text.len());
        assert!(text.ends_with("…\n"));
    }

    #[test]
    fn what_is_below_the_level_is_not_written() {
        assert_eq!(logged(false, || tracing::debug!("quiet")), "");
    }

    #[test]
    fn what_says_that_lines_are_missing_is_a_line_like_any_other() {
        let text = String::from_utf8(Lines::new(true).of(|| missing(7))).expect("lines are UTF-8");
        let value: serde_json::Value = serde_json::from_str(&text).expect("one JSON document");
        assert_eq!((&value["level"], &value["fields"]["lines"]), (&"WARN".into(), &7.into()));
        let text = String::from_utf8(Lines::new(false).of(|| missing(7))).expect("lines are UTF-8");
        assert!(text.contains("WARN") && text.ends_with("lines=7\n"), "{text}");
    }

    #[test]
    fn a_filter_that_is_none_is_refused() {
        assert!(subscriber(false, "ferry=loud", io::stderr).is_err());
    }
}
