//! What lies between a pass's products: embeddings, norms, heads, gates. Residuals are f32, what is multiplied is bf16.

use super::device::{Buffer, Error, Gpu, Kernel};
use super::gemm::Weights;
use super::of_width;
use super::parameters::{EmbedParameters, GateParameters, HeadsParameters, NarrowParameters, NormParameters};
use super::prefill::Tokens;

const EMBED: Kernel = Kernel { name: "dense_embed", threads: 256 };
const NORM: Kernel = Kernel { name: "dense_norm", threads: 256 };
const NORM_ADD: Kernel = Kernel { name: "dense_norm_add", threads: 256 };
const HEADS: [Kernel; 2] =
    [Kernel { name: "dense_heads_64", threads: 128 }, Kernel { name: "dense_heads_128", threads: 128 }];
const GATE: Kernel = Kernel { name: "dense_gate", threads: 256 };
const NARROW: Kernel = Kernel { name: "dense_narrow", threads: 256 };
/// Sums of a block's warps.
const NORM_SHARED: usize = 8 * 4;

/// `out[T, hidden] = scale * table[token]` in f32. `tokens` are `T` u32; one that the table has no row for gets the last.
pub fn embed(
    table: &Weights,
    (tokens, count): (&Buffer, usize),
    scale: f32,
    out: &Buffer,
) -> Result<(), Error> {
    if count == 0 {
        return Ok(());
    }
    tokens.holds("tokens", 0, count * 4);
    out.holds("embeddings", 0, count * table.cols() * 4);
    let parameters = EmbedParameters {
        table: table.data().address(),
        tokens: tokens.address(),
        out: out.address(),
        scale,
        vocab: table.rows() as i32,
        hidden: table.cols() as i32,
        unused: 0,
    };
    // SAFETY: a block for each token; the output has a row for each, and rows of the table are those that it has.
    unsafe { table.gpu().launch(EMBED, (count, 0), &parameters) }
}

/// RMSNorm, `x / rms(x) * weight` (Zhang and Sennrich 2019, arXiv 1910.07467).
#[derive(Debug)]
pub struct Norm {
    gpu: Gpu,
    weight: Buffer,
    columns: usize,
    eps: f32,
}

impl Norm {
    /// Of rows of as many numbers, a multiple of 4.
    pub fn new(gpu: &Gpu, weight: &[f32], eps: f32) -> Result<Norm, Error> {
        assert!(!weight.is_empty() && weight.len().is_multiple_of(4), "rows of {} numbers", weight.len());
        Ok(Norm { gpu: gpu.clone(), weight: gpu.upload(weight)?, columns: weight.len(), eps })
    }

    /// `out[T, hidden] = norm(x)` in bf16.
    pub fn apply(&self, x: &Buffer, rows: usize, out: &Buffer) -> Result<(), Error> {
        out.holds("a norm's output", 0, rows * self.columns * 2);
        self.launch(NORM, (x, rows), (0, rows), out)
    }

    /// The same of `n` rows of `x`, those that `picked` names (u32 each): `out[n, hidden]`. A row that there is not gets the last.
    pub fn apply_to(
        &self,
        (x, rows): (&Buffer, usize),
        (picked, n): (&Buffer, usize),
        out: &Buffer,
    ) -> Result<(), Error> {
        assert!(rows > 0, "rows of nothing");
        picked.holds("rows to pick", 0, n * 4);
        out.holds("a norm's output", 0, n * self.columns * 2);
        self.launch(NORM, (x, rows), (picked.address(), n), out)
    }

    /// `residual[T, hidden] += norm(x)` in f32.
    pub fn add(&self, x: &Buffer, rows: usize, residual: &Buffer) -> Result<(), Error> {
        residual.holds("a residual", 0, rows * self.columns * 4);
        self.launch(NORM_ADD, (x, rows), (0, rows), residual)
    }

    fn launch(
        &self,
        kernel: Kernel,
        (x, rows): (&Buffer, usize),
        (picked, blocks): (u64, usize),
        out: &Buffer,
    ) -> Result<(), Error> {
        x.holds("what is normed", 0, rows * self.columns * 4);
        if blocks == 0 {
            return Ok(());
        }
        let parameters = NormParameters {
            x: x.address(),
            weight: self.weight.address(),
            picked,
            out: out.address(),
            eps: self.eps,
            columns: self.columns as i32,
            rows: rows as i32,
            unused: 0,
        };
        // SAFETY: a block for each row of the output, which holds them, by the callers; rows of `x` are those that it has.
        unsafe { self.gpu.launch(kernel, (blocks, NORM_SHARED), &parameters) }
    }
}

/// Which two elements of a head make a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// `(0, 1), (2, 3), ..`
    Interleaved,
    /// `(0, dims/2), (1, dims/2 + 1), ..`
    Halves,
}

/// Rotary position embedding of a pass's rows.
#[derive(Clone, Copy, Debug)]
pub struct Rotations<'a> {
    /// Cosine and sine of each pair, `[T, dims / 2, 2]` in f32.
    pub table: &'a Buffer,
    /// Leading elements of each head that are turned; even, at most `D`.
    pub dims: usize,
    /// Which make a pair.
    pub pairs: Pairs,
}

/// What a layer does to its heads once they are multiplied out. Of nothing given nothing is done.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// `H`, a multiple of the pool's KV heads.
    pub heads: usize,
    /// Added first, `[(H + 2 G) * D]` in f32.
    pub bias: Option<&'a Buffer>,
    /// RMSNorm of each query head, `[D]` in f32.
    pub query_norm: Option<&'a Buffer>,
    /// RMSNorm of each key head, `[D]` in f32.
    pub key_norm: Option<&'a Buffer>,
    /// Of both.
    pub eps: f32,
    /// What queries are multiplied with at last.
    pub query_factor: f32,
}

