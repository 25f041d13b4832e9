//! Which prompts have been read before? Their caches are kept as long as there are bytes, and who begins with the same tokens goes on
//! from a clone, which shares the pages.
//!
//! How a prompt is compressed depends on all of it. So requests share a prefix only if their prompts, up to where they are
//! compressed, are the same; what follows may differ, and an ended request's cache serves whoever goes on from all of its
//! tokens. A request that finds its prefix gets to the bit what it would get without.

use crate::memory::{Memory, Reservation};
use crate::{Compute, Context, Kept, Pin};
use mosaickv_kv::KvFormat;
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;

/// Prompts of fewer tokens are not kept: they are read as soon as found.
pub(crate) const LEAST_TOKENS: usize = 256;

/// A sequence that others may go on from.
pub(crate) struct Prefix<S> {
    pub(crate) kv: KvFormat,
    /// Who shares it: requests with the same.
    pub(crate) salt: Option<Arc<str>>,
    /// All that it has read.
    pub(crate) tokens: Vec<u32>,
    /// The first of them that were compressed together.
    pub(crate) prompt: usize,
    pub(crate) sequence: S,
    /// What follows its last token, `[vocab]`, if that was computed.
    pub(crate) logits: Option<Vec<f32>>,
    /// What it is a clone of, whose bytes are not counted again.
    pub(crate) base: Option<Rc<Prefix<S>>>,
    /// Of it and of nothing else.
    pub(crate) bytes: usize,
    pub(crate) reservation: Reservation,
    /// Others hold clones as long as it must stay.
    pub(crate) pin: Pin,
    /// When it was last gone on from.
    pub(crate) used: Cell<u64>,
}

impl<S> Prefix<S> {
    /// Of it and of what it is a clone of.
    pub(crate) fn whole_bytes(&self) -> usize {
        self.bytes + self.base.as_ref().map_or(0, |base| base.whole_bytes())
    }

    /// For somebody outside of the engine, as long as whom it stays.
    pub(crate) fn kept<C: Compute<Sequence = S>>(&self, compute: &C) -> Kept {
        let context = Context {
            kv: self.kv,
            tokens: self.tokens.clone(),
            prompt: self.prompt,
            logits: self.logits.clone(),
            cache: compute.cache(&self.sequence),
        };
        let exact_bytes = compute.exact_bytes(self.tokens.len());
        Kept { context, bytes: compute.bytes(&self.sequence, None), exact_bytes, pin: self.pin.clone() }
    }
}

/// A prefix to go on from.
pub(crate) struct Found<S> {
    pub(crate) base: Rc<Prefix<S>>,
    /// A clone of its sequence.
    pub(crate) sequence: S,
}

/// Bytes of what follows a prefix.
pub(crate) fn bytes_of_logits(logits: Option<&Vec<f32>>) -> usize {
    logits.map_or(0, |logits| size_of_val(&**logits))
}

/// All of them, by what was compressed together.
pub(crate) struct Prefixes<S> {
    by_prompt: HashMap<u64, Vec<Rc<Prefix<S>>>>,
    clock: u64,
}

impl<S> Default for Prefixes<S> {
    fn default() -> Prefixes<S> {
        Prefixes { by_prompt: HashMap::new(), clock: 0 }
    }
}

/// What is looked for.
#[derive(Clone, Copy)]
pub(crate) struct Which<'a> {
    pub(crate) kv: KvFormat,
    pub(crate) salt: Option<&'a str>,
    /// What it must begin.
    pub(crate) tokens: &'a [u32],
    /// Of how many of them the prompt must be.
    pub(crate) prompt: usize,
}

impl Which<'_> {
    fn key(self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.kv.to_string(), self.salt, &self.tokens[..self.prompt]).hash(&mut hasher);
        hasher.finish()
    }
}

impl<S> Prefix<S> {
    /// Whether whoever asks is the only one who needs it and what it is made of.
    pub(crate) fn is_only_here(prefix: &Rc<Prefix<S>>) -> bool {
        // One is among all of them, and one with whoever asks.
        Rc::strong_count(prefix) == 2 && prefix.pin.is_alone() && prefix.base.is_none()
    }

    fn which(&self) -> Which<'_> {
        Which { kv: self.kv, salt: self.salt.as_deref(), tokens: &self.tokens, prompt: self.prompt }
    }
}

