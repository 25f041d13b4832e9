//! What does a GPU hold of caches?
//!
//! The host keeps, the device attends: a [`KvCache`] stays the one truth of what a sequence remembers, and plans what becomes of it. A
//! [`Mirror`] is the device's copy of one: exact tokens in pages of a [`Store`], which all sequences of a model share, and compressed pages as
//! the host encoded them, or as an [`Encoder`] on the device has from the host's plan, to the bit the same. Before each pass, and after a step for
//! the next one, it is [brought in line](Mirror::update_each), and only what changed is written: what has left the window, and the window's newest pages. The device itself adds the keys and values of the tokens that it reads, and the host gets them
//! afterwards ([`KvCache::take`]).

mod attention;
mod encode;
mod packed;
mod taken;

use crate::exact::ExactHead;
use crate::layered::{LayeredHead, SINKS, Segment};
use crate::packed::PackedHead;
use crate::{Calibration, KvCache, KvError, KvFormat, KvShape, Layer};
use half::f16;
use half::slice::HalfFloatSliceExt;
use mosaickv_kernels::Pool as Threads;
use mosaickv_kernels::cuda::exact::{PAGE_TOKENS, Pool};
use mosaickv_kernels::cuda::layered::{Growing, Rotations, Scales};
use mosaickv_kernels::cuda::{Gpu, MOST_HEADS, MOST_ROWS};
use packed::HeldPacked;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

pub use attention::{Attention, Reads, reads_of};
pub use encode::Encoder;
pub(crate) use encode::Planned;
pub use taken::Taken;

/// Pages of exact tokens, for all sequences of a model: page `i` is one of each layer.
#[derive(Debug)]
pub struct Store {
    gpu: Gpu,
    /// For work beside the passes.
    beside: Gpu,
    shape: KvShape,
    pools: Pools,
    free: Free,
    /// Of each layer and KV head.
    rotations: Option<(Arc<Calibration>, Vec<Rotations>)>,
}

/// Pages that nobody has, of a store and its mirrors.
type Free = Arc<Mutex<BTreeSet<u32>>>;

/// The pages of each layer, of a store and of those who encode what is in them.
#[derive(Clone, Debug)]
struct Pools(Arc<RwLock<Vec<Arc<Pool>>>>);

impl Pools {
    fn of(&self, layer: usize) -> Arc<Pool> {
        let pools = self.0.read().unwrap_or_else(PoisonError::into_inner);
        pools[layer % pools.len()].clone()
    }

    /// How many have memory of their own.
    fn count(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Calls `change` with all of them.
    fn change<T>(&self, change: impl FnOnce(&mut Vec<Arc<Pool>>) -> T) -> T {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }
}

fn lock(free: &Free) -> MutexGuard<'_, BTreeSet<u32>> {
    free.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Without pages, for caches of this shape.
    pub fn new(gpu: &Gpu, shape: KvShape) -> Result<Store, KvError> {
        let no = |what, got: String, wanted| Err(KvError::NotOnDevice { what, got, wanted });
        if shape.window.is_some() {
            return no("the model's attention", "a sliding window".into(), "all tokens");
        }
        if !matches!(shape.head_dim, 64 | 128) {
            return no("the model's head_dim", shape.head_dim.to_string(), "64 or 128 channels");
        }
        if shape.group() > MOST_ROWS {
            return no("the query heads of a KV head", shape.group().to_string(), "at most 8");
        }
        let none = || Pool::new(gpu, 0, (shape.kv_heads, shape.head_dim)).map(Arc::new);
        let pools = (0..shape.layers).map(|_| none()).collect::<Result<_, _>>()?;
        let pools = Pools(Arc::new(RwLock::new(pools)));
        let (gpu, beside) = (gpu.clone(), gpu.beside()?);
        Ok(Store { gpu, beside, shape, pools, free: Free::default(), rotations: None })
    }

    /// Sequences that can take a step together.
    pub fn most_sequences(&self) -> usize {
        (MOST_HEADS / self.shape.kv_heads).max(1)
    }

