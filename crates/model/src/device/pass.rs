//! A pass: one more token in each of several sequences, or the next tokens of a prompt.
//!
//! The device does one thing after the other, and the host asks ahead. In a step it waits once, for the logits, and with them come the
//! keys and values of all layers. Those of a prompt come layer by layer beside the device's work, to be stored by a thread meanwhile.

use super::OnDevice;
use super::weights::DeviceLayer;
use crate::config::{Architecture, ModelConfig};
use crate::rope::RopeStyle;
use crate::sequence::ForwardError;
use half::f16;
use mosaickv_kernels::Pool;
use mosaickv_kernels::cuda::aside::{self, Part, Pending, Pinned};
use mosaickv_kernels::cuda::dense::{self, Activation, Heads, Pairs, Rotations};
use mosaickv_kernels::cuda::gemm::{Into, Weights};
use mosaickv_kernels::cuda::prefill::{self, Limits, Places, Span, Tokens};
use mosaickv_kernels::cuda::{Buffer, Gpu};
use mosaickv_kv::KvCache;
use mosaickv_kv::device::{Attention, Mirror, Taken, choice_of};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

/// Tokens of a prompt that go through the layers together.
const PROMPT_ROWS: usize = 2048;

/// Rows whose logits are computed together.
const LOGIT_ROWS: usize = 128;

/// Layers of a prompt that may wait for the host to store them.
const LAYERS_AHEAD: usize = 3;

/// A sequence's next token in a step.
pub(crate) struct Step<'s> {
    pub(crate) cache: &'s mut KvCache,
    pub(crate) mirror: &'s mut Mirror,
    pub(crate) token: u32,
    /// Whether the logits after it are.
    pub(crate) is_wanted: bool,
}

/// The next tokens of a prompt.
pub(crate) struct Prompt<'s> {
    pub(crate) cache: &'s mut KvCache,
    pub(crate) mirror: &'s mut Mirror,
    pub(crate) tokens: &'s [u32],
    /// The logits after the tokens from this one on are wanted.
    pub(crate) first_wanted: usize,
}

/// What came of a step, one after the other: keys and values of all layers, queries of some, sums of weights, logits.
struct Brought {
    asked: Vec<usize>,
    has_log_sums: bool,
    /// How many numbers.
    logits: usize,
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
    x: Buffer,
    projected: Buffer,
    /// `[T, H, D]` of each kept layer.
    queries: Vec<Buffer>,
    /// `[T, 2, G, D]` of each kept layer.
    staged: Buffer,
    attended: Buffer,
    /// Gate and up, and what a norm is added of.
    both: Buffer,
    picked: Buffer,
    logits: Buffer,
    places: Places,
    pinned: Vec<Pinned>,
}

impl Work {
    fn new(
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

    fn queries(&self, layer: usize) -> &Buffer {
        &self.queries[layer % self.kept]
    }

    /// Where a layer's keys and values are, of rows of `row` bytes.
    fn staged(&self, layer: usize, row: usize) -> usize {
        layer % self.kept * self.rows * row
    }
}

impl OnDevice {
    /// Sequences that can take a step together.
    pub(crate) fn most_sequences(&self) -> usize {
        self.store.most_sequences()
    }

