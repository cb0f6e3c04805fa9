"""The trainings that are run on 1, 2 and 4 ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from recipes.engines.optim.config import OptimConfig
from recipes.engines.optim.lr_schedule import ScheduleConfig
from tests.recipes.engines.engine_cases import GLOBAL_BATCH, Case

_ADAPTIVE = OptimConfig(lr=3e-3, schedule=ScheduleConfig("constant", warmup_steps=0))
_DDP = {"strategy": "ddp"}
_RECOMPUTE = {"activation_checkpointing": True}
_BF16 = {"precision": "bf16"}
_FOUR_HEADS = {"num_key_value_heads": 4}
_NO_BALANCE = {"balance_coef": 0.0, "z_coef": 0.1}
_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# On one rank; `on_ranks` halves the micro-batches for two.
ALONE: dict[str, Case] = {
    "fsdp": Case(),
    "ddp": Case(engine=_DDP),
    "fsdp_accumulating": Case(micro=4),
    "ddp_accumulating": Case(engine=_DDP, micro=4),
    "fsdp_recomputing": Case(engine=_RECOMPUTE, micro=4),
    "ddp_recomputing": Case(engine=_DDP | _RECOMPUTE, micro=4),
    "adamw": Case(optim=_ADAPTIVE, steps=3),
    "adamw_ddp": Case(optim=_ADAPTIVE, steps=3, engine=_DDP),
    "muon": Case(optim=replace(_ADAPTIVE, name="muon"), steps=3),
    "clipped": Case(optim=replace(_ADAPTIVE, clip_norm=0.1), steps=2),
    "dead_experts": Case(router_weights="equal", steps=1),
    "dead_experts_ddp": Case(router_weights="equal", steps=1, engine=_DDP),
    "one_expert": Case(
        router={"top_k": 1, "renormalise": False, "balance_coef": 0.5}, router_weights="equal", steps=1
    ),
    "lora": Case(micro=4, lora=4),
    "tied": Case(model={"tie_word_embeddings": True}),
    "biases": Case(family="gpt2", model=_GPT2),
    "attention_accumulating": Case(attention=True, model=_FOUR_HEADS, micro=4),
    "attention_ddp": Case(attention=True, model=_FOUR_HEADS, micro=4, engine=_DDP),
    "attention_recomputing": Case(attention=True, model=_FOUR_HEADS, micro=4, engine=_RECOMPUTE),
    "attention_bf16": Case(attention=True, model=_FOUR_HEADS, engine=_BF16, micro=4, steps=2),
    "attention_bf16_ddp": Case(attention=True, model=_FOUR_HEADS, engine=_BF16 | _DDP, micro=4, steps=2),
    "bf16": Case(engine=_BF16, steps=2),
    "bf16_ddp": Case(engine=_BF16 | _DDP, steps=2),
}

# The balance loss is of a micro-batch: without it the way a batch is cut must not show at all.
CUTS: dict[int, dict[str, Case]] = {
    1: {
        "1x1x8": Case(router=_NO_BALANCE, micro=8),
        "1x4x2": Case(router=_NO_BALANCE, micro=2),
        "1x4x2_ddp": Case(router=_NO_BALANCE, micro=2, engine=_DDP),
    },
    2: {
        "2x2x2": Case(router=_NO_BALANCE, micro=2),
        "2x4x1": Case(router=_NO_BALANCE, micro=1),
        "2x2x2_ddp": Case(router=_NO_BALANCE, micro=2, engine=_DDP),
    },
}
# One rank computes these losses in one piece, two do so by rows.
BY_ROWS = {"fsdp", "adamw", "adamw_ddp", "lora", "tied", "biases", "attention_ddp", "bf16", "bf16_ddp"}


def on_ranks(world_size: int) -> dict[str, Case]:
    """What so many ranks run: the same micro-batches over all ranks as one rank has."""
    shared = ALONE if world_size < 4 else {name: ALONE[name] for name in ("fsdp", "ddp_accumulating")}
    divided: dict[str, Any] = {
        name: replace(case, micro=case.micro // world_size, by_rows=world_size == 2 and name in BY_ROWS)
        for name, case in shared.items()
    }
    assert all(GLOBAL_BATCH % (case.micro * world_size) == 0 for case in divided.values())
    return divided | CUTS.get(world_size, {})
