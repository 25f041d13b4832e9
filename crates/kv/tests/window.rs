//! Layers with a sliding window: what a query sees, what is remembered, and what is counted.

use mosaickv_kernels::{Isa, Pool, oracle as kernels};
use mosaickv_kv::{KvCache, KvError, KvFormat, KvShape, Packed, Window};

const D: usize = 32;
const KV_ROW: usize = 2 * D;
const Q_ROW: usize = 4 * D;

/// Three layers, the last of which sees everything.
fn shape(window: usize) -> KvShape {
    let window = Some(Window { tokens: window, full_every: Some(3) });
    KvShape { layers: 3, heads: 4, kv_heads: 2, head_dim: D, window }
}

fn rows(seed: u64, tokens: usize, width: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        // Numbers that f16 has, so that storing them changes nothing.
        half::f16::from_f32((x >> 40) as f32 / (1u64 << 22) as f32 - 2.0).to_f32()
    };
    (0..tokens * width).map(|_| next()).collect()
}

/// Attention of head `h` at `position` over the tokens `from..=position`, in f64.
fn want(keys: &[f32], values: &[f32], query: &[f32], (from, position, h): (usize, usize, usize)) -> Vec<f64> {
    let head = |x: &[f32]| -> Vec<f64> {
        let seen = x.chunks_exact(KV_ROW).skip(from).take(position + 1 - from);
        seen.flat_map(|row| row[h / 2 * D..][..D].iter().map(|&x| f64::from(x))).collect()
    };
    let query: Vec<f64> = query.iter().map(|&q| f64::from(q)).collect();
    kernels::attend(&query, &head(keys), &head(values), (D as f64).sqrt().recip())
}

fn close(got: &[f32], want: &[f64], what: &str) {
    for (g, w) in got.iter().zip(want) {
        assert!((f64::from(*g) - w).abs() <= 5e-5, "{what}: got {g}, want {w}");
    }
}

/// A prompt in chunks, then single tokens, all of whose attention is compared: in the window layers with the newest
/// `window` tokens, in the full layer, as long as it is exact, with all.
fn follows_the_formula(isa: Isa, format: KvFormat, window: usize, chunks: &[usize]) {
    let pool = Pool::new(2);
    let total: usize = chunks.iter().sum();
    let (keys, values, queries) = (rows(1, total, KV_ROW), rows(2, total, KV_ROW), rows(3, total, Q_ROW));
    let mut cache = KvCache::new(shape(window), format).unwrap().with_isa(isa);
    let mut start = 0;
    for &tokens in chunks {
        let end = start + tokens;
        for layer in 0..3 {
            let span = start * KV_ROW..end * KV_ROW;
            cache.append(&pool, layer, &keys[span.clone()], &values[span]).unwrap();
            let mut out = vec![0.0; tokens * Q_ROW];
            cache.attend(&pool, layer, &queries[start * Q_ROW..end * Q_ROW], &mut out);
            if layer == 2 && cache.is_compressed() {
                continue;
            }
            for t in start..end {
                let from = if layer == 2 { 0 } else { (t + 1).saturating_sub(window) };
                for h in 0..4 {
                    let query = &queries[t * Q_ROW + h * D..][..D];
                    let got = &out[(t - start) * Q_ROW + h * D..][..D];
                    let what = format!("{isa:?} {format} window {window} layer {layer} token {t} head {h}");
                    close(got, &want(&keys, &values, query, (from, t, h)), &what);
                }
            }
            let newest = &queries[(end - 1) * Q_ROW..end * Q_ROW];
            let oracle = [0, 1].map(|g| cache.oracle(layer, newest, g));
            let oracle: Vec<f64> = oracle[0].iter().zip(&oracle[1]).map(|(a, b)| a + b).collect();
            close(&out[(tokens - 1) * Q_ROW..], &oracle, &format!("oracle, window {window}, token {end}"));
        }
        start = end;
        // The prompt ends with the last chunk of several tokens.
        if tokens > 1 && chunks.iter().rfind(|&&c| c > 1) == Some(&tokens) {
            (0..3).for_each(|layer| cache.end_prompt(&pool, layer));
        }
        cache.check().unwrap();
        assert_eq!(cache.tokens(), end);
    }
}

