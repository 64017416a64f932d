"""Stages: computed once, whole or not at all, and again when their files are damaged."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foggen import store
from foggen.config import load_profile
from foggen.store import (
    LOCK_VARIABLE,
    RUN_VARIABLE,
    Run,
    RunFolderError,
    content_hash,
    finish,
    peak_memory,
    read_json,
    read_jsonl,
    read_record,
    run_folder,
    write_json,
    write_jsonl,
    write_text,
)

SETTINGS = load_profile("pocket")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", SETTINGS)


def write(text: str) -> Callable[[Path], Path]:
    return lambda folder: write_text(folder / "out.txt", text)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


# ---- What a stage depends on


def test_a_stage_is_computed_once(run: Run) -> None:
    first = run.cached("one", {"a": 1}, write("x"))
    assert run.cached("one", {"a": 1}, write("y")) == first
    assert (first / "out.txt").read_text() == "x" and first.name.startswith("one-")
    rows = [{"text": "қазақ\u2028line", "p": float("nan"), "fact": None}]
    read = run.cached_rows("rows", {}, lambda: iter(rows))
    assert repr(read) == repr(rows) == repr(run.cached_rows("rows", {}, list))


def module(folder: Path, name: str, **files: str) -> types.ModuleType:
    """A module whose source lies in `folder`, or a package of several files."""
    made = types.ModuleType(name)
    for file, source in files.items():
        write_text(folder / name / f"{file}.py", source)
    made.__file__ = str(folder / name / f"{next(iter(files))}.py")
    return made


def test_key_holds_settings_inputs_code_and_libraries(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_text(tmp_path / "in.txt", "1")
    code = module(tmp_path, "code", code="x = 1")

    def key(a: int = 1, code: types.ModuleType = code) -> Path:
        return run.cached("s", {"a": a, "b": 2}, write("x"), [file], [code])

    keys = [key()]
    assert run.cached("s", {"b": 2, "a": 1}, write("x"), [file], [code]) == keys[0]
    keys.append(key(a=2))
    keys.append(key(code=module(tmp_path, "code", code="x = 2")))
    package = module(tmp_path, "code", __init__="", inner="x = 1")
    keys.append(key(code=package))
    write_text(tmp_path / "code" / "inner.py", "x = 2")
    keys.append(key(code=package))
    monkeypatch.setattr(store, "library_versions", lambda: {"torch": "9.9"})
    keys.append(key(code=package))
    write_text(file, "2")
    keys.append(key(code=package))
    assert len(set(keys)) == 7


def test_versions_of_the_libraries_that_compute() -> None:
    versions = store.library_versions()
    assert versions.keys() >= {"torch", "transformers", "tokenizers", "trl", "peft"}


def test_inputs_of_the_run_and_the_hub_are_named_not_read(run: Run, tmp_path: Path) -> None:
    def follow(value: int) -> Path:
        first = run.cached("first", {"value": value}, write("same"))
        return run.cached("second", {}, write("x"), [first / "out.txt"])

    assert follow(1) != follow(2) and follow(1) == follow(1)
    commit = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    commit.mkdir(parents=True)
    stage = run.cached("hub", {}, write("x"), [commit])
    assert read_json(stage / "stage.json")["inputs"] == ["models--a--b@c0ffee"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run.cached("s", {}, write("x"), [tmp_path / "nowhere"])


def test_content_hash_of_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_text(tmp_path / name / "sub" / "file", "1")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b" / "sub" / "file").rename(tmp_path / "b" / "sub" / "other")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")


def test_manifest_has_a_row_per_stage(run: Run) -> None:
    run.cached("one", {"a": 1}, write("x"))
    with run.locked():
        run.cached("two", {}, lambda folder: run.cached("inner", {}, write("x")))
    (run.folder / "manifest.jsonl").unlink()  # lost: the stages still know
    rows = read_jsonl(run.manifest())
    assert [row["stage"].split("-")[0] for row in rows] == ["one", "two", "inner"]
    assert rows[0]["key"] == {"a": 1} and rows[0]["peak"] > 2**20 and rows[0]["seconds"] >= 0


# ---- Failures, kills, damage


def test_a_failed_stage_leaves_nothing(run: Run) -> None:
    def fail(folder: Path) -> None:
        write_text(folder / "half", "x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run.cached("s", {}, fail)
    assert not list(run.stages.iterdir()) and not (run.folder / "manifest.jsonl").exists()


CHAIN = """
import os, signal, sys, time
from foggen.config import load_profile
from foggen.store import Run, finish, read_jsonl, write_json, write_jsonl, write_text

folder, kill_at, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
count = 0

def hook(event, arguments):  # every file operation in the run folder; one of them is the last
    global count
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        if str(arguments[0]).startswith(folder):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
run = Run(folder, load_profile("pocket"))
write_json(run.folder / "settings.json", {"name": "chain"})
inputs = []

def train(place):
    time.sleep(pause)
    before = (inputs[0] / "weights.bin").read_bytes() if inputs else b"0"
    (place / "weights.bin").write_bytes(before * 3)
    time.sleep(pause)
    write_jsonl(place / "log" / "rows.jsonl", [{"size": len(before)}])

