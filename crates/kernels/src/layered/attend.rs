//! How does a step attend to layered pages?
//!
//! A page at a time, for up to four queries at once. Scores are integers of the keys' and the queries' bytes. They
//! become weights relative to the page's largest, integers of 14 bits in two halves, which meet the values' bytes the
//! same way. What a page adds goes to f32 sums in the order of lanes, and those to the state once in a run of pages.
//!
//! What failed: a loop of known length over a page's tiles (unrolled, all its weights are loaded before the first group
//! and spill: a fifth slower); one group of values at a time where there are 32 registers
//! (7 % slower than two).

#![expect(
    clippy::needless_range_loop,
    reason = "arrays of registers indexed by rows and strips together; iterators over them would be closures"
)]

use super::queries::Queries;
use super::score::{At, Levels, Scorer, TILE_TOKENS, TILES, count_of, levels, unpack};
use super::{Escape, GROUP, LINE, PAGE_TOKENS, Page, Pages, Profile, UNIT};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use crate::state::AttnState;
use half::f16;
use std::f32::consts::LOG2_E;
use std::hint::black_box;
use std::ops::Range;

/// The bits of all tiles of a page.
pub const ALL_TILES: u8 = (1 << TILES) - 1;

/// Pages after which sums go to the state: few enough to be in the second cache for the next four rows.
const RUN: usize = 64;

/// Visits after which a page is whose chosen tiles are asked for.
const TILES_AHEAD: usize = 3;

/// Most groups of a vector.
const GROUPS: usize = 256 / GROUP;

/// Most f32 lanes of a vector register.
const LANES: usize = 16;

/// Weights are integers up to this, in two halves of 7 bits.
const WEIGHT: f32 = 16383.0;

/// Folds some tiles of 16 tokens into `state` of as many rows as the queries and `D` channels, in units of the values'
/// spreads and less their means: `chosen` has for each page its index and a bit for each of its four tiles, the lowest for
/// the first. Of other tiles nothing is read but escapes, and the lines of 2-bit codes, which two share. Returns the bytes
/// read, such lines by halves.
///
/// Error against attention in f64 over the decoded pages, by the largest value's magnitude: under 3e-4 (measured: 3e-5)
/// with the queries as they are rounded; with the queries as given, 1e-2 for scores of a spread of 2, and more in
/// proportion (see [`Queries`]).
///
/// # Panics
/// If a shape does not fit, or a page does not exist.
pub fn attend_tiles(
    isa: Isa,
    queries: &Queries,
    pages: &Pages,
    chosen: &[(u32, u8)],
    state: &mut AttnState,
) -> usize {
    let (rows, d) = (queries.rows(), queries.head_dim());
    assert_eq!(d, pages.head_dim(), "queries and pages of other widths");
    assert_eq!((state.rows(), state.channels()), (rows, d), "state of another shape");
    dispatch(isa, Attend { queries, pages, visits: chosen, state, read: 0 })
}

/// What attention needs of a page.
struct View<'a> {
    page: &'a Page,
    leading: *const u8,
    keys: *const u8,
    values: *const u8,
    escapes: [&'a [Escape]; 2],
    tiles: u8,
    /// Bytes to the next page's lines, of those of keys that lie apart and of the others, if all of them will be met; else 0.
    ahead: [usize; 2],
}

