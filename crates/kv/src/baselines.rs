//! What do published methods make of the same keys and values?
//!
//! Each file is one method, as its paper and its authors' code have it, so that a comparison is with the method
//! and not with a caricature: real bits, real bytes, its own selection. None has kernels of its own: what a step
//! attends to is decoded to f32 a few tokens at a time ([`Rows`]) and folded into the attention state. They share
//! nothing but the trait below.

mod kivi;
mod oracle;
mod quantized;
mod quest;
mod snapkv;
mod strawman;

#[cfg(test)]
mod tests;

use crate::{KvBytes, Step, cleared};
use half::f16;
use half::slice::HalfFloatSliceExt;
use mosaickv_kernels::{AttnState, Isa};
use std::fmt::Debug;

pub use kivi::Kivi;
pub use quantized::{GgmlType, Quantized, Turn};
pub use quest::Quest;
pub use snapkv::SnapKv;
pub use strawman::Strawman;

pub(crate) use kivi::KiviHead;
pub(crate) use quantized::QuantizedHead;
pub(crate) use quest::QuestHead;
pub(crate) use snapkv::{RecentQueries, SnapKvHead, WINDOW};
pub(crate) use strawman::StrawmanHead;

#[cfg(doc)]
use mosaickv_kernels::rows::Rows;

/// Tokens that one task of a decode step decodes and attends to; fixed, so that results do not depend on threads.
const TOKENS_PER_TASK: usize = 1024;

/// One KV head of a layer that a published method has compressed.
pub(crate) trait Head: Debug + Send + Sync {
    /// Positions seen, whether or not they are still stored.
    fn tokens(&self) -> usize;

    /// Adds a token, its key `[D]` and value `[D]`.
    fn append(&mut self, key: &[f32], value: &[f32]);

    /// Whether the next token makes enough work to spread the heads over threads.
    fn is_due(&self) -> bool;

    /// What the scaled queries `[R, D]` will attend to.
    fn plan(&self, isa: Isa, queries: &[f32]) -> Plan;

    /// Tasks of a decode step, at least 1 and the same for all heads of a layer.
    fn runs(&self) -> usize;

    /// Folds one task's tokens into `state` `[R, D]`.
    fn fold(&self, isa: Isa, plan: &Plan, run: usize, state: &mut AttnState);

    /// Bytes of the cache that a step with this plan reads.
    fn bytes_read(&self, plan: &Plan) -> usize;

    /// Adds the bytes allocated, all but the head's own header.
    fn count(&self, bytes: &mut KvBytes);

    fn check(&self) -> Result<(), String>;

    /// By the format's definition in f64: keys and values `[T, D]` that query `row` of the scaled `[R, D]`
    /// attends to.
    fn oracle_rows(&self, queries: &[f64], row: usize) -> (Vec<f64>, Vec<f64>);

    /// A copy that shares what is sealed.
    fn boxed(&self) -> Box<dyn Head>;
}

impl Clone for Box<dyn Head> {
    fn clone(&self) -> Box<dyn Head> {
        self.boxed()
    }
}

/// What one step attends to in one head.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// `[R, D]`, scaled.
    queries: Vec<f32>,
    /// The same where and as wide as the format's keys are, if that is elsewhere.
    rotated: Vec<f32>,
    /// Token blocks chosen, ascending: one list for each query, one for all, or none if nothing is selected.
    blocks: Vec<Vec<u32>>,
}

impl Plan {
    /// Everything.
    fn all(queries: &[f32]) -> Plan {
        Plan { queries: queries.to_vec(), ..Plan::default() }
    }
}

/// One token: `queries` `[H, D]`. Tasks are runs of tokens of one head; their states are merged in order.
pub(crate) fn decode(
    step: Step,
    states: &mut Vec<AttnState>,
    heads: &[Box<dyn Head>],
    queries: &[f32],
    out: &mut [f32],
) -> u64 {
    let (group, d, isa) = (step.shape.group(), step.shape.head_dim, step.isa);
    let scaled: Vec<f32> = queries.iter().map(|q| q * step.scale).collect();
    let mut plans: Vec<Plan> = heads.iter().map(|_| Plan::default()).collect();
    step.pool
        .for_each(&mut plans, |g, plan| *plan = heads[g].plan(isa, &scaled[g * group * d..][..group * d]));
    let runs = heads[0].runs();
    let states = cleared(states, heads.len() * runs, group, d);
    step.pool.for_each(states, |task, state| {
        let g = task / runs;
        heads[g].fold(isa, &plans[g], task % runs, state);
    });
    for (states, out) in states.chunks_exact_mut(runs).zip(out.chunks_exact_mut(group * d)) {
        let (first, rest) = states.split_first_mut().expect("a head has at least one run");
        rest.iter().for_each(|state| first.merge(state));
        first.finish(out);
    }
    heads.iter().zip(&plans).map(|(head, plan)| head.bytes_read(plan) as u64).sum()
}

/// The nearest f16; what is beyond them becomes the largest.
fn to_f16(x: f32) -> f16 {
    f16::from_f32(x.clamp(-65504.0, 65504.0))
}

/// `x` as f32, into `out` of the same length.
fn widen(x: &[f16], out: &mut [f32]) {
    x.convert_to_f32_slice(out);
}

/// The sum of `term(a[i], b[i])`, in an order that a compiler can keep in vectors.
#[inline(always)]
fn sum_over(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = (a.chunks_exact(LANES), a.len() / LANES * LANES);
    for (a, b) in chunks.zip(b.chunks_exact(LANES)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += term(*a, *b);
        }
    }
    let tail: f32 = a[rest..].iter().zip(&b[rest..]).map(|(a, b)| term(*a, *b)).sum();
    lanes.iter().sum::<f32>() + tail
}

/// Packs codes of `BITS` bits (2 or 4), 32 of them, lowest bits first: code `i` goes to byte `i % n` of
/// `n = 4 * BITS`, as in ggml's `q4_0`, so that each shift of the bytes is a run of neighbours.
#[inline(always)]
fn pack<const BITS: usize>(codes: &[u8; 32], out: &mut [u8]) {
    let n = 4 * BITS;
    out.fill(0);
    for (i, code) in codes.iter().enumerate() {
        out[i % n] |= code << (i / n * BITS);
    }
}

/// The codes that [`pack`] packed, in their order, as numbers: 32 of them.
#[inline(always)]
fn unpack<const BITS: usize>(packed: &[u8], out: &mut [f32]) {
    let n = 4 * BITS;
    let mask = (1u8 << BITS) - 1;
    for (run, out) in out.chunks_exact_mut(n).enumerate() {
        for (x, byte) in out.iter_mut().zip(packed) {
            *x = f32::from(byte >> (run * BITS) & mask);
        }
    }
}
