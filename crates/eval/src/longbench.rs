//! What does LongBench ask, and how does it judge the answers?
//!
//! LongBench v1 (Bai et al. 2023, arXiv 2308.14508), its English and code tasks, and the LongBench-E variants (same
//! prompts and metrics, other texts, whose lengths are spread evenly). Prompts, limits, truncation and metrics are those
//! of the official `pred.py`, `eval.py` and `metrics.py` (github.com/THUDM/LongBench); scores are held to a table that
//! these programs wrote (`scripts/longbench_reference.py`). The Chinese tasks are known and refused.
//!
//! [`read_dir`] reads the official `<task>.jsonl` files, [`Item::sample`] makes a [`crate::Sample`] of a line, and
//! [`Metric::score`] judges what a model said. Nothing here runs a model.

mod items;
mod metric;
mod prompts;
mod rouge;
mod sequence_matcher;

use std::fmt;
use std::str::FromStr;

pub use items::{Folder, Item, read_dir, read_jsonl};
pub use metric::{Measure, Metric, Reads, first_line};

use Dataset::*;

/// One of LongBench's English or code datasets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names are LongBench's")]
pub enum Dataset {
    NarrativeQa,
    Qasper,
    MultiFieldQaEn,
    HotpotQa,
    TwoWikiMqa,
    Musique,
    GovReport,
    QmSum,
    MultiNews,
    Trec,
    TriviaQa,
    SamSum,
    PassageCount,
    PassageRetrievalEn,
    Lcc,
    RepoBenchP,
}

/// LongBench's own order.
const DATASETS: [Dataset; 16] = [
    NarrativeQa,
    Qasper,
    MultiFieldQaEn,
    HotpotQa,
    TwoWikiMqa,
    Musique,
    GovReport,
    QmSum,
    MultiNews,
    Trec,
    TriviaQa,
    SamSum,
    PassageCount,
    PassageRetrievalEn,
    Lcc,
    RepoBenchP,
];

/// LongBench's Chinese tasks; several of their metrics count the words that the segmenter `jieba` finds.
const CHINESE: [&str; 5] = ["multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"];

impl Dataset {
    /// As in LongBench's file names.
    pub fn name(self) -> &'static str {
        match self {
            NarrativeQa => "narrativeqa",
            Qasper => "qasper",
            MultiFieldQaEn => "multifieldqa_en",
            HotpotQa => "hotpotqa",
            TwoWikiMqa => "2wikimqa",
            Musique => "musique",
            GovReport => "gov_report",
            QmSum => "qmsum",
            MultiNews => "multi_news",
            Trec => "trec",
            TriviaQa => "triviaqa",
            SamSum => "samsum",
            PassageCount => "passage_count",
            PassageRetrievalEn => "passage_retrieval_en",
            Lcc => "lcc",
            RepoBenchP => "repobench-p",
        }
    }

    /// Whether LongBench-E has texts of it.
    const fn has_even(self) -> bool {
        !matches!(self, NarrativeQa | Musique | QmSum)
    }
}

/// A task as the command line names it: a dataset, or with `_e` its LongBench-E variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Task {
    dataset: Dataset,
    texts: Texts,
}

/// Which texts a task asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Texts {
    /// LongBench's.
    Original,
    /// LongBench-E's, "even" in length.
    Even,
}

impl Task {
    /// All 29, LongBench's 16 first.
    pub const ALL: [Task; 29] = every_task();

    /// What it is made of; the same for a task and its `_e` variant.
    pub fn dataset(self) -> Dataset {
        self.dataset
    }

    /// Whether the texts are LongBench-E's.
    pub fn is_even(self) -> bool {
        self.texts == Texts::Even
    }

    /// The official data file, `<task>.jsonl`.
    pub fn file_name(self) -> String {
        format!("{self}.jsonl")
    }

    /// The official prompt, with the places `{context}` and, in most tasks, `{input}`.
    pub fn template(self) -> &'static str {
        prompts::template(self.dataset)
    }

    /// Longest answer, in tokens (official `dataset2maxlen.json`).
    pub fn max_new_tokens(self) -> usize {
        match self.dataset {
            HotpotQa | TwoWikiMqa | Musique | TriviaQa | PassageCount | PassageRetrievalEn => 32,
            MultiFieldQaEn | Trec | Lcc | RepoBenchP => 64,
            NarrativeQa | Qasper | SamSum => 128,
            GovReport | QmSum | MultiNews => 512,
        }
    }

    /// Whether a chat model gets the prompt inside its chat template. The official `pred.py` leaves the template out
    /// where the prompt is a list of examples or code to be continued.
    pub fn chat(self) -> bool {
        !matches!(self.dataset, Trec | TriviaQa | SamSum | Lcc | RepoBenchP)
    }

    /// Whether only an answer's first line counts (official `eval.py`), so that a run may stop there.
    ///
    /// What a run does with it: it stops once a newline follows anything but newlines. The score is the same as that of
    /// a longer answer, because [`Metric::score`] looks at no more (see [`first_line`]). The official `pred.py` stops
    /// early in samsum alone; there it also forbids the model to end its answer, or to begin a line, with the very first
    /// token. That is not asked for here: a model that says nothing gets 0.
    pub fn one_line(self) -> bool {
        matches!(self.dataset, Trec | TriviaQa | SamSum)
    }

    /// How an answer is judged, in a task whose line names these classes (empty but for trec).
    pub fn metric(self, classes: Vec<String>) -> Metric {
        let measure = match self.dataset {
            NarrativeQa | Qasper | MultiFieldQaEn | HotpotQa | TwoWikiMqa | Musique | TriviaQa => {
                Measure::QaF1
            }
            GovReport | QmSum | MultiNews | SamSum => Measure::RougeL,
            Trec => Measure::Classification { classes },
            PassageCount => Measure::Count,
            PassageRetrievalEn => Measure::Retrieval,
            Lcc | RepoBenchP => Measure::CodeSim,
        };
        Metric { measure, reads: if self.one_line() { Reads::FirstLine } else { Reads::Everything } }
    }
}

