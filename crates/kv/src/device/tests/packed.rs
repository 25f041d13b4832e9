//! The same of caches in the packed format.

use super::*;
use crate::packed::Segment;

fn packed(parameters: &str) -> KvFormat {
    format!("packed:{parameters}").parse().unwrap()
}

/// Segments of a layer's first head: their tokens, strategies and pages.
fn segments(cache: &KvCache, layer: usize) -> &[Arc<Segment>] {
    match &cache.layers[layer] {
        Layer::Packed(heads) => &heads[0].segments,
        _ => &[],
    }
}

/// How many of those at the beginning have a strategy of their own.
fn settled(cache: &KvCache) -> usize {
    match &cache.layers[0] {
        Layer::Packed(heads) => heads[0].settled(),
        _ => 0,
    }
}

/// Steps through `steps` tokens, some of which the device does not see, and is brought in line with.
fn grow(gpu: &Gpu, format: KvFormat, prompt: usize, steps: usize) -> (KvCache, Mirror) {
    let threads = Threads::new(2);
    let mut on_cpu = cache(format);
    read(&mut on_cpu, &threads, prompt);
    let mut on_device = cache(format);
    read(&mut on_device, &threads, prompt);
    let mut store = Store::new(gpu, SHAPE).unwrap();
    let (mut mirror, mut attention) = (Mirror::new(&store), Attention::new(&store, 1).unwrap());
    let sequence = (&mut on_device, &mut mirror);
    let seen = |i: usize| i.is_multiple_of(7) || i % 32 <= 2;
    steps_alike((&mut store, &mut attention), &mut on_cpu, sequence, &threads, (steps, seen));
    for layer in 0..SHAPE.layers {
        let (ours, theirs) = (segments(&on_device, layer), segments(&on_cpu, layer));
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert!(
                ours.strategy == theirs.strategy && ours.pages == theirs.pages,
                "{format}: layer {layer}"
            );
        }
    }
    assert_eq!(on_device.bytes().packed, on_cpu.bytes().packed);
    (on_device, mirror)
}

/// Through encoded buffers, segments that close, and strategies that take the place of borrowed ones.
#[test]
fn a_mirror_attends_as_its_cache_does_while_it_grows() {
    let Some(gpu) = emulated(4) else { return };
    let (cache, mirror) = grow(&gpu, packed("segment=64,close=6"), 700, 420);
    let (count, settled) = (segments(&cache, 0).len(), settled(&cache));
    // Ten are the prompt's.
    assert!(settled >= 13 && count > settled, "{settled} of {count} segments are settled");
    let bytes = cache.bytes();
    let held = mirror.bytes();
    assert!(held > bytes.packed, "{held} bytes on the device of {bytes:?}");
    let free = mirror.free.clone();
    drop(mirror);
    assert!(lock(&free).contains(&0), "pages that nobody gave back");
}

/// One strategy for all, of several kinds; one segment goes on from the prompt.
#[test]
fn given_strategies_are_attended_to() {
    let Some(gpu) = emulated(4) else { return };
    for parameters in [
        "kept=0.25,group=1,block=8,selected=1",
        "kept=0.75,group=2,block=4,selected=0.3,rotation=none",
        "kept=0.125,group=4,block=16,selected=0.5",
    ] {
        let (cache, _) = grow(&gpu, packed(parameters), 600, 80);
        assert_eq!(segments(&cache, 0).len(), 1, "{parameters}");
    }
}

