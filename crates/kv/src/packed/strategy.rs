//! Which strategy suits a segment? (Paper, s. 4.)
//!
//! Chosen greedily, as the paper does: the highest channel rate, then the largest element group, whose compression
//! loss stays under a threshold; the largest token block whose keys vary little enough inside it. A group must also add
//! next to nothing to what single channels lose, of keys as of values (docs/log.md: without that, needles are lost). The rotation comes
//! from sums that grew a token at a time ([`Sums`]); losses are measured on a bounded, evenly spread sample of the
//! segment's tokens in that rotation, so that closing a segment takes one eigendecomposition and no further pass over
//! its tokens but the one that packs them.

use super::Packed;
use crate::rotation::{Rotation, transpose};
use half::f16;
use mosaickv_kernels::packed::{BLOCKS, PackedShape};
use mosaickv_kernels::rotate::{gram, multiply};

/// Shares of the elements that may be kept, fewest first: rates of 87.5, 75 and 62.5 % (s. 4).
pub(super) const KEPT: [f32; 3] = [0.125, 0.25, 0.375];

/// Groups of channels, largest first (s. 4).
pub(super) const GROUPS: [usize; 3] = [4, 2, 1];

/// Tokens on which losses are measured.
const SAMPLE: usize = 128;

/// What a segment's tokens are packed with, beside its rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Strategy {
    /// Stored channels, elements kept of each vector, and their groups.
    pub(crate) shape: PackedShape,
    /// Tokens of a token block.
    pub(crate) block: usize,
}

/// Sums over the tokens of a segment, from which its rotation and its block size follow.
#[derive(Clone, Debug)]
pub(crate) struct Sums {
    d: usize,
    tokens: usize,
    /// K^T K and V^T V, `[D, D]`.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Sum of the keys, `[D]`.
    sum: Vec<f64>,
    /// Of each size in [`BLOCKS`]: the squared lengths of the block means, once for each token.
    between: [f64; 3],
}

impl Sums {
    /// Over no tokens.
    pub(crate) fn new(d: usize) -> Sums {
        let square = || vec![0.0; d * d];
        Sums { d, tokens: 0, keys: square(), values: square(), sum: vec![0.0; d], between: [0.0; 3] }
    }

