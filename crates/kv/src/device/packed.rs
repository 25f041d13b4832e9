//! What does a device hold of a head in the packed format, and how does it attend to it?
//!
//! Of each of the host's segments it has a copy. Pages never change, segments grow at their end alone, and what a learner makes of temporary ones
//! takes their place: so a segment is known by its first page, and only pages that are new are uploaded.

use super::attention::whose;
use super::{Heads, Held, HeldHead, Mirror};
use crate::KvError;
use crate::packed::{PackedHead, Segment};
use crate::rotation::Rotation;
use mosaickv_kernels::cuda::packed::{self as device, LEAST_PART, Limits, MOST_SEGMENTS, Packed};
use mosaickv_kernels::cuda::{Gpu, PARTS, Shape};
use mosaickv_kernels::packed::{BLOCKS, PAGE_TOKENS, PackedPage};
use std::sync::{Arc, Weak};

/// Pages for which there is more room than it takes.
const SPARE_PAGES: usize = 64;

/// As an error says it.
const _: () = assert!(MOST_SEGMENTS == 256);

/// Segments of a head in order.
#[derive(Debug)]
pub(super) struct HeldPacked(Vec<HeldSegment>);

#[derive(Debug)]
struct HeldSegment {
    segment: device::Segment,
    rotation: Arc<device::Rotation>,
    /// The host's rotation, first page, and how many of its pages are here.
    of: Weak<Rotation>,
    first: PackedPage,
    pages: usize,
}

impl HeldSegment {
    fn is_of(&self, segment: &Segment) -> bool {
        self.first.is_clone_of(&segment.pages[0])
    }

    /// Uploads a segment; its full pages are there so many times.
    fn new(
        gpu: &Gpu,
        rotation: Arc<device::Rotation>,
        (of, times): (&Segment, usize),
    ) -> Result<HeldSegment, KvError> {
        Ok(HeldSegment {
            segment: device::Segment::repeated(gpu, &rotation, (&of.pages, times))?,
            rotation,
            of: Arc::downgrade(&of.rotation),
            first: of.pages[0].clone(),
            pages: of.pages.len(),
        })
    }
}

impl HeldHead for HeldPacked {
    type Host = PackedHead;
    const STAY: usize = 0;

    fn is_of(&self, head: &PackedHead) -> bool {
        let is_of =
            |(held, of): (&HeldSegment, &Arc<Segment>)| held.is_of(of) && held.pages == of.pages.len();
        self.0.len() == head.segments.len() && self.0.iter().zip(&head.segments).all(is_of)
    }

    fn updated(
        before: Option<HeldPacked>,
        gpu: &Gpu,
        (head, times): (&PackedHead, usize),
    ) -> Result<HeldPacked, KvError> {
        if head.segments.len() > MOST_SEGMENTS {
            return Err(KvError::NotOnDevice {
                what: "the number of a head's segments",
                got: head.segments.len().to_string(),
                wanted: "at most 256 (with a larger segment= or close= there are fewer)",
            });
        }
        // What comes later was not there more than once.
        let times = if before.is_some() { 1 } else { times };
        let mut before = before.map_or(vec![], |held| held.0);
        let mut held = Vec::<HeldSegment>::with_capacity(head.segments.len());
        for of in &head.segments {
            if let Some(at) = before.iter().position(|held| held.is_of(of)) {
                let mut same = before.swap_remove(at);
                if same.pages < of.pages.len() {
                    same.segment.append(&of.pages[same.pages..])?;
                    same.pages = of.pages.len();
                }
                held.push(same);
                continue;
            }
            // Temporary segments borrow the rotation before them.
            let known = held.last().filter(|last| std::ptr::eq(last.of.as_ptr(), Arc::as_ptr(&of.rotation)));
            let rotation = match known {
                Some(last) => last.rotation.clone(),
                None => {
                    let Rotation { keys, outputs } = &*of.rotation;
                    Arc::new(device::Rotation::new(gpu, keys, outputs, head.buffer.head_dim())?)
                }
            };
            held.push(HeldSegment::new(gpu, rotation, (of, times))?);
        }
        Ok(HeldPacked(held))
    }

    fn bytes(&self) -> usize {
        let mut bytes = 0;
        for (i, held) in self.0.iter().enumerate() {
            let is_borrowed = i > 0 && Arc::ptr_eq(&self.0[i - 1].rotation, &held.rotation);
            bytes += held.segment.bytes() + if is_borrowed { 0 } else { held.rotation.bytes() };
        }
        bytes
    }
}

