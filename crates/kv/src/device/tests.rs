//! Mirrors on an emulated device, against the caches that they mirror.

mod encoding;
mod packed;

use super::*;
use crate::common::uniform;
use crate::{Layered as Format, Moments, Select, Target};
use mosaickv_kernels::cuda::emulated;
use mosaickv_kernels::cuda::layered::Choice;

const D: usize = 64;
const SHAPE: KvShape = KvShape { layers: 2, heads: 6, kv_heads: 2, head_dim: D, window: None };
const KV_ROW: usize = 2 * D;
const Q_ROW: usize = 6 * D;

/// Numbers of falling variance, with a mean, that f16 has.
fn rows(seed: u64, tokens: usize, width: usize) -> Vec<f32> {
    let mut uniform = uniform(seed);
    let number = |i: usize| 6.0 * uniform() / (1.0 + (i % D) as f32) + 0.2;
    (0..tokens * width).map(number).map(|x| f16::from_f32(x).to_f32()).collect()
}

/// Queries whose scores differ by a few units.
fn asking(seed: u64, tokens: usize) -> Vec<f32> {
    rows(seed, tokens, Q_ROW).into_iter().map(|x| 0.5 * x).collect()
}

fn cache(format: KvFormat) -> KvCache {
    let identity: Vec<f64> = (0..D * D).map(|i| f64::from(u8::from(i % (D + 1) == 0))).collect();
    let head = |i: u64| {
        let mut moments = Moments::new(D);
        moments.add(&rows(i + 1, 500, D), &rows(i + 51, 500, D), &rows(i + 101, 500, D));
        moments.learn(&identity)
    };
    let calibration = Calibration { heads: (0..4).map(head).collect(), layer_weights: vec![0.5, 1.5] };
    KvCache::new(SHAPE, format).unwrap().with_calibration(Arc::new(calibration)).unwrap()
}

/// A prompt of so many tokens.
fn read(cache: &mut KvCache, threads: &Threads, tokens: usize) {
    for layer in 0..SHAPE.layers {
        cache.append(threads, layer, &rows(1, tokens, KV_ROW), &rows(2, tokens, KV_ROW)).unwrap();
        cache.attend(threads, layer, &asking(3, tokens), &mut vec![0.0; tokens * Q_ROW]);
    }
    (0..SHAPE.layers).for_each(|layer| cache.end_prompt(threads, layer));
}

/// The next token: key, value and queries, the same in each layer.
struct Token {
    key: Vec<f32>,
    value: Vec<f32>,
    queries: Vec<f32>,
}

fn token(i: usize) -> Token {
    let seed = 1000 + 3 * i as u64;
    Token { key: rows(seed, 1, KV_ROW), value: rows(seed + 1, 1, KV_ROW), queries: asking(seed + 2, 1) }
}

/// A step on the CPU: outputs of all layers.
fn step(cache: &mut KvCache, threads: &Threads, token: &Token) -> Vec<f32> {
    let mut out = vec![0.0; SHAPE.layers * Q_ROW];
    for (layer, out) in out.chunks_exact_mut(Q_ROW).enumerate() {
        cache.append(threads, layer, &token.key, &token.value).unwrap();
        cache.attend(threads, layer, &token.queries, out);
    }
    cache.between_steps();
    out
}

/// So many steps of a cache on the CPU and of one with a mirror, those that are `seen` on the device, where they take long here. What it did
/// not see it is brought in line with.
fn steps_alike(
    (store, attention): (&mut Store, &mut Attention),
    on_cpu: &mut KvCache,
    (on_device, mirror): (&mut KvCache, &mut Mirror),
    threads: &Threads,
    (count, seen): (usize, impl Fn(usize) -> bool),
) {
    for i in 0..count {
        let want = step(on_cpu, threads, &token(i));
        if seen(i) {
            let sequence = (&mut *on_device, &mut *mirror, token(i));
            let got = step_each(store, attention, &mut [sequence], threads);
            close(&got[0], &want, &format!("{}, step {i}", on_cpu.format));
        } else {
            step(on_device, threads, &token(i));
        }
    }
}

fn narrow(x: &[f32]) -> Vec<f16> {
    x.iter().map(|x| f16::from_f32(*x)).collect()
}

