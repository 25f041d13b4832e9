//! How does a step attend to layered pages?
//!
//! Four tiles at a time, a page's or some of several pages that have the same profiles, for up to four queries at once.
//! Scores are integers of the keys' and the queries' bytes. They
//! become weights relative to the batch's largest, integers of 14 bits in two halves, which meet the values' bytes the
//! same way. What a batch adds goes to f32 sums in the order of lanes, and those to the state once in a run of batches.
//!
//! What failed: chosen tiles page by page (one costs two thirds of what four do); all lines of a batch asked for at once, and
//! to the first cache (docs/log.md); a loop of known length over a page's tiles (unrolled, all its weights are loaded before the first group
//! and spill: a fifth slower); one group of values at a time where there are 32 registers
//! (7 % slower than two).

#![expect(
    clippy::needless_range_loop,
    reason = "arrays of registers indexed by rows and strips together; iterators over them would be closures"
)]

use super::queries::Queries;
use super::score::{Levels, Scorer, Strip, TILE_TOKENS, TILES, count_of, levels, lines_of, of_tile, unpack};
use super::{Escape, GROUP, LINE, Line, PAGE_TOKENS, Page, Pages, Profile, SKETCH, UNIT};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use crate::state::AttnState;
use half::f16;
use std::f32::consts::LOG2_E;
use std::hint::black_box;

/// The bits of all tiles of a page.
pub const ALL_TILES: u8 = (1 << TILES) - 1;

/// Batches after which sums go to the state: few enough to be in the second cache for the next four rows.
const RUN: usize = 64;

/// Most groups of a vector.
const GROUPS: usize = 256 / GROUP;

/// Most f32 lanes of a vector register.
const LANES: usize = 16;

/// Weights are integers up to this, in two halves of 7 bits.
const WEIGHT: f32 = 16383.0;

/// Exponents of weights are at most this: what rounding makes of 0 for scores of up to 710. What it makes of larger ones would be
/// weights above [`WEIGHT`].
const MOST_EXPONENT: f32 = 1.0 / 32768.0;

/// Folds some tiles of 16 tokens into `state` of as many rows as the queries and `D` channels, in units of the values'
/// spreads and less their means: `chosen` has for each page its index and a bit for each of its four tiles, the lowest for
/// the first. Of other tiles nothing is read but lines of 2-bit codes of keys that two share. Returns the bytes
/// read, such lines by halves, all of the pages' escapes.
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
    dispatch(isa, Attend { queries, pages, visits: chosen, state })
}

/// What attention needs of a tile.
#[derive(Clone, Copy)]
struct Tile<'a> {
    /// The page's keys in the groups that lie apart.
    apart: *const u8,
    /// The tile's other keys and its values.
    lines: *const u8,
    /// Of keys and of values.
    escapes: [&'a [Escape]; 2],
    /// Which of the page's.
    index: usize,
    /// From the tile's first on; 0: it is not attended to.
    tokens: usize,
}

