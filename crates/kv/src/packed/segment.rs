//! A run of tokens with one strategy: its rotation and its packed pages.

use crate::exact::ARC_BYTES;
use crate::rotation::Rotation;
use mosaickv_kernels::exact::PAGE_TOKENS;
use mosaickv_kernels::packed::{PackedPage, PackedShape};
use mosaickv_kernels::rotate::multiply;
use std::sync::Arc;

/// What a segment's tokens are packed with (paper, s. 4), beside its rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Strategy {
    /// Stored channels, elements kept of each vector, and their groups.
    pub(crate) shape: PackedShape,
    /// Tokens of a token block.
    pub(crate) block: usize,
}

/// Packed pages with one strategy.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) strategy: Strategy,
    pub(crate) rotation: Arc<Rotation>,
    pub(crate) pages: Vec<Arc<PackedPage>>,
    /// `starts[i]` = token blocks before page `i`; one more entry than pages.
    pub(crate) starts: Vec<u32>,
}

impl Segment {
    /// Without tokens.
    pub(crate) fn new(strategy: Strategy, rotation: Arc<Rotation>) -> Segment {
        Segment { strategy, rotation, pages: Vec::new(), starts: vec![0] }
    }

    /// Token blocks.
    pub(crate) fn blocks(&self) -> usize {
        self.starts[self.pages.len()] as usize
    }

    pub(crate) fn tokens(&self) -> usize {
        self.blocks() * self.strategy.block
    }

    /// Rotates keys and values `[T, D]`, `T` a multiple of 16, and adds them as packed pages.
    pub(crate) fn pack(&mut self, keys: &[f32], values: &[f32], d: usize) {
        let page = PAGE_TOKENS * self.strategy.shape.channels();
        let keys = multiply(keys, &self.rotation.key_matrix(), d);
        let values = multiply(values, &self.rotation.value_matrix(d), d);
        self.pages.reserve_exact(keys.len().div_ceil(page));
        self.starts.reserve_exact(keys.len().div_ceil(page));
        for (keys, values) in keys.chunks(page).zip(values.chunks(page)) {
            let page = PackedPage::encode(self.strategy.shape, self.strategy.block, keys, values);
            self.starts.push((self.blocks() + page.blocks()) as u32);
            self.pages.push(Arc::new(page));
        }
    }

    /// Bytes of its pages.
    pub(crate) fn packed_bytes(&self) -> usize {
        self.pages.iter().map(|page| page.bytes()).sum()
    }

    /// Bytes of its header and lists. (The rotation may be another segment's too.)
    pub(crate) fn list_bytes(&self) -> usize {
        ARC_BYTES
            + size_of::<Segment>()
            + self.pages.capacity() * size_of::<Arc<PackedPage>>()
            + self.pages.len() * ARC_BYTES
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
