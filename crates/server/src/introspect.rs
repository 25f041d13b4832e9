//! How is the server, and what is it? What gateways, dashboards and people ask before and beside requests.

use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::slots::SlotState;
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

/// That all is well.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Health {
    /// `ok`.
    pub status: &'static str,
}

/// Whether requests are taken: not while the model loads, nor while the server is about to end.
#[utoipa::path(get, path = "/health", responses(
    (status = 200, description = "Requests are taken", body = Health),
    (status = 503, description = "They are not", body = ErrorBody),
))]
pub async fn health(State(app): State<App>) -> Result<Json<Health>, ApiError> {
    app.ready().map(|_| Json(Health { status: "ok" }))
}

/// The same, as SageMaker asks it.
#[utoipa::path(get, path = "/ping", responses(
    (status = 200, description = "Requests are taken", body = Health),
    (status = 503, description = "They are not", body = ErrorBody),
))]
pub async fn ping(state: State<App>) -> Result<Json<Health>, ApiError> {
    health(state).await
}

/// Which version this is.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Version {
    /// As in the changelog.
    pub version: &'static str,
}

/// The server's version.
#[utoipa::path(get, path = "/version", responses((status = 200, description = "The version", body = Version)))]
pub async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// Counters, gauges and histograms for Prometheus.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, description = "The metrics as text", body = String, content_type = "text/plain"),
))]
pub async fn metrics(State(app): State<App>) -> Response {
    let figures = app.loaded().map(|loaded| loaded.service.figures());
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (content_type, app.meters().render(figures)).into_response()
}

/// What llama-server tells of itself.
#[utoipa::path(get, path = "/props", responses(
    (status = 200, description = "Properties of model and server", body = Object),
    (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
))]
pub async fn props(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    let loaded = app.ready()?;
    let text = &loaded.text;
    let name = |id: Option<u32>| id.and_then(|id| text.tokenizer().id_to_token(id));
    Ok(Json(json!({
        "default_generation_settings": {
            "n_ctx": loaded.context,
            "params": {
                "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0,
                "presence_penalty": 0.0, "frequency_penalty": 0.0, "n_predict": -1,
            },
        },
        "total_slots": loaded.settings.most_sequences,
        "model_alias": app.name(),
        "model_path": app.name(),
        "chat_template": text.template().unwrap_or_default(),
        "bos_token": name(text.bos()).unwrap_or_default(),
        "eos_token": name(text.eos().first().copied()).unwrap_or_default(),
        "modalities": {"vision": false, "audio": false},
        "build_info": concat!("mosaickv-", env!("CARGO_PKG_VERSION")),
        "kv_format": app.options().kv.to_string(),
        "kv_memory_bytes": loaded.settings.kv_memory,
    })))
}

/// What is being answered right now, as llama-server tells it.
#[utoipa::path(get, path = "/slots", responses(
    (status = 200, description = "All slots, those that work first", body = Vec<SlotState>),
    (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
))]
pub async fn slots(State(app): State<App>) -> Result<Json<Vec<SlotState>>, ApiError> {
    let loaded = app.loaded().ok_or_else(ApiError::loading)?;
    Ok(Json(app.slots().list(loaded.settings.most_sequences, loaded.context)))
}

/// What vLLM tells of its tokenizer, which lm-eval asks for.
#[utoipa::path(get, path = "/tokenizer_info", responses(
    (status = 200, description = "Special tokens and chat template", body = Object),
    (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
))]
pub async fn tokenizer_info(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    let loaded = app.ready()?;
    let text = &loaded.text;
    let name = |id: Option<u32>| id.and_then(|id| text.tokenizer().id_to_token(id));
    let eos = name(text.eos().first().copied());
    Ok(Json(json!({
        "tokenizer_class": "MosaicKV",
        "bos_token": name(text.bos()),
        "eos_token": eos,
        // Nothing is padded here; clients want one all the same.
        "pad_token": eos,
        "chat_template": text.template().unwrap_or_default(),
        "model_max_length": loaded.context,
    })))
}

/// What gateways want to know of a server that they may send requests to.
#[utoipa::path(get, path = "/server_info", responses(
    (status = 200, description = "Properties of model and server", body = Object),
    (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
))]
pub async fn server_info(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    let loaded = app.ready()?;
    let (options, figures) = (app.options(), loaded.service.figures());
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model_path": app.name(),
        "served_model_name": options.names,
        "tokenizer_path": app.name(),
        "is_generation": true,
        "max_model_len": loaded.context,
        "context_length": loaded.context,
        "vocab_size": loaded.vocab,
        "max_running_requests": loaded.settings.most_sequences,
        "max_waiting_requests": loaded.settings.most_waiting,
        "max_num_batched_tokens": loaded.settings.tokens_per_step,
        "kv_format": options.kv.to_string(),
        "kv_memory_bytes": loaded.settings.kv_memory,
        "kv_reserved_bytes": figures.kv_reserved,
        "num_requests_running": figures.running,
        "num_requests_waiting": figures.waiting,
        "dp_size": 1,
        "tp_size": 1,
    })))
}

/// What other servers have at this address and this one has not.
pub async fn unsupported(uri: axum::http::Uri) -> ApiError {
    ApiError::unsupported(uri.path())
}
