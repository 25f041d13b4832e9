//! Layered pages out of vectors in the device's memory, to the bit as [`Pages::push`](crate::layered::Pages::push) makes them.

use super::device::{Buffer, Error, Gpu, Kernel};
use super::layered::{Head, Scales};
use super::parameters::{EncodePage, EncodeParameters};
use crate::layered::device::{Most, counts, lines_of_page};
use crate::layered::{GROUP, PAGE_TOKENS, Profile, SKETCH, TILES};

const COUNT: [Kernel; 2] =
    [Kernel { name: "layered_count_64", threads: 256 }, Kernel { name: "layered_count_128", threads: 256 }];
const ENCODE: [Kernel; 2] =
    [Kernel { name: "layered_encode_64", threads: 256 }, Kernel { name: "layered_encode_128", threads: 256 }];

/// One page: how its keys and values are stored, and how many tokens it has.
pub type PageOf = (Profile, Profile, usize);

/// Vectors of one head in the device's memory: keys and values `[T, D]` as f32.
#[derive(Clone, Copy, Debug)]
pub struct Vectors<'a> {
    /// Of all tokens.
    pub keys: &'a Buffer,
    /// Of all tokens.
    pub values: &'a Buffer,
    /// `T`
    pub tokens: usize,
    /// `D`, 64 or 128.
    pub head_dim: usize,
}

/// Encodes the tokens of `order`, page by page, as `pages` say; vectors are in units of their channels' spread and less their means. Waits once for the device, to know how many escapes there are.
pub fn encode(
    gpu: &Gpu,
    vectors: Vectors,
    (order, pages): (&[u32], &[PageOf]),
    selectable: usize,
    scales: &Scales,
) -> Result<Head, Error> {
    let Vectors { keys, values, tokens, head_dim: d } = vectors;
    assert!(matches!(d, 64 | 128), "head_dim {d}, wanted 64 or 128");
    assert!(keys.bytes().min(values.bytes()) >= tokens * d * 4, "vectors are not [{tokens}, {d}]");
    assert!(order.iter().all(|token| (*token as usize) < tokens), "tokens that do not exist");
    let (mut described, mut sizes, mut first, mut most) = (vec![], [0, 0], 0, Most::default());
    for &(of_keys, of_values, count) in pages {
        let fits = of_keys.groups().max(of_values.groups()) <= d / GROUP;
        assert!(fits && of_keys.is_paired(SKETCH) && of_values.is_paired(0), "{of_keys:?}, {of_values:?}");
        assert!((1..=PAGE_TOKENS).contains(&count), "a page of {count} tokens");
        described.push(EncodePage {
            leading: sizes[0] as u32,
            lines: sizes[1] as u32,
            first: first as u32,
            keys: counts(of_keys),
            values: counts(of_values),
            tokens: count as u8,
            unused: 0,
        });
        let [leading, lines] = lines_of_page(of_keys, of_values);
        sizes = [sizes[0] + leading, sizes[1] + lines];
        first += count;
        most = most.with(of_keys, of_values);
    }
    assert!(
        first == order.len() && sizes.iter().all(|lines| *lines <= u32::MAX as usize),
        "{first} tokens in pages"
    );
    let (order, on_device) = (gpu.upload(order)?, gpu.upload(&described)?);
    let of_tiles = gpu.alloc(pages.len() * 2 * TILES * 4)?;
    let [leading, lines] = [gpu.alloc(sizes[0] * 64)?, gpu.alloc(sizes[1] * 64)?];
    let sketch_pages = gpu.alloc(pages.len() * 8)?;
    let tiles = gpu.alloc(pages.len() * TILES * 32)?;
    let mut parameters = EncodeParameters {
        keys: keys.address(),
        values: values.address(),
        order: order.address(),
        pages: on_device.address(),
        counts: of_tiles.address(),
        leading: leading.address(),
        lines: lines.address(),
        escapes: 0,
        sketch_pages: sketch_pages.address(),
        tiles: tiles.address(),
        page_count: pages.len() as i32,
        unused: 0,
    };
    let which = usize::from(d == 128);
    let grid = (pages.len(), d / GROUP * PAGE_TOKENS * GROUP + 64);
    if pages.is_empty() {
        return Head::of_parts(
            gpu,
            [leading, lines, gpu.alloc(0)?, sketch_pages, tiles],
            (0, 0, most),
            scales,
        );
    }
    // SAFETY: one block for each page; pages' tokens are in the order, whose tokens exist; counts are two of each tile.
    unsafe { gpu.launch(COUNT[which], grid, &parameters) }?;
    let counted: Vec<u32> = of_tiles.read(pages.len() * 2 * TILES)?;
    let escapes = gpu.alloc(counted.iter().map(|count| *count as usize).sum::<usize>() * 4)?;
    parameters.escapes = escapes.address();
    // SAFETY: as above; lines have room for all pages', and escapes for as many as were counted.
    unsafe { gpu.launch(ENCODE[which], grid, &parameters) }?;
    // What the launch reads is given back when it is done: memory is freed in order.
    Head::of_parts(
        gpu,
        [leading, lines, escapes, sketch_pages, tiles],
        (pages.len(), selectable, most),
        scales,
    )
}