impl<'a> View<'a> {
    /// With the tiles of `tiles` that have tokens.
    #[inline(always)]
    fn new(pages: &'a Pages, (index, tiles): (u32, u8)) -> View<'a> {
        let page = &pages.pages[index as usize];
        let [leading, keys, values] = pages.lines_of(page);
        View {
            page,
            leading: leading.as_ptr().cast(),
            keys: keys.as_ptr().cast(),
            values: values.as_ptr().cast(),
            escapes: pages.escapes_of(index as usize),
            tiles: tiles & ((1 << page.tokens().div_ceil(TILE_TOKENS)) - 1),
            ahead: [0; 2],
        }
    }

    /// Bytes that the tiles take, and all escapes.
    #[inline(always)]
    fn bytes(&self) -> usize {
        let lines = self.page.keys.lines() + self.page.values.lines();
        let escapes = self.escapes[0].len() + self.escapes[1].len();
        lines * LINE * self.tiles.count_ones() as usize / TILES
            + escapes * size_of::<Escape>()
            + size_of::<Page>()
    }

    /// Asks for the tiles' lines of keys and for all escapes.
    #[inline(always)]
    fn ask_for_keys<S: Simd>(&self, s: S) {
        let [leading, keys] = self.page.keys.split();
        self.ask(s, self.leading, leading);
        self.ask(s, self.keys, keys);
        for escapes in self.escapes {
            s.prefetch_near(escapes.as_ptr(), 0);
        }
    }

    /// Asks for the tiles' lines of groups of `profile`.
    #[inline(always)]
    fn ask<S: Simd>(&self, s: S, lines: *const u8, profile: Profile) {
        let t = u32::from(self.tiles);
        let either = t | t >> 1;
        // Bit `i`: line `i` of a group; with 8 bits a tile has two lines, with 2 bits two tiles have one.
        let eight = [0b11, 0b1100, 0b11_0000, 0b1100_0000];
        let eight: u32 = eight.iter().enumerate().map(|(i, lines)| (t >> i & 1) * lines).sum();
        let masks = [eight, t, either & 1 | (either >> 2 & 1) << 1];
        let counts = [profile.eight, profile.four, profile.two];
        let mut at = 0;
        for ((count, mask), bits) in counts.into_iter().zip(masks).zip([8, 4, 2]) {
            for _ in 0..count {
                let mut left = mask;
                while left != 0 {
                    s.prefetch_near(lines, at + left.trailing_zeros() as usize * LINE);
                    left &= left - 1;
                }
                at += bits * LINE;
            }
        }
    }
}

struct Attend<'a> {
    queries: &'a Queries,
    pages: &'a Pages,
    /// Pages, and which of their tiles.
    visits: &'a [(u32, u8)],
    state: &'a mut AttnState,
    /// Bytes.
    read: usize,
}

impl Kernel for Attend<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) -> usize {
        let (rows, visits) = (self.queries.rows(), self.visits.len());
        for from in (0..visits).step_by(RUN) {
            let run = from..visits.min(from + RUN);
            let mut first = 0;
            while first < rows {
                first += match rows - first {
                    1 => attend_rows::<S, 1>(s, &mut self, run.clone(), first),
                    2 => attend_rows::<S, 2>(s, &mut self, run.clone(), first),
                    3 => attend_rows::<S, 3>(s, &mut self, run.clone(), first),
                    _ => attend_rows::<S, 4>(s, &mut self, run.clone(), first),
                };
            }
        }
        self.read / rows.div_ceil(4)
    }
}

/// Folds visits `run` into rows `first..first + R`; returns `R`.
#[inline(always)]
fn attend_rows<S: Simd, const R: usize>(s: S, a: &mut Attend, run: Range<usize>, first: usize) -> usize {
    let d = a.queries.head_dim();
    let rows = first..first + R;
    let mut fold = Fold::<S, R>::new(s, a.queries, first);
    fold.max.copy_from_slice(&a.state.max[rows.clone()]);
    fold.sum.copy_from_slice(&a.state.sum[rows.clone()]);
    for at in run {
        let visit = a.visits[at];
        let mut view = View::new(a.pages, visit);
        a.read += view.bytes();
        if let Some(&(next, ALL_TILES)) = a.visits.get(at + 1) {
            let next = View::new(a.pages, (next, ALL_TILES));
            view.ahead = [
                (next.leading as usize).wrapping_sub(view.leading as usize),
                (next.keys as usize).wrapping_sub(view.keys as usize),
            ];
        }
        let later = a.visits.get(at + TILES_AHEAD).filter(|later| later.1 != ALL_TILES);
        let later = later.map(|later| View::new(a.pages, *later));
        match view.tiles {
            0 => {}
            ALL_TILES => fold.page::<true>(s, &view, later.as_ref()),
            _ => fold.page::<false>(s, &view, later.as_ref()),
        }
    }
    let old = &mut a.state.max[rows.clone()];
    fold.flush::<S>(old, &mut a.state.acc[first * d..(first + R) * d]);
    old.copy_from_slice(&fold.max);
    a.state.sum[rows].copy_from_slice(&fold.sum);
    R
}

