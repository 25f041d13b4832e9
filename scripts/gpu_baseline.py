#!/usr/bin/env python3
"""How fast is decode attention with what PyTorch brings? Beside `gpu_check`, at the same sizes.

usage: gpu_baseline.py FOLDER [SECONDS]

`scaled_dot_product_attention` with grouped heads and a split-KV kernel in Triton, both f16, 32/8 heads, head_dim 128; each checked against
f64 on some heads first. Medians of CUDA graphs of several steps over different memory. Adds to FOLDER/torch.jsonl, and prints a table
with what FOLDER/kernels.jsonl has.
"""

import json
import os
import sys
import time

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

H, G, D = 32, 8, 128
R = H // G
SIZES = [(262144, 4), (1048576, 1), (262144, 1)] + [
    (t, b) for t in (32768, 131072, 262144, 1048576) for b in (1, 4, 8) if (t, b) not in ((262144, 4), (1048576, 1), (262144, 1))
]

if triton:

    @triton.jit
    def split_kernel(q, k, v, part, top, total, scale, tokens, span, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
        head = tl.program_id(0)
        split = tl.program_id(1)
        splits = tl.num_programs(1)
        rows = tl.arange(0, 16)
        d = tl.arange(0, D)
        queries = tl.load(q + (head * R + rows[:, None]) * D + d[None, :], mask=rows[:, None] < R, other=0.0)
        first = split * span
        end = tl.minimum(first + span, tokens)
        base = head.to(tl.int64) * tokens * D
        m = tl.full([16], -float("inf"), tl.float32)
        z = tl.zeros([16], tl.float32)
        acc = tl.zeros([16, D], tl.float32)
        for start in range(first, end, BLOCK):
            t = start + tl.arange(0, BLOCK)
            keys = tl.load(k + base + t[None, :] * D + d[:, None], mask=t[None, :] < end, other=0.0)
            s = tl.dot(queries, keys) * scale
            s = tl.where(t[None, :] < end, s, -float("inf"))
            new = tl.maximum(m, tl.max(s, 1))
            w = tl.exp2(s - new[:, None])
            old = tl.exp2(m - new)
            z = z * old + tl.sum(w, 1)
            values = tl.load(v + base + t[:, None] * D + d[None, :], mask=t[:, None] < end, other=0.0)
            acc = acc * old[:, None] + tl.dot(w.to(tl.float16), values)
            m = new
        at = (head * splits + split) * 16 + rows
        tl.store(top + at, m)
        tl.store(total + at, z)
        tl.store(part + at[:, None] * D + d[None, :], acc)

    def split_attention(q, k, v, out):
        b, _, tokens, _ = k.shape
        heads = b * G
        splits = max(1, min(128, tokens // 512, (132 * 8) // heads if heads < 132 * 4 else 1))
        splits = max(splits, 16)
        span = -(-tokens // splits // 64) * 64
        part = torch.empty(heads, splits, 16, D, device="cuda")
        top = torch.empty(heads, splits, 16, device="cuda")
        total = torch.empty(heads, splits, 16, device="cuda")
        scale = D**-0.5 * 1.4426950408889634
        split_kernel[(heads, splits)](q, k, v, part, top, total, scale, tokens, span, D, R, 64, num_warps=4, num_stages=3)
        most = top.amax(1, keepdim=True)
        w = torch.exp2(top - most)
        acc = (part * w[..., None]).sum(1) / (total * w).sum(1)[..., None]
        out.copy_(acc[:, :R].reshape(b, H, 1, D))


def sdpa(q, k, v, out):
    out.copy_(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def check(attend, q, k, v):
    out = torch.full((q.shape[0], H, 1, D), float("nan"), device="cuda", dtype=torch.float16)
    attend(q, k, v, out)
    worst = 0.0
    for h in (0, H // 2, H - 1):
        keys, values = k[0, h // R].double(), v[0, h // R].double()
        w = torch.softmax(keys @ q[0, h, 0].double() * D**-0.5, 0)
        want = w @ values
        worst = max(worst, ((out[0, h, 0].double() - want).norm() / want.norm()).item())
    if not worst < 2e-2:
        raise RuntimeError(f"off by {worst}")
    return worst


def seconds(attend, inputs, out, steps):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(2):
            attend(*inputs[i % len(inputs)], out)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(steps):
                attend(*inputs[i % len(inputs)], out)
        times = []
        began = time.time()
        while len(times) < 7 or (len(times) < 100 and time.time() - began < 0.2):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record(stream)
            graph.replay()
            b.record(stream)
            b.synchronize()
            times.append(a.elapsed_time(b))
    return sorted(times)[len(times) // 2] / 1e3 / steps


def main():
    folder, limit = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 90
    began, rows = time.time(), []
    with open(os.path.join(folder, "torch.jsonl"), "w") as file:
        for tokens, batch in SIZES:
            if time.time() - began > limit:
                print(f"skipped for time: {tokens} x {batch}")
                continue
            size = batch * G * tokens * D * 4
            steps = max(2, min(16, -(-(200 << 20) // size)))
            sets = 1 if size > 1 << 30 else steps
            if sets * size + (6 << 30) > torch.cuda.mem_get_info()[0]:
                print(f"no room: {tokens} x {batch}")
                continue
            row = {"context": tokens, "batch": batch}
            try:
                inputs = [
                    (
                        torch.randn(batch, H, 1, D, device="cuda", dtype=torch.float16),
                        torch.randn(batch, G, tokens, D, device="cuda", dtype=torch.float16),
                        torch.randn(batch, G, tokens, D, device="cuda", dtype=torch.float16),
                    )
                    for _ in range(sets)
                ]
                out = torch.empty(batch, H, 1, D, device="cuda", dtype=torch.float16)
                for name, attend in [("triton", split_attention if triton else None), ("sdpa", sdpa)]:
                    if attend is None:
                        continue
                    try:
                        row[name + "_error"] = check(attend, *inputs[0])
                        row[name + "_s"] = seconds(attend, inputs, out, steps)
                    except Exception as e:  # One that fails hides no other.
                        row[name + "_failed"] = str(e).splitlines()[0][:200] if str(e) else repr(e)
            except torch.OutOfMemoryError:
                row["failed"] = "no memory"
            inputs = out = None
            torch.cuda.empty_cache()
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows.append(row)
    ours = {}
    try:
        with open(os.path.join(folder, "kernels.jsonl")) as file:
            for line in file:
                row = json.loads(line)
                if "context" in row:
                    ours[row["context"], row["batch"]] = row
    except (OSError, ValueError) as e:
        print(f"kernels.jsonl: {e}")
    print("\n| context | batch | SDPA us | Triton us | exact us | layered us | layered to the best of PyTorch |\n|---|---|---|---|---|---|---|")
    us = lambda x: "-" if x is None else f"{x * 1e6:.0f}"
    for row in sorted(rows, key=lambda row: (row["context"], row["batch"])):
        mine = ours.get((row["context"], row["batch"]), {})
        best = min([row[name] for name in ("sdpa_s", "triton_s") if name in row], default=None)
        ratio = f"{best / mine['layered_s']:.1f}" if best and mine.get("layered_s") else "-"
        cells = [us(row.get("sdpa_s")), us(row.get("triton_s")), us(mine.get("exact_s")), us(mine.get("layered_s")), ratio]
        print(f"| {row['context']} | {row['batch']} | " + " | ".join(cells) + " |")


main()
