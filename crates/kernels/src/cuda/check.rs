//! Do kernels compute what they should? Steps on fresh random inputs, with poisoned outputs, against attention in f64.
//!
//! Tests run this emulated, `examples/gpu_check.rs` on a device. What is compared is an error, relative to the largest output.

pub mod dense;
pub mod encode;
pub mod packed;

use super::layered::{CODE_OF_ONE, CODES_PER_OCTAVE, Choice, Head, LEAST_PART, Layered, Rotations, Scales};
use super::{Error, Gpu, PARTS, Shape, exact};
use crate::isa::Isa;
use crate::layered::device::{DeviceBytes, device_bytes};
use crate::layered::{self, GROUP, Needed, Pages, Profile, Queries, SKETCH, TILE_TOKENS, TILES};
use crate::oracle::attend;
use half::f16;
use std::f64::consts::LOG2_E;

/// Why a check failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Failure {
    /// The device's.
    #[error(transparent)]
    Device(#[from] Error),
    /// Not what it should be.
    #[error("{0}")]
    Wrong(String),
}

fn wrong<T>(why: String) -> Result<T, Failure> {
    Err(Failure::Wrong(why))
}

/// Numbers that a seed decides.
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// 32 bits.
    pub fn bits(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    /// Below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        ((u64::from(self.bits()) * end as u64) >> 32) as usize
    }

    /// About normal: a sum of even numbers.
    pub fn normal(&mut self) -> f32 {
        (0..6).map(|_| self.bits() as f32 / (1u64 << 32) as f32).sum::<f32>() * 1.414 - 4.242
    }

    /// Some of them.
    pub fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }

    /// The same times `scale`, as f16.
    pub fn halves(&mut self, count: usize, scale: f32) -> Vec<f16> {
        (0..count).map(|_| f16::from_f32(self.normal() * scale)).collect()
    }
}

