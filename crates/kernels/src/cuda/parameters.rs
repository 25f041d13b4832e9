//! What do kernels get? The structures of `cuda/parameters.cuh`, which says what they mean.

use bytemuck::{NoUninit, Zeroable};

/// Marks structures of plain numbers without gaps, whose size is that of the kernels'.
macro_rules! plain {
    ($($name:ident: $size:literal),+) => {$(
        // SAFETY: zeros are a value of every number in it.
        unsafe impl Zeroable for $name {}
        // SAFETY: it is `repr(C)`, made of numbers, and the fields' sizes add up to its own, which the assertion holds to the
        // kernels'; gaps are named fields.
        unsafe impl NoUninit for $name {}
        const _: () = assert!(size_of::<$name>() == $size);
    )+};
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct States {
    pub max: u64,
    pub sum: u64,
    pub accumulated: u64,
    pub slots: i32,
    pub unused: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct ExactParameters {
    pub queries: u64,
    pub pool: u64,
    pub lengths: u64,
    pub tables: u64,
    pub states: States,
    pub scale: f32,
    pub sequences: i32,
    pub kv_heads: i32,
    pub rows: i32,
    pub table_stride: i32,
    pub least_part: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct FinishParameters {
    pub states: States,
    pub lengths: u64,
    pub out: u64,
    pub sequences: i32,
    pub kv_heads: i32,
    pub rows: i32,
    pub least_part: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct SketchPage {
    pub leading: u32,
    pub runs: u16,
    pub tokens: u8,
    pub unused: u8,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Tile {
    pub leading: u32,
    pub lines: u32,
    pub key_escapes: u32,
    pub value_escapes: u32,
    pub keys: [u8; 3],
    pub values: [u8; 3],
    pub tokens: u8,
    pub index: u8,
    pub key_count: u16,
    pub value_count: u16,
    pub unused: u32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Head {
    pub leading: u64,
    pub lines: u64,
    pub escapes: u64,
    pub pages: u64,
    pub tiles: u64,
    pub key_mean: u64,
    pub key_spread: u64,
    pub value_mean: u64,
    pub value_spread: u64,
    pub query_rotation: u64,
    pub output_rotation: u64,
    pub page_count: u32,
    pub selectable: u32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Selection {
    pub missed: f32,
    pub relative: f32,
    pub from_tokens: u32,
    pub least_tiles: u32,
    pub one_in: u32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct LayeredParameters {
    pub heads: u64,
    pub queries: u64,
    pub exact: States,
    pub exact_lengths: u64,
    pub turned: u64,
    pub bytes: u64,
    pub steps: u64,
    pub codes: u64,
    pub histogram: u64,
    pub wanted: u64,
    pub wanted_counts: u64,
    pub list: u64,
    pub counts: u64,
    pub states: States,
    pub out: u64,
    pub log_sums: u64,
    pub selection: Selection,
    pub scale: f32,
    pub sequences: i32,
    pub kv_heads: i32,
    pub rows: i32,
    pub rows_stored: i32,
    pub tile_stride: i32,
    pub list_stride: i32,
    pub room_bytes: i32,
    pub least_part: i32,
    pub exact_least_part: i32,
    pub slices: i32,
    pub page_runs: i32,
    pub sketch_stages: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct EncodePage {
    pub leading: u32,
    pub lines: u32,
    pub first: u32,
    pub keys: [u8; 3],
    pub values: [u8; 3],
    pub tokens: u8,
    pub unused: u8,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct EncodeParameters {
    pub keys: u64,
    pub values: u64,
    pub pages: u64,
    pub counts: u64,
    pub leading: u64,
    pub lines: u64,
    pub escapes: u64,
    pub sketch_pages: u64,
    pub tiles: u64,
    pub page_count: i32,
    pub unused: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct CoordinatesParameters {
    pub pool: u64,
    pub table: u64,
    pub order: u64,
    pub matrices: u64,
    pub scales: u64,
    pub out: u64,
    pub tokens: i32,
    pub first: i32,
    pub kv_heads: u16,
    pub head: u16,
    pub unused: u32,
}

plain!(States: 32, ExactParameters: 88, FinishParameters: 64, SketchPage: 8, Tile: 32, Head: 96, Selection: 20, LayeredParameters: 248, EncodePage: 20, EncodeParameters: 80, CoordinatesParameters: 64);

// Of `cuda/packed.cuh` and `cuda/packed_encode.cuh`.

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct PackedStrategy {
    pub kept: u16,
    pub group_bits: u8,
    pub block_bits: u8,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct PackedSegment {
    pub query_rotation: u64,
    pub output_rotation: u64,
    pub first_page: u32,
    pub first_block: u32,
    pub blocks: u32,
    pub strategy: PackedStrategy,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct PackedSlice {
    pub segment: u32,
    pub first_page: u32,
    pub first_block: u32,
    pub blocks: u32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct PackedHead {
    pub segments: u32,
    pub slices: u32,
    pub blocks: u32,
    pub tokens: u32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct PackedParameters {
    pub heads: u64,
    pub segments: u64,
    pub slices: u64,
    pub pages: u64,
    pub queries: u64,
    pub exact: States,
    pub exact_lengths: u64,
    pub turned: u64,
    pub scores: u64,
    pub sums: u64,
    pub keys: u64,
    pub histogram: u64,
    pub candidates: u64,
    pub candidate_counts: u64,
    pub over: u64,
    pub cuts: u64,
    pub list: u64,
    pub runs: u64,
    pub plans: u64,
    pub states: States,
    pub left: States,
    pub out: u64,
    pub scale: f32,
    pub selected: f32,
    pub sequences: i32,
    pub kv_heads: i32,
    pub rows: i32,
    pub rows_stored: i32,
    pub segment_stride: i32,
    pub slice_stride: i32,
    pub page_stride: i32,
    pub block_stride: i32,
    pub list_stride: i32,
    pub score_slot: i32,
    pub attend_slot: i32,
    pub least_part: i32,
    pub exact_least_part: i32,
    pub selecting: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct PackedRotateParameters {
    pub vectors: u64,
    pub matrix: u64,
    pub out: u64,
    pub tokens: i32,
    pub transposed: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct PackedEncodeParameters {
    pub keys: u64,
    pub values: u64,
    pub pages: u64,
    pub first: u32,
    pub blocks: u32,
    pub strategy: PackedStrategy,
    pub unused: u32,
}

plain!(
    PackedStrategy: 4, PackedSegment: 32, PackedSlice: 16, PackedHead: 16, PackedParameters: 312,
    PackedRotateParameters: 32, PackedEncodeParameters: 40
);

// Of `cuda/dense.cuh` and `cuda/prefill.cuh`.

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct EmbedParameters {
    pub table: u64,
    pub tokens: u64,
    pub out: u64,
    pub scale: f32,
    pub vocab: i32,
    pub hidden: i32,
    pub unused: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct NormParameters {
    pub x: u64,
    pub weight: u64,
    pub picked: u64,
    pub out: u64,
    pub eps: f32,
    pub columns: i32,
    pub rows: i32,
    pub unused: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct HeadsParameters {
    pub projected: u64,
    pub bias: u64,
    pub query_norm: u64,
    pub key_norm: u64,
    pub rotations: u64,
    pub rows: u64,
    pub tables: u64,
    pub queries: u64,
    pub pool: u64,
    pub staged: u64,
    pub eps: f32,
    pub query_factor: f32,
    pub heads: i32,
    pub kv_heads: i32,
    pub turned: i32,
    pub interleaved: i32,
    pub table_stride: i32,
    pub row_count: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct GateParameters {
    pub both: u64,
    pub out: u64,
    pub count: i64,
    pub width: i32,
    pub linear: f32,
    pub cubic: f32,
    pub unused: i32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct NarrowParameters {
    pub x: u64,
    pub out: u64,
    pub count: i64,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct PrefillParameters {
    pub queries: u64,
    pub pool: u64,
    pub tables: u64,
    pub spans: u64,
    pub tiles: u64,
    pub out: u64,
    pub scale: f32,
    pub heads: i32,
    pub kv_heads: i32,
    pub table_stride: i32,
}

plain!(EmbedParameters: 40, NormParameters: 48, HeadsParameters: 112, GateParameters: 40, NarrowParameters: 24, PrefillParameters: 64);

// Of `cuda/deliver.cuh`.

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct DeliverPiece {
    pub to: u64,
    pub from: u32,
    pub bytes: u32,
}

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct DeliverParameters {
    pub letter: u64,
}

plain!(DeliverPiece: 16, DeliverParameters: 8);
