//! What does a sequence remember, in which bytes, and what does attention over it give?
//!
//! A [`KvCache`] holds the keys and values of one sequence. Per layer and KV head they live one way:
//! `update buffer -> sealed page -> compressed segment`. While a prompt is read, tokens gather in exact pages;
//! [`KvCache::end_prompt`] compresses a layer's pages when its last prompt token is in, but of the layered format those of all
//! layers when the last layer's is, since they share one budget: until then all are exact, and some queries are remembered. Later
//! tokens pass through the update buffer. Layers with a sliding window are never compressed; they keep their window, exact, and drop
//! the pages that it has left. The cache knows no model, no request and no clock.
//!
//! Sealed pages are immutable and shared: cloning a cache copies only update buffers.

#![deny(unsafe_code)]

mod baselines;
mod bound;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;
mod compress;
pub mod device;
mod error;
mod exact;
mod format;
mod inspect;
mod layered;
mod learner;
mod observe;
mod oracle;
mod packed;
mod parts;
mod phases;
mod rotation;
mod saved;

use baselines::{Head, RecentQueries};
use compress::{Encoding, Ending};
use exact::ExactHead;
use layered::{Closing, LayeredHead, Places, Samples};
use learner::Learning;
use mosaickv_kernels::{AttnState, Isa, Pool, all_finite, exact::HEAD_DIM_STEP};
use packed::PackedHead;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use baselines::{GgmlType, Kivi, Quantized, Quest, SnapKv, Strawman, Turn};
pub use error::KvError;
pub use format::{KvFormat, KvFormats};
pub use inspect::{HalfInfo, HeadInfo, PageInfo, SegmentInfo};
pub use layered::{ByteCount, Calibration, Dropping, HeadCalibration, Layered, Moments, Select, Target};
pub use learner::{Background, Swaps, Timing};
pub use observe::Overlap;
pub use packed::{Packed, SINKS};
pub use parts::{HeadParts, Order, Part, Parts};
pub use phases::Phases;
pub use rotation::Basis;
pub use saved::ReadError;

/// Caches of which it is not worth a job of the pool to count what was read, or to store a token in each.
const FEW_CACHES: usize = 4;

/// Query heads that may share a KV head.
const MOST_QUERIES: usize = 128;

/// Shape of a model's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// `L`
    pub layers: usize,
    /// `H`, a multiple of `kv_heads`.
    pub heads: usize,
    /// `G`
    pub kv_heads: usize,
    /// `D`, a multiple of 16.
    pub head_dim: usize,
    /// Layers that see only the newest tokens, if there are such layers.
    pub window: Option<Window>,
}

/// Sliding-window layers: a query sees the newest tokens alone, itself included. They are always exact, whatever
/// the format, and remember no more than they may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Tokens that a query sees at most; not 0.
    pub tokens: usize,
    /// Every so many layers one sees everything (`Some(6)`: layers 5, 11, ..); `None`: no layer does.
    pub full_every: Option<usize>,
}

impl Window {
    /// Whether `layer` sees only the newest tokens.
    pub fn applies_to(self, layer: usize) -> bool {
        self.full_every.is_none_or(|every| !(layer + 1).is_multiple_of(every))
    }
}

impl KvShape {
    /// Query heads that share a KV head.
    pub fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Tokens that a query of `layer` sees at most; `None`: all.
    pub fn window_of(self, layer: usize) -> Option<usize> {
        self.window.filter(|window| window.applies_to(layer)).map(|window| window.tokens)
    }

    /// Bytes of `tokens` tokens as plain f16 keys and values: what every ratio is relative to. A layer with a
    /// sliding window counts no more tokens than its window has.
    pub fn exact_bytes(self, tokens: usize) -> usize {
        self.scalars(tokens) * 2
    }

    /// Scalars that `tokens` tokens have in all layers and heads, in a layer with a sliding window at most its
    /// window's.
    pub fn scalars(self, tokens: usize) -> usize {
        let remembered = |layer| self.window_of(layer).map_or(tokens, |window| window.min(tokens));
        (0..self.layers).map(remembered).sum::<usize>() * self.kv_heads * self.head_dim * 2
    }
}

