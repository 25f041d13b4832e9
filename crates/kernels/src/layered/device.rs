//! How do pages lie in a GPU's memory?
//!
//! Their bytes are the same, in another order: what lies apart of a group, a run of words of four codes for tokens, is turned such that
//! 16 bytes are what one lane of a warp multiplies (`cuda/levels.cuh`). Other lines and the escapes stay. What describes a page
//! is spread out: 8 bytes for the sketch, 32 for each tile.

use super::{Escape, LINE, Line, Page, Pages, Profile, SKETCH, TILE_TOKENS, TILES, Width};
use crate::cuda::parameters::{SketchPage, Tile};
use half::f16;

/// Bytes of pages for a GPU.
pub(crate) struct DeviceBytes {
    pub leading: Vec<u8>,
    pub lines: Vec<u8>,
    /// Token, channel, f16: four bytes each.
    pub escapes: Vec<u32>,
    pub pages: Vec<SketchPage>,
    pub tiles: Vec<Tile>,
    pub most: Most,
}

/// What pages take at most.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Most {
    /// Bytes of a tile as attention loads it, those of the runs in which what lies apart comes included.
    pub tile_bytes: usize,
    /// Runs of two lines that lie apart of a page.
    pub runs: usize,
}

impl Most {
    /// With a page of these profiles.
    pub fn with(self, keys: Profile, values: Profile) -> Most {
        let [apart, within] = keys.split(SKETCH);
        let bytes = SKETCH * 2 * LINE + (within.lines_of_tile() + values.lines_of_tile()) * LINE;
        Most { tile_bytes: self.tile_bytes.max(bytes), runs: self.runs.max(apart.lines() / 2) }
    }
}

/// Lines of a page of these profiles: those apart, and those of its tiles.
pub(crate) fn lines_of_page(keys: Profile, values: Profile) -> [usize; 2] {
    let [apart, within] = keys.split(SKETCH);
    [apart.lines(), TILES * (within.lines_of_tile() + values.lines_of_tile())]
}

/// Groups of 8, 4 and 2 bits.
pub(crate) fn counts(profile: Profile) -> [u8; 3] {
    [profile.eight, profile.four, profile.two]
}

/// Where word `word` of a group that lies apart goes: 8 words for each 4 tokens and bit, in units of 4 words.
pub(super) fn place(width: Width, word: usize) -> usize {
    let (line, token) = (word / 16, word % 16);
    let (unit, half) = (token % 8, token / 8);
    let (run, at) = match width {
        // Two lines a tile: a run of its own, first and second block.
        Width::Eight => (line / 2, line % 2 * 2 + half),
        // One line a tile, two tiles a run.
        Width::Four => (line / 2, line % 2 * 2 + half),
        // Two lines, one run.
        Width::Two => (0, line * 2 + half),
    };
    (run * 8 + unit) * 4 + at
}

/// The lines of a group in the other order.
fn turned(lines: &[Line], width: Width, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + lines.len() * LINE, 0);
    for (i, line) in lines.iter().enumerate() {
        for (j, word) in line.0.chunks_exact(4).enumerate() {
            out[start + place(width, i * 16 + j) * 4..][..4].copy_from_slice(word);
        }
    }
}

/// A group's lines out of the other order.
fn turned_back(bytes: &[u8], width: Width) -> impl Iterator<Item = Line> + '_ {
    (0..width.lines()).map(move |i| {
        let mut line = Line([0; LINE]);
        for (j, word) in line.0.chunks_exact_mut(4).enumerate() {
            word.copy_from_slice(&bytes[place(width, i * 16 + j) * 4..][..4]);
        }
        line
    })
}

/// Pages of which a GPU has the bytes: what lies apart, other lines, and escapes. Of each page profiles of keys and values and tokens are known,
/// and how many escapes its keys and its values have in each tile.
pub(crate) fn pages_of(
    head_dim: usize,
    (described, counted): (&[(Profile, Profile, usize)], &[u32]),
    [leading, lines, escapes]: [&[u8]; 3],
) -> Pages {
    let line = |bytes: &[u8]| Line(bytes.try_into().expect("a line's bytes"));
    let mut out = Pages {
        leading: Vec::with_capacity(leading.len() / LINE),
        lines: lines.chunks_exact(LINE).map(line).collect(),
        pages: Vec::with_capacity(described.len()),
        escapes: escapes.chunks_exact(4).map(escape_of).collect(),
        head_dim,
    };
    let (mut rest, mut first, mut at) = (leading, 0, 0);
    for (&(keys, values, tokens), counted) in described.iter().zip(counted.chunks_exact(2 * TILES)) {
        let [of_keys, of_values] = [0, TILES].map(|half| counted[half..half + TILES].iter().sum::<u32>());
        out.pages.push(Page {
            first,
            leading: out.leading.len() as u32,
            key_escapes: at,
            value_escapes: at + of_keys,
            keys,
            values,
            tokens: tokens as u8,
        });
        for width in keys.split(SKETCH)[0].widths() {
            let (group, after) = rest.split_at(width.lines() * LINE);
            out.leading.extend(turned_back(group, width));
            rest = after;
        }
        first += lines_of_page(keys, values)[1] as u32;
        at += of_keys + of_values;
    }
    out
}

