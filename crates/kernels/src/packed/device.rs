//! How do pages lie in a GPU's memory?
//!
//! As full pages do here, with each block's bytes filled up to whole 16 (but for small heads and odd shares they are that anyway): the bytes of a
//! page of [`PAGE_TOKENS`] tokens are copied as they are. What comes in smaller pages goes to its place in one.

use super::{BLOCKS, Layout, PAGE_TOKENS, PackedPage, PackedShape};
use std::ops::Range;

/// A page with room for [`PAGE_TOKENS`] tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DevicePage {
    full: Layout,
}

impl DevicePage {
    /// Of blocks of `block` tokens.
    pub fn new(shape: PackedShape, block: usize) -> DevicePage {
        assert!(BLOCKS.contains(&block), "token block of {block}, must be 4, 8 or 16");
        DevicePage { full: Layout { shape, block, tokens: PAGE_TOKENS } }
    }

    /// Blocks that there is room for.
    pub fn blocks(self) -> usize {
        self.full.blocks()
    }

    /// Bytes of a vector's elements and its bitmap.
    pub fn bytes_of_vector(self) -> usize {
        2 * self.full.shape.kept() + self.full.shape.bitmap_bytes()
    }

    /// Bytes of a block's keys and values.
    pub fn bytes_of_block(self) -> usize {
        (2 * self.full.words_of_block()).next_multiple_of(16)
    }

    /// Bytes of all block keys.
    pub fn bytes_of_keys(self) -> usize {
        2 * self.full.shape.words_of(self.blocks())
    }

    /// All bytes.
    pub fn bytes(self) -> usize {
        self.bytes_of_keys() + self.blocks() * self.bytes_of_block()
    }

    /// What blocks `of` of a page are here, from block `first` on: runs of bytes, and where each begins.
    pub fn place(self, page: &PackedPage, of: Range<usize>, first: usize) -> [(usize, Vec<u8>); 3] {
        let (shape, layout) = (self.full.shape, page.layout());
        assert!((page.shape, page.block()) == (shape, self.full.block), "a page of another strategy");
        assert!(of.end <= page.blocks() && first + of.len() <= self.blocks(), "blocks {of:?} to {first}");
        let bytes = bytemuck::cast_slice::<u16, u8>(&page.words);
        let (from, to) = (layout.block_keys(), self.full.block_keys());
        let run = |at: usize, of_row: usize| bytes[at + of.start * of_row..at + of.end * of_row].to_vec();
        let (elements, bitmaps) = (2 * shape.kept(), shape.bitmap_bytes());
        let mut blocks = Vec::with_capacity(of.len() * self.bytes_of_block());
        for block in of.clone() {
            blocks.extend_from_slice(&bytes[2 * layout.block(block).0.elements..][..page.bytes_of_block()]);
            blocks.resize(blocks.len().next_multiple_of(self.bytes_of_block()), 0);
        }
        [
            (first * elements, run(0, elements)),
            (to.bitmaps + first * bitmaps, run(from.bitmaps, bitmaps)),
            (self.bytes_of_keys() + first * self.bytes_of_block(), blocks),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(shape: PackedShape, block: usize, tokens: usize) -> PackedPage {
        let numbers = |k: usize| -> Vec<f32> {
            (0..tokens * shape.channels()).map(|i| ((i * k + 7) % 1009) as f32 - 500.0).collect()
        };
        PackedPage::encode(shape, block, &numbers(389), &numbers(571))
    }

    fn image(page: &PackedPage) -> Vec<u8> {
        let device = DevicePage::new(page.shape(), page.block());
        let mut image = vec![0; device.bytes()];
        for (at, bytes) in device.place(page, 0..page.blocks(), 0) {
            image[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        image
    }

    #[test]
    fn full_pages_are_the_same_bytes() {
        for (shape, block) in
            [(PackedShape::with_rate(128, 0.75, 1), 8), (PackedShape::with_rate(64, 0.75, 2), 16)]
        {
            let page = page(shape.unwrap(), block, PAGE_TOKENS);
            let image = image(&page);
            assert_eq!(image, bytemuck::cast_slice::<u16, u8>(&page.words)[..image.len()]);
        }
    }

    #[test]
    fn small_pages_and_blocks_of_odd_sizes_have_their_places() {
        for (d, rate, group, block) in
            [(64, 0.875, 4, 4), (128, 0.75, 2, 4), (64, 0.625, 1, 8), (128, 0.875, 4, 16)]
        {
            let shape = PackedShape::with_rate(d, rate, group).unwrap();
            let (page, device) = (page(shape, block, 64), DevicePage::new(shape, block));
            let [keys, bitmaps, blocks] = device.place(&page, 1..3, 5);
            assert_eq!(keys.0, 5 * 2 * shape.kept());
            assert_eq!(bitmaps.0, device.blocks() * 2 * shape.kept() + 5 * shape.bitmap_bytes());
            assert_eq!(blocks.0, device.bytes_of_keys() + 5 * device.bytes_of_block());
            let words: &[u8] = bytemuck::cast_slice(&page.words);
            for (i, b) in (1..3).enumerate() {
                let (row, map) = (2 * shape.kept(), shape.bitmap_bytes());
                let of_block =
                    &words[page.bytes_of_block_keys() + b * page.bytes_of_block()..][..page.bytes_of_block()];
                assert_eq!(keys.1[i * row..][..row], words[b * row..][..row]);
                assert_eq!(bitmaps.1[i * map..][..map], words[page.blocks() * row + b * map..][..map]);
                assert_eq!(blocks.1[i * device.bytes_of_block()..][..page.bytes_of_block()], *of_block);
            }
            assert!(blocks.1.len() == 2 * device.bytes_of_block() && device.bytes_of_block() % 16 == 0);
        }
    }
}
