//! What does a quantized product keep of the activations?
//!
//! Int8 codes by spans of 32 with an f32 scale, `x = scale * code` within half a scale (a 254th of the span's
//! largest element), as ggml's q8_1 does. The sums of the codes serve the weights' minima and zero points.

use super::packed::SPAN;
use crate::isa::Isa;
use crate::pool::Pool;
use crate::simd::{Kernel, Simd, dispatch};

/// Numbers that one task quantizes, about.
const TASK_NUMBERS: usize = 2048;

/// 32 activations of one token.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Span {
    pub codes: [i8; SPAN],
    pub scale: f32,
    /// `scale` times the sum of the codes.
    pub weighted: f32,
    /// The sums of the first and the last 16 codes.
    pub sums: [i32; 2],
}

/// Quantizes `x` `[T, cols]`, `cols` a multiple of 32, to `[T, cols / 32]` spans. A span with an element that is
/// not finite gets a scale that is not finite, so that products show it.
pub(super) fn quantize(isa: Isa, pool: &Pool, x: &[f32], cols: usize) -> Vec<Span> {
    let mut spans = vec![Span::default(); x.len() / SPAN];
    let chunk = (TASK_NUMBERS / cols).max(1) * cols;
    pool.for_each_chunk(&mut spans, chunk / SPAN, |i, spans| {
        let x = &x[i * chunk..][..spans.len() * SPAN];
        dispatch(isa, Quantize { x, spans });
    });
    spans
}

struct Quantize<'a> {
    x: &'a [f32],
    spans: &'a mut [Span],
}

impl Kernel for Quantize<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (x, span) in self.x.chunks_exact(SPAN).zip(self.spans) {
            quantize_span(s, x, span);
        }
    }
}

#[inline(always)]
fn quantize_span<S: Simd>(s: S, x: &[f32], span: &mut Span) {
    assert!(x.len() == SPAN);
    let zero = s.splat(0.0);
    let (mut peak, mut taint) = (zero, zero);
    for i in (0..SPAN).step_by(S::LANES) {
        // SAFETY: `x` has 32 elements, a multiple of `LANES`.
        let v = unsafe { s.load(x.as_ptr().add(i)) };
        peak = s.max(peak, s.max(v, s.sub(zero, v)));
        taint = s.fma(v, zero, taint); // NaN if any element is not finite
    }
    // Below 1e-30 the inverse would overflow; such a span is as good as zero.
    let peak = s.max_lanes(peak);
    let (scale, inverse) = if peak > 1e-30 { (peak / 127.0, 127.0 / peak) } else { (0.0, 0.0) };
    for half in 0..2 {
        let mut sum = zero;
        for i in (16 * half..16 * half + 16).step_by(S::LANES) {
            // SAFETY: `x` and `codes` have 32 elements, a multiple of `LANES`.
            unsafe {
                let code = s.round(s.mul(s.load(x.as_ptr().add(i)), s.splat(inverse)));
                s.store_i8(span.codes.as_mut_ptr().add(i), code);
                sum = s.add(sum, code);
            }
        }
        span.sums[half] = s.sum_lanes(sum) as i32;
    }
    span.scale = scale + s.sum_lanes(taint);
    span.weighted = span.scale * (span.sums[0] + span.sums[1]) as f32;
}
