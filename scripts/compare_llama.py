#!/usr/bin/env python3
"""MosaicKV and llama.cpp on the same file in one run: prefill and decode, round by round in turn (A B A B).

usage: compare_llama.py LLAMA_CPP_BUILD MODEL.gguf [--depths 0,2048,8192] [--rounds 2] [--binary target/release/mosaickv]

Two threads on both sides, f16 KV, llama.cpp with flash attention off and on (the better one counts). Prints a
markdown table of medians; every reading goes to stderr. Needs `cargo build --release` and a built llama-bench.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

SCRIPTS = os.path.dirname(os.path.abspath(__file__))
PREFILL = 512
STEPS = 32


def ours(binary, model, depths):
    """{('prefill', kv) or (depth, kv): tokens a second}"""
    command = [binary, "bench", "decode", "--model", model, "--threads", "2", "--rounds", "1", "--json"]
    command += ["--steps", str(STEPS), "--depth", ",".join(str(d) for d in [PREFILL + STEPS, *depths])]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    out = {"stream GB/s": report["machine"]["stream_gb_s"]}
    for row in report["rows"]:
        if row["depth"] == PREFILL + STEPS:
            out["prefill", row["kv"]] = row["prefill_tokens_per_s"]
        else:
            out[row["depth"], row["kv"]] = row["tokens_per_s"]
    return out


def theirs(build, model, depths):
    """{('prefill' or depth, 'flash off' or 'flash on'): tokens a second}"""
    command = [os.path.join(SCRIPTS, "bench_llama.sh"), build, model, "1", "all"]
    environment = {**os.environ, "DEPTHS": ",".join(map(str, depths)), "DECODE": str(STEPS), "THREADS": "2"}
    record = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    out = {}
    for test in record["bench"]:
        what = "prefill" if test["n_prompt"] else test["n_depth"]
        out[what, "flash on" if test["flash_attn"] else "flash off"] = test["avg_ts"]
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build")
    parser.add_argument("model")
    parser.add_argument("--depths", default="0,2048,8192")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--binary", default="target/release/mosaickv")
    args = parser.parse_args()
    depths = [int(d) for d in args.depths.split(",")]
    readings = {}
    for _ in range(args.rounds):
        for reading in (theirs(args.build, args.model, depths), ours(args.binary, args.model, depths)):
            print(reading, file=sys.stderr)
            for key, value in reading.items():
                readings.setdefault(key, []).append(value)
    median = {key: statistics.median(values) for key, values in readings.items()}
    print(f"{os.path.basename(args.model)}, stream {median['stream GB/s']:.1f} GB/s, {args.rounds} rounds\n")
    print("| tok/s | llama.cpp | exact | exact / llama.cpp | layered |\n|---|---|---|---|---|")
    for what in ["prefill", *depths]:
        llama = max(median[what, "flash off"], median[what, "flash on"])
        exact, layered = median[what, "exact"], median[what, "layered"]
        name = f"prefill {PREFILL}" if what == "prefill" else f"decode, depth {what:,}"
        print(f"| {name} | {llama:.0f} | {exact:.0f} | {exact / llama:.2f} | {layered:.0f} |")


main()
