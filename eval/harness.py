"""The run loop: for each sample one full prefill, then every method and codec, written to its own folder at once."""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lmcache_blend.blend.blender import Blender
from lmcache_blend.blend.policies import policies
from lmcache_blend.codecs import PipelineCodec, get_codec, short_name
from lmcache_blend.config import BlendConfig
from lmcache_blend.engine import MemoryStore
from lmcache_blend.errors import ContextLengthError, ResultsError
from lmcache_blend.eval.aggregate import aggregate
from lmcache_blend.eval.backend import Backend
from lmcache_blend.eval.backend_vllm import VLLMBackend, check_vllm
from lmcache_blend.eval.measure import (
    Item,
    make_item,
    measure_method,
    measure_reference,
    trace_arrays,
    truncate,
)
from lmcache_blend.eval.options import RoutedOptions, RunRequest, policy_fields, route_options, uses_ratio
from lmcache_blend.eval.results import Results, RunConfig, SampleResult, Skipped
from lmcache_blend.eval.tasks import Task, load_task
from lmcache_blend.eval.writer import TRACE, RunFolder, read_folder
from lmcache_blend.hf import load_runner

REFRESH_S = 20.0
"""While a run goes on, results.json is this old at most."""


@dataclass
class Combination:
    """One method at one ratio, its folder and its settings."""

    folder: RunFolder
    blend: BlendConfig
    skipped: list[Skipped]
    versions: dict[str, str | int] = field(default_factory=dict)
    written: float = field(default_factory=time.monotonic)

    @property
    def label(self) -> str:
        ratio, codec = self.folder.config.recompute_ratio, short_name(self.folder.config.codec)
        return (
            self.folder.config.method
            + ("" if ratio is None else f" {ratio:.0%}")
            + ("" if codec == "raw" else f" {codec}")
        )

    def misses(self, item: Item) -> bool:
        """Whether that sample is still to be measured."""
        return not self.folder.has(item.sample.id, item.prompt_sha256)

    def finish(self) -> Results | None:
        """The final results, written unless an earlier run did: its versions are those that measured."""
        saved = read_folder(self.folder.path)
        if saved is not None and saved.complete and all(skipped in saved.skipped for skipped in self.skipped):
            return saved
        return self.write(complete=True)

    def write(self, complete: bool) -> Results | None:
        """Write results.json from what is measured so far; None while nothing is."""
        samples = list(self.folder.samples.values())
        if not samples:
            return None
        results = aggregate(
            self.folder.config, samples, skipped=self.skipped, complete=complete, versions=self.versions
        )
        self.folder.write_results(results)
        self.written = time.monotonic()
        return results


def run(request: RunRequest, *, progress: bool = True) -> list[Results]:
    """Measure every method at every ratio and write results; a second call goes on where the first one ended.

    Raises, before the model is loaded, UnknownNameError, ConfigError or DataError; then ModelNotFoundError,
    UnsupportedModelError, ContextLengthError (every sample is too long), ServingError (a server does not answer) and
    ResultsError (a write failed).
    """
    task, routed = check(request)
    backend = _open(request, routed)
    for codec in map(get_codec, request.codecs):
        if isinstance(codec, PipelineCodec):
            codec.check_model(backend.fingerprint, request.model)
    items, skipped = make_items(task, routed, backend)
    _warn_skipped(skipped, len(task.samples))
    combinations = [
        Combination(RunFolder(request.output, config), _blend_config(config), skipped, versions())
        for config in combination_configs(request, task, routed, backend.fingerprint)
    ]
    unfinished = [c for c in combinations if any(c.misses(item) for item in items)]
    for combination in combinations:
        if combination not in unfinished:
            done = len(combination.folder.samples)
            print(f"{combination.label}: complete with {done} samples, nothing to do", file=sys.stderr)
    with _reportable(unfinished):
        _loop(backend, items, unfinished, progress)
    return [results for c in combinations if (results := c.finish()) is not None]


def check(request: RunRequest) -> tuple[Task, RoutedOptions]:
    """Everything about a request that needs no model: names, options, codec and samples."""
    for method in request.methods:
        policies.get(method)
    for spec in request.codecs:
        get_codec(spec)
    registered = request.task if request.data is None else None
    routed = route_options(request.options, request.methods, registered, request.backend)
    if request.backend == "vllm":
        check_vllm(request, routed)
    return load_task(request.task, request.data, request.limit, request.seed, **routed.task), routed


