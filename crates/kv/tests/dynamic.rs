//! Segments that choose their strategies, and their life beside decoding: whatever the timing, nothing is lost.

mod common;

use mosaickv_kernels::{Isa, Pool};
use mosaickv_kv::{Background, Basis, KvCache, KvFormat, KvShape, Packed, Swaps, Timing};
use proptest::prelude::*;
use std::sync::Arc;

const D: usize = 64;
const SHAPE: KvShape = KvShape { layers: 2, heads: 6, kv_heads: 2, head_dim: D, window: None };
const KV_ROW: usize = 2 * D;
const Q_ROW: usize = 6 * D;

/// Numbers whose leading channels change every `era` tokens, as topics do: strategies differ from era to era.
fn rows(seed: u64, tokens: usize, width: usize, era: usize) -> Vec<f32> {
    let mut uniform = common::uniform(seed);
    let mut out = Vec::with_capacity(tokens * width);
    for t in 0..tokens {
        let shift = t / era * 13;
        out.extend(
            (0..width)
                .map(|c| 3.0 * uniform() / (1.0 + ((c + shift) % D) as f32).powf(0.4 + (t / era % 3) as f32)),
        );
    }
    out
}

/// Reads a prompt and generates: two layers, the second a token behind in nothing.
fn fed(
    mut cache: KvCache,
    pool: &Pool,
    (prompt, more): (usize, usize),
    mut each: impl FnMut(usize, &mut KvCache),
) -> KvCache {
    let (keys, values) = (rows(1, prompt + more, KV_ROW, 150), rows(2, prompt + more, KV_ROW, 210));
    for layer in 0..SHAPE.layers {
        cache.append(pool, layer, &keys[..prompt * KV_ROW], &values[..prompt * KV_ROW]).unwrap();
        cache.end_prompt(pool, layer);
    }
    for t in prompt..prompt + more {
        let span = t * KV_ROW..(t + 1) * KV_ROW;
        for layer in 0..SHAPE.layers {
            cache.append(pool, layer, &keys[span.clone()], &values[span.clone()]).unwrap();
        }
        cache.between_steps();
        each(t, &mut cache);
    }
    cache
}

fn agrees_with_the_oracle(cache: &mut KvCache, pool: &Pool, what: &str) {
    let queries = rows(9, 1, Q_ROW, 1000);
    let mut out = vec![0.0; Q_ROW];
    cache.attend(pool, 1, &queries, &mut out);
    for g in 0..2 {
        let want = cache.oracle(1, &queries, g);
        let span = g * 3 * D..(g + 1) * 3 * D;
        let size = want.iter().fold(1e-3, |m: f64, w| m.max(w.abs()));
        for (got, want) in out[span.clone()].iter().zip(&want[span]) {
            assert!(
                (f64::from(*got) - want).abs() <= 2e-5 * size,
                "{what}: got {got}, want {want} of {size}"
            );
        }
    }
}

fn dynamic(segment: usize, close: f32) -> Packed {
    Packed { segment, close, selected: 0.3, ..Packed::default() }
}

#[test]
fn segments_of_different_strategies_attend_as_one() {
    let pool = Pool::new(2);
    for &isa in Isa::available() {
        let settings = Packed { grouping: 0.2, ..dynamic(160, 20.0) };
        let cache = KvCache::new(SHAPE, KvFormat::Packed(settings)).unwrap().with_isa(isa);
        let mut cache = fed(cache, &pool, (700, 500), |_, _| ());
        cache.check().unwrap();
        let segments = cache.segments();
        let mut strategies: Vec<_> = segments.iter().map(|s| (s.kept, s.group, s.block)).collect();
        strategies.sort_unstable();
        strategies.dedup();
        assert!(strategies.len() > 1, "only {strategies:?}");
        assert!(cache.swaps().swapped > 4, "{:?}", cache.swaps());
        agrees_with_the_oracle(&mut cache, &pool, &format!("{isa:?}"));
    }
}