for number in range(3):
    model = run.cached(f"r{number}", {"number": number}, train, inputs)
    log = model / "log" / "rows.jsonl"
    rows = run.cached_rows(f"r{number}-dev", {}, lambda: read_jsonl(log), [model])
    inputs = [model]
write_text(run.folder / "tables" / "result.csv", str([rows, (model / "weights.bin").read_bytes()]))
finish(run, "02_chain", "done", size=rows[0]["size"])
"""


def chain(folder: Path, kill_at: int = 0, pause: float = 0.0, kill_after: float = 60.0) -> int:
    """Runs the chain; the return code is -9 where it was killed, at an operation or a time."""
    command = [sys.executable, "-c", CHAIN, str(folder), str(kill_at), str(pause)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            return process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    return process.returncode


def result(folder: Path) -> dict[str, Any]:
    """What a chain left, without times, locks and memory."""
    done = read_json(folder / "done" / "02_chain.json")
    return {
        "table": (folder / "tables" / "result.csv").read_text(),
        "done": done | {"peak": 0},
        "stages": {
            name: content
            for name, content in snapshot(folder / "stages").items()
            if not name.endswith("stage.json")
        },
        "manifest": [row["stage"] for row in read_jsonl(folder / "manifest.jsonl")],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert chain(folder) == 0
    return folder


MOMENTS = [pytest.param(n, marks=[pytest.mark.slow] if n % 20 else []) for n in range(5, 111, 5)]


@pytest.mark.parametrize("kill_at", MOMENTS)
def test_a_run_killed_at_a_file_operation_resumes(
    kill_at: int, whole: Path, tmp_path: Path
) -> None:
    assert chain(tmp_path / "run", kill_at=kill_at) == -9
    assert chain(tmp_path / "run") == 0
    assert result(tmp_path / "run") == result(whole)
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.slow
def test_a_run_killed_at_30_random_moments_resumes(whole: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    codes = [
        chain(tmp_path / "run", pause=0.05, kill_after=moments.uniform(0.1, 0.6)) for _ in range(30)
    ]
    assert -9 in codes and chain(tmp_path / "run") == 0
    assert result(tmp_path / "run") == result(whole)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = {
    "flipped": flip,
    "cut": cut,
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "binary": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "list": lambda file: file.write_text("[1]"),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "gone": Path.unlink,
    "folder": replace_by_folder,
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["weights.bin", "log/rows.jsonl", "stage.json"])
def test_a_damaged_stage_is_set_aside_and_computed_again(
    name: str, kind: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"0123456789")
        write_jsonl(folder / "log" / "rows.jsonl", [{"a": 1}, {"a": 2}])

    stage = run.cached("r1", {}, train)
    before = snapshot(stage)
    DAMAGES[kind](stage / name)
    if name == "stage.json" and kind == "flipped":
        write_text(stage / name, before[name].decode().replace('"files"', '"filez"'))
    damaged = snapshot(stage)
    assert run.cached("r1", {}, train) == stage
    after = snapshot(stage)
    assert after.keys() == before.keys()
    assert all(after[file] == before[file] for file in before if file != "stage.json")
    (aside,) = (run.folder / "damaged").iterdir()
    assert snapshot(aside) == damaged, "kept as it was found"
    assert f"damaged ({name})" in capsys.readouterr().err
    run.cached("r1", {}, lambda folder: pytest.fail("it is whole again"))


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["settings.json", "manifest.jsonl", "done/02_chain.json"])
def test_damaged_records_are_to_do(name: str, kind: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    DAMAGES[kind](tmp_path / "run" / name)
    if kind not in ("flipped", "longer") and name.endswith("json"):
        assert read_record(tmp_path / "run" / name) == {}
    if kind == "folder":
        shutil.rmtree(tmp_path / "run" / name)
    run = Run(tmp_path / "run", SETTINGS)
    run.cached("more", {}, write("x"))
    assert len(read_jsonl(run.folder / "manifest.jsonl")) == 7


# ---- What belongs to others


def test_only_places_of_the_store_are_cleaned(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    name = ".tmp-" + "0123456789abcdef" * 2  # as `write_text` names them
    write_text(mine / name, "x")
    folder = tmp_path / "run"
    run = Run(folder, SETTINGS)
    (folder / "tables").symlink_to(mine, target_is_directory=True)
    link = folder / "stages" / (name[:-1] + "0")
    link.symlink_to(mine, target_is_directory=True)
    kept = [mine / name, folder / ".tmp-notes", folder / "done" / ".tmp-mine" / "a"]
    kept += [folder / "stages" / "one" / name]
    kept += [folder / "stages" / ".tmp-video" / "a.mp4"]
    left = [folder / name, folder / "done" / name, folder / "stages" / name / "a"]
    for file in [*kept, *left]:
        write_text(file, "x")
    with run.locked():
        assert all(file.exists() for file in kept) and not any(file.exists() for file in left)
        assert not os.path.lexists(link)


def test_a_folder_of_other_things_is_refused(run: Run, tmp_path: Path) -> None:
    write_text(store.temporary_path(run.stages) / "half", "x")
    for folder in (tmp_path, run.stages):  # a parent of a live run, a folder inside of one
        before = snapshot(tmp_path)
        with pytest.raises(RunFolderError, match=r"other things than a run; expected: .*RUN="):
            Run(folder, SETTINGS)
        assert snapshot(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert Run(tmp_path / "empty", SETTINGS).stages.is_dir()
    assert Run(run.folder, SETTINGS).folder == run.folder
    file = write_text(tmp_path / "file", "x")
    with pytest.raises(RunFolderError, match="cannot be used"):
        Run(file / "run", SETTINGS)  # as in a folder that may not be written


def test_files_of_the_same_names_make_no_run_of_a_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "editor" / "settings.json", {"theme": "dark", "model": 5})
    write_text(tmp_path / "studio" / "stages" / ".tmp-video" / "a.mp4", "x")
    for name in ("editor", "studio"):
        with pytest.raises(RunFolderError, match="other things than a run"):
            Run(tmp_path / name, SETTINGS)


def test_stages_may_lie_on_another_disk(run: Run, tmp_path: Path) -> None:
    first = run.cached("one", {}, write("x"))
    second = run.cached("two", {}, write("y"), [first / "out.txt"])
    run.stages.rename(tmp_path / "disk")
    run.stages.symlink_to(tmp_path / "disk", target_is_directory=True)
    again = Run(run.folder, SETTINGS)
    assert again.cached("two", {}, write("z"), [first / "out.txt"]) == second
    assert (second / "out.txt").read_text() == "y"


def test_one_writer_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Run(run.folder, SETTINGS)
    with run.locked(), run.locked():
        with pytest.raises(RunFolderError, match="in use by another process"):
            other.cached("s", {}, write("x"))
        monkeypatch.setenv(LOCK_VARIABLE, str(run.folder))  # what the runner tells its kernels
        made = other.cached("s", {}, write("x"))
    monkeypatch.delenv(LOCK_VARIABLE)
    with run.locked():
        assert other.cached("s", {}, write("y")) == made, "reading needs no lock"
    assert other.cached("t", {}, write("x")).exists()


def test_run_folder_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run_folder("runs/x") == store.ROOT / "runs" / "x"
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path / "new"))
    assert run_folder("runs/x") == tmp_path / "new" and not (tmp_path / "new").exists()


# ---- Files


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [{"text": "қазақ\u2028line"}, {"n": None}]
    assert read_jsonl(write_jsonl(path, rows)) == rows
    for wrong in ({"a": object()}, {"a": "\ud800"}):
        with pytest.raises((TypeError, ValueError)):
            write_jsonl(path, [wrong])
    assert read_jsonl(path) == rows and [file.name for file in path.parent.iterdir()] == [path.name]
    assert read_json(write_json(tmp_path / "v.json", [1])) == [1]
    assert (tmp_path / "v.json").stat().st_mode & 0o077 == 0o644 & 0o077


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = write_json(tmp_path / "big.json", [0] * 20_000)
    writer = threading.Thread(
        target=lambda: [write_json(path, [n] * 20_000) for n in range(20)]  # type: ignore[func-returns-value]
    )
    writer.start()
    while writer.is_alive():
        assert len(read_json(path)) == 20_000
    writer.join()


def test_sentinel(run: Run) -> None:
    done = read_json(finish(run, "03_routing", "lift 4.6", lift=4.6))
    assert done["headline"] == "lift 4.6" and done["results"] == {"lift": 4.6}
    assert 2**20 < done["peak"] == pytest.approx(peak_memory(), rel=0.2)


def test_a_sandbox_may_not_tell_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_: "Name:\tpython\n")
    assert peak_memory() > 2**20


def test_the_peak_is_this_process_s_and_not_its_parent_s() -> None:
    size = 400 * 2**20
    held = [os.urandom(2**20) * (size // 2**20)]
    code = "from foggen.store import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**22 < int(done.stdout) < size < peak_memory()
    held.clear()  # only here is it let go


def test_without_docstrings_and_locale(tmp_path: Path) -> None:
    """Nothing is done by an assert or a docstring, and no file is opened in the locale's way."""
    surroundings = {**os.environ, "PYTHONOPTIMIZE": "2", "LC_ALL": "C", "PYTHONUTF8": "0"}
    surroundings |= {"PYTHONCOERCECLOCALE": "0", "PYTHONWARNDEFAULTENCODING": "1"}
    code = """if True:
        import sys
        from foggen.config import load_profile
        from foggen.store import Run, read_jsonl
        run = Run(sys.argv[1], load_profile("pocket"))
        rows = run.cached_rows("s", {"q": "\\u049b"}, lambda: [{"text": "\\u049b"}])
        print(rows == [{"text": "\\u049b"}], read_jsonl(run.manifest())[0]["key"]["q"] == "\\u049b")
    """
    command = [sys.executable, "-W", "error::EncodingWarning", "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, env=surroundings, capture_output=True, check=False)
    assert done.stdout.split() == [b"True", b"True"], done.stderr.decode()
