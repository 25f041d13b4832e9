//! A prompt of all layers becomes pages: statistics of each head, one plan, which is tried out on a sample of its pages, a second
//! plan where a head turned out [worse than planned](super::distortion), then the codes.

use super::asked::Asked;
use super::distortion::{Distortion, is_out_of_line};
use super::importance::{Samples, Weights, weigh};
use super::plan::{Channels, Head, HeadPlan, fitting, plan};
use super::select::PageReads;
use super::window::Newest;
use super::{
    Calibration, Dropping, HeadCalibration, Layered, LayeredHead, Places, SINKS, Scales, Segment, fine,
};
use crate::KvShape;
use crate::device::{Encoder, Planned};
use crate::exact::ExactHead;
use crate::packed::rows;
use half::f16;
use half::slice::HalfFloatSliceExt;
use mosaickv_kernels::Pool;
use mosaickv_kernels::exact::PAGE_TOKENS as EXACT_TOKENS;
use mosaickv_kernels::layered::{GROUP, PAGE_TOKENS, Pages, Profile, Width};
use mosaickv_kernels::rotate::multiply;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Share of a head's mean weight that every token gets: what nobody has asked for yet may be asked for later.
const FLOOR: f32 = 0.3;

/// The same of all layers' mean weight, where layers have one head.
const ALIKE: f32 = 10.0;

/// Bits an element below which such layers lose needles (Gemma 3 270M: KL 0.08 at 3.2, 0.14 at 2.7, 1.5 at 2).
const SAFE_BITS: f32 = 3.0;

/// A layer that is to be compressed.
pub(crate) struct Prompt<'a> {
    pub(crate) layer: usize,
    pub(crate) heads: Vec<ExactHead>,
    pub(crate) samples: &'a Samples,
}

/// The layers' heads, which together take what the settings leave them beside `others` bytes of the same cache. Layers of
/// fewer than 2,048 tokens are not for this. The prompt's pages are encoded by a device, if there is an encoder.
pub(crate) fn compress(
    (pool, encoder): (&Pool, Option<&mut Encoder>),
    shape: KvShape,
    calibration: &Arc<Calibration>,
    prompts: Vec<Prompt>,
    (settings, others, keep): (Layered, usize, Places),
) -> Vec<Vec<LayeredHead>> {
    let Some(tokens) = prompts.first().map(|prompt| prompt.heads[0].tokens()) else { return vec![] };
    assert!(tokens >= Layered::LEAST_TOKENS, "a prompt of {tokens} tokens: too few");
    let heads = prompts.len() * shape.kv_heads;
    let exact = heads * tokens * shape.head_dim * 2 * size_of::<f16>();
    let budget = settings.target.budget(exact, others);
    let mut jobs: Vec<(Job, Option<(Scales, Head)>)> = Vec::new();
    for prompt in &prompts {
        let bits = 16.0 * budget / exact as f32;
        let newest = Newest::new(tokens, bits, (prompt.layer, shape.layers));
        let of = (prompt.layer, &prompt.heads[..]);
        let of_layer = Job::of_layer(of, prompt.samples, (shape, calibration), newest);
        jobs.extend(of_layer.into_iter().map(|job| (job, None)));
    }
    let start = Instant::now();
    pool.for_each(&mut jobs, |_, (job, out)| *out = Some(job.observe()));
    let observed = start.elapsed();
    let (jobs, found): (Vec<Job>, Vec<_>) = jobs.into_iter().unzip();
    let (scales, mut heads): (Vec<Scales>, Vec<Head>) = found.into_iter().flatten().unzip();
    for (prompt, heads) in prompts.iter().zip(heads.chunks_mut(shape.kv_heads)) {
        let weight = calibration.layer_weights[prompt.layer];
        for Weights { keys, values } in heads.iter_mut().map(|head| &mut head.weights) {
            keys.iter_mut().chain(values).for_each(|w| *w = (*w * weight).max(1e-30));
        }
        guard(heads, settings.drop);
    }
    if shape.kv_heads == 1 {
        share_alike(&mut heads);
        let bits = 16.0 * budget / exact as f32;
        if bits < SAFE_BITS {
            tracing::warn!(
                "{bits:.1} bits an element, and layers of one KV head: a detail of the prompt may be lost; --kv layered:5 keeps more"
            );
        }
    }
    let scales: Vec<Arc<Scales>> = scales.into_iter().map(Arc::new).collect();
    let mut stored = share(pool, &jobs, &heads, budget);
    let mut tried: Vec<Option<Distortion>> = vec![None; jobs.len()];
    pool.for_each(&mut tried, |i, out| *out = Some(jobs[i].try_out(&scales[i], &stored[i].1, &heads[i])));
    let tried: Vec<Distortion> = tried.into_iter().flatten().collect();
    if fall_back(&jobs, &tried, &mut heads) {
        stored = share(pool, &jobs, &heads, budget);
    }
    let planned = start.elapsed();
    let mut made: Vec<(Option<Pages>, Option<LayeredHead>)> = match encoder {
        Some(encoder) => {
            let of_head = |i: usize| jobs[i].planned(&scales[i], &stored[i].1);
            let heads: Vec<Planned> = (0..jobs.len()).map(of_head).collect();
            encoder.encode(pool, &heads).into_iter().map(|pages| (pages, None)).collect()
        }
        None => jobs.iter().map(|_| (None, None)).collect(),
    };
    let by_device = start.elapsed();
    pool.for_each(&mut made, |i, (pages, made)| {
        let pages = pages.take().unwrap_or_else(|| jobs[i].pages(&scales[i], &stored[i].1));
        *made = Some(jobs[i].head(&scales[i], (&stored[i], pages), (tried[i].ratios(), settings, keep)));
    });
    tracing::debug!(
        "{tokens} tokens of {heads_count} heads: statistics {observed:.2?}, plan {:.2?}, pages by the device {:.2?}, all else {:.2?}",
        planned - observed,
        by_device - planned,
        start.elapsed() - by_device,
        heads_count = jobs.len(),
    );
    let mut made = made.into_iter().filter_map(|(_, made)| made);
    prompts.iter().map(|_| made.by_ref().take(shape.kv_heads).collect()).collect()
}

