//! A KV head in the paper's packed format: sinks, segments of packed pages, and the update buffer.
//!
//! Per head, in order of tokens: the first [`SINKS`] stay exact; then come segments of packed pages; the newest 32 to 64
//! wait in the update buffer, and when one more comes to a full one its oldest 32 are packed at once (paper, s. 5).
//! Every token stays addressable; a step *selects* token blocks, and always attends to sinks and buffer.
//!
//! The prompt's segments choose their strategies when the prompt is complete. What is generated is packed with the
//! segment before it, for the time being, while its raw keys and values go to a `Learner` (`learner.rs`);
//! when the loss of the borrowed strategy has added up, the growing segment closes, and what the learner makes of it
//! takes the place of its temporary pages between two steps (s. 5, heterogeneous double compression buffering).

mod attend;
mod segment;
mod strategy;

use crate::KvBytes;
use crate::exact::{ARC_BYTES, ExactHead};
use crate::rotation::Basis;
use half::f16;
use half::slice::HalfFloatSliceExt;
use mosaickv_kernels::exact::{ExactPage, PAGE_TOKENS};
use mosaickv_kernels::packed::{BLOCKS, PackedError, PackedShape};
use std::collections::VecDeque;
use std::sync::Arc;

pub(crate) use attend::{Work, decode};
pub(crate) use segment::Segment;
pub(crate) use strategy::Sums;

/// First tokens of a sequence, always exact and always attended to.
pub const SINKS: usize = 4;

/// Tokens that leave the update buffer at once, and that it keeps at least when they do.
pub(crate) const FLUSH: usize = 32;

/// The paper's two-dimensional compression (s. 4). What is `None` is chosen segment by segment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Packed {
    /// Share of each vector's elements that are kept, in (0, 0.75]: the bottom quarter of the channels is
    /// truncated (what is left rounded up to a multiple of 16). `None`: 0.125, 0.25 or 0.375.
    pub kept: Option<f32>,
    /// Neighbouring channels that are kept or dropped together: 1, 2 or 4.
    pub group: Option<usize>,
    /// Tokens of a token block: 4, 8 or 16.
    pub block: Option<usize>,
    /// Share of the packed tokens that a decode step attends to, in (0, 1].
    pub selected: f32,
    /// Which channels vectors are stored in.
    pub rotation: Basis,
    /// Tokens of a segment at most, a multiple of 32.
    pub segment: usize,
    /// Highest compression loss of a segment (of the keys' variance and the values' energy, mean of both) at which a higher
    /// rate or a larger group is chosen.
    pub loss: f32,
    /// Highest loss, of keys or of values, that keeping or dropping channels in groups may add.
    pub grouping: f32,
    /// Highest share of the keys' variance within token blocks at which larger blocks are chosen.
    pub spread: f32,
    /// Compression loss, added up over tokens, at which a growing segment closes.
    pub close: f32,
}

impl Default for Packed {
    fn default() -> Packed {
        let chosen = |settings: Packed| Packed { kept: None, group: None, block: None, ..settings };
        chosen(Packed::STATIC)
    }
}

impl Packed {
    /// One strategy for all segments: a quarter of the elements, one by one, and token blocks of 8 (paper, its
    /// defaults).
    pub const STATIC: Packed = Packed {
        kept: Some(0.25),
        group: Some(1),
        block: Some(8),
        selected: 0.10,
        rotation: Basis::Svd,
        segment: 65536,
        loss: 0.25,
        grouping: 0.01,
        spread: 0.4,
        close: 512.0,
    };

    /// Whether nothing is left to choose, so that a growing segment never closes.
    pub(crate) fn is_static(self) -> bool {
        self.kept.is_some() && self.group.is_some() && self.block.is_some()
    }

