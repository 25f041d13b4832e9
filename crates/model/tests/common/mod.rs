//! What several test files share: where the test data and the real model are.
#![expect(dead_code, reason = "no test file uses all of it")]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use mosaickv_model::{Model, Text};
use serde_json::Value;

/// SmolLM2-135M-Instruct Q4_1: `MOSAICKV_TEST_MODEL`, or where `mosaickv demo` puts it. `None`, with a line that says
/// so, where it is absent.
pub static SMOLLM2: LazyLock<Option<(Model, Text)>> = LazyLock::new(|| {
    let path = match std::env::var_os("MOSAICKV_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => PathBuf::from(std::env::var_os("HOME")?)
            .join(".cache/mosaickv/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    if !path.exists() {
        eprintln!(
            "skipped: no model at {} (run `mosaickv demo`, or set MOSAICKV_TEST_MODEL)",
            path.display()
        );
        return None;
    }
    Some(Model::load(&path, &mut |_, _| ()).unwrap())
});

/// A file of `tests/data`.
pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// A JSON file of `tests/data`.
pub fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(data(name)).unwrap()).unwrap()
}

/// A JSON list of token ids.
pub fn ids(list: &Value) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}
