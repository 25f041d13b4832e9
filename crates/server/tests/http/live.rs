//! What the page is and asks for: its files, the figures, a cache's mosaic, and cancelling.

use crate::common::Server;
use mosaickv_engine::Settings;
use mosaickv_server::Options;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

#[test]
fn the_page_needs_no_key_and_what_it_asks_for_does() {
    let options = Options { api_keys: vec!["secret".into()], ..Options::default() };
    let server = Server::start(options, Settings::default());
    for (path, kind, has) in [
        ("/", "text/html", "<title>MosaicKV</title>"),
        ("/page/style.css", "text/css", "prefers-color-scheme"),
        ("/page/page.js", "text/javascript", "/v1/kv/live"),
    ] {
        let reply = server.get(path);
        assert_eq!(reply.status, 200, "{path}");
        assert!(reply.header("content-type").starts_with(kind) && reply.body.contains(has), "{path}");
        assert!(reply.header("content-security-policy").contains("default-src 'self'"), "{path}");
    }
    for path in ["/v1/kv/live", "/v1/kv/mosaic/0", "/page", "/page/../v1/models"] {
        assert_eq!(server.get(path).status, 401, "{path}");
    }
    let live = server.ask("GET", "/v1/kv/live", &[("authorization", "Bearer secret")], None).json();
    assert_eq!(
        (&live["running"], &live["budget_bytes"], &live["requests"]),
        (&json!(0), &json!(4u64 << 30), &json!([]))
    );
    assert_eq!(live["exact_bytes_per_token"].as_u64().map(|bytes| bytes % 4), Some(0));
}

/// Begins a stream of many tokens; what is left to be read of it.
fn begin(server: &Server, kv: &str, prompt: &[usize]) -> BufReader<TcpStream> {
    let body = json!({
        "prompt": prompt, "max_tokens": 1400, "ignore_eos": true, "stream": true, "kv": {"format": kv},
    });
    let body = body.to_string();
    let mut socket = TcpStream::connect(server.address).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\nx-request-id: mine";
    socket.write_all(format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
    let mut reader = BufReader::new(socket);
    let (mut line, mut all) = (String::new(), String::new());
    while !line.starts_with("data: {") {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the stream has ended: {all}");
        all += &line;
    }
    reader
}

/// A running answer's mosaic has every token in every head, and their bytes; then the answer is cancelled.
#[test]
fn a_running_answer_is_looked_at_and_cancelled() {
    let server = Server::large(Options::default(), Settings::default());
    let prompt: Vec<usize> = (0..500).map(|i| 40 + i * 7 % 200).collect();
    for kv in ["exact", "packed", "snapkv"] {
        let mut stream = begin(&server, kv, &prompt);
        let live = server.get("/v1/kv/live").json();
        let request = &live["requests"][0];
        assert_eq!((&request["request_id"], &request["kv_format"]), (&json!("mine"), &json!(kv)), "{live}");
        let path = format!("/v1/kv/mosaic/{}", request["id_task"]);
        // The first token goes out before the prompt is compressed.
        let mosaic = loop {
            let mosaic = server.get(&path).json();
            if mosaic["tokens"].as_u64().unwrap() > 501 {
                break mosaic;
            }
        };
        assert_eq!(
            (&mosaic["format"], &mosaic["prompt"], &mosaic["order"]),
            (&json!(kv), &json!(500), &json!("position"))
        );
        let tokens = mosaic["tokens"].as_u64().unwrap();
        assert!((500..1900).contains(&tokens), "{tokens}");
        let number = |name: &str| mosaic[name].as_u64().unwrap();
        let heads = mosaic["heads"].as_array().unwrap();
        assert_eq!(heads.len() as u64, number("layers") * number("kv_heads"));
        let kinds = mosaic["kinds"].as_array().unwrap().len() as u64;
        for head in heads {
            let parts = head["parts"].as_array().unwrap();
            let of = |name: &str| parts.iter().map(|part| part[name].as_u64().unwrap()).collect::<Vec<_>>();
            assert_eq!(of("tokens").iter().sum::<u64>(), tokens, "{kv}: {head}");
            assert!(of("kind").iter().all(|kind| *kind < kinds), "{kv}: {head}");
            let mut next = 0;
            for (first, tokens) in of("first").into_iter().zip(of("tokens")) {
                assert_eq!(first, next, "{kv}: {head}");
                next += tokens;
            }
        }
        let is_read = |part: &Value| part["read"].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share));
        let has_reads = heads.iter().all(|head| head["parts"].as_array().unwrap().iter().any(is_read));
        assert_eq!(has_reads, kv == "packed", "{kv}: {heads:?}");
        assert!(number("stored_bytes") > 0 && number("exact_bytes") > 0);
        let one = server.get(&format!("{path}?layer=1&head=0")).json();
        let of_one = one["heads"].as_array().unwrap();
        assert_eq!((of_one.len(), &of_one[0]["layer"], &of_one[0]["head"]), (1, &json!(1), &json!(0)));
        for (wrong, param) in [
            ("layer=0", "head"),
            ("head=0", "layer"),
            ("layer=99&head=0", "layer"),
            ("layer=0&head=99", "head"),
            ("layer=x&head=0", "layer"),
            ("layer=0&head=x", "head"),
        ] {
            let refused = server.get(&format!("{path}?{wrong}"));
            refused.refused(400, "invalid_request_error", Some(param), None);
        }
        let text = mosaic["text"].as_array().unwrap();
        assert_eq!((text.len() as u64, &mosaic["text_from"]), (tokens, &json!(0)));
        let slot = format!("/slots/{}?action=cancel", request["id"]);
        server.post(&format!("{slot}&task=1&task=1"), &json!({})).refused(
            400,
            "invalid_request_error",
            Some("action"),
            None,
        );
        server.post(&format!("{slot}&task=no"), &json!({})).refused(
            400,
            "invalid_request_error",
            Some("task"),
            None,
        );
        server.post(&format!("{slot}&task=999999"), &json!({})).refused(
            409,
            "invalid_request_error",
            Some("id"),
            None,
        );
        let slot = format!("{slot}&task={}", request["id_task"]);
        assert_eq!(server.post(&slot, &json!({})).json()["id_slot"], request["id"]);
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut stream, &mut rest).unwrap();
        assert!(rest.contains("\"cancelled\"") && !rest.contains("[DONE]"), "{kv}: {rest}");
        server.wait_for(|now| now == [0.0, 0.0]);
        server.post(&slot, &json!({})).refused(409, "invalid_request_error", Some("id"), None);
        assert_eq!(server.get("/v1/kv/live").json()["requests"], json!([]));
    }
    for nowhere in ["/v1/kv/mosaic/999999", "/v1/kv/mosaic/x"] {
        assert_eq!(server.get(nowhere).status, 404);
    }
}

/// A named context's mosaic, and that there is none of a context that is not.
#[test]
fn a_context_is_looked_at() {
    let server = Server::large(Options::default(), Settings::default());
    let prompt = "What was read once. ".repeat(40);
    let made =
        server.post("/v1/kv/contexts", &json!({"name": "one", "prompt": prompt, "kv": {"format": "packed"}}));
    assert_eq!(made.status, 201, "{}", made.body);
    let tokens = &made.json()["tokens"];
    let mosaic: Value = server.get("/v1/kv/contexts/one/mosaic").json();
    assert_eq!((&mosaic["tokens"], &mosaic["format"]), (tokens, &json!("packed")));
    server.get("/v1/kv/contexts/two/mosaic").refused(
        404,
        "invalid_request_error",
        Some("name"),
        Some("context_not_found"),
    );
}
