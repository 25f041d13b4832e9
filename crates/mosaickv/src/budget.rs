//! How many bytes may a prompt's keys and values take, what is read of them, and at what risk? `--kv-budget`, `--allow-drop`
//! and `--select` beside `--kv`, and what is said where a budget was missed.

use anyhow::{Result, bail, ensure};
use clap::Args;
use mosaickv_kv::{ByteCount, Dropping, KvCache, KvFormat, KvFormats, Layered, Select, Target};

/// A prompt that takes so much more or less than was asked for has missed its budget.
const OFF: f64 = 0.02;

#[derive(Args, Clone, Copy)]
pub struct BudgetArgs {
    /// Bytes that the prompt's keys and values are to take, everything counted: 24MB, 500kB or 1.5GiB. This is --kv
    /// layered:24MB
    #[arg(long, value_name = "BYTES")]
    kv_budget: Option<ByteCount>,
    /// Let the layered format drop a token from all heads of a layer. The bytes go to other tokens, but a later question about
    /// what was dropped can't be answered. This is --kv layered:drop=any
    #[arg(long)]
    allow_drop: bool,
    /// What a step reads of the layered format where a head has 8,192 tokens or more: all, mass=0.99 (of each query's attention) or
    /// relative=0.001 (of the heaviest tile's weight). Less than all is faster and can miss what a question needs. This is --kv
    /// layered@all [default: mass=0.99]
    #[arg(long, value_name = "WHAT")]
    select: Option<Select>,
}

impl BudgetArgs {
    /// The format that was asked for, `layered` if none was.
    pub fn format(self, asked: Option<KvFormat>) -> Result<KvFormat> {
        let format = asked.unwrap_or(KvFormat::Layered(Layered::default()));
        if let (Some(flag), false) = (self.flag(), is_layered(&format)) {
            bail!("{flag} is for the layered format, and --kv (or MOSAICKV_KV) is {format}; make it layered");
        }
        self.applied_to(format)
    }

    /// The same where `bytes` of text are all that will be read: without a format or a flag `exact` for a text that
    /// `layered` would leave exact, so that no calibration is made for it.
    pub fn format_for(self, asked: Option<KvFormat>, bytes: usize) -> Result<KvFormat> {
        // A token is at least a byte; what a chat's template adds is less than this.
        let is_short = bytes + 256 < Layered::LEAST_TOKENS;
        if asked.is_none() && self.flag().is_none() && is_short {
            return Ok(KvFormat::Exact);
        }
        self.format(asked)
    }

    /// The same of several formats, by default `exact` and `layered`: every layered one gets the budget, and there must be one.
    pub fn formats(self, asked: Option<&KvFormats>) -> Result<Vec<KvFormat>> {
        let Some(asked) = asked else { return Ok(vec![KvFormat::Exact, self.format(None)?]) };
        if let (Some(flag), false) = (self.flag(), asked.0.iter().any(is_layered)) {
            bail!("{flag} is for the layered format, and --kv {asked} has none; add layered");
        }
        asked.0.iter().map(|format| self.applied_to(*format)).collect()
    }

    /// A flag that was given, by name.
    fn flag(self) -> Option<&'static str> {
        let select = self.select.map(|_| "--select");
        self.kv_budget.map(|_| "--kv-budget").or(self.allow_drop.then_some("--allow-drop")).or(select)
    }

    fn applied_to(self, format: KvFormat) -> Result<KvFormat> {
        let KvFormat::Layered(mut of) = format else { return Ok(format) };
        if let Some(ByteCount(bytes)) = self.kv_budget {
            ensure!(
                of.target == Layered::default().target,
                "--kv {format} and --kv-budget are two budgets; leave one of them out"
            );
            of.target = Target::Bytes(bytes);
        }
        if self.allow_drop {
            of.drop = Dropping::Any;
        }
        if let Some(select) = self.select {
            ensure!(
                [Select::default(), select].contains(&of.select),
                "--kv {format} and --select {select} are two selections; leave one of them out"
            );
            of.select = select;
        }
        Ok(KvFormat::Layered(of))
    }
}

fn is_layered(format: &KvFormat) -> bool {
    matches!(format, KvFormat::Layered(_))
}

/// What to say of a cache at the end of a prompt whose bytes are not about those that were asked for.
pub fn missed(cache: &KvCache) -> Option<String> {
    let (asked, got) = (cache.format().budget()?, cache.bytes().total());
    let off = got as f64 / asked as f64 - 1.0;
    let why = match cache.is_compressed() {
        false if off > OFF => "so short a prompt stays exact",
        true if off > OFF => "it can't be had for less",
        true if off < -OFF => "the next finer plan would take more, or there is none",
        _ => return None,
    };
    Some(format!(
        "{} were asked for, but the prompt of {} tokens takes {:.2} MB: {why}",
        ByteCount(asked),
        cache.tokens(),
        got as f64 / 1e6
    ))
}
