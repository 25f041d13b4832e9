//! One decode step over layered pages: sketch the weights of tiles, select, attend.
//!
//! Five phases: turn the queries (and attend to the exact tokens), sketch, select, attend to what was selected, merge. Where
//! there are heads enough for all threads, one thread takes a head through all of them; where there are few, each phase is a job
//! of the pool over the runs of all heads. Tiles of a head's prompt and tail compete with each other; newer pages are always
//! read. Where all is read, nothing is sketched. Partial states are merged in order in the calibration's channels, then leave
//! them and meet the exact tokens. Runs are cut by pages and tiles alone, and both ways merge the same runs, so that results
//! depend neither on threads nor on the other caches.

use super::{LayeredHead, SINKS, select};
use crate::{Phases, Step, cleared};
use half::slice::HalfFloatSliceExt;
use mosaickv_kernels::exact::{self, Visible};
use mosaickv_kernels::layered::{Pages, Queries, TILES, attend_tiles, sketch};
use mosaickv_kernels::rotate::rotate;
use mosaickv_kernels::rows::Rows;
use mosaickv_kernels::{AttnState, Isa};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Tiles that one task attends to: as many tokens as 32 pages have.
const ATTENDED_PER_TASK: u32 = 128;

/// Pages that one task sketches.
const SKETCHED_PER_TASK: usize = 256;

/// Tasks for each thread, as large as the largest, from which a task may be a whole head: threads end at about the same time.
const HEADS_PER_THREAD: usize = 4;

/// What a step works with in one head, kept between steps for its allocations.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// Queries `[R, D]`, scaled.
    pub(crate) scaled: Vec<f32>,
    /// The same in the calibration's channels, times the keys' spreads.
    turned: Vec<f32>,
    /// The head's means and spreads: of keys `[2, D]`, of values `[2, D]`.
    scales: Vec<f32>,
    /// `[R]`: a query's product with the keys' means, which is in every score.
    offsets: Vec<f32>,
    /// Both, as the kernel wants them.
    pub(crate) queries: Queries,
    /// `[R]`: logarithms of the weight of the exact tokens, which sketched weights are relative to.
    pub(crate) shifts: Vec<f32>,
    /// `[R, tiles]`: the weights of the tiles that may be left out.
    sketched: Vec<f32>,
    /// What is to be read.
    pub(crate) chosen: select::Chosen,
    /// One state: the exact tokens, in the end all.
    pub(super) whole: Vec<AttnState>,
    /// Of each run of tiles, in the calibration's channels over spreads.
    parts: Vec<AttnState>,
    /// Bytes that each task read.
    reads: Vec<usize>,
    /// Bytes that the step reads.
    pub(crate) read: u64,
    /// Time of the step, if one thread took all of it.
    phases: Phases,
}

impl Work {
    /// Queries `[R, D]` of a head, times `scale`, as the kernels want them.
    pub(crate) fn turn(&mut self, isa: Isa, head: &LayeredHead, queries: &[f32], scale: f32) {
        let d = head.head_dim();
        self.scaled.clear();
        self.scaled.extend(queries.iter().map(|q| q * scale));
        self.turned.resize(queries.len(), 0.0);
        rotate(isa, &self.scaled, &head.calibration.heads[head.index].queries, &mut self.turned, d);
        self.scales.resize(4 * d, 0.0);
        head.scales.numbers.convert_to_f32_slice(&mut self.scales);
        let (mean, spread) = self.scales[..2 * d].split_at(d);
        self.offsets.clear();
        for query in self.turned.chunks_exact_mut(d) {
            self.offsets.push(dot(query, mean));
            query.iter_mut().zip(spread).for_each(|(q, s)| *q *= s);
        }
        self.queries.set(isa, &self.turned, &self.offsets);
    }
}

/// One head of one cache in a step.
type Lane<'a> = crate::Lane<'a, LayeredHead, Work>;

/// One token in each of some caches: `lanes` are all of their heads.
pub(crate) fn decode(step: Step, lanes: &mut [Lane]) -> Phases {
    let pages = |lane: &Lane| -> usize {
        lane.head.segments().map(|segment| segment.pages.pages().len()).iter().sum()
    };
    let (most, all) = lanes.iter().map(pages).fold((0, 0), |(most, all), n| (most.max(n), all + n));
    if HEADS_PER_THREAD * step.pool.threads() * most > all {
        return by_phases(step, lanes);
    }
    step.pool.for_each(lanes, |_, lane| lane.whole(step));
    let mut phases = Phases::default();
    lanes.iter().for_each(|lane| phases.add(lane.work.phases));
    phases.divided(step.pool.threads().min(lanes.len()).max(1))
}

