//! What may an answer look like, and which tokens keep it so?
//!
//! A request asks for JSON, for JSON by a schema, for a regular expression, for one of several texts, for a grammar, or for calls
//! of its tools; the library llguidance turns each into a mask over the vocabulary before every token. Schemas come from anybody:
//! their size, the work to compile them and the work of each mask are bounded, and what is refused is refused in the library's
//! words. Knows no HTTP and no sampling.

use std::sync::Arc;

use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use mosaickv_engine::Grammar;
use mosaickv_model::Text;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;
use toktrie::{
    INVALID_TOKEN, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv,
};

use crate::tools::{Dialect, Form, Mark, Tools};

/// A field of a request that can't be served as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Invalid {
    /// The field.
    pub param: String,
    /// What is wrong with it.
    pub message: String,
}

impl Invalid {
    /// `message` about the field `param`.
    pub fn new(param: impl Into<String>, message: impl Into<String>) -> Invalid {
        Invalid { param: param.into(), message: message.into() }
    }
}

/// Why the answers of a model can't be restricted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this model's answers can't be restricted to a grammar: {what}")]
pub struct Unusable {
    what: String,
}

/// What is done with keywords of a JSON schema that nothing here can hold an answer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    /// They don't count.
    Ignored,
    /// The schema is refused.
    Refused,
}

/// What an answer is restricted to.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// The field of the request that says so.
    pub param: &'static str,
    /// The texts that are allowed.
    pub shape: Shape,
}

/// The texts that an answer may be.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// Any JSON object.
    JsonObject,
    /// What a JSON schema allows.
    JsonSchema {
        /// The schema.
        schema: Value,
        /// From `strict`.
        unknown: Unknown,
    },
    /// What a regular expression matches from its first letter to its last, in the syntax of the crate `regex`.
    Regex(String),
    /// A grammar in llguidance's variant of Lark.
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
}

impl Wanted {
    /// The fields that [`Wanted::from_request`] reads: OpenAI's, then vLLM's new one and its old ones.
    pub const FIELDS: [&str; 6] = [
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
    ];

    /// What the request asks for; `None` if its answer may be any text.
    pub fn from_request(request: &Map<String, Value>) -> Result<Option<Wanted>, Invalid> {
        let mut found: Option<Wanted> = None;
        for param in Wanted::FIELDS {
            let Some(value) = request.get(param).filter(|value| !value.is_null()) else { continue };
            let shape = match param {
                "response_format" => response_format(value)?,
                "structured_outputs" => structured(value)?,
                _ => Some(constraint(param, param.trim_start_matches("guided_"), value)?),
            };
            let Some(shape) = shape else { continue };
            if let Some(other) = found {
                let message = format!("only one of {} and {param} can be used", other.param);
                return Err(Invalid::new(param, message));
            }
            found = Some(Wanted { param, shape });
        }
        Ok(found)
    }
}

fn response_format(format: &Value) -> Result<Option<Shape>, Invalid> {
    let param = "response_format";
    let kind = format.get("type").and_then(Value::as_str);
    match kind.ok_or_else(|| Invalid::new(param, "response_format has no type"))? {
        "text" => Ok(None),
        "json_object" => Ok(Some(match format.get("schema") {
            Some(schema) if !schema.is_null() => {
                Shape::JsonSchema { schema: schema.clone(), unknown: Unknown::Ignored }
            }
            _ => Shape::JsonObject,
        })),
        "json_schema" => {
            let named = format.get("json_schema").and_then(Value::as_object);
            let named =
                named.ok_or_else(|| Invalid::new(param, "response_format.json_schema is no object"))?;
            let schema = named.get("schema").filter(|schema| !schema.is_null());
            let schema =
                schema.ok_or_else(|| Invalid::new(param, "response_format.json_schema has no schema"))?;
            let strict = named.get("strict").and_then(Value::as_bool).unwrap_or(false);
            let unknown = if strict { Unknown::Refused } else { Unknown::Ignored };
            Ok(Some(Shape::JsonSchema { schema: schema.clone(), unknown }))
        }
        other => Err(Invalid::new(
            param,
            format!("response_format.type is {other:?}, wanted text, json_object or json_schema"),
        )),
    }
}

/// vLLM's `structured_outputs`: an object with one constraint.
fn structured(value: &Value) -> Result<Option<Shape>, Invalid> {
    let param = "structured_outputs";
    let object = value.as_object().ok_or_else(|| Invalid::new(param, "structured_outputs is no object"))?;
    let mut set = object.iter().filter(|(_, value)| !value.is_null() && **value != Value::Bool(false));
    let Some((kind, value)) = set.next() else { return Ok(None) };
    if let Some((other, _)) = set.next() {
        return Err(Invalid::new(
            param,
            format!("structured_outputs has both {kind} and {other}, wanted one"),
        ));
    }
    constraint(param, kind, value).map(Some)
}

