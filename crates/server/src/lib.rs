//! How do others speak to the engine? In the OpenAI API with vLLM's further fields, over HTTP.
//!
//! A request's way: [`listen`](serve) takes its connection, `guard` gives it an id and looks at its key, `router` finds `chat` or
//! `completions`. There `body` and `fields` read what it says, `understand`, `plan` and `kv` check it, and its prompt becomes
//! tokens. `answer` submits it to the engine (`job`), turns events into text (`choice`, `stop`), and `stream` sends that as it
//! comes or when it is complete (`reply`). Whoever stops reading drops the job, and the engine ends it.
//!
//! Knows nothing of how keys and values are stored, or of when a request computes.
#![deny(unsafe_code)]

mod answer;
mod app;
mod body;
mod chat;
mod choice;
mod completions;
mod contexts;
mod error;
mod fields;
mod grammar;
mod guard;
mod introspect;
mod job;
mod kv;
mod listen;
mod live;
mod meters;
mod models;
mod page;
mod plan;
mod reply;
mod responses;
mod router;
pub mod saved;
mod slots;
mod stop;
mod stream;
mod tokenize;
mod tools;
mod understand;

pub use app::{App, Metrics, Options, UnknownFields};
pub use listen::serve;
pub use live::{Live, ShadowState};
pub use slots::SlotState;
