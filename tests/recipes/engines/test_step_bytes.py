"""The sparsity-aware figures of real steps: against the live weights, and on two ranks as on one."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import nn

from moe.accounting.training import StepTouched, training_step_bytes
from recipes.engines import engine_classes
from recipes.jobs.accounts import step_costs
from recipes.runtime.interrupt import StopRequest
from recipes.tracking.ceilings import Ceiling
from recipes.training.callbacks.base import Callback
from recipes.training.model_costs import measure_costs, step_model
from recipes.training.training_loop import Loop
from tests.distributed_helper import run_ranks
from tests.recipes.engines.engine_cases import (
    EXPERTS,
    GLOBAL_BATCH,
    SEQ_LEN,
    Case,
    make_model,
    make_stage,
)

STEPS = 2
PEAK = 1e10
RANKS = 2


class _Keep(Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_row(self, stage: Any, row: Any, load: Any) -> None:
        self.rows.append(dict(row))


def train(rank: int, world_size: int, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Micro-batches of two samples, however many ranks share them."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    case = Case(micro=2 * options.get("tensor_parallel", 1), steps=STEPS)
    kind = engine_classes()[name]
    engine, model = kind(kind.config_class(name=name, device="cpu", threads=1, **options)), make_model(case)
    with patch("torch.distributed.init_process_group"):
        engine.open()
    try:
        return _train(engine, model, case)
    finally:
        if name == "megatron":
            engine.leave()


def _train(engine: Any, model: Any, case: Case) -> dict[str, Any]:
    module, costs = step_model(model), measure_costs(model, SEQ_LEN, PEAK)
    train_module = engine.prepare(model, case.optim)
    steps = step_costs(engine, model, module, train_module, Ceiling(PEAK, "user", "a test"))
    keep = _Keep()
    with tempfile.TemporaryDirectory() as folder:
        stage = make_stage(case, train_module, Path(engine.broadcast(folder)))
        stage.costs, stage.step_costs = costs, steps
        stage.train = replace(stage.train, eval_every=0)
        result = Loop(engine, [keep], StopRequest()).run(stage)
        engine.barrier()
    return {"rows": keep.rows[1:], "model": steps.model, "missing": result.missing}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    (one,) = run_ranks(train, 1, "native", {})
    return one


def test_a_step_model_is_that_of_the_live_weights() -> None:
    model = make_model(Case())
    module = step_model(model)
    parameters = dict(model.module.named_parameters())
    experts = {name: p for name, p in parameters.items() if ".experts." in name}
    one = sum(p.numel() for p in experts.values()) // (2 * EXPERTS)
    assert [moe.elements for moe in module.moe_blocks] == [one, one]
    assert [(moe.num_experts, moe.top_k) for moe in module.moe_blocks] == [(EXPERTS, 2)] * 2
    # Untied: the embedding is looked up, a row a token, and everything else is read.
    (table,) = [module for module in model.module.modules() if isinstance(module, nn.Embedding)]
    rest = sum(p.numel() for name, p in parameters.items() if name not in experts)
    looked_up = 0 if model.module.config.tie_word_embeddings else table.weight.numel()
    assert module.always == module.always_trained == rest - looked_up
    assert module.row == table.embedding_dim


def test_attention_experts_come_behind_the_networks() -> None:
    plain, both = step_model(make_model(Case())), step_model(make_model(Case(attention=True)))
    assert len(both.moe_blocks) == 4 and both.moe_blocks[:2] == plain.moe_blocks
    assert (
        both.moe_blocks[2].num_experts
        == make_model(Case(attention=True)).attention_layers()[0][1].router.num_experts
    )


@pytest.mark.distributed
def test_dropless_top_k_has_one_utilisation(alone: dict[str, Any]) -> None:
    for row in alone["rows"]:
        assert row["flops_per_token_used"] == row["flops_per_token"] and row["s_mfu"] == row["mfu"]
        done = row["flops_per_token"] * row["tokens_per_s"]
        assert row["s_mfu"] == pytest.approx(done / PEAK)
        assert row["s_mbu"] == pytest.approx(row["step_bytes"] / row["step_s"] / PEAK)
        assert 2 <= row["router/experts_touched"] <= EXPERTS


@pytest.mark.distributed
def test_bytes_of_a_step_where_all_experts_are_touched(alone: dict[str, Any]) -> None:
    model, every = alone["model"], (float(EXPERTS),) * 2
    # 48 slots of a micro-batch of random text over four experts: in the first step all are touched
    row = alone["rows"][0]
    assert row["router/experts_touched"] == EXPERTS
    touched = StepTouched(1, GLOBAL_BATCH // 2, GLOBAL_BATCH * SEQ_LEN, every, every)
    expected = training_step_bytes(model, touched, 4)
    assert row["step_bytes"] == expected.total
    # AdamW: weights and two moments read and written, gradients read, 4 bytes each; the embedding too
    trained = model.always + sum(EXPERTS * moe.elements for moe in model.moe_blocks)
    assert model.update_bytes >= 28 * trained


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_two_ranks_count_as_one(strategy: str, alone: dict[str, Any]) -> None:
    first, second = run_ranks(train, RANKS, "native", {"strategy": strategy})
    model = alone["model"]
    # Shards of the state are updated once, replicas by every rank.
    copies = 1 if strategy == "fsdp" else RANKS
    assert first["model"] == second["model"] == replace(model, update_bytes=copies * model.update_bytes)
    for ours, theirs, same in zip(first["rows"], alone["rows"], second["rows"], strict=True):
        for name in ("flops_per_token_used", "step_bytes", "router/experts_touched"):
            assert ours[name] == same[name], name
        assert ours["flops_per_token_used"] == theirs["flops_per_token_used"]
        assert ours["s_mbu"] == pytest.approx(ours["step_bytes"] / ours["step_s"] / (RANKS * PEAK))
    ours, theirs = first["rows"][0], alone["rows"][0]
    assert ours["router/experts_touched"] == theirs["router/experts_touched"] == EXPERTS
    # As many micro-batches; a gradient is read again once less, since each rank writes one first.
    once = model.always_trained + sum(EXPERTS * moe.trained for moe in model.moe_blocks)
    more = (copies - 1) * model.update_bytes - 4 * once
    assert ours["step_bytes"] == theirs["step_bytes"] + more


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["native", "deepspeed", "megatron"])
def test_spread_experts_are_read_once_for_both_ranks(engine: str, alone: dict[str, Any]) -> None:
    first, second = run_ranks(train, RANKS, engine, {"expert_parallel": RANKS})
    model, every = first["model"], (float(EXPERTS),) * 2
    ours, same = first["rows"][0], second["rows"][0]
    assert ours["step_bytes"] == same["step_bytes"] and ours["router/experts_touched"] == EXPERTS
    touched = StepTouched(RANKS, GLOBAL_BATCH // 2, GLOBAL_BATCH * SEQ_LEN, every, every, (RANKS,) * 2)
    assert ours["step_bytes"] == training_step_bytes(model, touched, 4).total
    # All are touched, so that both ranks read as many.
    assert ours["step_bytes_busiest_rank"] == ours["step_bytes"] / RANKS
    assert ours["s_mbu_busiest_rank"] == pytest.approx(ours["s_mbu"])


@pytest.mark.distributed
def test_where_matrices_are_cut_bytes_are_not_counted(alone: dict[str, Any]) -> None:
    first, _ = run_ranks(train, RANKS, "megatron", {"tensor_parallel": RANKS})
    for row, same in zip(first["rows"], alone["rows"], strict=True):
        assert not {"step_bytes", "s_mbu"} & set(row) and row["mfu"] > 0
        assert row["flops_per_token_used"] == same["flops_per_token_used"]
    assert "cut the model" in first["missing"]["s_mbu"]
