//! How does a model multiply by its weights?
//!
//! A [`Matrix`] is repacked once, when it is loaded, and immutable from then on. Activations are quantized to int8
//! and multiplied with the packed weights by our own kernel (`fold`), for one token (bound by memory) as for many;
//! or they stay f32, and the weights go tile by tile through f32 and `gemm` (`tile`). Tasks are
//! cut by the matrix and the number of tokens alone, so results do not depend on the number of threads.
//! This module knows no tensor names, no files and no layers.

use crate::isa::Isa;
use crate::pool::Pool;
use activations::Span;
use output::Output;
use packed::{Packed, ROWS};
use plain::Plain;
use thiserror::Error;

mod activations;
mod blocks;
mod fold;
mod output;
mod packed;
mod plain;
#[cfg(test)]
mod tests;
mod tile;

pub use blocks::BlockType;

/// Up to this many tokens, weights of plain floats are multiplied token by token; more go through `gemm`.
const FEW_DOTS: usize = 8;

/// What the activations are when they meet quantized weights. (Plain weights always meet f32.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 8 bits with an f32 scale by spans of 32: each activation is off by at most a 254th of the largest of its
    /// span. The fastest for any number of tokens, and a token's result does not depend on the others.
    EightBits,
    /// f32. Weights are expanded tile by tile, which only many tokens repay.
    Full,
}

/// Why a tensor cannot become a [`Matrix`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MatrixError {
    /// A dimension is zero, or the matrix would not fit into memory.
    #[error("a matrix cannot be {rows} x {cols}: check the tensor's dimensions in the file")]
    Shape {
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
    },
    /// Rows do not end at the end of a block.
    #[error(
        "rows of {cols} elements do not divide into {ty:?} blocks of {block}: the file is damaged or of another type"
    )]
    Columns {
        /// The block format.
        ty: BlockType,
        /// Columns asked for.
        cols: usize,
        /// Elements of a block.
        block: usize,
    },
    /// The bytes are not those of the shape.
    #[error(
        "{ty:?} weights {rows} x {cols} take {wanted} bytes, got {got}: the file is cut off or of another type"
    )]
    Bytes {
        /// The block format.
        ty: BlockType,
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
        /// Bytes that this shape takes.
        wanted: usize,
        /// Bytes given.
        got: usize,
    },
    /// A weight or a scale is NaN or infinite.
    #[error("row {row} has a weight or scale that is NaN or infinite: the file is damaged, fetch it again")]
    NotFinite {
        /// The first such row.
        row: usize,
    },
}

/// Weights `[rows, cols]`, immutable.
pub struct Matrix {
    weights: Weights,
}

enum Weights {
    Packed(Packed),
    Plain(Plain),
}

impl Matrix {
    /// Repacks the bytes of a tensor `[rows, cols]`, row-major in blocks of `ty` along the columns.
    pub fn from_blocks(ty: BlockType, rows: usize, cols: usize, bytes: &[u8]) -> Result<Matrix, MatrixError> {
        let block = ty.block_elements();
        // The room that padding and wider scales may take is far below a factor of 32.
        let fits = rows.checked_mul(cols).and_then(|n| n.checked_mul(32)).is_some();
        if rows == 0 || cols == 0 || !fits {
            return Err(MatrixError::Shape { rows, cols });
        }
        if !cols.is_multiple_of(block) {
            return Err(MatrixError::Columns { ty, cols, block });
        }
        let (wanted, got) = (rows * (cols / block) * ty.block_bytes(), bytes.len());
        if wanted != got {
            return Err(MatrixError::Bytes { ty, rows, cols, wanted, got });
        }
        let weights = match ty {
            BlockType::F32 | BlockType::F16 | BlockType::Bf16 => {
                Weights::Plain(Plain::from_bytes(ty, rows, cols, bytes)?)
            }
            _ => Weights::Packed(Packed::from_blocks(ty, rows, cols, bytes)?),
        };
        Ok(Matrix { weights })
    }

    /// Output channels.
    pub fn rows(&self) -> usize {
        match &self.weights {
            Weights::Packed(w) => w.rows,
            Weights::Plain(w) => w.rows,
        }
    }

    /// Input channels.
    pub fn cols(&self) -> usize {
        match &self.weights {
            Weights::Packed(w) => w.cols,
            Weights::Plain(w) => w.cols,
        }
    }

    /// The format that the weights came in.
    pub fn block_type(&self) -> BlockType {
        match &self.weights {
            Weights::Packed(w) => w.ty,
            Weights::Plain(w) => w.block_type(),
        }
    }

    /// Bytes allocated, padding included.
    pub fn bytes(&self) -> usize {
        match &self.weights {
            Weights::Packed(w) => w.allocated(),
            Weights::Plain(w) => w.allocated(),
        }
    }

