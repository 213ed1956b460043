//! No shard ever stands still: the real binary, stopped and continued at random, beside programs that take all cores.
//!
//! As a test it runs for a few seconds and asserts that everything is answered. `LIVENESS_SECONDS=600 cargo test --release
//! --test liveness -- --nocapture` is the long run: it also asserts that no answer is late, and prints its report.
//!
//! Lateness is the time from sending to receiving, less the time for which the server was stopped between. When its
//! batch ended cannot be seen from outside, so the load is kept light enough that queueing is far below the bound.

mod common;

use std::process::{Child as Process, Command};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::process::Child;
use common::{Ask, Numbers, Raw, wait_until};
use ferry::clock;
use ferry::vocab::{ModelHandle, Moment};
use nix::sys::signal::Signal;

const CONNECTIONS: u64 = 64;
const DEPTH: usize = 32;
/// Of the connections, those that always have [`DEPTH`] requests under way; the others send bursts of that many.
const BUSY: u64 = 4;
const LATE_MAX: Duration = Duration::from_millis(250);

/// When the server was stopped, oldest first. The end of the last one is [`Moment::FAR`] while it lasts.
#[derive(Default)]
struct Stops(Mutex<Vec<(Moment, Moment)>>);

impl Stops {
    fn begin(&self) {
        self.0.lock().expect("not poisoned").push((clock::now(), Moment::FAR));
    }

    fn end(&self) {
        self.0.lock().expect("not poisoned").last_mut().expect("one has begun").1 = clock::now();
    }

    fn count(&self) -> usize {
        self.0.lock().expect("not poisoned").len()
    }

    /// How much of the time between two moments the server was stopped.
    fn within(&self, from: Moment, to: Moment) -> Duration {
        let stops = self.0.lock().expect("not poisoned");
        stops
            .iter()
            .rev()
            .take_while(|(_, end)| *end > from)
            .map(|(start, end)| to.min(*end).since(from.max(*start)))
            .sum()
    }
}

/// Programs that never rest, one per core.
struct Hogs(Vec<Process>);

impl Hogs {
    fn start() -> Hogs {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Hogs(
            (0..cores)
                .map(|_| Command::new("sh").args(["-c", "while :; do :; done"]).spawn().expect("a shell"))
                .collect(),
        )
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        for hog in &mut self.0 {
            let _ = hog.kill();
            let _ = hog.wait();
        }
    }
}

#[derive(Default)]
struct Seen {
    answers: AtomicU64,
    worst_nanos: AtomicU64,
    /// Answers later than 10, 50, 100 and 250 ms.
    later: [AtomicU64; 4],
}

const STEPS: [u64; 4] = [10, 50, 100, 250];

impl Seen {
    fn answer(&self, lateness: Duration) {
        self.answers.fetch_add(1, Ordering::Relaxed);
        self.worst_nanos.fetch_max(lateness.as_nanos() as u64, Ordering::Relaxed);
        for (step, count) in STEPS.iter().zip(&self.later) {
            count.fetch_add(u64::from(lateness > Duration::from_millis(*step)), Ordering::Relaxed);
        }
    }
}

/// One connection's work until `over`: all that is sent is answered, with its own bytes.
fn client(mut raw: Raw, echo: ModelHandle, index: u64, over: &AtomicBool, stops: &Stops, seen: &Seen) {
    let mut numbers = Numbers(index);
    let mut sent_at: std::collections::HashMap<u64, (Moment, Vec<u8>)> = Default::default();
    loop {
        let more = !over.load(Ordering::Relaxed);
        if more && (index < BUSY || sent_at.is_empty()) {
            let mut bytes = Vec::new();
            let now = clock::now();
            while sent_at.len() < DEPTH {
                let value = numbers.below(1 << 24) as f32;
                let ask = Ask::floats(echo, &vec![value; 1 + numbers.below(32) as usize]);
                let id = raw.take_id();
                bytes.extend(ask.frame(id));
                sent_at.insert(id, (now, ask.payload));
            }
            raw.send(&bytes);
        }
        if sent_at.is_empty() {
            return;
        }
        let event = raw.recv();
        let now = clock::now();
        let (at, payload) =
            event.ends().and_then(|id| sent_at.remove(&id)).expect("an answer to something asked, once");
        assert!(event.expect_result().1 == payload, "the answer has its own bytes");
        seen.answer(now.since(at).saturating_sub(stops.within(at, now)));
        if index >= BUSY && sent_at.is_empty() && more {
            std::thread::sleep(Duration::from_millis(100 + numbers.below(200)));
        }
    }
}

#[test]
fn every_request_is_answered_however_the_server_is_stopped_and_starved() {
    let long =
        std::env::var("LIVENESS_SECONDS").ok().map(|text| text.parse::<u64>().expect("LIVENESS_SECONDS is a number"));
    let mut child = Child::start(&["threads.shards=2"]);
    let echo = child.connect().handle("echo");
    let _hogs = Hogs::start();
    let (over, stops, seen) = (AtomicBool::new(false), Stops::default(), Seen::default());
    let start = clock::now();
    std::thread::scope(|scope| {
        for index in 0..CONNECTIONS {
            let (raw, over, stops, seen) = (child.connect(), &over, &stops, &seen);
            scope.spawn(move || client(raw, echo, index, over, stops, seen));
        }
        let mut numbers = Numbers(1);
        while clock::now().since(start) < Duration::from_secs(long.unwrap_or(5)) {
            std::thread::sleep(Duration::from_micros(numbers.below(200_000)));
            stops.begin();
            child.signal(Signal::SIGSTOP);
            // Mostly blinks, which hit a thread in the middle of something; sometimes a pause that everybody notices.
            let micros = if numbers.below(4) == 0 { numbers.below(300_000) } else { numbers.below(2_000) };
            std::thread::sleep(Duration::from_micros(micros));
            child.signal(Signal::SIGCONT);
            stops.end();
            let before = seen.answers.load(Ordering::Relaxed);
            wait_until("answers come again", || seen.answers.load(Ordering::Relaxed) > before);
        }
        over.store(true, Ordering::Relaxed);
    });
    let page = child.metrics();
    let stalls = common::metric(&page, "ferry_shard_stalls_total", &[]);
    let answers = seen.answers.load(Ordering::Relaxed);
    let worst = Duration::from_nanos(seen.worst_nanos.load(Ordering::Relaxed));
    assert_eq!(common::metric(&page, "ferry_requests_finished_total", &["code=\"ok\""]) as u64, answers);
    assert_eq!(common::metric(&page, "ferry_requests_in_flight", &[]), 0.0);
    let later: Vec<String> = STEPS
        .iter()
        .zip(&seen.later)
        .map(|(step, count)| format!("{} over {step} ms", count.load(Ordering::Relaxed)))
        .collect();
    println!(
        "liveness: {:.1} minutes, {CONNECTIONS} connections of depth {DEPTH}, {answers} answers, {} stops; worst lateness \
         {worst:?} ({}); {stalls} stalls",
        clock::now().since(start).as_secs_f64() / 60.0,
        stops.count(),
        later.join(", "),
    );
    if long.is_some() {
        assert!(worst <= LATE_MAX, "an answer was {worst:?} late");
    }
    child.signal(Signal::SIGTERM);
    assert_eq!(child.status(), Some(0));
}
