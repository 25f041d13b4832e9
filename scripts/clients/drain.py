"""Does a stream that runs while the server is told to end come to its own end?

usage: drain.py PID     of the server; it is sent SIGTERM. Address, key and model as for openai_sdk.py.
"""

import os
import signal
import sys
import time
import urllib.error

import openai

from checks import BASE, KEY, MODEL, ask, check, run, wait_for

PID = int(sys.argv.pop(1))
TOKENS = 150


def is_gone():
    try:
        os.kill(PID, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{PID}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "Z"


@check("a stream runs through SIGTERM to its last token, others are refused, then the server is gone")
def _():
    client = openai.OpenAI(base_url=BASE + "/v1", api_key=KEY, max_retries=0, timeout=120)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell a long story."}],
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = []
    for chunk in stream:
        chunks.append(chunk)
        if len(chunks) == 4:
            os.kill(PID, signal.SIGTERM)
            time.sleep(0.2)
            status, headers, body = ask("GET", "/health", key="")
            assert status == 503, (status, body)
            fields = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
            status, headers, body = ask("POST", "/v1/chat/completions", fields)
            assert status == 503 and int(headers["retry-after"]) >= 0, (status, headers, body)
            assert body["error"]["message"], body
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length", reasons[-3:]
    assert chunks[-1].usage.completion_tokens == TOKENS, chunks[-1]
    wait_for("the server ends", is_gone, 30)
    try:
        ask("GET", "/health", key="")
    except (urllib.error.URLError, ConnectionError):
        return f"{TOKENS} tokens"
    raise AssertionError("somebody still answers")


if __name__ == "__main__":
    run()
