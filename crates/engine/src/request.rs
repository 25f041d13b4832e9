//! What is known of one request, and what becomes of it in a pass.

use crate::engine::MEASURED_EVERY;
use crate::memory::{Memory, Reservation};
use crate::prefix::{Found, Prefix, Prefixes, Which, bytes_of_logits};
use crate::sample::Sampler;
use crate::schedule::{Lag, STEPS_TOGETHER};
use crate::shadow::{self, Shadow};
use crate::{
    Bill, Compute, End, Event, Figures, Keep, Pin, PromptLogprobs, Request, Token, log_probabilities,
};
use mosaickv_kv::KvFormat;
use mosaickv_model::Wanted;
use std::cell::Cell;
use std::cmp::Reverse;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// When another request begins, each is to have room for this share more tokens, as a divisor: who loses its cache reads all of them again.
const ROOM_TO_GROW: usize = 16;

/// A request that has not ended.
pub(crate) struct Active {
    /// The least goes first.
    pub(crate) order: (Reverse<i32>, u64),
    /// The prompt's, those given, and those sampled.
    pub(crate) tokens: Vec<u32>,
    pub(crate) kv: KvFormat,
    /// Who shares what it reads.
    pub(crate) salt: Option<Arc<str>>,
    pub(crate) tag: Option<u64>,
    pub(crate) cancelled: Arc<AtomicBool>,
    pub(crate) speech: Speech,
    /// Who wants its prompt to be kept.
    pub(crate) keep: Option<Keep>,
    emit: Box<dyn FnMut(Event) + Send>,
    times: Times,
    preemptions: usize,
    /// Whether a cache of it was compressed harder than asked.
    was_harder: bool,
    /// Tokens that it did not have to read when it began.
    cached: Option<usize>,
}

/// What a request hears of the model, and says.
pub(crate) struct Speech {
    /// Tokens of the prompt.
    pub(crate) prompt: usize,
    /// Of the prompt and given.
    known: usize,
    /// Tokens that have been reported or are not to be.
    reported: usize,
    /// Tokens to be sampled.
    most: usize,
    least: usize,
    ends: Vec<u32>,
    logprobs: Option<usize>,
    sampler: Sampler,
}

/// When what happened to a request.
struct Times {
    arrived: Instant,
    begun: Option<Instant>,
    first: Option<Instant>,
    compress: Duration,
}

/// What a request heard in a pass.
#[derive(Default)]
pub(crate) struct Heard {
    events: Vec<Event>,
    error: Option<String>,
    /// What follows the prompt, if that is to be kept.
    pub(crate) logits: Option<Vec<f32>>,
}

impl Heard {
    pub(crate) fn add(&mut self, heard: Result<Option<Event>, String>) {
        match heard {
            Ok(event) => self.events.extend(event),
            Err(error) => self.error = Some(error),
        }
    }
}

/// What a request that has ended is still to be told.
pub(crate) struct Farewell {
    emit: Box<dyn FnMut(Event) + Send>,
    end: End,
    bill: Bill,
    /// Bytes of keys and values that attention had read of it.
    pub(crate) read: u64,
}

impl Farewell {
    pub(crate) fn say(mut self) {
        (self.emit)(Event::Ended(self.end, self.bill));
    }
}

impl Speech {
    /// The place of the last token that there will be.
    fn last_place(&self) -> usize {
        self.known + self.most - 1
    }

    /// Whether it wants a token that follows from the compressed prompt.
    pub(crate) fn samples_more_than_one(&self) -> bool {
        self.most > 1
    }

    /// Whether it can do without the logits that tokens up to place `read` follow from, but for those at `read` itself if it `has_last`.
    fn can_begin_at(&self, read: usize, has_last: bool) -> bool {
        self.reported > self.last_place() || read < self.reported || (read == self.reported && has_last)
    }

