//! Prompts whose pages the device encodes, against those that the host does.

use super::*;
use crate::Dropping;

/// A cache with a prompt that waits to be compressed.
fn waiting(format: Format, tokens: usize, threads: &Threads) -> KvCache {
    let mut cache = cache(KvFormat::Layered(format)).remember_places();
    for layer in 0..SHAPE.layers {
        let seed = 10 * layer as u64;
        let (keys, values) = (rows(seed + 1, tokens, KV_ROW), rows(seed + 2, tokens, KV_ROW));
        cache.append(threads, layer, &keys, &values).unwrap();
        cache.attend(threads, layer, &asking(seed + 3, tokens), &mut vec![0.0; tokens * Q_ROW]);
    }
    cache
}

fn saved(cache: &KvCache) -> Vec<u8> {
    let mut out = vec![];
    cache.write(&mut out).unwrap();
    out
}

/// The cache compressed with the mirror's encoder, and how many layers the device encoded.
fn compressed(
    cache: &KvCache,
    store: &mut Store,
    mirror: &mut Mirror,
    threads: &Threads,
) -> Result<(KvCache, usize), KvError> {
    let mut cache = cache.clone();
    mirror.update(store, &mut cache, threads, 0)?;
    let encoder = mirror.encoder(store, &cache);
    assert!(encoder.is_some() && cache.begin_finish_prompt(2, |_| encoder));
    assert!(cache.begin_finish_prompt(2, |_| panic!("an encoder too many")), "it was begun");
    cache.finish_prompt(threads);
    let made = mirror.made.lock().unwrap().len();
    Ok((cache, made))
}

/// With tokens that are dropped from heads, and prompts that end within a page.
#[test]
fn pages_are_encoded_to_the_bit_of_the_hosts() {
    let Some(gpu) = emulated(4) else { return };
    let threads = Threads::new(2);
    let any = |ratio| Format { target: Target::Ratio(ratio), drop: Dropping::Any, ..Format::default() };
    let guarded = |ratio| Format { drop: Dropping::Guarded, ..any(ratio) };
    for (format, tokens) in [(guarded(3.0), 2048), (guarded(8.0), 2345), (any(20.0), 2100)] {
        let before = waiting(format, tokens, &threads);
        let mut want = before.clone();
        want.finish_prompt(&threads);
        let mut store = Store::new(&gpu, SHAPE).unwrap();
        let mut mirror = Mirror::new(&store);
        let (mut got, made) = compressed(&before, &mut store, &mut mirror, &threads).unwrap();
        assert_eq!(made, SHAPE.layers, "layers that the device encoded");
        assert!(saved(&got) == saved(&want), "{format:?}, {tokens} tokens");
        assert_eq!(got.bytes(), want.bytes());
        if format == any(20.0) {
            assert!(dropped(&got) > 0, "no token is dropped");
        }
        // What stayed on the device is what it would have been sent.
        let mut fresh = (want, mirror.clone());
        mirror.update(&mut store, &mut got, &threads, 1).unwrap();
        assert!(mirror.made.lock().unwrap().is_empty());
        let mut attention = Attention::new(&store, 1).unwrap();
        for i in 0..2 {
            let ours = (&mut got, &mut mirror, token(i));
            let ours = step_each(&mut store, &mut attention, &mut [ours], &threads);
            let theirs = (&mut fresh.0, &mut fresh.1, token(i));
            let theirs = step_each(&mut store, &mut attention, &mut [theirs], &threads);
            assert!(ours == theirs, "{format:?}, {tokens} tokens, step {i}");
        }
    }
}

fn dropped(cache: &KvCache) -> usize {
    let of_layer = |layer: &Layer| match layer {
        Layer::Layered(heads) => heads.iter().map(|head| head.prompt.dropped).sum(),
        _ => 0,
    };
    cache.layers.iter().map(of_layer).sum()
}

/// The host encodes what the device has no memory for: nothing, one layer or all.
#[test]
fn without_memory_the_host_encodes() {
    let Some(whole) = emulated(4) else { return };
    let threads = Threads::new(2);
    let before = waiting(Format::default(), 2100, &threads);
    let mut want = before.clone();
    want.finish_prompt(&threads);
    let mut seen = [false; SHAPE.layers + 1];
    for budget in (2800..5200).step_by(200) {
        let gpu = whole.with_budget(budget << 10);
        let mut store = Store::new(&gpu, SHAPE).unwrap();
        let mut mirror = Mirror::new(&store);
        let (got, made) = compressed(&before, &mut store, &mut mirror, &threads).unwrap();
        assert!(saved(&got) == saved(&want), "{budget} KiB, {made} layers on the device");
        seen[made] = true;
        if made == SHAPE.layers {
            break;
        }
    }
    assert_eq!(seen, [true; SHAPE.layers + 1], "layers that the device encoded");
}

/// A mirror that is not in line with its cache has no encoder, nor one of a cache in another format.
#[test]
fn what_the_device_does_not_hold_it_does_not_encode() {
    let Some(gpu) = emulated(4) else { return };
    let threads = Threads::new(2);
    let mut store = Store::new(&gpu, SHAPE).unwrap();
    let mut mirror = Mirror::new(&store);
    let mut cache = waiting(Format::default(), 2100, &threads);
    assert!(mirror.encoder(&store, &cache).is_none(), "nothing is there");
    mirror.update(&mut store, &mut cache, &threads, 0).unwrap();
    assert!(mirror.encoder(&store, &cache).is_some());
    cache.append(&threads, 0, &rows(1, 1, KV_ROW), &rows(2, 1, KV_ROW)).unwrap();
    cache.append(&threads, 1, &rows(1, 1, KV_ROW), &rows(2, 1, KV_ROW)).unwrap();
    assert!(mirror.encoder(&store, &cache).is_none(), "a token is not there");
}
