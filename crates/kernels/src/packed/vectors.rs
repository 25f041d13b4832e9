//! How are packed vectors met without unpacking them?
//!
//! A chunk of `LANES` channels takes its bits of the bitmap, spreads the next kept elements over the lanes that they
//! mark (`Simd::expand_f16`), and meets the queries of up to four rows; the bits' count says where the next chunk's
//! elements start. Several vectors are in flight, and their sums across lanes are taken together.
//!
//! What failed: `array::from_fn` and `map` over vectors (their closures are compiled outside the function that
//! has the CPU features and hand vectors over in memory: 4 times slower); shuffling bytes by a table of bitmap bytes in
//! place of `vpexpandps` (for all vectors no faster, for one of four 7 % slower); two vectors in flight in place of four
//! (8 % slower with 16 lanes); spreading 32 f16 at once (VBMI2's `vpexpandw`) and converting after it: half as many
//! spreads, but no faster, for the multiply-adds of four rows then wait for the conversions; a number of chunks that the
//! compiler knows (no change).
#![expect(
    clippy::needless_range_loop,
    reason = "arrays of registers indexed by rows and chunks together; iterators over them would be closures"
)]

use super::{PackedPage, Rows};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use half::f16;
use std::ops::Range;

/// Rows that share the load of an element: more would not fit the registers.
pub(super) const ROWS: usize = 4;

/// Cache line, in bytes.
pub(super) const LINE: usize = 64;

/// A computation for a number of rows and a group size known to the compiler.
pub(super) trait Shaped {
    /// Must be `#[inline(always)]`, like all that it calls. `R` and `G` are as the caller of [`shaped`] said.
    fn run<S: Simd, const R: usize, const G: usize>(self, s: S);
}

struct Fixed<T, const R: usize, const G: usize>(T);

impl<T: Shaped, const R: usize, const G: usize> Kernel for Fixed<T, R, G> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.run::<S, R, G>(s);
    }
}

pub(super) fn shaped<T: Shaped>(isa: Isa, rows: usize, group: usize, task: T) {
    fn grouped<T: Shaped, const R: usize>(isa: Isa, group: usize, task: T) {
        match group {
            1 => dispatch(isa, Fixed::<T, R, 1>(task)),
            2 => dispatch(isa, Fixed::<T, R, 2>(task)),
            4 => dispatch(isa, Fixed::<T, R, 4>(task)),
            _ => unreachable!("PackedShape checks the group"),
        }
    }
    match rows {
        1 => grouped::<T, 1>(isa, group, task),
        2 => grouped::<T, 2>(isa, group, task),
        3 => grouped::<T, 3>(isa, group, task),
        4 => grouped::<T, 4>(isa, group, task),
        _ => unreachable!("rows come in chunks of at most {ROWS}"),
    }
}

/// Packed vectors of a page, groups of `G`.
#[derive(Clone, Copy)]
pub(super) struct Packed<const G: usize> {
    elements: *const f16,
    pub(super) bitmaps: *const u8,
    /// Elements of a vector, and bytes of its bitmap.
    strides: (usize, usize),
}

impl<const G: usize> Packed<G> {
    #[inline(always)]
    pub(super) fn new(page: &PackedPage, rows: Rows) -> Packed<G> {
        let (words, shape) = (&*page.words, page.shape);
        let strides = (shape.kept(), shape.channels().div_ceil(8 * G));
        debug_assert!(rows.elements + rows.n * strides.0 <= words.len());
        debug_assert!(rows.bitmaps + rows.n * strides.1 <= 2 * words.len());
        // SAFETY: a layout's rows lie inside its page.
        unsafe {
            let elements = words.as_ptr().add(rows.elements).cast();
            let bitmaps = words.as_ptr().cast::<u8>().add(rows.bitmaps);
            Packed { elements, bitmaps, strides }
        }
    }

    /// Makes vector `n` the first one.
    #[inline(always)]
    pub(super) fn skip(&mut self, n: usize) {
        self.elements = self.elements.wrapping_add(n * self.strides.0);
        self.bitmaps = self.bitmaps.wrapping_add(n * self.strides.1);
    }

