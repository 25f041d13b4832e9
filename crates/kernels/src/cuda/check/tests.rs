//! The kernels, emulated, at odd sizes.

use super::*;
use crate::cuda::emulated::Emulated;
use crate::cuda::layered::Growing;

fn shape(sequences: usize, kv_heads: usize, rows: usize, head_dim: usize) -> Shape {
    Shape { sequences, kv_heads, rows, head_dim }
}

/// Weights of exact attention are rounded to f16, those of layered attention to 16 bits of the largest of 32.
const EXACT_ERROR: f64 = 1e-3;
const LAYERED_ERROR: f64 = 1e-3;

#[test]
fn exact_attention_agrees_with_the_oracle() {
    for (i, (rows, head_dim)) in [(1, 64), (3, 128), (4, 128), (8, 64)].into_iter().enumerate() {
        for (j, (blocks, parts)) in [(1, 1), (3, 2), (7, 5)].into_iter().enumerate() {
            let gpu = Emulated::gpu(blocks);
            let lengths = [1, 63, 0, 64, 65, 129 + 40 * i, 17];
            let of = &lengths[j..j + 4];
            let error = exact(&gpu, (10 * i + j) as u64, shape(4, 2, rows, head_dim), of, parts).unwrap();
            assert!(error < EXACT_ERROR, "{rows} rows of {head_dim}, {of:?}: off by {error:.1e}");
        }
    }
}

#[test]
fn layered_attention_to_all_agrees_with_the_oracle() {
    for (i, (rows, head_dim)) in [(4, 128), (1, 64), (3, 64), (8, 128)].into_iter().enumerate() {
        let lengths = [[1, 300], [65, 16], [127, 0], [530, 64]][i];
        let gpu = Emulated::gpu(1 + 2 * i);
        let mut of = Case::whole(shape(2, 1, rows, head_dim), &lengths);
        of.escapes = [100, 0, 3, 30][i];
        let with_known = Case { known: vec![70, 5], ..of.clone() };
        for of in [of, with_known] {
            let outcome = layered(&gpu, i as u64, &of).unwrap();
            assert!(outcome.error < LAYERED_ERROR, "{rows} rows of {head_dim}: {outcome:?}");
            assert_eq!(outcome.tiles.0, outcome.tiles.1);
        }
    }
}

/// Cut into 16 parts, into 64, and into parts that may not be larger.
#[test]
fn lists_of_any_length_are_read_whole() {
    for (tokens, tiles) in [(6_500, 400..513), (8_200, 513..1024), (18_000, 1025..2048), (33_000, 2049..3000)]
    {
        let outcome = layered(&Emulated::gpu(3), 5, &Case::whole(shape(1, 1, 1, 64), &[tokens])).unwrap();
        assert!(outcome.error < LAYERED_ERROR, "{tokens} tokens: {outcome:?}");
        assert!(outcome.tiles.0 == outcome.tiles.1 && tiles.contains(&outcome.tiles.0), "{outcome:?}");
    }
}

#[test]
fn each_profile_by_itself_agrees_with_the_oracle() {
    for d in [64, 128] {
        for (i, of_pages) in profiles(d).into_iter().enumerate() {
            let of = Case { profiles: vec![of_pages], ..Case::whole(shape(1, 1, 4, d), &[100]) };
            let outcome = layered(&Emulated::gpu(2), i as u64, &of).unwrap();
            assert!(outcome.error < LAYERED_ERROR, "{of_pages:?} of {d}: {outcome:?}");
        }
    }
}

#[test]
fn chosen_tiles_are_those_that_are_needed() {
    let choices = [
        (Needed::Mass(0.9), 0, 1),
        (Needed::Mass(0.9), 5, 4),
        (Needed::Mass(0.9999), 3, 9),
        (Needed::Mass(0.3), 40, 3),
        (Needed::Relative(0.05), 1, 2),
        (Needed::Relative(0.9), 10, 7),
    ];
    for (i, (needed, least_tiles, one_in)) in choices.into_iter().enumerate() {
        let (rows, d) = [(4, 128), (1, 64), (8, 64), (3, 128)][i % 4];
        let choice = Choice { needed: Some(needed), from_tokens: 200, least_tiles, one_in };
        let mut of = Case::whole(shape(3, 1, rows, d), &[900, 130, 401 + i]);
        of.choice = choice;
        of.always = i % 3;
        of.spread = [3.0, 8.0, 0.5][i % 3];
        // Sketches of pages without bits say nothing.
        of.profiles.remove(0);
        if i % 2 == 0 {
            of.known = vec![10, 0, 90];
        }
        let outcome = layered(&Emulated::gpu(3), i as u64, &of).unwrap();
        assert!(outcome.error < LAYERED_ERROR, "{needed:?}: {outcome:?}");
        assert!(outcome.tiles.0 < outcome.tiles.1, "{needed:?}: {outcome:?}");
    }
}

#[test]
fn pages_are_encoded_to_the_bit() {
    for (i, d) in [64, 128].into_iter().enumerate() {
        for escapes in [0, 5, 100] {
            let of = Case { escapes, ..Case::whole(shape(1, 1, 1, d), &[1, 63, 700]) };
            encode::encoding(&Emulated::gpu(1), i as u64, &of).unwrap();
        }
    }
}

