//! OpenAI's newer API says the same as chat completions do.

use crate::common::Server;
use mosaickv_engine::Settings;
use mosaickv_server::Options;
use serde_json::{Value, json};

const PATH: &str = "/v1/responses";

fn greedy(more: Value) -> Value {
    let mut body =
        json!({"input": "Name three rivers.", "temperature": 0, "max_output_tokens": 20, "ignore_eos": true});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// The events of a stream: their names and what they say.
fn events(server: &Server, body: &Value) -> Vec<(String, Value)> {
    let reply = server.post(PATH, body);
    assert_eq!((reply.status, reply.header("content-type")), (200, "text/event-stream"), "{}", reply.body);
    let events = reply.body.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
    let read = events.map(|event| {
        let (name, data) = event.split_once('\n').unwrap_or_else(|| panic!("{event:?}"));
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        let name = name.strip_prefix("event: ").unwrap().to_owned();
        assert_eq!(data["type"], name, "{data}");
        (name, data)
    });
    read.collect()
}

#[test]
fn a_response_says_what_a_completion_says() {
    let server = Server::plain();
    let chat = json!({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three rivers."}],
        "temperature": 0, "max_tokens": 20, "ignore_eos": true});
    let said = server.post("/v1/chat/completions", &chat).json();
    let text = &said["choices"][0]["message"]["content"];
    let response = server.post(PATH, &greedy(json!({"instructions": "Be brief."}))).json();
    assert_eq!(response["object"], "response", "{response}");
    assert_eq!(&response["output"][0]["content"][0]["text"], text, "{response}");
    assert_eq!(
        (&response["status"], &response["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    for (ours, theirs) in [
        ("input_tokens", "prompt_tokens"),
        ("output_tokens", "completion_tokens"),
        ("total_tokens", "total_tokens"),
    ] {
        assert_eq!(response["usage"][ours], said["usage"][theirs], "{response}");
    }
    assert!(response["kv"]["stored_bytes"].as_u64().unwrap() > 0, "{response}");
    // The same as items.
    let input = json!([
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Name three "}, {"type": "input_text", "text": "rivers."}]},
    ]);
    let items = server.post(PATH, &greedy(json!({"input": input}))).json();
    assert_eq!(items["output"][0]["content"][0]["text"], *text);
}

#[test]
fn events_say_the_same() {
    let server = Server::plain();
    let body = greedy(json!({}));
    let whole = server.post(PATH, &body).json();
    let text = whole["output"][0]["content"][0]["text"].as_str().unwrap();
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let events = events(&server, &streamed);
    for (i, (_, data)) in events.iter().enumerate() {
        assert_eq!(data["sequence_number"], i);
    }
    let names: Vec<&str> =
        events.iter().map(|(name, _)| name.as_str()).filter(|name| !name.ends_with("text.delta")).collect();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
    );
    let deltas = events.iter().filter(|(name, _)| name.ends_with("text.delta"));
    let deltas: String = deltas.map(|(_, data)| data["delta"].as_str().unwrap()).collect();
    assert_eq!(deltas, text);
    let last = &events.last().unwrap().1["response"];
    assert_eq!(
        (&last["output"][0]["content"], &last["usage"]),
        (&whole["output"][0]["content"], &whole["usage"])
    );
}

#[test]
fn answers_can_be_restricted_and_functions_called() {
    let server = Server::large(Options::default(), Settings::default());
    let schema = json!({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": false});
    let format =
        json!({"format": {"type": "json_schema", "name": "number", "schema": schema, "strict": true}});
    let body = json!({"input": "A number.", "text": format, "max_output_tokens": 60});
    let response = server.post(PATH, &body).json();
    assert_eq!(response["status"], "completed", "{response}");
    let said: Value =
        serde_json::from_str(response["output"][0]["content"][0]["text"].as_str().unwrap()).unwrap();
    assert!(said["n"] == 1 || said["n"] == 2, "{said}");
    let tool = json!({"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": false}});
    let mut body = json!({"input": "What time is it?", "tools": [tool], "tool_choice": "required", "max_output_tokens": 400, "temperature": 0, "parallel_tool_calls": false});
    let response = server.post(PATH, &body).json();
    let call = &response["output"][0];
    assert_eq!((&call["type"], &call["name"]), (&json!("function_call"), &json!("now")), "{response}");
    let arguments = |value: &Value| serde_json::from_str::<Value>(value.as_str().unwrap()).unwrap();
    assert_eq!(arguments(&call["arguments"]), json!({}));
    body["stream"] = json!(true);
    let events = events(&server, &body);
    let done = events.iter().find(|(name, _)| name == "response.function_call_arguments.done").unwrap();
    assert_eq!(arguments(&done.1["arguments"]), json!({}));
    assert_eq!(events.last().unwrap().0, "response.completed");
    // What the function gave goes back.
    let input = json!([
        {"role": "user", "content": "What time is it?"},
        {"type": "function_call", "call_id": call["call_id"], "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": call["call_id"], "output": "noon"},
    ]);
    let response = server.post(PATH, &json!({"input": input, "max_output_tokens": 3}));
    assert_eq!(response.status, 200, "{}", response.body);
}

#[test]
fn what_cannot_be_had_is_refused() {
    let server = Server::plain();
    for (more, param) in [
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"background": true}), "background"),
        (json!({"input": null}), "input"),
        (json!({"input": [{"type": "input_image"}]}), "input[0]"),
        (json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "input[0]"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0]"),
        (json!({"max_output_tokens": 0}), "max_completion_tokens"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"n": 3}), "n"),
    ] {
        server.post(PATH, &greedy(more)).refused(400, "invalid_request_error", Some(param), None);
    }
    let reply = server.post(PATH, &greedy(json!({"nonsense": 1, "store": true})));
    assert_eq!((reply.status, reply.header("x-ignored-params")), (200, "nonsense"), "{}", reply.body);
}
