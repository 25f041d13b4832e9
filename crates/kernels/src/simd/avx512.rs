//! AVX-512 F, BW, DQ, VL and VNNI: sixteen f32 lanes.

use super::{Kernel, Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Made only inside [`run`].
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// # Safety
/// The CPU has the features below.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,popcnt,bmi1,bmi2")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

// SAFETY of every block below: an `Avx512` is made only where the features are present (`run`), and pointers
// are the caller's promise, given by the trait.
impl Simd for Avx512 {
    const LANES: usize = 16;
    const TILE: usize = 4;
    type V = __m512;
    type I = __m512i;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn if_below(self, a: __m512, b: __m512, x: __m512) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), x) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn exp2i(self, n: __m512) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_scalef_ps(_mm512_set1_ps(1.0), n) }
    }
    #[inline(always)]
    fn sum_lanes(self, a: __m512) -> f32 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_reduce_add_ps(a) }
    }
    #[inline(always)]
    fn max_lanes(self, a: __m512) -> f32 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    fn sum_lanes4(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        // SAFETY: see the head of this impl.
        unsafe {
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let x = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            std::mem::transmute::<__m128, [f32; 4]>(x)
        }
    }
    #[inline(always)]
    fn sum_lanes16(self, a: [__m512; 16]) -> [f32; 16] {
        // SAFETY: see the head of this impl.
        unsafe {
            // Lane `4 * q + i` of each is a quarter of the sum of vector `i` of its four.
            let mut fours = [_mm512_setzero_ps(); 4];
            for i in 0..4 {
                let (a, b, c, d) = (a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]);
                let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                fours[i] =
                    _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
            }
            let [a, b, c, d] = fours;
            let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
            let x = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
            std::mem::transmute::<__m512, [f32; 16]>(x)
        }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: __m512) {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_storeu_ps(p, a) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn expand_f16(self, p: *const f16, mask: u32) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_maskz_expand_ps(mask as u16, _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn compress_f16(self, p: *mut f16, a: __m512, mask: u32) {
        // SAFETY: see the head of this impl.
        unsafe {
            let together = _mm512_maskz_compress_ps(mask as u16, a);
            _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(together));
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, a: __m512) {
        // SAFETY: see the head of this impl.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a))) }
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> __m512i {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_eightfold(self, p: *const u8) -> __m512i {
        // SAFETY: see the head of this impl.
        unsafe {
            let both = _mm512_castsi512_ps(_mm512_set1_epi64(p.cast::<i64>().read_unaligned()));
            let half = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
            _mm512_castps_si512(_mm512_permutevar_ps(both, half))
        }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, a: __m512i) {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_storeu_si512(p.cast(), a) }
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m512i {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn xor(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_xor_si512(a, b) }
    }
    #[inline(always)]
    fn table(self, entries: [u8; 16]) -> __m512i {
        // SAFETY: see the head of this impl; the load is of the array's 16 bytes.
        unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(entries.as_ptr().cast())) }
    }
    #[inline(always)]
    fn lookup(self, table: __m512i, index: __m512i) -> __m512i {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_shuffle_epi8(table, index) }
    }
    #[inline(always)]
    fn shift(self, a: __m512i, n: i32) -> __m512i {
        // SAFETY: see the head of this impl.
        unsafe {
            let count = _mm_cvtsi32_si128(n.abs());
            if n < 0 { _mm512_sll_epi32(a, count) } else { _mm512_srl_epi32(a, count) }
        }
    }
    #[inline(always)]
    fn to_f32(self, a: __m512i) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    fn to_i32(self, a: __m512) -> __m512i {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_cvtps_epi32(a) }
    }
    #[inline(always)]
    fn of_bits(self, a: __m512i) -> __m512 {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_castsi512_ps(a) }
    }
    #[inline(always)]
    unsafe fn store_narrow(self, p: *mut u8, a: __m512i) {
        // SAFETY: see the head of this impl.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(a)) }
    }
    #[inline(always)]
    fn dot_low(self, acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_dpbusd_epi32(acc, w, x) }
    }
    // The instruction takes the bytes as 0..=255, 128 too many each.
    #[inline(always)]
    fn dot_full_start(self, sum: i32) -> __m512i {
        self.splat_i32(-128 * sum)
    }
    #[inline(always)]
    fn dot_full(self, acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        // SAFETY: see the head of this impl.
        unsafe { _mm512_dpbusd_epi32(acc, w, x) }
    }
    #[inline(always)]
    fn prefetch<T>(self, p: *const T, ahead: usize) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast::<i8>().wrapping_add(ahead)) }
    }
    #[inline(always)]
    fn prefetch_near<T>(self, p: *const T, ahead: usize) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast::<i8>().wrapping_add(ahead)) }
    }
}
