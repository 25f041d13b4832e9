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
    let mut sums = vec![0.0; scores.len() / out.len()];
    log_sums(isa, scores, &mut sums);
    importance_of_runs(isa, scores, &[out.len()], &sums, out);
}

/// The logarithm of the sum of `e^score` of each row: `scores` `[R, n]`, `out` `[R]`.
pub fn log_sums(isa: Isa, scores: &[f32], out: &mut [f32]) {
    assert!(scores.len().is_multiple_of(out.len()), "scores are not {} rows", out.len());
    dispatch(isa, LogSums { scores, out });
}

/// [`importance`] of scores that were made in runs of blocks, one after the other: of each run `[R, n]`, with its `n`
/// in `runs` and its [`log_sums`] in `sums` `[runs, R]`. `out` `[B]` has the blocks of all runs.
pub fn importance_of_runs(isa: Isa, scores: &[f32], runs: &[usize], sums: &[f32], out: &mut [f32]) {
    let rows = scores.len() / out.len();
    assert_eq!(scores.len(), rows * out.len(), "scores are not {rows} rows of {}", out.len());
    assert_eq!(runs.iter().sum::<usize>(), out.len(), "blocks of all runs");
    assert_eq!(sums.len(), rows * runs.len(), "sums of all runs");
    let mut totals = vec![0.0; rows];
    for (row, total) in totals.iter_mut().enumerate() {
        let of_row = || sums.iter().skip(row).step_by(rows);
        let top = of_row().fold(f32::NEG_INFINITY, |top, &sum| top.max(sum));
        *total = top + of_row().map(|sum| (sum - top).exp()).sum::<f32>().ln();
    }
    dispatch(isa, Importance { scores, runs, totals: &totals, out });
}

struct LogSums<'a> {
    scores: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for LogSums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.scores.len() / self.out.len();
        for (row, out) in self.out.iter_mut().enumerate() {
            let scores = &self.scores[row * n..][..n];
            let top = largest(s, scores);
            *out = top + sum_of_exponentials(s, scores, top).ln();
        }
    }
}

struct Importance<'a> {
    scores: &'a [f32],
    runs: &'a [usize],
    totals: &'a [f32],
    out: &'a mut [f32],
}

/// Plain loops over slices: inside [`dispatch`] the compiler turns them into vectors of the instruction set.
impl Kernel for Importance<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let (mut scores, mut out) = (self.scores, self.out);
        for &n in self.runs {
            let (of_run, later) = scores.split_at(n * self.totals.len());
            let best = out.split_off_mut(..n).expect("blocks of all runs");
            best.fill(f32::NEG_INFINITY);
            for (row, total) in self.totals.iter().enumerate() {
                for (best, score) in best.iter_mut().zip(&of_run[row * n..][..n]) {
                    *best = best.max(score - total);
                }
            }
            scores = later;
        }
    }
}

#[inline(always)]
fn largest<S: Simd>(s: S, scores: &[f32]) -> f32 {
    let (chunks, rest) = scores.split_at(scores.len() / S::LANES * S::LANES);
    let mut tops = s.splat(f32::NEG_INFINITY);
    for chunk in chunks.chunks_exact(S::LANES) {
        // SAFETY: a chunk has LANES scores.
        tops = s.max(tops, unsafe { s.load(chunk.as_ptr()) });
    }
    let mut top = s.max_lanes(tops);
    for &score in rest {
        top = top.max(score);
    }
    top
}

/// The sum of `e^(score - top)`.
#[inline(always)]
fn sum_of_exponentials<S: Simd>(s: S, scores: &[f32], top: f32) -> f32 {
    let (chunks, rest) = scores.split_at(scores.len() / S::LANES * S::LANES);
    let mut sums = s.splat(0.0);
    for chunk in chunks.chunks_exact(S::LANES) {
        // SAFETY: a chunk has LANES scores.
        sums = s.add(sums, s.exp(s.sub(unsafe { s.load(chunk.as_ptr()) }, s.splat(top))));
    }
    let mut sum = s.sum_lanes(sums);
    for &score in rest {
        sum += (score - top).exp();
    }
    sum
}

/// The `k` indices of highest score (all of them if there are fewer), ascending. Ties go to the lower index, so
/// the choice depends on the scores alone. Scores are ordered by `f32::total_cmp`: `+NaN` counts as the
/// highest.
pub fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    top_tokens(scores, &[(scores.len(), 1)], k)
}

/// Like [`top_k`] for blocks of different sizes: `spans` are runs of blocks `(count, tokens of each)` that cover
/// `scores`. The best blocks, ascending, as many as it takes to hold at least `tokens` tokens (all of them if there are
/// fewer).
pub fn top_tokens(scores: &[f32], spans: &[(usize, usize)], tokens: usize) -> Vec<u32> {
    assert_eq!(spans.iter().map(|span| span.0).sum::<usize>(), scores.len(), "spans cover the scores");
    assert!(u32::try_from(scores.len()).is_ok(), "{} scores: indices are 32-bit", scores.len());
    if tokens == 0 {
        return Vec::new();
    }
    // The choice is of integers: it is the same with every instruction set.
    dispatch(Isa::current(), Choose { scores, spans, tokens })
}

struct Choose<'a> {
    scores: &'a [f32],
    spans: &'a [(usize, usize)],
    tokens: usize,
}

