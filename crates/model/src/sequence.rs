//! How does a sequence grow? Prompts, steps and scores of one sequence, and steps of several together.
//!
//! A prompt goes through the layers one after the other, all its tokens together, so that only one layer of a prompt (of
//! up to 8,192 tokens) is uncompressed at a time. What a layer remembers, and how attention reads it, is the KV
//! cache's business.

mod on_device;

use crate::forward::{BLOCK_TOKENS, Forward, Projected};
use crate::weights::Model;
use mosaickv_kernels::matrix::Precision;
use mosaickv_kernels::{Isa, Pool};
use mosaickv_kv::device::Mirror;
use mosaickv_kv::{
    Background, KvCache, KvError, KvFormat, KvShape, Timing, append_each, attend_each, tend_each,
};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tokens of a prompt that go through the layers together; bounds the activations' memory.
const CHUNK_TOKENS: usize = 8192;

/// Tokens after a compressed prompt that share a pass: the weights are read once for all of them.
const STEPS_TOGETHER: usize = 256;

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
    /// What a GPU holds of it, if the model is on one.
    mirror: Option<Mirror>,
    attention: Duration,
}

/// What one sequence reads in a pass that it shares with others.
pub struct Share<'s, 'a> {
    /// Who reads.
    pub sequence: &'s mut Sequence<'a>,
    /// Its next tokens, at least one.
    pub tokens: &'s [u32],
    /// What these tokens are to the sequence.
    pub part: Part,
    /// After which of them logits are wanted.
    pub wanted: Wanted,
}

impl Share<'_, '_> {
    /// The first of its tokens after which logits are wanted.
    fn first_wanted(&self) -> usize {
        match self.wanted {
            Wanted::Nothing => self.tokens.len(),
            Wanted::Last => self.tokens.len() - 1,
            Wanted::All => 0,
        }
    }
}

/// What the tokens of a pass are to their sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Tokens after a prompt: each reads what is compressed, as if it came alone.
    Step,
    /// The beginning or the middle of a prompt.
    Prompt,
    /// The last of a prompt's tokens: then it is to be compressed, which [`Sequence::finish_prompt`] ends.
    PromptEnd,
}

