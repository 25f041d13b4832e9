//! How many bytes may a cache take that has not read its tokens yet? What a scheduler must have free to let it go on.

use crate::baselines::WINDOW;
use crate::exact::ExactHead;
use crate::layered::{Samples, Target};
use crate::{KvCache, KvFormat, KvShape, Layer};
use mosaickv_kernels::exact::PAGE_TOKENS;

impl KvFormat {
    /// Bytes that [`KvCache::bytes`] counts at most while a prompt of `tokens` tokens is read, and while it is compressed: until then
    /// all of it is exact, and of the layered format all layers are until the last one has read it. The working memory of a
    /// compression (some copies of one head a thread) is not among them.
    pub fn most_prompt_bytes(self, shape: KvShape, tokens: usize) -> usize {
        let pages = tokens / PAGE_TOKENS + 1;
        let exact = shape.exact_bytes(pages * PAGE_TOKENS);
        let heads = shape.layers * shape.kv_heads;
        // A page's header, its counts and its place in a list that has room for twice as many.
        let lists = heads * (size_of::<ExactHead>() + 128 + pages * 192)
            + shape.layers * size_of::<Layer>()
            + size_of::<KvCache>();
        let row = shape.heads * shape.head_dim;
        let made = match self {
            KvFormat::Exact => 0,
            KvFormat::Layered(of) => {
                let prompt = match of.target {
                    Target::Ratio(ratio) => (exact as f64 / f64::from(ratio)) as usize,
                    Target::Bytes(bytes) => bytes.min(exact),
                };
                prompt + prompt / 8 + shape.layers * Samples::most_bytes(row)
            }
            // Layer by layer, each in place of its exact pages.
            _ => exact / 2 + shape.layers * WINDOW * row * size_of::<f32>(),
        };
        exact + lists + made
    }

    /// Bytes that [`KvCache::bytes`] counts at most in addition when so many tokens follow a prompt, one by one. A list that grows may
    /// have room for twice as many.
    pub fn most_growth_bytes(self, shape: KvShape, tokens: usize) -> usize {
        let exact = shape.exact_bytes(tokens + PAGE_TOKENS);
        match self {
            // The sums from which a growing segment's rotations are learnt, of keys and of values.
            KvFormat::Packed(_) => {
                let sums = 2 * shape.head_dim * shape.head_dim * size_of::<f64>();
                exact + shape.layers * shape.kv_heads * sums
            }
            _ => exact,
        }
    }
}
