"""The three gates that a model passes before any of its KV is blended.

1. rotation: its keys are a pure rotation by position, explained by its own rotary modules (learn.py).
2. partial rows: chosen rows, run over an exact cache in which those rows are destroyed, give the logits of the model's
   own full forward.
3. dropped rows: the same when rows are dropped before layers 1 and 2 of a full forward.

They run once per model (weights, dtype, library versions); the outcome is kept in the cache folder.
"""

import hashlib
import json
import os
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.blend.runner import CostModel, Plan
from lmcache_blend.config import cache_dir
from lmcache_blend.errors import UnsupportedModelError
from lmcache_blend.hf.dense import DenseKV, KVPool
from lmcache_blend.hf.learn import Capture, learn_cost, learn_rotary

TOKENS = 96
GATES = ("full", "partial", "dropped")
REVISION = 1  # raise it when what the gates check changes: kept outcomes of an older revision do not count


def rotation_tolerance(dtype: torch.dtype) -> float:
    """Relative error of the rotation fit that counts as none in dtype."""
    return 2e-4 if dtype == torch.float32 else 0.1


def equal(error: dict[str, float], dtype: torch.dtype, largest_logit: float) -> bool:
    """Whether logits agree.

    float32: the largest difference is at most 1e-4, or 1e-5 of the largest logit if that is more. bfloat16, float16:
    the root mean square of the difference is at most 5 % of that of the logits; a largest difference says little
    there, since rounding alone sends a token of a mixture of experts to another expert.
    """
    if dtype == torch.float32:
        return error["largest"] <= max(1e-4, 1e-5 * largest_logit)
    return error["relative"] <= 0.05


def admit(runner: Any) -> Any:
    """Give the runner its rotary table, KV pool and cost model, once the gates passed; raises UnsupportedModelError."""
    try:
        runner.rotary, rotation_error, seen = learn_rotary(runner, rotation_tolerance(runner.dtype))
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a foreign model's code raises when run this way is a refusal, not a crash
        raise UnsupportedModelError(
            f"{runner.model_id} ({type(runner.model).__name__}) cannot run on chosen rows: "
            f"{type(error).__name__}: {error}"
        ) from error
    runner.pool = _pool(runner, seen)
    kept = _kept(runner)
    if kept is None:
        kept = {"rotation_error": rotation_error, **measure(runner)}
        _keep(runner, kept)
    for gate in GATES:
        if not equal(kept[gate], runner.dtype, kept["largest_logit"]):
            raise UnsupportedModelError(
                f"{runner.model_id}: gate {gate!r} failed, logits differ from the model's own by "
                f"{kept[gate]['largest']:.1e} (largest logit {kept['largest_logit']:.1f}): blended KV would be wrong"
            )
    cost: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in kept["cost"].items()}
    runner.cost = CostModel(**cost)
    runner.gates = kept
    return runner


@torch.inference_mode()
def measure(runner: Any) -> dict[str, Any]:
    """Differences of logits to the model's own: all rows, partial rows, dropped rows; and the cost model."""
    generator = torch.Generator().manual_seed(1)
    n = min(TOKENS, runner.max_tokens)
    ids = torch.randint(3, runner.config.vocab_size, (n,), generator=generator).to(runner.device)
    reference = runner.model(input_ids=ids[None]).logits[0].float()
    every = torch.arange(n, device=runner.device)
    exact = runner.new_kv(n)
    full = runner.forward([ids], [exact], Plan([every]), 0).logits[0]

    tail = 8
    chosen = torch.randperm(n - tail, generator=generator)[: n // 4].sort().values.to(runner.device)
    rows = torch.cat((chosen, every[-tail:]))
    broken = _copy(runner, exact, n)
    for i in range(runner.num_layers):
        for buffer in broken.layer(i):
            buffer[:, rows] = 77.0
    cost, partial = learn_cost(runner, ids, broken, rows)

    def drop(layer: int, rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = rows.shape[1]
        keep = torch.rand(n, generator=generator) < 0.5
        keep[-4:] = True
        return keep.nonzero().view(1, -1).to(rows.device)

    checks = {i: drop for i in (1, 2) if i < runner.num_layers}
    dropped = runner.forward([ids], [_copy(runner, exact, n)], Plan([every], checks=checks), 4).logits[0]
    return {
        "full": _difference(full, reference),
        "partial": _difference(partial, reference[rows]),
        "dropped": _difference(dropped, reference[-4:]),
        "largest_logit": float(reference.abs().max()),
        "cost": asdict(cost),
    }


def _difference(x: Tensor, y: Tensor) -> dict[str, float]:
    largest, relative = float((x - y).abs().max()), float((x - y).square().mean().sqrt() / y.square().mean().sqrt())
    return {"largest": largest, "relative": relative}  # NaN passes no comparison, so it fails the gate


def _copy(runner: Any, kv: DenseKV, n: int) -> DenseKV:
    other = runner.new_kv(n)
    for i in range(runner.num_layers):
        for to, source in zip(other.layer(i), kv.layer(i), strict=True):
            to[:, :n] = source[:, :n]
    return other


def _pool(runner: Any, seen: Capture) -> KVPool:
    shapes = tuple((k.shape[0], k.shape[2], v.shape[0], v.shape[2]) for k, v in seen.kv)
    return KVPool(shapes, seen.kv[0][0].dtype, runner.device)


def _path(runner: Any) -> Any:
    versions = f"{REVISION} {torch.__version__} {version('transformers')} {runner.device.type} {runner.dtype}"
    return cache_dir() / "gates" / f"{hashlib.sha256((runner.fingerprint + versions).encode()).hexdigest()[:32]}.json"


def _kept(runner: Any) -> dict[str, Any] | None:
    """An outcome of an earlier run, None where there is none or the file is not one."""
    try:
        kept = json.loads(_path(runner).read_text())
        CostModel(**kept["cost"])
        return kept if all({"largest", "relative"} <= kept[g].keys() for g in GATES) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep(runner: Any, outcome: dict[str, Any]) -> None:
    path = _path(runner)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(outcome))
        os.replace(temporary, path)
    except OSError:
        return  # a cache that cannot be written costs time at the next start, nothing else
