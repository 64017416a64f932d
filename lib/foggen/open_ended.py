"""Open-ended questions: scorers with their failure modes, evaluation, and the rows of R15.

Holds three tasks: `squad` (extractive reading), `truthfulqa` (adversarial facts) and `gsm8k` (word
problems with a chain of thought). Must not know how a model is run or trained, where questions come
from, nor how accuracies are compared.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from itertools import groupby
from types import SimpleNamespace

from foggen import prompts
from foggen.config import Settings
from foggen.engines import NOTHING, Completion, Engine, Sampling
from foggen.labels import SftRow, bucket, recipe_sampling
from foggen.questions import TASKS, OpenQuestion
from foggen.store import Row

STOP = ("\nQuestion:", "\nPassage:")  # a model that runs on starts the next question
Questions = Sequence[OpenQuestion]

# --------------------------------------------------------------------------------------------------
# Scorers: SQuAD


def squad_words(text: str) -> list[str]:
    """Words in SQuAD v1.1's normal form: lower case, no ASCII punctuation, no articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact_match(answer: str, references: Sequence[str]) -> float:
    """SQuAD v1.1 exact match (0 or 1): the words are a reference's. This task's headline rule.

    It is the official measure, it is 0 or 1 as routing and labels need it, and a long answer cannot
    buy a point. Fails: right answers in other words, with a word more or less, or with a hyphen for
    a dash in a score (only ASCII punctuation is dropped, which makes 2316 of 23-16); says nothing
    of how near a miss was.
    """
    return float(squad_words(answer) in map(squad_words, references))


# --------------------------------------------------------------------------------------------------
# Scorers: GSM8K

_GAP = r"(?:\{,\}|,?\\[,;:! ]|[,'’\u00a0\u2000-\u200a\u202f])"  # between thousands, as in 9{,}500
_CLEANING = {
    r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}": r"\1/\2",
    r"[\u2010-\u2015\u2212\ufe63\uff0d]": "-",  # hyphens, dashes and minus signs
    rf"(?<=\d){_GAP}(?=(?:\d\d\d?{_GAP}){{0,20}}\d\d\d(?!\d))": "",  # 1,234 and 1,23,456
    r"[\\$\u00a2-\u00a5\u20a0-\u20cf]|\^\{?\d+": " ",  # currencies, powers
}
# After a word, a number or a bracket a minus is a subtraction, a range or a hyphen
_NUMBER = re.compile(
    r"(?:(?<![\w)\]%])-|(?<![\w)\]%]\s)(?<![\w)\]%])-\s+)?(?:(?<!\w)\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:\s*/\s*\d+(?:\.\d+)?)?"
)


def final_number(text: str) -> Fraction | None:
    """The first number after the last `####`, else the last number of the text; None without one.

    Reads -3 with any minus, hyphen or dash (and `- 3`, but after a word or a number), 1,234 and
    1,23,456 and 9{,}500, thousands set apart by apostrophes, thin or no-break spaces, $5.00, .5,
    60% (as 60), 1/2, and a number with its unit or at a sentence's end.
    Fails: numbers in words, mixed fractions (2 1/2), ½, 1 234 with a plain space, 3,5 for 3.5,
    1.234,50, 5k, 1e3, Rs5, times (5:30), powers (10^3), _5_ in italics, sums left undone, and a
    right number followed by another one.
    """
    for pattern, replacement in _CLEANING.items():
        text = re.sub(pattern, replacement, text)
    _, mark, tail = text.rpartition("####")
    numbers = _NUMBER.findall(tail)
    if not numbers:
        return None
    top, _, bottom = "".join(numbers[0 if mark else -1].split()).partition("/")
    divisor = Fraction(Decimal(bottom or 1))  # by way of Decimal, which reads any number of digits
    return Fraction(Decimal(top)) / divisor if divisor else None


def same_number(answer: str, references: Sequence[str]) -> float:
    """GSM8K accuracy (0 or 1): exactly a reference's number. This task's headline rule.

    Fails where `final_number` does, and for rounded answers: no tolerance, as in the official rule.
    """
    return float(final_number(answer) in {*map(final_number, references)} - {None})


# --------------------------------------------------------------------------------------------------
# Scorers: TruthfulQA


def truth_margin(answer: str, right: Sequence[str], wrong: Sequence[str]) -> float:
    """Best ROUGE-L F1 (Lin, 2004) with a right reference minus best with a wrong one (-1 to 1).

    This is TruthfulQA's ROUGE-L difference. Fails: right and wrong references often differ in one
    word ("not"), so that style decides; a right answer in new words is near neither; an answer that
    says both is a matter of length. A refusal is no right answer here, other than in the original,
    which takes "I have no comment." for true: a router has to know who can answer. Words are those
    of any script (the original knows ASCII alone).
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes two seconds of imports along

    words = SimpleNamespace(tokenize=lambda text: re.findall(r"[^\W_]+", text.lower()))
    scorer = RougeScorer(["rougeL"], tokenizer=words)
    near, far = (scorer.score_multi(texts or [""], answer)["rougeL"] for texts in (right, wrong))
    # Equal fractions of other lengths differ in the last bit
    return round(float(near.fmeasure - far.fmeasure), 9)


# --------------------------------------------------------------------------------------------------
# Evaluation

_ANSWER_LINE = re.compile(rf"{prompts.ANSWER_MARK.pattern}[^\n]*(\n)?")


def score_answer(question: OpenQuestion, answer: str | None) -> float:
    """1 for a right answer by the task's headline rule, else 0; None (unreadable) is wrong."""
    if answer is None:
        return 0.0
    if question.task == "truthfulqa":
        return float(truth_margin(answer, question.answers, question.incorrect) > 0)
    rule = exact_match if question.task == "squad" else same_number
    return rule(answer, question.answers)


