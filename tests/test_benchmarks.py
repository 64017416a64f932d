"""The benchmarks at toy size on a CPU: everything is measured, and the GPU's prompts have the recipe's lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks import cpu, gpu
from transformers import AutoTokenizer

from foggen.prompts import encode_chat, mcq_messages
from foggen.questions import DOMAINS
from foggen.store import read_json


def test_prompts_have_the_recipes_lengths() -> None:
    questions = gpu.make_questions(400, DOMAINS)
    tokenizer = AutoTokenizer.from_pretrained(gpu.TOKENIZER)
    lengths = [len(encode_chat(tokenizer, mcq_messages(one))) for one in questions]
    low, high = gpu.PROMPTS
    assert low - 10 <= min(lengths) and max(lengths) <= high + 60 and 130 < sum(lengths) / len(lengths) < 170
    assert len({one.id for one in questions}) == 400 and {one.domain for one in questions} == set(DOMAINS)


def test_toy_run_measures_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--toy", "--engine", "transformers", "--out", str(tmp_path)])
    found = read_json(tmp_path / "toy-transformers.json")
    assert list(found["results"]) == list(gpu.GOALS) and found["share_of_rows"] < 0.1
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in found["results"].values())
    padded, packed = (found["results"][name] for name in ("SFT round", "SFT round, packed"))
    assert padded["loss"] == pytest.approx(packed["loss"], abs=1e-3) and padded["tokens"] == packed["tokens"]
    assert 0 < padded["mfu"] < 2
    out = capsys.readouterr().out
    assert "| SFT round | 8 |" in out and "49 s on 4 H100" in out


def test_the_readme_has_the_stored_ratios() -> None:
    assert cpu.readme_table() in (cpu.ROOT / "README.md").read_text(), "make bench writes them"


def test_engines_are_compared(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "VLLM_PYTHON", tmp_path / "none")
    where = ["--model", str(tiny_model), "--out", str(tmp_path)]
    cpu.main([*where, "--questions", "4", "--repeats", "1"])
    found = read_json(tmp_path / f"{tiny_model.name}.json")
    assert [row["ratio"] > 0 for row in found["rows"]] == [True] * 7
    assert 0 < found["utilisation"]["ours"]["mfu"] < 1 and found["machine"]["dtype"] == "float32"
    assert "num_return_sequences" in capsys.readouterr().out
