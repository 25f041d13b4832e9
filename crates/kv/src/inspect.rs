//! What was chosen where? The segments of a packed cache and the pages of a layered one, as figures.

use crate::layered::{LayeredHead, SINKS, is_out_of_line};
use crate::{KvBytes, KvCache, Layer};
use mosaickv_kernels::layered::{GROUP, PAGE_TOKENS, Page, Pages, Profile};

/// A segment of one layer and KV head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SegmentInfo {
    /// Which layer.
    pub layer: usize,
    /// Which KV head.
    pub head: usize,
    /// Position of its first token.
    pub first: usize,
    /// Tokens.
    pub tokens: usize,
    /// Elements kept of each vector, of `head_dim`.
    pub kept: usize,
    /// Channels that are stored, of `head_dim`.
    pub channels: usize,
    /// Neighbouring channels that are kept or dropped together.
    pub group: usize,
    /// Tokens of a token block.
    pub block: usize,
    /// Compression loss when the strategy was chosen: what is not stored of the keys' variance and of the values' energy,
    /// mean of both.
    pub loss: f32,
    /// Bytes allocated: pages, lists, and the rotation where it is its own.
    pub bytes: usize,
    /// Whether it waits for a strategy of its own.
    pub temporary: bool,
    /// The share of its tokens that a step read, once there was one.
    pub read: Option<f32>,
}

impl KvCache {
    /// The packed segments, by layer, KV head and position; none of layers in other formats.
    pub fn segments(&self) -> Vec<SegmentInfo> {
        let mut out = Vec::new();
        for (layer, heads) in self.layers.iter().enumerate() {
            let Layer::Packed(heads) = heads else { continue };
            for (head, of) in heads.iter().enumerate() {
                let mut first = of.sinks.tokens();
                for (i, segment) in of.segments.iter().enumerate() {
                    let shape = segment.strategy.shape;
                    let borrows = i > 0 && segment.is_like(&of.segments[i - 1]);
                    let rotation = if borrows { 0 } else { segment.rotation.bytes() };
                    out.push(SegmentInfo {
                        layer,
                        head,
                        first,
                        tokens: segment.tokens(),
                        kept: shape.kept(),
                        channels: shape.channels(),
                        group: shape.group(),
                        block: segment.strategy.block,
                        loss: segment.loss,
                        bytes: segment.packed_bytes() + segment.list_bytes() + rotation,
                        temporary: i >= of.settled(),
                        read: of.read_share(i),
                    });
                    first += segment.tokens();
                }
            }
        }
        out
    }
}

/// A KV head of one layer in the layered format. Its tokens are the sinks, those of the pages, the dropped ones and the
/// buffer's; its bytes those of the pages and the others.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadInfo {
    /// Which layer.
    pub layer: usize,
    /// Which KV head.
    pub head: usize,
    /// First tokens, exact.
    pub sinks: usize,
    /// The prompt's pages in the order of the plan, from important tokens to others.
    pub prompt: Vec<PageInfo>,
    /// Tokens that this head has dropped.
    pub dropped: usize,
    /// Pages of what came after the prompt, and at the end those of the newest tokens; the last one has 8 bits.
    pub tail: Vec<PageInfo>,
    /// Newest tokens, exact.
    pub buffer: usize,
    /// Bytes allocated that are in no page: sinks, means and spreads, buffer, lists.
    pub other_bytes: usize,
    /// What the errors of the prompt's keys and of its values weighed over what was planned: about 1. Where it is out of line the
    /// head fell back to safer profiles, and these are the ratios before.
    pub distortion: [f32; 2],
}

impl HeadInfo {
    /// Whether it fell back to safer profiles.
    pub fn fell_back(&self) -> bool {
        self.distortion.into_iter().any(is_out_of_line)
    }
}

/// A page of the layered format.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PageInfo {
    /// Tokens.
    pub tokens: usize,
    /// Its keys.
    pub keys: HalfInfo,
    /// Its values.
    pub values: HalfInfo,
    /// Bytes allocated: keys, values and the header.
    pub bytes: usize,
    /// The share of its tokens that a step read, of the steps that selected since it came; of pages that are always read and where no
    /// step selected, none.
    pub read: Option<f32>,
}

