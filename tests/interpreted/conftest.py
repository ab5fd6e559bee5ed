"""Tests of Triton kernels in its interpreter: a process of their own, with TRITON_INTERPRET=1.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted

In any other process they are left out; tests/test_kernels.py starts that one.
"""

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _poisoned_outputs():
    from kernel_lab import poison

    with poison():
        yield
