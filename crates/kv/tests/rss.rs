//! Do the bytes that a cache reports agree with the memory that the system gives the process?

mod common;

use mosaickv_kernels::Pool;
use mosaickv_kv::{KvCache, KvFormat, KvShape};

const SHAPE: KvShape = KvShape { layers: 6, heads: 32, kv_heads: 8, head_dim: 128, window: None };
const TOKENS: usize = 16384;

/// Bytes of memory that the process holds, where the system tells.
fn resident() -> Option<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(statm.split(' ').nth(1)?.parse::<usize>().ok()? * 4096)
}

fn layer(cache: &mut KvCache, pool: &Pool, layer: usize, rows: &[f32]) {
    cache.append(pool, layer, rows, rows).unwrap();
    cache.end_prompt(pool, layer);
}

/// Heads of 128 elements: at least three times less than exact f16, in bytes counted and in memory held.
#[test]
fn resident_memory_agrees_with_the_bytes_reported() {
    // Of two threads each keeps what it has needed for a moment, and how many heads each gets differs from layer to layer.
    let pool = Pool::new(1);
    let mut noise = common::uniform(1);
    let rows: Vec<f32> = (0..TOKENS * SHAPE.kv_heads * SHAPE.head_dim).map(|_| noise()).collect();
    let format: KvFormat = "packed:kept=0.25,group=1,block=8".parse().unwrap();
    let mut cache = KvCache::new(SHAPE, format).unwrap();
    let Some(empty) = resident() else {
        return println!("SKIPPED: this system does not tell how much memory a process holds");
    };
    // What a layer needs for a moment, its exact cache above all, stays with the process for the next one.
    (0..2).for_each(|l| layer(&mut cache, &pool, l, &rows));
    let before = (resident().unwrap(), cache.bytes().total());
    (2..SHAPE.layers).for_each(|l| layer(&mut cache, &pool, l, &rows));
    let total = cache.bytes().total();
    let (held, reported) = (resident().unwrap() - before.0, total - before.1);
    let exact = SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 2 * 2 * TOKENS;
    let share = held as f64 / reported as f64;
    println!("6 layers: exact {exact}, reported {total}, resident {}", resident().unwrap() - empty);
    println!("the last 4: reported {reported}, resident {held}, {share:.3} of it");
    assert!(exact as f64 / total as f64 >= 3.0, "{exact} / {total}");
    // Of 128 channels 32 elements of 16 bits and 96 bits of bitmap, for each key, value and eighth of a block key.
    let arithmetic = (32 * 16 + 96) as f64 * (2.0 + 1.0 / 8.0) / 256.0;
    let scalars = SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 2 * TOKENS;
    let bits = cache.bytes().packed as f64 * 8.0 / scalars as f64;
    println!("{bits:.3} bits a scalar in pages, {arithmetic:.3} by arithmetic");
    assert!((0.98..1.02).contains(&(bits / arithmetic)), "{bits} bits a scalar, wanted {arithmetic}");
    assert!((0.9..1.1).contains(&share), "resident {held}, reported {reported}");
}
