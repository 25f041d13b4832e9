//! Portable vectors: eight lanes in an array, which compilers turn into whatever the target has.

use super::Simd;
use half::{bf16, f16};

#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn map2(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// `f16::to_f32` without its run-time choice of instructions, a call that no compiler inlines: exponent and
/// fraction moved to their places, then the difference of the exponents' biases, which is exact also for
/// subnormal numbers.
#[inline(always)]
fn f32_of(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let scaled = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | special | (bits & 0x8000) << 16)
}

impl Simd for Scalar {
    const LANES: usize = 8;
    const TILE: usize = 1;
    type V = [f32; 8];
    type I = [i32; 8];

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 8] {
        [x; 8]
    }
    #[inline(always)]
    fn add(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map2(a, b, |x, y| x + y)
    }
    #[inline(always)]
    fn sub(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map2(a, b, |x, y| x - y)
    }
    #[inline(always)]
    fn mul(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map2(a, b, |x, y| x * y)
    }
    #[inline(always)]
    fn max(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map2(a, b, f32::max)
    }
    #[inline(always)]
    fn div(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map2(a, b, |x, y| x / y)
    }
    #[inline(always)]
    fn min(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        map2(a, b, f32::min)
    }
    #[inline(always)]
    fn if_below(self, a: [f32; 8], b: [f32; 8], x: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { 0.0 })
    }
    // Not `mul_add`: without a fused instruction that is a slow library call.
    #[inline(always)]
    fn fma(self, a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn round(self, a: [f32; 8]) -> [f32; 8] {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn exp2i(self, n: [f32; 8]) -> [f32; 8] {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn sum_lanes(self, a: [f32; 8]) -> f32 {
        a.iter().sum()
    }
    #[inline(always)]
    fn max_lanes(self, a: [f32; 8]) -> f32 {
        a.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> [f32; 8] {
        // SAFETY: the caller promises 8 readable f32.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: [f32; 8]) {
        // SAFETY: the caller promises 8 writable f32.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> [f32; 8] {
        // SAFETY: the caller promises 8 readable f16.
        unsafe { p.cast::<[f16; 8]>().read_unaligned() }.map(f32_of)
    }
    #[inline(always)]
    unsafe fn expand_f16(self, p: *const f16, mask: u32) -> [f32; 8] {
        // SAFETY: the caller promises 8 readable f16.
        let values = unsafe { p.cast::<[f16; 8]>().read_unaligned() };
        let mut next = 0;
        let mut out = [0.0; 8];
        for (lane, x) in out.iter_mut().enumerate() {
            let bit = mask >> lane & 1;
            // No branch: the bits are as good as random.
            *x = f32::from_bits(f32_of(values[next % 8]).to_bits() & bit.wrapping_neg());
            next += bit as usize;
        }
        out
    }
    #[inline(always)]
    unsafe fn compress_f16(self, p: *mut f16, a: [f32; 8], mask: u32) {
        let (mut out, mut next) = ([f16::ZERO; 8], 0);
        for (lane, x) in a.into_iter().enumerate() {
            out[next % 8] = f16::from_f32(x);
            next += (mask >> lane & 1) as usize;
        }
        // SAFETY: the caller promises 8 writable f16.
        unsafe { p.cast::<[f16; 8]>().write_unaligned(out) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> [f32; 8] {
        // SAFETY: the caller promises 8 readable bf16.
        unsafe { p.cast::<[bf16; 8]>().read_unaligned() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> [f32; 8] {
        // SAFETY: the caller promises 8 readable i8.
        unsafe { p.cast::<[i8; 8]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, a: [f32; 8]) {
        // SAFETY: the caller promises 8 writable i8.
        unsafe { p.cast::<[i8; 8]>().write_unaligned(a.map(|x| x.round_ties_even() as i8)) }
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> [i32; 8] {
        // SAFETY: the caller promises 32 readable bytes.
        unsafe { p.cast::<[i32; 8]>().read_unaligned() }.map(i32::from_le)
    }
    #[inline(always)]
    unsafe fn load_eightfold(self, p: *const u8) -> [i32; 8] {
        // SAFETY: the caller promises 4 readable bytes.
        [i32::from_le(unsafe { p.cast::<i32>().read_unaligned() }); 8]
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, a: [i32; 8]) {
        // SAFETY: the caller promises 32 writable bytes.
        unsafe { p.cast::<[i32; 8]>().write_unaligned(a.map(i32::to_le)) }
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> [i32; 8] {
        [x; 8]
    }
    #[inline(always)]
    fn and(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    fn or(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn xor(self, a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|i| a[i] ^ b[i])
    }
    #[inline(always)]
    fn table(self, entries: [u8; 16]) -> [i32; 8] {
        std::array::from_fn(|i| {
            let at = i % 4 * 4;
            i32::from_le_bytes([entries[at], entries[at + 1], entries[at + 2], entries[at + 3]])
        })
    }
    #[inline(always)]
    fn lookup(self, table: [i32; 8], index: [i32; 8]) -> [i32; 8] {
        index.map(|four| {
            let entry = |i: u8| (table[usize::from(i / 4 % 4)] >> (i % 4 * 8)) as u8;
            i32::from_le_bytes(four.to_le_bytes().map(entry))
        })
    }
    #[inline(always)]
    fn shift(self, a: [i32; 8], n: i32) -> [i32; 8] {
        a.map(|x| if n < 0 { x << -n } else { (x as u32 >> n) as i32 })
    }
    #[inline(always)]
    fn to_f32(self, a: [i32; 8]) -> [f32; 8] {
        a.map(|x| x as f32)
    }
    #[inline(always)]
    fn to_i32(self, a: [f32; 8]) -> [i32; 8] {
        a.map(|x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    fn of_bits(self, a: [i32; 8]) -> [f32; 8] {
        a.map(|x| f32::from_bits(x as u32))
    }
    #[inline(always)]
    unsafe fn store_narrow(self, p: *mut u8, a: [i32; 8]) {
        // SAFETY: the caller promises 8 writable bytes.
        unsafe { p.cast::<[u8; 8]>().write_unaligned(a.map(|x| x as u8)) }
    }
    #[inline(always)]
    fn dot_low(self, acc: [i32; 8], w: [i32; 8], x: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|i| {
            let (w, x) = (w[i].to_le_bytes(), x[i].to_le_bytes());
            acc[i] + (0..4).map(|k| i32::from(w[k]) * i32::from(x[k] as i8)).sum::<i32>()
        })
    }
    #[inline(always)]
    fn dot_full_start(self, sum: i32) -> [i32; 8] {
        [-128 * sum; 8]
    }
    #[inline(always)]
    fn dot_full(self, acc: [i32; 8], w: [i32; 8], x: [i32; 8]) -> [i32; 8] {
        self.dot_low(acc, w, x)
    }
    #[inline(always)]
    fn prefetch<T>(self, _: *const T, _: usize) {}
    #[inline(always)]
    fn prefetch_near<T>(self, _: *const T, _: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_converts_as_the_library_does() {
        for x in (0..=u16::MAX).map(f16::from_bits) {
            let (got, want) = (f32_of(x), x.to_f32());
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{x:?}: {got} {want}");
        }
    }
}
