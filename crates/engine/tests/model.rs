//! The engine with the real model: who runs beside a request changes nothing, and bounds on bytes are bounds.

#[path = "../../model/tests/common/mod.rs"]
mod common;

use common::{SMOLLM2, smollm2};
use mosaickv_engine::{
    Bill, Compute, Context, End, Engine, Event, Kept, ModelCompute, PrefixCache, PromptLogprobs, Reading,
    Request, Sampling, Service, Settings, Shadowed, Token,
};
use mosaickv_kernels::Pool;
use mosaickv_kv::{Background, KvCache, KvFormat, Layered};
use mosaickv_model::calibrate::calibrate;
use mosaickv_model::{Model, Part, Sequence, Wanted, greedy};
use std::num::NonZeroU64;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, mpsc};

const TEXT: &str = include_str!("../../mosaickv/demo/document.txt");

fn tokens(count: usize) -> Vec<u32> {
    let (_, text) = SMOLLM2.as_ref().unwrap();
    let mut tokens = text.encode_plain(TEXT).unwrap();
    tokens.truncate(count);
    assert_eq!(tokens.len(), count);
    tokens
}

/// The model, ready for the layered format.
fn calibrated(pool: &Pool) -> Option<Model> {
    let (mut model, text) = smollm2()?;
    let document = text.encode_plain(&TEXT[TEXT.len() / 2..]).unwrap()[..600].to_vec();
    model.calibration = Some(Arc::new(calibrate(&model, pool, &[document], &mut |_, _| ()).unwrap()));
    Some(model)
}

fn request(prompt: Vec<u32>, kv: &str, most_tokens: usize) -> Request {
    Request { logprobs: Some(1), ..Request::new(prompt, kv.parse().unwrap(), most_tokens) }
}

/// What three different requests get, and how often one lost its cache.
fn answers(model: &Model, settings: Settings, which: &[usize]) -> (Vec<Vec<Token>>, u64) {
    let pool = Pool::new(2);
    let background = Arc::new(Background::new(1, 64 << 20));
    let mut engine = Engine::new(ModelCompute::new(model, &pool, background), settings, Arc::default());
    let all = tokens(1500);
    let told: Vec<Arc<Mutex<Vec<Event>>>> = which.iter().map(|_| Arc::default()).collect();
    for (&i, told) in which.iter().zip(&told) {
        let warm = Sampling { temperature: 0.9, top_p: 0.95, seed: 3, ..Sampling::default() };
        let request = match i {
            0 => request(all[..600].to_vec(), "packed", 70),
            1 => request(all[200..530].to_vec(), "exact", 60),
            2 => Request { sampling: warm, ..request(all[900..1000].to_vec(), "q8_0", 50) },
            _ => Request {
                given: all[710..725].to_vec(),
                prompt_logprobs: PromptLogprobs::Given,
                ..request(all[300..710].to_vec(), "exact", 20)
            },
        };
        let told = told.clone();
        let emit = Box::new(move |event| told.lock().unwrap().push(event));
        engine.submit(request, emit, Arc::new(AtomicBool::new(false)));
    }
    while engine.step() {}
    let of_one = |told: &Arc<Mutex<Vec<Event>>>| {
        let events = std::mem::take(&mut *told.lock().unwrap());
        let (last, tokens) = events.split_last().unwrap();
        assert!(matches!(last, Event::Ended(End::Length, _)), "{last:?}");
        let tokens = tokens.iter().map(|event| match event {
            Event::Sampled(token) | Event::Given(token) => token.clone(),
            other => panic!("{other:?}"),
        });
        tokens.collect()
    };
    let figures = engine.figures();
    assert_eq!(figures.kv_reserved, figures.kv_prefixes);
    (told.iter().map(of_one).collect(), engine.figures().preemptions)
}

