//! A model of random weights on a GPU alone, to measure how fast a model of some shape is.

use super::weights::{DeviceLayer, Weights};
use super::{Device, Store};
use crate::config::{Architecture, ModelConfig};
use crate::rope::{Rope, RopeConfig, RopeScaling, RopeStyle};
use crate::weights::Model;
use half::{bf16, f16};
use mosaickv_kernels::cuda::check::Random;
use mosaickv_kernels::cuda::dense::Norm;
use mosaickv_kernels::cuda::{Error, Gpu, gemm};
use mosaickv_kernels::matrix::{BlockType, Matrix};
use mosaickv_kv::{Calibration, HeadCalibration, KvError};
use std::sync::Arc;

/// Random numbers that matrices repeat: more than a multiple of any row.
const NUMBERS: usize = (1 << 20) + 8;

impl ModelConfig {
    /// The shape of Llama 3.1 8B, with that many layers.
    pub fn like_8b(layers: usize, context: usize) -> ModelConfig {
        ModelConfig {
            name: "random weights in the shape of Llama 3.1 8B".into(),
            architecture: Architecture::Llama,
            layers,
            hidden: 4096,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            ffn: 14336,
            vocab: 128_256,
            norm_eps: 1e-5,
            context,
            embed_scale: 1.0,
            attention_scale: 128f32.sqrt().recip(),
            rope: RopeConfig {
                style: RopeStyle::Halves,
                theta: 500_000.0,
                dims: 128,
                scaling: RopeScaling::None,
                divisors: None,
            },
            local_rope: None,
            sliding_window: None,
            rope_layers: vec![true; layers],
        }
    }
}

impl Model {
    /// Of random weights on a GPU alone: passes can be computed there only. Its calibration leaves channels as they are.
    pub fn random_on(gpu: &Gpu, config: ModelConfig, pages: Pages) -> Result<Model, KvError> {
        let none = Matrix::from_blocks(BlockType::F32, 1, 8, &[0; 32]).expect("a matrix of a row");
        let rope = Rope::new(&config.rope);
        let mut model = Model {
            norm: vec![1.0; config.hidden],
            embed: none,
            layers: vec![],
            head: None,
            rope: rope.clone(),
            local_rope: None,
            device: None,
            calibration: Some(Arc::new(same(&config))),
            config,
        };
        let store = Store::new(gpu, model.kv_shape())?;
        let store = match pages {
            Pages::OfEachLayer => store,
            Pages::Shared => store.sharing_layers(),
        };
        let weights = Weights::random(gpu, &model.config)?;
        model.device = Some(Device::new(gpu, (model.config.clone(), rope), weights, store));
        Ok(model)
    }
}

/// Whether layers have memory of their own for exact tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// As they should.
    OfEachLayer,
    /// All layers have the same, for contexts that do not fit: speed is as it was, what is attended to means nothing.
    Shared,
}

fn same(config: &ModelConfig) -> Calibration {
    let d = config.head_dim;
    let matrix = || (0..d * d).map(|i| if i % (d + 1) == 0 { f16::ONE } else { f16::ZERO }).collect();
    let head = |_| HeadCalibration { keys: matrix(), queries: matrix(), values: matrix(), outputs: matrix() };
    Calibration {
        heads: (0..config.layers * config.kv_heads).map(head).collect(),
        layer_weights: vec![1.0; config.layers],
    }
}

impl Weights {
    fn random(gpu: &Gpu, config: &ModelConfig) -> Result<Weights, Error> {
        let ModelConfig { hidden, heads, kv_heads, head_dim, ffn, vocab, norm_eps, .. } = *config;
        let numbers = Random::new(1).normals(NUMBERS);
        let matrix = |rows: usize, cols: usize| {
            let scale = (cols as f32).sqrt().recip();
            let numbers: Vec<bf16> = numbers.iter().map(|x| bf16::from_f32(x * scale)).collect();
            gemm::Weights::repeated(gpu, (rows, cols), &numbers)
        };
        let norm = || Norm::new(gpu, &vec![1.0; hidden], norm_eps);
        let layer = |_| {
            Ok(DeviceLayer {
                attn_norm: norm()?,
                qkv: matrix((heads + 2 * kv_heads) * head_dim, hidden)?,
                bias: None,
                q_norm: None,
                k_norm: None,
                wo: matrix(hidden, heads * head_dim)?,
                post_attn_norm: None,
                ffn_norm: norm()?,
                gate_up: matrix(2 * ffn, hidden)?,
                down: matrix(hidden, ffn)?,
                post_ffn_norm: None,
                is_turned: true,
            })
        };
        Ok(Weights {
            embed: matrix(vocab, hidden)?,
            layers: (0..config.layers).map(layer).collect::<Result<_, Error>>()?,
            norm: norm()?,
            head: Some(matrix(vocab, hidden)?),
        })
    }
}