    /// Row `r` as f32 `[cols]` (an embedding): the format's value, rounded once.
    pub fn row(&self, r: usize, out: &mut [f32]) {
        assert!(r < self.rows(), "row {r} of a matrix of {}", self.rows());
        assert_eq!(out.len(), self.cols(), "a row of the wrong length");
        match &self.weights {
            Weights::Packed(w) => w.row(r, out),
            Weights::Plain(w) => w.row(r, out),
        }
    }

    fn way(&self, precision: Precision, tokens: usize) -> Way {
        match (&self.weights, precision) {
            (Weights::Packed(_), Precision::EightBits) => Way::Fold,
            (Weights::Plain(_), _) if tokens <= FEW_DOTS => Way::Dots,
            (Weights::Packed(_), Precision::Full) | (Weights::Plain(_), _) => Way::Tiles,
        }
    }

    /// Rows of a task that meet so many tokens: a multiple of 16.
    fn task_rows(&self, way: Way, tokens: usize) -> usize {
        if way == Way::Tiles {
            return tile::TILE_ROWS;
        }
        // Small enough for 16 threads to share a matrix, large enough to outweigh the claim of a task: so many times fewer bytes, down to a
        // quarter, as there are tokens that each meets.
        let several = tokens.min(4);
        let bytes = (self.bytes() / (16 * several)).clamp((32 << 10) / several, 256 << 10);
        let panel = self.bytes().div_ceil(self.rows().div_ceil(ROWS));
        (bytes / panel).max(1) * ROWS
    }
}

/// How one matrix meets its activations.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Packed weights, 8-bit activations.
    Fold,
    /// Plain weights, row by row.
    Dots,
    /// f32 tiles through `gemm`.
    Tiles,
}

/// `x[T, cols] W^T` for several matrices of the same `cols` with the same `x` (queries, keys and values; gate and up) in one job
/// of the pool: one join. Each product is `[T, rows]` of its matrix.
pub fn multiply_each<const N: usize>(
    precision: Precision,
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    matrices: [&Matrix; N],
) -> [Vec<f32>; N] {
    let Some(first) = matrices.first().filter(|_| !x.is_empty()) else {
        return [const { Vec::new() }; N];
    };
    let cols = first.cols();
    let tokens = x.len() / cols;
    assert_eq!(x.len(), tokens * cols, "activations are not a multiple of {cols} columns");
    let mut tasks = 0;
    let parts = matrices.map(|matrix| {
        assert_eq!(matrix.cols(), cols, "matrices that share activations have the same columns");
        let way = matrix.way(precision, tokens);
        let task_rows = matrix.task_rows(way, tokens);
        let out = Output::new(tokens, matrix.rows());
        let part = Part { matrix, way, out, first_task: tasks, task_rows };
        tasks += matrix.rows().div_ceil(task_rows);
        part
    });
    let wants = |way: Way| parts.iter().any(|part| part.way == way);
    let inputs = Inputs {
        exact: x,
        spans: if wants(Way::Fold) { activations::quantize(isa, pool, x, cols) } else { Vec::new() },
        padded: if wants(Way::Dots) { plain::pad(x, cols) } else { Vec::new() },
    };
    pool.run(tasks, |task| {
        let part = parts.iter().rfind(|part| part.first_task <= task).expect("the first part starts at 0");
        part.run(isa, task, &inputs);
    });
    // SAFETY: the tasks have written all rows of each part, of all tokens, whatever the way.
    parts.map(|part| unsafe { part.out.finish() })
}

/// One matrix of a job.
struct Part<'a> {
    matrix: &'a Matrix,
    way: Way,
    out: Output,
    first_task: usize,
    task_rows: usize,
}

/// The activations in every form that the job's matrices need; the others are empty.
struct Inputs<'a> {
    /// `[T, cols]`
    exact: &'a [f32],
    /// `[T, cols / 32]`
    spans: Vec<Span>,
    /// `[T, cols]` with columns filled up.
    padded: Vec<f32>,
}

impl Part<'_> {
    fn run(&self, isa: Isa, task: usize, inputs: &Inputs) {
        let start = (task - self.first_task) * self.task_rows;
        let rows = start..self.matrix.rows().min(start + self.task_rows);
        let panels = rows.start / ROWS..rows.end.div_ceil(ROWS);
        // SAFETY: each task of the job has its own rows of this part's output.
        unsafe {
            match (&self.matrix.weights, self.way) {
                (Weights::Packed(w), Way::Tiles) => {
                    tile::multiply_packed(isa, w, panels, inputs.exact, &self.out);
                }
                (Weights::Packed(w), _) => fold::multiply(isa, w, panels, &inputs.spans, &self.out),
                (Weights::Plain(w), Way::Tiles) => tile::multiply_plain(w, rows, inputs.exact, &self.out),
                (Weights::Plain(w), _) => plain::multiply(isa, w, rows, &inputs.padded, &self.out),
            }
        }
    }
}
