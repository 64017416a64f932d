"""The question bank: written facts and computed families, turned into questions and open-ended sets by a seed.

A fact is what is split into train, dev and test; every question asks about exactly one fact. Knows nothing of
prompts or models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import yaml

from foggen.questions import DOMAINS, OpenQuestion, Question

SPLITS: Mapping[str, float] = {"train": 0.45, "dev": 0.1, "test": 0.45}
QUESTIONS: Mapping[str, int] = {"train": 400, "dev": 60, "test": 260}  # questions a domain
OPEN_QUESTIONS: Mapping[str, int] = {"train": 260, "test": 160}  # questions a task
LETTERS = "ABCDE"


class BankError(ValueError):
    """A bank file that cannot be used; the message names the file, the place and the expected form."""


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


# ---------------------------------------------------------------------------------------------------------------
# Written facts


def _relation_facts(relation: Mapping[str, Any], domain: str, file: str) -> Iterator[Fact]:
    answers = list(dict.fromkeys(str(row[1]) for row in relation["facts"]))
    for number, row in enumerate(relation["facts"], 1):
        if len(row) != 3 or row[2] not in (1, 2, 3):
            raise BankError(f"{file}: {relation['id']}, fact {number}: expected [subject, answer, difficulty 1-3]")
        subject, answer, difficulty = str(row[0]), str(row[1]), int(row[2])
        yield Fact(
            id=f"{domain}/{relation['id']}/{subject}",
            domain=domain,
            questions=tuple(text.format(s=subject) for text in relation["phrasings"]),
            answer=answer,
            rivals=tuple(rival for rival in answers if rival != answer),
            statements=tuple(text.format(s=subject, a=answer) for text in relation["statements"]),
            difficulty=difficulty,
            subject=subject,
            lang=relation["lang"],
        )


def written_facts(folder: Path, domain: str) -> list[Fact]:
    """The facts of `<domain>.yaml`. Raises BankError where a relation or a row does not have the expected form."""
    path = folder / f"{domain}.yaml"
    relations = yaml.safe_load(path.read_text(encoding="utf-8"))["relations"]
    for relation in relations:
        missing = {"id", "lang", "phrasings", "statements", "facts"} - set(relation)
        if missing:
            raise BankError(f"{path.name}: relation {relation.get('id')!r} has no {', '.join(sorted(missing))}")
    return [fact for relation in relations for fact in _relation_facts(relation, domain, path.name)]


# ---------------------------------------------------------------------------------------------------------------
# Computed families: the right answer comes from the code, the wrong ones from slips that people make

Asked = tuple[str, object, Sequence[object]]  # question, answer, wrong answers


def _finance(dice: random.Random) -> Asked:
    equity, ratio = dice.choice([200, 400, 500, 600]), dice.choice([0.5, 0.75, 1.25, 1.5, 2.0])
    if dice.random() < 0.5:
        debt = round(equity * ratio)
        wrong = [f"{value:.2f}" for value in (equity / debt, ratio + 0.25, ratio + 1, ratio * 2)]
        return f"With debt of {debt} and equity of {equity}, what is the debt ratio?", f"{ratio:.2f}", wrong
    rate, years = dice.randint(2, 9), dice.randint(2, 6)
    interest = equity * rate * years // 100
    wrong_interest = [interest + equity, equity * rate // 100, interest * 2, interest + rate]
    return f"What simple interest do {equity} earn at {rate}% in {years} years?", interest, wrong_interest


def _science(dice: random.Random) -> Asked:
    if dice.random() < 0.5:
        mass, speed_up = dice.randint(2, 12), dice.randint(2, 12)
        force = mass * speed_up
        wrong = [mass + speed_up, force * 2, force + 10, force + 1]
        return f"What force in N gives {mass} kg an acceleration of {speed_up} m/s2?", force, wrong
    unit, factor = dice.choice([("km", 1000), ("m", 100), ("kg", 1000), ("h", 60)])
    small = {"km": "m", "m": "cm", "kg": "g", "h": "min"}[unit]
    n = dice.randint(2, 20)
    return (
        f"How many {small} are {n} {unit}?",
        n * factor,
        [n * factor * 10, n * factor // 10, n + factor, n * 12],
    )


def _coding(dice: random.Random) -> Asked:
    a, b = dice.randint(12, 60), dice.randint(3, 9)
    snippet = dice.choice(
        [
            f"{a} % {b}",
            f"{a} // {b}",
            f"len('ab' * {b})",
            f"sum(range({b}))",
            f"max({a}, {b}) - {b}",
            f"{b} ** 2",
        ]
    )
    value = eval(snippet, {"__builtins__": {}}, {"len": len, "sum": sum, "range": range, "max": max})
    return (
        f"What does Python print for {snippet} ?",
        value,
        [value + 1, value + 2, abs(value - 3), value + b, a],
    )


def _law(dice: random.Random) -> Asked:
    if dice.random() < 0.5:
        members = dice.randint(9, 150)
        need = members // 2 + 1
        question = f"In a chamber of {members} members, how many votes are an absolute majority?"
        return question, need, [members // 2, need + 1, members * 2 // 3, need + 5]
    start = date(2026, dice.randint(1, 12), dice.randint(1, 28))
    days = dice.choice([7, 10, 14, 21, 30])
    ends = [start + timedelta(days=days + slip) for slip in (0, 1, -1, 7, 2)]
    shown = [f"{day.day} {day:%B}" for day in ends]
    return (
        f"A notice of {days} days is served on {start.day} {start:%B}. When does it end?",
        shown[0],
        shown[1:],
    )


def _math(dice: random.Random) -> Asked:
    a, b, x = dice.randint(2, 12), dice.randint(2, 12), dice.randint(2, 15)
    kind = dice.randrange(3)
    if kind < 2:
        a, b = sorted((a, b))  # 3 + 5 and 5 + 3 are one fact
    if kind == 0:
        return f"What is {a} + {b} ?", a + b, [a + b + 1, a + b - 1, a * b, a + b + 10]
    if kind == 1:
        return f"What is {a} * {b} ?", a * b, [a * b + a, a * b - b, a + b, a * b + 1]
    return f"Solve {a} x + {b} = {a * x + b} for x. What is x?", x, [x + 1, x - 1, x + b, x * 2]


_MUSHEL = "rat ox tiger hare dragon snake horse sheep monkey hen dog boar".split()
_ONES = "нөл бір екі үш төрт бес алты жеті сегіз тоғыз".split()
_TENS = "_ он жиырма отыз қырық елу алпыс жетпіс сексен тоқсан".split()


def _kazakh_number(n: int) -> str:
    return " ".join(part for part in (_TENS[n // 10] if n > 9 else "", _ONES[n % 10] if n % 10 else "") if part)


def _kazakh_culture(dice: random.Random) -> Asked:
    if dice.random() < 0.5:
        year = dice.randint(1930, 2026)
        place = (year - 1924) % 12  # 1924 opened a cycle with the rat
        wrong = [_MUSHEL[(place + slip) % 12] for slip in (1, 11, 3, 6)]
        return f"Which animal of the mushel cycle rules the year {year} ?", _MUSHEL[place], wrong
    n = dice.randint(11, 99)
    wrong = [_kazakh_number(m) for m in (n + 1, n % 10 * 10 + n // 10, n - 10, (n + 20) % 100) if 0 < m < 100]
    return f"{n} саны қазақша қалай жазылады?", _kazakh_number(n), wrong


def _medical(dice: random.Random) -> Asked:
    if dice.random() < 0.5:
        weight, dose = dice.choice([10, 12, 20, 25, 40, 50, 60, 80]), dice.choice([2, 3, 4, 5, 8, 10, 15])
        total = weight * dose
        wrong = [total * 2, total + weight, total // 2, total + 10]
        return f"A dose of {dose} mg/kg is ordered for {weight} kg. How many mg is that?", total, wrong
    tablet, count = dice.choice([20, 25, 40, 50, 75, 100, 125, 200, 250, 500]), dice.randint(2, 9)
    wrong_count = [count + 1, count - 1, count * 2, count + 3]
    return f"How many tablets of {tablet} mg make {tablet * count} mg?", count, wrong_count


FAMILIES: Mapping[str, Callable[[random.Random], Asked]] = {
    "finance": _finance,
    "science": _science,
    "coding": _coding,
    "law": _law,
    "math": _math,
    "kazakh_culture": _kazakh_culture,
    "medical": _medical,
}


def computed_facts(domain: str, n: int, seed: int) -> list[Fact]:
    """`n` different questions of a domain's computed family; each is a fact of its own."""
    dice = random.Random(f"{seed}/{domain}/computed")
    facts: dict[str, Fact] = {}
    for _ in range(100 * n):
        question, answer, wrong = FAMILIES[domain](dice)
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
            difficulty=dice.choice((1, 2, 3)),
            lang="kk" if "қазақша" in question else "en",
        )
        if len(facts) == n:
            return list(facts.values())
    raise BankError(f"{domain}: its computed family has fewer than {n} different questions")


