//! How does a cache that is compressed become smaller still, when bytes run out and its prompt is gone?
//!
//! What the plan was made of is gone too. But the plan tells: at its lambda each page has the profiles that were worth their bytes, so
//! what the page's tokens weigh over that lambda lies between two turns of the head's families. Pages of one choice lie in the order of
//! their weights. With these weights a lambda is found at which all heads' pages together take fewer bytes, and they are stored once
//! more, from what their codes say. No token is dropped that was not, and no page gets finer.

use super::encode::widths_of;
use super::plan::{Again, search};
use super::{Layered, LayeredHead, Segment, Target};
use crate::KvBytes;
use mosaickv_kernels::Pool;
use mosaickv_kernels::layered::{Pages, Profile};
use std::sync::Arc;

/// Makes the pages of the `heads` of all compressed layers so small that these heads take what a cache of `exact` bytes takes at this
/// ratio; `false`, and nothing changes, if they take no more than that already.
pub(crate) fn compress_harder(
    pool: &Pool,
    mut heads: Vec<&mut LayeredHead>,
    exact: usize,
    ratio: f32,
) -> bool {
    let (pages, others) =
        heads.iter().map(|head| head.bytes_of_pages()).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
    let budget = exact as f32 / ratio - others as f32;
    if budget >= pages as f32 {
        return false;
    }
    let mut again: Vec<Option<Again>> = heads.iter().map(|_| None).collect();
    pool.for_each(&mut again, |i, again| *again = Some(heads[i].again()));
    let again: Vec<Again> = again.into_iter().flatten().collect();
    let bytes_at = |lambda: f32| again.iter().map(|head| head.bytes_at(lambda)).sum::<f32>();
    // Escapes are not planned for; they are taken to stay the same share.
    let budget = budget * bytes_at(1.0) / pages as f32;
    let (_, lambda) = search(budget, bytes_at);
    let mut stored: Vec<Option<[Segment; 2]>> = heads.iter().map(|_| None).collect();
    pool.for_each(&mut stored, |i, stored| {
        *stored = Some(heads[i].stored_again(&again[i].profiles_at(lambda)))
    });
    for (head, stored) in heads.iter_mut().zip(stored.into_iter().flatten()) {
        head.replace(stored, ratio);
    }
    true
}

impl LayeredHead {
    /// Those whose pages were planned.
    fn planned(&self) -> [&Arc<Segment>; 2] {
        [&self.prompt, &self.tail]
    }

    /// Bytes of the pages that were planned, and of all else.
    fn bytes_of_pages(&self) -> (usize, usize) {
        let mut all = KvBytes { lists: size_of::<LayeredHead>(), ..KvBytes::default() };
        self.count(&mut all);
        let pages = self.planned().map(|segment| segment.pages.bytes()).into_iter().sum();
        (pages, all.total() - pages)
    }

    fn again(&self) -> Again {
        let unit = (self.head_dim() as f32).sqrt().recip();
        let keys = widths_of(self.scales.key_spread(), unit);
        let values = widths_of(self.scales.value_spread(), 1.0);
        let runs = self
            .planned()
            .map(|segment| segment.pages.pages().iter().map(|page| (page.keys, page.values)).collect());
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
            Segment { pages, dropped: segment.dropped }
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
