//! What was chosen where? The segments of a packed cache, as figures.

use crate::{KvCache, Layer};

/// A segment of one layer and KV head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SegmentInfo {
    /// Which layer.
    pub layer: usize,
    /// Which KV head.
    pub head: usize,
    /// Position of its first token.
    pub first: usize,
    /// Tokens.
    pub tokens: usize,
    /// Elements kept of each vector, of `head_dim`.
    pub kept: usize,
    /// Channels that are stored, of `head_dim`.
    pub channels: usize,
    /// Neighbouring channels that are kept or dropped together.
    pub group: usize,
    /// Tokens of a token block.
    pub block: usize,
    /// Compression loss when the strategy was chosen: what is not stored of the keys' variance and of the values' energy,
    /// mean of both.
    pub loss: f32,
    /// Bytes allocated: pages, lists, and the rotation where it is its own.
    pub bytes: usize,
    /// Whether it waits for a strategy of its own.
    pub temporary: bool,
}

impl KvCache {
    /// The packed segments, by layer, KV head and position; none of layers in other formats.
    pub fn segments(&self) -> Vec<SegmentInfo> {
        let mut out = Vec::new();
        for (layer, heads) in self.layers.iter().enumerate() {
            let Layer::Packed(heads) = heads else { continue };
            for (head, of) in heads.iter().enumerate() {
                let mut first = of.sinks.tokens();
                for (i, segment) in of.segments.iter().enumerate() {
                    let shape = segment.strategy.shape;
                    let borrows = i > 0 && segment.is_like(&of.segments[i - 1]);
                    let rotation = if borrows { 0 } else { segment.rotation.bytes() };
                    out.push(SegmentInfo {
                        layer,
                        head,
                        first,
                        tokens: segment.tokens(),
                        kept: shape.kept(),
                        channels: shape.channels(),
                        group: shape.group(),
                        block: segment.strategy.block,
                        loss: segment.loss,
                        bytes: segment.packed_bytes() + segment.list_bytes() + rotation,
                        temporary: i >= of.settled(),
                    });
                    first += segment.tokens();
                }
            }
        }
        out
    }
}
