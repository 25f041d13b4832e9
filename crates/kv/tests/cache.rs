//! The cache against its oracle, over its whole life.

mod common;

use mosaickv_kernels::{Isa, Pool, oracle as kernels};
use mosaickv_kv::{KvCache, KvError, KvFormat, KvShape, Packed, attend_each};

/// 48 of whose channels are stored.
const D: usize = 64;
const SHAPE: KvShape = KvShape { layers: 2, heads: 6, kv_heads: 2, head_dim: D, window: None };

/// Numbers with a decaying spectrum in mixed channels, as real keys have.
fn rows(seed: u64, tokens: usize, width: usize) -> Vec<f32> {
    let mut uniform = common::uniform(seed);
    let mut out = Vec::with_capacity(tokens * width);
    for _ in 0..tokens {
        let mut row: Vec<f32> = (0..width).map(|c| 3.0 * uniform() / (1.0 + (c % D) as f32)).collect();
        for head in row.chunks_exact_mut(D) {
            let mean = head.iter().sum::<f32>() / 8.0;
            head.iter_mut().enumerate().for_each(|(c, x)| *x += mean * ((c * 7) as f32).cos());
        }
        // Numbers that f16 has, so that storing them changes nothing.
        out.extend(row.iter().map(|&x| half::f16::from_f32(x).to_f32()));
    }
    out
}

struct Fed {
    cache: KvCache,
    keys: Vec<f32>,
    values: Vec<f32>,
}

const KV_ROW: usize = 2 * D;
const Q_ROW: usize = 6 * D;

/// A cache with a prompt of `prompt` tokens and `more` generated ones, the same in both layers.
fn fed(format: KvFormat, pool: &Pool, isa: Isa, (prompt, more): (usize, usize)) -> Fed {
    let mut cache = KvCache::new(SHAPE, format).unwrap().with_isa(isa);
    let (keys, values) = (rows(1, prompt + more, KV_ROW), rows(2, prompt + more, KV_ROW));
    let at = prompt * KV_ROW;
    for layer in 0..SHAPE.layers {
        cache.append(pool, layer, &keys[..at], &values[..at]).unwrap();
        cache.end_prompt(pool, layer);
    }
    for t in prompt..prompt + more {
        for layer in 0..SHAPE.layers {
            let span = t * KV_ROW..(t + 1) * KV_ROW;
            cache.append(pool, layer, &keys[span.clone()], &values[span]).unwrap();
        }
        cache.check().unwrap();
    }
    Fed { cache, keys, values }
}

fn oracle(cache: &KvCache, layer: usize, queries: &[f32]) -> Vec<f64> {
    let heads = [0, 1].map(|g| cache.oracle(layer, queries, g));
    heads[0].iter().zip(&heads[1]).map(|(a, b)| a + b).collect()
}

fn close(got: &[f32], want: &[f64], bound: f64, what: &str) {
    let size = want.iter().fold(1e-3, |m: f64, w| m.max(w.abs()));
    for (g, w) in got.iter().zip(want) {
        assert!((f64::from(*g) - w).abs() <= bound * size, "{what}: got {g}, want {w}, largest {size}");
    }
}

fn packed(group: usize, block: usize, selected: f32) -> KvFormat {
    KvFormat::Packed(Packed { group: Some(group), block: Some(block), selected, ..Packed::STATIC })
}

#[test]
fn attention_agrees_with_the_oracle_over_a_whole_life() {
    let pool = Pool::new(2);
    for &isa in Isa::available() {
        for format in [KvFormat::Exact, packed(1, 8, 0.1), packed(2, 4, 0.3), packed(4, 16, 1.0)] {
            for size in [(1, 0), (3, 5), (4, 62), (40, 70), (68, 0), (67, 90), (300, 40), (1100, 3)] {
                let mut fed = fed(format, &pool, isa, size);
                let queries = rows(9, 1, Q_ROW);
                let mut out = vec![0.0; Q_ROW];
                fed.cache.attend(&pool, 1, &queries, &mut out);
                let want = oracle(&fed.cache, 1, &queries);
                close(&out, &want, 2e-5, &format!("{format:?} {size:?} {isa:?}"));
            }
        }
    }
}

