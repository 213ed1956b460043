//! What a tenant may use: so much a second, so much at a time.
//!
//! All shards share one [`Quota`] for each tenant, so a tenant gets all of its quota through whichever shards its connections
//! happen to be on, and never more than it through many. A meter is one number, the time at which what was taken is paid for
//! (the generic cell rate algorithm), which is why no lock is needed.
//!
//! Pure but for those numbers: the time is an argument.
//!
//! Always true
//! - In any stretch of time a meter gives at most its rate times that time, plus one second's worth, or plus one request where
//!   that is more. A request larger than a second's worth is taken when the meter is full, so nothing is refused for ever.
//! - What is refused takes nothing.
//! - What is in flight, and connections, are given back exactly once: by dropping what was taken.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;

use crate::vocab::Moment;

/// What fills at once, in ns of its rate.
const BURST_NANOS: u64 = 1_000_000_000;
/// Most a second: above it a unit would take no time.
pub const RATE_MAX: u64 = 1_000_000_000;

/// A tenant's quota as written. 0: no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuotaSpec {
    pub requests_per_second: u64,
    pub rows_per_second: u64,
    pub cells_per_second: u64,
    pub bytes_per_second: u64,
    pub in_flight_max: u32,
    pub connections_max: u32,
}

impl QuotaSpec {
    fn rates(&self) -> [u64; 4] {
        [self.requests_per_second, self.rows_per_second, self.cells_per_second, self.bytes_per_second]
    }

    /// Says which figure is too large.
    pub fn check(&self) -> Result<(), String> {
        for (what, rate) in WHAT.iter().zip(self.rates()) {
            if rate > RATE_MAX {
                return Err(format!("{what}_per_second: expected at most {RATE_MAX}, got {rate}"));
            }
        }
        Ok(())
    }
}

const WHAT: [&str; 4] = ["requests", "rows", "cells", "bytes"];

/// What one request uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    pub rows: u64,
    pub cells: u64,
    pub bytes: u64,
}

/// Why a tenant may not, and when it may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exceeded {
    pub message: String,
    pub retry_after: Duration,
}

/// Gives so many units a second.
#[derive(Debug, Default)]
struct Meter {
    per_second: AtomicU64,
    /// Until when what was taken is paid for; at most [`BURST_NANOS`] of that may lie ahead.
    paid_until: AtomicU64,
}

impl Meter {
    /// Takes `units`, or says after what time there will be so many. With what to give back should another meter refuse.
    fn take(&self, units: u64, now: Moment) -> Result<u64, Duration> {
        let rate = self.per_second.load(Ordering::Relaxed);
        if rate == 0 || units == 0 {
            return Ok(0);
        }
        // Rounded up, so that rounding never gives more than the rate.
        let cost = (u128::from(units) * u128::from(BURST_NANOS)).div_ceil(rate.into());
        let cost = u64::try_from(cost).unwrap_or(u64::MAX / 4).min(u64::MAX / 4);
        // One request that is more than what fills at once waits for a full meter.
        let tolerance = BURST_NANOS.max(cost);
        let mut paid = self.paid_until.load(Ordering::Relaxed);
        loop {
            let after = paid.max(now.0) + cost;
            let ahead = after - now.0;
            if ahead > tolerance {
                return Err(Duration::from_nanos(ahead - tolerance));
            }
            match self.paid_until.compare_exchange_weak(paid, after, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(cost),
                Err(other) => paid = other,
            }
        }
    }

    fn give_back(&self, cost: u64) {
        self.paid_until.fetch_sub(cost, Ordering::Relaxed);
    }
}

/// One tenant's quota and what it has used of it.
#[derive(Debug, Default)]
pub struct Quota {
    meters: [Meter; 4],
    in_flight_max: AtomicU32,
    in_flight: AtomicU32,
    connections_max: AtomicU32,
    connections: AtomicU32,
}

impl Quota {
    pub fn new(spec: &QuotaSpec) -> Arc<Quota> {
        let quota = Arc::new(Quota::default());
        quota.set(spec);
        quota
    }

    /// Other figures from now on; what is used stays used.
    pub fn set(&self, spec: &QuotaSpec) {
        for (meter, rate) in self.meters.iter().zip(spec.rates()) {
            meter.per_second.store(rate, Ordering::Relaxed);
        }
        self.in_flight_max.store(spec.in_flight_max, Ordering::Relaxed);
        self.connections_max.store(spec.connections_max, Ordering::Relaxed);
    }

