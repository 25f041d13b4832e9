//! What is a cache made of, told alike for every format? Runs of tokens of one layer and KV head that are kept in one way: what a picture
//! of a cache is drawn from.

use crate::layered::SINKS;
use crate::{HeadInfo, KvCache, KvFormat, PageInfo, SegmentInfo};
use std::collections::{BTreeMap, HashMap};

/// What a cache is made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parts {
    /// In what order a head's parts are.
    pub order: Order,
    /// Ways to be kept, which parts name by number.
    pub kinds: Vec<String>,
    /// By layer and KV head.
    pub heads: Vec<HeadParts>,
}

/// In what order a head's parts are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// That of their tokens.
    #[default]
    Position,
    /// The first tokens, then the prompt from what counts most to what counts least, then the newest.
    Importance,
}

/// The parts of a KV head of one layer, together all of its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadParts {
    /// Which layer.
    pub layer: usize,
    /// Which KV head.
    pub head: usize,
    /// Not empty.
    pub parts: Vec<Part>,
}

/// A run of tokens that are kept alike.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Part {
    /// Position of the first token, where the order is that of tokens.
    pub first: Option<usize>,
    /// How many.
    pub tokens: usize,
    /// Bits a scalar.
    pub bits: f32,
    /// Bytes.
    pub bytes: usize,
    /// Which of the kinds.
    pub kind: usize,
    /// What compression lost of them, relative, where that is known.
    pub loss: Option<f32>,
    /// The share of them that a step read, where steps selected.
    pub read: Option<f32>,
    /// Positions of its tokens, ascending, where the order is not that of tokens and they [are
    /// remembered](KvCache::remember_places); only of heads that are asked for alone.
    pub places: Vec<u32>,
}

impl KvCache {
    /// Of all heads.
    pub fn parts(&self) -> Parts {
        self.parts_of(None)
    }

    /// Of one head, with the places of its tokens; `None` if there is no such head.
    pub fn parts_of_head(&self, layer: usize, head: usize) -> Option<Parts> {
        let mut parts = self.parts_of(Some((layer, head)));
        // Other formats tell all of them.
        parts.heads.retain(|of| (of.layer, of.head) == (layer, head));
        (!parts.heads.is_empty()).then_some(parts)
    }

    /// How many segments of the packed format, or pages of the layered one, are kept in which way: told so coarsely that any number of
    /// caches has few ways.
    pub fn strategies(&self) -> BTreeMap<String, u64> {
        let d = self.shape().head_dim;
        let mut segments: BTreeMap<(usize, usize, usize), u64> = BTreeMap::new();
        for SegmentInfo { kept, group, block, .. } in self.segments() {
            *segments.entry((kept, group, block)).or_default() += 1;
        }
        let mut pages = [0u64; 5];
        for page in self.layered_heads().iter().flat_map(|head| head.prompt.iter().chain(&head.tail)) {
            let bits = page.bits(d);
            pages[[1.0, 2.0, 4.0, 8.0].iter().filter(|from| bits >= **from).count()] += 1;
        }
        let name_of = |(kept, group, block)| {
            format!("packed: {kept} of {d} elements, groups of {group}, blocks of {block}")
        };
        let ranges = ["less than 1 bit", "1 to 2 bits", "2 to 4 bits", "4 to 8 bits", "8 bits"];
        let of_pages = ranges.iter().zip(pages).filter(|(_, count)| *count > 0);
        let of_pages = of_pages.map(|(range, count)| (format!("layered: {range} a scalar"), count));
        segments.into_iter().map(|(of, count)| (name_of(of), count)).chain(of_pages).collect()
    }

    fn parts_of(&self, alone: Option<(usize, usize)>) -> Parts {
        let mut kinds = Kinds::default();
        let (order, heads) = match self.format() {
            KvFormat::Packed(_) if self.is_compressed() => (Order::Position, packed(self, &mut kinds)),
            KvFormat::Layered(_) if self.is_compressed() => {
                let is_wanted = |info: &HeadInfo| alone.is_none_or(|head| head == (info.layer, info.head));
                let info = self.layered_heads().into_iter().filter(is_wanted);
                let heads = info.map(|info| layered(self, info, alone.is_some(), &mut kinds)).collect();
                (Order::Importance, heads)
            }
            format => (Order::Position, alike(self, format, &mut kinds)),
        };
        Parts { order, kinds: kinds.names, heads }
    }
}

