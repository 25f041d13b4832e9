//! What does the host keep of a pass that the device computed?

use crate::layered::Work;
use crate::{KvCache, KvError, Layer};
use half::f16;
use half::slice::HalfFloatSliceExt;
use mosaickv_kernels::Pool;
use std::f32::consts::LN_2;

/// What a layer computed for the next tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Taken<'a> {
    /// Keys, after RoPE, and values `[T, 2, G, D]`.
    pub rows: &'a [f16],
    /// Queries `[T, H, D]`, after RoPE and not yet scaled, if the layer [asks](KvCache::asks) for them.
    pub queries: &'a [f16],
    /// Logarithms to base 2 of what each query's weights summed up to, `[H]`: of one token in a compressed layer that asks.
    pub log_sums: &'a [f32],
}

impl KvCache {
    /// Seals what the next token's [`append`](KvCache::append) would seal.
    pub(super) fn make_room(&mut self, threads: &Pool) {
        for layer in &mut self.layers {
            if let Layer::Layered(heads) = layer
                && heads[0].is_full()
            {
                threads.for_each(heads, |_, head| head.make_room());
            }
        }
    }

    /// Stores keys and values of further tokens in a layer, and remembers of their queries what is remembered: what
    /// [`append`](KvCache::append) and [`attend`](KvCache::attend) do, when a device has attended.
    pub fn take(&mut self, threads: &Pool, layer: usize, taken: Taken) -> Result<(), KvError> {
        let row = self.shape.kv_heads * self.shape.head_dim;
        let of_tokens = |first: usize| -> Vec<f32> {
            taken.rows.chunks_exact(2 * row).flat_map(|token| &token[first..][..row]).map(|x| x.to_f32()).collect()
        };
        self.append(threads, layer, &of_tokens(0), &of_tokens(row))?;
        let (of_head, group) = (self.shape.group() * self.shape.head_dim, self.shape.group());
        let scale = (self.shape.head_dim as f32).sqrt().recip();
        match &mut self.layers[layer] {
            Layer::Layered(heads) if heads[0].is_asked() => {
                let queries = wide(taken.queries);
                let rows = queries.chunks_exact(of_head).zip(taken.log_sums.chunks_exact(group));
                let mut work = Work::default();
                for (head, (queries, log_sums)) in heads.iter_mut().zip(rows) {
                    work.turn(self.isa, head, queries, scale);
                    head.ask(&work, |r| log_sums[r] * LN_2);
                }
            }
            Layer::Exact(_) if self.samples.is_some() || self.recent.is_some() => {
                self.observe(layer, &wide(taken.queries));
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether [`take`](KvCache::take) looks at the queries of the layer's next token.
    pub fn asks(&self, layer: usize) -> bool {
        match &self.layers[layer] {
            Layer::Layered(heads) => heads[0].asks_next(),
            _ => self.samples.is_some() || self.recent.is_some(),
        }
    }
}

fn wide(x: &[f16]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    x.convert_to_f32_slice(&mut out);
    out
}
