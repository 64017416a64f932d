"""What a run will do, before it does it: rows, tokens, time and memory by stage, what is cached, what will be loaded.

Estimates, from counted rows and a matrix product timed here. Loads no weights and asks no hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from foggen import hub
from foggen.config import Settings
from foggen.prompts import encode_chat, mcq_messages
from foggen.questions import load_questions
from foggen.store import ROOT

# Assumptions, shown with every estimate.
PROMPT, ANSWER, PASSAGE = 150, 12, 250  # tokens; the first is counted where tokenizer and questions are at hand
HUB_TEST = 16_200  # test questions of data that are not here yet: as many as the published evaluation had
TRAIN, READ, WRITE = 6 / 0.3, 2 / 0.3, 2 / 0.02  # operations a parameter and token / share of the speed reached


class Model(NamedTuple):
    """A model's size: parameters in all, those that a token passes, and its configuration where it is known."""

    total: float
    active: float
    config: Any | None


class Work(NamedTuple):
    """Part of a run: how often; rows, and tokens trained, read and written, each time; by the edge or the cloud."""

    stage: str
    times: int
    rows: int
    trained: float = 0
    read: float = 0
    written: float = 0
    cloud: bool = False

    def seconds(self, model: Model, speed: float) -> float:
        """At a matrix product's `speed` (FLOP/s)."""
        operations = TRAIN * self.trained + READ * self.read + WRITE * self.written
        return self.times * model.active * operations / speed


def _folder(name: str, revision: str | None) -> Path | None:
    return ROOT / name if hub.is_local(name) else hub.cached(name, "model", revision)


def model_size(name: str, revision: str | None = None) -> Model | None:
    """From the configuration where it is here or cached (counted without weights), else from the model's name."""
    named = [float(n) * (1e9 if unit in "Bb" else 1e6) for n, unit in re.findall(r"(\d+(?:\.\d+)?)([BbMm])\b", name)]
    folder = _folder(name, revision)
    if folder and (folder / "config.json").exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            count = AutoModelForCausalLM.from_config(config).num_parameters()
        return Model(count, named[-1] if len(named) > 1 else count, config.get_text_config())
    if not named and name.startswith("issai/foggen"):
        named = [0.6e9]  # released from Qwen3-0.6B
    return Model(named[0], named[-1], None) if named else None


def prompt_tokens(settings: Settings) -> float:
    """Mean tokens of a multiple-choice prompt: counted where tokenizer and questions are here, else assumed."""
    folder = _folder(settings.edge.model, settings.edge.revision)
    if not folder or settings.data.sources:
        return PROMPT
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = load_questions(ROOT / settings.data.bank / "dev.jsonl")[::10]
    return sum(len(encode_chat(tokenizer, mcq_messages(one))) for one in asked) / len(asked)


def works(s: Settings, prompt: float) -> Iterator[Work]:
    """The parts of a run. Samples of one prompt share its reading."""
    test = s.test_questions or (HUB_TEST if s.data.sources else len(load_questions(ROOT / s.data.bank / "test.jsonl")))
    r15, limits, each = s.open_ended.r15, s.open_ended.max_new_tokens, s.open_ended.eval_questions
    row = prompt + ANSWER

    def asked(stage: str, times: int, rows: int, samples: int = 1, cloud: bool = False) -> Work:
        return Work(stage, times, rows, 0, rows * prompt, rows * samples * ANSWER, cloud)

    yield asked("R0: samples for the buffer's labels", 1, s.calibration_rows, s.samples)
    if s.edge.format_install:
        yield Work("R0: format install", 1, s.calibration_rows, s.calibration_rows * row * s.sft.epochs)
    if s.rounds:
        rows = s.new_rows + min(s.replay_rows, s.calibration_rows)
        yield asked("a round: samples for labels", s.rounds, rows if s.relabel_replay else s.new_rows, s.samples)
        yield Work("a round: fine-tuning", s.rounds, rows, rows * row * s.sft.epochs)
    yield asked("dev questions, each checkpoint", s.rounds + 1, s.dev_questions or 0)
    yield asked("test questions: R0, last, R15", 3, test)
    yield asked("test questions: cloud", 1, test, cloud=True)
    yield asked("test questions: scores and votes", 1, test, s.samples)
    yield Work("AutoMix: self-verification", 1, test, 0, 3 * test * prompt, test * s.automix.k * 30)
    new = r15.squad + r15.truthfulqa + r15.gsm8k
    words = (r15.squad * limits.squad + r15.truthfulqa * limits.truthfulqa + 2 * r15.gsm8k * limits.gsm8k) / 2
    yield Work("R15: samples for labels", 1, new, 0, new * PASSAGE, s.samples * words)
    if not s.open_ended.r15_model:
        tokens = new * PASSAGE + r15.replay * row
        yield Work("R15: fine-tuning", 1, new + r15.replay, tokens * s.sft.epochs)
    words = each * (limits.squad + limits.truthfulqa + limits.gsm8k) / 2
    yield Work("open-ended: R14, R15", 2, 3 * each, 0, 3 * each * PASSAGE, words)
    yield Work("open-ended: cloud", 1, 3 * each, 0, 3 * each * PASSAGE, words, cloud=True)