    /// Logits that token `place` of the sequence follows from: reports it if it is known, else samples it.
    pub(crate) fn hear(
        &mut self,
        tokens: &[u32],
        place: usize,
        logits: &[f32],
    ) -> Result<Option<Event>, String> {
        if place < self.reported || place > self.last_place() {
            return Ok(None);
        }
        let (id, event): (u32, fn(Token) -> Event) = match tokens.get(place) {
            Some(&id) if place < self.prompt => (id, Event::Prompt),
            Some(&id) => (id, Event::Given),
            None => {
                let sampled = place - self.known;
                let banned = if sampled < self.least { &self.ends[..] } else { &[] };
                (self.sampler.choose(logits, banned)?, Event::Sampled)
            }
        };
        self.reported = place + 1;
        let logprobs = self.logprobs.map(|count| log_probabilities(logits, id, count));
        let (logprob, top) = logprobs.map_or((None, vec![]), |(logprob, top)| (Some(logprob), top));
        Ok(Some(event(Token { id, logprob, top })))
    }
}

impl Active {
    pub(crate) fn new(
        request: Request,
        order: (Reverse<i32>, u64),
        emit: Box<dyn FnMut(Event) + Send>,
        cancelled: Arc<AtomicBool>,
    ) -> Active {
        let (prompt, mut tokens) = (request.prompt.len(), request.prompt);
        tokens.extend(&request.given);
        let known = tokens.len();
        let reported = match (request.logprobs, request.prompt_logprobs) {
            (Some(_), PromptLogprobs::All) => 1,
            (Some(_), PromptLogprobs::Given) => prompt,
            (None, _) | (_, PromptLogprobs::Off) => known,
        };
        let speech = Speech {
            prompt,
            known,
            reported,
            most: request.most_tokens,
            least: request.least_tokens,
            ends: request.ends,
            logprobs: request.logprobs,
            sampler: Sampler::new(request.sampling, request.grammar, &tokens),
        };
        let times = Times { arrived: Instant::now(), begun: None, first: None, compress: Duration::ZERO };
        Active {
            order,
            tokens,
            kv: request.kv,
            salt: request.salt,
            tag: request.tag,
            cancelled,
            speech,
            keep: request.keep,
            emit,
            times,
            preemptions: 0,
            was_harder: false,
            cached: None,
        }
    }

    /// Bytes for which there is to be room: of tokens after its prompt that are known and not read, and of [some more](ROOM_TO_GROW), or
    /// what its answer still takes if that is less. `has` are bytes, and the tokens read that take them, if it has come past its prompt.
    pub(crate) fn growth<C: Compute>(&self, compute: &C, has: Option<(usize, usize)>) -> usize {
        let known = self.tokens.len();
        let left = (self.speech.known + self.speech.most).saturating_sub(known);
        let read = has.map_or(0, |(_, read)| read).max(self.speech.prompt);
        let tokens = known.saturating_sub(read) + left.min(known / ROOM_TO_GROW);
        let least = compute.growth_bytes(self.kv, MEASURED_EVERY);
        match has {
            Some((bytes, read)) => bytes / read.max(1) * tokens,
            None if self.kv == KvFormat::Exact => compute.exact_bytes(tokens).max(least),
            None => least,
        }
    }

