//! Are our RULER samples what the official generator would make? Their form against official samples, their length by a
//! real tokenizer, their answers by what the prompt says.
//!
//! Official samples and sources lie beside the checkout (`../shared/data`); the model is `MOSAICKV_TEST_MODEL`, or where
//! `mosaickv demo` puts it. What is absent is skipped with a line that says so.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use mosaickv_eval::ruler::{Folder, Generator, Sources, Task, read_dir, read_jsonl};
use mosaickv_eval::{Metric, Sample};
use mosaickv_model::{Model, Specials, Text};

const LENGTHS: [usize; 3] = [2048, 4096, 7680];
const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

static DATA: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
    let data = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    if !data.is_dir() {
        println!("SKIPPED: no official samples or sources at {}", data.display());
        return None;
    }
    Some(data)
});

static TEXT: LazyLock<Option<Text>> = LazyLock::new(|| {
    let path = match std::env::var_os("MOSAICKV_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME")?)
            .join(".cache/mosaickv/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    if !path.exists() {
        println!("SKIPPED: no model at {} (run `mosaickv demo`, or set MOSAICKV_TEST_MODEL)", path.display());
        return None;
    }
    let (_, text) = Model::load(&path, &mut |_, _| ()).unwrap();
    Some(text)
});

static SOURCES: LazyLock<Option<Sources>> = LazyLock::new(|| {
    let start = Instant::now();
    let sources = Sources::load(&DATA.as_ref()?.join("sources"), &Task::ALL).unwrap();
    println!("sources read in {:?}", start.elapsed());
    Some(sources)
});

/// Tokens by the model, as plain completion counts them.
fn tokens(text: &Text, prompt: &str) -> usize {
    text.encode(prompt, Specials::Added).unwrap().len()
}

/// About the tokens of English text.
fn words_and_a_third(prompt: &str) -> usize {
    prompt.split_whitespace().count() * 13 / 10
}

/// A generator with the sources or, where there are none, a haystack made up; the tasks that it can make.
fn generator(seed: u64) -> (Generator, Vec<Task>) {
    match SOURCES.as_ref() {
        Some(sources) => (Generator::new(sources.clone(), seed), Task::ALL.to_vec()),
        None => {
            let text: Vec<String> = (0..4000).map(|i| format!("Sentence {i} says little.")).collect();
            let tasks = Task::ALL.into_iter().filter(|task| !matches!(task, Task::Qa1 | Task::Qa2));
            (Generator::new(Sources::default().with_haystack(&text.join(" ")), seed), tasks.collect())
        }
    }
}

fn official(length: usize) -> Option<Folder> {
    Some(read_dir(&DATA.as_ref()?.join("ruler").join(length.to_string()), &Task::ALL).unwrap())
}

fn task(sample: &Sample) -> Task {
    sample.task.parse().unwrap()
}

#[test]
fn every_task_fills_every_length() {
    let (generator, tasks) = generator(42);
    for length in LENGTHS {
        for &task in &tasks {
            for index in 0..3 {
                let sample = generator.sample(task, length, index, &mut words_and_a_third).unwrap();
                let used = words_and_a_third(&sample.prompt) + task.max_new_tokens();
                assert!(used <= length && used * 10 >= length * 9, "{task} {index}: {used} of {length}");
                assert_eq!((sample.length, sample.index, sample.chat), (length, index, false));
            }
        }
    }
}

#[test]
fn a_sample_depends_on_its_own_names_only() {
    let (one, tasks) = generator(7);
    let (other, _) = generator(8);
    for task in tasks {
        let late = one.sample(task, 2048, 5, &mut words_and_a_third).unwrap();
        let early = one.sample(task, 2048, 0, &mut words_and_a_third).unwrap();
        assert_eq!(late, one.sample(task, 2048, 5, &mut words_and_a_third).unwrap());
        assert_ne!(late.prompt, early.prompt, "{task}");
        assert_ne!(
            late.prompt,
            other.sample(task, 2048, 5, &mut words_and_a_third).unwrap().prompt,
            "{task}"
        );
    }
}

