#!/usr/bin/env python3
"""What does llama.cpp compute for this model? Writes the numbers that the model crate's tests are held to.

usage: llama_reference.py --llama DIR --model Q4_1.gguf [--f32 F32.gguf] [--release TEXT] [--threads 2] [--out JSON]
       [--about NAME] [--kind q4_1] [--tokens 2000] [--base BOS]

The defaults are SmolLM2's. --base is for a base model: its BOS token, written before every text; no chat prompt.

DIR is a llama.cpp source tree built in DIR/build with shared libraries. llama_reference.cpp (beside this file) is
compiled against it. The F32 file is the same model, dequantized:
    llama-quantize --allow-requantize Q4_1.gguf F32.gguf F32
It has no rounding of activations to 8 bits, which llama.cpp does for every quantized weight; its distance to the
first run is the yardstick for how close an implementation in floating point can be expected to come.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
DATA = HERE.parent / "crates/model/tests/data"
STEPS = 96  # of each greedy continuation
CONTEXT = 2048
BATCH = 512
NEAR_TIE = 0.1  # nats between the two most probable tokens, below which a rounding may swap them

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PROMPTS = {
    "chat": CHAT.format("Why does the moon change its shape over a month?"),
    "prose": "The harbour was empty when the last boat came in. Nobody on the quay spoke, for",
    "code": 'def median(values: list[float]) -> float:\n    """Return the median of a non-empty list."""\n',
    "list": "Things to pack for a week in the mountains:\n1. A warm coat\n2. Two pairs of boots\n3.",
    "dialogue": '"You are late," said the clockmaker.\n"The train was late," the girl replied.\n',
}


class Llama:
    """One loaded model; each request is answered with one JSON object."""

    def __init__(self, program, model, batch, flash, threads):
        words = [program, model, CONTEXT, batch, int(flash), threads, 1]
        pipe = subprocess.PIPE
        # Threads that sleep at a barrier: on a busy machine spinning ones take thirty times as long.
        env = os.environ | {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
        self.process = subprocess.Popen([str(word) for word in words], stdin=pipe, stdout=pipe, text=True, env=env)
        self.system = self.answer()["system"].strip()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"llama_reference ended early ({self.process.wait()})")
        return json.loads(line)

    def ask(self, request):
        print(request, file=self.process.stdin, flush=True)
        return self.answer()

    def greedy(self, text, folder):
        found = self.ask(f"greedy {STEPS} {written(text, folder)}")
        gaps = [step[1] - step[3] for step in found["top2"]]
        return {
            "prompt_ids": found["prompt"],
            "continuation": found["continuation"],
            "text": bytes.fromhex(found["text_hex"]).decode("utf-8", "replace"),
            "top2": [[a, round(p, 6), b, round(q, 6)] for a, p, b, q in found["top2"]],
            "near_ties": [i for i, gap in enumerate(gaps) if gap < NEAR_TIE],
        }

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def written(text, folder):
    path = folder / "text.txt"
    path.write_bytes(text.encode())
    return path


def build(llama, folder):
    program = folder / "llama_reference"
    libraries = llama / "build/bin"
    command = ["c++", "-O2", "-std=c++17", HERE / "llama_reference.cpp", "-o", program]
    command += [f"-I{llama}/include", f"-I{llama}/ggml/include", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    subprocess.run(command + ["-lllama", "-lggml", "-lggml-base"], check=True)
    return program


def versions(llama):
    names = [(llama / "build/bin" / f"lib{name}.so").resolve().name for name in ("llama", "ggml")]
    return ", ".join(names)


def distance(left, right):
    """How far two scored runs are apart, in nats, and how often their most probable token agrees."""
    gaps = sorted(abs(a - b) for a, b in zip(left["logprobs"], right["logprobs"], strict=True))
    same = sum(a == b for a, b in zip(left["top1"], right["top1"], strict=True))
    return {
        "mean_abs": round(sum(gaps) / len(gaps), 6),
        "p99_abs": round(gaps[int(0.99 * len(gaps))], 6),
        "max_abs": round(gaps[-1], 6),
        "mean_signed": round(sum(b - a for a, b in zip(left["logprobs"], right["logprobs"])) / len(gaps), 6),
        "top1_agreement": round(same / len(gaps), 6),
    }


def perplexity(run):
    return round(math.exp(-sum(run["logprobs"]) / len(run["logprobs"])), 5)


def measure(arguments, program, folder):
    """All runs by name, the greedy continuations by weights, and the system line."""
    runs, greedy, system, kind = {}, {}, "", arguments.kind
    kinds = [(kind, arguments.model, BATCH, False), (f"{kind}_flash", arguments.model, BATCH, True)]
    kinds.append((f"{kind}_one_by_one", arguments.model, 1, False))
    if arguments.f32:
        kinds.append(("f32", arguments.f32, BATCH, False))
    text = arguments.base + (DATA / "thursday.txt").read_bytes().decode()
    for name, model, batch, flash in kinds:
        print(f"{name}: n_batch {batch}, flash attention {flash}", flush=True)
        llama = Llama(program, model, batch, flash, arguments.threads)
        runs[name] = llama.ask(f"score {arguments.tokens} {written(text, folder)}")
        if name in (kind, "f32"):
            greedy[name] = {prompt: llama.greedy(text, folder) for prompt, text in prompts(arguments.base).items()}
        system = llama.system
        llama.close()
    return runs, greedy, system


def prompts(base):
    return {name: base + text for name, text in PROMPTS.items() if not (base and name == "chat")}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--f32", type=pathlib.Path)
    parser.add_argument("--release", default="unnamed", help="which release of llama.cpp this is, for the record")
    parser.add_argument("--about", default="SmolLM2-135M-Instruct Q4_1", help="the model, for the record")
    parser.add_argument("--kind", default="q4_1", help="type of the weights, in the names of the runs")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of the text that are scored")
    parser.add_argument("--base", default="", metavar="BOS", help="a base model, and its BOS token")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=DATA / "smollm2_reference.json")
    return parser.parse_args()


def main():
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs, greedy, system = measure(arguments, build(arguments.llama, folder), folder)
    f32 = f" --f32 {arguments.f32.name}" if arguments.f32 else ""
    command = f"scripts/llama_reference.py --llama LLAMA_CPP --model {arguments.model.name}{f32}"
    kind, base = arguments.kind, arguments.base
    if base:
        command += f" --about '{arguments.about}' --kind {kind} --tokens {arguments.tokens} --base '{base}'"
    record = {
        "about": f"llama.cpp on {arguments.about}; natural logarithms; logprobs[i] is that of ids[i + 1] "
        f"after ids[..= i], top1[i] the most probable id there; {base or 'no BOS'} before every text; KV cache f16; "
        f"runs by name: {kind} and f32 with n_batch = n_ubatch = {BATCH} and flash attention off, {kind}_flash with it "
        f"on, {kind}_one_by_one with n_batch 1 (decode); greedy continuations feed the prompt in one batch, then one "
        f"token at a time, stop after an end token, top2 = [id, logprob, id, logprob], near_ties = steps whose "
        f"two best are less than {NEAR_TIE} apart",
        "command": f"{command} --threads {arguments.threads}",
        "llama_cpp": f"{arguments.release}; {versions(arguments.llama)}",
        "system": system,
        "text": "thursday.txt",
        "perplexity": {name: perplexity(run) for name, run in runs.items()},
        f"distance_to_{kind}": {name: distance(runs[kind], run) for name, run in runs.items() if name != kind},
        "ids": runs[kind]["ids"],
        "runs": {
            name: {"logprobs": [round(value, 6) for value in run["logprobs"]], "top1": run["top1"]}
            for name, run in runs.items()
        },
        "prompts": prompts(base),
        "greedy": greedy,
    }
    arguments.out.write_text(write(record))
    print(json.dumps({key: record[key] for key in ("perplexity", f"distance_to_{kind}")}, indent=1))


def write(record):
    """One line an array, so that a change shows in a diff."""
    compact = {"separators": (",", ":"), "ensure_ascii": False}
    lines = []
    for key, value in record.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(part, **compact)}" for name, part in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, **compact)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