/// Ways to be kept, each once.
#[derive(Default)]
struct Kinds {
    names: Vec<String>,
    numbers: HashMap<String, usize>,
}

impl Kinds {
    fn number(&mut self, name: String) -> usize {
        *self.numbers.entry(name).or_insert_with_key(|name| {
            self.names.push(name.clone());
            self.names.len() - 1
        })
    }

    fn exact(&mut self, name: &str, tokens: usize, head_dim: usize) -> Part {
        let kind = self.number(name.to_owned());
        Part { tokens, bits: 16.0, bytes: tokens * 4 * head_dim, kind, ..Part::default() }
    }

    /// Of tokens of which nothing is there.
    fn nothing(&mut self, name: &str, tokens: usize) -> Part {
        Part { tokens, kind: self.number(name.to_owned()), ..Part::default() }
    }

    fn page(&mut self, page: &PageInfo, (head_dim, place, loss): (usize, &str, f32)) -> Part {
        let spelt = |[eight, four, two]: [usize; 3]| format!("{eight}/{four}/{two}");
        let (keys, values) = (spelt(page.keys.channels), spelt(page.values.channels));
        Part {
            tokens: page.tokens,
            bits: page.bits(head_dim),
            bytes: page.bytes,
            kind: self.number(format!("{place}: channels of 8/4/2 bits: keys {keys}, values {values}")),
            loss: Some(loss),
            read: page.read,
            ..Part::default()
        }
    }
}

/// All tokens of all heads in one way.
fn alike(cache: &KvCache, format: KvFormat, kinds: &mut Kinds) -> Vec<HeadParts> {
    let (shape, tokens) = (cache.shape(), cache.tokens());
    let heads = shape.layers * shape.kv_heads;
    let bytes = cache.bytes().total() / heads;
    let name = if cache.is_compressed() { format.name() } else { "exact" };
    let bits = bits_of(bytes, tokens * shape.head_dim);
    let part =
        Part { first: Some(0), tokens, bits, bytes, kind: kinds.number(name.to_owned()), ..Part::default() };
    let head =
        |i| HeadParts { layer: i / shape.kv_heads, head: i % shape.kv_heads, parts: vec![part.clone()] };
    (0..heads).map(head).collect()
}

fn packed(cache: &KvCache, kinds: &mut Kinds) -> Vec<HeadParts> {
    let (shape, all) = (cache.shape(), cache.tokens());
    let d = shape.head_dim;
    let head = |i| HeadParts { layer: i / shape.kv_heads, head: i % shape.kv_heads, parts: vec![] };
    let mut heads: Vec<HeadParts> = (0..shape.layers * shape.kv_heads).map(head).collect();
    for segment in cache.segments() {
        let SegmentInfo { layer, head, first, tokens, kept, group, block, loss, bytes, temporary, .. } =
            segment;
        let waits = if temporary { ", waits for its own strategy" } else { "" };
        let name = format!("{kept} of {d} elements in groups of {group}, blocks of {block}{waits}");
        let (kind, bits) = (kinds.number(name), bits_of(bytes, tokens * d));
        let parts = &mut heads[layer * shape.kv_heads + head].parts;
        if parts.is_empty() && first > 0 {
            parts.push(Part { first: Some(0), ..kinds.exact("exact", first, d) });
        }
        let (loss, read) = (Some(loss), segment.read);
        parts.push(Part { first: Some(first), tokens, bits, bytes, kind, loss, read, ..Part::default() });
    }
    for head in &mut heads {
        // A layer with a sliding window has forgotten the others.
        let seen = shape.window_of(head.layer).map_or(all, |window| window.min(all));
        if seen < all {
            let part = kinds.nothing("out of the layer's window", all - seen);
            head.parts.push(Part { first: Some(0), ..part });
        }
        let packed: usize = head.parts.iter().map(|part| part.tokens).sum();
        if packed < all {
            head.parts.push(Part { first: Some(packed), ..kinds.exact("exact", all - packed, d) });
        }
    }
    heads
}

