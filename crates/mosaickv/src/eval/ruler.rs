//! `mosaickv eval ruler`: RULER's tasks, generated with the model's own tokenizer or read from files.

use super::{RunArgs, Work, digest, files_digest, in_turns, measure, say_missing, tasks, warn_malformed};
use crate::demo::DOCUMENT;
use anyhow::{Context, Result, bail};
use clap::Args;
use mosaickv_eval::Sample;
use mosaickv_eval::ruler::{self, Generator, Sources, Task};
use mosaickv_model::Text;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    mosaickv eval ruler --model smollm2-135m --length 4096 --samples 20 --kv exact,layered,q8_0,snapkv\n  \
    mosaickv eval ruler --model smollm2-135m --length 2048,4096 --tasks niah_single_1,vt,cwe --kv exact,layered\n  \
    mosaickv eval ruler --model smollm2-135m --length 4096 --sources ./ruler-sources --tasks qa_1,qa_2\n  \
    mosaickv eval ruler --model smollm2-135m --data ./ruler --length 4096 --samples 10")]
pub struct RulerArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Tokens of prompt and answer; with --data the names of the folders to read
    #[arg(long, default_value = "4096", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    length: Vec<u32>,
    /// Tasks, separated by commas, or all
    #[arg(long, default_value = "all", value_delimiter = ',')]
    tasks: Vec<String>,
    /// Samples of each task and length
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// What generated samples depend on
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Folder with PaulGrahamEssays.json, squad_dev-v2.0.json and hotpot_dev_distractor_v1.json, or those with .xz;
    /// without it needles hide in a built-in text, and qa_1 and qa_2 can't be made
    #[arg(long, value_name = "DIR")]
    sources: Option<PathBuf>,
    /// Read samples instead of generating them: DIR/LENGTH/TASK.jsonl, as RULER's own generator writes them
    #[arg(long, value_name = "DIR", conflicts_with = "sources")]
    data: Option<PathBuf>,
}

pub fn ruler(args: &RulerArgs) -> Result<()> {
    let tasks = tasks(&args.tasks, &Task::ALL)?;
    let lengths: Vec<usize> = args.length.iter().map(|&n| n as usize).collect();
    let origin = match &args.data {
        Some(dir) => read(dir, &lengths, (&tasks, args.tasks == ["all"]))?,
        None => generate(args, &lengths, &tasks)?,
    };
    let loaded = args.run.load()?;
    origin.check(&loaded.text, loaded.model.context(), &lengths)?;
    let formats = args.run.paired();
    let samples = args.samples as usize;
    let units = in_turns(&origin.available(samples), Some(samples));
    let join = |names: Vec<String>| names.join(" ");
    let work = Work {
        settings: args.run.settings(
            "ruler",
            &loaded,
            &formats,
            &[
                ("length", join(lengths.iter().map(usize::to_string).collect())),
                ("tasks", join(origin.tasks())),
                ("samples", samples.to_string()),
                ("origin", origin.name(args)?),
            ],
        ),
        args: &args.run,
        units: units.len(),
        rows_per_unit: formats.len(),
        unit: "samples",
    };
    let mut run = args.run.run(&loaded, &formats);
    measure(&work, &mut run, &mut |run, i| {
        let (group, index) = units[i];
        let sample = origin.sample(group, index, &loaded.text)?;
        Ok(run.answers(&sample)?)
    })
}

/// Where samples come from, in groups of one task and length.
enum Origin {
    Generated { generator: Generator, groups: Vec<(Task, usize)> },
    Read(Vec<Vec<Sample>>),
}

impl Origin {
    /// The tasks, each once.
    fn tasks(&self) -> Vec<String> {
        let mut names: Vec<String> = match self {
            Origin::Generated { groups, .. } => groups.iter().map(|(task, _)| task.to_string()).collect(),
            Origin::Read(groups) => groups.iter().map(|samples| samples[0].task.clone()).collect(),
        };
        let mut seen = HashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        names
    }

