"""Typed config of a run.

Each component owns its config class; jobs and methods register theirs in `recipes.config.sections`. All
mistakes of a config are reported at once, before a process group, a big file or a download is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from moe.attention.attention_config import AttentionConfig
from moe.errors import ConfigError, FieldError, Mistake, at_least, choose, require
from moe.experts.experts_config import ExpertsConfig
from moe.registry import declared_names
from moe.routers import router_classes, router_configs
from moe.routers.configs import RouterConfig
from moe.routing.top_k_schedule import SparsePhase
from moe.types import Config, unless
from moe.upcycle import upcycle_configs, upcycle_method, upcycle_methods
from moe.upcycle.configs import UpcycleConfig
from recipes.config.confused_kinds import confused_kinds
from recipes.config.owners import owner_mistake
from recipes.config.renamed import with_new_names
from recipes.config.sections import Section, section_classes
from recipes.data.config import DataConfig
from recipes.engines import engine_classes, engine_configs
from recipes.engines.config import EngineConfig
from recipes.engines.optim.config import OptimConfig
from recipes.runtime.config import FaultsConfig
from recipes.tracking.config import TrackerConfig

# A byte-level tokenizer has 256 bytes and the end token.
_SMALLEST_VOCABULARY = 257
_WRONG_TYPE = "this must be "
_NO_OPTION = "there is no such option", "Run graft train --cfg to see what there is."

T = TypeVar("T")
SectionT = TypeVar("SectionT", bound=Section)


# Generators of numpy and of torch take such seeds, with ranks and layers added to them.
_SEEDS = 2**32
_OF_TRAINING = ("train.eval_every", "train.save_every", "train.log_every", "train.keep_best")

# File systems take 255, of which temporary names need some.
_MOST_NAME_BYTES = 200


@dataclass(frozen=True)
class RunSection(Config):
    """Name of the run."""

    name: str | None = None
    """Folder below ``output_dir``. None: the job's name with the next free number."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.name is None or (self.name.strip() not in ("", ".", "..") and "/" not in self.name),
                "name",
                "must be a plain name",
                "Choose its place by output_dir.",
            ),
            (
                self.name is None
                or (len(self.name.encode()) <= _MOST_NAME_BYTES and self.name.isprintable()),
                "name",
                f"has at most {_MOST_NAME_BYTES} bytes, all of them printable: it names a folder",
                "Shorten it.",
            ),
        )


@dataclass(frozen=True)
class TrainConfig(Config):
    """Length of the training, its batches, validations and checkpoints."""

    steps: int = 600
    """Optimizer steps; 0 converts, compares and exports without training."""
    global_batch_size: int = 16
    """Samples of each step, over all ranks and micro-batches."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Samples of a forward pass on one rank; ``auto``: the global batch over the ranks, no accumulation."""
    eval_every: int = 100
    """Steps between validations; the first and the last step are validated as well. 0: only those."""
    eval_samples: int = 512
    """Validation samples at most."""
    save_every: int = 200
    """Steps between checkpoints; the last step is saved as well. 0: only that."""
    keep_last: int | None = 2
    """Checkpoints that are kept; None keeps all."""
    keep_best: bool = False
    """Keep the checkpoint of the lowest validation loss besides the last ones?"""
    async_save: bool = True
    """Train on while a checkpoint is written, from a copy of each rank's part in memory?"""
    log_every: int = 10
    """Steps between lines of progress where there is no terminal."""

    def __post_init__(self) -> None:
        minimum = {"steps": 0, "global_batch_size": 1, "eval_every": 0, "eval_samples": 1, "log_every": 1}
        micro, kept = self.micro_batch_size, self.keep_last
        require(
            self,
            *(
                (getattr(self, name) >= low, name, f"must be at least {low}", "Raise it.")
                for name, low in (minimum | {"save_every": 0}).items()
            ),
            (micro == "auto" or micro >= 1, "micro_batch_size", "must be at least 1", "Or leave it at auto."),
            (kept is None or kept >= 1, "keep_last", "would keep no checkpoint", "Set 1 or more, or null."),
        )

    def micro_size(self, world_size: int) -> int:
        """Samples of a forward pass on one of so many ranks."""
        if self.micro_batch_size == "auto":
            return self.global_batch_size // world_size
        return self.micro_batch_size

    def num_micro_batches(self, world_size: int) -> int:
        """Micro-batches of a step."""
        return self.global_batch_size // (world_size * self.micro_size(world_size))


