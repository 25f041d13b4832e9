//! Tensors of a safetensors folder: one file, or several listed in `model.safetensors.index.json`.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use mosaickv_kernels::matrix::{BlockType, Matrix};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::{Map, Value};

use crate::ModelError;
use crate::config::Architecture;
use crate::source::{Role, Tensors, blocks, finite, shaped};

const LONGEST_HEADER: u64 = 100 << 20; // the format's own limit

pub(crate) struct Shards {
    shards: Vec<Shard>,
    at: HashMap<String, usize>, // tensor name -> shard
    read: HashSet<String>,
    tied: bool,
    architecture: Architecture,
}

struct Shard {
    path: PathBuf,
    file: File,
    header: Metadata,
    data: u64, // offset of the first tensor byte
}

impl Shards {
    /// Opens the folder's index, or its one file. `tied`: a stored output matrix is a copy of the embedding.
    pub(crate) fn open(
        folder: &Path,
        architecture: Architecture,
        tied: Option<bool>,
    ) -> Result<Shards, ModelError> {
        let index = folder.join("model.safetensors.index.json");
        let files = if index.exists() { listed(&index)? } else { vec!["model.safetensors".to_owned()] };
        let mut shards = Vec::new();
        let mut at = HashMap::new();
        for file in files {
            let shard = Shard::open(&folder.join(file))?;
            at.extend(shard.header.offset_keys().into_iter().map(|name| (name, shards.len())));
            shards.push(shard);
        }
        Ok(Shards { shards, at, read: HashSet::new(), tied: tied == Some(true), architecture })
    }

    /// Type, and bytes of a tensor whose shape is as wanted.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<(BlockType, Vec<u8>), ModelError> {
        let shard = self.at.get(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })?;
        self.read.insert(name.to_owned());
        self.shards[*shard].tensor(name, shape)
    }
}

impl Tensors for Shards {
    fn name(&self, role: Role, layer: usize) -> String {
        let gemma3 = self.architecture == Architecture::Gemma3;
        let part = match role {
            Role::Embed => return "model.embed_tokens.weight".to_owned(),
            Role::Norm => return "model.norm.weight".to_owned(),
            Role::Head => return "lm_head.weight".to_owned(),
            Role::AttnNorm => "input_layernorm.weight",
            Role::Q => "self_attn.q_proj.weight",
            Role::K => "self_attn.k_proj.weight",
            Role::V => "self_attn.v_proj.weight",
            Role::QBias => "self_attn.q_proj.bias",
            Role::KBias => "self_attn.k_proj.bias",
            Role::VBias => "self_attn.v_proj.bias",
            Role::QNorm => "self_attn.q_norm.weight",
            Role::KNorm => "self_attn.k_norm.weight",
            Role::O => "self_attn.o_proj.weight",
            // Gemma has one after attention, and calls the next one by its place.
            Role::FfnNorm if gemma3 => "pre_feedforward_layernorm.weight",
            Role::PostAttnNorm | Role::FfnNorm => "post_attention_layernorm.weight",
            Role::Gate => "mlp.gate_proj.weight",
            Role::Up => "mlp.up_proj.weight",
            Role::Down => "mlp.down_proj.weight",
            Role::PostFfnNorm => "post_feedforward_layernorm.weight",
        };
        format!("model.layers.{layer}.{part}")
    }

    fn contains(&self, name: &str) -> bool {
        self.at.contains_key(name) && !(self.tied && name == "lm_head.weight")
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        let (kind, bytes) = self.tensor(name, &[rows, cols])?;
        blocks(name, kind, (rows, cols), &bytes)
    }

    fn vector(&mut self, name: &str, length: usize) -> Result<Vec<f32>, ModelError> {
        let (kind, bytes) = self.tensor(name, &[length])?;
        let mut values = finite(name, floats(kind, &bytes))?;
        // Gemma's checkpoints store what a norm's weight is above 1.
        if self.architecture == Architecture::Gemma3 && name.ends_with("norm.weight") {
            values.iter_mut().for_each(|weight| *weight += 1.0);
        }
        Ok(values)
    }

    fn left_over(&self) -> Option<String> {
        let harmless =
            |name: &str| name.ends_with("rotary_emb.inv_freq") || (self.tied && name == "lm_head.weight");
        self.at.keys().find(|name| !self.read.contains(*name) && !harmless(name)).cloned()
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Shard, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let damaged = |what: String| ModelError::Damaged { path: path.to_owned(), what };
        let mut file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(io)?;
        let length = u64::from_le_bytes(length);
        if length > LONGEST_HEADER.min(size - 8) {
            return Err(damaged(format!("a header of {length} bytes in a file of {size}")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(io)?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|e| damaged(e.to_string()))?;
        let (data, wanted) = (8 + length, header.data_len() as u64);
        if size - data != wanted {
            return Err(damaged(format!("{} bytes of tensors, wanted {wanted}: cut short", size - data)));
        }
        Ok(Shard { path: path.to_owned(), file, header, data })
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<(BlockType, Vec<u8>), ModelError> {
        let io = |source| ModelError::Io { path: self.path.clone(), source };
        let info =
            self.header.info(name).ok_or_else(|| ModelError::MissingTensor { name: name.to_owned() })?;
        shaped(name, &info.shape, shape)?;
        let kind = match info.dtype {
            Dtype::F32 => BlockType::F32,
            Dtype::F16 => BlockType::F16,
            Dtype::BF16 => BlockType::Bf16,
            other => {
                return Err(ModelError::TensorType { name: name.to_owned(), got: format!("{other:?}") });
            }
        };
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        self.file.seek(SeekFrom::Start(self.data + start as u64)).map_err(io)?;
        self.file.read_exact(&mut bytes).map_err(io)?;
        Ok((kind, bytes))
    }
}

/// The files an index names, each once. Names that lead out of the folder are refused.
fn listed(index: &Path) -> Result<Vec<String>, ModelError> {
    let json = read_json(index)?;
    let damaged = |what: &str| ModelError::Damaged { path: index.to_owned(), what: what.to_owned() };
    let map = json.get("weight_map").and_then(Value::as_object).ok_or_else(|| damaged("no weight_map"))?;
    let mut files: Vec<String> = Vec::new();
    for file in map.values() {
        let file = file.as_str().ok_or_else(|| damaged("a file name that is not text"))?;
        if Path::new(file).file_name().is_none_or(|name| name != file) {
            return Err(damaged("a file name with a folder in it"));
        }
        files.push(file.to_owned());
    }
    files.sort_unstable();
    files.dedup();
    Ok(files)
}

/// A JSON file whose top is an object.
pub(crate) fn read_json(path: &Path) -> Result<Map<String, Value>, ModelError> {
    let text = std::fs::read(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
    serde_json::from_slice(&text)
        .map_err(|e| ModelError::Damaged { path: path.to_owned(), what: e.to_string() })
}

fn floats(kind: BlockType, bytes: &[u8]) -> Vec<f32> {
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match kind {
        BlockType::F16 => pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        BlockType::Bf16 => pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}
