//! Attention to f16 keys and values in the device's memory.

use super::device::{Buffer, Error, Gpu, Kernel};
use super::parameters::{ExactParameters, FinishParameters};
use super::{MOST_HEADS, MOST_ROWS, Shape, States};
use half::f16;
use std::f32::consts::LOG2_E;
use std::sync::Arc;

/// Tokens of a page.
pub const PAGE_TOKENS: usize = 64;

/// Fewer tokens are not cut into parts.
pub const LEAST_PART: usize = 256;

const ATTEND: [Kernel; 2] =
    [Kernel { name: "exact_attend_64", threads: 128 }, Kernel { name: "exact_attend_128", threads: 128 }];
const FINISH: [Kernel; 2] =
    [Kernel { name: "exact_finish_64", threads: 512 }, Kernel { name: "exact_finish_128", threads: 512 }];
pub(super) const FINISH_SHARED: usize = 4 * (32 + 512 + 512 + 256);

/// Pages of all sequences: `[pages, G, 2, 64, D]`, of each KV head keys, then values.
#[derive(Debug)]
pub struct Pool {
    data: Buffer,
    pages: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Pool {
    /// Room for `pages` pages, which hold anything.
    pub fn new(gpu: &Gpu, pages: usize, (kv_heads, head_dim): (usize, usize)) -> Result<Pool, Error> {
        let data = gpu.alloc(pages * kv_heads * 2 * PAGE_TOKENS * head_dim * 2)?;
        Ok(Pool { data, pages, kv_heads, head_dim })
    }

    /// How many there are.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// `G` and `D`.
    pub fn shape(&self) -> (usize, usize) {
        (self.kv_heads, self.head_dim)
    }

    /// Its memory.
    pub fn data(&self) -> &Buffer {
        &self.data
    }

    /// Bytes of a page of all KV heads.
    pub fn bytes_of_page(&self) -> usize {
        self.kv_heads * 2 * PAGE_TOKENS * self.head_dim * 2
    }

    /// Writes the first tokens of one head of a page: keys and values `[n, D]`.
    pub fn write(&self, (page, head): (usize, usize), keys: &[f16], values: &[f16]) -> Result<(), Error> {
        let most = PAGE_TOKENS * self.head_dim;
        assert!(page < self.pages && head < self.kv_heads, "page {page}, head {head}");
        assert!(keys.len() <= most && keys.len() == values.len(), "{} numbers", keys.len());
        let at = (page * self.kv_heads + head) * 4 * most;
        self.data.write(at, keys)?;
        self.data.write(at + 2 * most, values)
    }

    /// Writes a whole page: `[G, 2, 64, D]`.
    pub fn write_page(&self, page: usize, numbers: &[f16]) -> Result<(), Error> {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        assert_eq!(numbers.len() * 2, self.bytes_of_page(), "not a page");
        self.data.write(page * self.bytes_of_page(), numbers)
    }

    /// The same with room for another number of pages; those that fit in both are kept, others are zeros.
    pub fn resized(&self, gpu: &Gpu, pages: usize) -> Result<Pool, Error> {
        let other = Pool::new(gpu, pages, (self.kv_heads, self.head_dim))?;
        other.data.fill(0)?;
        let both = self.pages.min(pages) * self.bytes_of_page();
        if both > 0 {
            other.data.copy_from(0, (&self.data, 0), both)?;
        }
        Ok(other)
    }
}

/// A step over exact keys and values: what it works with.
#[derive(Clone, Debug)]
pub struct Exact {
    gpu: Gpu,
    shape: Shape,
    /// Of all layers: `[L, B]`.
    lengths: Arc<Buffer>,
    layer: usize,
    tables: Arc<Buffer>,
    table_stride: usize,
    states: Arc<States>,
    /// Pages that tables name lie below this.
    named: usize,
    least_part: usize,
}

impl Exact {
    /// For sequences of up to `most_pages` pages, cut into up to `parts` parts of at least `least_part` tokens. They have no tokens yet.
    pub fn new(gpu: &Gpu, shape: Shape, most_pages: usize, parts: (usize, usize)) -> Result<Exact, Error> {
        Ok(Exact::layers(gpu, shape, most_pages, parts, 1)?.remove(0))
    }

    /// The same for each of some layers, which come one after the other in a step: they share tables and what they work with, and have lengths
    /// of their own.
    pub fn layers(
        gpu: &Gpu,
        shape: Shape,
        most_pages: usize,
        (parts, least_part): (usize, usize),
        layers: usize,
    ) -> Result<Vec<Exact>, Error> {
        shape.check();
        assert!(parts > 0 && least_part.is_multiple_of(PAGE_TOKENS) && least_part > 0, "{least_part} tokens");
        let zeros = |count: usize| -> Result<Arc<Buffer>, Error> {
            let buffer = gpu.alloc(count * 4)?;
            buffer.fill(0)?;
            Ok(Arc::new(buffer))
        };
        let lengths = zeros(layers * shape.sequences)?;
        let tables = zeros(shape.sequences * most_pages)?;
        let states = Arc::new(States::new(gpu, shape, parts)?);
        let all = Exact {
            gpu: gpu.clone(),
            shape,
            lengths,
            layer: 0,
            tables,
            table_stride: most_pages,
            states,
            named: 0,
            least_part,
        };
        Ok((0..layers).map(|layer| Exact { layer, ..all.clone() }).collect())
    }

