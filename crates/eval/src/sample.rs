//! What is asked, and how is an answer judged?

use crate::{longbench, ruler};

/// One prompt with its known answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The task's name, as on the command line.
    pub task: String,
    /// Tokens asked for, prompt and answer together; 0 where the data has the length it has.
    pub length: usize,
    /// Which sample of its task and length, from 0.
    pub index: usize,
    /// The prompt's text.
    pub prompt: String,
    /// Whether the prompt is what a user says in a chat, or a text to be continued.
    pub chat: bool,
    /// Right answers; what that means is the metric's business.
    pub answers: Vec<String>,
    /// How an answer is judged.
    pub metric: Metric,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// Whether an answer ends with its first line.
    pub one_line: bool,
    /// Where in the prompt the (first) needle is, from 0 (start) to 1 (end), if there is one.
    pub depth: Option<f64>,
}

/// How an answer is judged; every score is in [0, 1].
#[derive(Clone, Debug, PartialEq)]
pub enum Metric {
    /// RULER's `string_match_all`: the share of the answers that occur in the prediction.
    MatchAll,
    /// RULER's `string_match_part`: whether any of the answers occurs in it.
    MatchPart,
    /// One of LongBench's.
    LongBench(longbench::Metric),
}

impl Metric {
    /// The score of a prediction.
    pub fn score(&self, prediction: &str, answers: &[String]) -> f64 {
        match self {
            Metric::MatchAll => ruler::match_all(prediction, answers),
            Metric::MatchPart => ruler::match_part(prediction, answers),
            Metric::LongBench(metric) => metric.score(prediction, answers),
        }
    }

    /// Whether no further word can change the score: both of RULER's count answers that occur, so that a prediction
    /// with all of them is as good as it gets.
    pub fn is_settled(&self, prediction: &str, answers: &[String]) -> bool {
        match self {
            Metric::MatchAll | Metric::MatchPart => self.score(prediction, answers) == 1.0,
            Metric::LongBench(_) => false,
        }
    }
}
