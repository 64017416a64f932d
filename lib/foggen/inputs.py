"""What comes from elsewhere: tables of the reader's own, models and data sets of the hub.

Tables are read strictly. What a lenient reader would guess is an error here: a row that does not
fit its header, a name that stands twice, a text in another encoding. Knows nothing of what the
rows mean, but for the names that public sets of questions give their columns.
"""

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from huggingface_hub import resolve_revision, snapshot_download
from pydantic import BaseModel, ValidationError

from foggen.config import Columns, Settings, SettingsError, Source, hub_entries, parameters
from foggen.prompts import LETTERS, SYSTEM_OPEN, parse_response
from foggen.store import ROOT, progress

Row = dict[str, Any]
Table = list[tuple[str, Row]]  # rows with their places
Model = TypeVar("Model", bound=BaseModel)


class TableError(ValueError):
    """A table that cannot be used: a line per problem, with its place and the expected form."""


class HubError(SettingsError):
    """A model or data set that the hub does not give; the message says why."""


# ---- Texts

INVISIBLE = "\\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff"  # white space, joiners, marks of order


def normalised(text: str, keep_case: bool = False) -> str:
    """A text as it is compared with others: NFC, all that is invisible a blank, and without case.

    Options keep their case, since `Rr` and `RR` are different genotypes.
    """
    text = unicodedata.normalize("NFC", text if keep_case else text.casefold())
    return " ".join(filter(None, re.split(f"[{INVISIBLE}]+", text)))


def as_name(value: Any) -> Any:
    """A scalar as a name: 12, 12.0 and "12.0" are one; null, NaN and white space are none."""
    if value is None or isinstance(value, list | dict):  # no names, as types say that want one
        return value
    return None if value != value else re.sub(r"\A(-?\d+)\.0+\Z", r"\1", str(value).strip()) or None


def listed(value: Any) -> Any:
    """A list or mapping that a cell of a CSV holds as JSON; all else as it is."""
    if not isinstance(value, str) or not value.startswith(('["', '{"')):
        return value
    try:
        return json.loads(value)
    except ValueError:  # a text in brackets
        return value


# ---- Tables


def without_nan(row: Row) -> Row:
    """The row with None for NaN, which equals nothing: data frames write it for what is missing."""
    return {name: None if value != value else value for name, value in row.items()}


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # splitlines would split at U+2028 too
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                # Data frames write NaN for what is missing; JSON knows no such number
                constants = {"NaN": None, "Infinity": np.inf, "-Infinity": -np.inf}
                row = json.loads(line, parse_constant=constants.get)
            except ValueError as error:
                row = error
            yield f"line {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True, skipinitialspace=True)
        header = [name.strip() for name in next(filter(None, lines), [""])]
        if len({*header}) < len(header) or re.search("[;\t]", header[0]):
            raise ValueError(f"{header} has a name twice, or semicolons or tabs for commas")
        for number, cells in enumerate(filter(None, lines), 1):
            row = {name: cell or None for name, cell in zip(header, cells, strict=False)}
            yield f"row {number}", row if len(cells) == len(header) else f"{len(cells)} fields"


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import parquet

    for number, row in enumerate(parquet.ParquetFile(path).read().to_pylist(), 1):
        if "__index_level_0__" in row:  # a data frame's index that has no name
            row.setdefault("id", row.pop("__index_level_0__"))
        yield f"row {number}", without_nan(row)


READERS = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def read_rows(path: str | Path) -> Table:
    """The rows of a .jsonl, .csv or .parquet file, each with its place.

        ("mine.csv, row 3", {"id": "q3", "domain": "law", "fact": None, "answer": "B"})

    A missing value is None: null, NaN, an empty field of a CSV. All other CSV values are texts, of
    which blanks after the comma are no part. Raises TableError with every row that cannot be read.
    """
    path = Path(path)
    try:
        rows = READERS[path.suffix.lower()](path)
        table = [(f"{path.name}, {place}", row) for place, row in rows]
    except (OSError, KeyError, ValueError, csv.Error) as error:
        form = f"a {', '.join(READERS)} file, in UTF-8"
        raise TableError(f"{path}: {error}; expected: {form}") from None
    form = "a JSON object, or a field per column (quote those with commas)"
    bad = [(place, row) for place, row in table if not isinstance(row, dict)]
    refuse([f"{place}: {row!s:.200}; expected: {form}" for place, row in bad])
    return table


