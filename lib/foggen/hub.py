"""The Hugging Face hub: models and data sets at a known commit, and what to do where they cannot be had.

The token is read from the environment variable HF_TOKEN and from nowhere else. Knows nothing of the recipe.
`python -m foggen.hub FOLDER NAME/REPOSITORY` uploads a checkpoint, after asking: FOLDER is a round's `model` or
`adapter` under `runs/<run>/stages/r14-sft-*/`, and HF_TOKEN holds a token that may write.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import HfApi, errors, snapshot_download

from foggen.config import Settings, SettingsError
from foggen.store import ROOT

Kind = Literal["model", "dataset"]
FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]  # weights as safetensors only, no code
UNREACHABLE = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, httpx2.TransportError, ConnectionError)


class HubError(SettingsError):
    """A model or data set that cannot be had from the hub; the message says what to do."""


def token() -> str | bool:
    """The reader's token; False keeps huggingface_hub from looking for one elsewhere."""
    return os.environ.get("HF_TOKEN") or False


def advice(error: BaseException, name: str, kind: Kind, revision: str | None) -> str | None:
    """What to do about an error of the hub's libraries, whatever they wrapped it in; None where it is another."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    own = "give a folder or file of your own in the profile"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full. Free some space, or set HF_HOME to a folder on a larger disk"
    if isinstance(error, errors.GatedRepoError):
        how = " with the account of your HF_TOKEN" if token() else ", then set the environment variable HF_TOKEN"
        return f"it is gated. Ask for access at {page}{how}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}. See {page}/commits/main, or set the revision to null for the newest"
    if isinstance(error, errors.RepositoryNotFoundError):
        how = "is it open to the account of your HF_TOKEN?" if token() else "private ones need HF_TOKEN set"
        return f"there is no such {kind}, or it is private. See {page}; {how}"
    if isinstance(error, UNREACHABLE):
        once = "Run once with a connection (and without HF_HUB_OFFLINE)"
        return f"the hub cannot be reached, and there is no copy in this machine's cache. {once}, or {own}"
    if cause := error.__cause__ or error.__context__:
        return advice(cause, name, kind, revision)
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
    wanted = FILES if kind == "model" else None
    try:
        folder = snapshot_download(
            name, repo_type=kind, revision=revision, allow_patterns=wanted, local_files_only=True
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    return Path(folder)


def download(name: str, revision: str | None = None) -> Path:
    """A model's folder in this machine's cache, downloaded where it is not there yet."""
    with explained(name, "model", revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES, token=token()))


def commit(name: str, kind: Kind) -> str | None:
    """The commit that is the newest now; without a connection that of the cached copy, if there is one."""
    try:
        with explained(name, kind):
            return HfApi(token=token()).repo_info(name, repo_type=kind).sha
    except HubError as error:
        if not isinstance(error.__cause__, UNREACHABLE):
            raise
    folder = cached(name, kind)
    return folder.name if folder else None


def pin(settings: Settings, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Overrides that fix the revisions a profile leaves open: as `before` (the run's earlier settings), else now."""
    known = _revisions(before) if before else {}
    pins: dict[str, Any] = {}
    for (name, model), revision in _revisions(settings.model_dump()).items():
        asked = name != "cloud.revision" or settings.cloud.engine != "openai"
        if model and asked and not revision and not is_local(model):
            pins[name] = known.get((name, model)) or commit(model, "model")
    sources = [source.model_dump() for source in settings.data.sources]
    earlier = {one["path"]: one["revision"] for one in before["data"]["sources"]} if before else {}
    for source in sources:
        if not source["revision"] and not is_local(source["path"]):
            pins["data.sources"] = sources
            source["revision"] = earlier.get(source["path"]) or commit(source["path"], "dataset")
    return pins


def _revisions(settings: Mapping[str, Any]) -> dict[tuple[str, str | None], str | None]:
    """The revision of each model, by the setting's name and the model."""
    parts = {"edge": "", "cloud": "", "open_ended": "r15_"}
    return {
        (f"{part}.{kind}revision", settings[part][f"{kind}model"]): settings[part].get(f"{kind}revision")
        for part, kind in parts.items()
    }


def push(folder: Path, repository: str, ask: Callable[[str], str] = input) -> bool:
    """Shows what would be uploaded, and does it if the answer is yes; a new repository is private. Raises HubError."""
    if not token():
        raise HubError("set the environment variable HF_TOKEN to a token that may write")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not any(file.suffix == ".safetensors" for file in files):
        raise HubError(f"{folder}: no checkpoint; expected a folder with .safetensors")
    size = sum(file.stat().st_size for file in files) / 2**20
    print("\n".join(f"  {file.relative_to(folder)}" for file in files))
    if ask(f"Upload these {len(files)} files, {size:.1f} MiB, to huggingface.co/{repository}? [yes/no] ") != "yes":
        print("nothing was uploaded")
        return False
    api = HfApi(token=token())
    with explained(repository, "model"):
        api.create_repo(repository, private=True, exist_ok=True)
        print(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="FogGen checkpoint"))
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m foggen.hub", description="Uploads a checkpoint, after asking.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("repository", help="name/repository")
    given = parser.parse_args(argv)
    try:
        push(given.folder, given.repository)
    except HubError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
