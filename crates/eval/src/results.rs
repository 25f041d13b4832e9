//! What was measured, one JSON object a line.
//!
//! A results file begins with a [`Settings`] line; every further line is a [`Row`]. Rows hold nothing that differs
//! from run to run (no times), so that a run that was killed and went on later gives the same bytes.

use serde::{Deserialize, Serialize};

/// The first line of a results file: what was run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// `kl`, `ruler` or `longbench`.
    pub suite: String,
    /// The model's name.
    pub model: String,
    /// KV formats as `--kv` takes them, in order.
    pub kv: Vec<String>,
    /// Everything else that the rows depend on, such as the seed, as `name = value`.
    pub options: std::collections::BTreeMap<String, String>,
}

/// What a format's cache held and read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Bytes allocated for keys and values when the prompt was in.
    pub kv_bytes: usize,
    /// Exact f16 bytes to stored bytes.
    pub ratio: f64,
    /// Stored bits to scalars held.
    pub bits_per_scalar: f64,
    /// Mean over the decode steps; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_read_per_step: Option<f64>,
}

/// One measurement of one format.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "row", rename_all = "lowercase")]
pub enum Row {
    /// An answer to a sample, judged (suites `ruler` and `longbench`).
    Answer(AnswerRow),
    /// Next-token distributions beside the exact cache's (suite `kl`).
    Kl(KlRow),
}

/// An answer to a sample, judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnswerRow {
    /// Task.
    pub task: String,
    /// Tokens asked for; 0 where the data has the length it has.
    pub length: usize,
    /// Which sample of its task and length.
    pub sample: usize,
    /// KV format, as `--kv` takes it.
    pub kv: String,
    /// What it held and read.
    #[serde(flatten)]
    pub cost: Cost,
    /// Where the needle is, from 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
    /// What the model said.
    pub prediction: String,
    /// What it should have said.
    pub answers: Vec<String>,
    /// In [0, 1].
    pub score: f64,
}

/// Next-token distributions of one text, beside those of the exact cache; means over the predicted tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KlRow {
    /// The text's name; needles hidden in it are named `NAME ask N`.
    pub text: String,
    /// KV format, as `--kv` takes it.
    pub kv: String,
    /// The only layer that was compressed, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// What it held and read.
    #[serde(flatten)]
    pub cost: Cost,
    /// Predicted tokens.
    pub tokens: usize,
    /// KL(exact || this), nats.
    pub kl: f64,
    /// Share of tokens whose most probable next token is the exact cache's.
    pub top1: f64,
    /// Negative log-likelihood of the text's own tokens, nats.
    pub nll: f64,
    /// That minus the exact cache's.
    pub dnll: f64,
    /// exp(nll)
    pub perplexity: f64,
    /// Where the needle is, from 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
}
