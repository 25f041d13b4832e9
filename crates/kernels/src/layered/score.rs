//! How do queries meet the keys of layered pages?
//!
//! Codes become bytes by table and meet the queries' bytes as integers: strips of as many tokens as a vector has lanes,
//! several at once. Here are those integer scores, for attention, and the sketch, which are scores of a few groups.

#![expect(
    clippy::needless_range_loop,
    reason = "arrays of registers indexed by rows and strips together; iterators over them would be closures"
)]

use super::queries::Queries;
use super::{GROUP, LINE, PAGE_TOKENS, Page, Pages, Profile, SKETCH, Width};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use std::ops::Range;

/// Tokens of a tile, which is what can be chosen.
pub const TILE_TOKENS: usize = 16;

/// Lines that [`sketch`] asks for ahead.
const AHEAD: usize = 48;

/// Tiles of a page.
pub const TILES: usize = PAGE_TOKENS / TILE_TOKENS;

/// The weight of each tile, `[R, 4 * pages]` by rows: the sum of its tokens' `e^(score - shift)`, as far as the first
/// [`SKETCH`] groups of the keys' channels tell (fewer if a page's keys have fewer): offsets included, escapes
/// not. A token's weight is within 4 % of that, and at most `e^60`: `shifts` `[R]` should be near what scores come to. Returns
/// the bytes read.
///
/// # Panics
/// If a shape does not fit, or a page does not exist.
pub fn sketch(
    isa: Isa,
    (queries, shifts): (&Queries, &[f32]),
    (pages, range): (&Pages, Range<usize>),
    out: &mut [&mut [f32]],
) -> usize {
    assert_eq!(queries.head_dim(), pages.head_dim(), "queries and pages of other widths");
    assert_eq!(queries.rows(), shifts.len(), "shifts of other queries");
    assert!(
        range.start <= range.end && range.end <= pages.pages.len(),
        "pages {range:?} of {}",
        pages.pages.len()
    );
    let fits = |row: &&mut [f32]| row.len() == range.len() * TILES;
    assert!(out.len() == queries.rows() && out.iter().all(fits), "weights of another shape");
    dispatch(isa, Sketch { queries, shifts, pages, range, out, read: 0 })
}

struct Sketch<'a, 'o> {
    queries: &'a Queries,
    shifts: &'a [f32],
    pages: &'a Pages,
    range: Range<usize>,
    out: &'a mut [&'o mut [f32]],
    /// Bytes.
    read: usize,
}

impl Kernel for Sketch<'_, '_> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) -> usize {
        let rows = self.queries.rows();
        let mut first = 0;
        while first < rows {
            first += match rows - first {
                1 => sketch_rows::<S, 1>(s, &mut self, first),
                2 => sketch_rows::<S, 2>(s, &mut self, first),
                3 => sketch_rows::<S, 3>(s, &mut self, first),
                _ => sketch_rows::<S, 4>(s, &mut self, first),
            };
        }
        self.read / rows.div_ceil(4)
    }
}

/// Rows `first..first + R`; returns `R`.
#[inline(always)]
fn sketch_rows<S: Simd, const R: usize>(s: S, a: &mut Sketch, first: usize) -> usize {
    let mut scorer = Scorer::<S, R>::new(s, a.queries, first);
    let mut weighers = [Weigher::<S>::new(s, 0.0, 0.0); R];
    for r in 0..R {
        let (scale, offset) = a.queries.scale_and_offset(first + r);
        weighers[r] = Weigher::new(s, scale, offset - a.shifts[first + r]);
    }
    for (i, index) in a.range.clone().enumerate() {
        let page = &a.pages.pages[index];
        let [profile, _] = page.keys.split(SKETCH);
        let (apart, _) = a.pages.lines_of(page);
        a.read += size_of_val(apart) + size_of::<Page>();
        let of_tile = TILE_TOKENS / S::LANES;
        let apart = apart.as_ptr().cast();
        let strip = |i| Strip { apart, lines: std::ptr::null(), tile: i / of_tile, part: i % of_tile };
        let ahead = AHEAD * LINE;
        scorer.set_profile(profile);
        let mut of_tiles = [[s.splat(0.0); TILES]; R];
        if S::LANES == TILE_TOKENS {
            // SAFETY: the profile's lines were sliced; a page has 64 / LANES strips.
            let scores = unsafe { scorer.scores::<4>(s, [strip(0), strip(1), strip(2), strip(3)], ahead) };
            for r in 0..R {
                for t in 0..TILES {
                    of_tiles[r][t] = weighers[r].weigh(s, scores[t][r]);
                }
                if let Some((tile, tokens)) = page.last_part() {
                    of_tiles[r][tile] = first_of(s, of_tiles[r][tile], tokens);
                }
            }
        } else {
            for tile in 0..TILES {
                // SAFETY: as above.
                let scores = unsafe { scorer.scores::<2>(s, [strip(2 * tile), strip(2 * tile + 1)], ahead) };
                for r in 0..R {
                    let mut halves = [weighers[r].weigh(s, scores[0][r]), weighers[r].weigh(s, scores[1][r])];
                    if let Some((_, tokens)) = page.last_part().filter(|(last, _)| *last == tile) {
                        halves[0] = first_of(s, halves[0], tokens);
                        halves[1] = first_of(s, halves[1], tokens.saturating_sub(S::LANES));
                    }
                    of_tiles[r][tile] = s.add(halves[0], halves[1]);
                }
            }
        }
        let held = page.tokens().div_ceil(TILE_TOKENS);
        for r in 0..R {
            let to = &mut a.out[first + r][i * TILES..][..TILES];
            to.copy_from_slice(&s.sum_lanes4(of_tiles[r]));
            to[held..].fill(0.0);
        }
    }
    R
}

