//! What computes: a model, or in simulations a stand-in.

use mosaickv_kernels::Pool;
use mosaickv_kv::{Background, KvCache, KvFormat, KvShape, Timing};
use mosaickv_model::{Model, Part, Sequence, Share, Wanted, read_each};
use std::sync::Arc;

/// What one sequence reads in a pass: see [`Share`].
pub struct Reading<'s, S> {
    /// Who reads.
    pub sequence: &'s mut S,
    /// Its next tokens.
    pub tokens: &'s [u32],
    /// What they are to it.
    pub part: Part,
    /// After which of them logits are wanted.
    pub wanted: Wanted,
}

/// What an engine computes with.
pub trait Compute {
    /// What is remembered of a sequence. A clone goes on from the same tokens.
    type Sequence: Clone;

    /// Tokens that a sequence may have.
    fn context(&self) -> usize;

    /// Ids are less than this.
    fn vocab(&self) -> usize;

    /// An empty sequence, or why there can be none in this format.
    fn begin(&self, kv: KvFormat) -> Result<Self::Sequence, String>;

    /// An empty exact sequence of which compressed copies can be made.
    fn begin_exact(&self) -> Result<Self::Sequence, String>;

    /// A copy of such a sequence, after its prompt, compressed as if it had been begun in this format.
    fn compressed(&self, exact: &Self::Sequence, kv: KvFormat) -> Result<Self::Sequence, String>;

    /// Bytes that a prompt of so many tokens takes at most until it is compressed, and while it is.
    fn prompt_bytes(&self, kv: KvFormat, tokens: usize) -> usize;

    /// Bytes that a sequence takes at most in addition when it reads so many tokens after its prompt.
    fn growth_bytes(&self, kv: KvFormat, tokens: usize) -> usize;

    /// Bytes of so many tokens as f16.
    fn exact_bytes(&self, tokens: usize) -> usize;

    /// A pass: see [`read_each`].
    fn read(
        &self,
        readings: Vec<Reading<Self::Sequence>>,
        each: &mut dyn FnMut(usize, usize, &[f32]),
    ) -> Result<(), String>;

    /// Compresses a prompt that was read to its end, or waits until it is compressed, if that was begun.
    fn compress(&self, sequence: &mut Self::Sequence);

    /// Begins that beside what others read; `false` if there is not enough to do. Until [`compress`](Compute::compress) the sequence
    /// can't be used, nor its bytes be counted.
    fn begin_compress(&self, sequence: &mut Self::Sequence) -> bool;

    /// Whether what was begun goes on.
    fn is_compressing(&self, sequence: &Self::Sequence) -> bool;

    /// Bytes that compressing a sequence harder, to about this ratio, saves, if it can be and they are worth it.
    fn excess(&self, sequence: &Self::Sequence, ratio: f32) -> Option<usize>;

    /// Does that, where there is an excess.
    fn compress_harder(&self, sequence: &mut Self::Sequence, ratio: f32);

    /// Bytes allocated for a sequence, without those that it shares with the one that it is a clone of, if that is given.
    fn bytes(&self, sequence: &Self::Sequence, beside: Option<&Self::Sequence>) -> usize;

    /// Bytes that attention has read of it, if somebody counts.
    fn read_bytes(&self, sequence: &Self::Sequence) -> Option<u64>;

    /// A clone of its keys and values.
    fn cache(&self, sequence: &Self::Sequence) -> KvCache;

    /// A sequence that has read what is in a cache, or why it can't be one of this model.
    fn adopt(&self, cache: KvCache) -> Result<Self::Sequence, String>;
}

/// A model on some threads.
pub struct ModelCompute<'a> {
    model: &'a Model,
    pool: &'a Pool,
    background: Arc<Background>,
    remember_places: bool,
}

