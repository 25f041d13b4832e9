//! The packed format on a device, against its definition in f64 and against the CPU's encoder.

use super::{ExactTokens, Failure, Random, State, error, exact_tokens, known_state, rotated, wrong};
use crate::cuda::encode::Vectors;
use crate::cuda::packed::{LEAST_PART, Limits, Packed, Rotation, Segment};
use crate::cuda::{Error, Gpu, PARTS, Shape};
use crate::packed::{PAGE_TOKENS, PackedPage, PackedShape};
use crate::select::top_tokens;
use half::f16;
use std::f64::consts::LOG2_E;
use std::sync::Arc;

/// Of keys by which blocks are chosen: steps an octave, and that of a share of all.
const KEYS_PER_OCTAVE: f64 = 65536.0;
const KEY_OF_ALL: f64 = 64.0 * KEYS_PER_OCTAVE;

/// A segment of a case.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Share of the elements that are dropped, and groups of channels.
    pub rate: f32,
    /// Channels that are kept or dropped together.
    pub group: usize,
    /// Tokens of a token block.
    pub block: usize,
    /// Tokens, a multiple of the block.
    pub tokens: usize,
}

/// Strategies that differ in all they can, of `tokens` tokens each, a multiple of 16.
pub fn parts(tokens: &[usize]) -> Vec<Part> {
    let strategies = [
        (0.75, 1, 8),
        (0.875, 4, 4),
        (0.625, 2, 16),
        (0.75, 4, 16),
        (0.875, 1, 4),
        (0.625, 1, 8),
        (0.75, 2, 4),
        (0.25, 1, 8),
    ];
    let of = |(&tokens, &(rate, group, block)): (&usize, &(f32, usize, usize))| Part {
        rate,
        group,
        block,
        tokens,
    };
    tokens.iter().zip(strategies.iter().cycle()).map(of).collect()
}

/// What a step is tried on.
#[derive(Clone, Debug)]
pub struct Case {
    /// Of the step.
    pub shape: Shape,
    /// The segments of each sequence.
    pub segments: Vec<Vec<Part>>,
    /// Exact tokens of each sequence that are attended to in any case; empty: none.
    pub known: Vec<usize>,
    /// Share of the tokens in pages that is read.
    pub selected: f32,
    /// Spread of scores in octaves, about; 0: all are the same.
    pub spread: f32,
    /// Parts that a head is cut into, and their least tokens.
    pub parts: (usize, usize),
}

impl Case {
    /// All is read.
    pub fn whole(shape: Shape, segments: Vec<Vec<Part>>) -> Case {
        Case { shape, segments, known: vec![], selected: 1.0, spread: 3.0, parts: (PARTS, LEAST_PART) }
    }
}

/// What came out.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Of outputs.
    pub error: f64,
    /// Blocks that were read and blocks that there are.
    pub blocks: (usize, usize),
}

/// A segment here.
struct Inputs {
    segment: Segment,
    keys: Vec<f16>,
    outputs: Vec<f16>,
    pages: Vec<PackedPage>,
}

fn shape_of(part: Part, head_dim: usize) -> PackedShape {
    PackedShape::with_rate(head_dim, part.rate, part.group).expect("a shape of the paper")
}

fn inputs(gpu: &Gpu, random: &mut Random, part: Part, d: usize) -> Result<Inputs, Error> {
    let shape = shape_of(part, d);
    let c = shape.channels();
    let [keys, outputs] = [0, 1].map(|_| random.halves(d * c, (d as f32).sqrt().recip()));
    let rotation = Arc::new(Rotation::new(gpu, &keys, &outputs, d)?);
    let mut segment = Segment::new(gpu, &rotation, shape, part.block);
    let (mut pages, mut left) = (vec![], part.tokens);
    while left > 0 {
        // Smaller pages than full ones occur anywhere.
        let blocks =
            if random.below(2) == 0 { 1 + random.below(PAGE_TOKENS / part.block) } else { PAGE_TOKENS };
        let tokens = (blocks * part.block).min(PAGE_TOKENS).min(left);
        let [keys, values] = [0, 1].map(|_| -> Vec<f32> {
            let x = random.normals(tokens * c);
            x.iter().enumerate().map(|(i, x)| x * 0.98f32.powi((i % c) as i32)).collect()
        });
        pages.push(PackedPage::encode(shape, part.block, &keys, &values));
        left -= tokens;
    }
    segment.append(&pages)?;
    Ok(Inputs { segment, keys, outputs, pages })
}

