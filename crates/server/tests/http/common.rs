//! A server of a tiny random model on a socket of its own, and a client.

use mosaickv_engine::Settings;
use mosaickv_model::{Model, Text};
use mosaickv_server::{App, Options, serve};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// The tiny Llama of the model crate: 288 tokens, a context of 256, a chat template.
pub fn tiny() -> (Model, Text) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/data/llama.gguf");
    Model::load(&path, &mut |_, _| ()).unwrap()
}

/// A running server, which ends when this is dropped.
pub struct Server {
    pub app: App,
    pub address: SocketAddr,
    stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

/// An answer, whatever its status.
pub struct Reply {
    pub status: u16,
    pub headers: ureq::http::HeaderMap,
    pub body: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The error, which must have this status, type, param and code.
    pub fn refused(&self, status: u16, kind: &str, param: Option<&str>, code: Option<&str>) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        let body = self.json();
        let error = &body["error"];
        let expected = json!({"type": kind, "param": param, "code": code});
        for key in ["type", "param", "code"] {
            assert_eq!(error[key], expected[key], "{body}");
            assert!(error.as_object().unwrap().contains_key(key), "{body}");
        }
        error["message"].as_str().unwrap().to_owned()
    }

    /// The events of a stream that ended well, without `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!((self.status, self.header("content-type")), (200, "text/event-stream"), "{}", self.body);
        let mut events = data(&self.body);
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.body);
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// What events say, comments left out. Each is one line and an empty one.
pub fn data(body: &str) -> Vec<String> {
    assert!(body.ends_with("\n\n"), "{body:?}");
    let events = body.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
    events
        .map(|event| event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?}")).to_owned())
        .collect()
}

impl Server {
    pub fn start(options: Options, settings: Settings) -> Server {
        let server = Server::without_model(options);
        let (model, text) = tiny();
        server.app.load((Arc::new(model), "tiny".to_owned()), text, 1, settings);
        server
    }

    /// One whose model takes 2,048 tokens, without sense, and so can be kept at work.
    pub fn large(options: Options, settings: Settings) -> Server {
        Server::of_context(2048, options, settings)
    }

    /// One whose model takes so many tokens.
    pub fn of_context(tokens: usize, options: Options, settings: Settings) -> Server {
        let server = Server::without_model(options);
        let (mut model, text) = tiny();
        model.config.context = tokens;
        server.app.load((Arc::new(model), "tiny".to_owned()), text, 1, settings);
        server
    }

    pub fn plain() -> Server {
        Server::start(Options::default(), Settings::default())
    }

    /// One that is still loading.
    pub fn without_model(options: Options) -> Server {
        let app = App::new(options);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stops) = mpsc::channel(2);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let served = app.clone();
        let thread = std::thread::spawn(move || {
            let done = runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                serve(listener, served, stops).await
            });
            runtime.shutdown_background();
            done.unwrap();
        });
        Server { app, address, stop, thread: Some(thread) }
    }

    pub fn stop(&self) {
        // A server that has ended hears nothing.
        let _ = self.stop.blocking_send(());
    }

    /// Waits for the server to end.
    pub fn join(&mut self) {
        self.thread.take().unwrap().join().unwrap();
    }

    pub fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, &[], None)
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.ask("POST", path, &[], Some(&body.to_string()))
    }

    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Option<&str>) -> Reply {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build()
            .into();
        let mut request =
            ureq::http::Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let sent = match body {
            Some(body) => agent.run(request.body(body.to_owned()).unwrap()),
            None => agent.run(request.body(()).unwrap()),
        };
        let mut response = sent.unwrap();
        let body = response.body_mut().read_to_string().unwrap();
        Reply { status: response.status().as_u16(), headers: response.headers().clone(), body }
    }

    /// A request whose answer is read by hand.
    pub fn open(&self, path: &str, body: &Value) -> Connection {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = body.to_string();
        let head = format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).unwrap();
        Connection { stream, read: String::new() }
    }

    /// Running and waiting requests, as /metrics has them.
    pub fn at_work(&self) -> [f64; 2] {
        let metrics = self.get("/metrics").body;
        ["vllm:num_requests_running", "vllm:num_requests_waiting"].map(|name| sample(&metrics, name).unwrap())
    }

    /// Waits until answers to so many requests run or wait.
    pub fn wait_for_requests(&self, count: usize) {
        let start = Instant::now();
        loop {
            let slots = self.get("/slots").json();
            let ids = slots.as_array().unwrap().iter().filter_map(|slot| slot["request_id"].as_str());
            let ids: HashSet<&str> = ids.collect();
            if ids.len() == count {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{slots}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the metrics say that so much runs and waits.
    pub fn wait_for(&self, is_so: impl Fn([f64; 2]) -> bool) -> [f64; 2] {
        let start = Instant::now();
        loop {
            let now = self.at_work();
            if is_so(now) {
                return now;
            }
            assert!(start.elapsed() < PATIENCE, "still {now:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stop();
            self.stop();
            let joined = thread.join();
            assert!(joined.is_ok() || std::thread::panicking(), "the server panicked");
        }
    }
}

/// A connection with an answer on it.
pub struct Connection {
    stream: TcpStream,
    pub read: String,
}

impl Connection {
    /// Reads until `word` is there.
    pub fn until(&mut self, word: &str) -> &str {
        let mut buffer = [0; 4096];
        while !self.read.contains(word) {
            let bytes = self.stream.read(&mut buffer).unwrap();
            assert!(bytes > 0, "it ended without {word:?}: {}", self.read);
            self.read += std::str::from_utf8(&buffer[..bytes]).unwrap();
        }
        &self.read
    }

    /// Reads until the other side closes, or the answer is over.
    pub fn rest(&mut self) -> &str {
        let mut buffer = [0; 4096];
        while !self.read.ends_with("\r\n0\r\n\r\n") {
            match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(bytes) => self.read += &String::from_utf8_lossy(&buffer[..bytes]),
                Err(error) => panic!("{error}: {}", self.read),
            }
        }
        &self.read
    }
}

/// The first sample of a metric whose name and labels begin so.
pub fn sample(metrics: &str, begin: &str) -> Option<f64> {
    let line = metrics.lines().find(|line| line.starts_with(begin))?;
    line.rsplit(' ').next()?.parse().ok()
}
