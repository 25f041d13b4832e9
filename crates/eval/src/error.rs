//! Why can a sample not be measured?

use mosaickv_kv::KvError;
use mosaickv_model::{ForwardError, ModelError};

/// Why a sample can't be measured.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// Prompt and answer do not fit the model.
    #[error(
        "{which} needs {tokens} tokens, prompt and answer together, but the model's context is {context}; ask for \
         shorter ones, or use a model with a longer context"
    )]
    TooLong {
        /// Which sample or text.
        which: String,
        /// Tokens needed.
        tokens: usize,
        /// What the model takes.
        context: usize,
    },
    /// A text has fewer tokens than are to be read and predicted.
    #[error(
        "{which} has {tokens} tokens, wanted {wanted} (prefix, score and one more); give a longer text, or lower --prefix or --score"
    )]
    TooShort {
        /// Which text.
        which: String,
        /// Its tokens.
        tokens: usize,
        /// Tokens needed.
        wanted: usize,
    },
    /// The model refused.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The cache refused the format.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// The tokenizer or chat template refused.
    #[error(transparent)]
    Text(#[from] ModelError),
}
