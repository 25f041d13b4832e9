//! What is in LongBench's files, and which prompt does a line make?
//!
//! Files are anybody's: a line that cannot be used is reported and left out, and none is kept that is larger than any of
//! LongBench's by far.

use std::io::{self, ErrorKind};
use std::path::Path;

use serde::Deserialize;

use super::metric::paragraph;
use super::{Dataset, Task};
use crate::malformed::{read_lines, unreadable};
use crate::{Malformed, Metric, Sample};

/// Longest answer accepted, in bytes. LongBench's longest is a summary of some 10 KiB.
const LONGEST_ANSWER: usize = 256 << 10;

/// One line of a LongBench file.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Which task's file it is from.
    pub task: Task,
    /// Which line that is not blank, from 0.
    pub index: usize,
    /// LongBench's own name of it (`_id`).
    pub id: String,
    /// The question, query or last example; empty in some tasks.
    pub input: String,
    /// The long text.
    pub context: String,
    /// Right answers, at least one.
    pub answers: Vec<String>,
    /// Words of the three above, by LongBench's count; LongBench-E groups by it (below 4000, below 8000, more).
    pub length: u64,
    /// Every class there is, in trec; else empty.
    pub classes: Vec<String>,
}

/// What [`read_dir`] found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Folder {
    /// Task by task as asked for, each in its file's order.
    pub items: Vec<Item>,
    /// Lines left out.
    pub malformed: Vec<Malformed>,
    /// Tasks without a file.
    pub missing: Vec<Task>,
}

/// The official schema. `language` is in it as well, but says nothing that matters here.
#[derive(Deserialize)]
struct Line {
    input: String,
    context: String,
    answers: Vec<String>,
    length: u64,
    dataset: String,
    all_classes: Option<Vec<String>>,
    #[serde(rename = "_id")]
    id: String,
}

/// Reads `<task>.jsonl` of each task from a folder. A task without a file is listed as missing; a folder that is not
/// there, and a file that cannot be read, are errors.
pub fn read_dir(dir: &Path, tasks: &[Task]) -> io::Result<Folder> {
    std::fs::read_dir(dir).map_err(|error| naming(dir, error))?;
    let mut folder = Folder::default();
    for &task in tasks {
        match read_jsonl(&dir.join(task.file_name()), task) {
            Ok((items, malformed)) => {
                folder.items.extend(items);
                folder.malformed.extend(malformed);
            }
            Err(error) if error.kind() == ErrorKind::NotFound => folder.missing.push(task),
            Err(error) => return Err(error),
        }
    }
    Ok(folder)
}

/// Reads a file of a task's lines; blank ones are passed over. Errors name the file.
pub fn read_jsonl(path: &Path, task: Task) -> io::Result<(Vec<Item>, Vec<Malformed>)> {
    let mut index = 0;
    read_lines(path, |line, _| {
        index += 1;
        parse(line, task, index - 1)
    })
}

fn parse(line: &[u8], task: Task, index: usize) -> Result<Item, String> {
    // A sequence of the fields' values would do for serde, but is no LongBench line.
    if !line.trim_ascii_start().starts_with(b"{") {
        return Err("not a JSON object".to_owned());
    }
    let line: Line = serde_json::from_slice(line.trim_ascii_end()).map_err(|error| unreadable(&error))?;
    let named = line.dataset == task.dataset().name() || line.dataset == task.to_string();
    if !named {
        return Err(format!("it is of dataset {:?}, not {task}; its metric would be another", line.dataset));
    }
    if line.answers.is_empty() {
        return Err("no answers".to_owned());
    }
    if let Some(long) = line.answers.iter().find(|answer| answer.len() > LONGEST_ANSWER) {
        return Err(format!("an answer of {} bytes; at most {LONGEST_ANSWER} are read", long.len()));
    }
    let classes = line.all_classes.unwrap_or_default();
    if task.dataset() == Dataset::Trec && classes.is_empty() {
        return Err("no all_classes, which this task is judged by".to_owned());
    }
    let numberless = line.answers.iter().find(|answer| paragraph(answer).is_none());
    if let (Dataset::PassageRetrievalEn, Some(other)) = (task.dataset(), numberless) {
        return Err(format!("answer {other:?}, want one such as \"Paragraph 7\""));
    }
    Ok(Item {
        task,
        index,
        id: line.id,
        input: line.input,
        context: line.context,
        answers: line.answers,
        length: line.length,
        classes,
    })
}

