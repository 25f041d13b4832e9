//! Requests that are given up, and servers that are to end.

use crate::common::{Server, data, sample};
use mosaickv_engine::Settings;
use mosaickv_server::Options;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// One answer at a time, so that many take a while.
fn narrow() -> Settings {
    Settings { most_sequences: 1, most_waiting: 4096, ..Settings::default() }
}

/// Answers that take seconds together.
fn long(more: Value) -> Value {
    let mut body =
        json!({"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": true, "n": 128, "seed": 1});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[test]
fn a_client_that_goes_away_stops_its_answers() {
    let server = Server::large(Options::default(), narrow());
    for body in [long(json!({})), long(json!({"stream": true}))] {
        let mut connection = server.open("/v1/completions", &body);
        if body["stream"] == true {
            connection.until("data: ");
        }
        server.wait_for(|[running, waiting]| running > 0.0 && waiting > 20.0);
        let slots = server.get("/slots").json();
        assert!(slots.as_array().unwrap().len() > 10, "{slots}");
        assert_eq!((&slots[0]["is_processing"], &slots[0]["n_ctx"]), (&json!(true), &json!(2048)));
        let start = Instant::now();
        drop(connection);
        server.wait_for(|now| now == [0.0, 0.0]);
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        let metrics = server.get("/metrics").body;
        assert_eq!(sample(&metrics, "mosaickv_kv_bytes{model_name=\"model\",part=\"reserved\"}"), Some(0.0));
        let slots = server.get("/slots").json();
        assert_eq!(
            slots,
            json!([{
                "id": 0, "n_ctx": 2048, "is_processing": false, "id_task": null, "request_id": null, "n_prompt_tokens": 0,
                "n_decoded": 0, "kv_format": null,
            }])
        );
    }
}

#[test]
fn a_stop_text_frees_the_engine() {
    let server = Server::large(Options::default(), narrow());
    let body = json!({"prompt": "Hi", "max_tokens": 250, "ignore_eos": true, "temperature": 0});
    let whole = server.post("/v1/completions", &body).json();
    let text = whole["choices"][0]["text"].as_str().unwrap();
    let stop: String = text.chars().take(2).collect();
    let mut body = body;
    (body["stop"], body["n"]) = (json!(stop), json!(64));
    let stopped = server.post("/v1/completions", &body).json();
    let used = stopped["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(used < 64 * 20, "{used}");
    assert!(stopped["choices"].as_array().unwrap().iter().all(|choice| choice["finish_reason"] == "stop"));
    server.wait_for(|now| now == [0.0, 0.0]);
}

#[test]
fn a_drain_lets_answers_end_and_takes_no_new_ones() {
    let mut server = Server::large(Options::default(), narrow());
    let mut running = server.open("/v1/completions", &long(json!({"n": 24, "stream": true})));
    running.until("data: ");
    let mut whole = server.open("/v1/completions", &long(json!({"n": 4})));
    server.wait_for_requests(2);
    server.stop();
    let start = Instant::now();
    while server.get("/health").status == 200 {
        assert!(start.elapsed() < Duration::from_secs(2));
    }
    for reply in [
        server.get("/health"),
        server.post("/v1/completions", &json!({"prompt": "Hi"})),
        server.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "Hi"}]})),
    ] {
        reply.refused(503, "unavailable_error", None, Some("shutting_down"));
        assert_eq!(reply.header("retry-after"), "30");
    }
    let read = running.rest();
    assert!(read.contains("data: [DONE]\n\n") && !read.contains("\"error\""), "{read}");
    assert_eq!(read.matches("\"finish_reason\":\"length\"").count(), 24);
    assert_eq!(whole.rest().matches("\"finish_reason\":\"length\"").count(), 4);
    server.join();
    assert!(TcpStream::connect(server.address).is_err());
}

#[test]
fn what_does_not_end_in_time_gets_an_error() {
    let options = Options { shutdown_timeout: Duration::from_millis(300), ..Options::default() };
    let mut server = Server::large(options, narrow());
    let mut streaming = server.open("/v1/completions", &long(json!({"stream": true})));
    streaming.until("data: ");
    let mut whole = server.open("/v1/completions", &long(json!({})));
    server.wait_for_requests(2);
    server.stop();
    let read = streaming.rest();
    let error =
        read.lines().rfind(|line| line.starts_with("data: ")).unwrap().strip_prefix("data: ").unwrap();
    let error: Value = serde_json::from_str(error).unwrap_or_else(|e| panic!("{e}: {error}"));
    assert_eq!(error["error"]["code"], "shutting_down", "{read}");
    assert!(!read.contains("[DONE]"));
    let read = whole.rest();
    assert!(read.starts_with("HTTP/1.1 503") && read.contains("retry-after: 30"), "{read}");
    server.join();
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut server = Server::large(Options::default(), narrow());
    let mut streaming = server.open("/v1/completions", &long(json!({"stream": true})));
    streaming.until("data: ");
    let start = Instant::now();
    server.stop();
    server.stop();
    server.join();
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert!(!streaming.rest().contains("[DONE]"));
}

#[test]
fn an_answer_that_takes_too_long_is_given_up() {
    let options = Options { request_timeout: Some(Duration::from_millis(200)), ..Options::default() };
    let server = Server::large(options, narrow());
    let late = server.post("/v1/completions", &long(json!({})));
    let message = late.refused(408, "timeout_error", None, Some("request_timeout"));
    assert!(message.contains("0.2 s"), "{message}");
    assert_eq!(late.header("x-should-retry"), "false");
    let late = server.post("/v1/completions", &long(json!({"stream": true})));
    let events = data(&late.body);
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!((late.status, &last["error"]["code"]), (200, &json!("request_timeout")));
    server.wait_for(|now| now == [0.0, 0.0]);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "Hi", "max_tokens": 1})).status, 200);
}

#[test]
fn a_stream_with_nothing_to_say_stays_alive() {
    let options = Options { keep_alive: Duration::from_millis(50), ..Options::default() };
    let server = Server::large(options, narrow());
    let _busy = server.open("/v1/completions", &long(json!({})));
    server.wait_for(|[_, waiting]| waiting > 10.0);
    let mut waiting = server.open("/v1/completions", &long(json!({"n": 1, "stream": true})));
    let read = waiting.until(":\n\n").to_owned();
    assert!(read.starts_with("HTTP/1.1 200") && !read.contains("data: "), "{read}");
}

#[test]
fn headers_and_bodies_that_do_not_come() {
    let options = Options { read_timeout: Duration::from_millis(300), ..Options::default() };
    let server = Server::start(options, Settings::default());
    for sent in [
        "",
        "POST /v1/completions HTTP/1.1\r\nhost:",
        "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{",
    ] {
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(sent.as_bytes()).unwrap();
        let start = Instant::now();
        let mut read = String::new();
        stream.read_to_string(&mut read).unwrap();
        assert!(start.elapsed() < Duration::from_secs(10), "{sent:?}");
        assert!(!read.contains("HTTP/1.1 200"), "{read}");
    }
    assert_eq!(server.get("/health").status, 200);
}
