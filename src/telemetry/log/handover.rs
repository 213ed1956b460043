//! Hands lines to the one thread that writes them, so that whoever logs never waits for whoever reads the log.
//!
//! Always true
//! - At most [`LINES_MAX`] lines of together [`BYTES_MAX`] wait. A line that does not fit is dropped and counted.
//! - The lock is held to put a line in or to take one out, never while one is written.
//! - Lines are written in the order in which they came, and where some are missing a line in their place says how many.
//! - A line that could not be written, on a full disk say, is counted like one that was dropped, and nothing panics.
//!
//! Not tracing-appender: it prints on standard output when it cannot be told to end, which a log that is blocked makes so; it is
//! bounded in lines only, counts no failed write, and says in no line that some are missing.
//!
//! Elsewhere: what is in a line, and how it is escaped (mod.rs).

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock;

/// Lines that wait to be written.
pub const LINES_MAX: usize = 4096;
/// Memory of those lines.
pub const BYTES_MAX: usize = 1 << 20;

/// What the writer is to do next.
#[derive(Debug, PartialEq, Eq)]
enum Due {
    Line(Vec<u8>),
    /// Say that so many lines are missing here.
    Lost(u64),
}

#[derive(Debug)]
struct Waiting {
    line: Vec<u8>,
    /// Lines that were dropped since the one before it.
    lost_before: u64,
}

/// Lines that wait. Pure.
#[derive(Debug, Default)]
struct Backlog {
    lines: VecDeque<Waiting>,
    bytes: usize,
    /// Dropped since the last line that found room.
    lost: u64,
}

impl Backlog {
    /// False when there is no room: the line is dropped.
    fn push(&mut self, line: Vec<u8>) -> bool {
        let bytes = self.bytes + line.capacity();
        let fits = self.lines.len() < LINES_MAX && bytes <= BYTES_MAX;
        if fits {
            self.bytes = bytes;
            self.lines.push_back(Waiting { line, lost_before: std::mem::take(&mut self.lost) });
        } else {
            self.lost += 1;
        }
        fits
    }

    fn pop(&mut self) -> Option<Due> {
        let Some(first) = self.lines.front_mut() else {
            return Some(std::mem::take(&mut self.lost)).filter(|lost| *lost > 0).map(Due::Lost);
        };
        if first.lost_before > 0 {
            return Some(Due::Lost(std::mem::take(&mut first.lost_before)));
        }
        let Waiting { line, .. } = self.lines.pop_front().expect("it was just looked at");
        self.bytes -= line.capacity();
        Some(Due::Line(line))
    }

    fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.lost == 0
    }
}

#[derive(Debug, Default)]
struct State {
    backlog: Backlog,
    /// The writer has taken something and is not done with it.
    writing: bool,
    /// Raised whenever the writer is done with something.
    turns: u64,
    /// Somebody waited for the writer in vain, and it has not moved since.
    stuck: bool,
    closed: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.backlog.is_empty() && !self.writing
    }
}

/// Where lines are handed over. Any number of threads hand in, one writes.
#[derive(Debug, Default)]
pub struct Handover {
    state: Mutex<State>,
    arrived: Condvar,
    moved: Condvar,
    dropped: AtomicU64,
    failed: AtomicU64,
}