/// An eighth of 16 channels is less than a group of four. What lies along one line asks for just that.
#[test]
fn small_heads_keep_less_than_a_large_group() {
    let pool = Pool::new(1);
    for d in [16, 32] {
        let shape = KvShape { layers: 1, heads: 1, kv_heads: 1, head_dim: d, window: None };
        let mut cache = KvCache::new(shape, KvFormat::Packed(dynamic(64, 20.0))).unwrap();
        let mut uniform = common::uniform(3);
        let line: Vec<f32> = (0..300)
            .flat_map(|_| {
                let along = uniform();
                (0..d).map(move |c| along * (1 + c % 3) as f32)
            })
            .collect();
        cache.append(&pool, 0, &line, &line).unwrap();
        cache.end_prompt(&pool, 0);
        cache.check().unwrap();
        let kept: Vec<_> = cache.segments().iter().map(|s| (s.kept, s.group)).collect();
        assert!(kept.contains(&(d / 8, d / 8)), "{d} channels: {kept:?}");
    }
}

/// With everything selected and three quarters kept, how tokens are cut into segments hardly shows: each cut is near
/// to exact attention.
#[test]
fn any_split_into_segments_gives_the_same_attention() {
    let pool = Pool::new(1);
    let queries = rows(9, 1, Q_ROW, 1000);
    let mut outs = vec![];
    for segment in [64, 96, 320, 65536] {
        let all = Packed { segment, kept: Some(0.75), selected: 1.0, ..Packed::STATIC };
        let mut cache = KvCache::new(SHAPE, KvFormat::Packed(all)).unwrap();
        // Rank 32: the truncated quarter of the channels holds nothing.
        let mut low = rows(1, 700, KV_ROW, 150);
        low.chunks_exact_mut(D).for_each(|head| (32..D).for_each(|c| head[c] = head[c - 32] * 0.5));
        for layer in 0..2 {
            cache.append(&pool, layer, &low, &low).unwrap();
            cache.end_prompt(&pool, layer);
        }
        let mut out = vec![0.0; Q_ROW];
        cache.attend(&pool, 1, &queries, &mut out);
        outs.push(out);
    }
    let size = outs[0].iter().fold(0.0f32, |m, x| m.max(x.abs()));
    for out in &outs[1..] {
        for (a, b) in out.iter().zip(&outs[0]) {
            assert!((a - b).abs() <= 5e-3 * size, "{a} and {b} of {size}");
        }
    }
}

#[test]
fn fixed_swaps_give_the_same_cache_whoever_does_the_work() {
    let pool = Pool::new(2);
    let format = KvFormat::Packed(dynamic(65536, 15.0));
    let outs = |cache: KvCache| {
        let mut outs = vec![];
        let cache = fed(cache, &pool, (400, 700), |t, cache| {
            cache.check().unwrap();
            if t % 50 == 0 {
                let mut out = vec![0.0; Q_ROW];
                cache.attend(&pool, 0, &rows(t as u64, 1, Q_ROW, 1000), &mut out);
                outs.push(out);
            }
        });
        (outs, cache.swaps(), cache.segments())
    };
    let own = outs(KvCache::new(SHAPE, format).unwrap());
    assert!(own.1.swapped >= 8, "{:?}", own.1);
    for threads in [1, 3] {
        let background = Arc::new(Background::new(threads, usize::MAX));
        let cache = KvCache::new(SHAPE, format).unwrap();
        let shared = outs(cache.with_background(Arc::clone(&background), Timing::Fixed));
        assert_eq!(own, shared, "{threads} threads");
        assert_eq!(background.held(), 0, "a cache that is gone holds nothing");
    }
}