/// Each phase over the runs of all heads.
fn by_phases(step: Step, lanes: &mut [Lane]) -> Phases {
    let mut clock = Instant::now();
    let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed();
    step.pool.for_each(lanes, |_, lane| lane.turn(step));
    let turn = lap();
    let mut tasks: Vec<Sketching> = lanes.iter_mut().flat_map(Lane::sketching).collect();
    if !tasks.is_empty() {
        step.pool.for_each(&mut tasks, |_, task| task.run(step.isa));
    }
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
    /// All of the step.
    fn whole(&mut self, step: Step) {
        let mut clock = Instant::now();
        let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed();
        self.turn(step);
        let turn = lap();
        self.sketching().iter_mut().for_each(|task| task.run(step.isa));
        let score = lap();
        self.select(step.isa);
        let select = lap();
        self.attending(step).iter_mut().for_each(|task| task.run(step.isa));
        let attend = lap();
        self.merge(step);
        self.work.phases = Phases { turn, score, select, attend, merge: lap(), flush: Duration::ZERO };
    }

    fn turn(&mut self, step: Step) {
        let (head, work) = (self.head, &mut *self.work);
        let (rows, d) = (step.shape.group(), step.shape.head_dim);
        work.turn(step.isa, head, self.queries, step.scale);
        let [state] = cleared(&mut work.whole, 1, rows, d) else { unreachable!("one state was asked for") };
        let mut sinks = Rows::with_room(d, rows, SINKS);
        let (keys, values) = sinks.push_many(SINKS);
        for (t, token) in head.sinks.chunks_exact(2 * d).enumerate() {
            token[..d].convert_to_f32_slice(&mut keys[t * d..][..d]);
            token[d..].convert_to_f32_slice(&mut values[t * d..][..d]);
        }
        sinks.fold(step.isa, &work.scaled, state);
        if let Some(buffer) = &head.buffer {
            exact::attend(step.isa, &work.scaled, buffer, Visible::All, state);
        }
        work.read = head.bytes_of_turn() as u64;
    }

    /// The work of sketching, if this head selects.
    fn sketching(&mut self) -> Vec<Sketching<'_>> {
        let (head, Work { queries, whole, shifts, sketched, reads, .. }) = (self.head, &mut *self.work);
        reads.clear();
        if head.settings.select.needed(head.in_pages()).is_none() {
            return vec![];
        }
        let runs = head.sketched_runs();
        let tiles: usize = runs.iter().map(|(_, range)| range.len() * TILES).sum();
        sketched.resize(tiles * queries.rows(), 0.0);
        reads.resize(runs.len(), 0);
        shifts.clear();
        shifts.extend((0..queries.rows()).map(|r| whole[0].log_sum(r)));
        let mut rest: Vec<&mut [f32]> = sketched.chunks_exact_mut(tiles.max(1)).collect();
        let queries = (&*queries, &shifts[..]);
        let with_rows = runs.into_iter().zip(reads).map(|((pages, range), read)| {
            let of_run = rest.iter_mut().map(|row| row.split_off_mut(..range.len() * TILES));
            let out = of_run.map(|row| row.expect("a row has all runs' tiles")).collect();
            Sketching { queries, pages, range, out, read }
        });
        with_rows.collect()
    }

    fn select(&mut self, isa: Isa) {
        let (head, Work { sketched, chosen, whole, reads, read, .. }) = (self.head, &mut *self.work);
        *read += reads.iter().sum::<usize>() as u64;
        let pages = head.segments().map(|segment| segment.pages.pages().len());
        match head.settings.select.needed(head.in_pages()) {
            None => chosen.all(pages),
            Some(needed) => {
                chosen.some(isa, (sketched, whole[0].rows()), needed, pages);
            }
        }
    }

    fn attending(&mut self, step: Step) -> Vec<Attending<'_>> {
        let (head, Work { queries, chosen, parts, reads, .. }) = (self.head, &mut *self.work);
        let runs = chosen
            .of(head)
            .into_iter()
            .flat_map(|(pages, visits)| runs_of(visits).map(move |run| (pages, run)));
        let runs: Vec<(&Pages, &[(u32, u8)])> = runs.collect();
        reads.clear();
        reads.resize(runs.len(), 0);
        let states = cleared(parts, runs.len(), step.shape.group(), step.shape.head_dim);
        let with_states = runs.into_iter().zip(states).zip(reads);
        with_states
            .map(|(((pages, visits), state), read)| Attending { queries, pages, visits, state, read })
            .collect()
    }

    fn merge(&mut self, step: Step) {
        let (head, work) = (self.head, &mut *self.work);
        work.read += work.reads.iter().sum::<usize>() as u64;
        let d = step.shape.head_dim;
        if let Some((first, others)) = work.parts.split_first_mut() {
            others.iter().for_each(|part| first.merge(part));
            let outputs = &head.calibration.heads[head.index].outputs;
            let (mean, spread) = work.scales[2 * d..].split_at(d);
            let turn = |acc: &[f32], sums: &[f32], out: &mut [f32]| {
                let mut of_channels = acc.to_vec();
                for (row, sum) in of_channels.chunks_exact_mut(d).zip(sums) {
                    row.iter_mut().zip(spread).zip(mean).for_each(|((x, s), m)| *x = *x * s + sum * m);
                }
                rotate(step.isa, &of_channels, outputs, out, d);
            };
            work.whole[0].merge(&first.turned(d, turn));
        }
        work.whole[0].finish(self.out);
    }
}

