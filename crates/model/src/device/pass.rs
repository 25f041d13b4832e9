//! A pass through the layers, and that of the next tokens of a prompt.
//!
//! The device does one thing after the other, and the host asks ahead. Keys and values of a prompt come layer by layer beside the device's
//! work, to be stored by a thread meanwhile.

use super::OnDevice;
use super::weights::DeviceLayer;
use crate::config::{Architecture, ModelConfig};
use crate::rope::RopeStyle;
use crate::sequence::ForwardError;
use mosaickv_kernels::cuda::aside::{self, Part, Pending, Pinned};
use mosaickv_kernels::cuda::dense::{self, Activation, Heads, Pairs, Rotations};
use mosaickv_kernels::cuda::gemm::{Into, Weights};
use mosaickv_kernels::cuda::prefill::{self, Limits, Places, Span, Tokens};
use mosaickv_kernels::cuda::{Buffer, Gpu};
use mosaickv_kernels::{Pool, all_finite};
use mosaickv_kv::KvCache;
use mosaickv_kv::device::{Mirror, Taken};
use std::ops::Range;
use std::sync::mpsc;
use std::thread;

/// Tokens of a prompt that go through the layers together.
const PROMPT_ROWS: usize = 2048;

/// Rows whose logits are computed together.
pub(super) const LOGIT_ROWS: usize = 128;

/// Rows whose cosines and sines one task computes: those of a step are not worth a thread's waking up.
const ROWS_PER_TASK: usize = 32;

/// Layers of a prompt that may wait for the host to store them.
const LAYERS_AHEAD: usize = 3;

/// The next tokens of a prompt.
pub(crate) struct Prompt<'s> {
    pub(crate) cache: &'s mut KvCache,
    pub(crate) mirror: &'s mut Mirror,
    pub(crate) tokens: &'s [u32],
    /// The logits after the tokens from this one on are wanted.
    pub(crate) first_wanted: usize,
}

/// Who is told of a prompt: layers that were asked for, and logits `[vocab]` after tokens.
struct Told<'a> {
    done: &'a mut dyn FnMut(usize),
    each: &'a mut dyn FnMut(usize, &[f32]),
}

/// What passes of up to so many rows work with.
pub(super) struct Work {
    rows: usize,
    /// Layers whose queries, keys and values stay.
    kept: usize,
    tokens: Buffer,
    /// Cosines and sines.
    turns: Buffer,
    residual: Buffer,
    /// What is multiplied: bf16.
    pub(super) x: Buffer,
    projected: Buffer,
    /// `[T, H, D]` of each kept layer.
    queries: Vec<Buffer>,
    /// `[T, 2, G, D]` of each kept layer.
    pub(super) staged: Buffer,
    pub(super) attended: Buffer,
    /// Gate and up, and what a norm is added of.
    both: Buffer,
    pub(super) picked: Buffer,
    pub(super) logits: Buffer,
    pub(super) places: Places,
    pinned: Vec<Pinned>,
}

impl Work {
    pub(super) fn new(
        gpu: &Gpu,
        config: &ModelConfig,
        rows: usize,
        (kept, limits): (usize, Limits),
    ) -> Result<Work, ForwardError> {
        let ModelConfig { hidden, heads, kv_heads, head_dim, ffn, vocab, .. } = *config;
        let queries = heads * head_dim;
        let wanted = rows.min(LOGIT_ROWS);
        Ok(Work {
            rows,
            kept,
            tokens: gpu.alloc(rows * 4)?,
            turns: gpu.alloc(rows * config.rope.dims * 4)?,
            residual: gpu.alloc(rows * hidden * 4)?,
            x: gpu.alloc(rows * hidden.max(ffn).max(queries) * 2)?,
            projected: gpu.alloc(rows * (heads + 2 * kv_heads) * head_dim * 4)?,
            queries: (0..kept).map(|_| gpu.alloc(rows * queries * 2)).collect::<Result<_, _>>()?,
            staged: gpu.alloc(kept * rows * 2 * kv_heads * head_dim * 2)?,
            attended: gpu.alloc(rows * queries * 4)?,
            both: gpu.alloc(rows * (2 * ffn).max(hidden) * 4)?,
            picked: gpu.alloc(wanted * 4)?,
            logits: gpu.alloc(wanted * vocab * 4)?,
            places: Places::new(gpu, limits)?,
            pinned: vec![],
        })
    }

