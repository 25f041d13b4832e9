//! How do tokens become logits? One straight forward pass for the whole Llama family, Gemma included.
//!
//! A chunk of tokens goes through the layers one after the other, all its tokens together, so that only one
//! layer of a prompt (of up to 8,192 tokens) is uncompressed at a time. What a layer remembers, and how attention reads it, is the KV
//! cache's business.

use crate::config::Architecture;
use crate::rope::{Rope, Rotation};
use crate::weights::{Layer, LayerRope, Model};
use mosaickv_kernels::activation::{gelu_gate, silu_gate};
use mosaickv_kernels::matrix::{Matrix, Precision, multiply_each};
use mosaickv_kernels::{Isa, Pool};
use mosaickv_kv::{KvCache, KvError, KvFormat, KvShape};
use std::time::{Duration, Instant};

/// Tokens of a prompt that go through the layers together; bounds the activations' memory.
const CHUNK_TOKENS: usize = 8192;

/// Tokens that go through a feed-forward layer together.
const BLOCK_TOKENS: usize = 512;

/// Logits that are computed together at most, unless one token has more.
const BLOCK_LOGITS: usize = 1 << 24;

/// One sequence of tokens: a model, the threads to run it on, and what it remembers. A clone goes on from the same
/// tokens and shares their sealed pages.
#[derive(Clone)]
pub struct Sequence<'a> {
    model: &'a Model,
    pool: &'a Pool,
    isa: Isa,
    precision: Precision,
    cache: KvCache,
    attention: Duration,
}

/// Why a forward pass was refused. `Context` and `Token` leave the sequence as it was; after the others it is
/// of no further use.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The sequence would be longer than the model can attend to.
    #[error(
        "{tokens} tokens are more than the model's context of {context}; shorten the document or the answer, or \
         use a model with a longer context"
    )]
    Context {
        /// Tokens of the whole sequence.
        tokens: usize,
        /// What the model takes.
        context: usize,
    },
    /// A token id that the model does not know.
    #[error("token id {id} is outside the model's vocabulary of {vocab}")]
    Token {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// The logits are NaN or infinite.
    #[error(
        "the model computed logits that are not finite; its weights are damaged, or its activations exceed f32"
    )]
    NotFinite,
    /// The cache refused.
    #[error(transparent)]
    Kv(#[from] KvError),
}

impl Model {
    /// What the KV cache needs to know.
    pub fn kv_shape(&self) -> KvShape {
        let config = &self.config;
        KvShape {
            layers: config.layers,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            window: config.sliding_window,
        }
    }

    /// Tokens that a sequence may have.
    pub fn context(&self) -> usize {
        self.config.context
    }
}

