//! What was read once and is asked many times: contexts with names, their files, and prompts that were seen before.

use crate::common::{Reply, Server};
use mosaickv_engine::{PrefixCache, Settings};
use mosaickv_server::Options;
use serde_json::{Value, json};
use std::path::Path;

const PATH: &str = "/v1/kv/contexts";

fn with_folder(folder: &Path) -> Options {
    Options { contexts: Some(folder.to_owned()), ..Options::default() }
}

fn make(server: &Server, more: Value) -> Reply {
    let mut body = json!({"name": "river", "prompt": "The river runs to the sea, and the sea ", "kv": {"format": "exact"}});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    server.post(PATH, &body)
}

/// What comes after the context and a few words, and how many of the tokens were there before.
fn ask(server: &Server, name: &str) -> (String, u64) {
    let body = json!({"prompt": "is wide", "temperature": 0, "max_tokens": 12, "ignore_eos": true, "kv": {"context": name}});
    let reply = server.post("/v1/completions", &body);
    assert_eq!(reply.status, 200, "{}", reply.body);
    let body = reply.json();
    let cached = &body["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert_eq!(cached, &body["kv"]["cached_tokens"], "{body}");
    (body["choices"][0]["text"].as_str().unwrap().to_owned(), cached.as_u64().unwrap())
}

#[test]
fn a_context_is_made_asked_told_of_and_deleted() {
    let server = Server::plain();
    let made = make(&server, json!({}));
    assert_eq!(made.status, 201, "{}", made.body);
    let body = made.json();
    let tokens = body["tokens"].as_u64().unwrap();
    assert_eq!(
        (&body["id"], &body["object"], &body["format"]),
        (&json!("river"), &json!("kv.context"), &json!("exact"))
    );
    assert_eq!((&body["saved"], &body["loaded"]), (&json!(false), &json!(true)));
    assert!(tokens > 20 && body["stored_bytes"].as_u64().unwrap() > 0, "{body}");
    let (first, cached) = ask(&server, "river");
    assert_eq!(cached, tokens);
    assert_eq!(ask(&server, "river").0, first);
    // The whole text at once says the same: here nothing is compressed.
    let whole = json!({"prompt": "The river runs to the sea, and the sea is wide", "temperature": 0, "max_tokens": 12,
        "ignore_eos": true, "kv": {"format": "exact"}});
    assert_eq!(server.post("/v1/completions", &whole).json()["choices"][0]["text"], first);
    let list = server.get(PATH).json();
    assert_eq!((&list["object"], list["data"].as_array().unwrap().len()), (&json!("list"), 1));
    assert_eq!(server.get(&format!("{PATH}/river")).json()["tokens"], tokens);
    make(&server, json!({})).refused(409, "invalid_request_error", Some("name"), Some("already_exists"));
    let gone = server.ask("DELETE", &format!("{PATH}/river"), &[], None);
    assert_eq!((gone.status, &gone.json()["deleted"]), (200, &json!(true)));
    server.get(&format!("{PATH}/river")).refused(
        404,
        "invalid_request_error",
        Some("name"),
        Some("context_not_found"),
    );
    let body = json!({"prompt": "x", "kv": {"context": "river"}});
    let message = server.post("/v1/completions", &body).refused(
        404,
        "invalid_request_error",
        Some("kv.context"),
        Some("context_not_found"),
    );
    assert!(message.contains("river"), "{message}");
}

#[test]
fn a_conversation_goes_on_from_a_context() {
    let server = Server::plain();
    let first =
        json!([{"role": "user", "content": "A river runs"}, {"role": "assistant", "content": "to the sea."}]);
    let made = server.post(PATH, &json!({"name": "talk", "messages": first, "kv": {"format": "exact"}}));
    assert_eq!(made.status, 201, "{}", made.body);
    let chat = |messages: Value, kv: Value| {
        let body =
            json!({"messages": messages, "temperature": 0, "max_tokens": 10, "ignore_eos": true, "kv": kv});
        server.post("/v1/chat/completions", &body)
    };
    let next = json!({"role": "user", "content": "Which?"});
    let asked = chat(json!([next]), json!({"context": "talk"}));
    assert_eq!(asked.status, 200, "{}", asked.body);
    assert_eq!(asked.json()["usage"]["prompt_tokens_details"]["cached_tokens"], made.json()["tokens"]);
    let mut all = first.as_array().unwrap().clone();
    all.push(next);
    let whole = chat(json!(all), json!({"format": "exact"})).json();
    assert_eq!(asked.json()["choices"][0]["message"]["content"], whole["choices"][0]["message"]["content"]);
    let text = json!({"prompt": "x", "kv": {"context": "talk", "format": "packed"}});
    server.post("/v1/completions", &text).refused(400, "invalid_request_error", Some("kv.format"), None);
    make(&server, json!({}));
    chat(json!([{"role": "user", "content": "x"}]), json!({"context": "river"})).refused(
        400,
        "invalid_request_error",
        Some("kv.context"),
        None,
    );
}

#[test]
fn a_saved_context_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (want, tokens) = {
        let server = Server::start(with_folder(folder.path()), Settings::default());
        let made = make(&server, json!({}));
        assert_eq!((made.status, &made.json()["saved"]), (201, &json!(true)), "{}", made.body);
        ask(&server, "river")
    };
    // What a writer that was killed has left.
    std::fs::write(folder.path().join(".unfinished-abc"), b"MOSAICKV").unwrap();
    std::fs::write(folder.path().join("notes.txt"), b"no context").unwrap();
    let seen = Server::start(with_folder(folder.path()), Settings::default());
    let mosaic = seen.get(&format!("{PATH}/river/mosaic")).json();
    assert_eq!(mosaic["tokens"], tokens, "{mosaic}");
    drop(seen);
    // What it compresses together of other prompts does not matter to one that is compressed.
    let options = Options { most_exact: Some(5), ..with_folder(folder.path()) };
    let server = Server::start(options, Settings::default());
    let card = server.get(&format!("{PATH}/river")).json();
    assert_eq!((&card["saved"], &card["loaded"]), (&json!(true), &json!(false)), "{card}");
    assert_eq!(ask(&server, "river"), (want.clone(), tokens));
    assert_eq!(server.get(PATH).json()["data"][0]["loaded"], true);
    assert_eq!(ask(&server, "river"), (want, tokens));
    assert_eq!(server.ask("DELETE", &format!("{PATH}/river"), &[], None).status, 200);
    assert!(!folder.path().join("river.context").exists());
    assert!(folder.path().join("notes.txt").exists());
}

