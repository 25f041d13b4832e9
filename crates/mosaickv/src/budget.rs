//! How many bytes may a prompt's keys and values take, what is read of them, and at what risk? `--kv-budget`, `--allow-drop`
//! and `--select` beside `--kv`, and what is said where bytes or a ratio were missed.

use anyhow::{Result, bail, ensure};
use clap::Args;
use mosaickv_kv::{
    ByteCount, Dropping, HeadInfo, KvCache, KvFormat, KvFormats, Layered, PageInfo, Select, Target,
};

/// A prompt that takes so much more or less than was asked for has missed it.
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

    /// The same for a prompt of `tokens` tokens: without a format or a flag `exact` for one that `layered` would leave exact,
    /// so that no calibration is made for it.
    pub fn format_for(self, asked: Option<KvFormat>, tokens: usize) -> Result<KvFormat> {
        if asked.is_none() && !self.is_given() && tokens < Layered::LEAST_TOKENS {
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

    /// Whether there is one of the flags.
    pub fn is_given(self) -> bool {
        self.flag().is_some()
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

/// What to say of a cache in the layered format at the end of a prompt that takes not about what was asked for, or is too short
/// to be compressed.
pub fn missed(cache: &KvCache) -> Option<String> {
    let KvFormat::Layered(Layered { target, .. }) = cache.format() else { return None };
    match target {
        Target::Bytes(asked) => missed_bytes(cache, asked),
        Target::Ratio(asked) => missed_ratio(cache, asked),
    }
}

fn missed_bytes(cache: &KvCache, asked: usize) -> Option<String> {
    let got = cache.bytes().total();
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

/// Of the layers that are compressed, which are those that a ratio is for.
fn missed_ratio(cache: &KvCache, asked: f32) -> Option<String> {
    let tokens = cache.tokens();
    if !cache.is_compressed() {
        let least = Layered::LEAST_TOKENS;
        return Some(format!(
            "a ratio of {asked} was asked for, but the prompt of {tokens} tokens stays exact: it is compressed from {least} tokens on"
        ));
    }
    let heads = cache.layered_heads();
    let of_pages = |pages: &[PageInfo]| pages.iter().map(|page| page.bytes).sum::<usize>();
    let of_head = |head: &HeadInfo| of_pages(&head.prompt) + of_pages(&head.tail) + head.other_bytes;
    let stored: usize = heads.iter().map(of_head).sum();
    let exact = heads.len() * tokens * cache.shape().head_dim * 4;
    let got = exact as f64 / stored as f64;
    let why = match f64::from(asked) / got - 1.0 {
        off if off > OFF => "it can't be had for less",
        off if off < -OFF => "the next finer plan would take more, or there is none",
        _ => return None,
    };
    Some(format!(
        "a ratio of {asked} was asked for, but the prompt of {tokens} tokens reaches {got:.2}: {why}"
    ))
}