/// Bytes allocated for a cache, by what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvBytes {
    /// f16 keys and values: all of `exact`, `quest` and `snapkv`; sinks, update buffer or residual of the others.
    pub exact: usize,
    /// What compressed pages hold: elements, bitmaps, block keys, bounds of blocks, codes, scales, padding, headers.
    pub packed: usize,
    /// Rotations of keys and values.
    pub rotations: usize,
    /// Raw keys and values of growing segments, and the sums over them, until their strategies are worked out.
    pub raw: usize,
    /// Lists of pages and other bookkeeping.
    pub lists: usize,
    /// The newest queries of each layer, while they are remembered.
    pub queries: usize,
}

impl KvBytes {
    /// All of them.
    pub fn total(self) -> usize {
        self.exact + self.packed + self.rotations + self.raw + self.lists + self.queries
    }
}

/// Keys and values of one sequence, in all layers.
#[derive(Clone, Debug)]
pub struct KvCache {
    shape: KvShape,
    format: KvFormat,
    layers: Vec<Layer>,
    isa: Isa,
    bytes_read: u64,
    /// Of each layer, if they are to be remembered.
    recent: Option<Vec<RecentQueries>>,
    /// What the layered format knows of the model.
    calibration: Option<Arc<Calibration>>,
    /// Of each layer, if they are to be remembered; of the layered format's own prompts until they are compressed.
    samples: Option<Vec<Samples>>,
    /// Of tokens in the layered format's pages.
    places: Places,
    /// Strategies for what is generated.
    learning: Learning,
    /// Of layers in the layered format: what has left their windows and is not yet in their tails.
    closings: Vec<(usize, Arc<Closing>)>,
    /// The layer that is being compressed.
    encoding: Encoding,
    ending: Ending,
    phases: Phases,
    working: Working,
}

/// Working memory of decode steps, kept for its allocations.
#[derive(Debug, Default)]
struct Working {
    /// Partial attention states.
    states: Vec<AttnState>,
    /// Of each KV head.
    packed: Vec<packed::Work>,
    /// Likewise.
    layered: Vec<layered::Work>,
}

/// A copy of a cache begins without.
impl Clone for Working {
    fn clone(&self) -> Working {
        Working::default()
    }
}

#[derive(Clone, Debug)]
enum Layer {
    Exact(Vec<ExactHead>),
    Packed(Vec<PackedHead>),
    Layered(Vec<LayeredHead>),
    Baseline(Vec<Box<dyn Head>>),
}

