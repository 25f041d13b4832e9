//! llama.cpp's quantized KV types, `q8_0` and `q4_0`, and the rotation that it puts before them.
//!
//! Source: ggml (github.com/ggml-org/llama.cpp), `block_q8_0` and `block_q4_0` of `ggml-common.h`, rounded as
//! `quantize_row_q8_0_ref` and `quantize_row_q4_0_ref` of `ggml-quants.c` do; chosen there by `--cache-type-k` and
//! `--cache-type-v`. No paper. Blocks of 32 neighbouring channels of one token: an f16 scale, then 32 codes.
//! - `q8_0`, 34 bytes: `d = amax / 127`, codes `round(x / d)`, ties away from zero.
//! - `q4_0`, 18 bytes: `d = m / -8` for the number `m` of largest magnitude (the first of them), codes
//!   `min(15, floor(x / d + 8.5))`; channel `i` shares its byte with channel `i + 16`.
//!
//! Where head_dim is a multiple of 64, both are of rotated channels, as in llama.cpp since April 2026 (pull request
//! 21038): the orthonormal Walsh-Hadamard matrix of order `n` multiplies each run of `n` channels, which spreads a
//! large channel over all of its run instead of letting it make its block's scale. Of keys and queries `n` is the largest
//! power of two that divides head_dim; of values it is 64, which that pull request found to be better. The matrix is its
//! own inverse, so it also turns outputs back; no byte is stored for it. `rotation=none` is llama.cpp with
//! `LLAMA_ATTN_ROT_DISABLE=1`.
//!
//! As there: keys after RoPE; keys and values alike, a token's row at a time; every token is quantized when it is
//! stored, no recent window stays exact. Not as there: attention multiplies what the codes stand for in f32, where
//! llama.cpp also quantizes the query to 8 bits. A prompt's numbers pass through the f16 pages of prefill first, and
//! the rotation adds in another order, so a scale may differ from llama.cpp's in its last bit, and a code by one.

use super::{Head, Plan, TOKENS_PER_TASK, pack, to_f16, unpack};
use crate::KvBytes;
use crate::exact::{ARC_BYTES, ExactHead};
use half::f16;
use mosaickv_kernels::exact::PAGE_TOKENS;
use mosaickv_kernels::rotate::hadamard;
use mosaickv_kernels::rows::Rows;
use mosaickv_kernels::{AttnState, Isa};
use std::sync::Arc;

/// Channels that share a scale.
pub(crate) const BLOCK: usize = 32;

/// The order of the matrix that turns values, and the least that turns keys.
const LEAST_ORDER: usize = 64;

/// Parameters of llama.cpp's quantized cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantized {
    /// How keys and values are quantized.
    pub kind: GgmlType,
    /// Which channels are quantized.
    pub rotation: Turn,
}

impl Quantized {
    /// `kind` as llama.cpp has it without further arguments.
    pub const fn new(kind: GgmlType) -> Quantized {
        Quantized { kind, rotation: Turn::Hadamard }
    }
}

/// One of llama.cpp's types for keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlType {
    /// 8.5 bits a scalar.
    Q8_0,
    /// 4.5 bits a scalar.
    Q4_0,
}

/// Which channels llama.cpp quantizes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Turn {
    /// Those of a Walsh-Hadamard matrix if head_dim is a multiple of 64, else the model's.
    #[default]
    Hadamard,
    /// The model's own: what the rotation is worth shows beside it.
    None,
}

/// Orders of the Hadamard matrices of one head; order 1 is no rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Orders {
    /// Of keys and queries.
    pub(super) keys: usize,
    /// Of values and outputs.
    pub(super) values: usize,
}

impl Turn {
    pub(super) fn orders(self, head_dim: usize) -> Orders {
        match self {
            Turn::Hadamard if head_dim.is_multiple_of(LEAST_ORDER) => {
                Orders { keys: 1 << head_dim.trailing_zeros(), values: LEAST_ORDER }
            }
            Turn::Hadamard | Turn::None => Orders { keys: 1, values: 1 },
        }
    }
}

impl GgmlType {
    /// Bytes of 32 channels.
    pub(crate) fn block_bytes(self) -> usize {
        match self {
            GgmlType::Q8_0 => 34,
            GgmlType::Q4_0 => 18,
        }
    }

    /// Quantizes a row, a multiple of 32 numbers.
    pub(crate) fn encode(self, row: &[f32], out: &mut [u8]) {
        for (x, out) in row.chunks_exact(BLOCK).zip(out.chunks_exact_mut(self.block_bytes())) {
            let (scale, codes) = out.split_at_mut(2);
            let d = match self {
                GgmlType::Q8_0 => encode_q8_0(x, codes),
                GgmlType::Q4_0 => encode_q4_0(x, codes),
            };
            scale.copy_from_slice(&to_f16(d).to_le_bytes());
        }
    }

    /// What the codes of `bytes` stand for.
    fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let blocks = bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(BLOCK));
        match self {
            GgmlType::Q8_0 => blocks.for_each(|(block, out)| {
                let d = scale(block);
                for (x, &code) in out.iter_mut().zip(&block[2..34]) {
                    *x = d * f32::from(code.cast_signed());
                }
            }),
            GgmlType::Q4_0 => blocks.for_each(|(block, out)| {
                let d = scale(block);
                unpack::<4>(&block[2..18], out);
                out.iter_mut().for_each(|x| *x = d * (*x - 8.0));
            }),
        }
    }
}

fn scale(block: &[u8]) -> f32 {
    f16::from_le_bytes([block[0], block[1]]).to_f32()
}

