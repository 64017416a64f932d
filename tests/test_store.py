"""Stages: computed once, whole or not at all, under a key of everything they depend on."""

from __future__ import annotations

import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from foggen import store as module
from foggen.store import (
    LOCK_VARIABLE,
    RUN_VARIABLE,
    RunBusyError,
    Store,
    code_version,
    content_hash,
    finish,
    peak_memory,
    read_json,
    read_jsonl,
    run_folder,
    write_json,
    write_jsonl,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


def write(text: str):
    return lambda folder: (folder / "out.txt").write_text(text)


def test_a_stage_is_computed_once(store):
    first = store.stage("one", {"a": 1}, [], write("x"))
    assert store.stage("one", {"a": 1}, [], write("y")) == first
    assert (first / "out.txt").read_text() == "x" and first.name.startswith("one-")


def test_key_holds_settings_inputs_and_code(store, tmp_path):
    file = tmp_path / "in.txt"
    file.write_text("1")
    keys = {store.stage("s", {"a": 1, "b": 2}, [file], write("x"), [write])}
    assert store.stage("s", {"b": 2, "a": 1}, [file], write("x"), [write]) in keys, "order of settings is nothing"
    keys.add(store.stage("s", {"a": 2, "b": 2}, [file], write("x"), [write]))
    keys.add(store.stage("s", {"a": 1, "b": 2}, [file], write("x"), [test_a_stage_is_computed_once]))
    file.write_text("2")
    keys.add(store.stage("s", {"a": 1, "b": 2}, [file], write("x"), [write]))
    assert len(keys) == 4


def test_a_changed_input_stage_changes_what_follows(store):
    def follow(value: int) -> Path:
        first = store.stage("first", {"value": value}, [], write("same"))
        return store.stage("second", {}, [first / "out.txt"], write("x"))

    assert follow(1) != follow(2) and follow(1) == follow(1)


def test_missing_input_is_named(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        store.stage("s", {}, [tmp_path / "nowhere"], write("x"))


def test_a_failed_stage_leaves_nothing(store):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.stage("s", {}, [], fail)
    assert not list(store.stages.iterdir()) and not (store.run / "manifest.jsonl").exists()


def test_killed_stages_are_cleared_by_the_next_writer(store):
    code = """if True:
        import os, sys
        from foggen.store import Store
        def die(folder):
            (folder / "half").write_text("x")
            os._exit(9)
        Store(sys.argv[1]).stage("s", {}, [], die)
    """
    assert subprocess.run([sys.executable, "-c", code, str(store.run)], check=False).returncode == 9
    assert len(list(store.stages.iterdir())) == 1
    done = store.stage("s", {}, [], write("x"))
    assert list(store.stages.iterdir()) == [done] and not (done / "half").exists()


def test_manifest_tells_every_stage(store):
    store.stage("one", {"a": 1}, [], write("x"))
    with store.locked():
        outer = store.stage("two", {}, [], lambda folder: store.stage("inner", {}, [], write("x")))
    rows = read_jsonl(store.run / "manifest.jsonl")
    assert [row["stage"].split("-")[0] for row in rows] == ["one", "two", "inner"]
    assert rows[0]["settings"] == {"a": 1} and rows[0]["peak"] > 2**20 and rows[0]["seconds"] >= 0
    assert outer.exists()
    (store.run / "manifest.jsonl").unlink()  # lost in a kill: the stages still know
    store.stage("three", {}, [], write("x"))
    assert len(read_jsonl(store.run / "manifest.jsonl")) == 4


def test_one_writer_at_a_time(store, monkeypatch):
    other = Store(store.run)
    with store.locked(), store.locked():
        with pytest.raises(RunBusyError, match=r"in use by process \d+, since"):
            other.stage("s", {}, [], write("x"))
        monkeypatch.setenv(LOCK_VARIABLE, str(store.run))  # what the runner tells its kernels
        found = other.stage("s", {}, [], write("x"))
    monkeypatch.delenv(LOCK_VARIABLE)
    with store.locked():
        assert other.stage("s", {}, [], write("y")) == found, "reading needs no lock"
    assert other.stage("t", {}, [], write("x")).exists()


def test_run_folder_from_the_environment(monkeypatch, tmp_path):
    assert run_folder("runs/x") == module.ROOT / "runs" / "x"
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path))
    assert run_folder("runs/x") == tmp_path


def test_code_version_ignores_layout_comments_and_docstrings(tmp_path):
    def version(source: str, name: str) -> str:
        file = tmp_path / f"{name}.py"
        file.write_text(source)
        made = types.ModuleType(name)
        made.__file__ = str(file)
        return code_version(made)

    plain = version('def f(x):\n    """Says."""\n    return x + 1\n', "a")
    assert version("# why\ndef f( x ):\n\n    return (x + 1)\n", "b") == plain
    assert version("def f(x):\n    return x + 2\n", "c") != plain
    assert version('"""Module."""\nclass A:\n    """Only a docstring."""\n', "d") == version("class A:\n    ''\n", "e")


def test_code_version_of_a_package_reads_all_its_files(tmp_path):
    def package(name: str, inner: str) -> types.ModuleType:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "inner.py").write_text(inner)
        made = types.ModuleType(name)
        made.__path__ = [str(folder)]
        return made

    assert code_version(package("p", "x = 1")) == code_version(package("q", "x  =  1"))
    assert code_version(package("r", "x = 2")) != code_version(package("s", "x = 1"))


def test_content_hash_of_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text("1")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")
    (tmp_path / "b" / "sub" / "file").rename(tmp_path / "b" / "sub" / "other")
    assert content_hash(tmp_path / "a") != content_hash(tmp_path / "b")


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [{"text": "қазақ\u2028line"}, {"n": None}]
    assert read_jsonl(write_jsonl(path, rows)) == rows

    class Unwritable:
        pass

    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": Unwritable()}])
    assert read_jsonl(path) == rows and [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    assert read_json(write_json(tmp_path / "v.json", [1])) == [1]
    assert (tmp_path / "v.json").stat().st_mode & 0o777 == 0o644


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "big.json"
    write_json(path, [0] * 20_000)
    writer = threading.Thread(target=lambda: [write_json(path, [n] * 20_000) for n in range(20)])
    writer.start()
    while writer.is_alive():
        assert len(read_json(path)) == 20_000
    writer.join()


def test_sentinel(tmp_path):
    found = read_json(finish(tmp_path, "03_routing", "lift 4.6", lift=4.6))
    assert found["headline"] == "lift 4.6" and found["results"] == {"lift": 4.6}
    assert 2**20 < found["peak"] == pytest.approx(peak_memory(), rel=0.2)
