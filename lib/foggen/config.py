"""Profiles: every parameter of the recipe, named once and validated on load.

A profile is one YAML file that sets all parameters, or names another as its `base` and sets what
differs. Knows nothing of what the parameters do.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from foggen.store import ROOT

PROFILES = Path(__file__).parent / "profiles"


class SettingsError(ValueError):
    """A profile or an override that cannot be used; the message names the expected form."""


# ---- The parameters


class Part(BaseModel):
    """A group of settings: immutable, and without names that it does not know."""

    model_config = {"extra": "forbid", "frozen": True, "allow_inf_nan": False}


class Lora(Part):
    """The adapter that one round trains and merges: peft.LoraConfig's own names."""

    r: PositiveInt
    lora_alpha: PositiveInt
    target_modules: str | list[str]


class Sft(Part):
    """Supervised fine-tuning of one round: trl.SFTConfig's own names."""

    learning_rate: PositiveFloat
    lr_scheduler_type: Literal["linear", "cosine", "constant"]
    warmup_steps: NonNegativeFloat  # below 1: a share of all steps
    weight_decay: NonNegativeFloat
    num_train_epochs: PositiveFloat
    per_device_train_batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt
    padding_free: bool
    use_liger_kernel: bool


class Training(Part):
    """What TRL does not ask for."""

    max_length: PositiveInt  # tokens per row; longer rows are left out, and counted
    attn_implementation: str
    processes: PositiveInt  # GPUs, one for each process


class FormatInstall(Part):
    """One pass before the chain, for models that cannot follow the format: who labels its rows."""

    labels_from: str
    revision: str | None = None


class Edge(Part):
    """The small model: a folder of this checkout, or a hub id."""

    model: str
    revision: str | None
    format_install: FormatInstall | None


class Cloud(Part):
    """The strong model, local or behind an OpenAI-compatible endpoint."""

    engine: Literal["transformers", "vllm", "openai"]
    model: str
    revision: str | None
    base_url: str | None
    key_variable: str | None  # the environment variable that holds the key, never the key itself
    on_failure: Literal["stop", "keep_local"]
    options: dict[str, Any]


class Columns(Part):
    """The columns of a data set that are not recognised by their names."""

    question: str | None = None
    context: str | None = None
    options: str | list[str] | None = None  # one column, or one per option
    answer: str | None = None
    answer_is: Literal["letter", "index0", "index1", "text"] | None = None
    domain: str | None = None
    fact: str | None = None
    id: str | None = None
    messages: str | None = None


class Source(Part):
    """A set of multiple-choice questions: a hub id, or a file or folder of tables."""

    path: str
    name: str | None = None  # configuration of a hub data set
    split: str | None = None
    revision: str | None = None
    use: Literal["train", "dev", "test", "divide"] | None = None  # null: its own splits, if any
    domain: str | None = None  # of all rows; null: every row names its own
    columns: Columns = Columns()
    rows: PositiveInt | None = None  # at most so many of a split or file, at random
    licence: str = ""


class Data(Part):
    """Where questions come from: `sources`, else `bank`; `questions` replaces the test split."""

    bank: str
    sources: list[Source]
    questions: str | None
    open_ended: str | None


class PerTask(Part):
    """A number for every open-ended task."""

    squad: NonNegativeInt
    truthfulqa: NonNegativeInt
    gsm8k: NonNegativeInt


class R15(PerTask):
    """Rows of the open-ended branch: new ones by task, and replayed ones of the chain."""

    replay: NonNegativeInt


class OpenEnded(Part):
    """The open-ended evaluation and its branch round."""

    eval_questions: PositiveInt  # per task
    max_new_tokens: PerTask
    r15: R15
    r15_model: str | None  # a released branch checkpoint, instead of training one
    r15_revision: str | None


class Automix(Part):
    """The self-verification baseline."""

    k: PositiveInt
    temperature: PositiveFloat
    max_new_tokens: PositiveInt


