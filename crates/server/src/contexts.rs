//! Which documents have been read and compressed once, to be asked many times? Contexts with names, which requests go on from.
//!
//! With a folder they are files, and in memory only while there is room; without, they stay in memory until they are deleted.

use crate::app::{App, Loaded, now};
use crate::body::{JsonObject, Reader};
use crate::chat;
use crate::completions::encode;
use crate::error::{ApiError, ErrorBody};
use crate::fields::{ChatOnly, KvFields};
use crate::kv::{self, KvReport};
use crate::saved::{self, Header, Home, SavedError, Source};
use crate::understand::{Arrival, aside, with_headers};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use mosaickv_engine::{Bill, End, Event, Kept, Pin, Request, WeakPin};
use mosaickv_kv::KvFormat;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;
use utoipa::ToSchema;

/// Most letters of a name.
const LONGEST_NAME: usize = 64;

/// What a file's name ends with.
const ENDING: &str = "context";

/// All contexts that have a name.
pub struct Contexts {
    folder: Option<PathBuf>,
    all: Mutex<BTreeMap<String, Arc<Named>>>,
}

/// A context that has a name.
pub struct Named {
    name: String,
    /// When it was made.
    created: u64,
    /// What it was made from.
    pub source: Source,
    /// How keys and values are kept.
    pub kv: KvFormat,
    /// Of the first tokens, how many were compressed together.
    pub prompt: usize,
    tokens: usize,
    bytes: usize,
    exact_bytes: usize,
    place: Mutex<Place>,
}

/// Where a context's keys and values are.
enum Place {
    /// In memory, until nobody has the pin.
    Kept(Arc<[u32]>, Pin),
    /// In a file, and in memory too as long as the engine needs the bytes for nothing else.
    Saved(PathBuf, Option<(Arc<[u32]>, WeakPin)>),
}

/// A context that a request goes on from.
pub struct Held {
    /// Which.
    pub named: Arc<Named>,
    /// Its tokens.
    pub tokens: Arc<[u32]>,
    /// As long as this lives its keys and values stay in memory.
    pub pin: Pin,
}

/// A context, as it is told of.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ContextCard {
    /// Its name.
    pub id: String,
    /// `kv.context`.
    pub object: &'static str,
    /// When it was made, in seconds of Unix time.
    pub created: u64,
    /// The model.
    pub model: String,
    /// Tokens that it has.
    pub tokens: usize,
    /// How its keys and values are kept.
    pub format: String,
    /// Bytes allocated for them.
    pub stored_bytes: usize,
    /// Bytes that they would take as f16.
    pub exact_bytes: usize,
    /// `exact_bytes` over `stored_bytes`.
    pub ratio: f64,
    /// Whether it is in a file, and there after a restart.
    pub saved: bool,
    /// Whether it is in memory now.
    pub loaded: bool,
}

/// A context that was just made.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct NewContext {
    /// The context.
    #[serde(flatten)]
    pub context: ContextCard,
    /// What making it took.
    pub kv: KvReport,
}

/// All contexts.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ContextList {
    /// `list`.
    pub object: &'static str,
    /// By name.
    pub data: Vec<ContextCard>,
}

/// A context that is no more.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ContextDeleted {
    /// Its name.
    pub id: String,
    /// `kv.context.deleted`.
    pub object: &'static str,
    /// true
    pub deleted: bool,
}

/// What is sent to POST /v1/kv/contexts, beside the fields of a conversation.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct ContextFields {
    /// Up to 64 letters, digits, dots, dashes and underscores, of which the first is a letter or digit.
    #[schema(required, pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    pub name: Option<String>,
    /// The model.
    pub model: Option<String>,
    /// A text, if it is for text completions; else `messages`.
    pub prompt: Option<String>,
    /// Whether the tokens that the model wants before a text are added; they are unless this is false.
    pub add_special_tokens: Option<bool>,
    /// How keys and values are kept.
    pub kv: Option<KvFields>,
}

/// What is sent to POST /v1/kv/contexts.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub struct ContextRequest {
    #[serde(flatten)]
    fields: ContextFields,
    /// The messages that a conversation begins with.
    #[schema(value_type = Option<Vec<Object>>)]
    messages: Option<Vec<Value>>,
}

