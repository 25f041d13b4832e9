//! What is in a request's body, and which of its fields does nobody read?

use crate::app::{App, UnknownFields};
use crate::error::ApiError;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// A JSON object, not yet looked into. The `content-type` is not looked at: peers take any.
pub struct JsonObject(pub Map<String, Value>);

impl FromRequest<App> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<JsonObject, ApiError> {
        let bytes =
            Bytes::from_request(request, app).await.map_err(|rejection| match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(app.options().body_limit),
                _ => ApiError::malformed(format!("The body cannot be read: {}", rejection.body_text())),
            })?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(object)) => Ok(JsonObject(object)),
            Ok(_) => Err(ApiError::malformed("The body is JSON, but not an object such as {\"model\": ..}.")),
            Err(error) => Err(ApiError::malformed(format!("The body is not valid JSON: {error}"))),
        }
    }
}

/// Reads fields out of a request and knows which nobody read.
pub struct Reader<'a> {
    object: &'a Map<String, Value>,
    /// What each kind of fields left unread, by path.
    unread: Vec<BTreeSet<String>>,
}

impl<'a> Reader<'a> {
    /// Of this object; `known` are fields that others read.
    pub fn new(object: &'a Map<String, Value>, known: &[&str]) -> Reader<'a> {
        let others = object.keys().filter(|name| !known.contains(&name.as_str())).cloned().collect();
        Reader { object, unread: vec![others] }
    }

    /// Reads one kind of fields.
    pub fn read<T: DeserializeOwned>(&mut self) -> Result<T, ApiError> {
        let mut unread = BTreeSet::new();
        let mut note = |path: serde_ignored::Path<'_>| {
            unread.insert(path.to_string().replace(".?", "")); // "?" stands for an optional field's content
        };
        let fields =
            serde_path_to_error::deserialize(serde_ignored::Deserializer::new(self.object, &mut note));
        let fields = fields.map_err(|error| {
            let path = error.path().to_string();
            ApiError::invalid(path.clone(), format!("{path}: {}", error.into_inner()))
        })?;
        self.unread.push(unread);
        Ok(fields)
    }

    /// The fields that nobody read: noted once in the log, or refused.
    pub fn unread(self, app: &App) -> Result<Vec<String>, ApiError> {
        let outer = |path: &String| path.split(['.', '[']).next().unwrap_or_default().to_owned();
        // A field belongs to the kind that reads it; the others do not know it at all.
        let is_unread = |path: &String| {
            self.unread.iter().all(|unread| unread.contains(path) || unread.contains(&outer(path)))
        };
        let mut paths: Vec<String> =
            self.unread.iter().flatten().filter(|path| is_unread(path)).cloned().collect();
        paths.sort();
        paths.dedup();
        if let (UnknownFields::Refused, Some(path)) = (app.options().unknown_fields, paths.first()) {
            return Err(ApiError::unknown_field(path));
        }
        paths.iter().for_each(|path| app.note_unread(path));
        Ok(paths)
    }
}
