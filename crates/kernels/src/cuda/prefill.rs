//! Attention of new tokens to all before them and to each other, and where their keys and values lie.

use super::device::{Buffer, Error, Gpu, Kernel};
use super::exact::{PAGE_TOKENS, Pool};
use super::of_width;
use super::parameters::PrefillParameters;
use std::f32::consts::LOG2_E;

/// Rows of queries that a block has.
const TILE_ROWS: usize = 128;

const ATTEND: [Kernel; 2] =
    [Kernel { name: "prefill_attend_64", threads: 128 }, Kernel { name: "prefill_attend_128", threads: 128 }];

/// Most of what a pass may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `L`, layers in which sequences may have different numbers of tokens.
    pub layers: usize,
    /// `B`
    pub sequences: usize,
    /// Pages of a sequence.
    pub pages: usize,
    /// `T`, new tokens of all sequences.
    pub rows: usize,
}

/// New tokens of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Tokens in its pages before them.
    pub past: usize,
    /// How many they are.
    pub new: usize,
}

/// Where the rows of a pass belong: new tokens of some sequences, one sequence after the other, and each sequence's pages, which have the same
/// numbers in all layers.
#[derive(Debug)]
pub struct Places {
    gpu: Gpu,
    limits: Limits,
    /// `[L, T, 2]`: sequence, and the token's index in the sequence's pages.
    rows: Buffer,
    /// `[L, B, 3]`: first row, tokens before it, rows.
    spans: Buffer,
    /// `[tiles, 2]`: sequence, and first row of the tile in it; the longest work first.
    tiles: Buffer,
    /// `[B, pages]`
    tables: Buffer,
    /// `[L, B]`
    set: Vec<Vec<Span>>,
    tile_count: usize,
    /// `[B]`: pages in the table.
    counts: Vec<usize>,
    /// Pages that tables name lie below this.
    named: usize,
}

impl Places {
    /// No tokens and no pages yet.
    pub fn new(gpu: &Gpu, limits: Limits) -> Result<Places, Error> {
        let Limits { layers, sequences, pages, rows } = limits;
        assert!(layers > 0 && sequences > 0 && rows > 0 && pages > 0, "{limits:?}");
        let tiles = limits.rows.div_ceil(TILE_ROWS) + limits.sequences;
        Ok(Places {
            gpu: gpu.clone(),
            limits,
            rows: gpu.alloc(layers * rows * 8)?,
            spans: gpu.alloc(layers * sequences * 12)?,
            tiles: gpu.alloc(tiles * 8)?,
            tables: gpu.upload(&vec![0u32; sequences * pages])?,
            set: vec![],
            tile_count: 0,
            counts: vec![0; sequences],
            named: 0,
        })
    }

    /// `T`, rows of the pass.
    pub fn rows(&self) -> usize {
        self.set.first().map_or(0, |spans| spans.iter().map(|span| span.new).sum())
    }

    /// What it was made for.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Sets the new tokens of the first sequences, the same in all layers; rows are in this order.
    pub fn set(&mut self, spans: &[Span]) -> Result<(), Error> {
        self.set_each(&vec![spans.to_vec(); self.limits.layers])
    }

    /// Sets them layer by layer: as many in each, which may come after different numbers of tokens.
    pub fn set_each(&mut self, layers: &[Vec<Span>]) -> Result<(), Error> {
        let (limits, first) = (self.limits, &layers[0]);
        let count: usize = first.iter().map(|span| span.new).sum();
        assert!(
            layers.len() == limits.layers && first.len() <= limits.sequences && count <= limits.rows,
            "{} sequences, {count} rows in {} layers: wanted {limits:?}",
            first.len(),
            layers.len()
        );
        let (mut rows, mut of_spans, mut tiles) = (vec![], vec![], vec![]);
        for (layer, spans) in layers.iter().enumerate() {
            let is_alike = spans.iter().map(|span| span.new).eq(first.iter().map(|span| span.new));
            assert!(is_alike, "layer {layer} has other rows: {spans:?}, {first:?}");
            rows.resize(layer * limits.rows, [0; 2]);
            of_spans.resize(layer * limits.sequences, [0; 3]);
            for (sequence, span) in spans.iter().enumerate() {
                let row = rows.len() - layer * limits.rows;
                rows.extend((0..span.new).map(|i| [sequence as u32, (span.past + i) as u32]));
                of_spans.push([row as u32, span.past as u32, span.new as u32]);
            }
        }
        for (sequence, span) in first.iter().enumerate() {
            tiles.extend((0..span.new).step_by(TILE_ROWS).map(|row| [sequence as u32, row as u32]));
        }
        tiles
            .sort_by_key(|[sequence, row]| std::cmp::Reverse(first[*sequence as usize].past + *row as usize));
        self.rows.write(0, &rows)?;
        self.spans.write(0, &of_spans)?;
        self.tiles.write(0, &tiles)?;
        self.tile_count = tiles.len();
        self.set = layers.to_vec();
        Ok(())
    }

