//! `mosaickv serve` as an operator meets it: one line when it is ready, answers, an orderly end.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A tiny checkpoint of the model crate's tests.
fn tiny(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data").join(name)
}

struct Serving {
    child: Child,
    address: String,
}

impl Serving {
    fn start(flags: &[&str]) -> Serving {
        let cache = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_mosaickv"))
            .arg("serve")
            .arg(tiny("llama.gguf"))
            .args(["--port", "0", "--kv", "exact"])
            .args(flags)
            .env("MOSAICKV_CACHE", cache.path())
            .env("MOSAICKV_API_KEY", "from-the-environment")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.split("http://").nth(1).unwrap_or_else(|| panic!("{line:?}"));
        let address = address.split(' ').next().unwrap().to_owned();
        assert!(line.starts_with("serving ") && line.contains("kv exact"), "{line}");
        Serving { child, address }
    }

    fn ask(&self, head: &str, body: &str) -> String {
        self.try_ask(head, body).unwrap()
    }

    fn try_ask(&self, head: &str, body: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(&self.address)?;
        let key = "authorization: Bearer from-the-environment\r\nconnection: close";
        let head =
            format!("{head} HTTP/1.1\r\nhost: a\r\n{key}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(head.as_bytes())?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply)?;
        Ok(reply)
    }

    fn signal(&self, name: &str) {
        let killed = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(killed.success());
    }

    /// Waits for it to end well.
    fn ends(mut self) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(status.success(), "{status}");
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn it_serves_until_it_is_told_to_end() {
    let serving = Serving::start(&["-np", "3", "-c", "100", "--alias", "tiny,small", "--kv-memory", "10MB"]);
    assert!(serving.ask("GET /health", "").contains("{\"status\":\"ok\"}"));
    let models = serving.ask("GET /v1/models", "");
    assert!(models.contains("\"id\":\"tiny\"") && models.contains("\"id\":\"small\""), "{models}");
    assert!(models.contains("\"max_model_len\":100"), "{models}");
    assert!(serving.ask("GET /props", "").contains("\"total_slots\":3"));
    let answer = serving.ask(
        "POST /v1/completions",
        "{\"model\": \"small\", \"prompt\": \"Hi\", \"max_tokens\": 3, \"ignore_eos\": true}",
    );
    assert!(answer.contains("\"completion_tokens\":3") && answer.contains("\"model\":\"tiny\""), "{answer}");
    serving.signal("-TERM");
    serving.ends();
}

/// Flags out of a file: others that are typed, and those of the environment, go before them.
#[test]
fn a_file_has_the_flags() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("server.toml");
    std::fs::write(
        &file,
        "kv-memory = \"77MB\"\nmax_num_seqs = 3\nserved-model-name = [\"one\", \"two\"]\nport = 1\n\
                           api-key = \"not-this\"\nstrict-params = true\n",
    )
    .unwrap();
    let serving = Serving::start(&["--config", file.to_str().unwrap()]);
    let info = serving.ask("GET /server_info", "");
    assert!(
        info.contains("\"kv_memory_bytes\":77000000") && info.contains("\"max_running_requests\":3"),
        "{info}"
    );
    assert!(info.contains("[\"one\",\"two\"]"), "{info}");
    let refused = serving.ask("POST /v1/completions", "{\"prompt\":\"a\",\"nonsense\":1}");
    assert!(refused.contains(" 400 ") && refused.contains("nonsense"), "{refused}");
    for (text, words) in [
        ("kv-memori = \"1GB\"", "there is no kv-memori"),
        ("port = [1]", "of the type array"),
        ("open-metrics = 3", "wanted true or false"),
        ("port = \"many\"", "invalid value"),
        ("port = ", "the configuration"),
    ] {
        std::fs::write(&file, text).unwrap();
        let done = Command::new(env!("CARGO_BIN_EXE_mosaickv"))
            .args(["serve", "nothing", "--config"])
            .arg(&file)
            .output();
        let done = done.unwrap();
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(done.status.code() == Some(2) && said.contains(words), "{text}: {said}");
    }
}

#[test]
fn shells_can_complete_it() {
    let done = Command::new(env!("CARGO_BIN_EXE_mosaickv")).args(["completions", "bash"]).output().unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success() && said.contains("--kv-memory") && said.contains("complete"), "{said}");
}

/// Killed while it writes: what was saved before is there, and nothing that is not whole.
#[test]
fn a_server_that_is_killed_loses_no_context_that_was_saved() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let body = |i: usize| format!("{{\"name\":\"c{i}\",\"prompt\":\"{}\"}}", "river ".repeat(20 + i % 20));
    let mut saved = vec![];
    for round in 0..4 {
        let serving = Serving::start(&["--contexts", path]);
        for i in &saved {
            let asked = format!("{{\"prompt\":\" and\",\"max_tokens\":2,\"kv\":{{\"context\":\"c{i}\"}}}}");
            let reply = serving.ask("POST /v1/completions", &asked);
            assert!(reply.starts_with("HTTP/1.1 200"), "round {round}, c{i}: {reply}");
        }
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                let mut made = vec![];
                for i in round * 1000.. {
                    // The connection breaks off when the server is killed.
                    let Ok(reply) = serving.try_ask("POST /v1/kv/contexts", &body(i)) else { break };
                    if !reply.starts_with("HTTP/1.1 201") {
                        break;
                    }
                    made.push(i);
                    count.fetch_add(1, Ordering::Relaxed);
                }
                made
            });
            // Somewhere in the third or a later one.
            let start = Instant::now();
            while count.load(Ordering::Relaxed) < 2 && start.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(7 * round as u64));
            serving.signal("-KILL");
            saved.extend(writing.join().unwrap());
        });
    }
    assert!(saved.len() >= 8, "{saved:?}");
}

#[test]
fn ctrl_c_ends_it_too() {
    let serving = Serving::start(&[]);
    serving.signal("-INT");
    serving.ends();
}

#[test]
fn what_cannot_be_served_is_refused() {
    let refused = |flags: &[&str], says: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mosaickv"));
        let output = command.arg("serve").arg(tiny("llama.gguf")).args(flags).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{flags:?}: {error}");
        assert!(says.iter().all(|word| error.contains(word)), "{flags:?}: {error}");
    };
    refused(&["--max-num-seqs", "0"], &["--max-num-seqs", "at least 1"]);
    refused(&["-c", "0"], &["--max-model-len", "at least 1"]);
    refused(&["--kv", "zipped"], &["zipped", "exact, packed"]);
    refused(&["--kv-memory", "much"], &["much", "no unit"]);
    refused(&["--kv-floor", "24MB"], &["24MB", "ratio such as 16"]);
    refused(&["--kv-floor", "0.5"], &["0.5", "1 to 64"]);
    refused(&["--shadow", "7"], &["7", "0 to 1"]);
    refused(&["--host", "here"], &["here"]);
    refused(&["--alias", "a@kv=b"], &["a@kv=b"]);
    refused(&["--api-key-file", "/no/such/file"], &["/no/such/file"]);
    refused(&["--shutdown-timeout=-1"], &["--shutdown-timeout"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    refused(&["--port", &port, "--kv", "exact"], &[&port, "another --port"]);
}