class Settings(Part):
    """The resolved recipe of one run."""

    name: str
    seed: NonNegativeInt
    seeds: list[NonNegativeInt]
    domains: list[str] = Field(min_length=1)  # rotation order
    rounds: NonNegativeInt
    calibration_rows: PositiveInt
    new_rows: PositiveInt
    replay_rows: NonNegativeInt
    samples: PositiveInt
    temperature: PositiveFloat
    top_p: float = Field(gt=0, le=1)
    top_k: NonNegativeInt  # 0: off
    max_new_tokens: PositiveInt
    tie: Literal["up", "down"]
    labels: Literal["sampled", "exact"]
    answer_target: Literal["gold", "self", "cloud"]
    label_reference: Literal["gold", "cloud"]
    relabel_replay: bool
    label_control: Literal["none", "random", "permuted", "frozen"]
    prompt_variant: Literal["blank_line", "compact"]
    tau: float = Field(ge=0, le=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    threads: PositiveInt | None  # of PyTorch on the CPU; null: its own choice
    lora: Lora
    sft: Sft
    training: Training
    engine: Literal["transformers", "vllm"]
    engine_options: dict[str, Any]
    edge: Edge
    cloud: Cloud
    data: Data
    dev_questions: PositiveInt | None  # null: all
    test_questions: PositiveInt | None
    open_ended: OpenEnded
    automix: Automix

    def only(self, *names: str) -> dict[str, Any]:
        """The named settings as plain values: what a stage depends on, for its key."""
        return self.model_dump(mode="json", include=set(names))


def derive_seed(seed: int, *names: object) -> int:
    """The seed of one stage: 31 bits of a hash of the run's seed and the stage's name."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


# ---- Profiles


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without aliases (a few nested ones fill the memory), that names nothing twice."""

    def fetch_alias(self) -> None:
        raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=self.get_mark())

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]} twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"not readable as YAML: {error}") from None


def load_profile(profile: str | Path, overrides: Mapping[str, object] | None = None) -> Settings:
    """Settings of a profile (a name in `profiles/`, or the path of a YAML file) with `overrides`.

    Raises SettingsError with the file, every wrong parameter, its value and the expected form.
    """
    is_file = str(profile).endswith((".yaml", ".yml"))
    path = Path(profile) if is_file else PROFILES / f"{profile}.yaml"
    try:
        values = dict(_yaml(path.read_text(encoding="utf-8-sig")))
        base = values.pop("base", None)
        settings = override(load_profile(base), parameters(values)) if base else Settings(**values)
        return override(settings, overrides or {})
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise SettingsError(f"{error}; expected: a YAML file, or one of {known}") from None
    except (TypeError, ValueError) as error:
        text = re.sub(r"\n +For further information.*", "", str(error))  # of pydantic
        raise SettingsError(f"profile {profile}: {text}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """Reads `name=value` of a command line: `sft.learning_rate=1e-4`, `domains=[law, math]`.

    Lists, mappings and null are YAML; other values stay texts for validation.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingsError(f"{text!r} is no override; expected: name=value, such as rounds=7")
    return name, _yaml(value) if re.match(r"$|null$|[\[{]", value) else value


def parameters(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every parameter by its dotted name: {"rounds": 14, "sft.learning_rate": 5e-05, ...}.

    Values of `engine_options`, `cloud.options` and `edge.format_install` stay whole.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        whole = not isinstance(value, dict) or name.endswith(("options", "format_install"))
        flat |= {name: value} if whole else parameters(value, f"{name}.")
    return flat


def override(settings: Settings, overrides: Mapping[str, object]) -> Settings:
    """The same settings with some parameters changed, by dotted name.

    Raises SettingsError for a name that is none, pydantic.ValidationError for a wrong value.
    """
    values = settings.model_dump()
    names = list(parameters(values))
    for name, value in overrides.items():
        if name not in names:
            close = get_close_matches(name, names, cutoff=0.5) or names
            raise SettingsError(f"{name!r} is not a parameter; expected: {' or '.join(close)}")
        *groups, last = name.split(".")
        group = values
        for key in groups:
            group = group[key]
        group[last] = value
    return Settings.model_validate(values)


# ---- What is of the hub

REVISION = dict(model="revision", labels_from="revision", path="revision", r15_model="r15_revision")


def is_local(name: str) -> bool:
    """Whether a name is a file or folder of this checkout or machine, and no hub id."""
    return Path(name).is_absolute() or (ROOT / name).exists()


def hub_entries(values: Any) -> Iterator[tuple[dict[str, Any], str, str]]:
    """What a profile's values name of the hub: a group of settings, where its id and revision are.

    ({"model": "Qwen/Qwen3-0.6B", "revision": None, ...}, "model", "revision")
    """
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, dict | list):
            yield from hub_entries(value)
    if isinstance(values, dict) and values.get("engine") != "openai":
        for name, revision in REVISION.items():
            hub_id = values.get(name)
            if isinstance(hub_id, str) and hub_id and revision in values and not is_local(hub_id):
                yield values, name, revision
