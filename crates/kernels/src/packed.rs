//! What does the paper's two-dimensional compression look like in memory?
//!
//! The **packed** format: of each rotated key and value only its own largest elements are stored, contiguous f16
//! and a bitmap of their positions (stage 1), and each token block has a block key by which a step selects the
//! blocks that it attends to (stage 2). Nothing is evicted. Source: "MosaicKV: Serving Long-Context LLM with
//! Dynamic Two-D KV Cache Compression", 2026, arXiv 2607.00760, s. 4 (selection) and s. 5 (packed format,
//! PackedAttention).
//!
//! It refuses to know rotations: keys and values arrive rotated, their channels in order of falling variance,
//! and truncated; queries arrive rotated and scaled; the attention state stays in the rotated value space.
//!
//! A page is one allocation of 16-bit words:
//! ```text
//! block keys   elements [blocks, r]   bitmaps [blocks, B bytes]
//! each block   elements of K [block, r], of V [block, r]   bitmaps of K [block, B], of V [block, B]
//! load padding, so that a vector-wide read of a row's last elements stays inside
//! ```
//! `r` elements are kept of each vector, in groups of `g`; bit `i` of a bitmap says that channels
//! `g*i..g*i+g` are kept. What a step reads of a selected block is one run of memory.

mod attend;
mod bytes;
pub(crate) mod device;
mod encode;
mod score;
mod vectors;

#[cfg(test)]
mod tests;

pub use attend::{Selected, attend_page, attend_selected};
pub use score::{score_blocks, score_pages};

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Tokens that a page holds at most: what a step scores of a page, its block keys, is one run of some kilobytes.
pub const PAGE_TOKENS: usize = 512;

/// Token blocks that the format knows (s. 4).
pub const BLOCKS: [usize; 3] = [4, 8, 16];

/// Widest head that the format knows.
const MAX_HEAD_DIM: usize = 512;

/// Channels come in multiples of this, so that every instruction set's vectors divide them.
const CHANNEL_STEP: usize = 16;

/// Words behind the last row: a kernel reads whole vectors (16 f16 at most) from wherever a row's elements end.
const LOAD_PADDING: usize = 16;

/// Bytes of a page: its own struct, the counters in front of its words, the words, and what aligns them.
const fn bytes_of_words(words: usize) -> usize {
    size_of::<PackedPage>() + 2 * size_of::<usize>() + (2 * words).next_multiple_of(size_of::<usize>())
}

/// Shape of packed vectors: of a head's `D` channels the first `C` are stored (the rest are truncated), and each
/// vector keeps its `r` largest elements in groups of `g` neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackedShape {
    head_dim: u16,
    channels: u16,
    kept: u16,
    group: u8,
}

impl PackedShape {
    /// `D` up to 512; `C` a multiple of 16 of at most `D`; `r` a multiple of `group` of at most `C`, not 0;
    /// `group` 1, 2 or 4.
    pub fn new(
        head_dim: usize,
        channels: usize,
        kept: usize,
        group: usize,
    ) -> Result<PackedShape, PackedError> {
        let check = |what, got, fits: bool, wanted| {
            if fits { Ok(got as u16) } else { Err(PackedError::Shape { what, got, wanted }) }
        };
        let group_fits = matches!(group, 1 | 2 | 4);
        let channels_fit = channels > 0 && channels <= head_dim && channels.is_multiple_of(CHANNEL_STEP);
        let kept_fits = kept > 0 && kept <= channels && group_fits && kept.is_multiple_of(group);
        Ok(PackedShape {
            head_dim: check("head_dim", head_dim, (1..=MAX_HEAD_DIM).contains(&head_dim), "1..=512")?,
            group: check("group", group, group_fits, "1, 2 or 4")? as u8,
            channels: check("channels", channels, channels_fit, "a multiple of 16, at most head_dim")?,
            kept: check("kept", kept, kept_fits, "a multiple of group, at most channels")?,
        })
    }