    /// Adds keys and values `[T, D]`, `T` a multiple of 16: whole blocks of every size.
    pub(crate) fn add(&mut self, keys: &[f32], values: &[f32]) {
        let d = self.d;
        self.tokens += keys.len() / d;
        for (sums, x) in [(&mut self.keys, keys), (&mut self.values, values)] {
            sums.iter_mut().zip(gram(x, d)).for_each(|(sum, x)| *sum += x);
        }
        for key in keys.chunks_exact(d) {
            self.sum.iter_mut().zip(key).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let mut sums = vec![0.0; 4 * d];
        for keys in keys.chunks_exact(16 * d) {
            // Four blocks of 4; then two of 8 and one of 16 from their sums.
            for (sum, keys) in sums.chunks_exact_mut(d).zip(keys.chunks_exact(4 * d)) {
                sum.fill(0.0);
                keys.chunks_exact(d).for_each(|key| add_to(sum, key));
            }
            for (i, between) in self.between.iter_mut().enumerate() {
                let (count, size) = (4 >> i, BLOCKS[i] as f64);
                *between += f64::from(sums[..count * d].iter().map(|x| x * x).sum::<f32>()) / size;
                for pair in 0..count / 2 {
                    let (left, right) = sums.split_at_mut((2 * pair + 1) * d);
                    add_to(&mut left[2 * pair * d..], &right[..d]);
                    sums.copy_within(2 * pair * d..(2 * pair + 1) * d, pair * d);
                }
            }
        }
    }

    /// Of a size in [`BLOCKS`]: how much of the keys' variance lies within blocks, 0 to 1.
    fn spread(&self, size: usize) -> f64 {
        let energy = self.trace(&self.keys);
        let variance = f64::from(self.scales()[0]) * self.tokens as f64;
        if variance > 1e-9 * energy { (energy - self.between[size]).max(0.0) / variance } else { 0.0 }
    }

    /// What a token's losses are relative to: the variance of keys, as a shift that all keys share does not change what is
    /// attended to, and the energy of values.
    pub(crate) fn scales(&self) -> [f32; 2] {
        let tokens = self.tokens.max(1) as f64;
        let of_mean = self.sum.iter().map(|x| x * x).sum::<f64>() / tokens;
        let keys = (self.trace(&self.keys) - of_mean) / tokens;
        [keys as f32, (self.trace(&self.values) / tokens) as f32]
    }

    fn trace(&self, gram: &[f32]) -> f64 {
        (0..self.d).map(|i| f64::from(gram[i * self.d + i])).sum()
    }

    /// `D`
    pub(crate) fn head_dim(&self) -> usize {
        self.d
    }

    /// Bytes allocated for heads of `d` channels.
    pub(crate) fn bytes(d: usize) -> usize {
        2 * d * d * size_of::<f32>() + d * size_of::<f64>()
    }
}

fn add_to(sum: &mut [f32], x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}

/// What was chosen, and the loss that the sample had with it.
pub(crate) struct Chosen {
    pub(crate) strategy: Strategy,
    pub(crate) rotation: Rotation,
    /// Mean of the energy of keys and of values that is not stored, relative to [`Sums::scales`].
    pub(crate) loss: f32,
}

/// The strategy of a segment with these sums, of keys and values `[T, D]`.
pub(crate) fn choose(settings: Packed, sums: &Sums, keys: &[f32], values: &[f32]) -> Chosen {
    let d = sums.d;
    let shape = |kept: f32, group: usize| PackedShape::with_rate(d, 1.0 - kept, group);
    let single = |kept: f32| shape(kept, 1).expect("settings are checked");
    let rates = settings.rates();
    let channels = single(rates[0]).channels();
    let rotation = Rotation::from_grams(settings.rotation, (&sums.keys, &sums.values), (d, channels));
    let [of_keys, of_values] = sums.scales();
    let sides = [
        Side::new(keys, (&rotation.key_matrix(), d), of_keys),
        Side::new(values, (&rotation.value_matrix(d), d), of_values),
    ];
    let losses = |kept: usize, [keys, values]: [&Grouping; 2]| {
        [sides[0].loss(kept, keys), sides[1].loss(kept, values)]
    };
    let mean = |[keys, values]: [f32; 2]| (keys + values) / 2.0;
    let ungrouped = Grouping::single(channels);
    let fits = |rate: &&f32| mean(losses(single(**rate).kept(), [&ungrouped; 2])) <= settings.loss;
    let rate = *rates.iter().find(fits).unwrap_or(&rates[rates.len() - 1]);
    let alone = losses(single(rate).kept(), [&ungrouped; 2]);
    // A small head may keep fewer elements than a large group has.
    let shapes: Vec<PackedShape> =
        settings.groups().iter().filter_map(|&group| shape(rate, group).ok()).collect();
    let block = settings.block.unwrap_or_else(|| {
        let fits = |size: &usize| sums.spread(*size) <= f64::from(settings.spread);
        BLOCKS[(0..BLOCKS.len()).rev().find(fits).unwrap_or(0)]
    });
    for (i, &shape) in shapes.iter().enumerate() {
        let group = shape.group();
        let groupings = sides.each_ref().map(|side| side.grouping(shape.kept(), group));
        let here = losses(shape.kept(), [&groupings[0], &groupings[1]]);
        // The mean alone would let keys lose what values hardly notice.
        let adds = (0..2).map(|side| here[side] - alone[side]).fold(0.0, f32::max);
        let fits = mean(here) <= settings.loss && adds <= settings.grouping;
        if fits || i + 1 == shapes.len() {
            let rotation = rotation.reordered((&groupings[0].order, &groupings[1].order), d);
            return Chosen { strategy: Strategy { shape, block }, rotation, loss: mean(here) };
        }
    }
    unreachable!("settings are checked: a shape fits, and the last is taken whatever its loss")
}

/// `lost / scale`, at least 0; no loss where there is nothing.
pub(crate) fn relative(lost: f32, scale: f32) -> f32 {
    lost.max(0.0) / scale.max(f32::MIN_POSITIVE)
}

/// Channels in the order in which they are stored, in groups of `size`.
struct Grouping {
    order: Vec<usize>,
    size: usize,
}

impl Grouping {
    fn single(channels: usize) -> Grouping {
        Grouping { order: (0..channels).collect(), size: 1 }
    }
}

/// The sample of keys, or of values, in the segment's rotation.
struct Side {
    channels: usize,
    /// `[n, C]`
    rotated: Vec<f32>,
    /// Of the whole vectors, before truncation.
    energy: f64,
    /// What the loss is relative to.
    scale: f64,
}

impl Side {
    /// Of rows `[T, D]`, and the rotation `[D, C]`.
    fn new(rows: &[f32], (matrix, d): (&[f32], usize), scale: f32) -> Side {
        let step = (rows.len() / d).div_ceil(SAMPLE).max(1);
        let sample: Vec<f32> = rows.chunks_exact(d).step_by(step).flatten().copied().collect();
        let energy = sample.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let scale = f64::from(scale) * (sample.len() / d) as f64;
        Side { channels: matrix.len() / d, rotated: multiply(&sample, matrix, d), energy, scale }
    }

