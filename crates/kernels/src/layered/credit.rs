//! What does a query's attention say of the errors of each token?
//!
//! Sampled queries meet all keys as bytes; their attention and outputs come from these scores. A query that gives token `j`
//! the weight `a` adds `a^2` to what its value weighs, and `a^2 |v - o|^2` to what its key does. Queries go in blocks
//! whose scores stay in the cache: scores, then exponentials and outputs, then what they add to each token.

#![expect(clippy::needless_range_loop, reason = "indices over arrays of registers read as the formula does")]

use super::choose;
use super::queries::Queries;
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};

/// Channels of values, the first ones, in which outputs are compared with values; of the others a value's own square is
/// taken.
const COMPARED: usize = 16;

/// Tokens that lie together, lane by lane.
const TILE: usize = 16;

/// Tokens are filled up to a multiple of this.
const STEP: usize = 64;

/// Tokens whose values stay in the innermost cache while all queries of a block read them.
const CHUNK: usize = 4 * STEP;

/// Queries of a block.
const ROWS: usize = 16;

/// Keys and values of one head, as queries judge them.
#[derive(Clone, Debug)]
pub struct Judged {
    head_dim: usize,
    tokens: usize,
    /// Four bytes of a key each, with their highest bits flipped: `[T / 16, D / 4, 16]`, `T` filled up.
    keys: Vec<u32>,
    /// What a byte's step of each key stands for, `[T]`.
    steps: Vec<f32>,
    /// `[T / 16, COMPARED, 16]`
    values: Vec<f32>,
    /// `|v|^2`, `[T]`
    squares: Vec<f32>,
}

impl Judged {
    /// Of keys `[T, D]`, and values `[T, D]` in channels of falling variance whose distances are those of outputs. `D` is a
    /// multiple of 8 up to 256.
    pub fn new(isa: Isa, keys: &[f32], values: &[f32], d: usize) -> Judged {
        let tokens = keys.len() / d;
        assert!(keys.len() == tokens * d && values.len() == keys.len(), "keys and values are not [T, {d}]");
        let padded = tokens.next_multiple_of(STEP);
        let mut new = Judged {
            head_dim: d,
            tokens,
            keys: vec![0x8080_8080; padded * d / 4],
            steps: vec![0.0; padded],
            values: vec![0.0; padded * COMPARED],
            squares: vec![0.0; padded],
        };
        let mut rounded = Queries::default();
        for (tile, part) in keys.chunks(TILE * d).enumerate() {
            rounded.set(isa, part, &[0.0; TILE][..part.len() / d]);
            let words = &mut new.keys[tile * TILE * d / 4..][..TILE * d / 4];
            for lane in 0..rounded.rows() {
                let (bytes, step, _) = rounded.row(lane);
                new.steps[tile * TILE + lane] = step;
                for (four, to) in bytes.chunks_exact(4).zip(words.chunks_exact_mut(TILE)) {
                    let word = [four[0] as u8, four[1] as u8, four[2] as u8, four[3] as u8];
                    to[lane] = u32::from_le_bytes(word) ^ 0x8080_8080;
                }
            }
        }
        for (t, value) in values.chunks_exact(d).enumerate() {
            new.squares[t] = value.iter().map(|x| x * x).sum();
            let to = &mut new.values[t / TILE * TILE * COMPARED..][..TILE * COMPARED];
            for (x, to) in value.iter().zip(to.chunks_exact_mut(TILE)) {
                to[t % TILE] = *x;
            }
        }
        new
    }
}

