"""Does the openai Python SDK get what it expects of `mosaickv serve`?

usage: openai_sdk.py [WORD ..]     only checks whose name holds one of the words
Address, key and model: CHECKED_URL, CHECKED_KEY, CHECKED_MODEL.
"""

import asyncio
import json
from enum import Enum
from typing import Annotated

import openai
from pydantic import BaseModel, Field

from checks import BASE, KEY, MODEL, ask, check, metric, run, wait_for

client = openai.OpenAI(base_url=BASE + "/v1", api_key=KEY, max_retries=0, timeout=120)
QUESTION = [{"role": "user", "content": "Name three rivers of Europe."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}}


def chat(**fields):
    settings = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24} | fields
    return client.chat.completions.create(**settings)


def complete(**fields):
    settings = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8} | fields
    return client.completions.create(**settings)


def refused(kind, call):
    """The error that the call ends with."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def is_weather(arguments):
    value = json.loads(arguments)
    assert set(value) == {"city", "unit"}, value
    assert isinstance(value["city"], str) and len(value["city"]) <= 20, value
    assert value["unit"] in ("celsius", "fahrenheit"), value


@check("models are listed, with their context")
def _():
    models = client.models.list().data
    assert MODEL in [model.id for model in models], models
    model = client.models.retrieve(MODEL)
    assert model.id == MODEL and model.model_dump()["max_model_len"] > 0, model
    return f"max_model_len {model.model_dump()['max_model_len']}"


@check("chat answers, and counts tokens")
def _():
    answer = chat()
    assert answer.object == "chat.completion" and answer.id and answer.created > 0, answer
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content, choice
    assert choice.finish_reason in ("stop", "length"), choice
    usage = answer.usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 24, usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    return repr(choice.message.content[:60])


@check("chat takes content in parts, and a system's message")
def _():
    parts = [{"type": "text", "text": "Name three rivers of Europe."}]
    assert chat(messages=[{"role": "user", "content": parts}]).choices[0].message.content == chat().choices[0].message.content
    messages = [{"role": "system", "content": "Answer with one word."}, *QUESTION]
    assert chat(messages=messages).usage.prompt_tokens > 0


@check("text completions answer: a text, texts, token ids")
def _():
    one = complete()
    assert one.object == "text_completion" and one.choices[0].text, one
    two = complete(prompt=["The capital of France is", "The capital of Italy is"])
    assert [choice.index for choice in two.choices] == [0, 1], two
    assert two.choices[0].text == one.choices[0].text, (one, two)
    _, _, tokens = ask("POST", "/tokenize", {"prompt": "The capital of France is"})
    assert tokens["count"] == len(tokens["tokens"]) > 0, tokens
    ids = complete(prompt=tokens["tokens"])
    assert ids.choices[0].text == one.choices[0].text, (one, ids)
    lists = complete(prompt=[tokens["tokens"]] * 2)
    assert [choice.text for choice in lists.choices] == [one.choices[0].text] * 2, lists
    return repr(one.choices[0].text)


@check("chat streams the same answer, with usage at the end")
def _():
    whole = chat()
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    first, *middle, last = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == "", first
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1]), "usage before the end"
    assert last.choices == [] and last.usage == whole.usage, (last, whole.usage)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content, (text, whole)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons[:-1] == [None] * (len(reasons) - 1) and reasons[-1] == whole.choices[0].finish_reason, reasons
    assert all(chunk.usage is None for chunk in chat(stream=True)), "usage that nobody asked for"
    return f"{len(middle)} chunks between"


@check("text completions stream the same answer")
def _():
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert text == complete().choices[0].text, text


@check("tools: a forced function is called, with arguments by its schema")
def _():
    choice = {"type": "function", "function": {"name": "get_weather"}}
    answer = chat(tools=[WEATHER, NOW], tool_choice=choice, max_tokens=200)
    (call,) = answer.choices[0].message.tool_calls
    assert call.type == "function" and call.id and call.function.name == "get_weather", call
    is_weather(call.function.arguments)
    assert answer.choices[0].finish_reason in ("tool_calls", "stop"), answer
    results = [{"role": "tool", "tool_call_id": call.id, "content": "12 degrees, rain"}]
    more = chat(messages=[*QUESTION, answer.choices[0].message, *results], tools=[WEATHER, NOW])
    assert more.choices[0].message.content or more.choices[0].message.tool_calls, more
    return call.function.arguments


@check("tools: any of them must be called")
def _():
    answer = chat(tools=[WEATHER, NOW], tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name in ("get_weather", "now"), call
    assert answer.choices[0].finish_reason == "tool_calls", answer
    json.loads(call.function.arguments)
    return call.function.name


@check("tools: calls stream, with integer indices")
def _():
    choice = {"type": "function", "function": {"name": "get_weather"}}
    calls = {}
    for chunk in chat(tools=[WEATHER], tool_choice=choice, stream=True, max_tokens=200):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert isinstance(delta.index, int), delta
            call = calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
            call["id"] += delta.id or ""
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""
        reason = chunk.choices[0].finish_reason
    assert list(calls) == [0] and calls[0]["id"] and calls[0]["name"] == "get_weather", calls
    is_weather(calls[0]["arguments"])
    assert reason in ("tool_calls", "stop"), reason


@check("tools: none are called where tool_choice is none")
def _():
    answer = chat(tools=[WEATHER], tool_choice="none")
    assert not answer.choices[0].message.tool_calls and answer.choices[0].message.content, answer


class Kind(str, Enum):
    """Of a river."""

    long = "long"
    short = "short"


class River(BaseModel):
    """What the model must fill in."""

    name: Annotated[str, Field(max_length=16)]
    kind: Kind
    countries: Annotated[list[Annotated[str, Field(max_length=12)]], Field(max_length=3)]


@check("a JSON schema is fulfilled")
def _():
    schema = River.model_json_schema() | {"additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "river", "strict": True, "schema": schema}}
    for seed in range(3):
        answer = chat(response_format=form, max_tokens=200, temperature=1, seed=seed).choices[0]
        assert answer.finish_reason == "stop", answer
        River.model_validate_json(answer.message.content)
    parsed = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=River, max_tokens=200, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, River), parsed
    return repr(parsed.choices[0].message.parsed)


@check("a JSON object is one, and streams")
def _():
    form = {"type": "json_object"}
    answer = chat(response_format=form, max_tokens=300).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict), answer
    chunks = chat(response_format=form, max_tokens=300, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.message.content, (text, answer)


@check("logprobs of a chat")
def _():
    answer = chat(logprobs=True, top_logprobs=3, max_tokens=6)
    entries = answer.choices[0].logprobs.content
    assert len(entries) in (answer.usage.completion_tokens, answer.usage.completion_tokens - 1), answer
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True) and tops[0] <= 0, entry
        assert entry.token == entry.top_logprobs[0].token and abs(entry.logprob - tops[0]) < 1e-4, entry
        assert bytes(entry.bytes).decode(errors="replace"), entry
    assert chat().choices[0].logprobs is None


@check("logprobs of a text completion, of the prompt too")
def _():
    answer = complete(logprobs=2)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert all(-60 < value <= 0 for value in found.token_logprobs), found
    echoed = complete(logprobs=1, echo=True, max_tokens=1)
    found = echoed.choices[0].logprobs
    count = echoed.usage.prompt_tokens + echoed.usage.completion_tokens
    assert len(found.token_logprobs) == count and found.token_logprobs[0] is None, found
    assert all(value <= 0 for value in found.token_logprobs[1:]), found
    assert echoed.choices[0].text.startswith("The capital of France is"), echoed


@check("n answers")
def _():
    answer = chat(n=3, temperature=1, seed=1, max_tokens=8)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2], answer
    streamed = {}
    for chunk in chat(n=3, temperature=1, seed=1, max_tokens=8, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed == {choice.index: choice.message.content for choice in answer.choices}, (streamed, answer)
    return f"{len(set(streamed.values()))} different"


@check("a stop text ends an answer before itself")
def _():
    whole = complete(max_tokens=24).choices[0].text
    stop = whole[len(whole) // 2 :][:4]
    wanted = whole[: whole.index(stop)]
    answer = complete(max_tokens=24, stop=[stop, "\u0007"]).choices[0]
    assert (answer.text, answer.finish_reason) == (wanted, "stop"), (answer, stop)
    chunks = list(complete(max_tokens=24, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted, chunks


@check("the same seed gives the same answer, alone or beside others")
def _():
    def answer(seed):
        return chat(temperature=1, top_p=0.95, seed=seed).choices[0].message.content

    async def beside(count):
        crowd = openai.AsyncOpenAI(base_url=BASE + "/v1", api_key=KEY, max_retries=0)
        settings = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, "temperature": 1, "top_p": 0.95}
        calls = [crowd.chat.completions.create(seed=seed, **settings) for seed in range(count)]
        answers = [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]
        await crowd.close()
        return answers

    first = answer(3)
    assert answer(3) == first
    crowd = asyncio.run(beside(6))
    assert crowd[3] == first, (crowd, first)
    return f"{len(set(crowd))} different of 6 seeds"


@check("max_tokens ends an answer by length")
def _():
    answer = chat(max_tokens=3, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3, answer


@check("keys and values: what was stored is reported")
def _():
    answer = chat(extra_body={"kv": {"format": "layered", "ratio": 4}})
    stored = answer.model_extra["kv"]
    assert stored["format"], stored
    return json.dumps(stored)


@check("errors: unknown model, wrong key, no key")
def _():
    error = refused(openai.NotFoundError, lambda: chat(model="no-such-model"))
    assert error.code == "model_not_found", error.body
    other = client.with_options(api_key="wrong")
    error = refused(openai.AuthenticationError, lambda: other.models.list())
    assert error.status_code == 401 and error.body["message"], error.body
    status, _, body = ask("GET", "/v1/models", key="")
    assert status == 401 and body["error"]["message"], body
    status, _, _ = ask("GET", "/health", key="")
    assert status == 200, status


@check("errors: a prompt over the context")
def _():
    context = client.models.retrieve(MODEL).model_dump()["max_model_len"]
    error = refused(openai.BadRequestError, lambda: complete(prompt=[5] * (context + 1), max_tokens=1))
    assert error.code == "context_length_exceeded", error.body
    assert error.body["type"] == "exceed_context_size_error", error.body
    assert "maximum context length" in error.message and str(context) in error.message, error.message
    return error.body["message"]


@check("errors: parameters that cannot be")
def _():
    wrong = {
        "temperature": {"temperature": -1},
        "top_p": {"top_p": 2},
        "n": {"n": 0},
        "top_logprobs": {"logprobs": True, "top_logprobs": 21},
        "response_format": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "nothing"}}}},
        "tool_choice": {"tool_choice": "required"},
    }
    for param, fields in wrong.items():
        error = refused(openai.BadRequestError, lambda: chat(**fields))
        assert error.type == "invalid_request_error" and error.param == param, (param, error.body)
    status, _, body = ask("POST", "/v1/chat/completions", b"{not json")
    assert status == 400 and body["error"]["type"] == "invalid_request_error", body
    status, _, body = ask("POST", "/v1/chat/completions", {"model": MODEL, "messages": []})
    assert status == 400 and body["error"]["message"], body
    status, _, _ = ask("GET", "/v1/no-such-thing")
    assert status == 404, status


@check("responses answer and stream")
def _():
    fields = {"model": MODEL, "input": QUESTION, "instructions": "Be brief.", "temperature": 0, "max_output_tokens": 16}
    whole = client.responses.create(**fields)
    assert whole.output_text and whole.usage.output_tokens <= 16, whole
    said, last = "", None
    for event in client.responses.create(stream=True, **fields):
        if event.type == "response.output_text.delta":
            said += event.delta
        last = event
    assert said == whole.output_text, (said, whole.output_text)
    assert last.type in ("response.completed", "response.incomplete") and last.response.usage == whole.usage, last
    return whole.output_text[:40]


@check("contexts: read once, asked twice")
def _():
    story = " ".join(f"River number {n} is {n * 17} km long." for n in range(1, 300))
    fields = {"name": "rivers", "messages": [{"role": "system", "content": story}]}
    status, _, card = ask("POST", "/v1/kv/contexts", fields)
    assert status == 201 and card["tokens"] > 2048, (status, card)
    answers = [chat(extra_body={"kv": {"context": "rivers"}}) for _ in range(2)]
    assert answers[0].choices == answers[1].choices, answers
    for answer in answers:
        assert answer.usage.prompt_tokens_details.cached_tokens >= card["tokens"], answer.usage
    status, _, gone = ask("DELETE", "/v1/kv/contexts/rivers")
    assert status == 200 and gone["deleted"], gone
    return f"{card['tokens']} tokens, ratio {card['ratio']:.1f}"


@check("a request's id comes back")
def _():
    _, headers, _ = ask("GET", "/v1/models", headers={"x-request-id": "river-17"})
    assert headers["x-request-id"] == "river-17", headers
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=QUESTION, max_tokens=1)
    assert raw.headers["x-request-id"] and raw.parse().choices, raw.headers


@check("who leaves in the middle of a stream stops it")
def _():
    stream = chat(stream=True, max_tokens=1500, extra_body={"ignore_eos": True})
    for count, _chunk in enumerate(stream):
        if count == 3:
            break
    running = metric("vllm:num_requests_running")
    assert running == 1, running
    stream.close()
    wait_for("the request ends", lambda: metric("vllm:num_requests_running") == 0, 10)


@check("introspection")
def _():
    for path in ("/health", "/version", "/ping", "/openapi.json", "/slots", "/props", "/metrics"):
        status, _, body = ask("GET", path)
        assert status == 200, (path, status, body)
    _, _, tokens = ask("POST", "/tokenize", {"content": "Rhine"})
    _, _, text = ask("POST", "/detokenize", {"tokens": tokens["tokens"]})
    assert "Rhine" in json.dumps(text), text


if __name__ == "__main__":
    run()
