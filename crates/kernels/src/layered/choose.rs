//! Which tiles does a step attend to? Those without which a query would miss more than it may.
//!
//! What is known of a tile is its weight in the sketch. The tiles of all queries of a KV head are read together, so that a
//! tile counts as much as it does for the query that wants it most.

use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};

/// What a query needs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Needed {
    /// This share of its attention, as far as the sketch tells.
    Mass(f32),
    /// Every tile of at least this many times the weight of its heaviest one.
    Relative(f32),
}

/// How much each tile is wanted, `[N]`: 1 or more if some query needs it. `weights` `[R, N]` are the tiles' over that of what
/// is attended to in any case, for each of `rows` queries.
///
/// # Panics
/// If a shape does not fit.
pub fn wanted(isa: Isa, (weights, rows): (&[f32], usize), needed: Needed, out: &mut [f32]) {
    assert_eq!(weights.len(), rows * out.len(), "weights are not [{rows}, {}]", out.len());
    out.fill(0.0);
    if !out.is_empty() {
        dispatch(isa, Wanted { weights, needed, out });
    }
}

struct Wanted<'a> {
    weights: &'a [f32],
    needed: Needed,
    out: &'a mut [f32],
}

impl Kernel for Wanted<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.weights.chunks_exact(self.out.len()) {
            let least = match self.needed {
                Needed::Relative(least) => least * largest(s, row, 0.0),
                Needed::Mass(mass) => {
                    let total = 1.0 + sum_below(s, row, f32::INFINITY);
                    let missed = (1.0 - mass) * total;
                    total * highest::<10>(-30.0, |least| sum_below(s, row, least * total) <= missed)
                }
            };
            let least = least.max(f32::MIN_POSITIVE);
            let by = s.splat(1.0 / least);
            let whole = row.len() / S::LANES * S::LANES;
            for i in (0..whole).step_by(S::LANES) {
                // SAFETY: i + LANES is at most the length of both.
                unsafe {
                    let to = self.out.as_mut_ptr().add(i);
                    s.store(to, s.max(s.load(to), s.mul(s.load(row.as_ptr().add(i)), by)));
                }
            }
            for (out, x) in self.out[whole..].iter_mut().zip(&row[whole..]) {
                *out = out.max(x / least);
            }
        }
    }
}

/// The least a tile must be wanted to be attended to: 1, or what makes them at least `least` and at most `most` (about: what
/// differs by a thousandth is not told apart).
pub fn cut(isa: Isa, wanted: &[f32], (least, most): (usize, usize)) -> f32 {
    dispatch(isa, Cut { wanted, least, most })
}

struct Cut<'a> {
    wanted: &'a [f32],
    least: usize,
    most: usize,
}

impl Kernel for Cut<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let count = |cut: f32| self.wanted.len() - count_below(s, self.wanted, cut);
        let needed = count(1.0);
        if needed < self.least {
            return highest::<16>(-120.0, |cut| count(cut) >= self.least);
        }
        if needed > self.most {
            // Where attention is flat, tiles are wanted nearly alike: to a thousandth of an octave.
            return 1.0 / highest::<16>(-60.0, |inverse| count(1.0 / inverse) <= self.most);
        }
        1.0
    }
}

