"""Fine-tuning: what is learned and what is not, packing, the export, and training in other processes."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_questions

from foggen.config import Settings, SettingsError, override
from foggen.engines import make_engine
from foggen.prompts import encode_chat, mcq_messages, plain_ids, turn_end_id
from foggen.training import Job, TrainingError, encode_row, load_tokenizer, sft, train_elsewhere

ROWS = [
    {"messages": mcq_messages(question), "target": f"Confidence: 1.0\nFinal answer: {question.answer}"}
    for question in make_questions(2)
]


def job(
    model: Path, settings: Settings, out: Path, seed: int = 0, rows: Any = None, template: Path | None = None
) -> Job:
    return Job(model=model, rows=rows or ROWS, settings=settings, out=out, seed=seed, template=template)


def weights(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


# ---- training rows


def test_training_and_inference_see_the_same_ids(tokenizer):
    row = encode_row(tokenizer, ROWS[0]["messages"], ROWS[0]["target"])
    prompt = encode_chat(tokenizer, ROWS[0]["messages"])
    assert row["input_ids"][: len(prompt)] == prompt
    learned = [token for token in row["labels"] if token != -100]
    assert row["labels"] == [-100] * len(prompt) + learned
    assert learned == [*plain_ids(tokenizer, ROWS[0]["target"]), tokenizer.eos_token_id]
    assert turn_end_id(tokenizer) == tokenizer.eos_token_id != tokenizer.pad_token_id


def batches(model: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, out: Path) -> list[dict[str, Any]]:
    """The batches that the trainer really computes the loss of."""
    from trl.trainer.sft_trainer import SFTTrainer

    seen: list[dict[str, Any]] = []
    plain = SFTTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        seen.append({key: value.clone() for key, value in inputs.items() if hasattr(value, "clone")})
        return plain(self, model, inputs, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "compute_loss", spy)
        sft(job(model, settings, out))
    return seen


def test_trainer_takes_the_ids_as_they_are_and_learns_the_completion_only(
    tiny_model, tokenizer, small, monkeypatch, tmp_path
):
    expected = {}
    for row in ROWS:
        coded = encode_row(tokenizer, row["messages"], row["target"])
        expected[tuple(coded["input_ids"])] = coded["labels"]
    found = {}
    for batch in batches(tiny_model, small, monkeypatch, tmp_path / "out"):
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            n = int(mask.sum())
            assert set(labels[n:].tolist()) <= {-100}, "padding is not learned"
            found[tuple(ids[:n].tolist())] = labels[:n].tolist()
    assert found == expected, "neither tokens nor an end of turn are added or lost"


def test_end_of_turn_is_learned_even_where_it_pads(tiny_model, small, monkeypatch, tmp_path):
    """A tokenizer with pad = eos would hide the stop token from a loss that masks by token id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tmp_path / "pad_is_eos"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(model)
    seen = batches(model, small, monkeypatch, tmp_path / "out")
    ends = sum(int((batch["labels"] == tokenizer.eos_token_id).sum()) for batch in seen)
    assert ends == len(ROWS)


def test_batches_hold_rows_of_like_length(tiny_model, small, monkeypatch, tmp_path):
    """Sorted within eight rows at a time here, so at most one pair of four is unlike; half would be by chance."""
    mixed = [
        {**row, "messages": row["messages"][1:] if place % 2 else row["messages"]} for place, row in enumerate(ROWS)
    ]
    monkeypatch.setattr(sys.modules[__name__], "ROWS", mixed[:8] * 4)
    seen = batches(tiny_model, override(small, {"batch_size": 2}), monkeypatch, tmp_path / "out")
    lengths = [batch["attention_mask"].sum(dim=1) for batch in seen]
    assert len(lengths) == 16 and sum(int(pair.max() - pair.min()) > 50 for pair in lengths) <= 5


def test_rows_too_long_are_left_out_and_counted(tiny_model, small, tmp_path):
    long = {"messages": [{"role": "user", "content": "word " * 900}], "target": "x"}
    trained = sft(job(tiny_model, small, tmp_path / "out", rows=[*ROWS, long]))
    assert trained["rows"] == len(ROWS) and trained["too_long"] == 1
    with pytest.raises(ValueError, match="max_length"):
        sft(job(tiny_model, small, tmp_path / "none", rows=[long]))


