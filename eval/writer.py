"""Folders of results on disk, written so that a crash, a kill or a full disk costs nothing already there.

DIR/<task>__<model>__<method>__<hash8>/ holds config.json (written first), samples.jsonl (one line per sample,
synced), trace.npz (arrays of the first sample) and results.json (replaced as a whole).
"""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pydantic

from lmcache_blend.errors import ConfigError, DataError, ResultsError
from lmcache_blend.eval.aggregate import aggregate
from lmcache_blend.eval.results import Results, RunConfig, SampleResult

CONFIG, SAMPLES, RESULTS, TRACE = "config.json", "samples.jsonl", "results.json", "trace.npz"


class RunFolder:
    """One combination's folder; opening it reads what an earlier run measured and drops a torn last line.

    Raises ResultsError where nothing can be written there, DataError where samples.jsonl is broken inside.
    """

    def __init__(self, output: Path, config: RunConfig):
        self.config = config
        self.path = output / config.folder
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / CONFIG).exists():
            write_atomic(self.path / CONFIG, (config.model_dump_json(indent=2) + "\n").encode())
        self._samples_path = self.path / SAMPLES
        self.samples, good_bytes = read_samples(self._samples_path)
        if self._samples_path.exists() and self._samples_path.stat().st_size > good_bytes:
            with writing(self._samples_path):
                os.truncate(self._samples_path, good_bytes)

    def has(self, sample_id: str, prompt_sha256: str) -> bool:
        """Whether that very prompt is already measured."""
        old = self.samples.get(sample_id)
        return old is not None and old.prompt_sha256 == prompt_sha256

    def append(self, sample: SampleResult) -> None:
        """Write one line and sync it; where that fails the file is cut back to whole lines.

        Raises ResultsError.
        """
        line = (sample.model_dump_json() + "\n").encode()
        with writing(self._samples_path), open(self._samples_path, "ab", buffering=0) as file:
            whole = os.fstat(file.fileno()).st_size
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file.fileno(), whole)
                raise
        self.samples[sample.id] = sample

    def write_trace(self, arrays: dict[str, np.ndarray]) -> None:
        """Write the first sample's arrays as compressed npz. Raises ResultsError."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
        write_atomic(self.path / TRACE, buffer.getvalue())

    def write_results(self, results: Results) -> None:
        """Replace results.json. Raises ResultsError."""
        write_atomic(self.path / RESULTS, (results.model_dump_json(indent=2) + "\n").encode())


def read_samples(path: Path) -> tuple[dict[str, SampleResult], int]:
    """Samples by id (the last line of an id wins) and the bytes of the whole lines that hold them.

    A last line that is torn is left out. Raises DataError, naming file and line, where another one is broken.
    """
    if not path.exists():
        return {}, 0
    samples: dict[str, SampleResult] = {}
    good_bytes = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no line end")
            sample = SampleResult.model_validate_json(line)
        except ValueError:
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number}: not a sample; remove that line to measure the sample anew"
            ) from None
        samples[sample.id] = sample
        good_bytes += len(line)
    return samples, good_bytes


def read_folder(folder: Path) -> Results | None:
    """Results of one folder; computed from its samples where results.json is missing or older than they are.

    None where nothing is measured yet. Raises DataError.
    """
    try:
        config = RunConfig.model_validate_json((folder / CONFIG).read_bytes())
        samples, _ = read_samples(folder / SAMPLES)
        saved = folder / RESULTS
        results = Results.model_validate_json(saved.read_bytes()) if saved.exists() else None
    except (OSError, pydantic.ValidationError) as error:
        raise DataError(
            f"{folder}: not a folder of results ({_first_line(error)}); remove it to report the others"
        ) from None
    if results is not None and results.n >= len(samples):
        return results
    skipped, versions = (results.skipped, results.versions) if results else ([], {})
    return aggregate(config, list(samples.values()), skipped=skipped, versions=versions) if samples else None


def find_folders(root: Path) -> list[Path]:
    """Every folder of results at or below `root`, by name. Raises ConfigError where there is none."""
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder; give the --output folder of a run")
    found = sorted(path.parent for path in root.rglob(CONFIG) if (path.parent / SAMPLES).exists())
    if not found:
        raise ConfigError(
            f"no results below {root}; give the --output folder of a run that measured at least one sample"
        )
    return found


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file as a whole: written beside it, synced, renamed. Raises ResultsError; the old stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a ResultsError of one line that names the path and the remedy."""
    try:
        yield
    except ResultsError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        raise ResultsError(
            f"cannot write {path}: {reason}; {remedy} or choose another --output, then run the same command "
            "again to go on (results already written are intact)"
        ) from error


def _first_line(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return f"{error.title} {'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return str(error)
