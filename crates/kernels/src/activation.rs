//! The gates of a feed-forward layer: SwiGLU and GeGLU (Shazeer 2020, arXiv 2002.05202).

use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};

/// `gate = silu(gate) * up`, with `silu(x) = x / (1 + e^-x)`; relative error under 1e-6.
pub fn silu_gate(isa: Isa, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "gate and up of different lengths");
    dispatch(isa, Gate { gate, up, linear: 1.0, cubic: 0.0 });
}

/// `gate = gelu(gate) * up` with the tanh approximation (Hendrycks and Gimpel 2016, arXiv 1606.08415, s. 2):
/// `gelu(x) = x / 2 (1 + tanh u) = x / (1 + e^-2u)`, `u = sqrt(2 / pi) (x + 0.044715 x^3)`. Error under 2e-6 of
/// `|up * gate|`.
pub fn gelu_gate(isa: Isa, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "gate and up of different lengths");
    let linear = 2.0 * (2.0 / std::f32::consts::PI).sqrt();
    dispatch(isa, Gate { gate, up, linear, cubic: 0.044_715 * linear });
}

/// Far beyond the square at which a gate is open or closed to rounding.
const MOST: f32 = 1e30;

/// `gate = gate / (1 + e^-(linear gate + cubic gate^3)) * up`
struct Gate<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
    linear: f32,
    cubic: f32,
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let whole = self.gate.len() / S::LANES * S::LANES;
        let (linear, cubic) = (s.splat(-self.linear), s.splat(-self.cubic));
        for i in (0..whole).step_by(S::LANES) {
            // SAFETY: i + LANES is at most the length of both.
            let (g, u) = unsafe { (s.load(self.gate.as_ptr().add(i)), s.load(self.up.as_ptr().add(i))) };
            // Bounded, so that no cubic term does not become 0 times infinity.
            let square = s.min(s.mul(g, g), s.splat(MOST));
            let exponent = s.mul(g, s.fma(cubic, square, linear));
            let turn = s.add(s.splat(1.0), s.exp(exponent));
            // SAFETY: as above.
            unsafe { s.store(self.gate.as_mut_ptr().add(i), s.mul(s.div(g, turn), u)) };
        }
        for (g, u) in self.gate[whole..].iter_mut().zip(&self.up[whole..]) {
            let exponent = -*g * (self.cubic * (*g * *g).min(MOST) + self.linear);
            *g = *g / (1.0 + exponent.exp()) * u;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Formula = fn(f64) -> f64;

    #[test]
    fn agrees_with_the_formula_on_every_isa() {
        let gelu: Formula = |x| {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + u.tanh())
        };
        agrees(silu_gate, |x| x / (1.0 + (-x).exp()), |want, _| 1e-6 * want.abs() + 1e-30);
        agrees(gelu_gate, gelu, |_, product| 2e-6 * product + 1e-30);
    }

    /// `bound(want, |gate * up|)` is how far off a result may be.
    fn agrees(gate_with: fn(Isa, &mut [f32], &[f32]), formula: Formula, bound: fn(f64, f64) -> f64) {
        for &isa in Isa::available() {
            for len in [1, 8, 16, 39, 1536] {
                let from: Vec<f32> =
                    (0..len).map(|i| (i as f32 * 0.37).sin() * 100.0 / (1 + i % 7) as f32).collect();
                let up: Vec<f32> = (0..len + 2).map(|i| (i as f32 * 0.11).cos() * 3.0).collect();
                let from: Vec<f32> = from.into_iter().chain([1e25, 1e19]).collect();
                let mut gate = from.clone();
                gate_with(isa, &mut gate, &up);
                for ((got, x), u) in gate.iter().zip(&from).zip(&up) {
                    let x = f64::from(*x);
                    let want = formula(x) * f64::from(*u);
                    assert!(
                        (f64::from(*got) - want).abs() <= bound(want, (x * f64::from(*u)).abs()),
                        "{isa:?}: {got} for {want}"
                    );
                }
            }
        }
    }
}
