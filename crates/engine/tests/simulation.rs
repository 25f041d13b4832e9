//! Random arrivals, cancellations and a tiny memory, with a stand-in for the model: after every step the bytes add up, and in the end
//! every request got each of its tokens once, whatever ran beside it.

use mosaickv_engine::{Compute, End, Engine, Event, PromptLogprobs, Reading, Request, Settings};
use mosaickv_kv::KvFormat;
use mosaickv_model::{Part, Wanted};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

const VOCAB: usize = 97;
const CONTEXT: usize = 4000;
/// Bytes of an exact token; a compressed one takes an eighth.
const TOKEN: usize = 80;

/// A stand-in whose next token follows from all tokens before it.
struct Fake {
    live: Rc<Cell<usize>>,
}

struct FakeSequence {
    tokens: Vec<u32>,
    bytes: usize,
    has_ended: bool,
    is_compressed: bool,
    live: Rc<Cell<usize>>,
}

impl FakeSequence {
    fn take(&mut self, bytes: usize) {
        self.live.set(self.live.get() + bytes - self.bytes);
        self.bytes = bytes;
    }
}

impl Drop for FakeSequence {
    fn drop(&mut self) {
        self.take(0);
    }
}

fn follower(tokens: &[u32]) -> u32 {
    let mix = |hash: u64, &token: &u32| (hash ^ u64::from(token)).wrapping_mul(0x0100_0000_01b3);
    let hash = tokens.iter().fold(0xcbf2_9ce4_8422_2325, mix);
    (hash >> 20) as u32 % VOCAB as u32
}

impl Compute for Fake {
    type Sequence = FakeSequence;

    fn context(&self) -> usize {
        CONTEXT
    }

    fn vocab(&self) -> usize {
        VOCAB
    }

    fn begin(&self, _: KvFormat) -> Result<FakeSequence, String> {
        let live = self.live.clone();
        Ok(FakeSequence { tokens: vec![], bytes: 0, has_ended: false, is_compressed: false, live })
    }

    fn prompt_bytes(&self, _: KvFormat, tokens: usize) -> usize {
        tokens * (TOKEN + TOKEN / 8)
    }

    fn growth_bytes(&self, _: KvFormat, tokens: usize) -> usize {
        tokens * TOKEN / 8
    }

    fn exact_bytes(&self, tokens: usize) -> usize {
        tokens * TOKEN
    }

    fn read(
        &self,
        readings: Vec<Reading<FakeSequence>>,
        each: &mut dyn FnMut(usize, usize, &[f32]),
    ) -> Result<(), String> {
        let is_prompt = |reading: &Reading<FakeSequence>| reading.part != Part::Step;
        assert!(readings.is_sorted_by_key(is_prompt), "a prompt before a step");
        for (i, Reading { sequence, tokens, part, wanted }) in readings.into_iter().enumerate() {
            assert_eq!(part == Part::Step, sequence.is_compressed, "a step before its prompt is compressed");
            let start = sequence.tokens.len();
            if part != Part::Step {
                assert!(start.is_multiple_of(256), "a chunk from {start}");
                assert!(tokens.len() == 256 || part == Part::PromptEnd, "{} tokens", tokens.len());
            }
            for (t, &token) in tokens.iter().enumerate() {
                sequence.tokens.push(token);
                let is_last = t + 1 == tokens.len();
                if wanted == Wanted::All || wanted == Wanted::Last && is_last {
                    let mut logits = vec![0.0; VOCAB];
                    logits[follower(&sequence.tokens) as usize] = 5.0;
                    each(i, t, &logits);
                }
            }
            sequence.has_ended |= part == Part::PromptEnd;
            let each = if sequence.is_compressed { TOKEN / 8 } else { TOKEN };
            sequence.take(sequence.bytes + tokens.len() * each);
        }
        Ok(())
    }

    fn compress(&self, sequence: &mut FakeSequence) {
        assert!(sequence.has_ended && !sequence.is_compressed);
        sequence.is_compressed = true;
        sequence.take(sequence.tokens.len() * TOKEN / 8);
    }

    fn bytes(&self, sequence: &FakeSequence) -> usize {
        sequence.bytes
    }

    fn read_bytes(&self, _: &FakeSequence) -> u64 {
        0
    }
}

fn request(prompt: Vec<u32>, most_tokens: usize) -> Request {
    Request::new(prompt, KvFormat::Exact, most_tokens)
}

/// A request and what came of it.
struct Client {
    prompt: Vec<u32>,
    given: Vec<u32>,
    most: usize,
    prompt_logprobs: bool,
    events: Arc<Mutex<Vec<Event>>>,
    cancelled: Arc<AtomicBool>,
    submitted: usize,
    ended: Option<usize>,
}

