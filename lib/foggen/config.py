"""Profiles: every parameter of the recipe, named once, validated on load.

A profile is one YAML file that sets all of them, or names another as its `base` and sets what differs. A run may
override single values by name. Knows nothing of what the parameters do.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from foggen.shapes import Columns

PROFILES = Path(__file__).parent / "profiles"
Share = Field(ge=0, le=1)


class SettingsError(ValueError):
    """A profile or an override that cannot be used; the message names the allowed form."""


class Part(BaseModel):
    """A group of settings: immutable, and closed to names it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Lora(Part):
    """The adapter that one round trains and merges."""

    r: PositiveInt
    alpha: PositiveInt
    targets: str | list[str]


class Sft(Part):
    """Supervised fine-tuning of one round."""

    learning_rate: PositiveFloat
    scheduler: Literal["linear", "cosine", "constant"]
    warmup_ratio: float = Share
    weight_decay: float = Field(ge=0)
    epochs: PositiveFloat
    batch_size: PositiveInt
    gradient_accumulation: PositiveInt
    max_length: PositiveInt = Field(description="tokens a row; longer rows are left out, and counted")
    packing: bool = Field(description="a batch's rows joined into one sequence without pads")
    attention: str = Field(description="transformers' attn_implementation: sdpa, flash_attention_2, ...")
    liger: bool = Field(description="Liger kernels; needs the package liger-kernel and a GPU")
    processes: PositiveInt = Field(description="GPUs that share a batch, through accelerate launch")

    @field_validator("processes")
    @classmethod
    def _share_a_batch(cls, processes: int, given: ValidationInfo) -> int:
        size = given.data.get("batch_size", 0)
        if size % processes:
            raise ValueError(f"sft.batch_size={size} is divided among them, and must be a multiple")
        return processes


class FormatInstall(Part):
    """One SFT pass before the chain, for models that cannot follow the format: who labels the buffer."""

    labels_from: str
    revision: str | None = None


class Edge(Part):
    """The small model: a folder of this checkout or a hub id."""

    model: str
    revision: str | None
    format_install: FormatInstall | None


class Cloud(Part):
    """The strong model, local or behind an OpenAI-compatible endpoint."""

    engine: Literal["transformers", "vllm", "openai"]
    model: str
    revision: str | None
    base_url: str | None
    key_variable: str | None = Field(description="environment variable that holds the key, never the key itself")
    options: dict[str, Any]


class Source(Part):
    """A set of multiple-choice questions: a hub id, or a file or folder of JSONL, CSV or Parquet."""

    path: str
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = None
    revision: str | None = None
    use: Literal["train", "dev", "test", "divide"] | None = Field(
        None, description="null: the data set's own splits where it has a test split, else divided by questions"
    )
    domain: str | None = Field(None, description="of all rows; null: each row names its own")
    columns: Columns = Columns()
    rows: PositiveInt | None = Field(None, description="at most so many of a split or file, at random")
    licence: str = ""


class Data(Part):
    """Where questions come from: `sources`, else `bank`, a folder of files; `questions` replaces the test split."""

    bank: str
    sources: list[Source]
    questions: str | None
    open_ended: str | None


class TokenLimits(Part):
    """New tokens an answer may have, by open-ended task."""

    squad: PositiveInt
    truthfulqa: PositiveInt
    gsm8k: PositiveInt


class R15(Part):
    """Rows of the open-ended branch round: new ones by task, replayed ones from the chain's buffer."""

    squad: NonNegativeInt
    truthfulqa: NonNegativeInt
    gsm8k: NonNegativeInt
    replay: NonNegativeInt


class OpenEnded(Part):
    """The open-ended evaluation and its branch round."""

    eval_questions: PositiveInt = Field(description="evaluated questions a task")
    max_new_tokens: TokenLimits
    r15: R15
    r15_model: str | None = Field(description="a released branch checkpoint, instead of training one")
    r15_revision: str | None


class Automix(Part):
    """The self-verification baseline."""

    k: PositiveInt
    temperature: PositiveFloat
    max_new_tokens: PositiveInt


class Settings(Part):
    """One run's recipe, fully resolved."""

    name: str
    seed: int
    seeds: list[int]
    domains: list[str] = Field(min_length=1, description="rotation order")
    rounds: NonNegativeInt
    calibration_rows: PositiveInt
    new_rows: PositiveInt
    replay_rows: NonNegativeInt
    samples: PositiveInt
    temperature: PositiveFloat
    max_new_tokens: PositiveInt
    tie: Literal["up", "down"]
    labels: Literal["sampled", "exact"]
    answer_target: Literal["gold", "self"]
    relabel_replay: bool
    label_control: Literal["none", "random", "permuted"]
    prompt_variant: Literal["blank_line", "compact"]
    tau: float = Share
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    threads: PositiveInt | None = Field(description="CPU threads of PyTorch; null leaves its own choice")
    lora: Lora
    sft: Sft
    engine: Literal["transformers", "vllm"] = Field(description="a round's checkpoints are local")
    engine_options: dict[str, Any]
    edge: Edge
    cloud: Cloud
    data: Data
    dev_questions: PositiveInt | None
    test_questions: PositiveInt | None
    open_ended: OpenEnded
    automix: Automix

    def only(self, *names: str) -> dict[str, Any]:
        """The named settings as plain values: what a stage depends on, for its key."""
        return self.model_dump(mode="json", include=set(names))


