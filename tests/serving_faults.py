"""Faults under a real server: `python tests/serving_faults.py [redis corrupt full kill ...]`; a line of JSON for each.

Every fault happens in the middle of traffic. Each prompt is asked plain and at ratio 1.0, over whatever KV the tiers
give; both answers must be those of a server without this connector's tiers.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from servers import redis_server
from vllm_server import Traffic, VllmServer, request


class Round:
    """The same prompts again and again; wrong or failed answers are noted."""

    def __init__(self, prompts: int = 6, seed: int = 1):
        traffic = Traffic(seed)
        self.prompts = [traffic.prompt() for _ in range(prompts)]
        self.expected: list[list[int]] = []
        self.wrong: list[str] = []
        self.asked = 0

    def expect(self, server: VllmServer) -> None:
        """Plain answers, each under a salt of its own: nothing that is cached or stored is met."""
        client = server.client()
        for number, (tokens, spans) in enumerate(self.prompts):
            plain = request(tokens, spans, None)
            self.expected.append(client.ask(type(plain)(**{**vars(plain), "salt": f"expected {number}"})).tokens or [])

    def ask(self, server: VllmServer, what: str, strike: Callable[[], Any] | None = None) -> None:
        """All prompts; strike() is called after a third of them."""
        client = server.client()
        for number, (tokens, spans) in enumerate(self.prompts):
            if strike is not None and number == len(self.prompts) // 3:
                strike()
            for ratio in (None, 1.0):
                self.asked += 1
                try:
                    got = client.ask(request(tokens, spans, ratio)).tokens
                except Exception as error:
                    self.wrong.append(f"{what}: {error}")
                    continue
                if got != self.expected[number]:
                    self.wrong.append(f"{what}: prompt {number} at {ratio}: {got}, not {self.expected[number]}")


def redis() -> Round:
    """The remote server is killed in the middle, and comes back on the same port."""
    store, rounds = redis_server(), Round()
    # The first tier is too small to hold the prompts, so that Redis is really asked.
    server = VllmServer("--cpu-gib", "0.02", "--remote", f"redis://127.0.0.1:{store.port}/0").start()
    try:
        rounds.expect(server)
        rounds.ask(server, "fill")
        rounds.ask(server, "redis killed", store.kill)
        store.start()
        rounds.ask(server, "redis back")
    finally:
        server.close()
        store.close()
    return rounds


def corrupt() -> Round:
    """Every stored file is damaged in its middle."""
    rounds = Round()
    with tempfile.TemporaryDirectory() as disk:
        server = VllmServer("--cpu-gib", "0.02", "--disk", disk).start()
        try:
            rounds.expect(server)
            rounds.ask(server, "fill")
            rounds.ask(server, "damaged", lambda: damage(Path(disk)))
        finally:
            server.close()
    return rounds


def damage(disk: Path) -> None:
    files = [path for path in disk.rglob("*") if path.is_file() and path.stat().st_size > 4096]
    assert files, "nothing was stored"
    for path in files:
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xa5" * 64)


def full() -> Round:
    """The disk tier's directory lies on a file system of 2 MiB."""
    rounds = Round()
    with small_disk(2) as disk:
        server = VllmServer("--cpu-gib", "0.02", "--disk", str(disk)).start()
        try:
            rounds.expect(server)
            rounds.ask(server, "disk full")
            rounds.ask(server, "disk still full")
        finally:
            server.close()
    return rounds


@contextmanager
def small_disk(mebibytes: int) -> Iterator[Path]:
    """A tmpfs of that size; needs the right to mount. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder]
        subprocess.run(mount, check=True, capture_output=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


def kill() -> Round:
    """kill -9 while it writes; the next server goes on over the same directory."""
    rounds = Round()
    with tempfile.TemporaryDirectory() as disk:
        server = VllmServer("--disk", disk).start()
        try:
            rounds.expect(server)
            rounds.ask(server, "fill")
            server.kill()
            server.start()
            rounds.ask(server, "after kill -9")
            assert server.metric("lmcache_blend:hit_tokens_total") > 0, "nothing outlived the kill"
        finally:
            server.close()
    return rounds


FAULTS = {"redis": redis, "corrupt": corrupt, "full": full, "kill": kill}


def main() -> int:
    failed = 0
    for name in sys.argv[1:] or FAULTS:
        rounds = FAULTS[name]()
        failed += len(rounds.wrong)
        print(json.dumps({"fault": name, "asked": rounds.asked, "wrong": rounds.wrong[:5]}), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
