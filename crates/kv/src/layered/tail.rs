//! What becomes of the tokens after the prompt?
//!
//! A full update buffer becomes the tail's last page, at 8 bits, and the page that was the last before is stored again, in
//! the running profiles. Eight pages are a segment: when one closes, the profiles of the next follow from how the
//! newest tokens vary in each channel, and from the bytes that keep what is generated at the prompt's rate. The first buffers of a
//! cache's layers are full at different lengths, so that no step seals pages in all layers.

use super::plan::{Channels, running};
use super::{LayeredHead, encode, fine};
use half::f16;
use mosaickv_kernels::exact::ExactPage;
use mosaickv_kernels::layered::PAGE_TOKENS;
use std::sync::Arc;

/// Pages of a segment of the tail.
const SEGMENT: usize = 8;

/// Tokens by which a buffer's allocation grows.
const STEP: usize = 16;

/// A segment's pages take this many times the bytes of the prompt's at least and at most.
const BOUNDS: (f32, f32) = (0.6, 1.2);

/// Tokens at which the first buffer of `layer` of `layers` is full.
pub(super) fn first_limit(layer: usize, layers: usize) -> usize {
    PAGE_TOKENS - layer * PAGE_TOKENS / layers.max(1) % PAGE_TOKENS
}

impl LayeredHead {
    /// Whether the next token must first send the buffer to a page.
    pub(crate) fn is_full(&self) -> bool {
        self.buffer.as_ref().is_some_and(|buffer| buffer.tokens() >= self.limit)
    }

    /// Adds a token, its key `[D]` and value `[D]`.
    pub(crate) fn append(&mut self, key: &[f32], value: &[f32]) {
        if self.is_full() {
            self.seal();
        }
        let d = key.len();
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

    /// The buffer becomes the tail's last page, at 8 bits, and the one before gets the running profiles.
    fn seal(&mut self) {
        let buffer = self.buffer.take().expect("a full buffer");
        let (keys, values) = crate::packed::rows(&[&buffer]);
        let (keys, values) = self.coordinates(&keys, &values);
        let d = self.head_dim();
        if self.tail.pages.pages().len().is_multiple_of(SEGMENT) {
            self.replan(&keys, &values);
        }
        self.limit = PAGE_TOKENS;
        let tail = Arc::make_mut(&mut self.tail);
        if let Some((keys, values)) = tail.pages.pop() {
            tail.pages.push((&keys, &values), self.running.profiles);
        }
        tail.pages.push((&keys, &values), (fine(d), fine(d)));
        tail.pages.shrink();
    }

    /// Profiles of the next segment, from the newest tokens, `[n, D]` in units of spreads.
    fn replan(&mut self, keys: &[f32], values: &[f32]) {
        let unit = (self.head_dim() as f32).sqrt().recip();
        let keys = channels(keys, self.scales.key_spread(), unit);
        let values = channels(values, self.scales.value_spread(), 1.0);
        // The buffer is half full on average.
        let exact = PAGE_TOKENS / 2 * self.head_dim() * 2 * size_of::<f16>();
        let usual = self.running.bytes;
        let pages = (self.tokens() - self.prompt_tokens) / PAGE_TOKENS + SEGMENT;
        let allowed = self.prompt_bytes as f32 + usual * pages as f32;
        let left = (allowed - (self.bytes() + exact) as f32) / SEGMENT as f32;
        let bytes = left.clamp(BOUNDS.0 * usual, BOUNDS.1 * usual);
        self.running.profiles = running((&keys, &values), self.running.weights, bytes);
    }
}

/// What tokens `[n, D]` in units of `spread` say of the channels.
fn channels(x: &[f32], spread: &[f16], unit: f32) -> Channels {
    let share = 1.0 / (x.len() / spread.len()) as f32;
    let mut variances = vec![0.0; spread.len()];
    for row in x.chunks_exact(spread.len()) {
        variances.iter_mut().zip(row).for_each(|(v, x)| *v += x * x * share);
    }
    variances.iter_mut().zip(spread).for_each(|(v, s)| *v *= (s.to_f32() * unit).powi(2));
    Channels { variances, escapes: encode::escapes(x, spread.len()) }
}
