//! In which channels does an error of a key or value cost least? Learnt once per model, from a few documents.
//!
//! Of keys: the eigenvectors of their covariance under the metric of the queries that meet them, E[q q^T], so that an
//! error's square is what it does to scores. Of values: of their covariance under W_o^T W_o, so that it is what it does to
//! the residual stream. Both metrics get a ridge of a tenth of their mean eigenvalue. This is the Karhunen-Loeve
//! basis of a weighted error; attention-aware transforms like it are in AATC (arXiv 2608.14191).

use faer::{Mat, Side};
use half::f16;
use mosaickv_kernels::rotate::gram;
use std::cmp::Ordering;

/// Everything that the layered format knows of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// Of each layer and KV head, `[L * G]`.
    pub heads: Vec<HeadCalibration>,
    /// `[L]`, mean 1: what a squared error of a layer's attention output weighs, the inverse of the residual stream's square.
    pub layer_weights: Vec<f32>,
}

/// The channels of one layer and KV head. All matrices are `[D, D]`, row-major; vectors are rows.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadCalibration {
    /// A key times this is in channels of falling variance.
    pub keys: Box<[f16]>,
    /// A query times this has with such a key the product that query and key had.
    pub queries: Box<[f16]>,
    /// A value times this is in channels of falling variance.
    pub values: Box<[f16]>,
    /// An output in those channels times this is an output of the model.
    pub outputs: Box<[f16]>,
}

impl HeadCalibration {
    /// Of keys, queries, values and outputs.
    pub fn matrices(&self) -> [&[f16]; 4] {
        [&self.keys, &self.queries, &self.values, &self.outputs]
    }
}

impl Calibration {
    /// Share of a metric's mean eigenvalue that is added to all of them.
    pub const RIDGE: f64 = 0.1;

    /// `D`, where all matrices are `[D, D]`.
    pub fn head_dim(&self) -> Option<usize> {
        let mut sizes = self.heads.iter().flat_map(HeadCalibration::matrices).map(<[f16]>::len);
        let size = sizes.next()?;
        (size.isqrt().pow(2) == size && sizes.all(|other| other == size)).then(|| size.isqrt())
    }

    /// Whether all numbers are finite, and the layers' weights above 0.
    pub fn is_finite(&self) -> bool {
        self.heads.iter().flat_map(HeadCalibration::matrices).flatten().all(|x| x.is_finite())
            && self.layer_weights.iter().all(|w| *w > 0.0 && w.is_finite())
    }

    /// Bytes allocated: once for a model, whatever the number of sequences.
    pub fn bytes(&self) -> usize {
        let matrices = self.heads.iter().flat_map(HeadCalibration::matrices);
        matrices.map(size_of_val).sum::<usize>()
            + self.heads.capacity() * size_of::<HeadCalibration>()
            + self.layer_weights.capacity() * size_of::<f32>()
    }
}

/// Sums over documents, for one layer and KV head.
#[derive(Clone, Debug)]
pub struct Moments {
    d: usize,
    documents: f64,
    queries: f64,
    /// `[D, D]`: of q q^T, and of each document's covariances.
    of_queries: Vec<f64>,
    of_keys: Vec<f64>,
    of_values: Vec<f64>,
}

impl Moments {
    /// None yet, of heads with `d` channels.
    pub fn new(d: usize) -> Moments {
        let none = vec![0.0; d * d];
        Moments {
            d,
            documents: 0.0,
            queries: 0.0,
            of_queries: none.clone(),
            of_keys: none.clone(),
            of_values: none,
        }
    }

    /// Adds a document: keys and values `[T, D]` and the queries `[N, D]` of the heads that share them, after RoPE.
    pub fn add(&mut self, keys: &[f32], values: &[f32], queries: &[f32]) {
        add(&mut self.of_queries, gram(queries, self.d).into_iter().map(f64::from));
        self.queries += (queries.len() / self.d) as f64;
        add(&mut self.of_keys, covariance(keys, self.d));
        add(&mut self.of_values, covariance(values, self.d));
        self.documents += 1.0;
    }

    /// The channels of this head, whose values' errors are weighed by the metric `outputs` `[D, D]`: W_o^T W_o.
    pub fn learn(&self, outputs: &[f64]) -> HeadCalibration {
        let d = self.d;
        let scaled = |x: &[f64], by: f64| Mat::from_fn(d, d, |i, j| x[i * d + j] / by.max(1.0));
        let (keys, queries) =
            channels(&scaled(&self.of_queries, self.queries), &scaled(&self.of_keys, self.documents));
        let (values, out) = channels(&scaled(outputs, 1.0), &scaled(&self.of_values, self.documents));
        HeadCalibration {
            keys: rows(&keys),
            queries: rows(&queries.transpose().to_owned()),
            values: rows(&values),
            outputs: rows(&out),
        }
    }
}

fn add(sum: &mut [f64], x: impl IntoIterator<Item = f64>) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}

