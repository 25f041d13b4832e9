//! Do results files survive a kill at any byte, and say what is wrong with them?

use mosaickv_eval::results::{AnswerRow, Cost, Results, ResultsError, Row, Settings, read};
use std::fs;
use std::path::Path;

const KV: [&str; 2] = ["exact", "packed:kept=0.25"];

fn settings() -> Settings {
    Settings {
        suite: "ruler".into(),
        model: "tiny \u{1f980}".into(),
        kv: KV.map(String::from).to_vec(),
        options: [("seed".to_string(), "7".to_string())].into(),
    }
}

fn unit(sample: usize) -> Vec<Row> {
    let row = |kv: &str| {
        Row::Answer(AnswerRow {
            task: "niah".into(),
            length: 4096,
            sample,
            kv: kv.into(),
            cost: Cost {
                prompt_tokens: 4000,
                kv_bytes: 12_345,
                ratio: 1.0 / 0.3,
                end_ratio: (sample == 1).then_some(3.25),
                bits_per_scalar: 16.0 / 3.0,
                bytes_read_per_step: (sample == 1).then_some(0.1),
            },
            depth: Some(0.7),
            prediction: "a \"quoted\"\nline \u{e4}".into(),
            answers: vec!["x".into()],
            score: 1.0 / 3.0,
        })
    };
    KV.iter().map(|kv| row(kv)).collect()
}

fn write(path: &Path) -> Results {
    let mut results = Results::open(path, &settings(), KV.len()).unwrap();
    for sample in results.done()..3 {
        results.append(&unit(sample)).unwrap();
    }
    results
}

#[test]
fn a_run_killed_at_any_byte_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.jsonl");
    let rows = write(&path).rows().to_vec();
    let whole = fs::read(&path).unwrap();
    assert_eq!(whole.iter().filter(|&&byte| byte == b'\n').count(), 1 + 3 * KV.len());
    for killed_at in 0..=whole.len() {
        fs::write(&path, &whole[..killed_at]).unwrap();
        let results = write(&path);
        assert_eq!(results.rows(), rows, "killed at byte {killed_at}");
        drop(results);
        assert_eq!(fs::read(&path).unwrap(), whole, "killed at byte {killed_at}");
    }
    assert_eq!(read(&path).unwrap(), (settings(), rows));
}

#[test]
fn only_whole_units_count_as_done() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.jsonl");
    drop(write(&path));
    let whole = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = whole.split_inclusive('\n').collect();
    // Settings, one unit, and one row of the next.
    fs::write(&path, lines[..4].concat()).unwrap();
    let results = Results::open(&path, &settings(), KV.len()).unwrap();
    assert_eq!((results.done(), results.cut_bytes()), (1, lines[3].len() as u64));
    assert_eq!(results.rows(), unit(0));
    drop(results);
    assert_eq!(fs::read_to_string(&path).unwrap(), lines[..3].concat());
}

#[test]
fn a_broken_last_line_is_cut_and_any_other_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.jsonl");
    drop(write(&path));
    let whole = fs::read_to_string(&path).unwrap();
    for garbage in ["\0\0\0\n", "{}\n", "\n", "{\"row\":\"answer\"}"] {
        fs::write(&path, format!("{whole}{garbage}")).unwrap();
        let results = Results::open(&path, &settings(), KV.len()).unwrap();
        assert_eq!((results.done(), results.cut_bytes()), (3, garbage.len() as u64));
        drop(results);
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    }
    let mut lines: Vec<&str> = whole.split_inclusive('\n').collect();
    lines[3] = "{\"row\":\"answer\",\n";
    fs::write(&path, lines.concat()).unwrap();
    let error = Results::open(&path, &settings(), KV.len()).unwrap_err().to_string();
    assert!(error.contains("r.jsonl:4: not a row: EOF"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), lines.concat(), "an error leaves the file as it was");
    let error = read(&path).unwrap_err().to_string();
    assert!(error.contains("r.jsonl:4: not a row: EOF"), "{error}");
}

#[test]
fn other_settings_are_named_and_nothing_is_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.jsonl");
    drop(write(&path));
    let whole = fs::read(&path).unwrap();
    let change = |change: fn(&mut Settings)| {
        let mut settings = settings();
        change(&mut settings);
        Results::open(&path, &settings, 2).unwrap_err().to_string()
    };
    for (error, wanted) in [
        (change(|s| s.suite = "kl".into()), "suite = ruler, this run has suite = kl"),
        (change(|s| s.kv.truncate(1)), "kv = exact,packed:kept=0.25, this run has kv = exact;"),
        (change(|s| s.options.clear()), "seed = 7, this run has seed = (none)"),
        (change(|s| s.options = [("seed".into(), "8".into())].into()), "seed = 7, this run has seed = 8"),
    ] {
        assert!(error.contains(wanted) && error.contains("-o"), "{error}");
    }
    assert_eq!(fs::read(&path).unwrap(), whole);
    // Somebody's letter, with and without an end of line.
    for text in ["Dear Sir", "Dear Sir\n", "{\"suite\":\"ruler\"}\n", "\u{0}"] {
        fs::write(&path, text).unwrap();
        let error = Results::open(&path, &settings(), 2).unwrap_err().to_string();
        assert!(error.contains("r.jsonl:1: no settings here"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
}

#[test]
fn two_runs_cannot_share_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.jsonl");
    let first = write(&path);
    assert!(matches!(Results::open(&path, &settings(), 2), Err(ResultsError::InUse { .. })));
    drop(first);
    assert_eq!(write(&path).done(), 3);
}

#[test]
fn numbers_out_of_range_are_neither_written_nor_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.jsonl");
    let mut results = write(&path);
    let whole = fs::read_to_string(&path).unwrap();
    for score in [1.5, -0.1, f64::NAN, f64::INFINITY] {
        let mut rows = unit(3);
        let Row::Answer(row) = &mut rows[1] else { unreachable!() };
        row.score = score;
        assert!(matches!(results.append(&rows), Err(ResultsError::Unwritable { .. })), "{score}");
    }
    drop(results);
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    let score = "\"score\":0.3333333333333333";
    for (broken, wanted) in [
        ("\"score\":1.01", "r.jsonl:2: score is 1.01; wanted 0 to 1"),
        ("\"score\":1e999", "r.jsonl:2: not a row: number out of range"),
        ("\"score\":null", "r.jsonl:2: not a row: invalid type: null"),
    ] {
        fs::write(&path, whole.replace(score, broken)).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    let error = read(&path).unwrap_err().to_string();
    assert!(error.contains("r.jsonl:7: ") && error.contains("start it again"), "{error}");
}
