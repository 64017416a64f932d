"""Profiles and overrides: every mistake is named, with the form it should have had."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from foggen.config import (
    PROFILES,
    Settings,
    SettingsError,
    derive_seed,
    load_profile,
    override,
    parameters,
    parse_override,
)
from foggen.questions import DOMAINS


def test_published_numbers_stand_in_the_paper_profile() -> None:
    paper = load_profile("paper")
    assert (paper.rounds, paper.calibration_rows, paper.samples) == (14, 1800, 8)
    assert (paper.temperature, paper.top_p, paper.top_k) == (0.7, 1.0, 0)
    assert (paper.new_rows + paper.replay_rows, paper.tau, paper.max_new_tokens) == (1800, 0.5, 64)
    assert paper.lora.model_dump() == {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    assert (paper.sft.learning_rate, paper.sft.num_train_epochs, paper.dtype) == (
        5e-5,
        2,
        "bfloat16",
    )
    assert (paper.answer_target, load_profile("paper-gold").answer_target) == ("cloud", "gold")
    r15 = paper.open_ended.r15
    assert (r15.squad, r15.truthfulqa, r15.gsm8k, r15.replay) == (133, 91, 152, 1500)
    assert paper.edge.model == "Qwen/Qwen3-0.6B" and tuple(paper.domains) == DOMAINS
    licences = {source.path: source.licence for source in paper.data.sources}
    assert licences == {"issai/foggen-data": "Apache-2.0", "issai/KazCulture": "unconfirmed"}


def test_pocket_is_the_same_recipe_smaller() -> None:
    pocket, paper = load_profile("pocket"), load_profile("paper")
    same = "domains rounds samples temperature top_p top_k tie labels label_reference tau lora"
    assert pocket.only(*same.split()) == paper.only(*same.split())
    assert pocket.calibration_rows < paper.calibration_rows and pocket.answer_target == "gold"


@pytest.mark.parametrize("name", sorted(file.stem for file in PROFILES.glob("*.yaml")))
def test_every_profile_sets_every_parameter_and_nothing_else(name: str) -> None:
    settings = load_profile(name)
    assert settings.name == name
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings
    assert all(source.licence for source in settings.data.sources)


def test_relatives_of_the_paper_profile() -> None:
    install, sibling = (load_profile(f"paper-gemma3-{size}").edge for size in ("270m", "1b"))
    assert install.format_install
    assert install.format_install.labels_from == sibling.model
    assert install.format_install.revision == sibling.revision
    domains = {source.domain for source in load_profile("open-data").data.sources}
    assert domains == set(DOMAINS)


# ---- Overrides


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("sft.learning_rate=1e-4", "sft.learning_rate", 1e-4),
        ("relabel_replay=false", "relabel_replay", False),
        ("test_questions=null", "test_questions", None),
        ("domains=[law, math]", "domains", ["law", "math"]),
        ("tie=down", "tie", "down"),
        ("lora.target_modules=[q_proj]", "lora.target_modules", ["q_proj"]),
        ("temperature=1", "temperature", 1.0),
        ("edge.revision=0123456", "edge.revision", "0123456"),
        ("engine_options={batch_size: 4}", "engine_options", {"batch_size": 4}),
        (
            "edge.format_install={labels_from: a/b}",
            "edge.format_install",
            {"labels_from": "a/b", "revision": None},
        ),
        ("data.questions=a=b", "data.questions", "a=b"),
        ("data.questions=", "data.questions", None),
    ],
)
def test_overrides(text: str, name: str, value: Any) -> None:
    settings = load_profile("pocket", dict([parse_override(text)]))
    assert parameters(settings.model_dump())[name] == value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"learning_rate": 1}, ["'learning_rate' is not a parameter; expected: sft.learning_rate"]),
        ({"model": "x"}, ["expected: edge.model or cloud.model"]),
        ({"sft.learning_rat": 1}, ["expected: sft.learning_rate"]),
        ({"zzz": 1}, ["expected: name or seed or", "automix.k"]),
        ({"lora": {}}, ["expected: lora.r"]),
        ({"rounds": "many"}, ["rounds", "valid integer", "'many'"]),
        ({"seed": "-1"}, ["seed", "greater than or equal to 0", "'-1'"]),
        ({"seeds": [0, -1]}, ["seeds.1", "greater than or equal to 0"]),
        ({"tie": "sideways"}, ["'up' or 'down'"]),
        ({"tau": 2, "samples": 0}, ["2 validation errors", "equal to 1", "greater than 0"]),
        ({"tau": float("nan")}, ["tau", "finite number"]),
        ({"relabel_replay": "maybe"}, ["valid boolean"]),
        ({"edge.format_install": {"labels": "x"}}, ["edge.format_install.labels_from", "required"]),
        ({"domains": []}, ["domains", "at least 1 item"]),
    ],
)
def test_wrong_overrides_name_the_expected_form(
    overrides: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as error:
        load_profile("pocket", overrides)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "http" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["rounds", "=3", "", "domains=[law", "data.sources={a: &x 1, b: *x}"]
)
def test_no_override_at_all(text: str) -> None:
    with pytest.raises(SettingsError, match=r"name=value|not readable as YAML"):
        parse_override(text)


# ---- Profiles


def test_a_profile_of_the_reader_s_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    values = yaml.safe_load((PROFILES / "pocket.yaml").read_text("utf-8"))
    mine.write_text("\ufeff" + yaml.safe_dump({**values, "name": "өз", "rounds": 3}), "utf-8")
    assert load_profile(mine).rounds == 3
    wrong = {name: value for name, value in values.items() if name != "tie"} | {"roundz": 3}
    mine.write_text(yaml.safe_dump(wrong), "utf-8")
    with pytest.raises(
        SettingsError, match=r"mine\.yaml: 2 validation errors(.|\n)*tie\n  Field req"
    ):
        load_profile(mine)


def test_a_profile_can_state_only_what_differs_from_its_base(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "base: paper\nname: mine\nsft: {num_train_epochs: 3}\nengine_options: {}\n"
        "domains: [law]\nedge: {format_install: {labels_from: a/b}}\ndata: {sources: []}\n"
    )
    paper, settings = load_profile("paper"), load_profile(mine)
    assert (settings.sft.num_train_epochs, settings.sft.learning_rate) == (3, 5e-5)
    assert settings.engine_options == {} != paper.engine_options
    assert settings.domains == ["law"] and settings.data.sources == []
    assert settings.edge.format_install and settings.edge.model == paper.edge.model
    assert settings.only("cloud", "lora", "samples") == paper.only("cloud", "lora", "samples")
    for text, words in (
        ("base: paper\nsft: {epochs: 3}\n", "'sft.epochs' is not a parameter"),
        ("base: paper\n1: 2\n", "'1' is not a parameter"),
        ("base: nowhere\n", "no such file|No such file"),
    ):
        mine.write_text(text)
        with pytest.raises(SettingsError, match=rf"profile .*mine\.yaml: (.|\n)*({words})"):
            load_profile(mine)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rounds: [", "not readable as YAML"),
        ("- a list", "dictionary update"),
        ("", "'NoneType' object"),
        ("seed: 1\nrounds: 2\nseed: 3\n", "seed twice"),
        ("sft: {weight_decay: 0, weight_decay: 1}", "weight_decay twice"),
        (BOMB, "aliases are not read"),
        ("seed: " + "7" * 5000, "Exceeds the limit"),
        ("!!python/object:os.system {}", "could not determine a constructor"),
        ("name: pocket\n".encode("utf-16"), "'utf-8' codec can't decode"),
        (b"name: a\x00b", "special characters"),
        ("base: 5", "No such file"),
    ],
)
def test_unreadable_profiles_are_named(content: str | bytes, words: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError, match=rf"profile .*mine\.yaml: (.|\n)*({words})"):
        load_profile(mine)


def test_unknown_profile_names_the_known_ones(tmp_path: Path) -> None:
    for name in ("pockett", tmp_path / "nowhere.yaml"):
        with pytest.raises(SettingsError, match=r"No such file.*paper, .*pocket"):
            load_profile(name)


def test_settings_cannot_change_under_a_run() -> None:
    settings = load_profile("pocket")
    with pytest.raises(ValueError, match="frozen"):
        settings.rounds = 3  # type: ignore[misc]
    assert override(settings, {"rounds": 3}).rounds == 3 and settings.rounds == 14


def test_seeds_differ_by_run_and_stage_and_repeat() -> None:
    seeds = {derive_seed(seed, name) for seed in range(20) for name in ("r01", "r02", "buffer")}
    assert len(seeds) == 60 and all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "r01") == 606723114 != derive_seed(0, "r0", 1)