/// Makes a context: reads and compresses it, and keeps it under a name.
#[utoipa::path(
    post, path = "/v1/kv/contexts", request_body = ContextRequest,
    responses(
        (status = 201, description = "The context", body = NewContext),
        (status = "4XX", description = "A context that cannot be made", body = ErrorBody),
        (status = "5XX", description = "A server that cannot make one now", body = ErrorBody),
    ),
)]
pub async fn create_context(
    State(app): State<App>,
    Extension(arrival): Extension<Arrival>,
    headers: HeaderMap,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let (loaded, _caller) = app.admit(&arrival)?;
    let asked = aside({
        let (app, loaded) = (app.clone(), loaded.clone());
        move || understand(&app, &loaded, &headers, &object)
    });
    let Asked { name, source, tokens, kv, unread } = asked.await?;
    let (kept, bill) = read(&app, &loaded, tokens, kv).await?;
    let report = KvReport::new(kv, &[bill], bill.cached_tokens);
    let named = aside(move || {
        app.contexts().check_new(&name, kv)?;
        let named = app.contexts().insert(&loaded, name, source, kept)?;
        Ok(NewContext { context: named.card(app.name()), kv: report })
    });
    let created = (StatusCode::CREATED, Json(named.await?)).into_response();
    Ok(with_headers(created, &unread, None))
}

/// A context that is to be made.
struct Asked {
    name: String,
    source: Source,
    tokens: Vec<u32>,
    kv: KvFormat,
    unread: Vec<String>,
}

fn understand(
    app: &App,
    loaded: &Loaded,
    headers: &HeaderMap,
    object: &Map<String, Value>,
) -> Result<Asked, ApiError> {
    let mut reader = Reader::new(object, &[]);
    let fields: ContextFields = reader.read()?;
    let chat: ChatOnly = reader.read()?;
    let unread = reader.unread(app)?;
    let suffix = app.known_model(fields.model.as_deref())?;
    let kv = kv::choose(fields.kv.as_ref(), headers, suffix, app.options().kv)?;
    let name = fields.name.ok_or_else(|| ApiError::invalid("name", "name is missing."))?;
    check_name(&name)?;
    app.contexts().check_new(&name, kv)?;
    let (source, tokens) = match (&fields.prompt, &chat.messages) {
        (Some(_), Some(_)) => {
            let message = "Both prompt and messages are given; leave one of them out.";
            return Err(ApiError::invalid("prompt", message));
        }
        (Some(prompt), None) => {
            (Source::Prompt, encode(&loaded.text, prompt, fields.add_special_tokens.unwrap_or(true))?)
        }
        (None, _) => {
            let chat = ChatOnly { add_generation_prompt: Some(false), ..chat };
            let tokens = chat::prompt(app, loaded, &chat, None)?;
            (Source::Messages(chat.messages.unwrap_or_default()), tokens)
        }
    };
    if tokens.len() >= loaded.context {
        return Err(ApiError::context(tokens.len(), 1, loaded.context));
    }
    Ok(Asked { name, source, tokens, kv, unread })
}

/// Lets the engine read a prompt, and keeps it.
async fn read(
    app: &App,
    loaded: &Arc<Loaded>,
    mut tokens: Vec<u32>,
    kv: KvFormat,
) -> Result<(Kept, Bill), ApiError> {
    let (keep, kept) = oneshot::channel();
    let (end, ended) = oneshot::channel();
    let keep: mosaickv_engine::Keep = Box::new(move |it| drop(keep.send(it)));
    // Clones of other formats' caches that have read on are not what they were cloned from.
    let given = if kv.clones_go_on() { tokens.split_off(app.most_exact(tokens.len())) } else { vec![] };
    let request = Request { given, keep: Some(keep), ..Request::new(tokens, kv, 0) };
    let mut end = Some(end);
    let emit = move |event| {
        if let (Event::Ended(why, bill), Some(end)) = (event, end.take()) {
            // Whoever does not listen any more has dropped the ticket.
            drop(end.send((why, bill)));
        }
    };
    let _ticket =
        loaded.service.submit(request, emit).map_err(|refused| ApiError::refused(&refused, 0, "prompt"))?;
    let ended = match app.options().request_timeout {
        Some(limit) => {
            tokio::time::timeout(limit, ended).await.map_err(|_| ApiError::timed_out(limit.as_secs_f64()))?
        }
        None => ended.await,
    };
    let gone = || ApiError::internal("The engine has ended unexpectedly");
    match ended.map_err(|_| gone())? {
        (End::Length | End::Stop, bill) => {
            let full = |_| {
                ApiError::no_room("There is no room to keep the context beside what is in use.".to_owned())
            };
            Ok((kept.await.map_err(full)?, bill))
        }
        (End::NoRoom(why), _) => Err(ApiError::no_room(why)),
        (End::Failed(why), _) => Err(ApiError::internal(&format!("The model failed: {why}"))),
        (End::Cancelled, _) => Err(ApiError::cancelled()),
        (End::Shutdown, _) => Err(ApiError::draining()),
    }
}

