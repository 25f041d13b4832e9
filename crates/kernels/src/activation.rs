//! The gate of a SwiGLU feed-forward layer (Shazeer 2020, arXiv 2002.05202).

use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};

/// `gate = silu(gate) * up`, with `silu(x) = x / (1 + e^-x)`; relative error under 1e-6.
pub fn silu_gate(isa: Isa, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "gate and up of different lengths");
    dispatch(isa, SiluGate { gate, up });
}

struct SiluGate<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Kernel for SiluGate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let whole = self.gate.len() / S::LANES * S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            // SAFETY: i + LANES is at most the length of both.
            let (g, u) = unsafe { (s.load(self.gate.as_ptr().add(i)), s.load(self.up.as_ptr().add(i))) };
            let turn = s.add(s.splat(1.0), s.exp(s.sub(s.splat(0.0), g)));
            // SAFETY: as above.
            unsafe { s.store(self.gate.as_mut_ptr().add(i), s.mul(s.div(g, turn), u)) };
        }
        for (g, u) in self.gate[whole..].iter_mut().zip(&self.up[whole..]) {
            *g = *g / (1.0 + (-*g).exp()) * u;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_formula_on_every_isa() {
        for &isa in Isa::available() {
            for len in [1, 8, 16, 39, 1536] {
                let from: Vec<f32> =
                    (0..len).map(|i| (i as f32 * 0.37).sin() * 100.0 / (1 + i % 7) as f32).collect();
                let up: Vec<f32> = (0..len).map(|i| (i as f32 * 0.11).cos() * 3.0).collect();
                let mut gate = from.clone();
                silu_gate(isa, &mut gate, &up);
                for ((got, x), u) in gate.iter().zip(&from).zip(&up) {
                    let x = f64::from(*x);
                    let want = x / (1.0 + (-x).exp()) * f64::from(*u);
                    assert!(
                        (f64::from(*got) - want).abs() <= 1e-6 * want.abs() + 1e-30,
                        "{isa:?}: {got} for {want}"
                    );
                }
            }
        }
    }
}
