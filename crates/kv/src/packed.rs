//! A KV head in the paper's packed format: sinks, a segment of packed pages, and the update buffer.
//!
//! Per head, in order of tokens: the first [`SINKS`] stay exact; then come packed pages; the newest 32 to 64 wait
//! in the update buffer, and when one more comes to a full one its oldest 32 are packed at once (paper, s. 5). All
//! pages share one rotation, learnt from the tokens that were there when the first page was packed: the prompt.
//! Every token stays addressable; a step *selects* token blocks, and always attends to sinks and buffer.

use crate::exact::{ARC_BYTES, ExactHead};
use crate::rotation::{Basis, Rotation};
use crate::{KvBytes, MOST_QUERIES, Step, cleared};
use mosaickv_kernels::exact::{self, ExactPage, PAGE_TOKENS, Visible};
use mosaickv_kernels::packed::{
    Ahead, BLOCKS, PackedError, PackedPage, PackedShape, attend_blocks, score_blocks,
};
use mosaickv_kernels::rotate::{multiply, rotate};
use mosaickv_kernels::select::{importance, top_k};
use mosaickv_kernels::{AttnState, Isa};
use std::sync::Arc;

/// First tokens of a sequence, always exact and always attended to.
pub const SINKS: usize = 4;

/// Tokens that leave the update buffer at once, and that it keeps at least when they do.
const FLUSH: usize = 32;

/// Packed pages that one task of a decode step attends to; fixed, so that results do not depend on threads.
const PAGES_PER_TASK: usize = 16;

/// Packed pages whose blocks one task scores.
const SCORED_PER_TASK: usize = 64;

/// Scores of a page at most: 16 blocks of 4 tokens, for the largest group of query heads.
const MOST_SCORES: usize = 16 * MOST_QUERIES;

/// One static strategy for all segments (paper, s. 4, its defaults).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PackedStrategy {
    /// Share of each vector's elements that are kept, in (0, 0.75]: the bottom quarter of the channels is
    /// truncated (what is left rounded up to a multiple of 16).
    pub kept: f32,
    /// Neighbouring channels that are kept or dropped together: 1, 2 or 4.
    pub group: usize,
    /// Tokens of a token block: 4, 8 or 16.
    pub block: usize,
    /// Share of the packed tokens that a decode step attends to, in (0, 1].
    pub selected: f32,
    /// Which channels vectors are stored in.
    pub rotation: Basis,
}

impl Default for PackedStrategy {
    fn default() -> PackedStrategy {
        PackedStrategy { kept: 0.25, group: 1, block: 8, selected: 0.10, rotation: Basis::Svd }
    }
}

impl PackedStrategy {
    /// The shape of vectors that the strategy gives at this head_dim, if all its parameters are what they may be.
    pub fn shape(self, head_dim: usize) -> Result<PackedShape, PackedError> {
        let refuse = |what, got, wanted| Err(PackedError::Shape { what, got, wanted });
        if !BLOCKS.contains(&self.block) {
            return refuse("block", self.block, "4, 8 or 16 tokens");
        }
        if !(self.selected > 0.0 && self.selected <= 1.0) {
            return refuse(
                "selected, in percent,",
                (self.selected * 100.0).ceil() as usize,
                "above 0, at most 100",
            );
        }
        PackedShape::with_rate(head_dim, 1.0 - self.kept, self.group)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct PackedHead {
    pub(crate) strategy: PackedStrategy,
    pub(crate) shape: PackedShape,
    pub(crate) sinks: ExactPage,
    pub(crate) segment: Option<Arc<Segment>>,
    /// The update buffer.
    pub(crate) buffer: ExactPage,
}

/// Packed pages with one rotation.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) rotation: Arc<Rotation>,
    pub(crate) pages: Vec<Arc<PackedPage>>,
    /// `starts[i]` = token blocks before page `i`; one more entry than pages.
    pub(crate) starts: Vec<u32>,
}

impl Segment {
    fn blocks(&self) -> usize {
        self.starts[self.pages.len()] as usize
    }

    fn tokens(&self) -> usize {
        self.pages.first().map_or(0, |page| self.blocks() * page.block())
    }

