"""Keeps answers short while schemathesis makes up requests: without this, each of them could be as long as the context.

Loaded by schemathesis (SCHEMATHESIS_HOOKS). Fields that are wrong stay wrong.
"""

import schemathesis

MOST = {"max_tokens": 4, "max_completion_tokens": 4, "n": 2, "best_of": 2, "min_tokens": 2}


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    for name, most in MOST.items():
        value = body.get(name)
        if type(value) is int and value > most:
            body[name] = most
    if case.path.endswith("/completions") and body.get("max_tokens") is None:
        body["max_tokens"] = MOST["max_tokens"]
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 4:
        body["prompt"] = prompt[:4]
