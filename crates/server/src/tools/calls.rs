//! Which calls are in an answer?
//!
//! Answers are read piece by piece as they come: what may become a call is held back, and what doesn't become one stays text,
//! letter for letter. A call is told when it is whole, for until then it may turn out to be text.

use std::collections::BTreeMap;

use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::{Calls, Dialect, Form, Tools};

/// A call in an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The how-manieth of the answer, from 0.
    pub index: usize,
    /// In no other answer.
    pub id: String,
    /// Of the function.
    pub name: String,
    /// A JSON object, as the model wrote it.
    pub arguments: String,
}

impl Call {
    /// For `message.tool_calls`.
    pub fn to_json(&self) -> Value {
        json!({"id": self.id, "type": "function",
            "function": {"name": self.name, "arguments": self.arguments}})
    }

    /// For `delta.tool_calls`.
    pub fn to_delta(&self) -> Value {
        json!({"index": self.index, "id": self.id, "type": "function",
            "function": {"name": self.name, "arguments": self.arguments}})
    }
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// What is said; not empty.
    Text(String),
    /// A whole call.
    Call(Call),
}

/// The text of a whole answer and the calls in it; `None`: there are only calls.
pub fn read_answer(dialect: &Dialect, tools: &Tools, answer: &str) -> (Option<String>, Vec<Call>) {
    let mut reader = CallReader::new(dialect, tools);
    let mut pieces = reader.push(answer);
    pieces.extend(reader.finish());
    let (mut text, mut calls) = (String::new(), Vec::new());
    for piece in pieces {
        match piece {
            Piece::Text(more) => text += &more,
            Piece::Call(call) => calls.push(call),
        }
    }
    let only_calls = text.is_empty() && !calls.is_empty();
    (if only_calls { None } else { Some(text) }, calls)
}

/// Reads an answer piece by piece.
#[derive(Debug, Clone)]
pub struct CallReader {
    open: String,
    close: String,
    begin: State,
    names: Vec<String>,
    calls: Calls,
    buffer: String, // what is held back
    state: State,
    found: usize,
    after_call: bool, // whitespace that comes now is no part of what is said
    unread: bool,     // the buffer may hold a whole value that nobody tried to read
}

/// Positions are of the buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Calls may come without marks here: they have none, or the text of the answer lacks them.
    Start,
    /// At `at` begins a value that may be a call without marks.
    Unmarked { at: usize },
    /// Text, and maybe a mark in it.
    Text,
    /// `open` is at `at`; no `close` that ends a call is before `searched`.
    Marked { at: usize, searched: usize },
}

/// Whether more of the answer may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    More,
    Last,
}

/// What text that may be calls turned out to be.
enum Found {
    /// Calls, up to this position.
    Calls(Vec<(String, String)>, usize),
    /// It is not over.
    Unfinished,
    /// Something else.
    Text,
}

/// An object whose values nobody read: numbers keep their digits.
type Fields<'a> = BTreeMap<String, &'a RawValue>;

/// Below as many bytes, what may be calls is read after each piece, so that other text is not held back.
const READ_EAGERLY: usize = 256;

impl CallReader {
    /// For one answer.
    pub fn new(dialect: &Dialect, tools: &Tools) -> CallReader {
        let unmarked = dialect.form == Form::Bare || dialect.open.special.is_some();
        let begin = if unmarked { State::Start } else { State::Text };
        CallReader {
            open: dialect.open.text.clone(),
            close: dialect.close.text.clone(),
            begin,
            names: tools.callable().map(|tool| tool.name.clone()).collect(),
            calls: tools.calls,
            buffer: String::new(),
            state: begin,
            found: 0,
            after_call: false,
            unread: false,
        }
    }