/// How a head is stored: the profiles of its window, and its plan.
type Stored = ((Profile, Profile), HeadPlan);

/// Shares out `budget` bytes among the heads.
fn share(pool: &Pool, jobs: &[Job], heads: &[Head], budget: f32) -> Vec<Stored> {
    let d = jobs[0].shape.head_dim;
    let windows: Vec<(Profile, Profile)> =
        heads.iter().zip(jobs).map(|(head, job)| fitting(head, job.newest.bytes_of_page(d))).collect();
    let of_windows = jobs.iter().zip(&windows).map(|(job, profiles)| job.newest.bytes(d, *profiles));
    let fixed = jobs.len() * fixed_bytes(d) + of_windows.sum::<usize>();
    windows.into_iter().zip(plan(pool, heads, budget - fixed as f32)).collect()
}

/// Whether a head would be stored so much worse than planned that all must be planned once more, with what is now known of it.
fn fall_back(jobs: &[Job], tried: &[Distortion], heads: &mut [Head]) -> bool {
    let (mut count, mut worst) = (0, (0.0, 0));
    for (i, (distortion, head)) in tried.iter().zip(&mut *heads).enumerate() {
        let ratio = distortion.ratios().into_iter().fold(0.0, f32::max);
        if is_out_of_line(ratio) {
            distortion.amend(head);
            count += 1;
            worst = if ratio > worst.0 { (ratio, i) } else { worst };
        }
    }
    if count > 0 {
        let (ratio, job) = (worst.0, &jobs[worst.1]);
        let (layer, g) = (job.index / job.shape.kv_heads, job.index % job.shape.kv_heads);
        let all = heads.len();
        tracing::info!(
            "{count} of {all} heads fall back to safer profiles: their errors would weigh up to {ratio:.1} times what was planned (layer {layer}, KV head {g})"
        );
    }
    count > 0
}

/// Bytes of a head that no plan changes: sinks, means and spreads, headers.
fn fixed_bytes(d: usize) -> usize {
    let sinks = SINKS * 2 * d * size_of::<f16>();
    let scales = Scales { numbers: vec![f16::ZERO; 4 * d].into_boxed_slice() }.bytes();
    sinks + scales + size_of::<LayeredHead>() + 4 * (crate::exact::ARC_BYTES + size_of::<Segment>())
}

/// Every token's weight gets a share of the mean.
pub(super) fn lift(weights: &mut Weights, share: f32) {
    for weights in [&mut weights.keys, &mut weights.values] {
        let mean = weights.iter().sum::<f32>() / weights.len() as f32;
        // Where no query judged any token all weigh the same.
        let floor = if mean > 1e-20 { share * mean } else { 1e-6 };
        weights.iter_mut().for_each(|w| *w += floor);
    }
}

