//! What does attention over layered pages want to know of its queries?
//!
//! Every query as bytes, in steps of one scale for the whole row, so that products with levels of any width add up as
//! integers. The numbers themselves stay for escapes.

use super::{GROUP, Profile, UNIT};
use crate::isa::Isa;
use crate::simd::{Kernel, Simd, dispatch};

/// Elements of a row are padded to a multiple of the widest vector.
const STEP: usize = 16;

/// Queries `[R, D]` in the channels of pages: already times each channel's spread and the attention scale.
///
/// A byte is off by at most half a step, `max |q| / 254`: for each channel a score is off by at most that times the key's
/// element, in root mean square by 0.0023 of the row's largest element.
#[derive(Clone, Debug, Default)]
pub struct Queries {
    head_dim: usize,
    /// `D`, padded.
    stride: usize,
    /// `[R, stride]`
    bytes: Vec<i8>,
    /// `[R, stride / 8 + 1]`: sums of the bytes of the groups before each.
    sums: Vec<i32>,
    /// `[R, stride]`
    exact: Vec<f32>,
    /// `[R]`: what the products of bytes and levels are multiplied by.
    scales: Vec<f32>,
    /// `[R]`
    offsets: Vec<f32>,
}

impl Queries {
    /// Of `queries` `[R, D]` and the `offsets` `[R]` that are added to scores: the queries times the keys' mean.
    /// `D` is a multiple of 8 up to 256.
    pub fn new(isa: Isa, queries: &[f32], offsets: &[f32]) -> Queries {
        let mut new = Queries::default();
        new.set(isa, queries, offsets);
        new
    }

    /// The same in place of those held; allocates only if there are more.
    pub fn set(&mut self, isa: Isa, queries: &[f32], offsets: &[f32]) {
        let rows = offsets.len();
        assert!(
            rows > 0 && queries.len().is_multiple_of(rows),
            "{} elements of {rows} queries",
            queries.len()
        );
        let d = queries.len() / rows;
        assert!(
            d > 0 && d.is_multiple_of(GROUP) && d <= 256,
            "queries of {d}, wanted a multiple of 8, at most 256"
        );
        (self.head_dim, self.stride) = (d, d.next_multiple_of(STEP));
        self.exact.clear();
        self.exact.resize(rows * self.stride, 0.0);
        for (to, from) in self.exact.chunks_exact_mut(self.stride).zip(queries.chunks_exact(d)) {
            to[..d].copy_from_slice(from);
        }
        self.offsets.clear();
        self.offsets.extend_from_slice(offsets);
        self.bytes.resize(rows * self.stride, 0);
        self.sums.resize(rows * (self.stride / GROUP + 1), 0);
        self.scales.resize(rows, 0.0);
        dispatch(isa, Round { queries: self });
        let rows =
            self.bytes.chunks_exact(self.stride).zip(self.sums.chunks_exact_mut(self.stride / GROUP + 1));
        for (bytes, sums) in rows {
            let mut sum = 0;
            for (group, to) in bytes.chunks_exact(GROUP).zip(&mut sums[1..]) {
                sum += group.iter().map(|&q| i32::from(q)).sum::<i32>();
                *to = sum;
            }
        }
    }

    /// `R`
    pub fn rows(&self) -> usize {
        self.offsets.len()
    }

    /// `D`
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Row `r` as bytes `[D]`, what a byte's step stands for, and the offset.
    pub fn row(&self, r: usize) -> (&[i8], f32, f32) {
        (&self.bytes(r)[..self.head_dim], self.scales[r] / UNIT, self.offsets[r])
    }

    /// Row `r` `[D]` as it meets keys of `profile`: what the bytes stand for, and where a group has no bits the numbers
    /// as they were given. For oracles; escapes meet the numbers as they were given in all groups.
    pub fn rounded(&self, r: usize, profile: Profile) -> Vec<f64> {
        let mut out: Vec<f64> = self.exact(r)[..self.head_dim].iter().map(|&x| f64::from(x)).collect();
        let (bytes, step, _) = self.row(r);
        for (x, &byte) in out.iter_mut().zip(bytes).take(profile.groups() * GROUP) {
            *x = f64::from(byte) * f64::from(step);
        }
        out
    }

    /// The bytes of row `r`: as many as `D`, padded.
    #[inline(always)]
    pub(super) fn bytes(&self, r: usize) -> &[i8] {
        &self.bytes[r * self.stride..][..self.stride]
    }

    /// Sum of the bytes of row `r` over the first `groups`.
    #[inline(always)]
    pub(super) fn sum(&self, r: usize, groups: usize) -> i32 {
        self.sums[r * (self.stride / GROUP + 1) + groups]
    }

    /// Row `r` as it was given, padded.
    #[inline(always)]
    pub(super) fn exact(&self, r: usize) -> &[f32] {
        &self.exact[r * self.stride..][..self.stride]
    }

    /// By what the integer scores of row `r` must be multiplied, and what is added then.
    #[inline(always)]
    pub(super) fn scale_and_offset(&self, r: usize) -> (f32, f32) {
        (self.scales[r], self.offsets[r])
    }
}

/// Fills in `scales` and `bytes`.
struct Round<'a> {
    queries: &'a mut Queries,
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let q = self.queries;
        let stride = q.stride;
        for (r, row) in q.exact.chunks_exact(stride).enumerate() {
            let mut top = s.splat(0.0);
            for at in (0..stride).step_by(S::LANES) {
                // SAFETY: LANES divides the stride.
                let x = unsafe { s.load(row.as_ptr().add(at)) };
                top = s.max(top, s.max(x, s.sub(s.splat(0.0), x)));
            }
            let step = s.max_lanes(top) / 127.0;
            q.scales[r] = step * UNIT;
            // A row of zeros, or of numbers that only just are, has bytes of 0.
            let steps = s.splat(if step > f32::MIN_POSITIVE { 1.0 / step } else { 0.0 });
            let to = &mut q.bytes[r * stride..][..stride];
            for at in (0..stride).step_by(S::LANES) {
                // SAFETY: as above; the bytes are as many, of a magnitude up to 127 and its rounding.
                unsafe {
                    let x = s.load(row.as_ptr().add(at));
                    s.store_i8(to.as_mut_ptr().add(at), s.mul(x, steps));
                }
            }
        }
    }
}
