//! A head whose pages grow while it is read from: what may be left out stays where it is, and what follows is written anew.

use super::{Head, Scales};
use crate::cuda::aside::Part;
use crate::cuda::device::{Buffer, Error, Gpu};
use crate::layered::device::{device_bytes, lines_of_page};
use crate::layered::{LINE, Pages, TILES};

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

    /// Of a head whose pages may all be left out, with so many lines that lie apart, other lines and escapes, and which nobody works on any more.
    pub(crate) fn of(gpu: &Gpu, mut head: Head, kept: [usize; 3]) -> Growing {
        head.pass_to(gpu);
        Growing { gpu: gpu.clone(), head, kept }
    }

    /// As steps read it.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Bytes in the device's memory.
    pub fn bytes(&self) -> usize {
        self.head.bytes().iter().sum()
    }

    /// Makes room for pages that may be left out after those that there are, and for `newest`, which are always read, in place of those before.
    /// Until what is returned is [written](Growing::parts) its head is not to be read.
    pub fn grow(&mut self, more: &Pages, newest: &Pages) -> Result<Grown, Error> {
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
        let ends = [
            of_leading + bytes.leading.len() / LINE,
            of_lines + bytes.lines.len() / LINE,
            of_escapes + bytes.escapes.len(),
        ];
        assert!(ends.iter().all(|end| *end <= u32::MAX as usize), "too many lines: {ends:?}");
        // Where the pages after those that may be left out begin.
        let next = bytes.tiles.get(more.pages().len() * TILES);
        self.kept =
            next.map_or(ends, |tile| [tile.leading, tile.lines, tile.key_escapes].map(|x| x as usize));
        let head = &mut self.head;
        let pages = head.selectable;
        let grown = Grown([
            (of_leading * LINE, bytes.leading),
            (of_lines * LINE, bytes.lines),
            (of_escapes * 4, bytemuck::cast_slice(&bytes.escapes).to_vec()),
            (pages * 8, bytemuck::cast_slice(&bytes.pages).to_vec()),
            (pages * TILES * 32, bytemuck::cast_slice(&bytes.tiles).to_vec()),
        ]);
        head.selectable = pages + more.pages().len();
        head.page_count = pages + all.pages().len();
        head.most = all.pages().iter().fold(head.most, |most, page| most.with(page.keys, page.values));
        let buffers =
            [&mut head.leading, &mut head.lines, &mut head.escapes, &mut head.pages, &mut head.tiles];
        for (buffer, (at, bytes)) in buffers.into_iter().zip(&grown.0) {
            make_room(&self.gpu, buffer, (*at, bytes.len()))?;
        }
        Ok(grown)
    }

    /// Where what it grew by is to be written.
    pub fn parts(&self, grown: &Grown) -> [Part<'_>; 5] {
        let buffers = self.head.parts();
        std::array::from_fn(|i| (buffers[i], grown.0[i].0, grown.0[i].1.len()))
    }
}

/// What a head grew by.
#[derive(Debug)]
pub struct Grown([(usize, Vec<u8>); 5]);

impl Grown {
    /// The bytes of each part.
    pub fn bytes(&self) -> [&[u8]; 5] {
        std::array::from_fn(|i| &self.0[i].1[..])
    }
}

/// Has room for `bytes` bytes at `at`; what is before them stays.
fn make_room(gpu: &Gpu, buffer: &mut Buffer, (at, bytes): (usize, usize)) -> Result<(), Error> {
    let needed = at + bytes;
    if needed > buffer.bytes() {
        let larger = gpu.alloc(needed + needed / 16)?;
        if at > 0 {
            larger.copy_from(0, (buffer, 0), at)?;
        }
        *buffer = larger;
    }
    Ok(())
}
