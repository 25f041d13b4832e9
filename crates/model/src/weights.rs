//! From files to a model: which tensors a layer has, what shape each must have, in which order they are read.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;
use std::sync::Arc;

use mosaickv_kernels::matrix::Matrix;
use mosaickv_kv::Calibration;

use crate::ModelError;
use crate::config::{self, Architecture, ModelConfig};
use crate::device::Device;
use crate::gguf::Gguf;
use crate::rope::Rope;
use crate::shards::{Shards, read_json};
use crate::source::{Role, Tensors};
use crate::text::Text;

/// One transformer layer. Matrices are `[out, in]`.
pub struct Layer {
    /// RMSNorm before attention, `[hidden]`.
    pub attn_norm: Vec<f32>,
    /// Queries, `[H * D, hidden]`.
    pub wq: Matrix,
    /// Keys, `[G * D, hidden]`.
    pub wk: Matrix,
    /// Values, `[G * D, hidden]`.
    pub wv: Matrix,
    /// Added to queries, `[H * D]`.
    pub bq: Option<Vec<f32>>,
    /// Added to keys, `[G * D]`.
    pub bk: Option<Vec<f32>>,
    /// Added to values, `[G * D]`.
    pub bv: Option<Vec<f32>>,
    /// RMSNorm of every query head before it is turned, `[D]`.
    pub q_norm: Option<Vec<f32>>,
    /// RMSNorm of every key head before it is turned, `[D]`.
    pub k_norm: Option<Vec<f32>>,
    /// Output of attention, `[hidden, H * D]`.
    pub wo: Matrix,
    /// RMSNorm of what attention adds to the residual stream, `[hidden]`.
    pub post_attn_norm: Option<Vec<f32>>,
    /// RMSNorm before the feed-forward, `[hidden]`.
    pub ffn_norm: Vec<f32>,
    /// `[ffn, hidden]`; SiLU or GELU follows.
    pub gate: Matrix,
    /// `[ffn, hidden]`.
    pub up: Matrix,
    /// `[hidden, ffn]`.
    pub down: Matrix,
    /// RMSNorm of what the feed-forward adds to the residual stream, `[hidden]`.
    pub post_ffn_norm: Option<Vec<f32>>,
    /// How queries and keys are turned.
    pub rope: LayerRope,
}

/// Which rotary embedding a layer uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerRope {
    /// None.
    Off,
    /// The model's.
    Model,
    /// The one of layers with a sliding window.
    Local,
}

/// A model ready to run.
pub struct Model {
    /// Sizes and constants.
    pub config: ModelConfig,
    /// Token embedding, `[vocab, hidden]`.
    pub embed: Matrix,
    /// `[L]`.
    pub layers: Vec<Layer>,
    /// RMSNorm before the output, `[hidden]`.
    pub norm: Vec<f32>,
    /// Output, `[vocab, hidden]`; `None`: the embedding serves as output too.
    pub head: Option<Matrix>,
    /// Rotary embedding.
    pub rope: Rope,
    /// Rotary embedding of the layers that are [`LayerRope::Local`].
    pub local_rope: Option<Rope>,
    /// Where passes are computed; `None`: on the CPU.
    pub device: Option<Device>,
    /// What the layered format needs to know; `None` until somebody [calibrates](crate::calibrate).
    pub calibration: Option<Arc<Calibration>>,
}