    /// The tokens that are compressed together.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.tokens[..self.speech.prompt]
    }

    /// Where it can begin, if its tokens were read before.
    pub(crate) fn prefix<S>(&self, prefixes: &mut Prefixes<S>) -> Option<Rc<Prefix<S>>> {
        let (salt, prompt) = (self.salt.as_deref(), self.speech.prompt);
        prefixes.find(Which { kv: self.kv, salt, tokens: &self.tokens, prompt }, |prefix| {
            self.speech.can_begin_at(prefix.tokens.len(), prefix.logits.is_some())
        })
    }

    /// Logits that are needed of a pass over these of its tokens.
    pub(crate) fn wanted(&self, read: &Range<usize>) -> Wanted {
        // The places of tokens that follow from the pass and are not reported.
        let places = self.speech.reported.max(read.start + 1)..=read.end.min(self.speech.last_place());
        match places.size_hint().0 {
            0 if self.keep.is_some() && read.end == self.speech.prompt => Wanted::Last,
            0 => Wanted::Nothing,
            1 if *places.start() == read.end => Wanted::Last,
            _ => Wanted::All,
        }
    }

    /// Emits what was heard. Says whether, and why, this was the end.
    pub(crate) fn tell(&mut self, heard: Heard, done: &mut Figures) -> Option<End> {
        let mut end = None;
        for event in heard.events {
            if let Event::Sampled(Token { id, .. }) = event {
                self.times.first.get_or_insert_with(Instant::now);
                self.tokens.push(id);
                done.output_tokens += 1;
                if self.speech.ends.contains(&id) {
                    end = Some(End::Stop);
                } else if self.sampled() == self.speech.most {
                    end = Some(End::Length);
                }
            }
            (self.emit)(event);
        }
        heard.error.map(End::Failed).or(end)
    }

    fn sampled(&self) -> usize {
        self.tokens.len() - self.speech.known
    }

    /// The end of a request that has no cache.
    pub(crate) fn end(self, end: End) -> Farewell {
        let bill = self.bill();
        Farewell { emit: self.emit, end, bill, read: 0 }
    }

    fn bill(&self) -> Bill {
        let Times { arrived, begun, first, compress } = self.times;
        let now = Instant::now();
        let begun = begun.unwrap_or(now);
        Bill {
            prompt_tokens: self.speech.known,
            output_tokens: self.sampled(),
            queued: begun - arrived,
            prefill: first.unwrap_or(now) - begun,
            decode: first.map_or(Duration::ZERO, |first| now - first),
            compress,
            preemptions: self.preemptions,
            is_harder: self.was_harder,
            cached_tokens: self.cached.unwrap_or(0),
            ..Bill::default()
        }
    }
}

/// A sequence whose request has ended, and on which a thread is still at work.
pub(crate) struct Parted<S> {
    pub(crate) sequence: S,
    pub(crate) reservation: Reservation,
}

/// A prompt that is being compressed.
pub(crate) struct Compressing {
    since: Instant,
    /// What follows the prompt, if that is to be kept.
    logits: Option<Vec<f32>>,
}

/// A request with a cache.
pub(crate) struct Running<S> {
    pub(crate) active: Active,
    pub(crate) sequence: S,
    /// Tokens that the sequence has read.
    pub(crate) read: usize,
    /// Bytes allocated for it alone when it was last looked at.
    pub(crate) bytes: usize,
    /// What it is a clone of, or has left a clone of.
    pub(crate) base: Option<Rc<Prefix<S>>>,
    reservation: Reservation,
    /// Tokens that it may have read before it is looked at again; 0: at once, if it is past its prompt.
    granted: usize,
    /// Bytes of keys and values that attention had read of the sequence when it began here.
    inherited: u64,
    /// Whether it was compressed harder than asked.
    is_harder: bool,
    pub(crate) shadow: Shadow<S>,
    /// Bytes that attention had read of an exact sequence before this one became its compressed copy.
    read_before: u64,
    /// While its prompt is compressed beside what others read.
    pub(crate) compressing: Option<Compressing>,
    /// When the prompt was done: tokens read, and bytes that attention had read.
    compressed: (usize, u64),
}

impl<S> Running<S> {
    /// Begins with an empty sequence.
    pub(crate) fn new(active: Active, sequence: S, reservation: Reservation) -> Running<S> {
        Running::begin(active, sequence, reservation, (0, 0))
    }

    /// The same with an exact one, of which a compressed copy is to be made.
    pub(crate) fn watched(active: Active, exact: S, reservation: Reservation) -> Running<S> {
        Running { shadow: Shadow::Reading, ..Running::new(active, exact, reservation) }
    }

    /// Goes on from a clone of what others have read.
    pub(crate) fn after<C: Compute<Sequence = S>>(
        compute: &C,
        active: Active,
        found: Found<S>,
        reservation: Reservation,
    ) -> Running<S> {
        let Found { base, sequence } = found;
        let begins = (base.tokens.len(), compute.read_bytes(&sequence).unwrap_or(0));
        let running = Running::begin(active, sequence, reservation, begins);
        Running { base: Some(base), ..running }
    }