/// FNV-1a: enough to see that a prompt changed.
fn hash(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[test]
fn samples_stay_what_they_were() {
    let generator = Generator::new(Sources::default(), 42);
    let hashes = [Task::NiahSingle1, Task::NiahMultikey3, Task::Vt, Task::Cwe, Task::Fwe]
        .map(|task| hash(&generator.sample(task, 2048, 1, &mut words_and_a_third).unwrap().prompt));
    let known = [
        3103937546105978594,
        4981578510081924157,
        6892360399536143173,
        3130308270073652291,
        10499531909608329461,
    ];
    assert_eq!(hashes, known, "results of the same seed before and after are not comparable");
}

#[test]
fn answers_are_what_the_prompt_says() {
    let (generator, tasks) = generator(3);
    for length in LENGTHS {
        for &task in &tasks {
            for index in 0..4 {
                let sample = generator.sample(task, length, index, &mut words_and_a_third).unwrap();
                answers_hold(&sample);
            }
        }
        for sample in official(length).into_iter().flat_map(|folder| folder.samples) {
            answers_hold(&sample);
        }
    }
}

/// Works the answers out of the prompt.
fn answers_hold(sample: &Sample) {
    let (prompt, answers) = (&sample.prompt, &sample.answers);
    let task = task(sample);
    let found: BTreeSet<String> = match task {
        Task::Qa1 => answers.iter().filter(|answer| prompt.contains(answer.as_str())).cloned().collect(),
        Task::Qa2 => return, // answers are "yes", or what the documents paraphrase
        Task::Vt => vt_holders(prompt),
        Task::Cwe => most_frequent(cwe_list(prompt).1, 10),
        Task::Fwe => most_frequent(fwe_list(prompt).1, 4).into_iter().filter(|word| word != "...").collect(),
        _ => {
            let parts = Niah::of(prompt);
            parts.queries.iter().flat_map(|key| parts.values[key].clone()).collect()
        }
    };
    assert_eq!(found, answers.iter().cloned().collect(), "{task} {}", sample.index);
    let has_needle = !matches!(task, Task::Cwe | Task::Fwe | Task::Qa1);
    assert_eq!(sample.depth.is_some(), has_needle, "{task}");
    if let Some(depth) = sample.depth {
        let characters: Vec<char> = prompt.chars().collect();
        let at = (depth * characters.len() as f64).round() as usize;
        let needle: String = characters[at..].iter().take_while(|c| **c != '\n').take(150).collect();
        let begins = if task == Task::Vt { format!("VAR {} = ", answers[0]) } else { NEEDLE.to_string() };
        assert!(needle.starts_with(&begins), "{task}: {needle}");
        assert!(task == Task::Vt || answers.iter().any(|answer| needle.contains(answer)), "{task}: {needle}");
    }
}

/// The variables that hold the value asked for.
fn vt_holders(prompt: &str) -> BTreeSet<String> {
    let (_, chain) = prompt.rsplit_once("Memorize").unwrap();
    let value = chain.split("assigned the value ").nth(1).unwrap().split(' ').next().unwrap();
    let mut holders = BTreeSet::new();
    for line in chain.lines().filter(|line| line.starts_with("VAR ")) {
        let (variable, from) = line["VAR ".len()..].trim_end().split_once(" = ").unwrap();
        if from == value || holders.contains(from.trim_start_matches("VAR ")) {
            holders.insert(variable.to_string());
        }
    }
    holders
}

fn counts<'a>(words: &[&'a str]) -> BTreeMap<&'a str, usize> {
    let mut counts = BTreeMap::new();
    for word in words {
        *counts.entry(*word).or_insert(0) += 1;
    }
    counts
}

/// The `n` most frequent, which no other word equals.
fn most_frequent(words: Vec<&str>, n: usize) -> BTreeSet<String> {
    let mut ranked: Vec<(usize, &str)> =
        counts(&words).into_iter().map(|(word, count)| (count, word)).collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    assert!(ranked[n - 1].0 > ranked[n].0, "{:?}", &ranked[..=n]);
    ranked[..n].iter().map(|(_, word)| word.to_string()).collect()
}

/// A prompt of `cwe` with its lists as `#` and the sizes of the example's list; the long list.
fn cwe_list(prompt: &str) -> (String, Vec<&str>) {
    let mut form = String::new();
    let mut lists = Vec::new();
    for line in prompt.lines() {
        if line.starts_with("1. ") {
            lists.push(numbered(line));
            form.push_str("#\n");
        } else if let Some((before, _)) = line.split_once(": 1. ") {
            lists.push(numbered(&line[before.len() + 2..]));
            form.push_str(&format!("{before}: #\n"));
        } else {
            form.push_str(&format!("{line}\n"));
        }
    }
    let example = most_frequent(lists[0].clone(), 10);
    assert_eq!(example, lists[1].iter().map(|word| word.to_string()).collect());
    let mut sizes: Vec<usize> = counts(&lists[0]).into_values().collect();
    sizes.sort_unstable();
    form.push_str(&format!("{sizes:?}"));
    (form, lists.remove(2))
}

