"""What a run will do, before it does it: rows, tokens, time and memory by stage, what is cached, what will be loaded.

Estimates, from counted rows and a matrix product timed here. Loads no weights and asks no hub.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from foggen import bank, hub
from foggen.config import Settings
from foggen.prompts import encode_chat, mcq_messages
from foggen.store import ROOT

# Assumptions, shown with every estimate.
PROMPT, ANSWER, PASSAGE = 150, 12, 250  # tokens; the first is counted where the tokenizer is at hand
HUB_TEST = 16_200  # test questions of data that are not here yet: as many as the published evaluation had
SHARE = {
    "train": 0.3,
    "read": 0.3,
    "write": 0.02,
}  # of the matrix product's speed that each kind of work reaches


class Model(NamedTuple):
    """A model's size: parameters in all, those that a token passes, and its dimensions where they are known."""

    total: float
    active: float
    config: Any | None
    known_from: str


class Work(NamedTuple):
    """Part of a run: how often, rows and tokens each time, and operations each time, by kind."""

    stage: str
    times: int
    rows: int
    trained: float = 0
    read: float = 0
    written: float = 0
    cloud: bool = False

    def seconds(self, model: Model, speed: float) -> float:
        """6 operations a parameter and token trained, 2 for one read or written, at a share of `speed` (FLOP/s)."""
        kinds = {"train": 6 * self.trained, "read": 2 * self.read, "write": 2 * self.written}
        return self.times * model.active * sum(count / SHARE[kind] for kind, count in kinds.items()) / speed


def model_size(name: str, revision: str | None = None) -> Model | None:
    """From the configuration where it is here or cached (counted without weights), else from the model's name."""
    folder = ROOT / name if hub.is_local(name) else hub.cached(name, "model", revision)
    if folder and (folder / "config.json").exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            count = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
        active = re.search(r"-A(\d+(?:\.\d+)?)B", name)
        return Model(
            count, float(active[1]) * 1e9 if active else count, config.get_text_config(), "its configuration"
        )
    sizes = [
        float(n) * {"b": 1e9, "m": 1e6}[u.lower()] for n, u in re.findall(r"(\d+(?:\.\d+)?)([BbMm])\b", name)
    ]
    sizes = sizes or ([0.6e9] if name.startswith("issai/foggen") else [])  # released from Qwen3-0.6B
    return Model(sizes[0], sizes[-1], None, "its name") if sizes else None


def prompt_tokens(settings: Settings) -> tuple[float, str]:
    """Mean tokens of a multiple-choice prompt: counted with the edge's tokenizer where it is here, else assumed."""
    edge = settings.edge
    folder = ROOT / edge.model if hub.is_local(edge.model) else hub.cached(edge.model, "model", edge.revision)
    if not folder or settings.data.sources:
        return PROMPT, "assumed"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = bank.make_questions(bank.load_facts(ROOT / settings.data.bank), "dev")[::10]
    counts = [len(encode_chat(tokenizer, mcq_messages(one, settings.prompt_variant))) for one in asked]
    return sum(counts) / len(counts), "counted"


def works(s: Settings, prompt: float) -> Iterator[Work]:
    """The parts of a run. Samples of one prompt share its reading."""
    test = s.test_questions or (HUB_TEST if s.data.sources else 7 * bank.QUESTIONS["test"])
    dev = s.dev_questions or 0
    row = prompt + ANSWER

    def asked(stage: str, times: int, rows: int, samples: int = 1, cloud: bool = False) -> Work:
        return Work(stage, times, rows, read=rows * prompt, written=rows * samples * ANSWER, cloud=cloud)

    def taught(stage: str, times: int, rows: int) -> Work:
        return Work(stage, times, rows, trained=rows * row * s.sft.epochs)

    yield asked("R0: samples for the buffer's labels", 1, s.calibration_rows, s.samples)
    if s.edge.format_install:
        yield taught("R0: format install", 1, s.calibration_rows)
    if s.rounds:
        again = s.replay_rows if s.relabel_replay else 0
        yield asked("a round: samples for new labels", s.rounds, s.new_rows + again, s.samples)
        yield taught("a round: fine-tuning", s.rounds, s.new_rows + min(s.replay_rows, s.calibration_rows))
    yield asked("dev questions, each checkpoint", s.rounds + 1, dev)
    yield asked("test questions: R0, last, R15", 3, test)
    yield asked("test questions: cloud", 1, test, cloud=True)
    yield asked("test questions: scores and votes", 1, test, s.samples)
    yield Work("AutoMix: self-verification", 1, test, read=3 * test * prompt, written=test * s.automix.k * 30)
    r15 = s.open_ended.r15
    new, limits = r15.squad + r15.truthfulqa + r15.gsm8k, s.open_ended.max_new_tokens
    long = (r15.squad * limits.squad + r15.truthfulqa * limits.truthfulqa + 2 * r15.gsm8k * limits.gsm8k) / 2
    yield Work("R15: samples for labels", 1, new, read=new * PASSAGE, written=s.samples * long)
    if not s.open_ended.r15_model:
        rows = new + r15.replay
        yield Work("R15: fine-tuning", 1, rows, trained=(new * PASSAGE + r15.replay * row) * s.sft.epochs)
    each = s.open_ended.eval_questions
    words = each * (limits.squad + limits.truthfulqa + limits.gsm8k) / 2
    yield Work("open-ended: R14, R15", 2, 3 * each, read=3 * each * PASSAGE, written=words)
    yield Work("open-ended: cloud", 1, 3 * each, read=3 * each * PASSAGE, written=words, cloud=True)


