//! What cannot be had is refused in one shape, with a status and headers that say whether to ask again.

use crate::common::Server;
use mosaickv_engine::Settings;
use mosaickv_server::{Metrics, Options, UnknownFields};
use serde_json::{Value, json};

const INVALID: &str = "invalid_request_error";

fn chat(more: Value) -> Value {
    with(json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "ignore_eos": true}), more)
}

fn text(more: Value) -> Value {
    with(json!({"prompt": "Hi", "max_tokens": 4, "ignore_eos": true}), more)
}

fn with(mut body: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[test]
fn fields_out_of_range_are_named() {
    let server = Server::plain();
    let cases = [
        ("temperature", json!({"temperature": 2.5}), "2.5"),
        ("temperature", json!({"temperature": "hot"}), "hot"),
        ("top_p", json!({"top_p": 1.5}), "1.5"),
        ("top_k", json!({"top_k": -2}), "-2"),
        ("min_p", json!({"min_p": -0.1}), "-0.1"),
        ("repetition_penalty", json!({"repetition_penalty": 0}), "more than 0"),
        ("presence_penalty", json!({"presence_penalty": 3}), "3"),
        ("frequency_penalty", json!({"frequency_penalty": -3}), "-3"),
        ("logit_bias.999", json!({"logit_bias": {"999": 1}}), "288"),
        ("logit_bias.x", json!({"logit_bias": {"x": 1}}), "x"),
        ("logit_bias.1", json!({"logit_bias": {"1": 101}}), "101"),
        ("n", json!({"n": 0}), "1 to 128"),
        ("n", json!({"n": -1}), "-1"),
        ("stop", json!({"stop": ["a", "b", "c", "d", "e"]}), "at most 4"),
        ("stop", json!({"stop": ""}), "1 to"),
        ("stop", json!({"stop": 7}), "a string or a list of strings"),
        ("stop_token_ids", json!({"stop_token_ids": [288]}), "288"),
        ("min_tokens", json!({"min_tokens": 5}), "max_tokens only 4"),
        ("truncate_prompt_tokens", json!({"truncate_prompt_tokens": 0}), "0"),
        ("stream_options", json!({"stream_options": {"include_usage": true}}), "stream: true"),
        (
            "stream_options.include_usage",
            json!({"stream": true, "stream_options": {"include_usage": 3}}),
            "3",
        ),
        ("kv.format", json!({"kv": {"format": "zipped"}}), "exact, packed"),
        ("kv.format", json!({"kv": {"format": "layered"}}), "calibrat"),
        ("kv.ratio", json!({"kv": {"ratio": 100}}), "1 to 64"),
        ("kv.budget_bytes", json!({"kv": {"ratio": 2, "budget_bytes": 10}}), "two budgets"),
    ];
    for (param, fields, says) in cases {
        for (path, body) in
            [("/v1/chat/completions", chat(fields.clone())), ("/v1/completions", text(fields.clone()))]
        {
            let reply = server.post(path, &body);
            let message = reply.refused(400, INVALID, Some(param), None);
            assert!(message.contains(says), "{param}: {message}");
            assert_eq!(reply.header("x-should-retry"), "false");
        }
    }
}

#[test]
fn fields_of_one_kind_are_checked_too() {
    let server = Server::plain();
    let part = |part: Value| json!({"messages": [{"role": "user", "content": [part]}]});
    let cases = [
        ("messages", json!({"messages": []})),
        ("messages", json!({"messages": null})),
        ("max_tokens", json!({"max_tokens": 0})),
        ("max_completion_tokens", json!({"max_completion_tokens": 0})),
        ("top_logprobs", json!({"top_logprobs": 3})),
        ("top_logprobs", json!({"logprobs": true, "top_logprobs": 21})),
        ("logprobs", json!({"logprobs": 3})),
        ("continue_final_message", json!({"continue_final_message": true, "add_generation_prompt": true})),
    ];
    for (param, fields) in cases {
        server.post("/v1/chat/completions", &chat(fields)).refused(400, INVALID, Some(param), None);
    }
    let image = part(json!({"type": "image_url", "image_url": {"url": "http://x"}}));
    let reply = server.post("/v1/chat/completions", &image);
    let message = reply.json()["error"]["param"].as_str().unwrap().to_owned();
    assert!(message.starts_with("messages[0].content"), "{message}");
    let cases = [
        ("prompt", json!({"prompt": null})),
        ("prompt", json!({"prompt": []})),
        ("prompt", json!({"prompt": [[]]})),
        ("prompt", json!({"prompt": {"text": "a"}})),
        ("prompt", json!({"prompt": [1, 288]})),
        ("logprobs", json!({"logprobs": 21})),
        ("max_tokens", json!({"max_tokens": 0})),
        ("score_from", json!({"score_from": 0})),
        ("score_from", json!({"score_from": 50})),
    ];
    for (param, fields) in cases {
        server.post("/v1/completions", &text(fields)).refused(400, INVALID, Some(param), None);
    }
}

#[test]
fn a_prompt_over_the_context_is_refused_with_both_counts() {
    let server = Server::plain();
    let ids: Vec<u32> = (0..300).map(|id| id % 200 + 5).collect();
    let reply = server.post("/v1/completions", &json!({"prompt": ids, "max_tokens": 10}));
    let message = reply.refused(400, "exceed_context_size_error", None, Some("context_length_exceeded"));
    assert!(message.contains("maximum context length is 256 tokens"), "{message}");
    assert!(message.contains("310") && message.contains("300"), "{message}");
    assert_eq!(reply.header("x-should-retry"), "false");
    // The last tokens of it fit, if that is what is asked for.
    let body = json!({"prompt": ids, "max_tokens": 10, "truncate_prompt_tokens": 40, "temperature": 0});
    let cut = server.post("/v1/completions", &body).json();
    assert_eq!(cut["usage"]["prompt_tokens"], 40);
    let body = json!({"prompt": ids[260..], "max_tokens": 10, "temperature": 0});
    assert_eq!(server.post("/v1/completions", &body).json()["choices"][0]["text"], cut["choices"][0]["text"]);
}

#[test]
fn the_operator_s_context_counts() {
    let options = Options { most_tokens: Some(32), ..Options::default() };
    let server = Server::start(options, Settings::default());
    let reply = server.post("/v1/completions", &text(json!({"max_tokens": 40})));
    let message = reply.refused(400, "exceed_context_size_error", None, Some("context_length_exceeded"));
    assert!(message.contains("maximum context length is 32 tokens"), "{message}");
    assert_eq!(server.get("/v1/models").json()["data"][0]["max_model_len"], 32);
}

#[test]
fn what_is_not_there_is_not_found() {
    let server = Server::plain();
    let unknown = |path, body: Value| {
        server.post(path, &body).refused(404, INVALID, Some("model"), Some("model_not_found"))
    };
    assert!(unknown("/v1/chat/completions", chat(json!({"model": "gpt-5"}))).contains("gpt-5"));
    unknown("/v1/completions", text(json!({"model": "gpt-5@kv=exact"})));
    server.get("/v1/models/gpt-5").refused(404, INVALID, Some("model"), Some("model_not_found"));
    server.get("/v1/models/openai/gpt-5").refused(404, INVALID, Some("model"), Some("model_not_found"));
    server.get("/nowhere").refused(404, INVALID, None, Some("not_found"));
    server.get("/v1/completions").refused(405, INVALID, None, Some("method_not_allowed"));
    for path in ["/v1/embeddings", "/v1/responses/x", "/v1/audio/speech"] {
        let reply = server.post(path, &json!({}));
        let message = reply.refused(501, "unsupported_error", None, Some("unsupported"));
        assert!(message.contains("not supported"), "{message}");
        assert_eq!(reply.header("x-should-retry"), "false");
    }
}

#[test]
fn bodies_that_are_no_json_objects() {
    let server = Server::plain();
    for body in ["", "{", "[1]", "{\"prompt\": \"a\" \"b\"}", "\u{1}"] {
        let reply = server.ask("POST", "/v1/completions", &[], Some(body));
        let message = reply.refused(400, INVALID, None, Some("invalid_json"));
        assert!(message.contains("JSON"), "{message}");
    }
    let deep = format!("{{\"prompt\": {}1{}}}", "[".repeat(9999), "]".repeat(9999));
    server.ask("POST", "/v1/completions", &[], Some(&deep)).refused(400, INVALID, None, Some("invalid_json"));
}

#[test]
fn a_body_over_the_limit() {
    let options = Options { body_limit: 1000, ..Options::default() };
    let server = Server::start(options, Settings::default());
    let reply = server.post("/v1/completions", &text(json!({"user": "u".repeat(2000)})));
    let message = reply.refused(413, INVALID, None, Some("request_too_large"));
    assert!(message.contains("1000 bytes"), "{message}");
    assert_eq!(server.post("/v1/completions", &text(json!({"user": "u".repeat(500)}))).status, 200);
}

#[test]
fn bytes_that_a_prompt_does_not_fit_in() {
    let settings = Settings { kv_memory: 1000, ..Settings::default() };
    let server = Server::start(Options::default(), settings);
    let reply = server.post("/v1/completions", &text(json!({})));
    let message = reply.refused(400, INVALID, Some("kv"), Some("kv_budget_unsatisfiable"));
    let least = reply.json()["error"]["min_bytes"].as_u64().unwrap();
    assert!(least > 1000 && message.contains(&least.to_string()), "{message}");
}

#[test]
fn a_full_queue() {
    let settings = Settings { most_waiting: 2, most_sequences: 1, ..Settings::default() };
    let server = Server::large(Options::default(), settings);
    let reply = server.post("/v1/completions", &text(json!({"n": 3})));
    assert!(reply.refused(400, INVALID, Some("n"), None).contains("at most 2 answers"));
    let long = json!({"prompt": "Hi", "max_tokens": 2000, "ignore_eos": true, "temperature": 0});
    let connections: Vec<_> = (0..8).map(|_| server.open("/v1/completions", &long)).collect();
    let replies: Vec<String> = connections.into_iter().map(|mut c| c.until("\r\n\r\n").to_owned()).collect();
    let refused: Vec<&String> = replies.iter().filter(|reply| reply.starts_with("HTTP/1.1 429")).collect();
    assert!(!refused.is_empty() && refused.len() < replies.len(), "{replies:?}");
    for reply in refused {
        assert!(reply.contains("retry-after: 1\r\n") && !reply.contains("x-should-retry"), "{reply}");
    }
}

#[test]
fn keys() {
    let options = Options { api_keys: vec!["one".into(), "two".into()], ..Options::default() };
    let server = Server::start(options.clone(), Settings::default());
    for headers in [
        &[][..],
        &[("authorization", "Bearer three")],
        &[("authorization", "one")],
        &[("authorization", "Bearer ")],
    ] {
        for (method, path) in
            [("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/nowhere")]
        {
            let reply = server.ask(method, path, headers, (method == "POST").then_some("{}"));
            reply.refused(401, "authentication_error", None, Some("invalid_api_key"));
            assert_eq!(
                (reply.header("www-authenticate"), reply.header("x-should-retry")),
                ("Bearer", "false")
            );
        }
    }
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));
    for header in [("authorization", "Bearer one"), ("authorization", "bearer two"), ("x-api-key", "two")] {
        let reply = server.ask(
            "POST",
            "/v1/completions",
            &[header],
            Some("{\"prompt\": \"Hi\", \"max_tokens\": 2, \"ignore_eos\": true}"),
        );
        assert_eq!(reply.json()["usage"]["completion_tokens"], 2, "{}", reply.body);
    }
    let open = Server::start(Options { metrics: Metrics::Open, ..options }, Settings::default());
    assert!(open.get("/metrics").body.contains("vllm:num_requests_running"));
    assert_eq!(open.get("/slots").status, 401);
}

