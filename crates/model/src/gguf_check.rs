//! Can this GGUF file be trusted with memory? Every count, length, offset and size of its header is held against the
//! file's size before anything is allocated for it.
//!
//! The reader behind it (candle) checks most lengths too, but multiplies dimensions without overflow checks, divides
//! by the alignment that the file names, and lets tensors overlap, so that a small file could ask for any amount of
//! memory. Layout: the GGUF specification, versions 2 and 3, little-endian.

use std::collections::HashSet;
use std::io::{BufReader, Read, Seek, SeekFrom};

use crate::ModelError;

const MOST_ENTRIES: u64 = 1 << 16; // metadata keys; tensors
const LONGEST_NAME: u64 = 1 << 12;
const LONGEST_TEXT: u64 = 1 << 24; // one metadata string: chat templates are the longest
const MOST_ELEMENTS: u64 = 1 << 22; // of all metadata lists together: 32 bytes each once read

const STRING: u32 = 8;
const LIST: u32 = 9;

/// Reads the header and refuses a file whose lengths cannot be true. Leaves the reader at the file's start.
pub(crate) fn check<R: Read + Seek>(reader: &mut R) -> Result<(), ModelError> {
    let unreadable = |e: std::io::Error| ModelError::Gguf { what: e.to_string(), at: 0 };
    let size = reader.seek(SeekFrom::End(0)).map_err(unreadable)?;
    reader.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    let mut header = Header { reader: BufReader::new(&mut *reader), at: 0, size, elements: 0, alignment: 32 };
    header.check()?;
    reader.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    Ok(())
}

struct Header<R: Read + Seek> {
    reader: BufReader<R>,
    at: u64,
    size: u64,
    elements: u64, // of metadata lists so far
    alignment: u64,
}

impl<R: Read + Seek> Header<R> {
    fn check(&mut self) -> Result<(), ModelError> {
        if &self.take::<4>()? != b"GGUF" {
            return Err(self.wrong("the file does not begin with \"GGUF\""));
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(self.wrong(format!("GGUF version {version}, wanted 2 or 3 (little-endian)")));
        }
        let tensors = self.count("tensors", MOST_ENTRIES)?;
        let keys = self.count("metadata entries", MOST_ENTRIES)?;
        for _ in 0..keys {
            self.entry()?;
        }
        let mut names = HashSet::new();
        let mut spans = Vec::new();
        for _ in 0..tensors {
            let (name, span) = self.tensor()?;
            spans.push(span);
            if !names.insert(name) {
                return Err(self.wrong("two tensors of the same name"));
            }
        }
        self.check_spans(spans)
    }

    fn entry(&mut self) -> Result<(), ModelError> {
        let key = self.name()?;
        let kind = self.u32()?;
        if key == b"general.alignment" {
            if kind != 4 {
                return Err(self.wrong("general.alignment is not a u32"));
            }
            self.alignment = u64::from(self.u32()?);
            if !(self.alignment.is_power_of_two() && self.alignment <= 1 << 16) {
                return Err(self.wrong(format!("alignment {}, wanted a power of two", self.alignment)));
            }
            return Ok(());
        }
        match kind {
            STRING => self.skip_text(),
            LIST => self.list(),
            _ => {
                let size = self.scalar(kind)?;
                self.skip(size)
            }
        }
    }

    fn list(&mut self) -> Result<(), ModelError> {
        let kind = self.u32()?;
        let count = self.u64()?;
        self.elements = self.elements.saturating_add(count);
        if self.elements > MOST_ELEMENTS {
            return Err(self.wrong(format!("metadata lists of over {MOST_ELEMENTS} elements")));
        }
        match kind {
            STRING => (0..count).try_for_each(|_| self.skip_text()),
            LIST => Err(self.wrong("a list of lists")),
            _ => {
                let size = self.scalar(kind)?;
                self.skip(size * count)
            }
        }
    }

