//! How much would an error of each token matter? Attention of sampled queries of the prompt tells.
//!
//! For a query that gives token `j` the weight `a`, an error of its value moves the output by `a` times the error, and
//! an error of its score by `a |W_o (v_j - o)|` times that. So values weigh E[a^2], keys E[a^2 |W_o (v_j - o)|^2]. Only queries
//! at a distance count: the newest tokens are attended to by their neighbours, which says nothing of later.

use mosaickv_kernels::Isa;
use mosaickv_kernels::layered::{Judged, credit};
use std::ops::Range;

/// Queries this near to a token say nothing about it.
pub(super) const NEAR: usize = 64;

/// Evenly spaced positions of a layer, at most.
const EVEN: usize = 256;

/// Further positions, among the newest tokens: what comes next asks most like them.
const RECENT: usize = 128;

/// Distance of the recent positions.
const STEP: usize = 4;

/// Queries of a layer at positions that depend on the number of tokens alone: evenly spaced ones, every 8th or
/// with more than [`EVEN`] of them every 16th and so on, and of the newest tokens more.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples {
    /// Tokens seen.
    tokens: usize,
    positions: Vec<usize>,
    /// `[N, H, D]`
    rows: Vec<f32>,
}

impl Samples {
    /// Bytes that the samples of one layer take at most, in rows of `row` numbers; a growing list may have room for twice as many.
    pub(crate) fn most_bytes(row: usize) -> usize {
        let rows = 2 * (2 * (EVEN + RECENT) + 1);
        rows * (row * size_of::<f32>() + size_of::<usize>())
    }

    /// Adds the queries of further tokens, in rows of `row` numbers.
    pub(crate) fn push(&mut self, queries: &[f32], row: usize) {
        self.push_some(queries.len() / row, row, |t, rows| {
            rows.extend_from_slice(&queries[t * row..][..row])
        });
    }

    /// The same of `count` tokens; `add(t, rows)` adds the queries of the `t`-th, if they are wanted.
    pub(crate) fn push_some(&mut self, count: usize, row: usize, add: impl Fn(usize, &mut Vec<f32>)) {
        let first = self.tokens;
        self.tokens += count;
        for t in 0..count {
            // What is not wanted now will not be wanted later.
            if self.is_wanted(first + t) {
                self.positions.push(first + t);
                add(t, &mut self.rows);
            }
            if self.positions.len() > 2 * (EVEN + RECENT) {
                self.thin(row);
            }
        }
    }

    /// Whether a position is among the samples of the tokens seen so far.
    fn is_wanted(&self, position: usize) -> bool {
        let stride = self.tokens.div_ceil(EVEN).next_power_of_two().max(8);
        let is_recent = self.tokens - position <= RECENT * STEP && (position + 1).is_multiple_of(STEP);
        (position + 1).is_multiple_of(stride) || is_recent
    }

    /// Forgets the positions that are too many by now.
    fn thin(&mut self, row: usize) {
        let stay: Vec<bool> = self.positions.iter().map(|&p| self.is_wanted(p)).collect();
        let rows = self.rows.chunks_exact(row).zip(&stay).filter(|(_, stay)| **stay);
        self.rows = rows.flat_map(|(query, _)| query).copied().collect();
        let mut stay = stay.into_iter();
        self.positions.retain(|_| stay.next() == Some(true));
    }

    /// Positions of the samples, and those of one KV head's group, `[N, R * D]` of each row's `span`, times `scale`.
    pub(crate) fn of_group(&self, row: usize, span: Range<usize>, scale: f32) -> (Vec<usize>, Vec<f32>) {
        let (mut positions, mut rows) = (vec![], vec![]);
        for (position, query) in self.positions.iter().zip(self.rows.chunks_exact(row)) {
            if self.is_wanted(*position) {
                positions.push(*position);
                rows.extend_from_slice(&query[span.clone()]);
            }
        }
        rows.iter_mut().for_each(|x| *x *= scale);
        (positions, rows)
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        self.rows.capacity() * size_of::<f32>() + self.positions.capacity() * size_of::<usize>()
    }
}

/// What errors of each token weigh.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    /// Of keys, `[T]`.
    pub(crate) keys: Vec<f32>,
    /// Of values, `[T]`.
    pub(crate) values: Vec<f32>,
}

/// From scaled queries `[N, R, D]` at `positions` `[N]`, keys `[T, D]`, and values `[T, D]` in channels whose distances
/// are those of outputs. A token that no query judges has the weights 0.
pub(crate) fn weigh(
    (positions, queries): (&[usize], &[f32]),
    keys: &[f32],
    values: &[f32],
    d: usize,
) -> Weights {
    let tokens = keys.len() / d;
    let mut weights = Weights { keys: vec![0.0; tokens], values: vec![0.0; tokens] };
    if positions.is_empty() {
        return weights;
    }
    let isa = Isa::current();
    let group = queries.len() / d / positions.len();
    let visible: Vec<usize> = positions.iter().flat_map(|p| std::iter::repeat_n(p + 1, group)).collect();
    let judged = Judged::new(isa, keys, values, d);
    credit(isa, &judged, (queries, &visible), NEAR, (&mut weights.keys, &mut weights.values));
    // Each token's mean over the queries that judge it.
    for t in 0..tokens {
        let judges = positions.len() - positions.partition_point(|&p| p < t + NEAR);
        let count = (judges * group).max(1) as f32;
        weights.keys[t] /= count;
        weights.values[t] /= count;
    }
    weights
}