def matmul_speed(size: int = 2048, seconds: float = 0.2) -> tuple[float, str]:
    """FLOP/s of a square matrix product, and where: the GPU in bfloat16, else the CPU in float32."""
    import torch

    gpu = torch.cuda.is_available()
    size, dtype = (4 * size, torch.bfloat16) if gpu else (size // 2, torch.float32)
    matrix = torch.randn(size, size, device="cuda" if gpu else "cpu").to(dtype)
    best, until = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < until:
        start = time.perf_counter()
        matrix @ matrix
        if gpu:
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best, torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"


def training_memory(s: Settings, model: Model, row: float) -> float:
    """Bytes: weights, an adapter with its optimiser (a fiftieth of the weights, 16 bytes each), activations of a batch.

    Activations as Korthikanti et al. (2022) count them, 34 bytes a token, layer and hidden unit, and logits three
    times in float32; of the weights alone where the dimensions are not known.
    """
    size = 4 if s.dtype == "float32" else 2
    held = model.total * (size + 16 / 50)
    if model.config is None:
        return held
    tokens = s.sft.batch_size / s.sft.processes * row
    layers = 34 * model.config.num_hidden_layers * model.config.hidden_size
    return float(held + tokens * (layers + 12 * model.config.vocab_size))


def clock(seconds: float) -> str:
    """A time for people."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def where(settings: Settings) -> Iterator[str]:
    """One line a model and data set: in the checkout, in the cache, or to be downloaded and about how large."""
    edge, cloud = settings.edge, settings.cloud
    models = [(edge.model, edge.revision)]
    models += [(edge.format_install.labels_from, edge.format_install.revision)] if edge.format_install else []
    models += [(settings.open_ended.r15_model, None)] if settings.open_ended.r15_model else []
    models += [(cloud.model, cloud.revision)] if cloud.engine != "openai" else []
    for name, revision in models:
        size = model_size(name, revision)
        weight = f", about {2 * size.total / 1e9:.1f} GB" if size else ""
        yield f"{name}: {_place(name, 'model', revision)}".replace("to download", f"to download{weight}")
    if cloud.engine == "openai":
        yield f"{cloud.model}: asked at {cloud.base_url or 'the OpenAI API'}"
    for source in settings.data.sources:
        label = "/".join(filter(None, (source.path, source.name)))
        licence = f" (licence: {source.licence})" if source.licence else ""
        yield f"{label}: {_place(source.path, 'dataset', source.revision)}{licence}"
    if settings.data.open_ended == "hub":
        from foggen.open_ended import HUB

        for one in HUB.values():
            yield f"{one.path}: {_place(one.path, 'dataset', one.revision)}"
    if not settings.data.sources:
        yield f"{settings.data.bank}: in this checkout"


def _place(name: str, kind: hub.Kind, revision: str | None) -> str:
    if hub.is_local(name):
        return "here" if Path(name).is_absolute() else "in this checkout"
    if folder := hub.cached(name, kind, revision):
        return f"in the cache, {folder.name[:8]}"
    return f"to download, revision {revision[:8] if revision else 'newest, fixed when the run starts'}"


def tables(settings: Settings) -> Iterator[Table | str]:
    """The estimate as a table and lines, for a console."""
    speed, device = matmul_speed()
    prompt, how = prompt_tokens(settings)
    edge, cloud = (model_size(one.model, one.revision) for one in (settings.edge, settings.cloud))
    table = Table(
        "stage", "times", "rows", "tokens, million", "estimated time", title=f"{settings.name}: an estimate"
    )
    total = 0.0
    for work in works(settings, prompt):
        model = cloud if work.cloud else edge
        asked_away = work.cloud and settings.cloud.engine == "openai"
        seconds = 0.0 if asked_away or model is None else work.seconds(model, speed)
        total += seconds
        tokens = work.times * (work.trained + work.read + work.written) / 1e6
        shown = "at the endpoint" if asked_away else clock(seconds) if model else "?"
        table.add_row(work.stage, str(work.times), f"{work.rows:,}", f"{tokens:.2f}", shown)
    table.add_row("all, without loading and downloading", "", "", "", clock(total))
    yield table
    yield (
        f"Time = (6 x trained / {SHARE['train']} + 2 x read / {SHARE['read']} + 2 x written / {SHARE['write']}) tokens "
        f"x parameters / {speed / 1e12:.2f} TFLOP/s, a matrix product timed on this machine ({device}). The shares "
        f"are assumed, and overheads, which dominate in small models, not counted; prompts have {prompt:.0f} tokens "
        f"({how}), answers {ANSWER} (assumed)."
    )
    if edge:
        memory = training_memory(settings, edge, prompt + ANSWER) / 2**30
        part = (
            "" if edge.config is not None else " and activations, whose size needs the model's configuration"
        )
        size = f"{edge.total / 1e6:,.1f} M parameters (from {edge.known_from})"
        yield f"Edge: {size}; training needs {memory:.1f} GiB{part}."
    if cloud and settings.cloud.engine != "openai":
        weights = (4 if settings.dtype == "float32" else 2) * cloud.total / 2**30
        yield f"Cloud: {cloud.total / 1e6:,.1f} M parameters (from {cloud.known_from}); weights {weights:.1f} GiB."
    yield from where(settings)
