//! Attention over a few keys and values that were just decoded to f32.
//!
//! For formats without a kernel of their own: they write up to 64 rows of f32 into a [`Rows`] that stays in the
//! first cache, and fold it into the attention state. A row may be visible to some of the queries only, so that
//! query heads that select for themselves share what is decoded. It knows no format.

#![expect(clippy::needless_range_loop, reason = "indices over arrays of registers read as the formula does")]

use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use crate::state::{AttnState, fold_scores};

/// Rows that are folded at once at most.
pub const ROWS: usize = 64;

/// Rows come in multiples of this many elements, the widest vector.
pub const ROW_STEP: usize = 16;

/// Up to 64 decoded tokens.
#[derive(Clone, Debug)]
pub struct Rows {
    /// `[room, W]`
    keys: Vec<f32>,
    /// `[room, W]`
    values: Vec<f32>,
    /// For each query, which of the tokens it sees: bit `t` stands for token `t`.
    seen: Vec<u64>,
    width: usize,
    tokens: usize,
}

impl Rows {
    /// No tokens, of keys and values with `width` elements (a positive multiple of 16), for `queries` queries.
    pub fn new(width: usize, queries: usize) -> Rows {
        Rows::with_room(width, queries, ROWS)
    }

    /// The same for at most `room` tokens, up to 64.
    pub fn with_room(width: usize, queries: usize, room: usize) -> Rows {
        assert!((1..=ROWS).contains(&room), "room for {room} rows, wanted 1 to {ROWS}");
        assert!(
            width > 0 && width.is_multiple_of(ROW_STEP),
            "rows of {width}, wanted a multiple of {ROW_STEP}"
        );
        let numbers = vec![0.0; room * width];
        Rows { keys: numbers.clone(), values: numbers, seen: vec![0; queries], width, tokens: 0 }
    }

    /// Tokens held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether no further token fits.
    pub fn is_full(&self) -> bool {
        self.tokens * self.width == self.keys.len()
    }

    /// Adds a token that the queries for which `sees(query)` holds attend to; its key `[W]` and value `[W]` are
    /// the caller's to write, and hold anything before. Panics if no token fits.
    pub fn push(&mut self, sees: impl Fn(usize) -> bool) -> (&mut [f32], &mut [f32]) {
        assert!(!self.is_full(), "push into {} rows", self.tokens);
        let at = self.tokens;
        self.seen.iter_mut().enumerate().for_each(|(q, seen)| *seen |= u64::from(sees(q)) << at);
        self.tokens += 1;
        let span = at * self.width..(at + 1) * self.width;
        (&mut self.keys[span.clone()], &mut self.values[span])
    }

    /// Adds `count` tokens that all queries attend to: keys and values `[count, W]` to write.
    pub fn push_many(&mut self, count: usize) -> (&mut [f32], &mut [f32]) {
        let room = self.keys.len() / self.width;
        assert!(self.tokens + count <= room, "push of {count} tokens onto {} of {room}", self.tokens);
        let at = self.tokens;
        let bits = if count == ROWS { u64::MAX } else { (1 << count) - 1 };
        self.seen.iter_mut().for_each(|seen| *seen |= bits.checked_shl(at as u32).unwrap_or(0));
        self.tokens += count;
        let span = at * self.width..(at + count) * self.width;
        (&mut self.keys[span.clone()], &mut self.values[span])
    }

    /// Folds the tokens into the states of `queries` `[R, W]`, already multiplied by the attention scale, and
    /// forgets them. Error against f64 over the same numbers: about 1e-6 of the largest value (tested: 2e-5).
    pub fn fold(&mut self, isa: Isa, queries: &[f32], state: &mut AttnState) {
        let rows = self.seen.len();
        assert_eq!((state.rows(), state.channels()), (rows, self.width), "state of another shape");
        assert_eq!(queries.len(), rows * self.width, "queries are not {rows} rows of {}", self.width);
        if self.tokens > 0 {
            dispatch(isa, Fold { queries, rows: self, state });
        }
        self.tokens = 0;
        self.seen.fill(0);
    }
}

struct Fold<'a> {
    queries: &'a [f32],
    rows: &'a Rows,
    state: &'a mut AttnState,
}

impl Kernel for Fold<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let queries = self.rows.seen.len();
        let mut first = 0;
        while first + 4 <= queries {
            fold_queries::<S, 4>(s, &mut self, first);
            first += 4;
        }
        match queries - first {
            1 => fold_queries::<S, 1>(s, &mut self, first),
            2 => fold_queries::<S, 2>(s, &mut self, first),
            3 => fold_queries::<S, 3>(s, &mut self, first),
            _ => {}
        }
    }
}

#[inline(always)]
fn fold_queries<S: Simd, const R: usize>(s: S, a: &mut Fold, first: usize) {
    let (w, tokens) = (a.rows.width, a.rows.tokens);
    let queries = &a.queries[first * w..(first + R) * w];
    let mut weights = [[f32::NEG_INFINITY; ROWS]; R];
    for (t, key) in a.rows.keys[..tokens * w].chunks_exact(w).enumerate() {
        let dots = dots::<S, R>(s, queries, key);
        for r in 0..R {
            if a.rows.seen[first + r] >> t & 1 == 1 {
                weights[r][t] = dots[r];
            }
        }
    }
    let mut rescale = [1.0; R];
    for r in 0..R {
        let (max, sum) = (&mut a.state.max[first + r], &mut a.state.sum[first + r]);
        if a.rows.seen[first + r] == 0 {
            weights[r].fill(0.0);
            continue;
        }
        rescale[r] = fold_scores(s, &mut weights[r], max, sum);
    }
    weigh::<S, R>(
        s,
        &weights,
        &a.rows.values[..tokens * w],
        &rescale,
        &mut a.state.acc[first * w..(first + R) * w],
    );
}

