//! What a server tells of itself and of tokens.

use crate::common::{Server, sample, tiny};
use mosaickv_engine::Settings;
use mosaickv_model::Specials;
use mosaickv_server::Options;
use serde_json::{Value, json};
use std::num::NonZeroU64;

#[test]
fn models_under_all_of_their_names() {
    let options = Options { names: vec!["one".into(), "org/two".into()], ..Options::default() };
    let server = Server::start(options, Settings::default());
    let list = server.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    let ids: Vec<&Value> = list["data"].as_array().unwrap().iter().map(|card| &card["id"]).collect();
    assert_eq!(ids, ["one", "org/two"]);
    for (path, id) in [("one", "one"), ("org/two", "org/two"), ("one@kv=packed", "one@kv=packed")] {
        let card = server.get(&format!("/v1/models/{path}")).json();
        assert_eq!(
            (&card["id"], &card["root"], &card["max_model_len"]),
            (&json!(id), &json!("one"), &json!(256))
        );
        assert_eq!((&card["object"], &card["owned_by"]), (&json!("model"), &json!("mosaickv")));
    }
    let bad = server.get("/v1/models/one@kv=zip");
    assert!(bad.refused(400, "invalid_request_error", Some("id"), None).contains("zip"));
    for name in ["one", "org/two", "org/two@kv=exact"] {
        let reply =
            server.post("/v1/completions", &json!({"model": name, "prompt": "Hi", "max_tokens": 1})).json();
        assert_eq!(reply["model"], "one", "{reply}");
    }
}

#[test]
fn tokens_in_both_dialects() {
    let server = Server::plain();
    let (_, text) = tiny();
    let added = text.encode("The river, é", Specials::Added).unwrap();
    let bare = text.encode("The river, é", Specials::Literal).unwrap();
    let ask = |body: Value| server.post("/tokenize", &body).json();
    let expected = json!({"count": added.len(), "max_model_len": 256, "tokens": added});
    assert_eq!(ask(json!({"prompt": "The river, é"})), expected);
    let names =
        ask(json!({"prompt": "The river, é", "add_special_tokens": false, "return_token_strs": true}));
    assert_eq!((&names["tokens"], &names["count"]), (&json!(bare), &json!(bare.len())));
    assert_eq!(names["token_strs"].as_array().unwrap().len(), bare.len());
    assert_eq!(ask(json!({"content": "The river, é"})), json!({"tokens": bare}));
    assert_eq!(ask(json!({"content": "The river, é", "add_special": true})), json!({"tokens": added}));
    let end = text.token("<|im_end|>").unwrap();
    assert_eq!(ask(json!({"content": "<|im_end|>"}))["tokens"], json!([end]));
    assert!(
        ask(json!({"content": "<|im_end|>", "parse_special": false}))["tokens"].as_array().unwrap().len() > 1
    );
    let pieces = ask(json!({"content": "The river, é", "with_pieces": true}));
    let mut bytes: Vec<u8> = vec![];
    for piece in pieces["tokens"].as_array().unwrap() {
        match &piece["piece"] {
            Value::String(text) => bytes.extend(text.as_bytes()),
            list => bytes.extend(list.as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8)),
        }
    }
    assert_eq!(String::from_utf8(bytes).unwrap(), "The river, é");
    let back = server.post("/detokenize", &json!({"tokens": bare})).json();
    assert_eq!(back, json!({"prompt": "The river, é", "content": "The river, é"}));
    server.post("/detokenize", &json!({"tokens": [288]})).refused(
        400,
        "invalid_request_error",
        Some("tokens"),
        None,
    );
    server.post("/detokenize", &json!({"tokens": ["a"]})).refused(
        400,
        "invalid_request_error",
        Some("tokens[0]"),
        None,
    );
    server.post("/detokenize", &json!({})).refused(400, "invalid_request_error", Some("tokens"), None);
    let none = server.post("/tokenize", &json!({"model": "model"}));
    none.refused(400, "invalid_request_error", Some("prompt"), None);
}

#[test]
fn what_a_tokenizer_knows() {
    let server = Server::plain();
    let info = server.get("/tokenizer_info").json();
    for name in ["bos_token", "eos_token", "pad_token"] {
        assert!(info[name].is_string() || info[name].is_null(), "{info}");
    }
    assert!(info["eos_token"].as_str().is_some_and(|token| !token.is_empty()), "{info}");
    assert!(info["chat_template"].as_str().unwrap().contains("messages"), "{info}");
    assert_eq!(info["model_max_length"], 256);
}

