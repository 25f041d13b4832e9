//! Each method's arithmetic against formulas written a second time, and its rules at their boundaries.

use super::kivi::{Kivi, KiviHead, RESIDUAL};
use super::oracle::turned;
use super::quantized::{GgmlType, Orders, Quantized, QuantizedHead, Turn};
use super::quest::{Quest, QuestHead};
use super::snapkv::{SnapKv, SnapKvHead, WINDOW};
use super::strawman::{Strawman, StrawmanHead};
use super::{Head, pack, unpack};
use crate::common::uniform;
use crate::exact::ExactHead;
use half::f16;
use mosaickv_kernels::Isa;

fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut uniform = uniform(seed);
    (0..len).map(|_| f16::from_f32(uniform()).to_f32()).collect()
}

fn exact(seed: u64, tokens: usize, d: usize) -> (ExactHead, Vec<f32>, Vec<f32>) {
    let (keys, values) = (noise(seed, tokens * d), noise(seed + 1, tokens * d));
    let mut head = ExactHead::new(d, None);
    head.append(&keys, &values, (0, d));
    (head, keys, values)
}

#[test]
fn packing_keeps_every_code() {
    let codes: [u8; 32] = std::array::from_fn(|i| (i * 7 % 16) as u8);
    let (mut packed, mut out) = ([0; 16], [0.0; 32]);
    pack::<4>(&codes, &mut packed);
    unpack::<4>(&packed, &mut out);
    assert_eq!(out, codes.map(f32::from));
    let codes = codes.map(|c| c % 4);
    pack::<2>(&codes, &mut packed[..8]);
    unpack::<2>(&packed[..8], &mut out);
    assert_eq!(out, codes.map(f32::from));
}

/// `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref` of ggml, one number at a time.
fn reference(kind: GgmlType, x: &[f32]) -> Vec<u8> {
    let first_largest = (0..32).rev().fold(0, |best, i| if x[i].abs() >= x[best].abs() { i } else { best });
    match kind {
        GgmlType::Q8_0 => {
            let d = x[first_largest].abs() / 127.0;
            let id = if d > 0.0 { 1.0 / d } else { 0.0 };
            let codes = x.iter().map(|&x| {
                let (scaled, size) = (x * id, (x * id).abs());
                let up = (size + 0.5).floor();
                (if scaled < 0.0 { -up } else { up }) as i8 as u8
            });
            f16::from_f32(d).to_bits().to_le_bytes().into_iter().chain(codes).collect()
        }
        GgmlType::Q4_0 => {
            let d = x[first_largest] / -8.0;
            let id = if d != 0.0 { 1.0 / d } else { 0.0 };
            let code = |i: usize| ((x[i] * id + 8.5).floor() as i32).min(15) as u8;
            let codes = (0..16).map(|j| code(j) + 16 * code(j + 16));
            f16::from_f32(d).to_bits().to_le_bytes().into_iter().chain(codes).collect()
        }
    }
}

#[test]
fn ggml_blocks_are_those_of_its_reference() {
    let mut rows: Vec<Vec<f32>> = (0..200).map(|seed| noise(seed, 32)).collect();
    rows.push(vec![0.0; 32]);
    rows.push(vec![-3.5; 32]);
    // Two of the same size and different sign: the first one makes the scale.
    rows.push((0..32).map(|i| if i % 2 == 0 { -8.0 } else { 8.0 }).collect());
    rows.push((0..32).map(|i| 1e-7 * i as f32).collect());
    for row in &rows {
        for kind in [GgmlType::Q8_0, GgmlType::Q4_0] {
            let mut out = vec![0; kind.block_bytes()];
            kind.encode(row, &mut out);
            assert_eq!(out, reference(kind, row), "{kind:?} {row:?}");
        }
    }
}

