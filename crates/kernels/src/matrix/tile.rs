//! How does prefill multiply a packed matrix that must never exist as f32?
//!
//! A task expands a tile of rows and columns that fits the L2 cache into a buffer of its thread and hands it to
//! `gemm`, single-threaded. `gemm` chooses its own instruction set (AVX-512 where the CPU has it).

use super::fold;
use super::output::Output;
use super::packed::{Packed, ROWS};
use super::plain::{Plain, Values};
use crate::isa::Isa;
use std::cell::RefCell;
use std::ops::Range;

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 128;
/// Columns of a tile, at most (a multiple of every block): 512 KB of f32 with the rows.
const TILE_COLS: usize = 1024;

thread_local! {
    static TILE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A tile as `gemm` sees it, and the columns of `x` that it meets.
struct Tile {
    weights: *const f32,
    /// Elements from one row of the tile to the next, and from one column to the next.
    row_stride: usize,
    col_stride: usize,
    rows: Range<usize>,
    cols: Range<usize>,
}

/// Multiplies `panels` with all tokens, `x` `[T, cols]`.
///
/// # Safety
/// No other thread touches these rows of `out` meanwhile.
pub(super) unsafe fn multiply_packed(isa: Isa, w: &Packed, panels: Range<usize>, x: &[f32], out: &Output) {
    let height = panels.len() * ROWS;
    let rows = panels.start * ROWS..w.rows.min(panels.end * ROWS);
    let block = w.ty.block_elements();
    TILE.with_borrow_mut(|tile| {
        for start in (0..w.cols).step_by(TILE_COLS) {
            let cols = start..w.cols.min(start + TILE_COLS);
            tile.resize(height * cols.len(), 0.0);
            fold::expand(isa, w, panels.clone(), cols.start / block..cols.end / block, tile);
            let tile =
                Tile { weights: tile.as_ptr(), row_stride: 1, col_stride: height, rows: rows.clone(), cols };
            // SAFETY: the tile holds `cols` columns of `height` rows; `out` is the caller's promise.
            unsafe { product(&tile, x, w.cols, out) };
        }
    });
}

/// Multiplies `rows` of a plain matrix with all tokens, `x` `[T, cols]`.
///
/// # Safety
/// No other thread touches these rows of `out` meanwhile.
pub(super) unsafe fn multiply_plain(w: &Plain, rows: Range<usize>, x: &[f32], out: &Output) {
    let tile = |weights: *const f32, row_stride| Tile {
        weights,
        row_stride,
        col_stride: 1,
        rows: rows.clone(),
        cols: 0..w.cols,
    };
    if let Values::F32(v) = &w.values {
        // SAFETY: the rows lie in `v`, `stride` apart; `out` is the caller's promise.
        unsafe { product(&tile(v[rows.start * w.stride..].as_ptr(), w.stride), x, w.cols, out) };
        return;
    }
    TILE.with_borrow_mut(|buffer| {
        buffer.resize(rows.len() * w.cols, 0.0);
        for (r, to) in rows.clone().zip(buffer.chunks_exact_mut(w.cols)) {
            w.row(r, to);
        }
        // SAFETY: the buffer holds the rows, `cols` apart; `out` is the caller's promise.
        unsafe { product(&tile(buffer.as_ptr(), w.cols), x, w.cols, out) };
    });
}

/// `out[T, rows] = x[T, cols] W^T` over a tile's rows and columns; all but the first columns add to `out`.
///
/// # Safety
/// The tile's weights are readable, and no other thread touches its rows of `out` meanwhile.
unsafe fn product(tile: &Tile, x: &[f32], x_stride: usize, out: &Output) {
    let tokens = out.tokens();
    assert!(x.len() == tokens * x_stride && tile.cols.end <= x_stride && tile.rows.end <= out.rows());
    // SAFETY: shapes and strides lie within their buffers: `x` and `out` as checked here, the tile as promised.
    unsafe {
        gemm::gemm(
            tile.rows.len(),
            tokens,
            tile.cols.len(),
            out.pointer(0, tile.rows.start),
            out.rows() as isize,
            1,
            tile.cols.start > 0,
            tile.weights,
            tile.col_stride as isize,
            tile.row_stride as isize,
            x[tile.cols.start..].as_ptr(),
            x_stride as isize,
            1,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
