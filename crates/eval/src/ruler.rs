//! RULER (Hsieh et al. 2024, arXiv 2404.06654): needles, chains of variables, frequent words, questions.
//!
//! Makes samples of its 13 tasks at any length, reads those that the official generator made, and judges answers by the
//! official rules. Templates, numbers of needles, hops and words, and metrics are those of `scripts/` in NVIDIA/RULER
//! with the `base` model template (a text to be continued). What differs:
//!
//! - Draws come from ChaCha8 seeded with seed, task, length and index, so a sample does not depend on the others;
//!   the official samples of a seed are not reproduced.
//! - Each sample gets as much haystack as fits, by its own count of tokens; the official generator finds one size for
//!   all and gives up 500 words, 25 needles or 10 documents at a time, so its samples are up to 40 % shorter.
//! - Keys and values of one sample are all different.
//! - Sentences, between which needles go, end by a rule instead of NLTK's trained splitter.
//! - `qa_2` keeps the documents with the supporting facts and gives up others of its ten where they do not all fit.
//! - `cwe` has 8,166 words, a list of 24,768; where a longer list would fit, the prompt stays shorter.
//!
//! The word lists are those of the Python package wonderwords (MIT; see `ruler/words`), as in RULER.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use crate::{Metric, Sample};

mod draw;
mod fit;
mod haystack;
mod hide;
mod jsonl;
mod niah;
mod qa;
mod sources;
mod vt;
mod words;

pub use hide::{Hidden, Needle, hide};
pub use jsonl::{Folder, read_dir, read_jsonl};
pub use sources::Sources;

use draw::Draw;
use fit::Recipe;
use niah::{Design, Hay, Kind, Needles};

/// One of RULER's tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Task {
    /// A number in a repeated sentence.
    NiahSingle1,
    /// A number in essays.
    NiahSingle2,
    /// A UUID in essays.
    NiahSingle3,
    /// A number in essays, beside three with other keys.
    NiahMultikey1,
    /// A number among nothing but numbers with other keys.
    NiahMultikey2,
    /// A UUID among nothing but UUIDs with other UUIDs as keys.
    NiahMultikey3,
    /// The four numbers of one key, in essays.
    NiahMultivalue,
    /// The numbers of four keys, in essays.
    NiahMultiquery,
    /// Variable tracking: five variables that get one value by four hops.
    Vt,
    /// Common words extraction: the ten most common words of a list.
    Cwe,
    /// Frequent words extraction: the three most frequent of coded words.
    Fwe,
    /// Questions of SQuAD 2.0 among its paragraphs.
    Qa1,
    /// Questions of HotpotQA among its paragraphs.
    Qa2,
}

impl Task {
    /// Every task, in the paper's order.
    pub const ALL: [Task; 13] = [
        Task::NiahSingle1,
        Task::NiahSingle2,
        Task::NiahSingle3,
        Task::NiahMultikey1,
        Task::NiahMultikey2,
        Task::NiahMultikey3,
        Task::NiahMultivalue,
        Task::NiahMultiquery,
        Task::Vt,
        Task::Cwe,
        Task::Fwe,
        Task::Qa1,
        Task::Qa2,
    ];

