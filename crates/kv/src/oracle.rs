//! What should attention over this cache give? Every format's definition in f64, slowly, for tests and benchmarks.
//!
//! It reads what the cache stores (rounded, packed), so a difference from [`KvCache::attend`] is the kernels'.
//! Nobody optimizes this file.

use crate::exact::ExactHead;
use crate::packed::{PackedHead, Segment};
use crate::{KvCache, Layer};
use mosaickv_kernels::oracle;

impl KvCache {
    /// What [`attend`](KvCache::attend) should give for the newest token: `queries` `[H, D]`, output `[H, D]`, of
    /// which only the rows of KV head `g` are worked out; the others are 0.
    pub fn oracle(&self, layer: usize, queries: &[f32], g: usize) -> Vec<f64> {
        let (group, d) = (self.shape.group(), self.shape.head_dim);
        let scale = (d as f64).sqrt().recip();
        let mut out = vec![0.0; queries.len()];
        let span = g * group * d..(g + 1) * group * d;
        let queries: Vec<f64> = queries[span.clone()].iter().map(|&q| f64::from(q) * scale).collect();
        let (mut keys, mut values) = match &self.layers[layer] {
            Layer::Exact(heads) => exact_rows(&heads[g]),
            Layer::Packed(heads) => heads[g].oracle_rows(&queries),
            // Each query may attend to others.
            Layer::Baseline(_) => (vec![], vec![]),
        };
        if let Some(window) = self.shape.window_of(layer) {
            let before = keys.len().saturating_sub(window * d);
            keys.drain(..before);
            values.drain(..before);
        }
        let rows = queries.chunks_exact(d).zip(out[span].chunks_exact_mut(d));
        for (row, (query, out)) in rows.enumerate() {
            if let Layer::Baseline(heads) = &self.layers[layer] {
                (keys, values) = heads[g].oracle_rows(&queries, row);
            }
            out.copy_from_slice(&oracle::attend(query, &keys, &values, 1.0));
        }
        out
    }
}

pub(crate) fn exact_rows(head: &ExactHead) -> (Vec<f64>, Vec<f64>) {
    let pages: Vec<_> = head.pages().collect();
    let (keys, values) = crate::packed::rows(&pages);
    (keys.into_iter().map(f64::from).collect(), values.into_iter().map(f64::from).collect())
}

impl PackedHead {
    /// Keys and values `[T, D]`, back in the model's channels, of the tokens that the scaled queries `[R, D]`
    /// attend to.
    fn oracle_rows(&self, queries: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let d = self.buffer.head_dim();
        let (keys, values) = crate::packed::rows(&[&self.sinks, &self.buffer]);
        let mut keys: Vec<f64> = keys.into_iter().map(f64::from).collect();
        let mut values: Vec<f64> = values.into_iter().map(f64::from).collect();
        // Of all token blocks in order: the segment, the block in it, and its tokens.
        let mut blocks = vec![];
        let mut block_keys = vec![];
        for segment in &self.segments {
            for page in &segment.pages {
                block_keys.extend(segment.restore(page.decode_block_keys(), Side::Keys, d));
                blocks.extend((0..page.blocks()).map(|block| (segment, page, block)));
            }
        }
        let sizes: Vec<usize> = blocks.iter().map(|(_, page, _)| page.block()).collect();
        for block in most_probable(queries, &block_keys, &sizes, self.selected_tokens()) {
            let (segment, page, block) = blocks[block];
            let row = segment.strategy.shape.channels() * page.block();
            let span = block * row..(block + 1) * row;
            keys.extend(segment.restore(page.decode_keys()[span.clone()].to_vec(), Side::Keys, d));
            values.extend(segment.restore(page.decode_values()[span].to_vec(), Side::Values, d));
        }
        (keys, values)
    }
}

#[derive(Clone, Copy)]
enum Side {
    Keys,
    Values,
}

impl Segment {
    /// Rows `[n, C]` of the segment back in the model's channels, `[n, D]`.
    fn restore(&self, rows: Vec<f32>, side: Side, d: usize) -> Vec<f64> {
        // [D, C]: a packed row times the transpose is back in the model's channels.
        let matrix = match side {
            Side::Keys => self.rotation.key_matrix(),
            Side::Values => self.rotation.value_matrix(d),
        };
        let c = self.strategy.shape.channels();
        let dot = |row: &[f32], i: usize| {
            row.iter().zip(&matrix[i * c..]).map(|(&x, &m)| f64::from(x) * f64::from(m)).sum::<f64>()
        };
        rows.chunks_exact(c).flat_map(|row| (0..d).map(|i| dot(row, i)).collect::<Vec<_>>()).collect()
    }
}

/// The best blocks, ascending, as many as hold `tokens` tokens, by each block's largest log-probability among the block
/// keys `[blocks, D]` over the queries `[R, D]`. `sizes` are the blocks' tokens.
pub(crate) fn most_probable(
    queries: &[f64],
    block_keys: &[f64],
    sizes: &[usize],
    tokens: usize,
) -> Vec<usize> {
    let (blocks, d) = (sizes.len(), block_keys.len().checked_div(sizes.len()).unwrap_or(1));
    let mut best = vec![f64::NEG_INFINITY; blocks];
    for query in queries.chunks_exact(d) {
        let scores: Vec<f64> =
            block_keys.chunks_exact(d).map(|key| query.iter().zip(key).map(|(q, k)| q * k).sum()).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
        best.iter_mut().zip(&scores).for_each(|(b, s)| *b = b.max(s - total));
    }
    let mut order: Vec<usize> = (0..blocks).collect();
    order.sort_by(|&a, &b| best[b].total_cmp(&best[a]).then(a.cmp(&b)));
    let enough = order.iter().scan(0, |held, &b| (*held < tokens).then(|| *held += sizes[b])).count();
    order.truncate(enough);
    order.sort_unstable();
    order
}
