//! The binary as a user meets it: bad input gets a clear error, exit code 2, and nothing on stdout.

use std::path::PathBuf;
use std::process::{Command, Output};

fn mosaickv(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mosaickv")).args(args).env_remove("MOSAICKV_MODEL").output().unwrap()
}

/// A tiny checkpoint of the model crate's tests.
fn tiny(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data").join(name);
    path.to_str().unwrap().to_owned()
}

fn file(name: &str, bytes: &[u8]) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

fn refused(args: &[&str], says: &[&str]) {
    let output = mosaickv(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
    assert!(output.stdout.is_empty(), "{args:?} printed something");
    for word in says {
        assert!(error.contains(word), "{args:?}: no `{word}` in: {error}");
    }
    assert!(!error.contains("panicked"), "{args:?}: {error}");
}

#[test]
fn bad_models() {
    refused(&["run", "--model", "/no/such/file.gguf", "hello"], &["/no/such/file.gguf", "give a path"]);
    let whole = std::fs::read(tiny("llama.gguf")).unwrap();
    let (_folder, path) = file("short.gguf", &whole[..whole.len() / 2]);
    refused(&["run", "--model", &path, "hello"], &["short.gguf"]);
    let (_folder, path) = file("text.gguf", b"this is no model");
    refused(&["run", "--model", &path, "hello"], &["text.gguf"]);
    let mut strange = whole.clone();
    let at = strange.windows(5).position(|w| w == b"llama").unwrap();
    strange[at..at + 5].copy_from_slice(b"mamba");
    let (_folder, path) = file("mamba.gguf", &strange);
    refused(&["run", "--model", &path, "hello"], &["mamba", "llama"]);
}

#[test]
fn bad_documents_and_questions() {
    let model = tiny("llama.gguf");
    let run = |rest: &[&str], says: &[&str]| refused(&[&["run", "--model", &model], rest].concat(), says);
    run(&["--file", "/no/such/text", "hello"], &["/no/such/text"]);
    let (_folder, empty) = file("empty.txt", b" \n\t ");
    run(&["--file", &empty, "hello"], &["empty.txt", "is empty"]);
    let (_folder, latin) = file("latin.txt", b"caf\xe9");
    run(&["--file", &latin, "hello"], &["not UTF-8", "byte at 3"]);
    run(&["  "], &["question is empty"]);
}

#[test]
fn bad_flags() {
    let model = tiny("llama.gguf");
    refused(&["run", "--model", &model, "--colour", "hello"], &["--colour"]);
    refused(&["run", "--model", &model, "--kv", "zipped", "hello"], &["zipped", "exact, packed"]);
    refused(&["run", "--model", &model, "--kv", "packed:kept=7", "hello"], &["kept"]);
    refused(&["run", "--model", &model, "--threads", "0", "hello"], &["--threads"]);
    refused(&["bench", "attention", "--heads", "5", "--kv-heads", "3"], &["5 query heads", "3 KV heads"]);
    refused(&["bench", "attention", "--context", "0"], &["--context", "16777216"]);
    refused(&["demo", "--kv", "exact", "--model", &model], &["compare the exact cache with itself"]);
}

#[test]
fn inspection_of_formats_that_choose_nothing_or_of_too_little() {
    let (_folder, text) = file("text.txt", b"a few words");
    let model = tiny("llama.gguf");
    let inspect = |rest: &[&str], says: &[&str]| {
        refused(&[&["inspect", "--model", &model, "--file", &text], rest].concat(), says);
    };
    inspect(&["--kv", "q8_0"], &["q8_0", "only packed and layered"]);
    inspect(&["--kv", "packed"], &["too few"]);
    inspect(&["--context", "x.context"], &["--file", "--context", "cannot be used with"]);
    refused(&["inspect", "--model", &model], &["--file"]);
    let saved = |path: &str, says: &[&str]| {
        refused(&["inspect", "--model", &model, "--context", path], says);
    };
    saved(&text, &["text.txt", "no saved context"]);
    saved("/no/such/file.context", &["/no/such/file.context", "No such file"]);
}

#[test]
fn budgets_that_cannot_be() {
    let model = tiny("llama.gguf");
    let run = |rest: &[&str], says: &[&str]| {
        refused(&[&["run", "--model", &model], rest, &["hello"]].concat(), says);
    };
    run(&["--kv", "layered:0"], &["budget=0", "ratio of 1 to 64"]);
    run(&["--kv", "layered:-3MB"], &["-3MB", "1B to 1000000GB"]);
    run(&["--kv", "layered:1e30GB"], &["1e30GB", "1B to 1000000GB"]);
    run(&["--kv", "layered:abc"], &["budget=abc", "24MB"]);
    run(&["--kv-budget", "24Mb/s"], &["24Mb/s", "no unit"]);
    run(&["--kv-budget", "24XB"], &["24XB", "kB, MB, GB, KiB, MiB or GiB"]);
    run(&["--kv", "packed", "--kv-budget", "24MB"], &["packed", "make it layered"]);
    run(&["--kv", "layered:4", "--kv-budget", "24MB"], &["two budgets"]);
    run(&["--kv", "exact", "--allow-drop"], &["--allow-drop is for the layered format", "exact"]);
    run(&["--kv", "exact", "--select", "mass=0.99"], &["--select is for the layered format", "exact"]);
    run(&["--select", "mass=2"], &["mass=2", "between 0 and 1"]);
    run(&["--kv", "layered@mass=0.9", "--select", "mass=0.99"], &["two selections"]);
    run(&["--kv", "layered:drop=all"], &["drop=all", "guarded or any"]);
    refused(
        &["bench", "decode", "--model", &model, "--kv", "exact,packed", "--kv-budget", "24MB"],
        &["exact,packed has none; add layered"],
    );
}

#[test]
fn a_prompt_over_the_context_is_refused_with_both_counts() {
    let (_folder, long) = file("long.txt", "many words ".repeat(3000).as_bytes());
    refused(
        &["run", "--model", &tiny("llama.gguf"), "--file", &long, "hello"],
        &["tokens", "maximum context length is"],
    );
}

#[test]
fn an_answer_has_a_bill_that_adds_up() {
    for kv in ["exact", "packed"] {
        let model = tiny("llama.gguf");
        let output =
            mosaickv(&["run", "--model", &model, "--kv", kv, "--max-tokens", "3", "--json", "hello world"]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{kv}: {error}");
        let bill: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let number = |key: &str| bill[key].as_f64().unwrap_or_else(|| panic!("{kv}: no {key} in {bill}"));
        assert_eq!(bill["kv"], kv);
        assert!(number("prompt_tokens") > 0.0 && number("output_tokens") <= 3.0);
        let ratio = number("kv_bytes_exact_f16") / number("kv_bytes");
        assert!((number("ratio") - ratio).abs() < 1e-9);
        assert!((number("bits_per_scalar") - 16.0 / ratio).abs() < 1e-6);
    }
}

#[test]
fn a_benchmark_prints_rows_with_what_was_measured() {
    let output = mosaickv(&[
        "bench",
        "attention",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--head-dim",
        "32",
        "--context",
        "2400",
        "--kv",
        "exact,packed,layered",
        "--rounds",
        "1",
        "--json",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["machine"]["stream_gb_s"].as_f64().unwrap() > 0.0);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    for (row, bound) in rows.iter().zip([1e-4, 1e-4, 1e-3]) {
        assert!(row["time_us"].as_f64().unwrap() > 0.0 && row["max_error"].as_f64().unwrap() < bound);
    }
    let stored = |i: usize| rows[i]["bytes_stored"].as_f64().unwrap();
    assert!(stored(2) < stored(0) / 4.0, "all layers are compressed: {} of {}", stored(2), stored(0));
    // 2,400 tokens, 2 KV heads, 32 channels, keys and values, 2 bytes each.
    assert_eq!(rows[0]["bytes_read"], 2400 * 2 * 32 * 2 * 2);
}

/// With the feature or without, there is no GPU where tests run; a machine that has one skips this.
#[test]
fn without_a_gpu_it_is_said_what_to_do() {
    if std::path::Path::new("/dev/nvidia0").exists() {
        return println!("SKIPPED: this machine has a GPU");
    }
    let model = tiny("llama.gguf");
    let run = |rest: &[&str], says: &[&str]| {
        refused(&[&["run", "--model", &model, "--max-tokens", "2"], rest].concat(), says)
    };
    run(&["--device", "cuda", "--kv", "exact", "hello"], &["--device cpu", "CUDA"]);
    run(&["--device", "cuda", "--kv", "q8_0", "hello"], &["--kv is q8_0", "exact, layered and packed"]);
    run(&["--device", "tpu", "hello"], &["cpu", "cuda", "auto"]);
    let output = mosaickv(&[
        "run",
        "--model",
        &model,
        "--device",
        "auto",
        "--kv",
        "exact",
        "--max-tokens",
        "2",
        "hello",
    ]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("computing on the CPU: "), "{said}");
    assert_eq!(said.matches("computing on the CPU").count(), 1, "{said}");
}
