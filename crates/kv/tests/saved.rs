//! A cache that was written down goes on as the one that was written, and damaged bytes are refused.

mod common;

use mosaickv_kernels::Pool;
use mosaickv_kv::{Calibration, KvCache, KvFormat, KvShape, Moments, Window};
use std::sync::{Arc, LazyLock};

const D: usize = 64;
const SHAPE: KvShape = KvShape { layers: 2, heads: 4, kv_heads: 2, head_dim: D, window: None };
const KV_ROW: usize = 2 * D;
const Q_ROW: usize = 4 * D;

fn rows(seed: u64, tokens: usize, width: usize) -> Vec<f32> {
    let mut uniform = common::uniform(seed);
    (0..tokens * width).map(|i| 3.0 * uniform() / (1.0 + (i % D) as f32)).collect()
}

static CALIBRATION: LazyLock<Arc<Calibration>> = LazyLock::new(|| {
    let identity: Vec<f64> = (0..D * D).map(|i| f64::from(u8::from(i % (D + 1) == 0))).collect();
    let head = |i: u64| {
        let mut moments = Moments::new(D);
        moments.add(&rows(i + 1, 300, D), &rows(i + 51, 300, D), &rows(i + 101, 300, D));
        moments.learn(&identity)
    };
    Arc::new(Calibration { heads: (0..4).map(head).collect(), layer_weights: vec![0.5, 1.5] })
});

/// After a prompt, compressed.
fn cache(shape: KvShape, kv: &str, tokens: usize) -> KvCache {
    let pool = Pool::new(2);
    let cache = KvCache::new(shape, kv.parse().unwrap()).unwrap();
    let mut cache = cache.with_calibration(CALIBRATION.clone()).unwrap();
    let (keys, values) = (rows(1, tokens, KV_ROW), rows(2, tokens, KV_ROW));
    let queries = rows(3, tokens, Q_ROW);
    for layer in 0..shape.layers {
        cache.append(&pool, layer, &keys, &values).unwrap();
        cache.attend(&pool, layer, &queries, &mut vec![0.0; queries.len()]);
    }
    (0..shape.layers).for_each(|layer| cache.end_prompt(&pool, layer));
    cache.forget_queries();
    cache
}

/// Reads tokens one by one from `from` on: what attention gives in all layers.
fn go_on(cache: &mut KvCache, from: usize, to: usize) -> Vec<f32> {
    let pool = Pool::new(2);
    let (keys, values, queries) = (rows(11, to, KV_ROW), rows(12, to, KV_ROW), rows(13, to, Q_ROW));
    let mut outs = vec![];
    for t in from..to {
        for layer in 0..cache.shape().layers {
            let kv = t * KV_ROW..(t + 1) * KV_ROW;
            cache.append(&pool, layer, &keys[kv.clone()], &values[kv]).unwrap();
            let mut out = vec![0.0; Q_ROW];
            cache.attend(&pool, layer, &queries[t * Q_ROW..][..Q_ROW], &mut out);
            outs.extend(out);
        }
        cache.between_steps();
        cache.check().unwrap();
    }
    outs
}

fn written(cache: &KvCache) -> Vec<u8> {
    let mut bytes = vec![];
    cache.write(&mut bytes).unwrap();
    bytes
}

fn read(bytes: &[u8], shape: KvShape, kv: &str) -> Result<KvCache, String> {
    let read = KvCache::read(bytes, shape, kv.parse().unwrap(), Some(CALIBRATION.clone()));
    read.map_err(|error| error.to_string())
}

/// To the bit, from the end of a prompt and from anywhere after it, while a segment leaves a window too.
#[test]
fn a_cache_goes_on_from_what_was_written() {
    let windows = KvShape { window: Some(Window { tokens: 100, full_every: Some(2) }), ..SHAPE };
    let sizes = [(SHAPE, "exact", 150), (SHAPE, "layered", 2100), (SHAPE, "layered:12", 2100)];
    for (shape, kv, tokens) in
        sizes.into_iter().chain([(windows, "exact", 333), (windows, "layered:6", 2200)])
    {
        let mut cache = cache(shape, kv, tokens);
        for (from, to) in [(0, 7), (7, 250), (250, 263), (263, 290), (290, 600)] {
            let bytes = written(&cache);
            let mut back = read(&bytes, shape, kv).unwrap();
            assert_eq!(back.tokens(), cache.tokens());
            assert_eq!(written(&back), bytes, "{kv}: other bytes the second time");
            let (got, want) = (go_on(&mut back, from, to), go_on(&mut cache, from, to));
            assert!(got == want, "{kv}, {shape:?}: {from} tokens after the prompt it goes on otherwise");
        }
    }
}

#[test]
fn bytes_say_what_a_cache_takes() {
    let cache = cache(SHAPE, "layered", 2100);
    let bytes = written(&cache).len();
    let held = cache.bytes().total();
    assert!(bytes < held + held / 20, "{bytes} bytes written for {held}");
}

#[test]
fn other_formats_are_not_written() {
    let cache = cache(SHAPE, "packed", 300);
    let error = cache.write(&mut vec![]).unwrap_err();
    assert!(error.to_string().contains("packed"), "{error}");
    assert!(!cache.format().can_be_saved() && KvFormat::Exact.can_be_saved());
}

/// Cut short anywhere, or with other bytes here and there: an error, or a cache that can go on.
#[test]
fn damaged_bytes_are_refused_or_harmless() {
    for (kv, tokens, later) in [("exact", 70, 0), ("layered", 2100, 255)] {
        let mut cache = cache(SHAPE, kv, tokens);
        go_on(&mut cache, 0, later);
        let bytes = written(&cache);
        for cut in (0..bytes.len()).step_by(bytes.len() / 97) {
            assert!(read(&bytes[..cut], SHAPE, kv).is_err(), "{kv}, cut at {cut}");
        }
        assert!(read(&[&bytes[..], &[0]].concat(), SHAPE, kv).unwrap_err().contains("too many"));
        let mut draws = common::uniform(5);
        let mut refused = 0;
        for i in 0..120 {
            let mut changed = bytes.clone();
            // Most of what can be wrong is in the first bytes of heads; half of the draws are there.
            let most = if i % 2 == 0 { 6000.min(bytes.len()) } else { bytes.len() };
            for _ in 0..3 {
                let at = (draws().abs() * most as f32) as usize % most;
                changed[at] = (draws().abs() * 255.0) as u8;
            }
            match read(&changed, SHAPE, kv) {
                Ok(mut cache) => drop(go_on(&mut cache, later, later + 40)),
                Err(_) => refused += 1,
            }
        }
        println!("{kv}: {refused} of 120 refused");
    }
    let bytes = written(&cache(SHAPE, "exact", 70));
    let other = KvShape { kv_heads: 4, ..SHAPE };
    assert!(read(&bytes, other, "exact").is_err(), "bytes of another shape");
}
