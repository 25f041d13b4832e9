//! A KV head in our own format: sinks, pages of few bits, and the newest tokens.
//!
//! Per head, in order of tokens: the first [`SINKS`] stay exact; the prompt's pages follow, in which tokens of like importance share a
//! page whatever their order; then the [tail], pages like the prompt's of what was generated and has left the window; then
//! what is about to become a part of it; then the [window], pages of more bits; at the end the update buffer, exact.
//!
//! A prompt is compressed when all of its layers are there, since one plan shares out the bytes among them. Its statistics
//! are each layer's own, and the same tokens give the same bytes whatever the threads and the chunks of the prompt.

mod asked;
mod attend;
mod calibration;
mod distortion;
mod encode;
mod harder;
mod importance;
mod plan;
mod saved;
pub(crate) mod select;
mod tail;
mod target;
mod window;

use crate::KvBytes;
use crate::exact::{ARC_BYTES, ExactHead};
use half::f16;
use mosaickv_kernels::exact::ExactPage;
use mosaickv_kernels::layered::{GROUP, Pages, Profile};
use std::sync::Arc;

use asked::Asked;
pub(crate) use attend::{Work, decode};
pub use calibration::{Calibration, HeadCalibration, Moments};
pub(crate) use distortion::is_out_of_line;
pub(crate) use encode::{Prompt, compress};
pub(crate) use harder::{compress_harder, excess};
pub(crate) use importance::Samples;
use select::PageReads;
pub use select::Select;
pub(crate) use tail::Closing;
pub use target::{ByteCount, Target};

/// First tokens of a sequence, always exact and always attended to.
pub(crate) const SINKS: usize = 4;

/// Our own format.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layered {
    /// The bytes that a prompt is to take.
    pub target: Target,
    /// Which tokens may be dropped.
    pub drop: Dropping,
    /// What a decode step reads.
    pub select: Select,
}

impl Layered {
    /// Tokens of a prompt below which it stays exact: a step is not faster with fewer, and what is kept of the newest tokens
    /// would be most of the bytes.
    pub const LEAST_TOKENS: usize = 2048;
}

/// Which tokens may have no bits in which heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dropping {
    /// Each token keeps a key of its own in the head of each compressed layer that would lose most by it, in at least 2 bits of 8
    /// channels; its value there may be the mean of all. In the layer's other heads it may be dropped.
    #[default]
    Guarded,
    /// A token may be dropped from all heads of a layer, or keep no more than the mean key: what is asked of it later can't be
    /// answered.
    Any,
}

impl Default for Layered {
    fn default() -> Layered {
        Layered { target: Target::Ratio(8.0), drop: Dropping::Guarded, select: Select::default() }
    }
}

/// Whether it is remembered which tokens are in which pages: no step needs to know, but who looks at a cache wants to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) enum Places {
    #[default]
    Forgotten,
    Remembered,
}

impl Places {
    /// Those of tokens that are counted from `first`.
    fn of(self, first: usize, order: &[u32]) -> Option<Box<[u32]>> {
        match self {
            Places::Forgotten => None,
            Places::Remembered => Some(order.iter().map(|t| first as u32 + t).collect()),
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) pages: Pages,
    /// Tokens that are in no page.
    pub(crate) dropped: usize,
    /// Positions of the pages' tokens, in their order, if they are remembered.
    pub(crate) places: Option<Box<[u32]>>,
}

impl Segment {
    /// What one without places takes beside its pages' bytes.
    const BYTES: usize = ARC_BYTES + size_of::<Segment>();

    /// Of pages in the order of their tokens, of which none was dropped.
    fn of(pages: Pages) -> Segment {
        Segment { pages, dropped: 0, places: None }
    }

    /// Without tokens, of vectors of `d` channels.
    fn empty(d: usize) -> Arc<Segment> {
        Arc::new(Segment::of(Pages::new(d)))
    }

    /// What it takes beside its pages' bytes.
    fn list_bytes(&self) -> usize {
        Segment::BYTES + self.place_bytes()
    }

    /// Those of the places.
    fn place_bytes(&self) -> usize {
        self.places.as_deref().map_or(0, size_of_val)
    }

