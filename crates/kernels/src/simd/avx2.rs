//! AVX2, FMA and F16C: eight f32 lanes.

use super::{Kernel, Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Made only inside [`run`].
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// # Safety
/// The CPU has the features below.
#[target_feature(enable = "avx2,fma,f16c,popcnt,bmi1,bmi2")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// How lanes move apart and together, for each mask of eight.
struct Moves {
    /// `expand[m][lane]` = how many bits of `m` are set below `lane`, where `lane` itself is set; else 0x80: the
    /// sign bit marks a lane that stays empty.
    expand: [[u8; 8]; 256],
    /// `compress[m]`: the bits that are set in `m`, rising, and zeros.
    compress: [[u8; 8]; 256],
}

static MOVES: Moves = {
    let mut moves = Moves { expand: [[0x80; 8]; 256], compress: [[0; 8]; 256] };
    let mut m = 0;
    while m < 256 {
        let (mut lane, mut next) = (0, 0);
        while lane < 8 {
            if m >> lane & 1 == 1 {
                moves.expand[m][lane] = next as u8;
                moves.compress[m][next] = lane as u8;
                next += 1;
            }
            lane += 1;
        }
        m += 1;
    }
    moves
};

// SAFETY of every block below: an `Avx2` is made only where the features are present (`run`), and pointers are
// the caller's promise, given by the trait.
impl Simd for Avx2 {
    const LANES: usize = 8;
    const TILE: usize = 2;
    type V = __m256;
    type I = __m256i;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn if_below(self, a: __m256, b: __m256, x: __m256) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b), x) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn exp2i(self, n: __m256) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe {
            let bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(bits))
        }
    }
    #[inline(always)]
    fn sum_lanes(self, a: __m256) -> f32 {
        // SAFETY: see the head of this impl.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn max_lanes(self, a: __m256) -> f32 {
        // SAFETY: see the head of this impl.
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn sum_lanes4(self, [a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        // SAFETY: see the head of this impl.
        unsafe {
            let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            let x = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            std::mem::transmute::<__m128, [f32; 4]>(x)
        }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, a: __m256) {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_storeu_ps(p, a) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn expand_f16(self, p: *const f16, mask: u32) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe {
            let values = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
            let index =
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(MOVES.expand[(mask & 255) as usize].as_ptr().cast()));
            let spread = _mm256_permutevar8x32_ps(values, index);
            // The sign of an empty lane's index clears it.
            let empty = _mm256_srai_epi32::<31>(index);
            _mm256_andnot_ps(_mm256_castsi256_ps(empty), spread)
        }
    }
    #[inline(always)]
    unsafe fn compress_f16(self, p: *mut f16, a: __m256, mask: u32) {
        // SAFETY: see the head of this impl.
        unsafe {
            let index = MOVES.compress[(mask & 255) as usize].as_ptr().cast();
            let together = _mm256_permutevar8x32_ps(a, _mm256_cvtepi8_epi32(_mm_loadl_epi64(index)));
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(together));
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, a: __m256) {
        // SAFETY: see the head of this impl.
        unsafe {
            let wide = _mm256_cvtps_epi32(a);
            let half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256::<1>(wide));
            _mm_storel_epi64(p.cast(), _mm_packs_epi16(half, half));
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> __m256i {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_eightfold(self, p: *const u8) -> __m256i {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, a: __m256i) {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_storeu_si256(p.cast(), a) }
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m256i {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_set1_epi32(x) }
    }
    #[inline(always)]
    fn and(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_and_si256(a, b) }
    }
    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    fn xor(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_xor_si256(a, b) }
    }
    #[inline(always)]
    fn table(self, entries: [u8; 16]) -> __m256i {
        // SAFETY: see the head of this impl; the load is of the array's 16 bytes.
        unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(entries.as_ptr().cast())) }
    }
    #[inline(always)]
    fn lookup(self, table: __m256i, index: __m256i) -> __m256i {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_shuffle_epi8(table, index) }
    }
    #[inline(always)]
    fn shift(self, a: __m256i, n: i32) -> __m256i {
        // SAFETY: see the head of this impl.
        unsafe {
            let count = _mm_cvtsi32_si128(n.abs());
            if n < 0 { _mm256_sll_epi32(a, count) } else { _mm256_srl_epi32(a, count) }
        }
    }
    #[inline(always)]
    fn to_f32(self, a: __m256i) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_cvtepi32_ps(a) }
    }
    #[inline(always)]
    fn to_i32(self, a: __m256) -> __m256i {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_cvtps_epi32(a) }
    }
    #[inline(always)]
    fn of_bits(self, a: __m256i) -> __m256 {
        // SAFETY: see the head of this impl.
        unsafe { _mm256_castsi256_ps(a) }
    }
    #[inline(always)]
    unsafe fn store_narrow(self, p: *mut u8, a: __m256i) {
        // SAFETY: see the head of this impl.
        unsafe {
            let half = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            _mm_storel_epi64(p.cast(), _mm_packs_epi16(half, half));
        }
    }
    // A pair of products is at most 2 * 127 * 127 = 32,258: it fits i16.
    #[inline(always)]
    fn dot_low(self, acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: see the head of this impl.
        unsafe {
            let pairs = _mm256_maddubs_epi16(w, x);
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    fn dot_full_start(self, _: i32) -> __m256i {
        self.splat_i32(0)
    }
    // Unsigned bytes would overflow the i16 pairs; |code| times the activation with the code's sign gives at
    // most 2 * 128 * 127 = 32,512, and -128 has an absolute value here while no activation is -128.
    #[inline(always)]
    fn dot_full(self, acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // SAFETY: see the head of this impl.
        unsafe {
            let code = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(x, code));
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
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
