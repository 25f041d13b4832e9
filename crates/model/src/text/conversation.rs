//! Which tokens is a conversation? The template's special tokens are meant; those that somebody wrote into a message are
//! letters like any other.
//!
//! The template is rendered twice: once with what was said, once with a mark in the place of each message. Where the two
//! agree but for the marks, and for white space that the template strips, it is known which letters are whose.

use serde_json::{Map, Value};

use super::{Specials, Text};
use crate::ModelError;

/// Where a prompt ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Where the template's text does.
    Rendered,
    /// Right after what the last message says, which is to be gone on with.
    LastMessage,
}

/// The tokens of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// All of them.
    pub tokens: Vec<u32>,
    /// Special tokens that somebody wrote into a message were taken for the template's own: it changes what is said, so that
    /// the two could not be told apart.
    pub takes_written: bool,
}

/// A piece of a rendered conversation.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Piece<'a> {
    /// The template's.
    Template(&'a str),
    /// What a message says.
    Said { message: usize, text: &'a str },
}

/// Around the number of a message that a mark stands for: a private-use character.
const MARK: char = '\u{F8FF}';

impl Text {
    /// The tokens of `messages` as the chat template writes them, with `variables` as in [`Text::chat_with`]. A template that
    /// leaves out what a user says is an error.
    pub fn encode_messages(
        &self,
        messages: &[Value],
        variables: &Map<String, Value>,
        ending: Ending,
    ) -> Result<Encoded, ModelError> {
        let rendered = self.chat_with(messages, variables)?;
        let marked = self.chat_with(&marked(messages), variables).ok();
        let pieces = marked.as_deref().and_then(|marked| align(marked, &rendered, messages));
        let Some(mut pieces) = pieces else { return self.encode_unaligned(&rendered, messages, ending) };
        for (index, message) in messages.iter().enumerate() {
            let is_there = |piece: &Piece| matches!(piece, Piece::Said { message, .. } if *message == index);
            if message["role"] == "user" && said(message).is_some() && !pieces.iter().any(is_there) {
                return Err(left_out("what the user says"));
            }
        }
        if ending == Ending::LastMessage {
            let last =
                |piece: &Piece| matches!(piece, Piece::Said { message, .. } if message + 1 == messages.len());
            let at = pieces.iter().rposition(last).ok_or_else(|| left_out("the last message"))?;
            pieces.truncate(at + 1);
        }
        let mut tokens = Vec::new();
        for piece in pieces {
            tokens.extend(match piece {
                Piece::Template(text) => self.encode(text, Specials::Written)?,
                Piece::Said { text, .. } => self.encode(text, Specials::Literal)?,
            });
        }
        Ok(Encoded { tokens, takes_written: false })
    }

    /// The same where the template changes what is said.
    fn encode_unaligned(
        &self,
        rendered: &str,
        messages: &[Value],
        ending: Ending,
    ) -> Result<Encoded, ModelError> {
        let mut prompt = rendered;
        if let (Ending::LastMessage, Some(message)) = (ending, messages.last()) {
            let text = said(message).unwrap_or_default().trim();
            let at = rendered.rfind(text).filter(|_| !text.is_empty());
            prompt = &rendered[..at.ok_or_else(|| left_out("the last message"))? + text.len()];
        }
        let mut takes_written = false;
        for text in messages.iter().filter_map(said) {
            takes_written |= self.encode(text, Specials::Written)? != self.encode(text, Specials::Literal)?;
        }
        Ok(Encoded { tokens: self.encode(prompt, Specials::Written)?, takes_written })
    }

    /// The chat template's source, if there is one.
    pub fn template(&self) -> Option<String> {
        self.template.as_ref().map(super::ChatTemplate::source)
    }
}

fn left_out(what: &str) -> ModelError {
    ModelError::Template { what: format!("it leaves out {what}; use a model with another template") }
}

/// What a message says, if it says anything.
fn said(message: &Value) -> Option<&str> {
    message["content"].as_str().filter(|text| !text.is_empty())
}

/// The messages with marks in the place of what they say.
fn marked(messages: &[Value]) -> Vec<Value> {
    let mut messages = messages.to_vec();
    for (index, message) in messages.iter_mut().enumerate() {
        if said(message).is_some() {
            message["content"] = Value::String(format!("{MARK}{index}{MARK}"));
        }
    }
    messages
}

/// The pieces of `rendered`, if it is `marked` with what the messages say in the place of the marks.
fn align<'a>(marked: &'a str, rendered: &str, messages: &'a [Value]) -> Option<Vec<Piece<'a>>> {
    // Template, message, template, ..: every second piece is a mark's number.
    let split: Vec<&str> = marked.split(MARK).collect();
    let mut pieces = vec![Piece::Template(split[0])];
    let mut rest = rendered.strip_prefix(split[0])?;
    for pair in split[1..].chunks(2) {
        let &[number, after] = pair else { return None };
        let message: usize = number.parse().ok()?;
        let whole = said(messages.get(message)?)?;
        // An empty piece follows anywhere: the longest first.
        let forms = [whole, whole.trim_end(), whole.trim_start(), whole.trim()];
        let fits = |text: &&str| rest.strip_prefix(*text).is_some_and(|rest| rest.starts_with(after));
        let text = forms.into_iter().find(fits)?;
        rest = &rest[text.len() + after.len()..];
        pieces.push(Piece::Said { message, text });
        pieces.push(Piece::Template(after));
    }
    rest.is_empty().then_some(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn aligned(marked: &str, rendered: &str, says: &[&str]) -> Option<Vec<String>> {
        let messages: Vec<Value> = says.iter().map(|text| json!({"content": text})).collect();
        let text = |piece: Piece| match piece {
            Piece::Template(text) => format!("[{text}]"),
            Piece::Said { text, .. } => text.to_owned(),
        };
        Some(align(marked, rendered, &messages)?.into_iter().map(text).collect())
    }

    #[test]
    fn what_was_said_is_told_from_the_template() {
        let marked = "<u>\u{F8FF}0\u{F8FF}</u><a>\u{F8FF}1\u{F8FF}";
        assert_eq!(
            aligned(marked, "<u>a</u>b</u><a> c ", &["a</u>b", " c "]).unwrap(),
            ["[<u>]", "a</u>b", "[</u><a>]", " c ", "[]"]
        );
        let stripped = aligned(marked, "<u>a</u><a>c", &[" a\n", " c"]).unwrap();
        assert_eq!(stripped, ["[<u>]", "a", "[</u><a>]", "c", "[]"]);
        assert_eq!(aligned(marked, "<u>A</u><a>c", &["a", "c"]), None);
        assert_eq!(aligned(marked, "<u>a</u><a>c!", &["a", "c"]), None);
        assert_eq!(aligned("x\u{F8FF}7\u{F8FF}", "xa", &["a"]), None);
        assert_eq!(aligned("x\u{F8FF}", "x", &["a"]), None);
    }
}
