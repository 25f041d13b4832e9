//! What are needles hidden in? The first words of a text, or one sentence again and again.

/// RULER's noise.
pub(super) const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// A text as words with one blank between them.
#[derive(Clone, Debug)]
pub(super) struct Haystack {
    text: String,
    /// Where each word ends, in bytes.
    ends: Vec<usize>,
}

impl Haystack {
    /// `None` for a text without words.
    pub fn new(text: &str) -> Option<Haystack> {
        let mut haystack = Haystack { text: String::with_capacity(text.len()), ends: Vec::new() };
        for word in text.split_whitespace() {
            if !haystack.text.is_empty() {
                haystack.text.push(' ');
            }
            haystack.text.push_str(word);
            haystack.ends.push(haystack.text.len());
        }
        (!haystack.ends.is_empty()).then_some(haystack)
    }

    /// The first `n` words; the text begins anew where it is too short.
    pub fn words(&self, n: usize) -> String {
        let (whole, rest) = (n / self.ends.len(), n % self.ends.len());
        let mut words = String::with_capacity((self.text.len() + 1) * whole);
        for _ in 0..whole {
            words.push_str(&self.text);
            words.push(' ');
        }
        match rest {
            0 => _ = words.pop(),
            rest => words.push_str(&self.text[..self.ends[rest - 1]]),
        }
        words
    }
}

/// Words whose full stop ends no sentence.
const ABBREVIATIONS: [&str; 24] = [
    "mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "vs", "etc", "e.g", "i.e", "cf", "fig", "no", "vol",
    "inc", "co", "corp", "gen", "col", "capt", "u.s", "a.m",
];

/// The sentences of a text with single blanks, which join to it with blanks.
///
/// RULER splits with NLTK's trained Punkt; this goes by a rule: full stop, question or exclamation mark, then quotes or
/// brackets if any, a blank, and no small letter; and no abbreviation or initial.
pub(super) fn sentences(text: &str) -> Vec<&str> {
    let mut sentences = Vec::new();
    let mut start = 0;
    for (blank, _) in text.match_indices(' ') {
        let next = text[blank + 1..].chars().find(|c| !is_quote(*c));
        if ends_sentence(&text[start..blank]) && next.is_none_or(|c| !c.is_lowercase()) {
            sentences.push(&text[start..blank]);
            start = blank + 1;
        }
    }
    sentences.push(&text[start..]);
    sentences
}

fn is_quote(c: char) -> bool {
    matches!(c, '"' | '\'' | '(' | ')' | '[' | ']' | '\u{201c}' | '\u{201d}' | '\u{2018}' | '\u{2019}')
}

fn ends_sentence(so_far: &str) -> bool {
    let bare = so_far.trim_end_matches(is_quote);
    if bare.ends_with(['?', '!']) {
        return true;
    }
    let Some(bare) = bare.strip_suffix('.') else { return false };
    let word = bare.rsplit(' ').next().unwrap_or(bare).trim_start_matches(is_quote);
    let initial = word.chars().count() == 1 && word.chars().all(|c| c.is_alphabetic() && c != 'I');
    !initial && !ABBREVIATIONS.contains(&word.to_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_begin_anew() {
        let haystack = Haystack::new(" one\n two\t three ").unwrap();
        assert_eq!(haystack.words(2), "one two");
        assert_eq!(haystack.words(3), "one two three");
        assert_eq!(haystack.words(7), "one two three one two three one");
        assert!(Haystack::new(" \n").is_none());
    }

    #[test]
    fn sentences_end_where_they_do() {
        let text = "Mr. Ware made a list, e.g. of J. S. Bach's. Was it (\"long!\") \"Yes,\" he said. it was. I \
                    did. 3.5 is no end.But here it is.";
        let split = sentences(text);
        assert_eq!(
            split,
            [
                "Mr. Ware made a list, e.g. of J. S. Bach's.",
                "Was it (\"long!\")",
                "\"Yes,\" he said. it was.",
                "I did.",
                "3.5 is no end.But here it is.",
            ]
        );
        assert_eq!(split.join(" "), text);
        assert_eq!(sentences("").len(), 1);
    }
}