/// After which tokens of a share the logits are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None: what follows is known.
    Nothing,
    /// The last one.
    Last,
    /// Each of them.
    All,
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
    /// The GPU did.
    #[error(transparent)]
    Device(#[from] mosaickv_kernels::cuda::Error),
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
        Sequence::with_cache(model, pool, KvCache::new(model.kv_shape(), format)?)
    }

    /// A sequence that has read what is in a cache of this model.
    pub fn with_cache(model: &'a Model, pool: &'a Pool, cache: KvCache) -> Result<Sequence<'a>, KvError> {
        let (got, wanted) = (cache.shape(), model.kv_shape());
        if got != wanted {
            return Err(KvError::OtherShape { got, wanted });
        }
        let format = cache.format();
        let cache = match (&model.calibration, format) {
            (Some(calibration), _) => cache.with_calibration(calibration.clone())?,
            (None, KvFormat::Layered(_)) => {
                return Err(KvError::NoCalibration { format: format.to_string() });
            }
            (None, _) => cache,
        };
        let mirror = match &model.device {
            Some(device) => {
                Mirror::check(format)?;
                Some(device.mirror())
            }
            None => None,
        };
        Ok(Sequence {
            model,
            mirror,
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

    /// The same, and it remembers which tokens are in which pages: see [`KvCache::remember_places`].
    pub fn remember_places(mut self) -> Sequence<'a> {
        self.cache = self.cache.remember_places();
        self
    }

    /// A copy that goes on from the same tokens with its cache in another format; this one must be exact. Nothing of
    /// the prompt is computed again.
    pub fn compressed(&self, format: KvFormat) -> Result<Sequence<'a>, KvError> {
        let start = Instant::now();
        self.check_device(format)?;
        let cache = self.cache.compressed(self.pool, format)?;
        let mirror = self.mirror.clone();
        Ok(Sequence { cache, mirror, attention: self.attention + start.elapsed(), ..*self })
    }

    /// The same with one layer compressed and the others exact.
    pub fn compressed_layer(&self, layer: usize, format: KvFormat) -> Result<Sequence<'a>, KvError> {
        let start = Instant::now();
        self.check_device(format)?;
        let cache = self.cache.compressed_layer(self.pool, layer, format)?;
        let mirror = self.mirror.clone();
        Ok(Sequence { cache, mirror, attention: self.attention + start.elapsed(), ..*self })
    }

    /// Whether the model, where it is on a GPU, attends to caches in this format there.
    fn check_device(&self, format: KvFormat) -> Result<(), KvError> {
        if self.mirror.is_some() { Mirror::check(format) } else { Ok(()) }
    }

    /// A copy that reads as if its compressed prompt were there `times` times on the GPU, or before its exact tokens `pages` pages of others:
    /// see [`Mirror::stretched`].
    pub fn stretched(&self, times: usize, pages: usize) -> Sequence<'a> {
        let mirror = self.mirror.as_ref().map(|mirror| mirror.stretched(times, pages));
        Sequence { mirror, ..self.clone() }
    }

    /// Bytes that a GPU holds of it in compressed pages.
    pub fn device_bytes(&self) -> usize {
        self.mirror.as_ref().map_or(0, Mirror::bytes)
    }

    /// Whose it is.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// What it remembers.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Bytes that attention has read from its cache, see [`KvCache::bytes_read`]; on a GPU nobody counts.
    pub fn bytes_read(&self) -> Option<u64> {
        self.mirror.is_none().then(|| self.cache.bytes_read())
    }

    /// Time spent in the cache so far: storing keys and values, compressing, and attention. A step that several
    /// sequences take together counts in each of them.
    pub fn attention_time(&self) -> Duration {
        self.attention
    }

    /// Reads a whole prompt, compresses it layer by layer as the format says, and returns the logits `[vocab]`
    /// that follow its last token. `progress` is called with layers done and layers in all. After a compressed
    /// prompt the tokens of a further one are [steps](Part::Step).
    pub fn prefill(
        &mut self,
        prompt: &[u32],
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<f32>, ForwardError> {
        assert!(!prompt.is_empty(), "a prompt needs at least one token");
        self.check(prompt)?;
        if self.cache.is_compressed() {
            let (mut logits, mut done) = (vec![], 0);
            for tokens in prompt.chunks(STEPS_TOGETHER) {
                done += tokens.len();
                let wanted = if done == prompt.len() { Wanted::Last } else { Wanted::Nothing };
                let share = Share { sequence: self, tokens, part: Part::Step, wanted };
                read_each(&mut [share], &mut |_, _, of_last| logits = of_last.to_vec())?;
                progress(done, prompt.len());
            }
            return Ok(logits);
        }
        let chunks = prompt.len().div_ceil(CHUNK_TOKENS);
        let layers = self.model.layers.len();
        let mut logits = vec![];
        for (i, tokens) in prompt.chunks(CHUNK_TOKENS).enumerate() {
            let is_last = i + 1 == chunks;
            let (part, wanted) =
                if is_last { (Part::PromptEnd, Wanted::Last) } else { (Part::Prompt, Wanted::Nothing) };
            let report = &mut |layer| progress(i * layers + layer, chunks * layers);
            let share = Share { sequence: self, tokens, part, wanted };
            read_shares(&mut [share], report, &mut |_, _, of_last| logits = of_last.to_vec())?;
        }
        // The last layer was encoded meanwhile.
        self.finish_prompt();
        Ok(logits)
    }

    /// Waits until every layer of a prompt that was read to its [end](Part::PromptEnd) is compressed.
    pub fn finish_prompt(&mut self) {
        let start = Instant::now();
        if self.mirror.is_some() {
            self.begin_on(self.pool.threads());
        }
        self.cache.finish_prompt(self.pool);
        self.attention += start.elapsed();
    }

    /// Begins that beside what follows, on half of the threads: see [`KvCache::begin_finish_prompt`].
    pub fn begin_finish_prompt(&mut self) -> bool {
        self.begin_on((self.pool.threads() / 2).max(1))
    }

    fn begin_on(&mut self, threads: usize) -> bool {
        let device = self.model.device.as_ref().zip(self.mirror.as_ref());
        self.cache.begin_finish_prompt(threads, |cache| {
            device.and_then(|(device, mirror)| mirror.encoder(&device.lock().store, cache))
        })
    }

    /// No further prompt will come: see [`KvCache::forget_queries`].
    pub fn forget_queries(&mut self) {
        self.cache.forget_queries();
    }

    /// Compresses what is compressed harder: see [`KvCache::compress_harder`].
    pub fn compress_harder(&mut self, ratio: f32) -> bool {
        let start = Instant::now();
        let is_smaller = self.cache.compress_harder(self.pool, ratio);
        self.attention += start.elapsed();
        is_smaller
    }

    /// Reads one more token, whatever follows it.
    pub fn feed(&mut self, token: u32) -> Result<(), ForwardError> {
        feed_each(&mut [self], &[token])
    }

    /// Reads one more token and returns the logits `[vocab]` that follow it.
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>, ForwardError> {
        step_each(&mut [self], &[token])
    }

    /// Reads tokens as one exact chunk and calls `each(i, logits)` with the logits `[vocab]` that follow every
    /// one of them. Compresses nothing; after a compressed prompt the tokens are [steps](Part::Step).
    pub fn score(&mut self, tokens: &[u32], each: &mut dyn FnMut(usize, &[f32])) -> Result<(), ForwardError> {
        self.check(tokens)?;
        if tokens.is_empty() {
            return Ok(());
        }
        if self.cache.is_compressed() {
            for (i, tokens) in tokens.chunks(STEPS_TOGETHER).enumerate() {
                let share = Share { sequence: self, tokens, part: Part::Step, wanted: Wanted::All };
                read_each(&mut [share], &mut |_, t, logits| each(i * STEPS_TOGETHER + t, logits))?;
            }
            return Ok(());
        }
        let share = Share { sequence: self, tokens, part: Part::Prompt, wanted: Wanted::All };
        read_each(&mut [share], &mut |_, i, logits| each(i, logits))
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
}

/// A pass that several sequences of one model share: each reads its next tokens, and `each(share, token, logits)` gets the
/// logits `[vocab]` that follow those tokens where they are wanted, in order. The weights are read once for all of them, and with
/// activations of 8 bits each row is to the bit what the sequence alone gives. A prompt that is read in chunks gives the same
/// to the bit as one that is read whole, if all chunks but the last are multiples of 64 tokens and the last is more than one.
/// Steps come before prompts in `shares`; a prompt that ended needs [`Sequence::finish_prompt`] before its next token. After an
/// error none of the sequences is of further use, unless the token or the context was refused: that leaves all as they were.
pub fn read_each(
    shares: &mut [Share],
    each: &mut dyn FnMut(usize, usize, &[f32]),
) -> Result<(), ForwardError> {
    let Some(first) = shares.first() else { return Ok(()) };
    let pass = first.sequence.pass();
    assert!(shares.is_sorted_by_key(|share| share.part != Part::Step), "a prompt before a step");
    for Share { sequence, tokens, .. } in &*shares {
        assert!(std::ptr::eq(sequence.model, pass.model), "sequences of different models");
        assert!(!tokens.is_empty(), "a share without tokens");
        sequence.check(tokens)?;
    }
    read_shares(shares, &mut |_| (), each)
}

/// The same of shares that were checked; `done` is called with the layers that are done.
fn read_shares(
    shares: &mut [Share],
    done: &mut dyn FnMut(usize),
    each: &mut dyn FnMut(usize, usize, &[f32]),
) -> Result<(), ForwardError> {
    let Some(first) = shares.first() else { return Ok(()) };
    let pass = first.sequence.pass();
    if let Some(device) = &pass.model.device {
        return on_device::read(device, shares, done, each);
    }
    let hidden = layers_each(shares, done)?;
    let (width, vocab) = (pass.model.config.hidden, pass.model.config.vocab);
    let wanted = shares.iter().enumerate().flat_map(|(i, share)| {
        let first = share.first_wanted();
        (0..share.tokens.len()).map(move |t| (i, t, t >= first))
    });
    let rows = wanted.zip(hidden.chunks_exact(width));
    let rows: Vec<_> = rows.filter(|((_, _, is_wanted), _)| *is_wanted).collect();
    let together = (BLOCK_LOGITS / vocab).clamp(1, BLOCK_TOKENS);
    for block in rows.chunks(together) {
        let hidden: Vec<f32> = block.iter().flat_map(|(_, row)| *row).copied().collect();
        let logits = pass.logits(&hidden)?;
        for (((share, token, _), _), logits) in block.iter().zip(logits.chunks_exact(vocab)) {
            each(*share, *token, logits);
        }
    }
    Ok(())
}

/// Reads one more token in each of several sequences, `tokens[i]` in `sequences[i]`, and returns the logits `[B, vocab]` that
/// follow: [`read_each`] of steps.
pub fn step_each(sequences: &mut [&mut Sequence], tokens: &[u32]) -> Result<Vec<f32>, ForwardError> {
    read_one_each(sequences, tokens, Wanted::Last)
}

/// The same without the logits.
pub fn feed_each(sequences: &mut [&mut Sequence], tokens: &[u32]) -> Result<(), ForwardError> {
    read_one_each(sequences, tokens, Wanted::Nothing).map(|_| ())
}

fn read_one_each(
    sequences: &mut [&mut Sequence],
    tokens: &[u32],
    wanted: Wanted,
) -> Result<Vec<f32>, ForwardError> {
    assert_eq!(sequences.len(), tokens.len(), "a token for each sequence");
    let mut all = Vec::new();
    let shares = sequences.iter_mut().zip(tokens.chunks(1));
    let shares = shares.map(|(sequence, tokens)| Share { sequence, tokens, part: Part::Step, wanted });
    read_each(&mut shares.collect::<Vec<_>>(), &mut |_, _, logits| all.extend_from_slice(logits))?;
    Ok(all)
}

/// The residual stream `[T, hidden]` of what each sequence reads after all layers, one share after the other. `done` is called with
/// the layers that are done.
fn layers_each(shares: &mut [Share], done: &mut dyn FnMut(usize)) -> Result<Vec<f32>, ForwardError> {
    let Some(first) = shares.first() else { return Ok(Vec::new()) };
    let pass = first.sequence.pass();
    let tokens: Vec<u32> = shares.iter().flat_map(|share| share.tokens).copied().collect();
    let positions = shares.iter().flat_map(|share| {
        let start = share.sequence.cache.tokens();
        start..start + share.tokens.len()
    });
    let positions: Vec<usize> = positions.collect();
    let hidden = pass.layers(&tokens, positions.iter().copied(), &mut |l, projected, out| {
        let start = Instant::now();
        attend(shares, l, projected, out)?;
        for share in shares.iter_mut().filter(|share| share.part == Part::PromptEnd) {
            share.sequence.cache.begin_end_prompt(l);
        }
        let took = start.elapsed();
        shares.iter_mut().for_each(|share| share.sequence.attention += took);
        done(l + 1);
        Ok(())
    })?;
    let start = Instant::now();
    let (steps, _) = steps_and_prompts(shares);
    let mut caches: Vec<_> = steps.iter_mut().map(|share| &mut share.sequence.cache).collect();
    tend_each(&mut caches, pass.pool);
    let took = start.elapsed();
    steps.iter_mut().for_each(|share| share.sequence.attention += took);
    Ok(hidden)
}

/// The steps of a pass, which come first, and its prompts.
fn steps_and_prompts<'s, 'a, 'b>(
    shares: &'s mut [Share<'a, 'b>],
) -> (&'s mut [Share<'a, 'b>], &'s mut [Share<'a, 'b>]) {
    shares.split_at_mut(shares.partition_point(|share| share.part == Part::Step))
}

