//! What does the host keep of a pass that the device computed?

use crate::baselines::WINDOW;
use crate::exact::ExactHead;
use crate::layered::{LayeredHead, Work};
use crate::packed::PackedHead;
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
    /// Seals what the next token's [`append`](KvCache::append) would seal, in each of some caches.
    pub(super) fn make_room<'a>(caches: impl Iterator<Item = &'a mut KvCache>, threads: &Pool) {
        let (mut packed, mut layered) = (vec![], vec![]);
        for layer in caches.flat_map(|cache| &mut cache.layers) {
            match layer {
                Layer::Packed(heads) => packed.extend(heads.iter_mut().filter(|head| head.is_full())),
                Layer::Layered(heads) => layered.extend(heads.iter_mut().filter(|head| head.is_full())),
                _ => {}
            }
        }
        threads.for_each(&mut packed, |_, head| head.make_room());
        threads.for_each(&mut layered, |_, head| head.make_room());
    }

    /// Stores keys and values of further tokens of a prompt in a layer, and remembers of their queries what is remembered: what
    /// [`append`](KvCache::append) and [`attend`](KvCache::attend) do, when a device has attended.
    pub fn take(&mut self, threads: &Pool, layer: usize, taken: Taken) -> Result<(), KvError> {
        let Layer::Exact(heads) = &mut self.layers[layer] else {
            panic!("layer {layer} is compressed: it takes steps, not prompts")
        };
        // Not short of all of them, so that many are looked at together.
        if taken.rows.iter().fold(false, |any, x| any | !x.is_finite()) {
            return Err(KvError::NotFinite { layer });
        }
        let (d, row) = (self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim);
        threads.for_each(heads, |g, head| head.append_halves(taken.rows, (g * d, row)));
        let row = self.shape.heads * self.shape.head_dim;
        let count = taken.queries.len() / row;
        if let Some(recent) = &mut self.recent {
            recent[layer].push(&wide(&taken.queries[count.saturating_sub(WINDOW) * row..]), row);
        }
        if let Some(samples) = &mut self.samples {
            // Few are.
            samples[layer].push_some(count, row, |t, rows| {
                let start = rows.len();
                rows.resize(start + row, 0.0);
                taken.queries[t * row..][..row].convert_to_f32_slice(&mut rows[start..]);
            });
        }
        Ok(())
    }

    /// The same of one token after a prompt in all layers of some caches of one shape: `of(cache, layer)`. Either all are stored or, on an error,
    /// none.
    pub fn take_step<'a>(
        caches: &mut [&mut KvCache],
        threads: &Pool,
        of: impl Fn(usize, usize) -> Taken<'a> + Sync,
    ) -> Result<(), KvError> {
        let Some(KvCache { shape, isa, .. }) = caches.first().map(|cache| &**cache) else { return Ok(()) };
        let (shape, isa) = (*shape, *isa);
        let is_finite = |layer: usize| (0..caches.len()).all(|i| all_finite(of(i, layer).rows));
        if let Some(layer) = (0..shape.layers).find(|layer| !is_finite(*layer)) {
            return Err(KvError::NotFinite { layer });
        }
        let mut tasks = vec![];
        for (i, cache) in caches.iter_mut().enumerate() {
            for layer in 0..shape.layers {
                if matches!(cache.layers[layer], Layer::Exact(_)) && cache.asks(layer) {
                    cache.observe(layer, &wide(of(i, layer).queries));
                }
            }
            for (l, layer) in cache.layers.iter_mut().enumerate() {
                let mut add = |g, head| tasks.push((i, l, g, head));
                match layer {
                    Layer::Exact(heads) => {
                        heads.iter_mut().enumerate().for_each(|(g, head)| add(g, Taker::Exact(head)));
                    }
                    Layer::Packed(heads) => {
                        heads.iter_mut().enumerate().for_each(|(g, head)| add(g, Taker::Packed(head)));
                    }
                    Layer::Layered(heads) => {
                        heads.iter_mut().enumerate().for_each(|(g, head)| add(g, Taker::Layered(head)));
                    }
                    Layer::Baseline(_) => unreachable!("formats were checked"),
                }
            }
        }
        threads.for_each(&mut tasks, |_, (i, l, g, head)| head.take((shape, isa), *g, of(*i, *l)));
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

/// A head that takes a token.
enum Taker<'a> {
    Exact(&'a mut ExactHead),
    Packed(&'a mut PackedHead),
    Layered(&'a mut LayeredHead),
}

impl Taker<'_> {
    /// Adds what `taken` has of it, head `g`, and remembers its queries if they are asked for.
    fn take(&mut self, (shape, isa): (KvShape, Isa), g: usize, taken: Taken) {
        let (d, group) = (shape.head_dim, shape.group());
        let key = wide(&taken.rows[g * d..][..d]);
        let value = wide(&taken.rows[(shape.kv_heads + g) * d..][..d]);
        match self {
            Taker::Exact(head) => head.append(&key, &value, (0, d)),
            Taker::Packed(head) => head.append(&key, &value),
            Taker::Layered(head) => {
                head.append(&key, &value);
                if head.is_asked() {
                    let (queries, scale) =
                        (wide(&taken.queries[g * group * d..][..group * d]), (d as f32).sqrt().recip());
                    let mut work = Work::default();
                    work.turn(isa, head, &queries, scale);
                    head.ask(&work, |r| taken.log_sums[g * group + r] * LN_2);
                }
            }
        }
    }
}

/// Looks at all of them: that is quicker than at each whether it is the last.
fn all_finite(x: &[f16]) -> bool {
    x.iter().fold(true, |all, x| all & x.is_finite())
}

fn wide(x: &[f16]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    x.convert_to_f32_slice(&mut out);
    out
}