/// Vectors of integer weights: `[strips, 2 blocks, R, 2 halves]` of `4 * LANES` bytes.
#[repr(align(64))]
struct Spread<const R: usize>([[[[u8; LINE]; 2]; R]; PAGE_TOKENS / GROUP]);

/// A run of pages for `R` rows: what was summed up and what a page needs on the way.
struct Fold<'a, S: Simd, const R: usize> {
    scorer: Scorer<'a, S, R>,
    levels: Levels<S::I>,
    max: [f32; R],
    sum: [f32; R],
    /// Sums of weighted values as lanes hold them: channel `c` of a group in lanes `c` and `c + 8`.
    acc: [[[f32; LANES]; GROUPS]; R],
    /// What escapes add to that.
    escaped: [[f32; GROUPS * GROUP]; R],
    /// Of a page: what is added to scores, then weights relative to the page's largest.
    weights: [[f32; PAGE_TOKENS]; R],
    /// Weights as integers: high and low seven bits.
    bytes: [[[u8; PAGE_TOKENS]; 2]; R],
    spread: Spread<R>,
    /// What the page's weights must be multiplied by to be relative to `max`.
    factors: [f32; R],
    /// Tokens of strips that are visited, in units of the lanes.
    strips: [u8; PAGE_TOKENS / 8],
    strip_count: usize,
    /// Strips whose values are weighed.
    weighed: usize,
}

impl<'a, S: Simd, const R: usize> Fold<'a, S, R> {
    #[inline(always)]
    fn new(s: S, queries: &'a Queries, first: usize) -> Self {
        Fold {
            scorer: Scorer::new(s, queries, first),
            levels: levels(s, 0),
            max: [f32::NEG_INFINITY; R],
            sum: [0.0; R],
            acc: [[[0.0; LANES]; GROUPS]; R],
            escaped: [[0.0; GROUPS * GROUP]; R],
            weights: [[0.0; PAGE_TOKENS]; R],
            bytes: [[[0; PAGE_TOKENS]; 2]; R],
            spread: Spread([[[[0; LINE]; 2]; R]; PAGE_TOKENS / GROUP]),
            factors: [0.0; R],
            strips: [0; PAGE_TOKENS / 8],
            strip_count: 0,
            weighed: 0,
        }
    }

    /// Folds a page's tiles in (`ALL`: these are all four), and asks for a later one's: half before and half after the
    /// scores, since a core waits where it has asked for too much.
    #[inline(always)]
    fn page<const ALL: bool>(&mut self, s: S, view: &View, later: Option<&View>) {
        if let Some(later) = later {
            later.ask_for_keys(s);
        }
        if !ALL {
            self.choose(view.tiles);
        }
        self.add_to_scores(view);
        self.score::<ALL>(s, view);
        if let Some(later) = later {
            later.ask(s, later.values, later.page.values);
        }
        self.soften::<ALL>(s);
        self.spread::<ALL>(s);
        self.weigh::<ALL>(s, view);
        self.weigh_escapes::<ALL>(view);
    }

    /// Lists the strips of `tiles`.
    #[inline(always)]
    fn choose(&mut self, tiles: u8) {
        self.strip_count = 0;
        for strip in 0..PAGE_TOKENS / S::LANES {
            self.strips[self.strip_count] = strip as u8;
            self.strip_count += usize::from(tiles >> (strip * S::LANES / TILE_TOKENS) & 1);
        }
    }

    #[inline(always)]
    fn count<const ALL: bool>(&self) -> usize {
        if ALL { PAGE_TOKENS / S::LANES } else { self.strip_count }
    }

    #[inline(always)]
    fn strip<const ALL: bool>(&self, i: usize) -> usize {
        if ALL { i } else { usize::from(self.strips[i]) }
    }

    /// What is added to scores: offsets and escapes, `-inf` where there is no token.
    #[inline(always)]
    fn add_to_scores(&mut self, view: &View) {
        let (queries, first) = (self.scorer.queries, self.scorer.first);
        let mut rows: [&[f32]; R] = [&[]; R];
        for r in 0..R {
            rows[r] = queries.exact(first + r);
            self.weights[r] = [queries.scale_and_offset(first + r).1; PAGE_TOKENS];
        }
        for escape in view.escapes[0] {
            let (token, channel, rest) = parts(escape);
            for r in 0..R {
                self.weights[r][token] += rows[r][channel] * rest;
            }
        }
        if view.page.tokens() < PAGE_TOKENS {
            for r in 0..R {
                self.weights[r][view.page.tokens()..].fill(f32::NEG_INFINITY);
            }
        }
    }