/// A sequence that is exact, and packed ones that differ in all but what is selected: of several segments, of sinks alone, and without pages.
#[test]
fn sequences_of_different_lengths_and_strategies_share_a_step() {
    let Some(gpu) = emulated(3) else { return };
    let threads = Threads::new(2);
    let mut store = Store::new(&gpu, SHAPE).unwrap();
    let mut attention = Attention::new(&store, 4).unwrap();
    let formats = [KvFormat::Exact, packed("segment=256"), packed("block=4"), packed("kept=0.375,group=2")];
    let mut caches = formats.map(cache);
    for (cache, tokens) in caches.iter_mut().zip([330, 1050, 3, 64]) {
        read(cache, &threads, tokens);
    }
    let mut on_cpu = caches.clone();
    let mut mirrors = [0, 1, 2, 3].map(|_| Mirror::new(&store));
    for i in 0..4 {
        let sequences = caches.iter_mut().zip(&mut mirrors);
        let mut sequences: Vec<_> =
            sequences.enumerate().map(|(s, (cache, mirror))| (cache, mirror, token(10 * s + i))).collect();
        let got = step_each(&mut store, &mut attention, &mut sequences, &threads);
        for (s, (cache, got)) in on_cpu.iter_mut().zip(got).enumerate() {
            close(&got, &step(cache, &threads, &token(10 * s + i)), &format!("sequence {s}, step {i}"));
        }
    }
    // What one gets does not depend on the others, to the bit; a clone begins with nothing.
    let mut clones = caches.clone();
    let sequences = caches.iter_mut().zip(&mut mirrors);
    let mut sequences: Vec<_> = sequences.map(|(cache, mirror)| (cache, mirror, token(99))).collect();
    let together = step_each(&mut store, &mut attention, &mut sequences, &threads);
    let mut alone = Attention::new(&store, 1).unwrap();
    for (s, (cache, mirror)) in clones.iter_mut().zip(&mirrors).enumerate().skip(1) {
        let sequence = (cache, &mut mirror.clone(), token(99));
        assert_eq!(step_each(&mut store, &mut alone, &mut [sequence], &threads)[0], together[s]);
    }
}

/// The cache whose full pages are there several times, as a stretched mirror has them.
#[test]
fn a_stretched_mirror_has_full_pages_several_times() {
    let Some(gpu) = emulated(3) else { return };
    let (threads, times) = (Threads::new(2), 3);
    let mut once = cache(packed("selected=0.2"));
    read(&mut once, &threads, 1300);
    let mut often = once.clone();
    for layer in &mut often.layers {
        let Layer::Packed(heads) = layer else { panic!("a compressed layer") };
        for segment in heads.iter_mut().flat_map(|head| &mut head.segments) {
            let segment = Arc::make_mut(segment);
            let full: Vec<_> = (0..times).flat_map(|_| segment.pages[..2].to_vec()).collect();
            segment.pages.splice(..2, full);
            let blocks = segment.pages.iter().scan(0, |blocks, page| {
                *blocks += page.blocks() as u32;
                Some(*blocks)
            });
            segment.starts = std::iter::once(0).chain(blocks).collect();
        }
    }
    let mut store = Store::new(&gpu, SHAPE).unwrap();
    let (mut mirror, mut attention) =
        (Mirror::new(&store).stretched(times, 0), Attention::new(&store, 1).unwrap());
    let sequence = (&mut once, &mut mirror);
    let seen = |i: usize| i.is_multiple_of(10) || i % 32 <= 1;
    steps_alike((&mut store, &mut attention), &mut often, sequence, &threads, (40, seen));
}

#[test]
fn too_many_segments_are_refused() {
    let Some(gpu) = emulated(1) else { return };
    let threads = Threads::new(2);
    let mut cache = cache(packed("segment=32"));
    let tokens = 4 + 257 * 32 + 32;
    for layer in 0..SHAPE.layers {
        cache.append(&threads, layer, &rows(1, tokens, KV_ROW), &rows(2, tokens, KV_ROW)).unwrap();
        cache.end_prompt(&threads, layer);
    }
    let mut store = Store::new(&gpu, SHAPE).unwrap();
    let error = Mirror::new(&store).update(&mut store, &mut cache, &threads, 1).unwrap_err().to_string();
    assert!(error.contains("segments is 257") && error.contains("at most 256"), "{error}");
}
