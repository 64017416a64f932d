"""The paper profile from beginning to end: only its sizes, engine and dtype are overridden.

First by the library alone, then by the notebooks in the same run folder, which so find most stages
finished; and by the library once more with vLLM, where that is installed.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, Program
from repositories import LAYOUTS, OTHER, PAPER

from foggen.store import ROOT, read_json

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
VLLM = ROOT / ".venv-vllm"
ROUNDS = 2
SIZES = f"""
rounds={ROUNDS} calibration_rows=14 new_rows=6 replay_rows=8 samples=2 max_new_tokens=16
dev_questions=7 test_questions=14 sft.per_device_train_batch_size=4 sft.num_train_epochs=1
open_ended.eval_questions=2
open_ended.max_new_tokens.squad=12 open_ended.max_new_tokens.truthfulqa=12
open_ended.max_new_tokens.gsm8k=12 open_ended.r15.squad=2 open_ended.r15.truthfulqa=2
open_ended.r15.gsm8k=2 open_ended.r15.replay=4 automix.k=2 automix.max_new_tokens=8
threads=1 dtype=auto
""".split()
ENGINES = {
    "transformers": [
        *("engine=transformers", "engine_options={}"),
        *("cloud.engine=transformers", "cloud.options={}"),
    ],
    "vllm": [
        "engine_options={max_model_len: 1024, enforce_eager: true}",
        "cloud.options={max_model_len: 1024, enforce_eager: true}",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "paper"


def check(found: dict[str, Any]) -> None:
    """What a whole run of the profile leaves, whatever the models say."""
    # Labels: the buffer and every round's new rows, with the letters of the cloud
    rounds = found["rounds"]
    assert [row["domain"] for row in rounds] == [None, *PAPER.domains[:ROUNDS]]
    labels = [sum(row[name] for name in row if name.startswith("labels ")) for row in rounds]
    assert 10 <= labels[0] <= 14 and all(4 <= count <= 6 for count in labels[1:])
    assert all(row["cloud wrong"] > 0 for row in rounds)  # it guesses
    # Training: new and replayed rows, none too long, and a checkpoint of its own
    for row, new in list(zip(rounds, labels, strict=True))[1:]:
        assert row["sft rows"] == new + 8 and row["sft too_long"] == 0
        assert row["sft steps"] == math.ceil(row["sft rows"] / 4) and row["sft loss"] > 0
    assert len(set(found["models"])) == ROUNDS + 2
    assert all(row["parsed"] > 0.5 for row in rounds)
    # Outcomes: 14 questions of seven domains, with every score
    table = found["outcomes"]
    assert len(table) == 14 and {row["domain"] for row in table} == set(PAPER.domains)
    for row in table:
        assert 0 <= row["expected_confidence"] <= 1 and 0 < row["option_probability"] <= 1
        assert len(row["votes"]) == 2 and 0 <= row["verification"] <= 1
        assert row["cloud_failed"] == 0
    assert {row["domain"] for row in found["routing"]} >= set(PAPER.domains)
    # The branch: new and replayed rows; two texts per task
    assert found["r15"]["old"] == 4 and found["r15"]["sft"]["rows"] == found["r15"]["new"] + 4
    tasks = [row["domain"] if "domain" in row else row["task"] for row in found["open"]]
    assert sorted(tasks) == ["gsm8k"] * 2 + ["squad"] * 2 + ["truthfulqa"] * 2


def run_paper(program: Program, home: Path, folder: Path, engine: str) -> dict[str, Any]:
    python: dict[str, str] = {}
    packages: list[str] = []
    if engine == "vllm":
        python = {"python": str(VLLM / "bin" / "python"), "PYTHONPATH": str(ROOT / "lib")}
        packages = [
            "--packages",
            str(next((ROOT / ".venv" / "lib").glob("python3*/site-packages"))),
        ]
    script = str(Path(__file__).with_name("paper.py"))
    arguments = [script, *packages, str(folder), *SIZES, *ENGINES[engine]]
    done = program(home, *arguments, **python)
    assert done.returncode == 0, done.stderr[-5000:]
    return dict(json.loads(done.stdout.strip().split("\n")[-1]))


def test_the_library(hub: Hub, program: Program, home: Path, folder: Path, contents: Path) -> None:
    warnings.warn(f"rehearsed with {(contents / 'tokenizer.txt').read_text()}", stacklevel=1)
    found = run_paper(program, home, folder, "transformers")
    check(found)
    # What was open is now fixed; what was pinned came in that revision, and no pickles or code did
    assert found["sources"] == [LAYOUTS["configs"], OTHER]
    files = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    for model in (PAPER.edge, PAPER.cloud):
        got = [path for path in files if path.startswith(f"/{model.model}/")]
        assert got and all(f"/resolve/{model.revision}/" in path for path in got)
    assert not [path for path in files if path.endswith((".bin", ".py", ".pt"))]
    assert len(files) == len(set(files)), "something was downloaded twice"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook(hub: Hub, program: Program, home: Path, folder: Path, notebook: Path) -> None:
    parameters = [word for value in [*SIZES, *ENGINES["transformers"]] for word in ("-p", value)]
    command = ["--profile", "paper", "--run", str(folder), "--only", notebook.stem[:2]]
    done = program(home, "-m", "foggen.reproduce", *command, *parameters)
    assert done.returncode == 0, done.stderr[-5000:]
    assert read_json(folder / "done" / f"{notebook.stem}.json")["headline"] in done.stdout


@pytest.mark.skipif(not (VLLM / ".ready").exists(), reason="no .venv-vllm: make test-vllm makes it")
def test_vllm(hub: Hub, program: Program, home: Path, tmp_path: Path) -> None:
    check(run_paper(program, home, tmp_path / "run", "vllm"))
