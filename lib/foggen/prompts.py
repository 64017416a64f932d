"""What the models read and write: prompts, their token ids, and the parser of the answers.

Holds the recipe's texts and must not know how a model is run or trained. A taught answer:

    Confidence: 0.75
    Final answer: B
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from foggen.questions import OpenQuestion, Question

Messages = list[dict[str, str]]
Variant = Literal["blank_line", "compact"]

BUCKETS = (0.0, 0.25, 0.5, 0.75, 1.0)
BUCKET_TEXTS = ("0.0", "0.25", "0.5", "0.75", "1.0")
CONFIDENCE_PREFIX = "Confidence:"
ANSWER_PREFIX = "\nFinal answer:"
LETTERS = string.ascii_uppercase

# ---------------------------------------------------------------------------------------------
# Prompts

_SYSTEM = """\
You are a self-aware {} assistant.

Rules:
- Do not output <think> tags.
- First, assess your confidence in solving this question.
- Then {}.
- Output format:
  Confidence: <0.0|0.25|0.5|0.75|1.0>
  {}"""
_MCQ = _SYSTEM.format("multiple-choice", "give your answer", "Final answer: <OPTION_LETTER>")
# The public model cards show this prompt twice, with different white space; both are variants.
SYSTEM_MCQ = {"blank_line": _MCQ, "compact": _MCQ.replace("\n\n", "\n").replace("\n  ", "\n")}
_SPAN = "give your answer, a short span copied from the passage"
_SENTENCE = "give your answer in one short sentence"
_REASON = "reason step by step, and give your answer as a number"
SYSTEM_OPEN = {
    "squad": _SYSTEM.format("reading comprehension", _SPAN, "Final answer: <SPAN>"),
    "truthfulqa": _SYSTEM.format("factual question", _SENTENCE, "Final answer: <ANSWER>"),
    "gsm8k": _SYSTEM.format("math", _REASON, "<REASONING>\n  Final answer: <NUMBER>"),
}


def _chat(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _passage(context: str, name: str = "Passage") -> str:
    return f"{name}: {context}\n\n" if context.strip() else ""


def option_lines(options: Sequence[str]) -> str:
    """One line per option: `A. first`, `B. second`, ..."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))


def user_turn(question: Question, variant: Variant = "blank_line") -> str:
    """The user turn: passage (if any), question, a blank line (not in `compact`), the options."""
    gap = "\n\n" if variant == "blank_line" else "\n"
    return f"{_passage(question.context)}{question.question}{gap}{option_lines(question.options)}"


def mcq_messages(question: Question, variant: Variant = "blank_line") -> Messages:
    """The recipe's multiple-choice prompt as chat messages."""
    return _chat(SYSTEM_MCQ[variant], user_turn(question, variant))


def open_messages(question: OpenQuestion) -> Messages:
    """The prompt of an open-ended question: the system prompt of its task, passage, question."""
    user = f"{_passage(question.context)}Question: {question.question}"
    return _chat(SYSTEM_OPEN[question.task], user)


def target_text(confidence: float, answer: str, reasoning: str = "") -> str:
    """The assistant turn that fine-tuning teaches: confidence, reasoning (if any), answer."""
    bucket = BUCKET_TEXTS[BUCKETS.index(confidence)]
    middle = f"\n{reasoning}" if reasoning else ""
    return f"{CONFIDENCE_PREFIX} {bucket}{middle}{ANSWER_PREFIX} {answer}"


# ---------------------------------------------------------------------------------------------
# Self-verification (AutoMix): a few-shot text in one user turn, continued by the model's judgement

VERIFY_SYSTEM = "You check answers. Decide if the AI generated answer is correct."
VERIFY_DECISION = "Verification Decision: The AI generated answer is"
_INSTRUCTION = "Decide if the AI generated answer is correct or incorrect, and say why."


def verification_text(question: str, options: Sequence[str], answer: str, context: str) -> str:
    """A question with the answer (a letter) to be checked, in the order of AutoMix's fields."""
    asked = f"{_passage(context, 'Context')}Question: {question}\n\n{option_lines(options)}"
    stated = f"AI Generated Answer: {answer}. {options[LETTERS.index(answer)]}"
    return f"{asked}\n\n{stated}\nInstruction: {_INSTRUCTION}\nEvaluation:"


def _worked(question: str, options: str, answer: str, evaluation: str, decision: str) -> str:
    """A worked verification: the text of one with its evaluation and decision."""
    shown = verification_text(question, options.split(), answer, context="")
    return f"{shown} {evaluation}\n{VERIFY_DECISION} {decision}."


