//! Prefill and time between tokens of a real model, at several depths of context.

use super::{Machine, StreamMeter, median, reach, show};
use crate::ModelArgs;
use crate::answer::{MOST_RAW_BYTES, bar};
use crate::bill::peak_rss;
use crate::budget::{self, BudgetArgs};
use crate::demo::DOCUMENT;
use crate::device::DeviceArgs;
use anyhow::{Result, bail};
use clap::Args;
use mosaickv_kernels::Pool;
use mosaickv_kv::{Background, KvCache, KvFormat, KvFormats, Layered, Timing};
use mosaickv_model::{Model, Part, Sequence, Share, Specials, Text, Wanted, greedy, read_each};
use serde::Serialize;
use std::io::{self, StdoutLock, Write};
use std::sync::Arc;
use std::time::Instant;

#[derive(Args)]
#[command(
    after_help = "Columns: TBT is the time between tokens, a step of all sequences; attention its share; flush the part \
    of a step in which one sequence packs the oldest tokens of full update buffers.\n\nExamples:\n  \
    mosaickv bench decode --model smollm2-135m --depth 512,2048,8192 --kv exact,layered --json\n  \
    mosaickv bench decode --model smollm2-135m --depth 4096 --batch 1,4\n  \
    mosaickv bench decode --model smollm2-135m --depth 32768 --batch 4 --stretch --rounds 1\n  \
    mosaickv bench decode --model smollm2-135m --depth 8192 --device cuda"
)]
pub struct DecodeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Tokens in the cache when decoding ends; 0 starts at one token, and measures
    /// next to nothing but the weights
    #[arg(long, value_delimiter = ',', default_values_t = [512, 2048, 8192])]
    depth: Vec<usize>,
    /// KV formats, one or several, as for run [default: exact,layered]
    #[arg(long)]
    kv: Option<KvFormats>,
    #[command(flatten)]
    budget: BudgetArgs,
    /// Sequences that decode together, one number or several; each has read the prompt, in pages of its own
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    batch: Vec<u16>,
    /// Decode steps of a round, the last of which ends at the depth
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    steps: u16,
    /// Rounds of each format at each depth; the median is reported
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Go beyond the model's context, for speed alone: what it says there means nothing
    #[arg(long)]
    stretch: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    machine: Machine,
    rows: Vec<Row>,
    peak_rss_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Row {
    kv: String,
    depth: usize,
    batch: usize,
    prompt_tokens: usize,
    /// Tokens of the prompt to seconds until the first token is known.
    prefill_tokens_per_s: f64,
    ttft_s: f64,
    tbt_ms: f64,
    /// Of all sequences together.
    tokens_per_s: f64,
    /// Likewise.
    kv_bytes: usize,
    /// `None` on a GPU, where neither this nor attention's share is known.
    kv_bytes_read_per_step: Option<f64>,
    attention_share: Option<f64>,
    /// Of one sequence, for packing the oldest tokens of full update buffers: part of the time between tokens.
    flush_us_per_step: f64,
}