#[test]
fn ggml_blocks_worked_by_hand() {
    // -16..=15: the largest is -16, so q4_0 has d = 2 and codes floor(x / 2 + 8.5), at most 15.
    let row: Vec<f32> = (-16..16).map(|x| x as f32).collect();
    let mut out = [0; 18];
    GgmlType::Q4_0.encode(&row, &mut out);
    let codes =
        [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15];
    let code = |i: usize| codes.get(i).copied().unwrap_or(15u8);
    assert_eq!(&out[..2], f16::from_f32(2.0).to_le_bytes());
    let want: Vec<u8> = (0..16).map(|j| code(j) | code(j + 16) << 4).collect();
    assert_eq!(out[2..], want);
    // 127 and -63.5: d = 1, and halves go away from zero.
    let mut row = vec![0.0; 32];
    (row[0], row[5], row[31]) = (127.0, -63.5, 0.5);
    let mut out = [0; 34];
    GgmlType::Q8_0.encode(&row, &mut out);
    assert_eq!(&out[..2], f16::from_f32(1.0).to_le_bytes());
    assert_eq!((out[2], out[7].cast_signed(), out[33]), (127, -64, 1));
}

#[test]
fn ggml_turns_keys_in_the_longest_runs_and_values_in_runs_of_64() {
    for (head_dim, keys, values) in [
        (32, 1, 1),
        (64, 64, 64),
        (80, 1, 1),
        (96, 1, 1),
        (128, 128, 64),
        (192, 64, 64),
        (256, 256, 64),
        (320, 64, 64),
        (576, 64, 64),
    ] {
        assert_eq!(Turn::Hadamard.orders(head_dim), Orders { keys, values }, "head_dim {head_dim}");
        assert_eq!(Turn::None.orders(head_dim), Orders { keys: 1, values: 1 });
    }
}

#[test]
fn ggml_rotation_worked_by_hand() {
    // The first column of the matrix of order n is all n^-1/2: a key of 127 * 128^1/2 in channel 0 is 127 in every
    // channel, and so is a value of 127 * 8, but in its run of 64 alone.
    let mut head = ExactHead::new(128, None);
    head.append(&[0.0; 128], &[0.0; 128], (0, 128));
    let mut head = QuantizedHead::new(&head, Quantized::new(GgmlType::Q8_0));
    let only_first = |x: f32| [&[x][..], &[0.0; 127]].concat();
    head.append(&only_first(127.0 * 128f32.sqrt()), &only_first(127.0 * 8.0));
    let token = head.pages().last().unwrap()[2 * 4 * 34..].to_vec();
    for (i, block) in token.chunks_exact(34).enumerate() {
        let number = if i < 6 { 127 } else { 0 };
        let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
        assert!((scale - if i < 6 { 1.0 } else { 0.0 }).abs() < 1e-3, "block {i}: scale {scale}");
        assert_eq!(block[2..], [number; 32], "block {i}");
    }
}

#[test]
fn ggml_keeps_rotated_rows_as_near_as_its_codes_are() {
    for d in [32, 64, 96, 128, 192, 256] {
        let (head, keys, values) = exact(d as u64, 70, d);
        for (kind, rotation) in [
            (GgmlType::Q8_0, Turn::Hadamard),
            (GgmlType::Q8_0, Turn::None),
            (GgmlType::Q4_0, Turn::Hadamard),
            (GgmlType::Q4_0, Turn::None),
        ] {
            let stored = QuantizedHead::new(&head, Quantized { kind, rotation });
            stored.check().unwrap();
            let (stored_keys, stored_values) = stored.stored_rows();
            let orders = rotation.orders(d);
            for (got, x, order) in
                [(stored_keys, &keys, orders.keys), (stored_values, &values, orders.values)]
            {
                let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                let (got, x) = (turned(&got, order), turned(&x, order));
                for (got, x) in got.chunks_exact(32).zip(x.chunks_exact(32)) {
                    let largest = x.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                    // Half a step, or where 4 bits have no 8, a whole one; and what rounding the scale to f16 does.
                    let step = if kind == GgmlType::Q8_0 { 0.5 / 127.0 } else { 1.0 / 8.0 };
                    let bound = largest * (step + 2f64.powi(-11)) + 1e-6;
                    let far = got.iter().zip(x).map(|(got, x)| (got - x).abs()).fold(0.0, f64::max);
                    assert!(far <= bound, "{kind:?} {rotation:?} of {d}: {far} from a number, bound {bound}");
                }
            }
        }
    }
}

