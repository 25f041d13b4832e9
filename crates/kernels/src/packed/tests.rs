//! The packed format against its definition and against attention in f64.

use super::*;
use crate::isa::Isa;
use crate::oracle;
use crate::state::AttnState;
use half::f16;
use proptest::prelude::*;

/// Uniform in -1..1.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Every shape that the tests walk: head dims 64, 80 and 128 by the paper's rates, and edges: all channels
/// kept, one group kept, a single chunk.
fn shapes() -> Vec<PackedShape> {
    let mut shapes = Vec::new();
    for group in [1, 2, 4] {
        for head_dim in [64, 80, 128] {
            shapes.extend(
                [0.875, 0.75, 0.625].map(|rate| PackedShape::with_rate(head_dim, rate, group).unwrap()),
            );
        }
        for (d, c, r) in [(64, 64, 64), (16, 16, group), (128, 128, 4), (256, 192, 64), (112, 112, 28)] {
            shapes.push(PackedShape::new(d, c, r, group).unwrap());
        }
    }
    shapes
}

fn page(seed: u64, shape: PackedShape, block: usize, tokens: usize) -> PackedPage {
    let n = tokens * shape.channels();
    PackedPage::encode(shape, block, &noise(seed, n), &noise(seed + 1, n))
}

/// Blocks of the page: bit `b` of `which` for block `b`.
fn blocks(page: &PackedPage, which: u32) -> Vec<Selected<'_>> {
    (0..page.blocks().min(32) as u32).filter(|b| which >> b & 1 == 1).map(|b| (page, b)).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The definition: sort groups by energy, keep the first, round to f16.
fn kept(vector: &[f32], shape: PackedShape) -> Vec<f32> {
    let g = shape.group();
    let energy = |i: usize| -> f32 {
        let group = &vector[i * g..(i + 1) * g];
        if g == 1 { group[0].abs() } else { group.iter().map(|x| x * x).sum() }
    };
    let mut order: Vec<usize> = (0..vector.len() / g).collect();
    order.sort_by(|&a, &b| energy(b).total_cmp(&energy(a)).then(a.cmp(&b)));
    let mut out = vec![0.0; vector.len()];
    for &i in &order[..shape.kept() / g] {
        for c in i * g..(i + 1) * g {
            out[c] = f16::from_f32(vector[c].clamp(-65504.0, 65504.0)).to_f32();
        }
    }
    out
}

#[test]
fn decoding_gives_the_largest_elements_rounded_to_f16() {
    for shape in shapes() {
        let c = shape.channels();
        for (block, tokens) in [(4, 4), (4, 12), (8, 40), (16, 64), (4, 512)] {
            let (mut keys, values) = (noise(1, tokens * c), noise(2, tokens * c));
            // Ties, and more than f16 can hold.
            keys[..c].iter_mut().for_each(|x| *x = x.signum());
            keys[c..2 * c].iter_mut().for_each(|x| *x *= 1e6);
            let page = PackedPage::encode(shape, block, &keys, &values);
            assert_eq!((page.tokens(), page.block(), page.blocks()), (tokens, block, tokens / block));
            let want = |x: &[f32]| x.chunks_exact(c).flat_map(|v| kept(v, shape)).collect::<Vec<_>>();
            assert_eq!(page.decode_keys(), want(&keys), "{shape:?}");
            assert_eq!(page.decode_values(), want(&values), "{shape:?}");
            let one = PackedPage::encode(shape, 4, &values[..4 * c], &values[..4 * c]);
            let mean: Vec<f32> =
                (0..c).map(|i| (0..4).fold(0.0, |m, t| m + values[t * c + i] * 0.25)).collect();
            assert_eq!(one.decode_block_keys(), kept(&mean, shape), "{shape:?}");
        }
    }
}

