//! Products, what lies between them, attention of prompts and copies beside the work, against f64.

use super::{Failure, Random, wide, wrong};
use crate::cuda::aside::{fetch, send};
use crate::cuda::dense::{self, Activation, Heads, Norm, Pairs, Rotations};
use crate::cuda::exact::{PAGE_TOKENS, Pool};
use crate::cuda::gemm::{Into, Weights};
use crate::cuda::prefill::{self, Limits, Places, Span, Tokens};
use crate::cuda::{Buffer, Gpu, Pinned};
use crate::oracle;
use half::{bf16, f16};

/// A check that was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    /// Of what.
    pub of: String,
    /// The largest difference from what is right, where 1 is what rounding explains.
    pub error: f64,
}

/// How large the checks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// For emulation.
    Small,
    /// For a device.
    Large,
}

/// All checks. Each is right if its error is at most 1.
pub fn checks(gpu: &Gpu, seed: u64, size: Size) -> Result<Vec<Checked>, Failure> {
    let mut random = Random::new(seed);
    let mut all = vec![];
    let mut add = |of: String, error: Result<f64, Failure>| -> Result<(), Failure> {
        all.push(Checked { of, error: error? });
        Ok(())
    };
    let large = size == Size::Large;
    for (tokens, rows, cols) in if large {
        [(1, 6144, 4096), (8, 1000, 576), (77, 2052, 4096)]
    } else {
        [(1, 24, 64), (3, 100, 8), (9, 20, 136)]
    } {
        for into in [Into::F32, Into::AddF32, Into::Bf16] {
            add(
                format!("a product of {tokens} tokens, {cols} to {rows}, {into:?}"),
                product(gpu, &mut random, (tokens, rows, cols), into),
            )?;
        }
    }
    for (rows, columns) in [(1, 8), (5, 576), (if large { 513 } else { 3 }, 4096)] {
        add(format!("embeddings of {rows} x {columns}"), embeddings(gpu, &mut random, (rows, columns)))?;
        add(format!("norms of {rows} x {columns}"), norms(gpu, &mut random, (rows, columns)))?;
        for activation in [Activation::Silu, Activation::Gelu] {
            add(
                format!("{activation:?} of {rows} x {columns}"),
                gates(gpu, &mut random, activation, (rows, columns)),
            )?;
        }
        add(format!("narrowing {rows} x {columns}"), narrowing(gpu, &mut random, rows * columns))?;
    }
    for case in heads_cases(large) {
        add(format!("{case:?}"), heads(gpu, &mut random, &case))?;
    }
    for case in attention_cases(large) {
        add(format!("{case:?}"), attention(gpu, &mut random, &case))?;
    }
    add("copies beside the work".into(), copies(gpu, &mut random))?;
    Ok(all)
}

/// Bits of what is stored, with those of f32 for sums.
const BF16: i32 = 8;
const F16: i32 = 11;
const F32: i32 = 22;

/// The largest difference, over half the last place of what is right and `slack` of the largest; what is no number is an endless one.
fn off(got: impl IntoIterator<Item = f64>, want: &[f64], (bits, slack): (i32, f64)) -> f64 {
    let most = want.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
    let of = |(got, want): (f64, &f64)| {
        let off = (got - want).abs() / (want.abs() * 2f64.powi(-bits) + slack * most).max(1e-300);
        if off.is_nan() { f64::INFINITY } else { off }
    };
    let mut got = got.into_iter();
    let worst = got.by_ref().zip(want).map(of).fold(0.0, f64::max);
    assert!(got.next().is_none(), "more numbers than there should be");
    worst
}

fn of_bf16(buffer: &Buffer, count: usize) -> Result<Vec<f64>, Failure> {
    Ok(buffer.read::<bf16>(count)?.iter().map(|x| x.to_f64()).collect())
}

fn of_f32(buffer: &Buffer, count: usize) -> Result<Vec<f64>, Failure> {
    Ok(buffer.read::<f32>(count)?.iter().map(|x| f64::from(*x)).collect())
}

fn poisoned(gpu: &Gpu, bytes: usize) -> Result<Buffer, Failure> {
    let buffer = gpu.alloc(bytes)?;
    buffer.poison()?;
    Ok(buffer)
}