/// All contexts that have a name.
#[utoipa::path(get, path = "/v1/kv/contexts", responses(
    (status = 200, description = "The contexts", body = ContextList),
    (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
))]
pub async fn contexts(State(app): State<App>) -> Result<Json<ContextList>, ApiError> {
    app.ready()?;
    let data = app.contexts().lock().values().map(|named| named.card(app.name())).collect();
    Ok(Json(ContextList { object: "list", data }))
}

/// One of them.
#[utoipa::path(get, path = "/v1/kv/contexts/{name}",
    params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "The context", body = ContextCard),
        (status = "4XX", description = "There is none of this name", body = ErrorBody),
        (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
    ))]
pub async fn context(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<ContextCard>, ApiError> {
    app.ready()?;
    Ok(Json(app.contexts().get(&name, "name")?.card(app.name())))
}

/// Forgets one of them, and deletes its file. Answers that go on from it are not disturbed.
#[utoipa::path(delete, path = "/v1/kv/contexts/{name}",
    params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 200, description = "It is no more", body = ContextDeleted),
        (status = "4XX", description = "There is none of this name", body = ErrorBody),
        (status = "5XX", description = "A server that cannot do it now", body = ErrorBody),
    ))]
pub async fn delete_context(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<ContextDeleted>, ApiError> {
    app.ready()?;
    let id = name.clone();
    aside(move || app.contexts().remove(&name)).await?;
    Ok(Json(ContextDeleted { id, object: "kv.context.deleted", deleted: true }))
}

/// A name is part of a file's path: nothing in it leads anywhere else.
fn check_name(name: &str) -> Result<(), ApiError> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && name.len() <= LONGEST_NAME && name.chars().all(is_part) {
        return Ok(());
    }
    Err(ApiError::invalid("name", not_a_name(name)))
}

fn not_a_name(name: &str) -> String {
    format!(
        "{name:?} is no name for a context: wanted up to {LONGEST_NAME} letters, digits, dots, dashes and underscores, of which the \
         first is a letter or digit."
    )
}

impl Contexts {
    /// In memory alone, or in this folder.
    pub fn new(folder: Option<PathBuf>) -> Contexts {
        Contexts { folder, all: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Named>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds out what the folder has. Files that can't be used are named in the log and left alone.
    pub fn look(&self, home: &Home) {
        let Some(folder) = &self.folder else { return };
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) => return tracing::error!("no saved context is known: {}: {error}", folder.display()),
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
            if path.extension().is_none_or(|ending| ending != ENDING) || check_name(&name).is_err() {
                continue;
            }
            let named = saved::read_header(&path, home)
                .and_then(|header| Named::of_file(name.clone(), header, path.clone()));
            match named {
                Ok(named) => drop(self.lock().insert(name, Arc::new(named))),
                Err(error) => tracing::warn!("the context {} cannot be used: {error}", path.display()),
            }
        }
    }

    /// Whether a context may get this name.
    fn check_new(&self, name: &str, kv: KvFormat) -> Result<(), ApiError> {
        if self.lock().contains_key(name) {
            return Err(ApiError::conflict(
                "name",
                format!("There is a context {name} already; delete it first."),
            ));
        }
        if self.folder.is_some() && !kv.can_be_saved() {
            let message =
                format!("A context in the format {kv} cannot be saved; exact and layered ones can.");
            return Err(ApiError::invalid("kv.format", message));
        }
        Ok(())
    }

    fn get(&self, name: &str, param: &str) -> Result<Arc<Named>, ApiError> {
        self.lock().get(name).cloned().ok_or_else(|| ApiError::no_context(name, param))
    }

    /// Keeps a context under a name; in a file, if there is a folder.
    fn insert(
        &self,
        loaded: &Loaded,
        name: String,
        source: Source,
        kept: Kept,
    ) -> Result<Arc<Named>, ApiError> {
        let Kept { context, bytes, exact_bytes, pin } = kept;
        let created = now();
        let tokens: Arc<[u32]> = context.tokens.as_slice().into();
        let place = match &self.folder {
            None => Place::Kept(tokens, pin),
            Some(folder) => {
                let path = folder.join(format!("{name}.{ENDING}"));
                let header =
                    Header::new(&loaded.home, &context, source.clone(), created, (bytes, exact_bytes));
                saved::write(&path, &header, &context).map_err(|error| ApiError::unsaved(&name, &error))?;
                Place::Saved(path, Some((tokens, pin.downgrade())))
            }
        };
        let named = Arc::new(Named {
            name: name.clone(),
            created,
            source,
            kv: context.kv,
            prompt: context.prompt,
            tokens: context.tokens.len(),
            bytes,
            exact_bytes,
            place: Mutex::new(place),
        });
        // Of two that get the same name at a time the later one is there, as its file is.
        self.lock().insert(name, named.clone());
        Ok(named)
    }

