//! Attention to layered pages in the device's memory: turn the queries, sketch, select, attend, finish.
//!
//! Six launches, or seven with the exact tokens that are attended to in any case. Where a head is read whole, sketch and selection find nothing to do.

mod growing;

use super::device::{Buffer, Error, Gpu, Kernel};
use super::exact::Exact;
use super::parameters::{self, LayeredParameters};
use super::{MOST_HEADS, MOST_ROWS, Shape, States};
use crate::layered::device::{Most, device_bytes};
use crate::layered::{Needed, Pages, TILES};
use half::f16;
use std::f32::consts::LOG2_E;
use std::sync::Arc;

pub use growing::Growing;

/// Tiles of a part, at least; of a list of up to 16 such parts a sixteenth, of one of up to 64 a 64th.
pub const LEAST_PART: usize = 32;

/// Codes of weights: steps an octave, and that of a weight of 1.
pub(super) const CODES_PER_OCTAVE: f64 = 4.0;
pub(super) const CODE_OF_ONE: f64 = 144.0;

const BINS: usize = 256;
/// As `cuda/parameters.cuh` has it.
const STEP: usize = 3;
const ALL_TILES: u32 = 1 << 31;

const TURN: [Kernel; 2] =
    [Kernel { name: "layered_turn_64", threads: 512 }, Kernel { name: "layered_turn_128", threads: 512 }];
const SKETCH: [Kernel; 2] =
    [Kernel { name: "layered_sketch_64", threads: 128 }, Kernel { name: "layered_sketch_128", threads: 128 }];
const WANT: Kernel = Kernel { name: "layered_want", threads: 256 };
const LIST: Kernel = Kernel { name: "layered_list", threads: 256 };
const ATTEND: [Kernel; 2] =
    [Kernel { name: "layered_attend_64", threads: 128 }, Kernel { name: "layered_attend_128", threads: 128 }];
const FINISH: [Kernel; 2] =
    [Kernel { name: "layered_finish_64", threads: 512 }, Kernel { name: "layered_finish_128", threads: 512 }];

const TURN_SHARED: usize = 4 * (256 + 512 + 32 + 32);
/// Shared memory of a block of the sketch, of which five fit on a multiprocessor of Hopper.
const SKETCH_SHARED: usize = 44 << 10;
/// Blocks of the sketch for each that fits: multiprocessors are not equally fast, and who is done takes another.
const SKETCH_WAVES: usize = 2;
/// Bytes of a run.
const RUN: usize = 128;
const FINISH_SHARED: usize = super::exact::FINISH_SHARED + 4 * (256 + 512);
const SELECT_SHARED: usize = 4 * (8 + 8 + 3 * BINS + 1 + 2);

/// Pages of a head whose tiles one block selects.
const SLICE_PAGES: usize = 1024;

/// How tiles are chosen; see `choose.rs` and the cache's selection, of which these are the numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// What a query needs; `None`: all is read.
    pub needed: Option<Needed>,
    /// Heads with fewer tokens in pages are read whole.
    pub from_tokens: usize,
    /// Tiles that are read at least.
    pub least_tiles: usize,
    /// Besides those at most one in so many.
    pub one_in: usize,
}

impl Default for Choice {
    fn default() -> Choice {
        Choice { needed: Some(Needed::Mass(0.99)), from_tokens: 8192, least_tiles: 256, one_in: 64 }
    }
}

impl Choice {
    /// Everything.
    pub fn all() -> Choice {
        Choice { needed: None, ..Choice::default() }
    }

    fn parameters(self) -> parameters::Selection {
        assert!(self.one_in > 0, "one tile in none");
        let (missed, relative, from) = match self.needed {
            None => (0.0, 0.0, u32::MAX),
            Some(Needed::Mass(mass)) => (1.0 - mass, 0.0, self.from_tokens as u32),
            Some(Needed::Relative(least)) => (-1.0, least.log2(), self.from_tokens as u32),
        };
        parameters::Selection {
            missed,
            relative,
            from_tokens: from,
            least_tiles: self.least_tiles as u32,
            one_in: self.one_in as u32,
        }
    }
}

