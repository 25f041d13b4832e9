//! Which request computes next, and within which bytes?
//!
//! A request lags by the tokens that it has and has not read. Each step lets requests catch up within one budget of tokens:
//! one token for each that is past its prompt, and what is left over for prompts, in chunks. There is no phase of prefill and
//! none of decode. Bytes are reserved before they are needed; where they don't suffice, requests wait or the newest gives up its
//! cache and reads again later.
//!
//! Threads and channels, no HTTP, no JSON, no text.
#![deny(unsafe_code)]

mod compute;
mod engine;
mod memory;
mod prefix;
mod refused;
mod request;
mod sample;
mod schedule;
mod service;
mod shadow;

pub use compute::{Compute, ModelCompute, Reading};
pub use engine::{Engine, PrefixCache, Settings};
pub use refused::Refused;
pub use sample::{Sampling, log_probabilities};
pub use service::{Figures, Service, Shadowed, Ticket};

use mosaickv_kv::{KvCache, KvFormat};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// What someone wants to have continued.
pub struct Request {
    /// Tokens that are read before compression; at least one.
    pub prompt: Vec<u32>,
    /// Tokens that follow the prompt and are known: they are read through the compressed cache, each as if it came alone.
    pub given: Vec<u32>,
    /// How keys and values are kept.
    pub kv: KvFormat,
    /// Tokens to be sampled at most; 0 to read only.
    pub most_tokens: usize,
    /// Tokens before which none of `ends` may be sampled.
    pub least_tokens: usize,
    /// Tokens that end the answer. They are reported.
    pub ends: Vec<u32>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Of how many of the most probable tokens log probabilities are reported with each token; `None`: of none, and not of the
    /// token itself.
    pub logprobs: Option<usize>,
    /// Which tokens that are known are reported too, with `logprobs`.
    pub prompt_logprobs: PromptLogprobs,
    /// Requests of a higher priority go first; of equals the one that came first.
    pub priority: i32,
    /// Only requests with the same one go on from what it reads; those without share among each other, and with what is kept.
    pub salt: Option<Arc<str>>,
    /// What restricts the answer to a grammar.
    pub grammar: Option<Box<dyn Grammar>>,
    /// Who wants the prompt to stay when it is compressed.
    pub keep: Option<Keep>,
    /// What [`Service::look`] and [`Service::cancel`] call it, if they are to find it.
    pub tag: Option<u64>,
}

/// What a request that runs has read so far.
#[derive(Clone, Debug)]
pub struct Look {
    /// How it is kept.
    pub kv: KvFormat,
    /// All of its tokens that are known; the first of them were read.
    pub tokens: Vec<u32>,
    /// How many of them are compressed together.
    pub prompt: usize,
    /// Who shares what it reads.
    pub salt: Option<Arc<str>>,
    /// Keys and values of those that were read. Their pages are shared with the engine's.
    pub cache: KvCache,
}

/// Gets a prompt that was read and compressed. Called on the engine's thread; it must not block.
pub type Keep = Box<dyn FnOnce(Kept) + Send>;

/// Tokens that were read, and their keys and values.
#[derive(Clone, Debug)]
pub struct Context {
    /// How they are kept.
    pub kv: KvFormat,
    /// All of them.
    pub tokens: Vec<u32>,
    /// How many of the first were compressed together; whoever goes on from it has a prompt of as many.
    pub prompt: usize,
    /// What follows the last one, `[vocab]`, if that was computed.
    pub logits: Option<Vec<f32>>,
    /// Their keys and values.
    pub cache: KvCache,
}

/// A context that stays in the engine as long as its pin does: requests that begin with its tokens go on from it.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Which it is. Its pages are shared with the engine's.
    pub context: Context,
    /// Bytes allocated for its keys and values.
    pub bytes: usize,
    /// Bytes that they would take as f16.
    pub exact_bytes: usize,
    /// Why it stays.
    pub pin: Pin,
}

/// As long as this or a clone of it lives, a context stays in the engine.
#[derive(Clone, Debug, Default)]
pub struct Pin(Arc<()>);

/// Tells whether a context is still in the engine, which may drop it.
#[derive(Clone, Debug)]
pub struct WeakPin(Weak<()>);

impl Pin {
    /// Without keeping it there.
    pub fn downgrade(&self) -> WeakPin {
        WeakPin(Arc::downgrade(&self.0))
    }

    /// Whether nobody else has one.
    pub(crate) fn is_alone(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

impl WeakPin {
    /// Keeps the context there, if it still is.
    pub fn upgrade(&self) -> Option<Pin> {
        self.0.upgrade().map(Pin)
    }
}

impl Request {
    /// To be continued by `most_tokens` tokens, the most probable each time, whatever they are; nothing else is reported.
    pub fn new(prompt: Vec<u32>, kv: KvFormat, most_tokens: usize) -> Request {
        Request {
            prompt,
            given: Vec::new(),
            kv,
            most_tokens,
            least_tokens: 0,
            ends: Vec::new(),
            sampling: Sampling::default(),
            logprobs: None,
            prompt_logprobs: PromptLogprobs::Off,
            priority: 0,
            salt: None,
            grammar: None,
            keep: None,
            tag: None,
        }
    }
}

/// Which tokens that are known are reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptLogprobs {
    /// None.
    #[default]
    Off,
    /// Those given after the prompt, each with its log probability from the compressed cache.
    Given,
    /// These, and all of the prompt's but the first, with theirs from the exact cache.
    All,
}

/// Which tokens may come next.
pub trait Grammar: Send {
    /// Sets the logits of tokens that may not come next to minus infinity.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String>;
    /// A token was chosen.
    fn accept(&mut self, token: u32) -> Result<(), String>;
}

/// A token of an answer, or of what was given.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The natural logarithm of its probability, before temperature, penalties and cuts; `None` if not asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens at its place and the logarithms of their probabilities, most probable first.
    pub top: Vec<(u32, f32)>,
}

/// What happens to a request, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token of the prompt, if they are to be reported.
    Prompt(Token),
    /// A token that was given.
    Given(Token),
    /// A sampled token.
    Sampled(Token),
    /// The last event.
    Ended(End, Bill),
}

/// Why a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// One of its end tokens was sampled, or its grammar allows nothing more.
    Stop,
    /// As many tokens as were asked for.
    Length,
    /// Nobody waits for it any more.
    Cancelled,
    /// The engine stopped before it was done.
    Shutdown,
    /// It needs more bytes than there are, even alone: how many, and what to do.
    NoRoom(String),
    /// What failed.
    Failed(String),
}

/// What a request took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bill {
    /// Tokens of its prompt and those given.
    pub prompt_tokens: usize,
    /// Tokens sampled.
    pub output_tokens: usize,
    /// Bytes allocated for its keys and values at the end.
    pub kv_bytes: usize,
    /// Bytes that they would take as f16.
    pub exact_bytes: usize,
    /// Bytes of keys and values that a step read, mean over the steps; `None` on a GPU, which does not count, and of a request that never began.
    pub read_bytes_per_step: Option<f64>,
    /// Until it was first scheduled.
    pub queued: Duration,
    /// From then until the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// Of compressing the prompt.
    pub compress: Duration,
    /// How often it lost its cache.
    pub preemptions: usize,
    /// Whether it was compressed harder than asked, to make room.
    pub is_harder: bool,
    /// Tokens of its prompt and those given that had been read before.
    pub cached_tokens: usize,
}