    /// The pages of a layer.
    pub fn pool(&self, layer: usize) -> Arc<Pool> {
        self.pools.of(layer)
    }

    /// The same with the pages of all layers in the same memory: what is attended to means nothing, for measurements of contexts that do
    /// not fit. Each layer reads as many bytes as ever.
    pub fn sharing_layers(self) -> Store {
        self.pools.change(|pools| pools.truncate(1));
        self
    }

    /// Bytes of the pages that some sequence has, and of those that none has.
    pub fn bytes(&self) -> (usize, usize) {
        let of_page: usize = (0..self.pools.count()).map(|layer| self.pool(layer).bytes_of_page()).sum();
        let (all, free) = (self.pool(0).pages(), lock(&self.free).len());
        ((all - free) * of_page, free * of_page)
    }

    /// Has room for so many pages at once, where they are known beforehand.
    pub fn reserve(&mut self, pages: usize) -> Result<(), KvError> {
        if pages > self.pool(0).pages() { self.resize(pages) } else { Ok(()) }
    }

    /// Takes `count` pages, the lowest that are free.
    fn take(&mut self, count: usize) -> Result<Vec<u32>, KvError> {
        let (all, free) = (self.pool(0).pages(), lock(&self.free).len());
        if count > free {
            let needed = all + count - free;
            self.resize(needed + needed / 4).or_else(|_| self.resize(needed))?;
        }
        let mut free = lock(&self.free);
        Ok((0..count).map_while(|_| free.pop_first()).collect())
    }

    /// Gives the device back what nobody has, if that is more than half.
    fn trim(&mut self) {
        let all = self.pool(0).pages();
        let free = lock(&self.free);
        let mut used = all;
        while used > 0 && free.contains(&(used as u32 - 1)) {
            used -= 1;
        }
        drop(free);
        if used < all / 2
            && let Err(error) = self.resize(used)
        {
            // The smaller one did not fit beside the larger one.
            tracing::debug!("pages of the GPU stay: {error}");
        }
    }

    /// Has room for `pages` pages in each layer; those beyond must be free.
    fn resize(&mut self, pages: usize) -> Result<(), KvError> {
        let (old, mut free) = (self.pool(0).pages(), lock(&self.free));
        free.retain(|page| (*page as usize) < pages);
        // The first layer has as many pages as all have, also where an error ends this: it shrinks first and grows last.
        let mut in_order: Vec<usize> = (0..self.pools.count()).collect();
        if pages > old {
            in_order.reverse();
        }
        let done =
            in_order.into_iter().filter(|layer| self.pool(*layer).pages() != pages).try_for_each(|layer| {
                let resized = self.pool(layer).resized(&self.gpu, pages)?;
                // Who encodes beside the passes may read it at once, and does not wait for the copy.
                resized.data().read::<u8>(1)?;
                // Freeing what was before waits for the device, and the others not for that.
                drop(self.pools.change(|pools| std::mem::replace(&mut pools[layer], Arc::new(resized))));
                Ok(())
            });
        free.extend(old.min(pages) as u32..self.pool(0).pages() as u32);
        done
    }

    /// Rotations of the heads of a layer of models with this calibration.
    fn rotate(&mut self, calibration: &Arc<Calibration>) -> Result<(), KvError> {
        if self.rotations.as_ref().is_some_and(|(of, _)| Arc::ptr_eq(of, calibration)) {
            return Ok(());
        }
        let upload = |head: &crate::HeadCalibration| {
            Rotations::new(&self.gpu, &head.queries, &head.outputs, self.shape.head_dim)
        };
        let rotations = calibration.heads.iter().map(upload).collect::<Result<_, _>>()?;
        self.rotations = Some((calibration.clone(), rotations));
        Ok(())
    }
}

/// What the device holds of one cache. A clone begins with nothing, and is brought in line like any other.
#[derive(Debug)]
pub struct Mirror {
    /// No other has the same.
    id: u64,
    free: Free,
    made: encode::Made,
    /// Of the store, for exact tokens, the same in all layers.
    pages: Vec<u32>,
    layers: Vec<Held>,
    /// How often the prompt is there, and exact tokens before the cache's: for measurements.
    times: usize,
    before: usize,
}

