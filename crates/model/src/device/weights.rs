//! A model's matrices and norms in a GPU's memory.

use crate::weights::{Layer, LayerRope, Model};
use mosaickv_kernels::cuda::dense::Norm;
use mosaickv_kernels::cuda::gemm;
use mosaickv_kernels::cuda::{Buffer, Error, Gpu};
use mosaickv_kernels::matrix::Matrix;

/// Of all layers, and what is before and after them.
pub(crate) struct Weights {
    pub(crate) embed: gemm::Weights,
    pub(crate) layers: Vec<DeviceLayer>,
    pub(crate) norm: Norm,
    /// `None`: the embedding serves.
    pub(crate) head: Option<gemm::Weights>,
}

/// One layer. What is multiplied by the same is one matrix.
pub(crate) struct DeviceLayer {
    pub(crate) attn_norm: Norm,
    /// Queries, keys, values: `[(H + 2 G) * D, hidden]`.
    pub(crate) qkv: gemm::Weights,
    /// Added to them.
    pub(crate) bias: Option<Buffer>,
    pub(crate) q_norm: Option<Buffer>,
    pub(crate) k_norm: Option<Buffer>,
    pub(crate) wo: gemm::Weights,
    pub(crate) post_attn_norm: Option<Norm>,
    pub(crate) ffn_norm: Norm,
    /// `[2 * ffn, hidden]`
    pub(crate) gate_up: gemm::Weights,
    pub(crate) down: gemm::Weights,
    pub(crate) post_ffn_norm: Option<Norm>,
    /// Whether queries and keys are turned.
    pub(crate) is_turned: bool,
}

impl Weights {
    /// Copies of a model's.
    pub(crate) fn of(gpu: &Gpu, model: &Model) -> Result<Weights, Error> {
        let eps = model.config.norm_eps;
        Ok(Weights {
            embed: matrix(gpu, &[&model.embed])?,
            layers: model
                .layers
                .iter()
                .map(|layer| DeviceLayer::of(gpu, layer, eps))
                .collect::<Result<_, _>>()?,
            norm: Norm::new(gpu, &model.norm, eps)?,
            head: model.head.as_ref().map(|head| matrix(gpu, &[head])).transpose()?,
        })
    }

    /// Of matrices.
    pub(crate) fn bytes(&self) -> usize {
        let of_layer =
            |layer: &DeviceLayer| [&layer.qkv, &layer.wo, &layer.gate_up, &layer.down].map(|w| w.bytes());
        let layers: usize = self.layers.iter().flat_map(of_layer).sum();
        layers + self.embed.bytes() + self.head.as_ref().map_or(0, gemm::Weights::bytes)
    }
}

impl DeviceLayer {
    fn of(gpu: &Gpu, layer: &Layer, eps: f32) -> Result<DeviceLayer, Error> {
        let norm = |weight: &[f32]| Norm::new(gpu, weight, eps);
        let optional = |weight: &Option<Vec<f32>>| weight.as_deref().map(norm).transpose();
        let numbers = |x: &Option<Vec<f32>>| x.as_deref().map(|x| gpu.upload(x)).transpose();
        Ok(DeviceLayer {
            attn_norm: norm(&layer.attn_norm)?,
            qkv: matrix(gpu, &[&layer.wq, &layer.wk, &layer.wv])?,
            bias: numbers(&biases(layer))?,
            q_norm: numbers(&layer.q_norm)?,
            k_norm: numbers(&layer.k_norm)?,
            wo: matrix(gpu, &[&layer.wo])?,
            post_attn_norm: optional(&layer.post_attn_norm)?,
            ffn_norm: norm(&layer.ffn_norm)?,
            gate_up: matrix(gpu, &[&layer.gate, &layer.up])?,
            down: matrix(gpu, &[&layer.down])?,
            post_ffn_norm: optional(&layer.post_ffn_norm)?,
            is_turned: layer.rope != LayerRope::Off,
        })
    }
}

/// Those of queries, keys and values, zeros where one has none.
fn biases(layer: &Layer) -> Option<Vec<f32>> {
    let parts = [(&layer.bq, &layer.wq), (&layer.bk, &layer.wk), (&layer.bv, &layer.wv)];
    let is_there = parts.iter().any(|(bias, _)| bias.is_some());
    let of = |(bias, matrix): (&Option<Vec<f32>>, &Matrix)| {
        bias.clone().unwrap_or_else(|| vec![0.0; matrix.rows()])
    };
    is_there.then(|| parts.into_iter().flat_map(of).collect())
}

/// Matrices with as many columns, one under the other.
fn matrix(gpu: &Gpu, parts: &[&Matrix]) -> Result<gemm::Weights, Error> {
    let rows = parts.iter().map(|part| part.rows()).sum();
    let places: Vec<(&Matrix, usize)> =
        parts.iter().flat_map(|part| (0..part.rows()).map(move |row| (*part, row))).collect();
    gemm::Weights::new(gpu, (rows, parts[0].cols()), |row, out| {
        let (part, row) = places[row];
        part.row(row, out);
    })
}