/// To the bit, with probabilities: beside others, cut short by them, and after losing the cache.
#[test]
fn an_answer_does_not_depend_on_its_neighbours() {
    let Some((model, _)) = &*SMOLLM2 else { return };
    let roomy = Settings::default();
    let alone: Vec<_> = (0..4).map(|i| answers(model, roomy, &[i]).0.remove(0)).collect();
    assert_eq!(alone.iter().map(Vec::len).collect::<Vec<_>>(), [70, 60, 50, 35]);
    assert_eq!(answers(model, roomy, &[0, 1, 2, 3]).0, alone);
    let narrow = Settings { tokens_per_step: 1, most_sequences: 2, ..roomy };
    let (mut reversed, _) = answers(model, narrow, &[3, 2, 1, 0]);
    reversed.reverse();
    assert_eq!(reversed, alone);
    // So little that the prompts fit together, and their answers do not.
    let needed = |i: usize| [25_000_000, 12_000_000, 8_000_000, 14_000_000][i];
    let mut preempted = 0;
    for kv_memory in [needed(0) + needed(1), needed(0) + needed(1) + needed(2)] {
        let (got, preemptions) = answers(model, Settings { kv_memory, ..roomy }, &[0, 1, 2, 3]);
        assert_eq!(got, alone, "{kv_memory} bytes");
        preempted += preemptions;
    }
    println!("{preempted} preemptions");
}

/// What a scheduler reserves is never less than what a sequence takes.
#[test]
fn bytes_stay_within_what_is_reserved() {
    let pool = Pool::new(2);
    let Some(model) = calibrated(&pool) else { return };
    let prompt = tokens(2100);
    for (kv, length) in [
        ("exact", 330),
        ("packed", 700),
        ("kivi4", 330),
        ("snapkv", 330),
        ("layered", 330),
        ("layered", 2100),
    ] {
        let kv: KvFormat = kv.parse().unwrap();
        let compute = ModelCompute::new(&model, &pool, Arc::new(Background::new(1, 64 << 20)));
        check_bytes(&compute, compute.begin(kv).unwrap(), kv, &prompt[..length]);
    }
}

fn check_bytes<'a>(
    compute: &ModelCompute<'a>,
    mut sequence: <ModelCompute<'a> as Compute>::Sequence,
    kv: KvFormat,
    prompt: &[u32],
) {
    let most = compute.prompt_bytes(kv, prompt.len());
    for chunk in prompt.chunks(256) {
        let is_end = std::ptr::eq(chunk.as_ptr_range().end, prompt.as_ptr_range().end);
        let part = if is_end { Part::PromptEnd } else { Part::Prompt };
        let reading = Reading { sequence: &mut sequence, tokens: chunk, part, wanted: Wanted::Nothing };
        compute.read(vec![reading], &mut |_, _, _| ()).unwrap();
        let got = compute.bytes(&sequence, None);
        assert!(got <= most, "{kv}, {} tokens: {got} of {most}", prompt.len());
    }
    compute.compress(&mut sequence);
    let mut measured = compute.bytes(&sequence, None);
    assert!(measured <= most, "{kv}, compressed: {measured} of {most}");
    for i in 0..130 {
        let tokens = &prompt[i..=i];
        let reading = Reading { sequence: &mut sequence, tokens, part: Part::Step, wanted: Wanted::Nothing };
        compute.read(vec![reading], &mut |_, _, _| ()).unwrap();
        let got = compute.bytes(&sequence, None);
        let most = measured + compute.growth_bytes(kv, 16);
        assert!(got <= most, "{kv}, {i} tokens later: {got} of {most}");
        if (i + 1) % 16 == 0 {
            measured = got;
        }
    }
}

/// A ticket that is dropped ends its request soon; a service that stops ends the others.
#[test]
fn a_dropped_ticket_cancels_and_a_stop_ends_all() {
    let Some((model, _)) = smollm2() else { return };
    let vocab = model.config.vocab;
    let service = Service::start(Arc::new(model), 2, Settings { most_waiting: 3, ..Settings::default() });
    let (tell, heard) = mpsc::channel();
    let submit = |name: &'static str, request: Request| {
        let tell = tell.clone();
        service.submit(request, move |event| drop(tell.send((name, event))))
    };
    let dropped = submit("dropped", request(tokens(300), "exact", 5000)).unwrap();
    let kept = submit("kept", request(tokens(200), "packed", 5000)).unwrap();
    let until = |name: &str, is_it: &dyn Fn(&Event) -> bool| loop {
        let (who, event) = heard.recv().unwrap();
        if who == name && is_it(&event) {
            return event;
        }
    };
    until("dropped", &|event| matches!(event, Event::Sampled(_)));
    drop(dropped);
    let end = until("dropped", &|event| matches!(event, Event::Ended(..)));
    assert!(matches!(end, Event::Ended(End::Cancelled, bill) if bill.output_tokens >= 1), "{end:?}");
    // Figures are of the last whole step: the second token comes after the one in which the request ended.
    for _ in 0..2 {
        until("kept", &|event| matches!(event, Event::Sampled(_)));
    }
    assert_eq!(service.figures().running, 1);

    let refused = |request: Request| service.submit(request, |_| ()).err().map(|refused| refused.to_string());
    let context = refused(request(tokens(4000), "exact", 5000)).unwrap();
    assert!(context.contains("maximum context length is 8192") && context.contains("9000"), "{context}");
    assert!(refused(request(vec![vocab as u32], "exact", 1)).unwrap().contains("vocabulary"));
    assert!(refused(request(vec![], "exact", 1)).unwrap().contains("empty"));
    assert!(refused(request(tokens(10), "layered", 1)).unwrap().contains("calibrat"));

    service.stop();
    let end = until("kept", &|event| matches!(event, Event::Ended(..)));
    assert!(matches!(end, Event::Ended(End::Shutdown, _)), "{end:?}");
    assert!(refused(request(tokens(10), "exact", 1)).unwrap().contains("stopped"));
    assert_eq!((service.figures().running, service.figures().kv_reserved), (0, 0));
    drop(kept);
}