/// Adds what the attention of `queries` `[R, D]`, the attention scale included, says of all tokens `T` to what errors of
/// `keys` and `values` weigh, `[T]` each. Query `r` attends to the first `visible[r]` tokens, and judges all of them but
/// the last `near`; `visible` must not fall. A score is off by what the bytes of queries and keys are.
///
/// # Panics
/// If a shape does not fit, or a query sees no token or too many.
pub fn credit(
    isa: Isa,
    judged: &Judged,
    (queries, visible): (&[f32], &[usize]),
    near: usize,
    (keys, values): (&mut [f32], &mut [f32]),
) {
    let (d, tokens) = (judged.head_dim, judged.tokens);
    assert_eq!(queries.len(), visible.len() * d, "queries are not [{}, {d}]", visible.len());
    assert!(keys.len() == tokens && values.len() == tokens, "weights are not of {tokens} tokens");
    assert!(visible.is_sorted() && visible.iter().all(|v| (1..=tokens).contains(v)), "of {tokens} tokens");
    let mut out = [vec![0.0; judged.steps.len()], vec![0.0; judged.steps.len()]];
    let (mut scores, mut rounded) = (vec![], Queries::default());
    for (queries, visible) in queries.chunks(ROWS * d).zip(visible.chunks(ROWS)) {
        rounded.set(isa, queries, &[0.0; ROWS][..visible.len()]);
        let width = visible[visible.len() - 1].next_multiple_of(STEP);
        // What is left there is written before it is read.
        scores.resize(scores.len().max(visible.len() * width), 0.0);
        let scores = &mut scores[..visible.len() * width];
        dispatch(isa, Credit { judged, queries: &rounded, visible, near, scores, out: &mut out });
    }
    for (to, from) in [keys, values].into_iter().zip(&out) {
        to.iter_mut().zip(from).for_each(|(to, x)| *to += x);
    }
}

/// One block.
struct Credit<'a> {
    judged: &'a Judged,
    queries: &'a Queries,
    /// `[R]`, not falling.
    visible: &'a [usize],
    near: usize,
    /// `[R, W]`, `W` the last of `visible` filled up to a multiple of [`STEP`].
    scores: &'a mut [f32],
    /// Of keys and values, `[T]` filled up.
    out: &'a mut [Vec<f32>; 2],
}

/// The output of a query as it meets values.
#[derive(Clone, Copy)]
struct Output {
    /// Times -2.
    channels: [f32; COMPARED],
    square: f32,
    /// 1 over the sum of exponentials.
    inverse: f32,
}

impl Kernel for Credit<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (rows, width) = (self.visible.len(), self.scores.len() / self.visible.len());
        for first in (0..width).step_by(STEP) {
            let mut row = 0;
            while row < rows {
                row += match rows - row {
                    1 => score::<S, 1>(s, &mut self, (row, first)),
                    2 => score::<S, 2>(s, &mut self, (row, first)),
                    3 => score::<S, 3>(s, &mut self, (row, first)),
                    _ => score::<S, 4>(s, &mut self, (row, first)),
                };
            }
        }
        let outputs = outputs(s, &mut self);
        for (row, visible) in self.scores.chunks_exact_mut(width).zip(self.visible) {
            let judged = visible.saturating_sub(self.near);
            row[judged..judged.next_multiple_of(TILE)].fill(0.0);
        }
        add(s, &mut self, &outputs);
    }
}

/// The scores of rows `row..row + R` at tokens `first..first + STEP`; returns `R`.
#[inline(always)]
fn score<S: Simd, const R: usize>(s: S, a: &mut Credit, (row, first): (usize, usize)) -> usize {
    match S::LANES {
        16 => strips::<S, R, 4>(s, a, (row, first)),
        _ => {
            for at in (first..first + STEP).step_by(2 * S::LANES) {
                strips::<S, R, 2>(s, a, (row, at));
            }
        }
    }
    R
}

/// The same of `N * LANES` tokens.
#[inline(always)]
fn strips<S: Simd, const R: usize, const N: usize>(s: S, a: &mut Credit, (row, first): (usize, usize)) {
    let (d, width) = (a.judged.head_dim, a.scores.len() / a.visible.len());
    assert!(first + N * S::LANES <= width && width <= a.judged.steps.len() && row + R <= a.visible.len());
    let mut starts = [std::ptr::null::<u32>(); N];
    for n in 0..N {
        let t = first + n * S::LANES;
        starts[n] = a.judged.keys[t / TILE * TILE * d / 4 + t % TILE..].as_ptr();
    }
    let (mut sums, mut bytes) = ([[s.splat_i32(0); N]; R], [&[0i8][..]; R]);
    for r in 0..R {
        bytes[r] = &a.queries.bytes(row + r)[..d];
        sums[r] = [s.dot_full_start(a.queries.sum(row + r, d / super::GROUP)); N];
    }
    for i in 0..d / 4 {
        let mut words = [s.splat_i32(0); N];
        for n in 0..N {
            // SAFETY: a tile has D / 4 lines of 16 words; LANES divides 16, and all tokens here lie in tiles that are there.
            words[n] = unsafe { s.load_bytes(starts[n].add(i * TILE).cast()) };
        }
        for r in 0..R {
            // SAFETY: the bytes are D, and i < D / 4.
            let four = s.splat_i32(unsafe { bytes[r].as_ptr().add(4 * i).cast::<i32>().read_unaligned() });
            for n in 0..N {
                sums[r][n] = s.dot_full(sums[r][n], words[n], four);
            }
        }
    }
    for r in 0..R {
        let step = s.splat(a.queries.row(row + r).1);
        for n in 0..N {
            let t = first + n * S::LANES;
            // SAFETY: the tokens are below the width, which is at most the number of steps; asserted above.
            unsafe {
                let scale = s.mul(step, s.load(a.judged.steps.as_ptr().add(t)));
                let to = a.scores.as_mut_ptr().add((row + r) * width + t);
                s.store(to, s.mul(s.to_f32(sums[r][n]), scale));
            }
        }
    }
}

