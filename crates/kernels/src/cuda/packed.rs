//! Attention to packed pages in the device's memory: turn the queries, score, want, narrow, list, attend, leave, finish.
//!
//! Eight launches, or nine with the exact tokens that are attended to in any case. Where all is read, scores and selection find nothing to do.

mod encode;
mod segment;

pub use segment::{Rotation, Segment};

use super::device::{Buffer, Error, Gpu, Kernel};
use super::exact::{Exact, FINISH_SHARED};
use super::parameters::{self, PackedHead, PackedParameters, PackedSegment, PackedSlice};
use super::{MOST_HEADS, MOST_ROWS, Shape, States};
use crate::packed::{BLOCKS, PAGE_TOKENS};
use std::f32::consts::LOG2_E;
use std::sync::Arc;

/// Fewer tokens are not cut into parts.
pub const LEAST_PART: usize = 256;

/// Most segments of a head.
pub const MOST_SEGMENTS: usize = 256;

/// Slices that a head is cut into for scores and selection, but for those that end with a segment: with 8 KV heads about two for each block that an
/// H100 holds.
const SLICES: usize = 164;

/// As `cuda/packed.cuh` has them: digits of keys, slots of a warp, and the most slices.
const DIGITS: usize = 1 << 11;
const SLOTS: usize = 4;
const MOST_SLICES: usize = 512;
const _: () = assert!(SLICES + MOST_SEGMENTS <= MOST_SLICES);

/// Bytes of a slot behind what is copied there: the last bits are read by whole words.
const BEHIND: usize = 16;

const TURN: [Kernel; 2] =
    [Kernel { name: "packed_turn_64", threads: 192 }, Kernel { name: "packed_turn_128", threads: 384 }];
const SCORE: [Kernel; 2] =
    [Kernel { name: "packed_score_64", threads: 128 }, Kernel { name: "packed_score_128", threads: 128 }];
const WANT: Kernel = Kernel { name: "packed_want", threads: 256 };
const NARROW: Kernel = Kernel { name: "packed_narrow", threads: 256 };
const LIST: Kernel = Kernel { name: "packed_list", threads: 256 };
const ATTEND: [Kernel; 2] =
    [Kernel { name: "packed_attend_64", threads: 128 }, Kernel { name: "packed_attend_128", threads: 128 }];
const LEAVE: [Kernel; 2] =
    [Kernel { name: "packed_leave_64", threads: 192 }, Kernel { name: "packed_leave_128", threads: 384 }];
const FINISH: [Kernel; 2] =
    [Kernel { name: "packed_finish_64", threads: 512 }, Kernel { name: "packed_finish_128", threads: 512 }];

/// `ends`, and the warps' maxima and sums.
const WARPS_SHARED: usize = 4 * (MOST_HEADS + 2 * 4 * MOST_ROWS);
const SELECT_SHARED: usize = 4 * (8 + 8 + DIGITS + 5 * MOST_SLICES + MOST_SEGMENTS + 2 + 1);

/// As `TurnPackedShared` in `cuda/packed_turn.cuh`.
fn turn_shared(head_dim: usize) -> usize {
    4 * MOST_ROWS * (head_dim + 3 * head_dim + 2)
}

/// What heads of a step may have at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Segments, up to [`MOST_SEGMENTS`].
    pub segments: usize,
    /// Pages of all segments, and their token blocks.
    pub pages: usize,
    /// Token blocks of all segments.
    pub blocks: usize,
}

/// What a step over packed heads works with.
#[derive(Clone, Debug)]
pub struct Packed {
    gpu: Gpu,
    shape: Shape,
    limits: Limits,
    selected: f32,
    least_part: usize,
    /// What describes the heads of this layer.
    table: Arc<Buffer>,
    /// Of all layers.
    work: Arc<Work>,
    score_slot: usize,
    attend_slot: usize,
    /// Blocks of threads that choose among a head's blocks: what comes out does not depend on it.
    selecting: usize,
}

/// What a step writes.
#[derive(Debug)]
struct Work {
    turned: Buffer,
    scores: Buffer,
    sums: Buffer,
    keys: Buffer,
    histogram: Buffer,
    candidates: Buffer,
    candidate_counts: Buffer,
    over: Buffer,
    cuts: Buffer,
    list: Buffer,
    runs: Buffer,
    plans: Buffer,
    states: States,
    left: States,
}