    /// One more token in each of some sequences, whose caches choose alike: the logits `[n, vocab]` of those where they are wanted.
    /// Their caches have the token then.
    pub(crate) fn step(&mut self, steps: &mut [Step], threads: &Pool) -> Result<Vec<f32>, ForwardError> {
        let start = Instant::now();
        let tokens: Vec<u32> = steps.iter().map(|step| step.token).collect();
        let positions: Vec<usize> = steps.iter().map(|step| step.cache.tokens()).collect();
        for Step { cache, mirror, .. } in &mut *steps {
            mirror.update(&mut self.store, cache, threads, 1)?;
        }
        let (attention, mut work) = self.ready(steps)?;
        let updated = Instant::now();
        self.set_rows(&work, threads, &tokens, &positions)?;
        let scale = (self.config.head_dim as f32).sqrt().recip();
        let queries = steps.len() * self.config.heads * self.config.head_dim;
        self.layers(&work, steps.len(), &mut |l| {
            attention.attend(&self.store, l, (work.queries(l), scale), &work.attended)?;
            Ok(dense::narrow(&self.gpu, &work.attended, queries, &work.x)?)
        })?;
        let wanted = (0..steps.len() as u32).filter(|i| steps[*i as usize].is_wanted);
        let wanted: Vec<u32> = wanted.collect();
        self.multiply_out(&work, steps.len(), &wanted)?;
        let (pinned, brought) = self.fetch(steps, (&attention, &mut work), wanted.len())?;
        let waited = Instant::now();
        let logits = self.keep(steps, threads, (&pinned, &brought))?;
        self.times.update += updated - start;
        self.times.device += waited - updated;
        self.times.store += waited.elapsed();
        work.pinned.push(pinned);
        self.step = Some((attention, work));
        finite(logits)
    }

    /// What a step of these sequences works with.
    fn ready(&mut self, steps: &[Step]) -> Result<(Attention, Work), ForwardError> {
        let (count, layers) = (steps.len(), self.config.layers);
        let mirrors: Vec<&Mirror> = steps.iter().map(|step| &*step.mirror).collect();
        let most = mirrors.iter().map(|mirror| mirror.pages().len()).max().unwrap_or(0);
        let fits = |(attention, work): &(Attention, Work)| {
            attention.sequences() == count && work.places.limits().pages >= most
        };
        let (mut attention, mut work) = match self.step.take().filter(fits) {
            Some(ready) => ready,
            None => {
                let limits =
                    Limits { layers, sequences: count, pages: (most + most / 2).max(64), rows: count };
                let work = Work::new(&self.gpu, &self.config, count, (layers, limits))?;
                (Attention::new(&self.store, count)?, work)
            }
        };
        attention.set(&self.store, &mirrors, choice_of(steps[0].cache))?;
        let spans = |l| mirrors.iter().map(move |mirror| Span { past: mirror.exact_tokens(l), new: 1 });
        let spans: Vec<Vec<Span>> = (0..layers).map(|l| spans(l).collect()).collect();
        let pages: Vec<&[u32]> = mirrors.iter().map(|mirror| mirror.pages()).collect();
        work.places.set_each(&spans)?;
        work.places.set_pages(&pages)?;
        Ok((attention, work))
    }

    /// Waits for a step: what it computed.
    fn fetch(
        &self,
        steps: &[Step],
        (attention, work): (&Attention, &mut Work),
        wanted: usize,
    ) -> Result<(Pinned, Brought), ForwardError> {
        let ModelConfig { layers, heads, kv_heads, head_dim, vocab, .. } = self.config;
        let count = steps.len();
        let asked: Vec<usize> =
            (0..layers).filter(|l| steps.iter().any(|step| step.cache.asks(*l))).collect();
        let spare = work.pinned.pop();
        let mut parts: Vec<Part> = vec![(&work.staged, 0, layers * count * 2 * kv_heads * head_dim * 2)];
        parts.extend(asked.iter().map(|l| (work.queries(*l), 0, count * heads * head_dim * 2)));
        let log_sums = attention.log_sums();
        parts.extend(log_sums.map(|sums| (sums, 0, layers * count * heads * 4)));
        parts.push((&work.logits, 0, wanted * vocab * 4));
        let bytes = parts.iter().map(|(_, _, bytes)| bytes).sum();
        let pinned = match spare.filter(|pinned| pinned.bytes() >= bytes) {
            Some(pinned) => pinned,
            None => Pinned::new(&self.gpu, bytes)?,
        };
        let brought = Brought { asked, has_log_sums: log_sums.is_some(), logits: wanted * vocab };
        Ok((aside::fetch(&parts, pinned)?.wait()?, brought))
    }

