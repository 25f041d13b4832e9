//! `mosaickv inspect`: what was chosen where?

mod layered;
mod packed;

use crate::answer::bar;
use crate::budget::{self, BudgetArgs};
use crate::{ModelArgs, read_document};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mosaickv_eval::report::{mosaic, profiles};
use mosaickv_kv::{KvCache, KvFormat};
use mosaickv_model::{Sequence, Specials};
use std::io::{self, Write};
use std::path::PathBuf;

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    mosaickv inspect --model smollm2-135m --file book.txt\n  \
    mosaickv inspect --model smollm2-135m --file book.txt --kv packed:segment=1024 --svg mosaic.svg --json\n  \
    mosaickv inspect --model smollm2-135m --file book.txt --kv layered:8 --svg profiles.svg")]
pub struct InspectArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to read
    #[arg(long, value_name = "DOC")]
    file: PathBuf,
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
    /// Print every segment or page as a JSON line instead of tables
    #[arg(long)]
    json: bool,
}

pub fn inspect(args: &InspectArgs) -> Result<()> {
    let format = args.budget.format(args.kv)?;
    ensure!(
        matches!(format, KvFormat::Packed(_) | KvFormat::Layered(_)),
        "--kv {format}: only packed and layered formats choose anything; name one of them"
    );
    let document = read_document(&args.file)?;
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

/// Prints what the cache chose, and draws it if that was asked for.
fn show(args: &InspectArgs, cache: &KvCache) -> Result<()> {
    let (tokens, head_dim) = (cache.tokens(), cache.shape().head_dim);
    let (segments, heads) = (cache.segments(), cache.layered_heads());
    if segments.is_empty() && heads.is_empty() {
        bail!("{tokens} tokens are too few: all of them stay exact");
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
    if let Some(path) = &args.svg {
        let svg = match heads.is_empty() {
            true => mosaic::svg(&segments, tokens, head_dim),
            false => profiles::svg(&heads, head_dim),
        };
        std::fs::write(path, svg.map_err(anyhow::Error::msg)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("picture in {}", path.display());
    }
    Ok(())
}