    /// Name, offset within the data, and size in bytes.
    fn tensor(&mut self) -> Result<(Vec<u8>, (u64, u64)), ModelError> {
        let name = self.name()?;
        let shown = String::from_utf8_lossy(&name).into_owned();
        let rank = self.u32()?;
        if rank > 4 {
            return Err(self.wrong(format!("tensor {shown} has {rank} dimensions, wanted at most 4")));
        }
        let mut elements = 1u64;
        let mut row = 1;
        for dimension in 0..rank {
            let length = self.u64()?;
            if dimension == 0 {
                row = length;
            }
            elements = elements
                .checked_mul(length)
                .filter(|&n| n > 0 && n <= 1 << 40)
                .ok_or_else(|| self.wrong(format!("tensor {shown} has no elements or too many")))?;
        }
        let (block, bytes) =
            block(self.u32()?).map_err(|got| ModelError::TensorType { name: shown.clone(), got })?;
        if row % block != 0 {
            return Err(self.wrong(format!("tensor {shown} has rows of {row} elements in blocks of {block}")));
        }
        let offset = self.u64()?;
        if offset % self.alignment != 0 {
            return Err(
                self.wrong(format!("tensor {shown} at offset {offset}, not a multiple of the alignment"))
            );
        }
        Ok((name, (offset, elements / block * bytes)))
    }

    /// Every tensor inside the file, none over another.
    fn check_spans(&self, mut spans: Vec<(u64, u64)>) -> Result<(), ModelError> {
        let data = self.at.div_ceil(self.alignment) * self.alignment;
        let available = self.size.saturating_sub(data);
        spans.sort_unstable();
        let mut end = 0;
        for (offset, size) in spans {
            if offset < end {
                return Err(self.wrong(format!("two tensors share the bytes at offset {offset}")));
            }
            end = offset.saturating_add(size);
            if end > available {
                let what =
                    format!("a tensor ends at byte {end} of {available} there are: the file is cut short");
                return Err(self.wrong(what));
            }
        }
        Ok(())
    }

    fn name(&mut self) -> Result<Vec<u8>, ModelError> {
        let length = self.length(LONGEST_NAME)?;
        let mut bytes = vec![0; length as usize];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn skip_text(&mut self) -> Result<(), ModelError> {
        let length = self.length(LONGEST_TEXT)?;
        self.skip(length)
    }

    fn length(&mut self, most: u64) -> Result<u64, ModelError> {
        let length = self.u64()?;
        if length > most.min(self.size - self.at) {
            return Err(self.wrong(format!("a text of {length} bytes")));
        }
        Ok(length)
    }

    fn count(&mut self, what: &str, most: u64) -> Result<u64, ModelError> {
        let count = self.u64()?;
        if count > most {
            Err(self.wrong(format!("{count} {what}, wanted at most {most}")))
        } else {
            Ok(count)
        }
    }

    fn scalar(&self, kind: u32) -> Result<u64, ModelError> {
        match kind {
            0 | 1 | 7 => Ok(1),
            2 | 3 => Ok(2),
            4..=6 => Ok(4),
            10..=12 => Ok(8),
            other => Err(self.wrong(format!("metadata of unknown type {other}"))),
        }
    }

    fn u32(&mut self) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ModelError> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn read(&mut self, into: &mut [u8]) -> Result<(), ModelError> {
        self.reader.read_exact(into).map_err(|_| self.wrong("the file ends within its header"))?;
        self.at += into.len() as u64;
        Ok(())
    }

    fn skip(&mut self, bytes: u64) -> Result<(), ModelError> {
        if bytes > self.size - self.at {
            return Err(self.wrong("the file ends within its header"));
        }
        self.reader.seek_relative(bytes as i64).map_err(|e| self.wrong(e.to_string()))?;
        self.at += bytes;
        Ok(())
    }

    fn wrong(&self, what: impl Into<String>) -> ModelError {
        ModelError::Gguf { what: what.into(), at: self.at }
    }
}

/// Elements and bytes of a block of the ggml types that candle reads; the name of every other.
fn block(ggml_type: u32) -> Result<(u64, u64), String> {
    Ok(match ggml_type {
        0 => (1, 4),      // F32
        1 | 30 => (1, 2), // F16, BF16
        2 => (32, 18),    // Q4_0
        3 => (32, 20),    // Q4_1
        6 => (32, 22),    // Q5_0
        7 => (32, 24),    // Q5_1
        8 => (32, 34),    // Q8_0
        10 => (256, 84),  // Q2_K
        11 => (256, 110), // Q3_K
        12 => (256, 144), // Q4_K
        13 => (256, 176), // Q5_K
        14 => (256, 210), // Q6_K
        other => return Err(other_type(other)),
    })
}

fn other_type(ggml_type: u32) -> String {
    let name = match ggml_type {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24..=28 => "whole numbers or F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("ggml type {ggml_type}"),
    };
    name.to_owned()
}
