"""Schedules of K worked by hand, and what is said of phases that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.routers.configs.topk_config import TopKConfig
from moe.routing.top_k_schedule import SparsePhase, make_schedule
from moe.types import LayerContext, RouterContext
from recipes.models.hf.hf_model import HFModel
from tests.moe.routers.routing_cases import make_layer


def test_phases_worked_by_hand() -> None:
    # Mixtures in layers 1, 3, 5 and 7, top-1. Until 90 percent of 10 steps the lowest two use 8 and 4.
    schedule = make_schedule([SparsePhase(0.9, [8, 4])], [1, 3, 5, 7], 1, 10, 64)
    assert schedule.starts == (0, 9)
    for step in range(12):
        expected = {1: 8, 3: 4, 5: 1, 7: 1} if step < 9 else {1: 1, 3: 1, 5: 1, 7: 1}
        assert schedule.at(step) == expected, step
    # Three phases by tokens, 64 a step: 128 tokens are two steps, 129 take a third.
    phases = [SparsePhase(128, 4), SparsePhase(129, 3, layers=1), SparsePhase(0.5, [2, 2])]
    schedule = make_schedule(phases, [0, 1, 2], 2, 10, 64)
    assert schedule.starts == (0, 2, 3, 5)
    assert [tuple(schedule.at(step).values()) for step in range(6)] == [
        (4, 4, 4),
        (4, 4, 4),
        (3, 2, 2),
        (2, 2, 2),
        (2, 2, 2),
        (2, 2, 2),
    ]


@pytest.mark.parametrize(
    ("until", "steps", "tokens", "end"),
    [
        # 0.07 * 100 is 7.000000000000001 in binary
        (0.07, 100, 1, 7),
        (0.9, 600, 2048, 540),
        (0.5, 7, 1, 4),
        (1e-9, 10, 1, 1),
        (40e9, 10**6, 2**20, 38147),
    ],
)
def test_ends_by_hand(until: float, steps: int, tokens: int, end: int) -> None:
    assert SparsePhase(until, 1).end(steps, tokens) == end


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"until": 0, "top_k": 2}, "until=0: a phase ends within the run. Give a share"),
        ({"until": 1, "top_k": 2}, "until=1: a phase ends within the run. "),
        ({"until": -3.0, "top_k": 2}, "until=-3.0: a phase ends within the run. "),
        ({"until": 0.5, "top_k": 0}, "top_k=0: a token needs at least one expert. "),
        ({"until": 0.5, "top_k": []}, r"top_k=\[\]: a token needs at least one expert. "),
        ({"until": 0.5, "top_k": [2, 0]}, r"top_k=\[2, 0\]: a token needs at least one expert. "),
        ({"until": 0.5, "top_k": [2], "layers": 1}, "layers=1: top_k names a number for each layer already"),
        ({"until": 0.5, "top_k": 2, "layers": 0}, "layers=0: a phase is of at least one layer. "),
        ({"until": 2.0, "top_k": -1, "layers": -1}, "(?s)top_k=-1: .*layers=-1: "),
    ],
)
def test_refused_phases(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsePhase(**fields)


class _Model(nn.Module):
    """Embeds ids and sends them through one mixture, in block 3."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = make_layer(TopKConfig(top_k=1, renormalise=False))

    def forward(self, input_ids: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(0)
        return self.mlp(torch.randn(*input_ids.shape, 6, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
def test_a_host_tells_its_layers_the_number_of_the_step(training: bool) -> None:
    module = _Model().train(training)
    run = RouterContext()
    module.mlp.context = LayerContext(run, 3)
    schedule = make_schedule([SparsePhase(0.5, 3)], [3], 1, 4, 64)
    model = HFModel(module, None, torch.float64, run, schedule)  # type: ignore[arg-type]
    used = []
    module.mlp.router.register_forward_hook(lambda module, args, out: used.append(out.expert_ids_TK.shape[1]))
    for step in range(4):
        model.context.step = step
        module(torch.zeros(2, 5, dtype=torch.long))
    assert used == [3, 3, 1, 1]
