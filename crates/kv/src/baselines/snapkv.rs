//! SnapKV: of a prompt only the tokens stay that its last queries looked at.
//!
//! Source: Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469, s. 4
//! (Listing 1); github.com/FasterDecoding/SnapKV (`snapkv/monkeypatch/snapkv_utils.py`). The last 32 queries
//! of the prompt (the observation window) attend causally to all of it; a token's votes are its softmax weights
//! added over the window, max-pooled over 7 neighbours; the tokens with the most votes stay, as does the window. This
//! happens once, per layer, when the prompt is complete; dropped tokens are gone; all generated tokens stay.
//!
//! Window 32, kernel 7 and max pooling are the setting of the paper's LongBench experiments (the code's own defaults
//! are 32, 5 and average pooling).
//! Differences: what stays is a share of the prompt (`kept=0.25`, the window included) where the authors fix a
//! number of tokens (`max_capacity_prompt`); and where query heads share a KV head, its tokens are chosen by the mean
//! of the pooled votes over the group, as in NVIDIA's kvpress (`SnapKVPress`), where the authors' code repeats
//! keys and values for each query head, which stores them several times.

use super::{Head, Plan, TOKENS_PER_TASK};
use crate::KvBytes;
use crate::exact::ExactHead;
use mosaickv_kernels::exact::{PAGE_TOKENS, attend_pages};
use mosaickv_kernels::rotate::multiply;
use mosaickv_kernels::select::top_k;
use mosaickv_kernels::{AttnState, Isa};

/// Queries of the observation window.
pub(crate) const WINDOW: usize = 32;

/// Neighbours over which votes are pooled.
pub(super) const KERNEL: usize = 7;

/// Parameters of SnapKV.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SnapKv {
    /// Share of the prompt's tokens that stay, in (0, 1]; at least the last 32.
    pub kept: f32,
}

impl Default for SnapKv {
    fn default() -> SnapKv {
        SnapKv { kept: 0.25 }
    }
}

impl SnapKv {
    /// Of a prompt of `tokens`, how many stay.
    pub(super) fn capacity(self, tokens: usize) -> usize {
        ((self.kept * tokens as f32).ceil() as usize).max(WINDOW).min(tokens)
    }
}

/// The newest queries of one layer: working memory of prefill, for formats that observe them.
#[derive(Clone, Debug, Default)]
pub(crate) struct RecentQueries {
    /// `[up to 32, H, D]`, after RoPE, not scaled; oldest first.
    rows: Vec<f32>,
}

impl RecentQueries {
    /// Adds queries `[T, H, D]` with rows of `row` elements and forgets all but the newest 32.
    pub(crate) fn push(&mut self, queries: &[f32], row: usize) {
        let most = WINDOW * row;
        let new = &queries[queries.len().saturating_sub(most)..];
        let over = (self.rows.len() + new.len()).saturating_sub(most);
        self.rows.drain(..over);
        self.rows.reserve_exact(most - self.rows.len());
        self.rows.extend_from_slice(new);
    }

