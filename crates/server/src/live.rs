//! What does the cache look like right now? The figures behind the page, and the mosaic of one cache: how many bits which tokens have
//! in which layer and KV head.

use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::slots::SlotState;
use crate::understand::aside;
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use mosaickv_engine::Look;
use mosaickv_kv::{HeadParts, Order, Part, Parts};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use utoipa::{IntoParams, ToSchema};

/// Bytes of the tokens' text that are told; of longer contexts the end.
const MOST_TEXT: usize = 1 << 20;

/// Parts that are told of a head: of more, neighbours are told together.
const MOST_PARTS: usize = 256;

/// One mosaic is made at a time: it holds pages that the engine might free, and takes a core for some milliseconds.
static MAKING: Semaphore = Semaphore::const_new(1);

/// What the engine does now and has done since it began.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Live {
    /// The model's name.
    pub model: String,
    /// How keys and values are kept unless a request says.
    pub kv_format: String,
    /// Requests with a cache.
    pub running: usize,
    /// Requests without.
    pub waiting: usize,
    /// Most tokens of a request.
    pub context: usize,
    /// Bytes that all caches may take.
    pub budget_bytes: usize,
    /// Bytes that are reserved of them.
    pub reserved_bytes: usize,
    /// Bytes that are allocated.
    pub stored_bytes: usize,
    /// Bytes that the tokens of requests that run would take as f16.
    pub exact_bytes: usize,
    /// Bytes that a token takes as f16.
    pub exact_bytes_per_token: usize,
    /// Bytes of prompts that were read and are kept for others.
    pub prefix_bytes: usize,
    /// Bytes of keys and values that attention has read, of answers that have ended.
    pub read_bytes: u64,
    /// Prompt tokens read.
    pub prompt_tokens: u64,
    /// Tokens sampled.
    pub output_tokens: u64,
    /// Requests that lost their caches.
    pub preemptions: u64,
    /// Requests that were compressed harder to make room.
    pub harder: u64,
    /// What compressed answers had of their exact caches' distributions.
    pub shadows: Vec<ShadowState>,
    /// Answers that run or wait.
    pub requests: Vec<SlotState>,
}

/// What answers in one format had of their exact caches' distributions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ShadowState {
    /// The format.
    pub format: String,
    /// Sampled tokens that were looked at.
    pub steps: u64,
    /// Mean KL divergence in nats.
    pub kl: f64,
    /// Share of the same most probable token.
    pub top1: f64,
}

/// A cache's mosaic.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Mosaic {
    /// How it is kept.
    pub format: String,
    /// Tokens read.
    pub tokens: usize,
    /// How many of them were compressed together.
    pub prompt: usize,
    /// Layers.
    pub layers: usize,
    /// KV heads of each.
    pub kv_heads: usize,
    /// Bytes allocated.
    pub stored_bytes: usize,
    /// Bytes that it would take as f16.
    pub exact_bytes: usize,
    /// In what order parts without a first token are: `importance`, or of `position`.
    pub order: &'static str,
    /// The kinds that parts name by number.
    pub kinds: Vec<String>,
    /// By layer and KV head.
    pub heads: Vec<MosaicHead>,
    /// The tokens' texts; of long contexts those of the newest tokens. None beside one head alone, of answers where others than the asker
    /// may have keys, and of answers with a cache_salt.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub text: Vec<String>,
    /// The first token that `text` has.
    pub text_from: usize,
}

/// A KV head of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct MosaicHead {
    /// Which layer.
    pub layer: usize,
    /// Which KV head.
    pub head: usize,
    /// What its tokens are made of, together all of them.
    pub parts: Vec<MosaicPart>,
}

/// A run of tokens that are kept alike.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct MosaicPart {
    /// Position of the first token, where the order is that of tokens.
    #[schema(required)]
    pub first: Option<usize>,
    /// How many.
    pub tokens: usize,
    /// Bits a scalar.
    pub bits: f32,
    /// Bytes.
    pub bytes: usize,
    /// Which of the mosaic's kinds.
    pub kind: usize,
    /// What compression lost of them, relative, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f32>,
    /// The share of them that a step read, where steps selected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read: Option<f32>,
    /// Positions of its tokens, where parts have no first one: of a head that was asked for, if the server remembers places.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub places: Vec<u32>,
}

/// Which head is asked for.
#[derive(Debug, Clone, Copy, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct WhichHead {
    /// A layer: with `head`, its mosaic alone, and where its tokens are.
    layer: Option<usize>,
    /// A KV head of the layer.
    head: Option<usize>,
}

