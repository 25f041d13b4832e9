//! How good is an answer, by LongBench's own rules?
//!
//! Each measure gives the number that the official `metrics.py` gives, its quirks included, so that scores can be laid
//! beside published ones. What Python's `re` and `str` count as a letter, digit or white space differs from Rust's
//! `char` methods in a few characters; here Python's meaning holds.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;

use super::{rouge, sequence_matcher};

/// How one of LongBench's tasks is judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Metric {
    /// What is computed.
    pub measure: Measure,
    /// What it is computed of.
    pub reads: Reads,
}

/// Which part of a prediction counts (official `eval.py`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// All of it.
    Everything,
    /// Its first line, see [`first_line`]: few-shot tasks, where a model goes on to invent the next example.
    FirstLine,
}

/// What is computed of a prediction and one right answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Measure {
    /// F1 of the words in common, without case, punctuation and articles.
    QaF1,
    /// ROUGE-L, F-measure, as the Python package `rouge` 1.0.1 computes it.
    RougeL,
    /// Whether the right class is named, divided by the number of classes named.
    Classification {
        /// Every class there is.
        classes: Vec<String>,
    },
    /// The share of the numbers said that are the right paragraph's; an answer reads `Paragraph 7`.
    Retrieval,
    /// The share of the numbers said that are the right one.
    Count,
    /// Likeness of the first line of code, in hundredths: `fuzz.ratio` of the Python package `fuzzywuzzy` as LongBench's
    /// requirements.txt installs it, which is without `python-Levenshtein`: `difflib`'s ratio (Ratcliff and Obershelp).
    /// With `python-Levenshtein` the same call gives other numbers (1 - indel distance / both lengths).
    CodeSim,
}

impl Metric {
    /// The best score over the right answers, in [0, 1], not rounded; 0 if there are none.
    ///
    /// [`Measure::RougeL`] of an answer with itself is `1 / (1 + 5e-9)`, as the official number is.
    pub fn score(&self, prediction: &str, answers: &[String]) -> f64 {
        let prediction = match self.reads {
            Reads::Everything => prediction,
            Reads::FirstLine => first_line(prediction),
        };
        answers.iter().map(|answer| self.measure.score(prediction, answer)).fold(0.0, f64::max)
    }
}

/// What is left of a prediction when leading newlines and everything from the next newline on are gone.
pub fn first_line(prediction: &str) -> &str {
    prediction.trim_start_matches('\n').split('\n').next().unwrap_or("")
}

impl Measure {
    fn score(&self, prediction: &str, answer: &str) -> f64 {
        match self {
            Measure::QaF1 => qa_f1(prediction, answer),
            Measure::RougeL => rouge::rouge_l(prediction, answer),
            Measure::Classification { classes } => classification(prediction, answer, classes),
            Measure::Retrieval => paragraph(answer).map_or(0.0, |number| share_of(prediction, number)),
            Measure::Count => share_of(prediction, answer),
            Measure::CodeSim => sequence_matcher::percent(code_line(prediction), answer) / 100.0,
        }
    }
}

fn qa_f1(prediction: &str, answer: &str) -> f64 {
    let (prediction, answer) = (normalized(prediction), normalized(answer));
    let mut wanted: HashMap<&str, usize> = HashMap::new();
    for word in words(&answer) {
        *wanted.entry(word).or_default() += 1;
    }
    let (mut said, mut same) = (0, 0);
    for word in words(&prediction) {
        said += 1;
        if let Some(left) = wanted.get_mut(word).filter(|left| **left > 0) {
            *left -= 1;
            same += 1;
        }
    }
    if same == 0 {
        return 0.0;
    }
    let precision = f64::from(same) / f64::from(said);
    let recall = f64::from(same) / words(&answer).count() as f64;
    2.0 * precision * recall / (precision + recall)
}

/// Lower case, no ASCII punctuation, then no English articles. An article is a whole run of what `re` calls `\w`
/// (letters and numbers, but no combining marks; underscores went with the punctuation).
fn normalized(text: &str) -> String {
    static RUN: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"[\p{L}\p{N}]+").expect("a valid pattern"));
    let bare: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let mut kept = String::with_capacity(bare.len());
    let mut end = 0;
    for run in RUN.find_iter(&bare).filter(|run| matches!(run.as_str(), "a" | "an" | "the")) {
        kept.push_str(&bare[end..run.start()]);
        kept.push(' ');
        end = run.end();
    }
    kept.push_str(&bare[end..]);
    kept
}

