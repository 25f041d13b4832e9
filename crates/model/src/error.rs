//! What can be wrong with a model's files: what it is, what was found, what was wanted, what to do.

use std::path::PathBuf;

use mosaickv_kernels::matrix::MatrixError;

/// Why a model could not be loaded or a text could not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file is missing or unreadable.
    #[error(
        "{path}: {source}; a model is one GGUF file, or a folder with config.json, tokenizer.json and *.safetensors"
    )]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bytes are not a GGUF file, or the file was cut short, or its lengths contradict its size.
    #[error("damaged GGUF at byte {at}: {what}; fetch the file again, or convert it again with llama.cpp")]
    Gguf {
        /// What is wrong.
        what: String,
        /// Where in the file.
        at: u64,
    },
    /// A safetensors file, its index or a JSON file beside it is damaged.
    #[error("{path}: {what}; fetch the file again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The model is of a family that this program does not run.
    #[error("architecture {got:?} is not supported; supported are {}", crate::config::SUPPORTED)]
    Architecture {
        /// What the file calls itself.
        got: String,
    },
    /// A value of the model's configuration is missing, out of range or of the wrong type.
    #[error("{key} is {got}, wanted {wanted}; the file is damaged or needs a feature that is not supported")]
    Config {
        /// The key, as the file spells it.
        key: String,
        /// What was found.
        got: String,
        /// What is accepted.
        wanted: String,
    },
    /// A tensor that the architecture needs is not there.
    #[error("tensor {name} is missing; the file is incomplete: fetch it (every shard of it) again")]
    MissingTensor {
        /// Name in the file.
        name: String,
    },
    /// A tensor that the architecture does not have: ignoring it would give wrong text.
    #[error(
        "tensor {name} is not part of the {architecture} architecture as this program runs it; use a plain checkpoint"
    )]
    ExtraTensor {
        /// Name in the file.
        name: String,
        /// The architecture.
        architecture: &'static str,
    },
    /// A tensor's shape contradicts the configuration.
    #[error(
        "tensor {name} has shape {got:?}, wanted {wanted:?} by the configuration; convert the model again"
    )]
    Shape {
        /// Name in the file.
        name: String,
        /// Shape in the file, rows first.
        got: Vec<usize>,
        /// Shape that the configuration implies.
        wanted: Vec<usize>,
    },
    /// A tensor is stored in a number format that cannot be read.
    #[error(
        "tensor {name} is stored as {got}, wanted F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K; quantize the model to one of these"
    )]
    TensorType {
        /// Name in the file.
        name: String,
        /// The format in the file.
        got: String,
    },
    /// A norm or bias contains NaN or an infinity.
    #[error(
        "tensor {name} holds {value} at index {index}, wanted finite numbers; fetch or convert the model again"
    )]
    NotFinite {
        /// Name in the file.
        name: String,
        /// The first bad element.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// The kernels refused a weight matrix.
    #[error("tensor {name}: {source}")]
    Matrix {
        /// Name in the file.
        name: String,
        /// What they said.
        source: MatrixError,
    },
    /// The context extension is of a kind that is not supported.
    #[error("rope scaling {got:?} is not supported; supported are none, linear, dynamic, yarn and llama3")]
    RopeScaling {
        /// What the file asks for.
        got: String,
    },
    /// The vocabulary cannot be used, or a text cannot be encoded or decoded with it.
    #[error("tokenizer: {what}")]
    Tokenizer {
        /// What is wrong, and what was wanted.
        what: String,
    },
    /// The chat template cannot be read or refuses the conversation.
    #[error("chat template: {what}")]
    Template {
        /// What the template engine, or the template itself, said.
        what: String,
    },
    /// The model has no chat template.
    #[error(
        "this model has no chat template (a base model?); use plain completion, or give a template of your own"
    )]
    NoTemplate,
}
