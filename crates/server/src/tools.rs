//! Which functions may the model call, how does it learn of them, and which calls are in its answer?
//!
//! Templates differ in whether they know tools and in how a model writes a call: the first use of a template is a trial
//! conversation with one, which shows it. Where a template knows none, tools, calls and results become text in the messages, the
//! way Hermes models were taught. Knows no grammar.

mod calls;

use mosaickv_model::Text;
use serde_json::{Map, Value, json};

use crate::grammar::{Invalid, Unknown};
pub use calls::{Call, CallReader, Piece, read_answer};

/// Functions that a request offers at most.
const MOST_TOOLS: usize = 128;

/// Letters that a function's name has at most.
const LONGEST_NAME: usize = 64;

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Letters, digits, `_` and `-`.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// A JSON schema of its arguments; they are an object.
    pub parameters: Value,
    /// From `strict`.
    pub unknown: Unknown,
}

impl Tool {
    /// As templates and OpenAI write it.
    fn definition(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".into(), self.name.clone().into());
        function.extend(self.description.clone().map(|text| ("description".into(), text.into())));
        function.insert("parameters".into(), self.parameters.clone());
        json!({"type": "function", "function": function})
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    /// An answer may hold calls.
    Free,
    /// It must be a call, of any of them.
    Any,
    /// It must be a call of the one at this index.
    One(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Calls {
    One,
    Many,
}

/// The functions of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Tools {
    tools: Vec<Tool>,
    choice: Choice,
    calls: Calls,
}

impl Tools {
    /// The fields that [`Tools::from_request`] reads.
    pub const FIELDS: [&str; 3] = ["tools", "tool_choice", "parallel_tool_calls"];

    /// `None` if the request has none, or forbids calls.
    pub fn from_request(request: &Map<String, Value>) -> Result<Option<Tools>, Invalid> {
        let field = |name: &str| request.get(name).filter(|value| !value.is_null());
        let tools = match field("tools") {
            None => Vec::new(),
            Some(Value::Array(list)) => tools(list)?,
            Some(_) => return Err(Invalid::new("tools", "tools is no list")),
        };
        let calls = match field("parallel_tool_calls") {
            None | Some(Value::Bool(true)) => Calls::Many,
            Some(Value::Bool(false)) => Calls::One,
            Some(_) => return Err(Invalid::new("parallel_tool_calls", "parallel_tool_calls is no boolean")),
        };
        let choice = match field("tool_choice") {
            None => Some(Choice::Free),
            Some(choice) => tool_choice(choice, &tools)?,
        };
        let Some(choice) = choice else { return Ok(None) };
        if tools.is_empty() {
            return match choice {
                Choice::Free => Ok(None),
                _ => Err(Invalid::new("tool_choice", "tool_choice demands a call, but there are no tools")),
            };
        }
        Ok(Some(Tools { tools, choice, calls }))
    }

    /// Whether the answer must be a call.
    pub fn forced(&self) -> bool {
        self.choice != Choice::Free
    }

    /// Whether an answer may hold several calls.
    pub fn parallel(&self) -> bool {
        self.calls == Calls::Many && !matches!(self.choice, Choice::One(_))
    }

    /// Those that the answer may call.
    pub fn callable(&self) -> impl Iterator<Item = &Tool> {
        let (first, count) = match self.choice {
            Choice::One(index) => (index, 1),
            _ => (0, self.tools.len()),
        };
        self.tools[first..first + count].iter()
    }

    fn definitions(&self) -> Vec<Value> {
        self.tools.iter().map(Tool::definition).collect()
    }

    /// What tells a model of them whose template doesn't, in the words of the Hermes and Qwen templates.
    fn text(&self) -> String {
        let list: Vec<String> = self.definitions().iter().map(Value::to_string).collect();
        format!(
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n\
             You are provided with function signatures within <tools></tools> XML tags:\n\
             <tools>\n{}\n</tools>\n\n\
             For each function call, return a json object with function name and arguments within \
             <tool_call></tool_call> XML tags:\n\
             <tool_call>\n{{\"name\": <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>",
            list.join("\n")
        )
    }
}

fn tools(list: &[Value]) -> Result<Vec<Tool>, Invalid> {
    if list.len() > MOST_TOOLS {
        let message = format!("tools has {} entries, at most {MOST_TOOLS} are allowed", list.len());
        return Err(Invalid::new("tools", message));
    }
    let mut tools: Vec<Tool> = Vec::with_capacity(list.len());
    for (index, value) in list.iter().enumerate() {
        let at = format!("tools[{index}]");
        let tool = tool(value, &at)?;
        if tools.iter().any(|other| other.name == tool.name) {
            return Err(Invalid::new(at, format!("two tools have the name {:?}", tool.name)));
        }
        tools.push(tool);
    }
    Ok(tools)
}

fn tool(value: &Value, at: &str) -> Result<Tool, Invalid> {
    let invalid = |field: &str, message: &str| Invalid::new(format!("{at}{field}"), format!("{at}{message}"));
    if value.get("type").and_then(Value::as_str) != Some("function") {
        return Err(invalid(".type", ".type is not \"function\""));
    }
    let function = value.get("function").and_then(Value::as_object);
    let function = function.ok_or_else(|| invalid(".function", ".function is no object"))?;
    let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
    let letters = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == '-';
    if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(letters) {
        let message = ".function.name must be 1 to 64 letters, digits, _ or -";
        return Err(invalid(".function.name", message));
    }
    let mut parameters = match function.get("parameters") {
        None | Some(Value::Null) => json!({"type": "object", "properties": {}}),
        Some(Value::Object(schema)) => Value::Object(schema.clone()),
        Some(_) => return Err(invalid(".function.parameters", ".function.parameters is no JSON schema")),
    };
    match parameters.get("type") {
        None => parameters["type"] = "object".into(),
        Some(kind) if kind == "object" => {}
        Some(_) => {
            return Err(invalid(".function.parameters", ".function.parameters is not of type \"object\""));
        }
    }
    let strict = function.get("strict").and_then(Value::as_bool).unwrap_or(false);
    Ok(Tool {
        name: name.to_owned(),
        description: function.get("description").and_then(Value::as_str).map(str::to_owned),
        parameters,
        unknown: if strict { Unknown::Refused } else { Unknown::Ignored },
    })
}

/// `None`: no calls.
fn tool_choice(choice: &Value, tools: &[Tool]) -> Result<Option<Choice>, Invalid> {
    match choice {
        Value::String(word) => match word.as_str() {
            "none" => return Ok(None),
            "auto" => return Ok(Some(Choice::Free)),
            "required" => return Ok(Some(Choice::Any)),
            _ => {}
        },
        Value::Object(object) if object.get("type").is_some_and(|kind| kind == "function") => {
            let name =
                object.get("function").and_then(|function| function.get("name")).and_then(Value::as_str);
            let name = name.ok_or_else(|| Invalid::new("tool_choice", "tool_choice.function has no name"))?;
            let index = tools.iter().position(|tool| tool.name == name);
            let index =
                index.ok_or_else(|| Invalid::new("tool_choice", format!("no tool has the name {name:?}")))?;
            return Ok(Some(Choice::One(index)));
        }
        _ => {}
    }
    let message = "tool_choice is neither none, auto, required nor {\"type\": \"function\", \"function\": {\"name\": ..}}";
    Err(Invalid::new("tool_choice", message))
}

/// How a model writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `<tool_call>{"name": .., "arguments": ..}</tool_call>`, each in tags of its own.
    Hermes,
    /// `[TOOL_CALLS] [{"name": .., "arguments": ..}, ..]`.
    Mistral,
    /// `{"name": .., "parameters": ..}` and nothing else (Llama 3).
    Bare,
}

/// What is written around calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// As text.
    pub text: String,
    /// The special token that it is: answers as text lack it.
    pub special: Option<u32>,
}

impl Mark {
    fn new(text: &Text, mark: &str) -> Mark {
        let special = text.token(mark).filter(|id| {
            text.tokenizer().get_added_tokens_decoder().get(id).is_some_and(|token| token.special)
        });
        Mark { text: mark.to_owned(), special }
    }
}

/// Where a model reads of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Its template has a place for them, for calls and for results.
    Template,
    /// The system's message.
    System,
    /// The first message: the template knows no system.
    First,
}

/// How one model does tools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dialect {
    /// How it writes calls.
    pub form: Form,
    /// What begins a call, or a list of calls.
    pub open: Mark,
    /// What ends it, if anything does.
    pub close: Mark,
    place: Place,
}

