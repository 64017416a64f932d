"""Fine-tuning of one round: a LoRA adapter on the assistant's turn, merged, in a process of its own on GPU machines.

Knows what a training row is and nothing of labels, rounds or engines.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from foggen import prompts
from foggen.config import Settings, SettingsError
from foggen.prompts import encode_chat, plain_ids, turn_end_id
from foggen.store import ROOT, peak_memory, progress, read_json, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TrainingError(RuntimeError):
    """The training process failed; the message ends with its last lines."""


def limit_threads(settings: Settings) -> None:
    """Gives PyTorch the profile's number of CPU threads, for this process."""
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)


def encode_row(tokenizer: PreTrainedTokenizerBase, messages: prompts.Messages, target: str) -> dict[str, list[int]]:
    """Token ids of a training row, and the mask of those to learn: the target and the end of the turn.

    The prompt has the very ids that an engine reads, so training and inference cannot drift apart.
    """
    prompt = encode_chat(tokenizer, messages)
    completion = [*plain_ids(tokenizer, target), turn_end_id(tokenizer)]
    return {
        "input_ids": prompt + completion,
        "completion_mask": [0] * len(prompt) + [1] * len(completion),
    }


def load_tokenizer(model: Path, template: Path | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer; one without a chat template (of a base model) takes that of the model `template`."""
    from transformers import AutoTokenizer

    tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(model))
    if template and not tokenizer.chat_template:
        other = AutoTokenizer.from_pretrained(template)
        if other.get_vocab() != tokenizer.get_vocab():
            raise SettingsError("edge.format_install: labels_from has another vocabulary than the edge model")
        tokenizer.chat_template = other.chat_template
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------
# One training


def sft(
    model: Path,
    rows: Sequence[Mapping[str, Any]],
    settings: Settings,
    out: Path,
    seed: int,
    template: Path | None = None,
) -> dict[str, Any]:
    """Fine-tunes a LoRA adapter on rows (`messages`, `target`), merges it, and saves model and tokenizer to `out`.

    The adapter alone goes to the folder `adapter` beside it, in PEFT's format. The loss is on the target and the end
    of the turn only. Rows longer than `max_length` are left out, not cut: a cut row would teach an answer without its
    end. Returns what was trained, for the record.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PrinterCallback, set_seed
    from trl.trainer.sft_trainer import SFTTrainer

    from foggen.engines.transformers_engine import pick_dtype

    limit_threads(settings)
    set_seed(seed)
    tokenizer = load_tokenizer(model, template)
    encoded = [encode_row(tokenizer, row["messages"], row["target"]) for row in rows]
    kept = [row for row in encoded if len(row["input_ids"]) <= settings.sft.max_length]
    if not kept:
        raise ValueError(f"all {len(rows)} training rows are longer than sft.max_length={settings.sft.max_length}")
    dtype = pick_dtype(settings.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=settings.sft.attention),
            args=sft_config(settings, scratch, seed, bf16=dtype == torch.bfloat16),
            train_dataset=Dataset.from_list(kept),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=settings.lora.r,
                lora_alpha=settings.lora.alpha,
                target_modules=settings.lora.targets,
                task_type="CAUSAL_LM",
            ),
            callbacks=[_progress_callback()],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        result = trainer.train()
        seconds = time.perf_counter() - started
        record = {
            "rows": len(kept),
            "too_long": len(rows) - len(kept),
            "tokens": sum(len(row["input_ids"]) for row in kept),
            "steps": result.global_step,
            "loss": round(result.training_loss, 4),
            "dtype": str(dtype),
            "seed": seed,
        }
        if trainer.accelerator.is_main_process:
            tuned = cast(Any, trainer.model)
            # The product of the two small matrices is added in float32: in bfloat16 most of a small update rounds away.
            tuned.float()
            base = settings.edge.model if model.name != "model" else f"{model.parent.name}/model"
            tuned.peft_config["default"].base_model_name_or_path = base  # not this machine's path
            tuned.save_pretrained(out.with_name("adapter"), save_embedding_layers=False)
            merged = tuned.merge_and_unload().to(dtype)
            merged.config.use_cache = True  # the trainer switched it off
            merged.generation_config.eos_token_id = _ends(merged, tokenizer)
            merged.save_pretrained(out)
            load_tokenizer(model, template).save_pretrained(out)
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
            write_json(out.with_name("timing.json"), {"seconds": seconds, "peak": peak})  # no part of the record
            for folder in (out, out.with_name("adapter")):
                write_text(folder / "README.md", card(settings, base, record))
    return record


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | list[int]:
    """The tokens that end an answer: the model's own, and the end of a turn that was taught."""
    own = model.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [own] if own is not None else []
    taught = turn_end_id(tokenizer)
    return own if taught in ends else [*ends, taught]


