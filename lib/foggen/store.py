"""The run folder: stages that are computed once, a manifest of them, and one writer at a time.

A stage is a folder `stages/<name>-<key>`. It is computed in a temporary folder and renamed into place, so a stage
that is present is complete. Knows nothing of what the stages hold.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[2]
RUN_VARIABLE = "FOGGEN_RUN"  # the run folder of this process, over a notebook's own default
LOCK_VARIABLE = "FOGGEN_LOCKED"  # the run folder that a parent process has locked for this one


class RunBusyError(RuntimeError):
    """Another process is writing into the run folder."""


def progress(line: str) -> None:
    """Says how far the work is, on stderr: never part of a notebook's results."""
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Files: written whole or not at all


def write_text(path: Path, text: str) -> Path:
    """Writes a file under a temporary name and renames it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".tmp-", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)  # a temporary file is private
    os.replace(file.name, path)
    return path


def fill(path: Path, name: str, text: str) -> Path:
    """Replaces what stands between `<!-- name: begin -->` and `<!-- name: end -->`. Raises ValueError without them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path.name} has no place for {name}: expected {begin} and {end}")
    return write_text(path, f"{before}{begin}\n{text}\n{end}{after}")


def write_json(path: Path, value: object) -> Path:
    """Writes one JSON value, indented."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads one JSON value."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes one JSON object a line."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line. Raises ValueError with the first line that is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}; expected: one JSON object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path.name}, line {number}: {line:.60}; expected: one JSON object a line")
        rows += [row] if line.strip() else []
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Keys


def digest(value: object) -> str:
    """A hash of plain values (numbers, texts, lists, mappings), whatever the order of the mappings' keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@functools.cache
def code_version(code: Any) -> str:
    """A hash of a package, module, class or function that comments, layout and docstrings do not change."""
    if hasattr(code, "__path__"):
        sources = [file.read_text() for file in sorted(Path(code.__path__[0]).rglob("*.py"))]
    else:
        sources = [textwrap.dedent(inspect.getsource(code))]
    trees = [ast.parse(source) for source in sources]
    with_docstrings = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, with_docstrings) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return digest([ast.dump(tree) for tree in trees])


@functools.cache
def _file_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(path: Path) -> str:
    """A hash of a file, or of all files of a folder with their names. Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is an input of this stage and does not exist")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(file, file.stat()) for file in files]
    return digest(
        [[file.relative_to(path).as_posix(), _file_hash(file, s.st_size, s.st_mtime_ns)] for file, s in stats]
    )


# ---------------------------------------------------------------------------------------------------------------
# The run folder


def run_folder(run: str | Path) -> Path:
    """The run's folder: `run` against the checkout's root, unless the environment variable FOGGEN_RUN names one."""
    return (ROOT / os.environ.get(RUN_VARIABLE, run)).resolve()


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    status = Path("/proc/self/status")  # getrusage would count what the parent held before this process started
    if status.exists() and (peak_kib := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(peak_kib[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Store:
    """The stages of one run."""

    def __init__(self, run: str | Path) -> None:
        self.run = run_folder(run)
        self.stages = self.run / "stages"
        self.stages.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.run / ".lock")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run folder for this process; nested use is free. Raises RunBusyError at once if it is taken.

        Whatever temporary folders lie there when the lock is won belong to killed processes, and are removed.
        """
        if self._lock.is_locked or os.environ.get(LOCK_VARIABLE) == str(self.run):
            yield
            return
        owner = self.run / ".lock-owner"
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            by = owner.read_text() if owner.exists() else "another process"
            advice = "Wait for it to end, or choose another folder (RUN=...)."
            raise RunBusyError(f"{self.run.name}: this run folder is in use by {by}. {advice}") from None
        try:
            owner.write_text(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            for left in [*self.run.rglob(".tmp-*")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
            yield
        finally:
            owner.unlink(missing_ok=True)
            self._lock.release()

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Sequence[Path],
        compute: Callable[[Path], object],
        code: Sequence[Any] = (),
    ) -> Path:
        """The folder of a stage, computed by `compute(folder)` unless it is there already.

        The key is a hash of `settings`, of the inputs (other stages by name, other files by content) and of the
        `code` (modules, classes or functions) that computes it. What `compute` leaves in the folder is kept.
        """
        parts = {
            "settings": dict(settings),
            "inputs": [self._input(path) for path in inputs],
            "code": [code_version(one) for one in code],
        }
        folder = self.stages / f"{name}-{digest(parts)[:12]}"
        if folder.exists():
            return folder
        with self.locked(), tempfile.TemporaryDirectory(dir=self.stages, prefix=".tmp-") as temporary:
            started = time.time()
            working = Path(temporary) / name
            working.mkdir()
            compute(working)
            seconds = round(time.time() - started, 3)
            record = {"stage": folder.name, "started": started, "seconds": seconds, "peak": peak_memory(), **parts}
            write_json(working / "stage.json", record)
            if not folder.exists():
                os.replace(working, folder)
            self._write_manifest()
        progress(f"  {name}: {seconds:.1f} s")
        return folder

    def _input(self, path: Path) -> str:
        """A stage or a file of one is named by its key, a hub's snapshot by its commit: they stand for the content."""
        path = path.resolve()
        if path.parent.name == "snapshots":
            return f"{path.parent.parent.name}@{path.name}"
        return path.relative_to(self.stages).as_posix() if path.is_relative_to(self.stages) else content_hash(path)

    def _write_manifest(self) -> None:
        """All stages present, in the order they were made: read from the stages, so it cannot disagree with them."""
        records = [read_json(file) for file in self.stages.glob("*/stage.json")]
        write_jsonl(self.run / "manifest.jsonl", sorted(records, key=lambda record: float(record["started"])))


def finish(run: str | Path, notebook: str, headline: str, **results: Any) -> Path:
    """A notebook's last act: its sentinel file, with its main result in one line and more of it by name."""
    values = {"notebook": notebook, "headline": headline, "results": results, "peak": peak_memory()}
    return write_json(run_folder(run) / "done" / f"{notebook}.json", values)