# ---------------------------------------------------------------------------------------------------------------
# Splits and questions


def _split(facts: Sequence[Fact], seed: int) -> list[Fact]:
    """Every fact in one split, the shares held within each relation and difficulty."""
    groups: dict[tuple[str, int], list[Fact]] = {}
    for fact in facts:
        groups.setdefault((fact.id.rsplit("/", 1)[0], fact.difficulty), []).append(fact)
    placed = []
    for key, group in sorted(groups.items()):
        random.Random(f"{seed}/{key}").shuffle(group)
        offset = random.Random(f"{seed}/{key}/offset").random()
        for index, fact in enumerate(group):
            # A low-discrepancy walk through the shares: small groups do not all round the same way.
            place = (offset + (index + 1) * 0.6180339887) % 1
            split = "train" if place < SPLITS["train"] else "test" if place < 1 - SPLITS["dev"] else "dev"
            placed.append(replace(fact, split=split))
    return placed


def load_facts(folder: Path, seed: int = 0, computed: int = 120) -> list[Fact]:
    """All facts of the bank, each in its split. The seed is the bank's own: runs with other seeds share the split."""
    facts = [
        fact for domain in DOMAINS for fact in [*written_facts(folder, domain), *computed_facts(domain, computed, seed)]
    ]
    return _split(facts, seed)


