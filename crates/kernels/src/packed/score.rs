//! How well does each token block's key match the queries? Stage 2 of the paper (arXiv 2607.00760, s. 4).

use super::PackedPage;
use super::vectors::{Out, Packed, ROWS, Shaped, prefetch_bytes, shaped};
use crate::isa::Isa;
use crate::simd::Simd;

/// Pages whose headers are asked for ahead: without a header the rest can't be.
const HEADERS_AHEAD: usize = 16;

/// Pages whose block keys are asked for ahead. Of 1, 2, 3, 4, 6, 8, 12, 16, 24 and 32, 8 was the fastest: a core waits
/// for few cache lines at a time, and what it asks for too early delays what it needs.
const KEYS_AHEAD: usize = 8;

/// Scores of the block keys of pages in a row: `scores[r, b] = queries[r] . block_key[b]`, blocks counted over all of
/// the pages, which are of one shape. `queries` `[R, C]` rotated, truncated and scaled; `scores` `[R, blocks]`.
/// Relative error against f64 about 1e-6 of `sum |q * k|`.
pub fn score_pages(isa: Isa, queries: &[f32], pages: &[&PackedPage], scores: &mut [f32]) {
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
    score_pages(isa, queries, &[page], scores);
}

struct Score<'a> {
    queries: &'a [f32],
    pages: &'a [&'a PackedPage],
    scores: &'a mut [f32],
    blocks: usize,
}

impl Shaped for Score<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize, const G: usize>(self, s: S) {
        let mut before = 0;
        for (i, page) in self.pages.iter().enumerate() {
            let ahead = if i == 0 { 0..KEYS_AHEAD + 1 } else { KEYS_AHEAD..KEYS_AHEAD + 1 };
            if let Some(next) = self.pages.get(i + HEADERS_AHEAD) {
                s.prefetch(std::ptr::from_ref::<PackedPage>(next), 0);
            }
            for next in ahead.filter_map(|distance| self.pages.get(i + distance)) {
                prefetch_bytes(s, next, 0, next.bytes_of_block_keys());
            }
            let keys = page.layout().block_keys();
            let out = Out { scores: &mut self.scores[before..], stride: self.blocks };
            // SAFETY: `score_pages` checked that the queries are R rows of C; the rows are the page's own.
            unsafe { Packed::<G>::new(page, keys).dot::<S, R>(s, self.queries, keys.n, out) };
            before += keys.n;
        }
    }
}