impl Heads<'_> {
    /// Out of `projected` `[T, (H + 2 G) * D]` in f32, queries, keys, values: queries `[T, H, D]` in f16, and keys and values to their pages; if
    /// asked for also `[T, 2, G, D]` in f16, from a byte of `staged` on that is a multiple of 16.
    pub fn apply(
        &self,
        projected: &Buffer,
        rotations: Option<Rotations>,
        queries: &Buffer,
        tokens: &Tokens,
        staged: Option<(&Buffer, usize)>,
    ) -> Result<(), Error> {
        let (kv_heads, d) = tokens.pool.shape();
        let (rows, all) = (tokens.places.rows(), self.heads + 2 * kv_heads);
        projected.holds("what is projected", 0, rows * all * d * 4);
        queries.holds("queries", 0, rows * self.heads * d * 2);
        if let Some(bias) = self.bias {
            bias.holds("biases", 0, all * d * 4);
        }
        for norm in [self.query_norm, self.key_norm].into_iter().flatten() {
            norm.holds("a head's norm", 0, d * 4);
        }
        if let Some(of) = rotations {
            assert!(of.dims <= d && of.dims.is_multiple_of(2), "{} of {d} elements turned", of.dims);
            of.table.holds("cosines and sines", 0, rows * of.dims * 4);
        }
        if let Some((buffer, at)) = staged {
            assert!(at.is_multiple_of(16), "staged from byte {at} on");
            buffer.holds("staged keys and values", at, rows * 2 * kv_heads * d * 2);
        }
        let (of_rows, tables, table_stride) = tokens.checked();
        if rows == 0 {
            return Ok(());
        }
        let address = |buffer: Option<&Buffer>| buffer.map_or(0, Buffer::address);
        let parameters = HeadsParameters {
            projected: projected.address(),
            bias: address(self.bias),
            query_norm: address(self.query_norm),
            key_norm: address(self.key_norm),
            rotations: address(rotations.map(|of| of.table)),
            rows: of_rows,
            tables,
            queries: queries.address(),
            pool: tokens.pool.data().address(),
            staged: staged.map_or(0, |(buffer, at)| buffer.address() + at as u64),
            eps: self.eps,
            query_factor: self.query_factor,
            heads: self.heads as i32,
            kv_heads: kv_heads as i32,
            turned: rotations.map_or(0, |of| of.dims as i32),
            interleaved: i32::from(rotations.is_some_and(|of| of.pairs == Pairs::Interleaved)),
            table_stride: table_stride as i32,
            row_count: rows as i32,
        };
        let kernel = of_width(HEADS, d);
        let warps = kernel.threads / 32;
        let (blocks, shared) = ((rows * all).div_ceil(warps), warps * d * 4);
        // SAFETY: a warp for each head of each row; buffers have the rows' sizes, and every row has a page of the pool (`checked`).
        unsafe { tokens.gpu().launch(kernel, (blocks, shared), &parameters) }
    }
}

/// The gate of a feed-forward layer; formulas as in [`crate::activation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`
    Silu,
    /// With the tanh approximation.
    Gelu,
}

impl Activation {
    /// Of `x / (1 + e^-(linear x + cubic x^3))`.
    pub(super) fn coefficients(self) -> (f32, f32) {
        let gelu = 2.0 * (2.0 / std::f32::consts::PI).sqrt();
        match self {
            Activation::Silu => (1.0, 0.0),
            Activation::Gelu => (gelu, 0.044_715 * gelu),
        }
    }
}

/// `out[T, ffn] = activation(gate) * up` in bf16, of `both` `[T, 2, ffn]` in f32: gate, up. `ffn` is a multiple of 4.
pub fn gate(
    gpu: &Gpu,
    activation: Activation,
    both: &Buffer,
    (rows, ffn): (usize, usize),
    out: &Buffer,
) -> Result<(), Error> {
    assert!(ffn.is_multiple_of(4), "{ffn} numbers in a feed-forward layer");
    both.holds("gate and up", 0, rows * 2 * ffn * 4);
    out.holds("a gate's output", 0, rows * ffn * 2);
    let count = rows * ffn;
    if count == 0 {
        return Ok(());
    }
    let (linear, cubic) = activation.coefficients();
    let parameters = GateParameters {
        both: both.address(),
        out: out.address(),
        count: count as i64,
        width: ffn as i32,
        linear,
        cubic,
        unused: 0,
    };
    // SAFETY: a thread for each four numbers, which both buffers hold.
    unsafe { gpu.launch(GATE, ((count / 4).div_ceil(GATE.threads), 0), &parameters) }
}

/// `count` numbers, a multiple of 4, of f32 as bf16.
pub fn narrow(gpu: &Gpu, x: &Buffer, count: usize, out: &Buffer) -> Result<(), Error> {
    assert!(count.is_multiple_of(4), "{count} numbers");
    x.holds("what is narrowed", 0, count * 4);
    out.holds("narrowed numbers", 0, count * 2);
    if count == 0 {
        return Ok(());
    }
    let parameters = NarrowParameters { x: x.address(), out: out.address(), count: count as i64 };
    // SAFETY: a thread for each four numbers, which both buffers hold.
    unsafe { gpu.launch(NARROW, ((count / 4).div_ceil(NARROW.threads), 0), &parameters) }
}
