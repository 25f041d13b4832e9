//! The configuration of a safetensors folder: `config.json` as Hugging Face transformers writes it.
//!
//! Both spellings of the rotary settings are read: `rope_theta` with `rope_scaling`, and `rope_parameters` of
//! transformers 5.

use serde_json::{Map, Value};

use mosaickv_kv::Window;

use super::{
    Architecture, GEMMA3_FULL_EVERY, GEMMA3_LOCAL_THETA, ModelConfig, all_but_every, inverse_root, periodic,
    refuse,
};
use crate::ModelError;
use crate::rope::{RopeConfig, RopeScaling, RopeStyle};

/// A JSON object with typed getters: `Ok(None)` if the key is absent or null, an error if it has another type.
struct Object<'a>(&'a Map<String, Value>);

impl<'a> Object<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }
    fn typed<T>(
        &self,
        key: &str,
        read: fn(&'a Value) -> Option<T>,
        wanted: &str,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| refuse(key, value, wanted))
    }
    fn count(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.typed(key, |v| v.as_u64().and_then(|x| usize::try_from(x).ok()), "a whole number, at least 0")
    }
    fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.typed(key, Value::as_f64, "a number")
    }
    fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.typed(key, Value::as_bool, "true or false")
    }
    fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.typed(key, Value::as_str, "text")
    }
    fn object(&self, key: &str) -> Result<Option<Object<'a>>, ModelError> {
        Ok(self.typed(key, Value::as_object, "an object")?.map(Object))
    }
    fn need(&self, key: &str) -> Result<usize, ModelError> {
        self.count(key)?.ok_or_else(|| refuse(key, "missing", "a whole number"))
    }
}

