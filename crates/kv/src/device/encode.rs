//! Who encodes the pages of a prompt in the layered format? The device, out of the exact pages that it has, beside its other work.
//!
//! The host plans, as ever. What the device makes of the plan is to the bit what the host would make of it: it stays there, for the
//! prompt's mirror, and a copy comes to the host's cache.

use super::{Heads, HeldLayered, Mirror, Pools, Store};
use crate::layered::{HeadCalibration, LayeredHead, Scales};
use crate::{KvCache, KvFormat};
use mosaickv_kernels::Pool as Threads;
use mosaickv_kernels::cuda::aside::{self, Part, Pending, Pinned};
use mosaickv_kernels::cuda::encode::{Encoded, Encoder as Kernels, PageOf, Source};
use mosaickv_kernels::cuda::layered::Growing;
use mosaickv_kernels::cuda::{Error, Gpu};
use mosaickv_kernels::layered::{PAGE_TOKENS, Pages, Profile};
use std::sync::{Arc, Mutex, PoisonError};

/// Heads of layers that were encoded, until their mirror adopts them.
pub(super) type Made = Arc<Mutex<Vec<(usize, Vec<HeldLayered>)>>>;

/// Encodes one prompt of a cache on the device.
#[derive(Debug)]
pub struct Encoder {
    gpu: Gpu,
    beside: Gpu,
    pools: Pools,
    /// The prompt's pages.
    table: Vec<u32>,
    made: Made,
    /// Heads encoded so far.
    heads: Vec<Growing>,
}

/// A head as it is planned.
pub(crate) struct Planned<'a> {
    pub(crate) layer: usize,
    /// Which of the layer's KV heads.
    pub(crate) head: usize,
    pub(crate) matrices: &'a HeadCalibration,
    pub(crate) scales: &'a Scales,
    /// The tokens of its pages, from `first` on.
    pub(crate) first: usize,
    pub(crate) order: &'a [u32],
    /// Profiles of every 64 of them.
    pub(crate) pages: &'a [(Profile, Profile)],
}

/// A layer that comes to the host: its heads, and where their pages belong.
struct Coming<'a> {
    pending: Pending,
    heads: Vec<Encoded>,
    out: &'a mut [Option<Pages>],
}

impl Mirror {
    /// Encodes the prompt of a cache that is in line with this; `None` if the device does not hold it.
    pub fn encoder(&self, store: &Store, cache: &KvCache) -> Option<Encoder> {
        let is_whole = self.times == 1 && self.before == 0;
        let is_held = |layer: usize| {
            matches!(self.layers[layer].heads, Heads::Exact) && self.layers[layer].tokens == cache.tokens()
        };
        if !matches!(cache.format, KvFormat::Layered(_)) || !is_whole || !(0..self.layers.len()).all(is_held)
        {
            return None;
        }
        Some(Encoder {
            gpu: store.gpu.clone(),
            beside: store.beside.clone(),
            pools: store.pools.clone(),
            table: self.pages.clone(),
            made: self.made.clone(),
            heads: vec![],
        })
    }

    /// Has the heads that were encoded for it.
    pub(super) fn adopt(&mut self) {
        for (layer, heads) in self.made.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            if self.times == 1 {
                self.layers[layer].heads = Heads::Layered(heads);
            }
        }
    }
}

impl Encoder {
    /// The pages of heads, layer by layer `kv_heads` of them; none of those for which the device has no memory.
    pub(crate) fn encode(&mut self, threads: &Threads, heads: &[Planned]) -> Vec<Option<Pages>> {
        let mut out: Vec<Option<Pages>> = heads.iter().map(|_| None).collect();
        if let Err(error) = self.try_encode(threads, heads, &mut out) {
            tracing::warn!("the host encodes a prompt or the rest of it: {error}");
        }
        out
    }