fn constraint(param: &str, kind: &str, value: &Value) -> Result<Shape, Invalid> {
    let text = || {
        let text = value.as_str().map(str::to_owned);
        text.ok_or_else(|| Invalid::new(param, format!("the {kind} of {param} is no string")))
    };
    match kind {
        "json_object" => Ok(Shape::JsonObject),
        "json" => {
            let schema = match value {
                Value::String(text) => serde_json::from_str(text)
                    .map_err(|e| Invalid::new(param, format!("the schema is no JSON: {e}")))?,
                schema => schema.clone(),
            };
            Ok(Shape::JsonSchema { schema, unknown: Unknown::Ignored })
        }
        "regex" => Ok(Shape::Regex(text()?)),
        "grammar" => Ok(Shape::Lark(text()?)),
        "choice" => {
            let texts = value.as_array().map(|list| list.iter().map(|item| item.as_str().map(str::to_owned)));
            let texts: Option<Vec<String>> = texts.and_then(Iterator::collect);
            let texts = texts.filter(|texts| !texts.is_empty());
            Ok(Shape::Choice(texts.ok_or_else(|| Invalid::new(param, "choice is no list of strings"))?))
        }
        other => Err(Invalid::new(
            param,
            format!("{param} does not know {other:?}, wanted json, regex, choice, grammar or json_object"),
        )),
    }
}

/// The longest schema as JSON, and the longest regular expression or grammar, in bytes.
const LONGEST: usize = 128 * 1024;

/// Bytes of the stack on which schemas are compiled: the library calls itself for each reference of a schema to another part of
/// it, and a stack that overflows ends the process. Only what is used takes memory.
const STACK: usize = 512 << 20;

/// How deep brackets of regular expressions and grammars may nest: their parsers call themselves.
const DEEPEST: usize = 100;

/// Calls that an answer which must be a call may hold at most: a small model might never stop.
const MOST_CALLS: usize = 16;

/// Whitespace between the parts of JSON: a space, or a new line and an indentation. A small model that may write any amount of
/// it writes nothing else until its tokens run out.
const WHITESPACE: &str = r"\x20|\x0A\x20{0,32}";

/// What every grammar of one model needs: its tokens as bytes, in a trie.
pub struct GrammarSource {
    factory: ParserFactory,
}

impl GrammarSource {
    /// Reads the vocabulary; some tens of milliseconds.
    pub fn new(text: &Text) -> Result<GrammarSource, Unusable> {
        let vocabulary = Arc::new(Vocabulary::new(text)?);
        let environment: TokEnv = vocabulary;
        let mut factory = ParserFactory::new(
            &environment,
            InferenceCapabilities::default(),
            &llguidance::earley::SlicedBiasComputer::general_slices(),
        )
        .map_err(|e| Unusable { what: e.to_string() })?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: 50_000, // up to 2 kB each
            max_grammar_size: 200_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(GrammarSource { factory })
    }

    /// The grammar of an answer. Takes up to about a hundred milliseconds.
    pub fn grammar(&self, wanted: &Wanted) -> Result<Restriction, Invalid> {
        let grammar = match &wanted.shape {
            Shape::JsonObject => restricted(&json!({"type": "object"}), Unknown::Ignored)
                .map(TopLevelGrammar::from_json_schema),
            Shape::JsonSchema { schema, unknown } => {
                restricted(schema, *unknown).map(TopLevelGrammar::from_json_schema)
            }
            Shape::Regex(regex) => {
                bounded("the regular expression", regex).map(|()| TopLevelGrammar::from_regex(regex))
            }
            Shape::Lark(grammar) => {
                bounded("the grammar", grammar).map(|()| TopLevelGrammar::from_lark(grammar.clone()))
            }
            Shape::Choice(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
                let grammar = format!("start: {}", texts.join(" | "));
                short("the choice", grammar.len()).map(|()| TopLevelGrammar::from_lark(grammar))
            }
        };
        self.compile(grammar.map_err(|message| Invalid::new(wanted.param, message))?, wanted.param)
    }

