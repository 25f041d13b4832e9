//! What did the official generator make? Its files, one JSON object a line, whatever may be wrong with some lines.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use serde::Deserialize;

use super::Task;
use crate::malformed::{read_lines, unreadable};
use crate::{Malformed, Sample};

/// What a folder of RULER's files holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Folder {
    /// Samples, task by task in the order asked for.
    pub samples: Vec<Sample>,
    /// Lines that are none.
    pub malformed: Vec<Malformed>,
    /// Tasks without a file.
    pub missing: Vec<Task>,
}

/// Reads `DIR/TASK.jsonl` or `DIR/TASK/validation.jsonl` of each task. The samples' length is the folder's name if
/// that is a number (RULER writes a folder a length), else 0.
pub fn read_dir(dir: &Path, tasks: &[Task]) -> io::Result<Folder> {
    std::fs::read_dir(dir)?;
    let named = std::path::absolute(dir)?;
    let length = named.file_name().and_then(|name| name.to_str()?.parse().ok()).unwrap_or(0);
    let mut folder = Folder::default();
    for &task in tasks {
        let paths = [dir.join(format!("{task}.jsonl")), dir.join(task.name()).join("validation.jsonl")];
        let Some(path) = paths.into_iter().find(|path| path.is_file()) else {
            folder.missing.push(task);
            continue;
        };
        let (samples, malformed) = read_jsonl(&path, task, length)?;
        folder.samples.extend(samples);
        folder.malformed.extend(malformed);
    }
    Ok(folder)
}

/// Reads one file of `task`'s samples and gives them `length`. Lines that are no sample are told; blank ones are not.
pub fn read_jsonl(path: &Path, task: Task, length: usize) -> io::Result<(Vec<Sample>, Vec<Malformed>)> {
    let mut lines_of = HashMap::new();
    read_lines(path, |line, number| {
        let sample = sample(line, task, length)?;
        match lines_of.insert(sample.index, number) {
            None => Ok(sample),
            Some(first) => Err(format!("index {} was that of line {first}", sample.index)),
        }
    })
}

/// The fields that matter; the official `length` counts another model's tokens.
#[derive(Deserialize)]
struct Record {
    index: usize,
    input: String,
    outputs: Vec<String>,
    #[serde(default)]
    answer_prefix: String,
}

fn sample(line: &[u8], task: Task, length: usize) -> Result<Sample, String> {
    let record: Record = serde_json::from_slice(line.trim_ascii_end()).map_err(|error| unreadable(&error))?;
    if record.input.trim().is_empty() {
        return Err("its input is empty".to_string());
    }
    if record.outputs.is_empty() || record.outputs.iter().any(|answer| answer.trim().is_empty()) {
        return Err("its outputs hold no answer, or an empty one".to_string());
    }
    Ok(task.sample(length, record.index, record.input + &record.answer_prefix, record.outputs))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const GOOD: &str = r#"{"index": 3, "input": "One of the special magic numbers for a-b is: 17.\nWhat", "outputs":
        ["17"], "length": 99, "answer_prefix": " It is"}"#;

    #[test]
    fn malformed_lines_are_told_one_by_one() {
        let good = GOOD.replace('\n', " ").replace("a-b is: 17. ", "a-b is: 17.\\n");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("niah_single_1.jsonl");
        let mut bytes = Vec::new();
        for line in [
            &good,
            "",
            "{not json",
            r#"{"index": 4, "input": "x"}"#,
            r#"{"index": 5, "input": "x", "outputs": []}"#,
            r#"{"index": 6, "input": " ", "outputs": ["y"]}"#,
            r#"{"index": 7, "input": "x", "outputs": [3]}"#,
            r#"{"index": -1, "input": "x", "outputs": ["y"]}"#,
            &good,
            "[[[[",
        ] {
            bytes.extend(line.as_bytes());
            bytes.push(b'\n');
        }
        bytes.extend(b"{\"index\": 8, \"input\": \"\xff\", \"outputs\": [\"y\"]}\n");
        bytes.extend(vec![b' '; crate::malformed::LONGEST_LINE + 10]);
        bytes.extend(b"\n{\"index\": 9, \"input\": \"x\", \"outputs\": [\"y\"]}");
        fs::write(&path, bytes).unwrap();
        let (samples, malformed) = read_jsonl(&path, Task::NiahSingle1, 64).unwrap();
        assert_eq!(samples.iter().map(|sample| sample.index).collect::<Vec<_>>(), [3, 9]);
        assert_eq!(
            malformed.iter().map(|line| line.line).collect::<Vec<_>>(),
            [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
        );
        assert!(malformed[6].reason.contains("line 1"), "{}", malformed[6]);
        assert!(malformed[0].to_string().contains("niah_single_1.jsonl:3: "), "{}", malformed[0]);
        assert_eq!(samples[0].prompt, "One of the special magic numbers for a-b is: 17.\nWhat It is");
        assert_eq!((samples[0].length, samples[0].max_new_tokens, samples[0].depth), (64, 128, Some(0.0)));
    }

    #[test]
    fn folders_have_both_layouts() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("4096");
        fs::create_dir_all(folder.join("vt")).unwrap();
        let line = r#"{"index": 0, "input": "x", "outputs": ["y"]}"#;
        fs::write(folder.join("cwe.jsonl"), line).unwrap();
        fs::write(folder.join("vt").join("validation.jsonl"), line).unwrap();
        let read = read_dir(&folder, &[Task::Vt, Task::Fwe, Task::Cwe]).unwrap();
        let names: Vec<(&str, usize)> = read.samples.iter().map(|s| (s.task.as_str(), s.length)).collect();
        assert_eq!(names, [("vt", 4096), ("cwe", 4096)]);
        assert_eq!((read.missing, read.malformed.len()), (vec![Task::Fwe], 0));
        assert!(read_dir(&dir.path().join("none"), &Task::ALL).is_err());
    }
}
