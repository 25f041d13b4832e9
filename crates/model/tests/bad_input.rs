//! Files that are damaged, hostile or of the wrong kind: each is refused with an error that names the trouble.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use mosaickv_model::{Model, ModelError};
use serde_json::{Map, Value, json};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn refused(bytes: &[u8]) -> ModelError {
    match Model::read_gguf(Cursor::new(bytes), &mut |_, _| ()) {
        Ok(_) => panic!("was accepted"),
        Err(e) => e,
    }
}

fn tiny() -> Vec<u8> {
    std::fs::read(data("qwen3.gguf")).unwrap()
}

/// Where `needle` begins; it must be there once.
fn find(bytes: &[u8], needle: &[u8]) -> usize {
    let mut found = bytes.windows(needle.len()).enumerate().filter(|(_, w)| *w == needle).map(|(at, _)| at);
    let at = found.next().unwrap_or_else(|| panic!("{:?} is not there", String::from_utf8_lossy(needle)));
    assert!(found.next().is_none());
    at
}

/// The tiny file with the `value` of a metadata key overwritten.
fn with_value(key: &str, value: &[u8]) -> Vec<u8> {
    let mut bytes = tiny();
    let at = find(&bytes, key.as_bytes()) + key.len() + 4;
    bytes[at..at + value.len()].copy_from_slice(value);
    bytes
}

/// The tiny file with `value` at `offset` behind a tensor's name: rank (0), dimensions (4, 12), then type and offset.
fn with_tensor(name: &str, offset: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = tiny();
    let at = find(&bytes, name.as_bytes()) + name.len() + offset;
    bytes[at..at + value.len()].copy_from_slice(value);
    bytes
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = tiny();
    let step = bytes.len() / 97;
    for length in (0..bytes.len()).step_by(step).chain([0, 3, 4, 8, 16, 24, bytes.len() - 1]) {
        let e = refused(&bytes[..length]);
        assert!(matches!(e, ModelError::Gguf { .. }), "{length}: {e}");
    }
    assert!(refused(&bytes[..bytes.len() - 1]).to_string().contains("cut short"));
}

#[test]
fn other_files_and_versions_are_refused() {
    assert!(refused(b"PK\x03\x04 a zip file, not a model").to_string().contains("does not begin with"));
    let mut bytes = tiny();
    bytes[4] = 1;
    assert!(refused(&bytes).to_string().contains("version 1"));
}

#[test]
fn hostile_counts_lengths_and_offsets_are_refused_before_memory_is_asked_for() {
    let huge = u64::MAX.to_le_bytes();
    for at in [8, 16] {
        let mut bytes = tiny();
        bytes[at..at + 8].copy_from_slice(&huge); // tensors; metadata entries
        assert!(matches!(refused(&bytes), ModelError::Gguf { .. }));
    }
    let key = "general.architecture";
    let cases = [
        with_value(key, &huge), // length of a text
        with_value(key, &(1u64 << 40).to_le_bytes()),
        with_value("tokenizer.ggml.tokens", &[8, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 127]),
        with_value("tokenizer.ggml.tokens", &9u32.to_le_bytes()), // a list of lists
        with_value("tokenizer.ggml.tokens", &99u32.to_le_bytes()), // of an unknown type
        with_tensor("blk.0.attn_q.weight", 0, &5u32.to_le_bytes()), // dimensions
        with_tensor("blk.0.attn_q.weight", 4, &huge),
        with_tensor("blk.0.attn_q.weight", 4, &0u64.to_le_bytes()),
        with_tensor("blk.0.attn_q.weight", 4, &(1u64 << 33).to_le_bytes()),
        with_tensor("blk.0.attn_q.weight", 24, &(1u64 << 40).to_le_bytes()), // offset
        with_tensor("blk.0.attn_q.weight", 24, &1u64.to_le_bytes()),
        with_tensor("blk.0.attn_q.weight", 24, &0u64.to_le_bytes()), // over another tensor
    ];
    for (case, bytes) in cases.iter().enumerate() {
        let e = refused(bytes);
        assert!(matches!(e, ModelError::Gguf { .. }), "{case}: {e}");
    }
}

