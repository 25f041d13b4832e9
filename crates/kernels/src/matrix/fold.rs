//! What is done with a packed panel once it is read: multiply it, or expand it?
//!
//! Both are written once over [`Layout`], a constant of the [`Format`] that they are compiled for. The product
//! reads a span's codes once for several tokens, adds up integers within the span and f32 across spans.
//!
//! Measured on a busy 2-core Zen 4, one thread, CPU time (`examples/matvec.rs`): one token reads 77-93 % of the
//! stream bandwidth with AVX2 and AVX-512 alike (SmolLM2-135M, Q4_1: 3.5-5.4 ms as the neighbours let it; scalar
//! 28 ms), K-quants of an 8B layer 70-80 %.
//! Many tokens: AVX-512 1,100-1,225 tok/s of layers, AVX2 510-650; f32 tiles through `gemm` 450-504.
//! Tried: 4 instead of 8 tokens together is no faster (AVX-512 990-1,180, AVX2 355-530); 64 or 256 instead of 128
//! rows in an f32 tile make no difference above the noise (450-495 against 472-489).

use super::activations;
use super::blocks::BlockType;
use super::output::Output;
use super::packed::{Layout, Packed, ROWS, SPAN, Scales};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};
use std::marker::PhantomData;
use std::ops::Range;

/// Tokens that share one reading of a panel.
const TOGETHER: usize = 8;

/// How many bytes ahead of their use weights are asked for: what memory delivers in its latency. Beyond a panel
/// lies the next one of the task.
const AHEAD: usize = 4096;

/// A layout as a type, so that kernels are compiled for it.
trait Format {
    const LAYOUT: Layout;
}

/// Calls `$body` with the type `$format` that stands for `$ty`.
macro_rules! with_format {
    ($ty:expr, $format:ident => $body:expr, $($name:ident)*) => {
        match $ty {
            $(BlockType::$name => {
                struct $format;
                impl Format for $format {
                    const LAYOUT: Layout = Layout::of(BlockType::$name);
                }
                $body
            })*
            BlockType::F32 | BlockType::F16 | BlockType::Bf16 => unreachable!("plain floats are not packed"),
        }
    };
    ($ty:expr, $format:ident => $body:expr) => {
        with_format!($ty, $format => $body, Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4K Q5K Q6K)
    };
}

/// Multiplies some panels with all tokens: `x` is `[T, cols / 32]`.
///
/// # Safety
/// No other thread touches these rows of `out` meanwhile.
pub(super) unsafe fn multiply(
    isa: Isa,
    w: &Packed,
    panels: Range<usize>,
    x: &[activations::Span],
    out: &Output,
) {
    with_format!(w.ty, F => dispatch(isa, Multiply::<F> { w, panels, x, out, format: PhantomData }));
}

/// Expands `panels` to f32 `[cols, 16 * panels]`, restricted to the blocks `blocks` of the columns.
pub(super) fn expand(isa: Isa, w: &Packed, panels: Range<usize>, blocks: Range<usize>, out: &mut [f32]) {
    with_format!(w.ty, F => dispatch(isa, Expand::<F> { w, panels, blocks, out, format: PhantomData }));
}

struct Multiply<'a, F> {
    w: &'a Packed,
    panels: Range<usize>,
    x: &'a [activations::Span],
    out: &'a Output,
    format: PhantomData<F>,
}

impl<F: Format> Kernel for Multiply<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let spans = self.w.cols / SPAN;
        for p in self.panels.clone() {
            let (mut t, tokens) = (0, self.x.len() / spans);
            while t < tokens {
                t += match tokens - t {
                    TOGETHER.. => self.step::<S, TOGETHER>(s, p, t),
                    4.. => self.step::<S, 4>(s, p, t),
                    2.. => self.step::<S, 2>(s, p, t),
                    _ => self.step::<S, 1>(s, p, t),
                };
            }
        }
    }
}

impl<F: Format> Multiply<'_, F> {
    /// Multiplies panel `p` with the `N` tokens from `t` on; returns `N`.
    #[inline(always)]
    fn step<S: Simd, const N: usize>(&self, s: S, p: usize, t: usize) -> usize {
        let values = fold::<S, F, N>(s, self.w.panel(p), &self.x[t * (self.w.cols / SPAN)..]);
        // SAFETY: the promise that `multiply` was given.
        unsafe { self.out.write(t, p * ROWS, values) };
        N
    }
}

