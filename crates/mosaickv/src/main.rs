//! MosaicKV: long-context LLMs on a KV cache compressed in tokens and channels at once.

#![deny(unsafe_code)]

mod answer;
mod bench;
mod bill;
mod budget;
mod calibrate;
mod config;
mod demo;
mod device;
mod eval;
mod fetch;
mod inspect;
mod prefill;
mod serve;
mod top;

use anyhow::{Context, Result, bail};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;
use mosaickv_kernels::isa::ISA_VARIABLE;
use mosaickv_kernels::{Isa, Pool};
use mosaickv_kv::KvFormat;
use mosaickv_model::{Model, Text};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "mosaickv", version, about, long_about = None)]
#[command(after_help = "Examples:\n  \
    mosaickv demo\n  \
    mosaickv run --model smollm2-135m --file report.txt \"What was decided?\"\n  \
    mosaickv serve smollm2-135m --kv-memory 1GiB\n  \
    mosaickv eval kl --model smollm2-135m --text novel.txt --kv exact,layered,q8_0\n  \
    mosaickv bench attention --context 4096,32768 --kv exact,layered")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer a question, about a document if one is given, and print what the cache saved and cost
    Run(RunArgs),
    /// Fetch the small model, read a long document, answer with the exact and the compressed cache
    Demo(demo::DemoArgs),
    /// Serve the OpenAI API over HTTP
    Serve(Box<serve::ServeArgs>),
    /// Measure speed beside what the machine can do
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Measure what compression costs in quality
    #[command(subcommand)]
    Eval(eval::EvalCommand),
    /// Learn what the layered format must know of a model, and write it to a file
    Calibrate(calibrate::CalibrateArgs),
    /// Show which strategy each segment of a document got, or which bits each page
    Inspect(inspect::InspectArgs),
    /// Show what a running server does
    Top(top::TopArgs),
    /// Print what a shell needs to complete commands and flags
    #[command(after_help = "Examples:\n  \
        mosaickv completions bash > ~/.local/share/bash-completion/completions/mosaickv\n  \
        mosaickv completions zsh > ~/.zfunc/_mosaickv")]
    Completions {
        /// Which shell
        shell: Shell,
    },
}

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    mosaickv run --model smollm2-135m \"Name three rivers.\"\n  \
    mosaickv run --model ./model.gguf --file book.txt --kv layered:4 \"Who is the captain?\"\n  \
    mosaickv run --model ./model.gguf --file book.txt --kv-budget 24MB \"Who is the captain?\"\n  \
    mosaickv run --model ./model.gguf --file book.txt --device cuda \"Who is the captain?\"\n  \
    mosaickv run --model ./Qwen3-0.6B --kv packed:kept=0.375,group=2,selected=0.2 --json \"Why is the sky blue?\"")]
struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A text to ask about; it is put before the question
    #[arg(long, value_name = "DOC")]
    file: Option<PathBuf>,
    /// How keys and values are kept: exact, layered (or layered:4, for a quarter of the bytes, or layered:24MB; layered@all reads all of it at every step), packed, or packed with some of kept=0.25,group=1,block=8,selected=0.1
    /// (kept, group and block are chosen segment by segment unless given), segment=65536, loss=0.25, grouping=0.01,
    /// spread=0.4, close=512; and, to compare with, quest, strawman, snapkv, q8_0, q4_0, kivi4, kivi2 [default: layered; exact if document and question are too short to be compressed]
    #[arg(long, env = "MOSAICKV_KV")]
    kv: Option<KvFormat>,
    #[command(flatten)]
    budget: budget::BudgetArgs,
    #[command(flatten)]
    device: device::DeviceArgs,
    /// Longest answer, in tokens
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Print one JSON object (answer and bill) instead of text
    #[arg(long)]
    json: bool,
    question: String,
}

