//! Bytes reported are bytes allocated: the bill against a counting allocator.

use mosaickv_kernels::Pool;
use mosaickv_kv::{KvCache, KvFormat, KvShape, PackedStrategy};

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

#[test]
fn bytes_reported_are_bytes_allocated() {
    let _profiler = dhat::Profiler::builder().testing().build();
    let shape = KvShape { layers: 3, heads: 4, kv_heads: 2, head_dim: 64, window: None };
    let pool = Pool::new(1);
    let row = |t: usize| -> Vec<f32> { (0..128).map(|c| ((t * 131 + c * 17) as f32).sin()).collect() };
    // Matrix products keep working memory for each thread, which is no cache's: let them have it first.
    let mut first = KvCache::new(shape, KvFormat::Packed(PackedStrategy::default())).unwrap();
    let tokens: Vec<f32> = (0..1000).flat_map(row).collect();
    first.append(&pool, 0, &tokens, &tokens).unwrap();
    first.end_prompt(&pool, 0);
    drop((first, tokens));
    for format in [KvFormat::Exact, KvFormat::Packed(PackedStrategy::default())] {
        for (prompt, more) in [(1, 0), (70, 0), (1000, 0), (1000, 200)] {
            let before = dhat::HeapStats::get().curr_bytes;
            let mut cache = KvCache::new(shape, format).unwrap();
            let tokens: Vec<f32> = (0..prompt).flat_map(row).collect();
            for layer in 0..3 {
                cache.append(&pool, layer, &tokens, &tokens).unwrap();
                cache.end_prompt(&pool, layer);
            }
            for t in 0..more {
                let token = row(prompt + t);
                (0..3).for_each(|layer| cache.append(&pool, layer, &token, &token).unwrap());
            }
            drop(tokens);
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
}
