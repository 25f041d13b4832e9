//! Random arrivals, cancellations and a tiny memory, with a stand-in for the model: after every step the bytes add up, and in the end
//! every request got each of its tokens once, whatever ran beside it.

use mosaickv_engine::{
    Compute, End, Engine, Event, Figures, Kept, PrefixCache, PromptLogprobs, Reading, Request, Settings,
};
use mosaickv_kv::{KvCache, KvFormat, KvShape};
use mosaickv_model::{Part, Wanted};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::cell::Cell;
use std::num::NonZeroU64;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

const VOCAB: usize = 97;
const CONTEXT: usize = 4000;
/// Bytes of an exact token; a compressed one takes an eighth.
const TOKEN: usize = 80;

/// Bytes of a token after the prompt.
fn each(kv: KvFormat) -> usize {
    if kv == KvFormat::Exact { TOKEN } else { TOKEN / 8 }
}

/// A stand-in whose next token follows from all tokens before it.
struct Fake {
    live: Rc<Cell<usize>>,
}

/// A clone shares its pages, one for each token.
#[derive(Clone)]
struct FakeSequence {
    tokens: Vec<u32>,
    pages: Vec<Rc<FakePage>>,
    has_ended: bool,
    is_compressed: bool,
    /// Bytes of a token, once it is compressed.
    each: usize,
    /// For how many more questions whether it is compressed.
    busy: Rc<Cell<usize>>,
}

struct FakePage {
    bytes: usize,
    live: Rc<Cell<usize>>,
}

impl FakePage {
    fn new(bytes: usize, live: &Rc<Cell<usize>>) -> Rc<FakePage> {
        live.set(live.get() + bytes);
        Rc::new(FakePage { bytes, live: live.clone() })
    }
}

