//! `mosaickv eval longbench`: LongBench's tasks, read from its data files.

use super::{RunArgs, Work, digest, in_turns, measure, say_missing, tasks, warn_malformed};
use anyhow::{Result, bail};
use clap::Args;
use mosaickv_eval::Run;
use mosaickv_eval::longbench::{self, Item, Task};
use std::path::PathBuf;

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    mosaickv eval longbench --model smollm2-135m --data ./LongBench/data --kv exact,layered,q4_0\n  \
    mosaickv eval longbench --model smollm2-135m --data ./data --tasks qasper,hotpotqa_e --samples 10")]
pub struct LongbenchArgs {
    #[command(flatten)]
    run: RunArgs,
    /// Folder with LongBench's TASK.jsonl files
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Tasks, separated by commas (LongBench-E's end in _e), or all that have a file
    #[arg(long, default_value = "all", value_delimiter = ',')]
    tasks: Vec<String>,
    /// Samples of each task [default: all]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    samples: Option<u32>,
    /// Leave out samples that would have to be truncated to the model's context
    #[arg(long)]
    only_whole: bool,
}

pub fn longbench(args: &LongbenchArgs) -> Result<()> {
    let tasks = tasks(&args.tasks, &Task::ALL)?;
    let folder = longbench::read_dir(&args.data, &tasks)?;
    say_missing(&args.data, &folder.missing, args.tasks == ["all"])?;
    warn_malformed(&folder.malformed, folder.items.len())?;
    let loaded = args.run.load()?;
    let groups = grouped(args, &folder.items, &tasks, &loaded)?;
    let formats = args.run.paired();
    let samples = args.samples.map(|n| n as usize);
    let units = in_turns(&groups.iter().map(Vec::len).collect::<Vec<_>>(), samples);
    if units.is_empty() {
        bail!("no sample is left; drop --only-whole, or use a model with a longer context");
    }
    let names: Vec<String> = groups.iter().map(|group| group[0].task.to_string()).collect();
    let prompts = groups.iter().flatten().flat_map(|item| [item.context.as_str(), &item.input]);
    let work = Work {
        settings: args.run.settings(
            "longbench",
            &loaded,
            &formats,
            &[
                ("origin", format!("samples {}", digest(prompts))),
                ("tasks", names.join(" ")),
                ("samples", samples.map_or("all".to_owned(), |n| n.to_string())),
                ("truncated", if args.only_whole { "left out" } else { "in the middle" }.to_owned()),
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
        let (sample, _) = run.longbench(groups[group][index])?;
        Ok(run.answers(&sample)?)
    })
}

/// The items of each task that are to be run.
fn grouped<'a>(
    args: &LongbenchArgs,
    items: &'a [Item],
    tasks: &[Task],
    loaded: &super::Loaded,
) -> Result<Vec<Vec<&'a Item>>> {
    let run = Run::new(&loaded.model, &loaded.text, &loaded.pool, &[]);
    let mut groups = Vec::new();
    for &task in tasks {
        let mut group: Vec<&Item> = items.iter().filter(|item| item.task == task).collect();
        if args.only_whole {
            let mut whole = Vec::new();
            for item in group {
                if !run.longbench(item)?.1 {
                    whole.push(item);
                }
            }
            group = whole;
        }
        groups.push(group);
    }
    groups.retain(|group| !group.is_empty());
    Ok(groups)
}
