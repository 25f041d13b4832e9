//! Who may ask, and what is noted of it? The checks around every request, from the outside in: its id and a line in the log, then
//! where a web page that sends it is from, and the API key.

use crate::app::{App, Metrics};
use crate::error::ApiError;
use crate::understand::Arrival;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::time::Instant;
use subtle::{Choice, ConstantTimeEq};
use uuid::Uuid;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// llama-server takes the key here too.
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// The longest id of a client's that is echoed.
const LONGEST_ID: usize = 128;

/// Gives the request its id, and the log a line when its answer begins.
pub async fn note(mut request: Request, next: Next) -> Response {
    let at = Instant::now();
    let sent = request.headers().get(&REQUEST_ID).and_then(|value| value.to_str().ok());
    let sent = sent.filter(|id| !id.is_empty() && id.len() <= LONGEST_ID).map(str::to_owned);
    let id = sent.unwrap_or_else(|| Uuid::new_v4().to_string());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    request.extensions_mut().insert(Arrival { id: id.clone(), at });
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let (status, ms) = (response.status().as_u16(), at.elapsed().as_millis());
    match path.as_str() {
        // Probes come every second.
        "/health" | "/ping" | "/metrics" | "/v1/kv/live" => tracing::debug!(%id, %method, path, status, ms),
        _ => tracing::info!(%id, %method, path, status, ms),
    }
    response
}

/// Lets those with a key pass, if there are keys.
pub async fn check_key(State(app): State<App>, request: Request, next: Next) -> Response {
    let options = app.options();
    let is_open = match request.uri().path() {
        // The page itself has nothing to hide; what it asks for needs a key.
        path if crate::page::is_part(path) => true,
        "/health" => true,
        "/metrics" => options.metrics == Metrics::Open,
        _ => request.method() == Method::OPTIONS,
    };
    if options.api_keys.is_empty() || is_open || is_known(&options.api_keys, sent_key(&request)) {
        return next.run(request).await;
    }
    ApiError::key().into_response()
}

/// Refuses what web pages of other origins send without asking first, unless they are allowed: a browser lets them send, though not
/// read what comes of it.
pub async fn check_origin(State(app): State<App>, request: Request, next: Next) -> Response {
    if is_foreign(&app.options().allow_origins, request.method(), request.headers()) {
        return ApiError::foreign().into_response();
    }
    next.run(request).await
}

/// Whether it comes from a web page of another origin than these and the server's own, and may change something.
fn is_foreign(allowed: &[String], method: &Method, headers: &HeaderMap) -> bool {
    if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) {
        return false;
    }
    let Some(origin) = headers.get(header::ORIGIN) else { return false };
    let Ok(origin) = origin.to_str() else { return true };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let own = origin.split_once("://").map(|(_, own)| own);
    (own.is_none() || own != host) && !allowed.iter().any(|allowed| allowed == "*" || allowed == origin)
}

fn sent_key(request: &Request) -> &[u8] {
    let headers = request.headers();
    let bearer = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let bearer = bearer.and_then(|value| {
        let (scheme, key) = value.split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
    });
    bearer.or_else(|| headers.get(API_KEY).map(HeaderValue::as_bytes)).unwrap_or_default()
}

/// Compares with all keys, digests of the same length, so that the time tells nothing of them.
fn is_known(keys: &[String], sent: &[u8]) -> bool {
    let sent = Sha256::digest(sent);
    let equal = |key: &String| Sha256::digest(key.as_bytes()).as_slice().ct_eq(sent.as_slice());
    keys.iter().fold(Choice::from(0), |found, key| found | equal(key)).into()
}
