//! One decode step over layered pages.
//!
//! Three jobs of the pool over all heads of all caches that take the step together: turn the queries (and attend to
//! the exact tokens), attend to runs of pages, merge. Partial states are merged in order in the calibration's channels, then
//! leave them and meet the exact tokens. Runs are cut by pages alone, so that results depend neither on
//! threads nor on the other caches.

use super::{LayeredHead, SINKS};
use crate::{Step, cleared};
use half::f16;
use mosaickv_kernels::AttnState;
use mosaickv_kernels::exact::{self, Visible};
use mosaickv_kernels::layered::{Pages, Queries, attend};
use mosaickv_kernels::rotate::rotate;
use mosaickv_kernels::rows::Rows;
use std::ops::Range;

/// Pages that one task attends to.
const PAGES_PER_TASK: usize = 16;

/// What a step works with in one head, kept between steps for its allocations.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// Queries `[R, D]`, scaled.
    scaled: Vec<f32>,
    /// The same in the calibration's channels, times the keys' spreads.
    turned: Vec<f32>,
    /// `[R]`: a query's product with the keys' means, which is in every score.
    offsets: Vec<f32>,
    /// Both, as the kernel wants them.
    queries: Queries,
    /// One state: the exact tokens, in the end all.
    whole: Vec<AttnState>,
    /// Of each run of pages, in the calibration's channels over spreads.
    parts: Vec<AttnState>,
    /// Bytes that the step reads.
    pub(crate) read: u64,
}

/// One head of one cache in a step.
type Lane<'a> = crate::Lane<'a, LayeredHead, Work>;

/// One token in each of some caches: `lanes` are all of their heads.
pub(crate) fn decode(step: Step, lanes: &mut [Lane]) {
    step.pool.for_each(lanes, |_, lane| lane.turn(step));
    let mut tasks: Vec<Attending> = lanes.iter_mut().flat_map(|lane| lane.attending(step)).collect();
    step.pool.for_each(&mut tasks, |_, Attending { queries, pages, range, state }| {
        attend(step.isa, queries, pages, range.clone(), state);
    });
    step.pool.for_each(lanes, |_, lane| lane.merge(step));
}

impl Lane<'_> {
    fn turn(&mut self, step: Step) {
        let (head, work) = (self.head, &mut *self.work);
        let (rows, d) = (step.shape.group(), step.shape.head_dim);
        work.scaled.clear();
        work.scaled.extend(self.queries.iter().map(|q| q * step.scale));
        work.turned.resize(rows * d, 0.0);
        rotate(step.isa, &work.scaled, &head.calibration.heads[head.index].queries, &mut work.turned, d);
        let (mean, spread) = (head.scales.key_mean(), head.scales.key_spread());
        work.offsets.clear();
        for query in work.turned.chunks_exact_mut(d) {
            work.offsets.push(query.iter().zip(mean).map(|(q, m)| q * m.to_f32()).sum());
            query.iter_mut().zip(spread).for_each(|(q, s)| *q *= s.to_f32());
        }
        work.queries.set(step.isa, &work.turned, &work.offsets);
        let [state] = cleared(&mut work.whole, 1, rows, d) else { unreachable!("one state was asked for") };
        let mut sinks = Rows::new(d, rows);
        let (keys, values) = sinks.push_many(SINKS);
        for (t, token) in head.sinks.chunks_exact(2 * d).enumerate() {
            widen(&token[..d], &mut keys[t * d..][..d]);
            widen(&token[d..], &mut values[t * d..][..d]);
        }
        sinks.fold(step.isa, &work.scaled, state);
        if let Some(buffer) = &head.buffer {
            exact::attend(step.isa, &work.scaled, buffer, Visible::All, state);
        }
        work.read = head.bytes_read() as u64;
    }

    fn attending(&mut self, step: Step) -> Vec<Attending<'_>> {
        let (head, work) = (self.head, &mut *self.work);
        let runs = head.runs();
        let states = cleared(&mut work.parts, runs.len(), step.shape.group(), step.shape.head_dim);
        let (with_states, queries) = (runs.into_iter().zip(states), &work.queries);
        with_states.map(|((pages, range), state)| Attending { queries, pages, range, state }).collect()
    }

    fn merge(&mut self, step: Step) {
        let (head, work) = (self.head, &mut *self.work);
        let d = step.shape.head_dim;
        if let Some((first, others)) = work.parts.split_first_mut() {
            others.iter().for_each(|part| first.merge(part));
            let outputs = &head.calibration.heads[head.index].outputs;
            let (mean, spread) = (head.scales.value_mean(), head.scales.value_spread());
            let turn = |acc: &[f32], sums: &[f32], out: &mut [f32]| {
                let element =
                    |(i, x): (usize, &f32)| x * spread[i % d].to_f32() + sums[i / d] * mean[i % d].to_f32();
                rotate(step.isa, &acc.iter().enumerate().map(element).collect::<Vec<_>>(), outputs, out, d);
            };
            work.whole[0].merge(&first.turned(d, turn));
        }
        work.whole[0].finish(self.out);
    }
}

/// Some pages, to be attended to.
struct Attending<'a> {
    queries: &'a Queries,
    pages: &'a Pages,
    range: Range<usize>,
    state: &'a mut AttnState,
}

impl LayeredHead {
    /// Runs of pages, in order.
    fn runs(&self) -> Vec<(&Pages, Range<usize>)> {
        let mut runs = vec![];
        for pages in [&self.prompt.pages, &self.tail.pages] {
            let count = pages.pages().len();
            let starts = (0..count).step_by(PAGES_PER_TASK);
            runs.extend(starts.map(|first| (pages, first..(first + PAGES_PER_TASK).min(count))));
        }
        runs
    }

    fn bytes_read(&self) -> usize {
        let calibration = &self.calibration.heads[self.index];
        let matrices = size_of_val(&*calibration.queries) + size_of_val(&*calibration.outputs);
        let exact = size_of_val(&*self.sinks) + self.buffer.as_ref().map_or(0, |buffer| buffer.bytes_read());
        exact + matrices + self.scales.bytes() + self.prompt.pages.bytes() + self.tail.pages.bytes()
    }
}

fn widen(x: &[f16], out: &mut [f32]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out = x.to_f32());
}
