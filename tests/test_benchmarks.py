"""The benchmarks at toy size on a CPU: all is measured, and prompts have the recipe's lengths."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from foggen.prompts import encode_chat, mcq_messages
from foggen.questions import DOMAINS
from foggen.store import ROOT, read_json

sys.path.append(str(ROOT / "tests" / "benchmarks"))

import cpu
import dimensions
import gpu


def test_prompts_have_the_recipes_lengths() -> None:
    questions = gpu.make_questions(400, DOMAINS)
    tokenizer = AutoTokenizer.from_pretrained(gpu.TOKENIZER)
    lengths = [len(encode_chat(tokenizer, mcq_messages(question))) for question in questions]
    low, high = gpu.PROMPTS
    assert low - 10 <= min(lengths) and max(lengths) <= high + 60
    assert 130 < sum(lengths) / len(lengths) < 170
    assert len({question.id for question in questions}) == 400
    assert {question.domain for question in questions} == set(DOMAINS)


def test_toy_run_measures_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--toy", "--engine", "transformers", "--out", str(tmp_path)])
    result = read_json(tmp_path / "toy-transformers.json")
    rows = result["results"]
    assert list(rows) == list(gpu.GOALS) and result["share_of_rows"] < 0.1
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in rows.values())
    padded, free = (rows[name] for name in ("SFT round", "SFT round, padding-free"))
    assert padded["loss"] == pytest.approx(free["loss"], abs=1e-3)
    assert padded["tokens"] == free["tokens"] and 0 < padded["mfu"] < 2
    out = capsys.readouterr().out
    assert "| SFT round | 8 |" in out and "49 s on 4 H100" in out


def test_the_page_shows_the_stored_ratios() -> None:
    assert cpu.stored_table() in cpu.SPEED.read_text(), "make bench writes them"


def test_the_page_shows_the_stored_steps_of_true_dimensions() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert dimensions.stored_table() in page, "dimensions.py writes what it shows"


def test_no_step_copies_the_weights_thrice_or_grows_faster_than_its_tokens() -> None:
    stored = read_json(dimensions.STORED)
    for dtype in dimensions.STEPS:
        steps = {(row["step"], row["rows"]): row for row in stored[dtype]["steps"]}
        assert all(row["copies"] < 3 for (_, rows), row in steps.items() if rows == 0)
        for (step, rows), row in steps.items():
            if twice := steps.get((step, 2 * rows)) if rows else None:
                longer = twice["prompt_tokens"] / row["prompt_tokens"]
                assert twice["seconds"] / row["seconds"] < 1.5 * longer


def test_ways_are_compared(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cpu, "VLLM_PYTHON", tmp_path / "none")
    where = ["--model", str(tiny_model), "--out", str(tmp_path)]
    cpu.main([*where, "--questions", "4", "--repeats", "1"])
    result = read_json(tmp_path / f"{tiny_model.name}.json")
    ours = [name for name in cpu.COMPARISONS if "vllm" not in name]
    assert [row["compared"] for row in result["rows"] if row["ratio"] > 0] == ours
    assert 0 < result["utilisation"]["ours"]["mfu"] < 1
    assert result["machine"]["dtype"] == "float32"
    assert "num_return_sequences" in capsys.readouterr().out
