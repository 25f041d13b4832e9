//! What may a request say? The fields of both kinds of completion, as they are written in JSON.
//!
//! Every field may be left out or null. What the numbers may be is said in `plan.rs`; here it is only their types.

use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// What chat and text completions have in common.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct Common {
    /// Which model, as GET /v1/models names it; `@kv=layered:6` after the name chooses how keys and values are kept.
    pub model: Option<String>,
    /// 0 chooses the most probable token, higher is more random.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f32>,
    /// Only the most probable tokens that make up this probability.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Only this many of the most probable tokens; 0 and -1: all.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Only tokens of at least this many times the most probable one's probability.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// What logits of tokens that occurred are divided by.
    pub repetition_penalty: Option<f32>,
    /// Taken off the logits of tokens that were answered.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    /// The same for each time that they were.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of tokens, by id.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// The same seed gives the same answer.
    pub seed: Option<i64>,
    /// How many answers to each prompt.
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<usize>,
    /// Texts before which an answer ends, up to four.
    pub stop: Option<OneOrMore>,
    /// Tokens that end an answer besides the model's own.
    pub stop_token_ids: Option<Vec<u32>>,
    /// Whether the answer ends after the stop text, not before it.
    pub include_stop_str_in_output: Option<bool>,
    /// Whether the model's own end tokens do not end an answer.
    pub ignore_eos: Option<bool>,
    /// Tokens before which nothing ends an answer.
    pub min_tokens: Option<usize>,
    /// Most tokens of an answer.
    pub max_tokens: Option<usize>,
    /// Whether special tokens are left out of the text.
    pub skip_special_tokens: Option<bool>,
    /// Only the last so many tokens of the prompt are read.
    #[schema(minimum = 1)]
    pub truncate_prompt_tokens: Option<usize>,
    /// Whether the ids of tokens are sent with their text.
    pub return_token_ids: Option<bool>,
    /// Whether the answer comes in events as it is made.
    pub stream: Option<bool>,
    /// What else a stream has.
    pub stream_options: Option<StreamOptions>,
    /// How keys and values are kept.
    pub kv: Option<KvFields>,
    /// Requests of a higher priority go first.
    pub priority: Option<i32>,
    /// Who asks; has no effect.
    #[expect(dead_code, reason = "clients send it, and it is no unknown field")]
    pub user: Option<String>,
    /// Only requests with the same salt share what was read of their prompts, so that nobody else can tell from its time whether it was.
    pub cache_salt: Option<String>,
}

/// The fields of POST /v1/chat/completions alone.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct ChatOnly {
    /// The conversation: `role`, and `content` as a string or as parts of type `text`.
    #[schema(required, min_items = 1, value_type = Vec<Object>)]
    pub messages: Option<Vec<Value>>,
    /// Most tokens of an answer; the same as `max_tokens`.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<usize>,
    /// Whether the logarithms of tokens' probabilities are sent.
    pub logprobs: Option<bool>,
    /// Of how many of the most probable tokens at each place.
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<usize>,
    /// Whether the prompt ends where an answer begins.
    pub add_generation_prompt: Option<bool>,
    /// Whether the last message is gone on with.
    pub continue_final_message: Option<bool>,
    /// Further variables of the chat template.
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

/// The fields of POST /v1/completions alone.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct CompletionOnly {
    /// A text, texts, token ids or lists of them.
    #[schema(required, value_type = Prompt)]
    pub prompt: Option<Prompt>,
    /// Of how many of the most probable tokens at each place logarithms of probabilities are sent.
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<usize>,
    /// Whether the answer begins with the prompt.
    pub echo: Option<bool>,
    /// The prompt's tokens from this one on are read one by one through the compressed cache, and reported.
    #[schema(minimum = 1)]
    pub score_from: Option<usize>,
    /// Whether the tokens that the model wants around a text are added.
    pub add_special_tokens: Option<bool>,
}

/// What is sent to POST /v1/chat/completions.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub struct ChatRequest {
    #[serde(flatten)]
    chat: ChatOnly,
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    restrictions: Restrictions,
}

/// What an answer must look like, and which functions it may call.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub struct Restrictions {
    /// `{"type": "text"}`, `json_object` or `json_schema`.
    #[schema(value_type = Option<Object>)]
    response_format: Option<Value>,
    /// Functions that the model may call.
    #[schema(value_type = Option<Vec<Object>>)]
    tools: Option<Vec<Value>>,
    /// `none`, `auto`, `required` or a function.
    tool_choice: Option<Value>,
    /// Whether it may call more than one.
    parallel_tool_calls: Option<bool>,
}

/// What is sent to POST /v1/completions.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub struct CompletionRequest {
    #[serde(flatten)]
    completion: CompletionOnly,
    #[serde(flatten)]
    common: Common,
}

/// A text or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged, expecting = "wanted a string or a list of strings")]
pub enum OneOrMore {
    /// One.
    One(String),
    /// Several.
    More(Vec<String>),
}

impl OneOrMore {
    /// All of them.
    pub fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMore::One(text) => vec![text],
            OneOrMore::More(texts) => texts,
        }
    }
}

/// What is to be continued.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "wanted a string, a list of strings, a list of token ids or a list of such lists"
)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Its tokens.
    Tokens(Vec<u32>),
    /// Several texts.
    Texts(Vec<String>),
    /// The tokens of several.
    TokenLists(Vec<Vec<u32>>),
}

/// What else a stream has.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// One more chunk at the end, with the tokens used.
    pub include_usage: Option<bool>,
}

/// How a request's keys and values are kept.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct KvFields {
    /// `exact`, `layered`, `packed` and so on, with parameters as after `--kv`.
    pub format: Option<String>,
    /// Bytes as f16 over bytes stored, of the prompt.
    #[schema(minimum = 1, maximum = 64)]
    pub ratio: Option<f32>,
    /// Bytes that the prompt's keys and values are to take.
    #[schema(minimum = 1)]
    pub budget_bytes: Option<usize>,
    /// What a step reads: `all`, `mass=0.99` or `relative=0.001`.
    pub select: Option<String>,
    /// Whether the answer says what was stored; it does unless this is false.
    pub report: Option<bool>,
    /// The context that the prompt goes on from, as POST /v1/kv/contexts named it.
    pub context: Option<String>,
}