    pub(crate) fn tokens(&self) -> usize {
        self.pages.tokens() + self.dropped
    }
}

/// Means and spreads of the channels of keys and values, `[D]` each.
#[derive(Clone, Debug)]
pub(crate) struct Scales {
    numbers: Box<[f16]>,
}

impl Scales {
    /// Keys and values `[T, D]` in the channels of a head, less means and over spreads.
    pub(crate) fn coordinates(
        &self,
        head: &HeadCalibration,
        keys: &[f32],
        values: &[f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let (mut keys, mut values) = (encode::turned(keys, &head.keys), encode::turned(values, &head.values));
        encode::normalize(&mut keys, self.key_mean(), self.key_spread());
        encode::normalize(&mut values, self.value_mean(), self.value_spread());
        (keys, values)
    }

    fn quarter(&self, index: usize) -> &[f16] {
        let d = self.numbers.len() / 4;
        &self.numbers[index * d..][..d]
    }

    pub(crate) fn key_mean(&self) -> &[f16] {
        self.quarter(0)
    }

    pub(crate) fn key_spread(&self) -> &[f16] {
        self.quarter(1)
    }

    pub(crate) fn value_mean(&self) -> &[f16] {
        self.quarter(2)
    }

    pub(crate) fn value_spread(&self) -> &[f16] {
        self.quarter(3)
    }

    fn bytes(&self) -> usize {
        ARC_BYTES + size_of::<Scales>() + size_of_val(&*self.numbers)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct LayeredHead {
    pub(crate) calibration: Arc<Calibration>,
    /// Which of the calibration's heads.
    pub(crate) index: usize,
    /// Keys and values `[SINKS, 2, D]`.
    pub(crate) sinks: Box<[f16]>,
    /// Of the prompt's channels; what comes after uses them too.
    pub(crate) scales: Arc<Scales>,
    /// The prompt, all but its newest tokens.
    pub(crate) prompt: Arc<Segment>,
    /// What came after and has left the window.
    pub(crate) tail: Arc<Segment>,
    /// What has left the window and is not yet in the tail: the window's pages.
    pub(crate) leaving: Arc<Segment>,
    /// The newest tokens, and at the end a page at 8 bits.
    pub(crate) window: Arc<Segment>,
    /// How the window's other pages are stored: keys and values.
    profiles: (Profile, Profile),
    /// What a token of the tail may take in the long run.
    rate: f32,
    /// What the errors of the prompt's keys and values weighed over what was planned, before a fallback.
    pub(crate) distortion: [f32; 2],
    /// What was asked of the window.
    asked: Asked,
    /// How often the pages of the prompt and the tail were read.
    pub(crate) reads: PageReads,
    /// Pages that stay in the window when a segment closes.
    stay: u8,
    pub(crate) settings: Layered,
    /// Allocated as far as it is needed.
    pub(crate) buffer: Option<ExactPage>,
}

impl LayeredHead {
    pub(crate) fn head_dim(&self) -> usize {
        self.sinks.len() / SINKS / 2
    }

    pub(crate) fn tokens(&self) -> usize {
        let sealed: usize = self.segments().into_iter().map(Segment::tokens).sum();
        SINKS + sealed + self.buffer.as_ref().map_or(0, ExactPage::tokens)
    }

    /// In order of tokens.
    pub(crate) fn segments(&self) -> [&Segment; 4] {
        self.shared().map(|segment| &**segment)
    }

    /// The same, as clones share them.
    fn shared(&self) -> [&Arc<Segment>; 4] {
        [&self.prompt, &self.tail, &self.leaving, &self.window]
    }

    pub(crate) fn count(&self, bytes: &mut KvBytes) {
        bytes.exact += size_of_val(&*self.sinks)
            + self.buffer.as_ref().map_or(0, |buffer| buffer.bytes() - size_of::<ExactPage>());
        for segment in self.segments() {
            bytes.packed += segment.pages.bytes();
            bytes.lists += segment.list_bytes();
        }
        bytes.lists += self.reads.bytes();
        bytes.packed += self.scales.bytes();
        bytes.queries += self.asked.bytes();
    }

    /// Whether tokens have left the window and are not yet in the tail.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.tokens() > 0
    }

    /// Of segments, means and spreads that are the same in both.
    pub(crate) fn bytes_shared_with(&self, other: &LayeredHead) -> usize {
        let both =
            self.shared().into_iter().zip(other.shared()).filter(|(ours, theirs)| Arc::ptr_eq(ours, theirs));
        let segments: usize = both.map(|(segment, _)| segment.pages.bytes() + segment.list_bytes()).sum();
        segments + if Arc::ptr_eq(&self.scales, &other.scales) { self.scales.bytes() } else { 0 }
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        let d = self.head_dim();
        for (name, segment) in ["prompt", "tail", "leaving", "window"].into_iter().zip(self.segments()) {
            if segment.pages.head_dim() != d {
                return Err(format!(
                    "{name}: pages of {} channels in a head of {d}",
                    segment.pages.head_dim()
                ));
            }
        }
        if self.scales.numbers.len() != 4 * d {
            return Err(format!("{} means and spreads in a head of {d} channels", self.scales.numbers.len()));
        }
        if let Some(x) = self.scales.numbers.iter().find(|x| !x.is_finite()) {
            return Err(format!("a mean or spread of {x}"));
        }
        Ok(())
    }
}

/// 8 bits for every channel.
fn fine(d: usize) -> Profile {
    Profile { eight: (d / GROUP) as u8, ..Profile::default() }
}

/// Whether a prompt of this many tokens is compressed.
pub(crate) fn is_worth_it(head: &ExactHead) -> bool {
    head.tokens() >= Layered::LEAST_TOKENS
}