    fn push(&mut self, page: PackedPage) {
        self.starts.push((self.blocks() + page.blocks()) as u32);
        self.pages.push(Arc::new(page));
    }
}

impl PackedHead {
    /// Compresses what an exact head holds.
    pub(crate) fn compress(exact: &ExactHead, strategy: PackedStrategy) -> PackedHead {
        let pages: Vec<_> = exact.pages().collect();
        let d = pages[0].head_dim();
        let shape = strategy.shape(d).expect("checked when the cache was made");
        let (keys, values) = rows(&pages);
        let mut head = PackedHead {
            strategy,
            shape,
            sinks: ExactPage::new(d, 16),
            segment: None,
            buffer: ExactPage::new(d, PAGE_TOKENS),
        };
        let tokens = keys.len() / d;
        let sinks = tokens.min(SINKS);
        let packed = (tokens - sinks).saturating_sub(FLUSH) / FLUSH * FLUSH;
        if packed > 0 {
            let rotation = Rotation::learn(strategy.rotation, &keys, &values, (d, shape.channels()));
            let span = sinks * d..(sinks + packed) * d;
            head.pack(Arc::new(rotation), &keys[span.clone()], &values[span]);
        }
        for t in 0..tokens {
            let to = if t < sinks { &mut head.sinks } else { &mut head.buffer };
            if t < sinks || t >= sinks + packed {
                to.push(&keys[t * d..][..d], &values[t * d..][..d]);
            }
        }
        head
    }

    pub(crate) fn tokens(&self) -> usize {
        self.sinks.tokens() + self.segment.as_ref().map_or(0, |s| s.tokens()) + self.buffer.tokens()
    }

    /// Whether the next token must first send the oldest of the buffer to a packed page.
    pub(crate) fn is_full(&self) -> bool {
        self.buffer.is_full()
    }

    /// Adds a token, its key `[D]` and value `[D]`.
    pub(crate) fn append(&mut self, key: &[f32], value: &[f32]) {
        if self.sinks.tokens() < SINKS {
            return self.sinks.push(key, value);
        }
        if self.buffer.is_full() {
            self.flush();
        }
        self.buffer.push(key, value);
    }

    fn flush(&mut self) {
        let d = self.buffer.head_dim();
        let (keys, values) = rows(&[&self.buffer]);
        let rotation = match &self.segment {
            Some(segment) => Arc::clone(&segment.rotation),
            None => {
                Arc::new(Rotation::learn(self.strategy.rotation, &keys, &values, (d, self.shape.channels())))
            }
        };
        self.pack(rotation, &keys[..FLUSH * d], &values[..FLUSH * d]);
        self.buffer.drop_front(FLUSH);
    }

    /// Rotates keys and values `[T, D]` and adds them to the segment as packed pages.
    fn pack(&mut self, rotation: Arc<Rotation>, keys: &[f32], values: &[f32]) {
        let (d, page) = (self.buffer.head_dim(), PAGE_TOKENS * self.shape.channels());
        let keys = multiply(keys, &rotation.key_matrix(), d);
        let values = multiply(values, &rotation.value_matrix(d), d);
        let segment = self
            .segment
            .get_or_insert_with(|| Arc::new(Segment { rotation, pages: Vec::new(), starts: vec![0] }));
        // Copies the lists (not the pages) if a clone of the cache shares them.
        let segment = Arc::make_mut(segment);
        for (keys, values) in keys.chunks(page).zip(values.chunks(page)) {
            segment.push(PackedPage::encode(self.shape, self.strategy.block, keys, values));
        }
    }