fn bfloats(random: &mut Random, count: usize) -> Vec<bf16> {
    (0..count).map(|_| bf16::from_f32(random.normal())).collect()
}

fn product(
    gpu: &Gpu,
    random: &mut Random,
    (tokens, rows, cols): (usize, usize, usize),
    into: Into,
) -> Result<f64, Failure> {
    let (x, w) = (bfloats(random, tokens * cols), bfloats(random, rows * cols));
    let weights = Weights::new(gpu, (rows, cols), |row, out| {
        out.iter_mut().zip(&w[row * cols..]).for_each(|(to, from)| *to = from.to_f32());
    })?;
    let before = random.normals(tokens * rows);
    let out = poisoned(gpu, tokens * rows * 4)?;
    if into == Into::AddF32 {
        out.write(0, &before)?;
    }
    weights.multiply(&gpu.upload(&x)?, tokens, &out, into)?;
    let of = |x: &[bf16]| -> Vec<f64> { x.iter().map(|x| x.to_f64()).collect() };
    let (x, w) = (of(&x), of(&w));
    let mut want: Vec<f64> = match into {
        Into::AddF32 => before.iter().map(|x| f64::from(*x)).collect(),
        _ => vec![0.0; tokens * rows],
    };
    for (of_token, x) in want.chunks_exact_mut(rows).zip(x.chunks_exact(cols)) {
        for (to, w) in of_token.iter_mut().zip(w.chunks_exact(cols)) {
            *to += x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
        }
    }
    let count = tokens * rows;
    match into {
        Into::Bf16 => Ok(off(of_bf16(&out, count)?, &want, (BF16, 2e-5))),
        _ => Ok(off(of_f32(&out, count)?, &want, (F32, 2e-5))),
    }
}

fn embeddings(gpu: &Gpu, random: &mut Random, (rows, columns): (usize, usize)) -> Result<f64, Failure> {
    let vocab = 37;
    let table = bfloats(random, vocab * columns);
    let weights = Weights::repeated(gpu, (vocab, columns), &table)?;
    // One beyond the end gets the last.
    let tokens: Vec<u32> =
        (0..rows).map(|i| if i == 3 { u32::MAX } else { random.below(vocab) as u32 }).collect();
    let out = poisoned(gpu, rows * columns * 4)?;
    dense::embed(&weights, (&gpu.upload(&tokens)?, rows), 1.5, &out)?;
    let row = |token: &u32| &table[(*token as usize).min(vocab - 1) * columns..][..columns];
    let want: Vec<f64> = tokens.iter().flat_map(row).map(|x| x.to_f64() * 1.5).collect();
    Ok(off(of_f32(&out, rows * columns)?, &want, (F32, 0.0)))
}

fn normed(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    let square: f64 = x.iter().map(|x| x * x).sum();
    let inverse = (square / x.len() as f64 + f64::from(eps)).sqrt().recip();
    x.iter().zip(weight).map(|(x, w)| x * inverse * f64::from(*w)).collect()
}

/// All rows, rows that are picked, and rows that are added.
fn norms(gpu: &Gpu, random: &mut Random, (rows, columns): (usize, usize)) -> Result<f64, Failure> {
    let (x, weight, eps) = (random.normals(rows * columns), random.normals(columns), 1e-3);
    let picked: Vec<u32> = (0..4).map(|_| random.below(rows) as u32).chain([u32::MAX]).collect();
    let before = random.normals(rows * columns);
    let norm = Norm::new(gpu, &weight, eps)?;
    let on_device = gpu.upload(&x)?;
    let out = poisoned(gpu, rows * columns * 2)?;
    norm.apply(&on_device, rows, &out)?;
    let of_picked = poisoned(gpu, picked.len() * columns * 2)?;
    norm.apply_to((&on_device, rows), (&gpu.upload(&picked)?, picked.len()), &of_picked)?;
    let residual = gpu.upload(&before)?;
    norm.add(&on_device, rows, &residual)?;
    let want: Vec<Vec<f64>> = x
        .chunks_exact(columns)
        .map(|row| normed(&row.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(), &weight, eps))
        .collect();
    let all = want.concat();
    let want_picked: Vec<f64> =
        picked.iter().flat_map(|row| want[(*row as usize).min(rows - 1)].clone()).collect();
    let sum: Vec<f64> = all.iter().zip(&before).map(|(a, b)| a + f64::from(*b)).collect();
    let errors = [
        off(of_bf16(&out, all.len())?, &all, (BF16, 1e-6)),
        off(of_bf16(&of_picked, want_picked.len())?, &want_picked, (BF16, 1e-6)),
        off(of_f32(&residual, sum.len())?, &sum, (F32, 1e-6)),
    ];
    Ok(errors.into_iter().fold(0.0, f64::max))
}