@dataclass(frozen=True)
class DefaultModelConfig(Config):
    """Default model: the small Llama that a run trains where no checkpoint is given."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    tie_embeddings: bool = True
    seed: int = 0
    """Seed of its weights; the run's own seed may vary while this model stays."""
    steps: int = 800
    """Optimizer steps of its training; 0 keeps the weights as they were drawn."""
    lr: float = 3e-3
    warmup_steps: int = 40
    """Steps before the full learning rate; where no option of a command sets them, at most a fifth."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        heads, divides = self.num_heads, self.num_heads > 0 and self.hidden_size % self.num_heads == 0
        width = self.hidden_size // heads if divides else 2
        require(
            self,
            *at_least(self, 1, *sizes),
            (self.steps >= 0, "steps", "must be at least 0", "Set 0 to keep the weights as drawn."),
            (self.lr >= 0, "lr", "must be at least 0", "Raise it."),
            (
                self.vocab_size < 1 or self.vocab_size >= _SMALLEST_VOCABULARY,
                "vocab_size",
                f"must be at least {_SMALLEST_VOCABULARY}, for all bytes and the end token",
                "Raise it.",
            ),
            (
                heads < 1 or divides,
                "num_heads",
                f"does not divide hidden_size={self.hidden_size}",
                "Choose a divisor.",
            ),
            (
                width % 2 == 0,
                "num_heads",
                f"makes heads of {width}, and rotary embeddings need an even number",
                "Choose another divisor of hidden_size.",
            ),
            (
                self.num_kv_heads < 1 or heads % self.num_kv_heads == 0,
                "num_kv_heads",
                f"does not divide num_heads={heads}",
                "Choose a divisor.",
            ),
        )

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        return unless(self.steps > 0, "steps is 0, and the model stays as drawn", "lr", "warmup_steps")


@dataclass(frozen=True)
class RunConfig(Config):
    """Config of a run. ``conf/config.yaml`` and ``conf/section`` list the same options."""

    job: str
    """Name of the job; recipes set it."""
    router: RouterConfig
    upcycle: UpcycleConfig
    engine: EngineConfig
    seed: Annotated[int, Field(ge=0, lt=_SEEDS)] = 0
    output_dir: str = "outputs"
    cache_dir: str = "~/.cache/graft"
    """Folder of token files and default models, kept between runs."""
    resume: str = "none"
    """``none``, ``auto`` (the newest complete checkpoint of the run), or the path of a run directory."""
    dense: str | None = None
    """Folder of a dense checkpoint in Hugging Face format; None trains the default model first."""
    trust_remote_code: bool = False
    """Whether code of the dense checkpoint may run: its model's and its tokenizer's (docs/data.md)."""
    run: RunSection = field(default_factory=RunSection)
    data: DataConfig = field(default_factory=DataConfig)
    model: DefaultModelConfig = field(default_factory=DefaultModelConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    attention: AttentionConfig | None = None
    """Key-value heads as experts; None leaves attention dense."""
    top_k_schedule: list[SparsePhase] = field(default_factory=list)
    """Stretches of the run in which lower layers use more experts than ``router.top_k``; none: K stays."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    sections: Mapping[str, Any] = field(default_factory=dict)
    """Sections that single jobs and methods read, by name."""

    def idle(self) -> dict[str, str]:
        """Returns the options without effect; see `Config.idle`."""
        method = upcycle_method(self.upcycle)
        measures = f"upcycle={self.upcycle.name} looks at no activations"
        code = self.dense is not None or bool(method.sources)
        trains = self.train.steps > 0
        return (
            unless(self.dense is None, "dense is given, and no default model is made", "model")
            | unless(code, "the default model brings no code", "trust_remote_code")
            | unless(bool(method.statistics), measures, "calibration")
            | unless(trains, "train.steps is 0", "optim", "top_k_schedule", *_OF_TRAINING)
        )

    def section(self, cls: type[SectionT]) -> SectionT:
        """Returns the section of a job or method."""
        section = self.sections.get(cls.name, cls())
        assert isinstance(section, cls), f"{cls.name} is a {type(section)}"
        return section


def config_classes() -> dict[str, Mapping[str, type[Any]]]:
    """Returns, for each section whose ``name`` picks a class, the config classes by that name."""
    return {"router": router_configs(), "upcycle": upcycle_configs(), "engine": engine_configs()}


