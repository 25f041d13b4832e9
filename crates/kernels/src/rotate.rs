//! How do a query and an output enter and leave a segment's rotated channels?
//!
//! A rotation is kept as f16 rows `[N, W]`; a vector of `N` elements becomes one of `W`, the weighted sum of the
//! rows. The key rotation `[D, C]` turns queries, the transposed value rotation `[C, D]` turns outputs back, and
//! nothing in the cache is ever rotated at decode. A rotation that no one learns, the Walsh-Hadamard matrix, is kept
//! nowhere: [`hadamard`] multiplies by it in sums and differences.

#![expect(clippy::needless_range_loop, reason = "indices over arrays of registers read as the formula does")]

use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use gemm::{Parallelism, gemm};
use half::f16;

/// `out[r] = sum over n of vectors[r][n] * rows[n]`: `vectors` `[R, N]`, `rows` `[N, W]`, `out` `[R, W]`, with
/// `W` a multiple of 16.
pub fn rotate(isa: Isa, vectors: &[f32], rows: &[f16], out: &mut [f32], width: usize) {
    let (count, n) = (out.len() / width, rows.len() / width);
    assert!(width.is_multiple_of(16), "rotation to {width} channels, wanted a multiple of 16");
    assert_eq!((out.len(), rows.len()), (count * width, n * width), "not rows of {width}");
    assert_eq!(vectors.len(), count * n, "vectors are not {count} rows of {n}");
    dispatch(isa, Rotate { vectors, rows, out, width });
}

struct Rotate<'a> {
    vectors: &'a [f32],
    rows: &'a [f16],
    out: &'a mut [f32],
    width: usize,
}

/// Rows that are asked for ahead.
const ROWS_AHEAD: usize = 16;

/// Vectors that share the load of a row's elements.
const VECTORS: usize = 4;

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.rows.len() / self.width;
        let together = self.vectors.chunks(VECTORS * n).zip(self.out.chunks_mut(VECTORS * self.width));
        for (vectors, out) in together {
            match out.len() / self.width {
                1 => some::<S, 1>(s, vectors, self.rows, out),
                2 => some::<S, 2>(s, vectors, self.rows, out),
                3 => some::<S, 3>(s, vectors, self.rows, out),
                _ => some::<S, 4>(s, vectors, self.rows, out),
            }
        }
    }
}

/// Multiplies each run of `order` numbers, a power of two, by the orthonormal Walsh-Hadamard matrix in its natural
/// (Sylvester's) order, whose element `(i, j)` is `order^-1/2`, negative where `i & j` has an odd number of bits. The
/// matrix is symmetric and its own inverse: twice gives the numbers back. Order 1 changes nothing.
/// `log2(order)` sums or differences make a number: error against f64 below 1e-6 of the run's norm (tested).
/// Source: the fast transform, Fino and Algazi 1976, "Unified Matrix Treatment of the Fast Walsh-Hadamard Transform".
pub fn hadamard(numbers: &mut [f32], order: usize) {
    assert!(order.is_power_of_two(), "a Hadamard matrix of order {order}, wanted a power of two");
    assert!(numbers.len().is_multiple_of(order), "{} numbers are not runs of {order}", numbers.len());
    let mut half = 1;
    while half < order {
        for pair in numbers.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
        }
        half *= 2;
    }
    let scale = (order as f32).sqrt().recip();
    numbers.iter_mut().for_each(|x| *x *= scale);
}

/// `R` vectors `[R, N]` to `out` `[R, W]`, two or one vectors of lanes at a time.
#[inline(always)]
fn some<S: Simd, const R: usize>(s: S, vectors: &[f32], rows: &[f16], out: &mut [f32]) {
    let width = out.len() / R;
    let mut at = 0;
    while at + 2 * S::LANES <= width {
        columns::<S, R, 2>(s, vectors, rows, (out, at));
        at += 2 * S::LANES;
    }
    if at < width {
        columns::<S, R, 1>(s, vectors, rows, (out, at));
    }
}

/// Columns `at..at + M * LANES` of the output. Each of them is a sum in the order of the rows, whatever `R` and `M`.
#[inline(always)]
fn columns<S: Simd, const R: usize, const M: usize>(
    s: S,
    vectors: &[f32],
    rows: &[f16],
    (out, at): (&mut [f32], usize),
) {
    let (n, width) = (vectors.len() / R, out.len() / R);
    assert!(rows.len() == n * width && at + M * S::LANES <= width);
    let mut sums = [[s.splat(0.0); M]; R];
    for i in 0..n {
        // The first columns bring whole rows; for the others they are there.
        for line in (0..if at == 0 { 2 * width } else { 0 }).step_by(64) {
            s.prefetch(rows.as_ptr().wrapping_add((i + ROWS_AHEAD) * width), line);
        }
        let mut row = [s.splat(0.0); M];
        for m in 0..M {
            // SAFETY: i < n, and the columns end within a row, asserted above.
            row[m] = unsafe { s.load_f16(rows.as_ptr().add(i * width + at + m * S::LANES)) };
        }
        for r in 0..R {
            // SAFETY: the vectors are R rows of n numbers.
            let x = s.splat(unsafe { *vectors.get_unchecked(r * n + i) });
            for m in 0..M {
                sums[r][m] = s.fma(row[m], x, sums[r][m]);
            }
        }
    }
    for r in 0..R {
        for m in 0..M {
            // SAFETY: `out` is R rows of W, and the columns end within a row, asserted above.
            unsafe { s.store(out.as_mut_ptr().add(r * width + at + m * S::LANES), sums[r][m]) };
        }
    }
}