fn gates(
    gpu: &Gpu,
    random: &mut Random,
    activation: Activation,
    (rows, ffn): (usize, usize),
) -> Result<f64, Failure> {
    let mut both: Vec<f32> = random.normals(rows * 2 * ffn).iter().map(|x| x * 3.0).collect();
    // Far beyond what a square can be.
    both[..4].copy_from_slice(&[1e25, -1e25, 0.0, -88.0]);
    let out = poisoned(gpu, rows * ffn * 2)?;
    dense::gate(gpu, activation, &gpu.upload(&both)?, (rows, ffn), &out)?;
    let formula = |x: f64| match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
        }
    };
    let mut want = vec![];
    for row in both.chunks_exact(2 * ffn) {
        let (gate, up) = row.split_at(ffn);
        want.extend(gate.iter().zip(up).map(|(g, u)| formula(f64::from(*g)) * f64::from(*u)));
    }
    let got = of_bf16(&out, want.len())?;
    // The large ones apart: the others would be nothing beside them.
    let large = off(got[..2].iter().copied(), &want[..2], (BF16, 1e-6));
    Ok(large.max(off(got[2..].iter().copied(), &want[2..], (BF16, 1e-6))))
}

fn narrowing(gpu: &Gpu, random: &mut Random, count: usize) -> Result<f64, Failure> {
    let x = random.normals(count);
    let out = poisoned(gpu, count * 2)?;
    dense::narrow(gpu, &gpu.upload(&x)?, count, &out)?;
    let want: Vec<f64> = x.iter().map(|x| f64::from(bf16::from_f32(*x))).collect();
    Ok(off(of_bf16(&out, count)?, &want, (50, 0.0)))
}

/// What heads are tried on.
#[derive(Clone, Debug)]
struct HeadsCase {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    bias: bool,
    norms: bool,
    turned: usize,
    pairs: Pairs,
    /// Tokens before, new tokens.
    spans: Vec<(usize, usize)>,
}

fn heads_cases(large: bool) -> Vec<HeadsCase> {
    let of = |heads, kv_heads, head_dim, (bias, norms), (turned, pairs), spans: &[(usize, usize)]| {
        HeadsCase { heads, kv_heads, head_dim, bias, norms, turned, pairs, spans: spans.to_vec() }
    };
    let longest = if large { 1777 } else { 70 };
    vec![
        of(4, 2, 64, (true, false), (64, Pairs::Halves), &[(0, longest), (63, 2), (5, 1)]),
        of(3, 1, 128, (false, true), (128, Pairs::Interleaved), &[(60, 9), (0, 0), (128, 1)]),
        of(8, 2, 128, (true, true), (32, Pairs::Halves), &[(64, 3)]),
        of(2, 2, 64, (false, false), (20, Pairs::Interleaved), &[(1, 1), (2, 1), (3, 1)]),
        of(5, 5, 64, (true, true), (0, Pairs::Halves), &[(0, 5)]),
    ]
}

