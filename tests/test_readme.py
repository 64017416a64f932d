"""The README says what is so: its tables are the stored results, and its commands run as written."""

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
import pytest
import yaml
from test_repository import cells, tracked

from foggen import plots, reproduce, study
from foggen.config import PROFILES
from foggen.store import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)


def block(mark: str) -> str:
    (found,) = [text for text in BLOCKS if mark in text]
    return found


# ---- what it shows


def test_the_result_table_is_the_stored_study() -> None:
    shown = re.search(r"<!-- results: begin -->\n(.*?)\n<!-- results: end -->", README, flags=re.DOTALL)
    table = study.readme_table(study.load_results("pocket")["summary"], "pocket")
    assert shown and shown.group(1) == table, "run: python -c 'from foggen import study; study.update_readme()'"


def test_its_figure_is_drawn_from_the_stored_study(tmp_path: Path) -> None:
    assert "(figures/02_study.png)" in README
    plots.style()
    plots.save(plots.variant_points(study.load_results("pocket")["summary"]), tmp_path, "02_study")
    drawn, kept = (plots.plt.imread(folder / "02_study.png") for folder in (tmp_path, ROOT / "figures"))
    apart = float(np.abs(drawn - kept).mean()) if drawn.shape == kept.shape else 1.0
    assert apart < 0.002, "run notebook 02 and publish its figures"


def test_the_map_of_notebooks_agrees_with_what_they_say_of_themselves() -> None:
    notebooks = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    for notebook in notebooks:
        first = "".join(cells(notebook)[0]["source"])
        question, cost = (
            re.search(r"\*\*(.+?)\*\*", first, flags=re.DOTALL),
            re.search(r"`pocket`: (\d+ s), ([\d.]+ GiB)", first),
        )
        assert question and cost, notebook.name
        row = (
            f"[{notebook.stem}](notebooks/{notebook.name})",
            " ".join(question[1].split()),
            cost[1],
            cost[2],
        )
        assert " | ".join(row) in README


def test_the_table_of_modules_names_each_once() -> None:
    named = re.findall(r"^\| `([a-z_]+/?)` \|", README.split("\n## What is where\n")[1], flags=re.MULTILINE)
    package = ROOT / "lib" / "foggen"
    assert sorted(named) == sorted([file.stem for file in package.glob("[!_]*.py")] + ["engines/", "profiles/"])


def test_every_profile_and_every_reading_of_ours_is_listed() -> None:
    for profile in PROFILES.glob("*.yaml"):
        assert f"\n| `{profile.stem}`" in README, profile.name
    lines = (PROFILES / "paper.yaml").read_text(encoding="utf-8").splitlines()
    ours = [line.split(":")[0].strip() for line in lines if "[ours" in line and not line.startswith("#")]
    assert len(ours) > 8
    assert not [name for name in ours if f"`{name}`" not in README]


# ---- what it tells to run


def commands() -> list[str]:
    """Every command line of the README, without comments and what is fed to it."""
    text = re.sub(r"<<'END'.*?^END$", "", "\n".join(BLOCKS), flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
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
    """Runs a script at the root of a clone whose environment is set up already; returns what it printed."""
    ready = 'make() { command make -o .venv/.pinned "$@"; }\nset -e\n'
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FOGGEN", "MAKE"))}
    environment |= {"PYTHONPATH": str(clone / "lib"), **variables}
    done = subprocess.run(["bash", "-c", ready + script], cwd=clone, env=environment, capture_output=True, text=True)
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
    assert "rounds = 2  (" in capsys.readouterr().out


def test_a_report_on_ones_own_outcomes(clone: Path) -> None:
    shell(block("foggen.report"), clone)
    assert "4 questions in 2 domains" in (clone / "report" / "index.html").read_text()


@pytest.mark.slow
def test_ones_own_questions(clone: Path) -> None:
    printed = shell(block("QUESTIONS=mine.jsonl"), clone)
    assert "00_quickstart" in printed and "tau 0.5" in printed
    assert json.loads((clone / "runs/mine/done/00_quickstart.json").read_text())["results"]["n"] == 2


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
        data = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 9}}).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Cloud) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
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
    code = "".join("".join(one["source"]) for one in cells(ROOT / "notebooks" / "00_quickstart.ipynb"))
    (given,) = re.findall(r'overrides = (\{"edge.model": "issai/foggen"[^}]*\})', code)
    options = " ".join(f"-p {name}={value}" for name, value in yaml.safe_load(given).items())
    script = f'make reproduce RUN=runs/hub ARGS="--only 00 {options}"'
    shell(script, clone, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert (clone / "runs/hub/done/00_quickstart.json").exists()
