"""`make plan PROFILE=paper` says what a run needs, and a run that lacks it does not begin."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub import Fault, Hub, Program
from repositories import GEMMA, PAPER

from foggen.questions import OPEN_SETS
from foggen.store import library_versions

VLLM = [name for name in library_versions() if name.startswith("vllm")]
NEEDED = [
    f"model {PAPER.edge.model}",
    f"model {PAPER.cloud.model}",
    *[f"dataset {source.path}" for source in (*PAPER.data.sources, *OPEN_SETS.values())],
]


def needs(program: Program, home: Path, *options: str) -> list[str]:
    """The plan's lines between the notebooks and the parameters."""
    options = ("--run", str(home / "run"), *options)
    done = program(home, "-m", "foggen.reproduce", "--list", *options)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.split("\n")]
    begin = next(
        n for n, line in enumerate(lines) if line.startswith(("dataset", "model", "0", "6"))
    )
    return lines[begin : next(n for n, line in enumerate(lines) if line.startswith("name = "))]


def test_the_plan_lists_downloads_disk_and_memory(
    hub: Hub, program: Program, tmp_path: Path
) -> None:
    lines = needs(program, tmp_path, "--profile", "paper")
    for need in NEEDED:
        line = next(line for line in lines if line.startswith(f"{need}: "))
        assert line.endswith("GB to download"), line  # nothing is missing
    disk = next(line for line in lines if line.startswith("disk: "))
    memory = next(line for line in lines if line.startswith("vLLM, with about "))
    assert "GB, with a checkpoint per round" in disk and "GB of GPU memory" in memory
    if not VLLM:
        assert memory.endswith("install it: make setup-gpu")
    assert not any(word in " ".join(lines) for word in (" min", "minutes", "hours"))
    bodies = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert bodies == [] and not (tmp_path / "run").exists()  # asked, not fetched; nothing made


def test_the_plan_names_what_cannot_be_had(hub: Hub, program: Program, tmp_path: Path) -> None:
    hub.gated = {GEMMA.model: "hf_rehearsal", PAPER.cloud.model: "hf_rehearsal"}
    lines = needs(program, tmp_path, "--profile", "paper-gemma3-1b")
    told = [line for line in lines if "Cannot access gated repo" in line]
    assert len(told) == 2 and "hf auth login" in told[0]
    assert any("61 GB to download" in line for line in told)  # known without the hub
    disk = next(line for line in lines if line.startswith("disk: "))
    assert float(disk.split()[1]) >= 61


def test_a_run_that_lacks_something_does_not_begin(
    hub: Hub, program: Program, tmp_path: Path
) -> None:
    hub.fault = Fault(503, f"{PAPER.cloud.model}/resolve/")
    command = ["--profile", "paper", "--run", str(tmp_path / "run"), "-p", "engine=transformers"]
    done = program(tmp_path, "-m", "foggen.reproduce", *command)
    assert done.returncode == 2 and "This run cannot begin:" in done.stderr
    assert f"model {PAPER.cloud.model}" in done.stderr and "503 Service Unavailable" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("notebooks/*")), "no notebook was run"


@pytest.mark.skipif(bool(VLLM), reason="vLLM is installed")
def test_vllm_is_missed_before_the_first_notebook(
    hub: Hub, program: Program, tmp_path: Path
) -> None:
    done = program(
        tmp_path, "-m", "foggen.reproduce", "--profile", "paper", "--run", str(tmp_path / "run")
    )
    assert done.returncode == 2 and "install it: make setup-gpu" in done.stderr
