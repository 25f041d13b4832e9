//! How far could a mean be off? Percentile bootstrap (Efron and Tibshirani 1993, *An Introduction to the Bootstrap*,
//! chapter 13) with a fixed seed: the same values give the same interval.

/// Resamples of an interval.
pub(super) const RESAMPLES: usize = 10_000;

/// Share of the resamples that an interval leaves out at each end: 95 % are inside.
const TAIL: f64 = 0.025;

/// The means of as many resamples, each of `values.len()` values drawn with replacement. Empty for no values.
pub(super) fn resampled_means(values: &[f64], seed: u64) -> Vec<f64> {
    let Some(&first) = values.first() else { return vec![] };
    if values.iter().all(|&value| value == first) {
        return vec![first; RESAMPLES];
    }
    let (count, mut random) = (values.len() as u64, SplitMix(seed));
    let draw = |bits: u64| values[(((bits & 0xffff_ffff) * count) >> 32) as usize];
    let mut resample = || {
        let (mut even, mut odd) = (0.0, 0.0);
        for _ in 0..values.len() / 2 {
            let bits = random.next();
            even += draw(bits);
            odd += draw(bits >> 32);
        }
        if values.len() % 2 == 1 {
            even += draw(random.next());
        }
        (even + odd) / values.len() as f64
    };
    (0..RESAMPLES).map(|_| resample()).collect()
}

/// The 95 % interval of a statistic from its resamples. None for none.
pub(super) fn interval(mut resamples: Vec<f64>) -> Option<(f64, f64)> {
    let last = resamples.len().checked_sub(1)?;
    let tail = (TAIL * resamples.len() as f64) as usize;
    let low = *resamples.select_nth_unstable_by(tail.min(last), f64::total_cmp).1;
    let high = *resamples.select_nth_unstable_by(last.saturating_sub(tail), f64::total_cmp).1;
    Some((low, high))
}

/// A seed for a task's resamples, so that methods meet the same resamples and tasks different ones (FNV-1a).
pub(super) fn seed(task: &str, length: usize) -> u64 {
    let bytes = task.bytes().chain((length as u64).to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_halves_it_is_the_binomial_distribution() {
        // 10 ones of 20: a resample's sum is Binomial(20, 1/2). P(<= 5) = 0.0207 and P(<= 6) = 0.0577, so the
        // 2.5 % quantile is 6 of 20, and by symmetry the 97.5 % quantile is 14 of 20.
        let values: Vec<f64> = (0..20).map(|i| f64::from(i % 2)).collect();
        let (low, high) = interval(resampled_means(&values, 1)).unwrap();
        assert!((low - 0.3).abs() < 1e-12 && (high - 0.7).abs() < 1e-12, "{low} {high}");
        let mut means = resampled_means(&values, 1);
        let mean = means.iter().sum::<f64>() / means.len() as f64;
        // Standard error: sqrt(1/4 / 20 / 10,000) = 0.0011.
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
        means.sort_by(f64::total_cmp);
        assert_eq!((means[250], means[9749]), (low, high));
        assert_eq!(resampled_means(&values, 1), resampled_means(&values, 1));
        assert_ne!(resampled_means(&values, 1), resampled_means(&values, 2));
    }

    #[test]
    fn odd_counts_and_edges() {
        assert_eq!(interval(resampled_means(&[], 1)), None);
        assert_eq!(interval(resampled_means(&[0.25], 1)), Some((0.25, 0.25)));
        // Of 0, 0, 1 a resample's mean is 0 with probability 8/27, so both ends are reached.
        assert_eq!(interval(resampled_means(&[0.0, 0.0, 1.0], 1)), Some((0.0, 1.0)));
        assert_ne!(seed("a", 1), seed("a", 2));
        assert_ne!(seed("a", 1), seed("b", 1));
    }

    #[test]
    fn about_95_of_100_intervals_hold_the_truth() {
        // Differences as paired scores have them: -1, 0 or 1, with a true mean of -0.1.
        let mut random = SplitMix(9);
        let (trials, mut held) = (400, 0);
        for trial in 0..trials {
            let draw = |u: u64| match u % 10 {
                0..2 => -1.0,
                2..3 => 1.0,
                _ => 0.0,
            };
            let values: Vec<f64> = (0..60).map(|_| draw(random.next() >> 8)).collect();
            let (low, high) = interval(resampled_means(&values, trial)).unwrap();
            held += usize::from(low <= -0.1 && -0.1 <= high);
        }
        let share = held as f64 / trials as f64;
        assert!((0.91..=0.98).contains(&share), "{share} of the intervals hold the true mean");
    }
}
