"""Profiles: every parameter of the recipe, named once and validated on load; and the model hub.

A profile is one YAML file that sets all parameters, or names another as its `base` and sets what
differs. Knows nothing of what the parameters do.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
import yaml
from huggingface_hub import HfApi, errors, get_token, snapshot_download
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from foggen.store import ROOT

PROFILES = Path(__file__).parent / "profiles"


class SettingsError(ValueError):
    """A profile or an override that cannot be used; the message names the expected form."""


class HubError(SettingsError):
    """A model or data set that the hub does not give; the message says what to do."""


# ---- The parameters


class Part(BaseModel):
    """A group of settings: immutable, and without names that it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


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
    processes: PositiveInt  # GPUs, through accelerate launch


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


class TokenLimits(Part):
    """New tokens of an answer, by open-ended task."""

    squad: PositiveInt
    truthfulqa: PositiveInt
    gsm8k: PositiveInt


class R15(Part):
    """Rows of the open-ended branch: new ones by task, and replayed ones of the chain."""

    squad: NonNegativeInt
    truthfulqa: NonNegativeInt
    gsm8k: NonNegativeInt
    replay: NonNegativeInt


class OpenEnded(Part):
    """The open-ended evaluation and its branch round."""

    eval_questions: PositiveInt  # per task
    max_new_tokens: TokenLimits
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

    @field_validator("domains")
    @classmethod
    def _name_files(cls, domains: list[str]) -> list[str]:
        """Domains name rows of tables beside `mean`, and files."""
        names = [file_name(domain) for domain in domains]
        for domain, name in zip(domains, names, strict=True):
            if name in ("", "_", "mean"):
                raise ValueError(f"{domain!r} cannot be a domain's name")
            if names.count(name) > 1:
                raise ValueError(f"{domain!r} and another domain would share the files {name!r}")
        return domains

    def only(self, *names: str) -> dict[str, Any]:
        """The named settings as plain values: what a stage depends on, for its key."""
        return self.model_dump(mode="json", include=set(names))


def file_name(text: str) -> str:
    """A name as part of a file's name: `Kazakh culture` becomes `kazakh_culture`."""
    return re.sub(r"\W+", "_", text.strip().casefold())


def parameter_names(part: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Every parameter by its dotted name."""
    names = []
    for key, field in part.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Part):
            names += parameter_names(inner, f"{prefix}{key}.")
        else:
            names.append(prefix + key)
    return names


# ---- Profiles


class _Loader(yaml.SafeLoader):
    """YAML without repeated keys (the last would win) and without aliases (a few can fill memory)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(
                problem="anchors and aliases are not read", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} is set twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"{origin} cannot be read as YAML: {error}") from None


def _read(profile: str | Path) -> dict[str, Any]:
    """The values in a profile's file."""
    path = Path(profile)
    if path.suffix not in (".yaml", ".yml"):
        path = PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise SettingsError(f"no profile {profile}: there are {known}, or the path of a YAML file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path.name}: {error}; expected: a YAML file in UTF-8") from None
    values = _yaml(text, path.name)
    if not isinstance(values, dict):
        raise SettingsError(f"{path.name}: {values!r:.60}; expected: parameters by name")
    return values


