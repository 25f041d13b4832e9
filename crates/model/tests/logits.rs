//! What was loaded gives the logits that transformers gives: a forward pass in f64, slow and without a cache, over
//! both formats of every tiny checkpoint. Nobody may optimize it.

use std::path::Path;

use mosaickv_kernels::matrix::Matrix;
use mosaickv_model::{Architecture, Layer, LayerRope, Model};
use serde_json::Value;

fn row(matrix: &Matrix, r: usize) -> Vec<f64> {
    let mut out = vec![0.0; matrix.cols()];
    matrix.row(r, &mut out);
    out.into_iter().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn multiply(matrix: &Matrix, x: &[f64], bias: Option<&Vec<f32>>) -> Vec<f64> {
    let bias = |r: usize| bias.map_or(0.0, |bias| f64::from(bias[r]));
    (0..matrix.rows()).map(|r| dot(&row(matrix, r), x) + bias(r)).collect()
}

fn norm(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    let scale = 1.0 / (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x * scale * f64::from(*w)).collect()
}

/// Queries or keys of one token `[n, D]`: normed and turned, as the layer asks.
fn heads(model: &Model, layer: &Layer, x: Vec<f64>, weight: Option<&Vec<f32>>, position: usize) -> Vec<f64> {
    let d = model.config.head_dim;
    let mut x = x;
    if let Some(weight) = weight {
        x = x.chunks(d).flat_map(|head| norm(head, weight, model.config.norm_eps)).collect();
    }
    let rope = match layer.rope {
        LayerRope::Off => return x,
        LayerRope::Model => &model.rope,
        LayerRope::Local => model.local_rope.as_ref().unwrap(),
    };
    let mut single: Vec<f32> = x.iter().map(|&x| x as f32).collect();
    rope.apply(position, &mut single, d);
    single.into_iter().map(f64::from).collect()
}

fn attend(model: &Model, index: usize, xs: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let (config, layer) = (&model.config, &model.layers[index]);
    let (d, scale) = (config.head_dim, f64::from(config.attention_scale));
    let window = config.sliding_window.filter(|window| window.applies_to(index));
    let mut queries = Vec::new();
    let mut keys = Vec::new();
    let mut values = Vec::new();
    for (t, x) in xs.iter().enumerate() {
        let x = norm(x, &layer.attn_norm, config.norm_eps);
        let query = multiply(&layer.wq, &x, layer.bq.as_ref());
        let key = multiply(&layer.wk, &x, layer.bk.as_ref());
        queries.push(heads(model, layer, query, layer.q_norm.as_ref(), t));
        keys.push(heads(model, layer, key, layer.k_norm.as_ref(), t));
        values.push(multiply(&layer.wv, &x, layer.bv.as_ref()));
    }
    let out = |t: usize| {
        let first = window.map_or(0, |window| (t + 1).saturating_sub(window.tokens));
        let mut out = Vec::new();
        for h in 0..config.heads {
            let g = h / (config.heads / config.kv_heads);
            let span = g * d..(g + 1) * d;
            let query = &queries[t][h * d..(h + 1) * d];
            let scores: Vec<f64> =
                (first..=t).map(|s| (dot(query, &keys[s][span.clone()]) * scale).exp()).collect();
            let sum: f64 = scores.iter().sum();
            let mix =
                |i: usize| (first..=t).map(|s| scores[s - first] * values[s][g * d + i]).sum::<f64>() / sum;
            out.extend((0..d).map(mix));
        }
        after(model, layer.post_attn_norm.as_ref(), multiply(&layer.wo, &out, None))
    };
    (0..xs.len()).map(out).collect()
}

fn feed_forward(model: &Model, layer: &Layer, x: &[f64]) -> Vec<f64> {
    let x = norm(x, &layer.ffn_norm, model.config.norm_eps);
    let gate = multiply(&layer.gate, &x, None);
    let up = multiply(&layer.up, &x, None);
    let silu = |g: f64| g / (1.0 + (-g).exp());
    let gelu =
        |g: f64| 0.5 * g * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044_715 * g.powi(3))).tanh());
    let gemma3 = model.config.architecture == Architecture::Gemma3;
    let activate = |&g: &f64| if gemma3 { gelu(g) } else { silu(g) };
    let inner: Vec<f64> = gate.iter().map(activate).zip(&up).map(|(g, u)| g * u).collect();
    after(model, layer.post_ffn_norm.as_ref(), multiply(&layer.down, &inner, None))
}

/// The norm after attention or feed-forward, where there is one.
fn after(model: &Model, weight: Option<&Vec<f32>>, x: Vec<f64>) -> Vec<f64> {
    match weight {
        Some(weight) => norm(&x, weight, model.config.norm_eps),
        None => x,
    }
}

fn logits(model: &Model, tokens: &[usize]) -> Vec<Vec<f64>> {
    let scale = f64::from(model.config.embed_scale);
    let embed = |&token: &usize| row(&model.embed, token).into_iter().map(|x| x * scale).collect();
    let mut xs: Vec<Vec<f64>> = tokens.iter().map(embed).collect();
    let add = |x: &mut Vec<f64>, y: Vec<f64>| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    for (index, layer) in model.layers.iter().enumerate() {
        let attended = attend(model, index, &xs);
        xs.iter_mut().zip(attended).for_each(|(x, y)| add(x, y));
        for x in &mut xs {
            let y = feed_forward(model, layer, x);
            add(x, y);
        }
    }
    let head = model.head.as_ref().unwrap_or(&model.embed);
    xs.iter().map(|x| multiply(head, &norm(x, &model.norm, model.config.norm_eps), None)).collect()
}

#[test]
fn every_tiny_checkpoint_gives_the_logits_of_transformers() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    for family in ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3"] {
        let expected = std::fs::read(data.join(family).join("expected.json")).unwrap();
        let expected: Value = serde_json::from_slice(&expected).unwrap();
        let numbers = |key: &str| -> Vec<usize> {
            expected[key].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as usize).collect()
        };
        for name in [family.to_owned(), format!("{family}.gguf")] {
            let (model, _) = Model::load(&data.join(&name), &mut |_, _| ()).unwrap();
            let got = logits(&model, &numbers("tokens"));
            let mut worst = 0.0f64;
            for (index, position) in numbers("positions").into_iter().enumerate() {
                let wanted = expected["logits"][index].as_array().unwrap();
                assert_eq!(got[position].len(), wanted.len());
                for (got, wanted) in got[position].iter().zip(wanted) {
                    worst = worst.max((got - wanted.as_f64().unwrap()).abs());
                }
            }
            println!("{name}: off by at most {worst:.1e}");
            assert!(worst < 2e-5, "{name}: off by {worst}"); // transformers works in f32; logits reach 4
        }
    }
}
