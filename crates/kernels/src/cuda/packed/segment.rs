//! A segment's pages in the device's memory.

use crate::cuda::device::{Buffer, Error, Gpu};
use crate::cuda::parameters::{PackedSegment, PackedStrategy};
use crate::packed::device::DevicePage;
use crate::packed::{PAGE_TOKENS, PackedPage, PackedShape};
use half::f16;
use std::sync::Arc;

/// The rotation of a segment.
#[derive(Debug)]
pub struct Rotation {
    pub(super) keys: Buffer,
    pub(super) outputs: Buffer,
    head_dim: usize,
}

impl Rotation {
    /// `keys` `[D, C]` turns keys and queries, `outputs` `[C, D]` turns outputs back, for heads of 64 or 128 channels with the paper's three
    /// quarters of them stored.
    pub fn new(gpu: &Gpu, keys: &[f16], outputs: &[f16], head_dim: usize) -> Result<Rotation, Error> {
        let c = super::channels(head_dim);
        assert_eq!(
            (keys.len(), outputs.len()),
            (head_dim * c, head_dim * c),
            "not [{head_dim}, {c}] and back"
        );
        Ok(Rotation { keys: gpu.upload(keys)?, outputs: gpu.upload(outputs)?, head_dim })
    }

    /// Bytes in the device's memory.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.outputs.bytes()
    }
}

/// Tokens of one KV head of one sequence that are packed alike.
#[derive(Debug)]
pub struct Segment {
    pub(super) gpu: Gpu,
    pub(super) rotation: Arc<Rotation>,
    shape: PackedShape,
    layout: DevicePage,
    block: usize,
    memory: Vec<Buffer>,
    /// Of each page, which memory it is in, and where.
    places: Vec<(usize, usize)>,
    blocks: usize,
}

impl Segment {
    /// Without tokens, to be packed in `shape` and blocks of `block`. Heads have 64 or 128 channels, three quarters of which are stored.
    pub fn new(gpu: &Gpu, rotation: &Arc<Rotation>, shape: PackedShape, block: usize) -> Segment {
        let d = shape.head_dim();
        assert!(matches!(d, 64 | 128) && shape.channels() == super::channels(d), "{shape:?} on a GPU");
        assert_eq!(rotation.head_dim, d, "a rotation of another width");
        Segment {
            gpu: gpu.clone(),
            rotation: Arc::clone(rotation),
            shape,
            layout: DevicePage::new(shape, block),
            block,
            memory: vec![],
            places: vec![],
            blocks: 0,
        }
    }

