"""A model hub on this machine: as much of the Hugging Face hub's protocol as downloads need.

It serves plain folders, and fails as it is told to:

    models/Qwen/Qwen3-0.6B/c1899de289a04d12100db370d81485cdf75e47ca/config.json
    datasets/issai/KazCulture/1111111111111111111111111111111111111111/data/train.parquet

The folder of a commit has the commit's name; the last one in order of names is `main`. What is in
`gated` (owner/name: token) is given only to who sends that token.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

NO_COMMIT = "0" * 40
Program = Callable[..., CompletedProcess[str]]  # the fixture `program`


@dataclass
class Fault:
    """What befalls the next `times` requests whose path holds `path`.

    `status`: the answer is this HTTP status; None: a body breaks off half way.
    """

    status: int | None = None
    path: str = ""
    times: int = 1_000_000
    seconds: float = 0  # to wait before the answer


class Refused(Exception):
    """A request that is answered with a status, and with the hub's own name for the reason."""

    def __init__(self, status: int, reason: str, text: str, commit: str = NO_COMMIT) -> None:
        super().__init__(text)
        self.status, self.reason, self.commit = status, reason, commit


class Hub(ThreadingHTTPServer):
    """The server; `requests` are those it got, as (method, path)."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root, self.fault = root, Fault(times=0)
        self.gated: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def open(self) -> Iterator[Hub]:
        """Serves for the time of a `with` block."""
        Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What directs the hub's libraries to this hub, and their downloads to a folder."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def commit(self, kind: str, name: str, revision: str) -> Path:
        """The folder of a repository's commit."""
        folder = self.root / kind / name
        if not folder.is_dir():
            raise Refused(401, "RepoNotFound", "Repository not found")
        commits = sorted(folder.iterdir())
        chosen = commits[-1] if revision == "main" else folder / revision
        if chosen not in commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return chosen

    def strikes(self, method: str, path: str) -> bool:
        """Whether the fault befalls this request."""
        hit = self.fault.times > 0 and self.fault.path in path
        if self.fault.status is None:
            hit = hit and method == "GET" and "/resolve/" in path
        self.fault.times -= hit
        return hit


@cache
def sha256(file: Path) -> str:
    """What the hub calls the etag of a large file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Answer(BaseHTTPRequestHandler):
    """One connection to the hub."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr; the hub lists its requests."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, hub = unquote(url.path), self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path))
        strikes, status = hub.strikes(self.command, path), hub.fault.status
        if strikes:
            time.sleep(hub.fault.seconds)
        if strikes and status:
            return self.send_json({"error": "a fault"}, status)
        try:
            for pattern, answer in ROUTES.items():
                if found := re.fullmatch(pattern, path):
                    query = parse_qs(body.decode() or url.query)
                    return answer(self, *self.place(**found.groupdict()), query, strikes)
            self.send_json({"error": "no such path"}, 404)
        except Refused as error:
            headers = {"X-Error-Code": error.reason, "X-Error-Message": str(error)}
            headers["X-Repo-Commit"] = error.commit
            self.send_json({"error": str(error)}, error.status, headers)

    def place(
        self, kind: str | None, name: str, revision: str | None, file: str | None = None
    ) -> tuple[str, Path, str]:
        """A request's repository, the folder of its commit and the path in it."""
        kind = "datasets" if kind in ("datasets", "datasets/") else "models"
        return name, self.server.commit(kind, name, revision or "main"), file or ""

    # ---- Answers

    def info(self, name: str, commit: Path, *_: object) -> None:
        """A repository: its newest commit and files."""
        files = [{"rfilename": file.relative_to(commit).as_posix()} for file in all_files(commit)]
        about = {"id": name, "sha": commit.name, "private": False, "siblings": files, "tags": []}
        self.send_json(about | {"gated": "manual" if name in self.server.gated else False})

    def tree(
        self, name: str, commit: Path, under: str, query: dict[str, list[str]], _: bool
    ) -> None:
        """The files and folders of a folder, or of all below it."""
        folder = commit / under
        if not folder.is_dir():
            raise Refused(404, "EntryNotFound", f"{under} does not exist", commit.name)
        deep = query.get("recursive", ["False"])[0].lower() in ("true", "1")
        found = sorted(folder.rglob("*") if deep else folder.iterdir())
        self.send_json([entry(commit, path) for path in found])

    def paths(self, name: str, commit: Path, _: str, query: dict[str, list[str]], __: bool) -> None:
        """Those of the asked paths that exist."""
        found = [commit / path for path in query.get("paths", [])]
        self.send_json([entry(commit, path) for path in found if path.exists()])

    def file(self, name: str, commit: Path, path: str, _: object, cut: bool) -> None:
        """A file, or the part of it that is asked for."""
        file, token = commit / path, self.server.gated.get(name)
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            status = 403 if "Authorization" in self.headers else 401
            raise Refused(status, "GatedRepo", f"Access to {name} is restricted")
        if not file.is_file():
            raise Refused(404, "EntryNotFound", f"{path} does not exist", commit.name)
        content = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        begin = int(wanted[1]) if wanted else 0
        end = int(wanted[2]) + 1 if wanted and wanted[2] else len(content)
        etag, part = f'"{sha256(file)}"', content[begin:end]
        headers = {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        headers |= {"X-Repo-Commit": commit.name, "Accept-Ranges": "bytes"}
        headers |= {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"} if wanted else {}
        self.send(206 if wanted else 200, part, headers, cut)

    def send_json(
        self, value: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        wait = {"Retry-After": "0"} if status == 429 else {}
        self.send(status, json.dumps(value).encode(), wait | (headers or {}))

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


def all_files(folder: Path) -> list[Path]:
    """The files in a folder and all below it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def entry(commit: Path, path: Path) -> dict[str, object]:
    """A line of the list of a repository's files."""
    about: dict[str, object] = {"path": path.relative_to(commit).as_posix(), "oid": NO_COMMIT}
    if path.is_dir():
        return about | {"type": "directory", "size": 0}
    size = path.stat().st_size
    large = {"oid": sha256(path), "size": size, "pointerSize": 130}
    return about | {"type": "file", "size": size, "lfs": large}


REPOSITORY = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
RESOLVE = r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/(?:resolve|raw)/(?P<revision>[^/]+)"
ROUTES: dict[str, Callable[..., None]] = {
    rf"{REPOSITORY}(?:/revision/(?P<revision>[^/]+))?": Answer.info,
    rf"{REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<file>.+))?": Answer.tree,
    rf"{REPOSITORY}/paths-info/(?P<revision>[^/]+)": Answer.paths,
    rf"{RESOLVE}/(?P<file>.+)": Answer.file,
}
