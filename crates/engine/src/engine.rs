//! The step: who has ended, who begins, who needs bytes, who reads, what came of it.

use crate::memory::{Memory, Reservation};
use crate::prefix::{self, Found, Prefix, Prefixes, Which};
use crate::request::{Active, Farewell, Heard, Parted, Running};
use crate::schedule::{Lag, Turn, schedule};
use crate::shadow;
use crate::{Compute, Context, End, Event, Figures, Kept, Look, Pin, Reading, Request};
use mosaickv_kv::KvFormat;
use mosaickv_model::Part;
use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Tokens after which it is looked at again how many bytes a sequence takes.
pub(crate) const MEASURED_EVERY: usize = 16;

/// How long it is waited before it is looked again whether a prompt is compressed, and whether somebody asks for something.
const MOMENT: Duration = Duration::from_millis(1);

/// What an engine may use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Bytes that all caches may take together.
    pub kv_memory: usize,
    /// Requests that have a cache at a time.
    pub most_sequences: usize,
    /// Tokens that a pass reads, about: steps are never held back, and at least one prompt goes on.
    pub tokens_per_step: usize,
    /// Requests that wait at a time; further ones are refused.
    pub most_waiting: usize,
    /// What becomes of prompts that were read.
    pub prefix_cache: PrefixCache,
    /// Of one request in so many the first sampled tokens are held against the exact cache, which takes its bytes that long; `None`: of
    /// none.
    pub shadow_every: Option<NonZeroU64>,
    /// To what ratio requests that run may be compressed harder where bytes run out; `None`: none is.
    pub floor: Option<f32>,
    /// Whether caches in the layered format remember which tokens are in which pages: see [`KvCache::remember_places`](mosaickv_kv::KvCache::remember_places).
    pub remember_places: bool,
}

/// What becomes of prompts that were read, and of what followed them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixCache {
    /// They are kept as long as nobody needs the bytes, for requests that begin with the same tokens.
    On,
    /// They are forgotten, but for those that are to be kept.
    Off,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            kv_memory: 4 << 30,
            most_sequences: 64,
            tokens_per_step: 512,
            most_waiting: 512,
            prefix_cache: PrefixCache::On,
            floor: None,
            remember_places: false,
            shadow_every: None,
        }
    }
}

/// How a request begins.
enum Start<S> {
    /// Where others have come to.
    After(Found<S>),
    /// With its prompt.
    Alone,
    /// With its prompt, and an exact cache beside the compressed one.
    Watched,
}

/// Requests, and the bytes that they share.
pub struct Engine<C: Compute> {
    compute: C,
    settings: Settings,
    memory: Memory,
    /// In the order in which they are to begin.
    waiting: Vec<Active>,
    /// In the order in which they began.
    running: Vec<Running<C::Sequence>>,
    prefixes: Prefixes<C::Sequence>,
    /// Whose requests have ended while their prompts were being compressed.
    parted: Vec<Parted<C::Sequence>>,
    submitted: u64,
    /// Of requests that have ended in this step.
    farewells: Vec<Farewell>,
    /// What has been done so far; the rest is filled in when asked.
    done: Figures,
    /// For others to see: as of the last step.
    published: Arc<Mutex<Figures>>,
}

impl<C: Compute> Engine<C> {
    /// Without requests. `published` gets the figures after each step, before those whose requests have ended hear of it.
    pub fn new(compute: C, settings: Settings, published: Arc<Mutex<Figures>>) -> Engine<C> {
        let engine = Engine {
            compute,
            settings,
            memory: Memory::new(settings.kv_memory),
            waiting: vec![],
            running: vec![],
            prefixes: Prefixes::default(),
            parted: vec![],
            submitted: 0,
            farewells: vec![],
            done: Figures::default(),
            published,
        };
        engine.publish();
        engine
    }

    /// Takes a request, which [`Service::submit`](crate::Service::submit) would not refuse. `emit` gets its events; once `cancelled` is set, the next
    /// step ends it.
    pub fn submit(
        &mut self,
        request: Request,
        emit: Box<dyn FnMut(Event) + Send>,
        cancelled: Arc<AtomicBool>,
    ) {
        self.submitted += 1;
        let order = (Reverse(request.priority), self.submitted);
        self.wait(Active::new(request, order, emit, cancelled));
    }