impl PageInfo {
    /// Bits of a scalar, mean of keys and values of `head_dim` channels.
    pub fn bits(&self, head_dim: usize) -> f32 {
        (self.keys.bits() + self.values.bits()) as f32 / (2 * head_dim) as f32
    }
}

/// The keys or the values of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HalfInfo {
    /// Channels of 8, of 4 and of 2 bits; those that are left of `head_dim` have none.
    pub channels: [usize; 3],
    /// Elements beyond their width's range, stored apart.
    pub escapes: usize,
    /// Bytes of codes and escapes.
    pub bytes: usize,
}

impl HalfInfo {
    /// Bits of a vector's codes.
    pub fn bits(self) -> usize {
        let [eight, four, two] = self.channels;
        8 * eight + 4 * four + 2 * two
    }

    fn new(profile: Profile, escapes: usize) -> HalfInfo {
        let channels = [profile.eight, profile.four, profile.two].map(|groups| usize::from(groups) * GROUP);
        let codes = profile.bits() * PAGE_TOKENS / 8;
        HalfInfo { channels, escapes, bytes: codes + escapes * Pages::BYTES_OF_ESCAPE }
    }
}

impl KvCache {
    /// The heads of the layers in the layered format, by layer and head.
    pub fn layered_heads(&self) -> Vec<HeadInfo> {
        let mut out = Vec::new();
        for (layer, heads) in self.layers.iter().enumerate() {
            let Layer::Layered(heads) = heads else { continue };
            out.extend(heads.iter().enumerate().map(|(head, of)| head_info((layer, head), of)));
        }
        out
    }

    /// Positions of the tokens of a layered head's pages, of the prompt's and then of the tail's in the order of [`HeadInfo`]; `None`
    /// where they [were not remembered](KvCache::remember_places), as in caches that were read from files.
    pub fn places(&self, layer: usize, head: usize) -> Option<Vec<Vec<u32>>> {
        let Layer::Layered(heads) = self.layers.get(layer)? else { return None };
        let of = heads.get(head)?;
        of.prompt.places.as_ref()?;
        let mut out = vec![];
        let mut first = SINKS as u32;
        for segment in of.segments() {
            let end = first + segment.tokens() as u32;
            let in_order: Vec<u32>;
            let mut rest = match &segment.places {
                Some(places) => &places[..],
                None => {
                    in_order = (first..end).collect();
                    &in_order
                }
            };
            for page in segment.pages.pages() {
                let (of_page, others) = rest.split_at(page.tokens());
                out.push(of_page.to_vec());
                rest = others;
            }
            first = end;
        }
        Some(out)
    }
}

fn head_info((layer, head): (usize, usize), of: &LayeredHead) -> HeadInfo {
    let mut bytes = KvBytes { lists: size_of::<LayeredHead>(), ..KvBytes::default() };
    of.count(&mut bytes);
    let read = |page: usize, tokens: usize| of.reads.share(page, tokens);
    let prompt = pages(&of.prompt.pages, read);
    let before = prompt.len();
    let mut tail = pages(&of.tail.pages, |page, tokens| read(before + page, tokens));
    tail.extend([&of.leaving, &of.window].into_iter().flat_map(|segment| pages(&segment.pages, |_, _| None)));
    let in_pages: usize = prompt.iter().chain(&tail).map(|page| page.bytes).sum();
    HeadInfo {
        layer,
        head,
        sinks: SINKS,
        dropped: of.prompt.dropped + of.tail.dropped,
        buffer: of.buffer.as_ref().map_or(0, |buffer| buffer.tokens()),
        other_bytes: bytes.total() - in_pages,
        distortion: of.distortion,
        prompt,
        tail,
    }
}

fn pages(pages: &Pages, read: impl Fn(usize, usize) -> Option<f32>) -> Vec<PageInfo> {
    let page = |(i, page): (usize, &Page)| {
        let [keys, values] = pages.escapes(i);
        let (keys, values) = (HalfInfo::new(page.keys, keys), HalfInfo::new(page.values, values));
        let header = Pages::bytes_of_page(Profile::default(), Profile::default());
        let bytes = header + keys.bytes + values.bytes;
        PageInfo { tokens: page.tokens(), keys, values, bytes, read: read(i, page.tokens()) }
    };
    pages.pages().iter().enumerate().map(page).collect()
}