    /// The paper's shape: a quarter of the channels is truncated (`C` rounded up to a multiple of 16), and `rate`
    /// of the elements are not stored (s. 4: 0.875, 0.75 or 0.625), `r` rounded down to a multiple of `group`.
    pub fn with_rate(head_dim: usize, rate: f32, group: usize) -> Result<PackedShape, PackedError> {
        let channels = (head_dim * 3).div_ceil(4).next_multiple_of(CHANNEL_STEP);
        let kept = (head_dim as f32 * (1.0 - rate)) as usize;
        PackedShape::new(head_dim, channels, kept - kept % group.max(1), group)
    }

    /// Channels of the uncompressed head, `D`.
    pub fn head_dim(self) -> usize {
        usize::from(self.head_dim)
    }

    /// Stored channels, `C`.
    pub fn channels(self) -> usize {
        usize::from(self.channels)
    }

    /// Elements kept of each vector, `r`.
    pub fn kept(self) -> usize {
        usize::from(self.kept)
    }

    /// Neighbouring channels that are kept or dropped together, `g`.
    pub fn group(self) -> usize {
        usize::from(self.group)
    }

    /// Bytes of a page of `tokens` tokens in blocks of `block`, all that it allocates: equal to
    /// [`PackedPage::bytes`] of the encoded page.
    pub fn bytes_of_page(self, block: usize, tokens: usize) -> usize {
        bytes_of_words(Layout { shape: self, block, tokens }.words() + LOAD_PADDING)
    }

    /// Bytes of one vector's bitmap; bits past the last group are 0.
    fn bitmap_bytes(self) -> usize {
        (self.channels() / self.group()).div_ceil(8)
    }

    /// Words of `n` vectors' elements and bitmaps.
    fn words_of(self, n: usize) -> usize {
        n * self.kept() + (n * self.bitmap_bytes()).div_ceil(2)
    }
}

/// Where the parts of a page lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    shape: PackedShape,
    block: usize,
    tokens: usize,
}

/// `n` packed vectors: where their elements and their bitmaps start.
#[derive(Clone, Copy, Debug)]
struct Rows {
    /// First word of the elements; row `i` is `r` words from `elements + i * r`.
    elements: usize,
    /// First byte of the bitmaps; row `i` is `bitmap_bytes` bytes from `bitmaps + i * bitmap_bytes`.
    bitmaps: usize,
    n: usize,
}

impl Layout {
    #[inline(always)]
    fn blocks(self) -> usize {
        // Blocks are powers of two, and a division is slow where a step walks over pages.
        self.tokens >> self.block.trailing_zeros()
    }

    fn block_keys(self) -> Rows {
        let n = self.blocks();
        Rows { elements: 0, bitmaps: 2 * n * self.shape.kept(), n }
    }

    fn words_of_block(self) -> usize {
        2 * self.shape.words_of(self.block)
    }

    /// Keys and values of block `b`.
    #[inline(always)]
    fn block(self, b: usize) -> (Rows, Rows) {
        let start = self.shape.words_of(self.blocks()) + b * self.words_of_block();
        let (n, elements) = (self.block, self.block * self.shape.kept());
        let bitmaps = 2 * (start + 2 * elements);
        let keys = Rows { elements: start, bitmaps, n };
        let values = Rows { elements: start + elements, bitmaps: bitmaps + n * self.shape.bitmap_bytes(), n };
        (keys, values)
    }

    /// Words of the whole page without the load padding.
    fn words(self) -> usize {
        self.shape.words_of(self.blocks()) + self.blocks() * self.words_of_block()
    }

    /// All packed vectors: block keys, then each block's keys and values.
    fn all_rows(self) -> impl Iterator<Item = Rows> {
        let blocks = (0..self.blocks()).flat_map(move |b| {
            let (keys, values) = self.block(b);
            [keys, values]
        });
        std::iter::once(self.block_keys()).chain(blocks)
    }
}