#[test]
fn what_a_sequence_gets_does_not_depend_on_the_others() {
    let gpu = Emulated::gpu(3);
    let (mut random, d) = (Random::new(7), 64);
    let tokens: Vec<(Vec<f16>, Vec<f16>)> =
        [300, 150, 40].iter().map(|n| (random.halves(n * d, 1.0), random.halves(n * d, 1.0))).collect();
    let queries = random.halves(3 * 2 * d, 1.0);
    let run = |which: &[usize]| -> Vec<Vec<f32>> {
        let shape = shape(which.len(), 1, 2, d);
        let pool = exact::Pool::new(&gpu, 16, (1, d)).unwrap();
        let mut step = exact::Exact::new(&gpu, shape, 5, (3, 64)).unwrap();
        let (mut sequences, mut of_queries, mut next) = (vec![], vec![], 0u32);
        for &i in which {
            let (keys, values) = &tokens[i];
            let count = (keys.len() / d).div_ceil(64) as u32;
            let of_pages = keys.chunks(64 * d).zip(values.chunks(64 * d));
            for (page, (keys, values)) in (next..).zip(of_pages) {
                pool.write((page as usize, 0), keys, values).unwrap();
            }
            sequences.push((keys.len() / d, (next..next + count).collect()));
            next += count;
            of_queries.extend_from_slice(&queries[i * 2 * d..][..2 * d]);
        }
        step.set(&sequences).unwrap();
        let (on_device, out) =
            (gpu.upload(&of_queries).unwrap(), gpu.alloc(which.len() * 2 * d * 4).unwrap());
        step.attend(&pool, &on_device, 0.1).unwrap();
        step.finish(&out).unwrap();
        out.read::<f32>(which.len() * 2 * d).unwrap().chunks_exact(2 * d).map(<[f32]>::to_vec).collect()
    };
    let all = run(&[0, 1, 2]);
    assert_eq!(run(&[1]), all[1..2]);
    assert_eq!(run(&[2, 0]), [all[2].clone(), all[0].clone()]);
}

#[test]
fn what_a_layered_sequence_gets_does_not_depend_on_the_others() {
    let (gpu, mut random, rows, d) = (Emulated::gpu(3), Random::new(7), 2, 64);
    let choice = Choice { needed: Some(Needed::Mass(0.9)), from_tokens: 200, least_tiles: 20, one_in: 4 };
    let case = Case { choice, ..Case::whole(shape(1, 1, rows, d), &[]) };
    let heads = [900, 300, 40].map(|tokens| inputs(&gpu, &mut random, &case, tokens).unwrap());
    let most = heads.iter().map(|h| h.pages.pages().len()).max().unwrap();
    let [of_queries, of_outputs] = [0, 1].map(|_| random.halves(d * d, 0.125));
    let rotations = Rotations::new(&gpu, &of_queries, &of_outputs, d).unwrap();
    let queries = random.halves(heads.len() * rows * d, 1.0);
    let run = |which: &[usize]| -> Vec<Vec<f32>> {
        let shape = shape(which.len(), 1, rows, d);
        let mut step = Layered::new(&gpu, shape, (most, 0), choice, (5, 8)).unwrap();
        step.set(&which.iter().map(|i| &heads[*i].head).collect::<Vec<_>>(), &[&rotations]).unwrap();
        let asked: Vec<f16> =
            which.iter().flat_map(|i| queries[i * rows * d..][..rows * d].to_vec()).collect();
        let (on_device, out) = (gpu.upload(&asked).unwrap(), gpu.alloc(which.len() * rows * d * 4).unwrap());
        step.step(&on_device, 0.1, None, &out).unwrap();
        let got: Vec<f32> = out.read(which.len() * rows * d).unwrap();
        got.chunks_exact(rows * d).map(<[f32]>::to_vec).collect()
    };
    let all = run(&[0, 1, 2]);
    assert_eq!(run(&[1]), all[1..2]);
    assert_eq!(run(&[2, 0]), [all[2].clone(), all[0].clone()]);
}

/// Pages come in several times, each time with other newest ones, of which some may stay, in a buffer that has to grow.
#[test]
fn a_head_that_grew_is_the_one_that_was_uploaded_at_once() {
    let (gpu, d) = (Emulated::gpu(1), 64);
    let mut random = Random::new(5);
    let mut pages = |count: usize| {
        let mut pages = Pages::new(d);
        for i in 0..count {
            let (keys, values) = (random.normals((64 - i) * d), random.normals((64 - i) * d));
            pages.push((&keys, &values), profiles(d)[(i + count) % 9]);
        }
        pages
    };
    let one = || vec![f16::ONE; d];
    let scales = Scales { key_mean: one(), key_spread: one(), value_mean: one(), value_spread: one() };
    let mut kept = pages(3);
    let mut growing = Growing::new(&gpu, (&kept, 1), &scales).unwrap();
    let mut newest = Pages::new(d);
    for (more, same, after) in [(9, 0, 2), (0, 0, 4), (0, 3, 2), (0, 5, 1), (30, 0, 0), (3, 0, 5), (0, 2, 0)]
    {
        let (more, after) = (pages(more), pages(after));
        growing.grow(&more, (same, &after)).unwrap();
        // Every other time what is written waits for the next one.
        if same != 3 {
            growing.write().unwrap();
            growing.written();
        }
        kept.append(&more);
        newest = newest.split_first(same);
        newest.append(&after);
        if same == 3 {
            continue;
        }
        let mut all = kept.clone();
        all.append(&newest);
        let whole = Head::upload(&gpu, &all, kept.pages().len(), &scales).unwrap();
        let bytes = device_bytes(&all);
        let sizes = [
            bytes.leading.len(),
            bytes.lines.len(),
            bytes.escapes.len() * 4,
            bytes.pages.len() * 8,
            bytes.tiles.len() * 32,
        ];
        for ((got, want), size) in growing.head().parts().into_iter().zip(whole.parts()).zip(sizes) {
            assert_eq!(got.read::<u8>(size).unwrap(), want.read::<u8>(size).unwrap());
        }
        assert!(growing.bytes() >= whole.bytes().iter().sum::<usize>() - 5 * 16);
    }
}
