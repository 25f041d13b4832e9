//! What does a client read when it cannot have what it asked for?
//!
//! One shape for every refusal, `{"error": {"message", "type", "param", "code"}}`, and with it the status and the headers that
//! tell a client library whether to try again.

use crate::grammar::Invalid;
use crate::saved::SavedError;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mosaickv_engine::Refused;
use mosaickv_model::ModelError;
use serde::Serialize;
use utoipa::ToSchema;

/// Seconds after which a client may try again while the model loads, or where the queue is full.
const RETRY_AFTER: u32 = 1;

/// Seconds after which another server may have taken this one's place.
const RETRY_AFTER_DRAIN: u32 = 30;

/// OpenAI's client library obeys it.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// The body of a refusal.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What happened.
    pub error: ErrorObject,
}

/// What happened, for people and for programs.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ErrorObject {
    /// What, got, wanted, remedy.
    pub message: String,
    /// The kind of error.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The field that is wrong.
    #[schema(required)]
    pub param: Option<String>,
    /// Which error exactly.
    #[schema(required)]
    pub code: Option<&'static str>,
    /// The least bytes that the prompt's keys and values take, where a budget of fewer was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_bytes: Option<usize>,
}

/// A refusal.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    status: StatusCode,
    object: Box<ErrorObject>,
    retry: Retry,
}

