//! POST /v1/responses: OpenAI's newer way to ask for an answer. Nothing is remembered from one to the next.
//!
//! A request is written anew as one for a chat completion, and what comes of that is told as items of a response.

use crate::answer::Answering;
use crate::app::{App, now};
use crate::body::JsonObject;
use crate::chat::{self, ChatShape};
use crate::error::{ApiError, ErrorBody};
use crate::reply::{ChatChoice, ChatPiece, Finish};
use crate::stream::{Begun, Shape, collect, sse};
use crate::understand::{Arrival, aside, with_headers};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use utoipa::ToSchema;
use uuid::Uuid;

/// Fields that change nothing here.
const WITHOUT_EFFECT: [&str; 10] = [
    "store",
    "include",
    "metadata",
    "reasoning",
    "truncation",
    "service_tier",
    "prompt_cache_key",
    "safety_identifier",
    "stream_options",
    "max_tool_calls",
];

/// What is sent to POST /v1/responses, beside the fields of a chat completion that have the same names.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub struct ResponseRequest {
    /// The model.
    model: Option<String>,
    /// A text, or items: messages, calls of functions and what they gave.
    #[schema(required, value_type = Value)]
    input: Value,
    /// What the model is told before.
    instructions: Option<String>,
    /// Most tokens of the answer.
    #[schema(minimum = 1)]
    max_output_tokens: Option<usize>,
    /// 0 chooses the most probable token, higher is more random.
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f32>,
    /// Only the most probable tokens that make up this probability.
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// What the answer must look like: `{"format": {"type": "json_schema", ..}}`.
    #[schema(value_type = Option<Object>)]
    text: Option<Value>,
    /// Functions that the model may call.
    #[schema(value_type = Option<Vec<Object>>)]
    tools: Option<Vec<Value>>,
    /// Whether it must, or which.
    #[schema(value_type = Option<Value>)]
    tool_choice: Option<Value>,
    /// Whether the answer comes in events as it is made.
    stream: Option<bool>,
}

/// Answers.
#[utoipa::path(
    post, path = "/v1/responses", request_body = ResponseRequest,
    responses(
        (status = 200, description = "The response; with stream: true as events", content(
            (Object = "application/json"), (Object = "text/event-stream"))),
        (status = "4XX", description = "A request that cannot be met", body = ErrorBody),
        (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
    ),
)]
pub async fn responses(
    State(app): State<App>,
    Extension(arrival): Extension<Arrival>,
    headers: HeaderMap,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let (loaded, caller) = app.admit(&arrival)?;
    let keep_alive = app.options().keep_alive;
    let is_stream = match object.get("stream") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(is_stream)) => *is_stream,
        Some(_) => return Err(ApiError::invalid("stream", "stream: wanted true or false.")),
    };
    let told = Told::new(&app, &object);
    let begun = aside(move || chat::begin(&app, &loaded, (caller, &headers), &as_chat(&object)?)).await?;
    let Begun { mut answering, mut shape, unread, .. } = begun;
    if is_stream {
        let speaking = Speaking { answering: Some(answering), shape, writer: Writer::new(told) };
        let events = futures_util::stream::unfold(speaking, |mut speaking| async move {
            speaking.next().await.map(|event| (event, speaking))
        });
        return Ok(with_headers(sse(events, keep_alive), &unread, None));
    }
    let answer = collect(&mut answering).await?.into_iter().next();
    let answer = answer.ok_or_else(|| ApiError::internal("There is no answer"))?;
    let choice = shape.choice(&answering.loaded, 0, answer);
    let finish = choice.finish_reason;
    let ratio = answering.kv_report().map(|kv| kv.ratio);
    let response = told.response(items(choice), Some((finish, &answering)));
    Ok(with_headers(Json(response).into_response(), &unread, ratio))
}