EXEMPLARS = (
    _worked("How many days are in a leap year?", "364 365 366 367", "C",
            "A leap year has one day more than 365.", "Correct"),
    _worked("Which animal lays eggs?", "dog hen cow cat", "A",
            "Dogs give birth to puppies, and hens lay eggs.", "Incorrect"),
    _worked("What do you call frozen water?", "sand steam smoke ice", "D",
            "Water that freezes turns into ice.", "Correct"),
    _worked("Which color do you get from blue and yellow?", "red green black white", "C",
            "Blue and yellow give green, and not black.", "Incorrect"),
)  # fmt: skip


def verify_messages(question: Question, answer: str, shots: int = len(EXEMPLARS)) -> Messages:
    """Few-shot verification of `answer` (a letter): 4 examples, two correct and two incorrect."""
    asked = verification_text(question.question, question.options, answer, question.context)
    return _chat(VERIFY_SYSTEM, "\n\n".join([*EXEMPLARS[:shots], asked]))


def parse_verification(text: str) -> bool | None:
    """The decision of a verification: True (correct), False (incorrect), None without one.

    It is the first after `Verification Decision`, whatever the model runs on with; without that
    mark the last, since an evaluation weighs before it decides.
    """
    text = text.replace(_INSTRUCTION, "")  # of which a model that runs on writes the next one
    head, *tail = re.split(r"(?i)verification\s+decision", text, maxsplit=1)
    decision = r"(?i)answer\s+is\W+(incorrect|correct|not\s+correct)\b"
    decisions = re.findall(decision, tail[0])[:1] if tail else re.findall(decision, head)
    return decisions[-1].lower() == "correct" if decisions else None


# ---------------------------------------------------------------------------------------------
# Parser


class Response(NamedTuple):
    """The confidence bucket and the answer that a model states; None where it cannot be read."""

    confidence: float | None
    answer: str | None


class Route(NamedTuple):
    """Where a query goes: `local` keeps the edge model's answer, `cloud` asks the strong model."""

    action: Literal["local", "cloud"]
    confidence: float | None
    answer: str | None


# A mark counts with any emphasis and in full width too: the first one is what the model states.
_COLON = r"[\s*_]*[:\uff1a]"
CONFIDENCE_MARK = re.compile(rf"(?i)(?<![^\W_])confidence{_COLON}\s*")
ANSWER_MARK = re.compile(rf"(?i)(?<![^\W_])final\s+answer{_COLON}")
_LINE_END = r"[^\S\n]*(?:\n|\Z)"
# A bucket has the end of a sentence behind it at most, which the comma of `1,5` is not
_BUCKET_END = rf"(?:[.,;!]+(?!\s*\d))?(?:{_LINE_END}|\s+final\s+answer\s*:)"
_BUCKET = re.compile(rf"(?i)([01](?:\.0+)?|0\.(?:25|5|75)0*){_BUCKET_END}")
_OPEN, _CLOSE = r"(?:\*\*|\(|\$|\\boxed\{)*", r"(?:\*\*|[.:)}$])"
_LETTER = re.compile(rf"\s*{_OPEN}([A-Za-z]){_CLOSE}*{_LINE_END}")
_LETTER_WITH_TEXT = re.compile(rf"[^\S\n]*{_OPEN}([A-Za-z]){_CLOSE}+[^\S\n]+(\S.*)")
# A single letter that is no article: of `a car or B`, the B
_ARTICLE = r"a\s+(?!and\b|or\b)\w\w"
_SINGLE_LETTER = re.compile(rf"(?<![^\W_])(?<!\w['’])(?!{_ARTICLE})([A-Za-z])(?![^\W_]|['’]\w)")


def _after(mark: re.Pattern[str], text: str) -> str:
    """What follows the first mark; "" without one."""
    return "".join(mark.split(text, maxsplit=1)[1:])


def _letter(text: str, letters: str) -> str | None:
    """The stated letter, unless the option's text behind it names another one (`B) or C`)."""
    answer = _after(ANSWER_MARK, text)
    stated = _LETTER.match(answer) or _LETTER_WITH_TEXT.match(answer)
    if not stated:
        return None
    letter, behind = stated[1].upper(), stated[0][stated.end(1) :]
    behind = re.sub(r"\A(\W*)A(?=\s+\w\w)", r"\1a", behind)  # `B) A car` begins with an article
    named = {letter, *"".join(_SINGLE_LETTER.findall(behind)).upper()}
    return letter if named & set(letters) == {letter} else None


