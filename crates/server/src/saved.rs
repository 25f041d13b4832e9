//! A context as a file: what it was made from, its tokens, and its keys and values.
//!
//! `MOSAICKV`, the header's length (8 bytes), the header as JSON, the tokens (4 bytes each), what follows the last one (a byte that says whether it
//! is there, then 4 bytes for each of the vocabulary), the cache as `KvCache::write` writes it, and the SHA-256 of all before. A file is
//! written beside its place and moved there when it is complete, so that what was there stays until then. What is read may be
//! anything: nothing longer than what it may need is read, and nothing is used before the checksum fits.

use mosaickv_engine::Context;
use mosaickv_kernels::saved::{Input, Malformed, write_numbers};
use mosaickv_kv::{Calibration, KvCache, KvFormat, KvShape, ReadError};
use mosaickv_model::{Model, calibrate};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"MOSAICKV";

/// Changes when files of before can't be read any more.
const CODEC: u32 = 1;

/// Bytes of the longest header that is read.
const LONGEST_HEADER: u64 = 256 << 20;

/// What a file says of its context before its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Which version of this layout.
    pub codec: u32,
    /// Of whose weights and calibration the numbers are.
    pub model: Identity,
    /// When it was made, in seconds of Unix time.
    pub created: u64,
    /// As after `--kv`.
    pub kv: String,
    /// How many tokens there are.
    pub tokens: usize,
    /// How many of them were compressed together.
    pub prompt: usize,
    /// What it was made from.
    pub source: Source,
    /// Bytes allocated for its keys and values.
    pub bytes: usize,
    /// Bytes that they would take as f16.
    pub exact_bytes: usize,
}

/// What a context was made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The messages that a conversation begins with.
    Messages(Vec<Value>),
    /// A text, or tokens.
    Prompt,
}

/// Digests of what keys and values depend on beside the tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Of the model's weights.
    pub weights: String,
    /// Of its calibration, if it has one.
    pub calibration: Option<String>,
}

/// What a cache must fit.
#[derive(Clone)]
pub struct Home {
    /// Which model.
    pub identity: Identity,
    /// Its attention.
    pub shape: KvShape,
    /// What the layered format knows of it.
    pub calibration: Option<Arc<Calibration>>,
    /// Its vocabulary.
    pub vocab: usize,
    /// Bytes that all caches may take.
    pub kv_memory: usize,
}

impl Home {
    /// Of a model whose weights' digest is this, or whatever else tells its contexts from another model's.
    pub fn new(model: &Model, weights: String, kv_memory: usize) -> Home {
        Home {
            identity: Identity { weights, calibration: model.calibration.as_deref().map(calibrate::digest) },
            shape: model.kv_shape(),
            calibration: model.calibration.clone(),
            vocab: model.config.vocab,
            kv_memory,
        }
    }
}

/// Why a file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// It can't be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is none, is damaged, or of another version.
    #[error("{0}")]
    Unusable(String),
    /// It is another model's.
    #[error("it was made with {got:?}, and here is {wanted:?}")]
    OtherModel {
        /// The file's.
        got: Identity,
        /// The server's.
        wanted: Identity,
    },
    /// Its numbers are no cache.
    #[error(transparent)]
    Cache(#[from] ReadError),
}

impl From<Malformed> for SavedError {
    fn from(malformed: Malformed) -> SavedError {
        SavedError::Unusable(malformed.to_string())
    }
}