    /// `[W, H, D]`
    pub(crate) fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        self.rows.capacity() * size_of::<f32>()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct SnapKvHead {
    /// What stayed, in order, and everything since.
    pub(super) kept: ExactHead,
    dropped: usize,
}

impl SnapKvHead {
    /// `queries` `[W, R, D]` are the newest of the head's group, scaled.
    pub(crate) fn new(mut exact: ExactHead, parameters: SnapKv, queries: &[f32]) -> SnapKvHead {
        let tokens = exact.tokens();
        let capacity = parameters.capacity(tokens);
        if capacity == tokens {
            exact.shrink();
            return SnapKvHead { kept: exact, dropped: 0 };
        }
        let d = exact.page(0).head_dim();
        let (keys, values) = crate::packed::rows(&exact.pages().collect::<Vec<_>>());
        drop(exact);
        let votes = votes(&keys, queries, d);
        let mut stay = top_k(&votes, capacity - WINDOW);
        stay.extend(votes.len() as u32..tokens as u32);
        let mut kept = ExactHead::new(d, None);
        for t in stay.into_iter().map(|t| t as usize) {
            kept.append(&keys[t * d..][..d], &values[t * d..][..d], (0, d));
        }
        kept.shrink();
        SnapKvHead { kept, dropped: tokens - capacity }
    }
}

/// Votes `[T - 32]` for the tokens before the window: keys `[T, D]`, scaled queries `[32, R, D]`.
pub(super) fn votes(keys: &[f32], queries: &[f32], d: usize) -> Vec<f32> {
    let columns = queries.len() / d;
    let (group, prefix) = (columns / WINDOW, keys.len() / d - WINDOW);
    let transposed: Vec<f32> = (0..queries.len()).map(|i| queries[i % columns * d + i / columns]).collect();
    // [T, 32 * R]
    let mut scores = multiply(keys, &transposed, d);
    for (i, row) in scores[prefix * columns..].chunks_exact_mut(columns).enumerate() {
        row[..i * group].fill(f32::NEG_INFINITY);
    }
    let mut max = vec![f32::NEG_INFINITY; columns];
    for row in scores.chunks_exact(columns) {
        max.iter_mut().zip(row).for_each(|(m, s)| *m = m.max(*s));
    }
    let mut sum = vec![0.0; columns];
    for row in scores.chunks_exact_mut(columns) {
        row.iter_mut().zip(&max).for_each(|(s, m)| *s = (*s - m).exp());
        sum.iter_mut().zip(&*row).for_each(|(sum, s)| *sum += s);
    }
    let mut votes = vec![0.0; prefix * group];
    for (row, votes) in scores.chunks_exact(columns).zip(votes.chunks_exact_mut(group)) {
        for (weights, sums) in row.chunks_exact(group).zip(sum.chunks_exact(group)) {
            votes.iter_mut().zip(weights).zip(sums).for_each(|((vote, w), s)| *vote += w / s);
        }
    }
    let pooled = |t: usize, head: usize| {
        let near = t.saturating_sub(KERNEL / 2)..(t + KERNEL / 2 + 1).min(prefix);
        near.map(|t| votes[t * group + head]).fold(0.0, f32::max)
    };
    (0..prefix).map(|t| (0..group).map(|head| pooled(t, head)).sum::<f32>() / group as f32).collect()
}

impl Head for SnapKvHead {
    fn tokens(&self) -> usize {
        self.dropped + self.kept.tokens()
    }

    fn append(&mut self, key: &[f32], value: &[f32]) {
        self.kept.append(key, value, (0, key.len()));
    }

    fn is_due(&self) -> bool {
        false
    }

    fn plan(&self, _: Isa, queries: &[f32]) -> Plan {
        Plan::all(queries)
    }

    fn runs(&self) -> usize {
        (self.kept.tokens() / PAGE_TOKENS + 1).div_ceil(TOKENS_PER_TASK / PAGE_TOKENS)
    }

    fn fold(&self, isa: Isa, plan: &Plan, run: usize, state: &mut AttnState) {
        let pages = TOKENS_PER_TASK / PAGE_TOKENS;
        attend_pages(isa, &plan.queries, self.kept.pages().skip(run * pages).take(pages), state);
    }

    fn bytes_read(&self, _: &Plan) -> usize {
        self.kept.pages().map(|page| page.bytes_read()).sum()
    }

    fn count(&self, bytes: &mut KvBytes) {
        self.kept.count(bytes);
    }

    fn check(&self) -> Result<(), String> {
        self.kept.check()
    }

    fn oracle_rows(&self, _: &[f64], _: usize) -> (Vec<f64>, Vec<f64>) {
        crate::oracle::exact_rows(&self.kept)
    }

    fn boxed(&self) -> Box<dyn Head> {
        Box::new(self.clone())
    }
}
