//! What becomes of tokens that leave the window?
//!
//! The same as of a prompt's: what has lately been asked tells what they are worth, one plan for the heads of a layer shares out the
//! bytes, and tokens of like weights share pages. A token may be dropped from a head there too: a head that
//! looks at what is near gives its prompt hardly any bits, and keys of next to none are no better than the mean key, which
//! is worse than none (KL after 1,000 generated tokens: 0.3 in place of 0.02).

use super::encode::{channels, guard, lift, push};
use super::plan::{Head, HeadPlan, plan};
use super::{LayeredHead, SINKS};
use mosaickv_kernels::Pool;
use std::sync::Arc;

/// Share of a head's mean weight that every token of a segment gets: fewer queries than a prompt's judge them.
const FLOOR: f32 = 1.0;

/// A segment takes this many times the bytes of as many tokens of the prompt at least and at most.
const BOUNDS: (f32, f32) = (0.9, 1.1);

/// Tokens of a head that leave the window.
struct Leaving {
    /// `[n, D]` over spreads.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Bytes that they take at the prompt's rate, and that are left for them if the tail is to keep it.
    usual: f32,
    left: f32,
}

/// The oldest pages of the windows of a layer's `heads` become a segment of their tails.
pub(crate) fn close(pool: &Pool, heads: &mut [LayeredHead]) {
    let mut found: Vec<(&mut LayeredHead, Option<(Leaving, Head)>)> =
        heads.iter_mut().map(|head| (head, None)).collect();
    pool.for_each(&mut found, |_, (head, found)| *found = Some(head.leave()));
    let (heads, found): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    let (segments, mut observed): (Vec<Leaving>, Vec<Head>) = found.into_iter().flatten().unzip();
    guard(&mut observed, heads[0].settings.drop);
    let usual: f32 = segments.iter().map(|segment| segment.usual).sum();
    let left: f32 = segments.iter().map(|segment| segment.left).sum();
    let plans = plan(pool, &observed, left.clamp(BOUNDS.0 * usual, BOUNDS.1 * usual));
    let mut made: Vec<_> = heads.into_iter().zip(segments.iter().zip(&plans)).collect();
    pool.for_each(&mut made, |_, (head, (segment, plan))| head.join(segment, plan));
}

impl LayeredHead {
    /// Takes the pages out of the window, and says what they hold and what it is worth.
    fn leave(&mut self) -> (Leaving, Head) {
        let d = self.head_dim();
        let before = [&self.prompt, &self.tail].map(|segment| segment.tokens());
        let first = SINKS + before.iter().sum::<usize>();
        let count = self.leaving();
        let window = &mut Arc::make_mut(&mut self.window).pages;
        let (keys, values): (Vec<_>, Vec<_>) = window.take_first(count).into_iter().unzip();
        window.shrink();
        let (keys, values) = (keys.concat(), values.concat());
        let tokens = keys.len() / d;
        let mut weights = self.asked.weigh(first, (&keys, &values), self.scales.value_spread());
        lift(&mut weights, FLOOR);
        self.asked.forget(first + tokens);
        let head = Head {
            keys: channels(&keys, self.scales.key_spread(), (d as f32).sqrt().recip()),
            values: channels(&values, self.scales.value_spread(), 1.0),
            weights,
            guarded: vec![false; tokens],
        };
        let usual = self.rate * tokens as f32;
        let left = usual + self.rate * self.tail.tokens() as f32 - self.tail.pages.bytes() as f32;
        (Leaving { keys, values, usual, left }, head)
    }

    fn join(&mut self, segment: &Leaving, plan: &HeadPlan) {
        let tail = Arc::make_mut(&mut self.tail);
        tail.dropped += segment.keys.len() / tail.pages.head_dim() - plan.order.len();
        push(&mut tail.pages, (&segment.keys, &segment.values), plan);
        tail.pages.shrink();
    }
}
