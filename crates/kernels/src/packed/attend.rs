//! How does a step attend to packed keys and values?
//!
//! PackedAttention (arXiv 2607.00760, s. 5) for CPU vectors: selected blocks are taken up to 64 tokens at a time,
//! whatever page they are of. Their keys are scored, the scores become weights, and accumulators of a few chunks of
//! channels stay in registers while the values pass by. Nothing is unpacked to memory; meanwhile the next blocks are
//! asked for, because selected blocks are scattered over memory.
//!
//! What failed: 24 accumulators of values for four rows (they spill; two tiles of 12 are no slower with groups of 1
//! and a quarter faster with groups of 4); asking for all lines of a block at once (a fifth slower than a few for every
//! four tokens); asking for blocks into the second cache 8, 16 or 32 ahead (no faster).
#![expect(
    clippy::needless_range_loop,
    reason = "arrays of registers indexed by rows and chunks together; iterators over them would be closures"
)]

use super::vectors::{LINE, Lines, Meanwhile, Out, Packed, ROWS, Shaped, shaped};
use super::{BLOCKS, PackedPage};
use crate::isa::Isa;
use crate::simd::Simd;
use crate::state::{AttnState, fold_scores};

/// Blocks that are asked for ahead: of 2, 4, 6, 8, 10 and 12 (of 8 tokens, 1.2 kB) the fastest.
const AHEAD: usize = 6;

/// Tokens whose scores are made before their values are met.
const BATCH: usize = 64;

/// A token block: its page, and which of the page's it is.
pub type Selected<'a> = (&'a PackedPage, u32);

/// Folds the keys and values of the `selected` blocks into `state`, in their order; their pages are of one shape and
/// of one size of blocks. `queries` `[R, C]` rotated, truncated and scaled; `state` of `R` rows and `C` channels, in
/// the rotated space of the values. Error of the output about 1e-6 of the largest value for scores of moderate size.
///
/// # Panics
/// If a shape does not fit, or a page has no such block.
pub fn attend_selected(isa: Isa, queries: &[f32], selected: &[Selected], state: &mut AttnState) {
    let Some(&(first, _)) = selected.first() else { return };
    let c = first.shape.channels();
    assert_eq!((state.rows() * c, c), (queries.len(), state.channels()), "queries and state of other shapes");
    for &(page, b) in selected {
        assert!((b as usize) < page.blocks(), "block {b} selected, the page has {}", page.blocks());
        assert!((page.shape, page.block) == (first.shape, first.block), "pages of different strategies");
    }
    let sums = state.max.chunks_mut(ROWS).zip(state.sum.chunks_mut(ROWS));
    let rows = queries.chunks(ROWS * c).zip(state.acc.chunks_mut(ROWS * c));
    for ((queries, acc), (max, sum)) in rows.zip(sums) {
        shaped(isa, max.len(), first.shape.group(), Attend { queries, selected, max, sum, acc });
    }
}

/// [`attend_selected`] of all blocks of the page.
pub fn attend_page(isa: Isa, queries: &[f32], page: &PackedPage, state: &mut AttnState) {
    let all: Vec<Selected> = (0..page.blocks() as u32).map(|b| (page, b)).collect();
    attend_selected(isa, queries, &all, state);
}

struct Attend<'a> {
    queries: &'a [f32],
    selected: &'a [Selected<'a>],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    acc: &'a mut [f32],
}

/// Scores, then weights, of a batch: `[R, 64]`.
type Weights<const R: usize> = [[f32; BATCH]; R];

impl Shaped for Attend<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize, const G: usize>(mut self, s: S) {
        let batch = BATCH / self.selected[0].0.block();
        let (selected, mut from) = (self.selected, 0);
        let (page, _) = selected[0];
        let lines = page.bytes_of_block().div_ceil(LINE) + 1;
        // As many for four keys as for four values.
        let mut ahead =
            Ahead { blocks: selected, lines: Lines::default(), per_four: lines.div_ceil(page.block() / 2) };
        ahead.ask(s, AHEAD * lines);
        while from < selected.len() {
            let to = selected.len().min(from + batch);
            self.fold::<S, R, G>(s, &selected[from..to], &mut ahead);
            from = to;
        }
    }
}