/// What the channels of a head's pages are: means and spreads `[D]` of keys and of values.
#[derive(Clone, Debug)]
pub struct Scales {
    /// Of keys.
    pub key_mean: Vec<f16>,
    /// Of keys.
    pub key_spread: Vec<f16>,
    /// Of values.
    pub value_mean: Vec<f16>,
    /// Of values.
    pub value_spread: Vec<f16>,
}

impl Scales {
    /// One after the other.
    fn upload(&self, gpu: &Gpu, head_dim: usize) -> Result<Buffer, Error> {
        let all = [&self.key_mean, &self.key_spread, &self.value_mean, &self.value_spread];
        assert!(all.iter().all(|x| x.len() == head_dim), "means and spreads are not of {head_dim} channels");
        gpu.upload(&all.map(|x| &x[..]).concat())
    }
}

/// Rotations `[D, D]` of one head of the model, which all sequences share.
#[derive(Debug)]
pub struct Rotations {
    queries: Buffer,
    outputs: Buffer,
    head_dim: usize,
}

impl Rotations {
    /// `queries` into the pages' channels, `outputs` back.
    pub fn new(gpu: &Gpu, queries: &[f16], outputs: &[f16], head_dim: usize) -> Result<Rotations, Error> {
        let square = head_dim * head_dim;
        assert_eq!((queries.len(), outputs.len()), (square, square), "not [{head_dim}, {head_dim}]");
        Ok(Rotations { queries: gpu.upload(queries)?, outputs: gpu.upload(outputs)?, head_dim })
    }
}

/// Pages of one KV head of one sequence.
#[derive(Debug)]
pub struct Head {
    leading: Buffer,
    lines: Buffer,
    escapes: Buffer,
    pages: Buffer,
    tiles: Buffer,
    scales: Buffer,
    head_dim: usize,
    page_count: usize,
    selectable: usize,
    most: Most,
}

impl Head {
    /// Of pages as the CPU encodes them. The first `selectable` of them may be left out.
    pub fn upload(gpu: &Gpu, pages: &Pages, selectable: usize, scales: &Scales) -> Result<Head, Error> {
        Head::repeated(gpu, (pages, 1), selectable, scales)
    }

    /// The same with all pages `times` times, each time with memory of its own: long contexts for benchmarks.
    pub fn repeated(
        gpu: &Gpu,
        (pages, times): (&Pages, usize),
        selectable: usize,
        scales: &Scales,
    ) -> Result<Head, Error> {
        let d = pages.head_dim();
        let page_count = pages.pages().len() * times;
        assert!(selectable <= page_count, "{selectable} pages to choose from");
        let bytes = device_bytes(pages);
        let again = |part: &[u8]| -> Result<Buffer, Error> {
            let buffer = gpu.alloc(part.len() * times)?;
            (0..times).try_for_each(|i| buffer.write(i * part.len(), part))?;
            Ok(buffer)
        };
        let (leading, lines) = (bytes.leading.len() / 64, bytes.lines.len() / 64);
        assert!(leading.max(lines) * times <= u32::MAX as usize, "too many lines");
        let mut described = (Vec::with_capacity(page_count), Vec::with_capacity(page_count * TILES));
        for i in 0..times as u32 {
            described.0.extend(
                bytes.pages.iter().map(|page| parameters::SketchPage {
                    leading: page.leading + i * leading as u32,
                    ..*page
                }),
            );
            described.1.extend(bytes.tiles.iter().map(|tile| parameters::Tile {
                leading: tile.leading + i * leading as u32,
                lines: tile.lines + i * lines as u32,
                key_escapes: tile.key_escapes + i * bytes.escapes.len() as u32,
                value_escapes: tile.value_escapes + i * bytes.escapes.len() as u32,
                ..*tile
            }));
        }
        Ok(Head {
            leading: again(&bytes.leading)?,
            lines: again(&bytes.lines)?,
            escapes: again(bytemuck::cast_slice(&bytes.escapes))?,
            pages: gpu.upload(&described.0)?,
            tiles: gpu.upload(&described.1)?,
            scales: scales.upload(gpu, d)?,
            head_dim: d,
            page_count,
            selectable,
            most: bytes.most,
        })
    }