/// Writes and adds up at the same time.
struct Summing<W> {
    out: W,
    sum: Sha256,
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.sum.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes a context to `path`, whose folder is there. Either all of it is there afterwards, or what was there before.
pub fn write(path: &Path, header: &Header, context: &Context) -> Result<(), SavedError> {
    let folder = path.parent().ok_or_else(|| io::Error::other("a path without a folder"))?;
    let file = tempfile::Builder::new().prefix(".unfinished-").tempfile_in(folder)?;
    write_all(file.as_file(), header, context)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    // The new name is on the disk when the folder is.
    File::open(folder)?.sync_all()?;
    Ok(())
}

fn write_all(file: &File, header: &Header, context: &Context) -> io::Result<()> {
    let mut out = Summing { out: BufWriter::with_capacity(1 << 20, file), sum: Sha256::new() };
    let json = serde_json::to_vec(header).map_err(io::Error::other)?;
    out.write_all(MAGIC)?;
    out.write_all(&(json.len() as u64).to_le_bytes())?;
    out.write_all(&json)?;
    write_numbers(&mut out, &context.tokens)?;
    write_numbers(&mut out, &[u8::from(context.logits.is_some())])?;
    write_numbers(&mut out, context.logits.as_deref().unwrap_or_default())?;
    context.cache.write(&mut out)?;
    let Summing { mut out, sum } = out;
    out.write_all(&sum.finalize())?;
    out.flush()
}

/// What a file says of its context. Its numbers are not looked at.
pub fn read_header(path: &Path, home: &Home) -> Result<Header, SavedError> {
    let mut file = BufReader::new(open(path)?);
    let length = begin(&mut file)?;
    let mut json = vec![];
    file.take(length).read_to_end(&mut json)?;
    parse(&json, home)
}

/// All of a file.
pub fn read(path: &Path, home: &Home) -> Result<(Header, Context), SavedError> {
    let file = open(path)?;
    // A cache may be written with a little more than it takes; the rest is what it was made from.
    let most = LONGEST_HEADER + 2 * home.kv_memory as u64;
    let length = file.metadata()?.len();
    if length > most {
        return Err(SavedError::Unusable(format!("it has {length} bytes, and at most {most} are read")));
    }
    let mut bytes = Vec::with_capacity(length as usize);
    file.take(most).read_to_end(&mut bytes)?;
    if !bytes.starts_with(MAGIC) {
        return Err(SavedError::Unusable("it is no saved context".to_owned()));
    }
    let (rest, sum) = bytes
        .split_last_chunk::<32>()
        .ok_or_else(|| SavedError::Unusable(format!("it has {} bytes", bytes.len())))?;
    if Sha256::digest(rest).as_slice() != sum {
        return Err(SavedError::Unusable("its checksum is that of other bytes: it is damaged".to_owned()));
    }
    let mut rest = rest;
    let length = begin(&mut rest)? as usize;
    let json = rest.split_off(..length).ok_or_else(|| SavedError::Unusable("it has no header".to_owned()))?;
    let header = parse(json, home)?;
    let kv: KvFormat = header.kv.parse().map_err(SavedError::Unusable)?;
    let mut input = Input::new(rest);
    let tokens: Vec<u32> = input.numbers(header.tokens)?;
    if let Some(id) = tokens.iter().find(|id| **id as usize >= home.vocab) {
        return Err(SavedError::Unusable(format!("token {id} is none of {}", home.vocab)));
    }
    let logits = match input.number::<u8>()? {
        0 => None,
        _ => Some(input.numbers::<f32>(home.vocab)?),
    };
    if logits.iter().flatten().any(|x| !x.is_finite()) {
        return Err(SavedError::Unusable("logits that are not finite".to_owned()));
    }
    let cache = &rest[rest.len() - input.left()..];
    let cache = KvCache::read(cache, home.shape, kv, home.calibration.clone())?;
    let prompt = header.prompt;
    Ok((header, Context { kv, tokens, prompt, logits, cache }))
}

/// What has no bytes of its own, such as a pipe, is not opened: that would wait for a writer.
fn open(path: &Path) -> Result<File, SavedError> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(SavedError::Unusable("it is no file".to_owned()));
    }
    Ok(File::open(path)?)
}

/// Reads up to the header, whose length comes back.
fn begin(from: &mut impl Read) -> Result<u64, SavedError> {
    let (mut magic, mut length) = ([0; 8], [0; 8]);
    from.read_exact(&mut magic)?;
    if &magic != MAGIC {
        return Err(SavedError::Unusable("it is no saved context".to_owned()));
    }
    from.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > LONGEST_HEADER {
        return Err(SavedError::Unusable(format!("its header has {length} bytes")));
    }
    Ok(length)
}

fn parse(json: &[u8], home: &Home) -> Result<Header, SavedError> {
    let header: Header = serde_json::from_slice(json)
        .map_err(|error| SavedError::Unusable(format!("its header cannot be read: {error}")))?;
    if header.codec != CODEC {
        let why = format!("it has the version {}, and version {CODEC} is read", header.codec);
        return Err(SavedError::Unusable(why));
    }
    let is_layered = header.kv.starts_with("layered");
    let (got, wanted) = (header.model.clone(), home.identity.clone());
    if got.weights != wanted.weights || (is_layered && got.calibration != wanted.calibration) {
        return Err(SavedError::OtherModel { got, wanted });
    }
    Ok(header)
}

impl Header {
    /// Of a context that was just made.
    pub fn new(
        home: &Home,
        context: &Context,
        source: Source,
        created: u64,
        bytes: (usize, usize),
    ) -> Header {
        Header {
            codec: CODEC,
            model: home.identity.clone(),
            created,
            kv: context.kv.to_string(),
            tokens: context.tokens.len(),
            prompt: context.prompt,
            source,
            bytes: bytes.0,
            exact_bytes: bytes.1,
        }
    }
}