def ask(fact: Fact, id: str, gold: int, phrasing: int, dice: random.Random) -> Question:
    """A question about a fact: mostly four options, the right one as near to place `gold` as there are places."""
    size = min(dice.choices((3, 4, 5), (1, 8, 1))[0], len(fact.rivals) + 1)
    options = dice.sample(fact.rivals, size - 1)
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


def make_questions(facts: Iterable[Fact], split: str, seed: int = 0) -> list[Question]:
    """The questions of a split: `QUESTIONS[split]` a domain.

    Written facts are asked in turn, each time in another phrasing and with other options; a computed fact is asked
    once, and fills at most a quarter. Gold letters go round, so that no letter is right more often than others.
    """
    questions = []
    for domain in DOMAINS:
        dice = random.Random(f"{seed}/{domain}/{split}")
        mine = [fact for fact in facts if fact.domain == domain and fact.split == split]
        computed = [fact for fact in mine if not fact.subject][: QUESTIONS[split] // 4]
        written = dice.sample(written := [fact for fact in mine if fact.subject], len(written))
        turns = [(written[i % len(written)], i // len(written)) for i in range(QUESTIONS[split] - len(computed))]
        asked = [*turns, *((fact, 0) for fact in computed)]
        for number, (fact, turn) in enumerate(asked):
            start = int.from_bytes(fact.id.encode()) % 5  # relations' phrasings start at different places
            questions.append(ask(fact, f"{domain}-{split}-{number:03d}", number, start + turn, dice))
    return questions


# ---------------------------------------------------------------------------------------------------------------
# Open-ended sets


def passage(material: Mapping[str, Any], dice: random.Random) -> list[OpenQuestion]:
    """A short story with random names, as the questions that one of its names answers; an id names the kind asked."""
    template = dice.choice(material["templates"])
    people, places = dice.sample(material["people"], 2), dice.sample(material["places"], 2)
    slots = {
        "person": people[0],
        "person2": people[1],
        "place": places[0],
        "place2": places[1],
        "object": dice.choice(material["objects"]),
        "job": dice.choice(material["jobs"]),
    }
    return [
        OpenQuestion(
            id=f"{template['id']}/{asked['slot']}",
            task="squad",
            context=template["text"].format(**slots),
            question=asked["q"].format(**slots),
            answers=(slots[asked["slot"]],),
        )
        for asked in template["questions"]
    ]


_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
}


def word_problem(material: Mapping[str, Any], names: Mapping[str, Any], dice: random.Random) -> OpenQuestion:
    """A story with random small numbers, its worked solution and result."""
    template = dice.choice(material["templates"])
    while True:
        values = {slot: dice.randint(2, 12) for slot in "abc"}
        results: list[int] = []
        for sign, x, y in template["operations"]:
            known = {**values, "r": results[-1] if results else 0}
            results.append(_OPERATIONS[sign](known[x], known[y]))
        if all(1 <= result <= 150 for result in results):
            break
    slots = {"person": dice.choice(names["people"]), "object": dice.choice(names["objects"])}
    solved = {"r": results[0], "r2": results[-1]}
    return OpenQuestion(
        id=template["id"],
        task="gsm8k",
        question=template["text"].format(**values, **slots),
        answers=(str(results[-1]),),
        solution=template["solution"].format(**values, **solved),
    )


def _different(make: Callable[[], OpenQuestion], n: int) -> list[OpenQuestion]:
    found: dict[tuple[str, str], OpenQuestion] = {}
    while len(found) < n:
        question = make()
        found.setdefault((question.context, question.question), question)
    return list(found.values())


def _misconceptions(material: Mapping[str, Any]) -> list[OpenQuestion]:
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


def load_material(folder: Path, name: str) -> dict[str, Any]:
    """One of the files of open-ended material: `passages`, `misconceptions` or `word_problems`."""
    material: dict[str, Any] = yaml.safe_load((folder / "open" / f"{name}.yaml").read_text(encoding="utf-8"))
    return material


def open_pool(folder: Path, task: str, seed: int, n: int) -> list[OpenQuestion]:
    """Different questions of a task in a seeded order; misconceptions are as many as are written."""
    dice = random.Random(f"{seed}/{task}")
    names = load_material(folder, "passages")
    if task == "squad":
        return _different(lambda: dice.choice(passage(names, dice)), n)
    if task == "gsm8k":
        problems = load_material(folder, "word_problems")
        return _different(lambda: word_problem(problems, names, dice), n)
    return _misconceptions(load_material(folder, "misconceptions"))


def make_open_questions(folder: Path, split: str, seed: int = 0) -> list[OpenQuestion]:
    """The open-ended questions of `train` or `test`, `OPEN_QUESTIONS[split]` a task, disjoint in facts.

    A misconception's phrasings stay in one split; a passage or word problem with its names and numbers is a fact.
    """
    questions = []
    for task in ("squad", "truthfulqa", "gsm8k"):
        pool = open_pool(folder, task, seed, round(1.1 * sum(OPEN_QUESTIONS.values())))
        facts = sorted({question.fact or question.context + question.question for question in pool})
        random.Random(f"{seed}/{task}/split").shuffle(facts)
        test = set(facts[: round(len(facts) * 0.4)])
        mine = [
            question
            for question in pool
            if ((question.fact or question.context + question.question) in test) == (split == "test")
        ]
        random.Random(f"{seed}/{task}/{split}").shuffle(mine)
        for number, question in enumerate(mine[: OPEN_QUESTIONS[split]]):
            id = f"{task}-{split}-{number:03d}"
            fact = question.fact or f"{task}/{id}"
            questions.append(question.model_copy(update={"id": id, "split": split, "fact": fact}))
    return questions
