"""Notebook 08: a model that knows nothing does not pass its checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from foggen.store import ROOT


@pytest.mark.slow
def test_a_random_model_does_not_pass(tiny_model: Path, tmp_path: Path) -> None:
    sizes = {"calibration_rows": 28, "new_rows": 7, "replay_rows": 7, "dev_questions": 35}
    overrides = {"edge.model": str(tiny_model), "edge.format_install": None, **sizes}
    parameters, made = tmp_path / "parameters.yaml", tmp_path / "out.ipynb"
    parameters.write_text(json.dumps({"run": str(tmp_path / "run"), "overrides": overrides}))
    notebook = ROOT / "notebooks" / "08_your_model.ipynb"
    command = [sys.executable, "-m", "papermill", notebook, made, "-f", parameters]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "done" / "08_your_model.json").read_text())
    failed = record["results"]["failed"]
    assert {"readable answers", "points above chance", "AUROC of the free score"} <= set(failed)
    cells = nbformat.read(made, as_version=4).cells
    shown = [part.get("data", {}) for cell in cells for part in cell.get("outputs", [])]
    assert any("**Not yet: readable answers" in data.get("text/markdown", "") for data in shown)
