//! A KV head in the paper's packed format: sinks, segments of packed pages, and the update buffer.
//!
//! Per head, in order of tokens: the first [`SINKS`] stay exact; then come segments of packed pages; the newest 32 to 64
//! wait in the update buffer, and when one more comes to a full one its oldest 32 are packed at once (paper, s. 5).
//! Every token stays addressable; a step *selects* token blocks, and always attends to sinks and buffer.

mod attend;
mod segment;

use crate::KvBytes;
use crate::exact::{ARC_BYTES, ExactHead};
use crate::rotation::{Basis, Rotation};
use mosaickv_kernels::exact::{ExactPage, PAGE_TOKENS};
use mosaickv_kernels::packed::{BLOCKS, PackedError, PackedShape};
use segment::Strategy;
use std::sync::Arc;

pub use attend::Phases;
pub(crate) use attend::{Lane, Work, decode};
pub(crate) use segment::Segment;

/// First tokens of a sequence, always exact and always attended to.
pub const SINKS: usize = 4;

/// Tokens that leave the update buffer at once, and that it keeps at least when they do.
pub(crate) const FLUSH: usize = 32;

/// The paper's two-dimensional compression (s. 4, its defaults).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Packed {
    /// Share of each vector's elements that are kept, in (0, 0.75]: the bottom quarter of the channels is
    /// truncated (what is left rounded up to a multiple of 16).
    pub kept: f32,
    /// Neighbouring channels that are kept or dropped together: 1, 2 or 4.
    pub group: usize,
    /// Tokens of a token block: 4, 8 or 16.
    pub block: usize,
    /// Share of the packed tokens that a decode step attends to, in (0, 1].
    pub selected: f32,
    /// Which channels vectors are stored in.
    pub rotation: Basis,
    /// Tokens of a segment at most, a multiple of 32.
    pub segment: usize,
}

impl Default for Packed {
    fn default() -> Packed {
        Packed { kept: 0.25, group: 1, block: 8, selected: 0.10, rotation: Basis::Svd, segment: 65536 }
    }
}

impl Packed {
    /// The strategy that these settings give at this head_dim, if all of them are what they may be.
    pub(crate) fn strategy(self, head_dim: usize) -> Result<Strategy, PackedError> {
        let refuse = |what, got, wanted| Err(PackedError::Shape { what, got, wanted });
        if !BLOCKS.contains(&self.block) {
            return refuse("block", self.block, "4, 8 or 16 tokens");
        }
        if !(self.selected > 0.0 && self.selected <= 1.0) {
            return refuse(
                "selected, in percent,",
                (self.selected * 100.0).ceil() as usize,
                "above 0, at most 100",
            );
        }
        if self.segment == 0 || !self.segment.is_multiple_of(FLUSH) {
            return refuse("segment", self.segment, "a multiple of 32 tokens");
        }
        let shape = PackedShape::with_rate(head_dim, 1.0 - self.kept, self.group)?;
        Ok(Strategy { shape, block: self.block })
    }
}

#[derive(Clone, Debug)]
pub(crate) struct PackedHead {
    pub(crate) settings: Packed,
    pub(crate) sinks: ExactPage,
    /// In order of tokens; the last one grows.
    pub(crate) segments: Vec<Arc<Segment>>,
    /// The update buffer.
    pub(crate) buffer: ExactPage,
}

impl PackedHead {
    /// Compresses what an exact head holds.
    pub(crate) fn compress(exact: &ExactHead, settings: Packed) -> PackedHead {
        let pages: Vec<_> = exact.pages().collect();
        let d = pages[0].head_dim();
        let (keys, values) = rows(&pages);
        let mut head = PackedHead {
            settings,
            sinks: ExactPage::new(d, 16),
            segments: Vec::new(),
            buffer: ExactPage::new(d, PAGE_TOKENS),
        };
        let tokens = keys.len() / d;
        let sinks = tokens.min(SINKS);
        let packed = (tokens - sinks).saturating_sub(FLUSH) / FLUSH * FLUSH;
        let most = settings.segment * d;
        let span = sinks * d..(sinks + packed) * d;
        for (keys, values) in keys[span.clone()].chunks(most).zip(values[span].chunks(most)) {
            head.segments.push(Arc::new(learn(settings, keys, values, d)));
        }
        for t in 0..tokens {
            let to = if t < sinks { &mut head.sinks } else { &mut head.buffer };
            if t < sinks || t >= sinks + packed {
                to.push(&keys[t * d..][..d], &values[t * d..][..d]);
            }
        }
        head
    }

