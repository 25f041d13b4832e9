//! Quest: pages of keys are bounded channel by channel, and a step reads those that could matter.
//!
//! Source: Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv
//! 2406.10774, s. 3.3 and 3.4 (Algorithm 1), and github.com/mit-han-lab/Quest. Keys and values all stay, f16. For each
//! block of 16 tokens the smallest and the largest key of each channel are kept; a block's score for a query is
//! the upper bound `sum over i of max(q_i * min_i, q_i * max_i)`, and the best blocks are attended to.
//!
//! As in the authors' code:
//! - the first two layers are dense (`dense=2`; they attend to everything and store no bounds);
//! - **each query head selects for itself**, also where several share a KV head: `evaluation/quest_attention.py`
//!   repeats the keys and takes the top k a query head. What a step reads is the union over the group, and is
//!   counted so: with G queries a KV head up to G times the share;
//! - the newest token's block, full or not, is always attended to and counts among the chosen, as in the page
//!   budget of `quest/utils/controller.py`; at least 3 blocks are (`max(3, budget / block)` in the evaluation).
//!
//! Not as there: the budget is a share of the blocks (`selected=0.1`, the setting of arXiv 2607.00760) where Quest has
//! a fixed number of tokens (256 to 4,096).

use super::{Head, Plan, TOKENS_PER_TASK, sum_over, to_f16, widen};
use crate::KvBytes;
use crate::exact::{ARC_BYTES, ExactHead};
use half::f16;
use mosaickv_kernels::exact::{ExactPage, PAGE_TOKENS};
use mosaickv_kernels::rows::Rows;
use mosaickv_kernels::select::top_k;
use mosaickv_kernels::{AttnState, Isa};
use std::sync::Arc;

/// Blocks that a query attends to at least.
const LEAST_BLOCKS: usize = 3;

/// Parameters of Quest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quest {
    /// Tokens of a block: 4, 8, 16, 32 or 64.
    pub block: usize,
    /// Share of the blocks that a query head attends to, in (0, 1]; at least 3 of them.
    pub selected: f32,
    /// First layers that stay exact.
    pub dense: usize,
}

impl Default for Quest {
    fn default() -> Quest {
        Quest { block: 16, selected: 0.1, dense: 2 }
    }
}

