//! The layered format: every element of a vector at 0, 2, 4 or 8 bits, most bits where most variance is.
//!
//! Vectors come in channels of falling variance, less their mean and divided by each channel's spread, so that an element
//! is a number of about unit variance. Groups of 8 neighbouring channels share a width. Since variances fall, widths do
//! too, and a page's [`Profile`] is three counts of groups: so many of 8 bits, then of 4, then of 2, the rest of none.
//! A page is up to 64 tokens, in any order, with one profile for keys and one for values: four *tiles* of 16 tokens.
//! Elements beyond a width's range are
//! *escapes*: what the code lacks is stored apart.
//!
//! Levels of 2 and 4 bits are those of Lloyd and Max for the normal distribution (Max 1960, "Quantizing for minimum
//! distortion", table I) but for rounding, 8 bits are evenly spaced. All are multiples of one unit by a number in -127..=127, so that
//! attention is a sum of products of bytes.
//!
//! **Layout.** What a tile's codes of a group are is two *blocks* of 64 codes, in the order in which attention multiplies: a
//! block of keys is 16 tokens of 4 channels (`[16, 4]`); a block of values is 8 tokens, `[2, 8, 4]`: four tokens
//! together, of 8 channels, twice. Lines have 64 bytes. With 8 bits a block is a line; with 4 bits the two blocks share one, the
//! first in the low halves; with 2 bits those of two groups do, which is why 2-bit groups come in pairs. A tile's lines lie
//! together, keys before values: what is chosen is one short stream. But the first [`SKETCH`] groups of keys lie apart, those of all
//! pages together: a sketch of all scores is one stream too. They follow each other group by group, and with 2 bits two
//! tiles share a line.

use crate::isa::Isa;
use half::f16;
use std::ops::Range;

mod attend;
mod choose;
mod credit;
pub(crate) mod device;
mod encode;
pub mod oracle;
mod queries;
mod saved;
mod score;

pub use attend::{ALL_TILES, attend_tiles};
pub use choose::{Needed, cut, wanted};
pub use credit::{Judged, credit};
pub use queries::Queries;
pub use score::{TILE_TOKENS, TILES, sketch};

/// Tokens of a page.
pub const PAGE_TOKENS: usize = 64;

/// Neighbouring channels that share a width.
pub const GROUP: usize = 8;

/// Groups of keys from which a token's score is guessed.
pub const SKETCH: usize = 4;

/// What a level's number is multiplied by, in all widths: so a query has one row of bytes, which meet narrow levels as finely as
/// wide ones.
const UNIT: f32 = 4.8 / 127.0;

/// Codes of a block, and bytes of the lines that pages are made of.
pub(crate) const LINE: usize = 64;

/// Bits of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 2 bits.
    Two,
    /// 4 bits.
    Four,
    /// 8 bits.
    Eight,
}

impl Width {
    /// From few to many bits.
    pub const ALL: [Width; 3] = [Width::Two, Width::Four, Width::Eight];

    /// Bits of an element.
    pub const fn bits(self) -> usize {
        match self {
            Width::Two => 2,
            Width::Four => 4,
            Width::Eight => 8,
        }
    }

    /// Elements of a larger magnitude are escapes.
    pub const fn range(self) -> f32 {
        match self {
            Width::Two => 3.01,
            Width::Four => 3.73,
            Width::Eight => 127.5 * UNIT,
        }
    }

    /// Mean squared error of normal numbers of unit variance, those that are escapes left out.
    pub const fn loss(self) -> f32 {
        match self {
            Width::Two => 0.109,
            Width::Four => 0.009_5,
            Width::Eight => 0.000_12,
        }
    }

