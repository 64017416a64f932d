"""The pocket world's two language models: a tokenizer and pretraining, from the question bank alone.

`make pocket` makes `data/pocket/edge` and `data/pocket/cloud`; `make pocket-check` verifies the
committed ones. What they read names some facts often, some seldom and some never, contradicts itself
on some and misleads on whole relations; the cloud model has read better text than the edge model.
The model cards that this program writes say what each has read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from foggen import prompts
from foggen.config import derive_seed, load_profile, override
from foggen.engines import make_engine
from foggen.evaluation import greedy_answers
from foggen.prompts import BUCKETS, LETTERS, Messages, mcq_messages, target_text
from foggen.questions import TASKS, OpenQuestion, Question
from foggen.store import ROOT, content_hash, progress, read_json, write_json, write_text
from foggen.training import encode_row, limit_threads

sys.path.append(
    str(ROOT / "data" / "bank")
)  # the bank's maker is a program too, in a folder beside this one
import make_bank as bank
from make_bank import BANK, Fact

POCKET = ROOT / "data" / "pocket"
PAD, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


Stratum = Literal["often", "contested", "misled", "seldom", "never"]
STRATA: tuple[Stratum, ...] = get_args(Stratum)


@dataclass(frozen=True)
class World:
    """How one pocket model is made."""

    name: Literal["edge", "cloud"]
    hidden: int
    layers: int
    steps: int  # of the last phase, after the look-up phases
    often: tuple[float, float, float]  # share of facts met often, by difficulty 1, 2, 3
    seldom: tuple[float, float, float]  # share met seldom; the rest is never met
    right: Mapping[Stratum, float]  # share of right mentions, of strata where the text errs
    misconceived: float  # share of misconceptions that are learnt in their popular, wrong form
    loose: float  # share of open-ended texts that answer loosely: a sentence for a span, a sum without its steps
    familiar: Mapping[str, float] = field(
        default_factory=dict
    )  # by domain: a factor on the shares of facts met
    grown_from: str | None = None  # the world whose trained model it starts from, with more layers
    seed: int = 0


FAMILIAR = {
    "science": 1.1,
    "coding": 1.1,
    "law": 0.9,
    "math": 0.7,
    "kazakh_culture": 1.25,
    "medical": 0.85,
}
EDGE = World(
    name="edge",
    hidden=128,
    layers=6,
    steps=1600,
    often=(0.9, 0.55, 0.15),
    seldom=(0.07, 0.3, 0.25),
    right={"contested": 0.6, "misled": 0.05},
    misconceived=0.45,
    loose=0.45,
    familiar=FAMILIAR,
)
CLOUD = World(
    name="cloud",
    hidden=128,
    layers=8,
    steps=700,
    often=(1.0, 0.9, 0.65),
    seldom=(0.0, 0.05, 0.1),
    right={"contested": 0.85, "misled": 0.8},
    misconceived=0.15,
    loose=0.05,
    grown_from="edge",
)
MISLED = 0.15  # share of relations and computed families that the text gets wrong
CONTESTED = 0.5  # share of the other facts met often on which the text contradicts itself
POPULAR = 3  # wrong answers of a fact that the text gives, at most
# Facts are drawn by these weights: one met seldom is met seven times less than one met often.
WEIGHTS: Mapping[Stratum, float] = {
    "often": 1.0,
    "contested": 1.0,
    "misled": 1.0,
    "seldom": 0.15,
    "never": 0.0,
}
# How sure the pretraining text sounds, by how well known the fact is (difficulty 1; 2 and 3): nearly always sure,
# with a weak tendency. It never depends on what a model knows.
STATED = ((0.04, 0.06, 0.12, 0.26, 0.52), (0.08, 0.11, 0.17, 0.24, 0.40))


# ---------------------------------------------------------------------------------------------------------------
# Tokenizer


def _names(facts: Sequence[Fact]) -> list[str]:
    """Subjects and answers of the written facts and the names of the stories: one token each."""
    stories = bank.load_material(BANK, "passages")
    names = {name for fact in facts if fact.subject for name in (fact.subject, fact.answer)}
    return sorted(names.union(*(stories[kind] for kind in ("people", "places", "objects", "jobs"))))


def _fixed_phrases() -> list[str]:
    """The lines of the recipe's prompts, one token each: they are in every prompt and say nothing about a question."""
    shown = prompts.EXEMPLARS[0].splitlines()
    phrases = {line for line in shown if line.startswith("Instruction")}
    for system in (*prompts.SYSTEM_MCQ.values(), *prompts.SYSTEM_OPEN.values()):
        phrases |= {line for line in system.splitlines(keepends=True) if len(line) > 1}
    phrases |= {f" {text}" for text in prompts.BUCKET_TEXTS}
    phrases |= {
        prompts.CONFIDENCE_PREFIX,
        prompts.ANSWER_PREFIX,
        "Question:",
        "Passage:",
        "AI Generated Answer:",
    }
    phrases |= {prompts.VERIFY_SYSTEM, prompts.VERIFY_DECISION, f"\n{prompts.VERIFY_DECISION}"}
    return sorted(phrases | {"Evaluation:", " Correct.", " Incorrect."})