#[test]
fn bytes_reported_are_bytes_allocated() {
    for shape in shapes() {
        for (block, tokens) in [(4, 4), (8, 24), (16, 512)] {
            let page = page(3, shape, block, tokens);
            let counted = std::alloc::Layout::new::<[usize; 2]>();
            let words = std::alloc::Layout::for_value::<[u16]>(&page.words);
            let allocated = size_of_val(&page) + counted.extend(words).unwrap().0.pad_to_align().size();
            assert_eq!(page.bytes(), allocated);
            assert_eq!(shape.bytes_of_page(block, tokens), allocated);
            let parts = page.bytes_of_block_keys() + page.blocks() * page.bytes_of_block();
            let words = (parts + 2 * LOAD_PADDING).next_multiple_of(8);
            assert_eq!(page.bytes(), words + size_of::<PackedPage>() + 16);
        }
    }
    // The paper's 75 %: 4.75 bits a scalar for elements and bitmap, block keys of 8 tokens a sixteenth of it.
    let shape = PackedShape::with_rate(128, 0.75, 1).unwrap();
    let bits = page(3, shape, 8, 64).bytes() as f64 * 8.0 / (64.0 * 256.0);
    assert!((5.0..5.1).contains(&bits), "{bits} bits a scalar");
}

#[test]
fn shapes_that_make_no_sense_are_refused() {
    for (d, c, r, g) in [
        (0, 16, 4, 1),
        (64, 0, 4, 1),
        (64, 80, 4, 1),
        (64, 40, 4, 1),
        (64, 48, 0, 1),
        (64, 48, 49, 1),
        (64, 48, 6, 4),
        (64, 48, 6, 3),
        (64, 48, 6, 0),
        (65_600, 64, 4, 1),
    ] {
        assert!(PackedShape::new(d, c, r, g).is_err(), "{d} {c} {r} {g}");
    }
    let shape = PackedShape::with_rate(80, 0.75, 4).unwrap();
    assert_eq!((shape.channels(), shape.kept()), (64, 20));
    assert!(PackedShape::with_rate(64, 1.0, 1).is_err() && PackedShape::with_rate(64, f32::NAN, 1).is_err());
}

#[test]
#[should_panic(expected = "not a number")]
fn not_a_number_is_refused() {
    let mut keys = noise(1, 4 * 48);
    keys[50] = f32::NAN;
    PackedPage::encode(PackedShape::new(64, 48, 16, 1).unwrap(), 4, &keys, &noise(2, 4 * 48));
}

#[test]
fn block_scores_match_f64_on_every_instruction_set() {
    let mut worst = 0.0f64;
    for shape in shapes() {
        let c = shape.channels();
        for (block, tokens) in [(4, 4), (4, 20), (4, 64), (8, 56), (16, 48), (8, 512)] {
            let page = page(5, shape, block, tokens);
            let keys = wide(&page.decode_block_keys());
            for rows in [1, 2, 3, 4, 5, 8] {
                let queries = noise(7 + rows as u64, rows * c);
                for &isa in Isa::available() {
                    let mut scores = vec![f32::NAN; rows * page.blocks()];
                    score_blocks(isa, &queries, &page, &mut scores);
                    for (i, &score) in scores.iter().enumerate() {
                        let (q, b) = (&queries[i / page.blocks() * c..][..c], i % page.blocks());
                        let products = q.iter().zip(&keys[b * c..]).map(|(&q, k)| f64::from(q) * k);
                        let scale: f64 = products.clone().map(f64::abs).sum();
                        let error = (f64::from(score) - products.sum::<f64>()).abs() / scale.max(1e-9);
                        assert!(error < 1e-6, "{shape:?} block {block} {isa:?}: error {error}");
                        worst = worst.max(error);
                    }
                }
            }
        }
    }
    println!("worst relative error of a block score: {worst:.1e}");
}

/// Largest error against the oracle on the decoded rows of `tokens`, relative to the largest value.
fn error_of(state: &AttnState, queries: &[f32], pages: &[(&PackedPage, u128)]) -> f64 {
    let c = state.channels();
    let (mut keys, mut values, mut top) = (Vec::new(), Vec::<f64>::new(), 1e-30f64);
    for (page, selected) in pages {
        let (k, v) = (wide(&page.decode_keys()), wide(&page.decode_values()));
        for t in (0..page.tokens()).filter(|t| selected >> (t / page.block()) & 1 == 1) {
            keys.extend(&k[t * c..(t + 1) * c]);
            values.extend(&v[t * c..(t + 1) * c]);
        }
    }
    values.iter().for_each(|v| top = top.max(v.abs()));
    let mut out = vec![f32::NAN; queries.len()];
    state.finish(&mut out);
    let mut worst = 0.0f64;
    for (q, out) in queries.chunks_exact(c).zip(out.chunks_exact(c)) {
        let mut want = oracle::attend(&wide(q), &keys, &values, 1.0);
        want.resize(c, 0.0);
        for (&x, y) in out.iter().zip(want) {
            let error = (f64::from(x) - y).abs() / top;
            worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
        }
    }
    worst
}