/// The words of `1. one 2. two`, which may have blanks in them.
fn numbered(line: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = line.strip_prefix("1. ").unwrap();
    for next in 2.. {
        let Some((word, after)) = rest.split_once(&format!(" {next}. ")) else { break };
        words.push(word);
        rest = after;
    }
    words.push(rest);
    words
}

/// A prompt of `fwe` with its text as `#`, and the text's words.
fn fwe_list(prompt: &str) -> (String, Vec<&str>) {
    let (before, rest) = prompt.split_once("coded words. ").unwrap();
    let (text, after) = rest.split_once('\n').unwrap();
    (format!("{before}coded words. #\n{after}"), text.split(' ').collect())
}

/// What a prompt of a `niah` task consists of.
struct Niah {
    /// Everything but the context, keys asked for as `K`.
    frame: String,
    /// What kinds of keys and values there are.
    kinds: BTreeSet<String>,
    values: BTreeMap<String, Vec<String>>,
    queries: Vec<String>,
    /// The context without its needles.
    hay: String,
}

const NEEDLE: &str = "One of the special magic ";

impl Niah {
    fn of(prompt: &str) -> Niah {
        let (head, rest) = prompt.split_once('\n').unwrap();
        let (context, tail) = rest.rsplit_once("\nWhat ").unwrap();
        let mut values: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut kinds = BTreeSet::new();
        let mut pieces = context.split(NEEDLE);
        let mut hay = vec![pieces.next().unwrap().trim().to_string()];
        for piece in pieces {
            let (kind, rest) = piece.split_once(" for ").unwrap();
            let (key, rest) = rest.split_once(" is: ").unwrap();
            let (value, rest) = rest.split_once('.').unwrap();
            kinds.insert(format!("{kind}: {} is {}", kind_of(key), kind_of(value)));
            values.entry(key.to_string()).or_default().push(value.to_string());
            hay.push(rest.trim().to_string());
        }
        let asked = tail.split_once(" for ").unwrap().1.split_once(" mentioned").unwrap().0;
        let queries: Vec<String> =
            asked.split(", ").map(|key| key.trim_start_matches("and ").to_string()).collect();
        let frame = queries.iter().fold(format!("{head}\n{tail}"), |frame, key| frame.replace(key, "K"));
        hay.retain(|piece| !piece.is_empty());
        let between = if context.contains('\n') { "\n" } else { " " };
        Niah { frame, kinds, values, queries, hay: hay.join(between) }
    }

    /// The form, without what length and draw decide; the essays are without blanks.
    fn form(&self, essays: &str) -> String {
        let hay = match self.hay.as_str() {
            "" => "needles".to_string(),
            hay if hay.lines().all(|line| line == NOISE) => "noise".to_string(),
            // NLTK also splits where no blank is, and a blank comes of it.
            hay if essays.starts_with(&hay.replace(' ', "")) => "essays".to_string(),
            hay => format!("unknown: {hay}"),
        };
        let numbers = match hay.as_str() {
            "needles" => "many".to_string(),
            _ => format!("{:?}", self.values.values().map(Vec::len).collect::<Vec<_>>()),
        };
        format!("{}\n{:?}\n{hay}, {numbers}, {} asked", self.frame, self.kinds, self.queries.len())
    }
}

fn kind_of(text: &str) -> &'static str {
    let hex = |part: &&str| part.chars().all(|c| c.is_ascii_hexdigit() && !c.is_ascii_uppercase());
    let parts: Vec<&str> = text.split('-').collect();
    if parts.iter().map(|part| part.len()).eq([8, 4, 4, 4, 12]) && parts.iter().all(hex) {
        assert!(parts[2].starts_with('4') && parts[3].starts_with(['8', '9', 'a', 'b']), "{text}");
        "uuid"
    } else if text.len() == 7 && text.bytes().all(|c| c.is_ascii_digit()) && !text.starts_with('0') {
        "number"
    } else if parts.len() > 1 && parts.iter().all(|part| part.chars().any(char::is_alphabetic)) {
        "words"
    } else {
        "unknown"
    }
}