impl Dialect {
    /// The way of this model's template, found by letting it render a call and reading that; some milliseconds.
    pub fn of(text: &Text) -> Dialect {
        for form in [Form::Hermes, Form::Mistral, Form::Bare] {
            let dialect = Dialect::new(text, form, Place::Template);
            if dialect.writes_calls(text).unwrap_or(false) {
                return dialect;
            }
        }
        let trial = [json!({"role": "system", "content": "trial"}), json!({"role": "user", "content": "Hi"})];
        let system = text.chat_with(&trial, &Map::new()).is_ok_and(|chat| chat.contains("trial"));
        Dialect::new(text, Form::Hermes, if system { Place::System } else { Place::First })
    }

    fn new(text: &Text, form: Form, place: Place) -> Dialect {
        let [open, close] = match form {
            Form::Hermes => ["<tool_call>", "</tool_call>"],
            Form::Mistral => ["[TOOL_CALLS]", ""],
            Form::Bare => ["", ""],
        };
        Dialect { form, open: Mark::new(text, open), close: Mark::new(text, close), place }
    }

    /// Whether the template tells of tools, calls and results, and writes calls in this form. `None`: it fails.
    fn writes_calls(&self, text: &Text) -> Option<bool> {
        let tool = json!({"type": "function", "function": {"name": "trial_tool", "description": "A trial.",
            "parameters": {"type": "object", "properties": {"key": {"type": "string"}}}}});
        let tools = Map::from_iter([("tools".to_owned(), json!([tool]))]);
        let tools = Tools::from_request(&tools).ok()??;
        let arguments = r#"{"key":"trial value"}"#;
        let call = json!({"id": "trial0000", "type": "function",
            "function": {"name": "trial_tool", "arguments": arguments}});
        let messages = [
            json!({"role": "user", "content": "Hi"}),
            json!({"role": "assistant", "content": null, "tool_calls": [call]}),
            json!({"role": "tool", "tool_call_id": "trial0000", "content": "trial result"}),
        ];
        let mut trial = conversation(self, &messages, Some(&tools)).ok()?;
        trial.variables.insert("add_generation_prompt".into(), false.into());
        let chat = |turns: usize| text.chat_with(&trial.messages[..turns], &trial.variables).ok();
        let (asked, called, answered) = (chat(1)?, chat(2)?, chat(3)?);
        let told = asked.contains("trial_tool") && answered.contains("trial result");

        let same = asked.bytes().zip(called.bytes()).take_while(|(a, b)| a == b).count();
        let turn = called.get(same..)?;
        let turn = if self.form == Form::Bare { &turn[turn.find('{')?..] } else { turn };
        let (_, calls) = read_answer(self, &tools, turn);
        let value = |json: &str| serde_json::from_str::<Value>(json).ok();
        let right = |call: &Call| call.name == "trial_tool" && value(&call.arguments) == value(arguments);
        Some(told && calls.len() == 1 && calls.iter().all(right))
    }
}

