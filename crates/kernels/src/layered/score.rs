//! How do queries meet the keys of layered pages?
//!
//! Codes become bytes by table and meet the queries' bytes as integers: strips of as many tokens as a vector has lanes,
//! several at once. Here are those integer scores, for attention, and the sketch, which are scores of a few groups.

#![expect(
    clippy::needless_range_loop,
    reason = "arrays of registers indexed by rows and strips together; iterators over them would be closures"
)]

use super::queries::Queries;
use super::{GROUP, LINE, PAGE_TOKENS, Page, Pages, Profile, Width};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use std::ops::Range;

/// Tokens of a tile, which is what can be chosen.
pub const TILE_TOKENS: usize = 16;

/// Lines that [`sketch`] asks for ahead.
const AHEAD: usize = 48;

/// Tiles of a page.
pub const TILES: usize = PAGE_TOKENS / TILE_TOKENS;

/// The weight of each tile, `[R, 4 * pages]`: the sum of its tokens' `e^(score - shift)`, as far as the first
/// [`SKETCH`](super::SKETCH) groups of the keys' channels tell (fewer if a page's keys have fewer): offsets included, escapes
/// not. A token's weight is within 4 % of that, and at most `e^60`: `shifts` `[R]` should be near what scores come to. Returns
/// the bytes read.
///
/// # Panics
/// If a shape does not fit, or a page does not exist.
pub fn sketch(
    isa: Isa,
    (queries, shifts): (&Queries, &[f32]),
    (pages, range): (&Pages, Range<usize>),
    out: &mut [f32],
) -> usize {
    assert_eq!(queries.head_dim(), pages.head_dim(), "queries and pages of other widths");
    assert_eq!(queries.rows(), shifts.len(), "shifts of other queries");
    assert!(
        range.start <= range.end && range.end <= pages.pages.len(),
        "pages {range:?} of {}",
        pages.pages.len()
    );
    assert_eq!(out.len(), queries.rows() * range.len() * TILES, "weights of the wrong length");
    dispatch(isa, Sketch { queries, shifts, pages, range, out, read: 0 })
}

struct Sketch<'a> {
    queries: &'a Queries,
    shifts: &'a [f32],
    pages: &'a Pages,
    range: Range<usize>,
    out: &'a mut [f32],
    /// Bytes.
    read: usize,
}

