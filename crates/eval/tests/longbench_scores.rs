//! Are our scores LongBench's? The table was written by its own `metrics.py` (`scripts/longbench_reference.py`).

use std::collections::BTreeMap;
use std::path::Path;

use mosaickv_eval::longbench::Task;
use serde::Deserialize;

#[derive(Deserialize)]
struct Row {
    task: String,
    prediction: String,
    answers: Vec<String>,
    classes: Option<Vec<String>>,
    score: f64,
}

#[test]
fn scores_are_the_official_ones() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/longbench_scores.jsonl");
    let table = std::fs::read_to_string(path).unwrap();
    let mut rows = BTreeMap::<String, usize>::new();
    let mut partial = 0;
    for (number, line) in table.lines().enumerate() {
        let row: Row = serde_json::from_str(line).unwrap();
        let task: Task = row.task.parse().unwrap();
        let ours = task.metric(row.classes.unwrap_or_default()).score(&row.prediction, &row.answers);
        assert!(
            (ours - row.score).abs() < 1e-9,
            "line {}, {task}: {ours}, but officially {}\nprediction {:?}\nanswers {:?}",
            number + 1,
            row.score,
            row.prediction,
            row.answers
        );
        *rows.entry(row.task).or_default() += 1;
        partial += usize::from(ours > 0.01 && ours < 0.99);
    }
    assert!(
        rows.values().sum::<usize>() >= 200 && partial >= 100,
        "too thin a table: {rows:?}, {partial} in between"
    );
    for task in Task::ALL.into_iter().filter(|task| !task.is_even()) {
        assert!(rows.contains_key(&task.to_string()), "no row of {task}");
    }
}