    /// The numbers of the levels above 0; the others are their opposites. 8 bits have all of -127..=127.
    pub(crate) const fn levels(self) -> &'static [i8] {
        match self {
            Width::Two => &[12, 40],
            Width::Four => &[3, 10, 17, 25, 33, 43, 55, 72],
            Width::Eight => &[],
        }
    }

    /// The code of the level next to `x`: for 8 bits the level plus 128, else its rank.
    #[inline(always)]
    fn code(self, x: f32) -> u8 {
        let x = x * (1.0 / UNIT);
        let levels = self.levels();
        if levels.is_empty() {
            return (x.clamp(-127.0, 127.0).round_ties_even() + 128.0) as u8;
        }
        let mut rank = 0;
        for pair in levels.windows(2) {
            rank += u8::from(x.abs() > (f32::from(pair[0]) + f32::from(pair[1])) * 0.5);
        }
        let half = levels.len() as u8;
        if x < 0.0 { half - 1 - rank } else { half + rank }
    }

    /// The level of a code.
    #[inline(always)]
    pub(crate) const fn level(self, code: u8) -> i8 {
        let levels = self.levels();
        let half = levels.len();
        if half == 0 {
            return (code as i16 - 128) as i8;
        }
        if (code as usize) < half { -levels[half - 1 - code as usize] } else { levels[code as usize - half] }
    }

    /// Lines of a group of a page.
    const fn lines(self) -> usize {
        self.bits() * PAGE_TOKENS * GROUP / 8 / LINE
    }
}

/// Widths of a vector's groups: the first `eight` groups have 8 bits an element, the next `four` 4, the next `two` 2,
/// the others none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Profile {
    /// Groups of 8 bits an element.
    pub eight: u8,
    /// Of 4 bits.
    pub four: u8,
    /// Of 2 bits.
    pub two: u8,
}

impl Profile {
    /// Groups that have bits.
    pub fn groups(self) -> usize {
        usize::from(self.eight) + usize::from(self.four) + usize::from(self.two)
    }

    /// Bits of a vector.
    pub fn bits(self) -> usize {
        GROUP * (8 * usize::from(self.eight) + 4 * usize::from(self.four) + 2 * usize::from(self.two))
    }

    /// The widths of the groups that have bits, in order.
    pub fn widths(self) -> impl Iterator<Item = Width> {
        let runs = [(Width::Eight, self.eight), (Width::Four, self.four), (Width::Two, self.two)];
        runs.into_iter().flat_map(|(width, count)| std::iter::repeat_n(width, count.into()))
    }

    /// The first `groups` of the groups.
    #[inline]
    fn first(self, groups: usize) -> Profile {
        let eight = groups.min(self.eight.into());
        let four = (groups - eight).min(self.four.into());
        let two = (groups - eight - four).min(self.two.into());
        Profile { eight: eight as u8, four: four as u8, two: two as u8 }
    }

    /// The first `apart` groups, and the others.
    #[inline]
    fn split(self, apart: usize) -> [Profile; 2] {
        let first = self.first(apart);
        let (eight, four) = (self.eight - first.eight, self.four - first.four);
        [first, Profile { eight, four, two: self.two - first.two }]
    }

    /// Whether its groups of 2 bits come in pairs, those among the first `apart` aside: [`SKETCH`] for keys, 0 for values.
    pub fn is_paired(self, apart: usize) -> bool {
        self.split(apart)[1].two.is_multiple_of(2)
    }

    /// What can be stored in place of this profile of vectors of `groups` groups: itself if its groups of 2 bits come in pairs;
    /// else one of these less, one more, or one of 4 bits in its place, as far as that makes pairs. At least one.
    pub fn paired(self, groups: usize, apart: usize) -> impl Iterator<Item = Profile> {
        let Profile { eight, four, two } = self;
        let less = Profile { eight, four, two: two.saturating_sub(1) };
        let more = Profile { eight, four, two: two + 1 };
        let finer = Profile { eight, four: four + 1, two: two.saturating_sub(1) };
        let (all, count) = if self.is_paired(apart) { ([self; 3], 1) } else { ([less, more, finer], 3) };
        all.into_iter().take(count).filter(move |p| p.is_paired(apart) && p.groups() <= groups)
    }

