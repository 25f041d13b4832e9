//! Layered pages out of exact tokens in the device's memory, to the bit as [`Pages::push`] makes them out of the same.
//!
//! Three launches a head: tokens enter the pages' channels in the order of the pages, escapes are counted, and codes are written.

use super::aside::Part;
use super::device::{Buffer, Error, Gpu, Kernel};
use super::exact::{PAGE_TOKENS as EXACT_TOKENS, Pool};
use super::layered::{Growing, Head, Scales};
use super::of_width;
use super::parameters::{CoordinatesParameters, EncodePage, EncodeParameters};
use crate::layered::device::{Most, counts, lines_of_page, pages_of};
use crate::layered::{GROUP, LINE, PAGE_TOKENS, Pages, Profile, SKETCH, TILES};
use half::f16;

const COORDINATES: [Kernel; 2] = [
    Kernel { name: "layered_coordinates_64", threads: 256 },
    Kernel { name: "layered_coordinates_128", threads: 256 },
];
const COUNT: [Kernel; 2] =
    [Kernel { name: "layered_count_64", threads: 256 }, Kernel { name: "layered_count_128", threads: 256 }];
const ENCODE: [Kernel; 2] =
    [Kernel { name: "layered_encode_64", threads: 256 }, Kernel { name: "layered_encode_128", threads: 256 }];

/// Counts of escapes of a page.
const COUNTS: usize = 2 * TILES;

/// Pages with 8 bits for which a head has room after those that are encoded: a sequence's newest ones.
const ROOM: usize = 12;

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

/// Where a head's exact tokens are.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Pages of its layer.
    pub pool: &'a Pool,
    /// Which of the KV heads.
    pub head: usize,
    /// From which of the sequence's tokens on others are counted.
    pub first: usize,
}

/// Encodes heads of a sequence, one after the other, in working memory that stays.
#[derive(Debug)]
pub struct Encoder {
    gpu: Gpu,
    head_dim: usize,
    /// `[2, T, D]` as f32: keys and values of a head's tokens in the order of its pages, less their channels' means and over their spreads.
    vectors: Buffer,
    tokens: usize,
    /// The sequence's exact pages; how many, and the last.
    table: Buffer,
    table_pages: usize,
    last: u32,
    order: Buffer,
    matrices: Buffer,
    scales: Buffer,
    pages: Buffer,
    counts: Buffer,
}

impl Encoder {
    /// Of a sequence whose exact tokens are in the pages of `table`, for heads of up to so many tokens and pages.
    pub fn new(
        gpu: &Gpu,
        head_dim: usize,
        (most_tokens, most_pages): (usize, usize),
        table: &[u32],
    ) -> Result<Encoder, Error> {
        assert!(matches!(head_dim, 64 | 128), "head_dim {head_dim}, wanted 64 or 128");
        Ok(Encoder {
            gpu: gpu.clone(),
            head_dim,
            vectors: gpu.alloc(2 * most_tokens * head_dim * 4)?,
            tokens: 0,
            table: gpu.upload(table)?,
            table_pages: table.len(),
            last: table.iter().copied().max().unwrap_or(0),
            order: gpu.alloc(most_tokens * 4)?,
            matrices: gpu.alloc(2 * head_dim * head_dim * 2)?,
            scales: gpu.alloc(4 * head_dim * 4)?,
            pages: gpu.alloc(most_pages * size_of::<EncodePage>())?,
            counts: gpu.alloc(most_pages * COUNTS * 4)?,
        })
    }

    /// Waits for what it was asked for.
    pub fn wait(&self) -> Result<(), Error> {
        self.counts.read::<u8>(1).map(|_| ())
    }

    /// The vectors to encode: those of the tokens of `order`, times the matrices `[D, D]` of keys and of values, less means and over spreads.
    pub fn turn(
        &mut self,
        source: Source,
        order: &[u32],
        matrices: [&[f16]; 2],
        scales: &Scales,
    ) -> Result<(), Error> {
        let (d, (kv_heads, of_pool)) = (self.head_dim, source.pool.shape());
        let most = order.iter().max().map_or(0, |token| source.first + *token as usize + 1);
        assert!(
            most <= self.table_pages * EXACT_TOKENS && (self.last as usize) < source.pool.pages(),
            "{most} tokens in {} pages up to {} of {}",
            self.table_pages,
            self.last,
            source.pool.pages()
        );
        assert!(of_pool == d && source.head < kv_heads, "head {} of {kv_heads} of {of_pool}", source.head);
        assert!(matrices.iter().all(|matrix| matrix.len() == d * d), "matrices are not [{d}, {d}]");
        self.vectors.holds("vectors", 0, 2 * order.len() * d * 4);
        self.tokens = order.len();
        self.order.write(0, order)?;
        matrices.iter().enumerate().try_for_each(|(i, x)| self.matrices.write(i * d * d * 2, x))?;
        self.scales.write(0, &means_and_inverses(scales))?;
        let parameters = CoordinatesParameters {
            pool: source.pool.data().address(),
            table: self.table.address(),
            order: self.order.address(),
            matrices: self.matrices.address(),
            scales: self.scales.address(),
            out: self.vectors.address(),
            tokens: order.len() as i32,
            first: source.first as i32,
            kv_heads: kv_heads as u16,
            head: source.head as u16,
            unused: 0,
        };
        let grid = (2 * order.len().div_ceil(EXACT_TOKENS), d * (EXACT_TOKENS * 4 + d * 2));
        if order.is_empty() {
            return Ok(());
        }
        // SAFETY: one block for each 64 tokens' keys or values; the tokens are in pages of the table, these in the pool, and there is room for
        // all vectors, asserted above.
        unsafe { self.gpu.launch(of_width(COORDINATES, d), grid, &parameters) }
    }