    /// Whether every setting is what it may be for heads of `head_dim` channels.
    pub(crate) fn fits(self, head_dim: usize) -> Result<(), PackedError> {
        let refuse = |what, got, wanted| Err(PackedError::Shape { what, got, wanted });
        if let Some(block) = self.block.filter(|block| !BLOCKS.contains(block)) {
            return refuse("block", block, "4, 8 or 16 tokens");
        }
        if !(self.selected > 0.0 && self.selected <= 1.0) {
            return refuse(
                "selected, in percent,",
                (self.selected * 100.0).ceil() as usize,
                "above 0, at most 100",
            );
        }
        if self.segment == 0 || !self.segment.is_multiple_of(FLUSH) {
            return refuse("segment", self.segment, "a multiple of 32 tokens, not 0");
        }
        for rate in self.rates() {
            // Larger groups than a small head has room for are not among its candidates.
            let group = *self.groups().last().expect("there is at least one");
            PackedShape::with_rate(head_dim, 1.0 - rate, group)?;
        }
        Ok(())
    }

    /// The shares of elements that a strategy may keep.
    pub(crate) fn rates(&self) -> &[f32] {
        self.kept.as_ref().map_or(&strategy::KEPT, std::slice::from_ref)
    }

    /// The sizes of groups that a strategy may have, the smallest last.
    pub(crate) fn groups(&self) -> &[usize] {
        self.group.as_ref().map_or(&strategy::GROUPS, std::slice::from_ref)
    }
}

/// Raw keys and values of some tokens, `[T, D]` each: what a learner works on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Raw {
    pub(crate) keys: Vec<f16>,
    pub(crate) values: Vec<f16>,
}

/// What a head has to tell its learner, in this order.
#[derive(Debug)]
pub(crate) enum News {
    /// Tokens that were packed with a borrowed strategy.
    Packed(Raw),
    /// The tokens told since the last closing are a segment.
    Closed,
}

#[derive(Debug)]
pub(crate) struct PackedHead {
    pub(crate) settings: Packed,
    pub(crate) sinks: ExactPage,
    /// In order of tokens: first those with a strategy of their own, then temporary ones with borrowed strategies.
    pub(crate) segments: Vec<Arc<Segment>>,
    /// The update buffer.
    pub(crate) buffer: ExactPage,
    /// What is temporary.
    growing: Growing,
    /// Not yet told.
    news: Vec<News>,
    /// Of each segment; the last ones may be missing.
    reads: Vec<SegmentReads>,
}

/// How often steps read a segment.
#[derive(Clone, Copy, Debug, Default)]
struct SegmentReads {
    steps: u32,
    /// The shares of its tokens that they read, added up.
    shares: f32,
}

/// The tokens whose segments are temporary.
#[derive(Clone, Debug, Default)]
struct Growing {
    /// Segments before the first temporary one.
    settled: usize,
    /// Tokens of closed segments whose strategies are being worked out, oldest first.
    closed: VecDeque<usize>,
    /// Tokens since the last closing.
    tokens: usize,
    /// Their loss under borrowed strategies, added up.
    loss: f32,
    /// How often the learner was told to forget.
    epoch: usize,
}

/// A clone shares pages; what its learner would have to know is not copied, so temporary segments stay as they are.
impl Clone for PackedHead {
    fn clone(&self) -> PackedHead {
        PackedHead {
            settings: self.settings,
            sinks: self.sinks.clone(),
            segments: self.segments.clone(),
            buffer: self.buffer.clone(),
            growing: Growing { settled: self.segments.len(), ..Growing::default() },
            news: Vec::new(),
            reads: self.reads.clone(),
        }
    }
}

impl PackedHead {
    /// Compresses what an exact head holds.
    pub(crate) fn compress(exact: &ExactHead, settings: Packed) -> PackedHead {
        let pages: Vec<_> = exact.pages().collect();
        let d = pages[0].head_dim();
        let (keys, values) = rows(&pages);
        let tokens = keys.len() / d;
        let sinks = tokens.min(SINKS);
        let packed = (tokens - sinks).saturating_sub(FLUSH) / FLUSH * FLUSH;
        let (most, span) = (settings.segment.saturating_mul(d), sinks * d..(sinks + packed) * d);
        let segments: Vec<_> = (keys[span.clone()].chunks(most).zip(values[span].chunks(most)))
            .map(|(keys, values)| Arc::new(learn(settings, keys, values, d)))
            .collect();
        let mut head = PackedHead {
            settings,
            sinks: ExactPage::new(d, 16),
            growing: Growing { settled: segments.len(), ..Growing::default() },
            segments,
            buffer: ExactPage::new(d, PAGE_TOKENS),
            news: Vec::new(),
            reads: Vec::new(),
        };
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
        self.make_room();
        self.buffer.push(key, value);
    }