    fn begin(
        mut active: Active,
        sequence: S,
        reservation: Reservation,
        (read, inherited): (usize, u64),
    ) -> Running<S> {
        active.times.begun.get_or_insert_with(Instant::now);
        active.cached.get_or_insert(read);
        let compressed = (read, inherited);
        Running {
            active,
            sequence,
            read,
            bytes: 0,
            base: None,
            reservation,
            granted: 0,
            inherited,
            is_harder: false,
            shadow: Shadow::Off,
            read_before: 0,
            compressing: None,
            compressed,
        }
    }

    pub(crate) fn lag(&self) -> Lag {
        let (prompt, known) = (self.active.speech.prompt, self.active.tokens.len());
        // Nothing more can be read meanwhile.
        let known = if self.compressing.is_some() { self.read } else { known };
        Lag { read: self.read, prompt, known, granted: self.granted }
    }

    /// The end of a request that samples nothing: all of it is read.
    pub(crate) fn is_read_out(&self) -> Option<End> {
        let is_over = self.active.speech.most == 0 && self.read == self.active.tokens.len();
        is_over.then_some(End::Length)
    }

    /// Hears what follows the tokens that it did not have to read, if that is known and wanted. Says whether, and why, this was
    /// the end.
    pub(crate) fn hear_base(&mut self, done: &mut Figures) -> Option<End> {
        let mut heard = Heard::default();
        if let Some(logits) = self.base.as_ref().and_then(|base| base.logits.as_ref()) {
            let Active { tokens, speech, .. } = &mut self.active;
            heard.add(speech.hear(tokens, self.read, logits));
        }
        self.active.tell(heard, done).or_else(|| self.is_read_out())
    }

    /// Begins to compress the prompt beside what others read, if that is worth it.
    pub(crate) fn begin_compress<C: Compute<Sequence = S>>(
        &mut self,
        compute: &C,
        logits: Option<Vec<f32>>,
    ) -> Result<(), Option<Vec<f32>>> {
        if let Shadow::Reading = self.shadow {
            return Err(logits);
        }
        self.bytes = compute.bytes(&self.sequence, None);
        if !compute.begin_compress(&mut self.sequence) {
            return Err(logits);
        }
        self.compressing = Some(Compressing { since: Instant::now(), logits });
        Ok(())
    }

    /// Compresses the prompt, or waits until it is: what follows it, if that was left here, and how long it took.
    pub(crate) fn compress<C: Compute<Sequence = S>>(
        &mut self,
        compute: &C,
        logits: Option<Vec<f32>>,
    ) -> Result<(Option<Vec<f32>>, Duration), String> {
        let begun = self.compressing.take();
        let (start, logits) = begun.map_or((Instant::now(), logits), |begun| (begun.since, begun.logits));
        if let Shadow::Reading = self.shadow {
            let copy = compute.compressed(&self.sequence, self.active.kv)?;
            // The copy has read nothing yet.
            self.read_before = compute.read_bytes(&self.sequence).unwrap_or(0);
            let exact = std::mem::replace(&mut self.sequence, copy);
            self.shadow = Shadow::On { exact, heard: vec![] };
        }
        compute.compress(&mut self.sequence);
        self.compressed = (self.read, compute.read_bytes(&self.sequence).unwrap_or(0));
        self.bytes = compute.bytes(&self.sequence, None);
        self.bytes += self.shadow.exact().map_or(0, |exact| compute.bytes(exact, None));
        // What is no longer needed is given back at the next step, when it is measured.
        self.granted = 0;
        let took = start.elapsed();
        self.active.times.compress += took;
        Ok((logits, took))
    }

