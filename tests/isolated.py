"""Runs a test file in a network namespace of its own, with nothing but a loopback interface in it.

Mooncake's clients and UCX listen on every interface they find.
"""

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys

import pytest

INSIDE = "LMCACHE_BLEND_TEST_ISOLATED"


def is_inside() -> bool:
    return os.environ.get(INSIDE) == "1"


def loopback_up() -> None:
    """What `ip link set lo up` does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        name = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(s, 0x8913, name))[1]  # SIOCGIFFLAGS
        fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", flags | 1))  # SIOCSIFFLAGS, IFF_UP


def run_isolated(file: str) -> None:
    """The tests of `file`, inside; fails with their output, skips where no namespace can be made."""
    unshare = shutil.which("unshare") or "unshare"
    wrap = next((w for w in ([unshare, "-n"], [unshare, "-rn"]) if _works([*w, "true"])), None)
    if wrap is None:
        pytest.skip("no network namespace can be made here (unshare -n)")
    environment = {**os.environ, INSIDE: "1", "UCX_NET_DEVICES": "lo", "GLOG_minloglevel": "2"}
    command = [*wrap, sys.executable, "-m", "pytest", file, "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False