    /// What the samples depend on beside task, length and index.
    fn name(&self, args: &RulerArgs) -> Result<String> {
        Ok(match (self, &args.sources) {
            (Origin::Read(groups), _) => {
                let prompts = groups.iter().flatten().map(|sample| sample.prompt.as_str());
                format!("samples {}", digest(prompts))
            }
            (_, Some(dir)) => format!("seed {}, sources {}", args.seed, files_digest(dir)?),
            (_, None) => format!("seed {}, built-in text", args.seed),
        })
    }

    /// Makes one sample of each group that is generated, so that what can't be made is said before anything is run.
    fn check(&self, text: &Text, context: usize, lengths: &[usize]) -> Result<()> {
        let Origin::Generated { groups, .. } = self else { return Ok(()) };
        if let Some(length) = lengths.iter().find(|&&length| length > context) {
            bail!("--length {length} exceeds the model's context of {context} tokens; ask for shorter ones");
        }
        (0..groups.len()).try_for_each(|group| self.sample(group, 0, text).map(|_| ()))
    }

    /// Samples that each group can give, if at most `wanted` are.
    fn available(&self, wanted: usize) -> Vec<usize> {
        match self {
            Origin::Generated { groups, .. } => vec![wanted; groups.len()],
            Origin::Read(groups) => groups.iter().map(Vec::len).collect(),
        }
    }

    fn sample(&self, group: usize, index: usize, text: &Text) -> Result<Sample> {
        match self {
            Origin::Read(groups) => Ok(groups[group][index].clone()),
            Origin::Generated { generator, groups } => {
                let (task, length) = groups[group];
                let mut failed = None;
                let mut count = |prompt: &str| match text.encode_plain(prompt) {
                    Ok(tokens) => tokens.len(),
                    Err(error) => {
                        failed.get_or_insert(error);
                        0
                    }
                };
                let sample = generator.sample(task, length, index, &mut count);
                match failed {
                    Some(error) => Err(error.into()),
                    None => Ok(sample?),
                }
            }
        }
    }
}

/// A generator for the tasks that the sources suffice for; with `all`, the others are left out with a line.
fn generate(args: &RulerArgs, lengths: &[usize], tasks: &[Task]) -> Result<Origin> {
    let mut sources = match &args.sources {
        Some(dir) => Sources::load(dir, tasks)?,
        None => Sources::default(),
    };
    if !sources.has_haystack() {
        eprintln!(
            "no --sources with PaulGrahamEssays.json: needles hide in the built-in text, chapters of a novel"
        );
        sources = sources.with_haystack(DOCUMENT);
    }
    let (can, cannot): (Vec<Task>, Vec<Task>) = tasks.iter().partition(|&&task| sources.suffice(task));
    if !cannot.is_empty() {
        let names: Vec<String> = cannot.iter().map(Task::to_string).collect();
        let names = names.join(", ");
        if args.tasks != ["all"] {
            bail!(
                "{names}: no source of questions; give --sources a folder with squad_dev-v2.0.json and \
                 hotpot_dev_distractor_v1.json"
            );
        }
        eprintln!("left out, as --sources has no questions for them: {names}");
    }
    let groups = lengths.iter().flat_map(|&length| can.iter().map(move |&task| (task, length))).collect();
    Ok(Origin::Generated { generator: Generator::new(sources, args.seed), groups })
}

fn read(dir: &Path, lengths: &[usize], (tasks, all): (&[Task], bool)) -> Result<Origin> {
    let mut groups = Vec::new();
    let (mut malformed, mut count) = (Vec::new(), 0);
    for &length in lengths {
        let folder = dir.join(length.to_string());
        let read = ruler::read_dir(&folder, tasks)
            .with_context(|| format!("cannot read RULER samples in {}", folder.display()))?;
        say_missing(&folder, &read.missing, all)?;
        for &task in tasks {
            let samples: Vec<Sample> =
                read.samples.iter().filter(|sample| sample.task == task.name()).cloned().collect();
            count += samples.len();
            if !samples.is_empty() {
                groups.push(samples);
            }
        }
        malformed.extend(read.malformed);
    }
    warn_malformed(&malformed, count)?;
    Ok(Origin::Read(groups))
}