@functools.cache
def parameter_names(part: type[BaseModel] = Settings, prefix: str = "") -> dict[str, str]:
    """Every parameter by its dotted name, with its expected form as text."""
    names: dict[str, str] = {}
    for key, field in part.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names |= parameter_names(inner, f"{prefix}{key}.")
        else:
            names[prefix + key] = _form(part, key)
    return names


def _form(part: type[BaseModel], key: str) -> str:
    """The expected form of one field, as the schema says it: type, choices, bounds."""
    schema = part.model_json_schema()["properties"][key]
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "maximum": "<="}
    forms = []
    for one in schema.get("anyOf", [schema]):
        text = " or ".join(one.get("enum", [one.get("type", "mapping")]))
        forms.append(" ".join([text, *(f"{sign} {one[bound]}" for bound, sign in bounds.items() if bound in one)]))
    return " or ".join(forms)


def _dotted(name: str) -> str:
    """The full name of a parameter given in full or by its last part, where that is unambiguous."""
    names = parameter_names()
    found = [name] if name in names else [full for full in names if full.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    trouble = f"is ambiguous: {', '.join(found)}" if found else "is not a parameter"
    listed = "\n".join(f"  {full}: {form}" for full, form in names.items())
    raise SettingsError(f"{name!r} {trouble}. The parameters are:\n{listed}")


def _validated(values: Mapping[str, Any], origin: str) -> Settings:
    """Settings of all their values, or one line a problem: the parameter, its value and the form it should have."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = ".".join(part for part in problem["loc"] if isinstance(part, str))
            forms = [form for name, form in parameter_names().items() if f"{path}.".startswith(f"{name}.")]
            value = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
            lines.append(f"  {path}: {problem['msg']}{value}" + "".join(f"; expected: {form}" for form in forms))
        raise SettingsError(f"{origin}: {len(lines)} setting(s) cannot be used\n" + "\n".join(lines)) from None


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{origin} is not valid YAML: {error}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """Reads `name=value` from a command line. Lists, mappings and null are YAML; the rest is left to validation."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingsError(f"{text!r} is no override: write name=value, for example -p rounds=7")
    is_yaml = value in ("", "null") or value.startswith(("[", "{"))
    return name, _yaml(value, repr(text)) if is_yaml else value


def _read(profile: str | Path) -> dict[str, Any]:
    """The values in a profile's file."""
    path = Path(profile) if str(profile).endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise SettingsError(f"no profile {str(profile)!r}: known are {known}, or give the path of a YAML file")
    values = _yaml(path.read_text(encoding="utf-8"), path.name)
    if not isinstance(values, dict):
        raise SettingsError(f"{path.name}: expected: parameters by name, got {values!r}")
    return values


def _merged(whole: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`whole` with some values changed; groups are merged, while lists and an engine's options are replaced."""
    merged = dict(whole)
    for name, value in changes.items():
        group = isinstance(merged.get(name), dict) and isinstance(value, dict) and not name.endswith("options")
        merged[name] = _merged(merged[name], value) if group else value
    return merged


def load_profile(profile: str | Path, overrides: Mapping[str, object] | None = None) -> Settings:
    """Settings of a profile (a name in `profiles/`, or the path of a YAML file) with `overrides` by name.

    Raises SettingsError, naming the file or override, the parameter and the expected form.
    """
    values, origin = _read(profile), Path(profile).name
    if base := values.pop("base", None):
        whole = _read(base)
        if "base" in whole:
            raise SettingsError(f"{origin}: its base {base} has a base itself; expected: a whole profile")
        values = _merged(whole, values)
    return override(_validated(values, origin), overrides or {})


def override(settings: Settings, overrides: Mapping[str, object]) -> Settings:
    """The same settings with some parameters changed, by full or short name. Raises SettingsError."""
    values = settings.model_dump()
    for name, value in overrides.items():
        *parents, leaf = _dotted(name).split(".")
        group = values
        for parent in parents:
            group = group[parent]
        group[leaf] = value
    return _validated(values, "overrides")


def derive_seed(seed: int, *names: object) -> int:
    """A seed of its own for every stage: 31 bits of a hash of the run's seed and the stage's name."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