#[test]
fn a_damaged_file_or_another_model_s_is_refused_with_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("river.context");
    drop(make(&Server::start(with_folder(folder.path()), Settings::default()), json!({})));
    let whole = std::fs::read(&path).unwrap();
    let body = json!({"prompt": "x", "kv": {"context": "river"}});
    for at in [whole.len() / 2, whole.len() - 1] {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        std::fs::write(&path, changed).unwrap();
        let server = Server::start(with_folder(folder.path()), Settings::default());
        let message =
            server.post("/v1/completions", &body).refused(500, "server_error", None, Some("internal_error"));
        assert!(message.contains("checksum") && message.contains("river"), "{message}");
        // The server goes on.
        assert_eq!(server.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 1})).status, 200);
    }
    // Those that are no contexts of this model by their first bytes are not listed at all.
    let text = |from: &str, to: &str| {
        let at = whole.windows(from.len()).position(|bytes| bytes == from.as_bytes()).unwrap();
        let mut changed = whole.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        changed
    };
    for changed in [text("tiny", "vast"), text("MOSAICKV", "MOSAICXX"), whole[..30].to_vec(), vec![]] {
        std::fs::write(&path, changed).unwrap();
        let server = Server::start(with_folder(folder.path()), Settings::default());
        assert_eq!(server.get(PATH).json()["data"], json!([]));
    }
}