/// A packed step; its outputs and everything on the way.
pub fn packed(gpu: &Gpu, seed: u64, case: &Case) -> Result<Outcome, Failure> {
    let (mut random, shape) = (Random::new(seed), case.shape);
    let d = shape.head_dim;
    let known = match &case.known[..] {
        [] => None,
        lengths => Some(exact_tokens(gpu, &mut random, shape, lengths, 2)?),
    };
    let mut heads = vec![];
    for segments in &case.segments {
        for _ in 0..shape.kv_heads {
            let of_head: Result<Vec<Inputs>, Error> =
                segments.iter().map(|part| inputs(gpu, &mut random, *part, d)).collect();
            heads.push(of_head?);
        }
    }
    let most = |of: &dyn Fn(&[Inputs]) -> usize| heads.iter().map(|head| of(head)).max().unwrap_or(0).max(1);
    let limits = Limits {
        segments: most(&|head| head.len()),
        pages: most(&|head| head.iter().map(|s| s.segment.tokens().div_ceil(PAGE_TOKENS)).sum()),
        blocks: most(&|head| head.iter().map(|s| s.segment.blocks()).sum()),
    };
    let mut step = Packed::new(gpu, shape, limits, case.selected, case.parts)?;
    let of_step: Vec<Vec<&Segment>> =
        heads.iter().map(|head| head.iter().map(|s| &s.segment).collect()).collect();
    step.set(&of_step)?;
    let queries = random.halves(shape.queries() * d, 1.0);
    let (on_device, out) = (gpu.upload(&queries)?, gpu.alloc(shape.queries() * d * 4)?);
    let scale = case.spread / (d as f32).sqrt() / std::f32::consts::LOG2_E;
    let mut outcome = Outcome { error: 0.0, blocks: (0, 0) };
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
        outcome =
            Check { case, step: &step, known: known.as_ref(), heads: &heads }.run(&queries, scale, &got)?;
        if !step.is_clean()? {
            return wrong("counts are left over".into());
        }
    }
    Ok(outcome)
}

struct Check<'a> {
    case: &'a Case,
    step: &'a Packed,
    known: Option<&'a ExactTokens>,
    heads: &'a [Vec<Inputs>],
}

