//! POST /v1/chat/completions: what does the model say next in this conversation?

use crate::answer::{Answering, Asked, Echo, Order};
use crate::app::{App, Loaded, now};
use crate::body::{JsonObject, Reader};
use crate::choice::Delta;
use crate::contexts::Held;
use crate::error::{ApiError, ErrorBody};
use crate::fields::{ChatOnly, ChatRequest, Common};
use crate::grammar::{Restriction, Wanted};
use crate::job::Caller;
use crate::plan::{Delivery, MOST_LOGPROBS, Plan, within};
use crate::reply::{AssistantMessage, ChatChoice, ChatDelta, ChatLogprobs, ChatPiece, Finish, Reply};
use crate::saved::Source;
use crate::stream::{Begun, Complete, Head, Shape};
use crate::tools::{CallReader, Piece, Tools, conversation, read_answer};
use crate::understand::{Arrival, aside};
use axum::Extension;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use mosaickv_kv::Layered;
use mosaickv_model::{Ending, Text};
use serde_json::{Map, Value};
use std::sync::Arc;
use uuid::Uuid;

/// Answers in a conversation.
#[utoipa::path(
    post, path = "/v1/chat/completions", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; with stream: true as events, each a chunk", content(
            (Reply<ChatChoice> = "application/json"), (Reply<ChatPiece> = "text/event-stream"))),
        (status = "4XX", description = "A request that cannot be met", body = ErrorBody),
        (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
    ),
)]
pub async fn chat_completions(
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

/// What a request asks for, checked and given to the engine.
pub fn begin(
    app: &App,
    loaded: &Arc<Loaded>,
    (caller, headers): (Caller, &HeaderMap),
    object: &Map<String, Value>,
) -> Result<Begun<ChatShape>, ApiError> {
    let known: Vec<&str> = Wanted::FIELDS.into_iter().chain(Tools::FIELDS).collect();
    let mut reader = Reader::new(object, &known);
    let mut common: Common = reader.read()?;
    let chat: ChatOnly = reader.read()?;
    let unread = reader.unread(app)?;
    let least = within("max_tokens", common.max_tokens, 1..=usize::MAX)?;
    common.max_tokens =
        within("max_completion_tokens", chat.max_completion_tokens, 1..=usize::MAX)?.or(least);
    let (plan, kv, held) = app.plan(loaded, headers, &common)?;
    let tools = Tools::from_request(object)?;
    let (mut tokens, read) = match &held {
        Some(held) => after(app, loaded, chat.clone(), (tools.as_ref(), held))?,
        None => {
            let tokens = prompt(app, loaded, &chat, tools.as_ref())?;
            let read = boundary(app, loaded, &chat, (tools.as_ref(), &tokens))?;
            (tokens, app.most_exact(read))
        }
    };
    let length = tokens.len();
    let most_tokens = plan.fit(&mut tokens, usize::MAX, loaded.context)?;
    // What is cut off at the front takes the boundary with it.
    let read = if tokens.len() == length { read } else { app.most_exact(tokens.len()) };
    let head = Head {
        id: format!("chatcmpl-{}", Uuid::new_v4().simple()),
        object: if plan.delivery == Delivery::Whole { "chat.completion" } else { "chat.completion.chunk" },
        created: now(),
        model: app.name().to_owned(),
        prompt_token_ids: plan.with_ids.then(|| tokens.clone()),
    };
    let logprobs = logprobs(&chat)?;
    let restriction = restriction(loaded, object, &common, tools.as_ref())?;
    let shape = ChatShape::new(loaded, tools, logprobs.is_some(), &plan);
    let delivery = plan.delivery;
    let prompts = vec![Asked { tokens, read, is_scored: false, most_tokens, echo: Echo::Off }];
    let pin = held.map(|held| held.pin);
    let order = Order { prompts, plan, kv, logprobs, restriction, pin };
    Ok(Begun { answering: Answering::begin(app, loaded, caller, order)?, head, shape, delivery, unread })
}

/// The tokens of a conversation, up to where its answer begins.
pub fn prompt(
    app: &App,
    loaded: &Loaded,
    chat: &ChatOnly,
    tools: Option<&Tools>,
) -> Result<Vec<u32>, ApiError> {
    let messages = chat.messages.as_deref().unwrap_or_default();
    if messages.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "messages is missing or empty; wanted at least one message.",
        ));
    }
    let continues = chat.continue_final_message.unwrap_or(false);
    let generates = chat.add_generation_prompt.unwrap_or(!continues);
    if continues && generates {
        let message = "add_generation_prompt and continue_final_message cannot both be true.";
        return Err(ApiError::invalid("continue_final_message", message));
    }
    let mut conversation = conversation(&loaded.dialect, messages, tools)?;
    let variables = &mut conversation.variables;
    variables.extend(chat.chat_template_kwargs.clone().unwrap_or_default());
    variables.insert("add_generation_prompt".into(), generates.into());
    let ending = if continues { Ending::LastMessage } else { Ending::Rendered };
    let encoded = loaded.text.encode_messages(&conversation.messages, variables, ending);
    let encoded = encoded.map_err(|error| ApiError::text("messages", &error))?;
    if encoded.takes_written {
        app.warn_once(
            "the chat template changes what messages say, so that special tokens written in one were taken for the template's",
        );
    }
    Ok(encoded.tokens)
}

