"""Fine-tuning: what is learnt and what is not, what it leaves behind, and where it runs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_model, make_questions

from foggen import training
from foggen.config import Settings, override
from foggen.engines import make_engine
from foggen.prompts import encode_chat, mcq_messages, plain_ids, turn_end_ids
from foggen.store import read_json
from foggen.training import Job, TrainingError, encode_row, load_tokenizer, sft, train

ROWS = [
    {
        "messages": mcq_messages(question),
        "target": f"Confidence: 1.0\nFinal answer: {question.answer}",
    }
    for question in make_questions(2)
]


def job(model: Path, settings: Settings, out: Path, seed: int = 0, rows: Any = None) -> Job:
    return Job(model=model, rows=rows or ROWS, settings=settings, out=out, seed=seed)


def weights(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings get processes of their own, as where there are GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


# ---- training rows


def test_training_and_inference_see_the_same_ids(tokenizer):
    row = encode_row(tokenizer, ROWS[0]["messages"], ROWS[0]["target"])
    prompt = encode_chat(tokenizer, ROWS[0]["messages"])
    assert row["input_ids"][: len(prompt)] == prompt
    learnt = row["input_ids"][len(prompt) :]
    assert row["labels"] == [-100] * len(prompt) + learnt
    assert learnt == [*plain_ids(tokenizer, ROWS[0]["target"]), tokenizer.eos_token_id]


def spaced(model: Path, folder: Path) -> Path:
    """A copy whose template puts a line break before the end mark, and whose end token pads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>'", "'\n<|im_end|>'")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder)
    return folder