    /// The grammar of an answer that consists of calls of those tools that the request allows.
    pub fn tool_call(&self, tools: &Tools, dialect: &Dialect) -> Result<Restriction, Invalid> {
        let mut rules = String::new();
        let mut grammars = Vec::new();
        for (index, tool) in tools.callable().enumerate() {
            let parameters = restricted(&tool.parameters, tool.unknown)
                .map_err(|message| Invalid::new("tools", format!("{}: {message}", tool.name)))?;
            let mut grammar = GrammarWithLexer::from_json_schema(parameters);
            grammar.name = Some(format!("arguments_{index}"));
            grammars.push(grammar);
            let before = match dialect.form {
                Form::Bare => format!(r#"{{"name": "{}", "parameters": "#, tool.name),
                Form::Hermes | Form::Mistral => format!(r#"{{"name": "{}", "arguments": "#, tool.name),
            };
            rules += &format!("call_{index}: {} @arguments_{index} \"}}\"\n", quoted(&before));
        }
        let any: Vec<String> = (0..grammars.len()).map(|index| format!("call_{index}")).collect();
        rules += &format!("call: {}\n", any.join(" | "));
        let more = |call: &str| match tools.parallel() {
            true => format!(" ({call}){{0,{}}}", MOST_CALLS - 1),
            false => String::new(),
        };
        let [open, close] = [&dialect.open, &dialect.close].map(terminal);
        rules += &match dialect.form {
            Form::Hermes => {
                let more = more(r#""\n" tagged"#);
                format!("tagged: {open} \"\\n\" call \"\\n\" {close}\nstart: tagged{more}\n")
            }
            Form::Bare => "start: call\n".to_owned(),
            Form::Mistral => format!("start: {open} \" [\" call{} \"]\"\n", more(r#"", " call"#)),
        };
        grammars.insert(0, GrammarWithLexer::from_lark(rules));
        self.compile(TopLevelGrammar { grammars, max_tokens: None }, "tools")
    }

    fn compile(&self, grammar: TopLevelGrammar, param: &str) -> Result<Restriction, Invalid> {
        let compile = || -> Result<Matcher, String> {
            let parser = self.factory.create_parser(grammar).map_err(|e| in_words(&e.to_string()))?;
            let mut matcher = Matcher::new(Ok(parser));
            matcher.compute_mask().map_err(|e| in_words(&e.to_string()))?; // whether anything fulfils it
            Ok(matcher)
        };
        let matcher = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, compile);
            let thread = thread.map_err(|e| format!("no thread to compile it on: {e}"))?;
            thread.join().unwrap_or_else(|_| Err("it cannot be compiled".into()))
        });
        let mut matcher = matcher.map_err(|message| Invalid::new(param, message))?;
        for warning in matcher.grammar_warnings() {
            tracing::debug!(warning, "part of a schema does not count");
        }
        let ends = self.factory.tok_env().tok_trie().eos_tokens().to_vec();
        Ok(Restriction { matcher, ends })
    }
}

/// The schema with our whitespace, if it isn't too long.
fn restricted(schema: &Value, unknown: Unknown) -> Result<Value, String> {
    short("the schema", schema.to_string().len())?;
    if !multiples_are_small(schema) {
        return Err("a multipleOf has more than eight digits".into());
    }
    let mut schema = match schema {
        Value::Object(object) => object.clone(),
        Value::Bool(true) => Map::new(),
        _ => return Err("the schema is no object".into()),
    };
    let options = json!({
        "whitespace_pattern": WHITESPACE,
        "coerce_one_of": true,
        "lenient": unknown == Unknown::Ignored,
    });
    schema.insert("x-guidance".into(), options);
    Ok(Value::Object(schema))
}

/// The library counts remainders in 32 bits.
fn multiples_are_small(schema: &Value) -> bool {
    match schema {
        Value::Object(object) => {
            let multiple = object.get("multipleOf").filter(|multiple| multiple.is_number());
            multiple.is_none_or(|multiple| multiple.to_string().len() <= 8)
                && object.values().all(multiples_are_small)
        }
        Value::Array(list) => list.iter().all(multiples_are_small),
        _ => true,
    }
}

fn bounded(what: &str, text: &str) -> Result<(), String> {
    short(what, text.len())?;
    let mut depth = 0_usize;
    for letter in text.chars() {
        match letter {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > DEEPEST {
            return Err(format!("{what} nests brackets more than {DEEPEST} deep"));
        }
    }
    Ok(())
}

fn short(what: &str, length: usize) -> Result<(), String> {
    if length <= LONGEST {
        return Ok(());
    }
    Err(format!("{what} has {length} bytes, at most {LONGEST} are allowed"))
}

/// The library's message without the state and the stack that follow it.
fn in_words(message: &str) -> String {
    let end = ["\n<state>", "\n<backtrace>", "\n<non-verbose/>"].iter().filter_map(|mark| message.find(mark));
    match &message[..end.min().unwrap_or(message.len())] {
        "NoExtensionBias" => "no text fulfils it from here on".to_owned(),
        message => message.to_owned(),
    }
}

/// A Lark literal.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn terminal(mark: &Mark) -> String {
    match mark.special {
        Some(id) => format!("<[{id}]>"),
        None => quoted(&mark.text),
    }
}

/// A grammar and how far an answer has come in it.
pub struct Restriction {
    matcher: Matcher,
    ends: Vec<TokenId>,
}

impl Grammar for Restriction {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        if self.complete() {
            for (id, logit) in logits.iter_mut().enumerate() {
                if !self.ends.contains(&(id as TokenId)) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            return Ok(());
        }
        let mask = self.matcher.compute_mask().map_err(|e| in_words(&e.to_string()))?;
        apply(&mask, logits);
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        if self.complete() {
            return Ok(()); // an end token
        }
        self.matcher.consume_token(token).map_err(|e| in_words(&e.to_string()))
    }
}

impl Restriction {
    /// The same for another answer, without the work of compiling it.
    pub fn copy(&self) -> Restriction {
        Restriction { matcher: self.matcher.deep_clone(), ends: self.ends.clone() }
    }

    /// Whether nothing may follow.
    fn complete(&self) -> bool {
        self.matcher.is_stopped() && self.matcher.stop_reason().is_ok()
    }
}

/// Logits past the vocabulary belong to no token.
fn apply(mask: &SimpleVob, logits: &mut [f32]) {
    let known = mask.len().min(logits.len());
    let (known, padding) = logits.split_at_mut(known);
    padding.fill(f32::NEG_INFINITY);
    for (word, logits) in mask.as_slice().iter().zip(known.chunks_mut(32)) {
        if *word == u32::MAX {
            continue;
        }
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// A model's tokens as the library sees them.
struct Vocabulary {
    trie: TokTrie,
    tokenizer: Tokenizer, // what looks like a special token is letters to it
    letters: Letters,
}

/// How the vocabulary writes bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Letters {
    /// Each byte as one letter (GPT-2).
    Bytes,
    /// As text, with this letter for a space and `<0x0A>` for bytes that are in no token (SentencePiece).
    Text { space: char },
}

impl Vocabulary {
    fn new(text: &Text) -> Result<Vocabulary, Unusable> {
        let mut tokenizer = text.tokenizer().clone();
        tokenizer.set_encode_special_tokens(true);
        let letters = letters(&tokenizer)?;
        let tokens = token_bytes(&tokenizer, letters, text.eos());
        if tokens.iter().any(|bytes| bytes.len() > 1000) {
            return Err(Unusable { what: "it has a token of more than 1000 bytes".into() });
        }
        let info = TokRxInfo::new(tokens.len() as u32, text.eos().first().copied().unwrap_or(INVALID_TOKEN));
        let mut trie = TokTrie::from(&info, &tokens);
        if !text.eos().is_empty() {
            trie = trie.with_eos_tokens(text.eos());
        }
        Ok(Vocabulary { trie, tokenizer, letters })
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| match self.tokenizer.encode_fast(text, false) {
            Ok(encoding) => encoding.get_ids().to_vec(),
            Err(_) => self.trie.greedy_tokenize(text.as_bytes()),
        })
    }

    /// SentencePiece begins a text with a space, so that a piece of an answer has other tokens than the same text alone.
    fn tokenize_is_canonical(&self) -> bool {
        self.letters == Letters::Bytes
    }
}

fn letters(tokenizer: &Tokenizer) -> Result<Letters, Unusable> {
    let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or_default();
    let steps = match decoder.get("decoders").and_then(Value::as_array) {
        Some(steps) => steps.clone(),
        None => vec![decoder],
    };
    let one = |step: &Value, key: &str| step[key].as_str().and_then(|text| text.chars().next());
    let mut space = None;
    for step in &steps {
        match step["type"].as_str() {
            Some("ByteLevel") => return Ok(Letters::Bytes),
            Some("Replace") if step["content"] == " " => space = one(&step["pattern"], "String"),
            Some("Metaspace") => space = one(step, "replacement"),
            Some("ByteFallback") => space = space.or(Some(' ')),
            _ => {}
        }
    }
    let what = "its tokens are neither byte-level nor SentencePiece's".into();
    space.map(|space| Letters::Text { space }).ok_or(Unusable { what })
}

/// `[tokens]`; special tokens and those that end an answer carry the library's mark, so that no text matches them.
fn token_bytes(tokenizer: &Tokenizer, letters: Letters, ends: &[u32]) -> Vec<Vec<u8>> {
    let added = tokenizer.get_added_tokens_decoder();
    let count = tokenizer.get_vocab(true).into_values().max().map_or(0, |most| most + 1);
    let table = match letters {
        Letters::Bytes => byte_letters(),
        Letters::Text { .. } => Default::default(),
    };
    let bytes = |id: u32| {
        let Some(token) = tokenizer.id_to_token(id) else { return Vec::new() };
        let added = added.get(&id);
        if ends.contains(&id) || added.is_some_and(|token| token.special) {
            return [&[TokTrie::SPECIAL_TOKEN_MARKER], token.as_bytes()].concat();
        }
        if added.is_some() {
            return token.into_bytes();
        }
        match letters {
            Letters::Bytes => {
                let bytes: Option<Vec<u8>> =
                    token.chars().map(|letter| table.get(&letter).copied()).collect();
                bytes.unwrap_or_else(|| token.into_bytes())
            }
            Letters::Text { space } => match single_byte(&token) {
                Some(byte) => vec![byte],
                None => token.replace(space, " ").into_bytes(),
            },
        }
    };
    (0..count).map(bytes).collect()
}

/// `<0x0A>`.
fn single_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// GPT-2's letters of bytes: printable Latin-1 for itself, the rest from U+0100 on.
fn byte_letters() -> std::collections::HashMap<char, u8> {
    let itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=255).filter(|&byte| !itself(byte)).zip('\u{100}'..);
    let same = (0..=255).filter(|&byte| itself(byte)).map(|byte| (byte, char::from(byte)));
    others.chain(same).map(|(byte, letter)| (letter, byte)).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use mosaickv_model::Model;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    use super::*;

    fn tiny() -> Text {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/qwen3.gguf");
        Model::load(&path, &mut |_, _| {}).unwrap().1
    }

    /// SmolLM2-135M, if it was fetched before.
    fn real() -> Option<Text> {
        let folder = std::env::home_dir()?.join(".cache/mosaickv/smollm2-135m");
        let files = std::fs::read_dir(&folder).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
        let file = files.into_iter().find(|path| path.extension().is_some_and(|end| end == "gguf"));
        if file.is_none() {
            println!("skipped for SmolLM2: no GGUF file in {}", folder.display());
        }
        Some(Model::load(&file?, &mut |_, _| {}).unwrap().1)
    }

    fn request(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn asked(value: Value) -> Wanted {
        Wanted::from_request(&request(value)).unwrap().unwrap()
    }

    /// Any of the allowed tokens, one after the other; `None` if the answer does not end within `most` tokens.
    fn sampled(text: &Text, mut grammar: Restriction, seed: u64, most: usize) -> Option<String> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let size = text.tokenizer().get_vocab_size(true) + 7; // embeddings are often padded
        let mut tokens = Vec::new();
        for _ in 0..most {
            let mut logits = vec![0.0; size];
            grammar.mask(&mut logits).unwrap();
            let allowed: Vec<u32> =
                (0..).zip(&logits).filter(|(_, l)| **l == 0.0).map(|(id, _)| id).collect();
            assert!(!allowed.is_empty(), "nothing is allowed after {:?}", text.decode(&tokens));
            let token = allowed[random.next_u32() as usize % allowed.len()];
            grammar.accept(token).unwrap();
            if text.eos().contains(&token) {
                return Some(text.decode(&tokens).unwrap());
            }
            tokens.push(token);
        }
        None
    }

    /// Whether the grammar takes all of `answer` and then ends.
    fn takes(source: &GrammarSource, text: &Text, wanted: &Wanted, answer: &str) -> bool {
        let mut grammar = source.grammar(wanted).unwrap();
        let size = text.tokenizer().get_vocab_size(true);
        let tokens = text.encode(answer, mosaickv_model::Specials::Literal).unwrap();
        for token in tokens.into_iter().chain(text.eos().first().copied()) {
            let mut logits = vec![0.0; size];
            if grammar.mask(&mut logits).is_err() || logits[token as usize] != 0.0 {
                return false;
            }
            grammar.accept(token).unwrap();
        }
        true
    }

    fn person() -> Value {
        json!({
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "colour": {"enum": ["red", "green", "blue", null]},
                "born": {"type": "string", "pattern": "^(19|20)[0-9]{2}-(0[1-9]|1[0-2])$"},
                "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
                "friend": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/friend"}]},
                "grown": {"type": "boolean"},
            },
            "required": ["name", "age", "colour", "born", "tags", "friend"],
            "additionalProperties": false,
            "$defs": {"friend": {
                "type": "object",
                "properties": {"id": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["id"],
                "additionalProperties": false,
            }},
        })
    }

    /// The schema of `person` by hand.
    fn is_person(value: &Value) -> bool {
        let fields = value.as_object().unwrap();
        let known = ["name", "age", "colour", "born", "tags", "friend", "grown"];
        let length = |value: &Value| value.as_str().map(|text| text.chars().count());
        let born = value["born"].as_str().unwrap();
        let (year, month) = born.split_once('-').unwrap();
        let friend = &value["friend"];
        fields.keys().all(|key| known.contains(&key.as_str()))
            && length(&value["name"]).is_some_and(|length| (1..=12).contains(&length))
            && value["age"].as_u64().is_some_and(|age| age <= 120)
            && ["red", "green", "blue"].iter().any(|c| value["colour"] == *c) | fields["colour"].is_null()
            && (1900..2100).contains(&year.parse().unwrap())
            && (1..=12).contains(&month.parse().unwrap())
            && born.len() == 7
            && value["tags"].as_array().unwrap().len() <= 3
            && value["tags"].as_array().unwrap().iter().all(|tag| length(tag).unwrap() <= 5)
            && (fields["friend"].is_null()
                || friend.as_object().unwrap().len() == 1
                    && (1..=9).contains(&friend["id"].as_u64().unwrap()))
            && fields.get("grown").is_none_or(Value::is_boolean)
    }

    fn answers_fulfil(text: &Text) {
        let source = GrammarSource::new(text).unwrap();
        let strict = asked(json!({"response_format": {"type": "json_schema",
            "json_schema": {"name": "person", "strict": true, "schema": person()}}}));
        let compiled = source.grammar(&strict).unwrap();
        for seed in 0..20 {
            let answer = sampled(text, compiled.copy(), seed, 2000).expect("no end");
            let anew = sampled(text, source.grammar(&strict).unwrap(), seed, 2000);
            assert_eq!(anew.as_ref(), Some(&answer), "a copy is another grammar, seed {seed}");
            let value: Value = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e}: {answer}"));
            assert!(is_person(&value), "seed {seed}: {answer}");
        }
        let object = asked(json!({"response_format": {"type": "json_object"}}));
        let mut ended = 0;
        for seed in 0..20 {
            let answer = sampled(text, source.grammar(&object).unwrap(), seed, 400);
            let Some(answer) = answer else { continue };
            assert!(serde_json::from_str::<Value>(&answer).unwrap().is_object(), "seed {seed}: {answer}");
            ended += 1;
        }
        assert!(ended > 0);
    }

