//! Do our prompts and our reading of the data agree with LongBench's own files, where those are at hand?

use std::path::{Path, PathBuf};

use mosaickv_eval::longbench::{Item, Measure, Task, first_line, read_dir};
use serde_json::Value;

/// Evaluation data beside the checkout, or nothing, said aloud.
fn shared(folder: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(folder);
    if !path.is_dir() {
        println!("SKIPPED: no {}", path.display());
        return None;
    }
    Some(path)
}

#[test]
fn prompts_and_limits_are_the_official_ones() {
    let Some(config) = shared("longbench_config") else { return };
    let table =
        |name| -> Value { serde_json::from_slice(&std::fs::read(config.join(name)).unwrap()).unwrap() };
    let (prompts, lengths) = (table("dataset2prompt.json"), table("dataset2maxlen.json"));
    for task in Task::ALL {
        let name = task.dataset().name();
        assert_eq!(Some(task.template()), prompts[name].as_str(), "{task}");
        assert_eq!(Some(task.max_new_tokens() as u64), lengths[name].as_u64(), "{task}");
    }
}

/// What the right answer scores, where the metric promises that it is all there is to get.
fn whole_score(item: &Item, answer: &str) -> Option<f64> {
    let metric = item.task.metric(item.classes.clone());
    let promised = match &metric.measure {
        // Nothing is left of an answer of articles and punctuation.
        Measure::QaF1 => {
            answer.split_whitespace().any(|word| word.chars().filter(|c| c.is_alphanumeric()).count() > 3)
        }
        // Lines with these marks are passed over.
        Measure::CodeSim => !["`", "#", "//", "\n"].iter().any(|&mark| answer.contains(mark)),
        Measure::RougeL => answer.contains(char::is_alphanumeric) && first_line(answer) == answer,
        Measure::Classification { .. } | Measure::Retrieval | Measure::Count => true,
    };
    promised.then(|| metric.score(answer, &item.answers))
}

#[test]
fn right_answers_score_1() {
    let mut checked = 0;
    for folder in ["longbench", "longbench_long"] {
        let Some(dir) = shared(folder) else { return };
        let found = read_dir(&dir, &Task::ALL).unwrap();
        assert_eq!(found.malformed, [], "malformed lines");
        for item in &found.items {
            for answer in &item.answers {
                let Some(score) = whole_score(item, answer) else { continue };
                assert!(
                    (1.0 - score).abs() < 1e-8,
                    "{} {}: {answer:?} scores {score}",
                    item.task,
                    item.index
                );
                assert_eq!(item.task.metric(item.classes.clone()).score("", &item.answers), 0.0);
                checked += 1;
            }
        }
        let missing = found.missing.len();
        println!(
            "{folder}: {} items, {missing} tasks without a file, {checked} answers so far",
            found.items.len()
        );
    }
    assert!(checked > 500, "only {checked} answers were looked at");
}

#[test]
fn every_prompt_holds_its_texts() {
    let Some(dir) = shared("longbench") else { return };
    for item in read_dir(&dir, &Task::ALL).unwrap().items {
        let prompt = item.prompt();
        assert!(prompt.contains(&item.context), "{} {}", item.task, item.index);
        assert!(!item.task.template().contains("{input}") || prompt.contains(&item.input));
        let places = if item.task.template().contains("{input}") { 16 } else { 9 };
        let input = if places == 16 { item.input.len() } else { 0 };
        assert_eq!(prompt.len(), item.task.template().len() - places + item.context.len() + input);
    }
}
