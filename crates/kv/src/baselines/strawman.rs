//! The strawman: globally leading channels of rotated keys and values, then blocks selected by their mean key.
//!
//! Source: "MosaicKV: Serving Long-Context LLM with Dynamic Two-D KV Cache Compression", 2026, arXiv 2607.00760,
//! s. 3, which shows with it why one choice of channels for all vectors fails: K and V are rotated by the eigenvectors of
//! K^T K and V^T V, of every vector the same leading channels are kept (`kept=0.25`), and 10 % of the token blocks
//! are selected as in Quest. s. 3 leaves open how a block is represented; here by its mean key, as in s. 4.
//!
//! Everything else is as in the `packed` format, so that a comparison of the two is one of how channels are chosen:
//! 4 sinks and the newest 32 to 64 tokens stay exact and are always attended to; the rotation is learnt from the
//! prompt; the query heads of a KV head select together, by the largest log-probability among the block keys.

use super::{Head, Plan, sum_over, to_f16, widen};
use crate::KvBytes;
use crate::exact::{ARC_BYTES, ExactHead};
use crate::packed::{SINKS, rows};
use crate::rotation::{Basis, Rotation};
use half::f16;
use mosaickv_kernels::exact::{self, ExactPage, PAGE_TOKENS, Visible};
use mosaickv_kernels::rotate::{multiply, rotate};
use mosaickv_kernels::rows::{ROW_STEP, Rows};
use mosaickv_kernels::select::{importance, top_k};
use mosaickv_kernels::{AttnState, Isa};
use std::sync::Arc;

/// Tokens that leave the update buffer at once and make one page, and that the buffer keeps at least.
pub(super) const PAGE: usize = 32;

/// Pages that one task of a decode step attends to; fixed, so that results do not depend on threads.
const PAGES_PER_TASK: usize = 32;

/// Parameters of the strawman.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Strawman {
    /// Share of the channels that are kept, in (0, 1]; rounded down to a whole channel, at least one.
    pub kept: f32,
    /// Tokens of a token block: 4, 8, 16 or 32.
    pub block: usize,
    /// Share of the compressed tokens that a decode step attends to, in (0, 1].
    pub selected: f32,
    /// Which channels are chosen from.
    pub rotation: Basis,
}

impl Default for Strawman {
    fn default() -> Strawman {
        Strawman { kept: 0.25, block: 8, selected: 0.1, rotation: Basis::Svd }
    }
}

impl Strawman {
    fn channels(self, head_dim: usize) -> usize {
        ((head_dim as f32 * self.kept) as usize).max(1)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct StrawmanHead {
    pub(super) parameters: Strawman,
    pub(super) sinks: ExactPage,
    pub(super) segment: Option<Segment>,
    /// The update buffer.
    pub(super) buffer: ExactPage,
}

#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub(super) rotation: Arc<Rotation>,
    /// Each 32 tokens: keys `[32, C]`, values `[32, C]`, mean keys `[32 / block, C]`.
    pub(super) pages: Vec<Arc<[f16]>>,
}

impl StrawmanHead {
    pub(crate) fn new(exact: &ExactHead, parameters: Strawman) -> StrawmanHead {
        let d = exact.page(0).head_dim();
        let (sinks, buffer) = (ExactPage::new(d, 16), ExactPage::new(d, PAGE_TOKENS));
        let mut head = StrawmanHead { parameters, sinks, segment: None, buffer };
        let (keys, values) = rows(&exact.pages().collect::<Vec<_>>());
        let tokens = keys.len() / d;
        let sinks = tokens.min(SINKS);
        let packed = (tokens - sinks).saturating_sub(PAGE) / PAGE * PAGE;
        if packed > 0 {
            let rotation = Rotation::learn(parameters.rotation, &keys, &values, (d, head.channels()));
            let span = sinks * d..(sinks + packed) * d;
            head.pack(Arc::new(rotation), &keys[span.clone()], &values[span]);
        }
        for t in (0..sinks).chain(sinks + packed..tokens) {
            let to = if t < sinks { &mut head.sinks } else { &mut head.buffer };
            to.push(&keys[t * d..][..d], &values[t * d..][..d]);
        }
        head
    }

    fn head_dim(&self) -> usize {
        self.buffer.head_dim()
    }

