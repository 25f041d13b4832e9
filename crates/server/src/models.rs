//! Which models are served here? One, under all of its names.

use crate::app::{App, Loaded};
use crate::error::{ApiError, ErrorBody};
use crate::kv::split_name;
use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

/// A model, under one of its names.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ModelCard {
    /// The name.
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// When the server began, in seconds of Unix time.
    pub created: u64,
    /// `mosaickv`.
    pub owned_by: &'static str,
    /// The first of its names.
    pub root: String,
    /// Most tokens of prompt and answer.
    pub max_model_len: usize,
}

/// All models.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    pub object: &'static str,
    /// The model under each of its names.
    pub data: Vec<ModelCard>,
}

fn card(app: &App, loaded: &Loaded, id: &str) -> ModelCard {
    ModelCard {
        id: id.to_owned(),
        object: "model",
        created: app.created(),
        owned_by: "mosaickv",
        root: app.name().to_owned(),
        max_model_len: loaded.context,
    }
}

/// Lists the models.
#[utoipa::path(get, path = "/v1/models", responses(
    (status = 200, description = "The models", body = ModelList),
    (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
))]
pub async fn models(State(app): State<App>) -> Result<Json<ModelList>, ApiError> {
    let loaded = app.ready()?;
    let data = app.options().names.iter().map(|name| card(&app, loaded, name)).collect();
    Ok(Json(ModelList { object: "list", data }))
}

/// One of them. Its name may have slashes, and a format after `@kv=`.
#[utoipa::path(get, path = "/v1/models/{id}",
    params(("id" = String, Path, description = "The model's name")),
    responses(
        (status = 200, description = "The model", body = ModelCard),
        (status = "4XX", description = "No such model", body = ErrorBody),
        (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
    ))]
pub async fn model(State(app): State<App>, Path(id): Path<String>) -> Result<Json<ModelCard>, ApiError> {
    let loaded = app.ready()?;
    app.known_model(Some(&id))?;
    if let (_, Some(format)) = split_name(&id) {
        format.parse::<mosaickv_kv::KvFormat>().map_err(|why| ApiError::invalid("id", why))?;
    }
    Ok(Json(card(&app, loaded, &id)))
}
