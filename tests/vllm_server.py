"""A real `lmcache-blend serve` on the loopback interface, for tests and the programs beside this file."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from servers import LOOPBACK, free_port

from lmcache_blend.serving.client import HttpClient
from lmcache_blend.serving.requests import Request

# Enough for the prompts here; eager, since compiling takes longer than serving them.
FLAGS = ("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8")


class VllmServer:
    """lmcache-blend serve MODEL with flags, in a session of its own, from start() until kill()."""

    def __init__(self, *flags: str, model: str = "smollm2-135m", folder: Path | None = None):
        self.port, self.flags, self.model = free_port(), flags, model
        self.folder = folder or Path(tempfile.mkdtemp(prefix="vllm-"))
        self.process: subprocess.Popen | None = None

    def start(self, patience_s: float = 240.0) -> "VllmServer":
        command = [sys.executable, "-m", "lmcache_blend.cli", "serve", self.model, *FLAGS, *self.flags]
        command += ["--host", LOOPBACK, "--port", str(self.port)]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log()[-4000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=1.0):
                return self
            time.sleep(0.5)
        self.kill()
        raise AssertionError(f"no server within {patience_s} s:\n{self.log()[-4000:]}")

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def client(self) -> HttpClient:
        return HttpClient(self.url)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that carry these labels."""
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            lines = reply.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [
            line for line in lines if re.match(rf"{re.escape(name)}[{{ ]", line) and all(w in line for w in wanted)
        ]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def rss_bytes(self) -> int:
        """Resident memory of all processes of the server."""
        assert self.process is not None
        out = subprocess.run(["ps", "-s", str(self.process.pid), "-o", "rss="], capture_output=True, text=True).stdout
        return 1024 * sum(int(word) for word in out.split())

    def kill(self) -> None:
        """kill -9 of the whole session."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Traffic:
    """Prompts of a shared instruction, passages from a pool, in any order, and a question; seeded."""

    def __init__(self, seed: int = 0, pool: int = 12, words: int = 90):
        self.random = random.Random(seed)
        self.head = self._text(140)
        self.pool = [self._text(words) for _ in range(pool)]

    def _text(self, n: int) -> list[int]:
        return [self.random.randrange(1000, 40000) for _ in range(n)]

    def prompt(self, passages: int = 4) -> tuple[list[int], list[list[int]]]:
        """Token ids and the passages' spans."""
        tokens, spans = list(self.head), []
        for passage in self.random.sample(self.pool, passages):
            spans.append([len(tokens), len(tokens) + len(passage)])
            tokens += passage
        return tokens + self._text(12), spans


def request(tokens: list[int], spans: list[list[int]], ratio: float | None, max_tokens: int = 6) -> Request:
    """Blended at a ratio, or plain where that is None."""
    blend: dict[str, Any] = {"enabled": False}
    if ratio is not None:
        blend = {"enabled": True, "spans": spans, "recompute_ratio": ratio}
    return Request(tokens, max_tokens, kv_transfer={"breakdown": True, "blend": blend})
