"""The typed config of a run: what the yaml files and overrides are read into, and the rules across sections.

Each component owns its config class; this file only puts them together. Everything wrong with a config
is reported at once, before a process group, a big file or a download is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from moe.attention.attention_config import AttentionConfig
from moe.errors import ConfigError, FieldError, Mistake, require
from moe.experts.experts import ExpertsConfig
from moe.routers import RouterConfig, router_classes
from moe.routing.top_k_schedule import SparsePhase
from moe.types import Config
from moe.upcycle import UpcycleConfig, upcycle_methods
from recipes.config.calibration_config import CalibrationConfig
from recipes.config.prompts_config import PromptsConfig
from recipes.config.stage2 import Stage2Config
from recipes.config.upcycle_vs_cpt_config import UpcycleVsCPTConfig
from recipes.data.config import DataConfig
from recipes.engines import EngineConfig, engine_classes
from recipes.engines.optim.optimizer import OptimConfig
from recipes.runtime.config import FaultsConfig
from recipes.tracking.trackers import TrackerConfig

# A byte-level tokenizer has 256 bytes and the end token.
_SMALLEST_VOCABULARY = 257
_WRONG_TYPE = "this must be "


@dataclass(frozen=True)
class RunSection(Config):
    """What the run is called."""

    name: str | None = None
    """Folder below ``output_dir``. None: the job's name with the next free number."""

    def __post_init__(self) -> None:
        require(
            self,
            (
                self.name is None or (self.name not in ("", ".", "..") and "/" not in self.name),
                "name",
                "must be a plain name",
                "Choose its place by output_dir.",
            ),
        )