    /// The answer goes on with `text`; what of it can be told.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        let mut pieces = Vec::new();
        self.buffer += text;
        self.unread |= text.contains(['}', ']']);
        while self.advance(Rest::More, &mut pieces) {}
        pieces
    }

    /// The answer ends; what was held back.
    pub fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        while self.advance(Rest::Last, &mut pieces) {}
        let end = if self.found > 0 { self.buffer.trim_end().len() } else { self.buffer.len() };
        self.say(end, &mut pieces);
        self.buffer.clear();
        pieces
    }

    /// Whether there may be more to do.
    fn advance(&mut self, rest: Rest, pieces: &mut Vec<Piece>) -> bool {
        let (found, not_calls) = match self.state {
            State::Start => return self.start(rest),
            State::Text => return self.text(pieces),
            State::Unmarked { at } => (self.values(at, rest), 0),
            State::Marked { at, searched } => {
                let body = at + self.open.len();
                let found = match self.close.as_str() {
                    "" => self.values(body, rest),
                    _ => self.enclosed(at, searched, rest),
                };
                (found, body)
            }
        };
        match found {
            Found::Unfinished => return false,
            Found::Text => {
                self.say(not_calls, pieces);
                self.state = State::Text;
            }
            Found::Calls(calls, end) => {
                self.buffer.drain(..end);
                self.tell(calls, pieces);
                self.state = self.begin;
                self.after_call = true;
            }
        }
        true
    }

    fn start(&mut self, rest: Rest) -> bool {
        let separates = |letter: char| letter.is_whitespace() || (self.found > 0 && ";,".contains(letter));
        let text = self.buffer.trim_start_matches(separates);
        let begins = |mark: &str| !mark.is_empty() && text.starts_with(mark);
        if text.is_empty() || (rest == Rest::More && self.open.starts_with(text)) {
            return false;
        }
        self.state = if text.starts_with(['{', '[']) && !begins(&self.open) {
            State::Unmarked { at: self.buffer.len() - text.len() }
        } else {
            State::Text
        };
        true
    }

    fn text(&mut self, pieces: &mut Vec<Piece>) -> bool {
        let mark = if self.open.is_empty() { None } else { self.buffer.find(&self.open) };
        let end = mark.unwrap_or_else(|| self.buffer.len() - begun(&self.buffer, &self.open));
        let said = self.buffer[..end].trim_end().len(); // whitespace before a call is no part of what is said
        self.say(said, pieces);
        let Some(mark) = mark else { return false };
        let at = mark - said;
        self.state = State::Marked { at, searched: at + self.open.len() };
        self.unread = true;
        true
    }

    /// A call, or a list of calls, that begins at `at` and ends where its JSON does.
    fn values(&mut self, at: usize, rest: Rest) -> Found {
        if rest == Rest::More && !self.unread && self.buffer.len() > READ_EAGERLY {
            return Found::Unfinished;
        }
        self.unread = false;
        let mut values = serde_json::Deserializer::from_str(&self.buffer[at..]).into_iter::<&RawValue>();
        match (values.next(), rest) {
            (Some(Ok(value)), _) => match self.calls_in(value) {
                Some(calls) => Found::Calls(calls, at + values.byte_offset()),
                None => Found::Text,
            },
            (None, Rest::More) => Found::Unfinished,
            (Some(Err(e)), Rest::More) if may_go_on(&e, &self.buffer) => Found::Unfinished,
            _ => Found::Text,
        }
    }

    /// A call between marks, the first of which is at `at`. The second may also be in a text that the call contains, and missing
    /// at the end of an answer.
    fn enclosed(&mut self, at: usize, searched: usize, rest: Rest) -> Found {
        let body = at + self.open.len();
        let read = |end: usize| serde_json::from_str::<&RawValue>(self.buffer[body..end].trim());
        let calls = |value: &RawValue, end: usize| match self.calls_in(value) {
            Some(calls) => Found::Calls(calls, end),
            None => Found::Text,
        };
        let mut from = searched;
        while let Some(close) = self.buffer[from..].find(&self.close).map(|close| from + close) {
            let end = close + self.close.len();
            match read(close) {
                Ok(value) => return calls(value, end),
                Err(e) if may_go_on(&e, &self.buffer[..close]) => from = end,
                Err(_) => return Found::Text,
            }
        }
        let begins = self.buffer[body..].trim_start();
        if !begins.is_empty() && !begins.starts_with(['{', '[']) {
            return Found::Text;
        }
        if rest == Rest::Last {
            let end = self.buffer.len();
            return read(end).map_or(Found::Text, |value| calls(value, end));
        }
        let later = self.buffer.floor_char_boundary(self.buffer.len().saturating_sub(self.close.len()));
        self.state = State::Marked { at, searched: from.max(later) };
        Found::Unfinished
    }

    /// The name and arguments of each call, if `value` is a call of an offered tool, or a list of such.
    fn calls_in(&self, value: &RawValue) -> Option<Vec<(String, String)>> {
        if !value.get().starts_with('[') {
            return Some(vec![self.call_in(value)?]);
        }
        let list: Vec<&RawValue> =
            serde_json::from_str(value.get()).ok().filter(|list: &Vec<_>| !list.is_empty())?;
        list.into_iter().map(|value| self.call_in(value)).collect()
    }

    fn call_in(&self, value: &RawValue) -> Option<(String, String)> {
        let fields: Fields<'_> = serde_json::from_str(value.get()).ok()?;
        let name: String = serde_json::from_str(fields.get("name")?.get()).ok()?;
        if !self.names.contains(&name) {
            return None;
        }
        let arguments = match fields.get("arguments").or_else(|| fields.get("parameters")) {
            Some(object) if object.get().starts_with('{') => object.get().to_owned(),
            Some(text) => {
                let text: String = serde_json::from_str(text.get()).ok()?;
                serde_json::from_str::<Fields<'_>>(&text).ok().map(|_| text.clone())?
            }
            None if fields.len() == 1 => "{}".to_owned(),
            None => return None,
        };
        Some((name, arguments))
    }

    fn tell(&mut self, calls: Vec<(String, String)>, pieces: &mut Vec<Piece>) {
        for (name, arguments) in calls {
            if self.calls == Calls::One && self.found > 0 {
                return;
            }
            pieces.push(Piece::Call(Call { index: self.found, id: call_id(), name, arguments }));
            self.found += 1;
        }
    }

    fn say(&mut self, end: usize, pieces: &mut Vec<Piece>) {
        let said: String = self.buffer.drain(..end).collect();
        let said = if self.after_call { said.trim_start() } else { said.as_str() };
        if said.is_empty() {
            return;
        }
        self.after_call = false;
        match pieces.last_mut() {
            Some(Piece::Text(before)) => *before += said,
            _ => pieces.push(Piece::Text(said.to_owned())),
        }
    }
}