/// A prompt of `vt` without its noise, variables and numbers.
fn vt_form(prompt: &str) -> String {
    let name = |word: &str| word != "VAR" && word.len() >= 3 && word.bytes().all(|c| c.is_ascii_uppercase());
    let mut form = String::new();
    for line in prompt.split('\n').filter(|line| *line != NOISE) {
        for word in line.split(' ') {
            let bare = word.trim_end_matches(',');
            form.push_str(&match bare {
                _ if name(bare) => format!("V{}", bare.len()),
                _ if bare.len() == 5 && bare.bytes().all(|c| c.is_ascii_digit()) => "N".to_string(),
                _ => bare.to_string(),
            });
            form.push_str(&word[bare.len()..]);
            form.push(' ');
        }
        form.push('\n');
    }
    form
}

/// A prompt of `qa` without its documents and question.
fn qa_form(prompt: &str) -> String {
    let (head, rest) = prompt.split_once("Document 1:\n").unwrap();
    let (mut rest, tail) = rest.rsplit_once("\n\nAnswer the question based").unwrap();
    for next in 2.. {
        let Some((_, after)) = rest.split_once(&format!("\n\nDocument {next}:\n")) else { break };
        rest = after;
    }
    assert!(!rest.contains("\n\nDocument "), "documents are not numbered from 1");
    let (tail, question) = tail.split_once("Question: ").unwrap();
    format!("{head}#{tail}Question: #{}", &question[question.rfind(" Answer").unwrap()..])
}

/// Whether the words' numbers are those of a zeta distribution with exponent 2.
fn is_zeta(words: &[&str]) -> bool {
    let coded = |word: &str| word.len() == 6 && word.bytes().all(|c| c.is_ascii_lowercase());
    assert!(words.iter().all(|word| *word == "..." || coded(word)));
    let mut numbers: Vec<usize> = counts(words).into_values().collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let zeta = std::f64::consts::PI.powi(2) / 6.0;
    let first = (numbers[0] as f64 * zeta) as usize;
    (first..first + 3).any(|all| {
        let count = |rank: usize| (all as f64 / ((rank * rank) as f64 * zeta)) as usize;
        numbers.iter().enumerate().all(|(i, number)| count(i + 1) == *number)
    })
}

fn form(sample: &Sample, essays: &str) -> String {
    let form = match task(sample) {
        Task::Vt => vt_form(&sample.prompt),
        Task::Qa1 | Task::Qa2 => qa_form(&sample.prompt),
        Task::Cwe => {
            let (form, list) = cwe_list(&sample.prompt);
            let sizes: BTreeSet<usize> = counts(&list).into_values().collect();
            format!("{form}\n{sizes:?}")
        }
        Task::Fwe => {
            let (form, words) = fwe_list(&sample.prompt);
            format!("{form}\n{}", if is_zeta(&words) { "zeta" } else { "no zeta" })
        }
        _ => Niah::of(&sample.prompt).form(essays),
    };
    let answers = match task(sample) {
        Task::Qa1 | Task::Qa2 => "some".to_string(),
        _ => sample.answers.len().to_string(),
    };
    format!("{form}\n{answers} answers")
}

