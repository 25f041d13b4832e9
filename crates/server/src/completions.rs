//! POST /v1/completions: how does this text go on, and how probable was what it says?

use crate::answer::{Answering, Asked, Echo, Order};
use crate::app::{App, Loaded, now};
use crate::body::{JsonObject, Reader};
use crate::chat::restriction;
use crate::choice::Delta;
use crate::contexts::Held;
use crate::error::{ApiError, ErrorBody};
use crate::fields::{Common, CompletionOnly, CompletionRequest, Prompt};
use crate::grammar::Wanted;
use crate::job::Caller;
use crate::plan::{MOST_LOGPROBS, Plan, within};
use crate::reply::{Reply, TextChoice, TextLogprobs};
use crate::stream::{Begun, Complete, Head, Shape};
use crate::understand::{Arrival, aside};
use axum::Extension;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use mosaickv_model::{Specials, Text};
use serde_json::{Map, Value};
use std::sync::Arc;
use uuid::Uuid;

/// Tokens that are answered where nobody says how many, as with OpenAI.
const DEFAULT_TOKENS: usize = 16;

/// Continues texts.
#[utoipa::path(
    post, path = "/v1/completions", request_body = CompletionRequest,
    responses(
        (status = 200, description = "The texts; with stream: true as events, each a chunk", content(
            (Reply<TextChoice> = "application/json"), (Reply<TextChoice> = "text/event-stream"))),
        (status = "4XX", description = "A request that cannot be met", body = ErrorBody),
        (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
    ),
)]
pub async fn completions(
    State(app): State<App>,
    Extension(arrival): Extension<Arrival>,
    headers: HeaderMap,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let (loaded, caller) = app.admit(&arrival)?;
    let keep_alive = app.options().keep_alive;
    let begun = aside(move || begin(&app, &loaded, (caller, &headers), &object)).await?;
    begun.respond(keep_alive).await
}

fn begin(
    app: &App,
    loaded: &Arc<Loaded>,
    (caller, headers): (Caller, &HeaderMap),
    object: &Map<String, Value>,
) -> Result<Begun<TextShape>, ApiError> {
    let mut reader = Reader::new(object, &Wanted::FIELDS);
    let common: Common = reader.read()?;
    let fields: CompletionOnly = reader.read()?;
    let unread = reader.unread(app)?;
    let (plan, kv, held) = app.plan(loaded, headers, &common)?;
    let prompts = prompts((app, loaded), &fields, &plan, held.as_ref())?;
    let logprobs = within("logprobs", fields.logprobs, 0..=MOST_LOGPROBS)?;
    let restriction = restriction(loaded, object, &common, None)?;
    let each = |asked: &Asked| vec![asked.tokens.clone(); plan.choices];
    let shape = TextShape {
        has_logprobs: logprobs.is_some(),
        prompt_ids: plan.with_ids.then(|| prompts.iter().flat_map(each).map(Some).collect()),
    };
    let head = Head {
        id: format!("cmpl-{}", Uuid::new_v4().simple()),
        object: "text_completion",
        created: now(),
        model: app.name().to_owned(),
        prompt_token_ids: None,
    };
    let delivery = plan.delivery;
    let pin = held.map(|held| held.pin);
    let order = Order { prompts, plan, kv, logprobs, restriction, pin };
    Ok(Begun { answering: Answering::begin(app, loaded, caller, order)?, head, shape, delivery, unread })
}

/// A prompt's tokens, and its text if it came as one.
type Given = (Vec<u32>, Option<String>);

/// The prompts' tokens.
fn prompts(
    (app, loaded): (&App, &Loaded),
    fields: &CompletionOnly,
    plan: &Plan,
    held: Option<&Held>,
) -> Result<Vec<Asked>, ApiError> {
    let missing = || ApiError::invalid("prompt", "prompt is missing or empty; wanted a text or token ids.");
    // What goes on from a context is no beginning.
    let adds = fields.add_special_tokens.unwrap_or(held.is_none());
    let texts = |texts: &[String]| -> Result<Vec<Given>, ApiError> {
        texts.iter().map(|text| Ok((encode(&loaded.text, text, adds)?, Some(text.clone())))).collect()
    };
    let prompts = match fields.prompt.as_ref().ok_or_else(missing)? {
        Prompt::Text(text) => texts(std::slice::from_ref(text))?,
        Prompt::Texts(list) => texts(list)?,
        Prompt::Tokens(tokens) => vec![(tokens.clone(), None)],
        Prompt::TokenLists(lists) => lists.iter().map(|tokens| (tokens.clone(), None)).collect(),
    };
    if prompts.is_empty() {
        return Err(missing());
    }
    prompts.into_iter().map(|prompt| asked((app, loaded), fields, (plan, held), prompt)).collect()
}