/// What a template is given.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// Each with a role and a content that is a string.
    pub messages: Vec<Value>,
    /// `tools`, if the template knows them.
    pub variables: Map<String, Value>,
}

/// A request's messages and tools as the model's template takes them.
pub fn conversation(
    dialect: &Dialect,
    messages: &[Value],
    tools: Option<&Tools>,
) -> Result<Conversation, Invalid> {
    let messages: Result<Vec<_>, _> =
        messages.iter().enumerate().map(|(index, message)| normalized(message, index)).collect();
    let mut messages = messages?;
    let mut variables = Map::new();
    match dialect.place {
        Place::Template => {
            if dialect.form == Form::Mistral {
                shorten_ids(&mut messages);
            }
            variables.extend(tools.map(|tools| ("tools".to_owned(), tools.definitions().into())));
        }
        Place::System | Place::First => {
            messages = as_text(messages);
            if let Some(tools) = tools {
                tell(&mut messages, dialect.place, &tools.text());
            }
        }
    }
    Ok(Conversation { messages: messages.into_iter().map(Value::Object).collect(), variables })
}

/// A message with a content that is a string and calls whose arguments are objects.
fn normalized(message: &Value, index: usize) -> Result<Map<String, Value>, Invalid> {
    let at = format!("messages[{index}]");
    let mut message =
        message.as_object().cloned().ok_or_else(|| Invalid::new(&at, format!("{at} is no object")))?;
    match message.get("role").and_then(Value::as_str) {
        Some("developer") => drop(message.insert("role".into(), "system".into())),
        Some("function") => drop(message.insert("role".into(), "tool".into())),
        Some(_) => {}
        None => return Err(Invalid::new(format!("{at}.role"), format!("{at}.role is no string"))),
    }
    let content = content(message.get("content").unwrap_or(&Value::Null));
    let content =
        content.map_err(|what| Invalid::new(format!("{at}.content"), format!("{at}.content {what}")))?;
    message.insert("content".into(), content.into());

    let calls = match message.remove("tool_calls") {
        None | Some(Value::Null) => return Ok(message),
        Some(Value::Array(calls)) => calls,
        Some(_) => {
            let field = format!("{at}.tool_calls");
            return Err(Invalid::new(&field, format!("{field} is no list")));
        }
    };
    if calls.is_empty() {
        return Ok(message); // templates take the mere key for calls
    }
    let calls: Result<Vec<Value>, Invalid> = calls
        .iter()
        .enumerate()
        .map(|(call, value)| past_call(value, &format!("{at}.tool_calls[{call}]")))
        .collect();
    message.insert("tool_calls".into(), calls?.into());
    Ok(message)
}

