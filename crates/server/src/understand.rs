//! Which model, which format, what plan? What chat and text completions do alike before they look at their prompts.

use crate::app::{App, Loaded};
use crate::contexts::Held;
use crate::error::ApiError;
use crate::fields::Common;
use crate::job::Caller;
use crate::kv;
use crate::plan::Plan;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use mosaickv_kv::KvFormat;
use std::sync::Arc;
use std::time::Instant;

/// Names the fields that nobody read.
const IGNORED: HeaderName = HeaderName::from_static("x-ignored-params");

/// What keys and values took less than as f16, of an answer that is complete.
const RATIO: HeaderName = HeaderName::from_static("x-kv-ratio");

/// Fields that the header names at most.
const MOST_NAMED: usize = 32;

/// The id of a request, the client's or made here, and when it came.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// The id.
    pub id: String,
    /// The time.
    pub at: Instant,
}

impl App {
    /// The model, and who asks it, unless nobody may now.
    pub(crate) fn admit(&self, arrival: &Arrival) -> Result<(Arc<Loaded>, Caller), ApiError> {
        // Before the look at whether the server is about to end: a drain sees the one or the request the other.
        let running = self.begin_request();
        let caller = Caller { id: arrival.id.clone(), start: arrival.at, running };
        Ok((self.ready()?.clone(), caller))
    }

    /// The model, unless it is not there yet or the server is about to end.
    pub(crate) fn ready(&self) -> Result<&Arc<Loaded>, ApiError> {
        if self.is_draining() {
            return Err(ApiError::draining());
        }
        self.loaded().ok_or_else(ApiError::loading)
    }

    /// What follows `@kv=` in the name of a model that is served here; no name at all is the model's too.
    pub(crate) fn known_model<'a>(&self, name: Option<&'a str>) -> Result<Option<&'a str>, ApiError> {
        let Some(name) = name else { return Ok(None) };
        let (bare, suffix) = kv::split_name(name);
        match self.options().names.iter().any(|known| known == bare) {
            true => Ok(suffix),
            false => Err(ApiError::model(name)),
        }
    }

    /// What these fields and headers ask for, and the context that they go on from.
    pub(crate) fn plan(
        &self,
        loaded: &Loaded,
        headers: &HeaderMap,
        common: &Common,
    ) -> Result<(Plan, KvFormat, Option<Held>), ApiError> {
        let suffix = self.known_model(common.model.as_deref())?;
        let default = self.options().kv;
        let format = kv::choose(common.kv.as_ref(), headers, suffix, default)?;
        let mut plan = Plan::new(common, loaded)?;
        let Some(name) = common.kv.as_ref().and_then(|kv| kv.context.as_ref()) else {
            return Ok((plan, format, None));
        };
        if plan.truncate_prompt.is_some() {
            let message = "A prompt that goes on from a context cannot be truncated at its front.";
            return Err(ApiError::invalid("truncate_prompt_tokens", message));
        }
        let held = self.contexts().hold(loaded, name, "kv.context")?;
        // Whoever knows the name of a context shares it.
        plan.salt = None;
        Ok((plan, kv::of_context(format, default, held.named.kv)?, Some(held)))
    }
}

/// Says in the headers which fields nobody read, and what was saved.
pub fn with_headers(mut response: Response, unread: &[String], ratio: Option<f64>) -> Response {
    let headers = response.headers_mut();
    if !unread.is_empty() {
        let names: Vec<String> =
            unread.iter().take(MOST_NAMED).map(|name| name.escape_default().to_string()).collect();
        if let Ok(value) = HeaderValue::from_str(&names.join(", ")) {
            headers.insert(IGNORED, value);
        }
    }
    if let Some(value) = ratio.and_then(|ratio| HeaderValue::from_str(&format!("{ratio:.3}")).ok()) {
        headers.insert(RATIO, value);
    }
    response
}

/// Runs work that takes a while beside the connections.
pub async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ApiError::internal("A request could not be read: its reader panicked")))
}
