//! Layered pages that a device encodes out of exact ones, against those that the CPU does: bit by bit.

use super::{Case, Failure, Random, wrong};
use crate::cuda::Gpu;
use crate::cuda::encode::{Encoder, PageOf, Source};
use crate::cuda::exact::{PAGE_TOKENS, Pool};
use crate::cuda::layered::Scales;
use crate::layered::Pages;
use crate::layered::device::device_bytes;
use crate::rotate::multiply;
use half::f16;

/// KV heads of the exact pages.
const HEADS: usize = 3;

/// A prompt's tokens of one head, of which some come first that are not encoded.
struct Inputs {
    keys: Vec<f16>,
    values: Vec<f16>,
    matrices: [Vec<f16>; 2],
    scales: Scales,
    first: usize,
    order: Vec<u32>,
    pages: Vec<PageOf>,
}

/// Of each of the case's lengths one prompt's.
pub fn encoding(gpu: &Gpu, seed: u64, case: &Case) -> Result<(), Failure> {
    let (mut random, d) = (Random::new(seed), case.shape.head_dim);
    for &tokens in &case.lengths {
        let inputs = inputs(&mut random, tokens, case);
        let bytes = device_bytes(&on_host(&inputs, d));
        let (pool, table) = exact_pages(gpu, &mut random, &inputs, d)?;
        let mut encoder = Encoder::new(gpu, d, (tokens, inputs.pages.len()), &table)?;
        let source = Source { pool: &pool, head: HEADS - 1, first: inputs.first };
        let [keys, values] = &inputs.matrices;
        encoder.turn(source, &inputs.order, [keys, values], &inputs.scales)?;
        let got = encoder.encode(&inputs.pages, &inputs.scales)?;
        let want: [&[u8]; 5] = [
            &bytes.leading,
            &bytes.lines,
            bytemuck::cast_slice(&bytes.escapes),
            &bytes.pages.iter().flat_map(|x| bytemuck::bytes_of(x).to_vec()).collect::<Vec<u8>>(),
            &bytes.tiles.iter().flat_map(|x| bytemuck::bytes_of(x).to_vec()).collect::<Vec<u8>>(),
        ];
        let names = ["leading lines", "lines", "escapes", "pages", "tiles"];
        for (name, (part, want)) in names.into_iter().zip(got.head.parts().into_iter().zip(want)) {
            let part: Vec<u8> = part.read(want.len())?;
            if let Some(at) = part.iter().zip(want).position(|(a, b)| a != b) {
                return wrong(format!("{tokens} tokens: {name} differ from byte {at} of {} on", want.len()));
            }
        }
        let sizes: Vec<usize> = got.parts().into_iter().map(|(_, _, bytes)| bytes).collect();
        if sizes != want[..3].iter().map(|part| part.len()).collect::<Vec<_>>() {
            return wrong(format!("{tokens} tokens: {sizes:?} bytes"));
        }
    }
    Ok(())
}

fn inputs(random: &mut Random, tokens: usize, case: &Case) -> Inputs {
    let (d, first) = (case.shape.head_dim, random.below(70));
    let [keys, values] = [0, 1].map(|_| {
        let mut number = || match random.below(case.escapes.max(1)) {
            0 if case.escapes > 0 => f16::from_f32(random.normal() * 4.0),
            _ => f16::from_f32(random.normal()),
        };
        (0..(first + tokens) * d).map(|_| number()).collect::<Vec<f16>>()
    });
    // Near the identity: what is wide before is wide after.
    let matrices = [0, 1].map(|_| {
        let mut number =
            |i: usize| f16::from_f32(random.normal() * 0.03 + f32::from(u8::from(i.is_multiple_of(d + 1))));
        (0..d * d).map(&mut number).collect::<Vec<f16>>()
    });
    let mut around =
        |x: f32| -> Vec<f16> { (0..d).map(|_| f16::from_f32(x + 0.1 * random.normal())).collect() };
    let scales = Scales {
        key_mean: around(0.0),
        key_spread: around(1.0),
        value_mean: around(0.0),
        value_spread: around(1.0),
    };
    let mut order: Vec<u32> = (0..tokens as u32).collect();
    for i in (1..tokens).rev() {
        order.swap(i, random.below(i + 1));
    }
    let (mut pages, mut from) = (vec![], 0);
    while from < tokens {
        let n = if random.below(4) == 0 { 1 + random.below(64) } else { 64 }.min(tokens - from);
        let (of_keys, of_values) = case.profiles[random.below(case.profiles.len())];
        pages.push((of_keys, of_values, n));
        from += n;
    }
    Inputs { keys, values, matrices, scales, first, order, pages }
}

fn on_host(inputs: &Inputs, d: usize) -> Pages {
    let wide = |x: &[f16]| -> Vec<f32> { x.iter().map(|x| x.to_f32()).collect() };
    let turned = |rows: &[f16], matrix: &[f16], (mean, spread): (&[f16], &[f16])| -> Vec<f32> {
        let mut x = multiply(&wide(&rows[inputs.first * d..]), &wide(matrix), d);
        let inverse: Vec<f32> = spread.iter().map(|x| x.to_f32().recip()).collect();
        for row in x.chunks_exact_mut(d) {
            row.iter_mut().zip(mean).zip(&inverse).for_each(|((x, m), s)| *x = (*x - m.to_f32()) * s);
        }
        inputs.order.iter().flat_map(|t| &x[*t as usize * d..][..d]).copied().collect()
    };
    let Scales { key_mean, key_spread, value_mean, value_spread } = &inputs.scales;
    let keys = turned(&inputs.keys, &inputs.matrices[0], (key_mean, key_spread));
    let values = turned(&inputs.values, &inputs.matrices[1], (value_mean, value_spread));
    let (mut pages, mut at) = (Pages::new(d), 0);
    for &(of_keys, of_values, n) in &inputs.pages {
        let rows = at * d..(at + n) * d;
        pages.push((&keys[rows.clone()], &values[rows]), (of_keys, of_values));
        at += n;
    }
    pages
}

/// The tokens in exact pages, in any order and with others between them; which they are.
fn exact_pages(
    gpu: &Gpu,
    random: &mut Random,
    inputs: &Inputs,
    d: usize,
) -> Result<(Pool, Vec<u32>), Failure> {
    let count = (inputs.keys.len() / d).div_ceil(PAGE_TOKENS);
    let pool = Pool::new(gpu, 2 * count, (HEADS, d))?;
    pool.data().poison()?;
    let mut table: Vec<u32> = (0..2 * count as u32).collect();
    for i in (1..table.len()).rev() {
        table.swap(i, random.below(i + 1));
    }
    table.truncate(count);
    let of_pages = inputs.keys.chunks(PAGE_TOKENS * d).zip(inputs.values.chunks(PAGE_TOKENS * d));
    for (page, (keys, values)) in table.iter().zip(of_pages) {
        pool.write((*page as usize, HEADS - 1), keys, values)?;
    }
    Ok((pool, table))
}
