//! KIVI: keys quantized by channel, values by token, to 2 or 4 bits, the newest tokens in full.
//!
//! Source: Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750, s. 3.3
//! and Algorithm 1, and github.com/jy-yuan/KIVI (`models/llama_kivi.py`, `quant/new_pack.py`). Group size G = 32 and
//! residual length R = 128, the paper's setting (s. 4.1). Each group has its smallest number and a scale, both f16:
//! `s = (max - min) / (2^bits - 1)`, codes `round((x - min) / s)`, ties to even. With 2 bits 3 bits a scalar, with
//! 4 bits 5.
//!
//! - Keys (after RoPE, as in the authors' code): groups of 32 tokens of one channel. They are quantized 128 tokens
//!   at a time: of a prompt of `T` the last `T mod 128` stay in f16; later keys join them, and when 128 are there
//!   all are quantized.
//! - Values: groups of 32 channels of one token. The newest 128 stay in f16; one that leaves them is quantized
//!   alone.
//!
//! A step of the authors' code first attends and then quantizes what has become due; here the next token does it,
//! before it is added, which is the same for every step's attention: it sees up to 128 keys and 129 values in
//! f16. Here as there `s` is rounded to f16 before codes are made; a group of equal numbers has codes 0.

use super::{Head, Plan, TOKENS_PER_TASK, pack, to_f16, unpack, widen};
use crate::KvBytes;
use crate::exact::{ARC_BYTES, ExactHead};
use half::f16;
use mosaickv_kernels::exact::PAGE_TOKENS;
use mosaickv_kernels::rows::Rows;
use mosaickv_kernels::{AttnState, Isa};
use std::sync::Arc;

/// Numbers that share a scale and a smallest number, G.
pub(crate) const GROUP: usize = 32;

/// Newest tokens in full precision, R.
pub(crate) const RESIDUAL: usize = 128;

/// Values in f16 at most: the newest `RESIDUAL`, and the one that the next token sends away.
const VALUE_SLOTS: usize = RESIDUAL + 1;

/// Bits of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kivi {
    /// 4 bits, `kivi4`.
    Bits4,
    /// 2 bits, `kivi2`.
    Bits2,
}

impl Kivi {
    pub(super) fn bits(self) -> usize {
        match self {
            Kivi::Bits4 => 4,
            Kivi::Bits2 => 2,
        }
    }

    /// Bytes of the codes of a group.
    pub(super) fn group_bytes(self) -> usize {
        GROUP * self.bits() / 8
    }

    /// Codes, scale and smallest number of a group.
    pub(super) fn quantize(self, x: &[f32; GROUP]) -> ([u8; GROUP], f16, f16) {
        let low = x.iter().copied().fold(f32::INFINITY, f32::min);
        let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let most = ((1 << self.bits()) - 1) as f32;
        let (low, scale) = (to_f16(low), to_f16((high - low) / most));
        let (from, step) = (low.to_f32(), scale.to_f32());
        let inverse = if step == 0.0 { 0.0 } else { step.recip() };
        let code = |x: f32| ((x - from) * inverse).round_ties_even().clamp(0.0, most) as u8;
        (x.map(code), scale, low)
    }

    fn pack(self, codes: &[u8; GROUP], out: &mut [u8]) {
        match self {
            Kivi::Bits4 => pack::<4>(codes, out),
            Kivi::Bits2 => pack::<2>(codes, out),
        }
    }

    /// Codes of a row of channels as numbers.
    fn unpack(self, packed: &[u8], out: &mut [f32]) {
        let groups = packed.chunks_exact(self.group_bytes()).zip(out.chunks_exact_mut(GROUP));
        match self {
            Kivi::Bits4 => groups.for_each(|(packed, out)| unpack::<4>(packed, out)),
            Kivi::Bits2 => groups.for_each(|(packed, out)| unpack::<2>(packed, out)),
        }
    }
}

/// Quantized rows of one side: 128 keys or up to 64 values.
#[derive(Clone, Debug)]
pub(super) struct Codes {
    /// `[T, D]` codes, each row packed.
    pub(super) codes: Box<[u8]>,
    /// Scales, then smallest numbers: of keys `[T / 32, 2, D]`, of values `[T, 2, D / 32]`.
    pub(super) numbers: Box<[f16]>,
}

impl Codes {
    fn new(kind: Kivi, tokens: usize, d: usize) -> Codes {
        Codes {
            codes: vec![0; tokens * d / GROUP * kind.group_bytes()].into(),
            numbers: vec![f16::ZERO; tokens * d / GROUP * 2].into(),
        }
    }