def file_tables(path: Path, open_ended: bool = False) -> dict[str, Table]:
    """The tables of a file, or of the files of a folder, by their stems.

    The files of a folder are those called as the open-ended tasks, or else all others. Raises
    TableError for rows that cannot be read, and where there are none.
    """
    found = [file for file in sorted(path.glob("*.*")) if file.suffix.lower() in READERS]
    files = [file for file in found if (file.stem in SYSTEM_OPEN) == open_ended]
    tables: dict[str, Table] = {}
    for file in [path] if path.is_file() else files:
        tables[file.stem] = tables.get(file.stem, []) + read_rows(file)
    if not tables or not all(tables.values()):
        raise TableError(f"{path}: no {', '.join(READERS)} file in it, or one without rows")
    return tables


def refuse(problems: Sequence[str]) -> None:
    """Raises TableError with the problems (the first 20 of many), if there are any."""
    more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
    if problems:
        raise TableError("\n".join([*problems[:20], *more]))


def check_rows(table: Table, kind: type[Model], *key: str, unusable: float = 0) -> list[Model]:
    """The rows as models of a kind, no `key` of which is there twice. Raises TableError with all
    that are none,

    "mine.csv, row 3: field `question`: ' '; expected: a nonempty text"

    unless they are no more than the `unusable` share: then they are left out, and counted.
    """
    models: dict[tuple[Any, ...], Model] = {}
    problems: list[str] = []
    for place, row in table:
        try:
            model = kind.model_validate(row)
        except ValidationError as error:
            for bad in error.errors():
                field = str(bad["loc"][0])
                form = kind.model_fields[field].description or bad["msg"]
                value = "missing" if bad["type"] == "missing" else f"{bad['input']!r:.60}"
                problems.append(f"{place}: field `{field}`: {value}; expected: {form}")
            continue
        name = tuple(getattr(model, field) for field in key)
        if models.setdefault(name, model) is not model:
            problems.append(f"{place}: field `{key[0]}`: {name[0]!r} again; expected: once")
    if len(problems) > unusable * len(table):
        refuse(problems)
    if problems:
        progress(f"  {len(problems)} rows are left out: {problems[0]} ...")
    return list(models.values())


# ---- Columns of public sets of questions

# Their names in lower case without blanks, the more telling first
USUAL = {
    "question": ("question", "query", "problem", "prompt"),
    "context": ("context", "passage", "article", "premise"),
    "options": ("options", "choices"),
    "answer": ("answerkey", "answeridx", "cop", "correctoption", "answer", "correctanswer",
               "correct", "label"),
    "domain": ("domain", "category", "subject", "topic"),
    "fact": ("fact",), "id": ("id", "questionid"),
}  # fmt: skip


def find_columns(table: Table, given: Columns) -> dict[str, Any]:
    """The column of every field: as given, else by its usual name, else None.

    The options may have a column each: {"question": "Query", "options": ["A", "B", "C"], ...}.
    Of names that differ in case or blanks only, neither is known. Raises TableError, with the
    lines to write into the profile, where a column cannot be told.
    """
    names = {column for _, row in table for column in row}
    plain = {name: re.sub("[ _]", "", name.casefold()) for name in sorted(names)}
    counts = Counter(plain.values())
    known = {short: name for name, short in plain.items() if counts[short] == 1}
    columns: dict[str, Any] = {}
    for field, usual in USUAL.items():
        columns[field] = next((known[name] for name in usual if name in known), None)
    columns["options"] = columns["options"] or _option_columns(known)
    named = given.model_dump(exclude={"answer_is", "messages"}, exclude_none=True)
    columns |= named
    needed = ("question", "options", "answer", *named)
    missing = [name for name in needed if not names.issuperset(np.atleast_1d(columns[name]))]
    if missing:
        lines = "".join(f"\n      {field}: <column>" for field in missing)
        advice = f"rename columns, or write into an entry of data.sources:\n    columns:{lines}"
        raise TableError(f"unknown columns in {table[:1]!s:.500}\n{advice}")
    return columns


def _option_columns(known: Mapping[str, str]) -> list[str] | None:
    """Columns named A, B, C, or opa, opb, opc; None where one is missing in between."""
    for head in ("", "op"):
        names = [f"{head}{letter}" for letter in LETTERS.lower()]
        present = [name for name in names if name in known]
        if len(present) > 1 and present == names[: len(present)]:
            return [known[name] for name in present]
    return None