/// What the device holds of a layer.
#[derive(Debug, Default)]
struct Held {
    /// Exact tokens.
    tokens: usize,
    heads: Heads,
    /// How often heads changed.
    changes: u64,
}

/// Compressed heads, by format.
#[derive(Debug, Default)]
enum Heads {
    /// All tokens are exact.
    #[default]
    Exact,
    Packed(Vec<HeldPacked>),
    Layered(Vec<HeldLayered>),
}

/// What the device holds of a compressed head.
trait HeldHead: Sized + Send {
    /// What the host has.
    type Host: Sync;
    /// Exact tokens that stay in their places when pages change.
    const STAY: usize;
    /// Whether it is the same as the host's.
    fn is_of(&self, head: &Self::Host) -> bool;
    /// What is held of `head`, after what was held before; its prompt is there so many times.
    fn updated(before: Option<Self>, gpu: &Gpu, of: (&Self::Host, usize)) -> Result<Self, KvError>;
    /// Bytes on the device, with the room that it has to grow.
    fn bytes(&self) -> usize;
}

/// A head in the layered format.
#[derive(Debug)]
struct HeldLayered {
    pages: Growing,
    /// Of these pages.
    prompt: Weak<Segment>,
    /// Pages in each of the segments, and tokens in the newest.
    sizes: [usize; 5],
    /// Tokens of the tail, with those that were dropped.
    of_tail: usize,
}

impl Clone for Mirror {
    fn clone(&self) -> Mirror {
        let mut mirror = Mirror::of(&self.free, self.layers.len());
        (mirror.times, mirror.before) = (self.times, self.before);
        mirror
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        lock(&self.free).extend(self.pages.drain(..));
    }
}

impl Mirror {
    /// Of an empty cache.
    pub fn new(store: &Store) -> Mirror {
        Mirror::of(&store.free, store.shape.layers)
    }

    fn of(free: &Free, layers: usize) -> Mirror {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Mirror {
            id,
            free: free.clone(),
            made: encode::Made::default(),
            pages: vec![],
            layers: (0..layers).map(|_| Held::default()).collect(),
            times: 1,
            before: 0,
        }
    }

    /// Whether a GPU attends to caches in this format.
    pub fn check(format: KvFormat) -> Result<(), KvError> {
        match format {
            KvFormat::Exact | KvFormat::Layered(_) | KvFormat::Packed(_) => Ok(()),
            other => {
                let wanted = "caches in the formats exact, layered and packed";
                Err(KvError::NotOnDevice { what: "--kv", got: other.to_string(), wanted })
            }
        }
    }

    /// Makes it the same as the cache, with room for `more` tokens, which the device adds then. One in a compressed cache. What compressed
    /// pages grew by is written by [`Attention::set`].
    pub fn update(
        &mut self,
        store: &mut Store,
        cache: &mut KvCache,
        threads: &Threads,
        more: usize,
    ) -> Result<(), KvError> {
        Mirror::update_each(&mut [(self, cache)], store, threads, more)
    }

    /// The same of several mirrors and their caches.
    pub fn update_each(
        pairs: &mut [(&mut Mirror, &mut KvCache)],
        store: &mut Store,
        threads: &Threads,
        more: usize,
    ) -> Result<(), KvError> {
        pairs.iter().try_for_each(|(_, cache)| Mirror::check(cache.format))?;
        pairs.iter_mut().for_each(|(mirror, _)| mirror.adopt());
        KvCache::make_room(pairs.iter_mut().map(|(_, cache)| &mut **cache), threads);
        for (mirror, cache) in &mut *pairs {
            let is_layered = cache.layers.iter().any(|layer| matches!(layer, Layer::Layered(_)));
            if let Some(calibration) = cache.calibration.as_ref().filter(|_| is_layered) {
                store.rotate(calibration)?;
            }
            let exact = cache.layers.iter().map(exact_tokens).max().unwrap_or(0);
            mirror.fit(store, (mirror.before + exact + more).div_ceil(PAGE_TOKENS))?;
        }
        Held::update_each(pairs, &store.gpu, threads)?;
        pairs.iter_mut().try_for_each(|(mirror, cache)| mirror.write_exact(store, cache))
    }

