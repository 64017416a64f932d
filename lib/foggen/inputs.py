"""What comes from elsewhere: tables of the reader's own, models and data sets of the hub.

Tables are read strictly. What a lenient reader would guess is an error here: a row that does not
fit its header, a name that stands twice, a text in another encoding. Knows nothing of what the
rows mean.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import constants, errors, resolve_revision, snapshot_download

from foggen.config import Settings, SettingsError, Source, parameters
from foggen.store import ROOT

Row = dict[str, Any]
Table = list[tuple[str, Row]]  # rows with their places


class TableError(ValueError):
    """A table that cannot be read; the message has a line per bad place."""


class HubError(SettingsError):
    """A model or data set that the hub does not give; the message says why."""


# ---- Tables


def read_rows(path: str | Path) -> Table:
    """The rows of a .jsonl, .csv or .parquet file, each with its place.

        ("mine.csv, row 3", {"id": "q3", "domain": "law", "fact": None, "answer": "B"})

    A missing value is None: null, NaN, an empty field of a CSV. All other CSV values are texts, of
    which blanks after the comma are no part. Raises TableError with every place that cannot be
    read (the first 20 of many).
    """
    path = Path(path)
    readers = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers:
        raise TableError(f"{path}: expected: a .jsonl, .csv or .parquet file")
    rows, problems = [], []
    try:
        for place, row in readers[path.suffix.lower()](path):
            if isinstance(row, dict):
                rows.append((f"{path.name}, {place}", plain(row)))
            else:
                problems.append(f"{path.name}, {place}: {row}")
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        problems.append(f"{path.name}: {error}; expected: a whole {path.suffix} file in UTF-8")
    if len(problems) > 20:
        problems[20:] = [f"({len(problems)} problems in all)"]
    if problems:
        raise TableError("\n".join(problems))
    return rows


def plain(value: Any) -> Any:
    """A value as JSON would have it: NaN is None, and the bytes of some Parquet writers are text.

    Raises ValueError for bytes that are no UTF-8.
    """
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value.decode() if isinstance(value, bytes) else value


def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    if "\0" in text:
        raise ValueError("it holds zero bytes, as binary and UTF-16 files do")
    return text


def _unique(pairs: Sequence[tuple[str, Any]]) -> Row:
    """A mapping of its pairs; dict() alone would silently keep the last of two equal names."""
    counts = Counter(name for name, _ in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"the name {twice[0]!r} stands there twice")
    return dict(pairs)


def _json_rows(path: Path) -> Iterator[tuple[str, Row | str]]:
    for number, line in enumerate(_text(path).split("\n"), 1):  # splitlines would split at U+2028
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_unique)
                json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
            except (ValueError, RecursionError) as error:
                row = getattr(error, "msg", error)
            problem = f"{row!s:.200}; expected: one JSON object per line"
            yield f"line {number}", row if isinstance(row, dict) else problem


def _csv_rows(path: Path) -> Iterator[tuple[str, Row | str]]:
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default
    lines = csv.reader(io.StringIO(_text(path), newline=""), strict=True, skipinitialspace=True)
    header = [name.strip() for name in next(lines, [])]
    _unique([(name, None) for name in header])
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise ValueError("its fields are separated by semicolons or tabs; expected: by commas")
    for number, cells in enumerate(filter(None, lines), 1):
        row = {name: cell or None for name, cell in zip(header, cells, strict=False)}
        expected = f"{len(header)}, as in the header (those with commas in double quotes)"
        problem = f"{len(cells)} fields; expected: {expected}"
        yield f"row {number}", row if len(cells) == len(header) else problem


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row | str]]:
    from pyarrow import parquet

    table = parquet.ParquetFile(path).read()
    names = table.column_names
    if "id" not in names:  # a data frame's index that has no name
        names = ["id" if name == "__index_level_0__" else name for name in names]
    _unique([(name, None) for name in names])
    for number, row in enumerate(table.rename_columns(names).to_pylist(), 1):
        yield f"row {number}", row


# ---- The hub

DATA_FILES = ["*.md", "*.json", "*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.txt", "*.gz", "*.zip"]
MODEL_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]  # no pickles, no code
REVISIONS = dict(
    model="revision", labels_from="revision", path="revision", r15_model="r15_revision"
)
HUB_ERRORS = (OSError, httpx2.HTTPError, errors.RevisionResolutionError, errors.HFValidationError)
TELLING = (  # what says why, of the errors that others are raised from
    errors.HfHubHTTPError,
    errors.OfflineModeIsEnabled,
    errors.HFValidationError,
)


def is_local(name: str) -> bool:
    """Whether a name is a file or folder of this checkout or machine."""
    return (ROOT / name).exists()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from: libraries wrap the hub's own."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def explained(name: str, kind: str, revision: str | None = None) -> Iterator[None]:
    """Turns what the hub's libraries raise inside the block into a HubError with the reason."""
    try:
        yield
    except HUB_ERRORS as error:
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
        causes = list(_causes(error))
        telling = [cause for cause in causes if isinstance(cause, TELLING)]
        reason = " ".join(str([*telling, causes[-1]][0]).split())
        advice = f"see {page}; gated or private ones want `hf auth login`; downloads lie in HF_HOME"
        raise HubError(f"{kind} {name} ({revision or 'main'}): {reason} ({advice})") from error


