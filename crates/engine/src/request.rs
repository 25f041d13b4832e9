//! What is known of one request, and what becomes of it in a pass.

use crate::engine::MEASURED_EVERY;
use crate::memory::{Memory, Reservation};
use crate::sample::Sampler;
use crate::schedule::Lag;
use crate::{Bill, Compute, End, Event, Figures, PromptLogprobs, Request, Token, log_probabilities};
use mosaickv_kv::KvFormat;
use mosaickv_model::Wanted;
use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// A request that has not ended.
pub(crate) struct Active {
    /// The least goes first.
    pub(crate) order: (Reverse<i32>, u64),
    /// The prompt's, those given, and those sampled.
    pub(crate) tokens: Vec<u32>,
    pub(crate) kv: KvFormat,
    pub(crate) cancelled: Arc<AtomicBool>,
    pub(crate) speech: Speech,
    emit: Box<dyn FnMut(Event) + Send>,
    times: Times,
    preemptions: usize,
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
            (Some(_), PromptLogprobs::On) => 1,
            (Some(_), PromptLogprobs::Off) => prompt,
            (None, _) => known,
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
        Active { order, tokens, kv: request.kv, cancelled, speech, emit, times, preemptions: 0 }
    }

    /// Logits that are needed of a pass over these of its tokens.
    pub(crate) fn wanted(&self, read: &Range<usize>) -> Wanted {
        // The places of tokens that follow from the pass and are not reported.
        let places = self.speech.reported.max(read.start + 1)..=read.end.min(self.speech.last_place());
        match places.size_hint().0 {
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
            ..Bill::default()
        }
    }
}

/// A request with a cache.
pub(crate) struct Running<S> {
    pub(crate) active: Active,
    pub(crate) sequence: S,
    /// Tokens that the sequence has read.
    pub(crate) read: usize,
    /// Bytes allocated when it was last looked at.
    pub(crate) bytes: usize,
    reservation: Reservation,
    /// Tokens that it had read then; `None`: it has not been compressed.
    measured: Option<usize>,
    /// Bytes of keys and values that attention had read when the prompt was done.
    read_before: u64,
}

impl<S> Running<S> {
    pub(crate) fn new(mut active: Active, sequence: S, reservation: Reservation) -> Running<S> {
        active.times.begun.get_or_insert_with(Instant::now);
        Running { active, sequence, read: 0, bytes: 0, reservation, measured: None, read_before: 0 }
    }

    pub(crate) fn lag(&self) -> Lag {
        Lag { read: self.read, prompt: self.active.speech.prompt, known: self.active.tokens.len() }
    }

    /// The end of a request that samples nothing: all of it is read.
    pub(crate) fn is_read_out(&self) -> Option<End> {
        let is_over = self.active.speech.most == 0 && self.read == self.active.tokens.len();
        is_over.then_some(End::Length)
    }

    /// Compresses the prompt; how long that took.
    pub(crate) fn compress<C: Compute<Sequence = S>>(&mut self, compute: &C) -> Duration {
        let start = Instant::now();
        compute.compress(&mut self.sequence);
        self.read_before = compute.read_bytes(&self.sequence);
        self.bytes = compute.bytes(&self.sequence);
        // What is no longer needed is given back at the next step, when it is measured.
        self.measured = None;
        let took = start.elapsed();
        self.active.times.compress += took;
        took
    }

    /// Whether its reservation is enough for the next step.
    pub(crate) fn is_measured(&self) -> bool {
        let is_prompt = self.read < self.active.speech.prompt;
        is_prompt || self.measured.is_some_and(|measured| self.read < measured + MEASURED_EVERY)
    }

    /// Makes the reservation what it takes now and may take until it is next measured; `false` if that is not free.
    pub(crate) fn measure<C: Compute<Sequence = S>>(&mut self, compute: &C, memory: &mut Memory) -> bool {
        self.bytes = compute.bytes(&self.sequence);
        let needed = self.bytes + compute.growth_bytes(self.active.kv, MEASURED_EVERY);
        let is_free = memory.resize(&mut self.reservation, needed);
        if is_free {
            self.measured = Some(self.read);
        }
        is_free
    }

    /// Loses its cache.
    pub(crate) fn preempt(self, memory: &mut Memory) -> Active {
        let Running { mut active, sequence, reservation, .. } = self;
        drop(sequence);
        memory.release(reservation);
        active.preemptions += 1;
        active
    }

    /// Ends.
    pub(crate) fn end<C: Compute<Sequence = S>>(
        self,
        compute: &C,
        memory: &mut Memory,
        end: End,
    ) -> Farewell {
        let Running { active, sequence, reservation, read, read_before, .. } = self;
        let all = compute.read_bytes(&sequence);
        let steps = read.saturating_sub(active.speech.prompt);
        let bill = Bill {
            kv_bytes: compute.bytes(&sequence),
            exact_bytes: compute.exact_bytes(read),
            read_bytes_per_step: if steps == 0 {
                0.0
            } else {
                all.saturating_sub(read_before) as f64 / steps as f64
            },
            ..active.bill()
        };
        drop(sequence);
        memory.release(reservation);
        Farewell { emit: active.emit, end, bill, read: all }
    }
}
