//! In which channels does an error of a key or value cost least? Learnt once per model, from a few documents.
//!
//! Of keys: the eigenvectors of their covariance under the metric of the queries that meet them, E[q q^T], so that an
//! error's square is what it does to scores. Of values: of their covariance under W_o^T W_o, so that it is what it does to
//! the residual stream. Both metrics get a ridge of a tenth of their mean eigenvalue. This is the Karhunen-Loeve
//! basis of a weighted error; attention-aware transforms like it are in AATC (arXiv 2608.14191).

use faer::{Mat, Side};
use half::f16;
use mosaickv_kernels::rotate::gram;

/// Share of a metric's mean eigenvalue that is added to all of them.
const RIDGE: f64 = 0.1;

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

impl Calibration {
    /// Bytes allocated: once for a model, whatever the number of sequences.
    pub fn bytes(&self) -> usize {
        let of_head = |head: &HeadCalibration| {
            [&head.keys, &head.queries, &head.values, &head.outputs]
                .map(|m| size_of_val(&**m))
                .iter()
                .sum::<usize>()
        };
        self.heads.iter().map(of_head).sum::<usize>()
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

/// The matrix into the channels of falling variance under the metric, and the one back: with `M` the metric's root, `M U`
/// and `U^T M^-1`, where `U` are the eigenvectors of `M C M`.
fn channels(metric: &Mat<f64>, covariance: &Mat<f64>) -> (Mat<f64>, Mat<f64>) {
    let d = metric.nrows();
    let ridge = RIDGE * (0..d).map(|i| metric[(i, i)]).sum::<f64>() / d as f64 + f64::MIN_POSITIVE;
    let metric = Mat::from_fn(d, d, |i, j| metric[(i, j)] + if i == j { ridge } else { 0.0 });
    let eigen = metric.self_adjoint_eigen(Side::Lower).expect("finite symmetric matrices have eigenvectors");
    let (u, s) = (eigen.U(), eigen.S());
    let power = |p: f64| {
        let scaled = Mat::from_fn(d, d, |i, j| u[(i, j)] * s[j].max(ridge).powf(p));
        &scaled * u.transpose()
    };
    let (root, inverse) = (power(0.5), power(-0.5));
    let weighed = &root * covariance * &root;
    let eigen = weighed.self_adjoint_eigen(Side::Lower).expect("finite symmetric matrices have eigenvectors");
    // Eigenvalues come in rising order.
    let turn = Mat::from_fn(d, d, |i, j| eigen.U()[(i, d - 1 - j)]);
    (&root * &turn, turn.transpose() * &inverse)
}

fn rows(x: &Mat<f64>) -> Box<[f16]> {
    let d = x.ncols();
    (0..x.nrows() * d).map(|i| f16::from_f64(x[(i / d, i % d)])).collect()
}
