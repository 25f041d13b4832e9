//! Decode attention of every format on synthetic keys and values.
//!
//! A cache of as many layers as exceed every CPU cache is attended to layer by layer, as a decode step does, so
//! bytes come from memory. The memory stream and the formats are timed in turn (A B A B); medians are reported.

use super::{Machine, StreamMeter, median, show};
use crate::ThreadArgs;
use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use mosaickv_kernels::Pool;
use mosaickv_kv::{
    Calibration, HeadCalibration, KvCache, KvFormat, KvFormats, KvShape, Moments, Phases, attend_each,
};
use serde::Serialize;
use std::io::{self, StdoutLock, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Exact bytes that a timed round reads, where 256 layers of the context suffice: many times a last-level cache.
const ROUND_BYTES: usize = 512 << 20;

/// Layers at least: as in a model, a step's working memory is in the CPU's caches from the layer before.
const LEAST_LAYERS: usize = 3;

/// Tokens made and stored at a time.
const FILL_TOKENS: usize = 4096;

/// Queries that a prompt ends with: as many as formats observe that observe the last ones. `layered` samples a whole prompt's
/// attention for what each token matters, and judges by none of so few: all tokens weigh the same, and the bytes go to
/// channels alone. The 131,072 queries of a prompt would take too long here.
const OBSERVED_QUERIES: usize = 32;

/// Tokens from which the layered format's calibration is learnt.
const CALIBRATION_TOKENS: usize = 2048;

/// Seeds of keys, of values, of a prompt's last queries, and of the queries that are timed.
const KEYS: u64 = 1;
const VALUES: u64 = 2;
const PROMPT_QUERIES: u64 = 3;
const QUERIES: u64 = 7;

/// By how much, at most, the log-probability of a token block that was not selected may exceed a selected one's: it is a
/// rounding of f32 scores.
const TIE: f64 = 1e-4;

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    mosaickv bench attention --heads 32 --kv-heads 8 --head-dim 128 --context 4096,32768,131072 --json\n  \
    mosaickv bench attention --context 32768 --batch 1,4 --kv exact,packed,packed:selected=0.0625\n  \
    mosaickv bench attention --context 4096,32768 --kv exact,layered,layered:4\n  \
    mosaickv bench attention --heads 9 --kv-heads 3 --head-dim 64 --kv exact,packed:selected=0.05")]
pub struct AttentionArgs {
    /// Query heads
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    heads: u16,
    /// KV heads
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    kv_heads: u16,
    /// Elements of a head, a multiple of 16
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(16..=512))]
    head_dim: u16,
    /// Tokens in the cache, one or several
    #[arg(long, value_delimiter = ',', default_values_t = [4096, 32768, 131_072])]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    context: Vec<u32>,
    /// Sequences that take a step together, one number or several; each has a cache of its own
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    batch: Vec<u16>,
    /// KV formats, one or several, as for run
    #[arg(long, default_value = "exact,layered")]
    kv: KvFormats,
    /// Timed rounds of each format
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: ThreadArgs,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    kv: String,
    context: usize,
    batch: usize,
    /// One layer's attention for one token of each sequence.
    time_us: f64,
    /// Of keys, values and what selects them, in that time.
    bytes_read: u64,
    gb_s: f64,
    /// `gb_s` to the machine's stream bandwidth in the same rounds.
    bandwidth_share: f64,
    /// Time of `exact` to this one's.
    ratio_to_exact: Option<f64>,
    /// Largest difference from the f64 oracle, relative to the oracle's largest output.
    max_error: f64,
    /// Allocated bytes of one layer in all caches.
    bytes_stored: usize,
    /// Parts of the time, of formats that have them.
    phases: Option<PhasesUs>,
}

/// Means over the rounds.
#[derive(Debug, Serialize)]
struct PhasesUs {
    turn: f64,
    score: f64,
    select: f64,
    attend: f64,
    merge: f64,
}

pub fn attention(args: &AttentionArgs) -> Result<()> {
    let pool = args.threads.pool();
    let mut stream = StreamMeter::new(&pool);
    let mut rows = vec![];
    for &context in &args.context {
        for &batch in &args.batch {
            rows.extend(measure(args, (context as usize, batch.into()), &pool, &mut stream)?);
        }
    }
    let report = Report { machine: Machine::new(&pool, stream.readings), rows };
    show(&report, args.json, print)
}

