"""Fitting fisher_klt and fisher_diagonal: from calibration data to a profile. See fisher.py for what is fitted."""

from collections.abc import Callable, Iterator

import numba as nb
import numpy as np
import pydantic
import torch
from torch import Tensor

from lmcache_blend.codecs import adaptive
from lmcache_blend.codecs.calibration import Calibration
from lmcache_blend.codecs.fisher import FEATURE_SCALE
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.codecs.tables import BANK_SIZE, REACH, Tables, bank
from lmcache_blend.config import Config

UNIT = 0.5
"""Step of the quantiser, in the metric of the fit, that a profile calls 1."""
RIDGE, FLOOR = 1e-3, 3e-2
COARSEST = 1.0
"""Classes of half an octave that a step may be coarser than the base step: importance is foretold, and where the
foretelling is wrong, a much coarser step ruins the token (measured on code with Qwen2.5)."""


class FitConfig(Config):
    """Options of a fit. The defaults were chosen by KL on held-out text (codecs/README.md)."""

    group: int = pydantic.Field(default=1, ge=1)
    """Layers in one basis: more of them compress better and cost more at decoding."""
    rank: int | None = pydantic.Field(default=None, ge=1)
    """Coefficients kept per group; null keeps all (those that a step rounds to zero cost nothing either way)."""
    token_rank: int = pydantic.Field(default=128, ge=0)
    """Features in the token table; 0 leaves the prediction by token ids out."""
    adaptivity: float = pydantic.Field(default=0.5, ge=0, le=1)
    """How far the step follows a token's importance: 0 one step for all, 1 as the Fisher information says."""
    temper_k: float = pydantic.Field(default=0.1, ge=0, le=1)
    """Share of the plain squared error in the metric of the keys."""
    temper_v: float = pydantic.Field(default=0.5, ge=0, le=1)
    """The same of the values."""
    weight_k: float = pydantic.Field(default=1.4, gt=0)
    """Relative step of the keys: pure Fisher overspends on them."""
    weight_v: float = pydantic.Field(default=0.8, gt=0)
    """Relative step of the values."""


class _Metric:
    """Square root of the tempered Fisher matrix of one plane, block by head. root, inverse: [C, C]."""

    def __init__(self, m: Tensor, temper: float, weight: float, scale: float, diagonal: bool):
        trace = torch.diagonal(m, dim1=1, dim2=2).mean() if m.numel() else torch.zeros(())
        eye = torch.eye(m.shape[-1], dtype=torch.float64)
        m = m.double() * (1 - temper) + temper * trace * eye
        m = m + FLOOR * torch.diagonal(m, dim1=1, dim2=2).mean(-1)[:, None, None] * eye
        if diagonal:
            m = m * eye
        values, vectors = torch.linalg.eigh(m / scale**2)
        values = values.clamp_min(1e-30).sqrt()[:, None, :]
        self.root = torch.block_diag(*(vectors * values @ vectors.mT)).float() / weight
        self.inverse = torch.block_diag(*(vectors / values @ vectors.mT)).float() * weight


