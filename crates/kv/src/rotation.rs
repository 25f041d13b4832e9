//! In which channels do few numbers say most? The eigenvectors of K^T K and of V^T V (paper, s. 4).

use faer::{Mat, Side};
use half::f16;
use mosaickv_kernels::rotate::gram;

/// Which channels vectors are stored in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Basis {
    /// The eigenvectors of K^T K and of V^T V: the paper's.
    #[default]
    Svd,
    /// The model's own channels, those with the most energy first: what the rotation is worth shows beside it.
    Model,
}

/// The rotations of one segment, f16, truncated to its `C` leading channels.
#[derive(Clone, Debug)]
pub(crate) struct Rotation {
    /// `[D, C]`: a key or query times this is in the segment's key channels.
    pub(crate) keys: Box<[f16]>,
    /// `[C, D]`: an output in the segment's value channels times this is an output of the model.
    pub(crate) outputs: Box<[f16]>,
}

impl Rotation {
    /// Learns from keys and values `[T, D]`, all finite.
    pub(crate) fn learn(basis: Basis, keys: &[f32], values: &[f32], shape: (usize, usize)) -> Rotation {
        Rotation::from_grams(basis, (&gram(keys, shape.0), &gram(values, shape.0)), shape)
    }

    /// Learns from K^T K and V^T V, `[D, D]`, and keeps `C` channels: `(D, C)`.
    pub(crate) fn from_grams(
        basis: Basis,
        (keys, values): (&[f32], &[f32]),
        (d, channels): (usize, usize),
    ) -> Rotation {
        let leading = match basis {
            Basis::Svd => leading_eigenvectors,
            Basis::Model => leading_channels,
        };
        Rotation { keys: transpose(&leading(keys, d, channels), d), outputs: leading(values, d, channels) }
    }

    /// `[D, C]` in f32: what keys are multiplied by.
    pub(crate) fn key_matrix(&self) -> Vec<f32> {
        self.keys.iter().map(|x| x.to_f32()).collect()
    }

    /// `[D, C]` in f32: what values are multiplied by.
    pub(crate) fn value_matrix(&self, d: usize) -> Vec<f32> {
        transpose(&self.outputs, d).iter().map(|x| x.to_f32()).collect()
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Rotation>() + size_of_val(&*self.keys) + size_of_val(&*self.outputs)
    }
}

/// `[C, D]`: the unit eigenvectors of a Gram matrix with the largest eigenvalues, largest first.
fn leading_eigenvectors(gram: &[f32], d: usize, channels: usize) -> Box<[f16]> {
    let matrix = Mat::from_fn(d, d, |i, j| f64::from(gram[i * d + j]));
    let eigen = matrix.self_adjoint_eigen(Side::Lower).expect("finite symmetric matrices have eigenvectors");
    // Eigenvalues come in rising order.
    let vectors = eigen.U();
    (0..channels * d).map(|i| f16::from_f64(vectors[(i % d, d - 1 - i / d)])).collect()
}

/// `[C, D]`: unit vectors along the channels with the largest sums of squares, largest first.
fn leading_channels(gram: &[f32], d: usize, channels: usize) -> Box<[f16]> {
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|&a, &b| gram[b * d + b].total_cmp(&gram[a * d + a]));
    (0..channels * d).map(|i| f16::from_f32(f32::from(u8::from(order[i / d] == i % d)))).collect()
}

/// `[N, M]` of `x` `[M, N]`, whose rows have `n` elements.
pub(crate) fn transpose(x: &[f16], n: usize) -> Box<[f16]> {
    let m = x.len() / n;
    (0..x.len()).map(|i| x[i % m * n + i / m]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_directions_of_the_data_in_order() {
        // Variance 100 along (1, 1)/sqrt 2 of the first two channels, 1 along (1, -1)/sqrt 2, next to none else.
        let d = 16;
        let mut x = vec![0.0; 200 * d];
        for (t, row) in x.chunks_exact_mut(d).enumerate() {
            let (big, small) = (10.0 * (t as f32 * 0.7).sin(), (t as f32 * 1.3).cos());
            row[0] = big + small;
            row[1] = big - small;
            row[2] = 0.01 * (t as f32).sin();
        }
        let rotation = Rotation::learn(Basis::Svd, &x, &x, (d, d));
        let first: Vec<f32> = (0..d).map(|i| rotation.keys[i * d].to_f32()).collect();
        assert!(
            (first[0].abs() - std::f32::consts::FRAC_1_SQRT_2).abs() < 1e-3
                && (first[0] - first[1]).abs() < 1e-3,
            "{first:?}"
        );
        let second: Vec<f32> = (0..d).map(|i| rotation.keys[i * d + 1].to_f32()).collect();
        assert!((second[0] + second[1]).abs() < 1e-3, "{second:?}");
        // Orthonormal, and the value matrix is the transpose of the output matrix.
        let keys = rotation.key_matrix();
        for a in 0..d {
            for b in 0..d {
                let dot: f32 = (0..d).map(|i| keys[i * d + a] * keys[i * d + b]).sum();
                assert!((dot - f32::from(a == b)).abs() < 2e-3, "columns {a}, {b}: {dot}");
            }
        }
        assert_eq!(rotation.value_matrix(d), keys);
        // Truncation keeps the leading columns.
        let fewer = Rotation::learn(Basis::Svd, &x, &x, (d, 3));
        assert_eq!(fewer.keys.len(), 3 * d);
        for i in 0..3 * d {
            let whole = keys[i / 3 * d + i % 3];
            assert_eq!((fewer.key_matrix()[i], fewer.value_matrix(d)[i]), (whole, whole), "element {i}");
        }
    }

    #[test]
    fn without_rotation_the_largest_channels_come_first() {
        let x = [1.0, -3.0, 0.0, 2.0, 1.0, 3.0, 0.5, -2.0];
        let rotation = Rotation::learn(Basis::Model, &x, &x, (4, 2));
        assert_eq!(rotation.key_matrix(), [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
        assert_eq!(rotation.value_matrix(4), rotation.key_matrix());
    }
}
