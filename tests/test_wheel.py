"""The sdist holds all that a checkout needs; the wheel built from it carries the library alone, and works elsewhere."""

import fnmatch
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from shutil import copy2, copytree

import pytest

ROOT = Path(__file__).parents[1]
IGNORED = [pattern.strip("/") for pattern in (ROOT / ".gitignore").read_text().split()]
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
BUILD_WHEEL = "pip wheel --no-deps -w dist ."
"""As docs/dependencies.md says it."""
USE = """
import importlib.util, pkgutil, sys
from pathlib import Path

import kvpress, sparsekv_pl
from transformers import pipeline

assert Path(sparsekv_pl.__file__).is_relative_to(sys.prefix), sparsekv_pl.__file__
public = 0
for found in pkgutil.walk_packages(sparsekv_pl.__path__, "sparsekv_pl."):
    module = importlib.import_module(found.name)
    public += sum(getattr(module, name) is not None for name in getattr(module, "__all__", ()))
for name in ("data", "callbacks", "train"):
    assert importlib.util.find_spec(name) is None, name

model, adapter = sys.argv[1:]
press = sparsekv_pl.AnchorPress(press=kvpress.KeyDiffPress(), compression_ratio=0.5)
for trained in (model, adapter):
    ask = pipeline("kv-press-text-generation", model=trained)
    answer = ask("A text that is read. " * 40, question="What is read?", press=press, max_new_tokens=4)
    assert isinstance(answer["answer"], str)
    adapted = [name for name, _ in ask.model.named_parameters() if "lora_" in name]
    assert bool(adapted) == (trained == adapter)
print(public)
"""


def files(folder: Path) -> set[str]:
    """Files below a folder that git would not ignore."""
    found = set()
    for path in folder.iterdir():
        if path.name == ".git" or any(fnmatch.fnmatch(path.name, pattern) for pattern in IGNORED):
            continue
        found |= {f"{path.name}/{name}" for name in files(path)} if path.is_dir() else {path.name}
    return found


def run(*command: str | Path, where: Path) -> str:
    """What a command printed; its error output if it failed."""
    done = subprocess.run([str(part) for part in command], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of this checkout, unpacked; built elsewhere, because setuptools writes beside its sources."""
    copy, unpacked = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("unpacked")
    for name in files(ROOT):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        copy2(ROOT / name, copy / name)
    run(sys.executable, "-c", BUILD_SDIST, unpacked, where=copy)
    (archive,) = unpacked.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(unpacked, filter="data")
    (folder,) = (path for path in unpacked.iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist alone, by this environment's setuptools."""
    copy = tmp_path_factory.mktemp("wheel") / "checkout"
    copytree(sdist, copy)
    run(sys.executable, "-m", *shlex.split(BUILD_WHEEL), "--no-build-isolation", where=copy)
    (built,) = copy.glob("dist/*.whl")
    return built


def test_the_sdist_holds_all_that_a_checkout_holds(sdist: Path) -> None:
    assert len(files(ROOT)) > 400
    assert files(sdist) - {"PKG-INFO", "setup.cfg"} == files(ROOT)


def test_the_page_says_how_to_build_the_wheel() -> None:
    assert f"\n{BUILD_WHEEL}\n" in (ROOT / "docs/dependencies.md").read_text()


def test_the_wheel_carries_the_whole_library_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert names == {name for name in files(ROOT) if name.startswith("sparsekv_pl/")}
    assert "sparsekv_pl/py.typed" in names


def test_the_wheel_works_outside_the_checkout(
    wheel: Path, tiny_models: dict[str, str], tiny_adapter: Callable[..., str], tmp_path: Path
) -> None:
    """Every public name, a press of ours in kvpress's pipeline, and an adapter, in an environment of its own.

    Its dependencies are this environment's: pip has looked at them, and to fetch them again takes minutes.
    """
    venv.create(tmp_path / "empty")
    python = tmp_path / "empty" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel, where=tmp_path)
    (packages,) = (tmp_path / "empty" / "lib").glob("*/site-packages")
    # A line in a .pth puts a folder on the path without its own .pth files, among them that of the checkout.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    assert int(run(python, "-c", USE, tiny_models["llama"], tiny_adapter(0), where=tmp_path)) > 30
