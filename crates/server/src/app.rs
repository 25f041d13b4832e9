//! What do all requests share? The options, the model once it is loaded, the figures, and whether the server is about to end.

use crate::contexts::Contexts;
use crate::grammar::{GrammarSource, Unusable};
use crate::meters::Meters;
use crate::saved::Home;
use crate::slots::Slots;
use crate::tools::Dialect;
use mosaickv_engine::{Service, Settings};
use mosaickv_kv::KvFormat;
use mosaickv_model::{Model, Text};
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// How a server behaves; fixed when it starts.
#[derive(Debug, Clone)]
pub struct Options {
    /// Names of the model; the first is the one that answers carry. At least one.
    pub names: Vec<String>,
    /// How keys and values are kept where a request says nothing of it.
    pub kv: KvFormat,
    /// Most tokens of prompt and answer, if fewer than the model's context.
    pub most_tokens: Option<usize>,
    /// Tokens of a prompt after which it is compressed, if it has more: the others are read through what is compressed.
    pub most_exact: Option<usize>,
    /// One of these must be sent; empty: none need be.
    pub api_keys: Vec<String>,
    /// Whether GET /metrics needs a key, if anything does.
    pub metrics: Metrics,
    /// What happens to fields that nobody reads.
    pub unknown_fields: UnknownFields,
    /// Bytes of the largest body that is read.
    pub body_limit: usize,
    /// Within which a request's headers must have come, and each piece of its body.
    pub read_timeout: Duration,
    /// Within which an answer must be complete.
    pub request_timeout: Option<Duration>,
    /// That running requests have to end in when the server is to.
    pub shutdown_timeout: Duration,
    /// Between two comments of a stream that has nothing to say.
    pub keep_alive: Duration,
    /// Origins whose web pages may ask; `*` for any.
    pub allow_origins: Vec<String>,
    /// The folder that saved contexts are in; without one they are in memory alone.
    pub contexts: Option<PathBuf>,
}

/// Who may read the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metrics {
    /// Whoever has a key.
    Guarded,
    /// Anybody.
    Open,
}

/// What happens to fields that nobody reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownFields {
    /// They are named in a header of the answer and once in the log.
    Ignored,
    /// The request is refused.
    Refused,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            names: vec!["model".to_owned()],
            kv: KvFormat::Exact,
            most_tokens: None,
            most_exact: None,
            api_keys: vec![],
            metrics: Metrics::Guarded,
            unknown_fields: UnknownFields::Ignored,
            body_limit: 32 << 20,
            read_timeout: Duration::from_secs(30),
            request_timeout: None,
            shutdown_timeout: Duration::from_secs(30),
            keep_alive: Duration::from_secs(10),
            allow_origins: vec![],
            contexts: None,
        }
    }
}

/// A model that answers.
pub struct Loaded {
    /// Its tokenizer and chat template.
    pub text: Text,
    /// What computes.
    pub service: Service,
    /// What the engine was started with.
    pub settings: Settings,
    /// Most tokens of prompt and answer.
    pub context: usize,
    /// Token ids are below it.
    pub vocab: usize,
    /// How it does tools.
    pub dialect: Dialect,
    /// What saved contexts must fit.
    pub home: Home,
    /// What restricts its answers, or why nothing can.
    pub grammars: Result<GrammarSource, Unusable>,
}

/// What all requests share. Clones are the same.
#[derive(Clone)]
pub struct App(Arc<Shared>);

struct Shared {
    options: Options,
    created: u64,
    loaded: OnceLock<Arc<Loaded>>,
    meters: Meters,
    slots: Slots,
    contexts: Contexts,
    /// Requests that a drain waits for.
    running: TaskTracker,
    is_draining: AtomicBool,
    /// Fields that nobody reads and warnings, as far as the log has them.
    noted: Mutex<HashSet<String>>,
}

/// Different warnings that are remembered; after them nothing is logged that a client chose the words of.
const MOST_NOTED: usize = 256;

impl App {
    /// Without a model yet: it answers 503 but where none is needed.
    pub fn new(options: Options) -> App {
        assert!(!options.names.is_empty(), "a model without a name cannot be asked for");
        let meters = Meters::new(&options.names[0]);
        let contexts = Contexts::new(options.contexts.clone());
        App(Arc::new(Shared {
            options,
            created: now(),
            loaded: OnceLock::new(),
            meters,
            slots: Slots::default(),
            contexts,
            running: TaskTracker::new(),
            is_draining: AtomicBool::new(false),
            noted: Mutex::default(),
        }))
    }

    /// From now on this model answers, on `threads` threads. `weights` is a digest of its weights, or whatever else tells its
    /// saved contexts from another model's. A second call changes nothing.
    pub fn load(
        &self,
        (model, weights): (Arc<Model>, String),
        text: Text,
        threads: usize,
        settings: Settings,
    ) {
        self.0.loaded.get_or_init(|| {
            let context = self.0.options.most_tokens.unwrap_or(usize::MAX).min(model.context());
            let vocab = model.config.vocab;
            let home = Home::new(&model, weights, settings.kv_memory);
            self.0.contexts.look(&home);
            let service = Service::start(model, threads, settings);
            let (dialect, grammars) = (Dialect::of(&text), GrammarSource::new(&text));
            if let Err(why) = &grammars {
                tracing::warn!("answers cannot be restricted: {why}");
            }
            Arc::new(Loaded { text, service, settings, context, vocab, dialect, home, grammars })
        });
    }

    /// The options.
    pub fn options(&self) -> &Options {
        &self.0.options
    }

    /// The name that answers carry.
    pub fn name(&self) -> &str {
        &self.0.options.names[0]
    }

    /// When the server began, in seconds of Unix time.
    pub fn created(&self) -> u64 {
        self.0.created
    }

    /// The model, once it is there.
    pub fn loaded(&self) -> Option<&Arc<Loaded>> {
        self.0.loaded.get()
    }

    /// How many of a prompt's tokens are compressed together at most.
    pub(crate) fn most_exact(&self, tokens: usize) -> usize {
        self.0.options.most_exact.unwrap_or(usize::MAX).min(tokens)
    }

    pub(crate) fn meters(&self) -> &Meters {
        &self.0.meters
    }

    pub(crate) fn slots(&self) -> &Slots {
        &self.0.slots
    }

    pub(crate) fn contexts(&self) -> &Contexts {
        &self.0.contexts
    }

    /// While the token lives a drain waits.
    pub(crate) fn begin_request(&self) -> TaskTrackerToken {
        self.0.running.token()
    }

    /// Whether the server is about to end.
    pub fn is_draining(&self) -> bool {
        self.0.is_draining.load(Ordering::SeqCst)
    }

    /// Refuses new requests from now on, and returns when no request runs any more.
    pub async fn drain(&self) {
        self.0.is_draining.store(true, Ordering::SeqCst);
        self.0.running.close();
        self.0.running.wait().await;
    }

    /// Names a field that nobody reads in the log, once.
    pub(crate) fn note_unread(&self, path: &str) {
        if self.is_new(format!("field {path}")) {
            tracing::warn!(
                "the field {path:?} is not known and has no effect; answers name it in x-ignored-params"
            );
        }
    }

    /// A warning that is not the request's own, once.
    pub(crate) fn warn_once(&self, what: &str) {
        if self.is_new(what.to_owned()) {
            tracing::warn!("{what}");
        }
    }

    fn is_new(&self, what: String) -> bool {
        let mut noted = self.0.noted.lock().unwrap_or_else(PoisonError::into_inner);
        noted.len() < MOST_NOTED && noted.insert(what)
    }
}

/// Seconds of Unix time.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