/// The Gram matrix `x^T x` `[D, D]` of `x` `[T, D]`.
pub fn gram(x: &[f32], d: usize) -> Vec<f32> {
    let t = x.len() / d;
    assert_eq!(x.len(), t * d, "not rows of {d}");
    product(Strided { data: x, rows: d, cols: t, row: 1, col: d }, Strided::rows(x, d))
}

/// `a b` `[T, C]` of `a` `[T, D]` and `b` `[D, C]`.
pub fn multiply(a: &[f32], b: &[f32], d: usize) -> Vec<f32> {
    assert!(a.len().is_multiple_of(d) && b.len().is_multiple_of(d), "not matrices over {d}");
    product(Strided::rows(a, d), Strided::rows(b, b.len() / d))
}

/// `a` `[M, D]` times the transpose of `b` `[N, D]`: all products of their rows, `[M, N]`.
pub fn products(a: &[f32], b: &[f32], d: usize) -> Vec<f32> {
    assert!(a.len().is_multiple_of(d) && b.len().is_multiple_of(d), "not rows of {d}");
    let transposed = Strided { data: b, rows: d, cols: b.len() / d, row: 1, col: d };
    product(Strided::rows(a, d), transposed)
}

#[derive(Clone, Copy)]
struct Strided<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row: usize,
    col: usize,
}

impl<'a> Strided<'a> {
    fn rows(data: &'a [f32], cols: usize) -> Strided<'a> {
        Strided { data, rows: data.len() / cols, cols, row: cols, col: 1 }
    }
}

fn product(a: Strided, b: Strided) -> Vec<f32> {
    let len = a.rows * b.cols;
    if a.cols == 0 || len == 0 {
        return vec![0.0; len];
    }
    let mut out: Vec<f32> = Vec::with_capacity(len);
    assert_eq!(a.cols, b.rows, "inner sizes differ");
    for m in [a, b] {
        assert!((m.rows - 1) * m.row + (m.cols - 1) * m.col < m.data.len());
    }
    // SAFETY: the last element of each matrix is inside its slice (asserted above for the sources) or its allocation (`out`),
    // and `out` overlaps neither. It is written to and not read, every element once, and has all of them after that.
    unsafe {
        gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            b.cols as isize,
            false,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
        out.set_len(len);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, cols: usize, seed: f32) -> Vec<f32> {
        (0..rows * cols).map(|i| (i as f32 * 0.731 + seed).sin()).collect()
    }

    fn naive(a: &[f32], b: &[f32], d: usize) -> Vec<f64> {
        let c = b.len() / d;
        let dot = |i: usize| (0..d).map(|k| f64::from(a[i / c * d + k]) * f64::from(b[k * c + i % c])).sum();
        (0..a.len() / d * c).map(dot).collect()
    }

    fn close(got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((f64::from(*g) - w).abs() < 1e-4, "got {g}, want {w}");
        }
    }

    #[test]
    fn products_agree_with_the_formula() {
        let (a, b) = (matrix(37, 24, 0.0), matrix(24, 19, 1.0));
        close(&multiply(&a, &b, 24), &naive(&a, &b, 24));
        let transposed: Vec<f32> = (0..37 * 24).map(|i| a[i % 37 * 24 + i / 37]).collect();
        close(&gram(&a, 24), &naive(&transposed, &a, 37));
    }

    #[test]
    fn hadamard_agrees_with_the_formula_and_undoes_itself() {
        for (order, runs) in [(1, 3), (2, 3), (64, 1), (64, 4), (128, 2), (256, 1), (1024, 2)] {
            let x = matrix(runs, order, 0.4);
            let element = |i: usize, j: usize| {
                let sign = if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                sign / (order as f64).sqrt()
            };
            let mut turned = x.clone();
            hadamard(&mut turned, order);
            for (x, turned) in x.chunks_exact(order).zip(turned.chunks_exact(order)) {
                let norm = x.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
                for (i, got) in turned.iter().enumerate() {
                    let want: f64 = x.iter().enumerate().map(|(j, x)| element(i, j) * f64::from(*x)).sum();
                    assert!((f64::from(*got) - want).abs() < 1e-6 * norm, "got {got}, want {want}");
                }
            }
            hadamard(&mut turned, order);
            close(&turned, &x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
        }
        let mut by_hand = [1.0, 2.0, 3.0, 4.0];
        hadamard(&mut by_hand, 4);
        assert_eq!(by_hand, [5.0, -1.0, -2.0, 0.0]);
    }

    #[test]
    fn rotation_agrees_with_the_formula_on_every_isa() {
        for &isa in Isa::available() {
            for (n, width, count) in [(64, 48, 1), (48, 64, 3), (128, 96, 7), (16, 16, 4)] {
                let (vectors, rows) = (matrix(count, n, 0.3), matrix(n, width, 0.7));
                let half: Vec<f16> = rows.iter().map(|&x| f16::from_f32(x)).collect();
                let rows: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
                let mut out = vec![0.0; count * width];
                rotate(isa, &vectors, &half, &mut out, width);
                close(&out, &naive(&vectors, &rows, n));
            }
        }
    }
}