/// Tokens weigh nearly alike in all layers: where a layer has one head, no other stands in for one of which plain text asks
/// little. (Gemma 3 270M at a ratio of 4: needles' KL 0.014 in place of 0.061.)
fn share_alike(heads: &mut [Head]) {
    let mean_of = |of: fn(&Weights) -> &[f32]| {
        let all = heads.iter().map(|head| of(&head.weights));
        all.clone().flatten().sum::<f32>() / all.map(<[f32]>::len).sum::<usize>() as f32
    };
    let (keys, values) =
        (ALIKE * mean_of(|weights| &weights.keys), ALIKE * mean_of(|weights| &weights.values));
    for Weights { keys: of_keys, values: of_values } in heads.iter_mut().map(|head| &mut head.weights) {
        of_keys.iter_mut().for_each(|w| *w += keys);
        of_values.iter_mut().for_each(|w| *w += values);
    }
}

/// Each token must keep a key of its own in the head of its layer that would lose most by it.
pub(super) fn guard(heads: &mut [Head], drop: Dropping) {
    if drop == Dropping::Any {
        return;
    }
    for t in 0..heads[0].guarded.len() {
        let weight = |head: &Head| head.weights.keys[t];
        let most = (0..heads.len()).max_by(|&a, &b| weight(&heads[a]).total_cmp(&weight(&heads[b])));
        heads[most.expect("a layer has heads")].guarded[t] = true;
    }
}

/// One head of a prompt.
struct Job<'a> {
    exact: &'a ExactHead,
    calibration: &'a Arc<Calibration>,
    /// Which of the calibration's heads.
    index: usize,
    samples: &'a Samples,
    shape: KvShape,
    /// How the newest tokens are kept.
    newest: Newest,
}

