//! What becomes of tokens that leave the window?
//!
//! The same as of a prompt's: what has lately been asked tells what they are worth, one plan for the heads of a layer shares out the
//! bytes, and tokens of like weights share pages. A token may be dropped from a head there too: a head that
//! looks at what is near gives its prompt hardly any bits, and keys of next to none are no better than the mean key, which
//! is worse than none (KL after 1,000 generated tokens: 0.3 in place of 0.02).
//!
//! That work is a [`Closing`], handed over between two steps and due [`SWAP_AFTER`] tokens later. Until then the pages are
//! attended to as they were. A background thread does it meanwhile; who needs a closing that is not done does it himself, even one that
//! was begun: a thread of low priority may get no core for long, and what two make of it is the same. So what is generated depends neither on
//! threads nor on time, and copies of a cache share what was made of what was in flight.

use super::asked::Asked;
use super::encode::{channels, guard, lift, push};
use super::plan::{Head, HeadPlan, plan};
use super::{Dropping, LayeredHead, Places, SINKS, Scales, Segment};
use crate::KvBytes;
use crate::exact::ARC_BYTES;
use mosaickv_kernels::Pool;
use mosaickv_kernels::layered::Pages;
use std::sync::{Arc, OnceLock};

/// Share of a head's mean weight that every token of a segment gets: fewer queries than a prompt's judge them.
const FLOOR: f32 = 1.0;

/// A segment takes this many times the bytes of as many tokens of the prompt at least and at most.
const BOUNDS: (f32, f32) = (0.9, 1.1);

/// Tokens after a segment left the window at which it is in the tail.
pub(super) const SWAP_AFTER: usize = 16;

/// A segment that has left the windows of a layer's heads.
#[derive(Debug)]
pub(crate) struct Closing {
    /// Tokens in the cache when it left.
    pub(super) since: usize,
    heads: Vec<Leaving>,
    drop: Dropping,
    /// What the heads' tails get.
    stored: OnceLock<Vec<Segment>>,
}

/// Tokens of a head that have left the window.
#[derive(Debug)]
struct Leaving {
    /// Shared with the head.
    segment: Arc<Segment>,
    scales: Arc<Scales>,
    /// Position of the first token, and what was asked up to now.
    first: usize,
    asked: Asked,
    /// As the head has it.
    keep: Places,
    /// Bytes that they take at the prompt's rate, and that are left for them if the tail is to keep it.
    usual: f32,
    left: f32,
}

impl Closing {
    /// Takes the oldest pages out of the windows of a layer's `heads`, if there are enough.
    pub(crate) fn begin(heads: &mut [LayeredHead]) -> Option<Closing> {
        let first = heads.first().filter(|head| head.to_leave() > 0)?;
        let (since, drop) = (first.tokens(), first.settings.drop);
        let heads = heads.iter_mut().map(LayeredHead::leave).collect();
        Some(Closing { since, heads, drop, stored: OnceLock::new() })
    }

    /// One whose work was done before.
    pub(super) fn done(since: usize, stored: Vec<Segment>) -> Closing {
        Closing { since, heads: vec![], drop: Dropping::default(), stored: OnceLock::from(stored) }
    }

    /// Does the work, waiting for nobody; nothing if it is done.
    pub(crate) fn stored(&self) -> &[Segment] {
        match self.stored.get() {
            Some(stored) => stored,
            None => {
                let made = self.make();
                self.stored.get_or_init(|| made)
            }
        }
    }

    fn make(&self) -> Vec<Segment> {
        let (rows, mut observed): (Vec<_>, Vec<Head>) = self.heads.iter().map(Leaving::observe).unzip();
        guard(&mut observed, self.drop);
        let usual: f32 = self.heads.iter().map(|head| head.usual).sum();
        let left: f32 = self.heads.iter().map(|head| head.left).sum();
        let budget = left.clamp(BOUNDS.0 * usual, BOUNDS.1 * usual);
        let plans = plan(&Pool::new(1), &observed, budget);
        let heads = self.heads.iter().zip(rows).zip(plans);
        heads.map(|((head, (keys, values)), plan)| head.store((&keys, &values), &plan)).collect()
    }

