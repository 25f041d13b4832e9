//! How does a cache that is compressed become smaller still, when bytes run out and its prompt is gone?
//!
//! What the plan was made of is gone too. But the plan tells: at its lambda each page has the profiles that were worth their bytes, so
//! what the page's tokens weigh over that lambda lies between two turns of the head's families. A prompt's pages of one choice lie about
//! in the order of their weights. With these weights a lambda is found at which all heads' pages together take fewer bytes, and they
//! are stored once more, from what their codes say. No token is dropped that was not, and no page gets finer. The newest tokens, in
//! window and buffer, stay as they are.

use super::encode::widths_of;
use super::plan::{Again, search};
use super::{Layered, LayeredHead, Segment, Target};
use crate::KvBytes;
use mosaickv_kernels::Pool;
use mosaickv_kernels::layered::{Pages, Profile};
use std::sync::Arc;

/// What the pages keep at least, of what they would if all shrank alike.
const LEAST: f32 = 0.5;

/// Bytes that the `heads` take, where they are more than a cache of `exact` bytes takes at this ratio.
pub(crate) fn excess<'a>(
    heads: impl Iterator<Item = &'a LayeredHead>,
    exact: usize,
    ratio: f32,
) -> Option<usize> {
    let bytes = heads.map(|head| head.bytes_of_pages()).map(|(pages, others)| pages + others).sum::<usize>();
    (bytes as f32 > exact as f32 / ratio).then_some(bytes)
}

/// Makes the pages of the `heads` of all compressed layers so small that these heads take about what a cache of `exact` bytes takes at
/// this ratio; they must take more. Where what stays as it is would leave the pages too little, they keep [`LEAST`], and the ratio is not
/// reached.
pub(crate) fn compress_harder(pool: &Pool, mut heads: Vec<&mut LayeredHead>, exact: usize, ratio: f32) {
    let (pages, others) =
        heads.iter().map(|head| head.bytes_of_pages()).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    let whole = exact as f32 / ratio;
    let share = (whole / (pages + others) as f32).min(1.0);
    let budget = (whole - others as f32).max(LEAST * share * pages as f32);
    let mut again: Vec<Option<Again>> = heads.iter().map(|_| None).collect();
    pool.for_each(&mut again, |i, again| *again = Some(heads[i].again()));
    let again: Vec<Again> = again.into_iter().flatten().collect();
    let bytes_at = |lambda: f32| again.iter().map(|head| head.bytes_at(lambda)).sum::<f32>();
    // Escapes are not planned for; they are taken to stay the same share.
    let budget = budget * bytes_at(1.0) / pages.max(1) as f32;
    let (_, lambda) = search(budget, bytes_at);
    // One head after the other, so that few are there twice.
    pool.for_each(&mut heads, |i, head| {
        let stored = head.stored_again(&again[i].profiles_at(lambda));
        head.replace(stored, ratio);
    });
}

impl LayeredHead {
    /// Those whose pages were planned.
    fn planned(&self) -> [&Arc<Segment>; 2] {
        [&self.prompt, &self.tail]
    }

    /// Bytes of the pages that were planned, and of all else but what nobody plans for: the places of tokens.
    fn bytes_of_pages(&self) -> (usize, usize) {
        let mut all = KvBytes { lists: size_of::<LayeredHead>(), ..KvBytes::default() };
        self.count(&mut all);
        let pages: usize = self.planned().map(|segment| segment.pages.bytes()).into_iter().sum();
        let places: usize = self.planned().map(|segment| segment.place_bytes()).into_iter().sum();
        (pages, all.total() - pages - places)
    }

    fn again(&self) -> Again {
        let unit = (self.head_dim() as f32).sqrt().recip();
        let keys = widths_of(self.scales.key_spread(), unit);
        let values = widths_of(self.scales.value_spread(), 1.0);
        let profiles = |segment: &Segment| -> Vec<_> {
            segment.pages.pages().iter().map(|page| (page.keys, page.values)).collect()
        };
        // The tail was planned a few pages at a time.
        let prompt = std::iter::once(profiles(&self.prompt));
        let runs = prompt.chain(profiles(&self.tail).into_iter().map(|page| vec![page]));
        Again::new((&keys, &values), runs)
    }

    /// Its planned segments with pages of these profiles.
    fn stored_again(&self, profiles: &[(Profile, Profile)]) -> [Segment; 2] {
        let mut profiles = profiles.iter();
        self.planned().map(|segment| {
            let mut pages = Pages::new(segment.pages.head_dim());
            for (index, of_page) in (0..segment.pages.pages().len()).zip(profiles.by_ref()) {
                let (keys, values) = segment.pages.decode(index);
                pages.push((&keys, &values), *of_page);
            }
            pages.shrink();
            Segment { pages, dropped: segment.dropped, places: segment.places.clone() }
        })
    }

    fn replace(&mut self, [prompt, tail]: [Segment; 2], ratio: f32) {
        let before: usize = self.planned().iter().map(|segment| segment.pages.bytes()).sum();
        let after = prompt.pages.bytes() + tail.pages.bytes();
        self.rate *= after as f32 / before.max(1) as f32;
        (self.prompt, self.tail) = (Arc::new(prompt), Arc::new(tail));
        self.settings = Layered { target: Target::Ratio(ratio), ..self.settings };
    }
}
