//! Which codes do elements get? [`Width::code`] of each, in vectors.

use super::{GROUP, PAGE_TOKENS, Width};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};

/// The codes of the 8 `elements` of each of up to 64 tokens; returns a bit for each token that has an escape.
pub(super) fn codes<'a>(
    isa: Isa,
    width: Width,
    elements: impl Iterator<Item = &'a [f32]>,
    out: &mut [[u8; GROUP]; PAGE_TOKENS],
) -> u64 {
    dispatch(isa, Codes { width, elements, out })
}

struct Codes<'a, I> {
    width: Width,
    elements: I,
    out: &'a mut [[u8; GROUP]; PAGE_TOKENS],
}

impl<'a, I: Iterator<Item = &'a [f32]>> Kernel for Codes<'_, I> {
    type Output = u64;

    /// The vectors are the compiler's: loops over eight elements, for one width at a time.
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> u64 {
        let mut beyond = 0;
        for (token, (elements, out)) in self.elements.zip(self.out).enumerate() {
            let is_beyond = match self.width {
                Width::Two => group(Width::Two, elements, out),
                Width::Four => group(Width::Four, elements, out),
                Width::Eight => group(Width::Eight, elements, out),
            };
            beyond |= u64::from(is_beyond) << token;
        }
        beyond
    }
}

/// The codes of one token, and whether one of them has an escape.
#[inline(always)]
fn group(width: Width, elements: &[f32], out: &mut [u8; GROUP]) -> bool {
    let mut beyond = 0;
    for (x, out) in elements.iter().zip(out) {
        *out = width.code(*x);
        beyond |= u8::from(x.abs() > width.range());
    }
    beyond != 0
}
