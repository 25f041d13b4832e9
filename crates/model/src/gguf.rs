//! Tensors of a GGUF file: raw blocks as they are, where the kernels know the type; as f16 where they do not.

use std::collections::HashSet;
use std::io::{Read, Seek};

use candle_core::Device;
use candle_core::quantized::{GgmlDType, gguf_file};
use mosaickv_kernels::matrix::{BlockType, Matrix};

use crate::ModelError;
use crate::config::gguf::Metadata;
use crate::source::{Role, Tensors, blocks, finite, shaped};

pub(crate) struct Gguf<R> {
    reader: R,
    content: gguf_file::Content,
    read: HashSet<String>,
    expanded: HashSet<String>, // types that were expanded to f16, each logged once
}

impl<R: Read + Seek> Gguf<R> {
    /// Checks, then reads the header.
    pub(crate) fn open(mut reader: R) -> Result<Gguf<R>, ModelError> {
        crate::gguf_check::check(&mut reader)?;
        let content = gguf_file::Content::read(&mut reader).map_err(|e| damaged(&e))?;
        Ok(Gguf { reader, content, read: HashSet::new(), expanded: HashSet::new() })
    }

    pub(crate) fn metadata(&self) -> Metadata<'_> {
        Metadata(&self.content.metadata)
    }

    /// Rows of the embedding.
    pub(crate) fn vocab(&self) -> Result<usize, ModelError> {
        let name = self.name(Role::Embed, 0);
        let info =
            self.content.tensor_infos.get(&name).ok_or(ModelError::MissingTensor { name: name.clone() })?;
        match info.shape.dims() {
            [rows, _] => Ok(*rows),
            other => Err(ModelError::Shape { name, got: other.to_vec(), wanted: vec![0, 0] }),
        }
    }

    /// The divisors of the rotary frequencies, if the file has them.
    pub(crate) fn rope_divisors(&mut self) -> Result<Option<Vec<f32>>, ModelError> {
        let name = "rope_freqs.weight";
        let Some(info) = self.content.tensor_infos.get(name) else { return Ok(None) };
        let length = info.shape.elem_count();
        self.vector(name, length).map(Some)
    }

    fn tensor(&mut self, name: &str) -> Result<candle_core::quantized::QTensor, ModelError> {
        if !self.contains(name) {
            return Err(ModelError::MissingTensor { name: name.to_owned() });
        }
        self.read.insert(name.to_owned());
        self.content.tensor(&mut self.reader, name, &Device::Cpu).map_err(|e| damaged(&e))
    }
}

impl<R: Read + Seek> Tensors for Gguf<R> {
    fn name(&self, role: Role, layer: usize) -> String {
        let part = match role {
            Role::Embed => return "token_embd.weight".to_owned(),
            Role::Norm => return "output_norm.weight".to_owned(),
            Role::Head => return "output.weight".to_owned(),
            Role::AttnNorm => "attn_norm.weight",
            Role::Q => "attn_q.weight",
            Role::K => "attn_k.weight",
            Role::V => "attn_v.weight",
            Role::QBias => "attn_q.bias",
            Role::KBias => "attn_k.bias",
            Role::VBias => "attn_v.bias",
            Role::QNorm => "attn_q_norm.weight",
            Role::KNorm => "attn_k_norm.weight",
            Role::O => "attn_output.weight",
            Role::PostAttnNorm => "post_attention_norm.weight",
            Role::FfnNorm => "ffn_norm.weight",
            Role::Gate => "ffn_gate.weight",
            Role::Up => "ffn_up.weight",
            Role::Down => "ffn_down.weight",
            Role::PostFfnNorm => "post_ffw_norm.weight",
        };
        format!("blk.{layer}.{part}")
    }

    fn contains(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError> {
        if let Some(info) = self.content.tensor_infos.get(name) {
            shaped(name, info.shape.dims(), &[rows, cols])?; // before its bytes are read
        }
        let tensor = self.tensor(name)?;
        if let Some(kind) = block_type(tensor.dtype()) {
            let bytes = tensor.data().map_err(|e| damaged(&e))?;
            return blocks(name, kind, (rows, cols), &bytes);
        }
        let dtype = format!("{:?}", tensor.dtype());
        if self.expanded.insert(dtype.clone()) {
            tracing::warn!(%dtype, tensor = name, "no kernel for this weight type: stored as f16, which takes more memory");
        }
        let halves = tensor.dequantize_f16(&Device::Cpu).map_err(|e| damaged(&e))?;
        let halves: Vec<half::f16> =
            halves.flatten_all().and_then(|t| t.to_vec1()).map_err(|e| damaged(&e))?;
        blocks(name, BlockType::F16, (rows, cols), bytemuck::cast_slice(&halves))
    }

    fn vector(&mut self, name: &str, length: usize) -> Result<Vec<f32>, ModelError> {
        if let Some(info) = self.content.tensor_infos.get(name) {
            shaped(name, info.shape.dims(), &[length])?;
        }
        let tensor = self.tensor(name)?.dequantize(&Device::Cpu);
        let values = tensor.and_then(|t| t.to_vec1()).map_err(|e| damaged(&e))?;
        finite(name, values)
    }

    fn left_over(&self) -> Option<String> {
        self.content.tensor_infos.keys().find(|name| !self.read.contains(*name)).cloned()
    }
}

/// The types whose blocks the kernels read as they are.
fn block_type(dtype: GgmlDType) -> Option<BlockType> {
    match dtype {
        GgmlDType::F32 => Some(BlockType::F32),
        GgmlDType::F16 => Some(BlockType::F16),
        GgmlDType::BF16 => Some(BlockType::Bf16),
        GgmlDType::Q4_0 => Some(BlockType::Q4_0),
        GgmlDType::Q4_1 => Some(BlockType::Q4_1),
        GgmlDType::Q5_0 => Some(BlockType::Q5_0),
        GgmlDType::Q5_1 => Some(BlockType::Q5_1),
        GgmlDType::Q8_0 => Some(BlockType::Q8_0),
        GgmlDType::Q4K => Some(BlockType::Q4K),
        GgmlDType::Q5K => Some(BlockType::Q5K),
        GgmlDType::Q6K => Some(BlockType::Q6K),
        _ => None,
    }
}

fn damaged(e: &candle_core::Error) -> ModelError {
    let text = e.to_string();
    ModelError::Gguf { what: text.lines().next().unwrap_or_default().to_owned(), at: 0 }
}
