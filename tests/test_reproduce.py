"""The runner, on notebooks of three cells."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from foggen.reproduce import main
from foggen.store import ROOT, Store

PARAMETERS = 'profile = "pocket"\nrun = "runs/pocket"\nseed = 0\noverrides = {}'


def notebook(folder: Path, name: str, *cells: str, finish: bool = True) -> Path:
    """A notebook with the usual parameters cell, `cells`, and the usual last cell."""
    last = [f'from foggen.store import finish\nfinish(run, "{name}", f"seed {{seed}}", pid=1);'] if finish else []
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, *cells, *last)]
    book.cells[0].metadata["tags"] = ["parameters"]
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(exist_ok=True)
    nbformat.write(book, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)  # restores the working directory, which the runner changes
    return tmp_path / "notebooks", tmp_path / "run"


def run(folders: tuple[Path, Path], *options: str) -> int:
    return main(["--notebooks", str(folders[0]), "--run", str(folders[1]), *options])


def done(folders: tuple[Path, Path], name: str) -> dict[str, object]:
    return json.loads((folders[1] / "done" / f"{name}.json").read_text())


def test_runs_in_order_and_keeps_what_is_unchanged(folders, capsys):
    say = "import sys; print('half way', file=sys.stderr)"
    notebook(folders[0], "01_first", say)
    notebook(folders[0], "02_second", "1 + 1")
    notebook(folders[0], "00_quickstart", "raise SystemError('not part of a run')")
    assert run(folders) == 0
    out, err = capsys.readouterr()
    assert "half way" in err and "cell 4 of 4" in out and out.index("01_first") < out.index("02_second")
    assert "seed 0" in out and "GiB" in out
    before = done(folders, "02_second")
    started = time.time()
    assert run(folders) == 0
    assert time.time() - started < 20
    assert done(folders, "02_second") == before
    assert "01_first: unchanged, kept" in capsys.readouterr().out

    notebook(folders[0], "02_second", "1 + 2")  # the second changes, the first does not
    assert run(folders) == 0
    out = capsys.readouterr().out
    assert "01_first: unchanged" in out and "02_second: unchanged" not in out

    assert run(folders, "--seed", "5", "--from", "02") == 0
    assert done(folders, "02_second")["headline"] == "seed 5"
    assert done(folders, "01_first")["headline"] == "seed 0"


def test_force_runs_again(folders, capsys):
    notebook(folders[0], "01_first")
    assert run(folders) == 0
    assert run(folders, "--force") == 0
    assert "kept" not in capsys.readouterr().out.split("seed 0")[1].split("Look into")[0].replace("(kept)", "x")


def test_failure_names_cell_source_traceback_and_resume(folders, capsys):
    notebook(folders[0], "01_first", "marked = 'this very source'\n1 / 0")
    notebook(folders[0], "02_second")
    assert run(folders) == 1
    out = capsys.readouterr().out
    for said in ("01_first.ipynb failed in cell", "this very source", "ZeroDivisionError", "to resume"):
        assert said in out
    assert not (folders[1] / "done" / "02_second.json").exists()


@pytest.mark.parametrize("cell", ["import sys; sys.exit(0)", "import os; os._exit(0)"])
def test_rc_zero_is_not_done(folders, capsys, cell):
    notebook(folders[0], "01_first", cell)
    assert run(folders) == 1
    assert "01_first.ipynb" in capsys.readouterr().out


def test_missing_sentinel_is_a_failure(folders, capsys):
    notebook(folders[0], "01_first", finish=False)
    assert run(folders) == 1
    assert "without its sentinel" in capsys.readouterr().out


def test_wrong_names_and_values_stop_before_anything_runs(folders, capsys):
    notebook(folders[0], "01_first")
    assert run(folders, "-p", "learning_rat=1") == 2
    assert "sft.learning_rate: number > 0" in capsys.readouterr().out
    assert run(folders, "-p", "rounds=many") == 2
    assert "expected: integer >= 0" in capsys.readouterr().out
    assert run(folders, "-p", "rounds") == 2
    assert run(folders, "--only", "07") == 2
    assert "01_first" in capsys.readouterr().out
    assert not (folders[1] / "done").exists()


def test_overrides_reach_the_notebook(folders):
    cell = "from foggen.config import load_profile\nassert load_profile(profile, overrides).rounds == 3"
    notebook(folders[0], "01_first", cell)
    assert run(folders, "-p", "rounds=3") == 0


def test_list_shows_states_and_parameters(folders, capsys):
    notebook(folders[0], "01_first")
    assert run(folders, "--list") == 0
    out = capsys.readouterr().out
    assert "01_first" in out and "to do" in out and "rounds = 14  (integer >= 0)" in out


def test_second_run_in_one_folder_is_told(folders, capsys):
    notebook(folders[0], "01_first")
    code = """if True:
        import sys, time
        from foggen.store import Store
        with Store(sys.argv[1]).locked():
            print("locked", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", code, str(folders[1])], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        assert run(folders) == 2
        out = capsys.readouterr().out
        assert "in use by process" in out and str(other.pid) in out
        other.kill()
    assert run(folders) == 0  # a dead process holds nothing


def test_publish_strips_the_machine(folders, monkeypatch, tmp_path, capsys):
    cells = ("import sys; print('noise', file=sys.stderr)", "print('result')")
    source = notebook(folders[0], "01_first", *cells)
    monkeypatch.setattr("foggen.reproduce.ROOT", tmp_path)
    (tmp_path / "README.md").write_text("before <!-- times: begin --> old <!-- times: end --> after")
    # the notebook's own default is this very run folder, so nothing is injected
    source.write_text(source.read_text().replace("runs/pocket", str(folders[1])))
    assert run(folders) == 0
    row = "**Who?**\n\n| time, memory | `pocket`: not measured; `paper`: not measured |"
    book = nbformat.read(source, as_version=4)
    book.cells.insert(0, nbformat.v4.new_markdown_cell(row))
    nbformat.write(book, source)
    assert run(folders, "--publish") == 0
    assert "01_first: unchanged" in capsys.readouterr().out  # prose is not run again, and stays as it is
    title, *cells = nbformat.read(source, as_version=4).cells
    assert re.search(r"`pocket`: \d+ s, \d\.\d GiB; `paper`: not measured \|$", title.source)
    book.cells = cells
    assert [cell.execution_count for cell in book.cells] == [1, 2, 3, 4]
    assert "papermill" not in json.dumps(book) and "noise" not in json.dumps([cell.outputs for cell in book.cells])
    assert book.cells[2].outputs[0].text == "result\n"
    readme = (tmp_path / "README.md").read_text()
    assert (
        "| [01_first](notebooks/01_first.ipynb) | Who? |" in readme and "old" not in readme and readme.endswith("after")
    )
    assert all(set(cell.metadata) <= {"tags"} for cell in book.cells)
    assert run(folders, "--publish", "--seed", "3") == 2
    assert "not for publication" in capsys.readouterr().out
    assert run(folders) == 0


CHAIN = """
import json, time
from foggen.store import Store, read_json, write_json
store = Store(run)
value, folder = 1, None
for number in range(12):
    def compute(working):
        for part in range(5):
            (working / str(part)).write_text("x" * part)
            time.sleep(0.02)
        write_json(working / "value.json", value * 3 + number)
    folder = store.stage("NAME-%d" % number, {"seed": seed}, [folder] if folder else [], compute)
    value = read_json(folder / "value.json")
write_json(store.run / "tables" / "NAME.json", value)
"""


@pytest.mark.slow
def test_ten_kills_end_with_the_same_tables(folders, tmp_path):
    for name in ("01_first", "02_second"):
        notebook(folders[0], name, CHAIN.replace("NAME", name))
    command = [sys.executable, "-m", "foggen.reproduce", "--notebooks", str(folders[0])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}

    def start(run_folder: Path) -> subprocess.Popen[bytes]:
        log = (tmp_path / "log").open("ab")
        return subprocess.Popen([*command, "--run", str(run_folder)], env=environment, stdout=log, stderr=log)

    assert start(tmp_path / "whole").wait() == 0
    dice = random.Random(0)
    for _ in range(10):
        process = start(folders[1])
        time.sleep(dice.uniform(1.5, 8))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(folders[1]).wait() == 0, (tmp_path / "log").read_text()[-3000:]

    def tables(where: Path) -> dict[str, str]:
        return {file.name: file.read_text() for file in (where / "tables").iterdir()}

    assert tables(folders[1]) == tables(tmp_path / "whole") and len(tables(folders[1])) == 2
    stages = [
        sorted(folder.name for folder in Store(where).stages.iterdir()) for where in (folders[1], tmp_path / "whole")
    ]
    assert stages[0] == stages[1] and not any(name.startswith(".tmp") for name in stages[0])
