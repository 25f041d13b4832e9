//! Packed pages out of vectors in the device's memory, to the bit as [`PackedPage::encode`](crate::packed::PackedPage::encode) makes them out of the same
//! rotated vectors.

use super::{MOST_ROWS, Segment, channels, turn_shared};
use crate::cuda::device::{Buffer, Error, Kernel};
use crate::cuda::encode::Vectors;
use crate::cuda::parameters::{PackedEncodeParameters, PackedRotateParameters};

const ROTATE: [Kernel; 2] =
    [Kernel { name: "packed_rotate_64", threads: 192 }, Kernel { name: "packed_rotate_128", threads: 384 }];
const ENCODE: [Kernel; 2] =
    [Kernel { name: "packed_encode_64", threads: 256 }, Kernel { name: "packed_encode_128", threads: 256 }];
/// Warps of a block that encodes, each of which has a vector in shared memory.
const WARPS: usize = 8;

impl Segment {
    /// Adds tokens: rotates and packs their vectors, which are the model's. `T` is a multiple of the token block.
    pub fn encode(&mut self, vectors: Vectors) -> Result<(), Error> {
        let [keys, values] = self.rotate(vectors)?;
        self.encode_rotated(Vectors { keys: &keys, values: &values, ..vectors })
    }

    /// Keys and values in the segment's channels, `[T, C]`.
    pub fn rotate(&self, vectors: Vectors) -> Result<[Buffer; 2], Error> {
        let Vectors { keys, values, tokens, head_dim: d } = vectors;
        assert_eq!(d, self.head_dim(), "vectors of another width");
        assert!(keys.bytes().min(values.bytes()) >= tokens * d * 4, "vectors are not [{tokens}, {d}]");
        let turn = |from: &Buffer, (matrix, transposed): (&Buffer, i32)| -> Result<Buffer, Error> {
            let out = self.gpu.alloc(tokens * channels(d) * 4)?;
            let parameters = PackedRotateParameters {
                vectors: from.address(),
                matrix: matrix.address(),
                out: out.address(),
                tokens: tokens as i32,
                transposed,
            };
            let kernel = ROTATE[usize::from(d == 128)];
            let grid = tokens.div_ceil(MOST_ROWS).min(self.gpu.full_grid(kernel, turn_shared(d))?).max(1);
            // SAFETY: vectors and their rotated ones have as many tokens, and the matrix is one of the rotation's.
            unsafe { self.gpu.launch(kernel, (grid, turn_shared(d)), &parameters) }?;
            Ok(out)
        };
        Ok([turn(keys, (&self.rotation.keys, 0))?, turn(values, (&self.rotation.outputs, 1))?])
    }

    /// The same with vectors `[T, C]` that are rotated already. Elements must be numbers.
    pub fn encode_rotated(&mut self, vectors: Vectors) -> Result<(), Error> {
        let Vectors { keys, values, tokens, head_dim: d } = vectors;
        let (c, blocks) = (channels(d), tokens / self.block());
        assert_eq!(d, self.head_dim(), "vectors of another width");
        assert!(
            tokens > 0 && tokens.is_multiple_of(self.block()),
            "{tokens} tokens in blocks of {}",
            self.block()
        );
        assert!(keys.bytes().min(values.bytes()) >= tokens * c * 4, "vectors are not [{tokens}, {c}]");
        self.reserve(blocks)?;
        let pages = self.gpu.upload(&self.pages().collect::<Vec<u64>>())?;
        let parameters = PackedEncodeParameters {
            keys: keys.address(),
            values: values.address(),
            pages: pages.address(),
            first: self.blocks() as u32,
            blocks: blocks as u32,
            strategy: self.strategy(),
            unused: 0,
        };
        let kernel = ENCODE[usize::from(d == 128)];
        // SAFETY: one block for each token block, for which there is room in the pages, and of which there are vectors.
        unsafe { self.gpu.launch(kernel, (blocks, WARPS * c * 4), &parameters) }?;
        self.add(blocks);
        Ok(())
    }
}