    /// Writes the exact tokens that the device did not add.
    fn write_exact(&mut self, store: &Store, cache: &KvCache) -> Result<(), KvError> {
        for (l, (layer, held)) in cache.layers.iter().zip(&mut self.layers).enumerate() {
            let tokens = exact_tokens(layer);
            for page in held.tokens / PAGE_TOKENS..tokens.div_ceil(PAGE_TOKENS) {
                if held.tokens < tokens {
                    let numbers = page_of(layer, page, cache.shape.head_dim);
                    let page = self.pages[self.before / PAGE_TOKENS + page];
                    store.pool(l).write_page(page as usize, &numbers)?;
                }
            }
            held.tokens = tokens;
        }
        Ok(())
    }

    /// Has so many pages.
    fn fit(&mut self, store: &mut Store, pages: usize) -> Result<(), KvError> {
        if pages < self.pages.len() {
            lock(&self.free).extend(self.pages.drain(pages..));
            store.trim();
        }
        let more = store.take(pages - self.pages.len())?;
        self.pages.extend(more);
        Ok(())
    }

    /// The same of a cache whose compressed prompt is there so many times, or before whose exact tokens there are others: longer contexts, for
    /// measurements of speed alone.
    pub fn stretched(&self, times: usize, pages: usize) -> Mirror {
        let mut mirror = self.clone();
        (mirror.times, mirror.before) = (times, pages * PAGE_TOKENS);
        mirror
    }

    /// Pages for exact tokens, in order.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Exact tokens of a layer on the device.
    pub fn exact_tokens(&self, layer: usize) -> usize {
        self.before + self.layers[layer].tokens
    }

    /// The device has added the keys and values of so many tokens in each layer, and has what was written before.
    pub fn added(&mut self, tokens: usize) {
        for held in &mut self.layers {
            held.tokens += tokens;
            if let Heads::Layered(heads) = &mut held.heads {
                heads.iter_mut().for_each(|head| head.pages.written());
            }
        }
    }

    /// Bytes of the compressed pages on the device, with the room that they have to grow, and those that were encoded for it.
    pub fn bytes(&self) -> usize {
        let of_layer = |held: &Held| match &held.heads {
            Heads::Exact => 0,
            Heads::Packed(heads) => heads.iter().map(HeldPacked::bytes).sum(),
            Heads::Layered(heads) => heads.iter().map(HeldLayered::bytes).sum::<usize>(),
        };
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let made: usize = made.iter().flat_map(|(_, heads)| heads).map(HeldLayered::bytes).sum();
        self.layers.iter().map(of_layer).sum::<usize>() + made
    }
}

impl Held {
    /// Has compressed heads as the hosts have them.
    fn update_each(
        pairs: &mut [(&mut Mirror, &mut KvCache)],
        gpu: &Gpu,
        threads: &Threads,
    ) -> Result<(), KvError> {
        let (mut packed, mut layered) = (vec![], vec![]);
        for (mirror, cache) in pairs {
            let times = mirror.times;
            for (held, layer) in mirror.layers.iter_mut().zip(&cache.layers) {
                held.take_format(layer);
                let Held { tokens, heads, changes } = held;
                match (layer, heads) {
                    (Layer::Packed(heads), Heads::Packed(held)) => {
                        packed.push(Following { held, tokens, changes, heads, times });
                    }
                    (Layer::Layered(heads), Heads::Layered(held)) => {
                        layered.push(Following { held, tokens, changes, heads, times });
                    }
                    _ => {}
                }
            }
        }
        let packed = follow(packed, gpu, threads);
        follow(layered, gpu, threads).and(packed)
    }

