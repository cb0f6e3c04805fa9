"""What rounding leaves of a training: weights of step 0 are made again, and changes are counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe.errors import ModelError
from moe.upcycle.configs import UpcycleConfig
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.configs.drop_config import DropConfig
from moe.upcycle.configs.shared_dense_config import SharedDenseConfig
from recipes.jobs.rounding import RoundingCost, StepZero, Survival, SurvivalCount, loses_bits
from recipes.upcycling.convert.moe_plan import MoEPlan, open_dense
from tests.conftest import MakeCheckpoint
from tests.grid import each
from tests.recipes.upcycling.sharded.online_cases import Case, made_whole, plan_of, state

pytestmark = pytest.mark.usefixtures("one_thread")
COPY = CopyConfig(num_experts=4)


def step_zero(plan: MoEPlan, **options: Any) -> StepZero:
    assert plan.model is not None
    return StepZero(plan.model, plan, **options)


@each(
    ("family", "options", "method"),
    [
        ("llama", {"dtype": "bfloat16", "tied": True}, replace(COPY, noise_std=0.3)),
        ("gpt2", {"tied": True}, replace(COPY, layers=[1])),
        ("phi3", {}, DropConfig(num_experts=4)),
        ("mistral", {}, SharedDenseConfig(num_experts=4)),
    ],
    ids=["noise", "some layers", "fused", "shared"],
)
def test_the_weights_of_step_0_are_made_again(
    family: str, options: dict[str, Any], method: UpcycleConfig, make_checkpoint: MakeCheckpoint
) -> None:
    case = Case(make_checkpoint(family, **options), method)
    again = step_zero(plan_of(case))
    for name, tensor in state(made_whole(case, {}).module).items():
        made = again.read(name, tensor.shape)
        assert made is not None and torch.equal(made, tensor), name


def test_the_dense_model_itself_and_what_is_not_known(make_checkpoint: MakeCheckpoint) -> None:
    dense = make_checkpoint("llama")
    again = StepZero(open_dense(dense))
    for name, tensor in state(made_whole(Case(dense), {}).module).items():
        made = again.read(name, tensor.shape)
        assert made is not None and torch.equal(made, tensor), name
    assert again.read("model.layers.0.mlp.router.weight_ED", (4, 32)) is None
    routerless = step_zero(plan_of(Case(dense, COPY)), routers=False)
    assert routerless.read("model.layers.0.mlp.router.weight_ED", (4, 32)) is None
    assert routerless.read("model.layers.0.self_attn.some_factor", (2,)) is None


class Known:
    """Weights of step 0 that a test gives."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self._tensors = tensors

    def read(self, name: str, shape: Any) -> torch.Tensor | None:
        return self._tensors.get(name)


def seen(count: SurvivalCount, **tensors: torch.Tensor) -> Survival:
    for name, tensor in tensors.items():
        count.see(name, tensor, tensor.bfloat16().float(), torch.bfloat16)
    return count.result()


def test_changes_are_counted_by_hand() -> None:
    # bf16 has steps of 2^-7 above 1: a change of 2^-9 is lost, one of 2^-6 is kept, one weight is as it was.
    known: Any = Known(w=torch.ones(3), odd=torch.tensor([1 + 2**-9]))
    found = seen(SurvivalCount(lambda: known), w=torch.tensor([1 + 2**-9, 1 + 2**-6, 1.0]))
    assert (found.changed, found.survived, found.left_out) == (2, 0.5, None)
    # What rounding alone moved is no survival: both ends are rounded.
    assert seen(SurvivalCount(lambda: known), odd=torch.tensor([1 + 2**-10])).survived == 0
    found = seen(SurvivalCount(lambda: known), w=torch.ones(3), other=torch.ones(2), more=torch.ones(2))
    assert (found.changed, found.survived) == (0, None)
    assert found.left_out == "without 2 tensors whose start is not known, other first"
    assert "no weights that training changed were found" in found.words()


def test_a_dense_model_that_is_gone_is_said() -> None:
    def gone() -> StepZero:
        raise ModelError.one("dense", "there", "there is no config.json in it", "Give it.")

    found = seen(SurvivalCount(gone), w=torch.ones(3))
    assert found.left_out is not None and "cannot be read any more: dense='there'" in found.left_out


def test_a_training_that_is_mostly_lost_is_no_copy() -> None:
    cost = RoundingCost("bfloat16", 1e-3, 3.302, 3.478, 0.02, Survival(1000, 0.079))
    assert cost.loses_most
    said = cost.words("--dtype fp32", "validation text")
    assert "most of what was trained is lost; 7.9% of the 1,000 weights that training changed survive" in said
    assert "from 3.3020 to 3.4780 on validation text" in said and "--dtype fp32 keeps" in said
    assert not replace(cost, survival=Survival(1000, 0.9)).loses_most
    assert loses_bits([torch.float32, torch.bfloat16]) and not loses_bits([torch.float32, torch.int64])
