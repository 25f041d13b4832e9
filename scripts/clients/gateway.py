"""Do requests flow through a gateway to two servers, and does none fail while one of them drains?

usage: gateway.py MOSAICKV MODEL SMG WORK     the binary, its model, the gateway's program, and a folder for logs
Starts and ends servers and gateway itself.
"""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from checks import check, run, wait_for

WORK = os.path.abspath(sys.argv.pop(4))
SMG = sys.argv.pop(3)
NAME = sys.argv.pop(2)
MOSAICKV = sys.argv.pop(1)
REQUESTS = 60


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def get(url, body=None, timeout=60):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as answer:
        return answer.code, answer.read().decode()
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        return 0, str(error)


def start(command, log):
    out = open(f"{WORK}/{log}", "w")
    return subprocess.Popen(command, stdout=out, stderr=out)


def answered(url):
    """Answers that a server has completed."""
    _, text = get(url + "/metrics")
    lines = [line for line in text.splitlines() if line.startswith("vllm:request_success_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@check("requests go to two servers; one drains, and none fails")
def _():
    ports = [free_port() for _ in range(4)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    servers = [
        start([MOSAICKV, "serve", NAME, "--port", str(port), "--threads", "1", "--served-model-name", "checked"], f"serve-{port}.log")
        for port in ports[:2]
    ]
    running = list(servers)
    try:
        for url in urls[:2]:
            wait_for("a server is healthy", lambda: get(url + "/health")[0] == 200, 300)
        command = [SMG, "launch", "--host", "127.0.0.1", "--port", str(ports[2]), "--prometheus-port", str(ports[3])]
        command += ["--worker-urls", *urls[:2], "--policy", "round_robin", "--health-check-interval-secs", "1"]
        running.append(start(command, "gateway.log"))
        gateway = urls[2]

        def one(i):
            body = {"model": "checked", "messages": [{"role": "user", "content": f"Name river number {i}."}], "max_tokens": 12}
            status, text = get(gateway + "/v1/chat/completions", body)
            return status, text[:200]

        wait_for("the gateway has its servers", lambda: one(0)[0] == 200, 60)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(one, i) for i in range(REQUESTS)]
            wait_for("both have answered", lambda: min(answered(url) for url in urls[:2]) >= 4, 60)
            before = answered(urls[0])
            servers[0].send_signal(signal.SIGTERM)
            results = [future.result() for future in asked]
        failed = [result for result in results if result[0] != 200]
        assert not failed, failed[:3]
        assert servers[0].wait(60) == 0, "the server that drained did not end well"
        later = [one(i) for i in range(6)]
        assert all(status == 200 for status, _ in later), later
        return f"{REQUESTS} answers, {before:.0f} by the first before it drained, the others by the second"
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    run()