impl Client {
    fn end(&self) -> Option<End> {
        let events = self.events.lock().unwrap();
        let ends: Vec<_> = events.iter().filter(|event| matches!(event, Event::Ended(..))).collect();
        assert!(ends.len() <= 1, "two ends");
        match events.last() {
            Some(Event::Ended(end, _)) => Some(end.clone()),
            _ => {
                assert!(ends.is_empty(), "events after the end");
                None
            }
        }
    }

    /// Every event is the one that the stand-in alone would have given.
    fn check(&self) {
        let mut tokens = self.prompt.clone();
        tokens.extend(&self.given);
        let known = tokens.len();
        let mut place = if self.prompt_logprobs { 1 } else { known };
        let mut sampled = 0;
        for event in self.events.lock().unwrap().iter() {
            match event {
                Event::Prompt(token) => {
                    assert!(place < self.prompt.len() && token.id == tokens[place]);
                    let is_sure = follower(&tokens[..place]) == token.id;
                    assert_eq!(token.logprob.unwrap() > -1.0, is_sure);
                    place += 1;
                }
                Event::Given(token) => {
                    assert!((self.prompt.len()..known).contains(&place) && token.id == tokens[place]);
                    place += 1;
                }
                Event::Sampled(token) => {
                    assert_eq!((place, token.id), (tokens.len(), follower(&tokens)), "token {sampled}");
                    tokens.push(token.id);
                    place += 1;
                    sampled += 1;
                }
                Event::Ended(End::Length, bill) => {
                    assert_eq!(sampled, self.most);
                    assert_eq!((bill.prompt_tokens, bill.output_tokens), (known, sampled));
                    assert!(place == tokens.len(), "some tokens were not reported");
                }
                Event::Ended(End::Cancelled, _) => assert!(self.cancelled.load(Ordering::Relaxed)),
                Event::Ended(end, _) => panic!("{end:?}"),
            }
        }
    }
}

struct World {
    engine: Engine<Fake>,
    live: Rc<Cell<usize>>,
    draws: ChaCha8Rng,
    clients: Vec<Client>,
    steps: usize,
}

impl World {
    fn new(seed: u64, settings: Settings) -> World {
        let live = Rc::new(Cell::new(0));
        let engine = Engine::new(Fake { live: live.clone() }, settings, Arc::default());
        World { engine, live, draws: ChaCha8Rng::seed_from_u64(seed), clients: vec![], steps: 0 }
    }

    fn below(&mut self, n: usize) -> usize {
        (self.draws.next_u64() % n as u64) as usize
    }

    /// A request of random lengths, none over these.
    fn arrive(&mut self, (prompt, answer): (usize, usize)) {
        let length = 1 + self.below(prompt);
        let given = if self.below(4) == 0 { self.below(40) } else { 0 };
        let most = if self.below(8) == 0 { 0 } else { 1 + self.below(answer) };
        let mut tokens = |n| (0..n).map(|_| self.draws.next_u64() as u32 % VOCAB as u32).collect();
        let (prompt, given): (Vec<u32>, Vec<u32>) = (tokens(length), tokens(given));
        let prompt_logprobs = self.below(5) == 0;
        let (events, cancelled) = (Arc::new(Mutex::new(vec![])), Arc::new(AtomicBool::new(false)));
        let request = Request {
            given: given.clone(),
            logprobs: prompt_logprobs.then_some(2),
            prompt_logprobs: if prompt_logprobs { PromptLogprobs::On } else { PromptLogprobs::Off },
            ..request(prompt.clone(), most)
        };
        let told = events.clone();
        let emit = Box::new(move |event| told.lock().unwrap().push(event));
        self.engine.submit(request, emit, cancelled.clone());
        let submitted = self.steps;
        self.clients.push(Client {
            prompt,
            given,
            most,
            prompt_logprobs,
            events,
            cancelled,
            submitted,
            ended: None,
        });
    }

    fn cancel_one(&mut self) {
        let i = self.below(self.clients.len().max(1));
        if let Some(client) = self.clients.get(i)
            && client.ended.is_none()
        {
            client.cancelled.store(true, Ordering::Relaxed);
        }
    }

