//! How does a page survive outside of memory?
//!
//! Little-endian: magic `MKVP`, version, `D`, `C`, `r` as u16, `g` and block as u8, tokens as u16, then the
//! page's words without the load padding. Input is untrusted: the header bounds the length before anything is
//! allocated, and every vector is checked for what the kernels rely on.

use super::{BLOCKS, LOAD_PADDING, Layout, PAGE_TOKENS, PackedError, PackedPage, PackedShape};
use half::f16;

const MAGIC: [u8; 4] = *b"MKVP";
const VERSION: u16 = 1;
const HEADER: usize = 16;

// Bitmaps are read as bytes of the words, so words in memory and bytes outside have one order.
const _: () = assert!(cfg!(target_endian = "little"), "packed pages are written as they lie in memory");

impl PackedPage {
    /// The page as bytes that [`Self::from_bytes`] reads on any machine.
    pub fn to_bytes(&self) -> Vec<u8> {
        let words = &self.words[..self.layout().words()];
        let mut out = Vec::with_capacity(HEADER + 2 * words.len());
        out.extend(MAGIC);
        for x in [VERSION, self.shape.head_dim, self.shape.channels, self.shape.kept] {
            out.extend(x.to_le_bytes());
        }
        out.extend([self.shape.group, self.block]);
        out.extend(self.tokens.to_le_bytes());
        out.extend(bytemuck::cast_slice::<u16, u8>(words));
        out
    }

    /// Reads what [`Self::to_bytes`] wrote. Anything else is an error: another version, a length that does not
    /// match, a bitmap of the wrong number of bits, an element that is not finite.
    pub fn from_bytes(bytes: &[u8]) -> Result<PackedPage, PackedError> {
        let layout = header(bytes)?;
        let n = layout.words();
        let wanted = HEADER + 2 * n;
        if bytes.len() != wanted {
            return Err(PackedError::Length { got: bytes.len(), wanted });
        }
        let mut words = vec![0; n + LOAD_PADDING];
        bytemuck::cast_slice_mut::<u16, u8>(&mut words[..n]).copy_from_slice(&bytes[HEADER..]);
        let page = PackedPage {
            shape: layout.shape,
            block: layout.block as u8,
            tokens: layout.tokens as u16,
            words: words.into(),
        };
        page.check()?;
        Ok(page)
    }

    fn check(&self) -> Result<(), PackedError> {
        let (layout, shape) = (self.layout(), self.shape);
        let bytes = bytemuck::cast_slice::<u16, u8>(&self.words);
        let groups = shape.channels() / shape.group();
        let mut vector = 0;
        for rows in layout.all_rows() {
            for i in 0..rows.n {
                let bitmap = &bytes[rows.bitmap(i, shape)];
                let bits: u32 = bitmap.iter().map(|b| b.count_ones()).sum();
                let past = (bitmap.len() * 8 - groups) as u32;
                let last = bitmap[bitmap.len() - 1];
                if bits as usize != shape.kept() / shape.group() || last.leading_zeros() < past {
                    return Err(PackedError::Bitmap { vector });
                }
                let elements = &self.words[rows.elements(i, shape)];
                if !elements.iter().all(|&x| f16::from_bits(x).is_finite()) {
                    return Err(PackedError::NotFinite { vector });
                }
                vector += 1;
            }
        }
        // An odd number of bitmap bytes leaves one of a word unused, only behind the block keys.
        let keys = layout.block_keys();
        let unused = keys.bitmap(keys.n, shape).start..2 * shape.words_of(keys.n);
        if bytes[unused].iter().any(|&b| b != 0) { Err(PackedError::Padding) } else { Ok(()) }
    }
}

/// The layout that a header announces.
fn header(bytes: &[u8]) -> Result<Layout, PackedError> {
    let Some(header) = bytes.get(..HEADER) else {
        return Err(PackedError::Length { got: bytes.len(), wanted: HEADER });
    };
    let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    if header[..4] != MAGIC || word(4) != VERSION {
        return Err(PackedError::Format);
    }
    let [head_dim, channels, kept] = [6, 8, 10].map(|at| usize::from(word(at)));
    let ([group, block], tokens) = ([12, 13].map(|at| usize::from(header[at])), usize::from(word(14)));
    let shape = PackedShape::new(head_dim, channels, kept, group)?;
    if !BLOCKS.contains(&block) {
        return Err(PackedError::Shape { what: "block", got: block, wanted: "4, 8 or 16" });
    }
    if tokens == 0 || tokens > PAGE_TOKENS || !tokens.is_multiple_of(block) {
        let wanted = "a multiple of block, 4..=512";
        return Err(PackedError::Shape { what: "tokens", got: tokens, wanted });
    }
    Ok(Layout { shape, block, tokens })
}
