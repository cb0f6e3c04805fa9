"""The mixtures that are made in shards and whole."""

from __future__ import annotations

from dataclasses import replace

from moe.routers.configs.avg_k_config import AvgKConfig
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.configs.hash_config import HashConfig
from moe.upcycle.configs.branch_train_mix_config import BranchTrainMixConfig
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.configs.drop_config import DropConfig
from moe.upcycle.configs.random_init_config import RandomConfig
from moe.upcycle.configs.shared_dense_config import SharedDenseConfig
from moe.upcycle.configs.virtual_group_config import VirtualGroupConfig
from moe.upcycle.dense_shape import FFNShape
from tests.conftest import MakeCheckpoint
from tests.moe.routers.routing_cases import METHOD_CONFIGS, label
from tests.recipes.upcycling.sharded.online_cases import Case, fitting_router, with_all_layers

COPY = CopyConfig(num_experts=4)
NOISY = replace(COPY, noise_std=0.3)
# What four ranks look at.
_FEW = ("dense", "bf16 tied", "transposed", "uneven")


def families(make: MakeCheckpoint, branches: list[str], *, few: bool) -> dict[str, Case]:
    """Hosts that store things differently, and layers that stay dense."""
    mix = BranchTrainMixConfig(num_experts=6, sources=branches, layers=[0, 2])
    every = {
        "dense": Case(make("llama", tied=True, dtype="bfloat16", sharded=True)),
        "bf16 tied": Case(make("llama", tied=True, dtype="bfloat16", sharded=True), NOISY),
        "biases": Case(make("llama", mlp_bias=True), replace(COPY, permute=True)),
        "fused": Case(make("phi3"), NOISY),
        "transposed": Case(make("gpt2", tied=True), replace(NOISY, permute=True)),
        "transposed copies": Case(make("gpt2", tied=True), COPY),
        "some layers": Case(make("qwen2", dtype="float16"), replace(COPY, layers=[1]), DeepSeekV3Config()),
        "shared": Case(make("mistral", dtype="bfloat16"), SharedDenseConfig(num_experts=4)),
        "uneven": Case(make("llama"), RandomConfig(num_experts=3, expert_width=17)),
        "drop": Case(make("olmo2", sharded=True), DropConfig(num_experts=4)),
        "branches": Case(make("llama"), mix),
        "hash": Case(make("llama"), COPY, HashConfig(table_size=300)),
        "avg_k": Case(make("llama"), NOISY, AvgKConfig()),
        "ddp": Case(make("llama", tied=True), NOISY, engine={"strategy": "ddp"}),
    }
    return {name: every[name] for name in (_FEW if few else every)}


def spread(make: MakeCheckpoint, ranks: int, *names: str) -> dict[str, Case]:
    """Experts that are spread over ranks; of the cases those that are named, or all."""
    dense, options = make("llama", tied=True, dtype="bfloat16"), {"expert_parallel": ranks}
    cases = {
        "noise": Case(dense, NOISY, engine=options),
        "virtual": Case(dense, VirtualGroupConfig(num_experts=8), engine=options),
        "shared": Case(dense, SharedDenseConfig(num_experts=4), engine=options),
        "biases": Case(make("gpt2", tied=True), NOISY, engine=options),
    }
    return {f"ep{ranks} {name}": cases[name] for name in names or cases}


def methods(make: MakeCheckpoint, branches: list[str]) -> dict[str, Case]:
    """Every method in every variant that the contract tests know."""
    cases = {}
    for config in METHOD_CONFIGS:
        act = "relu" if config.name == "moefication" else "silu"
        config = with_all_layers(config, branches)
        router = fitting_router(config, FFNShape(48, 32, gated=True, activation=act))
        if router is not None:
            cases[label(config)] = Case(make("llama", hidden_act=act), config, router)
    return cases
