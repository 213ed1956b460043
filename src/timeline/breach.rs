//! When the flight recorder is kept by itself: an objective was missed, or a model panicked.
//!
//! Pure: time is an argument. Always true
//! - Two dumps are at least an interval apart, so that an overload does not spend its time on writing about it.

use std::time::Duration;

use crate::vocab::{ModelHandle, Moment};

/// What counts as missing a model's objective (`slo_ms`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BreachRule {
    /// More than one in a hundred requests of the last [`WINDOW`] took longer.
    #[default]
    P99,
    /// A single request took longer.
    Request,
    /// Nothing does.
    Off,
}

impl BreachRule {
    pub const ALL: [BreachRule; 3] = [BreachRule::P99, BreachRule::Request, BreachRule::Off];

    pub fn name(self) -> &'static str {
        match self {
            BreachRule::P99 => "p99",
            BreachRule::Request => "request",
            BreachRule::Off => "off",
        }
    }
}

/// Why a dump is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    Slo(ModelHandle),
    Panic(ModelHandle),
}

impl Why {
    /// In the name of a file.
    pub fn name(self) -> &'static str {
        match self {
            Why::Slo(_) => "slo",
            Why::Panic(_) => "panic",
        }
    }
}

/// Requests are counted for so long before the count begins anew.
pub const WINDOW: Duration = Duration::from_secs(5);
/// Fewer requests than this have no 99th percentile.
pub const REQUESTS_MIN: u64 = 100;

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    since: Moment,
    requests: u64,
    late: u64,
}

/// Counts late requests, model by model.
#[derive(Debug)]
pub struct BreachWatch {
    rule: BreachRule,
    interval: Duration,
    counts: Vec<Count>,
    quiet_until: Moment,
}

impl BreachWatch {
    pub fn new(rule: BreachRule, interval: Duration, models: usize) -> BreachWatch {
        BreachWatch { rule, interval, counts: vec![Count::default(); models], quiet_until: Moment::ZERO }
    }

    /// A batch of so many requests came back, `late` of them late. Says whether that is kept.
    ///
    /// Hot: once per batch.
    pub fn finished(
        &mut self,
        now: Moment,
        model: ModelHandle,
        requests: u32,
        late: u32,
        panicked: bool,
    ) -> Option<Why> {
        let count = &mut self.counts[model.index()];
        if now >= count.since + WINDOW {
            *count = Count { since: now, ..Count::default() };
        }
        count.requests += u64::from(requests);
        count.late += u64::from(late);
        let missed = match self.rule {
            BreachRule::Off => false,
            BreachRule::Request => late > 0,
            BreachRule::P99 => count.requests >= REQUESTS_MIN && count.late * 100 > count.requests,
        };
        let why = match (panicked, missed) {
            (true, _) => Why::Panic(model),
            (false, true) => Why::Slo(model),
            (false, false) => return None,
        };
        if now < self.quiet_until {
            return None;
        }
        self.quiet_until = now + self.interval;
        *count = Count { since: now, ..Count::default() };
        Some(why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: ModelHandle = ModelHandle(1);
    const INTERVAL: Duration = Duration::from_secs(60);

    fn second(at: u64) -> Moment {
        Moment(at * 1_000_000_000)
    }

    #[test]
    fn a_percentile_is_missed_when_more_than_one_in_a_hundred_is_late() {
        let mut watch = BreachWatch::new(BreachRule::P99, INTERVAL, 2);
        assert_eq!(watch.finished(second(1), MODEL, 50, 50, false), None, "too few to say");
        let mut watch = BreachWatch::new(BreachRule::P99, INTERVAL, 2);
        assert_eq!(watch.finished(second(1), MODEL, 200, 2, false), None, "one in a hundred");
        assert_eq!(watch.finished(second(2), ModelHandle(0), 200, 0, false), None, "another model");
        assert_eq!(watch.finished(second(2), MODEL, 10, 1, false), Some(Why::Slo(MODEL)));
    }

    #[test]
    fn who_was_late_long_ago_does_not_count() {
        let mut watch = BreachWatch::new(BreachRule::P99, INTERVAL, 2);
        watch.finished(second(1), MODEL, 90, 9, false);
        assert_eq!(watch.finished(second(7), MODEL, 110, 1, false), None);
    }

    #[test]
    fn one_late_request_is_enough_where_that_is_the_rule_and_none_where_it_is_off() {
        let mut watch = BreachWatch::new(BreachRule::Request, INTERVAL, 2);
        assert_eq!(watch.finished(second(1), MODEL, 1000, 0, false), None);
        assert_eq!(watch.finished(second(1), MODEL, 1000, 1, false), Some(Why::Slo(MODEL)));
        let mut watch = BreachWatch::new(BreachRule::Off, INTERVAL, 2);
        assert_eq!(watch.finished(second(1), MODEL, 1000, 1000, false), None);
    }

    #[test]
    fn dumps_are_an_interval_apart_whatever_they_are_for() {
        let mut watch = BreachWatch::new(BreachRule::Off, INTERVAL, 2);
        assert_eq!(watch.finished(second(1), MODEL, 1, 0, true), Some(Why::Panic(MODEL)));
        assert_eq!(watch.finished(second(60), ModelHandle(0), 1, 0, true), None);
        assert_eq!(watch.finished(second(61), ModelHandle(0), 1, 0, true), Some(Why::Panic(ModelHandle(0))));
    }
}