impl KvCache {
    /// An empty cache.
    pub fn new(shape: KvShape, format: KvFormat) -> Result<KvCache, KvError> {
        let KvShape { layers, heads, kv_heads, head_dim, window } = shape;
        let divides =
            kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads) && heads / kv_heads <= MOST_QUERIES;
        if !divides || head_dim == 0 || !head_dim.is_multiple_of(HEAD_DIM_STEP) {
            return Err(KvError::Shape { heads, kv_heads, head_dim });
        }
        if window.is_some_and(|window| window.tokens == 0 || window.full_every == Some(0)) {
            return Err(KvError::Window);
        }
        format.fits(head_dim)?;
        let head = |layer| ExactHead::new(head_dim, shape.window_of(layer));
        let layer = |layer| Layer::Exact((0..kv_heads).map(|_| head(layer)).collect());
        Ok(KvCache {
            shape,
            format,
            layers: (0..layers).map(layer).collect(),
            isa: Isa::current(),
            bytes_read: 0,
            recent: format.observes_queries().then(|| vec![RecentQueries::default(); layers]),
            calibration: None,
            samples: matches!(format, KvFormat::Layered(_)).then(|| vec![Samples::default(); layers]),
            places: Places::default(),
            learning: Learning::default(),
            closings: vec![],
            encoding: Encoding::default(),
            ending: Ending::default(),
            phases: Phases::default(),
            working: Working::default(),
        })
    }

    /// The same cache, whose generated tokens get their strategies and plans from a background thread; without one, they are
    /// worked out between steps. `timing` is for the packed format: in the layered one it is always fixed.
    pub fn with_background(mut self, background: Arc<Background>, timing: Timing) -> KvCache {
        for layer in &mut self.layers {
            if let Layer::Packed(heads) = layer {
                heads.iter_mut().for_each(PackedHead::settle);
            }
        }
        self.learning = Learning::shared(background, timing);
        self
    }

    /// The same cache of a model with this calibration, which the layered format needs.
    pub fn with_calibration(mut self, calibration: Arc<Calibration>) -> Result<KvCache, KvError> {
        let KvShape { layers, kv_heads, head_dim, .. } = self.shape;
        let wanted = layers * kv_heads;
        let (got, got_layers) = (calibration.heads.len(), calibration.layer_weights.len());
        let got_dim = calibration.head_dim().unwrap_or(0);
        if (got, got_layers, got_dim) != (wanted, layers, head_dim) {
            return Err(KvError::Calibration { got, got_layers, got_dim, wanted, layers, head_dim });
        }
        self.calibration = Some(calibration);
        Ok(self)
    }

    /// To be called between two tokens that follow a prompt, for each layer: hands what was packed meanwhile, or has left
    /// a window, to whoever works out strategies and plans, and swaps in the segments that are finished or due. Without this,
    /// temporary segments stay and windows grow.
    pub fn tend(&mut self, layer: usize) {
        match &mut self.layers[layer] {
            Layer::Packed(heads) => {
                for (g, head) in heads.iter_mut().enumerate() {
                    self.learning.attend_to((layer, g), head);
                }
            }
            Layer::Layered(heads) => {
                let start = Instant::now();
                let before = self.closings.len();
                self.closings.retain(|(l, closing)| *l != layer || !closing.swap(heads));
                self.learning.swaps.swapped += (before - self.closings.len()) * heads.len();
                if let Some(closing) = Closing::begin(heads) {
                    let closing = Arc::new(closing);
                    self.learning.hand_over(layer, &closing);
                    self.closings.push((layer, closing));
                }
                self.phases.flush += start.elapsed();
            }
            Layer::Exact(_) | Layer::Baseline(_) => {}
        }
    }

    /// [`tend`](KvCache::tend) to all layers.
    pub fn between_steps(&mut self) {
        (0..self.layers.len()).for_each(|layer| self.tend(layer));
    }

    /// Segments of the layered format that are due, and whose work no background has done.
    fn due(&self) -> impl Iterator<Item = Arc<Closing>> {
        let is_due = |layer: usize, closing: &Closing| match &self.layers[layer] {
            Layer::Layered(heads) => closing.is_open() && closing.is_due(heads),
            _ => false,
        };
        self.closings.iter().filter(move |(layer, closing)| is_due(*layer, closing)).map(|(_, c)| c.clone())
    }

    /// What has become of segments that grew while tokens were generated.
    pub fn swaps(&self) -> Swaps {
        self.learning.swaps
    }

    /// The same cache with other kernels: for tests and benchmarks.
    pub fn with_isa(mut self, isa: Isa) -> KvCache {
        self.isa = isa;
        self
    }

    /// The shape it was made for.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// The format it compresses into.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Tokens held. Between the layers of one forward pass the first layers are ahead; this is the last one's.
    pub fn tokens(&self) -> usize {
        self.layers.last().map_or(0, Layer::tokens)
    }

    /// Whether a prompt has been compressed: from then on tokens come one at a time.
    pub fn is_compressed(&self) -> bool {
        self.layers.iter().any(|layer| !matches!(layer, Layer::Exact(_)))
    }

    /// Adds `T` tokens to a layer: `keys` and `values` `[T, G, D]`, keys after RoPE. Either all are stored or, on
    /// an error, none. After the layer's [`end_prompt`](KvCache::end_prompt) a compressing cache takes one token
    /// at a time.
    pub fn append(&mut self, pool: &Pool, layer: usize, keys: &[f32], values: &[f32]) -> Result<(), KvError> {
        let row = self.shape.kv_heads * self.shape.head_dim;
        let tokens = keys.len() / row;
        assert_eq!(
            (keys.len(), values.len()),
            (tokens * row, tokens * row),
            "keys, values not rows of {row}"
        );
        if !all_finite(keys) || !all_finite(values) {
            return Err(KvError::NotFinite { layer });
        }
        let d = self.shape.head_dim;
        let is_exact = matches!(self.layers[layer], Layer::Exact(_));
        assert!(is_exact || tokens == 1, "a compressed layer takes one token at a time, got {tokens}");
        match &mut self.layers[layer] {
            Layer::Exact(heads) if tokens == 1 => {
                heads.iter_mut().enumerate().for_each(|(g, head)| head.append(keys, values, (g * d, row)));
            }
            Layer::Exact(heads) => pool.for_each(heads, |g, head| head.append(keys, values, (g * d, row))),
            Layer::Packed(heads) => {
                let is_due = heads[0].is_full();
                let append = |head: &mut PackedHead, key: &[f32], value: &[f32]| head.append(key, value);
                self.phases.flush += append_one(pool, (heads, is_due), (keys, values), append);
            }
            Layer::Layered(heads) => {
                let is_due = heads[0].is_full();
                let append = |head: &mut LayeredHead, key: &[f32], value: &[f32]| head.append(key, value);
                self.phases.flush += append_one(pool, (heads, is_due), (keys, values), append);
            }
            Layer::Baseline(heads) => {
                let is_due = heads[0].is_due();
                let append = |head: &mut Box<dyn Head>, key: &[f32], value: &[f32]| head.append(key, value);
                append_one(pool, (heads, is_due), (keys, values), append);
            }
        }
        Ok(())
    }

    /// Drops the pages that neither the newest token nor any later one can see.
    pub(crate) fn forget(&mut self, layer: usize) {
        if let Layer::Exact(heads) = &mut self.layers[layer] {
            heads.iter_mut().for_each(ExactHead::forget);
        }
    }

    /// Causal attention of `queries` `[T, H, D]`, after RoPE and not yet scaled, which belong to the newest `T`
    /// tokens of the layer. Writes `out` `[T, H, D]`. A compressed layer takes one token at a time. A layer with a
    /// sliding window then forgets what the newest token does not see.
    /// The result does not depend on the number of threads.
    pub fn attend(&mut self, pool: &Pool, layer: usize, queries: &[f32], out: &mut [f32]) {
        let row = self.shape.heads * self.shape.head_dim;
        let tokens = queries.len() / row;
        if tokens == 1 {
            return attend_each(&mut [self], pool, layer, queries, out);
        }
        assert_eq!(queries.len(), tokens * row, "queries are not rows of {row}");
        assert_eq!(out.len(), queries.len(), "output of the wrong length");
        assert!(tokens <= self.layers[layer].tokens(), "{tokens} queries for fewer tokens in the cache");
        self.observe(layer, queries);
        let step = self.step(pool);
        let Layer::Exact(heads) = &self.layers[layer] else {
            panic!("a compressed layer takes one token at a time, got {tokens}");
        };
        self.bytes_read += exact::prefill(step, heads, queries, out);
        self.forget(layer);
    }

    /// Remembers queries of a layer that is not compressed yet, if they are to be remembered.
    fn observe(&mut self, layer: usize, queries: &[f32]) {
        if let (Some(recent), Layer::Exact(_)) = (&mut self.recent, &self.layers[layer]) {
            recent[layer].push(queries, self.shape.heads * self.shape.head_dim);
        }
        if let (Some(samples), Layer::Exact(_)) = (&mut self.samples, &self.layers[layer]) {
            samples[layer].push(queries, self.shape.heads * self.shape.head_dim);
        }
    }

    /// After the attention of one token, which took so long in all caches of its format: what was read is counted and remembered, and what is out
    /// of sight forgotten.
    fn after_step(&mut self, layer: usize, of_packed: Phases, of_layered: Phases) {
        let KvCache { layers, working, bytes_read, phases, .. } = self;
        match &mut layers[layer] {
            Layer::Packed(heads) => {
                let works = &working.packed;
                heads.iter_mut().zip(works).for_each(|(head, work)| head.count_reads(&work.selected));
                *bytes_read += works.iter().map(|work| work.read).sum::<u64>();
                phases.add(of_packed);
            }
            Layer::Layered(heads) => {
                let works = &working.layered;
                heads.iter_mut().zip(works).for_each(|(head, work)| head.remember(work));
                *bytes_read += works.iter().map(|work| work.read).sum::<u64>();
                phases.add(of_layered);
            }
            Layer::Exact(_) | Layer::Baseline(_) => {}
        }
        self.forget(layer);
    }

    fn step<'a>(&self, pool: &'a Pool) -> Step<'a> {
        let scale = (self.shape.head_dim as f32).sqrt().recip();
        Step { shape: self.shape, isa: self.isa, pool, scale }
    }

    /// Time spent in the phases of attention over packed segments, and on update buffers, since it was made; a step that
    /// several caches take together counts in each of them.
    pub fn phases(&self) -> Phases {
        self.phases
    }

    /// Bytes that attention has read from this cache since it was made: keys, values, bitmaps, block keys and
    /// rotations. In prefill each page counts once for each block of 16 queries.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Bytes allocated for what is remembered; the working memory of a step (partial attention states) is not among
    /// them. A page shared with a clone counts in both.
    pub fn bytes(&self) -> KvBytes {
        let mut bytes = KvBytes {
            lists: size_of::<KvCache>() + self.layers.capacity() * size_of::<Layer>(),
            ..KvBytes::default()
        };
        for layer in &self.layers {
            match layer {
                Layer::Exact(heads) => {
                    bytes.lists += heads.capacity() * size_of::<ExactHead>();
                    heads.iter().for_each(|head| head.count(&mut bytes));
                }
                Layer::Packed(heads) => {
                    bytes.lists += heads.capacity() * size_of::<PackedHead>();
                    heads.iter().for_each(|head| head.count(&mut bytes));
                    self.learning.count(heads, &mut bytes);
                }
                Layer::Layered(heads) => {
                    bytes.lists += heads.capacity() * size_of::<LayeredHead>();
                    heads.iter().for_each(|head| head.count(&mut bytes));
                }
                Layer::Baseline(heads) => {
                    bytes.lists += heads.capacity() * size_of::<Box<dyn Head>>();
                    bytes.lists += heads.iter().map(|head| size_of_val(&**head)).sum::<usize>();
                    heads.iter().for_each(|head| head.count(&mut bytes));
                }
            }
        }
        bytes.lists += self.closings.capacity() * size_of::<(usize, Arc<Closing>)>();
        self.closings.iter().for_each(|(_, closing)| closing.count(&mut bytes));
        if let Some(recent) = &self.recent {
            bytes.lists += recent.capacity() * size_of::<RecentQueries>();
            bytes.queries = recent.iter().map(RecentQueries::bytes).sum();
        }
        if let Some(samples) = &self.samples {
            bytes.lists += samples.capacity() * size_of::<Samples>();
            bytes.queries += samples.iter().map(Samples::bytes).sum::<usize>();
        }
        bytes
    }

    /// Bytes of pages that this cache shares with one that it is a clone of, or that is a clone of it: among the
    /// [`bytes`](KvCache::bytes) of both.
    pub fn bytes_shared_with(&self, other: &KvCache) -> usize {
        let of_layer = |(ours, theirs): (&Layer, &Layer)| match (ours, theirs) {
            (Layer::Exact(ours), Layer::Exact(theirs)) => {
                ours.iter().zip(theirs).map(|(ours, theirs)| ours.bytes_shared_with(theirs)).sum()
            }
            (Layer::Packed(ours), Layer::Packed(theirs)) => {
                ours.iter().zip(theirs).map(|(ours, theirs)| ours.bytes_shared_with(theirs)).sum()
            }
            (Layer::Layered(ours), Layer::Layered(theirs)) => {
                ours.iter().zip(theirs).map(|(ours, theirs)| ours.bytes_shared_with(theirs)).sum()
            }
            _ => 0,
        };
        self.layers.iter().zip(&other.layers).map(of_layer).sum::<usize>()
    }

    /// Checks every invariant that can be checked without the original keys and values.
    pub fn check(&self) -> Result<(), KvError> {
        let tokens = self.tokens();
        for (l, layer) in self.layers.iter().enumerate() {
            for g in 0..self.shape.kv_heads {
                let (held, inside) = match layer {
                    Layer::Exact(heads) => (heads[g].tokens(), heads[g].check()),
                    Layer::Packed(heads) => (heads[g].tokens(), heads[g].check()),
                    Layer::Layered(heads) => (heads[g].tokens(), heads[g].check()),
                    Layer::Baseline(heads) => (heads[g].tokens(), heads[g].check()),
                };
                let error = |what| KvError::Integrity { layer: l, head: g, what };
                inside.map_err(error)?;
                if held != tokens {
                    return Err(error(format!("holds {held} tokens, the last layer {tokens}")));
                }
            }
        }
        Ok(())
    }
}

