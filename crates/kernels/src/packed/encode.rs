//! Which elements of a vector are kept, and where do they go?
//!
//! Stage 1 of the paper (arXiv 2607.00760, s. 4): each vector keeps its own largest elements by magnitude, or
//! its groups of highest energy. Encoding runs once a page, decoding only in tests and oracles.

use super::vectors::{bits_of_chunk, lanes};
use super::{BLOCKS, LOAD_PADDING, Layout, PAGE_TOKENS, PackedPage, PackedShape, Rows};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

/// Lanes of the widest instruction set.
const MOST_LANES: usize = 16;

impl PackedPage {
    /// Packs `keys` and `values`, both `[T, C]`: rotated, truncated, `T` a multiple of `block` of at most
    /// [`PAGE_TOKENS`].
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
        PackedPage { shape, block: block as u8, tokens: tokens as u16, words: packer.words.into() }
    }

    /// Sums of squares of the stored elements: of the keys, of the values.
    pub fn energies(&self) -> [f32; 2] {
        let (shape, layout) = (self.shape, self.layout());
        let mut widened = vec![0.0; self.block() * shape.kept()];
        let mut energy = |rows: Rows| {
            let elements = &self.words[rows.elements..][..rows.n * shape.kept()];
            elements.reinterpret_cast::<f16>().convert_to_f32_slice(&mut widened);
            widened.iter().map(|x| x * x).sum::<f32>()
        };
        let mut sums = [0.0; 2];
        for b in 0..self.blocks() {
            let (keys, values) = layout.block(b);
            sums[0] += energy(keys);
            sums[1] += energy(values);
        }
        sums
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
    isa: Isa,
    shape: PackedShape,
    words: Vec<u16>,
    scratch: Scratch,
}

/// One vector on its way: `[C]` elements and room for a vector of the widest instruction set behind them, `[C / g]`
/// groups, rounded up to whole bytes of a bitmap.
struct Scratch {
    kept: Vec<f16>,
    energy: Vec<u32>,
    chosen: Vec<u8>,
}

impl Packer {
    fn new(layout: Layout) -> Packer {
        let words = vec![0; layout.words() + LOAD_PADDING];
        let (c, groups) = (layout.shape.channels(), layout.shape.channels() / layout.shape.group());
        let scratch = Scratch {
            kept: vec![f16::ZERO; c + MOST_LANES],
            energy: vec![0; groups],
            chosen: vec![0; groups.next_multiple_of(8)],
        };
        Packer { isa: Isa::current(), shape: layout.shape, words, scratch }
    }

    /// Packs `vector` `[C]` as row `i` of `rows`.
    fn pack(&mut self, rows: Rows, i: usize, vector: &[f32]) {
        let (shape, scratch) = (self.shape, &mut self.scratch);
        let bitmap = &mut bytemuck::cast_slice_mut::<u16, u8>(&mut self.words)[rows.bitmap(i, shape)];
        let next = dispatch(self.isa, Pack { shape, vector, bitmap, scratch });
        assert_eq!(next, shape.kept(), "elements chosen of {shape:?}");
        let kept = self.scratch.kept[..next].reinterpret_cast();
        self.words[rows.elements(i, shape)].copy_from_slice(kept);
    }
}

/// Marks the `r / g` groups of highest energy in the bitmap and gathers their elements in `scratch.kept`; returns how many
/// elements.
struct Pack<'a> {
    shape: PackedShape,
    /// `[C]`
    vector: &'a [f32],
    bitmap: &'a mut [u8],
    scratch: &'a mut Scratch,
}