    /// Channels kept, `C`.
    pub(super) fn channels(&self) -> usize {
        self.parameters.channels(self.head_dim())
    }

    fn page_numbers(&self) -> usize {
        (2 * PAGE + PAGE / self.parameters.block) * self.channels()
    }

    fn flush(&mut self) {
        let d = self.head_dim();
        let (keys, values) = rows(&[&self.buffer]);
        let rotation = match &self.segment {
            Some(segment) => Arc::clone(&segment.rotation),
            None => Arc::new(Rotation::learn(self.parameters.rotation, &keys, &values, (d, self.channels()))),
        };
        self.pack(rotation, &keys[..PAGE * d], &values[..PAGE * d]);
        self.buffer.drop_front(PAGE);
    }

    /// Rotates keys and values `[T, D]`, `T` a multiple of 32, and adds them to the segment.
    fn pack(&mut self, rotation: Arc<Rotation>, keys: &[f32], values: &[f32]) {
        let (d, c, block) = (self.head_dim(), self.channels(), self.parameters.block);
        let keys = multiply(keys, &rotation.key_matrix(), d);
        let values = multiply(values, &rotation.value_matrix(d), d);
        let segment = self.segment.get_or_insert_with(|| Segment { rotation, pages: Vec::new() });
        segment.pages.reserve_exact(keys.len() / (PAGE * c));
        for (keys, values) in keys.chunks_exact(PAGE * c).zip(values.chunks_exact(PAGE * c)) {
            let means = keys.chunks_exact(block * c).flat_map(|keys| {
                (0..c).map(move |i| keys.iter().skip(i).step_by(c).sum::<f32>() / block as f32)
            });
            segment.pages.push(keys.iter().chain(values).copied().chain(means).map(to_f16).collect());
        }
    }

    /// Scores `[R, blocks]` of the rotated queries `[R, W]`.
    fn score(&self, segment: &Segment, queries: &[f32], width: usize) -> Vec<f32> {
        let (c, per_page) = (self.channels(), PAGE / self.parameters.block);
        let blocks = segment.pages.len() * per_page;
        let mut scores = vec![0.0; queries.len() / width * blocks];
        let mut means = vec![0.0; per_page * c];
        for (p, page) in segment.pages.iter().enumerate() {
            widen(&page[2 * PAGE * c..], &mut means);
            for (i, mean) in means.chunks_exact(c).enumerate() {
                for (query, scores) in queries.chunks_exact(width).zip(scores.chunks_exact_mut(blocks)) {
                    scores[p * per_page + i] = sum_over(&query[..c], mean, |q, k| q * k);
                }
            }
        }
        scores
    }

    /// How many of `blocks` token blocks a step attends to.
    pub(super) fn budget(&self, blocks: usize) -> usize {
        (self.parameters.selected * blocks as f32).ceil() as usize
    }

    /// Folds one run's selected tokens into a state of the rotated channels.
    fn fold_segment(&self, isa: Isa, segment: &Segment, plan: &Plan, (run, state): (usize, &mut AttnState)) {
        let (c, block) = (self.channels(), self.parameters.block);
        let per_page = PAGE / block;
        let mut rows = Rows::new(state.channels(), state.rows());
        let (first, pages) = (run * PAGES_PER_TASK, segment.pages.iter());
        for (p, page) in pages.enumerate().skip(first).take(PAGES_PER_TASK) {
            for i in 0..per_page {
                if plan.blocks[0].binary_search(&((p * per_page + i) as u32)).is_err() {
                    continue;
                }
                for token in i * block..(i + 1) * block {
                    if rows.is_full() {
                        rows.fold(isa, &plan.rotated, state);
                    }
                    let (key, value) = rows.push(|_| true);
                    widen(&page[token * c..][..c], &mut key[..c]);
                    widen(&page[(PAGE + token) * c..][..c], &mut value[..c]);
                }
            }
        }
        rows.fold(isa, &plan.rotated, state);
    }
}

impl Head for StrawmanHead {
    fn tokens(&self) -> usize {
        let packed = self.segment.as_ref().map_or(0, |segment| segment.pages.len() * PAGE);
        self.sinks.tokens() + packed + self.buffer.tokens()
    }