/// Python's `text.split()`: its white space is Unicode's and the four ASCII separators.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)).filter(|word| !word.is_empty())
}

/// Names of classes that are part of the right one's name are forgiven, but the official loop removes from the list it
/// walks over, and so passes over the class after each it removed.
fn classification(prediction: &str, answer: &str, classes: &[String]) -> f64 {
    let mut named: Vec<&str> =
        classes.iter().map(String::as_str).filter(|&class| prediction.contains(class)).collect();
    let mut at = 0;
    while let Some(&class) = named.get(at) {
        if class != answer && answer.contains(class) {
            let first = named.iter().position(|&other| other == class).unwrap_or(at);
            named.remove(first);
        }
        at += 1;
    }
    if named.contains(&answer) { 1.0 / named.len() as f64 } else { 0.0 }
}

static NUMBER: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\p{Nd}+").expect("a valid pattern"));

/// Of the numbers in `prediction`, how many are written like `number`?
fn share_of(prediction: &str, number: &str) -> f64 {
    let (mut all, mut right) = (0, 0);
    for found in NUMBER.find_iter(prediction) {
        all += 1;
        right += u32::from(found.as_str() == number);
    }
    if all == 0 { 0.0 } else { f64::from(right) / f64::from(all) }
}

/// The first number that follows `Paragraph ` in an answer.
pub(super) fn paragraph(answer: &str) -> Option<&str> {
    static PARAGRAPH: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"Paragraph (\p{Nd}+)").expect("a valid pattern"));
    PARAGRAPH.captures(answer).and_then(|found| found.get(1)).map(|number| number.as_str())
}

/// The first line without a mark of a fence or a comment, leading newlines left out; empty if there is none.
fn code_line(prediction: &str) -> &str {
    let marked = |line: &&str| line.contains('`') || line.contains('#') || line.contains("//");
    prediction.trim_start_matches('\n').split('\n').find(|line| !marked(line)).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(measure: Measure, prediction: &str, answers: &[&str]) -> f64 {
        let answers: Vec<String> = answers.iter().map(|&answer| answer.to_owned()).collect();
        Metric { measure, reads: Reads::Everything }.score(prediction, &answers)
    }

    #[test]
    fn articles_are_whole_words() {
        assert_eq!(
            words(&normalized("The theatre, an AnA; a.b")).collect::<Vec<_>>(),
            ["theatre", "ana", "ab"]
        );
        assert_eq!(normalized("the_x the"), "thex  ");
        // A combining mark is no letter to `re`, so the article before it goes.
        assert_eq!(normalized("a\u{301}"), " \u{301}");
        // Superscripts and other numbers are.
        assert_eq!(normalized("a² a"), "a²  ");
    }

    #[test]
    fn the_best_answer_counts() {
        assert_eq!(judged(Measure::QaF1, "Ada Lovelace", &["Byron", "The Ada, Lovelace!"]), 1.0);
        assert_eq!(judged(Measure::QaF1, "Ada", &[]), 0.0);
        assert_eq!(judged(Measure::QaF1, "the", &["a"]), 0.0);
    }

    #[test]
    fn a_first_line_is_the_first_with_text() {
        assert_eq!(first_line("\n\nDate\nQuestion: When"), "Date");
        assert_eq!(first_line(" \nDate"), " ");
        assert_eq!(first_line("\n\n"), "");
        let metric = Metric { measure: Measure::Count, reads: Reads::FirstLine };
        assert_eq!(metric.score("\n7\n8", &["7".to_owned()]), 1.0);
    }

    #[test]
    fn an_answer_without_a_paragraph_scores_nothing() {
        assert_eq!(judged(Measure::Retrieval, "Paragraph 3", &["third"]), 0.0);
        assert_eq!(judged(Measure::Retrieval, "3, or 4", &["Paragraph 3"]), 0.5);
    }

    #[test]
    fn the_class_after_a_removed_one_is_passed_over() {
        let classes = ["a", "ab", "abc"].map(str::to_owned).to_vec();
        // "a" is removed, "ab" moves into its place and is not looked at.
        assert_eq!(judged(Measure::Classification { classes }, "abc", &["abc"]), 0.5);
    }
}