fn asked(
    (app, loaded): (&App, &Loaded),
    fields: &CompletionOnly,
    (plan, held): (&Plan, Option<&Held>),
    (mut tokens, written): Given,
) -> Result<Asked, ApiError> {
    if let Some(held) = held {
        tokens.splice(0..0, held.tokens.iter().copied());
    }
    if tokens.is_empty() {
        return Err(ApiError::invalid("prompt", "The prompt is empty; it needs at least one token."));
    }
    let is_reported = fields.echo.unwrap_or(false) || fields.score_from.is_some();
    if plan.most_tokens == Some(0) && !is_reported {
        let message = "max_tokens is 0; wanted at least 1, or echo or score_from.";
        return Err(ApiError::invalid("max_tokens", message));
    }
    let before = tokens.len();
    let most_tokens = plan.fit(&mut tokens, DEFAULT_TOKENS, loaded.context)?;
    let read = match fields.score_from {
        None => held.map_or_else(|| app.most_exact(tokens.len()), |held| held.named.prompt),
        Some(_) if held.is_some() => {
            let message = "score_from says where a prompt is compressed, and the context has been already; leave it out.";
            return Err(ApiError::invalid("score_from", message));
        }
        Some(from) if (1..tokens.len()).contains(&from) => from,
        Some(from) => {
            let message = format!(
                "score_from is {from}; wanted 1 to {}, the prompt's tokens less one.",
                tokens.len() - 1
            );
            return Err(ApiError::invalid("score_from", message));
        }
    };
    let echo = match fields.echo.unwrap_or(false) {
        true => Echo::On(written.filter(|_| before == tokens.len() && held.is_none())),
        false => Echo::Off,
    };
    let is_scored = fields.score_from.is_some();
    Ok(Asked { tokens, read, is_scored, most_tokens, echo })
}

/// The tokens of a text to be continued, in which special tokens are what they are: whoever writes the whole prompt may write
/// turns of a conversation too. A beginning of text that is written is not added again.
pub fn encode(text: &Text, written: &str, adds: bool) -> Result<Vec<u32>, ApiError> {
    let specials = if adds { Specials::Added } else { Specials::Written };
    let mut tokens = text.encode(written, specials).map_err(|error| ApiError::text("prompt", &error))?;
    if adds && text.bos().is_some_and(|bos| tokens.starts_with(&[bos, bos])) {
        tokens.remove(0);
    }
    Ok(tokens)
}

/// How continued texts are written.
struct TextShape {
    has_logprobs: bool,
    /// The prompt's tokens of each answer until they are sent, where ids were asked for.
    prompt_ids: Option<Vec<Option<Vec<u32>>>>,
}

impl TextShape {
    fn take_prompt(&mut self, index: usize) -> Option<Vec<u32>> {
        self.prompt_ids.as_mut()?.get_mut(index)?.take()
    }
}

impl Shape for TextShape {
    type Piece = TextChoice;
    type Choice = TextChoice;

    fn pieces(&mut self, text: &Text, index: usize, delta: Delta) -> Vec<TextChoice> {
        let has_logprobs = self.has_logprobs && !delta.entries.is_empty();
        let with_ids = self.prompt_ids.is_some() && !delta.ids.is_empty();
        if delta.text.is_empty() && !has_logprobs && !with_ids && delta.finish.is_none() {
            return vec![];
        }
        vec![TextChoice {
            index,
            text: delta.text,
            logprobs: has_logprobs.then(|| TextLogprobs::new(&delta.entries, text)),
            finish_reason: delta.finish.map(|(finish, _)| finish),
            token_ids: with_ids.then_some(delta.ids),
            prompt_token_ids: self.take_prompt(index),
        }]
    }

    fn choice(&mut self, loaded: &Loaded, index: usize, answer: Complete) -> TextChoice {
        TextChoice {
            index,
            text: answer.text,
            logprobs: self.has_logprobs.then(|| TextLogprobs::new(&answer.entries, &loaded.text)),
            finish_reason: answer.finish,
            token_ids: self.prompt_ids.is_some().then_some(answer.ids),
            prompt_token_ids: self.take_prompt(index),
        }
    }
}
