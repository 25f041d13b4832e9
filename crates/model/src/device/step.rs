//! A step: one more token in each of several sequences.
//!
//! The device is asked for the first layers, for all others and then for the logits. Layers are graphs, which stay the same from step to step;
//! the first ones begin while the host looks through what the others need. Keys and values come to the host while logits are multiplied out;
//! so it stores them, seals what is full and makes ready what the next step reads of it beside the device's last product.

use super::OnDevice;
use super::pass::{LOGIT_ROWS, Work};
use crate::config::ModelConfig;
use crate::sequence::ForwardError;
use half::f16;
use mosaickv_kernels::cuda::aside::{self, Part, Pending, Pinned};
use mosaickv_kernels::cuda::prefill::{Limits, Span};
use mosaickv_kernels::cuda::{Graph, dense};
use mosaickv_kernels::{Pool, all_finite};
use mosaickv_kv::device::{Attention, Mirror, Taken, reads_of};
use mosaickv_kv::{KvCache, tend_each};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// One layer in so many is in the first graph: these take the device longer than the host takes for the other one.
const FIRST_LAYERS: usize = 16;

/// Logits that one task looks at.
const LOGITS_PER_TASK: usize = 1 << 14;

/// A sequence's next token in a step.
pub(crate) struct Step<'s> {
    pub(crate) cache: &'s mut KvCache,
    pub(crate) mirror: &'s mut Mirror,
    pub(crate) token: u32,
    /// Whether the logits after it are.
    pub(crate) is_wanted: bool,
    /// Time that what follows from the token took of the cache.
    pub(crate) tended: &'s mut Duration,
}

/// What steps of so many sequences work with.
pub(super) struct Ready {
    attention: Attention,
    work: Work,
    graphs: [Graph; 2],
    /// Page-locked memory for what comes of the layers, and for logits, unless it is in use.
    rows: Option<Pinned>,
    logits: Option<Pinned>,
}

/// What came of the layers, one after the other: keys and values of all, queries of those that were asked, sums of weights.
struct Brought {
    asked: Vec<usize>,
    has_log_sums: bool,
}

impl Ready {
    /// How often the layers became graphs.
    pub(super) fn graphs(&self) -> usize {
        self.graphs.iter().map(Graph::captures).max().unwrap_or(0)
    }
}

impl OnDevice {
    /// Sequences that can take a step together.
    pub(crate) fn most_sequences(&self) -> usize {
        self.store.most_sequences().min(LOGIT_ROWS)
    }

    /// One more token in each of some sequences, whose caches read alike: the logits `[n, vocab]` of those where they are wanted.
    /// Their caches have the token then, and what follows from it between two steps.
    pub(crate) fn step(&mut self, steps: &mut [Step], threads: &Pool) -> Result<Vec<f32>, ForwardError> {
        let start = Instant::now();
        self.update(steps, threads)?;
        let mut ready = self.ready(steps)?;
        let updated = Instant::now();
        let wanted = (0..steps.len() as u32).filter(|i| steps[*i as usize].is_wanted);
        let wanted: Vec<u32> = wanted.collect();
        self.ask(steps, &mut ready, (threads, &wanted[..]))?;
        let (rows, brought) = self.fetch(steps, &mut ready)?;
        self.multiply_out(&ready.work, steps.len(), wanted.len())?;
        let numbers = wanted.len() * self.config.vocab;
        let logits = aside::fetch(
            &[(&ready.work.logits, 0, numbers * 4)],
            ready.logits.take().expect("it comes back with each step"),
        )?;
        let rows = rows.wait()?;
        let computed = Instant::now();
        self.keep(steps, threads, (&rows, &brought))?;
        if let Err(error) = self.update(steps, threads) {
            tracing::debug!("what the next step is asked for again: {error}");
        }
        let kept = computed.elapsed();
        let pinned = logits.wait()?;
        self.times.update += updated - start;
        self.times.device += updated.elapsed();
        self.times.store += kept;
        let logits = finite(pinned.numbers(0, numbers), threads);
        (ready.rows, ready.logits) = (Some(rows), Some(pinned));
        self.step = Some(ready);
        logits
    }

    /// Brings the mirrors in line.
    fn update(&mut self, steps: &mut [Step], threads: &Pool) -> Result<(), ForwardError> {
        let mut pairs: Vec<_> = steps.iter_mut().map(|step| (&mut *step.mirror, &mut *step.cache)).collect();
        Ok(Mirror::update_each(&mut pairs, &mut self.store, threads, 1)?)
    }

    /// What a step of these sequences works with.
    fn ready(&mut self, steps: &[Step]) -> Result<Ready, ForwardError> {
        let ModelConfig { layers, heads, kv_heads, head_dim, vocab, .. } = self.config;
        let count = steps.len();
        let most = steps.iter().map(|step| step.mirror.pages().len()).max().unwrap_or(0);
        let fits =
            |ready: &Ready| ready.attention.sequences() == count && ready.work.places.limits().pages >= most;
        let mut ready = match self.step.take().filter(fits) {
            Some(ready) => ready,
            None => {
                let limits =
                    Limits { layers, sequences: count, pages: (most + most / 2).max(64), rows: count };
                let of_row = (2 * kv_heads + heads) * head_dim * 2 + heads * 4;
                Ready {
                    attention: Attention::new(&self.store, count)?,
                    work: Work::new(&self.gpu, &self.config, count, (layers, limits))?,
                    graphs: [0, 1].map(|_| Graph::new(&self.gpu)),
                    rows: Some(Pinned::new(&self.gpu, layers * count * of_row)?),
                    logits: Some(Pinned::new(&self.gpu, count * vocab * 4)?),
                }
            }
        };
        let mirrors: Vec<&Mirror> = steps.iter().map(|step| &*step.mirror).collect();
        ready.attention.fit(&mirrors, reads_of(steps[0].cache))?;
        Ok(ready)
    }