def _merged(whole: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`whole` with some values changed; groups are merged, lists and engine options replaced."""
    merged = dict(whole)
    for name, value in changes.items():
        options = str(name).endswith("options")
        group = isinstance(merged.get(name), dict) and isinstance(value, dict) and not options
        merged[name] = _merged(merged[name], value) if group else value
    return merged


def load_profile(profile: str | Path, overrides: Mapping[str, object] | None = None) -> Settings:
    """Settings of a profile (a name in `profiles/`, or the path of a YAML file) with `overrides`.

    Raises SettingsError with the file or override, every wrong parameter and its expected form.
    """
    values, origin = _read(profile), Path(profile).name
    if base := values.pop("base", None):
        whole = _read(base)
        if "base" in whole:
            raise SettingsError(f"{origin}: its base {base} has a base; expected: a whole profile")
        values = _merged(whole, values)
    return override(_validated(values, origin), overrides or {})


def parse_override(text: str) -> tuple[str, Any]:
    """Reads `name=value` of a command line: `sft.learning_rate=1e-4`, `domains=[law, math]`.

    Lists, mappings and null are YAML; other values stay texts for validation.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SettingsError(f"{text!r} is no override; expected: name=value, such as rounds=7")
    is_yaml = value in ("", "null") or value.startswith(("[", "{"))
    return name, _yaml(value, repr(text)) if is_yaml else value


def override(settings: Settings, overrides: Mapping[str, object]) -> Settings:
    """The same settings with some parameters changed, by dotted name. Raises SettingsError."""
    values = settings.model_dump()
    for name, value in overrides.items():
        if name not in parameter_names():
            raise SettingsError(f"{name!r} is not a parameter{_suggestion(name)}")
        *parents, leaf = name.split(".")
        group = values
        for parent in parents:
            group = group[parent]
        group[leaf] = value
    return _validated(values, "overrides")


def _suggestion(name: str) -> str:
    """The parameters that a wrong name may have meant, else all of them."""
    names = parameter_names()
    close = [full for full in names if name.split(".")[-1] in full]
    close = close or difflib.get_close_matches(name, names)
    return f"; did you mean {' or '.join(close)}?" if close else f"; expected: {', '.join(names)}"


def _validated(values: Mapping[str, Any], origin: str) -> Settings:
    """The settings, or a SettingsError with pydantic's message and the value, a line per problem."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name, kind = ".".join(map(str, problem["loc"])), problem["type"]
            more = "" if kind == "missing" else f", got {problem['input']!r:.80}"
            if kind == "extra_forbidden":
                more = _suggestion(name)
            lines.append(f"  {name}: {problem['msg']}{more}")
        head = f"{origin}: {len(lines)} setting(s) cannot be used"
        raise SettingsError("\n".join([head, *lines])) from None


def derive_seed(seed: int, *names: object) -> int:
    """The seed of one stage: 31 bits of a hash of the run's seed and the stage's name."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


# ---- The hub

Kind = Literal["model", "dataset"]
MODEL_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model"]  # no pickles, no code
UNREACHABLE = (errors.OfflineModeIsEnabled, httpx2.TransportError, ConnectionError)


def is_local(name: str) -> bool:
    """Whether a name is a file or folder of this checkout or machine."""
    return (ROOT / name).exists()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from: libraries wrap those of the hub."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _advice(error: BaseException, name: str, kind: Kind, revision: str | None) -> str | None:
    """What to do about one error of the hub's libraries; None for other errors."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    login = (
        "with the account of your token"
        if get_token()
        else "and log in: hf auth login, or set HF_TOKEN"
    )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full. Free some space, or set HF_HOME to a folder on a larger disk"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated. Ask for access at {page} {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}. See {page}/commits/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such {kind}, or it is private. See {page} {login}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"the hub answered with status {status} ({error.response.reason_phrase}). "
    if isinstance(error, UNREACHABLE):
        return "the hub cannot be reached"
    return None


@contextmanager
def explained(name: str, kind: Kind, revision: str | None = None) -> Iterator[None]:
    """Turns errors of the hub's libraries inside the block into a HubError that says what to do."""
    try:
        yield
    except Exception as error:
        for cause in _causes(error):
            if advice := _advice(cause, name, kind, revision):
                raise HubError(f"{kind} {name}: {advice}.") from error
        raise


def cached_snapshot(name: str, kind: Kind, revision: str | None = None) -> Path | None:
    """The folder of the newest or the named revision in this machine's cache; asks no hub."""
    patterns = MODEL_FILES if kind == "model" else None
    try:
        folder = snapshot_download(
            name, repo_type=kind, revision=revision, allow_patterns=patterns, local_files_only=True
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    return Path(folder)


def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model: of the checkout, else of the hub, downloaded where it is not here yet.

    Raises SettingsError for a name that is neither, HubError where the hub does not give it.
    """
    if (ROOT / model).is_dir():
        return ROOT / model
    if model.count("/") > 1 or model.startswith((".", "/")):
        raise SettingsError(f"model {model!r}: no such folder; expected: a folder, or a hub id")
    with explained(model, "model", revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=MODEL_FILES))


def newest_commit(name: str, kind: Kind) -> str | None:
    """The commit that is the newest now; without a connection that of the cached copy, if any."""
    try:
        with explained(name, kind):
            return HfApi().repo_info(name, repo_type=kind).sha
    except HubError as error:
        if not any(isinstance(cause, UNREACHABLE) for cause in _causes(error)):
            raise
    folder = cached_snapshot(name, kind)
    return folder.name if folder else None


def hub_models(settings: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
    """The models that a run may need, {setting of the revision: (model, revision)}."""
    edge, cloud, branch = settings["edge"], settings["cloud"], settings["open_ended"]
    models = {"edge.revision": (edge["model"], edge["revision"])}
    if install := edge["format_install"]:
        models["edge.format_install"] = (install["labels_from"], install["revision"])
    if cloud["engine"] != "openai":
        models["cloud.revision"] = (cloud["model"], cloud["revision"])
    if branch["r15_model"]:
        models["open_ended.r15_revision"] = (branch["r15_model"], branch["r15_revision"])
    return models


def pin(settings: Settings, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Overrides that fix revisions left open: as `before` (the run's earlier settings), else now."""
    values = settings.model_dump()
    earlier = Settings.model_validate(before).model_dump() if before else values
    known = hub_models(earlier)
    pins: dict[str, Any] = {}
    for name, (model, revision) in hub_models(values).items():
        if not revision and not is_local(model):
            old_model, old = known.get(name, (None, None))
            pins[name] = (old if old_model == model else None) or newest_commit(model, "model")
    if commit := pins.get("edge.format_install"):
        pins["edge.format_install"] = {**values["edge"]["format_install"], "revision": commit}
    sources = values["data"]["sources"]
    revisions = {source["path"]: source["revision"] for source in earlier["data"]["sources"]}
    for source in sources:
        if not source["revision"] and not is_local(source["path"]):
            pins["data.sources"] = sources
            commit = revisions[source["path"]] or newest_commit(source["path"], "dataset")
            source["revision"] = commit
    return pins
