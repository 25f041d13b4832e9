//! What does the cache look like right now? The figures behind the page, and the mosaic of one cache: how many bits which tokens have
//! in which layer and KV head.

use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::slots::SlotState;
use crate::understand::aside;
use axum::Json;
use axum::extract::{Path, State};
use mosaickv_engine::Look;
use mosaickv_kv::{HeadInfo, KvCache, KvFormat, PageInfo, SegmentInfo};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use tokio::sync::Semaphore;
use utoipa::ToSchema;

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
    /// The tokens' texts; of long contexts those of the newest tokens. None where others than the asker may have keys, or of answers with
    /// a cache_salt.
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
    params(("task" = u64, Path, description = "The answer's id_task")),
    responses(
        (status = 200, description = "The mosaic", body = Mosaic),
        (status = "4XX", description = "No such answer runs, or its prompt is being compressed", body = ErrorBody),
        (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
    ))]
pub async fn mosaic(State(app): State<App>, Path(task): Path<String>) -> Result<Json<Mosaic>, ApiError> {
    let loaded = app.ready()?.clone();
    let missing = || ApiError::not_found(&format!("/v1/kv/mosaic/{task}"));
    let tag: u64 = task.parse().map_err(|_| missing())?;
    let is_alone = app.options().api_keys.len() < 2;
    let _turn = MAKING.acquire().await;
    let made = aside(move || {
        let look = loaded.service.look(tag).map_err(|refused| ApiError::refused(&refused, 0, "task"))?;
        Ok(look.map(|look| {
            let mosaic = mosaic_of(&look);
            if is_alone && look.salt.is_none() { spelt(&loaded, mosaic, &look.tokens) } else { mosaic }
        }))
    });
    made.await?.map(Json).ok_or_else(missing)
}

/// The mosaic of a context that was read once, to be asked many times. One that is in its file alone is not read for this.
#[utoipa::path(get, path = "/v1/kv/contexts/{name}/mosaic",
    params(("name" = String, Path, description = "The context's name")),
    responses(
        (status = 200, description = "The mosaic", body = Mosaic),
        (status = "4XX", description = "There is no such context, or it is not in memory", body = ErrorBody),
        (status = "5XX", description = "A server that cannot answer now", body = ErrorBody),
    ))]
