//! Why can't a request be taken? What is looked at before it waits.

use crate::{Compute, Request};

/// Why a request can't be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It may get longer than the model's context.
    #[error(
        "This model's maximum context length is {context} tokens, but the prompt and the answer may have {tokens}; \
         shorten the prompt, or ask for a shorter answer"
    )]
    Context {
        /// Of the prompt, given, and the longest answer.
        tokens: usize,
        /// What the model takes.
        context: usize,
    },
    /// A token id that the model does not know.
    #[error("token id {id} is outside the model's vocabulary of {vocab}")]
    Token {
        /// The id.
        id: u32,
        /// The first id that is none.
        vocab: usize,
    },
    /// There is nothing to read.
    #[error("the prompt is empty; it needs at least one token")]
    Empty,
    /// Too many requests wait.
    #[error("{waiting} requests wait already; try again later")]
    QueueFull {
        /// How many.
        waiting: usize,
    },
    /// The prompt can't be held, even alone.
    #[error(
        "the prompt's keys and values need {needed} bytes while it is read, but all caches together may take {budget}; \
         shorten the prompt, or start the server with a larger --kv-memory or with --prefill-kv compressed"
    )]
    Budget {
        /// Bytes that it needs.
        needed: usize,
        /// Bytes that there are.
        budget: usize,
    },
    /// The KV format can't be had for this model.
    #[error("{why}")]
    Format {
        /// In words.
        why: String,
    },
    /// The engine has stopped.
    #[error("the engine has stopped")]
    Stopped,
}

/// What is wrong with a request, if anything is.
pub(crate) fn refusal(compute: &impl Compute, budget: usize, request: &Request) -> Result<(), Refused> {
    if request.prompt.is_empty() {
        return Err(Refused::Empty);
    }
    let (context, vocab) = (compute.context(), compute.vocab());
    let tokens = request.prompt.len() + request.given.len() + request.most_tokens;
    if tokens > context {
        return Err(Refused::Context { tokens, context });
    }
    let mut all = request.prompt.iter().chain(&request.given);
    if let Some(&id) = all.find(|id| **id as usize >= vocab) {
        return Err(Refused::Token { id, vocab });
    }
    let needed = compute.prompt_bytes(request.kv, request.prompt.len());
    if needed > budget {
        return Err(Refused::Budget { needed, budget });
    }
    compute.begin(request.kv).map(|_| ()).map_err(|why| Refused::Format { why })
}