    fn bytes(&self) -> usize {
        self.codes.len() + size_of_val(&*self.numbers)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct KiviHead {
    pub(super) kind: Kivi,
    pub(super) head_dim: usize,
    pub(super) tokens: usize,
    /// 128 tokens each.
    pub(super) keys: Vec<Arc<Codes>>,
    /// Keys that are not quantized: token `t` in row `t % 128` of `[128, D]`.
    pub(super) newest_keys: Box<[f16]>,
    /// 64 tokens each.
    pub(super) values: Vec<Arc<Codes>>,
    /// The page of values that is being filled, never full.
    pub(super) open: Codes,
    /// Tokens whose value is quantized.
    pub(super) quantized_values: usize,
    /// Values that are not: token `t` in row `t % 129` of `[129, D]`.
    pub(super) newest_values: Box<[f16]>,
}

impl KiviHead {
    pub(crate) fn new(exact: &ExactHead, kind: Kivi) -> KiviHead {
        let d = exact.page(0).head_dim();
        let mut head = KiviHead {
            kind,
            head_dim: d,
            tokens: 0,
            keys: Vec::with_capacity(exact.tokens() / RESIDUAL),
            newest_keys: vec![f16::ZERO; RESIDUAL * d].into(),
            values: Vec::with_capacity(exact.tokens().saturating_sub(RESIDUAL) / PAGE_TOKENS),
            open: Codes::new(kind, PAGE_TOKENS, d),
            quantized_values: 0,
            newest_values: vec![f16::ZERO; VALUE_SLOTS * d].into(),
        };
        exact.each_token(|key, value| head.push(key, value));
        head.settle();
        head
    }

    /// Tokens whose key is quantized.
    pub(super) fn quantized_keys(&self) -> usize {
        self.keys.len() * RESIDUAL
    }

    fn push(&mut self, key: &[f32], value: &[f32]) {
        self.settle();
        let d = self.head_dim;
        let put = |to: &mut [f16], x: &[f32]| to.iter_mut().zip(x).for_each(|(to, x)| *to = to_f16(*x));
        put(&mut self.newest_keys[self.tokens % RESIDUAL * d..][..d], key);
        put(&mut self.newest_values[self.tokens % VALUE_SLOTS * d..][..d], value);
        self.tokens += 1;
    }

    /// Quantizes what has become due.
    fn settle(&mut self) {
        if self.tokens - self.quantized_keys() == RESIDUAL {
            self.quantize_keys();
        }
        if self.tokens - self.quantized_values > RESIDUAL {
            self.quantize_value();
        }
    }

    /// The 128 keys in f16, by channel in groups of 32 tokens.
    fn quantize_keys(&mut self) {
        let (d, kind) = (self.head_dim, self.kind);
        let mut wide = vec![0.0; RESIDUAL * d];
        widen(&self.newest_keys, &mut wide);
        let mut out = Codes::new(kind, RESIDUAL, d);
        let row = d / GROUP * kind.group_bytes();
        let mut codes = vec![0; GROUP * d];
        let groups = out.codes.chunks_exact_mut(GROUP * row).zip(out.numbers.chunks_exact_mut(2 * d));
        for (keys, (packed, numbers)) in wide.chunks_exact(GROUP * d).zip(groups) {
            for channel in 0..d {
                let (of_channel, scale, low) = kind.quantize(&std::array::from_fn(|t| keys[t * d + channel]));
                of_channel.iter().enumerate().for_each(|(t, code)| codes[t * d + channel] = *code);
                (numbers[channel], numbers[d + channel]) = (scale, low);
            }
            let parts = codes.as_chunks::<GROUP>().0.iter();
            parts.zip(packed.chunks_exact_mut(kind.group_bytes())).for_each(|(c, out)| kind.pack(c, out));
        }
        self.keys.push(Arc::new(out));
    }

    /// The oldest value in f16, in groups of 32 channels.
    fn quantize_value(&mut self) {
        let (d, kind, token) = (self.head_dim, self.kind, self.quantized_values);
        let mut wide = vec![0.0; d];
        widen(&self.newest_values[token % VALUE_SLOTS * d..][..d], &mut wide);
        let groups = d / GROUP;
        let row = token % PAGE_TOKENS;
        let numbers = &mut self.open.numbers[row * 2 * groups..][..2 * groups];
        let codes = &mut self.open.codes[row * groups * kind.group_bytes()..];
        let parts = wide.as_chunks::<GROUP>().0.iter().zip(codes.chunks_exact_mut(kind.group_bytes()));
        for (g, (x, packed)) in parts.enumerate() {
            let (codes, scale, low) = kind.quantize(x);
            kind.pack(&codes, packed);
            (numbers[g], numbers[groups + g]) = (scale, low);
        }
        self.quantized_values += 1;
        if self.quantized_values.is_multiple_of(PAGE_TOKENS) {
            self.values.push(Arc::new(self.open.clone()));
        }
    }

    /// Keys `[count, D]` of the tokens from `first`, a multiple of 64; `count` is at most 64.
    fn decode_keys(&self, first: usize, out: &mut [f32]) {
        let d = self.head_dim;
        let Some(chunk) = self.keys.get(first / RESIDUAL) else {
            return widen(&self.newest_keys[first % RESIDUAL * d..][..out.len()], out);
        };
        let row = d / GROUP * self.kind.group_bytes();
        let mut numbers = vec![0.0; 2 * d];
        for (i, out) in out.chunks_mut(GROUP * d).enumerate() {
            let first = first % RESIDUAL + i * GROUP;
            widen(&chunk.numbers[first / GROUP * 2 * d..][..2 * d], &mut numbers);
            let (scales, lows) = numbers.split_at(d);
            for (packed, out) in chunk.codes[first * row..].chunks_exact(row).zip(out.chunks_exact_mut(d)) {
                self.kind.unpack(packed, out);
                for ((x, scale), low) in out.iter_mut().zip(scales).zip(lows) {
                    *x = *x * scale + low;
                }
            }
        }
    }

    /// Values `[count, D]`, as `decode_keys`.
    fn decode_values(&self, first: usize, out: &mut [f32]) {
        let (d, groups) = (self.head_dim, self.head_dim / GROUP);
        let page = self.values.get(first / PAGE_TOKENS).map_or(&self.open, |page| page);
        let mut numbers = vec![0.0; 2 * PAGE_TOKENS * groups];
        widen(&page.numbers, &mut numbers);
        let row = groups * self.kind.group_bytes();
        let parts = page.codes.chunks_exact(row).zip(numbers.chunks_exact(2 * groups));
        let quantized = self.quantized_values.saturating_sub(first).min(out.len() / d);
        let (coded, full) = out.split_at_mut(quantized * d);
        for ((packed, numbers), out) in parts.zip(coded.chunks_exact_mut(d)) {
            self.kind.unpack(packed, out);
            let (scales, lows) = numbers.split_at(groups);
            for ((out, scale), low) in out.chunks_exact_mut(GROUP).zip(scales).zip(lows) {
                out.iter_mut().for_each(|x| *x = *x * scale + low);
            }
        }
        for (token, out) in (first + quantized..).zip(full.chunks_exact_mut(d)) {
            widen(&self.newest_values[token % VALUE_SLOTS * d..][..d], out);
        }
    }
}

impl Head for KiviHead {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn append(&mut self, key: &[f32], value: &[f32]) {
        self.push(key, value);
    }

    fn is_due(&self) -> bool {
        self.tokens - self.quantized_keys() == RESIDUAL
    }

    fn plan(&self, _: Isa, queries: &[f32]) -> Plan {
        Plan::all(queries)
    }

    fn runs(&self) -> usize {
        self.tokens.div_ceil(TOKENS_PER_TASK).max(1)
    }

    fn fold(&self, isa: Isa, plan: &Plan, run: usize, state: &mut AttnState) {
        let mut rows = Rows::new(self.head_dim, state.rows());
        let end = self.tokens.min((run + 1) * TOKENS_PER_TASK);
        for first in (run * TOKENS_PER_TASK..end).step_by(PAGE_TOKENS) {
            let (keys, values) = rows.push_many(PAGE_TOKENS.min(end - first));
            self.decode_keys(first, keys);
            self.decode_values(first, values);
            rows.fold(isa, &plan.queries, state);
        }
    }

    fn bytes_read(&self, _: &Plan) -> usize {
        let groups = self.head_dim / GROUP;
        let coded = groups * (self.kind.group_bytes() + 2 * size_of::<f16>());
        let quantized = self.quantized_keys() + self.quantized_values;
        quantized * coded + (2 * self.tokens - quantized) * self.head_dim * size_of::<f16>()
    }

    fn count(&self, bytes: &mut KvBytes) {
        bytes.exact += size_of_val(&*self.newest_keys) + size_of_val(&*self.newest_values);
        let sealed = self.keys.iter().chain(&self.values);
        bytes.packed += self.open.bytes() + sealed.clone().map(|codes| codes.bytes()).sum::<usize>();
        bytes.lists += sealed.count() * (size_of::<Codes>() + ARC_BYTES);
        bytes.lists += (self.keys.capacity() + self.values.capacity()) * size_of::<Arc<Codes>>();
    }

    fn check(&self) -> Result<(), String> {
        let newest = self.tokens.checked_sub(self.quantized_keys());
        if newest.is_none_or(|n| n > RESIDUAL) {
            return Err(format!("{} keys quantized of {}", self.quantized_keys(), self.tokens));
        }
        let newest = self.tokens.checked_sub(self.quantized_values);
        if newest.is_none_or(|n| n > VALUE_SLOTS || n < self.tokens.min(RESIDUAL)) {
            return Err(format!("{} values quantized of {}", self.quantized_values, self.tokens));
        }
        if self.values.len() != self.quantized_values / PAGE_TOKENS {
            return Err(format!("{} pages of {} values", self.values.len(), self.quantized_values));
        }
        let mut sealed = self.keys.iter().chain(&self.values);
        if !sealed.all(|codes| codes.numbers.iter().all(|x| x.is_finite())) {
            return Err("a scale or smallest number is not finite".into());
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
