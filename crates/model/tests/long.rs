//! Long generation on a real model: output segments close, get strategies of their own, and are swapped in, and what is
//! generated does not depend on who works them out or how long that takes. And several sequences at once.

mod common;

use common::SMOLLM2;
use mosaickv_kernels::Pool;
use mosaickv_kv::{Background, KvFormat, Swaps, Timing};
use mosaickv_model::{Sequence, Specials, greedy, step_each};
use std::sync::Arc;

const PROMPT: usize = 4000;
const OUTPUT: usize = 4000;

#[test]
fn four_thousand_tokens_after_four_thousand_do_not_depend_on_timing() {
    let Some((model, text)) = &*SMOLLM2 else { return };
    let novel = include_str!("data/thursday.txt");
    let once = text.encode(novel, Specials::Literal).unwrap();
    let prompt: Vec<u32> = once.into_iter().cycle().take(PROMPT).collect();
    let pool = Pool::new(2);
    let format: KvFormat = "packed:close=128".parse().unwrap();
    let generate = |mut sequence: Sequence| {
        let mut next = greedy(&sequence.prefill(&prompt, &mut |_, _| ()).unwrap());
        let (mut swaps, mut tokens, mut shrank) = (Swaps::default(), vec![], 0);
        for _ in 0..OUTPUT {
            tokens.push(next);
            let before = sequence.cache().bytes();
            next = greedy(&sequence.step(next).unwrap());
            let cache = sequence.cache();
            if cache.swaps() != swaps {
                swaps = cache.swaps();
                cache.check().unwrap();
                // Raw keys and values go when their segment is done.
                shrank += usize::from(cache.bytes().raw < before.raw);
            }
        }
        let cache = sequence.cache();
        cache.check().unwrap();
        assert_eq!(cache.tokens(), PROMPT + OUTPUT);
        let tokens_in: usize = cache.segments().iter().map(|segment| segment.tokens).sum();
        // All but sinks and update buffer, in each of 90 heads.
        let expected = 90 * (PROMPT + OUTPUT - 4 - 64)..=90 * (PROMPT + OUTPUT - 4 - 32);
        assert!(expected.contains(&tokens_in), "{tokens_in} tokens in segments");
        assert!(shrank > 0, "raw bytes never went");
        (tokens, swaps, cache.segments())
    };
    let own = generate(Sequence::new(model, &pool, format).unwrap());
    assert!(own.1.swapped >= 3 * 90, "{:?}: hardly a segment closed", own.1);
    let background = Arc::new(Background::new(1, usize::MAX));
    let sequence = Sequence::new(model, &pool, format).unwrap();
    let shared = generate(sequence.with_background(background, Timing::Fixed));
    assert_eq!(own, shared);
}

#[test]
fn sequences_step_together_as_they_do_alone() {
    let Some((model, text)) = &*SMOLLM2 else { return };
    let tokens = text.encode(include_str!("data/thursday.txt"), Specials::Literal).unwrap();
    let pool = Pool::new(2);
    let mut alone: Vec<Sequence> = ["exact", "packed", "packed:segment=96", "q8_0", "kivi2"]
        .iter()
        .enumerate()
        .map(|(i, format)| {
            let mut sequence = Sequence::new(model, &pool, format.parse().unwrap()).unwrap();
            sequence.prefill(&tokens[..200 + 37 * i], &mut |_, _| ()).unwrap();
            sequence
        })
        .collect();
    let mut together = alone.clone();
    for step in 0..40 {
        let fed: Vec<u32> = (0..alone.len()).map(|i| tokens[500 + step + i]).collect();
        let mut borrowed: Vec<&mut Sequence> = together.iter_mut().collect();
        let logits = step_each(&mut borrowed, &fed).unwrap();
        for ((sequence, &token), row) in
            alone.iter_mut().zip(&fed).zip(logits.chunks_exact(model.config.vocab))
        {
            assert!(sequence.step(token).unwrap() == row, "step {step}, {}", sequence.cache().format());
        }
    }
}
