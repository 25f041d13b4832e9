//! Can a cache that was compressed before the question still answer it? Needles in somebody's text, questions apart.

use super::draw::Draw;
use super::haystack::{Haystack, sentences};
use super::niah::{Kind, fresh, needle_sentence, question};
use std::collections::HashSet;

/// A text with needles in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Hidden {
    /// What is read before any question is known.
    pub prompt: String,
    /// The needles in the order of the text.
    pub needles: Vec<Needle>,
}

/// One needle.
#[derive(Clone, Debug, PartialEq)]
pub struct Needle {
    /// What follows the prompt, up to the answer.
    pub question: String,
    /// The right answer, with the blank before it.
    pub answer: String,
    /// Where the needle begins in the prompt, from 0 to 1.
    pub depth: f64,
}

/// Hides `count` numbers between the sentences of a text, evenly from its beginning to its end, in RULER's words
/// (`niah`). The same seed gives the same keys and numbers.
pub fn hide(text: &str, count: usize, seed: u64) -> Hidden {
    let mut draw = Draw::new([seed, count as u64, 0, 0]);
    let mut seen = HashSet::new();
    let text = Haystack::new(text).map_or(String::new(), |haystack| haystack.text);
    let sentences = sentences(&text);
    let mut prompt =
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. I \
                      will quiz you about the numbers afterwards.\n"
            .to_owned();
    let mut begins = Vec::new();
    let mut from = 0;
    for i in 0..count {
        let to = (sentences.len() * (2 * i + 1)).div_ceil(2 * count);
        let key = fresh(Kind::Words, &mut seen, &mut draw);
        let value = fresh(Kind::Number, &mut seen, &mut draw);
        for sentence in &sentences[from..to] {
            prompt.push_str(sentence);
            prompt.push(' ');
        }
        begins.push((prompt.len(), key.clone(), value.clone()));
        prompt.push_str(&needle_sentence(Kind::Number, &key, &value));
        prompt.push(' ');
        from = to;
    }
    prompt.push_str(&sentences[from..].join(" "));
    let prompt = prompt.trim_end().to_owned();
    let needle = |(begin, key, value): (usize, String, String)| Needle {
        question: question(Kind::Number, &key),
        answer: format!(" {value}"),
        depth: begin as f64 / prompt.len() as f64,
    };
    let needles = begins.into_iter().map(needle).collect();
    Hidden { prompt, needles }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needles_are_in_the_text_in_order_and_asked_for() {
        let text = "One came. Two came later. Three stayed. Four left. Five slept. Six woke.";
        let hidden = hide(text, 3, 7);
        assert_eq!(hidden, hide(text, 3, 7));
        assert_ne!(hidden, hide(text, 3, 8));
        let mut from = 0;
        for needle in &hidden.needles {
            let at = hidden.prompt.find(&format!(" is:{}.", needle.answer)).unwrap();
            assert!(at > from && needle.depth <= at as f64 / hidden.prompt.len() as f64);
            let key = needle.question.split(" for ").nth(1).unwrap().split(' ').next().unwrap();
            assert!(hidden.prompt[from..at].contains(key));
            from = at;
        }
        // Nothing of the text is lost.
        let bare = hidden.needles.iter().fold(hidden.prompt.clone(), |prompt, needle| {
            let end = prompt.find(&format!("{}. ", needle.answer)).unwrap() + needle.answer.len() + 2;
            let begin = prompt[..end].rfind("One of the special").unwrap();
            prompt[..begin].to_owned() + &prompt[end..]
        });
        assert!(bare.ends_with(text), "{bare}");
        assert_eq!(hide("", 1, 1).needles.len(), 1);
    }
}