/// The same as a request for a chat completion.
fn as_chat(object: &Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    for field in ["previous_response_id", "conversation", "prompt"] {
        if object.get(field).is_some_and(|value| !value.is_null()) {
            let message = format!(
                "{field} refers to what is kept elsewhere, and this server keeps no responses; send all in input."
            );
            return Err(ApiError::invalid(field, message));
        }
    }
    if object.get("background").is_some_and(|value| value == true) {
        return Err(ApiError::invalid(
            "background",
            "background: a response that nobody waits for cannot be had.",
        ));
    }
    if object.get("n").is_some_and(|n| !n.is_null() && n != 1) {
        return Err(ApiError::invalid(
            "n",
            "n: a response is one answer; POST /v1/chat/completions gives several.",
        ));
    }
    let mut chat = Map::new();
    let mut messages = vec![];
    for (name, value) in object {
        match name.as_str() {
            "instructions"
            | "input"
            | "stream"
            | "previous_response_id"
            | "conversation"
            | "prompt"
            | "background" => {}
            "max_output_tokens" => drop(chat.insert("max_completion_tokens".to_owned(), value.clone())),
            "text" => drop(chat.insert("response_format".to_owned(), format(value)?)),
            "tools" => drop(chat.insert("tools".to_owned(), tools(value)?)),
            "tool_choice" => drop(chat.insert("tool_choice".to_owned(), tool_choice(value))),
            name if WITHOUT_EFFECT.contains(&name) => {}
            name => drop(chat.insert(name.to_owned(), value.clone())),
        }
    }
    match object.get("instructions") {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) => messages.push(json!({"role": "system", "content": text})),
        Some(_) => return Err(ApiError::invalid("instructions", "instructions: wanted a text.")),
    }
    match object.get("input") {
        Some(Value::String(text)) => messages.push(json!({"role": "user", "content": text})),
        Some(Value::Array(input)) => {
            for (index, item) in input.iter().enumerate() {
                add(&mut messages, item, &format!("input[{index}]"))?;
            }
        }
        _ => return Err(ApiError::invalid("input", "input is missing; wanted a text or a list of items.")),
    }
    chat.insert("messages".to_owned(), Value::Array(messages));
    Ok(chat)
}

/// An item of the input as a message, or as a part of the last one.
fn add(messages: &mut Vec<Value>, item: &Value, path: &str) -> Result<(), ApiError> {
    let wrong = |message: &str| ApiError::invalid(path, format!("{path}: {message}"));
    match item.get("type").and_then(Value::as_str).unwrap_or("message") {
        "message" => {
            let role = match item.get("role").and_then(Value::as_str) {
                Some("developer") => "system",
                Some(role) => role,
                None => return Err(wrong("a message without a role.")),
            };
            let content = match item.get("content") {
                Some(Value::String(text)) => text.clone(),
                Some(Value::Array(parts)) => {
                    let text = |part: &Value| match part.get("type").and_then(Value::as_str) {
                        Some("input_text" | "output_text" | "text") => {
                            part.get("text").and_then(Value::as_str).map(str::to_owned)
                        }
                        _ => None,
                    };
                    let texts: Option<Vec<String>> = parts.iter().map(text).collect();
                    texts.ok_or_else(|| wrong("only parts of text can be read."))?.concat()
                }
                _ => return Err(wrong("a message without content.")),
            };
            messages.push(json!({"role": role, "content": content}));
        }
        "function_call" => {
            let call = json!({
                "id": item.get("call_id"), "type": "function",
                "function": {"name": item.get("name"), "arguments": item.get("arguments")},
            });
            let calls = match messages.last_mut() {
                Some(last) if last["role"] == "assistant" && last["tool_calls"].is_array() => {
                    last["tool_calls"].as_array_mut()
                }
                _ => None,
            };
            match calls {
                Some(calls) => calls.push(call),
                None => messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
            }
        }
        "function_call_output" => messages.push(json!({
            "role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output"),
        })),
        // What a model thought before is not told to it again.
        "reasoning" => {}
        other => return Err(wrong(&format!("items of the type {other:?} are not known."))),
    }
    Ok(())
}

/// `text.format` as a `response_format`.
fn format(text: &Value) -> Result<Value, ApiError> {
    match text.get("format") {
        None | Some(Value::Null) => Ok(Value::Null),
        Some(Value::Object(format)) if format.get("type").is_some_and(|kind| kind == "json_schema") => {
            let mut schema = format.clone();
            schema.remove("type");
            Ok(json!({"type": "json_schema", "json_schema": schema}))
        }
        Some(format @ Value::Object(_)) => Ok(format.clone()),
        Some(_) => Err(ApiError::invalid("text.format", "text.format: wanted an object with a type.")),
    }
}

