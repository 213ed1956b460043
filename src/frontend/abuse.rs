//! What peers pay for work that is of no use to anybody, and who is not listened to for a while.
//!
//! Every wasteful act costs a connection points, every answer that was asked for earns some back, and time refills them slowly.
//! A connection without points is told to calm down and ends; its address is banned for a short time. So a caller that uses what
//! it asks for never pays, however much that is, and one that only makes work pays soon, however cheap each piece is.
//!
//! Pure: the time is an argument.
//!
//! Always true
//! - A level is never above the rules' size and never below zero.
//! - The table of addresses has at most [`SOURCES_MAX`] entries; whoever is banned is the last to be forgotten. An IPv6 address
//!   counts by its first 64 bits, for whoever has one has all of them.
//! - An address of this machine is banned only where the rules say so: whoever is there has other means.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::vocab::Moment;

/// A wasteful act. What it costs is [`Act::points`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Metadata that cannot be decoded, a wrong checksum, an id that does not rise: no client library does this.
    Malformed,
    /// More than the window that the hello_ack granted.
    BeyondCredit,
    /// A request that the model's contract refuses. Cheap: gateways pass on what their own callers get wrong.
    Refused,
    /// Describe and stats build a document each.
    Document,
    Cancel,
    Ping,
    /// A frame of an optional kind that is not known here.
    Unknown,
}

impl Act {
    pub const ALL: [Act; 7] =
        [Act::Malformed, Act::BeyondCredit, Act::Refused, Act::Document, Act::Cancel, Act::Ping, Act::Unknown];

    pub fn points(self) -> u32 {
        match self {
            Act::Malformed => 100,
            Act::BeyondCredit => 10,
            Act::Refused | Act::Document => 2,
            Act::Cancel | Act::Ping | Act::Unknown => 1,
        }
    }

    /// As in "too many …".
    pub fn plural(self) -> &'static str {
        match self {
            Act::Malformed => "malformed requests",
            Act::BeyondCredit => "requests beyond the credit",
            Act::Refused => "requests that the contract refuses",
            Act::Document => "describes and stats",
            Act::Cancel => "cancels",
            Act::Ping => "pings",
            Act::Unknown => "frames of unknown kinds",
        }
    }
}

/// What an answered request earns: two cancels, so that a caller that asks twice and cancels the slower never pays.
const EARNED: f64 = 2.0;
/// What a stream that cannot be followed costs its address: the connection is gone in any case.
const FATAL: f64 = 100.0;
/// An address refills so much slower than a connection.
const SOURCE_SHARE: f64 = 0.1;
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

/// How patient the server is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// Points of a new connection and the most it can have; 0: nothing is counted.
    pub size: u32,
    pub per_second: u32,
    /// How long an address is banned; zero: none is.
    pub ban: Duration,
    /// Bans addresses of this machine too.
    pub ban_loopback: bool,
}

impl Rules {
    pub const NONE: Rules = Rules { size: 0, per_second: 0, ban: Duration::ZERO, ban_loopback: false };
}

/// The points of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Points {
    level: f64,
    at: Moment,
}

impl Points {
    pub fn full(rules: &Rules, now: Moment) -> Points {
        Points { level: rules.size.into(), at: now }
    }

    /// Takes what an act costs. False: that was one too many.
    #[must_use]
    pub fn pay(&mut self, act: Act, rules: &Rules, now: Moment) -> bool {
        rules.size == 0 || self.take(act.points().into(), rules.size.into(), rules.per_second.into(), now)
    }

    /// A request was answered with a result.
    pub fn earn(&mut self, rules: &Rules) {
        self.level = (self.level + EARNED).min(rules.size.into());
    }

    pub fn level(&self) -> f64 {
        self.level
    }

    fn take(&mut self, cost: f64, size: f64, per_second: f64, now: Moment) -> bool {
        self.level = (self.level + now.since(self.at).as_secs_f64() * per_second).min(size);
        // A clock that was read earlier elsewhere takes nothing back.
        self.at = self.at.max(now);
        let enough = self.level >= cost;
        self.level = (self.level - cost).max(0.0);
        enough
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    points: Points,
    banned_until: Moment,
}

/// Addresses that did too much of it: a table that is pure, without its lock.
#[derive(Debug, Default)]
pub struct Sources {
    entries: HashMap<Source, Entry>,
}

impl Sources {
    pub fn is_banned(&self, source: Source, now: Moment) -> bool {
        self.entries.get(&source).is_some_and(|entry| entry.banned_until > now)
    }

    /// A connection of this address ran out of points.
    pub fn ban(&mut self, source: Source, rules: &Rules, now: Moment) {
        self.entry(source, rules, now).banned_until = now + rules.ban;
    }

