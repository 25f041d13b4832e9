//! What is being answered right now, and what was last answered where? The list behind GET /slots, and what POST /slots/{id} does.
//!
//! An answer is in the first slot that is free, and leaves its tokens there when it ends.

use crate::app::App;
use crate::contexts::Contexts;
use crate::error::{ApiError, ErrorBody};
use crate::understand::aside;
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use mosaickv_kv::KvFormat;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use utoipa::ToSchema;

/// All slots that have been used.
#[derive(Default)]
pub struct Slots {
    places: Arc<Mutex<BTreeMap<usize, Content>>>,
    next: AtomicU64,
}

/// What is in a slot.
enum Content {
    Answer(Answer),
    Rest(Rest),
}

struct Answer {
    task: u64,
    request: String,
    prompt_tokens: usize,
    kv: KvFormat,
    sampled: Arc<AtomicUsize>,
}

/// What an answer leaves: the tokens that were read, of which so many were compressed together.
#[derive(Clone)]
pub struct Rest {
    /// How keys and values are kept.
    pub kv: KvFormat,
    /// Of the prompt and the answer.
    pub tokens: Vec<u32>,
    /// How many of them were compressed together.
    pub prompt: usize,
}

/// An answer's slot, which is free when this is dropped.
pub struct Slot {
    id: usize,
    task: u64,
    sampled: Arc<AtomicUsize>,
    places: Arc<Mutex<BTreeMap<usize, Content>>>,
    rest: Option<Rest>,
}

/// A slot as llama-server shows it, with what is ours.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SlotState {
    /// Its number.
    pub id: usize,
    /// Most tokens of prompt and answer.
    pub n_ctx: usize,
    /// Whether an answer runs or waits in it.
    pub is_processing: bool,
    /// Which answer of this server.
    #[schema(required)]
    pub id_task: Option<u64>,
    /// The id of its request.
    #[schema(required)]
    pub request_id: Option<String>,
    /// Tokens of its prompt.
    pub n_prompt_tokens: usize,
    /// Tokens answered.
    pub n_decoded: usize,
    /// How its keys and values are kept.
    #[schema(required)]
    pub kv_format: Option<String>,
}

fn locked(places: &Mutex<BTreeMap<usize, Content>>) -> MutexGuard<'_, BTreeMap<usize, Content>> {
    places.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slots {
    /// A slot for an answer to a prompt of so many tokens.
    pub fn enter(&self, request: &str, prompt_tokens: usize, kv: KvFormat) -> Slot {
        let task = self.next.fetch_add(1, Ordering::Relaxed);
        let sampled = Arc::new(AtomicUsize::new(0));
        let answer =
            Answer { task, request: request.to_owned(), prompt_tokens, kv, sampled: sampled.clone() };
        let mut places = locked(&self.places);
        let is_free = |id: &usize| !matches!(places.get(id), Some(Content::Answer(_)));
        let id = (0..).find(is_free).expect("there are more numbers than answers");
        places.insert(id, Content::Answer(answer));
        drop(places);
        Slot { id, task, sampled, places: self.places.clone(), rest: None }
    }

    /// At least `least` slots, and as many as work.
    pub fn list(&self, least: usize, context: usize) -> Vec<SlotState> {
        let places = locked(&self.places);
        let works =
            |(id, content): (&usize, &Content)| matches!(content, Content::Answer(_)).then_some(*id + 1);
        let count = places.iter().filter_map(works).max().unwrap_or(0).max(least);
        let state = |id| match places.get(&id) {
            Some(Content::Answer(answer)) => SlotState {
                id,
                n_ctx: context,
                is_processing: true,
                id_task: Some(answer.task),
                request_id: Some(answer.request.clone()),
                n_prompt_tokens: answer.prompt_tokens,
                n_decoded: answer.sampled.load(Ordering::Relaxed),
                kv_format: Some(answer.kv.to_string()),
            },
            _ => SlotState { id, n_ctx: context, ..SlotState::default() },
        };
        (0..count).map(state).collect()
    }

    /// Which answer runs there.
    fn task(&self, id: usize) -> Result<u64, ApiError> {
        match locked(&self.places).get(&id) {
            Some(Content::Answer(answer)) => Ok(answer.task),
            _ => Err(ApiError::not_now(format!("No answer runs in slot {id}."))),
        }
    }

    /// What the last answer left there; an error while one runs.
    fn rest(&self, id: usize) -> Result<Rest, ApiError> {
        match locked(&self.places).get(&id) {
            Some(Content::Rest(rest)) => Ok(rest.clone()),
            Some(Content::Answer(_)) => Err(ApiError::not_now(format!("Slot {id} is at work."))),
            None => {
                let message =
                    "is empty: no answer has ended there, or it had a cache_salt and is nobody else's.";
                Err(ApiError::invalid("id", format!("Slot {id} {message}")))
            }
        }
    }

    /// Changes what is left in a slot where no answer runs; what was there before.
    fn replace(&self, id: usize, rest: Option<Rest>) -> Result<Option<Rest>, ApiError> {
        let mut places = locked(&self.places);
        if let Some(Content::Answer(_)) = places.get(&id) {
            return Err(ApiError::not_now(format!("Slot {id} is at work.")));
        }
        let before = match rest {
            Some(rest) => places.insert(id, Content::Rest(rest)),
            None => places.remove(&id),
        };
        Ok(before.and_then(|content| match content {
            Content::Rest(rest) => Some(rest),
            Content::Answer(_) => None,
        }))
    }
}

