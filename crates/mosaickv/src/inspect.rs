//! `mosaickv inspect`: what was chosen where?

mod layered;
mod packed;

use crate::answer::bar;
use crate::budget::{self, BudgetArgs};
use crate::{ModelArgs, calibrate, fetch, read_document};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mosaickv_eval::report::{mosaic, pixels, profiles};
use mosaickv_kv::{KvCache, KvFormat, Layered};
use mosaickv_model::{Sequence, Specials};
use mosaickv_server::saved::{self, Home, SavedError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    mosaickv inspect --model smollm2-135m --file book.txt\n  \
    mosaickv inspect --model smollm2-135m --file book.txt --kv packed:segment=1024 --svg mosaic.svg --json\n  \
    mosaickv inspect --model smollm2-135m --file book.txt --kv layered:8 --svg profiles.svg --png profiles.png\n  \
    mosaickv inspect --model smollm2-135m --context contexts/book.context --svg book.svg")]
pub struct InspectArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to read
    #[arg(long, value_name = "DOC", required_unless_present = "context")]
    file: Option<PathBuf>,
    /// A context that a server has saved, in place of a text: nothing is read again, and --kv says nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["file", "kv_budget", "allow_drop", "select", "tokens"])]
    context: Option<PathBuf>,
    /// A layered format, or a packed one (smaller segments show more) [default: layered]
    #[arg(long, env = "MOSAICKV_KV")]
    kv: Option<KvFormat>,
    #[command(flatten)]
    budget: BudgetArgs,
    /// Tokens of the text to read [default: as many as the model takes]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: Option<u32>,
    /// Write a picture by layers and KV heads: segments along the tokens, or pages by importance
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write the same picture in pixels, twice as many each way
    #[arg(long, value_name = "FILE")]
    png: Option<PathBuf>,
    /// Print every segment or page as a JSON line instead of tables
    #[arg(long)]
    json: bool,
}

pub fn inspect(args: &InspectArgs) -> Result<()> {
    if let Some(path) = &args.context {
        return show(args, &of_context(args, path)?);
    }
    let format = args.budget.format(args.kv)?;
    ensure!(
        matches!(format, KvFormat::Packed(_) | KvFormat::Layered(_)),
        "--kv {format}: only packed and layered formats choose anything; name one of them"
    );
    let file = args.file.as_ref().expect("required without a context");
    let document = read_document(file)?;
    let pool = args.model.threads.pool();
    let (model, text) = args.model.load(&pool, &[format])?;
    let mut tokens = text.encode(&document, Specials::Literal)?;
    let most = args.tokens.map_or(model.context(), |most| (most as usize).min(model.context()));
    if tokens.len() > most {
        eprintln!("the first {most} of {} tokens (context {})", tokens.len(), model.context());
        tokens.truncate(most);
    }
    let mut sequence = Sequence::new(&model, &pool, format)?;
    let bar = bar("reading", "layers");
    let read = sequence.prefill(&tokens, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    read?;
    show(args, sequence.cache())?;
    if let Some(missed) = budget::missed(sequence.cache()) {
        eprintln!("{missed}");
    }
    Ok(())
}

/// The cache of a saved context of the model.
fn of_context(args: &InspectArgs, path: &Path) -> Result<KvCache> {
    let longest = std::fs::metadata(path)
        .with_context(|| format!("cannot read the context {}", path.display()))?
        .len() as usize;
    let weights = calibrate::weights_name(&fetch::resolve(&args.model.model)?)?;
    let (model, _) = args.model.load(&args.model.threads.pool(), &[KvFormat::Layered(Layered::default())])?;
    let read = saved::read(path, &Home::new(&model, weights, longest));
    let hint = match &read {
        Err(SavedError::OtherModel { .. }) => "; give the --model and the --calibration that its server had",
        _ => "",
    };
    let read = read.with_context(|| format!("cannot read the context {}{hint}", path.display()));
    Ok(read?.1.cache)
}

/// Prints what the cache chose, and draws it if that was asked for.
fn show(args: &InspectArgs, cache: &KvCache) -> Result<()> {
    let (tokens, head_dim) = (cache.tokens(), cache.shape().head_dim);
    let (segments, heads) = (cache.segments(), cache.layered_heads());
    if segments.is_empty() && heads.is_empty() {
        bail!(
            "{tokens} tokens, all of them exact: too few to be compressed, or kept in a format that chooses nothing"
        );
    }
    let mut out = io::stdout().lock();
    if args.json {
        segments.iter().try_for_each(|segment| writeln!(out, "{}", packed::line(segment)))?;
        layered::lines(&heads, &mut out)?;
    } else {
        if heads.is_empty() {
            packed::print(&segments, head_dim, &mut out)?;
        } else {
            layered::print(&heads, head_dim, &mut out)?;
        }
        let (bytes, exact) = (cache.bytes().total(), cache.shape().exact_bytes(tokens));
        writeln!(
            out,
            "\n{tokens} tokens, {}: {:.2} MB in all, {:.2} MB as exact f16: ratio {:.2}",
            cache.format(),
            bytes as f64 / 1e6,
            exact as f64 / 1e6,
            exact as f64 / bytes as f64
        )?;
    }
    if args.svg.is_none() && args.png.is_none() {
        return Ok(());
    }
    let svg = match heads.is_empty() {
        true => mosaic::svg(&segments, tokens, head_dim),
        false => profiles::svg(&heads, head_dim),
    };
    let svg = svg.map_err(anyhow::Error::msg)?;
    let write = |path: &Path, bytes: &[u8]| {
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("picture in {}", path.display());
        anyhow::Ok(())
    };
    if let Some(path) = &args.svg {
        write(path, svg.as_bytes())?;
    }
    if let Some(path) = &args.png {
        write(path, &pixels::png(&svg).map_err(anyhow::Error::msg)?)?;
    }
    Ok(())
}
