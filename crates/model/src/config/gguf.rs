//! The configuration of a GGUF file: its `general.*` and `{architecture}.*` metadata.
//!
//! Key names: the GGUF specification and llama.cpp's `llama-arch.cpp`.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;

use mosaickv_kv::Window;

use super::{
    Architecture, GEMMA3_FULL_EVERY, GEMMA3_LOCAL_THETA, ModelConfig, all_but_every, inverse_root, periodic,
    refuse,
};
use crate::ModelError;
use crate::rope::{RopeConfig, RopeScaling, RopeStyle};

/// Metadata with typed getters: `Ok(None)` if the key is absent, an error if it has another type.
pub(crate) struct Metadata<'a>(pub &'a HashMap<String, Value>);

impl<'a> Metadata<'a> {
    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        let number = match *value {
            Value::U8(x) => Some(u64::from(x)),
            Value::U16(x) => Some(u64::from(x)),
            Value::U32(x) => Some(u64::from(x)),
            Value::U64(x) => Some(x),
            Value::I8(x) => u64::try_from(x).ok(),
            Value::I16(x) => u64::try_from(x).ok(),
            Value::I32(x) => u64::try_from(x).ok(),
            Value::I64(x) => u64::try_from(x).ok(),
            _ => None,
        };
        let size = number.and_then(|x| usize::try_from(x).ok());
        size.map(Some).ok_or_else(|| self.mistyped(key, "a whole number, at least 0"))
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::F32(x)) => Ok(Some(f64::from(*x))),
            Some(Value::F64(x)) => Ok(Some(*x)),
            Some(_) => self.count(key).map(|x| x.map(|x| x as f64)),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::String(x)) => Ok(Some(x)),
            Some(_) => Err(self.mistyped(key, "text")),
        }
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Bool(x)) => Ok(Some(*x)),
            Some(_) => Err(self.mistyped(key, "true or false")),
        }
    }

    pub(crate) fn list(&self, key: &str) -> Result<Option<&'a [Value]>, ModelError> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Array(x)) => Ok(Some(x)),
            Some(_) => Err(self.mistyped(key, "a list")),
        }
    }

    fn mistyped(&self, key: &str, wanted: &str) -> ModelError {
        refuse(key, format!("a value of another type ({:?})", self.0[key].value_type()), wanted)
    }
}

pub(crate) fn missing(key: &str) -> ModelError {
    refuse(key, "missing", "a value")
}

/// Getters below one architecture's prefix.
struct Section<'a> {
    metadata: &'a Metadata<'a>,
    prefix: &'a str,
}

impl Section<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }
    fn count(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.metadata.count(&self.key(key))
    }
    fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.metadata.number(&self.key(key))
    }
    fn need(&self, key: &str) -> Result<usize, ModelError> {
        self.count(key)?.ok_or_else(|| missing(&self.key(key)))
    }
}