    fn append(&mut self, key: &[f32], value: &[f32]) {
        if self.sinks.tokens() < SINKS {
            return self.sinks.push(key, value);
        }
        if self.buffer.is_full() {
            self.flush();
        }
        self.buffer.push(key, value);
    }

    fn is_due(&self) -> bool {
        self.buffer.is_full()
    }

    fn plan(&self, isa: Isa, queries: &[f32]) -> Plan {
        let Some(segment) = &self.segment else { return Plan::all(queries) };
        let (d, c) = (self.head_dim(), self.channels());
        let width = c.next_multiple_of(ROW_STEP);
        let mut rotated = vec![0.0; queries.len() / d * width];
        let by = multiply(queries, &segment.rotation.key_matrix(), d);
        rotated
            .chunks_exact_mut(width)
            .zip(by.chunks_exact(c))
            .for_each(|(to, x)| to[..c].copy_from_slice(x));
        let scores = self.score(segment, &rotated, width);
        let mut best = vec![0.0; segment.pages.len() * PAGE / self.parameters.block];
        importance(isa, &scores, &mut best);
        let blocks = vec![top_k(&best, self.budget(best.len()))];
        Plan { queries: queries.to_vec(), rotated, blocks }
    }

    fn runs(&self) -> usize {
        self.segment.as_ref().map_or(1, |segment| segment.pages.len().div_ceil(PAGES_PER_TASK))
    }

    fn fold(&self, isa: Isa, plan: &Plan, run: usize, state: &mut AttnState) {
        let (d, c) = (self.head_dim(), self.channels());
        if run == 0 {
            for page in [&self.sinks, &self.buffer] {
                exact::attend(isa, &plan.queries, page, Visible::All, state);
            }
        }
        let Some(segment) = &self.segment else { return };
        let width = c.next_multiple_of(ROW_STEP);
        let mut rotated = AttnState::new(state.rows(), width);
        self.fold_segment(isa, segment, plan, (run, &mut rotated));
        let turn = |acc: &[f32], _: &[f32], out: &mut [f32]| {
            for (acc, out) in acc.chunks_exact(width).zip(out.chunks_exact_mut(d)) {
                rotate(isa, &acc[..c], &segment.rotation.outputs, out, d);
            }
        };
        state.merge(&rotated.turned(d, turn));
    }

    fn bytes_read(&self, plan: &Plan) -> usize {
        let exact = self.sinks.bytes_read() + self.buffer.bytes_read();
        let Some(segment) = &self.segment else { return exact };
        let means = segment.pages.len() * (PAGE / self.parameters.block);
        let selected = plan.blocks[0].len() * self.parameters.block * 2;
        exact + segment.rotation.bytes() + (means + selected) * self.channels() * size_of::<f16>()
    }

    fn count(&self, bytes: &mut KvBytes) {
        bytes.exact += self.sinks.bytes() + self.buffer.bytes() - 2 * size_of::<ExactPage>();
        let Some(segment) = &self.segment else { return };
        bytes.rotations += segment.rotation.bytes() + ARC_BYTES;
        bytes.packed += segment.pages.iter().map(|page| size_of_val(&**page)).sum::<usize>();
        bytes.lists += segment.pages.capacity() * size_of::<Arc<[f16]>>() + segment.pages.len() * ARC_BYTES;
    }

    fn check(&self) -> Result<(), String> {
        if self.sinks.tokens() < SINKS && (self.segment.is_some() || self.buffer.tokens() > 0) {
            return Err(format!("{} sinks before later tokens", self.sinks.tokens()));
        }
        let Some(segment) = &self.segment else { return Ok(()) };
        match segment.pages.iter().position(|page| page.len() != self.page_numbers()) {
            Some(i) => {
                Err(format!("page {i}: {} numbers, wanted {}", segment.pages[i].len(), self.page_numbers()))
            }
            None if self.buffer.tokens() < PAGE => {
                Err(format!("{} tokens in the buffer", self.buffer.tokens()))
            }
            None => Ok(()),
        }
    }

    fn oracle_rows(&self, queries: &[f64], _: usize) -> (Vec<f64>, Vec<f64>) {
        self.selected_rows(queries)
    }

    fn boxed(&self) -> Box<dyn Head> {
        Box::new(self.clone())
    }
}