    /// Lines of a page.
    #[inline]
    fn lines(self) -> usize {
        self.bits() * PAGE_TOKENS / 8 / LINE
    }

    /// Lines of a tile, of groups that lie with it.
    #[inline]
    fn lines_of_tile(self) -> usize {
        2 * usize::from(self.eight) + usize::from(self.four) + usize::from(self.two) / 2
    }
}

/// What is the same for all tokens of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Its first line among the segment's, and among those of the first groups of keys.
    first: u32,
    leading: u32,
    /// Where its keys' escapes begin among the segment's; its values' follow, up to the next page's.
    key_escapes: u32,
    value_escapes: u32,
    /// How its keys are stored.
    pub keys: Profile,
    /// How its values are stored.
    pub values: Profile,
    tokens: u8,
}

impl Page {
    /// Tokens held, at least 1.
    pub fn tokens(&self) -> usize {
        usize::from(self.tokens)
    }

    /// The tile that is not full, and the tokens in it.
    fn last_part(&self) -> Option<(usize, usize)> {
        let (tile, tokens) = (self.tokens() / TILE_TOKENS, self.tokens() % TILE_TOKENS);
        (tokens > 0).then_some((tile, tokens))
    }
}

/// An element that is beyond its width's range: what must be added to the code's level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Escape {
    pub(crate) token: u8,
    pub(crate) channel: u8,
    /// In units of the channel's spread.
    pub(crate) rest: f16,
}

/// A cache line of codes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// Pages of one layer and KV head whose channels have the same means and spreads.
#[derive(Clone, Debug)]
pub struct Pages {
    /// Of the first groups of keys.
    leading: Vec<Line>,
    /// All others.
    lines: Vec<Line>,
    pages: Vec<Page>,
    escapes: Vec<Escape>,
    head_dim: usize,
}

impl Pages {
    /// No pages, of vectors with `head_dim` channels: a multiple of 8, at most 256.
    pub fn new(head_dim: usize) -> Pages {
        assert!(
            head_dim > 0 && head_dim.is_multiple_of(GROUP) && head_dim <= 256,
            "head_dim {head_dim}, wanted a multiple of {GROUP}, at most 256"
        );
        Pages { leading: vec![], lines: vec![], pages: vec![], escapes: vec![], head_dim }
    }

    /// In the order in which they were added.
    pub fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// `D`
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Tokens of all pages.
    pub fn tokens(&self) -> usize {
        self.pages.iter().map(Page::tokens).sum()
    }

    /// Adds a page: keys and values `[n, D]`, `n` in 1..=64, in units of their channels' spread and less their means.
    pub fn push(&mut self, (keys, values): (&[f32], &[f32]), (of_keys, of_values): (Profile, Profile)) {
        let (d, tokens) = (self.head_dim, keys.len() / self.head_dim);
        assert!((1..=PAGE_TOKENS).contains(&tokens), "a page of {tokens} tokens, wanted 1 to {PAGE_TOKENS}");
        assert_eq!(
            (keys.len(), values.len()),
            (tokens * d, tokens * d),
            "keys and values not [{tokens}, {d}]"
        );
        assert!(
            of_keys.groups().max(of_values.groups()) <= d / GROUP,
            "{of_keys:?}, {of_values:?}: more than {} groups",
            d / GROUP
        );
        assert!(
            of_keys.is_paired(SKETCH) && of_values.is_paired(0),
            "{of_keys:?}, {of_values:?}: 2-bit groups that are no pairs"
        );
        let (first, leading) = (self.lines.len() as u32, self.leading.len() as u32);
        let key_escapes = self.escapes.len() as u32;
        let of_keys_codes = self.encode(keys, of_keys, key_place);
        let value_escapes = self.escapes.len() as u32;
        let of_values_codes = self.encode(values, of_values, value_place);
        let (apart, of_keys_codes) = of_keys_codes.split_at(of_keys_codes.len().min(SKETCH));
        for (width, codes) in apart {
            self.leading.extend((0..width.lines()).map(|line| pack(codes, *width, line)));
        }
        for tile in 0..TILES {
            pack_tile(of_keys_codes, tile, &mut self.lines);
            pack_tile(&of_values_codes, tile, &mut self.lines);
        }
        let (keys, values) =
            self.escapes[key_escapes as usize..].split_at_mut((value_escapes - key_escapes) as usize);
        for escapes in [keys, values] {
            escapes.sort_by_key(|escape| usize::from(escape.token) / TILE_TOKENS);
        }
        let tokens = tokens as u8;
        self.pages.push(Page {
            first,
            leading,
            key_escapes,
            value_escapes,
            keys: of_keys,
            values: of_values,
            tokens,
        });
    }

