"""Fit a codec to a model: capture calibration data, fit, and measure bits and KL at a few steps for the budgets."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lmcache_blend.codecs import cachegen_paper, fisher_fit, get_codec, kvtc
from lmcache_blend.codecs.fisher_fit import FitConfig
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.errors import ConfigError
from lmcache_blend.eval.codec_bench import Document, measure
from lmcache_blend.eval.texts import documents, windows
from lmcache_blend.hf.calibrate import Documents, capture, fit_target

STEPS = (0.35, 0.6, 1.0, 1.7, 2.8, 4.6)
LABELS = 96
FITTED = ("fisher_klt", "fisher_diagonal", "kvtc", "cachegen")


def fit_profile(
    runner: Any,
    output: Path,
    *,
    codec: str = "fisher_klt",
    data: Sequence[str | Path] = ("default",),
    tokens: int = 24_576,
    context_tokens: int = 1024,
    options: FitConfig | None = None,
    say: Callable[[str], None] = print,
) -> Profile:
    """A profile of `codec` for the runner's model, saved to `output`.

    data: sources of `texts.documents`. tokens: of calibration, at most; they are cut into windows of
    context_tokens. Every
    sixth window is left out of the fit, and measures bits per element and KL at several steps. Captured windows lie in
    OUTPUT.parts until the profile is written: an interrupted fit goes on there. Raises ConfigError, DataError.
    """
    if codec not in FITTED:
        raise ConfigError(f"codec {codec!r} has nothing to fit; choose one of {', '.join(FITTED)}")
    # In turns, so that every source has a share of the windows.
    texts = [text for turn in zip_longest(*map(documents, data)) for text in turn if text is not None]
    cut = windows(texts, runner.tokenizer, context_tokens + LABELS, max(3, tokens // context_tokens))
    held, used = cut[2::6][:4], [w for i, w in enumerate(cut) if i % 6 != 2]
    if not used or not held:
        raise ConfigError(
            f"{len(cut)} windows of {context_tokens} tokens are too few to fit and to measure; give more text"
        )
    parts = output.with_name(output.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    files = []
    for number, window in enumerate(tqdm(used, desc="calibration", unit="window")):
        path = parts / f"{runner.fingerprint[:12]}-{_name(window)}.safetensors"
        if not path.exists():
            capture(runner, window, context_tokens, path, seed=number)
        files.append(path)
    # CacheGen compresses keys after RoPE, all other codecs those before it.
    rotary = runner.rotary if codec == "cachegen" else None
    calibration, options = Documents(fit_target(runner), files, rotary), options or FitConfig()
    with tqdm(desc="fit", unit="group") as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        if codec == "kvtc":
            profile = kvtc.fit(calibration, progress=progress)
        elif codec == "cachegen":
            profile = cachegen_paper.fit(calibration, progress=progress)
        else:
            profile = fisher_fit.fit(calibration, options, diagonal=codec == "fisher_diagonal", progress=progress)
    if codec.startswith("fisher"):
        say(_cost(profile, runner, sum(calibration.lengths)))
        profile = replace(
            profile, settings={**profile.settings, "curve": _curve(runner, profile, held, context_tokens)}
        )
    profile.save(output)
    for path in files:
        path.unlink()
    if not any(parts.iterdir()):
        parts.rmdir()
    return profile


def _curve(runner: Any, profile: Profile, held: Sequence[Tensor], context: int) -> list[dict[str, float]]:
    docs = [Document(runner, window, context) for window in tqdm(held, desc="reference", unit="window")]
    curve = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile"
        profile.save(path)
        for step in tqdm(STEPS, desc="steps", unit="step"):
            codec = get_codec({"id": profile.codec, "profile": str(path), "step": step})
            rows = [measure(runner, codec, doc) for doc in docs]
            curve.append({"step": step, **{k: sum(r[k] for r in rows) / len(rows) for k in ("bits", "kl")}})
    return curve


def _cost(profile: Profile, runner: Any, tokens: int) -> str:
    t = profile.tensors
    size = sum(x.nbytes for name, x in t.items() if name.split(".")[-1] in ("forward", "inverse", "predict"))
    flops = sum(2 * x.size for name, x in t.items() if name.endswith((".inverse", ".predict")))
    widest = max((x.shape[0] for name, x in t.items() if name.endswith(".mean")), default=1)
    prefill = runner.cost.full(1024) / 1024
    text = (
        f"basis {size / 2**20:.1f} MiB, token table {t['features'].nbytes / 2**20:.1f} MiB, decoding at most "
        f"{flops / 1e6:.1f} MFLOP a token ({100 * flops / prefill:.1f} % of a prefill's)"
    )
    if tokens < 16 * widest:
        text += (
            f"\nwarning: {tokens} tokens are under 16 for each of the {widest} dimensions of a basis; give more text"
        )
    return text


def _name(window: Tensor) -> str:
    return hashlib.sha256(window.to(torch.int64).numpy().tobytes()).hexdigest()[:20]
