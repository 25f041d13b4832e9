//! The small vector language in which every kernel is written once.
//!
//! A kernel is a struct of its arguments that implements [`Kernel`]; [`dispatch`] runs it with the vectors of
//! an [`Isa`]. Everything below a kernel is `#[inline(always)]`, so that it is compiled inside the one function
//! per instruction set that carries the `#[target_feature]`.

use crate::isa::{Isa, Kind};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

/// Vectors of `LANES` f32. A value of the type is the proof that the CPU can run its methods, except for
/// those that read or write memory, which are unsafe because of the pointer alone.
pub(crate) trait Simd: Copy {
    /// f32 elements in a vector.
    const LANES: usize;
    /// Vectors that a kernel keeps in flight for each of four rows without running out of registers.
    const TILE: usize;
    type V: Copy;
    /// As many bits as `V`: `LANES` i32, each also four bytes, lowest first.
    type I: Copy;

    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The lanes of `x` where `a < b`, else 0.
    fn if_below(self, a: Self::V, b: Self::V, x: Self::V) -> Self::V;
    /// `a * b + c`
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Round to the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `2^n` for integral `n` in -126..=127.
    fn exp2i(self, n: Self::V) -> Self::V;
    fn sum_lanes(self, a: Self::V) -> f32;
    fn max_lanes(self, a: Self::V) -> f32;
    /// `sum_lanes` of each, cheaper together.
    #[inline(always)]
    fn sum_lanes4(self, a: [Self::V; 4]) -> [f32; 4] {
        [self.sum_lanes(a[0]), self.sum_lanes(a[1]), self.sum_lanes(a[2]), self.sum_lanes(a[3])]
    }

    /// The same of sixteen.
    #[inline(always)]
    fn sum_lanes16(self, a: [Self::V; 16]) -> [f32; 16] {
        let mut sums = [0.0; 16];
        for i in [0, 4, 8, 12] {
            sums[i..i + 4].copy_from_slice(&self.sum_lanes4([a[i], a[i + 1], a[i + 2], a[i + 3]]));
        }
        sums
    }

    /// # Safety
    /// `p` is valid for reading `LANES` f32.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// `p` is valid for writing `LANES` f32.
    unsafe fn store(self, p: *mut f32, a: Self::V);
    /// # Safety
    /// `p` is valid for reading `LANES` f16.
    unsafe fn load_f16(self, p: *const half::f16) -> Self::V;
    /// Lane `i` gets the next f16 of `p` if bit `i` of `mask` is set, else 0: `p[0]` goes to the lowest set
    /// lane, and so on. Bits from `LANES` up are ignored.
    /// # Safety
    /// `p` is valid for reading `LANES` f16, however few bits are set.
    unsafe fn expand_f16(self, p: *const half::f16, mask: u32) -> Self::V;
    /// The reverse: the lanes whose bit of `mask` is set go to `p[0]` and on, rounded to f16; what is written after them
    /// means nothing.
    /// # Safety
    /// `p` is valid for writing `LANES` f16, however few bits are set.
    unsafe fn compress_f16(self, p: *mut half::f16, a: Self::V, mask: u32);
    /// # Safety
    /// `p` is valid for reading `LANES` bf16.
    unsafe fn load_bf16(self, p: *const half::bf16) -> Self::V;
    /// # Safety
    /// `p` is valid for reading `LANES` i8.
    unsafe fn load_i8(self, p: *const i8) -> Self::V;
    /// Each lane rounded to the nearest integer; the lanes must lie in -128..=127.
    /// # Safety
    /// `p` is valid for writing `LANES` i8.
    unsafe fn store_i8(self, p: *mut i8, a: Self::V);
    /// # Safety
    /// `p` is valid for reading `4 * LANES` bytes.
    unsafe fn load_bytes(self, p: *const u8) -> Self::I;
    /// Lane `i` gets the four bytes from `p[i / 8 * 4]`: every four bytes fill eight lanes.
    /// # Safety
    /// `p` is valid for reading `LANES / 2` bytes.
    unsafe fn load_eightfold(self, p: *const u8) -> Self::I;
    /// # Safety
    /// `p` is valid for writing `4 * LANES` bytes.
    unsafe fn store_bytes(self, p: *mut u8, a: Self::I);
    /// The lanes as bytes; they must lie in 0..=127.
    /// # Safety
    /// `p` is valid for writing `LANES` bytes.
    unsafe fn store_narrow(self, p: *mut u8, a: Self::I);

    fn splat_i32(self, x: i32) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    fn xor(self, a: Self::I, b: Self::I) -> Self::I;
    /// What [`Simd::lookup`] looks up.
    fn table(self, entries: [u8; 16]) -> Self::I;
    /// Each byte of `index`, 0..=15, replaced by that entry of `table`.
    fn lookup(self, table: Self::I, index: Self::I) -> Self::I;
    /// Each i32 lane shifted right by `n` bits, or left by `-n`, with zeros shifted in.
    fn shift(self, a: Self::I, n: i32) -> Self::I;
    fn to_f32(self, a: Self::I) -> Self::V;
    /// Each lane rounded to the nearest integer, ties to even; the lanes must be in the range of i32.
    fn to_i32(self, a: Self::V) -> Self::I;
    /// The same bits as floats.
    fn of_bits(self, a: Self::I) -> Self::V;
    /// `acc + w0 x0 + w1 x1 + w2 x2 + w3 x3` in each lane, over the lane's four bytes: codes `w` in 0..=127,
    /// activations `x` in -127..=127.
    fn dot_low(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// Where an accumulator of [`Simd::dot_full`] starts, over activations that add up to `sum`.
    fn dot_full_start(self, sum: i32) -> Self::I;
    /// Like `dot_low` for bytes `w` that stand for the codes `w - 128`, if `acc` began with `dot_full_start`.
    fn dot_full(self, acc: Self::I, w: Self::I, x: Self::I) -> Self::I;

    /// Asks for the cache line `ahead` bytes after `p` (wrapping) ahead of its use; any address will do.
    fn prefetch<T>(self, p: *const T, ahead: usize);
    /// The same, as near as can be: for what is used within a microsecond.
    fn prefetch_near<T>(self, p: *const T, ahead: usize);

    /// `e^x`, relative error under 3e-7 for `x` in -87..=88; beyond, that of the nearer end: never 0 or infinite.
    /// Cody-Waite reduction by ln 2 and the degree-5 polynomial of Cephes `expf`.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        let x = self.min(self.max(x, self.splat(-87.0)), self.splat(88.0));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-0.693_359_4), x);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = self.fma(p, r, self.splat(c));
        }
        let y = self.add(self.fma(p, self.mul(r, r), r), self.splat(1.0));
        self.mul(y, self.exp2i(n))
    }
}

/// A computation that is written once and compiled for every instruction set.
pub(crate) trait Kernel {
    type Output;
    /// Must be `#[inline(always)]`, like all that it calls.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs `kernel` with the vectors of `isa`.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa.0 {
        Kind::Scalar => kernel.run(scalar::Scalar),
        // SAFETY: an `Isa` of this kind exists only where the CPU has the features (`Isa::available`).
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2::run(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { avx512::run(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        Kind::Avx2 | Kind::Avx512 => unreachable!("no such Isa can be made on this architecture"),
    }
}