/// Where in a table the segments, slices and pages of heads begin, and where it ends. The heads themselves come first.
struct Places {
    segments: usize,
    slices: usize,
    pages: usize,
    end: usize,
}

impl Places {
    fn new(shape: Shape, limits: Limits) -> Places {
        let heads = shape.heads();
        let segments = heads * size_of::<PackedHead>();
        let slices = segments + heads * limits.segments * size_of::<PackedSegment>();
        let pages = slices + heads * slice_stride(limits) * size_of::<PackedSlice>();
        Places { segments, slices, pages, end: pages + heads * limits.pages * size_of::<u64>() }
    }
}

/// Stored channels of a head, `C`.
fn channels(head_dim: usize) -> usize {
    head_dim / 4 * 3
}

/// Rows of scores, which are read four at a time.
fn rows_stored(rows: usize) -> usize {
    rows.next_multiple_of(4)
}

impl Work {
    fn new(gpu: &Gpu, shape: Shape, limits: Limits, selected: f32, parts: usize) -> Result<Work, Error> {
        let (heads, c) = (shape.heads(), channels(shape.head_dim));
        let (of_segments, slices) = (heads * limits.segments, heads * slice_stride(limits));
        let of_channels = Shape { head_dim: c, ..shape };
        let zeros = |count: usize| gpu.upload(&vec![0u32; count]);
        Ok(Work {
            turned: gpu.alloc(of_segments * c * MOST_ROWS * 2 * 2)?,
            scores: gpu.alloc(heads * limits.blocks * rows_stored(shape.rows) * 4)?,
            sums: gpu.alloc(slices * MOST_ROWS * 2 * 4)?,
            keys: gpu.alloc(heads * limits.blocks * 4)?,
            histogram: zeros(heads * DIGITS)?,
            candidates: gpu.alloc(heads * limits.blocks * 4)?,
            candidate_counts: zeros(heads)?,
            over: gpu.alloc(slices * 4)?,
            cuts: gpu.alloc(heads * 8)?,
            list: gpu.alloc(heads * list_stride(limits, selected) * 4)?,
            runs: gpu.alloc(of_segments * 16)?,
            plans: gpu.alloc(heads * 8)?,
            states: States::new(gpu, of_channels, parts + limits.segments)?,
            left: States::new(gpu, shape, limits.segments)?,
        })
    }

    /// But for what is 0 between steps.
    fn poison(&self) -> Result<(), Error> {
        let all = [
            &self.turned,
            &self.scores,
            &self.sums,
            &self.keys,
            &self.candidates,
            &self.over,
            &self.cuts,
            &self.list,
            &self.runs,
            &self.plans,
        ];
        all.into_iter().try_for_each(Buffer::poison)?;
        self.states.poison()?;
        self.left.poison()
    }
}

impl Packed {
    /// For heads within `limits`, of whose tokens in pages each step reads the share `selected`, in (0, 1] (1: all, unscored); what is read is cut
    /// into up to `parts` parts of at least `least_part` tokens, a multiple of 16, and those that end with a segment.
    pub fn new(
        gpu: &Gpu,
        shape: Shape,
        limits: Limits,
        selected: f32,
        parts: (usize, usize),
    ) -> Result<Packed, Error> {
        Ok(Packed::layers(gpu, shape, limits, selected, parts, 1)?.remove(0))
    }

    /// The same for each of some layers, which come one after the other in a step and share what they work with. They have no segments yet.
    pub fn layers(
        gpu: &Gpu,
        shape: Shape,
        limits: Limits,
        selected: f32,
        (parts, least_part): (usize, usize),
        layers: usize,
    ) -> Result<Vec<Packed>, Error> {
        shape.check();
        assert!((1..=MOST_SEGMENTS).contains(&limits.segments), "{limits:?}: 1 to {MOST_SEGMENTS} segments");
        assert!(
            selected > 0.0 && selected <= 1.0,
            "a share of {selected} selected, wanted more than 0, at most 1"
        );
        assert!(parts > 0 && least_part > 0 && least_part.is_multiple_of(16), "parts of {least_part} tokens");
        let work = Arc::new(Work::new(gpu, shape, limits, selected, parts)?);
        let selecting = gpu.full_grid(LIST, SELECT_SHARED)?.div_ceil(shape.heads());
        let bytes = Places::new(shape, limits).end;
        let layer = |_| {
            let table = gpu.alloc(bytes)?;
            table.fill(0)?;
            Ok(Packed {
                gpu: gpu.clone(),
                shape,
                limits,
                selected,
                least_part,
                table: Arc::new(table),
                work: work.clone(),
                score_slot: 0,
                attend_slot: 0,
                selecting: selecting.min(slice_stride(limits)),
            })
        };
        (0..layers).map(layer).collect()
    }

