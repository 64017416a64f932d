"""The Colab notebook, in an environment that has what Colab brings and nothing of ours."""

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
def test_it_runs_on_what_colab_brings_and_resumes(bare_python: Path, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> str:
        clean = ("PYTHON", "FOGGEN", "VIRTUAL")
        variables = {k: v for k, v in os.environ.items() if not k.startswith(clean)}
        command = [bare_python, *arguments]
        where = ROOT / "notebooks"
        done = subprocess.run(command, cwd=where, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    versions = f"from importlib.metadata import version; print([version(name) for name in {KEPT}])"
    before = run("-c", versions)
    assert "2.0.2" in before and "2.2.2" in before
    overrides = {"edge.model": "data/pocket/foggen-r14", "test_questions": 70}
    given = {"profile": "pocket", "run": str(tmp_path / "run"), "overrides": overrides}
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(json.dumps(given))
    stages = []
    for _ in range(2):
        output = tmp_path / "out.ipynb"
        run("-m", "papermill", "colab_evaluate.ipynb", output, "-f", parameters)
        made = (tmp_path / "run" / "stages").iterdir()
        stages.append({path.name: path.stat().st_mtime for path in made})
    assert stages[0] == stages[1], "resumed, not asked again"
    assert len(stages[0]) == 14, "seven domains, edge and cloud"
    assert run("-c", versions) == before
    record = json.loads((tmp_path / "run" / "done" / "colab_evaluate.json").read_text())
    assert record["results"]["n"] == 70 and "AUROC" in record["headline"]
    assert (tmp_path / "run" / "figures" / "colab_evaluate.png").exists()