#[test]
fn attention_matches_f64_on_every_instruction_set() {
    let mut worst = 0.0f64;
    for (n, shape) in shapes().into_iter().enumerate() {
        let c = shape.channels();
        for (block, tokens) in [(4, 4), (4, 20), (4, 64), (8, 8), (8, 56), (16, 16), (16, 48)] {
            let page = page(11 + n as u64, shape, block, tokens);
            for rows in [1, 2, 3, 4, 5, 8] {
                let queries = noise(13 + rows as u64, rows * c);
                let all = (1u32 << page.blocks()) - 1;
                for (isa, selected) in Isa::available()
                    .iter()
                    .flat_map(|&isa| [all, all & 0xa5a5, 1 << (page.blocks() - 1)].map(|m| (isa, m)))
                {
                    let mut state = AttnState::new(rows, c);
                    attend_selected(isa, &queries, &blocks(&page, selected), &mut state);
                    let error = error_of(&state, &queries, &[(&page, u128::from(selected))]);
                    assert!(
                        error < 2e-6,
                        "{shape:?} block {block} rows {rows} {isa:?} {selected:#x}: {error}"
                    );
                    worst = worst.max(error);
                }
            }
        }
    }
    println!("worst error of an output, relative to the largest value: {worst:.1e}");
}

#[test]
fn peaked_scores_over_many_pages_match_f64() {
    let shape = PackedShape::with_rate(128, 0.75, 2).unwrap();
    let c = shape.channels();
    let pages: Vec<PackedPage> = (0..40).map(|i| page(100 + i, shape, 8, 64)).collect();
    // Scores of a standard deviation near 6: some pages raise the maximum by much, most add little.
    let queries: Vec<f32> = noise(9, 4 * c).iter().map(|x| x * 3.0).collect();
    for &isa in Isa::available() {
        let mut state = AttnState::new(4, c);
        pages.iter().for_each(|page| attend_page(isa, &queries, page, &mut state));
        let all: Vec<_> = pages.iter().map(|page| (page, 255)).collect();
        let error = error_of(&state, &queries, &all);
        assert!(error < 1e-5, "{isa:?}: {error}");
    }
}

/// Long pages and short ones in one walk, so that what is asked for ahead lies in another page than what is met.
#[test]
fn pages_of_any_length_in_one_walk() {
    for (shape, block) in
        [(PackedShape::with_rate(128, 0.75, 1), 8), (PackedShape::with_rate(64, 0.625, 2), 4)]
    {
        let shape = shape.unwrap();
        let c = shape.channels();
        let lengths = [PAGE_TOKENS, 16, 32, PAGE_TOKENS - 16, 160];
        let pages: Vec<PackedPage> =
            (0u64..).zip(lengths).map(|(i, tokens)| page(200 + i, shape, block, tokens)).collect();
        let count: usize = pages.iter().map(PackedPage::blocks).sum();
        let queries = noise(3, 5 * c);
        for &isa in Isa::available() {
            let mut together = vec![f32::NAN; 5 * count];
            score_pages(isa, &queries, &pages, &mut together);
            let mut before = 0;
            for page in &pages {
                let mut alone = vec![f32::NAN; 5 * page.blocks()];
                score_blocks(isa, &queries, page, &mut alone);
                for (row, alone) in alone.chunks_exact(page.blocks()).enumerate() {
                    assert_eq!(&together[row * count + before..][..page.blocks()], alone, "{isa:?}");
                }
                before += page.blocks();
            }
            let all: Vec<Selected> =
                pages.iter().flat_map(|page| (0..page.blocks() as u32).map(move |b| (page, b))).collect();
            let (mut walked, mut merged) = (AttnState::new(5, c), AttnState::new(5, c));
            attend_selected(isa, &queries, &all.iter().copied().step_by(3).collect::<Vec<_>>(), &mut walked);
            for &some in all.iter().step_by(3) {
                attend_selected(isa, &queries, &[some], &mut merged);
            }
            let (mut a, mut b) = (vec![0.0; 5 * c], vec![0.0; 5 * c]);
            walked.finish(&mut a);
            merged.finish(&mut b);
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5), "{isa:?}");
        }
    }
}