    /// Codes of the groups that have bits, in the order of the blocks; escapes are added.
    fn encode(
        &mut self,
        vectors: &[f32],
        profile: Profile,
        place: impl Fn(usize, usize) -> usize,
    ) -> Vec<(Width, Codes)> {
        let (d, isa) = (self.head_dim, Isa::current());
        let mut all = Vec::with_capacity(profile.groups());
        for (group, width) in profile.widths().enumerate() {
            // What no token fills is the level next to 0.
            let mut codes = [width.code(0.0); PAGE_TOKENS * GROUP];
            let elements = vectors.chunks_exact(d).map(|vector| &vector[group * GROUP..][..GROUP]);
            let mut of_tokens = [[0; GROUP]; PAGE_TOKENS];
            let mut beyond = encode::codes(isa, width, elements.clone(), &mut of_tokens);
            for (token, of_token) in of_tokens[..vectors.len() / d].iter().enumerate() {
                for (c, code) in of_token.iter().enumerate() {
                    codes[place(token, c)] = *code;
                }
            }
            while beyond != 0 {
                let token = beyond.trailing_zeros() as usize;
                self.escape(&vectors[token * d + group * GROUP..][..GROUP], width, (token, group * GROUP));
                beyond &= beyond - 1;
            }
            all.push((width, codes));
        }
        all
    }

    #[cold]
    fn escape(&mut self, elements: &[f32], width: Width, (token, first): (usize, usize)) {
        for (c, &x) in elements.iter().enumerate().filter(|(_, x)| x.abs() > width.range()) {
            let rest = x - f32::from(width.level(width.code(x))) * UNIT;
            let rest = f16::from_f32(rest.clamp(-65504.0, 65504.0));
            self.escapes.push(Escape { token: token as u8, channel: (first + c) as u8, rest });
        }
    }

    /// What page `index` holds: keys and values `[n, D]` in units of their channels' spread, less their means. Elements
    /// without bits are 0.
    pub fn decode(&self, index: usize) -> (Vec<f32>, Vec<f32>) {
        let page = &self.pages[index];
        let (apart, lines) = self.lines_of(page);
        let [of_apart, of_keys] = page.keys.split(SKETCH);
        let mut keys = vec![];
        let mut rest = apart;
        for width in of_apart.widths() {
            let (group, after) = rest.split_at(width.lines());
            rest = after;
            keys.push((width, unpack_group(group, width)));
        }
        // Of each tile, keys and values.
        let of_tiles: Vec<_> = lines.chunks_exact((lines.len() / TILES).max(1)).collect();
        let half = of_keys.lines_of_tile();
        let parts = |range: Range<usize>| -> Vec<&[Line]> {
            of_tiles.iter().map(|tile| &tile[range.start..range.end]).collect()
        };
        keys.extend(unpack_tiles(&parts(0..half), of_keys));
        let values = unpack_tiles(&parts(half..half + page.values.lines_of_tile()), page.values);
        let [of_keys, of_values] = self.escapes_of(index);
        let tokens = page.tokens();
        (
            self.decode_half((&keys, of_keys), tokens, key_place),
            self.decode_half((&values, of_values), tokens, value_place),
        )
    }

