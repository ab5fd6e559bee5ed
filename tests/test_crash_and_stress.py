"""Short runs of the two long scripts, which say what they check."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "command",
    [
        ("crash_disk.py", "--kills", "12"),
        ("stress_engine.py", "--seconds", "8", "--processes", "2", "--threads", "4"),
    ],
    ids=["crash", "stress"],
)
def test_scripts(command):
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / command[0]), *command[1:]],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
