"""Every registered codec keeps the promises of `CodecConformance`, and its format is frozen by a golden file.

python tests/test_codec_conformance.py --write-golden      writes those that are missing, overwrites none
"""

import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_blend.codecs import codecs
from lmcache_blend.testing import CodecConformance

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """spec: id or config. error: most relative error, None where the codec is lossless. stable: the very same bytes."""

    spec: str | dict[str, Any]
    error: float | None
    stable: bool = True

    @property
    def id(self) -> str:
        return self.spec if isinstance(self.spec, str) else self.spec["id"]


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
}
NEEDS_PROFILE = {"kvtc": "test_kvtc.py"}
"""Codecs that code nothing without a profile -> the test file that runs the suite with one."""


def suite(name: str, case: Case) -> type[CodecConformance]:
    claims = {
        "lossless": case.error is None,
        "max_relative_error": case.error or 0.0,
        "golden": GOLDEN / f"{name}.bin",
        "stable_bytes": case.stable,
        "codec": lambda self: case.spec,
    }
    return type(f"Test_{name}", (CodecConformance,), claims)


SUITES = {f"Test_{name}": suite(name, case) for name, case in CASES.items()}
globals().update(SUITES)


def test_no_registered_codec_is_missing():
    assert set(codecs) == {case.id for case in CASES.values()} | set(NEEDS_PROFILE)


def test_codecs_with_a_profile_run_the_suite_where_it_says():
    for name, file in NEEDS_PROFILE.items():
        assert "CodecConformance" in (Path(__file__).parent / file).read_text(), name


def test_golden_files_are_small_and_belong_to_a_codec():
    files = {file.stem: file.stat().st_size for file in GOLDEN.glob("*.bin")}
    assert set(files) == set(CASES), "run `python tests/test_codec_conformance.py --write-golden`"
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
