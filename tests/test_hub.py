"""Errors of the hub say what to do; revisions left open are fixed when a run starts."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, constants, errors

from foggen import hub
from foggen.config import load_profile, override
from foggen.rounds import model_folder
from foggen.store import Store, read_json


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co"))


def wrapped(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


GATED = errors.GatedRepoError("no", response=answer(403))
MISSING = errors.RepositoryNotFoundError("no", response=answer(404))
ERRORS: list[tuple[Exception, str, str]] = [
    (GATED, "", "it is gated.*Ask for access at https://huggingface.co/a/b, then set .*HF_TOKEN"),
    (GATED, "key", "gated.*with the account of your HF_TOKEN"),
    (MISSING, "", "no such model, or it is private.*private ones need HF_TOKEN"),
    (MISSING, "key", "open to the account of your HF_TOKEN"),
    (errors.RevisionNotFoundError("no", response=answer(404)), "", "no revision 'v9'.*commits/main"),
    (errors.OfflineModeIsEnabled("no"), "", "cannot be reached, and there is no copy.*HF_HUB_OFFLINE"),
    (errors.LocalEntryNotFoundError("no"), "", "cannot be reached"),
    (httpx2.ConnectError("no"), "", "cannot be reached"),
    (httpx2.ReadTimeout("no"), "", "cannot be reached"),
    (ConnectionError("Couldn't reach it"), "", "cannot be reached"),
    (OSError(errno.ENOSPC, "No space left on device"), "", "disk is full.*HF_HOME"),
    (wrapped(DatasetNotFoundError("gated"), GATED), "", "it is gated"),
    (DatasetNotFoundError("no"), "", "no such data set"),
    (wrapped(RuntimeError("download failed"), OSError(errno.ENOSPC, "full")), "", "disk is full"),
]


@pytest.mark.parametrize(("error", "token", "said"), ERRORS)
def test_every_error_says_what_to_do(error: Exception, token: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with (
        pytest.raises(hub.HubError, match=f"model a/b: .*{said}") as told,
        hub.explained("a/b", "model", "v9"),
    ):
        raise error
    assert token not in str(told.value).split() or not token, "a token is never shown"


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(KeyError, match="x"), hub.explained("a/b", "model"):
        raise KeyError("x")


def test_the_token_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert hub.token() is False, "none is looked for elsewhere"
    monkeypatch.setenv("HF_TOKEN", "key")
    assert hub.token() == "key"


def test_a_model_that_is_not_here_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real library, told that it is offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.HubError, match="model a/b: the hub cannot be reached"):
        model_folder("a/b")
    assert hub.cached("a/b", "model") is None


def test_without_a_connection_the_cached_commit_is_the_newest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real client, refused by a port where nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.commit("a/b", "model") is None
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("c0ffee")
    assert hub.commit("a/b", "model") == "c0ffee" and hub.cached("a/b", "model") == snapshot
    assert hub.cached("a/b", "dataset") is None and hub.cached("a/b/c", "model") is None


def test_open_revisions_are_fixed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def info(self: Any, name: str, repo_type: str) -> Any:
        asked.append((name, repo_type))
        return SimpleNamespace(sha=f"sha-of-{name}")

    monkeypatch.setattr(HfApi, "repo_info", info)
    settings = override(load_profile("paper"), {"edge.revision": None})
    pins = hub.pin(settings)
    assert asked == [
        ("Qwen/Qwen3-0.6B", "model"),
        ("issai/foggen-data", "dataset"),
        ("issai/KazCulture", "dataset"),
    ]
    pinned = override(settings, pins)
    assert pinned.edge.revision == "sha-of-Qwen/Qwen3-0.6B" and pinned.cloud.revision == settings.cloud.revision
    assert [one.revision for one in pinned.data.sources] == [
        "sha-of-issai/foggen-data",
        "sha-of-issai/KazCulture",
    ]
    branch = override(pinned, {"open_ended.r15_model": "a/branch"})
    assert hub.pin(branch) == {"open_ended.r15_revision": "sha-of-a/branch"}
    asked.pop()
    assert hub.pin(pinned) == {} and hub.pin(load_profile("pocket")) == {}
    assert hub.pin(settings, pinned.model_dump()) == pins and len(asked) == 3, "a run keeps what it began with"


def test_a_snapshot_is_an_input_by_its_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    stage = Store(tmp_path / "run").stage("one", {}, [snapshot], lambda folder: None)
    assert read_json(stage / "stage.json")["inputs"] == ["models--a--b@c0ffee"]


def test_an_upload_asks_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    done: list[Any] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *names, **options: done.append((names, options)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: done.append(options))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(hub.HubError, match="HF_TOKEN"):
        hub.push(tmp_path, "me/mine")
    monkeypatch.setenv("HF_TOKEN", "key")
    with pytest.raises(hub.HubError, match="no checkpoint"):
        hub.push(tmp_path, "me/mine")
    (tmp_path / "model.safetensors").write_bytes(b"0")
    for answer in ("", "no", "y"):
        assert not hub.push(tmp_path, "me/mine", lambda question, answer=answer: answer)
    assert not done
    questions: list[str] = []
    assert hub.push(tmp_path, "me/mine", lambda question: questions.append(question) or "yes")
    assert done[0] == (("me/mine",), {"private": True, "exist_ok": True})
    assert done[1]["repo_id"] == "me/mine" and done[1]["folder_path"] == tmp_path
    assert "1 files" in questions[0] and "key" not in capsys.readouterr().out
