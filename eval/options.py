"""What a run is asked to do, and whose each `--option key=value` is: the loop's, a policy's or the task's."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from lmcache_blend.blend.policies import get_policy, policies
from lmcache_blend.config import Config
from lmcache_blend.errors import ConfigError, nearest
from lmcache_blend.eval.tasks import task_options


class HarnessOptions(Config):
    """Options of the run loop itself."""

    chunk_tokens: int = pydantic.Field(default=512, ge=8)
    """Passages longer than this many tokens are cut into spans."""
    max_new_tokens: int | None = pydantic.Field(default=None, ge=1)
    """Greedy decoding stops after this many tokens; null for the task's own number."""
    generate: bool = True
    """Whether answers are decoded; false saves time where only NLL and KL are wanted."""
    long_context: Literal["skip", "truncate"] = "skip"
    """Prompts longer than the model are left out, or their longest passages are cut in the middle."""


class ServingOptions(Config):
    """Options of the vLLM backend."""

    server: str | None = None
    """URL of a running server, e.g. http://localhost:8000; null starts vLLM in a process of its own."""
    concurrency: int = pydantic.Field(default=1, ge=1)
    """So many prompts are sent at once."""
    warmup: int = pydantic.Field(default=1, ge=1)
    """Uncounted rounds of every method before the first counted one."""
    enforce_eager: bool = False
    """Without compilation vLLM starts sooner and serves slower; of no use with a server."""


class RunRequest(Config):
    """One command: every method at every ratio shares each sample's full prefill."""

    model: str
    """Hugging Face id, local folder or short name."""
    task: str
    """Registered task, or any name where `data` is given."""
    data: Path | None = None
    """Local JSONL file of samples."""
    methods: tuple[str, ...] = pydantic.Field(min_length=1)
    """Names of policies."""
    recompute_ratios: tuple[float, ...] = pydantic.Field(default=(0.15,), min_length=1)
    """Fractions of the reused tokens to compute anew, each 0 to 1."""
    codecs: tuple[str, ...] = ("raw",)
    """Codec that stored KV goes through: an id or JSON."""
    limit: int = pydantic.Field(default=50, ge=1)
    """At most this many samples."""
    seed: int = 0
    """Seed of generated samples and of random policies."""
    options: dict[str, Any] = pydantic.Field(default_factory=dict)
    """`--option` pairs, values parsed."""
    encode: Literal["alone", "bos", "prefix"] = "alone"
    """What stands before a passage while its KV is computed for the store."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of weights, activations and KV."""
    device: str = "cpu"
    """Device that the model runs on."""
    backend: Literal["hf", "vllm"] = "hf"
    """Engine that runs the model."""
    output: Path
    """Folder that results are written below."""

    @pydantic.field_validator("recompute_ratios")
    @classmethod
    def _in_range(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        for ratio in ratios:
            check_ratio(ratio)
        return ratios


@dataclasses.dataclass(frozen=True)
class RoutedOptions:
    """Options by owner."""

    harness: HarnessOptions
    policies: dict[str, dict[str, Any]]
    task: dict[str, Any]
    serving: ServingOptions


def check_ratio(ratio: float) -> float:
    """The ratio itself; raises ConfigError outside [0, 1], NaN included."""
    if not 0.0 <= ratio <= 1.0:
        raise ConfigError(f"recompute ratio {ratio:g} is outside [0, 1]")
    return ratio


def parse_option(text: str) -> tuple[str, Any]:
    """`key=value` with the value read as JSON where it is JSON, else as text. Raises ConfigError.

    >>> parse_option("signal=k"), parse_option("generate=false"), parse_option("passages=10")
    (('signal', 'k'), ('generate', False), ('passages', 10))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"option {text!r} is not key=value")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value


def route_options(
    options: dict[str, Any], methods: Sequence[str], task: str | None, backend: str = "hf"
) -> RoutedOptions:
    """Give each option to everyone who has a setting of that name.

    task: name of a registered task, None for a data file, which has no options. Raises UnknownNameError, and
    ConfigError for an option that nobody has, naming the nearest one, or for a value that a policy refuses.
    """
    fields = {method: policy_fields(method) for method in methods}
    of_task = task_options(task) if task else ()
    of_backend = ServingOptions.model_fields if backend == "vllm" else ()
    known = {
        *HarnessOptions.model_fields,
        *of_backend,
        *of_task,
        *(name for names in fields.values() for name in names),
    }
    for key in options:
        if key not in known:
            raise ConfigError(f"unknown option {key!r}: {nearest(key, known)}")
    routed = RoutedOptions(
        harness=HarnessOptions(**{k: v for k, v in options.items() if k in HarnessOptions.model_fields}),
        policies={m: {k: v for k, v in options.items() if k in names} for m, names in fields.items()},
        task={k: v for k, v in options.items() if k in of_task},
        serving=ServingOptions(**{k: v for k, v in options.items() if k in of_backend}),
    )
    for method, chosen in routed.policies.items():
        _check_types(method, chosen)
        get_policy(method, chosen)
    return routed


def policy_fields(method: str) -> dict[str, Any]:
    """A policy's settings and their defaults. Raises UnknownNameError."""
    cls: Any = policies.get(method)
    return {f.name: f.default for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}


def uses_ratio(method: str) -> bool:
    """Whether the recompute ratio changes what a method does. Raises UnknownNameError."""
    return policies.get(method).fixed_ratio is None


def _check_types(method: str, options: dict[str, Any]) -> None:
    """Refuse a value of another type than the setting's default, lest it fail in the middle of a run."""
    for key, value in options.items():
        default = policy_fields(method)[key]
        allowed = (int, float) if isinstance(default, float) else type(default)
        wrong = not isinstance(value, allowed) or (isinstance(value, bool) and not isinstance(default, bool))
        if default is not None and default is not dataclasses.MISSING and wrong:
            kind = type(default).__name__
            raise ConfigError(f"option {key} = {value!r} of {method!r} is no {kind} (default {default!r})")
