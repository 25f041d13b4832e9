//! Where is a token? Rotary position embedding with every context extension the supported models use.
//!
//! Su et al., RoFormer, 2021, arXiv:2104.09864: the pair `i` of a head is turned by `position * frequency[i]`,
//! `frequency[i] = theta^(-2i / dims)`. Extensions only change the frequencies, and YaRN the length of the result.
//! Frequencies and angles are f64, so that position 100,000 is as exact as position 1.
//! This file knows no file format: `config` fills in [`RopeConfig`].

/// Which two elements of a head make a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// `(0, 1), (2, 3), ..`: GGUF files of the llama family, whose query and key rows were permuted for it.
    Interleaved,
    /// `(0, dims/2), (1, dims/2 + 1), ..`: Hugging Face checkpoints, and Qwen in either format.
    Halves,
}

/// How the trained context is stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor` (Chen et al., 2023, arXiv:2306.15595).
    Linear {
        /// Stretch, above 0.
        factor: f64,
    },
    /// The base raised so that only low frequencies stretch ("NTK-aware", "dynamic" in Hugging Face).
    ///
    /// Hugging Face recomputes it as the sequence grows; keys in a cache cannot be turned again, so here it is fixed
    /// for sequences of `length` tokens. At `length <= original_context` nothing changes, which is what loading sets.
    Ntk {
        /// Stretch, above 0.
        factor: f64,
        /// Trained context in tokens.
        original_context: usize,
        /// The longest sequence to be served, in tokens.
        length: usize,
    },
    /// NTK by parts with longer cosines and sines (Peng et al., YaRN, 2023, arXiv:2309.00071, section 3).
    Yarn {
        /// Stretch, at least 1.
        factor: f64,
        /// Trained context in tokens.
        original_context: usize,
        /// Pairs with more turns than this within the trained context are left alone (32).
        beta_fast: f64,
        /// Pairs with fewer turns than this are stretched in full (1).
        beta_slow: f64,
        /// What cosines and sines are multiplied with (`0.1 ln factor + 1`).
        attention_factor: f64,
    },
    /// By wavelength, in three bands (Llama 3.1).
    Llama3 {
        /// Stretch of the long waves, above 0.
        factor: f64,
        /// Waves longer than `original_context / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Waves shorter than `original_context / high_freq_factor` are left alone.
        high_freq_factor: f64,
        /// Trained context in tokens.
        original_context: usize,
    },
}

impl RopeScaling {
    /// What YaRN multiplies cosines and sines with unless the file says otherwise: `0.1 * weight * ln factor + 1`.
    pub fn yarn_attention_factor(factor: f64, weight: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
    }
}

/// Everything that determines the rotation.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Which elements make a pair.
    pub style: RopeStyle,
    /// Base of the frequencies, above 1.
    pub theta: f64,
    /// Leading elements of each head that are turned; even, at least 4, at most head_dim.
    pub dims: usize,
    /// Context extension.
    pub scaling: RopeScaling,
    /// Divisors of the `dims / 2` frequencies (the `rope_freqs.weight` tensor of GGUF files, finite and above 0).
    pub divisors: Option<Vec<f32>>,
}

/// Precomputed frequencies.
#[derive(Debug, Clone)]
pub struct Rope {
    style: RopeStyle,
    frequencies: Vec<f64>, // [dims / 2], radians per token
    length: f64,           // of the cosine-sine vector, 1 without YaRN
}

/// The cosines and sines of one position: computed once a token, used by every layer and head.
#[derive(Debug, Clone, Default)]
pub struct Rotation {
    cos: Vec<f32>, // [dims / 2]
    sin: Vec<f32>, // [dims / 2]
}

impl Rope {
    /// # Panics
    /// If `dims` is odd or below 4, or `divisors` has another length than `dims / 2`.
    pub fn new(config: &RopeConfig) -> Rope {
        let dims = config.dims;
        assert!(
            dims >= 4 && dims.is_multiple_of(2),
            "rope over {dims} elements of a head, wanted an even number >= 4"
        );
        let (mut frequencies, length) = frequencies(config);
        if let Some(divisors) = &config.divisors {
            assert_eq!(divisors.len(), dims / 2, "one rope divisor a pair");
            for (frequency, divisor) in frequencies.iter_mut().zip(divisors) {
                *frequency /= f64::from(*divisor);
            }
        }
        Rope { style: config.style, frequencies, length }
    }

