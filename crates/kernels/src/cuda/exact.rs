//! Attention to f16 keys and values in the device's memory.

use super::device::{Buffer, Error, Gpu, Kernel};
use super::parameters::{ExactParameters, FinishParameters};
use super::{MOST_HEADS, MOST_ROWS, Shape, States};
use half::f16;
use std::f32::consts::LOG2_E;

/// Tokens of a page.
pub const PAGE_TOKENS: usize = 64;

/// Fewer tokens are not cut into parts.
pub const LEAST_PART: usize = 256;

const ATTEND: [Kernel; 2] =
    [Kernel { name: "exact_attend_64", threads: 128 }, Kernel { name: "exact_attend_128", threads: 128 }];
const FINISH: [Kernel; 2] =
    [Kernel { name: "exact_finish_64", threads: 512 }, Kernel { name: "exact_finish_128", threads: 512 }];
const FINISH_SHARED: usize = 4 * (32 + 512 + 512 + 256);

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
}

/// A step over exact keys and values: what it works with.
#[derive(Debug)]
pub struct Exact {
    gpu: Gpu,
    shape: Shape,
    lengths: Buffer,
    tables: Buffer,
    table_stride: usize,
    states: States,
    /// Pages that tables name lie below this.
    named: usize,
    least_part: usize,
}

impl Exact {
    /// For sequences of up to `most_pages` pages, cut into up to `parts` parts of at least `least_part` tokens. They have no tokens yet.
    pub fn new(
        gpu: &Gpu,
        shape: Shape,
        most_pages: usize,
        (parts, least_part): (usize, usize),
    ) -> Result<Exact, Error> {
        shape.check();
        assert!(parts > 0 && least_part.is_multiple_of(PAGE_TOKENS) && least_part > 0, "{least_part} tokens");
        let lengths = gpu.upload(&vec![0u32; shape.sequences])?;
        let tables = gpu.upload(&vec![0u32; shape.sequences * most_pages])?;
        let states = States::new(gpu, shape, parts)?;
        let gpu = gpu.clone();
        Ok(Exact { gpu, shape, lengths, tables, table_stride: most_pages, states, named: 0, least_part })
    }

    /// Sets tokens and pages of all sequences.
    pub fn set(&mut self, sequences: &[(usize, Vec<u32>)]) -> Result<(), Error> {
        assert_eq!(sequences.len(), self.shape.sequences);
        let lengths: Vec<u32> = sequences.iter().map(|(tokens, _)| *tokens as u32).collect();
        for (i, (tokens, pages)) in sequences.iter().enumerate() {
            assert!(
                tokens.div_ceil(PAGE_TOKENS) <= pages.len() && pages.len() <= self.table_stride,
                "{tokens} tokens in {} pages of at most {}",
                pages.len(),
                self.table_stride
            );
            self.tables.write(i * self.table_stride * 4, pages)?;
            let named = pages.iter().map(|page| *page as usize + 1).max().unwrap_or(0);
            self.named = self.named.max(named);
        }
        self.lengths.write(0, &lengths)
    }

    /// States and lengths, for those who merge more into them.
    pub(super) fn states(&self) -> (&States, &Buffer, usize) {
        (&self.states, &self.lengths, self.least_part)
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
        assert!(
            queries.bytes() >= shape.queries() * shape.head_dim * 2,
            "{} bytes of queries",
            queries.bytes()
        );
        let parameters = ExactParameters {
            queries: queries.address(),
            pool: pool.data.address(),
            lengths: self.lengths.address(),
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
        assert!(out.bytes() >= shape.queries() * shape.head_dim * 4, "{} bytes of outputs", out.bytes());
        let parameters = FinishParameters {
            states: self.states.parameters(),
            lengths: self.lengths.address(),
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