pub fn decode(args: &DecodeArgs) -> Result<()> {
    let pool = args.model.threads.pool();
    let formats = args.budget.formats(args.kv.as_ref())?;
    let (mut model, text) = args.model.load(&pool, &formats)?;
    args.device.place(&mut model, &formats)?;
    let deepest = args.depth.iter().copied().max().unwrap_or(0);
    reach(&mut model, (args.stretch, deepest), "depth")?;
    // At least one token must be there to begin with.
    let tokens = tokens(&text, deepest.max(1))?;
    let steps = usize::from(args.steps);
    if let Some(depth) = args.depth.iter().find(|&&depth| depth != 0 && depth <= steps) {
        bail!("depth {depth} can't be reached in {steps} steps; use a larger depth, 0, or fewer --steps");
    }
    let mut stream = StreamMeter::new(&pool);
    let progress = bar("measuring", "runs");
    progress
        .set_length((args.depth.len() * args.batch.len() * formats.len() * usize::from(args.rounds)) as u64);
    let mut rows = vec![];
    for (&depth, &batch) in args.depth.iter().flat_map(|depth| args.batch.iter().map(move |b| (depth, b))) {
        let (prompt, batch) = (&tokens[..depth.saturating_sub(steps).max(1)], usize::from(batch));
        let mut runs = vec![vec![]; formats.len()];
        for _ in 0..args.rounds {
            stream.read();
            for (kv, runs) in formats.iter().zip(&mut runs) {
                runs.push(run((&model, &pool), *kv, (steps, batch), prompt)?);
                progress.inc(1);
            }
        }
        // That a prompt is too short is nothing to say where nobody asked for the format.
        let is_default = args.kv.is_none() && !args.budget.is_given();
        let is_silent = is_default && prompt.len() < Layered::LEAST_TOKENS;
        let missed = runs.iter().flat_map(|runs| &runs[0].missed).filter(|_| !is_silent);
        missed.for_each(|missed| progress.suspend(|| eprintln!("{missed}")));
        let of_format = formats.iter().zip(&runs);
        rows.extend(of_format.map(|(kv, runs)| row(*kv, (depth, prompt.len(), batch), runs)));
    }
    progress.finish_and_clear();
    let machine = Machine::new(&pool, stream.readings);
    let report = Report { model: model.config.name.clone(), machine, rows, peak_rss_bytes: peak_rss() };
    show(&report, args.json, print)
}

#[derive(Clone)]
struct Run {
    ttft: f64,
    tbt: f64,
    attention_share: f64,
    kv_bytes: usize,
    kv_bytes_read: Option<f64>,
    flush: f64,
    /// What is to be said if the prompt did not become what was asked for.
    missed: Option<String>,
}

/// So many that have read the same, each with pages of its own: a clone's are shared, and memory would have to bring them once for all.
fn copies<'a>(
    first: &Sequence,
    (model, pool): (&'a Model, &'a Pool),
    kv: KvFormat,
    count: usize,
) -> Result<Vec<Sequence<'a>>> {
    let mut bytes = vec![];
    if count > 0 {
        first.cache().write(&mut bytes)?;
    }
    let copy = |_| {
        let cache = KvCache::read(&bytes, model.kv_shape(), kv, model.calibration.clone())?;
        Ok(Sequence::with_cache(model, pool, cache)?)
    };
    (0..count).map(copy).collect()
}

/// Has `batch` sequences that have read the prompt, and generates `steps` tokens after it.
fn run(
    (model, pool): (&Model, &Pool),
    kv: KvFormat,
    (steps, batch): (usize, usize),
    prompt: &[u32],
) -> Result<Run> {
    let background = Arc::new(Background::new(1, MOST_RAW_BYTES));
    let (mut sequences, mut next, mut ttft) = (vec![], vec![], 0.0);
    let reads = if kv.can_be_saved() { 1 } else { batch };
    for i in 0..reads {
        let sequence = Sequence::new(model, pool, kv)?;
        let mut sequence = sequence.with_background(Arc::clone(&background), Timing::Live);
        let start = Instant::now();
        next.push(greedy(&sequence.prefill(prompt, &mut |_, _| ())?));
        if i == 0 {
            ttft = start.elapsed().as_secs_f64();
        }
        sequences.push(sequence);
    }
    for copy in copies(&sequences[0], (model, pool), kv, batch - reads)? {
        sequences.push(copy.with_background(Arc::clone(&background), Timing::Live));
        next.push(next[0]);
    }
    let missed = budget::missed(sequences[0].cache());
    let read = |all: &[Sequence]| all.iter().map(Sequence::bytes_read).sum::<Option<u64>>();
    let flush = |all: &[Sequence]| all[0].cache().phases().flush;
    let (attention, before, flushed) = (sequences[0].attention_time(), read(&sequences), flush(&sequences));
    let start = Instant::now();
    for _ in 0..steps {
        let fed = std::mem::take(&mut next);
        let shares = sequences.iter_mut().zip(fed.chunks(1));
        let shares = shares.map(|(sequence, tokens)| Share {
            sequence,
            tokens,
            part: Part::Step,
            wanted: Wanted::Last,
        });
        read_each(&mut shares.collect::<Vec<_>>(), &mut |_, _, logits| next.push(greedy(logits)))?;
    }
    let time = start.elapsed().as_secs_f64();
    Ok(Run {
        ttft,
        tbt: time / steps as f64,
        attention_share: (sequences[0].attention_time() - attention).as_secs_f64() / time,
        kv_bytes: sequences.iter().map(|sequence| sequence.cache().bytes().total()).sum(),
        kv_bytes_read: read(&sequences)
            .zip(before)
            .map(|(after, before)| (after - before) as f64 / steps as f64),
        flush: (flush(&sequences) - flushed).as_secs_f64() / steps as f64,
        missed,
    })
}

