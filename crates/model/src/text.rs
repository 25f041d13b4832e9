//! Between text and tokens: the model's vocabulary, its special tokens and its chat template.
//!
//! Both file formats end in one `tokenizers` object: `text::vocabulary` builds it from GGUF metadata, a folder brings
//! `tokenizer.json`. Nothing here knows weights or requests.

mod conversation;
mod pretokenize;
mod template;
mod tokens;
mod vocabulary;

use std::path::Path;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use crate::ModelError;
use crate::config::gguf::Metadata;
use crate::shards::read_json;
pub use conversation::{Encoded, Ending};
use template::ChatTemplate;

/// What the text of a special token (`<|im_start|>`) stands for, and whether the model's own are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// Recognized where they are written, none added: for the output of [`Text::chat`].
    Written,
    /// Recognized, and those added that the model wants around a bare text, such as BOS: for plain completion.
    Added,
    /// Letters like any other, none added: for text from someone who must not end a turn.
    Literal,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// A model's tokenizer and chat template.
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    literal: OnceLock<Tokenizer>, // the same without special tokens, made when first needed
    template: Option<ChatTemplate>,
    bos: Option<u32>,
    eos: Vec<u32>,
}

/// Tokens that end a turn or a text in any model that has them, whatever else its files name.
const ENDS: [&str; 11] = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<EOT>",
    "</s>",
    "<｜end▁of▁sentence｜>",
];

impl Text {
    pub(crate) fn from_gguf(metadata: &Metadata<'_>) -> Result<Text, ModelError> {
        let (tokenizer, named) = vocabulary::read(metadata)?;
        let mut text = Text::new(tokenizer, named.bos, named.ends);
        if let Some(source) = metadata.text("tokenizer.chat_template")? {
            let end = named.eos.and_then(|id| text.tokenizer.id_to_token(id));
            text.set_template(source, end)?;
        }
        Ok(text)
    }

