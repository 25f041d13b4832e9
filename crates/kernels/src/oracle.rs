//! What is the right answer? Attention in f64, as the formula says it, for tests and benchmarks.
//!
//! Nobody optimizes this file.

/// Attention of one query over `keys` `[T, D]` and `values` `[T, C]`, scores multiplied by `scale`; the output
/// has `C` elements. No tokens give zeros.
pub fn attend(query: &[f64], keys: &[f64], values: &[f64], scale: f64) -> Vec<f64> {
    let d = query.len();
    let tokens = keys.len() / d;
    assert_eq!(keys.len(), tokens * d, "keys are not rows of {d} elements");
    let channels = values.len().checked_div(tokens).unwrap_or(0);
    let scores: Vec<f64> =
        keys.chunks_exact(d).map(|k| scale * query.iter().zip(k).map(|(q, k)| q * k).sum::<f64>()).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; channels];
    for (w, v) in weights.iter().zip(values.chunks_exact(channels.max(1))) {
        out.iter_mut().zip(v).for_each(|(o, v)| *o += w / sum * v);
    }
    out
}