def _own_file(section: str, name: object) -> tuple[type[Any] | None, list[str]]:
    """Returns the config class that stands in the file of the class that it configures, and all such names.

    Only a name that one of these files declares is worth importing them, and torch with them.
    """
    package, files, classes = {
        "router": ("moe.routers", "*.py", router_classes),
        "upcycle": ("moe.upcycle", "*.py", upcycle_methods),
        "engine": ("recipes.engines", "*/*_engine.py", engine_classes),
    }[section.rpartition(".")[2]]
    names = declared_names(package, files, beside="config_class")
    found = classes().get(str(name)) if name in names else None
    return None if found is None else found.config_class, names


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Reads composed yaml values into the typed config.

    Raises:
        ConfigError: Unknown keys, wrong types, values that break a rule of their own section, or names of
            components that do not exist; all of them at once.
    """
    mistakes: list[Mistake] = []
    content = with_new_names(values)
    if "sections" in content:
        mistakes.append(Mistake("sections", content.pop("sections"), *_NO_OPTION))
    families = config_classes()
    for name, classes in families.items():
        content[name] = _parse_family(name, content.get(name), classes, mistakes)
    content["attention"] = _parse_attention(content.get("attention"), families["router"], mistakes)
    # A component that failed is left out, so that the mistakes of the others are found as well.
    missing = [name for name in families if content[name] is None]
    own = {name: content.pop(name) for name in section_classes() if name in content}
    found: list[Mistake] = []
    config = _read(
        RunConfig, {name: value for name, value in content.items() if name not in missing}, "", found
    )
    mistakes += [mistake for mistake in found if mistake.path not in missing]
    sections = {name: _read(section_classes()[name], value, name, mistakes) for name, value in own.items()}
    if mistakes:
        raise ConfigError(mistakes)
    assert config is not None, "a config without mistakes is read"
    return replace(config, sections=sections)


def _parse_family(
    section: str, value: Any, classes: Mapping[str, Any], mistakes: list[Mistake]
) -> Any | None:
    """Reads a section whose ``name`` decides its class."""
    if not isinstance(value, Mapping) or "name" not in value:
        remedy = f"Set {section}.name. {choose(value, classes)}"
        mistakes.append(Mistake(section, value, "the section must hold a name", remedy))
        return None
    name = value["name"]
    own, names = (classes[name], []) if name in list(classes) else _own_file(section, name)
    if own is None:
        remedy = choose(name, {*names, *classes})
        mistakes.append(Mistake(f"{section}.name", name, f"no {section} has this name", remedy))
        return None
    return _read(own, dict(value), section, mistakes)


def _parse_attention(value: Any, routers: Mapping[str, Any], mistakes: list[Mistake]) -> Any | None:
    """Reads the section ``attention``, whose router is a section of its own; None for dense attention."""
    if value is None or value == {"name": "none"}:
        return None
    if not isinstance(value, Mapping) or value.get("name") != "moe":
        rule = "options of attention experts stand in a section whose name is moe"
        mistakes.append(Mistake("attention", value, rule, "Set attention=moe, or attention=none alone."))
        return None
    router = _parse_family("attention.router", value.get("router"), routers, mistakes)
    if router is None:
        return None
    return _read(AttentionConfig, {**value, "router": router}, "attention", mistakes)


def _read(cls: type[T], content: Any, prefix: str, mistakes: list[Mistake]) -> T | None:
    """Reads a section into its class; None after adding to the mistakes."""
    try:
        section: T = TypeAdapter(cls).validate_python(content)
    except ValidationError as error:
        mistakes += _mistakes(error, prefix)
        return None
    confused = list(confused_kinds(content, section, prefix))
    mistakes += confused
    return None if confused else section


def _mistakes(error: ValidationError, prefix: str) -> list[Mistake]:
    """Translates pydantic's findings."""
    mistakes: dict[tuple[str, str], Mistake] = {}
    for found in error.errors():
        path = ".".join([prefix] * bool(prefix) + [str(part) for part in _path(found["loc"])])
        for mistake in _translate(path, found):
            mistakes.setdefault((mistake.path, mistake.rule), mistake)
    return _without_alternatives(list(mistakes.values()))


def _without_alternatives(mistakes: list[Mistake]) -> list[Mistake]:
    """Merges what pydantic reports of each type that a value may have."""
    kept: dict[str, Mistake] = {}
    others = []
    for mistake in mistakes:
        if not mistake.rule.startswith(_WRONG_TYPE):
            others.append(mistake)
        elif before := kept.get(mistake.path):
            rule = f"{before.rule} or {mistake.rule.removeprefix(_WRONG_TYPE)}"
            kept[mistake.path] = Mistake(mistake.path, mistake.value, rule, "Correct the value.")
        else:
            kept[mistake.path] = mistake
    inner = [path for path in kept if not any(other.startswith(f"{path}.") for other in kept)]
    return [kept[path] for path in inner] + others


def _path(location: tuple[int | str, ...]) -> list[int | str]:
    # Members of a union add the name of their type to the location: `str`, `list[str]`, `literal['auto']`.
    plain = [part for part in location if isinstance(part, int) or part.isidentifier()]
    return plain[:-1] if len(plain) > 1 and plain[-1] in ("str", "int", "float", "bool") else plain


def _translate(path: str, found: Any) -> list[Mistake]:
    kind, value = found["type"], found["input"]
    if kind == "value_error":
        error = found["ctx"]["error"]
        if isinstance(error, FieldError):
            return [mistake.under(path) for mistake in error.mistakes]
        return [Mistake(path, value, str(error), "Correct it.")]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return [Mistake(path, value, *(owner_mistake(path) or _NO_OPTION))]
    if kind in ("missing", "missing_argument"):
        return [Mistake(path, None, "this option is required", "Set it.")]
    message = found["msg"].removeprefix("Input should be ").partition(", unable to ")[0]
    remedy = "Correct the value."
    if kind == "string_type" and isinstance(value, bool | int | float):
        remedy = f"""Quote it, with the shell's quotes outside: '{path}="{value}"'."""
    return [Mistake(path, value, f"{_WRONG_TYPE}{message}", remedy)]