/// All formats at one context and batch.
fn measure(
    args: &AttentionArgs,
    (context, batch): (usize, usize),
    pool: &Pool,
    stream: &mut StreamMeter,
) -> Result<Vec<Row>> {
    let (heads, kv_heads) = (usize::from(args.heads), usize::from(args.kv_heads));
    let one = KvShape { layers: 1, heads, kv_heads, head_dim: usize::from(args.head_dim), window: None };
    let shape = KvShape {
        layers: ROUND_BYTES.div_ceil(batch * one.exact_bytes(context)).clamp(LEAST_LAYERS, 256),
        ..one
    };
    let formats = &args.kv.0;
    let queries = Synthetic::new(QUERIES).rows(batch, heads, shape.head_dim);
    let mut batches = filled(shape, formats, (context, batch), pool)?;
    let mut errors = vec![];
    for (kv, caches) in formats.iter().zip(&mut batches) {
        let (error, bound) = (max_error(caches, &queries, pool), error_bound(*kv));
        if error.is_nan() || error > bound {
            bail!(
                "{kv} at {context} tokens is off the oracle by {error:.1e}, over the bound of {bound:.0e}: no time is printed"
            );
        }
        errors.push(error);
    }
    let mut times = vec![vec![]; batches.len()];
    let before = stream.readings.len();
    let phases: Vec<Phases> = batches.iter().map(|caches| caches[0].phases()).collect();
    for _ in 0..args.rounds {
        stream.read();
        for (caches, times) in batches.iter_mut().zip(&mut times) {
            times.push(round(caches, &queries, pool));
        }
    }
    let steps = shape.layers * usize::from(args.rounds);
    let bandwidth = median(&mut stream.readings[before..].to_vec());
    let mut rows = vec![];
    for (i, (kv, caches)) in formats.iter().zip(&mut batches).enumerate() {
        let seconds = median(&mut times[i]);
        let phases = PhasesUs::between(phases[i], caches[0].phases(), steps);
        let bytes_read = read_by_one(caches, &queries, pool);
        rows.push(Row {
            kv: kv.to_string(),
            context,
            batch,
            time_us: seconds * 1e6,
            bytes_read,
            gb_s: bytes_read as f64 / seconds / 1e9,
            bandwidth_share: bytes_read as f64 / seconds / bandwidth,
            ratio_to_exact: None,
            max_error: errors[i],
            bytes_stored: caches.iter().map(|cache| cache.bytes().total()).sum::<usize>() / shape.layers,
            phases,
        });
    }
    let exact = rows.iter().find(|row| row.kv == "exact").map(|row| row.time_us);
    rows.iter_mut().for_each(|row| row.ratio_to_exact = exact.map(|exact| exact / row.time_us));
    Ok(rows)
}

/// Largest difference from the oracle, relative to its largest output, at which a time is still printed. What a format
/// rounds in its cache and its queries, the oracle rounds too. Layered attention rounds its weights as well, to 14 bits of a
/// page's largest, and may be off by 3e-4 of the largest value; outputs, means of many tokens, are smaller than values.
fn error_bound(kv: KvFormat) -> f64 {
    match kv {
        KvFormat::Layered(_) => 1e-3,
        _ => 1e-4,
    }
}

impl PhasesUs {
    /// Microseconds a step, if there were any.
    fn between(before: Phases, after: Phases, steps: usize) -> Option<PhasesUs> {
        let mean = |before: Duration, after: Duration| (after - before).as_secs_f64() * 1e6 / steps as f64;
        (before != after).then(|| PhasesUs {
            turn: mean(before.turn, after.turn),
            score: mean(before.score, after.score),
            select: mean(before.select, after.select),
            attend: mean(before.attend, after.attend),
            merge: mean(before.merge, after.merge),
        })
    }
}

/// A batch of caches of each format. Every layer of every cache holds the same tokens, in memory of its own.
fn filled(
    shape: KvShape,
    formats: &[KvFormat],
    (context, batch): (usize, usize),
    pool: &Pool,
) -> Result<Vec<Vec<KvCache>>> {
    let bar = ProgressBar::new((formats.len() * batch * shape.layers) as u64).with_style(
        ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} layers").expect("a valid template"),
    );
    let (mut batches, mut calibration) = (vec![], None);
    for kv in formats {
        bar.set_message(format!("filling {context} tokens, {}", kv.name()));
        let mut caches = vec![];
        for _ in 0..batch {
            let mut cache = KvCache::new(shape, *kv).with_context(|| format!("--kv {kv}"))?;
            if let KvFormat::Layered(_) = kv {
                let calibration = calibration.get_or_insert_with(|| calibrated(shape, pool));
                cache = cache.with_calibration(calibration.clone())?;
            }
            // The layered format compresses all layers when the last one ends its prompt; until then they hold exact pages.
            for layer in 0..shape.layers {
                fill(&mut cache, layer, context, pool)?;
                bar.inc(1);
            }
            cache.check()?;
            caches.push(cache);
        }
        batches.push(caches);
    }
    bar.finish_and_clear();
    Ok(batches)
}