/// Whether `text` may be JSON as far as it goes. A number that stops after its point or sign is no such error to the parser.
fn may_go_on(error: &serde_json::Error, text: &str) -> bool {
    error.is_eof() || text.ends_with(['-', '+', '.', 'e', 'E'])
}

/// The length of the longest end of `text` that may begin `mark`, which is ASCII.
fn begun(text: &str, mark: &str) -> usize {
    (1..mark.len()).rev().find(|&length| text.ends_with(&mark[..length])).unwrap_or(0)
}

/// `call_` and 24 digits that nobody can foresee.
fn call_id() -> String {
    let id = uuid::Uuid::new_v4().simple().to_string();
    format!("call_{}", &id[..24])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{dialect, offered, request, weather};
    use super::*;

    /// The same, with marks that the text of an answer lacks.
    fn unmarked(form: Form) -> Dialect {
        let mut dialect = dialect(form);
        dialect.open.special = Some(1);
        dialect
    }

    fn summary(pieces: Vec<Piece>) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        let mut in_text = false;
        for piece in pieces {
            match piece {
                Piece::Text(text) if in_text => *found.last_mut().unwrap() += &text,
                Piece::Text(text) => found.push(text),
                Piece::Call(ref call) => {
                    found.push(format!("#{} {}({})", call.index, call.name, call.arguments))
                }
            }
            in_text = !found.last().unwrap().starts_with('#');
        }
        found
    }

    /// What comes out of `answer` when it arrives in pieces that end at `cuts`.
    fn read(dialect: &Dialect, answer: &str, cuts: &[usize]) -> Vec<String> {
        let mut reader = CallReader::new(dialect, &offered());
        let mut pieces = Vec::new();
        let mut from = 0;
        for &cut in cuts.iter().chain([&answer.len()]) {
            let cut = answer.floor_char_boundary(cut).max(from);
            pieces.extend(reader.push(&answer[from..cut]));
            from = cut;
        }
        pieces.extend(reader.finish());
        summary(pieces)
    }

    /// Answers and what is in them.
    fn cases() -> Vec<(Dialect, &'static str, Vec<&'static str>)> {
        let (hermes, mistral, bare) = (dialect(Form::Hermes), dialect(Form::Mistral), dialect(Form::Bare));
        vec![
            (hermes.clone(), "", vec![]),
            (hermes.clone(), "Just text,\n two lines. \n", vec!["Just text,\n two lines. \n"]),
            (
                hermes.clone(),
                "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Zürich 🏔\"}}\n</tool_call>",
                vec!["#0 get_weather({\"city\": \"Zürich 🏔\"})"],
            ),
            (
                hermes.clone(),
                "Ich schaue nach… 😀\n\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>\n<tool_call>{\"arguments\": {\"city\": \"</tool_call>\"}, \"name\": \"get_weather\"}</tool_call>\n",
                vec!["Ich schaue nach… 😀", "#0 now({})", "#1 get_weather({\"city\": \"</tool_call>\"})"],
            ),
            (hermes.clone(), "<tool_call>{\"name\": \"now\"}", vec!["#0 now({})"]),
            (
                hermes.clone(),
                "<tool_call>{\"name\": \"now\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call> Done.",
                vec!["#0 now({\"a\": 1})", "Done."],
            ),
            (hermes.clone(), "a < b, <tool> and <tool_", vec!["a < b, <tool> and <tool_"]),
            (
                hermes.clone(),
                " <tool_call>\n{\"name\": \"now\", \"arguments\": {]}\n</tool_call>!",
                vec![" <tool_call>\n{\"name\": \"now\", \"arguments\": {]}\n</tool_call>!"],
            ),
            (
                hermes.clone(),
                "<tool_call>{\"name\": \"now\", \"argum",
                vec!["<tool_call>{\"name\": \"now\", \"argum"],
            ),
            (
                hermes.clone(),
                "<tool_call>{\"name\": \"none\", \"arguments\": {}}</tool_call>",
                vec!["<tool_call>{\"name\": \"none\", \"arguments\": {}}</tool_call>"],
            ),
            (
                hermes.clone(),
                "The tag <tool_call> begins a call: <tool_call>[{\"name\": \"now\", \"arguments\": {}}]</tool_call>",
                vec!["The tag <tool_call> begins a call:", "#0 now({})"],
            ),
            (
                hermes,
                "{\"name\": \"now\", \"arguments\": {}}",
                vec!["{\"name\": \"now\", \"arguments\": {}}"],
            ),
            (
                unmarked(Form::Hermes),
                "\n{\"name\": \"now\", \"arguments\": {}}\n\n{\"name\": \"now\", \"arguments\": {\"\\u00e9\": [-1.5E+999, true, null]}}\n",
                vec!["#0 now({})", "#1 now({\"\\u00e9\": [-1.5E+999, true, null]})"],
            ),
            (
                mistral.clone(),
                "Gut. [TOOL_CALLS] [{\"name\": \"now\", \"arguments\": {}}, {\"name\": \"get_weather\", \"arguments\": {\"city\": \"]\"}}]",
                vec!["Gut.", "#0 now({})", "#1 get_weather({\"city\": \"]\"})"],
            ),
            (mistral, "[TOOL_CALLS] [{\"name\": now}]", vec!["[TOOL_CALLS] [{\"name\": now}]"]),
            (unmarked(Form::Mistral), " [{\"name\": \"now\", \"arguments\": {}}]", vec!["#0 now({})"]),
            (unmarked(Form::Mistral), " [1] is \"a\" list", vec![" [1] is \"a\" list"]),
            (
                bare.clone(),
                "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Köln\"}}; {\"name\": \"now\", \"parameters\": {}}",
                vec!["#0 get_weather({\"city\": \"Köln\"})", "#1 now({})"],
            ),
            (bare.clone(), "{\"name\": \"Ann\", \"age\": 3}", vec!["{\"name\": \"Ann\", \"age\": 3}"]),
            (bare.clone(), " {\"open", vec![" {\"open"]),
            (
                bare,
                "No {\"name\": \"now\", \"parameters\": {}}",
                vec!["No {\"name\": \"now\", \"parameters\": {}}"],
            ),
        ]
    }

    #[test]
    fn answers_cut_at_any_two_bytes_read_the_same() {
        for (dialect, answer, wanted) in cases() {
            assert_eq!(read(&dialect, answer, &[]), wanted, "{answer}");
            for first in 0..=answer.len() {
                for second in first..=answer.len() {
                    let got = read(&dialect, answer, &[first, second]);
                    assert_eq!(got, wanted, "{answer} cut at {first} and {second}");
                }
            }
            let every: Vec<usize> = (0..answer.len()).collect();
            assert_eq!(read(&dialect, answer, &every), wanted, "{answer} letter by letter");
        }
    }

    #[test]
    fn text_is_not_held_back_longer_than_it_must() {
        let mut reader = CallReader::new(&dialect(Form::Hermes), &offered());
        let mut said = |text: &str| summary(reader.push(text)).concat();
        assert_eq!(said("Hello"), "Hello");
        assert_eq!(said(" wor"), " wor");
        assert_eq!(said("ld <too"), "ld");
        assert_eq!(said("th>"), " <tooth>");
        assert_eq!(said("<tool_call>"), "");
        assert_eq!(said(" is a"), "<tool_call> is a");
        assert_eq!(said("\n"), "");
        assert_eq!(said("b"), "\nb");
    }

    #[test]
    fn one_call_where_only_one_is_wanted() {
        let fields = json!({"tools": weather(), "parallel_tool_calls": false});
        let tools = Tools::from_request(&request(fields)).unwrap().unwrap();
        let call = "<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";
        let (said, calls) = read_answer(&dialect(Form::Hermes), &tools, &call.repeat(3));
        assert_eq!((said, calls.len(), tools.parallel()), (None, 1, false));
        assert!(calls[0].id.starts_with("call_") && calls[0].id.len() == 29);
        let delta = calls[0].to_delta();
        assert!(delta["index"] == 0 && delta["function"]["arguments"] == "{}" && delta["type"] == "function");
        assert!(calls[0].to_json().get("index").is_none());
    }

    proptest! {
        #[test]
        fn any_text_comes_out_as_it_came(
            parts in prop::collection::vec(prop_oneof![
                "[ -~\n]{0,6}", Just("<tool_call>".to_owned()), Just("</tool_call>".to_owned()),
                Just("[TOOL_CALLS]".to_owned()), Just("{\"name\"".to_owned()), Just("ü🏔".to_owned()),
                Just("[{".to_owned()), Just("}]".to_owned()),
            ], 0..12),
            cuts in prop::collection::vec(0..80_usize, 0..8),
        ) {
            let answer = parts.concat();
            let mut cuts = cuts;
            cuts.sort_unstable();
            for form in [Form::Hermes, Form::Mistral, Form::Bare] {
                for dialect in [dialect(form), unmarked(form)] {
                    prop_assert_eq!(read(&dialect, &answer, &cuts).concat(), answer.clone());
                }
            }
        }
    }
}