impl<S> Prefixes<S> {
    /// The longest one that `serves`.
    pub(crate) fn find(
        &mut self,
        wanted: Which,
        serves: impl Fn(&Prefix<S>) -> bool,
    ) -> Option<Rc<Prefix<S>>> {
        let Which { kv, salt, tokens, prompt } = wanted;
        let known = self.by_prompt.get(&wanted.key())?;
        let fits = |prefix: &&Rc<Prefix<S>>| {
            let is_alike = (prefix.kv, prefix.salt.as_deref(), prefix.prompt) == (kv, salt, prompt);
            is_alike && tokens.starts_with(&prefix.tokens) && serves(prefix)
        };
        let longest = known.iter().filter(fits).max_by_key(|prefix| prefix.tokens.len())?;
        self.clock += 1;
        longest.used.set(self.clock);
        Some(longest.clone())
    }

    /// The one with just these tokens, and with logits if those are needed.
    pub(crate) fn same(&mut self, wanted: Which, has_logits: bool) -> Option<Rc<Prefix<S>>> {
        self.find(wanted, |other| {
            other.tokens.len() == wanted.tokens.len() && (other.logits.is_some() || !has_logits)
        })
    }

    /// Takes one in, which was just used; if the same one is there already, its bytes are free again.
    pub(crate) fn insert(&mut self, memory: &mut Memory, prefix: Prefix<S>) -> Rc<Prefix<S>> {
        if let Some(same) = self.same(prefix.which(), prefix.logits.is_some()) {
            memory.release(prefix.reservation);
            return same;
        }
        self.clock += 1;
        prefix.used.set(self.clock);
        let prefix = Rc::new(prefix);
        let key = prefix.which().key();
        self.by_prompt.entry(key).or_default().push(prefix.clone());
        prefix
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Rc<Prefix<S>>> {
        self.by_prompt.values().flatten()
    }

    /// Bytes that can be had by dropping those that neither `held` ones nor anybody outside needs.
    pub(crate) fn droppable<'s>(&'s self, held: impl Iterator<Item = &'s Rc<Prefix<S>>>) -> usize {
        let pinned = self.all().filter(|prefix| !prefix.pin.is_alone());
        let mut needed = HashSet::new();
        for prefix in held.chain(pinned) {
            let mut next = Some(prefix);
            while let Some(prefix) = next {
                needed.insert(Rc::as_ptr(prefix));
                next = prefix.base.as_ref();
            }
        }
        self.all().filter(|prefix| !needed.contains(&Rc::as_ptr(prefix))).map(|prefix| prefix.bytes).sum()
    }

    /// `bytes`, if need be in place of prefixes that nobody needs.
    pub(crate) fn reserve(&mut self, memory: &mut Memory, bytes: usize) -> Option<Reservation> {
        loop {
            match memory.reserve(bytes) {
                None if self.drop_one(memory) => {}
                reservation => return reservation,
            }
        }
    }

    /// Takes one out that [nobody else needs](Prefix::is_only_here), or gives it back.
    pub(crate) fn take(&mut self, prefix: Rc<Prefix<S>>) -> Result<Prefix<S>, Rc<Prefix<S>>> {
        if !Prefix::is_only_here(&prefix) {
            return Err(prefix);
        }
        self.remove(&prefix);
        Rc::try_unwrap(prefix)
    }

    fn remove(&mut self, prefix: &Rc<Prefix<S>>) {
        let key = prefix.which().key();
        if let Some(all) = self.by_prompt.get_mut(&key) {
            all.retain(|other| !Rc::ptr_eq(prefix, other));
            if all.is_empty() {
                self.by_prompt.remove(&key);
            }
        }
    }

    /// Drops the one that was not used for longest, of those that nobody needs; `false` if there is none.
    pub(crate) fn drop_one(&mut self, memory: &mut Memory) -> bool {
        let is_free = |prefix: &&Rc<Prefix<S>>| Rc::strong_count(prefix) == 1 && prefix.pin.is_alone();
        let Some(oldest) = self.all().filter(is_free).min_by_key(|prefix| prefix.used.get()).cloned() else {
            return false;
        };
        self.remove(&oldest);
        let oldest = Rc::into_inner(oldest).expect("nobody else has it");
        memory.release(oldest.reservation);
        true
    }
}