    /// `LANES` channels from `chunk * LANES` on of the vector whose bitmap is at `bitmap`; `at` is where its
    /// elements of the chunk start, and is moved past them.
    ///
    /// # Safety
    /// The vector and the chunk exist, and `at` is as said.
    #[inline(always)]
    pub(super) unsafe fn chunk<S: Simd>(self, s: S, bitmap: *const u8, chunk: usize, at: &mut usize) -> S::V {
        // SAFETY: bitmaps of existing vectors have bytes for every chunk. A page's bitmaps have exactly r bits
        // set, so `at` is at most the end of the vector, and LOAD_PADDING words follow the last one.
        unsafe {
            let bits = bits_of_chunk::<S, G>(bitmap, chunk);
            let x = s.expand_f16(self.elements.add(*at), lanes::<G>(bits));
            *at += G * bits.count_ones() as usize;
            x
        }
    }

    /// `out[r, i]` = `queries[r]` . vector `i`, for the first `n` vectors.
    ///
    /// # Safety
    /// `queries` is `[R, C]` and the vectors exist.
    #[inline(always)]
    pub(super) unsafe fn dot<S: Simd, const R: usize, M: Meanwhile>(
        mut self,
        s: S,
        queries: &[f32],
        n: usize,
        mut out: Out,
        meanwhile: &mut M,
    ) {
        let mut i = 0;
        // SAFETY: the caller's promise; `i + 4 <= n` or `i < n` as the loops say.
        unsafe {
            while i + 4 <= n {
                meanwhile.four(s);
                if S::LANES == 16 || R == 1 {
                    self.dot_some::<S, R, 4>(s, queries, &mut out, i);
                } else {
                    let mut rest = self;
                    rest.skip(2);
                    self.dot_some::<S, R, 2>(s, queries, &mut out, i);
                    rest.dot_some::<S, R, 2>(s, queries, &mut out, i + 2);
                }
                self.skip(4);
                i += 4;
            }
            if i < n {
                meanwhile.four(s);
            }
            while i < n {
                self.dot_some::<S, R, 1>(s, queries, &mut out, i);
                self.skip(1);
                i += 1;
            }
        }
    }

    /// `out[r, first + i]` = `queries[r]` . vector `i`, for the first `N` vectors.
    ///
    /// # Safety
    /// As for [`Self::dot`].
    #[inline(always)]
    unsafe fn dot_some<S: Simd, const R: usize, const N: usize>(
        self,
        s: S,
        queries: &[f32],
        out: &mut Out,
        first: usize,
    ) {
        let c = queries.len() / R;
        let mut acc = [[s.splat(0.0); R]; N];
        let (mut x, mut at, mut bitmaps) = ([s.splat(0.0); N], [0; N], [self.bitmaps; N]);
        for i in 0..N {
            at[i] = i * self.strides.0;
            bitmaps[i] = self.bitmaps.wrapping_add(i * self.strides.1);
        }
        for chunk in 0..c / S::LANES {
            for i in 0..N {
                // SAFETY: the vectors exist by the caller's promise, `chunk` is one of C / LANES, and `at` is
                // what the chunks before it left.
                x[i] = unsafe { self.chunk(s, bitmaps[i], chunk, &mut at[i]) };
            }
            for r in 0..R {
                // SAFETY: `queries` has R rows of C floats.
                let q = unsafe { s.load(queries.as_ptr().add(r * c + chunk * S::LANES)) };
                for i in 0..N {
                    acc[i][r] = s.fma(q, x[i], acc[i][r]);
                }
            }
        }
        let mut flat = [s.splat(0.0); 4 * ROWS];
        for r in 0..R {
            for i in 0..N {
                flat[r * N + i] = acc[i][r];
            }
        }
        let sums = sums::<S>(s, flat, N * R);
        for r in 0..R {
            out.scores[r * out.stride + first..][..N].copy_from_slice(&sums[r * N..][..N]);
        }
    }
}

