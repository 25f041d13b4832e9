"""What the scripts that measure a server share: a free port, and a server that is healthy before and gone after."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def serving(command, port):
    """Starts `command`, which listens at `port`, and ends it after the block; gives its address and process."""
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(url + "/health", timeout=5)
                break
            except OSError:
                if process.poll() is not None:
                    sys.exit(f"{command[0]} has ended; start it by hand to see why: {' '.join(command)}")
                time.sleep(0.05)
        yield url, process
    finally:
        process.terminate()
        process.wait()