impl<'a> Job<'a> {
    /// The heads of a layer.
    fn of_layer(
        (layer, heads): (usize, &'a [ExactHead]),
        samples: &'a Samples,
        (shape, calibration): (KvShape, &'a Arc<Calibration>),
        newest: Newest,
    ) -> Vec<Job<'a>> {
        let of_head = |(g, exact)| {
            let index = layer * shape.kv_heads + g;
            Job { exact, calibration, index, samples, shape, newest }
        };
        heads.iter().enumerate().map(of_head).collect()
    }

    /// The tokens that the plan is for: neither the sinks nor the newest.
    fn middle(&self) -> Range<usize> {
        SINKS..self.exact.tokens() - self.newest.tokens()
    }

    /// Keys and values `[n, D]` of some tokens.
    fn rows(&self, tokens: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let d = self.shape.head_dim;
        let first = tokens.start / EXACT_TOKENS;
        let pages = self.exact.pages().skip(first).take(tokens.end.div_ceil(EXACT_TOKENS) - first);
        let (mut keys, mut values) = rows(&pages.collect::<Vec<_>>());
        for x in [&mut keys, &mut values] {
            x.drain(..(tokens.start - first * EXACT_TOKENS) * d);
            x.truncate(tokens.len() * d);
        }
        (keys, values)
    }

    fn matrices(&self) -> &HeadCalibration {
        &self.calibration.heads[self.index]
    }

    /// What the head's tokens and channels are, and weigh.
    fn observe(&self) -> (Scales, Head) {
        let KvShape { heads, head_dim: d, kv_heads, .. } = self.shape;
        let scale = (d as f32).sqrt().recip();
        let (keys, values) = self.rows(0..self.exact.tokens());
        let mut turned_values = turned(&values, &self.matrices().values);
        let of_group = self.shape.group() * d;
        let span = self.index % kv_heads * of_group..(self.index % kv_heads + 1) * of_group;
        let (positions, queries) = self.samples.of_group(heads * d, span, scale);
        let Weights { keys: of_keys, values: of_values } =
            weigh((&positions, &queries), &keys, &turned_values, d);
        let middle = self.middle();
        let elements = middle.start * d..middle.end * d;
        let mut turned_keys = turned(&keys[elements.clone()], &self.matrices().keys);
        let mut numbers = Vec::with_capacity(4 * d);
        let keys = observe(&mut turned_keys, d, scale, &mut numbers);
        let values = observe(&mut turned_values[elements], d, 1.0, &mut numbers);
        let mut weights =
            Weights { keys: of_keys[middle.clone()].to_vec(), values: of_values[middle.clone()].to_vec() };
        lift(&mut weights, FLOOR);
        let head = Head { keys, values, weights, guarded: vec![false; middle.len()] };
        (Scales { numbers: numbers.into_boxed_slice() }, head)
    }

    /// What errors weigh in a sample of the plan's pages, where `observed` tells what tokens and channels do.
    fn try_out(&self, scales: &Scales, plan: &HeadPlan, observed: &Head) -> Distortion {
        let (d, sample) = (self.shape.head_dim, plan.sample());
        let (keys, values) = self.rows(self.middle());
        let gather = |x: &[f32]| gathered(x, &sample.order, d);
        let (keys, values) = scales.coordinates(self.matrices(), &gather(&keys), &gather(&values));
        let mut pages = Pages::new(d);
        let of_pages = keys.chunks(PAGE_TOKENS * d).zip(values.chunks(PAGE_TOKENS * d));
        for (page, profiles) in of_pages.zip(&sample.pages) {
            pages.push(page, *profiles);
        }
        Distortion::of(&pages, (&keys, &values), (observed, &sample))
    }

    /// What a device is to encode.
    fn planned<'b>(&'b self, scales: &'b Scales, plan: &'b HeadPlan) -> Planned<'b> {
        let (layer, head) = (self.index / self.shape.kv_heads, self.index % self.shape.kv_heads);
        let (matrices, first) = (self.matrices(), self.middle().start);
        Planned { layer, head, matrices, scales, first, order: &plan.order, pages: &plan.pages }
    }

    /// The same encoded here.
    fn pages(&self, scales: &Scales, plan: &HeadPlan) -> Pages {
        let (keys, values) = self.rows(self.middle());
        let (keys, values) = scales.coordinates(self.matrices(), &keys, &values);
        let mut pages = Pages::new(self.shape.head_dim);
        push(&mut pages, (&keys, &values), plan);
        pages.shrink();
        pages
    }

    /// The head as it is to be stored, with its prompt's pages.
    fn head(
        &self,
        scales: &Arc<Scales>,
        ((profiles, plan), pages): (&Stored, Pages),
        (distortion, settings, keep): ([f32; 2], Layered, Places),
    ) -> LayeredHead {
        let d = self.shape.head_dim;
        let (keys, values) = self.rows(0..SINKS);
        let sinks = keys.chunks_exact(d).zip(values.chunks_exact(d)).flat_map(|(key, value)| [key, value]);
        let middle = self.middle();
        let dropped = middle.len() - plan.order.len();
        let mut head = LayeredHead {
            calibration: self.calibration.clone(),
            index: self.index,
            sinks: sinks.flatten().map(|&x| to_f16(x)).collect(),
            scales: scales.clone(),
            prompt: Arc::new(Segment { pages, dropped, places: keep.of(middle.start, &plan.order) }),
            tail: Segment::empty(d),
            leaving: Segment::empty(d),
            window: Segment::empty(d),
            profiles: *profiles,
            rate: plan.bytes / middle.len() as f32,
            distortion,
            asked: Asked::default(),
            reads: PageReads::default(),
            stay: self.newest.stay as u8,
            settings,
            buffer: None,
        };
        let (keys, values) = self.rows(middle.end..self.exact.tokens());
        let buffered = keys.len() - self.newest.buffered * d;
        head.fill(&keys[buffered..], &values[buffered..]);
        let (keys, values) = scales.coordinates(self.matrices(), &keys[..buffered], &values[..buffered]);
        let mut window = Pages::new(d);
        let of_page = PAGE_TOKENS * d;
        let (mut keys, mut values) = (&keys[..], &values[..]);
        while keys.len() > of_page {
            window.push((&keys[..of_page], &values[..of_page]), head.profiles);
            (keys, values) = (&keys[of_page..], &values[of_page..]);
        }
        window.push((keys, values), (fine(d), fine(d)));
        window.shrink();
        head.window = Arc::new(Segment::of(window));
        head
    }
}

/// Adds the plan's pages of `keys` and `values` `[T, D]` over spreads.
pub(super) fn push(pages: &mut Pages, (keys, values): (&[f32], &[f32]), plan: &HeadPlan) {
    let d = pages.head_dim();
    for (tokens, profiles) in plan.order.chunks(PAGE_TOKENS).zip(&plan.pages) {
        pages.push((&gathered(keys, tokens, d), &gathered(values, tokens, d)), *profiles);
    }
}

