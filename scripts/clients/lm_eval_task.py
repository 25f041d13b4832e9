"""Can lm-eval score and generate through /v1/completions, with the server's own tokenizer?

usage: lm_eval_task.py LM_EVAL WORK     the program, and a folder for the task and its results
Address, key and model as for openai_sdk.py. The task lies in WORK; nothing is downloaded.
"""

import glob
import json
import os
import subprocess
import sys

from checks import BASE, KEY, MODEL, ask, check, run

# A folder of its own: lm-eval looks for tasks in all that is in it.
WORK = os.path.join(os.path.abspath(sys.argv.pop(2)), "lm-eval")
LM_EVAL = sys.argv.pop(1)
TASK = """task: numbers
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@check("lm-eval runs a task of multiple choice")
def _():
    status, _, told = ask("GET", "/tokenizer_info")
    assert status == 200 and "eos_token" in told, f"/tokenizer_info answers {status}: {told}"
    questions = [
        {"question": f"{', '.join(map(str, range(n, n + 5)))},", "choices": [f" {n + 5}", " cheese", " Paris"], "answer": 0}
        for n in range(1, 9)
    ]
    os.makedirs(WORK, exist_ok=True)
    with open(f"{WORK}/numbers.json", "w") as file:
        file.writelines(json.dumps(question) + "\n" for question in questions)
    with open(f"{WORK}/numbers.yaml", "w") as file:
        file.write(TASK.format(file=f"{WORK}/numbers.json"))
    arguments = f"base_url={BASE}/v1/completions,model={MODEL},tokenizer_backend=remote,auth_token={KEY},num_concurrent=4,max_retries=2"
    environment = os.environ | {"OPENAI_API_KEY": KEY, "HF_HOME": f"{WORK}/hf", "HF_HUB_OFFLINE": "1"}
    command = [LM_EVAL, "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "numbers"]
    command += ["--include_path", WORK, "--output_path", f"{WORK}/results"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (path,) = glob.glob(f"{WORK}/results/**/results_*.json", recursive=True)
    with open(path) as file:
        results = json.load(file)["results"]["numbers"]
    accuracy = results["acc,none"]
    assert accuracy >= 0.5, results
    return f"accuracy {accuracy}"


if __name__ == "__main__":
    run()