impl Layer {
    fn tokens(&self) -> usize {
        match self {
            Layer::Exact(heads) => heads[0].tokens(),
            Layer::Packed(heads) => heads[0].tokens(),
            Layer::Layered(heads) => heads[0].tokens(),
            Layer::Baseline(heads) => heads[0].tokens(),
        }
    }
}

/// Adds one token, `keys` and `values` `[G, D]`, to the heads of a compressed layer; over the pool if more than storing is
/// due, and then says how long that took.
fn append_one<T: Send>(
    pool: &Pool,
    (heads, is_due): (&mut [T], bool),
    (keys, values): (&[f32], &[f32]),
    append: impl Fn(&mut T, &[f32], &[f32]) + Sync,
) -> Duration {
    let d = keys.len() / heads.len();
    let append = |g: usize, head: &mut T| append(head, &keys[g * d..][..d], &values[g * d..][..d]);
    if is_due {
        let start = Instant::now();
        pool.for_each(heads, append);
        return start.elapsed();
    }
    heads.iter_mut().enumerate().for_each(|(g, head)| append(g, head));
    Duration::ZERO
}

/// Adds one token to a layer of each of some caches: `keys` and `values` `[B, G, D]`, as [`append`](KvCache::append) takes them. On an error
/// some have stored theirs.
pub fn append_each(
    caches: &mut [&mut KvCache],
    pool: &Pool,
    layer: usize,
    keys: &[f32],
    values: &[f32],
) -> Result<(), KvError> {
    let row = caches.first().map_or(0, |first| first.shape.kv_heads * first.shape.head_dim);
    let all = caches.len() * row;
    assert_eq!((keys.len(), values.len()), (all, all), "keys, values not {} rows of {row}", caches.len());
    let rows = keys.chunks_exact(row.max(1)).zip(values.chunks_exact(row.max(1)));
    if caches.len() < FEW_CACHES.max(pool.threads() / 2) {
        // Too few to go round, but their heads may be enough.
        return caches.iter_mut().zip(rows).try_for_each(|(cache, (k, v))| cache.append(pool, layer, k, v));
    }
    let alone = Pool::new(1);
    let mut tasks: Vec<_> = caches.iter_mut().zip(rows).map(|(cache, of)| (cache, of, Ok(()))).collect();
    pool.for_each(&mut tasks, |_, (cache, (k, v), done)| *done = cache.append(&alone, layer, k, v));
    tasks.into_iter().try_for_each(|(.., done)| done)
}

