//! One question, one answer: chat template, prefill, greedy decode, bill.

use crate::bill::{Bill, DecodeTotals};
use crate::{budget, fetch};
use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use mosaickv_kernels::Pool;
use mosaickv_kv::{Background, KvFormat, Timing};
use mosaickv_model::{Decoder, Model, Sequence, Text, greedy};
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Raw keys and values that the background may hold while it works out strategies.
pub const MOST_RAW_BYTES: usize = 512 << 20;

/// What to answer, and how.
pub struct Asked<'a> {
    /// From [`prompt`].
    pub prompt: &'a [u32],
    pub format: KvFormat,
    /// Longest answer, in tokens.
    pub max_tokens: usize,
}

/// An answer and its bill.
#[derive(Debug, Serialize)]
pub struct Answer {
    pub answer: String,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
    #[serde(flatten)]
    pub bill: Bill,
}

/// Fetches the model if it must be, and reads it, with a progress bar.
pub fn load(name: &str) -> Result<(Model, Text)> {
    load_from(&fetch::resolve(name)?)
}

/// Reads the model, with a progress bar.
pub fn load_from(path: &Path) -> Result<(Model, Text)> {
    let bar = bar("loading", "pieces");
    let loaded = Model::load(path, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    loaded.with_context(|| format!("cannot load the model {}", path.display()))
}

/// Answers greedily; `each` gets the text as it comes.
pub fn answer(
    model: &Model,
    text: &Text,
    pool: &Pool,
    asked: &Asked,
    each: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Answer> {
    let start = Instant::now();
    let background = Arc::new(Background::new(1, MOST_RAW_BYTES));
    let mut sequence = Sequence::new(model, pool, asked.format)?.with_background(background, Timing::Live);
    let bar = bar("reading", "layers");
    let logits = sequence.prefill(asked.prompt, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let mut next = greedy(&logits?);
    let (ttft, missed) = (start.elapsed(), budget::missed(sequence.cache()));

    let (attention, read, decode) = (sequence.attention_time(), sequence.bytes_read(), Instant::now());
    let (mut decoder, mut answer, mut tokens) = (Decoder::new(), String::new(), 0);
    let finish_reason = loop {
        if text.eos().contains(&next) {
            break "stop";
        }
        tokens += 1;
        let piece = decoder.push(text, next)?;
        each(&piece)?;
        answer += &piece;
        if tokens == asked.max_tokens {
            break "length";
        }
        next = greedy(&sequence.step(next)?);
    };
    let piece = decoder.finish(text)?;
    each(&piece)?;
    answer += &piece;

    let held = sequence.cache().tokens();
    let totals = DecodeTotals {
        steps: held - asked.prompt.len(),
        time: decode.elapsed(),
        attention: sequence.attention_time() - attention,
        kv_bytes_read: sequence.bytes_read().zip(read).map(|(after, before)| after - before),
    };
    let kv = asked.format.to_string();
    let mut bill = Bill::new(kv, (model.kv_shape(), held), sequence.cache().bytes());
    (bill.prompt_tokens, bill.output_tokens, bill.ttft_s) = (asked.prompt.len(), tokens, ttft.as_secs_f64());
    bill.budget_missed = missed;
    bill.add_decode(&totals);
    Ok(Answer { answer, finish_reason, bill })
}

/// The tokens of a question, after a document if there is one; refused if they and the answer exceed the model's context.
pub fn prompt(
    (model, text): (&Model, &Text),
    (document, question): (Option<&str>, &str),
    max_tokens: usize,
) -> Result<Vec<u32>> {
    let content = match document {
        Some(document) => format!("{}\n{question}", document.trim_end()),
        None => question.to_owned(),
    };
    let tokens = if text.has_template() {
        text.encode_chat(&content)?
    } else {
        tracing::warn!("a base model, without a chat template: it continues the text instead of answering");
        text.encode_plain(&content)?
    };
    let context = model.context();
    if tokens.len() + max_tokens > context {
        bail!(
            "the prompt has {} tokens and the answer may have {}, but the model's maximum context length is \
             {context} tokens; shorten the document, lower --max-tokens, or use a model with a longer context",
            tokens.len(),
            max_tokens
        );
    }
    Ok(tokens)
}

/// A progress bar on stderr; hidden where that is no terminal.
pub fn bar(what: &'static str, unit: &str) -> ProgressBar {
    let style = format!("{{msg}} [{{bar:30}}] {{pos}}/{{len}} {unit}, {{elapsed}} (about {{eta}} left)");
    let bar = ProgressBar::new(0).with_message(what);
    bar.with_style(ProgressStyle::with_template(&style).expect("a valid template").progress_chars("=> "))
}
