//! What is left to remember of the keys attended to so far?
//!
//! The **attention state** of one query: running maximum of its scores, sum of their exponentials relative to
//! that maximum, and the values weighted by them. Every KV format folds its keys into the same state, so formats
//! never know each other, and any split of the tokens in any order gives the same answer (to rounding).
//! Scores are natural-log: weights are `e^(score - max)`.
//! Source: online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867; the merge as in FlashInfer (Ye et al.
//! 2025, arXiv 2501.01005, s. 2.2).

use crate::simd::Simd;

/// Attention states of `R` query rows over values of `D` channels.
#[derive(Clone, Debug)]
pub struct AttnState {
    /// `[R]`, the largest score folded in; `-inf` while empty.
    pub(crate) max: Vec<f32>,
    /// `[R]`, sum of `e^(score - max)`; 0 while empty.
    pub(crate) sum: Vec<f32>,
    /// `[R, D]`, sum of `e^(score - max) * value`.
    pub(crate) acc: Vec<f32>,
    channels: usize,
}

impl AttnState {
    /// Empty states for `rows` queries and values of `channels` elements.
    pub fn new(rows: usize, channels: usize) -> AttnState {
        assert!(rows > 0 && channels > 0, "a state of {rows} rows and {channels} channels holds nothing");
        AttnState {
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
            acc: vec![0.0; rows * channels],
            channels,
        }
    }

    /// Query rows, `R`.
    pub fn rows(&self) -> usize {
        self.max.len()
    }

    /// Value channels, `D`.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Logarithm of the sum of row `r`'s weights: what a score less this is the logarithm of, is its share.
    pub fn log_sum(&self, r: usize) -> f32 {
        self.max[r] + self.sum[r].ln()
    }

    /// Forgets everything, for reuse of the allocation.
    pub fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.acc.fill(0.0);
    }

    /// Folds `other` in: associative, commutative to rounding, and an empty state on either side is neutral.
    /// Both have the same rows and channels.
    pub fn merge(&mut self, other: &AttnState) {
        assert_eq!(
            (self.rows(), self.channels),
            (other.rows(), other.channels),
            "states of different shapes"
        );
        for r in 0..self.rows() {
            if other.max[r] == f32::NEG_INFINITY {
                continue;
            }
            let max = self.max[r].max(other.max[r]);
            let factor = |of: f32| if of == max { 1.0 } else { (of - max).exp() };
            let (a, b) = (factor(self.max[r]), factor(other.max[r]));
            let mine = &mut self.acc[r * self.channels..][..self.channels];
            for (x, y) in mine.iter_mut().zip(&other.acc[r * self.channels..]) {
                *x = *x * a + y * b;
            }
            self.sum[r] = self.sum[r] * a + other.sum[r] * b;
            self.max[r] = max;
        }
    }

    /// Replaces the accumulators `[R, C]` by `turn(acc, sums, out)`, which writes `[R, channels]`: how a segment's rotation and
    /// means are undone before its state meets others. Affine maps commute with the weighted mean, so the state stays
    /// exact, if what is added to every value is added `sums[r]` times.
    pub fn turned(&self, channels: usize, turn: impl Fn(&[f32], &[f32], &mut [f32])) -> AttnState {
        let mut out = AttnState::new(self.rows(), channels);
        out.max.copy_from_slice(&self.max);
        out.sum.copy_from_slice(&self.sum);
        turn(&self.acc, &self.sum, &mut out.acc);
        out
    }

    /// Writes the attention output, `acc / sum`, to `out` `[R, D]`; rows that attended to nothing give 0.
    pub fn finish(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.acc.len(), "output of the wrong length");
        let rows = out.chunks_exact_mut(self.channels).zip(self.acc.chunks_exact(self.channels));
        for ((to, from), &sum) in rows.zip(&self.sum) {
            let inverse = if sum > 0.0 { 1.0 / sum } else { 0.0 };
            to.iter_mut().zip(from).for_each(|(x, y)| *x = y * inverse);
        }
    }
}

/// The online-softmax step of one row over a batch of scores (a multiple of 16, padded with `-inf`, at least one
/// above it): turns them into weights relative to the new maximum, and returns the factor by which what was
/// accumulated under the old maximum must be multiplied.
#[inline(always)]
pub(crate) fn fold_scores<S: Simd>(s: S, scores: &mut [f32], max: &mut f32, sum: &mut f32) -> f32 {
    assert!(scores.len().is_multiple_of(16) && !scores.is_empty(), "a batch of {} scores", scores.len());
    let (batches, p) = (scores.len() / S::LANES, scores.as_mut_ptr());
    let mut top = s.splat(f32::NEG_INFINITY);
    for i in 0..batches {
        // SAFETY: i < len / LANES.
        top = s.max(top, unsafe { s.load(p.add(i * S::LANES)) });
    }
    let new = max.max(s.max_lanes(top));
    let (shift, mut total) = (s.splat(new), s.splat(0.0));
    for i in 0..batches {
        // SAFETY: i < len / LANES.
        let weight = s.exp(s.sub(unsafe { s.load(p.add(i * S::LANES)) }, shift));
        total = s.add(total, weight);
        // SAFETY: i < len / LANES.
        unsafe { s.store(p.add(i * S::LANES), weight) };
    }
    let rescale = (*max - new).exp();
    *sum = *sum * rescale + s.sum_lanes(total);
    *max = new;
    rescale
}