impl WhichHead {
    fn from(query: Result<Query<WhichHead>, QueryRejection>) -> Result<WhichHead, ApiError> {
        query.map(|Query(which)| which).map_err(|rejection| {
            let says = rejection.body_text();
            ApiError::invalid(if says.contains("head") { "head" } else { "layer" }, says)
        })
    }

    fn is_none(self) -> bool {
        self.layer.is_none() && self.head.is_none()
    }

    /// What was asked for of what is looked at.
    fn of(self, look: &Look) -> Result<Parts, ApiError> {
        let shape = look.cache.shape();
        let missing = |param: &str| {
            let (layers, heads) = (shape.layers, shape.kv_heads);
            let wanted = format!("wanted neither or both of a layer below {layers} and a head below {heads}");
            ApiError::invalid(param, format!("layer {:?}, head {:?}; {wanted}", self.layer, self.head))
        };
        match (self.layer, self.head) {
            (None, None) => Ok(look.cache.parts()),
            (Some(layer), Some(head)) => {
                let wrong = if layer < shape.layers { "head" } else { "layer" };
                look.cache.parts_of_head(layer, head).ok_or_else(|| missing(wrong))
            }
            (Some(_), None) => Err(missing("head")),
            (None, Some(_)) => Err(missing("layer")),
        }
    }
}

/// What the engine does right now.
#[utoipa::path(get, path = "/v1/kv/live", responses(
    (status = 200, description = "The figures", body = Live),
    (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
))]
pub async fn live(State(app): State<App>) -> Result<Json<Live>, ApiError> {
    let loaded = app.loaded().ok_or_else(ApiError::loading)?;
    let figures = loaded.service.figures();
    let slots = app.slots().list(0, loaded.context);
    let shadows = figures.shadowed.iter().map(|(kv, shadowed)| ShadowState {
        format: kv.to_string(),
        steps: shadowed.steps,
        kl: shadowed.kl / shadowed.steps as f64,
        top1: shadowed.agreed as f64 / shadowed.steps as f64,
    });
    Ok(Json(Live {
        model: app.name().to_owned(),
        kv_format: app.options().kv.to_string(),
        running: figures.running,
        waiting: figures.waiting,
        context: loaded.context,
        budget_bytes: figures.kv_budget,
        reserved_bytes: figures.kv_reserved,
        stored_bytes: figures.kv_allocated,
        exact_bytes: figures.kv_exact,
        exact_bytes_per_token: loaded.home.shape.exact_bytes(1),
        prefix_bytes: figures.kv_prefixes,
        read_bytes: figures.kv_read,
        prompt_tokens: figures.prompt_tokens,
        output_tokens: figures.output_tokens,
        preemptions: figures.preemptions,
        harder: figures.harder,
        shadows: shadows.collect(),
        requests: slots.into_iter().filter(|slot| slot.is_processing).collect(),
    }))
}

/// The mosaic of an answer that runs, by its `id_task` in /slots.
#[utoipa::path(get, path = "/v1/kv/mosaic/{task}",
    params(("task" = u64, Path, description = "The answer's id_task"), WhichHead),
    responses(
        (status = 200, description = "The mosaic", body = Mosaic),
        (status = "4XX", description = "No such answer runs, or its prompt is being compressed", body = ErrorBody),
        (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
    ))]
pub async fn mosaic(
    State(app): State<App>,
    Path(task): Path<String>,
    which: Result<Query<WhichHead>, QueryRejection>,
) -> Result<Json<Mosaic>, ApiError> {
    let loaded = app.ready()?.clone();
    let missing = || ApiError::not_found(&format!("/v1/kv/mosaic/{task}"));
    let tag: u64 = task.parse().map_err(|_| missing())?;
    let which = WhichHead::from(which)?;
    let is_alone = app.options().api_keys.len() < 2;
    let _turn = MAKING.acquire().await;
    let made = aside(move || {
        let look = loaded.service.look(tag).map_err(|refused| ApiError::refused(&refused, 0, "task"))?;
        let Some(look) = look else { return Ok(None) };
        let mosaic = mosaic_of(&look, which.of(&look)?);
        let is_told = which.is_none() && is_alone && look.salt.is_none();
        Ok(Some(if is_told { spelt(&loaded, mosaic, &look.tokens) } else { mosaic }))
    });
    made.await?.map(Json).ok_or_else(missing)
}

/// The mosaic of a context that was read once, to be asked many times. One that is in its file alone is loaded for this, in place of
/// prefixes that nobody needs if there are no bytes left.
#[utoipa::path(get, path = "/v1/kv/contexts/{name}/mosaic",
    params(("name" = String, Path, description = "The context's name"), WhichHead),
    responses(
        (status = 200, description = "The mosaic", body = Mosaic),
        (status = "4XX", description = "There is no such context", body = ErrorBody),
        (status = "5XX", description = "Its file cannot be used, or a server that cannot answer now", body = ErrorBody),
    ))]
