#!/usr/bin/env bash
# Makes the results files and reports behind docs/results.md.
#
#   scripts/results.sh DATA OUT
#
# DATA holds ruler/<length>/<task>.jsonl (RULER's own generator, seed 42), longbench/<task>.jsonl, corpus/ with two texts,
# and sources/ (essays, SQuAD, HotpotQA). OUT gets JSON lines and reports. A run that was interrupted, or stopped by
# SECONDS_EACH (default: never), goes on where it was; so does every run of this script.
set -euo pipefail
data=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/.."
mosaickv() { cargo run --release --quiet -- "$@"; }
small=smollm2-135m
limit=(--max-seconds "${SECONDS_EACH:-1000000}")
all=exact,quest,strawman,packed,packed:kept=0.25,group=1,block=8,q8_0,q4_0,kivi4,kivi2,snapkv

texts=("$data/corpus/melville-moby_dick.txt" "$data/corpus/wikitext-2-raw.test.txt" crates/kernels/src/exact.rs)
mosaickv eval kl --model $small --text "${texts[@]}" --ask 4 --kv $all -o "$out/kl.jsonl" "${limit[@]}"

# Quality against ratio: every token selected, so that only what is kept differs.
rates=exact,q8_0,q4_0,kivi4,kivi2
for kept in 0.125 0.25 0.375 0.5 0.75; do
    rates+=,packed:kept=$kept,group=1,block=8,selected=1,strawman:kept=$kept,selected=1,snapkv:kept=$kept
done
mosaickv eval kl --model $small --text "${texts[0]}" --score 128 --kv $rates -o "$out/rates.jsonl" "${limit[@]}"

# What the paper's parts are worth, at 30 % and 70 % of the elements removed.
parts=exact
for kept in 0.7 0.3; do
    for selected in 0.1 1; do
        for rotation in none svd; do
            rest=selected=$selected,rotation=$rotation
            parts+=,strawman:kept=$kept,$rest,packed:kept=$kept,group=1,block=8,$rest
        done
    done
done
mosaickv eval kl --model $small --text "${texts[0]}" --score 128 --kv "$parts" -o "$out/parts.jsonl" "${limit[@]}"
mosaickv eval kl --model $small --text "${texts[0]}" --score 32 --each-layer --kv packed:kept=0.25,group=1,block=8,kivi2 \
    -o "$out/layers.jsonl" "${limit[@]}"
mosaickv eval observe --model $small --text "${texts[0]}" >"$out/observe.txt"

for length in 4096 7680; do
    mosaickv eval ruler --model $small --data "$data/ruler" --length $length --samples 20 --kv $all \
        -o "$out/ruler-$length.jsonl" "${limit[@]}"
done
mosaickv eval longbench --model $small --data "$data/longbench" --only-whole --kv $all -o "$out/longbench.jsonl" "${limit[@]}"
for length in 8192 16384; do
    mosaickv eval ruler --model gemma3-270m --sources "$data/sources" --length $length --samples 10 --kv $all \
        -o "$out/gemma-$length.jsonl" "${limit[@]}"
done

mosaickv eval report "$out"/*.jsonl --html "$out/report.html" --md "$out/report.md"