    /// Sets the tokens `[L, B]` of all layers and the pages of all sequences, the same in each layer.
    pub fn set_layers(layers: &mut [Exact], tokens: &[u32], pages: &[&[u32]]) -> Result<(), Error> {
        let Some(first) = layers.first() else { return Ok(()) };
        let (shape, stride, tables) = (first.shape, first.table_stride, first.tables.clone());
        assert_eq!((tokens.len(), pages.len()), (layers.len() * shape.sequences, shape.sequences));
        for of_layer in tokens.chunks_exact(shape.sequences) {
            for (tokens, pages) in of_layer.iter().zip(pages) {
                let needed = (*tokens as usize).div_ceil(PAGE_TOKENS);
                assert!(
                    needed <= pages.len() && pages.len() <= stride,
                    "{tokens} tokens in {} pages of at most {stride}",
                    pages.len()
                );
            }
        }
        let mut table = vec![0; shape.sequences * stride];
        for (to, from) in table.chunks_exact_mut(stride.max(1)).zip(pages) {
            to[..from.len()].copy_from_slice(from);
        }
        tables.write(0, &table)?;
        layers[0].lengths.write(0, tokens)?;
        let named = pages.iter().copied().flatten().max().map_or(0, |page| *page as usize + 1);
        layers.iter_mut().for_each(|layer| layer.named = named);
        Ok(())
    }

    /// Sets tokens and pages of all sequences, of one layer.
    pub fn set(&mut self, sequences: &[(usize, Vec<u32>)]) -> Result<(), Error> {
        let tokens: Vec<u32> = sequences.iter().map(|(tokens, _)| *tokens as u32).collect();
        let pages: Vec<&[u32]> = sequences.iter().map(|(_, pages)| &pages[..]).collect();
        Exact::set_layers(std::slice::from_mut(self), &tokens, &pages)
    }

    /// States and the address of lengths, for those who merge more into them.
    pub(super) fn states(&self) -> (&States, u64, usize) {
        (&self.states, self.lengths_address(), self.least_part)
    }

    fn lengths_address(&self) -> u64 {
        self.lengths.address() + (self.layer * self.shape.sequences * 4) as u64
    }

    /// What parts left.
    pub fn poison(&self) -> Result<(), Error> {
        self.states.poison()
    }

    /// Attends: `queries` are `[B, G, R, D]`, scores are multiplied by `scale`.
    pub fn attend(&self, pool: &Pool, queries: &Buffer, scale: f32) -> Result<(), Error> {
        let shape = self.shape;
        assert_eq!(
            (pool.kv_heads, pool.head_dim),
            (shape.kv_heads, shape.head_dim),
            "a pool of another shape"
        );
        assert!(self.named <= pool.pages, "page {} of {}", self.named, pool.pages);
        shape.check_queries(queries);
        let parameters = ExactParameters {
            queries: queries.address(),
            pool: pool.data.address(),
            lengths: self.lengths_address(),
            tables: self.tables.address(),
            states: self.states.parameters(),
            scale: scale * LOG2_E,
            sequences: shape.sequences as i32,
            kv_heads: shape.kv_heads as i32,
            rows: shape.rows as i32,
            table_stride: self.table_stride as i32,
            least_part: self.least_part as i32,
        };
        let d = shape.head_dim;
        let shared = MOST_HEADS * 4 + d * 16 + 4 * MOST_ROWS * (2 + d) * 4;
        let kernel = shape.pick(ATTEND[0], ATTEND[1]);
        let blocks = self.gpu.full_grid(kernel, shared)?;
        // SAFETY: tables name pages of the pool, as many as lengths ask for (`set`); queries and states have the shape's sizes, and
        // parts of a head are at most the states' slots.
        unsafe { self.gpu.launch(kernel, (blocks, shared), &parameters) }
    }

    /// Merges what was attended to: outputs `[B, G, R, D]` as f32.
    pub fn finish(&self, out: &Buffer) -> Result<(), Error> {
        let shape = self.shape;
        shape.check_outputs(out);
        let parameters = FinishParameters {
            states: self.states.parameters(),
            lengths: self.lengths_address(),
            out: out.address(),
            sequences: shape.sequences as i32,
            kv_heads: shape.kv_heads as i32,
            rows: shape.rows as i32,
            least_part: self.least_part as i32,
        };
        let kernel = shape.pick(FINISH[0], FINISH[1]);
        // SAFETY: one block for each query head; states and outputs have the shape's sizes.
        unsafe { self.gpu.launch(kernel, (shape.queries(), FINISH_SHARED), &parameters) }
    }
}