def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model: of the checkout, else of the hub, downloaded where it is not here yet.

    Raises HubError where the hub does not give it.
    """
    if (ROOT / model).is_dir():
        return ROOT / model
    with explained(model, "model", revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=MODEL_FILES))


def hub_tables(source: Source) -> dict[str, Table]:
    """The tables of a hub set, by its splits; the id of a row is its place.

    A set with several configurations of which none is named is read whole: the domain of a row
    is then the name of its configuration, unless it has a column `domain`. Raises HubError where
    the hub does not give the set, or it cannot be read.
    """
    from datasets import exceptions, get_dataset_config_names, load_dataset

    # `datasets` alone takes any cached revision where the hub cannot be reached.
    with explained(source.path, "dataset", source.revision):
        folder = snapshot_download(
            source.path, repo_type="dataset", revision=source.revision, allow_patterns=DATA_FILES
        )
    tables: dict[str, Table] = {}
    try:
        known = get_dataset_config_names(folder)
        several = not source.name and len(known) > 1 and "default" not in known
        for config in known if several else [source.name]:
            loaded = load_dataset(folder, config, split=source.split)
            for split, rows in ({source.split: loaded} if source.split else loaded).items():
                place = "/".join(filter(None, (source.path.split("/")[-1], config, split)))
                domain = {"domain": config} if several else {}
                tables.setdefault(str(split), []).extend(
                    (f"{place}, row {number}", domain | plain(row) | {"id": f"{place}-{number}"})
                    for number, row in enumerate(rows.to_list())
                )
    except (ValueError, exceptions.DatasetsError) as error:
        raise HubError(f"data set {source.path}: {error}") from error
    return tables


def hub_entries(values: Any) -> Iterator[tuple[dict[str, Any], str, str]]:
    """What a profile's values name of the hub: a group of settings, where its id and revision are.

    ({"model": "Qwen/Qwen3-0.6B", "revision": None, ...}, "model", "revision")
    """
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, dict | list):
            yield from hub_entries(value)
    if isinstance(values, dict) and values.get("engine") != "openai":
        for name, revision in REVISIONS.items():
            hub_id = values.get(name)
            if isinstance(hub_id, str) and hub_id and revision in values and not is_local(hub_id):
                yield values, name, revision


def pin(settings: Settings, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Overrides that fix revisions left open: as `before` (the run's earlier settings), else now.

    Raises HubError where the hub cannot be asked and this machine's cache knows no revision.
    """
    values, open_values = settings.model_dump(), parameters(settings.model_dump())
    known = {group[name]: group[revision] for group, name, revision in hub_entries(before or {})}
    for group, name, revision in hub_entries(values):
        if not group[revision]:
            hub_id, kind = group[name], "dataset" if name == "path" else "model"
            with explained(hub_id, kind):
                group[revision] = (
                    known.get(hub_id) or resolve_revision(hub_id, repo_type=kind).resolved
                )
    return {name: value for name, value in parameters(values).items() if value != open_values[name]}
