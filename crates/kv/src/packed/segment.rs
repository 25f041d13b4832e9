//! A run of tokens with one strategy: its rotation and its packed pages.

use super::Packed;
use super::strategy::{Chosen, Strategy, Sums, choose, relative};
use crate::exact::ARC_BYTES;
use crate::rotation::Rotation;
use mosaickv_kernels::packed::{PAGE_TOKENS, PackedPage};
use mosaickv_kernels::rotate::multiply;
use std::ops::Range;
use std::sync::Arc;

/// Packed pages with one strategy.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) strategy: Strategy,
    pub(crate) rotation: Arc<Rotation>,
    pub(crate) pages: Vec<PackedPage>,
    /// `starts[i]` = token blocks before page `i`; one more entry than pages.
    pub(crate) starts: Vec<u32>,
    /// Compression loss when the strategy was chosen.
    pub(crate) loss: f32,
    /// What losses are relative to, of a token: see [`Sums::scales`].
    scales: [f32; 2],
}

impl Segment {
    /// Keys and values `[T, D]`, packed with the strategy that suits them; `sums` are theirs.
    pub(crate) fn learn(settings: Packed, sums: &Sums, keys: &[f32], values: &[f32]) -> Segment {
        let Chosen { strategy, rotation, loss } = choose(settings, sums, keys, values);
        let (rotation, pages, starts) = (Arc::new(rotation), Vec::new(), vec![0]);
        let mut segment = Segment { strategy, rotation, pages, starts, loss, scales: sums.scales() };
        segment.pack(keys, values, sums.head_dim());
        segment
    }

    /// Without tokens, to be packed as `previous` is.
    pub(crate) fn after(previous: &Segment) -> Segment {
        Segment {
            strategy: previous.strategy,
            rotation: Arc::clone(&previous.rotation),
            pages: Vec::new(),
            starts: vec![0],
            loss: previous.loss,
            scales: previous.scales,
        }
    }

    /// Whether its tokens are packed as `other`'s are.
    pub(crate) fn is_like(&self, other: &Segment) -> bool {
        self.strategy == other.strategy && Arc::ptr_eq(&self.rotation, &other.rotation)
    }

    /// Token blocks.
    pub(crate) fn blocks(&self) -> usize {
        self.starts[self.pages.len()] as usize
    }

    pub(crate) fn tokens(&self) -> usize {
        self.blocks() * self.strategy.block
    }

    /// Rotates keys and values `[T, D]`, `T` a multiple of 16, and adds them as packed pages. Returns their loss.
    pub(crate) fn pack(&mut self, keys: &[f32], values: &[f32], d: usize) -> f32 {
        let energies = [keys, values].map(|x| x.iter().map(|x| x * x).sum::<f32>());
        let (mut stored, tokens) = ([0.0; 2], (keys.len() / d) as f32);
        let (key_matrix, value_matrix) = (self.rotation.key_matrix(), self.rotation.value_matrix(d));
        let pages = keys.len().div_ceil(PAGE_TOKENS * d);
        self.pages.reserve_exact(pages);
        self.starts.reserve_exact(pages);
        for (keys, values) in keys.chunks(PAGE_TOKENS * d).zip(values.chunks(PAGE_TOKENS * d)) {
            let (keys, values) = (multiply(keys, &key_matrix, d), multiply(values, &value_matrix, d));
            let page = PackedPage::encode(self.strategy.shape, self.strategy.block, &keys, &values);
            self.starts.push((self.blocks() + page.blocks()) as u32);
            stored.iter_mut().zip(page.energies()).for_each(|(stored, energy)| *stored += energy);
            self.pages.push(page);
        }
        let lost = |side: usize| relative(energies[side] - stored[side], self.scales[side] * tokens);
        (lost(0) + lost(1)) / 2.0
    }

    /// Its pages in runs of at least `tokens` tokens (the last may be shorter).
    pub(crate) fn runs(&self, tokens: usize) -> impl Iterator<Item = Range<usize>> {
        let (blocks, mut page) = ((tokens / self.strategy.block) as u32, 0);
        std::iter::from_fn(move || {
            let start = page;
            let enough = self.starts[start] + blocks;
            page = self.starts.partition_point(|&before| before < enough).min(self.pages.len());
            (start < page).then_some(start..page)
        })
    }

    /// Bytes of its pages.
    pub(crate) fn packed_bytes(&self) -> usize {
        self.pages.iter().map(|page| page.bytes()).sum()
    }

    /// Bytes of its header and lists. (The rotation may be another segment's too.)
    pub(crate) fn list_bytes(&self) -> usize {
        ARC_BYTES
            + size_of::<Segment>()
            + (self.pages.capacity() - self.pages.len()) * size_of::<PackedPage>()
            + self.starts.capacity() * size_of::<u32>()
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        let Strategy { shape, block } = self.strategy;
        if self.starts.len() != self.pages.len() + 1 {
            return Err(format!("{} starts for {} pages", self.starts.len(), self.pages.len()));
        }
        for (i, (page, starts)) in self.pages.iter().zip(self.starts.windows(2)).enumerate() {
            if page.shape() != shape || page.block() != block {
                return Err(format!("page {i} has another strategy than its segment"));
            }
            if (starts[1] - starts[0]) as usize != page.blocks() {
                return Err(format!("page {i}: {} blocks, {starts:?}", page.blocks()));
            }
        }
        Ok(())
    }
}
