//! How do tokens become logits? One straight forward pass for the whole Llama family, Gemma included.
//!
//! Rows of a pass are tokens: a chunk of one sequence, or the next token of several. A token's products do not depend
//! on the others of its pass. What a layer remembers, and how attention reads it, is the caller's business.

use crate::config::Architecture;
use crate::rope::{Rope, Rotation};
use crate::sequence::ForwardError;
use crate::weights::{Layer, LayerRope, Model};
use mosaickv_kernels::activation::{gelu_gate, silu_gate};
use mosaickv_kernels::matrix::{Matrix, Precision, multiply_each};
use mosaickv_kernels::{Isa, Pool, all_finite};
use std::sync::atomic::{AtomicBool, Ordering};

/// Numbers that are added up in one task.
const SUMS_OF_TASK: usize = 1 << 15;

/// Tokens that go through a feed-forward layer together.
pub(crate) const BLOCK_TOKENS: usize = 512;

/// What a pass computes with.
#[derive(Clone, Copy)]
pub(crate) struct Forward<'a> {
    pub(crate) model: &'a Model,
    pub(crate) pool: &'a Pool,
    pub(crate) isa: Isa,
    pub(crate) precision: Precision,
}

/// Queries `[T, H, D]`, keys and values `[T, G, D]` of a layer, after RoPE; queries are not yet divided by the root
/// of head_dim.
pub(crate) struct Projected<'a> {
    /// What the layer reads, `[T, hidden]`.
    pub(crate) residual: &'a [f32],
    pub(crate) queries: Vec<f32>,
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

/// `attend(l, projected, out)` stores what layer `l` must remember of the tokens and writes attention's output
/// `[T, H, D]`.
pub(crate) type Attend<'a> = dyn FnMut(usize, &Projected, &mut [f32]) -> Result<(), ForwardError> + 'a;

