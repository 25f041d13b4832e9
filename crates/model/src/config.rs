//! What shape does the model have? One description for both file formats, checked before any tensor is read.
//!
//! `config::gguf` and `config::hf` fill it in; nothing after them looks at a file's keys again.

pub(crate) mod gguf;
pub(crate) mod hf;

use mosaickv_kv::Window;

use crate::ModelError;
use crate::rope::{RopeConfig, RopeScaling};

pub(crate) const SUPPORTED: &str =
    "llama (SmolLM2 too), mistral, qwen2 (Qwen2.5 too), qwen3, smollm3, gemma3 (text)";

/// A supported family. All are RMSNorm, rotary grouped-query attention and a gated feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2, and everything that is saved as one of them.
    Llama,
    /// Llama with an optional sliding window.
    Mistral,
    /// With biases on queries, keys and values.
    Qwen2,
    /// With an RMSNorm on every query and key head.
    Qwen3,
    /// Every fourth layer without rotary embedding.
    SmolLm3,
    /// Scaled embeddings, an RMSNorm before and after attention and feed-forward and on every query and key head,
    /// a GELU gate, and sliding windows with a rotary base of their own in five of six layers.
    Gemma3,
}

impl Architecture {
    /// The name the error messages use.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::SmolLm3 => "smollm3",
            Architecture::Gemma3 => "gemma3",
        }
    }
}

/// The model's sizes and constants.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// What the file calls itself; may be empty.
    pub name: String,
    /// The family.
    pub architecture: Architecture,
    /// `L`.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// `H`, query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// `G`, KV heads.
    pub kv_heads: usize,
    /// `D`, a multiple of 16; `heads * head_dim` may differ from `hidden`.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Rows of the embedding; at least the tokenizer's vocabulary.
    pub vocab: usize,
    /// Added to the mean square in every RMSNorm.
    pub norm_eps: f32,
    /// Most tokens the model can attend to.
    pub context: usize,
    /// What the token embedding is multiplied with.
    pub embed_scale: f32,
    /// What the scores of attention are multiplied with, usually `1 / sqrt(D)`.
    pub attention_scale: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Rotary embedding of the layers with a sliding window, where it is another one.
    pub local_rope: Option<RopeConfig>,
    /// Layers whose queries see only the newest tokens.
    pub sliding_window: Option<Window>,
    /// `[L]`: whether the layer turns queries and keys at all.
    pub rope_layers: Vec<bool>,
}

/// Limits that no real model reaches; they bound what a damaged file can make the loader allocate.
const MOST_LAYERS: usize = 1024;
const WIDEST: usize = 1 << 20;
const MOST_HEADS: usize = 4096;
const WIDEST_HEAD: usize = 1024;
const LARGEST_VOCAB: usize = 1 << 23;

