//! What is being answered right now? The list behind GET /slots.

use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use utoipa::ToSchema;

/// All answers that run or wait.
#[derive(Default)]
pub struct Slots {
    answers: Arc<Mutex<BTreeMap<u64, Answer>>>,
    next: AtomicU64,
}

struct Answer {
    request: String,
    prompt_tokens: usize,
    kv: String,
    sampled: Arc<AtomicUsize>,
}

/// An answer's place in the list, which it leaves when this is dropped.
pub struct Slot {
    id: u64,
    sampled: Arc<AtomicUsize>,
    answers: Arc<Mutex<BTreeMap<u64, Answer>>>,
}

/// A slot as llama-server shows it, with what is ours.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
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

impl Slots {
    /// A place for an answer to a prompt of so many tokens.
    pub fn enter(&self, request: &str, prompt_tokens: usize, kv: String) -> Slot {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let sampled = Arc::new(AtomicUsize::new(0));
        let answer = Answer { request: request.to_owned(), prompt_tokens, kv, sampled: sampled.clone() };
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).insert(id, answer);
        Slot { id, sampled, answers: self.answers.clone() }
    }

    /// At least `least` slots; those without an answer come last.
    pub fn list(&self, least: usize, context: usize) -> Vec<SlotState> {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = answers.iter().map(|(id, answer)| SlotState {
            is_processing: true,
            id_task: Some(*id),
            request_id: Some(answer.request.clone()),
            n_prompt_tokens: answer.prompt_tokens,
            n_decoded: answer.sampled.load(Ordering::Relaxed),
            kv_format: Some(answer.kv.clone()),
            ..SlotState::default()
        });
        let mut slots: Vec<SlotState> = busy.collect();
        slots.resize_with(slots.len().max(least), SlotState::default);
        for (id, slot) in slots.iter_mut().enumerate() {
            (slot.id, slot.n_ctx) = (id, context);
        }
        slots
    }
}

impl Slot {
    /// One more token was answered.
    pub fn count(&self) {
        self.sampled.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}