impl Slot {
    /// One more token was answered.
    pub fn count(&self) {
        self.sampled.fetch_add(1, Ordering::Relaxed);
    }

    /// Its number.
    pub fn id(&self) -> usize {
        self.id
    }

    /// Which answer of this server is in it.
    pub fn task(&self) -> u64 {
        self.task
    }

    /// What is left when it is dropped.
    pub fn leave(&mut self, rest: Rest) {
        self.rest = Some(rest);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut places = locked(&self.places);
        match self.rest.take() {
            Some(rest) => drop(places.insert(self.id, Content::Rest(rest))),
            None => drop(places.remove(&self.id)),
        }
    }
}

impl App {
    /// Whether a slot's tokens are kept when its answer has ended: where they can be saved, and of as many slots as are told of.
    pub(crate) fn keeps_slot(&self, id: usize) -> bool {
        let most = self.loaded().map_or(0, |loaded| loaded.settings.most_sequences);
        self.options().contexts.is_some() && id < most
    }
}

/// What is to be done with a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// Its tokens, keys and values go to a file.
    Save,
    /// They come from one.
    Restore,
    /// They are forgotten.
    Erase,
    /// The answer that runs there ends.
    Cancel,
}

/// What follows the `?`.
#[derive(Debug, Deserialize)]
pub struct ActionQuery {
    action: Option<String>,
    /// To cancel this answer only.
    task: Option<String>,
}

/// What is sent to POST /slots/{id} to save or restore.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct SlotFile {
    /// The file's name, as a context's: `kv.context` goes on from it too.
    pub filename: Option<String>,
}

/// What was done, as llama-server says it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct SlotDone {
    /// The slot.
    pub id_slot: usize,
    /// The file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filename: Option<String>,
    /// Tokens saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_saved: Option<usize>,
    /// Bytes allocated for their keys and values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_written: Option<usize>,
    /// Tokens restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_restored: Option<usize>,
    /// Bytes allocated for their keys and values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_read: Option<usize>,
    /// Tokens forgotten.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_erased: Option<usize>,
    /// How long it took.
    pub timings: SlotTimings,
}

/// How long something with a slot took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, ToSchema)]
pub struct SlotTimings {
    /// Milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_ms: Option<f64>,
    /// Milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore_ms: Option<f64>,
}

/// Saves what an answer left in a slot to a file, restores it, or forgets it, as llama-server does; or cancels the answer that runs there.
/// Files need `--contexts`.
#[utoipa::path(post, path = "/slots/{id}",
    params(("id" = usize, Path, description = "The slot"), ("action" = String, Query, description = "save, restore, erase or cancel"),
        ("task" = Option<u64>, Query, description = "With cancel: the id_task that is meant, if another one may be there by now")),
    request_body = SlotFile,
    responses(
        (status = 200, description = "It is done", body = SlotDone),
        (status = "4XX", description = "It cannot be done", body = ErrorBody),
        (status = "5XX", description = "A server that cannot do it now, or at all", body = ErrorBody),
    ))]
