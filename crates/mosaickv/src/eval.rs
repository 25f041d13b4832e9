//! Evaluation commands: what does a KV format cost in quality, paired sample by sample with the exact cache?

mod kl;
mod longbench;
mod observe;
mod report;
mod ruler;

use crate::calibrate::{files_digest, hex, load_for};
use crate::device::DeviceArgs;
use crate::prefill::PrefillKv;
use crate::{ModelArgs, fetch};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use mosaickv_eval::results::{Results, Row, Settings};
use mosaickv_eval::{Run, Times, report::table};
use mosaickv_kernels::Pool;
use mosaickv_kv::{KvFormat, KvFormats};
use mosaickv_model::{Model, Text, calibrate};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

#[derive(Subcommand)]
pub enum EvalCommand {
    /// How far next-token distributions move: KL to the exact cache, top-1 agreement, perplexity
    Kl(kl::KlArgs),
    /// RULER's 13 tasks, generated here or read from files
    Ruler(ruler::RulerArgs),
    /// LongBench with its own prompts, limits and metrics
    Longbench(longbench::LongbenchArgs),
    /// Tables and plots of results files
    Report(report::ReportArgs),
    /// Whether one choice of channels suits every vector: the observation that the paper starts from
    Observe(observe::ObserveArgs),
}

pub fn eval(command: &EvalCommand) -> Result<()> {
    match command {
        EvalCommand::Kl(args) => kl::kl(args),
        EvalCommand::Ruler(args) => ruler::ruler(args),
        EvalCommand::Longbench(args) => longbench::longbench(args),
        EvalCommand::Report(args) => report::report(args),
        EvalCommand::Observe(args) => observe::observe(args),
    }
}

/// What all runs take.
#[derive(Args)]
struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// KV formats to compare, separated by commas, such as exact,layered,layered:4,packed,q8_0,kivi4,snapkv
    #[arg(long, default_value = "exact,layered", value_name = "FORMATS")]
    kv: KvFormats,
    /// What later tokens of a long prompt attend to: exact reads all of it before it is compressed, compressed:4096 its first 4,096
    /// tokens, and the rest through what is compressed
    #[arg(long, default_value = "exact", value_name = "WHAT")]
    prefill_kv: PrefillKv,
    /// Where results go, one JSON object a line; an interrupted run goes on from there
    /// [default: eval-SUITE-DIGEST.jsonl]
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print rows as JSON lines instead of a table
    #[arg(long)]
    json: bool,
    /// Begin no further sample after this time; the same command goes on later
    #[arg(long, value_name = "SECONDS")]
    max_seconds: Option<u64>,
}

/// A run's model, ready, and the name that its results carry: with a digest, as names of files say little.
struct Loaded {
    model: Model,
    text: Text,
    pool: Pool,
    name: String,
}

impl RunArgs {
    fn load(&self) -> Result<Loaded> {
        let pool = self.model.threads.pool();
        let path = fetch::resolve(&self.model.model)?;
        let (mut model, text) = load_for((&path, self.model.calibration.as_deref()), &pool, &self.kv.0)?;
        self.device.place(&mut model, &self.kv.0)?;
        let name = Path::new(&self.model.model);
        let gguf = name.extension().is_some_and(|extension| extension == "gguf");
        let name = if gguf { name.file_stem() } else { name.file_name() }.unwrap_or(name.as_os_str());
        let name = format!("{} ({})", name.to_string_lossy(), files_digest(&path)?);
        Ok(Loaded { model, text, pool, name })
    }

    /// Formats that are compared on a loaded model.
    fn run<'a>(&self, loaded: &'a Loaded, formats: &'a [KvFormat]) -> Run<'a> {
        let run = Run::new(&loaded.model, &loaded.text, &loaded.pool, formats);
        Run { most_exact: self.prefill_kv.tokens(), ..run }
    }

    /// The formats, with `exact` before them if it is missing: answers are paired with its answers.
    fn paired(&self) -> Vec<KvFormat> {
        let mut formats = self.kv.0.clone();
        if !formats.contains(&KvFormat::Exact) {
            eprintln!("exact added to --kv: every difference is to its answer");
            formats.insert(0, KvFormat::Exact);
        }
        formats
    }

    fn settings(
        &self,
        suite: &str,
        loaded: &Loaded,
        formats: &[KvFormat],
        options: &[(&str, String)],
    ) -> Settings {
        let mut options: BTreeMap<String, String> =
            options.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        options.insert("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
        // One from the texts in this program follows from the model and the version.
        if self.model.calibration.is_some()
            && let Some(calibration) = &loaded.model.calibration
        {
            options.insert("calibration".to_owned(), calibrate::digest(calibration)[..16].to_owned());
        }
        if let Some(device) = &loaded.model.device {
            options.insert("device".to_owned(), device.name().to_owned());
        }
        if self.prefill_kv != PrefillKv::Exact {
            options.insert("prefill".to_owned(), self.prefill_kv.to_string());
        }
        Settings {
            suite: suite.to_owned(),
            model: loaded.name.clone(),
            kv: formats.iter().map(KvFormat::to_string).collect(),
            options,
        }
    }
}

/// The work of a run: `units` of `rows_per_unit` rows each.
struct Work<'a> {
    args: &'a RunArgs,
    settings: Settings,
    units: usize,
    rows_per_unit: usize,
    /// What a unit is called, in the plural.
    unit: &'static str,
}