#[test]
fn exact_prefill_is_causal_attention_at_any_start() {
    let pool = Pool::new(2);
    for start in [0, 1, 63, 64, 130] {
        for tokens in [2, 17, 64, 150] {
            let mut fed = fed(KvFormat::Exact, &pool, Isa::current(), (start + tokens, 0));
            let queries = rows(5, tokens, Q_ROW);
            let mut out = vec![0.0; tokens * Q_ROW];
            fed.cache.attend(&pool, 0, &queries, &mut out);
            for (t, h) in [(0, 0), (tokens / 2, 3), (tokens - 1, 5)] {
                let head = |x: &[f32]| -> Vec<f64> {
                    let seen = x.chunks_exact(KV_ROW).take(start + t + 1);
                    seen.flat_map(|row| row[h / 3 * D..][..D].iter().map(|&x| f64::from(x))).collect()
                };
                let span = t * Q_ROW + h * D..t * Q_ROW + (h + 1) * D;
                let query: Vec<f64> = queries[span.clone()].iter().map(|&q| f64::from(q)).collect();
                let want =
                    kernels::attend(&query, &head(&fed.keys), &head(&fed.values), (D as f64).sqrt().recip());
                close(
                    &out[span],
                    &want,
                    2e-5,
                    &format!("start {start}, {tokens} tokens, token {t}, head {h}"),
                );
            }
        }
    }
}

#[test]
fn selecting_and_keeping_everything_is_exact_attention() {
    let pool = Pool::new(1);
    let all = KvFormat::Packed(Packed { kept: Some(0.75), selected: 1.0, ..Packed::STATIC });
    // Rank 32 of 64: the truncated quarter of the channels holds nothing.
    let mut low = rows(1, 300, KV_ROW);
    low.chunks_exact_mut(D).for_each(|head| {
        for c in 32..D {
            head[c] = head[c - 32] * 0.5;
        }
    });
    let queries = rows(3, 1, Q_ROW);
    let mut outs = vec![];
    for format in [KvFormat::Exact, all] {
        let mut cache = KvCache::new(SHAPE, format).unwrap();
        for layer in 0..2 {
            cache.append(&pool, layer, &low, &low).unwrap();
            cache.end_prompt(&pool, layer);
        }
        let mut out = vec![0.0; Q_ROW];
        cache.attend(&pool, 0, &queries, &mut out);
        outs.push(out);
    }
    let want: Vec<f64> = outs[0].iter().map(|&x| f64::from(x)).collect();
    close(&outs[1], &want, 5e-3, "rank 32 in 48 channels");
}

#[test]
fn threads_do_not_change_a_bit() {
    for format in [KvFormat::Exact, packed(1, 8, 0.1)] {
        let outs: Vec<Vec<f32>> = [1, 2, 5]
            .map(|threads| {
                let pool = Pool::new(threads);
                let mut fed = fed(format, &pool, Isa::current(), (1500, 2));
                let mut out = vec![0.0; Q_ROW];
                fed.cache.attend(&pool, 1, &rows(9, 1, Q_ROW), &mut out);
                out
            })
            .into();
        assert_eq!(outs[0], outs[1]);
        assert_eq!(outs[0], outs[2]);
    }
}

/// Caches of all kinds and lengths, some with several segments, in one step: each gets what it would get alone.
#[test]
fn a_step_together_changes_not_a_bit() {
    let formats = [
        (packed(1, 8, 0.1), 2000, 70),
        (KvFormat::Exact, 700, 3),
        (KvFormat::Packed(Packed { segment: 512, group: Some(2), ..Packed::STATIC }), 1500, 5),
        ("quest:dense=0".parse().unwrap(), 300, 0),
        (packed(4, 16, 0.5), 3, 1),
        (KvFormat::Exact, 5000, 0),
    ];
    let caches = |pool: &Pool| -> Vec<KvCache> {
        let of = |&(format, prompt, more)| fed(format, pool, Isa::current(), (prompt, more)).cache;
        formats.iter().map(of).collect()
    };
    let alone = Pool::new(1);
    let queries = rows(9, formats.len(), Q_ROW);
    let mut want = vec![0.0; queries.len()];
    let mut one_by_one = caches(&alone);
    let rows = queries.chunks_exact(Q_ROW).zip(want.chunks_exact_mut(Q_ROW));
    one_by_one.iter_mut().zip(rows).for_each(|(cache, (q, out))| cache.attend(&alone, 1, q, out));
    for threads in [1, 2, 3] {
        let pool = Pool::new(threads);
        let mut together = caches(&pool);
        // The second time working memory is there already, and must not show.
        for time in 1..3 {
            let mut out = vec![f32::NAN; queries.len()];
            attend_each(&mut together.iter_mut().collect::<Vec<_>>(), &pool, 1, &queries, &mut out);
            assert_eq!(out, want, "{threads} threads, time {time}");
            for (a, b) in together.iter().zip(&one_by_one) {
                assert_eq!(a.bytes_read(), time * b.bytes_read());
            }
        }
    }
}