impl<'a> Tile<'a> {
    /// One of a page's, whose lines are these, without escapes.
    #[inline(always)]
    fn new((apart, lines): (&'a [Line], &'a [Line]), page: &Page, index: usize) -> Tile<'a> {
        let lines = &lines[lines.len() / TILES * index..];
        let tokens = page.tokens().saturating_sub(index * TILE_TOKENS).min(TILE_TOKENS);
        Tile { apart: apart.as_ptr().cast(), lines: lines.as_ptr().cast(), escapes: [&[]; 2], index, tokens }
    }

    /// With those of its escapes among a page's, which are in order of tiles.
    #[inline(always)]
    fn with_escapes(self, of_page: [&'a [Escape]; 2]) -> Tile<'a> {
        let mut escapes = of_page;
        for half in 0..2 {
            // Few, and counted without a branch.
            let (mut before, mut last) = (0, 0);
            for escape in of_page[half] {
                before += usize::from(usize::from(escape.token) < self.index * TILE_TOKENS);
                last += usize::from(usize::from(escape.token) < (self.index + 1) * TILE_TOKENS);
            }
            escapes[half] = &of_page[half][before..last];
        }
        Tile { escapes, ..self }
    }

    /// What is added to a token of its page for where it is as the batch's tile `slot`; modulo a page.
    #[inline(always)]
    fn shift(&self, slot: usize) -> usize {
        (slot + TILES - self.index) * TILE_TOKENS
    }
}

/// Four tiles whose pages have the same profiles.
#[derive(Clone, Copy)]
struct Batch<'a> {
    of_keys: Profile,
    of_values: Profile,
    tiles: [Tile<'a>; TILES],
}

impl<'a> Batch<'a> {
    /// The whole page, all escapes with its first tile.
    #[inline(always)]
    fn of_page(pages: &'a Pages, index: usize) -> Batch<'a> {
        let page = &pages.pages[index];
        let lines = pages.lines_of(page);
        let mut tiles = [Tile::new(lines, page, 0); TILES];
        for t in 1..TILES {
            tiles[t] = Tile::new(lines, page, t);
        }
        tiles[0].escapes = pages.escapes_of(index);
        Batch { of_keys: page.keys, of_values: page.values, tiles }
    }

    /// Asks for what a tile has.
    #[inline(always)]
    fn ask<S: Simd>(&self, s: S, slot: usize) {
        let tile = &self.tiles[slot];
        let [apart, keys] = self.of_keys.split(SKETCH);
        let mut at = 0;
        for _ in 0..apart.eight {
            let (line, _) = of_tile::<8>(tile.index);
            s.prefetch(tile.apart, at + line * LINE);
            s.prefetch(tile.apart, at + (line + 1) * LINE);
            at += 8 * LINE;
        }
        for _ in 0..apart.four {
            s.prefetch(tile.apart, at + of_tile::<4>(tile.index).0 * LINE);
            at += 4 * LINE;
        }
        for _ in 0..apart.two {
            s.prefetch(tile.apart, at + of_tile::<2>(tile.index).0 * LINE);
            at += 2 * LINE;
        }
        for line in 0..keys.lines_of_tile() + self.of_values.lines_of_tile() {
            s.prefetch(tile.lines, line * LINE);
        }
        for escapes in tile.escapes {
            s.prefetch_near(escapes.as_ptr(), 0);
        }
    }
}

/// What is attended to, in batches: whole pages in order, and other tiles as soon as there are four of the same profiles. Also
/// the bytes of it.
#[inline(always)]
fn batches<'a, S: Simd>(s: S, pages: &'a Pages, visits: &[(u32, u8)]) -> (Vec<Batch<'a>>, usize) {
    for &(index, tiles) in visits {
        if tiles != ALL_TILES {
            s.prefetch_near(pages.escapes_of(index as usize)[0].as_ptr(), 0);
        }
    }
    // At most one a visit.
    let mut batches = Vec::with_capacity(visits.len());
    let (mut open, mut read) = (Vec::<(Batch, usize)>::new(), 0);
    for &(index, tiles) in visits {
        let page = &pages.pages[index as usize];
        let escapes = pages.escapes_of(index as usize);
        let held = tiles & ((1 << page.tokens().div_ceil(TILE_TOKENS)) - 1);
        read += (page.keys.lines() + page.values.lines()) * LINE * held.count_ones() as usize / TILES;
        read += (escapes[0].len() + escapes[1].len()) * size_of::<Escape>() + size_of::<Page>();
        if tiles == ALL_TILES {
            batches.push(Batch::of_page(pages, index as usize));
            continue;
        }
        let lines = pages.lines_of(page);
        let mut left = held;
        while left != 0 {
            let tile = Tile::new(lines, page, left.trailing_zeros() as usize).with_escapes(escapes);
            left &= left - 1;
            let mut at = 0;
            while at < open.len() && (open[at].0.of_keys, open[at].0.of_values) != (page.keys, page.values) {
                at += 1;
            }
            if at == open.len() {
                // Until there are others, with lines that can be read.
                let none = Tile { tokens: 0, escapes: [&[]; 2], ..tile };
                let batch = Batch { of_keys: page.keys, of_values: page.values, tiles: [none; TILES] };
                open.push((batch, 0));
            }
            let (batch, count) = &mut open[at];
            batch.tiles[*count] = tile;
            *count += 1;
            if *count == TILES {
                batches.push(open.swap_remove(at).0);
            }
        }
    }
    batches.extend(open.into_iter().map(|(batch, _)| batch));
    (batches, read)
}

struct Attend<'a> {
    queries: &'a Queries,
    pages: &'a Pages,
    /// Pages, and which of their tiles.
    visits: &'a [(u32, u8)],
    state: &'a mut AttnState,
}

