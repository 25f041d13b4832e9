//! A head whose pages grow while it is read from: what may be left out stays where it is, and what follows is written anew.

use super::{Head, Scales};
use crate::cuda::device::{Buffer, Error, Gpu};
use crate::layered::device::{device_bytes, lines_of_page};
use crate::layered::{LINE, Pages, TILES};
use std::mem::size_of_val;

/// One KV head of one sequence.
#[derive(Debug)]
pub struct Growing {
    gpu: Gpu,
    head: Head,
    /// Lines that lie apart, other lines and escapes of the pages that may be left out.
    kept: [usize; 3],
}

impl Growing {
    /// Of these pages so many times, each time with memory of its own: once, but for measurements. All of them may be left out.
    pub fn new(gpu: &Gpu, (pages, times): (&Pages, usize), scales: &Scales) -> Result<Growing, Error> {
        let head = Head::repeated(gpu, (pages, times), pages.pages().len() * times, scales)?;
        let escapes = (0..pages.pages().len()).flat_map(|index| pages.escapes(index)).sum::<usize>();
        let [leading, lines] = pages.pages().iter().fold([0, 0], |[leading, lines], page| {
            let [of_leading, of_lines] = lines_of_page(page.keys, page.values);
            [leading + of_leading, lines + of_lines]
        });
        Ok(Growing { gpu: gpu.clone(), head, kept: [leading, lines, escapes].map(|count| count * times) })
    }

    /// As steps read it.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Bytes in the device's memory.
    pub fn bytes(&self) -> usize {
        self.head.bytes().iter().sum()
    }

    /// Adds pages that may be left out after those that there are, and has `newest`, which are always read, in place of those before.
    pub fn grow(&mut self, more: &Pages, newest: &Pages) -> Result<(), Error> {
        let mut all = more.clone();
        all.append(newest);
        let mut bytes = device_bytes(&all);
        let [leading, lines, escapes] = self.kept.map(|kept| kept as u32);
        for page in &mut bytes.pages {
            page.leading += leading;
        }
        for tile in &mut bytes.tiles {
            tile.leading += leading;
            tile.lines += lines;
            tile.key_escapes += escapes;
            tile.value_escapes += escapes;
        }
        let [of_leading, of_lines, of_escapes] = self.kept;
        let (gpu, pages, head) = (&self.gpu, self.head.selectable, &mut self.head);
        write(gpu, &mut head.leading, of_leading * LINE, &bytes.leading)?;
        write(gpu, &mut head.lines, of_lines * LINE, &bytes.lines)?;
        write(gpu, &mut head.escapes, of_escapes * 4, bytemuck::cast_slice(&bytes.escapes))?;
        write(gpu, &mut head.pages, pages * 8, bytemuck::cast_slice(&bytes.pages))?;
        write(gpu, &mut head.tiles, pages * TILES * 32, bytemuck::cast_slice(&bytes.tiles))?;
        let count = more.pages().len();
        let ends = [of_leading + bytes.leading.len() / LINE, of_lines + bytes.lines.len() / LINE, of_escapes + bytes.escapes.len()];
        assert!(ends.iter().all(|end| *end <= u32::MAX as usize), "too many lines: {ends:?}");
        // Where the pages after those begin.
        self.kept = bytes.tiles.get(count * TILES).map_or(ends, |tile| [tile.leading, tile.lines, tile.key_escapes].map(|x| x as usize));
        head.selectable = pages + count;
        head.page_count = pages + all.pages().len();
        head.most_bytes = head.most_bytes.max(bytes.most);
        Ok(())
    }
}

/// Writes bytes at `at`; where there is no room, to a larger buffer with what was before them.
fn write(gpu: &Gpu, buffer: &mut Buffer, at: usize, bytes: &[u8]) -> Result<(), Error> {
    let needed = at + size_of_val(bytes);
    if needed > buffer.bytes() {
        let larger = gpu.alloc(needed + needed / 16)?;
        if at > 0 {
            larger.copy_from(0, (buffer, 0), at)?;
        }
        *buffer = larger;
    }
    buffer.write(at, bytes)
}