    pub(crate) fn count(&self, bytes: &mut KvBytes) {
        // The two exact pages' headers are inside this head, which the list of heads counts.
        bytes.exact += self.sinks.bytes() + self.buffer.bytes() - 2 * size_of::<ExactPage>();
        let Some(segment) = &self.segment else { return };
        bytes.rotations += segment.rotation.bytes() + ARC_BYTES;
        bytes.packed += segment.pages.iter().map(|page| page.bytes()).sum::<usize>();
        bytes.lists += size_of::<Segment>() + ARC_BYTES + segment.pages.len() * ARC_BYTES;
        bytes.lists += segment.pages.capacity() * size_of::<Arc<PackedPage>>();
        bytes.lists += segment.starts.capacity() * size_of::<u32>();
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if self.sinks.tokens() < SINKS && (self.segment.is_some() || self.buffer.tokens() > 0) {
            return Err(format!("{} sinks before later tokens", self.sinks.tokens()));
        }
        let Some(segment) = &self.segment else { return Ok(()) };
        if segment.starts.len() != segment.pages.len() + 1 {
            return Err(format!("{} starts for {} pages", segment.starts.len(), segment.pages.len()));
        }
        for (i, (page, starts)) in segment.pages.iter().zip(segment.starts.windows(2)).enumerate() {
            if page.shape() != self.shape || page.block() != self.strategy.block {
                return Err(format!("page {i} has another strategy than its segment"));
            }
            if (starts[1] - starts[0]) as usize != page.blocks() || page.tokens() % FLUSH != 0 {
                return Err(format!("page {i}: {} tokens, {} blocks", page.tokens(), page.blocks()));
            }
        }
        Ok(())
    }

    /// Rotates the scaled queries `[R, D]` and scores a run of pages: `[R, blocks of the run]`.
    fn score(&self, isa: Isa, queries: &[f32], run: usize, out: &mut Scored) {
        let Some(segment) = &self.segment else { return };
        let channels = self.shape.channels();
        out.queries.resize(queries.len() / self.buffer.head_dim() * channels, 0.0);
        rotate(isa, queries, &segment.rotation.keys, &mut out.queries, channels);
        let rows = out.queries.len() / channels;
        let first = run * SCORED_PER_TASK;
        let pages = &segment.pages[first..segment.pages.len().min(first + SCORED_PER_TASK)];
        let starts = &segment.starts[first..=first + pages.len()];
        let blocks = (starts[pages.len()] - starts[0]) as usize;
        out.scores.resize(rows * blocks, 0.0);
        let mut of_page = [0.0; MOST_SCORES];
        for (i, (page, start)) in pages.iter().zip(starts).enumerate() {
            for (distance, ahead) in [(12, Ahead::Header), (6, Ahead::BlockKeys)] {
                if let Some(page) = pages.get(i + distance) {
                    page.prefetch(isa, ahead);
                }
            }
            let of_page = &mut of_page[..rows * page.blocks()];
            score_blocks(isa, &out.queries, page, of_page);
            for (r, of_row) in of_page.chunks_exact(page.blocks()).enumerate() {
                let at = r * blocks + (start - starts[0]) as usize;
                out.scores[at..at + of_row.len()].copy_from_slice(of_row);
            }
        }
    }

