//! One decode step over packed segments: score the token blocks, select, attend (paper, s. 4 and s. 5).
//!
//! Blocks of all segments of a head compete with each other. The step is five jobs of the pool, each over all heads of
//! all caches that take it together: turn the queries (and attend to the exact tokens), score, select, attend, merge.
//! Scores are made by runs of pages, attention by runs of selected blocks; partial states are merged in order within a
//! segment, leave its rotation, and meet the other segments and the exact tokens as attention states. Runs are cut by
//! tokens alone, so that results depend neither on threads nor on the other caches.

use super::PackedHead;
use super::segment::Segment;
use crate::{Phases, Step, cleared};
use mosaickv_kernels::exact::{self, Visible};
use mosaickv_kernels::packed::{PackedPage, attend_selected, score_pages};
use mosaickv_kernels::rotate::rotate;
use mosaickv_kernels::select::{importance_of_runs, log_sums, top_tokens};
use mosaickv_kernels::{AttnState, Isa};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Tokens whose blocks one task scores.
const SCORED_PER_TASK: usize = 16384;

/// Tokens that one task of a decode step attends to.
const ATTENDED_PER_TASK: usize = 1024;

/// What a step works with in one head, kept between steps for its allocations.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// Queries `[R, D]`, scaled.
    scaled: Vec<f32>,
    /// The same in the key channels of each segment, `[R, C]` one after the other.
    turned: Vec<f32>,
    /// Token blocks of each run that was scored.
    runs: Vec<usize>,
    /// Of each run, `[R, blocks]`.
    scores: Vec<f32>,
    /// Their log-sums, `[runs, R]`.
    sums: Vec<f32>,
    /// Of each block, over all rows.
    best: Vec<f32>,
    /// Blocks of the head to attend to, ascending, counted over all of its segments.
    pub(crate) selected: Vec<u32>,
    /// One state: the exact tokens, in the end all.
    whole: Vec<AttnState>,
    /// Of each run of selected blocks, in its segment's value channels.
    parts: Vec<AttnState>,
    /// Bytes that the step reads.
    pub(crate) read: u64,
}

/// One head of one cache in a step.
type Lane<'a> = crate::Lane<'a, PackedHead, Work>;

/// One token in each of some caches: `lanes` are all of their heads.
pub(crate) fn decode(step: Step, lanes: &mut [Lane]) -> Phases {
    let mut clock = Instant::now();
    let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed();
    step.pool.for_each(lanes, |_, lane| lane.turn(step));
    let turn = lap();
    let mut tasks: Vec<Scoring> = lanes.iter_mut().flat_map(Lane::scoring).collect();
    step.pool.for_each(&mut tasks, |_, task| task.run(step.isa));
    let score = lap();
    step.pool.for_each(lanes, |_, lane| lane.select(step.isa));
    let select = lap();
    let mut tasks: Vec<Attending> = lanes.iter_mut().flat_map(|lane| lane.attending(step)).collect();
    step.pool.for_each(&mut tasks, |_, task| task.run(step.isa));
    let attend = lap();
    step.pool.for_each(lanes, |_, lane| lane.merge(step));
    Phases { turn, score, select, attend, merge: lap(), flush: Duration::ZERO }
}

