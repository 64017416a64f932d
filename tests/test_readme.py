"""The README: its tables are the stored results, and its commands run as written."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import roc_auc_score
from test_repository import cells, tracked

from foggen import reproduce
from foggen.config import PROFILES
from foggen.store import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = [
    README,
    *(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))),
]
BLOCKS = [
    text for guide in GUIDES for text in re.findall(r"```sh\n(.*?)```", guide, flags=re.DOTALL)
]


def block(mark: str) -> str:
    (found,) = [text for text in BLOCKS if mark in text]
    return found


# ---- what it shows


def markdown_outputs(notebook: str) -> list[str]:
    """The Markdown that a notebook's cells display."""
    outputs = [
        part.get("data", {}).get("text/markdown", "")
        for cell in cells(ROOT / "notebooks" / notebook)
        for part in cell.get("outputs", [])
    ]
    return ["".join(text) for text in outputs if text]


def test_the_claims_are_what_the_notebook_of_controls_computed() -> None:
    shown = re.search(
        r"<!-- claims: begin -->\n(.*?)\n<!-- claims: end -->", README, flags=re.DOTALL
    )
    assert shown and shown[1].strip() in [
        text.strip() for text in markdown_outputs("06_controls.ipynb")
    ]


def test_the_claims_follow_from_the_stored_outcomes() -> None:
    """AUROC and lift by other means: scikit-learn, and a loop over domains and seeds."""
    outcomes = pd.read_parquet(ROOT / "data" / "results" / "pocket" / "outcomes.parquet")
    for variant, score in (("foggen", "confidence"), ("R0", "option_probability")):
        rows = outcomes[outcomes["variant"] == variant]
        parts = [
            roc_auc_score(part["local_correct"], part[score].fillna(-1))
            for _, part in rows.groupby(["seed", "domain"])
        ]
        claim = f"AUROC {np.mean(parts):.2f} ["
        assert claim in README, claim


def test_it_is_short_and_names_every_notebook_and_module() -> None:
    assert len(README.split()) < 1200
    for notebook in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        first = "".join(cells(notebook)[0]["source"])
        question = re.search(r"\*\*(.+?)\*\*", first, flags=re.DOTALL)
        cost = re.search(r"`pocket`: (\d+ s), ([\d.]+ GiB)", first)
        assert question and cost, notebook.name
        row = (
            f"[{notebook.stem}](notebooks/{notebook.name})",
            " ".join(question[1].split()),
            cost[1],
            cost[2],
        )
        assert " | ".join(row) in README, notebook.name
    table = (ROOT / "docs" / "library.md").read_text(encoding="utf-8").split("|---|---|")[1]
    named = re.findall(
        r"`([a-z_]+/?)`", "\n".join(re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE))
    )
    package = ROOT / "lib" / "foggen"
    modules = [file.stem for file in package.glob("[!_]*.py")]
    assert sorted(named) == sorted([*modules, "engines/", "profiles/"])


def test_every_profile_and_every_reading_of_ours_is_listed() -> None:
    guide = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    readings = (ROOT / "docs" / "readings.md").read_text(encoding="utf-8")
    assert not [file.stem for file in PROFILES.glob("*.yaml") if f"`{file.stem}`" not in guide]
    lines = (PROFILES / "paper.yaml").read_text(encoding="utf-8").splitlines()
    ours = [
        line.split(":")[0].strip() for line in lines if "[ours" in line and line.strip()[0] != "#"
    ]
    assert len(ours) > 8
    assert not [name for name in ours if f"`{name}`" not in readings]


# ---- what it tells to run


def commands() -> list[str]:
    """Every command line of the README, without comments and what is fed to it."""
    text = re.sub(
        r"<<'END'.*?^END$", "", "\n".join(BLOCKS), flags=re.DOTALL | re.MULTILINE
    ).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The checkout's files in a folder of their own, as a fresh clone has them."""
    for file in filter(Path.is_file, tracked("")):
        target = tmp_path / "clone" / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (tmp_path / "clone" / ".venv").symlink_to(sys.prefix)
    return tmp_path / "clone"


def shell(script: str, clone: Path, **variables: str) -> str:
    """Runs a script at the root of a clone that is set up; returns what it printed."""
    ready = 'make() { command make -o .venv/.pinned "$@"; }\nset -e\n'
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("FOGGEN", "MAKE"))
    }
    environment |= {"PYTHONPATH": str(clone / "lib"), **variables}
    done = subprocess.run(
        ["bash", "-c", ready + script], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_every_target_and_parameter_is_known(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)  # restores the working directory, which the runner changes
    made = [line for line in commands() if line.startswith("make")]
    assert len(made) > 9
    for line in made:
        printed = shell(f"{line} -n", clone).strip()
        assert printed, line
        if "-m foggen.reproduce" in printed:  # its parameters are read, and nothing is run
            options = shlex.split(printed.split("foggen.reproduce")[1])
            assert reproduce.main([*options, "--list", "--run", str(tmp_path / "run")]) == 0, line
    assert "rounds = 2" in capsys.readouterr().out


@pytest.mark.slow
def test_a_report_on_ones_own_outcomes(clone: Path) -> None:
    shell(block("cat > outcomes.csv"), clone)
    assert (clone / "runs/report/07_your_outcomes.html").stat().st_size > 10_000


@pytest.mark.slow
def test_ones_own_questions(clone: Path) -> None:
    printed = shell(block("QUESTIONS=mine.jsonl"), clone)
    assert "00_quickstart" in printed and "tau 0.5" in printed
    assert (
        json.loads((clone / "runs/mine/done/00_quickstart.json").read_text())["results"]["n"] == 2
    )


@pytest.mark.slow
def test_ones_own_model(clone: Path) -> None:
    shell(block("models/mine"), clone)
    done = json.loads((clone / "runs/model/done/02_rounds.json").read_text())
    assert done["results"]["edge"] == "models/mine" and done["results"]["rounds"] == 2


class Cloud(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that always says B, and wants a key."""

    asked: int = 0

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = body["model"] == "NAME" and self.headers["Authorization"] == "Bearer none"
        Cloud.asked += known
        choice = {
            "message": {"role": "assistant", "content": "Confidence: 1.0\nFinal answer: B"},
            "finish_reason": "stop",
        }
        data = json.dumps(
            {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 9}}
        ).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Cloud) as server:
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.mark.slow
def test_ones_own_cloud(clone: Path, address: str) -> None:
    shell(block("MY_KEY").replace("http://localhost:8000/v1", address), clone)
    assert Cloud.asked > 280 and (clone / "runs/cloud/done/00_quickstart.json").exists()


@pytest.mark.slow
def test_the_quick_start_takes_a_model_from_the_hub(clone: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--issai--foggen" / "snapshots" / ("0" * 40)
    shutil.copytree(ROOT / "data" / "pocket" / "foggen-r14", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    code = "".join(
        "".join(one["source"]) for one in cells(ROOT / "notebooks" / "00_quickstart.ipynb")
    )
    (given,) = re.findall(r'overrides = (\{"edge.model": "issai/foggen"[^}]*\})', code)
    options = " ".join(f"-p {name}={value}" for name, value in yaml.safe_load(given).items())
    script = f'make reproduce RUN=runs/hub ARGS="--only 00 {options}"'
    shell(script, clone, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert (clone / "runs/hub/done/00_quickstart.json").exists()
