//! Whether something grows: a straight line through samples, and how sure one may be of its slope (T13, F84, F86, C1).
//!
//! Always true
//! - A verdict is about the upper end of the slope's 95 % interval: noise makes it wider, so a run that is too short to tell
//!   does not pass for sound.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::caller::{Ledger, Manner, call_through, log_of, models, rounds};
use crate::common::process::Child;
use crate::common::{Ask, Numbers, bare_frame, metric, wait_until};
use crate::history::Rules;
use crate::proxy::{Mix, Proxy};

/// A straight line through points, by least squares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slope {
    pub slope: f64,
    /// Between these it lies with 95 % certainty, if the points' errors are independent.
    pub low: f64,
    pub high: f64,
}

/// The 97.5 % point of Student's distribution, within 1 % from 3 degrees of freedom up (Cornish and Fisher's expansion).
fn student(freedom: f64) -> f64 {
    let z = 1.959_964f64;
    let terms = [
        (z.powi(3) + z) / 4.0,
        (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0,
        (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0,
    ];
    z + terms[0] / freedom + terms[1] / freedom.powi(2) + terms[2] / freedom.powi(3)
}

/// `None` for fewer than five points, or where all are at one place.
pub fn slope(points: &[(f64, f64)]) -> Option<Slope> {
    let n = points.len() as f64;
    if points.len() < 5 {
        return None;
    }
    let mean_x = points.iter().map(|(x, _)| x).sum::<f64>() / n;
    let mean_y = points.iter().map(|(_, y)| y).sum::<f64>() / n;
    let spread = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum::<f64>();
    if spread == 0.0 {
        return None;
    }
    let slope = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>() / spread;
    let rest: f64 = points.iter().map(|(x, y)| (y - mean_y - slope * (x - mean_x)).powi(2)).sum();
    let error = (rest / (n - 2.0) / spread).sqrt();
    let margin = student(n - 2.0) * error;
    Some(Slope { slope, low: slope - margin, high: slope + margin })
}

/// Points behind the warm-up, each the mean of a group of neighbours: what follows a sample closely depends on it.
pub fn steady(points: &[(f64, f64)], warm_up: f64, groups: usize) -> Vec<(f64, f64)> {
    let kept: Vec<_> = points.iter().copied().filter(|(x, _)| *x >= warm_up).collect();
    kept.chunks(kept.len().div_ceil(groups).max(1))
        .map(|group| {
            let n = group.len() as f64;
            (group.iter().map(|(x, _)| x).sum::<f64>() / n, group.iter().map(|(_, y)| y).sum::<f64>() / n)
        })
        .collect()
}

/// Noise of up to a page's worth around a line, after a warm-up that rises steeply.
fn samples(per_x: f64, noise: f64, seed: u64) -> Vec<(f64, f64)> {
    let mut numbers = Numbers(seed);
    (0..600)
        .map(|at| {
            let x = f64::from(at);
            let warm_up = 5e6 * (x / 60.0).min(1.0);
            (x, 20e6 + warm_up + per_x * x + noise * (numbers.below(2001) as f64 / 1000.0 - 1.0))
        })
        .collect()
}

#[test]
fn the_interval_is_that_of_a_worked_example() {
    // y = 2x with errors of 1, -1, 0, 1, -1 around it: slope 1.8, standard error 0.3464 (by hand: sqrt(3.6 / 3 / 10)), t of 3 degrees 3.182.
    let found = slope(&[(0.0, 1.0), (1.0, 1.0), (2.0, 4.0), (3.0, 7.0), (4.0, 7.0)]).expect("five points");
    let by_hand = (1.8, 0.346_4);
    assert!((found.slope - by_hand.0).abs() < 1e-9, "{found:?}");
    assert!(((found.high - found.slope) / by_hand.1 - 3.182).abs() < 0.03, "{found:?}");
    assert!(
        (student(3.0) - 3.182).abs() < 0.03
            && (student(10.0) - 2.228).abs() < 0.002
            && (student(1e6) - 1.96).abs() < 0.001
    );
    assert_eq!(slope(&[(0.0, 1.0); 4]), None);
    assert_eq!(slope(&[(1.0, 1.0); 9]), None);
}

#[test]
fn a_leak_is_above_its_bound_and_a_warm_up_and_noise_are_not() {
    for seed in 0..50 {
        let verdict = |per_x| slope(&steady(&samples(per_x, 200_000.0, seed), 60.0, 30)).expect("enough points");
        assert!(verdict(0.0).high < 200.0, "seed {seed}: {:?}", verdict(0.0));
        // 64 bytes for each of 100 requests in a step.
        assert!(verdict(6400.0).low > 5000.0, "seed {seed}: {:?}", verdict(6400.0));
        let with_warm_up = slope(&samples(0.0, 200_000.0, seed)).expect("enough points");
        assert!(with_warm_up.low > 1000.0, "that is why it is left out: {with_warm_up:?}");
    }
}

#[test]
fn a_run_too_short_to_tell_does_not_pass() {
    let short: Vec<_> = samples(0.0, 2e6, 3).into_iter().skip(60).take(8).collect();
    assert!(slope(&short).expect("enough points").high > 1000.0);
}

/// Bytes that this process has, by its own count of pages.
fn resident() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("the kernel says it");
    statm.split_whitespace().nth(1).expect("the second field").parse::<f64>().expect("pages") * 4096.0
}

#[test]
fn c1_sixty_four_bytes_leaked_by_each_request_are_found() {
    // Real memory of a real process: one that forgets 64 bytes at each step, and one that does not.
    let run = |leaks: bool| {
        let mut points = Vec::new();
        for step in 0..400u64 {
            for at in 0..500 {
                let kept = Box::new([step ^ at; 8]);
                match leaks {
                    true => std::mem::forget(std::hint::black_box(kept)),
                    false => drop(std::hint::black_box(kept)),
                }
            }
            points.push(((step * 500) as f64, resident()));
        }
        slope(&steady(&points, 50_000.0, 30)).expect("enough points")
    };
    let (sound, leaking) = (run(false), run(true));
    println!("bytes a request: {sound:?} sound, {leaking:?} leaking");
    assert!(sound.high < 1.0 && leaking.low > 32.0);
}

#[test]
fn cancelled_requests_keep_less_than_a_byte_each() {
    const BURST: u64 = 100;
    // Waste is forgiven: it is what is looked at.
    let child = Child::start_in(models(), &["abuse.points=0"]);
    let mut raw = child.connect();
    let echo = raw.handle("echo");
    let cancels = rounds(2_000_000, 10_000_000);
    let mut points = Vec::new();
    for burst in 0..cancels / BURST {
        let mut bytes = Vec::new();
        for _ in 0..BURST {
            let id = raw.take_id();
            bytes.extend(Ask::floats(echo, &[1.0]).deadline_us(3_600_000_000).frame(id));
            bytes.extend(bare_frame(ferry::wire::Kind::Cancel, id));
        }
        raw.send(&bytes);
        (0..BURST).for_each(|_| assert!(raw.recv().ends().is_some()));
        if burst % 10 == 0 {
            points.push(((burst * BURST) as f64, child.resident_bytes() as f64));
        }
    }
    let found = slope(&steady(&points, cancels as f64 / 2.0, 30)).expect("enough points");
    let cancelled = child.metric("ferry_requests_finished_total", &["code=\"cancelled\""]);
    let few: Vec<_> = steady(&points, 0.0, 10).iter().map(|(x, y)| (*x as u64, (*y / 1024.0) as u64)).collect();
    println!("{cancelled} of {cancels} cancelled in time; {found:?} bytes each; KiB over time: {few:?}");
    assert!(cancelled > cancels as f64 / 4.0);
    // Behind the first million: tables, rings and histograms are as large by then as they get. What is left are steps
    // of some 100 KiB now and then, of which the cause is not known.
    assert!(found.high < 1.0, "{found:?}");
}

/// What a soak looks at besides memory. None of these may be more at the end than behind the warm-up.
fn counts(child: &Child) -> [(&'static str, f64); 5] {
    let page = child.metrics();
    [
        ("files", child.files() as f64),
        ("threads", child.threads() as f64),
        ("tickets", metric(&page, "ferry_live_objects", &["ticket"])),
        ("receiving", metric(&page, "ferry_live_bytes", &["receiving"])),
        ("unsent", metric(&page, "ferry_live_bytes", &["unsent"])),
    ]
}

#[test]
fn under_mixed_traffic_nothing_grows() {
    // A few seconds as a test; FERRY_LONG makes it an hour, SOAK_SECONDS what it says.
    let seconds = std::env::var("SOAK_SECONDS").ok().map(|text| text.parse().expect("SOAK_SECONDS is a number"));
    let time = Duration::from_secs(seconds.unwrap_or(rounds(4, 3600)));
    let mut child = Child::start_in(models(), &[]);
    let mix = Mix { seed: 1, block: 64 << 10, delay: 50, flip: 50, cut: 100, half_close: 30, reset: 50, ..Mix::NONE };
    let proxy = Proxy::start(child.data, move |at| mix.act(at));
    let before = counts(&child);
    let mut points = Vec::new();
    let start = ferry::clock::now();
    while ferry::clock::now().since(start) < time {
        // In rounds, each with a history of its own: an hour's would be what grows.
        let (ledger, stop) = (Ledger::new(), std::sync::atomic::AtomicBool::new(false));
        std::thread::scope(|scope| {
            for caller in 0..3 {
                let allowed = Some(Duration::from_millis(500));
                let manner = Manner { depth: 16, micros: 2000, allowed, seed: caller };
                let (ledger, stop, addr) = (&ledger, &stop, if caller == 0 { proxy.addr } else { child.data });
                scope.spawn(move || call_through(addr, ledger, manner, stop));
            }
            std::thread::sleep(Duration::from_millis(250));
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        ledger.window(0, "the proxy's faults");
        let log = log_of(child.models());
        wait_until("the round is over", || child.metric("ferry_requests_in_flight", &[]) == 0.0);
        let entries = ledger.history(std::slice::from_ref(&log));
        // Numbers begin again with each round's ledger, and so does the log.
        std::fs::OpenOptions::new().write(true).truncate(true).open(&log).expect("the log is there");
        crate::history::check(&entries, &Rules::default()).expect("sound");
        points.push((ferry::clock::now().since(start).as_secs_f64(), child.resident_bytes() as f64));
    }
    wait_until("what is left is what was there", || {
        counts(&child).iter().zip(&before).all(|((_, now), (_, then))| now <= then)
    });
    let warm_up = time.as_secs_f64().min(3600.0) / 6.0;
    let found = slope(&steady(&points, warm_up, 40));
    let mib_an_hour = |bytes_a_second: f64| bytes_a_second * 3600.0 / f64::from(1 << 20);
    println!(
        "soak of {time:?}: resident {:.1} to {:.1} MiB; slope {:?} MiB an hour (95 % interval)",
        points[0].1 / f64::from(1 << 20),
        points[points.len() - 1].1 / f64::from(1 << 20),
        found.map(|found| (mib_an_hour(found.low), mib_an_hour(found.high))),
    );
    if time >= Duration::from_secs(1800) {
        let found = found.expect("enough points");
        assert!(mib_an_hour(found.high) < 1.0, "{found:?}");
    }
    child.signal(Signal::SIGTERM);
    assert_eq!(child.status(), Some(0));
}