/// One head of one cache in a decode step.
struct Lane<'a, H, W> {
    head: &'a H,
    /// `[R, D]`
    queries: &'a [f32],
    /// Likewise.
    out: &'a mut [f32],
    /// Kept between steps for its allocations.
    work: &'a mut W,
}

/// The lanes of a cache: of its heads, and of the rows of `of_head` numbers that are theirs.
fn lanes<'a, H, W: Default>(
    (heads, work): (&'a [H], &'a mut Vec<W>),
    (queries, out): (&'a [f32], &'a mut [f32]),
    of_head: usize,
) -> impl Iterator<Item = Lane<'a, H, W>> {
    work.resize_with(heads.len(), Default::default);
    let rows = queries.chunks_exact(of_head).zip(out.chunks_exact_mut(of_head));
    let lanes = heads.iter().zip(work).zip(rows);
    lanes.map(|((head, work), (queries, out))| Lane { head, queries, out, work })
}

/// Attention for one new token in each of several caches of one shape, together: `queries` `[B, H, D]`, of which row
/// `i` belongs to the newest token of `caches[i]`; `out` likewise. To the bit what [`KvCache::attend`] gives for each
/// alone, but a pool's threads share out the work of all caches, which may be in different formats.
pub fn attend_each(caches: &mut [&mut KvCache], pool: &Pool, layer: usize, queries: &[f32], out: &mut [f32]) {
    let Some(first) = caches.first() else { return assert!(queries.is_empty(), "queries of no cache") };
    let (shape, step) = (first.shape, first.step(pool));
    let (row, of_head) = (shape.heads * shape.head_dim, shape.group() * shape.head_dim);
    assert_eq!(queries.len(), caches.len() * row, "queries are not {} rows of {row}", caches.len());
    assert_eq!(out.len(), queries.len(), "output of the wrong length");
    let heads = caches.len() * shape.kv_heads;
    let (mut exact, mut packed, mut layered) = (vec![], vec![], Vec::with_capacity(heads));
    let rows = queries.chunks_exact(row).zip(out.chunks_exact_mut(row));
    for (cache, (queries, out)) in caches.iter_mut().zip(rows) {
        assert!((cache.shape, cache.isa) == (shape, step.isa), "caches of different shapes or kernels");
        cache.observe(layer, queries);
        let KvCache { layers, working, bytes_read, .. } = &mut **cache;
        match &layers[layer] {
            Layer::Exact(heads) => {
                // What is compressed has tokens.
                assert!(heads[0].tokens() > 0, "a query for no token in the cache");
                exact.push(exact::Lane {
                    heads,
                    queries,
                    out,
                    states: &mut working.states,
                    read: bytes_read,
                });
            }
            Layer::Packed(heads) => {
                packed.extend(lanes((heads, &mut working.packed), (queries, out), of_head));
            }
            Layer::Layered(heads) => {
                layered.extend(lanes((heads, &mut working.layered), (queries, out), of_head));
            }
            Layer::Baseline(heads) => {
                *bytes_read += baselines::decode(step, &mut working.states, heads, queries, out);
            }
        }
    }
    exact::decode(step, &mut exact);
    let of_packed = packed::decode(step, &mut packed);
    let of_layered = layered::decode(step, &mut layered);
    pool.for_each_chunk(caches, FEW_CACHES, |_, caches| {
        caches.iter_mut().for_each(|cache| cache.after_step(layer, of_packed, of_layered));
    });
}