    /// Is ready to hold heads in the layer's format.
    fn take_format(&mut self, layer: &Layer) {
        let none = match (layer, &self.heads) {
            (Layer::Packed(_), Heads::Packed(_)) | (Layer::Layered(_), Heads::Layered(_)) => return,
            (Layer::Exact(_) | Layer::Baseline(_), Heads::Exact) => return,
            (Layer::Packed(_), _) => Heads::Packed(vec![]),
            (Layer::Layered(_), _) => Heads::Layered(vec![]),
            (Layer::Exact(_) | Layer::Baseline(_), _) => {
                self.tokens = 0;
                Heads::Exact
            }
        };
        (self.heads, self.changes) = (none, self.changes + 1);
    }
}

/// A layer whose heads are to be as the host has them.
struct Following<'a, H: HeldHead> {
    held: &'a mut Vec<H>,
    tokens: &'a mut usize,
    changes: &'a mut u64,
    heads: &'a [H::Host],
    times: usize,
}

impl<H: HeldHead> Following<'_, H> {
    fn is_changed(&self) -> bool {
        let mut pairs = self.held.iter().zip(self.heads);
        self.held.len() != self.heads.len() || !pairs.all(|(held, head)| held.is_of(head))
    }

    /// A layer that failed holds nothing. What changed forgets the exact tokens that have moved.
    fn end(self, updated: Vec<Result<H, KvError>>) -> Result<(), KvError> {
        *self.held = updated.into_iter().collect::<Result<_, _>>()?;
        *self.tokens = H::STAY.min(*self.tokens);
        *self.changes += 1;
        Ok(())
    }
}

/// Brings layers in line, the heads of all of them at once.
fn follow<H: HeldHead>(layers: Vec<Following<H>>, gpu: &Gpu, threads: &Threads) -> Result<(), KvError> {
    let mut changed: Vec<_> = layers.into_iter().filter(Following::is_changed).collect();
    let mut work = vec![];
    for of in &mut changed {
        let before = of.held.drain(..).map(Some).chain(std::iter::repeat_with(|| None));
        work.extend(of.heads.iter().zip(before).map(|(head, before)| (head, of.times, before, None)));
    }
    threads.for_each(&mut work, |_, (head, times, before, after)| {
        *after = Some(H::updated(before.take(), gpu, (head, *times)));
    });
    let mut updated = work.into_iter().filter_map(|(.., after)| after);
    let end = |of: Following<H>| {
        let of_layer = updated.by_ref().take(of.heads.len()).collect();
        of.end(of_layer)
    };
    changed.into_iter().map(end).fold(Ok(()), Result::and)
}

impl HeldHead for HeldLayered {
    type Host = LayeredHead;
    const STAY: usize = SINKS;

    fn is_of(&self, head: &LayeredHead) -> bool {
        self.sizes == sizes(head) && std::ptr::eq(self.prompt.as_ptr(), Arc::as_ptr(&head.prompt))
    }

    fn updated(
        before: Option<HeldLayered>,
        gpu: &Gpu,
        (head, times): (&LayeredHead, usize),
    ) -> Result<HeldLayered, KvError> {
        let of_tail = head.tail.pages.pages().len();
        let is_prefix = |held: &HeldLayered| {
            std::ptr::eq(held.prompt.as_ptr(), Arc::as_ptr(&head.prompt)) && held.sizes[1] <= of_tail
        };
        let before = before.filter(is_prefix);
        let is_new = before.is_none();
        let mut held = match before {
            Some(held) => held,
            None => {
                let pages = Growing::new(gpu, (&head.prompt.pages, times), &scales(&head.scales))?;
                HeldLayered { pages, prompt: Arc::downgrade(&head.prompt), sizes: [0; 5], of_tail: 0 }
            }
        };
        let same = held.same_newest(head);
        let of_leaving = head.leaving.pages.pages().len();
        let mut newest = head.leaving.pages.after(same.min(of_leaving));
        newest.append(&head.window.pages.after(same.saturating_sub(of_leaving)));
        held.pages.grow(&head.tail.pages.after(held.sizes[1]), (same, &newest))?;
        (held.sizes, held.of_tail) = (sizes(head), head.tail.tokens());
        if is_new {
            held.pages.write()?;
            held.pages.written();
        }
        Ok(held)
    }

    fn bytes(&self) -> usize {
        self.pages.bytes()
    }
}

