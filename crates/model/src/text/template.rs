//! The chat template: a Jinja program from the model's files, run as Hugging Face transformers runs it.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};
use serde_json::{Map, Value, json};

use crate::ModelError;

/// Steps after which a template is stopped: no conversation needs as many, a damaged template might not end.
const MOST_STEPS: u64 = 50_000_000;

#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    pub(super) fn new(source: &str, bos: String, eos: String) -> Result<ChatTemplate, ModelError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| ModelError::Template { what: e.to_string() })?);
        environment.set_fuel(Some(MOST_STEPS));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", refuse);
        environment.add_function("strftime_now", date::now);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned("chat", without_generation_tags(source))
            .map_err(|e| ModelError::Template { what: format!("cannot be read: {e:#}") })?;
        Ok(ChatTemplate { environment, bos, eos })
    }

    /// The template's own text.
    pub(super) fn source(&self) -> String {
        self.environment.get_template("chat").map_or_else(|_| String::new(), |chat| chat.source().to_owned())
    }

    pub(super) fn render<M: Serialize>(
        &self,
        messages: &[M],
        variables: &Map<String, Value>,
    ) -> Result<String, ModelError> {
        let failed = |what: String| ModelError::Template { what };
        let messages = serde_json::to_value(messages).map_err(|e| failed(e.to_string()))?;
        let mut context = json!({
            "messages": messages,
            "add_generation_prompt": true,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "tools": null,
            "documents": null,
        });
        for (name, value) in variables {
            context[name] = value.clone();
        }
        let template = self.environment.get_template("chat").map_err(|e| failed(e.to_string()))?;
        template.render(Serde(context)).map_err(|e| failed(e.detail().unwrap_or(&e.to_string()).to_owned()))
    }
}

/// `{% generation %}` marks what an assistant said, for training; as a block it changes nothing.
fn without_generation_tags(source: &str) -> String {
    let mut text = source.to_owned();
    for (before, after) in [("", ""), ("", "-"), ("-", ""), ("-", "-")] {
        let tag = |word: &str| format!("{{%{before} {word} {after}%}}");
        text =
            text.replace(&tag("generation"), &tag("if true")).replace(&tag("endgeneration"), &tag("endif"));
    }
    text
}

/// What templates call to refuse a conversation.
fn refuse(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// JSON as Python writes it: `", "` and `": "`, or indented; minijinja's own filter escapes for HTML.
fn to_json(value: &Jinja, options: Kwargs) -> Result<Jinja, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<Jinja> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        Some(indent) => {
            let spaces = vec![b' '; indent.min(16)];
            write(value, &mut bytes, PrettyFormatter::with_indent(&spaces))
        }
        None => write(value, &mut bytes, Spaced),
    };
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Jinja::from_safe_string(String::from_utf8_lossy(&bytes).into_owned()))
}

fn write<F: Formatter>(value: &Jinja, bytes: &mut Vec<u8>, formatter: F) -> serde_json::Result<()> {
    value.serialize(&mut serde_json::Serializer::with_formatter(bytes, formatter))
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Some templates write today's date.
mod date {
    use std::time::{SystemTime, UNIX_EPOCH};

    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

    pub(super) fn now(format: String) -> String {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
        strftime(&format, seconds)
    }

    /// Python's `strftime` at `seconds` of Unix time, UTC; unknown directives stay as they are.
    pub(super) fn strftime(format: &str, seconds: u64) -> String {
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        let (year, month, day) = civil(days as i64);
        let name = MONTHS[month - 1];
        let weekday = DAYS[(days % 7) as usize];
        let mut out = String::new();
        let mut letters = format.chars();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                out.push(letter);
                continue;
            }
            match letters.next() {
                Some('Y') => out.push_str(&year.to_string()),
                Some('m') => out.push_str(&format!("{month:02}")),
                Some('d') => out.push_str(&format!("{day:02}")),
                Some('B') => out.push_str(name),
                Some('b') => out.push_str(&name[..3]),
                Some('A') => out.push_str(weekday),
                Some('a') => out.push_str(&weekday[..3]),
                Some('H') => out.push_str(&format!("{:02}", second / 3600)),
                Some('M') => out.push_str(&format!("{:02}", second / 60 % 60)),
                Some('S') => out.push_str(&format!("{:02}", second % 60)),
                Some('%') => out.push('%'),
                Some(other) => out.extend(['%', other]),
                None => out.push('%'),
            }
        }
        out
    }

    /// Year, month and day of a day since 1970-01-01 (Hinnant, "chrono-Compatible Low-Level Date Algorithms").
    fn civil(days: i64) -> (i64, usize, i64) {
        let days = days + 719_468;
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * day_of_year + 2) / 153; // March is 0
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        (year, month as usize, day_of_year - (153 * shifted + 2) / 5 + 1)
    }

    #[cfg(test)]
    mod tests {
        #[test]
        fn dates_are_the_calendar_s() {
            let at = |seconds| super::strftime("%A %d %B %Y, %b %a %H:%M:%S %% %q", seconds);
            assert_eq!(at(0), "Thursday 01 January 1970, Jan Thu 00:00:00 % %q");
            assert_eq!(at(951_827_696), "Tuesday 29 February 2000, Feb Tue 12:34:56 % %q");
            assert_eq!(at(1_735_689_599), "Tuesday 31 December 2024, Dec Tue 23:59:59 % %q");
        }
    }
}
