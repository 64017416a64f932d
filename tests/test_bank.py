"""The question bank: what is written, what is computed, and no leaks between the splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import make_bank as bank
import pytest
from make_bank import Fact

from foggen.chain import calibration_questions
from foggen.config import load_profile
from foggen.prompts import LETTERS
from foggen.questions import (
    DOMAINS,
    OpenQuestion,
    Question,
    load_questions,
    open_splits,
    splits,
)
from foggen.store import ROOT

QUESTIONS = ROOT / load_profile("pocket").data.bank


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return bank.load_facts(bank.BANK)


@pytest.fixture(scope="module")
def questions() -> dict[str, list[Question]]:
    return {split: load_questions(QUESTIONS / f"{split}.jsonl") for split in bank.SPLITS}


@pytest.fixture(scope="module")
def open_ended() -> dict[str, list[OpenQuestion]]:
    return open_splits(load_profile("pocket"))


def test_the_committed_files_are_what_the_maker_writes(tmp_path: Path) -> None:
    bank.main(["--out", str(tmp_path)])
    made, committed = (
        {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.*")}
        for folder in (tmp_path, QUESTIONS)
    )
    files = {"train.jsonl", "dev.jsonl", "test.jsonl"}
    assert set(made) == {*files, "open_ended/train.jsonl", "open_ended/test.jsonl"}
    assert [name for name in made | committed if made.get(name) != committed.get(name)] == [], (
        "run `make bank`"
    )


def test_what_is_written_is_what_is_loaded(
    facts: list[Fact],
    questions: dict[str, list[Question]],
    open_ended: dict[str, list[OpenQuestion]],
) -> None:
    assert questions == {split: bank.make_questions(facts, split) for split in bank.SPLITS}
    assert open_ended == {
        split: bank.make_open_questions(bank.BANK, split) for split in bank.OPEN_QUESTIONS
    }


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_its_facts(facts: list[Fact], domain: str) -> None:
    written = [fact for fact in facts if fact.domain == domain and fact.subject]
    assert len(written) >= 120
    assert len({fact.id for fact in written}) == len(written)
    assert set(Counter(fact.difficulty for fact in written)) == {1, 2, 3}
    assert all(len(fact.rivals) >= 4 and fact.answer not in fact.rivals for fact in written)
    assert all(
        fact.answer.casefold() not in fact.subject.casefold()
        for fact in written
        if len(fact.answer) > 2
    )


def test_kazakh_culture_is_in_two_languages(questions: dict[str, list[Question]]) -> None:
    languages = Counter(q.lang for q in questions["test"] if q.domain == "kazakh_culture")
    assert min(languages["kk"], languages["en"]) > 60


def test_nothing_is_in_two_splits(questions: dict[str, list[Question]]) -> None:
    """No fact, and no text with its answer; nor in what the chain trains on."""

    def asked(split: str) -> set[tuple[str, str]]:
        return {(q.question, q.options[LETTERS.index(q.answer)]) for q in questions[split]}

    assert not asked("train") & asked("test") and not asked("dev") & asked("test")
    met = {split: {question.fact for question in group} for split, group in questions.items()}
    assert not met["train"] & (met["test"] | met["dev"]) and not met["dev"] & met["test"]
    settings = load_profile("pocket")
    assert splits(settings) == questions
    buffer = calibration_questions(questions["train"], settings)
    assert not met["test"] & {question.fact for question in buffer}


@pytest.mark.parametrize(("split", "least"), [("train", 400), ("dev", 50), ("test", 250)])
def test_enough_questions_a_domain(
    questions: dict[str, list[Question]], split: str, least: int
) -> None:
    counts = Counter(question.domain for question in questions[split])
    assert set(counts) == set(DOMAINS) and min(counts.values()) >= least
    assert len({question.id for question in questions[split]}) == len(questions[split])


def test_gold_letters_are_balanced_among_four_options(questions: dict[str, list[Question]]) -> None:
    for domain in DOMAINS:
        gold = Counter(
            q.answer for q in questions["test"] if q.domain == domain and len(q.options) == 4
        )
        assert max(gold.values()) / sum(gold.values()) < 0.32
    sizes = Counter(len(question.options) for question in questions["test"])
    assert sizes[4] > 0.7 * sum(sizes.values()) and sizes[3] and sizes[5]


def test_the_right_option_is_the_facts_answer(
    facts: list[Fact], questions: dict[str, list[Question]]
) -> None:
    known = {fact.id: fact for fact in facts}
    for question in questions["test"]:
        assert question.options[LETTERS.index(question.answer)] == known[str(question.fact)].answer


def test_computed_answers_are_right(facts: list[Fact]) -> None:
    computed = {
        domain: [fact for fact in facts if fact.id.startswith(f"{domain}/computed")]
        for domain in ("math", "coding")
    }
    sums = [fact for fact in computed["math"] if fact.questions[0].startswith("What is")]
    snippets = computed["coding"]
    assert len(sums) > 30 and len(snippets) > 100
    for fact in [*sums, *snippets]:
        expression = fact.questions[0].removeprefix("What is ").rstrip(" ?")
        expression = expression.removeprefix("What does Python print for ")
        assert str(eval(expression)) == fact.answer


def test_the_same_seed_makes_the_same_bank(facts: list[Fact]) -> None:
    assert bank.load_facts(bank.BANK) == facts
    assert bank.make_questions(facts, "dev", seed=3) == bank.make_questions(facts, "dev", seed=3)
    assert bank.make_questions(facts, "dev", seed=3) != bank.make_questions(facts, "dev", seed=4)


def test_open_ended_sets_are_large_and_disjoint(open_ended: dict[str, list[OpenQuestion]]) -> None:
    for split, least in (("train", 250), ("test", 150)):
        counts = Counter(question.task for question in open_ended[split])
        assert set(counts) == {"squad", "truthfulqa", "gsm8k"} and min(counts.values()) >= least
    facts = {split: {question.fact for question in group} for split, group in open_ended.items()}
    texts = {split: {q.context + q.question for q in group} for split, group in open_ended.items()}
    assert not facts["train"] & facts["test"] and not texts["train"] & texts["test"]


def test_spans_are_in_their_passages_and_solutions_end_in_answers(
    open_ended: dict[str, list[OpenQuestion]],
) -> None:
    for question in open_ended["test"]:
        if question.task == "squad":
            assert question.answers[0] in question.context
        if question.task == "gsm8k":
            assert question.solution.rstrip(".").endswith(f"= {question.answers[0]}")
        if question.task == "truthfulqa":
            assert question.incorrect and not set(question.answers) & set(question.incorrect)


def test_a_bad_fact_is_named(tmp_path: Path) -> None:
    texts = "phrasings: ['is {s} ?'], statements: ['{s} {a}']"
    relation = f"{{id: r, lang: en, {texts}, facts: [[a, b, 1], [c, d]]}}"
    (tmp_path / "law.yaml").write_text(f"relations: [{relation}]", encoding="utf-8")
    with pytest.raises(bank.BankError, match=r"law.yaml: r, fact 2: expected \[subject, answer"):
        bank.domain_facts(tmp_path / "law.yaml")
    (tmp_path / "law.yaml").write_text("relations: [{id: r, lang: en}]", encoding="utf-8")
    with pytest.raises(bank.BankError, match="'r' has no facts, phrasings, statements"):
        bank.domain_facts(tmp_path / "law.yaml")
    (tmp_path / "law.yaml").write_text("{computed: astrology, relations: []}", encoding="utf-8")
    with pytest.raises(bank.BankError, match=r"computed is 'astrology', expected one of ratios"):
        bank.domain_facts(tmp_path / "law.yaml")
