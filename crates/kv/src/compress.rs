//! How does a layer of exact pages become a compressed one, in place or as a copy?
//!
//! [`KvCache::end_prompt`] compresses in place. [`KvCache::compressed`] makes a copy from a cache that stays exact, so
//! that one reading of a prompt serves any number of formats; both go through the same function and give the same.

use crate::baselines::{
    Head, KiviHead, QuantizedHead, QuestHead, RecentQueries, SnapKvHead, StrawmanHead, WINDOW,
};
use crate::device::Encoder;
use crate::exact::ExactHead;
use crate::layered::{self, Calibration, Layered, LayeredHead, Places, Prompt, Samples, Target};
use crate::packed::PackedHead;
use crate::{KvCache, KvError, KvFormat, KvShape, Layer, Phases, Working};
use half::f16;
use mosaickv_kernels::Pool;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// A layer that a thread of its own compresses while the next one reads the prompt; at most one at a time.
#[derive(Debug, Default)]
pub(crate) struct Encoding(Option<(usize, JoinHandle<Layer>)>);

/// The layers of a prompt that are compressed together on threads of their own, and what becomes of them.
#[derive(Debug, Default)]
pub(crate) struct Ending(Option<JoinHandle<Vec<(usize, Layer)>>>);

impl Clone for Ending {
    fn clone(&self) -> Ending {
        assert!(self.0.is_none(), "a cache was cloned while its prompt is compressed");
        Ending(None)
    }
}

impl Clone for Encoding {
    fn clone(&self) -> Encoding {
        assert!(self.0.is_none(), "a cache was cloned between the layers of a prompt");
        Encoding(None)
    }
}

impl KvCache {
    /// The same empty cache, which remembers the newest 32 queries of each layer while the layer is exact, and with a
    /// calibration some of all: what [`compressed`](KvCache::compressed) copies in the formats `snapkv` and `layered` are made
    /// from.
    pub fn remember_queries(mut self) -> KvCache {
        self.recent.get_or_insert_with(|| vec![RecentQueries::default(); self.shape.layers]);
        if self.calibration.is_some() {
            self.samples.get_or_insert_with(|| vec![Samples::default(); self.shape.layers]);
        }
        self
    }

    /// The same empty cache, which remembers which tokens are in which pages of the layered format, in 4 bytes for each token of each
    /// head: what [`places`](KvCache::places) tells.
    pub fn remember_places(mut self) -> KvCache {
        self.places = Places::Remembered;
        self
    }

    /// The layer's prompt is complete: compresses it, if the format does, and frees the exact pages; in the layered format that is
    /// done for all layers at the end of the last one. A format that observes queries needs the prompt's to have been attended
    /// ([`attend`](KvCache::attend)) before. A layer with a sliding window stays exact, and forgets what is out of sight.
    pub fn end_prompt(&mut self, pool: &Pool, layer: usize) {
        self.forget(layer);
        if self.encodes_alone(layer)
            && let Some((exact, queries)) = self.taken(layer)
        {
            self.layers[layer] = compress(pool, self.shape, self.format, (exact, queries.rows()));
        }
        if layer + 1 == self.shape.layers {
            self.end_layered(pool);
        }
    }

    /// Whether the layer is compressed, and without regard to the others.
    fn encodes_alone(&self, layer: usize) -> bool {
        let together = matches!(self.format, KvFormat::Layered(_));
        !together && self.shape.window_of(layer).is_none() && self.format.compresses(layer)
    }

    /// Like [`end_prompt`](KvCache::end_prompt), but the work is done beside what follows (arXiv 2607.00760, s. 5: layer
    /// `i - 1` is encoded while layer `i` reads the prompt). One layer at a time: this waits for the one before. Until
    /// [`finish_prompt`](KvCache::finish_prompt) no token may be added and nothing attended to in this layer. In the layered format
    /// nothing begins here.
    pub fn begin_end_prompt(&mut self, layer: usize) {
        self.forget(layer);
        if !self.encodes_alone(layer) {
            return;
        }
        self.join();
        let Some((exact, queries)) = self.taken(layer) else { return };
        let (shape, format) = (self.shape, self.format);
        let thread = thread::Builder::new().name("mosaickv-encode".to_owned());
        let thread = thread
            .spawn(move || compress(&Pool::new(1), shape, format, (exact, queries.rows())))
            .expect("the system refused a thread");
        self.encoding.0 = Some((layer, thread));
    }

