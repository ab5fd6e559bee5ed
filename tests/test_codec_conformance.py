"""Every registered codec keeps the promises of `CodecConformance`, and its format is frozen by a golden file.

python tests/test_codec_conformance.py --write-golden      writes those that are missing, overwrites none
"""

import sys
import tempfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lmcache_blend.codecs import codecs, fisher_fit, kvtc
from lmcache_blend.codecs.calibration import FitTarget
from lmcache_blend.testing import CodecConformance, matrix, noise

GOLDEN = Path(__file__).parent / "golden"
FITTED = ((2, 16, 1, 8),) * 4
"""Shapes of the profiles that are fitted here."""


@dataclass(frozen=True)
class Case:
    """spec: id or config. error: most relative error, None where the codec is lossless. stable: the very same bytes.

    fitted: with a profile, fitted on the spot; its eigenvectors differ between machines, so nothing is golden.
    """

    spec: str | dict[str, Any]
    error: float | None
    stable: bool = True
    fitted: bool = False

    @property
    def id(self) -> str:
        return self.spec if isinstance(self.spec, str) else self.spec["id"]

    def config(self) -> str | dict[str, Any]:
        """What `get_codec` takes."""
        if isinstance(self.spec, str) or not self.fitted:
            return self.spec
        return {**self.spec, "profile": profile(self.id)}


def pipeline(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"id": "pipeline", "k": list(stages)}


SINKS, MEAN, UNIFORM = {"id": "sinks"}, {"id": "mean"}, {"id": "uniform"}
ZLIB = "ng" not in zlib.ZLIB_RUNTIME_VERSION
"""zlib-ng gives other bytes for the same data, so that only decoding is frozen there."""

# A codec joins with one line.
CASES = {
    "raw": Case("raw", None),
    "pipeline_rans": Case(pipeline(SINKS, MEAN, UNIFORM, {"id": "rans"}), 0.08, ZLIB),
    "pipeline_rans_row": Case(
        pipeline({"id": "token_absmax", "bins": 64}, {"id": "rans", "tables": "row"}), 0.05, ZLIB
    ),
    "pipeline_deflate": Case(pipeline(MEAN, UNIFORM, {"id": "deflate"}), 0.08, ZLIB),
    "lossless": Case("lossless", None, ZLIB),
    "zstd": Case("zstd", None, stable=False),
    "fp8": Case("fp8", 0.035),
    "int8": Case("int8", 0.01),
    "int4": Case("int4", 0.15),
    "kivi": Case("kivi", 0.12),
    "hadamard": Case("hadamard", 0.12, ZLIB),
    "cachegen": Case("cachegen", 0.1, ZLIB),
    "cachegen_paper": Case({"id": "cachegen", "mode": "paper"}, 0.4, ZLIB),
    "fisher_klt": Case("fisher_klt", 0.12, ZLIB),
    "fisher_diagonal": Case("fisher_diagonal", 0.12, ZLIB),
    "kvtc_fitted": Case({"id": "kvtc", "bits": 4, "recent": 8}, 0.4, fitted=True),
    "fisher_klt_fitted": Case({"id": "fisher_klt", "step": 0.5}, 0.05, fitted=True),
    "fisher_diagonal_fitted": Case({"id": "fisher_diagonal", "step": 0.5}, 0.05, fitted=True),
}


class Calibrated:
    """600 tokens of what the suite's chunks are made of."""

    texts = frozenset({"a"})

    def __init__(self) -> None:
        embedding = matrix(1, 512, 8, 5)[0]
        self.target, self.lengths = FitTarget("toy", "f" * 64, FITTED, embedding), [600]
        self.ids = [torch.from_numpy(noise(600, 3).astype("i8") % 512)]
        self.chunk = CodecConformance().chunk(FITTED, 600, torch.float32, 7)

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (x.transpose(0, 1).flatten(1) for x in self.chunk.layers[layer])
        return k, v

    def fisher(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        h, d, h2, d2 = FITTED[layer]
        return tuple(torch.diag(torch.arange(1.0, n + 1)).expand(m, n, n) for m, n in ((h, d), (h2, d2)))  # type: ignore[return-value]

    def energy(self, layer: int) -> torch.Tensor:
        return self.kv(layer)[0].square().mean(1)


@lru_cache
def profile(codec: str) -> str:
    """Path of a profile of that codec, fitted to `Calibrated`; gone when the process ends."""
    if codec == "kvtc":
        made = kvtc.fit(Calibrated(), layers=2)
    else:
        options = fisher_fit.FitConfig(group=1 if codec == "fisher_diagonal" else 2, token_rank=4)
        made = fisher_fit.fit(Calibrated(), options, diagonal=codec == "fisher_diagonal")
        made.settings["curve"] = [{"step": s, "bits": 3 / s, "kl": 0.01 * s} for s in (0.25, 1.0)]
    made.save(path := Path(folder().name) / f"{codec}.safetensors")
    return str(path)


@lru_cache
def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def suite(name: str, case: Case) -> type[CodecConformance]:
    claims = {
        "lossless": case.error is None,
        "max_relative_error": case.error or 0.0,
        "golden": None if case.fitted else GOLDEN / f"{name}.bin",
        "stable_bytes": case.stable,
        "codec": lambda self: case.config(),
    }
    if case.fitted:
        claims["shapes"] = (FITTED,)
    return type(f"Test_{name}", (CodecConformance,), claims)


SUITES = {f"Test_{name}": suite(name, case) for name, case in CASES.items()}
globals().update(SUITES)


def test_no_registered_codec_is_missing():
    assert {case.id for case in CASES.values()} == set(codecs)


def test_golden_files_are_small_and_belong_to_a_codec():
    files = {file.stem: file.stat().st_size for file in GOLDEN.glob("*.bin")}
    wanted = {name for name, case in CASES.items() if not case.fitted}
    assert set(files) == wanted, "run `python tests/test_codec_conformance.py --write-golden`"
    assert max(files.values()) <= 2304


def test_a_golden_file_is_never_overwritten(tmp_path):
    one = SUITES["Test_raw"]()
    one.golden = tmp_path / "raw.bin"
    assert one.write_golden()
    one.golden.write_bytes(b"old")
    assert not one.write_golden()
    assert one.golden.read_bytes() == b"old"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-golden"]:
        sys.exit(__doc__)
    GOLDEN.mkdir(exist_ok=True)
    for made in SUITES.values():
        if made().write_golden():
            print(f"wrote {made.golden}")