    /// Leaves a clone of a prompt that was just compressed to others, unless there is one.
    pub(crate) fn leave<C: Compute<Sequence = S>>(
        &mut self,
        compute: &C,
        memory: &mut Memory,
        prefixes: &mut Prefixes<S>,
        logits: Option<Vec<f32>>,
    ) -> Option<Rc<Prefix<S>>>
    where
        S: Clone,
    {
        let Active { kv, salt, speech, .. } = &self.active;
        let (salt, prompt) = (salt.as_deref(), speech.prompt);
        let which = Which { kv: *kv, salt, tokens: self.active.prompt(), prompt };
        if let Some(same) = prefixes.same(which, logits.is_some()) {
            // Somebody who had to read it again, for its log probabilities.
            return Some(same);
        }
        let sequence = self.sequence.clone();
        let bytes = compute.bytes(&sequence, None) + bytes_of_logits(logits.as_ref());
        // A prompt that is compressed takes fewer bytes than were reserved for reading it; one that is not needs some more.
        let split = memory.split(&mut self.reservation, bytes);
        let reservation = split.or_else(|| prefixes.reserve(memory, bytes))?;
        let prefix = Prefix {
            kv: self.active.kv,
            salt: self.active.salt.clone(),
            tokens: self.active.prompt().to_vec(),
            prompt: self.active.speech.prompt,
            sequence,
            logits,
            base: None,
            bytes,
            reservation,
            pin: Pin::default(),
            used: Cell::default(),
        };
        let prefix = prefixes.insert(memory, prefix);
        self.bytes = compute.bytes(&self.sequence, Some(&prefix.sequence));
        self.base = Some(prefix.clone());
        Some(prefix)
    }

    /// Compresses it harder, to about this ratio, [if that can be done](Running::could_free). Says whether it was.
    pub(crate) fn compress_harder<C: Compute<Sequence = S>>(
        &mut self,
        compute: &C,
        memory: &mut Memory,
        prefixes: &mut Prefixes<S>,
        ratio: f32,
    ) -> bool {
        if self.could_free(compute, ratio).is_none() {
            return false;
        }
        match self.base.take().map(|base| prefixes.take(base)) {
            None => {}
            // Its pages are this request's alone from here on.
            Some(Ok(base)) => memory.join(&mut self.reservation, base.reservation),
            Some(Err(shared)) => {
                self.base = Some(shared);
                return false;
            }
        }
        let start = Instant::now();
        compute.compress_harder(&mut self.sequence, ratio);
        self.active.times.compress += start.elapsed();
        (self.is_harder, self.active.was_harder) = (true, true);
        // What is no longer needed is given back, at the latest when there is room for what it may take next.
        let _is_granted = self.measure(compute, memory);
        true
    }

    /// Bytes that compressing it harder would free, if that can be done.
    pub(crate) fn could_free<C: Compute<Sequence = S>>(&self, compute: &C, ratio: f32) -> Option<usize> {
        let is_busy =
            self.compressing.is_some() || self.shadow.exact().is_some() || self.active.keep.is_some();
        let is_read = self.read >= self.active.speech.prompt;
        if self.is_harder || is_busy || !is_read || !self.base.as_ref().is_none_or(Prefix::is_only_here) {
            return None;
        }
        compute.excess(&self.sequence, ratio)
    }

    /// Does without the exact cache beside its own; `false` if there is none.
    pub(crate) fn drop_shadow<C: Compute<Sequence = S>>(&mut self, compute: &C, memory: &mut Memory) -> bool {
        if self.shadow.exact().is_none() {
            return false;
        }
        self.shadow = Shadow::Off;
        let _is_granted = self.measure(compute, memory);
        true
    }

    /// Bytes for which there is to be room beside its reservation.
    pub(crate) fn growth<C: Compute<Sequence = S>>(&self, compute: &C) -> usize {
        let bytes = self.bytes + self.base.as_ref().map_or(0, |base| base.whole_bytes());
        // Until then its bytes have not been looked at.
        let is_past_prompt = self.granted > 0;
        self.active.growth(compute, is_past_prompt.then_some((bytes, self.read)))
    }

    /// Whether its reservation is enough for the next step.
    pub(crate) fn is_measured(&self) -> bool {
        self.compressing.is_some() || self.read < self.active.speech.prompt || self.read < self.granted
    }