    /// What [`append`](PackedHead::append) of the next token begins with.
    pub(crate) fn make_room(&mut self) {
        if self.is_full() {
            self.flush();
        }
    }

    /// Packs the oldest tokens of the buffer with the strategy of the segment before them.
    fn flush(&mut self) {
        let d = self.buffer.head_dim();
        let (keys, values) = rows(&[&self.buffer]);
        let (keys, values) = (&keys[..FLUSH * d], &values[..FLUSH * d]);
        self.buffer.drop_front(FLUSH);
        let Some(last) = self.segments.last() else {
            self.segments.push(Arc::new(learn(self.settings, keys, values, d)));
            self.growing.settled = 1;
            return;
        };
        let dynamic = !self.settings.is_static();
        let previous = match self.growing.settled.checked_sub(1) {
            Some(settled) if dynamic => &self.segments[settled],
            _ => last,
        };
        let is_new = dynamic && (self.growing.tokens == 0 || !last.is_like(previous));
        if is_new {
            self.segments.push(Arc::new(Segment::after(previous)));
        }
        let growing = self.segments.last_mut().expect("one is there");
        // Copies the lists (not the pages) if a clone of the cache shares them.
        let loss = Arc::make_mut(growing).pack(keys, values, d);
        if dynamic {
            let half = |x: &[f32]| {
                let mut out = vec![f16::ZERO; x.len()];
                out.convert_from_f32_slice(x);
                out
            };
            self.news.push(News::Packed(Raw { keys: half(keys), values: half(values) }));
            self.growing.tokens += FLUSH;
            self.growing.loss += loss * FLUSH as f32;
            if self.growing.loss >= self.settings.close || self.growing.tokens >= self.settings.segment {
                self.close();
            }
        }
    }

    /// The growing segment is complete.
    fn close(&mut self) {
        self.news.push(News::Closed);
        self.growing.closed.push_back(std::mem::take(&mut self.growing.tokens));
        self.growing.loss = 0.0;
    }

    /// What the learner does not know yet.
    pub(crate) fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// Tokens in temporary segments that came after the oldest closed one; `None`: none is closed.
    pub(crate) fn tokens_since_close(&self) -> Option<usize> {
        let later: usize = self.growing.closed.iter().skip(1).sum();
        self.growing.closed.front().map(|_| later + self.growing.tokens)
    }

    /// The oldest closed segment, with a strategy of its own, takes the place of its temporary ones.
    pub(crate) fn swap(&mut self, segment: Segment) {
        let tokens = self.growing.closed.pop_front().expect("a segment was closed");
        assert_eq!(segment.tokens(), tokens, "a segment came back with other tokens");
        let (from, mut to, mut held) = (self.growing.settled, self.growing.settled, 0);
        while held < tokens {
            held += self.segments[to].tokens();
            to += 1;
        }
        assert_eq!(held, tokens, "temporary segments end where the closed one does");
        self.segments.splice(from..to, [Arc::new(segment)]);
        if from < self.reads.len() {
            self.reads.splice(from..to.min(self.reads.len()), [SegmentReads::default()]);
        }
        self.growing.settled += 1;
    }

    /// Counts what a step has read, after it: the blocks that it `selected`.
    pub(crate) fn count_reads(&mut self, mut selected: &[u32]) {
        self.reads.resize(self.segments.len(), SegmentReads::default());
        let mut end = 0;
        for (segment, reads) in self.segments.iter().zip(&mut self.reads) {
            end += segment.blocks() as u32;
            let (of_segment, rest) = selected.split_at(selected.partition_point(|&block| block < end));
            reads.steps = reads.steps.saturating_add(1);
            reads.shares += of_segment.len() as f32 / segment.blocks().max(1) as f32;
            selected = rest;
        }
    }

    /// The share of a segment's tokens that a step read.
    pub(crate) fn read_share(&self, segment: usize) -> Option<f32> {
        let reads = self.reads.get(segment).filter(|reads| reads.steps > 0)?;
        Some(reads.shares / reads.steps as f32)
    }

