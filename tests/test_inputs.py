"""Tables of any origin, and the hub's answers: read rightly, or refused with place and reason."""

import errno
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pandas as pd
import pyarrow
import pytest
from huggingface_hub import constants, errors, hf_api
from pyarrow import parquet

from foggen import inputs
from foggen.config import load_profile, override
from foggen.inputs import HubError, TableError, explained, model_folder, pin, read_rows

# ---- Tables


def table(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


WORDS = "x" * 200_000  # longer than the csv module's limit
READABLE: list[tuple[str, str | bytes, list[dict[str, Any]]]] = [
    ("a.jsonl", '{"id": 1, "fact": null}\n\n{"id": 2}\r\n', [{"id": 1, "fact": None}, {"id": 2}]),
    ("a.jsonl", '\ufeff{"id": "қ\u2028", "p": NaN}', [{"id": "қ\u2028", "p": None}]),
    ("a.jsonl", '{"a": [NaN, {"b": NaN}]}', [{"a": [None, {"b": None}]}]),
    ("a.jsonl", "", []),
    (
        "a.csv",
        "id,fact\nq1,\nq2,None\n",
        [{"id": "q1", "fact": None}, {"id": "q2", "fact": "None"}],
    ),
    ("a.csv", '\ufeffid, text\r\nq1,"a, ""b""\nc"\r\n\r\n', [{"id": "q1", "text": 'a, "b"\nc'}]),
    ("a.csv", f"id,text\nq1,{WORDS}\n", [{"id": "q1", "text": WORDS}]),
    ("a.csv", "id,n\nq1," + "7" * 5000, [{"id": "q1", "n": "7" * 5000}]),
    ("a.csv", "id\nq;1\n", [{"id": "q;1"}]),
    ("a.csv", 'id, text\nq1, "a, b"\n', [{"id": "q1", "text": "a, b"}]),
    ("A.CSV", "id\nq1\n", [{"id": "q1"}]),
    ("a.csv", "\n\nid\nq1\n", [{"id": "q1"}]),
    ("a.jsonl", '{"p": Infinity}', [{"p": float("inf")}]),
]


@pytest.mark.parametrize(("name", "content", "rows"), READABLE)
def test_readable_tables(name: str, content: str, rows: list[Any], tmp_path: Path) -> None:
    read = read_rows(table(tmp_path, name, content))
    assert [row for _, row in read] == rows
    word, numbers = ("line", (1, 3)) if name == "a.jsonl" else ("row", (1, 2))
    places = [f"{name}, {word} {number}" for number in numbers]
    assert [place for place, _ in read] == places[: len(rows)]


UNREADABLE: list[tuple[str, str | bytes, list[str]]] = [
    ("a.csv", "a,b\n1,2,\n3,4\n5,6,7,8\n", ["row 1: 3 fields; expected: ", "row 3: 4 fields"]),
    ("a.csv", "id,q\n1,Which, if any?\n2\n", ["row 1: 3 fields", "row 2: 1 fields; expected: "]),
    ("a.csv", "id,q, id\n1,2,3\n", ["['id', 'q', 'id'] has a name twice"]),
    ("a.csv", "id;q\n1;2,5\n", ["['id;q']", "semicolons or tabs"]),
    ("a.csv", "id\tq\n1\t2\n", ["semicolons or tabs"]),
    ("a.csv", 'id,q\n1,"open\n2,b\n', ["a.csv: unexpected end of data"]),
    ("a.csv", 'id,q\n1,"a"b\n', ["a.csv: "]),
    ("a.csv", "id,q\n1,a\n".encode("utf-16"), ["'utf-8' codec", "in UTF-8"]),
    ("a.jsonl", '{"a": 1}\n{"a": \n[1]\n"text"\nnull', ["line 2:", "line 3: [1]", "line 5: None"]),
    ("a.jsonl", '{"a": ' + "7" * 5000 + "}", ["line 1: Exceeds the limit (4300 digits)"]),
    ("a.jsonl", "x\n" * 50, ["line 20:", "and 30 more"]),
    ("a.parquet", "not Parquet", ["a.parquet: ", "expected: a .jsonl, .csv, .parquet file"]),
    ("a.xlsx", "", ["expected: a .jsonl, .csv, .parquet file"]),
]


@pytest.mark.parametrize(("name", "content", "words"), UNREADABLE)
def test_unreadable_tables_name_every_place(
    name: str, content: str | bytes, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(TableError) as error:
        read_rows(table(tmp_path, name, content))
    assert all(word in str(error.value) for word in words), str(error.value)
    with pytest.raises(TableError, match=r"No such file|xlsx"):
        read_rows(tmp_path / "nowhere" / name)


def test_parquet_gives_indices_and_missing_values_back(tmp_path: Path) -> None:
    frame = pd.DataFrame({"fact": [0, 1], "text": [None, "None"]}, index=["q0", "q1"])
    for name in ("id", None):
        frame.rename_axis(name).to_parquet(tmp_path / "a.parquet")
        assert read_rows(tmp_path / "a.parquet") == [
            ("a.parquet, row 1", {"fact": 0, "text": None, "id": "q0"}),
            ("a.parquet, row 2", {"fact": 1, "text": "None", "id": "q1"}),
        ]
    cells = pyarrow.table({"id": ["own"], "n": [float("nan")], "__index_level_0__": [7]})
    parquet.write_table(cells, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [("a.parquet, row 1", {"id": "own", "n": None})]


# ---- The hub

NAME, COMMIT = "owner/name", "c" * 40
ANSWERS: dict[str, tuple[int, dict[str, str], str]] = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}, "Cannot access gated repo .*`hf auth login`"),
    "missing": (404, {"X-Error-Code": "RepoNotFound"}, "Repository Not Found .*`hf auth login`"),
    "revision": (404, {"X-Error-Code": "RevisionNotFound"}, "Revision Not Found"),
    "busy": (429, {}, "429 Too Many Requests"),
    "down": (503, {}, "503 Service Unavailable"),
}