def parse_response(text: str, options: int = 26) -> Response:
    r"""Reads `Confidence: <bucket>` and `Final answer: <letter>`; never raises, whatever the text.

    The FIRST mark of either counts, readable or not: a model commits to its first statement, and
    what it runs on with afterwards cannot change it. Case and white space do not matter.

    Confidence: a bucket with any number of trailing zeros (`1`, `0.50`) that stands alone on its
    line, before the end of a sentence or `Final answer:`. `1%`, `1/5`, `1 out of 10`, `1e-2`,
    `0,75`, `0.5-0.75` and `0.7` are no confidence.

    Answer: one letter among the question's `options`, alone on its line: `B`, `(B)`, `B.`, `B)`,
    `**B**`, `\boxed{B}`. A letter so marked may have its option's text behind it on the line of
    the mark: `B) text`, `B. text`. `a car`, `C++`, `B12` and `A or B` are no answer, and neither
    is a text that names another letter (`D. Both A and B`).
    """
    bucket = _BUCKET.match(_after(CONFIDENCE_MARK, text))
    return Response(float(bucket[1]) if bucket else None, _letter(text, LETTERS[:options]))


def parse_open_response(text: str) -> Response:
    """As `parse_response`; the answer is the text after `Final answer:`, to the end of its line."""
    answer = _after(ANSWER_MARK, text).split("\n", 1)[0].strip()
    return Response(parse_response(text).confidence, answer or None)


def route_query(text: str, tau: float = 0.5, options: int = 26) -> Route:
    """Keeps a readable answer whose confidence is at least `tau`; all else goes to the cloud."""
    confidence, answer = parse_response(text, options)
    keep = answer is not None and confidence is not None and confidence >= tau
    return Route("local" if keep else "cloud", confidence, answer)


# ---------------------------------------------------------------------------------------------
# From messages to token ids

_CONTENT = "\ue000"  # stands for the content of a message while the template is rendered
# Templates that state today's date get Llama's default one: prompts must not change overnight.
_DATE = date(2024, 7, 26)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of a chat up to where the assistant speaks; contents are always plain text.

    A question may contain `<|im_end|>` or other chat markup. Rendering the template to one string
    and tokenising it would turn that text into control tokens. So the template is rendered around
    placeholders: its text may become control tokens, the contents never do. A last message of
    the role `assistant` is a prefix that the model continues, without an end-of-turn token.

    Raises ValueError, naming the model, for a template that leaves out or refuses a message.
    """
    head, *pieces = _template_pieces(tokenizer, tuple(message["role"] for message in messages))
    ids: list[int] = tokenizer.encode(head, add_special_tokens=False)
    for message, piece in zip(messages, pieces, strict=True):
        ids += plain_ids(tokenizer, message["content"])
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


@lru_cache(maxsize=64)
def _template_pieces(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> list[str]:
    """The template's text before, between and after the contents of a chat of these roles.

    Thousands of prompts share it, and rendering a template is slower than tokenising a question.
    """
    if roles[-1] == "assistant":
        return [*_template_pieces(tokenizer, roles[:-1]), ""]
    turns = [{"role": role, "content": _CONTENT} for role in roles]
    pieces = _rendered(tokenizer, turns, add_generation_prompt=True).split(_CONTENT)
    if len(pieces) != len(roles) + 1 and roles[:2] == ("system", "user"):
        # Without a system role its text leads the first user turn
        turns[1]["content"] = f"{_CONTENT}\n\n{_CONTENT}"
        pieces = _rendered(tokenizer, turns[1:], add_generation_prompt=True).split(_CONTENT)
    if len(pieces) != len(roles) + 1:
        raise ValueError(f"{tokenizer.name_or_path}: the template leaves out a message")
    return pieces


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Messages, **options: Any) -> str:
    """A chat as the template's text; "" where the template refuses it."""
    options |= {"enable_thinking": False, "strftime_now": _DATE.strftime}
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except TemplateError:
        return ""


@lru_cache(maxsize=1024)
def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a text in which everything that looks like a special token is plain text.

    Cached for what prompts share: the system prompt, and the texts that are scored.
    """
    return tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    r"""The tokens after an assistant's text, up to the first control token: the end of its turn.

    `[<|im_end|>]` in most templates, `[\n, <|EOT|>]` where a line break precedes the mark. All of
    them are learnt; generation ends at the last one. Raises ValueError without a mark.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _CONTENT}]
    _, content, ending = _rendered(tokenizer, turns).rpartition(_CONTENT)
    ids = tokenizer.encode(ending, add_special_tokens=False) if content else []
    added = tokenizer.added_tokens_decoder
    marks = [place for place, token in enumerate(ids) if token in added and added[token].special]
    if not marks:
        raise ValueError(f"{tokenizer.name_or_path}: a turn ends without control token")
    return ids[: marks[0] + 1]