    /// The official name, such as `niah_single_1`.
    pub fn name(self) -> &'static str {
        match self {
            Task::NiahSingle1 => "niah_single_1",
            Task::NiahSingle2 => "niah_single_2",
            Task::NiahSingle3 => "niah_single_3",
            Task::NiahMultikey1 => "niah_multikey_1",
            Task::NiahMultikey2 => "niah_multikey_2",
            Task::NiahMultikey3 => "niah_multikey_3",
            Task::NiahMultivalue => "niah_multivalue",
            Task::NiahMultiquery => "niah_multiquery",
            Task::Vt => "vt",
            Task::Cwe => "cwe",
            Task::Fwe => "fwe",
            Task::Qa1 => "qa_1",
            Task::Qa2 => "qa_2",
        }
    }

    /// Longest answer, in tokens (`tokens_to_generate` in RULER's `constants.py`).
    pub fn max_new_tokens(self) -> usize {
        match self {
            Task::Vt => 30,
            Task::Cwe => 120,
            Task::Fwe => 50,
            Task::Qa1 | Task::Qa2 => 32,
            _ => 128,
        }
    }

    /// How its answers are judged.
    pub fn metric(self) -> Metric {
        match self {
            Task::Qa1 | Task::Qa2 => Metric::MatchPart,
            _ => Metric::MatchAll,
        }
    }

    /// Where the first needle that is asked for begins, from 0 to 1 in characters; `None` without needles.
    fn depth(self, prompt: &str, answers: &[String]) -> Option<f64> {
        let byte = match self {
            Task::Cwe | Task::Fwe | Task::Qa1 | Task::Qa2 => None,
            Task::Vt => vt::needle(prompt, answers),
            _ => niah::needle(prompt, answers),
        }?;
        Some(prompt[..byte].chars().count() as f64 / prompt.chars().count() as f64)
    }

    fn sample(self, length: usize, index: usize, prompt: String, answers: Vec<String>) -> Sample {
        Sample {
            task: self.name().to_string(),
            length,
            index,
            depth: self.depth(&prompt, &answers),
            prompt,
            chat: false,
            answers,
            metric: self.metric(),
            max_new_tokens: self.max_new_tokens(),
            one_line: false,
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Task {
    type Err = RulerError;

    fn from_str(name: &str) -> Result<Task, RulerError> {
        let known = Task::ALL.into_iter().find(|task| task.name() == name);
        known.ok_or_else(|| RulerError::UnknownTask { got: name.to_string() })
    }
}

/// Why there is no sample.
#[derive(Debug, Error)]
pub enum RulerError {
    /// No task has this name.
    #[error("no RULER task is named {got:?}; there are {}", Task::ALL.map(Task::name).join(", "))]
    UnknownTask {
        /// The name.
        got: String,
    },
    /// A task needs a file that was not given.
    #[error("RULER's {task} needs {file}, which is not among the source files; {origin}")]
    MissingSource {
        /// The task.
        task: Task,
        /// The file's name.
        file: &'static str,
        /// Where it comes from.
        origin: &'static str,
    },
    /// A source file cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A source file is not what its name says.
    #[error("{} is not {wanted}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it should be.
        wanted: &'static str,
        /// What is wrong.
        what: String,
    },
    /// Not even the smallest haystack fits.
    #[error(
        "RULER's {task} needs at least {needed} tokens (sample {index}), answer included; the length is {length}"
    )]
    TooShort {
        /// The task.
        task: Task,
        /// Which sample.
        index: usize,
        /// Tokens there are.
        length: usize,
        /// Tokens it takes, by the tokenizer that was given.
        needed: usize,
    },
    /// The data set has no such question.
    #[error("RULER's {task} has {count} questions; there is no sample {index} (they count from 0)")]
    NoQuestion {
        /// The task.
        task: Task,
        /// Which sample.
        index: usize,
        /// Questions there are.
        count: usize,
    },
    /// No prompt of that many tokens is made.
    #[error("a prompt of {length} tokens was asked for; the most that is made is {}", Generator::LONGEST)]
    TooLong {
        /// Tokens asked for.
        length: usize,
    },
}

/// Makes samples, any one of them alone.
#[derive(Clone, Debug)]
pub struct Generator {
    sources: Sources,
    seed: u64,
}

impl Generator {
    /// Most tokens of a sample.
    pub const LONGEST: usize = 1 << 24;

    /// A generator; the same seed and sources make the same samples.
    pub fn new(sources: Sources, seed: u64) -> Generator {
        Generator { sources, seed }
    }

    /// Sample `index` of `task` (from 0): prompt and answer have at most `length` tokens by `count`, which gives the
    /// tokens of a text, those that begin every prompt included. Calls `count` about ten times.
    pub fn sample(
        &self,
        task: Task,
        length: usize,
        index: usize,
        count: &mut dyn FnMut(&str) -> usize,
    ) -> Result<Sample, RulerError> {
        if length > Generator::LONGEST {
            return Err(RulerError::TooLong { length });
        }
        let recipe = self.recipe(task, length, index, count)?;
        let room = length.saturating_sub(task.max_new_tokens());
        let prompt = fit::longest(recipe.as_ref(), room, count).map_err(|tokens| RulerError::TooShort {
            task,
            index,
            length,
            needed: tokens + task.max_new_tokens(),
        })?;
        Ok(task.sample(length, index, prompt, recipe.answers()))
    }