    /// Waits until every layer is encoded. What [`begin_end_prompt`](KvCache::begin_end_prompt) was not called for, and the layered format, which
    /// shares out bytes among the layers, begins only now, unless it [was begun](KvCache::begin_finish_prompt).
    pub fn finish_prompt(&mut self, pool: &Pool) {
        self.join();
        match self.ending.0.take() {
            Some(thread) => self.put(thread.join().unwrap_or_else(|panic| resume_unwind(panic))),
            None => {
                let made = self.taken_apart().map(|work| work.encode(pool));
                self.put(made.unwrap_or_default());
                self.end_layered(pool);
            }
        }
    }

    /// Begins what [`finish_prompt`](KvCache::finish_prompt) has to do, on `threads` threads beside what follows, and in the layered format with an
    /// encoder on a device, if there is one for this cache. `true` if there is such work: then this cache can't be used, nor its bytes be
    /// counted, until `finish_prompt`.
    pub fn begin_finish_prompt(
        &mut self,
        threads: usize,
        encoder: impl FnOnce(&KvCache) -> Option<Encoder>,
    ) -> bool {
        if self.ending.0.is_some() {
            return true;
        }
        self.join();
        let encoder = encoder(self);
        let thread = thread::Builder::new().name("mosaickv-encode".to_owned());
        let thread = if let Some(work) = self.taken_apart() {
            thread.spawn(move || work.encode(&Pool::new(threads)))
        } else {
            let Some((settings, samples)) = self.take_end_layered() else { return false };
            let Some(work) = self.taken_layered(settings, |_| true) else { return false };
            thread.spawn(move || work.encode(&Pool::new(threads), &samples, encoder))
        };
        self.ending.0 = Some(thread.expect("the system refused a thread"));
        true
    }

    /// The exact layers that are compressed, and without regard to the others, if there are such layers. The cache no longer has them.
    fn taken_apart(&mut self) -> Option<ApartWork> {
        if self.tokens() == 0 {
            return None;
        }
        let apart = (0..self.shape.layers).filter(|layer| self.encodes_alone(*layer));
        let apart: Vec<usize> = apart.collect();
        let taken = apart.into_iter().filter_map(|layer| Some((layer, self.taken(layer)?)));
        let prompts: Vec<_> = taken.collect();
        let (shape, format) = (self.shape, self.format);
        (!prompts.is_empty()).then_some(ApartWork { shape, format, prompts })
    }

