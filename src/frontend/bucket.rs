//! How often something may happen. Pure: the time is an argument.

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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(at: u64) -> Moment {
        Moment(at * 1_000_000_000)
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
}