impl HeldPacked {
    fn segments(&self) -> Vec<&device::Segment> {
        self.0.iter().map(|held| &held.segment).collect()
    }

    /// What it takes of a step.
    fn limits(&self) -> Limits {
        let of = |of: &dyn Fn(&device::Segment) -> usize| self.0.iter().map(|held| of(&held.segment)).sum();
        Limits {
            segments: self.0.len(),
            pages: of(&|segment| segment.tokens().div_ceil(PAGE_TOKENS)),
            blocks: of(&|segment| segment.blocks()),
        }
    }
}

/// Attention of steps to heads in the packed format.
#[derive(Debug)]
pub(super) struct OfPacked {
    pub(super) layers: Vec<Packed>,
    kv_heads: usize,
    limits: Limits,
    selected: f32,
    /// What each layer's heads are; nothing if none of them has pages.
    set: Vec<Vec<(u64, u64)>>,
}

impl OfPacked {
    /// With room for a step of these mirrors that reads the share `selected` of their tokens, what was there `before` if it has; `None` if none of
    /// them is compressed.
    pub(super) fn fit(
        before: Option<OfPacked>,
        gpu: &Gpu,
        (shape, layers): (Shape, usize),
        mirrors: &[&Mirror],
        selected: f32,
    ) -> Result<Option<OfPacked>, KvError> {
        let heads = mirrors.iter().flat_map(|mirror| &mirror.layers).flat_map(of_held);
        let Some(needed) = heads.map(HeldPacked::limits).reduce(largest) else { return Ok(None) };
        let fits = |of: &OfPacked| of.selected == selected && largest(of.limits, needed) == of.limits;
        match before.filter(fits) {
            Some(before) => Ok(Some(before)),
            None => OfPacked::new(gpu, (shape, layers), needed, selected).map(Some),
        }
    }

    /// Has a step read these mirrors.
    pub(super) fn set(&mut self, mirrors: &[&Mirror]) -> Result<(), KvError> {
        for (l, (layer, set)) in self.layers.iter_mut().zip(&mut self.set).enumerate() {
            let held = || mirrors.iter().map(|mirror| &mirror.layers[l]);
            let is_compressed = held().any(|held| !of_held(held).is_empty());
            let now = if is_compressed { whose(mirrors, l) } else { vec![] };
            if *set != now {
                let none = self.kv_heads;
                let heads = held().flat_map(|held| match of_held(held) {
                    [] => vec![vec![]; none],
                    heads => heads.iter().map(HeldPacked::segments).collect(),
                });
                layer.set(&heads.collect::<Vec<_>>())?;
                *set = now;
            }
        }
        Ok(())
    }

    /// With room for more than what is there now: heads grow.
    fn new(
        gpu: &Gpu,
        (shape, layers): (Shape, usize),
        needed: Limits,
        selected: f32,
    ) -> Result<OfPacked, KvError> {
        let limits = Limits {
            segments: (needed.segments + needed.segments / 8 + 4).min(MOST_SEGMENTS),
            pages: needed.pages + needed.pages / 8 + SPARE_PAGES,
            blocks: needed.blocks + needed.blocks / 8 + SPARE_PAGES * PAGE_TOKENS / BLOCKS[0],
        };
        let made = Packed::layers(gpu, shape, limits, selected, (PARTS, LEAST_PART), layers)?;
        Ok(OfPacked { layers: made, kv_heads: shape.kv_heads, limits, selected, set: vec![vec![]; layers] })
    }

    /// What attends to a layer, if it is compressed.
    pub(super) fn layer(&self, layer: usize) -> Option<&Packed> {
        (!self.set[layer].is_empty()).then_some(&self.layers[layer])
    }
}

/// Of a layer of a mirror that shares steps with mirrors of packed caches.
fn of_held(held: &Held) -> &[HeldPacked] {
    match &held.heads {
        Heads::Exact => &[],
        Heads::Packed(heads) => heads,
        Heads::Layered(_) => panic!("caches in the packed and in the layered format share a step"),
    }
}

fn largest(a: Limits, b: Limits) -> Limits {
    Limits {
        segments: a.segments.max(b.segments),
        pages: a.pages.max(b.pages),
        blocks: a.blocks.max(b.blocks),
    }
}