#[test]
fn the_form_is_the_official_one() {
    let (Some(data), Some(_)) = (DATA.as_ref(), SOURCES.as_ref()) else { return };
    let json = std::fs::read_to_string(data.join("sources/PaulGrahamEssays.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let essays = json["text"].as_str().unwrap().split_whitespace().collect::<String>();
    let (generator, _) = generator(11);
    for length in LENGTHS {
        let folder = official(length).unwrap();
        assert_eq!(folder.malformed, []);
        assert_eq!(folder.missing, if length == 2048 { vec![Task::Qa2] } else { vec![] });
        let mut forms: BTreeMap<Task, BTreeSet<String>> = BTreeMap::new();
        for sample in &folder.samples {
            forms.entry(task(sample)).or_default().insert(form(sample, &essays));
        }
        for (&task, forms) in &forms {
            assert_eq!(forms.len(), 1, "{task} {length}: {forms:?}");
            for index in 0..3 {
                let ours = generator.sample(task, length, index, &mut words_and_a_third).unwrap();
                assert_eq!(&form(&ours, &essays), forms.first().unwrap(), "{task} {length} {index}");
            }
        }
    }
}

#[test]
fn questions_come_in_the_official_order() {
    let Some(_) = SOURCES.as_ref() else { return };
    let (generator, _) = generator(5);
    let question = |sample: &Sample| sample.prompt.rsplit_once("Question: ").unwrap().1.to_string();
    let folder = official(4096).unwrap();
    let mut seen = 0;
    for sample in
        folder.samples.iter().filter(|sample| sample.metric == Metric::MatchPart && sample.index < 10)
    {
        let ours = generator.sample(task(sample), 4096, sample.index, &mut words_and_a_third).unwrap();
        assert_eq!((question(&ours), &ours.answers), (question(sample), &sample.answers));
        seen += 1;
    }
    assert_eq!(seen, 20);
}

#[test]
fn official_answers_score_as_they_should() {
    for length in LENGTHS {
        let Some(folder) = official(length) else { return };
        assert!(folder.samples.len() >= 300, "{}", folder.samples.len());
        for sample in &folder.samples {
            let score = |prediction: &str| sample.metric.score(prediction, &sample.answers);
            assert_eq!(score(&format!(" {}.\n", sample.answers.join(", "))), 1.0);
            assert_eq!(score(&sample.answers.join("\n").to_uppercase()), 1.0);
            assert_eq!(score(""), 0.0);
            let one = score(&sample.answers[0]);
            match task(sample) {
                Task::Qa1 | Task::Qa2 => assert_eq!(one, 1.0),
                Task::Cwe => assert!((0.1..1.0).contains(&one), "{one}"), // a word may hold another
                _ => assert_eq!(one, 1.0 / sample.answers.len() as f64),
            }
        }
    }
}

/// The official samples of one file: its stated lengths are our counts. Mean share of the length.
fn official_share(text: &Text, task: Task, length: usize) -> f64 {
    let path = DATA.as_ref().unwrap().join(format!("ruler/{length}/{task}.jsonl"));
    let Ok(lines) = std::fs::read_to_string(&path) else { return 0.0 };
    let (samples, _) = read_jsonl(&path, task, length).unwrap();
    let mut sum = 0;
    for (line, sample) in lines.lines().zip(&samples).take(10) {
        let json: serde_json::Value = serde_json::from_str(line).unwrap();
        let stated = json["length"].as_u64().unwrap() as usize;
        assert_eq!(tokens(text, &sample.prompt) + task.max_new_tokens(), stated, "{task} {length}");
        sum += stated;
    }
    sum as f64 / (10 * length) as f64
}

/// Sentences of noise in the solved chain of every official sample of `vt`.
const OFFICIAL_EXAMPLE_NOISE: usize = 14;

#[test]
fn lengths_are_the_official_ones_by_the_official_tokenizer() {
    let (Some(text), Some(_)) = (TEXT.as_ref(), SOURCES.as_ref()) else { return };
    let (generator, _) = generator(42);
    let mut slowest = Duration::ZERO;
    for (length, task) in LENGTHS.iter().flat_map(|length| Task::ALL.map(|task| (*length, task))) {
        let official = official_share(text, task, length);
        let mut ours = Vec::new();
        let mut calls = 0;
        for index in 0..3 {
            let start = Instant::now();
            let mut count = |prompt: &str| {
                calls += 1;
                tokens(text, prompt)
            };
            let sample = generator.sample(task, length, index, &mut count).unwrap();
            slowest = slowest.max(start.elapsed());
            let used = tokens(text, &sample.prompt) + task.max_new_tokens();
            assert!(used <= length, "{task} {index}: {used} of {length}");
            ours.push(used as f64 / length as f64);
        }
        if task == Task::Vt {
            let sample = generator.sample(task, length, 0, &mut |prompt| tokens(text, prompt)).unwrap();
            let (example, _) = sample.prompt.rsplit_once("Memorize").unwrap();
            assert_eq!(example.matches(NOISE).count(), OFFICIAL_EXAMPLE_NOISE);
        }
        let mean = ours.iter().sum::<f64>() / 3.0;
        println!("{task:<16} {length}: ours {mean:.3}, official {official:.3}, {} calls a sample", calls / 3);
        assert!(
            mean >= official - 0.01 && ours.iter().all(|share| *share >= 0.9),
            "{task} {length}: {ours:?}"
        );
    }
    println!("slowest sample: {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?} for one sample");
}
