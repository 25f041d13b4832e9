//! Which files of a Hugging Face repository are the model, and where do they lie once fetched?
//!
//! Names and choices are plain functions; only the last one talks to the hub, and only in a binary built with the
//! feature `hub`. Files go to the hub's own cache (HF_HOME, HF_HUB_CACHE), shared with its Python library.

use std::path::PathBuf;

use super::FetchError;

/// `owner/name`, and what was asked for after a colon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HubName {
    pub(super) owner: String,
    pub(super) name: String,
    pub(super) pick: Option<String>,
}

impl HubName {
    /// `owner/name[:pick]`; `None` for what can only be a path.
    pub(super) fn parse(text: &str) -> Option<HubName> {
        let (repo, pick) = match text.split_once(':') {
            Some((repo, pick)) => (repo, Some(pick)),
            None => (text, None),
        };
        let (owner, name) = repo.split_once('/')?;
        let plain = |word: &str| {
            word.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '_')
                && word.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter))
        };
        let file = name.ends_with(".gguf") || name.ends_with(".safetensors");
        if !plain(owner) || !plain(name) || file || pick.is_some_and(str::is_empty) {
            return None;
        }
        Some(HubName { owner: owner.into(), name: name.into(), pick: pick.map(Into::into) })
    }

    fn repo(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }
}

/// What to download.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg(any(test, feature = "hub"))]
pub(super) enum Choice {
    /// One GGUF file, by its path in the repository.
    Gguf(String),
    /// `config.json`, tokenizer and safetensors at the top of the repository.
    Safetensors,
}

/// The quantization taken when a repository has several and none was named, as in llama.cpp.
#[cfg(any(test, feature = "hub"))]
const USUAL: &str = "Q4_K_M";

/// Which of the repository's `files` is meant by `pick`: a file's path, a quantization such as `Q4_K_M`, or, with
/// nothing named, the safetensors, the only GGUF file, or the usual quantization.
#[cfg(any(test, feature = "hub"))]
pub(super) fn choose(name: &HubName, files: &[String]) -> Result<Choice, FetchError> {
    let refuse = |got: String, found: &[&String]| {
        let found = found.iter().map(|file| file.to_string()).collect();
        Err(FetchError::HubChoice { repo: name.repo(), got, found })
    };
    let ggufs: Vec<&String> = files.iter().filter(|file| file.ends_with(".gguf")).collect();
    let with = |quantization: &str| -> Vec<&String> {
        ggufs.iter().copied().filter(|file| names_quantization(file, quantization)).collect()
    };
    let (asked, fitting) = match &name.pick {
        Some(pick) if files.contains(pick) && pick.ends_with(".gguf") => {
            return Ok(Choice::Gguf(pick.clone()));
        }
        Some(pick) => (pick.as_str(), with(pick)),
        None => {
            let top = |end: &str| files.iter().any(|file| !file.contains('/') && file.ends_with(end));
            if top("config.json") && top(".safetensors") {
                return Ok(Choice::Safetensors);
            }
            if ggufs.is_empty() {
                return refuse("it holds nothing that can be loaded".into(), &[]);
            }
            (USUAL, if ggufs.len() == 1 { ggufs.clone() } else { with(USUAL) })
        }
    };
    match fitting.as_slice() {
        [file] if file.contains("-of-0") => refuse(format!("`{file}` is a part of a split model"), &ggufs),
        [file] => Ok(Choice::Gguf(file.to_string())),
        [] if name.pick.is_none() => refuse(format!("it holds {} GGUF files", ggufs.len()), &ggufs),
        [] => refuse(format!("nothing in it is called `{asked}`"), &ggufs),
        several => refuse(format!("{} files fit `{asked}`", several.len()), several),
    }
}

