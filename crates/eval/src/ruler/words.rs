//! Which words are keys made of, and which words are the most frequent? Keys, and the tasks `cwe` and `fwe`.

use std::collections::BTreeSet;
use std::f64::consts::PI;
use std::ops::RangeInclusive;
use std::sync::LazyLock;

use super::draw::Draw;
use super::fit::Recipe;

static NOUNS: LazyLock<Vec<&str>> = LazyLock::new(|| include_str!("words/nouns.txt").lines().collect());
static ADJECTIVES: LazyLock<Vec<&str>> =
    LazyLock::new(|| include_str!("words/adjectives.txt").lines().collect());
/// Nouns, adjectives and verbs, each once.
static WORDS: LazyLock<Vec<&str>> = LazyLock::new(|| {
    let verbs = include_str!("words/verbs.txt").lines();
    let words: BTreeSet<&str> = NOUNS.iter().chain(ADJECTIVES.iter()).copied().chain(verbs).collect();
    words.into_iter().collect()
});

/// A key: `adjective-noun`.
pub(super) fn key(draw: &mut Draw) -> String {
    format!("{}-{}", draw.pick(&ADJECTIVES), draw.pick(&NOUNS))
}

/// Words asked for in `cwe`.
const COMMON: usize = 10;

/// How often the words of a list occur.
#[derive(Clone, Copy)]
struct Repeats {
    common: usize,
    others: usize,
}

/// Common words: a short list with its answer, then a long one.
pub(super) struct CommonWords {
    example: String,
    /// All words in the sample's order; the first ten are the common ones.
    words: Vec<&'static str>,
    repeats: Repeats,
    draw: Draw,
}

impl CommonWords {
    /// Lists of less than 4,096 tokens repeat words less often.
    pub fn new(length: usize, mut draw: Draw) -> CommonWords {
        let (example_words, example_repeats, repeats) = if length < 4096 {
            (20, Repeats { common: 3, others: 1 }, Repeats { common: 6, others: 1 })
        } else {
            (40, Repeats { common: 10, others: 3 }, Repeats { common: 30, others: 3 })
        };
        let mut words = WORDS.clone();
        draw.shuffle(&mut words);
        let example = &words[..example_words];
        let example =
            format!("{} {}\n", listed(example, example_repeats, &mut draw), numbered(&example[..COMMON]));
        draw.shuffle(&mut words);
        CommonWords { example, words, repeats, draw }
    }
}

impl Recipe for CommonWords {
    fn sizes(&self) -> RangeInclusive<usize> {
        COMMON + 1..=self.words.len()
    }

    fn prompt(&self, size: usize) -> String {
        self.example.clone() + &listed(&self.words[..size], self.repeats, &mut self.draw.clone())
    }

    fn answers(&self) -> Vec<String> {
        self.words[..COMMON].iter().map(|word| word.to_string()).collect()
    }
}

/// A shuffled list with its question and the beginning of its answer.
fn listed(words: &[&str], repeats: Repeats, draw: &mut Draw) -> String {
    let (common, others) = words.split_at(COMMON);
    let mut list = common.repeat(repeats.common);
    list.extend(others.repeat(repeats.others));
    draw.shuffle(&mut list);
    format!(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones \
         that appear most often.\n{}\nQuestion: What are the 10 most common words in the above list? Answer: The top \
         10 words that appear most often in the list are:",
        numbered(&list)
    )
}

fn numbered(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().enumerate().map(|(i, word)| format!("{}. {word}", i + 1)).collect();
    words.join(" ")
}

/// Coded words asked for in `fwe`.
const FREQUENT: usize = 3;
/// From this many words on, the third and the fourth coded word differ in number.
const FEWEST: usize = 80;

/// Frequent words: coded words whose numbers fall as in a zeta distribution with exponent 2; the first rank is dots.
pub(super) struct FrequentWords {
    /// By rank.
    vocabulary: Vec<String>,
    longest: usize,
    draw: Draw,
}

impl FrequentWords {
    /// A fiftieth of the length in coded words of six letters.
    pub fn new(length: usize, mut draw: Draw) -> FrequentWords {
        let mut vocabulary = vec!["...".to_string()];
        let mut seen = BTreeSet::new();
        while vocabulary.len() < (length / 50).max(FREQUENT + 2) {
            let word = draw.letters(6, 'a');
            if seen.insert(word.clone()) {
                vocabulary.push(word);
            }
        }
        FrequentWords { vocabulary, longest: (4 * length).max(FEWEST), draw }
    }
}

impl Recipe for FrequentWords {
    fn sizes(&self) -> RangeInclusive<usize> {
        FEWEST..=self.longest
    }

    fn prompt(&self, size: usize) -> String {
        let zeta = PI * PI / 6.0;
        let mut words = Vec::new();
        for (rank, word) in (1..).zip(&self.vocabulary) {
            let count = size as f64 / ((rank * rank) as f64 * zeta);
            words.extend(std::iter::repeat_n(word.as_str(), count as usize));
        }
        self.draw.clone().shuffle(&mut words);
        format!(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently \
             appeared coded words. {}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What \
             are the three most frequently appeared words in the above coded text? Answer: According to the coded \
             text above, the three most frequently appeared words are:",
            words.join(" ")
        )
    }

    fn answers(&self) -> Vec<String> {
        self.vocabulary[1..=FREQUENT].to_vec()
    }
}
