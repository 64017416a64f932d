"""The repository itself: pins in one place, notebooks that are evidence, no traces of a machine."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from foggen.store import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLACES = re.compile(r"(?<![\w.])/(?:home|Users|root|tmp|work|mnt|content)/\w|[A-Z]:\\\\Users")
PINS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def tracked(*endings: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    files = [ROOT / name for name in listed if name.endswith(endings)]
    if not files:
        pytest.skip("not a git checkout: its files cannot be listed")
    return [file for file in files if file.exists()]


def test_every_dependency_is_pinned_exactly():
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in PINS)
    assert "torch==2.13.0" in PINS, "other versions bring CUDA packages"


def test_pins_are_the_same_everywhere():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == PINS
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert pip == [*PINS, "-e ."]


def test_the_installed_versions_are_the_pinned_ones():
    from importlib.metadata import version

    found = {pin.split("==")[0]: version(pin.split("==")[0]).split("+")[0] for pin in PINS}
    assert [f"{name}=={number}" for name, number in found.items()] == PINS


def test_no_paths_of_a_machine():
    for file in tracked(".py", ".md", ".yaml", ".yml", ".toml", ".cff", ".ipynb", "Makefile", ".ci/run"):
        if file.parts[-2] == "tests":
            continue
        found = PLACES.search(file.read_text(encoding="utf-8"))
        assert not found, f"{file.relative_to(ROOT)}: {found and found.group(0)}"


def cells(notebook: Path) -> list[dict[str, Any]]:
    return list(json.loads(notebook.read_text(encoding="utf-8"))["cells"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_ran_once_from_top_to_bottom(self, notebook: Path) -> None:
        code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        kinds = [(output["output_type"], output.get("name")) for cell in code for output in cell["outputs"]]
        assert ("error", None) not in kinds and ("stream", "stderr") not in kinds

    def test_is_tidy(self, notebook: Path) -> None:
        source = ["".join(cell["source"]) for cell in cells(notebook)]
        assert all(text.strip() for text in source), "an empty cell"
        assert source[0].startswith("# "), "the title comes first"
        code = [
            text for text, cell in zip(source, cells(notebook), strict=True) if cell["cell_type"] == "code"
        ]
        assert max(len(text.splitlines()) for text in code) < 30
        assert {tag for cell in cells(notebook) for tag in cell["metadata"].get("tags", [])} <= {
            "parameters",
            "nbval-check-output",
            "nbval-ignore-output",
            "nbval-skip",
            "nbval-raises-exception",
        }

    def test_takes_the_runners_parameters_and_ends_with_its_sentinel(self, notebook: Path) -> None:
        tagged = [cell for cell in cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1
        names = re.findall(r"^(\w+)\b[^=\n]*=", "".join(tagged[0]["source"]), flags=re.MULTILINE)
        assert names == ["profile", "run", "seed", "overrides"]
        last = "".join(cells(notebook)[-1]["source"])
        assert re.search(rf'\bfinish\(\s*run,\s*"{notebook.stem}"', last)