/// Whether the same request may succeed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    Never,
    After(u32),
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        let object = ErrorObject { message: message.into(), kind, param: None, code: None, min_bytes: None };
        ApiError { status, object: Box::new(object), retry: Retry::Never }
    }

    fn with_code(mut self, code: &'static str) -> ApiError {
        self.object.code = Some(code);
        self
    }

    fn with_param(mut self, param: impl Into<String>) -> ApiError {
        self.object.param = Some(param.into());
        self
    }

    fn with_retry(mut self, seconds: u32) -> ApiError {
        self.retry = Retry::After(seconds);
        self
    }

    /// A field that is not as it must be; `param` is its path, such as `messages[2].content`.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message).with_param(param)
    }

    /// A body that is no JSON object.
    pub fn malformed(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message).with_code("invalid_json")
    }

    /// A field that nobody reads, where those are refused.
    pub fn unknown_field(param: &str) -> ApiError {
        let message = format!("Unknown field {param}, and this server refuses what it does not know.");
        ApiError::invalid(param, message).with_code("unknown_parameter")
    }

    /// More tokens than the model's context has: `prompt` of the prompt and `answer` asked for.
    pub fn context(prompt: usize, answer: usize, context: usize) -> ApiError {
        let message = format!(
            "This model's maximum context length is {context} tokens. However, you requested {} tokens ({prompt} in the \
             prompt, {answer} for the completion). Please reduce the length of either one.",
            prompt + answer
        );
        ApiError::new(StatusCode::BAD_REQUEST, "exceed_context_size_error", message)
            .with_code("context_length_exceeded")
    }

    /// A model that is not served here.
    pub fn model(name: &str) -> ApiError {
        let message = format!("The model `{name}` does not exist; GET /v1/models lists those that do.");
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
            .with_param("model")
            .with_code("model_not_found")
    }

    /// An address without anything behind it.
    pub fn not_found(path: &str) -> ApiError {
        let message = format!("There is nothing at {path}; GET /openapi.json lists what there is.");
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message).with_code("not_found")
    }

    /// A method that an address does not take.
    pub fn method(method: &str, path: &str) -> ApiError {
        let message = format!("{path} does not take {method}; GET /openapi.json says what it takes.");
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
            .with_code("method_not_allowed")
    }

    /// A wrong API key, or none.
    pub fn key() -> ApiError {
        let message = "Incorrect API key provided; send it as `Authorization: Bearer KEY`.";
        ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message).with_code("invalid_api_key")
    }

    /// A body of more than `limit` bytes.
    pub fn too_large(limit: usize) -> ApiError {
        let message = format!("The body has more than {limit} bytes, the most that this server takes.");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
            .with_code("request_too_large")
    }

    /// The model is not there yet.
    pub fn loading() -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "The model is loading.")
            .with_code("loading")
            .with_retry(RETRY_AFTER)
    }

    /// The server is about to end.
    pub fn draining() -> ApiError {
        let message = "The server is shutting down; ask another one.";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", message)
            .with_code("shutting_down")
            .with_retry(RETRY_AFTER_DRAIN)
    }

    /// A saved context that is not there.
    pub fn no_context(name: &str, param: &str) -> ApiError {
        let message =
            format!("There is no context {name:?}; GET /v1/kv/contexts lists those that there are.");
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
            .with_param(param)
            .with_code("context_not_found")
    }

    /// What can't be done with a slot in the state that it is in.
    pub fn not_now(message: String) -> ApiError {
        ApiError::new(StatusCode::CONFLICT, "invalid_request_error", message).with_param("id")
    }

    /// A name that is taken.
    pub fn conflict(param: &str, message: String) -> ApiError {
        ApiError::new(StatusCode::CONFLICT, "invalid_request_error", message)
            .with_param(param)
            .with_code("already_exists")
    }

    /// What a web page of an origin that is not allowed sends.
    pub fn foreign() -> ApiError {
        let message = "Web pages of this origin may not ask; the server's --allow-origin lets them.";
        ApiError::new(StatusCode::FORBIDDEN, "permission_error", message).with_code("origin_not_allowed")
    }

    /// An answer that somebody else ended.
    pub fn cancelled() -> ApiError {
        ApiError::new(StatusCode::CONFLICT, "unavailable_error", "The answer was cancelled at the server.")
            .with_code("cancelled")
    }

    /// What needs more bytes of keys and values than there are, or than saved contexts leave.
    pub fn no_room(message: String) -> ApiError {
        ApiError::new(StatusCode::INSUFFICIENT_STORAGE, "unavailable_error", message)
            .with_code("kv_memory_full")
    }

    /// A context that could not be written or deleted.
    pub fn unsaved(name: &str, error: &SavedError) -> ApiError {
        ApiError::internal(&format!("The file of the context {name} cannot be written or deleted: {error}"))
    }

    /// A context whose file is of no use.
    pub fn unreadable(name: &str, error: &SavedError) -> ApiError {
        ApiError::internal(&format!(
            "The context {name} cannot be used: {error}; delete it and make it again"
        ))
    }

    /// What this server does not do.
    pub fn unsupported(what: &str) -> ApiError {
        ApiError::new(StatusCode::NOT_IMPLEMENTED, "unsupported_error", format!("{what} is not supported."))
            .with_code("unsupported")
    }

    /// An answer that took longer than the operator allows.
    pub fn timed_out(seconds: f64) -> ApiError {
        let message = format!("The answer was not complete after {seconds} s, this server's limit.");
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout_error", message).with_code("request_timeout")
    }

    /// Our mistake.
    pub fn internal(what: &str) -> ApiError {
        tracing::error!("{what}");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", what).with_code("internal_error")
    }

    /// What the tokenizer or the chat template has against `param`.
    pub fn text(param: &str, error: &ModelError) -> ApiError {
        ApiError::invalid(param, error.to_string())
    }

    /// What the engine has against a request of `answer` tokens; `param` holds the prompt.
    pub fn refused(refused: &Refused, answer: usize, param: &str) -> ApiError {
        let message = refused.to_string();
        match *refused {
            Refused::Context { tokens, context } => {
                ApiError::context(tokens.saturating_sub(answer), answer, context)
            }
            Refused::Token { .. } | Refused::Empty => ApiError::invalid(param, message),
            Refused::Format { .. } => ApiError::invalid("kv.format", message),
            Refused::QueueFull { .. } => {
                ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
                    .with_code("queue_full")
                    .with_retry(RETRY_AFTER)
            }
            Refused::Budget { needed, .. } => ApiError::budget(message, needed),
            Refused::Stopped => ApiError::draining(),
        }
    }

    /// Keys and values that cannot be had for the bytes that are there.
    fn budget(message: String, needed: usize) -> ApiError {
        let mut error = ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
            .with_param("kv")
            .with_code("kv_budget_unsatisfiable");
        error.object.min_bytes = Some(needed);
        error
    }

    /// The body, which a stream sends as its last event.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { error: (*self.object).clone() }
    }
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> ApiError {
        ApiError::invalid(invalid.param, invalid.message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.retry {
            Retry::Never => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
            }
            Retry::After(seconds) => {
                headers.insert(header::RETRY_AFTER, seconds.into());
            }
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
