//! Published methods as formats of the cache: against their oracles, and as copies of an exact cache.

mod common;

use mosaickv_kernels::{Isa, Pool};
use mosaickv_kv::{KvCache, KvError, KvFormat, KvShape};

const SHAPES: [KvShape; 3] = [
    KvShape { layers: 3, heads: 6, kv_heads: 2, head_dim: 64, window: None },
    KvShape { layers: 3, heads: 4, kv_heads: 1, head_dim: 128, window: None },
    KvShape { layers: 3, heads: 2, kv_heads: 2, head_dim: 80, window: None },
];

/// Every format, some of them twice, that heads of `d` channels can have.
fn formats(d: usize) -> Vec<KvFormat> {
    let all = [
        "quest:dense=1",
        "quest:block=8,selected=0.3,dense=0",
        "strawman",
        "strawman:kept=0.4,block=32,selected=0.5",
        "snapkv",
        "snapkv:kept=0.6",
        "q8_0",
        "q8_0:rotation=none",
        "q4_0",
        "q4_0:rotation=none",
        "kivi4",
        "kivi2",
    ];
    let formats = all.map(|text| text.parse::<KvFormat>().unwrap());
    formats.into_iter().filter(|format| d.is_multiple_of(32) || !is_quantized(*format)).collect()
}

fn is_quantized(format: KvFormat) -> bool {
    matches!(format, KvFormat::Quantized(_) | KvFormat::Kivi(_))
}

/// Numbers with a decaying spectrum in mixed channels, as real keys have.
fn rows(seed: u64, tokens: usize, (heads, d): (usize, usize)) -> Vec<f32> {
    let mut uniform = common::uniform(seed);
    let mut out = Vec::with_capacity(tokens * heads * d);
    for _ in 0..tokens * heads {
        let mut head: Vec<f32> = (0..d).map(|c| 3.0 * uniform() / (1.0 + c as f32)).collect();
        let mean = head.iter().sum::<f32>() / 8.0;
        head.iter_mut().enumerate().for_each(|(c, x)| *x += mean * ((c * 7) as f32).cos());
        // Numbers that f16 has, so that storing them changes nothing.
        out.extend(head.iter().map(|&x| half::f16::from_f32(x).to_f32()));
    }
    out
}

/// Reads a prompt in chunks, as a forward pass does: append, attend, and at last end it.
fn read(cache: &mut KvCache, pool: &Pool, chunks: &[usize]) {
    let KvShape { layers, heads, kv_heads, head_dim, .. } = cache.shape();
    let tokens: usize = chunks.iter().sum();
    let (kv, q) = ((kv_heads, head_dim), (heads, head_dim));
    let (keys, values) = (rows(1, tokens, kv), rows(2, tokens, kv));
    let queries = rows(3, tokens, q);
    for layer in 0..layers {
        let mut at = 0;
        for &chunk in chunks {
            let span = |row: usize| at * row..(at + chunk) * row;
            let (kv, q) = (span(kv_heads * head_dim), span(heads * head_dim));
            cache.append(pool, layer, &keys[kv.clone()], &values[kv]).unwrap();
            cache.attend(pool, layer, &queries[q.clone()], &mut vec![0.0; q.len()]);
            at += chunk;
        }
        cache.end_prompt(pool, layer);
    }
    cache.check().unwrap();
}

/// `count` generated tokens in every layer.
fn grow(cache: &mut KvCache, pool: &Pool, count: usize) {
    let KvShape { layers, kv_heads, head_dim, .. } = cache.shape();
    for i in 0..count {
        let token = (kv_heads, head_dim);
        let seed = 1000 + cache.tokens() as u64;
        let (key, value) = (rows(seed, 1, token), rows(seed + 77, 1, token));
        (0..layers).for_each(|layer| cache.append(pool, layer, &key, &value).unwrap());
        if i % 7 == 0 {
            cache.check().unwrap();
        }
    }
    cache.check().unwrap();
}

fn attended(cache: &mut KvCache, pool: &Pool, layer: usize) -> Vec<f32> {
    let queries = rows(9, 1, (cache.shape().heads, cache.shape().head_dim));
    let mut out = vec![0.0; queries.len()];
    cache.attend(pool, layer, &queries, &mut out);
    out
}