fn wide(x: &[f16]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

/// The largest difference, over the largest of what is right; what is no number is an endless one.
fn error(got: &[f32], want: &[f64]) -> f64 {
    let most = want.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
    let of = |(got, want): (&f32, &f64)| {
        let off = (f64::from(*got) - want).abs() / most;
        if off.is_nan() { f64::INFINITY } else { off }
    };
    got.iter().zip(want).map(of).fold(0.0, f64::max)
}

/// Exact tokens of some sequences, on the device and here.
struct ExactTokens {
    pool: exact::Pool,
    step: exact::Exact,
    /// Of each head keys and values `[T, D]`.
    heads: Vec<(Vec<f16>, Vec<f16>)>,
}

/// Of these lengths, in pages in mixed order with garbage behind the last token of each.
fn exact_tokens(
    gpu: &Gpu,
    random: &mut Random,
    shape: Shape,
    lengths: &[usize],
    parts: usize,
) -> Result<ExactTokens, Error> {
    let d = shape.head_dim;
    let counts: Vec<usize> = lengths.iter().map(|n| n.div_ceil(exact::PAGE_TOKENS)).collect();
    let all = counts.iter().sum::<usize>() + 3;
    let pool = exact::Pool::new(gpu, all, (shape.kv_heads, d))?;
    pool.data().poison()?;
    let mut free: Vec<u32> = (0..all as u32).collect();
    for i in (1..all).rev() {
        free.swap(i, random.below(i + 1));
    }
    let most = counts.iter().max().copied().unwrap_or(0).max(1);
    let mut step = exact::Exact::new(gpu, shape, most, (parts, exact::PAGE_TOKENS))?;
    let (mut sequences, mut heads) = (vec![], vec![]);
    for (&tokens, &count) in lengths.iter().zip(&counts) {
        let pages = free.split_off(free.len() - count);
        for head in 0..shape.kv_heads {
            let (keys, values) = (random.halves(tokens * d, 1.0), random.halves(tokens * d, 1.0));
            let of_pages = keys.chunks(exact::PAGE_TOKENS * d).zip(values.chunks(exact::PAGE_TOKENS * d));
            for (page, (keys, values)) in pages.iter().zip(of_pages) {
                pool.write((*page as usize, head), keys, values)?;
            }
            heads.push((keys, values));
        }
        sequences.push((tokens, pages));
    }
    step.set(&sequences)?;
    Ok(ExactTokens { pool, step, heads })
}

/// A step of exact attention over sequences of these lengths, cut into up to `parts` parts; the error of its outputs.
pub fn exact(gpu: &Gpu, seed: u64, shape: Shape, lengths: &[usize], parts: usize) -> Result<f64, Failure> {
    let (mut random, d) = (Random::new(seed), shape.head_dim);
    let tokens = exact_tokens(gpu, &mut random, shape, lengths, parts)?;
    let queries = random.halves(shape.queries() * d, 1.5);
    let (on_device, out) = (gpu.upload(&queries)?, gpu.alloc(shape.queries() * d * 4)?);
    out.poison()?;
    tokens.step.poison()?;
    let scale = (d as f32).sqrt().recip() * 2.0;
    tokens.step.attend(&tokens.pool, &on_device, scale)?;
    tokens.step.finish(&out)?;
    let got: Vec<f32> = out.read(shape.queries() * d)?;
    let mut want = vec![];
    for (i, query) in queries.chunks_exact(d).enumerate() {
        let (keys, values) = &tokens.heads[i / shape.rows];
        let output = attend(&wide(query), &wide(keys), &wide(values), scale.into());
        want.extend(if output.is_empty() { vec![0.0; d] } else { output });
    }
    Ok(error(&got, &want))
}

/// What a layered step is tried on.
#[derive(Clone, Debug)]
pub struct Case {
    /// Of the step.
    pub shape: Shape,
    /// Tokens in pages of each sequence.
    pub lengths: Vec<usize>,
    /// Exact tokens of each sequence that are attended to in any case; empty: none.
    pub known: Vec<usize>,
    /// Pages at the end that are always read.
    pub always: usize,
    /// Profiles of keys and values, one of which each page has.
    pub profiles: Vec<(Profile, Profile)>,
    /// What is read.
    pub choice: Choice,
    /// Spread of scores in octaves, about.
    pub spread: f32,
    /// One element in so many is an escape; 0: hardly any.
    pub escapes: usize,
}

impl Case {
    /// All is read, all profiles occur.
    pub fn whole(shape: Shape, lengths: &[usize]) -> Case {
        Case {
            shape,
            lengths: lengths.to_vec(),
            known: vec![],
            always: 0,
            profiles: profiles(shape.head_dim),
            choice: Choice::all(),
            spread: 3.0,
            escapes: 100,
        }
    }
}

/// So many groups of 8, 4 and 2 bits.
pub fn profile(eight: u8, four: u8, two: u8) -> Profile {
    Profile { eight, four, two }
}

/// All widths, groups without bits, and whole pages of nothing.
pub fn profiles(d: usize) -> Vec<(Profile, Profile)> {
    let all = (d / GROUP) as u8;
    let pairs = [
        (profile(0, 0, 0), profile(0, 0, 0)),
        (profile(all, 0, 0), profile(all, 0, 0)),
        (profile(0, all, 0), profile(0, 0, all)),
        (profile(0, 0, all), profile(0, all, 0)),
        (profile(1, 2, 3), profile(1, 1, 2)),
        (profile(0, 3, 3), profile(0, 0, 4)),
        (profile(2, 1, 1), profile(0, 1, 6)),
        (profile(1, 1, 0), profile(1, 0, 3)),
        (profile(0, 0, 1), profile(3, 2, 1)),
        (profile(1, 4, 2), profile(0, 2, 4)),
        (profile(3, 2, 0), profile(1, 4, 2)),
    ];
    pairs.into_iter().map(|(keys, values)| storable(d, keys, values)).collect()
}

/// What came out.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Of outputs.
    pub error: f64,
    /// Tiles that were read and tiles that there are.
    pub tiles: (usize, usize),
}

/// One head of a case.
struct Inputs {
    pages: Pages,
    bytes: DeviceBytes,
    scales: Scales,
    head: Head,
}

/// Profiles like those given that can be stored.
pub fn storable(d: usize, keys: Profile, values: Profile) -> (Profile, Profile) {
    let like =
        |profile: Profile, apart| profile.paired(d / GROUP, apart).next().expect("there is always one");
    (like(keys, SKETCH), like(values, 0))
}