    pub(super) fn queries(&self, layer: usize) -> &Buffer {
        &self.queries[layer % self.kept]
    }

    /// Where a layer's keys and values are, of rows of `row` bytes.
    fn staged(&self, layer: usize, row: usize) -> usize {
        layer % self.kept * self.rows * row
    }
}

impl OnDevice {
    /// The next tokens of a prompt: `each(token, logits)` gets the logits `[vocab]` where they are wanted, `done` is called with the layers
    /// that were asked for. The cache has the tokens then.
    pub(crate) fn prompt(
        &mut self,
        prompt: Prompt,
        threads: &Pool,
        done: &mut dyn FnMut(usize),
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ForwardError> {
        let Prompt { cache, mirror, tokens, first_wanted } = prompt;
        let start = cache.tokens();
        mirror.update(&mut self.store, cache, threads, tokens.len())?;
        let mut work = self.ready_for_prompt(mirror, tokens.len().min(PROMPT_ROWS))?;
        let free = std::mem::take(&mut work.pinned);
        let with_queries = cache.asks(0);
        let of_host = Host { cache, threads };
        let (returned, result) = thread::scope(|scope| {
            let (to_host, layers) = mpsc::channel();
            let (give_back, given) = mpsc::channel();
            let host = scope.spawn(move || of_host.store(layers, give_back));
            let mut sent = Sent { gpu: &self.gpu, free, given, to_host, last: None, out: 0, with_queries };
            let result = self.blocks(
                (mirror, tokens),
                (start, first_wanted),
                &mut work,
                threads,
                &mut sent,
                &mut Told { done, each },
            );
            let flushed = sent.flush();
            let Sent { mut free, given, to_host, .. } = sent;
            drop(to_host);
            let stored = host.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            free.extend(given.try_iter());
            (free, stored.and(result).and(flushed))
        });
        result?;
        work.pinned = returned;
        self.prompt = Some(work);
        Ok(())
    }

    fn ready_for_prompt(&mut self, mirror: &Mirror, rows: usize) -> Result<Work, ForwardError> {
        let (rows, pages) = (rows.next_power_of_two(), mirror.pages().len());
        let fits = |work: &Work| work.rows >= rows && work.places.limits().pages >= pages;
        match self.prompt.take().filter(fits) {
            Some(work) => Ok(work),
            None => {
                let layers = self.config.layers;
                let limits = Limits { layers, sequences: 1, pages: (pages + pages / 4).max(64), rows };
                Work::new(&self.gpu, &self.config, rows, (2, limits))
            }
        }
    }

    /// Block after block through all layers.
    fn blocks(
        &self,
        (mirror, tokens): (&mut Mirror, &[u32]),
        (start, first_wanted): (usize, usize),
        work: &mut Work,
        threads: &Pool,
        sent: &mut Sent,
        told: &mut Told,
    ) -> Result<(), ForwardError> {
        let ModelConfig { layers, heads, head_dim, kv_heads, vocab, .. } = self.config;
        let scale = (head_dim as f32).sqrt().recip();
        let blocks = tokens.len().div_ceil(PROMPT_ROWS);
        for (i, block) in tokens.chunks(PROMPT_ROWS).enumerate() {
            let (first, rows) = (i * PROMPT_ROWS, block.len());
            let spans = vec![vec![Span { past: mirror.exact_tokens(0), new: rows }]; layers];
            work.places.set_each(&spans)?;
            work.places.set_pages(&[mirror.pages()])?;
            let positions: Vec<usize> = (start + first..start + first + rows).collect();
            self.set_rows(work, threads, block, &positions)?;
            let of_keys = 2 * kv_heads * head_dim * 2;
            self.layers(work, (rows, 0..layers), &mut |l| {
                let staged = (&work.staged, work.staged(l, of_keys), rows * of_keys);
                sent.send(l, staged, (work.queries(l), 0, rows * heads * head_dim * 2))?;
                let tokens = Tokens { pool: &self.store.pool(l), places: &work.places, layer: l };
                prefill::attend(&tokens, work.queries(l), heads, scale, &work.x)?;
                (told.done)((i * layers + l + 1) / blocks);
                Ok(())
            })?;
            // The next block's first layer writes where this one's last may still be copied from.
            sent.flush()?;
            mirror.added(rows);
            let wanted: Vec<u32> =
                (first_wanted.clamp(first, first + rows) - first..rows).map(|t| t as u32).collect();
            for some in wanted.chunks(LOGIT_ROWS) {
                work.picked.write(0, some)?;
                self.multiply_out(work, rows, some.len())?;
                let logits = finite(work.logits.read(some.len() * vocab)?)?;
                some.iter()
                    .zip(logits.chunks_exact(vocab))
                    .for_each(|(t, logits)| (told.each)(first + *t as usize, logits));
            }
        }
        Ok(())
    }

    /// Embeds the tokens of a pass, and has cosines and sines of their positions.
    pub(super) fn set_rows(
        &self,
        work: &Work,
        threads: &Pool,
        tokens: &[u32],
        positions: &[usize],
    ) -> Result<(), ForwardError> {
        let (pairs, length) = (self.rope.frequencies().len(), self.rope.attention_factor());
        let mut turns = vec![0.0; positions.len() * pairs * 2];
        threads.for_each_chunk(&mut turns, pairs * 2 * ROWS_PER_TASK, |task, turns| {
            for (turns, position) in turns.chunks_exact_mut(pairs * 2).zip(&positions[task * ROWS_PER_TASK..])
            {
                for (turn, frequency) in turns.chunks_exact_mut(2).zip(self.rope.frequencies()) {
                    let (sin, cos) = (*position as f64 * frequency).sin_cos();
                    turn.copy_from_slice(&[(cos * length) as f32, (sin * length) as f32]);
                }
            }
        });
        work.turns.write(0, &turns)?;
        work.tokens.write(0, tokens)?;
        let scale = self.config.embed_scale;
        Ok(dense::embed(&self.weights.embed, (&work.tokens, tokens.len()), scale, &work.residual)?)
    }

    /// Some layers over so many rows: `attend(l)` writes attention's output to `work.x`, from `work.queries(l)` and the layer's pages.
    pub(super) fn layers(
        &self,
        work: &Work,
        (rows, which): (usize, Range<usize>),
        attend: &mut dyn FnMut(usize) -> Result<(), ForwardError>,
    ) -> Result<(), ForwardError> {
        let config = &self.config;
        for (l, layer) in which.clone().zip(&self.weights.layers[which]) {
            layer.attn_norm.apply(&work.residual, rows, &work.x)?;
            layer.qkv.multiply(&work.x, rows, &work.projected, Into::F32)?;
            self.heads((l, layer), work)?;
            attend(l)?;
            match &layer.post_attn_norm {
                None => layer.wo.multiply(&work.x, rows, &work.residual, Into::AddF32)?,
                Some(norm) => {
                    layer.wo.multiply(&work.x, rows, &work.both, Into::F32)?;
                    norm.add(&work.both, rows, &work.residual)?;
                }
            }
            layer.ffn_norm.apply(&work.residual, rows, &work.x)?;
            layer.gate_up.multiply(&work.x, rows, &work.both, Into::F32)?;
            let activation = match config.architecture {
                Architecture::Gemma3 => Activation::Gelu,
                _ => Activation::Silu,
            };
            dense::gate(&self.gpu, activation, &work.both, (rows, config.ffn), &work.x)?;
            match &layer.post_ffn_norm {
                None => layer.down.multiply(&work.x, rows, &work.residual, Into::AddF32)?,
                Some(norm) => {
                    layer.down.multiply(&work.x, rows, &work.both, Into::F32)?;
                    norm.add(&work.both, rows, &work.residual)?;
                }
            }
        }
        Ok(())
    }

    /// Queries, keys and values out of what was projected, to where they belong.
    fn heads(&self, (l, layer): (usize, &DeviceLayer), work: &Work) -> Result<(), ForwardError> {
        let config = &self.config;
        let pairs = match config.rope.style {
            RopeStyle::Interleaved => Pairs::Interleaved,
            RopeStyle::Halves => Pairs::Halves,
        };
        let rotations = Rotations { table: &work.turns, dims: config.rope.dims, pairs };
        let heads = Heads {
            heads: config.heads,
            bias: layer.bias.as_ref(),
            query_norm: layer.q_norm.as_ref(),
            key_norm: layer.k_norm.as_ref(),
            eps: config.norm_eps,
            // As the caches divide by the root of head_dim.
            query_factor: config.attention_scale * (config.head_dim as f32).sqrt(),
        };
        let tokens = Tokens { pool: &self.store.pool(l), places: &work.places, layer: l };
        let staged = (&work.staged, work.staged(l, 2 * config.kv_heads * config.head_dim * 2));
        let rotations = layer.is_turned.then_some(rotations);
        Ok(heads.apply(&work.projected, rotations, work.queries(l), &tokens, Some(staged))?)
    }

    /// Logits of those rows of a pass that `work.picked` names, to `work.logits`.
    pub(super) fn multiply_out(&self, work: &Work, rows: usize, picked: usize) -> Result<(), ForwardError> {
        if picked == 0 {
            return Ok(());
        }
        self.weights.norm.apply_to((&work.residual, rows), (&work.picked, picked), &work.x)?;
        let head: &Weights = self.weights.head.as_ref().unwrap_or(&self.weights.embed);
        Ok(head.multiply(&work.x, picked, &work.logits, Into::F32)?)
    }
}

fn finite(logits: Vec<f32>) -> Result<Vec<f32>, ForwardError> {
    if all_finite(&logits) { Ok(logits) } else { Err(ForwardError::NotFinite) }
}

/// A layer on its way to the host: which, and bytes of keys and values, and of queries.
type Layer = (usize, Pending, [usize; 2]);

/// Layers of a prompt that go to the host.
struct Sent<'a> {
    gpu: &'a Gpu,
    /// Page-locked memory that is free, and where it comes back.
    free: Vec<Pinned>,
    given: mpsc::Receiver<Pinned>,
    to_host: mpsc::Sender<Layer>,
    /// What the device's work does not wait for yet.
    last: Option<Layer>,
    /// Layers that the host has not given back.
    out: usize,
    with_queries: bool,
}

