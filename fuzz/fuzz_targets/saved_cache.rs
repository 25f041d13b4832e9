//! Arbitrary bytes are a saved cache or an error. What is read can be attended to and go on.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run saved_cache --sanitizer address -- -max_len=65536 -max_total_time=60`
#![no_main]

use half::f16;
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use mosaickv_kernels::Pool;
use mosaickv_kv::{Calibration, HeadCalibration, KvCache, KvFormat, KvShape, Layered};
use std::sync::{Arc, LazyLock};

const D: usize = 16;
const SHAPE: KvShape = KvShape { layers: 1, heads: 2, kv_heads: 1, head_dim: D, window: None };
const FORMATS: [KvFormat; 2] = [
    KvFormat::Exact,
    KvFormat::Layered(Layered {
        target: mosaickv_kv::Target::Ratio(6.0),
        drop: mosaickv_kv::Dropping::Guarded,
        select: mosaickv_kv::Select::All,
    }),
];

/// The model's own channels.
static CALIBRATION: LazyLock<Arc<Calibration>> = LazyLock::new(|| {
    let identity: Box<[f16]> =
        (0..D * D).map(|i| f16::from_f32(f32::from(u8::from(i % (D + 1) == 0)))).collect();
    let head = HeadCalibration {
        keys: identity.clone(),
        queries: identity.clone(),
        values: identity.clone(),
        outputs: identity,
    };
    Arc::new(Calibration { heads: vec![head], layer_weights: vec![1.0] })
});

/// What was really written, of each format.
static WRITTEN: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
    FORMATS.map(|format| {
        let pool = Pool::new(1);
        let tokens = if format == KvFormat::Exact { 70 } else { Layered::LEAST_TOKENS + 9 };
        let number = |i: usize| (i * 37 % 61) as f32 / 30.0 - 1.0;
        let rows = |seed: usize, width: usize| -> Vec<f32> {
            (0..tokens * width).map(|i| number(i + seed)).collect()
        };
        let cache = KvCache::new(SHAPE, format).unwrap().with_calibration(CALIBRATION.clone());
        let mut cache = cache.unwrap();
        let queries = rows(5, 2 * D);
        cache.append(&pool, 0, &rows(1, D), &rows(2, D)).unwrap();
        cache.attend(&pool, 0, &queries, &mut vec![0.0; queries.len()]);
        cache.end_prompt(&pool, 0);
        let mut bytes = vec![];
        cache.write(&mut bytes).unwrap();
        bytes
    })
});

fuzz_target!(|bytes: &[u8]| {
    for format in FORMATS {
        let Ok(mut cache) = KvCache::read(bytes, SHAPE, format, Some(CALIBRATION.clone())) else { continue };
        let pool = Pool::new(1);
        for t in 0..70 {
            let key: Vec<f32> = (0..D).map(|c| ((t * 7 + c) % 5) as f32 - 2.0).collect();
            cache.append(&pool, 0, &key, &key).unwrap();
            let mut out = vec![0.0; 2 * D];
            cache.attend(&pool, 0, &[&key[..], &key[..]].concat(), &mut out);
            cache.between_steps();
        }
        cache.check().unwrap();
        cache.write(&mut vec![]).unwrap();
    }
});

// Random bytes are hardly ever a cache: one in four times what was really written is changed.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let written = &WRITTEN[(seed / 4 % 2) as usize];
    let size = if seed % 4 == 0 && written.len() <= max_size.min(data.len()) {
        data[..written.len()].copy_from_slice(written);
        written.len()
    } else {
        size
    };
    fuzzer_mutate(data, size, max_size)
});