pub async fn mosaic_of_context(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Mosaic>, ApiError> {
    let loaded = app.ready()?.clone();
    let _turn = MAKING.acquire().await;
    let made = aside(move || {
        let away = || ApiError::no_context(&name, "name");
        let held = app.contexts().in_memory(&name, "name")?.ok_or_else(away)?;
        let (kv, prompt) = (held.named.kv, held.named.prompt);
        let found = loaded.service.find(kv, held.tokens.to_vec(), prompt);
        let kept = found.map_err(|refused| ApiError::refused(&refused, 0, "name"))?.ok_or_else(away)?;
        let look = Look { kv, tokens: kept.context.tokens, prompt, salt: None, cache: kept.context.cache };
        Ok(spelt(&loaded, mosaic_of(&look), &look.tokens))
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

fn mosaic_of(look: &Look) -> Mosaic {
    let (cache, shape) = (&look.cache, look.cache.shape());
    let mut kinds = Kinds::default();
    let heads = match look.kv {
        KvFormat::Packed(_) if cache.is_compressed() => packed(cache, &mut kinds),
        KvFormat::Layered(_) if cache.is_compressed() => layered(cache, &mut kinds),
        kv => alike(cache, kv, &mut kinds),
    };
    let is_layered = matches!(look.kv, KvFormat::Layered(_)) && cache.is_compressed();
    Mosaic {
        format: if cache.is_compressed() { cache.format() } else { look.kv }.to_string(),
        tokens: cache.tokens(),
        prompt: look.prompt.min(cache.tokens()),
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        stored_bytes: cache.bytes().total(),
        exact_bytes: shape.exact_bytes(cache.tokens()),
        order: if is_layered { "importance" } else { "position" },
        kinds: kinds.names,
        heads: heads.into_iter().map(|head| MosaicHead { parts: few(head.parts), ..head }).collect(),
        text: vec![],
        text_from: 0,
    }
}

/// Names of strategies, each once.
#[derive(Default)]
struct Kinds {
    names: Vec<String>,
    numbers: HashMap<String, usize>,
}

impl Kinds {
    fn number(&mut self, name: String) -> usize {
        *self.numbers.entry(name).or_insert_with_key(|name| {
            self.names.push(name.clone());
            self.names.len() - 1
        })
    }
}

/// At most [`MOST_PARTS`] parts: of more, as many neighbours as need be are one, of the first one's kind.
fn few(parts: Vec<MosaicPart>) -> Vec<MosaicPart> {
    let together = parts.len().div_ceil(MOST_PARTS).max(1);
    let joined = parts.chunks(together).map(|parts| {
        let sum = |of: fn(&MosaicPart) -> usize| parts.iter().map(of).sum::<usize>();
        let (tokens, bytes) = (sum(|part| part.tokens), sum(|part| part.bytes));
        let bits =
            parts.iter().map(|part| part.bits * part.tokens as f32).sum::<f32>() / tokens.max(1) as f32;
        MosaicPart { tokens, bytes, bits, ..parts[0].clone() }
    });
    joined.collect()
}

/// All tokens of all heads in one way.
fn alike(cache: &KvCache, kv: KvFormat, kinds: &mut Kinds) -> Vec<MosaicHead> {
    let (shape, tokens) = (cache.shape(), cache.tokens());
    let heads = shape.layers * shape.kv_heads;
    let bytes = cache.bytes().total() / heads;
    let kind = kinds.number(if cache.is_compressed() { kv.name().to_owned() } else { "exact".to_owned() });
    let bits = bits_of(bytes, tokens * shape.head_dim);
    let part = MosaicPart { first: Some(0), tokens, bits, bytes, kind, loss: None };
    let head =
        |i| MosaicHead { layer: i / shape.kv_heads, head: i % shape.kv_heads, parts: vec![part.clone()] };
    (0..heads).map(head).collect()
}

fn packed(cache: &KvCache, kinds: &mut Kinds) -> Vec<MosaicHead> {
    let (shape, all) = (cache.shape(), cache.tokens());
    let d = shape.head_dim;
    let head = |i| MosaicHead { layer: i / shape.kv_heads, head: i % shape.kv_heads, parts: vec![] };
    let mut heads: Vec<MosaicHead> = (0..shape.layers * shape.kv_heads).map(head).collect();
    let exact = |first: usize, tokens: usize, kinds: &mut Kinds| MosaicPart {
        first: Some(first),
        tokens,
        bits: 16.0,
        bytes: tokens * 4 * d,
        kind: kinds.number("exact".to_owned()),
        loss: None,
    };
    for segment in cache.segments() {
        let SegmentInfo { layer, head, first, tokens, kept, group, block, loss, bytes, temporary, .. } =
            segment;
        let waits = if temporary { ", waits for its own strategy" } else { "" };
        let name = format!("{kept} of {d} elements in groups of {group}, blocks of {block}{waits}");
        let (kind, bits) = (kinds.number(name), bits_of(bytes, tokens * d));
        let parts = &mut heads[layer * shape.kv_heads + head].parts;
        if parts.is_empty() && first > 0 {
            parts.push(exact(0, first, kinds));
        }
        parts.push(MosaicPart { first: Some(first), tokens, bits, bytes, kind, loss: Some(loss) });
    }
    for head in &mut heads {
        // A layer with a sliding window has forgotten the others.
        let seen = shape.window_of(head.layer).map_or(all, |window| window.min(all));
        if seen < all {
            let kind = kinds.number("out of the layer's window".to_owned());
            let (first, tokens) = (Some(0), all - seen);
            head.parts.push(MosaicPart { first, tokens, bits: 0.0, bytes: 0, kind, loss: None });
        }
        let packed: usize = head.parts.iter().map(|part| part.tokens).sum();
        if packed < all {
            head.parts.push(exact(packed, all - packed, kinds));
        }
    }
    heads
}

fn layered(cache: &KvCache, kinds: &mut Kinds) -> Vec<MosaicHead> {
    let d = cache.shape().head_dim;
    let of_head = |info: HeadInfo| {
        let loss = info.distortion.into_iter().fold(0.0, f32::max);
        let mut parts: Vec<MosaicPart> = vec![];
        let mut push = |part: MosaicPart| match parts.last_mut().filter(|last| last.kind == part.kind) {
            Some(last) => {
                last.tokens += part.tokens;
                last.bytes += part.bytes;
            }
            None => parts.push(part),
        };
        let exact = |kinds: &mut Kinds, name: &str, tokens: usize| MosaicPart {
            first: None,
            tokens,
            bits: 16.0,
            bytes: tokens * 4 * d,
            kind: kinds.number(name.to_owned()),
            loss: None,
        };
        push(exact(kinds, "first tokens, exact", info.sinks));
        info.prompt.iter().for_each(|page| push(of_page(page, (d, "prompt", loss), kinds)));
        if info.dropped > 0 {
            let kind = kinds.number("dropped from this head".to_owned());
            push(MosaicPart { first: None, tokens: info.dropped, bits: 0.0, bytes: 0, kind, loss: None });
        }
        info.tail.iter().for_each(|page| push(of_page(page, (d, "newest", loss), kinds)));
        if info.buffer > 0 {
            push(exact(kinds, "update buffer, exact", info.buffer));
        }
        MosaicHead { layer: info.layer, head: info.head, parts }
    };
    cache.layered_heads().into_iter().map(of_head).collect()
}

fn of_page(page: &PageInfo, (d, place, loss): (usize, &str, f32), kinds: &mut Kinds) -> MosaicPart {
    let spelt = |[eight, four, two]: [usize; 3]| format!("{eight}/{four}/{two}");
    let (keys, values) = (spelt(page.keys.channels), spelt(page.values.channels));
    let kind = kinds.number(format!("{place}: channels of 8/4/2 bits: keys {keys}, values {values}"));
    let bits = (page.keys.bits() + page.values.bits()) as f32 / (2 * d) as f32;
    MosaicPart { first: None, tokens: page.tokens, bits, bytes: page.bytes, kind, loss: Some(loss) }
}

/// Bits a scalar, where keys and values of so many scalars each take so many bytes.
fn bits_of(bytes: usize, scalars: usize) -> f32 {
    bytes as f32 * 8.0 / (2 * scalars).max(1) as f32
}