/// Stores a layer's keys and values, and attends: the steps of all sequences together, and prompts one by one.
fn attend(
    shares: &mut [Share],
    l: usize,
    projected: &Projected,
    out: &mut [f32],
) -> Result<(), ForwardError> {
    let Some(first) = shares.first() else { return Ok(()) };
    let (pool, shape) = (first.sequence.pool, first.sequence.cache.shape());
    let rows = Rows {
        of_keys: shape.kv_heads * shape.head_dim,
        of_queries: shape.heads * shape.head_dim,
        projected,
    };
    let (steps, prompts) = steps_and_prompts(shares);
    let mut row = attend_steps(steps, (pool, l), &rows, out)?;
    for Share { sequence, tokens, .. } in prompts {
        let count = tokens.len();
        let (keys, values, queries) = rows.of(row..row + count);
        sequence.cache.append(pool, l, keys, values)?;
        sequence.cache.attend(pool, l, queries, &mut out[row * rows.of_queries..][..count * rows.of_queries]);
        row += count;
    }
    Ok(())
}

/// What a layer projected, by tokens.
struct Rows<'p> {
    of_keys: usize,
    of_queries: usize,
    projected: &'p Projected<'p>,
}

impl Rows<'_> {
    /// Keys, values and queries of some tokens.
    fn of(&self, tokens: Range<usize>) -> (&[f32], &[f32], &[f32]) {
        let part = |width: usize| tokens.start * width..tokens.end * width;
        let (of_keys, of_queries) = (part(self.of_keys), part(self.of_queries));
        let Projected { keys, values, queries, .. } = self.projected;
        (&keys[of_keys.clone()], &values[of_keys], &queries[of_queries])
    }
}

