#!/usr/bin/env python3
"""Writes the tiny random models that crates/model/tests/tiny.rs runs, with the logits they must give.

For each architecture: a safetensors folder (bf16) and a GGUF file (f16) of the same weights, and the logits of
transformers for one token sequence, in float32 with eager attention. Every weight is a whole number of 256ths below
one half, so that bf16, f16 and f32 hold it exactly and both files must give the same logits.
Also writes rope.json: the inverse frequencies of transformers' rotary embeddings.

Run:  python scripts/make_tiny_checkpoints.py crates/model/tests/data
Needs torch, transformers 5, tokenizers, safetensors, gguf.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

VOCAB = 288
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = [1 + (37 * i * i + 11 * i) % (VOCAB - 1) for i in range(40)]
SHOWN = [0, 1, 5, 17, 30, 39]  # positions whose logits are kept

SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=0, eos_token_id=2,
    pad_token_id=0, rms_norm_eps=1e-5,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
PLAIN = dict(rope_type="default", rope_theta=10000.0)
MODELS = {
    "llama": LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES, rope_parameters=PLAIN, sliding_window=16, tie_word_embeddings=False),
    "qwen2": Qwen2Config(
        **{k: v for k, v in SIZES.items() if k != "head_dim"} | dict(num_attention_heads=2, num_key_value_heads=1),
        rope_parameters=YARN, tie_word_embeddings=True,
    ),
    "qwen3": Qwen3Config(**SIZES, rope_parameters=PLAIN, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(
        **SIZES | dict(num_hidden_layers=4), rope_parameters=PLAIN, no_rope_layer_interval=4, tie_word_embeddings=True
    ),
    "gemma3": Gemma3TextConfig(
        **SIZES | dict(num_hidden_layers=4), sliding_window=9, query_pre_attn_scalar=16, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
            "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
        },
    ),
}


def tokenizer():
    """A byte-level tokenizer cut as Qwen's is, trained on this file."""
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    from tokenizers import Regex

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(__doc__.splitlines(), trainer)
    assert made.get_vocab_size() <= VOCAB
    return made


def randomize(model):
    """Whole 256ths: matrices spread so that logits differ by several, norms about 1."""
    generator = torch.Generator().manual_seed(20240607)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:  # Gemma's are stored less 1
                values = (0 if model.config.model_type == "gemma3_text" else 1) + 0.15 * noise
            elif name.endswith("bias"):
                values = 0.2 * noise
            else:
                values = noise * (0.9 / parameter.shape[-1] ** 0.5)
            steps = 128 if "norm" in name else 256
            parameter.copy_(torch.round(values * steps).clamp(-255, 255) / steps)


def permute(weight, heads):
    """Rows of queries and keys in the order that llama.cpp's converter writes for interleaved rotary pairs."""
    rest = weight.shape[1:]
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name, family):
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{(GEMMA_NAMES if family == 'gemma3' else NAMES)[part]}.{kind}"


def write_gguf(path, family, config, tensors, inverse_frequencies, vocabulary):
    arch = "llama" if family == "mistral" else family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"tiny {family}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if family in ("mistral", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if family == "gemma3":
        writer.add_uint32("gemma3.attention.sliding_window_pattern", config.layer_types.index("full_attention") + 1)
    tokens = sorted(vocabulary.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(vocabulary.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    padding = [f"[PAD{i}]" for i in range(len(tokens), VOCAB)]
    writer.add_token_list([token for token, _ in tokens] + padding)
    writer.add_token_types([3 if token in SPECIAL else 1 for token, _ in tokens] + [5] * len(padding))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    if rope["rope_type"] == "llama3":
        plain = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / inverse_frequencies).astype(np.float32))
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if arch in ("llama", "smollm3") and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = permute(values, heads)
        if family == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        matrix = values.ndim == 2
        writer.add_tensor(gguf_name(name, family), values.astype(np.float16 if matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(folder, family, config, vocabulary):
    out = folder / family
    out.mkdir(parents=True, exist_ok=True)
    config.architectures = None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.eval()
    randomize(model)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
    tied = config.tie_word_embeddings
    tensors = {n: t.contiguous() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, tensor.bfloat16().float()) and torch.equal(tensor, tensor.half().float()), name
    halves = {name: tensor.bfloat16().clone() for name, tensor in tensors.items()}
    if family == "llama":  # in two shards, as large models come
        first = {n: t for n, t in halves.items() if "layers.1." not in n}
        second = {n: t for n, t in halves.items() if "layers.1." in n}
        files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        save_file(first, out / files[0])
        save_file(second, out / files[1])
        weight_map = {n: files[0] for n in first} | {n: files[1] for n in second}
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    else:
        save_file(halves, out / "model.safetensors")
    settings = config.to_dict()
    settings["architectures"] = [type(model).__name__]
    if family == "mistral":  # as older transformers wrote it
        settings["rope_theta"] = settings.pop("rope_parameters")["rope_theta"]
    (out / "config.json").write_text(json.dumps(settings, indent=1, default=str) + "\n")
    vocabulary.save(str(out / "tokenizer.json"), pretty=False)
    named = {"bos_token": SPECIAL[0], "eos_token": {"content": SPECIAL[2]}, "chat_template": TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(named, indent=1) + "\n")
    rotary = model.model.rotary_emb
    frequencies = None if family == "gemma3" else rotary.inv_freq.numpy().astype(np.float64)
    write_gguf(folder / f"{family}.gguf", family, config, tensors, frequencies, vocabulary)
    rows = [[float(f"{x:.7g}") for x in logits[i].tolist()] for i in SHOWN]
    expected = {"tokens": TOKENS, "positions": SHOWN, "logits": rows}
    (out / "expected.json").write_text(json.dumps(expected) + "\n")
    print(family, "logits", float(logits.min()), "to", float(logits.max()))


def write_rope(folder):
    """Inverse frequencies of each extension, for head_dim 64."""
    cases = []
    settings = [
        (dict(rope_type="linear", factor=4.0), None),
        (dict(rope_type="dynamic", factor=4.0), 2048),
        (dict(rope_type="dynamic", factor=4.0), 6000),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048), None),
        (dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=4096, beta_fast=24.0, beta_slow=2.0), None),
        (dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=2048, attention_factor=1.25), None),
        (dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=2048, mscale=1.0, mscale_all_dim=0.7), None),
        (
            dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=1024),
            None,
        ),
    ]
    for theta in (10000.0, 500000.0):
        for given, length in settings:
            given = given | dict(rope_theta=theta)
            config = LlamaConfig(
                hidden_size=256, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=dict(given)
            )
            frequencies, factor = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, "cpu", seq_len=length)
            cases.append(
                {
                    "rope_parameters": given, "max_position_embeddings": 2048, "length": length,
                    "frequencies": [float(f"{x:.9g}") for x in frequencies.tolist()], "attention_factor": factor,
                }
            )
    text = ",\n".join(json.dumps(case) for case in cases)
    (folder / "rope.json").write_text(f"[\n{text}\n]\n")


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = tokenizer()
    # Families after the folder: only these. (Not in the text above, which the tokenizer is trained on.)
    for family in sys.argv[2:] or MODELS:
        write_model(folder, family, MODELS[family], vocabulary)
    if not sys.argv[2:]:
        write_rope(folder)


main()