    /// Radians per token of each pair, `[dims / 2]`.
    pub fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }

    /// What cosines and sines are multiplied with: 1 without YaRN.
    pub fn attention_factor(&self) -> f64 {
        self.length
    }

    /// The cosines and sines of `position`.
    pub fn rotation(&self, position: usize) -> Rotation {
        let mut rotation = Rotation::default();
        self.rotation_into(position, &mut rotation);
        rotation
    }

    /// [`Rope::rotation`] into memory that is there already.
    pub fn rotation_into(&self, position: usize, out: &mut Rotation) {
        out.cos.clear();
        out.sin.clear();
        for frequency in &self.frequencies {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            out.cos.push((cos * self.length) as f32);
            out.sin.push((sin * self.length) as f32);
        }
    }

    /// Turns `heads`, `[n, D]`, each of `head_dim` elements, to `rotation`'s position.
    pub fn turn(&self, rotation: &Rotation, heads: &mut [f32], head_dim: usize) {
        let half = self.frequencies.len();
        assert!(
            heads.len().is_multiple_of(head_dim) && 2 * half <= head_dim,
            "{} floats, D = {head_dim}",
            heads.len()
        );
        match self.style {
            RopeStyle::Interleaved => {
                for head in heads.chunks_exact_mut(head_dim) {
                    let pairs = head.chunks_exact_mut(2).zip(&rotation.cos).zip(&rotation.sin);
                    for ((pair, cos), sin) in pairs {
                        let (x, y) = (pair[0], pair[1]);
                        pair[0] = x * cos - y * sin;
                        pair[1] = x * sin + y * cos;
                    }
                }
            }
            RopeStyle::Halves => {
                for head in heads.chunks_exact_mut(head_dim) {
                    let (first, rest) = head.split_at_mut(half);
                    let pairs = first.iter_mut().zip(rest).zip(rotation.cos.iter().zip(&rotation.sin));
                    for ((a, b), (cos, sin)) in pairs {
                        let (x, y) = (*a, *b);
                        *a = x * cos - y * sin;
                        *b = x * sin + y * cos;
                    }
                }
            }
        }
    }

    /// Turns `heads`, `[n, D]`, to `position`; [`Rope::turn`] with a shared [`Rotation`] is cheaper in a loop.
    pub fn apply(&self, position: usize, heads: &mut [f32], head_dim: usize) {
        self.turn(&self.rotation(position), heads, head_dim);
    }
}

/// Frequencies before the divisors, and the length of the cosine-sine vector.
fn frequencies(config: &RopeConfig) -> (Vec<f64>, f64) {
    let dims = config.dims as f64;
    let plain = |theta: f64| (0..config.dims / 2).map(move |i| theta.powf(-2.0 * i as f64 / dims));
    match config.scaling {
        RopeScaling::None => (plain(config.theta).collect(), 1.0),
        RopeScaling::Linear { factor } => (plain(config.theta).map(|f| f / factor).collect(), 1.0),
        RopeScaling::Ntk { factor, original_context, length } => {
            let stretch =
                factor * length.max(original_context) as f64 / original_context as f64 - (factor - 1.0);
            (plain(config.theta * stretch.powf(dims / (dims - 2.0))).collect(), 1.0)
        }
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
            // The pair that makes `turns` turns within the trained context.
            let pair = |turns: f64| {
                dims * (original_context as f64 / (turns * std::f64::consts::TAU)).ln()
                    / (2.0 * config.theta.ln())
            };
            let low = pair(beta_fast).floor().max(0.0);
            let high = pair(beta_slow).ceil().min(dims - 1.0);
            let width = if high == low { 0.001 } else { high - low };
            let blend = |(i, f): (usize, f64)| {
                let stretched = ((i as f64 - low) / width).clamp(0.0, 1.0);
                f / factor * stretched + f * (1.0 - stretched)
            };
            (plain(config.theta).enumerate().map(blend).collect(), attention_factor)
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let original = original_context as f64;
            let scale = |f: f64| {
                let wave = std::f64::consts::TAU / f;
                if wave < original / high_freq_factor {
                    f
                } else if wave > original / low_freq_factor {
                    f / factor
                } else {
                    let kept = (original / wave - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - kept) * f / factor + kept * f
                }
            };
            (plain(config.theta).map(scale).collect(), 1.0)
        }
    }
}
