//! Arbitrary bytes are a packed page or an error. What parses is attended to by every instruction set and must
//! agree with f64 attention over its decoded rows.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run packed_page --sanitizer address -- -max_len=32768 -max_total_time=60`
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use mosaickv_kernels::packed::{PackedPage, PackedShape, Selected, attend_selected, score_blocks};
use mosaickv_kernels::{AttnState, Isa, oracle};

fuzz_target!(|bytes: &[u8]| {
    let Ok(page) = PackedPage::from_bytes(bytes) else { return };
    assert_eq!(page.to_bytes(), bytes, "one page, one encoding");
    let c = page.shape().channels();
    let (keys, values) = (page.decode_keys(), page.decode_values());
    // Rows and selection from the page itself, so that the fuzzer steers them.
    let sum = bytes.iter().fold(0u32, |a, &b| a.wrapping_mul(31).wrapping_add(u32::from(b)));
    let (rows, selected) = (1 + (sum % 5) as usize, sum >> 8);
    // Scores of a few units at most: larger ones differ by more than rounding, in any arithmetic.
    let top = keys.iter().chain(&page.decode_block_keys()).fold(1e-6f32, |m, x| m.max(x.abs()));
    let queries: Vec<f32> =
        (0..rows * c).map(|i| ((i * 37 % 61) as f32 / 30.0 - 1.0) * 8.0 / (top * c as f32)).collect();
    for &isa in Isa::available() {
        check_attention(isa, &page, &queries, selected, &keys, &values);
        check_scores(isa, &page, &queries);
    }
});

// Random bytes are hardly ever a page: half of the time the mutator builds one from them.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = fuzzer_mutate(data, size, max_size);
    if seed % 2 == 0 || size < 16 {
        return size;
    }
    let pick = |at: usize, of: &[usize]| of[usize::from(data[at]) % of.len()];
    let (group, block) = (pick(0, &[1, 2, 4]), pick(1, &[4, 8, 16]));
    let channels = 16 * (1 + usize::from(data[2]) % 8);
    let kept = group * (1 + usize::from(data[3]) % (channels / group));
    let tokens = block * (1 + usize::from(data[4]) % (512 / block));
    let shape = PackedShape::new(channels, channels, kept, group).expect("a valid shape");
    let rest = data[5..size].to_vec();
    let vector = |skip: usize| -> Vec<f32> {
        let bytes = rest.iter().cycle().skip(skip % rest.len());
        bytes
            .take(tokens * channels)
            .enumerate()
            .map(|(i, &b)| f32::from(b as i8) * (1 + i % 7) as f32)
            .collect()
    };
    let out = PackedPage::encode(shape, block, &vector(0), &vector(3)).to_bytes();
    if out.len() > max_size {
        return size;
    }
    data[..out.len()].copy_from_slice(&out);
    out.len()
});

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn check_attention(
    isa: Isa,
    page: &PackedPage,
    queries: &[f32],
    selected: u32,
    keys: &[f32],
    values: &[f32],
) {
    let c = page.shape().channels();
    // The sum has 24 bits left to choose with: they repeat.
    let is_selected = |b: usize| selected >> (b % 24) & 1 == 1;
    let chosen = |x: &[f32]| -> Vec<f64> {
        let blocks = x.chunks_exact(page.block() * c).enumerate();
        blocks.filter(|(b, _)| is_selected(*b)).flat_map(|(_, x)| wide(x)).collect()
    };
    let (keys, values) = (chosen(keys), chosen(values));
    let mut state = AttnState::new(queries.len() / c, c);
    let list: Vec<Selected> =
        (0..page.blocks()).filter(|&b| is_selected(b)).map(|b| (page, b as u32)).collect();
    attend_selected(isa, queries, &list, &mut state);
    let mut out = vec![f32::NAN; queries.len()];
    state.finish(&mut out);
    let top = values.iter().fold(1e-6f64, |m, v| m.max(v.abs()));
    for (q, out) in queries.chunks_exact(c).zip(out.chunks_exact(c)) {
        let mut want = oracle::attend(&wide(q), &keys, &values, 1.0);
        want.resize(c, 0.0);
        for (&x, y) in out.iter().zip(want) {
            assert!((f64::from(x) - y).abs() <= 1e-5 * top, "{}: {x}, want {y}", isa.name());
        }
    }
}

fn check_scores(isa: Isa, page: &PackedPage, queries: &[f32]) {
    let (c, blocks) = (page.shape().channels(), page.blocks());
    let keys = wide(&page.decode_block_keys());
    let mut scores = vec![f32::NAN; queries.len() / c * blocks];
    score_blocks(isa, queries, page, &mut scores);
    for (q, scores) in queries.chunks_exact(c).zip(scores.chunks_exact(blocks)) {
        for (key, &score) in keys.chunks_exact(c).zip(scores) {
            let want: f64 = q.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum();
            assert!((f64::from(score) - want).abs() <= 1e-5, "{}: {score}, want {want}", isa.name());
        }
    }
}