impl Lane<'_> {
    fn turn(&mut self, step: Step) {
        let (head, work) = (self.head, &mut *self.work);
        let (rows, c) = (step.shape.group(), head.channels());
        work.scaled.clear();
        work.scaled.extend(self.queries.iter().map(|q| q * step.scale));
        work.turned.resize(head.segments.len() * rows * c, 0.0);
        for (segment, out) in head.segments.iter().zip(work.turned.chunks_exact_mut(rows * c)) {
            rotate(step.isa, &work.scaled, &segment.rotation.keys, out, c);
        }
        let [state] = cleared(&mut work.whole, 1, rows, step.shape.head_dim) else {
            unreachable!("one state was asked for")
        };
        for page in [&head.sinks, &head.buffer] {
            exact::attend(step.isa, &work.scaled, page, Visible::All, state);
        }
    }

    fn scoring(&mut self) -> Vec<Scoring<'_>> {
        let (segments, work) = (&self.head.segments, &mut *self.work);
        let rows = self.queries.len() / self.head.buffer.head_dim();
        let runs = segments.iter().enumerate();
        let runs: Vec<_> =
            runs.flat_map(|(s, seg)| seg.runs(SCORED_PER_TASK).map(move |run| (s, run))).collect();
        let blocks = |(s, run): &(usize, Range<usize>)| {
            let starts = &segments[*s].starts;
            (starts[run.end] - starts[run.start]) as usize
        };
        work.runs.clear();
        work.runs.extend(runs.iter().map(blocks));
        work.scores.resize(rows * work.runs.iter().sum::<usize>(), 0.0);
        work.sums.resize(rows * runs.len(), 0.0);
        let of_segment = rows * self.head.channels();
        let mut rest = &mut work.scores[..];
        let mut tasks = Vec::with_capacity(runs.len());
        for (((segment, run), blocks), sums) in
            runs.into_iter().zip(&work.runs).zip(work.sums.chunks_exact_mut(rows))
        {
            tasks.push(Scoring {
                queries: &work.turned[segment * of_segment..][..of_segment],
                pages: &segments[segment].pages[run],
                scores: rest.split_off_mut(..rows * blocks).expect("scores of every run"),
                sums,
            });
        }
        tasks
    }

    /// Stage 2: the blocks to attend to, from the scores of all runs.
    fn select(&mut self, isa: Isa) {
        let (head, work) = (self.head, &mut *self.work);
        let blocks: usize = work.runs.iter().sum();
        work.selected.clear();
        if blocks > 0 {
            work.best.resize(blocks, 0.0);
            importance_of_runs(isa, &work.scores, &work.runs, &work.sums, &mut work.best);
            let spans: Vec<_> = head.segments.iter().map(|s| (s.blocks(), s.strategy.block)).collect();
            work.selected = top_tokens(&work.best, &spans, head.selected_tokens());
        }
        work.read = head.bytes_read(&work.selected) as u64;
    }

    fn attending(&mut self, step: Step) -> Vec<Attending<'_>> {
        let (head, work) = (self.head, &mut *self.work);
        let (rows, c) = (step.shape.group(), head.channels());
        let runs = head.selected_runs(&work.selected);
        let states = cleared(&mut work.parts, runs.len(), rows, c);
        let with_states = runs.into_iter().zip(states);
        with_states
            .map(|((index, before, selected), state)| Attending {
                segment: &head.segments[index],
                queries: &work.turned[index * rows * c..][..rows * c],
                before,
                selected,
                state,
            })
            .collect()
    }

    fn merge(&mut self, step: Step) {
        let (head, work) = (self.head, &mut *self.work);
        let d = step.shape.head_dim;
        let runs = head.selected_runs(&work.selected);
        let state = &mut work.whole[0];
        let mut parts = &mut work.parts[..];
        for (index, segment) in head.segments.iter().enumerate() {
            let count = runs.iter().filter(|run| run.0 == index).count();
            let of_segment = parts.split_off_mut(..count).expect("a state of every run");
            let Some((first, others)) = of_segment.split_first_mut() else { continue };
            others.iter().for_each(|part| first.merge(part));
            let turn = |acc: &[f32], _: &[f32], out: &mut [f32]| {
                rotate(step.isa, acc, &segment.rotation.outputs, out, d)
            };
            state.merge(&first.turned(d, turn));
        }
        state.finish(self.out);
    }
}

/// Some pages of a segment, to be scored.
struct Scoring<'a> {
    /// `[R, C]`
    queries: &'a [f32],
    pages: &'a [PackedPage],
    /// `[R, blocks]`
    scores: &'a mut [f32],
    /// `[R]`
    sums: &'a mut [f32],
}

impl Scoring<'_> {
    fn run(&mut self, isa: Isa) {
        score_pages(isa, self.queries, self.pages, self.scores);
        log_sums(isa, self.scores, self.sums);
    }
}

/// Some selected blocks of a segment, to be attended to.
struct Attending<'a> {
    segment: &'a Segment,
    /// `[R, C]`
    queries: &'a [f32],
    /// Blocks of the head before the segment.
    before: u32,
    /// Blocks of the head, at least one, ascending.
    selected: &'a [u32],
    state: &'a mut AttnState,
}

impl Attending<'_> {
    fn run(&mut self, isa: Isa) {
        let (pages, starts) = (&self.segment.pages, &self.segment.starts);
        let mut page = starts.partition_point(|&start| start <= self.selected[0] - self.before) - 1;
        let mut blocks = Vec::with_capacity(self.selected.len());
        for block in self.selected.iter().map(|block| block - self.before) {
            while starts[page + 1] <= block {
                page += 1;
            }
            blocks.push((&pages[page], block - starts[page]));
        }
        attend_selected(isa, self.queries, &blocks, self.state);
    }
}

impl PackedHead {
    /// Stored channels, the same in every segment; without segments any number.
    fn channels(&self) -> usize {
        self.segments.first().map_or(1, |segment| segment.strategy.shape.channels())
    }

    /// The selected blocks of each segment, cut into runs: the segment, the head's blocks before it, the run.
    fn selected_runs<'a>(&self, mut selected: &'a [u32]) -> Vec<(usize, u32, &'a [u32])> {
        let (mut runs, mut before) = (vec![], 0);
        for (index, segment) in self.segments.iter().enumerate() {
            let end = before + segment.blocks() as u32;
            let (of_segment, rest) = selected.split_at(selected.partition_point(|&block| block < end));
            let cut = of_segment.chunks(ATTENDED_PER_TASK / segment.strategy.block);
            runs.extend(cut.map(|run| (index, before, run)));
            (selected, before) = (rest, end);
        }
        runs
    }

    /// Tokens that a step selects.
    pub(crate) fn selected_tokens(&self) -> usize {
        let packed: usize = self.segments.iter().map(|segment| segment.tokens()).sum();
        (self.settings.selected * packed as f32).ceil() as usize
    }

    fn bytes_read(&self, selected: &[u32]) -> usize {
        let mut bytes = self.sinks.bytes_read() + self.buffer.bytes_read();
        for segment in &self.segments {
            let block_keys: usize = segment.pages.iter().map(|page| page.bytes_of_block_keys()).sum();
            bytes += segment.rotation.bytes() + block_keys;
        }
        for (index, _, run) in self.selected_runs(selected) {
            bytes += run.len() * self.segments[index].pages[0].bytes_of_block();
        }
        bytes
    }
}