    fn step(&mut self) {
        self.engine.step();
        self.steps += 1;
        let figures = self.engine.figures();
        assert!(self.live.get() <= figures.kv_reserved, "{} live of {figures:?}", self.live.get());
        assert!(figures.kv_reserved <= figures.kv_budget, "{figures:?}");
        let mut alive = 0;
        for client in &mut self.clients {
            let end = client.end();
            if end.is_some() {
                client.ended.get_or_insert(self.steps);
            } else {
                alive += 1;
                assert!(!client.cancelled.load(Ordering::Relaxed), "a step later it still runs");
            }
        }
        assert_eq!(alive, figures.running + figures.waiting, "requests were lost");
    }
}

fn simulate(seed: u64, settings: Settings) -> World {
    let mut world = World::new(seed, settings);
    // Long prompts, or answers that take more than their prompts.
    let alone = settings.kv_memory / (TOKEN + TOKEN / 8);
    let lengths = if seed.is_multiple_of(2) { (alone.min(CONTEXT - 130), 90) } else { (60, 900) };
    for _ in 0..300 {
        if world.below(6) == 0 {
            world.arrive(lengths);
        }
        if world.below(25) == 0 {
            world.cancel_one();
        }
        world.step();
    }
    for _ in 0..100_000 {
        if world.engine.is_idle() {
            break;
        }
        world.step();
    }
    world
}

#[test]
fn bytes_are_conserved_and_each_token_is_sent_once() {
    let mut preemptions = 0;
    for seed in 0..60 {
        let kv_memory = [30_000, 60_000, 150_000, 400_000][seed as usize / 2 % 4];
        let most_sequences = [3, 8, 64][seed as usize % 3];
        let tokens_per_step = [1, 512, 2000][seed as usize / 8 % 3];
        let settings = Settings { kv_memory, most_sequences, tokens_per_step, most_waiting: 1000 };
        let world = simulate(seed, settings);
        let figures = world.engine.figures();
        assert!(world.engine.is_idle(), "seed {seed}: starved, {figures:?}");
        assert_eq!((figures.kv_reserved, world.live.get()), (0, 0), "seed {seed}");
        assert!(world.clients.len() > 20);
        for client in &world.clients {
            assert!(client.end().is_some());
            client.check();
        }
        preemptions += figures.preemptions;
    }
    assert!(preemptions > 20, "only {preemptions} preemptions: the memory is not tiny");
}

/// Of requests that fit together, one that came first ends no later than if it had waited for all before it.
#[test]
fn first_come_is_first_served() {
    let settings =
        Settings { kv_memory: 60_000, most_sequences: 8, tokens_per_step: 300, most_waiting: 1000 };
    let world = simulate(6, settings);
    let begun: Vec<usize> = world.clients.iter().map(|client| client.submitted).collect();
    assert!(begun.is_sorted());
    let longest = world.clients.iter().filter_map(|client| Some(client.ended? - client.submitted)).max();
    // Alone, each request takes at most 3 chunks, 40 given and 90 sampled tokens.
    let worst = world.clients.len() * (3 + 40 + 90);
    assert!(longest.unwrap() < worst, "{longest:?} of at most {worst} steps");
}

#[test]
fn a_higher_priority_goes_first() {
    let settings = Settings { most_sequences: 1, ..Settings::default() };
    let mut engine = Engine::new(Fake { live: Rc::new(Cell::new(0)) }, settings, Arc::default());
    let order = Arc::new(Mutex::new(vec![]));
    for (name, priority) in [("first", 0), ("low", -1), ("high", 3), ("second", 0)] {
        let request = Request { priority, ..request(vec![1; 10], 2) };
        let order = order.clone();
        let emit = Box::new(move |event| {
            if let Event::Ended(..) = event {
                order.lock().unwrap().push(name);
            }
        });
        engine.submit(request, emit, Arc::new(AtomicBool::new(false)));
    }
    while engine.step() {}
    assert_eq!(*order.lock().unwrap(), ["high", "first", "second", "low"]);
}

#[test]
fn an_answer_that_outgrows_the_memory_alone_fails_with_words() {
    // A prompt fits, but not what it is to be continued by.
    let settings = Settings { kv_memory: 9000, ..Settings::default() };
    let mut world = World::new(0, settings);
    let events = Arc::new(Mutex::new(vec![]));
    let to = events.clone();
    let emit = Box::new(move |event| to.lock().unwrap().push(event));
    world.engine.submit(request(vec![1; 100], 2000), emit, Arc::new(AtomicBool::new(false)));
    while world.engine.step() {}
    let events = events.lock().unwrap();
    assert!(events.len() > 500, "{} tokens", events.len());
    match events.last() {
        Some(Event::Ended(End::Failed(why), _)) => assert!(why.contains("--kv-memory"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert_eq!((world.live.get(), world.engine.figures().kv_reserved), (0, 0));
}