def fit(
    calibration: Calibration,
    config: FitConfig | None = None,
    *,
    diagonal: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """A profile for fisher_klt, or for fisher_diagonal. progress: called with (groups done, groups).

    The profile has no curve yet: whoever has the model measures it and puts it into settings["curve"].
    """
    config = (config or FitConfig()).replace(**({"group": 1, "token_rank": 0} if diagonal else {}))
    target, layers = calibration.target, len(calibration.target.shapes)
    fisher = [calibration.fisher(i) for i in range(layers)]
    traces = [torch.diagonal(m, dim1=1, dim2=2).mean() for pair in fisher for m in pair if m.numel()]
    scale = float(torch.stack(traces).double().clamp_min(1e-30).log().mean().exp().sqrt())
    metrics = [
        (
            _Metric(mk, config.temper_k, config.weight_k, scale, diagonal),
            _Metric(mv, config.temper_v, config.weight_v, scale, diagonal),
        )
        for mk, mv in fisher
    ]
    skipped = [len(ids) - n for ids, n in zip(calibration.ids, calibration.lengths, strict=True)]
    ids = torch.cat([x[s:] for x, s in zip(calibration.ids, skipped, strict=True)])
    table = _token_table(calibration, metrics, ids, config.token_rank)
    features = torch.from_numpy(table[np.minimum(ids.numpy(), len(table) - 1)].astype(np.float32) * FEATURE_SCALE)
    tensors: dict[str, np.ndarray] = {"layers": np.array([config.group], np.int32), "features": table}
    counts = np.zeros((BANK_SIZE, 2 * REACH + 1))
    firsts = range(0, layers, config.group)
    for number, first in enumerate(firsts):
        members = range(first, min(first + config.group, layers))
        parts = _group(calibration, metrics, members, features, config, diagonal, counts)
        tensors |= {f"{number}.{name}": x for name, x in parts.items()}
        if progress is not None:
            progress(number + 1, len(firsts))
    tables = _bank(counts)
    tensors |= {f"bank.{name}": getattr(tables, name) for name in ("width", "freq", "values", "reach", "cost")}
    settings = {"fit": config.model_dump(), "tokens": int(sum(calibration.lengths))}
    codec = "fisher_diagonal" if diagonal else "fisher_klt"
    return Profile(codec, target.name, target.fingerprint, target.shapes, tensors, settings, calibration.texts)


def _whitened(calibration: Calibration, metrics: list, members: range) -> Iterator[tuple[Tensor, Tensor]]:
    """Per plane of some layers: (mean [C], vectors in the metric [N, C])."""
    for i in members:
        for x, metric in zip(calibration.kv(i), metrics[i], strict=True):
            mean = x.mean(0)
            yield mean, (x - mean) @ metric.root


def _ridge(features: Tensor, y: Tensor, weight: float) -> Tensor:
    """[N, F], [N, D] -> [F, D]; weight: relative to the features' mean variance."""
    gram = features.T @ features / len(features)
    gram += weight * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram))
    return torch.linalg.solve(gram, features.T @ y / len(features))