type Answer = (Vec<Token>, Bill);

/// Submits a request, and runs until it has ended.
fn answer(engine: &mut Engine<ModelCompute>, request: Request) -> Answer {
    let told: Arc<Mutex<Vec<Event>>> = Arc::default();
    let to = told.clone();
    engine.submit(request, Box::new(move |event| to.lock().unwrap().push(event)), Arc::default());
    while engine.step() {}
    let events = std::mem::take(&mut *told.lock().unwrap());
    let (last, tokens) = events.split_last().unwrap();
    let Event::Ended(End::Length, bill) = last else { panic!("{last:?}") };
    let tokens = tokens.iter().map(|event| match event {
        Event::Sampled(token) => token.clone(),
        other => panic!("{other:?}"),
    });
    (tokens.collect(), *bill)
}

/// To the bit, with probabilities: after a prompt that somebody else read, after a conversation's turn before, and after a context that was
/// written down.
#[test]
fn what_was_read_before_changes_nothing() {
    let pool = Pool::new(2);
    let Some(model) = calibrated(&pool) else { return };
    let all = tokens(2300);
    let engine = |prefix_cache| {
        let compute = ModelCompute::new(&model, &pool, Arc::new(Background::new(1, 64 << 20)));
        Engine::new(compute, Settings { prefix_cache, ..Settings::default() }, Arc::default())
    };
    for (kv, length) in [("exact", 270), ("packed", 300), ("kivi4", 260), ("layered", 2060)] {
        let (prompt, question) = (all[..length].to_vec(), all[length..length + 90].to_vec());
        let ask = |given: &[u32]| Request { given: given.to_vec(), ..request(prompt.clone(), kv, 30) };
        let (mut without, mut with) = (engine(PrefixCache::Off), engine(PrefixCache::On));
        let (first, bill) = answer(&mut with, ask(&[]));
        assert_eq!(bill.cached_tokens, 0);
        assert_eq!(answer(&mut without, ask(&[])).0, first, "{kv}");
        let (again, bill) = answer(&mut with, ask(&[]));
        assert_eq!((again, bill.cached_tokens), (first.clone(), length), "{kv}: the same again");
        let want = answer(&mut without, ask(&question)).0;
        let (got, bill) = answer(&mut with, ask(&question));
        assert_eq!((got, bill.cached_tokens), (want.clone(), length), "{kv}: another question");
        let turn: Vec<u32> = first.iter().map(|token| token.id).chain(question.iter().copied()).collect();
        let (got, bill) = answer(&mut with, ask(&turn));
        let read = if kv == "packed" { length } else { length + 29 };
        assert_eq!(bill.cached_tokens, read, "{kv}");
        assert_eq!(got, answer(&mut without, ask(&turn)).0, "{kv}: the next turn");
        if kv.parse::<KvFormat>().unwrap().can_be_saved() {
            let restored = restored(&model, keep(&mut without, ask(&[])));
            let mut other = engine(PrefixCache::On);
            let _kept = other.restore(restored).unwrap();
            let (got, bill) = answer(&mut other, ask(&question));
            assert_eq!((got, bill.cached_tokens), (want, length), "{kv}: from what was written");
        }
    }
}