    /// Stage 2: picks the token blocks to attend to, from the scores of all runs.
    fn select(&self, isa: Isa, runs: &mut [Scored]) -> Selection {
        let (Some(segment), Some(first)) = (&self.segment, runs.first_mut()) else {
            return Selection::default();
        };
        let queries = std::mem::take(&mut first.queries);
        let rows = queries.len() / self.shape.channels();
        let blocks = segment.blocks();
        let mut scores = Vec::with_capacity(rows * blocks);
        for r in 0..rows {
            for run in &*runs {
                let of_run = run.scores.len() / rows;
                scores.extend_from_slice(&run.scores[r * of_run..][..of_run]);
            }
        }
        let mut best = vec![0.0; blocks];
        importance(isa, &scores, &mut best);
        let count = (self.strategy.selected * blocks as f32).ceil() as usize;
        Selection { queries, blocks: top_k(&best, count) }
    }
}

/// Block scores of a run of pages.
#[derive(Default)]
struct Scored {
    /// `[R, C]`, rotated.
    queries: Vec<f32>,
    /// `[R, blocks]`
    scores: Vec<f32>,
}

/// What stage 2 chose for one KV head.
#[derive(Default)]
struct Selection {
    /// `[R, C]`, rotated.
    queries: Vec<f32>,
    /// Token blocks of the segment, ascending.
    blocks: Vec<u32>,
}

impl Selection {
    /// The chosen ones of the blocks `start..end`, as a mask relative to `start`.
    fn mask(&self, start: u32, end: u32) -> u32 {
        let from = self.blocks.partition_point(|&b| b < start);
        self.blocks[from..].iter().take_while(|&&b| b < end).fold(0, |mask, b| mask | 1 << (b - start))
    }
}

/// One token: `queries` `[H, D]`. Tasks are runs of pages of one head, first to score their token blocks, then to
/// attend to the selected ones; partial states are merged in order, and leave the segment's rotation before they
/// meet the exact tokens.
pub(crate) fn decode(step: Step, heads: &[PackedHead], queries: &[f32], out: &mut [f32]) -> u64 {
    let (group, d, isa) = (step.shape.group(), step.shape.head_dim, step.isa);
    let scaled: Vec<f32> = queries.iter().map(|q| q * step.scale).collect();
    let of_head = |g: usize| &scaled[g * group * d..][..group * d];
    let pages = heads[0].segment.as_ref().map_or(0, |s| s.pages.len());
    let score_runs = pages.div_ceil(SCORED_PER_TASK);
    let mut scored: Vec<Scored> = (0..heads.len() * score_runs).map(|_| Scored::default()).collect();
    step.pool.for_each(&mut scored, |task, scored| {
        let g = task / score_runs;
        heads[g].score(isa, of_head(g), task % score_runs, scored);
    });
    let mut selections: Vec<Selection> = heads.iter().map(|_| Selection::default()).collect();
    let mut parts: Vec<_> = selections.iter_mut().zip(scored.chunks_mut(score_runs.max(1))).collect();
    step.pool.for_each(&mut parts, |g, (selection, runs)| **selection = heads[g].select(isa, runs));
    let channels = heads[0].shape.channels();
    let runs = pages.div_ceil(PAGES_PER_TASK);
    let partial = cleared(step.states, heads.len() * runs, group, channels);
    step.pool.for_each(partial, |task, state| {
        let (g, first) = (task / runs, task % runs * PAGES_PER_TASK);
        let segment = heads[g].segment.as_ref().expect("heads of a layer have segments together");
        let pages = segment.pages.iter().zip(segment.starts.windows(2)).skip(first).take(PAGES_PER_TASK);
        let chosen: Vec<_> = pages
            .map(|(page, starts)| (page, selections[g].mask(starts[0], starts[1])))
            .filter(|&(_, mask)| mask != 0)
            .collect();
        for (i, &(page, mask)) in chosen.iter().enumerate() {
            for distance in if i == 0 { 1..=2 } else { 2..=2 } {
                if let Some((page, mask)) = chosen.get(i + distance) {
                    page.prefetch(isa, Ahead::Blocks(*mask));
                }
            }
            attend_blocks(isa, &selections[g].queries, page, mask, state);
        }
    });
    for (g, (head, out)) in heads.iter().zip(out.chunks_exact_mut(group * d)).enumerate() {
        let mut state = AttnState::new(group, d);
        for page in [&head.sinks, &head.buffer] {
            exact::attend(isa, of_head(g), page, Visible::All, &mut state);
        }
        if let (Some(segment), Some((first, rest))) =
            (&head.segment, partial[g * runs..][..runs].split_first_mut())
        {
            rest.iter().for_each(|state| first.merge(state));
            state.merge(&first.turned(d, |acc, out| rotate(isa, acc, &segment.rotation.outputs, out, d)));
        }
        state.finish(out);
    }
    heads.iter().zip(&selections).map(|(head, selection)| bytes_read(head, selection) as u64).sum()
}

fn bytes_read(head: &PackedHead, selection: &Selection) -> usize {
    let exact = head.sinks.bytes_read() + head.buffer.bytes_read();
    let Some(segment) = &head.segment else { return exact };
    let block_keys: usize = segment.pages.iter().map(|page| page.bytes_of_block_keys()).sum();
    exact + segment.rotation.bytes() + block_keys + selection.blocks.len() * segment.pages[0].bytes_of_block()
}

/// Keys and values `[T, D]` of the pages.
pub(crate) fn rows(pages: &[&ExactPage]) -> (Vec<f32>, Vec<f32>) {
    let d = pages[0].head_dim();
    let tokens: usize = pages.iter().map(|page| page.tokens()).sum();
    let (mut keys, mut values) = (vec![0.0; tokens * d], vec![0.0; tokens * d]);
    let places = pages.iter().flat_map(|page| (0..page.tokens()).map(move |t| (page, t)));
    for ((page, t), (key, value)) in places.zip(keys.chunks_exact_mut(d).zip(values.chunks_exact_mut(d))) {
        page.key(t, key);
        page.value(t, value);
    }
    (keys, values)
}