impl<'a> Sequence<'a> {
    /// An empty sequence.
    pub fn new(model: &'a Model, pool: &'a Pool, format: KvFormat) -> Result<Sequence<'a>, KvError> {
        let cache = KvCache::new(model.kv_shape(), format)?;
        Ok(Sequence {
            model,
            pool,
            isa: Isa::current(),
            precision: Precision::EightBits,
            cache,
            attention: Duration::ZERO,
        })
    }

    /// The same with activations of another precision where they meet quantized weights; 8 bits is the default.
    pub fn with_precision(mut self, precision: Precision) -> Sequence<'a> {
        self.precision = precision;
        self
    }

    /// The same, and it remembers the newest queries of each exact layer: what a compressed copy in the format
    /// `snapkv` is made from.
    pub fn remember_queries(mut self) -> Sequence<'a> {
        self.cache = self.cache.remember_queries();
        self
    }

    /// A copy that goes on from the same tokens with its cache in another format; this one must be exact. Nothing of
    /// the prompt is computed again.
    pub fn compressed(&self, format: KvFormat) -> Result<Sequence<'a>, KvError> {
        let start = Instant::now();
        let cache = self.cache.compressed(self.pool, format)?;
        Ok(Sequence { cache, attention: self.attention + start.elapsed(), ..*self })
    }

    /// The same with one layer compressed and the others exact.
    pub fn compressed_layer(&self, layer: usize, format: KvFormat) -> Result<Sequence<'a>, KvError> {
        let start = Instant::now();
        let cache = self.cache.compressed_layer(self.pool, layer, format)?;
        Ok(Sequence { cache, attention: self.attention + start.elapsed(), ..*self })
    }

    /// What it remembers.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Time spent in the cache so far: storing keys and values, compressing, and attention.
    pub fn attention_time(&self) -> Duration {
        self.attention
    }

    /// Reads a whole prompt, compresses it layer by layer as the format says, and returns the logits `[vocab]`
    /// that follow its last token. `progress` is called with layers done and layers in all. After a compressed
    /// prompt a further one goes token by token, each reading what is compressed.
    pub fn prefill(
        &mut self,
        prompt: &[u32],
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<f32>, ForwardError> {
        assert!(!prompt.is_empty(), "a prompt needs at least one token");
        self.check(prompt)?;
        if self.cache.is_compressed() {
            let (last, before) = prompt.split_last().expect("not empty");
            for (i, &token) in before.iter().enumerate() {
                self.feed(token)?;
                progress(i + 1, prompt.len());
            }
            let logits = self.step(*last)?;
            progress(prompt.len(), prompt.len());
            return Ok(logits);
        }
        let chunks = prompt.len().div_ceil(CHUNK_TOKENS);
        let layers = self.model.layers.len();
        let mut last = Vec::new();
        for (i, chunk) in prompt.chunks(CHUNK_TOKENS).enumerate() {
            let report = &mut |layer| progress(i * layers + layer, chunks * layers);
            last = self.layers(chunk, i + 1 == chunks, report)?;
        }
        let hidden = self.model.config.hidden;
        self.logits(&last[last.len() - hidden..])
    }

    /// Reads one more token, whatever follows it.
    pub fn feed(&mut self, token: u32) -> Result<(), ForwardError> {
        self.check(&[token])?;
        self.layers(&[token], false, &mut |_| ())?;
        Ok(())
    }

    /// Reads one more token and returns the logits `[vocab]` that follow it.
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>, ForwardError> {
        self.check(&[token])?;
        let hidden = self.layers(&[token], false, &mut |_| ())?;
        self.logits(&hidden)
    }

    /// Reads tokens as one exact chunk and calls `each(i, logits)` with the logits `[vocab]` that follow every
    /// one of them. Compresses nothing; after a compressed prompt it goes token by token.
    pub fn score(&mut self, tokens: &[u32], each: &mut dyn FnMut(usize, &[f32])) -> Result<(), ForwardError> {
        self.check(tokens)?;
        if tokens.is_empty() {
            return Ok(());
        }
        if self.cache.is_compressed() {
            for (i, &token) in tokens.iter().enumerate() {
                each(i, &self.step(token)?);
            }
            return Ok(());
        }
        let hidden = self.layers(tokens, false, &mut |_| ())?;
        let (width, vocab) = (self.model.config.hidden, self.model.config.vocab);
        let together = (BLOCK_LOGITS / vocab).clamp(1, BLOCK_TOKENS);
        for (b, block) in hidden.chunks(together * width).enumerate() {
            for (i, logits) in self.logits(block)?.chunks_exact(vocab).enumerate() {
                each(b * together + i, logits);
            }
        }
        Ok(())
    }

    fn check(&self, tokens: &[u32]) -> Result<(), ForwardError> {
        let (total, context) = (self.cache.tokens() + tokens.len(), self.model.context());
        if total > context {
            return Err(ForwardError::Context { tokens: total, context });
        }
        let vocab = self.model.config.vocab;
        match tokens.iter().find(|&&id| id as usize >= vocab) {
            Some(&id) => Err(ForwardError::Token { id, vocab }),
            None => Ok(()),
        }
    }

    /// All layers: the residual stream `[T, hidden]` after the last one.
    fn layers(
        &mut self,
        tokens: &[u32],
        ends_prompt: bool,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<f32>, ForwardError> {
        let model = self.model;
        let hidden = model.config.hidden;
        let start = self.cache.tokens();
        let rotations = |rope: &Rope| (start..start + tokens.len()).map(|p| rope.rotation(p)).collect();
        let rotations = Rotations {
            model: rotations(&model.rope),
            local: model.local_rope.as_ref().map(rotations).unwrap_or_default(),
        };
        let mut x = vec![0.0; tokens.len() * hidden];
        for (&token, row) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
            model.embed.row(token as usize, row);
            scale(row, model.config.embed_scale);
        }
        for (l, layer) in model.layers.iter().enumerate() {
            self.attention(l, layer, &rotations, &mut x)?;
            if ends_prompt {
                let start = Instant::now();
                self.cache.end_prompt(self.pool, l);
                self.attention += start.elapsed();
            }
            for block in x.chunks_mut(BLOCK_TOKENS * hidden) {
                self.feed_forward(layer, block);
            }
            done(l + 1);
        }
        Ok(x)
    }

    /// `x += norm(wo * attention(norm(x)))`, the outer norm where the layer has one.
    fn attention(
        &mut self,
        l: usize,
        layer: &Layer,
        rotations: &Rotations,
        x: &mut [f32],
    ) -> Result<(), ForwardError> {
        let config = &self.model.config;
        let (tokens, d) = (x.len() / config.hidden, config.head_dim);
        let mut q = vec![0.0; tokens * config.heads * d];
        let mut k = vec![0.0; tokens * config.kv_heads * d];
        let mut v = k.clone();
        let normed = self.norm(x, &layer.attn_norm);
        self.multiply(&normed, &mut [(&layer.wq, &mut q), (&layer.wk, &mut k), (&layer.wv, &mut v)]);
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
        let start = Instant::now();
        self.cache.append(self.pool, l, &k, &v)?;
        let mut out = vec![0.0; q.len()];
        self.cache.attend(self.pool, l, &q, &mut out);
        self.attention += start.elapsed();
        self.add_product((&layer.wo, layer.post_attn_norm.as_deref()), &out, x);
        Ok(())
    }

    /// `x += norm(down * (silu(gate * norm(x)) * (up * norm(x))))`, the outer norm where the layer has one; for
    /// Gemma, GELU in place of SiLU.
    fn feed_forward(&self, layer: &Layer, x: &mut [f32]) {
        let ffn = self.model.config.ffn;
        let tokens = x.len() / self.model.config.hidden;
        let normed = self.norm(x, &layer.ffn_norm);
        let (mut gate, mut up) = (vec![0.0; tokens * ffn], vec![0.0; tokens * ffn]);
        self.multiply(&normed, &mut [(&layer.gate, &mut gate), (&layer.up, &mut up)]);
        let activate = match self.model.config.architecture {
            Architecture::Gemma3 => gelu_gate,
            _ => silu_gate,
        };
        each_row(self.pool, &mut gate, ffn, |t, gate| activate(self.isa, gate, &up[t * ffn..][..ffn]));
        self.add_product((&layer.down, layer.post_ffn_norm.as_deref()), &gate, x);
    }

    /// Each output `[T, rows] = x[T, cols] W^T`.
    fn multiply(&self, x: &[f32], parts: &mut [(&Matrix, &mut [f32])]) {
        multiply_each(self.precision, self.isa, self.pool, x, parts);
    }

    /// `x += norm(w * y)`, or without a norm `x += w * y`
    fn add_product(&self, (w, norm): (&Matrix, Option<&[f32]>), y: &[f32], x: &mut [f32]) {
        let mut out = vec![0.0; x.len()];
        self.multiply(y, &mut [(w, &mut out)]);
        if let Some(weight) = norm {
            let eps = self.model.config.norm_eps;
            each_row(self.pool, &mut out, weight.len(), |_, row| rms_norm(row, weight, eps));
        }
        x.iter_mut().zip(&out).for_each(|(x, y)| *x += y);
    }

    /// RMSNorm of every row of `x`.
    fn norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        let eps = self.model.config.norm_eps;
        each_row(self.pool, &mut out, weight.len(), |_, row| rms_norm(row, weight, eps));
        out
    }

    /// Logits `[T, vocab]` of the residual stream `[T, hidden]`.
    fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>, ForwardError> {
        let normed = self.norm(hidden, &self.model.norm);
        let head = self.model.head.as_ref().unwrap_or(&self.model.embed);
        let mut logits = vec![0.0; hidden.len() / self.model.config.hidden * self.model.config.vocab];
        self.multiply(&normed, &mut [(head, &mut logits)]);
        if logits.iter().all(|x| x.is_finite()) { Ok(logits) } else { Err(ForwardError::NotFinite) }
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

/// Calls `body(t, row)` for each row, spread over the pool where there are enough to be worth a join.
fn each_row(pool: &Pool, x: &mut [f32], row: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    const ROWS: usize = 16;
    if x.len() <= ROWS * row {
        x.chunks_exact_mut(row).enumerate().for_each(|(t, row)| body(t, row));
    } else {
        pool.for_each_chunk(x, ROWS * row, |i, rows| {
            rows.chunks_exact_mut(row).enumerate().for_each(|(t, row)| body(i * ROWS + t, row));
        });
    }
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

/// The most probable token; the first of equals.
pub fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[best] {
            best = i;
        }
    }
    best as u32
}