fn encode_q8_0(x: &[f32], codes: &mut [u8]) -> f32 {
    let d = x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    codes.iter_mut().zip(x).for_each(|(code, x)| *code = ((x * inverse).round() as i8).cast_unsigned());
    d
}

fn encode_q4_0(x: &[f32], packed: &mut [u8]) -> f32 {
    let largest = x.iter().fold(0.0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
    let d = largest / -8.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    pack::<4>(&std::array::from_fn(|i| ((x[i] * inverse + 8.5) as u8).min(15)), packed);
    d
}

/// Pages of 64 tokens; a token is its key's blocks, then its value's.
#[derive(Clone, Debug)]
pub(crate) struct QuantizedHead {
    pub(super) kind: GgmlType,
    pub(super) head_dim: usize,
    pub(super) orders: Orders,
    sealed: Vec<Arc<[u8]>>,
    /// Room for 64 tokens.
    open: Box<[u8]>,
    /// In `open`, never 64.
    open_tokens: usize,
}

impl QuantizedHead {
    pub(crate) fn new(exact: &ExactHead, Quantized { kind, rotation }: Quantized) -> QuantizedHead {
        let head_dim = exact.page(0).head_dim();
        let bytes = PAGE_TOKENS * 2 * head_dim / BLOCK * kind.block_bytes();
        let open = vec![0; bytes].into_boxed_slice();
        let mut head = QuantizedHead {
            kind,
            head_dim,
            orders: rotation.orders(head_dim),
            sealed: Vec::with_capacity(exact.tokens() / PAGE_TOKENS),
            open,
            open_tokens: 0,
        };
        exact.each_token(|key, value| head.push(key, value));
        head
    }

    fn push(&mut self, key: &[f32], value: &[f32]) {
        let bytes = self.token_bytes();
        let (k, v) = self.open[self.open_tokens * bytes..][..bytes].split_at_mut(bytes / 2);
        self.kind.encode(&turned(key, self.orders.keys), k);
        self.kind.encode(&turned(value, self.orders.values), v);
        self.open_tokens += 1;
        if self.open_tokens == PAGE_TOKENS {
            self.sealed.push(Arc::from(&*self.open));
            self.open_tokens = 0;
        }
    }

    /// Bytes of a key and a value.
    pub(super) fn token_bytes(&self) -> usize {
        2 * self.head_dim / BLOCK * self.kind.block_bytes()
    }

    /// What is stored, page by page.
    pub(super) fn pages(&self) -> impl Iterator<Item = &[u8]> {
        let open = &self.open[..self.open_tokens * self.token_bytes()];
        self.sealed.iter().map(|page| &**page).chain([open])
    }
}

/// Rows of a head in the channels of the Hadamard matrix of `order`.
fn turned(rows: &[f32], order: usize) -> Vec<f32> {
    let mut turned = rows.to_vec();
    hadamard(&mut turned, order);
    turned
}

impl Head for QuantizedHead {
    fn tokens(&self) -> usize {
        self.sealed.len() * PAGE_TOKENS + self.open_tokens
    }

    fn append(&mut self, key: &[f32], value: &[f32]) {
        self.push(key, value);
    }

    fn is_due(&self) -> bool {
        false
    }

    fn plan(&self, _: Isa, queries: &[f32]) -> Plan {
        Plan { rotated: turned(queries, self.orders.keys), ..Plan::default() }
    }

    fn runs(&self) -> usize {
        self.tokens().div_ceil(TOKENS_PER_TASK).max(1)
    }

    fn fold(&self, isa: Isa, plan: &Plan, run: usize, state: &mut AttnState) {
        let (d, bytes) = (self.head_dim, self.token_bytes());
        let mut rows = Rows::new(d, state.rows());
        let mut stored = AttnState::new(state.rows(), d);
        let pages = TOKENS_PER_TASK / PAGE_TOKENS;
        for page in self.pages().skip(run * pages).take(pages) {
            let (keys, values) = rows.push_many(page.len() / bytes);
            let tokens = keys.chunks_exact_mut(d).zip(values.chunks_exact_mut(d));
            for (token, (key, value)) in page.chunks_exact(bytes).zip(tokens) {
                self.kind.decode(&token[..bytes / 2], key);
                self.kind.decode(&token[bytes / 2..], value);
            }
            rows.fold(isa, &plan.rotated, &mut stored);
        }
        // Back in the model's channels once for 1,024 tokens, next to nothing beside decoding them.
        state.merge(&stored.turned(d, |acc, _, out| {
            out.copy_from_slice(acc);
            hadamard(out, self.orders.values);
        }));
    }

    fn bytes_read(&self, _: &Plan) -> usize {
        self.tokens() * self.token_bytes()
    }

    fn count(&self, bytes: &mut KvBytes) {
        bytes.packed += self.open.len() * (self.sealed.len() + 1);
        bytes.lists += self.sealed.capacity() * size_of::<Arc<[u8]>>() + self.sealed.len() * ARC_BYTES;
    }

    fn check(&self) -> Result<(), String> {
        if let Some(i) = self.sealed.iter().position(|page| page.len() != self.open.len()) {
            return Err(format!(
                "sealed page {i} has {} bytes, wanted {}",
                self.sealed[i].len(),
                self.open.len()
            ));
        }
        let finite = |block: &[u8]| scale(block).is_finite();
        if !self.pages().all(|page| page.chunks_exact(self.kind.block_bytes()).all(finite)) {
            return Err("a scale is not finite".into());
        }
        Ok(())
    }

    fn oracle_rows(&self, _: &[f64], _: usize) -> (Vec<f64>, Vec<f64>) {
        self.stored_rows()
    }

    fn boxed(&self) -> Box<dyn Head> {
        Box::new(self.clone())
    }
}
