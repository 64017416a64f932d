"""Fine-tuning of one round: a LoRA adapter on the assistant's turn, merged into the model.

Holds what TRL is given, what a training leaves behind, and on which devices it runs. Knows nothing
of labels, rounds or evaluation.
"""

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from foggen.config import Settings
from foggen.inputs import model_folder
from foggen.prompts import Messages, encode_chat, plain_ids, turn_end_ids
from foggen.store import ROOT, Row, read_json, write_json, write_text

CARD = ROOT / "data" / "checkpoint_card.md"
LAUNCH = "torch.distributed.run --standalone --nproc-per-node"


class TrainingError(RuntimeError):
    """A training that cannot begin, that diverged, or whose process failed."""


class Job(BaseModel):
    """One training: `model` learns `rows` (`messages`, `target`); the result is saved in `out`."""

    model: Path
    rows: list[Row]
    settings: Settings
    out: Path
    seed: int


def limit_threads(settings: Settings) -> None:
    """Gives PyTorch the profile's number of CPU threads, for this process."""
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)


def buffer_model(settings: Settings) -> Path:
    """The model that labels R0's buffer: the edge model, or the teacher of the format."""
    install, edge = settings.edge.format_install, settings.edge
    model = (install.labels_from, install.revision) if install else (edge.model, edge.revision)
    return model_folder(*model)


def load_tokenizer(model: Path, settings: Settings) -> Any:
    """The tokenizer of a model; one without a chat template takes that of the format's teacher."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if not tokenizer.chat_template:
        teacher = AutoTokenizer.from_pretrained(buffer_model(settings))
        tokenizer.chat_template = teacher.chat_template
    return tokenizer


def encode_row(tokenizer: Any, messages: Messages, target: str) -> dict[str, list[int]]:
    """A training row as token ids, with the label -100 where nothing is learnt.

    {"input_ids": [151644, 8948, ...], "labels": [-100, -100, ..., 15, 151645]}

    Learnt are the target and the end of the turn. The prompt has the very ids that an engine reads:
    training and inference cannot drift apart.
    """
    prompt = encode_chat(tokenizer, messages)
    completion = [*plain_ids(tokenizer, target), *turn_end_ids(tokenizer)]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


# ------------------------------------------------------------------------------------------------
# One training


def sft(job: Job) -> Row:
    """Trains an adapter, merges it, saves both. Returns, and saves as training.json, the record

    {"rows": 320, "too_long": 0, "tokens": 61440, "steps": 40, "loss": 0.2107, "seed": 7,
     "dtype": "torch.float32"}

    Rows longer than `max_length` are left out: cut off, they would teach answers without an end.
    Raises TrainingError where no row is left, or where loss or weights are not finite.
    """
    from transformers import PrinterCallback, set_seed

    limit_threads(job.settings)
    set_seed(job.seed)
    # Token ids
    tokenizer, longest = load_tokenizer(job.model, job.settings), job.settings.training.max_length
    encoded = [encode_row(tokenizer, row["messages"], row["target"]) for row in job.rows]
    rows = [row for row in encoded if len(row["input_ids"]) <= longest]
    if not rows:
        raise TrainingError(f"{len(encoded)} rows, none within training.max_length={longest}")
    # Training
    trainer = make_trainer(job, tokenizer, rows)
    trainer.remove_callback(PrinterCallback)
    dtype, result = trainer.model.dtype, trainer.train()
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    if not (math.isfinite(result.training_loss) and all(w.isfinite().all() for w in weights)):
        raise TrainingError(f"diverged, loss {result.training_loss}: lower sft.learning_rate")
    # What it leaves behind
    record: Row = {"rows": len(rows), "too_long": len(encoded) - len(rows)}
    record |= {"tokens": sum(len(row["input_ids"]) for row in rows), "steps": result.global_step}
    record |= {"loss": round(result.training_loss, 4), "seed": job.seed, "dtype": str(dtype)}
    if trainer.accelerator.is_main_process:
        save(trainer.model, job, record)
    return record


def make_trainer(job: Job, tokenizer: Any, rows: list[dict[str, list[int]]]) -> Any:
    """TRL's trainer: the profile's `sft` and `lora`, and what the recipe leaves no choice about."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from foggen.engines.transformers_engine import pick_dtype

    settings, on_gpu = job.settings, torch.cuda.is_available()
    dtype = pick_dtype(settings.dtype, torch.device("cuda" if on_gpu else "cpu"))
    loader_options = {"dtype": dtype, "attn_implementation": settings.training.attn_implementation}
    # The rows stay as they are; a batch holds rows of like length
    arguments: dict[str, Any] = {"max_length": None, "train_sampling_strategy": "group_by_length"}
    arguments |= {"gradient_checkpointing": False, "use_cpu": not on_gpu, "use_cache": True}
    # Nothing is shown or saved on the way, and a loss that is not finite is not hidden
    arguments |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    arguments |= {"logging_nan_inf_filter": False, "output_dir": str(job.out), "seed": job.seed}
    # Mixed precision: the adapter is float32 in any case, and float16 brings its scaler (of GPUs)
    arguments |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(job.model, **loader_options),
        SFTConfig(**settings.sft.model_dump(), **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **settings.lora.model_dump()),
    )


