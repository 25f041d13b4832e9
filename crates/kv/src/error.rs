//! What can be wrong with a cache, or with what is asked of it?

use crate::{KvShape, MOST_QUERIES};
use mosaickv_kernels::exact::HEAD_DIM_STEP;
use mosaickv_kernels::packed::PackedError;

/// Why a cache can't be made or go on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum KvError {
    /// The shape is none that the kernels take.
    #[error(
        "unsupported attention shape: {heads} query heads, {kv_heads} KV heads, head_dim {head_dim}; wanted \
         query heads a multiple of KV heads (at most {MOST_QUERIES} times), and a head_dim that is a positive multiple of {HEAD_DIM_STEP}"
    )]
    Shape {
        /// `H`
        heads: usize,
        /// `G`
        kv_heads: usize,
        /// `D`
        head_dim: usize,
    },
    /// A cache of another model.
    #[error("a cache of the shape {got:?}; this model's is {wanted:?}")]
    OtherShape {
        /// The cache's.
        got: KvShape,
        /// The model's.
        wanted: KvShape,
    },
    /// A sliding window in which a query would not see itself, or a period of no layers.
    #[error("a sliding window of 0 tokens, or full attention every 0 layers; wanted at least 1 of each")]
    Window,
    /// The strategy can't be had for this shape.
    #[error("strategy: {0}")]
    Strategy(#[from] PackedError),
    /// The format's parameters are none that it can have, or do not fit the model.
    #[error("KV format {format}: {why}")]
    Format {
        /// As it was asked for.
        format: String,
        /// The parameter or the model's number that does not fit, and what would.
        why: String,
    },
    /// A compressed copy of a cache whose layers are not exact any more.
    #[error(
        "layer {layer} of this cache is compressed already; make the copy from a cache in the format exact"
    )]
    AlreadyCompressed {
        /// The first such layer.
        layer: usize,
    },
    /// The format is made from the newest queries, which this cache did not remember.
    #[error(
        "{format} observes the newest {wanted} queries of a prompt, but layer {layer} remembers {got}; call \
         remember_queries before the prompt is read"
    )]
    NoQueries {
        /// As it was asked for.
        format: String,
        /// Which layer.
        layer: usize,
        /// Queries needed.
        wanted: usize,
        /// Queries that are there.
        got: usize,
    },
    /// The format needs a calibration of the model, and there is none.
    #[error(
        "{format} stores what a calibration of the model tells it to, and this model has none; run `mosaickv calibrate`"
    )]
    NoCalibration {
        /// As it was asked for.
        format: String,
    },
    /// A calibration of a model of another shape.
    #[error(
        "a calibration of {got} heads of {got_dim} channels in {got_layers} layers; wanted {wanted} of {head_dim} in {layers}"
    )]
    Calibration {
        /// Heads that it has.
        got: usize,
        /// Layers that it has.
        got_layers: usize,
        /// Channels of its heads; 0 if they differ, or there are none.
        got_dim: usize,
        /// Heads that the cache has.
        wanted: usize,
        /// Layers that the cache has.
        layers: usize,
        /// `D` of the cache.
        head_dim: usize,
    },
    /// A GPU can't be used, or has no room.
    #[error(transparent)]
    Device(#[from] mosaickv_kernels::cuda::Error),
    /// Something that kernels for GPUs are not there for.
    #[error("{what} is {got}, and a GPU attends to {wanted}; use --device cpu")]
    NotOnDevice {
        /// What it is.
        what: &'static str,
        /// What it is like.
        got: String,
        /// What there are kernels for.
        wanted: &'static str,
    },
    /// A key or value is NaN or infinite; nothing was stored.
    #[error(
        "layer {layer} computed keys or values that are not finite; the model's weights are damaged, or its \
         activations exceed f32"
    )]
    NotFinite {
        /// Which layer.
        layer: usize,
    },
    /// [`KvCache::check`](crate::KvCache::check) found a broken invariant: a bug of ours.
    #[error("cache integrity, layer {layer}, KV head {head}: {what}")]
    Integrity {
        /// Which layer.
        layer: usize,
        /// Which KV head.
        head: usize,
        /// The invariant and the numbers.
        what: String,
    },
}
