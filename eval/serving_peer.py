"""The peer of serving_bench's offload part: LMCache's multiprocess mode in a vLLM of another environment.

lmcache_serving_peer.py is what runs there, and says how to make such an environment.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lmcache_blend.eval.serving_jobs import ANSWER, ENGINE, ENVIRONMENT, JobError, reason, result_of

SCRIPT = Path(__file__).with_name("lmcache_serving_peer.py")
LOOPBACK, START_S, CHUNK = "127.0.0.1", 120.0, 256
"""Patience with a server that starts; LMCache's default of tokens in a chunk."""


def turn(
    python: str, job: dict[str, Any], kv_bytes: int, timeout_s: float, chunk: int = CHUNK
) -> dict[str, dict[str, Any]]:
    """Results of the offload job, cold and, in a new process, warm, both with one server of their own.

    python: interpreter of the environment. kv_bytes: of all prompts; the server gets twice of it, so that it evicts
    nothing. timeout_s: for each of both. Raises JobError with the reason where LMCache does not run or reuses nothing.
    """
    with server(python, 1 + math.ceil(2 * kv_bytes / 2**30), chunk) as port:
        own = {**job, "engine": ENGINE, "tokens": ANSWER, "port": port}
        out = {name: client(python, own, timeout_s) for name in ("cold", "warm")}
    if not all(out["warm"]["cached_tokens"]):
        raise JobError(f"LMCache found nothing of a prompt that it had stored: {out['warm']['cached_tokens']} tokens")
    return out


@contextlib.contextmanager
def server(python: str, gib: int, chunk: int) -> Iterator[int]:
    """LMCache's server on a free port of the loopback interface, which is the value; dead afterwards."""
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = start(python, ["serve", str(port), str(gib), str(chunk)], log)
        try:
            wait_for(process, port, log)
            yield port
        finally:
            end(process)


def wait_for(process: subprocess.Popen, port: int, log: IO[str]) -> None:
    patience = time.monotonic() + START_S
    while time.monotonic() < patience:
        if process.poll() is not None:
            log.seek(0)
            said = log.read()
            raise JobError(f"LMCache's server ended: {reason(said.splitlines())}", said[-2000:])
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), 1.0):
            return
        time.sleep(0.1)
    raise JobError(f"LMCache's server does not answer within {START_S:.0f} s")


def client(python: str, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """One engine of the environment that runs the job."""
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
        tempfile.TemporaryFile("w+", errors="replace") as out,
        tempfile.TemporaryFile("w+", errors="replace") as err,
    ):
        json.dump(job, file)
        file.flush()
        process = start(python, ["job", file.name], out, err)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise JobError(f"LMCache's engine did not finish within {timeout_s:.0f} s") from None
        finally:
            end(process)
            for left in Path("/dev/shm").glob(f"lmcache_kv_{process.pid}_*"):  # of an engine that did not come to it
                left.unlink(missing_ok=True)
        out.seek(0)
        err.seek(0)
        return result_of(out.read(), err.read())


def start(python: str, arguments: list[str], out: IO[str], err: IO[str] | None = None) -> subprocess.Popen:
    """The script in a session of its own, without what this environment sets for its own interpreter."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        return subprocess.Popen(
            [python, str(SCRIPT), *arguments],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err or subprocess.STDOUT,
            env={**environment, **ENVIRONMENT},
            start_new_session=True,
        )
    except OSError as error:
        raise JobError(f"cannot run {python}: {error.strerror or error}") from None


def end(process: subprocess.Popen) -> None:
    """Kill the process and all of its session: there is nothing in it to keep."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
