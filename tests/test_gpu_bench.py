"""The GPU benchmark at toy size on a CPU: every step is measured, and the prompts have the recipe's lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from foggen.gpu_bench import GOALS, PROMPTS, TOKENIZER, main, make_questions
from foggen.prompts import encode_chat, mcq_messages
from foggen.questions import DOMAINS
from foggen.store import read_json


def test_prompts_have_the_recipes_lengths() -> None:
    questions = make_questions(400, DOMAINS)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lengths = [len(encode_chat(tokenizer, mcq_messages(one))) for one in questions]
    low, high = PROMPTS
    assert low - 10 <= min(lengths) and max(lengths) <= high + 60 and 130 < sum(lengths) / len(lengths) < 170
    assert len({one.id for one in questions}) == 400 and {one.domain for one in questions} == set(DOMAINS)


def test_toy_run_measures_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--toy", "--engine", "transformers", "--out", str(tmp_path)])
    found = read_json(tmp_path / "toy-transformers.json")
    assert list(found["results"]) == list(GOALS) and found["share_of_rows"] < 0.1
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 for row in found["results"].values())
    padded, packed = (found["results"][name] for name in ("SFT round", "SFT round, packed"))
    assert padded["loss"] == pytest.approx(packed["loss"], abs=1e-3) and padded["tokens"] == packed["tokens"]
    assert 0 < padded["mfu"] < 2
    out = capsys.readouterr().out
    assert "| SFT round | 8 |" in out and "49 s on 4 H100" in out