/// The configuration, and whether the output shares the embedding (`None`: the file does not say).
pub(crate) fn read(json: &Map<String, Value>) -> Result<(ModelConfig, Option<bool>), ModelError> {
    let object = Object(json);
    let named = match object.get("architectures").and_then(|names| names.get(0)) {
        Some(name) => name.as_str().unwrap_or_default(),
        None => object.text("model_type")?.unwrap_or_default(),
    };
    let architecture = match named {
        "LlamaForCausalLM" | "llama" => Architecture::Llama,
        "MistralForCausalLM" | "mistral" => Architecture::Mistral,
        "Qwen2ForCausalLM" | "qwen2" => Architecture::Qwen2,
        "Qwen3ForCausalLM" | "qwen3" => Architecture::Qwen3,
        "SmolLM3ForCausalLM" | "smollm3" => Architecture::SmolLm3,
        "Gemma3ForCausalLM" | "gemma3_text" => Architecture::Gemma3,
        other => return Err(ModelError::Architecture { got: other.to_owned() }),
    };
    refuse_unsupported(&object, architecture)?;
    let layers = object.need("num_hidden_layers")?;
    let hidden = object.need("hidden_size")?;
    let heads = object.need("num_attention_heads")?;
    let head_dim = match object.count("head_dim")? {
        Some(head_dim) => head_dim,
        None => hidden.checked_div(heads).ok_or_else(|| refuse("num_attention_heads", 0, "at least 1"))?,
    };
    let gemma3 = architecture == Architecture::Gemma3;
    let (rope, context) = rope(&object, head_dim, if gemma3 { 1_000_000.0 } else { 10_000.0 })?;
    let sliding_window = sliding_window(&object, architecture, layers)?;
    let local = gemma3 && sliding_window.is_some();
    let scalar = match gemma3 {
        true => object.number("query_pre_attn_scalar")?.unwrap_or(256.0),
        false => head_dim as f64,
    };
    let mut config = ModelConfig {
        name: object.text("_name_or_path")?.unwrap_or_default().to_owned(),
        architecture,
        layers,
        hidden,
        heads,
        kv_heads: object.count("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        ffn: object.need("intermediate_size")?,
        vocab: object.need("vocab_size")?,
        norm_eps: object.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        context,
        embed_scale: if gemma3 { (hidden as f32).sqrt() } else { 1.0 },
        attention_scale: inverse_root(scalar),
        rope,
        local_rope: local.then(|| local_rope(&object, head_dim)).transpose()?,
        sliding_window,
        rope_layers: Vec::new(),
    };
    config.check()?;
    config.rope_layers = rope_layers(&object, &config)?;
    Ok((config, object.flag("tie_word_embeddings")?))
}

/// Settings that change the arithmetic of an otherwise supported architecture.
fn refuse_unsupported(object: &Object<'_>, architecture: Architecture) -> Result<(), ModelError> {
    if let Some(method) = object.object("quantization_config")? {
        let method = method.text("quant_method")?.unwrap_or("unnamed");
        return Err(refuse(
            "quantization_config",
            method,
            "an unquantized checkpoint, or a GGUF file of this model",
        ));
    }
    let (keys, wanted): (&[&str], &[&str]) = match architecture {
        // transformers does not read Gemma's "hidden_act".
        Architecture::Gemma3 => (&["hidden_activation"], &["gelu_pytorch_tanh"]),
        _ => (&["hidden_act", "hidden_activation"], &["silu", "swish"]),
    };
    for key in keys {
        if let Some(act) = object.text(key)?.filter(|act| !wanted.contains(act)) {
            return Err(refuse(key, act, wanted[0]));
        }
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(value) = object.number(key)?.filter(|&value| value != 0.0) {
            return Err(refuse(key, value, "this key absent"));
        }
    }
    if object.flag("use_bidirectional_attention")? == Some(true) {
        return Err(refuse("use_bidirectional_attention", true, "false"));
    }
    Ok(())
}

fn sliding_window(
    object: &Object<'_>,
    architecture: Architecture,
    layers: usize,
) -> Result<Option<Window>, ModelError> {
    let gemma3 = architecture == Architecture::Gemma3;
    let Some(tokens) = object.count("sliding_window")? else { return Ok(None) };
    let used = object.flag("use_sliding_window")?.unwrap_or(gemma3 || architecture == Architecture::Mistral);
    if !used {
        return Ok(None);
    }
    if let Some(kinds) = object.typed("layer_types", Value::as_array, "a list")? {
        if let Some(kind) =
            kinds.iter().find(|kind| *kind != "sliding_attention" && *kind != "full_attention")
        {
            return Err(refuse("layer_types", kind, "sliding_attention or full_attention"));
        }
        let windowed: Vec<bool> = kinds.iter().map(|kind| kind == "sliding_attention").collect();
        return periodic("layer_types", tokens, &windowed, layers);
    }
    if gemma3 {
        let every = object.count("sliding_window_pattern")?.unwrap_or(GEMMA3_FULL_EVERY);
        return Ok(Some(Window { tokens, full_every: Some(every) }));
    }
    let first = object.count("max_window_layers")?.unwrap_or(0);
    let windowed: Vec<bool> = (0..layers).map(|layer| layer >= first).collect();
    periodic("max_window_layers", tokens, &windowed, layers)
}

fn rope_layers(object: &Object<'_>, config: &ModelConfig) -> Result<Vec<bool>, ModelError> {
    if config.architecture != Architecture::SmolLm3 {
        return Ok(vec![true; config.layers]);
    }
    let Some(flags) = object.typed("no_rope_layers", Value::as_array, "a list")? else {
        let step = object.count("no_rope_layer_interval")?.unwrap_or(4);
        return Ok(all_but_every(config.layers, step.max(1)));
    };
    // Despite its name, 1 stands for a layer that has rotary embedding.
    let uses: Option<Vec<bool>> = flags.iter().map(|flag| Some(flag.as_u64()? != 0)).collect();
    let wanted = || format!("{} numbers, 0 or 1", config.layers);
    uses.filter(|uses| uses.len() == config.layers)
        .ok_or_else(|| refuse("no_rope_layers", format!("{} entries", flags.len()), wanted()))
}

/// The rotary settings, and the context they allow.
fn rope(object: &Object<'_>, head_dim: usize, theta: f64) -> Result<(RopeConfig, usize), ModelError> {
    let context = object.count("max_position_embeddings")?.unwrap_or(2048);
    let settings = match object.object("rope_parameters")? {
        // Where kinds of layers differ, each has settings of its own.
        Some(settings) => Some(settings.object("full_attention")?.unwrap_or(settings)),
        None => object.object("rope_scaling")?,
    };
    let empty = Map::new();
    let settings = settings.unwrap_or(Object(&empty));
    let theta = match settings.number("rope_theta")? {
        Some(theta) => theta,
        None => object.number("rope_theta")?.unwrap_or(theta),
    };
    let partial = match settings.number("partial_rotary_factor")? {
        Some(partial) => partial,
        None => object.number("partial_rotary_factor")?.unwrap_or(1.0),
    };
    let scaling = scaling(&settings, context)?;
    let reach = match scaling {
        RopeScaling::Yarn { factor, original_context, .. } => (original_context as f64 * factor) as usize,
        _ => context,
    };
    let dims = (head_dim as f64 * partial) as usize;
    Ok((RopeConfig { style: RopeStyle::Halves, theta, dims, scaling, divisors: None }, context.max(reach)))
}

/// Gemma 3's rotary settings of layers with a sliding window.
fn local_rope(object: &Object<'_>, head_dim: usize) -> Result<RopeConfig, ModelError> {
    let parameters = object.object("rope_parameters")?;
    let settings = parameters.map(|kinds| kinds.object("sliding_attention")).transpose()?.flatten();
    let (theta, scaling) = match settings {
        Some(settings) => {
            let context = object.count("max_position_embeddings")?.unwrap_or(2048);
            (settings.number("rope_theta")?, scaling(&settings, context)?)
        }
        None => (object.number("rope_local_base_freq")?, RopeScaling::None),
    };
    let theta = theta.unwrap_or(GEMMA3_LOCAL_THETA);
    Ok(RopeConfig { style: RopeStyle::Halves, theta, dims: head_dim, scaling, divisors: None })
}

fn scaling(settings: &Object<'_>, context: usize) -> Result<RopeScaling, ModelError> {
    let kind = match settings.text("rope_type")? {
        Some(kind) => kind,
        None => settings.text("type")?.unwrap_or("default"),
    };
    let need = |key: &str| {
        settings.number(key)?.ok_or_else(|| refuse(&format!("rope_scaling.{key}"), "missing", "a number"))
    };
    let original_context = settings.count("original_max_position_embeddings")?.unwrap_or(context);
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: need("factor")? }),
        "dynamic" => {
            Ok(RopeScaling::Ntk { factor: need("factor")?, original_context: context, length: context })
        }
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_context,
        }),
        "yarn" => yarn(settings, context, original_context),
        other => Err(ModelError::RopeScaling { got: other.to_owned() }),
    }
}

fn yarn(settings: &Object<'_>, context: usize, original_context: usize) -> Result<RopeScaling, ModelError> {
    if settings.flag("truncate")? == Some(false) {
        return Err(ModelError::RopeScaling { got: "yarn without truncation".to_owned() });
    }
    let given = |key: &str| Ok(settings.number(key)?.filter(|&x| x != 0.0));
    let factor = settings.number("factor")?.unwrap_or(context as f64 / original_context.max(1) as f64);
    let attention_factor = match (given("attention_factor")?, given("mscale")?, given("mscale_all_dim")?) {
        (Some(given), _, _) => given,
        (None, Some(above), Some(below)) => {
            RopeScaling::yarn_attention_factor(factor, above)
                / RopeScaling::yarn_attention_factor(factor, below)
        }
        _ => RopeScaling::yarn_attention_factor(factor, 1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_context,
        beta_fast: given("beta_fast")?.unwrap_or(32.0),
        beta_slow: given("beta_slow")?.unwrap_or(1.0),
        attention_factor,
    })
}