impl ModelConfig {
    /// Refuses sizes that contradict each other or exceed every real model. Called before `rope_layers` is filled.
    fn check(&self) -> Result<(), ModelError> {
        within("layers", self.layers, MOST_LAYERS)?;
        within("hidden size", self.hidden, WIDEST)?;
        within("feed-forward size", self.ffn, WIDEST)?;
        within("query heads", self.heads, MOST_HEADS)?;
        within("KV heads", self.kv_heads, MOST_HEADS)?;
        within("head_dim", self.head_dim, WIDEST_HEAD)?;
        within("vocabulary", self.vocab, LARGEST_VOCAB)?;
        within("context", self.context, 1 << 32)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(refuse(
                "query heads",
                self.heads,
                format!("a multiple of {} KV heads", self.kv_heads),
            ));
        }
        if !self.head_dim.is_multiple_of(16) {
            return Err(refuse("head_dim", self.head_dim, "a multiple of 16"));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return Err(refuse("norm epsilon", self.norm_eps, "a finite number, at least 0"));
        }
        if self.sliding_window.is_some_and(|window| window.tokens == 0) {
            return Err(refuse("sliding window", 0, "at least 1"));
        }
        if self.sliding_window.is_some_and(|window| window.full_every == Some(0)) {
            return Err(refuse("sliding window pattern", 0, "at least 1"));
        }
        if !(self.attention_scale.is_finite() && self.attention_scale > 0.0) {
            return Err(refuse("attention scale", self.attention_scale, "a finite number above 0"));
        }
        self.check_rope(&self.rope)?;
        self.local_rope.as_ref().map_or(Ok(()), |rope| self.check_rope(rope))
    }

    fn check_rope(&self, rope: &RopeConfig) -> Result<(), ModelError> {
        if !(rope.theta.is_finite() && rope.theta > 1.0) {
            return Err(refuse("rope theta", rope.theta, "a finite number above 1"));
        }
        if rope.dims < 4 || !rope.dims.is_multiple_of(2) || rope.dims > self.head_dim {
            return Err(refuse(
                "rope dimensions",
                rope.dims,
                format!("an even number from 4 to {}", self.head_dim),
            ));
        }
        let positive = |what: &str, x: f64| match x.is_finite() && x > 0.0 {
            true => Ok(()),
            false => Err(refuse(&format!("rope scaling {what}"), x, "a finite number above 0")),
        };
        match rope.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("factor", factor),
            RopeScaling::Ntk { factor, original_context, .. } => {
                positive("factor", factor)?;
                positive("original context", original_context as f64)
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
                positive("factor", factor)?;
                positive("original context", original_context as f64)?;
                positive("beta_fast", beta_fast)?;
                positive("beta_slow", beta_slow)?;
                positive("attention factor", attention_factor)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("high_freq_factor - low_freq_factor", high_freq_factor - low_freq_factor)?;
                positive("original context", original_context as f64)
            }
        }
    }
}

fn within(key: &str, got: usize, most: usize) -> Result<(), ModelError> {
    if (1..=most).contains(&got) { Ok(()) } else { Err(refuse(key, got, format!("1 to {most}"))) }
}

pub(crate) fn refuse(key: &str, got: impl ToString, wanted: impl Into<String>) -> ModelError {
    ModelError::Config { key: key.to_owned(), got: got.to_string(), wanted: wanted.into() }
}

/// The window of layers of which `windowed` ones have it: all, none, or all but every n-th.
fn periodic(
    key: &str,
    tokens: usize,
    windowed: &[bool],
    layers: usize,
) -> Result<Option<Window>, ModelError> {
    if windowed.len() != layers {
        return Err(refuse(
            key,
            format!("{} entries", windowed.len()),
            format!("one for each of {layers} layers"),
        ));
    }
    let Some(first_full) = windowed.iter().position(|&windowed| !windowed) else {
        return Ok(Some(Window { tokens, full_every: None }));
    };
    let every = first_full + 1;
    if windowed.iter().all(|&windowed| !windowed) {
        return Ok(None);
    }
    if (1..=layers).all(|layer| windowed[layer - 1] != layer.is_multiple_of(every)) {
        return Ok(Some(Window { tokens, full_every: Some(every) }));
    }
    let wanted = format!("every {every}th layer without a window, as the first that has none");
    Err(refuse(key, "some layers with and some without a window in no such order", wanted))
}

/// `1 / sqrt(scalar)`: the scale of attention.
fn inverse_root(scalar: f64) -> f32 {
    scalar.sqrt().recip() as f32
}

/// Gemma 3: every sixth layer sees everything, unless the file says otherwise.
const GEMMA3_FULL_EVERY: usize = 6;

/// Gemma 3's rotary base in layers with a sliding window.
const GEMMA3_LOCAL_THETA: f64 = 10_000.0;

/// SmolLM3's rule: every `step`-th layer has no rotary embedding.
fn all_but_every(layers: usize, step: usize) -> Vec<bool> {
    (1..=layers).map(|layer| layer % step != 0).collect()
}
