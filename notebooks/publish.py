"""Puts a run's outputs into the notebooks of the checkout: `make publish [RUN=runs/pocket]`.

Code cells get the outputs of the run, the first cell its time and memory, `figures/` its figures,
the README its row of every notebook and the claims of 06; prose stays as it is. What belongs to the
machine stays out: papermill's metadata, stderr.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat

from foggen.store import ROOT, read_json, run_folder, write_text


def code_cells(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def publish(run: Path, notebooks: Path, figures: Path) -> list[str]:
    """The names of the notebooks that were written: those that the run finished, with this code.

    Raises ValueError for a notebook whose code is not what was run (a cell of other parameters
    is code too).
    """
    profile = read_json(run / "settings.json")["name"]
    written = []
    for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")):
        done = run / "done" / f"{path.stem}.json"
        if not done.exists():
            continue
        book = nbformat.read(path, as_version=4)
        executed = nbformat.read(run / "notebooks" / path.name, as_version=4)
        cells, ran = code_cells(book), code_cells(executed)
        if [cell.source for cell in cells] != [cell.source for cell in ran]:
            raise ValueError(f"{path.name} is not what was run, or ran with other parameters")
        for cell, source in zip(cells, ran, strict=True):
            cell.outputs = [part for part in source.outputs if part.get("name") != "stderr"]
            cell.execution_count = source.execution_count
        place = rf"(\| time, memory \|.*`{re.escape(profile)}`: )[^;|]*?(?=;| \|)"
        cost = read_json(done)["cost"]
        book.cells[0].source = re.sub(place, rf"\g<1>{cost}", book.cells[0].source)
        write_text(path, nbformat.writes(book) + "\n")
        written.append(path.name)
    shutil.copytree(run / "figures", figures, dirs_exist_ok=True)
    return written


def update_readme(run: Path, notebooks: Path, readme: Path) -> None:
    """Writes a row per finished notebook, and the claims of 06, into the README."""
    text = readme.read_text(encoding="utf-8")
    for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")):
        done = run / "done" / f"{path.stem}.json"
        if not done.exists():
            continue
        book, record = nbformat.read(path, as_version=4), read_json(done)
        question = re.search(r"\*\*(.+?)\*\*", book.cells[0].source, flags=re.DOTALL)
        link = f"[{path.stem}](notebooks/{path.name})"
        seconds, memory = record["cost"].split(", ")
        asked = " ".join(question[1].split()) if question else ""
        row = f"| {link} | {asked} | {seconds} | {memory} |"
        place = rf"^\| {re.escape(link)} \|.*$"
        text = re.sub(place, row.replace("\\", r"\\"), text, flags=re.MULTILINE)
        for cell in code_cells(book):
            for part in cell.outputs:
                claims = part.get("data", {}).get("text/markdown", "")
                if "\n| claim |" in claims:
                    begin, end = "<!-- claims: begin -->", "<!-- claims: end -->"
                    before, after = text.split(begin)[0], text.split(end)[1]
                    text = f"{before}{begin}\n{claims}\n{end}{after}"
    write_text(readme, text)


if __name__ == "__main__":
    run = run_folder(sys.argv[1] if len(sys.argv) > 1 else "runs/pocket")
    print("published:", *publish(run, ROOT / "notebooks", ROOT / "figures"))
    update_readme(run, ROOT / "notebooks", ROOT / "README.md")