#[test]
fn rotation_lowers_the_error_of_outlier_channels() {
    let tokens = 200;
    for d in [64, 128, 256] {
        // As keys have them: two channels 20 and 30 times as large as the others, the same ones of every token.
        let mut head = ExactHead::new(d, None);
        let (mut keys, mut values) = (noise(1, tokens * d), noise(2, tokens * d));
        for row in keys.chunks_exact_mut(d).chain(values.chunks_exact_mut(d)) {
            (row[5], row[d - 7]) = (20.0 * row[5], 30.0 * row[d - 7]);
        }
        head.append(&keys, &values, (0, d));
        let errors = |rotation: Turn| -> [f64; 2] {
            let stored = QuantizedHead::new(&head, Quantized { kind: GgmlType::Q4_0, rotation });
            let (stored_keys, stored_values) = stored.stored_rows();
            [(stored_keys, &keys), (stored_values, &values)].map(|(got, x)| {
                let squares = got.iter().zip(x).map(|(got, x)| (got - f64::from(*x)).powi(2));
                squares.sum::<f64>() / x.len() as f64
            })
        };
        let (rotated, plain) = (errors(Turn::Hadamard), errors(Turn::None));
        println!("head_dim {d}: keys, values {rotated:?}, without rotation {plain:?}");
        for (rotated, plain) in rotated.into_iter().zip(plain) {
            assert!(rotated < 0.5 * plain, "{d}: {rotated}, without rotation {plain}");
        }
    }
}

#[test]
fn kivi_groups_are_those_of_the_formula() {
    for kind in [Kivi::Bits4, Kivi::Bits2] {
        let most = f64::from((1u32 << kind.bits()) - 1);
        for seed in 0..100 {
            let x: [f32; 32] = noise(seed, 32).try_into().unwrap();
            let (codes, scale, low) = kind.quantize(&x);
            let min = x.iter().copied().fold(f32::MAX, f32::min);
            let max = x.iter().copied().fold(f32::MIN, f32::max);
            assert_eq!(low.to_f32(), min);
            let want = f64::from(max - min) / most;
            assert!((scale.to_f64() - want).abs() <= want * 2f64.powi(-11), "{scale}, wanted {want}");
            for (x, code) in x.iter().zip(codes) {
                let stands_for = f64::from(code) * scale.to_f64() + low.to_f64();
                // Half a step, and what rounding the scale to f16 moves the largest code by.
                let bound = scale.to_f64() * (0.5 + most * 2f64.powi(-11));
                assert!((stands_for - f64::from(*x)).abs() <= bound + 1e-6, "{x} became {stands_for}");
                assert!(f64::from(code) <= most);
            }
        }
        let (codes, scale, low) = kind.quantize(&[0.75; 32]);
        assert_eq!((codes, scale, low), ([0; 32], f16::ZERO, f16::from_f32(0.75)));
    }
    // 0..=31 in 2 bits: steps of 31/3, so codes change at 5.2, 15.5 and 25.8.
    let (codes, _, _) = Kivi::Bits2.quantize(&std::array::from_fn(|i| i as f32));
    let want = |i: usize| [5.2, 15.5, 25.8].iter().filter(|&&x| i as f32 > x).count() as u8;
    assert_eq!(codes, std::array::from_fn(want));
}

