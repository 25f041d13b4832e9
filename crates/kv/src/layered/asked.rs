//! What has lately been asked? Some of the newest steps' queries, from which follows what the tokens are worth that leave the
//! window.

use super::importance::{NEAR, Weights};
use half::f16;
use mosaickv_kernels::layered::Queries;
use mosaickv_kernels::rotate::products;

/// One step in so many is remembered.
pub(super) const EVERY: usize = 16;

/// Steps for which there is room at first, and as many more each time.
const STEP: usize = 8;

/// Queries of one head, as bytes in the calibration's channels over spreads.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked {
    pub(super) positions: Vec<u32>,
    /// `[N, R, D]`
    pub(super) bytes: Vec<i8>,
    /// `[N, R]`: what a byte's step stands for, and what makes a score the logarithm of an attention weight.
    pub(super) scales: Vec<[f32; 2]>,
}

impl Asked {
    /// Remembers the queries of a step, that of the token at `position`, and of each row the logarithm of what its weights
    /// summed up to.
    pub(super) fn push(&mut self, position: usize, queries: &Queries, log_sum: impl Fn(usize) -> f32) {
        let (rows, d) = (queries.rows(), queries.head_dim());
        if self.positions.len() == self.positions.capacity() {
            self.positions.reserve_exact(STEP);
            self.bytes.reserve_exact(STEP * rows * d);
            self.scales.reserve_exact(STEP * rows);
        }
        self.positions.push(position as u32);
        for r in 0..rows {
            let (bytes, step, offset) = queries.row(r);
            self.bytes.extend_from_slice(bytes);
            self.scales.push([step, offset - log_sum(r)]);
        }
    }

    /// Forgets what was asked before `position`.
    pub(super) fn forget(&mut self, position: usize) {
        let gone = self.positions.partition_point(|&p| (p as usize) < position);
        let rows = self.scales.len() / self.positions.len().max(1);
        let d = self.bytes.len() / self.scales.len().max(1);
        self.positions.drain(..gone);
        self.bytes.drain(..gone * rows * d);
        self.scales.drain(..gone * rows);
    }

    /// What errors of the tokens from position `first` on weigh: `keys` and `values` `[n, D]` over their spreads, and the
    /// values' spread `[D]`.
    pub(super) fn weigh(&self, first: usize, (keys, values): (&[f32], &[f32]), spread: &[f16]) -> Weights {
        let d = spread.len();
        let squares: Vec<f32> = spread.iter().map(|s| s.to_f32().powi(2)).collect();
        let tokens = keys.len() / d;
        let mut weights = Weights { keys: vec![0.0; tokens], values: vec![0.0; tokens] };
        if self.positions.is_empty() {
            return weights;
        }
        let of_rows = self.bytes.chunks_exact(d).zip(&self.scales);
        let queries: Vec<f32> =
            of_rows.flat_map(|(row, [step, _])| row.iter().map(move |&x| f32::from(x) * step)).collect();
        let scores = products(&queries, keys, d);
        let rows = self.scales.len() / self.positions.len();
        for (r, (scores, [_, shift])) in scores.chunks_exact(tokens).zip(&self.scales).enumerate() {
            let position = self.positions[r / rows] as usize;
            let judged = (position + 1).saturating_sub(first + NEAR).min(tokens);
            for (weight, score) in weights.values[..judged].iter_mut().zip(scores) {
                *weight += (2.0 * (score + shift).min(0.0)).exp();
            }
        }
        // Outputs lie near the values' mean, from which values are told here.
        for (t, value) in values.chunks_exact(d).enumerate() {
            let judges =
                self.positions.len() - self.positions.partition_point(|&p| (p as usize) < first + t + NEAR);
            weights.values[t] /= (judges * rows).max(1) as f32;
            let distance: f32 = value.iter().zip(&squares).map(|(v, s)| v * v * s).sum();
            weights.keys[t] = weights.values[t] * distance;
        }
        weights
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        self.positions.capacity() * size_of::<u32>()
            + self.bytes.capacity()
            + self.scales.capacity() * size_of::<[f32; 2]>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mosaickv_kernels::Isa;

    /// Against the definition in f64, with three queries of a group of two, each at its distance.
    #[test]
    fn weights_are_those_of_attention_as_it_was() {
        let (d, tokens, first) = (8, 70, 100);
        let number = |i: usize| (i * 37 % 64) as f32 / 32.0 - 1.0;
        let (keys, values): (Vec<f32>, Vec<f32>) =
            (0..tokens * d).map(|i| (number(i), number(i * 5 + 3))).unzip();
        let spread: Vec<f16> = (0..d).map(|c| f16::from_f32(1.0 / (1.0 + c as f32))).collect();
        let positions = [110, 165, 400];
        let mut asked = Asked::default();
        let mut want = vec![(0.0, 0.0); tokens];
        for position in positions {
            let rows: Vec<f32> = (0..2 * d).map(|i| number(i * 11 + position)).collect();
            let queries = Queries::new(Isa::current(), &rows, &[0.25, -0.5]);
            let known = [30.0f32, 400.0];
            asked.push(position, &queries, |r| known[r].ln());
            for (r, offset) in [0.25, -0.5].into_iter().enumerate() {
                let (bytes, step, _) = queries.row(r);
                for (t, want) in want.iter_mut().enumerate().filter(|(t, _)| position >= first + t + NEAR) {
                    let key = keys[t * d..][..d].iter().zip(bytes);
                    let score: f64 = key.map(|(k, &q)| f64::from(*k) * f64::from(q) * f64::from(step)).sum();
                    let weight = (score + offset).exp() / f64::from(known[r]);
                    let judges = positions.iter().filter(|p| **p >= first + t + NEAR).count() * 2;
                    let squares = values[t * d..][..d].iter().zip(&spread);
                    let distance: f64 = squares.map(|(v, s)| (f64::from(*v) * s.to_f64()).powi(2)).sum();
                    want.0 += weight * weight / judges as f64;
                    want.1 += weight * weight * distance / judges as f64;
                }
            }
        }
        let got = asked.weigh(first, (&keys, &values), &spread);
        for (t, (value, key)) in want.into_iter().enumerate() {
            let near = |got: f32, want: f64| (f64::from(got) - want).abs() <= 1e-4 * want;
            assert!(near(got.values[t], value) && near(got.keys[t], key), "token {t}: {value}, {key}");
        }
        asked.forget(166);
        assert_eq!(asked.positions, [400]);
        asked.forget(401);
        assert_eq!((asked.positions.len(), asked.bytes.len(), asked.scales.len()), (0, 0, 0));
    }
}
