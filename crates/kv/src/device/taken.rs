//! What does the host keep of a pass that the device computed?

use crate::baselines::WINDOW;
use crate::layered::Work;
use crate::{KvCache, KvError, KvShape, Layer};
use half::f16;
use half::slice::HalfFloatSliceExt;
use mosaickv_kernels::{Isa, Pool};
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
        let (mut packed, mut layered) = (vec![], vec![]);
        for layer in &mut self.layers {
            match layer {
                Layer::Packed(heads) if heads[0].is_full() => packed.extend(heads),
                Layer::Layered(heads) if heads[0].is_full() => layered.extend(heads),
                _ => {}
            }
        }
        threads.for_each(&mut packed, |_, head| head.make_room());
        threads.for_each(&mut layered, |_, head| head.make_room());
    }

    /// Stores keys and values of further tokens of a prompt in a layer, and remembers of their queries what is remembered: what
    /// [`append`](KvCache::append) and [`attend`](KvCache::attend) do, when a device has attended.
    pub fn take(&mut self, threads: &Pool, layer: usize, taken: Taken) -> Result<(), KvError> {
        let (keys, values) = taken.halves(self.shape);
        self.append(threads, layer, &keys, &values)?;
        let row = self.shape.heads * self.shape.head_dim;
        let count = taken.queries.len() / row;
        if let Some(recent) = &mut self.recent {
            recent[layer].push(&wide(&taken.queries[count.saturating_sub(WINDOW) * row..]), row);
        }
        if let Some(samples) = &mut self.samples {
            // Few are.
            let of_token = |t: usize| taken.queries[t * row..][..row].iter().map(|x| x.to_f32());
            samples[layer].push_some(count, row, |t, rows| rows.extend(of_token(t)));
        }
        Ok(())
    }

    /// The same of one token after a prompt in all layers. Either all are stored or, on an error, none.
    pub fn take_step<'a>(
        &mut self,
        threads: &Pool,
        of_layer: impl Fn(usize) -> Taken<'a> + Sync,
    ) -> Result<(), KvError> {
        let (shape, isa) = (self.shape, self.isa);
        let is_finite = |layer: &usize| of_layer(*layer).rows.iter().all(|x| x.is_finite());
        if let Some(layer) = (0..shape.layers).find(|layer| !is_finite(layer)) {
            return Err(KvError::NotFinite { layer });
        }
        for layer in 0..shape.layers {
            if matches!(self.layers[layer], Layer::Exact(_)) && self.asks(layer) {
                self.observe(layer, &wide(of_layer(layer).queries));
            }
        }
        threads.for_each(&mut self.layers, |l, layer| layer.take(shape, isa, of_layer(l)));
        Ok(())
    }

    /// Whether the queries of the layer's next token are looked at.
    pub fn asks(&self, layer: usize) -> bool {
        match &self.layers[layer] {
            Layer::Layered(heads) => heads[0].asks_next(),
            Layer::Exact(_) => self.samples.is_some() || self.recent.is_some(),
            Layer::Packed(_) | Layer::Baseline(_) => false,
        }
    }
}

impl Taken<'_> {
    /// Keys and values `[T, G, D]`.
    fn halves(&self, shape: KvShape) -> (Vec<f32>, Vec<f32>) {
        let row = shape.kv_heads * shape.head_dim;
        let half = |first: usize| -> Vec<f32> {
            let mut out = vec![0.0; self.rows.len() / 2];
            for (out, token) in out.chunks_exact_mut(row).zip(self.rows.chunks_exact(2 * row)) {
                token[first..][..row].convert_to_f32_slice(out);
            }
            out
        };
        (half(0), half(row))
    }
}

impl Layer {
    /// Adds a token, and remembers its queries if they are asked for.
    fn take(&mut self, shape: KvShape, isa: Isa, taken: Taken) {
        let (d, of_head) = (shape.head_dim, shape.group() * shape.head_dim);
        let (keys, values) = taken.halves(shape);
        match self {
            Layer::Exact(heads) => {
                heads
                    .iter_mut()
                    .enumerate()
                    .for_each(|(g, head)| head.append(&keys, &values, (g * d, keys.len())));
            }
            Layer::Packed(heads) => {
                let rows = keys.chunks_exact(d).zip(values.chunks_exact(d));
                heads.iter_mut().zip(rows).for_each(|(head, (key, value))| head.append(key, value));
            }
            Layer::Layered(heads) => {
                let rows = keys.chunks_exact(d).zip(values.chunks_exact(d));
                heads.iter_mut().zip(rows).for_each(|(head, (key, value))| head.append(key, value));
                if heads[0].is_asked() {
                    let (queries, scale) = (wide(taken.queries), (d as f32).sqrt().recip());
                    let rows = queries.chunks_exact(of_head).zip(taken.log_sums.chunks_exact(shape.group()));
                    let mut work = Work::default();
                    for (head, (queries, log_sums)) in heads.iter_mut().zip(rows) {
                        work.turn(isa, head, queries, scale);
                        head.ask(&work, |r| log_sums[r] * LN_2);
                    }
                }
            }
            Layer::Baseline(_) => unreachable!("formats were checked"),
        }
    }
}

fn wide(x: &[f16]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    x.convert_to_f32_slice(&mut out);
    out
}
