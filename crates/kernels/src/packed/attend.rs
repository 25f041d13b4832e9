//! How does a step compute on packed vectors without unpacking them?
//!
//! PackedAttention (arXiv 2607.00760, s. 5) for CPU vectors: a chunk of `LANES` channels takes its bits of the
//! bitmap, spreads the next kept elements over the lanes that they mark (`Simd::expand_f16`), and meets the
//! queries of up to four rows; the bits' count says where the next chunk's elements start. Nothing is unpacked
//! to memory. Keys: several tokens in flight, their sums across lanes taken four at a time. Values: accumulators
//! of a few chunks stay in registers while the tokens pass by.
//!
//! What failed: `array::from_fn` and `map` over vectors (their closures are compiled outside the function that
//! has the CPU features and hand vectors over in memory: 4 times slower); 24 accumulators of values for four
//! rows (they spill; two tiles of 12 are no slower with groups of 1 and a quarter faster with groups of 4).
#![expect(
    clippy::needless_range_loop,
    reason = "arrays of registers indexed by rows and chunks together; iterators over them would be closures"
)]

use super::{BLOCKS, PAGE_TOKENS, PackedPage, Rows};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use crate::state::{AttnState, fold_scores};
use half::f16;
use std::ops::Range;

/// Rows that share the load of an element: more would not fit the registers.
const ROWS: usize = 4;

/// Cache line, in bytes.
const LINE: usize = 64;

/// Scores of the page's block keys: `scores[r, b] = queries[r] . block_key[b]` (stage 2, s. 4).
/// `queries` `[R, C]` rotated, truncated and scaled; `scores` `[R, blocks]`.
/// Relative error against f64 about 1e-6 of `sum |q * k|`.
pub fn score_blocks(isa: Isa, queries: &[f32], page: &PackedPage, scores: &mut [f32]) {
    let (c, blocks) = (page.shape.channels(), page.blocks());
    let rows = queries.len() / c;
    assert_eq!(queries.len(), rows * c, "queries are not rows of {c} channels");
    assert_eq!(scores.len(), rows * blocks, "{rows} rows of queries, {blocks} blocks");
    for (queries, scores) in queries.chunks(ROWS * c).zip(scores.chunks_mut(ROWS * blocks)) {
        shaped(isa, queries.len() / c, page.shape.group(), Score { queries, page, scores });
    }
}

/// Folds the keys and values of the page's `selected` blocks (bit `b` for block `b`) into `state`.
/// `queries` `[R, C]` rotated, truncated and scaled; `state` of `R` rows and `C` channels, in the rotated space
/// of the values. Error of the output about 1e-6 of the largest value for scores of moderate size.
///
/// # Panics
/// If a shape does not fit, or a bit past the last block is set.
pub fn attend_blocks(isa: Isa, queries: &[f32], page: &PackedPage, selected: u32, state: &mut AttnState) {
    let c = page.shape.channels();
    assert_eq!((state.rows() * c, c), (queries.len(), state.channels()), "queries and state of other shapes");
    let all = all_blocks(page);
    assert_eq!(selected & !all, 0, "blocks {selected:#x} selected, the page has {all:#x}");
    if selected == 0 {
        return;
    }
    let sums = state.max.chunks_mut(ROWS).zip(state.sum.chunks_mut(ROWS));
    let rows = queries.chunks(ROWS * c).zip(state.acc.chunks_mut(ROWS * c));
    for ((queries, acc), (max, sum)) in rows.zip(sums) {
        shaped(isa, max.len(), page.shape.group(), Attend { queries, page, selected, max, sum, acc });
    }
}

/// Folds all keys and values of the page into `state`, as [`attend_blocks`].
pub fn attend_page(isa: Isa, queries: &[f32], page: &PackedPage, state: &mut AttnState) {
    attend_blocks(isa, queries, page, all_blocks(page), state);
}

/// What a later call will read of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ahead {
    /// The page's header, without which the rest can't be asked for.
    Header,
    /// The block keys, for [`score_blocks`].
    BlockKeys,
    /// These blocks, for [`attend_blocks`].
    Blocks(u32),
}

impl PackedPage {
    /// Asks for memory ahead of its use, which hides its latency: call it a few pages before the one at hand.
    pub fn prefetch(&self, isa: Isa, ahead: Ahead) {
        dispatch(isa, Prefetch { page: self, ahead });
    }
}

fn all_blocks(page: &PackedPage) -> u32 {
    (1 << page.blocks()) - 1
}

/// A computation for a number of rows and a group size known to the compiler.
trait Shaped {
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

fn shaped<T: Shaped>(isa: Isa, rows: usize, group: usize, task: T) {
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

struct Score<'a> {
    queries: &'a [f32],
    page: &'a PackedPage,
    scores: &'a mut [f32],
}

impl Shaped for Score<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize, const G: usize>(self, s: S) {
        let keys = self.page.layout().block_keys();
        let out = Out { scores: self.scores, stride: keys.n };
        // SAFETY: `score_blocks` checked that the queries are R rows of C; the rows are the page's own.
        unsafe { Packed::<G>::new(self.page, keys).dot::<S, R>(s, self.queries, keys.n, out) };
    }
}

