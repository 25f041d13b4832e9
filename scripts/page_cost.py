#!/usr/bin/env python3
"""What does it cost an answer that somebody looks at the page? The time between its tokens with and without, in turn.

usage: page_cost.py MOSAICKV MODEL TEXT [ROUNDS]

  MOSAICKV   the binary
  MODEL      what `mosaickv serve` takes
  TEXT       a file with a long text, of which 24,000 characters are read
  ROUNDS     answers with and as many without; 4 unless told

Asks as the page does: the figures once a second, the mosaic of the answer that runs every two. Prints milliseconds a token.
"""

import json
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request

from a_server import free_port, serving

TOKENS = 1000


def get(url):
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


def look(url, until):
    """Returns how many mosaics were seen, and the bytes of the last one."""
    seen, size, tick = 0, 0, 0
    while not until.wait(1):
        live = get(url + "/v1/kv/live")
        tick += 1
        if tick % 2 == 0 and live["requests"]:
            try:
                with urllib.request.urlopen(f"{url}/v1/kv/mosaic/{live['requests'][0]['id_task']}", timeout=60) as answer:
                    seen, size = seen + 1, len(answer.read())
            except urllib.error.HTTPError:
                pass  # It has ended meanwhile.
    return seen, size


def answer(url, prompt):
    """Milliseconds between two tokens, mean of all but the first."""
    body = {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + "/v1/completions", data=data, headers={"Content-Type": "application/json"})
    times = []
    with urllib.request.urlopen(request, timeout=600) as events:
        for line in events:
            if line.startswith(b"data: {"):
                times.append(time.monotonic())
    return (times[-1] - times[0]) / (TOKENS - 1) * 1e3


def main():
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    mosaickv, model, text = sys.argv[1:4]
    rounds = int(sys.argv[4]) if len(sys.argv) == 5 else 4
    with open(text) as file:
        prompt = file.read()[:24_000]
    port = free_port()
    with serving([mosaickv, "serve", model, "--port", str(port)], port) as (url, _):
        answer(url, prompt)
        without, beside, seen = [], [], []
        for _ in range(rounds):
            without.append(answer(url, prompt))
            until, results = threading.Event(), []
            looker = threading.Thread(target=lambda: results.append(look(url, until)))
            looker.start()
            beside.append(answer(url, prompt))
            until.set()
            looker.join()
            seen.append(results[0])
    mean = [statistics.median(times) for times in (without, beside)]
    print(f"nobody looks: {', '.join(f'{ms:.3f}' for ms in without)} ms a token, median {mean[0]:.3f}")
    print(f"somebody looks: {', '.join(f'{ms:.3f}' for ms in beside)}, median {mean[1]:.3f}: {100 * (mean[1] / mean[0] - 1):+.2f} %")
    print(f"mosaics seen and bytes of the last one: {seen}")


main()