fn escape_of(bytes: &[u8]) -> Escape {
    Escape { token: bytes[0], channel: bytes[1], rest: f16::from_le_bytes([bytes[2], bytes[3]]) }
}

/// The pages as a GPU wants them.
pub(crate) fn device_bytes(pages: &Pages) -> DeviceBytes {
    let count = pages.pages.len();
    let mut out = DeviceBytes {
        leading: Vec::with_capacity(pages.leading.len() * LINE),
        lines: pages.lines.iter().flat_map(|line| line.0).collect(),
        escapes: pages.escapes.iter().map(word_of).collect(),
        pages: Vec::with_capacity(count),
        tiles: Vec::with_capacity(count * TILES),
        most: Most::default(),
    };
    for (index, page) in pages.pages.iter().enumerate() {
        let [apart, within] = page.keys.split(SKETCH);
        let (mut rest, _) = pages.lines_of(page);
        for width in apart.widths() {
            let (group, after) = rest.split_at(width.lines());
            turned(group, width, &mut out.leading);
            rest = after;
        }
        let runs = apart.widths().enumerate().map(|(i, width)| (width.bits() as u16 / 2) << (4 * i)).sum();
        out.pages.push(SketchPage { leading: page.leading, runs, tokens: page.tokens() as u8, unused: 0 });
        let of_tile = within.lines_of_tile() + page.values.lines_of_tile();
        out.most = out.most.with(page.keys, page.values);
        let escapes = pages.escapes_of(index);
        // Of those before a tile, and in it: escapes are in order of tiles.
        let run = |of: &[Escape], tile: usize| {
            let before = |end: usize| of.partition_point(|e| usize::from(e.token) < end * TILE_TOKENS);
            (before(tile) as u32, (before(tile + 1) - before(tile)) as u16)
        };
        for tile in 0..TILES {
            let [(first_key, key_count), (first_value, value_count)] = escapes.map(|of| run(of, tile));
            out.tiles.push(Tile {
                leading: page.leading,
                lines: page.first + (tile * of_tile) as u32,
                key_escapes: page.key_escapes + first_key,
                value_escapes: page.value_escapes + first_value,
                keys: counts(page.keys),
                values: counts(page.values),
                tokens: page.tokens().saturating_sub(tile * TILE_TOKENS).min(TILE_TOKENS) as u8,
                index: tile as u8,
                key_count,
                value_count,
                unused: 0,
            });
        }
    }
    out
}

fn word_of(escape: &Escape) -> u32 {
    let rest = u32::from(escape.rest.to_bits());
    u32::from(escape.token) | u32::from(escape.channel) << 8 | rest << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_order_is_a_permutation() {
        for width in Width::ALL {
            let words = width.lines() * LINE / 4;
            let mut seen = vec![false; words];
            (0..words).for_each(|word| seen[place(width, word)] = true);
            assert!(seen.iter().all(|seen| *seen), "{width:?}");
        }
    }

    #[test]
    fn no_byte_is_lost() {
        let d = 128;
        let x: Vec<f32> = (0..64 * d).map(|i| ((i * 37 % 1001) as f32 - 500.0) / 200.0).collect();
        let mut pages = Pages::new(d);
        for (eight, four, two) in [(0, 0, 0), (1, 2, 3), (4, 4, 8), (0, 3, 13), (0, 0, 4), (16, 0, 0)] {
            let profile = Profile { eight, four, two };
            let keys = profile.paired(d / 8, SKETCH).next().unwrap();
            let values = profile.paired(d / 8, 0).next().unwrap();
            pages.push((&x, &x), (keys, values));
        }
        let bytes = device_bytes(&pages);
        let described: Vec<_> =
            pages.pages.iter().map(|page| (page.keys, page.values, page.tokens())).collect();
        let counted: Vec<u32> = bytes
            .tiles
            .chunks_exact(TILES)
            .flat_map(|tiles| {
                let of_keys = tiles.iter().map(|tile| u32::from(tile.key_count));
                of_keys.chain(tiles.iter().map(|tile| u32::from(tile.value_count)))
            })
            .collect();
        let parts = [&bytes.leading[..], &bytes.lines, bytemuck::cast_slice(&bytes.escapes)];
        let again = pages_of(d, (&described, &counted), parts);
        let saved = |pages: &Pages| {
            let mut out = vec![];
            pages.write(&mut out).unwrap();
            out
        };
        assert!(saved(&again) == saved(&pages) && again.bytes() <= pages.bytes());
        let mut old: Vec<u8> = pages.leading.iter().flat_map(|line| line.0).collect();
        let mut new = bytes.leading.clone();
        assert_ne!(old, new);
        old.sort_unstable();
        new.sort_unstable();
        assert_eq!(old, new);
        let lines: Vec<u8> = pages.lines.iter().flat_map(|line| line.0).collect();
        assert_eq!(bytes.lines, lines);
        let count: usize =
            bytes.tiles.iter().map(|t| usize::from(t.key_count) + usize::from(t.value_count)).sum();
        assert_eq!((count, bytes.escapes.len()), (pages.escapes.len(), pages.escapes.len()));
    }
}
