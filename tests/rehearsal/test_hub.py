"""What the hub gives, and what is said of what it does not give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import repositories
from hub import Fault, Hub, Program
from repositories import GEMMA, LAYOUTS, OTHER, PAPER

NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
DOWNLOAD = """
import sys, time
time.sleep = lambda seconds: None  # between attempts
from foggen.inputs import HubError, model_folder
try:
    print("OK", model_folder(sys.argv[1], sys.argv[2]))
except HubError as error:
    print(error)
"""
EDGE = (PAPER.edge.model, str(PAPER.edge.revision))
GATED = (GEMMA.model, str(GEMMA.revision))
TOKEN = "hf_rehearsal"


def download(program: Program, home: Path, name: str, revision: str, **variables: str) -> str:
    done = program(home, "-c", DOWNLOAD, name, revision, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("wanted", "fault", "token", "reason"),
    [
        (GATED, Fault(times=0), "hf_wrong", "Cannot access gated repo"),
        (EDGE, Fault(503, "/resolve/"), "", "503 Service Unavailable"),
        (EDGE, Fault(None, "safetensors"), "", "peer closed connection"),
    ],
    ids=["wrong token", "503", "cut body"],
)
def test_what_the_libraries_wrap_is_told(
    hub: Hub,
    program: Program,
    tmp_path: Path,
    wanted: tuple[str, str],
    fault: Fault,
    token: str,
    reason: str,
) -> None:
    """The hub's other answers: tests/test_inputs.py."""
    hub.gated, hub.fault = {GEMMA.model: TOKEN}, Fault(**vars(fault))
    told = download(program, tmp_path, *wanted, **({"HF_TOKEN": token} if token else {}))
    assert told.startswith(f"model {wanted[0]} ({wanted[1]}): ") and reason in told, told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    "fault", [Fault(429, times=2), Fault(503, times=2), Fault(None, "tensors", 1)]
)
def test_what_passes_is_tried_again(
    hub: Hub, program: Program, contents: Path, tmp_path: Path, fault: Fault
) -> None:
    hub.fault = Fault(**vars(fault))
    found = download(program, tmp_path, *EDGE)
    assert found.startswith("OK") and hub.fault.times == 0
    weights = Path(found.split()[1]) / "model.safetensors"
    original = contents / "models" / EDGE[0] / EDGE[1] / "model.safetensors"
    assert weights.read_bytes() == original.read_bytes()


def test_a_token_opens_what_is_gated_and_a_cache_needs_no_hub(
    hub: Hub, program: Program, tmp_path: Path
) -> None:
    hub.gated = {GEMMA.model: TOKEN}
    assert download(program, tmp_path, *GATED, HF_TOKEN=TOKEN).startswith("OK")
    for away in (NOWHERE, OFFLINE):
        assert download(program, tmp_path, *GATED, **away).startswith("OK")


COUNT = """
import json, sys
from collections import Counter
from foggen.config import load_profile
from foggen.questions import splits
found = {}
for commit in sys.argv[1:]:
    sources = load_profile("paper").model_dump()["data"]["sources"]
    sources[0]["revision"] = commit
    parts = splits(load_profile("paper", {"data.sources": sources}))
    found[commit] = {name: Counter(q.domain for q in part) for name, part in parts.items()}
print(json.dumps(found))
"""


def test_every_layout_gives_the_seven_domains(hub: Hub, program: Program, home: Path) -> None:
    done = program(home, "-c", COUNT, *LAYOUTS.values())
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for layout, commit in LAYOUTS.items():
        parts = found[commit]
        assert list(parts) == ["train", "dev", "test"], layout
        assert all(set(part) == set(PAPER.domains) for part in parts.values()), layout
    # Where a set has its own test split, these are the test questions, whatever the layout
    assert found[LAYOUTS["configs"]]["test"] == found[LAYOUTS["splits"]]["test"]


def test_the_libraries_themselves_read_it(hub: Hub, program: Program, home: Path) -> None:
    code = f"""
from datasets import load_dataset
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({EDGE[0]!r}, revision={EDGE[1]!r})
print(tokenizer.decode(tokenizer("Confidence: 0.5").input_ids))
print(len(load_dataset("issai/KazCulture", revision={OTHER!r})["train"]))
"""
    done = program(home, "-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    kazakh = [q for part in ("train", "dev", "test") for q in repositories.load_questions(
        repositories.BANK / f"{part}.jsonl") if not repositories.is_english(q)]  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["Confidence: 0.5", str(len(kazakh))]
