//! What is at which address?

use crate::app::App;
use crate::error::ApiError;
use crate::{chat, completions, contexts, guard, introspect, live, models, page, responses, slots, tokenize};
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use axum::{Json, Router, middleware};
use std::any::Any;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};
use tower_http::timeout::RequestBodyTimeoutLayer;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// What other servers have and this one has not: it answers 501 there, so that a client knows it reached the right server.
const UNSUPPORTED: [&str; 15] = [
    "/v1/responses/{*rest}",
    "/v1/embeddings",
    "/v1/moderations",
    "/v1/messages",
    "/v1/audio/{*rest}",
    "/v1/images/{*rest}",
    "/v1/files",
    "/v1/batches",
    "/v1/score",
    "/v1/rerank",
    "/embeddings",
    "/completion",
    "/infill",
    "/rerank",
    "/pooling",
];

impl App {
    /// Everything that is served.
    pub fn router(&self) -> Router {
        let (router, api) = described().split_for_parts();
        let api = Json(api);
        let mut router = router
            .route("/openapi.json", get(move || async move { api }))
            .merge(page::router())
            // Names of models may have slashes.
            .route("/v1/models/{org}/{*rest}", get(slashed));
        for path in UNSUPPORTED {
            router = router.route(path, any(introspect::unsupported));
        }
        let options = self.options();
        router
            .fallback(async |request: Request| ApiError::not_found(request.uri().path()))
            .method_not_allowed_fallback(async |request: Request| {
                ApiError::method(request.method().as_str(), request.uri().path())
            })
            .layer(RequestBodyTimeoutLayer::new(options.read_timeout))
            .layer(DefaultBodyLimit::max(options.body_limit))
            .layer(CatchPanicLayer::custom(panicked))
            .layer(middleware::from_fn_with_state(self.clone(), guard::check_key))
            .layer(middleware::from_fn_with_state(self.clone(), guard::check_origin))
            .layer(cors(&options.allow_origins))
            .layer(middleware::from_fn(guard::note))
            .with_state(self.clone())
    }
}

/// A model whose name has slashes.
async fn slashed(
    state: axum::extract::State<App>,
    axum::extract::Path((org, rest)): axum::extract::Path<(String, String)>,
) -> Result<Json<models::ModelCard>, ApiError> {
    models::model(state, axum::extract::Path(format!("{org}/{rest}"))).await
}

/// What /openapi.json describes.
fn described() -> OpenApiRouter<App> {
    let mut api = OpenApi::default();
    api.info.title = "MosaicKV".to_owned();
    api.info.version = env!("CARGO_PKG_VERSION").to_owned();
    api.info.description = Some("The OpenAI API, with compression of keys and values by request.".to_owned());
    OpenApiRouter::with_openapi(api)
        .routes(routes!(chat::chat_completions))
        .routes(routes!(completions::completions))
        .routes(routes!(responses::responses))
        .routes(routes!(contexts::create_context, contexts::contexts))
        .routes(routes!(contexts::context, contexts::delete_context))
        .routes(routes!(live::live))
        .routes(routes!(live::mosaic))
        .routes(routes!(live::mosaic_of_context))
        .routes(routes!(models::models))
        .routes(routes!(models::model))
        .routes(routes!(tokenize::tokenize))
        .routes(routes!(tokenize::detokenize))
        .routes(routes!(introspect::health))
        .routes(routes!(introspect::ping))
        .routes(routes!(introspect::version))
        .routes(routes!(introspect::metrics))
        .routes(routes!(introspect::props))
        .routes(routes!(introspect::slots))
        .routes(routes!(slots::slot_action))
        .routes(routes!(introspect::tokenizer_info))
        .routes(routes!(introspect::server_info))
}

/// Lets web pages of these origins ask; without any it lets none.
fn cors(origins: &[String]) -> CorsLayer {
    if origins.is_empty() {
        return CorsLayer::new();
    }
    let origin = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    let names = ["x-api-key", "x-request-id", "x-kv-format", "x-kv-ratio"].map(HeaderName::from_static);
    let asked = [header::AUTHORIZATION, header::CONTENT_TYPE].into_iter().chain(names);
    let told =
        ["x-request-id", "x-kv-ratio", "x-ignored-params", "x-should-retry"].map(HeaderName::from_static);
    CorsLayer::new()
        .allow_origin(origin)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers(asked.collect::<Vec<_>>())
        .expose_headers(told)
}

fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    ApiError::internal("A request made the server panic").into_response()
}
