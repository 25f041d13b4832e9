//! Which token blocks does a step attend to?
//!
//! Scores of the queries that share a KV head become one importance a block, and the k best are chosen. It knows no
//! format: a score is a number, a block is its index.

use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};

/// The queries of a GQA group share what is read, so a block is as important as it is to the query that wants it
/// most: the largest log-probability among the block keys over the rows of `scores` `[R, B]`. Writes `[B]`.
pub fn importance(isa: Isa, scores: &[f32], out: &mut [f32]) {
    assert!(
        !out.is_empty() && scores.len().is_multiple_of(out.len()),
        "scores are not rows of {}",
        out.len()
    );
    out.fill(f32::NEG_INFINITY);
    for row in scores.chunks_exact(out.len()) {
        dispatch(isa, Importance { row, out });
    }
}

struct Importance<'a> {
    row: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Importance<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (chunks, rest) = self.row.split_at(self.row.len() / S::LANES * S::LANES);
        let mut tops = s.splat(f32::NEG_INFINITY);
        for chunk in chunks.chunks_exact(S::LANES) {
            // SAFETY: a chunk has LANES scores.
            tops = s.max(tops, unsafe { s.load(chunk.as_ptr()) });
        }
        let mut top = s.max_lanes(tops);
        for &score in rest {
            top = top.max(score);
        }
        let mut sums = s.splat(0.0);
        for chunk in chunks.chunks_exact(S::LANES) {
            // SAFETY: a chunk has LANES scores.
            sums = s.add(sums, s.exp(s.sub(unsafe { s.load(chunk.as_ptr()) }, s.splat(top))));
        }
        let mut sum = s.sum_lanes(sums);
        for &score in rest {
            sum += (score - top).exp();
        }
        let total = top + sum.ln();
        for (out, score) in self.out.iter_mut().zip(self.row) {
            *out = out.max(score - total);
        }
    }
}

/// The `k` indices of highest score (all of them if there are fewer), ascending. Ties go to the lower index, so
/// the choice depends on the scores alone. Scores are ordered by `f32::total_cmp`: `+NaN` counts as the
/// highest.
pub fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    assert!(u32::try_from(scores.len()).is_ok(), "{} scores: indices are 32-bit", scores.len());
    let k = k.min(scores.len());
    if k == 0 {
        return Vec::new();
    }
    // A smaller rank is better; ranks are distinct because the index is a part of them. The k-th best rank
    // then splits the list, and one more walk over the scores finds the winners in order.
    let mut ranks: Vec<u64> = scores.iter().enumerate().map(|(i, &s)| rank(s, i)).collect();
    let last = *ranks.select_nth_unstable(k - 1).1;
    let mut out = Vec::with_capacity(k);
    out.extend(scores.iter().enumerate().filter(|&(i, &s)| rank(s, i) <= last).map(|(i, _)| i as u32));
    out
}

/// Like [`top_k`] for blocks of different sizes: `spans` are runs of blocks `(count, tokens of each)` that cover
/// `scores`. The best blocks, ascending, as many as it takes to hold at least `tokens` tokens (all of them if there are
/// fewer).
pub fn top_tokens(scores: &[f32], spans: &[(usize, usize)], tokens: usize) -> Vec<u32> {
    assert_eq!(spans.iter().map(|span| span.0).sum::<usize>(), scores.len(), "spans cover the scores");
    if let [(_, size)] = spans {
        return top_k(scores, tokens.div_ceil(*size));
    }
    let sizes = spans.iter().flat_map(|&(count, size)| std::iter::repeat_n(size, count));
    let mut ranks: Vec<(u64, usize)> =
        scores.iter().zip(sizes).enumerate().map(|(i, (&s, size))| (rank(s, i), size)).collect();
    ranks.sort_unstable();
    let enough = ranks.iter().scan(0, |held, (_, size)| (*held < tokens).then(|| *held += size)).count();
    let mut out: Vec<u32> = ranks[..enough].iter().map(|&(rank, _)| rank as u32).collect();
    out.sort_unstable();
    out
}

/// Orders by falling score, then by rising index.
#[inline(always)]
fn rank(score: f32, index: usize) -> u64 {
    let bits = score.to_bits();
    // Rising order of floats as unsigned integers: flip all of a negative number, the sign of the others.
    let rising = bits ^ (((bits as i32 >> 31) as u32) | 1 << 31);
    u64::from(!rising) << 32 | index as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn importance_is_the_best_log_probability_on_every_isa() {
        for &isa in Isa::available() {
            for blocks in [1, 5, 16, 37, 300] {
                let scores: Vec<f32> = (0..3 * blocks).map(|i| (i as f32 * 0.7).sin() * 30.0).collect();
                let mut out = vec![0.0; blocks];
                importance(isa, &scores, &mut out);
                for (b, got) in out.iter().enumerate() {
                    let of_row = |row: &[f32]| {
                        let sum: f64 = row.iter().map(|&s| f64::from(s).exp()).sum();
                        f64::from(row[b]) - sum.ln()
                    };
                    let want = scores.chunks_exact(blocks).map(of_row).fold(f64::NEG_INFINITY, f64::max);
                    assert!((f64::from(*got) - want).abs() < 1e-4, "{isa:?}, block {b}: {got} for {want}");
                }
            }
        }
    }

    use proptest::prelude::*;

    /// The slow way: sort everything.
    fn sorted(scores: &[f32], k: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..scores.len() as u32).collect();
        order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
        order.truncate(k);
        order.sort_unstable();
        order
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(top_k(&[1.0, 2.0, 1.0, 2.0, 1.0], 3), [0, 1, 3]);
        assert_eq!(top_k(&[0.0, -0.0, 0.0], 2), [0, 2]);
        assert_eq!(top_k(&[f32::NEG_INFINITY; 3], 2), [0, 1]);
    }

    #[test]
    fn more_than_there_are_and_none() {
        assert_eq!(top_k(&[3.0, 1.0], 9), [0, 1]);
        assert!(top_k(&[], 4).is_empty() && top_k(&[1.0], 0).is_empty());
    }

    proptest! {
        #[test]
        fn same_as_sorting(scores in prop::collection::vec(prop_oneof![
            3 => -4i8..4, 1 => any::<i8>()], 0..300), k in 0usize..320) {
            let scores: Vec<f32> = scores.iter().map(|&s| f32::from(s) / 3.0).collect();
            prop_assert_eq!(top_k(&scores, k), sorted(&scores, k));
        }

        #[test]
        fn any_float_is_ordered(scores in prop::collection::vec(any::<u32>().prop_map(f32::from_bits), 0..50),
                                k in 0usize..50) {
            prop_assert_eq!(top_k(&scores, k), sorted(&scores, k));
        }
    }
}