#[test]
fn unknown_fields() {
    let server = Server::plain();
    let more =
        json!({"colour": "red", "kv": {"shape": 1}, "user": "me", "cache_salt": "s", "best_of": 2, "é": 1});
    for (path, body) in [("/v1/chat/completions", chat(more.clone())), ("/v1/completions", text(more))] {
        let reply = server.post(path, &body);
        assert_eq!(reply.header("x-ignored-params"), "best_of, colour, kv.shape, \\u{e9}", "{}", reply.body);
        assert_eq!(reply.json()["usage"]["completion_tokens"], 4);
    }
    // Each kind of completion knows its own fields only.
    let reply = server.post("/v1/completions", &text(json!({"messages": []})));
    assert_eq!(reply.header("x-ignored-params"), "messages");
    assert_eq!(server.post("/v1/completions", &text(json!({"echo": true}))).header("x-ignored-params"), "");

    let options = Options { unknown_fields: UnknownFields::Refused, ..Options::default() };
    let strict = Server::start(options, Settings::default());
    let reply = strict.post("/v1/completions", &text(json!({"colour": "red"})));
    assert!(reply.refused(400, INVALID, Some("colour"), Some("unknown_parameter")).contains("colour"));
    assert_eq!(strict.post("/v1/completions", &text(json!({"user": "me"}))).status, 200);
}

#[test]
fn a_model_that_loads() {
    let server = Server::without_model(Options::default());
    let asked = [
        server.get("/health"),
        server.get("/v1/models"),
        server.post("/v1/completions", &text(json!({}))),
        server.post("/v1/chat/completions", &chat(json!({}))),
        server.post("/tokenize", &json!({"prompt": "Hi"})),
    ];
    for reply in asked {
        let message = reply.refused(503, "unavailable_error", None, Some("loading"));
        assert!(message.contains("loading"), "{message}");
        assert_eq!((reply.header("retry-after"), reply.header("x-should-retry")), ("1", ""));
    }
    assert_eq!(server.get("/version").json()["version"], env!("CARGO_PKG_VERSION"));
    assert!(server.get("/metrics").body.contains("vllm:num_requests_waiting{model_name=\"model\"} 0"));
    let (model, text) = crate::common::tiny();
    server.app.load((std::sync::Arc::new(model), "tiny".to_owned()), text, 1, Settings::default());
    assert_eq!(server.get("/health").json(), json!({"status": "ok"}));
}
