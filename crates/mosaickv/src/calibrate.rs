//! What the layered format must know of a model, from a file or learnt here.
//!
//! `mosaickv calibrate` learns it from texts and writes it to a file. Commands that are asked for the format without such a
//! file learn it from the texts in this program, once, and keep it in the cache folder.

use crate::fetch;
use crate::{ModelArgs, answer, read_document};
use anyhow::{Context, Result, bail};
use clap::Args;
use mosaickv_kernels::Pool;
use mosaickv_kv::{Calibration, KvFormat};
use mosaickv_model::calibrate::{calibrate, load, recipe, save};
use mosaickv_model::{Model, Text};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// What is learnt from where nobody gives texts: prose, verse and speech out of copyright, and a program.
const TEXTS: [&str; 4] = [
    include_str!("../calibration/emma.txt"),
    include_str!("../calibration/thursday.txt"),
    include_str!("../calibration/hamlet.txt"),
    include_str!("../../../scripts/llama_reference.py"),
];

/// Tokens of each text that are read.
const TOKENS: usize = 2048;

#[derive(Args)]
#[command(after_help = "Example:\n  \
    mosaickv calibrate --model model.gguf --text novel.txt,program.rs -o model.calibration.safetensors\n  \
    mosaickv run --model model.gguf --calibration model.calibration.safetensors --kv layered:8 --file book.txt \"Who?\"")]
pub struct CalibrateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Texts to learn from: a few documents of the kind that will be read [default: four texts in this program]
    #[arg(long, value_name = "FILE", value_delimiter = ',', num_args = 1..)]
    text: Vec<PathBuf>,
    /// Tokens of each text that are read
    #[arg(long, default_value_t = TOKENS as u32, value_parser = clap::value_parser!(u32).range(256..=8192))]
    tokens: u32,
    /// The file to write
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
}