    fn try_encode(
        &mut self,
        threads: &Threads,
        heads: &[Planned],
        out: &mut [Option<Pages>],
    ) -> Result<(), Error> {
        let most_tokens = heads.iter().map(|head| head.order.len()).max().unwrap_or(0);
        let most = (most_tokens, most_tokens.div_ceil(PAGE_TOKENS));
        let (kv_heads, head_dim) = self.pools.of(0).shape();
        let mut kernels = Kernels::new(&self.beside, head_dim, most, &self.table)?;
        // The passes have written what is to be read.
        self.pools.of(0).data().read::<u8>(1)?;
        let (mut spare, mut before, mut result) = (None, None, Ok(()));
        for (heads, out) in heads.chunks(kv_heads).zip(out.chunks_mut(kv_heads)) {
            match self.layer(&mut kernels, heads) {
                Ok(encoded) => {
                    let coming = self.fetch(encoded, out, spare.take())?;
                    if let Some(before) = before.replace(coming) {
                        spare = Some(self.keep(threads, before)?);
                    }
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        if let Some(last) = before {
            self.keep(threads, last)?;
        }
        result
    }

    fn layer(&self, kernels: &mut Kernels, heads: &[Planned]) -> Result<Vec<Encoded>, Error> {
        let pool = self.pools.of(heads[0].layer);
        let of_head = |head: &Planned| {
            let scales = super::scales(head.scales);
            let source = Source { pool: &pool, head: head.head, first: head.first };
            kernels.turn(source, head.order, [&head.matrices.keys, &head.matrices.values], &scales)?;
            kernels.encode(&pages_of(head), &scales)
        };
        // Where it ends early, the pool may still be read.
        let encoded = heads.iter().map(of_head).collect::<Result<_, _>>();
        encoded.or_else(|error| kernels.wait().and(Err(error)))
    }

    /// Has a layer copied to the host, which looks at it beside what is encoded next.
    fn fetch<'a>(
        &self,
        heads: Vec<Encoded>,
        out: &'a mut [Option<Pages>],
        spare: Option<Pinned>,
    ) -> Result<Coming<'a>, Error> {
        let parts: Vec<Part> = heads.iter().flat_map(Encoded::parts).filter(|part| part.2 > 0).collect();
        let bytes = parts.iter().map(|part| part.2).sum::<usize>();
        let pinned = match spare.filter(|pinned| pinned.bytes() >= bytes) {
            Some(pinned) => pinned,
            None => Pinned::new(&self.beside, bytes + bytes / 4)?,
        };
        let pending = aside::fetch(&parts, pinned)?;
        Ok(Coming { pending, heads, out })
    }

    /// A layer's pages on the host, and its heads for the mirror.
    fn keep(&mut self, threads: &Threads, coming: Coming) -> Result<Pinned, Error> {
        let Coming { pending, heads, out } = coming;
        let pinned = pending.wait()?;
        let mut rest: &[u8] = pinned.numbers(0, heads.iter().map(Encoded::bytes).sum());
        let mut work = vec![];
        for (head, out) in heads.iter().zip(out) {
            let (bytes, after) = rest.split_at(head.bytes());
            rest = after;
            work.push((head, bytes, out));
        }
        threads.for_each(&mut work, |_, (head, bytes, out)| **out = Some(head.pages(bytes)));
        self.heads.extend(heads.into_iter().map(|head| head.growing(&self.gpu)));
        Ok(pinned)
    }

    /// The mirror of these layers, whose heads were encoded in the same order, gets what the device holds of them.
    pub(crate) fn give(self, layers: &[(usize, Vec<LayeredHead>)]) {
        let mut encoded = self.heads.into_iter();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        for (layer, heads) in layers {
            let held = heads.iter().zip(encoded.by_ref()).map(|(head, pages)| HeldLayered {
                pages,
                prompt: Arc::downgrade(&head.prompt),
                sizes: [0; 5],
                of_tail: 0,
            });
            let held: Vec<HeldLayered> = held.collect();
            if held.len() == heads.len() {
                made.push((*layer, held));
            }
        }
    }
}

/// Profiles of a head's pages, and their tokens.
fn pages_of(head: &Planned) -> Vec<PageOf> {
    let tokens = head.order.chunks(PAGE_TOKENS).map(<[u32]>::len);
    head.pages.iter().zip(tokens).map(|((keys, values), tokens)| (*keys, *values, tokens)).collect()
}