    /// Reads `tokenizer.json`, and what is there of `tokenizer_config.json`, `generation_config.json` and
    /// `chat_template.jinja`; `config` is the content of `config.json`.
    pub(crate) fn from_folder(folder: &Path, config: &Map<String, Value>) -> Result<Text, ModelError> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        let mut tokenizer = Tokenizer::from_bytes(bytes)
            .map_err(|e| ModelError::Damaged { path, what: format!("not a tokenizer: {e}") })?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| tokenizer_error(&e))?;
        let optional = |name: &str| {
            let path = folder.join(name);
            if path.exists() { read_json(&path) } else { Ok(Map::new()) }
        };
        let settings = optional("tokenizer_config.json")?;
        let generation = optional("generation_config.json")?;

        let bos = token_named(&settings, "bos_token");
        let eos = token_named(&settings, "eos_token");
        let mut ends = ids(generation.get("eos_token_id"));
        ends.extend(ids(config.get("eos_token_id")));
        ends.extend(eos.as_deref().and_then(|token| tokenizer.token_to_id(token)));
        let bos = bos.and_then(|token| tokenizer.token_to_id(&token));
        let mut text = Text::new(tokenizer, bos, ends);

        let beside = folder.join("chat_template.jinja");
        if beside.exists() {
            let source = std::fs::read_to_string(&beside)
                .map_err(|source| ModelError::Io { path: beside.clone(), source })?;
            text.set_template(&source, eos)?;
        } else if let Some(source) = settings.get("chat_template").and_then(template_source) {
            text.set_template(source, eos)?;
        }
        Ok(text)
    }

    fn new(tokenizer: Tokenizer, bos: Option<u32>, mut eos: Vec<u32>) -> Text {
        eos.extend(ENDS.iter().filter_map(|name| tokenizer.token_to_id(name)));
        eos.sort_unstable();
        eos.dedup();
        Text { tokenizer, literal: OnceLock::new(), template: None, bos, eos }
    }

    fn set_template(&mut self, source: &str, eos: Option<String>) -> Result<(), ModelError> {
        let bos = self.bos.and_then(|id| self.tokenizer.id_to_token(id)).unwrap_or_default();
        self.template = Some(ChatTemplate::new(source, bos, eos.unwrap_or_default())?);
        Ok(())
    }

    /// Uses `source`, a Jinja template, in place of the model's own chat template.
    pub fn replace_template(&mut self, source: &str) -> Result<(), ModelError> {
        let eos = self.eos.first().and_then(|&id| self.tokenizer.id_to_token(id));
        self.set_template(source, eos)
    }

    /// Refuses a vocabulary with more tokens than the model has rows to embed them.
    pub(crate) fn fits(&self, rows: usize) -> Result<(), ModelError> {
        let most = self.tokenizer.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        let wrong = if most >= rows {
            format!("token {most} in a model of {rows} embeddings; the tokenizer belongs to another model")
        } else if let Some(id) = self.eos.iter().chain(&self.bos).find(|&&id| id as usize >= rows) {
            format!(
                "special token {id} in a model of {rows} embeddings; the tokenizer belongs to another model"
            )
        } else {
            return Ok(());
        };
        Err(ModelError::Tokenizer { what: wrong })
    }

    /// The tokens of `text`.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, ModelError> {
        let (tokenizer, add) = match specials {
            Specials::Written => (&self.tokenizer, false),
            Specials::Added => (&self.tokenizer, true),
            Specials::Literal => (self.literal.get_or_init(|| literal(&self.tokenizer)), false),
        };
        let encoding = tokenizer.encode_fast(text, add).map_err(|e| tokenizer_error(&e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `tokens`, special tokens left out, bytes that are no UTF-8 as U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        self.tokenizer.decode(tokens, true).map_err(|e| tokenizer_error(&e))
    }

    /// The prompt of a conversation, ending where the assistant's answer begins.
    ///
    /// A model without a template (a base model) is an error: any layout made up here would give bad answers
    /// without saying so. [`Text::replace_template`] provides one.
    pub fn chat(&self, messages: &[Message]) -> Result<String, ModelError> {
        self.chat_with(messages, &Map::new())
    }

    /// [`Text::chat`] with messages of any form that the template knows, and further variables (`tools`,
    /// `enable_thinking`, ..), which may override `add_generation_prompt` too.
    pub fn chat_with<M: Serialize>(
        &self,
        messages: &[M],
        variables: &Map<String, Value>,
    ) -> Result<String, ModelError> {
        let template = self.template.as_ref().ok_or(ModelError::NoTemplate)?;
        template.render(messages, variables)
    }

    /// The tokens of a text to be continued: those that the model wants around a text, and what looks like a special
    /// token in `content` taken as letters.
    pub fn encode_plain(&self, content: &str) -> Result<Vec<u32>, ModelError> {
        let mut tokens = self.encode("", Specials::Added)?;
        tokens.extend(self.encode(content, Specials::Literal)?);
        Ok(tokens)
    }

    /// The tokens of a conversation in which the user says `content`, ending where the answer begins. The template's
    /// special tokens are meant; those that somebody wrote into `content` are letters like any other.
    pub fn encode_chat(&self, content: &str) -> Result<Vec<u32>, ModelError> {
        let message = serde_json::json!({"role": "user", "content": content});
        Ok(self.encode_messages(&[message], &Map::new(), Ending::Rendered)?.tokens)
    }

    /// Whether [`Text::chat`] can work.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// All tokens that end an answer, ascending.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The token that begins a text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The id of a token, written as the vocabulary writes it.
    pub fn token(&self, name: &str) -> Option<u32> {
        self.tokenizer.token_to_id(name)
    }

    /// The tokenizer itself, for what this file does not offer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

fn literal(tokenizer: &Tokenizer) -> Tokenizer {
    let mut tokenizer = tokenizer.clone();
    tokenizer.set_encode_special_tokens(true);
    tokenizer
}

fn tokenizer_error(e: &tokenizers::Error) -> ModelError {
    ModelError::Tokenizer { what: e.to_string() }
}

/// `"<s>"`, or `{"content": "<s>", ..}`.
fn token_named(settings: &Map<String, Value>, key: &str) -> Option<String> {
    let token = settings.get(key)?;
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

/// One id or a list of them.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// One template, or the one named "default" of several.
fn template_source(value: &Value) -> Option<&str> {
    let default = |list: &'_ Value| -> Option<usize> {
        list.as_array()?.iter().position(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
    };
    value.as_str().or_else(|| value.get(default(value)?)?.get("template")?.as_str())
}

/// Decodes an answer token by token, holding back what is not yet a whole character.
#[derive(Debug, Default, Clone)]
pub struct Decoder {
    tokens: Vec<u32>, // the last tokens given out, as context, then those held back
    given: usize,     // how many of them were given out
}

/// A character has at most 4 bytes, so more tokens without a whole one are bytes that are no text.
const MOST_HELD_BACK: usize = 4;

impl Decoder {
    /// For a new answer.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// For an answer to a prompt that ends with these tokens, so that its first is spelled as it is after them.
    pub fn after(prompt: &[u32]) -> Decoder {
        let tail = &prompt[prompt.len().saturating_sub(MOST_HELD_BACK)..];
        Decoder { tokens: tail.to_vec(), given: tail.len() }
    }

    /// The text that `token` completes; empty if it completes none, or is special.
    pub fn push(&mut self, text: &Text, token: u32) -> Result<String, ModelError> {
        self.tokens.push(token);
        let before = text.decode(&self.tokens[..self.given])?;
        let all = text.decode(&self.tokens)?;
        let held_back = self.tokens.len() - self.given;
        if all.ends_with('\u{fffd}') && held_back < MOST_HELD_BACK {
            return Ok(String::new());
        }
        Ok(self.give(&before, &all))
    }

    /// What is still held back, at the end of an answer: an incomplete character becomes U+FFFD.
    pub fn finish(&mut self, text: &Text) -> Result<String, ModelError> {
        let before = text.decode(&self.tokens[..self.given])?;
        let all = text.decode(&self.tokens)?;
        Ok(self.give(&before, &all))
    }

    fn give(&mut self, before: &str, all: &str) -> String {
        // A special token adds nothing: keep the context, drop the token.
        if all.len() == before.len() {
            self.tokens.truncate(self.given);
            return String::new();
        }
        self.tokens.drain(..self.given);
        self.given = self.tokens.len();
        all.strip_prefix(before).or_else(|| all.get(before.len()..)).unwrap_or_default().to_owned()
    }
}
