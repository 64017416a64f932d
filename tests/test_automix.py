"""AutoMix against its stored runs, the original package, and answers worked out by hand."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from foggen import automix
from foggen.automix import CANDIDATES, KINDS, UNION, Costs, Policy, Price
from foggen.engines import Completion, Sampling
from foggen.questions import Question

SHARED = Path(__file__).resolve().parents[2] / "shared" / "automix"
stored = pytest.mark.skipif(not SHARED.is_dir(), reason="the original's stored runs are not there")
PEER = dict(verification="p_ver_13b", local_correct="llama13b_f1", cloud_correct="llama70b_f1")
SWAPPED = {"local_correct": "cloud_correct", "cloud_correct": "local_correct"}
METHODS = list(CANDIDATES)
COSTS = Costs()


def table(v: Any, small: Any, large: Any) -> pd.DataFrame:
    columns = {"verification": v, "local_correct": small, "cloud_correct": large}
    return pd.DataFrame(columns, dtype=float).rename_axis("id").reset_index()


def random_table(seed: int, rows: int) -> pd.DataFrame:
    """Outcomes in which verification tells something, and the cloud is mostly better.

    Correctness is 0 or 1, with odd seeds 0.5 too.
    """
    rng = np.random.default_rng(seed)
    small = rng.choice([0, 0.5, 1] if seed % 2 else [0, 1], rows)
    v = rng.binomial(8, 0.4 + 0.25 * small) / 8
    return table(v, small, rng.random(rows) < 0.75)


def worth(outcomes: pd.DataFrame, policy: Policy, costs: Costs = COSTS) -> Price:
    return automix.price(outcomes, policy.route(outcomes["verification"]), costs)


def peer_class(name: str) -> Any:
    module = pytest.importorskip("automix.automix_methods", reason="needs automix-llm")
    return getattr(module, name)


def peer_table(outcomes: pd.DataFrame) -> pd.DataFrame:
    """`outcomes` with the column names and the categories that the original looks for."""
    return outcomes.rename(columns=PEER).assign(category=automix.categories(outcomes))


def peer(method: str, outcomes: pd.DataFrame, costs: Costs) -> Any:
    """The original, trained on `outcomes`."""
    package = pytest.importorskip("automix", reason="needs automix-llm")
    paid = {"costs": [costs.small, costs.large], "verifier_cost": costs.verify}
    mixer = package.Automix(peer_class(method)(num_bins=8), **paid)
    mixer.train(peer_table(outcomes))
    return mixer


def as_policy(method: str, parameter: Any) -> Policy:
    """A parameter of the original as our policy."""
    if method == "POMDP":
        return as_policy(UNION[parameter[1]], parameter[0])
    return Policy(method, tuple(parameter) if isinstance(parameter, list | tuple) else (parameter,))


# --- the stored runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((SHARED / "golden.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def rows() -> dict[str, pd.DataFrame]:
    original = {theirs: ours for ours, theirs in PEER.items()}
    frame = pd.read_csv(SHARED / "input_400.csv").rename(columns=original)
    train, test = (frame[frame["split"] == split] for split in ("train", "test"))
    val50 = frame.set_index("id").loc[pd.read_csv(SHARED / "val50_ids.csv")["id"]].reset_index()
    return {"all": frame, "train200": train, "val50": val50, "test": test}


def fixed_answers(frame: pd.DataFrame) -> pd.DataFrame:
    """The original's FixedAnswerRouting: a threshold that is never above one answer's share."""
    fixed = frame["llama13b_pred_ans"] == "unanswerable"
    return frame.assign(verification=frame["verification"].mask(fixed, 0.0))


@stored
@pytest.mark.parametrize("number", range(48))
def test_stored_run(golden: dict[str, Any], rows: dict[str, pd.DataFrame], number: int) -> None:
    run = golden["runs"][number]
    method, train, test = run["method"], rows[run["fit"]], rows["test"]
    if method.startswith("FixedAnswerRouting"):
        method, train, test = "Threshold", fixed_answers(train), fixed_answers(test)
    costs = Costs(*run["costs"], run["verifier_cost"])
    policy = automix.best_policy(method, train, costs)
    assert policy == as_policy(method, run["best_param"])
    routed = test["id"][policy.route(test["verification"])].tolist()
    assert routed == (run["test_routed_ids"] or routed)  # stored for the runs at 1:50
    names = "avg_performance routed_fraction avg_cost automix_slm_slope ibc_base ibc_lift".split()
    expected = [run["test"][name] for name in names]
    assert worth(test, policy, costs) == pytest.approx(expected, abs=1e-9)
    assert worth(train, policy, costs).dibc == pytest.approx(run["train_best_lift"], abs=1e-9)
    assert len(CANDIDATES[method](train, 8)) == run["n_candidates"]


@stored
@pytest.mark.parametrize("method", METHODS)
def test_stored_grid(golden: dict[str, Any], rows: dict[str, pd.DataFrame], method: str) -> None:
    train = rows["train200"]
    assert automix.categories(rows["all"]).tolist() == rows["all"]["category"].tolist()
    ours = {policy: worth(train, policy) for policy in CANDIDATES[method](train, 8)}
    for cell in golden["train_grids_cost_1_50"][method]:
        expected = [cell[name] for name in ("perf", "routed", "cost", "ibc", "ibc_base", "lift")]
        price = ours.pop(as_policy(method, cell["param"]))
        assert price == pytest.approx(expected, abs=1e-9)
    assert not ours


def odds(outcomes: pd.DataFrame) -> list[tuple[int, int]]:
    """For each of nine bins 100 (n + g + h) - h and n: their ratio is the penalty it turns at."""
    bins, kinds = automix.nearest_bin(outcomes["verification"]), automix.categories(outcomes)
    counts = [[int(((bins == i) & (kinds == kind)).sum()) for kind in KINDS] for i in range(9)]
    return [(100 * sum(count) - count[2], count[0]) for count in counts]


# --- the original's defects, each beside the right answer -----------------------------------------


def test_defect_nothing_routed_at_no_cost_is_not_the_best_candidate() -> None:
    outcomes, free = table([0.5, 0.5, 1.0, 1.0], [0, 0, 1, 1], [1, 1, 1, 1]), Costs(1.0, 50.0, 0.0)
    assert peer("Threshold", outcomes, free).best_param == 0.0, "0/0 is NaN, and max() keeps it"
    assert automix.best_policy("Threshold", outcomes, free).parameter == (0.5,)
    assert automix.price(outcomes, [False] * 4, free).dibc == -1.0


@stored
def test_defect_a_worse_cloud_is_never_worth_routing_to(rows: dict[str, pd.DataFrame]) -> None:
    cases = json.loads((SHARED / "edge_cases.json").read_text())
    case = cases["LLM worse than SLM (columns swapped)"]
    swapped = rows["train200"].rename(columns=SWAPPED)
    original = worth(swapped, Policy("Threshold", (float(case["best"]),)))
    assert original.accuracy == pytest.approx(
        case["perf"]
    )  # 14.5 points lost, called a gain of 12%
    ours = worth(swapped, automix.best_policy("Threshold", swapped, COSTS))
    assert ours.accuracy > original.accuracy
    assert np.isnan(ours.dibc) and np.isnan(original.dibc)


def test_defect_rounding_does_not_tell_bins_of_the_same_odds_apart() -> None:
    """2 needy and 1 good row turn a bin at penalty 150; a row of no category moves no odds."""
    small = [0, 0, 1, 0, 0, 1, 1, 1]
    outcomes = table([0, 0, 0, 0.125, 0.125, 0.125, 0.125, 1], small, [1, 1, 1, 1, 1, 1, 0, 0])
    original = peer_class("POMDPSimple")(num_bins=8).generate_points(peer_table(outcomes))
    assert (1, *[0] * 8) in original, "the original routes one of the two bins only"
    ours = [policy.parameter[:2] for policy in CANDIDATES["POMDPSimple"](outcomes, 8)]
    assert ours == [(1, 1), (0, 0)]


@pytest.mark.parametrize("seed", range(10))
def test_pomdp_policies_are_those_of_exact_arithmetic(seed: int) -> None:
    outcomes = random_table(seed, 20 + 20 * seed)
    turns = [Fraction(top, needy) if needy else 5000 for top, needy in odds(outcomes)]
    expected = {tuple(int(penalty > turn) for turn in turns) for penalty in range(5000)}
    assert {policy.parameter for policy in CANDIDATES["POMDPSimple"](outcomes, 8)} == expected


@pytest.mark.parametrize("bins", [3, 5, 6, 7, 8, 9, 10, 20])
def test_defect_every_share_falls_into_its_bin(bins: int) -> None:
    shares, places = np.arange(bins + 1) / bins, list(range(bins + 1))
    assert automix.nearest_bin(shares, bins).tolist() == places
    original = peer_class("POMDPSimple")(num_bins=bins)
    if bins in (5, 10):  # it divides floats with //
        assert [original.get_neearest_prob_idx(share) for share in shares] != places
    outcomes = table(shares, [0.0] * (bins + 1), [1.0] + [0.0] * bins)
    nested = CANDIDATES["GreedyPOMDP"](outcomes, bins)
    assert [sum(policy.parameter) for policy in nested] == list(range(1, bins + 2))


# --- worked by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "routed"),
    [
        (Policy("Threshold", (0.25,)), [0.0, 0.1, 0.25]),
        (Policy("SelfConsistency", (0.5,)), [0.0, 0.1, 0.25, 0.4, 0.5]),
        (Policy("DoubleThreshold", (0.25, 0.5)), [0.25, 0.4, 0.5]),
        (Policy("TripleThreshold", (0.1, 0.4, 0.5)), [0.0, 0.1, 0.4, 0.5]),
        (Policy("POMDP", (0, 1, 0)), [0.25, 0.4, 0.5]),  # bins at 0, 1/2 and 1; half-way goes up
    ],
)
def test_a_policy_routes_closed_intervals_or_bins(policy: Policy, routed: list[float]) -> None:
    v = np.array([0.0, 0.1, 0.25, 0.4, 0.5, 0.75, 1.0])
    assert v[policy.route(v)].tolist() == routed


def test_candidates_of_the_interval_methods() -> None:
    methods = ("Threshold", "DoubleThreshold", "TripleThreshold", "SelfConsistency")
    policies = {method: CANDIDATES[method](random_table(6, 50), 8) for method in methods}
    assert [len(policies[method]) for method in methods] == [9, 28, 56, 1]
    assert not any(policy.route([1.0])[0] for policy in policies["DoubleThreshold"])


def test_equally_good_pomdp_policies_give_the_more_accurate() -> None:
    """5 of 9 and 7 of 13 gained on 50 rows at 1:50 are worth exactly 1/100 each."""
    gained = np.repeat([1, 0, 1, 0], [5, 4, 2, 39])
    outcomes = table(np.repeat([0.375, 0.125, 1.0], [9, 4, 37]), 1 - gained, 1)
    policy = automix.best_policy("POMDPSimple", outcomes, COSTS)
    assert policy.parameter == (0, 1, 0, 1, 0, 0, 0, 0, 0)


def test_price_in_closed_form() -> None:
    outcomes, costs = random_table(5, 500), Costs(1.0, 60.0, 2.0)
    assert automix.price(outcomes, [True] * 500, COSTS).dibc == pytest.approx(49 / 51 - 1)
    assert automix.price(outcomes, [False] * 500, COSTS).dibc == -1.0
    gap = outcomes["cloud_correct"] - outcomes["local_correct"]
    routed = outcomes["verification"] <= 0.5
    both = automix.price(outcomes, [routed, ~routed], costs)
    for number, mask in enumerate((routed, ~routed)):
        rho, gain = mask.mean(), gap[mask].mean()
        closed = rho * gain * 59 / ((2 + rho * 60) * gap.mean()) - 1
        assert both.dibc[number] == pytest.approx(closed)
        assert both.cost[number] == pytest.approx(1 + 2 + rho * 60)


@pytest.mark.parametrize("cloud", [[1, 0], [0, 0]], ids=["as good", "worse"])
def test_a_cloud_that_is_no_better_has_no_dibc_and_still_a_fit(cloud: list[float]) -> None:
    outcomes = table([0.0, 1.0], [0, 1], cloud)
    assert np.isnan(automix.price(outcomes, [True, False], COSTS).dibc)
    assert automix.best_policy("Threshold", outcomes, COSTS).parameter == (0.0,)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("v", [[1.0], [0.0] * 3, [0.5] * 2, [3 / 7, 1 / 16], [np.nan, 1.0]])
def test_few_rows_have_a_fit(method: str, v: list[float]) -> None:
    policy = automix.best_policy(method, table(v, 0, 1), Costs(1.0, 50.0, 0.0))
    assert policy.route([0.0, 3 / 7, 0.5, 1.0]).dtype == bool


def test_an_empty_verification_is_one_that_could_not_be_read() -> None:
    outcomes = table([np.nan, 1.0], [0, 1], [1, 1])
    assert automix.verification(outcomes).tolist() == [0.0, 1.0]
    assert automix.best_policy("Threshold", outcomes, COSTS).parameter == (0.0,)


@pytest.mark.parametrize("costs", [Costs(2.0, 1.0), Costs(0.0, 1.0), Costs(1.0, 50.0, -1.0)])
def test_impossible_costs(costs: Costs) -> None:
    with pytest.raises(ValueError, match="0 < small < large and verify >= 0"):
        automix.price(random_table(0, 10), [True] * 10, costs)


def test_ten_fits_on_a_thousand_rows() -> None:
    pool, few = random_table(9, 1500), random_table(9, 1000)
    samples = [pool.sample(1000, random_state=seed) for seed in range(10)]
    fits = [automix.best_policy("POMDP", sample, COSTS) for sample in samples]
    assert automix.fit("POMDP", pool, COSTS) == fits
    assert automix.fit("POMDP", few, COSTS) == [automix.best_policy("POMDP", few, COSTS)]


# --- verification through an engine ---------------------------------------------------------------

RIGHT, WRONG = "The AI generated answer is Correct.", "The AI generated answer is Incorrect."


class Verifier:
    """Says two of three times that an answer is right, and remembers the questions."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, prompts: Any, sampling: Sampling) -> list[list[Completion]]:
        self.asked += [prompt[-1]["content"].split("Question: ")[-1][:4] for prompt in prompts]
        texts = [RIGHT, RIGHT, WRONG][: sampling.n]
        return [[Completion(text, 5, True) for text in texts] for _ in prompts]


def test_share_of_readable_decisions() -> None:
    assert automix.verification_share([RIGHT, RIGHT, WRONG, "mumble"]) == pytest.approx(2 / 3)
    assert automix.verification_share(["mumble"] * 8) == automix.verification_share([]) == 0.0


@pytest.mark.parametrize("letters", [["A", None, "B"], [None, None, None]])
def test_verify_asks_only_about_answers(letters: list[str | None]) -> None:
    fields = {"domain": "math", "options": ("1", "2"), "answer": "A"}
    questions = [Question(id=str(n), question=f"{n}+1?", **fields) for n in range(3)]
    engine: Any = Verifier()
    verified = automix.verify(engine, questions, letters, Sampling(3))
    assert engine.asked == [f"{n}+1?" for n, letter in enumerate(letters) if letter]
    for letter, row in zip(letters, verified, strict=True):
        assert row["verification"] == pytest.approx(2 / 3 if letter else 0)
        assert row["verification_tokens"] == (15 if letter else 0)
        assert row["texts"] == ([RIGHT, RIGHT, WRONG] if letter else [])
