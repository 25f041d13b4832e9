//! What is wanted, in numbers that have been checked? From the fields of a request to what the engine takes.

use crate::app::Loaded;
use crate::error::ApiError;
use crate::fields::Common;
use crate::stop::Keep;
use mosaickv_engine::Sampling;
use std::ops::RangeInclusive;
use std::sync::Arc;
use uuid::Uuid;

/// Most answers to a prompt.
const MOST_CHOICES: usize = 128;

/// Most texts that end an answer, and their most bytes.
const MOST_STOPS: usize = 4;
const LONGEST_STOP: usize = 4096;

/// Of how many tokens log probabilities can be had.
pub const MOST_LOGPROBS: usize = 20;

/// How answers are made and sent.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How tokens are chosen; the seed is the first answer's.
    pub sampling: Sampling,
    /// Answers to each prompt.
    pub choices: usize,
    /// Most tokens of an answer, if that was said.
    pub most_tokens: Option<usize>,
    /// Tokens before which nothing ends an answer.
    pub least_tokens: usize,
    /// Tokens that end it.
    pub ends: Vec<u32>,
    /// Texts that end it.
    pub stops: Vec<String>,
    /// Whether it has the text that ends it.
    pub keep: Keep,
    /// Whether special tokens are seen in the text.
    pub specials: Specials,
    /// Last tokens of the prompt that are read.
    pub truncate_prompt: Option<usize>,
    /// Whether token ids are sent.
    pub with_ids: bool,
    /// How the answer is sent.
    pub delivery: Delivery,
    /// Requests of a higher one go first.
    pub priority: i32,
    /// Only requests with the same share what they read.
    pub salt: Option<Arc<str>>,
    /// Whether the answer says what was stored.
    pub with_report: bool,
}

/// Whether special tokens are seen in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// They are not.
    LeftOut,
    /// As the vocabulary writes them.
    Written,
}

/// How an answer is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// When it is complete.
    Whole,
    /// As it is made.
    Stream,
    /// The same, and at the end the tokens used.
    StreamWithUsage,
}

impl Plan {
    /// What these fields ask of this model.
    pub fn new(common: &Common, loaded: &Loaded) -> Result<Plan, ApiError> {
        let stream_options = common.stream_options;
        let with_usage = stream_options.and_then(|options| options.include_usage).unwrap_or(false);
        let delivery = match (common.stream.unwrap_or(false), with_usage) {
            (false, _) if stream_options.is_some() => {
                let message = "stream_options can only be given with stream: true.";
                return Err(ApiError::invalid("stream_options", message));
            }
            (false, _) => Delivery::Whole,
            (true, false) => Delivery::Stream,
            (true, true) => Delivery::StreamWithUsage,
        };
        let least_tokens = common.min_tokens.unwrap_or(0);
        if let Some(most) = common.max_tokens.filter(|most| least_tokens > *most) {
            let message = format!("min_tokens is {least_tokens}, and max_tokens only {most}.");
            return Err(ApiError::invalid("min_tokens", message));
        }
        let flag = |field: Option<bool>| field.unwrap_or(false);
        Ok(Plan {
            sampling: sampling(common, loaded.vocab)?,
            choices: within("n", common.n, 1..=MOST_CHOICES)?.unwrap_or(1),
            most_tokens: common.max_tokens,
            least_tokens,
            ends: ends(common, loaded)?,
            stops: stops(common)?,
            keep: if flag(common.include_stop_str_in_output) { Keep::After } else { Keep::Before },
            specials: match common.skip_special_tokens {
                Some(false) => Specials::Written,
                _ => Specials::LeftOut,
            },
            truncate_prompt: within("truncate_prompt_tokens", common.truncate_prompt_tokens, 1..=usize::MAX)?,
            with_ids: flag(common.return_token_ids),
            delivery,
            priority: common.priority.unwrap_or(0),
            salt: common.cache_salt.as_deref().map(Arc::from),
            with_report: common.kv.as_ref().and_then(|kv| kv.report).unwrap_or(true),
        })
    }