/// [`between_steps`](KvCache::between_steps) of each of some caches. Where the background came to nothing, since decoding left it no core, the pool's threads
/// share its work.
pub fn tend_each(caches: &mut [&mut KvCache], pool: &Pool) {
    let start = Instant::now();
    let of_each: Vec<Vec<Arc<Closing>>> = caches.iter().map(|cache| cache.due().collect()).collect();
    // Clones of a cache share theirs.
    let mut due: Vec<&Arc<Closing>> = of_each.iter().flatten().collect();
    due.sort_unstable_by_key(|closing| Arc::as_ptr(closing));
    due.dedup_by_key(|closing| Arc::as_ptr(closing));
    pool.for_each(&mut due, |_, closing| {
        closing.stored();
    });
    let waited = caches.iter_mut().zip(&of_each).filter(|(_, due)| !due.is_empty());
    waited.for_each(|(cache, _)| cache.phases.flush += start.elapsed());
    // One after the other: which segments are handed over where memory for that runs out must not depend on threads.
    caches.iter_mut().for_each(|cache| cache.between_steps());
}

/// What one step of attention goes by.
#[derive(Clone, Copy)]
struct Step<'a> {
    shape: KvShape,
    isa: Isa,
    pool: &'a Pool,
    scale: f32,
}

/// `count` empty states, reusing those that are there.
fn cleared(states: &mut Vec<AttnState>, count: usize, rows: usize, channels: usize) -> &mut [AttnState] {
    states.retain(|s| s.rows() == rows && s.channels() == channels);
    states.truncate(count);
    states.iter_mut().for_each(AttnState::clear);
    states.resize_with(count, || AttnState::new(rows, channels));
    states
}