/// The products of one panel with `N` tokens, `[N, 16]`.
#[inline(always)]
fn fold<S: Simd, F: Format, const N: usize>(s: S, panel: &[u8], x: &[activations::Span]) -> [[f32; ROWS]; N] {
    let spans = panel.len() / F::LAYOUT.block_bytes() * F::LAYOUT.spans();
    assert!(panel.len().is_multiple_of(F::LAYOUT.block_bytes()) && x.len() >= N * spans);
    let mut sums = [[s.splat(0.0); N]; 2];
    let mut i = 0;
    for block in panel.chunks_exact(F::LAYOUT.block_bytes()) {
        for line in (0..F::LAYOUT.block_bytes()).step_by(64) {
            s.prefetch(block.as_ptr(), AHEAD + line);
        }
        let heads = read_heads::<S, F>(s, block);
        for span in block[F::LAYOUT.head_bytes()..].chunks_exact(F::LAYOUT.span_bytes()) {
            for (part, &head) in heads[..ROWS / S::LANES].iter().enumerate() {
                let w = read_span::<S, F>(s, span, part, head);
                for (n, sum) in sums[part].iter_mut().enumerate() {
                    // SAFETY: `i` is below `spans`, and `x` holds `N` tokens of `spans` each.
                    let x = unsafe { x.get_unchecked(n * spans + i) };
                    *sum = fold_token::<S, F>(s, &w, x, *sum);
                }
            }
            i += 1;
        }
    }
    let mut out = [[0.0; ROWS]; N];
    for (part, sums) in sums[..ROWS / S::LANES].iter().enumerate() {
        for (out, &sum) in out.iter_mut().zip(sums) {
            // SAFETY: 16 elements are a multiple of `LANES`.
            unsafe { s.store(out.as_mut_ptr().add(part * S::LANES), sum) };
        }
    }
    out
}

/// A block's scale, and its scale of minima, of `LANES` rows.
#[derive(Clone, Copy)]
struct Head<S: Simd> {
    scale: S::V,
    min: S::V,
}

/// A span of `LANES` rows as it was read.
struct Weights<S: Simd> {
    /// Unsigned codes of eight groups.
    codes: [S::I; 8],
    /// The scales of the two halves.
    scales: [S::V; 2],
    /// The minimum; 0 if the format has none.
    min: S::V,
}

#[inline(always)]
fn read_heads<S: Simd, F: Format>(s: S, block: &[u8]) -> [Head<S>; 2] {
    let zero = s.splat(0.0);
    let mut heads = [Head { scale: zero, min: zero }; 2];
    if F::LAYOUT.head_bytes() == 0 {
        return heads;
    }
    assert!(block.len() >= F::LAYOUT.head_bytes());
    for (part, head) in heads.iter_mut().enumerate().take(ROWS / S::LANES) {
        // SAFETY: a head holds 16 scales, and 16 scales of minima if it has minima: checked above.
        unsafe {
            let at = block.as_ptr().cast::<half::f16>().add(part * S::LANES);
            head.scale = s.load_f16(at);
            if F::LAYOUT.has_min() {
                head.min = s.load_f16(at.add(ROWS));
            }
        }
    }
    heads
}

/// Reads rows `part * LANES..` of a span.
#[inline(always)]
fn read_span<S: Simd, F: Format>(s: S, span: &[u8], part: usize, head: Head<S>) -> Weights<S> {
    assert!(span.len() == F::LAYOUT.span_bytes() && (part + 1) * S::LANES <= ROWS);
    let row = part * S::LANES;
    let zero = s.splat(0.0);
    // SAFETY: the sides of a span are what `Layout::side_bytes` says, 16 rows each, and the rows are among them.
    let (scales, min) = unsafe {
        let halves = span.as_ptr().cast::<half::f16>().add(row);
        let factors = span.as_ptr().cast::<i8>().add(row);
        match F::LAYOUT.scales {
            Scales::Span => ([s.load_f16(halves); 2], zero),
            Scales::SpanMin => ([s.load_f16(halves); 2], s.load_f16(halves.add(ROWS))),
            Scales::NestedMin => {
                let min = s.mul(head.min, s.load_i8(factors.add(ROWS)));
                ([s.mul(head.scale, s.load_i8(factors)); 2], s.sub(zero, min))
            }
            Scales::NestedHalf => {
                let second = s.mul(head.scale, s.load_i8(factors.add(ROWS)));
                ([s.mul(head.scale, s.load_i8(factors)), second], zero)
            }
        }
    };
    // SAFETY: the codes follow the sides and fill the span.
    let codes = unsafe { read_codes::<S, F>(s, span.as_ptr().add(F::LAYOUT.side_bytes() + 4 * row)) };
    Weights { codes, scales, min }
}