fn tools(tools: &Value) -> Result<Value, ApiError> {
    let Value::Array(tools) = tools else { return Ok(tools.clone()) };
    let nested = tools.iter().enumerate().map(|(index, tool)| {
        if tool.get("type").and_then(Value::as_str) != Some("function") {
            let path = format!("tools[{index}]");
            let message = format!("{path}: only tools of the type function can be had.");
            return Err(ApiError::invalid(path, message));
        }
        let mut function = tool.as_object().cloned().unwrap_or_default();
        function.remove("type");
        Ok(json!({"type": "function", "function": function}))
    });
    nested.collect::<Result<Vec<_>, _>>().map(Value::Array)
}

fn tool_choice(choice: &Value) -> Value {
    match (choice.get("type").and_then(Value::as_str), choice.get("name")) {
        (Some("function"), Some(name)) => json!({"type": "function", "function": {"name": name}}),
        _ => choice.clone(),
    }
}

/// What a response says of its request.
struct Told {
    id: String,
    created: u64,
    model: String,
    asked: Map<String, Value>,
}

impl Told {
    fn new(app: &App, object: &Map<String, Value>) -> Told {
        let fields = [
            "instructions",
            "max_output_tokens",
            "temperature",
            "top_p",
            "text",
            "tools",
            "tool_choice",
            "metadata",
        ];
        let asked = fields.into_iter().map(|name| {
            let default = match name {
                "temperature" | "top_p" => json!(1.0),
                "tools" => json!([]),
                "tool_choice" => json!("auto"),
                "metadata" => json!({}),
                "text" => json!({"format": {"type": "text"}}),
                _ => Value::Null,
            };
            let value = object.get(name).filter(|value| !value.is_null());
            (name.to_owned(), value.cloned().unwrap_or(default))
        });
        let id = format!("resp_{}", Uuid::new_v4().simple());
        Told { id, created: now(), model: app.name().to_owned(), asked: asked.collect() }
    }

    /// The response with these items, ended for a reason or still being made.
    fn response(&self, output: Vec<Value>, end: Option<(Finish, &Answering)>) -> Value {
        let (status, incomplete) = match end {
            None => ("in_progress", Value::Null),
            Some((Finish::Length, _)) => ("incomplete", json!({"reason": "max_output_tokens"})),
            Some(_) => ("completed", Value::Null),
        };
        let mut response = json!({
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": null,
            "incomplete_details": incomplete, "model": self.model, "output": output, "parallel_tool_calls": true,
            "previous_response_id": null, "store": false, "usage": null,
        });
        if let Some((_, answering)) = end {
            let usage = answering.usage();
            response["usage"] = json!({
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            });
            if let Some(kv) = answering.kv_report() {
                response["kv"] = json!(kv);
            }
        }
        for (name, value) in &self.asked {
            response[name] = value.clone();
        }
        response
    }
}

