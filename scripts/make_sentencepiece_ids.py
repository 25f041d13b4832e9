#!/usr/bin/env python3
"""Trains a tiny SentencePiece byte-pair vocabulary on this file and writes it with the ids it gives some texts.

Run:  python scripts/make_sentencepiece_ids.py crates/model/tests/data/sentencepiece.json
Needs sentencepiece. Settings as Llama 2's: byte fallback, digits apart, a space before the text, nothing normalized.
"""

import io
import json
import sys
from pathlib import Path

import sentencepiece

TEXTS = [
    "Trains a tiny vocabulary.",
    "settings as they are: byte fallback, digits apart",
    "  two  spaces, three   spaces ",
    "a\nnew\n\nline\tand tab",
    "12345 and 6.7",
    "é 日本 😀 ▁",
    "a",
    " ",
    "the the the",
]


def main():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()), model_writer=model, model_type="bpe",
        vocab_size=380, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=1.0,
        minloglevel=2, hard_vocab_limit=False,
    )
    made = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(made.vocab_size())
    kinds = [2 if made.is_unknown(i) else 3 if made.is_control(i) else 6 if made.is_byte(i) else 1 for i in ids]
    known = {
        "tokens": [made.id_to_piece(i) for i in ids],
        "scores": [made.get_score(i) for i in ids],
        "types": kinds,
        "cases": [{"text": text, "ids": made.encode(text)} for text in TEXTS],
    }
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in known.items())
    Path(sys.argv[1]).write_text("{" + text + "}\n")
    print(len(ids), "tokens")


main()
