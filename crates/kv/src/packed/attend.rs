//! One decode step over packed segments: score the token blocks, select, attend (paper, s. 4 and s. 5).
//!
//! Blocks of all segments of a head compete with each other. Tasks are runs of pages of one segment, first to score,
//! then to attend; partial states are merged in order within a segment, leave its rotation, and meet the other
//! segments and the exact tokens as attention states.

use super::PackedHead;
use super::segment::Segment;
use crate::{MOST_QUERIES, Step, cleared};
use mosaickv_kernels::exact::{self, Visible};
use mosaickv_kernels::packed::{Ahead, attend_blocks, score_blocks};
use mosaickv_kernels::rotate::rotate;
use mosaickv_kernels::select::{importance, top_tokens};
use mosaickv_kernels::{AttnState, Isa};
use std::ops::Range;

/// Packed pages that one task of a decode step attends to; fixed, so that results do not depend on threads.
const PAGES_PER_TASK: usize = 16;

/// Packed pages whose blocks one task scores.
const SCORED_PER_TASK: usize = 64;

/// Scores of a page at most: 16 blocks of 4 tokens, for the largest group of query heads.
const MOST_SCORES: usize = 16 * MOST_QUERIES;

/// Some pages of one segment of one head.
struct Run<'a> {
    head: usize,
    segment: &'a Segment,
    /// Of the segment among its head's.
    index: usize,
    pages: Range<usize>,
    /// Token blocks of the head before the segment.
    before: u32,
}

/// The pages of all heads, at most `most` a run, in order.
fn runs(heads: &[PackedHead], most: usize) -> Vec<Run<'_>> {
    let mut runs = Vec::new();
    for (head, of) in heads.iter().enumerate() {
        let mut before = 0;
        for (index, segment) in of.segments.iter().enumerate() {
            for first in (0..segment.pages.len()).step_by(most) {
                let pages = first..segment.pages.len().min(first + most);
                runs.push(Run { head, segment, index, pages, before });
            }
            before += segment.blocks() as u32;
        }
    }
    runs
}

impl Run<'_> {
    /// Scores of the run's blocks, `[R, blocks]`, for queries `[R, C]` in the segment's rotation.
    fn score(&self, isa: Isa, queries: &[f32]) -> Vec<f32> {
        let rows = queries.len() / self.segment.strategy.shape.channels();
        let pages = &self.segment.pages[self.pages.clone()];
        let starts = &self.segment.starts[self.pages.start..=self.pages.end];
        let blocks = (starts[pages.len()] - starts[0]) as usize;
        let mut scores = vec![0.0; rows * blocks];
        let mut of_page = [0.0; MOST_SCORES];
        for (i, (page, start)) in pages.iter().zip(starts).enumerate() {
            for (distance, ahead) in [(12, Ahead::Header), (6, Ahead::BlockKeys)] {
                if let Some(page) = pages.get(i + distance) {
                    page.prefetch(isa, ahead);
                }
            }
            let of_page = &mut of_page[..rows * page.blocks()];
            score_blocks(isa, queries, page, of_page);
            for (r, of_row) in of_page.chunks_exact(page.blocks()).enumerate() {
                let at = r * blocks + (start - starts[0]) as usize;
                scores[at..at + of_row.len()].copy_from_slice(of_row);
            }
        }
        scores
    }

    /// Attends to the run's selected blocks. `selected` are blocks of the head, ascending.
    fn attend(&self, isa: Isa, queries: &[f32], selected: &[u32], state: &mut AttnState) {
        let starts = self.segment.starts[self.pages.start..=self.pages.end].windows(2);
        let chosen: Vec<_> = self.segment.pages[self.pages.clone()]
            .iter()
            .zip(starts)
            .map(|(page, of)| (page, mask(selected, self.before + of[0]..self.before + of[1])))
            .filter(|&(_, mask)| mask != 0)
            .collect();
        for (i, &(page, mask)) in chosen.iter().enumerate() {
            for distance in if i == 0 { 1..=2 } else { 2..=2 } {
                if let Some((page, mask)) = chosen.get(i + distance) {
                    page.prefetch(isa, Ahead::Blocks(*mask));
                }
            }
            attend_blocks(isa, queries, page, mask, state);
        }
    }
}

/// Which of `blocks` (at most 32) are selected, as a mask.
fn mask(selected: &[u32], blocks: Range<u32>) -> u32 {
    let from = selected.partition_point(|&b| b < blocks.start);
    selected[from..].iter().take_while(|&&b| b < blocks.end).fold(0, |mask, b| mask | 1 << (b - blocks.start))
}

