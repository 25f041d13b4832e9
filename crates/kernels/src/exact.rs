//! Attention over keys and values kept as f16, the format that every other one is measured against.
//!
//! A page stores its keys in tiles of 16 tokens, channel by channel (`[4, D, 16]`), and its values token by token
//! (`[64, D]`), so that both halves of attention are the same dense loop: one load of scores' or outputs' worth
//! of numbers, shared by up to four query rows, read front to back, and no sum across lanes anywhere. Decode (rows = the query heads of one KV head) and
//! prefill (rows = those heads for a block of tokens) run the same code.
//!
//! Blocked attention as in FlashAttention (Dao et al. 2022, arXiv 2205.14135, s. 3.1).

#![expect(clippy::needless_range_loop, reason = "indices over arrays of registers read as the formula does")]

use crate::isa::Isa;
use crate::saved::{Input, Malformed, write_count, write_numbers};
use crate::simd::{Kernel, Simd, dispatch};
use crate::state::{AttnState, fold_scores};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::io::{self, Write};
use std::ops::Range;

/// Tokens in a page.
pub const PAGE_TOKENS: usize = 64;

/// Tokens in a tile of keys.
const TILE_TOKENS: usize = 16;

/// head_dim must be a multiple of this, the widest vector.
pub const HEAD_DIM_STEP: usize = 16;

/// Up to 64 tokens of one layer and KV head, as f16.
#[derive(Clone, Debug)]
pub struct ExactPage {
    /// Keys `[capacity / 16, D, 16]`, then values `[capacity, D]`; what no token has filled is 0.
    data: Box<[Line]>,
    head_dim: usize,
    tokens: usize,
}

/// A cache line of numbers: no vector load of a page straddles two.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f16; 32]);

fn numbers(lines: &[Line]) -> &[f16] {
    // SAFETY: a `Line` is 32 f16 without padding, so a slice of lines is one of 32 times as many f16.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * 32) }
}

fn numbers_mut(lines: &mut [Line]) -> &mut [f16] {
    // SAFETY: as for `numbers`; every bit pattern is an f16.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 32) }
}

impl ExactPage {
    /// An empty page for at most `capacity` tokens (16, 32, 48 or 64), with keys and values of `head_dim`
    /// elements, a positive multiple of 16.
    pub fn new(head_dim: usize, capacity: usize) -> ExactPage {
        assert!(
            head_dim > 0 && head_dim.is_multiple_of(HEAD_DIM_STEP),
            "head_dim {head_dim} is not a positive multiple of {HEAD_DIM_STEP}"
        );
        assert!(
            (1..=PAGE_TOKENS).contains(&capacity) && capacity.is_multiple_of(TILE_TOKENS),
            "a page of {capacity} tokens, wanted {TILE_TOKENS} to {PAGE_TOKENS} by {TILE_TOKENS}"
        );
        let lines = 2 * head_dim * capacity / 32;
        ExactPage { data: vec![Line([f16::ZERO; 32]); lines].into_boxed_slice(), head_dim, tokens: 0 }
    }