#[test]
fn an_alignment_of_zero_is_refused() {
    // "general.alignment" has as many letters as no key of the tiny file, so a file of one key is made.
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(17u64.to_le_bytes());
    bytes.extend(b"general.alignment");
    bytes.extend(4u32.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    assert!(refused(&bytes).to_string().contains("alignment 0"));
}

#[test]
fn unreadable_weight_types_are_named() {
    let e = refused(&with_tensor("blk.0.attn_q.weight", 20, &16u32.to_le_bytes()));
    assert!(matches!(&e, ModelError::TensorType { got, .. } if got == "IQ2_XXS"), "{e}");
}

#[test]
fn unknown_architectures_and_missing_keys_are_named() {
    let mut bytes = tiny();
    let at = find(&bytes, b"general.architecture") + 20 + 4 + 8;
    bytes[at..at + 5].copy_from_slice(b"mamba");
    let e = refused(&bytes);
    assert!(matches!(&e, ModelError::Architecture { got } if got == "mamba"), "{e}");
    assert!(e.to_string().contains("smollm3"), "{e}");

    let mut bytes = tiny();
    let at = find(&bytes, b"qwen3.block_count");
    bytes[at..at + 17].copy_from_slice(b"qwen3.block_cOunt");
    let e = refused(&bytes);
    assert!(matches!(&e, ModelError::Config { key, .. } if key == "qwen3.block_count"), "{e}");
}

#[test]
fn sizes_that_no_model_has_are_refused() {
    for (key, value) in [
        ("qwen3.block_count", u32::MAX),
        ("qwen3.embedding_length", 0),
        ("qwen3.attention.head_count", 0),
        ("qwen3.attention.head_count_kv", 3),
        ("qwen3.attention.key_length", 17),
        ("qwen3.rope.dimension_count", 3),
        ("qwen3.context_length", 0),
    ] {
        // head_count is also the beginning of head_count_kv: the key's length tells them apart.
        let mut bytes = tiny();
        let mut needle = (key.len() as u64).to_le_bytes().to_vec();
        needle.extend(key.as_bytes());
        let at = find(&bytes, &needle) + needle.len() + 4;
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let e = refused(&bytes);
        assert!(matches!(e, ModelError::Config { .. }), "{key}: {e}");
    }
}

#[test]
fn one_layer_more_or_fewer_than_there_are_tensors_for_is_refused() {
    let e = refused(&with_value("qwen3.block_count", &3u32.to_le_bytes()));
    assert!(matches!(&e, ModelError::MissingTensor { name } if name.starts_with("blk.2.")), "{e}");
    let e = refused(&with_value("qwen3.block_count", &1u32.to_le_bytes()));
    assert!(matches!(&e, ModelError::ExtraTensor { name, .. } if name.starts_with("blk.1.")), "{e}");
}

#[test]
fn shapes_are_held_against_the_configuration() {
    let e = refused(&with_value("qwen3.feed_forward_length", &48u32.to_le_bytes()));
    assert!(
        matches!(&e, ModelError::Shape { got, wanted, .. } if *got == [32, 32] && *wanted == [48, 32]),
        "{e}"
    );
}

#[test]
fn nan_in_a_norm_is_refused() {
    let mut bytes = tiny();
    let last = bytes.len() - 32 * 4; // output_norm.weight is among the tensors; write NaN over every f32-sized one
    for at in (last..bytes.len()).step_by(4) {
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    }
    let e = refused(&bytes);
    assert!(matches!(&e, ModelError::NotFinite { .. } | ModelError::Matrix { .. }), "{e}");
}

#[test]
fn bad_vocabularies_are_refused() {
    let mut bytes = tiny();
    let at = find(&bytes, b"tokenizer.ggml.pre") + 18 + 4 + 8;
    bytes[at..at + 5].copy_from_slice(b"mamba");
    let e = refused(&bytes);
    assert!(matches!(e, ModelError::Tokenizer { .. }) && e.to_string().contains("llama-bpe"), "{e}");

    let mut bytes = tiny();
    let at = find(&bytes, b"tokenizer.ggml.model") + 20 + 4 + 8;
    bytes[at..at + 4].copy_from_slice(b"bert");
    assert!(refused(&bytes).to_string().contains("gpt2 or llama"));

    let e = refused(&with_value("tokenizer.ggml.eos_token_id", &9999u32.to_le_bytes()));
    assert!(e.to_string().contains("eos_token_id is 9999"), "{e}");
}

/// A copy of a tiny folder, gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn of(family: &str, test: &str) -> Folder {
        // Tests run side by side, and may give the same name.
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let made = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("mosaickv-bad-input-{}-{made}-{test}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        for file in std::fs::read_dir(data(family)).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), path.join(file.file_name())).unwrap();
        }
        Folder(path)
    }

    fn refused(&self) -> ModelError {
        match Model::load(&self.0, &mut |_, _| ()) {
            Ok(_) => panic!("was accepted"),
            Err(e) => e,
        }
    }

    fn edit(&self, file: &str, edit: impl Fn(&mut Map<String, Value>)) {
        let path = self.0.join(file);
        let mut json: Map<String, Value> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut json);
        std::fs::write(path, serde_json::to_vec(&json).unwrap()).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn missing_files_are_named() {
    let e = Model::load(Path::new("/no/such/model.gguf"), &mut |_, _| ()).err().unwrap();
    assert!(matches!(&e, ModelError::Io { path, .. } if path.ends_with("model.gguf")), "{e}");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = Folder::of("mistral", "missing");
        std::fs::remove_file(folder.0.join(file)).unwrap();
        let e = folder.refused();
        assert!(matches!(&e, ModelError::Io { path, .. } if path.ends_with(file)), "{e}");
    }
}

