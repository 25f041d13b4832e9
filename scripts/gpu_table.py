#!/usr/bin/env python3
"""The short table of what `scripts/gpu-check` left in FOLDER:

    scripts/gpu_table.py FOLDER

Decode attention of one layer (kernels.jsonl, torch.jsonl), then whole models (gpu.json, decode-cuda.json, decode-cpu.json). What is missing is left out.
"""
import json
import os
import sys


def lines(name):
    try:
        with open(os.path.join(sys.argv[1], name)) as file:
            return [json.loads(line) for line in file if line.startswith("{")]
    except OSError:
        return []


def report(name):
    try:
        with open(os.path.join(sys.argv[1], name)) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {"rows": []}


def attention():
    rows = {}
    for row in lines("kernels.jsonl") + lines("torch.jsonl"):
        if "context" in row and "batch" in row:
            rows.setdefault((row["context"], row["batch"]), {}).update(row)
    times = [("exact", "exact_s"), ("SDPA", "sdpa_s"), ("Triton", "triton_s"), ("packed", "packed_s"), ("layered", "layered_s")]
    print(f"{'one layer, us':<22}" + "".join(f"{name:>9}" for name, _ in times) + f"{'exact/layered':>15}")
    for (context, batch), row in sorted(rows.items()):
        cells = "".join(f"{row[key] * 1e6:9.0f}" if row.get(key) else f"{'-':>9}" for _, key in times)
        factor = row["exact_s"] / row["layered_s"] if row.get("exact_s") and row.get("layered_s") else 0
        print(f"{context:>9} x {batch:<10}" + cells + (f"{factor:14.1f}x" if factor else ""))


def models():
    print(f"\n{'a step, ms':<34}{'kv':<10}{'TBT':>9}{'tokens/s':>10}{'GB of KV':>10}")
    for name, of, size in [("gpu.json", "8B shape", "context"), ("decode-cuda.json", "model, GPU", "depth"), ("decode-cpu.json", "model, CPU", "depth")]:
        for row in report(name)["rows"]:
            what = f"{of}, {row[size]} x {row['batch']}"
            print(f"{what:<34}{row['kv']:<10}{row['tbt_ms']:9.2f}{row['tokens_per_s']:10.0f}{row['kv_bytes'] / 1e9:10.2f}")


if len(sys.argv) != 2:
    sys.exit(__doc__)
attention()
models()