/// The highest power of 2 with an exponent from `low` to 0 for which `holds` is true, which it is up to some number; that of
/// `low` if for none. In so many steps of bisection.
#[inline(always)]
fn highest<const STEPS: usize>(mut low: f32, holds: impl Fn(f32) -> bool) -> f32 {
    let mut high = 0.0;
    for _ in 0..STEPS {
        let middle = 0.5 * (low + high);
        if holds(middle.exp2()) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low.exp2()
}

/// Of `x` and `least`.
#[inline(always)]
pub(super) fn largest<S: Simd>(s: S, x: &[f32], least: f32) -> f32 {
    let mut tops = [s.splat(least); 2];
    let chunks = x.chunks_exact(2 * S::LANES);
    let rest = chunks.remainder().iter().fold(least, |top, x| top.max(*x));
    for chunk in chunks {
        for (i, top) in tops.iter_mut().enumerate() {
            // SAFETY: a chunk has twice LANES elements.
            *top = s.max(*top, unsafe { s.load(chunk.as_ptr().add(i * S::LANES)) });
        }
    }
    s.max_lanes(s.max(tops[0], tops[1])).max(rest)
}

/// Of the weights below `least`.
#[inline(always)]
fn sum_below<S: Simd>(s: S, row: &[f32], least: f32) -> f32 {
    let least = s.splat(least);
    sum_of(s, row, 0.0, |x| s.if_below(x, least, x))
}

#[inline(always)]
fn count_below<S: Simd>(s: S, x: &[f32], cut: f32) -> usize {
    let (cut, one) = (s.splat(cut), s.splat(1.0));
    sum_of(s, x, f32::INFINITY, |x| s.if_below(x, cut, one)) as usize
}

/// Of `f` over vectors of `x`, the last one filled up with `rest`. Four sums, since one would wait for each addition.
#[inline(always)]
fn sum_of<S: Simd>(s: S, x: &[f32], rest: f32, f: impl Fn(S::V) -> S::V) -> f32 {
    let mut sums = [s.splat(0.0); 4];
    let chunks = x.chunks_exact(4 * S::LANES);
    let mut last = [rest; 4 * 16];
    last[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
    for chunk in chunks.chain(last[..4 * S::LANES].chunks_exact(4 * S::LANES)) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: a chunk has four times LANES elements.
            *sum = s.add(*sum, f(unsafe { s.load(chunk.as_ptr().add(i * S::LANES)) }));
        }
    }
    s.sum_lanes4(sums).iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rows of weights that fall like `rank^-falls[r]`, in mixed order.
    fn weights(tiles: usize, falls: [f32; 2]) -> Vec<f32> {
        let rank = |i: usize, r: usize| 1.0 + ((i * 37 + r * 11) % tiles) as f32;
        (0..2 * tiles).map(|at| rank(at % tiles, at / tiles).powf(-falls[at / tiles])).collect()
    }

    fn chosen(wanted: &[f32], cut: f32) -> Vec<usize> {
        (0..wanted.len()).filter(|&i| wanted[i] >= cut).collect()
    }

    #[test]
    fn what_is_left_out_is_no_more_than_may_be_missed() {
        let tiles = 1003;
        for &isa in Isa::available() {
            for mass in [0.8, 0.95, 0.99] {
                let (given, mut out) = (weights(tiles, [2.0, 1.2]), vec![0.0; tiles]);
                wanted(isa, (&given, 2), Needed::Mass(mass), &mut out);
                let chosen = chosen(&out, 1.0);
                let mut one_is_tight = false;
                for row in given.chunks_exact(tiles) {
                    let all: f64 = 1.0 + row.iter().map(|w| f64::from(*w)).sum::<f64>();
                    let met = (1.0 + chosen.iter().map(|&i| f64::from(row[i])).sum::<f64>()) / all;
                    assert!(met >= f64::from(mass) - 1e-4, "{isa:?}: {met} of {mass}");
                    one_is_tight |= met < f64::from(mass) + 0.02;
                }
                assert!(one_is_tight && chosen.len() < tiles, "{isa:?}: {} tiles", chosen.len());
            }
        }
    }

    #[test]
    fn attention_to_what_is_known_needs_no_tiles() {
        for &isa in Isa::available() {
            // Over what is known: a twentieth of it, and a thousand times.
            let counts = [0.02, 1000.0].map(|factor| {
                let (given, mut out) = (weights(500, [1.5, 1.5]), vec![0.0; 500]);
                let given: Vec<f32> = given.iter().map(|w| w * factor).collect();
                wanted(isa, (&given, 2), Needed::Mass(0.9), &mut out);
                chosen(&out, 1.0).len()
            });
            assert!(counts[0] < counts[1] / 2, "{isa:?}: {counts:?}");
        }
    }

    #[test]
    fn relative_weights_have_no_other_rule() {
        for &isa in Isa::available() {
            let (given, mut out) = (weights(100, [1.0, 2.0]), vec![0.0; 100]);
            wanted(isa, (&given, 2), Needed::Relative(0.1), &mut out);
            for i in 0..100 {
                let weight = given[i].max(given[100 + i]);
                assert!((weight - 0.1).abs() < 1e-3 || (out[i] >= 1.0) == (weight > 0.1), "{isa:?} {i}");
            }
        }
    }

    #[test]
    fn the_cut_keeps_to_its_bounds() {
        for &isa in Isa::available() {
            for tiles in [5, 64, 1000] {
                let wanted: Vec<f32> = (0..tiles).map(|i| 4.0 / (1.0 + (i * 7 % tiles) as f32)).collect();
                for (least, most) in [(0, tiles), (tiles / 2, tiles), (0, 2), (tiles, tiles)] {
                    let count = chosen(&wanted, cut(isa, &wanted, (least, most))).len();
                    let needed = chosen(&wanted, 1.0).len();
                    let meant = needed.clamp(least, most);
                    let off = count.abs_diff(meant);
                    assert!(off <= 1 + meant / 16, "{isa:?}: {count} of {tiles}, meant {meant}");
                    assert!(count <= most.max(least) || needed <= most, "{isa:?}: {count} over {most}");
                }
            }
        }
    }
}
