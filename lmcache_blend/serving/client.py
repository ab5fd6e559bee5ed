"""The same requests over HTTP, to a running server with the OpenAI API."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lmcache_blend.errors import ServingError
from lmcache_blend.serving.requests import FORCED, Answer, Request

TIMEOUT_S = 600.0


class HttpClient:
    """A server at `url`, e.g. http://localhost:8000; its first model is the one that is asked.

    Raises ServingError where nothing answers there.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/").removesuffix("/v1")
        model = self._get("/v1/models")["data"][0]
        self.model: str = model["id"]
        self.max_tokens: int = model.get("max_model_len") or 1 << 30
        self.versions: dict[str, str | int] = {"vllm": self._get("/version")["version"]}

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """All requests at once, each on a connection of its own."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(self.ask, requests))

    def ask(self, request: Request) -> Answer:
        """One request. Raises ServingError."""
        answer, started = Answer(), time.perf_counter()
        body = json.dumps(self._body(request)).encode()
        post = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(post, timeout=TIMEOUT_S) as reply:
                for line in reply if request.stream else [b"data: " + reply.read()]:
                    if line.startswith(b"data: {"):
                        _add(answer, json.loads(line[6:]), 1e3 * (time.perf_counter() - started))
        except (OSError, ValueError) as error:
            raise ServingError(f"{self.url}: {_reason(error)}") from error
        answer.latency_ms = 1e3 * (time.perf_counter() - started)
        if request.forced and answer.tokens != list(request.forced):
            # A server without the logits processor decoded what it liked.
            answer.token_logprobs = answer.top1 = None
        return answer

    def close(self) -> None:
        """Nothing: the server stays."""

    def _body(self, request: Request) -> dict[str, Any]:
        forced = list(request.forced)
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(request.tokens),
            "temperature": 0.0,
            "max_tokens": len(forced) or request.max_tokens,
            "ignore_eos": True,
            "stream": request.stream,
            "return_token_ids": True,
        }
        if request.salt:
            body["cache_salt"] = request.salt
        if request.kv_transfer:
            body["kv_transfer_params"] = request.kv_transfer
        if forced:
            body |= {"logprobs": 1, "return_tokens_as_token_ids": True, "vllm_xargs": {FORCED: forced}}
        else:
            body["stop_token_ids"] = list(request.stop_ids)
        return body

    def _get(self, path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10.0) as reply:
                return json.load(reply)
        except (OSError, ValueError) as error:
            raise ServingError(
                f"no server of the OpenAI API at {self.url} ({_reason(error)}); start one with `lmcache-blend serve`"
            ) from error


def _add(answer: Answer, event: dict[str, Any], elapsed_ms: float) -> None:
    """Put one event of the stream into the answer."""
    if "error" in event:
        raise ServingError(str(event["error"].get("message", event["error"])))
    answer.kv_transfer.update(event.get("kv_transfer_params") or {})
    for choice in event["choices"]:
        ids = choice.get("token_ids") or []
        if (choice["text"] or ids) and not answer.ttft_ms:
            answer.ttft_ms = elapsed_ms
        answer.text += choice["text"]
        answer.tokens = (answer.tokens or []) + ids
        if logprobs := choice.get("logprobs"):
            answer.token_logprobs = (answer.token_logprobs or []) + logprobs["token_logprobs"]
            best = [max(top, key=top.__getitem__) for top in logprobs["top_logprobs"]]
            answer.top1 = (answer.top1 or []) + [int(name.removeprefix("token_id:")) for name in best]


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.read(2000).decode(errors='replace')}"
    return str(error)