fn inputs(gpu: &Gpu, random: &mut Random, case: &Case, tokens: usize) -> Result<Inputs, Error> {
    let d = case.shape.head_dim;
    let mut pages = Pages::new(d);
    let mut left = tokens;
    while left > 0 {
        // Pages that are not full occur anywhere.
        let n = if random.below(4) == 0 { 1 + random.below(64) } else { 64 }.min(left);
        left -= n;
        let (mut keys, mut values) = (random.normals(n * d), random.normals(n * d));
        if case.escapes > 0 {
            for x in keys.iter_mut().chain(&mut values) {
                if random.below(case.escapes) == 0 {
                    *x *= 4.0;
                }
            }
        }
        let (of_keys, of_values) = case.profiles[random.below(case.profiles.len())];
        pages.push((&keys, &values), (of_keys, of_values));
    }
    let scales = Scales {
        key_mean: random.halves(d, 0.3),
        key_spread: (0..d).map(|c| f16::from_f32(0.4 + 2.0 * 0.97f32.powi(c as i32))).collect(),
        value_mean: random.halves(d, 0.3),
        value_spread: (0..d).map(|c| f16::from_f32(0.3 + 0.98f32.powi(c as i32))).collect(),
    };
    let selectable = pages.pages().len().saturating_sub(case.always);
    let head = Head::upload(gpu, &pages, selectable, &scales)?;
    Ok(Inputs { bytes: device_bytes(&pages), pages, scales, head })
}

/// A layered step; its outputs and everything on the way.
pub fn layered(gpu: &Gpu, seed: u64, case: &Case) -> Result<Outcome, Failure> {
    let (mut random, shape) = (Random::new(seed), case.shape);
    let d = shape.head_dim;
    let known = match &case.known[..] {
        [] => None,
        lengths => Some(exact_tokens(gpu, &mut random, shape, lengths, 2)?),
    };
    let matrices: Vec<[Vec<f16>; 2]> = (0..shape.kv_heads)
        .map(|_| [0, 1].map(|_| random.halves(d * d, (d as f32).sqrt().recip())))
        .collect();
    let rotations: Result<Vec<_>, _> = matrices.iter().map(|[q, o]| Rotations::new(gpu, q, o, d)).collect();
    let rotations = rotations?;
    let mut heads = vec![];
    for &tokens in &case.lengths {
        for _ in 0..shape.kv_heads {
            heads.push(inputs(gpu, &mut random, case, tokens)?);
        }
    }
    let most = heads.iter().map(|h| h.pages.pages().len()).max().unwrap_or(0);
    let mut step = Layered::new(gpu, shape, (most, case.always), case.choice, (PARTS, LEAST_PART))?;
    step.set(&heads.iter().map(|h| &h.head).collect::<Vec<_>>(), &rotations.iter().collect::<Vec<_>>())?;
    let queries = random.halves(shape.queries() * d, 1.0);
    let (on_device, out) = (gpu.upload(&queries)?, gpu.alloc(shape.queries() * d * 4)?);
    // Turned queries have unit variance; keys in pages about 1.5 times a spread in the mean of channels.
    let scale = case.spread / (1.5 * (d as f32).sqrt()) / std::f32::consts::LOG2_E;
    let mut outcome = Outcome { error: 0.0, tiles: (0, 0) };
    // Twice: a step leaves things as the next one needs them.
    for _ in 0..2 {
        out.poison()?;
        step.poison()?;
        if let Some(known) = &known {
            known.step.poison()?;
            known.step.attend(&known.pool, &on_device, scale)?;
        }
        step.step(&on_device, scale, known.as_ref().map(|k| &k.step), &out)?;
        let got: Vec<f32> = out.read(shape.queries() * d)?;
        let check = Check { case, step: &step, known: known.as_ref(), matrices: &matrices, heads: &heads };
        outcome = check.run(&queries, scale, &got)?;
        if !step.is_clean()? {
            return wrong("counts of codes are left over".into());
        }
    }
    Ok(outcome)
}

struct Check<'a> {
    case: &'a Case,
    step: &'a Layered,
    known: Option<&'a ExactTokens>,
    matrices: &'a [[Vec<f16>; 2]],
    heads: &'a [Inputs],
}

/// Weights of tokens relative to `2^top`, and values weighted by them.
struct State {
    top: f64,
    sum: f64,
    acc: Vec<f64>,
}

