//! Can a cache that was compressed before the question still answer it? Needles in somebody's text, questions apart.

use super::draw::Draw;
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

/// Hides `count` numbers in a text, evenly from its beginning to its end, in RULER's words (`niah`); the text itself stays
/// as it is. A needle goes after the end of a sentence, a line or a word, the best of them that is near its place. The
/// same seed gives the same keys and numbers.
pub fn hide(text: &str, count: usize, seed: u64) -> Hidden {
    let mut draw = Draw::new([seed, count as u64, 0, 0]);
    let mut seen = HashSet::new();
    let mut prompt =
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. I \
                      will quiz you about the numbers afterwards.\n"
            .to_owned();
    let mut begins = Vec::new();
    let mut from = 0;
    for i in 0..count {
        let to = gap(text, from, text.len() * (2 * i + 1) / (2 * count));
        prompt.push_str(&text[from..to]);
        let key = fresh(Kind::Words, &mut seen, &mut draw);
        let value = fresh(Kind::Number, &mut seen, &mut draw);
        begins.push((prompt.len(), key.clone(), value.clone()));
        prompt.push_str(&needle_sentence(Kind::Number, &key, &value));
        // As the text goes on: with the line or the blank that ended before the needle.
        prompt.push_str(if text[..to].ends_with('\n') { "\n" } else { " " });
        from = to;
    }
    prompt.push_str(&text[from..]);
    let needle = |(begin, key, value): (usize, String, String)| Needle {
        question: question(Kind::Number, &key),
        answer: format!(" {value}"),
        depth: begin as f64 / prompt.len() as f64,
    };
    let needles = begins.into_iter().map(needle).collect();
    Hidden { prompt, needles }
}

/// Where a needle that belongs at byte `place` goes: after the next blank or line end that follows a sentence, else after
/// the next line end, else after the next blank, if there is one within a few hundred bytes; else at the end.
fn gap(text: &str, from: usize, place: usize) -> usize {
    const NEAR: usize = 400;
    let begin = text.floor_char_boundary(place.max(from));
    let near = &text[begin..text.floor_char_boundary(begin.saturating_add(NEAR).min(text.len()))];
    let after = |pattern: &str| near.find(pattern).map(|at| begin + at + pattern.len());
    let ends = [". ", ".\n", "? ", "! "].iter().filter_map(|end| after(end)).min();
    ends.or_else(|| after("\n")).or_else(|| after(" ")).unwrap_or(text.len())
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
        // Nothing of the text is lost or changed.
        let bare = hidden.needles.iter().fold(hidden.prompt.clone(), |prompt, needle| {
            let end = prompt.find(&format!("{}.", needle.answer)).unwrap() + needle.answer.len() + 2;
            let begin = prompt[..end].rfind("One of the special").unwrap();
            prompt[..begin].to_owned() + &prompt[end..]
        });
        assert!(bare.ends_with(text), "{bare}");
        assert_eq!(hide("", 1, 1).needles.len(), 1);
    }

    #[test]
    fn needles_are_spread_over_texts_of_any_kind() {
        let code = "fn main() {\n    let x = 1;\n}\n".repeat(40);
        let words = "word ".repeat(300);
        for text in [code.as_str(), &words, &"\u{e9}".repeat(2000)] {
            let hidden = hide(text, 4, 3);
            let depths: Vec<f64> = hidden.needles.iter().map(|needle| needle.depth).collect();
            assert!(depths.is_sorted(), "{depths:?}");
            if text.contains(' ') {
                for (i, depth) in depths.iter().enumerate() {
                    assert!((depth - (2 * i + 1) as f64 / 8.0).abs() < 0.15, "{depths:?}");
                }
            }
        }
    }
}