impl HeldLayered {
    /// How many of the pages after the tail are as they were: as long as the tail is, all but the last, which buffers are added to.
    fn same_newest(&self, head: &LayeredHead) -> usize {
        let of = |[_, _, leaving, window, _]: [usize; 5]| leaving + window;
        if self.of_tail == head.tail.tokens() {
            of(self.sizes).min(of(sizes(head))).saturating_sub(1)
        } else {
            0
        }
    }
}

/// By which a change of a head's pages shows.
fn sizes(head: &LayeredHead) -> [usize; 5] {
    let [prompt, tail, leaving, window] = head.segments().map(|segment| segment.pages.pages().len());
    let newest = head.window.pages.pages().last().map_or(0, |page| page.tokens());
    [prompt, tail, leaving, window, newest]
}

fn scales(of: &crate::layered::Scales) -> Scales {
    Scales {
        key_mean: of.key_mean().to_vec(),
        key_spread: of.key_spread().to_vec(),
        value_mean: of.value_mean().to_vec(),
        value_spread: of.value_spread().to_vec(),
    }
}

/// Tokens of a layer that are in no compressed page.
fn exact_tokens(layer: &Layer) -> usize {
    match layer {
        Layer::Layered(heads) => SINKS + heads[0].buffer.as_ref().map_or(0, |buffer| buffer.tokens()),
        Layer::Packed(heads) => heads[0].sinks.tokens() + heads[0].buffer.tokens(),
        Layer::Exact(_) | Layer::Baseline(_) => layer.tokens(),
    }
}

/// One page of a layer's exact tokens as the device has it: `[G, 2, 64, D]`.
fn page_of(layer: &Layer, page: usize, d: usize) -> Vec<f16> {
    let half = PAGE_TOKENS * d;
    let mut numbers = vec![];
    let mut add = |keys: &[f32], values: &[f32]| {
        for rows in [keys, values] {
            let start = numbers.len();
            numbers.resize(start + half, f16::ZERO);
            numbers[start..start + rows.len()].convert_from_f32_slice(rows);
        }
    };
    match layer {
        Layer::Exact(heads) => heads.iter().for_each(|head| {
            let (keys, values) = rows_of_page(head, page, d);
            add(&keys, &values);
        }),
        Layer::Packed(heads) => heads.iter().for_each(|head| {
            let (keys, values) = head.outside_pages();
            let of_page = |x: &[f32]| x.chunks(half).nth(page).unwrap_or_default().to_vec();
            add(&of_page(&keys), &of_page(&values));
        }),
        Layer::Layered(heads) => heads.iter().for_each(|head| {
            let (keys, values) = head.outside_pages();
            add(&keys, &values);
        }),
        Layer::Baseline(_) => unreachable!("formats were checked"),
    }
    numbers
}

fn rows_of_page(head: &ExactHead, page: usize, d: usize) -> (Vec<f32>, Vec<f32>) {
    let page = head.page(page);
    let (mut keys, mut values) = (vec![0.0; page.tokens() * d], vec![0.0; page.tokens() * d]);
    page.rows(&mut keys, &mut values);
    (keys, values)
}

impl PackedHead {
    /// Keys and values `[n, D]` of the first tokens and the buffer's.
    fn outside_pages(&self) -> (Vec<f32>, Vec<f32>) {
        crate::packed::rows(&[&self.sinks, &self.buffer])
    }
}

impl LayeredHead {
    /// Keys and values `[n, D]` of the first tokens and the buffer's.
    fn outside_pages(&self) -> (Vec<f32>, Vec<f32>) {
        let d = self.head_dim();
        let (mut keys, mut values) = (vec![], vec![]);
        for token in self.sinks.chunks_exact(2 * d) {
            keys.extend(token[..d].iter().map(|x| x.to_f32()));
            values.extend(token[d..].iter().map(|x| x.to_f32()));
        }
        if let Some(buffer) = &self.buffer {
            let (more_keys, more_values) = crate::packed::rows(&[buffer]);
            keys.extend(more_keys);
            values.extend(more_values);
        }
        (keys, values)
    }
}

#[cfg(test)]
mod tests;
