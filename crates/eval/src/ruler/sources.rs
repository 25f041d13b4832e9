//! What are prompts made from? Essays and two question sets, from files that the user has.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lzma_rust2::XzReader;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::haystack::Haystack;
use super::qa::{Question, Questions};
use super::{RulerError, Task};

/// Most bytes of a source file, decompressed; the largest official one has 46 million.
const MOST_BYTES: u64 = 256 << 20;
/// Most memory of the decompressor, in KiB.
const MOST_DICTIONARY_KIB: u32 = 128 << 10;

/// A file that prompts are made from.
struct Origin {
    /// Names it goes by, the first one in messages; each may end in `.xz`.
    names: &'static [&'static str],
    from: &'static str,
    tasks: &'static [Task],
}

const ESSAYS: Origin = Origin {
    names: &["PaulGrahamEssays.json"],
    from: "RULER's scripts/data/synthetic/json/download_paulgraham_essay.py makes it, and another text can take its place",
    tasks: &[
        Task::NiahSingle2,
        Task::NiahSingle3,
        Task::NiahMultikey1,
        Task::NiahMultivalue,
        Task::NiahMultiquery,
    ],
};

const SQUAD: Origin = Origin {
    names: &["squad_dev-v2.0.json", "squad.json", "dev-v2.0.json"],
    from: "it is https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json (CC BY-SA 4.0)",
    tasks: &[Task::Qa1],
};

const HOTPOT: Origin = Origin {
    names: &["hotpot_dev_distractor_v1.json", "hotpotqa.json"],
    from: "it is http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json (CC BY-SA 4.0)",
    tasks: &[Task::Qa2],
};

/// What prompts are made from. By default nothing, which is enough for the tasks without essays or questions.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    haystack: Option<Arc<Haystack>>,
    squad: Option<Arc<Questions>>,
    hotpot: Option<Arc<Questions>>,
}

impl Sources {
    /// Reads those files of a folder that `tasks` need: `PaulGrahamEssays.json`, `squad_dev-v2.0.json` (or `squad.json`,
    /// `dev-v2.0.json`) and `hotpot_dev_distractor_v1.json` (or `hotpotqa.json`), as RULER's download scripts leave
    /// them; a name may end in `.xz`. A file that is not there is missed only by [`Generator::sample`].
    ///
    /// [`Generator::sample`]: super::Generator::sample
    pub fn load(dir: &Path, tasks: &[Task]) -> Result<Sources, RulerError> {
        std::fs::read_dir(dir).map_err(|source| RulerError::Io { path: dir.to_path_buf(), source })?;
        let wanted = |origin: &Origin| match tasks.iter().any(|task| origin.tasks.contains(task)) {
            true => found(dir, origin),
            false => None,
        };
        Ok(Sources {
            haystack: wanted(&ESSAYS).map(|path| read(&path, "RULER's essays", essays)).transpose()?,
            squad: wanted(&SQUAD).map(|path| read(&path, "SQuAD 2.0", squad)).transpose()?,
            hotpot: wanted(&HOTPOT).map(|path| read(&path, "HotpotQA", hotpot)).transpose()?,
        })
    }

    /// Takes `text` for a haystack where no essays were found. Repeated where it is too short.
    pub fn with_haystack(mut self, text: &str) -> Sources {
        self.haystack = self.haystack.or_else(|| Haystack::new(text).map(Arc::new));
        self
    }

    /// Whether there is a text to hide needles in.
    pub fn has_haystack(&self) -> bool {
        self.haystack.is_some()
    }

    /// Whether everything that the task needs is there.
    pub fn suffice(&self, task: Task) -> bool {
        let needs = |origin: &Origin| origin.tasks.contains(&task);
        !(needs(&ESSAYS) && self.haystack.is_none()
            || needs(&SQUAD) && self.squad.is_none()
            || needs(&HOTPOT) && self.hotpot.is_none())
    }

    pub(super) fn haystack(&self, task: Task) -> Result<Arc<Haystack>, RulerError> {
        self.haystack.clone().ok_or_else(|| missing(task, &ESSAYS))
    }