impl Model {
    /// Reads a GGUF file, or a folder with `config.json`, `tokenizer.json` and safetensors.
    ///
    /// `progress` is called with pieces read and pieces in all, a piece being about a layer.
    pub fn load(path: &Path, progress: &mut dyn FnMut(usize, usize)) -> Result<(Model, Text), ModelError> {
        if path.is_dir() {
            return load_folder(path, progress);
        }
        let file = File::open(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
        let (mut model, text) = Model::read_gguf(BufReader::new(file), progress)?;
        name_by_path(&mut model.config, path);
        Ok((model, text))
    }

    /// [`Model::load`] of a GGUF file that is already open, or in memory.
    pub fn read_gguf<R: Read + Seek>(
        reader: R,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(Model, Text), ModelError> {
        let mut gguf = Gguf::open(reader)?;
        let divisors = gguf.rope_divisors()?;
        let config = config::gguf::read(&gguf.metadata(), gguf.vocab()?, divisors)?;
        let text = Text::from_gguf(&gguf.metadata())?;
        text.fits(config.vocab)?;
        let model = read_tensors(&mut gguf, config, None, progress)?;
        Ok((model, text))
    }
}

fn load_folder(folder: &Path, progress: &mut dyn FnMut(usize, usize)) -> Result<(Model, Text), ModelError> {
    let json = read_json(&folder.join("config.json"))?;
    let (mut config, tied) = config::hf::read(&json)?;
    name_by_path(&mut config, folder);
    let text = Text::from_folder(folder, &json)?;
    text.fits(config.vocab)?;
    let mut shards = Shards::open(folder, config.architecture, tied)?;
    let model = read_tensors(&mut shards, config, tied, progress)?;
    Ok((model, text))
}

fn name_by_path(config: &mut ModelConfig, path: &Path) {
    if config.name.is_empty() {
        config.name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    }
}

/// Reads every tensor of the architecture. `tied` as in the file: `None` means that a missing output matrix is fine.
fn read_tensors(
    tensors: &mut dyn Tensors,
    config: ModelConfig,
    tied: Option<bool>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Model, ModelError> {
    let total = config.layers + 2;
    let (vocab, hidden) = (config.vocab, config.hidden);
    progress(0, total);
    let embed = tensors.matrix(&tensors.name(Role::Embed, 0), vocab, hidden)?;
    progress(1, total);
    let mut layers = Vec::new();
    for index in 0..config.layers {
        layers.push(read_layer(tensors, &config, index)?);
        progress(index + 2, total);
    }
    let norm = tensors.vector(&tensors.name(Role::Norm, 0), hidden)?;
    let name = tensors.name(Role::Head, 0);
    let wanted = tied == Some(false) || tensors.contains(&name);
    let head = wanted.then(|| tensors.matrix(&name, vocab, hidden)).transpose()?;
    if let Some(name) = tensors.left_over() {
        return Err(ModelError::ExtraTensor { name, architecture: config.architecture.name() });
    }
    progress(total, total);
    let rope = Rope::new(&config.rope);
    let local_rope = config.local_rope.as_ref().map(Rope::new);
    Ok(Model { config, embed, layers, norm, head, rope, local_rope, device: None, calibration: None })
}

fn read_layer(tensors: &mut dyn Tensors, config: &ModelConfig, index: usize) -> Result<Layer, ModelError> {
    let hidden = config.hidden;
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut reader = LayerReader { tensors, index };
    let qwen2 = config.architecture == Architecture::Qwen2;
    let gemma3 = config.architecture == Architecture::Gemma3;
    let head_norms = gemma3 || config.architecture == Architecture::Qwen3;
    let windowed = config.sliding_window.is_some_and(|window| window.applies_to(index));
    Ok(Layer {
        attn_norm: reader.vector(Role::AttnNorm, hidden)?,
        wq: reader.matrix(Role::Q, queries, hidden)?,
        wk: reader.matrix(Role::K, keys, hidden)?,
        wv: reader.matrix(Role::V, keys, hidden)?,
        bq: reader.optional(Role::QBias, queries, qwen2)?,
        bk: reader.optional(Role::KBias, keys, qwen2)?,
        bv: reader.optional(Role::VBias, keys, qwen2)?,
        q_norm: reader.only_if(head_norms, Role::QNorm, config.head_dim)?,
        k_norm: reader.only_if(head_norms, Role::KNorm, config.head_dim)?,
        wo: reader.matrix(Role::O, hidden, queries)?,
        post_attn_norm: reader.only_if(gemma3, Role::PostAttnNorm, hidden)?,
        ffn_norm: reader.vector(Role::FfnNorm, hidden)?,
        gate: reader.matrix(Role::Gate, config.ffn, hidden)?,
        up: reader.matrix(Role::Up, config.ffn, hidden)?,
        down: reader.matrix(Role::Down, hidden, config.ffn)?,
        post_ffn_norm: reader.only_if(gemma3, Role::PostFfnNorm, hidden)?,
        rope: match config.rope_layers[index] {
            false => LayerRope::Off,
            true if windowed && config.local_rope.is_some() => LayerRope::Local,
            true => LayerRope::Model,
        },
    })
}

struct LayerReader<'a> {
    tensors: &'a mut dyn Tensors,
    index: usize,
}

impl LayerReader<'_> {
    fn matrix(&mut self, role: Role, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        let name = self.tensors.name(role, self.index);
        self.tensors.matrix(&name, rows, cols)
    }

    fn vector(&mut self, role: Role, length: usize) -> Result<Vec<f32>, ModelError> {
        let name = self.tensors.name(role, self.index);
        self.tensors.vector(&name, length)
    }

    /// Any family may bring biases; `needed` families must.
    fn optional(&mut self, role: Role, length: usize, needed: bool) -> Result<Option<Vec<f32>>, ModelError> {
        let there = self.tensors.contains(&self.tensors.name(role, self.index));
        (needed || there).then(|| self.vector(role, length)).transpose()
    }

    fn only_if(&mut self, has: bool, role: Role, length: usize) -> Result<Option<Vec<f32>>, ModelError> {
        has.then(|| self.vector(role, length)).transpose()
    }
}