impl Attend<'_> {
    /// Folds at most 64 tokens in; meanwhile it asks for as many that come later.
    #[inline(always)]
    fn fold<S: Simd, const R: usize, const G: usize>(
        &mut self,
        s: S,
        blocks: &[Selected],
        ahead: &mut Ahead,
    ) {
        let mut weights: Weights<R> = [[f32::NEG_INFINITY; BATCH]; R];
        let mut tokens = 0;
        for &(page, b) in blocks {
            let keys = page.layout().block(b as usize).0;
            let out = Out { scores: &mut weights.as_flattened_mut()[tokens..], stride: BATCH };
            // SAFETY: `attend_selected` checked that the queries are R rows of C and that block `b` exists.
            unsafe { Packed::<G>::new(page, keys).dot::<S, R, _>(s, self.queries, keys.n, out, ahead) };
            tokens += keys.n;
        }
        let old = softmax::<S, R>(s, &mut weights, tokens, self.max, self.sum);
        let (mut at, mut chunk) = ([0; BATCH], 0);
        let chunks = self.acc.len() / R / S::LANES;
        let mut tile = Tile { chunk: 0, at: &mut at, weights: &weights, old: &old, ahead };
        while chunk < chunks {
            tile.chunk = chunk;
            // SAFETY: chunks `chunk..chunk + N` exist; `attend_selected` checked that `acc` is R rows of C.
            chunk += unsafe {
                match chunks - chunk {
                    // Sixteen lanes and 32 registers: 24 accumulators would spill. Eight lanes, 16 registers.
                    6.. if S::LANES == 16 && R < 4 => self.weigh::<S, R, G, 6>(s, blocks, &mut tile),
                    3.. if S::LANES == 16 => self.weigh::<S, R, G, 3>(s, blocks, &mut tile),
                    2.. if S::LANES == 8 => self.weigh::<S, R, G, 2>(s, blocks, &mut tile),
                    _ => self.weigh::<S, R, G, 1>(s, blocks, &mut tile),
                }
            };
        }
    }
}

/// The blocks that were not asked for yet.
struct Ahead<'a> {
    blocks: &'a [Selected<'a>],
    /// What is left of the block before them.
    lines: Lines,
    /// Lines to ask for while four keys, or four values, are met.
    per_four: usize,
}

impl Ahead<'_> {
    /// Asks for the next `n` lines.
    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S, n: usize) {
        for _ in 0..n {
            if self.lines.is_empty() {
                let Some((&(page, b), later)) = self.blocks.split_first() else { return };
                let bytes = page.bytes_of_block();
                let start = page.bytes_of_block_keys() + b as usize * bytes;
                self.lines = Lines::of(page, start..start + bytes);
                self.blocks = later;
            }
            self.lines.ask(s);
        }
    }
}

impl Meanwhile for Ahead<'_> {
    #[inline(always)]
    fn four<S: Simd>(&mut self, s: S) {
        self.ask(s, self.per_four);
    }
}

/// What the values' walk over the tokens needs for one tile of chunks.
struct Tile<'a, 'b, const R: usize> {
    chunk: usize,
    /// Kept elements of each token before the tile.
    at: &'a mut [u16; BATCH],
    weights: &'a Weights<R>,
    /// By what the accumulators are multiplied first.
    old: &'a [f32; R],
    ahead: &'a mut Ahead<'b>,
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
        blocks: &[Selected],
        tile: &mut Tile<R>,
    ) -> usize {
        let c = self.acc.len() / R;
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
        for &(page, b) in blocks {
            let mut values = Packed::<G>::new(page, page.layout().block(b as usize).1);
            for i in 0..page.block() {
                if tile.chunk == 0 && i % 4 == 0 {
                    tile.ahead.four(s);
                }
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

const _: () = assert!(BATCH.is_multiple_of(BLOCKS[2]), "batches are whole blocks");
