//! `mosaickv inspect`: which strategy was chosen where?

use crate::answer::bar;
use crate::{ModelArgs, read_document};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mosaickv_eval::report::mosaic;
use mosaickv_kv::{KvFormat, SegmentInfo};
use mosaickv_model::{Sequence, Specials};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    mosaickv inspect --model smollm2-135m --file book.txt\n  \
    mosaickv inspect --model smollm2-135m --file book.txt --kv packed:segment=1024 --svg mosaic.svg --json")]
pub struct InspectArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to read
    #[arg(long, value_name = "DOC")]
    file: PathBuf,
    /// A packed format; smaller segments show more
    #[arg(long, default_value = "packed", env = "MOSAICKV_KV")]
    kv: KvFormat,
    /// Tokens of the text to read [default: as many as the model takes]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: Option<u32>,
    /// Write a picture, segments along the tokens by layers and KV heads
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print every segment as a JSON line instead of tables
    #[arg(long)]
    json: bool,
}

pub fn inspect(args: &InspectArgs) -> Result<()> {
    ensure!(matches!(args.kv, KvFormat::Packed(_)), "--kv {}: only packed formats have segments", args.kv);
    let document = read_document(&args.file)?;
    let pool = args.model.threads.pool();
    let (model, text) = args.model.load(&pool, &[args.kv])?;
    let mut tokens = text.encode(&document, Specials::Literal)?;
    let most = args.tokens.map_or(model.context(), |most| (most as usize).min(model.context()));
    if tokens.len() > most {
        eprintln!("the first {most} of {} tokens (context {})", tokens.len(), model.context());
        tokens.truncate(most);
    }
    let mut sequence = Sequence::new(&model, &pool, args.kv)?;
    let bar = bar("reading", "layers");
    let read = sequence.prefill(&tokens, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    read?;
    let cache = sequence.cache();
    let segments = cache.segments();
    if segments.is_empty() {
        bail!("{} tokens are too few: sinks and update buffer hold all of them", tokens.len());
    }
    let mut out = io::stdout().lock();
    if args.json {
        for segment in &segments {
            writeln!(out, "{}", line(segment))?;
        }
    } else {
        print(&segments, cache.shape().head_dim, &mut out)?;
        let (bytes, exact) = (cache.bytes().total(), cache.shape().exact_bytes(tokens.len()));
        writeln!(
            out,
            "\n{} tokens, {}: {:.2} MB in all, {:.2} MB as exact f16: ratio {:.2}",
            tokens.len(),
            args.kv,
            bytes as f64 / 1e6,
            exact as f64 / 1e6,
            exact as f64 / bytes as f64
        )?;
    }
    if let Some(path) = &args.svg {
        let svg = mosaic::svg(&segments, tokens.len(), cache.shape().head_dim).map_err(anyhow::Error::msg)?;
        std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("picture in {}", path.display());
    }
    Ok(())
}

fn line(s: &SegmentInfo) -> serde_json::Value {
    json!({
        "layer": s.layer, "head": s.head, "first": s.first, "tokens": s.tokens, "kept": s.kept,
        "channels": s.channels, "group": s.group, "block": s.block, "loss": s.loss, "bytes": s.bytes,
        "temporary": s.temporary,
    })
}

/// How often each strategy was chosen, and the mean of what was chosen by layer.
fn print(segments: &[SegmentInfo], head_dim: usize, out: &mut impl Write) -> io::Result<()> {
    let rate = |s: &SegmentInfo| 100.0 * (1.0 - s.kept as f64 / head_dim as f64);
    let mut strategies: BTreeMap<(usize, usize, usize), Vec<&SegmentInfo>> = BTreeMap::new();
    let mut layers: BTreeMap<usize, Vec<&SegmentInfo>> = BTreeMap::new();
    for segment in segments {
        strategies.entry((segment.kept, segment.group, segment.block)).or_default().push(segment);
        layers.entry(segment.layer).or_default().push(segment);
    }
    let mean = |of: &[&SegmentInfo], what: &dyn Fn(&SegmentInfo) -> f64| {
        let tokens: usize = of.iter().map(|s| s.tokens).sum();
        of.iter().map(|s| what(s) * s.tokens as f64).sum::<f64>() / tokens as f64
    };
    let bytes = |of: &[&SegmentInfo]| of.iter().map(|s| s.bytes).sum::<usize>() as f64 / 1e6;
    writeln!(out, "{:>8}{:>8}{:>8}{:>11}{:>9}{:>10}", "rate", "group", "block", "segments", "loss", "MB")?;
    for ((_, group, block), of) in &strategies {
        writeln!(
            out,
            "{:>7.1}%{group:>8}{block:>8}{:>11}{:>9.3}{:>10.2}",
            rate(of[0]),
            of.len(),
            mean(of, &|s| f64::from(s.loss)),
            bytes(of)
        )?;
    }
    writeln!(
        out,
        "\n{:>8}{:>8}{:>8}{:>8}{:>11}{:>9}{:>10}",
        "layer", "rate", "group", "block", "segments", "loss", "MB"
    )?;
    for (layer, of) in &layers {
        writeln!(
            out,
            "{layer:>8}{:>7.1}%{:>8.2}{:>8.2}{:>11}{:>9.3}{:>10.2}",
            mean(of, &rate),
            mean(of, &|s| s.group as f64),
            mean(of, &|s| s.block as f64),
            of.len(),
            mean(of, &|s| f64::from(s.loss)),
            bytes(of)
        )?;
    }
    Ok(())
}