/// The covariance `[D, D]` of rows `[T, D]`.
fn covariance(x: &[f32], d: usize) -> Vec<f64> {
    let t = (x.len() / d) as f64;
    let mut mean = vec![0.0; d];
    for row in x.chunks_exact(d) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x) / t);
    }
    let less: Vec<f32> = x.iter().enumerate().map(|(i, x)| (f64::from(*x) - mean[i % d]) as f32).collect();
    gram(&less, d).into_iter().map(|x| f64::from(x) / t).collect()
}

/// The matrix into the channels of falling variance under the metric, and the one back. A metric of zeros, or one whose matrices
/// f16 has no numbers for, counts as the identity; where that does not help either, the channels are the model's.
fn channels(metric: &Mat<f64>, covariance: &Mat<f64>) -> (Mat<f64>, Mat<f64>) {
    channels_under(metric, covariance).unwrap_or_else(|| {
        tracing::warn!("nothing tells which errors of a head cost most: all of its channels count alike");
        let same = Mat::identity(metric.nrows(), metric.nrows());
        channels_under(&same, covariance).unwrap_or_else(|| (same.clone(), same))
    })
}

/// With `M` the metric's root, `M U` and `U^T M^-1`, where `U` are the eigenvectors of `M C M`, if f16 has them.
fn channels_under(metric: &Mat<f64>, covariance: &Mat<f64>) -> Option<(Mat<f64>, Mat<f64>)> {
    let d = metric.nrows();
    let ridge = Calibration::RIDGE * (0..d).map(|i| metric[(i, i)]).sum::<f64>() / d as f64;
    // No number is not above 0 either.
    if ridge.partial_cmp(&0.0) != Some(Ordering::Greater) {
        return None;
    }
    let ridge = ridge + f64::MIN_POSITIVE;
    let metric = Mat::from_fn(d, d, |i, j| metric[(i, j)] + if i == j { ridge } else { 0.0 });
    let eigen = metric.self_adjoint_eigen(Side::Lower).ok()?;
    let (u, s) = (eigen.U(), eigen.S());
    let power = |p: f64| {
        let scaled = Mat::from_fn(d, d, |i, j| u[(i, j)] * s[j].max(ridge).powf(p));
        &scaled * u.transpose()
    };
    let (root, inverse) = (power(0.5), power(-0.5));
    let weighed = &root * covariance * &root;
    let eigen = weighed.self_adjoint_eigen(Side::Lower).ok()?;
    // Eigenvalues come in rising order.
    let turn = Mat::from_fn(d, d, |i, j| eigen.U()[(i, d - 1 - j)]);
    let (into, back) = (&root * &turn, turn.transpose() * &inverse);
    let is_finite = |x: &Mat<f64>| rows(x).iter().all(|x| x.is_finite());
    (is_finite(&into) && is_finite(&back)).then_some((into, back))
}

fn rows(x: &Mat<f64>) -> Box<[f16]> {
    let d = x.ncols();
    (0..x.nrows() * d).map(|i| f16::from_f64(x[(i / d, i % d)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::uniform;

    const D: usize = 16;

    fn numbers(seed: u64, tokens: usize) -> Vec<f32> {
        let mut uniform = uniform(seed);
        (0..tokens * D).map(|i| uniform() / (1 + i % D) as f32).collect()
    }

    fn metric(of: f64) -> Vec<f64> {
        (0..D * D).map(|i| if i % (D + 1) == 0 { of } else { 0.0 }).collect()
    }

    /// Queries of zeros, outputs that go nowhere, and numbers for whose metric f16 has none.
    #[test]
    fn a_head_that_nothing_is_asked_of_has_finite_channels_all_the_same() {
        let (keys, values) = (numbers(1, 200), numbers(2, 200));
        let learnt = |queries: f32, outputs: f64| {
            let mut moments = Moments::new(D);
            let queries: Vec<f32> = numbers(3, 100).into_iter().map(|x| x * queries).collect();
            moments.add(&keys, &values, &queries);
            moments.learn(&metric(outputs))
        };
        let as_identity = learnt(0.0, 1.0);
        for (queries, outputs) in [(0.0, 0.0), (1e-12, 1e-20), (1e12, 1e20), (0.0, f64::NAN)] {
            let head = learnt(queries, outputs);
            assert!(head.matrices().into_iter().flatten().all(|x| x.is_finite()), "{queries}, {outputs}");
            assert_eq!(head.values, as_identity.values, "outputs {outputs}");
            // There and back is where it was.
            for (into, back) in [(&head.keys, &head.queries), (&head.values, &head.outputs)] {
                let is_keys = std::ptr::eq(into, &head.keys);
                for (i, j) in (0..D).flat_map(|i| (0..D).map(move |j| (i, j))) {
                    let at = |c: usize| if is_keys { back[j * D + c] } else { back[c * D + j] };
                    let product: f64 = (0..D).map(|c| into[i * D + c].to_f64() * at(c).to_f64()).sum();
                    let want = if i == j { 1.0 } else { 0.0 };
                    assert!((product - want).abs() < 1e-2, "{queries}, {outputs}: {product} at {i}, {j}");
                }
            }
        }
        let same = Moments::new(D).learn(&metric(0.0));
        assert!(same.matrices().into_iter().flatten().all(|x| x.is_finite()), "no documents");
    }
}
