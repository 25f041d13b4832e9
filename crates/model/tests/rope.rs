//! Rotary embedding against transformers' numbers (`data/rope.json`) and against itself.

use mosaickv_model::{Rope, RopeConfig, RopeScaling, RopeStyle};
use serde_json::Value;

fn plain(style: RopeStyle, dims: usize) -> RopeConfig {
    RopeConfig { style, theta: 10_000.0, dims, scaling: RopeScaling::None, divisors: None }
}

fn scaling(case: &Value) -> RopeScaling {
    let settings = &case["rope_parameters"];
    let number = |key: &str| settings[key].as_f64();
    let factor = number("factor").unwrap();
    let original = number("original_max_position_embeddings").unwrap_or(2048.0) as usize;
    match settings["rope_type"].as_str().unwrap() {
        "linear" => RopeScaling::Linear { factor },
        "dynamic" => {
            let length = case["length"].as_u64().unwrap() as usize;
            RopeScaling::Ntk { factor, original_context: 2048, length }
        }
        "yarn" => RopeScaling::Yarn {
            factor,
            original_context: original,
            beta_fast: number("beta_fast").unwrap_or(32.0),
            beta_slow: number("beta_slow").unwrap_or(1.0),
            attention_factor: case["attention_factor"].as_f64().unwrap(),
        },
        "llama3" => RopeScaling::Llama3 {
            factor,
            low_freq_factor: number("low_freq_factor").unwrap(),
            high_freq_factor: number("high_freq_factor").unwrap(),
            original_context: original,
        },
        other => panic!("{other}"),
    }
}

#[test]
fn frequencies_are_those_of_transformers() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("data/rope.json")).unwrap();
    assert_eq!(cases.len(), 16);
    for case in &cases {
        let theta = case["rope_parameters"]["rope_theta"].as_f64().unwrap();
        let config = RopeConfig { theta, scaling: scaling(case), ..plain(RopeStyle::Halves, 64) };
        let rope = Rope::new(&config);
        let wanted = case["frequencies"].as_array().unwrap();
        assert_eq!(rope.frequencies().len(), wanted.len());
        for (got, wanted) in rope.frequencies().iter().zip(wanted) {
            let wanted = wanted.as_f64().unwrap();
            // transformers works in f32
            assert!((got / wanted - 1.0).abs() < 2e-6, "{got} {wanted} {}", case["rope_parameters"]);
        }
        assert!((rope.attention_factor() - case["attention_factor"].as_f64().unwrap()).abs() < 1e-9);
    }
}

#[test]
fn yarn_s_attention_factor_is_the_paper_s() {
    assert_eq!(RopeScaling::yarn_attention_factor(1.0, 1.0), 1.0);
    assert!((RopeScaling::yarn_attention_factor(4.0, 1.0) - 1.138_629_436).abs() < 1e-8);
}

#[test]
fn a_turn_keeps_lengths_and_depends_on_distance_alone() {
    let dims = 16;
    let mut seed = 1u32;
    let mut random = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        seed as f32 / u32::MAX as f32 - 0.5
    };
    for style in [RopeStyle::Interleaved, RopeStyle::Halves] {
        let rope = Rope::new(&plain(style, dims));
        let query: Vec<f32> = (0..3 * dims).map(|_| random()).collect();
        let key: Vec<f32> = (0..3 * dims).map(|_| random()).collect();
        let score = |q: usize, k: usize| {
            let (mut query, mut key) = (query.clone(), key.clone());
            rope.apply(q, &mut query, dims);
            rope.apply(k, &mut key, dims);
            query.iter().zip(&key).map(|(a, b)| f64::from(a * b)).sum::<f64>()
        };
        assert!((score(5, 2) - score(100_003, 100_000)).abs() < 1e-5);
        let mut turned = query.clone();
        rope.apply(0, &mut turned, dims);
        assert_eq!(turned, query);
    }
}

#[test]
fn the_two_styles_are_one_rotation_of_reordered_heads() {
    let dims = 32;
    let head: Vec<f32> = (0..dims).map(|i| (i as f32 * 0.7).sin()).collect();
    let order: Vec<usize> = (0..dims).map(|at| at / 2 + (at % 2) * dims / 2).collect();
    let mut halves = head.clone();
    Rope::new(&plain(RopeStyle::Halves, dims)).apply(77, &mut halves, dims);
    let mut interleaved: Vec<f32> = order.iter().map(|&i| head[i]).collect();
    Rope::new(&plain(RopeStyle::Interleaved, dims)).apply(77, &mut interleaved, dims);
    let wanted: Vec<f32> = order.iter().map(|&i| halves[i]).collect();
    assert_eq!(interleaved, wanted);
}

#[test]
fn elements_beyond_dims_stay() {
    for style in [RopeStyle::Interleaved, RopeStyle::Halves] {
        let mut heads: Vec<f32> = (0..64).map(|i| i as f32).collect();
        Rope::new(&plain(style, 16)).apply(9, &mut heads, 32);
        assert_eq!(heads[16..32], (16..32).map(|i| i as f32).collect::<Vec<_>>());
        assert_ne!(heads[32..48], (32..48).map(|i| i as f32).collect::<Vec<_>>());
    }
}

#[test]
fn divisors_slow_their_pairs() {
    let divisors = Some(vec![1.0, 2.0, 4.0, 8.0]);
    let slow = Rope::new(&RopeConfig { divisors, ..plain(RopeStyle::Halves, 8) });
    let fast = Rope::new(&plain(RopeStyle::Halves, 8));
    let ratios: Vec<f64> = fast.frequencies().iter().zip(slow.frequencies()).map(|(a, b)| a / b).collect();
    for (ratio, wanted) in ratios.iter().zip([1.0, 2.0, 4.0, 8.0]) {
        assert!((ratio - wanted).abs() < 1e-12);
    }
}