impl State {
    fn of(scores: &[f64], values: impl Iterator<Item = Vec<f64>>, d: usize) -> State {
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut state = State { top, sum: 0.0, acc: vec![0.0; d] };
        for (score, value) in scores.iter().zip(values) {
            let weight = (score - top).exp2();
            state.sum += weight;
            state.acc.iter_mut().zip(value).for_each(|(x, v)| *x += weight * v);
        }
        state
    }

    fn log_sum(&self) -> f64 {
        self.top + self.sum.log2()
    }

    fn merge(mut self, other: State) -> State {
        let top = self.top.max(other.top);
        if top == f64::NEG_INFINITY {
            return self;
        }
        let (a, b) = ((self.top - top).exp2(), (other.top - top).exp2());
        self.sum = self.sum * a + other.sum * b;
        self.acc.iter_mut().zip(&other.acc).for_each(|(x, y)| *x = *x * a + y * b);
        State { top, ..self }
    }
}

/// Attention of head `i` to its exact tokens.
fn known_state(known: Option<&ExactTokens>, i: usize, query: &[f16], scale: f32) -> State {
    let d = query.len();
    let Some(known) = known else { return State::of(&[], std::iter::empty(), d) };
    let ((keys, values), query) = (&known.heads[i], wide(query));
    let dot = |key: &[f16]| query.iter().zip(key).map(|(q, k)| q * k.to_f64()).sum::<f64>();
    let scores: Vec<f64> = keys.chunks_exact(d).map(|k| dot(k) * f64::from(scale) * LOG2_E).collect();
    State::of(&scores, values.chunks_exact(d).map(wide), d)
}

/// `x` times the matrix `[N, W]`, of `N` elements.
fn rotated(x: &[f64], matrix: &[f16]) -> Vec<f64> {
    let mut out = vec![0.0; matrix.len() / x.len()];
    for (x, row) in x.iter().zip(matrix.chunks_exact(out.len())) {
        out.iter_mut().zip(row).for_each(|(out, m)| *out += x * m.to_f64());
    }
    out
}

