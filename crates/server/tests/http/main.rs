//! The server as its clients meet it: over a socket, with a tiny model behind it.

mod chat;
mod common;
mod completions;
mod contexts;
mod errors;
mod introspect;
mod life;
mod live;
mod responses;
mod storm;