/// The sums across lanes of the first `n` vectors.
#[inline(always)]
fn sums<S: Simd>(s: S, vectors: [S::V; 16], n: usize) -> [f32; 16] {
    if n > 12 {
        return s.sum_lanes16(vectors);
    }
    let mut sums = [0.0; 16];
    for start in (0..n).step_by(4) {
        let four = [vectors[start], vectors[start + 1], vectors[start + 2], vectors[start + 3]];
        sums[start..start + 4].copy_from_slice(&s.sum_lanes4(four));
    }
    sums
}

/// Where scores go: row `r` starts at `r * stride`.
pub(super) struct Out<'a> {
    pub(super) scores: &'a mut [f32],
    pub(super) stride: usize,
}

/// The bits of chunk `chunk`, `LANES / G` of them, of the bitmap at `p`.
///
/// # Safety
/// The bitmap has bits for the chunk.
#[inline(always)]
pub(super) unsafe fn bits_of_chunk<S: Simd, const G: usize>(p: *const u8, chunk: usize) -> u32 {
    // SAFETY: these are the bytes of the chunk's bits and no others.
    unsafe {
        match S::LANES / G {
            16 => u32::from(p.add(2 * chunk).cast::<u16>().read_unaligned()),
            8 => u32::from(p.add(chunk).read()),
            4 => u32::from(p.add(chunk / 2).read()) >> (chunk % 2 * 4) & 15,
            2 => u32::from(p.add(chunk / 4).read()) >> (chunk % 4 * 2) & 3,
            _ => unreachable!("vectors have 8 or 16 lanes, groups 1, 2 or 4"),
        }
    }
}

/// Each bit of the index twice.
static PAIRS: [u16; 256] = repeated(2);
/// Each bit of the index four times.
static QUADS: [u16; 16] = repeated(4);

const fn repeated<const N: usize>(times: usize) -> [u16; N] {
    let (mut table, mut i) = ([0; N], 0);
    while i < N {
        let mut lane = 0;
        while lane < 16 {
            table[i] |= ((i >> (lane / times) & 1) << lane) as u16;
            lane += 1;
        }
        i += 1;
    }
    table
}

/// The lanes that a chunk's bits stand for.
#[inline(always)]
pub(super) fn lanes<const G: usize>(bits: u32) -> u32 {
    match G {
        1 => bits,
        2 => u32::from(PAIRS[(bits & 255) as usize]),
        _ => u32::from(QUADS[(bits & 15) as usize]),
    }
}

/// What is done for every four vectors that are met, and for a rest of fewer: memory is asked for a few cache lines at a
/// time, because a core that asks for more than it can wait for stands still.
pub(super) trait Meanwhile {
    /// Must be `#[inline(always)]`.
    fn four<S: Simd>(&mut self, s: S);
}

/// Cache lines to be asked for, in order.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    next: *const u8,
    end: *const u8,
}

impl Default for Lines {
    fn default() -> Lines {
        Lines { next: std::ptr::null(), end: std::ptr::null() }
    }
}

impl Lines {
    /// Those with the page's bytes of `range`.
    #[inline(always)]
    pub(super) fn of(page: &PackedPage, range: Range<usize>) -> Lines {
        let start = page.words.as_ptr().cast::<u8>();
        let next = start.wrapping_add(range.start);
        let next = next.wrapping_sub(next.addr() % LINE);
        Lines { next, end: start.wrapping_add(range.end) }
    }

    #[inline(always)]
    pub(super) fn is_empty(self) -> bool {
        self.next >= self.end
    }

    /// Asks for those that begin before the page's byte `end`.
    #[inline(always)]
    pub(super) fn ask_until<S: Simd>(&mut self, s: S, page: &PackedPage, end: usize) {
        let end = page.words.as_ptr().cast::<u8>().wrapping_add(end);
        while self.next < end {
            self.ask(s);
        }
    }

    /// Asks for the first.
    #[inline(always)]
    pub(super) fn ask<S: Simd>(&mut self, s: S) {
        s.prefetch_near(self.next, 0);
        self.next = self.next.wrapping_add(LINE);
    }
}