    pub(super) fn questions(&self, task: Task) -> Result<Arc<Questions>, RulerError> {
        let (questions, origin) = match task {
            Task::Qa1 => (&self.squad, &SQUAD),
            _ => (&self.hotpot, &HOTPOT),
        };
        questions.clone().ok_or_else(|| missing(task, origin))
    }
}

fn missing(task: Task, origin: &Origin) -> RulerError {
    RulerError::MissingSource { task, file: origin.names[0], origin: origin.from }
}

fn found(dir: &Path, origin: &Origin) -> Option<PathBuf> {
    let names = origin.names.iter().flat_map(|name| [name.to_string(), format!("{name}.xz")]);
    names.map(|name| dir.join(name)).find(|path| path.is_file())
}

/// Reads one file, decompressed if need be, and makes of its JSON what `understood` says.
fn read<J: DeserializeOwned, T>(
    path: &Path,
    wanted: &'static str,
    understood: fn(J) -> Result<T, &'static str>,
) -> Result<Arc<T>, RulerError> {
    let malformed = |what| RulerError::Malformed { path: path.to_path_buf(), wanted, what };
    let bytes = bytes(path).map_err(|source| RulerError::Io { path: path.to_path_buf(), source })?;
    let json = serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
    understood(json).map(Arc::new).map_err(|what| malformed(what.to_string()))
}

fn bytes(path: &Path) -> io::Result<Vec<u8>> {
    let file = BufReader::new(File::open(path)?);
    let mut bytes = Vec::new();
    if path.extension().is_some_and(|end| end == "xz") {
        let xz = XzReader::new_mem_limit(file, true, MOST_DICTIONARY_KIB);
        xz.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    } else {
        file.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    }
    if bytes.len() as u64 > MOST_BYTES {
        return Err(io::Error::other(format!("more than {MOST_BYTES} bytes")));
    }
    Ok(bytes)
}

#[derive(Deserialize)]
struct Essays {
    text: String,
}

fn essays(json: Essays) -> Result<Haystack, &'static str> {
    Haystack::new(&json.text).ok_or("its text is empty")
}

#[derive(Deserialize)]
struct Squad {
    data: Vec<SquadArticle>,
}

#[derive(Deserialize)]
struct SquadArticle {
    paragraphs: Vec<SquadParagraph>,
}

#[derive(Deserialize)]
struct SquadParagraph {
    context: String,
    qas: Vec<SquadQuestion>,
}

#[derive(Deserialize)]
struct SquadQuestion {
    question: String,
    answers: Vec<SquadAnswer>,
    #[serde(default)]
    is_impossible: bool,
}

#[derive(Deserialize)]
struct SquadAnswer {
    text: String,
}

/// Documents, each with its number.
#[derive(Default)]
struct Numbered {
    documents: Vec<String>,
    numbers: HashMap<String, usize>,
}

impl Numbered {
    fn number(&mut self, document: String) -> usize {
        *self.numbers.entry(document).or_insert_with_key(|document| {
            self.documents.push(document.clone());
            self.documents.len() - 1
        })
    }

    fn with(self, questions: Vec<Question>) -> Result<Questions, &'static str> {
        match questions.is_empty() {
            true => Err("it has no question with an answer"),
            false => Ok(Questions { documents: self.documents, questions }),
        }
    }
}

/// Questions that can be answered; near are the paragraphs of the same article.
fn squad(json: Squad) -> Result<Questions, &'static str> {
    let mut numbered = Numbered::default();
    let mut questions = Vec::new();
    for article in json.data {
        let (contexts, asked): (Vec<usize>, Vec<Vec<SquadQuestion>>) = article
            .paragraphs
            .into_iter()
            .map(|paragraph| (numbered.number(paragraph.context), paragraph.qas))
            .unzip();
        for (&context, asked) in contexts.iter().zip(asked) {
            for question in asked.into_iter().filter(|q| !q.is_impossible && !q.answers.is_empty()) {
                questions.push(Question {
                    query: question.question,
                    answers: question.answers.into_iter().map(|answer| answer.text).collect(),
                    needed: vec![context],
                    near: once_each(contexts.iter().copied().filter(|&other| other != context)),
                });
            }
        }
    }
    numbered.with(questions)
}

