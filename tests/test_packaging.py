"""Packaging: what `pip install` gives is what runs from the root, and the layers import downwards only."""

import importlib
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import lmcache_blend

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
LINKED = [name for name, folder in SETUPTOOLS["package-dir"].items() if "." in name and "/" not in folder]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def folder_of(package: str) -> Path:
    """Where pyproject.toml says that the package's files are."""
    for name, folder in sorted(SETUPTOOLS["package-dir"].items(), reverse=True):
        if package == name or package.startswith(f"{name}."):
            return ROOT / folder / package[len(name) + 1 :].replace(".", "/")
    raise LookupError(package)


def test_packages_are_the_folders_on_disk():
    listed = {folder_of(package): package for package in SETUPTOOLS["packages"]}
    roots = {ROOT / folder for folder in SETUPTOOLS["package-dir"].values()}
    found = {init.parent for root in roots for init in root.rglob("__init__.py") if not has_link(init.parent)}
    assert set(listed) == found
    assert len(listed) == len(SETUPTOOLS["packages"])


def has_link(folder: Path) -> bool:
    return any(part.is_symlink() for part in [folder, *folder.parents] if part.is_relative_to(ROOT))


@pytest.mark.parametrize("package", LINKED)
def test_a_link_serves_runs_from_the_root(package):
    link = ROOT / package.replace(".", "/")
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == folder_of(package)
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("package", LINKED)
def test_a_folder_is_no_top_level_module(package):
    """`codecs` is the standard library's, and vLLM takes any `triton_kernels` that it can import."""
    name = package.rpartition(".")[2]
    load = (
        "import importlib.util as u, sys\n"
        f"spec = u.spec_from_file_location({name!r}, {str(folder_of(package) / '__init__.py')!r})\n"
        "spec.loader.exec_module(u.module_from_spec(spec))"
    )
    done = run(sys.executable, "-c", load)
    assert done.returncode == 1
    assert "ImportError" in done.stderr.splitlines()[-1]
    assert f"lmcache_blend.{name}" in done.stderr.splitlines()[-1]


def modules() -> dict[str, str]:
    """Every module of ours: its path in a wheel -> its path in the repository."""
    return {
        f"{package.replace('.', '/')}/{file.name}": str(file.relative_to(ROOT))
        for package in SETUPTOOLS["packages"]
        for file in folder_of(package).glob("*.py")
    }


BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # setuptools puts an argv of its own in its place
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""


def build(tree: Path, out: Path) -> tuple[set[str], Path]:
    """Wheel and sdist of a source tree, by the backend as it is installed here, so without network.

    Returns the names in the wheel and the path of the sdist.
    """
    out.mkdir()
    done = run(sys.executable, "-c", BUILD, str(out), cwd=tree)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        return set(wheel.namelist()), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what is built from, so that a build leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("tree")
    for part in (*SETUPTOOLS["package-dir"].values(), "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, symlinks=True)
        else:
            shutil.copy(ROOT / part, copy / part)
    return copy


def test_wheel_and_sdist_hold_every_module_and_nothing_else(tree, tmp_path):
    names, archive = build(tree, tmp_path / "first")
    code = {name for name in names if ".dist-info/" not in name}
    assert code == set(modules())
    assert {name.rpartition("/")[2] for name in names - code} >= {"LICENSE", "entry_points.txt", "METADATA"}
    with tarfile.open(archive) as sdist:
        assert {name.partition("/")[2] for name in sdist.getnames()} >= set(modules().values())
        sdist.extractall(tmp_path / "unpacked", filter="data")
    again, _ = build(next((tmp_path / "unpacked").iterdir()), tmp_path / "again")
    assert again == names, "the sdist must build the same wheel"


def test_versions_agree():
    assert lmcache_blend.__version__ == PROJECT["project"]["version"]


def test_extras_name_what_the_errors_promise():
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"eval", "offline", "notebook", "dev"} <= set(extras)
    assert {name.partition(">=")[0] for name in extras["offline"]} == {"gguf", "accelerate"}


def test_layers_import_downwards_only():
    done = run(sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()")
    assert "0 broken" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


def test_no_package_import_needs_an_optional_extra():
    """The core must import where only the required dependencies are installed."""
    optional = [
        "rouge_score",
        "matplotlib",
        "datasets",
        "gguf",
        "accelerate",
        "nbclient",
        "nbformat",
        "ipykernel",
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({optional}))\n"
        "import lmcache_blend, lmcache_blend.cli, lmcache_blend.eval, lmcache_blend.hf.resolve"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