/// Scores become exponentials, as far as tokens are visible and to the end of their chunk, and these outputs.
#[inline(always)]
fn outputs<S: Simd>(s: S, a: &mut Credit) -> [Output; ROWS] {
    let (rows, width) = (a.visible.len(), a.scores.len() / a.visible.len());
    assert!(rows <= ROWS && width.is_multiple_of(STEP) && width * COMPARED <= a.judged.values.len());
    let mut tops = [0.0; ROWS];
    for (r, row) in a.scores.chunks_exact_mut(width).enumerate() {
        let (visible, hidden) = row.split_at_mut(a.visible[r]);
        tops[r] = choose::largest(s, visible, f32::MIN);
        hidden.fill(f32::NEG_INFINITY);
    }
    let (mut sums, mut channels) = ([s.splat(0.0); ROWS], [[s.splat(0.0); COMPARED]; ROWS]);
    for chunk in (0..width).step_by(CHUNK) {
        for r in 0..rows {
            let (mut sum, mut of_row) = (sums[r], channels[r]);
            let end = a.visible[r].next_multiple_of(TILE).min(chunk + CHUNK);
            for t in (chunk..end).step_by(S::LANES) {
                // SAFETY: LANES divides TILE and `end` is at most the width, a multiple of it; tiles of values are as many.
                unsafe {
                    let at = a.scores.as_mut_ptr().add(r * width + t);
                    let e = s.exp(s.sub(s.load(at), s.splat(tops[r])));
                    s.store(at, e);
                    sum = s.add(sum, e);
                    let values = a.judged.values.as_ptr().add(t / TILE * TILE * COMPARED + t % TILE);
                    for c in 0..COMPARED {
                        of_row[c] = s.fma(s.load(values.add(c * TILE)), e, of_row[c]);
                    }
                }
            }
            (sums[r], channels[r]) = (sum, of_row);
        }
    }
    let mut out = [Output { channels: [0.0; COMPARED], square: 0.0, inverse: 0.0 }; ROWS];
    for r in 0..rows {
        let inverse = 1.0 / s.sum_lanes(sums[r]);
        let of_row = s.sum_lanes16(channels[r]);
        for c in 0..COMPARED {
            let x = of_row[c] * inverse;
            out[r].channels[c] = -2.0 * x;
            out[r].square += x * x;
        }
        out[r].inverse = inverse;
    }
    out
}