/// The same on the device, of some sequences together; what the model's kernels would add is written here.
fn step_each(
    store: &mut Store,
    attention: &mut Attention,
    sequences: &mut [(&mut KvCache, &mut Mirror, Token)],
    threads: &Threads,
) -> Vec<Vec<f32>> {
    let gpu = store.gpu.clone();
    for (cache, mirror, token) in &mut *sequences {
        mirror.update(store, cache, threads, 1).unwrap();
        let mut after = cache.clone();
        for layer in 0..SHAPE.layers {
            after.append(threads, layer, &token.key, &token.value).unwrap();
            let page = mirror.exact_tokens(layer) / PAGE_TOKENS;
            let numbers = page_of(&after.layers[layer], page, D);
            store.pool(layer).write_page(mirror.pages()[page] as usize, &numbers).unwrap();
        }
    }
    let reads = sequences.iter().map(|(cache, _, _)| reads_of(cache));
    let reads = reads.reduce(|a, b| if b == Reads::Layered(Choice::all()) { a } else { b }).unwrap();
    let mirrors: Vec<&Mirror> = sequences.iter().map(|(_, mirror, _)| &**mirror).collect();
    attention.fit(&mirrors, reads).unwrap();
    attention.set(store, &mirrors).unwrap();
    let count = sequences.len();
    let queries: Vec<f32> = sequences.iter().flat_map(|(_, _, token)| token.queries.clone()).collect();
    let on_device = gpu.upload(&narrow(&queries)).unwrap();
    let out = gpu.alloc(count * Q_ROW * 4).unwrap();
    let mut all = vec![vec![]; count];
    for layer in 0..SHAPE.layers {
        out.poison().unwrap();
        attention.attend(store, layer, (&on_device, (D as f32).sqrt().recip()), &out).unwrap();
        let got: Vec<f32> = out.read(count * Q_ROW).unwrap();
        all.iter_mut().zip(got.chunks_exact(Q_ROW)).for_each(|(all, got)| all.extend_from_slice(got));
    }
    let heads = SHAPE.heads;
    let log_sums = attention.log_sums().map(|sums| sums.read::<f32>(SHAPE.layers * count * heads).unwrap());
    let log_sums = log_sums.unwrap_or_else(|| vec![f32::NAN; SHAPE.layers * count * heads]);
    for (i, (cache, mirror, token)) in sequences.iter_mut().enumerate() {
        mirror.added(1);
        let (rows, queries) = (narrow(&[&token.key[..], &token.value].concat()), narrow(&token.queries));
        let asks: Vec<bool> = (0..SHAPE.layers).map(|layer| cache.asks(layer)).collect();
        let taken = |_: usize, layer: usize| Taken {
            rows: &rows,
            queries: if asks[layer] { &queries } else { &[] },
            log_sums: &log_sums[(layer * count + i) * heads..][..heads],
        };
        KvCache::take_step(&mut [cache], threads, taken).unwrap();
        cache.between_steps();
        cache.check().unwrap();
    }
    all
}

/// Of the largest output. Both sides round weights, to f16 or 16 bits, and queries to the same bytes.
fn close(got: &[f32], want: &[f32], what: &str) {
    let largest = want.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 3e-3 * largest, "{what}: {got}, wanted {want}, largest {largest}");
    }
}

fn layered() -> KvFormat {
    KvFormat::Layered(Format { target: Target::Ratio(5.0), ..Format::default() })
}

/// Through sealed buffers, pages that leave the window, and segments that close: each twice and more.
#[test]
fn a_mirror_attends_as_its_cache_does_while_it_grows() {
    let Some(gpu) = emulated(4) else { return };
    let threads = Threads::new(2);
    let mut on_cpu = cache(layered());
    read(&mut on_cpu, &threads, 2100);
    let mut on_device = on_cpu.clone();
    let mut store = Store::new(&gpu, SHAPE).unwrap();
    let (mut mirror, mut attention) = (Mirror::new(&store), Attention::new(&store, 1).unwrap());
    let sequence = (&mut on_device, &mut mirror);
    let seen = |i: usize| i.is_multiple_of(7) || i % 32 <= 2;
    steps_alike((&mut store, &mut attention), &mut on_cpu, sequence, &threads, (700, seen));
    let sizes = |cache: &KvCache| -> Vec<Vec<usize>> {
        let segments = |layer| match &cache.layers[layer] {
            Layer::Layered(heads) => heads[0].segments().map(|s| s.tokens()).to_vec(),
            _ => vec![],
        };
        (0..SHAPE.layers).map(segments).collect()
    };
    assert_eq!(sizes(&on_cpu), sizes(&on_device));
    assert!(sizes(&on_cpu)[0][1] >= 512, "{:?}: too little has left the window", sizes(&on_cpu));
    let (ours, theirs) = (on_device.bytes().packed as f64, on_cpu.bytes().packed as f64);
    assert!((ours / theirs - 1.0).abs() < 0.01, "{ours} bytes of pages, on the CPU {theirs}");
    assert!(mirror.bytes() as f64 > 0.9 * ours, "{} bytes on the device of {ours}", mirror.bytes());
    drop(mirror);
    assert_eq!(store.bytes().0, 0, "pages that nobody gave back");
}

