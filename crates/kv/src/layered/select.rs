//! Which pages and tiles does a step read in one head?

use super::LayeredHead;
use mosaickv_kernels::Isa;
use mosaickv_kernels::layered::{ALL_TILES, Needed, Pages, TILE_TOKENS, TILES, cut, wanted};
use std::fmt;
use std::str::FromStr;

/// Tokens of a head that are read at least, however little of them is needed: a sketch may be wrong.
const LEAST_TOKENS: usize = 4096;

/// One in so many tokens is read at most beyond those: where attention is flat, more of the same adds little.
const MOST: usize = 64;

/// What a decode step reads of the layered format, of heads with at least 8,192 tokens in pages; of others, all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Select {
    /// Everything.
    All,
    /// The tiles that make up this share of each query's attention, as far as their sketches tell.
    Mass(f32),
    /// The tiles of at least this many times the weight of the query's heaviest one.
    Relative(f32),
}

impl Default for Select {
    /// With at least 4,096 tokens read, the KL of a text and of needles after 7,000 tokens goes from 0.007 and 0.017 to 0.009 and
    /// 0.026 by it (SmolLM2-135M, docs/log.md).
    fn default() -> Select {
        Select::Mass(0.99)
    }
}

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Select::All => write!(f, "all"),
            Select::Mass(x) => write!(f, "mass={x}"),
            Select::Relative(x) => write!(f, "relative={x}"),
        }
    }
}

impl FromStr for Select {
    type Err = String;

    fn from_str(text: &str) -> Result<Select, String> {
        let (name, number) = text.split_once('=').unwrap_or((text, ""));
        let share = || match number.parse::<f32>() {
            Ok(x) if x > 0.0 && x < 1.0 => Ok(x),
            _ => Err(format!("{name}={number}; wanted a number between 0 and 1")),
        };
        match name {
            "all" if number.is_empty() => Ok(Select::All),
            "mass" => Ok(Select::Mass(share()?)),
            "relative" => Ok(Select::Relative(share()?)),
            _ => Err(format!("{text:?}; wanted all, mass=0.99 or relative=0.001")),
        }
    }
}

impl Select {
    /// What it asks for of a head whose pages hold `tokens` tokens; `None`: all of them are read.
    pub(crate) fn needed(self, tokens: usize) -> Option<Needed> {
        // Tiles here and there cost more a token than pages in order.
        if tokens < 2 * LEAST_TOKENS {
            return None;
        }
        match self {
            Select::All => None,
            Select::Mass(mass) => Some(Needed::Mass(mass)),
            Select::Relative(least) => Some(Needed::Relative(least)),
        }
    }
}

/// How many of `tiles` tiles are read, at least and at most.
pub(crate) fn bounds(tiles: usize) -> (usize, usize) {
    let least = LEAST_TOKENS / TILE_TOKENS;
    (least, least + tiles / MOST)
}

/// The tiles that a step reads: for each page its index in the prompt or the tail, and a bit for each tile.
#[derive(Debug, Default)]
pub(crate) struct Chosen {
    /// Of the head's segments.
    visits: [Vec<(u32, u8)>; 4],
    /// `[N]`
    wanted: Vec<f32>,
}

impl Chosen {
    /// Of each of the head's segments.
    pub(crate) fn of<'a>(&'a self, head: &'a LayeredHead) -> [(&'a Pages, &'a [(u32, u8)]); 4] {
        let segments = head.segments();
        std::array::from_fn(|i| (&segments[i].pages, &self.visits[i][..]))
    }

    /// All tiles of so many pages of each.
    pub(super) fn all(&mut self, pages: [usize; 4]) {
        for (visits, pages) in self.visits.iter_mut().zip(pages) {
            visits.clear();
            visits.extend((0..pages as u32).map(|page| (page, ALL_TILES)));
        }
    }

    /// Those of the sketched tiles that are `needed`, and all of the newest. `sketched` are the weights of the prompt's and the tail's tiles
    /// `[R, N]`, over that of what is attended to without pages.
    pub(super) fn some(
        &mut self,
        isa: Isa,
        (sketched, rows): (&[f32], usize),
        needed: Needed,
        [of_prompt, of_tail, of_leaving, of_window]: [usize; 4],
    ) {
        let tiles = (of_prompt + of_tail) * TILES;
        self.wanted.resize(tiles, 0.0);
        wanted(isa, (sketched, rows), needed, &mut self.wanted);
        let cut = cut(isa, &self.wanted, bounds(tiles));
        let [prompt, tail, newest @ ..] = &mut self.visits;
        prompt.clear();
        tail.clear();
        // Few are chosen: bits of as many pages as fit are made without a branch.
        for (i, of_pages) in self.wanted.chunks(32).enumerate() {
            let bits = of_pages.iter().enumerate().map(|(i, wanted)| u32::from(*wanted >= cut) << i);
            let mut bits = bits.fold(0, |all, bit| all | bit);
            while bits != 0 {
                let shift = bits.trailing_zeros() / TILES as u32 * TILES as u32;
                let page = (i * 32 + shift as usize) / TILES;
                let mask = (bits >> shift) as u8 & ALL_TILES;
                match page.checked_sub(of_prompt) {
                    None => prompt.push((page as u32, mask)),
                    Some(page) => tail.push((page as u32, mask)),
                }
                bits &= !(u32::from(ALL_TILES) << shift);
            }
        }
        for (visits, pages) in newest.iter_mut().zip([of_leaving, of_window]) {
            visits.clear();
            visits.extend((0..pages as u32).map(|page| (page, ALL_TILES)));
        }
    }
}