    /// Tokens held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.data.len() * 32 / (2 * self.head_dim)
    }

    /// Elements of a key and of a value.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Whether no further token fits.
    pub fn is_full(&self) -> bool {
        self.tokens == self.capacity()
    }

    /// `(keys, values)`
    fn halves(&self) -> (&[f16], &[f16]) {
        let numbers = numbers(&self.data);
        numbers.split_at(numbers.len() / 2)
    }

    /// Bytes allocated, whatever the number of tokens.
    pub fn bytes(&self) -> usize {
        size_of::<ExactPage>() + size_of_val(&*self.data)
    }

    /// Bytes of keys and values that attention over this page reads.
    pub fn bytes_read(&self) -> usize {
        self.tokens * 2 * self.head_dim() * size_of::<f16>()
    }

    /// Adds one token, its key `[D]` and value `[D]`. Numbers beyond f16 become its largest ones. Panics if the
    /// page is full.
    pub fn push(&mut self, key: &[f32], value: &[f32]) {
        let d = self.head_dim();
        assert!(!self.is_full(), "push into a full page");
        assert_eq!((key.len(), value.len()), (d, d), "key and value must have {d} elements");
        let token = self.tokens;
        let numbers = numbers_mut(&mut self.data);
        let (keys, values) = numbers.split_at_mut(numbers.len() / 2);
        let tile = &mut keys[token / TILE_TOKENS * d * TILE_TOKENS..];
        let mut half = [f16::ZERO; HEAD_DIM_STEP];
        for (c, part) in key.chunks_exact(HEAD_DIM_STEP).enumerate() {
            to_f16(part, &mut half);
            let columns = tile[c * HEAD_DIM_STEP * TILE_TOKENS..].chunks_exact_mut(TILE_TOKENS);
            columns.zip(half).for_each(|(column, x)| column[token % TILE_TOKENS] = x);
        }
        let row = values[token * d..].chunks_exact_mut(HEAD_DIM_STEP);
        for (to, part) in row.zip(value.chunks_exact(HEAD_DIM_STEP)) {
            to_f16(part, &mut half);
            to.copy_from_slice(&half);
        }
        self.tokens += 1;
    }

    /// Writes the page down, for [`read`](ExactPage::read).
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        write_count(out, self.capacity())?;
        write_count(out, self.tokens)?;
        write_numbers(out, numbers(&self.data))
    }

    /// A page that was written down, of vectors of `head_dim` channels.
    pub fn read(input: &mut Input, head_dim: usize) -> Result<ExactPage, Malformed> {
        let (capacity, tokens) = (input.count()?, input.count()?);
        let fits = (TILE_TOKENS..=PAGE_TOKENS).contains(&capacity)
            && capacity.is_multiple_of(TILE_TOKENS)
            && tokens <= capacity;
        Malformed::unless(fits, || format!("an exact page of {tokens} tokens with room for {capacity}"))?;
        let held: Vec<f16> = input.numbers(2 * head_dim * capacity)?;
        Malformed::unless(held.iter().all(|x| x.is_finite()), || {
            "keys or values that are not finite".into()
        })?;
        let mut page = ExactPage::new(head_dim, capacity);
        numbers_mut(&mut page.data).copy_from_slice(&held);
        page.tokens = tokens;
        Ok(page)
    }

    /// Forgets the first `count` tokens; the rest move to the front.
    pub fn drop_front(&mut self, count: usize) {
        assert!(count <= self.tokens, "cannot drop {count} of {} tokens", self.tokens);
        let d = self.head_dim();
        let mut rest = ExactPage::new(d, self.capacity());
        let (mut key, mut value) = (vec![0.0; d], vec![0.0; d]);
        for token in count..self.tokens {
            self.key(token, &mut key);
            self.value(token, &mut value);
            rest.push(&key, &value);
        }
        *self = rest;
    }

    /// Writes the key of `token` as f32 to `out` `[D]`.
    pub fn key(&self, token: usize, out: &mut [f32]) {
        assert!(token < self.tokens, "token {token} of a page of {}", self.tokens);
        let tile = &self.halves().0[token / TILE_TOKENS * self.head_dim() * TILE_TOKENS..];
        let columns = tile.chunks_exact(TILE_TOKENS);
        out.iter_mut().zip(columns).for_each(|(x, column)| *x = column[token % TILE_TOKENS].to_f32());
    }

    /// Writes the value of `token` as f32 to `out` `[D]`.
    pub fn value(&self, token: usize, out: &mut [f32]) {
        assert!(token < self.tokens, "token {token} of a page of {}", self.tokens);
        let d = self.head_dim();
        let row = &self.halves().1[token * d..][..d];
        row.convert_to_f32_slice(out);
    }

    /// Writes all keys and values as f32 to `keys` and `values`, `[T, D]` each.
    pub fn rows(&self, keys: &mut [f32], values: &mut [f32]) {
        let d = self.head_dim();
        assert!(keys.len() == self.tokens * d && values.len() == keys.len(), "not {} tokens", self.tokens);
        let (tiles, rows) = self.halves();
        rows[..values.len()].convert_to_f32_slice(values);
        let mut wide = vec![0.0; d * TILE_TOKENS];
        for (keys, tile) in keys.chunks_mut(TILE_TOKENS * d).zip(tiles.chunks_exact(d * TILE_TOKENS)) {
            tile.convert_to_f32_slice(&mut wide);
            for (t, key) in keys.chunks_exact_mut(d).enumerate() {
                let columns = wide.chunks_exact(TILE_TOKENS);
                key.iter_mut().zip(columns).for_each(|(x, column)| *x = column[t]);
            }
        }
    }
}