    /// Makes the reservation what it takes now and may take until it is next measured; `false` if that is not free.
    pub(crate) fn measure<C: Compute<Sequence = S>>(&mut self, compute: &C, memory: &mut Memory) -> bool {
        let base = self.base.as_ref().map(|base| &base.sequence);
        self.bytes = compute.bytes(&self.sequence, base);
        let mut more = 0;
        if let Some(exact) = self.shadow.exact() {
            self.bytes += compute.bytes(exact, None);
            more = compute.growth_bytes(KvFormat::Exact, shadow::STEPS);
        }
        let known = (self.active.tokens.len() - self.read).clamp(MEASURED_EVERY, STEPS_TOGETHER);
        for tokens in [known, MEASURED_EVERY] {
            let needed = self.bytes + more + compute.growth_bytes(self.active.kv, tokens);
            if memory.resize(&mut self.reservation, needed) {
                self.granted = self.read + tokens;
                return true;
            }
        }
        false
    }

    /// Holds what it has sampled against the exact cache, if there is one, which is freed.
    pub(crate) fn compare<C: Compute<Sequence = S>>(&mut self, compute: &C, done: &mut Figures) {
        let shadow = std::mem::take(&mut self.shadow);
        match shadow.compare(compute, &self.active) {
            Ok(of_this) if of_this.steps > 0 => shadow::add(&mut done.shadowed, self.active.kv, of_this),
            Ok(_) => {}
            Err(why) => tracing::warn!("an answer could not be held against its exact cache: {why}"),
        }
        // Its bytes are given back at the next step.
        self.granted = 0;
    }

    /// Loses its cache.
    pub(crate) fn preempt(self, memory: &mut Memory) -> Active {
        let Running { mut active, sequence, base, reservation, .. } = self;
        drop((sequence, base));
        memory.release(reservation);
        active.preemptions += 1;
        active
    }

    /// Ends while its prompt is still being compressed: what it has stays reserved until that is done.
    pub(crate) fn part(self, end: End) -> (Farewell, Parted<S>) {
        let Running { active, sequence, reservation, .. } = self;
        (active.end(end), Parted { sequence, reservation })
    }

    /// Ends. What it has read after its prompt is left to others, if there are `prefixes` and they would go on from it as it would.
    pub(crate) fn end<C: Compute<Sequence = S>>(
        self,
        compute: &C,
        memory: &mut Memory,
        prefixes: Option<&mut Prefixes<S>>,
        end: End,
    ) -> Farewell {
        let Running {
            mut active,
            sequence,
            base,
            mut reservation,
            read,
            inherited,
            compressed,
            is_harder,
            read_before,
            ..
        } = self;
        let all = compute.read_bytes(&sequence);
        let steps = read.saturating_sub(compressed.0);
        let of_step =
            |all: u64| if steps == 0 { 0.0 } else { all.saturating_sub(compressed.1) as f64 / steps as f64 };
        let bill = Bill {
            kv_bytes: compute.bytes(&sequence, None),
            exact_bytes: compute.exact_bytes(read),
            read_bytes_per_step: all.map(of_step),
            ..active.bill()
        };
        let bytes = compute.bytes(&sequence, base.as_ref().map(|base| &base.sequence));
        let is_whole = matches!(end, End::Stop | End::Length | End::Cancelled);
        let keep = active.keep.take().filter(|_| read == active.tokens.len());
        let is_wanted = keep.is_some() || base.is_some();
        let is_new = read > base.as_ref().map_or(active.speech.prompt, |base| base.tokens.len());
        match prefixes {
            Some(prefixes)
                if is_whole
                    && is_new
                    && is_wanted
                    && !is_harder
                    && active.kv.clones_go_on()
                    && memory.resize(&mut reservation, bytes) =>
            {
                let prefix = Prefix {
                    kv: active.kv,
                    salt: active.salt.clone(),
                    tokens: active.tokens[..read].to_vec(),
                    prompt: active.speech.prompt,
                    sequence,
                    logits: None,
                    base,
                    bytes,
                    reservation,
                    pin: Pin::default(),
                    used: Cell::default(),
                };
                let prefix = prefixes.insert(memory, prefix);
                if let Some(keep) = keep {
                    keep(prefix.kept(compute));
                }
            }
            _ => {
                drop((sequence, base));
                memory.release(reservation);
            }
        }
        Farewell { emit: active.emit, end, bill, read: read_before + all.unwrap_or(0) - inherited }
    }
}