#[test]
fn kivi_keeps_what_its_residual_rules_say() {
    let d = 32;
    for prompt in [1, 100, 127, 128, 129, 200, 256, 257] {
        let (head, ..) = exact(7, prompt, d);
        let mut head = KiviHead::new(&head, Kivi::Bits2);
        // After a prompt: keys in whole chunks, values but for the newest 128.
        assert_eq!(head.quantized_keys(), prompt / RESIDUAL * RESIDUAL, "prompt of {prompt}");
        assert_eq!(head.quantized_values, prompt.saturating_sub(RESIDUAL), "prompt of {prompt}");
        for tokens in prompt + 1..prompt + 150 {
            head.append(&noise(tokens as u64, d), &noise(tokens as u64, d));
            head.check().unwrap();
            // What attention at this token sees: the chunk that is full now is quantized after it, as is the
            // value that is now the 129th.
            let whole = tokens / RESIDUAL * RESIDUAL;
            let keys = if tokens == whole { whole - RESIDUAL } else { whole };
            assert_eq!(head.quantized_keys(), keys, "{prompt}, {tokens} tokens");
            assert_eq!(
                head.quantized_values,
                tokens.saturating_sub(RESIDUAL + 1),
                "{prompt}, {tokens} tokens"
            );
        }
    }
}