    /// A connection of this address sent what cannot be followed. One too many, and the address is banned.
    pub fn strike(&mut self, source: Source, rules: &Rules, now: Moment) -> bool {
        let entry = self.entry(source, rules, now);
        let per_second = f64::from(rules.per_second) * SOURCE_SHARE;
        let patient = entry.points.take(FATAL, rules.size.into(), per_second, now);
        if !patient {
            entry.banned_until = now + rules.ban;
        }
        !patient
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn entry(&mut self, source: Source, rules: &Rules, now: Moment) -> &mut Entry {
        if self.entries.len() >= SOURCES_MAX && !self.entries.contains_key(&source) {
            // A walk over all: a microsecond for a hundred, and only when so many addresses misbehave at once.
            let quiet = |entry: &Entry| (entry.banned_until > now, entry.banned_until, entry.points.at);
            if let Some(oldest) = self.entries.iter().min_by_key(|(_, entry)| quiet(entry)).map(|(source, _)| *source) {
                self.entries.remove(&oldest);
            }
        }
        let fresh = || Entry { points: Points::full(rules, now), banned_until: Moment::ZERO };
        self.entries.entry(source).or_insert_with(fresh)
    }
}

/// The addresses that all shards know of. Locked for a look-up at a time: on accept, and when a peer is sent away.
#[derive(Debug)]
pub struct Bans {
    rules: Rules,
    /// False until somebody was noted, so that a server without trouble takes no lock.
    noted: AtomicBool,
    sources: Mutex<Sources>,
}

impl Default for Bans {
    fn default() -> Bans {
        Bans::new(Rules::NONE)
    }
}

impl Bans {
    pub fn new(rules: Rules) -> Bans {
        Bans { rules, noted: AtomicBool::new(false), sources: Mutex::default() }
    }

    /// Whether connections of this address are taken.
    pub fn admits(&self, addr: IpAddr, now: Moment) -> bool {
        !self.noted.load(Ordering::Relaxed)
            || self.with(addr, |sources, source| !sources.is_banned(source, now)).unwrap_or(true)
    }

    pub fn ban(&self, addr: IpAddr, now: Moment) {
        self.with(addr, |sources, source| sources.ban(source, &self.rules, now));
    }

    /// True when that was one too many: the address is banned from now on.
    pub fn strike(&self, addr: IpAddr, now: Moment) -> bool {
        self.with(addr, |sources, source| sources.strike(source, &self.rules, now)).unwrap_or(false)
    }

