"""Profiles and overrides: every mistake is named, with the form it should have had."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from foggen.config import (
    PROFILES,
    SettingsError,
    derive_seed,
    load_profile,
    override,
    parameter_names,
    parse_override,
)
from foggen.questions import DOMAINS


def test_published_numbers_stand_in_the_paper_profile():
    paper = load_profile("paper")
    assert (paper.rounds, paper.calibration_rows, paper.samples, paper.temperature) == (14, 1800, 8, 0.7)
    assert (paper.new_rows + paper.replay_rows, paper.tau, paper.max_new_tokens) == (1800, 0.5, 64)
    assert (paper.lora.r, paper.lora.alpha, paper.lora.targets) == (16, 32, "all-linear")
    assert (paper.sft.learning_rate, paper.sft.epochs, paper.dtype) == (5e-5, 2, "bfloat16")
    r15 = paper.open_ended.r15
    assert (r15.squad, r15.truthfulqa, r15.gsm8k, r15.replay) == (133, 91, 152, 1500)
    assert paper.edge.model == "Qwen/Qwen3-0.6B" and tuple(paper.domains) == DOMAINS


def test_pocket_is_the_same_recipe_smaller():
    pocket, paper = load_profile("pocket"), load_profile("paper")
    kept = ("domains", "rounds", "samples", "temperature", "tie", "labels", "answer_target", "tau", "lora")
    assert pocket.only(*kept) == paper.only(*kept)
    assert pocket.calibration_rows < paper.calibration_rows


@pytest.mark.parametrize("name", sorted(file.stem for file in PROFILES.glob("*.yaml")))
def test_every_profile_sets_every_parameter_and_nothing_else(name):
    assert load_profile(name).name == name


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate=1e-4", "sft.learning_rate", 1e-4),
        ("sft.learning_rate=0.001", "sft.learning_rate", 1e-3),
        ("relabel_replay=false", "relabel_replay", False),
        ("relabel_replay=true", "relabel_replay", True),
        ("test_questions=null", "test_questions", None),
        ("dev_questions=70", "dev_questions", 70),
        ("domains=[law, math]", "domains", ["law", "math"]),
        ("tie=down", "tie", "down"),
        ("temperature=1", "temperature", 1.0),
        ("automix.temperature=0.5", "automix.temperature", 0.5),
        (
            "format_install={labels_from: a/b}",
            "edge.format_install",
            {"labels_from": "a/b", "revision": None},
        ),
        ("data.questions=a=b", "data.questions", "a=b"),
    ],
)
def test_overrides_by_full_or_short_name(text, name, value):
    values = load_profile("pocket", dict([parse_override(text)])).model_dump()
    for part in name.split("."):
        values = values[part]
    assert values == value


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"learning_rat": 1}, ["'learning_rat' is not a parameter", "sft.learning_rate: number > 0", "tau:"]),
        ({"model": "x"}, ["ambiguous: edge.model, cloud.model"]),
        ({"rounds": "many"}, ["rounds", "'many'", "expected: integer >= 0"]),
        ({"rounds": 1.5}, ["rounds", "1.5", "integer"]),
        ({"tie": "sideways"}, ["expected: up or down"]),
        ({"tau": 2, "samples": 0}, ["2 setting(s)", "expected: number >= 0 <= 1", "expected: integer > 0"]),
        ({"relabel_replay": "maybe"}, ["expected: boolean"]),
        (
            {"format_install": {"labels": "x"}},
            ["edge.format_install.labels_from", "expected: mapping or null"],
        ),
        ({"lora": {}}, ["'lora' is not a parameter"]),
        ({"processes": 3}, ["sft.processes", "sft.batch_size=16", "multiple", "got 3", "expected: integer > 0"]),
    ],
)
def test_wrong_overrides_name_the_allowed_form(overrides, said):
    with pytest.raises(SettingsError) as error:
        load_profile("pocket", overrides)
    assert all(words in str(error.value) for words in said), str(error.value)


@pytest.mark.parametrize("text", ["rounds", "=3", ""])
def test_no_override_at_all(text):
    with pytest.raises(SettingsError, match="name=value"):
        parse_override(text)


def test_a_profile_of_ones_own(tmp_path: Path):
    values = yaml.safe_load((PROFILES / "pocket.yaml").read_text())
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({**values, "name": "mine", "rounds": 3}))
    assert load_profile(mine).rounds == 3
    mine.write_text(yaml.safe_dump({**values, "roundz": 3}))
    with pytest.raises(SettingsError, match=r"mine\.yaml.*\n  roundz"):
        load_profile(mine)
    mine.write_text(yaml.safe_dump({key: value for key, value in values.items() if key != "tie"}))
    with pytest.raises(SettingsError, match="tie: Field required; expected: up or down"):
        load_profile(mine)
    for broken in ("rounds: [", "- a list", "1.0e-4"):
        mine.write_text(broken)
        with pytest.raises(SettingsError, match=r"mine\.yaml"):
            load_profile(mine)


def test_a_profile_can_state_only_what_differs_from_its_base(tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: paper\nname: mine\nsft: {epochs: 3}\nengine_options: {}\ndomains: [law]\n")
    paper, settings = load_profile("paper"), load_profile(mine)
    assert (settings.sft.epochs, settings.sft.learning_rate) == (3, paper.sft.learning_rate)
    assert settings.engine_options == {} and paper.engine_options and settings.domains == ["law"]
    assert settings.only("cloud", "lora", "samples") == paper.only("cloud", "lora", "samples")
    mine.write_text("base: smollm2\nname: mine\n")
    with pytest.raises(SettingsError, match=r"mine\.yaml: its base smollm2 has a base itself"):
        load_profile(mine)


def test_gemma_270m_installs_the_format_with_its_sibling():
    install = load_profile("paper-gemma3-270m").edge.format_install
    sibling = load_profile("paper-gemma3-1b").edge
    assert install is not None and (install.labels_from, install.revision) == (
        sibling.model,
        sibling.revision,
    )


def test_open_data_names_domain_and_licence_of_every_source():
    sources = load_profile("open-data").data.sources
    assert [domain for domain in DOMAINS if domain in {source.domain for source in sources}] == list(DOMAINS)
    assert all(source.licence for source in sources)


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(SettingsError, match=r"paper, .*pocket"):
        load_profile("pockett")


def test_settings_cannot_change_under_a_run():
    settings = load_profile("pocket")
    with pytest.raises(ValueError, match="frozen"):
        settings.rounds = 3  # type: ignore[misc]
    assert override(settings, {"rounds": 3}).rounds == 3 and settings.rounds == 14


def test_every_parameter_has_a_form():
    assert all(parameter_names().values())


def test_seeds_differ_by_run_and_stage_and_repeat():
    seeds = {derive_seed(seed, name) for seed in range(20) for name in ("r01", "r02", "buffer")}
    assert len(seeds) == 60 and all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "r01") == derive_seed(0, "r01") != derive_seed(0, "r0", 1)
