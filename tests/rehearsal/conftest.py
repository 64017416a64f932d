"""The hub of the rehearsal, and programs that see no other."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from foggen.store import LOCK_VARIABLE, ROOT, RUN_VARIABLE, content_hash, digest

sys.path.append(str(Path(__file__).parent))
import repositories
from hub import Fault, Hub, Program

PLACE = ROOT / "build" / "rehearsal"  # `make clean` removes it
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of it takes minutes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def contents() -> Path:
    """The hub's folder, made once for what it is made of."""
    made_of = [Path(repositories.__file__), ROOT / "tests" / "tiny.py", repositories.BANK]
    folder = PLACE / f"hub-{digest([content_hash(path) for path in made_of])[:12]}"
    if not folder.exists():
        PLACE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=PLACE) as scratch:
            made = Path(scratch) / "hub"
            note = repositories.fill(made, PLACE / "npm")
            (made / "tokenizer.txt").write_text(note)
            with suppress(OSError):  # another session was faster
                made.rename(folder)
    return folder


@pytest.fixture(scope="session")
def serving(contents: Path) -> Iterator[Hub]:
    with Hub(contents).open() as hub:
        yield hub


@pytest.fixture
def hub(serving: Hub) -> Hub:
    """The hub without a fault, open to all, and with no requests yet."""
    serving.fault, serving.gated = Fault(times=0), {}
    serving.requests.clear()
    return serving


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the whole rehearsal keeps its downloads."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def program(serving: Hub) -> Program:
    """Runs `python ARGUMENTS` in the checkout, with downloads in the folder `home`."""

    def run(
        home: Path, *arguments: str, python: str = sys.executable, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        hidden = (*TOKENS, RUN_VARIABLE, LOCK_VARIABLE)
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= serving.environment(home) | {"OMP_NUM_THREADS": "1"} | variables
        command = [python, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    return run