/// Adds to the weights what the exponentials say, those of tokens that a row judges.
#[inline(always)]
fn add<S: Simd>(s: S, a: &mut Credit, outputs: &[Output; ROWS]) {
    let (rows, width) = (a.visible.len(), a.scores.len() / a.visible.len());
    let [keys, values] = a.out;
    assert!(rows <= ROWS && width <= keys.len() && width <= values.len());
    assert!(width <= a.judged.squares.len() && width * COMPARED <= a.judged.values.len());
    let mut row = 0;
    for t in (0..width).step_by(S::LANES) {
        while row < rows && a.visible[row].saturating_sub(a.near) <= t {
            row += 1;
        }
        if row == rows {
            break;
        }
        // SAFETY: t + LANES is at most the width, a multiple of LANES, which no row and no tile is below: asserted above.
        unsafe {
            let mut of_value = [s.splat(0.0); COMPARED];
            let from = a.judged.values.as_ptr().add(t / TILE * TILE * COMPARED + t % TILE);
            for c in 0..COMPARED {
                of_value[c] = s.load(from.add(c * TILE));
            }
            let square = s.load(a.judged.squares.as_ptr().add(t));
            let (to_keys, to_values) = (keys.as_mut_ptr().add(t), values.as_mut_ptr().add(t));
            let (mut key, mut value) = (s.load(to_keys), s.load(to_values));
            for r in row..rows {
                let output = &outputs[r];
                let mut distance = s.add(square, s.splat(output.square));
                for c in 0..COMPARED {
                    distance = s.fma(of_value[c], s.splat(output.channels[c]), distance);
                }
                let weight = s.mul(s.load(a.scores.as_ptr().add(r * width + t)), s.splat(output.inverse));
                let weight = s.mul(weight, weight);
                key = s.fma(weight, s.max(distance, s.splat(0.0)), key);
                value = s.add(value, weight);
            }
            s.store(to_keys, key);
            s.store(to_values, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(seed: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + seed * 13) as f32 * 0.37 + (i as f32 * 0.011).cos()).sin()).collect()
    }

    /// Rows `[N, D]` as their bytes stand for them.
    fn rounded(x: &[f32], d: usize) -> Vec<Vec<f64>> {
        let rounded = Queries::new(Isa::current(), x, &vec![0.0; x.len() / d]);
        let row = |r: usize| {
            let (bytes, step, _) = rounded.row(r);
            bytes.iter().map(|b| f64::from(*b) * f64::from(step)).collect()
        };
        (0..rounded.rows()).map(row).collect()
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// `[keys, values]` by the formula.
    fn want(
        (keys, values, d): (&[f32], &[f32], usize),
        queries: &[f32],
        visible: &[usize],
        near: usize,
    ) -> [Vec<f64>; 2] {
        let values: Vec<Vec<f64>> =
            values.chunks_exact(d).map(|v| v.iter().map(|&x| f64::from(x)).collect()).collect();
        let mut out = [vec![0.0; values.len()], vec![0.0; values.len()]];
        let keys = rounded(keys, d);
        for (query, &visible) in rounded(queries, d).iter().zip(visible) {
            let e: Vec<f64> = keys[..visible].iter().map(|key| dot(query, key).exp()).collect();
            let sum: f64 = e.iter().sum();
            let output: Vec<f64> = (0..COMPARED.min(d))
                .map(|c| e.iter().zip(&values).map(|(e, v)| e / sum * v[c]).sum())
                .collect();
            for t in 0..visible.saturating_sub(near) {
                let distance = dot(&values[t], &values[t]) + dot(&output, &output)
                    - 2.0 * dot(&values[t][..output.len()], &output);
                out[0][t] += (e[t] / sum).powi(2) * distance;
                out[1][t] += (e[t] / sum).powi(2);
            }
        }
        out
    }

    #[test]
    fn credits_agree_with_the_formula_on_every_isa() {
        for (tokens, d) in [(1, 8), (63, 64), (64, 16), (300, 64), (521, 128)] {
            let [keys, values] = [1, 2].map(|seed| numbers(seed, tokens * d));
            for (near, rows) in [(0, 1), (5, 7), (64, 37)] {
                let queries = numbers(3, rows * d);
                let visible: Vec<usize> = (0..rows).map(|r| (r / 3 * 3 * 17 + 1).min(tokens)).collect();
                let want = want((&keys, &values, d), &queries, &visible, near);
                for &isa in Isa::available() {
                    let judged = Judged::new(isa, &keys, &values, d);
                    let mut got = [vec![1.0; tokens], vec![2.0; tokens]];
                    let [of_keys, of_values] = &mut got;
                    credit(isa, &judged, (&queries, &visible), near, (of_keys, of_values));
                    for ((got, want), before) in got.iter().zip(&want).zip([1.0, 2.0]) {
                        for (got, want) in got.iter().zip(want) {
                            let error = (f64::from(*got) - before - want).abs();
                            assert!(error < 1e-5 * (1.0 + want), "{isa:?} {tokens} {d}: {got}, {want}");
                        }
                    }
                }
            }
        }
    }
}
