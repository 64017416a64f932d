"""How long the paper's steps take on this GPU, with random weights of Qwen3-0.6B's dimensions.

`make bench-gpu ARGS="[--toy] [--engine vllm] [--attention sdpa] [--no-chain]"` writes a JSON file
to `data/results/gpu/` and prints the table. Speed does not depend on what weights and questions
say, only on their sizes, so nothing is downloaded. `--toy`: a hundredth of everything.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from cpu import matmul_speed
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from foggen import automix
from foggen.chain import edge_slot, run_chain
from foggen.config import Settings, load_profile, override
from foggen.engines import Engine, Sampling
from foggen.prompts import encode_chat, mcq_messages, target_text
from foggen.questions import Question
from foggen.store import ROOT, Run, peak_memory, write_json
from foggen.training import Job, train

TOKENIZER = (
    ROOT / "data" / "pocket" / "edge"
)  # ids fit into any vocabulary; texts are made to length
PROMPTS = (60, 400)  # tokens; the mean is near 148, a training row's is near 160
ANSWER = 12  # tokens of an answer: random weights never end one, so all answers have as many
SIZES: dict[str, Any] = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
TOY: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
GOALS = {  # what others publish, and the goal in seconds on one H200
    "SFT round": ("49 s on 4 H100; on one H100 21.3k (Unsloth), 53.9k (Surogate) tokens/s", 8),
    "SFT round, padding-free": ("", 8),
    "labels of a round": ("", 3),
    "labels of a relabelled buffer": ("", 12),
    "reload of new weights": ("", 2),
    "evaluation, one pass": ("", 20),
    "evaluation, AutoMix's 9 passes": ("", 50),
    "chain R0 to R14": ("SFT alone 11.4 min on 4 H100", 300),
}
Results = dict[str, dict[str, Any]]  # of every step: rows, seconds, peak_mib and what else is known


def make_model(folder: Path, sizes: dict[str, Any], dtype: str = "") -> int:
    """Saves a Qwen3 of random weights with the pocket tokenizer; returns the number of weights.

    Without a `dtype` it is that of the machine: bfloat16 on a GPU, else float32.
    """
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**sizes, **ends, tie_word_embeddings=True, max_position_embeddings=4096)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen3ForCausalLM(config)
    dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def make_questions(n: int, domains: Sequence[str], seed: int = 0) -> list[Question]:
    """Questions of random words whose prompts have PROMPTS tokens, more short ones than long."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rng = random.Random(seed)
    words = [
        f" {token[1]}"
        for token in sorted(tokenizer.get_vocab())
        if len(token) == 2 and token[0] == "Ġ"
    ]
    low, high = PROMPTS
    questions = []
    for index in range(n):
        options = tuple(f"{index} {letter}" for letter in "ABCD")
        domain = domains[index % len(domains)]
        bare = Question(
            id=f"q{index}", domain=domain, question=f"{index}", options=options, answer="A"
        )
        wanted = low + int((high - low) * rng.betavariate(1, 2.8))
        more = max(0, wanted - len(encode_chat(tokenizer, mcq_messages(bare))))
        text = f"{index}{''.join(rng.choices(words, k=more))}"
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


def time_training(
    settings: Settings, questions: Sequence[Question], work: Path, flops: float
) -> Results:
    """A round's fine-tuning, padded and padding-free, from the start of its process to the end.

    MFU is for `flops`: the share of a second in which a matrix product does a token's operations.
    """
    rows = [{"messages": mcq_messages(q), "target": target_text(0.5, "A")} for q in questions]
    results: Results = {}
    for name, free in (("SFT round", False), ("SFT round, padding-free", True)):
        chosen, out = override(settings, {"sft.padding_free": free}), work / name / "model"
        model = Path(settings.edge.model)
        with timed(results, name, rows=len(rows)) as row:
            record = train(Job(model=model, rows=rows, settings=chosen, out=out, seed=0))
        tokens = record["tokens"] * settings.sft.num_train_epochs
        speed = tokens / row["seconds"]
        row |= {"tokens": tokens, "loss": record["loss"], "tokens_a_second": speed}
        row["mfu"] = flops * speed
    return results


def time_engine(
    settings: Settings, questions: Sequence[Question], share: float, tuned: Path
) -> Results:
    """Labels by sampling, new weights, and the evaluation in one pass and with AutoMix."""

    def answer(engine: Engine, asked: Sequence[Question], n: int = 1) -> None:
        sampling = Sampling(n=n, temperature=0.7 if n > 1 else 0.0, max_tokens=ANSWER)
        engine.generate([mcq_messages(question) for question in asked], sampling)

    slot = edge_slot(settings)
    engine = slot.load(Path(settings.edge.model))
    answer(engine, questions[:8], settings.samples)  # a warm-up
    results: Results = {}
    for name, rows in (("labels of a round", 300), ("labels of a relabelled buffer", 1800)):
        asked = questions[: count(rows, share)]
        with timed(results, name, rows=len(asked)):
            answer(engine, asked, settings.samples)
    with timed(results, "reload of new weights"):
        slot.load(tuned)
    with timed(results, "evaluation, one pass", rows=len(questions)) as answering:
        answer(engine, questions)
    checks = Sampling(n=settings.automix.k, temperature=1.0, max_tokens=30)
    with timed(results, "evaluation, AutoMix's 9 passes", rows=len(questions)) as row:
        automix.verify(engine, questions, ["A"] * len(questions), checks)
    row["seconds"] += answering["seconds"]
    row["times_one_pass"] = row["seconds"] / answering["seconds"]
    slot.close()
    return results


