"""The plan of every profile: offline, without weights, with the numbers that it rests on."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from foggen import estimate
from foggen.config import PROFILES, load_profile, override
from foggen.reproduce import main
from foggen.store import ROOT


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and any request or loading of weights fails."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan asks no hub and loads no weights")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


@pytest.mark.parametrize("name", sorted(file.stem for file in PROFILES.glob("*.yaml")))
def test_every_profile_has_a_plan_offline(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--profile", name, "--run", str(tmp_path / "run"), "--list"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    settings = load_profile(name)
    assert "an estimate" in said and "Time = parameters x tokens" in said and f"{settings.edge.model}: " in said
    assert ("fine-tuning" in said) == (settings.rounds > 0)
    assert ("format install" in said) == (settings.edge.format_install is not None)
    for source in settings.data.sources:
        assert f"(licence: {source.licence})" in said
    assert ("in this checkout" in said) == (name == "pocket") and ("to download" in said) == (name != "pocket")


def test_sizes_come_from_the_configuration_or_the_name(tmp_path: Path) -> None:
    edge = estimate.model_size("data/pocket/edge")
    weights = (ROOT / "data" / "pocket" / "edge" / "model.safetensors").stat().st_size
    assert edge and edge.config is not None and 1 < weights / edge.total < 5
    cloud = estimate.model_size("Qwen/Qwen3-30B-A3B-Instruct-2507")
    assert cloud == estimate.Model(30e9, 3e9, None)
    assert [estimate.model_size(name).total for name in ("google/gemma-3-270m", "x/SmolLM2-135M-Instruct")] == [
        270e6,
        135e6,
    ]  # type: ignore[union-attr]
    assert estimate.model_size("some/model") is None


def test_a_rounds_work_by_hand() -> None:
    works = {work.stage: work for work in estimate.works(load_profile("paper"), 148)}
    tuning = works["a round: fine-tuning"]
    assert (tuning.times, tuning.rows, tuning.trained) == (14, 1800, 1800 * 160 * 2)
    model = estimate.Model(0.6e9, 0.6e9, None)
    floor = 6 * 0.6e9 * 1800 * 160 * 2 / 1e15  # one round at 1 PFLOP/s: 2 s
    assert tuning.seconds(model, 1e15) == pytest.approx(14 * floor * estimate.TRAIN / 6)
    samples = works["a round: samples for labels"]
    assert (samples.read, samples.written) == (300 * 148, 300 * 8 * 12)
    assert "a round: fine-tuning" not in {w.stage for w in estimate.works(load_profile("evaluate-released"), 148)}


def test_a_cached_snapshot_is_found_by_revision(tmp_path: Path) -> None:
    settings = load_profile("paper")
    snapshot = tmp_path / "cache" / "models--Qwen--Qwen3-0.6B" / "snapshots" / str(settings.edge.revision)
    snapshot.mkdir(parents=True)
    lines = list(estimate.where(settings))
    assert f"Qwen/Qwen3-0.6B: in the cache, {str(settings.edge.revision)[:8]}" in lines
    other = override(settings, {"edge.revision": "another"})
    assert "Qwen/Qwen3-0.6B: to download, about 1.2 GB, revision another" in list(estimate.where(other))