/// One token of each sequence after the other, those of all sequences side by side: each sees what it would see alone, to the
/// bit. Returns how many tokens that were.
fn attend_steps(
    steps: &mut [Share],
    (pool, l): (&Pool, usize),
    rows: &Rows,
    out: &mut [f32],
) -> Result<usize, ForwardError> {
    if steps.iter().all(|share| share.tokens.len() == 1) {
        // Their rows follow each other already.
        let count = steps.len();
        let (keys, values, queries) = rows.of(0..count);
        let mut caches: Vec<_> = steps.iter_mut().map(|share| &mut share.sequence.cache).collect();
        append_each(&mut caches, pool, l, keys, values)?;
        attend_each(&mut caches, pool, l, queries, &mut out[..count * rows.of_queries]);
        return Ok(count);
    }
    let most = steps.iter().map(|share| share.tokens.len()).max().unwrap_or(0);
    let (mut keys, mut values, mut queries, mut attended) = (vec![], vec![], vec![], vec![]);
    for t in 0..most {
        let (mut caches, mut places, mut first) = (vec![], vec![], 0);
        [&mut keys, &mut values, &mut queries].into_iter().for_each(Vec::clear);
        for Share { sequence, tokens, .. } in steps.iter_mut() {
            if t < tokens.len() {
                if t > 0 {
                    sequence.cache.tend(l);
                }
                let (key, value, query) = rows.of(first + t..first + t + 1);
                keys.extend_from_slice(key);
                values.extend_from_slice(value);
                queries.extend_from_slice(query);
                caches.push(&mut sequence.cache);
                places.push(first + t);
            }
            first += tokens.len();
        }
        append_each(&mut caches, pool, l, &keys, &values)?;
        attended.resize(queries.len(), 0.0);
        attend_each(&mut caches, pool, l, &queries, &mut attended);
        for (place, from) in places.into_iter().zip(attended.chunks_exact(rows.of_queries)) {
            out[place * rows.of_queries..][..rows.of_queries].copy_from_slice(from);
        }
    }
    Ok(steps.iter().map(|share| share.tokens.len()).sum())
}

/// The most probable token; the first of equals.
pub fn greedy(logits: &[f32]) -> u32 {
    const SOME: usize = 256;
    // Side by side, which is how a CPU looks at many.
    let most_of = |some: &[f32]| {
        let mut most = [f32::NEG_INFINITY; 16];
        for some in some.chunks(16) {
            most.iter_mut().zip(some).for_each(|(most, x)| *most = if *x > *most { *x } else { *most });
        }
        most.into_iter().fold(f32::NEG_INFINITY, f32::max)
    };
    let (mut most, mut start) = (f32::NEG_INFINITY, 0);
    for (i, some) in logits.chunks(SOME).enumerate() {
        let here = most_of(some);
        if here > most {
            (most, start) = (here, i * SOME);
        }
    }
    let place = logits[start..].iter().position(|x| *x == most);
    place.map_or(0, |place| (start + place) as u32)
}
