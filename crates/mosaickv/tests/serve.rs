//! `mosaickv serve` as an operator meets it: one line when it is ready, answers, an orderly end.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
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
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let key = "authorization: Bearer from-the-environment\r\nconnection: close";
        let head =
            format!("{head} HTTP/1.1\r\nhost: a\r\n{key}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        reply
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
    refused(&["--host", "here"], &["here"]);
    refused(&["--alias", "a@kv=b"], &["a@kv=b"]);
    refused(&["--api-key-file", "/no/such/file"], &["/no/such/file"]);
    refused(&["--shutdown-timeout=-1"], &["--shutdown-timeout"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    refused(&["--port", &port, "--kv", "exact"], &[&port, "another --port"]);
}
