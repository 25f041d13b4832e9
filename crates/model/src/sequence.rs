//! How does a sequence grow? Prompts, steps and scores of one sequence, and steps of several together.
//!
//! A prompt goes through the layers one after the other, all its tokens together, so that only one layer of a prompt (of
//! up to 8,192 tokens) is uncompressed at a time. What a layer remembers, and how attention reads it, is the KV
//! cache's business.

use crate::forward::{BLOCK_TOKENS, Forward, Projected};
use crate::weights::Model;
use mosaickv_kernels::matrix::Precision;
use mosaickv_kernels::{Isa, Pool};
use mosaickv_kv::{Background, KvCache, KvError, KvFormat, KvShape, Timing, attend_each};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tokens of a prompt that go through the layers together; bounds the activations' memory.
const CHUNK_TOKENS: usize = 8192;

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
        let cache = match (&model.calibration, format) {
            (Some(calibration), _) => cache.with_calibration(calibration.clone())?,
            (None, KvFormat::Layered(_)) => {
                return Err(KvError::NoCalibration { format: format.to_string() });
            }
            (None, _) => cache,
        };
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

    /// The same, with strategies for what is generated worked out by a background thread instead of between steps.
    pub fn with_background(mut self, background: Arc<Background>, timing: Timing) -> Sequence<'a> {
        self.cache = self.cache.with_background(background, timing);
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

    /// Time spent in the cache so far: storing keys and values, compressing, and attention. A step that several
    /// sequences take together counts in each of them.
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
        // The last layer is encoded meanwhile.
        let logits = self.pass().logits(&last[last.len() - hidden..]);
        let start = Instant::now();
        self.cache.finish_prompt(self.pool);
        self.attention += start.elapsed();
        logits
    }

    /// Reads one more token, whatever follows it.
    pub fn feed(&mut self, token: u32) -> Result<(), ForwardError> {
        self.check(&[token])?;
        self.layers(&[token], false, &mut |_| ())?;
        self.between_steps();
        Ok(())
    }

    /// Reads one more token and returns the logits `[vocab]` that follow it.
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>, ForwardError> {
        self.check(&[token])?;
        let hidden = self.layers(&[token], false, &mut |_| ())?;
        self.between_steps();
        self.pass().logits(&hidden)
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
            for (i, logits) in self.pass().logits(block)?.chunks_exact(vocab).enumerate() {
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

    fn pass(&self) -> Forward<'a> {
        Forward { model: self.model, pool: self.pool, isa: self.isa, precision: self.precision }
    }

    /// The residual stream `[T, hidden]` of the next `tokens` after all layers.
    fn layers(
        &mut self,
        tokens: &[u32],
        ends_prompt: bool,
        done: &mut dyn FnMut(usize),
    ) -> Result<Vec<f32>, ForwardError> {
        let start = self.cache.tokens();
        self.pass().layers(tokens, start..start + tokens.len(), &mut |l, projected, out| {
            self.attend(l, projected, out)?;
            if ends_prompt {
                let start = Instant::now();
                self.cache.begin_end_prompt(l);
                self.attention += start.elapsed();
            }
            done(l + 1);
            Ok(())
        })
    }

    /// Between two passes: see [`KvCache::between_steps`].
    fn between_steps(&mut self) {
        let start = Instant::now();
        self.cache.between_steps();
        self.attention += start.elapsed();
    }

    /// Stores a layer's keys and values, and attends.
    fn attend(&mut self, l: usize, projected: &Projected, out: &mut [f32]) -> Result<(), ForwardError> {
        let start = Instant::now();
        self.cache.append(self.pool, l, &projected.keys, &projected.values)?;
        self.cache.attend(self.pool, l, &projected.queries, out);
        self.attention += start.elapsed();
        Ok(())
    }
}

/// Reads one more token in each of several sequences of one model, `tokens[i]` in `sequences[i]`, and returns the logits
/// `[B, vocab]` that follow. The weights are read once for all of them, and with activations of 8 bits each row is to the
/// bit what [`Sequence::step`] gives. After an error none of the sequences is of further use, unless the token or
/// the context was refused: that leaves all as they were.
pub fn step_each(sequences: &mut [&mut Sequence], tokens: &[u32]) -> Result<Vec<f32>, ForwardError> {
    let Some(first) = sequences.first() else { return Ok(Vec::new()) };
    let pass = first.pass();
    pass.logits(&layers_each(sequences, tokens)?)
}

/// The same without the logits.
pub fn feed_each(sequences: &mut [&mut Sequence], tokens: &[u32]) -> Result<(), ForwardError> {
    layers_each(sequences, tokens).map(|_| ())
}

/// The residual stream `[B, hidden]` of one more token in each sequence.
fn layers_each(sequences: &mut [&mut Sequence], tokens: &[u32]) -> Result<Vec<f32>, ForwardError> {
    assert_eq!(sequences.len(), tokens.len(), "a token for each sequence");
    let Some(first) = sequences.first() else { return Ok(Vec::new()) };
    let (pass, shape) = (first.pass(), first.cache.shape());
    for (sequence, &token) in sequences.iter().zip(tokens) {
        assert!(std::ptr::eq(sequence.model, pass.model), "sequences of different models");
        sequence.check(&[token])?;
    }
    let of_keys = shape.kv_heads * shape.head_dim;
    let positions: Vec<usize> = sequences.iter().map(|sequence| sequence.cache.tokens()).collect();
    let hidden = pass.layers(tokens, positions.iter().copied(), &mut |l, all, out| {
        let start = Instant::now();
        let rows = all.keys.chunks_exact(of_keys).zip(all.values.chunks_exact(of_keys));
        for (sequence, (keys, values)) in sequences.iter_mut().zip(rows) {
            sequence.cache.append(pass.pool, l, keys, values)?;
        }
        let mut caches: Vec<&mut KvCache> =
            sequences.iter_mut().map(|sequence| &mut sequence.cache).collect();
        attend_each(&mut caches, pass.pool, l, &all.queries, out);
        let waited = start.elapsed();
        sequences.iter_mut().for_each(|sequence| sequence.attention += waited);
        Ok(())
    })?;
    sequences.iter_mut().for_each(|sequence| sequence.between_steps());
    Ok(hidden)
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
