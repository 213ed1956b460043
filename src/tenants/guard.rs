//! How often somebody may try, and who has tried too often: buckets of tokens, and a table of addresses.
//!
//! Pure: the time is an argument.
//!
//! Always true
//! - The table has at most [`SOURCES_MAX`] addresses; a new one takes the place of the one that was seen the longest ago.
//! - An IPv6 address counts by its first 64 bits, for whoever has one has all of them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::vocab::Moment;

/// So many at once, and so many a second.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    level: f64,
    size: f64,
    per_second: f64,
    at: Moment,
}

impl Bucket {
    /// Full.
    pub fn new(size: f64, per_second: f64, now: Moment) -> Bucket {
        Bucket { level: size, size, per_second, at: now }
    }

    /// Takes `cost`, if there is as much.
    pub fn take(&mut self, cost: f64, now: Moment) -> bool {
        self.refill(now);
        let there = self.level >= cost;
        if there {
            self.level -= cost;
        }
        there
    }

    fn refill(&mut self, now: Moment) {
        self.level = (self.level + now.since(self.at).as_secs_f64() * self.per_second).min(self.size);
        // A clock that was read earlier elsewhere takes nothing back.
        self.at = self.at.max(now);
    }

    fn is_full(&mut self, now: Moment) -> bool {
        self.refill(now);
        self.level >= self.size
    }
}

/// Where a connection comes from, as far as it is told apart from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source(u64, bool);

impl Source {
    pub fn of(addr: IpAddr) -> Source {
        match addr {
            IpAddr::V4(addr) => Source(u64::from(addr.to_bits()), false),
            IpAddr::V6(addr) => match addr.to_ipv4_mapped() {
                Some(addr) => Source(u64::from(addr.to_bits()), false),
                None => Source((addr.to_bits() >> 64) as u64, true),
            },
        }
    }
}

/// Addresses that are remembered.
pub const SOURCES_MAX: usize = 4096;
/// Failures that are forgiven at once, and how many a second after that.
const FAILURES: f64 = 10.0;
const FAILURES_PER_SECOND: f64 = 0.1;
/// How long who has used them up is not listened to.
pub const BAN: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Tried {
    bucket: Bucket,
    banned_until: Moment,
}

/// Who failed to prove who it is, and how often.
#[derive(Debug, Default)]
pub struct Guard {
    sources: HashMap<Source, Tried>,
}

impl Guard {
    /// Whether this source is to be listened to.
    pub fn admits(&self, source: Source, now: Moment) -> bool {
        self.sources.get(&source).is_none_or(|tried| tried.banned_until <= now)
    }

    /// Notes a failure. True when that was one too many: it is banned from now on.
    pub fn failed(&mut self, source: Source, now: Moment) -> bool {
        if self.sources.len() >= SOURCES_MAX && !self.sources.contains_key(&source) {
            // Whoever has been quiet the longest; looked for among all, which bounds how fast a flood from many addresses is noted.
            self.sources.retain(|_, tried| tried.banned_until > now || !tried.bucket.is_full(now));
            if self.sources.len() >= SOURCES_MAX
                && let Some(oldest) =
                    self.sources.iter().min_by_key(|(_, tried)| tried.bucket.at).map(|(source, _)| *source)
            {
                self.sources.remove(&oldest);
            }
        }
        let tried = self.sources.entry(source).or_insert_with(|| Tried {
            bucket: Bucket::new(FAILURES, FAILURES_PER_SECOND, now),
            banned_until: Moment::ZERO,
        });
        let forgiven = tried.bucket.take(1.0, now);
        if !forgiven {
            tried.banned_until = now + BAN;
        }
        !forgiven
    }

    pub fn len(&self) -> usize {
        self.sources.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(at: u64) -> Moment {
        Moment(at * 1_000_000_000)
    }

    fn source(n: u32) -> Source {
        Source::of(IpAddr::V4(n.into()))
    }

    #[test]
    fn a_bucket_gives_what_it_holds_and_fills_again_by_and_by() {
        let mut bucket = Bucket::new(3.0, 2.0, second(1));
        assert!((0..3).all(|_| bucket.take(1.0, second(1))));
        assert!(!bucket.take(1.0, second(1)));
        assert!(bucket.take(2.0, second(2)) && !bucket.take(0.5, second(2)));
        assert!(bucket.take(3.0, second(100)) && !bucket.take(0.1, second(100)), "never more than it holds");
        assert!(!bucket.take(0.1, second(50)), "a clock that goes back gives nothing");
        assert!(bucket.take(1.0, second(101)));
    }

    #[test]
    fn who_fails_too_often_is_banned_for_a_while_and_nobody_else() {
        let mut guard = Guard::default();
        assert!((0..10).all(|_| !guard.failed(source(1), second(1))));
        assert!(guard.admits(source(1), second(1)));
        assert!(guard.failed(source(1), second(1)));
        assert!(!guard.admits(source(1), second(1)) && guard.admits(source(2), second(1)));
        assert!(!guard.admits(source(1), second(30)) && guard.admits(source(1), second(31)));
        // Three came back meanwhile, no more.
        assert!((0..3).all(|_| !guard.failed(source(1), second(31))));
        assert!(guard.failed(source(1), second(31)));
    }

    #[test]
    fn the_table_is_bounded_and_keeps_who_is_banned() {
        let mut guard = Guard::default();
        for _ in 0..=10 {
            guard.failed(source(0), second(1));
        }
        for n in 1..3 * SOURCES_MAX as u32 {
            guard.failed(source(n), second(2));
            assert!(guard.len() <= SOURCES_MAX);
        }
        let mut guard = Guard::default();
        for n in 0..SOURCES_MAX as u32 {
            guard.failed(source(n), second(1));
        }
        for _ in 0..=10 {
            guard.failed(source(7), second(1000));
        }
        guard.failed(source(99_999), second(1001));
        assert!(!guard.admits(source(7), second(1001)), "the others were forgiven long ago");
        assert!(guard.len() < 10);
    }

    #[test]
    fn an_address_counts_as_its_owner() {
        let of = |text: &str| Source::of(text.parse().expect("an address"));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
        assert_ne!(of("::a00:1"), of("10.0.0.1"));
    }
}