    fn decode_half(
        &self,
        (groups, escapes): (&[(Width, Codes)], &[Escape]),
        tokens: usize,
        place: impl Fn(usize, usize) -> usize,
    ) -> Vec<f32> {
        let d = self.head_dim;
        let mut out = vec![0.0; tokens * d];
        for (group, (width, codes)) in groups.iter().enumerate() {
            let mut levels = [0.0; 256];
            for (code, level) in levels.iter_mut().take(1 << width.bits()).enumerate() {
                *level = f32::from(width.level(code as u8)) * UNIT;
            }
            for (token, vector) in out.chunks_exact_mut(d).enumerate() {
                for (c, x) in vector[group * GROUP..][..GROUP].iter_mut().enumerate() {
                    *x = levels[usize::from(codes[place(token, c)])];
                }
            }
        }
        for escape in escapes {
            out[usize::from(escape.token) * d + usize::from(escape.channel)] += escape.rest.to_f32();
        }
        out
    }

    /// The lines of a page: those apart, and those of its tiles.
    #[inline]
    fn lines_of(&self, page: &Page) -> (&[Line], &[Line]) {
        let [apart, keys] = page.keys.split(SKETCH);
        let lines = TILES * (keys.lines_of_tile() + page.values.lines_of_tile());
        (&self.leading[page.leading as usize..][..apart.lines()], &self.lines[page.first as usize..][..lines])
    }

    /// Of the keys and of the values of page `index`.
    fn escapes_of(&self, index: usize) -> [&[Escape]; 2] {
        let page = &self.pages[index];
        let end = self.pages.get(index + 1).map_or(self.escapes.len(), |next| next.key_escapes as usize);
        let (keys, values) = (page.key_escapes as usize, page.value_escapes as usize);
        [&self.escapes[keys..values], &self.escapes[values..end]]
    }

    /// Escapes among the keys and among the values of page `index`.
    pub fn escapes(&self, index: usize) -> [usize; 2] {
        self.escapes_of(index).map(<[Escape]>::len)
    }

    /// Takes the last page away: what it held, as [`decode`](Pages::decode) gives it.
    pub fn pop(&mut self) -> Option<(Vec<f32>, Vec<f32>)> {
        let last = self.pages.len().checked_sub(1)?;
        let decoded = self.decode(last);
        let page = self.pages.pop()?;
        self.leading.truncate(page.leading as usize);
        self.lines.truncate(page.first as usize);
        self.escapes.truncate(page.key_escapes as usize);
        Some(decoded)
    }

    /// Takes the first `count` pages away, as pages of their own.
    pub fn split_first(&mut self, count: usize) -> Pages {
        let end =
            |of: fn(&Page) -> u32, all: usize| self.pages.get(count).map_or(all, |next| of(next) as usize);
        let leading = end(|page| page.leading, self.leading.len());
        let lines = end(|page| page.first, self.lines.len());
        let escapes = end(|page| page.key_escapes, self.escapes.len());
        let first = Pages {
            leading: self.leading.drain(..leading).collect(),
            lines: self.lines.drain(..lines).collect(),
            pages: self.pages.drain(..count).collect(),
            escapes: self.escapes.drain(..escapes).collect(),
            head_dim: self.head_dim,
        };
        for page in &mut self.pages {
            page.leading -= leading as u32;
            page.first -= lines as u32;
            page.key_escapes -= escapes as u32;
            page.value_escapes -= escapes as u32;
        }
        first
    }

    /// A copy of the pages from `first` on.
    pub fn after(&self, first: usize) -> Pages {
        let Some(page) = self.pages.get(first) else { return Pages::new(self.head_dim) };
        let Page { leading, first: lines, key_escapes: escapes, .. } = *page;
        let of_page = |page: &Page| Page {
            leading: page.leading - leading,
            first: page.first - lines,
            key_escapes: page.key_escapes - escapes,
            value_escapes: page.value_escapes - escapes,
            ..*page
        };
        Pages {
            leading: self.leading[leading as usize..].to_vec(),
            lines: self.lines[lines as usize..].to_vec(),
            pages: self.pages[first..].iter().map(of_page).collect(),
            escapes: self.escapes[escapes as usize..].to_vec(),
            head_dim: self.head_dim,
        }
    }