/// Whether `quantization` stands in the file's name as a word: Q4_K fits `x-Q4_K.gguf`, not `x-Q4_K_M.gguf`.
#[cfg(any(test, feature = "hub"))]
fn names_quantization(file: &str, quantization: &str) -> bool {
    let (file, wanted) = (file.to_ascii_lowercase(), quantization.to_ascii_lowercase());
    let part_of_word = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    file.match_indices(&wanted).any(|(at, _)| {
        !file[..at].ends_with(part_of_word) && !file[at + wanted.len()..].starts_with(part_of_word)
    })
}

/// Without the feature: the error that says how to get it.
#[cfg(not(feature = "hub"))]
pub(super) fn fetch(name: &HubName) -> Result<PathBuf, FetchError> {
    Err(FetchError::HubDisabled { repo: name.repo() })
}

/// Path of the model in the hub's cache, downloaded unless it is there.
#[cfg(feature = "hub")]
pub(super) fn fetch(name: &HubName) -> Result<PathBuf, FetchError> {
    online::fetch(name)
}

#[cfg(feature = "hub")]
mod online {
    use std::path::PathBuf;
    use std::sync::Mutex;

    use hf_hub::progress::{DownloadEvent, FileStatus, ProgressEvent, ProgressHandler};
    use hf_hub::repository::RepoTreeEntry;
    use hf_hub::{HFClientSync, HFError};

    use super::super::progress::Progress;
    use super::super::{FetchError, local};
    use super::{Choice, HubName, choose};

    /// Files of a safetensors model that the loader reads.
    const WANTED: [&str; 7] = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "*.safetensors",
    ];

    pub(super) fn fetch(name: &HubName) -> Result<PathBuf, FetchError> {
        let fail = |error: HFError| FetchError::Hub { repo: name.repo(), why: error.to_string() };
        let client = HFClientSync::new().map_err(fail)?;
        let repo = client.model(&name.owner, &name.name);
        let entries = repo.list_tree().recursive(true).send().map_err(fail)?;
        let path_of = |entry| match entry {
            RepoTreeEntry::File { path, .. } => Some(path),
            RepoTreeEntry::Directory { .. } => None,
        };
        let files: Vec<String> = entries.into_iter().filter_map(path_of).collect();
        let path = match choose(name, &files)? {
            Choice::Gguf(file) => repo.download_file().filename(file).progress(Bytes::default()).send(),
            Choice::Safetensors => {
                let wanted = WANTED.map(String::from).to_vec();
                let subfolders = vec!["*/**".to_owned()];
                let download = repo.snapshot_download().allow_patterns(wanted).ignore_patterns(subfolders);
                download.progress(Bytes::default()).send()
            }
        };
        local(&path.map_err(fail)?)
    }

    /// Adds up the bytes of the files under way.
    #[derive(Default)]
    struct Bytes(Mutex<State>);

    #[derive(Default)]
    struct State {
        shown: Option<Progress>,
        finished: u64,
        under_way: std::collections::HashMap<String, u64>,
    }

    impl ProgressHandler for Bytes {
        fn on_progress(&self, event: &ProgressEvent) {
            let ProgressEvent::Download(event) = event else { return };
            let mut state = self.0.lock().expect("a progress handler never panics");
            let done = match event {
                DownloadEvent::Start { total_bytes, .. } => {
                    state.shown = (*total_bytes > 0).then(|| Progress::start("downloading", *total_bytes));
                    0
                }
                DownloadEvent::Progress { files } => {
                    for file in files {
                        if file.status == FileStatus::Complete {
                            state.under_way.remove(&file.filename);
                            state.finished += file.total_bytes;
                        } else {
                            state.under_way.insert(file.filename.clone(), file.bytes_completed);
                        }
                    }
                    state.finished + state.under_way.values().sum::<u64>()
                }
                DownloadEvent::AggregateProgress { bytes_completed, .. } => *bytes_completed,
                _ => return,
            };
            if let Some(shown) = &mut state.shown {
                shown.reached(done);
            }
        }
    }
}