    /// Sets the pages that the first sequences have, old and new ones.
    pub fn set_pages(&mut self, pages: &[&[u32]]) -> Result<(), Error> {
        let limits = self.limits;
        let most = pages.iter().map(|pages| pages.len()).max().unwrap_or(0);
        assert!(
            pages.len() <= limits.sequences && most <= limits.pages,
            "up to {most} pages of {} sequences: wanted {limits:?}",
            pages.len()
        );
        let mut table = vec![0; pages.len() * limits.pages];
        for (to, from) in table.chunks_exact_mut(limits.pages).zip(pages) {
            to[..from.len()].copy_from_slice(from);
        }
        self.tables.write(0, &table)?;
        self.counts = pages.iter().map(|pages| pages.len()).collect();
        self.named = pages.iter().copied().flatten().max().map_or(0, |page| *page as usize + 1);
        Ok(())
    }
}

/// The tokens of a layer: pages, and which of them belong to whom.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// Their pages.
    pub pool: &'a Pool,
    /// Whose they are.
    pub places: &'a Places,
    /// Which of the tables is meant.
    pub layer: usize,
}

impl Tokens<'_> {
    pub(super) fn gpu(&self) -> &Gpu {
        &self.places.gpu
    }

    /// Addresses of rows and of the layer's tables, and how far apart the tables of two sequences are. Every row has a page of the pool.
    pub(super) fn checked(&self) -> (u64, u64, usize) {
        let Places { limits, set, counts, named, .. } = self.places;
        assert!(self.layer < limits.layers, "layer {} of {}", self.layer, limits.layers);
        assert!(*named <= self.pool.pages(), "page {named} of {}", self.pool.pages());
        let spans = set.get(self.layer).map_or(&[][..], |spans| spans);
        assert!(
            spans.len() <= counts.len(),
            "{} sequences, {} of which have pages",
            spans.len(),
            counts.len()
        );
        for (sequence, (span, pages)) in spans.iter().zip(counts).enumerate() {
            let tokens = span.past + span.new;
            assert!(
                tokens <= pages * PAGE_TOKENS,
                "sequence {sequence} in layer {}: {tokens} tokens in {pages} pages",
                self.layer
            );
        }
        let rows = self.places.rows.address() + (self.layer * limits.rows * 8) as u64;
        (rows, self.places.tables.address(), limits.pages)
    }

    fn spans(&self) -> u64 {
        self.places.spans.address() + (self.layer * self.places.limits.sequences * 12) as u64
    }
}

/// Causal attention of the pass's rows: `queries` `[T, H, D]` in f16, scores times `scale`, outputs `[T, H, D]` in bf16. Keys and values of the
/// new tokens are in their pages already.
pub fn attend(
    tokens: &Tokens,
    queries: &Buffer,
    heads: usize,
    scale: f32,
    out: &Buffer,
) -> Result<(), Error> {
    let (kv_heads, head_dim) = tokens.pool.shape();
    let places = tokens.places;
    let numbers = places.rows() * heads * head_dim;
    assert!(heads > 0 && heads.is_multiple_of(kv_heads), "{heads} query heads of {kv_heads} KV heads");
    queries.holds("queries", 0, numbers * 2);
    out.holds("outputs of attention", 0, numbers * 2);
    let (_, tables, table_stride) = tokens.checked();
    if places.tile_count == 0 {
        return Ok(());
    }
    let parameters = PrefillParameters {
        queries: queries.address(),
        pool: tokens.pool.data().address(),
        tables,
        spans: tokens.spans(),
        tiles: places.tiles.address(),
        out: out.address(),
        scale: scale * LOG2_E,
        heads: heads as i32,
        kv_heads: kv_heads as i32,
        table_stride: table_stride as i32,
    };
    let kernel = of_width(ATTEND, head_dim);
    let shared = (TILE_ROWS + 4 * PAGE_TOKENS) * head_dim * 2;
    // SAFETY: a block for each tile and head; every row has a page of the pool (`checked`); queries and outputs have the rows' size.
    unsafe { tokens.gpu().launch(kernel, (places.tile_count * heads, shared), &parameters) }
}