@dataclass(frozen=True)
class TrainConfig(Config):
    """How long and in what steps."""

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
    """Whether the checkpoint of the lowest validation loss is kept besides the last ones."""
    async_save: bool = True
    """Whether training goes on while a checkpoint is written, from a copy of each rank's part in memory."""
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
    """The embedded default: the small Llama that a run trains where no checkpoint is given."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    tie_embeddings: bool = True
    seed: int = 0
    """Of its weights; the run's own seed may vary while this model stays."""
    steps: int = 800
    """Optimizer steps of its training; 0 keeps the weights as they were drawn."""
    lr: float = 3e-3
    warmup_steps: int = 40

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        heads, divides = self.num_heads, self.num_heads > 0 and self.hidden_size % self.num_heads == 0
        width = self.hidden_size // heads if divides else 2
        require(
            self,
            *((getattr(self, name) >= 1, name, "must be at least 1", "Raise it.") for name in sizes),
            (self.steps >= 0, "steps", "must be at least 0", "Set 0 to keep the weights as drawn."),
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


@dataclass(frozen=True)
class CompareConfig(Config):
    """The baseline of the comparison."""

    cpt: bool | Literal["auto"] = "auto"
    """Whether the dense model is trained on the same tokens as well (continued pre-training); ``auto``:
    with the embedded default, and not with a checkpoint of your own."""


@dataclass(frozen=True)
class ExportConfig(Config):
    """The exported model."""

    dtype: Literal["source", "fp32", "bf16"] = "source"
    """Of the weights in the files; ``source``: as in the dense checkpoint."""
    memory_gib: float = 4.0
    """What the export may take of rank 0's memory, in fp32, when it is read back and compared. A larger model
    is read block by block, and generates no sample."""

    def __post_init__(self) -> None:
        remedy = "Set 0 to read every model block by block."
        require(self, (self.memory_gib >= 0, "memory_gib", "must be at least 0", remedy))


@dataclass(frozen=True)
class RunConfig(Config):
    """Everything a run is told. ``conf/config.yaml`` lists the same sections."""

    job: str
    """Which job runs: a name of `recipes.jobs`; recipes set it."""
    router: RouterConfig
    upcycle: UpcycleConfig
    engine: EngineConfig
    seed: int = 0
    output_dir: str = "outputs"
    cache_dir: str = "~/.cache/graft"
    """Where token files and the embedded default are kept between runs."""
    resume: str = "none"
    """``none``, ``auto`` (the newest complete checkpoint of the run), or the path of a run directory."""
    dense: str | None = None
    """Folder of a dense checkpoint in Hugging Face format; None trains the embedded default first."""
    trust_remote_code: bool = False
    run: RunSection = field(default_factory=RunSection)
    data: DataConfig = field(default_factory=DataConfig)
    model: DefaultModelConfig = field(default_factory=DefaultModelConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    attention: AttentionConfig | None = None
    """Key-value heads as experts; None leaves attention dense."""
    top_k_schedule: list[SparsePhase] = field(default_factory=list)
    """Stretches of the run in which lower layers use more experts than ``router.top_k``; none: K stays."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    stage2: Stage2Config = field(default_factory=Stage2Config)
    compare: CompareConfig = field(default_factory=CompareConfig)
    upcycle_vs_cpt: UpcycleVsCPTConfig = field(default_factory=UpcycleVsCPTConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    @property
    def trains_cpt(self) -> bool:
        """Whether the dense model is trained on as a baseline."""
        return self.dense is None if self.compare.cpt == "auto" else self.compare.cpt


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Reads composed yaml values into the typed config.

    Raises:
        ConfigError: Unknown keys, wrong types, values that break a rule of their own section, or names of
            components that do not exist; all of them at once.
    """
    mistakes: list[Mistake] = []
    content = dict(values)
    families = {"router": router_classes(), "upcycle": upcycle_methods(), "engine": engine_classes()}
    for section, classes in families.items():
        content[section] = _parse_family(section, content.get(section), classes, mistakes)
    content["attention"] = _parse_attention(content.get("attention"), families["router"], mistakes)
    if mistakes:
        # The sections that failed get a stand-in, so that the mistakes of the others are found as well.
        for section in families:
            if content[section] is None:
                content.pop(section)
        mistakes += [m for m in _validate(RunConfig, content, "") if m.path not in families]
        raise ConfigError(mistakes)
    try:
        config: RunConfig = TypeAdapter(RunConfig).validate_python(content)
    except ValidationError as error:
        raise ConfigError(_mistakes(error, "")) from None
    return config


def _parse_family(
    section: str, value: Any, classes: Mapping[str, Any], mistakes: list[Mistake]
) -> Any | None:
    """Reads a section whose ``name`` decides its class."""
    if not isinstance(value, Mapping) or "name" not in value:
        mistakes.append(Mistake(section, value, "the section must hold a name", f"One of {_list(classes)}."))
        return None
    if value["name"] not in classes:
        rule = f"no {section} has this name"
        mistakes.append(Mistake(f"{section}.name", value["name"], rule, f"Choose one of {_list(classes)}."))
        return None
    config_class = classes[value["name"]].config_class
    found = _validate(config_class, dict(value), section)
    if found:
        mistakes += found
        return None
    return TypeAdapter(config_class).validate_python(dict(value))


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
    content = {**value, "router": router}
    found = _validate(AttentionConfig, content, "attention")
    mistakes += found
    return None if found else TypeAdapter(AttentionConfig).validate_python(content)


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))


def _validate(config_class: Any, content: Mapping[str, Any], prefix: str) -> list[Mistake]:
    try:
        TypeAdapter(config_class).validate_python(content)
    except ValidationError as error:
        return _mistakes(error, prefix)
    return []


def _mistakes(error: ValidationError, prefix: str) -> list[Mistake]:
    """pydantic's findings as sentences with config path, value, rule and remedy."""
    mistakes: dict[tuple[str, str], Mistake] = {}
    for found in error.errors():
        path = ".".join([prefix] * bool(prefix) + [str(part) for part in _path(found["loc"])])
        for mistake in _translate(path, found):
            mistakes.setdefault((mistake.path, mistake.rule), mistake)
    return _without_alternatives(list(mistakes.values()))


def _without_alternatives(mistakes: list[Mistake]) -> list[Mistake]:
    """Of a value that may have one of several types, pydantic tells what is wrong with it as each of them."""
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
        return [Mistake(path, value, "there is no such option", "Run train.py --cfg to see what there is.")]
    if kind in ("missing", "missing_argument"):
        return [Mistake(path, None, "this option is required", "Set it.")]
    message = found["msg"].removeprefix("Input should be ").partition(", unable to ")[0]
    remedy = "Correct the value."
    if kind == "string_type" and isinstance(value, bool | int | float):
        remedy = f"""Quote it, with the shell's quotes outside: '{path}="{value}"'."""
    return [Mistake(path, value, f"{_WRONG_TYPE}{message}", remedy)]