#[test]
fn nothing_selected_changes_nothing() {
    let shape = PackedShape::with_rate(64, 0.75, 1).unwrap();
    let mut state = AttnState::new(3, shape.channels());
    attend_selected(Isa::current(), &noise(1, 3 * shape.channels()), &[], &mut state);
    assert_eq!(state.max, [f32::NEG_INFINITY; 3]);
}

/// Of a few blocks, or of as many as a page holds.
fn some_page() -> impl Strategy<Value = PackedPage> {
    let shapes = prop::sample::select(shapes());
    let blocks = prop_oneof![3 => 1usize..5, 1 => Just(PAGE_TOKENS)];
    (shapes, prop::sample::select(BLOCKS.to_vec()), blocks, any::<u64>()).prop_map(
        |(shape, block, blocks, seed)| page(seed >> 1, shape, block, PAGE_TOKENS.min(block * blocks)),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Blocks dealt to several states at random, merged in a random order, empty states included.
    #[test]
    fn any_split_in_any_order_gives_the_same_answer(
        page in some_page(), deal in prop::collection::vec(0usize..4, 128), order in Just(vec![0, 1, 2, 3, 4]).prop_shuffle(),
        rows in 1usize..6, isa in prop::sample::select(Isa::available().to_vec()), left in any::<bool>(),
    ) {
        let c = page.shape().channels();
        let queries: Vec<f32> = noise(17, rows * c).iter().map(|x| x * 4.0).collect();
        // The fifth state stays empty.
        let mut states = vec![AttnState::new(rows, c); 5];
        for (b, &to) in deal.iter().enumerate().take(page.blocks()) {
            attend_selected(isa, &queries, &[(&page, b as u32)], &mut states[to]);
        }
        let mut merged = AttnState::new(rows, c);
        for i in order {
            if left {
                merged.merge(&states[i]);
            } else {
                let mut next = states[i].clone();
                next.merge(&merged);
                merged = next;
            }
        }
        let error = error_of(&merged, &queries, &[(&page, u128::MAX)]);
        prop_assert!(error < 1e-5, "{}", error);
    }

    #[test]
    fn bytes_round_trip(page in some_page()) {
        let bytes = page.to_bytes();
        prop_assert_eq!(PackedPage::from_bytes(&bytes), Ok(page));
        for cut in [0, 3, 15, 16, bytes.len() - 1] {
            prop_assert!(PackedPage::from_bytes(&bytes[..cut]).is_err());
        }
        let longer: Vec<u8> = bytes.iter().copied().chain([0]).collect();
        prop_assert!(PackedPage::from_bytes(&longer).is_err());
    }

    /// A damaged page is refused, or is a page: never a panic, never one that a kernel cannot walk.
    #[test]
    fn damage_never_panics(page in some_page(), hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
                           early in any::<bool>()) {
        let mut bytes = page.to_bytes();
        let within = if early { 16 } else { bytes.len() };
        hits.iter().for_each(|(at, x)| bytes[at.index(within)] ^= x);
        if let Ok(page) = PackedPage::from_bytes(&bytes) {
            prop_assert_eq!(page.to_bytes(), bytes);
            let mut state = AttnState::new(1, page.shape().channels());
            attend_page(Isa::current(), &vec![1e-3; page.shape().channels()], &page, &mut state);
        }
    }

    #[test]
    fn a_flipped_bitmap_bit_is_refused(page in some_page(), bit in any::<prop::sample::Index>(), value in any::<bool>()) {
        let (mut bytes, layout) = (page.to_bytes(), page.layout());
        let (keys, values) = layout.block(page.blocks() - 1);
        let rows = if value { values } else { keys };
        let bitmaps = 16 + rows.bitmaps..16 + rows.bitmaps + rows.n * page.shape().bitmap_bytes();
        let bit = bitmaps.start * 8 + bit.index(bitmaps.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        let refused = matches!(PackedPage::from_bytes(&bytes), Err(PackedError::Bitmap { .. }));
        prop_assert!(refused);
    }
}

#[test]
fn an_infinite_element_is_refused() {
    let mut bytes = page(1, PackedShape::with_rate(64, 0.75, 1).unwrap(), 4, 8).to_bytes();
    bytes[16..18].copy_from_slice(&f16::INFINITY.to_bits().to_le_bytes());
    assert_eq!(PackedPage::from_bytes(&bytes), Err(PackedError::NotFinite { vector: 0 }));
}