    /// The heads `[B, G]` that steps read from now on, each of segments in the order of their tokens. These must live as long as this is used.
    pub fn set(&mut self, heads: &[Vec<&Segment>]) -> Result<(), Error> {
        assert_eq!(heads.len(), self.shape.heads(), "heads of another shape");
        let places = Places::new(self.shape, self.limits);
        let mut table = vec![0; places.end];
        for (i, segments) in heads.iter().enumerate() {
            let Described { head, segments, slices, pages } = self.describe(segments);
            let mut put = |place: usize, bytes: &[u8]| table[place..][..bytes.len()].copy_from_slice(bytes);
            put(i * size_of::<PackedHead>(), bytemuck::bytes_of(&head));
            let of_head = |most: usize, size: usize| i * most * size;
            put(
                places.segments + of_head(self.limits.segments, size_of::<PackedSegment>()),
                bytemuck::cast_slice(&segments),
            );
            put(
                places.slices + of_head(slice_stride(self.limits), size_of::<PackedSlice>()),
                bytemuck::cast_slice(&slices),
            );
            put(places.pages + of_head(self.limits.pages, size_of::<u64>()), bytemuck::cast_slice(&pages));
        }
        self.table.write(0, &table)
    }

    /// A head as kernels find it, and with room in shared memory for what is read of it.
    fn describe(&mut self, segments: &[&Segment]) -> Described {
        let described = Described::of(segments);
        let (limits, pages, blocks) = (self.limits, described.pages.len(), described.head.blocks as usize);
        assert!(
            segments.len() <= limits.segments && pages <= limits.pages && blocks <= limits.blocks,
            "{} segments of {pages} pages and {blocks} blocks: more than {limits:?}",
            segments.len()
        );
        for segment in segments {
            assert_eq!(segment.head_dim(), self.shape.head_dim, "segments of another width");
            let page = segment.layout();
            let sixteen = 16 / segment.block() * page.bytes_of_block();
            self.score_slot = self.score_slot.max(16 * page.bytes_of_vector() + BEHIND);
            self.attend_slot = self.attend_slot.max(sixteen + BEHIND);
        }
        described
    }

    /// Fills with garbage what a step writes, so that what it does not write shows. Not what is 0 between steps.
    pub fn poison(&self) -> Result<(), Error> {
        self.work.poison()
    }

