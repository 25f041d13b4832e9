//! Does one choice of channels suit every vector? The paper's observation (s. 3), measured on a cache.

use crate::packed::rows;
use crate::rotation::{Basis, Rotation};
use crate::{KvCache, Layer};
use mosaickv_kernels::rotate::multiply;

/// Of each vector's largest elements, the share that lies in the channels that are largest over all vectors of its
/// window; means over vectors, windows and KV heads, in [0, 1].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Overlap {
    /// Keys in the model's own channels.
    pub keys: f64,
    /// Keys after the window's rotation.
    pub rotated_keys: f64,
    /// Values in the model's own channels.
    pub values: f64,
    /// Values after the window's rotation.
    pub rotated_values: f64,
}

impl KvCache {
    /// The overlap in an exact layer, for the largest `share` in (0, 1) of elements and of channels, with a rotation
    /// learnt from each `window` tokens. `None` if the layer is not exact or holds fewer tokens than a window.
    pub fn overlap(&self, layer: usize, window: usize, share: f64) -> Option<Overlap> {
        let Layer::Exact(heads) = &self.layers[layer] else { return None };
        let d = self.shape.head_dim;
        let count = ((d as f64 * share).round() as usize).clamp(1, d);
        let mut all = Vec::new();
        for head in heads {
            let (keys, values) = rows(&head.pages().collect::<Vec<_>>());
            for (keys, values) in keys.chunks_exact(window * d).zip(values.chunks_exact(window * d)) {
                let rotation = Rotation::learn(Basis::Svd, keys, values, (d, d));
                all.push(Overlap {
                    keys: of(keys, d, count),
                    rotated_keys: of(&multiply(keys, &rotation.key_matrix(), d), d, count),
                    values: of(values, d, count),
                    rotated_values: of(&multiply(values, &rotation.value_matrix(d), d), d, count),
                });
            }
        }
        let mean = |part: fn(&Overlap) -> f64| all.iter().map(part).sum::<f64>() / all.len() as f64;
        (!all.is_empty()).then(|| Overlap {
            keys: mean(|o| o.keys),
            rotated_keys: mean(|o| o.rotated_keys),
            values: mean(|o| o.values),
            rotated_values: mean(|o| o.rotated_values),
        })
    }
}

/// Share of the `count` largest elements of each row of `x` `[T, D]` that lie in the `count` channels with the largest
/// sums of squares.
fn of(x: &[f32], d: usize, count: usize) -> f64 {
    let mut energy = vec![0.0; d];
    for row in x.chunks_exact(d) {
        energy.iter_mut().zip(row).for_each(|(e, &x)| *e += f64::from(x) * f64::from(x));
    }
    let global = largest(&energy, count);
    let inside: usize = x
        .chunks_exact(d)
        .map(|row| {
            let squares: Vec<f64> = row.iter().map(|&x| f64::from(x) * f64::from(x)).collect();
            largest(&squares, count).iter().filter(|i| global.contains(i)).count()
        })
        .sum();
    inside as f64 / (x.len() / d * count) as f64
}

/// Indices of the `count` largest; the first of equals.
fn largest(x: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]).then(a.cmp(&b)));
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_elements_in_the_common_channels() {
        // Channels 0 and 1 have the most energy; the second row's largest are 2 and 0, the third's 1 and 3.
        let x = [9.0, 8.0, 1.0, 0.0, 5.0, 0.0, 6.0, 0.0, 0.0, 7.0, 0.0, 1.0];
        assert_eq!(of(&x, 4, 2), 4.0 / 6.0);
        assert_eq!(of(&x, 4, 4), 1.0);
    }
}