/// Plain loops over slices where the groups are chosen: inside [`dispatch`] the compiler turns them into vectors of the
/// instruction set.
impl Kernel for Pack<'_> {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        let Scratch { energy, chosen, kept } = self.scratch;
        match self.shape.group() {
            // One element is ranked by its magnitude: its square would lose small ones to underflow.
            1 => {
                for (e, x) in energy.iter_mut().zip(self.vector) {
                    *e = x.to_bits() & 0x7fff_ffff;
                }
            }
            2 => energies::<2>(self.vector, energy),
            _ => energies::<4>(self.vector, energy),
        }
        let mut top = 0;
        for &e in energy.iter() {
            top = top.max(e);
        }
        assert!(top <= f32::INFINITY.to_bits(), "a vector to pack has elements that are not a number");
        let wanted = (self.shape.kept() / self.shape.group()) as u32;
        let last = nth_largest(energy, wanted);
        if count(energy, |e| e >= last) == wanted {
            for (c, &e) in chosen.iter_mut().zip(energy.iter()) {
                *c = u8::from(e >= last);
            }
        } else {
            // All above the last energy, and as many equal to it, from the front, as are still wanted.
            let mut equal = wanted - count(energy, |e| e > last);
            for (c, &e) in chosen.iter_mut().zip(energy.iter()) {
                let tie = e == last && equal > 0;
                equal -= u32::from(tie);
                *c = u8::from(e > last || tie);
            }
        }
        for (byte, chosen) in self.bitmap.iter_mut().zip(chosen.as_chunks().0) {
            // Moves bit 0 of byte `i` to bit `i` of the highest byte.
            *byte = (u64::from_le_bytes(*chosen).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
        }
        match self.shape.group() {
            1 => gather::<S, 1>(s, self.vector, self.bitmap, kept),
            2 => gather::<S, 2>(s, self.vector, self.bitmap, kept),
            _ => gather::<S, 4>(s, self.vector, self.bitmap, kept),
        }
    }
}

/// Writes the elements of `vector` `[C]` that the bitmap marks to the front of `kept`, saturated and rounded to f16;
/// returns how many there are.
#[inline(always)]
fn gather<S: Simd, const G: usize>(s: S, vector: &[f32], bitmap: &[u8], kept: &mut [f16]) -> usize {
    assert!(kept.len() >= vector.len() + S::LANES && bitmap.len() * 8 * G >= vector.len());
    let (most, mut next) = (s.splat(f16::MAX.to_f32_const()), 0);
    let least = s.sub(s.splat(0.0), most);
    for (chunk, x) in vector.chunks_exact(S::LANES).enumerate() {
        // SAFETY: a chunk has LANES elements, the bitmap a bit for each group of `vector`, and `kept` room for all of them
        // and LANES more.
        next += unsafe {
            let bits = bits_of_chunk::<S, G>(bitmap.as_ptr(), chunk);
            let x = s.max(s.min(s.load(x.as_ptr()), most), least);
            s.compress_f16(kept.as_mut_ptr().add(next), x, lanes::<G>(bits));
            G * bits.count_ones() as usize
        };
    }
    next
}

/// Bits of the groups' sums of squares: for numbers that are not negative they order like the numbers.
#[inline(always)]
fn energies<const G: usize>(vector: &[f32], energy: &mut [u32]) {
    for (e, x) in energy.iter_mut().zip(vector.as_chunks::<G>().0) {
        let mut sum = 0.0;
        for x in x {
            sum += x * x;
        }
        *e = sum.to_bits();
    }
}

/// A number that `n` of `x`, all below 2^31, reach and fewer exceed: its bits from the highest down, each set if
/// at least `n` reach what that makes. Some fifteen counts without a branch, faster here than a selection.
#[inline(always)]
fn nth_largest(x: &[u32], n: u32) -> u32 {
    let mut found = 0;
    for bit in (0..31).rev() {
        let candidate = found | 1 << bit;
        let reach = count(x, |x| x >= candidate);
        if reach == n {
            return candidate;
        }
        if reach > n {
            found = candidate;
        }
    }
    found
}

#[inline(always)]
fn count(x: &[u32], which: impl Fn(u32) -> bool) -> u32 {
    let mut n = 0;
    for &x in x {
        n += u32::from(which(x));
    }
    n
}
