"""The runner: executes the notebooks in order into a run folder, resumes, and reports.

`python -m foggen.reproduce --help` lists what it takes. Knows nothing of what the notebooks compute: they are done
when they end without an error AND their last cell has written its sentinel (`foggen.store.finish`).
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from traitlets.config import Config

import foggen
from foggen import estimate, hub
from foggen.config import Settings, SettingsError, load_profile, parameter_names, parse_override
from foggen.store import (
    LOCK_VARIABLE,
    ROOT,
    RUN_VARIABLE,
    RunBusyError,
    Store,
    code_version,
    content_hash,
    digest,
    fill,
    read_json,
    write_json,
    write_text,
)

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


class NotebookError(RuntimeError):
    """A notebook that did not reach its end; the message shows where and why."""


@dataclass(frozen=True)
class Plan:
    """What is run: the notebooks in order, each under the key of everything it depends on."""

    settings: Settings
    run: Path
    parameters: Mapping[str, Any]
    keys: Mapping[Path, str]

    def executed(self, notebook: Path) -> Path:
        """Where the executed copy lies."""
        return self.run / "notebooks" / notebook.name

    def sentinel(self, notebook: Path) -> Path:
        """Where the notebook's last cell says that it is done."""
        return self.run / "done" / f"{notebook.stem}.json"

    def state(self, notebook: Path) -> str:
        """`done`, `changed` (something it depends on is not what it was) or `to do`."""
        if not self.sentinel(notebook).exists() or not self.executed(notebook).exists():
            return "to do"
        return "done" if read_json(self.sentinel(notebook)).get("key") == self.keys[notebook] else "changed"

    def record(self, notebook: Path) -> tuple[str, str, str]:
        """What a finished notebook left: its time, peak memory and headline result."""
        record = read_json(self.sentinel(notebook))
        return f"{record['seconds']:.0f} s", f"{record['peak'] / 2**30:.1f} GiB", str(record["headline"])


def code_cells(book: Any) -> list[Any]:
    """A notebook's code cells."""
    return [cell for cell in book.cells if cell.cell_type == "code"]


def notebook_key(notebook: Path, settings: Settings, before: str) -> str:
    """A hash of the settings, the notebook's code (not its prose), the library, the data, and the notebooks before."""
    source = [cell.source for cell in code_cells(nbformat.read(notebook, as_version=4))]
    data, edge, cloud = settings.data, settings.edge, settings.cloud
    named = ["data/published.json", data.bank, data.questions, data.open_ended, *(one.path for one in data.sources)]
    named += [edge.model, cloud.model, settings.open_ended.r15_model]
    named += [edge.format_install.labels_from] if edge.format_install else []
    inputs = [content_hash(ROOT / name) for name in named if name and (ROOT / name).exists()]
    return digest([settings.model_dump(mode="json"), source, code_version(foggen), inputs, before])


def make_plan(settings: Settings, run: Path, parameters: Mapping[str, Any], folder: Path) -> Plan:
    """All notebooks of a folder with their keys; 00 feeds no other."""
    keys: dict[Path, str] = {}
    before = ""
    for notebook in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        keys[notebook] = notebook_key(notebook, settings, before)
        before = "" if notebook.stem < "01" else keys[notebook]
    return Plan(settings, run, parameters, keys)


def chosen(plan: Plan, start: str | None, only: str | None) -> list[Path]:
    """The notebooks to run: 01 onwards, unless told otherwise. 00 is a demonstration and runs when asked for."""
    if only:
        notebooks = [notebook for notebook in plan.keys if notebook.stem.startswith(only)]
    else:
        notebooks = [notebook for notebook in plan.keys if notebook.stem >= (start or "01")]
    if not notebooks:
        names = ", ".join(notebook.stem for notebook in plan.keys) or "none"
        raise SettingsError(f"no notebook begins with {only or start or '01'!r}: there are {names}")
    return notebooks


# ---------------------------------------------------------------------------------------------------------------
# Running