impl<'a> ModelCompute<'a> {
    /// Strategies and plans for what is generated are worked out in the background.
    pub fn new(model: &'a Model, pool: &'a Pool, background: Arc<Background>) -> ModelCompute<'a> {
        ModelCompute { model, pool, background, remember_places: false }
    }

    /// The same, whose sequences in the layered format remember which tokens are in which pages, if that is so.
    pub fn remember_places(self, remember_places: bool) -> ModelCompute<'a> {
        ModelCompute { remember_places, ..self }
    }

    fn placed(&self, sequence: Sequence<'a>) -> Sequence<'a> {
        if self.remember_places { sequence.remember_places() } else { sequence }
    }

    fn shape(&self) -> KvShape {
        self.model.kv_shape()
    }

    /// Fixed: what a request gets must not depend on how busy the machine is.
    fn in_background(&self, sequence: Sequence<'a>) -> Sequence<'a> {
        sequence.with_background(self.background.clone(), Timing::Fixed)
    }
}

impl<'a> Compute for ModelCompute<'a> {
    type Sequence = Sequence<'a>;

    fn context(&self) -> usize {
        self.model.context()
    }

    fn vocab(&self) -> usize {
        self.model.config.vocab
    }

    fn begin(&self, kv: KvFormat) -> Result<Sequence<'a>, String> {
        let sequence = Sequence::new(self.model, self.pool, kv).map_err(|error| error.to_string())?;
        Ok(self.in_background(self.placed(sequence)))
    }

    fn begin_exact(&self) -> Result<Sequence<'a>, String> {
        let exact =
            Sequence::new(self.model, self.pool, KvFormat::Exact).map_err(|error| error.to_string())?;
        Ok(self.placed(exact.remember_queries()))
    }

    fn compressed(&self, exact: &Sequence<'a>, kv: KvFormat) -> Result<Sequence<'a>, String> {
        Ok(self.in_background(exact.compressed(kv).map_err(|error| error.to_string())?))
    }

    fn prompt_bytes(&self, kv: KvFormat, tokens: usize) -> usize {
        let KvShape { layers, kv_heads, .. } = self.shape();
        let places = match kv {
            KvFormat::Layered(_) if self.remember_places => layers * kv_heads * tokens * size_of::<u32>(),
            _ => 0,
        };
        kv.most_prompt_bytes(self.shape(), tokens) + places
    }

    fn growth_bytes(&self, kv: KvFormat, tokens: usize) -> usize {
        kv.most_growth_bytes(self.shape(), tokens)
    }

    fn exact_bytes(&self, tokens: usize) -> usize {
        self.shape().exact_bytes(tokens)
    }

    fn read(
        &self,
        readings: Vec<Reading<Sequence<'a>>>,
        each: &mut dyn FnMut(usize, usize, &[f32]),
    ) -> Result<(), String> {
        let shares = readings.into_iter().map(|reading| {
            let Reading { sequence, tokens, part, wanted } = reading;
            Share { sequence, tokens, part, wanted }
        });
        read_each(&mut shares.collect::<Vec<_>>(), each).map_err(|error| error.to_string())
    }

    fn compress(&self, sequence: &mut Sequence<'a>) {
        sequence.finish_prompt();
        sequence.forget_queries();
    }

    fn begin_compress(&self, sequence: &mut Sequence<'a>) -> bool {
        sequence.begin_finish_prompt()
    }

    fn is_compressing(&self, sequence: &Sequence<'a>) -> bool {
        sequence.cache().is_finishing_prompt()
    }

    fn excess(&self, sequence: &Sequence<'a>, ratio: f32) -> Option<usize> {
        sequence.cache().excess(ratio)
    }

    fn compress_harder(&self, sequence: &mut Sequence<'a>, ratio: f32) {
        sequence.compress_harder(ratio);
    }

    fn bytes(&self, sequence: &Sequence<'a>, beside: Option<&Sequence<'a>>) -> usize {
        let shared = beside.map_or(0, |other| sequence.cache().bytes_shared_with(other.cache()));
        sequence.cache().bytes().total() - shared
    }

    fn read_bytes(&self, sequence: &Sequence<'a>) -> Option<u64> {
        sequence.bytes_read()
    }

    fn cache(&self, sequence: &Sequence<'a>) -> KvCache {
        sequence.cache().clone()
    }

    fn adopt(&self, cache: KvCache) -> Result<Sequence<'a>, String> {
        let sequence = Sequence::with_cache(self.model, self.pool, cache);
        Ok(self.in_background(sequence.map_err(|error| error.to_string())?))
    }
}