/// One token: `queries` `[H, D]`; `out` likewise. Returns bytes read.
pub(crate) fn decode(step: Step, heads: &[PackedHead], queries: &[f32], out: &mut [f32]) -> u64 {
    let (group, d, isa) = (step.shape.group(), step.shape.head_dim, step.isa);
    let scaled: Vec<f32> = queries.iter().map(|q| q * step.scale).collect();
    let of_head = |g: usize| &scaled[g * group * d..][..group * d];
    // Of each head and segment, [R, C].
    let rotated: Vec<Vec<Vec<f32>>> = (heads.iter().enumerate())
        .map(|(g, head)| head.segments.iter().map(|segment| turn(isa, of_head(g), segment, d)).collect())
        .collect();
    let mut scored: Vec<_> = runs(heads, SCORED_PER_TASK).into_iter().map(|run| (run, vec![])).collect();
    step.pool.for_each(&mut scored, |_, (run, scores)| {
        *scores = run.score(isa, &rotated[run.head][run.index]);
    });
    let mut selected: Vec<Vec<u32>> = vec![vec![]; heads.len()];
    step.pool.for_each(&mut selected, |g, selected| {
        let scores: Vec<&[f32]> =
            scored.iter().filter(|(run, _)| run.head == g).map(|(_, scores)| &**scores).collect();
        *selected = heads[g].select(isa, &scores, group);
    });
    let runs = runs(heads, PAGES_PER_TASK);
    let mut partial: Vec<AttnState> = std::mem::take(step.states);
    let channels = runs.first().map_or(d, |run| run.segment.strategy.shape.channels());
    cleared(&mut partial, runs.len(), group, channels);
    step.pool.for_each(&mut partial, |i, state| {
        let run = &runs[i];
        run.attend(isa, &rotated[run.head][run.index], &selected[run.head], state);
    });
    for (g, (head, out)) in heads.iter().zip(out.chunks_exact_mut(group * d)).enumerate() {
        let mut state = AttnState::new(group, d);
        for page in [&head.sinks, &head.buffer] {
            exact::attend(isa, of_head(g), page, Visible::All, &mut state);
        }
        for (index, segment) in head.segments.iter().enumerate() {
            let of_segment = |run: &Run| run.head == g && run.index == index;
            let parts = runs.iter().zip(&partial).filter(|(run, _)| of_segment(run)).map(|(_, state)| state);
            let mut whole = AttnState::new(group, segment.strategy.shape.channels());
            parts.for_each(|part| whole.merge(part));
            state.merge(&whole.turned(d, |acc, out| rotate(isa, acc, &segment.rotation.outputs, out, d)));
        }
        state.finish(out);
    }
    *step.states = partial;
    heads.iter().zip(&selected).map(|(head, selected)| head.bytes_read(selected) as u64).sum()
}

/// Queries `[R, D]` in the segment's key channels, `[R, C]`.
fn turn(isa: Isa, queries: &[f32], segment: &Segment, d: usize) -> Vec<f32> {
    let channels = segment.strategy.shape.channels();
    let mut out = vec![0.0; queries.len() / d * channels];
    rotate(isa, queries, &segment.rotation.keys, &mut out, channels);
    out
}

impl PackedHead {
    /// Stage 2: the blocks to attend to, ascending, from the scores `[R, blocks]` of all runs.
    fn select(&self, isa: Isa, runs: &[&[f32]], rows: usize) -> Vec<u32> {
        let blocks: usize = self.segments.iter().map(|segment| segment.blocks()).sum();
        if blocks == 0 {
            return vec![];
        }
        let mut scores = Vec::with_capacity(rows * blocks);
        for r in 0..rows {
            for run in runs {
                let of_run = run.len() / rows;
                scores.extend_from_slice(&run[r * of_run..][..of_run]);
            }
        }
        let mut best = vec![0.0; blocks];
        importance(isa, &scores, &mut best);
        let spans: Vec<_> = self.segments.iter().map(|s| (s.blocks(), s.strategy.block)).collect();
        top_tokens(&best, &spans, self.selected_tokens())
    }

    /// Tokens that a step selects.
    pub(crate) fn selected_tokens(&self) -> usize {
        let packed: usize = self.segments.iter().map(|segment| segment.tokens()).sum();
        (self.settings.selected * packed as f32).ceil() as usize
    }

    fn bytes_read(&self, selected: &[u32]) -> usize {
        let mut bytes = self.sinks.bytes_read() + self.buffer.bytes_read();
        let mut before = 0;
        for segment in &self.segments {
            let end = before + segment.blocks() as u32;
            let of = selected.iter().filter(|&&b| (before..end).contains(&b)).count();
            let block_keys: usize = segment.pages.iter().map(|page| page.bytes_of_block_keys()).sum();
            bytes += segment.rotation.bytes() + block_keys;
            bytes += of * segment.pages.first().map_or(0, |page| page.bytes_of_block());
            before = end;
        }
        bytes
    }
}