    /// Whether [what was begun](KvCache::begin_finish_prompt) goes on.
    pub fn is_finishing_prompt(&self) -> bool {
        self.ending.0.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// No further prompt will come: frees the queries that compressing one would need. What is exact now stays so.
    pub fn forget_queries(&mut self) {
        (self.recent, self.samples) = (None, None);
    }

    /// Compresses the layers that the layered format is for, if it is this cache's. What is too short for that may go on as an
    /// exact cache and be long enough at the end of another prompt: its queries stay sampled.
    fn end_layered(&mut self, pool: &Pool) {
        if let Some((settings, samples)) = self.take_end_layered()
            && let Some(work) = self.taken_layered(settings, |_| true)
        {
            self.put(work.encode(pool, &samples, None));
        }
    }

    /// The settings of the layered format and the sampled queries, if there is a prompt to be compressed with them.
    fn take_end_layered(&mut self) -> Option<(Layered, Vec<Samples>)> {
        let KvFormat::Layered(settings) = self.format else { return None };
        let has_full_layers = (0..self.shape.layers).any(|layer| self.shape.window_of(layer).is_none());
        if has_full_layers && self.tokens() < Layered::LEAST_TOKENS {
            return None;
        }
        Some((settings, self.samples.take()?))
    }

    /// The `chosen` ones of the exact layers that the layered format is for: not those with a window, nor short ones. The cache no longer
    /// has them.
    fn taken_layered(&mut self, settings: Layered, chosen: impl Fn(usize) -> bool) -> Option<LayeredWork> {
        let calibration = self.calibration.clone().expect("a layered cache has a calibration");
        let mut prompts = vec![];
        for (layer, of) in self.layers.iter_mut().enumerate() {
            if let Layer::Exact(heads) = of
                && chosen(layer)
                && self.shape.window_of(layer).is_none()
                && heads.first().is_some_and(layered::is_worth_it)
            {
                prompts.push((layer, std::mem::take(heads)));
            }
        }
        // Without the heads that were just taken out.
        let others = self.bytes().total();
        (!prompts.is_empty()).then_some(LayeredWork {
            shape: self.shape,
            calibration,
            prompts,
            settings,
            others,
            places: self.places,
        })
    }

    fn put(&mut self, made: Vec<(usize, Layer)>) {
        made.into_iter().for_each(|(layer, heads)| self.layers[layer] = heads);
    }

    /// Bytes that [`compress_harder`](KvCache::compress_harder) with this ratio would save, about; `None` if it is not compressed in the
    /// layered format, or takes no more than an eighth over that.
    pub fn excess(&self, ratio: f32) -> Option<usize> {
        let exact = self.exact_bytes_of_layered();
        let bytes = layered::excess(self.in_layered_format(), exact, ratio / 1.125)?;
        Some(bytes - (exact as f32 / ratio) as usize)
    }

    fn in_layered_format(&self) -> impl Iterator<Item = &LayeredHead> {
        let heads = self.layers.iter().filter_map(|layer| match layer {
            Layer::Layered(heads) => Some(heads),
            _ => None,
        });
        heads.flatten()
    }

    /// f16 bytes of the tokens of the heads in the layered format.
    fn exact_bytes_of_layered(&self) -> usize {
        self.in_layered_format().count() * self.tokens() * self.shape.head_dim * 2 * size_of::<f16>()
    }

    /// Makes a cache in the layered format that is compressed smaller still, about as the format with this ratio would be (what was
    /// rounded once is rounded again, and the newest tokens stay as they are): what a server may do when bytes run out.
    /// `false`, and nothing changes, if there is no [`excess`](KvCache::excess). Pages that a clone shares stay as they are in the clone.
    pub fn compress_harder(&mut self, pool: &Pool, ratio: f32) -> bool {
        let KvFormat::Layered(settings) = self.format else { return false };
        if self.excess(ratio).is_none() {
            return false;
        }
        let exact = self.exact_bytes_of_layered();
        let layers = self.layers.iter_mut().filter_map(|layer| match layer {
            Layer::Layered(heads) => Some(heads),
            _ => None,
        });
        let heads: Vec<&mut LayeredHead> = layers.flatten().collect();
        layered::compress_harder(pool, heads, exact, ratio);
        self.format = KvFormat::Layered(Layered { target: Target::Ratio(ratio), ..settings });
        true
    }

    fn join(&mut self) {
        if let Some((layer, thread)) = self.encoding.0.take() {
            self.layers[layer] = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
    }

    /// An exact layer's heads and newest queries, which it no longer has.
    fn taken(&mut self, layer: usize) -> Option<(Vec<ExactHead>, RecentQueries)> {
        let Layer::Exact(exact) = &mut self.layers[layer] else { return None };
        let exact = std::mem::take(exact);
        let queries =
            self.recent.as_mut().map(|recent| std::mem::take(&mut recent[layer])).unwrap_or_default();
        let (wanted, got) = self.wanted_queries(exact[0].tokens(), &queries);
        assert!(
            !self.format.observes_queries() || got >= wanted,
            "layer {layer}: {got} queries were attended before the end of a prompt that needs {wanted}"
        );
        Some((exact, queries))
    }

    /// A copy of an exact cache in another format, as if its tokens had been a prompt that was read in that format:
    /// the same bytes, the same attention. Nothing of the prompt is computed again, and what the format keeps exact is
    /// shared with this cache. Queries that this cache remembers are not copied.
    pub fn compressed(&self, pool: &Pool, format: KvFormat) -> Result<KvCache, KvError> {
        self.fork(pool, format, |_| true)
    }

    /// The same with one layer compressed (but not where the format itself leaves it exact) and all others
    /// exact; [`format`](KvCache::format) of the copy is `exact`.
    pub fn compressed_layer(&self, pool: &Pool, layer: usize, format: KvFormat) -> Result<KvCache, KvError> {
        assert!(layer < self.shape.layers, "layer {layer} of {}", self.shape.layers);
        let format = match format {
            KvFormat::Layered(of) => {
                let target = of.target.of_one_layer(self.shape.exact_bytes(self.tokens()));
                KvFormat::Layered(Layered { target, ..of })
            }
            other => other,
        };
        let copy = self.fork(pool, format, |l| l == layer)?;
        Ok(KvCache { format: KvFormat::Exact, ..copy })
    }

    fn fork(
        &self,
        pool: &Pool,
        format: KvFormat,
        chosen: impl Fn(usize) -> bool,
    ) -> Result<KvCache, KvError> {
        format.fits(self.shape.head_dim)?;
        let settings = match format {
            KvFormat::Layered(settings) => Some(settings),
            _ => None,
        };
        let mut layers = Vec::with_capacity(self.layers.len());
        for (l, layer) in self.layers.iter().enumerate() {
            let Layer::Exact(heads) = layer else { return Err(KvError::AlreadyCompressed { layer: l }) };
            let alone = settings.is_none() && format.compresses(l) && self.shape.window_of(l).is_none();
            layers.push(if chosen(l) && alone {
                let none = RecentQueries::default();
                let queries = self.recent.as_ref().map_or(&none, |recent| &recent[l]);
                let (wanted, got) = self.wanted_queries(heads[0].tokens(), queries);
                if format.observes_queries() && got < wanted {
                    return Err(KvError::NoQueries { format: format.to_string(), layer: l, wanted, got });
                }
                compress(pool, self.shape, format, (heads.clone(), queries.rows()))
            } else {
                Layer::Exact(heads.clone())
            });
        }
        let mut copy = self.with_layers(format, layers);
        if let Some(settings) = settings {
            let (Some(_), Some(samples)) = (&self.calibration, &self.samples) else {
                return Err(KvError::NoCalibration { format: format.to_string() });
            };
            if let Some(work) = copy.taken_layered(settings, chosen) {
                copy.put(work.encode(pool, samples, None));
            }
        }
        Ok(copy)
    }

    /// A copy with other layers, nothing read yet.
    fn with_layers(&self, format: KvFormat, layers: Vec<Layer>) -> KvCache {
        KvCache {
            shape: self.shape,
            format,
            layers,
            isa: self.isa,
            bytes_read: 0,
            recent: format.observes_queries().then(|| vec![RecentQueries::default(); self.shape.layers]),
            calibration: self.calibration.clone(),
            samples: None,
            places: self.places,
            learning: self.learning.clone(),
            closings: vec![],
            encoding: Encoding::default(),
            ending: Ending::default(),
            phases: Phases::default(),
            working: Working::default(),
        }
    }

    /// Queries that a format which observes them needs of `tokens` tokens, and how many there are.
    fn wanted_queries(&self, tokens: usize, queries: &RecentQueries) -> (usize, usize) {
        let row = self.shape.heads * self.shape.head_dim;
        (tokens.min(WINDOW), queries.rows().len() / row)
    }
}

/// Exact layers that are to be compressed together in the layered format.
struct LayeredWork {
    shape: KvShape,
    calibration: Arc<Calibration>,
    prompts: Vec<(usize, Vec<ExactHead>)>,
    settings: Layered,
    /// Bytes of the cache beside these layers.
    others: usize,
    places: Places,
}

impl LayeredWork {
    /// The layers as they are to be, with the sampled queries of all layers.
    fn encode(self, pool: &Pool, samples: &[Samples], mut encoder: Option<Encoder>) -> Vec<(usize, Layer)> {
        let LayeredWork { shape, calibration, prompts, settings, others, places } = self;
        let layers: Vec<usize> = prompts.iter().map(|(layer, _)| *layer).collect();
        let of_layer = |(layer, heads)| Prompt { layer, heads, samples: &samples[layer] };
        let prompts = prompts.into_iter().map(of_layer).collect();
        let workers = (pool, encoder.as_mut());
        let how = (settings, others, places);
        let made = layered::compress(workers, shape, &calibration, prompts, how);
        let made: Vec<_> = layers.into_iter().zip(made).collect();
        if let Some(encoder) = encoder {
            encoder.give(&made);
        }
        made.into_iter().map(|(layer, heads)| (layer, Layer::Layered(heads))).collect()
    }
}

/// Exact layers that are to be compressed, each by itself.
struct ApartWork {
    shape: KvShape,
    format: KvFormat,
    prompts: Vec<(usize, (Vec<ExactHead>, RecentQueries))>,
}

impl ApartWork {
    /// The layers as they are to be.
    fn encode(self, pool: &Pool) -> Vec<(usize, Layer)> {
        let ApartWork { shape, format, prompts } = self;
        let mut work: Vec<_> = prompts.into_iter().map(|(layer, of)| (layer, Some(of), None)).collect();
        pool.for_each(&mut work, |_, (_, of, made)| {
            let one = |(exact, queries): (Vec<ExactHead>, RecentQueries)| {
                compress(&Pool::new(1), shape, format, (exact, queries.rows()))
            };
            *made = of.take().map(one);
        });
        work.into_iter().filter_map(|(layer, _, made)| Some((layer, made?))).collect()
    }
}

/// A layer of the format from its exact heads and its newest queries `[W, H, D]`, which are not scaled.
fn compress(
    pool: &Pool,
    shape: KvShape,
    format: KvFormat,
    (exact, queries): (Vec<ExactHead>, &[f32]),
) -> Layer {
    let (of_group, row) = (shape.group() * shape.head_dim, shape.heads * shape.head_dim);
    let scale = (shape.head_dim as f32).sqrt().recip();
    let of_head = |g: usize| -> Vec<f32> {
        let rows = queries.chunks_exact(row).flat_map(|row| &row[g * of_group..][..of_group]);
        rows.map(|q| q * scale).collect()
    };
    match format {
        KvFormat::Exact => Layer::Exact(exact),
        KvFormat::Layered(_) => unreachable!("all layers together, not one by one"),
        KvFormat::Packed(settings) => {
            Layer::Packed(each(pool, exact, |_, head| PackedHead::compress(&head, settings)))
        }
        KvFormat::Quest(p) => Layer::Baseline(each(pool, exact, |_, head| boxed(QuestHead::new(head, p)))),
        KvFormat::Strawman(p) => {
            Layer::Baseline(each(pool, exact, |_, head| boxed(StrawmanHead::new(&head, p))))
        }
        KvFormat::Quantized(p) => {
            Layer::Baseline(each(pool, exact, |_, head| boxed(QuantizedHead::new(&head, p))))
        }
        KvFormat::Kivi(kind) => {
            Layer::Baseline(each(pool, exact, |_, head| boxed(KiviHead::new(&head, kind))))
        }
        KvFormat::SnapKv(p) => {
            Layer::Baseline(each(pool, exact, |g, head| boxed(SnapKvHead::new(head, p, &of_head(g)))))
        }
    }
}

fn boxed(head: impl Head + 'static) -> Box<dyn Head> {
    Box::new(head)
}

/// `make(g, head)` of each head, which is freed as soon as it is done.
fn each<T: Send>(pool: &Pool, exact: Vec<ExactHead>, make: impl Fn(usize, ExactHead) -> T + Sync) -> Vec<T> {
    let mut heads: Vec<_> = exact.into_iter().map(|head| (Some(head), None)).collect();
    pool.for_each(&mut heads, |g, (exact, made)| *made = exact.take().map(|head| make(g, head)));
    let mut out = Vec::with_capacity(heads.len());
    out.extend(heads.into_iter().filter_map(|(_, made)| made));
    out
}
