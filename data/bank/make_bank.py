"""The question bank: written facts and computed families, made into question files by a seed.

`make bank` writes them to `data/bank/questions`, where runs read them. A fact is what is split
into train, dev and test; every question asks about exactly one fact. Must not know any model.
"""

from __future__ import annotations

import argparse
import operator
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import yaml

from foggen.prompts import LETTERS
from foggen.questions import DOMAINS, TASKS, OpenQuestion, Question
from foggen.store import ROOT, write_jsonl

BANK = ROOT / "data" / "bank"
SPLITS: Mapping[str, float] = {"train": 0.45, "dev": 0.1, "test": 0.45}
QUESTIONS: Mapping[str, int] = {"train": 400, "dev": 60, "test": 260}  # questions a domain
OPEN_QUESTIONS: Mapping[str, int] = {"train": 260, "test": 160}  # questions a task


class BankError(ValueError):
    """A bank file that cannot be used; the message names file, place and expected form."""


@dataclass(frozen=True)
class Fact:
    """One thing to know: how it is asked, its answer, and same-kind wrong answers (`rivals`)."""

    id: str
    domain: str
    questions: tuple[str, ...]
    answer: str
    rivals: tuple[str, ...]
    statements: tuple[str, ...]
    difficulty: int  # 1 well known, 2 known to students of the field, 3 obscure
    subject: str = ""  # empty in a computed family
    lang: str = "en"
    split: str = "train"


# ---------------------------------------------------------------------------------------------
# Computed families: right answers come from the code, wrong ones from slips that people make

Item = tuple[str, object, Sequence[object]]  # question, answer, wrong answers


