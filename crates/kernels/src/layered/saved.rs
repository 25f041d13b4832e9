//! Layered pages as they are written down. Where a page's lines and escapes lie follows from the profiles, so it is not written and can't be
//! wrong.

use super::{Escape, GROUP, LINE, Line, PAGE_TOKENS, Page, Pages, Profile, SKETCH, TILE_TOKENS, TILES};
use crate::saved::{Input, Malformed, write_count, write_numbers};
use half::f16;
use std::io::{self, Write};

impl Profile {
    /// Its counts of groups, of 8, 4 and 2 bits.
    pub fn counts(self) -> [u8; 3] {
        [self.eight, self.four, self.two]
    }

    /// The profile of these counts, of vectors of `head_dim` channels, whose first `apart` groups lie apart.
    pub fn from_counts(counts: [u8; 3], head_dim: usize, apart: usize) -> Result<Profile, Malformed> {
        let [eight, four, two] = counts;
        let profile = Profile { eight, four, two };
        let fits = profile.groups() <= head_dim / GROUP && profile.is_paired(apart);
        Malformed::unless(fits, || format!("{profile:?} of vectors with {head_dim} channels"))?;
        Ok(profile)
    }
}

impl Pages {
    /// Writes the pages down, for [`read`](Pages::read).
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        write_count(out, self.pages.len())?;
        for (index, page) in self.pages.iter().enumerate() {
            write_numbers(out, &page.keys.counts())?;
            write_numbers(out, &page.values.counts())?;
            write_numbers(out, &[page.tokens])?;
            for count in self.escapes(index) {
                write_count(out, count)?;
            }
        }
        for line in self.leading.iter().chain(&self.lines) {
            write_numbers(out, &line.0)?;
        }
        for escape in &self.escapes {
            write_numbers(out, &[escape.token, escape.channel])?;
            write_numbers(out, &[escape.rest])?;
        }
        Ok(())
    }

    /// Pages that were written down, of vectors of `head_dim` channels: a multiple of 8, at most 256.
    pub fn read(input: &mut Input, head_dim: usize) -> Result<Pages, Malformed> {
        let mut pages = Pages::new(head_dim);
        let count = input.count()?;
        // Each takes 23 bytes here.
        Malformed::unless(count <= input.left() / 23, || format!("{count} pages in {} bytes", input.left()))?;
        pages.pages.reserve_exact(count);
        let (mut leading, mut lines, mut escapes) = (0, 0, 0);
        for index in 0..count {
            let keys = Profile::from_counts(input.number()?, head_dim, SKETCH)?;
            let values = Profile::from_counts(input.number()?, head_dim, 0)?;
            let tokens: u8 = input.number()?;
            let fits = (1..=PAGE_TOKENS).contains(&tokens.into());
            Malformed::unless(fits, || format!("page {index} of {tokens} tokens"))?;
            let (of_keys, of_values) = (input.count()?, input.count()?);
            let most = usize::from(tokens) * head_dim;
            let fits = of_keys <= most && of_values <= most;
            Malformed::unless(fits, || format!("page {index}: {of_keys} and {of_values} escapes"))?;
            pages.pages.push(Page {
                first: place(lines)?,
                leading: place(leading)?,
                key_escapes: place(escapes)?,
                value_escapes: place(escapes + of_keys)?,
                keys,
                values,
                tokens,
            });
            let [apart, others] = keys.split(SKETCH);
            leading += apart.lines();
            lines += TILES * (others.lines_of_tile() + values.lines_of_tile());
            escapes += of_keys + of_values;
        }
        place(lines.max(leading).max(escapes))?;
        pages.leading = read_lines(input, leading)?;
        pages.lines = read_lines(input, lines)?;
        // Each takes 4 bytes.
        let room = escapes <= input.left() / 4;
        Malformed::unless(room, || format!("{escapes} escapes in {} bytes", input.left()))?;
        pages.escapes.reserve_exact(escapes);
        for _ in 0..escapes {
            let [token, channel] = input.number()?;
            let rest: f16 = input.number()?;
            Malformed::unless(rest.is_finite(), || "an escape that is not finite".into())?;
            pages.escapes.push(Escape { token, channel, rest });
        }
        (0..count).try_for_each(|index| pages.check_escapes(index))?;
        Ok(pages)
    }

    /// Kernels write where an escape says, and find those of a tile by their order.
    fn check_escapes(&self, index: usize) -> Result<(), Malformed> {
        let page = &self.pages[index];
        for escapes in self.escapes_of(index) {
            let inside = |escape: &Escape| {
                usize::from(escape.token) < page.tokens() && usize::from(escape.channel) < self.head_dim
            };
            let in_order = escapes.is_sorted_by_key(|escape| usize::from(escape.token) / TILE_TOKENS);
            Malformed::unless(in_order && escapes.iter().all(inside), || {
                format!("page {index}: escapes of other tokens or channels, or in another order")
            })?;
        }
        Ok(())
    }
}

fn place(at: usize) -> Result<u32, Malformed> {
    u32::try_from(at).map_err(|_| Malformed(format!("{at} lines or escapes in one head")))
}

fn read_lines(input: &mut Input, count: usize) -> Result<Vec<Line>, Malformed> {
    // Before anything is allocated.
    let room = count <= input.left() / LINE;
    Malformed::unless(room, || format!("{count} lines in {} bytes", input.left()))?;
    let mut lines = Vec::with_capacity(count);
    for _ in 0..count {
        lines.push(Line(input.number()?));
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Pages {
        let mut pages = Pages::new(32);
        let number = |i: usize| (i * 37 % 61) as f32 / 15.0 - 2.0;
        for (tokens, two) in [(64, 2), (64, 0), (17, 2)] {
            let (keys, values): (Vec<f32>, Vec<f32>) = (0..tokens * 32)
                .map(|i| (number(i) * if i % 97 == 0 { 5.0 } else { 1.0 }, number(i * 3 + 1)))
                .unzip();
            let profile = Profile { eight: 1, four: 1, two };
            pages.push((&keys, &values), (profile, Profile { eight: 0, four: 2, two }));
        }
        pages.shrink();
        pages
    }

    #[test]
    fn pages_come_back_as_they_were() {
        let pages = some();
        let mut bytes = vec![];
        pages.write(&mut bytes).unwrap();
        let mut input = Input::new(&bytes);
        let back = Pages::read(&mut input, 32).unwrap();
        assert_eq!(input.left(), 0);
        assert!(pages.escapes(0)[0] > 0, "no escapes to be written");
        assert_eq!((back.pages(), back.bytes()), (pages.pages(), pages.bytes()));
        for index in 0..3 {
            assert_eq!(back.decode(index), pages.decode(index));
            assert_eq!(back.escapes(index), pages.escapes(index));
        }
    }

    /// Any byte changed, or any number of them missing: an error, or pages that can be decoded.
    #[test]
    fn damaged_bytes_are_refused_or_harmless() {
        let mut bytes = vec![];
        some().write(&mut bytes).unwrap();
        for cut in 0..bytes.len().min(400) {
            assert!(Pages::read(&mut Input::new(&bytes[..cut]), 32).is_err());
        }
        let mut refused = 0;
        for at in (0..200).chain(bytes.len() - 200..bytes.len()) {
            for value in [0, 1, 7, 255] {
                let mut changed = bytes.clone();
                changed[at] = value;
                match Pages::read(&mut Input::new(&changed), 32) {
                    Ok(pages) => (0..pages.pages().len()).for_each(|index| drop(pages.decode(index))),
                    Err(_) => refused += 1,
                }
            }
        }
        assert!(refused > 100, "only {refused} were refused");
    }
}
