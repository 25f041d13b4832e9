//! The reference of every comparison: does the exact cache say the same however the tokens come?

use mosaickv_kernels::Pool;
use mosaickv_kernels::matrix::Precision;
use mosaickv_kv::KvFormat;
use mosaickv_model::{Model, Sequence, greedy};
use std::path::PathBuf;

/// Tokens of the prompt and tokens that follow it.
const PROMPT: usize = 700;
const NEXT: usize = 48;

#[test]
fn exact_token_by_token_is_exact_in_one_chunk() {
    let path = match std::env::var_os("MOSAICKV_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME").unwrap_or_default())
            .join(".cache/mosaickv/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    if !path.exists() {
        eprintln!(
            "SKIPPED: no model at {} (run `mosaickv demo`, or set MOSAICKV_TEST_MODEL)",
            path.display()
        );
        return;
    }
    let (model, text) = Model::load(&path, &mut |_, _| ()).unwrap();
    let document = include_str!("../../mosaickv/demo/document.txt");
    let tokens = text.encode_plain(document).unwrap();
    let pool = Pool::new(2);
    let sequence = Sequence::new(&model, &pool, KvFormat::Exact).unwrap();
    let mut whole = sequence.with_precision(Precision::Full);
    whole.prefill(&tokens[..PROMPT], &mut |_, _| ()).unwrap();
    let mut steps = whole.compressed(KvFormat::Exact).unwrap();
    let mut chunk = Vec::new();
    whole.score(&tokens[PROMPT..PROMPT + NEXT], &mut |_, logits| chunk.push(logits.to_vec())).unwrap();
    let (mut kl, mut ties) = (0.0, 0);
    for (token, chunk) in tokens[PROMPT..].iter().zip(&chunk) {
        let step = steps.step(*token).unwrap();
        let (p, q) = (log_softmax(chunk), log_softmax(&step));
        kl += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>() / NEXT as f64;
        let (a, b) = (greedy(chunk) as usize, greedy(&step) as usize);
        if a != b {
            ties += 1;
            assert!((p[a] - p[b]).abs() < 1e-3, "{a} and {b} are no tie: {} and {}", p[a], p[b]);
        }
    }
    println!("KL {kl:.2e}, {ties} ties of {NEXT}");
    assert!((-1e-9..1e-4).contains(&kl), "KL {kl}");
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    logits.iter().map(|&x| f64::from(x - max) - sum.ln()).collect()
}