/// What the layered format must know of the synthetic data. Since every layer holds the same tokens, what is learnt of a
/// head is every layer's, in memory of its own as a model's is.
fn calibrated(shape: KvShape, pool: &Pool) -> Arc<Calibration> {
    let KvShape { layers, heads, kv_heads, head_dim: d, .. } = shape;
    let rows = |seed, heads| Synthetic::new(seed).rows(CALIBRATION_TOKENS, heads, d);
    let (keys, values, queries) = (rows(KEYS, kv_heads), rows(VALUES, kv_heads), rows(QUERIES, heads));
    // Vectors `[N, D]` of `per` heads next to each other, of all tokens.
    let of = |rows: &[f32], g: usize, per: usize| -> Vec<f32> {
        let tokens = rows.chunks_exact(rows.len() / CALIBRATION_TOKENS);
        tokens.flat_map(|token| &token[g * per * d..][..per * d]).copied().collect()
    };
    // No matrix follows the attention: an output's error is what it is.
    let identity: Vec<f64> = (0..d * d).map(|i| if i % (d + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let mut learnt: Vec<Option<HeadCalibration>> = vec![None; kv_heads];
    pool.for_each(&mut learnt, |g, head| {
        let mut moments = Moments::new(d);
        moments.add(&of(&keys, g, 1), &of(&values, g, 1), &of(&queries, g, shape.group()));
        *head = Some(moments.learn(&identity));
    });
    let heads: Vec<HeadCalibration> = learnt.into_iter().flatten().collect();
    let heads = std::iter::repeat_n(heads, layers).flatten().collect();
    Arc::new(Calibration { heads, layer_weights: vec![1.0; layers] })
}

/// Reads a prompt of `context` tokens into a layer.
fn fill(cache: &mut KvCache, layer: usize, context: usize, pool: &Pool) -> Result<()> {
    let shape = cache.shape();
    let (mut keys, mut values) = (Synthetic::new(KEYS), Synthetic::new(VALUES));
    for at in (0..context).step_by(FILL_TOKENS) {
        let tokens = FILL_TOKENS.min(context - at);
        let k = keys.rows(tokens, shape.kv_heads, shape.head_dim);
        let v = values.rows(tokens, shape.kv_heads, shape.head_dim);
        cache.append(pool, layer, &k, &v)?;
    }
    // Some formats look at the prompt's last queries.
    let newest = context.min(OBSERVED_QUERIES);
    let queries = Synthetic::new(PROMPT_QUERIES).rows(newest, shape.heads, shape.head_dim);
    cache.attend(pool, layer, &queries, &mut vec![0.0; queries.len()]);
    cache.end_prompt(pool, layer);
    Ok(())
}

/// Seconds that one layer's attention takes for a token of each cache, over all layers.
fn round(caches: &mut [KvCache], queries: &[f32], pool: &Pool) -> f64 {
    let mut out = vec![0.0; queries.len()];
    let layers = caches[0].shape().layers;
    let mut caches: Vec<&mut KvCache> = caches.iter_mut().collect();
    let start = Instant::now();
    for layer in 0..layers {
        attend_each(&mut caches, pool, layer, queries, &mut out);
    }
    start.elapsed().as_secs_f64() / layers as f64
}

/// One token of each cache in the last layer (some formats leave the first ones exact), `[B, H, D]`.
fn attend_last(caches: &mut [KvCache], queries: &[f32], pool: &Pool) -> Vec<f32> {
    let (mut out, layer) = (vec![0.0; queries.len()], caches[0].shape().layers - 1);
    attend_each(&mut caches.iter_mut().collect::<Vec<_>>(), pool, layer, queries, &mut out);
    out
}

fn read_by_one(caches: &mut [KvCache], queries: &[f32], pool: &Pool) -> u64 {
    let read = |caches: &[KvCache]| caches.iter().map(KvCache::bytes_read).sum::<u64>();
    let before = read(caches);
    attend_last(caches, queries, pool);
    read(caches) - before
}

/// Against the oracle, which attends to the same token blocks if they are the best ones: all heads where that is quick,
/// else the first and the last, of the first and the last cache.
fn max_error(caches: &mut [KvCache], queries: &[f32], pool: &Pool) -> f64 {
    let KvShape { layers, heads, kv_heads, head_dim, .. } = caches[0].shape();
    let out = attend_last(caches, queries, pool);
    let quick = caches[0].tokens() * kv_heads <= 1 << 17;
    let (row, per_head) = (heads * head_dim, heads / kv_heads * head_dim);
    let rows = queries.chunks_exact(row).zip(out.chunks_exact(row));
    let mut worst: f64 = 0.0;
    for (i, (cache, (queries, out))) in caches.iter().zip(rows).enumerate() {
        if i != 0 && i + 1 != caches.len() {
            continue;
        }
        for g in (0..kv_heads).filter(|&g| quick || g == 0 || g == kv_heads - 1) {
            let span = g * per_head..(g + 1) * per_head;
            let (want, missed) = cache.oracle_of_step(layers - 1, queries, g);
            if missed > TIE {
                return f64::INFINITY;
            }
            let want = &want[span.clone()];
            let largest = want.iter().fold(0.0f64, |m, w| m.max(w.abs()));
            for (got, want) in out[span].iter().zip(want) {
                worst = worst.max((f64::from(*got) - want).abs() / largest);
            }
        }
    }
    worst
}

/// Gaussian rows whose standard deviation decays over the channels like `3 / sqrt(1 + c)`, mixed by a reflection
/// that differs from head to head: no channel is small before a rotation finds it.
struct Synthetic {
    state: u64,
    seed: u64,
}

impl Synthetic {
    fn new(seed: u64) -> Synthetic {
        Synthetic { state: seed, seed }
    }

    /// splitmix64 (Steele, Lea and Flood 2014).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// The sum of four 16-bit uniforms, of variance 1: near enough to a Gaussian, and cheap.
    fn gaussian(&mut self) -> f32 {
        let bits = self.next();
        let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xFFFF).sum();
        (sum as f32 / 65536.0 - 2.0) * 3f32.sqrt()
    }

    /// `[T, heads, D]`
    fn rows(&mut self, tokens: usize, heads: usize, d: usize) -> Vec<f32> {
        let mirrors: Vec<Vec<f32>> = (0..heads).map(|h| mirror(self.seed, h, d)).collect();
        let spread: Vec<f32> = (0..d).map(|c| 3.0 / (1.0 + c as f32).sqrt()).collect();
        let mut out = vec![0.0; tokens * heads * d];
        for row in out.chunks_exact_mut(heads * d) {
            for (head, mirror) in row.chunks_exact_mut(d).zip(&mirrors) {
                head.iter_mut().zip(&spread).for_each(|(x, s)| *x = self.gaussian() * s);
                let along: f32 = 2.0 * head.iter().zip(mirror).map(|(x, m)| x * m).sum::<f32>();
                head.iter_mut().zip(mirror).for_each(|(x, m)| *x -= along * m);
            }
        }
        out
    }
}

/// A unit vector to reflect head `h` by.
fn mirror(seed: u64, h: usize, d: usize) -> Vec<f32> {
    let mut random = Synthetic::new(seed ^ ((h as u64 + 1) << 32));
    let x: Vec<f32> = (0..d).map(|_| random.gaussian()).collect();
    let length = x.iter().map(|x| x * x).sum::<f32>().sqrt();
    x.iter().map(|x| x / length).collect()
}

fn print(report: &Report, out: &mut StdoutLock) -> io::Result<()> {
    let Machine { stream_gb_s, threads, isa } = &report.machine;
    writeln!(out, "memory stream {stream_gb_s:.1} GB/s, {threads} threads, {isa}\n")?;
    writeln!(
        out,
        "{:<28}{:>9}{:>7}{:>12}{:>14}{:>9}{:>8}{:>10}{:>11}",
        "kv", "context", "batch", "time us", "bytes read", "GB/s", "share", "x exact", "max error"
    )?;
    for row in &report.rows {
        writeln!(
            out,
            "{:<28}{:>9}{:>7}{:>12.1}{:>14}{:>9.2}{:>7.0}%{:>10}{:>11.1e}",
            row.kv,
            row.context,
            row.batch,
            row.time_us,
            row.bytes_read,
            row.gb_s,
            row.bandwidth_share * 100.0,
            row.ratio_to_exact.map_or("-".into(), |r| format!("{r:.2}")),
            row.max_error
        )?;
    }
    if report.rows.iter().all(|row| row.phases.is_none()) {
        return Ok(());
    }
    writeln!(
        out,
        "\n{:<28}{:>9}{:>7}{:>10}{:>10}{:>10}{:>10}{:>10}",
        "parts, us (means)", "context", "batch", "turn", "score", "select", "attend", "merge"
    )?;
    for row in &report.rows {
        let Some(p) = &row.phases else { continue };
        writeln!(
            out,
            "{:<28}{:>9}{:>7}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}",
            row.kv, row.context, row.batch, p.turn, p.score, p.select, p.attend, p.merge
        )?;
    }
    Ok(())
}
