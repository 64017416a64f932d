"""Uploads a checkpoint to the hub, after asking: `python -m foggen.push FOLDER NAME/REPOSITORY`.

FOLDER is a round's `model` or `adapter` under `runs/<run>/stages/r14-sft-*/`. HF_TOKEN holds a token that may write.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from foggen import hub


def push(folder: Path, repository: str, ask: Callable[[str], str] = input) -> bool:
    """Shows what would be uploaded, and does it if the answer is yes; a new repository is private. Raises HubError."""
    from huggingface_hub import HfApi

    if not hub.token():
        raise hub.HubError("set the environment variable HF_TOKEN to a token that may write")
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    if not any(file.suffix == ".safetensors" for file in files):
        raise hub.HubError(f"{folder}: no checkpoint; expected a folder with .safetensors")
    size = sum(file.stat().st_size for file in files) / 2**20
    print("\n".join(f"  {file.name}" for file in files))
    if ask(f"Upload these {len(files)} files, {size:.1f} MiB, to huggingface.co/{repository}? [yes/no] ") != "yes":
        print("nothing was uploaded")
        return False
    api = HfApi(token=hub.token())
    with hub.explained(repository, "model"):
        api.create_repo(repository, private=True, exist_ok=True)
        print(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="FogGen checkpoint"))
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m foggen.push", description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("repository", help="name/repository")
    given = parser.parse_args(argv)
    try:
        push(given.folder, given.repository)
    except hub.HubError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