impl Check<'_> {
    fn run(&self, queries: &[f16], scale: f32, got: &[f32]) -> Result<Outcome, Failure> {
        let (shape, d) = (self.case.shape, self.case.shape.head_dim);
        let read = self.step.read_blocks()?;
        let chosen =
            if self.case.selected < 1.0 { Some((self.step.scores()?, self.step.keys()?)) } else { None };
        let (mut want, mut blocks) = (vec![], (0, 0));
        for (i, head) in self.heads.iter().enumerate() {
            let of_head = &queries[i * shape.rows * d..][..shape.rows * d];
            let turned = self.turning(i, of_head, scale)?;
            if let Some((scores, keys)) = &chosen {
                self.scoring(i, &turned, &scores[i], &keys[i])?;
            }
            let all: usize = head.iter().map(|s| s.segment.blocks()).sum();
            let list = match (&read[i], &chosen) {
                (Some(list), Some((_, keys))) => {
                    self.selection(i, list, &keys[i][..all])?;
                    list.clone()
                }
                _ => (0..all as u32).collect(),
            };
            blocks = (blocks.0 + list.len(), blocks.1 + all);
            for (row, query) in of_head.chunks_exact(d).enumerate() {
                let known = known_state(self.known, i, query, scale);
                let state = self.attended(head, &turned, row, &list).fold(known, State::merge);
                want.extend(state.acc.iter().map(|x| if state.sum > 0.0 { x / state.sum } else { 0.0 }));
            }
        }
        Ok(Outcome { error: error(got, &want), blocks })
    }

    /// Queries in each segment's channels, `[segments][R, C]`.
    fn turning(&self, i: usize, queries: &[f16], scale: f32) -> Result<Vec<Vec<f64>>, Failure> {
        let mut turned = vec![];
        for (number, of) in self.heads[i].iter().enumerate() {
            let rows = queries.chunks_exact(self.case.shape.head_dim).flat_map(|query| {
                let scaled: Vec<f64> = query.iter().map(|q| q.to_f64() * f64::from(scale) * LOG2_E).collect();
                rotated(&scaled, &of.keys)
            });
            let want: Vec<f64> = rows.collect();
            let off = error(&self.step.turned(i, number)?, &want);
            if off > 1e-5 {
                return wrong(format!("head {i} segment {number}: turned queries off by {off:.1e}"));
            }
            turned.push(want);
        }
        Ok(turned)
    }

    /// Scores of block keys, and the integers that follow from them.
    fn scoring(
        &self,
        i: usize,
        turned: &[Vec<f64>],
        scores: &[Vec<f32>],
        keys: &[u32],
    ) -> Result<(), Failure> {
        let rows = self.case.shape.rows;
        let mut want = vec![vec![]; rows];
        for (of, turned) in self.heads[i].iter().zip(turned) {
            let c = turned.len() / rows;
            for page in &of.pages {
                for key in page.decode_block_keys().chunks_exact(c) {
                    for (want, query) in want.iter_mut().zip(turned.chunks_exact(c)) {
                        want.push(query.iter().zip(key).map(|(q, k)| q * f64::from(*k)).sum::<f64>());
                    }
                }
            }
        }
        let mut best = vec![f64::NEG_INFINITY; want[0].len()];
        for (row, want) in want.iter().enumerate() {
            let got: Vec<f32> = scores.iter().take(want.len()).map(|scores| scores[row]).collect();
            let off = error(&got, want);
            if off > 1e-5 {
                return wrong(format!("head {i} row {row}: scores off by {off:.1e}"));
            }
            let log_sum = State::of(want, want.iter().map(|_| vec![]), 0).log_sum();
            best.iter_mut().zip(want).for_each(|(best, score)| *best = best.max(score - log_sum));
        }
        for (block, (best, key)) in best.iter().zip(keys).enumerate() {
            let exact = (best * KEYS_PER_OCTAVE + KEY_OF_ALL).clamp(0.0, KEY_OF_ALL - 1.0);
            let off = f64::from(*key) - exact;
            // Down to the next integer, and 1e-4 octaves for sums and logarithms.
            if !(-8.0..=7.0).contains(&off) {
                return wrong(format!("head {i} block {block}: key {key}, wanted {exact:.1}"));
            }
        }
        Ok(())
    }

    /// The list, against what the CPU takes by the same keys.
    fn selection(&self, i: usize, list: &[u32], keys: &[u32]) -> Result<(), Failure> {
        let head = &self.heads[i];
        let spans: Vec<_> = head.iter().map(|s| (s.segment.blocks(), s.segment.block())).collect();
        let tokens: usize = head.iter().map(|s| s.segment.tokens()).sum();
        // All of them are numbers of f32.
        let keys: Vec<f32> = keys.iter().map(|key| *key as f32).collect();
        let want = top_tokens(&keys, &spans, (self.case.selected * tokens as f32).ceil() as usize);
        if list != want {
            let at = list.iter().zip(&want).position(|(a, b)| a != b);
            return wrong(format!(
                "head {i}: {} blocks chosen, {} wanted; another one at {at:?}",
                list.len(),
                want.len()
            ));
        }
        Ok(())
    }

    /// Attention of a row to the blocks of a list, segment by segment, in the model's channels.
    fn attended<'a>(
        &'a self,
        head: &'a [Inputs],
        turned: &'a [Vec<f64>],
        row: usize,
        list: &'a [u32],
    ) -> impl Iterator<Item = State> + 'a {
        let mut block = 0;
        head.iter().zip(turned).map(move |(of, turned)| {
            let c = turned.len() / self.case.shape.rows;
            let query = &turned[row * c..][..c];
            let (mut scores, mut values) = (vec![], vec![]);
            for page in &of.pages {
                let (keys, of_values) = (page.decode_keys(), page.decode_values());
                let size = page.block() * c;
                for (keys, of_values) in keys.chunks_exact(size).zip(of_values.chunks_exact(size)) {
                    if list.binary_search(&block).is_ok() {
                        let dot =
                            |key: &[f32]| query.iter().zip(key).map(|(q, k)| q * f64::from(*k)).sum::<f64>();
                        scores.extend(keys.chunks_exact(c).map(dot));
                        values.extend(
                            of_values.chunks_exact(c).map(|v| v.iter().map(|x| f64::from(*x)).collect()),
                        );
                    }
                    block += 1;
                }
            }
            let mut state = State::of(&scores, values.into_iter(), c);
            state.acc = rotated(&state.acc, &of.outputs);
            state
        })
    }
}

