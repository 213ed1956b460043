//! The only file that asks what time it is.
//!
//! Always true
//! - Moments of one process share an origin, so they can be compared across threads.
//! - Wall-clock steps and time zones never reach a decision: wall time is for showing only.

#![allow(clippy::disallowed_methods)] // here is where they are allowed

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::vocab::Moment;

static ORIGIN: OnceLock<Instant> = OnceLock::new();

/// The process's monotonic clock.
pub fn now() -> Moment {
    let origin = *ORIGIN.get_or_init(Instant::now);
    Moment(u64::try_from(origin.elapsed().as_nanos()).expect("a process does not live for 584 years"))
}

/// CPU time that the calling thread has used.
pub fn thread_cpu() -> Duration {
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    clock.now().map_or(Duration::ZERO, Duration::from)
}

/// The `Instant` of a moment, for libraries that wait until one.
pub fn instant_of(moment: Moment) -> Instant {
    let origin = *ORIGIN.get_or_init(Instant::now);
    origin
        .checked_add(Duration::from_nanos(moment.nanos()))
        .unwrap_or_else(|| origin + Duration::from_secs(u32::MAX.into()))
}

/// When a moment of the past was, in time since 1970, to be shown to people. As right as the wall clock is now.
pub fn unix_time(moment: Moment) -> Duration {
    let now_unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now_unix.saturating_sub(now().since(moment))
}

/// A clock that moves when told to, for tests and replay.
#[derive(Debug, Default)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    pub fn now(&self) -> Moment {
        Moment(self.0.load(Ordering::Relaxed))
    }

    pub fn advance(&self, by: Duration) -> Moment {
        let nanos = u64::try_from(by.as_nanos()).expect("a test advances by less than 584 years");
        Moment(self.0.fetch_add(nanos, Ordering::Relaxed) + nanos)
    }
}