    #[inline(always)]
    fn score<const ALL: bool>(&mut self, s: S, view: &View) {
        self.scorer.set_profile(view.page.keys);
        let count = self.count::<ALL>();
        let mut i = 0;
        while i < count {
            let strip = [0, 1, 2, 3].map(|next| self.strip::<ALL>((i + next).min(count - 1)));
            if ALL && S::TILE >= 4 {
                self.score_strips(s, view, strip);
                i += 4;
            } else if i + 2 <= count {
                self.score_strips(s, view, [strip[0], strip[1]]);
                i += 2;
            } else {
                self.score_strips(s, view, [strip[0]]);
                i += 1;
            }
        }
    }

    #[inline(always)]
    fn score_strips<const T: usize>(&mut self, s: S, view: &View, strips: [usize; T]) {
        let lines = [(view.leading, view.ahead[0]), (view.keys, view.ahead[1])];
        // SAFETY: a view's lines are those of its page's profile; strips are below 64 / LANES.
        let scores = unsafe { self.scorer.scores::<T>(s, lines, strips) };
        for r in 0..R {
            let (scale, _) = self.scorer.queries.scale_and_offset(self.scorer.first + r);
            for t in 0..T {
                let to = self.weights[r][strips[t] * S::LANES..][..S::LANES].as_mut_ptr();
                // SAFETY: of LANES elements.
                unsafe {
                    let more = s.load(to);
                    s.store(to, s.fma(s.to_f32(scores[t][r]), s.splat(scale), more));
                }
            }
        }
    }

    /// Scores become weights relative to the page's largest and integers; maxima, sums and `factors` follow.
    #[inline(always)]
    fn soften<const ALL: bool>(&mut self, s: S) {
        let count = self.count::<ALL>();
        let mut tops = [0.0; R];
        for r in 0..R {
            let mut top = s.splat(f32::NEG_INFINITY);
            for i in 0..count {
                let from = self.weights[r][self.strip::<ALL>(i) * S::LANES..][..S::LANES].as_ptr();
                // SAFETY: of LANES elements.
                top = s.max(top, unsafe { s.load(from) });
            }
            tops[r] = s.max_lanes(top);
        }
        let mut totals = [s.splat(0.0); 4];
        for r in 0..R {
            let shift = s.splat(-LOG2_E * tops[r]);
            for i in 0..count {
                let at = self.strip::<ALL>(i) * S::LANES;
                let row = self.weights[r][at..][..S::LANES].as_mut_ptr();
                // SAFETY: of LANES elements.
                let weight = exp2(s, s.fma(unsafe { s.load(row) }, s.splat(LOG2_E), shift));
                totals[r] = s.add(totals[r], weight);
                let whole = s.to_i32(s.mul(weight, s.splat(WEIGHT)));
                let [highs, lows] = &mut self.bytes[r];
                let (highs, lows) = (&mut highs[at..][..S::LANES], &mut lows[at..][..S::LANES]);
                // SAFETY: of LANES elements.
                unsafe {
                    s.store(row, weight);
                    s.store_narrow(highs.as_mut_ptr(), s.shift(whole, 7));
                    s.store_narrow(lows.as_mut_ptr(), s.and(whole, s.splat_i32(127)));
                }
            }
        }
        self.rise(s, tops, s.sum_lanes4(totals));
    }

