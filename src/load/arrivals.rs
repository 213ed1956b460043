//! When requests are meant to be sent: pure functions of rate, shape and seed.
//!
//! Always true
//! - Moments are nanoseconds since the start of the run and never decrease.
//! - The mean rate is the stated one, whatever the shape.

use super::Rng;

/// Time between bursts.
const BURST_EVERY_S: f64 = 0.1;

/// The shape of open-loop arrivals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Arrival {
    /// Independent callers: exponential gaps.
    #[default]
    Poisson,
    /// Equal gaps.
    Constant,
    /// Ten times per second, all arrivals of that tenth at once.
    Burst,
}

impl Arrival {
    pub fn name(self) -> &'static str {
        match self {
            Arrival::Poisson => "poisson",
            Arrival::Constant => "constant",
            Arrival::Burst => "burst",
        }
    }
}

impl std::str::FromStr for Arrival {
    type Err = String;

    fn from_str(text: &str) -> Result<Arrival, String> {
        [Arrival::Poisson, Arrival::Constant, Arrival::Burst]
            .into_iter()
            .find(|arrival| arrival.name() == text)
            .ok_or_else(|| format!("expected poisson, constant or burst, got {text:?}"))
    }
}

/// The endless sequence of intended moments.
#[derive(Clone, Debug)]
pub struct Schedule {
    arrival: Arrival,
    rate: f64,
    rng: Rng,
    count: u64,
    at_s: f64,
}

impl Schedule {
    pub fn new(arrival: Arrival, rate: f64, seed: u64) -> Schedule {
        assert!(rate > 0.0 && rate.is_finite(), "the rate was checked when it was read");
        Schedule { arrival, rate, rng: Rng::new(seed, 1), count: 0, at_s: 0.0 }
    }
}

impl Iterator for Schedule {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.count += 1;
        let at_s = match self.arrival {
            Arrival::Poisson => {
                self.at_s += -(1.0 - self.rng.unit()).ln() / self.rate;
                self.at_s
            }
            // Computed from the count, so that no rounding error adds up over hours.
            Arrival::Constant => self.count as f64 / self.rate,
            // At the end of the time in which they would have come: the k-th burst brings what is due by then.
            Arrival::Burst => (self.count as f64 / self.rate / BURST_EVERY_S).ceil() * BURST_EVERY_S,
        };
        Some((at_s * 1e9) as u64)
    }
}

/// Recorded arrivals: when, and how long the request was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Nanoseconds since the first, and length; ascending.
    pub arrivals: std::sync::Arc<Vec<(u64, u32)>>,
}

impl Trace {
    /// Reads lines `microseconds,length`; a first line of names, empty lines and lines that begin with # are skipped.
    pub fn parse(text: &str) -> Result<Trace, String> {
        let mut arrivals = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut fields = line.split(',').map(str::trim);
            let parsed = fields
                .next()
                .and_then(|field| field.parse::<u64>().ok())
                .zip(fields.next().map_or(Some(1), |field| field.parse::<u32>().ok()));
            match parsed {
                Some((micros, len)) => arrivals.push((micros.saturating_mul(1000), len)),
                None if arrivals.is_empty() && at == 0 => {}
                None => return Err(format!("line {}: expected microseconds,length, got {line:?}", at + 1)),
            }
        }
        let Some((first, _)) = arrivals.iter().min().copied() else {
            return Err("the trace has no arrivals".into());
        };
        arrivals.sort_by_key(|(at, _)| *at);
        for (at, _) in &mut arrivals {
            *at -= first;
        }
        Ok(Trace { arrivals: arrivals.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until(arrival: Arrival, rate: f64, seed: u64, seconds: f64) -> Vec<u64> {
        Schedule::new(arrival, rate, seed).take_while(|at| *at <= (seconds * 1e9) as u64).collect()
    }

    #[test]
    fn every_shape_has_the_stated_rate() {
        for arrival in [Arrival::Poisson, Arrival::Constant, Arrival::Burst] {
            let count = until(arrival, 5000.0, 7, 20.0).len() as f64;
            // Five standard deviations of a Poisson count of 100,000.
            assert!((count - 100_000.0).abs() < 1600.0, "{arrival:?} made {count}");
        }
    }

    #[test]
    fn equal_seeds_give_equal_arrivals_and_others_do_not() {
        let first = until(Arrival::Poisson, 1000.0, 3, 1.0);
        assert_eq!(first, until(Arrival::Poisson, 1000.0, 3, 1.0));
        assert_ne!(first, until(Arrival::Poisson, 1000.0, 4, 1.0));
    }

    #[test]
    fn poisson_gaps_vary_as_much_as_they_are_long() {
        let at = until(Arrival::Poisson, 1000.0, 5, 50.0);
        let gaps: Vec<f64> = at.windows(2).map(|pair| (pair[1] - pair[0]) as f64).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.03, "exponential gaps have deviation = mean");
    }

    #[test]
    fn a_burst_comes_all_at_once() {
        let at = until(Arrival::Burst, 1000.0, 1, 1.0);
        let distinct: std::collections::BTreeSet<u64> = at.iter().copied().collect();
        assert_eq!(at.len(), 1000);
        assert_eq!(distinct.len(), 10);
    }

    #[test]
    fn a_trace_starts_at_its_first_arrival() {
        let trace = Trace::parse("at_us,len\n1500,8\n1000,4\n\n# end\n").expect("well formed");
        assert_eq!(*trace.arrivals, [(0, 4), (500_000, 8)]);
        assert!(Trace::parse("1000,4\nx,y\n").expect_err("line 2 is not numbers").contains("line 2"));
        assert!(Trace::parse("").is_err());
    }
}