fn content(content: &Value) -> Result<String, String> {
    let parts = match content {
        Value::Null => return Ok(String::new()),
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        _ => return Err("is neither a string nor a list of parts".into()),
    };
    let part = |part: &Value| {
        if let Some(text) = part.as_str() {
            return Ok(text.to_owned());
        }
        match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
            (Some("text"), Some(text)) => Ok(text.to_owned()),
            (Some(kind), _) => Err(format!("has a part of type {kind:?}; only text is understood")),
            (None, _) => Err("has a part without a type".to_owned()),
        }
    };
    let parts: Result<Vec<String>, String> = parts.iter().map(part).collect();
    Ok(parts?.join("\n"))
}

/// A call of an earlier answer.
fn past_call(call: &Value, at: &str) -> Result<Value, Invalid> {
    let function = call.get("function").and_then(Value::as_object);
    let function = function.ok_or_else(|| Invalid::new(at, format!("{at}.function is no object")))?;
    let name = function.get("name").and_then(Value::as_str);
    let name = name.ok_or_else(|| Invalid::new(at, format!("{at}.function.name is no string")))?;
    let arguments = match function.get("arguments") {
        None | Some(Value::Null) => json!({}),
        Some(Value::String(text)) if text.trim().is_empty() => json!({}),
        Some(Value::String(text)) => serde_json::from_str(text).unwrap_or_else(|_| text.clone().into()),
        Some(other) => other.clone(),
    };
    let id = call.get("id").and_then(Value::as_str).unwrap_or_default();
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// Mistral's templates refuse ids that are not nine letters and digits.
fn shorten_ids(messages: &mut [Map<String, Value>]) {
    let shorten = |id: &mut Value| {
        let letters: Vec<char> =
            id.as_str().unwrap_or_default().chars().filter(char::is_ascii_alphanumeric).collect();
        let last = &letters[letters.len().saturating_sub(9)..];
        *id = format!("{:0>9}", last.iter().collect::<String>()).into();
    };
    for message in messages {
        message.get_mut("tool_call_id").into_iter().for_each(shorten);
        let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
        calls.into_iter().flatten().for_each(|call| shorten(&mut call["id"]));
    }
}

/// Calls and results as text in messages that any template knows; results in a row are one message.
fn as_text(messages: Vec<Map<String, Value>>) -> Vec<Map<String, Value>> {
    let mut texts: Vec<Map<String, Value>> = Vec::with_capacity(messages.len());
    let mut in_results = false;
    for mut message in messages {
        let content = message["content"].as_str().unwrap_or_default();
        let is_result = message.get("role").is_some_and(|role| role == "tool");
        if is_result {
            let result = format!("<tool_response>\n{content}\n</tool_response>");
            match texts.last_mut().filter(|_| in_results) {
                Some(last) => {
                    let before = last["content"].as_str().unwrap_or_default();
                    last["content"] = format!("{before}\n{result}").into();
                }
                None => {
                    let fields = [("role".to_owned(), "user".into()), ("content".to_owned(), result.into())];
                    texts.push(Map::from_iter(fields));
                }
            }
        } else {
            let mut lines: Vec<String> = Vec::new();
            lines.extend(Some(content.to_owned()).filter(|content| !content.is_empty()));
            if let Some(Value::Array(calls)) = message.remove("tool_calls") {
                lines.extend(calls.iter().map(|call| {
                    let Value::Object(function) = &call["function"] else { return String::new() };
                    let (name, arguments) = (&function["name"], &function["arguments"]);
                    format!("<tool_call>\n{{\"name\": {name}, \"arguments\": {arguments}}}\n</tool_call>")
                }));
            }
            message["content"] = lines.join("\n").into();
            texts.push(message);
        }
        in_results = is_result;
    }
    texts
}

/// Puts `text` where the model reads it.
fn tell(messages: &mut Vec<Map<String, Value>>, place: Place, text: &str) {
    let first = messages.first_mut().filter(|first| match place {
        Place::First => true,
        _ => first.get("role").is_some_and(|role| role == "system"),
    });
    match first {
        Some(first) => {
            let content = first["content"].as_str().unwrap_or_default();
            first["content"] = match place {
                Place::First => format!("{text}\n\n{content}").into(),
                _ => format!("{content}\n\n{text}").into(),
            };
        }
        None => {
            let fields = [("role".to_owned(), "system".into()), ("content".to_owned(), text.into())];
            messages.insert(0, Map::from_iter(fields));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use mosaickv_model::Model;

    use super::*;

    const QWEN: &str = r#"{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'You are helpful.' }}{%- endif %}
    {{- "\n\n# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools>\n\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' }}{{- message.content }}{{- '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"#;

    const LLAMA: &str = r#"{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}{{- system_message }}{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first_user_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\n\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
    {{- first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("This model only supports single tool-calls at once!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}" }}{{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}{{- message.content | tojson }}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"#;

    const MISTRAL: &str = r#"{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}{{- tool | tojson }}{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}
            {{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ", " }}
        {%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 %}{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"#;

    const NO_SYSTEM: &str = r#"{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{{- '<start_of_turn>' + message.role + '\n' + message.content + '<end_of_turn>\n' }}{%- endfor %}"#;

    fn model(template: Option<&str>) -> Text {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/qwen3");
        let mut text = Model::load(&path, &mut |_, _| {}).unwrap().1;
        if let Some(template) = template {
            text.replace_template(template).unwrap();
        }
        text
    }

    pub fn request(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    pub fn weather() -> Value {
        json!([{"type": "function", "function": {"name": "get_weather", "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}},
            {"type": "function", "function": {"name": "now"}}])
    }

    pub fn offered() -> Tools {
        Tools::from_request(&request(json!({"tools": weather()}))).unwrap().unwrap()
    }

    pub fn dialect(form: Form) -> Dialect {
        let mark = |text: &str| Mark { text: text.to_owned(), special: None };
        let [open, close] = match form {
            Form::Hermes => ["<tool_call>", "</tool_call>"].map(mark),
            Form::Mistral => ["[TOOL_CALLS]", ""].map(mark),
            Form::Bare => ["", ""].map(mark),
        };
        Dialect { form, open, close, place: Place::Template }
    }

    #[test]
    fn templates_show_how_they_do_tools() {
        let found = |template| {
            let dialect = Dialect::of(&model(template));
            (dialect.form, dialect.place)
        };
        assert_eq!(found(Some(QWEN)), (Form::Hermes, Place::Template));
        assert_eq!(found(Some(LLAMA)), (Form::Bare, Place::Template));
        assert_eq!(found(Some(MISTRAL)), (Form::Mistral, Place::Template));
        assert_eq!(found(Some(NO_SYSTEM)), (Form::Hermes, Place::First));
        assert_eq!(found(None), (Form::Hermes, Place::System), "ChatML alone");
    }

    fn talk() -> Vec<Value> {
        let call = |id: &str, city: &str| {
            json!({"id": id, "type": "function",
                "function": {"name": "get_weather", "arguments": json!({"city": city}).to_string()}})
        };
        vec![
            json!({"role": "user", "content": [{"type": "text", "text": "Rome"}, {"type": "text", "text": "or Oslo?"}]}),
            json!({"role": "assistant", "content": null, "tool_calls": [call("call_0123456789ab", "Rome"), call("call_2", "Oslo")]}),
            json!({"role": "tool", "tool_call_id": "call_0123456789ab", "content": "sun"}),
            json!({"role": "tool", "tool_call_id": "call_2", "content": "snow"}),
        ]
    }

    #[test]
    fn calls_and_results_are_rendered() {
        for template in [Some(QWEN), Some(MISTRAL), Some(NO_SYSTEM), None] {
            let text = model(template);
            let dialect = Dialect::of(&text);
            let talk = conversation(&dialect, &talk(), Some(&offered())).unwrap();
            let chat = text.chat_with(&talk.messages, &talk.variables).unwrap();
            for part in ["The weather.", "Rome\nor Oslo?", "\"Rome\"", "\"Oslo\"", "sun", "snow", "now"] {
                assert!(chat.contains(part), "{part} is not in {chat}");
            }
            assert_eq!(
                chat.matches("<tool_response>").count(),
                if template == Some(MISTRAL) { 0 } else { 2 }
            );
        }
        let text = model(None);
        let dialect = Dialect::of(&text);
        let mut messages = talk();
        messages.insert(0, json!({"role": "developer", "content": "Be brief."}));
        let talk = conversation(&dialect, &messages, Some(&offered())).unwrap();
        assert!(talk.variables.is_empty());
        assert_eq!(talk.messages.len(), 4, "results in a row are one message");
        assert_eq!(talk.messages[0]["role"], "system");
        assert!(talk.messages[0]["content"].as_str().unwrap().starts_with("Be brief.\n\n# Tools\n"));
        let call =
            "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\":\"Rome\"}}\n</tool_call>";
        assert!(talk.messages[2]["content"].as_str().unwrap().starts_with(call));
        let wanted = "<tool_response>\nsun\n</tool_response>\n<tool_response>\nsnow\n</tool_response>";
        assert_eq!(talk.messages[3], json!({"role": "user", "content": wanted}));
    }

    #[test]
    fn tools_are_checked() {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
        let wrong = [
            (json!({"tools": {}}), "tools"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (json!({"tools": [tool("a"), tool("a b")]}), "tools[1].function.name"),
            (json!({"tools": [tool(&"a".repeat(65))]}), "tools[0].function.name"),
            (json!({"tools": [tool("a"), tool("a")]}), "tools[1]"),
            (json!({"tools": vec![tool("a"); 129]}), "tools"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}),
                "tools[0].function.parameters",
            ),
            (json!({"tools": [tool("a")], "tool_choice": "some"}), "tool_choice"),
            (json!({"tools": [tool("a")], "tool_choice": tool("b")}), "tool_choice"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [tool("a")], "parallel_tool_calls": 1}), "parallel_tool_calls"),
        ];
        for (fields, param) in wrong {
            let found = Tools::from_request(&request(fields.clone())).unwrap_err();
            assert_eq!(found.param, param, "{fields}: {found}");
        }
        for fields in [
            json!({}),
            json!({"tools": [], "tool_choice": "auto"}),
            json!({"tools": [tool("a")], "tool_choice": "none"}),
        ] {
            assert_eq!(Tools::from_request(&request(fields)), Ok(None));
        }
        let one = json!({"tools": [tool("a"), tool("b")], "tool_choice": tool("b")});
        let one = Tools::from_request(&request(one)).unwrap().unwrap();
        assert!(one.forced() && !one.parallel());
        assert_eq!(one.callable().map(|tool| tool.name.as_str()).collect::<Vec<_>>(), ["b"]);
        assert!(!offered().forced() && offered().parallel());
        let wrong = [
            (json!({"role": "user", "content": [{"type": "image_url"}]}), "messages[0].content"),
            (json!({"content": "a"}), "messages[0].role"),
            (json!({"role": "assistant", "tool_calls": [{}]}), "messages[0].tool_calls[0]"),
        ];
        for (message, param) in wrong {
            let found = conversation(&dialect(Form::Hermes), &[message], None).unwrap_err();
            assert_eq!(found.param, param);
        }
    }
}
