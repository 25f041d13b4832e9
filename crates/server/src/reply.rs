//! What does an answer look like in JSON? The types of both kinds of completion, whole and in chunks.

use crate::answer::Tally;
use crate::choice::Entry;
use crate::kv::KvReport;
use mosaickv_model::Text;
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it, or a text or token that was to end it came.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
    /// It calls tools.
    ToolCalls,
}

impl Finish {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
        }
    }
}

/// An answer, or a chunk of one.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Reply<C> {
    /// The same in all chunks of an answer.
    pub id: String,
    /// What this is.
    pub object: &'static str,
    /// When it was asked for, in seconds of Unix time.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// The answers, or pieces of them.
    pub choices: Vec<C>,
    /// The tokens used; null in chunks before the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
    /// What keys and values took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv: Option<KvReport>,
    /// How long it took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
    /// The tokens of a conversation, where ids were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// Tokens used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Of all prompts, each counted once.
    pub prompt_tokens: usize,
    /// Of all answers.
    pub completion_tokens: usize,
    /// Of both.
    pub total_tokens: usize,
    /// More on the prompts.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// More on the tokens of prompts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Those whose keys and values were there before.
    pub cached_tokens: usize,
}

/// How long an answer took, as llama-server says it. Of several answers the slowest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
pub struct Timings {
    /// Tokens of the prompts.
    pub prompt_n: usize,
    /// Milliseconds of reading them.
    pub prompt_ms: f64,
    /// Tokens a second.
    pub prompt_per_second: f64,
    /// Tokens answered.
    pub predicted_n: usize,
    /// Milliseconds from the first to the last.
    pub predicted_ms: f64,
    /// Tokens a second.
    pub predicted_per_second: f64,
    /// Milliseconds of waiting before.
    pub queue_ms: f64,
}

impl Usage {
    /// Of what was counted.
    pub fn new(tally: &Tally) -> Usage {
        Usage {
            prompt_tokens: tally.prompt_tokens,
            completion_tokens: tally.output_tokens,
            total_tokens: tally.prompt_tokens + tally.output_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: tally.cached_tokens() },
        }
    }
}

impl Timings {
    /// Of what was counted.
    pub fn new(tally: &Tally) -> Timings {
        let longest = |of: fn(&mosaickv_engine::Bill) -> std::time::Duration| {
            tally.bills.iter().map(of).max().unwrap_or_default().as_secs_f64()
        };
        let (prompt, decode) = (longest(|bill| bill.prefill), longest(|bill| bill.decode));
        let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
        Timings {
            prompt_n: tally.prompt_tokens,
            prompt_ms: prompt * 1e3,
            prompt_per_second: rate(tally.prompt_tokens, prompt),
            predicted_n: tally.output_tokens,
            predicted_ms: decode * 1e3,
            predicted_per_second: rate(tally.output_tokens, decode),
            queue_ms: longest(|bill| bill.queued) * 1e3,
        }
    }
}

/// An answer in a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Which of the answers.
    pub index: usize,
    /// What the model says.
    pub message: AssistantMessage,
    /// Its tokens and their log probabilities.
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: Finish,
    /// Its tokens' ids, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// What the model says.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct AssistantMessage {
    /// `assistant`.
    pub role: &'static str,
    /// Its text; null if it only calls tools.
    #[schema(required)]
    pub content: Option<String>,
    /// Always null.
    #[schema(required)]
    pub refusal: Option<String>,
    /// The tools it calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Object>)]
    pub tool_calls: Vec<Value>,
}

/// A piece of an answer in a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatPiece {
    /// Which of the answers.
    pub index: usize,
    /// What is new.
    pub delta: ChatDelta,
    /// The new tokens and their log probabilities.
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended, in its last piece.
    #[schema(required)]
    pub finish_reason: Option<Finish>,
    /// The new tokens' ids, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// What is new in a message.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct ChatDelta {
    /// `assistant`, in the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// A tool that it calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Object>)]
    pub tool_calls: Vec<Value>,
}

/// Tokens of a message and their log probabilities.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// In their order.
    pub content: Vec<ChatLogprob>,
    /// Always null.
    #[schema(required)]
    pub refusal: Option<Vec<ChatLogprob>>,
}

/// A token of a message.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprob {
    /// The token and its log probability.
    #[serde(flatten)]
    pub token: TokenLogprob,
    /// The most probable tokens at its place.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// A token and its log probability.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct TokenLogprob {
    /// Its text, U+FFFD for what is no whole character.
    pub token: String,
    /// The natural logarithm of its probability.
    pub logprob: f64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// Of these tokens.
    pub fn new(entries: &[Entry], text: &Text) -> ChatLogprobs {
        let token = |id: u32, logprob: f32| {
            let bytes = text.token_bytes(id).unwrap_or_default();
            TokenLogprob {
                token: String::from_utf8_lossy(&bytes).into_owned(),
                logprob: finite(logprob),
                bytes,
            }
        };
        let content = entries.iter().map(|entry| ChatLogprob {
            token: token(entry.id, entry.logprob.unwrap_or(0.0)),
            top_logprobs: entry.top.iter().map(|&(id, logprob)| token(id, logprob)).collect(),
        });
        ChatLogprobs { content: content.collect(), refusal: None }
    }
}

/// A continued text, or a piece of one.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct TextChoice {
    /// Which of the answers; those to the first prompt come first.
    pub index: usize,
    /// The text.
    pub text: String,
    /// Its tokens and their log probabilities.
    #[schema(required)]
    pub logprobs: Option<TextLogprobs>,
    /// Why it ended.
    #[schema(required)]
    pub finish_reason: Option<Finish>,
    /// Its tokens' ids, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// The prompt's, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// Tokens of a text and their log probabilities, each list as long as the others.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct TextLogprobs {
    /// Texts of tokens; `bytes:\xe2` for what is no whole character.
    pub tokens: Vec<String>,
    /// Natural logarithms of their probabilities; null for the first token of a prompt.
    pub token_logprobs: Vec<Option<f64>>,
    /// The most probable tokens at each place, and the one that is there.
    #[schema(value_type = Vec<Option<Object>>)]
    pub top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Characters of the text before each.
    pub text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// Of these tokens.
    pub fn new(entries: &[Entry], text: &Text) -> TextLogprobs {
        let mut lists = TextLogprobs::default();
        for entry in entries {
            let name = token_name(text, entry.id);
            lists.top_logprobs.push(entry.logprob.map(|logprob| {
                let mut top = Map::new();
                for &(id, logprob) in entry.top.iter().chain([&(entry.id, logprob)]) {
                    // Of two tokens with the same bytes the more probable one counts.
                    top.entry(token_name(text, id)).or_insert_with(|| json!(finite(logprob)));
                }
                top
            }));
            lists.tokens.push(name);
            lists.token_logprobs.push(entry.logprob.map(finite));
            lists.text_offset.push(entry.start);
        }
        lists
    }
}

/// A token's text, or its bytes if they are no text.
fn token_name(text: &Text, id: u32) -> String {
    String::from_utf8(text.token_bytes(id).unwrap_or_default()).unwrap_or_else(|error| {
        error.as_bytes().iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}"))
    })
}

/// JSON has no infinity: what cannot be is very improbable.
fn finite(logprob: f32) -> f64 {
    f64::from(logprob.clamp(-9999.0, 0.0))
}