/// What makes weights of a row's integer scores: `2^x` from a float's bits with `x` in its exponent, where the fraction
/// of `x` lands in the mantissa and stands for a straight line between powers of 2 (Schraudolph 1999, "A Fast, Compact
/// Approximation of the Exponential Function").
#[derive(Clone, Copy)]
struct Weigher<S: Simd> {
    scale: S::V,
    offset: S::V,
    most: S::V,
}

impl<S: Simd> Weigher<S> {
    /// Bits a factor of e: 2^23 for one of 2.
    const STEEP: f32 = std::f32::consts::LOG2_E * 8_388_608.0;
    /// Bits of 1, less what makes the line's mean error 0: it is 4 % above the power in the mean.
    const ONE: f32 = (127.0 - 0.0566) * 8_388_608.0;

    #[inline(always)]
    fn new(s: S, scale: f32, offset: f32) -> Self {
        Weigher {
            scale: s.splat(scale * Self::STEEP),
            offset: s.splat(offset * Self::STEEP + Self::ONE),
            most: s.splat(60.0 * Self::STEEP + Self::ONE),
        }
    }

    /// `e^(score * scale + offset)`, within 4 %; what would be below 1e-38 is about 0.
    #[inline(always)]
    fn weigh(self, s: S, scores: S::I) -> S::V {
        let bits = s.fma(s.to_f32(scores), self.scale, self.offset);
        s.of_bits(s.to_i32(s.min(s.max(bits, s.splat(0.0)), self.most)))
    }
}

/// The first `count` elements, and zeros.
#[inline(always)]
fn first_of<S: Simd>(s: S, x: S::V, count: usize) -> S::V {
    let mut elements = [0.0; TILE_TOKENS];
    // SAFETY: a vector has at most as many lanes.
    unsafe { s.store(elements.as_mut_ptr(), x) };
    elements[count.min(TILE_TOKENS)..].fill(0.0);
    // SAFETY: as above.
    unsafe { s.load(elements.as_ptr()) }
}

/// What codes stand for, as tables.
pub(super) struct Levels<I> {
    four: I,
    /// Of the low two bits of an index of four, and of the high two.
    two: [I; 2],
    nibble: I,
    /// What 8-bit codes differ by from what they stand for.
    flip: I,
}

/// Levels as signed bytes, their highest bits flipped by `flip`: 0x80 makes them level plus 128.
#[inline(always)]
pub(super) fn levels<S: Simd>(s: S, flip: u8) -> Levels<S::I> {
    let (mut four, mut low, mut high) = ([0; 16], [0; 16], [0; 16]);
    for i in 0..16 {
        four[i] = Width::Four.level(i as u8) as u8 ^ flip;
        low[i] = Width::Two.level(i as u8 % 4) as u8 ^ flip;
        high[i] = Width::Two.level(i as u8 / 4) as u8 ^ flip;
    }
    Levels {
        four: s.table(four),
        two: [s.table(low), s.table(high)],
        nibble: s.splat_i32(0x0f0f_0f0f),
        flip: s.splat_i32(i32::from_ne_bytes([flip ^ 0x80; 4])),
    }
}