#[test]
fn metrics_count_what_was_answered() {
    let server = Server::plain();
    let body = json!({"prompt": "Hi", "max_tokens": 5, "ignore_eos": true, "n": 2});
    let answer = server.post("/v1/completions", &body).json();
    let prompt = answer["usage"]["prompt_tokens"].as_f64().unwrap();
    let reply = server.get("/metrics");
    assert!(reply.header("content-type").starts_with("text/plain; version=0.0.4"), "{:?}", reply.headers);
    let metrics = &reply.body;
    let label = "{model_name=\"model\"}";
    let is = |name: &str, expected: f64| {
        assert_eq!(sample(metrics, &format!("{name} ")), Some(expected), "{name}: {metrics}");
    };
    is(&format!("vllm:num_requests_running{label}"), 0.0);
    is(&format!("vllm:num_requests_waiting{label}"), 0.0);
    is(&format!("vllm:kv_cache_usage_perc{label}"), 0.0);
    is(&format!("vllm:prompt_tokens_total{label}"), 2.0 * prompt);
    is(&format!("vllm:generation_tokens_total{label}"), 10.0);
    is(&format!("vllm:num_preemptions_total{label}"), 0.0);
    is(&format!("vllm:prefix_cache_queries_total{label}"), 2.0 * prompt);
    is(&format!("vllm:prefix_cache_hits_total{label}"), 0.0);
    is("vllm:request_success_total{model_name=\"model\",finished_reason=\"length\"}", 2.0);
    is("vllm:request_success_total{model_name=\"model\",finished_reason=\"stop\"}", 0.0);
    for (name, count) in [
        ("vllm:time_to_first_token_seconds", 2.0),
        ("vllm:inter_token_latency_seconds", 8.0),
        ("vllm:e2e_request_latency_seconds", 2.0),
        ("vllm:request_queue_time_seconds", 2.0),
        ("vllm:request_prefill_time_seconds", 2.0),
        ("vllm:request_decode_time_seconds", 2.0),
    ] {
        is(&format!("{name}_count{label}"), count);
        is(&format!("{name}_bucket{{model_name=\"model\",le=\"+Inf\"}}"), count);
        assert!(metrics.contains(&format!("# TYPE {name} histogram")), "{metrics}");
    }
    is("mosaickv_kv_bytes{model_name=\"model\",part=\"budget\"}", (4u64 << 30) as f64);
    assert!(sample(metrics, "mosaickv_kv_bytes_read_total").unwrap() > 0.0);
    is(&format!("mosaickv_kv_bytes_exact_equivalent{label}"), 0.0);
}

/// Bytes of each format, and what answers from compressed caches have of their exact caches' distributions.
#[test]
fn metrics_tell_formats_apart() {
    let settings = Settings { shadow_every: NonZeroU64::new(1), ..Settings::default() };
    let server = Server::large(Options::default(), settings);
    let prompt: Vec<usize> = (0..400).map(|i| 40 + i * 7 % 200).collect();
    for format in ["exact", "packed"] {
        let body = json!({"prompt": prompt, "max_tokens": 12, "ignore_eos": true, "kv": {"format": format}});
        let answer = server.post("/v1/completions", &body).json();
        assert_eq!(answer["kv"]["compressed_harder"], false, "{answer}");
    }
    let metrics = server.get("/metrics").body;
    let bytes = |format: &str| {
        let labels = format!("model_name=\"model\",part=\"allocated\",format=\"{format}\"");
        sample(&metrics, &format!("mosaickv_kv_bytes{{{labels}}}")).unwrap()
    };
    assert!(bytes("packed") > 1000.0 && bytes("exact") > bytes("packed") && bytes("layered") == 0.0);
    let segments = metrics.lines().filter(|line| line.starts_with("mosaickv_kv_segments_total{"));
    let segments: Vec<&str> = segments.collect();
    let is_packed = |line: &&str| line.contains("strategy=\"packed: ") && !line.ends_with(" 0");
    assert!(!segments.is_empty() && segments.iter().all(is_packed), "{segments:?}");
    let of = |what: &str, format: &str| {
        sample(&metrics, &format!("mosaickv_shadow_{what}{{model_name=\"model\",format=\"{format}\"}}"))
    };
    assert_eq!((of("steps_total", "packed"), of("steps_total", "exact")), (Some(11.0), None), "{metrics}");
    let (kl, agreed) = (of("kl_sum", "packed").unwrap(), of("agreed_total", "packed").unwrap());
    assert!(kl > 0.0 && kl.is_finite() && (0.0..=11.0).contains(&agreed), "{kl}, {agreed}");
}

