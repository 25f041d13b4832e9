//! What should attention over this cache give? Every format's definition in f64, slowly, for tests and benchmarks.
//!
//! It reads what the cache stores (rounded, packed), so a difference from [`KvCache::attend`] is the kernels'. Layered attention
//! rounds queries too: [`KvCache::oracle`] takes them as they are given, [`KvCache::oracle_of_step`] as they are rounded.
//! Nobody optimizes this file.

use crate::exact::ExactHead;
use crate::layered::{LayeredHead, Work, select};
use crate::packed::{PackedHead, Segment};
use crate::{KvCache, Layer};
use half::f16;
use mosaickv_kernels::layered::{self, Needed, Pages, TILE_TOKENS, TILES};
use mosaickv_kernels::oracle;

impl KvCache {
    /// What [`attend`](KvCache::attend) should give for the newest token: `queries` `[H, D]`, output `[H, D]`, of
    /// which only the rows of KV head `g` are worked out; the others are 0.
    pub fn oracle(&self, layer: usize, queries: &[f32], g: usize) -> Vec<f64> {
        self.oracle_of(layer, queries, g, None).0
    }

    /// The same with the token blocks that the step just taken selected, which must have been in this layer and with these
    /// queries; and by how much the log-probability of the best block that it left out exceeds that of the worst it
    /// selected; infinite if it selected fewer or more than it should. Among many blocks near ties are certain, and f32 and
    /// f64 order them differently: that much is rounding, while an output over other tokens is another output.
    ///
    /// In the format `layered` with the queries as the step rounds them to bytes: most of its difference from
    /// [`oracle`](KvCache::oracle) is that rounding, which would hide what else is wrong. What is missed is there the share of
    /// a query's sketched attention that was left out beyond what may be.
    pub fn oracle_of_step(&self, layer: usize, queries: &[f32], g: usize) -> (Vec<f64>, f64) {
        if let Layer::Layered(heads) = &self.layers[layer] {
            let of_group = self.shape.group() * self.shape.head_dim;
            let span = g * of_group..(g + 1) * of_group;
            let mut out = vec![0.0; queries.len()];
            let work = &self.working.layered[g];
            out[span].copy_from_slice(&heads[g].oracle_of_step(work));
            return (out, heads[g].missed(work));
        }
        let selected = self.working.packed.get(g).map(|work| &*work.selected);
        self.oracle_of(layer, queries, g, selected)
    }

    fn oracle_of(
        &self,
        layer: usize,
        queries: &[f32],
        g: usize,
        selected: Option<&[u32]>,
    ) -> (Vec<f64>, f64) {
        let (group, d) = (self.shape.group(), self.shape.head_dim);
        let scale = (d as f64).sqrt().recip();
        let (mut out, mut missed) = (vec![0.0; queries.len()], 0.0);
        let span = g * group * d..(g + 1) * group * d;
        let queries: Vec<f64> = queries[span.clone()].iter().map(|&q| f64::from(q) * scale).collect();
        let (mut keys, mut values) = match &self.layers[layer] {
            Layer::Exact(heads) => exact_rows(&heads[g]),
            Layer::Packed(heads) => {
                let (keys, values, excess) = heads[g].oracle_rows(&queries, selected);
                missed = excess;
                (keys, values)
            }
            Layer::Layered(heads) => heads[g].oracle_rows(),
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
        (out, missed)
    }
}

pub(crate) fn exact_rows(head: &ExactHead) -> (Vec<f64>, Vec<f64>) {
    let pages: Vec<_> = head.pages().collect();
    let (keys, values) = crate::packed::rows(&pages);
    (keys.into_iter().map(f64::from).collect(), values.into_iter().map(f64::from).collect())
}

impl PackedHead {
    /// Keys and values `[T, D]`, back in the model's channels, of the tokens that the scaled queries `[R, D]`
    /// attend to; with `selected`, of those blocks, and how much better the best of the others is than the worst of them.
    fn oracle_rows(&self, queries: &[f64], selected: Option<&[u32]>) -> (Vec<f64>, Vec<f64>, f64) {
        let d = self.buffer.head_dim();
        let (keys, values) = crate::packed::rows(&[&self.sinks, &self.buffer]);
        let mut keys: Vec<f64> = keys.into_iter().map(f64::from).collect();
        let mut values: Vec<f64> = values.into_iter().map(f64::from).collect();
        // Of all token blocks in order.
        let (mut block_keys, mut sizes) = (vec![], vec![]);
        let pages =
            || self.segments.iter().flat_map(|segment| segment.pages.iter().map(move |page| (segment, page)));
        for (segment, page) in pages() {
            block_keys.extend(segment.restore(&page.decode_block_keys(), Side::Keys, d));
            sizes.extend(vec![page.block(); page.blocks()]);
        }
        let best = log_probabilities(queries, &block_keys, sizes.len());
        let chosen = match selected {
            Some(selected) => selected.iter().map(|&block| block as usize).collect(),
            None => most_probable(&best, &sizes, self.selected_tokens()),
        };
        let (mut worst, mut missed) = (f64::INFINITY, f64::NEG_INFINITY);
        let mut block = 0;
        for (segment, page) in pages() {
            let (k, v) = (page.decode_keys(), page.decode_values());
            let row = segment.strategy.shape.channels() * page.block();
            for (k, v) in k.chunks_exact(row).zip(v.chunks_exact(row)) {
                if chosen.binary_search(&block).is_ok() {
                    worst = worst.min(best[block]);
                    keys.extend(segment.restore(k, Side::Keys, d));
                    values.extend(segment.restore(v, Side::Values, d));
                } else {
                    missed = missed.max(best[block]);
                }
                block += 1;
            }
        }
        let held: usize = chosen.iter().map(|&block| sizes[block]).sum();
        let (wanted, largest) = (self.selected_tokens(), sizes.iter().max().copied().unwrap_or(0));
        // Blocks of several sizes: the last one taken may hold more than was missing.
        let enough = (wanted..(wanted + largest).max(1)).contains(&held);
        (keys, values, if enough { missed - worst } else { f64::INFINITY })
    }
}

impl LayeredHead {
    /// All keys and values `[T, D]`, back in the model's channels.
    fn oracle_rows(&self) -> (Vec<f64>, Vec<f64>) {
        let d = self.head_dim();
        let (mut keys, values) = self.exact_rows();
        // Into the model's channels: the matrix of queries is that of their rows' channels, transposed.
        let queries = widened(&self.calibration.heads[self.index].queries);
        let back: Vec<f64> = (0..d * d).map(|i| queries[i % d * d + i / d]).collect();
        for (pages, page) in self.pages() {
            let (k, _) = pages.decode(page);
            keys.extend(restored(&k, (self.scales.key_mean(), self.scales.key_spread()), &back));
        }
        (keys, self.with_values_of_pages(values))
    }

