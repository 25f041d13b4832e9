//! What of an answer can be said now? From the engine's tokens to text, with what may be the beginning of a stop, or is not yet
//! a whole character, held back.

use crate::error::ApiError;
use crate::plan::{Plan, Specials};
use crate::reply::Finish;
use crate::stop::{Keep, Released, StopTexts};
use mosaickv_engine::{Bill, End, Event, Token};
use mosaickv_model::{Decoder, Text};
use std::collections::VecDeque;

/// A token whose text begins at `start`.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its id.
    pub id: u32,
    /// Characters of the answer before it.
    pub start: usize,
    /// Its log probability, if known.
    pub logprob: Option<f32>,
    /// The most probable tokens at its place.
    pub top: Vec<(u32, f32)>,
}

/// What is new of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Delta {
    /// More text.
    pub text: String,
    /// The tokens that it begins.
    pub entries: Vec<Entry>,
    /// Ids of the tokens that were sampled.
    pub ids: Vec<u32>,
    /// At the end of the answer.
    pub finish: Option<(Finish, Bill)>,
}

/// How far an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// A text that ends it came; the engine has not heard of it.
    Stopped,
    Over,
}

/// An answer that is being made.
pub struct Choice {
    decoder: Decoder,
    stops: StopTexts,
    ends: Vec<u32>,
    keep: Keep,
    specials: Specials,
    /// Tokens that are yet to come before a stop text counts.
    unwatched: usize,
    /// Whether tokens are reported.
    has_entries: bool,
    state: State,
    /// Characters that came, and that were given out.
    came: usize,
    given_out: usize,
    /// Tokens whose text was not given out.
    waiting: VecDeque<Entry>,
    sampled: usize,
}

impl Choice {
    /// An answer to a prompt that ends with `tail`, of which enough is known for the first token to be spelled as it is after it.
    pub fn new(plan: &Plan, tail: &[u32], has_entries: bool) -> Choice {
        Choice {
            decoder: Decoder::after(tail),
            stops: StopTexts::new(plan.stops.clone(), plan.keep),
            ends: plan.ends.clone(),
            keep: plan.keep,
            specials: plan.specials,
            unwatched: plan.least_tokens,
            has_entries,
            state: State::Open,
            came: 0,
            given_out: 0,
            waiting: VecDeque::new(),
            sampled: 0,
        }
    }

    /// The prompt, where the answer begins with it.
    pub fn echo(&mut self, text: String) -> Delta {
        self.came += text.chars().count();
        self.give_out(text, vec![])
    }

    /// A prompt's first token, before which there is nothing to expect it from.
    pub fn first(&mut self, text: &Text, id: u32) -> Result<Delta, ApiError> {
        self.read(text, Token { id, logprob: None, top: vec![] })
    }

    /// Tokens answered.
    pub fn sampled(&self) -> usize {
        self.sampled
    }

    /// Whether the engine need not go on with it.
    pub fn is_stopped(&self) -> bool {
        self.state == State::Stopped
    }

    /// What `event` adds.
    pub fn take(&mut self, text: &Text, event: Event) -> Result<Delta, ApiError> {
        match event {
            Event::Prompt(token) | Event::Given(token) => self.read(text, token),
            Event::Sampled(token) if self.state == State::Open => self.sample(text, token),
            Event::Sampled(_) => Ok(Delta::default()),
            Event::Ended(end, bill) => self.end(text, end, bill),
        }
    }

    /// A token that was known.
    fn read(&mut self, text: &Text, token: Token) -> Result<Delta, ApiError> {
        let piece = self.spell(text, token.id)?;
        self.enter(token, &piece);
        Ok(self.give_out(piece, vec![]))
    }

    fn sample(&mut self, text: &Text, token: Token) -> Result<Delta, ApiError> {
        self.sampled += 1;
        let id = token.id;
        // Its text is not part of the answer, but it was sampled, and counts.
        let is_end = self.ends.contains(&id);
        let piece = if is_end && self.keep == Keep::Before { String::new() } else { self.spell(text, id)? };
        self.enter(token, &piece);
        if self.unwatched > 0 {
            self.unwatched -= 1;
            return Ok(self.give_out(piece, vec![id]));
        }
        Ok(match self.stops.push(&piece) {
            Released::Open(piece) => self.give_out(piece, vec![id]),
            Released::Ended(piece) => {
                self.state = State::Stopped;
                let delta = self.give_out(piece, vec![id]);
                self.waiting.clear();
                delta
            }
        })
    }

    fn end(&mut self, text: &Text, end: End, bill: Bill) -> Result<Delta, ApiError> {
        let finish = match (self.state, end) {
            (State::Stopped, _) | (State::Open, End::Stop) => Finish::Stop,
            (State::Open, End::Length) => Finish::Length,
            (State::Open, End::Cancelled) => return Err(ApiError::cancelled()),
            (_, End::Shutdown) => return Err(ApiError::draining()),
            (_, End::NoRoom(why)) => return Err(ApiError::no_room(why)),
            (_, End::Failed(what)) => return Err(ApiError::internal(&format!("The model failed: {what}"))),
            (state, end) => {
                return Err(ApiError::internal(&format!("An answer that is {state:?} ended as {end:?}")));
            }
        };
        let mut delta = Delta::default();
        if self.state == State::Open {
            let rest = self.decoder.finish(text).map_err(|error| broken(&error))?;
            let piece = match self.stops.push(&rest) {
                Released::Open(piece) => piece + &self.stops.finish(),
                Released::Ended(piece) => piece,
            };
            delta = self.give_out(piece, vec![]);
            delta.entries.extend(self.waiting.drain(..));
        }
        self.state = State::Over;
        delta.finish = Some((finish, bill));
        Ok(delta)
    }

    /// The text that a token completes.
    fn spell(&mut self, text: &Text, id: u32) -> Result<String, ApiError> {
        if self.specials == Specials::Written && text.is_special(id) {
            let mut piece = self.decoder.finish(text).map_err(|error| broken(&error))?;
            piece += &String::from_utf8_lossy(&text.token_bytes(id).unwrap_or_default());
            return Ok(piece);
        }
        self.decoder.push(text, id).map_err(|error| broken(&error))
    }

    fn enter(&mut self, token: Token, piece: &str) {
        if self.has_entries {
            let Token { id, logprob, top } = token;
            self.waiting.push_back(Entry { id, start: self.came, logprob, top });
        }
        self.came += piece.chars().count();
    }

    fn give_out(&mut self, text: String, ids: Vec<u32>) -> Delta {
        self.given_out += text.chars().count();
        let out = self.waiting.iter().take_while(|entry| entry.start < self.given_out).count();
        Delta { text, entries: self.waiting.drain(..out).collect(), ids, finish: None }
    }
}

fn broken(error: &mosaickv_model::ModelError) -> ApiError {
    ApiError::internal(&format!("An answer's tokens have no text: {error}"))
}
