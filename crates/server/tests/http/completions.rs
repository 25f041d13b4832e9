//! Continued texts: prompts of all kinds, what was echoed, and how probable it was.

use crate::common::{Server, tiny};
use mosaickv_kernels::Pool;
use mosaickv_kv::KvFormat;
use mosaickv_model::{Sequence, Specials};
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";

fn greedy(prompt: Value, more: Value) -> Value {
    let mut body = json!({"prompt": prompt, "temperature": 0, "max_tokens": 20, "ignore_eos": true});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// Log probabilities of the tokens after the first, from the model itself.
fn expected(ids: &[u32]) -> Vec<f64> {
    let (model, _) = tiny();
    let pool = Pool::new(1);
    let mut sequence = Sequence::new(&model, &pool, KvFormat::Exact).unwrap();
    let mut logits = sequence.prefill(&ids[..1], &mut |_, _| ()).unwrap();
    let each = ids[1..].iter().map(|&id| {
        let most = logits.iter().copied().fold(f32::MIN, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
        let logprob = f64::from(logits[id as usize] - most) - sum.ln();
        logits = sequence.step(id).unwrap();
        logprob
    });
    each.collect()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|number| number.as_f64().unwrap_or_else(|| panic!("{list}")))
        .collect()
}

#[test]
fn prompts_of_all_kinds_say_the_same() {
    let server = Server::plain();
    let (_, text) = tiny();
    let [one, two] = ["Once upon a time", "The river"].map(|t| text.encode(t, Specials::Added).unwrap());
    let texts = |prompt: Value| -> Vec<String> {
        let body = server.post(PATH, &greedy(prompt, json!({}))).json();
        assert_eq!(body["object"], "text_completion", "{body}");
        let choices = body["choices"].as_array().unwrap();
        assert!(choices.iter().enumerate().all(|(at, choice)| choice["index"] == at));
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let both = texts(json!(["Once upon a time", "The river"]));
    assert_eq!(both.len(), 2);
    assert_ne!(both[0], both[1]);
    assert_eq!(texts(json!("Once upon a time")), both[..1]);
    assert_eq!(texts(json!(two)), both[1..]);
    assert_eq!(texts(json!([one, two])), both);
    let twice = server.post(PATH, &greedy(json!([one, two]), json!({"n": 2}))).json();
    let all: Vec<&str> =
        twice["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(all, [&both[0], &both[0], &both[1], &both[1]]);
    assert_eq!(twice["usage"]["prompt_tokens"], one.len() + two.len());
    assert_eq!(twice["usage"]["completion_tokens"], 80);
}

#[test]
fn chunks_come_by_index() {
    let server = Server::plain();
    let prompt = json!(["Once upon a time", "The river"]);
    let whole = server.post(PATH, &greedy(prompt.clone(), json!({"logprobs": 1}))).json();
    let fields = json!({"logprobs": 1, "stream": true, "stream_options": {"include_usage": true}});
    let events = server.post(PATH, &greedy(prompt, fields)).events();
    for index in 0..2 {
        let pieces =
            events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == index);
        let (mut said, mut tokens, mut offsets, mut last) = (String::new(), vec![], vec![], &Value::Null);
        for piece in pieces {
            assert_eq!(last, &Value::Null);
            said += piece["text"].as_str().unwrap();
            tokens.extend(piece["logprobs"]["tokens"].as_array().into_iter().flatten());
            offsets.extend(piece["logprobs"]["text_offset"].as_array().into_iter().flatten());
            last = &piece["finish_reason"];
        }
        let choice = &whole["choices"][index];
        assert_eq!((&json!(said), last), (&choice["text"], &json!("length")));
        assert_eq!(json!(tokens), choice["logprobs"]["tokens"]);
        assert_eq!(json!(offsets), choice["logprobs"]["text_offset"]);
    }
    assert_eq!(events.last().unwrap()["usage"], whole["usage"]);
}

#[test]
fn an_echo_with_log_probabilities_is_the_model_s() {
    let server = Server::plain();
    let (_, text) = tiny();
    let ids = text.encode("Don't you know the rivers of 1999?", Specials::Added).unwrap();
    // As lm-eval asks.
    let fields = json!({"echo": true, "logprobs": 1, "max_tokens": 1, "seed": 1234});
    let body = server.post(PATH, &greedy(json!([ids]), fields)).json();
    let (choice, logprobs) = (&body["choices"][0], &body["choices"][0]["logprobs"]);
    assert_eq!(logprobs["token_logprobs"].as_array().unwrap().len(), ids.len() + 1, "{body}");
    for list in ["tokens", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), ids.len() + 1);
    }
    assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
    let got = numbers(&json!(logprobs["token_logprobs"].as_array().unwrap()[1..=ids.len() - 1]));
    for (at, (got, expected)) in got.iter().zip(expected(&ids)).enumerate() {
        assert!((got - expected).abs() < 2e-3, "{at}: {got} {expected}");
    }
    for at in 1..=ids.len() {
        let top = logprobs["top_logprobs"][at].as_object().unwrap();
        let token = logprobs["tokens"][at].as_str().unwrap();
        assert_eq!(top.get(token), Some(&logprobs["token_logprobs"][at]));
        assert!(top.len() == 1 || top.len() == 2, "{top:?}");
    }
    // The sampled token is the most probable one.
    assert_eq!(logprobs["top_logprobs"][ids.len()].as_object().unwrap().len(), 1);
    let said = choice["text"].as_str().unwrap();
    assert!(said.starts_with("Don't you know the rivers of 1999?"), "{said:?}");
    for (at, token) in logprobs["tokens"].as_array().unwrap().iter().enumerate() {
        let from = logprobs["text_offset"][at].as_u64().unwrap() as usize;
        let rest: String = said.chars().skip(from).collect();
        let token = token.as_str().unwrap();
        assert!(
            rest.starts_with(token) || token.starts_with("bytes:") || token.starts_with('<'),
            "{token:?} {rest:?}"
        );
    }
    // Nothing need be answered.
    let fields = json!({"echo": true, "logprobs": 0, "max_tokens": 0});
    let none = server.post(PATH, &greedy(json!(ids), fields)).json();
    assert_eq!(none["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), ids.len());
    assert_eq!(none["usage"]["completion_tokens"], 0);
    let plain = server.post(PATH, &greedy(json!("Hi  there"), json!({"echo": true}))).json();
    assert!(plain["choices"][0]["text"].as_str().unwrap().starts_with("Hi  there"), "{plain}");
}

#[test]
fn scores_after_a_token_come_through_the_cache() {
    let server = Server::plain();
    let (_, text) = tiny();
    let ids = text.encode("Don't you know the rivers of 1999?", Specials::Added).unwrap();
    let fields = json!({"score_from": 6, "logprobs": 0, "max_tokens": 0});
    let body = server.post(PATH, &greedy(json!(ids), fields)).json();
    let choice = &body["choices"][0];
    let got = numbers(&choice["logprobs"]["token_logprobs"]);
    let expected = expected(&ids);
    assert_eq!(got.len(), ids.len() - 6, "{body}");
    for (got, expected) in got.iter().zip(&expected[5..]) {
        assert!((got - expected).abs() < 2e-3, "{got} {expected}");
    }
    assert_eq!(choice["text"].as_str().unwrap(), text.decode(&ids[6..]).unwrap());
    assert_eq!(
        (&body["usage"]["prompt_tokens"], &choice["finish_reason"]),
        (&json!(ids.len()), &json!("length"))
    );
    let fields = json!({"score_from": 6, "logprobs": 1, "max_tokens": 1, "echo": true});
    let body = server.post(PATH, &greedy(json!(ids), fields)).json();
    let logprobs = &body["choices"][0]["logprobs"];
    assert_eq!(logprobs["token_logprobs"].as_array().unwrap().len(), ids.len() + 1);
    let got = numbers(&json!(logprobs["token_logprobs"].as_array().unwrap()[1..ids.len()]));
    for (got, expected) in got.iter().zip(&expected) {
        assert!((got - expected).abs() < 2e-3, "{got} {expected}");
    }
}

#[test]
fn formats_are_chosen_in_three_places() {
    let server = Server::plain();
    let format = |more: Value, headers: &[(&str, &str)]| {
        let body = greedy(json!("Hi"), more).to_string();
        let reply = server.ask("POST", PATH, headers, Some(&body)).json();
        reply["kv"]["format"].as_str().unwrap_or_else(|| panic!("{reply}")).to_owned()
    };
    assert_eq!(format(json!({}), &[]), "exact");
    assert_eq!(format(json!({"model": "model@kv=packed:group=2"}), &[]), "packed:group=2");
    assert_eq!(format(json!({"model": "model@kv=packed"}), &[("x-kv-format", "quest")]), "quest");
    let fields = json!({"model": "model@kv=packed", "kv": {"format": "snapkv"}});
    assert_eq!(format(fields, &[("x-kv-format", "quest")]), "snapkv");
    let body = greedy(json!("Hi"), json!({"model": "model@kv=packed"}));
    assert_eq!(server.post(PATH, &body).json()["model"], "model");
    let events =
        server.post(PATH, &greedy(json!("Hi"), json!({"kv": {"format": "packed"}, "stream": true}))).events();
    let last = &events.last().unwrap()["kv"];
    assert_eq!(last["format"], "packed");
    for key in
        ["stored_bytes", "exact_bytes", "ratio", "read_bytes_per_step", "compress_seconds", "cached_tokens"]
    {
        assert!(last[key].is_number(), "{last}");
    }
    let reply = server.ask("POST", PATH, &[("x-kv-ratio", "six")], Some("{\"prompt\": \"Hi\"}"));
    reply.refused(400, "invalid_request_error", Some("x-kv-ratio"), None);
}

#[test]
fn special_tokens_are_shown_if_they_are_wanted() {
    let server = Server::plain();
    let (_, text) = tiny();
    let end = text.token("<|im_end|>").unwrap().to_string();
    let said = |more: Value| {
        let mut fields = json!({"logit_bias": {end.as_str(): 100}, "max_tokens": 2});
        for (key, value) in more.as_object().unwrap() {
            fields[key] = value.clone();
        }
        server.post(PATH, &greedy(json!("Hi"), fields)).json()["choices"][0]["text"].clone()
    };
    assert_eq!(said(json!({})), "");
    assert_eq!(said(json!({"skip_special_tokens": false})), "<|im_end|><|im_end|>");
    let shown =
        json!({"skip_special_tokens": false, "ignore_eos": false, "include_stop_str_in_output": true});
    assert_eq!(said(shown), "<|im_end|>");
}
