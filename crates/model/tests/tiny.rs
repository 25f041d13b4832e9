//! The tiny random checkpoints of `scripts/make_tiny_checkpoints.py`: both file formats load, agree with each other,
//! and describe the model that transformers built.

use std::path::{Path, PathBuf};

use mosaickv_kernels::Pool;
use mosaickv_kernels::matrix::Matrix;
use mosaickv_kv::{KvFormat, Window};
use mosaickv_model::{
    Architecture, LayerRope, Message, Model, ModelConfig, RopeScaling, RopeStyle, Sequence, Specials, Text,
};
use serde_json::{Map, Value, json};

const FAMILIES: [&str; 6] = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3"];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn load(name: &str) -> (Model, Text) {
    Model::load(&data(name), &mut |_, _| ()).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn rows(matrix: &Matrix) -> Vec<Vec<f32>> {
    let row = |r| {
        let mut out = vec![0.0; matrix.cols()];
        matrix.row(r, &mut out);
        out
    };
    (0..matrix.rows()).map(row).collect()
}

/// Rows of queries or keys as a GGUF file of the llama family has them.
fn interleaved(rows: &[Vec<f32>], head_dim: usize) -> Vec<Vec<f32>> {
    let from = |row: usize| {
        let (head, at) = (row / head_dim, row % head_dim);
        head * head_dim + at / 2 + (at % 2) * head_dim / 2
    };
    (0..rows.len()).map(|row| rows[from(row)].clone()).collect()
}

#[test]
fn both_formats_bring_the_same_weights() {
    for family in FAMILIES {
        let (folder, _) = load(family);
        let (file, _) = load(&format!("{family}.gguf"));
        assert_eq!(rows(&folder.embed), rows(&file.embed), "{family}");
        assert_eq!(folder.norm, file.norm, "{family}");
        assert_eq!(folder.head.as_ref().map(rows), file.head.as_ref().map(rows), "{family}");
        let head_dim = folder.config.head_dim;
        let permuted = file.config.rope.style == RopeStyle::Interleaved;
        let order = |matrix: &Matrix| match permuted {
            true => interleaved(&rows(matrix), head_dim),
            false => rows(matrix),
        };
        for (a, b) in folder.layers.iter().zip(&file.layers) {
            assert_eq!(order(&a.wq), rows(&b.wq), "{family}");
            assert_eq!(order(&a.wk), rows(&b.wk), "{family}");
            for (x, y) in
                [(&a.wv, &b.wv), (&a.wo, &b.wo), (&a.gate, &b.gate), (&a.up, &b.up), (&a.down, &b.down)]
            {
                assert_eq!(rows(x), rows(y), "{family}");
            }
            assert_eq!((&a.attn_norm, &a.ffn_norm), (&b.attn_norm, &b.ffn_norm), "{family}");
            assert_eq!((&a.bq, &a.bk, &a.bv), (&b.bq, &b.bk, &b.bv), "{family}");
            assert_eq!(
                (&a.post_attn_norm, &a.post_ffn_norm),
                (&b.post_attn_norm, &b.post_ffn_norm),
                "{family}"
            );
            assert_eq!((&a.q_norm, &a.k_norm, a.rope), (&b.q_norm, &b.k_norm, b.rope), "{family}");
        }
    }
}

#[test]
fn both_formats_describe_the_same_model() {
    for family in FAMILIES {
        let (folder, _) = load(family);
        let (file, _) = load(&format!("{family}.gguf"));
        let neutral = |config: &ModelConfig| {
            let mut config = config.clone();
            config.name.clear();
            config.architecture = Architecture::Llama; // GGUF calls Mistral "llama"
            config.rope.style = RopeStyle::Halves;
            config.rope.divisors = None;
            if let RopeScaling::Llama3 { .. } = config.rope.scaling {
                config.rope.scaling = RopeScaling::None; // in GGUF as divisors
            }
            config
        };
        assert_eq!(neutral(&folder.config), neutral(&file.config), "{family}");
        assert_eq!(folder.rope.frequencies().len(), file.rope.frequencies().len());
        for (a, b) in folder.rope.frequencies().iter().zip(file.rope.frequencies()) {
            assert!((a / b - 1.0).abs() < 2e-7, "{family}: {a} {b}");
        }
        assert_eq!(folder.rope.attention_factor(), file.rope.attention_factor(), "{family}");
    }
}