impl Sent<'_> {
    /// Has a layer copied beside what the device is asked for next; what is asked for after the next layer waits for it.
    fn send(&mut self, layer: usize, staged: Part, queries: Part) -> Result<(), ForwardError> {
        let sizes = [staged.2, if self.with_queries { queries.2 } else { 0 }];
        let parts = [staged, queries];
        let pinned = self.pinned(sizes.iter().sum())?;
        let pending = aside::fetch(&parts[..if self.with_queries { 2 } else { 1 }], pinned)?;
        self.flush()?;
        self.last = Some((layer, pending, sizes));
        Ok(())
    }

    /// Hands the last layer to the host.
    fn flush(&mut self) -> Result<(), ForwardError> {
        if let Some((layer, pending, sizes)) = self.last.take() {
            pending.follow()?;
            // One who does not listen any more has an error to tell.
            let _ = self.to_host.send((layer, pending, sizes));
        }
        Ok(())
    }

    fn pinned(&mut self, bytes: usize) -> Result<Pinned, ForwardError> {
        let pinned = match self.free.pop() {
            Some(pinned) => Some(pinned),
            None if self.out < LAYERS_AHEAD => None,
            None => {
                self.out -= 1;
                // Without a host the layer goes nowhere.
                self.given.recv().ok()
            }
        };
        self.out += 1;
        match pinned.filter(|pinned| pinned.bytes() >= bytes) {
            Some(pinned) => Ok(pinned),
            None => Ok(Pinned::new(self.gpu, bytes)?),
        }
    }
}

/// Who stores them.
struct Host<'a> {
    cache: &'a mut KvCache,
    threads: &'a Pool,
}

impl Host<'_> {
    fn store(
        self,
        layers: mpsc::Receiver<Layer>,
        give_back: mpsc::Sender<Pinned>,
    ) -> Result<(), ForwardError> {
        for (layer, pending, [of_rows, of_queries]) in layers {
            let pinned = pending.wait()?;
            let taken = Taken {
                rows: pinned.numbers(0, of_rows / 2),
                queries: pinned.numbers(of_rows, of_queries / 2),
                log_sums: &[],
            };
            self.cache.take(self.threads, layer, taken)?;
            // Nobody may want it any more.
            let _ = give_back.send(pinned);
        }
        Ok(())
    }
}