    /// The whole step: `queries` `[B, G, R, D]` as f16, scores times `scale`, to `out` `[B, G, R, D]` as f32. `known` are the tokens that were
    /// attended to without pages in this step.
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
        if self.selected >= 1.0 && matches!(stage, Stage::Score | Stage::Want | Stage::Narrow) {
            return Ok(());
        }
        let parameters = self.parameters((queries, scale), known, out);
        let (heads, turn) = (shape.heads(), turn_shared(shape.head_dim));
        let (of_segments, selecting) = (heads * self.limits.segments, heads * self.selecting);
        let (kernel, grid) = match stage {
            Stage::Turn => (shape.pick(TURN[0], TURN[1]), (of_segments, turn)),
            Stage::Score => self.filling(shape.pick(SCORE[0], SCORE[1]), 0, self.score_slot)?,
            Stage::Want => (WANT, (selecting, SELECT_SHARED)),
            Stage::Narrow => (NARROW, (selecting, SELECT_SHARED)),
            Stage::List => (LIST, (selecting, SELECT_SHARED)),
            Stage::Attend => {
                let states = 4 * 4 * MOST_ROWS * channels(shape.head_dim);
                self.filling(shape.pick(ATTEND[0], ATTEND[1]), states, self.attend_slot)?
            }
            Stage::Leave => (shape.pick(LEAVE[0], LEAVE[1]), (of_segments, turn)),
            Stage::Finish => (shape.pick(FINISH[0], FINISH[1]), (shape.queries(), FINISH_SHARED)),
        };
        // SAFETY: heads are described as `set` checked them, by addresses of pages, which their segments have; all else has the sizes of shape and
        // limits, lists have room for what may be chosen, and parts of a head are at most the states' slots.
        unsafe { self.gpu.launch(kernel, grid, &parameters) }
    }

    /// As many blocks as fit, with slots for four warps.
    fn filling(&self, kernel: Kernel, states: usize, slot: usize) -> Result<(Kernel, (usize, usize)), Error> {
        let shared = WARPS_SHARED + states + 4 * SLOTS * slot;
        Ok((kernel, (self.gpu.full_grid(kernel, shared)?, shared)))
    }

    fn parameters(
        &self,
        (queries, scale): (&Buffer, f32),
        known: Option<&Exact>,
        out: &Buffer,
    ) -> PackedParameters {
        let (shape, limits) = (self.shape, self.limits);
        let none = parameters::States { max: 0, sum: 0, accumulated: 0, slots: 0, unused: 0 };
        let (exact, exact_lengths, exact_least_part) = known.map_or((none, 0, PAGE_TOKENS), |known| {
            let (states, lengths, least) = known.states();
            (states.parameters(), lengths, least)
        });
        let (work, table, places) = (&*self.work, self.table.address(), Places::new(shape, limits));
        PackedParameters {
            heads: table,
            segments: table + places.segments as u64,
            slices: table + places.slices as u64,
            pages: table + places.pages as u64,
            queries: queries.address(),
            exact,
            exact_lengths,
            turned: work.turned.address(),
            scores: work.scores.address(),
            sums: work.sums.address(),
            keys: work.keys.address(),
            histogram: work.histogram.address(),
            candidates: work.candidates.address(),
            candidate_counts: work.candidate_counts.address(),
            over: work.over.address(),
            cuts: work.cuts.address(),
            list: work.list.address(),
            runs: work.runs.address(),
            plans: work.plans.address(),
            states: work.states.parameters(),
            left: work.left.parameters(),
            out: out.address(),
            scale: scale * LOG2_E,
            selected: self.selected,
            sequences: shape.sequences as i32,
            kv_heads: shape.kv_heads as i32,
            rows: shape.rows as i32,
            rows_stored: rows_stored(shape.rows) as i32,
            segment_stride: limits.segments as i32,
            slice_stride: slice_stride(limits) as i32,
            page_stride: limits.pages as i32,
            block_stride: limits.blocks as i32,
            list_stride: list_stride(limits, self.selected) as i32,
            score_slot: self.score_slot as i32,
            attend_slot: self.attend_slot as i32,
            least_part: self.least_part as i32,
            exact_least_part: exact_least_part as i32,
            selecting: self.selecting as i32,
        }
    }

    /// Queries of segment `segment` of head `head` as the last step turned them, in octaves: `[R, C]`.
    pub fn turned(&self, head: usize, segment: usize) -> Result<Vec<f32>, Error> {
        let c = channels(self.shape.head_dim);
        let count = c * MOST_ROWS * 2;
        let first = (head * self.limits.segments + segment) * count;
        let halves: Vec<u16> = self.work.turned.read(first + count)?;
        let number = |at: usize| half::f16::from_bits(halves[first + at]).to_f32();
        let of = |i: usize| {
            let (row, (quarter, channel)) = (i / c, (i % c / (c / 4), i % (c / 4)));
            let at = (channel / 4 * 32 + row * 4 + quarter) * 8 + channel % 4;
            number(at) + number(at + 4)
        };
        Ok((0..self.shape.rows * c).map(of).collect())
    }

    /// Scores of the blocks of all heads, `[B * G, blocks, R]` each as the last step made them, in octaves.
    pub fn scores(&self) -> Result<Vec<Vec<Vec<f32>>>, Error> {
        let (stored, rows) = (rows_stored(self.shape.rows), self.shape.rows);
        let all: Vec<f32> = self.work.scores.read(self.shape.heads() * self.limits.blocks * stored)?;
        let of_block = |scores: &[f32]| scores[..rows].to_vec();
        let of_head = |head: &[f32]| head.chunks_exact(stored).map(of_block).collect();
        Ok(all.chunks_exact(self.limits.blocks * stored).map(of_head).collect())
    }

    /// What blocks were chosen by: integers of 22 bits, of each head those of all blocks.
    pub fn keys(&self) -> Result<Vec<Vec<u32>>, Error> {
        let all: Vec<u32> = self.work.keys.read(self.shape.heads() * self.limits.blocks)?;
        Ok(all.chunks_exact(self.limits.blocks).map(<[u32]>::to_vec).collect())
    }

    /// The blocks that the last step read of each head, counted over its segments; `None`: all of them.
    pub fn read_blocks(&self) -> Result<Vec<Option<Vec<u32>>>, Error> {
        let (heads, stride) = (self.shape.heads(), list_stride(self.limits, self.selected));
        if self.selected >= 1.0 {
            return Ok(vec![None; heads]);
        }
        let runs: Vec<u32> = self.work.runs.read(heads * self.limits.segments * 4)?;
        let described: Vec<u32> = self.table.read(heads * 4)?;
        let list: Vec<u32> = self.work.list.read(heads * stride)?;
        let of_head = |i: usize| {
            let of_segments = &runs[i * self.limits.segments * 4..][..described[4 * i] as usize * 4];
            let count: u32 = of_segments.chunks_exact(4).map(|run| run[1]).sum();
            Some(list[i * stride..][..count as usize].to_vec())
        };
        Ok((0..heads).map(of_head).collect())
    }

    /// Whether all counts are 0 again.
    pub fn is_clean(&self) -> Result<bool, Error> {
        let heads = self.shape.heads();
        let mut counts: Vec<u32> = self.work.histogram.read(heads * DIGITS)?;
        counts.extend(self.work.candidate_counts.read::<u32>(heads)?);
        Ok(counts.iter().all(|x| *x == 0))
    }
}

