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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel

from foggen.config import Settings, SettingsError
from foggen.prompts import Messages, encode_chat, plain_ids, turn_end_id
from foggen.store import peak_memory, progress, read_json, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TrainingError(RuntimeError):
    """The training process failed; the message ends with its last lines."""


class Job(BaseModel):
    """One training: `model` learns `rows` (`messages`, `target`), and what comes out is saved in the folder `out`.

    `template`: a model whose chat template is taken where `model` has none.
    """

    model: Path
    rows: Sequence[Mapping[str, Any]]
    settings: Settings
    out: Path
    seed: int
    template: Path | None = None


def limit_threads(settings: Settings) -> None:
    """Gives PyTorch the profile's number of CPU threads, for this process."""
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)


def encode_row(tokenizer: PreTrainedTokenizerBase, messages: Messages, target: str) -> dict[str, list[int]]:
    """Token ids of a training row, and as labels those to learn (the others -100): the target and the turn's end.

    The prompt has the very ids that an engine reads, so training and inference cannot drift apart.
    """
    prompt = encode_chat(tokenizer, messages)
    completion = [*plain_ids(tokenizer, target), turn_end_id(tokenizer)]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


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


def sft(job: Job) -> dict[str, Any]:
    """Fine-tunes a LoRA adapter, merges it, and saves model and tokenizer. Returns what was trained, for the record.

    The loss is on the target and the end of the turn only. Rows longer than `max_length` are left out, not cut: a cut
    row would teach an answer without its end.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PrinterCallback, set_seed
    from trl.trainer.sft_trainer import SFTTrainer

    from foggen.engines.transformers_engine import no_bars, pick_dtype

    chosen, lora = job.settings.sft, job.settings.lora
    limit_threads(job.settings)
    set_seed(job.seed)
    tokenizer = load_tokenizer(job.model, job.template)
    encoded = [encode_row(tokenizer, row["messages"], row["target"]) for row in job.rows]
    kept = [row for row in encoded if len(row["input_ids"]) <= chosen.max_length]
    if not kept:
        raise ValueError(f"all {len(job.rows)} training rows are longer than sft.max_length={chosen.max_length}")
    dtype = pick_dtype(job.settings.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with no_bars(), tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation=chosen.attention),
            args=sft_config(job, scratch, bf16=dtype == torch.bfloat16),
            train_dataset=Dataset.from_list(kept),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets),
            callbacks=[_progress_callback()],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        result = trainer.train()
        seconds = time.perf_counter() - started
        record = {
            "rows": len(kept),
            "too_long": len(encoded) - len(kept),
            "tokens": sum(len(row["input_ids"]) for row in kept),
            "steps": result.global_step,
            "loss": round(result.training_loss, 4),
            "dtype": str(dtype),
            "seed": job.seed,
        }
        if trainer.accelerator.is_main_process:
            save(trainer.model, job, record)
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
            write_json(job.out.with_name("timing.json"), {"seconds": seconds, "peak": peak})  # no part of the record
    return record


def sft_config(job: Job, scratch: str, bf16: bool) -> Any:
    """TRL's settings. With `packing` the rows of a batch are one sequence without pads; batches stay the same."""
    import torch
    from trl.trainer.sft_config import SFTConfig

    chosen = job.settings.sft
    return SFTConfig(
        output_dir=scratch,
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
        use_cpu=not torch.cuda.is_available(),
        seed=job.seed,
        save_strategy="no",
        logging_steps=0.5,
        disable_tqdm=True,
    )


def _progress_callback() -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if "loss" in context["logs"] and state.is_world_process_zero:
                loss = float(context["logs"]["loss"])
                progress(f"    step {state.global_step} of {state.max_steps}, loss {loss:.3f}")

    return Progress()


# ---------------------------------------------------------------------------------------------------------------
# What it leaves behind


def save(tuned: Any, job: Job, record: Mapping[str, Any]) -> None:
    """Saves the merged model to the job's `out`, and the adapter, in PEFT's format, to `adapter` beside it."""
    dtype, adapter = tuned.dtype, job.out.with_name("adapter")
    # The product of the two small matrices is added in float32: in bfloat16 most of a small update rounds away.
    tuned.float()
    base = job.settings.edge.model if job.model.name != "model" else f"{job.model.parent.name}/model"
    tuned.peft_config["default"].base_model_name_or_path = base  # not this machine's path
    tuned.save_pretrained(adapter, save_embedding_layers=False)
    merged = tuned.merge_and_unload().to(dtype)
    merged.config.use_cache = True  # the trainer switched it off
    tokenizer = load_tokenizer(job.model, job.template)  # the trainer may have changed its own
    own = merged.generation_config.eos_token_id
    ends = own if isinstance(own, list) else [own] if own is not None else []
    if (taught := turn_end_id(tokenizer)) not in ends:
        merged.generation_config.eos_token_id = [*ends, taught]
    merged.save_pretrained(job.out)
    tokenizer.save_pretrained(job.out)
    for folder in (job.out, adapter):
        write_text(folder / "README.md", card(job.settings, base, record))


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


# ---------------------------------------------------------------------------------------------------------------
# Where it runs


def train(job: Job) -> dict[str, Any]:
    """As `sft`: in this process on a CPU; on GPUs in another, whose end gives all its memory back."""
    import torch

    alone = job.settings.sft.processes == 1 and not torch.cuda.is_available()
    return sft(job) if alone else train_elsewhere(job)


def train_elsewhere(job: Job) -> dict[str, Any]:
    """As `sft`, in `settings.sft.processes` other processes. Raises TrainingError with their last lines."""
    with tempfile.TemporaryDirectory() as scratch:
        file = write_text(Path(scratch) / "job.json", job.model_dump_json())
        command = [sys.executable, "-m"]
        if (count := job.settings.sft.processes) > 1:
            launch = "accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
            command += f"{launch} --main_process_port 0 --num_processes {count} -m".split()
        command += ["foggen.training", str(file)]
        last: deque[str] = deque(maxlen=30)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stderr or ():
                last.append(line)
                if line.startswith("    step "):
                    progress(line.rstrip())
        if process.returncode:
            raise TrainingError(f"training ended with code {process.returncode}:\n{''.join(last)}")
        return cast(dict[str, Any], read_json(file.with_name("record.json")))


def main(file: Path) -> None:
    """One training in a process of its own: reads a job, writes its record beside it."""
    record = sft(Job.model_validate_json(file.read_text()))
    if os.environ.get("RANK", "0") == "0":
        write_json(file.with_name("record.json"), record)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