impl Forward<'_> {
    /// All layers: the residual stream `[T, hidden]` of tokens at these positions after the last one.
    pub(crate) fn layers(
        self,
        tokens: &[u32],
        positions: impl Iterator<Item = usize> + Clone,
        attend: &mut Attend,
    ) -> Result<Vec<f32>, ForwardError> {
        let model = self.model;
        let hidden = model.config.hidden;
        let rotations = |rope: &Rope| positions.clone().map(|p| rope.rotation(p)).collect();
        let rotations = Rotations {
            model: rotations(&model.rope),
            local: model.local_rope.as_ref().map(rotations).unwrap_or_default(),
        };
        let mut x = vec![0.0; tokens.len() * hidden];
        for (&token, row) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
            model.embed.row(token as usize, row);
            scale(row, model.config.embed_scale);
        }
        // Kept between layers for their allocations.
        let (mut normed, mut attended) = (Vec::new(), Vec::new());
        for (l, layer) in model.layers.iter().enumerate() {
            let projected = self.project(layer, &rotations, &x, &mut normed);
            attended.resize(projected.queries.len(), 0.0);
            attend(l, &projected, &mut attended)?;
            // `x += norm(wo * attention(norm(x)))`, the outer norm where the layer has one.
            self.add_product((&layer.wo, layer.post_attn_norm.as_deref()), &attended, &mut x);
            for block in x.chunks_mut(BLOCK_TOKENS * hidden) {
                self.feed_forward(layer, block, &mut normed);
            }
        }
        Ok(x)
    }

    fn project<'x>(
        self,
        layer: &Layer,
        rotations: &Rotations,
        x: &'x [f32],
        normed: &mut Vec<f32>,
    ) -> Projected<'x> {
        let config = &self.model.config;
        let (tokens, d) = (x.len() / config.hidden, config.head_dim);
        self.norm(x, &layer.attn_norm, normed);
        let [mut q, mut k, mut v] = self.multiply(normed, [&layer.wq, &layer.wk, &layer.wv]);
        let eps = config.norm_eps;
        let heads = [(&mut q, &layer.bq, &layer.q_norm), (&mut k, &layer.bk, &layer.k_norm)];
        for (heads, bias, norm) in heads {
            let row = heads.len() / tokens;
            each_row(self.pool, heads, row, |t, heads| {
                add_bias(heads, bias.as_deref());
                if let Some(norm) = norm {
                    heads.chunks_exact_mut(d).for_each(|head| rms_norm(head, norm, eps));
                }
                rotations.turn(self.model, (layer.rope, t), heads);
            });
        }
        // The cache divides by the root of head_dim.
        scale(&mut q, config.attention_scale * (d as f32).sqrt());
        v.chunks_exact_mut(config.kv_heads * d).for_each(|row| add_bias(row, layer.bv.as_deref()));
        Projected { residual: x, queries: q, keys: k, values: v }
    }

    /// `x += norm(down * (silu(gate * norm(x)) * (up * norm(x))))`, the outer norm where the layer has one; for
    /// Gemma, GELU in place of SiLU.
    fn feed_forward(self, layer: &Layer, x: &mut [f32], normed: &mut Vec<f32>) {
        let ffn = self.model.config.ffn;
        self.norm(x, &layer.ffn_norm, normed);
        let [mut gate, up] = self.multiply(normed, [&layer.gate, &layer.up]);
        let activate = match self.model.config.architecture {
            Architecture::Gemma3 => gelu_gate,
            _ => silu_gate,
        };
        each_row(self.pool, &mut gate, ffn, |t, gate| activate(self.isa, gate, &up[t * ffn..][..ffn]));
        self.add_product((&layer.down, layer.post_ffn_norm.as_deref()), &gate, x);
    }

    /// Each product `x[T, cols] W^T`, `[T, rows]`.
    fn multiply<const N: usize>(self, x: &[f32], matrices: [&Matrix; N]) -> [Vec<f32>; N] {
        multiply_each(self.precision, self.isa, self.pool, x, matrices)
    }

    /// `x += norm(w * y)`, or without a norm `x += w * y`
    fn add_product(self, (w, norm): (&Matrix, Option<&[f32]>), y: &[f32], x: &mut [f32]) {
        let [mut out] = self.multiply(y, [w]);
        if let Some(weight) = norm {
            let eps = self.model.config.norm_eps;
            each_row(self.pool, &mut out, weight.len(), |_, row| rms_norm(row, weight, eps));
        }
        self.pool.for_each_chunk(x, SUMS_OF_TASK, |i, x| {
            x.iter_mut().zip(&out[i * SUMS_OF_TASK..]).for_each(|(x, y)| *x += y);
        });
    }

    /// RMSNorm of every row of `x`, into `out`.
    fn norm(self, x: &[f32], weight: &[f32], out: &mut Vec<f32>) {
        let (width, eps) = (weight.len(), self.model.config.norm_eps);
        out.resize(x.len(), 0.0);
        each_row(self.pool, out, width, |t, row| {
            row.copy_from_slice(&x[t * width..][..width]);
            rms_norm(row, weight, eps);
        });
    }

    /// Logits `[T, vocab]` of the residual stream `[T, hidden]`.
    pub(crate) fn logits(self, hidden: &[f32]) -> Result<Vec<f32>, ForwardError> {
        let mut normed = Vec::new();
        self.norm(hidden, &self.model.norm, &mut normed);
        let head = self.model.head.as_ref().unwrap_or(&self.model.embed);
        let [mut logits] = self.multiply(&normed, [head]);
        let is_finite = AtomicBool::new(true);
        each_row(self.pool, &mut logits, self.model.config.vocab, |_, row| {
            if !all_finite(row) {
                is_finite.store(false, Ordering::Relaxed);
            }
        });
        if is_finite.into_inner() { Ok(logits) } else { Err(ForwardError::NotFinite) }
    }
}

/// The cosines and sines of a chunk's positions.
struct Rotations {
    model: Vec<Rotation>,
    /// Of the layers that are [`LayerRope::Local`]; empty if the model has none.
    local: Vec<Rotation>,
}

impl Rotations {
    /// Turns `heads`, `[n, D]`, of the chunk's token `t` as the layer does.
    fn turn(&self, model: &Model, (rope, t): (LayerRope, usize), heads: &mut [f32]) {
        let d = model.config.head_dim;
        match (rope, &model.local_rope) {
            (LayerRope::Off, _) => {}
            (LayerRope::Local, Some(local)) => local.turn(&self.local[t], heads, d),
            (LayerRope::Local, None) | (LayerRope::Model, _) => model.rope.turn(&self.model[t], heads, d),
        }
    }
}

/// `x * factor`; a factor of 1 to rounding leaves `x` as it is.
fn scale(x: &mut [f32], factor: f32) {
    if (factor - 1.0).abs() > 1e-6 {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Calls `body(t, row)` for each row, spread over the pool where there is enough to be worth a join.
fn each_row(pool: &Pool, x: &mut [f32], row: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    const NUMBERS: usize = 2048;
    let rows = (NUMBERS / row).max(1);
    pool.for_each_chunk(x, rows * row, |i, chunk| {
        chunk.chunks_exact_mut(row).enumerate().for_each(|(t, row)| body(i * rows + t, row));
    });
}

fn add_bias(row: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
    }
}

/// `x / rms(x) * weight` (Zhang and Sennrich 2019, arXiv 1910.07467); the mean square in f64.
fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    let square: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let inverse = (square / x.len() as f64 + f64::from(eps)).sqrt().recip() as f32;
    x.iter_mut().zip(weight).for_each(|(x, w)| *x *= inverse * w);
}