fn layered(cache: &KvCache, info: HeadInfo, with_places: bool, kinds: &mut Kinds) -> HeadParts {
    let d = cache.shape().head_dim;
    let remembered = if with_places { cache.places(info.layer, info.head) } else { None };
    let has_places = remembered.is_some();
    let mut of_pages = remembered.unwrap_or_default().into_iter();
    let (loss, all) = (info.distortion.into_iter().fold(0.0, f32::max), cache.tokens() as u32);
    let mut parts: Vec<Part> = vec![];
    let mut push = |part: Part| match parts.last_mut() {
        Some(last) if (last.kind, last.read) == (part.kind, part.read) => {
            last.tokens += part.tokens;
            last.bytes += part.bytes;
            last.places.extend(part.places);
        }
        _ => parts.push(part),
    };
    let run = |range: std::ops::Range<u32>| if has_places { range.collect() } else { vec![] };
    let sinks = kinds.exact("first tokens, exact", info.sinks, d);
    push(Part { places: run(0..SINKS as u32), ..sinks });
    for page in &info.prompt {
        let places = of_pages.next().unwrap_or_default();
        push(Part { places, ..kinds.page(page, (d, "prompt", loss)) });
    }
    if info.dropped > 0 {
        push(kinds.nothing("dropped from this head", info.dropped));
    }
    for page in &info.tail {
        let places = of_pages.next().unwrap_or_default();
        push(Part { places, ..kinds.page(page, (d, "newest", loss)) });
    }
    if info.buffer > 0 {
        let buffer = kinds.exact("update buffer, exact", info.buffer, d);
        push(Part { places: run(all - info.buffer as u32..all), ..buffer });
    }
    if has_places {
        let mut is_here = vec![false; all as usize];
        parts.iter().flat_map(|part| &part.places).for_each(|place| is_here[*place as usize] = true);
        let gone: Vec<u32> = (0..all).filter(|place| !is_here[*place as usize]).collect();
        for part in &mut parts {
            part.places.sort_unstable();
            if part.places.is_empty() {
                part.places.clone_from(&gone);
            }
        }
    }
    HeadParts { layer: info.layer, head: info.head, parts }
}

