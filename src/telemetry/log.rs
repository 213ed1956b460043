//! The log: structured lines on standard error, as text or JSON.
//!
//! Always true
//! - One event is one line: control characters of any field or message are escaped, so no caller can write a line
//!   of its own or colour a terminal.
//! - A line is at most [`LINE_BYTES_MAX`] long.
//! - The log is for starts, stops and faults. A refusal is an ordinary answer and is counted, not logged.

use std::io::{self, Write};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Longest line; the rest of a longer one is cut.
pub const LINE_BYTES_MAX: usize = 8192;

/// Sets up the log of the process. `filter` is a level or directives; the environment's `RUST_LOG` comes before it.
/// Fails where a log is already set up or the filter is not one.
pub fn init(json: bool, filter: &str) -> Result<(), String> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(from_environment) if !from_environment.is_empty() => from_environment,
        _ => filter.to_owned(),
    };
    let subscriber = subscriber(json, &filter, io::stderr)?;
    tracing::subscriber::set_global_default(subscriber).map_err(|error| error.to_string())
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
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no test panics while it holds this").extend_from_slice(buffer);
            Ok(buffer.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(json: bool, event: impl FnOnce()) -> String {
        let captured = Captured::default();
        let to = captured.clone();
        let subscriber = subscriber(json, "info", move || to.clone()).expect("info is a level");
        tracing::subscriber::with_default(subscriber, event);
        let bytes = captured.0.lock().expect("no test panics while it holds this").clone();
        String::from_utf8(bytes).expect("lines are UTF-8")
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
    fn a_filter_that_is_none_is_refused() {
        assert!(subscriber(false, "ferry=loud", io::stderr).is_err());
    }
}
