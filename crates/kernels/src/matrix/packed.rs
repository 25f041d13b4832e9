//! How do quantized weights lie in memory, so that a vector lane is a row?
//!
//! A **panel** is 16 rows. Along its columns it is cut into **spans** of 32, and those into eight groups of 4: a
//! vector of 16 i32 lanes holds one group, one lane a row, so that a dot product needs no sum across lanes and
//! the 16 scales of a span load as one vector. Spans are stored one after the other, scales before codes: a
//! panel is one stream. Codes of 4, 5 and 6 bits keep their width: the low four bits of groups `g` and `g + 4`
//! share a byte, the bits above them lie in planes of their own.
//!
//! The bytes are the file's, with two exceptions: the 6-bit scales and minima of Q4_K and Q5_K take 8 bits
//! (4.625 and 5.625 bits an element instead of 4.5 and 5.5), and the last panel is filled up with rows of zeros.

use super::MatrixError;
use super::blocks::{Block, BlockType};
use half::f16;

/// Rows of a panel.
pub(super) const ROWS: usize = 16;
/// Columns of a span.
pub(super) const SPAN: usize = 32;

/// Which scales a span has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scales {
    /// An f16 scale each span.
    Span,
    /// An f16 scale and an f16 minimum each span.
    SpanMin,
    /// An f16 scale and scale of minima every 8 spans; an 8-bit factor of both each span.
    NestedMin,
    /// An f16 scale every 8 spans; an 8-bit factor each half span.
    NestedHalf,
}

/// The shape of a panel: blocks of 1 or 8 spans, each with a head; each span with its sides, then its codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Bits of a code: 4, 5, 6 or 8.
    pub bits: usize,
    pub scales: Scales,
}

impl Layout {
    pub const fn of(ty: BlockType) -> Layout {
        let (bits, scales) = match ty {
            BlockType::Q4_0 => (4, Scales::Span),
            BlockType::Q4_1 => (4, Scales::SpanMin),
            BlockType::Q5_0 => (5, Scales::Span),
            BlockType::Q5_1 => (5, Scales::SpanMin),
            BlockType::Q8_0 => (8, Scales::Span),
            BlockType::Q4K => (4, Scales::NestedMin),
            BlockType::Q5K => (5, Scales::NestedMin),
            BlockType::Q6K => (6, Scales::NestedHalf),
            BlockType::F32 | BlockType::F16 | BlockType::Bf16 => panic!("plain floats are not packed"),
        };
        Layout { bits, scales }
    }

    /// Spans of a block.
    pub const fn spans(self) -> usize {
        match self.scales {
            Scales::Span | Scales::SpanMin => 1,
            Scales::NestedMin | Scales::NestedHalf => 8,
        }
    }

    /// Bytes before a block's spans: f16 `[16]` scales, then `[16]` scales of minima.
    pub const fn head_bytes(self) -> usize {
        match self.scales {
            Scales::Span | Scales::SpanMin => 0,
            Scales::NestedMin => 4 * ROWS,
            Scales::NestedHalf => 2 * ROWS,
        }
    }

    /// Bytes before a span's codes: f16 `[16]` scales, then `[16]` minima; or i8 `[16]` factors of the scale,
    /// then `[16]` of the minimum or of the second half's scale.
    pub const fn side_bytes(self) -> usize {
        match self.scales {
            Scales::SpanMin => 4 * ROWS,
            Scales::Span | Scales::NestedMin | Scales::NestedHalf => 2 * ROWS,
        }
    }

    pub const fn span_bytes(self) -> usize {
        self.side_bytes() + ROWS * SPAN * self.bits / 8
    }

    pub const fn block_bytes(self) -> usize {
        self.head_bytes() + self.spans() * self.span_bytes()
    }

    pub const fn has_min(self) -> bool {
        matches!(self.scales, Scales::SpanMin | Scales::NestedMin)
    }

    /// The code that stands for zero where there is no minimum.
    pub const fn zero(self) -> i32 {
        if self.has_min() { 0 } else { 1 << (self.bits - 1) }
    }
}

/// A cache line: what panels are aligned to.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Quantized weights `[rows, cols]` in panels.
pub(super) struct Packed {
    pub ty: BlockType,
    pub rows: usize,
    pub cols: usize,
    lines: Vec<Line>,
}

impl Packed {
    /// Repacks a file's blocks, whose number the caller has checked.
    pub fn from_blocks(ty: BlockType, rows: usize, cols: usize, bytes: &[u8]) -> Result<Packed, MatrixError> {
        let layout = Layout::of(ty);
        let blocks = cols / ty.block_elements();
        let total = rows.div_ceil(ROWS) * blocks * layout.block_bytes();
        let mut packed = Packed { ty, rows, cols, lines: vec![Line([0; 64]); total.div_ceil(64)] };
        let (panel_bytes, row_bytes) = (packed.panel_bytes(), blocks * ty.block_bytes());
        let all: &mut [u8] = packed.bytes_mut();
        let mut block = Block::empty();
        for (r, row) in bytes.chunks_exact(row_bytes).enumerate() {
            let panel = &mut all[r / ROWS * panel_bytes..][..panel_bytes];
            let to = panel.chunks_exact_mut(layout.block_bytes());
            for (from, to) in row.chunks_exact(ty.block_bytes()).zip(to) {
                block.read(ty, from, r)?;
                write_block(layout, &block, r % ROWS, to);
            }
        }
        Ok(packed)
    }