#[test]
fn a_clone_goes_its_own_way() {
    let pool = Pool::new(1);
    for format in [KvFormat::Exact, packed(1, 8, 0.1)] {
        let mut fed = fed(format, &pool, Isa::current(), (200, 10));
        let before = fed.cache.clone();
        let queries = rows(4, 1, Q_ROW);
        let want = oracle(&before, 0, &queries);
        for t in 0..100 {
            for layer in 0..2 {
                fed.cache.append(&pool, layer, &rows(70 + t, 1, KV_ROW), &rows(80 + t, 1, KV_ROW)).unwrap();
            }
        }
        assert_eq!(before.tokens(), 210);
        assert_eq!(fed.cache.tokens(), 310);
        assert_eq!(oracle(&before, 0, &queries), want);
        before.check().unwrap();
        fed.cache.check().unwrap();
    }
}

#[test]
fn what_is_not_finite_is_refused_and_nothing_is_stored() {
    let pool = Pool::new(1);
    let mut cache = KvCache::new(SHAPE, KvFormat::Exact).unwrap();
    let mut bad = rows(1, 3, KV_ROW);
    bad[70] = f32::NAN;
    let good = rows(2, 3, KV_ROW);
    assert_eq!(cache.append(&pool, 1, &bad, &good), Err(KvError::NotFinite { layer: 1 }));
    assert_eq!(cache.append(&pool, 1, &good, &bad), Err(KvError::NotFinite { layer: 1 }));
    assert_eq!(cache.tokens(), 0);
}

#[test]
fn impossible_shapes_and_strategies_are_errors() {
    for (heads, kv_heads, head_dim) in [(6, 4, 32), (0, 0, 32), (4, 0, 32), (4, 2, 0), (4, 2, 40)] {
        let shape = KvShape { layers: 1, heads, kv_heads, head_dim, window: None };
        assert!(KvCache::new(shape, KvFormat::Exact).is_err(), "{shape:?}");
    }
    assert!(KvCache::new(SHAPE, packed(3, 8, 0.1)).is_err());
}

/// The widest heads of the supported models: 256 channels, one KV head.
#[test]
fn wide_heads_agree_with_the_oracle() {
    let shape = KvShape { layers: 1, heads: 4, kv_heads: 1, head_dim: 256, window: None };
    let pool = Pool::new(2);
    for &isa in Isa::available() {
        for format in [KvFormat::Exact, packed(1, 8, 0.2), packed(4, 4, 1.0)] {
            let mut cache = KvCache::new(shape, format).unwrap().with_isa(isa);
            let (keys, values, queries) = (rows(1, 700, 256), rows(2, 700, 256), rows(3, 1, 1024));
            cache.append(&pool, 0, &keys[..600 * 256], &values[..600 * 256]).unwrap();
            cache.end_prompt(&pool, 0);
            for t in 600..700 {
                let span = t * 256..(t + 1) * 256;
                cache.append(&pool, 0, &keys[span.clone()], &values[span]).unwrap();
            }
            cache.check().unwrap();
            let mut out = vec![0.0; 1024];
            cache.attend(&pool, 0, &queries, &mut out);
            close(&out, &cache.oracle(0, &queries, 0), 2e-5, &format!("{format:?} {isa:?}"));
        }
    }
}

#[test]
fn packed_stores_what_the_paper_says() {
    // head_dim 128: 25 % of the elements at 16 bits for K and V, 96 bits of bitmap each, an eighth of a key
    // again as block keys: 5.05 bits a scalar, then page headers; rotations and the update buffer weigh less
    // the longer the context.
    let shape = KvShape { layers: 1, heads: 4, kv_heads: 1, head_dim: 128, window: None };
    let pool = Pool::new(1);
    let mut cache = KvCache::new(shape, packed(1, 8, 0.1)).unwrap();
    let (keys, values) = (rows(1, 8192, 128), rows(2, 8192, 128));
    cache.append(&pool, 0, &keys, &values).unwrap();
    cache.end_prompt(&pool, 0);
    let bytes = cache.bytes();
    let bits = |bytes: usize| bytes as f64 * 8.0 / shape.scalars(8192) as f64;
    assert!((5.0..5.15).contains(&bits(bytes.packed)), "{bytes:?}: {}", bits(bytes.packed));
    assert!(bits(bytes.total()) < 5.5, "{bytes:?}: {}", bits(bytes.total()));
}