/// A slice ends with its segment.
fn slice_stride(limits: Limits) -> usize {
    SLICES.min(limits.pages.max(1)) + limits.segments
}

/// Blocks that may be chosen of a head, at most.
fn list_stride(limits: Limits, selected: f32) -> usize {
    let tokens = (f64::from(selected) * (limits.pages * PAGE_TOKENS) as f64).ceil() as usize;
    if selected >= 1.0 { 1 } else { limits.blocks.min(tokens / BLOCKS[0] + 2) }
}

/// A head as kernels find it.
struct Described {
    head: PackedHead,
    segments: Vec<PackedSegment>,
    slices: Vec<PackedSlice>,
    pages: Vec<u64>,
}

impl Described {
    fn of(segments: &[&Segment]) -> Described {
        let used = |segment: &Segment| segment.blocks().div_ceil(segment.layout().blocks());
        // How a head is cut follows from its own length alone.
        let of_slice = segments.iter().map(|s| used(s)).sum::<usize>().div_ceil(SLICES).max(1);
        let head = PackedHead { segments: segments.len() as u32, slices: 0, blocks: 0, tokens: 0 };
        let mut out = Described { head, segments: vec![], slices: vec![], pages: vec![] };
        for (i, segment) in segments.iter().enumerate() {
            let (first_page, first_block) = (out.pages.len() as u32, out.head.blocks);
            out.segments.push(segment.parameters(first_page, first_block));
            out.pages.extend(segment.pages().take(used(segment)));
            let most = of_slice * segment.layout().blocks();
            for start in (0..segment.blocks()).step_by(most) {
                out.slices.push(PackedSlice {
                    segment: i as u32,
                    first_page: first_page + (start / segment.layout().blocks()) as u32,
                    first_block: first_block + start as u32,
                    blocks: most.min(segment.blocks() - start) as u32,
                });
            }
            out.head.blocks += segment.blocks() as u32;
            out.head.tokens += segment.tokens() as u32;
        }
        out.head.slices = out.slices.len() as u32;
        out
    }
}

/// The launches of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Queries enter the segments' channels.
    Turn,
    /// Block keys are scored.
    Score,
    /// How much each block is wanted.
    Want,
    /// Those that may be the last to be taken are put apart.
    Narrow,
    /// Which are read.
    List,
    /// Attention to them.
    Attend,
    /// What was attended to leaves the channels of its segment.
    Leave,
    /// Segments and exact tokens are merged.
    Finish,
}

impl Stage {
    /// In order.
    pub const ALL: [Stage; 8] = [
        Stage::Turn,
        Stage::Score,
        Stage::Want,
        Stage::Narrow,
        Stage::List,
        Stage::Attend,
        Stage::Leave,
        Stage::Finish,
    ];
}
