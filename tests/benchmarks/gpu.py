"""How long the paper's steps take on this GPU, with a model of Qwen3-0.6B's dimensions and random weights.

`make bench-gpu ARGS="[--toy] [--engine vllm] [--attention sdpa] [--no-chain]"` writes one JSON file to
`data/results/gpu/` and prints the table. Speed does not depend on what weights and questions say, only on their sizes,
so nothing is downloaded. `--toy`: everything a hundredth the size, to try the script on a CPU.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from foggen import automix
from foggen.config import Settings, load_profile, override
from foggen.engines import Engine, Sampling
from foggen.estimate import matmul_speed
from foggen.prompts import encode_chat, mcq_messages, target_text
from foggen.questions import Question
from foggen.rounds import edge_engine, run_chain
from foggen.shapes import LETTERS
from foggen.store import ROOT, Store, peak_memory, read_json, write_json
from foggen.training import Job, train

TOKENIZER = ROOT / "data" / "pocket" / "edge"  # ids fit into any vocabulary; texts are made to the lengths wanted
PROMPTS = (60, 400)  # tokens; the mean is near 148, a training row's is near 160
ANSWER = 12  # tokens of an answer: random weights never end one, so that all answers have as many
SIZES: dict[str, Any] = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
TOY: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
GOALS = {  # what is published, and the goal in seconds on one H200
    "SFT round": ("49 s on 4 H100", 8),
    "SFT round, packed": ("", 8),
    "labels of a round": ("", 3),
    "labels of a relabelled buffer": ("", 12),
    "reload of new weights": ("", 2),
    "evaluation, one pass": ("", 20),
    "evaluation, AutoMix's 9 passes": ("", 50),
    "chain R0 to R14": ("SFT alone 11.4 min on 4 H100", 300),
}


def make_model(folder: Path, sizes: dict[str, Any], dtype: torch.dtype) -> Path:
    """A Qwen3 of random weights with the pocket tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = Qwen3Config(
        **sizes,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    cast(Any, model).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_questions(n: int, domains: Sequence[str], seed: int = 0) -> list[Question]:
    """Questions of random words whose prompts have PROMPTS tokens, more short ones than long."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    dice = random.Random(seed)
    letters = [token for token in tokenizer.get_vocab() if len(token) == 2 and token[0] == "Ġ"] or [" a"]

    def one(index: int) -> Question:
        low, high = PROMPTS
        wanted = low + int((high - low) * dice.betavariate(1, 2.8))
        known: dict[str, Any] = {
            "id": f"q{index}",
            "domain": domains[index % len(domains)],
            "options": tuple(f"{index} {letter}" for letter in LETTERS[:4]),
            "answer": "A",
        }
        head = len(encode_chat(tokenizer, mcq_messages(Question(question=f"{index}", **known))))
        words = "".join(dice.choice(letters).replace("Ġ", " ") for _ in range(max(0, wanted - head)))
        return Question(question=f"{index}{words}", **known)

    return [one(index) for index in range(n)]


@contextmanager
def timed(results: dict[str, dict[str, Any]], name: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Times a block, with the peak memory of GPU (this process's) or process, in MiB."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    row = results[name] = dict(facts)
    yield row
    if gpu:
        torch.cuda.synchronize()
    row["seconds"] = time.perf_counter() - start
    row["peak_mib"] = (torch.cuda.max_memory_allocated() if gpu else peak_memory()) / 2**20


def generate(engine: Engine, asked: Sequence[Question], n: int = 1) -> None:
    """A greedy answer or n samples for each question."""
    sampling = Sampling(n=n, temperature=0.7 if n > 1 else 0.0, max_tokens=ANSWER)
    engine.generate([mcq_messages(question) for question in asked], sampling)


def measure(settings: Settings, folder: Path, sizes: dict[str, Any], share: float, chain: bool) -> dict[str, Any]:
    """All steps of `settings`, at a `share` of their rows. Returns the JSON file's content."""
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    settings = override(settings, {"edge.model": str(make_model(folder / "model", sizes, dtype))})
    model = folder / "model"

    def count(rows: int) -> int:
        return max(8, round(rows * share))

    questions = make_questions(count(16_200), settings.domains)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: list[dict[str, Any]] = [
        {"messages": mcq_messages(one), "target": target_text(0.5, "A")} for one in questions[: count(1800)]
    ]
    results: dict[str, dict[str, Any]] = {}
    weights = sum(weight.numel() for weight in Qwen3ForCausalLM.from_pretrained(model).parameters())
    speed, device = matmul_speed()

    for name, packing in (("SFT round", False), ("SFT round, packed", True)):
        with timed(results, name, rows=len(rows)) as row:
            chosen = override(settings, {"sft.packing": packing})
            record = train(Job(model=model, rows=rows, settings=chosen, out=folder / name / "model", seed=0))
        timing = read_json(folder / name / "timing.json")
        tokens, seconds = record["tokens"] * settings.sft.epochs, timing["seconds"]
        row |= {"tokens": tokens, "loss": record["loss"], "tokens_a_second": tokens / seconds}
        # 6 operations a weight and token, as for full training, which is customary; LoRA needs fewer.
        row |= {"training_seconds": seconds, "mfu": 6 * weights * tokens / seconds / speed}
        row["peak_mib"] = timing["peak"] / 2**20

    engine = edge_engine(settings)(model)
    generate(engine, questions[:8], settings.samples)  # a warm-up
    for name, asked in (("labels of a round", 300), ("labels of a relabelled buffer", 1800)):
        with timed(results, name, rows=count(asked)):
            generate(engine, questions[: count(asked)], settings.samples)
    with timed(results, "reload of new weights"):
        engine.reload(folder / "SFT round" / "model")
    with timed(results, "evaluation, one pass", rows=len(questions)) as row:
        generate(engine, questions)
    answer_time = row["seconds"]
    with timed(results, "evaluation, AutoMix's 9 passes", rows=len(questions)) as row:
        automix.verify(engine, questions, ["A"] * len(questions), settings.automix.k, max_tokens=30)
    row |= {"seconds": row["seconds"] + answer_time, "times_one_pass": 1 + row["seconds"] / answer_time}
    engine.close()

    if chain:
        small = {name: count(getattr(settings, name)) for name in ("calibration_rows", "new_rows", "replay_rows")}
        small |= {"dev_questions": count(700), "max_new_tokens": ANSWER}
        with timed(results, "chain R0 to R14", rounds=settings.rounds):
            run_chain(override(settings, small), Store(folder / "run"), questions, questions[-count(1400) :])
    lengths = [len(encode_chat(tokenizer, row["messages"])) for row in rows]
    return {
        "device": device,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "engine": settings.engine,
        "attention": settings.sft.attention,
        "parameters": weights,
        "share_of_rows": share,
        "prompt_tokens": {"min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths)},
        "matmul_tflops": speed / 1e12,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "results": results,
    }


def table(found: dict[str, Any]) -> str:
    """The measurements as a Markdown table, beside what is published and the goal for one H200."""
    lines = ["| step | rows | seconds | more | published | goal on one H200 |", "|---|---|---|---|---|---|"]
    for name, row in found["results"].items():
        published, goal = GOALS[name]
        more = []
        if "mfu" in row:
            speed = f"{row['tokens_a_second']:,.0f} tokens/s, MFU {row['mfu']:.0%}"
            more = [f"{speed}, training alone {row['training_seconds']:.1f} s"]
        more += [f"{row['times_one_pass']:.1f} times one pass"] if "times_one_pass" in row else []
        more += [f"{row['peak_mib'] / 1024:.1f} GiB"]
        size = f"{row['rows']:,}" if "rows" in row else ""
        lines.append(f"| {name} | {size} | {row['seconds']:.1f} | {'; '.join(more)} | {published} | {goal} s |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--toy", action="store_true", help="a hundredth of everything, to try the script")
    parser.add_argument("--engine", choices=("vllm", "transformers"), help="vllm where it is installed")
    parser.add_argument("--attention", default="sdpa", help="of training, such as flash_attention_2")
    parser.add_argument("--no-chain", action="store_true", help="leave out the whole chain")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "gpu")
    given = parser.parse_args(argv)
    engine = given.engine or ("vllm" if find_spec("vllm") else "transformers")
    changes: dict[str, Any] = {"engine": engine, "sft.attention": given.attention, "edge.revision": None}
    changes |= {"dtype": "auto"} if not torch.cuda.is_available() else {}
    changes |= {"engine_options": {}} if engine == "transformers" else {}
    changes |= {"rounds": 1, "samples": 2, "automix.k": 2} if given.toy else {}
    with tempfile.TemporaryDirectory() as folder:
        sizes, share = (TOY, 0.002) if given.toy else (SIZES, 1.0)
        found = measure(load_profile("paper", changes), Path(folder), sizes, share, not given.no_chain)
    name = "toy" if given.toy else found["device"].split(",")[0].replace(" ", "-").lower()
    file = write_json(given.out / f"{name}-{found['engine']}.json", found)
    speed = f"{found['matmul_tflops']:.1f} TFLOP/s in a matrix product"
    print(f"{found['device']}, {speed}, {found['parameters']:,} parameters")
    print(table(found))
    print(file)


if __name__ == "__main__":
    main()
