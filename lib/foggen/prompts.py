"""What the models read and write: prompts, their token ids, and the parser of the answers.

Holds the recipe's texts and nothing about how a model is run or trained.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from foggen.questions import OpenQuestion, Question

Messages = list[dict[str, str]]
Variant = Literal["blank_line", "compact"]

BUCKETS: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
BUCKET_TEXTS: tuple[str, ...] = ("0.0", "0.25", "0.5", "0.75", "1.0")
CONFIDENCE_PREFIX = "Confidence:"
ANSWER_PREFIX = "\nFinal answer:"
LETTERS = string.ascii_uppercase

_SYSTEM = """\
You are a self-aware {assistant} assistant.

Rules:
- Do not output <think> tags.
- First, assess your confidence in solving this question.
- Then {then}.
- Output format:
  Confidence: <0.0|0.25|0.5|0.75|1.0>
  {form}"""


def _system(assistant: str, then: str, form: str) -> str:
    return _SYSTEM.format(assistant=assistant, then=then, form=form)


_MCQ = _system("multiple-choice", "give your answer", "Final answer: <OPTION_LETTER>")
# The public model cards show the same system prompt twice, with different white space; both are kept as variants.
SYSTEM_MCQ: dict[str, str] = {
    "blank_line": _MCQ,
    "compact": _MCQ.replace("\n\n", "\n").replace("\n  ", "\n"),
}
SYSTEM_OPEN: dict[str, str] = {
    "squad": _system(
        "reading comprehension", "give your answer, a short span copied from the passage", "Final answer: <SPAN>"
    ),
    "truthfulqa": _system("factual question", "give your answer in one short sentence", "Final answer: <ANSWER>"),
    "gsm8k": _system(
        "math", "reason step by step, and give your answer as a number", "<REASONING>\n  Final answer: <NUMBER>"
    ),
}


class Response(NamedTuple):
    """What a model said: the confidence bucket and the answer, each None when it cannot be read."""

    confidence: float | None
    answer: str | None


class Route(NamedTuple):
    """Where a query goes: `local` keeps the edge answer, `cloud` asks the strong model."""

    action: Literal["local", "cloud"]
    confidence: float | None
    answer: str | None


def _chat(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def option_lines(options: Sequence[str]) -> str:
    """One line an option: `A. first`, `B. second`, ..."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))


def user_turn(question: Question, variant: Variant = "blank_line") -> str:
    """The user turn: question text, a blank line (not in `compact`), one line an option."""
    gap = "\n\n" if variant == "blank_line" else "\n"
    return f"{question.question}{gap}{option_lines(question.options)}"


def mcq_messages(question: Question, variant: Variant = "blank_line") -> Messages:
    """The recipe's multiple-choice prompt as chat messages."""
    return _chat(SYSTEM_MCQ[variant], user_turn(question, variant))


def open_messages(question: OpenQuestion) -> Messages:
    """The prompt of an open-ended question: its task's system prompt, then passage (if any) and question."""
    passage = f"Passage: {question.context}\n\n" if question.context else ""
    return _chat(SYSTEM_OPEN[question.task], f"{passage}Question: {question.question}")


def target_text(confidence: float, answer: str, reasoning: str = "") -> str:
    """The assistant turn that supervised fine-tuning teaches: confidence, optional reasoning, answer."""
    middle = f"\n{reasoning}" if reasoning else ""
    return f"{CONFIDENCE_PREFIX} {BUCKET_TEXTS[BUCKETS.index(confidence)]}{middle}{ANSWER_PREFIX} {answer}"


# ---------------------------------------------------------------------------------------------------------------
# Self-verification (AutoMix): a few-shot text in one user turn, continued by the model's own judgement.

VERIFY_SYSTEM = "You check answers. Decide if the AI generated answer is correct."
VERIFY_DECISION = "Verification Decision: The AI generated answer is"
_INSTRUCTION = "Instruction: Decide if the AI generated answer is correct or incorrect, and say why."


class Exemplar(NamedTuple):
    """One worked verification."""

    question: str
    options: tuple[str, ...]
    answer: str
    evaluation: str
    correct: bool


EXEMPLARS: tuple[Exemplar, ...] = (
    Exemplar("How many days are in a leap year?", ("364", "365", "366", "367"), "C",
             "A leap year has one day more than 365.", True),
    Exemplar("Which animal lays eggs?", ("dog", "hen", "cow", "cat"), "A",
             "Dogs give birth to puppies, and hens lay eggs.", False),
    Exemplar("What do you call frozen water?", ("sand", "steam", "smoke", "ice"), "D",
             "Water that freezes turns into ice.", True),
    Exemplar("Which color do you get from blue and yellow?", ("red", "green", "black", "white"), "C",
             "Blue and yellow give green, and not black.", False),
)  # fmt: skip


def verification_text(question: str, options: Sequence[str], answer: str) -> str:
    """One question with the answer to be checked, in AutoMix's field order (no context for multiple choice)."""
    content = options[LETTERS.index(answer)]
    return (
        f"Question: {question}\n\n{option_lines(options)}\n\nAI Generated Answer: {answer}. {content}\n"
        f"{_INSTRUCTION}\nEvaluation:"
    )


def worked_verification(exemplar: Exemplar) -> str:
    """An exemplar as text, with its evaluation and decision."""
    decision = "Correct" if exemplar.correct else "Incorrect"
    shown = verification_text(exemplar.question, exemplar.options, exemplar.answer)
    return f"{shown} {exemplar.evaluation}\n{VERIFY_DECISION} {decision}."