impl Quest {
    /// Of `blocks` blocks, how many a query attends to, the newest among them.
    pub(super) fn budget(self, blocks: usize) -> usize {
        ((self.selected * blocks as f32).ceil() as usize).max(LEAST_BLOCKS).min(blocks)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct QuestHead {
    pub(super) parameters: Quest,
    pub(super) exact: ExactHead,
    /// Smallest and largest keys `[64 / block, 2, D]` of each sealed page.
    sealed: Vec<Arc<[f16]>>,
    /// The same of the open page; of complete blocks.
    open: Box<[f16]>,
}

impl QuestHead {
    pub(crate) fn new(mut exact: ExactHead, parameters: Quest) -> QuestHead {
        exact.shrink();
        let d = exact.page(0).head_dim();
        let open = vec![f16::ZERO; PAGE_TOKENS / parameters.block * 2 * d].into_boxed_slice();
        let sealed = Vec::with_capacity(exact.tokens() / PAGE_TOKENS);
        let mut head = QuestHead { parameters, exact, sealed, open };
        (1..=head.exact.tokens() / parameters.block).for_each(|blocks| head.bound(blocks - 1));
        head
    }

    fn head_dim(&self) -> usize {
        self.exact.page(0).head_dim()
    }

    fn blocks_per_page(&self) -> usize {
        PAGE_TOKENS / self.parameters.block
    }

    /// Blocks, the newest token's included, whole or not.
    fn blocks(&self) -> usize {
        self.exact.tokens().div_ceil(self.parameters.block)
    }

    /// Works out the bounds of a block that has just become complete.
    fn bound(&mut self, block: usize) {
        let (d, n) = (self.head_dim(), self.parameters.block);
        let page = self.exact.page(block / self.blocks_per_page());
        let mut key = vec![0.0; d];
        let (mut low, mut high) = (vec![f32::INFINITY; d], vec![f32::NEG_INFINITY; d]);
        let first = block % self.blocks_per_page() * n;
        for token in first..first + n {
            page.key(token, &mut key);
            low.iter_mut().zip(&key).for_each(|(low, k)| *low = low.min(*k));
            high.iter_mut().zip(&key).for_each(|(high, k)| *high = high.max(*k));
        }
        let at = block % self.blocks_per_page() * 2 * d;
        let bounds = self.open[at..at + 2 * d].iter_mut().zip(low.iter().chain(&high));
        bounds.for_each(|(bound, x)| *bound = to_f16(*x));
        if first + n == PAGE_TOKENS {
            self.sealed.push(Arc::from(&*self.open));
        }
    }

    /// Scores `[R, n]` of the first `n` blocks.
    fn score(&self, queries: &[f32], n: usize) -> Vec<f32> {
        let (d, per_page) = (self.head_dim(), self.blocks_per_page());
        let mut scores = vec![0.0; queries.len() / d * n];
        let mut bounds = vec![0.0; per_page * 2 * d];
        let pages = self.sealed.iter().map(|page| &**page).chain([&*self.open]);
        for (first, page) in (0..n).step_by(per_page).zip(pages) {
            widen(page, &mut bounds);
            let blocks = bounds.chunks_exact(2 * d).take(n - first).enumerate();
            for (block, bounds) in blocks.map(|(i, bounds)| (first + i, bounds)) {
                let (low, high) = bounds.split_at(d);
                for (query, scores) in queries.chunks_exact(d).zip(scores.chunks_exact_mut(n)) {
                    // max(q * low, q * high) is q * high where q is positive, q * low elsewhere.
                    scores[block] = sum_over(query, high, |q, high| q.max(0.0) * high)
                        + sum_over(query, low, |q, low| q.min(0.0) * low);
                }
            }
        }
        scores
    }

    fn page_of(&self, token: usize) -> (&ExactPage, usize) {
        (self.exact.page(token / PAGE_TOKENS), token % PAGE_TOKENS)
    }
}

impl Head for QuestHead {
    fn tokens(&self) -> usize {
        self.exact.tokens()
    }

    fn append(&mut self, key: &[f32], value: &[f32]) {
        self.exact.append(key, value, (0, key.len()));
        if self.exact.tokens().is_multiple_of(self.parameters.block) {
            self.bound(self.exact.tokens() / self.parameters.block - 1);
        }
    }

    fn is_due(&self) -> bool {
        false
    }

    fn plan(&self, _: Isa, queries: &[f32]) -> Plan {
        let others = self.blocks() - 1;
        let count = self.parameters.budget(others + 1) - 1;
        let scores = self.score(queries, others);
        let rows = queries.len() / self.head_dim();
        let choose = |r: usize| {
            let mut blocks = top_k(&scores[r * others..][..others], count);
            blocks.push(others as u32);
            blocks
        };
        Plan { queries: queries.to_vec(), rotated: vec![], blocks: (0..rows).map(choose).collect() }
    }

    fn runs(&self) -> usize {
        self.exact.tokens().div_ceil(TOKENS_PER_TASK).max(1)
    }

    fn fold(&self, isa: Isa, plan: &Plan, run: usize, state: &mut AttnState) {
        let n = self.parameters.block;
        let mut rows = Rows::new(self.head_dim(), state.rows());
        let first = run * TOKENS_PER_TASK / n;
        let mut wanted = vec![false; state.rows()];
        for block in first..(first + TOKENS_PER_TASK / n).min(self.blocks()) {
            for (wanted, blocks) in wanted.iter_mut().zip(&plan.blocks) {
                *wanted = blocks.binary_search(&(block as u32)).is_ok();
            }
            if !wanted.contains(&true) {
                continue;
            }
            for token in block * n..((block + 1) * n).min(self.exact.tokens()) {
                if rows.is_full() {
                    rows.fold(isa, &plan.queries, state);
                }
                let (key, value) = rows.push(|query| wanted[query]);
                let (page, token) = self.page_of(token);
                page.key(token, key);
                page.value(token, value);
            }
        }
        rows.fold(isa, &plan.queries, state);
    }

    fn bytes_read(&self, plan: &Plan) -> usize {
        let (d, n) = (self.head_dim(), self.parameters.block);
        let mut blocks: Vec<u32> = plan.blocks.concat();
        blocks.sort_unstable();
        blocks.dedup();
        let newest = self.exact.tokens() - (self.blocks() - 1) * n;
        let tokens = (blocks.len() - 1) * n + newest;
        ((self.blocks() - 1) * 2 * d + tokens * 2 * d) * size_of::<f16>()
    }

    fn count(&self, bytes: &mut KvBytes) {
        self.exact.count(bytes);
        bytes.packed += size_of_val(&*self.open) * (self.sealed.len() + 1);
        bytes.lists += self.sealed.capacity() * size_of::<Arc<[f16]>>() + self.sealed.len() * ARC_BYTES;
    }

    fn check(&self) -> Result<(), String> {
        self.exact.check()?;
        let pages = self.exact.tokens() / PAGE_TOKENS;
        if self.sealed.len() != pages {
            return Err(format!("bounds of {} pages for {pages} sealed ones", self.sealed.len()));
        }
        let d = self.head_dim();
        let ordered = |bounds: &[f16]| bounds[..d].iter().zip(&bounds[d..]).all(|(low, high)| low <= high);
        let whole = pages * PAGE_TOKENS..self.exact.tokens();
        let open = &self.open[..whole.len() / self.parameters.block * 2 * d];
        let sealed = self.sealed.iter().flat_map(|page| page.chunks_exact(2 * d));
        match sealed.chain(open.chunks_exact(2 * d)).position(|bounds| !ordered(bounds)) {
            Some(block) => Err(format!("block {block}: a smallest key is above the largest")),
            None => Ok(()),
        }
    }

    fn oracle_rows(&self, queries: &[f64], row: usize) -> (Vec<f64>, Vec<f64>) {
        self.selected_rows(queries, row)
    }

    fn boxed(&self) -> Box<dyn Head> {
        Box::new(self.clone())
    }
}
