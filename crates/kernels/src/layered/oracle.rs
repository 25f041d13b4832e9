//! What are the right scores of layered keys? In f64, of the queries as they are rounded, for tests and benchmarks.
//!
//! Nobody optimizes this file.

use super::{GROUP, Pages, Queries, SKETCH, TILE_TOKENS, TILES};

/// Scores `[n]` of row `r` over the `n` tokens of page `index`, its offset included: the levels of codes times the query as it is
/// [rounded](Queries::rounded), and what escapes add to levels times the query as it was given.
pub fn scores(queries: &Queries, r: usize, pages: &Pages, index: usize) -> Vec<f64> {
    let d = pages.head_dim();
    let exact = queries.exact(r);
    let rounded = queries.rounded(r, pages.pages[index].keys);
    let offset = f64::from(queries.scale_and_offset(r).1);
    let (keys, _) = pages.decode(index);
    let dot = |key: &[f32]| rounded.iter().zip(key).map(|(q, &k)| q * f64::from(k)).sum::<f64>();
    let mut scores: Vec<f64> = keys.chunks_exact(d).map(|key| dot(key) + offset).collect();
    // A decoded key has its escapes in it, which have met the rounded query so far.
    for escape in pages.escapes_of(index)[0] {
        let c = usize::from(escape.channel);
        scores[usize::from(escape.token)] += (f64::from(exact[c]) - rounded[c]) * escape.rest.to_f64();
    }
    scores
}

/// What [`sketch`](super::sketch) should give for row `r`, shifted by `shift`, and the tiles of page `index`.
pub fn sketch(queries: &Queries, (r, shift): (usize, f64), pages: &Pages, index: usize) -> [f64; TILES] {
    let d = pages.head_dim();
    let (mut keys, _) = pages.decode(index);
    for escape in pages.escapes_of(index)[0] {
        keys[usize::from(escape.token) * d + usize::from(escape.channel)] -= escape.rest.to_f32();
    }
    let rounded = queries.rounded(r, pages.pages[index].keys);
    let offset = f64::from(queries.scale_and_offset(r).1) - shift;
    let mut weights = [0.0; TILES];
    for (token, key) in keys.chunks_exact(d).enumerate() {
        let products = rounded.iter().zip(key).take(SKETCH * GROUP).map(|(q, &k)| q * f64::from(k));
        weights[token / TILE_TOKENS] += (products.sum::<f64>() + offset).exp();
    }
    weights
}