def _ratios(rng: random.Random) -> Item:
    equity, ratio = rng.choice([200, 400, 500, 600]), rng.choice([0.5, 0.75, 1.25, 1.5, 2.0])
    if rng.random() < 0.5:
        debt = round(equity * ratio)
        wrong = [f"{value:.2f}" for value in (equity / debt, ratio + 0.25, ratio + 1, ratio * 2)]
        return (
            f"With debt of {debt} and equity of {equity}, what is the debt ratio?",
            f"{ratio:.2f}",
            wrong,
        )
    rate, years = rng.randint(2, 9), rng.randint(2, 6)
    interest = equity * rate * years // 100
    slips = [interest + equity, equity * rate // 100, interest * 2, interest + rate]
    return f"What simple interest do {equity} earn at {rate}% in {years} years?", interest, slips


def _units(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        mass, speed_up = rng.randint(2, 12), rng.randint(2, 12)
        force = mass * speed_up
        slips = [mass + speed_up, force * 2, force + 10, force + 1]
        return f"What force in N gives {mass} kg an acceleration of {speed_up} m/s2?", force, slips
    unit, small, factor = rng.choice(
        [("km", "m", 1000), ("m", "cm", 100), ("kg", "g", 1000), ("h", "min", 60)]
    )
    n = rng.randint(2, 20)
    return (
        f"How many {small} are {n} {unit}?",
        n * factor,
        [n * factor * 10, n * factor // 10, n + factor, n * 12],
    )


_SNIPPETS = (
    "{a} % {b}",
    "{a} // {b}",
    "len('ab' * {b})",
    "sum(range({b}))",
    "max({a}, {b}) - {b}",
    "{b} ** 2",
)


def _snippets(rng: random.Random) -> Item:
    a, b = rng.randint(12, 60), rng.randint(3, 9)
    snippet = rng.choice(_SNIPPETS).format(a=a, b=b)
    value = eval(
        snippet, {"__builtins__": {}}, {"len": len, "sum": sum, "range": range, "max": max}
    )
    return (
        f"What does Python print for {snippet} ?",
        value,
        [value + 1, value + 2, abs(value - 3), value + b, a],
    )


def _deadlines(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        members = rng.randint(9, 150)
        need = members // 2 + 1
        question = f"In a chamber of {members} members, how many votes are an absolute majority?"
        return question, need, [members // 2, need + 1, members * 2 // 3, need + 5]
    start = date(2026, rng.randint(1, 12), rng.randint(1, 28))
    days = rng.choice([7, 10, 14, 21, 30])
    end, *slips = (
        f"{day.day} {day:%B}"
        for day in (start + timedelta(days + slip) for slip in (0, 1, -1, 7, 2))
    )
    return (
        f"A notice of {days} days is served on {start.day} {start:%B}. When does it end?",
        end,
        slips,
    )


def _arithmetic(rng: random.Random) -> Item:
    a, b, x = rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 15)
    kind = rng.randrange(3)
    if kind < 2:
        a, b = sorted((a, b))  # 3 + 5 and 5 + 3 are one fact
    if kind == 0:
        return f"What is {a} + {b} ?", a + b, [a + b + 1, a + b - 1, a * b, a + b + 10]
    if kind == 1:
        return f"What is {a} * {b} ?", a * b, [a * b + a, a * b - b, a + b, a * b + 1]
    return f"Solve {a} x + {b} = {a * x + b} for x. What is x?", x, [x + 1, x - 1, x + b, x * 2]


_MUSHEL = "rat ox tiger hare dragon snake horse sheep monkey hen dog boar".split()
_ONES = ["", *"бір екі үш төрт бес алты жеті сегіз тоғыз".split()]
_TENS = ["", *"он жиырма отыз қырық елу алпыс жетпіс сексен тоқсан".split()]


def _kazakh_number(n: int) -> str:
    return f"{_TENS[n // 10]} {_ONES[n % 10]}".strip()


def _years_and_numbers(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        year = rng.randint(1930, 2026)
        place = (year - 1924) % 12  # 1924 opened a cycle with the rat
        slips = [_MUSHEL[(place + slip) % 12] for slip in (1, 11, 3, 6)]
        return f"Which animal of the mushel cycle rules the year {year} ?", _MUSHEL[place], slips
    n = rng.randint(11, 99)
    slips = [
        _kazakh_number(m)
        for m in (n + 1, n % 10 * 10 + n // 10, n - 10, (n + 20) % 100)
        if 0 < m < 100
    ]
    return f"{n} саны қазақша қалай жазылады?", _kazakh_number(n), slips


def _doses(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        weight, dose = (
            rng.choice([10, 12, 20, 25, 40, 50, 60, 80]),
            rng.choice([2, 3, 4, 5, 8, 10, 15]),
        )
        total = weight * dose
        slips = [total * 2, total + weight, total // 2, total + 10]
        return (
            f"A dose of {dose} mg/kg is ordered for {weight} kg. How many mg is that?",
            total,
            slips,
        )
    tablet, count = rng.choice([20, 25, 40, 50, 75, 100, 125, 200, 250, 500]), rng.randint(2, 9)
    slips = [count + 1, count - 1, count * 2, count + 3]
    return f"How many tablets of {tablet} mg make {tablet * count} mg?", count, slips


# The names under which a domain's file can ask for one, as its `computed`.
FAMILIES: Mapping[str, Callable[[random.Random], Item]] = {
    "ratios": _ratios,
    "units": _units,
    "snippets": _snippets,
    "deadlines": _deadlines,
    "arithmetic": _arithmetic,
    "years_and_numbers": _years_and_numbers,
    "doses": _doses,
}


def computed_facts(domain: str, family: str, n: int, seed: int) -> list[Fact]:
    """`n` different questions of a computed family, for a domain; each is a fact of its own."""
    if family not in FAMILIES:
        raise BankError(
            f"{domain}.yaml: computed is {family!r}, expected one of {', '.join(FAMILIES)}"
        )
    rng = random.Random(f"{seed}/{domain}/computed")
    facts: dict[str, Fact] = {}
    for _ in range(100 * n):
        question, answer, wrong = FAMILIES[family](rng)
        rivals = tuple(dict.fromkeys(str(value) for value in wrong if str(value) != str(answer)))
        if len(rivals) < 2 or question in facts:
            continue
        facts[question] = Fact(
            id=f"{domain}/computed/{len(facts):03d}",
            domain=domain,
            questions=(question,),
            answer=str(answer),
            rivals=rivals,
            statements=(f"{question} {answer}.",),
            difficulty=rng.choice((1, 2, 3)),
            lang="kk" if "қазақша" in question else "en",
        )
        if len(facts) == n:
            return list(facts.values())
    raise BankError(f"{domain}.yaml: {family} has fewer than {n} different questions")


# ---------------------------------------------------------------------------------------------
# Written facts and their splits


def _relation_facts(relation: Mapping[str, Any], domain: str) -> Iterator[Fact]:
    for number, row in enumerate(relation["facts"], 1):
        if len(row) != 3 or row[2] not in (1, 2, 3):
            place = f"{domain}.yaml: {relation['id']}, fact {number}"
            raise BankError(f"{place}: expected [subject, answer, difficulty 1-3]")
    answers = list(dict.fromkeys(str(answer) for _, answer, _ in relation["facts"]))
    for subject, answer, difficulty in relation["facts"]:
        yield Fact(
            id=f"{domain}/{relation['id']}/{subject}",
            domain=domain,
            questions=tuple(text.format(s=subject) for text in relation["phrasings"]),
            answer=str(answer),
            rivals=tuple(rival for rival in answers if rival != str(answer)),
            statements=tuple(text.format(s=subject, a=answer) for text in relation["statements"]),
            difficulty=difficulty,
            subject=str(subject),
            lang=relation["lang"],
        )


def domain_facts(file: Path, computed: int = 120, seed: int = 0) -> list[Fact]:
    """The written facts of `<domain>.yaml`, and `computed` ones of the family that it may name.

    Raises BankError where a relation or a row does not have the expected form.
    """
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    for relation in written["relations"]:
        if missing := {"id", "lang", "phrasings", "statements", "facts"} - set(relation):
            raise BankError(
                f"{file.name}: relation {relation.get('id')!r} has no {', '.join(sorted(missing))}"
            )
    facts = [
        fact for relation in written["relations"] for fact in _relation_facts(relation, file.stem)
    ]
    return facts + (
        computed_facts(file.stem, written["computed"], computed, seed)
        if "computed" in written
        else []
    )


def _split(facts: Sequence[Fact], seed: int) -> list[Fact]:
    """Every fact in one split, the shares held within each relation and difficulty."""
    groups: dict[tuple[str, int], list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[fact.id.rsplit("/", 1)[0], fact.difficulty].append(fact)
    placed = []
    for key, group in sorted(groups.items()):
        random.Random(f"{seed}/{key}").shuffle(group)
        offset = random.Random(f"{seed}/{key}/offset").random()
        for number, fact in enumerate(group, 1):
            # A low-discrepancy walk through the shares: small groups do not all round the same way.
            place = (offset + number * 0.6180339887) % 1
            split = (
                "train"
                if place < SPLITS["train"]
                else "test"
                if place < 1 - SPLITS["dev"]
                else "dev"
            )
            placed.append(replace(fact, split=split))
    return placed


def load_facts(folder: Path, seed: int = 0) -> list[Fact]:
    """All facts of the bank with their splits; the seed is the bank's, whatever that of a run."""
    return _split(
        [fact for file in sorted(folder.glob("*.yaml")) for fact in domain_facts(file, seed=seed)],
        seed,
    )


# ---------------------------------------------------------------------------------------------
# Questions


def ask(fact: Fact, id: str, gold: int, phrasing: int, rng: random.Random) -> Question:
    """A question about a fact, mostly of four options; `gold` is the place of the right one.

    With fewer options than that, places are counted round.
    """
    size = min(rng.choices((3, 4, 5), (1, 8, 1))[0], len(fact.rivals) + 1)
    options = rng.sample(fact.rivals, size - 1)
    place = gold % size
    options.insert(place, fact.answer)
    return Question(
        id=id,
        domain=fact.domain,
        question=fact.questions[phrasing % len(fact.questions)],
        options=tuple(options),
        answer=LETTERS[place],
        fact=fact.id,
        difficulty=fact.difficulty,
        lang=fact.lang,
        split=fact.split,
    )


def make_questions(facts: Sequence[Fact], split: str, seed: int = 0) -> list[Question]:
    """The questions of a split: `QUESTIONS[split]` per domain, the recipe's domains first.

    Written facts are asked in turn, each time in another phrasing and with other options; computed
    facts are asked once, and fill at most a quarter. Gold letters go round, so that no letter is
    right more often than others.
    """
    domains = {fact.domain for fact in facts}
    questions = []
    for domain in [*(name for name in DOMAINS if name in domains), *sorted(domains - set(DOMAINS))]:
        rng = random.Random(f"{seed}/{domain}/{split}")
        of_split = [fact for fact in facts if fact.domain == domain and fact.split == split]
        computed = [fact for fact in of_split if not fact.subject][: QUESTIONS[split] // 4]
        written = rng.sample(written := [fact for fact in of_split if fact.subject], len(written))
        turns = [
            (written[i % len(written)], i // len(written))
            for i in range(QUESTIONS[split] - len(computed))
        ]
        order = [*turns, *((fact, 0) for fact in computed)]
        for number, (fact, turn) in enumerate(order):
            start = (
                int.from_bytes(fact.id.encode()) % 5
            )  # relations' phrasings start at different places
            questions.append(ask(fact, f"{domain}-{split}-{number:03d}", number, start + turn, rng))
    return questions


# ---------------------------------------------------------------------------------------------
# Open-ended sets


def load_material(folder: Path, name: str) -> dict[str, Any]:
    """One of the files of open-ended material: `passages`, `misconceptions` or `word_problems`."""
    material: dict[str, Any] = yaml.safe_load(
        (folder / "open" / f"{name}.yaml").read_text(encoding="utf-8")
    )
    return material


def passage(material: Mapping[str, Any], rng: random.Random) -> list[OpenQuestion]:
    """A short story with random names, as the questions that one of its names answers.

    The id of a question is that of the story and the kind of name.
    """
    template = rng.choice(material["templates"])
    slots = dict(zip(("person", "person2"), rng.sample(material["people"], 2), strict=True))
    slots |= zip(("place", "place2"), rng.sample(material["places"], 2), strict=True)
    slots |= {"object": rng.choice(material["objects"]), "job": rng.choice(material["jobs"])}
    return [
        OpenQuestion(
            id=f"{template['id']}/{question['slot']}",
            task="squad",
            context=template["text"].format(**slots),
            question=question["q"].format(**slots),
            answers=(slots[question["slot"]],),
        )
        for question in template["questions"]
    ]


_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


def word_problem(
    material: Mapping[str, Any], names: Mapping[str, Any], rng: random.Random
) -> OpenQuestion:
    """A story with random small numbers, its worked solution and result."""
    template = rng.choice(material["templates"])
    results: list[int] = []
    while not results or not all(1 <= result <= 150 for result in results):
        values = {slot: rng.randint(2, 12) for slot in "abc"}
        results = []
        for sign, x, y in template["operations"]:
            known = {**values, "r": results[-1] if results else 0}
            results.append(_OPERATIONS[sign](known[x], known[y]))
    slots = {"person": rng.choice(names["people"]), "object": rng.choice(names["objects"])}
    return OpenQuestion(
        id=template["id"],
        task="gsm8k",
        question=template["text"].format(**values, **slots),
        answers=(str(results[-1]),),
        solution=template["solution"].format(**values, r=results[0], r2=results[-1]),
    )


def misconceptions(material: Mapping[str, Any]) -> list[OpenQuestion]:
    """All misconceptions in all their phrasings."""
    return [
        OpenQuestion(
            id="?",
            task="truthfulqa",
            question=phrasing,
            answers=tuple(entry["right"]),
            incorrect=tuple(entry["wrong"]),
            fact=f"misconception/{entry['id']}",
        )
        for entry in material["misconceptions"]
        for phrasing in entry["phrasings"]
    ]


def _unit(question: OpenQuestion) -> str:
    """What is split: a misconception, or a passage or word problem with its names and numbers."""
    return question.fact or question.context + question.question


def open_pool(folder: Path, task: str, seed: int, n: int) -> list[OpenQuestion]:
    """Different questions of a task in a seeded order; all misconceptions that are written."""
    rng = random.Random(f"{seed}/{task}")
    if task == "truthfulqa":
        return misconceptions(load_material(folder, "misconceptions"))
    stories, problems = load_material(folder, "passages"), load_material(folder, "word_problems")
    found: dict[str, OpenQuestion] = {}
    while len(found) < n:
        squad = task == "squad"
        question = (
            rng.choice(passage(stories, rng)) if squad else word_problem(problems, stories, rng)
        )
        found.setdefault(_unit(question), question)
    return list(found.values())


def make_open_questions(folder: Path, split: str, seed: int = 0) -> list[OpenQuestion]:
    """The open-ended questions of a split: `OPEN_QUESTIONS[split]` per task, disjoint in facts."""
    questions = []
    for task in TASKS:
        pool = open_pool(folder, task, seed, round(1.1 * sum(OPEN_QUESTIONS.values())))
        units = sorted({_unit(question) for question in pool})
        random.Random(f"{seed}/{task}/split").shuffle(units)
        test = set(units[: round(len(units) * 0.4)])
        of_split = [question for question in pool if (_unit(question) in test) == (split == "test")]
        random.Random(f"{seed}/{task}/{split}").shuffle(of_split)
        for number, question in enumerate(of_split[: OPEN_QUESTIONS[split]]):
            id = f"{task}-{split}-{number:03d}"
            fact = question.fact or f"{task}/{id}"
            questions.append(question.model_copy(update={"id": id, "split": split, "fact": fact}))
    return questions


# ---------------------------------------------------------------------------------------------
# Files


FIELDS = """id domain task question options context answers answer incorrect solution fact
difficulty lang split""".split()


def row(question: Question | OpenQuestion) -> dict[str, Any]:
    """What a question's line holds: its fields in the order of `FIELDS`, without defaults."""
    values = question.model_dump(exclude_defaults=True)
    return {field: values[field] for field in FIELDS if field in values}


def write_bank(folder: Path, out: Path) -> None:
    """Writes the questions of the facts in `folder`, a file per split (and `open_ended/`)."""
    facts = load_facts(folder)
    for split in QUESTIONS:
        rows = map(row, make_questions(facts, split))
        write_jsonl(out / f"{split}.jsonl", rows)
    for split in OPEN_QUESTIONS:
        rows = map(row, make_open_questions(folder, split))
        write_jsonl(out / "open_ended" / f"{split}.jsonl", rows)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: writes the question files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--facts", type=Path, default=BANK, help="a folder with <domain>.yaml files, and open/"
    )
    parser.add_argument(
        "--out", type=Path, default=BANK / "questions", help="where the question files go"
    )
    given = parser.parse_args(argv)
    write_bank(given.facts, given.out)


if __name__ == "__main__":
    main()