fn naming(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

impl Item {
    /// The official prompt in full.
    pub fn prompt(&self) -> String {
        fill(self.task.template(), &self.context, &self.input)
    }

    /// The sample, its prompt truncated in the middle as `pred.py` does, and the tokens of the prompt before that: it was
    /// truncated if they are more than `max_prompt_tokens`.
    ///
    /// The prompt's tokens are counted before a chat template is put around it. Of a longer one, the first and the last
    /// `max_prompt_tokens / 2` (rounded down) are decoded and put together; encoding that text again may give a few
    /// tokens more or less, and the template's come on top. To be like `pred.py`, `encode` adds the special tokens that
    /// the tokenizer adds of itself, and `decode` leaves special tokens out. Below 2, nothing is left of a long prompt.
    ///
    /// # Errors
    ///
    /// Those of `encode` and `decode`.
    pub fn sample<E>(
        &self,
        encode: impl Fn(&str) -> Result<Vec<u32>, E>,
        decode: impl Fn(&[u32]) -> Result<String, E>,
        max_prompt_tokens: usize,
    ) -> Result<(Sample, usize), E> {
        let mut prompt = self.prompt();
        let tokens = encode(&prompt)?;
        if tokens.len() > max_prompt_tokens {
            let half = max_prompt_tokens / 2;
            prompt = decode(&tokens[..half])? + &decode(&tokens[tokens.len() - half..])?;
        }
        let sample = Sample {
            task: self.task.to_string(),
            length: 0,
            index: self.index,
            prompt,
            chat: self.task.chat(),
            answers: self.answers.clone(),
            metric: Metric::LongBench(self.task.metric(self.classes.clone())),
            max_new_tokens: self.task.max_new_tokens(),
            one_line: self.task.one_line(),
            depth: None,
        };
        Ok((sample, tokens.len()))
    }
}

/// Puts both texts in their places in one pass, so that places named in the texts themselves stay as they are.
fn fill(template: &str, context: &str, input: &str) -> String {
    let mut prompt = String::with_capacity(template.len() + context.len() + input.len());
    let mut rest = template;
    while let Some(brace) = rest.find('{') {
        prompt.push_str(&rest[..brace]);
        rest = &rest[brace..];
        let places = [("{context}", context), ("{input}", input), ("{", "{")];
        for (place, text) in places {
            if let Some(after) = rest.strip_prefix(place) {
                prompt.push_str(text);
                rest = after;
                break;
            }
        }
    }
    prompt.push_str(rest);
    prompt
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::io::Write;

    use super::*;

    fn item(task: &str, context: &str, input: &str) -> Item {
        Item {
            task: task.parse().unwrap(),
            index: 0,
            id: "1".to_owned(),
            input: input.to_owned(),
            context: context.to_owned(),
            answers: vec!["x".to_owned()],
            length: 1,
            classes: Vec::new(),
        }
    }

    /// A character is a token.
    fn encode(text: &str) -> Result<Vec<u32>, Infallible> {
        Ok(text.chars().map(u32::from).collect())
    }

    fn decode(tokens: &[u32]) -> Result<String, Infallible> {
        Ok(tokens.iter().filter_map(|&token| char::from_u32(token)).collect())
    }

    fn line(changes: &[(&str, serde_json::Value)]) -> String {
        let mut line = serde_json::json!({
            "input": "", "context": "c", "answers": ["x = 1"], "length": 3, "dataset": "lcc",
            "language": "python", "all_classes": null, "_id": "42",
        });
        for (key, value) in changes {
            line[key] = value.clone();
        }
        line.to_string()
    }

    fn read(text: &[u8], task: &str) -> (Vec<Item>, Vec<Malformed>) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text).unwrap();
        read_jsonl(file.path(), task.parse().unwrap()).unwrap()
    }

    #[test]
    fn texts_may_hold_braces() {
        let item = item("trec", "{input} {0} {{}} {context}", "{context} } {");
        let (sample, tokens) = item.sample(encode, decode, usize::MAX).unwrap();
        let start =
            "Please determine the type of the question below. Here are some examples of questions.\n\n";
        assert_eq!(sample.prompt, format!("{start}{{input}} {{0}} {{{{}}}} {{context}}\n{{context}} }} {{"));
        assert_eq!(tokens, sample.prompt.chars().count());
    }

    #[test]
    fn the_middle_goes() {
        let item = item("lcc", &"αβγδ".repeat(50), "");
        let whole: Vec<char> = item.prompt().chars().collect();
        for max in [0, 1, 2, 3, 10, 11, whole.len() - 1, whole.len(), whole.len() + 1] {
            let (sample, tokens) = item.sample(encode, decode, max).unwrap();
            assert_eq!(tokens, whole.len());
            let half = max / 2;
            let wanted: String = if max < whole.len() {
                whole[..half].iter().chain(&whole[whole.len() - half..]).collect()
            } else {
                whole.iter().collect()
            };
            assert_eq!(sample.prompt, wanted, "at most {max} tokens");
        }
    }

    #[test]
    fn errors_of_the_tokenizer_are_handed_on() {
        let item = item("lcc", "c", "");
        let broken = |_: &[u32]| Err("no such token");
        assert_eq!(item.sample(|_| Ok(vec![1, 2, 3]), broken, 2), Err("no such token"));
    }

    #[test]
    fn a_sample_says_how_it_is_asked_and_judged() {
        let (sample, _) = item("samsum_e", "c", "i").sample(encode, decode, 1000).unwrap();
        assert_eq!((sample.task.as_str(), sample.chat, sample.one_line), ("samsum_e", false, true));
        assert_eq!((sample.max_new_tokens, sample.length, sample.depth), (128, 0, None));
        assert!(sample.metric.score("\nx\ny z", &sample.answers) > 0.99);
        let (sample, _) = item("qmsum", "c", "i").sample(encode, decode, 1000).unwrap();
        assert_eq!((sample.chat, sample.one_line, sample.max_new_tokens), (true, false, 512));
    }

    #[test]
    fn malformed_lines_are_reported_with_their_reasons() {
        let good = line(&[]);
        let lines = [
            good.clone(),
            String::new(),
            "{\"input\": ".to_owned(),
            "[\"\", \"\", [\"x\"], 1, \"lcc\", null, \"\"]".to_owned(),
            line(&[("answers", serde_json::json!([]))]),
            line(&[("answers", serde_json::json!("x"))]),
            line(&[("length", serde_json::json!(-1))]),
            line(&[("dataset", serde_json::json!("hotpotqa"))]),
            line(&[("answers", serde_json::json!(["x".repeat(LONGEST_ANSWER + 1)]))]),
            good.replace("\"context\"", "\"kontext\""),
            "{\"other\": ".to_owned() + &"[".repeat(100_000),
            good,
        ];
        let (items, malformed) = read(lines.join("\n").as_bytes(), "lcc");
        assert_eq!(items.iter().map(|item| item.index).collect::<Vec<_>>(), [0, 10]);
        assert_eq!(malformed.iter().map(|bad| bad.line).collect::<Vec<_>>(), [3, 4, 5, 6, 7, 8, 9, 10, 11]);
        for (bad, reason) in malformed.iter().zip([
            "EOF while parsing a value (column 9)",
            "not a JSON object",
            "no answers",
            "expected a sequence",
            "-1",
            "dataset \"hotpotqa\", not lcc",
            "bytes",
            "missing field `context`",
            "EOF while parsing a list (column 100010)",
        ]) {
            assert!(bad.reason.contains(reason), "{bad}: want {reason}");
            assert!(bad.to_string().contains(&format!(":{}: ", bad.line)), "{bad}");
        }
    }

    #[test]
    fn what_a_metric_needs_is_asked_for() {
        let of =
            |dataset: &str, key: &str, value| line(&[("dataset", serde_json::json!(dataset)), (key, value)]);
        let (items, malformed) = read(of("trec", "all_classes", serde_json::json!(null)).as_bytes(), "trec");
        assert_eq!((items.len(), malformed.len()), (0, 1));
        let text = of("passage_retrieval_en", "answers", serde_json::json!(["Paragraph 2", "two"]));
        let (items, malformed) = read(text.as_bytes(), "passage_retrieval_en_e");
        assert_eq!((items.len(), malformed.len()), (0, 1));
        let text = of("passage_retrieval_en_e", "answers", serde_json::json!(["Paragraph 2"]));
        assert_eq!(read(text.as_bytes(), "passage_retrieval_en_e").0.len(), 1);
        assert_eq!(read(text.as_bytes(), "passage_retrieval_en").1.len(), 1);
    }

    #[test]
    fn bytes_that_are_no_text_and_files_that_are_no_data() {
        let (items, malformed) = read(b"\xff\xfe\n\x00\n", "lcc");
        assert_eq!((items.len(), malformed.len()), (0, 2));
        let (_, malformed) = read("x\n".repeat(crate::malformed::MOST_MALFORMED * 3).as_bytes(), "lcc");
        assert_eq!(malformed.len(), crate::malformed::MOST_MALFORMED + 1);
        assert!(malformed.last().unwrap().reason.contains("too many"));
    }

    #[test]
    fn an_endless_line_is_passed_over() {
        let mut text = vec![b' '; crate::malformed::LONGEST_LINE + 10];
        text.push(b'\n');
        text.extend(line(&[]).into_bytes());
        let (items, malformed) = read(&text, "lcc");
        assert_eq!((items.len(), malformed.len(), malformed[0].line), (1, 1, 1));
    }

    #[test]
    fn folders_list_what_they_lack() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("lcc.jsonl"), line(&[]) + "\n{}\n").unwrap();
        let tasks = ["qasper", "lcc"].map(|name| name.parse().unwrap());
        let folder = read_dir(dir.path(), &tasks).unwrap();
        assert_eq!((folder.items.len(), folder.malformed.len()), (1, 1));
        assert_eq!(folder.missing, tasks[..1]);
        let error = read_dir(&dir.path().join("nowhere"), &tasks).unwrap_err();
        assert!(error.to_string().contains("nowhere"), "{error}");
    }
}
