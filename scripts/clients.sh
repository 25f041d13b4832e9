#!/bin/sh
# Do clients that others wrote get what they expect of `mosaickv serve`? The openai Python SDK, lm-eval, a gateway (smg), a load
# client (locust), a browser (Debian's Chromium, on the server's page) and schemathesis.
#
# usage: clients.sh MOSAICKV MODEL [WORK]
#
#   MOSAICKV   the binary
#   MODEL      what `mosaickv serve` takes: a file, a folder or a name
#   WORK       a folder for the Python environment and the servers' logs; unless told, a temporary one that is removed
#
# Prints a line for each check and exits with 1 if one failed. Where no package registry can be reached, it says so and
# exits with 0. PYTHON=python3 chooses the Python, EXAMPLES=8 how many requests schemathesis makes up for each operation.
# LM_EVAL=0 leaves lm-eval out: it needs no torch, but 700 MB of pyarrow, scipy and others. SHOTS=FOLDER keeps pictures of the page.
set -eu

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mosaickv=$1
model=$2
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/clients" && pwd)
if [ $# -eq 3 ]; then
    mkdir -p "$3"
    work=$(cd "$3" && pwd)
    remove=:
else
    work=$(mktemp -d)
    remove="rm -rf $work"
fi
pid=
trap '[ -z "$pid" ] || kill "$pid" 2>/dev/null || true; $remove' EXIT
trap 'exit 130' INT TERM

[ -x "$mosaickv" ] || { echo "clients.sh: no program $mosaickv; build it: cargo build --release" >&2; exit 2; }

environment() {
    [ -x "$work/venv/bin/python" ] || "$python" -m venv "$work/venv"
    pip="$work/venv/bin/python -m pip --quiet --disable-pip-version-check --retries 1 --timeout 20"
    if ! $pip download --no-deps --dest "$work/reached" 'openai>=3.54,<4' >"$work/pip.log" 2>&1; then
        echo "skipped: no package registry can be reached ($(tail -n 1 "$work/pip.log"))"
        exit 0
    fi
    $pip install 'openai>=3.54,<4' 'schemathesis>=4.32,<5' 'smg>=1.13,<2' 'locust>=2.47,<3'
}

# Starts a server with further arguments; its address and process are in CHECKED_URL and pid afterwards.
start() {
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    CHECKED_URL=http://127.0.0.1:$port
    export CHECKED_URL
    "$mosaickv" serve "$model" --host 127.0.0.1 --port "$port" --api-key "$CHECKED_KEY" \
        --served-model-name "$CHECKED_MODEL" "$@" >"$work/serve.log" 2>&1 &
    pid=$!
    waited=0
    until "$python" -c "import urllib.request as u; u.urlopen('$CHECKED_URL/health', timeout=5)" 2>/dev/null; do
        waited=$((waited + 1))
        if [ $waited -gt 1200 ] || ! kill -0 "$pid" 2>/dev/null; then
            echo "FAIL the server is not healthy after $waited tries; its last words:"
            tail -n 20 "$work/serve.log"
            exit 1
        fi
        sleep 0.5
    done
}

stop() {
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    pid=
}

# One part of the checks: a failure is remembered and its server's log shown, and the others run all the same.
failed=0
part() {
    echo "== $1"
    shift
    if ! "$@"; then
        failed=1
        echo "-- the server's last words:"
        tail -n 20 "$work/serve.log"
    fi
}

environment
CHECKED_KEY=key-$$
CHECKED_MODEL=checked
export CHECKED_KEY CHECKED_MODEL PYTHONPATH="$here" PYTHONDONTWRITEBYTECODE=1 DO_NOT_TRACK=1

start --remember-places
part "openai SDK" "$work/venv/bin/python" "$here/openai_sdk.py"
if [ "${LM_EVAL:-1}" = 1 ]; then
    $pip install 'lm_eval[api]>=0.4.13,<0.5'
    part "lm-eval" "$work/venv/bin/python" "$here/lm_eval_task.py" "$work/venv/bin/lm_eval" "$work"
else
    echo "skipped: lm-eval (LM_EVAL=0)"
fi
# Ten seconds of four users: whether it works, not how fast.
load() {
    LOAD_TEXT="$here/../../crates/mosaickv/demo/document.txt" LOAD_CHARS=1500 LOAD_TOKENS=8 "$work/venv/bin/locust" \
        -f "$here/locustfile.py" --headless --users 4 --spawn-rate 4 --run-time 10s --stop-timeout 30 --host "$CHECKED_URL" \
        --only-summary --exit-code-on-error 1
}
part "locust" load
browser=$(command -v chromium || command -v chromium-browser || true)
if [ -n "$browser" ]; then
    $pip install 'playwright>=1.60,<2'
    part "browser" "$work/venv/bin/python" "$here/browser.py" "$browser" "${SHOTS:-$work/shots}" \
        "$here/../../crates/mosaickv/demo/document.txt"
else
    echo "skipped: browser (no chromium on the path)"
fi
part "drain" "$work/venv/bin/python" "$here/drain.py" "$pid"
stop

rm -rf "$work/contexts"
mkdir -p "$work/contexts"
start --contexts "$work/contexts"
part "saved picture" "$work/venv/bin/python" "$here/saved_picture.py" "$mosaickv" "$model" "$work/contexts" \
    "$here/../../crates/mosaickv/demo/document.txt"
stop

start --max-num-seqs 1 --max-waiting 1
part "full queue" "$work/venv/bin/python" "$here/busy.py"
stop

part "gateway" "$work/venv/bin/python" "$here/gateway.py" "$mosaickv" "$model" "$work/venv/bin/smg" "$work"

start --max-model-len 512
cd "$work"
SCHEMATHESIS_HOOKS=short_answers
export SCHEMATHESIS_HOOKS
part "schemathesis" "$work/venv/bin/st" --config-file "$here/schemathesis.toml" run "$CHECKED_URL/openapi.json" \
    --header "Authorization: Bearer $CHECKED_KEY" \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
    --phases examples,coverage,fuzzing --max-examples "${EXAMPLES:-8}" --seed 1 --request-timeout 60 \
    --suppress-health-check all --warnings off --no-shrink
stop

[ $failed -eq 0 ] && echo "all clients are served" || { echo "some checks failed"; exit 1; }