class Hub(BaseHTTPRequestHandler):
    """A hub that gives every request the same answer."""

    status, headers_to_send = 200, {}  # type: ignore[var-annotated]
    tokens: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.tokens.append(self.headers.get("Authorization"))
        self.send_response(self.status)
        for name, value in {"Content-Length": "0", **self.headers_to_send}.items():
            self.send_header(name, value)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *words: object) -> None: ...


def serve(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)  # made when the library was imported


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """The real client against a server here, without a token, a cache or pauses."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    serve(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    Hub.tokens.clear()
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_hub_s_answers_are_told_as_what_they_are(
    answer: str, hub: type[Hub], tmp_path: Path
) -> None:
    hub.status, hub.headers_to_send, reason = ANSWERS[answer]
    with pytest.raises(HubError, match=rf"model owner/name \(main\): .*{reason}.*HF_HOME"):
        model_folder(NAME)
    settings = override(load_profile("pocket"), {"edge.model": NAME})
    with pytest.raises(HubError, match=rf"model owner/name .*{reason}"):
        pin(settings)
    (tmp_path / "token").write_text("hf_of_the_login")
    with pytest.raises(HubError) as error:
        model_folder(NAME, COMMIT)
    assert hub.tokens[0] is None and hub.tokens[-1] == "Bearer hf_of_the_login"
    assert "hf_of_the_login" not in str(error.value) and COMMIT in str(error.value)


def test_without_a_connection_the_cache_answers(
    monkeypatch: pytest.MonkeyPatch, hub: type[Hub], tmp_path: Path
) -> None:
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / COMMIT
    settings = override(load_profile("pocket"), {"edge.model": NAME})
    serve(monkeypatch, "http://127.0.0.1:9")
    for offline, reason in (
        (False, "Connection refused"),
        (True, "HF_HUB_OFFLINE|outgoing traffic has been disabled"),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        for ask in (lambda: model_folder(NAME), lambda: pin(settings)):
            with pytest.raises(HubError, match=reason):
                ask()
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    assert pin(settings) == {"edge.revision": COMMIT} and model_folder(NAME) == snapshot


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device .*HF_HOME"),
        (httpx2.ReadTimeout("slow"), "slow"),
        (errors.HFValidationError("must be in the form"), "must be in the form"),
    ],
)
def test_errors_of_libraries_around_the_hub(error: Exception, reason: str) -> None:
    for wrapped in (error, OSError("no file")):
        told = pytest.raises(HubError, match=rf"dataset owner/name \(main\).*{reason}")
        with told, explained(NAME, "dataset"):
            raise wrapped from error


def test_a_folder_of_the_checkout_is_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "snapshot_download", lambda *names, **options: pytest.fail("asked"))
    assert model_folder("data/pocket/edge") == inputs.ROOT / "data" / "pocket" / "edge"
    assert pin(load_profile("pocket")) == {}


def test_open_revisions_are_fixed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    class Newest:
        def __init__(self, name: str, repo_type: str) -> None:
            asked.append((name, repo_type))
            self.resolved = f"newest of {name}"

    monkeypatch.setattr(inputs, "resolve_revision", Newest)
    settings = override(
        load_profile("paper-gemma3-270m"),
        {"edge.revision": None, "edge.format_install": {"labels_from": "a/labeller"}},
    )
    pins = pin(settings)
    data_sets = {"issai/KazCulture", "issai/foggen-data"}
    models = {"a/labeller", "google/gemma-3-270m"}
    kinds = {"model": models, "dataset": data_sets}
    assert {*asked} == {(name, kind) for kind, names in kinds.items() for name in names}
    pinned = override(settings, pins)
    assert pinned.edge.revision == "newest of google/gemma-3-270m"
    assert (
        pinned.edge.format_install and pinned.edge.format_install.revision == "newest of a/labeller"
    )
    assert {source.revision for source in pinned.data.sources} == {
        "newest of issai/foggen-data",
        "newest of issai/KazCulture",
    }
    assert pinned.cloud.revision == settings.cloud.revision
    asked.clear()
    assert pin(pinned) == {} and pin(settings, pinned.model_dump(mode="json")) == pins and not asked
    branch = override(pinned, {"open_ended.r15_model": "a/branch", "cloud.revision": None})
    assert pin(branch) == {
        "open_ended.r15_revision": "newest of a/branch",
        "cloud.revision": f"newest of {settings.cloud.model}",
    }
    served = {"cloud.engine": "openai", "cloud.base_url": "http://localhost:8000/v1"}
    assert "cloud.revision" not in pin(override(branch, served))
