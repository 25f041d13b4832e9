//! How does a device attend to the next token of each of several sequences?

use super::packed::OfPacked;
use super::{Heads, Held, HeldLayered, Mirror, Store};
use crate::{KvCache, KvError, KvShape, Layer};
use half::f16;
use mosaickv_kernels::cuda::exact::{Exact, LEAST_PART as LEAST_EXACT};
use mosaickv_kernels::cuda::layered::{Choice, Growing, LEAST_PART, Layered, Scales};
use mosaickv_kernels::cuda::{Buffer, Gpu, PARTS, Shape};
use mosaickv_kernels::layered::Pages;

/// Pages for which there is room in tables at least.
const LEAST_PAGES: usize = 64;

/// Attention of steps of so many sequences, whose working memory stays from step to step.
#[derive(Debug)]
pub struct Attention {
    gpu: Gpu,
    shape: Shape,
    layers: usize,
    exact: Vec<Exact>,
    /// Pages of a sequence for which there is room.
    most_pages: usize,
    /// Of caches in one of these formats.
    pub(super) packed: Option<OfPacked>,
    pub(super) layered: Option<OfLayered>,
}

/// What steps of a cache read: steps that several caches take together must read alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reads {
    /// What is chosen of the layered format, or all of what is exact.
    Layered(Choice),
    /// A share of the tokens in the packed format.
    Packed(f32),
}

#[derive(Debug)]
pub(super) struct OfLayered {
    pub(super) layers: Vec<Layered>,
    choice: Choice,
    /// Pages of a head for which there is room, and those at its end.
    most: usize,
    newest: usize,
    /// What each layer's heads are: whose, and after how many changes; nothing if none of them has pages.
    set: Vec<Vec<(u64, u64)>>,
    /// Of sequences whose layer is exact.
    none: Growing,
}

impl Attention {
    /// For steps of `sequences` sequences.
    pub fn new(store: &Store, sequences: usize) -> Result<Attention, KvError> {
        let KvShape { layers, kv_heads, head_dim, .. } = store.shape;
        let shape = Shape { sequences, kv_heads, rows: store.shape.group(), head_dim };
        let gpu = store.gpu.clone();
        Ok(Attention { gpu, shape, layers, exact: vec![], most_pages: 0, packed: None, layered: None })
    }

    /// Sequences of a step.
    pub fn sequences(&self) -> usize {
        self.shape.sequences
    }

    /// Has room for a step of these mirrors, whose caches all [read](reads_of) alike: what is too small goes before what is larger comes. After
    /// an error this is not to be used any more.
    pub fn fit(&mut self, mirrors: &[&Mirror], reads: Reads) -> Result<(), KvError> {
        let most = mirrors.iter().map(|mirror| mirror.pages().len()).max().unwrap_or(0);
        if most > self.most_pages || self.exact.is_empty() {
            self.most_pages = (most + most / 2).max(LEAST_PAGES);
            self.exact = vec![];
            self.exact =
                Exact::layers(&self.gpu, self.shape, self.most_pages, (PARTS, LEAST_EXACT), self.layers)?;
        }
        let (before, sizes) = (self.packed.take(), (self.shape, self.layers));
        match reads {
            Reads::Packed(selected) => {
                self.layered = None;
                self.packed = OfPacked::fit(before, &self.gpu, sizes, mirrors, selected)?;
                Ok(())
            }
            Reads::Layered(choice) => self.fit_layered(mirrors, choice),
        }
    }

    /// Writes what a step of these mirrors reads, which are in line with their caches and have room for the step's token, once there is
    /// [room](Attention::fit) for it. After an error this is not to be used any more.
    pub fn set(&mut self, store: &Store, mirrors: &[&Mirror]) -> Result<(), KvError> {
        let pages: Vec<&[u32]> = mirrors.iter().map(|mirror| mirror.pages()).collect();
        let of_layer = |l: usize| mirrors.iter().map(move |mirror| mirror.exact_tokens(l) as u32 + 1);
        let tokens: Vec<u32> = (0..self.layers).flat_map(of_layer).collect();
        Exact::set_layers(&mut self.exact, &tokens, &pages)?;
        match &mut self.packed {
            Some(packed) => packed.set(mirrors),
            None => self.set_layered(store, mirrors),
        }
    }

    fn fit_layered(&mut self, mirrors: &[&Mirror], choice: Choice) -> Result<(), KvError> {
        let heads = || mirrors.iter().flat_map(|mirror| &mirror.layers).flat_map(of_held);
        let most_of = |of: fn(&Growing) -> usize| heads().map(|head| of(&head.pages)).max();
        let Some(most) = most_of(|pages| pages.head().page_count()) else {
            self.layered = None;
            return Ok(());
        };
        let newest = most_of(|pages| pages.head().page_count() - pages.head().selectable()).unwrap_or(0);
        let fits = |of: &OfLayered| of.most >= most && of.newest >= newest && of.choice == choice;
        if !self.layered.as_ref().is_some_and(fits) {
            self.layered = None;
            self.layered =
                Some(OfLayered::new(&self.gpu, (self.shape, self.layers), (most, newest), choice)?);
        }
        Ok(())
    }