    /// Takes what a request uses: all of it or nothing. True: it counts as in flight until [`Quota::finished`]. Without a bound
    /// nothing is counted: all shards would write the same number for each request.
    ///
    /// Hot: once per request.
    pub fn take(&self, asked: Use, now: Moment) -> Result<bool, Exceeded> {
        let max = self.in_flight_max.load(Ordering::Relaxed);
        if max > 0 && !count_up(&self.in_flight, max) {
            return Err(Exceeded {
                message: format!("the tenant has {max} requests in flight, its quota"),
                retry_after: Duration::from_millis(10),
            });
        }
        let mut taken = [0; 4];
        let mut refused: Option<(usize, Duration)> = None;
        for (at, units) in [1, asked.rows, asked.cells, asked.bytes].into_iter().enumerate() {
            match self.meters[at].take(units, now) {
                Ok(cost) => taken[at] = cost,
                // All are asked, so that the time to come back is when the last of them has enough.
                Err(wait) => refused = refused.max_by_wait((at, wait)),
            }
        }
        let Some((at, retry_after)) = refused else { return Ok(max > 0) };
        for (meter, cost) in self.meters.iter().zip(taken) {
            meter.give_back(cost);
        }
        if max > 0 {
            self.finished();
        }
        let rate = self.meters[at].per_second.load(Ordering::Relaxed);
        Err(Exceeded { message: format!("the tenant's quota is {rate} {} a second", WHAT[at]), retry_after })
    }

