"""Load by many users at once, with locust: each asks about a piece of a long text, reads the answer as it streams, and asks again.

usage: LOAD_TEXT=FILE [LOAD_CHARS=12000] [LOAD_TOKENS=64] [LOAD_KV=layered] CHECKED_MODEL=NAME \\
           locust -f locustfile.py --headless --users 8 --spawn-rate 8 --run-time 2m --host http://127.0.0.1:8000

LOAD_TEXT    the text; every request takes another piece of LOAD_CHARS characters
LOAD_TOKENS  tokens of an answer
LOAD_KV      how keys and values are kept, as after --kv; unless told, as the server does
Beside whole answers there are rows for the time to the first token and the mean time between two tokens.
"""

import itertools
import json
import os
import time

from locust import HttpUser, events, task

MODEL = os.environ.get("CHECKED_MODEL", "")
KEY = os.environ.get("CHECKED_KEY", "")
CHARS = int(os.environ.get("LOAD_CHARS", "12000"))
TOKENS = int(os.environ.get("LOAD_TOKENS", "64"))
KV = os.environ.get("LOAD_KV")
with open(os.environ["LOAD_TEXT"]) as file:
    TEXT = file.read()
assert len(TEXT) > CHARS, f"LOAD_TEXT has {len(TEXT)} characters, wanted more than {CHARS}"
places = itertools.count()


def record(name, seconds, error=None):
    events.request.fire(request_type="SSE", name=name, response_time=seconds * 1e3, response_length=0, exception=error)


class Reader(HttpUser):
    @task
    def ask(self):
        begin = next(places) * 7919 % (len(TEXT) - CHARS)
        body = {
            "messages": [{"role": "user", "content": TEXT[begin : begin + CHARS] + "\n\nWhat is told here?"}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        if MODEL:
            body["model"] = MODEL
        if KV:
            body["kv"] = {"format": KV}
        headers = {"Authorization": f"Bearer {KEY}"} if KEY else {}
        start = time.monotonic()
        first, last, tokens = None, None, 0
        with self.client.post("/v1/chat/completions", json=body, headers=headers, stream=True, catch_response=True, name="answer") as answer:
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {answer.text[:200]}")
                return
            for line in answer.iter_lines():
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    answer.failure(event["error"]["message"])
                    return
                if any(choice["delta"].get("content") for choice in event["choices"]):
                    last = time.monotonic()
                    first = first or last
                    tokens += 1
        if first is None:
            return
        record("time to the first token", first - start)
        if tokens > 1:
            record("time between two tokens", (last - first) / (tokens - 1))
