//! How long requests are: a distribution by its name, or the lines of a file.
//!
//! Always true
//! - Lengths are at least 1; what a contract does not allow is clipped to it by the user of this file, and counted.

use super::Rng;

/// A distribution of lengths.
#[derive(Clone, Debug, PartialEq)]
pub enum Lengths {
    Fixed(u32),
    /// Both ends included.
    Uniform(u32, u32),
    /// `mean` is the arithmetic mean before clipping at `max`; `sigma` is the deviation of the logarithm.
    LogNormal {
        mean: f64,
        sigma: f64,
        max: u32,
    },
    /// Two kinds of texts: around `short`, and this share around `long`, each with a deviation of a quarter.
    Bimodal {
        short: u32,
        long: u32,
        share: f64,
    },
    /// Taken in turn, from the first again after the last.
    List(Vec<u32>),
}

impl Lengths {
    /// Reads `fixed:64`, `uniform:8..128`, `lognormal:40,0.8,512`, `bimodal:16,256,0.15` or `file:F` (one length per line).
    pub fn parse(text: &str) -> Result<Lengths, String> {
        let wrong = || {
            format!(
                "expected fixed:64, uniform:8..128, lognormal:MEAN,SIGMA,MAX, bimodal:SHORT,LONG,SHARE-OF-LONG or file:F, \
                 got {text:?}"
            )
        };
        let (kind, rest) = text.split_once(':').ok_or_else(wrong)?;
        let positive = |text: &str| text.trim().parse::<u32>().ok().filter(|len| *len > 0);
        match kind {
            "fixed" => positive(rest).map(Lengths::Fixed).ok_or_else(wrong),
            "uniform" => {
                let (low, high) = rest.split_once("..").ok_or_else(wrong)?;
                match (positive(low), positive(high.trim_start_matches('='))) {
                    (Some(low), Some(high)) if low <= high => Ok(Lengths::Uniform(low, high)),
                    _ => Err(wrong()),
                }
            }
            "lognormal" => {
                let fields: Vec<&str> = rest.split(',').map(str::trim).collect();
                let [mean, sigma, max] = fields[..] else { return Err(wrong()) };
                match (mean.parse::<f64>(), sigma.parse::<f64>(), positive(max)) {
                    (Ok(mean), Ok(sigma), Some(max))
                        if mean > 0.0 && mean.is_finite() && sigma >= 0.0 && sigma.is_finite() =>
                    {
                        Ok(Lengths::LogNormal { mean, sigma, max })
                    }
                    _ => Err(wrong()),
                }
            }
            "bimodal" => {
                let fields: Vec<&str> = rest.split(',').map(str::trim).collect();
                let [short, long, share] = fields[..] else { return Err(wrong()) };
                match (positive(short), positive(long), share.parse::<f64>()) {
                    (Some(short), Some(long), Ok(share)) if short <= long && (0.0..=1.0).contains(&share) => {
                        Ok(Lengths::Bimodal { short, long, share })
                    }
                    _ => Err(wrong()),
                }
            }
            "file" => {
                let content = std::fs::read_to_string(rest).map_err(|error| format!("{rest}: {error}"))?;
                Lengths::from_lines(&content).map_err(|error| format!("{rest}: {error}"))
            }
            _ => Err(wrong()),
        }
    }

    pub fn from_lines(content: &str) -> Result<Lengths, String> {
        let mut lens = Vec::new();
        for (at, line) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            match line.trim().parse::<u32>() {
                Ok(len) if len > 0 => lens.push(len),
                _ => return Err(format!("line {}: expected a length of at least 1, got {line:?}", at + 1)),
            }
        }
        if lens.is_empty() {
            return Err("expected one length per line, got none".into());
        }
        Ok(Lengths::List(lens))
    }

    /// The endless sequence for a seed.
    pub fn sampler(&self, seed: u64) -> impl Iterator<Item = u32> + '_ {
        let mut rng = Rng::new(seed, 2);
        let mut turn = 0;
        std::iter::from_fn(move || {
            Some(match self {
                Lengths::Fixed(len) => *len,
                Lengths::Uniform(low, high) => rng.between((*low).into(), (*high).into()) as u32,
                Lengths::LogNormal { mean, sigma, max } => {
                    let mu = mean.ln() - sigma * sigma / 2.0;
                    ((mu + sigma * rng.normal()).exp().round() as u32).clamp(1, *max)
                }
                Lengths::Bimodal { short, long, share } => {
                    let center = if rng.unit() < *share { *long } else { *short };
                    let around = 1.0 + 0.25 * rng.normal().clamp(-3.0, 3.0);
                    (f64::from(center) * around).round().max(1.0) as u32
                }
                Lengths::List(lens) => {
                    turn += 1;
                    lens[(turn - 1) % lens.len()]
                }
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_nonsense_is_refused() {
        assert_eq!(Lengths::parse("fixed:64"), Ok(Lengths::Fixed(64)));
        assert_eq!(Lengths::parse("uniform:8..128"), Ok(Lengths::Uniform(8, 128)));
        assert_eq!(Lengths::parse("lognormal:40,0.8,512"), Ok(Lengths::LogNormal { mean: 40.0, sigma: 0.8, max: 512 }));
        for wrong in [
            "",
            "fixed",
            "fixed:0",
            "fixed:x",
            "uniform:9..3",
            "uniform:5",
            "lognormal:1,2",
            "lognormal:0,1,5",
            "bimodal:16,256",
            "bimodal:16,256,2",
            "bimodal:256,16,0.5",
            "zipf:3",
        ] {
            assert!(Lengths::parse(wrong).is_err(), "{wrong:?} was taken");
        }
        assert!(Lengths::from_lines("3\n\nx\n").expect_err("x is no length").contains("line 3"));
    }

    #[test]
    fn a_lognormal_has_the_arithmetic_mean_it_states() {
        let lengths = Lengths::LogNormal { mean: 40.0, sigma: 0.8, max: 100_000 };
        let sum: f64 = lengths.sampler(1).take(200_000).map(f64::from).sum();
        let mean = sum / 200_000.0;
        assert!((mean - 40.0).abs() < 0.5, "mean {mean}");
    }

    #[test]
    fn lengths_stay_within_their_bounds_and_repeat_with_the_seed() {
        let lengths = Lengths::LogNormal { mean: 40.0, sigma: 2.0, max: 64 };
        let lens: Vec<u32> = lengths.sampler(9).take(1000).collect();
        assert!(lens.iter().all(|len| (1..=64).contains(len)));
        assert_eq!(lens, lengths.sampler(9).take(1000).collect::<Vec<_>>());
        let uniform: Vec<u32> = Lengths::Uniform(8, 10).sampler(9).take(1000).collect();
        assert!((8..=10).all(|len| uniform.contains(&len)));
    }

    #[test]
    fn a_bimodal_has_two_modes_in_the_stated_shares() {
        let lengths = Lengths::parse("bimodal:16,256,0.15").expect("well formed");
        let lens: Vec<u32> = lengths.sampler(1).take(100_000).collect();
        let long = lens.iter().filter(|len| **len > 60).count();
        assert!((14_500..15_500).contains(&long), "{long} long ones");
        assert!(lens.iter().all(|len| (4..=28).contains(len) || (64..=448).contains(len)));
    }

    #[test]
    fn lines_come_in_turn() {
        let lengths = Lengths::from_lines("3\n5\n").expect("well formed");
        assert_eq!(lengths.sampler(1).take(5).collect::<Vec<_>>(), [3, 5, 3, 5, 3]);
    }
}