    /// Attention `[R, D]` of a step's queries, as it rounded them, over what it chose.
    fn oracle_of_step(&self, work: &Work) -> Vec<f64> {
        let d = self.head_dim();
        let (keys, exact_values) = self.exact_rows();
        let attended = work.scaled.chunks_exact(d).enumerate().flat_map(|(r, query)| {
            let dot = |key: &[f64]| query.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum();
            let mut scores: Vec<f64> = keys.chunks_exact(d).map(dot).collect();
            let mut values = exact_values.clone();
            for (pages, visits) in work.chosen.of(self) {
                for &(page, tiles) in visits {
                    let of_page = layered::oracle::scores(&work.queries, r, pages, page as usize);
                    let of_values = self.restored_values(pages, page as usize);
                    for (t, (score, value)) in of_page.iter().zip(of_values.chunks_exact(d)).enumerate() {
                        if tiles >> (t / TILE_TOKENS) & 1 == 1 {
                            scores.push(*score);
                            values.extend_from_slice(value);
                        }
                    }
                }
            }
            // One channel whose keys are the scores.
            oracle::attend(&[1.0], &scores, &values, 1.0)
        });
        attended.collect()
    }

    /// The largest share of a query's attention, as sketched, that was left out beyond what the head's selection allows;
    /// infinite if that read too much.
    fn missed(&self, work: &Work) -> f64 {
        let Some(needed) = self.settings.select.needed(self.in_pages()) else { return 0.0 };
        let mut tiles = vec![];
        for ((pages, range), (_, visits)) in self.selectable().into_iter().zip(work.chosen.of(self)) {
            for page in range {
                let read = visits.iter().find(|visit| visit.0 == page as u32).map_or(0, |visit| visit.1);
                tiles.extend((0..TILES).map(|tile| (pages, page, tile, read >> tile & 1 == 1)));
            }
        }
        let read = tiles.iter().filter(|(.., read)| *read).count();
        let (least, most) = select::bounds(tiles.len());
        // Near the bounds, tiles that are wanted alike are not told apart.
        if read > most + most / 16 + 1 {
            return f64::INFINITY;
        }
        if read >= least.max(most - most / 16) {
            return 0.0;
        }
        let missed_by = |r: usize| {
            let at = (r, f64::from(work.shifts[r]));
            let weight = |&(pages, page, tile, read): &(&Pages, usize, usize, bool)| {
                (layered::oracle::sketch(&work.queries, at, pages, page)[tile], read)
            };
            missed_of(&tiles.iter().map(weight).collect::<Vec<_>>(), needed)
        };
        (0..work.queries.rows()).map(missed_by).fold(0.0, f64::max)
    }

