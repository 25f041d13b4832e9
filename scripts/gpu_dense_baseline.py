#!/usr/bin/env python3
"""How fast is attention of prompts with PyTorch's flash attention and cuDNN? Beside `gpu_dense`, at the same sizes.

usage: gpu_dense_baseline.py

`scaled_dot_product_attention`, causal, f16, 32/8 heads with keys and values repeated before (not timed). Prints a line of JSON for each size.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

H, G = 32, 8


def median_seconds(work):
    for _ in range(3):
        work()
    times = []
    for _ in range(11):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
    for d, tokens in ((128, 2048), (128, 8192), (128, 32768), (64, 8192), (64, 32768)):
        q = torch.randn(1, H, tokens, d, device="cuda", dtype=torch.float16)
        k, v = (torch.randn(1, G, tokens, d, device="cuda", dtype=torch.float16).repeat_interleave(H // G, 1) for _ in range(2))
        try:
            with sdpa_kernel(backend):
                seconds = median_seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        except RuntimeError as e:
            print(f'{{"torch": "{name}", "attention": {d}, "new": {tokens}, "why": {str(e)[:80]!r}}}')
            continue
        flops = 4 * tokens * (tokens + 1) / 2 * H * d
        print(f'{{"torch": "{name}", "attention": {d}, "new": {tokens}, "us": {seconds * 1e6:.1f}, "tflop_s": {flops / seconds / 1e12:.1f}}}')
x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
w = torch.randn(28672, 4096, device="cuda", dtype=torch.bfloat16)
seconds = median_seconds(lambda: x @ w.T)
print(f'{{"torch": "matmul", "rows": 28672, "cols": 4096, "tokens": 4096, "us": {seconds * 1e6:.1f}, "tflop_s": {2 * 4096 * 4096 * 28672 / seconds / 1e12:.1f}}}')
print(f'{{"torch": "{torch.__version__}", "device": "{torch.cuda.get_device_name()}"}}')
