"""What the checks of a server share: its address, one printed line a check, and requests without any client library."""

import json
import os
import sys
import time
import traceback
import urllib.error
import urllib.request

BASE = os.environ.get("CHECKED_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("CHECKED_KEY", "")
MODEL = os.environ.get("CHECKED_MODEL", "")

_checks = []


def check(name):
    """Makes a function a check; what it returns is printed behind its name."""

    def keep(function):
        _checks.append((name, function))
        return function

    return keep


def run():
    """Runs all checks in their order; the exit status says whether all were right."""
    only = sys.argv[1:]
    failed = 0
    for name, function in _checks:
        if only and not any(word in name for word in only):
            continue
        start = time.monotonic()
        try:
            said = function()
        except Exception:
            failed += 1
            print(f"FAIL {name}", flush=True)
            traceback.print_exc()
            continue
        told = f": {said}" if said else ""
        print(f"ok   {name} ({time.monotonic() - start:.1f} s){told}", flush=True)
    print(f"{failed} failed" if failed else "all ok", flush=True)
    sys.exit(1 if failed else 0)


def ask(method, path, body=None, key=KEY, headers=None, timeout=120):
    """Status, headers and body of a plain request; the body is JSON where it can be."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(BASE + path, data=data, method=method, headers=headers or {})
    if data is not None:
        request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.headers, _read(answer)
    except urllib.error.HTTPError as answer:
        return answer.code, answer.headers, _read(answer)


def _read(answer):
    text = answer.read().decode()
    try:
        return json.loads(text)
    except ValueError:
        return text


def metric(name):
    """The sum of a metric over its labels."""
    status, _, text = ask("GET", "/metrics")
    assert status == 200, f"/metrics answers {status}"
    lines = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
    assert lines, f"/metrics has no {name}"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def wait_for(what, is_so, seconds):
    """Asks again and again until it is so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)
