//! How much would an error of each token matter? Attention of sampled queries of the prompt tells.
//!
//! For a query that gives token `j` the weight `a`, an error of its value moves the output by `a` times the error, and
//! an error of its score by `a |W_o (v_j - o)|` times that. So values weigh E[a^2], keys E[a^2 |W_o (v_j - o)|^2]. Only queries
//! at a distance count: the newest tokens are attended to by their neighbours, which says nothing of later.

use mosaickv_kernels::rotate::multiply;

/// Queries this near to a token say nothing about it.
const NEAR: usize = 64;

/// Query rows that are worked on together.
const ROWS: usize = 48;

/// Sampled positions of a layer at most.
const MOST: usize = 256;

/// Queries of a layer at evenly spaced positions, which depend on the number of tokens alone: every 8th, or with more
/// than 256 of them every 16th, and so on.
#[derive(Clone, Debug)]
pub(crate) struct Samples {
    stride: usize,
    /// Tokens seen.
    tokens: usize,
    /// `[N, H, D]`
    rows: Vec<f32>,
}

impl Default for Samples {
    fn default() -> Samples {
        Samples { stride: 8, tokens: 0, rows: Vec::new() }
    }
}

impl Samples {
    /// Adds the queries of further tokens, in rows of `row` numbers.
    pub(crate) fn push(&mut self, queries: &[f32], row: usize) {
        for query in queries.chunks_exact(row) {
            self.tokens += 1;
            if !self.tokens.is_multiple_of(self.stride) {
                continue;
            }
            if self.rows.len() == MOST * row {
                // Those at odd multiples of the stride go.
                let stay: Vec<f32> =
                    self.rows.chunks_exact(row).skip(1).step_by(2).flatten().copied().collect();
                self.rows = stay;
                self.stride *= 2;
            }
            if self.tokens.is_multiple_of(self.stride) {
                self.rows.extend_from_slice(query);
            }
        }
    }

    /// Positions of the samples, and those of one KV head's group, `[N, R * D]` of each row's `span`, times `scale`.
    pub(crate) fn of_group(
        &self,
        row: usize,
        span: std::ops::Range<usize>,
        scale: f32,
    ) -> (Vec<usize>, Vec<f32>) {
        let positions = (1..=self.rows.len() / row).map(|i| i * self.stride - 1).collect();
        let rows = self.rows.chunks_exact(row).flat_map(|query| &query[span.clone()]);
        (positions, rows.map(|x| x * scale).collect())
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        self.rows.capacity() * size_of::<f32>()
    }
}

/// What errors of each token weigh.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    /// Of keys, `[T]`.
    pub(crate) keys: Vec<f32>,
    /// Of values, `[T]`.
    pub(crate) values: Vec<f32>,
}

/// From scaled queries `[N, R, D]` at `positions` `[N]`, keys `[T, D]`, and values `[T, D]` in channels whose distances
/// are those of outputs. A token that no query judges has the weights 0.
pub(crate) fn weigh(
    (positions, queries): (&[usize], &[f32]),
    keys: &[f32],
    values: &[f32],
    d: usize,
) -> Weights {
    let tokens = keys.len() / d;
    let mut weights = Weights { keys: vec![0.0; tokens], values: vec![0.0; tokens] };
    if positions.is_empty() {
        return weights;
    }
    let group = queries.len() / d / positions.len();
    let transposed: Vec<f32> = (0..keys.len()).map(|i| keys[i % tokens * d + i / tokens]).collect();
    let norms: Vec<f32> = values.chunks_exact(d).map(|v| v.iter().map(|x| x * x).sum()).collect();
    for (block, rows) in queries.chunks(ROWS / group.min(ROWS) * group * d).enumerate() {
        let first = block * (ROWS / group.min(ROWS));
        let count = rows.len() / d;
        let mut a = multiply(rows, &transposed, d);
        for (r, row) in a.chunks_exact_mut(tokens).enumerate() {
            softmax(row, positions[first + r / group] + 1);
        }
        let outputs = multiply(&a, values, tokens);
        let squares: Vec<f32> = outputs.chunks_exact(d).map(|o| o.iter().map(|x| x * x).sum()).collect();
        // [T, rows], of the weights that count.
        let mut squared = vec![0.0; tokens * count];
        for (r, row) in a.chunks_exact(tokens).enumerate() {
            let judged = (positions[first + r / group] + 1).saturating_sub(NEAR);
            row[..judged].iter().enumerate().for_each(|(t, a)| squared[t * count + r] = a * a);
        }
        let mixed = multiply(&squared, &outputs, count);
        for (t, squared) in squared.chunks_exact(count).enumerate() {
            let (sum, far) =
                squared.iter().zip(&squares).fold((0.0, 0.0), |(sum, far), (a, o)| (sum + a, far + a * o));
            let cross: f32 = mixed[t * d..][..d].iter().zip(&values[t * d..][..d]).map(|(m, v)| m * v).sum();
            weights.values[t] += sum;
            weights.keys[t] += (sum * norms[t] - 2.0 * cross + far).max(0.0);
        }
    }
    // Each token's mean over the queries that judge it.
    for t in 0..tokens {
        let judges = positions.len() - positions.partition_point(|&p| p < t + NEAR);
        let count = (judges * group).max(1) as f32;
        weights.keys[t] /= count;
        weights.values[t] /= count;
    }
    weights
}

/// Of the first `seen` scores; the others become 0.
fn softmax(row: &mut [f32], seen: usize) {
    let (seen, unseen) = row.split_at_mut(seen.min(row.len()));
    unseen.fill(0.0);
    let max = seen.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let mut sum = 0.0;
    for x in seen.iter_mut() {
        *x = (*x - max).exp();
        sum += *x;
    }
    seen.iter_mut().for_each(|x| *x /= sum);
}