    /// Asks the device for all layers.
    fn ask(
        &self,
        steps: &[Step],
        Ready { attention, work, graphs, .. }: &mut Ready,
        (threads, wanted): (&Pool, &[u32]),
    ) -> Result<(), ForwardError> {
        let ModelConfig { layers, heads, head_dim, .. } = self.config;
        let (count, scale) = (steps.len(), (head_dim as f32).sqrt().recip());
        let mirrors: Vec<&Mirror> = steps.iter().map(|step| &*step.mirror).collect();
        let tokens: Vec<u32> = steps.iter().map(|step| step.token).collect();
        let positions: Vec<usize> = steps.iter().map(|step| step.cache.tokens()).collect();
        let spans = |l| mirrors.iter().map(move |mirror| Span { past: mirror.exact_tokens(l), new: 1 });
        let spans: Vec<Vec<Span>> = (0..layers).map(|l| spans(l).collect()).collect();
        let pages: Vec<&[u32]> = mirrors.iter().map(|mirror| mirror.pages()).collect();
        let attend = |attention: &Attention, work: &Work, l| {
            attention.attend(&self.store, l, (work.queries(l), scale), &work.attended)?;
            Ok(dense::narrow(&self.gpu, &work.attended, count * heads * head_dim, &work.x)?)
        };
        let (first, [begin, go_on]) = ((layers / FIRST_LAYERS).max(1), graphs);
        begin.run(|| {
            attention.set(&self.store, &mirrors)?;
            work.places.set_each(&spans)?;
            work.places.set_pages(&pages)?;
            work.picked.write(0, wanted)?;
            self.set_rows(work, threads, &tokens, &positions)?;
            self.layers(work, (count, 0..first), &mut |l| attend(attention, work, l))
        })?;
        go_on.run(|| self.layers(work, (count, first..layers), &mut |l| attend(attention, work, l)))
    }

    /// Has what the layers computed copied to the host, beside what the device is asked for next.
    fn fetch(&self, steps: &[Step], ready: &mut Ready) -> Result<(Pending, Brought), ForwardError> {
        let ModelConfig { layers, heads, kv_heads, head_dim, .. } = self.config;
        let Ready { attention, work, rows, .. } = ready;
        let count = steps.len();
        let asked: Vec<usize> =
            (0..layers).filter(|l| steps.iter().any(|step| step.cache.asks(*l))).collect();
        let mut parts: Vec<Part> = vec![(&work.staged, 0, layers * count * 2 * kv_heads * head_dim * 2)];
        parts.extend(asked.iter().map(|l| (work.queries(*l), 0, count * heads * head_dim * 2)));
        let log_sums = attention.log_sums();
        parts.extend(log_sums.map(|sums| (sums, 0, layers * count * heads * 4)));
        let brought = Brought { asked, has_log_sums: log_sums.is_some() };
        Ok((aside::fetch(&parts, rows.take().expect("it comes back with each step"))?, brought))
    }

    /// Has the caches store what a step computed, and do what there is to do between two steps.
    fn keep(
        &self,
        steps: &mut [Step],
        threads: &Pool,
        (pinned, brought): (&Pinned, &Brought),
    ) -> Result<(), ForwardError> {
        let ModelConfig { layers, heads, kv_heads, head_dim, .. } = self.config;
        let (count, of_keys, of_queries) = (steps.len(), 2 * kv_heads * head_dim, heads * head_dim);
        let Brought { asked, has_log_sums } = brought;
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
        let mut caches: Vec<&mut KvCache> = steps.iter_mut().map(|step| &mut *step.cache).collect();
        KvCache::take_step(&mut caches, threads, |i, l| {
            let of_layer = asked.iter().position(|asked| *asked == l);
            let queries = of_layer.map(|a| &queries[(a * count + i) * of_queries..][..of_queries]);
            Taken {
                rows: &staged[(l * count + i) * of_keys..][..of_keys],
                queries: queries.unwrap_or_default(),
                log_sums: sums.get((l * count + i) * heads..).unwrap_or_default(),
            }
        })?;
        let start = Instant::now();
        steps.iter_mut().for_each(|step| step.mirror.added(1));
        let mut caches: Vec<&mut KvCache> = steps.iter_mut().map(|step| &mut *step.cache).collect();
        tend_each(&mut caches, threads);
        let took = start.elapsed();
        steps.iter_mut().for_each(|step| *step.tended += took);
        Ok(())
    }
}

/// A copy of logits, if they are numbers.
fn finite(logits: &[f32], threads: &Pool) -> Result<Vec<f32>, ForwardError> {
    let (mut copy, is_finite) = (vec![0.0; logits.len()], AtomicBool::new(true));
    threads.for_each_chunk(&mut copy, LOGITS_PER_TASK, |task, copy| {
        copy.copy_from_slice(&logits[task * LOGITS_PER_TASK..][..copy.len()]);
        if !all_finite(copy) {
            is_finite.store(false, Ordering::Relaxed);
        }
    });
    if is_finite.into_inner() { Ok(copy) } else { Err(ForwardError::NotFinite) }
}