    fn set_layered(&mut self, store: &Store, mirrors: &[&Mirror]) -> Result<(), KvError> {
        let Some(of) = &mut self.layered else { return Ok(()) };
        let mut heads = mirrors.iter().flat_map(|mirror| &mirror.layers).flat_map(of_held);
        heads.try_for_each(|head| head.pages.write())?;
        let Some((_, rotations)) = &store.rotations else {
            unreachable!("compressed caches have a calibration")
        };
        for l in 0..self.layers {
            let held: Vec<_> = mirrors.iter().map(|mirror| &mirror.layers[l]).collect();
            let is_compressed = held.iter().any(|held| !of_held(held).is_empty());
            let now = if is_compressed { whose(mirrors, l) } else { vec![] };
            if of.set[l] != now {
                let mut heads = vec![];
                for held in held {
                    match of_held(held) {
                        [] => heads.resize(heads.len() + self.shape.kv_heads, of.none.head()),
                        of_layer => heads.extend(of_layer.iter().map(|head| head.pages.head())),
                    }
                }
                let rotations = &rotations[l * self.shape.kv_heads..][..self.shape.kv_heads];
                if is_compressed {
                    of.layers[l].set(&heads, &rotations.iter().collect::<Vec<_>>())?;
                }
                of.set[l] = now;
            }
        }
        Ok(())
    }

    /// The attention of a layer to what is on the device, the step's token included: `queries` `[B, H, D]` as f16, scores times `scale`, to
    /// `out` `[B, H, D]` as f32.
    pub fn attend(
        &self,
        store: &Store,
        layer: usize,
        (queries, scale): (&Buffer, f32),
        out: &Buffer,
    ) -> Result<(), KvError> {
        let exact = &self.exact[layer];
        exact.attend(&store.pool(layer), queries, scale)?;
        let of_packed = self.packed.as_ref().and_then(|of| of.layer(layer));
        match (of_packed, &self.layered) {
            (Some(packed), _) => packed.step(queries, scale, Some(exact), out)?,
            (None, Some(of)) if !of.set[layer].is_empty() => {
                of.layers[layer].step(queries, scale, Some(exact), out)?
            }
            _ => exact.finish(out)?,
        }
        Ok(())
    }

    /// Logarithms to base 2 of what the step's weights summed up to, `[L, B, H]`, if some sequence is compressed.
    pub fn log_sums(&self) -> Option<&Buffer> {
        self.layered.as_ref().map(|of| of.layers[0].log_sums())
    }
}

impl OfLayered {
    /// With room for more than what is there now: heads grow.
    fn new(
        gpu: &Gpu,
        (shape, layers): (Shape, usize),
        (most, newest): (usize, usize),
        choice: Choice,
    ) -> Result<OfLayered, KvError> {
        let (most, newest) = (most + most / 8 + LEAST_PAGES, newest + 16);
        let made = Layered::layers(gpu, shape, (most, newest), choice, (PARTS, LEAST_PART), layers)?;
        let one = || vec![f16::ONE; shape.head_dim];
        let scales = Scales { key_mean: one(), key_spread: one(), value_mean: one(), value_spread: one() };
        let none = Growing::new(gpu, (&Pages::new(shape.head_dim), 1), &scales)?;
        Ok(OfLayered { layers: made, choice, most, newest, set: vec![vec![]; layers], none })
    }
}

/// What a layer's heads are in some mirrors: whose, and after how many changes.
pub(super) fn whose(mirrors: &[&Mirror], layer: usize) -> Vec<(u64, u64)> {
    mirrors.iter().map(|mirror| (mirror.id, mirror.layers[layer].changes)).collect()
}

/// Of a layer of a mirror that shares steps with mirrors of layered and exact caches.
fn of_held(held: &Held) -> &[HeldLayered] {
    match &held.heads {
        Heads::Exact => &[],
        Heads::Layered(heads) => heads,
        Heads::Packed(_) => panic!("caches in the layered and in the packed format share a step"),
    }
}

/// What steps of a cache read.
pub fn reads_of(cache: &KvCache) -> Reads {
    let of_layer = |layer: &Layer| match layer {
        Layer::Layered(heads) => heads
            .first()
            .map(|head| Reads::Layered(Choice { needed: head.settings.select.asked(), ..Choice::default() })),
        Layer::Packed(heads) => heads.first().map(|head| Reads::Packed(head.settings.selected)),
        Layer::Exact(_) | Layer::Baseline(_) => None,
    };
    cache.layers.iter().find_map(of_layer).unwrap_or(Reads::Layered(Choice::all()))
}