def save(tuned: Any, job: Job, record: Row) -> None:
    """Saves the merged model in `out`; beside it the adapter in PEFT's format, and the record."""
    from foggen.engines import end_tokens

    dtype, config, adapter = tuned.dtype, tuned.peft_config["default"], job.out.with_name("adapter")
    # Equal trainings leave equal files: no path of this machine, and no set without an order
    chained = job.model.name == "model"  # to a checkpoint of the chain
    base = f"{job.model.parent.name}/model" if chained else job.settings.edge.model
    config.base_model_name_or_path = base
    config.target_modules = job.settings.lora.target_modules
    # Merged in float32: in bfloat16 most of a small update would round away
    tuned.float().save_pretrained(adapter, save_embedding_layers=False)
    merged = tuned.merge_and_unload().to(dtype)
    # A text ends with the turn's last token, which was learnt, or as it did before
    tokenizer = load_tokenizer(job.model, job.settings)  # the trainer may have changed its copy
    ends = end_tokens(merged.generation_config, tokenizer)
    merged.generation_config.eos_token_id = sorted({*ends, turn_end_ids(tokenizer)[-1]})
    if merged.generation_config.to_diff_dict().keys() & {"temperature", "top_p", "top_k"}:
        merged.generation_config.do_sample = True  # else it is invalid, and nothing would be saved
    merged.save_pretrained(job.out)
    tokenizer.save_pretrained(job.out)
    write_json(job.out.with_name("training.json"), record)
    card = CARD.read_text("utf-8").format(settings=job.settings, base=base, record=record)
    for folder in (job.out, adapter):
        write_text(folder / "README.md", card)


# ------------------------------------------------------------------------------------------------
# Where it runs


def train(job: Job) -> Row:
    """As `sft`: in this process on a CPU; for GPUs in others, whose end gives their memory back.

    Raises TrainingError with the end of what failed processes wrote.
    """
    import torch

    count = job.settings.training.processes
    if count == 1 and not torch.cuda.is_available():
        return sft(job)
    launcher = [*LAUNCH.split(), str(count), "-m"] if count > 1 else []
    environment = {**os.environ, **training_devices(count)}
    with tempfile.TemporaryDirectory() as scratch:
        file = write_text(Path(scratch) / "job.json", job.model_dump_json())
        command = [sys.executable, "-m", *launcher, "foggen.training", str(file)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise TrainingError(f"training ended with {process.returncode}:\n{process.stderr[-3000:]}")
    return dict(read_json(job.out.with_name("training.json")))


def training_devices(count: int) -> dict[str, str]:
    """The environment that shows a training `count` of the visible GPUs, none that a server holds.

    A GPU is held where less than half of its memory is free. Raises TrainingError with too few.
    """
    import torch

    places = range(torch.cuda.device_count())
    visible = [f"GPU-{torch.cuda.get_device_properties(place).uuid}" for place in places]
    if len(visible) <= 1:
        return {}  # nothing to choose
    # Asking PyTorch for the memory would take some of each
    query = "nvidia-smi --query-gpu=uuid,memory.free,memory.total --format=csv,noheader,nounits"
    answer = subprocess.run(query.split(), capture_output=True, text=True, check=True).stdout
    rows = [line.split(", ") for line in answer.splitlines()]
    half_free = {name for name, free, total in rows if float(free) >= float(total) / 2}
    idle = [name for name in visible if name in half_free]
    if len(idle) < count:
        raise TrainingError(f"training.processes={count}: {len(idle)} of {visible} are half free")
    return {"CUDA_VISIBLE_DEVICES": ",".join(idle[:count])}


if __name__ == "__main__":
    sft(Job.model_validate_json(Path(sys.argv[1]).read_text("utf-8")))