#[test]
fn queries_see_their_window_in_chunks_and_steps() {
    let packed = KvFormat::Packed(Packed::default());
    for &isa in Isa::available() {
        for window in [1, 7, 64, 100, 128, 1000] {
            for format in [KvFormat::Exact, packed] {
                let mut chunks = vec![130, 2, 75, 200];
                chunks.extend([1; 70]);
                follows_the_formula(isa, format, window, &chunks);
            }
            follows_the_formula(isa, KvFormat::Exact, window, &[1; 150]);
        }
    }
}

#[test]
fn a_window_layer_remembers_its_window_and_is_counted_so() {
    let pool = Pool::new(1);
    let (window, tokens) = (100, 3000);
    let page = 64 * D * 2 * 2;
    for format in [KvFormat::Exact, KvFormat::Packed(Packed::default())] {
        let mut cache = KvCache::new(shape(window), format).unwrap();
        let (keys, queries) = (rows(1, tokens, KV_ROW), rows(3, tokens, Q_ROW));
        let mut out = vec![0.0; tokens * Q_ROW];
        for layer in 0..3 {
            let before = cache.bytes_read();
            cache.append(&pool, layer, &keys, &keys).unwrap();
            cache.attend(&pool, layer, &queries, &mut out);
            cache.end_prompt(&pool, layer);
            let read = (cache.bytes_read() - before) as usize;
            // A block of 16 queries reads at most three pages of each KV head here, not all before it.
            let blocks = tokens.div_ceil(16);
            assert!(layer == 2 || read <= blocks * 2 * 3 * page, "layer {layer} read {read}");
        }
        let full = KvShape { layers: 1, window: None, ..shape(window) };
        assert_eq!(
            cache.shape().exact_bytes(tokens),
            full.exact_bytes(tokens) + 2 * full.exact_bytes(window)
        );
        assert_eq!(cache.shape().scalars(60), 3 * full.scalars(60));
        // 100 tokens touch at most three pages; and each head has one page that is being filled.
        let most = 2 * 2 * 3 * page;
        let bytes = cache.bytes();
        let all = if format == KvFormat::Exact { tokens.div_ceil(64) * 2 * page } else { 2 * page };
        assert!(bytes.exact <= most + all, "{format}: {bytes:?}, wanted at most {most} + {all}");
        assert_eq!(cache.is_compressed(), format != KvFormat::Exact);
        cache.check().unwrap();
        // A clone goes its own way.
        let before = cache.clone();
        let want = before.oracle(0, &queries[..Q_ROW], 1);
        for t in 0..300 {
            for layer in 0..3 {
                cache.append(&pool, layer, &rows(t, 1, KV_ROW), &rows(t + 500, 1, KV_ROW)).unwrap();
                cache.attend(&pool, layer, &queries[..Q_ROW], &mut out[..Q_ROW]);
            }
        }
        assert_eq!((before.tokens(), cache.tokens()), (tokens, tokens + 300));
        assert_eq!(before.oracle(0, &queries[..Q_ROW], 1), want);
        before.check().unwrap();
        cache.check().unwrap();
    }
}

#[test]
fn windows_that_cannot_be_are_refused() {
    for (tokens, full_every) in [(0, None), (0, Some(6)), (5, Some(0))] {
        let shape = KvShape { window: Some(Window { tokens, full_every }), ..shape(1) };
        assert_eq!(KvCache::new(shape, KvFormat::Exact).unwrap_err(), KvError::Window);
    }
    let every_sixth = KvShape { window: Some(Window { tokens: 9, full_every: Some(6) }), ..shape(1) };
    let full: Vec<usize> = (0..18).filter(|&layer| every_sixth.window_of(layer).is_none()).collect();
    assert_eq!(full, [5, 11, 17]);
    let all = KvShape { window: Some(Window { tokens: 9, full_every: None }), ..shape(1) };
    assert!((0..18).all(|layer| all.window_of(layer) == Some(9)));
}