def batches(job: Job, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The batches that the trainer really computes the loss of."""
    from trl.trainer.sft_trainer import SFTTrainer

    seen: list[dict[str, Any]] = []
    plain = SFTTrainer.compute_loss

    def spy(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        seen.append({k: value.clone() for k, value in inputs.items() if hasattr(value, "clone")})
        return plain(self, model, inputs, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "compute_loss", spy)
        sft(job)
    return seen


@pytest.mark.parametrize("kind", ["plain", "pad is the end token, after a line break"])
def test_the_trainer_learns_the_completion_with_its_end_and_nothing_else(
    kind, tiny_model, small, monkeypatch, tmp_path
):
    """A loss that masks by token id would hide the end of a turn where it pads."""
    model = tiny_model if kind == "plain" else spaced(tiny_model, tmp_path / "spaced")
    tokenizer = load_tokenizer(model, small)
    rows = [encode_row(tokenizer, row["messages"], row["target"]) for row in ROWS]
    expected = {tuple(row["input_ids"]): row["labels"] for row in rows}
    found = {}
    for batch in batches(job(model, small, tmp_path / "out"), monkeypatch):
        parts = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
        for ids, mask, labels in zip(*parts, strict=True):
            n = int(mask.sum())
            assert set(labels[n:].tolist()) <= {-100}, "padding is not learnt"
            found[tuple(ids[:n].tolist())] = labels[:n].tolist()
    assert found == expected, "neither tokens nor an end of turn are added or lost"
    ends, last = turn_end_ids(tokenizer), tokenizer.eos_token_id
    assert all(labels[-len(ends) :] == ends and ends[-1] == last for labels in found.values())
    config = read_json(tmp_path / "out" / "generation_config.json")
    assert config["eos_token_id"] == [last], "a line break ends no text"


def test_batches_hold_rows_of_like_length(tiny_model, small, monkeypatch, tmp_path):
    """Sorted within eight rows at a time here: by chance half of the pairs would be unlike."""
    mixed = [{**row, "messages": row["messages"][i % 2 :]} for i, row in enumerate(ROWS[:8] * 4)]
    settings = override(small, {"sft.per_device_train_batch_size": 2})
    seen = batches(job(tiny_model, settings, tmp_path / "out", rows=mixed), monkeypatch)
    lengths = [batch["attention_mask"].sum(dim=1) for batch in seen]
    assert len(lengths) == 16
    assert sum(int(pair.max() - pair.min()) > 50 for pair in lengths) <= 5


def test_padding_free_batches_move_the_weights_alike(tiny_model, small, monkeypatch, tmp_path):
    from safetensors.torch import load_file

    seen, files = {}, {}
    for kind, free in (("padded", False), ("joined", True)):
        settings = override(small, {"sft.padding_free": free, "sft.learning_rate": 1e-2})
        out = tmp_path / kind / "model"
        seen[kind] = batches(job(tiny_model, settings, out), monkeypatch)
        files[kind] = load_file(out / "model.safetensors")
    for joined, padded in zip(seen["joined"], seen["padded"], strict=True):
        on = padded["attention_mask"].bool()
        assert joined["input_ids"].shape == (1, int(on.sum())), "no pads"
        assert joined["input_ids"][0].tolist() == padded["input_ids"][on].tolist()
        assert joined["labels"][0].tolist() == padded["labels"][on].tolist()
    base = load_file(tiny_model / "model.safetensors")
    for name, value in files["padded"].items():
        moved = (value - base[name]).norm()
        assert (value - files["joined"][name]).norm() <= 0.02 * moved + 1e-6, name


# ---- one training


def test_rows_too_long_are_left_out_and_counted(tiny_model, small, tmp_path):
    long = {"messages": [{"role": "user", "content": "word " * 900}], "target": "x"}
    record = sft(job(tiny_model, small, tmp_path / "out", rows=[*ROWS, long]))
    assert record["rows"] == len(ROWS) and record["too_long"] == 1
    given = job(tiny_model, small, tmp_path / "none", rows=[long])
    for rows in ([long], []):
        with pytest.raises(TrainingError, match=f"{len(rows)} rows, none within .*max_length=700"):
            sft(given.model_copy(update={"rows": rows}))


def test_sft_learns_merges_and_repeats_to_the_byte(tiny_model, small, tmp_path, capfd, monkeypatch):
    values = {"sft.num_train_epochs": 10, "sft.learning_rate": 2e-2}
    settings = override(small, values | {"sft.per_device_train_batch_size": 16})
    first = sft(job(tiny_model, settings, tmp_path / "first" / "model", seed=1))
    # In a process of its own, where sets have another order
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        second = train(job(tiny_model, settings, tmp_path / "second" / "model", seed=1))
    assert first == second == read_json(tmp_path / "first" / "training.json")
    files = {path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*")}
    assert {Path("model/model.safetensors"), Path("adapter/adapter_config.json")} <= files
    for file in files:
        same = (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
        assert same, file
    other = sft(job(tiny_model, small, tmp_path / "other" / "model", seed=2))
    assert other["seed"] == 2 and other["steps"] == 4
    assert weights(tmp_path / "other" / "model") != weights(tmp_path / "first" / "model")
    out, err = capfd.readouterr()
    assert not out and "Loading" not in err, "neither progress bars nor logs of the trainer"
    chats, targets = [row["messages"] for row in ROWS], [[row["target"]] for row in ROWS]
    models = (tiny_model, tmp_path / "first" / "model")
    scores = [make_engine("transformers", model).score(chats, targets) for model in models]
    gains = [after - before for (before,), (after,) in zip(*scores, strict=True)]
    assert min(gains) > 5, "log P of every target, in nats"


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_training_that_diverges_is_an_error(epochs, tiny_model, small, tmp_path):
    """After one step the loss is still finite, and the weights are not."""
    values = {"sft.learning_rate": 1e38, "sft.num_train_epochs": epochs}
    settings = override(small, values | {"sft.per_device_train_batch_size": 16})
    with pytest.raises(TrainingError, match=r"diverged.*learning_rate"):
        sft(job(tiny_model, settings, tmp_path / "model"))
    assert not (tmp_path / "training.json").exists()


# ---- what is left behind


def test_the_adapter_is_exported_and_makes_the_merged_model(tiny_model, small, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = override(small, {"edge.model": "some/model", "sft.learning_rate": 1e-2})
    sft(job(tiny_model, settings, tmp_path / "model"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, msg=name)
    for folder in ("model", "adapter"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "base_model: some/model" in card and f"{len(ROWS)} rows" in card
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["target_modules"] == small.lora.target_modules == "all-linear"
    assert read_json(tmp_path / "model" / "config.json")["use_cache"] is True
    texts = [file.read_text() for file in tmp_path.rglob("*.*") if file.suffix in (".json", ".md")]
    assert not any(str(path) in text for text in texts for path in (tmp_path, tiny_model))


def test_half_precision_trains_its_adapter_in_float32(tiny_model, small, monkeypatch, tmp_path):
    """In bfloat16 steps of 5e-5 would round away."""
    from safetensors.torch import load_file

    kinds: set[tuple[bool, torch.dtype]] = set()
    plain = training.make_trainer

    def spy(*given: Any) -> Any:
        trainer = plain(*given)
        kinds.update((weight.requires_grad, weight.dtype) for weight in trainer.model.parameters())
        return trainer

    monkeypatch.setattr(training, "make_trainer", spy)
    settings = override(small, {"dtype": "bfloat16"})
    record = sft(job(tiny_model, settings, tmp_path / "model", rows=ROWS[:4]))
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert record["dtype"] == "torch.bfloat16"
    saved = load_file(tmp_path / "model" / "model.safetensors").values()
    assert {value.dtype for value in saved} == {torch.bfloat16}


def test_float16_on_a_gpu_asks_for_the_gradient_scaler(tiny_model, small, monkeypatch, tmp_path):
    from trl.trainer import sft_config, sft_trainer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sft_config, "SFTConfig", SimpleNamespace)
    monkeypatch.setattr(sft_trainer, "SFTTrainer", lambda model, config, **_: config)
    given = job(tiny_model, override(small, {"dtype": "float16"}), tmp_path / "model")
    config = training.make_trainer(given, None, [{"input_ids": [1], "labels": [1]}])
    assert config.fp16 and not config.bf16 and not config.use_cpu


def test_a_base_model_takes_the_teachers_template_and_ends_its_turns(tiny_model, small, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    base = make_model(tmp_path / "base", seed=3)
    (base / "chat_template.jinja").unlink()
    GenerationConfig(eos_token_id=0).save_pretrained(base)
    settings = override(small, {"edge.format_install": {"labels_from": str(tiny_model)}})
    sft(job(base, settings, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    ends = GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id
    assert set(ends) == {0, tokenizer.eos_token_id}


@pytest.mark.parametrize("modules", [r".*\.(q|v)_proj", ["q_proj", "down_proj"]])
def test_target_modules_may_be_a_pattern_or_names(modules, tiny_model, small, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sft(job(tiny_model, override(small, {"lora.target_modules": modules}), tmp_path / "model"))
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["target_modules"] == modules
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    PeftModel.from_pretrained(base, tmp_path / "adapter")


# ---- where it runs


def test_a_failing_process_is_told_with_its_last_words(elsewhere, tiny_model, small, tmp_path):
    settings = override(small, {"training.max_length": 3})
    with pytest.raises(TrainingError, match=r"ended with 1:[\s\S]*max_length=3"):
        train(job(tiny_model, settings, tmp_path / "x"))


GPUS = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]


@pytest.fixture
def gpus(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Four GPUs of which a server holds b and c; the environments that trainings were given."""
    names = [SimpleNamespace(uuid=name.removeprefix("GPU-")) for name in GPUS]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_properties", names.__getitem__)
    environments: list[dict[str, str]] = []

    def run(command: list[str], **options: Any) -> Any:
        if command[0] == "nvidia-smi":
            rows = zip(GPUS, (79000, 4000, 39999, 41000), strict=True)
            lines = [f"{name}, {free}, 80000" for name, free in rows]
            return SimpleNamespace(stdout="\n".join(lines) + "\n")
        environments.append(options["env"])
        given = Job.model_validate_json(Path(command[-1]).read_text())
        given.out.with_name("training.json").write_text(json.dumps({"command": command}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return environments


@pytest.mark.parametrize(("processes", "devices"), [(1, "GPU-a"), (2, "GPU-a,GPU-d")])
def test_a_training_sees_as_many_gpus_as_it_has_processes(
    processes, devices, gpus, tiny_model, small, tmp_path
):
    """With one process TRL refuses several GPUs; none may be a server's."""
    settings = override(small, {"training.processes": processes})
    record = train(job(tiny_model, settings, tmp_path / "model"))
    assert gpus == [{**os.environ, "CUDA_VISIBLE_DEVICES": devices}]
    assert record["command"][:2] == [sys.executable, "-m"]
    assert ("torch.distributed.run" in record["command"]) == (processes > 1)


def test_too_few_free_gpus_are_told_before_a_process_starts(gpus, tiny_model, small, tmp_path):
    with pytest.raises(TrainingError, match=r"training.processes=3: 2 of .*GPU-b"):
        train(job(tiny_model, override(small, {"training.processes": 3}), tmp_path / "x"))
    assert gpus == []


@pytest.mark.parametrize("count", [0, 1])
def test_where_there_is_nothing_to_choose_the_environment_stays(count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a"))
    assert training.training_devices(1) == {}


@pytest.mark.slow
def test_two_processes_share_the_rows(tiny_model, small, tmp_path):
    """Data-parallel training on two CPU processes, through torchrun."""
    values = {"training.processes": 2, "sft.per_device_train_batch_size": 2}
    record = train(job(tiny_model, override(small, values), tmp_path / "model"))
    assert record["steps"] == -(-len(ROWS) // 4) and record["rows"] == len(ROWS)
    assert weights(tmp_path / "model") != weights(tiny_model)