#[derive(Deserialize)]
struct HotpotQuestion {
    question: String,
    answer: String,
    context: Vec<(String, Vec<String>)>,
    #[serde(default)]
    supporting_facts: Vec<(String, i64)>,
}

/// Needed are the paragraphs with supporting facts, near the others of a question's ten.
fn hotpot(json: Vec<HotpotQuestion>) -> Result<Questions, &'static str> {
    let mut numbered = Numbered::default();
    let mut questions = Vec::new();
    for asked in json {
        let facts = asked.supporting_facts;
        let (mut needed, mut near) = (Vec::new(), Vec::new());
        for (title, paragraph) in asked.context {
            let supports = facts.is_empty() || facts.iter().any(|(fact, _)| *fact == title);
            let number = numbered.number(format!("{title}\n{}", paragraph.concat()));
            if supports { needed.push(number) } else { near.push(number) }
        }
        let needed = once_each(needed.into_iter());
        questions.push(Question {
            query: asked.question,
            answers: vec![asked.answer],
            near: once_each(near.into_iter().filter(|number| !needed.contains(number))),
            needed,
        });
    }
    numbered.with(questions)
}

fn once_each(numbers: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut once = Vec::new();
    for number in numbers {
        if !once.contains(&number) {
            once.push(number);
        }
    }
    once
}

#[cfg(test)]
mod tests {
    use super::*;

    const SQUAD_JSON: &str = r#"{"data": [{"title": "t", "paragraphs": [
        {"context": "A b.", "qas": [
            {"question": "A?", "answers": [{"text": "b"}, {"text": "b"}], "is_impossible": false},
            {"question": "Z?", "answers": [], "is_impossible": true}]},
        {"context": "C d.", "qas": []}, {"context": "A b.", "qas": []}]}]}"#;
    const HOTPOT_JSON: &str = r#"[{"question": "Who?", "answer": "yes", "supporting_facts": [["T2", 0]], "type": "x",
        "context": [["T1", ["One.", " Two."]], ["T2", ["Three."]]]}]"#;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn question_sets_are_understood() {
        let dir = folder(&[("squad.json", SQUAD_JSON), ("hotpotqa.json", HOTPOT_JSON)]);
        let sources = Sources::load(dir.path(), &Task::ALL).unwrap();
        let squad = sources.questions(Task::Qa1).unwrap();
        assert_eq!(squad.documents, ["A b.", "C d."]);
        let question = Question {
            query: "A?".into(),
            answers: vec!["b".into(), "b".into()],
            needed: vec![0],
            near: vec![1],
        };
        assert_eq!(squad.questions, [question]);
        let hotpot = sources.questions(Task::Qa2).unwrap();
        assert_eq!(hotpot.documents, ["T1\nOne. Two.", "T2\nThree."]);
        assert_eq!((&hotpot.questions[0].needed, &hotpot.questions[0].near), (&vec![1], &vec![0]));
        assert!(!sources.has_haystack());
        assert!(sources.with_haystack("some text").has_haystack());
    }

    #[test]
    fn only_what_tasks_need_is_read() {
        let dir = folder(&[("squad.json", "nonsense"), ("PaulGrahamEssays.json", r#"{"text": "one two"}"#)]);
        let sources = Sources::load(dir.path(), &[Task::NiahSingle2, Task::Vt]).unwrap();
        assert_eq!(sources.with_haystack("other").haystack(Task::NiahSingle2).unwrap().words(2), "one two");
        let error = Sources::load(dir.path(), &[Task::Qa1]).unwrap_err().to_string();
        assert!(error.contains("squad.json is not SQuAD 2.0"), "{error}");
    }

    #[test]
    fn broken_files_are_errors() {
        for (name, text) in [
            ("PaulGrahamEssays.json", r#"{"text": " "}"#),
            ("PaulGrahamEssays.json.xz", "not xz"),
            ("dev-v2.0.json", r#"{"data": []}"#),
            ("hotpotqa.json", r#"{"data": 3}"#),
        ] {
            let dir = folder(&[(name, text)]);
            let error = Sources::load(dir.path(), &Task::ALL).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        assert!(Sources::load(Path::new("no such folder"), &Task::ALL).is_err());
    }
}