    /// Tokens of a token block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Token blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.blocks * self.block
    }

    /// Channels of the uncompressed head, `D`.
    pub fn head_dim(&self) -> usize {
        self.shape.head_dim()
    }

    /// Bytes of its pages in the device's memory.
    pub fn bytes(&self) -> usize {
        self.memory.iter().map(Buffer::bytes).sum()
    }

    /// Bytes that scores read of it, and those that attention reads of each block.
    pub fn bytes_read(&self) -> (usize, usize) {
        (self.blocks * self.layout.bytes_of_vector(), self.layout.bytes_of_block())
    }

    pub(super) fn layout(&self) -> DevicePage {
        self.layout
    }

    pub(super) fn strategy(&self) -> PackedStrategy {
        PackedStrategy {
            kept: self.shape.kept() as u16,
            group_bits: self.shape.group().trailing_zeros() as u8,
            block_bits: self.block.trailing_zeros() as u8,
        }
    }

    pub(super) fn parameters(&self, first_page: u32, first_block: u32) -> PackedSegment {
        PackedSegment {
            query_rotation: self.rotation.keys.address(),
            output_rotation: self.rotation.outputs.address(),
            first_page,
            first_block,
            blocks: self.blocks as u32,
            strategy: self.strategy(),
        }
    }

    /// Addresses of its pages, those without tokens too.
    pub(super) fn pages(&self) -> impl Iterator<Item = u64> {
        self.places.iter().map(|&(memory, at)| self.memory[memory].address() + at as u64)
    }

    /// Bytes from a page to the next one.
    fn stride(&self) -> usize {
        self.layout.bytes().next_multiple_of(128)
    }

    /// Makes room for `blocks` more, in one piece of memory.
    pub(super) fn reserve(&mut self, blocks: usize) -> Result<(), Error> {
        let missing = (self.blocks + blocks).div_ceil(self.layout.blocks()).saturating_sub(self.places.len());
        if missing > 0 {
            let stride = self.stride();
            self.memory.push(self.gpu.alloc(missing * stride)?);
            self.places.extend((0..missing).map(|i| (self.memory.len() - 1, i * stride)));
        }
        Ok(())
    }

    /// It has so many more blocks, for which there is room.
    pub(super) fn add(&mut self, blocks: usize) {
        self.blocks += blocks;
        assert!(
            self.blocks <= self.places.len() * self.layout.blocks(),
            "more blocks than there is room for"
        );
    }

    /// Adds pages as the CPU encodes them.
    pub fn append(&mut self, pages: &[PackedPage]) -> Result<(), Error> {
        self.reserve(pages.iter().map(PackedPage::blocks).sum())?;
        let of_page = self.layout.blocks();
        for page in pages {
            let mut from = 0;
            while from < page.blocks() {
                let first = self.blocks % of_page;
                let count = (page.blocks() - from).min(of_page - first);
                let (memory, start) = self.places[self.blocks / of_page];
                for (at, bytes) in self.layout.place(page, from..from + count, first) {
                    self.memory[memory].write(start + at, &bytes)?;
                }
                from += count;
                self.add(count);
            }
        }
        Ok(())
    }

    /// Of pages as the CPU encodes them, at least one: the full ones that come first `times` times, each time with memory of their own (once, but
    /// for measurements), then the others.
    pub fn repeated(
        gpu: &Gpu,
        rotation: &Arc<Rotation>,
        (pages, times): (&[PackedPage], usize),
    ) -> Result<Segment, Error> {
        let mut out = Segment::new(gpu, rotation, pages[0].shape(), pages[0].block());
        let full = pages.iter().take_while(|page| page.tokens() == PAGE_TOKENS).count();
        let (blocks, bytes) = (full * out.layout.blocks(), full * out.stride());
        out.reserve(blocks * times)?;
        out.append(&pages[..full])?;
        for i in 1..if full > 0 { times } else { 0 } {
            out.memory[0].copy_from(i * bytes, (&out.memory[0], 0), bytes)?;
            out.add(blocks);
        }
        out.append(&pages[full..])?;
        Ok(out)
    }

    /// The same pages in memory of their own.
    pub fn copied(&self, rotation: &Arc<Rotation>) -> Result<Segment, Error> {
        let mut memory = vec![];
        for from in &self.memory {
            let to = self.gpu.alloc(from.bytes())?;
            to.copy_from(0, (from, 0), from.bytes())?;
            memory.push(to);
        }
        let new = Segment::new(&self.gpu, rotation, self.shape, self.block);
        Ok(Segment { memory, places: self.places.clone(), blocks: self.blocks, ..new })
    }

    /// The bytes that its blocks take, for comparisons: of each page elements and bitmaps of block keys, and the blocks.
    pub(crate) fn read(&self) -> Result<Vec<[Vec<u8>; 3]>, Error> {
        let all: Result<Vec<Vec<u8>>, Error> =
            self.memory.iter().map(|memory| memory.read(memory.bytes())).collect();
        let (all, layout) = (all?, self.layout);
        let of_page = |(i, &(memory, start)): (usize, &(usize, usize))| {
            let held = self.blocks.saturating_sub(i * layout.blocks()).min(layout.blocks());
            let run = |at: usize, bytes: usize| all[memory][start + at..][..held * bytes].to_vec();
            let elements = 2 * self.shape.kept();
            let bitmaps = layout.bytes_of_vector() - elements;
            [
                run(0, elements),
                run(layout.blocks() * elements, bitmaps),
                run(layout.bytes_of_keys(), layout.bytes_of_block()),
            ]
        };
        Ok(self.places.iter().enumerate().map(of_page).collect())
    }
}
