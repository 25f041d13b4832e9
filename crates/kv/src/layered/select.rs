//! Which pages and tiles does a step read in one head?

use super::LayeredHead;
use mosaickv_kernels::Isa;
use mosaickv_kernels::layered::{ALL_TILES, Needed, Pages, TILE_TOKENS, TILES, cut, wanted};
use std::fmt;
use std::str::FromStr;

/// Tokens of a head that are read at least, however little of them is needed: a sketch may be wrong.
const LEAST_TOKENS: usize = 4096;

/// One tile in so many is read at most beyond those, of all that can be chosen: where attention is flat, more of the same adds
/// little.
const ONE_IN: usize = 64;

/// The least relative weight that can be asked for: how much more than needed a tile is wanted goes up to one over it, and the
/// cut that leaves no more than may be read is searched up to 2^60.
const LEAST_RELATIVE: f32 = 1e-15;

/// What a decode step reads of the layered format, of heads with at least 8,192 tokens in pages; of others, all. Of the prompt and
/// what has left the window it is 4,096 tokens at least, and at most those and a 64th of all tokens there, to a thousandth of the
/// weight at which is cut; what is newer is always read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Select {
    /// Everything.
    All,
    /// The tiles that make up this share of each query's attention, as far as their sketches tell.
    Mass(f32),
    /// The tiles of at least this many times the weight of the query's heaviest one, from 1e-15 on.
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
        let share =
            || number.parse().map_err(|_| format!("{name}={number}; wanted a number between 0 and 1"));
        let select = match name {
            "all" if number.is_empty() => Select::All,
            "mass" => Select::Mass(share()?),
            "relative" => Select::Relative(share()?),
            _ => return Err(format!("{text:?}; wanted all, mass=0.99 or relative=0.001")),
        };
        select.check()?;
        Ok(select)
    }
}

impl Select {
    /// Whether it is one that can be had.
    pub(crate) fn check(self) -> Result<(), String> {
        match self {
            Select::Mass(x) | Select::Relative(x) if !(x > 0.0 && x < 1.0) => {
                Err(format!("{self}; wanted a number between 0 and 1"))
            }
            Select::Relative(x) if x < LEAST_RELATIVE => {
                Err(format!("{self}; wanted at least {LEAST_RELATIVE:e}, or mass=0.99"))
            }
            _ => Ok(()),
        }
    }

    /// What it asks for of a head whose pages hold `tokens` tokens; `None`: all of them are read.
    pub(crate) fn needed(self, tokens: usize) -> Option<Needed> {
        // Tiles here and there cost more a token than pages in order.
        if tokens < 2 * LEAST_TOKENS { None } else { self.asked() }
    }

    /// The same of a head with enough tokens.
    pub(crate) fn asked(self) -> Option<Needed> {
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
    (least, least + tiles / ONE_IN)
}

/// How often steps read the pages that they may leave out.
#[derive(Clone, Debug, Default)]
pub(crate) struct PageReads {
    /// Steps that selected.
    steps: u32,
    /// Of each page of the prompt, then of the tail.
    pages: Vec<PageRead>,
}

/// How often a page was read.
#[derive(Clone, Copy, Debug)]
struct PageRead {
    /// Its tiles, added up over steps.
    tiles: u32,
    /// Steps that had selected before it came.
    since: u32,
}

impl PageReads {
    /// The share of its tokens that a step read, as far as steps selected: of a page of so many tokens by its index among those of the
    /// prompt and the tail.
    pub(crate) fn share(&self, page: usize, tokens: usize) -> Option<f32> {
        let PageRead { tiles, since } = *self.pages.get(page)?;
        let could = (self.steps - since) as usize * tokens.div_ceil(TILE_TOKENS);
        (could > 0).then(|| tiles as f32 / could as f32)
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        self.pages.capacity() * size_of::<PageRead>()
    }

    /// A step that selected these, of so many pages of the prompt and of the tail.
    fn add(&mut self, chosen: &Chosen, [of_prompt, of_tail]: [usize; 2]) {
        self.pages.resize(of_prompt + of_tail, PageRead { tiles: 0, since: self.steps });
        self.steps = self.steps.saturating_add(1);
        let (prompt, tail) = self.pages.split_at_mut(of_prompt);
        for (pages, visits) in [prompt, tail].into_iter().zip(&chosen.visits) {
            for (page, read) in visits {
                let tiles = &mut pages[*page as usize].tiles;
                *tiles = tiles.saturating_add(read.count_ones());
            }
        }
    }
}

impl LayeredHead {
    /// Counts what a step has read, after it.
    pub(crate) fn count_reads(&mut self, chosen: &Chosen) {
        if self.settings.select.needed(self.in_pages()).is_some() {
            let pages = [&self.prompt, &self.tail].map(|segment| segment.pages.pages().len());
            self.reads.add(chosen, pages);
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_search_finds_is_refused() {
        for text in ["all", "mass=0.99", "relative=0.001", "relative=1e-15"] {
            let select: Select = text.parse().unwrap();
            assert_eq!(select.to_string().parse(), Ok(select), "{text}");
        }
        for (text, says) in [
            ("relative=1e-16", "wanted at least 1e-15"),
            ("relative=1e-30", "wanted at least 1e-15"),
            ("relative=0", "relative=0; wanted a number between 0 and 1"),
            ("relative=NaN", "wanted a number between 0 and 1"),
            ("mass=1", "mass=1; wanted a number between 0 and 1"),
            ("mass=", "mass=; wanted a number between 0 and 1"),
            ("all=1", "wanted all, mass=0.99"),
        ] {
            let error = text.parse::<Select>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    /// Also of tiles that are wanted as much more than needed as can be.
    #[test]
    fn no_more_than_the_most_is_read() {
        let tiles = 10_000;
        let weights: Vec<f32> = (0..tiles).map(|i| 1.0 / (1.0 + (i * 37 % tiles) as f32)).collect();
        for needed in [Needed::Relative(LEAST_RELATIVE), Needed::Mass(0.999_999_9), Needed::Mass(0.5)] {
            let mut chosen = Chosen::default();
            chosen.some(Isa::current(), (&weights, 1), needed, [tiles / TILES, 0, 0, 1]);
            let count: u32 = chosen.visits[..2].iter().flatten().map(|(_, tiles)| tiles.count_ones()).sum();
            let (least, most) = bounds(tiles);
            assert!(
                (least as u32..=most as u32).contains(&count),
                "{needed:?}: {count} of {least} to {most}"
            );
            assert_eq!(chosen.visits[3], [(0, ALL_TILES)]);
        }
    }
}