    /// Of pages that were encoded on the device: what lies apart, other lines, escapes, what describes pages and tiles.
    pub(super) fn of_parts(
        gpu: &Gpu,
        [leading, lines, escapes, pages, tiles]: [Buffer; 5],
        (page_count, selectable, most): (usize, usize, Most),
        scales: &Scales,
    ) -> Result<Head, Error> {
        assert!(selectable <= page_count, "{selectable} of {page_count} pages to choose from");
        let head_dim = scales.key_mean.len();
        let scales = scales.upload(gpu, head_dim)?;
        Ok(Head { leading, lines, escapes, pages, tiles, scales, head_dim, page_count, selectable, most })
    }

    /// See [`Buffer::pass_to`].
    fn pass_to(&mut self, gpu: &Gpu) {
        let Head { leading, lines, escapes, pages, tiles, scales, .. } = self;
        [leading, lines, escapes, pages, tiles, scales].into_iter().for_each(|buffer| buffer.pass_to(gpu));
    }

    /// What [`of_parts`](Head::of_parts) has, for comparisons.
    pub(super) fn parts(&self) -> [&Buffer; 5] {
        [&self.leading, &self.lines, &self.escapes, &self.pages, &self.tiles]
    }

    /// `D`
    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Pages.
    pub fn page_count(&self) -> usize {
        self.page_count
    }

    /// Those that may be left out.
    pub fn selectable(&self) -> usize {
        self.selectable
    }

    /// Bytes in the device's memory: of what lies apart, of other lines, of all else.
    pub fn bytes(&self) -> [usize; 3] {
        let others = [&self.escapes, &self.pages, &self.tiles, &self.scales];
        [self.leading.bytes(), self.lines.bytes(), others.iter().map(|x| x.bytes()).sum()]
    }

    fn parameters(&self, rotations: &Rotations) -> parameters::Head {
        let scales = |i: usize| self.scales.address() + (i * self.head_dim * 2) as u64;
        parameters::Head {
            leading: self.leading.address(),
            lines: self.lines.address(),
            escapes: self.escapes.address(),
            pages: self.pages.address(),
            tiles: self.tiles.address(),
            key_mean: scales(0),
            key_spread: scales(1),
            value_mean: scales(2),
            value_spread: scales(3),
            query_rotation: rotations.queries.address(),
            output_rotation: rotations.outputs.address(),
            page_count: self.page_count as u32,
            selectable: self.selectable as u32,
        }
    }
}

/// What a step over layered heads works with.
#[derive(Clone, Debug)]
pub struct Layered {
    gpu: Gpu,
    shape: Shape,
    /// Of this layer.
    heads: Arc<Buffer>,
    /// Of all layers `[L, B, G, R]`.
    log_sums: Arc<Buffer>,
    layer: usize,
    turned: Arc<Buffer>,
    bytes: Arc<Buffer>,
    steps: Arc<Buffer>,
    codes: Arc<Buffer>,
    histogram: Arc<Buffer>,
    wanted: Arc<Buffer>,
    wanted_counts: Arc<Buffer>,
    list: Arc<Buffer>,
    counts: Arc<Buffer>,
    states: Arc<States>,
    choice: Choice,
    tile_stride: usize,
    list_stride: usize,
    slot_bytes: usize,
    page_runs: usize,
    least_part: usize,
}

/// Rows of codes, which are read 4 or 8 at a time.
fn rows_stored(rows: usize) -> usize {
    rows.next_multiple_of(4)
}

/// Slices of a head of so many tiles.
fn slices(tile_stride: usize) -> usize {
    (tile_stride / TILES).div_ceil(SLICE_PAGES)
}

impl Layered {
    /// For heads of up to `most_pages` pages, of which each step reads what `choice` says and at most `always` newer ones; what is read is cut
    /// into up to `parts` parts of at least `least_part` tiles, a multiple of 8, or of a sixteenth or a 64th of shorter lists, see [`LEAST_PART`].
    pub fn new(
        gpu: &Gpu,
        shape: Shape,
        (most_pages, always): (usize, usize),
        choice: Choice,
        parts: (usize, usize),
    ) -> Result<Layered, Error> {
        Ok(Layered::layers(gpu, shape, (most_pages, always), choice, parts, 1)?.remove(0))
    }