/// Measures the units that the results file lacks, appends each as it is done, and prints what came of all of them.
fn measure(
    work: &Work,
    run: &mut Run,
    each: &mut dyn FnMut(&mut Run, usize) -> Result<Vec<Row>>,
) -> Result<()> {
    let path = work.args.out.clone().unwrap_or_else(|| default_path(&work.settings));
    let mut results = Results::open(&path, &work.settings, work.rows_per_unit)?;
    let done = results.done();
    if results.cut_bytes() > 0 {
        eprintln!("{}: cut off {} bytes of a sample that was not whole", path.display(), results.cut_bytes());
    }
    if done > 0 {
        eprintln!("{}: {done} of {} {} are there; going on", path.display(), work.units, work.unit);
    }
    let style =
        format!("{{msg}} [{{bar:30}}] {{pos}}/{{len}} {}, {{elapsed}} (about {{eta}} left)", work.unit);
    let bar = ProgressBar::new(work.units as u64)
        .with_message(work.settings.suite.clone())
        .with_style(ProgressStyle::with_template(&style)?.progress_chars("=> "))
        .with_position(done as u64);
    bar.reset_eta();
    bar.enable_steady_tick(Duration::from_secs(1));
    let (start, limit) = (Instant::now(), work.args.max_seconds.map(Duration::from_secs));
    let mut stopped = None;
    let mut failed = None;
    for i in done..work.units {
        if limit.is_some_and(|limit| start.elapsed() >= limit) {
            stopped = Some(i);
            break;
        }
        if let Err(error) = each(run, i).and_then(|rows| Ok(results.append(&rows)?)) {
            failed = Some(error.context(format!("stopped after {i} of {} {}", work.units, work.unit)));
            break;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    show(results.rows(), work.args.json)?;
    eprintln!("{}", share(run.times, start.elapsed()));
    if let Some(i) = stopped {
        eprintln!(
            "stopped after {i} of {} {} (--max-seconds); the same command goes on",
            work.units, work.unit
        );
    }
    eprintln!("results in {}", path.display());
    failed.map_or(Ok(()), Err)
}

/// The first eight hexadecimal digits of the SHA-256 of some texts.
fn digest<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut sha = Sha256::new();
    for text in texts {
        sha.update((text.len() as u64).to_le_bytes());
        sha.update(text);
    }
    hex(&sha.finalize(), 8)
}

/// A name that belongs to these settings, so that the same command finds it again and no other does.
fn default_path(settings: &Settings) -> PathBuf {
    let json = serde_json::to_vec(settings).expect("settings are plain text");
    PathBuf::from(format!("eval-{}-{}.jsonl", settings.suite, hex(&Sha256::digest(&json), 8)))
}

fn show(rows: &[Row], json: bool) -> Result<()> {
    let mut out = io::stdout().lock();
    if json {
        for row in rows {
            writeln!(out, "{}", serde_json::to_string(row)?)?;
        }
    } else {
        writeln!(out, "{}", table(rows))?;
    }
    Ok(())
}

fn share(times: Times, all: Duration) -> String {
    let percent = |part: Duration| 100.0 * part.as_secs_f64() / all.as_secs_f64().max(1e-9);
    format!(
        "{:.1} s: prefill {:.0} %, compression {:.0} %, decode {:.0} %",
        all.as_secs_f64(),
        percent(times.prefill),
        percent(times.compress),
        percent(times.decode)
    )
}

/// The tasks of these names, each once, or all of them.
fn tasks<T>(names: &[String], all: &[T]) -> Result<Vec<T>>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static> + Copy + PartialEq,
{
    if names == ["all"] {
        return Ok(all.to_vec());
    }
    let mut tasks = Vec::new();
    for name in names {
        let task: T = name.parse()?;
        if !tasks.contains(&task) {
            tasks.push(task);
        }
    }
    Ok(tasks)
}

/// Which samples to run: `samples` of each task and length, in turns, so that a run stopped early has some of all.
fn in_turns(groups: &[usize], samples: Option<usize>) -> Vec<(usize, usize)> {
    let count = |available: usize| samples.map_or(available, |wanted| wanted.min(available));
    let most = groups.iter().map(|&available| count(available)).max().unwrap_or(0);
    (0..most)
        .flat_map(|i| (0..groups.len()).map(move |group| (group, i)))
        .filter(|&(group, i)| i < count(groups[group]))
        .collect()
}

/// Tells which tasks have no file: an error, unless `all` that have one were asked for.
fn say_missing<T: std::fmt::Display>(dir: &Path, missing: &[T], all: bool) -> Result<()> {
    let names = missing.iter().map(T::to_string).collect::<Vec<_>>().join(", ");
    if !missing.is_empty() && !all {
        bail!("{} has no file of {names}; give the folder that has it, or leave the task out", dir.display());
    } else if !missing.is_empty() {
        eprintln!("{}: no file of {names}", dir.display());
    }
    Ok(())
}

/// Reports lines that could not be read; an error if nothing else is there.
fn warn_malformed<M: std::fmt::Display>(malformed: &[M], read: usize) -> Result<()> {
    const SHOWN: usize = 10;
    for line in malformed.iter().take(SHOWN) {
        eprintln!("malformed: {line}");
    }
    if !malformed.is_empty() {
        eprintln!("{} malformed lines left out, {read} samples read", malformed.len());
    }
    if read == 0 {
        bail!("no sample could be read");
    }
    Ok(())
}

fn write(path: &Path, content: &str) -> Result<()> {
    std::fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_turns_until_each_group_is_done() {
        assert_eq!(in_turns(&[1, 3], Some(2)), [(0, 0), (1, 0), (1, 1)]);
        assert_eq!(in_turns(&[1, 2], None), [(0, 0), (1, 0), (1, 1)]);
        assert_eq!(in_turns(&[], None), []);
    }
}
