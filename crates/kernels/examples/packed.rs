//! How fast are the packed kernels? Nanoseconds a token and bytes a second, per instruction set, one thread.
//!
//! `cargo run --release -p mosaickv-kernels --example packed [tokens]`, 131072 tokens by default. The first page
//! of every run is compared with f64 attention before a time is printed.
//!
//! Measured on 2026-11-23, with pages of 64 tokens, on one of two shared cores of an AMD EPYC (Zen 4), others compiling beside it, `packed 16384`,
//! 75 % of the elements dropped, token block 8, groups of 1, nanoseconds a token:
//! ```text
//!               D=128 R=4         D=64 R=3
//!               avx512   avx2     avx512   avx2
//! score_blocks    2.3     2.5       1.4     1.6
//! attend_page    26.3    33.4      13.1    16.5
//! attend, 10 %   33.6    42.9      18.6    23.0
//! encode         1030              520
//! ```
//! Four rows are bound by the multiply-adds (36 of them more than one row, 11 ns more), one row by the spreading
//! of elements over lanes.

use mosaickv_kernels::packed::{
    PAGE_TOKENS, PackedPage, PackedShape, attend_page, attend_selected, score_pages,
};
use mosaickv_kernels::{AttnState, Isa, oracle, select};
use std::time::Instant;

/// A pass over all pages is timed in this many parts.
const PARTS: usize = 32;

fn main() {
    let tokens: usize = std::env::args().nth(1).map_or(131_072, |a| a.parse().expect("a number of tokens"));
    stream(tokens);
    for (head_dim, rows, group) in [(128, 4, 1), (128, 4, 4), (128, 1, 1), (64, 3, 1), (64, 3, 2)] {
        let shape = PackedShape::with_rate(head_dim, 0.75, group).expect("a shape of the paper");
        let c = shape.channels();
        println!("D={head_dim} R={rows} C={c} r={} g={group} block=8, {tokens} tokens", shape.kept());
        let pages: Vec<PackedPage> = (0..tokens / PAGE_TOKENS)
            .map(|i| {
                PackedPage::encode(
                    shape,
                    8,
                    &noise(2 * i, PAGE_TOKENS * c),
                    &noise(2 * i + 1, PAGE_TOKENS * c),
                )
            })
            .collect();
        let (keys, values) = (noise(1, PAGE_TOKENS * c), noise(2, PAGE_TOKENS * c));
        let seconds = best(|| drop(std::hint::black_box(PackedPage::encode(shape, 8, &keys, &values))));
        let bytes: usize = pages.iter().map(PackedPage::bytes).sum();
        let ratio = (tokens * 4 * head_dim) as f64 / bytes as f64;
        println!("  encode: {:.0} ns a token, ratio {ratio:.2}", seconds * 1e9 / PAGE_TOKENS as f64);
        let queries = noise(usize::MAX / 2, rows * c);
        for &isa in Isa::available().iter().rev() {
            check(isa, &queries, &pages[0]);
            run(isa, &queries, &pages, tokens);
        }
    }
}

fn run(isa: Isa, queries: &[f32], pages: &[PackedPage], tokens: usize) {
    let (c, blocks) = (pages[0].shape().channels(), pages[0].blocks());
    let rows = queries.len() / c;
    let mut scores = vec![0.0; rows * blocks * pages.len()];
    let seconds = best(|| score_pages(isa, queries, pages, &mut scores));
    report(isa, "score_pages", seconds, tokens, pages.iter().map(PackedPage::bytes_of_block_keys).sum());
    let first = &scores[..blocks * pages.len()];
    let mut chosen = Vec::new();
    let seconds = best(|| chosen = select::top_k(first, first.len() / 10));
    report(isa, "top_k of 10 %", seconds, tokens, 4 * first.len());
    let mut state = AttnState::new(rows, c);
    let parts: Vec<&[PackedPage]> = pages.chunks(pages.len().div_ceil(PARTS)).collect();
    let seconds = best_of_parts(parts.len(), |part| {
        state.clear();
        parts[part].iter().for_each(|page| attend_page(isa, queries, page, &mut state));
    });
    let block = pages[0].bytes_of_block();
    report(isa, "attend_page", seconds, tokens, block * blocks * pages.len());
    let selected: Vec<(&PackedPage, u32)> =
        chosen.iter().map(|&b| (&pages[b as usize / blocks], b % blocks as u32)).collect();
    let seconds = best(|| {
        state.clear();
        attend_selected(isa, queries, &selected, &mut state);
    });
    report(isa, "attend_selected, 10 %", seconds, chosen.len() * 8, block * chosen.len());
}

/// The bandwidth of this machine, to compare with: a sum over as many bytes as 128 channels of exact f16.
fn stream(tokens: usize) {
    let words = vec![1u64; tokens * 64];
    let mut sum = 0u64;
    let parts: Vec<&[u64]> = words.chunks(words.len().div_ceil(PARTS)).collect();
    let seconds = best_of_parts(parts.len(), |part| {
        sum = std::hint::black_box(parts[part]).iter().fold(sum, |a, &b| a ^ b);
    });
    println!("stream: {:.1} GB/s (sum {sum})", words.len() as f64 * 8e-9 / seconds);
}

/// As [`best_of_parts`] of one part.
fn best(mut body: impl FnMut()) -> f64 {
    best_of_parts(1, |_| body())
}

/// The sum over the parts of each part's shortest time, within a third of a second and at least five rounds over
/// all parts: other work on the machine only adds, and parts shorter than a time slice are sometimes spared.
fn best_of_parts(parts: usize, mut body: impl FnMut(usize)) -> f64 {
    let (mut best, mut rounds, begin) = (vec![f64::INFINITY; parts], 0, Instant::now());
    while rounds < 5 || begin.elapsed().as_secs_f64() < 0.35 {
        rounds += 1;
        for (part, best) in best.iter_mut().enumerate() {
            let start = Instant::now();
            body(part);
            *best = best.min(start.elapsed().as_secs_f64());
        }
    }
    best.iter().sum()
}

fn report(isa: Isa, what: &str, seconds: f64, tokens: usize, bytes: usize) {
    let (ns, rate) = (seconds * 1e9 / tokens as f64, bytes as f64 * 1e-9 / seconds);
    println!("  {:7} {what:22} {ns:7.2} ns a token {rate:6.2} GB/s", isa.name());
}

fn check(isa: Isa, queries: &[f32], page: &PackedPage) {
    let c = page.shape().channels();
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let mut state = AttnState::new(queries.len() / c, c);
    attend_page(isa, queries, page, &mut state);
    let mut out = vec![0.0; queries.len()];
    state.finish(&mut out);
    for (q, out) in queries.chunks_exact(c).zip(out.chunks_exact(c)) {
        let want = oracle::attend(&wide(q), &wide(&page.decode_keys()), &wide(&page.decode_values()), 1.0);
        let worst = out.iter().zip(&want).fold(0.0f64, |m, (&x, y)| m.max((f64::from(x) - y).abs()));
        assert!(worst < 1e-5, "{}: off by {worst}, no time is worth printing", isa.name());
    }
}

fn noise(seed: usize, n: usize) -> Vec<f32> {
    let mut x = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}
