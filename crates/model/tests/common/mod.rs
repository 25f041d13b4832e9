//! What several test files share: the real model.

use std::path::PathBuf;
use std::sync::LazyLock;

use mosaickv_model::{Model, Text};

/// [`smollm2`], read once.
pub static SMOLLM2: LazyLock<Option<(Model, Text)>> = LazyLock::new(smollm2);

/// SmolLM2-135M-Instruct Q4_1: `MOSAICKV_TEST_MODEL`, or where `mosaickv demo` puts it. `None`, with a line that says
/// so, where it is absent.
pub fn smollm2() -> Option<(Model, Text)> {
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
}