def test_sft_learns_merges_and_repeats(tiny_model, tokenizer, small, tmp_path, capfd):
    settings = override(small, {"epochs": 10, "learning_rate": 2e-2, "batch_size": 16})
    one = sft(job(tiny_model, settings, tmp_path / "one", seed=1))
    two = sft(job(tiny_model, settings, tmp_path / "two", seed=1))
    assert one == two and weights(tmp_path / "one") == weights(tmp_path / "two")
    other = sft(job(tiny_model, override(small, {"epochs": 1}), tmp_path / "other", seed=2))
    assert other["seed"] == 2 and weights(tmp_path / "other") != weights(tmp_path / "one")
    out, err = capfd.readouterr()
    assert not out and "%|" not in err and "step 10 of 10" in err, "no progress bars, own lines on stderr"
    files = {file.name for file in (tmp_path / "one").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= files and not any("adapter" in f for f in files)
    scores = []
    for model in (tiny_model, tmp_path / "one"):
        engine = make_engine("transformers", model)
        scores.append(engine.score([row["messages"] for row in ROWS], [[row["target"]] for row in ROWS]))
    gains = [after - before for (before,), (after,) in zip(*scores, strict=True)]
    assert min(gains) > 5, "log P of every target, in nats"


# ---- packing


def test_packing_changes_neither_labels_nor_loss_nor_weights(tiny_model, small, monkeypatch, tmp_path):
    """Rows of a batch in one sequence: what is learned is the same, and no row attends to another."""
    from safetensors.torch import load_file

    padded = batches(tiny_model, override(small, {"learning_rate": 1e-2}), monkeypatch, tmp_path / "padded" / "model")
    packing = override(small, {"packing": True, "learning_rate": 1e-2})
    packed = batches(tiny_model, packing, monkeypatch, tmp_path / "packed" / "model")
    assert len(packed) == len(padded)
    for one, other in zip(packed, padded, strict=True):
        assert one["input_ids"].shape == (1, int(other["attention_mask"].sum())), "no pads"
        on = other["attention_mask"].bool()
        assert one["input_ids"][0].tolist() == other["input_ids"][on].tolist()
        assert one["labels"][0].tolist() == other["labels"][on].tolist()
    first, second = (load_file(tmp_path / kind / "model" / "model.safetensors") for kind in ("padded", "packed"))
    base = load_file(tiny_model / "model.safetensors")
    for name, value in first.items():
        moved = (value - base[name]).norm()
        assert (value - second[name]).norm() <= 0.02 * moved + 1e-6, name


# ---- what is left behind


def test_the_adapter_is_exported_and_makes_the_merged_model(tiny_model, small, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = override(small, {"edge.model": "some/model", "learning_rate": 1e-2})
    sft(job(tiny_model, settings, tmp_path / "model"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, msg=name)
    for folder in ("model", "adapter"):
        text = (tmp_path / folder / "README.md").read_text()
        assert "base_model: some/model" in text and f"rows {len(ROWS)}" in text
    texts = [file.read_text() for file in tmp_path.rglob("*.json")] + [
        file.read_text() for file in tmp_path.rglob("*.md")
    ]
    assert not any(str(tmp_path) in text or str(tiny_model) in text for text in texts), "no machine path"


def test_bfloat16_trains_its_adapter_in_float32(tiny_model, small, monkeypatch, tmp_path):
    """In bfloat16 steps of 5e-5 would round away."""
    from safetensors.torch import load_file
    from trl.trainer.sft_trainer import SFTTrainer

    kinds: set[tuple[bool, torch.dtype]] = set()
    plain = SFTTrainer.train

    def spy(self: Any) -> Any:
        kinds.update((weight.requires_grad, weight.dtype) for weight in self.model.parameters())
        return plain(self)

    monkeypatch.setattr(SFTTrainer, "train", spy)
    record = sft(job(tiny_model, override(small, {"dtype": "bfloat16"}), tmp_path / "model", rows=ROWS[:4]))
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)} and record["dtype"] == "torch.bfloat16"
    assert {value.dtype for value in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_base_model_takes_the_siblings_template_and_ends_its_turns(tiny_model, small, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    base = make_model(tmp_path / "base", seed=3)
    (base / "chat_template.jinja").unlink()
    GenerationConfig(eos_token_id=0).save_pretrained(base)
    assert not AutoTokenizer.from_pretrained(base).chat_template
    sft(job(base, small, tmp_path / "model", template=tiny_model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert set(GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id) == {
        0,
        turn_end_id(tokenizer),
    }
    other = make_model(tmp_path / "other", seed=4)
    more = AutoTokenizer.from_pretrained(other)
    more.add_tokens(["new"])
    more.save_pretrained(other)
    with pytest.raises(SettingsError, match="another vocabulary"):
        load_tokenizer(base, other)


# ---- other processes


def test_another_process_trains_the_same_weights(tiny_model, small, tmp_path, capfd):
    here = sft(job(tiny_model, small, tmp_path / "here" / "model", seed=5))
    there = train_elsewhere(job(tiny_model, small, tmp_path / "there" / "model", seed=5))
    assert here == there
    assert weights(tmp_path / "here" / "model") == weights(tmp_path / "there" / "model")
    assert capfd.readouterr().err.count("step 4 of 4") == 2, "its progress is shown"


def test_a_failing_process_is_told_with_its_last_lines(tiny_model, small, tmp_path):
    with pytest.raises(TrainingError, match=r"code 1:[\s\S]*max_length=3"):
        train_elsewhere(job(tiny_model, override(small, {"max_length": 3}), tmp_path / "model"))


@pytest.mark.slow
def test_two_processes_share_a_batch(tiny_model, small, tmp_path, monkeypatch):
    """Data-parallel training on two CPU processes, through accelerate launch."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings: Settings = override(small, {"processes": 2})
    record = train_elsewhere(job(tiny_model, settings, tmp_path / "model"))
    assert record["steps"] == -(-len(ROWS) // 4) and record["rows"] == len(ROWS)
    assert weights(tmp_path / "model") != weights(tiny_model)
