//! Which keys and values does each method's definition attend to, in f64? Nobody optimizes this file.
//!
//! It reads what is stored (codes, truncated channels) and decodes and selects anew, token by token, by the formulas.

use super::kivi::{Codes, GROUP, Kivi, KiviHead, RESIDUAL};
use super::quantized::{BLOCK, GgmlType, QuantizedHead};
use super::quest::QuestHead;
use super::strawman::{PAGE, StrawmanHead};
use crate::oracle::exact_rows;
use crate::packed::rows;
use half::f16;
use mosaickv_kernels::exact::PAGE_TOKENS;

impl QuantizedHead {
    /// All keys and values, back in the model's channels.
    pub(super) fn stored_rows(&self) -> (Vec<f64>, Vec<f64>) {
        let (mut keys, mut values) = (vec![], vec![]);
        for page in self.pages() {
            for token in page.chunks_exact(self.token_bytes()) {
                let (key, value) = token.split_at(token.len() / 2);
                for (side, bytes) in [(&mut keys, key), (&mut values, value)] {
                    let numbers = 0..self.head_dim;
                    side.extend(numbers.map(|i| element(self.kind, bytes, i)));
                }
            }
        }
        (turned(&keys, self.orders.keys), turned(&values, self.orders.values))
    }
}

/// Each run of `order` numbers times the orthonormal Walsh-Hadamard matrix, its own inverse.
pub(super) fn turned(numbers: &[f64], order: usize) -> Vec<f64> {
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let matrix: Vec<f64> =
        (0..order * order).map(|at| sign(at / order, at % order) / (order as f64).sqrt()).collect();
    let dot = |run: &[f64], row: &[f64]| run.iter().zip(row).map(|(x, m)| x * m).sum();
    let runs = numbers.chunks_exact(order);
    runs.flat_map(|run| matrix.chunks_exact(order).map(move |row| dot(run, row))).collect()
}

/// Channel `i` of a quantized row.
fn element(kind: GgmlType, row: &[u8], i: usize) -> f64 {
    let block = &row[i / BLOCK * kind.block_bytes()..];
    let d = f16::from_le_bytes([block[0], block[1]]).to_f64();
    let i = i % BLOCK;
    match kind {
        GgmlType::Q8_0 => d * f64::from(block[2 + i].cast_signed()),
        GgmlType::Q4_0 if i < 16 => d * (f64::from(block[2 + i] % 16) - 8.0),
        GgmlType::Q4_0 => d * (f64::from(block[2 + i - 16] / 16) - 8.0),
    }
}

impl KiviHead {
    /// All keys and values.
    pub(super) fn stored_rows(&self) -> (Vec<f64>, Vec<f64>) {
        let d = self.head_dim;
        let key = |t: usize, c: usize| match self.keys.get(t / RESIDUAL) {
            None => self.newest_keys[t % RESIDUAL * d + c].to_f64(),
            Some(codes) => {
                let t = t % RESIDUAL;
                let numbers = &codes.numbers[t / GROUP * 2 * d..][..2 * d];
                code(self.kind, codes, t * d + c) * numbers[c].to_f64() + numbers[d + c].to_f64()
            }
        };
        let value = |t: usize, c: usize| {
            if t >= self.quantized_values {
                return self.newest_values[t % (RESIDUAL + 1) * d + c].to_f64();
            }
            let codes = self.values.get(t / PAGE_TOKENS).map_or(&self.open, |page| page);
            let (t, groups) = (t % PAGE_TOKENS, d / GROUP);
            let numbers = &codes.numbers[t * 2 * groups..][..2 * groups];
            code(self.kind, codes, t * d + c) * numbers[c / GROUP].to_f64()
                + numbers[groups + c / GROUP].to_f64()
        };
        let all = |f: &dyn Fn(usize, usize) -> f64| (0..self.tokens * d).map(|i| f(i / d, i % d)).collect();
        (all(&key), all(&value))
    }
}

/// Element `i` of `[T, D]`, which is packed in groups of 32.
fn code(kind: Kivi, codes: &Codes, i: usize) -> f64 {
    let group = &codes.codes[i / GROUP * kind.group_bytes()..][..kind.group_bytes()];
    let (i, n, bits) = (i % GROUP, kind.group_bytes(), kind.bits());
    f64::from(group[i % n] >> (i / n * bits) & ((1 << bits) - 1))
}

impl QuestHead {
    /// What query `row` of `[R, D]` selects.
    pub(super) fn selected_rows(&self, queries: &[f64], row: usize) -> (Vec<f64>, Vec<f64>) {
        let (keys, values) = exact_rows(&self.exact);
        let d = self.exact.page(0).head_dim();
        let query = &queries[row * d..][..d];
        let blocks: Vec<&[f64]> = keys.chunks(self.parameters.block * d).collect();
        let bound = |block: &[f64]| -> f64 {
            let channel = |c: usize| {
                let keys = block.iter().skip(c).step_by(d).copied();
                let (low, high) = (keys.clone().fold(f64::INFINITY, f64::min), keys.fold(f64::MIN, f64::max));
                (query[c] * low).max(query[c] * high)
            };
            (0..d).map(channel).sum()
        };
        let others = blocks.len() - 1;
        let scores: Vec<f64> = blocks[..others].iter().map(|block| bound(block)).collect();
        let mut order: Vec<usize> = (0..others).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        order.truncate(self.parameters.budget(blocks.len()) - 1);
        order.push(others);
        let size = self.parameters.block * d;
        let of = |x: &[f64]| -> Vec<f64> {
            order.iter().flat_map(|&b| x[b * size..x.len().min((b + 1) * size)].to_vec()).collect()
        };
        (of(&keys), of(&values))
    }
}

impl StrawmanHead {
    /// What the queries `[R, D]` select together, back in the model's channels.
    pub(super) fn selected_rows(&self, queries: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let d = self.buffer.head_dim();
        let wide = |x: Vec<f32>| -> Vec<f64> { x.into_iter().map(f64::from).collect() };
        let (keys, values) = rows(&[&self.sinks, &self.buffer]);
        let (mut keys, mut values) = (wide(keys), wide(values));
        let Some(segment) = &self.segment else { return (keys, values) };
        let c = self.channels();
        // Both [D, C].
        let to_keys = wide(segment.rotation.key_matrix());
        let to_values = wide(segment.rotation.value_matrix(d));
        let restore = |x: &[f16], matrix: &[f64]| -> Vec<f64> {
            let dot =
                |row: &[f16], i: usize| row.iter().zip(&matrix[i * c..]).map(|(x, m)| x.to_f64() * m).sum();
            x.chunks_exact(c).flat_map(|row| (0..d).map(move |i| dot(row, i))).collect()
        };
        let means: Vec<f64> =
            segment.pages.iter().flat_map(|page| restore(&page[2 * PAGE * c..], &to_keys)).collect();
        let (block, per_page) = (self.parameters.block, PAGE / self.parameters.block);
        let count = self.budget(means.len() / d);
        let pages = means.len() / d;
        let best = crate::oracle::log_probabilities(queries, &means, pages);
        for b in crate::oracle::most_probable(&best, &vec![1; pages], count) {
            let (page, first) = (&segment.pages[b / per_page], b % per_page * block);
            keys.extend(restore(&page[first * c..][..block * c], &to_keys));
            values.extend(restore(&page[(PAGE + first) * c..][..block * c], &to_values));
        }
        (keys, values)
    }
}