fn to_f16(from: &[f32], to: &mut [f16; HEAD_DIM_STEP]) {
    let mut clamped = [0.0; HEAD_DIM_STEP];
    clamped.iter_mut().zip(from).for_each(|(c, x)| *c = x.clamp(-65504.0, 65504.0));
    to.convert_from_f32_slice(&clamped);
}

/// Which tokens of a page each query row may see.
#[derive(Clone, Copy, Debug)]
pub enum Visible {
    /// All of them.
    All,
    /// Rows are in order of position, `rows_per_token` at each; those of the first position see the first
    /// `first` tokens of the page (none if negative), each later position one more.
    Causal {
        /// Rows that share a position.
        rows_per_token: usize,
        /// Tokens of this page up to and including the first position.
        first: isize,
    },
    /// As `Causal`, but a position sees only the newest `window` tokens, itself included.
    Window {
        /// Rows that share a position.
        rows_per_token: usize,
        /// Tokens of this page up to and including the first position.
        first: isize,
        /// Tokens that a position sees at most.
        window: usize,
    },
}

impl Visible {
    /// The tokens that `row` sees of a page of `tokens`; both ends rise with the row.
    #[inline(always)]
    fn to_row(self, row: usize, tokens: usize) -> Range<usize> {
        let inside = |at: isize| at.clamp(0, tokens as isize) as usize;
        match self {
            Visible::All => 0..tokens,
            Visible::Causal { rows_per_token, first } => 0..inside(first + (row / rows_per_token) as isize),
            Visible::Window { rows_per_token, first, window } => {
                let end = first + (row / rows_per_token) as isize;
                inside(end.saturating_sub_unsigned(window))..inside(end)
            }
        }
    }
}

/// Folds a page into the states of `queries` `[R, D]`, which are already multiplied by the attention scale.
/// `state` has `R` rows of `D` channels. Error against f64 over the same f16 numbers: about 1e-6 of the largest
/// value (tested: 2e-5).
pub fn attend(isa: Isa, queries: &[f32], page: &ExactPage, visible: Visible, state: &mut AttnState) {
    fold(isa, queries, (page, page), visible, state);
}

/// [`attend`] over several whole pages; while one is folded the next is asked for, which is what lets a core read
/// memory at full speed.
pub fn attend_pages<'a>(
    isa: Isa,
    queries: &[f32],
    pages: impl IntoIterator<Item = &'a ExactPage>,
    state: &mut AttnState,
) {
    let mut pages = pages.into_iter().peekable();
    while let Some(page) = pages.next() {
        let next = pages.peek().filter(|next| next.capacity() == page.capacity());
        fold(isa, queries, (page, next.unwrap_or(&page)), Visible::All, state);
    }
}

fn fold(
    isa: Isa,
    queries: &[f32],
    (page, next): (&ExactPage, &ExactPage),
    visible: Visible,
    state: &mut AttnState,
) {
    let d = page.head_dim();
    assert_eq!(queries.len(), state.rows() * d, "queries are not {} rows of {d}", state.rows());
    assert_eq!(state.channels(), d, "state of the wrong width");
    if page.tokens > 0 {
        dispatch(isa, Attend { queries, page, next, visible, state });
    }
}

