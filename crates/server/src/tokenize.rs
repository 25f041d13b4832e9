//! Which tokens is a text, and which text are tokens? In vLLM's words and in llama-server's.

use crate::app::{App, Loaded};
use crate::body::{JsonObject, Reader};
use crate::chat;
use crate::completions::encode;
use crate::error::{ApiError, ErrorBody};
use crate::fields::ChatOnly;
use crate::tools::Tools;
use crate::understand::{aside, with_headers};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// A text as `prompt` (vLLM) or `content` (llama-server), or a conversation as `messages`.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct TokenizeFields {
    /// The model.
    pub model: Option<String>,
    /// A text.
    pub prompt: Option<String>,
    /// A text; the answer is llama-server's.
    pub content: Option<String>,
    /// Whether the tokens that the model wants around a text are added; with `prompt` they are unless this is false.
    pub add_special_tokens: Option<bool>,
    /// The same with `content`, where they are not unless this is true.
    pub add_special: Option<bool>,
    /// Whether special tokens that are written in `content` are taken for what they are; they are unless this is false.
    pub parse_special: Option<bool>,
    /// Whether the texts of tokens come in `token_strs`.
    pub return_token_strs: Option<bool>,
    /// Whether tokens come with their texts.
    pub with_pieces: Option<bool>,
}

/// What is sent to POST /tokenize.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub struct TokenizeRequest {
    #[serde(flatten)]
    text: TokenizeFields,
    #[serde(flatten)]
    conversation: OptionalChat,
}

/// A conversation in place of a text.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub struct OptionalChat {
    /// The conversation.
    #[schema(value_type = Option<Vec<Object>>)]
    messages: Option<Vec<Value>>,
    /// Whether the prompt ends where an answer begins.
    add_generation_prompt: Option<bool>,
    /// Whether the last message is gone on with.
    continue_final_message: Option<bool>,
}

/// The tokens of a text or conversation.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Tokenized {
    /// How many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<usize>,
    /// Most tokens of prompt and answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<usize>,
    /// Their ids, or ids with texts.
    pub tokens: Vec<TokenOrPiece>,
    /// Their texts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_strs: Option<Vec<String>>,
}

/// A token.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum TokenOrPiece {
    /// Its id.
    Id(u32),
    /// Its id and text.
    Piece {
        /// The id.
        id: u32,
        /// The text, or its bytes if they are none.
        #[schema(value_type = Value)]
        piece: PieceText,
    },
}

/// The text of a token, or its bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum PieceText {
    /// Text.
    Text(String),
    /// Bytes that are no text.
    Bytes(Vec<u8>),
}

/// Tells the tokens of a text or a conversation.
#[utoipa::path(post, path = "/tokenize", request_body = TokenizeRequest, responses(
    (status = 200, description = "The tokens", body = Tokenized),
    (status = "4XX", description = "A request that cannot be met", body = ErrorBody),
    (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
))]
pub async fn tokenize(State(app): State<App>, JsonObject(object): JsonObject) -> Result<Response, ApiError> {
    let loaded = app.ready()?.clone();
    let (tokens, unread) = aside(move || tokens_of(&app, &loaded, &object)).await?;
    Ok(with_headers(Json(tokens).into_response(), &unread, None))
}

fn tokens_of(
    app: &App,
    loaded: &Loaded,
    object: &Map<String, Value>,
) -> Result<(Tokenized, Vec<String>), ApiError> {
    let mut reader = Reader::new(object, &Tools::FIELDS);
    let fields: TokenizeFields = reader.read()?;
    let chat: ChatOnly = reader.read()?;
    let unread = reader.unread(app)?;
    app.known_model(fields.model.as_deref())?;
    let text = &loaded.text;
    let ids = match (&fields.prompt, &fields.content, &chat.messages) {
        (Some(prompt), None, None) => encode(text, prompt, fields.add_special_tokens.unwrap_or(true))?,
        (None, Some(content), None) => {
            let adds = fields.add_special.unwrap_or(false);
            match fields.parse_special.unwrap_or(true) {
                true => encode(text, content, adds)?,
                false if adds => text.encode_plain(content).map_err(|e| ApiError::text("content", &e))?,
                false => text
                    .encode(content, mosaickv_model::Specials::Literal)
                    .map_err(|e| ApiError::text("content", &e))?,
            }
        }
        (None, None, Some(_)) => chat::prompt(app, loaded, &chat, Tools::from_request(object)?.as_ref())?,
        _ => return Err(ApiError::invalid("prompt", "Give one of prompt, content and messages.")),
    };
    let piece = |id: u32| {
        let bytes = text.token_bytes(id).unwrap_or_default();
        String::from_utf8(bytes).map_or_else(|error| PieceText::Bytes(error.into_bytes()), PieceText::Text)
    };
    let name = |&id: &u32| text.tokenizer().id_to_token(id).unwrap_or_default();
    let with_pieces = fields.with_pieces.unwrap_or(false);
    let as_llama = fields.content.is_some();
    let tokenized = Tokenized {
        count: (!as_llama).then_some(ids.len()),
        max_model_len: (!as_llama).then_some(loaded.context),
        token_strs: fields.return_token_strs.unwrap_or(false).then(|| ids.iter().map(name).collect()),
        tokens: ids
            .iter()
            .map(|&id| match with_pieces {
                true => TokenOrPiece::Piece { id, piece: piece(id) },
                false => TokenOrPiece::Id(id),
            })
            .collect(),
    };
    Ok((tokenized, unread))
}

/// Tokens whose text is wanted.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct DetokenizeRequest {
    /// The model.
    pub model: Option<String>,
    /// Their ids.
    #[schema(required, value_type = Vec<u32>)]
    pub tokens: Option<Vec<u32>>,
}

/// The text of tokens.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Detokenized {
    /// As vLLM calls it.
    pub prompt: String,
    /// The same, as llama-server calls it.
    pub content: String,
}

/// Tells the text of tokens, special ones as they are written.
#[utoipa::path(post, path = "/detokenize", request_body = DetokenizeRequest, responses(
    (status = 200, description = "The text", body = Detokenized),
    (status = "4XX", description = "A request that cannot be met", body = ErrorBody),
    (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
))]
pub async fn detokenize(
    State(app): State<App>,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let loaded = app.ready()?.clone();
    let mut reader = Reader::new(&object, &[]);
    let fields: DetokenizeRequest = reader.read()?;
    let unread = reader.unread(&app)?;
    app.known_model(fields.model.as_deref())?;
    let missing = || ApiError::invalid("tokens", "tokens is missing; wanted a list of token ids.");
    let tokens = fields.tokens.ok_or_else(missing)?;
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= loaded.vocab) {
        let message = format!("There is no token {id}; the vocabulary has {}.", loaded.vocab);
        return Err(ApiError::invalid("tokens", message));
    }
    let text =
        aside(move || loaded.text.decode_written(&tokens).map_err(|error| ApiError::text("tokens", &error)));
    let prompt = text.await?;
    Ok(with_headers(Json(Detokenized { content: prompt.clone(), prompt }).into_response(), &unread, None))
}