impl Rows {
    fn elements(self, i: usize, shape: PackedShape) -> Range<usize> {
        let start = self.elements + i * shape.kept();
        start..start + shape.kept()
    }

    fn bitmap(self, i: usize, shape: PackedShape) -> Range<usize> {
        let start = self.bitmaps + i * shape.bitmap_bytes();
        start..start + shape.bitmap_bytes()
    }
}

/// Up to [`PAGE_TOKENS`] tokens of one layer and KV head, packed: sealed, immutable, and shared by its clones. Every
/// bitmap has exactly `r / g` bits set and every element is finite; kernels rely on both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedPage {
    shape: PackedShape,
    block: u8,
    tokens: u16,
    /// As the head of the file says; elements are f16 bits, bitmaps lie in byte order.
    words: Arc<[u16]>,
}

impl PackedPage {
    /// Tokens, a multiple of [`Self::block`].
    pub fn tokens(&self) -> usize {
        usize::from(self.tokens)
    }

    /// Tokens of a token block: 4, 8 or 16.
    pub fn block(&self) -> usize {
        usize::from(self.block)
    }

    /// Token blocks.
    pub fn blocks(&self) -> usize {
        self.layout().blocks()
    }

    /// Shape of its vectors.
    pub fn shape(&self) -> PackedShape {
        self.shape
    }

    /// Whether one is a clone of the other.
    pub fn is_clone_of(&self, other: &PackedPage) -> bool {
        Arc::ptr_eq(&self.words, &other.words)
    }

    /// Bytes allocated: elements, bitmaps, block keys, load padding, this struct and the two counters of its clones.
    pub fn bytes(&self) -> usize {
        bytes_of_words(self.words.len())
    }

    /// Bytes of the page's block keys: what [`score_pages`] reads.
    pub fn bytes_of_block_keys(&self) -> usize {
        2 * self.shape.words_of(self.blocks())
    }

    /// Bytes of one token block's keys and values: what [`attend_selected`] reads for each selected block.
    pub fn bytes_of_block(&self) -> usize {
        2 * self.layout().words_of_block()
    }

    fn layout(&self) -> Layout {
        Layout { shape: self.shape, block: self.block(), tokens: self.tokens() }
    }
}

/// What is wrong with a shape or with the bytes of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PackedError {
    /// A parameter is out of its range.
    Shape {
        /// Which parameter.
        what: &'static str,
        /// What it was.
        got: usize,
        /// What it may be.
        wanted: &'static str,
    },
    /// The bytes do not start like a packed page of a version that this build reads.
    Format,
    /// More or fewer bytes than the header announces.
    Length {
        /// Bytes given.
        got: usize,
        /// Bytes that the header asks for.
        wanted: usize,
    },
    /// A bitmap does not have exactly `r / g` bits set, or has some past the last channel.
    Bitmap {
        /// Which vector, counted as the page stores them.
        vector: usize,
    },
    /// A stored element is infinite or not a number.
    NotFinite {
        /// Which vector, counted as the page stores them.
        vector: usize,
    },
    /// Unused bits are set: another writer's page.
    Padding,
}

impl fmt::Display for PackedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PackedError::Shape { what, got, wanted } => {
                write!(f, "packed format: {what} is {got}, must be {wanted}")
            }
            PackedError::Format => {
                write!(f, "not a packed page of a version that this build reads; compress the context again")
            }
            PackedError::Length { got, wanted } => {
                write!(f, "packed page of {got} bytes, its header asks for {wanted}; the file is damaged")
            }
            PackedError::Bitmap { vector } => {
                write!(f, "packed page: vector {vector} has a wrong bitmap; the file is damaged")
            }
            PackedError::NotFinite { vector } => {
                write!(f, "packed page: vector {vector} is not finite; the file is damaged")
            }
            PackedError::Padding => write!(f, "packed page: unused bits are set; the file is damaged"),
        }
    }
}

impl std::error::Error for PackedError {}