/// The levels of a strip of a group: of its tile's two blocks, `LANES` times four codes each. `line` is where the strip's bytes
/// begin in the tile's first line of the group; with 2 bits its codes are those from bit `shift` on.
///
/// # Safety
/// The strip's bytes are readable: a vector, with 8 bits another one a line further.
#[inline(always)]
pub(super) unsafe fn unpack<S: Simd, const BITS: usize>(
    s: S,
    l: &Levels<S::I>,
    line: *const u8,
    shift: i32,
) -> [S::I; 2] {
    // SAFETY: by the caller's promise.
    let first = unsafe { s.load_bytes(line) };
    match BITS {
        8 => {
            // SAFETY: as above.
            let second = unsafe { s.load_bytes(line.wrapping_add(LINE)) };
            [s.xor(first, l.flip), s.xor(second, l.flip)]
        }
        4 => {
            let (low, high) = (s.and(first, l.nibble), s.and(s.shift(first, 4), l.nibble));
            [s.lookup(l.four, low), s.lookup(l.four, high)]
        }
        _ => {
            let both = s.and(s.shift(first, shift), l.nibble);
            [s.lookup(l.two[0], both), s.lookup(l.two[1], both)]
        }
    }
}

/// How many groups of a profile have `BITS` bits.
#[inline(always)]
pub(super) fn count_of<const BITS: usize>(profile: Profile) -> usize {
    usize::from(match BITS {
        8 => profile.eight,
        4 => profile.four,
        _ => profile.two,
    })
}

/// A strip of tokens to be scored: `LANES` tokens of a tile, which has `16 / LANES` strips.
#[derive(Clone, Copy)]
pub(super) struct Strip {
    /// The groups that lie apart, of the whole page.
    pub(super) apart: *const u8,
    /// The tile's lines of the others.
    pub(super) lines: *const u8,
    /// Which of the page's tiles.
    pub(super) tile: usize,
    /// Which of the tile's strips.
    pub(super) part: usize,
}

/// Rows `first..first + R` of the queries, and what meets keys of one profile.
pub(super) struct Scorer<'a, S: Simd, const R: usize> {
    pub(super) queries: &'a Queries,
    pub(super) first: usize,
    levels: Levels<S::I>,
    profile: Profile,
    /// Sums of the queries' bytes over the profile's groups.
    sums: [i32; R],
}

impl<'a, S: Simd, const R: usize> Scorer<'a, S, R> {
    #[inline(always)]
    pub(super) fn new(s: S, queries: &'a Queries, first: usize) -> Self {
        Scorer { queries, first, levels: levels(s, 0x80), profile: Profile::default(), sums: [0; R] }
    }

    #[inline(always)]
    pub(super) fn set_profile(&mut self, profile: Profile) {
        if self.profile == profile {
            return;
        }
        assert!(profile.groups() <= self.queries.head_dim() / GROUP, "{profile:?}: too many groups");
        self.profile = profile;
        for r in 0..R {
            self.sums[r] = self.queries.sum(self.first + r, profile.groups());
        }
    }

    /// The integer scores of the tokens of `strips`. Of the groups that lie apart, the lines `ahead` bytes after the first strip's
    /// are asked for (0: nothing).
    ///
    /// # Safety
    /// The lines of keys of `self.profile` are readable where the strips say, whose tiles and parts exist.
    #[inline(always)]
    pub(super) unsafe fn scores<const T: usize>(
        &self,
        s: S,
        strips: [Strip; T],
        ahead: usize,
    ) -> [[S::I; R]; T] {
        let mut acc = [[s.splat_i32(0); R]; T];
        for r in 0..R {
            let start = s.dot_full_start(self.sums[r]);
            for t in 0..T {
                acc[t][r] = start;
            }
        }
        let mut queries = [std::ptr::null(); R];
        for r in 0..R {
            queries[r] = self.queries.bytes(self.first + r).as_ptr();
        }
        let [apart, others] = self.profile.split(SKETCH);
        // SAFETY: groups of more bits first; those that lie apart follow each other, and so do a tile's lines of the others.
        unsafe {
            let mut at = 0;
            let mut group = 0;
            self.add_apart::<T, 8>(s, &queries, (&mut at, &mut group), (apart, ahead), &strips, &mut acc);
            self.add_apart::<T, 4>(s, &queries, (&mut at, &mut group), (apart, ahead), &strips, &mut acc);
            self.add_apart::<T, 2>(s, &queries, (&mut at, &mut group), (apart, ahead), &strips, &mut acc);
            at = 0;
            self.add_others::<T, 8>(s, &queries, (&mut at, &mut group), others, &strips, &mut acc);
            self.add_others::<T, 4>(s, &queries, (&mut at, &mut group), others, &strips, &mut acc);
            self.add_others::<T, 2>(s, &queries, (&mut at, &mut group), others, &strips, &mut acc);
        }
        acc
    }

