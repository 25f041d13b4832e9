//! A head whose pages grow while it is read from: what may be left out stays where it is, and what follows is written anew.

use super::{Head, Scales};
use crate::cuda::device::{Buffer, Error, Gpu};
use crate::cuda::parameters::Tile;
use crate::layered::device::{device_bytes, lines_of_page};
use crate::layered::{LINE, Pages, TILES};

/// One KV head of one sequence.
#[derive(Debug)]
pub struct Growing {
    gpu: Gpu,
    head: Head,
    /// Lines that lie apart, other lines and escapes before each page that is always read, and before what follows the last.
    starts: Vec<[usize; 3]>,
    /// What it grew by and is not known to be written.
    grown: Option<Grown>,
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
        let start = [leading, lines, escapes].map(|count| count * times);
        Ok(Growing { gpu: gpu.clone(), head, starts: vec![start], grown: None })
    }

    /// Of a head whose pages may all be left out, with so many lines that lie apart, other lines and escapes, and which nobody works on any more.
    pub(crate) fn of(gpu: &Gpu, mut head: Head, kept: [usize; 3]) -> Growing {
        head.pass_to(gpu);
        Growing { gpu: gpu.clone(), head, starts: vec![kept], grown: None }
    }

    /// As steps read it.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Bytes in the device's memory.
    pub fn bytes(&self) -> usize {
        self.head.bytes().iter().sum()
    }

    /// Makes room for pages that may be left out after those that there are, and for `newest`, which are always read, in place of those before,
    /// of which the first `same` stay as they are: they are not in `newest`, and `more` has none. Until what it grew by is
    /// [written](Growing::write) the head is not to be read.
    pub fn grow(&mut self, more: &Pages, (same, newest): (usize, &Pages)) -> Result<(), Error> {
        let of_more = more.pages().len();
        assert!(same < self.starts.len(), "{same} pages stay of {}", self.starts.len() - 1);
        assert!(same == 0 || of_more == 0, "{of_more} pages before {same} that stay");
        // What it grew by before may be what stays.
        self.write()?;
        self.grown = None;
        let mut all = more.clone();
        all.append(newest);
        let mut bytes = device_bytes(&all);
        let first = self.starts[same];
        let [leading, lines, escapes] = first.map(|start| start as u32);
        for page in &mut bytes.pages {
            page.leading += leading;
        }
        for tile in &mut bytes.tiles {
            tile.leading += leading;
            tile.lines += lines;
            tile.key_escapes += escapes;
            tile.value_escapes += escapes;
        }
        let end = [
            first[0] + bytes.leading.len() / LINE,
            first[1] + bytes.lines.len() / LINE,
            first[2] + bytes.escapes.len(),
        ];
        assert!(end.iter().all(|end| *end <= u32::MAX as usize), "too many lines: {end:?}");
        let of_page = |tile: &Tile| [tile.leading, tile.lines, tile.key_escapes].map(|start| start as usize);
        let starts = bytes.tiles.iter().step_by(TILES).skip(of_more).map(of_page).chain([end]);
        self.starts.truncate(same);
        self.starts.extend(starts);
        let head = &mut self.head;
        let pages = head.selectable + same;
        let grown = Grown([
            (first[0] * LINE, bytes.leading),
            (first[1] * LINE, bytes.lines),
            (first[2] * 4, bytemuck::cast_slice(&bytes.escapes).to_vec()),
            (pages * 8, bytemuck::cast_slice(&bytes.pages).to_vec()),
            (pages * TILES * 32, bytemuck::cast_slice(&bytes.tiles).to_vec()),
        ]);
        head.selectable += of_more;
        head.page_count = pages + all.pages().len();
        head.most = all.pages().iter().fold(head.most, |most, page| most.with(page.keys, page.values));
        let buffers =
            [&mut head.leading, &mut head.lines, &mut head.escapes, &mut head.pages, &mut head.tiles];
        for (buffer, (at, bytes)) in buffers.into_iter().zip(&grown.0) {
            make_room(&self.gpu, buffer, (*at, bytes.len()))?;
        }
        self.grown = Some(grown);
        Ok(())
    }

    /// Writes what it grew by, if that is not known to be [there](Growing::written).
    pub fn write(&self) -> Result<(), Error> {
        let Some(Grown(parts)) = &self.grown else { return Ok(()) };
        let buffers = self.head.parts();
        buffers.into_iter().zip(parts).try_for_each(|(buffer, (at, bytes))| buffer.write(*at, bytes))
    }

    /// What it grew by is there.
    pub fn written(&mut self) {
        self.grown = None;
    }
}

/// What a head grew by: where it begins in each of its parts.
#[derive(Debug)]
struct Grown([(usize, Vec<u8>); 5]);

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