def verify_messages(question: Question, answer: str, shots: int = len(EXEMPLARS)) -> Messages:
    """Few-shot self-verification of `answer` (a letter): 4 worked examples, two correct and two incorrect."""
    shown = [worked_verification(exemplar) for exemplar in EXEMPLARS[:shots]]
    content = "\n\n".join([*shown, verification_text(question.question, question.options, answer)])
    return _chat(VERIFY_SYSTEM, content)


def parse_verification(text: str) -> bool | None:
    """The decision in a verification: True (correct), False (incorrect), None when there is none. Last one wins."""
    found = re.findall(r"answer\s+is\s+(incorrect|correct|not\s+correct)", text, flags=re.IGNORECASE)
    return None if not found else found[-1].lower() == "correct"


# ---------------------------------------------------------------------------------------------------------------
# Reading an answer

_CONFIDENCE = re.compile(r"confidence\s*:\s*([0-9][0-9.]*)", re.IGNORECASE)
# The letter is matched with its case: without, `[A-Za-z]` takes in a few letters beyond ASCII.
_ANSWER = re.compile(r"final\s+answer\s*:\s*\(?((?-i:[A-Za-z]))(?![A-Za-z])", re.IGNORECASE)
_FREE_ANSWER = re.compile(r"final\s+answer\s*:[ \t]*([^\n]*)", re.IGNORECASE)
_BUCKET = re.compile(r"([01](\.0*)?|0\.(25|5|75)0*)\.*")


def _confidence(text: str) -> float | None:
    """Exactly one of the five buckets, written with any number of trailing zeros; everything else is no confidence."""
    said = _CONFIDENCE.search(text)
    return float(said[1].rstrip(".")) if said and _BUCKET.fullmatch(said[1]) else None


def parse_response(text: str, options: int = 26) -> Response:
    """Reads `Confidence: <bucket>` and `Final answer: <letter>`; never raises, whatever the string.

    The FIRST match of each counts: the model commits to its first statement, and text that a model runs on with
    after its answer cannot change it. A number that is not one of the five buckets is no confidence; a letter
    beyond the question's `options` is no answer.
    """
    said = _ANSWER.search(text)
    letter = said[1].upper() if said else None
    return Response(_confidence(text), letter if letter and LETTERS.index(letter) < options else None)


def parse_open_response(text: str) -> Response:
    """As `parse_response`, with free text after `Final answer:` (to the end of its line) as the answer."""
    said = _FREE_ANSWER.search(text)
    return Response(_confidence(text), (said[1].strip() or None) if said else None)


def route_query(text: str, tau: float = 0.5, options: int = 26) -> Route:
    """Keeps the local answer if its confidence is at least `tau`; no readable confidence goes to the cloud."""
    confidence, answer = parse_response(text, options)
    keep = confidence is not None and confidence >= tau
    return Route("local" if keep else "cloud", confidence, answer)


# ---------------------------------------------------------------------------------------------------------------
# From messages to token ids


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of a chat up to where the assistant speaks; contents are always plain text.

    A question may contain `<|im_end|>` or other chat markup. Rendering the template to one string and tokenising
    it would turn that text into control tokens. So the template is rendered around placeholders: its own text may
    become control tokens, the contents never do. A last message of the role `assistant` is a prefix that the model
    continues, without an end-of-turn token.
    """
    last = messages[-1]
    prefix = last["content"] if last["role"] == "assistant" else ""
    chat = messages[:-1] if prefix else messages
    ids: list[int] = []
    for piece in _frame(tokenizer, tuple(message["role"] for message in chat)):
        ids += plain_ids(tokenizer, chat[piece]["content"]) if isinstance(piece, int) else piece
    return ids + plain_ids(tokenizer, prefix)


@lru_cache(maxsize=64)
def _frame(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> list[list[int] | int]:
    """A chat of these roles as the template's token ids, with a message's index where its content goes.

    Thousands of prompts share it, and rendering a template takes longer than tokenising a question.
    """
    marks = [f"\ue000{index}\ue001" for index in range(len(roles))]
    shells = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    pieces = re.split("\ue000([0-9]+)\ue001", _rendered(tokenizer, shells))
    return [int(piece) if place % 2 else _control_ids(tokenizer, piece) for place, piece in enumerate(pieces) if piece]


def _rendered(tokenizer: PreTrainedTokenizerBase, shells: Messages) -> str:
    """The template's text around placeholders. One without a system role gets it at the head of the first user turn."""
    from jinja2 import TemplateError

    trouble: Exception = ValueError("the model's chat template leaves out a message")
    try:
        rendered = _applied(tokenizer, shells, add_generation_prompt=True)
        if all(shell["content"] in rendered for shell in shells):
            return rendered
    except TemplateError as error:
        trouble = error
    if shells[0]["role"] != "system" or len(shells) < 2:
        raise trouble
    system, first, *rest = shells
    joined = {"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}
    return _rendered(tokenizer, [joined, *rest])


def _applied(tokenizer: PreTrainedTokenizerBase, chat: Messages, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=False, **options))


def _control_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a template's own text, which may hold control tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, with everything that looks like a control token taken as plain characters."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template puts after an assistant turn: what a trained answer ends with."""
    mark = "\ue000"
    rendered = _applied(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}])
    return _control_ids(tokenizer, rendered.rsplit(mark, 1)[1])[0]
