"""HTTP to a vLLM server: waiting for it, and requests whose failure says which server refused what, and why."""

from __future__ import annotations

import socket
import time
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

# requests in flight at the same time; each is a prompt with all of its completions
MAX_REQUESTS = 256
COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs "
    """--weight-transfer-config '{"backend": "nccl"}'"""
)
# between two questions whether the server is up
POLL_S = 0.5


class ServerClient:
    """A `vllm serve` process with its development endpoints (`VLLM_SERVER_DEV_MODE=1`).

    Attributes:
        base_url: Without a slash at its end.
        model: The name under which the server knows its model.
        max_model_len: The longest prompt with its completion.
    """

    def __init__(self, base_url: str, *, timeout_s: float) -> None:
        """Wait until the server is up, at most `timeout_s` seconds.

        Raises:
            ConnectionError: it is not.
            RuntimeError: it does not tell its settings.
        """
        self.base_url = base_url.rstrip("/")
        self._session = requests.Session()
        # nothing is retried: a server that comes back has the weights that it started with
        adapter = HTTPAdapter(pool_maxsize=MAX_REQUESTS)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._wait(timeout_s)
        served = self.get("v1/models")["data"][0]
        self.model: str = served["id"]
        self.max_model_len: int = served["max_model_len"]

    def _wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                reply = self._session.get(f"{self.base_url}/health", timeout=max(left, POLL_S))
                if reply.status_code == 200:
                    return
                why = f"it answers {reply.status_code}"
            except requests.RequestException as error:
                why = str(error)
            if time.monotonic() + POLL_S > deadline:
                raise ConnectionError(
                    f"no vLLM server is up at {self.base_url} after {timeout_s:g} s (vllm_server_timeout): {why}. "
                    f"Start one with `{COMMAND}`"
                )
            time.sleep(POLL_S)

    def get(self, path: str, **query: str) -> Any:
        """The JSON that the server gives at `path`.

        Raises:
            RuntimeError: as `post`.
        """
        return self._ask("GET", path, params=query)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server replies to `body`, without a limit on the time.

        Raises:
            RuntimeError: the server cannot be reached or refuses.
        """
        return self._ask("POST", path, json={} if body is None else body)

    def settings(self) -> dict[str, Any]:
        """The server's `VllmConfig`.

        Raises:
            RuntimeError: the server runs without its development endpoints.
        """
        settings: dict[str, Any] = self.get("server_info", config_format="json")["vllm_config"]
        return settings

    def completion_options(self) -> set[str]:
        """The fields of a completion request that the server knows; it ignores others without a word."""
        known: dict[str, Any] = self.get("openapi.json")["components"]["schemas"]["CompletionRequest"]["properties"]
        return set(known)

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of old weights.

        Raises:
            RuntimeError: requests of somebody else are running.
        """
        if not self.post("reset_prefix_cache")["success"]:
            raise RuntimeError(
                f"the vLLM server at {self.base_url} did not reset its prefix cache: other requests than the "
                "trainer's are running on it"
            )

    def local_address(self) -> str:
        """The address under which the server's machine reaches this one."""
        url = urlsplit(self.base_url)
        port = url.port or (443 if url.scheme == "https" else 80)
        with socket.create_connection((url.hostname, port), timeout=POLL_S * 20) as connection:
            address: str = connection.getsockname()[0]
        return address

    def _ask(self, method: str, path: str, **contents: Any) -> Any:
        try:
            reply = self._session.request(method, f"{self.base_url}/{path}", **contents)
        except requests.RequestException as error:
            raise RuntimeError(
                f"the vLLM server at {self.base_url} does not answer /{path} any more: {error}. Its log says why; "
                "restart it and resume from the last checkpoint"
            ) from error
        if reply.status_code == 404 and path == "server_info":
            raise RuntimeError(
                f"the vLLM server at {self.base_url} has no endpoint for weights: start it with VLLM_SERVER_DEV_MODE=1"
            )
        if reply.status_code != 200:
            raise RuntimeError(
                f"the vLLM server at {self.base_url} refused /{path} ({reply.status_code}): {_reason(reply)}"
            )
        return reply.json()


def _reason(reply: requests.Response) -> str:
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:500] or "without a reason"