    /// Temporary segments stay as they are, for good: nobody works on them any more.
    pub(crate) fn settle(&mut self) {
        let (settled, epoch) = (self.segments.len(), self.growing.epoch + 1);
        self.growing = Growing { settled, epoch, ..Growing::default() };
        self.news.clear();
    }

    /// Segments that have a strategy of their own, or keep what they have.
    pub(crate) fn settled(&self) -> usize {
        if self.settings.is_static() { self.segments.len() } else { self.growing.settled }
    }

    /// Changes whenever temporary segments were settled.
    pub(crate) fn epoch(&self) -> usize {
        self.growing.epoch
    }

    /// Tokens of which a learner holds raw keys and values, or will when it is told.
    pub(crate) fn raw_tokens(&self) -> usize {
        self.growing.closed.iter().sum::<usize>() + self.growing.tokens
    }

    pub(crate) fn count(&self, bytes: &mut KvBytes) {
        // The two exact pages' headers are inside this head, which the list of heads counts.
        bytes.exact += self.sinks.bytes() + self.buffer.bytes() - 2 * size_of::<ExactPage>();
        bytes.lists += self.segments.capacity() * size_of::<Arc<Segment>>()
            + self.growing.closed.capacity() * size_of::<usize>()
            + self.news.capacity() * size_of::<News>()
            + self.reads.capacity() * size_of::<SegmentReads>();
        let mut last: Option<&Segment> = None;
        for segment in &self.segments {
            bytes.packed += segment.packed_bytes();
            bytes.lists += segment.list_bytes();
            // Temporary segments borrow the rotation before them.
            if last.is_none_or(|last| !Arc::ptr_eq(&last.rotation, &segment.rotation)) {
                bytes.rotations += ARC_BYTES + segment.rotation.bytes();
            }
            last = Some(segment);
        }
    }

    /// Of segments that are the same in both, at the same place.
    pub(crate) fn bytes_shared_with(&self, other: &PackedHead) -> usize {
        let both =
            self.segments.iter().zip(&other.segments).filter(|(ours, theirs)| Arc::ptr_eq(ours, theirs));
        both.map(|(segment, _)| segment.packed_bytes() + segment.list_bytes()).sum()
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if self.sinks.tokens() < SINKS && (!self.segments.is_empty() || self.buffer.tokens() > 0) {
            return Err(format!("{} sinks before later tokens", self.sinks.tokens()));
        }
        if !self.settings.is_static() {
            let Some(temporary) = self.segments.get(self.growing.settled..) else {
                return Err(format!("{} of {} segments settled", self.growing.settled, self.segments.len()));
            };
            let temporary: usize = temporary.iter().map(|segment| segment.tokens()).sum();
            if temporary != self.raw_tokens() {
                let raw = self.raw_tokens();
                return Err(format!("{temporary} tokens in temporary segments, {raw} told to the learner"));
            }
        }
        self.segments
            .iter()
            .enumerate()
            .try_for_each(|(i, segment)| segment.check().map_err(|what| format!("segment {i}: {what}")))
    }
}

/// Packs keys and values `[T, D]` as a segment of its own.
fn learn(settings: Packed, keys: &[f32], values: &[f32], d: usize) -> Segment {
    let mut sums = Sums::new(d);
    sums.add(keys, values);
    Segment::learn(settings, &sums, keys, values)
}

/// Keys and values `[T, D]` of the pages.
pub(crate) fn rows(pages: &[&ExactPage]) -> (Vec<f32>, Vec<f32>) {
    let d = pages[0].head_dim();
    let tokens: usize = pages.iter().map(|page| page.tokens()).sum();
    let (mut keys, mut values) = (vec![0.0; tokens * d], vec![0.0; tokens * d]);
    let (mut to_keys, mut to_values) = (&mut keys[..], &mut values[..]);
    for page in pages {
        let len = page.tokens() * d;
        let of_keys = to_keys.split_off_mut(..len).expect("keys of all pages");
        page.rows(of_keys, to_values.split_off_mut(..len).expect("values of all pages"));
    }
    (keys, values)
}