    /// Adds the pages of `others`, of vectors with as many channels, after these.
    pub fn append(&mut self, others: &Pages) {
        assert_eq!(self.head_dim, others.head_dim, "pages of vectors with another number of channels");
        let (leading, lines) = (self.leading.len() as u32, self.lines.len() as u32);
        let escapes = self.escapes.len() as u32;
        self.leading.extend_from_slice(&others.leading);
        self.lines.extend_from_slice(&others.lines);
        self.escapes.extend_from_slice(&others.escapes);
        self.pages.extend(others.pages.iter().map(|page| Page {
            leading: page.leading + leading,
            first: page.first + lines,
            key_escapes: page.key_escapes + escapes,
            value_escapes: page.value_escapes + escapes,
            ..*page
        }));
    }

    /// Gives back what was allocated for further pages.
    pub fn shrink(&mut self) {
        self.leading.shrink_to_fit();
        self.lines.shrink_to_fit();
        self.pages.shrink_to_fit();
        self.escapes.shrink_to_fit();
    }

    /// Bytes allocated, without this header.
    pub fn bytes(&self) -> usize {
        (self.leading.capacity() + self.lines.capacity()) * size_of::<Line>()
            + self.pages.capacity() * size_of::<Page>()
            + self.escapes.capacity() * size_of::<Escape>()
    }

    /// Bytes that a page takes whose escapes are not counted.
    pub fn bytes_of_page(keys: Profile, values: Profile) -> usize {
        (keys.lines() + values.lines()) * size_of::<Line>() + size_of::<Page>()
    }

    /// Bytes of an escape.
    pub const BYTES_OF_ESCAPE: usize = size_of::<Escape>();
}

/// Where channel `c` of the group's key of `token` is among the group's codes.
#[inline(always)]
fn key_place(token: usize, c: usize) -> usize {
    (token / 16 * 2 + c / 4) * LINE + token % 16 * 4 + c % 4
}

/// The same of values.
#[inline(always)]
fn value_place(token: usize, c: usize) -> usize {
    token / 8 * LINE + (token / 4 % 2 * GROUP + c) * 4 + token % 4
}

/// Codes of a group of a page.
type Codes = [u8; PAGE_TOKENS * GROUP];

/// Line `line` of a group that lies apart.
fn pack(codes: &Codes, width: Width, line: usize) -> Line {
    let shared = 8 / width.bits();
    let blocks = &codes[line * shared * LINE..][..shared * LINE];
    let mut out = [0; LINE];
    for (i, block) in blocks.chunks_exact(LINE).enumerate() {
        out.iter_mut().zip(block).for_each(|(byte, code)| *byte |= code << (i * width.bits()));
    }
    Line(out)
}

/// The reverse: the codes of a group from its lines.
fn unpack_group(lines: &[Line], width: Width) -> Codes {
    let (shared, mask) = (8 / width.bits(), (u16::pow(2, width.bits() as u32) - 1) as u8);
    std::array::from_fn(|i| {
        let block = i / LINE;
        lines[block / shared].0[i % LINE] >> (block % shared * width.bits()) & mask
    })
}

/// The lines of a tile of groups that lie with it, those of 2 bits in pairs.
fn pack_tile(groups: &[(Width, Codes)], tile: usize, out: &mut Vec<Line>) {
    let block = |codes: &Codes, block: usize| -> [u8; LINE] {
        codes[(2 * tile + block) * LINE..][..LINE].try_into().expect("a block")
    };
    let mut rest = groups;
    while let [(width, codes), after @ ..] = rest {
        rest = after;
        let [first, second] = [block(codes, 0), block(codes, 1)];
        match width {
            Width::Eight => out.extend([Line(first), Line(second)]),
            Width::Four => out.push(Line(std::array::from_fn(|i| first[i] | second[i] << 4))),
            Width::Two => {
                let [(_, codes), after @ ..] = rest else { unreachable!("2-bit groups come in pairs") };
                rest = after;
                let [third, fourth] = [block(codes, 0), block(codes, 1)];
                out.push(Line(std::array::from_fn(|i| {
                    first[i] | second[i] << 2 | third[i] << 4 | fourth[i] << 6
                })));
            }
        }
    }
}