    /// The maxima rise to `tops`, and `totals` relative to these are added to the sums.
    #[inline(always)]
    fn rise(&mut self, s: S, tops: [f32; R], totals: [f32; 4]) {
        let mut e = [0.0; LANES];
        let mut risen = false;
        for r in 0..R {
            let new = self.max[r].max(tops[r]);
            e[r] = tops[r] - new;
            e[4 + r] = self.max[r] - new;
            risen |= new > self.max[r];
            self.max[r] = new;
        }
        // SAFETY: `e` has as many elements as the widest vector.
        unsafe { s.store(e.as_mut_ptr(), s.exp(s.load(e.as_ptr()))) };
        for r in 0..R {
            self.factors[r] = e[r];
            self.sum[r] = self.sum[r] * e[4 + r] + totals[r] * e[r];
        }
        if risen {
            let groups = self.scorer.queries.head_dim() / GROUP;
            for r in 0..R {
                let old = e[4 + r];
                self.acc[r][..groups].as_flattened_mut().iter_mut().for_each(|x| *x *= old);
                self.escaped[r][..groups * GROUP].iter_mut().for_each(|x| *x *= old);
            }
        }
    }

    /// Puts the integer weights in the order in which values meet them.
    #[inline(always)]
    fn spread<const ALL: bool>(&mut self, s: S) {
        for i in 0..self.count::<ALL>() {
            let strip = self.strip::<ALL>(i);
            let tile = strip * S::LANES / TILE_TOKENS * TILE_TOKENS;
            let part = strip % (TILE_TOKENS / S::LANES) * 4;
            for block in 0..2 {
                let token = tile + block * 8 + part;
                for r in 0..R {
                    for half in 0..2 {
                        let from = self.bytes[r][half][token..][..S::LANES / 2].as_ptr();
                        let to = self.spread_at(strip * 2 + block, r, half);
                        // SAFETY: LANES / 2 bytes are read; `spread_at` gives room for a vector.
                        unsafe { s.store_bytes(to, s.load_eightfold(from)) };
                    }
                }
            }
        }
    }

    /// Where the vector of weights of block `block` (two for each strip) of row `r` is.
    #[inline(always)]
    fn spread_at(&mut self, block: usize, r: usize, half: usize) -> *mut u8 {
        debug_assert!(block < 2 * PAGE_TOKENS / S::LANES && r < R && half < 2);
        self.spread.0.as_mut_ptr().cast::<u8>().wrapping_add(((block * R + r) * 2 + half) * 4 * S::LANES)
    }

    #[inline(always)]
    fn weigh<const ALL: bool>(&mut self, s: S, view: &View) {
        let mut at = At { lines: view.values, group: 0, ahead: view.ahead[1] };
        // A loop of known length would be unrolled, all weights loaded before the first group: they spill.
        self.weighed = black_box(self.count::<ALL>());
        // SAFETY: a view's lines are those of its page's profile: groups of more bits first.
        unsafe {
            self.weigh_groups::<ALL, 8>(s, &mut at, view.page.values);
            self.weigh_groups::<ALL, 4>(s, &mut at, view.page.values);
            self.weigh_groups::<ALL, 2>(s, &mut at, view.page.values);
        }
    }

    /// # Safety
    /// At `at` are the lines of the groups of `BITS` bits of the `profile`, of at most [`GROUPS`] groups.
    #[inline(always)]
    unsafe fn weigh_groups<const ALL: bool, const BITS: usize>(
        &mut self,
        s: S,
        at: &mut At,
        profile: Profile,
    ) {
        let mut left = count_of::<BITS>(profile);
        // SAFETY: by the caller's promise, as many as are left.
        unsafe {
            while S::TILE >= 4 && left >= 2 {
                self.weigh_some::<ALL, BITS, 2>(s, at);
                left -= 2;
            }
            while left > 0 {
                self.weigh_some::<ALL, BITS, 1>(s, at);
                left -= 1;
            }
        }
    }

    /// # Safety
    /// At `at` are the lines of `N` groups of `BITS` bits, of at most [`GROUPS`] groups altogether.
    #[inline(always)]
    unsafe fn weigh_some<const ALL: bool, const BITS: usize, const N: usize>(&mut self, s: S, at: &mut At) {
        if at.ahead != 0 {
            for line in 0..N * BITS {
                s.prefetch_near(at.lines, at.ahead.wrapping_add(line * LINE));
            }
        }
        let mut sums = [[[s.splat_i32(0); 2]; R]; N];
        // Strips that share a line of 2-bit codes are met together, where both are.
        let together = if ALL { 2 * TILE_TOKENS / S::LANES } else { 1 };
        for i in 0..self.weighed / together {
            for j in 0..together {
                let strip = self.strip::<ALL>(i * together + j);
                // SAFETY: by the caller's promise; strips are below 64 / LANES.
                unsafe { self.weigh_strip::<BITS, N>(s, at.lines, strip, &mut sums) };
            }
        }
        for r in 0..R {
            let factor = s.splat(self.factors[r] * (UNIT / WEIGHT));
            for n in 0..N {
                let [high, low] = sums[n][r];
                let sum = s.fma(s.to_f32(high), s.splat(128.0), s.to_f32(low));
                let to = self.acc[r][at.group + n].as_mut_ptr();
                // SAFETY: a group has room for the widest vector.
                unsafe { s.store(to, s.fma(sum, factor, s.load(to))) };
            }
        }
        at.lines = at.lines.wrapping_add(N * BITS * LINE);
        at.group += N;
    }

