//! Time between tokens of an 8B model's shape on a GPU, at contexts as long as fit: random weights, and caches of random tokens.
//!
//! A prompt is read, compressed and kept as always. Then steps read it as if it were there several times, with memory of its own each time, so
//! that contexts are as long as they are said to be. Host and device do in a step what they do for any model; what comes out means nothing.

use super::median;
use crate::device::MemoryArgs;
use anyhow::{Context, Result};
use clap::Args;
use mosaickv_kernels::Pool;
use mosaickv_kv::{Background, KvFormat, KvFormats, Timing};
use mosaickv_model::device::Pages;
use mosaickv_model::{Model, ModelConfig, Sequence, greedy, step_each};
use serde::Serialize;
use std::io::{self, StdoutLock, Write};
use std::sync::Arc;
use std::time::Instant;

/// Tokens of a page.
const PAGE: usize = 64;

#[derive(Args)]
#[command(
    after_help = "Columns: TBT, the median time between tokens, and its 90th percentile; update and device, of which a step consists, and store, what the host does \
    beside the device; swap, ms that segments swapped in took where there were some: what the step that ended with them and the next were longer than two others; tokens/s of all sequences; KV GB, of their keys and values on the GPU; GPU GB, all that is taken there; upload, the first step, which brings pages to the GPU; TTFT, \
    until the prompt's first token was known, and then until it was compressed. Exact contexts that do not fit are read from pages that all layers share: as many \
    bytes a step, in less memory.\n\nExamples:\n  \
    mosaickv bench gpu --context 32768,131072 --batch 1,4\n  \
    mosaickv bench gpu --context 1048576 --kv layered:8 --batch 1,2,3 --json\n  \
    mosaickv bench gpu --context 262144 --kv exact,packed,packed:selected=0.0625"
)]
pub struct GpuArgs {
    /// Tokens that a step attends to, about
    #[arg(long, value_delimiter = ',', default_values_t = [32768, 131_072, 1_048_576])]
    context: Vec<usize>,
    /// Sequences that decode together
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    batch: Vec<usize>,
    /// KV formats: exact, and layered and packed ones
    #[arg(long, default_value = "exact,layered")]
    kv: KvFormats,
    /// Tokens of the prompt that is read
    #[arg(long, default_value_t = 8192)]
    prompt: usize,
    /// Layers of the model
    #[arg(long, default_value_t = 32)]
    layers: usize,
    /// Steps that are timed, after 8 others
    #[arg(long, default_value_t = 48)]
    steps: usize,
    #[command(flatten)]
    threads: crate::ThreadArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    device: String,
    threads: usize,
    weight_bytes: usize,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    kv: String,
    context: usize,
    batch: usize,
    /// Whether all layers' exact pages were in the same memory.
    shared: bool,
    prompt_tokens: usize,
    /// Until the first token was known, and from then on until the prompt was compressed.
    ttft_s: f64,
    compress_s: f64,
    /// What the GPU holds of all sequences.
    kv_bytes: usize,
    /// Of which libraries, weights and working memory are the rest.
    gpu_bytes: usize,
    /// Of the first step, which brings what was compressed to the GPU.
    upload_s: f64,
    tbt_ms: f64,
    tbt_ms_90: f64,
    /// Means of what a step consists of: bringing the mirrors in line, and the device; and within that what the host does beside it: storing what
    /// was computed, and the mirrors as far as it can.
    update_ms: f64,
    device_ms: f64,
    store_ms: f64,
    /// Steps that ended with segments swapped in, and what that took of all sequences together: by how much such a step and the next were longer than
    /// two medians of the others, mean.
    swaps: usize,
    swap_ms: Option<f64>,
    tokens_per_s: f64,
}