struct Attend<'a> {
    queries: &'a [f32],
    page: &'a PackedPage,
    selected: u32,
    max: &'a mut [f32],
    sum: &'a mut [f32],
    acc: &'a mut [f32],
}

/// Scores, then weights, of a batch: `[R, 64]`.
type Weights<const R: usize> = [[f32; PAGE_TOKENS]; R];

impl Shaped for Attend<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize, const G: usize>(mut self, s: S) {
        let mut weights: Weights<R> = [[f32::NEG_INFINITY; PAGE_TOKENS]; R];
        let (layout, block) = (self.page.layout(), self.page.block());
        let mut tokens = 0;
        for b in bits_of(self.selected) {
            let (keys, values) = layout.block(b);
            prefetch_rows(s, self.page, values);
            let out = Out { scores: &mut weights.as_flattened_mut()[tokens..], stride: PAGE_TOKENS };
            // SAFETY: `attend_blocks` checked that the queries are R rows of C and that block `b` exists.
            unsafe { Packed::<G>::new(self.page, keys).dot::<S, R>(s, self.queries, block, out) };
            tokens += block;
        }
        let old = softmax::<S, R>(s, &mut weights, tokens, self.max, self.sum);
        let (mut at, mut chunk) = ([0; PAGE_TOKENS], 0);
        let chunks = self.page.shape.channels() / S::LANES;
        let mut tile = Tile { chunk: 0, at: &mut at, weights: &weights, old: &old };
        while chunk < chunks {
            tile.chunk = chunk;
            // SAFETY: chunks `chunk..chunk + N` exist; `attend_blocks` checked that `acc` is R rows of C.
            chunk += unsafe {
                match chunks - chunk {
                    // Sixteen lanes and 32 registers: 24 accumulators would spill. Eight lanes, 16 registers.
                    6.. if S::LANES == 16 && R < 4 => self.weigh::<S, R, G, 6>(s, &mut tile),
                    3.. if S::LANES == 16 => self.weigh::<S, R, G, 3>(s, &mut tile),
                    2.. if S::LANES == 8 => self.weigh::<S, R, G, 2>(s, &mut tile),
                    _ => self.weigh::<S, R, G, 1>(s, &mut tile),
                }
            };
        }
    }
}

/// What the values' walk over the tokens needs for one tile of chunks.
struct Tile<'a, const R: usize> {
    chunk: usize,
    /// Kept elements of each token before the tile.
    at: &'a mut [u16; PAGE_TOKENS],
    weights: &'a Weights<R>,
    /// By what the accumulators are multiplied first.
    old: &'a [f32; R],
}

impl Attend<'_> {
    /// `acc = acc * old + weights . values` for `N` chunks of channels; returns `N`.
    ///
    /// # Safety
    /// Chunks `tile.chunk..tile.chunk + N` exist, `acc` is `[R, C]`, and `tile.at` was left by the tile before.
    #[inline(always)]
    unsafe fn weigh<S: Simd, const R: usize, const G: usize, const N: usize>(
        &mut self,
        s: S,
        tile: &mut Tile<R>,
    ) -> usize {
        let c = self.page.shape.channels();
        let (layout, block) = (self.page.layout(), self.page.block());
        let first = tile.chunk * S::LANES;
        debug_assert!(self.acc.len() == R * c && first + N * S::LANES <= c);
        let to = self.acc.as_mut_ptr();
        let mut acc = [[s.splat(0.0); N]; R];
        for r in 0..R {
            let old = s.splat(tile.old[r]);
            for n in 0..N {
                // SAFETY: rows of C floats, and the tile ends within a row, by the caller's promise.
                acc[r][n] = s.mul(unsafe { s.load(to.add(r * c + first + n * S::LANES)) }, old);
            }
        }
        let mut token = 0;
        for b in bits_of(self.selected) {
            let mut values = Packed::<G>::new(self.page, layout.block(b).1);
            for _ in 0..block {
                let mut w = [s.splat(0.0); R];
                for r in 0..R {
                    w[r] = s.splat(tile.weights[r][token]);
                }
                let mut at = usize::from(tile.at[token]);
                for n in 0..N {
                    // SAFETY: the chunk exists, and `at` counts the bits before it.
                    let x = unsafe { values.chunk(s, values.bitmaps, tile.chunk + n, &mut at) };
                    for r in 0..R {
                        acc[r][n] = s.fma(w[r], x, acc[r][n]);
                    }
                }
                tile.at[token] = at as u16;
                token += 1;
                values.skip(1);
            }
        }
        for (r, row) in acc.iter().enumerate() {
            for (n, &x) in row.iter().enumerate() {
                // SAFETY: as for the load.
                unsafe { s.store(to.add(r * c + first + n * S::LANES), x) };
            }
        }
        N
    }
}

