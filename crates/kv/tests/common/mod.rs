//! What the cache's tests draw their numbers from.

/// A stream of numbers in [-1, 1), the same for the same seed (xorshift, Marsaglia 2003).
pub fn uniform(seed: u64) -> impl FnMut() -> f32 {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}