struct Attend<'a> {
    queries: &'a [f32],
    page: &'a ExactPage,
    /// What to ask for meanwhile; `page` itself where there is no next.
    next: &'a ExactPage,
    visible: Visible,
    state: &'a mut AttnState,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let rows = self.state.rows();
        let mut row = 0;
        while row + 4 <= rows {
            fold_rows::<S, 4>(s, &mut self, row);
            row += 4;
        }
        match rows - row {
            1 => fold_rows::<S, 1>(s, &mut self, row),
            2 => fold_rows::<S, 2>(s, &mut self, row),
            3 => fold_rows::<S, 3>(s, &mut self, row),
            _ => {}
        }
    }
}

#[inline(always)]
fn fold_rows<S: Simd, const R: usize>(s: S, a: &mut Attend, row: usize) {
    let (d, tokens) = (a.page.head_dim(), a.page.tokens);
    let ((keys, values), (next_keys, next_values)) = (a.page.halves(), a.next.halves());
    // The first rows bring the next page; for the others it is there.
    let ahead = |now: &[f16], next: &[f16]| match row {
        0 => next.as_ptr().addr().wrapping_sub(now.as_ptr().addr()),
        _ => 0,
    };
    let (keys_ahead, values_ahead) = (ahead(keys, next_keys), ahead(values, next_values));
    // What the rows see rises with them: from the start of the first to the end of the last.
    let seen = a.visible.to_row(row + R - 1, tokens).end;
    if seen == 0 || a.visible.to_row(row, tokens).start == tokens {
        return;
    }
    let mut weights = [[0.0; PAGE_TOKENS]; R];
    scores::<S, R>(s, &a.queries[row * d..(row + R) * d], (keys, keys_ahead), seen, &mut weights);
    let mut rescale = [1.0; R];
    for r in 0..R {
        let visible = a.visible.to_row(row + r, tokens);
        weights[r][..visible.start].fill(f32::NEG_INFINITY);
        weights[r][visible.end..].fill(f32::NEG_INFINITY);
        if !visible.is_empty() {
            let (max, sum) = (&mut a.state.max[row + r], &mut a.state.sum[row + r]);
            rescale[r] = fold_scores(s, &mut weights[r], max, sum);
        } else {
            weights[r].fill(0.0);
        }
    }
    let values = (&values[..seen * d], values_ahead);
    weigh::<S, R>(s, &weights, values, &rescale, &mut a.state.acc[row * d..(row + R) * d]);
}

/// `scores[r][t] = queries[r] . keys[:, t]` for `t < seen`, and beyond it up to the end of a tile.
#[inline(always)]
fn scores<S: Simd, const R: usize>(
    s: S,
    queries: &[f32],
    keys: (&[f16], usize),
    seen: usize,
    scores: &mut [[f32; PAGE_TOKENS]; R],
) {
    let capacity = keys.0.len() * R / queries.len();
    let mut at = 0;
    while at < seen && at + S::TILE * S::LANES <= capacity {
        match S::TILE {
            1 => score_tile::<S, R, 1>(s, queries, keys, at, scores),
            2 => score_tile::<S, R, 2>(s, queries, keys, at, scores),
            _ => score_tile::<S, R, 4>(s, queries, keys, at, scores),
        }
        at += S::TILE * S::LANES;
    }
    while at < seen {
        score_tile::<S, R, 1>(s, queries, keys, at, scores);
        at += S::LANES;
    }
}