def card(settings: Settings, base: str, record: Mapping[str, Any]) -> str:
    """The model card of a checkpoint: where it comes from and what it was trained on."""
    return f"""---
library_name: transformers
base_model: {settings.edge.model}
tags: [foggen, lora]
---
# FogGen, profile `{settings.name}`

Says how sure it is before it answers: `Confidence: <0.0|0.25|0.5|0.75|1.0>`, then `Final answer: <letter>`.
LoRA (r {settings.lora.r}, alpha {settings.lora.alpha}, {settings.lora.targets}) on `{base}`, learning rate
{settings.sft.learning_rate:g}, {settings.sft.epochs:g} epochs: {", ".join(f"{k} {v}" for k, v in record.items())}.

The labels come from the model's own samples. Its confidence is meant for routing to a stronger model, and holds for
questions like those it was trained on. Made with the FogGen reproducibility repository.
"""


def sft_config(settings: Settings, scratch: str, seed: int, bf16: bool) -> Any:
    """TRL's settings. With `packing` the rows of a batch are one sequence without pads; batches stay the same."""
    import torch
    from trl.trainer.sft_config import SFTConfig

    chosen = settings.sft
    if chosen.batch_size % chosen.processes:
        raise SettingsError(
            f"sft.batch_size={chosen.batch_size} is divided among sft.processes={chosen.processes}: "
            "expected: a multiple of it"
        )
    return SFTConfig(
        output_dir=scratch,
        completion_only_loss=True,
        max_length=None,
        padding_free=chosen.packing,
        use_liger_kernel=chosen.liger,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=chosen.scheduler,
        warmup_steps=chosen.warmup_ratio,
        weight_decay=chosen.weight_decay,
        num_train_epochs=chosen.epochs,
        per_device_train_batch_size=chosen.batch_size // chosen.processes,
        gradient_accumulation_steps=chosen.gradient_accumulation,
        train_sampling_strategy="group_by_length",
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=bf16 and not torch.cuda.is_available(),  # else bfloat16 is refused there
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_steps=0.5,
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars: in a notebook they are debris."""
    import datasets

    from foggen.engines.transformers_engine import no_bars

    datasets.disable_progress_bars()
    try:
        with no_bars():
            yield
    finally:
        datasets.enable_progress_bars()


def _progress_callback() -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if "loss" in context["logs"] and state.is_world_process_zero:
                loss = float(context["logs"]["loss"])
                progress(f"    step {state.global_step} of {state.max_steps}, loss {loss:.3f}")

    return Progress()


# ---------------------------------------------------------------------------------------------------------------
# Where it runs


def train(
    model: Path,
    rows: Sequence[Mapping[str, Any]],
    settings: Settings,
    out: Path,
    seed: int,
    template: Path | None = None,
) -> dict[str, Any]:
    """As `sft`: in this process on a CPU; on GPUs in another, whose end gives all its memory back."""
    import torch

    alone = settings.sft.processes == 1 and not torch.cuda.is_available()
    run = sft if alone else train_elsewhere
    return run(model, rows, settings, out, seed, template)


def train_elsewhere(
    model: Path,
    rows: Sequence[Mapping[str, Any]],
    settings: Settings,
    out: Path,
    seed: int,
    template: Path | None = None,
) -> dict[str, Any]:
    """As `sft`, in `settings.sft.processes` other processes. Raises TrainingError with their last lines."""
    with tempfile.TemporaryDirectory() as scratch:
        job = {
            "model": str(model),
            "rows": [{"messages": row["messages"], "target": row["target"]} for row in rows],
            "settings": settings.model_dump(mode="json"),
            "out": str(out),
            "seed": seed,
            "template": str(template) if template else None,
        }
        file = write_json(Path(scratch) / "job.json", job)
        count = settings.sft.processes
        launch = "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
        launch += f" --main_process_port 0 --num_processes {count} -m"
        command = [sys.executable, "-m", *(launch.split() if count > 1 else []), "foggen.training", str(file)]
        path = os.pathsep.join(filter(None, [str(ROOT / "lib"), os.environ.get("PYTHONPATH")]))
        last: deque[str] = deque(maxlen=30)
        with subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        ) as process:
            for line in process.stderr or ():
                last.append(line)
                if line.startswith("    step "):
                    progress(line.rstrip())
        if process.returncode:
            raise TrainingError(f"training ended with code {process.returncode}:\n{''.join(last)}")
        return cast(dict[str, Any], read_json(Path(scratch) / "record.json"))


def main(file: Path) -> None:
    """One training in a process of its own: reads a job, writes its record beside it."""
    job = read_json(file)
    settings = Settings.model_validate(job["settings"])
    template = Path(job["template"]) if job["template"] else None
    record = sft(Path(job["model"]), job["rows"], settings, Path(job["out"]), job["seed"], template)
    if os.environ.get("RANK", "0") == "0":
        write_json(file.with_name("record.json"), record)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