/// Plain loops over slices: inside [`dispatch`] the compiler turns them into vectors of the instruction set.
impl Kernel for Choose<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Vec<u32> {
        let mut keys = vec![0; self.scores.len()];
        for (key, score) in keys.iter_mut().zip(self.scores) {
            *key = rising(*score);
        }
        // The highest key such that the blocks from it on hold enough; those above it do not. Its bits from the
        // highest down, each set if the blocks from what that makes on still hold enough.
        let smallest = self.spans.iter().map(|span| span.1).min().unwrap_or(0);
        let mut last = 0u32;
        for bit in (0..u32::BITS).rev() {
            let candidate = last | 1 << bit;
            let tokens = held(&keys, self.spans, |key| key >= signed(candidate)).0;
            if tokens >= self.tokens {
                last = candidate;
                if tokens - smallest < self.tokens {
                    break; // Not one less would do: the search is over.
                }
            }
        }
        let last = signed(last);
        let (tokens, blocks) = held(&keys, self.spans, |key| key >= last);
        if tokens < self.tokens + smallest {
            return indices(&keys, blocks, |_, key| key >= last);
        }
        // All above it, and as many equal to it, from the front, as are still wanted.
        let mut sum = held(&keys, self.spans, |key| key > last).0;
        let mut ends = self.spans.iter().scan(0, |end, &(count, size)| {
            *end += count;
            Some((*end, size))
        });
        let mut span = (0, 0);
        indices(&keys, blocks, |i, key| {
            while i >= span.0 {
                span = ends.next().expect("spans cover the scores");
            }
            let tie = key == last && sum < self.tokens;
            sum += if tie { span.1 } else { 0 };
            key > last || tie
        })
    }
}

/// Indices of the keys to `take`, rising: at most `most`.
#[inline(always)]
fn indices(keys: &[i32], most: usize, mut take: impl FnMut(usize, i32) -> bool) -> Vec<u32> {
    // One more place: a loop without branches also writes what it does not take.
    let (mut out, mut n) = (vec![0; most + 1], 0);
    for (i, &key) in keys.iter().enumerate() {
        out[n] = i as u32;
        n += usize::from(take(i, key));
    }
    out.truncate(n);
    out
}

/// A number that orders like the scores by `f32::total_cmp`.
#[inline(always)]
fn rising(score: f32) -> i32 {
    let bits = score.to_bits() as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// The key that is the `order`-th of all.
#[inline(always)]
fn signed(order: u32) -> i32 {
    (order ^ 1 << 31) as i32
}

/// Tokens and number of the blocks whose keys are `wanted`.
#[inline(always)]
fn held(keys: &[i32], spans: &[(usize, usize)], wanted: impl Fn(i32) -> bool) -> (usize, usize) {
    let (mut tokens, mut blocks, mut before) = (0, 0, 0);
    for &(count, size) in spans {
        let mut n = 0u32;
        for &key in &keys[before..before + count] {
            n += u32::from(wanted(key));
        }
        before += count;
        tokens += n as usize * size;
        blocks += n as usize;
    }
    (tokens, blocks)
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

    #[test]
    fn importance_does_not_depend_on_the_runs() {
        let (rows, runs) = (3, [16, 5, 40]);
        let score = |row: usize, b: usize| ((row * 61 + b) as f32 * 0.7).sin() * 30.0;
        let whole: Vec<f32> = (0..rows * 61).map(|i| score(i / 61, i % 61)).collect();
        let (mut in_runs, mut sums) = (vec![], vec![0.0; rows * runs.len()]);
        for ((run, before), sums) in runs.iter().zip([0, 16, 21]).zip(sums.chunks_exact_mut(rows)) {
            let scores: Vec<f32> = (0..rows * run).map(|i| score(i / run, before + i % run)).collect();
            log_sums(Isa::current(), &scores, sums);
            in_runs.extend(scores);
        }
        let (mut want, mut got) = (vec![0.0; 61], vec![0.0; 61]);
        importance(Isa::current(), &whole, &mut want);
        importance_of_runs(Isa::current(), &in_runs, &runs, &sums, &mut got);
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-5, "{got} for {want}");
        }
    }

    use proptest::prelude::*;

    /// The slow way, blocks of different sizes: sort everything, and take until there is enough.
    fn sorted_tokens(scores: &[f32], spans: &[(usize, usize)], tokens: usize) -> Vec<u32> {
        let sizes: Vec<usize> = spans.iter().flat_map(|&(n, size)| std::iter::repeat_n(size, n)).collect();
        let (mut out, mut held) = (vec![], 0);
        for b in sorted_order(scores) {
            if held >= tokens {
                break;
            }
            held += sizes[b as usize];
            out.push(b);
        }
        out.sort_unstable();
        out
    }

    fn sorted_order(scores: &[f32]) -> Vec<u32> {
        let mut order: Vec<u32> = (0..scores.len() as u32).collect();
        order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
        order
    }

    /// The slow way: sort everything.
    fn sorted(scores: &[f32], k: usize) -> Vec<u32> {
        let mut order = sorted_order(scores);
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
        fn blocks_of_different_sizes(
            spans in prop::collection::vec((0usize..40, prop::sample::select(vec![4usize, 8, 16])), 0..5),
            seed in any::<u32>(), tokens in 0usize..900,
        ) {
            let count: usize = spans.iter().map(|span| span.0).sum();
            let scores: Vec<f32> =
                (0..count as u32).map(|i| ((i ^ seed).wrapping_mul(0x9e37_79b9) >> 28) as f32).collect();
            prop_assert_eq!(top_tokens(&scores, &spans, tokens), sorted_tokens(&scores, &spans, tokens));
        }

        #[test]
        fn any_float_is_ordered(scores in prop::collection::vec(any::<u32>().prop_map(f32::from_bits), 0..50),
                                k in 0usize..50) {
            prop_assert_eq!(top_k(&scores, k), sorted(&scores, k));
        }
    }
}