fn oracle(cache: &KvCache, layer: usize) -> Vec<f64> {
    let queries = rows(9, 1, (cache.shape().heads, cache.shape().head_dim));
    let of_heads = (0..cache.shape().kv_heads).map(|g| cache.oracle(layer, &queries, g));
    of_heads.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect()).unwrap()
}

fn close(got: &[f32], want: &[f64], bound: f64, what: &str) {
    let size = want.iter().fold(1e-3, |m: f64, w| m.max(w.abs()));
    for (g, w) in got.iter().zip(want) {
        assert!((f64::from(*g) - w).abs() <= bound * size, "{what}: got {g}, want {w}, largest {size}");
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[test]
fn attention_agrees_with_the_oracle_over_a_whole_life() {
    let pool = Pool::new(2);
    for shape in SHAPES {
        for format in formats(shape.head_dim) {
            for (prompt, more) in
                [(1, 0), (3, 5), (33, 2), (40, 100), (127, 1), (127, 2), (128, 1), (129, 70), (1100, 3)]
            {
                let mut cache = KvCache::new(shape, format).unwrap();
                read(&mut cache, &pool, &[prompt]);
                grow(&mut cache, &pool, more);
                assert_eq!(cache.tokens(), prompt + more);
                for layer in [0, 2] {
                    let out = attended(&mut cache, &pool, layer);
                    let what = format!("{format} {shape:?} {prompt} + {more}, layer {layer}");
                    close(&out, &oracle(&cache, layer), 2e-5, &what);
                }
            }
        }
    }
}

/// The rotation of queries, keys, values and outputs at every kind of head_dim; 32 and 96 have none.
#[test]
fn quantized_types_agree_with_the_oracle_rotated_or_not() {
    let pool = Pool::new(2);
    for head_dim in [32, 64, 96, 128, 192, 256] {
        let shape = KvShape { layers: 1, heads: 6, kv_heads: 2, head_dim, window: None };
        for name in ["q8_0", "q4_0"] {
            let unrotated = format!("{name}:rotation=none");
            for (prompt, more) in [(1, 0), (65, 3), (1100, 1)] {
                let [rotated, plain] = [name, &unrotated].map(|text| {
                    let mut cache = KvCache::new(shape, text.parse().unwrap()).unwrap();
                    read(&mut cache, &pool, &[prompt]);
                    grow(&mut cache, &pool, more);
                    let out = attended(&mut cache, &pool, 0);
                    close(&out, &oracle(&cache, 0), 2e-5, &format!("{text} {shape:?} {prompt} + {more}"));
                    (cache.bytes(), out)
                });
                assert_eq!(rotated.0, plain.0, "the matrix is stored");
                assert_eq!(rotated.1 == plain.1, head_dim % 64 != 0, "{name} {shape:?} {prompt} + {more}");
            }
        }
    }
}

#[test]
fn every_instruction_set_agrees_with_the_oracle() {
    let pool = Pool::new(1);
    for &isa in Isa::available() {
        for format in formats(64) {
            let mut cache = KvCache::new(SHAPES[0], format).unwrap().with_isa(isa);
            read(&mut cache, &pool, &[500]);
            grow(&mut cache, &pool, 9);
            close(&attended(&mut cache, &pool, 2), &oracle(&cache, 2), 2e-5, &format!("{format} {isa:?}"));
        }
    }
}

#[test]
fn a_copy_of_an_exact_cache_is_what_reading_in_the_format_gives() {
    let pool = Pool::new(2);
    for shape in SHAPES {
        let mut exact = KvCache::new(shape, KvFormat::Exact).unwrap().remember_queries();
        read(&mut exact, &pool, &[300, 1, 129]);
        let before = exact.bytes();
        assert!(before.queries > 0);
        let mut all = formats(shape.head_dim);
        all.push("packed:group=2".parse().unwrap());
        for format in all {
            let mut copy = exact.compressed(&pool, format).unwrap();
            let mut read_so = KvCache::new(shape, format).unwrap();
            read(&mut read_so, &pool, &[430]);
            assert_eq!(copy.format(), format);
            for more in [0, 1, 140] {
                grow(&mut copy, &pool, more);
                grow(&mut read_so, &pool, more);
                // Lists of pages have room that depends on how they grew.
                let bytes =
                    |cache: &KvCache| (cache.bytes().exact, cache.bytes().packed, cache.bytes().rotations);
                assert_eq!(bytes(&copy), bytes(&read_so), "{format} + {more}");
                for layer in 0..3 {
                    let (a, b) = (attended(&mut copy, &pool, layer), attended(&mut read_so, &pool, layer));
                    assert_eq!(a, b, "{format} {shape:?} + {more}, layer {layer}");
                }
            }
        }
        // The exact cache is as it was.
        assert_eq!(exact.bytes(), before);
        exact.check().unwrap();
        assert!(!exact.is_compressed());
    }
}

#[test]
fn a_copy_with_one_compressed_layer_leaves_the_others_exact() {
    let pool = Pool::new(1);
    let mut exact = KvCache::new(SHAPES[0], KvFormat::Exact).unwrap().remember_queries();
    read(&mut exact, &pool, &[700]);
    let outs: Vec<_> = (0..3).map(|layer| attended(&mut exact, &pool, layer)).collect();
    for format in ["quest:dense=0", "strawman", "snapkv", "q4_0", "kivi2", "packed"] {
        let format: KvFormat = format.parse().unwrap();
        let mut copy = exact.compressed_layer(&pool, 1, format).unwrap();
        let mut whole = exact.compressed(&pool, format).unwrap();
        assert_eq!(attended(&mut copy, &pool, 0), outs[0], "{format}");
        assert_eq!(attended(&mut copy, &pool, 2), outs[2], "{format}");
        let out = attended(&mut copy, &pool, 1);
        assert_eq!(out, attended(&mut whole, &pool, 1), "{format}");
        assert_ne!(out, outs[1], "{format}");
        grow(&mut copy, &pool, 40);
        assert!(copy.is_compressed());
        assert_eq!(copy.format(), KvFormat::Exact);
    }
}

#[test]
fn what_cannot_be_copied_is_an_error() {
    let pool = Pool::new(1);
    let mut exact = KvCache::new(SHAPES[2], KvFormat::Exact).unwrap();
    read(&mut exact, &pool, &[90]);
    for name in ["q8_0", "q4_0", "kivi4", "kivi2"] {
        let format = name.parse().unwrap();
        assert!(
            matches!(exact.compressed(&pool, format), Err(KvError::Format { .. })),
            "{name} took 80 channels"
        );
        assert!(KvCache::new(SHAPES[2], format).is_err());
    }
    let snap: KvFormat = "snapkv".parse().unwrap();
    let error = exact.compressed(&pool, snap).unwrap_err();
    assert_eq!(error, KvError::NoQueries { format: "snapkv".into(), layer: 0, wanted: 32, got: 0 });
    // Remembered too late: only the queries of the last tokens are there.
    let mut late = exact.remember_queries();
    grow(&mut late, &pool, 1);
    (0..3).for_each(|layer| drop(attended(&mut late, &pool, layer)));
    let error = late.compressed_layer(&pool, 2, snap).unwrap_err();
    assert_eq!(error, KvError::NoQueries { format: "snapkv".into(), layer: 2, wanted: 32, got: 1 });
    let quest = late.compressed(&pool, "quest:dense=1".parse().unwrap()).unwrap();
    assert_eq!(
        quest.compressed(&pool, KvFormat::Exact).unwrap_err(),
        KvError::AlreadyCompressed { layer: 1 }
    );
}

#[test]
fn keeping_everything_is_exact_attention() {
    let pool = Pool::new(2);
    for shape in SHAPES {
        let mut exact = KvCache::new(shape, KvFormat::Exact).unwrap().remember_queries();
        read(&mut exact, &pool, &[1055]);
        let copies = ["snapkv:kept=1", "quest:selected=1,dense=0", "strawman:kept=1,selected=1"]
            .map(|text| exact.compressed(&pool, text.parse().unwrap()).unwrap());
        for (mut copy, bound) in copies.into_iter().zip([0.0, 1e-5, 3e-3]) {
            let mut exact = exact.clone();
            for more in [0, 50] {
                grow(&mut exact, &pool, more);
                grow(&mut copy, &pool, more);
                let want = wide(&attended(&mut exact, &pool, 2));
                close(&attended(&mut copy, &pool, 2), &want, bound, &copy.format().to_string());
            }
        }
    }
}

#[test]
fn quest_leaves_its_first_layers_dense() {
    let pool = Pool::new(1);
    let mut quest = KvCache::new(SHAPES[0], "quest".parse().unwrap()).unwrap();
    let mut exact = KvCache::new(SHAPES[0], KvFormat::Exact).unwrap();
    read(&mut quest, &pool, &[1000]);
    read(&mut exact, &pool, &[1000]);
    for layer in 0..3 {
        let (before, exact_before) = (quest.bytes_read(), exact.bytes_read());
        let same = attended(&mut quest, &pool, layer) == attended(&mut exact, &pool, layer);
        assert_eq!(same, layer < 2, "layer {layer}");
        let (read, all) = (quest.bytes_read() - before, exact.bytes_read() - exact_before);
        assert_eq!(read == all, layer < 2, "layer {layer} reads {read} of {all}");
    }
}

#[test]
fn a_prompt_in_chunks_is_the_same_prompt() {
    let pool = Pool::new(1);
    for format in formats(64) {
        let outs = [&[400][..], &[399, 1], &[370, 20, 10], &[1, 40, 359]].map(|chunks| {
            let mut cache = KvCache::new(SHAPES[0], format).unwrap();
            read(&mut cache, &pool, chunks);
            assert_eq!(cache.bytes().queries, 0, "queries are held after the prompt");
            attended(&mut cache, &pool, 2)
        });
        assert!(outs.iter().all(|out| *out == outs[0]), "{format}");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for format in formats(64) {
        let outs = [1, 2, 5].map(|threads| {
            let pool = Pool::new(threads);
            let mut cache = KvCache::new(SHAPES[0], format).unwrap();
            read(&mut cache, &pool, &[3000]);
            grow(&mut cache, &pool, 2);
            attended(&mut cache, &pool, 2)
        });
        assert!(outs[0] == outs[1] && outs[0] == outs[2], "{format}");
    }
}

#[test]
fn a_clone_goes_its_own_way() {
    let pool = Pool::new(1);
    for format in formats(64) {
        let mut cache = KvCache::new(SHAPES[0], format).unwrap();
        read(&mut cache, &pool, &[200]);
        grow(&mut cache, &pool, 10);
        let before = cache.clone();
        let want = oracle(&before, 2);
        grow(&mut cache, &pool, 150);
        assert_eq!((before.tokens(), cache.tokens()), (210, 360));
        assert_eq!(oracle(&before, 2), want, "{format}");
        before.check().unwrap();
    }
}

#[test]
fn each_format_stores_the_bits_that_it_says() {
    let shape = KvShape { layers: 1, heads: 4, kv_heads: 1, head_dim: 128, window: None };
    let (pool, tokens) = (Pool::new(1), 8192);
    let bits = |name: &str| {
        let mut cache = KvCache::new(shape, name.parse().unwrap()).unwrap();
        read(&mut cache, &pool, &[tokens]);
        cache.bytes().total() as f64 * 8.0 / shape.scalars(tokens) as f64
    };
    // Above each the format's own bits; what is over is an open page, a residual, a rotation, lists.
    for (name, least, slack) in [
        ("q8_0", 8.5, 0.1),
        ("q4_0", 4.5, 0.1),
        ("kivi4", 5.0, 0.3),
        ("kivi2", 3.0, 0.4),
        // 16 bits and two keys for each 16 tokens.
        ("quest:dense=0", 16.0 + 1.0, 0.2),
        ("snapkv", 4.0, 0.2),
        // A quarter, and a mean key for each 8 tokens.
        ("strawman", 4.0 + 0.25, 0.4),
    ] {
        let got = bits(name);
        assert!((least..least + slack).contains(&got), "{name}: {got} bits a scalar, wanted {least}");
    }
}

#[test]
fn more_bits_are_nearer_to_exact() {
    let pool = Pool::new(1);
    let mut exact = KvCache::new(SHAPES[1], KvFormat::Exact).unwrap();
    read(&mut exact, &pool, &[1000]);
    let want = attended(&mut exact, &pool, 1);
    let error = |name: &str| -> f32 {
        let mut copy = exact.compressed(&pool, name.parse().unwrap()).unwrap();
        let out = attended(&mut copy, &pool, 1);
        out.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt()
    };
    let (q8_0, q4_0, kivi4, kivi2) = (error("q8_0"), error("q4_0"), error("kivi4"), error("kivi2"));
    assert!(0.0 < q8_0 && q8_0 < q4_0 && 0.0 < kivi4 && kivi4 < kivi2, "{q8_0} {q4_0} {kivi4} {kivi2}");
    assert!(q8_0 < 0.01 * want.iter().map(|x| x * x).sum::<f32>().sqrt());
}