/// `mosaickv calibrate`
pub fn command(args: &CalibrateArgs) -> Result<()> {
    let documents: Vec<String> = match args.text.is_empty() {
        true => TEXTS.map(str::to_owned).to_vec(),
        false => args.text.iter().map(|path| read_document(path)).collect::<Result<_>>()?,
    };
    let folder = args.out.parent().filter(|folder| !folder.as_os_str().is_empty());
    if folder.is_some_and(|folder| !folder.is_dir()) {
        bail!("there is no folder for {}; make it first", args.out.display());
    }
    let pool = args.model.threads.pool();
    let (model, text) = answer::load(&args.model.model)?;
    let start = Instant::now();
    let calibration = learn((&model, &text), &pool, &documents, args.tokens as usize)?;
    save(&calibration, &args.out)?;
    println!(
        "{}: {} heads, {:.1} MB, from {} texts in {:.1} s",
        args.out.display(),
        calibration.heads.len(),
        calibration.bytes() as f64 / 1e6,
        documents.len(),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The model at `path`, ready for these formats.
pub fn load_for(
    (path, file): (&Path, Option<&Path>),
    pool: &Pool,
    formats: &[KvFormat],
) -> Result<(Model, Text)> {
    let (mut model, text) = answer::load_from(path)?;
    attach((&mut model, &text), pool, (path, file), formats)?;
    Ok((model, text))
}

/// Gives the model a calibration if one of the formats needs it: the file's, or that of the cache folder, or one that
/// is learnt now and put there, if there is such a folder. `path` is the model's.
pub fn attach(
    (model, text): (&mut Model, &Text),
    pool: &Pool,
    (path, file): (&Path, Option<&Path>),
    formats: &[KvFormat],
) -> Result<()> {
    if !formats.iter().any(|format| matches!(format, KvFormat::Layered(_))) {
        return Ok(());
    }
    if let Some(file) = file {
        model.calibration = Some(Arc::new(load(file, model.kv_shape())?));
        return Ok(());
    }
    let kept = fetch::calibration_path(&key(path)?);
    if let Ok(kept) = &kept
        && kept.is_file()
    {
        match load(kept, model.kv_shape()) {
            Ok(calibration) => {
                model.calibration = Some(Arc::new(calibration));
                return Ok(());
            }
            Err(error) => tracing::warn!("{error}; learning it again"),
        }
    }
    let documents = TEXTS.map(str::to_owned);
    let calibration = learn((model, text), pool, &documents, TOKENS)?;
    match kept.map_err(anyhow::Error::from).and_then(|kept| keep(&calibration, kept)) {
        Ok(kept) => eprintln!("calibrated for the layered format, kept in {}", kept.display()),
        Err(error) => {
            tracing::warn!(
                "calibrated for the layered format, this time only, as it can't be kept: {error:#}"
            );
        }
    }
    model.calibration = Some(Arc::new(calibration));
    Ok(())
}

/// Puts what was learnt where it is looked for.
fn keep(calibration: &Calibration, path: PathBuf) -> Result<PathBuf> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    save(calibration, &path)?;
    Ok(path)
}

/// What a calibration from the texts in this program depends on, in 16 hexadecimal digits: the model, the texts, and how
/// they are learnt from.
fn key(path: &Path) -> Result<String> {
    let mut sha = Sha256::new();
    sha.update(weights_digest(path)?);
    sha.update(recipe());
    sha.update((TOKENS as u64).to_le_bytes());
    sha.update(TEXTS.concat());
    Ok(hex(&sha.finalize(), 16))
}

fn learn(
    (model, text): (&Model, &Text),
    pool: &Pool,
    documents: &[String],
    tokens: usize,
) -> Result<Calibration> {
    let mut encoded = Vec::with_capacity(documents.len());
    for document in documents {
        let mut ids = text.encode_plain(document)?;
        ids.truncate(tokens.min(model.context()));
        if ids.len() < 256 {
            bail!("a text of {} tokens is too short to learn from; wanted at least 256", ids.len());
        }
        encoded.push(ids);
    }
    let bar = answer::bar("calibrating", "layers");
    let calibration = calibrate(model, pool, &encoded, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    Ok(calibration?)
}

/// The file, or those of the folder by name.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    files.retain(|file| file.is_file());
    files.sort();
    Ok(files)
}

fn open(file: &Path) -> Result<File> {
    File::open(file).with_context(|| format!("cannot read {}", file.display()))
}

/// Of the lengths of the model's files and of eight pieces of each, evenly spaced from its beginning to its end, which are 8 MiB
/// altogether: of a fine-tuned model's file the beginning, which has names and shapes, is that of the model it came from.
fn weights_digest(path: &Path) -> Result<Vec<u8>> {
    const PIECES: u64 = 8;
    let files = files(path)?;
    let most = (8 << 20) / PIECES / files.len().max(1) as u64;
    let mut sha = Sha256::new();
    let mut piece = vec![];
    for file in files {
        let mut open = open(&file)?;
        let length = open.metadata()?.len();
        sha.update(length.to_le_bytes());
        for i in 0..PIECES {
            open.seek(SeekFrom::Start(length.saturating_sub(most) * i / (PIECES - 1)))?;
            piece.clear();
            open.by_ref().take(most).read_to_end(&mut piece)?;
            sha.update(&piece);
        }
    }
    Ok(sha.finalize().to_vec())
}

/// The same for people, as hexadecimal digits.
pub fn weights_name(path: &Path) -> Result<String> {
    Ok(hex(&weights_digest(path)?, 32))
}

/// A digest of the beginnings and lengths of the model's files.
pub fn files_digest(path: &Path) -> Result<String> {
    const MOST: u64 = 1 << 20;
    let mut sha = Sha256::new();
    for file in files(path)? {
        let open = open(&file)?;
        sha.update(file.file_name().unwrap_or_default().as_encoded_bytes());
        sha.update(open.metadata()?.len().to_le_bytes());
        let mut bytes = Vec::new();
        open.take(MOST).read_to_end(&mut bytes)?;
        sha.update(&bytes);
    }
    Ok(hex(&sha.finalize(), 8))
}

/// The first `digits` hexadecimal digits, an even number.
pub fn hex(digest: &[u8], digits: usize) -> String {
    digest.iter().take(digits / 2).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_weights_have_another_digest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let digest = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            weights_digest(&path).unwrap()
        };
        let mut bytes = vec![7; 40 << 20];
        let first = digest(&bytes);
        assert_eq!(first, digest(&bytes));
        let last = bytes.len() - 1;
        for at in [0, last, last / 7 * 3 + 1000] {
            bytes[at] ^= 1;
            assert_ne!(digest(&bytes), first, "a change at {at}");
            bytes[at] ^= 1;
        }
        assert_eq!(digest(&bytes), first);
        assert_eq!(weights_digest(folder.path()).unwrap(), first, "the one file of a folder");
        bytes.push(7);
        assert_ne!(digest(&bytes), first, "one byte more");
        assert_ne!(digest(b"a"), digest(b"b"), "files smaller than a piece");
    }
}
