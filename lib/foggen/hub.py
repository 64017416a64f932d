"""The Hugging Face hub: models and data sets at a known commit, and what to do where they cannot be had.

The token is read from the environment variable HF_TOKEN and from nowhere else. Knows nothing of the recipe.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from foggen.config import Settings, SettingsError
from foggen.store import ROOT

Kind = Literal["model", "dataset"]
FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]  # weights as safetensors only, no code


class HubError(SettingsError):
    """A model or data set that cannot be had from the hub; the message says what to do."""


def token() -> str | bool:
    """The reader's token; False keeps huggingface_hub from looking for one elsewhere."""
    return os.environ.get("HF_TOKEN") or False


def advice(error: BaseException, name: str, kind: Kind, revision: str | None) -> str | None:
    """What to do about an error of the hub's libraries, whatever they wrapped it in; None where it is another."""
    import httpx
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    own = "give a folder or file of your own in the profile"
    signed = bool(token())
    known: list[tuple[Any, str]] = [
        (
            errors.GatedRepoError,
            f"it is gated. Ask for access at {page}"
            + (" with the account of your HF_TOKEN" if signed else ", then set the environment variable HF_TOKEN"),
        ),
        (
            errors.RevisionNotFoundError,
            f"it has no revision {revision!r}. See {page}/commits/main, or set the revision to null for the newest",
        ),
        (
            errors.RepositoryNotFoundError,
            f"there is no such {kind}, or it is private. See {page}; "
            + ("is it open to the account of your HF_TOKEN?" if signed else "private ones need HF_TOKEN set"),
        ),
        (
            (
                errors.OfflineModeIsEnabled,
                errors.LocalEntryNotFoundError,
                httpx.TransportError,
                ConnectionError,
            ),
            "the hub cannot be reached, and there is no copy in this machine's cache. Run once with a connection "
            f"(and without HF_HUB_OFFLINE), or {own}",
        ),
    ]
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno == errno.ENOSPC:
            return "the disk is full. Free some space, or set HF_HOME to a folder on a larger disk"
        for kinds, text in known:
            if isinstance(seen, kinds):
                return text
        seen = seen.__cause__ or seen.__context__
    if type(error).__name__ == "DatasetNotFoundError":
        return f"there is no such data set, or it is private or gated. See {page}, or {own}"
    return None


@contextmanager
def explained(name: str, kind: Kind, revision: str | None = None) -> Iterator[None]:
    """Turns the errors of the hub's libraries inside the block into a HubError that says what to do."""
    try:
        yield
    except Exception as error:
        if text := advice(error, name, kind, revision):
            raise HubError(f"{kind} {name}: {text}.") from error
        raise


def is_local(name: str) -> bool:
    """Whether a name is a file or folder of this checkout or machine."""
    return (ROOT / name).exists()


def cached(name: str, kind: Kind, revision: str | None = None) -> Path | None:
    """The folder of the newest or the named revision in this machine's cache; asks no hub."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    newest = folder / "refs" / "main"
    commit = revision or (newest.read_text().strip() if newest.exists() else "")
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


def download(name: str, revision: str | None = None) -> Path:
    """A model's folder in this machine's cache, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download

    with explained(name, "model", revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES, token=token()))


def commit(name: str, kind: Kind) -> str | None:
    """The commit that is the newest now; without a connection that of the cached copy, if there is one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with explained(name, kind):
            return cast(str, HfApi(token=token()).repo_info(name, repo_type=kind).sha)
    except HubError as error:
        if not isinstance(error.__cause__, OfflineModeIsEnabled | ConnectionError):
            raise
        folder = cached(name, kind)
        return folder.name if folder else None


def pin(settings: Settings, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Overrides that fix the revisions a profile leaves open: as `before` (the run's earlier settings), else now."""
    old: Any = before or {"edge": {}, "cloud": {}, "data": {"sources": []}}

    def newest(name: str, kind: Kind, past: Mapping[str, Any]) -> str | None:
        return past.get("revision") or commit(name, kind)

    pins: dict[str, Any] = {}
    models = {"edge": settings.edge} | ({"cloud": settings.cloud} if settings.cloud.engine != "openai" else {})
    for part, model in models.items():
        if not model.revision and not is_local(model.model):
            same = old[part] if old[part].get("model") == model.model else {}
            pins[f"{part}.revision"] = newest(model.model, "model", same)
    sources = [source.model_dump() for source in settings.data.sources]
    for source in sources:
        if not source["revision"] and not is_local(source["path"]):
            same = next((one for one in old["data"].get("sources", []) if one["path"] == source["path"]), {})
            source["revision"] = newest(source["path"], "dataset", same)
    if sources != [source.model_dump() for source in settings.data.sources]:
        pins["data.sources"] = sources
    return pins