    /// Has the caches store what a step computed; the logits.
    fn keep(
        &self,
        steps: &mut [Step],
        threads: &Pool,
        (pinned, brought): (&Pinned, &Brought),
    ) -> Result<Vec<f32>, ForwardError> {
        let ModelConfig { layers, heads, kv_heads, head_dim, .. } = self.config;
        let (count, of_keys, of_queries) = (steps.len(), 2 * kv_heads * head_dim, heads * head_dim);
        let Brought { asked, has_log_sums, logits } = brought;
        let mut at = 0;
        let mut next = |bytes: usize| {
            at += bytes;
            at - bytes
        };
        let staged: &[f16] = pinned.numbers(next(layers * count * of_keys * 2), layers * count * of_keys);
        let of_asked = asked.len() * count * of_queries;
        let queries: &[f16] = pinned.numbers(next(of_asked * 2), of_asked);
        let of_sums = if *has_log_sums { layers * count * heads } else { 0 };
        let sums: &[f32] = pinned.numbers(next(of_sums * 4), of_sums);
        for (i, Step { cache, mirror, .. }) in steps.iter_mut().enumerate() {
            mirror.added(1);
            cache.take_step(threads, |l| {
                let of_layer = asked.iter().position(|asked| *asked == l);
                let queries = of_layer.map(|a| &queries[(a * count + i) * of_queries..][..of_queries]);
                Taken {
                    rows: &staged[(l * count + i) * of_keys..][..of_keys],
                    queries: queries.unwrap_or_default(),
                    log_sums: sums.get((l * count + i) * heads..).unwrap_or_default(),
                }
            })?;
        }
        Ok(pinned.numbers::<f32>(next(logits * 4), *logits).to_vec())
    }

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
            self.layers(work, rows, &mut |l| {
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
                self.multiply_out(work, rows, some)?;
                let logits = finite(work.logits.read(some.len() * vocab)?)?;
                some.iter()
                    .zip(logits.chunks_exact(vocab))
                    .for_each(|(t, logits)| (told.each)(first + *t as usize, logits));
            }
        }
        Ok(())
    }

    /// Embeds the tokens of a pass, and has cosines and sines of their positions.
    fn set_rows(
        &self,
        work: &Work,
        threads: &Pool,
        tokens: &[u32],
        positions: &[usize],
    ) -> Result<(), ForwardError> {
        let (pairs, length) = (self.rope.frequencies().len(), self.rope.attention_factor());
        let mut turns = vec![0.0; positions.len() * pairs * 2];
        threads.for_each_chunk(&mut turns, pairs * 2, |row, turns| {
            for (turn, frequency) in turns.chunks_exact_mut(2).zip(self.rope.frequencies()) {
                let (sin, cos) = (positions[row] as f64 * frequency).sin_cos();
                turn.copy_from_slice(&[(cos * length) as f32, (sin * length) as f32]);
            }
        });
        work.turns.write(0, &turns)?;
        work.tokens.write(0, tokens)?;
        let scale = self.config.embed_scale;
        Ok(dense::embed(&self.weights.embed, (&work.tokens, tokens.len()), scale, &work.residual)?)
    }

    /// All layers over so many rows: `attend(l)` writes attention's output to `work.x`, from `work.queries(l)` and the layer's pages.
    fn layers(
        &self,
        work: &Work,
        rows: usize,
        attend: &mut dyn FnMut(usize) -> Result<(), ForwardError>,
    ) -> Result<(), ForwardError> {
        let config = &self.config;
        for (l, layer) in self.weights.layers.iter().enumerate() {
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

    /// Logits of some of the rows of a pass, to `work.logits`.
    fn multiply_out(&self, work: &Work, rows: usize, wanted: &[u32]) -> Result<(), ForwardError> {
        if wanted.is_empty() {
            return Ok(());
        }
        work.picked.write(0, wanted)?;
        self.weights.norm.apply_to((&work.residual, rows), (&work.picked, wanted.len()), &work.x)?;
        let head: &Weights = self.weights.head.as_ref().unwrap_or(&self.weights.embed);
        Ok(head.multiply(&work.x, wanted.len(), &work.logits, Into::F32)?)
    }
}

fn finite(logits: Vec<f32>) -> Result<Vec<f32>, ForwardError> {
    if logits.iter().all(|x| x.is_finite()) { Ok(logits) } else { Err(ForwardError::NotFinite) }
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