/// The codes of eight groups; `at` is the place of the first row in the first vector.
///
/// # Safety
/// `64 * bits` bytes are readable from the start of the span's codes, which is `at` less 4 bytes a row.
#[inline(always)]
unsafe fn read_codes<S: Simd, F: Format>(s: S, at: *const u8) -> [S::I; 8] {
    let mut codes = [s.splat_i32(0); 8];
    // SAFETY: the vectors of 64 bytes below are those that the caller promises; planes come first.
    let load = |vector: usize| unsafe { s.load_bytes(at.add(64 * vector)) };
    if F::LAYOUT.bits == 8 {
        for (g, code) in codes.iter_mut().enumerate() {
            *code = load(g);
        }
        return codes;
    }
    let high_bits = F::LAYOUT.bits - 4;
    let low_mask = s.splat_i32(0x0f0f_0f0f);
    let high_mask = s.splat_i32(if high_bits == 1 { 0x1010_1010 } else { 0x3030_3030 });
    for g in 0..4 {
        let pair = load(high_bits + g);
        codes[g] = s.and(pair, low_mask);
        codes[g + 4] = s.and(s.shift(pair, 4), low_mask);
    }
    if high_bits > 0 {
        for (g, code) in codes.iter_mut().enumerate() {
            let bit = g * high_bits;
            let high = s.shift(load(bit / 8), (bit % 8) as i32 - 4);
            *code = s.or(*code, s.and(high, high_mask));
        }
    }
    codes
}

/// `sum + w x` over one span of one token.
#[inline(always)]
fn fold_token<S: Simd, F: Format>(s: S, w: &Weights<S>, x: &activations::Span, sum: S::V) -> S::V {
    let halves = if matches!(F::LAYOUT.scales, Scales::NestedHalf) { 2 } else { 1 };
    let mut sum = sum;
    for half in 0..halves {
        let codes = if halves == 2 { x.sums[half] } else { x.sums[0] + x.sums[1] };
        let mut dot = match F::LAYOUT.bits {
            8 => s.dot_full_start(codes),
            _ => s.splat_i32(-F::LAYOUT.zero() * codes),
        };
        for g in half * 8 / halves..(half + 1) * 8 / halves {
            // SAFETY: four of the 32 codes.
            let four = unsafe { x.codes.as_ptr().add(4 * g).cast::<i32>().read_unaligned() };
            let four = s.splat_i32(i32::from_le(four));
            dot = match F::LAYOUT.bits {
                8 => s.dot_full(dot, w.codes[g], four),
                _ => s.dot_low(dot, w.codes[g], four),
            };
        }
        sum = s.fma(s.to_f32(dot), s.mul(w.scales[half], s.splat(x.scale)), sum);
    }
    if F::LAYOUT.has_min() { s.fma(w.min, s.splat(x.weighted), sum) } else { sum }
}

struct Expand<'a, F> {
    w: &'a Packed,
    panels: Range<usize>,
    blocks: Range<usize>,
    out: &'a mut [f32],
    format: PhantomData<F>,
}

impl<F: Format> Kernel for Expand<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (size, height) = (F::LAYOUT.block_bytes(), ROWS * self.panels.len());
        let width = F::LAYOUT.spans() * SPAN;
        assert!(self.out.len() == self.blocks.len() * width * height);
        for (p, panel) in self.panels.clone().map(|p| self.w.panel(p)).enumerate() {
            let blocks = panel[self.blocks.start * size..self.blocks.end * size].chunks_exact(size);
            for (block, out) in blocks.zip(self.out.chunks_exact_mut(width * height)) {
                let heads = read_heads::<S, F>(s, block);
                let spans = block[F::LAYOUT.head_bytes()..].chunks_exact(F::LAYOUT.span_bytes());
                for (span, out) in spans.zip(out.chunks_exact_mut(SPAN * height)) {
                    for (part, &head) in heads[..ROWS / S::LANES].iter().enumerate() {
                        let w = read_span::<S, F>(s, span, part, head);
                        expand_span::<S, F>(s, &w, &mut out[p * ROWS + part * S::LANES..], height);
                    }
                }
            }
        }
    }
}

/// Writes a span's `LANES` rows to the front of each of 32 columns, `height` apart.
#[inline(always)]
fn expand_span<S: Simd, F: Format>(s: S, w: &Weights<S>, out: &mut [f32], height: usize) {
    assert!(out.len() >= (SPAN - 1) * height + S::LANES);
    let (mask, zero) = (s.splat_i32(0xff), s.splat(F::LAYOUT.zero() as f32));
    for c in 0..SPAN {
        let code = s.to_f32(s.and(s.shift(w.codes[c / 4], 8 * (c % 4) as i32), mask));
        let code = if F::LAYOUT.has_min() { code } else { s.sub(code, zero) };
        // SAFETY: the longest reach was checked above.
        unsafe { s.store(out.as_mut_ptr().add(c * height), s.fma(code, w.scales[c / 16], w.min)) };
    }
}
