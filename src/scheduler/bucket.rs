//! Allowed padded lengths.

/// Ascending and never empty: checked here, relied on everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buckets(Vec<u32>);

/// Why a list is no list of buckets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BucketsError {
    Empty,
    Zero,
    NotAscending(Vec<u32>),
    TooMany(usize),
}

impl std::fmt::Display for BucketsError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BucketsError::Empty => write!(f, "expected at least one bucket"),
            BucketsError::Zero => write!(f, "a bucket of length 0 holds nothing"),
            BucketsError::NotAscending(lens) => write!(f, "expected ascending buckets, got {lens:?}"),
            BucketsError::TooMany(count) => write!(f, "expected at most {} buckets, got {count}", Buckets::COUNT_MAX),
        }
    }
}

impl std::error::Error for BucketsError {}

impl Buckets {
    pub const COUNT_MAX: usize = 256;

    pub fn new(lens: &[u32]) -> Result<Buckets, BucketsError> {
        match lens {
            [] => Err(BucketsError::Empty),
            [0, ..] => Err(BucketsError::Zero),
            _ if lens.len() > Buckets::COUNT_MAX => Err(BucketsError::TooMany(lens.len())),
            _ if !lens.is_sorted_by(|a, b| a < b) => Err(BucketsError::NotAscending(lens.to_vec())),
            _ => Ok(Buckets(lens.to_vec())),
        }
    }

    /// Steps of an eighth of the length's power of two, so that padding to a bucket costs at most an eighth: 1, 2 … 8,
    /// 9, 10 … 16, 18, 20 …. The last bucket is `max`.
    pub fn geometric(max: u32) -> Buckets {
        let max = max.max(1);
        let mut lens = Vec::new();
        let mut len = 1u32;
        while len < max {
            lens.push(len);
            let step = ((1u32 << len.ilog2()) / 8).max(1);
            len = len.saturating_add(step);
        }
        lens.push(max);
        // Long models would get more than the limit only beyond 2^30; keep the longest then.
        let skip = lens.len().saturating_sub(Buckets::COUNT_MAX);
        Buckets(lens.split_off(skip))
    }

    /// The smallest bucket that holds `len`.
    pub fn of(&self, len: u32) -> Option<u16> {
        let at = self.0.partition_point(|bucket| *bucket < len);
        (at < self.0.len()).then_some(at as u16)
    }

    /// Padded length of a bucket.
    pub fn len_at(&self, bucket: u16) -> u32 {
        self.0[usize::from(bucket)]
    }

    pub fn longest(&self) -> u32 {
        *self.0.last().expect("Buckets::new refuses an empty list")
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        false
    }

    pub fn lens(&self) -> &[u32] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_goes_to_the_smallest_bucket_that_holds_it() {
        let buckets = Buckets::new(&[8, 16, 64]).expect("ascending");
        assert_eq!(buckets.of(1), Some(0));
        assert_eq!(buckets.of(8), Some(0));
        assert_eq!(buckets.of(9), Some(1));
        assert_eq!(buckets.of(64), Some(2));
        assert_eq!(buckets.of(65), None);
    }

    #[test]
    fn lists_that_are_no_buckets_are_refused() {
        assert_eq!(Buckets::new(&[]), Err(BucketsError::Empty));
        assert_eq!(Buckets::new(&[0, 1]), Err(BucketsError::Zero));
        assert_eq!(Buckets::new(&[4, 4]), Err(BucketsError::NotAscending(vec![4, 4])));
    }

    #[test]
    fn geometric_buckets_step_by_an_eighth_of_the_power_of_two_below() {
        assert_eq!(
            Buckets::geometric(24).lens(),
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24]
        );
    }

    #[test]
    fn geometric_buckets_waste_at_most_an_eighth() {
        for max in [1, 7, 256, 1 << 20, u32::MAX] {
            let buckets = Buckets::geometric(max);
            assert_eq!(buckets.longest(), max);
            assert!(buckets.len() <= Buckets::COUNT_MAX, "{} buckets", buckets.len());
            assert!(Buckets::new(buckets.lens()).is_ok());
            for pair in buckets.lens().windows(2) {
                assert!(f64::from(pair[1] - pair[0]) <= f64::from(pair[1]) / 8.0 + 1.0, "{pair:?}");
            }
        }
    }
}