fn row(kv: KvFormat, (depth, prompt, batch): (usize, usize, usize), runs: &[Run]) -> Row {
    let middle = |of: &dyn Fn(&Run) -> f64| median(&mut runs.iter().map(of).collect::<Vec<_>>());
    let (ttft, tbt) = (middle(&|r| r.ttft), middle(&|r| r.tbt));
    let mut read: Option<Vec<f64>> = runs.iter().map(|run| run.kv_bytes_read).collect();
    Row {
        kv: kv.to_string(),
        depth,
        batch,
        prompt_tokens: prompt,
        prefill_tokens_per_s: prompt as f64 / ttft,
        ttft_s: ttft,
        tbt_ms: tbt * 1e3,
        tokens_per_s: batch as f64 / tbt,
        kv_bytes: runs[0].kv_bytes,
        kv_bytes_read_per_step: read.as_deref_mut().map(median),
        attention_share: read.map(|_| middle(&|r| r.attention_share)),
        flush_us_per_step: middle(&|r| r.flush) * 1e6,
    }
}

/// `count` tokens of real text, repeated as often as it takes.
fn tokens(text: &Text, count: usize) -> Result<Vec<u32>> {
    let once = text.encode(DOCUMENT, Specials::Literal)?;
    Ok(once.iter().copied().cycle().take(count).collect())
}

fn print(report: &Report, out: &mut StdoutLock) -> io::Result<()> {
    let Machine { stream_gb_s, threads, isa } = &report.machine;
    writeln!(out, "{}; memory stream {stream_gb_s:.1} GB/s, {threads} threads, {isa}\n", report.model)?;
    writeln!(
        out,
        "{:<28}{:>7}{:>7}{:>16}{:>9}{:>9}{:>9}{:>10}{:>14}{:>11}{:>10}",
        "kv",
        "depth",
        "batch",
        "prefill tok/s",
        "TTFT s",
        "TBT ms",
        "tok/s",
        "KV MB",
        "read MB/step",
        "attention",
        "flush us"
    )?;
    for row in &report.rows {
        writeln!(
            out,
            "{:<28}{:>7}{:>7}{:>16.1}{:>9.2}{:>9.2}{:>9.1}{:>10.2}{:>14}{:>11}{:>10.1}",
            row.kv,
            row.depth,
            row.batch,
            row.prefill_tokens_per_s,
            row.ttft_s,
            row.tbt_ms,
            row.tokens_per_s,
            row.kv_bytes as f64 / 1e6,
            row.kv_bytes_read_per_step.map_or("-".into(), |read| format!("{:.2}", read / 1e6)),
            row.attention_share.map_or("-".into(), |share| format!("{:.0}%", share * 100.0)),
            row.flush_us_per_step
        )?;
    }
    if let Some(peak) = report.peak_rss_bytes {
        writeln!(
            out,
            "\nprocess: {:.0} MB at its peak, of which the stream's memory is 537",
            peak as f64 / 1e6
        )?;
    }
    Ok(())
}