    pub fn layout(&self) -> Layout {
        Layout::of(self.ty)
    }

    /// Bytes of a panel of 16 rows.
    pub fn panel_bytes(&self) -> usize {
        self.cols / self.ty.block_elements() * self.layout().block_bytes()
    }

    /// Bytes of one panel.
    pub fn panel(&self, p: usize) -> &[u8] {
        let size = self.panel_bytes();
        &self.bytes()[p * size..][..size]
    }

    pub fn allocated(&self) -> usize {
        self.lines.capacity() * size_of::<Line>()
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: a `Line` is 64 bytes without padding.
        unsafe {
            std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * size_of::<Line>())
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.lines.len() * size_of::<Line>();
        // SAFETY: a `Line` is 64 bytes without padding, and any bytes are one.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }

    /// Row `r` as f32, each element rounded once.
    pub fn row(&self, r: usize, out: &mut [f32]) {
        let (layout, lane) = (self.layout(), r % ROWS);
        let blocks = self.panel(r / ROWS).chunks_exact(layout.block_bytes());
        let width = layout.spans() * SPAN;
        for (block, out) in blocks.zip(out.chunks_exact_mut(width)) {
            let (head, spans) = block.split_at(layout.head_bytes());
            for (span, out) in spans.chunks_exact(layout.span_bytes()).zip(out.chunks_exact_mut(SPAN)) {
                let (sides, codes) = span.split_at(layout.side_bytes());
                let (scales, min) = lane_scales(layout, head, sides, lane);
                for (c, x) in out.iter_mut().enumerate() {
                    let code = i32::from(code_at(layout.bits, codes, lane, c)) - layout.zero();
                    *x = code as f32 * scales[c / 16] + min;
                }
            }
        }
    }
}

/// Writes one row's block into its lane of a panel's block.
fn write_block(layout: Layout, block: &Block, lane: usize, to: &mut [u8]) {
    let (head, spans) = to.split_at_mut(layout.head_bytes());
    match layout.scales {
        Scales::Span | Scales::SpanMin => {}
        Scales::NestedMin => {
            put_half(head, lane, block.scale);
            put_half(head, ROWS + lane, block.min);
        }
        Scales::NestedHalf => put_half(head, lane, block.scale),
    }
    for (i, span) in spans.chunks_exact_mut(layout.span_bytes()).enumerate() {
        let (sides, codes) = span.split_at_mut(layout.side_bytes());
        match layout.scales {
            Scales::Span => put_half(sides, lane, block.scale),
            Scales::SpanMin => {
                put_half(sides, lane, block.scale);
                put_half(sides, ROWS + lane, block.min);
            }
            Scales::NestedMin => {
                sides[lane] = block.scales[i] as u8;
                sides[ROWS + lane] = block.mins[i] as u8;
            }
            Scales::NestedHalf => {
                sides[lane] = block.scales[2 * i] as u8;
                sides[ROWS + lane] = block.scales[2 * i + 1] as u8;
            }
        }
        for (c, &code) in block.codes[i * SPAN..][..SPAN].iter().enumerate() {
            put_code(layout.bits, codes, lane, c, code);
        }
    }
}

/// Where column `c` of a span lies: its group and its byte in the group's vector.
fn place(lane: usize, c: usize) -> (usize, usize) {
    (c / 4, lane * 4 + c % 4)
}

fn put_code(bits: usize, codes: &mut [u8], lane: usize, c: usize, code: u8) {
    let (group, byte) = place(lane, c);
    if bits == 8 {
        codes[64 * group + byte] = code;
        return;
    }
    let (planes, nibbles) = codes.split_at_mut(64 * (bits - 4));
    nibbles[64 * (group % 4) + byte] |= (code & 15) << (4 * (group / 4));
    if bits > 4 {
        let at = group * (bits - 4);
        planes[64 * (at / 8) + byte] |= code >> 4 << (at % 8);
    }
}

fn code_at(bits: usize, codes: &[u8], lane: usize, c: usize) -> u8 {
    let (group, byte) = place(lane, c);
    if bits == 8 {
        return codes[64 * group + byte];
    }
    let (planes, nibbles) = codes.split_at(64 * (bits - 4));
    let low = nibbles[64 * (group % 4) + byte] >> (4 * (group / 4)) & 15;
    if bits == 4 {
        return low;
    }
    let at = group * (bits - 4);
    low | (planes[64 * (at / 8) + byte] >> (at % 8) & ((1 << (bits - 4)) - 1)) << 4
}

/// The scales of a span's halves and its minimum, for one row.
fn lane_scales(layout: Layout, head: &[u8], sides: &[u8], lane: usize) -> ([f32; 2], f32) {
    let factor = |i: usize| f32::from(sides[i] as i8);
    match layout.scales {
        Scales::Span => ([half_at(sides, lane); 2], 0.0),
        Scales::SpanMin => ([half_at(sides, lane); 2], half_at(sides, ROWS + lane)),
        Scales::NestedMin => {
            ([half_at(head, lane) * factor(lane); 2], -(half_at(head, ROWS + lane) * factor(ROWS + lane)))
        }
        Scales::NestedHalf => {
            let scale = half_at(head, lane);
            ([scale * factor(lane), scale * factor(ROWS + lane)], 0.0)
        }
    }
}

fn put_half(bytes: &mut [u8], at: usize, x: f16) {
    bytes[2 * at..][..2].copy_from_slice(&x.to_ne_bytes());
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_ne_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32()
}