/// Reads the configuration. `vocab` is the embedding's rows, `divisors` the `rope_freqs.weight` tensor if there is one.
pub(crate) fn read(
    metadata: &Metadata<'_>,
    vocab: usize,
    divisors: Option<Vec<f32>>,
) -> Result<ModelConfig, ModelError> {
    let prefix = metadata.text("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
    let architecture = match prefix {
        "llama" => Architecture::Llama,
        "mistral" | "mistral3" => Architecture::Mistral,
        "qwen2" => Architecture::Qwen2,
        "qwen3" => Architecture::Qwen3,
        "smollm3" => Architecture::SmolLm3,
        "gemma3" => Architecture::Gemma3,
        other => return Err(ModelError::Architecture { got: other.to_owned() }),
    };
    let section = Section { metadata, prefix };
    refuse_unsupported(&section)?;
    let layers = section.need("block_count")?;
    let hidden = section.need("embedding_length")?;
    let heads = section.need("attention.head_count")?;
    let head_dim = match section.count("attention.key_length")? {
        Some(length) => length,
        None => hidden.checked_div(heads).ok_or_else(|| refuse("query heads", 0, "at least 1"))?,
    };
    if section.count("attention.value_length")?.is_some_and(|length| length != head_dim) {
        return Err(refuse(&section.key("attention.value_length"), "another number", format!("{head_dim}")));
    }
    let style = match architecture {
        Architecture::Llama | Architecture::Mistral | Architecture::SmolLm3 => RopeStyle::Interleaved,
        Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Gemma3 => RopeStyle::Halves,
    };
    let mut context = section.need("context_length")?;
    let scaling = rope_scaling(&section, context)?;
    if let RopeScaling::Yarn { factor, original_context, .. } = scaling {
        context = context.max((original_context as f64 * factor) as usize);
    }
    let mut config = ModelConfig {
        name: metadata.text("general.name")?.unwrap_or_default().to_owned(),
        architecture,
        layers,
        hidden,
        heads,
        kv_heads: section.count("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        ffn: section.need("feed_forward_length")?,
        vocab,
        norm_eps: section
            .number("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| missing(&section.key("attention.layer_norm_rms_epsilon")))?
            as f32,
        context,
        embed_scale: 1.0,
        attention_scale: inverse_root(head_dim as f64),
        rope: RopeConfig {
            style,
            theta: section.number("rope.freq_base")?.unwrap_or(10_000.0),
            dims: section.count("rope.dimension_count")?.unwrap_or(head_dim),
            scaling,
            divisors,
        },
        local_rope: None,
        sliding_window: window(&section, architecture, layers)?,
        rope_layers: Vec::new(),
    };
    if architecture == Architecture::Gemma3 {
        gemma3(&section, &mut config)?;
    }
    config.check()?;
    check_divisors(&config)?;
    let step = if architecture == Architecture::SmolLm3 { 4 } else { usize::MAX };
    config.rope_layers = all_but_every(layers, step);
    Ok(config)
}

/// Keys that change the arithmetic of an otherwise supported architecture.
fn refuse_unsupported(section: &Section<'_>) -> Result<(), ModelError> {
    if section.count("expert_count")?.is_some_and(|experts| experts > 0) {
        return Err(ModelError::Architecture { got: format!("{} with experts (a mixture)", section.prefix) });
    }
    for key in [
        "attention.temperature_scale",
        "attention.scale",
        "rope.scaling.yarn_log_multiplier",
        "residual_scale",
        "embedding_scale",
        "logit_scale",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ] {
        if let Some(value) = section.number(key)?.filter(|&value| value != 0.0) {
            return Err(refuse(&section.key(key), value, "this key absent"));
        }
    }
    Ok(())
}

fn window(
    section: &Section<'_>,
    architecture: Architecture,
    layers: usize,
) -> Result<Option<Window>, ModelError> {
    let Some(tokens) = section.count("attention.sliding_window")?.filter(|&tokens| tokens > 0) else {
        return Ok(None);
    };
    let key = section.key("attention.sliding_window_pattern");
    if let Some(Value::Array(list)) = section.metadata.0.get(&key) {
        // Whether each layer has a window.
        let windowed: Option<Vec<bool>> = list
            .iter()
            .map(|value| match *value {
                Value::Bool(flag) => Some(flag),
                _ => None,
            })
            .collect();
        let windowed =
            windowed.ok_or_else(|| refuse(&key, "a list of other things", "true or false each"))?;
        return periodic(&key, tokens, &windowed, layers);
    }
    let default = (architecture == Architecture::Gemma3).then_some(GEMMA3_FULL_EVERY);
    Ok(Some(Window { tokens, full_every: section.metadata.count(&key)?.or(default) }))
}

/// What Gemma 3 has beside the others. Its 27B model divides queries by the root of another number than head_dim,
/// which no key says; llama.cpp too knows it by its 62 layers.
fn gemma3(section: &Section<'_>, config: &mut ModelConfig) -> Result<(), ModelError> {
    const LAYERS_OF_27B: usize = 62;
    config.embed_scale = (config.hidden as f32).sqrt();
    if config.layers == LAYERS_OF_27B && config.heads > 0 {
        config.attention_scale = inverse_root((config.hidden / config.heads) as f64);
    }
    let theta = section.number("rope.freq_base_swa")?.unwrap_or(GEMMA3_LOCAL_THETA);
    let dims = config.rope.dims;
    config.local_rope = config.sliding_window.map(|_| RopeConfig {
        style: RopeStyle::Halves,
        theta,
        dims,
        scaling: RopeScaling::None,
        divisors: None,
    });
    Ok(())
}

fn rope_scaling(section: &Section<'_>, context: usize) -> Result<RopeScaling, ModelError> {
    let kind = section.metadata.text(&section.key("rope.scaling.type"))?;
    let factor = match section.number("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => section.number("rope.scale_linear")?, // before "rope.scaling.*" existed
    };
    let need = || factor.ok_or_else(|| missing(&section.key("rope.scaling.factor")));
    match kind {
        Some("none") => Ok(RopeScaling::None),
        // llama.cpp's default type; a factor of 0 or 1 says nothing.
        None => Ok(match factor {
            Some(factor) if factor != 0.0 && factor != 1.0 => RopeScaling::Linear { factor },
            _ => RopeScaling::None,
        }),
        Some("linear") => Ok(RopeScaling::Linear { factor: need()? }),
        Some("yarn") => {
            let factor = need()?;
            let weight = section.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
            Ok(RopeScaling::Yarn {
                factor,
                original_context: section.count("rope.scaling.original_context_length")?.unwrap_or(context),
                beta_fast: section.number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: section.number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                attention_factor: weight * RopeScaling::yarn_attention_factor(factor, 1.0),
            })
        }
        Some(other) => Err(ModelError::RopeScaling { got: other.to_owned() }),
    }
}

fn check_divisors(config: &ModelConfig) -> Result<(), ModelError> {
    let Some(divisors) = &config.rope.divisors else { return Ok(()) };
    let name = || "rope_freqs.weight".to_owned();
    if divisors.len() != config.rope.dims / 2 {
        return Err(ModelError::Shape {
            name: name(),
            got: vec![divisors.len()],
            wanted: vec![config.rope.dims / 2],
        });
    }
    match divisors.iter().position(|x| !(x.is_finite() && *x > 0.0)) {
        Some(index) => Err(ModelError::NotFinite { name: name(), index, value: divisors[index] }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A Gemma 3 file's metadata with some keys changed.
    fn gemma3(changes: &[(&str, Value)]) -> Result<ModelConfig, ModelError> {
        let count = |key: &str, x: u32| (format!("gemma3.{key}"), Value::U32(x));
        let mut metadata = HashMap::from([
            ("general.architecture".to_owned(), Value::String("gemma3".to_owned())),
            count("block_count", 12),
            count("embedding_length", 640),
            count("feed_forward_length", 2048),
            count("attention.head_count", 4),
            count("attention.head_count_kv", 1),
            count("attention.key_length", 256),
            count("attention.sliding_window", 512),
            count("context_length", 32_768),
            ("gemma3.attention.layer_norm_rms_epsilon".to_owned(), Value::F32(1e-6)),
            ("gemma3.rope.freq_base".to_owned(), Value::F32(1e6)),
        ]);
        metadata.extend(changes.iter().map(|(key, value)| (format!("gemma3.{key}"), value.clone())));
        read(&Metadata(&metadata), 1000, None)
    }

    #[test]
    fn windows_and_scales_are_gemma_s() {
        let plain = gemma3(&[]).unwrap();
        assert_eq!(plain.sliding_window, Some(Window { tokens: 512, full_every: Some(6) }));
        assert_eq!((plain.attention_scale, plain.rope.theta), (1.0 / 16.0, 1e6));
        assert_eq!(plain.local_rope.map(|rope| rope.theta), Some(10_000.0));
        let list = |flags: &[bool]| Value::Array(flags.iter().map(|&flag| Value::Bool(flag)).collect());
        let pattern = "attention.sliding_window_pattern";
        let third: Vec<bool> = (1..=12).map(|layer| layer % 3 != 0).collect();
        for (value, wanted) in [
            (Value::U32(4), Some(Window { tokens: 512, full_every: Some(4) })),
            (list(&third), Some(Window { tokens: 512, full_every: Some(3) })),
            (list(&[true; 12]), Some(Window { tokens: 512, full_every: None })),
            (list(&[false; 12]), None),
        ] {
            assert_eq!(gemma3(&[(pattern, value)]).unwrap().sliding_window, wanted);
        }
        let none = gemma3(&[("attention.sliding_window", Value::U32(0))]).unwrap();
        assert_eq!((none.sliding_window, none.local_rope), (None, None));
        let base = gemma3(&[("rope.freq_base_swa", Value::F32(500.0))]).unwrap();
        assert_eq!(base.local_rope.map(|rope| rope.theta), Some(500.0));
        // The 27B model: 5376 / 32 = 168.
        let large = [("block_count", 62), ("embedding_length", 5376), ("attention.head_count", 32)];
        let large = large.map(|(key, x)| (key, Value::U32(x)));
        assert_eq!(gemma3(&large).unwrap().attention_scale, inverse_root(168.0));
    }

    #[test]
    fn what_would_change_the_arithmetic_is_refused() {
        let irregular =
            Value::Array([true, true, false, true].repeat(3).into_iter().map(Value::Bool).collect());
        for (key, value) in [
            ("final_logit_softcapping", Value::F32(30.0)),
            ("attn_logit_softcapping", Value::F32(50.0)),
            ("attention.sliding_window_pattern", Value::U32(0)),
            ("attention.sliding_window_pattern", irregular),
            ("attention.sliding_window_pattern", Value::Array(vec![Value::Bool(true)])),
            ("attention.sliding_window_pattern", Value::Array(vec![Value::U32(1); 12])),
            ("rope.freq_base_swa", Value::F32(f32::NAN)),
        ] {
            assert!(gemma3(&[(key, value)]).is_err(), "{key} was taken");
        }
        assert!(gemma3(&[("final_logit_softcapping", Value::F32(0.0))]).is_ok());
    }
}