    /// A request that counts is answered, in whatever way.
    pub fn finished(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Of those that count.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// One more connection, until what is returned is dropped. None: there are as many as there may be.
    pub fn connect(self: &Arc<Quota>) -> Option<Seat> {
        let max = self.connections_max.load(Ordering::Relaxed);
        count_up(&self.connections, max).then(|| Seat(Arc::clone(self)))
    }

    pub fn connections(&self) -> u32 {
        self.connections.load(Ordering::Relaxed)
    }
}

trait MaxByWait {
    fn max_by_wait(self, other: (usize, Duration)) -> Self;
}

impl MaxByWait for Option<(usize, Duration)> {
    fn max_by_wait(self, other: (usize, Duration)) -> Self {
        Some(self.filter(|(_, wait)| *wait >= other.1).unwrap_or(other))
    }
}

/// Counts one more unless that is too many; 0 is no bound.
fn count_up(count: &AtomicU32, max: u32) -> bool {
    let more = |count: u32| (max == 0 || count < max).then_some(count + 1);
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
}

/// A connection of a tenant.
#[derive(Debug)]
pub struct Seat(Arc<Quota>);

impl Seat {
    pub fn quota(&self) -> &Quota {
        &self.0
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Every tenant's quota. Asked once per connection, on its hello.
///
/// Always true: there are at most as many as names the caller tells apart, and those with figures of their own.
#[derive(Debug, Default)]
pub struct Quotas(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    /// Of whoever has no figures of its own.
    common: QuotaSpec,
    own: HashMap<String, QuotaSpec>,
    used: HashMap<String, Arc<Quota>>,
}

impl Table {
    fn spec(&self, name: &str) -> &QuotaSpec {
        self.own.get(name).unwrap_or(&self.common)
    }
}

impl Quotas {
    pub fn new(common: QuotaSpec) -> Quotas {
        let quotas = Quotas::default();
        quotas.with(|table| table.common = common);
        quotas
    }

    /// Figures of tenants' own, instead of those before. They hold at once, also for connections that are open.
    pub fn set_own(&self, own: HashMap<String, QuotaSpec>) {
        self.with(|table| {
            table.own = own;
            for (name, quota) in &table.used {
                quota.set(table.spec(name));
            }
        });
    }

    /// The quota of a tenant. Names that are not `told_apart` and have no figures of their own share one.
    pub fn of(&self, name: &str, told_apart: bool) -> Arc<Quota> {
        self.with(|table| {
            let name = if told_apart || table.own.contains_key(name) { name } else { "" };
            if let Some(quota) = table.used.get(name) {
                return Arc::clone(quota);
            }
            let quota = Quota::new(table.spec(name));
            table.used.insert(name.to_owned(), Arc::clone(&quota));
            quota
        })
    }

    fn with<R>(&self, act: impl FnOnce(&mut Table) -> R) -> R {
        // Each step leaves a table that can be used.
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(at: u64) -> Moment {
        Moment(1_000_000_000_000 + at * 1_000_000)
    }

    fn asked(rows: u64, cells: u64, bytes: u64) -> Use {
        Use { rows, cells, bytes }
    }

    fn requests(per_second: u64) -> Arc<Quota> {
        Quota::new(&QuotaSpec { requests_per_second: per_second, ..QuotaSpec::default() })
    }

    #[test]
    fn without_figures_nothing_is_refused() {
        let quota = Quota::new(&QuotaSpec::default());
        assert!((0..10_000).all(|_| quota.take(asked(1 << 40, 1 << 50, u64::MAX), ms(0)).is_ok()));
        let seats: Vec<Seat> = (0..1000).map(|_| quota.connect().expect("no bound")).collect();
        assert_eq!(quota.connections(), 1000);
        drop(seats);
        assert_eq!(quota.connections(), 0);
    }

    #[test]
    fn a_second_of_requests_goes_at_once_and_then_as_many_as_the_rate_says() {
        let quota = requests(100);
        let count = |now: Moment| (0..1000).take_while(|_| quota.take(Use::default(), now).is_ok()).count();
        assert_eq!([count(ms(0)), count(ms(9)), count(ms(10)), count(ms(60)), count(ms(60_000))], [100, 0, 1, 5, 100]);
    }

    #[test]
    fn the_time_to_come_back_is_exactly_when_there_is_enough() {
        let quota = Quota::new(&QuotaSpec { requests_per_second: 1000, rows_per_second: 100, ..QuotaSpec::default() });
        quota.take(asked(100, 0, 0), ms(0)).expect("a second's worth");
        let refused = quota.take(asked(25, 0, 0), ms(0)).expect_err("nothing is left");
        assert_eq!(refused.retry_after, Duration::from_millis(250));
        assert_eq!(refused.message, "the tenant's quota is 100 rows a second");
        assert!(quota.take(asked(25, 0, 0), ms(249)).is_err());
        quota.take(asked(25, 0, 0), ms(250)).expect("now there is");
    }

    #[test]
    fn what_is_refused_takes_nothing() {
        let spec =
            QuotaSpec { requests_per_second: 10, bytes_per_second: 100, in_flight_max: 50, ..QuotaSpec::default() };
        let quota = Quota::new(&spec);
        quota.take(asked(0, 0, 100), ms(0)).expect("a second's worth");
        for _ in 0..1000 {
            quota.take(asked(0, 0, 1), ms(0)).expect_err("no bytes are left");
        }
        assert_eq!(quota.in_flight(), 1);
        for _ in 0..9 {
            quota.take(asked(0, 0, 0), ms(0)).expect("requests are left");
        }
        assert_eq!(
            quota.take(asked(0, 0, 0), ms(0)).expect_err("none are").message,
            "the tenant's quota is 10 requests a second"
        );
    }

    #[test]
    fn a_request_larger_than_a_second_of_quota_is_taken_when_nothing_was_used_and_paid_for_after() {
        let quota = Quota::new(&QuotaSpec { cells_per_second: 100, ..QuotaSpec::default() });
        quota.take(asked(1, 500, 0), ms(0)).expect("the meter is full");
        let refused = quota.take(asked(1, 1, 0), ms(0)).expect_err("it is paid for first");
        assert_eq!(refused.retry_after, Duration::from_millis(4010));
        quota.take(asked(1, 1, 0), ms(4010)).expect("paid");
        quota.take(asked(1, u64::MAX, 0), ms(60_000)).expect("the meter is full");
        quota.take(asked(1, 1, 0), ms(60_001)).expect_err("for a long time");
    }

    #[test]
    fn what_is_in_flight_is_bounded_and_given_back() {
        let quota = Quota::new(&QuotaSpec { in_flight_max: 2, ..QuotaSpec::default() });
        quota.take(Use::default(), ms(0)).expect("one");
        quota.take(Use::default(), ms(0)).expect("two");
        assert_eq!(
            quota.take(Use::default(), ms(0)).expect_err("three").message,
            "the tenant has 2 requests in flight, its quota"
        );
        quota.finished();
        quota.take(Use::default(), ms(0)).expect("one was given back");
    }

    #[test]
    fn without_a_bound_nothing_in_flight_is_counted_and_with_one_only_what_came_since() {
        let quota = Quota::new(&QuotaSpec::default());
        assert_eq!((quota.take(Use::default(), ms(0)), quota.in_flight()), (Ok(false), 0));
        quota.set(&QuotaSpec { in_flight_max: 1, ..QuotaSpec::default() });
        assert_eq!((quota.take(Use::default(), ms(0)), quota.in_flight()), (Ok(true), 1));
        quota.take(Use::default(), ms(0)).expect_err("one is in flight");
        quota.set(&QuotaSpec::default());
        quota.finished();
        assert_eq!(quota.in_flight(), 0);
    }

    #[test]
    fn connections_are_bounded_and_given_back() {
        let quota = Quota::new(&QuotaSpec { connections_max: 2, ..QuotaSpec::default() });
        let (one, _two) = (quota.connect().expect("one"), quota.connect().expect("two"));
        assert!(quota.connect().is_none());
        drop(one);
        assert!(quota.connect().is_some());
    }

    #[test]
    fn other_figures_hold_at_once_and_what_was_used_stays_used() {
        let quota = requests(10);
        for _ in 0..10 {
            quota.take(Use::default(), ms(0)).expect("a second's worth");
        }
        quota.set(&QuotaSpec { requests_per_second: 1000, ..QuotaSpec::default() });
        let refused = quota.take(Use::default(), ms(0)).expect_err("a second was used");
        assert_eq!(refused.retry_after, Duration::from_millis(1));
        quota.set(&QuotaSpec::default());
        quota.take(Use::default(), ms(0)).expect("no bound any more");
    }

    #[test]
    fn shards_that_take_together_get_the_quota_once() {
        let spec = QuotaSpec { requests_per_second: 10_000, in_flight_max: u32::MAX, ..QuotaSpec::default() };
        let quota = Quota::new(&spec);
        let taken: usize = std::thread::scope(|scope| {
            let take = || (0..10_000).filter(|_| quota.take(Use::default(), ms(0)).is_ok()).count();
            let shards: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            shards.into_iter().map(|shard| shard.join().expect("no panic")).sum()
        });
        assert_eq!((taken, quota.in_flight()), (10_000, 10_000));
    }

    #[test]
    fn a_spec_says_what_is_too_large() {
        let spec = QuotaSpec { cells_per_second: RATE_MAX + 1, ..QuotaSpec::default() };
        let message = spec.check().expect_err("too large");
        assert_eq!(message, "cells_per_second: expected at most 1000000000, got 1000000001");
        assert_eq!(QuotaSpec { cells_per_second: RATE_MAX, ..spec }.check(), Ok(()));
        assert!(toml::from_str::<QuotaSpec>("rows = 5").is_err(), "a key that is not known is a mistake");
        assert_eq!(toml::from_str::<QuotaSpec>("rows_per_second = 5").expect("known").rows_per_second, 5);
    }

    #[test]
    fn each_tenant_has_its_own_and_strangers_share_one() {
        let common = QuotaSpec { in_flight_max: 5, ..QuotaSpec::default() };
        let quotas = Quotas::new(common);
        let max = |name: &str, told_apart: bool| quotas.of(name, told_apart).in_flight_max.load(Ordering::Relaxed);
        assert!(Arc::ptr_eq(&quotas.of("a", true), &quotas.of("a", true)));
        assert!(!Arc::ptr_eq(&quotas.of("a", true), &quotas.of("b", true)));
        assert!(Arc::ptr_eq(&quotas.of("x", false), &quotas.of("y", false)));
        let held = quotas.of("a", true);
        quotas.set_own([("a".to_owned(), QuotaSpec { in_flight_max: 9, ..common })].into());
        assert_eq!((held.in_flight_max.load(Ordering::Relaxed), max("b", true), max("a", false)), (9, 5, 9));
        quotas.set_own(HashMap::new());
        assert_eq!(max("a", true), 5);
    }

    proptest! {
        #[test]
        fn in_any_stretch_of_time_a_tenant_gets_its_rate_and_a_second_more(
            rate in 1..5_000u64,
            steps in proptest::collection::vec((0..300u64, 0..200u64), 1..300),
        ) {
            let quota = Quota::new(&QuotaSpec { rows_per_second: rate, ..QuotaSpec::default() });
            let (mut now, mut given) = (0, Vec::new());
            for (wait, rows) in steps {
                now += wait;
                match quota.take(asked(rows, 0, 0), ms(now)) {
                    Ok(_) => given.push((now, rows)),
                    Err(refused) => {
                        let then = Moment(ms(now).0 + refused.retry_after.as_nanos() as u64);
                        prop_assert!(quota.take(asked(rows, 0, 0), Moment(then.0 - 1)).is_err());
                    }
                }
            }
            for (first, (since, _)) in given.iter().enumerate() {
                let (mut sum, mut largest) = (0, 0);
                for (until, rows) in &given[first..] {
                    sum += rows;
                    largest = largest.max(*rows);
                    let bound = rate as f64 * ((until - since) as f64 / 1e3) + (rate.max(largest)) as f64;
                    prop_assert!(sum as f64 <= bound + 1e-6, "{sum} in {} ms at {rate}", until - since);
                }
            }
        }
    }
}
