//! From files to a model that is ready to run: GGUF files and safetensors folders as weights, rotary embedding,
//! tokenizer and chat template.
//!
//! Files are not trusted: lengths are held against the file's size, shapes against the configuration, and anything
//! that would change the arithmetic without being understood is an error. Knows no cache and no request.
#![deny(unsafe_code)]

pub mod calibrate;
pub mod config;
pub mod device;
pub mod error;
pub mod rope;
pub mod sequence;
pub mod text;
pub mod weights;

mod forward;
mod gguf;
mod gguf_check;
mod shards;
mod source;

pub use config::{Architecture, ModelConfig};
pub use device::{Device, DeviceBytes, StepTimes};
pub use error::ModelError;
pub use rope::{Rope, RopeConfig, RopeScaling, RopeStyle, Rotation};
pub use sequence::{ForwardError, Part, Sequence, Share, Wanted, feed_each, greedy, read_each, step_each};
pub use text::{Decoder, Encoded, Ending, Message, Specials, Text};
pub use weights::{Layer, LayerRope, Model};