impl Drop for FakePage {
    fn drop(&mut self) {
        self.live.set(self.live.get() - self.bytes);
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

    fn begin(&self, kv: KvFormat) -> Result<FakeSequence, String> {
        Ok(FakeSequence {
            tokens: vec![],
            pages: vec![],
            has_ended: false,
            is_compressed: false,
            each: each(kv),
            busy: Rc::default(),
        })
    }

    fn begin_exact(&self) -> Result<FakeSequence, String> {
        self.begin(KvFormat::Exact)
    }

    fn compressed(&self, exact: &FakeSequence, kv: KvFormat) -> Result<FakeSequence, String> {
        assert!(exact.has_ended && !exact.is_compressed);
        Ok(FakeSequence { each: each(kv), ..exact.clone() })
    }

    fn prompt_bytes(&self, _: KvFormat, tokens: usize) -> usize {
        tokens * (TOKEN + TOKEN / 8)
    }

    fn growth_bytes(&self, kv: KvFormat, tokens: usize) -> usize {
        tokens * each(kv)
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
            if part == Part::Prompt && sequence.has_ended {
                assert!(tokens.len() <= 32, "an exact cache reads {} sampled tokens", tokens.len());
            } else if part != Part::Step {
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
            let each = if sequence.is_compressed { sequence.each } else { TOKEN };
            sequence.pages.extend(tokens.iter().map(|_| FakePage::new(each, &self.live)));
        }
        Ok(())
    }

    fn compress(&self, sequence: &mut FakeSequence) {
        assert!(sequence.has_ended && !sequence.is_compressed);
        sequence.is_compressed = true;
        sequence.pages.iter_mut().for_each(|page| *page = FakePage::new(sequence.each, &self.live));
    }

    fn begin_compress(&self, sequence: &mut FakeSequence) -> bool {
        assert!(sequence.has_ended && !sequence.is_compressed);
        // As long as the stand-in's work goes on; it has none for some prompts.
        sequence.busy = Rc::new(Cell::new(sequence.tokens.len() % 4));
        sequence.busy.get() > 0
    }

    fn is_compressing(&self, sequence: &FakeSequence) -> bool {
        assert!(!sequence.is_compressed);
        sequence.busy.set(sequence.busy.get().saturating_sub(1));
        sequence.busy.get() > 0
    }

    fn excess(&self, sequence: &FakeSequence, ratio: f32) -> Option<usize> {
        let bytes = self.bytes(sequence, None);
        let wanted = (sequence.tokens.len() * TOKEN) as f32 / ratio;
        (sequence.is_compressed && bytes as f32 > 1.5 * wanted).then_some(bytes - wanted as usize)
    }

    fn compress_harder(&self, sequence: &mut FakeSequence, ratio: f32) {
        let is_shared = |page: &Rc<FakePage>| Rc::strong_count(page) > 1;
        assert!(!sequence.pages.iter().any(is_shared), "somebody else needs its pages");
        let page = TOKEN / ratio as usize;
        sequence.pages.iter_mut().for_each(|old| *old = FakePage::new(page, &self.live));
    }

    fn bytes(&self, sequence: &FakeSequence, beside: Option<&FakeSequence>) -> usize {
        let others = beside.map_or(&[][..], |other| &other.pages);
        let is_shared = |i: usize| others.get(i).is_some_and(|other| Rc::ptr_eq(other, &sequence.pages[i]));
        (0..sequence.pages.len()).filter(|&i| !is_shared(i)).map(|i| sequence.pages[i].bytes).sum()
    }

    fn read_bytes(&self, _: &FakeSequence) -> Option<u64> {
        None
    }

    fn cache(&self, _: &FakeSequence) -> KvCache {
        let shape = KvShape { layers: 1, heads: 1, kv_heads: 1, head_dim: 16, window: None };
        KvCache::new(shape, KvFormat::Exact).unwrap()
    }

    fn adopt(&self, _: KvCache) -> Result<FakeSequence, String> {
        Err("a stand-in has no caches".to_owned())
    }
}

fn request(prompt: Vec<u32>, most_tokens: usize) -> Request {
    // A stand-in compresses whatever the format is.
    Request::new(prompt, "q8_0".parse().unwrap(), most_tokens)
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

impl Client {
    /// A conversation that goes on: its prompt, and all that followed, up to here or to somewhere before.
    fn turn(&self) -> Option<(Vec<u32>, Vec<u32>)> {
        let events = self.events.lock().unwrap();
        let Some(Event::Ended(End::Length, _)) = events.last() else { return None };
        let sampled = events.iter().filter_map(|event| match event {
            Event::Sampled(token) => Some(token.id),
            _ => None,
        });
        Some((self.prompt.clone(), self.given.iter().copied().chain(sampled).collect()))
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
        let (mut prompt, mut given): (Vec<u32>, Vec<u32>) = (tokens(length), tokens(given));
        // A third ask the same again, or go on with what was answered.
        let (again, cut) = (self.below(3) == 0, self.below(100));
        let earlier = self.below(self.clients.len().max(1));
        if let Some((same, mut followed)) = self.clients.get(earlier).and_then(Client::turn).filter(|_| again)
        {
            let room = CONTEXT - same.len() - most - given.len();
            followed.truncate((followed.len() * cut / 60).min(room));
            followed.extend(given);
            (prompt, given) = (same, followed);
        }
        let prompt_logprobs = self.below(5) == 0;
        let (events, cancelled) = (Arc::new(Mutex::new(vec![])), Arc::new(AtomicBool::new(false)));
        let request = Request {
            given: given.clone(),
            logprobs: prompt_logprobs.then_some(2),
            prompt_logprobs: if prompt_logprobs { PromptLogprobs::All } else { PromptLogprobs::Off },
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
        assert!(figures.kv_droppable <= figures.kv_prefixes && figures.kv_prefixes <= figures.kv_reserved);
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
    let (mut preemptions, mut hits, mut harder, mut watched) = (0, 0, 0, 0);
    for seed in 0..60 {
        let kv_memory = [30_000, 60_000, 150_000, 400_000][seed as usize / 2 % 4];
        let most_sequences = [3, 8, 64][seed as usize % 3];
        let tokens_per_step = [1, 512, 2000][seed as usize / 8 % 3];
        let floor = if seed % 5 < 2 { Some(16.0) } else { None };
        let shadow_every = if seed % 3 == 0 { NonZeroU64::new(2) } else { None };
        let prefix_cache = if seed % 4 < 3 { PrefixCache::On } else { PrefixCache::Off };
        let settings = Settings {
            kv_memory,
            most_sequences,
            tokens_per_step,
            most_waiting: 1000,
            prefix_cache,
            floor,
            shadow_every,
            remember_places: false,
        };
        let world = simulate(seed, settings);
        let figures = world.engine.figures();
        assert!(world.engine.is_idle(), "seed {seed}: starved, {figures:?}");
        let kept = figures.kv_prefixes;
        assert_eq!(figures.kv_reserved, kept, "seed {seed}");
        // Beside pages there are logits.
        let logits = kept - world.live.get();
        assert!(logits.is_multiple_of(4 * VOCAB) && logits <= figures.prefixes * 4 * VOCAB, "seed {seed}");
        assert_eq!((figures.kv_droppable, figures.prefixes == 0), (kept, kept == 0), "seed {seed}");
        assert!(prefix_cache == PrefixCache::On || kept == 0, "seed {seed}");
        hits += figures.prefix_hits;
        assert!(world.clients.len() > 20);
        for client in &world.clients {
            assert!(client.end().is_some());
            client.check();
        }
        assert!(floor.is_some() || figures.harder == 0, "seed {seed}");
        let of_all = figures.shadowed.iter().map(|(_, shadowed)| shadowed);
        let (steps, agreed) = of_all.clone().fold((0, 0), |sum, of| (sum.0 + of.steps, sum.1 + of.agreed));
        assert!(shadow_every.is_some() || steps == 0, "seed {seed}");
        // A stand-in says the same whatever its pages are.
        assert!(agreed == steps && of_all.map(|of| of.kl).sum::<f64>() == 0.0, "seed {seed}");
        assert_eq!(figures.kv_by_format.values().sum::<usize>(), figures.kv_allocated, "seed {seed}");
        watched += steps;
        harder += figures.harder;
        preemptions += figures.preemptions;
    }
    assert!(watched > 300, "only {watched} tokens were held against an exact cache");
    assert!(harder > 20, "only {harder} requests were compressed harder");
    assert!(preemptions > 20, "only {preemptions} preemptions: the memory is not tiny");
    assert!(hits > 5_000, "only {hits} tokens were found among the prefixes");
}

/// Of requests that fit together, one that came first ends no later than if it had waited for all before it.
#[test]
fn first_come_is_first_served() {
    let settings = Settings {
        kv_memory: 60_000,
        most_sequences: 8,
        tokens_per_step: 300,
        most_waiting: 1000,
        prefix_cache: PrefixCache::Off,
        floor: None,
        shadow_every: None,
        remember_places: false,
    };
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

/// Prompts of which ten fit, and answers half as long: who begins has room to go on, and what it goes on from is not taken for free.
#[test]
fn who_begins_goes_on() {
    let settings = Settings { kv_memory: 10 * 400 * TOKEN, ..Settings::default() };
    let mut world = World::new(0, settings);
    for i in 0..40 {
        let prompt = (0..400).map(|t| (i * 7 + t * (i + 1)) % VOCAB as u32).collect();
        let request = Request { kv: KvFormat::Exact, ..request(prompt, 200) };
        world.engine.submit(request, Box::new(|_| ()), Arc::new(AtomicBool::new(false)));
    }
    let mut together = 0;
    while world.engine.step() {
        together = together.max(world.engine.figures().running);
    }
    let Figures { preemptions, output_tokens, .. } = world.engine.figures();
    assert_eq!(output_tokens, 40 * 200);
    assert!(together >= 8 && preemptions <= 12, "{together} together, {preemptions} preemptions");
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
        Some(Event::Ended(End::NoRoom(why), _)) => assert!(why.contains("--kv-memory"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert_eq!((world.live.get(), world.engine.figures().kv_reserved), (0, 0));
}

/// Submits, runs until all is quiet, and says what the end was and what it cost.
fn answer(world: &mut World, request: Request) -> (End, mosaickv_engine::Bill) {
    let events = Arc::new(Mutex::new(vec![]));
    let to = events.clone();
    let emit = Box::new(move |event| to.lock().unwrap().push(event));
    world.engine.submit(request, emit, Arc::new(AtomicBool::new(false)));
    while world.engine.step() {}
    match events.lock().unwrap().last() {
        Some(Event::Ended(end, bill)) => (end.clone(), *bill),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_conversation_that_goes_on_is_not_read_again() {
    let mut world = World::new(0, Settings::default());
    let prompt: Vec<u32> = (0..700).map(|i| i % 91).collect();
    let (_, bill) = answer(&mut world, request(prompt.clone(), 10));
    assert_eq!(bill.cached_tokens, 0);
    let mut given = vec![];
    for _ in 0..10 {
        given.push(follower(&[&prompt[..], &given].concat()));
    }
    given.extend([5, 6, 7]);
    let (_, bill) = answer(&mut world, Request { given: given.clone(), ..request(prompt.clone(), 4) });
    // The last token of an answer was not read.
    assert_eq!((bill.cached_tokens, bill.prompt_tokens), (709, 713));
    // Another question to the same prompt.
    let other = Request { given: vec![9, 9], ..request(prompt.clone(), 4) };
    assert_eq!(answer(&mut world, other).1.cached_tokens, 700);
    // The same again: what follows the prompt is known too.
    assert_eq!(answer(&mut world, request(prompt.clone(), 1)).1.cached_tokens, 700);
    // Who wants to hear of the prompt's tokens must have them read.
    let reported =
        Request { logprobs: Some(0), prompt_logprobs: PromptLogprobs::All, ..request(prompt.clone(), 1) };
    assert_eq!(answer(&mut world, reported).1.cached_tokens, 0);
    // A longer prompt is compressed otherwise.
    let longer = [&prompt[..], &[1]].concat();
    assert_eq!(answer(&mut world, request(longer, 1)).1.cached_tokens, 0);
}

#[test]
fn what_is_kept_stays_and_what_is_not_makes_room() {
    // Room for one prompt of 1,000 tokens while it is read, and 300 more.
    let settings = Settings { kv_memory: 1300 * (TOKEN + TOKEN / 8), ..Settings::default() };
    let mut world = World::new(0, settings);
    let kept: Arc<Mutex<Vec<Kept>>> = Arc::default();
    let prompt = |seed: u32| (0..1000).map(|i| (i * seed) % 97).collect::<Vec<u32>>();
    let keep = |world: &mut World, seed: u32| {
        let to = kept.clone();
        let keep: mosaickv_engine::Keep = Box::new(move |it| to.lock().unwrap().push(it));
        answer(world, Request { keep: Some(keep), ..request(prompt(seed), 0) })
    };
    assert_eq!(keep(&mut world, 1).0, End::Length);
    for seed in 2..6 {
        answer(&mut world, request(prompt(seed), 3));
    }
    assert_eq!(answer(&mut world, request(prompt(1), 3)).1.cached_tokens, 1000, "it was dropped");
    assert_eq!(kept.lock().unwrap()[0].context.tokens, prompt(1));
    // Until there is no room for the next prompt beside all that is kept.
    let ends: Vec<End> = (10..40).map(|seed| keep(&mut world, seed).0).collect();
    let kept_now = ends.iter().position(|end| *end != End::Length).expect("a memory without an end");
    assert!((2..30).contains(&kept_now), "{kept_now} were kept");
    match &ends[kept_now] {
        End::NoRoom(why) => assert!(why.contains("saved contexts"), "{why}"),
        other => panic!("{other:?}"),
    }
    kept.lock().unwrap().clear();
    assert_eq!(answer(&mut world, request(prompt(50), 3)).0, End::Length);
    let figures = world.engine.figures();
    assert_eq!(figures.kv_droppable, figures.kv_prefixes);
}
