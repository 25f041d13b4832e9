//! Evaluation as a user runs it, on the real model: what was killed goes on to the same bytes, and exact is exact.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// SmolLM2, or a line that says why the test is skipped.
fn model() -> Option<PathBuf> {
    let path = match std::env::var_os("MOSAICKV_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME")?)
            .join(".cache/mosaickv/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    if !path.exists() {
        eprintln!(
            "SKIPPED: no model at {} (run `mosaickv demo`, or set MOSAICKV_TEST_MODEL)",
            path.display()
        );
        return None;
    }
    Some(path)
}

fn eval(args: &[&str], model: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mosaickv"));
    // The tests of this file run side by side.
    command.arg("eval").args(args).args(["--threads", "1"]).arg("--model").arg(model);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn document() -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("demo/document.txt").to_str().unwrap().to_owned()
}

fn run(args: &[&str], model: &Path) -> String {
    let output = eval(args, model).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let Some(model) = model() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (whole, killed) = (path("whole.jsonl"), path("killed.jsonl"));
    let args = |out: &str| {
        let words = "ruler --length 1000 --tasks niah_single_1,vt,niah_multikey_2 --samples 3 --kv exact,packed,q4_0 -o";
        words.split(' ').map(str::to_owned).chain([out.to_owned()]).collect::<Vec<String>>()
    };
    let strings = |words: &'_ [String]| words.iter().map(String::as_str).collect::<Vec<&str>>().join("\u{0}");
    let run_to = |out: &str| {
        let words = args(out);
        run(&strings(&words).split('\u{0}').collect::<Vec<_>>(), &model)
    };
    run_to(&whole);
    let whole = std::fs::read(whole).unwrap();
    let lines = whole.iter().filter(|&&b| b == b'\n').count();
    assert_eq!(lines, 1 + 9 * 3, "{}", String::from_utf8_lossy(&whole));

    let words = args(&killed);
    let mut child = eval(&strings(&words).split('\u{0}').collect::<Vec<_>>(), &model).spawn().unwrap();
    let start = Instant::now();
    let written = || std::fs::read(&killed).unwrap_or_default().iter().filter(|&&b| b == b'\n').count();
    while written() < 4 && start.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!((4..lines).contains(&written()), "killed after {} lines", written());
    // As if it had been killed in the middle of a write.
    let torn = std::fs::read(&killed).unwrap();
    std::fs::write(&killed, &torn[..torn.len() - 17]).unwrap();
    run_to(&killed);
    assert!(std::fs::read(&killed).unwrap() == whole, "the bytes differ");
    // Nothing is left to do, and other settings are refused.
    run_to(&killed);
    assert!(std::fs::read(&killed).unwrap() == whole);
    let mut other = args(&killed);
    other[6] = "4".to_owned(); // --samples
    let output = eval(&strings(&other).split('\u{0}').collect::<Vec<_>>(), &model).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("samples"));
}

/// Rows of `eval kl` over the document: its next `score` tokens after `prefix`, and two needles.
fn kl_rows(model: &Path, [prefix, score]: [&str; 2], kv: &str) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("kl.jsonl").to_str().unwrap().to_owned();
    let text = document();
    let args = ["kl", "--text", &text, "--prefix", prefix, "--score", score, "--ask", "2", "--json"];
    let rows = run(&[&args[..], &["--kv", kv, "-o", &out]].concat(), model);
    rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("no {key} in {row}"))
}

#[test]
fn exact_is_exact_and_8_bits_nearly() {
    let Some(model) = model() else { return };
    let rows = kl_rows(&model, ["768", "48"], "exact,q8_0,packed,snapkv");
    assert_eq!(rows.len(), 4 * (1 + 2));
    for row in &rows {
        let (kl, top1) = (number(row, "kl"), number(row, "top1"));
        assert!(kl >= -1e-9 && (0.0..=1.0).contains(&top1), "{row}");
        assert!(number(row, "ratio") > 0.5 && number(row, "bytes_read_per_step") > 0.0, "{row}");
        match row["kv"].as_str().unwrap() {
            "exact" => assert!(kl < 1e-4 && top1 == 1.0 && number(row, "dnll").abs() < 1e-6, "{row}"),
            "q8_0" if row.get("depth").is_none() => assert!(kl < 1e-3 && number(row, "ratio") > 1.5, "{row}"),
            "packed" => assert!(kl > 1e-4 && number(row, "ratio") > 1.5, "{row}"),
            _ => {}
        }
    }
}

/// Generated tokens that lose too much show only after some hundred of them.
#[test]
fn the_layered_format_is_near_exact_long_after_the_prompt() {
    let Some(model) = model() else { return };
    let rows = kl_rows(&model, ["2304", "600"], "layered");
    assert_eq!(rows.len(), 1 + 2);
    for (row, bound) in rows.iter().zip([0.022, 0.15, 0.15]) {
        let number = |key: &str| number(row, key);
        assert!(number("kl") < bound && number("ratio") > 7.84 && number("end_ratio") > 7.5, "{row}");
    }
}

#[test]
fn one_layer_loses_less_than_all() {
    let Some(model) = model() else { return };
    let folder = tempfile::tempdir().unwrap();
    let text = document();
    let kl = |name: &str, more: &[&str]| -> Vec<f64> {
        let out = folder.path().join(name).to_str().unwrap().to_owned();
        let args =
            ["kl", "--text", &text, "--prefix", "400", "--score", "12", "--json", "--kv", "packed", "-o"];
        let rows = run(&[&args[..], &[&out], more].concat(), &model);
        rows.lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["kl"].as_f64().unwrap())
            .collect()
    };
    let (all, each) = (kl("all", &[]), kl("each", &["--each-layer"]));
    assert_eq!((all.len(), each.len()), (1, 30));
    let mean = each.iter().sum::<f64>() / 30.0;
    assert!(mean > 0.0 && mean < all[0], "each layer {mean}, all {}", all[0]);
}

#[test]
fn names_and_lines_that_are_wrong_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let no_model = Path::new("/no/such/model.gguf");
    let refused = |args: &[&str], says: &[&str]| {
        let output = eval(args, no_model).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        for word in says {
            assert!(error.contains(word), "{args:?}: no `{word}` in: {error}");
        }
    };
    refused(&["ruler", "--tasks", "niah_single_9"], &["niah_single_9", "niah_single_1", "qa_2"]);
    refused(&["ruler", "--kv", "exact,foo"], &["foo", "exact", "packed", "kivi", "snapkv", "quest"]);
    refused(&["ruler", "--tasks", "qa_1"], &["qa_1", "--sources", "squad"]);
    let dir = folder.path().to_str().unwrap();
    refused(&["longbench", "--data", dir, "--tasks", "qaspar"], &["qaspar", "qasper"]);
    refused(&["longbench", "--data", dir, "--tasks", "qasper"], &["no file of qasper"]);
    std::fs::write(folder.path().join("qasper.jsonl"), "{\"input\": 3}\n").unwrap();
    refused(&["longbench", "--data", dir, "--tasks", "qasper"], &["qasper.jsonl:1", "no sample"]);
    std::fs::create_dir(folder.path().join("512")).unwrap();
    std::fs::write(folder.path().join("512/vt.jsonl"), "nonsense\n").unwrap();
    refused(&["ruler", "--data", dir, "--length", "512", "--tasks", "vt"], &["vt.jsonl:1", "no sample"]);
}