    fn recipe(
        &self,
        task: Task,
        length: usize,
        index: usize,
        count: &mut dyn FnMut(&str) -> usize,
    ) -> Result<Box<dyn Recipe>, RulerError> {
        let draw = Draw::new([self.seed, task as u64, length as u64, index as u64]);
        let needles = |hay, key, value, [keys, values, queries]: [usize; 3]| -> Box<dyn Recipe> {
            let design = Design { hay, key, value, keys, values, queries };
            Box::new(Needles::new(design, length, draw.clone()))
        };
        let essays = || self.sources.haystack(task).map(Hay::Text);
        use Kind::{Number, Uuid, Words};
        Ok(match task {
            Task::NiahSingle1 => needles(Hay::Noise, Words, Number, [1, 1, 1]),
            Task::NiahSingle2 => needles(essays()?, Words, Number, [1, 1, 1]),
            Task::NiahSingle3 => needles(essays()?, Words, Uuid, [1, 1, 1]),
            Task::NiahMultikey1 => needles(essays()?, Words, Number, [4, 1, 1]),
            Task::NiahMultikey2 => needles(Hay::Needles, Words, Number, [1, 1, 1]),
            Task::NiahMultikey3 => needles(Hay::Needles, Uuid, Uuid, [1, 1, 1]),
            Task::NiahMultivalue => needles(essays()?, Words, Number, [1, 4, 1]),
            Task::NiahMultiquery => needles(essays()?, Words, Number, [4, 1, 4]),
            Task::Vt => Box::new(vt::VariableTracking::new(length, draw, count)),
            Task::Cwe => Box::new(words::CommonWords::new(length, draw)),
            Task::Fwe => Box::new(words::FrequentWords::new(length, draw)),
            Task::Qa1 | Task::Qa2 => {
                let questions = self.sources.questions(task)?;
                let count = questions.questions.len();
                let asked = qa::Asked::new(questions, index, length, draw);
                Box::new(asked.ok_or(RulerError::NoQuestion { task, index, count })?)
            }
        })
    }
}

/// The share of the answers that occur in the prediction, whatever their case (`string_match_all`); 0 if there are
/// none.
pub fn match_all(prediction: &str, answers: &[String]) -> f64 {
    let prediction = judged(prediction);
    let found = answers.iter().filter(|answer| prediction.contains(&answer.to_lowercase())).count();
    found as f64 / answers.len().max(1) as f64
}

/// 1 if any of the answers occurs in the prediction, whatever their case (`string_match_part`).
pub fn match_part(prediction: &str, answers: &[String]) -> f64 {
    let prediction = judged(prediction);
    f64::from(u8::from(answers.iter().any(|answer| prediction.contains(&answer.to_lowercase()))))
}

/// What of a prediction is compared (`postprocess_pred` in RULER's `evaluate.py`): control characters are line ends,
/// blanks around it and case do not count.
fn judged(prediction: &str) -> String {
    let lines: String = prediction.chars().map(|c| if c < ' ' { '\n' } else { c }).collect();
    lines.trim().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| text.to_string()).collect()
    }

    #[test]
    fn match_all_counts_answers() {
        let answers = strings(&["Alpha", "beta", "42", "gamma\ndelta"]);
        assert_eq!(match_all("ALPHA and Beta: 1428", &answers), 0.75);
        assert_eq!(match_all(" gamma\tdelta ", &answers), 0.25);
        assert_eq!(match_all("gamma\u{0}delta", &answers), 0.25);
        assert_eq!(match_all("gamma delta", &answers), 0.0);
        assert_eq!(match_all("", &answers), 0.0);
        assert_eq!(match_all("anything", &[]), 0.0);
    }

    #[test]
    fn match_part_wants_one() {
        let answers = strings(&["Denmark, Iceland and Norway", "Norway"]);
        assert_eq!(match_part("from norway.", &answers), 1.0);
        assert_eq!(match_part("from Nor way.", &answers), 0.0);
        assert_eq!(match_part("", &answers), 0.0);
        assert_eq!(match_part("x", &[]), 0.0);
    }

    #[test]
    fn names_are_read_and_written() {
        for task in Task::ALL {
            assert_eq!(task.to_string().parse::<Task>().unwrap(), task);
        }
        let error = "niah".parse::<Task>().unwrap_err().to_string();
        assert!(Task::ALL.iter().all(|task| error.contains(task.name())), "{error}");
    }

    #[test]
    fn what_cannot_be_made_is_said() {
        let generator = Generator::new(Sources::default(), 1);
        let count = &mut |text: &str| text.split_whitespace().count();
        let error = |result: Result<Sample, RulerError>| result.unwrap_err().to_string();
        let said = error(generator.sample(Task::NiahSingle2, 4096, 0, count));
        assert!(said.contains("PaulGrahamEssays.json"), "{said}");
        let said = error(generator.sample(Task::Qa2, 4096, 0, count));
        assert!(said.contains("hotpot_dev_distractor_v1.json"), "{said}");
        for length in [0, 100] {
            let said = error(generator.sample(Task::Cwe, length, 0, count));
            assert!(said.contains(&format!("the length is {length}")), "{said}");
        }
        assert!(matches!(generator.sample(Task::Fwe, usize::MAX, 0, count), Err(RulerError::TooLong { .. })));
    }
}
