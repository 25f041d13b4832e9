//! Weights that stay the floats that they are: norms, small models, and embeddings of careful quantizers.
//!
//! Row-major in their own type, each row filled up with zeros to a multiple of 16, so that no kernel has a tail.

use super::MatrixError;
use super::blocks::BlockType;
use super::output::Output;
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use half::{bf16, f16};
use std::ops::Range;

/// Independent sums of a dot product, to hide the latency of an FMA.
const CHAINS: usize = 4;
/// Rows are filled up to a multiple of this.
const PAD: usize = 16;

/// Plain weights `[rows, cols]`.
pub(super) struct Plain {
    pub rows: usize,
    pub cols: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    pub values: Values,
}

pub(super) enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Plain {
    /// Copies a file's floats, whose number the caller has checked.
    pub fn from_bytes(ty: BlockType, rows: usize, cols: usize, bytes: &[u8]) -> Result<Plain, MatrixError> {
        let stride = cols.next_multiple_of(PAD);
        let values = match ty {
            BlockType::F32 => Values::F32(copy(bytes, cols, stride, f32::from_le_bytes)),
            BlockType::F16 => Values::F16(copy(bytes, cols, stride, f16::from_le_bytes)),
            BlockType::Bf16 => Values::Bf16(copy(bytes, cols, stride, bf16::from_le_bytes)),
            _ => unreachable!("{ty:?} is quantized"),
        };
        let bad = match &values {
            Values::F32(v) => v.iter().position(|x| !x.is_finite()),
            Values::F16(v) => v.iter().position(|x| !x.is_finite()),
            Values::Bf16(v) => v.iter().position(|x| !x.is_finite()),
        };
        match bad {
            Some(i) => Err(MatrixError::NotFinite { row: i / stride }),
            None => Ok(Plain { rows, cols, stride, values }),
        }
    }

    pub fn block_type(&self) -> BlockType {
        match self.values {
            Values::F32(_) => BlockType::F32,
            Values::F16(_) => BlockType::F16,
            Values::Bf16(_) => BlockType::Bf16,
        }
    }

    pub fn allocated(&self) -> usize {
        match &self.values {
            Values::F32(v) => 4 * v.capacity(),
            Values::F16(v) => 2 * v.capacity(),
            Values::Bf16(v) => 2 * v.capacity(),
        }
    }

    /// Row `r` as f32, exactly.
    pub fn row(&self, r: usize, out: &mut [f32]) {
        let range = r * self.stride..r * self.stride + self.cols;
        match &self.values {
            Values::F32(v) => out.copy_from_slice(&v[range]),
            Values::F16(v) => out.iter_mut().zip(&v[range]).for_each(|(x, y)| *x = y.to_f32()),
            Values::Bf16(v) => out.iter_mut().zip(&v[range]).for_each(|(x, y)| *x = y.to_f32()),
        }
    }
}

fn copy<T: bytemuck::Zeroable + Copy, const B: usize>(
    bytes: &[u8],
    cols: usize,
    stride: usize,
    read: impl Fn([u8; B]) -> T,
) -> Vec<T> {
    let mut values = vec![T::zeroed(); bytes.len() / B / cols * stride];
    for (to, from) in values.chunks_exact_mut(stride).zip(bytes.chunks_exact(cols * B)) {
        let (from, _) = from.as_chunks::<B>();
        to.iter_mut().zip(from).for_each(|(x, &bytes)| *x = read(bytes));
    }
    values
}

/// Activations `[T, cols]` with each token filled up to `[T, stride]` with zeros.
pub(super) fn pad(x: &[f32], cols: usize) -> Vec<f32> {
    copy(bytemuck::cast_slice(x), cols, cols.next_multiple_of(PAD), f32::from_ne_bytes)
}

/// An element type that a vector of f32 loads from.
trait Element: Copy {
    /// # Safety
    /// `p` is valid for reading `LANES` elements.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const f16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(p) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const bf16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(p) }
    }
}

/// Multiplies `rows` with all tokens: `x` is `[T, stride]`, from [`pad`].
///
/// # Safety
/// No other thread touches these rows of `out` meanwhile.
pub(super) unsafe fn multiply(isa: Isa, w: &Plain, rows: Range<usize>, x: &[f32], out: &Output) {
    let stride = w.stride;
    match &w.values {
        Values::F32(v) => dispatch(isa, Multiply { w: v, rows, stride, x, out }),
        Values::F16(v) => dispatch(isa, Multiply { w: v, rows, stride, x, out }),
        Values::Bf16(v) => dispatch(isa, Multiply { w: v, rows, stride, x, out }),
    }
}

struct Multiply<'a, E> {
    w: &'a [E],
    rows: Range<usize>,
    stride: usize,
    x: &'a [f32],
    out: &'a Output,
}

impl<E: Element> Kernel for Multiply<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in self.rows {
            let w = &self.w[r * self.stride..][..self.stride];
            for (t, x) in self.x.chunks_exact(self.stride).enumerate() {
                // SAFETY: the promise that `multiply` was given.
                unsafe { self.out.write(t, r, [[dot(s, w, x)]]) };
            }
        }
    }
}

/// One row at a time: with four at once the short streams escape the hardware's prefetch (7 GB/s, not 22).
#[inline(always)]
fn dot<S: Simd, E: Element>(s: S, w: &[E], x: &[f32]) -> f32 {
    assert!(x.len().is_multiple_of(S::LANES) && w.len() == x.len());
    let mut sums = [s.splat(0.0); CHAINS];
    let whole = x.len() / (CHAINS * S::LANES) * CHAINS * S::LANES;
    for i in (0..whole).step_by(CHAINS * S::LANES) {
        for (chain, sum) in sums.iter_mut().enumerate() {
            let i = i + chain * S::LANES;
            // SAFETY: whole vectors of both slices.
            *sum = unsafe { s.fma(E::load(s, w.as_ptr().add(i)), s.load(x.as_ptr().add(i)), *sum) };
        }
    }
    for i in (whole..x.len()).step_by(S::LANES) {
        // SAFETY: whole vectors of both slices.
        sums[0] = unsafe { s.fma(E::load(s, w.as_ptr().add(i)), s.load(x.as_ptr().add(i)), sums[0]) };
    }
    s.sum_lanes(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}