/// The tokens of a conversation that goes on from a context, and how many of them were compressed together there.
fn after(
    app: &App,
    loaded: &Loaded,
    mut chat: ChatOnly,
    (tools, held): (Option<&Tools>, &Held),
) -> Result<(Vec<u32>, usize), ApiError> {
    let Source::Messages(first) = &held.named.source else {
        let message = "The context is of a text; go on from it with POST /v1/completions.";
        return Err(ApiError::invalid("kv.context", message));
    };
    let later = chat.messages.take().unwrap_or_default();
    chat.messages = Some(first.iter().cloned().chain(later).collect());
    let tokens = prompt(app, loaded, &chat, tools)?;
    if !tokens.starts_with(&held.tokens) || tokens.len() == held.tokens.len() {
        let message = "The conversation does not begin with the context's tokens: the chat template writes the first messages \
                       otherwise when others follow, or tools or template variables change them.";
        return Err(ApiError::invalid("kv.context", message));
    }
    Ok((tokens, held.named.prompt))
}

/// Up to where a conversation is compressed together: the end of its first messages that have enough tokens. What follows is read
/// through what is compressed. So all conversations that begin with these messages share them, and a later turn goes on
/// from the one before.
fn boundary(
    app: &App,
    loaded: &Loaded,
    chat: &ChatOnly,
    (tools, tokens): (Option<&Tools>, &[u32]),
) -> Result<usize, ApiError> {
    let messages = chat.messages.as_deref().unwrap_or_default();
    if tokens.len() < Layered::LEAST_TOKENS {
        return Ok(tokens.len());
    }
    for count in 1..messages.len() {
        let first = ChatOnly {
            messages: Some(messages[..count].to_vec()),
            // An answer that followed began where one is begun now.
            add_generation_prompt: Some(messages[count]["role"] == "assistant"),
            continue_final_message: None,
            chat_template_kwargs: chat.chat_template_kwargs.clone(),
            ..ChatOnly::default()
        };
        // Not every template takes the first messages alone.
        let Ok(first) = prompt(app, loaded, &first, tools) else { continue };
        if first.len() >= Layered::LEAST_TOKENS && first.len() < tokens.len() && tokens.starts_with(&first) {
            return Ok(first.len());
        }
    }
    Ok(tokens.len())
}

