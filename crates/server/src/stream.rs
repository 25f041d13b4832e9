//! How is an answer sent, as it is made or when it is complete?

use crate::answer::Answering;
use crate::app::Loaded;
use crate::choice::{Delta, Entry};
use crate::error::ApiError;
use crate::plan::Delivery;
use crate::reply::{Finish, Reply};
use crate::understand::with_headers;
use axum::Json;
use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use mosaickv_model::Text;
use serde::Serialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

/// What all chunks of an answer begin with.
#[derive(Debug, Clone)]
pub struct Head {
    /// The answer's id.
    pub id: String,
    /// What this is.
    pub object: &'static str,
    /// When it was asked for.
    pub created: u64,
    /// The model's name.
    pub model: String,
    /// The prompt's tokens, where ids were asked for.
    pub prompt_token_ids: Option<Vec<u32>>,
}

impl Head {
    /// A reply with these choices and nothing else.
    pub fn reply<C>(&self, choices: Vec<C>) -> Reply<C> {
        Reply {
            id: self.id.clone(),
            object: self.object,
            created: self.created,
            model: self.model.clone(),
            choices,
            usage: None,
            kv: None,
            timings: None,
            prompt_token_ids: None,
        }
    }
}

/// How a kind of completion writes what is new.
pub trait Shape: Send + 'static {
    /// What a chunk says of one answer.
    type Piece: Serialize;
    /// What a complete reply says of one.
    type Choice: Serialize;

    /// The chunks, one piece each, that say what is new of answer `index`.
    fn pieces(&mut self, text: &Text, index: usize, delta: Delta) -> Vec<Self::Piece>;

    /// Answer `index` when it is complete.
    fn choice(&mut self, loaded: &Loaded, index: usize, answer: Complete) -> Self::Choice;
}

/// A request that the engine has.
pub struct Begun<S> {
    /// Its answers.
    pub answering: Answering,
    /// What they begin with.
    pub head: Head,
    /// How they are written.
    pub shape: S,
    /// How they are sent.
    pub delivery: Delivery,
    /// Fields that nobody read.
    pub unread: Vec<String>,
}

impl<S: Shape> Begun<S> {
    /// The answers, as they are made or when they are complete.
    pub async fn respond(self, keep_alive: Duration) -> Result<Response, ApiError> {
        let Begun { mut answering, head, mut shape, delivery, unread } = self;
        if delivery != Delivery::Whole {
            return Ok(with_headers(stream(answering, (head, shape), delivery, keep_alive), &unread, None));
        }
        let answers = collect(&mut answering).await?.into_iter().enumerate();
        let choices = answers.map(|(index, answer)| shape.choice(&answering.loaded, index, answer)).collect();
        let reply = whole(&answering, head, choices);
        let ratio = reply.kv.as_ref().map(|kv| kv.ratio);
        Ok(with_headers(Json(reply).into_response(), &unread, ratio))
    }
}

/// An answer on its way.
struct Speaking<S> {
    /// Until it is over.
    answering: Option<Answering>,
    head: Head,
    shape: S,
    delivery: Delivery,
    ready: VecDeque<Event>,
}

/// Nginx would hold events back.
const UNBUFFERED: HeaderName = HeaderName::from_static("x-accel-buffering");

/// The answers as events, with a comment where there is nothing to say for so long.
fn stream<S: Shape>(
    answering: Answering,
    (head, shape): (Head, S),
    delivery: Delivery,
    keep_alive: Duration,
) -> Response {
    let speaking = Speaking { answering: Some(answering), head, shape, delivery, ready: VecDeque::new() };
    let events = futures_util::stream::unfold(speaking, |mut speaking| async move {
        speaking.next().await.map(|event| (event, speaking))
    });
    sse(events, keep_alive)
}

/// Events as they come, with a comment where there is nothing to say for so long.
pub fn sse(events: impl Stream<Item = Event> + Send + 'static, keep_alive: Duration) -> Response {
    let sse = Sse::new(events.map(Ok::<_, Infallible>)).keep_alive(KeepAlive::new().interval(keep_alive));
    let mut response = sse.into_response();
    response.headers_mut().insert(UNBUFFERED, HeaderValue::from_static("no"));
    response
}

impl<S: Shape> Speaking<S> {
    async fn next(&mut self) -> Option<Event> {
        while self.ready.is_empty() {
            let answering = self.answering.as_mut()?;
            match answering.next().await {
                Ok(Some((index, delta))) => self.say(index, delta),
                Ok(None) => self.end(),
                Err(error) => {
                    self.answering = None;
                    self.ready.push_back(event(&error.body()));
                }
            }
        }
        self.ready.pop_front()
    }

    fn say(&mut self, index: usize, delta: Delta) {
        let Some(answering) = &self.answering else { return };
        let is_last = answering.is_over();
        let pieces = self.shape.pieces(&answering.loaded.text, index, delta);
        let count = pieces.len();
        for (number, piece) in pieces.into_iter().enumerate() {
            let mut chunk = self.head.reply(vec![piece]);
            chunk.prompt_token_ids = self.head.prompt_token_ids.take();
            if self.delivery == Delivery::StreamWithUsage {
                chunk.usage = Some(None);
            } else if is_last && number + 1 == count {
                (chunk.kv, chunk.timings) = (answering.kv_report(), Some(answering.timings()));
            }
            self.ready.push_back(event(&chunk));
        }
    }

    fn end(&mut self) {
        let Some(answering) = self.answering.take() else { return };
        if self.delivery == Delivery::StreamWithUsage {
            let mut chunk = self.head.reply(Vec::<S::Piece>::new());
            chunk.usage = Some(Some(answering.usage()));
            (chunk.kv, chunk.timings) = (answering.kv_report(), Some(answering.timings()));
            self.ready.push_back(event(&chunk));
        }
        self.ready.push_back(Event::default().data("[DONE]"));
    }
}

fn event(body: &impl Serialize) -> Event {
    let json = serde_json::to_string(body).unwrap_or_else(|error| {
        tracing::error!("a chunk cannot be written: {error}");
        "{\"error\":{\"message\":\"a chunk cannot be written\",\"type\":\"server_error\",\"param\":null,\"code\":null}}"
            .to_owned()
    });
    Event::default().data(json)
}

/// A complete answer.
#[derive(Debug, Clone, Default)]
pub struct Complete {
    /// Its text.
    pub text: String,
    /// Its tokens, if they are reported.
    pub entries: Vec<Entry>,
    /// Their ids.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Option<Finish>,
}

/// Waits for all answers.
pub async fn collect(answering: &mut Answering) -> Result<Vec<Complete>, ApiError> {
    let mut answers = vec![Complete::default(); answering.count()];
    while let Some((index, delta)) = answering.next().await? {
        let answer = &mut answers[index];
        answer.text += &delta.text;
        answer.entries.extend(delta.entries);
        answer.ids.extend(delta.ids);
        answer.finish = delta.finish.map(|(finish, _)| finish).or(answer.finish);
    }
    Ok(answers)
}

/// The reply to a request whose answers are complete.
fn whole<C>(answering: &Answering, mut head: Head, choices: Vec<C>) -> Reply<C> {
    let prompt_token_ids = head.prompt_token_ids.take();
    Reply {
        usage: Some(Some(answering.usage())),
        kv: answering.kv_report(),
        timings: Some(answering.timings()),
        prompt_token_ids,
        ..head.reply(choices)
    }
}