    pub(crate) fn tokens(&self) -> usize {
        let packed: usize = self.segments.iter().map(|segment| segment.tokens()).sum();
        self.sinks.tokens() + packed + self.buffer.tokens()
    }

    /// Whether the next token must first send the oldest of the buffer to a packed page.
    pub(crate) fn is_full(&self) -> bool {
        self.buffer.is_full()
    }

    /// Adds a token, its key `[D]` and value `[D]`.
    pub(crate) fn append(&mut self, key: &[f32], value: &[f32]) {
        if self.sinks.tokens() < SINKS {
            return self.sinks.push(key, value);
        }
        if self.buffer.is_full() {
            self.flush();
        }
        self.buffer.push(key, value);
    }

    fn flush(&mut self) {
        let d = self.buffer.head_dim();
        let (keys, values) = rows(&[&self.buffer]);
        let (keys, values) = (&keys[..FLUSH * d], &values[..FLUSH * d]);
        match self.segments.last_mut() {
            // Copies the lists (not the pages) if a clone of the cache shares them.
            Some(growing) => Arc::make_mut(growing).pack(keys, values, d),
            None => self.segments.push(Arc::new(learn(self.settings, keys, values, d))),
        }
        self.buffer.drop_front(FLUSH);
    }

    pub(crate) fn count(&self, bytes: &mut KvBytes) {
        // The two exact pages' headers are inside this head, which the list of heads counts.
        bytes.exact += self.sinks.bytes() + self.buffer.bytes() - 2 * size_of::<ExactPage>();
        bytes.lists += self.segments.capacity() * size_of::<Arc<Segment>>();
        for segment in &self.segments {
            bytes.packed += segment.packed_bytes();
            bytes.lists += segment.list_bytes();
            bytes.rotations += ARC_BYTES + segment.rotation.bytes();
        }
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if self.sinks.tokens() < SINKS && (!self.segments.is_empty() || self.buffer.tokens() > 0) {
            return Err(format!("{} sinks before later tokens", self.sinks.tokens()));
        }
        self.segments
            .iter()
            .enumerate()
            .try_for_each(|(i, segment)| segment.check().map_err(|what| format!("segment {i}: {what}")))
    }
}

/// Packs keys and values `[T, D]` as a segment of its own.
fn learn(settings: Packed, keys: &[f32], values: &[f32], d: usize) -> Segment {
    let strategy = settings.strategy(d).expect("checked when the cache was made");
    let rotation = Rotation::learn(settings.rotation, keys, values, (d, strategy.shape.channels()));
    let mut segment = Segment::new(strategy, Arc::new(rotation));
    segment.pack(keys, values, d);
    segment
}

/// Keys and values `[T, D]` of the pages.
pub(crate) fn rows(pages: &[&ExactPage]) -> (Vec<f32>, Vec<f32>) {
    let d = pages[0].head_dim();
    let tokens: usize = pages.iter().map(|page| page.tokens()).sum();
    let (mut keys, mut values) = (vec![0.0; tokens * d], vec![0.0; tokens * d]);
    let places = pages.iter().flat_map(|page| (0..page.tokens()).map(move |t| (page, t)));
    for ((page, t), (key, value)) in places.zip(keys.chunks_exact_mut(d).zip(values.chunks_exact_mut(d))) {
        page.key(t, key);
        page.value(t, value);
    }
    (keys, values)
}