/// Vectors that the device rotates, against f64, and packs, bit by bit against the CPU; each part in two pieces.
pub fn encoding(gpu: &Gpu, seed: u64, head_dim: usize, parts: &[Part]) -> Result<(), Failure> {
    let (mut random, d) = (Random::new(seed), head_dim);
    for part in parts {
        let shape = shape_of(*part, d);
        let c = shape.channels();
        let [keys, outputs] = [0, 1].map(|_| random.halves(d * c, (d as f32).sqrt().recip()));
        let rotation = Arc::new(Rotation::new(gpu, &keys, &outputs, d)?);
        let [mut got, mut want] = [0, 1].map(|_| Segment::new(gpu, &rotation, shape, part.block));
        let first = (part.tokens / 3).next_multiple_of(part.block).min(part.tokens);
        for tokens in [first, part.tokens - first] {
            if tokens == 0 {
                continue;
            }
            let [keys, values] = [0, 1].map(|_| difficult(&mut random, tokens, c));
            for (keys, values) in keys.chunks(PAGE_TOKENS * c).zip(values.chunks(PAGE_TOKENS * c)) {
                want.append(&[PackedPage::encode(shape, part.block, keys, values)])?;
            }
            let [keys, values] = [gpu.upload(&keys)?, gpu.upload(&values)?];
            got.encode_rotated(Vectors { keys: &keys, values: &values, tokens, head_dim: d })?;
        }
        for (i, (got, want)) in got.read()?.iter().zip(&want.read()?).enumerate() {
            for (name, (got, want)) in
                ["block keys", "their bitmaps", "blocks"].iter().zip(got.iter().zip(want))
            {
                if let Some(at) = got.iter().zip(want).position(|(a, b)| a != b) {
                    return wrong(format!(
                        "{part:?} page {i}: {name} differ from byte {at} of {} on",
                        want.len()
                    ));
                }
            }
        }
        rotating(gpu, &mut random, &got, [&keys, &outputs])?;
    }
    Ok(())
}

/// Vectors with ties, zeros, and numbers beyond the range of f16 and below it.
fn difficult(random: &mut Random, tokens: usize, c: usize) -> Vec<f32> {
    let mut of_vector = || -> Vec<f32> {
        let kind = random.below(6);
        let mut number = || match kind {
            0 => (random.normal() * 2.0).round() / 2.0,
            1 => random.normal() * 1e5,
            2 => random.normal() * 1e-30,
            3 => 0.0,
            _ => random.normal(),
        };
        (0..c).map(|_| number()).collect()
    };
    (0..tokens).flat_map(|_| of_vector()).collect()
}

/// The rotation before it.
fn rotating(
    gpu: &Gpu,
    random: &mut Random,
    segment: &Segment,
    [keys, outputs]: [&[f16]; 2],
) -> Result<(), Failure> {
    let (d, tokens) = (segment.head_dim(), 37);
    let c = keys.len() / d;
    let by_values: Vec<f16> = (0..d * c).map(|i| outputs[i % c * d + i / c]).collect();
    let vectors = [0, 1].map(|_| random.normals(tokens * d));
    let [of_keys, of_values] = [gpu.upload(&vectors[0])?, gpu.upload(&vectors[1])?];
    let got = segment.rotate(Vectors { keys: &of_keys, values: &of_values, tokens, head_dim: d })?;
    for (name, ((got, vectors), matrix)) in
        ["keys", "values"].iter().zip(got.iter().zip(&vectors).zip([keys, &by_values]))
    {
        let wide = |vector: &[f32]| vector.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let want: Vec<f64> =
            vectors.chunks_exact(d).flat_map(|vector| rotated(&wide(vector), matrix)).collect();
        let off = error(&got.read(tokens * c)?, &want);
        if off > 1e-5 {
            return wrong(format!("rotated {name} off by {off:.1e}"));
        }
    }
    Ok(())
}

#[cfg(all(test, emulated))]
mod tests {
    use super::*;
    use crate::cuda::emulated::Emulated;

    fn shape(sequences: usize, kv_heads: usize, rows: usize, head_dim: usize) -> Shape {
        Shape { sequences, kv_heads, rows, head_dim }
    }

    /// Weights are rounded to f16.
    const ERROR: f64 = 1e-3;