impl Check<'_> {
    fn run(&self, queries: &[f16], scale: f32, got: &[f32]) -> Result<Outcome, Failure> {
        let (shape, d) = (self.case.shape, self.case.shape.head_dim);
        let (turned, offsets) = self.step.turned()?;
        let (bytes, read) = (self.step.query_bytes()?, self.step.read_tiles()?);
        let selects = read.iter().any(Option::is_some);
        let codes = if selects { self.step.codes()? } else { vec![] };
        let log_sums: Vec<f32> = self.step.log_sums().read(shape.queries())?;
        let mut want = vec![];
        let mut tiles = (0, 0);
        for (i, inputs) in self.heads.iter().enumerate() {
            let rows = i * super::MOST_ROWS..i * super::MOST_ROWS + shape.rows;
            let of_head = &queries[i * shape.rows * d..][..shape.rows * d];
            let turned = &turned[rows.start * d..rows.end * d];
            let on_cpu = Queries::new(Isa::current(), turned, &offsets[rows.clone()]);
            self.turning(i, of_head, scale, (turned, &offsets[rows.clone()]))?;
            for r in 0..shape.rows {
                let (as_bytes, _, _) = on_cpu.row(r);
                if as_bytes != &bytes[(rows.start + r) * d..][..d] {
                    return wrong(format!("head {i} row {r}: bytes of the query"));
                }
            }
            let known: Vec<State> =
                (0..shape.rows).map(|r| known_state(self.known, i, &of_head[r * d..][..d], scale)).collect();
            let chosen = match &read[i] {
                None => (0..inputs.bytes.tiles.len() as u32).collect(),
                Some(list) => {
                    self.sketching(i, &on_cpu, &known, &codes[i])?;
                    self.selection(i, list, &codes[i])?;
                    list.clone()
                }
            };
            tiles = (tiles.0 + chosen.len(), tiles.1 + inputs.bytes.tiles.len());
            let states = self.attended(i, &on_cpu, &chosen);
            for (state, known) in states.into_iter().zip(known) {
                let all = state.merge(known);
                let log_sum = f64::from(log_sums[want.len() / d]);
                if all.sum > 0.0 && (log_sum - all.log_sum()).abs() > 2e-3 {
                    return wrong(format!(
                        "head {i}: a sum of weights of 2^{log_sum}, wanted 2^{}",
                        all.log_sum()
                    ));
                }
                want.extend(all.acc.iter().map(|x| if all.sum > 0.0 { x / all.sum } else { 0.0 }));
            }
        }
        Ok(Outcome { error: error(got, &want), tiles })
    }

    /// Queries in the pages' channels.
    fn turning(
        &self,
        i: usize,
        queries: &[f16],
        scale: f32,
        (turned, offsets): (&[f32], &[f32]),
    ) -> Result<(), Failure> {
        let (d, inputs) = (self.case.shape.head_dim, &self.heads[i]);
        let [matrix, _] = &self.matrices[i % self.case.shape.kv_heads];
        for (r, query) in queries.chunks_exact(d).enumerate() {
            let scaled: Vec<f64> = query.iter().map(|q| q.to_f64() * f64::from(scale) * LOG2_E).collect();
            let mut want = rotated(&scaled, matrix);
            let offset: f64 = want.iter().zip(&inputs.scales.key_mean).map(|(x, m)| x * m.to_f64()).sum();
            want.iter_mut().zip(&inputs.scales.key_spread).for_each(|(x, s)| *x *= s.to_f64());
            let off = error(&turned[r * d..][..d], &want);
            let off_offset = (f64::from(offsets[r]) - offset).abs();
            if off > 1e-5 || off_offset > 1e-4 {
                return wrong(format!(
                    "head {i} row {r}: turned query off by {off:.1e}, offset by {off_offset:.1e}"
                ));
            }
        }
        Ok(())
    }

    /// Attention to chosen tiles, in the model's channels.
    fn attended(&self, i: usize, queries: &Queries, chosen: &[u32]) -> Vec<State> {
        let (d, inputs) = (self.case.shape.head_dim, &self.heads[i]);
        let [_, matrix] = &self.matrices[i % self.case.shape.kv_heads];
        let mut is_chosen = vec![false; inputs.bytes.tiles.len()];
        chosen.iter().for_each(|tile| is_chosen[*tile as usize] = true);
        let of_pages: Vec<_> =
            (0..inputs.pages.pages().len()).map(|page| inputs.pages.decode(page).1).collect();
        let is_read = |page: usize, token: usize| is_chosen[page * TILES + token / TILE_TOKENS];
        let row = |r: usize| {
            let (mut scores, mut values) = (vec![], vec![]);
            for (page, of_page) in of_pages.iter().enumerate() {
                let of_row = layered::oracle::scores(queries, r, &inputs.pages, page);
                let tokens = of_row.iter().zip(of_page.chunks_exact(d)).enumerate();
                for (_, (score, value)) in tokens.filter(|(token, _)| is_read(page, *token)) {
                    scores.push(*score);
                    values.push(value.iter().map(|x| f64::from(*x)).collect());
                }
            }
            let mut state = State::of(&scores, values.into_iter(), d);
            for (c, x) in state.acc.iter_mut().enumerate() {
                *x = *x * inputs.scales.value_spread[c].to_f64()
                    + state.sum * inputs.scales.value_mean[c].to_f64();
            }
            state.acc = rotated(&state.acc, matrix);
            state
        };
        (0..queries.rows()).map(row).collect()
    }

    /// Codes of weights, against sketches in f64.
    fn sketching(
        &self,
        i: usize,
        queries: &Queries,
        known: &[State],
        codes: &[Vec<u8>],
    ) -> Result<(), Failure> {
        let (d, inputs) = (self.case.shape.head_dim, &self.heads[i]);
        let selectable = inputs.pages.pages().len().saturating_sub(self.case.always);
        for index in 0..selectable {
            let (mut keys, _) = inputs.pages.decode(index);
            for tile in &inputs.bytes.tiles[index * TILES..][..TILES] {
                let first = tile.key_escapes as usize;
                for word in &inputs.bytes.escapes[first..first + usize::from(tile.key_count)] {
                    let (token, channel) = ((word & 0xff) as usize, (word >> 8 & 0xff) as usize);
                    keys[token * d + channel] -= f16::from_bits((word >> 16) as u16).to_f32();
                }
            }
            for (r, known) in known.iter().enumerate() {
                let query = queries.rounded(r, inputs.pages.pages()[index].keys);
                let base = if known.sum > 0.0 { known.log_sum() } else { 0.0 };
                let offset = f64::from(queries.row(r).2) - base;
                let mut weights = [0.0; TILES];
                for (token, key) in keys.chunks_exact(d).enumerate() {
                    let products = query.iter().zip(key).take(SKETCH * GROUP).map(|(q, k)| q * f64::from(*k));
                    weights[token / TILE_TOKENS] += (products.sum::<f64>() + offset).exp2();
                }
                for (tile, weight) in weights.iter().enumerate() {
                    let code = codes[index * TILES + tile][r];
                    let exact = weight.log2() * CODES_PER_OCTAVE + CODE_OF_ONE;
                    let low = if code == 0 { f64::NEG_INFINITY } else { f64::from(code) - 0.05 };
                    let high = if code == 255 { f64::INFINITY } else { f64::from(code) + 1.05 };
                    if !(low..=high).contains(&exact) {
                        return wrong(format!(
                            "head {i} row {r} page {index} tile {tile}: code {code}, wanted {exact:.2}"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// The list, against what its codes ask for.
    fn selection(&self, i: usize, list: &[u32], codes: &[Vec<u8>]) -> Result<(), Failure> {
        let (choice, rows) = (self.case.choice, self.case.shape.rows);
        let pages = self.heads[i].pages.pages().len();
        let tiles = pages.saturating_sub(self.case.always) * TILES;
        let codes = &codes[..tiles];
        let (chosen, always) = list.split_at(list.partition_point(|tile| (*tile as usize) < tiles));
        if !list.is_sorted_by(|a, b| a < b) || always.len() != (pages * TILES - tiles) {
            return wrong(format!(
                "head {i}: a list of {} of {tiles} tiles and {} newer ones",
                chosen.len(),
                always.len()
            ));
        }
        let thresholds: Vec<i32> = (0..rows).map(|r| threshold(choice.needed, codes, r)).collect();
        let over = |code: &Vec<u8>| {
            let of_row = |(code, least): (&u8, &i32)| i32::from(*code) - least;
            code.iter().zip(&thresholds).map(of_row).max().unwrap_or(-128).clamp(-128, 127)
        };
        let wanted: Vec<i32> = codes.iter().map(over).collect();
        let least = choice.least_tiles.min(tiles);
        let most = (least + tiles / choice.one_in).min(tiles);
        let needed = wanted.iter().filter(|w| **w >= 0).count();
        if chosen.len() != needed.clamp(least, most) {
            return wrong(format!(
                "head {i}: {} tiles, {needed} are needed of {least} to {most}",
                chosen.len()
            ));
        }
        let mut is_chosen = vec![false; tiles];
        chosen.iter().for_each(|tile| is_chosen[*tile as usize] = true);
        let of =
            |which: bool| wanted.iter().zip(&is_chosen).filter(move |(_, is)| **is == which).map(|(w, _)| *w);
        if of(true).min().unwrap_or(i32::MAX) < of(false).max().unwrap_or(i32::MIN) {
            return wrong(format!("head {i}: a tile is left out that is wanted more than another"));
        }
        Ok(())
    }
}

/// The least code that row `r` needs; as `select.cuh` has it.
fn threshold(needed: Option<Needed>, codes: &[Vec<u8>], r: usize) -> i32 {
    let mut counts = [0usize; 256];
    codes.iter().for_each(|of_tile| counts[usize::from(of_tile[r])] += 1);
    let top = counts.iter().rposition(|count| *count > 0).unwrap_or(0);
    counts[0] = 0;
    let weight =
        |code: usize| counts[code] as f64 * ((code as f64 - CODE_OF_ONE + 0.5) / CODES_PER_OCTAVE).exp2();
    let Some(Needed::Mass(mass)) = needed else {
        let Some(Needed::Relative(least)) = needed else { return 0 };
        return (top as i32 + (f64::from(least).log2() * CODES_PER_OCTAVE).round() as i32).max(1);
    };
    let total: f64 = 1.0 + (0..256).map(weight).sum::<f64>();
    let may_miss = (1.0 - f64::from(mass)) * total;
    let mut below = 0.0;
    let mut least = 0;
    for code in 0..256 {
        if below <= may_miss {
            least = code;
        }
        below += weight(code);
    }
    if below <= may_miss { 256 } else { (least as i32).max(1) }
}

#[cfg(all(test, emulated))]
mod tests;