/// `queries[r] . key` for each of the `R` queries.
#[inline(always)]
fn dots<S: Simd, const R: usize>(s: S, queries: &[f32], key: &[f32]) -> [f32; R] {
    let w = key.len();
    assert!(queries.len() == R * w && w.is_multiple_of(S::LANES));
    let mut sums = [s.splat(0.0); 4];
    let mut at = 0;
    while at < w {
        // SAFETY: LANES divides w, so the vector at `at` < w ends inside the key.
        let k = unsafe { s.load(key.as_ptr().add(at)) };
        for r in 0..R {
            // SAFETY: as above, in row r < R of the queries, asserted to be R rows of w.
            let q = unsafe { s.load(queries.as_ptr().add(r * w + at)) };
            sums[r] = s.fma(k, q, sums[r]);
        }
        at += S::LANES;
    }
    let sums = s.sum_lanes4(sums);
    std::array::from_fn(|r| sums[r])
}

/// `acc[r] = acc[r] * rescale[r] + sum over t of weights[r][t] * values[t]`
#[inline(always)]
fn weigh<S: Simd, const R: usize>(
    s: S,
    weights: &[[f32; ROWS]; R],
    values: &[f32],
    rescale: &[f32; R],
    acc: &mut [f32],
) {
    let w = acc.len() / R;
    let tokens = values.len() / w;
    assert!(acc.len() == R * w && w.is_multiple_of(S::LANES) && tokens <= ROWS);
    let mut at = 0;
    while at < w {
        let mut sums = [s.splat(0.0); R];
        for r in 0..R {
            // SAFETY: LANES divides w, so the vector at `at` < w ends inside row r of the accumulators.
            let old = unsafe { s.load(acc.as_ptr().add(r * w + at)) };
            sums[r] = s.mul(old, s.splat(rescale[r]));
        }
        for t in 0..tokens {
            // SAFETY: as above, in row t of the values.
            let v = unsafe { s.load(values.as_ptr().add(t * w + at)) };
            for r in 0..R {
                sums[r] = s.fma(v, s.splat(weights[r][t]), sums[r]);
            }
        }
        for r in 0..R {
            // SAFETY: as for the load.
            unsafe { s.store(acc.as_mut_ptr().add(r * w + at), sums[r]) };
        }
        at += S::LANES;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle;

    fn noise(seed: u64, len: usize) -> Vec<f32> {
        let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = move || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn every_query_attends_to_what_it_sees_and_nothing_else() {
        let sees = |q: usize, t: usize| q == 0 || (t * 7 + q * 3).is_multiple_of(q + 2) && q != 5;
        for &isa in Isa::available() {
            for width in [16, 48, 64, 80, 128] {
                for (queries, tokens) in [(1, 1), (2, 63), (3, 64), (4, 17), (6, 150), (9, 65)] {
                    let (q, k, v) =
                        (noise(1, queries * width), noise(2, tokens * width), noise(3, tokens * width));
                    let mut rows = Rows::new(width, queries);
                    let mut state = AttnState::new(queries, width);
                    for t in 0..tokens {
                        if rows.is_full() {
                            rows.fold(isa, &q, &mut state);
                        }
                        let (key, value) = rows.push(|q| sees(q, t));
                        key.copy_from_slice(&k[t * width..][..width]);
                        value.copy_from_slice(&v[t * width..][..width]);
                    }
                    rows.fold(isa, &q, &mut state);
                    let mut out = vec![0.0; queries * width];
                    state.finish(&mut out);
                    for (i, (query, out)) in q.chunks(width).zip(out.chunks(width)).enumerate() {
                        let wide = |x: &[f32]| -> Vec<f64> {
                            let seen = x.chunks(width).enumerate().filter(|&(t, _)| sees(i, t));
                            seen.flat_map(|(_, row)| row.iter().map(|&x| f64::from(x))).collect()
                        };
                        let query: Vec<f64> = query.iter().map(|&x| f64::from(x)).collect();
                        let mut want = oracle::attend(&query, &wide(&k), &wide(&v), 1.0);
                        want.resize(width, 0.0);
                        for (g, w) in out.iter().zip(&want) {
                            assert!(
                                (f64::from(*g) - w).abs() < 2e-5,
                                "{isa:?} {width} {queries} {tokens} {i}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn many_rows_at_once_are_rows_one_by_one() {
        let (width, tokens) = (32, 64);
        let (q, k, v) = (noise(1, 3 * width), noise(2, tokens * width), noise(3, tokens * width));
        let out = |sizes: &[usize]| {
            let (mut rows, mut state) = (Rows::new(width, 3), AttnState::new(3, width));
            let mut at = 0;
            for &size in sizes {
                let (keys, values) = rows.push_many(size);
                keys.copy_from_slice(&k[at * width..][..size * width]);
                values.copy_from_slice(&v[at * width..][..size * width]);
                at += size;
            }
            rows.fold(Isa::current(), &q, &mut state);
            let mut out = vec![0.0; 3 * width];
            state.finish(&mut out);
            out
        };
        assert_eq!(out(&[64]), out(&[1; 64]));
        assert_eq!(out(&[64]), out(&[5, 0, 58, 1]));
    }
}