pub async fn mosaic_of_context(
    State(app): State<App>,
    Path(name): Path<String>,
    which: Result<Query<WhichHead>, QueryRejection>,
) -> Result<Json<Mosaic>, ApiError> {
    let loaded = app.ready()?.clone();
    let which = WhichHead::from(which)?;
    let (name, held) = aside({
        let (app, loaded) = (app.clone(), loaded.clone());
        move || app.contexts().hold(&loaded, &name, "name").map(|held| (name, held))
    })
    .await?;
    let _turn = MAKING.acquire().await;
    let made = aside(move || {
        let away = || ApiError::no_context(&name, "name");
        let (kv, prompt) = (held.named.kv, held.named.prompt);
        let found = loaded.service.find(kv, held.tokens.to_vec(), prompt);
        let kept = found.map_err(|refused| ApiError::refused(&refused, 0, "name"))?.ok_or_else(away)?;
        let look = Look { kv, tokens: kept.context.tokens, prompt, salt: None, cache: kept.context.cache };
        let mosaic = mosaic_of(&look, which.of(&look)?);
        Ok(if which.is_none() { spelt(&loaded, mosaic, &look.tokens) } else { mosaic })
    });
    made.await.map(Json)
}

/// The mosaic with the tokens' texts.
fn spelt(loaded: &crate::app::Loaded, mosaic: Mosaic, tokens: &[u32]) -> Mosaic {
    let read = &tokens[..mosaic.tokens.min(tokens.len())];
    let mut left = MOST_TEXT;
    let mut text: Vec<String> = read
        .iter()
        .rev()
        .map_while(|&id| {
            let piece = loaded.text.token_bytes(id).unwrap_or_default();
            left = left.checked_sub(piece.len())?;
            Some(String::from_utf8_lossy(&piece).into_owned())
        })
        .collect();
    text.reverse();
    Mosaic { text_from: read.len() - text.len(), text, ..mosaic }
}

fn mosaic_of(look: &Look, parts: Parts) -> Mosaic {
    let (cache, shape) = (&look.cache, look.cache.shape());
    let of_head = |head: HeadParts| MosaicHead {
        layer: head.layer,
        head: head.head,
        parts: few(head.parts.into_iter().map(MosaicPart::from).collect()),
    };
    Mosaic {
        format: if cache.is_compressed() { cache.format() } else { look.kv }.to_string(),
        tokens: cache.tokens(),
        prompt: look.prompt.min(cache.tokens()),
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        stored_bytes: cache.bytes().total(),
        exact_bytes: shape.exact_bytes(cache.tokens()),
        order: match parts.order {
            Order::Importance => "importance",
            Order::Position => "position",
        },
        kinds: parts.kinds,
        heads: parts.heads.into_iter().map(of_head).collect(),
        text: vec![],
        text_from: 0,
    }
}

impl From<Part> for MosaicPart {
    fn from(part: Part) -> MosaicPart {
        let Part { first, tokens, bits, bytes, kind, loss, read, places } = part;
        MosaicPart { first, tokens, bits, bytes, kind, loss, read, places }
    }
}

/// At most [`MOST_PARTS`] parts: of more, as many neighbours as need be are one, of the first one's kind.
fn few(parts: Vec<MosaicPart>) -> Vec<MosaicPart> {
    let together = parts.len().div_ceil(MOST_PARTS).max(1);
    let joined = parts.chunks(together).map(|parts| {
        let sum = |of: fn(&MosaicPart) -> usize| parts.iter().map(of).sum::<usize>();
        let (tokens, bytes) = (sum(|part| part.tokens), sum(|part| part.bytes));
        let mean = |of: fn(&MosaicPart) -> Option<f32>| {
            let known = parts.iter().filter_map(|part| Some((of(part)?, part.tokens as f32)));
            let (sum, tokens) = known.fold((0.0, 0.0), |all, (x, n)| (all.0 + x * n, all.1 + n));
            (tokens > 0.0).then_some(sum / tokens)
        };
        let mut places: Vec<u32> = parts.iter().flat_map(|part| part.places.iter().copied()).collect();
        places.sort_unstable();
        MosaicPart {
            tokens,
            bytes,
            bits: mean(|part| Some(part.bits)).unwrap_or(0.0),
            read: mean(|part| part.read),
            places,
            ..parts[0]
        }
    });
    joined.collect()
}
