//! How are the newest tokens kept? They are asked for most, and nobody knows yet what they will be worth.
//!
//! The update buffer is exact. A full one is added to a page at 8 bits; when that has no room it becomes one of the window's
//! pages, whose profiles the prompt's statistics gave for [`MORE`] times the bits of the prompt's mean element. When the
//! window has [`SEGMENT`] pages more than stay in it, these leave it for the [tail](super::tail). Some of the steps' queries are
//! remembered until then.
//!
//! A prompt's newest tokens are kept the same way, in layers at different points between two such events: their
//! bytes together stay the same while tokens are generated, and no step has all layers' work to do.

use super::asked::EVERY;
use super::{LayeredHead, Work, fine};
use half::f16;
use mosaickv_kernels::exact::ExactPage;
use mosaickv_kernels::layered::{PAGE_TOKENS, Page, Pages, Profile};
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Pages of a segment of the tail.
pub(super) const SEGMENT: usize = 4;

/// One page stays in the window for so many tokens of the prompt, within bounds.
const TOKENS_PER_PAGE: usize = 1024;
const STAY: RangeInclusive<usize> = 2..=8;

/// An element of the window's pages has so many times the bits that the whole cache has for one, within bounds.
const MORE: f32 = 2.5;
const BITS: RangeInclusive<f32> = 4.0..=8.0;

/// Tokens of a full buffer.
const FULL: usize = 32;

/// Tokens by which a buffer's allocation grows.
const STEP: usize = 16;

/// Which of a prompt's newest tokens are in the window and the buffer of a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Newest {
    /// Pages that stay in the window when a segment leaves it.
    pub(super) stay: usize,
    /// Pages with the window's profiles now; one more has 8 bits.
    pages: usize,
    /// Tokens in the buffer.
    pub(super) buffered: usize,
    /// Bits of an element of those pages.
    bits: f32,
}

impl Newest {
    /// After a prompt of so many tokens, in one layer of so many; the whole cache has `bits` for each element.
    pub(super) fn new(tokens: usize, bits: f32, (layer, layers): (usize, usize)) -> Newest {
        let stay = (tokens / TOKENS_PER_PAGE).clamp(*STAY.start(), *STAY.end());
        let bits = (MORE * bits).clamp(*BITS.start(), *BITS.end());
        Newest { stay, pages: stay + layer % SEGMENT, buffered: layer * FULL / layers, bits }
    }

    pub(super) fn tokens(self) -> usize {
        (self.pages + 1) * PAGE_TOKENS + self.buffered
    }

    /// What they take in a head of `d` channels whose window has these profiles; escapes are not counted.
    pub(super) fn bytes(self, d: usize, (keys, values): (Profile, Profile)) -> usize {
        let exact = self.buffered.next_multiple_of(STEP) * 2 * d * size_of::<f16>();
        exact + self.pages * Pages::bytes_of_page(keys, values) + Pages::bytes_of_page(fine(d), fine(d))
    }

    /// Bytes that a page with the window's profiles may take.
    pub(super) fn bytes_of_page(self, d: usize) -> f32 {
        (PAGE_TOKENS * 2 * d) as f32 * self.bits / 8.0 + size_of::<Page>() as f32
    }
}

impl LayeredHead {
    /// Whether the next token must first send the buffer to a page.
    pub(crate) fn is_full(&self) -> bool {
        self.buffer.as_ref().is_some_and(|buffer| buffer.tokens() >= FULL)
    }

    /// Adds a token, its key `[D]` and value `[D]`.
    pub(crate) fn append(&mut self, key: &[f32], value: &[f32]) {
        self.make_room();
        self.fill(key, value);
    }

    /// Adds tokens, keys and values `[n, D]`, to the buffer.
    pub(super) fn fill(&mut self, keys: &[f32], values: &[f32]) {
        let d = self.head_dim();
        for (key, value) in keys.chunks_exact(d).zip(values.chunks_exact(d)) {
            let buffer = match self.buffer.take() {
                None => ExactPage::new(d, STEP),
                Some(full) if full.is_full() => {
                    let mut larger = ExactPage::new(d, full.capacity() + STEP);
                    let (keys, values) = crate::packed::rows(&[&full]);
                    keys.chunks_exact(d).zip(values.chunks_exact(d)).for_each(|(k, v)| larger.push(k, v));
                    larger
                }
                Some(buffer) => buffer,
            };
            self.buffer.insert(buffer).push(key, value);
        }
    }

    /// What [`append`](LayeredHead::append) of the next token begins with.
    pub(crate) fn make_room(&mut self) {
        if self.is_full() {
            self.seal();
        }
    }

    /// The buffer becomes a part of the page at 8 bits; if there is no room for it, that one gets the window's profiles.
    fn seal(&mut self) {
        let buffer = self.buffer.take().expect("a full buffer");
        let (keys, values) = crate::packed::rows(&[&buffer]);
        let of_head = &self.calibration.heads[self.index];
        let (keys, values) = self.scales.coordinates(of_head, &keys, &values);
        let pages = &mut Arc::make_mut(&mut self.window).pages;
        let (mut of_page, mut values_of_page) = pages.pop().unwrap_or_default();
        let d = pages.head_dim();
        if of_page.len() + keys.len() > PAGE_TOKENS * d {
            pages.push((&of_page, &values_of_page), self.profiles);
            (of_page, values_of_page) = (vec![], vec![]);
        }
        of_page.extend(keys);
        values_of_page.extend(values);
        pages.push((&of_page, &values_of_page), (fine(d), fine(d)));
        pages.shrink();
    }

    /// Pages that are to leave the window.
    pub(super) fn to_leave(&self) -> usize {
        let more = (self.window.pages.pages().len() - 1).saturating_sub(self.stay.into());
        if more < SEGMENT { 0 } else { more }
    }

    /// Remembers what was read, and some of the steps' queries, after the attention of the newest token.
    pub(crate) fn remember(&mut self, work: &Work) {
        self.count_reads(&work.chosen);
        if self.is_asked() {
            self.ask(work, |r| work.whole[0].log_sum(r));
        }
    }

    /// Whether the newest token's queries are to be remembered.
    pub(crate) fn is_asked(&self) -> bool {
        self.buffer.as_ref().is_some_and(|buffer| buffer.tokens().is_multiple_of(EVERY))
    }

    /// The same of the token after it.
    pub(crate) fn asks_next(&self) -> bool {
        let buffered = self.buffer.as_ref().map_or(0, ExactPage::tokens) % FULL;
        (buffered + 1).is_multiple_of(EVERY)
    }

    /// Remembers them, and of each row the logarithm of what its weights summed up to.
    pub(crate) fn ask(&mut self, work: &Work, log_sum: impl Fn(usize) -> f32) {
        self.asked.push(self.tokens() - 1, &work.queries, log_sum);
    }
}
