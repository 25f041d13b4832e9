//! Bytes reported are bytes allocated: the bill against a counting allocator.

use mosaickv_kernels::Pool;
use mosaickv_kv::{Calibration, KvCache, KvFormat, KvShape, Moments, Packed};
use std::sync::Arc;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

const FORMATS: [&str; 10] =
    ["exact", "packed", "layered", "quest:dense=1", "strawman", "q8_0", "q4_0", "kivi4", "kivi2", "snapkv"];

/// The channels as they are.
fn calibration() -> Arc<Calibration> {
    let identity: Vec<f64> = (0..64 * 64).map(|i| f64::from(u8::from(i % 65 == 0))).collect();
    let mut moments = Moments::new(64);
    let rows: Vec<f32> = (0..500 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
    moments.add(&rows, &rows, &rows);
    Arc::new(Calibration { heads: vec![moments.learn(&identity); 6], layer_weights: vec![1.0; 3] })
}

/// The prompt's last queries: at least two, because the states of a single one stay as working memory.
fn look(cache: &mut KvCache, pool: &Pool, layer: usize, tokens: usize) {
    let queries: Vec<f32> = (0..tokens.min(32) * 4 * 64).map(|i| (i as f32).cos()).collect();
    cache.attend(pool, layer, &queries, &mut vec![0.0; queries.len()]);
}

#[test]
fn bytes_reported_are_bytes_allocated() {
    let _profiler = dhat::Profiler::builder().testing().build();
    let shape = KvShape { layers: 3, heads: 4, kv_heads: 2, head_dim: 64, window: None };
    let pool = Pool::new(1);
    let row = |t: usize| -> Vec<f32> { (0..128).map(|c| ((t * 131 + c * 17) as f32).sin()).collect() };
    // Matrix products keep working memory for each thread, which is no cache's: let them have it first.
    let mut first = KvCache::new(shape, KvFormat::Packed(Packed::default())).unwrap();
    let tokens: Vec<f32> = (0..1000).flat_map(row).collect();
    first.append(&pool, 0, &tokens, &tokens).unwrap();
    first.end_prompt(&pool, 0);
    drop((first, tokens));
    // The model's, not a cache's.
    let calibration = calibration();
    for format in FORMATS.map(|text| text.parse::<KvFormat>().unwrap()) {
        let long = matches!(format, KvFormat::Layered(_)).then_some((2300, 700));
        for (prompt, more) in [(2, 0), (70, 0), (1000, 0), (1000, 200)].into_iter().chain(long) {
            let before = dhat::HeapStats::get().curr_bytes;
            let cache = KvCache::new(shape, format).unwrap();
            // Which only the layered format does.
            let mut cache = cache.with_calibration(calibration.clone()).unwrap().remember_places();
            let tokens: Vec<f32> = (0..prompt).flat_map(row).collect();
            for layer in 0..3 {
                cache.append(&pool, layer, &tokens, &tokens).unwrap();
                look(&mut cache, &pool, layer, prompt);
                cache.end_prompt(&pool, layer);
            }
            for t in 0..more {
                let token = row(prompt + t);
                (0..3).for_each(|layer| cache.append(&pool, layer, &token, &token).unwrap());
                cache.between_steps();
            }
            drop(tokens);
            let places = cache.places(0, 0).map(|pages| pages.concat().len());
            assert_eq!(places.is_some(), prompt > 2000, "{format:?}: {places:?} places");
            let allocated = dhat::HeapStats::get().curr_bytes - before;
            let reported = cache.bytes().total();
            // The cache's own header is on this test's stack, everything else on the heap.
            let difference = reported as i64 - (allocated + size_of::<KvCache>()) as i64;
            assert!(
                difference.unsigned_abs() as f64 <= 0.002 * allocated as f64,
                "{format:?}, {prompt} + {more} tokens: reported {reported}, allocated {allocated}"
            );
        }
    }
    copies_share_exact_pages(shape, &pool, &row);
}

/// An exact cache counts the queries that it remembers, and copies that stay exact own next to nothing.
fn copies_share_exact_pages(shape: KvShape, pool: &Pool, row: &dyn Fn(usize) -> Vec<f32>) {
    let before = dhat::HeapStats::get().curr_bytes;
    let mut exact = KvCache::new(shape, KvFormat::Exact).unwrap().remember_queries();
    let tokens: Vec<f32> = (0..4096).flat_map(row).collect();
    for layer in 0..3 {
        exact.append(pool, layer, &tokens, &tokens).unwrap();
        look(&mut exact, pool, layer, 4096);
        exact.end_prompt(pool, layer);
    }
    drop(tokens);
    let allocated = dhat::HeapStats::get().curr_bytes - before;
    let bytes = exact.bytes();
    assert_eq!(bytes.queries, 3 * 32 * 4 * 64 * 4);
    let difference = bytes.total() as i64 - (allocated + size_of::<KvCache>()) as i64;
    assert!(difference.unsigned_abs() as f64 <= 0.002 * allocated as f64, "{bytes:?}, allocated {allocated}");
    for (name, share) in [("exact", 0.03), ("quest:dense=0", 0.1)] {
        let before = dhat::HeapStats::get().curr_bytes;
        let copy = exact.compressed(pool, name.parse().unwrap()).unwrap();
        let owned = dhat::HeapStats::get().curr_bytes - before;
        assert!(
            (owned as f64) < share * bytes.exact as f64,
            "{name} owns {owned} of {}",
            copy.bytes().total()
        );
    }
}