/// Bits a scalar, where keys and values of so many scalars each take so many bytes.
fn bits_of(bytes: usize, scalars: usize) -> f32 {
    bytes as f32 * 8.0 / (2 * scalars).max(1) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layered::{Calibration, Moments};
    use crate::{KvShape, Layer, Layered, Target, common};
    use mosaickv_kernels::Pool;
    use mosaickv_kernels::layered::PAGE_TOKENS;
    use std::sync::Arc;

    const D: usize = 16;
    const SHAPE: KvShape = KvShape { layers: 1, heads: 2, kv_heads: 2, head_dim: D, window: None };
    const ROW: usize = 2 * D;

    fn rows(seed: u64, tokens: usize) -> Vec<f32> {
        let mut uniform = common::uniform(seed);
        (0..tokens * ROW).map(|i| uniform() / (1.0 + (i % D) as f32)).collect()
    }

    /// A cache that remembers, after a prompt and some more tokens, and the keys of all of them.
    fn remembering(prompt: usize, more: usize) -> (KvCache, Vec<f32>) {
        let identity: Vec<f64> = (0..D * D).map(|i| f64::from(u8::from(i % (D + 1) == 0))).collect();
        let mut moments = Moments::new(D);
        let sample = &rows(9, 500)[..500 * D];
        moments.add(sample, sample, sample);
        let head = moments.learn(&identity);
        let calibration = Calibration { heads: vec![head.clone(), head], layer_weights: vec![1.0] };
        let format = KvFormat::Layered(Layered { target: Target::Ratio(4.0), ..Layered::default() });
        let cache = KvCache::new(SHAPE, format).unwrap().with_calibration(Arc::new(calibration)).unwrap();
        let (mut cache, pool) = (cache.remember_places(), Pool::new(1));
        let (keys, values) = (rows(1, prompt + more), rows(2, prompt + more));
        let of_prompt = prompt * ROW;
        cache.append(&pool, 0, &keys[..of_prompt], &values[..of_prompt]).unwrap();
        cache.attend(&pool, 0, &rows(3, prompt), &mut vec![0.0; of_prompt]);
        cache.end_prompt(&pool, 0);
        for (key, value) in keys[of_prompt..].chunks_exact(ROW).zip(values[of_prompt..].chunks_exact(ROW)) {
            cache.append(&pool, 0, key, value).unwrap();
            cache.attend(&pool, 0, key, &mut [0.0; ROW]);
            cache.between_steps();
        }
        (cache, keys)
    }

    /// What a page holds is what the tokens at its places are, and not what their neighbours are: also in the tail, and after it was
    /// compressed harder.
    #[test]
    fn places_are_those_of_the_tokens_in_the_pages() {
        let (mut cache, keys) = remembering(2300, 900);
        for harder in [false, true] {
            if harder {
                assert!(cache.compress_harder(&Pool::new(1), 6.0));
            }
            let Layer::Layered(heads) = &cache.layers[0] else { panic!("it is compressed") };
            for (g, head) in heads.iter().enumerate() {
                assert!(head.tail.tokens() > 256, "a tail of {} tokens", head.tail.tokens());
                let places = cache.places(0, g).unwrap();
                let pages = head.segments().map(|segment| &segment.pages);
                let decoded = pages.iter().flat_map(|pages| {
                    (0..pages.pages().len()).map(|page| (pages.pages()[page].keys, pages.decode(page).0))
                });
                let raw = |shift: u32, page: &[u32]| -> Vec<f32> {
                    let key = |t: &u32| &keys[(t + shift) as usize * ROW + g * D..][..D];
                    let rows: Vec<f32> = page.iter().flat_map(key).copied().collect();
                    head.scales.coordinates(&head.calibration.heads[g], &rows, &rows).0
                };
                let mut seen = 0;
                for (page, (profile, got)) in places.iter().zip(decoded) {
                    assert!(page.len() <= PAGE_TOKENS && got.len() == page.len() * D);
                    if profile.groups() == 0 {
                        continue;
                    }
                    // The first group, which has most bits.
                    let error = |want: Vec<f32>| -> f32 {
                        let pairs = got.chunks(D).zip(want.chunks(D));
                        pairs.flat_map(|(a, b)| a.iter().zip(b).take(8)).map(|(a, b)| (a - b).powi(2)).sum()
                    };
                    let shift = if page.contains(&(keys.len() as u32 / ROW as u32 - 1)) { 0 } else { 1 };
                    let (here, beside) = (error(raw(0, page)), error(raw(shift, page)));
                    assert!(shift == 0 || here < 0.3 * beside, "head {g}: {here}, beside {beside}");
                    seen += 1;
                }
                assert!(seen > 20, "{seen} pages could be told");
            }
        }
    }

    /// Each token of a head is in one part, dropped ones too.
    #[test]
    fn the_parts_of_a_head_have_every_token_once() {
        let (cache, _) = remembering(2300, 500);
        let all = cache.parts();
        assert!(all.heads.iter().all(|head| head.parts.iter().all(|part| part.places.is_empty())));
        for (g, whole) in all.heads.iter().enumerate() {
            let one = cache.parts_of_head(0, g).unwrap();
            let parts = &one.heads[0].parts;
            assert_eq!(parts.len(), whole.parts.len());
            parts.iter().for_each(|part| assert_eq!(part.places.len(), part.tokens, "{part:?}"));
            let mut places: Vec<u32> = parts.iter().flat_map(|part| part.places.clone()).collect();
            places.sort_unstable();
            assert!(places.into_iter().eq(0..2800));
        }
        let pages: usize = cache.layered_heads().iter().map(|head| head.prompt.len() + head.tail.len()).sum();
        let strategies = cache.strategies();
        assert_eq!(strategies.values().sum::<u64>(), pages as u64, "{strategies:?}");
        assert!(strategies.contains_key("layered: 8 bits a scalar"), "a page of the newest: {strategies:?}");
        assert_eq!((cache.parts_of_head(1, 0), cache.parts_of_head(0, 2)), (None, None));
        assert_eq!(cache.clone().parts(), all, "a clone tells the same");
    }
}