/// `mosaickv bench gpu`
pub fn gpu(args: &GpuArgs) -> Result<()> {
    let pool = args.threads.pool();
    let gpu = args.memory.gpu()?;
    let most = args.context.iter().copied().max().unwrap_or(0) + args.steps + 64;
    let config = ModelConfig::like_8b(args.layers, most);
    let mut report = Report {
        model: config.name.clone(),
        device: gpu.name(),
        threads: pool.threads(),
        weight_bytes: 0,
        rows: vec![],
    };
    for shared in [false, true] {
        let wanted = |kv: &&KvFormat| shared == (**kv == KvFormat::Exact);
        let formats: Vec<&KvFormat> = args.kv.0.iter().filter(wanted).collect();
        if formats.is_empty() {
            continue;
        }
        let pages = if shared { Pages::Shared } else { Pages::OfEachLayer };
        let model = Model::random_on(&gpu, config.clone(), pages)?;
        if report.weight_bytes == 0 {
            report.weight_bytes = model.device.as_ref().map_or(0, |device| device.bytes().weights);
            told(args, |out| head(&report, out))?;
        }
        for kv in formats {
            of_format(args, (&model, &pool), *kv, &mut report.rows)?;
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(())
}

/// Tells what is known at once: who interrupts what takes long keeps it.
fn told(args: &GpuArgs, tell: impl FnOnce(&mut StdoutLock) -> io::Result<()>) -> Result<()> {
    if !args.json {
        let mut out = io::stdout().lock();
        tell(&mut out).and_then(|()| out.flush())?;
    }
    Ok(())
}

fn of_format(
    args: &GpuArgs,
    (model, pool): (&Model, &Pool),
    kv: KvFormat,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let prompt: Vec<u32> = (0..args.prompt as u32).map(|i| i.wrapping_mul(2_654_435_761) % 128_000).collect();
    let background = Arc::new(Background::new(1, usize::MAX));
    // Once to warm up.
    Sequence::new(model, pool, kv)?.prefill(&prompt[..args.prompt.min(2047)], &mut |_, _| ())?;
    let mut first = Sequence::new(model, pool, kv)?.with_background(background, Timing::Fixed);
    let start = Instant::now();
    let share = mosaickv_model::Share {
        sequence: &mut first,
        tokens: &prompt,
        part: mosaickv_model::Part::PromptEnd,
        wanted: mosaickv_model::Wanted::Last,
    };
    mosaickv_model::read_each(&mut [share], &mut |_, _, _| ())?;
    let ttft = start.elapsed().as_secs_f64();
    first.finish_prompt();
    // A copy begins without pages on the GPU, which are not to be counted.
    first = first.clone();
    let compress = start.elapsed().as_secs_f64() - ttft;
    for &context in &args.context {
        for &batch in &args.batch {
            // What does not fit is told, and others are measured.
            let Timed { upload, mut steps, swaps, parts, kv_bytes, gpu_bytes } =
                match time(args, &first, (context, batch)) {
                    Ok(timed) => timed,
                    Err(error) => {
                        eprintln!("--kv {kv}, {context} tokens, batch {batch}: {error:#}");
                        continue;
                    }
                };
            let swap = time_of_swap(&steps, &swaps);
            let tbt = median(&mut steps);
            let row = Row {
                kv: kv.to_string(),
                context,
                batch,
                shared: kv == KvFormat::Exact,
                prompt_tokens: args.prompt,
                ttft_s: ttft,
                compress_s: compress,
                kv_bytes,
                gpu_bytes,
                upload_s: upload,
                tbt_ms: tbt * 1e3,
                tbt_ms_90: steps[steps.len() * 9 / 10] * 1e3,
                update_ms: parts[0] * 1e3,
                device_ms: parts[1] * 1e3,
                store_ms: parts[2] * 1e3,
                swaps: swaps.len(),
                swap_ms: swap.map(|seconds| seconds * 1e3),
                tokens_per_s: batch as f64 / tbt,
            };
            told(args, |out| line(&row, out))?;
            rows.push(row);
        }
    }
    Ok(())
}

struct Timed {
    upload: f64,
    steps: Vec<f64>,
    /// Those after which a segment was swapped in, but for the last.
    swaps: Vec<usize>,
    /// Means of a step's.
    parts: [f64; 3],
    kv_bytes: usize,
    gpu_bytes: usize,
}

/// Steps of so many sequences that go on from `first` as if there were so many tokens.
fn time(args: &GpuArgs, first: &Sequence, (context, batch): (usize, usize)) -> Result<Timed> {
    let device = first.model().device.as_ref().context("a model on a GPU")?;
    // A prompt's newest tokens, which are there once, of 8,192.
    let once = if matches!(first.cache().format(), KvFormat::Packed(_)) { 512 } else { 700 };
    let times = (context as f64 / args.prompt.saturating_sub(once).max(1) as f64).round().max(1.0) as usize;
    let before = context.saturating_sub(args.prompt) / PAGE;
    let stretched = || match first.cache().format() {
        KvFormat::Exact => first.stretched(1, before),
        _ => first.stretched(times, 0),
    };
    let mut sequences: Vec<Sequence> = (0..batch).map(|_| stretched()).collect();
    if first.cache().format() == KvFormat::Exact {
        device.reserve(batch * (before + (args.prompt + args.steps) / PAGE + 2))?;
    }
    let mut next = vec![1u32; sequences.len()];
    let (mut times, mut swaps, mut before) = (vec![], vec![], device.times());
    let swapped = |sequences: &[Sequence]| sequences[0].cache().swaps().swapped;
    for i in 0..args.steps + 8 {
        if i == 8 {
            before = device.times();
        }
        let swapped_before = swapped(&sequences);
        let start = Instant::now();
        let logits = step_each(&mut sequences.iter_mut().collect::<Vec<_>>(), &next)?;
        next = logits.chunks_exact(logits.len() / sequences.len()).map(greedy).collect();
        times.push(start.elapsed().as_secs_f64());
        if i >= 8 && i + 1 < args.steps + 8 && swapped(&sequences) > swapped_before {
            swaps.push(i - 8);
        }
    }
    let after = device.times();
    let parts = [after.update - before.update, after.device - before.device, after.store - before.store];
    let compressed: usize = sequences.iter().map(Sequence::device_bytes).sum();
    Ok(Timed {
        upload: times[0],
        steps: times.split_off(8),
        swaps,
        parts: parts.map(|part| part.as_secs_f64() / args.steps as f64),
        kv_bytes: compressed + device.bytes().exact,
        gpu_bytes: device.used(),
    })
}

/// By how much the steps at `swaps`, none of which is the last, and those after them are longer than two others, mean; nothing unless there are
/// both.
fn time_of_swap(steps: &[f64], swaps: &[usize]) -> Option<f64> {
    let is_other = |i: usize| swaps.iter().all(|swap| i != *swap && i != swap + 1);
    let mut others: Vec<f64> = (0..steps.len()).filter(|i| is_other(*i)).map(|i| steps[i]).collect();
    let around: f64 = swaps.iter().map(|i| steps[*i] + steps[i + 1]).sum();
    let is_told = !swaps.is_empty() && !others.is_empty();
    is_told.then(|| around / swaps.len() as f64 - 2.0 * median(&mut others))
}

fn head(report: &Report, out: &mut StdoutLock) -> io::Result<()> {
    writeln!(
        out,
        "{}, {:.1} GB, on {} with {} threads\n",
        report.model,
        report.weight_bytes as f64 / 1e9,
        report.device,
        report.threads
    )?;
    writeln!(
        out,
        "{:<14}{:>9}{:>7}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>12}{:>10}{:>10}{:>10}{:>9}{:>9}{:>10}",
        "kv",
        "context",
        "batch",
        "TBT ms",
        "90 %",
        "update",
        "device",
        "store",
        "swap",
        "tokens/s",
        "KV GB",
        "GPU GB",
        "upload s",
        "TTFT s",
        "then s",
        "pages"
    )
}

fn line(row: &Row, out: &mut StdoutLock) -> io::Result<()> {
    writeln!(
        out,
        "{:<14}{:>9}{:>7}{:>9.2}{:>9.2}{:>9.2}{:>9.2}{:>9.2}{:>9}{:>12.1}{:>10.2}{:>10.2}{:>10.2}{:>9.2}{:>9.2}{:>10}",
        row.kv,
        row.context,
        row.batch,
        row.tbt_ms,
        row.tbt_ms_90,
        row.update_ms,
        row.device_ms,
        row.store_ms,
        row.swap_ms.map_or("-".to_owned(), |ms| format!("{ms:.2}")),
        row.tokens_per_s,
        row.kv_bytes as f64 / 1e9,
        row.gpu_bytes as f64 / 1e9,
        row.upload_s,
        row.ttft_s,
        row.compress_s,
        if row.shared { "shared" } else { "own" }
    )
}