pub async fn slot_action(
    State(app): State<App>,
    Path(id): Path<String>,
    query: Result<Query<ActionQuery>, QueryRejection>,
    body: Bytes,
) -> Result<Json<SlotDone>, ApiError> {
    app.ready()?;
    let Query(query) = query.map_err(|wrong| ApiError::invalid("action", wrong.body_text()))?;
    let wanted = || {
        ApiError::invalid("action", "action is missing or unknown; wanted save, restore, erase or cancel.")
    };
    let action = match query.action.as_deref() {
        Some("save") => Action::Save,
        Some("restore") => Action::Restore,
        Some("erase") => Action::Erase,
        Some("cancel") => Action::Cancel,
        _ => return Err(wanted()),
    };
    let id: usize = id.parse().map_err(|_| ApiError::not_found(&format!("/slots/{id}")))?;
    let filename = match action {
        Action::Erase | Action::Cancel => String::new(),
        _ => {
            let file: SlotFile = serde_json::from_slice(&body)
                .map_err(|error| ApiError::malformed(format!("The body is not valid: {error}")))?;
            file.filename.ok_or_else(|| ApiError::invalid("filename", "filename is missing."))?
        }
    };
    let task = query.task.map(|task| task.parse()).transpose();
    let task = task.map_err(|_| ApiError::invalid("task", "task is no id_task: wanted a number."))?;
    aside(move || act(&app, (action, task), id, filename)).await.map(Json)
}

fn act(
    app: &App,
    (action, meant): (Action, Option<u64>),
    id: usize,
    filename: String,
) -> Result<SlotDone, ApiError> {
    let (loaded, start) = (app.ready()?.clone(), Instant::now());
    let most = loaded.settings.most_sequences;
    // Answers that wait may have further numbers.
    if id >= most && action != Action::Cancel {
        return Err(ApiError::invalid("id", format!("Slot {id}; wanted 0 to {}.", most - 1)));
    }
    let took = || Some(start.elapsed().as_secs_f64() * 1e3);
    let contexts: &Contexts = app.contexts();
    let done = SlotDone { id_slot: id, ..SlotDone::default() };
    match action {
        Action::Erase => {
            let before = app.slots().replace(id, None)?;
            Ok(SlotDone { n_erased: Some(before.map_or(0, |rest| rest.tokens.len())), ..done })
        }
        Action::Cancel => {
            let task = app.slots().task(id)?;
            let is_meant = meant.is_none_or(|meant| meant == task);
            let cancel =
                || loaded.service.cancel(task).map_err(|refused| ApiError::refused(&refused, 0, "id"));
            if !is_meant || !cancel()? {
                return Err(ApiError::not_now(format!("The answer that was in slot {id} has ended.")));
            }
            Ok(done)
        }
        Action::Save => {
            contexts.check_folder(&filename)?;
            let Rest { kv, tokens, prompt } = app.slots().rest(id)?;
            let found = loaded.service.find(kv, tokens, prompt);
            let kept = found.map_err(|refused| ApiError::refused(&refused, 0, "id"))?;
            let kept = kept.ok_or_else(|| {
                ApiError::not_now(format!(
                    "What slot {id} had is no longer in memory; ask again, and save then."
                ))
            })?;
            let (n_saved, n_written) = (Some(kept.context.tokens.len()), Some(kept.bytes));
            contexts.put(&loaded, filename.clone(), kept)?;
            let timings = SlotTimings { save_ms: took(), ..SlotTimings::default() };
            Ok(SlotDone { filename: Some(filename), n_saved, n_written, timings, ..done })
        }
        Action::Restore => {
            contexts.check_folder(&filename)?;
            let held = contexts.hold(&loaded, &filename, "filename")?;
            let (n_restored, n_read) = (Some(held.tokens.len()), Some(held.named.bytes()));
            let rest = Rest { kv: held.named.kv, tokens: held.tokens.to_vec(), prompt: held.named.prompt };
            app.slots().replace(id, Some(rest))?;
            let timings = SlotTimings { restore_ms: took(), ..SlotTimings::default() };
            Ok(SlotDone { filename: Some(filename), n_restored, n_read, timings, ..done })
        }
    }
}