#[inline(always)]
fn score_tile<S: Simd, const R: usize, const N: usize>(
    s: S,
    queries: &[f32],
    (keys, ahead): (&[f16], usize),
    at: usize,
    scores: &mut [[f32; PAGE_TOKENS]; R],
) {
    let d = queries.len() / R;
    let end = at + N * S::LANES;
    assert!(end <= PAGE_TOKENS && keys.len() >= d * end.next_multiple_of(TILE_TOKENS));
    // Where each vector's tokens start in its tile; LANES divides TILE_TOKENS.
    let mut starts = [0; N];
    for (n, start) in starts.iter_mut().enumerate() {
        let t = at + n * S::LANES;
        *start = t / TILE_TOKENS * d * TILE_TOKENS + t % TILE_TOKENS;
    }
    let mut sums = [[s.splat(0.0); N]; R];
    for c in 0..d {
        let mut k = [s.splat(0.0); N];
        for (n, k) in k.iter_mut().enumerate() {
            // SAFETY: c < d, and the keys reach to the end of the last vector's tile, asserted above.
            *k = unsafe { s.load_f16(keys.as_ptr().add(starts[n] + c * TILE_TOKENS)) };
            // Two channels of a tile share a cache line.
            if c % 2 == 0 {
                s.prefetch(keys.as_ptr().wrapping_add(starts[n] + c * TILE_TOKENS), ahead);
            }
        }
        for r in 0..R {
            // SAFETY: r < R and c < d, and queries has R * d elements.
            let q = s.splat(unsafe { *queries.get_unchecked(r * d + c) });
            for n in 0..N {
                sums[r][n] = s.fma(k[n], q, sums[r][n]);
            }
        }
    }
    for r in 0..R {
        for n in 0..N {
            // SAFETY: at + N * LANES <= PAGE_TOKENS, asserted above.
            unsafe { s.store(scores[r].as_mut_ptr().add(at + n * S::LANES), sums[r][n]) };
        }
    }
}

/// `acc[r] = acc[r] * rescale[r] + sum over t of weights[r][t] * values[t]`
#[inline(always)]
fn weigh<S: Simd, const R: usize>(
    s: S,
    weights: &[[f32; PAGE_TOKENS]; R],
    values: (&[f16], usize),
    rescale: &[f32; R],
    acc: &mut [f32],
) {
    let d = acc.len() / R;
    let mut at = 0;
    while at + S::TILE * S::LANES <= d {
        match S::TILE {
            1 => weigh_tile::<S, R, 1>(s, weights, values, rescale, acc, at),
            2 => weigh_tile::<S, R, 2>(s, weights, values, rescale, acc, at),
            _ => weigh_tile::<S, R, 4>(s, weights, values, rescale, acc, at),
        }
        at += S::TILE * S::LANES;
    }
    while at < d {
        weigh_tile::<S, R, 1>(s, weights, values, rescale, acc, at);
        at += S::LANES;
    }
}