    /// The same for each of some layers, which come one after the other in a step and share what they work with.
    pub fn layers(
        gpu: &Gpu,
        shape: Shape,
        (most_pages, always): (usize, usize),
        choice: Choice,
        (parts, least_part): (usize, usize),
        layers: usize,
    ) -> Result<Vec<Layered>, Error> {
        shape.check();
        assert!(parts > 0 && least_part > 0 && least_part.is_multiple_of(8), "parts of {least_part} tiles");
        let (heads, d) = (shape.heads(), shape.head_dim);
        let tile_stride = most_pages.max(1) * TILES;
        let list_stride = choice.least_tiles + tile_stride / choice.one_in + 1 + always * TILES;
        let histogram = gpu.alloc(heads * MOST_ROWS * BINS * 4)?;
        histogram.fill(0)?;
        let alloc = |bytes: usize| gpu.alloc(bytes).map(Arc::new);
        let described = |_| alloc(heads * size_of::<parameters::Head>());
        let described: Vec<Arc<Buffer>> = (0..layers).map(described).collect::<Result<_, _>>()?;
        let all = Layered {
            heads: described[0].clone(),
            log_sums: alloc(layers * shape.queries() * 4)?,
            layer: 0,
            turned: alloc(heads * MOST_ROWS * d * 4)?,
            bytes: alloc(heads * MOST_ROWS * d)?,
            steps: alloc(heads * MOST_ROWS * STEP * 4)?,
            codes: alloc(heads * tile_stride * rows_stored(shape.rows))?,
            histogram: Arc::new(histogram),
            wanted: alloc(heads * tile_stride)?,
            wanted_counts: alloc(heads * slices(tile_stride) * BINS * 4)?,
            list: alloc(heads * list_stride * 4)?,
            counts: Arc::new(gpu.upload(&vec![0u32; heads])?),
            states: Arc::new(States::new(gpu, shape, parts)?),
            gpu: gpu.clone(),
            shape,
            choice,
            tile_stride,
            list_stride,
            slot_bytes: 0,
            page_runs: 1,
            least_part,
        };
        let of_layer = |(layer, heads)| Layered { heads, layer, ..all.clone() };
        Ok(described.into_iter().enumerate().map(of_layer).collect())
    }

    /// Logarithms, to base 2, of what each query's weights summed up to in the last step, of all layers: `[L, B, G, R]`.
    pub fn log_sums(&self) -> &Buffer {
        &self.log_sums
    }

    /// The heads `[B, G]` that steps read from now on, with the rotations of each of the `G`. They must live as long as this is used.
    pub fn set(&mut self, heads: &[&Head], rotations: &[&Rotations]) -> Result<(), Error> {
        let Shape { kv_heads, head_dim, .. } = self.shape;
        assert_eq!((heads.len(), rotations.len()), (self.shape.heads(), kv_heads), "heads of another shape");
        for head in heads {
            assert_eq!(head.head_dim, head_dim, "pages of another width");
            let always = (head.page_count - head.selectable) * TILES;
            let room = self.list_stride - self.choice.least_tiles - self.tile_stride / self.choice.one_in;
            assert!(
                head.page_count * TILES <= self.tile_stride
                    && (self.choice.needed.is_none() || always < room),
                "{} pages, {} to choose from: more than there is room for",
                head.page_count,
                head.selectable
            );
            self.slot_bytes = self.slot_bytes.max(head.most.tile_bytes.next_multiple_of(128));
            self.page_runs = self.page_runs.max(head.most.runs);
        }
        assert!(rotations.iter().all(|r| r.head_dim == head_dim), "rotations of another width");
        let described: Vec<parameters::Head> =
            heads.iter().enumerate().map(|(i, h)| h.parameters(rotations[i % kv_heads])).collect();
        self.heads.write(0, &described)
    }

    /// Fills with garbage what a step writes, so that what it does not write shows. Not the histogram: it is 0 between steps.
    pub fn poison(&self) -> Result<(), Error> {
        let all: [&Buffer; 9] = [
            &self.log_sums,
            &self.turned,
            &self.bytes,
            &self.steps,
            &self.codes,
            &self.wanted,
            &self.wanted_counts,
            &self.list,
            &self.counts,
        ];
        all.into_iter().try_for_each(Buffer::poison)?;
        self.states.poison()
    }