def count(rows: int, share: float) -> int:
    """A share of rows, and a few at least."""
    return max(8, round(rows * share))


def measure(
    settings: Settings, work: Path, sizes: dict[str, Any], share: float, chain: bool
) -> dict[str, Any]:
    """All steps of `settings`, at a `share` of their rows. Returns the JSON file's content."""
    weights = make_model(work / "model", sizes)
    settings = override(settings, {"edge.model": str(work / "model")})
    questions = make_questions(count(16_200, share), settings.domains)
    taught = questions[: count(1800, share)]
    speed, device = matmul_speed()
    # 6 operations per weight and token, as for full training, is customary; LoRA needs fewer
    results = time_training(settings, taught, work, 6 * weights / speed)
    results |= time_engine(settings, questions, share, work / "SFT round" / "model")
    if chain:
        names = ("calibration_rows", "new_rows", "replay_rows")
        small: dict[str, Any] = {name: count(getattr(settings, name), share) for name in names}
        small |= {"dev_questions": count(700, share), "max_new_tokens": ANSWER}
        run = Run(work / "run", override(settings, small))
        rounds = {"rounds": settings.rounds}
        with timed(results, "chain R0 to R14", **rounds), closing(edge_slot(run.settings)) as edge:
            run_chain(run, questions, questions[-count(1400, share) :], edge)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lengths = [len(encode_chat(tokenizer, mcq_messages(question))) for question in taught]
    return {
        "device": device,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "engine": settings.engine,
        "attention": settings.training.attn_implementation,
        "parameters": weights,
        "share_of_rows": share,
        "prompt_tokens": {
            "min": min(lengths), "mean": sum(lengths) / len(lengths), "max": max(lengths),
        },
        "matmul_tflops": speed / 1e12,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "results": results,
    }  # fmt: skip


def table(results: Results) -> str:
    """The measurements as a Markdown table, beside what is published and the goal on one H200."""
    lines = [
        "| step | rows | seconds | more | published | goal on one H200 |",
        "|---|" + "---|" * 5,
    ]
    for name, row in results.items():
        published, goal = GOALS[name]
        more = f"{row['peak_mib'] / 1024:.1f} GiB"
        if "mfu" in row:
            more += f"; {row['tokens_a_second']:,.0f} tokens/s, MFU {row['mfu']:.0%}"
        if "times_one_pass" in row:
            more += f"; {row['times_one_pass']:.1f} times one pass"
        size = f"{row['rows']:,}" if "rows" in row else ""
        lines.append(
            f"| {name} | {size} | {row['seconds']:.1f} | {more} | {published} | {goal} s |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--toy", action="store_true", help="a hundredth of everything")
    parser.add_argument("--engine", choices=("vllm", "transformers"), help="vllm where installed")
    parser.add_argument("--attention", default="sdpa", help="of training: flash_attention_2")
    parser.add_argument("--no-chain", action="store_true", help="leave out the whole chain")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "gpu")
    options = parser.parse_args(argv)
    engine = options.engine or ("vllm" if find_spec("vllm") else "transformers")
    changes: dict[str, Any] = {"engine": engine, "edge.revision": None}
    changes |= {"training.attn_implementation": options.attention}
    changes |= {"answer_target": "gold", "label_reference": "gold"}  # no cloud model here
    changes |= {"dtype": "auto"} if not torch.cuda.is_available() else {}
    changes |= {"engine_options": {}} if engine == "transformers" else {}
    changes |= {"rounds": 1, "samples": 2, "automix.k": 2} if options.toy else {}
    sizes, share = (TOY, 0.002) if options.toy else (SIZES, 1.0)
    with tempfile.TemporaryDirectory() as work:
        settings = load_profile("paper", changes)
        result = measure(settings, Path(work), sizes, share, not options.no_chain)
    name = "toy" if options.toy else result["device"].split(",")[0].replace(" ", "-").lower()
    file = write_json(options.out / f"{name}-{engine}.json", result)
    speed = f"{result['matmul_tflops']:.1f} TFLOP/s in a matrix product"
    print(f"{result['device']}, {speed}, {result['parameters']:,} parameters")
    print(f"{table(result['results'])}\n{file}")


if __name__ == "__main__":
    main()