#[test]
fn live_swaps_lose_nothing_and_bytes_are_conserved() {
    let pool = Pool::new(2);
    let background = Arc::new(Background::new(1, usize::MAX));
    let cache = KvCache::new(SHAPE, KvFormat::Packed(dynamic(65536, 15.0))).unwrap();
    let cache = cache.with_background(Arc::clone(&background), Timing::Live);
    let mut seen = Swaps::default();
    let mut cache = fed(cache, &pool, (400, 900), |t, cache| {
        if cache.swaps() != seen {
            seen = cache.swaps();
            cache.check().unwrap();
            // Every token is in one segment, and segments follow each other without a gap.
            for layer in 0..2 {
                for head in 0..2 {
                    let of = |s: &&mosaickv_kv::SegmentInfo| s.layer == layer && s.head == head;
                    let segments = cache.segments();
                    let end = segments.iter().filter(of).fold(4, |at, segment| {
                        assert_eq!(segment.first, at, "token {t}");
                        at + segment.tokens
                    });
                    assert!((t + 1 - 64..=t + 1 - 32).contains(&end), "token {t}: segments end at {end}");
                }
            }
            let bytes: usize = cache.segments().iter().map(|segment| segment.bytes).sum();
            let counted = cache.bytes();
            let (held, stored) =
                (counted.packed + counted.rotations, counted.packed + counted.rotations + counted.lists);
            assert!((held..=stored).contains(&bytes), "{bytes} in segments, {counted:?}");
        }
        // As slow as decoding is.
        std::thread::sleep(std::time::Duration::from_micros(300));
    });
    assert!(cache.swaps().swapped > 4 && cache.swaps().given_up == 0, "{:?}", cache.swaps());
    agrees_with_the_oracle(&mut cache, &pool, "after live swaps");
}

#[test]
fn a_background_without_room_lets_decoding_go_on() {
    let pool = Pool::new(1);
    // Room for 100 tokens of one head: segments that need more keep what they borrowed.
    let background = Arc::new(Background::new(1, 100 * 4 * D));
    let cache = KvCache::new(SHAPE, KvFormat::Packed(dynamic(65536, 15.0))).unwrap();
    let cache = cache.with_background(Arc::clone(&background), Timing::Live);
    let mut cache = fed(cache, &pool, (400, 600), |_, cache| {
        assert!(background.held() <= 100 * 4 * D, "{} bytes held", background.held());
        assert_eq!(cache.check(), Ok(()));
    });
    assert!(cache.swaps().given_up > 0, "{:?}", cache.swaps());
    assert_eq!(cache.tokens(), 1000);
    agrees_with_the_oracle(&mut cache, &pool, "without room");
    drop(cache);
    assert_eq!(background.held(), 0);
}

#[test]
fn a_clone_keeps_its_temporary_segments() {
    let pool = Pool::new(1);
    let cache = KvCache::new(SHAPE, KvFormat::Packed(dynamic(65536, 40.0))).unwrap();
    let mut cache = fed(cache, &pool, (400, 130), |_, _| ());
    assert!(cache.segments().iter().any(|segment| segment.temporary));
    let mut clone = cache.clone();
    clone.check().unwrap();
    assert!(clone.segments().iter().all(|segment| !segment.temporary));
    agrees_with_the_oracle(&mut clone, &pool, "clone");
    agrees_with_the_oracle(&mut cache, &pool, "original");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A seeded simulation: random settings, a random timing, lengths that end anywhere.
    #[test]
    fn random_lives_keep_every_token(
        (prompt, more) in (1usize..600, 0usize..400),
        (kept, group, block) in (prop::option::of(prop::sample::select(vec![0.125f32, 0.25, 0.5])), prop::option::of(prop::sample::select(vec![1usize, 2, 4])), prop::option::of(prop::sample::select(vec![4usize, 8, 16]))),
        (segments, close) in (1usize..8, 5.0f32..60.0),
        (room, fixed) in (prop::option::of(1usize..400), any::<bool>()),
        svd in any::<bool>(),
    ) {
        let rotation = if svd { Basis::Svd } else { Basis::Model };
        let settings = Packed { kept, group, block, rotation, segment: 64 * segments, close, grouping: 0.1, selected: 0.2, ..Packed::default() };
        let pool = Pool::new(1);
        let background = Arc::new(Background::new(2, room.map_or(usize::MAX, |tokens| tokens * 4 * D)));
        let timing = if fixed { Timing::Fixed } else { Timing::Live };
        let cache = KvCache::new(SHAPE, KvFormat::Packed(settings)).unwrap();
        let cache = cache.with_background(Arc::clone(&background), timing);
        let mut tokens = prompt;
        let mut cache = fed(cache, &pool, (prompt, more), |_, cache| {
            tokens += 1;
            assert_eq!(cache.tokens(), tokens);
            assert_eq!(cache.check(), Ok(()));
        });
        agrees_with_the_oracle(&mut cache, &pool, "random life");
    }
}