/// Whoever is watched gets the same to the bit, and what is told of the distance to the exact cache is what it is.
#[test]
fn who_is_watched_does_not_notice() {
    let pool = Pool::new(2);
    let Some(model) = calibrated(&pool) else { return };
    let all = tokens(2100);
    for (kv, length, steps) in
        [("exact", 300, 0), ("layered", 300, 0), ("packed", 300, 29), ("layered", 2060, 29)]
    {
        let answered = |shadow_every| {
            let compute = ModelCompute::new(&model, &pool, Arc::new(Background::new(1, 64 << 20)));
            let settings = Settings { shadow_every, ..Settings::default() };
            let mut engine = Engine::new(compute, settings, Arc::default());
            let answer = answer(&mut engine, request(all[..length].to_vec(), kv, 30)).0;
            (answer, engine.figures())
        };
        let (want, figures) = answered(None);
        assert_eq!(figures.shadowed, []);
        let (got, figures) = answered(NonZeroU64::new(1));
        assert_eq!(got, want, "{kv}");
        let shadowed = figures.shadowed.first().map_or(Shadowed::default(), |(_, shadowed)| *shadowed);
        assert_eq!(shadowed.steps, steps, "{kv} {length}");
        if steps > 0 {
            let mut exact = Sequence::new(&model, &pool, KvFormat::Exact).unwrap();
            exact.prefill(&all[..length], &mut |_, _| ()).unwrap();
            let sampled: Vec<u32> = got.iter().map(|token| token.id).collect();
            let mut agreed = 0;
            for pair in sampled.windows(2) {
                // Greedy: what was sampled next is the compressed cache's most probable token.
                agreed += u64::from(greedy(&exact.step(pair[0]).unwrap()) == pair[1]);
            }
            // Tokens that are read together round otherwise than one by one: where two are as probable, the other one may be first.
            assert!(shadowed.agreed.abs_diff(agreed) <= 1, "{kv}: {agreed}, told {}", shadowed.agreed);
            let kl = shadowed.kl / steps as f64;
            println!("{kv}: {agreed} of {steps} agree, KL {kl}");
            assert!(kl > 1e-5 && kl < 0.5, "{kv}: {kl}");
        }
        assert_eq!(figures.kv_reserved, figures.kv_prefixes);
    }
}

/// A long prompt's compression holds nobody up, and gives to the bit what it gives alone.
#[test]
fn a_prompt_is_compressed_beside_others() {
    let pool = Pool::new(2);
    let Some(model) = calibrated(&pool) else { return };
    let all = tokens(2300);
    let run = |names: &[&'static str]| {
        let compute = ModelCompute::new(&model, &pool, Arc::new(Background::new(1, 64 << 20)));
        let mut engine = Engine::new(compute, Settings::default(), Arc::default());
        let told: Arc<Mutex<Vec<(&str, Token)>>> = Arc::default();
        for &name in names {
            let request = match name {
                "long" => request(all[..2300].to_vec(), "layered", 20),
                _ => request(all[..100].to_vec(), "exact", 300),
            };
            let to = told.clone();
            let emit = Box::new(move |event| match event {
                Event::Sampled(token) => to.lock().unwrap().push((name, token)),
                Event::Ended(end, _) => assert_eq!(end, End::Length),
                other => panic!("{other:?}"),
            });
            engine.submit(request, emit, Arc::default());
        }
        while engine.step() {}
        std::mem::take(&mut *told.lock().unwrap())
    };
    let both = run(&["short", "long"]);
    for name in ["short", "long"] {
        let own = both.iter().filter(|(who, _)| *who == name).cloned().collect::<Vec<_>>();
        assert!(own == run(&[name]), "{name}: not what it gets alone");
    }
    let places: Vec<usize> = (0..both.len()).filter(|&i| both[i].0 == "long").collect();
    let between = places[1] - places[0] - 1;
    println!("{between} tokens of another answer while a prompt was compressed");
    assert!(between > 3, "{between}");
}