def combination_configs(request: RunRequest, task: Task, routed: RoutedOptions, fingerprint: str) -> list[RunConfig]:
    """One RunConfig per codec, method and ratio; methods without a ratio come once."""
    shared = {
        "task": task.name,
        "data": request.data.name if request.data else None,
        "data_sha256": sha256(request.data.read_bytes()).hexdigest() if request.data else None,
        "task_options": routed.task,
        "model": Path(request.model).resolve().name if Path(request.model).is_dir() else request.model,
        "fingerprint": fingerprint,
        "dtype": request.dtype,
        "device": request.device,
        "backend": request.backend,
        "serving": routed.serving.model_dump(exclude_defaults=True, exclude={"warmup"}),
        "encode": request.encode,
        "seed": request.seed,
        "chunk_tokens": routed.harness.chunk_tokens,
        "max_new_tokens": routed.harness.max_new_tokens or task.max_new_tokens,
        "generate": routed.harness.generate,
        "long_context": routed.harness.long_context,
    }
    codecs = [get_codec(spec).get_config() for spec in dict.fromkeys(request.codecs)]
    configs = []
    for method in dict.fromkeys(request.methods):
        options = dict(routed.policies[method])
        if "seed" in policy_fields(method):
            options.setdefault("seed", request.seed)
        ratios = dict.fromkeys(request.recompute_ratios) if uses_ratio(method) else [None]
        configs += [
            RunConfig(**shared, codec=codec, method=method, recompute_ratio=r, policy_options=options)
            for codec in codecs
            for r in ratios
        ]
    return configs


def _open(request: RunRequest, routed: RoutedOptions) -> Backend:
    if request.backend == "vllm":
        return VLLMBackend(request, routed.serving)
    return HFBackend(load_runner(request.model, dtype=request.dtype, device=request.device))


def make_items(task: Task, routed: RoutedOptions, runner: Any) -> tuple[list[Item], list[Skipped]]:
    """Prompts that fit into the model, and samples that do not. Raises ContextLengthError where none fits."""
    options = routed.harness
    items, skipped = [], []
    for sample in task.samples:
        item = make_item(
            sample,
            task.kind,
            runner,
            chunk_tokens=options.chunk_tokens,
            max_new_tokens=options.max_new_tokens or task.max_new_tokens,
            generate=options.generate,
        )
        excess = item.needed_tokens - runner.max_tokens
        if excess > 0 and options.long_context == "truncate":
            item = replace(item, prompt=truncate(item.prompt, len(item.prompt) - excess))
        elif excess > 0:
            skipped.append(Skipped(id=sample.id, tokens=item.needed_tokens, limit=runner.max_tokens))
            continue
        items.append(item)
    if not items:
        shortest = min(skipped, key=lambda s: s.tokens)
        raise ContextLengthError(
            f"every sample is too long: the shortest takes {shortest.tokens} tokens with its answer, "
            f"the model's limit is {shortest.limit}; use --option long_context=truncate or a model with more "
            "positions"
        )
    return items, skipped


def versions() -> dict[str, str | int]:
    """What the numbers were measured with."""
    found: dict[str, str | int] = {
        name: version(name.replace("_", "-")) for name in ("lmcache_blend", "torch", "transformers")
    }
    return {
        **found,
        "python": platform.python_version(),
        "cpu_count": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }


def _loop(backend: Backend, items: Sequence[Item], combinations: Sequence[Combination], progress: bool) -> None:
    todo = [item for item in items if any(c.misses(item) for c in combinations)]
    if not todo:
        return
    task = combinations[0].folder.config.task
    bar = tqdm(total=len(todo), desc=task, unit="sample", disable=not progress, dynamic_ncols=True)
    with bar, closing(backend):
        bar.set_postfix_str("warm-up")
        backend.start(todo, combinations)
        for combination in combinations:
            combination.versions.update(backend.versions)
        bar.unpause()  # the time left is reckoned without the warm-up
        for number, at in enumerate(range(0, len(todo), backend.burst)):
            burst = todo[at : at + backend.burst]
            missing = [c for c in combinations if any(c.misses(item) for item in burst)]
            # Each method is first, second, ... equally often: none profits from its place in the loop.
            turn = number % len(missing)
            for combination, item, sample in backend.measure(
                burst, missing[turn:] + missing[:turn], bar.set_postfix_str
            ):
                if combination.misses(item):
                    combination.folder.append(sample)
                if time.monotonic() - combination.written > REFRESH_S:
                    combination.write(complete=False)
            bar.update(len(burst))