#[test]
fn kivi_quantizes_keys_by_channel_and_values_by_token() {
    let (d, tokens) = (64, 300);
    let mut head = ExactHead::new(d, None);
    // One channel of the keys and one token's value are 1,024 times larger: neither harms its neighbours.
    let mut keys = noise(1, tokens * d);
    let mut values = noise(2, tokens * d);
    keys.iter_mut().skip(5).step_by(d).for_each(|x| *x *= 1024.0);
    values[20 * d..21 * d].iter_mut().for_each(|x| *x *= 1024.0);
    head.append(&keys, &values, (0, d));
    let (stored_keys, stored_values) = KiviHead::new(&head, Kivi::Bits4).oracle_rows(&[], 0);
    for t in 0..tokens {
        for c in 0..d {
            let (key, value) = (f64::from(keys[t * d + c]), f64::from(values[t * d + c]));
            if c != 5 {
                assert!((stored_keys[t * d + c] - key).abs() < 0.08, "key {t} {c}");
            }
            if t != 20 {
                assert!((stored_values[t * d + c] - value).abs() < 0.08, "value {t} {c}");
            }
        }
    }
    assert_eq!(stored_keys[256 * d..], keys[256 * d..].iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
}

#[test]
fn quest_bounds_hold_and_each_query_selects_for_itself() {
    let (d, tokens) = (16, 16 * 50 + 3);
    let mut head = ExactHead::new(d, None);
    let mut keys = noise(1, tokens * d);
    // Block 7 is made for a query along channel 0, block 31 for one against channel 1.
    keys[(7 * 16 + 2) * d] = 50.0;
    keys[(31 * 16 + 9) * d + 1] = -50.0;
    head.append(&keys, &noise(2, tokens * d), (0, d));
    let quest = QuestHead::new(head, Quest::default());
    quest.check().unwrap();
    let mut queries = vec![0.0; 2 * d];
    (queries[0], queries[d + 1]) = (1.0, -1.0);
    let plan = quest.plan(Isa::current(), &queries);
    // A tenth of 51 blocks, rounded up, the newest among them.
    assert_eq!(plan.blocks.iter().map(Vec::len).collect::<Vec<_>>(), [6, 6]);
    assert!(plan.blocks.iter().all(|blocks| blocks.last() == Some(&50)));
    assert!(plan.blocks[0].contains(&7) && plan.blocks[1].contains(&31));
    assert_ne!(plan.blocks[0], plan.blocks[1]);
}

#[test]
fn quest_attends_to_three_blocks_at_least() {
    let budget = |blocks| Quest::default().budget(blocks);
    assert_eq!([1, 2, 3, 4, 29, 30, 31, 256].map(budget), [1, 2, 3, 3, 3, 3, 4, 26]);
}

/// Votes as Listing 1 of the paper has them, pooled and averaged, in f64.
fn votes_by_formula(keys: &[f32], queries: &[f32], (d, group): (usize, usize)) -> Vec<f64> {
    let tokens = keys.len() / d;
    let prefix = tokens - WINDOW;
    let mut total = vec![0.0; prefix];
    for head in 0..group {
        let mut votes = vec![0.0; prefix];
        for w in 0..WINDOW {
            let query = &queries[(w * group + head) * d..][..d];
            let seen = prefix + w + 1;
            let score = |t: usize| -> f64 {
                keys[t * d..][..d].iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum()
            };
            let weights: Vec<f64> = (0..seen).map(|t| score(t).exp()).collect();
            let sum: f64 = weights.iter().sum();
            (0..prefix).for_each(|t| votes[t] += weights[t] / sum);
        }
        for (t, total) in total.iter_mut().enumerate() {
            let near = &votes[t.max(3) - 3..prefix.min(t + 4)];
            *total += near.iter().copied().fold(0.0, f64::max) / group as f64;
        }
    }
    total
}

#[test]
fn snapkv_keeps_what_the_window_voted_for() {
    for (tokens, group, kept) in [(100, 1, 0.4), (333, 3, 0.25), (700, 2, 0.1)] {
        let d = 32;
        let (head, keys, values) = exact(3, tokens, d);
        let queries = noise(9, WINDOW * group * d);
        let got = super::snapkv::votes(&keys, &queries, d);
        let want = votes_by_formula(&keys, &queries, (d, group));
        for (g, w) in got.iter().zip(&want) {
            assert!((f64::from(*g) - w).abs() < 1e-5 * w.abs(), "{g}, wanted {w}");
        }
        let snap = SnapKvHead::new(head, SnapKv { kept }, &queries);
        let capacity = (kept * tokens as f32).ceil() as usize;
        let mut order: Vec<usize> = (0..want.len()).collect();
        order.sort_by(|&a, &b| got[b].total_cmp(&got[a]).then(a.cmp(&b)));
        let mut stay: Vec<usize> = order[..capacity - WINDOW].to_vec();
        stay.sort_unstable();
        stay.extend(tokens - WINDOW..tokens);
        assert_eq!((snap.tokens(), snap.kept.tokens()), (tokens, capacity));
        let mut rows = stay.iter().map(|&t| t * d..(t + 1) * d);
        snap.kept.each_token(|key, value| {
            let span = rows.next().unwrap();
            assert_eq!((key, value), (&keys[span.clone()], &values[span]));
        });
    }
    // A prompt no longer than the window stays whole, as does its window whatever the share.
    assert_eq!([1, 32, 33, 400].map(|t| SnapKv { kept: 0.01 }.capacity(t)), [1, 32, 32, 32]);
}

#[test]
fn the_strawman_keeps_the_same_channels_of_every_vector() {
    let d = 64;
    let (head, keys, _) = exact(5, 500, d);
    let straw = StrawmanHead::new(&head, Strawman { selected: 1.0, ..Strawman::default() });
    straw.check().unwrap();
    let segment = straw.segment.as_ref().unwrap();
    assert_eq!(straw.channels(), 16);
    // (500 - 4 - 32) / 32 pages of 32 tokens: keys, values and four mean keys of 16 numbers.
    assert_eq!((segment.pages.len(), segment.pages[0].len()), (14, (32 + 32 + 4) * 16));
    // The first stored key is the fifth token's, along the leading eigenvectors.
    let matrix = segment.rotation.key_matrix();
    for c in 0..16 {
        let want: f64 = (0..d).map(|i| f64::from(keys[4 * d + i]) * f64::from(matrix[i * 16 + c])).sum();
        assert!((segment.pages[0][c].to_f64() - want).abs() < 2e-3, "channel {c}");
        let mean: f64 = (0..8).map(|t| segment.pages[0][t * 16 + c].to_f64()).sum::<f64>() / 8.0;
        assert!((segment.pages[0][64 * 16 + c].to_f64() - mean).abs() < 2e-3, "mean, channel {c}");
    }
}