    #[test]
    fn attention_to_all_agrees_with_the_oracle() {
        for (i, (rows, head_dim)) in [(4, 128), (1, 64), (3, 64), (8, 128)].into_iter().enumerate() {
            let segments = [
                vec![parts(&[48]), parts(&[1040, 32])],
                vec![vec![], parts(&[16, 96, 64])],
                vec![parts(&[560, 16, 32, 48, 64, 16, 32, 80]), parts(&[16])],
                vec![parts(&[64, 64, 64, 64, 64, 64, 64, 64]), parts(&[32])],
            ];
            let of = Case::whole(shape(2, 1, rows, head_dim), segments[i].clone());
            let with_known = Case { known: vec![70, 5], parts: (3, 16), ..of.clone() };
            for of in [of, with_known] {
                let outcome = packed(&Emulated::gpu(1 + 2 * i), i as u64, &of).unwrap();
                assert!(outcome.error < ERROR, "{rows} rows of {head_dim}: {outcome:?}");
                assert_eq!(outcome.blocks.0, outcome.blocks.1);
            }
        }
    }

    #[test]
    fn chosen_blocks_are_the_best() {
        for (i, selected) in [0.1, 0.0625, 0.5, 0.001, 0.99, 0.3].into_iter().enumerate() {
            let (rows, d) = [(4, 128), (1, 64), (8, 64), (3, 128)][i % 4];
            let of = Case {
                selected,
                spread: [3.0, 8.0, 0.5][i % 3],
                known: if i % 2 == 0 { vec![10, 0, 90] } else { vec![] },
                parts: [(PARTS, LEAST_PART), (3, 32)][i % 2],
                ..Case::whole(
                    shape(3, 1, rows, d),
                    vec![parts(&[1024, 64, 528, 160]), vec![], parts(&[112 + 16 * i, 16])],
                )
            };
            let outcome = packed(&Emulated::gpu(3), i as u64, &of).unwrap();
            assert!(outcome.error < ERROR, "{selected}: {outcome:?}");
            assert!(outcome.blocks.0 < outcome.blocks.1, "{selected}: {outcome:?}");
        }
    }

    /// Scores that are all the same: the first blocks are taken, those of the last tie too.
    #[test]
    fn ties_are_taken_in_order() {
        for (i, selected) in [0.1, 0.37, 0.8].into_iter().enumerate() {
            let segments = vec![parts(&[320, 576, 64]), parts(&[16, 16])];
            let of = Case { selected, spread: 0.0, ..Case::whole(shape(2, 1, 2, 64), segments) };
            packed(&Emulated::gpu(2), i as u64, &of).unwrap();
        }
    }

    #[test]
    fn pages_are_encoded_to_the_bit() {
        for d in [64, 128] {
            encoding(&Emulated::gpu(1), d as u64, d, &parts(&[1040, 96, 64, 16, 32, 48, 560, 16])).unwrap();
        }
    }

    #[test]
    fn what_a_head_gets_does_not_depend_on_the_others() {
        let (gpu, d) = (Emulated::gpu(3), 64);
        let mut random = Random::new(7);
        let heads: Vec<Vec<Inputs>> = [vec![600, 96], vec![64], vec![1040]]
            .iter()
            .map(|tokens| {
                parts(tokens).into_iter().map(|part| inputs(&gpu, &mut random, part, d).unwrap()).collect()
            })
            .collect();
        let queries = random.halves(3 * 2 * d, 1.0);
        let run = |which: &[usize]| -> Vec<Vec<f32>> {
            let limits = Limits { segments: 2, pages: 5, blocks: 300 };
            let mut step = Packed::new(&gpu, shape(which.len(), 1, 2, d), limits, 0.3, (3, 16)).unwrap();
            let of_step: Vec<Vec<&Segment>> =
                which.iter().map(|i| heads[*i].iter().map(|s| &s.segment).collect()).collect();
            step.set(&of_step).unwrap();
            let of_queries: Vec<f16> =
                which.iter().flat_map(|i| queries[i * 2 * d..][..2 * d].to_vec()).collect();
            let (on_device, out) =
                (gpu.upload(&of_queries).unwrap(), gpu.alloc(which.len() * 2 * d * 4).unwrap());
            step.step(&on_device, 0.1, None, &out).unwrap();
            out.read::<f32>(which.len() * 2 * d).unwrap().chunks_exact(2 * d).map(<[f32]>::to_vec).collect()
        };
        let all = run(&[0, 1, 2]);
        assert_eq!(run(&[1]), all[1..2]);
        assert_eq!(run(&[2, 0]), [all[2].clone(), all[0].clone()]);
    }
}
