#!/usr/bin/env python3
"""MosaicKV and llama.cpp's server under the same load and with the same bytes for keys and values, one after the other.

usage: compare_servers.py LLAMA_SERVER MODEL.gguf TEXT [--binary target/release/mosaickv] [--kv exact,layered]
                          [--memory-mb 300] [--users 12] [--seconds 180] [--chars 12000] [--tokens 128] [--rounds 1]

  LLAMA_SERVER  llama.cpp's llama-server; its cache is f16, shared by as many slots as whole requests fit
  TEXT          a file with a long text; each request asks about another piece of it of CHARS characters

The load is scripts/clients/locustfile.py: users who ask, read the answer as it streams, and ask again. Needs `locust` on the path, and both
programs built with optimizations. Two threads on both sides. Prints a Markdown table; what locust says goes to stderr.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile

from a_server import free_port, serving

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES = {"first": "time to the first token", "next": "time between two tokens", "answer": "answer"}


def peak_mb(process):
    with open(f"/proc/{process.pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def load(url, name, args):
    """Rows of locust's statistics by name."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LOAD_TEXT": args.text, "LOAD_CHARS": str(args.chars), "LOAD_TOKENS": str(args.tokens)}
        environment["CHECKED_MODEL"] = name
        command = ["locust", "-f", f"{HERE}/clients/locustfile.py", "--headless", "--only-summary", "--csv", f"{folder}/load"]
        command += ["--users", str(args.users), "--spawn-rate", str(args.users), "--run-time", f"{args.seconds}s"]
        command += ["--host", url]
        subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
        with open(f"{folder}/load_stats.csv") as file:
            return {row["Name"]: row for row in csv.DictReader(file)}


def measure(label, command, port, name, args):
    with serving(command, port) as (url, process):
        rows = load(url, name, args)
        peak = peak_mb(process)
    first, following, answer = (rows.get(NAMES[key]) for key in ("first", "next", "answer"))
    if not first or not following or not answer:
        sys.exit(f"{label}: no answer in {args.seconds} s; give it more --seconds")
    count, failed = int(answer["Request Count"]), int(answer["Failure Count"])
    done = count - failed
    cells = [label, str(done), str(failed), f"{done * args.tokens / args.seconds:.1f}"]
    cells += [f"{float(first[at]) / 1e3:.1f}" for at in ("50%", "99%")]
    cells += [f"{float(following[at]):.0f}" for at in ("50%", "99%")]
    print("| " + " | ".join([*cells, f"{peak:.0f}"]) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama")
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--binary", default="target/release/mosaickv")
    parser.add_argument("--kv", default="exact,layered")
    parser.add_argument("--memory-mb", type=int, default=300)
    parser.add_argument("--bytes-a-token", type=int, default=23040, help="f16 keys and values of one token; SmolLM2-135M's unless told")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=180)
    parser.add_argument("--chars", type=int, default=12000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    tokens = args.memory_mb * 1_000_000 // args.bytes_a_token
    # At least 3.6 characters a token, the chat's frame, and the answer: more slots would run out of cache together.
    slots = max(1, min(args.users, tokens // (int(args.chars / 3.6) + 64 + args.tokens)))
    head = ["server", "answers", "failed", "tokens/s", "first token, s: median", "99 %", "between tokens, ms: median", "99 %", "peak MB"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|", flush=True)
    for _ in range(args.rounds):
        port = free_port()
        command = [args.llama, "-m", args.model, "--host", "127.0.0.1", "--port", str(port), "-t", "2", "-tb", "2"]
        command += ["-c", str(tokens), "-np", str(slots), "--kv-unified", "-fa", "on", "--no-webui"]
        measure(f"llama-server, {slots} slots", command, port, "", args)
        for kv in args.kv.split(","):
            port = free_port()
            command = [args.binary, "serve", args.model, "--port", str(port), "--threads", "2", "--kv", kv]
            command += ["--kv-memory", f"{args.memory_mb}MB"]
            measure(f"mosaickv, {kv}", command, port, "", args)


main()