/// Which model, and how many threads to run it on.
#[derive(Args, Clone)]
struct ModelArgs {
    /// A GGUF file, a safetensors folder, smollm2-135m, gemma3-270m, or, built with --features hub, owner/name:file
    #[arg(long, env = "MOSAICKV_MODEL")]
    model: String,
    /// What `mosaickv calibrate` wrote, for the layered format [default: learnt once from texts in this program]
    #[arg(long, value_name = "FILE", env = "MOSAICKV_CALIBRATION")]
    calibration: Option<PathBuf>,
    #[command(flatten)]
    threads: ThreadArgs,
}

impl ModelArgs {
    /// The model, ready for these formats.
    fn load(&self, pool: &Pool, formats: &[KvFormat]) -> Result<(Model, Text)> {
        calibrate::load_for((&fetch::resolve(&self.model)?, self.calibration.as_deref()), pool, formats)
    }
}

#[derive(Args, Clone)]
struct ThreadArgs {
    /// Threads to compute on [default: all cores]
    #[arg(long, env = "MOSAICKV_THREADS", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl ThreadArgs {
    fn pool(&self) -> Pool {
        Pool::new(self.count())
    }

    fn count(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.threads.map_or_else(cores, usize::from)
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).with_target(false).without_time().init();
    let arguments: Vec<_> = std::env::args_os().map(serve::long_flag).collect();
    let command = match config::with_defaults(Cli::command(), &arguments) {
        Ok(command) => command,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::from(2);
        }
    };
    let cli =
        Cli::from_arg_matches(&command.get_matches_from(arguments)).unwrap_or_else(|error| error.exit());
    if let Err(error) = check_isa() {
        eprintln!("error: {error:#}");
        return ExitCode::from(2);
    }
    let done = match cli.command {
        Command::Run(args) => run(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Serve(args) => serve::serve(&args),
        Command::Top(args) => top::top(&args),
        Command::Bench(command) => bench::bench(&command),
        Command::Eval(command) => eval::eval(&command),
        Command::Calibrate(args) => calibrate::command(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "mosaickv", &mut io::stdout());
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Refuses an instruction set that was asked for and that this CPU lacks, before a kernel would panic over it.
fn check_isa() -> Result<()> {
    let Ok(wanted) = std::env::var(ISA_VARIABLE) else { return Ok(()) };
    let have: Vec<&str> = Isa::available().iter().map(|isa| isa.name()).collect();
    if !have.contains(&wanted.as_str()) {
        bail!("{ISA_VARIABLE}={wanted}, but this CPU has {}; unset it or name one of them", have.join(", "));
    }
    Ok(())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

fn run(args: &RunArgs) -> Result<()> {
    if args.question.trim().is_empty() {
        bail!("the question is empty; write it as the last argument, in quotes");
    }
    let document = args.file.as_deref().map(read_document).transpose()?;
    // What can't be is said before a model is read.
    args.budget.format(args.kv)?;
    let pool = args.model.threads.pool();
    let path = fetch::resolve(&args.model.model)?;
    let (mut model, text) = answer::load_from(&path)?;
    let max_tokens = args.max_tokens as usize;
    let prompt = answer::prompt((&model, &text), (document.as_deref(), &args.question), max_tokens)?;
    let format = args.budget.format_for(args.kv, prompt.len())?;
    let file = args.model.calibration.as_deref();
    calibrate::attach((&mut model, &text), &pool, (&path, file), &[format])?;
    args.device.place(&mut model, &[format])?;
    let asked = answer::Asked { prompt: &prompt, format, max_tokens };
    let json = args.json;
    let mut out = io::stdout().lock();
    let answer = answer::answer(&model, &text, &pool, &asked, &mut |piece| {
        if !json {
            out.write_all(piece.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    })?;
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&answer)?)?;
    } else {
        writeln!(out, "\n\n{}", answer.bill)?;
    }
    Ok(())
}

/// The text of a file that was given to be asked about.
fn read_document(path: &Path) -> Result<String> {
    let bytes =
        std::fs::read(path).with_context(|| format!("cannot read the document {}", path.display()))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!(
            "the document {} is not UTF-8 text (first wrong byte at {at}); convert it, for example with iconv",
            path.display()
        )
    })?;
    if text.trim().is_empty() {
        bail!("the document {} is empty; give a file with text in it", path.display());
    }
    Ok(text)
}