    /// Keys and values `[T, D]` of the tokens that are in no page.
    fn exact_rows(&self) -> (Vec<f64>, Vec<f64>) {
        let d = self.head_dim();
        let (mut keys, mut values) = (vec![], vec![]);
        for token in self.sinks.chunks_exact(2 * d) {
            keys.extend(widened(&token[..d]));
            values.extend(widened(&token[d..]));
        }
        if let Some(buffer) = &self.buffer {
            let (k, v) = crate::packed::rows(&[buffer]);
            keys.extend(k.into_iter().map(f64::from));
            values.extend(v.into_iter().map(f64::from));
        }
        (keys, values)
    }

    /// `values`, and after them those of all pages.
    fn with_values_of_pages(&self, mut values: Vec<f64>) -> Vec<f64> {
        for (pages, page) in self.pages() {
            values.extend(self.restored_values(pages, page));
        }
        values
    }

    /// `[n, D]`, back in the model's channels.
    fn restored_values(&self, pages: &Pages, page: usize) -> Vec<f64> {
        let back = widened(&self.calibration.heads[self.index].outputs);
        restored(&pages.decode(page).1, (self.scales.value_mean(), self.scales.value_spread()), &back)
    }

    /// All pages: whose they are, and which.
    fn pages(&self) -> impl Iterator<Item = (&Pages, usize)> {
        let segments = self.segments().map(|segment| &segment.pages);
        segments.into_iter().flat_map(|pages| (0..pages.pages().len()).map(move |page| (pages, page)))
    }
}

/// What a query misses beyond what it may, by more than a tenth of that (sketched weights are off by up to 4 %): of tiles of
/// these weights, read or not, over that of what is read in any case.
fn missed_of(tiles: &[(f64, bool)], needed: Needed) -> f64 {
    let left_out = || tiles.iter().filter(|(_, read)| !read).map(|(weight, _)| *weight);
    match needed {
        Needed::Relative(least) => {
            let heaviest = tiles.iter().map(|tile| tile.0).fold(0.0, f64::max);
            left_out().fold(0.0, f64::max) / heaviest - 1.1 * f64::from(least)
        }
        Needed::Mass(mass) => {
            let all = 1.0 + tiles.iter().map(|tile| tile.0).sum::<f64>();
            left_out().sum::<f64>() / all - 1.1 * (1.0 - f64::from(mass))
        }
    }
}

/// What a page holds `[n, D]`, times spreads and plus means, times the matrix `back` `[D, D]`.
fn restored(x: &[f32], (mean, spread): (&[f16], &[f16]), back: &[f64]) -> Vec<f64> {
    let d = mean.len();
    let (mean, spread) = (widened(mean), widened(spread));
    let mut out = vec![0.0; x.len()];
    for (row, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
        for (c, x) in row.iter().enumerate() {
            let x = f64::from(*x) * spread[c] + mean[c];
            out.iter_mut().zip(&back[c * d..]).for_each(|(out, b)| *out += x * b);
        }
    }
    out
}

fn widened(x: &[f16]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

#[derive(Clone, Copy)]
enum Side {
    Keys,
    Values,
}

impl Segment {
    /// Rows `[n, C]` of the segment back in the model's channels, `[n, D]`.
    fn restore(&self, rows: &[f32], side: Side, d: usize) -> Vec<f64> {
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

/// Of each of `blocks` block keys `[blocks, D]`, the largest log-probability among them over the queries `[R, D]`.
pub(crate) fn log_probabilities(queries: &[f64], block_keys: &[f64], blocks: usize) -> Vec<f64> {
    let d = block_keys.len().checked_div(blocks).unwrap_or(1);
    let mut best = vec![f64::NEG_INFINITY; blocks];
    for query in queries.chunks_exact(d) {
        let scores: Vec<f64> =
            block_keys.chunks_exact(d).map(|key| query.iter().zip(key).map(|(q, k)| q * k).sum()).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
        best.iter_mut().zip(&scores).for_each(|(b, s)| *b = b.max(s - total));
    }
    best
}

/// The best blocks, ascending, as many as hold `tokens` tokens. `sizes` are the blocks' tokens.
pub(crate) fn most_probable(best: &[f64], sizes: &[usize], tokens: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..best.len()).collect();
    order.sort_by(|&a, &b| best[b].total_cmp(&best[a]).then(a.cmp(&b)));
    let enough = order.iter().scan(0, |held, &b| (*held < tokens).then(|| *held += sizes[b])).count();
    order.truncate(enough);
    order.sort_unstable();
    order
}
