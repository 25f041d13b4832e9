//! The README's one command: a real model, a long real document, two questions, both caches.

use crate::ThreadArgs;
use crate::answer::{Answer, Asked, answer, prompt};
use crate::bill::Bill;
use crate::budget::BudgetArgs;
use crate::calibrate::load_for;
use crate::fetch::{self, ALIAS};
use anyhow::{Result, bail};
use clap::Args;
use mosaickv_kv::KvFormat;
use std::io::{self, Write};
use std::path::PathBuf;

/// An excerpt of several thousand tokens, public domain; `demo/README.md` tells which.
pub const DOCUMENT: &str = include_str!("../demo/document.txt");

const QUESTIONS: [&str; 2] = [
    "What was the name of the professor of Low Dutch and High German?",
    "According to the text, the English were preceded in the whale fishery by whom?",
];

/// Longest answer.
const MAX_TOKENS: usize = 48;

#[derive(Args)]
#[command(after_help = "Examples:\n  mosaickv demo --threads 4\n  mosaickv demo --kv-budget 16MB")]
pub struct DemoArgs {
    /// A GGUF file, a safetensors folder, smollm2-135m, gemma3-270m, or, built with --features hub, owner/name:file
    #[arg(long, default_value = ALIAS, env = "MOSAICKV_MODEL")]
    model: String,
    /// What `mosaickv calibrate` wrote, for the layered format [default: learnt once from texts in this program]
    #[arg(long, value_name = "FILE", env = "MOSAICKV_CALIBRATION")]
    calibration: Option<PathBuf>,
    #[command(flatten)]
    threads: ThreadArgs,
    /// The compressed cache to show beside the exact one [default: layered]
    #[arg(long)]
    kv: Option<KvFormat>,
    #[command(flatten)]
    budget: BudgetArgs,
}

pub fn demo(args: &DemoArgs) -> Result<()> {
    let compressed = args.budget.format(args.kv)?;
    if compressed == KvFormat::Exact {
        bail!("--kv exact would compare the exact cache with itself; leave it out, or give layered:4");
    }
    let pool = args.threads.pool();
    let path = fetch::resolve(&args.model)?;
    let (model, text) = load_for((&path, args.calibration.as_deref()), &pool, &[compressed])?;
    let mut out = io::stdout().lock();
    writeln!(out, "document: {} words. Every answer reads it anew.", DOCUMENT.split_whitespace().count())?;
    for question in QUESTIONS {
        writeln!(out, "\nQ: {question}")?;
        let prompt = prompt((&model, &text), (Some(DOCUMENT), question), MAX_TOKENS)?;
        let mut bills = vec![];
        for kv in [KvFormat::Exact, compressed] {
            // Written with the first piece: a progress bar would wipe it from the line.
            let mut label = format!("  {:<8}", kv.name());
            let asked = Asked { prompt: &prompt, format: kv, max_tokens: MAX_TOKENS };
            let Answer { bill, .. } = answer(&model, &text, &pool, &asked, &mut |piece| {
                write!(out, "{}{}", std::mem::take(&mut label), piece.replace('\n', " "))?;
                Ok(out.flush()?)
            })?;
            writeln!(out)?;
            bills.push(bill);
        }
        write!(out, "\n{}", side_by_side(&bills[0], &bills[1]))?;
        if let Some(missed) = &bills[1].budget_missed {
            writeln!(out, "  {missed}")?;
        }
    }
    Ok(())
}

/// Two bills as a table.
fn side_by_side(a: &Bill, b: &Bill) -> String {
    let mb = |bytes: f64| format!("{:.2} MB", bytes / 1e6);
    let maybe = |x: Option<f64>, show: &dyn Fn(f64) -> String| x.map_or("-".to_owned(), show);
    let row =
        |name: &str, show: &dyn Fn(&Bill) -> String| format!("  {name:<28}{:>14}{:>14}\n", show(a), show(b));
    [
        row("", &|x| x.kv.split(':').next().unwrap_or_default().to_owned()),
        row("prompt + output tokens", &|x| format!("{} + {}", x.prompt_tokens, x.output_tokens)),
        row("time to first token", &|x| format!("{:.2} s", x.ttft_s)),
        row("time between tokens", &|x| maybe(x.tbt_s, &|s| format!("{:.2} ms", s * 1e3))),
        row("tokens/s", &|x| maybe(x.tokens_per_s, &|r| format!("{r:.1}"))),
        row("KV bytes stored", &|x| mb(x.kv_bytes as f64)),
        row("the same as exact f16", &|x| mb(x.kv_bytes_exact_f16 as f64)),
        row("ratio", &|x| format!("{:.2}", x.ratio)),
        row("bits a scalar", &|x| format!("{:.2}", x.bits_per_scalar)),
        row("KV bytes read a step", &|x| maybe(x.kv_bytes_read_per_step, &mb)),
        row("attention's share of a step", &|x| maybe(x.attention_share, &|s| format!("{:.0} %", s * 100.0))),
    ]
    .concat()
}
