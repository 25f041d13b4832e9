#!/bin/sh
# How fast is llama.cpp here, right now? One round of llama-bench, JSON on stdout.
#
# usage: bench_llama.sh LLAMA_CPP_BUILD MODEL.gguf [ROUNDS [WHAT]] > rounds.json
#
#   LLAMA_CPP_BUILD  folder of a built llama.cpp (holds bin/llama-bench)
#   MODEL.gguf       any model it loads
#   ROUNDS           measurements of each kind in one call, 1 unless told; llama-bench reports all and their mean
#   WHAT             prefill, decode or all (unless told): lets a caller alternate short calls with its own benchmark,
#                    so that both see the same neighbours and the same clock
#
# Threads: 2 (THREADS=n changes it). KV cache f16. Prefill: 512 tokens from an empty cache. Decode: 32 tokens after
# 0, 2,048 and 8,192 tokens (DECODE=n and DEPTHS=a,b,c change them). Each with flash attention off and on.
# The record is {"load": [before, after], "bench": [one object of llama-bench a test]}: a one-minute load average
# well above 0 before the run means that somebody else was computing too.
set -eu

if [ $# -lt 2 ] || [ $# -gt 4 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
bench=$1/bin/llama-bench
model=$2
rounds=${3:-1}
what=${4:-all}
threads=${THREADS:-2}

[ -x "$bench" ] || { echo "bench_llama.sh: no $bench; build it: cmake --build $1 --target llama-bench" >&2; exit 2; }
[ -r "$model" ] || { echo "bench_llama.sh: cannot read $model" >&2; exit 2; }

load() { cut -d' ' -f1 /proc/loadavg; }

# Both attentions of one kind of test, as the inside of a JSON list.
measure() {
    "$bench" -m "$model" -t "$threads" -r "$rounds" -ngl 0 -ctk f16 -ctv f16 -fa 0,1 -o json "$@" |
        sed -e '1{/^\[$/d;}' -e '${/^\]$/d;}'
}

before=$(load)
case $what in
prefill) tests=$(measure -p 512 -n 0) ;;
decode) tests=$(measure -p 0 -n "${DECODE:-32}" -d "${DEPTHS:-0,2048,8192}") ;;
all)
    prefill=$(measure -p 512 -n 0)
    decode=$(measure -p 0 -n "${DECODE:-32}" -d "${DEPTHS:-0,2048,8192}")
    tests="$prefill,
$decode"
    ;;
*) echo "bench_llama.sh: $what is neither prefill, decode nor all" >&2; exit 2 ;;
esac
printf '{"load": [%s, %s], "bench": [\n%s\n]}\n' "$before" "$(load)" "$tests"