/// Every metric that the dashboard asks for is one that there is.
#[test]
fn the_dashboard_asks_for_what_there_is() {
    let settings = Settings { shadow_every: NonZeroU64::new(1), ..Settings::default() };
    let server = Server::large(Options::default(), settings);
    let prompt: Vec<usize> = (0..400).map(|i| 40 + i * 7 % 200).collect();
    let body = json!({"prompt": prompt, "max_tokens": 5, "ignore_eos": true, "kv": {"format": "packed"}});
    assert_eq!(server.post("/v1/completions", &body).status, 200);
    let metrics = server.get("/metrics").body;
    let has = |name: &str| metrics.lines().any(|line| line.split(['{', ' ']).next() == Some(name));
    let dashboard: Value = serde_json::from_str(include_str!("../../../../docs/grafana.json")).unwrap();
    let mut asked = 0;
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            let expression = target["expr"].as_str().unwrap();
            let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
            let words = expression.split(|c| !is_part(c));
            for name in words.filter(|word| word.starts_with("vllm:") || word.starts_with("mosaickv_")) {
                assert!(has(name), "{name} in {}: {metrics}", panel["title"]);
                asked += 1;
            }
        }
    }
    assert!(asked > 15, "only {asked} metrics");
}

#[test]
fn ids_of_requests_come_back() {
    let server = Server::plain();
    let sent = server.ask("GET", "/version", &[("x-request-id", "mine-7")], None);
    assert_eq!(sent.header("x-request-id"), "mine-7");
    let (one, two) = (server.get("/version"), server.get("/nowhere"));
    assert_eq!((one.header("x-request-id").len(), two.header("x-request-id").len()), (36, 36));
    assert_ne!(one.header("x-request-id"), two.header("x-request-id"));
    let long = "x".repeat(200);
    assert_eq!(
        server.ask("GET", "/version", &[("x-request-id", &long)], None).header("x-request-id").len(),
        36
    );
}

#[test]
fn properties() {
    let server = Server::plain();
    let props = server.get("/props").json();
    assert_eq!(props["default_generation_settings"]["n_ctx"], 256);
    assert_eq!((&props["total_slots"], &props["bos_token"]), (&json!(64), &json!("<|endoftext|>")));
    assert!(props["chat_template"].as_str().unwrap().contains("<|im_start|>"), "{props}");
    let info = server.get("/server_info").json();
    assert_eq!(
        (&info["max_model_len"], &info["vocab_size"], &info["kv_format"]),
        (&json!(256), &json!(288), &json!("exact"))
    );
    assert_eq!(server.get("/slots").json().as_array().unwrap().len(), 64);
    assert_eq!(server.get("/ping").json(), json!({"status": "ok"}));
}

#[test]
fn other_origins_are_let_in_only_if_they_are_allowed() {
    let origin = [("origin", "https://chat.example")];
    let closed = Server::plain();
    assert_eq!(closed.ask("GET", "/version", &origin, None).header("access-control-allow-origin"), "");
    let keys = vec!["key".to_owned()];
    let options =
        Options { allow_origins: vec!["https://chat.example".into()], api_keys: keys, ..Options::default() };
    let open = Server::start(options, Settings::default());
    let preflight = [origin[0], ("access-control-request-method", "POST")];
    let reply = open.ask("OPTIONS", "/v1/completions", &preflight, None);
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, "https://chat.example"));
    assert!(reply.header("access-control-allow-headers").contains("authorization"), "{:?}", reply.headers);
    // What changes something is refused even where a browser would let it be sent.
    for (server, origin, status) in [
        (&closed, "https://evil.example", 403),
        (&closed, "null", 403),
        (&closed, "http://127.0.0.1:1", 403),
        (&open, "https://evil.example", 403),
        (&open, "https://chat.example", 409),
    ] {
        let headers = [("origin", origin), ("authorization", "Bearer key")];
        let reply = server.ask("POST", "/slots/0?action=cancel", &headers, Some("{}"));
        assert_eq!(reply.status, status, "{origin}: {}", reply.body);
    }
    let own = format!("http://{}", closed.address);
    assert_eq!(closed.ask("POST", "/slots/0?action=cancel", &[("origin", &own)], Some("{}")).status, 409);
    let other = open.ask("GET", "/health", &[("origin", "https://evil.example")], None);
    assert_eq!(other.header("access-control-allow-origin"), "");
}

#[test]
fn a_description_of_all_that_is_served() {
    let server = Server::plain();
    let api = server.get("/openapi.json").json();
    assert!(api["openapi"].as_str().unwrap().starts_with("3.1"), "{}", api["openapi"]);
    let paths = api["paths"].as_object().unwrap();
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/models",
        "/v1/models/{id}",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ping",
        "/version",
        "/metrics",
        "/props",
        "/slots",
        "/slots/{id}",
        "/server_info",
        "/tokenizer_info",
        "/v1/kv/contexts",
        "/v1/kv/contexts/{name}",
    ] {
        assert!(paths.contains_key(path), "{path}");
    }
    // Everything that is referred to is there.
    let text = api.to_string();
    for reference in text.split("\"$ref\":\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(api["components"]["schemas"].get(name).is_some(), "{name}");
    }
    let common = &api["components"]["schemas"]["Common"]["properties"];
    assert_eq!((&common["n"]["maximum"], &common["temperature"]["maximum"]), (&json!(128), &json!(2)));
}