/// A sequence that is exact and long, one that is exact and short, and one that is compressed.
#[test]
fn sequences_of_different_lengths_and_formats_share_a_step() {
    let Some(gpu) = emulated(3) else { return };
    let threads = Threads::new(2);
    let mut store = Store::new(&gpu, SHAPE).unwrap();
    let mut attention = Attention::new(&store, 3).unwrap();
    let mut caches = [cache(KvFormat::Exact), cache(layered()), cache(layered())];
    for (cache, tokens) in caches.iter_mut().zip([330, 2050, 63]) {
        read(cache, &threads, tokens);
    }
    let mut on_cpu = caches.clone();
    let mut mirrors = [0, 1, 2].map(|_| Mirror::new(&store));
    for i in 0..4 {
        let sequences = caches.iter_mut().zip(&mut mirrors);
        let mut sequences: Vec<_> =
            sequences.enumerate().map(|(s, (cache, mirror))| (cache, mirror, token(10 * s + i))).collect();
        let got = step_each(&mut store, &mut attention, &mut sequences, &threads);
        for (s, (cache, got)) in on_cpu.iter_mut().zip(got).enumerate() {
            close(&got, &step(cache, &threads, &token(10 * s + i)), &format!("sequence {s}, step {i}"));
        }
    }
    // A clone begins with nothing, and pages go back as they were compressed.
    let mut clone = (caches[0].clone(), mirrors[0].clone());
    let mut alone = Attention::new(&store, 1).unwrap();
    let sequence = (&mut clone.0, &mut clone.1, token(99));
    let got = step_each(&mut store, &mut alone, &mut [sequence], &threads);
    close(&got[0], &step(&mut on_cpu[0].clone(), &threads, &token(99)), "a clone");
}

/// Of a head with enough tokens not all tiles are read, and what is left out costs no more than it costs the CPU. Near the cut both sides
/// read other tiles, since the device knows weights to a quarter of an octave.
#[test]
fn a_long_context_is_selected_from() {
    let Some(gpu) = emulated(4) else { return };
    let threads = Threads::new(2);
    let mut on_cpu = cache(layered());
    read(&mut on_cpu, &threads, 12_000);
    let (mut on_device, mut whole) = (on_cpu.clone(), on_cpu.clone());
    for layer in &mut whole.layers {
        let Layer::Layered(heads) = layer else { panic!("a compressed layer") };
        heads.iter_mut().for_each(|head| head.settings.select = Select::All);
    }
    let mut store = Store::new(&gpu, SHAPE).unwrap();
    let (mut mirror, mut attention) = (Mirror::new(&store), Attention::new(&store, 1).unwrap());
    let sequence = (&mut on_device, &mut mirror, token(0));
    let got = step_each(&mut store, &mut attention, &mut [sequence], &threads);
    let read = attention.layered.as_ref().unwrap().layers[0].read_tiles().unwrap();
    assert!(read.iter().any(Option::is_some), "all tiles were read");
    let all = step(&mut whole, &threads, &token(0));
    let off = |out: &[f32]| out.iter().zip(&all).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
    let (ours, theirs) = (off(&got[0]), off(&step(&mut on_cpu, &threads, &token(0))));
    println!(
        "what is left out: {ours} on the device, {theirs} on the CPU, of {}",
        off(&vec![0.0; all.len()])
    );
    assert!(theirs > 0.0 && ours < 1.2 * theirs, "{ours} on the device, {theirs} on the CPU");
}