/// Some pages whose tiles' weights are to be sketched.
struct Sketching<'a> {
    /// And their shifts.
    queries: (&'a Queries, &'a [f32]),
    pages: &'a Pages,
    range: Range<usize>,
    /// `[R, tiles]`, by rows.
    out: Vec<&'a mut [f32]>,
    read: &'a mut usize,
}

impl Sketching<'_> {
    fn run(&mut self, isa: Isa) {
        *self.read = sketch(isa, self.queries, (self.pages, self.range.clone()), &mut self.out);
    }
}

/// Some tiles, to be attended to.
struct Attending<'a> {
    queries: &'a Queries,
    pages: &'a Pages,
    visits: &'a [(u32, u8)],
    state: &'a mut AttnState,
    read: &'a mut usize,
}

impl Attending<'_> {
    fn run(&mut self, isa: Isa) {
        *self.read = attend_tiles(isa, self.queries, self.pages, self.visits, self.state);
    }
}

/// Visits of pages, cut where a task has enough tiles.
fn runs_of(visits: &[(u32, u8)]) -> impl Iterator<Item = &[(u32, u8)]> {
    let mut rest = visits;
    std::iter::from_fn(move || {
        let mut tiles = 0;
        let enough = |&(_, of_page): &(u32, u8)| {
            tiles += of_page.count_ones();
            tiles >= ATTENDED_PER_TASK
        };
        let count = rest.iter().position(enough).map_or(rest.len(), |last| last + 1);
        let (run, after) = rest.split_at(count);
        rest = after;
        (!run.is_empty()).then_some(run)
    })
}

impl LayeredHead {
    /// Tokens of pages, sealed ones and the newest.
    pub(crate) fn in_pages(&self) -> usize {
        self.segments().into_iter().map(|segment| segment.pages.tokens()).sum()
    }

    /// The pages that may be left out: those of the prompt and of the tail.
    pub(crate) fn selectable(&self) -> [(&Pages, Range<usize>); 2] {
        [&self.prompt, &self.tail].map(|segment| (&segment.pages, 0..segment.pages.pages().len()))
    }

    /// Runs of them, in order.
    fn sketched_runs(&self) -> Vec<(&Pages, Range<usize>)> {
        let mut runs = vec![];
        for (pages, Range { end, .. }) in self.selectable() {
            let starts = (0..end).step_by(SKETCHED_PER_TASK);
            runs.extend(starts.map(|first| (pages, first..(first + SKETCHED_PER_TASK).min(end))));
        }
        runs
    }

    /// Of what every step reads.
    fn bytes_of_turn(&self) -> usize {
        let calibration = &self.calibration.heads[self.index];
        let matrices = size_of_val(&*calibration.queries) + size_of_val(&*calibration.outputs);
        let exact = size_of_val(&*self.sinks) + self.buffer.as_ref().map_or(0, |buffer| buffer.bytes_read());
        exact + matrices + self.scales.bytes()
    }
}

/// Of vectors of a multiple of 16 elements, in as many sums.
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sums = [0.0; 16];
    for (x, y) in x.chunks_exact(16).zip(y.chunks_exact(16)) {
        sums.iter_mut().zip(x).zip(y).for_each(|((sum, x), y)| *sum += x * y);
    }
    sums.iter().sum()
}