/// The rows of some tokens among those of `x` `[T, D]`.
pub(super) fn gathered(x: &[f32], tokens: &[u32], d: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(tokens.len() * d);
    tokens.iter().for_each(|&t| out.extend_from_slice(&x[t as usize * d..][..d]));
    out
}

/// Means and spreads of the channels of `x` `[T, D]`, appended to `numbers`, and what is left, as which `x` returns.
fn observe(x: &mut [f32], d: usize, unit: f32, numbers: &mut Vec<f16>) -> Channels {
    let tokens = (x.len() / d) as f32;
    let (mut mean, mut square) = (vec![0.0f32; d], vec![0.0f32; d]);
    for row in x.chunks_exact(d) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
    }
    let mean: Vec<f16> = mean.into_iter().map(|sum| to_f16(sum / tokens)).collect();
    let wide: Vec<f32> = mean.iter().map(|x| x.to_f32()).collect();
    for row in x.chunks_exact(d) {
        let less = row.iter().zip(&wide).map(|(x, m)| x - m);
        square.iter_mut().zip(less).for_each(|(s, x)| *s += x * x);
    }
    // A channel that never changes has the least spread that divides.
    let spread: Vec<f16> =
        square.iter().map(|s| to_f16((s / tokens).sqrt()).max(f16::MIN_POSITIVE)).collect();
    normalize(x, &mean, &spread);
    let channels = channels(x, &spread, unit);
    numbers.extend_from_slice(&mean);
    numbers.extend_from_slice(&spread);
    channels
}

/// What tokens `[T, D]` over `spread` say of the channels: squares in units of 1 over `unit`, and shares of escapes.
pub(super) fn channels(x: &[f32], spread: &[f16], unit: f32) -> Channels {
    let share = spread.len() as f32 / x.len() as f32;
    let mut variances = vec![0.0; spread.len()];
    for row in x.chunks_exact(spread.len()) {
        variances.iter_mut().zip(row).for_each(|(v, x)| *v += x * x * share);
    }
    variances.iter_mut().zip(spread).for_each(|(v, s)| *v *= (s.to_f32() * unit).powi(2));
    Channels { variances, escapes: escapes(x, spread.len()) }
}

/// The same of channels of this `spread` that are as wide as it says, without escapes.
pub(super) fn widths_of(spread: &[f16], unit: f32) -> Channels {
    let variances = spread.iter().map(|s| (s.to_f32() * unit).powi(2)).collect();
    Channels { variances, escapes: vec![[0.0; 3]; spread.len() / GROUP] }
}

/// The shares of escapes among elements `[T, D]` in units of their channels' spreads, by groups of channels and widths.
fn escapes(x: &[f32], d: usize) -> Vec<[f32; 3]> {
    let mut escapes = vec![[0.0; 3]; d / GROUP];
    let share = 1.0 / (x.len() / d * GROUP) as f32;
    for row in x.chunks_exact(d) {
        for (group, escapes) in row.chunks_exact(GROUP).zip(&mut escapes) {
            // Few are beyond the narrowest range.
            if group.iter().fold(0.0, |m: f32, x| m.max(x.abs())) <= Width::Two.range() {
                continue;
            }
            for x in group {
                for (width, share_of) in Width::ALL.iter().zip(&mut *escapes) {
                    *share_of += if x.abs() > width.range() { share } else { 0.0 };
                }
            }
        }
    }
    escapes
}

/// Vectors `[T, D]` times a matrix of the calibration.
pub(super) fn turned(x: &[f32], matrix: &[f16]) -> Vec<f32> {
    let mut wide = vec![0.0; matrix.len()];
    matrix.convert_to_f32_slice(&mut wide);
    multiply(x, &wide, matrix.len().isqrt())
}

/// Takes the means from vectors `[T, D]` and divides them by the spreads, in place.
pub(super) fn normalize(x: &mut [f32], mean: &[f16], spread: &[f16]) {
    let mean: Vec<f32> = mean.iter().map(|x| x.to_f32()).collect();
    let inverse: Vec<f32> = spread.iter().map(|x| x.to_f32().recip()).collect();
    for row in x.chunks_exact_mut(mean.len()) {
        for ((x, m), s) in row.iter_mut().zip(&mean).zip(&inverse) {
            *x = (*x - m) * s;
        }
    }
}

fn to_f16(x: f32) -> f16 {
    f16::from_f32(x.clamp(-65504.0, 65504.0))
}
