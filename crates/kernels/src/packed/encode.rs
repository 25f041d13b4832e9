//! Which elements of a vector are kept, and where do they go?
//!
//! Stage 1 of the paper (arXiv 2607.00760, s. 4): each vector keeps its own largest elements by magnitude, or
//! its groups of highest energy. Encoding runs once a page, decoding only in tests and oracles.

use super::{BLOCKS, LOAD_PADDING, Layout, PAGE_TOKENS, PackedPage, PackedShape, Rows};
use half::f16;

impl PackedPage {
    /// Packs `keys` and `values`, both `[T, C]`: rotated, truncated, `T` a multiple of `block` of at most 64.
    /// Elements beyond the range of f16 saturate. Of equal magnitudes the lower channel is kept.
    ///
    /// # Panics
    /// If a length or `block` does not fit, or an element is not a number.
    pub fn encode(shape: PackedShape, block: usize, keys: &[f32], values: &[f32]) -> PackedPage {
        let c = shape.channels();
        let tokens = keys.len() / c;
        assert!(BLOCKS.contains(&block), "token block of {block}, must be 4, 8 or 16");
        assert!(
            (1..=PAGE_TOKENS).contains(&tokens) && tokens.is_multiple_of(block),
            "{tokens} tokens are not blocks of {block}, at most {PAGE_TOKENS} tokens"
        );
        assert_eq!((keys.len(), values.len()), (tokens * c, tokens * c), "keys and values of [T, {c}]");
        let layout = Layout { shape, block, tokens };
        let mut packer = Packer::new(layout);
        let mut mean = vec![0.0; c];
        for (b, (k, v)) in keys.chunks_exact(block * c).zip(values.chunks_exact(block * c)).enumerate() {
            let (key_rows, value_rows) = layout.block(b);
            for (i, (k, v)) in k.chunks_exact(c).zip(v.chunks_exact(c)).enumerate() {
                packer.pack(key_rows, i, k);
                packer.pack(value_rows, i, v);
            }
            mean_of_rows(k, &mut mean);
            packer.pack(layout.block_keys(), b, &mean);
        }
        PackedPage { shape, block: block as u8, tokens: tokens as u8, words: packer.words }
    }

    /// The keys, `[T, C]`: f16 values as f32, 0 where an element was dropped. For tests and oracles.
    pub fn decode_keys(&self) -> Vec<f32> {
        self.decode((0..self.blocks()).map(|b| self.layout().block(b).0))
    }

    /// The values, `[T, C]`, likewise.
    pub fn decode_values(&self) -> Vec<f32> {
        self.decode((0..self.blocks()).map(|b| self.layout().block(b).1))
    }

    /// The block keys, `[blocks, C]`, likewise.
    pub fn decode_block_keys(&self) -> Vec<f32> {
        self.decode(std::iter::once(self.layout().block_keys()))
    }

    fn decode(&self, parts: impl Iterator<Item = Rows>) -> Vec<f32> {
        let (shape, mut out) = (self.shape, Vec::new());
        let bytes = bytemuck::cast_slice::<u16, u8>(&self.words);
        for rows in parts {
            for i in 0..rows.n {
                let bitmap = &bytes[rows.bitmap(i, shape)];
                let mut elements = self.words[rows.elements(i, shape)].iter();
                out.extend((0..shape.channels()).map(|c| {
                    let bit = c / shape.group();
                    if bitmap[bit / 8] >> (bit % 8) & 1 == 0 {
                        return 0.0;
                    }
                    elements.next().map_or(0.0, |&x| f16::from_bits(x).to_f32())
                }));
            }
        }
        out
    }
}

/// `mean[c]` over the rows of `rows` `[n, C]`.
fn mean_of_rows(rows: &[f32], mean: &mut [f32]) {
    let scale = mean.len() as f32 / rows.len() as f32;
    mean.fill(0.0);
    for row in rows.chunks_exact(mean.len()) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x * scale);
    }
}

/// A page under construction.
struct Packer {
    shape: PackedShape,
    words: Box<[u16]>,
    /// Scratch: each group's energy and index, in an order where a smaller number is a larger group.
    ranks: Vec<u64>,
    chosen: Vec<bool>,
}

impl Packer {
    fn new(layout: Layout) -> Packer {
        let words = vec![0; layout.words() + LOAD_PADDING].into_boxed_slice();
        let groups = layout.shape.channels() / layout.shape.group();
        Packer { shape: layout.shape, words, ranks: Vec::with_capacity(groups), chosen: vec![false; groups] }
    }

    /// Packs `vector` `[C]` as row `i` of `rows`.
    fn pack(&mut self, rows: Rows, i: usize, vector: &[f32]) {
        self.choose(vector);
        let g = self.shape.group();
        let mut next = rows.elements(i, self.shape).start;
        let bitmap = rows.bitmap(i, self.shape).start;
        for (at, group) in vector.chunks_exact(g).enumerate() {
            if !self.chosen[at] {
                continue;
            }
            bytemuck::cast_slice_mut::<u16, u8>(&mut self.words)[bitmap + at / 8] |= 1 << (at % 8);
            for &x in group {
                self.words[next] = f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32())).to_bits();
                next += 1;
            }
        }
    }

    /// Marks the `r / g` groups of highest energy in `chosen`.
    fn choose(&mut self, vector: &[f32]) {
        let g = self.shape.group();
        self.ranks.clear();
        self.ranks.extend(vector.chunks_exact(g).enumerate().map(|(at, group)| {
            // One element is ranked by its magnitude: its square would lose small ones to underflow.
            let energy = if g == 1 { group[0].abs() } else { group.iter().map(|x| x * x).sum() };
            assert!(!energy.is_nan(), "channel {} of a vector to pack is not a number", at * g);
            u64::from(!energy.to_bits()) << 32 | at as u64
        }));
        let last = *self.ranks.select_nth_unstable(self.shape.kept() / g - 1).1;
        self.chosen.fill(false);
        for &rank in self.ranks.iter().filter(|&&rank| rank <= last) {
            self.chosen[rank as u32 as usize] = true;
        }
    }
}
