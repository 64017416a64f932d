"""The Colab notebook, in an environment of its own that has what Colab brings and nothing of this repository."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest
from test_packaging import PINS

from foggen.store import ROOT

# What Colab has (seen in mid 2026), apart from torch, which is there as a build for its own GPU.
COLAB = ["numpy==2.0.2", "pandas==2.2.2", "matplotlib==3.10.0", "transformers==5.9.0"]
KEPT = ("torch", "numpy", "pandas", "matplotlib")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder, with_pip=True)
    ours = [pin for pin in PINS if pin.split("==")[0] in ("torch", "ipykernel", "papermill")]
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", *COLAB, *ours]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"an environment like Colab's cannot be installed here: {done.stderr[-300:]}")
    return python


@pytest.mark.slow
def test_the_colab_notebook_runs_on_what_colab_brings_and_resumes(
    bare_python: Path, tmp_path: Path
) -> None:
    def say(code: str) -> str:
        return subprocess.run([bare_python, "-c", code], capture_output=True, text=True).stdout

    versions = f"from importlib.metadata import version; print([version(name) for name in {KEPT}])"
    before = say(versions)
    assert "2.0.2" in before and "2.2.2" in before
    parameters = tmp_path / "parameters.yaml"
    overrides = {"edge.model": "data/pocket/foggen-r14", "test_questions": 70}
    parameters.write_text(
        json.dumps({"profile": "pocket", "run": str(tmp_path / "run"), "overrides": overrides})
    )
    arguments = ["colab_evaluate.ipynb", str(tmp_path / "out.ipynb"), "-f", str(parameters)]
    command = [bare_python, "-m", "papermill", *arguments]
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FOGGEN", "VIRTUAL"))
    }
    made = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT / "notebooks", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        made.append(
            {path.name: path.stat().st_mtime for path in (tmp_path / "run" / "stages").iterdir()}
        )
    assert made[0] == made[1] and len(made[0]) == 14, (
        "seven domains, edge and cloud; resumed, not asked again"
    )
    assert say(versions) == before
    result = json.loads((tmp_path / "run" / "done" / "colab_evaluate.json").read_text())
    assert result["results"]["n"] == 70 and "AUROC" in result["headline"]
    assert (tmp_path / "run" / "figures" / "colab_evaluate.png").exists()