/// Turns the scores of `tokens` tokens into weights relative to the new maximum, and updates `max` and `sum`
/// `[R]`; returns by what the accumulators must be multiplied. Scores past `tokens` are `-inf`.
#[inline(always)]
fn softmax<S: Simd, const R: usize>(
    s: S,
    weights: &mut Weights<R>,
    tokens: usize,
    max: &mut [f32],
    sum: &mut [f32],
) -> [f32; R] {
    let mut olds = [1.0; R];
    for r in 0..R {
        let row = &mut weights[r][..tokens.next_multiple_of(16)];
        olds[r] = fold_scores(s, row, &mut max[r], &mut sum[r]);
    }
    olds
}

/// Packed vectors of a page, groups of `G`.
#[derive(Clone, Copy)]
struct Packed<const G: usize> {
    elements: *const f16,
    bitmaps: *const u8,
    /// Elements of a vector, and bytes of its bitmap.
    strides: (usize, usize),
}

impl<const G: usize> Packed<G> {
    #[inline(always)]
    fn new(page: &PackedPage, rows: Rows) -> Packed<G> {
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
    fn skip(&mut self, n: usize) {
        self.elements = self.elements.wrapping_add(n * self.strides.0);
        self.bitmaps = self.bitmaps.wrapping_add(n * self.strides.1);
    }

    /// `LANES` channels from `chunk * LANES` on of the vector whose bitmap is at `bitmap`; `at` is where its
    /// elements of the chunk start, and is moved past them.
    ///
    /// # Safety
    /// The vector and the chunk exist, and `at` is as said.
    #[inline(always)]
    unsafe fn chunk<S: Simd>(self, s: S, bitmap: *const u8, chunk: usize, at: &mut usize) -> S::V {
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
    unsafe fn dot<S: Simd, const R: usize>(mut self, s: S, queries: &[f32], n: usize, mut out: Out) {
        let mut i = 0;
        // SAFETY: the caller's promise; `i + 4 <= n` or `i < n` as the loops say.
        unsafe {
            while i + 4 <= n {
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
        for start in (0..N * R).step_by(4) {
            let mut four = [s.splat(0.0); 4];
            for j in start..(start + 4).min(N * R) {
                four[j - start] = acc[j / R][j % R];
            }
            let sums = s.sum_lanes4(four);
            for j in start..(start + 4).min(N * R) {
                out.scores[j % R * out.stride + first + j / R] = sums[j - start];
            }
        }
    }
}

/// Where scores go: row `r` starts at `r * stride`.
struct Out<'a> {
    scores: &'a mut [f32],
    stride: usize,
}

/// The bits of chunk `chunk`, `LANES / G` of them, of the bitmap at `p`.
///
/// # Safety
/// The bitmap has bits for the chunk.
#[inline(always)]
unsafe fn bits_of_chunk<S: Simd, const G: usize>(p: *const u8, chunk: usize) -> u32 {
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
fn lanes<const G: usize>(bits: u32) -> u32 {
    match G {
        1 => bits,
        2 => u32::from(PAIRS[(bits & 255) as usize]),
        _ => u32::from(QUADS[(bits & 15) as usize]),
    }
}

/// Indices of the bits set, rising.
#[inline(always)]
fn bits_of(mask: u32) -> Bits {
    Bits(mask)
}

struct Bits(u32);

impl Iterator for Bits {
    type Item = usize;
    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        let bit = self.0.trailing_zeros();
        self.0 &= self.0.wrapping_sub(1);
        if bit < u32::BITS { Some(bit as usize) } else { None }
    }
}

struct Prefetch<'a> {
    page: &'a PackedPage,
    ahead: Ahead,
}

impl Kernel for Prefetch<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let page = self.page;
        let lines = |bytes: Range<usize>| (bytes.start..bytes.end.next_multiple_of(LINE)).step_by(LINE);
        match self.ahead {
            Ahead::Header => s.prefetch(page, 0),
            Ahead::BlockKeys => {
                for line in lines(0..page.bytes_of_block_keys()) {
                    s.prefetch(page.words.as_ptr(), line);
                }
            }
            Ahead::Blocks(selected) => {
                for b in bits_of(selected & all_blocks(page)) {
                    let start = page.bytes_of_block_keys() + b * page.bytes_of_block();
                    for line in lines(start..start + page.bytes_of_block()) {
                        s.prefetch(page.words.as_ptr(), line);
                    }
                }
            }
        }
    }
}

/// Asks for the elements and bitmaps of `rows`.
#[inline(always)]
fn prefetch_rows<S: Simd>(s: S, page: &PackedPage, rows: Rows) {
    let page_bytes = page.words.as_ptr().cast::<u8>();
    let shape = page.shape;
    let elements = (2 * rows.elements, 2 * rows.n * shape.kept());
    let bitmaps = (rows.bitmaps, rows.n * shape.bitmap_bytes());
    for (start, bytes) in [elements, bitmaps] {
        for line in (0..bytes.next_multiple_of(LINE)).step_by(LINE) {
            s.prefetch(page_bytes, start + line);
        }
    }
}

const _: () = assert!(BLOCKS[0] == 4 && PAGE_TOKENS == 64, "batches of 4 tokens, 16 blocks in a mask");