    /// The energy that is not stored if each vector keeps its `kept` elements in the best groups, to the scale.
    fn loss(&self, kept: usize, grouping: &Grouping) -> f32 {
        let groups = kept / grouping.size;
        let mut energies = vec![0.0f32; self.channels / grouping.size];
        let mut stored = 0.0;
        for row in self.rotated.chunks_exact(self.channels) {
            for (energy, group) in energies.iter_mut().zip(grouping.order.chunks_exact(grouping.size)) {
                *energy = group.iter().map(|&c| row[c] * row[c]).sum();
            }
            if groups < energies.len() {
                energies.select_nth_unstable_by(groups, |a, b| b.total_cmp(a));
            }
            stored += f64::from(energies[..groups.min(energies.len())].iter().sum::<f32>());
        }
        relative((self.energy - stored) as f32, self.scale as f32)
    }

    /// Channels that the sample's vectors select together become neighbours: the pair that is most often among the
    /// `kept` largest elements of one vector first, then pairs of pairs.
    fn grouping(&self, kept: usize, size: usize) -> Grouping {
        let mut units: Vec<Vec<usize>> = (0..self.channels).map(|c| vec![c]).collect();
        if size == 1 {
            return Grouping::single(self.channels);
        }
        let together = self.together(kept);
        while units[0].len() < size {
            units = paired(units, |a, b| {
                a.iter()
                    .flat_map(|&i| b.iter().map(move |&j| (i, j)))
                    .map(|(i, j)| together[i * self.channels + j])
                    .sum()
            });
        }
        Grouping { order: units.concat(), size }
    }

    /// `[C, C]`: in how many vectors both channels are among the `kept` largest.
    fn together(&self, kept: usize) -> Vec<u32> {
        let c = self.channels;
        let mut counts = vec![0; c * c];
        let mut order: Vec<usize> = (0..c).collect();
        for row in self.rotated.chunks_exact(c) {
            order.select_nth_unstable_by(kept.min(c) - 1, |&a, &b| {
                row[b].abs().total_cmp(&row[a].abs()).then(a.cmp(&b))
            });
            for &i in &order[..kept.min(c)] {
                order[..kept.min(c)].iter().for_each(|&j| counts[i * c + j] += 1);
            }
        }
        counts
    }
}

/// Joins units two by two, those of the highest `affinity` first; each pair keeps the place of its first unit, so that
/// channels of much energy stay in front.
fn paired(units: Vec<Vec<usize>>, affinity: impl Fn(&[usize], &[usize]) -> u32) -> Vec<Vec<usize>> {
    let n = units.len();
    let mut pairs: Vec<(u32, usize, usize)> = (0..n)
        .flat_map(|i| (i + 1..n).map(move |j| (i, j)))
        .map(|(i, j)| (affinity(&units[i], &units[j]), i, j))
        .collect();
    pairs.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let mut partner = vec![None; n];
    for (_, i, j) in pairs {
        if partner[i].is_none() && partner[j].is_none() {
            (partner[i], partner[j]) = (Some(j), Some(i));
        }
    }
    (0..n)
        .filter_map(|i| partner[i].filter(|&j| i < j).map(|j| [units[i].as_slice(), &units[j]].concat()))
        .collect()
}

impl Rotation {
    /// The same with its key and value channels in other orders.
    fn reordered(&self, (keys, values): (&[usize], &[usize]), d: usize) -> Rotation {
        let take = |rows: &[f16], order: &[usize]| -> Box<[f16]> {
            order.iter().flat_map(|&c| rows[c * d..(c + 1) * d].iter().copied()).collect()
        };
        // Keys are stored transposed.
        let by_channel = transpose(&self.keys, self.keys.len() / d);
        Rotation { keys: transpose(&take(&by_channel, keys), d), outputs: take(&self.outputs, values) }
    }
}
