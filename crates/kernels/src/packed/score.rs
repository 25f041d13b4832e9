//! How well does each token block's key match the queries? Stage 2 of the paper (arXiv 2607.00760, s. 4).

use super::PackedPage;
use super::vectors::{Lines, Meanwhile, Out, Packed, ROWS, Shaped, shaped};
use crate::isa::Isa;
use crate::simd::Simd;

/// Block keys that are asked for ahead of those that are scored: of 16, 32, 64, 128 and 256 the fastest.
const AHEAD: usize = 64;

/// Scores of the block keys of pages in a row: `scores[r, b] = queries[r] . block_key[b]`, blocks counted over all of
/// the pages, which are of one shape. `queries` `[R, C]` rotated, truncated and scaled; `scores` `[R, blocks]`.
/// Relative error against f64 about 1e-6 of `sum |q * k|`.
pub fn score_pages(isa: Isa, queries: &[f32], pages: &[PackedPage], scores: &mut [f32]) {
    let Some(first) = pages.first() else { return assert!(scores.is_empty(), "scores of no pages") };
    let (c, blocks) = (first.shape.channels(), pages.iter().map(|page| page.blocks()).sum::<usize>());
    let rows = queries.len() / c;
    assert_eq!(queries.len(), rows * c, "queries are not rows of {c} channels");
    assert_eq!(scores.len(), rows * blocks, "{rows} rows of queries, {blocks} blocks");
    assert!(pages.iter().all(|page| page.shape == first.shape), "pages of different shapes");
    for (queries, scores) in queries.chunks(ROWS * c).zip(scores.chunks_mut(ROWS * blocks)) {
        shaped(isa, queries.len() / c, first.shape.group(), Score { queries, pages, scores, blocks });
    }
}

/// [`score_pages`] of one page.
pub fn score_blocks(isa: Isa, queries: &[f32], page: &PackedPage, scores: &mut [f32]) {
    score_pages(isa, queries, std::slice::from_ref(page), scores);
}

struct Score<'a> {
    queries: &'a [f32],
    pages: &'a [PackedPage],
    scores: &'a mut [f32],
    blocks: usize,
}

impl Shaped for Score<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize, const G: usize>(self, s: S) {
        let mut ahead =
            Ahead { pages: self.pages, keys: 0, elements: Lines::default(), bitmaps: Lines::default() };
        for _ in 0..AHEAD / 4 {
            ahead.four(s);
        }
        let mut before = 0;
        for page in self.pages {
            let keys = page.layout().block_keys();
            let out = Out { scores: &mut self.scores[before..], stride: self.blocks };
            // SAFETY: `score_pages` checked that the queries are R rows of C; the rows are the page's own.
            unsafe { Packed::<G>::new(page, keys).dot::<S, R, _>(s, self.queries, keys.n, out, &mut ahead) };
            before += keys.n;
        }
    }
}

/// The block keys that were not asked for yet.
struct Ahead<'a> {
    /// All but the first `keys` of the first page, and all of those after it.
    pages: &'a [PackedPage],
    keys: usize,
    /// What is left of the first page.
    elements: Lines,
    bitmaps: Lines,
}

impl Meanwhile for Ahead<'_> {
    #[inline(always)]
    fn four<S: Simd>(&mut self, s: S) {
        let Some((page, later)) = self.pages.split_first() else { return };
        let (rows, shape) = (page.layout().block_keys(), page.shape);
        if self.keys == 0 {
            let end = rows.bitmaps;
            self.elements = Lines::of(page, 0..end);
            self.bitmaps = Lines::of(page, end..end + rows.n * shape.bitmap_bytes());
        }
        self.keys += 4;
        self.elements.ask_until(s, page, self.keys * 2 * shape.kept());
        self.bitmaps.ask_until(s, page, rows.bitmaps + self.keys * shape.bitmap_bytes());
        if self.keys >= rows.n {
            (self.pages, self.keys) = (later, 0);
        }
    }
}
