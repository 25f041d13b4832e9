//! From files to a model: which tensors a layer has, what shape each must have, in which order they are read.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use mosaickv_kernels::matrix::Matrix;

use crate::ModelError;
use crate::config::{self, Architecture, ModelConfig};
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
    /// RMSNorm before the feed-forward, `[hidden]`.
    pub ffn_norm: Vec<f32>,
    /// `[ffn, hidden]`; SiLU follows.
    pub gate: Matrix,
    /// `[ffn, hidden]`.
    pub up: Matrix,
    /// `[hidden, ffn]`.
    pub down: Matrix,
    /// Whether queries and keys are turned by the rotary embedding.
    pub rope: bool,
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
    let mut shards = Shards::open(folder, tied)?;
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
    Ok(Model { config, embed, layers, norm, head, rope })
}

fn read_layer(tensors: &mut dyn Tensors, config: &ModelConfig, index: usize) -> Result<Layer, ModelError> {
    let hidden = config.hidden;
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut reader = LayerReader { tensors, index };
    let qwen2 = config.architecture == Architecture::Qwen2;
    let qwen3 = config.architecture == Architecture::Qwen3;
    Ok(Layer {
        attn_norm: reader.vector(Role::AttnNorm, hidden)?,
        wq: reader.matrix(Role::Q, queries, hidden)?,
        wk: reader.matrix(Role::K, keys, hidden)?,
        wv: reader.matrix(Role::V, keys, hidden)?,
        bq: reader.optional(Role::QBias, queries, qwen2)?,
        bk: reader.optional(Role::KBias, keys, qwen2)?,
        bv: reader.optional(Role::VBias, keys, qwen2)?,
        q_norm: reader.only_if(qwen3, Role::QNorm, config.head_dim)?,
        k_norm: reader.only_if(qwen3, Role::KNorm, config.head_dim)?,
        wo: reader.matrix(Role::O, hidden, queries)?,
        ffn_norm: reader.vector(Role::FfnNorm, hidden)?,
        gate: reader.matrix(Role::Gate, config.ffn, hidden)?,
        up: reader.matrix(Role::Up, config.ffn, hidden)?,
        down: reader.matrix(Role::Down, hidden, config.ffn)?,
        rope: config.rope_layers[index],
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