    /// Whether it is to be in the tails of the layer's `heads` now.
    pub(crate) fn is_due(&self, heads: &[LayeredHead]) -> bool {
        heads[0].tokens() >= self.since + SWAP_AFTER
    }

    /// Whether the work is not done yet.
    pub(crate) fn is_open(&self) -> bool {
        self.stored.get().is_none()
    }

    /// Whether it was due, and is now in the tails of the layer's `heads`.
    pub(crate) fn swap(&self, heads: &mut [LayeredHead]) -> bool {
        if !self.is_due(heads) {
            return false;
        }
        for (head, segment) in heads.iter_mut().zip(self.stored()) {
            let tail = Arc::make_mut(&mut head.tail);
            tail.dropped += segment.dropped;
            if let Some(places) = &segment.places {
                let before = tail.places.as_deref().unwrap_or_default();
                tail.places = Some([before, places].concat().into());
            }
            tail.pages.append(&segment.pages);
            tail.pages.shrink();
            head.leaving = Segment::empty(tail.pages.head_dim());
        }
        true
    }

    /// Bytes allocated beside the pages that the heads still have.
    pub(crate) fn count(&self, bytes: &mut KvBytes) {
        bytes.lists += ARC_BYTES + size_of::<Closing>() + self.heads.capacity() * size_of::<Leaving>();
        bytes.queries += self.heads.iter().map(|head| head.asked.bytes()).sum::<usize>();
        if let Some(stored) = self.stored.get() {
            bytes.lists += stored.capacity() * size_of::<Segment>();
            bytes.lists += stored.iter().map(Segment::place_bytes).sum::<usize>();
            bytes.packed += stored.iter().map(|segment| segment.pages.bytes()).sum::<usize>();
        }
    }
}

impl Leaving {
    /// Keys and values `[n, D]` over spreads, and what they are worth.
    fn observe(&self) -> ((Vec<f32>, Vec<f32>), Head) {
        let pages = &self.segment.pages;
        let d = pages.head_dim();
        let decoded = (0..pages.pages().len()).map(|index| pages.decode(index));
        let (keys, values): (Vec<_>, Vec<_>) = decoded.unzip();
        let (keys, values) = (keys.concat(), values.concat());
        let mut weights = self.asked.weigh(self.first, (&keys, &values), self.scales.value_spread());
        lift(&mut weights, FLOOR);
        let head = Head {
            keys: channels(&keys, self.scales.key_spread(), (d as f32).sqrt().recip()),
            values: channels(&values, self.scales.value_spread(), 1.0),
            weights,
            guarded: vec![false; pages.tokens()],
        };
        ((keys, values), head)
    }

    /// Keys and values `[n, D]` over spreads as they are planned.
    fn store(&self, rows: (&[f32], &[f32]), plan: &HeadPlan) -> Segment {
        let mut pages = Pages::new(self.segment.pages.head_dim());
        push(&mut pages, rows, plan);
        pages.shrink();
        let dropped = self.segment.tokens() - plan.order.len();
        Segment { pages, dropped, places: self.keep.of(self.first, &plan.order) }
    }
}

impl LayeredHead {
    /// Takes the pages that are to leave out of the window.
    fn leave(&mut self) -> Leaving {
        assert_eq!(self.leaving.tokens(), 0, "tokens of another segment are still on their way to the tail");
        let first = SINKS + self.prompt.tokens() + self.tail.tokens();
        let count = self.to_leave();
        let window = &mut Arc::make_mut(&mut self.window).pages;
        let pages = window.split_first(count);
        window.shrink();
        self.leaving = Arc::new(Segment::of(pages));
        let tokens = self.leaving.tokens();
        let asked = self.asked.clone();
        self.asked.forget(first + tokens);
        let usual = self.rate * tokens as f32;
        let left = usual + self.rate * self.tail.tokens() as f32 - self.tail.pages.bytes() as f32;
        let keep = if self.prompt.places.is_some() { Places::Remembered } else { Places::Forgotten };
        Leaving {
            segment: self.leaving.clone(),
            scales: self.scales.clone(),
            first,
            asked,
            keep,
            usual,
            left,
        }
    }
}