/// From an eighth of the bytes to a sixteenth, and to a sixteenth at once: how far each is from the exact cache.
#[test]
fn what_is_compressed_harder_is_about_as_good_as_what_was_so_at_once() {
    let pool = Pool::new(2);
    let Some(model) = calibrated(&pool) else { return };
    let all = tokens(2400);
    let mut exact = Sequence::new(&model, &pool, KvFormat::Exact).unwrap().remember_queries();
    exact.prefill(&all[..2300], &mut |_, _| ()).unwrap();
    let copy = |kv: &str| exact.compressed(kv.parse().unwrap()).unwrap();
    let mut harder = copy("layered:8");
    assert!(harder.compress_harder(16.0));
    let mut copies = [copy("layered:8"), copy("layered:16"), harder];
    let ratio = |copy: &Sequence| {
        model.kv_shape().exact_bytes(copy.cache().tokens()) as f64 / copy.cache().bytes().total() as f64
    };
    let ratios = copies.each_ref().map(ratio);
    let log_p = |logits: &[f32]| -> Vec<f64> {
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        logits.iter().map(|&x| f64::from(x) - sum.ln()).collect()
    };
    let mut kl = [0.0; 3];
    for &token in &all[2300..2396] {
        let want = log_p(&exact.step(token).unwrap());
        for (copy, kl) in copies.iter_mut().zip(&mut kl) {
            let got = log_p(&copy.step(token).unwrap());
            *kl += want.iter().zip(got).map(|(p, q)| p.exp() * (p - q)).sum::<f64>() / 96.0;
        }
    }
    println!("layered:8, layered:16, layered:8 and then harder: ratios {ratios:?}, KL {kl:?}");
    assert!(ratios[2] > 13.0, "{ratios:?}");
    assert!(kl[0] < kl[2] && kl[2] < 2.5 * kl[1], "{kl:?}");
}

/// Two prompts that fit only if the first one is compressed harder while it is continued.
#[test]
fn who_runs_is_compressed_harder_before_others_wait() {
    let pool = Pool::new(2);
    let Some(model) = calibrated(&pool) else { return };
    let all = tokens(4700);
    let kv = KvFormat::Layered(Layered::default());
    let compute = || ModelCompute::new(&model, &pool, Arc::new(Background::new(1, 64 << 20)));
    // The second prompt while it is read, five eighths of what the first takes at a ratio of 8, and room for that to grow.
    let first = compute().exact_bytes(2300) / 8;
    let grows = first / 16 + 2 * compute().growth_bytes(kv, 16);
    let kv_memory = compute().prompt_bytes(kv, 2300) + first * 5 / 8 + grows;
    let run = |floor| {
        let mut engine =
            Engine::new(compute(), Settings { kv_memory, floor, ..Settings::default() }, Arc::default());
        let mut told = vec![];
        for prompt in [&all[..2300], &all[2400..4700]] {
            let events: Arc<Mutex<Vec<Event>>> = Arc::default();
            let to = events.clone();
            let emit = Box::new(move |event| to.lock().unwrap().push(event));
            engine.submit(request(prompt.to_vec(), "layered", 60), emit, Arc::default());
            told.push(events);
        }
        let mut together = 0;
        while engine.step() {
            let figures = engine.figures();
            assert!(
                figures.kv_allocated <= figures.kv_reserved && figures.kv_reserved <= kv_memory,
                "{figures:?}"
            );
            together += usize::from(figures.running == 2);
        }
        let bills: Vec<Bill> = told
            .iter()
            .map(|events| match events.lock().unwrap().last() {
                Some(Event::Ended(End::Length, bill)) => *bill,
                other => panic!("{other:?}"),
            })
            .collect();
        (bills, together, engine.figures().harder)
    };
    let (bills, together, harder) = run(None);
    assert!(bills.iter().all(|bill| !bill.is_harder) && (together, harder) == (0, 0));
    let (bills, together, harder) = run(Some(16.0));
    assert!(
        bills[0].is_harder && !bills[1].is_harder && together > 8 && harder == 1,
        "{together}: {bills:?}"
    );
    let ratio = |bill: &Bill| bill.exact_bytes as f64 / bill.kv_bytes as f64;
    assert!(ratio(&bills[0]) > 11.0 && ratio(&bills[1]) < 8.5, "{bills:?}");
}

/// The request's prompt, kept.
fn keep(engine: &mut Engine<ModelCompute>, request: Request) -> Kept {
    let kept: Arc<Mutex<Option<Kept>>> = Arc::default();
    let to = kept.clone();
    let keep: mosaickv_engine::Keep = Box::new(move |it| *to.lock().unwrap() = Some(it));
    answer(engine, Request { keep: Some(keep), most_tokens: 0, logprobs: None, ..request });
    let kept = kept.lock().unwrap().take();
    kept.expect("nothing was kept")
}

/// A context as another process reads it.
fn restored(model: &Model, kept: Kept) -> Context {
    let mut bytes = vec![];
    kept.context.cache.write(&mut bytes).unwrap();
    let (shape, kv) = (model.kv_shape(), kept.context.kv);
    let cache = KvCache::read(&bytes, shape, kv, model.calibration.clone()).unwrap();
    Context { cache, ..kept.context }
}