    fn with<R>(&self, addr: IpAddr, act: impl FnOnce(&mut Sources, Source) -> R) -> Option<R> {
        let local = addr.to_canonical().is_loopback();
        if self.rules.size == 0 || self.rules.ban.is_zero() || (local && !self.rules.ban_loopback) {
            return None;
        }
        self.noted.store(true, Ordering::Relaxed);
        // A table with half an entry would still be a table.
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        Some(act(&mut sources, Source::of(addr)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: Rules = Rules { size: 1000, per_second: 100, ban: Duration::from_secs(10), ban_loopback: false };

    fn ms(at: u64) -> Moment {
        Moment(at * 1_000_000)
    }

    fn addr(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn source(n: u32) -> Source {
        Source::of(IpAddr::V4(n.into()))
    }

    #[test]
    fn each_act_is_forgiven_as_often_as_its_points_say() {
        for act in Act::ALL {
            let mut points = Points::full(&RULES, ms(1));
            let forgiven = (0..).take_while(|_| points.pay(act, &RULES, ms(1))).count() as u32;
            assert_eq!(forgiven, RULES.size / act.points(), "{act:?}");
        }
    }

    #[test]
    fn an_empty_bucket_refills_by_and_by_and_never_beyond_its_size() {
        let mut points = Points::full(&RULES, ms(0));
        while points.pay(Act::Ping, &RULES, ms(0)) {}
        assert!(!points.pay(Act::Ping, &RULES, ms(9)) && points.pay(Act::Ping, &RULES, ms(20)));
        let mut points = Points::full(&RULES, ms(0));
        assert!(points.pay(Act::Ping, &RULES, ms(3_600_000)));
        assert_eq!(points.level(), 999.0);
        for _ in 0..5 {
            points.earn(&RULES);
        }
        assert_eq!(points.level(), 1000.0);
    }

    #[test]
    fn without_rules_nothing_is_counted() {
        let mut points = Points::full(&Rules::NONE, ms(0));
        assert!((0..100_000).all(|_| points.pay(Act::Malformed, &Rules::NONE, ms(0))));
        let bans = Bans::default();
        bans.ban(addr("192.0.2.1"), ms(1));
        assert!(bans.admits(addr("192.0.2.1"), ms(1)));
    }

    #[test]
    fn a_request_that_is_always_cancelled_ends_the_connection_and_one_of_three_answered_does_not() {
        let mut reset = Points::full(&RULES, ms(0));
        // At 100,000 a second.
        let pairs = (0..1_000_000u64).take_while(|at| reset.pay(Act::Cancel, &RULES, Moment(at * 10_000))).count();
        assert!((1000..1010).contains(&pairs), "{pairs}");
        let mut hedge = Points::full(&RULES, ms(0));
        for at in 0..1_000_000u64 {
            assert!(hedge.pay(Act::Cancel, &RULES, Moment(at * 10_000)));
            if at % 2 == 1 {
                hedge.earn(&RULES);
            }
        }
    }

    #[test]
    fn who_ran_out_is_banned_for_a_while_with_all_of_its_network_and_nobody_else() {
        let bans = Bans::new(RULES);
        assert!(bans.admits(addr("2001:db8::1"), ms(1)));
        bans.ban(addr("2001:db8::1"), ms(1));
        bans.ban(addr("192.0.2.1"), ms(1));
        assert!(!bans.admits(addr("2001:db8::2"), ms(10_000)) && bans.admits(addr("2001:db8::2"), ms(10_001)));
        assert!(!bans.admits(addr("::ffff:192.0.2.1"), ms(2)), "the same machine by another name");
        assert!(bans.admits(addr("192.0.2.2"), ms(2)) && bans.admits(addr("2001:db8:0:1::1"), ms(2)));
    }

    #[test]
    fn this_machine_is_banned_only_where_the_rules_say_so() {
        let local = ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"];
        let (mild, strict) = (Bans::new(RULES), Bans::new(Rules { ban_loopback: true, ..RULES }));
        for text in local {
            mild.ban(addr(text), ms(1));
            strict.ban(addr(text), ms(1));
            assert!(mild.admits(addr(text), ms(1)) && !strict.admits(addr(text), ms(1)), "{text}");
        }
    }

    #[test]
    fn streams_that_cannot_be_followed_are_forgiven_ten_times_and_then_once_in_ten_seconds() {
        let mut sources = Sources::default();
        assert!((0..10).all(|_| !sources.strike(source(1), &RULES, ms(0))));
        assert!(!sources.is_banned(source(1), ms(0)));
        assert!(sources.strike(source(1), &RULES, ms(0)) && sources.is_banned(source(1), ms(0)));
        assert!(!sources.is_banned(source(1), ms(10_000)));
        assert!(!sources.strike(source(1), &RULES, ms(10_000)) && sources.strike(source(1), &RULES, ms(10_000)));
    }

    #[test]
    fn a_flood_of_addresses_does_not_grow_the_table_nor_free_who_is_banned() {
        let mut sources = Sources::default();
        sources.ban(source(0), &RULES, ms(0));
        for n in 1..2 * SOURCES_MAX as u32 {
            sources.strike(source(n), &RULES, ms(1));
            assert!(sources.len() <= SOURCES_MAX);
        }
        assert!(sources.is_banned(source(0), ms(1)));
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

    /// One step of a caller: how long it waits, and what it does.
    fn use_of() -> impl Strategy<Value = (u64, Option<Act>)> {
        (0..2_000u64, prop_oneof![Just(None), proptest::sample::select(Act::ALL.to_vec()).prop_map(Some)])
    }

    proptest! {
        #[test]
        fn what_is_forgiven_is_bounded_by_size_time_and_use(steps in proptest::collection::vec(use_of(), 1..400)) {
            let mut points = Points::full(&RULES, ms(0));
            let (mut now, mut paid, mut earned) = (0, 0.0, 0.0);
            for (wait, act) in steps {
                now += wait / 20;
                match act {
                    Some(act) => if points.pay(act, &RULES, ms(now)) { paid += f64::from(act.points()) },
                    None => { points.earn(&RULES); earned += EARNED }
                }
                prop_assert!((0.0..=1000.0).contains(&points.level()));
                prop_assert!(paid <= 1000.0 + 0.1 * now as f64 + earned + 1e-6);
            }
        }

        #[test]
        fn a_caller_that_uses_what_it_asks_for_is_never_sent_away(
            steps in proptest::collection::vec((1..1000u64, 0..50u32), 1..300),
        ) {
            // Describes twice when it connects, pings each second, and cancels twice for each answer, however fast.
            let mut points = Points::full(&RULES, ms(0));
            prop_assert!(points.pay(Act::Document, &RULES, ms(0)) && points.pay(Act::Document, &RULES, ms(0)));
            let (mut now, mut pinged) = (0, 0);
            for (wait, answers) in steps {
                now += wait;
                while now - pinged >= 1000 {
                    pinged += 1000;
                    prop_assert!(points.pay(Act::Ping, &RULES, ms(now)));
                }
                for _ in 0..answers {
                    prop_assert!(points.pay(Act::Cancel, &RULES, ms(now)) && points.pay(Act::Cancel, &RULES, ms(now)));
                    points.earn(&RULES);
                }
            }
        }
    }
}