    /// The whole step: `queries` `[B, G, R, D]` as f16, scores times `scale`, to `out` `[B, G, R, D]` as f32. `known` are the tokens that were
    /// attended to without pages by the launch before this step, of the same queries; weights are relative to them.
    pub fn step(
        &self,
        queries: &Buffer,
        scale: f32,
        known: Option<&Exact>,
        out: &Buffer,
    ) -> Result<(), Error> {
        Stage::ALL.into_iter().try_for_each(|stage| self.stage(stage, queries, scale, known, out))
    }

    /// One launch of it.
    pub fn stage(
        &self,
        stage: Stage,
        queries: &Buffer,
        scale: f32,
        known: Option<&Exact>,
        out: &Buffer,
    ) -> Result<(), Error> {
        let shape = self.shape;
        shape.check_queries(queries);
        shape.check_outputs(out);
        let parameters = self.parameters((queries, scale), known, out);
        let (kernel, grid) = match stage {
            Stage::Turn => (shape.pick(TURN[0], TURN[1]), (shape.heads() * MOST_ROWS, TURN_SHARED)),
            Stage::Sketch => {
                let kernel = shape.pick(SKETCH[0], SKETCH[1]);
                (kernel, (self.gpu.full_grid(kernel, SKETCH_SHARED)? * SKETCH_WAVES, SKETCH_SHARED))
            }
            Stage::Want => (WANT, (shape.heads() * slices(self.tile_stride), SELECT_SHARED)),
            Stage::List => (LIST, (shape.heads() * slices(self.tile_stride), SELECT_SHARED)),
            Stage::Attend => {
                let (kernel, shared) = (shape.pick(ATTEND[0], ATTEND[1]), self.attend_shared());
                (kernel, (self.gpu.full_grid(kernel, shared)?, shared))
            }
            Stage::Finish => (shape.pick(FINISH[0], FINISH[1]), (shape.queries(), FINISH_SHARED)),
        };
        if self.choice.needed.is_none() && matches!(stage, Stage::Sketch | Stage::Want) {
            return Ok(());
        }
        // SAFETY: heads were set, and what they describe is theirs (`Head::repeated`); all else has the shape's sizes, lists have room for
        // what may be chosen, and parts of a head are at most the states' slots.
        unsafe { self.gpu.launch(kernel, grid, &parameters) }
    }

    /// Two tiles of the largest and three quarters of one: of most sizes four tiles.
    fn room_bytes(&self) -> usize {
        (self.slot_bytes * 11 / 4).next_multiple_of(128)
    }

    /// Rounds that a warp of the sketch asks for ahead: as many as there is room for, which `SketchShared` in `cuda/sketch.cuh` begins with
    /// other things.
    fn sketch_stages(&self) -> usize {
        let others = (MOST_HEADS * 4 + 16).next_multiple_of(128) + rows_stored(self.shape.rows) * BINS * 4;
        let pages = if self.shape.rows > 4 { 1 } else { 2 };
        let stages = (SKETCH_SHARED - others) / (4 * pages * self.page_runs * RUN);
        assert!(stages >= 2, "no room for two pages of {} runs", self.page_runs);
        stages.min(4)
    }

    /// As `LayeredShared` in `cuda/tiles.cuh`.
    fn attend_shared(&self) -> usize {
        let d = self.shape.head_dim;
        let warp = 2 * 8 * 32 + 4 * (32 * MOST_ROWS + MOST_ROWS * d);
        let fixed = 4 * (MOST_HEADS + MOST_ROWS * d + d * 2) + 4 * warp + 2 * 4 * MOST_ROWS * 4 + 16;
        fixed.next_multiple_of(128) + 4 * self.room_bytes()
    }