def changed_parameters(notebook: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those whose value is not the notebook's own default: with none, no cell is injected and the counts stay 1..n."""
    import papermill

    defaults = papermill.inspect_notebook(str(notebook))
    if missing := sorted(set(parameters) - set(defaults)):
        raise NotebookError(f"{notebook.name}: its cell tagged `parameters` does not set {', '.join(missing)}")
    return {name: value for name, value in parameters.items() if ast.literal_eval(defaults[name]["default"]) != value}


def execute(plan: Plan, notebook: Path) -> None:
    """Runs a notebook to its sentinel, or raises NotebookError with the cell, its source and the traceback."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    sentinel, executed = plan.sentinel(notebook), plan.executed(notebook)
    sentinel.unlink(missing_ok=True)
    executed.parent.mkdir(parents=True, exist_ok=True)
    changed = changed_parameters(notebook, plan.parameters)
    total = len(nbformat.read(notebook, as_version=4).cells) + bool(changed)  # papermill adds a cell for them
    started = time.time()
    at = "before the first cell"
    columns = (TextColumn("{task.description}"), TextColumn("cell {task.completed:.0f} of {task.total:.0f}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(notebook.stem, total=total)

        def on_cell(cell: Any, cell_index: int) -> None:
            nonlocal at
            at = f"in cell {cell_index + 1}:\n{cell.source}"
            bar.update(task, completed=cell_index + 1)

        try:
            papermill.execute_notebook(
                os.path.relpath(notebook),
                os.path.relpath(executed),
                parameters=changed,
                progress_bar=False,
                stderr_file=sys.stderr,  # the stages' progress lines, as they come
                on_cell_start=on_cell,
                config=Config(KernelManager={"transport_encryption": "auto"}),
            )
        except Exception as error:  # a cell that failed, or what papermill's libraries raise when a kernel dies
            trace = f"{type(error).__name__}: {error}"
            if isinstance(error, PapermillExecutionError):
                trace = "\n".join(error.traceback)
            raise NotebookError(f"{notebook.name} failed {at}\n\n{trace}") from None
    if not sentinel.exists():
        raise NotebookError(f"{notebook.name} ended without its sentinel {sentinel.name}, last seen {at}")
    more = {"key": plan.keys[notebook], "seconds": round(time.time() - started, 1)}
    write_json(sentinel, {**read_json(sentinel), **more})


def run_all(plan: Plan, notebooks: Sequence[Path], force: bool) -> None:
    """Runs what is not done yet, and ends with a table: time, peak memory, headline result."""
    table = Table("notebook", "time", "peak memory", "result", title=f"{plan.settings.name}: {plan.run.name}")
    for notebook in notebooks:
        kept = not force and plan.state(notebook) == "done"
        if kept:
            console.print(f"{notebook.stem}: unchanged, kept")
        else:
            execute(plan, notebook)
        seconds, peak, headline = plan.record(notebook)
        table.add_row(notebook.stem, f"{seconds} (kept)" if kept else seconds, peak, headline)
    console.print(table)
    here = os.path.relpath(plan.run)
    console.print(f"Look into {here}/notebooks, {here}/figures, {here}/tables; every stage is in {here}/manifest.jsonl")


def show_plan(plan: Plan) -> None:
    """The notebooks with their state, an estimate of the work, then every parameter with its value and form."""
    for notebook in plan.keys:
        console.print(f"{notebook.stem:<20} {plan.state(notebook)}", markup=False)
    for part in estimate.tables(plan.settings):
        console.print(part, markup=False)
    settings = plan.settings.model_dump(mode="json")
    for name, form in parameter_names().items():
        value: Any = settings
        for part in name.split("."):
            value = value[part]
        console.print(f"  {name} = {value}  ({form})", markup=False)


# ---------------------------------------------------------------------------------------------------------------
# Publishing


def times_table(plan: Plan, notebooks: Sequence[Path]) -> str:
    """Finished notebooks as a Markdown table: question (the first bold text), time, peak memory, headline result."""
    lines = ["| notebook | question | time | peak memory | result |", "|---|---|---|---|---|"]
    for notebook in notebooks:
        found = re.search(r"\*\*(.+?)\*\*", nbformat.read(notebook, as_version=4).cells[0].source, flags=re.DOTALL)
        question = " ".join(found[1].split()) if found else ""
        cells = (f"[{notebook.stem}](notebooks/{notebook.name})", question, *plan.record(notebook))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def publish(plan: Plan, figures: Path) -> list[Path]:
    """Puts outputs and measured times into the notebooks, and the run's figures into `figures`; returns the notebooks.

    What belongs to the machine stays out: papermill's metadata, timings of cells, stderr.
    """
    done = [notebook for notebook in plan.keys if plan.state(notebook) == "done"]
    for notebook in done:
        book, executed = (nbformat.read(path, as_version=4) for path in (notebook, plan.executed(notebook)))
        if len(code_cells(executed)) != len(code_cells(book)):  # a cell of parameters was injected
            raise SettingsError(f"{notebook.name} ran with other parameters than its own: not for publication")
        for cell, run in zip(code_cells(book), code_cells(executed), strict=True):
            cell.outputs = [output for output in run.outputs if output.get("name") != "stderr"]
            cell.execution_count = run.execution_count
        seconds, peak, _ = plan.record(notebook)
        place = rf"(\| time, memory \|.*`{re.escape(plan.settings.name)}`: )[^;|]*?(?=;| \|)"
        book.cells[0].source = re.sub(place, rf"\g<1>{seconds}, {peak}", book.cells[0].source)
        write_text(notebook, nbformat.writes(book) + "\n")
    figures.mkdir(exist_ok=True)
    for figure in (plan.run / "figures").glob("*.*"):
        shutil.copy(figure, figures / figure.name)
    fill(ROOT / "README.md", "times", times_table(plan, done))
    return done


# ---------------------------------------------------------------------------------------------------------------
# The command line


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m foggen.reproduce", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--profile", default="pocket", help="pocket, paper, or the path of a profile's YAML file")
    parser.add_argument("--run", help="the run folder; by default runs/<profile>")
    parser.add_argument("--seed", type=int, help="the run's seed; by default the profile's")
    parser.add_argument("--questions", help="a file or folder of JSONL questions to evaluate on, instead of the bank's")
    parser.add_argument("-p", dest="overrides", action="append", default=[], metavar="name=value", help="one parameter")
    parser.add_argument("--from", dest="start", metavar="NN", help="begin with this notebook")
    parser.add_argument("--only", metavar="NN", help="run this notebook alone")
    parser.add_argument("--force", action="store_true", help="run notebooks again even where nothing changed")
    parser.add_argument("--list", action="store_true", help="show notebooks and parameters, run nothing")
    parser.add_argument("--publish", action="store_true", help="then copy notebooks and figures into the checkout")
    parser.add_argument("--notebooks", default="notebooks", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Does what the command line says. Raises SettingsError, RunBusyError, NotebookError."""
    overrides = dict(parse_override(text) for text in options.overrides)
    if options.questions:
        overrides["data.questions"] = os.path.relpath(options.questions, ROOT)
    profile = options.profile
    if profile.endswith((".yaml", ".yml")):
        profile = os.path.relpath(profile, ROOT)
    os.chdir(ROOT)
    seed = {} if options.seed is None else {"seed": options.seed}
    settings = load_profile(profile, {**overrides, **seed})
    folder = options.run or f"runs/{settings.name}"
    os.environ[RUN_VARIABLE] = str((ROOT / folder).resolve())
    store = Store(folder)
    if not options.list:
        begun = store.run / "settings.json"
        overrides |= hub.pin(settings, read_json(begun) if begun.exists() else None)
        settings = load_profile(profile, {**overrides, **seed})
    parameters = {"profile": profile, "run": folder, "seed": settings.seed, "overrides": overrides}
    plan = make_plan(settings, store.run, parameters, ROOT / options.notebooks)
    if options.list:
        return show_plan(plan)
    notebooks = chosen(plan, options.start, options.only)
    with store.locked():
        os.environ[LOCK_VARIABLE] = str(store.run)
        os.environ["TQDM_DISABLE"] = "1"  # libraries' progress bars would lie in the notebooks
        write_json(store.run / "settings.json", settings.model_dump(mode="json"))
        run_all(plan, notebooks, options.force)
        if options.publish:
            names = [notebook.name for notebook in publish(plan, ROOT / "figures")]
            console.print(f"published: {', '.join(names)}, figures")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 = all notebooks done, 1 = one failed, 2 = the command cannot be run."""
    try:
        run(_arguments(argv))
    except (SettingsError, RunBusyError) as error:
        console.print(str(error), markup=False)
        return 2
    except NotebookError as error:
        console.print(Text.from_ansi(str(error)))
        console.print("Finished stages are kept: run the same command again to resume where this stopped.")
        return 1
    finally:
        for variable in (LOCK_VARIABLE, RUN_VARIABLE):
            os.environ.pop(variable, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
