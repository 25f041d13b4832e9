//! How much of a summary is in another, in order?
//!
//! ROUGE-L at summary level (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.2) with the
//! choices of the Python package `rouge` 1.0.1 with its defaults: sentences end at every full stop, words at white space,
//! and *sets* of words are counted: those in any longest common subsequence of a sentence of the one and a sentence of
//! the other, against those of each text. Which subsequence, where several are longest, follows that package.
//!
//! One limit of the package is not followed: it recurses once a word, so that two sentences (runs without a full stop) of
//! about a thousand words together exceed Python's default recursion limit, which LongBench scores as 0. Here they get
//! the score they would have without that limit.

use std::collections::{HashMap, HashSet};

use super::metric::words;

/// Which way the longest common subsequence of two prefixes goes on.
#[derive(Clone, Copy)]
enum Step {
    /// Both lose their last word, which is the same.
    Both,
    /// The first loses its last word.
    First,
    /// The second does.
    Second,
}

/// The F-measure, in [0, 1); 0 where either text has nothing but full stops.
pub(super) fn rouge_l(prediction: &str, answer: &str) -> f64 {
    let mut numbers = HashMap::new();
    let said = sentences(prediction, &mut numbers);
    let wanted = sentences(answer, &mut numbers);
    if said.is_empty() || wanted.is_empty() {
        return 0.0;
    }
    let mut common = HashSet::new();
    for w in &wanted {
        for s in &said {
            add_common(w, s, &mut common);
        }
    }
    let distinct = |text: &[Vec<u32>]| text.iter().flatten().collect::<HashSet<_>>().len() as f64;
    let precision = common.len() as f64 / distinct(&said);
    let recall = common.len() as f64 / distinct(&wanted);
    2.0 * ((precision * recall) / (precision + recall + 1e-8))
}

/// Words as numbers. White space between two full stops is a sentence of one empty word, as it is to the package.
fn sentences<'t>(text: &'t str, numbers: &mut HashMap<&'t str, u32>) -> Vec<Vec<u32>> {
    let mut number = |word| {
        let next = numbers.len() as u32;
        *numbers.entry(word).or_insert(next)
    };
    let split = text.split('.').filter(|sentence| !sentence.is_empty());
    split
        .map(|sentence| {
            let found: Vec<u32> = words(sentence).map(&mut number).collect();
            if found.is_empty() { vec![number("")] } else { found }
        })
        .collect()
}

/// Adds the words of one longest common subsequence.
fn add_common(first: &[u32], second: &[u32], common: &mut HashSet<u32>) {
    let mut above = vec![0_u32; second.len() + 1];
    let mut row = above.clone();
    let mut steps = Vec::with_capacity(first.len() * second.len());
    for x in first {
        for (j, y) in second.iter().enumerate() {
            let (length, step) = if x == y {
                (above[j] + 1, Step::Both)
            } else if above[j + 1] > row[j] {
                (above[j + 1], Step::First)
            } else {
                (row[j], Step::Second)
            };
            row[j + 1] = length;
            steps.push(step);
        }
        std::mem::swap(&mut above, &mut row);
    }
    let (mut i, mut j) = (first.len(), second.len());
    while i > 0 && j > 0 {
        match steps[(i - 1) * second.len() + j - 1] {
            Step::Both => {
                common.insert(first[i - 1]);
                (i, j) = (i - 1, j - 1);
            }
            Step::First => i -= 1,
            Step::Second => j -= 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_all_of_itself() {
        assert!((rouge_l("The cat sat. It slept.", "The cat sat. It slept.") - 1.0).abs() < 1e-8);
    }

    #[test]
    fn order_counts_within_sentences_alone() {
        assert!(rouge_l("sat cat", "cat sat") < 0.51);
        assert!(rouge_l("b. a", "a. b") > 0.5);
    }

    #[test]
    fn no_words_no_score() {
        for (prediction, answer) in [("", "a"), ("a", ""), ("...", "a"), ("", "")] {
            assert_eq!(rouge_l(prediction, answer), 0.0);
        }
    }

    #[test]
    fn a_long_run_without_full_stop_is_scored() {
        let text = (0..1200).map(|i| i.to_string()).collect::<Vec<_>>().join(" ");
        assert!((rouge_l(&text, &text) - 1.0).abs() < 1e-8);
    }
}
