#!/usr/bin/env python3
"""How soon does a server that was started again answer about a saved document, and how soon without having saved it?

usage: saved_context.py MOSAICKV MODEL TEXT [TOKENS]

  MOSAICKV   the binary
  MODEL      what `mosaickv serve` takes
  TEXT       a file with a long text
  TOKENS     tokens of it that are read, about; 7,000 unless told

Starts servers of its own, which share a temporary folder. Prints a Markdown table: the time to the first token of a question about the
text, read as a prompt; and from its saved context, by a server that has just been started.
"""

import json
import os
import sys
import tempfile
import time
import urllib.request

from a_server import free_port, serving

QUESTION = "\n\nIn short, what was told so far:"


def post(url, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)


def first_token(url, body):
    """Seconds until the first token, and tokens of the prompt that were there before."""
    fields = {"max_tokens": 4, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    start, first, cached = time.monotonic(), None, 0
    with post(url + "/v1/completions", body | fields) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                first = first or time.monotonic() - start
                event = json.loads(line[6:])
                if event.get("usage"):
                    cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    return first, cached


def main():
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    mosaickv, model, path = sys.argv[1:4]
    wanted = int(sys.argv[4]) if len(sys.argv) == 5 else 7000
    with open(path) as file:
        text = file.read()
    with tempfile.TemporaryDirectory() as folder:
        def server():
            port = free_port()
            return serving([mosaickv, "serve", model, "--port", str(port), "--contexts", folder], port)

        with server() as (url, _):
            with post(url + "/tokenize", {"prompt": text[: 8 * wanted]}) as answer:
                tokens = json.load(answer)["tokens"][:wanted]
            with post(url + "/detokenize", {"tokens": tokens}) as answer:
                document = json.load(answer)["prompt"]
            whole, cached = first_token(url, {"prompt": document + QUESTION})
            assert cached == 0
            start = time.monotonic()
            with post(url + "/v1/kv/contexts", {"name": "document", "prompt": document}) as answer:
                card = json.load(answer)
            made = time.monotonic() - start
            size = os.path.getsize(f"{folder}/document.context")
        print("| | seconds to the first token | tokens that were not read |")
        print("|---|---:|---:|")
        print(f"| {len(tokens)} tokens as a prompt | {whole:.2f} | 0 |")
        for i in range(3):
            with server() as (url, _):
                first, cached = first_token(url, {"prompt": QUESTION, "kv": {"context": "document"}})
                again, _ = first_token(url, {"prompt": "\n\nThe hero of this is", "kv": {"context": "document"}})
            print(f"| saved, restart {i + 1}: first question | {first:.3f} ({whole / first:.0f}x) | {cached} |")
            print(f"| second question | {again:.3f} ({whole / again:.0f}x) | {cached} |")
        print(f"\n{card['format']}: {card['stored_bytes'] / 1e6:.1f} MB for {card['exact_bytes'] / 1e6:.1f}, a file of {size / 1e6:.1f} MB, made in {made:.1f} s.")


if __name__ == "__main__":
    main()