def closed_answer(completion: Completion) -> str | None:
    """The answer of a completion; None without one, or if it was cut before its line ended."""
    line = _ANSWER_LINE.search(completion.text)
    closed = line is not None and (completion.finished or line[1] is not None)
    return prompts.parse_open_response(completion.text).answer if closed else None


def ask(
    engine: Engine, questions: Questions, limits: Mapping[str, int], sampling: Sampling
) -> list[tuple[OpenQuestion, list[Completion]]]:
    """Every question with its completions; `limits` gives the new tokens of every task."""
    completions = []
    for task, group in groupby(questions, key=lambda question: question.task):
        limited = replace(sampling, max_tokens=limits[task], stop=STOP)
        chats = [prompts.open_messages(question) for question in group]
        completions += engine.generate(chats, limited)
    return list(zip(questions, completions, strict=True))


def evaluate_open(
    engine: Engine, questions: Questions, max_new_tokens: Mapping[str, int]
) -> list[Row]:
    """Greedy answers of one model, one row per question:

    {"id": "g7", "domain": "gsm8k", "question": "2+3?", "fact": "g7", "gold": "5",
     "text": "Confidence: 0.5 ...", "local_answer": "5", "confidence": 0.5, "local_tokens": 14,
     "local_correct": 1.0, "truncated": False, "failed": 0}

    An answer that is never closed is None: it scores 0, and has no confidence. `truncated`: it was
    cut at max_new_tokens. `failed` 1: there was no completion.
    """
    rows = []
    for question, completions in ask(engine, questions, max_new_tokens, Sampling()):
        reply = next(iter(completions), NOTHING)
        answer = closed_answer(reply)
        confidence = prompts.parse_open_response(reply.text).confidence if answer else None
        row: Row = {"id": question.id, "domain": question.task, "question": question.question}
        row |= {"fact": question.fact_key, "gold": question.answers[0], "text": reply.text}
        row |= {"local_answer": answer, "confidence": confidence, "local_tokens": reply.tokens}
        row |= {"local_correct": score_answer(question, answer), "truncated": not reply.finished}
        rows.append({**row, "failed": int(not completions)})
    return rows


# --------------------------------------------------------------------------------------------------
# R15: one more round, from R14, on open-ended questions


def first(questions: Questions, counts: Mapping[str, int]) -> list[OpenQuestion]:
    """The first `counts[task]` questions of every task, task by task."""
    groups = {task: [question for question in questions if question.task == task] for task in TASKS}
    return [question for task, group in groups.items() for question in group[: counts[task]]]


def trace(text: str) -> str:
    """The reasoning of a completion: what precedes its final answer, but for stated confidences."""
    head = _ANSWER_LINE.split(text, maxsplit=1)[0]
    bare = re.sub(rf"{prompts.CONFIDENCE_MARK.pattern}[\d.,/]*%?[*_]*", "", head)
    return re.sub(r"(?m)^[*_]+$", "", bare).strip()  # the emphasis before a mark


def open_row(question: OpenQuestion, samples: Sequence[Completion], settings: Settings) -> SftRow:
    """The training row of one question; `target` is None for a word problem without right sample.

    Word problems teach the first right sample (a trace of the model's own), the other tasks the
    first reference. So no word problem is ever labelled 0.0: the recipe's filter makes these labels
    more confident than the model is. `votes`: 1 right, 0 wrong, - not readable, as in `0101-001`.
    """
    answers = [closed_answer(sample) for sample in samples]
    right = [score_answer(question, answer) == 1 for answer in answers]
    label = bucket(sum(right) / len(right), settings.tie)
    answer, reasoning = question.answers[0], ""
    if question.task == "gsm8k" and True in right:
        best = right.index(True)
        answer, reasoning = str(answers[best]), trace(samples[best].text)
    target = prompts.target_text(label, answer, reasoning)
    taught = question.task != "gsm8k" or True in right
    pairs = zip(answers, right, strict=True)
    votes = "".join("-" if text is None else str(int(is_right)) for text, is_right in pairs)
    row: Row = {"id": question.id, "domain": question.task}
    row |= {"messages": prompts.open_messages(question), "target": target if taught else None}
    return {**row, "answer": answer, "confidence": label, "votes": votes}


def r15_rows(engine: Engine, questions: Questions, settings: Settings, seed: int) -> list[SftRow]:
    """An `open_row` of every question, labelled and (word problems) written by `engine`."""
    limits = settings.open_ended.max_new_tokens.model_dump()
    asked = ask(engine, questions, limits, recipe_sampling(settings, seed))
    return [open_row(question, samples, settings) for question, samples in asked]