/// The reverse: the codes of groups of `profile` from the lines of all tiles.
fn unpack_tiles(tiles: &[&[Line]], profile: Profile) -> Vec<(Width, Codes)> {
    let mut groups: Vec<(Width, Codes)> =
        profile.widths().map(|width| (width, [0; PAGE_TOKENS * GROUP])).collect();
    for (tile, lines) in tiles.iter().enumerate() {
        let (mut at, mut shift) = (0, 0);
        for (width, codes) in &mut groups {
            let blocks = codes[2 * tile * LINE..][..2 * LINE].chunks_exact_mut(LINE);
            for block in blocks {
                let mask = (u16::pow(2, width.bits() as u32) - 1) as u8;
                block.iter_mut().zip(&lines[at].0).for_each(|(code, byte)| *code = byte >> shift & mask);
                shift += width.bits();
                (at, shift) = (at + shift / 8, shift % 8);
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    /// About normal: sums of twelve even numbers.
    pub(super) fn normal(seed: u64, len: usize) -> Vec<f32> {
        let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = move || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..len).map(|_| (0..12).map(|_| next()).sum::<f32>() - 6.0).collect()
    }

    /// Profiles of keys and values that can be stored, like those given.
    pub(super) fn storable(d: usize, (keys, values): (Profile, Profile)) -> (Profile, Profile) {
        let like = |profile: Profile, apart| profile.paired(d / GROUP, apart).next().unwrap();
        (like(keys, SKETCH), like(values, 0))
    }

    const PROFILES: [Profile; 6] = [
        Profile { eight: 0, four: 0, two: 0 },
        Profile { eight: 8, four: 0, two: 0 },
        Profile { eight: 0, four: 8, two: 0 },
        Profile { eight: 0, four: 0, two: 8 },
        Profile { eight: 1, four: 2, two: 3 },
        Profile { eight: 0, four: 2, two: 4 },
    ];

    #[test]
    fn decode_gives_back_the_nearest_level_and_all_of_an_escape() {
        let d = 64;
        for (i, &of_keys) in PROFILES.iter().enumerate() {
            for (j, &of_values) in PROFILES.iter().enumerate() {
                for tokens in [1, 17, 63, 64] {
                    let (mut keys, values) =
                        (normal(1 + i as u64, tokens * d), normal(9 + j as u64, tokens * d));
                    keys[3] = 25.0;
                    keys[(tokens - 1) * d + 9] = -11.0;
                    let mut pages = Pages::new(d);
                    pages.push((&values, &keys), storable(d, (of_values, of_keys)));
                    let (of_keys, of_values) = storable(d, (of_keys, of_values));
                    pages.push((&keys, &values), (of_keys, of_values));
                    pages.shrink();
                    let (k, v) = pages.decode(1);
                    for (x, got, profile) in [(&keys, &k, of_keys), (&values, &v, of_values)] {
                        let widths: Vec<_> = profile.widths().collect();
                        for (at, (x, got)) in x.iter().zip(got.iter()).enumerate() {
                            let Some(width) = widths.get(at % d / GROUP) else {
                                assert_eq!(*got, 0.0);
                                continue;
                            };
                            let nearest = (-127..=127)
                                .filter(|&level| {
                                    *width == Width::Eight || width.levels().contains(&i8::abs(level))
                                })
                                .map(|level| f32::from(level) * UNIT)
                                .min_by(|a, b| (a - x).abs().total_cmp(&(b - x).abs()))
                                .unwrap();
                            let want = if x.abs() > width.range() { *x } else { nearest };
                            assert!(
                                (got - want).abs() <= 1e-4 + x.abs() / 2048.0,
                                "{x}: {got}, wanted {want}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn pages_that_are_taken_away_or_come_back_are_as_they_were() {
        let d = 64;
        let mut pages = Pages::new(d);
        for (i, profile) in PROFILES[1..].iter().copied().enumerate() {
            let mut x = normal(i as u64, (40 + i) * d);
            x[5] = 9.0;
            pages.push((&x, &x), storable(d, (profile, PROFILES[5 - i])));
        }
        let decoded = |pages: &Pages| -> Vec<(Vec<f32>, Vec<f32>)> {
            (0..pages.pages().len()).map(|index| pages.decode(index)).collect()
        };
        let before = decoded(&pages);
        assert_eq!(pages.split_first(0).tokens(), 0);
        let first = pages.split_first(2);
        assert_eq!((decoded(&first), decoded(&pages)), (before[..2].to_vec(), before[2..].to_vec()));
        let mut all = first.clone();
        all.append(&pages);
        assert_eq!(decoded(&all), before);
        assert_eq!(pages.pop().as_ref(), before.last());
        assert_eq!(decoded(&pages.split_first(2)), before[2..4]);
        pages.shrink();
        assert_eq!((pages.tokens(), pages.bytes()), (0, 0));
        pages.append(&first);
        assert_eq!(decoded(&pages), before[..2]);
    }

    #[test]
    fn losses_and_bytes_are_those_stated() {
        let d = 64;
        let x = normal(5, 64 * d);
        for (width, profile) in
            [(Width::Two, PROFILES[3]), (Width::Four, PROFILES[2]), (Width::Eight, PROFILES[1])]
        {
            let mut pages = Pages::new(d);
            pages.push((&x, &x), (profile, profile));
            let (keys, _) = pages.decode(0);
            let loss =
                keys.iter().zip(&x).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / x.len() as f64;
            assert!((loss / f64::from(width.loss()) - 1.0).abs() < 0.1, "{width:?}: {loss}");
            pages.shrink();
            let escapes = pages.escapes.len() * Pages::BYTES_OF_ESCAPE;
            assert_eq!(pages.bytes(), Pages::bytes_of_page(profile, profile) + escapes);
            assert_eq!(pages.bytes() - escapes - size_of::<Page>(), 64 * 2 * d * width.bits() / 8);
        }
    }

    #[test]
    fn profiles_have_pairs_of_two_bits_like_them() {
        for groups in [1, 2, 5, 8, 16] {
            for (apart, (eight, four, two)) in [0, SKETCH].into_iter().flat_map(|apart| {
                let counts = move |i: u8| (i / 36 % 6, i / 6 % 6, i % 6);
                (0..216).map(move |i| (apart, counts(i)))
            }) {
                let profile = Profile { eight, four, two };
                if profile.groups() > groups {
                    continue;
                }
                let like: Vec<Profile> = profile.paired(groups, apart).collect();
                assert!(!like.is_empty() && like.iter().all(|p| p.is_paired(apart) && p.groups() <= groups));
                assert!(
                    like.iter().all(|p| p.bits().abs_diff(profile.bits()) <= 2 * GROUP),
                    "{profile:?}: {like:?}"
                );
                assert_eq!(like.contains(&profile), profile.is_paired(apart));
            }
        }
    }

    #[test]
    fn same_vectors_give_the_same_bytes() {
        let x = normal(3, 64 * 32);
        let make = || {
            let mut pages = Pages::new(32);
            let profile = Profile { eight: 1, four: 1, two: 2 };
            pages.push((&x, &x), (profile, profile));
            pages.leading.iter().chain(&pages.lines).flat_map(|line| line.0).collect::<Vec<u8>>()
        };
        assert_eq!(make(), make());
    }
}
