//! Products of activations and weights, both bf16, sums in f32: cuBLASLt's on a GPU, a plain loop where kernels are emulated.

use super::device::{Buffer, Error, Gpu};
use half::bf16;

/// Where a product goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Into {
    /// `out = x W^T` in f32.
    F32,
    /// `out += x W^T` in f32.
    AddF32,
    /// `out = x W^T`, rounded to bf16.
    Bf16,
}

/// What is multiplied: `out[T, rows] = x[T, cols] W[rows, cols]^T`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product {
    /// Address of `W`, bf16.
    pub weights: u64,
    /// Address of `x`, bf16.
    pub x: u64,
    /// Address of `out`.
    pub out: u64,
    /// `T`, `rows`, `cols`
    pub size: (usize, usize, usize),
    /// What `out` is.
    pub into: Into,
}

/// A matrix of bf16 weights on the device, `[rows, cols]`.
#[derive(Debug)]
pub struct Weights {
    gpu: Gpu,
    data: Buffer,
    rows: usize,
    cols: usize,
}

/// Bytes that are converted and sent at a time.
const CHUNK: usize = 16 << 20;

impl Weights {
    /// Out of f32: `fill(row, out)` writes a row. `cols` is a multiple of 8.
    pub fn new(
        gpu: &Gpu,
        (rows, cols): (usize, usize),
        mut fill: impl FnMut(usize, &mut [f32]),
    ) -> Result<Weights, Error> {
        let weights = Weights::uninitialized(gpu, (rows, cols))?;
        let at_once = (CHUNK / (2 * cols)).clamp(1, rows);
        let (mut row, mut chunk) = (vec![0f32; cols], Vec::with_capacity(at_once * cols));
        for first in (0..rows).step_by(at_once) {
            chunk.clear();
            for index in first..(first + at_once).min(rows) {
                fill(index, &mut row);
                chunk.extend(row.iter().map(|x| bf16::from_f32(*x)));
            }
            weights.data.write(first * cols * 2, &chunk)?;
        }
        Ok(weights)
    }

    /// The same numbers again and again, for measurements.
    pub fn repeated(gpu: &Gpu, (rows, cols): (usize, usize), numbers: &[bf16]) -> Result<Weights, Error> {
        let weights = Weights::uninitialized(gpu, (rows, cols))?;
        let whole = rows * cols * 2;
        let mut done = whole.min(size_of_val(numbers));
        weights.data.write(0, &numbers[..done / 2])?;
        while done < whole {
            let more = done.min(whole - done);
            weights.data.copy_from(done, (&weights.data, 0), more)?;
            done += more;
        }
        Ok(weights)
    }

    fn uninitialized(gpu: &Gpu, (rows, cols): (usize, usize)) -> Result<Weights, Error> {
        assert!(rows > 0 && cols > 0 && cols.is_multiple_of(8), "weights of {rows} rows, {cols} columns");
        gpu.device().open_products()?;
        Ok(Weights { gpu: gpu.clone(), data: gpu.alloc(rows * cols * 2)?, rows, cols })
    }

    /// `rows`, what comes out.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// `cols`, what goes in.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(super) fn data(&self) -> &Buffer {
        &self.data
    }

    /// `out[T, rows]` of `x[T, cols]`, bf16. The first product of a size looks for the way to compute it: not while a graph is captured.
    pub fn multiply(&self, x: &Buffer, tokens: usize, out: &Buffer, into: Into) -> Result<(), Error> {
        if tokens == 0 {
            return Ok(());
        }
        let element = if into == Into::Bf16 { 2 } else { 4 };
        x.holds("x of a product", 0, tokens * self.cols * 2);
        out.holds("the output of a product", 0, tokens * self.rows * element);
        assert!(x.address() != out.address(), "a product into what it is of");
        let product = Product {
            weights: self.data.address(),
            x: x.address(),
            out: out.address(),
            size: (tokens, self.rows, self.cols),
            into,
        };
        // SAFETY: the matrices have the product's sizes, as was just checked, and buffers do not overlap.
        unsafe { self.gpu.multiply(&product) }
    }
}