const fn every_task() -> [Task; 29] {
    let mut tasks = [Task { dataset: NarrativeQa, texts: Texts::Original }; 29];
    let (mut i, mut even) = (0, DATASETS.len());
    while i < DATASETS.len() {
        tasks[i] = Task { dataset: DATASETS[i], texts: Texts::Original };
        if DATASETS[i].has_even() {
            tasks[even] = Task { dataset: DATASETS[i], texts: Texts::Even };
            even += 1;
        }
        i += 1;
    }
    assert!(even == tasks.len());
    tasks
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if self.is_even() { "_e" } else { "" };
        f.pad(&format!("{}{suffix}", self.dataset.name()))
    }
}

/// A name that is none of the tasks here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TaskError {
    /// One of LongBench's Chinese tasks.
    #[error(
        "LongBench task `{name}` is known but not supported: it is in Chinese, which LongBench's metrics split into \
         words with jieba; supported: {}",
        known()
    )]
    Chinese {
        /// As given.
        name: String,
    },
    /// A LongBench task that LongBench-E left out.
    #[error("LongBench-E has no `{name}`, only LongBench does; known: {}", known())]
    NotInE {
        /// As given.
        name: String,
    },
    /// Anything else.
    #[error("no LongBench task is named `{name}`; known: {}", known())]
    Unknown {
        /// As given.
        name: String,
    },
}

fn known() -> String {
    Task::ALL.map(|task| task.to_string()).join(", ")
}

impl FromStr for Task {
    type Err = TaskError;

    fn from_str(name: &str) -> Result<Task, TaskError> {
        if let Some(&task) = Task::ALL.iter().find(|task| task.to_string() == name) {
            return Ok(task);
        }
        let (base, owned) = (name.strip_suffix("_e"), name.to_owned());
        Err(if CHINESE.contains(&name) {
            TaskError::Chinese { name: owned }
        } else if DATASETS.iter().any(|dataset| Some(dataset.name()) == base) {
            TaskError::NotInE { name: owned }
        } else {
            TaskError::Unknown { name: owned }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back() {
        for task in Task::ALL {
            assert_eq!(task.to_string().parse(), Ok(task));
        }
        let mut names = Task::ALL.map(|task| task.to_string());
        names.sort();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "a name twice in {names:?}");
        assert_eq!(names.iter().filter(|name| name.ends_with("_e")).count(), 13);
        assert_eq!("repobench-p_e".parse::<Task>().unwrap().file_name(), "repobench-p_e.jsonl");
    }

    #[test]
    fn other_names_say_what_there_is() {
        for name in ["", "TREC", "trec_e_e", "nq", "repobench_p", "narrative", "lsht_e"] {
            let error = name.parse::<Task>().unwrap_err();
            assert_eq!(error, TaskError::Unknown { name: name.to_owned() });
            for task in Task::ALL {
                assert!(error.to_string().contains(&task.to_string()), "{error}");
            }
        }
        for name in CHINESE {
            let error = name.parse::<Task>().unwrap_err();
            assert_eq!(error, TaskError::Chinese { name: name.to_owned() });
            assert!(error.to_string().contains("known but not supported"), "{error}");
        }
        for name in ["narrativeqa_e", "musique_e", "qmsum_e"] {
            assert_eq!(name.parse::<Task>(), Err(TaskError::NotInE { name: name.to_owned() }));
        }
    }

    #[test]
    fn a_variant_differs_in_its_name_alone() {
        for task in Task::ALL.into_iter().filter(|task| task.is_even()) {
            let plain: Task = task.to_string().strip_suffix("_e").unwrap().parse().unwrap();
            assert_eq!(plain.dataset(), task.dataset());
            assert_eq!(plain.template(), task.template());
            assert_eq!(plain.metric(vec!["a".to_owned()]), task.metric(vec!["a".to_owned()]));
        }
    }
}