/// Pages for sequences of so many tokens, in mixed order, some left over. Of layer 1 of 2, whose other tables lead nowhere.
fn placed(
    gpu: &Gpu,
    random: &mut Random,
    spans: &[(usize, usize)],
    (kv_heads, head_dim): (usize, usize),
) -> Result<(Pool, Places, Vec<Vec<u32>>), Failure> {
    let counts: Vec<usize> = spans.iter().map(|(past, new)| (past + new).div_ceil(PAGE_TOKENS)).collect();
    let all = counts.iter().sum::<usize>() + 2;
    let pool = Pool::new(gpu, all, (kv_heads, head_dim))?;
    pool.data().poison()?;
    let mut free: Vec<u32> = (0..all as u32).collect();
    for i in (1..all).rev() {
        free.swap(i, random.below(i + 1));
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let rows = spans.iter().map(|(_, new)| new).sum::<usize>() + 5;
    let limits = Limits { layers: 2, sequences: spans.len() + 1, pages: most, rows };
    let mut places = Places::new(gpu, limits)?;
    let spans: Vec<Span> = spans.iter().map(|&(past, new)| Span { past, new }).collect();
    // Nothing is left of a pass before.
    places.set(&[Span { past: 0, new: rows }])?;
    let others = spans.iter().map(|span| Span { past: 0, ..*span }).collect();
    places.set_each(&[others, spans])?;
    let pages: Vec<Vec<u32>> = counts.iter().map(|count| free.split_off(free.len() - count)).collect();
    places.set_pages(&pages.iter().map(|pages| &pages[..]).collect::<Vec<_>>())?;
    Ok((pool, places, pages))
}

fn heads(gpu: &Gpu, random: &mut Random, case: &HeadsCase) -> Result<f64, Failure> {
    let HeadsCase { heads: h, kv_heads: g, head_dim: d, .. } = *case;
    let (pool, places, pages) = placed(gpu, random, &case.spans, (g, d))?;
    let (rows, all) = (places.rows(), h + 2 * g);
    let projected = random.normals(rows * all * d);
    let bias = case.bias.then(|| random.normals(all * d));
    let norms = case.norms.then(|| [random.normals(d), random.normals(d)]);
    let angles: Vec<f32> = random.normals(rows * case.turned / 2);
    let table: Vec<f32> = angles.iter().flat_map(|a| [a.cos() * 1.1, a.sin() * 1.1]).collect();
    let table_buffer = gpu.upload(&table)?;
    let bias_buffer = bias.as_ref().map(|x| gpu.upload(x)).transpose()?;
    let norm_buffers =
        norms.as_ref().map(|x| Ok::<_, Failure>([gpu.upload(&x[0])?, gpu.upload(&x[1])?])).transpose()?;
    let (queries, staged) = (poisoned(gpu, rows * h * d * 2)?, poisoned(gpu, 16 + rows * 2 * g * d * 2)?);
    let (eps, factor) = (1e-2, 0.7);
    let of = Heads {
        heads: h,
        bias: bias_buffer.as_ref(),
        query_norm: norm_buffers.as_ref().map(|x| &x[0]),
        key_norm: norm_buffers.as_ref().map(|x| &x[1]),
        eps,
        query_factor: factor,
    };
    let rotations = Rotations { table: &table_buffer, dims: case.turned, pairs: case.pairs };
    let rotations = (case.turned > 0).then_some(rotations);
    let tokens = Tokens { pool: &pool, places: &places, layer: 1 };
    of.apply(&gpu.upload(&projected)?, rotations, &queries, &tokens, Some((&staged, 16)))?;

    let mut want: Vec<Vec<f64>> = vec![];
    for (i, head) in projected.chunks_exact(d).enumerate() {
        let (row, index) = (i / all, i % all);
        let mut head: Vec<f64> = head.iter().map(|x| f64::from(*x)).collect();
        if let Some(bias) = &bias {
            head.iter_mut().zip(&bias[index * d..]).for_each(|(x, b)| *x += f64::from(*b));
        }
        if index < h + g {
            if let Some(norms) = &norms {
                head = normed(&head, &norms[usize::from(index >= h)], eps);
            }
            turn(&mut head, &table[row * case.turned..][..case.turned], case.pairs);
        }
        if index < h {
            head.iter_mut().for_each(|x| *x *= f64::from(factor));
        }
        want.push(head);
    }
    let rounded = |got: &[f16], want: &[f64]| off(wide(got), want, (F16, 2e-6));
    let got: Vec<f16> = queries.read(rows * h * d)?;
    let of_queries: Vec<f64> = want.chunks_exact(all).flat_map(|row| row[..h].concat()).collect();
    let mut worst = rounded(&got, &of_queries);
    let staged: Vec<f16> = staged.read(8 + rows * 2 * g * d)?;
    let of_kept: Vec<f64> = want.chunks_exact(all).flat_map(|row| row[h..].concat()).collect();
    worst = worst.max(rounded(&staged[8..], &of_kept));
    // Pages hold what is staged, and nothing else.
    let mut in_pages: Vec<u16> = vec![0xffff; pool.data().bytes() / 2];
    let mut row = 0;
    for (&(past, new), pages) in case.spans.iter().zip(&pages) {
        for token in past..past + new {
            for (i, vector) in staged[8 + row * 2 * g * d..][..2 * g * d].chunks_exact(d).enumerate() {
                let (kind, kv_head, page) = (i / g, i % g, pages[token / PAGE_TOKENS] as usize);
                let at = (((page * g + kv_head) * 2 + kind) * PAGE_TOKENS + token % PAGE_TOKENS) * d;
                in_pages[at..at + d].iter_mut().zip(vector).for_each(|(to, x)| *to = x.to_bits());
            }
            row += 1;
        }
    }
    let got: Vec<u16> = pool.data().read(in_pages.len())?;
    match got.iter().zip(&in_pages).position(|(a, b)| a != b) {
        Some(at) => wrong(format!("{case:?}: element {at} of the pages")),
        None => Ok(worst),
    }
}

/// By cosines and sines of each pair.
fn turn(head: &mut [f64], table: &[f32], pairs: Pairs) {
    let half = table.len() / 2;
    for (i, turn) in table.chunks_exact(2).enumerate() {
        let (a, b) = if pairs == Pairs::Halves { (i, i + half) } else { (2 * i, 2 * i + 1) };
        let (cos, sin, x, y) = (f64::from(turn[0]), f64::from(turn[1]), head[a], head[b]);
        head[a] = x * cos - y * sin;
        head[b] = x * sin + y * cos;
    }
}

/// What attention of prompts is tried on.
#[derive(Clone, Debug)]
struct AttentionCase {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Tokens before, new tokens.
    spans: Vec<(usize, usize)>,
    /// One row in so many is compared; all are looked at for what is no number.
    one_in: usize,
}

fn attention_cases(large: bool) -> Vec<AttentionCase> {
    let of = |heads, kv_heads, head_dim, spans: &[(usize, usize)], one_in| AttentionCase {
        heads,
        kv_heads,
        head_dim,
        spans: spans.to_vec(),
        one_in,
    };
    let mut all = vec![
        of(2, 1, 64, &[(0, 1), (0, 65), (130, 3)], 1),
        of(1, 1, 128, &[(0, 129)], 1),
        of(3, 1, 128, &[(63, 2), (0, 0), (7, 40)], 1),
        of(4, 2, 64, &[(100, 130)], 1),
    ];
    if large {
        all.extend([
            of(32, 8, 128, &[(0, 700), (1000, 321), (64, 64)], 7),
            of(9, 3, 64, &[(0, 1111), (3, 1)], 7),
            of(8, 2, 128, &[(20_000, 500)], 37),
            of(4, 1, 128, &[(0, 4096)], 101),
        ]);
    }
    all
}

fn attention(gpu: &Gpu, random: &mut Random, case: &AttentionCase) -> Result<f64, Failure> {
    let AttentionCase { heads: h, kv_heads: g, head_dim: d, .. } = *case;
    let (pool, places, pages) = placed(gpu, random, &case.spans, (g, d))?;
    let mut kept = vec![];
    for (&(past, new), pages) in case.spans.iter().zip(&pages) {
        let tokens = past + new;
        for kv_head in 0..g {
            let (keys, values) = (random.halves(tokens * d, 1.0), random.halves(tokens * d, 1.0));
            let of_pages = keys.chunks(PAGE_TOKENS * d).zip(values.chunks(PAGE_TOKENS * d));
            for (page, (keys, values)) in pages.iter().zip(of_pages) {
                pool.write((*page as usize, kv_head), keys, values)?;
            }
            kept.push((wide(&keys), wide(&values)));
        }
    }
    let rows = places.rows();
    let queries = random.halves(rows * h * d, 1.5);
    let out = poisoned(gpu, rows * h * d * 2)?;
    let scale = 2.0 * (d as f32).sqrt().recip();
    let tokens = Tokens { pool: &pool, places: &places, layer: 1 };
    prefill::attend(&tokens, &gpu.upload(&queries)?, h, scale, &out)?;
    let got = of_bf16(&out, rows * h * d)?;
    if let Some(at) = got.iter().position(|x| !x.is_finite()) {
        return wrong(format!("{case:?}: {} in row {}", got[at], at / (h * d)));
    }
    let (mut compared, mut want, mut row) = (vec![], vec![], 0);
    for (sequence, &(past, new)) in case.spans.iter().enumerate() {
        for token in past..past + new {
            for head in 0..h {
                let at = (row * h + head) * d;
                if (row * h + head) % case.one_in == 0 {
                    let (keys, values) = &kept[sequence * g + head / (h / g)];
                    let seen = (token + 1) * d;
                    let query = wide(&queries[at..at + d]);
                    want.extend(oracle::attend(&query, &keys[..seen], &values[..seen], scale.into()));
                    compared.extend_from_slice(&got[at..at + d]);
                }
            }
            row += 1;
        }
    }
    // Weights are rounded to f16, outputs to bf16.
    Ok(off(compared, &want, (BF16, 1e-3)))
}

/// What is fetched is what was there when it was asked for, and what is sent is there for what comes after `follow`.
fn copies(gpu: &Gpu, random: &mut Random) -> Result<f64, Failure> {
    let count = 1 << 20;
    let (first, second) = (random.normals(count), random.normals(count));
    let (from, other) = (gpu.upload(&first)?, gpu.upload(&second)?);
    let mut pinned = Pinned::new(gpu, count * 8 + 64)?;
    for round in 0..3 {
        let work = gpu.alloc(count * 4)?;
        work.copy_from(0, (&from, 0), count * 4)?;
        let fetched = fetch(&[(&work, 4, count * 4 - 4), (&other, 0, 12)], pinned)?;
        fetched.follow()?;
        work.poison()?;
        pinned = fetched.wait()?;
        let got: &[f32] = pinned.numbers(0, count + 2);
        if got[..count - 1] != first[1..] || got[count - 1..] != second[..3] {
            return wrong(format!("round {round}: fetched is not what was there"));
        }
        pinned.numbers_mut(0, count).copy_from_slice(&second);
        let (to, copy) = (gpu.alloc(count * 4)?, gpu.alloc(count * 4)?);
        to.poison()?;
        let sent = send(pinned, &[(&to, 0, count * 4)])?;
        sent.follow()?;
        copy.copy_from(0, (&to, 0), count * 4)?;
        if copy.read::<f32>(count)? != second {
            return wrong(format!("round {round}: sent is not what is there"));
        }
        if !sent.is_done()? {
            return wrong(format!("round {round}: what came after a copy is done, and the copy is not"));
        }
        pinned = sent.wait()?;
    }
    Ok(0.0)
}

#[cfg(all(test, emulated))]
mod tests {
    use super::*;
    use crate::cuda::Error;
    use crate::cuda::emulated::Emulated;

    #[test]
    fn a_pass_agrees_with_the_oracle() {
        for of in checks(&Emulated::gpu(3), 5, Size::Small).unwrap() {
            assert!(of.error <= 1.0, "{of:?}");
        }
    }

    #[test]
    fn a_budget_is_held_to_and_given_back() {
        let all = Emulated::gpu(1);
        let gpu = all.with_budget(100);
        let first = gpu.alloc(60).unwrap();
        assert_eq!((gpu.used(), all.used()), ((64, 100), (0, usize::MAX)));
        let error = gpu.alloc(40).unwrap_err();
        assert_eq!(error, Error::Budget { wanted: 48, used: 64, limit: 100 });
        drop(first);
        assert_eq!(gpu.used().0, 0);
        gpu.alloc(96).unwrap();
    }

    #[test]
    #[should_panic(expected = "65 tokens in 1 pages")]
    fn rows_without_pages_are_refused() {
        let gpu = Emulated::gpu(1);
        let pool = Pool::new(&gpu, 2, (1, 64)).unwrap();
        let mut places = Places::new(&gpu, Limits { layers: 1, sequences: 1, pages: 2, rows: 1 }).unwrap();
        places.set(&[Span { past: 64, new: 1 }]).unwrap();
        places.set_pages(&[&[1]]).unwrap();
        let buffer = gpu.alloc(128).unwrap();
        let tokens = Tokens { pool: &pool, places: &places, layer: 0 };
        prefill::attend(&tokens, &buffer, 1, 1.0, &buffer).unwrap();
    }
}