#[test]
fn names_lead_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let inside = folder.path().join("inside");
    std::fs::create_dir(&inside).unwrap();
    let server = Server::start(with_folder(&inside), Settings::default());
    let long = "a".repeat(65);
    for name in ["../x", "a/b", "a\\b", ".hidden", "", "a b", "ä", "-x", &long] {
        make(&server, json!({"name": name})).refused(400, "invalid_request_error", Some("name"), None);
    }
    server.post(PATH, &json!({"prompt": "x"})).refused(400, "invalid_request_error", Some("name"), None);
    for name in ["..%2Fx", "%2e%2e", "nobody"] {
        assert_eq!(server.get(&format!("{PATH}/{name}")).status, 404);
        assert_eq!(server.ask("DELETE", &format!("{PATH}/{name}"), &[], None).status, 404);
    }
    make(&server, json!({"kv": {"format": "packed"}})).refused(
        400,
        "invalid_request_error",
        Some("kv.format"),
        None,
    );
    assert_eq!(std::fs::read_dir(&inside).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_is_missing_or_too_much_is_named() {
    let server = Server::plain();
    server.post(PATH, &json!({"name": "x"})).refused(400, "invalid_request_error", Some("messages"), None);
    let both = json!({"messages": [{"role": "user", "content": "x"}]});
    make(&server, both).refused(400, "invalid_request_error", Some("prompt"), None);
    make(&server, json!({"prompt": "word ".repeat(400)})).refused(
        400,
        "exceed_context_size_error",
        None,
        Some("context_length_exceeded"),
    );
    make(&server, json!({}));
    let body = json!({"prompt": "x", "truncate_prompt_tokens": 3, "kv": {"context": "river"}});
    server.post("/v1/completions", &body).refused(
        400,
        "invalid_request_error",
        Some("truncate_prompt_tokens"),
        None,
    );
    let body = json!({"prompt": "x y", "score_from": 1, "logprobs": 0, "kv": {"context": "river"}});
    server.post("/v1/completions", &body).refused(400, "invalid_request_error", Some("score_from"), None);
}

/// A server that reads the end of long prompts through what is compressed keeps all of a context too.
#[test]
fn a_context_is_whole_however_it_was_read() {
    let server = Server::start(Options { most_exact: Some(5), ..Options::default() }, Settings::default());
    let made = make(&server, json!({}));
    assert_eq!(made.status, 201, "{}", made.body);
    let (said, cached) = ask(&server, "river");
    assert_eq!(json!(cached), made.json()["tokens"]);
    assert_eq!(ask(&server, "river").0, said);
}

#[test]
fn a_prompt_that_was_read_before_is_not_read_again() {
    let server = Server::large(Options::default(), Settings::default());
    let ids: Vec<u32> = (0..600).map(|i| 40 + i * 7 % 200).collect();
    let body = json!({"prompt": ids, "temperature": 0, "max_tokens": 9, "ignore_eos": true, "return_token_ids": true});
    let ask = |body: &Value| {
        let reply = server.post("/v1/completions", body).json();
        let cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        (reply["choices"][0]["token_ids"].clone(), cached)
    };
    let (first, cached) = ask(&body);
    assert_eq!(cached, 0);
    assert_eq!(ask(&body), (first, 600));
    // With a salt of its own it is, and nobody without it can tell.
    let mut salted = body.clone();
    salted["cache_salt"] = json!("secret");
    assert_eq!([ask(&salted).1, ask(&salted).1], [0, 600]);
    let metrics = server.get("/metrics").body;
    let value = |name: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(value("vllm:prefix_cache_queries_total"), 2400.0);
    assert_eq!(value("vllm:prefix_cache_hits_total"), 1200.0);
    assert_eq!(value("vllm:kv_cache_usage_perc"), 0.0, "what nobody needs is not in use");
}

/// What was read of a conversation is not read again at its next turn, and another question about the same document reads the document no more;
/// the answers are those of a server that forgets.
#[test]
fn later_turns_go_on_from_earlier_ones() {
    let server = |prefix_cache| {
        Server::of_context(8192, Options::default(), Settings { prefix_cache, ..Settings::default() })
    };
    let (keeps, forgets) = (server(PrefixCache::On), server(PrefixCache::Off));
    let document = "The river runs to the sea. ".repeat(110);
    let ask = |messages: &Value, kv: &str| {
        let body = json!({"messages": messages, "temperature": 0, "max_tokens": 12, "ignore_eos": true, "kv": {"format": kv},
            "logprobs": true});
        let [kept, forgotten] = [&keeps, &forgets].map(|server| {
            let reply = server.post("/v1/chat/completions", &body);
            assert_eq!(reply.status, 200, "{}", reply.body);
            reply.json()
        });
        let [got, want] = [&kept, &forgotten].map(|reply| &reply["choices"][0]);
        assert_eq!(got["message"], want["message"], "{kv}");
        // Plain weights meet few tokens in another order than many: of quantized ones these would be the same too.
        let [got, want] = [got, want].map(|choice| choice["logprobs"]["content"].as_array().unwrap());
        assert_eq!((got.len(), want.len()), (12, 12), "{kept}");
        for (got, want) in got.iter().zip(want) {
            let difference = got["logprob"].as_f64().unwrap() - want["logprob"].as_f64().unwrap();
            assert!(difference.abs() < 1e-4, "{kv}: {got}, {want}");
        }
        assert_eq!(forgotten["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
        let usage = &kept["usage"];
        let number = |value: &Value| value.as_u64().unwrap();
        let said = kept["choices"][0]["message"]["content"].clone();
        (said, number(&usage["prompt_tokens"]), number(&usage["prompt_tokens_details"]["cached_tokens"]))
    };
    for kv in ["exact", "packed", "snapkv"] {
        let user = |text: &str| json!({"role": "user", "content": text});
        let first = json!([user(&document)]);
        let (said, prompt, cached) = ask(&first, kv);
        assert!(prompt > 2048 && cached == 0, "{prompt}, {cached}");
        let turn = json!([first[0], {"role": "assistant", "content": said}, user("And then?")]);
        let (_, longer, cached) = ask(&turn, kv);
        assert!(cached >= prompt && cached < longer, "{kv}: {cached} of {prompt} and more");
        // A document in a first message of its own is shared by all questions about it.
        let system = |question: &str| json!([{"role": "system", "content": document}, user(question)]);
        let (_, _, cached) = ask(&system("Which sea?"), kv);
        assert_eq!(cached, 0);
        let (_, prompt, cached) = ask(&system("Which river, and where?"), kv);
        assert!(cached > 2048 && cached < prompt, "{kv}: {cached} of {prompt}");
    }
}

/// As llama-server's clients do it.
#[test]
fn a_slot_is_saved_restored_and_erased() {
    let folder = tempfile::tempdir().unwrap();
    let start = || Server::large(with_folder(folder.path()), Settings::default());
    let ids: Vec<u32> = (0..600).map(|i| 40 + i * 7 % 200).collect();
    let body = json!({"prompt": ids, "temperature": 0, "max_tokens": 9, "ignore_eos": true, "return_token_ids": true});
    let act =
        |server: &Server, action: &str, body: Value| server.post(&format!("/slots/0?action={action}"), &body);
    let file = json!({"filename": "first.bin"});
    let want = {
        let server = start();
        act(&server, "save", file.clone()).refused(400, "invalid_request_error", Some("id"), None);
        let mut salted = body.clone();
        salted["cache_salt"] = json!("mine");
        server.post("/v1/completions", &salted).json();
        let why = act(&server, "save", file.clone()).refused(400, "invalid_request_error", Some("id"), None);
        assert!(why.contains("cache_salt"), "{why}");
        let reply = server.post("/v1/completions", &body).json();
        let saved = act(&server, "save", file.clone()).json();
        // The last token of an answer was not read.
        assert_eq!((&saved["id_slot"], &saved["n_saved"]), (&json!(0), &json!(608)), "{saved}");
        assert!(saved["timings"]["save_ms"].as_f64().unwrap() > 0.0);
        assert_eq!(act(&server, "erase", json!({})).json()["n_erased"], 609);
        assert_eq!(act(&server, "erase", json!({})).json()["n_erased"], 0);
        reply["choices"][0]["token_ids"].clone()
    };
    let server = start();
    let restored = act(&server, "restore", file.clone()).json();
    assert_eq!(
        (&restored["n_restored"], &restored["filename"]),
        (&json!(608), &json!("first.bin")),
        "{restored}"
    );
    // It is a context, which is gone on from with the token that was not read.
    let last = want.as_array().unwrap().last().unwrap().clone();
    let mut more = body.clone();
    (more["prompt"], more["kv"]) = (json!([last]), json!({"context": "first.bin"}));
    let went_on = server.post("/v1/completions", &more).json();
    assert_eq!(went_on["usage"]["prompt_tokens_details"]["cached_tokens"], 608, "{went_on}");
    let mut whole = body.clone();
    whole["max_tokens"] = json!(18);
    let whole = server.post("/v1/completions", &whole).json()["choices"][0]["token_ids"].clone();
    assert_eq!(went_on["choices"][0]["token_ids"].as_array().unwrap()[..], whole.as_array().unwrap()[9..]);
    act(&server, "freeze", json!({})).refused(400, "invalid_request_error", Some("action"), None);
    act(&server, "save", json!({"filename": "../x"})).refused(
        400,
        "invalid_request_error",
        Some("filename"),
        None,
    );
    act(&server, "restore", json!({"filename": "y"})).refused(
        404,
        "invalid_request_error",
        Some("filename"),
        Some("context_not_found"),
    );
    let without = Server::plain();
    act(&without, "save", file).refused(501, "unsupported_error", None, Some("unsupported"));
}