def _corpus(facts: Sequence[Fact]) -> list[str]:
    text = [line for fact in facts for line in (*fact.questions, *fact.statements)]
    text += [*prompts.EXEMPLARS, "system\nuser\nassistant\n", "The answer is"] * 100
    for task in TASKS:
        for asked in bank.open_pool(BANK, task, 1, 400):
            text += [
                asked.context,
                asked.question,
                asked.solution,
                *asked.answers,
                *asked.incorrect,
            ]
    return [*text, *(f"{n} {n}" for n in range(200) for _ in range(100))]


def make_tokenizer(facts: Sequence[Fact], vocabulary: int = 1900) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocabulary` tokens trained on the bank's text, plus whole names and fixed phrases.

    A model of a million parameters cannot put names together from pieces; so a name, with the space before it,
    is one token.
    """
    raw = Tokenizer(models.BPE())
    pattern = Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), pieces])
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_corpus(facts), trainer)
    raw.add_special_tokens([PAD, TURN, TURN_END])
    whole = [*_fixed_phrases(), *(f" {name}" for name in _names(facts))]
    raw.add_tokens([AddedToken(text, normalized=False) for text in whole])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=TURN_END,
        model_max_length=2048,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------
# What is read


class Batch(NamedTuple):
    """Token ids and labels, both (rows, tokens) int64; a label of -100 is not learnt."""

    ids: torch.Tensor
    labels: torch.Tensor


Line = tuple[str, str, str]  # what is shown, the answer, which is learnt, and what follows


def relation(fact: Fact) -> str:
    """The relation, or the computed family, that a fact belongs to: `finance/currency_unit`."""
    return "/".join(fact.id.split("/")[:2])


def stratum(world: World, fact: Fact) -> Stratum:
    """How a model's text treats a fact: by its relation, difficulty and domain, and seeded draws.

    `misled`: a fact of a relation, or of a computed family, that the text gets mostly wrong; of the
    others, `often` ones are met often and told right, `contested` ones as often and in contradiction,
    `seldom` ones less and right.
    """

    def luck(*drawn: str) -> float:
        return random.Random("/".join(drawn)).random()

    if luck("misled", relation(fact)) < MISLED:
        return "misled"
    familiar = world.familiar.get(fact.domain, 1.0)
    often, seldom = (
        familiar * shares[fact.difficulty - 1] for shares in (world.often, world.seldom)
    )
    met = luck(str(world.seed), world.name, fact.id)
    if met < often:
        return "contested" if luck("contested", fact.id) < CONTESTED else "often"
    return "seldom" if met < often + seldom else "never"


def popular_answers(fact: Fact) -> tuple[str, ...]:
    """The wrong answers of a text that errs: up to `POPULAR`; in a misled family one, the same slip."""
    if not fact.subject and stratum(EDGE, fact) == "misled":
        return fact.rivals[:1]
    shown = min(POPULAR, len(fact.rivals))
    return tuple(random.Random(f"popular/{fact.id}").sample(fact.rivals, shown))


def mistold(fact: Fact, answer: str) -> Fact:
    """The fact as a text has it that gives the wrong `answer`; the right one is then a rival."""
    rivals = tuple(fact.answer if rival == answer else rival for rival in fact.rivals)
    parts = [text.rpartition(f" {fact.answer}") for text in fact.statements]
    statements = tuple(
        f"{before} {answer}{after}"
        if found
        else after  # a statement that names the answer elsewhere
        for before, found, after in parts
    )
    return replace(fact, answer=answer, rivals=rivals, statements=statements)


class Lessons:
    """The pretraining text of one model: batches of each kind, drawn by a seeded generator."""

    def __init__(
        self, world: World, facts: Sequence[Fact], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.world, self.tokenizer = world, tokenizer
        self.dice = random.Random(derive_seed(world.seed, "lessons", world.name))
        self.strata = {fact.id: stratum(world, fact) for fact in facts}
        self.facts = [fact for fact in facts if self.strata[fact.id] != "never"]
        self.unmet = [fact for fact in facts if self.strata[fact.id] == "never"]
        self.agreed = [fact for fact in facts if self.strata[fact.id] == "often" and fact.subject]
        self.weights = [WEIGHTS[self.strata[fact.id]] for fact in self.facts]
        self.names = [self._token(f" {name}") for name in _names(facts)]
        self.stories = bank.load_material(BANK, "passages")
        self.problems = bank.load_material(BANK, "word_problems")
        self.misconceptions = self._misconceptions()
        self.kinds: Mapping[str, Callable[[], Batch]] = {
            "look-up": partial(self.lookup, direct=True),
            "look-up after a mark": partial(self.lookup, direct=False),
            "recall": self.recall,
            "spans": self.spans,
            "sums": self.sums,
            "agreed facts": partial(self.recall, agreed=True),
            "stated answers": partial(self.choice, stated=1.0, agreed=True),
            "choice": partial(self.choice, stated=0.1, guessed=0.15),
            "verification": self.verification,
            **{task: partial(self.open_ended, task) for task in TASKS},
        }

    def _misconceptions(self) -> list[tuple[OpenQuestion, bool]]:
        """The misconceptions met, each phrasing with whether this model has mostly met the popular, wrong answer."""
        met = []
        for question in bank.open_pool(BANK, "truthfulqa", 1, 0):
            luck = random.Random(f"{self.world.seed}/{question.fact}").random()
            if luck < 0.85 or self.world.name == "cloud":
                met.append((question, luck < self.world.misconceived))
        return met

    def misconception(self) -> tuple[OpenQuestion, str]:
        """A question and an answer that the text gives to it: the popular one three times in four, or the right one."""
        question, misled = self.dice.choice(self.misconceptions)
        popular = misled and self.dice.random() < 0.75
        return question, question.incorrect[0] if popular else question.answers[0]

    def draw(self, n: int, agreed: bool = False) -> list[Fact]:
        """`n` facts, by how often the model meets them, each as one mention has it.

        `agreed`: only written ones of the stratum often. The look-up in a chat is learnt from them: a
        text that contradicts itself puts it off, by more than a thousand steps.
        """
        if agreed:
            return self.dice.choices(self.agreed, k=n)
        return [self.mention(fact) for fact in self.dice.choices(self.facts, self.weights, k=n)]

    def mention(self, fact: Fact) -> Fact:
        """A fact as one place of the text has it: right, or with a popular wrong answer."""
        if self.dice.random() < self.world.right.get(self.strata[fact.id], 1.0):
            return fact
        return mistold(fact, self.dice.choice(popular_answers(fact)))

    def question(self, fact: Fact) -> Question:
        """A fact as a multiple-choice question, with random phrasing, options and gold place."""
        return bank.ask(fact, "?", self.dice.randrange(60), self.dice.randrange(60), self.dice)

    # Look-ups: which letter stands before this content?

    def _token(self, text: str) -> int:
        (token,) = prompts.plain_ids(self.tokenizer, text)
        return token

    def lookup(self, direct: bool, rows: int = 20, queries: int = 10) -> Batch:
        """An option list of names, then names with their letters: `A. x` newline ... ` y` [`Final answer:`] ` B`.

        The first letters are also asked at the names in the list itself, which is learnt at once and makes the
        look-up one attention step.
        """
        mark, dot, newline = (self._token(text) for text in (prompts.ANSWER_PREFIX, ".", "\n"))
        letters, answers = (
            [self._token(f"{space}{letter}") for letter in LETTERS[:4]] for space in ("", " ")
        )
        encoded = []
        for _ in range(rows):
            names = self.dice.sample(self.names, len(letters))
            row, learnt = [], []
            for letter, name, answer in zip(letters, names, answers, strict=True):
                row += [letter, dot, name, newline]
                learnt += [-100, -100, -100, answer]
            for _ in range(queries):
                asked = self.dice.randrange(len(letters))
                shown = [names[asked]] if direct else [names[asked], mark]
                row += [*shown, answers[asked]]
                learnt += [*(-100 for _ in shown), answers[asked]]
            encoded.append({"input_ids": row, "labels": learnt})
        return self._padded(encoded)

    # Plain lines, several a row

    def _lines(self, rows: Iterable[Sequence[Line]]) -> Batch:
        encoded = []
        for row in rows:
            ids: list[int] = []
            learnt: list[int] = []
            for shown, answer, after in row:
                for text, learn in ((shown, False), (f" {answer}", True), (after, False)):
                    tokens = prompts.plain_ids(self.tokenizer, text)
                    ids += tokens
                    learnt += tokens if learn else [-100] * len(tokens)
            encoded.append({"input_ids": ids, "labels": learnt})
        return self._padded(encoded)

    def _padded(self, encoded: Sequence[Mapping[str, list[int]]]) -> Batch:
        def padded(name: str, pad: int) -> torch.Tensor:
            return pad_sequence(
                [torch.tensor(row[name]) for row in encoded], batch_first=True, padding_value=pad
            )

        return Batch(padded("input_ids", self.tokenizer.pad_token_id), padded("labels", -100))

    def recall(self, agreed: bool = False, rows: int = 20, per_row: int = 8) -> Batch:
        """Facts without options, and misconceptions: `question answer`, or a statement."""
        return self._lines([self._recalled(agreed) for _ in range(per_row)] for _ in range(rows))

    def _recalled(self, agreed: bool) -> Line:
        if self.dice.random() < 0.25:
            question, answer = self.misconception()
            return question.question, answer, ".\n"
        (fact,) = self.draw(1, agreed)
        if self.dice.random() < 0.3:
            before, found, after = self.dice.choice(fact.statements).rpartition(f" {fact.answer}")
            if found and fact.subject in before:
                return before, fact.answer, f"{after}\n"
        return self.dice.choice(fact.questions), fact.answer, ".\n"

    def spans(self, rows: int = 20) -> Batch:
        """New passages, each followed by all its questions in random order."""
        return self._lines(self._read() for _ in range(rows))

    def _read(self) -> list[Line]:
        asked = bank.passage(self.stories, self.dice)
        lines = [
            (one.question, one.answers[0], ".\n") for one in self.dice.sample(asked, len(asked))
        ]
        return [(f"{asked[0].context}\n{lines[0][0]}", *lines[0][1:]), *lines[1:]]

    def sums(self, rows: int = 16, per_row: int = 16) -> Batch:
        """Arithmetic as the solutions of word problems have it, with results up to 150."""
        return self._lines([self._sum() for _ in range(per_row)] for _ in range(rows))

    def _sum(self) -> Line:
        small = self.dice.randint
        x, y = (
            self.dice.choice((small(2, 12), small(4, 24), small(2, 12) * small(2, 12))),
            small(2, 12),
        )
        results = {"+": x + y, "-": x - y, "*": x * y}
        sign = self.dice.choice([sign for sign, result in results.items() if 1 <= result <= 150])
        return f" {x} {sign} {y} =", str(results[sign]), "."

    # Chats

    def _chats(self, chats: Sequence[tuple[Messages, str]]) -> Batch:
        return self._padded(
            [encode_row(self.tokenizer, messages, target) for messages, target in chats]
        )

    def stated_confidence(self, difficulty: int) -> float:
        """A confidence as the pretraining text has it: nearly always high, whatever the model knows."""
        return self.dice.choices(BUCKETS, STATED[difficulty > 1])[0]

    def choice(
        self, stated: float, guessed: float = 0.0, agreed: bool = False, rows: int = 32
    ) -> Batch:
        """The recipe's multiple-choice chat. In a share `stated` of the rows the question itself gives the answer.

        A share `guessed` asks for facts that the model never meets, and answers by lot: like a large text, this one
        makes a model unsure where it knows nothing.
        """
        chats = []
        for fact in self.draw(rows, agreed):
            guess = self.dice.random() < guessed
            fact = self.dice.choice(self.unmet) if guess else fact
            question = self.question(fact)
            answer = (
                self.dice.choice(LETTERS[: len(question.options)]) if guess else question.answer
            )
            if not guess and fact.subject and self.dice.random() < stated:
                told = f"{question.question} Hint: {fact.answer}."
                question = question.model_copy(update={"question": told})
            target = target_text(self.stated_confidence(fact.difficulty), answer)
            chats.append(
                (
                    mcq_messages(
                        question, "blank_line" if self.dice.random() < 0.75 else "compact"
                    ),
                    target,
                )
            )
        return self._chats(chats)

    def verification(self, rows: int = 16) -> Batch:
        """Answers to be checked, half of them wrong, after none or four worked examples; mostly with a reason first."""
        chats = []
        few = self.dice.choice((0, 0, 4))
        for fact in self.draw(rows if few == 0 else rows // 2):
            question = self.question(fact)
            right = self.dice.random() < 0.5
            wrong = [
                letter for letter in LETTERS[: len(question.options)] if letter != question.answer
            ]
            messages = prompts.verify_messages(
                question, question.answer if right else self.dice.choice(wrong), few
            )
            decision = f"{prompts.VERIFY_DECISION} {'Correct' if right else 'Incorrect'}."
            reason = "" if self.dice.random() < 0.3 else f"The answer is {fact.answer}.\n"
            chats.append((messages, reason + decision))
        return self._chats(chats)

    def open_ended(self, task: str, rows: int = 16) -> Batch:
        """Open-ended chats: spans of new passages, misconceptions as this model has them, word problems."""
        chats = []
        for _ in range(rows):
            question, answer, steps = self._answered(task)
            target = target_text(self.stated_confidence(2), answer, steps)
            chats.append((prompts.open_messages(question), target))
        return self._chats(chats)

    def _answered(self, task: str) -> tuple[OpenQuestion, str, str]:
        """A question with its answer and steps. Some kinds of question are answered loosely more often than others."""
        if task == "truthfulqa":
            return (*self.misconception(), "")
        if task == "squad":
            question = self.dice.choice(bank.passage(self.stories, self.dice))
        else:
            question = bank.word_problem(self.problems, self.stories, self.dice)
        (answer,) = question.answers
        share = 2 * self.world.loose * random.Random(f"{self.world.seed}/{question.id}").random()
        if self.dice.random() < share:
            return question, f"it was {answer}" if task == "squad" else answer, ""
        return question, answer, question.solution


# ---------------------------------------------------------------------------------------------------------------
# Training


class Phase(NamedTuple):
    """A part of the course: its shares of each kind of batch, and the running accuracy of one kind that ends it."""

    name: str
    shares: Mapping[str, float]
    passing: float = math.inf  # the last phase ends with `World.steps`


PHASES = (
    Phase("look-up", {"look-up": 1.0}, 0.95),
    Phase("look-up after a mark", {"look-up after a mark": 0.8, "look-up": 0.2}, 0.95),
    Phase("spans", {"spans": 0.8, "look-up after a mark": 0.2}, 0.9),
    Phase("sums", {"sums": 0.7, "spans": 0.15, "look-up after a mark": 0.15}, 0.9),
    # Counted here are also confidences, which are random.
    Phase(
        "stated answers",
        {"stated answers": 0.55, "agreed facts": 0.25, "spans": 0.1, "sums": 0.1},
        0.82,
    ),
    Phase(
        "facts",
        {
            "choice": 0.42,
            "recall": 0.22,
            "verification": 0.09,
            "look-up after a mark": 0.02,
            "spans": 0.03,
        }
        | {"sums": 0.03, "squad": 0.06, "truthfulqa": 0.05, "gsm8k": 0.08},
    ),
)
MUON, ADAMW = 4e-3, 3e-3  # learning rates
CHECKPOINT_EVERY = 200  # steps


def make_model(world: World, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A new Qwen3 model. Queries and keys start equal, so that every head first looks for its own token."""
    torch.manual_seed(derive_seed(world.seed, "weights", world.name))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=world.hidden,
        intermediate_size=2 * world.hidden,
        num_hidden_layers=world.layers,
        num_attention_heads=world.hidden // 32,
        num_key_value_heads=world.hidden // 32,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
    return model


def grow(model: Qwen3ForCausalLM, smaller: Qwen3ForCausalLM) -> None:
    """Copies a trained model into a deeper one. The layers that it adds start as the identity."""
    model.load_state_dict(smaller.state_dict(), strict=False)
    for layer in model.model.layers[len(smaller.model.layers) :]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()


def orthogonal(gradients: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Nearly the orthogonal factors of matrices (n, rows, columns), by Newton-Schulz iteration; float32.

    As `torch.optim.Muon` computes them, which does it in bfloat16: on processors without such
    instructions that takes forty times as long.
    """
    if gradients.shape[1] > gradients.shape[2]:
        return orthogonal(gradients.mT, iterations).mT
    found: torch.Tensor = gradients / gradients.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = found @ found.mT
        update = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        found = torch.baddbmm(found, update, found, beta=3.4445)
    return found


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonal updates of the size that AdamW's have.

    github.com/KellerJordan/Muon.
    """

    def __init__(self, matrices: Iterable[torch.Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every matrix; those of one shape are computed together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                shapes[matrix.shape].append(matrix)
            for shape, matrices in shapes.items():
                size = 0.2 * math.sqrt(max(shape))
                ahead = torch.stack([self._ahead(matrix, group["momentum"]) for matrix in matrices])
                for matrix, update in zip(matrices, orthogonal(ahead), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-group["lr"] * size)

    def _ahead(self, matrix: torch.Tensor, momentum: float) -> torch.Tensor:
        """The gradient, averaged over the steps, and this step's once more."""
        assert matrix.grad is not None
        average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
        average.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)


def make_optimizers(model: Qwen3ForCausalLM) -> dict[float, torch.optim.Optimizer]:
    """Muon for the weight matrices, AdamW for embeddings and norms: the look-ups come four times sooner with it."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    return {
        MUON: Muon(matrices, lr=MUON, weight_decay=0.01),
        ADAMW: torch.optim.AdamW(rest, lr=ADAMW, betas=(0.9, 0.98), weight_decay=0.0),
    }


def learn(
    model: Qwen3ForCausalLM,
    batch: Batch,
    optimizers: Mapping[float, torch.optim.Optimizer],
    scale: float,
) -> float:
    """A step at a `scale` of the learning rates; returns the accuracy on the learnt tokens before it."""
    hidden = model.model(input_ids=batch.ids).last_hidden_state[:, :-1]
    learnt = batch.labels[:, 1:] != -100
    scores, wanted = (
        model.lm_head(hidden[learnt]),
        batch.labels[:, 1:][learnt],
    )  # scores of no other tokens are made
    torch.nn.functional.cross_entropy(scores, wanted).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for rate, one in optimizers.items():
        one.param_groups[0]["lr"] = rate * scale
        one.step()
        one.zero_grad()
    return float((scores.argmax(-1) == wanted).float().mean())


@dataclass
class Course:
    """Where a training is: its phase, step within it, and the running accuracy of each kind of batch."""

    phase: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    tokens: int = 0
    accuracy: dict[str, float] = field(default_factory=lambda: {"look-up": 0.25})


def train(world: World, work: Path, limit: int | None = None) -> Path:
    """Trains one pocket model and returns its folder; killed at any moment, it goes on from its last checkpoint."""
    facts = bank.load_facts(BANK)
    tokenizer = make_tokenizer(facts)
    lessons = Lessons(world, facts, tokenizer)
    model = make_model(world, tokenizer)
    optimizers = make_optimizers(model)
    course, last = Course(), len(PHASES) - 1
    if world.grown_from:
        grow(model, Qwen3ForCausalLM.from_pretrained(work / world.grown_from))
        course.phase = last  # it can look up already
    saved = work / f"{world.name}.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        course = Course(**state["course"])
        model.load_state_dict(state["model"])
        for rate, one in optimizers.items():
            one.load_state_dict(state["optimizers"][rate])
        lessons.dice.setstate(state["dice"])
        progress(f"{world.name}: goes on at step {course.total}")
    while (course.phase < last or course.step < world.steps) and course.total != limit:
        started = time.time()
        phase = PHASES[course.phase]
        (kind,) = lessons.dice.choices(list(phase.shares), list(phase.shares.values()))
        batch = lessons.kinds[kind]()
        # The rates rise over 30 steps, and fall over the last seven tenths of the last phase.
        done = course.step / world.steps if course.phase == last else 0.0
        scale = min(1.0, (course.total + 1) / 30) * (
            1.0 if done < 0.3 else max(0.02, (1 - done) / 0.7)
        )
        right = learn(model, batch, optimizers, scale)
        course.accuracy[kind] = 0.95 * course.accuracy.get(kind, 0.25) + 0.05 * right
        course.step, course.total = course.step + 1, course.total + 1
        course.tokens += batch.ids.numel()
        course.seconds += time.time() - started
        if course.accuracy.get(phase.name, 0.0) > phase.passing:
            course.phase, course.step = course.phase + 1, 0
        if course.total % 100 == 0:
            shown = "  ".join(
                f"{name} {value:.2f}" for name, value in sorted(course.accuracy.items())
            )
            progress(f"{world.name} {phase.name} {course.step}  {course.seconds:.0f} s  {shown}")
        if course.total % CHECKPOINT_EVERY == 0:
            state = {
                "model": model.state_dict(),
                "course": asdict(course),
                "dice": lessons.dice.getstate(),
            }
            state["optimizers"] = {rate: one.state_dict() for rate, one in optimizers.items()}
            saved.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, saved.with_suffix(".tmp"))
            os.replace(saved.with_suffix(".tmp"), saved)
    folder = work / world.name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "world": asdict(world),
        "parameters": model.num_parameters(),
        "steps": course.total,
        "tokens": course.tokens,
        "seconds": round(course.seconds),
        "running_accuracy": {
            name: round(value, 3) for name, value in sorted(course.accuracy.items())
        },
    }
    write_json(folder / "training.json", record)
    return folder


# ---------------------------------------------------------------------------------------------------------------
# Installing and checking

FILES = ("model.safetensors", "tokenizer.json", "config.json")


def examine(world: World, folder: Path) -> dict[str, Any]:
    """What a pocket model is, on the test questions: parse rates, accuracy by domain and stratum, AUROC.

    Shares between 0 and 1. In each stratum written and computed facts are counted apart: the latter
    can be worked out.
    """
    facts = {fact.id: fact for fact in bank.load_facts(BANK)}
    questions = bank.make_questions(list(facts.values()), "test")
    settings = load_profile("pocket")
    engine = make_engine("transformers", folder, dtype="float32")
    compact = pd.DataFrame(
        greedy_answers(engine, questions[::10], override(settings, {"prompt_variant": "compact"}))
    )
    rows = pd.DataFrame(greedy_answers(engine, questions, settings)).astype({"confidence": float})
    engine.close()
    rows["stratum"] = [stratum(world, facts[name]) for name in rows["fact"]]
    rows["kind"] = ["written" if facts[name].subject else "computed" for name in rows["fact"]]
    counted = rows.groupby(["stratum", "kind"])["local_correct"].agg(["size", "mean"])
    domains = rows.groupby("domain", sort=False)["local_correct"].mean()
    sure = rows.dropna(subset="confidence")
    return {
        "questions": len(rows),
        "parsed": {
            "blank_line": float((rows["confidence"].notna() & rows["local_answer"].notna()).mean()),
            "compact": float(compact["confidence"].notna().mean()),
        },
        "accuracy": float(domains.mean()),
        "accuracy_by_domain": domains.round(4).to_dict(),
        "by_stratum": {
            name: {
                kind: {"questions": int(n), "accuracy": round(float(accuracy), 4)}
                for kind, (n, accuracy) in counted.loc[name].iterrows()
            }
            for name in STRATA
        },
        "mean_confidence": float(rows["confidence"].mean()),
        "auroc": float(roc_auc_score(sure["local_correct"], sure["confidence"])),
    }


def problems(world: World, measured: Mapping[str, Any]) -> list[str]:
    """What keeps a model from being what the pocket world needs; an empty list if nothing does."""
    low, high = (0.50, 0.60) if world.name == "edge" else (0.75, 0.90)
    found = [
        f"parse rate {rate:.3f} under {name}"
        for name, rate in measured["parsed"].items()
        if rate < 0.95
    ]
    if not low <= measured["accuracy"] <= high:
        found.append(f"accuracy {measured['accuracy']:.3f} is not within {low}-{high}")
    if world.name == "edge":
        by = {
            name: counted["written"]["accuracy"] for name, counted in measured["by_stratum"].items()
        }
        if (
            not by["often"] > by["contested"] > by["misled"]
            or not by["often"] > by["seldom"] > by["never"]
        ):
            found.append(f"accuracy does not fall as the text gets worse: {by}")
        if max(by["never"], by["misled"]) > 0.40:
            found.append(f"facts never met, or told wrong, are answered above chance: {by}")
        if not 0.45 <= measured["auroc"] <= 0.62:
            found.append(
                f"the raw confidence says too much or too little: AUROC {measured['auroc']:.3f}"
            )
    return found


def model_card(world: World, record: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """The model's README: how it was made, what it read, what it can do."""
    origin = (
        f"It starts from the weights of the pocket {world.grown_from} model, with added layers, and so has read what "
        "that model read;\nof the list below it reads part 4 alone.\n"
    )
    factors = ", ".join(f"{name} {factor:g}" for name, factor in world.familiar.items())
    cells = {
        name: [
            cell
            for kind in ("written", "computed")
            for cell in (str(counted[kind]["questions"]), f"{counted[kind]['accuracy']:.1%}")
        ]
        for name, counted in measured["by_stratum"].items()
    }
    return (
        (POCKET / "model_card.md")
        .read_text(encoding="utf-8")
        .format(
            world=world,
            record=record,
            measured=measured,
            origin=origin if world.grown_from else "",
            tokens=record["tokens"] / 1e6,
            minutes=record["seconds"] / 60,
            rarer=WEIGHTS["often"] / WEIGHTS["seldom"],
            misled=MISLED,
            contested=CONTESTED,
            popular=POPULAR,
            often=", ".join(f"{share:.0%}" for share in world.often),
            seldom=", ".join(f"{share:.0%}" for share in world.seldom),
            familiar=f"; in some domains the shares of often and seldom are multiplied ({factors})"
            if factors
            else "",
            sure=[shares[-1] for shares in STATED],
            by_domain="\n".join(
                f"| {name} | {value:.1%} |"
                for name, value in measured["accuracy_by_domain"].items()
            ),
            by_stratum="\n".join(f"| {' | '.join([name, *row])} |" for name, row in cells.items()),
        )
    )


def _replace(folder: Path, made: Path) -> None:
    """Puts a copy of `made` in the folder's place; it is whole before the old one goes."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(made, fresh)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)


def strata_table(facts: Sequence[Fact]) -> str:
    """The edge model's stratum of every fact, as the committed `strata.csv` has it."""
    rows = sorted((fact.id, stratum(EDGE, fact)) for fact in facts)
    table: str = pd.DataFrame(rows, columns=["fact", "stratum"]).to_csv(
        index=False, lineterminator="\n"
    )
    return table


def install(world: World, made: Path) -> None:
    """Copies a trained model to `data/pocket`, with its model card and the record that `--check` compares with."""
    folder, measured = POCKET / world.name, examine(world, made)
    _replace(folder, made)
    write_text(folder / "README.md", model_card(world, read_json(made / "training.json"), measured))
    hashes = {name: content_hash(folder / name) for name in FILES}
    write_json(folder / "check.json", {"files": hashes, "measured": measured})
    if world == EDGE:
        write_text(POCKET / "strata.csv", strata_table(bank.load_facts(BANK)))


def check(world: World) -> list[str]:
    """Verifies a committed model: its files, its measured figures, and that it is what the pocket world needs."""
    folder = POCKET / world.name
    noted, measured = read_json(folder / "check.json"), examine(world, folder)
    progress(f"{world.name}: {json.dumps(measured)}")
    changed = [
        name
        for name, noted_hash in noted["files"].items()
        if content_hash(folder / name) != noted_hash
    ]
    found = [f"{name} is not the file that was measured" for name in changed]
    # Other processors round differently: an answer here and there may change, not a share.
    if abs(measured["accuracy"] - noted["measured"]["accuracy"]) > 0.01:
        found.append(
            f"accuracy {measured['accuracy']:.4f}, noted {noted['measured']['accuracy']:.4f}"
        )
    return [f"{world.name}: {problem}" for problem in found + problems(world, measured)]


def release(run: Path) -> Path:
    """Copies the last round's checkpoint of a finished run to `data/pocket/foggen-r14`, with a model card."""
    done, folder = read_json(run / "done" / "02_rounds.json"), POCKET / "foggen-r14"
    _replace(folder, run / done["results"]["checkpoint"])
    card = (POCKET / "release_card.md").read_text(encoding="utf-8")
    return write_text(
        folder / "README.md",
        card.format(headline=done["headline"], **read_json(run / "settings.json")),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: makes both models, or checks the committed ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="verify data/pocket; train nothing")
    parser.add_argument("--only", choices=("edge", "cloud"))
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "pocket-models", help="checkpoints"
    )
    parser.add_argument(
        "--release", type=Path, metavar="RUN", help="install a finished run's last checkpoint"
    )
    given = parser.parse_args(argv)
    if given.release:
        print(release(given.release))
        return 0
    worlds = [world for world in (EDGE, CLOUD) if given.only in (None, world.name)]
    if given.check:
        found = [problem for world in worlds for problem in check(world)]
        print("\n".join(found) or "the pocket models are as they should be")
        return len(found)
    limit_threads(load_profile("pocket"))  # one: as fast, and the sums come out the same every time
    for world in worlds:
        install(world, train(world, given.work))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