    /// # Safety
    /// As for `scores`, with the groups of `BITS` bits that lie apart, the first of them `group`, `at` bytes after those of more.
    #[inline(always)]
    unsafe fn add_apart<const T: usize, const BITS: usize>(
        &self,
        s: S,
        queries: &[*const i8; R],
        (at, group): (&mut usize, &mut usize),
        (profile, ahead): (Profile, usize),
        strips: &[Strip; T],
        acc: &mut [[S::I; R]; T],
    ) {
        for _ in 0..count_of::<BITS>(profile) {
            // Once, if strips are scored in several calls.
            if ahead != 0 && strips[0].tile == 0 && strips[0].part == 0 {
                for line in 0..BITS {
                    s.prefetch_near(strips[0].apart, ahead.wrapping_add(*at + line * LINE));
                }
            }
            let mut codes = [[s.splat_i32(0); 2]; T];
            for t in 0..T {
                let Strip { apart, tile, part, .. } = strips[t];
                let (line, shift) = of_tile::<BITS>(tile);
                let line = apart.wrapping_add(*at + line * LINE + part * (4 * S::LANES));
                // SAFETY: by the caller's promise.
                codes[t] = unsafe { unpack::<S, BITS>(s, &self.levels, line, shift) };
            }
            // SAFETY: the profile has no more groups than the queries (`set_profile`).
            unsafe { meet(s, queries, *group, &codes, acc) };
            *at += BITS * LINE;
            *group += 1;
        }
    }

    /// # Safety
    /// As for `scores`, with the groups of `BITS` bits that lie with their tiles.
    #[inline(always)]
    unsafe fn add_others<const T: usize, const BITS: usize>(
        &self,
        s: S,
        queries: &[*const i8; R],
        (at, group): (&mut usize, &mut usize),
        profile: Profile,
        strips: &[Strip; T],
        acc: &mut [[S::I; R]; T],
    ) {
        // Groups that share lines.
        let shared = if BITS == 2 { 2 } else { 1 };
        for _ in 0..count_of::<BITS>(profile) / shared {
            for i in 0..shared {
                let mut codes = [[s.splat_i32(0); 2]; T];
                for t in 0..T {
                    let line = strips[t].lines.wrapping_add(*at + strips[t].part * (4 * S::LANES));
                    // SAFETY: by the caller's promise.
                    codes[t] = unsafe { unpack::<S, BITS>(s, &self.levels, line, 4 * i as i32) };
                }
                // SAFETY: the profile has no more groups than the queries (`set_profile`).
                unsafe { meet(s, queries, *group, &codes, acc) };
                *group += 1;
            }
            *at += lines_of::<BITS>() * LINE;
        }
    }
}

/// Adds the products of codes and the group `group` of the bytes of `queries`.
///
/// # Safety
/// The queries have such a group.
#[inline(always)]
unsafe fn meet<S: Simd, const R: usize, const T: usize>(
    s: S,
    queries: &[*const i8; R],
    group: usize,
    codes: &[[S::I; 2]; T],
    acc: &mut [[S::I; R]; T],
) {
    for half in 0..2 {
        for r in 0..R {
            let four = queries[r].wrapping_add(group * GROUP + half * 4).cast::<i32>();
            // SAFETY: by the caller's promise.
            let q = s.splat_i32(unsafe { four.read_unaligned() });
            for t in 0..T {
                acc[t][r] = s.dot_full(acc[t][r], codes[t][half], q);
            }
        }
    }
}

/// In a group that lies apart: the first line of a tile, and the bit from which its codes are where two tiles share that.
#[inline(always)]
pub(super) fn of_tile<const BITS: usize>(tile: usize) -> (usize, i32) {
    match BITS {
        8 => (tile * 2, 0),
        4 => (tile, 0),
        _ => (tile / 2, (tile % 2 * 4) as i32),
    }
}

/// Lines of a tile of one group that lies with it, or of two where they share one.
#[inline(always)]
pub(super) const fn lines_of<const BITS: usize>() -> usize {
    if BITS == 8 { 2 } else { 1 }
}