    #[test]
    fn random_answers_of_a_tiny_vocabulary_fulfil_their_schema() {
        answers_fulfil(&tiny());
    }

    #[test]
    fn random_answers_of_a_real_vocabulary_fulfil_their_schema() {
        if let Some(text) = real() {
            answers_fulfil(&text);
        }
    }

    #[test]
    fn random_answers_that_must_be_calls_are_calls() {
        let tools = json!([
            {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object",
                "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"],
                "additionalProperties": false, "$defs": {"city": {"enum": ["Rome", "</tool_call>"]}}}}},
            {"type": "function", "function": {"name": "now"}}]);
        for text in [Some(tiny()), real()].into_iter().flatten() {
            let source = GrammarSource::new(&text).unwrap();
            let dialect = Dialect::of(&text);
            let named = json!({"type": "function", "function": {"name": "get_weather"}});
            for (choice, seed) in (0..20).flat_map(|seed| [(json!("required"), seed), (named.clone(), seed)])
            {
                let tools = request(json!({"tools": tools, "tool_choice": choice}));
                let tools = Tools::from_request(&tools).unwrap().unwrap();
                let answer = sampled(&text, source.tool_call(&tools, &dialect).unwrap(), seed, 4000);
                let Some(answer) = answer else { continue };
                let (said, calls) = crate::tools::read_answer(&dialect, &tools, &answer);
                assert!(said.is_none() && (1..=MOST_CALLS).contains(&calls.len()), "{answer}");
                for call in calls {
                    let city = serde_json::from_str::<Value>(&call.arguments)
                        .map_or(Value::Null, |v| v["city"].clone());
                    let right = call.name == "get_weather" && (city == "Rome" || city == "</tool_call>");
                    assert!(right || call.name == "now" && choice == "required", "{answer}");
                }
            }
        }
    }

    #[test]
    fn expressions_choices_and_grammars_restrict_too() {
        let text = tiny();
        let source = GrammarSource::new(&text).unwrap();
        let cases = [
            (json!({"guided_regex": "a/b[0-9]{2}\n?"}), vec!["a/b12", "a/b12\n"], vec!["a/b1", "a/b123", ""]),
            (json!({"guided_choice": ["yes", "no \"é\n"]}), vec!["yes", "no \"é\n"], vec!["ye", "maybe"]),
            (
                json!({"structured_outputs": {"grammar": "start: /[a-z]+/ (\",\" /[0-9]+/)*"}}),
                vec!["ab", "ab,1,22"],
                vec!["ab,", "1"],
            ),
            (json!({"structured_outputs": {"json": "{\"type\": \"null\"}"}}), vec!["null"], vec!["0"]),
            (json!({"guided_json": {"const": "<|im_end|>"}}), vec!["\"<|im_end|>\""], vec!["\"\""]),
        ];
        for (fields, right, wrong) in cases {
            let wanted = asked(fields);
            for answer in right {
                assert!(takes(&source, &text, &wanted, answer), "{wanted:?} refuses {answer:?}");
            }
            for answer in wrong {
                assert!(!takes(&source, &text, &wanted, answer), "{wanted:?} takes {answer:?}");
            }
        }
        let pretty = "{\n  \"a\": [\n    1,\n    2\n  ]\n}";
        let object = asked(json!({"response_format": {"type": "json_object"}}));
        assert!(takes(&source, &text, &object, pretty) && takes(&source, &text, &object, "{\"a\":1}"));
        assert!(!takes(&source, &text, &object, "{\n\n\n}"), "whitespace without end");
    }

    #[test]
    fn fields_that_say_nothing_or_too_much() {
        let none = [
            json!({}),
            json!({"response_format": null, "guided_json": null}),
            json!({"response_format": {"type": "text"}}),
            json!({"structured_outputs": {"json": null, "json_object": false}}),
        ];
        for fields in none {
            assert_eq!(Wanted::from_request(&request(fields)), Ok(None));
        }
        let wrong = [
            (json!({"response_format": {}}), "response_format"),
            (json!({"response_format": {"type": "xml"}}), "response_format"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}),
                "response_format",
            ),
            (json!({"structured_outputs": {"json": {}, "regex": "a"}}), "structured_outputs"),
            (json!({"structured_outputs": {"xml": "a"}}), "structured_outputs"),
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"guided_regex": 1}), "guided_regex"),
            (json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}), "guided_regex"),
        ];
        for (fields, param) in wrong {
            let found = Wanted::from_request(&request(fields.clone())).unwrap_err();
            assert_eq!(found.param, param, "{fields}: {found}");
        }
    }

    #[test]
    fn what_cannot_be_compiled_is_refused_in_words() {
        let source = GrammarSource::new(&tiny()).unwrap();
        let strict = |schema: Value| {
            json!({"response_format": {"type": "json_schema",
                "json_schema": {"name": "a", "strict": true, "schema": schema}}})
        };
        let refused = [
            (strict(json!({"type": "nothing"})), "nothing"),
            (strict(json!({"type": "array", "uniqueItems": true})), "uniqueItems"),
            (strict(json!({"$ref": "#/$defs/none"})), "none"),
            (strict(json!({"$ref": "https://example.com/schema.json"})), "example.com"),
            (strict(json!({"type": "string", "pattern": "("})), "("),
            (strict(json!(["a"])), "no object"),
            (strict(json!({"$ref": "#"})), "no text"),
            (strict(json!({"description": "a".repeat(LONGEST)})), "at most"),
            (json!({"guided_regex": "("}), "("),
            (json!({"guided_regex": "(".repeat(100_000)}), "deep"),
            (json!({"guided_regex": "a".repeat(LONGEST + 1)}), "at most"),
            (json!({"guided_grammar": "start: other"}), "other"),
            (json!({"guided_grammar": "("}), "("),
            (json!({"guided_choice": ["a".repeat(LONGEST)]}), "at most"),
        ];
        for (fields, word) in refused {
            let wanted = asked(fields);
            let Err(found) = source.grammar(&wanted) else { panic!("{wanted:?} is taken") };
            assert_eq!(found.param, wanted.param);
            assert!(found.message.contains(word), "{}", found.message);
            assert!(found.message.len() < 2000 && !found.message.contains("backtrace"), "{}", found.message);
        }
    }

    /// Whatever they ask for, it takes little time and ends in a grammar or in an error.
    #[test]
    fn hostile_schemas_are_compiled_or_refused_in_little_time() {
        let text = tiny();
        let source = GrammarSource::new(&text).unwrap();
        let nested = |open: &str, close: &str, depth: usize| {
            let text = format!("{}{{}}{}", open.repeat(depth), close.repeat(depth));
            serde_json::from_str::<Value>(&text).unwrap()
        };
        let chain = |links: usize, link: &dyn Fn(String) -> Value| {
            let defs: Map<String, Value> =
                (0..links).map(|i| (i.to_string(), link(format!("#/$defs/{}", i + 1)))).collect();
            let mut schema = json!({"$ref": "#/$defs/0", "$defs": defs});
            schema["$defs"][links.to_string()] = json!({"type": "string"});
            schema
        };
        let deep = |at: String| -> Value {
            let (open, close) = (r#"{"allOf":["#.repeat(55), "]}".repeat(55));
            serde_json::from_str(&format!(r#"{open}{{"$ref":"{at}"}}{close}"#)).unwrap()
        };
        let product: Vec<Value> = (0..20)
            .map(|i| json!({"anyOf": [{"minLength": i}, {"maxLength": 100 + i}, {"pattern": format!("a{i}")}]}))
            .collect();
        let schemas = [
            nested(r#"{"not":"#, "}", 100),
            nested(r#"{"items":"#, "}", 100),
            nested(r#"{"anyOf":[{"type":"null"},"#, "]}", 50),
            chain(1800, &|at| json!({"allOf": [{"$ref": at}, {"minLength": 1}]})),
            chain(2500, &|at| json!({"minLength": 1, "$ref": at})),
            chain(4000, &|at| json!({"$ref": at})),
            chain(2500, &|at| json!({"items": {"$ref": at}})),
            chain(120, &deep),
            json!({"type": "string", "pattern": "(".repeat(200) + &")".repeat(200)}),
            json!({"type": "string", "pattern": "(a|".repeat(2000) + "b" + &")".repeat(2000)}),
            json!({"type": "string", "pattern": "a?".repeat(20_000)}),
            json!({"type": "string", "pattern": "a*b|".repeat(20_000)}),
            json!({"allOf": [{"$ref": "#"}, {"$ref": "#"}]}),
            json!({"allOf": product}),
            json!({"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"}),
            json!({"type": "string", "pattern": "(.*a.{50}|.*b.{60})+c"}),
            json!({"type": "string", "minLength": 1_000_000_000}),
            json!({"type": "array", "minItems": 1_000_000_000, "items": {"type": "string", "pattern": "^a.*b$"}}),
            json!({"type": "array", "maxItems": 1_000_000, "items": {"type": "array", "maxItems": 1_000_000}}),
            json!({"enum": (0..20_000).collect::<Vec<_>>()}),
            json!({"type": "integer", "multipleOf": 999_999_937}),
            json!({"type": "number", "minimum": 1e300, "maximum": -1e300}),
            json!({"patternProperties": {"(a|b)*c{100}": {}, ".*": {"type": "string"}}}),
        ];
        for schema in schemas {
            let begun = std::time::Instant::now();
            let wanted = asked(json!({"guided_json": schema}));
            let start = schema.to_string().chars().take(60).collect::<String>();
            match source.grammar(&wanted) {
                Ok(mut grammar) => {
                    let compiled = begun.elapsed();
                    for step in 0..20 {
                        let mut logits = vec![0.0; 300];
                        let masked = grammar.mask(&mut logits);
                        let next = logits.iter().rposition(|logit| *logit == 0.0).filter(|_| masked.is_ok());
                        let Some(token) = next else {
                            println!("step {step}: {masked:?}");
                            break;
                        };
                        grammar.accept(token as u32).unwrap();
                    }
                    println!("{compiled:?}, then 20 steps {:?} {start}", begun.elapsed() - compiled);
                }
                Err(e) => println!(
                    "{:?} refused: {} {start}",
                    begun.elapsed(),
                    &e.message[..e.message.len().min(200)]
                ),
            }
            assert!(begun.elapsed() < std::time::Duration::from_secs(5), "{:?} for {start}", begun.elapsed());
        }
    }

    #[test]
    fn tokens_are_bytes() {
        let pieces = json!({"version": "1.0", "added_tokens": [
            {"id": 0, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": {"</s>": 0, "<0x0A>": 1, "<0xFF>": 2, "▁é": 3, "<0x": 4},
                "merges": [], "byte_fallback": true}});
        let tokenizer = Tokenizer::from_bytes(pieces.to_string()).unwrap();
        let letters = letters(&tokenizer).unwrap();
        assert_eq!(letters, Letters::Text { space: '▁' });
        let bytes = token_bytes(&tokenizer, letters, &[0]);
        let wanted: [&[u8]; 5] = [b"\xff</s>", b"\n", b"\xff", " é".as_bytes(), b"<0x"];
        assert_eq!(bytes, wanted);

        let table = byte_letters();
        let all: std::collections::HashSet<u8> = table.values().copied().collect();
        assert_eq!((table.len(), all.len()), (256, 256));
        assert_eq!((table[&'Ġ'], table[&'Ċ'], table[&'a'], table[&'é']), (b' ', b'\n', b'a', 0xE9));
    }
}