    /// One pass, and what must be decided before and after it. `false` if there was nothing to do.
    pub fn step(&mut self) -> bool {
        self.end_cancelled();
        self.take_compressed();
        self.make_room();
        self.admit();
        let lags: Vec<Lag> = self.running.iter().map(Running::lag).collect();
        let turns = schedule(&lags, self.settings.tokens_per_step);
        let is_busy = if turns.is_empty() {
            self.wait_a_little()
        } else {
            let heard = self.read(&turns);
            self.settle(&turns, heard);
            true
        };
        self.say_farewells();
        is_busy
    }

    /// Publishes the figures, and then tells those whose requests have ended.
    fn say_farewells(&mut self) {
        self.done.kv_read += self.farewells.iter().map(|farewell| farewell.read).sum::<u64>();
        self.publish();
        self.farewells.drain(..).for_each(Farewell::say);
    }

    fn publish(&self) {
        *self.published.lock().unwrap_or_else(PoisonError::into_inner) = self.figures();
    }

    /// Whether no request is left.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.parted.is_empty()
    }

    /// Ends all requests, and forgets what they have read.
    pub fn stop(&mut self) {
        while !self.running.is_empty() {
            self.end(self.running.len() - 1, End::Shutdown);
        }
        while !self.parted.is_empty() {
            self.release_parted(self.parted.len() - 1);
        }
        self.farewells.extend(self.waiting.drain(..).map(|active| active.end(End::Shutdown)));
        while self.prefixes.drop_one(&mut self.memory) {}
        self.say_farewells();
    }

    /// What is going on.
    pub fn figures(&self) -> Figures {
        let sum = |of: &dyn Fn(&Running<C::Sequence>) -> usize| self.running.iter().map(of).sum::<usize>();
        let kv_prefixes = self.prefixes.all().map(|prefix| prefix.bytes).sum();
        let mut kv_by_format = BTreeMap::new();
        let running = self.running.iter().map(|running| (running.active.kv, running.bytes));
        for (kv, bytes) in running.chain(self.prefixes.all().map(|prefix| (prefix.kv, prefix.bytes))) {
            *kv_by_format.entry(kv.name()).or_default() += bytes;
        }
        Figures {
            running: self.running.len(),
            compressing: self.running.iter().filter(|running| running.compressing.is_some()).count(),
            waiting: self.waiting.len(),
            kv_budget: self.memory.budget(),
            kv_reserved: self.memory.reserved(),
            kv_allocated: sum(&|running| running.bytes) + kv_prefixes,
            prefixes: self.prefixes.all().count(),
            kv_prefixes,
            kv_droppable: self.droppable(),
            kv_exact: sum(&|running| self.compute.exact_bytes(running.read)),
            kv_by_format,
            ..self.done.clone()
        }
    }

    /// Puts a request where its turn is.
    fn wait(&mut self, active: Active) {
        let place = self.waiting.partition_point(|other| other.order < active.order);
        self.waiting.insert(place, active);
    }

    fn end_cancelled(&mut self) {
        let is_cancelled = |active: &Active| active.cancelled.load(Ordering::Relaxed);
        for active in self.waiting.extract_if(.., |active| is_cancelled(active)) {
            self.farewells.push(active.end(End::Cancelled));
        }
        while let Some(i) = self.running.iter().position(|running| is_cancelled(&running.active)) {
            self.end(i, End::Cancelled);
        }
    }

    fn end(&mut self, index: usize, end: End) {
        let running = self.running.remove(index);
        if running.compressing.is_some() {
            let (farewell, parted) = running.part(end);
            self.farewells.push(farewell);
            self.parted.push(parted);
            return;
        }
        let keeps = self.settings.prefix_cache == PrefixCache::On || running.active.keep.is_some();
        let prefixes = keeps.then_some(&mut self.prefixes);
        self.farewells.push(running.end(&self.compute, &mut self.memory, prefixes, end));
    }

    /// Waits for the thread that is at work on it, and gives its bytes back.
    fn release_parted(&mut self, index: usize) {
        let Parted { mut sequence, reservation } = self.parted.swap_remove(index);
        self.compute.compress(&mut sequence);
        drop(sequence);
        self.memory.release(reservation);
    }

    /// Lets requests begin, in their order, as long as there are bytes for the next one's whole prompt, and for it and those that run to go
    /// on for a while; what it goes on from is not free. Where there are not, those that run are compressed harder, if that is allowed and enough; else it waits.
    fn admit(&mut self) {
        while self.running.len() < self.settings.most_sequences
            && let Some(next) = self.next_to_begin()
        {
            let active = &self.waiting[next];
            let base = active.prefix(&mut self.prefixes);
            let free = self.memory.free() + self.droppable_beside(base.as_ref());
            let has = base.as_ref().map(|base| (base.whole_bytes(), base.tokens.len()));
            let of_others = self.running.iter().map(|running| running.growth(&self.compute));
            let growth = of_others.sum::<usize>() + active.growth(&self.compute, has);
            let (needed, start) = match base {
                Some(base) => {
                    let sequence = base.sequence.clone();
                    let own = self.compute.bytes(&sequence, Some(&base.sequence));
                    let needed = own + self.compute.growth_bytes(active.kv, MEASURED_EVERY);
                    (needed, Start::After(Found { base, sequence }))
                }
                None => self.how_to_begin(active, growth),
            };
            let priority = active.order.0;
            let is_alone = self.running.is_empty() && self.parted.is_empty();
            if needed + growth > free && !is_alone {
                // What was found stays as long as this goes on: it is not to be taken for it.
                if self.make_way(needed + growth - free, priority) {
                    continue;
                }
                break;
            }
            let reservation = self.prefixes.reserve(&mut self.memory, needed);
            let active = match (&reservation, is_alone) {
                (None, false) => break,
                _ => self.waiting.remove(next),
            };
            let Some(reservation) = reservation else {
                let why = self.why_no_room(needed);
                self.farewells.push(active.end(End::NoRoom(why)));
                continue;
            };
            self.begin(active, start, reservation);
        }
    }

    /// The first one that waits and need not wait for a prompt that is being read, and is its own.
    fn next_to_begin(&self) -> Option<usize> {
        let is_read = |active: &Active| {
            self.settings.prefix_cache == PrefixCache::On
                && active.speech.prompt >= prefix::LEAST_TOKENS
                && self.running.iter().any(|running| {
                    let Running { active: other, read, compressing, .. } = running;
                    (*read < other.speech.prompt || compressing.is_some())
                        && (other.kv, &other.salt) == (active.kv, &active.salt)
                        && other.prompt() == active.prompt()
                })
        };
        self.waiting.iter().position(|active| !is_read(active))
    }

    /// Frees `bytes` for a request of this priority, at the cost of others that are no more urgent: exact caches that are there for
    /// comparison alone go, and then caches are compressed harder, if that is enough. Says whether anything was freed.
    fn make_way(&mut self, bytes: usize, priority: Reverse<i32>) -> bool {
        if self.drop_one_shadow() {
            return true;
        }
        let Some(ratio) = self.settings.floor else { return false };
        let others = self.running.iter().filter(|running| running.active.order.0 >= priority);
        let could_free: usize = others.filter_map(|running| running.could_free(&self.compute, ratio)).sum();
        could_free >= bytes && self.compress_one_harder(priority)
    }

    /// Bytes that a request needs to begin a prompt, and how: it is watched only where that takes nothing from anybody.
    fn how_to_begin(&self, active: &Active, growth: usize) -> (usize, Start<C::Sequence>) {
        let tokens = active.speech.prompt;
        let alone = self.compute.prompt_bytes(active.kv, tokens);
        let is_next = self.settings.shadow_every.is_some_and(|every| active.order.1 % every == 0);
        let exact = self.compute.prompt_bytes(KvFormat::Exact, tokens);
        let watched = alone + exact + self.compute.growth_bytes(KvFormat::Exact, shadow::STEPS);
        match is_next && shadow::is_for(active) && watched + growth <= self.memory.free() {
            true => (watched, Start::Watched),
            false => (alone, Start::Alone),
        }
    }

    fn begin(&mut self, active: Active, start: Start<C::Sequence>, reservation: Reservation) {
        self.done.prefix_queries += active.speech.prompt as u64;
        let (begun, running): (_, fn(_, _, _) -> _) = match start {
            Start::After(found) => return self.begin_after(active, found, reservation),
            Start::Alone => (self.compute.begin(active.kv), Running::new),
            Start::Watched => (self.compute.begin_exact(), Running::watched),
        };
        match begun {
            Ok(sequence) => self.running.push(running(active, sequence, reservation)),
            Err(why) => {
                self.memory.release(reservation);
                self.farewells.push(active.end(End::Failed(why)));
            }
        }
    }

    /// Begins where others have come to.
    fn begin_after(&mut self, mut active: Active, found: Found<C::Sequence>, reservation: Reservation) {
        self.done.prefix_hits += found.base.prompt as u64;
        if found.base.tokens.len() == active.tokens.len()
            && let Some(keep) = active.keep.take()
        {
            keep(found.base.kept(&self.compute));
        }
        let mut running = Running::after(&self.compute, active, found, reservation);
        let is_granted = running.measure(&self.compute, &mut self.memory);
        debug_assert!(is_granted, "as many bytes as this were reserved");
        let end = running.hear_base(&mut self.done);
        self.running.push(running);
        if let Some(end) = end {
            self.end(self.running.len() - 1, end);
        }
    }

    /// Bytes of prefixes that no request and nobody outside needs.
    fn droppable(&self) -> usize {
        self.droppable_beside(None)
    }

    /// The same if somebody needs this one.
    fn droppable_beside(&self, base: Option<&Rc<Prefix<C::Sequence>>>) -> usize {
        self.prefixes.droppable(self.running.iter().filter_map(|running| running.base.as_ref()).chain(base))
    }

    fn why_no_room(&self, needed: usize) -> String {
        let (budget, kept) = (self.memory.budget(), self.memory.reserved());
        format!(
            "{needed} more bytes of keys and values are needed, but of {budget} that all caches may take \
             saved contexts have {kept}; delete some, or start the server with a larger --kv-memory"
        )
    }

    /// What the request with this tag has read, if it runs and nothing is at work on it.
    pub fn look(&self, tag: u64) -> Option<Look> {
        let running = self.running.iter().find(|running| running.active.tag == Some(tag))?;
        if running.compressing.is_some() {
            return None;
        }
        Some(Look {
            kv: running.active.kv,
            tokens: running.active.tokens.clone(),
            prompt: running.active.speech.prompt,
            salt: running.active.salt.clone(),
            cache: self.compute.cache(&running.sequence),
        })
    }

    /// Has the next step end the request with this tag: whether there is one.
    pub fn cancel(&mut self, tag: u64) -> bool {
        let all = self.running.iter().map(|running| &running.active).chain(&self.waiting);
        let found = all.filter(|active| active.tag == Some(tag));
        found.map(|active| active.cancelled.store(true, Ordering::Relaxed)).count() > 0
    }

    /// The longest context that `tokens` begin with, of a prompt of the first `prompt` of them; it stays as long as its pin.
    pub fn find(&mut self, kv: KvFormat, tokens: &[u32], prompt: usize) -> Option<Kept> {
        if prompt > tokens.len() {
            return None;
        }
        let wanted = Which { kv, salt: None, tokens, prompt };
        self.prefixes.find(wanted, |_| true).map(|prefix| prefix.kept(&self.compute))
    }

    /// Takes a context in that was kept before; it stays as long as what is returned.
    pub fn restore(&mut self, context: Context) -> Result<Kept, String> {
        let Context { kv, tokens, prompt, logits, cache } = context;
        let fits = cache.format() == kv
            && cache.tokens() == tokens.len()
            && (1..=tokens.len()).contains(&prompt)
            && logits.as_ref().is_none_or(|logits| logits.len() == self.compute.vocab());
        if !fits || tokens.len() > self.compute.context() {
            return Err(format!(
                "a cache of {} tokens in the format {} for a context of {} tokens ({prompt} compressed together) in the format {kv}",
                cache.tokens(),
                cache.format(),
                tokens.len()
            ));
        }
        let sequence = self.compute.adopt(cache)?;
        let bytes = self.compute.bytes(&sequence, None) + prefix::bytes_of_logits(logits.as_ref());
        let reservation =
            self.prefixes.reserve(&mut self.memory, bytes).ok_or_else(|| self.why_no_room(bytes))?;
        let (pin, used) = (Pin::default(), Cell::default());
        let prefix = Prefix {
            kv,
            salt: None,
            tokens,
            prompt,
            sequence,
            logits,
            base: None,
            bytes,
            reservation,
            pin,
            used,
        };
        Ok(self.prefixes.insert(&mut self.memory, prefix).kept(&self.compute))
    }

    /// Drops an exact cache that is there for comparison alone; `false` if there is none.
    fn drop_one_shadow(&mut self) -> bool {
        let (compute, memory) = (&self.compute, &mut self.memory);
        self.running.iter_mut().any(|running| running.drop_shadow(compute, memory))
    }

    /// Compresses the newest request harder that was not yet and is no more urgent than this, if that is allowed. Says whether there
    /// was one.
    fn compress_one_harder(&mut self, priority: Reverse<i32>) -> bool {
        let Some(ratio) = self.settings.floor else { return false };
        let others = self.running.iter_mut().filter(|running| running.active.order.0 >= priority);
        let mut newest_first: Vec<_> = others.collect();
        newest_first.sort_by_key(|running| Reverse(running.active.order));
        let (compute, memory, prefixes) = (&self.compute, &mut self.memory, &mut self.prefixes);
        let is_done =
            newest_first.into_iter().any(|running| running.compress_harder(compute, memory, prefixes, ratio));
        self.done.harder += u64::from(is_done);
        is_done
    }

    /// Reserves what those that are past their prompts may take next. Where that is not free, prefixes that nobody needs are
    /// dropped; then requests are compressed harder, if that is allowed; then the one that is last in order loses its cache, and
    /// waits to read again what it has read.
    fn make_room(&mut self) {
        let mut i = 0;
        while i < self.running.len() {
            let running = &mut self.running[i];
            if running.is_measured() || running.measure(&self.compute, &mut self.memory) {
                i += 1;
                continue;
            }
            if self.prefixes.drop_one(&mut self.memory)
                || self.drop_one_shadow()
                || self.compress_one_harder(Reverse(i32::MAX))
            {
                continue;
            }
            let last = (0..self.running.len()).max_by_key(|&j| self.running[j].active.order);
            let last = last.expect("at least one runs");
            if self.running[last].compressing.is_some() {
                // It takes fewer bytes when that is done.
                self.take_one_compressed(last);
                i = 0;
                continue;
            }
            let last = self.running.remove(last);
            if self.running.is_empty() {
                let why = format!(
                    "{} tokens need more bytes of keys and values than all caches may take ({}); start the server \
                     with a larger --kv-memory, or ask for a shorter answer",
                    last.active.tokens.len(),
                    self.memory.budget()
                );
                self.farewells.push(last.end(&self.compute, &mut self.memory, None, End::NoRoom(why)));
                return;
            }
            self.done.preemptions += 1;
            let active = last.preempt(&mut self.memory);
            self.wait(active);
            // The one that was removed may have been before this one.
            i = 0;
        }
    }

    /// The pass, and what each of its requests heard; an error is the whole pass's.
    fn read(&mut self, turns: &[Turn]) -> Result<Vec<Heard>, String> {
        let mut all: Vec<_> = self.running.iter_mut().map(Some).collect();
        let (mut readings, mut speeches, mut heard) = (vec![], vec![], vec![]);
        let keeps = self.settings.prefix_cache == PrefixCache::On;
        for turn in turns {
            let Running { active, sequence, shadow, .. } =
                all[turn.index].take().expect("at most one turn each");
            let wanted = active.wanted(&turn.tokens);
            let is_kept = keeps || active.keep.is_some();
            let Active { tokens, speech, .. } = active;
            let tokens = &tokens[..];
            readings.push(Reading {
                sequence,
                tokens: &tokens[turn.tokens.clone()],
                part: turn.part,
                wanted,
            });
            speeches.push((tokens, turn.tokens.start, speech, shadow, is_kept));
            heard.push(Heard::default());
        }
        self.compute.read(readings, &mut |i, t, logits| {
            let (tokens, start, speech, shadow, is_kept) = &mut speeches[i];
            let place = *start + t + 1;
            shadow.hear(place.saturating_sub(speech.prompt), logits);
            if *is_kept && place == speech.prompt && place == tokens.len() {
                heard[i].logits = Some(logits.to_vec());
            }
            heard[i].add(speech.hear(tokens, place, logits));
        })?;
        Ok(heard)
    }

    /// Tells of what was heard, ends those that are done, and compresses the prompts that ended.
    fn settle(&mut self, turns: &[Turn], heard: Result<Vec<Heard>, String>) {
        let failed = heard.as_ref().err().cloned();
        let heard = heard.unwrap_or_else(|_| turns.iter().map(|_| Heard::default()).collect());
        let mut ends: Vec<(usize, End)> = vec![];
        for (turn, mut heard) in turns.iter().zip(heard) {
            let logits = heard.logits.take();
            let running = &mut self.running[turn.index];
            running.read = turn.tokens.end;
            if turn.part == Part::Step {
                let is_newest = turn.tokens.end == running.active.tokens.len();
                self.done.known_tokens += (turn.tokens.len() - usize::from(is_newest)) as u64;
            } else {
                self.done.prompt_tokens += turn.tokens.len() as u64;
            }
            let mut end = match &failed {
                Some(why) => Some(End::Failed(why.clone())),
                None => running.active.tell(heard, &mut self.done).or_else(|| running.is_read_out()),
            };
            if turn.part == Part::PromptEnd
                && failed.is_none()
                && (end.is_none() || running.active.keep.is_some())
            {
                // Beside what others read, if anybody does and this one goes on.
                let begun = match turns.len() > 1 && end.is_none() {
                    true => running.begin_compress(&self.compute, logits),
                    false => Err(logits),
                };
                if let Err(logits) = begun {
                    end = self.compress(turn.index, logits).or(end);
                }
            }
            let running = &mut self.running[turn.index];
            if end.is_some() || running.shadow.is_done() {
                running.compare(&self.compute, &mut self.done);
            }
            ends.extend(end.map(|end| (turn.index, end)));
        }
        ends.sort_unstable_by_key(|(index, _)| Reverse(*index));
        for (index, end) in ends {
            self.end(index, end);
        }
    }

    /// Compresses a prompt, or waits until it is, and leaves it to others. Says whether, and why, that was the end.
    fn compress(&mut self, index: usize, logits: Option<Vec<f32>>) -> Option<End> {
        match self.running[index].compress(&self.compute, logits) {
            Ok((logits, took)) => {
                self.done.compress_seconds += took.as_secs_f64();
                for (strategy, count) in self.compute.cache(&self.running[index].sequence).strategies() {
                    *self.done.strategies.entry(strategy).or_default() += count;
                }
                self.leave(index, logits);
                None
            }
            Err(why) => Some(End::Failed(why)),
        }
    }

    /// Takes the prompts that were compressed beside what others read.
    fn take_compressed(&mut self) {
        while let Some(i) = self.running.iter().position(|running| {
            running.compressing.is_some() && !self.compute.is_compressing(&running.sequence)
        }) {
            self.take_one_compressed(i);
        }
        while let Some(i) =
            self.parted.iter().position(|parted| !self.compute.is_compressing(&parted.sequence))
        {
            self.release_parted(i);
        }
    }

    /// Where there is nothing to do but to wait for prompts that are being compressed, waits for a moment; `false` if there are none.
    fn wait_a_little(&self) -> bool {
        let is_at_work =
            !self.parted.is_empty() || self.running.iter().any(|running| running.compressing.is_some());
        if is_at_work {
            thread::sleep(MOMENT);
        }
        is_at_work
    }

    fn take_one_compressed(&mut self, index: usize) {
        if let Some(end) = self.compress(index, None) {
            self.end(index, end);
        }
    }

    /// Leaves a prompt that was just compressed to others, if it is worth it or somebody asked for it.
    fn leave(&mut self, index: usize, logits: Option<Vec<f32>>) {
        let running = &mut self.running[index];
        let is_worth_it = running.active.speech.prompt >= prefix::LEAST_TOKENS;
        // Who wants more than the prompt to be kept waits until it is read.
        let is_all = running.active.speech.prompt == running.active.tokens.len();
        let keep = if is_all { running.active.keep.take() } else { None };
        if keep.is_none() && !(is_worth_it && self.settings.prefix_cache == PrefixCache::On) {
            return;
        }
        let prefix = running.leave(&self.compute, &mut self.memory, &mut self.prefixes, logits);
        if let (Some(keep), Some(prefix)) = (keep, prefix) {
            keep(prefix.kept(&self.compute));
        }
    }
}