#[inline(always)]
fn weigh_tile<S: Simd, const R: usize, const N: usize>(
    s: S,
    weights: &[[f32; PAGE_TOKENS]; R],
    (values, ahead): (&[f16], usize),
    rescale: &[f32; R],
    acc: &mut [f32],
    at: usize,
) {
    let d = acc.len() / R;
    let tokens = values.len() / d;
    assert!(at + N * S::LANES <= d && tokens <= PAGE_TOKENS);
    let mut sums = [[s.splat(0.0); N]; R];
    for r in 0..R {
        for n in 0..N {
            // SAFETY: at + N * LANES <= d, asserted above, and acc has R * d elements.
            let old = unsafe { s.load(acc.as_ptr().add(r * d + at + n * S::LANES)) };
            sums[r][n] = s.mul(old, s.splat(rescale[r]));
        }
    }
    for t in 0..tokens {
        let mut v = [s.splat(0.0); N];
        for (n, v) in v.iter_mut().enumerate() {
            // SAFETY: t < tokens and at + N * LANES <= d, so inside values.
            *v = unsafe { s.load_f16(values.as_ptr().add(t * d + at + n * S::LANES)) };
            if (at + n * S::LANES).is_multiple_of(32) {
                s.prefetch(values.as_ptr().wrapping_add(t * d + at + n * S::LANES), ahead);
            }
        }
        for r in 0..R {
            // SAFETY: t < tokens <= PAGE_TOKENS.
            let w = s.splat(unsafe { *weights[r].get_unchecked(t) });
            for n in 0..N {
                sums[r][n] = s.fma(v[n], w, sums[r][n]);
            }
        }
    }
    for r in 0..R {
        for n in 0..N {
            // SAFETY: as for the load above.
            unsafe { s.store(acc.as_mut_ptr().add(r * d + at + n * S::LANES), sums[r][n]) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle;
    use proptest::prelude::*;

    pub(crate) fn noise(seed: u64, len: usize) -> Vec<f32> {
        let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = move || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    fn filled(d: usize, tokens: usize, seed: u64) -> ExactPage {
        let mut page = ExactPage::new(d, tokens.max(1).next_multiple_of(TILE_TOKENS));
        for t in 0..tokens {
            let at = seed + 2 * t as u64;
            page.push(&noise(at, d), &noise(at + 1, d));
        }
        page
    }

    /// What the oracle says of `query` over these tokens of each page.
    fn expected(query: &[f32], pages: &[(&ExactPage, Range<usize>)]) -> Vec<f64> {
        let d = query.len();
        let (mut keys, mut values, mut row) = (vec![], vec![], vec![0.0; d]);
        for (page, seen) in pages {
            for t in seen.clone() {
                page.key(t, &mut row);
                keys.extend(row.iter().map(|&x| f64::from(x)));
                page.value(t, &mut row);
                values.extend(row.iter().map(|&x| f64::from(x)));
            }
        }
        let query: Vec<f64> = query.iter().map(|&x| f64::from(x)).collect();
        let mut out = oracle::attend(&query, &keys, &values, 1.0);
        out.resize(d, 0.0);
        out
    }

    fn close(got: &[f32], want: &[f64], what: &str) {
        for (g, w) in got.iter().zip(want) {
            assert!((f64::from(*g) - w).abs() < 2e-5, "{what}: got {g}, want {w}");
        }
    }

    #[test]
    fn every_isa_shape_and_row_count_agrees_with_the_oracle() {
        for &isa in Isa::available() {
            for d in [16, 48, 64, 80, 96, 128, 256] {
                for (rows, tokens) in [(1, 1), (2, 63), (3, 64), (4, 17), (5, 33), (7, 64), (8, 40), (12, 5)]
                {
                    let pages = [filled(d, 64, 7), filled(d, tokens, 1007)];
                    let queries = noise(99, rows * d);
                    let mut state = AttnState::new(rows, d);
                    pages.iter().for_each(|p| attend(isa, &queries, p, Visible::All, &mut state));
                    let mut out = vec![0.0; rows * d];
                    state.finish(&mut out);
                    for (q, o) in queries.chunks(d).zip(out.chunks(d)) {
                        let want = expected(q, &[(&pages[0], 0..64), (&pages[1], 0..tokens)]);
                        close(o, &want, &format!("{isa:?} D={d} R={rows} T={tokens}"));
                    }
                }
            }
        }
    }

    #[test]
    fn causal_rows_see_what_they_may() {
        let (d, per_token) = (64, 3);
        let page = filled(d, 50, 3);
        for &isa in Isa::available() {
            for first in [-5, -1, 0, 1, 13, 49, 60] {
                let rows = per_token * 11;
                let queries = noise(5, rows * d);
                let mut state = AttnState::new(rows, d);
                attend(
                    isa,
                    &queries,
                    &page,
                    Visible::Causal { rows_per_token: per_token, first },
                    &mut state,
                );
                let mut out = vec![0.0; rows * d];
                state.finish(&mut out);
                for r in 0..rows {
                    let seen = (first + (r / per_token) as isize).clamp(0, 50) as usize;
                    let want = expected(&queries[r * d..][..d], &[(&page, 0..seen)]);
                    close(&out[r * d..][..d], &want, &format!("{isa:?} first={first} row={r}"));
                }
            }
        }
    }

    /// A block of positions against several pages, as prefill goes: every row's window, at every place that a
    /// window's edges can have in a page, windows smaller and larger than a page, and pages nobody sees.
    #[test]
    fn windowed_rows_see_their_newest_tokens() {
        for &isa in Isa::available() {
            for (d, per_token, positions) in [(16, 1, 5), (64, 3, 11), (256, 4, 16)] {
                let pages = [filled(d, 64, 3), filled(d, 64, 1003), filled(d, 37, 2003)];
                let queries = noise(5, per_token * positions * d);
                for (start, window) in
                    [(0, 1), (0, 7), (3, 64), (60, 5), (64, 64), (100, 33), (149, 1), (149, 100), (120, 1000)]
                {
                    let mut state = AttnState::new(per_token * positions, d);
                    for (i, page) in pages.iter().enumerate() {
                        let first = start as isize + 1 - 64 * i as isize;
                        let visible = Visible::Window { rows_per_token: per_token, first, window };
                        attend(isa, &queries, page, visible, &mut state);
                    }
                    let mut out = vec![0.0; queries.len()];
                    state.finish(&mut out);
                    for (r, (query, out)) in queries.chunks(d).zip(out.chunks(d)).enumerate() {
                        let end = start + r / per_token + 1;
                        let (from, to) = (end.saturating_sub(window), end.min(165));
                        let seen = |i: usize| {
                            from.clamp(64 * i, 64 * (i + 1)) - 64 * i..to.clamp(64 * i, 64 * (i + 1)) - 64 * i
                        };
                        let want = expected(query, &[0, 1, 2].map(|i| (&pages[i], seen(i))));
                        close(out, &want, &format!("{isa:?} D={d} start={start} window={window} row={r}"));
                    }
                }
            }
        }
    }

    #[test]
    fn dropping_the_front_keeps_the_rest() {
        let mut page = filled(16, 60, 11);
        let (mut before, mut after) = (vec![0.0; 16], vec![0.0; 16]);
        let whole = page.clone();
        page.drop_front(32);
        assert_eq!(page.tokens(), 28);
        for t in 0..28 {
            whole.key(t + 32, &mut before);
            page.key(t, &mut after);
            assert_eq!(before, after);
            whole.value(t + 32, &mut before);
            page.value(t, &mut after);
            assert_eq!(before, after);
        }
        page.push(&noise(1, 16), &noise(2, 16));
        assert_eq!((page.tokens(), page.capacity()), (29, 64));
    }

    #[test]
    fn large_numbers_saturate() {
        let mut page = ExactPage::new(16, 16);
        page.push(&[1e9; 16], &[-1e9; 16]);
        let mut row = [0.0; 16];
        page.key(0, &mut row);
        assert_eq!(row, [65504.0; 16]);
        page.value(0, &mut row);
        assert_eq!(row, [-65504.0; 16]);
    }

    proptest! {
        #[test]
        fn any_split_in_any_order_gives_the_same_answer(
            cuts in prop::collection::vec(0usize..4, 6),
            order in Just([0usize, 1, 2, 3]).prop_shuffle(),
            scale in 0.1f32..20.0,
        ) {
            let (d, rows) = (64, 3);
            let queries: Vec<f32> = noise(17, rows * d).iter().map(|x| x * scale).collect();
            let pages: Vec<_> = (0..6).map(|i| filled(d, 9 + 11 * i, 50 * i as u64)).collect();
            let mut whole = AttnState::new(rows, d);
            let mut parts = vec![AttnState::new(rows, d); 4];
            for (page, &part) in pages.iter().zip(&cuts) {
                attend(Isa::current(), &queries, page, Visible::All, &mut whole);
                attend(Isa::current(), &queries, page, Visible::All, &mut parts[part]);
            }
            let mut merged = AttnState::new(rows, d);
            order.iter().for_each(|&i| merged.merge(&parts[i]));
            let (mut a, mut b) = (vec![0.0; rows * d], vec![0.0; rows * d]);
            whole.finish(&mut a);
            merged.finish(&mut b);
            for (a, b) in a.iter().zip(&b) {
                prop_assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }
    }
}