impl Kernel for Attend<'_> {
    /// Bytes read.
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) -> usize {
        let (batches, read) = batches(s, self.pages, self.visits);
        let rows = self.queries.rows();
        for run in batches.chunks(RUN) {
            let mut first = 0;
            while first < rows {
                first += match rows - first {
                    1 => attend_rows::<S, 1>(s, &mut self, run, first),
                    2 => attend_rows::<S, 2>(s, &mut self, run, first),
                    3 => attend_rows::<S, 3>(s, &mut self, run, first),
                    _ => attend_rows::<S, 4>(s, &mut self, run, first),
                };
            }
        }
        read
    }
}

/// Folds batches into rows `first..first + R`; returns `R`.
#[inline(always)]
fn attend_rows<S: Simd, const R: usize>(s: S, a: &mut Attend, batches: &[Batch], first: usize) -> usize {
    let d = a.queries.head_dim();
    let rows = first..first + R;
    let mut fold = Fold::<S, R>::new(s, a.queries, first);
    fold.max.copy_from_slice(&a.state.max[rows.clone()]);
    fold.sum.copy_from_slice(&a.state.sum[rows.clone()]);
    for (at, batch) in batches.iter().enumerate() {
        fold.batch(s, batch, batches.get(at + 1));
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

/// A run of batches for `R` rows: what was summed up and what a batch needs on the way.
struct Fold<'a, S: Simd, const R: usize> {
    scorer: Scorer<'a, S, R>,
    levels: Levels<S::I>,
    max: [f32; R],
    sum: [f32; R],
    /// Sums of weighted values as lanes hold them: channel `c` of a group in lanes `c` and `c + 8`.
    acc: [[[f32; LANES]; GROUPS]; R],
    /// What escapes add to that.
    escaped: [[f32; GROUPS * GROUP]; R],
    /// Of a batch: what is added to scores, then weights relative to the batch's largest.
    weights: [[f32; PAGE_TOKENS]; R],
    /// Weights as integers: high and low seven bits.
    bytes: [[[u8; PAGE_TOKENS]; 2]; R],
    spread: Spread<R>,
    /// What the batch's weights must be multiplied by to be relative to `max`.
    factors: [f32; R],
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
            weighed: 0,
        }
    }

    /// Folds a batch in, and asks for the next one tile by tile, since a core waits where it has asked for too much.
    #[inline(always)]
    fn batch(&mut self, s: S, batch: &Batch, next: Option<&Batch>) {
        let next = next.unwrap_or(batch);
        next.ask(s, 0);
        self.add_to_scores(batch);
        next.ask(s, 1);
        self.score(s, batch);
        next.ask(s, 2);
        self.soften(s);
        next.ask(s, 3);
        self.spread(s);
        self.weigh(s, batch);
        self.weigh_escapes(batch);
    }

    /// What is added to scores: offsets and escapes, `-inf` where there is no token.
    #[inline(always)]
    fn add_to_scores(&mut self, batch: &Batch) {
        let (queries, first) = (self.scorer.queries, self.scorer.first);
        let mut rows: [&[f32]; R] = [&[]; R];
        for r in 0..R {
            rows[r] = queries.exact(first + r);
            self.weights[r] = [queries.scale_and_offset(first + r).1; PAGE_TOKENS];
        }
        for (slot, tile) in batch.tiles.iter().enumerate() {
            let shift = tile.shift(slot);
            for escape in tile.escapes[0] {
                let (token, channel, rest) = parts(escape, shift);
                for r in 0..R {
                    self.weights[r][token] += rows[r][channel] * rest;
                }
            }
            if tile.tokens < TILE_TOKENS {
                for r in 0..R {
                    self.weights[r][slot * TILE_TOKENS..][tile.tokens..TILE_TOKENS].fill(f32::NEG_INFINITY);
                }
            }
        }
    }

    #[inline(always)]
    fn score(&mut self, s: S, batch: &Batch) {
        self.scorer.set_profile(batch.of_keys);
        let mut i = 0;
        while i < PAGE_TOKENS / S::LANES {
            if S::TILE >= 4 {
                self.score_strips::<4>(s, batch, i);
                i += 4;
            } else {
                self.score_strips::<2>(s, batch, i);
                i += 2;
            }
        }
    }

    /// Strips `first..first + T` of the batch.
    #[inline(always)]
    fn score_strips<const T: usize>(&mut self, s: S, batch: &Batch, first: usize) {
        let of_tile = TILE_TOKENS / S::LANES;
        let none = Strip { apart: std::ptr::null(), lines: std::ptr::null(), tile: 0, part: 0 };
        let mut strips = [none; T];
        for t in 0..T {
            let Tile { apart, lines, index, .. } = batch.tiles[(first + t) / of_tile];
            strips[t] = Strip { apart, lines, tile: index, part: (first + t) % of_tile };
        }
        // SAFETY: a batch's lines are those of its pages' profile, which have four tiles.
        let scores = unsafe { self.scorer.scores::<T>(s, strips, 0) };
        for r in 0..R {
            let (scale, _) = self.scorer.queries.scale_and_offset(self.scorer.first + r);
            for t in 0..T {
                let to = self.weights[r][(first + t) * S::LANES..][..S::LANES].as_mut_ptr();
                // SAFETY: of LANES elements.
                unsafe {
                    let more = s.load(to);
                    s.store(to, s.fma(s.to_f32(scores[t][r]), s.splat(scale), more));
                }
            }
        }
    }

    /// Scores become weights relative to the batch's largest and integers; maxima, sums and `factors` follow.
    #[inline(always)]
    fn soften(&mut self, s: S) {
        let count = PAGE_TOKENS / S::LANES;
        let mut tops = [0.0; R];
        for r in 0..R {
            let mut top = s.splat(f32::NEG_INFINITY);
            for i in 0..count {
                let from = self.weights[r][i * S::LANES..][..S::LANES].as_ptr();
                // SAFETY: of LANES elements.
                top = s.max(top, unsafe { s.load(from) });
            }
            tops[r] = s.max_lanes(top);
        }
        let mut totals = [s.splat(0.0); 4];
        for r in 0..R {
            let shift = s.splat(-LOG2_E * tops[r]);
            for i in 0..count {
                let at = i * S::LANES;
                let row = self.weights[r][at..][..S::LANES].as_mut_ptr();
                // SAFETY: of LANES elements.
                let exponent = s.fma(unsafe { s.load(row) }, s.splat(LOG2_E), shift);
                let weight = exp2(s, s.min(exponent, s.splat(MOST_EXPONENT)));
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
    fn spread(&mut self, s: S) {
        for strip in 0..PAGE_TOKENS / S::LANES {
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
    fn weigh(&mut self, s: S, batch: &Batch) {
        // A loop of known length would be unrolled, all weights loaded before the first group: they spill.
        self.weighed = black_box(PAGE_TOKENS / S::LANES);
        let [_, keys] = batch.of_keys.split(SKETCH);
        let (mut at, mut group) = (keys.lines_of_tile() * LINE, 0);
        // SAFETY: a batch's lines are those of its pages' profiles: values after keys, groups of more bits first.
        unsafe {
            self.weigh_groups::<8>(s, batch, (&mut at, &mut group));
            self.weigh_groups::<4>(s, batch, (&mut at, &mut group));
            self.weigh_groups::<2>(s, batch, (&mut at, &mut group));
        }
    }

    /// # Safety
    /// `at` bytes into the tiles' lines are the groups of `BITS` bits of the batch's values, the first of them `group`, of at most
    /// [`GROUPS`] groups.
    #[inline(always)]
    unsafe fn weigh_groups<const BITS: usize>(
        &mut self,
        s: S,
        batch: &Batch,
        (at, group): (&mut usize, &mut usize),
    ) {
        let mut left = count_of::<BITS>(batch.of_values);
        // SAFETY: by the caller's promise, as many as are left.
        unsafe {
            while S::TILE >= 4 && left >= 2 {
                let bit = [0, if BITS == 2 { 4 } else { 0 }];
                let line = [0, if BITS == 2 { 0 } else { lines_of::<BITS>() * LINE }];
                self.weigh_some::<BITS, 2>(s, batch, *at, (line, bit), *group);
                *at += line[1] + lines_of::<BITS>() * LINE;
                *group += 2;
                left -= 2;
            }
            while left > 0 {
                // The second of a pair, if the number left is odd.
                let second = BITS == 2 && left % 2 == 1;
                let bit = if second { 4 } else { 0 };
                self.weigh_some::<BITS, 1>(s, batch, *at, ([0], [bit]), *group);
                *at += if BITS == 2 && !second { 0 } else { lines_of::<BITS>() * LINE };
                *group += 1;
                left -= 1;
            }
        }
    }

    /// # Safety
    /// `at` bytes into the tiles' lines, and `lines` bytes from there, are `N` groups of `BITS` bits, from group `group` on, of at
    /// most [`GROUPS`] groups altogether.
    #[inline(always)]
    unsafe fn weigh_some<const BITS: usize, const N: usize>(
        &mut self,
        s: S,
        batch: &Batch,
        at: usize,
        (lines, bits): ([usize; N], [i32; N]),
        group: usize,
    ) {
        let mut sums = [[[s.splat_i32(0); 2]; R]; N];
        let of_tile = TILE_TOKENS / S::LANES;
        for strip in 0..self.weighed {
            let tile = batch.tiles[strip / of_tile % TILES].lines.wrapping_add(at);
            let part = strip % of_tile * (4 * S::LANES);
            let mut codes = [[s.splat_i32(0); 2]; N];
            for n in 0..N {
                let line = tile.wrapping_add(lines[n] + part);
                // SAFETY: by the caller's promise.
                codes[n] = unsafe { unpack::<S, BITS>(s, &self.levels, line, bits[n]) };
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
        for r in 0..R {
            let factor = s.splat(self.factors[r] * (UNIT / WEIGHT));
            for n in 0..N {
                let [high, low] = sums[n][r];
                let sum = s.fma(s.to_f32(high), s.splat(128.0), s.to_f32(low));
                let to = self.acc[r][group + n].as_mut_ptr();
                // SAFETY: a group has room for the widest vector.
                unsafe { s.store(to, s.fma(sum, factor, s.load(to))) };
            }
        }
    }

    #[inline(always)]
    fn weigh_escapes(&mut self, batch: &Batch) {
        for (slot, tile) in batch.tiles.iter().enumerate() {
            let shift = tile.shift(slot);
            for escape in tile.escapes[1] {
                let (token, channel, rest) = parts(escape, shift);
                for r in 0..R {
                    self.escaped[r][channel] += self.weights[r][token] * (self.factors[r] * rest);
                }
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

/// `2^x` for `x` of at most 0 or hardly more, relative error 8e-6; below -126 as there. The polynomial meets `2^x` at Chebyshev
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

/// Token of a batch, channel and number of an escape, within what arrays have. `shift` is added to the token: how far its tile
/// is from where it is in its page.
#[inline(always)]
fn parts(escape: &Escape, shift: usize) -> (usize, usize, f32) {
    let token = usize::from(escape.token).wrapping_add(shift) % PAGE_TOKENS;
    (token, usize::from(escape.channel), finite(escape.rest))
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
