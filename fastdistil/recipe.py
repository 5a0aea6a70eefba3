"""The whole run as frozen, validated data: YAML in, YAML out.

A recipe is read from a name (`fastdistil/recipes/NAME.yaml`) or a path, changed by `key=value` overrides, checked once at
birth, and written back as `recipe.yaml` into the run's directory. Nothing downstream checks a value again.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError, model_validator

from fastdistil.errors import UserError, printable
from fastdistil.untrusted import parse_yaml, read_yaml, reason, shown

RECIPES = Path(__file__).parent / "recipes"
VERSION = 1
Fraction = Field(ge=0.0, le=1.0)
# A count that floating point and every array of 64 bits hold.
PositiveInt = Annotated[int, Field(gt=0, le=2**53)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**53)]


class Section(BaseModel):
    # Readers of runs never validate a recipe: they need not wait for its schema.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _no_bool_as_number(cls, values: Any) -> Any:
        """pydantic would take `optim.lr=true` as 1.0."""
        if isinstance(values, Mapping):
            for name, value in values.items():
                field = cls.model_fields.get(name)
                annotation = field.annotation if field else None
                if isinstance(value, bool) and field and bool not in (annotation, *get_args(annotation)):
                    raise ValueError(f"{name} is not a yes/no option, got {value}")
        return values


class Teacher(Section):
    path: str
    """Hub id or directory of a masked or causal language model of transformers."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of its weights and arithmetic; auto: as loop.precision."""
    cache: str | None = None
    """Directory written by `fastdistil cache-teacher`: the soft loss then learns from the tokens listed there, and the teacher
    does not run."""
    top_k: PositiveInt = 32
    """Likeliest tokens that a cache lists for each token."""
    min_probability: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Of a cache: only the part of the teacher's distribution above this is learnt from. null: the tokens that are not listed
    are one bucket of known mass."""


class Student(Section):
    """Where the student comes from: exactly one of path, config, layers, every."""

    path: str | None = None
    config: dict[str, Any] | None = None
    """A transformers configuration, e.g. {model_type: bert, num_hidden_layers: 4}; vocab_size is the tokenizer's if absent."""
    layers: tuple[NonNegativeInt, ...] | None = Field(default=None, min_length=1)
    """Teacher layers that the student starts from."""
    every: PositiveInt | None = None
    """Short for layers: 0, every, 2 * every, ..."""
    architecture: Literal["same", "distilbert"] = "same"
    copy_head: bool = True
    """Start the head's transform (dense and norm before the vocabulary) from the teacher's too."""
    head: Literal["checkpoint", "fresh"] = "checkpoint"
    """fresh: draw what the checkpoint at `path` lacks of a language-model head, all of it for a bare encoder.
    checkpoint: refuse it. A body that lacks weights is always refused."""
    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Overrides every dropout probability of the student's configuration."""
    freeze_positions: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [name for name in ("path", "config", "layers", "every") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError(f"give exactly one of path, config, layers, every; got {', '.join(sources) or 'none'}")
        if self.architecture == "distilbert" and sources[0] in ("path", "config"):
            raise ValueError("architecture: distilbert is for students made from a BERT teacher's layers (layers or every)")
        if self.head == "fresh" and sources[0] != "path":
            raise ValueError(f"head: fresh is for a checkpoint without one (path), got {sources[0]}; see copy_head for layers")
        return self


class Data(Section):
    train: str = ""
    """A directory written by `fastdistil prepare`."""
    heldout: str | None = None
    layout: Literal["packed", "length-grouped"] = "packed"
    micro_batch_tokens: PositiveInt = 4096
    """Token budget of a micro-batch, padding included."""
    bin_width: PositiveInt = 4
    """length-grouped: sequences whose lengths fall into one bin of this many tokens share batches."""
    prefetch: PositiveInt = 2
    """Windows that are made ahead of the step."""
    verify: Literal["full", "size"] = "full"
    """full: check every shard's sha256 when a run starts."""
    cache_dir: str | None = None
    """A directory on each node's own disk: prepared corpora are copied there once per node, checked, and read from there."""


class Mask(Section):
    probability: float = Field(default=0.15, gt=0.0, lt=1.0)
    mask: float = Field(default=0.8, ge=0.0, le=1.0)
    keep: float = Field(default=0.1, ge=0.0, le=1.0)
    random: float = Field(default=0.1, ge=0.0, le=1.0)
    smoothing: NonNegativeFloat = 0.7
    """Tokens are chosen with weight count^-smoothing; 0 chooses uniformly."""
    whole_word: bool = False

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        if abs(self.mask + self.keep + self.random - 1.0) > 1e-9:
            raise ValueError(f"mask + keep + random must be 1, got {self.mask + self.keep + self.random:g}")
        return self


class Objective(Section):
    """total = a_ce soft + a_mlm (or a_clm) hard + a_cos cosine + a_mse mean squared error of hidden states."""

    a_ce: NonNegativeFloat = 5.0
    a_mlm: NonNegativeFloat = 2.0
    a_clm: NonNegativeFloat = 0.0
    a_cos: NonNegativeFloat = 1.0
    a_mse: NonNegativeFloat = 0.0
    temperature: PositiveFloat = 2.0
    divergence: Literal["forward-kl", "reverse-kl", "jsd"] = "forward-kl"
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Of the generalised JSD: the teacher's weight in the mixture."""
    soft_rows: Literal["all", "masked"] = "all"
    """Tokens that the soft loss sees: every non-padding one, or those with a label."""
    normalisation: Literal["update", "micro-batch"] = "update"
    """update: by the tokens of the whole update; micro-batch: mean of the micro-batches' means."""
    projection: bool = False
    """A learned linear map from the student's width to the teacher's for the hidden-state terms."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if not (self.a_ce or self.a_mlm or self.a_clm or self.a_cos or self.a_mse):
            raise ValueError("all loss weights are 0: nothing would be learnt")
        if self.a_mlm and self.a_clm:
            raise ValueError("a_mlm is for masked models, a_clm for causal ones: set one of them to 0")
        return self

    @property
    def needs_teacher(self) -> bool:
        return bool(self.a_ce or self.a_cos or self.a_mse)


class Optim(Section):
    lr: PositiveFloat = 5e-4
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.98, ge=0.0, lt=1.0)
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.0
    """On matrices and embeddings; norms and biases are never decayed."""
    warmup: float = Field(default=0.05, ge=0.0, le=1.0)
    """Fraction of all updates."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip: PositiveFloat | None = 5.0
    """Largest norm of the gradient; null: not clipped."""


class Loop(Section):
    epochs: PositiveFloat | None = None
    updates: PositiveInt | None = None
    accumulation: PositiveInt = 1
    """Micro-batches an update."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware multiplies bf16 matrices, else fp32."""
    compile: bool = False
    deterministic: bool = False
    """On a GPU: only algorithms that give the same bits every time."""
    nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_limit: PositiveInt = 10
    """skip: stop after this many skipped updates."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.updates is None):
            raise ValueError("give exactly one of epochs and updates")
        return self


class WorldOptions(Section):
    """The ranks: how they find each other, and how their gradients travel."""

    engine: Literal["auto", "alone", "horovod", "torch"] = "auto"
    """auto: alone for one rank, horovod for several."""
    ranks: PositiveInt | None = None
    """Ranks that an update's micro-batches are counted for: loop.accumulation of each. null: those the run starts with. A run
    that is continued by another number of ranks keeps it, and so its updates, data order and schedule."""
    rings: PositiveInt = 1
    """Parallel ways for gradients; what a ring is on each engine, README says."""
    topology: Literal["flat", "hierarchical", "torus"] = "flat"
    """Of Horovod's NCCL allreduce over several nodes."""
    sync: Literal["delayed", "every-micro-batch"] = "delayed"
    """delayed: gradients travel once an update; every-micro-batch: after each, as the published example, for comparison."""
    bucket_mib: PositiveFloat = 25.0
    """Size of a flat gradient buffer, which travels as a whole."""
    first_bucket_mib: PositiveFloat = 1.0
    """Of the one that is ready first."""
    timeout_s: PositiveFloat = 60.0
    """A rank that is silent, or does not get on, for this long is lost: the others end with exit code 12."""
    check_replicas: PositiveInt | None = 100
    """Updates between comparisons of the ranks' weights by a hash; null: never."""


CompressionKind = Literal["none", "auto", "fp16", "bf16", "int8", "top-k", "powersgd"]


class Compression(Section):
    """The compression of gradients on their way between ranks. A bare name (compression: int8) is short for its kind."""

    kind: CompressionKind = "none"
    warmup_updates: NonNegativeInt = 10
    """Updates that are sent uncompressed first."""
    block: PositiveInt = 1024
    """int8: elements that share a scale."""
    density: float = Field(default=0.01, gt=0.0, le=1.0)
    """top-k: share of the elements that are sent."""
    rank: PositiveInt = 4
    """powersgd: columns of the factors."""
    min_compression_rate: PositiveFloat = 2.0
    """powersgd: matrices that would shrink less are sent whole."""
    error_feedback: bool = True
    """What was not sent is added to the next update's gradient."""

    @model_validator(mode="before")
    @classmethod
    def _bare_kind(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("frozen_variance_after", "absent") is None:
            # Runs of earlier versions have it in their recipe.yaml, and go on.
            return {key: value for key, value in values.items() if key != "frozen_variance_after"}
        return {"kind": values} if isinstance(values, str) else values


class Evaluation(Section):
    every: PositiveInt | None = None
    """Updates between evaluations on data.heldout; null: only at the end."""
    max_sequences: PositiveInt | None = 512
    batch_tokens: PositiveInt = 8192


class Checkpoint(Section):
    every: PositiveInt | None = 500
    """Updates between checkpoints; null: only at the end, on a signal and on PAUSE."""
    keep: PositiveInt = 2


class Logging(Section):
    every: PositiveInt = 10
    """Updates between log lines; each costs one wait for the device."""
    tensorboard: bool = False
    histograms: PositiveInt | None = None
    """Updates between histograms of the student's weights and moments for TensorBoard; null: none."""

    @model_validator(mode="after")
    def _histograms_have_a_place(self) -> Self:
        if self.histograms is not None and not self.tensorboard:
            raise ValueError("histograms are TensorBoard's; set logging.tensorboard=true")
        return self


class Profile(Section):
    warmup: NonNegativeInt = 3
    """Updates after every start that statistics leave out."""
    trace_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last update of which every rank writes a trace for Perfetto, e.g. [10, 13]."""
    measure_peaks: bool = False
    """Time a matrix product and a copy before training, as peaks beside the datasheet's; under a second."""

    @model_validator(mode="after")
    def _trace_has_an_order(self) -> Self:
        if self.trace_steps is not None and self.trace_steps[0] > self.trace_steps[1]:
            raise ValueError(f"trace_steps: the first update comes before the last, got {list(self.trace_steps)}")
        return self


class Recipe(Section):
    version: Literal[1] = 1
    name: str | None = Field(default=None, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Directory of the run below runs_dir; null: the recipe's name and the next free number."""
    runs_dir: str = "runs"
    seed: int = Field(default=56, ge=0, lt=2**63)
    pre_run: tuple[str, ...] = ()
    """Shell commands that run once on every node before training, e.g. to bring data to its disk."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "reference", "triton", "torch"] = "auto"
    """Implementation of the losses. reference: eager torch with whole logits, the specification; triton: a GPU's; torch: any
    device's, made for the CPU; auto: triton on a GPU, torch on a CPU."""
    teacher: Teacher | None = None
    student: Student
    data: Data = Data()
    mask: Mask = Mask()
    objective: Objective = Objective()
    optim: Optim = Optim()
    loop: Loop
    world: WorldOptions = WorldOptions()
    compression: Compression = Compression()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    profile: Profile = Profile()

    @model_validator(mode="after")
    def _teacher_matches_objective(self) -> Self:
        if self.teacher is None and (self.student.layers or self.student.every):
            raise ValueError("student.layers and student.every take layers from a teacher; set teacher.path")
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def with_(self, **sections: Any) -> "Recipe":
        """A changed copy, checked again: recipe.with_(data={"train": path}, name="x")."""
        values = self.model_dump()
        for name, value in sections.items():
            values[name] = {**(values[name] or {}), **value} if isinstance(value, Mapping) else value
        return validated(values, "the changed recipe")


def named_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or path and apply `key=value` overrides. Raises UserError."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, named_recipes(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known names: {', '.join(named_recipes())}; or give a .yaml file"
        raise UserError(f"no recipe {name_or_path!r}; {hint}")
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}; a recipe is a YAML file") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, wanted a mapping of recipe keys")
    check_version(values, path)
    for override in overrides:
        apply_override(values, override)
    changed = " ".join(overrides)
    return validated(values, f"recipe {name_or_path} with {shortened(changed)}" if changed else str(path))


def check_version(values: Any, path: Path) -> None:
    """Raise UserError where a newer fastdistil wrote the recipe."""
    version = values.get("version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise UserError(f"{path} is a recipe of version {version}, this fastdistil reads up to {VERSION}; upgrade fastdistil")


def shortened(text: str) -> str:
    return text if len(text) <= 500 else f"{text[:497]}..."


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in nested dictionaries, refusing names that no recipe has."""
    if printable(override) != override:
        raise UserError(f"override {override!r} is not UTF-8, as recipes are; rename the file or directory it names")
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {shown(override)} is not of the form key=value, e.g. optim.lr=1e-4")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"override {shown(override)}: {reason(error)}; quote it if it is text") from error
    parts = key.split(".")
    if parts[:2] != ["student", "config"]:
        _check_key(key)
    here = values
    for part in parts[:-1]:
        if not isinstance(here.get(part), dict):
            here[part] = {}
        here = here[part]
    here[parts[-1]] = value
    if len(parts) > 1:
        replace_alternatives(values, parts[0], {parts[1]: value})


_ALTERNATIVES = {"student": ("path", "config", "layers", "every"), "loop": ("epochs", "updates")}


def replace_alternatives(values: dict[str, Any], section: str, overrides: Mapping[str, Any]) -> None:
    """The ways to say one thing exclude each other: one that is given replaces the recipe's."""
    ways = _ALTERNATIVES.get(section, ())
    if any(overrides.get(way) is not None for way in ways) and isinstance(values.get(section), dict):
        for way in ways:
            if way not in overrides:
                values[section].pop(way, None)


def _check_key(key: str) -> None:
    keys = all_keys()
    if key not in keys:
        raise UserError(_unknown(key, keys))


def _unknown(key: str, keys: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(keys), n=1, cutoff=0.5) if len(key) < 100 else []
    if not near:  # a bare or misplaced last part: lr -> optim.lr
        near = [name for name in keys if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    return f"unknown recipe key {shown(key)}" + (f"; did you mean {near[0]!r}?" if near else "; --dry-run prints all keys")


def all_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of a recipe."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += all_keys(inner, f"{prefix}{name}.")
    return keys


def validated(values: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(shortened(f"{where}: " + "; ".join(_describe(problem) for problem in error.errors()))) from error


def _describe(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return _unknown(key, all_keys())
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if problem["type"] == "string_pattern_mismatch":
        return f"{key}: only letters, digits and . _ - (not first) make a name, got {shown(problem['input'])}"
    return f"{key}: {message[0].lower()}{message[1:]}, got {shown(problem['input'])}"


def cacheable(objective: Mapping[str, Any]) -> bool:
    """Return whether a cache can stand in for the teacher: it lists likely tokens, no hidden states (inputs.check_recipe)."""
    hidden = objective.get("a_cos") or objective.get("a_mse")
    return bool(objective.get("a_ce") and not hidden and objective.get("divergence") == "forward-kl")
