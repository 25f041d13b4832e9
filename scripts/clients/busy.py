"""Does a full queue refuse with 429, and do the SDK's retries get through?

For a server that computes one request at a time and lets few wait. Address, key and model as for openai_sdk.py.
"""

from concurrent.futures import ThreadPoolExecutor

import openai

from checks import BASE, KEY, MODEL, check, run

QUESTION = [{"role": "user", "content": "Count to one hundred."}]
CROWD = 8


def ask(retries):
    """An answer or the error that came instead."""
    client = openai.OpenAI(base_url=BASE + "/v1", api_key=KEY, max_retries=retries, timeout=300)
    try:
        return client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=24, temperature=0, extra_body={"ignore_eos": True}
        )
    except openai.APIStatusError as error:
        return error


def crowd(retries):
    with ThreadPoolExecutor(CROWD) as threads:
        answers = list(threads.map(lambda _: ask(retries), range(CROWD)))
    errors = [answer for answer in answers if isinstance(answer, openai.APIStatusError)]
    return [answer for answer in answers if answer not in errors], errors


@check("a full queue answers 429 and says when to come back")
def _():
    answers, errors = crowd(0)
    assert answers and errors, f"{len(answers)} answers, {len(errors)} errors"
    for error in errors:
        assert isinstance(error, openai.RateLimitError), (error.status_code, error.body)
        assert int(error.response.headers["retry-after"]) >= 0, error.response.headers
        assert error.body["message"], error.body
    return f"{len(answers)} answered, {len(errors)} refused"


# The server says "in a second" to all who are refused, so that somebody may be refused often.
@check("with retries all are answered, and alike")
def _():
    answers, errors = crowd(60)
    assert not errors, [error.body for error in errors]
    assert len({answer.choices[0].message.content for answer in answers}) == 1


if __name__ == "__main__":
    run()
