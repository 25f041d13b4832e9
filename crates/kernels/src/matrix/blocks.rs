//! What do the bytes of one quantized block in a model file mean?
//!
//! Every quantized type is read into the same shape: unsigned codes and the scales that belong to them. Nothing
//! here knows how the codes are stored afterwards. Source of the layouts: ggml, `ggml-common.h` and
//! `ggml-quants.c` (MIT).

use super::MatrixError;
use half::f16;

/// How a tensor's bytes are laid out in a model file: ggml's block formats, and plain little-endian floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// 32 elements, `d (q - 8)`, q of 4 bits.
    Q4_0,
    /// 32 elements, `d q + m`, q of 4 bits.
    Q4_1,
    /// 32 elements, `d (q - 16)`, q of 5 bits.
    Q5_0,
    /// 32 elements, `d q + m`, q of 5 bits.
    Q5_1,
    /// 32 elements, `d q`, q a signed byte.
    Q8_0,
    /// 256 elements, `d s q - e m`, q of 4 bits, s and m of 6 bits for each 32.
    Q4K,
    /// 256 elements, `d s q - e m`, q of 5 bits, s and m of 6 bits for each 32.
    Q5K,
    /// 256 elements, `d s (q - 32)`, q of 6 bits, s a signed byte for each 16.
    Q6K,
}

impl BlockType {
    /// Elements of a block: a row's length is a multiple of it.
    pub fn block_elements(self) -> usize {
        match self {
            BlockType::F32 | BlockType::F16 | BlockType::Bf16 => 1,
            BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q5_0 | BlockType::Q5_1 | BlockType::Q8_0 => 32,
            BlockType::Q4K | BlockType::Q5K | BlockType::Q6K => 256,
        }
    }

    /// Bytes of a block in the file.
    pub fn block_bytes(self) -> usize {
        match self {
            BlockType::F32 => 4,
            BlockType::F16 | BlockType::Bf16 => 2,
            BlockType::Q4_0 => 18,
            BlockType::Q4_1 => 20,
            BlockType::Q5_0 => 22,
            BlockType::Q5_1 => 24,
            BlockType::Q8_0 => 34,
            BlockType::Q4K => 144,
            BlockType::Q5K => 176,
            BlockType::Q6K => 210,
        }
    }
}

/// One quantized block as it was read. What a type does not have stays zero; types of 32 elements use the front
/// of `codes`. An 8-bit code is stored with 128 added, so that every code is unsigned.
pub(super) struct Block {
    pub scale: f16,
    /// The block's minimum, or the scale of `mins`.
    pub min: f16,
    /// Factors of `scale`: one for each 32 elements, or for each 16 in Q6_K.
    pub scales: [i8; 16],
    /// Factors of `min`, which is subtracted: one for each 32 elements.
    pub mins: [i8; 8],
    pub codes: [u8; 256],
}

impl Block {
    pub fn empty() -> Block {
        Block { scale: f16::ZERO, min: f16::ZERO, scales: [0; 16], mins: [0; 8], codes: [0; 256] }
    }

    /// Reads one block of a quantized type. `row` is for the error's sake.
    pub fn read(&mut self, ty: BlockType, bytes: &[u8], row: usize) -> Result<(), MatrixError> {
        assert_eq!(bytes.len(), ty.block_bytes(), "bytes of one block of {ty:?}");
        match ty {
            BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q5_0 | BlockType::Q5_1 => {
                self.read_small(ty, bytes)
            }
            BlockType::Q8_0 => {
                self.scale = half_at(bytes, 0);
                for (code, &byte) in self.codes.iter_mut().zip(&bytes[2..]) {
                    *code = byte ^ 0x80;
                }
            }
            BlockType::Q4K | BlockType::Q5K => self.read_nested(ty, bytes),
            BlockType::Q6K => self.read_q6k(bytes),
            BlockType::F32 | BlockType::F16 | BlockType::Bf16 => {
                unreachable!("{ty:?} has no quantized blocks")
            }
        }
        if self.scale.is_finite() && self.min.is_finite() {
            Ok(())
        } else {
            Err(MatrixError::NotFinite { row })
        }
    }

    fn read_small(&mut self, ty: BlockType, bytes: &[u8]) {
        let with_min = matches!(ty, BlockType::Q4_1 | BlockType::Q5_1);
        let fifth_bit = matches!(ty, BlockType::Q5_0 | BlockType::Q5_1);
        self.scale = half_at(bytes, 0);
        let mut at = 2;
        if with_min {
            self.min = half_at(bytes, 2);
            at += 2;
        }
        let mut high = 0;
        if fifth_bit {
            high = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            at += 4;
        }
        for (j, &byte) in bytes[at..].iter().enumerate() {
            self.codes[j] = byte & 15 | ((high >> j & 1) as u8) << 4;
            self.codes[j + 16] = byte >> 4 | ((high >> (j + 16) & 1) as u8) << 4;
        }
    }

    fn read_nested(&mut self, ty: BlockType, bytes: &[u8]) {
        self.scale = half_at(bytes, 0);
        self.min = half_at(bytes, 2);
        let packed = &bytes[4..16];
        for j in 0..8 {
            let (scale, min) = if j < 4 {
                (packed[j] & 63, packed[j + 4] & 63)
            } else {
                (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
            };
            (self.scales[j], self.mins[j]) = (scale as i8, min as i8);
        }
        let (high, low) = bytes[16..].split_at(if ty == BlockType::Q5K { 32 } else { 0 });
        for (c, code) in self.codes.iter_mut().enumerate() {
            let (pair, odd, l) = (c / 64, c / 32 % 2, c % 32);
            *code = low[32 * pair + l] >> (4 * odd) & 15;
            if ty == BlockType::Q5K {
                *code |= (high[l] >> (c / 32) & 1) << 4;
            }
        }
    }

    fn read_q6k(&mut self, bytes: &[u8]) {
        self.scale = half_at(bytes, 208);
        for (scale, &byte) in self.scales.iter_mut().zip(&bytes[192..208]) {
            *scale = byte as i8;
        }
        for (c, code) in self.codes.iter_mut().enumerate() {
            let (half, quarter, l) = (c / 128, c / 32 % 4, c % 32);
            let low = bytes[64 * half + 32 * (quarter % 2) + l] >> (4 * (quarter / 2)) & 15;
            let high = bytes[128 + 32 * half + l] >> (2 * quarter) & 3;
            *code = low | high << 4;
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}