def _token_table(calibration: Calibration, metrics: list, ids: Tensor, rank: int) -> np.ndarray:
    """[V, F] int8 features of tokens: the directions of the input embedding that foretell most of all layers' KV.

    Reduced-rank regression (Izenman 1975) of the vectors in the metric on the normalised embeddings.
    """
    embedding = calibration.target.embedding
    if not rank or embedding is None:
        return np.zeros((1, 0), np.int8)
    e = torch.from_numpy(embedding)
    e = e / e.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
    mean = e[ids].mean(0)
    x = e[ids] - mean
    values, vectors = torch.linalg.eigh((x.T @ x / len(x)).double())
    keep = values > values.max() * 1e-7
    values, vectors = values[keep].sqrt(), vectors[:, keep]
    white = (x.double() @ (vectors / values)).float()  # [N, E'] uncorrelated
    explained = torch.zeros(len(values), len(values), dtype=torch.float64)
    shrink = (values**2 / (values**2 + 0.03 * (values**2).mean()))[:, None]
    for _, y in _whitened(calibration, metrics, range(len(metrics))):
        w = shrink * (white.T @ y / len(y)).double()
        explained += w @ w.T
    top = torch.linalg.eigh(explained)[1].flip(-1)[:, : min(rank, len(values), max(1, len(ids) // 64))]
    table = (e - mean) @ ((vectors / values) @ top).float()
    return np.clip(np.rint(table.numpy() / FEATURE_SCALE), -127, 127).astype(np.int8)


def _group(
    calibration: Calibration,
    metrics: list,
    members: range,
    features: Tensor,
    config: FitConfig,
    diagonal: bool,
    counts: np.ndarray,
) -> dict[str, np.ndarray]:
    planes = list(_whitened(calibration, metrics, members))
    x = torch.cat([y for _, y in planes], 1)
    mean = torch.cat([m for m, _ in planes])
    root = torch.block_diag(*(m.root for i in members for m in metrics[i]))
    inverse = torch.block_diag(*(m.inverse for i in members for m in metrics[i]))
    energy = sum((calibration.energy(i) for i in members), torch.zeros(len(x)))
    vector, weights, low, high = _importance(x, features, energy, config.adaptivity)
    if diagonal:
        spread = x.std(0)
        basis, predict = None, torch.zeros(0, x.shape[1])
        y = x
    else:
        predict = _ridge(features, x, RIDGE) if features.shape[1] else torch.zeros(0, x.shape[1])
        rest = x - features @ predict
        values, basis = torch.linalg.eigh((rest.T @ rest / len(rest)).double())
        basis = basis.flip(-1)[:, : config.rank].float()
        y, spread = rest @ basis, values.flip(-1)[: config.rank].clamp_min(1e-12).sqrt()
    levels = np.rint(np.log2(np.maximum(spread.numpy() / UNIT, 2.0**-60)) * adaptive.UNITS).astype(np.int32)
    score = torch.cat((root @ vector, weights))
    _count(counts, y / UNIT, x @ vector + features @ weights[:-1] + weights[-1], low, high, levels)
    return {
        "mean": mean.numpy(),
        "forward": _narrow(root.diagonal() / UNIT if basis is None else root @ basis / UNIT),
        "inverse": _narrow(inverse.diagonal() * UNIT if basis is None else (inverse @ basis).T * UNIT),
        "levels": levels,
        "predict": _narrow(predict @ inverse),
        "score": score.numpy().astype(np.float32),
        "score_range": np.array([low, high], np.float32),
    }


def _importance(x: Tensor, features: Tensor, energy: Tensor, adaptivity: float) -> tuple[Tensor, Tensor, float, float]:
    """Log importance of a token as a linear map of its vector: (vector [D], weights [F + 1], lowest, highest).

    Minimises mean(energy exp(-s) + s): the distortion at equal rate where the step is scaled by exp(-s / 2). The
    result is
    in classes of half an octave of the step, its mean 0.
    """
    if not adaptivity or not float(energy.sum()) > 0:
        return torch.zeros(x.shape[1]), torch.zeros(features.shape[1] + 1), 0.0, 0.0
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    count = min(128, len(x) // 64 + 1, len(values))
    project = vectors[:, -count:] / values[-count:].clamp_min(1e-9).sqrt()
    inputs = torch.cat((x @ project, features[:, :64]), 1).clamp(-6, 6)
    energy = energy / energy.mean()
    energy = energy.clamp(max=float(torch.quantile(energy, 0.999)))
    w = torch.zeros(inputs.shape[1], requires_grad=True)
    b = torch.zeros(1, requires_grad=True)
    solver = torch.optim.LBFGS([w, b], max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        s = inputs @ w + b
        value = (energy * torch.exp(-s) + s).mean() + 1e-2 * w.square().sum()
        value.backward()
        return value

    solver.step(loss)  # pyright: ignore[reportArgumentType]
    gain = adaptivity / np.log(2)
    w = w.detach() * gain
    vector, token = project @ w[:count], torch.zeros(features.shape[1])
    token[: len(w) - count] = w[count:]
    s = x @ vector + features @ token
    low, high = float(torch.quantile(s, 0.01) - s.mean()), float(torch.quantile(s, 0.995) - s.mean())
    return vector, torch.cat((token, -s.mean()[None])), max(low, -COARSEST), min(high, float(adaptive.MIDDLE))


def _count(counts: np.ndarray, y: Tensor, score: Tensor, low: float, high: float, levels: np.ndarray) -> None:
    """Add symbols of every third token at three steps to the histograms of their tables."""
    picked = slice(None, None, 3)
    classes = (adaptive.MIDDLE - torch.round(score[picked].clamp(low, high))).to(torch.uint8).numpy()
    coefficients = np.ascontiguousarray(y[picked].numpy())
    for step in (-adaptive.UNITS, 0, adaptive.UNITS):
        ids = adaptive.table_ids(levels, step, BANK_SIZE)
        _histograms(coefficients, classes, ids, adaptive.class_steps(step), counts)


@nb.njit(nogil=True, cache=True)
def _histograms(y, classes, ids, steps, counts):
    """Symbols of coefficients [N, R] in classes [N] into counts [tables, 2 REACH + 1], by table_ids [R, CLASSES]."""
    for t in range(len(y)):
        c = classes[t]
        for r in range(y.shape[1]):
            q = min(max(np.rint(y[t, r] / steps[c]), -REACH), REACH)
            counts[ids[r, c], np.int64(q) + REACH] += 1


def _bank(counts: np.ndarray) -> Tables:
    """Tables from pooled counts, symmetric; where few were seen, the Laplace table of the bank takes their place."""
    counts = counts + counts[:, ::-1]
    k = np.arange(-REACH, REACH + 1)
    pmfs = []
    for i, row in enumerate(counts):
        mean = max(2.0 ** (adaptive.LOWEST + i / adaptive.TABLES_PER_OCTAVE) * 0.75, 1e-3)
        prior = np.exp(-np.abs(k) / max(mean, 0.05))
        pmfs.append(row + prior / prior.sum() * 200 + 1e-6 * row.sum())
    return bank(pmfs)


def _narrow(x: Tensor) -> np.ndarray:
    """float16 where nothing overflows, else float32: a basis is most of a profile."""
    return x.numpy().astype(np.float16 if x.numel() == 0 or float(x.abs().max()) < 6e4 else np.float32)
