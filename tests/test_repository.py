"""The repository itself: notebooks that are evidence, no traces of a machine, a thin library."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from foggen.config import load_profile
from foggen.store import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLACES = re.compile(
    r"(?<![\w.])/(?:home|Users|root|tmp|work|mnt|content(?!/drive))/\w|[A-Z]:\\\\Users"
)


TAGS = {
    "parameters",
    "nbval-check-output",
    "nbval-ignore-output",
    "nbval-skip",
    "nbval-raises-exception",
}


def tracked(*endings: str) -> list[Path]:
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    files = [ROOT / name for name in listed.split("\n") if name.endswith(endings)]
    if not files:
        pytest.skip("not a git checkout: its files cannot be listed")
    return [file for file in files if file.exists()]


def test_no_paths_of_a_machine():
    kinds = (".py", ".md", ".yaml", ".yml", ".toml", ".cff", ".ipynb", "Makefile", ".ci/run")
    for file in tracked(*kinds):
        if file.parts[-2] != "tests":
            place = PLACES.search(file.read_text(encoding="utf-8"))
            assert not place, f"{file.relative_to(ROOT)}: {place and place.group(0)}"


def cells(notebook: Path) -> list[dict[str, Any]]:
    return list(json.loads(notebook.read_text(encoding="utf-8"))["cells"])


def is_folded(cell: dict[str, Any]) -> bool:
    return bool(cell["metadata"].get("jupyter", {}).get("source_hidden"))


class Notebook:
    """The cells of a notebook, and their texts."""

    def __init__(self, path: Path) -> None:
        self.cells = cells(path)
        self.code = [cell for cell in self.cells if cell["cell_type"] == "code"]
        self.folded = [is_folded(cell) for cell in self.cells]
        self.sources = ["".join(cell["source"]) for cell in self.cells]
        self.tags = [set(cell["metadata"].get("tags", [])) for cell in self.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_ran_once_from_top_to_bottom(self, path: Path) -> None:
        code = Notebook(path).code
        outputs = [output for cell in code for output in cell["outputs"]]
        counts = [cell["execution_count"] for cell in code]
        if path.stem.startswith("colab"):  # needs a hub: nothing in it was measured here
            assert not outputs and not any(counts)
            return
        assert counts == list(range(1, len(code) + 1))
        kinds = {(output["output_type"], output.get("name")) for output in outputs}
        assert not kinds & {("error", None), ("stream", "stderr")}

    def test_is_tidy(self, path: Path) -> None:
        notebook = Notebook(path)
        assert all(text.strip() for text in notebook.sources), "an empty cell"
        assert notebook.sources[0].startswith("# "), "the title comes first"
        shown = [cell for cell in notebook.code if not is_folded(cell)]
        lines = [len("".join(cell["source"]).splitlines()) for cell in shown]
        assert max(lines) <= 30 and median(lines) < 15 and len(notebook.cells) <= 70
        code = "\n".join("".join(cell["source"]) for cell in notebook.code)
        assert max(map(len, code.splitlines())) <= 100 and "fmt: skip" not in code
        assert set().union(*notebook.tags) <= TAGS

    def test_folds_its_machinery(self, path: Path) -> None:
        """The cells that print versions, and the one that writes the sentinel."""
        notebook = Notebook(path)
        for text, folded in zip(notebook.sources, notebook.folded, strict=True):
            assert folded or not re.search(r"\bfinish\(|import version\b", text)

    def test_says_how_to_start_it_where_the_library_is_missing(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if path.stem.startswith("colab"):  # it installs the library itself
            return
        monkeypatch.setitem(sys.modules, "foggen", None)
        with pytest.raises(SystemExit, match="`make lab`"):
            exec("".join(Notebook(path).code[0]["source"]), {})

    def test_shows_tables_that_can_be_read(self, path: Path) -> None:
        """At most six columns beside the index, and no interval that is a point."""
        for cell in Notebook(path).code:
            for output in cell["outputs"]:
                table = "".join(output.get("data", {}).get("text/html", ""))
                row = table.partition("<tbody>")[2].partition("</tr>")[0]
                assert row.count("<td") <= 6, table[:500]
                points = re.findall(r"([-+]?[\d.]+%?) \[\1, \1\]", table)
                assert not points, f"{points} in {''.join(cell['source'])[:80]}"

    def test_has_exercises(self, path: Path) -> None:
        """Two or more: a question, an empty cell, a folded solution, and a folded discussion."""
        notebook = Notebook(path)
        empty = [i for i, text in enumerate(notebook.sources) if "# your code here" in text]
        assert len(empty) >= 2
        for place in empty:
            question, solution, discussion = (notebook.sources[place + step] for step in (-1, 1, 2))
            assert re.search(r"^\*\*\d\. ", question, flags=re.MULTILINE), question
            assert notebook.folded[place + 1] and notebook.cells[place + 1]["cell_type"] == "code"
            assert discussion.startswith("<details><summary>Discussion</summary>"), solution

    def test_teaches(self, path: Path) -> None:
        """Opens with question and cost, links to its neighbours, explains, ends with a result."""
        notebook = Notebook(path)
        first = notebook.sources[0]
        assert re.search(r"\*\*[^*]+\?\*\*", first), "the question comes first"
        assert all(f"\n| {row} |" in first for row in ("in", "out", "time, memory", "needs"))
        chain = [other for other in NOTEBOOKS if other.stem[0].isdigit()]
        if path in chain:
            place = chain.index(path)
            beside = {*chain[max(place - 1, 0) : place], *chain[place + 1 : place + 2]}
            assert all(f"({other.name})" in first for other in beside), "links to both neighbours"
        heads = re.findall(r"^## (.+)$", prose(path), flags=re.MULTILINE)
        assert {"Result", "Answer", "What this shows"} & set(heads), "an answer at the end"
        explained = 1 - len(notebook.code) / len(notebook.cells)
        assert 0.35 <= explained <= 0.65

    def test_takes_the_runners_parameters_and_ends_with_its_sentinel(self, path: Path) -> None:
        notebook = Notebook(path)
        (given,) = [
            text
            for text, tags in zip(notebook.sources, notebook.tags, strict=True)
            if "parameters" in tags
        ]
        names = re.findall(r"^(\w+)\b[^=\n]*=", given, flags=re.MULTILINE)
        more = ["outcomes", "other", "stratum"] if path.stem.startswith("07") else []
        assert names == ["profile", "run", "seed", "overrides", *more]
        assert re.search(rf'\bfinish\(\s*\w+,\s*"{path.stem}"', notebook.sources[-1])


def test_notebooks_are_short() -> None:
    assert median(len(cells(path)) for path in NOTEBOOKS) < 60


# ---- links, spelling, citation


def prose(file: Path) -> str:
    """A Markdown file's text, or that of a notebook's Markdown cells; code fences are no prose."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        text = "\n".join(
            "".join(one["source"]) for one in cells(file) if one["cell_type"] == "markdown"
        )
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(file: Path) -> set[str]:
    """The names under which a Markdown file's headings can be linked to."""
    heads = re.findall(r"^#+ +(.+)$", prose(file), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_local_links_lead_somewhere():
    broken = []
    for file in tracked(".md", ".ipynb"):
        if file.name.endswith(
            "_card.md"
        ):  # templates of the model cards, which lie in the models' folders
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
    found = subprocess.run(
        [sys.executable, "-m", "codespell_lib"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


CITATION_FIELDS = set(
    "cff-version message title type authors license version keywords references abstract "
    "repository-code url date-released".split()
)


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
                assert set(author) <= {
                    "name",
                    "family-names",
                    "given-names",
                    "orcid",
                    "website",
                    "alias",
                }
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


# ---- the library: who imports whom

FILES = {
    ".".join(file.relative_to(ROOT / "lib" / "foggen").with_suffix("").parts): file
    for file in sorted((ROOT / "lib" / "foggen").rglob("*.py"))
}


def imports(file: Path) -> set[str]:
    """The modules of ours that a module imports when it runs, not for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    hints = [block for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING"]
    skipped = {id(node) for block in hints for node in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            ours = [name.removeprefix("foggen.") for name in names if name.startswith("foggen.")]
            found |= {f"{name}.__init__" if f"{name}.__init__" in FILES else name for name in ours}
    return found & set(FILES)


GRAPH = {name: imports(file) for name, file in FILES.items()}


def reached(name: str) -> set[str]:
    """Everything that a module imports, and what that imports in turn."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        new = GRAPH[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


MODELS = {name for name in FILES if name.endswith("_engine")} | {"training", "chain", "evaluation"}


class TestImports:
    def test_no_circles(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Prints the graph, lowest modules first: `pytest -s -k no_circles`."""
        order = list(TopologicalSorter(GRAPH).static_order())
        with capsys.disabled():
            print("\nlib/foggen, who imports whom:")
            for name in order:
                print(f"  {name:<28} {', '.join(sorted(GRAPH[name]))}")
        assert set(order) == set(FILES)

    def test_store_and_config_stand_at_the_bottom(self) -> None:
        assert not GRAPH["store"] and GRAPH["config"] <= {"store"}

    def test_engines_know_no_recipe(self) -> None:
        for name in FILES:
            if name.startswith("engines."):
                others = {other for other in reached(name) if not other.startswith("engines.")}
                assert others <= {"store", "prompts"}, name

    @pytest.mark.parametrize("name", ["stats", "routing", "automix", "show"])
    def test_tables_and_figures_need_no_model(self, name: str) -> None:
        assert not reached(name) & MODELS

    def test_the_runner_stands_at_the_top(self) -> None:
        assert "reproduce" in GRAPH and "reproduce" not in set().union(*GRAPH.values())


# ---- the library: how large it is


def code_lines(file: Path) -> dict[int, str]:
    """The lines of a module with code on them, without docstrings and comments, by number."""
    text = file.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            docstrings |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    kept: set[int] = set()
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*blank, tokenize.ENDMARKER):
            kept |= set(range(token.start[0], token.end[0] + 1))
    lines = text.splitlines()
    return {number: lines[number - 1].strip() for number in sorted(kept - docstrings)}


CODE = {name: code_lines(file) for name, file in FILES.items()}


class TestSize:
    def test_the_library_is_thin(self) -> None:
        sizes = {name: len(lines) for name, lines in CODE.items() if len(lines) > 3}
        assert not {name: size for name, size in sizes.items() if size > 220}
        assert len(sizes) <= 19 and sum(sizes.values()) <= 2895, sizes

    def test_functions_are_read_in_one_look(self) -> None:
        long = {}
        for name, file in FILES.items():
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    body = range(node.lineno, (node.end_lineno or 0) + 1)
                    long[f"{name}.{node.name}"] = len([n for n in body if n in CODE[name]])
        assert not {name: size for name, size in long.items() if size > 40}

    def test_no_block_stands_twice(self) -> None:
        """Six lines of code in a row, imports aside."""
        places = defaultdict(list)
        for name, lines in CODE.items():
            code = [
                (n, text) for n, text in lines.items() if not text.startswith(("import ", "from "))
            ]
            for start in range(len(code) - 5):
                block = tuple(text for _, text in code[start : start + 6])
                places[block].append(f"{name}:{code[start][0]}")
        assert not [where for where in places.values() if len(where) > 1]