impl Handover {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a line in. Never waits for the writer.
    pub fn push(&self, line: Vec<u8>) {
        let fits = self.lock().backlog.push(line);
        if fits {
            self.arrived.notify_one();
        } else {
            self.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Lines that found no room.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    /// Lines that could not be written.
    pub fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// Waits until all is written, for as long as the writer gets on: `patience` is for one line. False when it does not.
    pub fn flush(&self, patience: Duration, at_most: Duration) -> bool {
        let until = clock::now() + at_most;
        let mut state = self.lock();
        while !state.is_idle() {
            let seen = state.turns;
            let wait = patience.min(until.since(clock::now()));
            let waits = |state: &mut State| state.turns == seen && !state.is_idle();
            let (now, timeout) =
                self.moved.wait_timeout_while(state, wait, waits).unwrap_or_else(PoisonError::into_inner);
            state = now;
            if timeout.timed_out() {
                state.stuck = true;
                return false;
            }
        }
        true
    }

    /// The same, but at once false where waiting was in vain before and nothing has moved since.
    pub fn flush_unless_stuck(&self, at_most: Duration) -> bool {
        !self.lock().stuck && self.flush(at_most, at_most)
    }

    /// Writes what comes, until closed. `notice` makes the line that says how many are missing.
    pub fn write_to(&self, to: impl Write, notice: impl Fn(u64) -> Vec<u8>) {
        let mut output = Output { to, torn: false };
        // Since the last line that was written.
        let mut missing = 0;
        while let Some(due) = self.next() {
            let line = match due {
                Due::Line(line) => Some(line),
                Due::Lost(lost) => {
                    missing += lost;
                    None
                }
            };
            if missing > 0 && output.write(&notice(missing)) {
                missing = 0;
            }
            // While it cannot be said that lines are missing, none is written.
            if let Some(line) = line
                && !(missing == 0 && output.write(&line))
            {
                missing += 1;
                self.failed.fetch_add(1, Relaxed);
            }
        }
    }

    /// Tells that the last is done, and waits for the next.
    fn next(&self) -> Option<Due> {
        let mut state = self.lock();
        (state.writing, state.stuck) = (false, false);
        state.turns += 1;
        self.moved.notify_all();
        loop {
            if let Some(due) = state.backlog.pop() {
                state.writing = true;
                return Some(due);
            }
            if state.closed {
                return None;
            }
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The writer ends when it has written what is there.
    #[cfg(test)]
    fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
    }
}

/// Writes whole lines.
struct Output<W> {
    to: W,
    /// The last line ended early: the next begins with the end of that one.
    torn: bool,
}

impl<W: Write> Output<W> {
    /// False when not all of the line could be written.
    fn write(&mut self, line: &[u8]) -> bool {
        if self.torn && !self.write_part(b"\n") {
            return false;
        }
        self.torn = false;
        self.write_part(line)
    }

    fn write_part(&mut self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.to.write(rest) {
                Ok(written) if written > 0 => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    self.torn |= rest.len() < bytes.len();
                    return false;
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn line(text: &str) -> Vec<u8> {
        let mut line = text.as_bytes().to_vec();
        line.push(b'\n');
        line
    }

    fn notice(lost: u64) -> Vec<u8> {
        line(&format!("{lost} lost"))
    }

    fn all(backlog: &mut Backlog) -> Vec<Due> {
        std::iter::from_fn(|| backlog.pop()).collect()
    }

    #[test]
    fn what_finds_no_room_is_missing_where_it_would_have_stood() {
        let mut backlog = Backlog::default();
        assert_eq!(backlog.pop(), None);
        for number in 0..LINES_MAX {
            assert!(backlog.push(vec![number as u8]));
        }
        assert!(!backlog.push(line("a")) && !backlog.push(line("b")));
        assert_eq!(backlog.pop(), Some(Due::Line(vec![0])));
        assert!(backlog.push(line("c")) && !backlog.push(line("d")));
        let rest = all(&mut backlog);
        let expected = (1..LINES_MAX).map(|number| Due::Line(vec![number as u8]));
        let expected = expected.chain([Due::Lost(2), Due::Line(line("c")), Due::Lost(1)]);
        assert_eq!(rest, expected.collect::<Vec<_>>());
        assert!(backlog.is_empty());
    }

    #[test]
    fn few_long_lines_are_bounded_by_their_memory() {
        let mut backlog = Backlog::default();
        let long: Vec<u8> = Vec::with_capacity(BYTES_MAX / 4 + 1);
        assert_eq!((0..4).filter(|_| backlog.push(Vec::with_capacity(long.capacity()))).count(), 3);
        assert!(backlog.push(line("short")), "a short one finds room where a long one does not");
        assert_eq!(all(&mut backlog).len(), 5);
        assert_eq!(backlog.bytes, 0);
    }

    /// Takes bytes as it is told to: a number is how many it takes, an error is given back.
    struct Scripted {
        script: VecDeque<Result<usize, io::ErrorKind>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Scripted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let most = self.script.pop_front().unwrap_or(Ok(usize::MAX))?;
            let count = most.min(bytes.len());
            self.written.lock().expect("no test panics while it holds this").extend_from_slice(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What comes of these lines, and how many of them failed.
    fn written(lines: &[&str], script: impl IntoIterator<Item = Result<usize, io::ErrorKind>>) -> (String, u64) {
        let handover = Handover::default();
        lines.iter().for_each(|text| handover.push(line(text)));
        handover.close();
        let written = Arc::new(Mutex::new(Vec::new()));
        handover.write_to(Scripted { script: script.into_iter().collect(), written: written.clone() }, notice);
        let bytes = written.lock().expect("no test panics while it holds this").clone();
        (String::from_utf8(bytes).expect("lines are text"), handover.failed())
    }

    #[test]
    fn a_full_disk_costs_lines_and_the_next_that_is_written_says_how_many() {
        let full = Err(io::ErrorKind::StorageFull);
        assert_eq!(written(&["a", "b"], []), ("a\nb\n".into(), 0));
        assert_eq!(written(&["a", "b", "c"], [full]), ("1 lost\nb\nc\n".into(), 1));
        // The second is not tried where it cannot be said that the first is missing.
        assert_eq!(written(&["a", "b", "c"], [full, full]), ("2 lost\nc\n".into(), 2));
        // What is missing when the last line was tried is told nobody.
        assert_eq!(written(&["a", "b"], [Ok(9), full]), ("a\n".into(), 1));
        // Takes nothing and says that it went well: nothing is tried for ever.
        assert_eq!(written(&["a", "b"], [Ok(0)]), ("1 lost\nb\n".into(), 1));
    }

    #[test]
    fn a_line_that_was_cut_short_is_ended_before_the_next() {
        let full = Err(io::ErrorKind::StorageFull);
        assert_eq!(written(&["abc", "def"], [Ok(2), full]), ("ab\n1 lost\ndef\n".into(), 1));
        // Also where the next attempts fail as well.
        assert_eq!(written(&["abc", "def", "g"], [Ok(2), full, full]), ("ab\n2 lost\ng\n".into(), 2));
        // Pieces, and calls that a signal came into, make a line all the same.
        let interrupted = Err(io::ErrorKind::Interrupted);
        assert_eq!(written(&["abc"], [Ok(1), interrupted, Ok(1)]), ("abc\n".into(), 0));
    }

    /// Takes a piece for each leave that it is given.
    struct Blocked {
        leave: Receiver<()>,
        tried: Sender<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Blocked {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.tried.send(());
            let _ = self.leave.recv(); // nobody there to block it: free
            self.written.lock().expect("no test panics while it holds this").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn who_hands_lines_in_goes_on_while_the_writer_is_blocked_and_nothing_is_lost_unsaid() {
        let handover = Arc::new(Handover::default());
        let ((allow, leave), (tried, trying)) = (channel(), channel());
        let written = Arc::new(Mutex::new(Vec::new()));
        let to = Blocked { leave, tried, written: written.clone() };
        let writer = std::thread::spawn({
            let handover = handover.clone();
            move || handover.write_to(to, notice)
        });
        handover.push(line("first"));
        trying.recv().expect("the writer tries it");
        // This thread goes on: it hands in more than there is room for.
        (0..LINES_MAX + 10).for_each(|number| handover.push(line(&number.to_string())));
        assert_eq!(handover.dropped(), 10);
        assert!(!handover.flush_unless_stuck(Duration::from_millis(1)), "nothing moves");
        assert!(!handover.flush_unless_stuck(1000 * SECOND), "and is not waited for again");
        drop(allow);
        assert!(handover.flush(60 * SECOND, 60 * SECOND), "it goes on");
        assert!(handover.flush_unless_stuck(SECOND), "and is waited for again");
        handover.push(line("last"));
        handover.close();
        writer.join().expect("the writer does not panic");
        let text = String::from_utf8(written.lock().expect("nobody panicked").clone()).expect("lines are text");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 1 + LINES_MAX + 2);
        assert_eq!((lines[0], lines[1], lines[LINES_MAX]), ("first", "0", &*(LINES_MAX - 1).to_string()));
        assert_eq!(lines[LINES_MAX + 1..], ["10 lost", "last"]);
    }
}
