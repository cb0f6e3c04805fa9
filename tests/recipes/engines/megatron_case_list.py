"""The trainings under megatron-core, the layouts that they run in, and who reads whose checkpoints.

A layout is ``(ranks, tensor_parallel, expert_parallel)``, and where there are several stages their number as
well; the native engine's has 0 in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from recipes.engines.optim.config import FrozenConfig, OptimConfig
from recipes.engines.optim.lr_schedule import ScheduleConfig
from tests.recipes.engines.engine_cases import SGD, Case

Layout: TypeAlias = tuple[int, ...]

FAMILIES: dict[str, dict[str, Any]] = {
    # A rope base and an epsilon of its own, so that neither is a default that happens to be right.
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3},
    "mistral": {"sliding_window": 24, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 4},
}
_CONSTANT = ScheduleConfig("constant", warmup_steps=0)
# Frozen experts, two learning rates, decay, a clip that bites, in two micro-batches. With a small eps the
# sign of what rounding leaves of a gradient of 0 would decide where a weight goes, on the native engine too.
RICH = OptimConfig(
    lr=3e-3, eps=1e-3, router_lr_scale=2.0, clip_norm=0.5, frozen=FrozenConfig(steps=1), schedule=_CONSTANT
)
_RECOMPUTE: dict[str, Any] = {"activation_checkpointing": True}
_PLAIN: dict[str, Any] = {"distributed_optimizer": False}
_THEIRS: dict[str, Any] = {"experts": "megatron"}
_TE: dict[str, Any] = {"experts": "te"}
_GATHER: dict[str, Any] = {"dispatcher": "allgather"}
_DEEPEP: dict[str, Any] = {"dispatcher": "deepep"}
_HYBRID: dict[str, Any] = {"dispatcher": "hybridep"}
MEGATRON_ALONE = _PLAIN.keys() | _THEIRS.keys() | _GATHER.keys()


@dataclass(frozen=True)
class Stages(Case):
    """A case whose routers have a state that changes between steps.

    Attributes:
        layers: Blocks that are mixtures.
    """

    layers: str = "all"


CASES: dict[str, Case] = {
    "plain": Case(micro=4),
    "rich": Case(micro=4, optim=RICH, steps=3, engine=_RECOMPUTE),
    "theirs": Case(micro=4, engine=_THEIRS),
    "replicated": Case(micro=4, optim=RICH, steps=3, engine=_PLAIN),
    "replicated_theirs": Case(micro=4, engine=_PLAIN | _THEIRS),
    "dead_experts": Case(router_weights="equal", steps=1),
    "tied": Case(family="qwen2", model={"tie_word_embeddings": True}),
    "norms": Case(family="qwen3", optim=RICH, steps=2, eval_every=1),
    # Blocks that do not divide over stages, a state of the routers, an embedding in the first and last stage,
    # and so many micro-batches that recomputation in one comes after forward passes of the next.
    "deep": Stages(
        family="qwen2",
        model={"num_hidden_layers": 5, "tie_word_embeddings": True},
        micro=2,
        engine=_RECOMPUTE,
    ),
    # Mixtures in the last block alone.
    "half": Stages(layers="last:1", engine=_THEIRS, micro=4, optim=RICH, steps=2),
    "fp32": Case(steps=2),
    "lora": Case(micro=4, optim=RICH, steps=3, lora=4),
    "bf16": Case(engine={"precision": "bf16"}, steps=2),
    "bf16_replicated": Case(engine={"precision": "bf16"} | _PLAIN | _THEIRS, steps=2),
    # Other dispatchers and experts; on the native engine they are the cases of `SAME`.
    "gather": Case(micro=4, engine=_PLAIN | _GATHER),
    "gather_theirs": Case(micro=4, optim=RICH, steps=3, engine=_THEIRS | _GATHER | _RECOMPUTE),
    "te": Case(micro=4, engine=_PLAIN | _TE),
    # Dense networks have its fused activation, too.
    "te_gather": Stages(layers="last:1", engine=_TE | _GATHER | _RECOMPUTE, micro=4, optim=RICH, steps=2),
    "deepep": Case(micro=4, engine=_PLAIN | _DEEPEP),
    "deepep_te": Case(micro=4, optim=RICH, steps=3, engine=_TE | _DEEPEP | _RECOMPUTE),
    "deepep_dead": Case(router_weights="equal", steps=1, engine=_PLAIN | _THEIRS | _DEEPEP),
    "hybridep": Case(micro=4, optim=RICH, steps=3, engine=_PLAIN | _HYBRID | _RECOMPUTE),
    "hybridep_te": Case(micro=4, engine=_PLAIN | _TE | _HYBRID),
    "te_bf16": Case(engine={"precision": "bf16"} | _TE | _DEEPEP, steps=2),
    "long": Case(optim=replace(SGD, lr=0.1), steps=25, eval_samples=4),
}
# What a case is on the native engine, where that is another case.
SAME = {
    "theirs": "plain",
    "replicated": "rich",
    "replicated_theirs": "plain",
    "gather": "plain",
    "gather_theirs": "rich",
    "te": "plain",
    "te_gather": "half",
    "deepep": "plain",
    "deepep_te": "rich",
    "deepep_dead": "dead_experts",
    "hybridep": "rich",
    "hybridep_te": "plain",
    "te_bf16": "bf16",
    "bf16_replicated": "bf16",
}
_BF16 = ("bf16", "bf16_replicated")
_SENT = ("gather", "gather_theirs", "te", "te_gather", "deepep", "deepep_te", "deepep_dead")
_SENT += ("hybridep", "hybridep_te", "te_bf16")
TRAINED: dict[Layout, tuple[str, ...]] = {
    (1, 1, 1): ("plain", "rich", "replicated_theirs", "dead_experts", *_BF16, "tied", "norms"),
    (2, 1, 1): ("plain", "rich", "replicated"),
    (2, 1, 2): ("rich", "theirs", "lora", "replicated", "replicated_theirs", "dead_experts", *_BF16, "long")
    + _SENT,
    (2, 2, 1): ("rich", "replicated", "bf16", "tied", "norms", "long"),
    (2, 2, 2): ("rich", "replicated_theirs", "lora", "gather", "deepep_te"),
    (4, 2, 2): ("rich", "replicated_theirs"),
    (2, 1, 1, 2): ("rich", "fp32", "deep", "replicated_theirs", "bf16", "long", "lora"),
    # Whose first rank keeps frozen weights alone.
    (4, 1, 1, 2): ("rich", "replicated_theirs"),
    (4, 1, 2, 2): ("deep", "half", "replicated_theirs"),
    (4, 2, 2, 2): ("deep",),
    (4, 1, 1, 4): ("deep",),
}
# After these many steps a checkpoint is written, and one more step is done.
SAVED = 2
# Who writes, and who goes on from it; two ranks before one and four.
READS: dict[Layout, tuple[Layout, ...]] = {
    (2, 0, 1): ((2, 1, 2), (2, 2, 1), (1, 1, 1), (4, 2, 2), (2, 1, 1, 2)),
    (2, 1, 2): ((2, 0, 2), (2, 2, 2), (1, 0, 1)),
    (2, 2, 1): ((2, 0, 1), (2, 1, 1), (4, 2, 2)),
    (2, 1, 1, 2): ((1, 1, 1), (2, 0, 1), (4, 1, 2, 2)),
}