impl Kernel for Sketch<'_> {
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
    let stride = a.range.len() * TILES;
    for (i, index) in a.range.clone().enumerate() {
        let page = &a.pages.pages[index];
        let [profile, _] = page.keys.split();
        let [leading, ..] = a.pages.lines_of(page);
        a.read += size_of_val(leading) + size_of::<Page>();
        let nothing = (std::ptr::null(), 0);
        let lines = [(leading.as_ptr().cast(), AHEAD * LINE), nothing];
        scorer.set_profile(profile);
        let mut of_tiles = [[s.splat(0.0); TILES]; R];
        if S::LANES == TILE_TOKENS {
            // SAFETY: the profile's lines were sliced; strips are below 64 / LANES.
            let scores = unsafe { scorer.scores::<4>(s, lines, [0, 1, 2, 3]) };
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
                let scores = unsafe { scorer.scores::<2>(s, lines, [2 * tile, 2 * tile + 1]) };
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
            let to = &mut a.out[(first + r) * stride + i * TILES..][..TILES];
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

/// The levels of strip `strip` of the group at `group`: of its tile's two blocks, `LANES` times four codes each. A
/// tile has `16 / LANES` strips.
///
/// # Safety
/// The group's lines, as many as [`Width::lines`] says, are readable; `strip` is below `64 / LANES`.
#[inline(always)]
pub(super) unsafe fn unpack<S: Simd, const BITS: usize>(
    s: S,
    l: &Levels<S::I>,
    group: *const u8,
    strip: usize,
) -> [S::I; 2] {
    let tile = strip * S::LANES / TILE_TOKENS;
    let part = strip % (TILE_TOKENS / S::LANES) * (4 * S::LANES);
    let line = match BITS {
        8 => tile * 2,
        4 => tile,
        _ => tile / 2,
    };
    let at = group.wrapping_add(line * LINE + part);
    // SAFETY: the line is one of the group's; `part` and a vector after it lie within.
    let first = unsafe { s.load_bytes(at) };
    match BITS {
        8 => {
            // SAFETY: as above, of the line that follows.
            let second = unsafe { s.load_bytes(at.wrapping_add(LINE)) };
            [s.xor(first, l.flip), s.xor(second, l.flip)]
        }
        4 => {
            let (low, high) = (s.and(first, l.nibble), s.and(s.shift(first, 4), l.nibble));
            [s.lookup(l.four, low), s.lookup(l.four, high)]
        }
        _ => {
            let both = s.and(s.shift(first, (tile % 2 * 4) as i32), l.nibble);
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

/// The group that a walk over a page's keys or values is at.
pub(super) struct At {
    pub(super) lines: *const u8,
    pub(super) group: usize,
    /// Bytes to what should be in the cache next; 0: nothing.
    pub(super) ahead: usize,
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

    /// The integer scores of the tokens of `strips`. `lines` are those of the groups that lie apart and of the others, each
    /// with how far ahead to ask for what comes next (0: nothing).
    ///
    /// # Safety
    /// The lines of keys of `self.profile` are readable at `lines`; each strip is below `64 / LANES`.
    #[inline(always)]
    pub(super) unsafe fn scores<const T: usize>(
        &self,
        s: S,
        lines: [(*const u8, usize); 2],
        strips: [usize; T],
    ) -> [[S::I; R]; T] {
        let mut acc = [[s.splat_i32(0); R]; T];
        for r in 0..R {
            let start = s.dot_full_start(self.sums[r]);
            for t in 0..T {
                acc[t][r] = start;
            }
        }
        let mut at = At { lines: lines[0].0, group: 0, ahead: 0 };
        for ((lines, ahead), profile) in lines.into_iter().zip(self.profile.split()) {
            (at.lines, at.ahead) = (lines, ahead);
            // SAFETY: the profile's groups follow each other, those of more bits first.
            unsafe {
                self.add_groups::<T, 8>(s, (&mut at, profile), strips, &mut acc);
                self.add_groups::<T, 4>(s, (&mut at, profile), strips, &mut acc);
                self.add_groups::<T, 2>(s, (&mut at, profile), strips, &mut acc);
            }
        }
        acc
    }

    /// # Safety
    /// As for `scores`, with the groups of `BITS` bits at `at`.
    #[inline(always)]
    unsafe fn add_groups<const T: usize, const BITS: usize>(
        &self,
        s: S,
        (at, profile): (&mut At, Profile),
        strips: [usize; T],
        acc: &mut [[S::I; R]; T],
    ) {
        let mut queries = [std::ptr::null(); R];
        for r in 0..R {
            queries[r] = self.queries.bytes(self.first + r).as_ptr();
        }
        for _ in 0..count_of::<BITS>(profile) {
            // Once, if strips are scored in several calls.
            if at.ahead != 0 && strips[0] == 0 {
                for line in 0..BITS {
                    s.prefetch_near(at.lines, at.ahead.wrapping_add(line * LINE));
                }
            }
            let mut codes = [[s.splat_i32(0); 2]; T];
            for t in 0..T {
                // SAFETY: by the caller's promise.
                codes[t] = unsafe { unpack::<S, BITS>(s, &self.levels, at.lines, strips[t]) };
            }
            for half in 0..2 {
                for r in 0..R {
                    let four = queries[r].wrapping_add(at.group * GROUP + half * 4).cast::<i32>();
                    // SAFETY: the profile has no more groups than the queries (`set_profile`).
                    let q = s.splat_i32(unsafe { four.read_unaligned() });
                    for t in 0..T {
                        acc[t][r] = s.dot_full(acc[t][r], codes[t][half], q);
                    }
                }
            }
            at.lines = at.lines.wrapping_add(BITS * LINE);
            at.group += 1;
        }
    }
}