    /// Whether a slot can be saved in or restored from a file of this name.
    pub fn check_folder(&self, name: &str) -> Result<(), ApiError> {
        check_name(name).map_err(|_| ApiError::invalid("filename", not_a_name(name)))?;
        match self.folder {
            Some(_) => Ok(()),
            None => {
                Err(ApiError::unsupported("Saving or restoring a slot by a server without --contexts FOLDER"))
            }
        }
    }

    /// Keeps a context under a name, in place of one that may be there.
    pub fn put(&self, loaded: &Loaded, name: String, kept: Kept) -> Result<(), ApiError> {
        let kv = kept.context.kv;
        if !kv.can_be_saved() {
            let message = format!("What is kept as {kv} cannot be saved; exact and layered can.");
            return Err(ApiError::invalid("id", message));
        }
        self.insert(loaded, name, Source::Prompt, kept).map(|_| ())
    }

    fn remove(&self, name: &str) -> Result<(), ApiError> {
        let named = self.get(name, "name")?;
        if let Place::Saved(path, _) = &*named.lock() {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(ApiError::unsaved(name, &error.into()));
                }
                _ => {}
            }
        }
        self.lock().remove(name);
        Ok(())
    }

    /// The context of this name, in memory. Blocks while it is read.
    pub fn hold(&self, loaded: &Loaded, name: &str, param: &str) -> Result<Held, ApiError> {
        let named = self.get(name, param)?;
        let mut place = named.lock();
        let (tokens, pin) = match &mut *place {
            Place::Kept(tokens, pin) => (tokens.clone(), pin.clone()),
            Place::Saved(path, loose) => {
                let known = loose.as_ref().and_then(|(tokens, pin)| Some((tokens.clone(), pin.upgrade()?)));
                let (tokens, pin) = match known {
                    Some(known) => known,
                    None => load(loaded, name, path)?,
                };
                *loose = Some((tokens.clone(), pin.downgrade()));
                (tokens, pin)
            }
        };
        drop(place);
        Ok(Held { named, tokens, pin })
    }
}

/// Reads a context's file, and gives it to the engine.
fn load(loaded: &Loaded, name: &str, path: &std::path::Path) -> Result<(Arc<[u32]>, Pin), ApiError> {
    let start = std::time::Instant::now();
    let (_, context) = saved::read(path, &loaded.home).map_err(|error| ApiError::unreadable(name, &error))?;
    let tokens: Arc<[u32]> = context.tokens.as_slice().into();
    let kept = loaded.service.restore(context);
    let kept = kept.map_err(|refused| ApiError::refused(&refused, 0, "kv.context"))?;
    let kept = kept.map_err(ApiError::no_room)?;
    let milliseconds = start.elapsed().as_secs_f64() * 1e3;
    tracing::info!("context {name}: {} tokens read from its file in {milliseconds:.0} ms", tokens.len());
    Ok((tokens, kept.pin))
}

impl Named {
    fn of_file(name: String, header: Header, path: PathBuf) -> Result<Named, SavedError> {
        Ok(Named {
            name,
            created: header.created,
            source: header.source,
            kv: header.kv.parse().map_err(SavedError::Unusable)?,
            prompt: header.prompt,
            tokens: header.tokens,
            bytes: header.bytes,
            exact_bytes: header.exact_bytes,
            place: Mutex::new(Place::Saved(path, None)),
        })
    }

    /// Bytes allocated for its keys and values.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn card(&self, model: &str) -> ContextCard {
        let (saved, loaded) = match &*self.lock() {
            Place::Kept(..) => (false, true),
            Place::Saved(_, loose) => (true, loose.as_ref().is_some_and(|(_, pin)| pin.upgrade().is_some())),
        };
        ContextCard {
            id: self.name.clone(),
            object: "kv.context",
            created: self.created,
            model: model.to_owned(),
            tokens: self.tokens,
            format: self.kv.to_string(),
            stored_bytes: self.bytes,
            exact_bytes: self.exact_bytes,
            ratio: self.exact_bytes as f64 / self.bytes.max(1) as f64,
            saved,
            loaded,
        }
    }
}