    fn parameters(
        &self,
        (queries, scale): (&Buffer, f32),
        known: Option<&Exact>,
        out: &Buffer,
    ) -> LayeredParameters {
        let shape = self.shape;
        let none = parameters::States { max: 0, sum: 0, accumulated: 0, slots: 0, unused: 0 };
        let (exact, exact_lengths, exact_least_part) = known.map_or((none, 0, 64), |known| {
            let (states, lengths, least) = known.states();
            (states.parameters(), lengths, least)
        });
        LayeredParameters {
            heads: self.heads.address(),
            queries: queries.address(),
            exact,
            exact_lengths,
            turned: self.turned.address(),
            bytes: self.bytes.address(),
            steps: self.steps.address(),
            codes: self.codes.address(),
            histogram: self.histogram.address(),
            wanted: self.wanted.address(),
            wanted_counts: self.wanted_counts.address(),
            list: self.list.address(),
            counts: self.counts.address(),
            states: self.states.parameters(),
            out: out.address(),
            log_sums: self.log_sums.address() + (self.layer * shape.queries() * 4) as u64,
            selection: self.choice.parameters(),
            scale: scale * LOG2_E,
            sequences: shape.sequences as i32,
            kv_heads: shape.kv_heads as i32,
            rows: shape.rows as i32,
            rows_stored: rows_stored(shape.rows) as i32,
            tile_stride: self.tile_stride as i32,
            list_stride: self.list_stride as i32,
            room_bytes: self.room_bytes() as i32,
            least_part: self.least_part as i32,
            exact_least_part: exact_least_part as i32,
            slices: slices(self.tile_stride) as i32,
            page_runs: self.page_runs as i32,
            sketch_stages: self.sketch_stages() as i32,
        }
    }

    /// Queries as the last step turned them, in units of octaves: numbers `[B * G, 8, D]`, and what is added to scores `[B * G, 8]`.
    pub fn turned(&self) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let count = self.shape.heads() * MOST_ROWS;
        let steps: Vec<f32> = self.steps.read(count * STEP)?;
        let offsets = steps.chunks_exact(STEP).map(|step| step[1]).collect();
        Ok((self.turned.read(count * self.shape.head_dim)?, offsets))
    }

    /// Their bytes `[B * G, 8, D]`.
    pub fn query_bytes(&self) -> Result<Vec<i8>, Error> {
        self.bytes.read(self.shape.heads() * MOST_ROWS * self.shape.head_dim)
    }

    /// The codes of tile `tile` of head `head` for each row of the last step: logarithms of its weights.
    pub fn codes(&self) -> Result<Vec<Vec<Vec<u8>>>, Error> {
        let stored = rows_stored(self.shape.rows);
        let all: Vec<u8> = self.codes.read(self.shape.heads() * self.tile_stride * stored)?;
        let of_tile = |codes: &[u8]| codes[..self.shape.rows].to_vec();
        Ok(all
            .chunks_exact(self.tile_stride * stored)
            .map(|head| head.chunks_exact(stored).map(of_tile).collect())
            .collect())
    }

    /// The tiles that the last step read of each head; `None`: all of them.
    pub fn read_tiles(&self) -> Result<Vec<Option<Vec<u32>>>, Error> {
        let heads = self.shape.heads();
        let (counts, list): (Vec<u32>, Vec<u32>) =
            (self.counts.read(heads)?, self.list.read(heads * self.list_stride)?);
        let of_head = |(count, list): (&u32, &[u32])| {
            (count & ALL_TILES == 0).then(|| list[..*count as usize].to_vec())
        };
        Ok(counts.iter().zip(list.chunks_exact(self.list_stride)).map(of_head).collect())
    }

    /// Whether all counts of codes are 0 again.
    pub fn is_clean(&self) -> Result<bool, Error> {
        let counts: Vec<u32> = self.histogram.read(self.shape.heads() * MOST_ROWS * BINS)?;
        Ok(counts.iter().all(|x| *x == 0))
    }
}

/// The launches of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Queries enter the pages' channels.
    Turn,
    /// How much each tile would be attended to.
    Sketch,
    /// How much each tile is wanted.
    Want,
    /// Which are read.
    List,
    /// Attention to them.
    Attend,
    /// Outputs leave the channels.
    Finish,
}

impl Stage {
    /// In order.
    pub const ALL: [Stage; 6] =
        [Stage::Turn, Stage::Sketch, Stage::Want, Stage::List, Stage::Attend, Stage::Finish];
}
