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
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from foggen import automix
from foggen.config import Settings, load_profile, override
from foggen.engines import Engine, Sampling
from foggen.estimate import matmul_speed
from foggen.prompts import encode_chat, mcq_messages, target_text
from foggen.questions import Question
from foggen.rounds import edge_engine, run_chain
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
Results = dict[str, dict[str, Any]]  # of each step: rows, seconds, peak_mib and what else is known


def make_model(folder: Path, sizes: dict[str, Any]) -> int:
    """Saves a Qwen3 of random weights with the pocket tokenizer; returns the number of its weights."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**sizes, **ends, tie_word_embeddings=True, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def make_questions(n: int, domains: Sequence[str], seed: int = 0) -> list[Question]:
    """Questions of random words whose prompts have PROMPTS tokens, more short ones than long."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    dice = random.Random(seed)
    words = [f" {token[1]}" for token in tokenizer.get_vocab() if len(token) == 2 and token[0] == "Ġ"]
    low, high = PROMPTS
    questions = []
    for index in range(n):
        options = tuple(f"{index} {letter}" for letter in "ABCD")
        domain = domains[index % len(domains)]
        bare = Question(id=f"q{index}", domain=domain, question=f"{index}", options=options, answer="A")
        wanted = low + int((high - low) * dice.betavariate(1, 2.8))
        more = max(0, wanted - len(encode_chat(tokenizer, mcq_messages(bare))))
        text = f"{index}{''.join(dice.choices(words, k=more))}"
        questions.append(bare.model_copy(update={"question": text}))
    return questions


@contextmanager
def timed(results: Results, name: str, **facts: Any) -> Iterator[dict[str, Any]]:
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


def time_training(settings: Settings, questions: Sequence[Question], work: Path, flops: float) -> Results:
    """A round's fine-tuning, padded and packed; its utilisation, where a token costs `flops` of a matrix product."""
    rows = [{"messages": mcq_messages(one), "target": target_text(0.5, "A")} for one in questions]
    results: Results = {}
    for name, packing in (("SFT round", False), ("SFT round, packed", True)):
        chosen = override(settings, {"sft.packing": packing})
        with timed(results, name, rows=len(rows)) as row:
            job = Job(model=Path(settings.edge.model), rows=rows, settings=chosen, out=work / name / "model", seed=0)
            record = train(job)
        timing = read_json(work / name / "timing.json")
        tokens, seconds = record["tokens"] * settings.sft.epochs, timing["seconds"]
        row |= {"tokens": tokens, "loss": record["loss"], "tokens_a_second": tokens / seconds}
        row |= {"training_seconds": seconds, "mfu": flops * tokens / seconds, "peak_mib": timing["peak"] / 2**20}
    return results


def time_engine(settings: Settings, questions: Sequence[Question], share: float, tuned: Path) -> Results:
    """Labels by sampling, new weights, and the evaluation in one pass and with AutoMix."""

    def ask(engine: Engine, asked: Sequence[Question], n: int = 1) -> None:
        sampling = Sampling(n=n, temperature=0.7 if n > 1 else 0.0, max_tokens=ANSWER)
        engine.generate([mcq_messages(question) for question in asked], sampling)

    engine = edge_engine(settings)(Path(settings.edge.model))
    ask(engine, questions[:8], settings.samples)  # a warm-up
    results: Results = {}
    for name, rows in (("labels of a round", 300), ("labels of a relabelled buffer", 1800)):
        asked = questions[: count(rows, share)]
        with timed(results, name, rows=len(asked)):
            ask(engine, asked, settings.samples)
    with timed(results, "reload of new weights"):
        engine.reload(tuned)
    with timed(results, "evaluation, one pass", rows=len(questions)) as answering:
        ask(engine, questions)
    with timed(results, "evaluation, AutoMix's 9 passes", rows=len(questions)) as row:
        automix.verify(engine, questions, ["A"] * len(questions), settings.automix.k, max_tokens=30)
    row["seconds"] += answering["seconds"]
    row["times_one_pass"] = row["seconds"] / answering["seconds"]
    engine.close()
    return results


def count(rows: int, share: float) -> int:
    """A share of rows, and a few at least."""
    return max(8, round(rows * share))


def measure(settings: Settings, work: Path, sizes: dict[str, Any], share: float, chain: bool) -> dict[str, Any]:
    """All steps of `settings`, at a `share` of their rows. Returns the JSON file's content."""
    weights = make_model(work / "model", sizes)
    settings = override(settings, {"edge.model": str(work / "model")})
    questions = make_questions(count(16_200, share), settings.domains)
    taught = questions[: count(1800, share)]
    speed, device = matmul_speed()
    # 6 operations a weight and token, as for full training, which is customary; LoRA needs fewer.
    results = time_training(settings, taught, work, 6 * weights / speed)
    results |= time_engine(settings, questions, share, work / "SFT round" / "model")
    if chain:
        names = ("calibration_rows", "new_rows", "replay_rows")
        small = {name: count(getattr(settings, name), share) for name in names}
        small |= {"dev_questions": count(700, share), "max_new_tokens": ANSWER}
        with timed(results, "chain R0 to R14", rounds=settings.rounds):
            run_chain(override(settings, small), Store(work / "run"), questions, questions[-count(1400, share) :])
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lengths = [len(encode_chat(tokenizer, mcq_messages(one))) for one in taught]
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


def table(results: Results) -> str:
    """The measurements as a Markdown table, beside what is published and the goal for one H200."""
    lines = ["| step | rows | seconds | more | published | goal on one H200 |", "|---|---|---|---|---|---|"]
    for name, row in results.items():
        published, goal = GOALS[name]
        more = f"{row['peak_mib'] / 1024:.1f} GiB"
        if "mfu" in row:
            more += f"; {row['tokens_a_second']:,.0f} tokens/s, MFU {row['mfu']:.0%}"
            more += f", training alone {row['training_seconds']:.1f} s"
        if "times_one_pass" in row:
            more += f"; {row['times_one_pass']:.1f} times one pass"
        size = f"{row['rows']:,}" if "rows" in row else ""
        lines.append(f"| {name} | {size} | {row['seconds']:.1f} | {more} | {published} | {goal} s |")
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
    with tempfile.TemporaryDirectory() as work:
        sizes, share = (TOY, 0.002) if given.toy else (SIZES, 1.0)
        found = measure(load_profile("paper", changes), Path(work), sizes, share, not given.no_chain)
    name = "toy" if given.toy else found["device"].split(",")[0].replace(" ", "-").lower()
    file = write_json(given.out / f"{name}-{engine}.json", found)
    speed = f"{found['matmul_tflops']:.1f} TFLOP/s in a matrix product"
    print(f"{found['device']}, {speed}, {found['parameters']:,} parameters\n{table(found['results'])}\n{file}")


if __name__ == "__main__":
    main()