#[test]
fn cut_safetensors_are_refused() {
    let folder = Folder::of("mistral", "cut");
    let path = folder.0.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for length in [8, 100, 2000, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let e = folder.refused();
        assert!(matches!(e, ModelError::Damaged { .. }), "{length}: {e}");
    }
    let mut long = bytes.clone();
    long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&path, &long).unwrap();
    assert!(matches!(folder.refused(), ModelError::Damaged { .. }));
}

#[test]
fn an_index_cannot_lead_out_of_the_folder() {
    let folder = Folder::of("llama", "index");
    folder.edit("model.safetensors.index.json", |index| {
        index["weight_map"]["model.norm.weight"] = json!("../other/model.safetensors");
    });
    assert!(folder.refused().to_string().contains("folder in it"));
    folder.edit("model.safetensors.index.json", |index| {
        index.remove("weight_map");
    });
    assert!(folder.refused().to_string().contains("no weight_map"));
}

#[test]
fn a_configuration_that_is_not_supported_says_which_key() {
    let edits: BTreeMap<&str, (Value, &str)> = BTreeMap::from([
        ("architectures", (json!(["MambaForCausalLM"]), "MambaForCausalLM")),
        ("hidden_act", (json!("gelu"), "hidden_act is gelu")),
        ("quantization_config", (json!({"quant_method": "awq"}), "quantization_config is awq")),
        ("rope_scaling", (json!({"rope_type": "longrope", "factor": 2.0}), "rope scaling \"longrope\"")),
        ("num_attention_heads", (json!("four"), "num_attention_heads is \"four\"")),
        ("rope_theta", (json!(-1.0), "rope theta is -1")),
        ("rms_norm_eps", (json!(-1.0), "norm epsilon is -1")),
        ("vocab_size", (json!(256), "token 287 in a model of 256 embeddings")),
        ("sliding_window", (json!(0), "sliding window is 0")),
        ("num_hidden_layers", (json!(100_000), "layers is 100000")),
    ]);
    for (key, (value, wanted)) in edits {
        let folder = Folder::of("mistral", key);
        folder.edit("config.json", |config| {
            config.insert(key.to_owned(), value.clone());
        });
        let e = folder.refused().to_string();
        assert!(e.contains(wanted), "{key}: {e}");
    }
}