/// A message that says `text`.
fn message(id: &str, status: &str, text: &str) -> Value {
    let content = if status == "in_progress" { vec![] } else { vec![part(text)] };
    json!({"type": "message", "id": id, "status": status, "role": "assistant", "content": content})
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

/// A call, from one of a chat completion.
fn function_call(call: &Value) -> Value {
    let (name, arguments) = (&call["function"]["name"], &call["function"]["arguments"]);
    let id = format!("fc_{}", Uuid::new_v4().simple());
    json!({"type": "function_call", "id": id, "call_id": call["id"], "status": "completed", "name": name, "arguments": arguments})
}

/// The items of a complete answer.
fn items(choice: ChatChoice) -> Vec<Value> {
    let status = if choice.finish_reason == Finish::Length { "incomplete" } else { "completed" };
    let calls = choice.message.tool_calls.iter().map(function_call);
    let text = choice.message.content.unwrap_or_default();
    let said = (!text.is_empty() || choice.message.tool_calls.is_empty())
        .then(|| message(&format!("msg_{}", Uuid::new_v4().simple()), status, &text));
    said.into_iter().chain(calls).collect()
}

/// A response on its way.
struct Speaking {
    /// Until it is over.
    answering: Option<Answering>,
    shape: ChatShape,
    writer: Writer,
}

impl Speaking {
    async fn next(&mut self) -> Option<Event> {
        while self.writer.ready.is_empty() {
            let answering = self.answering.as_mut()?;
            match answering.next().await {
                Ok(Some((index, delta))) => {
                    let pieces = self.shape.pieces(&answering.loaded.text, index, delta);
                    pieces.into_iter().for_each(|piece| self.writer.take(piece));
                }
                Ok(None) => {
                    self.writer.end(answering);
                    self.answering = None;
                }
                Err(error) => {
                    self.answering = None;
                    let object = error.body().error;
                    let error =
                        json!({"code": object.code, "message": object.message, "param": object.param});
                    self.writer.write("error", error);
                }
            }
        }
        self.writer.ready.pop_front()
    }
}

/// Makes events of pieces of a chat completion.
struct Writer {
    told: Told,
    ready: VecDeque<Event>,
    written: usize,
    /// The message that is being said: its id and text.
    open: Option<(String, String)>,
    output: Vec<Value>,
    finish: Finish,
}

impl Writer {
    fn new(told: Told) -> Writer {
        let mut writer = Writer {
            told,
            ready: VecDeque::new(),
            written: 0,
            open: None,
            output: vec![],
            finish: Finish::Stop,
        };
        for kind in ["response.created", "response.in_progress"] {
            let response = writer.told.response(vec![], None);
            writer.write(kind, json!({"response": response}));
        }
        writer
    }

    fn write(&mut self, kind: &str, mut body: Value) {
        (body["type"], body["sequence_number"]) = (json!(kind), json!(self.written));
        self.written += 1;
        self.ready.push_back(Event::default().event(kind).data(body.to_string()));
    }

    fn take(&mut self, piece: ChatPiece) {
        if let Some(text) = piece.delta.content.filter(|text| !text.is_empty()) {
            self.say(&text);
        }
        for call in &piece.delta.tool_calls {
            self.close("completed");
            self.call(call);
        }
        self.finish = piece.finish_reason.unwrap_or(self.finish);
    }

    fn say(&mut self, text: &str) {
        let index = self.output.len();
        if self.open.is_none() {
            let id = format!("msg_{}", Uuid::new_v4().simple());
            let item = message(&id, "in_progress", "");
            self.write("response.output_item.added", json!({"output_index": index, "item": item}));
            let body = json!({"item_id": id, "output_index": index, "content_index": 0, "part": part("")});
            self.write("response.content_part.added", body);
            self.open = Some((id, String::new()));
        }
        let Some((id, said)) = &mut self.open else { return };
        said.push_str(text);
        let body =
            json!({"item_id": id, "output_index": index, "content_index": 0, "delta": text, "logprobs": []});
        self.write("response.output_text.delta", body);
    }

    /// Ends the message that is being said.
    fn close(&mut self, status: &str) {
        let Some((id, text)) = self.open.take() else { return };
        let index = self.output.len();
        let place = json!({"item_id": id, "output_index": index, "content_index": 0});
        let mut done = place.clone();
        (done["text"], done["logprobs"]) = (json!(text), json!([]));
        self.write("response.output_text.done", done);
        let mut done = place;
        done["part"] = part(&text);
        self.write("response.content_part.done", done);
        self.finish_item(message(&id, status, &text));
    }

    fn call(&mut self, call: &Value) {
        let (item, index) = (function_call(call), self.output.len());
        let mut begun = item.clone();
        (begun["status"], begun["arguments"]) = (json!("in_progress"), json!(""));
        self.write("response.output_item.added", json!({"output_index": index, "item": begun}));
        let place = |name: &str, arguments: &Value| {
            let mut body = json!({"item_id": item["id"], "output_index": index});
            body[name] = arguments.clone();
            body
        };
        let arguments = &item["arguments"];
        self.write("response.function_call_arguments.delta", place("delta", arguments));
        self.write("response.function_call_arguments.done", place("arguments", arguments));
        self.finish_item(item);
    }

    fn finish_item(&mut self, item: Value) {
        let body = json!({"output_index": self.output.len(), "item": item});
        self.write("response.output_item.done", body);
        self.output.push(item);
    }

    fn end(&mut self, answering: &Answering) {
        let (status, kind) = match self.finish {
            Finish::Length => ("incomplete", "response.incomplete"),
            _ => ("completed", "response.completed"),
        };
        // An answer without a word is a message without one.
        if self.open.is_none() && self.output.is_empty() {
            self.say("");
        }
        self.close(status);
        let output = std::mem::take(&mut self.output);
        let response = self.told.response(output, Some((self.finish, answering)));
        self.write(kind, json!({"response": response}));
    }
}
