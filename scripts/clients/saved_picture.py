"""Does `mosaickv inspect` show what a context has that a server saved, as figures and as pictures?

usage: saved_picture.py MOSAICKV MODEL_FILE CONTEXTS TEXT [WORDS...]   address, key and model as for openai_sdk.py

  MODEL_FILE   what the server was started with
  CONTEXTS     the server's folder for contexts
  TEXT         a file with a text of some thousand tokens
"""

import subprocess
import sys

from checks import ask, check, run

MOSAICKV, MODEL_FILE, CONTEXTS, TEXT = (sys.argv.pop(1) for _ in range(4))


@check("a saved context is inspected without reading its text again")
def _():
    with open(TEXT) as file:
        prompt = file.read()
    status, _, made = ask("POST", "/v1/kv/contexts", {"name": "seen", "prompt": prompt, "kv": {"format": "layered:8"}})
    assert status == 201, made
    svg, png = f"{CONTEXTS}/seen.svg", f"{CONTEXTS}/seen.png"
    command = [MOSAICKV, "inspect", "--model", MODEL_FILE, "--context", f"{CONTEXTS}/seen.context", "--svg", svg, "--png", png]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith(f"{made['tokens']} tokens, layered"), done.stdout
    with open(svg) as drawn, open(png, "rb") as pixels:
        assert drawn.read().rstrip().endswith("</svg>")
        assert pixels.read(8) == b"\x89PNG\r\n\x1a\n"
    return last


run()
