//! What is the special magic number? Needles in noise, in a text, or among other needles (the `niah` tasks).

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::draw::Draw;
use super::fit::Recipe;
use super::haystack::{Haystack, NOISE, sentences};
use super::words;

/// What needles are hidden in.
#[derive(Clone)]
pub(super) enum Hay {
    Noise,
    Text(Arc<Haystack>),
    Needles,
}

/// What a key or a value is.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kind {
    Words,
    Number,
    Uuid,
}

/// One of the `niah` tasks.
#[derive(Clone)]
pub(super) struct Design {
    pub hay: Hay,
    pub key: Kind,
    pub value: Kind,
    pub keys: usize,
    /// Values of each key.
    pub values: usize,
    /// Keys asked for.
    pub queries: usize,
}

/// Places of needles in a text: 40 from 0 to 100 percent of its sentences.
const DEPTHS: usize = 40;

/// Needles, the keys asked for, and where in a text the needles go.
pub(super) struct Needles {
    design: Design,
    needles: Vec<String>,
    query: String,
    answers: Vec<String>,
    /// Percent, ascending.
    depths: Vec<usize>,
    longest: usize,
    seen: Seen,
    draw: Draw,
}

/// Keys and values that are taken.
type Seen = HashSet<String>;

impl Needles {
    pub fn new(design: Design, length: usize, mut draw: Draw) -> Needles {
        let mut seen = Seen::new();
        let mut needles = Vec::new();
        let mut keys: Vec<(String, Vec<String>)> = Vec::new();
        for _ in 0..design.keys {
            let key = fresh(design.key, &mut seen, &mut draw);
            let values: Vec<String> =
                (0..design.values).map(|_| fresh(design.value, &mut seen, &mut draw)).collect();
            needles.extend(values.iter().map(|value| needle_sentence(design.value, &key, value)));
            keys.push((key, values));
        }
        draw.shuffle(&mut needles);
        draw.shuffle(&mut keys);
        keys.truncate(design.queries);
        let depths = draw.ascending(DEPTHS, needles.len());
        let depths = depths.into_iter().map(|i| (100.0 * i as f64 / (DEPTHS - 1) as f64).round() as usize);
        let names: Vec<&str> = keys.iter().map(|(key, _)| key.as_str()).collect();
        let query = match names.as_slice() {
            [one] => one.to_string(),
            [first @ .., last] => format!("{}, and {last}", first.join(", ")),
            [] => String::new(),
        };
        Needles {
            depths: depths.collect(),
            longest: (4 * length).max(1),
            answers: keys.into_iter().flat_map(|(_, values)| values).collect(),
            design,
            needles,
            query,
            seen,
            draw,
        }
    }

    fn context(&self, size: usize) -> String {
        let mut draw = self.draw.clone();
        let mut lines = match &self.design.hay {
            Hay::Text(haystack) => return self.hidden_in(&haystack.words(size)),
            Hay::Noise => vec![NOISE.to_string(); size],
            Hay::Needles => {
                let (mut seen, design) = (self.seen.clone(), &self.design);
                let mut other = || {
                    let key = fresh(design.key, &mut seen, &mut draw);
                    let value = fresh(design.value, &mut seen, &mut draw);
                    needle_sentence(design.value, &key, &value)
                };
                (0..size).map(|_| other()).collect()
            }
        };
        let places = draw.ascending(size, self.needles.len());
        for (place, needle) in places.into_iter().zip(&self.needles).rev() {
            lines.insert(place, needle.clone());
        }
        lines.join("\n")
    }

    /// Each needle between two sentences, at its depth.
    fn hidden_in(&self, text: &str) -> String {
        let sentences = sentences(text);
        let mut pieces = Vec::new();
        let mut from = 0;
        for (needle, depth) in self.needles.iter().zip(&self.depths) {
            let to = sentences.len() * depth / 100;
            pieces.push(sentences[from..to].join(" "));
            pieces.push(needle.clone());
            from = to;
        }
        pieces.push(sentences[from..].join(" "));
        pieces.join(" ")
    }
}

impl Recipe for Needles {
    fn sizes(&self) -> RangeInclusive<usize> {
        1..=self.longest
    }

    fn prompt(&self, size: usize) -> String {
        let (context, query) = (self.context(size), &self.query);
        let kind = value_name(self.design.value);
        if self.answers.len() == 1 {
            let question = question(self.design.value, query);
            format!(
                "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you \
                 about the {kind} afterwards.\n{context}{question}"
            )
        } else {
            format!(
                "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz \
                 you about the {kind}s afterwards.\n{context}\nWhat are all the special magic {kind}s for {query} \
                 mentioned in the provided text? The special magic {kind}s for {query} mentioned in the provided text \
                 are"
            )
        }
    }

    fn answers(&self) -> Vec<String> {
        self.answers.clone()
    }
}

/// A key or value that no needle of this sample has.
pub(super) fn fresh(kind: Kind, seen: &mut Seen, draw: &mut Draw) -> String {
    loop {
        let new = match kind {
            Kind::Words => words::key(draw),
            Kind::Number => (1_000_000 + draw.below(9_000_000)).to_string(),
            Kind::Uuid => draw.uuid(),
        };
        if seen.insert(new.clone()) {
            return new;
        }
    }
}

fn value_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Words => "word",
        Kind::Number => "number",
        Kind::Uuid => "uuid",
    }
}

/// What asks for one value, up to the answer.
pub(super) fn question(value_kind: Kind, key: &str) -> String {
    let kind = value_name(value_kind);
    format!(
        "\nWhat is the special magic {kind} for {key} mentioned in the provided text? The special magic {kind} for {key} \
         mentioned in the provided text is"
    )
}

/// How a needle begins.
const NEEDLE: &str = "One of the special magic ";

pub(super) fn needle_sentence(value_kind: Kind, key: &str, value: &str) -> String {
    format!("{NEEDLE}{}s for {key} is: {value}.", value_name(value_kind))
}

/// Where the first needle that is asked for begins, in bytes.
pub(super) fn needle(prompt: &str, answers: &[String]) -> Option<usize> {
    let first = answers.iter().filter_map(|answer| prompt.find(&format!(" is: {answer}."))).min()?;
    prompt[..first].rfind(NEEDLE)
}
