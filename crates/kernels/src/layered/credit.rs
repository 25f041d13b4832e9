//! What does a query's attention say of the errors of each token? Over rows of scores, in place.

use super::choose;
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};

/// Scores become attention weights that add up to 1, relative error under 3e-6 for those above 1e-37. An empty row stays
/// empty.
pub fn soften(isa: Isa, scores: &mut [f32]) {
    dispatch(isa, Soften { scores });
}

struct Soften<'a> {
    scores: &'a mut [f32],
}

impl Kernel for Soften<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let top = choose::largest(s, self.scores, f32::NEG_INFINITY);
        let sum = choose::soften(s, self.scores, top);
        self.scores.iter_mut().for_each(|x| *x /= sum);
    }
}

/// What one query adds to the weights of tokens: `a^2` to `values`, and to `keys` `a^2 |v - o|^2`, with `|v - o|^2` from
/// the `crossed` products of values `v` and the output `o`, the values' `squares`, and the output's `square`. All rows
/// are `[T]`.
pub fn credit(
    isa: Isa,
    (weights, crossed): (&[f32], &[f32]),
    (squares, square): (&[f32], f32),
    (keys, values): (&mut [f32], &mut [f32]),
) {
    let tokens = weights.len();
    let lengths = [crossed.len(), squares.len(), keys.len(), values.len()];
    assert!(lengths.iter().all(|&len| len == tokens), "rows of {lengths:?} tokens, wanted {tokens}");
    dispatch(isa, Credit { weights, crossed, squares, square, keys, values });
}

struct Credit<'a> {
    weights: &'a [f32],
    crossed: &'a [f32],
    squares: &'a [f32],
    square: f32,
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

impl Kernel for Credit<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let whole = self.weights.len() / S::LANES * S::LANES;
        let (square, minus_two) = (s.splat(self.square), s.splat(-2.0));
        for t in (0..whole).step_by(S::LANES) {
            // SAFETY: t + LANES is at most the length of all five rows, which `credit` compares.
            unsafe {
                let a = s.load(self.weights.as_ptr().add(t));
                let a = s.mul(a, a);
                let of_value = s.load(self.squares.as_ptr().add(t));
                let crossed = s.load(self.crossed.as_ptr().add(t));
                let distance = s.fma(crossed, minus_two, s.add(of_value, square));
                let distance = s.max(distance, s.splat(0.0));
                let (keys, values) = (self.keys.as_mut_ptr().add(t), self.values.as_mut_ptr().add(t));
                s.store(keys, s.fma(a, distance, s.load(keys)));
                s.store(values, s.add(a, s.load(values)));
            }
        }
        for t in whole..self.weights.len() {
            let a = self.weights[t] * self.weights[t];
            let distance = self.squares[t] + self.square - 2.0 * self.crossed[t];
            self.keys[t] += a * distance.max(0.0);
            self.values[t] += a;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(seed: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + seed * 13) as f32 * 0.37).sin() * 9.0).collect()
    }

    #[test]
    fn weights_add_up_and_agree_with_the_formula_on_every_isa() {
        for &isa in Isa::available() {
            for len in [0, 1, 7, 16, 100, 257] {
                let scores = numbers(len, len);
                let top = scores.iter().fold(f64::MIN, |m, x| m.max(f64::from(*x)));
                let e: Vec<f64> = scores.iter().map(|x| (f64::from(*x) - top).exp()).collect();
                let sum: f64 = e.iter().sum();
                let mut got = scores.clone();
                soften(isa, &mut got);
                for (got, e) in got.iter().zip(&e) {
                    assert!(
                        (f64::from(*got) - e / sum).abs() <= 3e-6 * e / sum,
                        "{isa:?}: {got}, {}",
                        e / sum
                    );
                }
            }
        }
    }

    #[test]
    fn credits_agree_with_the_formula_on_every_isa() {
        for &isa in Isa::available() {
            for len in [1, 8, 31, 64] {
                let [weights, crossed, squares] = [1, 2, 3].map(|seed| numbers(seed, len));
                let (mut keys, mut values) = (numbers(4, len), numbers(5, len));
                let before = (keys.clone(), values.clone());
                credit(isa, (&weights, &crossed), (&squares, 20.0), (&mut keys, &mut values));
                for t in 0..len {
                    let a = f64::from(weights[t]).powi(2);
                    let distance = f64::from(squares[t]) + 20.0 - 2.0 * f64::from(crossed[t]);
                    let want = f64::from(before.0[t]) + a * distance.max(0.0);
                    assert!((f64::from(keys[t]) - want).abs() < 1e-5 * (1.0 + want.abs() + a * 60.0));
                    let want = f64::from(before.1[t]) + a;
                    assert!((f64::from(values[t]) - want).abs() < 1e-5 * (1.0 + want.abs()));
                }
            }
        }
    }
}