    /// The tokens of a prompt that are read, and how many may be answered: as many as the context has room for, unless
    /// fewer were asked for. `longest` is the most where nothing was said.
    pub fn fit(&self, prompt: &mut Vec<u32>, longest: usize, context: usize) -> Result<usize, ApiError> {
        if let Some(tokens) = self.truncate_prompt {
            prompt.drain(..prompt.len().saturating_sub(tokens));
        }
        let room = context.saturating_sub(prompt.len());
        let most = self.most_tokens.unwrap_or_else(|| longest.min(room).max(usize::from(longest > 0)));
        if most > room {
            return Err(ApiError::context(prompt.len(), most, context));
        }
        Ok(most)
    }
}

/// The number, if it is in its range.
pub fn within<T: PartialOrd + std::fmt::Display>(
    param: &str,
    value: Option<T>,
    range: RangeInclusive<T>,
) -> Result<Option<T>, ApiError> {
    match value {
        Some(x) if !range.contains(&x) => {
            let message = format!("{param} is {x}; wanted {} to {}.", range.start(), range.end());
            Err(ApiError::invalid(param, message))
        }
        value => Ok(value),
    }
}

fn sampling(common: &Common, vocab: usize) -> Result<Sampling, ApiError> {
    let top_k = match common.top_k {
        None | Some(-1) => 0,
        Some(k) => usize::try_from(k)
            .map_err(|_| ApiError::invalid("top_k", format!("top_k is {k}; wanted -1 or more.")))?,
    };
    let repetition = common.repetition_penalty.unwrap_or(1.0);
    if !(repetition > 0.0 && repetition <= 100.0) {
        let message = format!("repetition_penalty is {repetition}; wanted more than 0 and at most 100.");
        return Err(ApiError::invalid("repetition_penalty", message));
    }
    Ok(Sampling {
        temperature: within("temperature", common.temperature, 0.0..=2.0)?.unwrap_or(1.0),
        top_k,
        // 0 asks for the most probable token alone.
        top_p: within("top_p", common.top_p, 0.0..=1.0)?.unwrap_or(1.0).max(f32::MIN_POSITIVE),
        min_p: within("min_p", common.min_p, 0.0..=1.0)?.unwrap_or(0.0),
        repetition_penalty: repetition,
        presence_penalty: within("presence_penalty", common.presence_penalty, -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: within("frequency_penalty", common.frequency_penalty, -2.0..=2.0)?.unwrap_or(0.0),
        logit_bias: logit_bias(common, vocab)?,
        seed: common.seed.map_or_else(|| Uuid::new_v4().as_u64_pair().0, i64::cast_unsigned),
    })
}

fn logit_bias(common: &Common, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let biases = common.logit_bias.iter().flatten().map(|(token, &bias)| {
        let param = format!("logit_bias.{token}");
        let id = token.parse().ok().filter(|id: &u32| (*id as usize) < vocab).ok_or_else(|| {
            ApiError::invalid(&param, format!("{token:?} is not the id of one of {vocab} tokens."))
        })?;
        within(&param, Some(bias), -100.0..=100.0)?;
        Ok((id, bias))
    });
    biases.collect()
}

fn ends(common: &Common, loaded: &Loaded) -> Result<Vec<u32>, ApiError> {
    let mut ends = match common.ignore_eos {
        Some(true) => vec![],
        _ => loaded.text.eos().to_vec(),
    };
    for &id in common.stop_token_ids.iter().flatten() {
        if id as usize >= loaded.vocab {
            let message = format!("There is no token {id}; the vocabulary has {}.", loaded.vocab);
            return Err(ApiError::invalid("stop_token_ids", message));
        }
        ends.push(id);
    }
    ends.sort_unstable();
    ends.dedup();
    Ok(ends)
}

fn stops(common: &Common) -> Result<Vec<String>, ApiError> {
    let stops = common.stop.clone().map_or_else(Vec::new, |stop| stop.into_vec());
    if stops.len() > MOST_STOPS {
        let message = format!("There are {} stop texts; wanted at most {MOST_STOPS}.", stops.len());
        return Err(ApiError::invalid("stop", message));
    }
    if stops.iter().any(|stop| stop.is_empty() || stop.len() > LONGEST_STOP) {
        let message = format!("A stop text must have 1 to {LONGEST_STOP} bytes.");
        return Err(ApiError::invalid("stop", message));
    }
    Ok(stops)
}