    /// Pages of the vectors, one after the other. Waits for the device, to know how many escapes there are.
    pub fn encode(&self, pages: &[PageOf], scales: &Scales) -> Result<Encoded, Error> {
        let (described, [leading, lines], most) = self.describe(pages);
        self.counts.holds("counts", 0, pages.len() * COUNTS * 4);
        self.pages.write(0, &described)?;
        let d = self.head_dim;
        let [sketch_pages, tiles] = [8, TILES * 32].map(|bytes| self.room(pages.len() * bytes, ROOM * bytes));
        let (sketch_pages, tiles) = (sketch_pages?, tiles?);
        let fine = Profile { eight: (d / GROUP) as u8, ..Profile::default() };
        let newest = lines_of_page(fine, fine).map(|lines| ROOM * lines * LINE);
        let [leading, lines] = [leading * LINE, lines * LINE];
        let of_leading = self.room(leading, newest[0])?;
        let of_lines = self.room(lines, newest[1])?;
        let mut parameters = EncodeParameters {
            keys: self.vectors.address(),
            values: self.vectors.address() + (self.tokens * d * 4) as u64,
            pages: self.pages.address(),
            counts: self.counts.address(),
            leading: of_leading.address(),
            lines: of_lines.address(),
            escapes: 0,
            sketch_pages: sketch_pages.address(),
            tiles: tiles.address(),
            page_count: pages.len() as i32,
            unused: 0,
        };
        let grid = (pages.len(), d / GROUP * PAGE_TOKENS * GROUP + 64);
        let mut counted: Vec<u32> = vec![];
        if !pages.is_empty() {
            // SAFETY: one block for each page; pages' tokens are there, and counts are two of each tile.
            unsafe { self.gpu.launch(of_width(COUNT, d), grid, &parameters) }?;
            counted = self.counts.read(pages.len() * COUNTS)?;
        }
        let escapes = counted.iter().map(|count| *count as usize).sum::<usize>() * 4;
        let of_escapes = self.room(escapes, 256)?;
        if !pages.is_empty() {
            parameters.escapes = of_escapes.address();
            // SAFETY: as above; lines have room for all pages', and escapes for as many as were counted.
            unsafe { self.gpu.launch(of_width(ENCODE, d), grid, &parameters) }?;
        }
        let parts = [of_leading, of_lines, of_escapes, sketch_pages, tiles];
        let head = Head::of_parts(&self.gpu, parts, (pages.len(), pages.len(), most), scales)?;
        Ok(Encoded { head, pages: pages.to_vec(), counted, sizes: [leading, lines, escapes] })
    }

    /// Where each page's lines go, and of all pages how many lines lie apart and how many others there are.
    fn describe(&self, pages: &[PageOf]) -> (Vec<EncodePage>, [usize; 2], Most) {
        let (mut described, mut sizes, mut first, mut most) = (vec![], [0, 0], 0, Most::default());
        for &(of_keys, of_values, count) in pages {
            let fits = of_keys.groups().max(of_values.groups()) <= self.head_dim / GROUP;
            assert!(
                fits && of_keys.is_paired(SKETCH) && of_values.is_paired(0),
                "{of_keys:?}, {of_values:?}"
            );
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
            first == self.tokens && sizes.iter().all(|lines| *lines <= u32::MAX as usize),
            "{first} tokens in pages, and {} vectors",
            self.tokens
        );
        (described, sizes, most)
    }

    /// Memory for `bytes` bytes and what follows.
    fn room(&self, bytes: usize, more: usize) -> Result<Buffer, Error> {
        self.gpu.alloc(bytes + bytes / 16 + more)
    }
}

/// Of keys and of values means, and 1 over spreads.
fn means_and_inverses(scales: &Scales) -> Vec<f32> {
    let wide = |x: &[f16]| -> Vec<f32> { x.iter().map(|x| x.to_f32()).collect() };
    let inverse = |x: &[f16]| -> Vec<f32> { x.iter().map(|x| x.to_f32().recip()).collect() };
    let Scales { key_mean, key_spread, value_mean, value_spread } = scales;
    [wide(key_mean), inverse(key_spread), wide(value_mean), inverse(value_spread)].concat()
}

/// A head that was encoded.
#[derive(Debug)]
pub struct Encoded {
    pub(super) head: Head,
    pages: Vec<PageOf>,
    /// Escapes `[pages, 2, TILES]`.
    counted: Vec<u32>,
    /// Bytes of what lies apart, of other lines, and of escapes.
    sizes: [usize; 3],
}

impl Encoded {
    /// What the host needs to have the same pages.
    pub fn parts(&self) -> [Part<'_>; 3] {
        let [leading, lines, escapes, ..] = self.head.parts();
        let [of_leading, of_lines, of_escapes] = self.sizes;
        [(leading, 0, of_leading), (lines, 0, of_lines), (escapes, 0, of_escapes)]
    }

    /// Bytes of these parts.
    pub fn bytes(&self) -> usize {
        self.sizes.iter().sum()
    }

    /// The same pages on the host, out of the parts' bytes.
    pub fn pages(&self, bytes: &[u8]) -> Pages {
        let (leading, rest) = bytes.split_at(self.sizes[0]);
        let (lines, escapes) = rest.split_at(self.sizes[1]);
        pages_of(self.head.head_dim(), (&self.pages, &self.counted), [leading, lines, escapes])
    }

    /// As a head whose pages grow in the order of `gpu`'s work. Its parts must have come to the host: then all is done.
    pub fn growing(self, gpu: &Gpu) -> Growing {
        let [leading, lines, escapes] = self.sizes;
        Growing::of(gpu, self.head, [leading / LINE, lines / LINE, escapes / 4])
    }
}
