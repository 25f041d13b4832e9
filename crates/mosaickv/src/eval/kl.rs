//! `mosaickv eval kl`: next-token distributions on texts, and on needles hidden in them.

use super::{RunArgs, Work, digest, measure};
use crate::prefill::PrefillKv;
use anyhow::{Result, bail};
use clap::Args;
use mosaickv_eval::{Document, Layers, Run};
use mosaickv_kernels::matrix::Precision;
use std::path::PathBuf;

#[derive(Args)]
#[command(
    after_help = "Each text's first --prefix tokens are read exactly once; every format then predicts the next \
    --score tokens\nfrom a compressed copy of that cache.\n\nExamples:\n  \
    mosaickv eval kl --model smollm2-135m --text novel.txt --kv exact,q8_0,packed,packed:kept=0.5\n  \
    mosaickv eval kl --model smollm2-135m --text a.txt b.txt --ask 8 --kv exact,layered,snapkv -o kl.jsonl\n  \
    mosaickv eval kl --model smollm2-135m --text novel.txt --each-layer --kv packed"
)]
pub struct KlArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Texts to predict
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Tokens read exactly, then compressed
    #[arg(long, default_value_t = 3072, value_parser = clap::value_parser!(u32).range(1..))]
    prefix: u32,
    /// Tokens predicted after them
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    score: u32,
    /// Also hide N needles in each text's prefix and ask for them after compression
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u32).range(..=64))]
    ask: u32,
    /// What the needles depend on
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Compress one layer at a time, the others staying exact: a row for each
    #[arg(long, conflicts_with = "ask")]
    each_layer: bool,
}

pub fn kl(args: &KlArgs) -> Result<()> {
    if args.run.prefill_kv != PrefillKv::Exact {
        bail!(
            "--prefill-kv {}: here --prefix says after how many tokens a text is compressed",
            args.run.prefill_kv
        );
    }
    let texts = args.text.iter().map(|path| crate::read_document(path)).collect::<Result<Vec<_>>>()?;
    let names: Vec<String> =
        args.text.iter().map(|p| p.file_name().unwrap_or(p.as_os_str()).to_string_lossy().into()).collect();
    if let Some(name) = names.iter().enumerate().find_map(|(i, n)| names[..i].contains(n).then_some(n)) {
        bail!("two texts are called {name}; give each a file name of its own, as rows are named by it");
    }
    let loaded = args.run.load()?;
    let formats = args.run.kv.0.clone();
    let (layers, rows_per_text) = match args.each_layer {
        true => (Layers::Each, loaded.model.config.layers),
        false => (Layers::All, 1 + args.ask as usize),
    };
    let work = Work {
        settings: args.run.settings(
            "kl",
            &loaded,
            &formats,
            &[
                ("text", names.join(" ")),
                ("text digest", digest(texts.iter().map(String::as_str))),
                ("prefix", args.prefix.to_string()),
                ("score", args.score.to_string()),
                ("ask", args.ask.to_string()),
                ("layers", if args.each_layer { "each" } else { "all" }.to_owned()),
                ("seed", if args.ask > 0 { args.seed.to_string() } else { "none".to_owned() }),
            ],
        ),
        args: &args.run,
        units: texts.len(),
        rows_per_unit: formats.len() * rows_per_text,
        unit: "texts",
    };
    let mut run = Run::new(&loaded.model, &loaded.text, &loaded.pool, &formats);
    // 8-bit activations turn the smallest difference in the cache into a KL of some 0.003 nats: more than q8_0 costs.
    run.precision = Precision::Full;
    let document = |i: usize| Document {
        name: &names[i],
        content: &texts[i],
        prefix: args.prefix as usize,
        score: args.score as usize,
    };
    for i in 0..texts.len() {
        run.tokens(document(i))?;
    }
    measure(&work, &mut run, &mut |run, i| {
        let document = document(i);
        let mut rows = run.kl(document, layers)?;
        if args.ask > 0 {
            rows.extend(run.ask(document, args.ask as usize, args.seed)?);
        }
        Ok(rows)
    })
}