fn logprobs(chat: &ChatOnly) -> Result<Option<usize>, ApiError> {
    let top = within("top_logprobs", chat.top_logprobs, 0..=MOST_LOGPROBS)?;
    match (chat.logprobs.unwrap_or(false), top) {
        (false, Some(1..)) => {
            Err(ApiError::invalid("top_logprobs", "top_logprobs can only be given with logprobs: true."))
        }
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

/// What restricts the answers, if anything does.
pub fn restriction(
    loaded: &Loaded,
    object: &Map<String, Value>,
    common: &Common,
    tools: Option<&Tools>,
) -> Result<Option<Restriction>, ApiError> {
    let wanted = Wanted::from_request(object)?;
    let forced = tools.filter(|tools| tools.forced());
    if wanted.is_none() && forced.is_none() {
        return Ok(None);
    }
    if common.ignore_eos.unwrap_or(false) {
        let message = "An answer that is restricted ends where its grammar does; leave out ignore_eos.";
        return Err(ApiError::invalid("ignore_eos", message));
    }
    let param = if forced.is_some() { "tool_choice" } else { "response_format" };
    let source = loaded.grammars.as_ref();
    let source = source.map_err(|why| ApiError::invalid(param, why.to_string()))?;
    Ok(match (forced, &wanted) {
        (Some(tools), _) => Some(source.tool_call(tools, &loaded.dialect)?),
        (None, wanted) => wanted.as_ref().map(|wanted| source.grammar(wanted)).transpose()?,
    })
}

/// How answers in a conversation are written.
pub struct ChatShape {
    tools: Option<Tools>,
    has_logprobs: bool,
    with_ids: bool,
    speakers: Vec<Speaker>,
}

/// An answer that is being sent.
#[derive(Default)]
struct Speaker {
    has_begun: bool,
    calls: usize,
    reader: Option<CallReader>,
}

impl ChatShape {
    fn new(loaded: &Loaded, tools: Option<Tools>, has_logprobs: bool, plan: &Plan) -> ChatShape {
        let reader = || tools.as_ref().map(|tools| CallReader::new(&loaded.dialect, tools));
        let speakers =
            (0..plan.choices).map(|_| Speaker { reader: reader(), ..Speaker::default() }).collect();
        ChatShape { has_logprobs, with_ids: plan.with_ids, speakers, tools }
    }
}

/// An answer that calls tools and was not cut off ended for that.
fn finish(finish: Finish, calls: usize) -> Finish {
    if finish == Finish::Stop && calls > 0 { Finish::ToolCalls } else { finish }
}

impl Shape for ChatShape {
    type Piece = ChatPiece;
    type Choice = ChatChoice;

    fn pieces(&mut self, text: &Text, index: usize, delta: Delta) -> Vec<ChatPiece> {
        let speaker = &mut self.speakers[index];
        let piece = |delta: ChatDelta| ChatPiece {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
            token_ids: None,
        };
        let mut pieces = vec![];
        if !speaker.has_begun {
            speaker.has_begun = true;
            let content = Some(String::new());
            pieces.push(piece(ChatDelta { role: Some("assistant"), content, ..ChatDelta::default() }));
        }
        let has_logprobs = self.has_logprobs && !delta.entries.is_empty();
        let with_ids = self.with_ids && !delta.ids.is_empty();
        let said = speaker.read(delta.text, delta.finish.is_some());
        let begin = pieces.len();
        for part in said {
            pieces.push(piece(match part {
                Piece::Text(text) => ChatDelta { content: Some(text), ..ChatDelta::default() },
                Piece::Call(call) => {
                    speaker.calls += 1;
                    ChatDelta { tool_calls: vec![call.to_delta()], ..ChatDelta::default() }
                }
            }));
        }
        if pieces.len() == begin && (has_logprobs || with_ids) {
            pieces.push(piece(ChatDelta { content: Some(String::new()), ..ChatDelta::default() }));
        }
        if let Some(piece) = pieces.get_mut(begin) {
            piece.logprobs = has_logprobs.then(|| ChatLogprobs::new(&delta.entries, text));
            piece.token_ids = with_ids.then_some(delta.ids);
        }
        if let Some((reason, _)) = delta.finish {
            let finish_reason = Some(finish(reason, speaker.calls));
            pieces.push(ChatPiece { finish_reason, ..piece(ChatDelta::default()) });
        }
        pieces
    }

    fn choice(&mut self, loaded: &Loaded, index: usize, answer: Complete) -> ChatChoice {
        let (content, calls) = match &self.tools {
            Some(tools) => read_answer(&loaded.dialect, tools, &answer.text),
            None => (Some(answer.text), vec![]),
        };
        ChatChoice {
            index,
            message: AssistantMessage {
                role: "assistant",
                content,
                refusal: None,
                tool_calls: calls.iter().map(|call| call.to_json()).collect(),
            },
            logprobs: self.has_logprobs.then(|| ChatLogprobs::new(&answer.entries, &loaded.text)),
            finish_reason: finish(answer.finish.unwrap_or(Finish::Stop), calls.len()),
            token_ids: self.with_ids.then_some(answer.ids),
        }
    }
}

impl Speaker {
    /// What can be said after more text; nothing comes after the last.
    fn read(&mut self, text: String, is_last: bool) -> Vec<Piece> {
        let Some(reader) = &mut self.reader else {
            return if text.is_empty() { vec![] } else { vec![Piece::Text(text)] };
        };
        let mut pieces = if text.is_empty() { vec![] } else { reader.push(&text) };
        if is_last {
            pieces.extend(reader.finish());
        }
        pieces
    }
}