def read_chat(row: Row, column: str | None) -> Row:
    r"""Question, options and answer of a chat such as

    user: `Why?\nA. so\nB. not so`, assistant: `Confidence: 0.5\nFinal answer: B`
    """
    turns = [turn for turn in row.get(column or "messages") or [] if isinstance(turn, Mapping)]
    chat = {turn.get("role"): str(turn.get("content")) for turn in turns}
    # The options begin with the last line of an A, and end with a blank line.
    form = r"(?sm)(.*)^[ \t]*\(?A[.):][ \t]+(.*?)(?:\n[ \t]*\n|\Z)"
    if not (parts := re.match(form, chat.get("user", ""))):
        return {}
    first, *rest = re.split(r"\n[ \t]*\(?([B-Z])[.):][ \t]+", parts[2].strip())
    letters = "A" + "".join(rest[::2])
    options = dict(zip(letters, [first, *rest[1::2]], strict=True))
    answer = parse_response(chat.get("assistant", "")).answer or chat.get("assistant")
    fields = {"question": parts[1].strip(), "options": options, "answer": answer}
    return fields if LETTERS.startswith(letters) else {}


def read_options(row: Row, column: str | list[str]) -> tuple[list[Any], list[str]]:
    """Options of any usual form as a list, and the labels by which an answer may name them."""
    value = [*map(row.get, column)] if isinstance(column, list) else listed(row.get(column))
    labels: Sequence[Any] = LETTERS
    if isinstance(value, Mapping):
        labels, value = value.get("label", [*value]), value.get("text", [*value.values()])
    options = list(value) if isinstance(value, list) else [value]
    while options and options[-1] in (None, ""):  # fewer than other rows have
        options.pop()
    # `A)` and `(A)` are marks; the A. of `A. Smith` is none
    pairs = zip(LETTERS, map(str, options), strict=False)
    if all(re.match(rf"\(?{letter}\)\s*\S", text) for letter, text in pairs):
        options = [text.partition(")")[2].lstrip() for text in options]
    return options, [str(label).casefold() for label in labels[: len(options)]]


def read_answer(answer: Any, options: list[Any], labels: list[str]) -> dict[str, str]:
    """The letter of the right option, by every way to read the answer: {"index1": "B", ...}."""
    text = "" if answer is None else normalised(str(answer), keep_case=True)
    short = normalised(str(as_name(answer) or ""), keep_case=True)  # 2 for 2.0
    letter = re.sub(r"\A\(?(\w+)[.):].*", r"\1", short).casefold()  # `(B) not so` is b
    ways = {
        "letter": (letter, labels),
        "text": (text, [normalised(str(option), keep_case=True) for option in options]),
        "index0": (short, [str(place) for place in range(len(options))]),
        "index1": (short, [str(place + 1) for place in range(len(options))]),
    }
    known = [(how, names.index(name)) for how, (name, names) in ways.items() if name in names[:26]]
    return {how: LETTERS[place] for how, place in known}


# ---- The hub

MODEL_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]  # no pickles, no code


@contextmanager
def explained(name: str, kind: str, revision: str | None = None) -> Iterator[None]:
    """Turns what the hub's libraries raise inside the block into a HubError with the reason."""
    try:
        yield
    except Exception as error:  # of huggingface_hub, datasets, httpx, or the disk
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        advice = "gated or private ones want `hf auth login`; downloads lie in HF_HOME"
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
    from datasets import get_dataset_config_names, load_dataset

    tables: dict[str, Table] = {}
    with explained(source.path, "dataset", source.revision):
        # `datasets` alone takes any cached revision where the hub cannot be reached.
        folder = snapshot_download(source.path, repo_type="dataset", revision=source.revision)
        known = get_dataset_config_names(folder)
        several = not source.name and len(known) > 1 and "default" not in known
        for config in known if several else [source.name]:
            loaded = load_dataset(folder, config, split=source.split)
            for split, rows in ({source.split: loaded} if source.split else loaded).items():
                place = "/".join(filter(None, (source.path.split("/")[-1], config, split)))
                domain = {"domain": config} if several else {}
                for number, row in enumerate(rows.to_list()):
                    named = domain | without_nan(row) | {"id": f"{place}-{number}"}
                    tables.setdefault(str(split), []).append((f"{place}, row {number}", named))
    return tables


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
                newest = known.get(hub_id) or resolve_revision(hub_id, repo_type=kind).resolved
                group[revision] = newest
    return {name: value for name, value in parameters(values).items() if value != open_values[name]}