#[test]
fn each_family_has_its_peculiarities() {
    let (llama, _) = load("llama");
    assert_eq!(llama.config.architecture, Architecture::Llama);
    assert!(matches!(llama.config.rope.scaling, RopeScaling::Llama3 { .. }));
    assert!(llama.head.is_some() && llama.layers.len() == 2);
    assert_eq!((llama.config.heads, llama.config.kv_heads, llama.config.head_dim), (4, 2, 16));
    assert_eq!((llama.config.hidden, llama.config.ffn, llama.config.vocab), (32, 32, 288));

    let (mistral, _) = load("mistral");
    assert_eq!(mistral.config.architecture, Architecture::Mistral);
    assert_eq!(mistral.config.sliding_window, Some(Window { tokens: 16, full_every: None }));
    assert_eq!(mistral.context(), 256);

    let (qwen2, _) = load("qwen2");
    assert!(qwen2.layers.iter().all(|l| l.bq.is_some() && l.bk.is_some() && l.bv.is_some()));
    assert!(qwen2.head.is_none());
    assert!(matches!(qwen2.config.rope.scaling, RopeScaling::Yarn { .. }));
    assert_eq!(qwen2.config.context, 256);
    assert_eq!(qwen2.config.sliding_window, None);

    let (qwen3, _) = load("qwen3");
    assert!(qwen3.layers.iter().all(|l| l.q_norm.is_some() && l.k_norm.is_some() && l.bq.is_none()));

    let (smollm3, _) = load("smollm3.gguf");
    let ropes = |model: &Model| model.layers.iter().map(|layer| layer.rope).collect::<Vec<_>>();
    assert_eq!(ropes(&smollm3), [LayerRope::Model, LayerRope::Model, LayerRope::Model, LayerRope::Off]);

    let (gemma3, _) = load("gemma3.gguf");
    assert_eq!(gemma3.config.sliding_window, Some(Window { tokens: 9, full_every: Some(2) }));
    assert_eq!(ropes(&gemma3), [LayerRope::Local, LayerRope::Model, LayerRope::Local, LayerRope::Model]);
    assert_eq!(gemma3.config.rope.scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(gemma3.config.local_rope.as_ref().map(|rope| rope.theta), Some(10_000.0));
    assert_eq!((gemma3.config.rope.theta, gemma3.config.embed_scale), (1_000_000.0, 32.0f32.sqrt()));
    assert!(gemma3.layers.iter().all(|l| l.q_norm.is_some() && l.post_attn_norm.is_some()));
    assert!(gemma3.layers.iter().all(|l| l.post_ffn_norm.is_some()) && gemma3.head.is_none());
}

/// Older files spell windows and rotary bases otherwise, and the scale of attention need not be head_dim's.
#[test]
fn gemma_s_older_spellings_say_the_same() {
    let parent = std::env::temp_dir().join(format!("mosaickv-tiny-{}", std::process::id()));
    let folder = parent.join("gemma3"); // the model takes its name from it
    std::fs::create_dir_all(&folder).unwrap();
    for entry in data("gemma3").read_dir().unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let path = folder.join("config.json");
    let mut json: Map<String, Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for key in ["rope_parameters", "layer_types", "_sliding_window_pattern"] {
        json.remove(key);
    }
    json.insert("rope_theta".into(), json!(1_000_000.0));
    json.insert("rope_local_base_freq".into(), json!(10_000.0));
    json.insert("rope_scaling".into(), json!({"rope_type": "linear", "factor": 8.0}));
    json.insert("sliding_window_pattern".into(), json!(2));
    let (new, _) = load("gemma3");
    let read = |json: &Map<String, Value>| {
        std::fs::write(&path, serde_json::to_vec(json).unwrap()).unwrap();
        Model::load(&folder, &mut |_, _| ()).unwrap().0
    };
    assert_eq!(read(&json).config, new.config);
    json.insert("query_pre_attn_scalar".into(), json!(64));
    let mut scaled = read(&json);
    assert_eq!((scaled.config.attention_scale, new.config.attention_scale), (0.125, 0.25));
    // Half the scale of attention is undone by queries of twice the length.
    for layer in &mut scaled.layers {
        layer.q_norm.as_mut().unwrap().iter_mut().for_each(|weight| *weight *= 2.0);
    }
    let pool = Pool::new(1);
    let logits = |model: &Model| {
        let mut sequence = Sequence::new(model, &pool, KvFormat::Exact).unwrap();
        sequence.prefill(&(1..40).collect::<Vec<_>>(), &mut |_, _| ()).unwrap()
    };
    assert_eq!(logits(&scaled), logits(&new));
    std::fs::remove_dir_all(&parent).unwrap();
}

#[test]
fn both_formats_bring_the_same_text() {
    let samples =
        ["Writes the tiny random models, don't you?", "  spaces\n\n\tand 123 e\u{301} 😀", "<|im_start|>x"];
    for family in FAMILIES {
        let (_, folder) = load(family);
        let (_, file) = load(&format!("{family}.gguf"));
        assert_eq!((folder.eos(), folder.bos()), (file.eos(), file.bos()));
        assert_eq!(file.eos(), [0, 2]);
        for sample in samples {
            for specials in [Specials::Written, Specials::Added, Specials::Literal] {
                let ids = folder.encode(sample, specials).unwrap();
                // GGUF's "qwen2" composes letters first, this tokenizer.json does not.
                if !sample.contains('\u{301}') {
                    assert_eq!(ids, file.encode(sample, specials).unwrap(), "{family} {sample:?}");
                }
                if specials == Specials::Literal {
                    assert_eq!(folder.decode(&ids).unwrap(), sample);
                }
            }
        }
        let messages = [Message { role: "user".into(), content: "Hi".into() }];
        let prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(folder.chat(&messages).unwrap(), prompt);
        assert_eq!(file.chat(&messages).unwrap(), prompt);
    }
}

#[test]
fn progress_reaches_its_total() {
    let mut seen = Vec::new();
    Model::load(&data("qwen3.gguf"), &mut |done, total| seen.push((done, total))).unwrap();
    assert_eq!(seen, [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]);
}