    /// # Safety
    /// At `lines` are those of `N` groups of `BITS` bits; `strip` is below `64 / LANES`.
    #[inline(always)]
    unsafe fn weigh_strip<const BITS: usize, const N: usize>(
        &mut self,
        s: S,
        lines: *const u8,
        strip: usize,
        sums: &mut [[[S::I; 2]; R]; N],
    ) {
        let mut codes = [[s.splat_i32(0); 2]; N];
        for n in 0..N {
            // SAFETY: by the caller's promise.
            codes[n] =
                unsafe { unpack::<S, BITS>(s, &self.levels, lines.wrapping_add(n * BITS * LINE), strip) };
        }
        for block in 0..2 {
            for r in 0..R {
                for half in 0..2 {
                    // SAFETY: `spread_at` points to a vector.
                    let w = unsafe { s.load_bytes(self.spread_at(strip * 2 + block, r, half)) };
                    for n in 0..N {
                        sums[n][r][half] = s.dot_low(sums[n][r][half], w, codes[n][block]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn weigh_escapes<const ALL: bool>(&mut self, view: &View) {
        if !ALL && !view.escapes[1].is_empty() {
            for tile in (0..TILES).filter(|tile| view.tiles >> tile & 1 == 0) {
                for r in 0..R {
                    self.weights[r][tile * TILE_TOKENS..][..TILE_TOKENS].fill(0.0);
                }
            }
        }
        for escape in view.escapes[1] {
            let (token, channel, rest) = parts(escape);
            for r in 0..R {
                self.escaped[r][channel] += self.weights[r][token] * (self.factors[r] * rest);
            }
        }
    }

    /// Adds what was summed up to `acc` `[R, D]`, which is relative to the `old` maxima `[R]`.
    #[inline(always)]
    fn flush<T: Simd>(&self, old: &[f32], acc: &mut [f32]) {
        let d = acc.len() / R;
        for r in 0..R {
            let keep = if old[r] == self.max[r] { 1.0 } else { (old[r] - self.max[r]).exp() };
            let groups = acc[r * d..][..d].chunks_exact_mut(GROUP).zip(&self.acc[r]);
            for ((to, sums), escaped) in groups.zip(self.escaped[r].chunks_exact(GROUP)) {
                for c in 0..GROUP {
                    let more = if T::LANES > GROUP { sums[c] + sums[c + GROUP] } else { sums[c] };
                    to[c] = to[c] * keep + more + escaped[c];
                }
            }
        }
    }
}

/// `2^x` for `x` of at most 0, relative error 8e-6; below -126 as there. The polynomial meets `2^x` at Chebyshev
/// nodes, and at 0.
#[inline(always)]
fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.max(x, s.splat(-126.0));
    let n = s.round(x);
    let x = s.sub(x, n);
    let mut p = s.splat(9.656_71e-3);
    for c in [5.583_828e-2, 2.402_253e-1, 6.931_367_3e-1, 1.0] {
        p = s.fma(p, x, s.splat(c));
    }
    s.mul(p, s.exp2i(n))
}

/// Token, channel and number of an escape, within what arrays have.
#[inline(always)]
fn parts(escape: &Escape) -> (usize, usize, f32) {
    (usize::from(escape.token) % PAGE_TOKENS, usize::from(escape.channel), finite(escape.rest))
}

/// `f16::to_f32` of a finite number, without its run-time choice of instructions.
#[inline(always)]
fn finite(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let scaled = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(scaled.to_bits() | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests;