def matmul_speed(dtype: str | None = None) -> tuple[float, str]:
    """FLOP/s of a square matrix product, and where: the GPU, by default in bfloat16, else the CPU, in float32."""
    import torch
    from torch.utils.benchmark import Timer

    gpu, threads = torch.cuda.is_available(), torch.get_num_threads()
    size, kind = (8192, dtype or "bfloat16") if gpu else (1024, dtype or "float32")
    matrix = torch.randn(size, size, device="cuda" if gpu else "cpu", dtype=getattr(torch, kind))
    timed = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=threads).blocked_autorange()
    return 2 * size**3 / min(timed.times), torch.cuda.get_device_name() if gpu else f"CPU, {threads} threads"


def training_memory(s: Settings, model: Model, row: float) -> float:
    """Bytes: weights, an adapter with its optimiser (a fiftieth of the weights, 16 bytes each), activations of a batch.

    Activations as Korthikanti et al. (2022) count them, 34 bytes a token, layer and hidden unit, and logits three
    times in float32; of the weights alone where the dimensions are not known.
    """
    held = model.total * ((4 if s.dtype == "float32" else 2) + 16 / 50)
    if model.config is None:
        return held
    unit = 34 * model.config.num_hidden_layers * model.config.hidden_size + 12 * model.config.vocab_size
    return float(held + s.sft.batch_size / s.sft.processes * row * unit)


def where(settings: Settings) -> Iterator[str]:
    """One line a model and data set: in the checkout, in the cache, or to be downloaded and about how large."""
    from foggen.open_ended import HUB

    edge, cloud, install = settings.edge, settings.cloud, settings.edge.format_install
    models = {edge.model: edge.revision}
    models |= {settings.open_ended.r15_model: settings.open_ended.r15_revision} if settings.open_ended.r15_model else {}
    models |= {install.labels_from: install.revision} if install else {}
    models |= {cloud.model: cloud.revision} if cloud.engine != "openai" else {}
    for name, revision in models.items():
        size = model_size(name, revision)
        weight = f", about {2 * size.total / 1e9:.1f} GB" if size else ""
        yield f"{name}: {_place(name, 'model', revision, weight)}"
    if cloud.engine == "openai":
        yield f"{cloud.model}: asked at {cloud.base_url or 'the OpenAI API'}"
    for one in settings.data.sources:
        label = "/".join(filter(None, (one.path, one.name)))
        licence = f" (licence: {one.licence})" if one.licence else ""
        yield f"{label}: {_place(one.path, 'dataset', one.revision)}{licence}"
    for task in HUB.values() if settings.data.open_ended == "hub" else ():
        yield f"{task.path}: {_place(task.path, 'dataset', task.revision)}"


def _place(name: str, kind: hub.Kind, revision: str | None, size: str = "") -> str:
    if hub.is_local(name):
        return "here" if Path(name).is_absolute() else "in this checkout"
    if folder := hub.cached(name, kind, revision):
        return f"in the cache, {folder.name[:8]}"
    return f"to download{size}, revision {revision[:8] if revision else 'newest, fixed when the run starts'}"


def tables(settings: Settings) -> Iterator[Table | str]:
    """The estimate as a table and lines, for a console."""
    (speed, device), prompt = matmul_speed(), prompt_tokens(settings)
    edge, cloud = (model_size(one.model, one.revision) for one in (settings.edge, settings.cloud))
    away = settings.cloud.engine == "openai"
    table = Table("stage", "times", "rows", "tokens, million", "minutes", title=f"{settings.name}: an estimate")
    total = 0.0
    for work in works(settings, prompt):
        model = (None if away else cloud) if work.cloud else edge
        minutes = work.seconds(model, speed) / 60 if model else 0.0
        total += minutes
        tokens = work.times * (work.trained + work.read + work.written) / 1e6
        shown = f"{minutes:,.1f}" if model else "at the endpoint" if work.cloud and away else "?"
        table.add_row(work.stage, str(work.times), f"{work.rows:,}", f"{tokens:.2f}", shown)
    table.add_row("all, without loading and downloading", "", "", "", f"{total:,.1f}")
    yield table
    yield (
        f"Time = parameters x tokens x ({TRAIN:.0f} trained, {READ:.1f} read, {WRITE:.0f} written) / "
        f"{speed / 1e12:.2f} TFLOP/s: a matrix product timed on this machine ({device}), of which training and "
        "reading are assumed to reach 30%, writing 2%; overheads, which dominate in small models, are not counted. "
        f"Prompts have {prompt:.0f} tokens (counted, or {PROMPT} assumed), answers {ANSWER} (assumed)."
    )
    if edge:
        memory = training_memory(settings, edge, prompt + ANSWER) / 2**30
        part = "" if edge.config is not None else " without activations, which its configuration would tell"
        yield f"Edge: {edge.total / 1e6:,.1f} million parameters; training needs about {memory:.1f} GiB{part}."
    if cloud and not away:
        weights = (4 if settings.dtype == "float32" else 2) * cloud.total / 2**30
        yield f"Cloud: {cloud.total / 1e6:,.1f} million parameters; weights {weights:.1f} GiB."
    yield from where(settings)