#[test]
fn unused_biases_and_mixed_windows_are_refused() {
    // Qwen2's biases in a model that calls itself Qwen3.
    let folder = Folder::of("qwen2", "windows");
    folder.edit("config.json", |config| {
        config.insert("use_sliding_window".into(), json!(true));
        config.insert("sliding_window".into(), json!(8));
        config.insert("max_window_layers".into(), json!(1));
        config.remove("layer_types");
    });
    assert!(folder.refused().to_string().contains("max_window_layers"));

    let folder = Folder::of("qwen3", "norms");
    folder.edit("config.json", |config| {
        config.insert("architectures".into(), json!(["LlamaForCausalLM"]));
    });
    let e = folder.refused();
    assert!(matches!(&e, ModelError::ExtraTensor { name, .. } if name.contains("_norm")), "{e}");
}

#[test]
fn a_gemma_of_another_kind_says_which_key() {
    let kinds = |kinds: [&str; 4]| json!(kinds.map(|kind| format!("{kind}_attention")));
    let edits = [
        ("final_logit_softcapping", json!(30.0), "final_logit_softcapping is 30"),
        ("attn_logit_softcapping", json!(50.0), "attn_logit_softcapping is 50"),
        ("use_bidirectional_attention", json!(true), "use_bidirectional_attention is true"),
        ("hidden_activation", json!("silu"), "hidden_activation is silu"),
        ("query_pre_attn_scalar", json!(0), "attention scale is inf"),
        ("sliding_window", json!(0), "sliding window is 0"),
        ("layer_types", kinds(["full", "sliding", "full", "sliding"]), "layer_types is some layers"),
        ("layer_types", kinds(["sliding", "full", "full", "full"]), "layer_types is some layers"),
        ("layer_types", kinds(["sliding", "full", "sliding", "chunked"]), "chunked_attention"),
        ("layer_types", json!(["full_attention"]), "layer_types is 1 entries"),
    ];
    for (key, value, wanted) in edits {
        let folder = Folder::of("gemma3", key);
        folder.edit("config.json", |config| {
            config.insert(key.to_owned(), value.clone());
        });
        let e = folder.refused().to_string();
        assert!(e.contains(wanted), "{key}: {e}");
    }
}

#[test]
fn template_errors_are_the_template_s_own_words() {
    let folder = Folder::of("mistral", "template");
    let load = || Model::load(&folder.0, &mut |_, _| ()).unwrap().1;
    let chat = [mosaickv_model::Message { role: "user".into(), content: "Hi".into() }];

    let mut text = load();
    text.replace_template("{{ raise_exception('roles must alternate') }}").unwrap();
    assert!(text.chat(&chat).unwrap_err().to_string().contains("roles must alternate"));
    assert!(text.replace_template("{% for x in").is_err());
    text.replace_template(
        "{% for i in range(10000) %}{% for i in range(10000) %}{{ i }}{% endfor %}{% endfor %}",
    )
    .unwrap();
    assert!(matches!(text.chat(&chat), Err(ModelError::Template { .. })));
    text.replace_template(
        "{%- for m in messages -%}{%- generation -%}{{ m.content.strip() | tojson }}{%- endgeneration -%}{%- endfor -%}\
         {{ {'a': [1, 2]} | tojson }}{{ tools is none }}{{ eos_token }}",
    )
    .unwrap();
    let made = text.chat(&chat).unwrap();
    assert!(made.starts_with("\"Hi\"{\"a\": [1, 2]}") && made.to_lowercase().contains("true<|"), "{made}");

    folder.edit("tokenizer_config.json", |settings| {
        settings.remove("chat_template");
    });
    assert!(matches!(load().chat(&chat), Err(ModelError::NoTemplate)));
}