class HFBackend:
    """A Hugging Face model in this process, one prompt at a time."""

    burst = 1

    def __init__(self, runner: Any):
        self.runner, self.tokenizer = runner, runner.tokenizer
        self.max_tokens, self.fingerprint = runner.max_tokens, runner.fingerprint
        self.versions: dict[str, str | int] = {}

    def start(self, items: Sequence[Item], combinations: Sequence[Combination]) -> None:
        """Run full prefill and every method once uncounted: kernels compile, buffers are allocated."""
        raw = MemoryStore()
        blends = {
            "full_recompute": BlendConfig(policy="full_recompute"),
            **{c.blend.policy: c.blend for c in combinations},
        }
        for blend in blends.values():
            blender = Blender(self.runner, blend, store=raw)
            blender.store(items[0].prompt)
            blender.prefill(items[0].prompt)
        for store in _stores(combinations, raw).values():
            for key in store:
                store.get(key)

    def measure(
        self, items: Sequence[Item], combinations: Sequence[Combination], say: Callable[[str], Any]
    ) -> Iterator[tuple[Combination, Item, SampleResult]]:
        (item,), runner = items, self.runner
        raw = MemoryStore()
        Blender(runner, combinations[0].blend, store=raw).store(item.prompt)
        stores = _stores(combinations, raw)
        blenders = [Blender(runner, c.blend, store=stores[str(c.folder.config.codec)]) for c in combinations]
        say("full prefill")
        reference = measure_reference(blenders[0], item, runner.tokenizer)
        exact = None
        for combination, blender in zip(combinations, blenders, strict=True):
            say(combination.label)
            kv_bytes = runner.kv_bytes_per_token(16)
            sample, result = measure_method(blender, item, reference, runner.tokenizer, kv_bytes)
            if not (combination.folder.path / TRACE).exists():
                if exact is None:
                    exact = blender.prefill(item.prompt, policy="epic", recompute_ratio=1.0).trace.deviation
                combination.folder.write_trace(trace_arrays(result.trace, item.prompt, exact))
            yield combination, item, sample

    def close(self) -> None:
        """Nothing: the model goes with the process."""


def _stores(combinations: Sequence[Combination], raw: MemoryStore) -> dict[str, MemoryStore]:
    """A store for each codec, by its configuration as text."""
    configs = {str(c.folder.config.codec): c.folder.config.codec for c in combinations}
    return {text: _store(config, raw) for text, config in configs.items()}


def _store(config: dict[str, Any], raw: MemoryStore) -> MemoryStore:
    """The passages of one sample through a codec; raw KV as it is needs no encoding on its way."""
    if config["id"] == "raw" and not any(value for key, value in config.items() if key != "id"):
        return raw
    store = MemoryStore(get_codec(config))
    for key in raw:
        stored = raw.get(key)
        assert stored is not None
        store.put(key, stored.chunk)
    return store


@contextmanager
def _reportable(combinations: Sequence[Combination]) -> Iterator[None]:
    """Leave results.json up to date when a run is broken off, except by a disk that takes nothing more."""
    try:
        yield
    except ResultsError:
        raise
    except BaseException:
        for combination in combinations:
            combination.write(complete=False)
        raise


def _blend_config(config: RunConfig) -> BlendConfig:
    settings: dict[str, Any] = {
        "policy": config.method,
        "options": config.policy_options,
        "encode": config.encode,
    }
    if config.recompute_ratio is not None:
        settings["recompute_ratio"] = config.recompute_ratio
    return BlendConfig(**settings, store_misses=False)


def _warn_skipped(skipped: Sequence[Skipped], total: int) -> None:
    if skipped:
        print(
            f"warning: {len(skipped)} of {total} samples are longer than the model's {skipped[0].limit} "
            "tokens and are skipped (--option long_context=truncate cuts them)",
            file=sys.stderr,
        )
